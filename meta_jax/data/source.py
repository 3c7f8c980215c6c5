"""Task sources: from a name and settings to distributions of tasks, by split.

Somebody's own source is a function of keyword settings that returns a `TaskSource`, best built by
`source_from_sampler` or `source_from_splits`; `--tasks=my_module:my_source` names it.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from meta_jax import registry
from meta_jax.core import Config, Objective, PyTree, Sample, Tasks
from meta_jax.data.augmentation import AUGMENTATIONS, Augment, augmented, random_affine
from meta_jax.data.dataset import DataError, Dataset, Splits
from meta_jax.data.episodes import (
    EpisodeSampler,
    EpisodeSpec,
    Rotations,
    are_images,
    check_rotations,
    check_sizes,
    check_spec,
    draw_batch,
    draw_episode,
)
from meta_jax.data.notes import Notes, some
from meta_jax.data.polarity import Ink, with_polarity
from meta_jax.data.varying_sizes import RandomSizeSampler, check_range
from meta_jax.lookup import UsageError
from meta_jax.objectives import as_objective


class EpisodeSize(NamedTuple):
    """How large an episode is.

    Attributes:
      ways: Classes; a source of regression ignores it.
      shots: Support examples of each class.
      queries: Query examples of each class.
    """

    ways: int
    shots: int
    queries: int


class SplitTasks(Protocol):
    """(split, size, *, train) -> tasks."""

    def __call__(self, split: str, size: EpisodeSize, *, train: bool) -> Tasks:
        """Tasks of one split; `train` says that they are trained on, which may augment them."""
        ...


class SampleOfSize(Protocol):
    """(size) -> sampler."""

    def __call__(self, size: EpisodeSize, /) -> Sample:
        """The sampler (key, data) -> episode of episodes of a size."""
        ...


class TaskSource(NamedTuple):
    """Where tasks come from: a distribution of tasks for each split and size.

    A split is loaded and checked when its tasks are first asked for, and not before.

    Attributes:
      tasks: Function (split, size, *, train) -> tasks.
      splits: Names of the splits there are.
      baselines: Learners shown beside a result, such as 'nearest_neighbour'.
      config: Which source it is: its name and settings.
      preprocessing: How an input must look, in what JSON can hold.
      notes: What a user should know of the data; grows as splits are loaded.
    """

    tasks: SplitTasks
    splits: tuple[str, ...]
    baselines: tuple[str, ...] = ()
    config: Config | None = None
    preprocessing: Config | None = None
    notes: Iterable[str] = ()


def source_from_sampler(
    sample_of_size: SampleOfSize | Mapping[str, SampleOfSize],
    objective: Objective | str,
    *,
    splits: Sequence[str] = ("train", "val", "test"),
    data: PyTree = (),
    baselines: tuple[str, ...] = (),
    preprocessing: Config | None = None,
    exact_answers: Mapping[str, SampleOfSize] | None = None,
) -> TaskSource:
    """Builds a source of tasks that a function draws.

    Args:
      sample_of_size: Function that gives the sampler (key, data) -> episode for an `EpisodeSize`;
        or such functions by split, where splits are drawn differently.
      objective: Objective of the tasks, or its name.
      splits: Names of the splits, all drawn alike; the keys of `sample_of_size` where it is a
        mapping.
      data: Pytree that samplers draw from.
      baselines: Names of learners shown beside a result.
      preprocessing: Record of how an input must look.
      exact_answers: What is known to be the best answer and is shown beside a result: by name,
        functions that give for an `EpisodeSize` a function (key, data) -> (episode, outputs), which
        draws the episode that the sampler draws.

    Examples:
      >>> import jax
      >>> from meta_jax.core import Batch, Episode
      >>> def lines(*, slope: float = 2.0) -> TaskSource:
      ...     '''Tasks y = slope x + b.
      ...
      ...     Args:
      ...       slope: Slope of all lines.
      ...     '''
      ...     def sample_of_size(size):
      ...         def sample(key, data):
      ...             b_key, *keys = jax.random.split(key, 3)
      ...             b = jax.random.normal(b_key)
      ...             xs = (jax.random.normal(k, (n, 1)) for k, n in zip(keys, size[1:]))
      ...             return Episode(*(Batch(x, slope * x + b) for x in xs))
      ...         return sample
      ...     return source_from_sampler(sample_of_size, "squared_error")
      >>> tasks = lines().tasks("train", EpisodeSize(1, 5, 10), train=True)
      >>> tasks.sample(jax.random.key(0), tasks.data).query.y.shape
      (10, 1)
    """
    objective = as_objective(objective)
    by_split = (
        dict(sample_of_size)
        if isinstance(sample_of_size, Mapping)
        else dict.fromkeys(splits, sample_of_size)
    )

    def tasks(split: str, size: EpisodeSize, *, train: bool) -> Tasks:
        _check_split(split, by_split)
        check_sizes(*size)
        exact = {name: of_size(size) for name, of_size in (exact_answers or {}).items()}
        return Tasks(by_split[split](size), data, objective, exact)

    return TaskSource(tasks, tuple(by_split), baselines, preprocessing=preprocessing)


def source_from_splits(
    splits: Splits | Mapping[str, Dataset | Callable[[], Dataset]],
    *,
    rotations: Rotations = "none",
    within_group: bool = False,
    least_ways: int | None = None,
    least_shots: int | None = None,
    augment: Augment = "none",
    objective: Objective | str = "cross_entropy",
    baselines: tuple[str, ...] = (),
    preprocessing: Config | None = None,
    notes: Notes | None = None,
    advice: str = "",
) -> TaskSource:
    """Builds a source of episodes of labelled examples.

    Args:
      splits: Dataset of each split, or a function that loads it when it is first asked for.
      rotations: Quarter turns of square images, as `EpisodeSpec` has them.
      within_group: Whether all classes of an episode are of one group; in tests all of them then
        show the same drawers.
      least_ways: Smallest number of classes in a training episode. Each episode draws its number
        between this and the ways, and pads the rest; by default all have as many classes.
      least_shots: Likewise the smallest number of support examples of each class.
      augment: Random changes of training images: 'affine' for `random_affine`.
      objective: Objective of the tasks, or its name.
      baselines: Names of learners shown beside a result.
      preprocessing: Record of how an input must look.
      notes: Notes about the data, to which others are added.
      advice: Further remedy where a split has too few classes, added to the error.

    Raises:
      DataError: unknown rotations or augmentation. The source's `tasks` raises one for a split
        that it does not have or that cannot serve the episode.

    Examples:
      >>> import jax, numpy as np
      >>> from meta_jax.data.dataset import dataset_from_classes
      >>> def features() -> TaskSource:
      ...     classes = [np.random.normal(size=(20, 64)) for _ in range(100)]
      ...     return source_from_splits({
      ...         "train": lambda: dataset_from_classes(classes[:80]),
      ...         "test": lambda: dataset_from_classes(classes[80:]),
      ...     })
      >>> tasks = features().tasks("test", EpisodeSize(5, 1, 15), train=False)
      >>> tasks.sample(jax.random.key(0), tasks.data).query.x.shape
      (75, 64)
    """
    objective = as_objective(objective)
    check_rotations(rotations)
    if augment not in AUGMENTATIONS:
        raise DataError(f"unknown augment '{augment}': choose one of {', '.join(AUGMENTATIONS)}")
    datasets = splits.datasets if isinstance(splits, Splits) else splits
    notes = Notes() if notes is None else notes

    @functools.cache
    def load(split: str) -> Dataset:
        found = datasets[split]
        return found if isinstance(found, Dataset) else found()

    def tasks(split: str, size: EpisodeSize, *, train: bool) -> Tasks:
        _check_split(split, datasets)
        dataset = load(split)
        drawers = within_group and not train
        spec = EpisodeSpec(*size, rotations, within_group, shared_drawers=drawers)
        check_spec(spec, dataset, f"split {split}", advice)
        names = splits.class_names[split] if isinstance(splits, Splits) else ()
        _note_small_classes(notes, split, dataset, names, size.shots + size.queries)
        sample: Sample = EpisodeSampler(draw_episode, spec)
        batch: Sample | None = EpisodeSampler(draw_batch, spec)
        if train and (least_ways or least_shots):
            sample, batch = _of_random_size(sample, size, least_ways, least_shots), None
        if train and augment == "affine":
            _check_images(dataset, split)
            sample = augmented(sample, random_affine)
            batch = augmented(batch, random_affine) if batch else None
        return Tasks(sample, dataset, objective, batch=batch)

    return TaskSource(tasks, tuple(datasets), baselines, preprocessing=preprocessing, notes=notes)


def _of_random_size(
    sample: Sample, size: EpisodeSize, least_ways: int | None, least_shots: int | None
) -> Sample:
    return RandomSizeSampler(
        sample,
        check_range("ways", 2, least_ways, size.ways),
        check_range("shots", 1, least_shots, size.shots),
    )


def _note_small_classes(
    notes: Notes, split: str, dataset: Dataset, names: Sequence[str], needed: int
) -> None:
    """Notes the classes that have too few examples to be drawn."""
    counts = np.asarray(dataset.counts)
    small = np.flatnonzero(counts < needed)
    if small.size:
        shown = some([names[i] if names else f"class {i}" for i in small.tolist()])
        notes.add(
            f"{small.size} of the {counts.size} classes of split {split} have fewer than {needed} "
            f"examples (shots + queries) and are never drawn: {shown}"
        )


def all_classes(tasks: Tasks) -> Tasks:
    """The tasks whose every draw is an ordinary batch, labelled among all classes of the split.

    For learners that train one classifier of all classes, such as `baseline`.

    Args:
      tasks: Tasks of a source of labelled examples.

    Raises:
      UsageError: the tasks have no such batches.

    Examples:
      >>> import jax
      >>> tasks = load_source("glyphs").tasks("val", EpisodeSize(5, 1, 15), train=True)
      >>> batch = all_classes(tasks).sample(jax.random.key(0), tasks.data)
      >>> batch.query.y.shape[0], batch.query.y.shape[1] == tasks.data.counts.size
      (75, True)
    """
    if tasks.batch is None:
        raise UsageError(
            "these tasks have no ordinary batches, with which one classifier of all classes is "
            "trained: choose a source of labelled examples, without least_ways and least_shots"
        )
    return tasks._replace(sample=tasks.batch)


def _check_split(split: str, splits: Mapping[str, Any]) -> None:
    if split not in splits:
        raise DataError(f"no split '{split}': choose one of {', '.join(splits)}")


def _check_images(dataset: Dataset, split: str) -> None:
    if not are_images(dataset.examples):
        raise DataError(
            f"examples of split {split} that are no images cannot be augmented: use augment 'none'"
        )


def image_source(
    splits: Splits,
    preprocessing: Config,
    *,
    rotations: Rotations,
    augment: Augment,
    objective: Objective | str,
    within_group: bool = False,
    least_ways: int | None = None,
    least_shots: int | None = None,
    ink: Ink | None = None,
    notes: Notes | None = None,
    advice: str = "",
) -> TaskSource:
    """Builds a source of images, with the nearest neighbour beside its results.

    The images get the polarity that `preprocessing` names; `ink` is that which they have.
    """
    objective = as_objective(objective)
    return source_from_splits(
        with_polarity(splits, preprocessing["polarity"], ink),
        rotations=rotations,
        within_group=within_group,
        least_ways=least_ways,
        least_shots=least_shots,
        augment=augment,
        objective=objective,
        baselines=("nearest_neighbour",) if objective.kind == "classification" else (),
        preprocessing=preprocessing,
        notes=notes,
        advice=advice,
    )


def image_preprocessing(
    image_size: int, channels: int, *, polarity: str, resample: str
) -> dict[str, str | int]:
    """Builds the record of how an image must look.

    Args:
      image_size: Side in pixels.
      channels: Number of channels, 1 or 3.
      polarity: 'ink_light' for ink 1 on 0, 'ink_dark' for ink 0 on 1, 'as_is' for the files' own.
      resample: Filter of resizing, one of Pillow's names.
    """
    return {
        "kind": "image",
        "image_size": image_size,
        "channels": channels,
        "polarity": polarity,
        "scaling": "0..1",
        "resample": resample,
    }


def find_source(name: str) -> tuple[registry.Component, str | None]:
    """A component by a name such as 'glyphs', 'folder:PATH' or 'package.module:function'.

    Args:
      name: Name of a registered source, with what follows its ':'; or somebody's own, likewise
        'package.module:function:ARGUMENT' where it takes one.

    Returns:
      The component, and what follows the name; None without.

    Raises:
      UsageError: an unknown name, an argument missing or too many.
    """
    known, _, argument = name.partition(":")
    if known not in registry.names("tasks") and argument:
        function, _, argument = argument.partition(":")
        known = f"{known}:{function}"
    component = registry.find("tasks", known)
    wanted = [
        parameter.name
        for parameter in registry.parameters(component.factory).values()
        if parameter.kind is parameter.POSITIONAL_ONLY
    ]
    if wanted and not argument:
        raise UsageError(f"tasks '{name}' need a {wanted[0]}: write {known}:{wanted[0].upper()}")
    if argument and not wanted:
        raise UsageError(f"tasks '{known}' take nothing after ':': leave out '{argument}'")
    return component, argument or None


def load_source(name: str, **settings: Any) -> TaskSource:
    """Builds a task source by its name.

    Args:
      name: 'glyphs', 'omniglot', 'folder:PATH', 'tfds:NAME', 'sinusoid', 'gp', or somebody's own
        'package.module:function'.
      **settings: Settings of the source; those of a recorded `TaskSource.config` build it again.

    Raises:
      UsageError: an unknown name, a setting that the source does not have, or data that is not
        there.

    Examples:
      >>> source = load_source("sinusoid")
      >>> source.config
      {'name': 'sinusoid', 'objective': 'squared_error', 'vary_frequency': False}
      >>> tasks = source.tasks("train", EpisodeSize(ways=1, shots=10, queries=10), train=True)
    """
    component, argument = find_source(name)
    signature = inspect.signature(component.factory)
    known = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    for setting in settings:
        if setting not in known:
            raise UsageError(
                f"tasks '{name}' have no setting '{setting}': they have {', '.join(known)}"
            )
    source = component.factory(*([argument] if argument else []), **settings)
    if not isinstance(source, TaskSource):
        raise UsageError(f"{name} builds a {type(source).__name__}, not a meta_jax TaskSource")
    # Somebody's own that registers itself is recorded by its path, which another process finds.
    return source._replace(config={**(source.config or {}), "name": name})
