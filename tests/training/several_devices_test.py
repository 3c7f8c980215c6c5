"""Several devices train as one does, in a process that has eight of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

EIGHT_DEVICES = """
import json
import jax, jax.numpy as jnp, numpy as np, optax
from meta_jax.core import LossAux, Tasks
from meta_jax.data.dataset import Storage, dataset_from_classes
from meta_jax.data.episodes import EpisodeSampler, EpisodeSpec, draw_episode, sample_episode
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.conv4 import strided_conv4
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy
from meta_jax.data.source import EpisodeSize
from meta_jax.data.streams import key_bits
from meta_jax.optimization_based.maml import maml
from meta_jax.reinforcement import bandit, rl2, source_from_environment
from meta_jax.training.outer_step import (
    init_train_state,
    make_outer_step,
    training_data,
    task_mesh,
)
from meta_jax.training.train_loop import make_train_loop
from tests.checkers import key_and_leak_checks

jax.config.update("jax_disable_most_optimizations", True)
classes = np.random.default_rng(0).integers(0, 256, (8, 4, 6, 6, 1), np.uint8)
data, on_host = (dataset_from_classes(classes, storage=Storage(s)) for s in ("device", "host"))
sample = lambda key, data: sample_episode(key, data, EpisodeSpec(4, 1, 3, "per_class"))
optimizer = optax.adam(1e-2)
def shared(mesh):
    return prototypical(strided_conv4(2, normalisation="running", mesh=mesh))

small = prototypical(mlp((8,)))

def unshared(learner):
    return lambda mesh: learner

# One state for each task: how many it has seen, and the last one's first image, summed up.
def counting_loss(params, state, episode, key):
    loss, aux = small.loss(params, state["network"], episode, key)
    seen = {"tasks": state["tasks"] + 1, "ink": state["ink"] + episode.support.x[0].sum()}
    return loss * (1 + state["ink"]), LossAux({"network": aux.state, **seen}, aux.metrics)

def counting_init(key, episode):
    params, network = small.init(key, episode)
    return params, {"network": network, "tasks": jnp.zeros((), int), "ink": jnp.zeros(())}

counting = small._replace(init=counting_init, loss=counting_loss, state_scope="task")

# A shared state: how many steps there were, and the mean of the tasks' first images.
def averaging_loss(params, state, episode, key):
    loss, aux = small.loss(params, state["network"], episode, key)
    seen = {"steps": state["steps"] + 1, "ink": episode.support.x[0].sum()}
    return loss, LossAux({"network": aux.state, **seen}, aux.metrics)

def averaging_init(key, episode):
    params, network = small.init(key, episode)
    return params, {"network": network, "steps": jnp.zeros((), jnp.int32), "ink": jnp.zeros(())}

averaging = small._replace(init=averaging_init, loss=averaging_loss)

# Name: (the learner of a mesh, its tasks, tasks in a step, task chunk). The images of the last two
# are shared, not their one task: 2 on each device, or 3 on six devices, 2 on one and none on one.
episodes = Tasks(sample, data, cross_entropy)
spec_of_20 = EpisodeSpec(5, 1, 3, "per_class")
twenty = Tasks(lambda key, data: sample_episode(key, data, spec_of_20), data, cross_entropy)
pulls = source_from_environment(bandit(arms=2, pulls=3)).tasks(
    "train", EpisodeSize(1, 1, 1), train=True
)
streamed = Tasks(EpisodeSampler(draw_episode, EpisodeSpec(4, 1, 3)), on_host, cross_entropy)
learners = {
    "streamed": (unshared(small), streamed, 8, None),
    "shared state": (unshared(averaging), episodes, 8, None),
    "maml": (unshared(maml(mlp((8,)), inner_lr=0.5, steps=2)), episodes, 8, 1),
    "state of a task": (unshared(counting), episodes, 16, 8),
    "ppo": (unshared(rl2(hidden_size=4, epochs=1, minibatches=2)), pulls, 16, None),
    "images": (shared, episodes, 1, None),
    "uneven images": (shared, twenty, 1, None),
}
def largest(a, b):
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), a, b)
    return max(jax.tree.leaves(gaps))

results = {"devices": jax.device_count()}
for name, (learner_of, tasks, batch, chunk) in learners.items():
    ends = []
    for devices in (jax.devices()[:1], jax.devices()):
        learner, mesh = learner_of(task_mesh(8, devices)), task_mesh(batch, devices)
        step = make_outer_step(
            learner, optimizer, tasks.sample, task_batch=batch, task_chunk=chunk, mesh=mesh
        )
        train_state = init_train_state(learner, optimizer, tasks, 0, task_batch=batch)
        start = jax.tree.map(np.asarray, train_state.params)
        loop = make_train_loop(step)
        drawn_from = tasks.data
        if drawn_from is on_host:
            stream = training_data(tasks, task_batch=batch, mesh=mesh)
            drawn_from = stream.at(key_bits(train_state.key), 0)[1]
            shares = {shard.data.shape[1] for shard in drawn_from.data.examples.addressable_shards}
            assert shares == {batch // len(devices)}, shares
        arguments = loop.arguments(train_state, drawn_from, 5)
        run = loop.lower(*arguments).compile()
        train_state, metrics, finite = run(*arguments)
        assert finite
        ends.append(jax.tree.map(np.asarray, (train_state.params, train_state.state, metrics)))
    results[name] = {
        "apart": largest(*ends),
        "moved": largest(ends[0][0], start),
        "shared": "all-reduce" in run.as_text(),
    }
print(json.dumps(results))
"""


def test_eight_devices_train_as_one_does():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
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
    assert len(results) == 8
    for name in results.keys() - {"devices"}:
        assert results[name]["apart"] < 1e-9, results
        assert results[name]["moved"] > 1e-2, results
        assert results[name]["shared"], results
