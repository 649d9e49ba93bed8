"""The programs that train the demo checkpoint and evaluate it."""
