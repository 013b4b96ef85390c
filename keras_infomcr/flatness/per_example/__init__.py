"""Gram matrices of the gradients of single examples."""
