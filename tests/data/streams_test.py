"""Examples on the host give the tasks that examples on the device give, by the same key."""

import sys

import jax
import numpy as np
import optax
import pytest

from meta_jax.core import MetaLearner, supervised_evaluate, supervised_loss
from meta_jax.data.dataset import ON_DEVICE, Storage, dataset_from_classes
from meta_jax.data.source import EpisodeSize, all_classes, source_from_splits
from meta_jax.data.streams import key_bits, task_data, task_shapes
from meta_jax.lookup import UsageError
from meta_jax.objectives import cross_entropy
from meta_jax.training.evaluation import make_evaluate
from meta_jax.training.outer_step import init_train_state, make_outer_step, training_data
from meta_jax.training.train_loop import make_train_loop

CLASSES = [np.random.default_rng(k).integers(0, 256, (60, 4, 4, 1), np.uint8) for k in range(12)]
SIZE = EpisodeSize(3, 1, 2)
TASK_BATCH = 2
EPISODE_BYTES = 9 * 16
LIMIT = 4 * TASK_BATCH * EPISODE_BYTES  # three buffers of one step each fit, and no more
ON_HOST = Storage("host", LIMIT / 1e6)


def tasks_of(storage, classes=CLASSES, **settings):
    dataset = dataset_from_classes(classes, [0] * 6 + [1] * 6, storage=storage)
    return source_from_splits({"train": dataset}, **settings).tasks("train", SIZE, train=True)


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def linear_learner():
    """Scores queries by a linear map, and adds the mean score of the support set."""

    def scores(params, x):
        return x.reshape(len(x), -1) @ params["map"]

    def init(key, task):
        return {"map": jax.random.normal(key, (16, task.support.y.shape[1]))}, {}

    def adapt(params, state, support, key, *, train):
        return scores(params, support.x).mean(0)

    def predict(params, adapted, x, key, *, train, mask=None):
        return scores(params, x) + adapted, {}

    return MetaLearner(
        init,
        adapt,
        predict,
        supervised_loss(adapt, predict, cross_entropy),
        supervised_evaluate(adapt, predict, cross_entropy),
    )


LEARNER, OPTIMIZER = linear_learner(), optax.sgd(0.05)


@pytest.mark.parametrize(
    ("settings", "of"),
    [
        ({"rotations": "per_class", "augment": "affine"}, lambda tasks: tasks),
        ({"rotations": "classes", "within_group": True}, lambda tasks: tasks),
        ({"rotations": "classes"}, all_classes),
    ],
)
def test_a_task_is_that_of_all_examples(settings, of):
    on_device, on_host = (of(tasks_of(where, **settings)) for where in (ON_DEVICE, ON_HOST))
    key = jax.random.key(3)
    expected = jax.jit(on_device.sample)(key, on_device.data)
    own = task_data(on_host.sample, on_host.data, key)
    assert own.examples.shape == (9, 4, 4, 1)
    assert_same(jax.jit(on_host.sample)(key, own), expected)
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), task_shapes(on_host))
    assert found == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)
    assert task_data(on_device.sample, on_device.data, key) is on_device.data


def test_examples_of_any_structure_are_gathered():
    trees = [{"ids": np.full((4, 2), k), "real": np.ones((4, 2), bool)} for k in range(12)]
    key, tasks = jax.random.key(0), tasks_of(ON_HOST, trees)
    own = task_data(tasks.sample, tasks.data, key)
    rows = np.asarray(jax.jit(tasks.sample.rows)(key, own))
    np.testing.assert_array_equal(own.examples["ids"], np.stack([rows // 4] * 2, 1))
    assert own.examples["real"].dtype == bool


def started(tasks):
    return init_train_state(LEARNER, OPTIMIZER, tasks, 0, task_batch=TASK_BATCH)


def loop_of(tasks):
    return make_train_loop(make_outer_step(LEARNER, OPTIMIZER, tasks.sample, task_batch=TASK_BATCH))


def train(loop, data, state, steps, in_a_call=1):
    """The mean losses of the calls, and the state behind the last."""
    losses = []
    for _ in range(steps // in_a_call):
        state, metrics, finite = loop(state, data, in_a_call)
        assert finite
        losses.append(float(metrics["loss"]))
    return losses, state


def bytes_of_streams():
    """Bytes of the examples of episodes on the device, [steps, tasks, examples, ...]."""
    return sum(a.nbytes for a in jax.live_arrays() if a.shape[1:] == (TASK_BATCH, 9, 4, 4, 1))


def test_a_set_ten_times_the_device_trains_as_on_a_larger_one(monkeypatch):
    on_host, on_device = tasks_of(ON_HOST), tasks_of(ON_DEVICE)
    assert on_host.data.examples.nbytes >= 10 * LIMIT
    stream = training_data(on_host, task_batch=TASK_BATCH)
    most = 0

    def gathered(*arguments, at=stream.at):
        nonlocal most
        found = at(*arguments)
        most = max(most, bytes_of_streams())
        return found

    monkeypatch.setattr(stream, "at", gathered)
    loop = loop_of(on_host)
    found, end = train(loop, stream, started(on_host), 50)
    assert loop.programs() == 1
    expected, same_end = train(loop_of(on_device), on_device.data, started(on_device), 50)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len(set(found)) == 50
    np.testing.assert_allclose(end.params["map"], same_end.params["map"], rtol=1e-5)
    assert TASK_BATCH * EPISODE_BYTES <= most <= LIMIT


def test_it_goes_on_from_any_step_in_calls_of_any_length():
    tasks = tasks_of(Storage("host", 12 * TASK_BATCH * EPISODE_BYTES / 1e6))
    loop, stream = loop_of(tasks), training_data(tasks, task_batch=TASK_BATCH)
    assert stream.groups == 4
    _, end = train(loop, stream, started(tasks), 14, in_a_call=7)
    _, half = train(loop, stream, started(tasks), 6, in_a_call=3)
    _, resumed = train(loop, training_data(tasks, task_batch=TASK_BATCH), half, 8, in_a_call=8)
    assert_same(resumed.params, end.params)
    # Another run of the same stream has its own tasks.
    (first,), _ = train(loop, stream, started(tasks)._replace(key=jax.random.key(7)), 1)
    (second,), _ = train(loop, stream, started(tasks), 1)
    assert first != second


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_test_has_the_episodes_of_one_on_the_device(chunk):
    on_device, on_host = (tasks_of(s) for s in (ON_DEVICE, ON_HOST))
    params, key = {"map": np.random.default_rng(0).normal(size=(16, 3))}, jax.random.key(4)
    expected, found = (
        make_evaluate(LEARNER, tasks.sample, episodes=7, chunk=chunk)(params, {}, tasks.data, key)
        for tasks in (on_device, on_host)
    )
    assert found["loss"].shape == (7,)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_what_cannot_be_streamed_is_refused_in_a_line(monkeypatch):
    tasks = tasks_of(ON_HOST)
    with pytest.raises(UsageError, match=r"needs at least 0.0115 MB .* use --tasks.placement=host"):
        tasks_of(Storage(device_memory=LIMIT / 1e6))
    with pytest.raises(UsageError, match=r"32 tasks at a time needs at least .*--task_batch"):
        training_data(tasks, task_batch=32)
    plain = tasks._replace(sample=lambda key, data: tasks.sample(key, data))
    with pytest.raises(UsageError, match="does not say which rows it reads"):
        training_data(plain, task_batch=1)
    with pytest.raises(UsageError, match="keys of the kind threefry2x32, not rbg"):
        key_bits(jax.random.key(0, impl="rbg"))
    with pytest.raises(TypeError, match="HostDataset"):  # no jitted function takes all of it
        jax.jit(tasks.sample)(jax.random.key(0), tasks.data)
    updating = LEARNER._replace(update=lambda *arguments, mesh: arguments[2:6])
    step = make_outer_step(updating, OPTIMIZER, tasks.sample, task_batch=1)
    with pytest.raises(UsageError, match="an update of its own"):
        make_train_loop(step)(started(tasks), training_data(tasks, task_batch=1), 1)
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UsageError, match=r"needs grain, .* pip install 'meta_jax\[streams\]'"):
        training_data(tasks, task_batch=1)
