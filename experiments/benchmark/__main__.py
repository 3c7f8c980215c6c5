"""Times whole training steps, beside PyTorch's libraries where they are installed.

    python -m experiments.benchmark
    python -m experiments.benchmark --works=maml_second_order_1step,prototypical_60way
    python -m experiments.benchmark --works=prototypical_60way --profile=runs/profile

With requirements-benchmark.txt installed the peers run too: gradients are compared on the same
weights and tasks first, then whole steps are timed in alternation. Nothing else should compute on
the machine meanwhile. Writes results/benchmark_cpu.json (or _gpu, _tpu), and from the former two
the tables of speed of docs/results.md; with --output only the file named there.
"""

import gc
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import ledger
from experiments.benchmark import measure, report, works
from experiments.benchmark.works import Work
from experiments.command_line import run_main
from meta_jax.data.dataset import Dataset
from meta_jax.data.glyphs import load_glyphs
from meta_jax.lookup import UsageError
from meta_jax.training.outer_step import (
    init_train_state,
    make_outer_step,
    place,
    task_mesh,
)
from meta_jax.training.train_loop import make_train_loop
from meta_jax.training.writers import write_text

FLAGS = flags.FLAGS
flags.DEFINE_list("works", [], "Which works; all by default.")
flags.DEFINE_integer("rounds", 9, "Alternating rounds.", 3)
flags.DEFINE_bool("peers", True, "Whether PyTorch's libraries run too, where installed.")
flags.DEFINE_bool("scaling", True, "Whether to vary the numbers of tasks and of inner steps.")
flags.DEFINE_string("profile", None, "Folder for a trace of each work, instead of timings.")
flags.DEFINE_string("output", None, "Where to write; default: results/benchmark_BACKEND.json.")

_TASKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_INNER_STEPS = (1, 2, 5, 10, 20, 50)
_TOLERANCE = 0.02  # of a gradient, relative; in float32 some ReLUs turn
_STEPS = 4  # in one timed call; training makes many in a call
_SAMPLINGS = 20  # in one call, whose overhead must not count


class Ours(NamedTuple):
    """Our side of a work, compiled."""

    steps: Callable[[], None]  # `_STEPS` whole training steps
    sampling: Callable[[], None]  # the drawing of `_SAMPLINGS` steps' tasks
    compiled: measure.Compiled


def main(arguments: list[str]) -> None:
    """Measures, prints as it goes, writes the figures."""
    del arguments
    data = load_glyphs().datasets["train"]
    known = works.works(data)
    unknown = set(FLAGS.works) - set(known)
    if unknown:
        raise UsageError(f"unknown works {sorted(unknown)}: choose among {', '.join(known)}")
    chosen = {name: known[name] for name in FLAGS.works or known}
    if FLAGS.profile:
        _profile(chosen, Path(FLAGS.profile))
        return
    peers = FLAGS.peers and _peers_installed()
    packages = ["jax", "jaxlib", *(["torch", "torchopt", "higher"] if peers else [])]
    backend = jax.default_backend()
    ceiling = measure.matmul_ceiling()
    found: dict[str, Any] = {
        "machine": ledger.machine(),
        "versions": ledger.versions(*packages),
        "command": " ".join(["python -m experiments.benchmark", *sys.argv[1:]]),
        "matmul_gflops": _best_gflops(ceiling),
        "rows": [],
    }
    print(f"{found['machine']}, matrix products {found['matmul_gflops']} GFLOP/s")
    for name, work in chosen.items():
        with tempfile.TemporaryDirectory() as cache:
            found["rows"].append(_row(name, work, ceiling, peers, cache))
        gc.collect()
    if FLAGS.scaling:
        found["scaling"] = _scaling(data)
    output = FLAGS.output or ledger.ROOT / "results" / f"benchmark_{backend}.json"
    write_text(Path(output), json.dumps(found, indent=1) + "\n")
    place = {"cpu": ledger.SPEED, "gpu": ledger.GPU_SPEED}.get(backend)
    if place and not FLAGS.output:
        ledger.write_table(place, report.table(found))


def _best_gflops(ceiling: measure.Ceiling) -> int:
    times = measure.alternate({"ceiling": ceiling.run}, FLAGS.rounds)["ceiling"]
    return round(ceiling.flop / min(times) / 1e6)


def _peers_installed() -> bool:
    missing = [p for p in ("torch", "torchopt", "higher") if importlib.util.find_spec(p) is None]
    if missing:
        print(
            f"without the peers: {', '.join(missing)} of requirements-benchmark.txt not installed"
        )
    return not missing


def _program(work: Work) -> tuple[Callable, tuple]:
    """Whole steps as `experiments.train` runs them, and their arguments."""
    optimizer, tasks, task_batch = works.optimizer(), work.tasks, work.task_batch
    mesh = task_mesh(task_batch)
    step = make_outer_step(work.learner, optimizer, tasks.sample, task_batch=task_batch, mesh=mesh)
    start, data = init_train_state(work.learner, optimizer, tasks, 0), tasks.data
    devices = mesh or (task_mesh(jax.device_count()) if task_batch == 1 else None)
    if devices is not None:
        start, data = place(start, data, devices)
    loop = make_train_loop(step)
    return loop, loop.arguments(start, data, np.int32(0))


def _ours(work: Work, cache: str | None = None) -> Ours:
    """Compiled from nothing; the program is left in a cache, where one is given."""
    run, arguments = _program(work)
    start, data, _, so_far = arguments
    with measure.compilation_cache(cache):
        compiled = measure.compile_timed(run, *arguments)
    carry = [start]

    def steps() -> None:
        carry[0], metrics, _ = compiled.call(carry[0], data, np.int32(_STEPS), so_far)
        jax.block_until_ready(metrics)

    @jax.jit
    def draw(key: jax.Array, data: object) -> jax.Array:
        def body(total: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            # As in a step, every value is used, and no task outlives its turn.
            drawn = work.tasks.sample(key, data)
            return total + sum(leaf.sum() for leaf in jax.tree.leaves(drawn)), None

        return jax.lax.scan(
            body, jnp.zeros(()), jax.random.split(key, _SAMPLINGS * work.task_batch)
        )[0]

    key = jax.random.key(0)
    return Ours(steps, lambda: draw(key, work.tasks.data).block_until_ready(), compiled)


def _row(name: str, work: Work, ceiling: measure.Ceiling, peers: bool, cache: str) -> dict:
    ours = _ours(work, cache)
    # The ceiling stands beside what it limits: both slow down where the machine does.
    contenders = {"ceiling": _several(ceiling.run), "ours": ours.steps}
    agreement = {}
    if peers:
        theirs, agreement = _agreeing_peers(work) if work.rl2 is None else _agreeing_policy(work)
        contenders |= {peer: _several(made.step, made.wait) for peer, made in theirs.items()}
    times = _step_times(contenders, FLAGS.rounds)
    floors = [time * work.flop / ceiling.flop for time in times.pop("ceiling")]
    shares = [floor / mine for floor, mine in zip(floors, times["ours"], strict=True)]
    sampling = measure.alternate({"draw": ours.sampling}, FLAGS.rounds)["draw"]
    spreads = {contender: measure.spread(values) for contender, values in times.items()}
    row: dict[str, Any] = {
        "work": name,
        "ours_ms": spreads["ours"],
        "peers_ms": {peer: spreads[peer] for peer in times if peer != "ours"},
        "peers_gradient_difference": agreement,
        "ratio_to_fastest_peer": None,
        "floor_ms": measure.spread(floors),
        "share_of_ceiling": measure.spread(shares),
        "tasks_per_second": float(f"{1000 * work.task_batch / spreads['ours']['median']:.4g}"),
        "sampling_ms": float(f"{np.median(sampling) / _SAMPLINGS:.3g}"),
        "peak_mib": round(ours.compiled.peak_mib, 1),
        "compile_s": round(ours.compiled.seconds, 2),
        "compile_cached_s": round(_cached_compile_seconds(work, cache), 2),
    }
    print(
        f"{name}: {spreads['ours']['median']} ms, {row['tasks_per_second']} tasks/s, "
        f"{row['share_of_ceiling']['median']:.0%} of the ceiling, "
        f"sampling {row['sampling_ms']} ms, peak {row['peak_mib']} MiB, "
        f"compiled in {row['compile_s']} s ({row['compile_cached_s']} s from the cache)"
    )
    if row["peers_ms"]:
        fastest = min(row["peers_ms"], key=lambda peer: row["peers_ms"][peer]["median"])
        pairs = zip(times[fastest], times["ours"], strict=True)
        row["fastest_peer"] = fastest
        row["ratio_to_fastest_peer"] = measure.spread([peer / mine for peer, mine in pairs])
        for peer, values in row["peers_ms"].items():
            print(f"  {peer}: {values} ms, gradient within {agreement[peer]}")
        print(f"  {fastest} / ours: {row['ratio_to_fastest_peer']}")
    return row


def _several(
    step: Callable[[], None], wait: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(_STEPS):
            step()
        wait()

    return steps


def _step_times(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step in every round."""
    times = measure.alternate(contenders, rounds)
    return {name: [value / _STEPS for value in values] for name, values in times.items()}


def _agreeing_peers(work: Work) -> tuple[dict, dict[str, float]]:
    """The peers, and how far their gradients on the same tasks and weights are from ours.

    Raises:
      RuntimeError: further than float32 explains, so that the times would mean nothing.
    """
    from experiments.benchmark import peers

    start = init_train_state(work.learner, works.optimizer(), work.tasks, 0)
    episodes = works.parity_episodes(work)
    key = jax.random.key(0)
    gradient = jax.jit(
        jax.grad(lambda params, episode: work.learner.loss(params, start.state, episode, key)[0])
    )
    with jax.default_matmul_precision("float32"):  # a GPU would round to TF32, for speed
        each = [gradient(start.params, episode) for episode in episodes]
    ours = peers.named_arrays(work, jax.tree.map(lambda *leaves: np.mean(leaves, 0), *each))
    # Batch norm cancels the biases before it: their gradients are rounding errors, which an inner
    # Adam would make as large as any.
    ours = {name: g for name, g in ours.items() if not re.fullmatch(r"convs\.\d\.bias", name)}
    seen = peers.tasks_of(work, [works.as_seen(work, episode, key) for episode in episodes])
    size = np.sqrt(sum((g**2).sum() for g in ours.values()))
    theirs, differences = peers.peers(work, start.params), {}
    for name, peer in theirs.items():
        found = peer.gradient(seen)
        distance = np.sqrt(sum(((g - found[k]) ** 2).sum() for k, g in ours.items()))
        differences[name] = float(f"{distance / size:.2g}")
        if not distance <= _TOLERANCE * size:
            raise RuntimeError(f"{name} has another gradient: {differences[name]} relative")
    return theirs, differences


def _agreeing_policy(work: Work) -> tuple[dict, dict[str, float]]:
    """The peer of RL^2, and how far its gradient on the same trials is from ours.

    Raises:
      RuntimeError: further than float32 explains.
    """
    from experiments.benchmark import trial_peers

    assert work.rl2 is not None
    params = init_train_state(work.learner, works.optimizer(), work.tasks, 0).params
    experience, gradient = works.trials_and_gradient(work.rl2, work.tasks, params)
    ours = trial_peers.named_arrays(gradient)
    peer = trial_peers.peer(work.rl2, params)
    found = peer.gradient(experience)
    size = np.sqrt(sum((g**2).sum() for g in ours.values()))
    distance = np.sqrt(sum(((g - found[k][-len(g) :]) ** 2).sum() for k, g in ours.items()))
    if not distance <= _TOLERANCE * size:
        raise RuntimeError(f"torch has another gradient: {distance / size:.2g} relative")
    return {"torch": peer}, {"torch": float(f"{distance / size:.2g}")}


def _cached_compile_seconds(work: Work, cache: str) -> float:
    """Tracing, lowering and fetching a program from the persistent cache that it was left in."""
    run, arguments = _program(work)
    jax.clear_caches()
    with measure.compilation_cache(cache):
        return measure.compile_timed(run, *arguments).seconds


def _scaling(data: Dataset) -> dict[str, list[dict]]:
    """Second-order MAML over numbers of tasks and of inner steps."""
    found: dict[str, list[dict]] = {}
    for name, values in (("task_batch", _TASKS), ("inner_steps", _INNER_STEPS)):
        found[name] = []
        for value in values:
            sizes = {"task_batch": 8, "inner_steps": 1} | {name: value}
            tasks, steps = sizes["task_batch"], sizes["inner_steps"]
            ours = _ours(works.image_maml(data, task_batch=tasks, inner_steps=steps))
            times = _step_times({"ours": ours.steps}, 3)["ours"]
            found[name].append(
                {
                    name: value,
                    "ours_ms": measure.spread(times),
                    "ms_per_task": float(f"{np.median(times) / tasks:.4g}"),
                    "peak_mib": round(ours.compiled.peak_mib, 1),
                    "compile_s": round(ours.compiled.seconds, 2),
                }
            )
            print(f"maml_second_order: {found[name][-1]}")
    return found


def _profile(chosen: dict[str, Work], folder: Path) -> None:
    """Some steps of each work as a trace that TensorBoard's profiler opens."""
    for name, work in chosen.items():
        ours = _ours(work)
        ours.steps()
        with jax.profiler.trace(str(folder / name)):
            ours.steps()
        print(f"{name}: {folder / name}")


if __name__ == "__main__":
    run_main(main)
