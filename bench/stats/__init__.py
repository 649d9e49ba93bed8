"""Judge whether a measured difference is real."""
