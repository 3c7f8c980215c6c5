"""The trained weights that a binary uses: the flags that name them, and how they are loaded."""

from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from absl import flags

from meta_jax.lookup import UsageError, local_path
from meta_jax.training.trained import (
    Trained,
    load,
    load_pretrained,
    pretrained_folder,
    pretrained_names,
)

DEFAULT = "omniglot-prototypical"


def define_weights_flags(values: flags.FlagValues, default: str | None = None) -> None:
    """Defines --workdir, --weights and --checkpoint.

    Args:
      values: Flags to which they are added.
      default: Name of the weights that are used where none are given.
    """
    otherwise = f" Without --workdir, {default} by default." if default else ""
    flags.DEFINE_string("workdir", None, "Folder of a training run.", values)
    flags.DEFINE_string(
        "weights",
        None,
        "Folder of weights, or the name of some that come with meta_jax: "
        f"{', '.join(pretrained_names())}.{otherwise}",
        values,
    )
    flags.DEFINE_enum(
        "checkpoint",
        "best",
        ["best", "latest"],
        "Checkpoint: best on validation, or the latest.",
        flag_values=values,
    )


def named_weights(workdir: str | None, weights: str | None) -> str | None:
    """The folder or the name that the flags give.

    Args:
      workdir: Value of --workdir.
      weights: Value of --weights.

    Returns:
      One of `pretrained_names()`, or a folder: './NAME' where it is called as one of these; None
      where no flag is given.

    Raises:
      UsageError: both were given.
    """
    if workdir and weights:
        raise UsageError("name the weights once: --workdir=W or --weights=FOLDER")
    given = workdir or weights
    if given in pretrained_names() and Path(given).exists():
        return f"./{given}"
    return given


def weights_folder(name: str) -> Path:
    """The folder of weights, given by their name where they come with meta_jax, or by itself."""
    return pretrained_folder(name) if name in pretrained_names() else local_path(name)


def load_weights(name: str, checkpoint: Literal["best", "latest"] = "best") -> Trained:
    """Loads weights by their name where they come with meta_jax, or by their folder.

    Args:
      name: Name or folder, as `named_weights` gives it.
      checkpoint: Checkpoint of a folder: best on validation, or the latest.

    Raises:
      UsageError, CheckpointError: there are none there, or they are damaged.
    """
    if name in pretrained_names():
        return load_pretrained(name)
    return load(name, checkpoint=checkpoint)


def describe_weights(name: str) -> str:
    """What to call weights in a line of output."""
    if name in pretrained_names():
        return f"weights {name}, which come with meta_jax"
    return f"weights of {name}"


def compact(trained: Trained) -> Trained:
    """The same in less space, as weights are shipped: what tests do not need is left out.

    Parameters are rounded to float16, whose 11 significant bits are enough to use them, and a
    classifier of the training classes, which no test looks at, is zeros, which take no space in a
    checkpoint. `load` gives parameters their own type again.

    Args:
      trained: What was trained.

    Raises:
      UsageError: a parameter is larger than float16 can hold, 65504.
    """
    params = dict(trained.params)
    if "train_classes" in (trained.config["learner"] or {}):
        params["head"] = jax.tree.map(jnp.zeros_like, params["head"])
    rounded = jax.tree.map(_half, params)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(rounded)):
        raise UsageError("a parameter is above 65504, which float16 cannot hold: train it smaller")
    return trained._replace(params=rounded)


def _half(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
