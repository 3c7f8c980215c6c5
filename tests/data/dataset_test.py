import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meta_jax.data.dataset import (
    DataError,
    Dataset,
    Split,
    class_examples,
    dataset_from_classes,
    lazy_splits,
    random_class_split,
    split_from_classes,
)


def _constant(n, value, shape=(2, 3, 1)):
    return np.full((n, *shape), value, np.uint8)


def test_classes_are_stored_one_after_another():
    dataset = dataset_from_classes([_constant(1, 7), _constant(3, 9)], groups=[4, 2])
    assert dataset.examples.shape == (4, 2, 3, 1)
    assert dataset.examples.dtype == np.uint8
    np.testing.assert_array_equal(dataset.examples[:, 0, 0, 0], [7, 9, 9, 9])
    np.testing.assert_array_equal(dataset.starts, [0, 1])
    np.testing.assert_array_equal(dataset.counts, [1, 3])
    np.testing.assert_array_equal(dataset.groups, [4, 2])
    assert dataset.starts.dtype == dataset.counts.dtype == dataset.groups.dtype == np.int32
    assert dataset.largest == 3
    np.testing.assert_array_equal(class_examples(dataset, 1), _constant(3, 9))


def test_one_large_class_beside_small_ones_takes_no_more_memory_than_its_examples():
    classes = [np.zeros((500, 8), np.float32)] + [np.zeros((5, 8), np.float32)] * 50
    dataset = dataset_from_classes(classes)
    assert dataset.examples.shape == (750, 8)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(dataset)) == 750 * 8 * 4 + 3 * 51 * 4


def test_examples_may_be_of_any_dtype_and_a_pytree():
    classes = [{"ids": np.full((n, 6), n, np.int32), "mask": np.ones((n, 6), bool)} for n in (2, 4)]
    dataset = dataset_from_classes(classes)
    assert dataset.examples["ids"].dtype == np.int32
    assert dataset.examples["mask"].dtype == bool
    np.testing.assert_array_equal(class_examples(dataset, 1)["ids"], classes[1]["ids"])
    features = dataset_from_classes([jnp.ones((2, 3), jnp.bfloat16)] * 3)
    assert features.examples.dtype == jnp.bfloat16


def test_a_dataset_is_a_pytree_whose_largest_class_is_static():
    dataset = dataset_from_classes([_constant(1, 7), _constant(3, 9)])
    by_hand = Dataset(dataset.examples, dataset.starts, dataset.counts, dataset.groups)
    assert jax.tree.structure(by_hand) == jax.tree.structure(dataset)
    assert jax.jit(lambda data: jnp.zeros(data.largest))(dataset).shape == (3,)
    assert jax.tree.map(lambda leaf: leaf, dataset).largest == 3


@pytest.mark.parametrize(
    ("classes", "groups", "message"),
    [
        ([], None, "at least one class"),
        ([_constant(1, 1), _constant(0, 1)], None, "class 1 has no examples"),
        ([_constant(1, 1), _constant(1, 1, (3, 3, 1))], None, "class 1 has uint8 examples of sh"),
        ([_constant(1, 1), _constant(1, 1).astype(np.float32)], None, "class 1 has float32"),
        ([_constant(1, 1)], [0, 1], "2 groups were given for 1 classes"),
        ([np.array(["a", "b"])], None, "class 0 has examples of dtype <U1"),
        ([np.float32(1.0)], None, "class 0 has float32 examples of shape"),
        ([{"a": np.zeros(2)}, {"b": np.zeros(2)}], None, "class 1 has examples of structure"),
        ([{"a": np.zeros(2), "b": np.zeros(3)}], None, r"class 0 has leaves of \[2, 3\] examples"),
        ([{}], None, "class 0 has examples of structure"),
    ],
)
def test_dataset_from_classes_refuses_in_one_line(classes, groups, message):
    with pytest.raises(DataError, match=message) as error:
        dataset_from_classes(classes, groups)
    assert "\n" not in str(error.value)


def test_a_split_names_its_classes_and_groups():
    classes = [_constant(1, value) for value in range(3)]
    split = split_from_classes(classes, ["x/1", "y/1", "x/2"], ["x", "y", "x"])
    assert split.class_names == ("x/1", "y/1", "x/2")
    assert [split.group_names[group] for group in split.dataset.groups] == ["x", "y", "x"]


def test_splits_are_loaded_once_when_they_are_asked_for():
    loaded = []

    def load(name):
        loaded.append(name)
        return Split(dataset_from_classes([_constant(1, 1)]), (name,), ("none",))

    splits = lazy_splits({name: lambda name=name: load(name) for name in ("train", "test")})
    assert list(splits.datasets) == ["train", "test"]
    assert "val" not in splits.class_names
    assert not loaded
    assert splits.datasets["test"].largest == 1
    assert splits.class_names["test"] == ("test",)
    assert splits.datasets["test"] is splits.datasets["test"]
    assert loaded == ["test"]
    with pytest.raises(KeyError):
        splits.datasets["val"]


@given(n_classes=st.integers(3, 300), seed=st.integers(0, 2**32 - 1))
def test_random_class_split_is_a_partition_without_empty_parts(n_classes, seed):
    split = random_class_split(n_classes, seed)
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(n_classes))
    assert min(map(len, split.values())) >= 1
    again = random_class_split(n_classes, seed)
    for name, members in split.items():
        np.testing.assert_array_equal(members, again[name])


def test_random_class_split_has_the_fractions_and_follows_the_seed():
    split = random_class_split(100, seed=0)
    assert {name: len(members) for name, members in split.items()} == {
        "train": 64,
        "val": 16,
        "test": 20,
    }
    assert split["test"].tolist() != random_class_split(100, seed=1)["test"].tolist()
    assert [len(m) for m in random_class_split(10, 0, (0.2, 0.3, 0.5)).values()] == [2, 3, 5]


NAN = float("nan")


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.5, 0.5), (NAN, 0.5, 0.5), (0.5, NAN, 0.5)]
)
def test_random_class_split_refuses_fractions(fractions):
    with pytest.raises(DataError, match="split fractions"):
        random_class_split(10, 0, fractions)


def test_random_class_split_refuses_two_classes():
    with pytest.raises(DataError, match="at least 3"):
        random_class_split(2, 0)


@pytest.mark.parametrize("value", [2**40, -(2**31) - 1])
def test_integers_that_would_be_cut_off_are_refused(value):
    with pytest.raises(DataError, match=rf"class 1 has the int64 {value}, which int32 cannot"):
        dataset_from_classes([np.array([[1]]), np.array([[3], [value]])])
    with pytest.raises(DataError, match=r"uint64 4294967296, which uint32"):
        dataset_from_classes([np.array([[2**32]], np.uint64)])
    with jax.enable_x64(True):
        data = dataset_from_classes([np.array([[1]]), np.array([[3], [value]])])
        assert data.examples.ravel().tolist() == [1, 3, value]
    fits = dataset_from_classes([np.array([[2**31 - 1], [-(2**31)]])])
    assert fits.examples.ravel().tolist() == [2**31 - 1, -(2**31)]
