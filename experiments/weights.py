"""The trained weights that a binary serves: the flags that name them, and how they are loaded."""

from pathlib import Path
from typing import Literal

from absl import flags

from meta_jax.lookup import UsageError
from meta_jax.training.trained import Trained, load, load_pretrained, pretrained_names

DEFAULT = "omniglot-prototypical"

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of a training run.")
flags.DEFINE_string(
    "weights",
    None,
    f"Folder of weights, or the name of some that come with meta_jax: "
    f"{', '.join(pretrained_names())}. Without --workdir, {DEFAULT} by default.",
)
flags.DEFINE_enum(
    "checkpoint", "best", ["best", "latest"], "Checkpoint: best on validation, or the latest."
)


def named_weights() -> str:
    """The folder or the name that the flags give, or the default.

    Returns:
      One of `pretrained_names()`, or a folder: './NAME' where it is called as one of these.

    Raises:
      UsageError: two were named.
    """
    if FLAGS.workdir and FLAGS.weights:
        raise UsageError("name what classifies once: --workdir=W or --weights=FOLDER")
    given = FLAGS.workdir or FLAGS.weights
    if given in pretrained_names() and Path(given).exists():
        return f"./{given}"
    return given or DEFAULT


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


def load_model() -> tuple[Trained, str]:
    """The weights that the flags name, and what to call them.

    Raises:
      UsageError: two were named, or there are none there.
    """
    name = named_weights()
    shipped = f"weights {name}, which come with meta_jax"
    called = shipped if name in pretrained_names() else f"weights of {name}"
    return load_weights(name, FLAGS.checkpoint), called
