"""The parts of `graphopt.fit`: options, losses, what is trained, order of the data, checkpoints, the loop."""
