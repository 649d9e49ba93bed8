"""A measurement session: everything in the table of targets, measured in resumable pieces."""
