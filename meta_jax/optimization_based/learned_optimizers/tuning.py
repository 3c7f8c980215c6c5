"""Learning rates of hand-designed optimizers, tuned: what learned ones have to beat."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meta_jax.core import Episode, PyTree
from meta_jax.optimization_based.learned_optimizers.families import ProblemFamily
from meta_jax.optimization_based.learned_optimizers.hand_designed import with_rate
from meta_jax.optimization_based.learned_optimizers.learned_optimizer import make_training_curves

# Half decades from 1e-4 to 10.
RATES = tuple(float(rate) for rate in 10 ** np.arange(-4, 1.5, 0.5))


class Tuned(NamedTuple):
    """The best of the rates tried."""

    rate: float
    losses: dict[float, float]  # by rate, the mean last loss; infinite where it is not finite


def tune_rate(
    transformation: optax.GradientTransformation,
    family: ProblemFamily,
    sampler: Callable[[jax.Array, PyTree], Episode],
    data: PyTree,
    key: jax.Array,
    *,
    steps: int = 100,
    tasks: int = 256,
    task_chunk: int = 32,
    rates: Sequence[float] = RATES,
) -> Tuned:
    """The learning rate whose mean loss over tasks is smallest after the last step.

    Args:
      transformation: an optimizer without its rate, for example of `HAND_DESIGNED`.
      family: what is trained.
      sampler: draws one task.
      data: its second argument.
      key: of the tasks, the same for every rate.
      steps: of a training run.
      tasks: runs for each rate.
      task_chunk: runs at a time.
      rates: to choose from.

    Raises:
      ValueError: where every rate ends in a loss that is not finite.
    """
    rule = with_rate(transformation, 1.0)
    curves = make_training_curves(
        family, rule, sampler, steps=steps, tasks=tasks, task_chunk=task_chunk
    )
    losses = {
        rate: float(curves({"rate": jnp.asarray(rate)}, data, key)[:, -1].mean()) for rate in rates
    }
    losses = {rate: loss if np.isfinite(loss) else np.inf for rate, loss in losses.items()}
    best = min(losses, key=losses.__getitem__)
    if not np.isfinite(losses[best]):
        raise ValueError(f"every rate of {tuple(rates)} diverges: give smaller ones")
    return Tuned(best, losses)
