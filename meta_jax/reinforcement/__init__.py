"""Reinforcement learning: environments, trials, strategies that know, and learned policies."""
