"""What single pieces cost, and what the bench itself adds."""
