"""A backbone of one's own: ResNet-12 behind a unit sphere, under any learner.

    python -m experiments.train --learner=prototypical --learner.distance=cosine \
        --network=docs.extending.resnet12_backbone:unit_resnet12 --workdir=runs/resnet12
"""

import jax
import jax.numpy as jnp

import meta_jax as mj
from meta_jax.core import MomentsUse, Normalisation


@mj.registry.network("unit_resnet12")
def unit_resnet12(
    width: int = 16,
    *,
    radius: float = 10.0,
    drop_rate: float = 0.1,
    normalisation: Normalisation = "running",
) -> mj.Network:
    """Builds a ResNet-12 whose embeddings lie on a sphere.

    Args:
      width: Channels of the first block; the others have 2, 4 and 8 times as many.
      radius: Radius of the sphere.
      drop_rate: Share of features that DropBlock drops in training.
      normalisation: Mode of the normalisation layers.
    """
    widths = (width, 2 * width, 4 * width, 8 * width)
    body = mj.resnet12(widths, drop_rate=drop_rate, normalisation=normalisation)

    def apply(
        params: dict,
        state: dict,
        x: jax.Array,
        /,
        *,
        key: jax.Array | None,
        train: bool,
        moments: MomentsUse = "stored",
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        z, state = body.apply(params, state, x, key=key, train=train, moments=moments, mask=mask)
        norm = jnp.sqrt(jnp.maximum((z**2).sum(-1, keepdims=True), 1e-12))
        return radius * z / norm, state

    return body._replace(apply=apply)
