"""What can be known of a recipe without loading weights or training: keys, references, data, batch arithmetic."""
