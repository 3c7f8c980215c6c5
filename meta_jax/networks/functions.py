"""The door through which networks enter that are two pure functions."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from meta_jax.core import Array, MomentsUse, Network, Normalisation, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.adapters import find_switches
from meta_jax.networks.normalisation import check_mode

_HANDLED = ("key", "moments", "mask")


def from_functions(
    init: Callable[[Array, PyTree], PyTree],
    apply: Callable[..., Any],
    *,
    has_state: bool = False,
    normalisation: Normalisation = "none",
    switches: Mapping[str, bool] | None = None,
) -> Network:
    """Builds a network from a pure pair of functions.

    Parameters of normalisation layers, if there are any, belong below a key 'normalisation', so
    that learners that leave them alone know them.

    Args:
      init: Function (key, x) -> params; (params, state) where there is state.
      apply: Function (params, x) -> y; (params, state, x) -> (y, state) where there is state. By
        keyword it gets what it has parameters for: `key`, a switch such as `train` or
        `deterministic`, `moments` (see `meta_jax.core.MomentsUse`) and `mask`.
      has_state: Whether the functions have state.
      normalisation: Mode of the network's normalisation; but for 'none', 'layer' and 'instance',
        `apply` must take `moments`.
      switches: By name, the value in training of parameters of `apply` that follow training under
        names of their own.

    Returns:
      The network.

    Raises:
      UsageError: a parameter of `apply` whose meaning is not known, or a mode whose moments it does
        not take.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> network = from_functions(
      ...     lambda key, x: {"w": jax.random.normal(key, (x.shape[1], 3))},
      ...     lambda params, x: x @ params["w"],
      ... )
      >>> params, state = network.init(jax.random.key(0), jnp.ones((2, 5)))
      >>> network.apply(params, state, jnp.ones((2, 5)), key=None, train=True)[0].shape
      (2, 3)
    """
    check_mode(normalisation)
    what = getattr(apply, "__name__", "apply")
    inputs = 3 if has_state else 2
    call = find_switches(apply, what, inputs=inputs, handled=_HANDLED, declared=switches)
    parameters = list(inspect.signature(apply).parameters)
    handled = tuple(name for name in _HANDLED if name in parameters[inputs:])
    if normalisation not in ("none", "layer", "instance") and "moments" not in handled:
        raise UsageError(
            f"{what} takes no 'moments', which normalisation='{normalisation}' asks for: give it a "
            "parameter of this name, or leave normalisation out"
        )
    pair = _Pair(init, apply, has_state, handled, call)
    return Network(partial(_init, pair), partial(_apply, pair), normalisation)


class _Pair(NamedTuple):
    """The functions and how they are called."""

    init: Callable[[Array, PyTree], PyTree]
    apply: Callable[..., Any]
    has_state: bool
    handled: tuple[str, ...]  # what it takes of key, moments and mask
    switches: Callable[[bool, MomentsUse], dict[str, bool]]


def _init(pair: _Pair, key: Array, x: PyTree) -> tuple[PyTree, PyTree]:
    found = pair.init(key, x)
    return found if pair.has_state else (found, {})


def _apply(
    pair: _Pair,
    params: PyTree,
    state: PyTree,
    x: PyTree,
    *,
    key: Array | None,
    train: bool,
    moments: MomentsUse = "stored",
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    given = {"key": key, "moments": moments, "mask": mask}
    settings = {name: given[name] for name in pair.handled} | pair.switches(train, moments)
    if pair.has_state:
        return pair.apply(params, state, x, **settings)
    return pair.apply(params, x, **settings), state
