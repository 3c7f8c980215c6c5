"""Command-line binaries: train, evaluate, reproduce."""
