"""Estimators of the gradient of a long inner run's losses in the meta-parameters.

An estimator is orthogonal to what is run: it sees a `Run`, which it advances some steps at a time.
Each gives a loss and, as that loss's gradient, its estimate; what it carries from one outer step to
the next belongs to one task.

- `full_unroll`: exact, back-propagation through the whole run.
- `truncated_gradient`: back-propagation through one segment after another; biased towards the
  short run.
- `truncated_es`: evolution strategies on one segment after another; as biased, but smoothed.
- `persistent_es`: evolution strategies whose perturbations are remembered since the run began;
  unbiased (Vicol et al. 2021, arXiv:2112.13835).
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import Array, LossAux, PyTree
from meta_jax.lookup import UsageError
from meta_jax.ranges import Positive, PositiveInt


class RunInit(Protocol):
    """(meta, task, key) -> state."""

    def __call__(self, meta: PyTree, task: PyTree, key: Array, /) -> PyTree:
        """The state before the first step."""
        ...


class RunAdvance(Protocol):
    """(meta, state, key, steps) -> (state, losses)."""

    def __call__(
        self, meta: PyTree, state: PyTree, key: Array, steps: int, /
    ) -> tuple[PyTree, Array]:
        """The state after some more steps, and their losses [steps], each after its step."""
        ...


class Run(NamedTuple):
    """An inner run that can be continued from any of its states.

    Attributes:
      init: Function that gives the state before the first step.
      advance: Function that takes some steps from a state.
    """

    init: RunInit
    advance: RunAdvance


class EstimatorInit(Protocol):
    """(run, meta, task, key) -> carried."""

    def __call__(self, run: Run, meta: PyTree, task: PyTree, key: Array, /) -> PyTree:
        """What one task carries into the first outer step."""
        ...


class EstimatorLoss(Protocol):
    """(run, meta, carried, task, key) -> (loss, LossAux)."""

    def __call__(
        self, run: Run, meta: PyTree, carried: PyTree, task: PyTree, key: Array, /
    ) -> tuple[Array, LossAux]:
        """The loss, whose gradient in `meta` is the estimate.

        The task is that of the next run, for where the last one has ended. The auxiliary state is
        what is carried on, the metric `last_loss` is the loss after the last step taken.
        """
        ...


class Estimator(NamedTuple):
    """How the outer gradient of a run is estimated.

    Attributes:
      init: Function (run, meta, task, key) -> what one task carries into the first outer step.
      loss: Function (run, meta, carried, task, key) -> (loss, LossAux); the gradient of the loss in
        `meta` is the estimate.
      horizon: Steps of a whole run.
    """

    init: EstimatorInit
    loss: EstimatorLoss
    horizon: int


class SegmentState(NamedTuple):
    """What one task carries from an outer step to the next, where a run has several segments."""

    run: PyTree  # the run's state; an `AntitheticPair` for `persistent_es`
    age: Array  # int32, steps since the run began; the horizon where it has ended


class AntitheticPair(NamedTuple):
    """The two runs of `persistent_es`, and how they are perturbed."""

    plus: PyTree  # state of the run perturbed by +epsilon
    minus: PyTree  # state of the run perturbed by -epsilon
    perturbation: PyTree  # xi, the sum of all epsilons since the run began


class Segment(Protocol):
    """(run, meta, state, key) -> (loss, state, last loss)."""

    def __call__(
        self, run: Run, meta: PyTree, state: PyTree, key: Array, /
    ) -> tuple[Array, PyTree, Array]:
        """The segment's loss, the state after it, and the last step's loss."""
        ...


def with_gradient(value: Array, params: PyTree, gradient: PyTree) -> Array:
    """A value whose gradient in `params` is `gradient`, whatever it was computed from.

    Args:
      value: Scalar.
      params: What the gradient is taken in.
      gradient: Tree of `params`'s structure.

    Examples:
      >>> jax.grad(lambda p: with_gradient(jnp.cos(p), p, jnp.array(7.0)))(1.0)
      Array(7., dtype=float32, weak_type=True)
    """
    value, gradient = jax.lax.stop_gradient((value, gradient))
    zeros = jax.tree.map(lambda g, p: (g * (p - jax.lax.stop_gradient(p))).sum(), gradient, params)
    return value + sum(jax.tree.leaves(zeros))


@registry.component("estimator", "full")
def full_unroll(horizon: PositiveInt = 100) -> Estimator:
    """Differentiates the mean loss of a whole run through all of its steps.

    Args:
      horizon: Steps of a run.

    Returns:
      The estimator.

    Raises:
      UsageError: the horizon is less than 1.
    """

    def loss(
        run: Run, meta: PyTree, carried: PyTree, task: PyTree, key: Array
    ) -> tuple[Array, LossAux]:
        init_key, run_key = jax.random.split(key)
        _, losses = run.advance(meta, run.init(meta, task, init_key), run_key, horizon)
        return losses.mean(), LossAux(carried, {"last_loss": losses[-1]})

    return Estimator(lambda run, meta, task, key: {}, loss, horizon)


@registry.component("estimator", "truncated")
def truncated_gradient(horizon: PositiveInt = 100, truncation: PositiveInt = 20) -> Estimator:
    """Differentiates the mean loss of one segment, back to where the segment began.

    Andrychowicz et al. (2016), section 2.1: runs of 100 steps, segments of 20.

    Args:
      horizon: Steps of a run, after which the next one begins.
      truncation: Steps of a segment, and so between two outer steps; divides the horizon.

    Returns:
      The estimator.

    Raises:
      UsageError: the truncation does not divide the horizon.
    """

    def segment(run: Run, meta: PyTree, state: PyTree, key: Array) -> tuple[Array, PyTree, Array]:
        state, losses = run.advance(meta, state, key, truncation)
        return losses.mean(), state, losses[-1]

    return in_segments(horizon, truncation, _init_run, segment)


@registry.component("estimator", "truncated_es")
def truncated_es(
    horizon: PositiveInt = 100, truncation: PositiveInt = 20, *, sigma: Positive = 0.01
) -> Estimator:
    """Estimates the gradient of one segment's mean loss by antithetic evolution strategies.

    (L(meta + epsilon) - L(meta - epsilon)) epsilon / (2 sigma^2). Both members of the pair continue
    from the same state, on the same data; the run itself continues without a perturbation. Each
    task of a batch has its own epsilon.

    Args:
      horizon: Steps of a run, after which the next one begins.
      truncation: Steps of a segment, and so between two outer steps; divides the horizon.
      sigma: Standard deviation of the perturbations.

    Returns:
      The estimator.

    Raises:
      UsageError: the truncation does not divide the horizon, or sigma is not positive.
    """

    def segment(run: Run, meta: PyTree, state: PyTree, key: Array) -> tuple[Array, PyTree, Array]:
        run_key, noise_key = jax.random.split(key)
        centre = jax.lax.stop_gradient(meta)
        epsilon = perturbation(noise_key, centre, sigma)
        _, plus = run.advance(_plus(centre, epsilon), state, run_key, truncation)
        _, minus = run.advance(_minus(centre, epsilon), state, run_key, truncation)
        value = antithetic_loss(plus, minus, meta, epsilon, sigma)
        state, losses = run.advance(centre, state, run_key, truncation)
        return value, state, losses[-1]

    return in_segments(horizon, truncation, _init_run, segment)


@registry.component("estimator", "pes")
def persistent_es(
    horizon: PositiveInt = 100, truncation: PositiveInt = 20, *, sigma: Positive = 0.01
) -> Estimator:
    """Estimates the gradient of a whole run by persistent evolution strategies (PES).

    (L+ - L-) xi / (2 sigma^2), xi the sum of all perturbations since the run began. The members of
    the antithetic pair see the same data and each continues from its own state, so that a segment's
    loss knows what earlier perturbations did. Vicol et al. (2021), algorithm 2.

    Args:
      horizon: Steps of a run, after which the next one begins.
      truncation: Steps of a segment, in which the perturbation stays the same; divides the horizon.
      sigma: Standard deviation of one perturbation.

    Returns:
      The estimator.

    Raises:
      UsageError: the truncation does not divide the horizon, or sigma is not positive.
    """

    def segment(
        run: Run, meta: PyTree, pair: AntitheticPair, key: Array
    ) -> tuple[Array, AntitheticPair, Array]:
        run_key, noise_key = jax.random.split(key)
        centre = jax.lax.stop_gradient(meta)
        epsilon = perturbation(noise_key, centre, sigma)
        after_plus, plus = run.advance(_plus(centre, epsilon), pair.plus, run_key, truncation)
        after_minus, minus = run.advance(_minus(centre, epsilon), pair.minus, run_key, truncation)
        xi = _plus(pair.perturbation, epsilon)
        value = antithetic_loss(plus, minus, meta, xi, sigma)
        return value, AntitheticPair(after_plus, after_minus, xi), (plus[-1] + minus[-1]) / 2

    return in_segments(horizon, truncation, _init_pair, segment)


# ---- Pieces.


def in_segments(
    horizon: int, truncation: int, init_segments: EstimatorInit, segment: Segment
) -> Estimator:
    """Builds an estimator of one segment for each outer step.

    Where a run has ended, the next outer step begins a new one.

    Args:
      horizon: Steps of a run.
      truncation: Steps of a segment.
      init_segments: (run, meta, task, key) -> the state in which a run begins.
      segment: (run, meta, state, key) -> (loss, state after it, the last step's loss).

    Returns:
      The estimator.

    Raises:
      UsageError: the truncation does not divide the horizon.
    """
    if horizon % truncation:
        raise UsageError(
            f"a run of {horizon} steps is not a whole number of segments of {truncation}: choose a "
            "truncation that divides the horizon"
        )

    def init(run: Run, meta: PyTree, task: PyTree, key: Array) -> SegmentState:
        # A run that has ended: the first step begins one.
        return SegmentState(init_segments(run, meta, task, key), jnp.array(horizon, jnp.int32))

    def loss(
        run: Run, meta: PyTree, carried: SegmentState, task: PyTree, key: Array
    ) -> tuple[Array, LossAux]:
        init_key, segment_key = jax.random.split(key)
        # Where a run begins does not depend on the segment's meta-parameters.
        state = init_segments(run, jax.lax.stop_gradient(meta), task, init_key)
        fresh = SegmentState(state, jnp.zeros_like(carried.age))
        state, age = _where(carried.age >= horizon, fresh, carried)
        value, state, last_loss = segment(run, meta, state, segment_key)
        return value, LossAux(SegmentState(state, age + truncation), {"last_loss": last_loss})

    return Estimator(init, loss, horizon)


def perturbation(key: Array, meta: PyTree, sigma: float) -> PyTree:
    """Draws epsilon ~ N(0, sigma^2), of the structure and dtypes of the meta-parameters.

    Args:
      key: Random key.
      meta: Meta-parameters.
      sigma: Standard deviation.
    """
    leaves, treedef = jax.tree.flatten(meta)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [sigma * jax.random.normal(k, m.shape, m.dtype) for k, m in zip(keys, leaves, strict=True)]
    )


def antithetic_loss(
    plus: Array, minus: Array, meta: PyTree, direction: PyTree, sigma: float
) -> Array:
    """Mean of an antithetic pair's losses, with (L+ - L-) direction / (2 sigma^2) as its gradient.

    Args:
      plus: Losses [steps] of the run perturbed by +direction.
      minus: Losses [steps] of the run perturbed by -direction.
      meta: Meta-parameters, in which the gradient is taken.
      direction: Perturbation, of the meta-parameters' structure.
      sigma: Standard deviation of one perturbation.
    """
    slope = (plus.mean() - minus.mean()) / (2 * sigma**2)
    gradient = jax.tree.map(lambda d: (slope * d).astype(d.dtype), direction)
    return with_gradient((plus.mean() + minus.mean()) / 2, meta, gradient)


def _init_run(run: Run, meta: PyTree, task: PyTree, key: Array) -> PyTree:
    return run.init(meta, task, key)


def _init_pair(run: Run, meta: PyTree, task: PyTree, key: Array) -> AntitheticPair:
    state = run.init(meta, task, key)
    return AntitheticPair(state, state, jax.tree.map(jnp.zeros_like, meta))


_plus = functools.partial(jax.tree.map, jnp.add)
_minus = functools.partial(jax.tree.map, jnp.subtract)


def _where(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    """One tree or the other, with the old one's dtypes."""
    return jax.tree.map(
        lambda n, o: jnp.where(condition, jnp.asarray(n, jnp.asarray(o).dtype), o), new, old
    )
