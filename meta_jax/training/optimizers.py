"""Outer optimizers by name, with a schedule, weight decay, clipping and averaged weights.

Each factory takes the number of outer steps, which schedules need, and settings by keyword. Any
other optax transformation serves as well; `average_params` adds the averages to it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from meta_jax import registry
from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.ranges import Decay, NotNegative, NotNegativeInt, Positive, PositiveInt
from meta_jax.training.outer_step import TrainState

Schedule = Literal["constant", "linear", "cosine", "step"]


@registry.optimizer("adam")
def adam(
    steps: int,
    *,
    learning_rate: Positive = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    schedule: Schedule = "constant",
    halve_every: PositiveInt | None = None,
    warmup_steps: NotNegativeInt = 0,
    weight_decay: NotNegative = 0.0,
    clip_norm: Positive | None = None,
    ema: Decay = 0.0,
) -> optax.GradientTransformation:
    """Builds Adam (Kingma and Ba 2015).

    Args:
      steps: Outer steps of the run.
      learning_rate: Learning rate of the outer loop.
      b1: Decay of the gradients' running mean.
      b2: Decay of the squared gradients' running mean.
      schedule: How the learning rate changes: constant; linear or cosine, to zero at the last
        step; or step, halved every `halve_every` steps.
      halve_every: Outer steps after which the learning rate halves, with schedule step.
      warmup_steps: Outer steps in which the learning rate rises from zero, before the schedule.
      weight_decay: Factor of the weights that is added to the gradient (an L2 penalty).
      clip_norm: Largest norm of the outer gradient; none for any.
      ema: Decay of the running average of the weights that tests use, such as 0.999; 0 for none.

    Returns:
      The optimizer.

    Raises:
      UsageError: a setting is out of range.
    """
    return _assembled(
        lambda rate: optax.adam(rate, b1, b2),
        learning_rate_schedule(steps, learning_rate, schedule, halve_every, warmup_steps),
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        ema=ema,
    )


@registry.optimizer("adamw")
def adamw(
    steps: int,
    *,
    learning_rate: Positive = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    schedule: Schedule = "constant",
    halve_every: PositiveInt | None = None,
    warmup_steps: NotNegativeInt = 0,
    weight_decay: NotNegative = 1e-4,
    clip_norm: Positive | None = None,
    ema: Decay = 0.0,
) -> optax.GradientTransformation:
    """Builds Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Args:
      steps: Outer steps of the run.
      learning_rate: Learning rate of the outer loop.
      b1: Decay of the gradients' running mean.
      b2: Decay of the squared gradients' running mean.
      schedule: How the learning rate changes: constant; linear or cosine, to zero at the last
        step; or step, halved every `halve_every` steps.
      halve_every: Outer steps after which the learning rate halves, with schedule step.
      warmup_steps: Outer steps in which the learning rate rises from zero, before the schedule.
      weight_decay: Share of the weights, times the learning rate, that is taken off in each step.
      clip_norm: Largest norm of the outer gradient; none for any.
      ema: Decay of the running average of the weights that tests use, such as 0.999; 0 for none.

    Returns:
      The optimizer.

    Raises:
      UsageError: a setting is out of range.
    """
    return _assembled(
        lambda rate: optax.adamw(rate, b1, b2, weight_decay=weight_decay),
        learning_rate_schedule(steps, learning_rate, schedule, halve_every, warmup_steps),
        clip_norm=clip_norm,
        ema=ema,
    )


@registry.optimizer("sgd")
def sgd(
    steps: int,
    *,
    learning_rate: Positive = 1.0,
    schedule: Schedule = "constant",
    halve_every: PositiveInt | None = None,
    warmup_steps: NotNegativeInt = 0,
    weight_decay: NotNegative = 0.0,
    clip_norm: Positive | None = None,
    ema: Decay = 0.0,
) -> optax.GradientTransformation:
    """Builds plain gradient descent, the outer optimizer of Reptile.

    Args:
      steps: Outer steps of the run.
      learning_rate: Learning rate of the outer loop. In Reptile it is epsilon, the share of the way
        to the adapted weights, hence the default 1; others want less.
      schedule: How the learning rate changes: constant; linear or cosine, to zero at the last
        step; or step, halved every `halve_every` steps.
      halve_every: Outer steps after which the learning rate halves, with schedule step.
      warmup_steps: Outer steps in which the learning rate rises from zero, before the schedule.
      weight_decay: Factor of the weights that is added to the gradient (an L2 penalty).
      clip_norm: Largest norm of the outer gradient; none for any.
      ema: Decay of the running average of the weights that tests use, such as 0.999; 0 for none.

    Returns:
      The optimizer.

    Raises:
      UsageError: a setting is out of range.
    """
    return _assembled(
        optax.sgd,
        learning_rate_schedule(steps, learning_rate, schedule, halve_every, warmup_steps),
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        ema=ema,
    )


@registry.optimizer("momentum")
def momentum(
    steps: int,
    *,
    learning_rate: Positive = 0.1,
    decay: Decay = 0.9,
    nesterov: bool = False,
    schedule: Schedule = "constant",
    halve_every: PositiveInt | None = None,
    warmup_steps: NotNegativeInt = 0,
    weight_decay: NotNegative = 0.0,
    clip_norm: Positive | None = None,
    ema: Decay = 0.0,
) -> optax.GradientTransformation:
    """Builds gradient descent with momentum.

    Args:
      steps: Outer steps of the run.
      learning_rate: Learning rate of the outer loop.
      decay: Decay of the sum of gradients that a step follows.
      nesterov: Whether the momentum is Nesterov's.
      schedule: How the learning rate changes: constant; linear or cosine, to zero at the last
        step; or step, halved every `halve_every` steps.
      halve_every: Outer steps after which the learning rate halves, with schedule step.
      warmup_steps: Outer steps in which the learning rate rises from zero, before the schedule.
      weight_decay: Factor of the weights that is added to the gradient (an L2 penalty).
      clip_norm: Largest norm of the outer gradient; none for any.
      ema: Decay of the running average of the weights that tests use, such as 0.999; 0 for none.

    Returns:
      The optimizer.

    Raises:
      UsageError: a setting is out of range.
    """
    return _assembled(
        lambda rate: optax.sgd(rate, decay, nesterov),
        learning_rate_schedule(steps, learning_rate, schedule, halve_every, warmup_steps),
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        ema=ema,
    )


def learning_rate_schedule(
    steps: int,
    learning_rate: float,
    schedule: Schedule = "constant",
    halve_every: int | None = None,
    warmup_steps: int = 0,
) -> optax.ScalarOrSchedule:
    """Builds a learning rate that changes with the outer steps.

    Args:
      steps: Outer steps of the run.
      learning_rate: The rate at first, or after the warm-up.
      schedule: How it changes: constant; linear or cosine, to zero at the last step; or step,
        halved every `halve_every` steps.
      halve_every: Outer steps after which it halves, counted from the end of the warm-up.
      warmup_steps: Outer steps in which it rises from zero, in equal parts.

    Returns:
      A number where it is constant, else a function of the step.

    Raises:
      UsageError: a number is out of range, an unknown schedule, or one that lacks `halve_every`.

    Examples:
      >>> rate = learning_rate_schedule(100, 0.4, "linear", warmup_steps=20)
      >>> [round(float(rate(step)), 3) for step in (0, 10, 20, 60, 100)]
      [0.0, 0.2, 0.4, 0.2, 0.0]
    """
    if not learning_rate > 0 or not math.isfinite(learning_rate):
        raise UsageError(f"learning_rate={learning_rate} must be greater than 0")
    if not 0 <= warmup_steps < steps:
        raise UsageError(f"warmup_steps={warmup_steps} must be at least 0 and below steps={steps}")
    if halve_every is not None and schedule != "step":
        raise UsageError(f"halve_every={halve_every} needs schedule=step, not {schedule}")
    after = steps - warmup_steps
    rate: optax.ScalarOrSchedule
    if schedule == "constant":
        rate = learning_rate
    elif schedule == "linear":
        rate = optax.linear_schedule(learning_rate, 0.0, after)
    elif schedule == "cosine":
        rate = optax.cosine_decay_schedule(learning_rate, after)
    elif schedule == "step":
        if halve_every is None or halve_every < 1:
            raise UsageError(f"schedule=step needs halve_every of at least 1, not {halve_every}")
        rate = optax.exponential_decay(learning_rate, halve_every, 0.5, staircase=True)
    else:
        raise UsageError(
            f"unknown schedule '{schedule}': choose one of constant, linear, cosine, step"
        )
    if not warmup_steps:
        return rate
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    constant = optax.constant_schedule(learning_rate)
    return optax.join_schedules([warmup, rate if callable(rate) else constant], [warmup_steps])


def _assembled(
    make: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation],
    rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    clip_norm: float | None,
    ema: float,
) -> optax.GradientTransformation:
    """An optimizer behind clipping and an L2 penalty, and before averages of what it makes."""
    parts = [make(rate)]
    if weight_decay:
        parts.insert(0, optax.add_decayed_weights(weight_decay))
    if clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(clip_norm))
    if ema:
        parts.append(average_params(ema))
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UsageError(f"{name}={value} must be at least 0 and below 1")


# ---- Averages of the parameters.

_FIELD = "average_of_params"  # by which a checkpoint's leaves are known


class AverageState(NamedTuple):
    """What `average_params` carries.

    Attributes:
      count: Number of updates averaged, an int32 scalar.
      average_of_params: Average, in float32 at least; before any update the initial parameters.
    """

    count: Array
    average_of_params: PyTree


def average_params(decay: float) -> optax.GradientTransformation:
    """Builds a transformation that leaves updates as they are and averages what they lead to.

    The average is exponential, w_t = decay w_(t-1) + (1 - decay) params_t, divided by the sum of
    its weights, so that it does not remember the initial parameters. It must be the last of an
    `optax.chain`. `averaged_params` reads it.

    Args:
      decay: Weight of the past, at least 0 and below 1; about 1 / (1 - decay) steps count.

    Raises:
      UsageError: the decay is out of range.
    """
    _check_decay("decay", decay)

    def init(params: PyTree) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(_wide, params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, AverageState]:
        if params is None:
            raise ValueError("average_params averages parameters: give them to `update`")
        count = jnp.asarray(optax.safe_increment(state.count))
        share = _share_of_newest(decay, count)
        new = jax.tree.map(_wide, optax.apply_updates(params, updates))
        average = jax.tree.map(
            lambda w, p: w + share.astype(w.dtype) * (p - w), state.average_of_params, new
        )
        return updates, AverageState(count, average)

    return optax.GradientTransformation(init, update)


def _share_of_newest(decay: float, count: Array) -> Array:
    """The newest's weight by those of all `count`: (1 - decay) / (1 - decay^count)."""
    if decay == 0:
        return jnp.ones(())
    return (1 - decay) / -jnp.expm1(count * math.log(decay))


def _wide(p: Array) -> Array:
    # An average in bfloat16 would not move: its steps are smaller than what is rounded.
    return p.astype(jnp.promote_types(p.dtype, jnp.float32))


def averaged_params(train_state: TrainState) -> PyTree:
    """The parameters to test: the optimizer's averages where it keeps some, else the parameters.

    Args:
      train_state: The state of training.

    Raises:
      ValueError: the optimizer keeps more than one average.
    """
    found = [
        node
        for node in jax.tree.leaves(train_state.opt_state, is_leaf=_is_average)
        if _is_average(node)
    ]
    if not found:
        return train_state.params
    if len(found) > 1:
        raise ValueError("the optimizer averages the parameters twice: leave one of the two out")
    return jax.tree.map(
        lambda w, p: w.astype(p.dtype), found[0].average_of_params, train_state.params
    )


def _is_average(node: Any) -> bool:
    return isinstance(node, AverageState)


def averaged_path(path: str, paths: Iterable[str]) -> str:
    """The path of the leaf that holds a parameter's average, among a checkpoint's leaves.

    Args:
      path: Path of a parameter, such as 'params/conv/kernel'.
      paths: Paths of all leaves.

    Returns:
      The average's path; the parameter's own where there is no average.
    """
    ending = f"/{_FIELD}{path.removeprefix('params')}"
    found = [other for other in paths if other.startswith("opt_state") and other.endswith(ending)]
    return found[0] if found else path
