"""What reads files that nobody vouches for, in a limited child process; it imports the standard library only."""
