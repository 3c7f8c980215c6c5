"""Update rules: optax with meta-parameters. What an inner loop does with a gradient."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from meta_jax.core import Array, PyTree

# The loss at other parameters, in the same state and step.
ValueFn = Callable[[PyTree], Array]


class Update(Protocol):
    """(meta, gradient, state, params, *, loss, value_fn) -> (updates, state)."""

    def __call__(
        self,
        meta: PyTree,
        gradient: PyTree,
        state: PyTree,
        params: PyTree,
        /,
        *,
        loss: Array | None = None,
        value_fn: ValueFn | None = None,
    ) -> tuple[PyTree, PyTree]:
        """What is added to the parameters, and the rule's new state.

        An inner loop always gives `loss`, the loss at the parameters, and `value_fn`, the loss as a
        function of them; a rule that needs neither is called without in tests and by hand.
        """
        ...


class UpdateRule(NamedTuple):
    """An inner optimizer whose own parameters may be meta-learned.

    Attributes:
      init_meta: Function (key, params) -> meta-parameters.
      init: Function (meta-parameters, params) -> state.
      update: Function from meta-parameters, gradient, state and parameters to updates, which are
        added to the parameters, and the new state.
    """

    init_meta: Callable[[Array, PyTree], PyTree]
    init: Callable[[PyTree, PyTree], PyTree]
    update: Update


def from_optax(transformation: optax.GradientTransformation) -> UpdateRule:
    """Turns any optax transformation into an update rule without meta-parameters.

    The transformation gets `value`, `grad` and `value_fn` of the inner loss, which a line search
    (`optax.lbfgs`) or a plateau's schedule asks for.

    Args:
      transformation: Optax transformation, such as `optax.sgd(0.4)` or `optax.adam(1e-3)`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> rule = from_optax(optax.sgd(0.5))
      >>> state = rule.init({}, jnp.ones(2))
      >>> rule.update({}, jnp.array([1., 2.]), state, jnp.ones(2))[0].tolist()
      [-0.5, -1.0]
    """
    transformation = optax.with_extra_args_support(transformation)

    def init_meta(key: Array, params: PyTree) -> PyTree:
        del key, params
        return {}

    def init(meta: PyTree, params: PyTree) -> PyTree:
        del meta
        return transformation.init(params)

    def update(
        meta: PyTree,
        gradient: PyTree,
        state: PyTree,
        params: PyTree,
        /,
        *,
        loss: Array | None = None,
        value_fn: ValueFn | None = None,
    ) -> tuple[PyTree, PyTree]:
        del meta
        return transformation.update(
            gradient, state, params, value=loss, grad=gradient, value_fn=value_fn
        )

    return UpdateRule(init_meta, init, update)


def learned_sgd(low: float, high: float) -> UpdateRule:
    """SGD with one meta-learned rate for each coordinate: u = -m o g (Li et al. 2017, eq. 2).

    Args:
      low, high: Bounds between which the rates start, uniformly.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> rule = learned_sgd(0.5, 0.5)
      >>> rates = rule.init_meta(jax.random.key(0), jnp.ones(2))
      >>> rule.update(rates, jnp.array([1., 2.]), (), jnp.ones(2))[0].tolist()
      [-0.5, -1.0]
    """

    def init_meta(key: Array, params: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        return treedef.unflatten(
            [
                jax.random.uniform(k, p.shape, p.dtype, low, high)
                for k, p in zip(keys, leaves, strict=True)
            ]
        )

    def update(
        meta: PyTree,
        gradient: PyTree,
        state: PyTree,
        params: PyTree,
        /,
        *,
        loss: Array | None = None,
        value_fn: ValueFn | None = None,
    ) -> tuple[PyTree, PyTree]:
        del params, loss, value_fn
        return jax.tree.map(lambda m, g: -m * g, meta, gradient), state

    return UpdateRule(init_meta, lambda meta, params: (), update)


def per_step_sgd(rate: float, steps: int) -> UpdateRule:
    """SGD with one meta-learned rate for each leaf and step (Antoniou et al. 2019, section 4).

    Args:
      rate: Rate that all rates start from.
      steps: Number of steps that have rates of their own; later ones take the last.
    """

    def init_meta(key: Array, params: PyTree) -> PyTree:
        del key
        return jax.tree.map(lambda p: jnp.full(steps, rate, p.dtype), params)

    def init(meta: PyTree, params: PyTree) -> Array:
        del meta, params
        return jnp.zeros((), jnp.int32)

    def update(
        meta: PyTree,
        gradient: PyTree,
        state: Array,
        params: PyTree,
        /,
        *,
        loss: Array | None = None,
        value_fn: ValueFn | None = None,
    ) -> tuple[PyTree, Array]:
        del params, loss, value_fn
        now = jnp.minimum(state, steps - 1)
        return jax.tree.map(lambda m, g: -m[now] * g, meta, gradient), state + 1

    return UpdateRule(init_meta, init, update)


def log_and_sign(x: Array, p: float = 10.0) -> Array:
    """Preprocesses: (log|x| / p, sign x) where |x| >= e^-p, else (-1, e^p x): [...] -> [..., 2].

    Andrychowicz et al. (2016), appendix A; Ravi and Larochelle (2017), section 3.3.

    Args:
      x: Gradients or losses.
      p: Number of powers of e below 1 that are told apart by their logarithm.

    Examples:
      >>> log_and_sign(jnp.array([1.0, -1.0, 0.0])).tolist()
      [[0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]]
    """
    size = jnp.abs(x)
    large = size >= math.exp(-p)
    # The logarithm's gradient at zero would be NaN even where it is not chosen.
    logarithm = jnp.log(jnp.where(large, size, 1.0)) / p
    return jnp.stack(
        [jnp.where(large, logarithm, -1.0), jnp.where(large, jnp.sign(x), math.exp(p) * x)], -1
    )
