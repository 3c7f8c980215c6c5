"""Episodes a second of training with the examples on the device, and on the host.

python -m experiments.benchmark_streams --tasks=glyphs --task_batch=8
"""

import statistics
from collections.abc import Callable

import jax
from absl import flags

from experiments import run_flags, runs, train
from experiments.benchmark.measure import alternate
from experiments.command_line import run_main
from experiments.testing import Asked
from meta_jax.lookup import UsageError

FLAGS = flags.FLAGS
run_flags.define_run_flags(FLAGS)
flags.DEFINE_string("data_dir", None, "Folder where Omniglot or the prepared TFDS sets lie.")
flags.DEFINE_integer("rounds", 10, "Timed calls of each, of which the median counts.", 1)
flags.DEFINE_integer("call_steps", 20, "Outer steps of a call.", 1)
_PLACEMENT = "tasks.placement"


def main(arguments: list[str]) -> None:
    """A line for each placement; both are timed in turn."""
    del arguments
    if _PLACEMENT not in FLAGS:
        raise UsageError(f"{run_flags.tasks_name(FLAGS)} has no placement: choose other tasks")
    calls = {placement: training(placement) for placement in ("device", "host")}
    print("| placement | episodes a second |")
    print("|---|---|")
    for placement, times in alternate(calls, FLAGS.rounds).items():
        episodes = FLAGS.call_steps * FLAGS.task_batch
        print(f"| {placement} | {episodes / statistics.median(times) * 1e3:.0f} |")


def training(placement: str) -> Callable[[], None]:
    """A function that trains for some more steps, with the examples on the device or the host."""
    flag = FLAGS[_PLACEMENT]
    flag.value, flag.present = placement, 1
    program = train.build_program(runs.build_run(FLAGS, runs.load_tasks(FLAGS)), Asked())
    state = program.start

    def call() -> None:
        nonlocal state
        state, _, _ = program.train_loop(state, program.data, FLAGS.call_steps)
        jax.block_until_ready(state.params)

    return call


if __name__ == "__main__":
    run_main(main, selections=run_flags.SELECTIONS, choose=run_flags.choose)
