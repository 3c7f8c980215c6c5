"""The one door through which flax Linen modules enter."""

import inspect
from typing import TYPE_CHECKING

import jax

from meta_jax.core import Network, PyTree

if TYPE_CHECKING:  # a module needs nothing of flax but itself, so `import meta_jax` stays quick
    import flax.linen as nn


def from_linen(module: "nn.Module", *, batch_norm: str = "none") -> Network:
    """A Linen module as a `Network`.

    Every collection but `params` becomes the network's state. Where the module's `__call__` takes
    `train` (or `deterministic`), it gets it; dropout draws from the `key` given to `apply`.

    Args:
      module: a Linen module called on one array [n, ...].
      batch_norm: the mode that the module's own batch norm amounts to, for the record: 'none', or
        'running' for `nn.BatchNorm(use_running_average=not train)`.

    Returns:
      The network.

    Examples:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> network = from_linen(nn.Dense(3))
      >>> params, state = network.init(jax.random.key(0), jnp.ones((2, 5)))
      >>> network.apply(params, state, jnp.ones((2, 5)), key=None, train=True)[0].shape
      (2, 3)
    """
    accepted = inspect.signature(module.__call__).parameters

    def flags(train: bool) -> dict[str, bool]:
        return {
            name: value
            for name, value in (("train", train), ("deterministic", not train))
            if name in accepted
        }

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        variables = dict(module.init(key, x, **flags(False)))
        return variables.pop("params", {}), variables

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, PyTree]:
        y, new_state = module.apply(
            {"params": params, **state},
            x,
            rngs=None if key is None else {"dropout": key},
            mutable=list(state) if train else [],
            **flags(train),
        )
        return y, (dict(new_state) if train else state)

    return Network(init, apply, batch_norm)
