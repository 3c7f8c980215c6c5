"""Where tasks come from: datasets, episodes and task sources."""

from meta_jax.data.arrays import dataset_from_arrays, embedded, split_from_arrays
from meta_jax.data.augmentation import augmented, random_affine
from meta_jax.data.dataset import (
    DataError,
    Dataset,
    HostDataset,
    Split,
    Splits,
    Storage,
    class_examples,
    dataset_from_classes,
    lazy_splits,
    random_class_split,
    split_from_classes,
)
from meta_jax.data.episodes import (
    EpisodeSpec,
    check_spec,
    rotate_90,
    sample_batch,
    sample_episode,
)
from meta_jax.data.features import load_features
from meta_jax.data.gaussian_process import gp, gp_posterior
from meta_jax.data.glyphs import load_glyphs
from meta_jax.data.image_completion import image_completion
from meta_jax.data.image_folder import load_image_folder
from meta_jax.data.linear_regression import linear_regression
from meta_jax.data.omniglot import load_omniglot
from meta_jax.data.omniglot_trials import load_trials
from meta_jax.data.sinusoid import sample_sinusoid
from meta_jax.data.source import (
    EpisodeSize,
    TaskSource,
    all_classes,
    load_source,
    source_from_sampler,
    source_from_splits,
)
from meta_jax.data.tfds_images import load_tfds_images

__all__ = [
    "DataError",
    "Dataset",
    "EpisodeSize",
    "EpisodeSpec",
    "HostDataset",
    "Split",
    "Splits",
    "Storage",
    "TaskSource",
    "all_classes",
    "augmented",
    "check_spec",
    "class_examples",
    "dataset_from_arrays",
    "dataset_from_classes",
    "embedded",
    "gp",
    "gp_posterior",
    "image_completion",
    "lazy_splits",
    "linear_regression",
    "load_features",
    "load_glyphs",
    "load_image_folder",
    "load_omniglot",
    "load_source",
    "load_tfds_images",
    "load_trials",
    "random_affine",
    "random_class_split",
    "rotate_90",
    "sample_batch",
    "sample_episode",
    "sample_sinusoid",
    "source_from_sampler",
    "source_from_splits",
    "split_from_arrays",
    "split_from_classes",
]
