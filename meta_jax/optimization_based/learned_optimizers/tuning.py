"""Learning rates of hand-designed optimizers, tuned: what learned ones have to beat."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from meta_jax.core import Array, Tasks
from meta_jax.lookup import UsageError
from meta_jax.optimization_based.learned_optimizers.families import ProblemFamily
from meta_jax.optimization_based.learned_optimizers.hand_designed import with_learning_rate
from meta_jax.optimization_based.learned_optimizers.learned_optimizer import make_training_curves

#: Learning rates that are tried: half decades from 1e-4 to 10.
LEARNING_RATES = tuple(float(rate) for rate in 10 ** np.arange(-4, 1.5, 0.5))


class Tuned(NamedTuple):
    """The best of the learning rates tried.

    Attributes:
      learning_rate: The best one.
      losses: Mean last loss by rate; infinite where it is not finite.
    """

    learning_rate: float
    losses: dict[float, float]


def tune_learning_rate(
    transformation: optax.GradientTransformation,
    family: ProblemFamily,
    tasks: Tasks,
    key: Array,
    *,
    steps: int = 100,
    num_tasks: int = 256,
    task_chunk: int = 32,
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> Tuned:
    """Finds the learning rate whose mean loss over tasks is smallest after the last step.

    Args:
      transformation: Optimizer without its learning rate, for example one of `HAND_DESIGNED`.
      family: Family of the networks that are trained.
      tasks: Tasks that are drawn, and their objective.
      key: Random key of the tasks, the same for every rate.
      steps: Number of steps of a training run.
      num_tasks: Number of runs for each rate.
      task_chunk: Number of runs at a time.
      learning_rates: Rates to choose from.

    Raises:
      UsageError: every rate ends in a loss that is not finite, or there is none.
    """
    rule = with_learning_rate(transformation, 1.0)
    curves = make_training_curves(
        family, rule, tasks, steps=steps, num_tasks=num_tasks, task_chunk=task_chunk
    )
    losses = {}
    for rate in learning_rates:
        loss = float(curves({"learning_rate": jnp.asarray(rate)}, key)[:, -1].mean())
        losses[rate] = loss if np.isfinite(loss) else np.inf
    best = min(losses, key=losses.__getitem__, default=None)
    if best is None or not np.isfinite(losses[best]):
        raise UsageError(
            f"every learning rate of {tuple(learning_rates)} diverges: give smaller ones"
        )
    return Tuned(best, losses)
