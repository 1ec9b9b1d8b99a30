"""Pruning methods compared on one manifest: the cells of a sweep, their answers and costs, and the report of them."""
