"""Reinforcement learning: environments, trials, strategies that know, and learned policies."""

from meta_jax.reinforcement.bandits import bandit
from meta_jax.reinforcement.environment import Continuous, Discrete, Environment, Problem
from meta_jax.reinforcement.maml_rl import maml_rl
from meta_jax.reinforcement.rl2 import rl2
from meta_jax.reinforcement.rollout import Agent, Percept, Trajectory, run_trial
from meta_jax.reinforcement.source import environment_tasks, source_from_environment

__all__ = [
    "Agent",
    "Continuous",
    "Discrete",
    "Environment",
    "Percept",
    "Problem",
    "Trajectory",
    "bandit",
    "environment_tasks",
    "maml_rl",
    "rl2",
    "run_trial",
    "source_from_environment",
]
