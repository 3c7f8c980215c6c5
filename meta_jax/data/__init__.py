"""Where tasks come from: datasets and episodes."""
