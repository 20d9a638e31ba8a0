"""Schedule rules, one a file: each writes the kernel it is asked for, or returns None and the next rule is tried."""
