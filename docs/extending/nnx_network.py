"""A flax NNX network of one's own, with dropout and batch norm, under MAML and Prototypical.

    python -m experiments.train --learner=maml --network=docs.extending.nnx_network:nnx_network \
        --workdir=runs/nnx_maml
    python -m experiments.train --learner=prototypical \
        --network=docs.extending.nnx_network:nnx_network --workdir=runs/nnx_prototypical
"""

import jax
from flax import nnx

import meta_jax as mj
from meta_jax.core import Normalisation


class SmallNetwork(nnx.Module):
    """Two strided convolutions with batch norm and dropout, then a mean over places."""

    def __init__(self, channels: int, features: int, drop_rate: float, rngs: nnx.Rngs) -> None:
        """Draws the weights."""
        self.conv1 = nnx.Conv(channels, features, (3, 3), strides=2, rngs=rngs)
        self.norm1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), strides=2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(features, rngs=rngs)
        self.dropout = nnx.Dropout(drop_rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [n, height, width, channels] -> embeddings [n, features]."""
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.dropout(x.mean((1, 2)))


@mj.registry.network("nnx_network")
def nnx_network(
    features: int = 32,
    *,
    channels: int = 1,
    drop_rate: float = 0.1,
    normalisation: Normalisation = "running",
) -> mj.Network:
    """Builds the NNX network above.

    Args:
      features: Channels of both convolutions.
      channels: Channels of the images.
      drop_rate: Share of the embedding that is dropped in training.
      normalisation: Which moments its batch norm uses.
    """
    return mj.from_nnx(
        lambda rngs: SmallNetwork(channels, features, drop_rate, rngs), normalisation=normalisation
    )
