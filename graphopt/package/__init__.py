"""Folders to ship: an artifact with all that runs it, for a Python with numpy alone or for a C++ program."""
