"""Two graphs side by side in a browser: what became of every node, and why."""

from graphopt.diff_page.page import diff_page

__all__ = ["diff_page"]
