"""Measures of the loss around the weights."""
