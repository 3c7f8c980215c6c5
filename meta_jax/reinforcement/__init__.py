"""Reinforcement learning: environments, trials, strategies that know, and learned policies."""

from meta_jax.networks.sequences import (
    causal_transformer,
    linear_transformer,
    recurrent,
    running_sums,
    snail,
)
from meta_jax.reinforcement import bandit_strategies, mdp_strategies
from meta_jax.reinforcement.advantages import generalised_advantages
from meta_jax.reinforcement.bandits import bandit, dependent_bandit
from meta_jax.reinforcement.dice import dice_surrogate, lvc_surrogate
from meta_jax.reinforcement.environment import (
    Continuous,
    Discrete,
    Environment,
    Problem,
    check_environment,
)
from meta_jax.reinforcement.evaluation import (
    by_learner,
    by_strategy,
    optimal_returns,
    run_trials,
    trial_returns,
    tune,
)
from meta_jax.reinforcement.gittins import (
    bayes_optimal_return,
    finite_horizon_indices,
    gittins_indices,
)
from meta_jax.reinforcement.grid_navigation import grid_navigation
from meta_jax.reinforcement.gymnax_adapter import gymnax_environment
from meta_jax.reinforcement.maml_rl import maml_rl
from meta_jax.reinforcement.navigation import navigation
from meta_jax.reinforcement.rl2 import rl2
from meta_jax.reinforcement.rollout import (
    Agent,
    Percept,
    Trajectory,
    episode_returns,
    run_trial,
)
from meta_jax.reinforcement.source import environment_tasks, source_from_environment
from meta_jax.reinforcement.tabular_mdp import finite_horizon_values, tabular_mdp

__all__ = [
    "Agent",
    "Continuous",
    "Discrete",
    "Environment",
    "Percept",
    "Problem",
    "Trajectory",
    "bandit",
    "bandit_strategies",
    "bayes_optimal_return",
    "by_learner",
    "by_strategy",
    "causal_transformer",
    "check_environment",
    "dependent_bandit",
    "dice_surrogate",
    "environment_tasks",
    "episode_returns",
    "finite_horizon_indices",
    "finite_horizon_values",
    "generalised_advantages",
    "gittins_indices",
    "grid_navigation",
    "gymnax_environment",
    "linear_transformer",
    "lvc_surrogate",
    "maml_rl",
    "mdp_strategies",
    "navigation",
    "optimal_returns",
    "recurrent",
    "rl2",
    "run_trial",
    "run_trials",
    "running_sums",
    "snail",
    "source_from_environment",
    "tabular_mdp",
    "trial_returns",
    "tune",
]
