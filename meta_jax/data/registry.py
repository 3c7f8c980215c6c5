"""Image datasets by name, as `--dataset` takes them."""

import os

from meta_jax.data.dataset import DataError, Splits
from meta_jax.data.glyphs import load_glyphs
from meta_jax.data.image_folder import load_image_folder
from meta_jax.data.omniglot import load_omniglot
from meta_jax.data.tfds_images import load_tfds_images

DATASET_NAMES = ("glyphs", "omniglot", "tfds:NAME", "folder:PATH")


def load_splits(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int = 28,
    seed: int = 0,
    split_rule: str = "vinyals",
) -> Splits:
    """Loads an image dataset by name; see the loaders for what each gives.

    Args:
      name: 'glyphs', 'omniglot', 'tfds:NAME' or 'folder:PATH'.
      data_dir: where Omniglot or the TFDS sets lie; not used by the others.
      image_size: side in pixels.
      seed: of the class split ('tfds:', 'folder:') or of the distortions ('glyphs'). It must be
        the same in training and in evaluation, or classes trained on turn up in the test split.
      split_rule: of 'omniglot', 'vinyals' or 'lake'.

    Raises:
      DataError: the name is unknown, or as the loader says.
    """
    kind, _, rest = name.partition(":")
    if name == "glyphs":
        return load_glyphs(image_size=image_size, seed=seed)
    if name == "omniglot":
        return load_omniglot(data_dir, split_rule=split_rule, image_size=image_size)
    if kind == "tfds" and rest:
        return load_tfds_images(rest, data_dir=data_dir, image_size=image_size, seed=seed)
    if kind == "folder" and rest:
        return load_image_folder(rest, image_size=image_size, seed=seed)
    raise DataError(f"dataset {name!r} is none of {', '.join(DATASET_NAMES)}")
