"""Task sources: from a name and settings to tasks."""

import json
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax import registry
from meta_jax.core import Batch, Episode, Objective
from meta_jax.data.dataset import DataError, dataset_from_classes
from meta_jax.data.episodes import EpisodeSpec, sample_episode
from meta_jax.data.sinusoid import sample_sinusoid
from meta_jax.data.source import (
    EpisodeSize,
    TaskSource,
    find_source,
    load_source,
    source_from_sampler,
    source_from_splits,
)
from meta_jax.lookup import UsageError
from tests.checkers import key_and_leak_checks

KEY = jax.random.key(0)
SIZE = EpisodeSize(2, 1, 2)


def pictures(n=6):
    """Classes of images unlike each other, in two groups."""
    images = np.random.default_rng(0).integers(0, 255, (4, n, 8, 8, 1), np.uint8)
    return dataset_from_classes(list(images), [0, 0, 1, 1])


def distance(outputs, y, mask=None):
    error = jnp.abs(outputs - y).mean()
    return error, {"mae": error}


mean_absolute_error = Objective(distance, "mae", maximise=False)


def shifted_signals(
    *,
    length: int = 8,
    shift: float = 1.0,
    shape: Literal["sine", "cosine"] = "sine",
    objective: Objective | str = mean_absolute_error,
) -> TaskSource:
    """Builds a source of signals.

    Args:
      length: Number of samples of a signal.
      shift: Shift of all signals.
      shape: Shape of the signals.
      objective: Objective of the tasks.
    """

    def sample_of_size(size):
        def sample(key, data):
            keys = jax.random.split(key)
            x, z = (jax.random.normal(k, (n, length)) for k, n in zip(keys, size[1:], strict=True))
            return Episode(Batch(x, x + shift), Batch(z, z + shift))

        return sample

    return source_from_sampler(sample_of_size, objective)


def read_folder(path: str, /, *, depth: int = 1) -> TaskSource:
    """Builds a source that needs an argument."""
    return source_from_splits({path: pictures})


def number() -> int:
    """Builds no source."""
    return 3


OWN = f"{__name__}:shifted_signals"


draw = jax.jit(sample_episode, static_argnums=2)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_source_draws_what_the_sampler_draws():
    source = source_from_splits({"train": pictures()}, rotations="per_class")
    tasks = source.tasks("train", SIZE, train=True)
    spec = EpisodeSpec(*SIZE, "per_class")
    assert_same(jax.jit(tasks.sample)(KEY, tasks.data), draw(KEY, pictures(), spec))
    assert tasks.objective.metric == "accuracy"


def test_within_group_shows_the_same_drawers_in_tests_alone():
    source = source_from_splits({"train": pictures(), "test": pictures()}, within_group=True)
    for split, train in (("train", True), ("test", False)):
        tasks = source.tasks(split, SIZE, train=train)
        spec = EpisodeSpec(*SIZE, within_group=True, shared_drawers=not train)
        assert_same(jax.jit(tasks.sample)(KEY, tasks.data), draw(KEY, pictures(), spec))


def test_augmentation_is_for_training_alone():
    source = source_from_splits({"train": pictures()}, augment="affine")
    test = source.tasks("train", SIZE, train=False)
    assert_same(jax.jit(test.sample)(KEY, test.data), draw(KEY, pictures(), EpisodeSpec(*SIZE)))
    episode = jax.jit(source.tasks("train", SIZE, train=True).sample)(KEY, test.data)
    sample_key, *_ = jax.random.split(KEY, 3)
    unchanged = draw(sample_key, pictures(), EpisodeSpec(*SIZE))
    for found, before in zip(episode, unchanged, strict=True):
        np.testing.assert_array_equal(found.y, before.y)
        assert found.x.shape == before.x.shape
        assert np.abs(found.x - before.x).max() > 0.01


def test_augmentation_is_for_images_alone():
    source = source_from_splits(
        {"train": dataset_from_classes([np.zeros((4, 8))] * 3)}, augment="affine"
    )
    with pytest.raises(DataError, match="split train that are no images cannot be augmented"):
        source.tasks("train", SIZE, train=True)
    assert source.tasks("train", SIZE, train=False).objective.kind == "classification"


def test_a_split_is_loaded_once_and_not_before_it_is_asked_for():
    loaded = []

    def load():
        loaded.append(1)
        return pictures()

    def broken():
        raise AssertionError("was not asked for")

    source = source_from_splits({"train": load, "val": broken})
    assert source.splits == ("train", "val")
    assert not loaded
    for train in (True, False):
        source.tasks("train", SIZE, train=train)
    assert loaded == [1]


def test_requests_that_cannot_be_served_are_refused_in_one_line():
    source = source_from_splits({"train": pictures(), "test": pictures()})
    for call, message in (
        (lambda: source.tasks("val", SIZE, train=False), "no split 'val': choose one of train, t"),
        (lambda: source.tasks("test", EpisodeSize(5, 1, 1), train=False), "of split test"),
        (lambda: load_source("sinusoid").tasks("dev", SIZE, train=True), "no split 'dev'"),
        (
            lambda: load_source("sinusoid").tasks("val", EpisodeSize(1, 0, 1), train=True),
            "shots=0",
        ),
        (lambda: source_from_splits({}, rotations="some"), "unknown rotations 'some'"),
        (lambda: source_from_splits({}, augment="elastic"), "unknown augment 'elastic'"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_sinusoids_are_drawn_of_any_size_and_ask_for_the_squared_error():
    source = load_source("sinusoid")
    tasks = source.tasks("test", EpisodeSize(7, 3, 4), train=False)
    assert_same(jax.jit(tasks.sample)(KEY, tasks.data), sample_sinusoid(KEY, 3, 4))
    assert tasks.objective.name == "squared_error"
    assert source.preprocessing is None
    assert source.baselines == ()
    assert source.splits == ("train", "val", "test")


def test_splits_may_be_drawn_differently():
    def constant(value):
        def sample_of_size(size):
            def sample(key, data):
                batch = Batch(jnp.full((size.shots, 1), value), jnp.ones((size.shots, 1)))
                return Episode(batch, batch)

            return sample

        return sample_of_size

    source = source_from_sampler({"train": constant(1.0), "test": constant(2.0)}, "squared_error")
    assert source.splits == ("train", "test")
    for split, value in (("train", 1.0), ("test", 2.0)):
        tasks = source.tasks(split, SIZE, train=False)
        assert tasks.sample(KEY, tasks.data).support.x.item() == value


# --- By name --------------------------------------------------------------------------------------


def test_somebodys_own_source_is_found_by_its_path():
    source = load_source(OWN, length=5, objective=f"{__name__}:mean_absolute_error")
    assert source.config == {
        "name": OWN,
        "length": 5,
        "shift": 1.0,
        "shape": "sine",
        "objective": f"{__name__}:mean_absolute_error",
    }
    tasks = source.tasks("train", EpisodeSize(1, 3, 4), train=True)
    episode = tasks.sample(KEY, tasks.data)
    assert episode.query.x.shape == (4, 5)
    assert tasks.objective.metric == "mae"
    assert not tasks.objective.maximise
    settings = registry.settings(registry.find("tasks", OWN))
    assert list(settings) == ["length", "shift", "shape", "objective"]
    assert settings["shape"].choices == ("sine", "cosine")


def test_a_recorded_source_is_built_again():
    for source in (load_source(OWN, shift=2.0), load_source(f"{__name__}:read_folder:a/b:c")):
        if "objective" in source.config:
            source = load_source(source.config["name"], shift=2.0, objective="squared_error")
        record = json.loads(json.dumps(source.config))
        assert load_source(**record).config == source.config


def test_a_source_that_registers_itself_is_recorded_by_the_path_that_finds_it(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    monkeypatch.setitem(globals(), "registered", registry.tasks("mine")(shifted_signals))
    assert load_source(f"{__name__}:registered").config["name"] == f"{__name__}:registered"
    assert load_source("mine").config["name"] == "mine"


def test_what_follows_the_name_reaches_the_factory():
    source = load_source(f"{__name__}:read_folder:a/b:c", depth=2)
    assert source.splits == ("a/b:c",)
    assert source.config == {"name": f"{__name__}:read_folder:a/b:c", "depth": 2}
    assert find_source("folder:some/where")[1] == "some/where"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mnist", {}, r"unknown tasks 'mnist': choose one of .*glyphs.*sinusoid"),
        ("", {}, r"unknown tasks ''"),
        ("tfds:", {}, "'tfds:' need a name: write tfds:NAME"),
        ("folder", {}, "'folder' need a path: write folder:PATH"),
        ("glyphs:x", {}, "'glyphs' take nothing after ':': leave out 'x'"),
        (f"{OWN}:x", {}, "take nothing after ':'"),
        ("glyphs", {"split_rule": "lake"}, "no setting 'split_rule': they have image_size, rot"),
        ("folder:x", {"path": "y"}, "no setting 'path': they have image_size"),
        ("sinusoid", {"objective": "hinge"}, "unknown objective 'hinge'"),
        (f"{__name__}:number", {}, "returns a value of type int, not a meta_jax"),
        (f"{__name__}:absent", {}, "has no 'absent'"),
    ],
)
def test_names_and_settings_that_are_wrong_are_refused_in_one_line(name, settings, message):
    with pytest.raises(UsageError, match=message) as error:
        load_source(name, **settings)
    assert "\n" not in str(error.value)


def test_every_setting_of_every_source_has_a_sentence():
    for name in ("glyphs", "omniglot", "folder", "tfds", "sinusoid"):
        component = registry.find("tasks", name)
        settings = registry.settings(component)
        assert "objective" in settings
        assert all(setting.doc.endswith(".") for setting in settings.values())
        assert registry.summary(component).startswith("Builds the source of ")
    assert list(registry.settings(registry.find("tasks", "omniglot"))) == [
        "data_dir",
        "image_size",
        "split_rule",
        "rotations",
        "within_group",
        "least_ways",
        "least_shots",
        "augment",
        "polarity",
        "objective",
        "placement",
        "device_memory",
    ]


def test_no_key_is_used_twice_and_no_tracer_leaks():
    source = source_from_splits({"train": pictures()}, augment="affine", rotations="per_class")
    tasks = source.tasks("train", SIZE, train=True)
    with key_and_leak_checks():
        jax.jit(tasks.sample)(jax.random.key(1), tasks.data)
