"""Tasks by dataset name: what to draw from, and how."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from absl import flags

from experiments.command_line import UsageError
from meta_jax.core import Episode, PyTree
from meta_jax.data.dataset import Splits
from meta_jax.data.episodes import EpisodeSpec, check_spec, sample_episode
from meta_jax.data.registry import load_splits
from meta_jax.data.sinusoid import sample_sinusoid


class Tasks(NamedTuple):
    """A source of episodes."""

    sampler: Callable[[jax.Array, PyTree], Episode]
    data: PyTree  # the sampler's second argument


def load(values: flags.FlagValues, data_dir: str | None) -> Splits | None:
    """The splits of the run's dataset; None for sinusoid, whose tasks come from no data.

    Raises:
      DataError: the dataset is unknown, missing or damaged.
    """
    if values.dataset == "sinusoid":
        return None
    return load_splits(
        values.dataset,
        data_dir=data_dir,
        image_size=values.image_size,
        seed=values.seed,
        split_rule=values.split_rule,
    )


def training_spec(values: flags.FlagValues) -> EpisodeSpec:
    """What a training episode is made of."""
    return EpisodeSpec(
        values.train_ways or values.ways,
        values.train_shots or values.shots,
        values.train_queries or values.queries,
        values.rotations,
        within_group=values.within_alphabet,
    )


def test_spec(values: flags.FlagValues) -> EpisodeSpec:
    """What a validation or test episode is made of."""
    return EpisodeSpec(
        values.ways,
        values.shots,
        values.queries,
        values.rotations,
        within_group=values.within_alphabet,
        shared_drawers=values.within_alphabet,
    )


def tasks(splits: Splits | None, split: str, spec: EpisodeSpec) -> Tasks:
    """Episodes of one split.

    Raises:
      UsageError: the dataset has no such split.
      DataError: the split cannot serve the episode.
    """
    if splits is None:
        return Tasks(lambda key, _: sample_sinusoid(key, spec.shots, spec.queries), ())
    if split not in splits.datasets:
        raise UsageError(f"no split '{split}': choose one of {', '.join(splits.datasets)}")
    dataset = splits.datasets[split]
    check_spec(spec, dataset, f"split {split}")
    return Tasks(lambda key, data: sample_episode(key, data, spec), dataset)
