"""Estimators of the gradient of a long inner run's losses in the meta-parameters.

An estimator is orthogonal to what is run: it sees a `Run` of which it takes segments. Each gives a
loss and, as that loss's gradient, its estimate; what it carries from one outer step to the next is
one task's own.

- `full_unroll`: exact, back-propagation through the whole run.
- `truncated_gradient`: back-propagation through one segment after another; biased towards the
  short run.
- `truncated_es`: evolution strategies on one segment after another; as biased, but smoothed.
- `persistent_es`: evolution strategies whose perturbations are remembered since the run began;
  unbiased (Vicol et al. 2021, arXiv:2112.13835).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Aux, PyTree


class Run(NamedTuple):
    """An inner run, as something that goes on from a state."""

    begin: Callable[..., PyTree]  # (meta, task, key) -> the state before the first step
    # (meta, state, key, steps) -> (state, losses [steps], each of what its step led to)
    go_on: Callable[..., tuple[PyTree, jax.Array]]


class Estimator(NamedTuple):
    """How the outer gradient of a run is estimated."""

    init: Callable[..., PyTree]  # (run, meta, task, key) -> what one task carries, at first
    # (run, meta, carried, task, key) -> (loss, Aux(new carried, metrics)); the task is that of the
    # next run, for where the last one has ended. The loss's gradient in meta is the estimate, its
    # metric `last_loss` the loss after the last step taken.
    loss: Callable[..., tuple[jax.Array, Aux]]


class Carried(NamedTuple):
    """What one task carries from an outer step to the next, where a run has several segments."""

    state: PyTree  # of the run; a `Pair` for `persistent_es`
    age: jax.Array  # int32, steps since it began; the horizon where it has ended


class Pair(NamedTuple):
    """Of `persistent_es`."""

    plus: PyTree  # of the run perturbed by +epsilon
    minus: PyTree  # of the run perturbed by -epsilon
    perturbations: PyTree  # xi, the sum of all epsilons since the run began


def with_gradient(value: jax.Array, params: PyTree, gradient: PyTree) -> jax.Array:
    """`value`, whose gradient in `params` is `gradient`, whatever it was computed from.

    Examples:
      >>> jax.grad(lambda p: with_gradient(jnp.cos(p), p, jnp.array(7.0)))(1.0)
      Array(7., dtype=float32, weak_type=True)
    """
    value, gradient = jax.lax.stop_gradient((value, gradient))
    zeros = jax.tree.map(lambda g, p: (g * (p - jax.lax.stop_gradient(p))).sum(), gradient, params)
    return value + sum(jax.tree.leaves(zeros))


def full_unroll(steps: int) -> Estimator:
    """The mean loss over a whole run, differentiated through all of it.

    Args:
      steps: of the run.
    """

    def loss(
        run: Run, meta: PyTree, carried: PyTree, task: PyTree, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        begin_key, run_key = jax.random.split(key)
        _, losses = run.go_on(meta, run.begin(meta, task, begin_key), run_key, steps)
        return losses.mean(), Aux(carried, {"last_loss": losses[-1]})

    return Estimator(lambda run, meta, task, key: {}, loss)


def _in_segments(
    horizon: int,
    truncation: int,
    begin: Callable[..., PyTree],
    segment: Callable[..., tuple[jax.Array, PyTree, jax.Array]],
) -> Estimator:
    """One segment for each outer step, and a new run where the last one has ended.

    Args:
      horizon, truncation: steps of a run and of a segment.
      begin: (run, meta, task, key) -> the state in which a run begins.
      segment: (run, meta, state, key) -> (loss, state after it, the last step's loss).

    Raises:
      ValueError: where the truncation does not divide the horizon.
    """
    if not 1 <= truncation <= horizon or horizon % truncation:
        raise ValueError(
            f"a run of {horizon} steps is not a whole number of segments of {truncation}: choose a "
            "truncation that divides the steps"
        )

    def init(run: Run, meta: PyTree, task: PyTree, key: jax.Array) -> Carried:
        # A run that has ended: the first step begins one.
        return Carried(begin(run, meta, task, key), jnp.array(horizon, jnp.int32))

    def loss(
        run: Run, meta: PyTree, carried: Carried, task: PyTree, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        begin_key, segment_key = jax.random.split(key)
        # Where a run begins does not depend on the segment's meta-parameters.
        state = begin(run, jax.lax.stop_gradient(meta), task, begin_key)
        fresh = Carried(state, jnp.zeros_like(carried.age))
        ended = carried.age >= horizon
        state, age = jax.tree.map(lambda new, old: jnp.where(ended, new, old), fresh, carried)
        value, state, last_loss = segment(run, meta, state, segment_key)
        return value, Aux(Carried(state, age + truncation), {"last_loss": last_loss})

    return Estimator(init, loss)


def _begin(run: Run, meta: PyTree, task: PyTree, key: jax.Array) -> PyTree:
    return run.begin(meta, task, key)


def truncated_gradient(horizon: int, truncation: int) -> Estimator:
    """The mean loss over one segment, differentiated back to where the segment began.

    Andrychowicz et al. (2016), section 2.1: runs of 100 steps, segments of 20.

    Args:
      horizon: steps of a run, after which the next one begins.
      truncation: steps of a segment, and so between two outer steps.

    Raises:
      ValueError: where the truncation does not divide the horizon.
    """

    def segment(
        run: Run, meta: PyTree, state: PyTree, key: jax.Array
    ) -> tuple[jax.Array, PyTree, jax.Array]:
        state, losses = run.go_on(meta, state, key, truncation)
        return losses.mean(), state, losses[-1]

    return _in_segments(horizon, truncation, _begin, segment)


def _perturbation(key: jax.Array, meta: PyTree, sigma: float) -> PyTree:
    leaves, treedef = jax.tree.flatten(meta)
    keys = jax.random.split(key, len(leaves))
    noise = [
        sigma * jax.random.normal(k, m.shape, m.dtype) for k, m in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(noise)


def truncated_es(horizon: int, truncation: int, *, sigma: float = 0.01) -> Estimator:
    """(L(meta + epsilon) - L(meta - epsilon)) epsilon / (2 sigma^2), L the mean over a segment.

    Both members of the antithetic pair go on from the same state, on the same data; the run itself
    goes on without a perturbation. Of a batch of tasks each has its own epsilon.

    Args:
      horizon: steps of a run.
      truncation: steps of a segment.
      sigma: standard deviation of epsilon.

    Raises:
      ValueError: where the truncation does not divide the horizon.
    """

    def segment(
        run: Run, meta: PyTree, state: PyTree, key: jax.Array
    ) -> tuple[jax.Array, PyTree, jax.Array]:
        run_key, noise_key = jax.random.split(key)
        centre = jax.lax.stop_gradient(meta)
        epsilon = _perturbation(noise_key, centre, sigma)
        _, plus = run.go_on(jax.tree.map(jnp.add, centre, epsilon), state, run_key, truncation)
        _, minus = run.go_on(
            jax.tree.map(jnp.subtract, centre, epsilon), state, run_key, truncation
        )
        value = _antithetic(plus, minus, meta, epsilon, sigma)
        state, losses = run.go_on(centre, state, run_key, truncation)
        return value, state, losses[-1]

    return _in_segments(horizon, truncation, _begin, segment)


def _antithetic(
    plus: jax.Array, minus: jax.Array, meta: PyTree, direction: PyTree, sigma: float
) -> jax.Array:
    """The mean of a pair's losses [steps], whose gradient is their difference's in a direction."""
    slope = (plus.mean() - minus.mean()) / (2 * sigma**2)
    gradient = jax.tree.map(lambda d: slope * d, direction)
    return with_gradient((plus.mean() + minus.mean()) / 2, meta, gradient)


def persistent_es(horizon: int, truncation: int, *, sigma: float = 0.01) -> Estimator:
    """(L+ - L-) xi / (2 sigma^2), xi the sum of all perturbations since the run began (PES).

    The members of the antithetic pair see the same data and each goes on from its own state, so
    that a segment's loss knows what earlier perturbations did. Vicol et al. (2021), algorithm 2.

    Args:
      horizon: steps of a run.
      truncation: steps of a segment, in which the perturbation stays the same.
      sigma: standard deviation of one perturbation.

    Raises:
      ValueError: where the truncation does not divide the horizon.
    """

    def begin(run: Run, meta: PyTree, task: PyTree, key: jax.Array) -> Pair:
        state = run.begin(meta, task, key)
        return Pair(state, state, jax.tree.map(jnp.zeros_like, meta))

    def segment(
        run: Run, meta: PyTree, pair: Pair, key: jax.Array
    ) -> tuple[jax.Array, Pair, jax.Array]:
        run_key, noise_key = jax.random.split(key)
        centre = jax.lax.stop_gradient(meta)
        epsilon = _perturbation(noise_key, centre, sigma)
        after_plus, plus = run.go_on(
            jax.tree.map(jnp.add, centre, epsilon), pair.plus, run_key, truncation
        )
        after_minus, minus = run.go_on(
            jax.tree.map(jnp.subtract, centre, epsilon), pair.minus, run_key, truncation
        )
        xi = jax.tree.map(jnp.add, pair.perturbations, epsilon)
        value = _antithetic(plus, minus, meta, xi, sigma)
        return value, Pair(after_plus, after_minus, xi), (plus[-1] + minus[-1]) / 2

    return _in_segments(horizon, truncation, begin, segment)
