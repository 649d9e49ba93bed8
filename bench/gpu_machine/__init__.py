"""The GPU machine that a measurement session runs on: its packages, wheels, and a rehearsal."""
