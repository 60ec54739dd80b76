"""Seam 1: pruning methods, one file a paper."""
