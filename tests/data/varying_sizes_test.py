"""Episodes of random size, in arrays of one size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.data.dataset import DataError, Storage, dataset_from_classes
from meta_jax.data.source import EpisodeSize, all_classes, source_from_splits
from meta_jax.data.streams import task_data
from meta_jax.lookup import UsageError

SIZE = EpisodeSize(4, 3, 2)
DATASET = dataset_from_classes([np.full((6, 2), 10.0 * k) for k in range(5)])


def tasks_of(dataset=DATASET, train=True, size=SIZE, **least):
    return source_from_splits({"train": dataset}, **least).tasks("train", size, train=train)


def sizes(task):
    """Real classes, real support examples of each, and queries of each."""
    counts = [(batch.y * batch.mask[:, None]).sum(0) for batch in task]
    return tuple(np.asarray(count).astype(int) for count in counts)


def test_each_episode_has_its_number_of_classes_and_of_shots():
    tasks = tasks_of(least_ways=2, least_shots=1)
    draw = jax.jit(tasks.sample)
    found = set()
    for key in jax.random.split(jax.random.key(0), 60):
        task = draw(key, tasks.data)
        assert task.support.x.shape == (12, 2)
        assert task.query.x.shape == (8, 2)
        shots, queries = sizes(task)
        ways = int((shots > 0).sum())
        assert shots[:ways].min() == shots.max()
        np.testing.assert_array_equal(shots[ways:], 0)
        np.testing.assert_array_equal(queries, [2] * ways + [0] * (4 - ways))
        found.add((ways, int(shots.max())))
    assert found == {(ways, shots) for ways in (2, 3, 4) for shots in (1, 2, 3)}
    assert draw._cache_size() == 1


def test_a_size_that_is_not_random_stays():
    tasks = tasks_of(least_shots=2)
    shots, queries = sizes(tasks.sample(jax.random.key(1), tasks.data))
    np.testing.assert_array_equal(queries, 2)
    assert shots.min() == shots.max() >= 2


def test_tests_have_the_size_that_is_asked_for():
    tasks = tasks_of(train=False, least_ways=2, least_shots=1)
    assert tasks.sample(jax.random.key(0), tasks.data).support.mask is None


def test_a_stream_has_the_same_episodes():
    classes = [np.full((6, 2), k, np.uint8) for k in range(5)]
    on_device = tasks_of(dataset_from_classes(classes), least_ways=2)
    on_host = tasks_of(dataset_from_classes(classes, storage=Storage("host", 1.0)), least_ways=2)
    key = jax.random.key(3)
    own = task_data(on_host.sample, on_host.data, key)
    expected = on_device.sample(key, on_device.data)
    jax.tree.map(np.testing.assert_array_equal, on_host.sample(key, own), expected)
    assert jnp.size(expected.support.mask) == 12


@pytest.mark.parametrize(
    ("least", "message"),
    [
        ({"least_ways": 1}, "least_ways=1 must be between 2 and the ways of training, 4"),
        ({"least_ways": 5}, "least_ways=5 must be between 2 and the ways of training, 4"),
        ({"least_shots": 4}, "least_shots=4 must be between 1 and the shots of training, 3"),
    ],
)
def test_sizes_that_cannot_be_are_refused(least, message):
    with pytest.raises(DataError, match=message):
        tasks_of(**least)


def test_a_classifier_of_all_classes_is_trained_on_no_episodes_of_random_size():
    tasks = tasks_of()
    assert all_classes(tasks).sample is tasks.batch
    with pytest.raises(UsageError, match=r"without least_ways and least_shots"):
        all_classes(tasks_of(least_ways=2))
