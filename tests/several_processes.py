"""Runs of several processes on this machine, over loopback, against the same run of one.

    python -m tests.several_processes

1, 2 and 4 processes train Prototypical Networks, MAML and Reptile for 20 outer steps in double
precision; then 2 processes are killed in the middle, and 1, 2 and 4 go on. What is printed is the
largest difference of any parameter from the run of one process. Exit status 1 if one is above 1e-9.
"""

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meta_jax.core import Batch, Episode, Tasks
from meta_jax.data.dataset import Storage, dataset_from_classes
from meta_jax.data.episodes import EpisodeSampler, EpisodeSpec, draw_episode
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy
from meta_jax.optimization_based.maml import maml
from meta_jax.optimization_based.reptile import reptile
from meta_jax.training import checkpoints
from meta_jax.training.evaluation import make_validate
from meta_jax.training.loop import FitResult, LoopConfig, fit
from meta_jax.training.outer_step import (
    init_train_state,
    make_outer_step,
    place,
    task_mesh,
    training_data,
)
from meta_jax.training.train_loop import make_train_loop

LEARNERS = {"prototypical": prototypical, "maml": maml, "reptile": reptile}
LEARNERS["streamed"] = prototypical  # with its examples on the host
STEPS, TASK_BATCH, EPISODES = 20, 4, 4
ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-9


def sample(key, data):
    """An episode of 3 classes: points around means that the data hold."""
    means_key, noise_key = jax.random.split(key)
    means = data[jax.random.choice(means_key, len(data), (3,), replace=False)]
    x = jnp.tile(means, (3, 1)) + 0.3 * jax.random.normal(noise_key, (9, 4))
    y = jnp.tile(jnp.eye(3, dtype=x.dtype), (3, 1))
    return Episode(Batch(x[:3], y[:3]), Batch(x[3:], y[3:]))


def streamed_tasks() -> Tasks:
    """Tasks whose examples stay on the host: 5 of each of 7 classes."""
    means, noise = (np.random.default_rng(k).normal(size=(7, 5, 4)) for k in range(2))
    data = dataset_from_classes([*(means[:, :1] + 0.3 * noise)], storage=Storage("host"))
    return Tasks(EpisodeSampler(draw_episode, EpisodeSpec(3, 1, 2)), data, cross_entropy)


def train(workdir: Path, name: str, *, during=lambda step: None, say=print) -> FitResult:
    """Trains on all devices of all processes; `during` is called with the step before each call."""
    learner = LEARNERS[name](mlp((8,)))
    tasks = Tasks(sample, jax.random.normal(jax.random.key(1), (7, 4)), cross_entropy)
    if name == "streamed":
        tasks = streamed_tasks()
    optimizer, mesh = optax.adam(1e-2), task_mesh(TASK_BATCH)
    step = make_outer_step(learner, optimizer, tasks.sample, task_batch=TASK_BATCH, mesh=mesh)
    start = init_train_state(learner, optimizer, tasks, 0)
    data = training_data(tasks, task_batch=TASK_BATCH, mesh=mesh)
    if mesh is not None:
        start, data = place(start, data, mesh)
    loop = make_train_loop(step)

    def train_loop(train_state, *arguments):
        during(int(train_state.step))
        return loop(train_state, *arguments)

    return fit(
        start,
        train_loop,
        data,
        config=LoopConfig(STEPS, log_every=2, eval_every=10, checkpoint_every=4),
        workdir=workdir,
        tasks_per_step=TASK_BATCH,
        validate=make_validate(learner, tasks, episodes=EPISODES, mesh=task_mesh(EPISODES)),
        objective=cross_entropy,
        learner_config=learner.config,
        say=say,
    )


def send(number: int, at: int, step: int) -> None:
    """Sends this process a signal at a step."""
    if step == at:
        os.kill(os.getpid(), number)


def work(arguments: list[str]) -> None:
    """What one of several processes does."""
    address, count, process, workdir, name, killed_at = arguments
    jax.distributed.initialize(address, int(count), int(process))
    if killed_at == "never":
        assert train(Path(workdir), name).finished
        return
    # The last process alone is told to stop; all save, go on from there, and are killed.
    told = process == str(int(count) - 1)
    stop = functools.partial(send, signal.SIGTERM, 6) if told else lambda step: None
    stopped = train(Path(workdir), name, during=stop)
    assert not stopped.finished and int(stopped.train_state.step) < int(killed_at)
    train(Path(workdir), name, during=functools.partial(send, signal.SIGKILL, int(killed_at)))


def start(count: int, workdir: Path, name: str, *, killed_at: int | None = None) -> None:
    """Runs several processes to their end, or to their death at a step.

    Raises:
      RuntimeError: one of them ended otherwise.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        **{"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "true", "JAX_NUM_CPU_DEVICES": "1"},
        **{"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
    }
    run = [f"127.0.0.1:{port}", str(count)]
    those = [str(workdir), name, str(killed_at or "never")]
    with tempfile.TemporaryFile("w+") as said:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.several_processes", *run, str(process), *those],
                cwd=ROOT,
                env=environment,
                stdout=said,
                stderr=said,
            )
            for process in range(count)
        ]
        statuses = [process.wait() for process in started]
        said.seek(0)
        if set(statuses) != {0 if killed_at is None else -signal.SIGKILL}:
            raise RuntimeError(f"{count} processes ended with {statuses}:\n{said.read()}")


def parameters(workdir: Path) -> np.ndarray:
    """All parameters of the last step, [n] in double precision."""
    contents, _ = checkpoints.read_latest(workdir / "checkpoints")
    assert contents.metadata["step"] == STEPS
    leaves = [np.ravel(v) for name, v in contents.leaves.items() if name.startswith("params/")]
    return np.concatenate(leaves)


def main() -> int:
    """Prints a line for each run, and gives the exit status."""
    jax.config.update("jax_enable_x64", True)
    largest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in LEARNERS:
            ends = {}
            for count in (1, 2, 4):
                whole, killed = (Path(folder, f"{name}_{count}{kind}") for kind in ("", "_killed"))
                start(count, whole, name)
                ends[f"{count} processes"] = parameters(whole)
                start(2, killed, name, killed_at=12)
                start(count, killed, name)
                ends[f"2 processes, killed, then {count}"] = parameters(killed)
            for what, end in ends.items():
                apart = np.abs(end - ends["1 processes"]).max()
                largest = max(largest, apart)
                print(f"{name}: {what}: {apart:.1e}", flush=True)
    return int(largest > TOLERANCE)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1:])
    else:
        sys.exit(main())
