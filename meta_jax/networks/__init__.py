"""What embeds an input."""
