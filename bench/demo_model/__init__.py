"""The programs that trained the demo checkpoint and judge it."""
