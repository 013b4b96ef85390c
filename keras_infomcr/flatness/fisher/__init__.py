"""Measures of the Fisher information of a few examples."""
