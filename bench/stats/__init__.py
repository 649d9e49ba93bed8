"""Whether a difference is real."""
