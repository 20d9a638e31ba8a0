"""What a pass has done, held against what the program did before it."""
