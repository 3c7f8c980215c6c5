"""Half precision of networks: they compute in bfloat16, and what is trained stays float32."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from meta_jax.core import Array, Config, MomentsUse, Network, PyTree
from meta_jax.lookup import UsageError

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_KEY = "with_precision"  # of a network's record


def with_precision(network: Network, precision: Precision) -> Network:
    """Builds a network that computes in another precision.

    In bfloat16 the parameters and the inputs are rounded before the network sees them, so that its
    matrix products, convolutions and activations take half the memory, and use the units that
    accelerators have for this type. Everything around it stays in float32: the parameters
    themselves, their gradients, the optimizer's state, the running statistics, the outputs and what
    a learner makes of them, its loss among them.

    Layers must give outputs of the type of their inputs, whatever the type of the statistics, as
    those of `meta_jax.networks` do, and flax's where they have no `dtype` of their own.

    Args:
      network: The network; one that this function built is taken back to float32 first.
      precision: 'float32', in which networks compute by default, or 'bfloat16'.

    Returns:
      The network. Its record says the precision where it is not float32, so that `meta_jax.load`
      builds the same.

    Raises:
      UsageError: an unknown precision.

    Examples:
      >>> from meta_jax.networks.mlp import mlp
      >>> network, x = with_precision(mlp((8,)), "bfloat16"), jnp.ones((2, 3))
      >>> params, state = network.init(jax.random.key(0), x)
      >>> y, _ = network.apply(params, state, x, key=None, train=False)
      >>> params["layer1"]["kernel"].dtype, y.dtype
      (dtype('float32'), dtype('float32'))
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision '{precision}': choose one of {', '.join(PRECISIONS)}")
    if isinstance(network.apply, partial) and network.apply.func is _apply:
        network = network._replace(apply=network.apply.args[0].apply)
    config = None if network.config is None else record_precision(network.config, precision)
    if precision == "float32":
        return network._replace(config=config)
    return network._replace(apply=partial(_apply, network, jnp.bfloat16), config=config)


def record_precision(config: Config, precision: Precision) -> Config:
    """A network's record with another precision."""
    others = {name: value for name, value in config.items() if name != _KEY}
    return others if precision == "float32" else {**others, _KEY: precision}


def recorded_precision(config: Mapping[str, Any] | None) -> Precision:
    """The precision that a network's record says; float32 where it says none, or there is none."""
    return (config or {}).get(_KEY, "float32")


def _apply(
    network: Network,
    dtype: Any,
    params: PyTree,
    state: PyTree,
    x: PyTree,
    *,
    key: Array | None,
    train: bool,
    moments: MomentsUse = "stored",
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    whole = jnp.result_type(*filter(_is_real, jax.tree.leaves((params, x))))
    y, new_state = network.apply(
        _cast(params, dtype),
        state,
        _cast(x, dtype),
        key=key,
        train=train,
        moments=moments,
        mask=mask,
    )
    kept = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
    return _cast(y, whole), kept


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if _is_real(leaf) else leaf, tree)


def _is_real(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
