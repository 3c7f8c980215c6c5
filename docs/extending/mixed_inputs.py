"""Examples of several parts, a picture and two measurements: a pytree from end to end.

    python -m experiments.train --tasks=docs.extending.mixed_inputs:measured_glyphs \
        --network=docs.extending.mixed_inputs:mixed_network --workdir=runs/mixed
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import meta_jax as mj
from meta_jax.data import TaskSource


def measured(split: mj.data.Split) -> mj.data.Split:
    """Adds to each image of a split its share of ink and its width, float32 [2]."""
    images = np.asarray(split.dataset.examples)
    ink = images.mean((1, 2, 3)) / 255
    width = (images.max((1, 3)) > 128).mean(1)
    examples = {"image": images, "numbers": np.stack([ink, width], 1).astype(np.float32)}
    labels = np.repeat(np.arange(len(split.class_names)), split.dataset.counts)
    return mj.data.split_from_arrays(examples, labels)


def load_measured(splits: mj.data.Splits, name: str) -> mj.data.Split:
    """One split of the glyphs with its measurements."""
    parts = (splits.datasets, splits.class_names, splits.group_names)
    return measured(mj.data.Split(*(part[name] for part in parts)))


@mj.registry.tasks("measured_glyphs")
def measured_glyphs(*, image_size: int = 16, objective: str = "cross_entropy") -> TaskSource:
    """Builds a source of glyphs beside two numbers that were measured on them.

    Args:
      image_size: Side of the images, in pixels.
      objective: Objective of the tasks.
    """
    glyphs = mj.data.load_glyphs(image_size=image_size)
    loaders = {name: functools.partial(load_measured, glyphs, name) for name in glyphs.datasets}
    return mj.data.source_from_splits(mj.data.lazy_splits(loaders), objective=objective)


def init_mixed(key: jax.Array, x: dict[str, jax.Array], picture: mj.Network) -> tuple[Any, Any]:
    """Draws the parameters of both parts."""
    picture_key, numbers_key = jax.random.split(key)
    params, state = picture.init(picture_key, x["image"])
    numbers = mj.networks.init_linear(numbers_key, x["numbers"].shape[-1], 8)
    return {"picture": params, "numbers": numbers}, state


def apply_mixed(
    params: Any,
    state: Any,
    x: dict[str, jax.Array],
    *,
    picture: mj.Network,
    key: jax.Array | None,
    train: bool,
    moments: Any,
    mask: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """Embeds the picture and the numbers side by side, [n, features]."""
    z, state = picture.apply(
        params["picture"], state, x["image"], key=key, train=train, moments=moments, mask=mask
    )
    numbers = mj.networks.linear(params["numbers"], x["numbers"])
    return jnp.concatenate([z, numbers], 1), state


@mj.registry.network("mixed_network")
def mixed_network(
    features: int = 32, *, normalisation: mj.core.Normalisation = "running"
) -> mj.Network:
    """Builds a network of pictures and numbers.

    Args:
      features: Channels of the convolutions on the picture.
      normalisation: Which moments normalise the picture's features.
    """
    picture = mj.conv4(features, normalisation=normalisation)
    return mj.from_functions(
        functools.partial(init_mixed, picture=picture),
        functools.partial(apply_mixed, picture=picture),
        has_state=True,
        normalisation=normalisation,
    )
