"""The bare GPU machine that a session runs on: its packages, our wheels, and a rehearsal."""
