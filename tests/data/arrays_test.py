"""Datasets from arrays and labels, and embedded datasets."""

import numpy as np
import pytest

from meta_jax.data.arrays import dataset_from_arrays, embedded, split_from_arrays
from meta_jax.data.dataset import DataError, class_examples, lazy_splits


def test_examples_are_grouped_by_their_sorted_labels():
    x = {"a": np.arange(5), "b": np.arange(10.0).reshape(5, 2)}
    split = split_from_arrays(x, ["z", "é", "z", "b", "é"], ["g", "h", "g", "g", "h"])
    assert split.class_names == ("b", "z", "é")
    assert [split.group_names[g] for g in split.dataset.groups] == ["g", "g", "h"]
    assert [class_examples(split.dataset, k)["a"].tolist() for k in range(3)] == [
        [3],
        [0, 2],
        [1, 4],
    ]
    assert class_examples(split.dataset, 2)["b"].tolist() == [[2, 3], [8, 9]]


def test_integers_are_labels_in_their_own_order():
    data = dataset_from_arrays(np.arange(4), np.array([10, 9, 10, -1]))
    assert data.counts.tolist() == [1, 1, 2]
    assert data.examples.tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize(
    ("x", "labels", "groups", "message"),
    [
        (np.zeros((3, 2)), [0, 1], None, r"x has shape \[3, 2\], and there are 2 labels"),
        (np.zeros((2, 2)), np.eye(2), None, "one name or integer each"),
        (np.zeros((2, 2)), [0.5, 1], None, "one name or integer each"),
        (np.zeros((0, 2)), np.zeros(0, int), None, "at least one example"),
        (np.zeros((2, 2)), [0, 1], [0], "1 groups were given for 2"),
        (np.zeros((2, 2)), [0, 0], [0, 1], "class 0 has examples of the groups 0, 1"),
        (np.array(["a", "b"]), [0, 1], None, "turn them into numbers"),
    ],
)
def test_what_does_not_fit_is_refused(x, labels, groups, message):
    with pytest.raises(DataError, match=message):
        dataset_from_arrays(x, labels, groups)


def test_a_split_is_embedded_once_and_when_it_is_asked_for():
    calls = []

    def embed(x):
        calls.append(len(x))
        return x.sum(1, keepdims=True)

    def load(n):
        return lambda: split_from_arrays(np.ones((n, 3)), ["b"] * (n - 1) + ["a"], ["g"] * n)

    splits = embedded(lazy_splits({"train": load(4), "test": load(2)}), embed)
    assert calls == []
    assert splits.datasets["train"].examples.tolist() == [[3.0]] * 4
    assert splits.datasets["train"].counts.tolist() == [1, 3]
    assert splits.class_names["train"] == ("a", "b")
    assert splits.group_names["train"] == ("g",)
    assert calls == [4]
