"""The outer loop, evaluation, checkpoints and what they write."""
