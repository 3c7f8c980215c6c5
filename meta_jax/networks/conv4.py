"""The four-block convolutional network of few-shot learning, in its two published forms."""

from functools import partial

import jax
from jax.sharding import Mesh, PartitionSpec

from meta_jax.core import Network, PyTree
from meta_jax.networks.layers import check_batch_norm, conv_block, init_conv_block

_BLOCKS = 4


def conv4(features: int = 64, *, batch_norm: str = "running", mesh: Mesh | None = None) -> Network:
    """4 x [3x3 convolution, batch norm, ReLU, 2x2 max-pooling], flattened (Vinyals et al. 2016).

    Args:
      features: channels of every block.
      batch_norm: 'batch', 'running' or 'support' (see `meta_jax.networks.layers`).
      mesh: devices, along one axis, that share the images where their number is a multiple.

    Returns:
      A network from images [n, height, width, channels], sides of at least 16 pixels, to
      embeddings [n, (height // 16) * (width // 16) * features]. 111,936 parameters at 64 features
      and one channel.

    Raises:
      ValueError: for an unknown batch-norm mode.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> network = conv4()
      >>> x = jnp.zeros((2, 28, 28, 1))
      >>> params, state = network.init(jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      111936
      >>> network.apply(params, state, x, key=None, train=False)[0].shape
      (2, 64)
    """
    return _conv4(features, batch_norm, mesh, stride=1, pool=True, mean=False)


def strided_conv4(
    features: int = 64, *, batch_norm: str = "batch", mean: bool = True, mesh: Mesh | None = None
) -> Network:
    """4 x [3x3 convolution of stride 2, batch norm, ReLU], mean over places (Finn et al. 2017).

    Args:
      features: channels of every block.
      batch_norm: 'batch', 'running' or 'support' (see `meta_jax.networks.layers`).
      mean: False flattens the last block instead, as Nichol et al. (2018) do.
      mesh: devices, along one axis, that share the images where their number is a multiple.

    Returns:
      A network from images [n, height, width, channels] to embeddings [n, features], or
      [n, ceil(height / 16) * ceil(width / 16) * features] where they are flattened.

    Raises:
      ValueError: for an unknown batch-norm mode.
    """
    return _conv4(features, batch_norm, mesh, stride=2, pool=False, mean=mean)


def _conv4(
    features: int, batch_norm: str, mesh: Mesh | None, *, stride: int, pool: bool, mean: bool
) -> Network:
    check_batch_norm(batch_norm)
    names = [f"block{i + 1}" for i in range(_BLOCKS)]

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        if pool and min(x.shape[1:3]) < 2**_BLOCKS:
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]} pixels are too small for conv4, which pools "
                f"them four times: use at least {2**_BLOCKS}x{2**_BLOCKS}"
            )
        params, state, inputs = {}, {}, x.shape[-1]
        for name, block_key in zip(names, jax.random.split(key, _BLOCKS), strict=True):
            params[name], state[name] = init_conv_block(block_key, inputs, features)
            inputs = features
        return params, state

    def blocks(
        params: PyTree, state: PyTree, x: jax.Array, *, train: bool, axis: str | None = None
    ) -> tuple[jax.Array, PyTree]:
        new_state = {}
        for name in names:
            x, new_state[name] = conv_block(
                params[name],
                state[name],
                x,
                stride=stride,
                pool=pool,
                batch_norm=batch_norm,
                train=train,
                axis=axis,
                defer=name == names[0],
            )
        return (x.mean((1, 2)) if mean else x.reshape(x.shape[0], -1)), new_state

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del key
        if mesh is None or x.shape[0] % mesh.size:
            return blocks(params, state, x, train=train)
        (axis,) = mesh.axis_names
        everywhere, each = PartitionSpec(), PartitionSpec(axis)
        return jax.shard_map(
            partial(blocks, train=train, axis=axis),
            mesh=mesh,
            in_specs=(everywhere, everywhere, each),
            out_specs=(each, everywhere),
            check_vma=False,
        )(params, state, x)

    return Network(init, apply, batch_norm)
