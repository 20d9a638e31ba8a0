"""Weights of one to eight bits: the value, the grids it lies on, how it is found, and the files that hold it."""
