"""Waiting requests: which are admitted, how long they will take, and which share a run."""
