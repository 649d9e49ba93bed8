"""Making the model fast and warm. Knows torch, knows no HTTP."""
