"""Times our own code piece by piece, and checks what the bench itself reports."""
