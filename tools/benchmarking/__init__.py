"""Side-by-side timing: each side in a process of its own, sides in turns, the others truly stopped."""
