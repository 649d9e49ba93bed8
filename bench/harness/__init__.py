"""What the bench runs, and how: scenarios, processes, rounds, result files."""
