import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import Aux, Batch, Episode, MetaLearner
from meta_jax.data.dataset import ImageDataset
from meta_jax.data.episodes import EpisodeSpec, sample_episode
from meta_jax.data.sinusoid import sample_sinusoid
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.mlp import mlp
from meta_jax.training.outer_step import (
    default_task_chunk,
    init_train_state,
    make_outer_step,
    make_run,
    task_gradients,
    task_mesh,
)

pytestmark = pytest.mark.usefixtures("x64")

LEARNER = prototypical(mlp((6,)))
OPTIMIZER = optax.adam(1e-2)
SPEC = EpisodeSpec(3, 1, 2)


def dataset():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 4, 1), np.uint8)
    return ImageDataset(jnp.asarray(images), jnp.full(6, 4, jnp.int32), jnp.zeros(6, jnp.int32))


@jax.jit
def sampler(key, data):
    return sample_episode(key, data, SPEC)


def fresh_state(seed=0):
    return init_train_state(LEARNER, OPTIMIZER, sampler, dataset(), seed)


def outer_step(**settings):
    return make_outer_step(LEARNER, OPTIMIZER, sampler, task_batch=4, **settings)


RUN = make_run(outer_step())


def with_plain_key(train_state):
    return train_state._replace(key=jax.random.key_data(train_state.key))


def assert_bitwise_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, with_plain_key(actual), with_plain_key(expected))


def normed_learner():
    """Prototypes of normalised inputs, with a running mean: a state that every task changes."""

    def loss(params, state, episode, key):
        x = jnp.concatenate([episode.support.x, episode.query.x])
        value, aux = LEARNER.loss(params, {}, episode, key)
        state = {"mean": 0.9 * state["mean"] + 0.1 * x.mean()}
        return value, Aux(state, {**aux.metrics, "noise": jax.random.uniform(key)})

    def init(key, episode):
        return LEARNER.init(key, episode)[0], {"mean": jnp.ones(())}

    return LEARNER._replace(init=init, loss=loss)


def test_the_task_chunk_changes_nothing():
    learner, data = normed_learner(), dataset()
    params, state = learner.init(jax.random.key(0), jax.jit(sampler)(jax.random.key(1), data))
    keys = jax.random.split(jax.random.key(2), 4)

    def gradients(chunk):
        return jax.jit(
            lambda: task_gradients(learner, sampler, params, state, data, keys, task_chunk=chunk)
        )()

    whole = gradients(4)
    for chunk in (1, 2):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradients(chunk), whole
        )

    # And the whole is the mean over tasks, drawn and answered one by one.
    def task(key):
        episode_key, loss_key = jax.random.split(key)
        (loss, aux), gradient = jax.value_and_grad(learner.loss, has_aux=True)(
            params, state, sampler(episode_key, data), loss_key
        )
        return gradient, aux.state, {"loss": loss, **aux.metrics}

    tasks = [jax.jit(task)(key) for key in keys]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *tasks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), whole, mean)
    assert abs(tasks[0][1]["mean"] - tasks[1][1]["mean"]) > 1e-6


def test_step_s_draws_from_the_key_folded_with_s():
    train_state = fresh_state()._replace(step=jnp.int32(5))
    new, metrics = jax.jit(outer_step())(train_state, dataset())
    keys = jax.random.split(jax.random.fold_in(train_state.key, 5), 4)
    gradient, _, expected = jax.jit(
        lambda params, data: task_gradients(LEARNER, sampler, params, {}, data, keys, task_chunk=4)
    )(train_state.params, dataset())
    updates, _ = OPTIMIZER.update(gradient, train_state.opt_state, train_state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10),
        (new.params, metrics),
        (optax.apply_updates(train_state.params, updates), expected),
    )
    assert new.step == 6
    np.testing.assert_array_equal(
        jax.random.key_data(new.key), jax.random.key_data(train_state.key)
    )


def test_where_a_run_is_split_makes_no_difference():
    run, data = RUN, dataset()
    ends = []
    for stops in ((7,), (2, 7), (1, 3, 7)):
        train_state = fresh_state()
        for stop in stops:
            train_state, metrics, finite = run(train_state, data, stop)
            assert finite
            assert train_state.step == stop
            assert np.isfinite(metrics["loss"])
        ends.append(train_state)
    assert_bitwise_equal(ends[0], ends[1])
    assert_bitwise_equal(ends[0], ends[2])
    other = run(fresh_state(seed=1), data, 7)[0]
    assert (
        other.params["network"]["layer1"]["kernel"] != ends[0].params["network"]["layer1"]["kernel"]
    ).all()


def test_the_metrics_of_a_run_are_means_over_its_steps():
    run, data = RUN, dataset()
    train_state, first, _ = run(fresh_state(), data, 1)
    _, second, _ = run(train_state, data, 2)
    _, both, _ = run(fresh_state(), data, 2)
    for name, value in both.items():
        np.testing.assert_allclose(value, (first[name] + second[name]) / 2, rtol=1e-12)
    assert set(both) == {"loss", "accuracy"}


def test_a_run_that_has_arrived_does_nothing():
    run, data = RUN, dataset()
    train_state, _, _ = run(fresh_state(), data, 2)
    expected = jax.tree.map(jnp.copy, train_state)
    for until in (2, 1):
        train_state, _, finite = run(train_state, data, until)
        assert_bitwise_equal(train_state, expected)
        assert finite


def test_it_compiles_once_however_many_steps_are_asked_for():
    draws = []

    def counted(key, data):
        draws.append(None)
        return sampler(key, data)

    step = make_outer_step(LEARNER, OPTIMIZER, counted, task_batch=2)
    run, train_state = make_run(step), fresh_state()
    train_state, _, _ = run(train_state, dataset(), 1)
    traced = len(draws)
    for until in (2, 5, 9):
        train_state, _, _ = run(train_state, dataset(), until)
    assert len(draws) == traced > 0
    assert run._cache_size() == 1


def countdown():
    """The loss is p, with gradient 1, until p comes to nothing; then it is not a number."""

    def loss(params, state, episode, key):
        value = jnp.where(params["p"] > 0.1, params["p"], jnp.nan)
        return value, Aux(state, {})

    return MetaLearner(lambda key, episode: ({"p": jnp.ones(())}, {}), None, None, loss)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step():
    def empty(key, data):
        return Episode(Batch(data, data), Batch(data, data))

    learner, optimizer, data = countdown(), optax.sgd(0.25), jnp.zeros(1)
    run = make_run(make_outer_step(learner, optimizer, empty, task_batch=1))
    # The losses are 1, 3/4, 1/2, 1/4 and NaN.
    train_state = init_train_state(learner, optimizer, empty, data, 0)
    train_state, metrics, finite = run(train_state, data, 4)
    assert finite
    np.testing.assert_allclose(metrics["loss"], 0.625)
    train_state, metrics, finite = run(train_state, data, 100)
    assert not finite
    assert train_state.step == 5
    assert np.isnan(metrics["loss"])


def test_the_initial_state_can_be_donated():
    train_state = fresh_state()
    pointers = [
        leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(with_plain_key(train_state))
    ]
    assert len(set(pointers)) == len(pointers)
    assert train_state.step == 0
    assert train_state.step.dtype == jnp.int32


def test_a_chunk_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="task chunk 3 must divide the task batch 4"):
        outer_step(task_chunk=3)


def test_devices_that_do_not_divide_the_chunk_are_refused():
    class TwoDevices:
        size = 2

    with pytest.raises(ValueError, match="2 devices must divide the task chunk 1"):
        outer_step(task_chunk=1, mesh=TwoDevices())


def test_one_device_needs_no_mesh():
    assert task_mesh(4, jax.devices()[:1]) is None
    expected = (1, 4) if jax.default_backend() == "cpu" else (8, 8)
    assert (default_task_chunk(8), default_task_chunk(8, devices=4)) == expected


EIGHT_DEVICES = """
import json
import jax, jax.numpy as jnp, numpy as np, optax
from meta_jax.core import Aux
from meta_jax.data.dataset import ImageDataset
from meta_jax.data.episodes import EpisodeSpec, sample_episode
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.conv4 import strided_conv4
from meta_jax.networks.mlp import mlp
from meta_jax.optimization_based.maml import maml
from meta_jax.training.outer_step import init_train_state, make_outer_step, make_run, task_mesh

jax.config.update("jax_disable_most_optimizations", True)
images = np.random.default_rng(0).integers(0, 256, (8, 4, 6, 6, 1), np.uint8)
data = ImageDataset(jnp.asarray(images), jnp.full(8, 4, jnp.int32), jnp.zeros(8, jnp.int32))
sampler = lambda key, data: sample_episode(key, data, EpisodeSpec(4, 1, 3, "per_class"))
optimizer = optax.adam(1e-2)
def shared(mesh):
    return prototypical(strided_conv4(2, batch_norm="running", mesh=mesh))

def unshared(learner):
    return lambda mesh: learner

# One state for each task: how many it has seen, and the last one's first image, summed up.
def counting_loss(params, state, episode, key):
    loss, aux = shared(None).loss(params, state["network"], episode, key)
    seen = {"tasks": state["tasks"] + 1, "ink": state["ink"] + episode.support.x[0].sum()}
    return loss * (1 + state["ink"]), Aux({"network": aux.state, **seen}, aux.metrics)

def counting_init(key, episode):
    params, network = shared(None).init(key, episode)
    return params, {"network": network, "tasks": jnp.zeros((), int), "ink": jnp.zeros(())}

counting = shared(None)._replace(init=counting_init, loss=counting_loss, state_scope="task")

# Name: (the learner of a mesh, tasks in a step, task chunk). The last one's 16 images
# are shared, not its one task.
learners = {
    "prototypical": (unshared(shared(None)), 8, None),
    "maml": (unshared(maml(mlp((8,)), inner_lr=0.5, steps=2)), 16, 8),
    "state of a task": (unshared(counting), 16, 8),
    "images": (shared, 1, None),
}
def largest(a, b):
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), a, b)
    return max(jax.tree.leaves(gaps))

results = {"devices": jax.device_count()}
for name, (learner_of, batch, chunk) in learners.items():
    ends = []
    for devices in (jax.devices()[:1], jax.devices()):
        learner, mesh = learner_of(task_mesh(8, devices)), task_mesh(batch, devices)
        step = make_outer_step(
            learner, optimizer, sampler, task_batch=batch, task_chunk=chunk, mesh=mesh
        )
        train_state = init_train_state(learner, optimizer, sampler, data, 0, task_batch=batch)
        start = jax.tree.map(np.asarray, train_state.params)
        run = make_run(step).lower(train_state, data, 20).compile()
        train_state, metrics, finite = run(train_state, data, 20)
        assert finite
        ends.append(jax.tree.map(np.asarray, (train_state.params, train_state.state, metrics)))
    results[name] = {
        "apart": largest(*ends),
        "moved": largest(ends[0][0], start),
        "shared": "all-reduce" in run.as_text(),
    }
try:
    make_outer_step(learner, optimizer, sampler, task_batch=8, task_chunk=4, mesh=task_mesh(8))
except ValueError as error:
    results["refused"] = str(error)
print(json.dumps(results))
"""


def test_eight_devices_train_as_one_does():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["devices"] == 8
    for name in ("prototypical", "maml", "state of a task", "images"):
        assert results[name]["apart"] < 1e-9, results
        assert results[name]["moved"] > 1e-2, results
        assert results[name]["shared"], results
    assert results["refused"] == "8 devices must divide the task chunk 4"


def test_tasks_that_come_from_no_data():
    def draw(key, data):
        del data
        return sample_sinusoid(key, 5, 5)

    learner = prototypical(mlp((3,)))._replace(
        loss=lambda params, state, episode, key: ((episode.query.y**2).mean(), Aux(state, {}))
    )
    step = make_outer_step(learner, OPTIMIZER, draw, task_batch=2)
    train_state = init_train_state(learner, OPTIMIZER, draw, (), 0)
    _, metrics = jax.jit(step)(train_state, ())
    assert metrics["loss"] > 0
