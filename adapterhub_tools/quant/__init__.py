"""Quantised formats of a base, one file each: stored tensors to rows of weights, and back."""
