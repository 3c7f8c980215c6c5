"""Pictures of a test on tasks of reinforcement learning: one trial, and regret over many."""

from pathlib import Path

import jax

from meta_jax import registry
from meta_jax.core import MetaLearner, PyTree, Tasks
from meta_jax.reinforcement import Problem, by_learner, by_strategy, run_trials
from meta_jax.reinforcement.environment import Discrete
from meta_jax.reinforcement.strategy import random_actions
from meta_jax.training.trial_pictures import regret_curves, trial_picture

_TRIALS = 250  # of a regret curve


def draw_trials(
    learner: MetaLearner, learned: tuple[PyTree, PyTree], tasks: Tasks, folder: Path
) -> None:
    """Writes trial.png, one test task as it was met, and regret.png where regret is known.

    Args:
      learner: The learner.
      learned: Its parameters and state.
      tasks: Tasks of the test, of reinforcement learning.
      folder: The workdir.
    """
    task_key, trial_key, test_key = jax.random.split(jax.random.key(0), 3)
    problem: Problem = tasks.sample(task_key, tasks.data)
    trials = {
        title: jax.jit(by_learner(one, *learned))(problem, trial_key)
        for title, one in _stages(learner).items()
    }
    trial_picture(problem, trials, folder / "trial.png")
    environment = problem.environment
    plays = {"learned": by_learner(learner, *learned)}
    if isinstance(environment.actions, Discrete):
        plays["random"] = by_strategy(random_actions())
    if environment.regret is not None:
        found = {
            name: run_trials(environment, play, test_key, _TRIALS, chunk=_TRIALS)
            for name, play in plays.items()
        }
        regret_curves(found, folder / "regret.png")


def _stages(learner: MetaLearner) -> dict[str, MetaLearner]:
    """The learner, and before it the same without inner steps where it takes some, by titles."""
    config = learner.config or {}
    steps = config.get("eval_steps", 0)
    if not steps:
        return {"trial": learner}
    unadapted = registry.build("learner", {**config, "eval_steps": 0})
    return {"before adaptation": unadapted, f"after {steps} inner steps": learner}
