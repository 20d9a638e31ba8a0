"""Samples, what is measured over them, and what values take at the nodes of a program."""
