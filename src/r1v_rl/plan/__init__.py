"""What a recipe will need, from its numbers alone."""
