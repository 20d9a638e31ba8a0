"""What `graphopt tune` does."""
