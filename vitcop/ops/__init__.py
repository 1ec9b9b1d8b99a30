"""Tensor operations that several methods share: they know tokens and scores, and no method, model or hook."""
