"""Slices of the loss: along directions through a model's weights, and between two models."""
