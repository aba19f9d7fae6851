"""Rows as the tensors that a model is given, and what of them it is to learn."""
