"""Features from a file."""

import jax
import numpy as np
import pytest

from meta_jax.data.dataset import DataError
from meta_jax.data.features import load_features
from meta_jax.data.source import EpisodeSize, load_source

X = np.random.default_rng(0).normal(1000.0, 300.0, (24, 5))  # far from [0, 255]
LABEL = np.repeat([f"class {k}" for k in "abcdef"], 4)


@pytest.fixture
def saved(tmp_path):
    def save(name="f.npz", **arrays):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return save


def test_real_features_pass_unscaled(saved):
    source = load_source(f"features:{saved(x=X, label=LABEL)}")
    tasks = source.tasks("train", EpisodeSize(2, 1, 2), train=True)
    episode = tasks.sample(jax.random.key(0), tasks.data)
    rows = np.asarray(episode.support.x, np.float32)
    for row in rows:
        assert np.isclose(X.astype(np.float32), row).all(1).any()


def test_bytes_are_pixels_and_integers_are_ids(saved):
    for dtype, expected in ((np.uint8, 1.0), (np.int16, 255)):
        x = np.full((24, 2), 255, dtype)
        source = load_source(f"features:{saved(x=x, label=LABEL)}")
        tasks = source.tasks("train", EpisodeSize(2, 1, 2), train=True)
        found = tasks.sample(jax.random.key(0), tasks.data).support.x
        assert (np.asarray(found) == expected).all()


def test_splits_and_groups_are_the_files_own(saved):
    split = np.repeat(["train", "train", "train", "val", "test", "test"], 4)
    group = np.repeat(["g", "h", "g", "g", "g", "h"], 4)
    splits = load_features(saved(x=X, label=LABEL, split=split, group=group))
    assert set(splits.datasets) == {"train", "val", "test"}
    assert splits.class_names["train"] == ("class a", "class b", "class c")
    assert splits.datasets["test"].counts.tolist() == [4, 4]
    names = splits.group_names["train"]
    assert [names[g] for g in splits.datasets["train"].groups] == ["g", "h", "g"]


def test_classes_are_split_at_random_where_the_file_has_no_split(saved):
    path = saved(x=X, label=LABEL)
    splits = [load_features(path, seed=seed) for seed in (0, 0, 1)]
    names = [tuple(s.class_names[k] for k in ("train", "val", "test")) for s in splits]
    assert names[0] == names[1] != names[2]
    assert sorted(sum(names[0], ())) == sorted(set(LABEL))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "it needs x"),
        ({"x": X, "label": LABEL[:3]}, r"label has shape \[3\], and x has 24 rows"),
        (
            {"x": np.where(np.arange(24)[:, None] == 5, np.nan, X), "label": LABEL},
            "row 5 of x is not finite",
        ),
        (
            {"x": X, "label": LABEL, "split": np.array(["train", "test"] * 12)},
            "class class a is in the splits test and train",
        ),
        ({"x": np.array([{}] * 24), "label": LABEL}, "plain arrays"),
    ],
)
def test_what_does_not_fit_is_refused(saved, arrays, message):
    with pytest.raises(DataError, match=message):
        load_features(saved(**arrays))


def test_a_file_that_is_missing_or_something_else_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.npz does not exist"):
        load_features(tmp_path / "nowhere.npz")
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(DataError, match="holds one array"):
        load_features(tmp_path / "one.npy")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="plain arrays"):
        load_features(tmp_path / "text.npz")
