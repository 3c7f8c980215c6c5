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
    """Of `truncated_gradient` and `truncated_es`."""

    state: PyTree  # of the run
    age: jax.Array  # int32, steps since it began; the horizon where it has ended


class PersistentlyCarried(NamedTuple):
    """Of `persistent_es`."""

    states: tuple[PyTree, PyTree]  # of the run perturbed by +epsilon and by -epsilon
    perturbations: PyTree  # xi, the sum of all epsilons since the run began
    age: jax.Array


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


def _check(horizon: int, truncation: int) -> None:
    if not 1 <= truncation <= horizon or horizon % truncation:
        raise ValueError(
            f"a run of {horizon} steps is not a whole number of segments of {truncation}: choose a "
            "truncation that divides the steps"
        )


def _choose(renew: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(renew, a, b), new, old)


def _init_carried(run: Run, meta: PyTree, task: PyTree, key: jax.Array, horizon: int) -> Carried:
    # A run that has ended: the first step begins one.
    return Carried(run.begin(meta, task, key), jnp.array(horizon, jnp.int32))


def _renew(
    run: Run, meta: PyTree, carried: Carried, task: PyTree, key: jax.Array, horizon: int
) -> Carried:
    """A new run where the last one has ended."""
    ended = carried.age >= horizon
    fresh = Carried(run.begin(meta, task, key), jnp.zeros_like(carried.age))
    return _choose(ended, fresh, carried)


def truncated_gradient(horizon: int, truncation: int) -> Estimator:
    """The mean loss over one segment, differentiated back to where the segment began.

    Andrychowicz et al. (2016), section 2.1: runs of 100 steps, segments of 20.

    Args:
      horizon: steps of a run, after which the next one begins.
      truncation: steps of a segment, and so between two outer steps.

    Raises:
      ValueError: where the truncation does not divide the horizon.
    """
    _check(horizon, truncation)

    def init(run: Run, meta: PyTree, task: PyTree, key: jax.Array) -> Carried:
        return _init_carried(run, meta, task, key, horizon)

    def loss(
        run: Run, meta: PyTree, carried: Carried, task: PyTree, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        begin_key, run_key = jax.random.split(key)
        # Where a run begins does not depend on the segment's meta-parameters.
        carried = _renew(run, jax.lax.stop_gradient(meta), carried, task, begin_key, horizon)
        state, losses = run.go_on(meta, carried.state, run_key, truncation)
        new = Carried(state, carried.age + truncation)
        return losses.mean(), Aux(new, {"last_loss": losses[-1]})

    return Estimator(init, loss)


def _perturbation(key: jax.Array, meta: PyTree, sigma: float) -> PyTree:
    leaves, treedef = jax.tree.flatten(meta)
    keys = jax.random.split(key, len(leaves))
    noise = [
        sigma * jax.random.normal(k, m.shape, m.dtype) for k, m in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(noise)


def _pair(meta: PyTree, epsilon: PyTree) -> tuple[PyTree, PyTree]:
    add, subtract = jnp.add, jnp.subtract
    return jax.tree.map(add, meta, epsilon), jax.tree.map(subtract, meta, epsilon)


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
    _check(horizon, truncation)

    def init(run: Run, meta: PyTree, task: PyTree, key: jax.Array) -> Carried:
        return _init_carried(run, meta, task, key, horizon)

    def loss(
        run: Run, meta: PyTree, carried: Carried, task: PyTree, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        begin_key, run_key, noise_key = jax.random.split(key, 3)
        centre = jax.lax.stop_gradient(meta)
        carried = _renew(run, centre, carried, task, begin_key, horizon)
        epsilon = _perturbation(noise_key, centre, sigma)

        def segment(meta: PyTree) -> tuple[PyTree, jax.Array]:
            return run.go_on(meta, carried.state, run_key, truncation)

        plus, minus = (segment(m)[1].mean() for m in _pair(centre, epsilon))
        slope = (plus - minus) / (2 * sigma**2)
        value = with_gradient((plus + minus) / 2, meta, jax.tree.map(lambda e: slope * e, epsilon))
        state, losses = segment(centre)
        new = Carried(state, carried.age + truncation)
        return value, Aux(new, {"last_loss": losses[-1]})

    return Estimator(init, loss)


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
    _check(horizon, truncation)

    def init(run: Run, meta: PyTree, task: PyTree, key: jax.Array) -> PersistentlyCarried:
        state = run.begin(meta, task, key)
        zeros = jax.tree.map(jnp.zeros_like, meta)
        return PersistentlyCarried((state, state), zeros, jnp.array(horizon, jnp.int32))

    def loss(
        run: Run, meta: PyTree, carried: PersistentlyCarried, task: PyTree, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        begin_key, run_key, noise_key = jax.random.split(key, 3)
        centre = jax.lax.stop_gradient(meta)
        epsilon = _perturbation(noise_key, centre, sigma)
        state = run.begin(centre, task, begin_key)
        fresh = PersistentlyCarried(
            (state, state),
            jax.tree.map(jnp.zeros_like, carried.perturbations),
            jnp.zeros_like(carried.age),
        )
        states, xi, age = _choose(carried.age >= horizon, fresh, carried)
        xi = jax.tree.map(jnp.add, xi, epsilon)
        (after_plus, plus), (after_minus, minus) = (
            run.go_on(m, s, run_key, truncation)
            for m, s in zip(_pair(centre, epsilon), states, strict=True)
        )
        slope = (plus.mean() - minus.mean()) / (2 * sigma**2)
        value = with_gradient(
            (plus.mean() + minus.mean()) / 2, meta, jax.tree.map(lambda x: slope * x, xi)
        )
        new = PersistentlyCarried((after_plus, after_minus), xi, age + truncation)
        return value, Aux(new, {"last_loss": (plus[-1] + minus[-1]) / 2})

    return Estimator(init, loss)
