"""Step, loss, optimizer, loop, checkpoints and log."""
