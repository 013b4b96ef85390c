"""Measures of the Hessian of the loss."""
