"""Peak memory and time of a meta-gradient against inner steps, for every adjoint, as a table.

python -m experiments.benchmark_adjoints
"""

import time

import jax
import jax.numpy as jnp
from absl import flags

from experiments.command_line import run_main
from meta_jax.core import Batch, Episode
from meta_jax.networks.conv4 import strided_conv4
from meta_jax.optimization_based.adjoints import ADJOINTS, implicit, truncated
from meta_jax.optimization_based.imaml import imaml

FLAGS = flags.FLAGS
flags.DEFINE_list("inner_steps", ["1", "10", "50"], "Numbers of inner steps.")
flags.DEFINE_integer("repeats", 3, "Timed runs of each, of which the fastest counts.", 1)
_WAYS, _QUERIES = 5, 5


def main(arguments: list[str]) -> None:
    """Prints a line for each adjoint: MiB of temporaries and milliseconds by number of steps."""
    del arguments
    counts = [int(steps) for steps in FLAGS.inner_steps]
    print(f"| adjoint | {' | '.join(f'{n} steps' for n in counts)} |")
    print(f"|---|{'---|' * len(counts)}")
    # The convolutions have no forward derivative, which the mixed mode takes.
    general = {name: adjoint for name, adjoint in ADJOINTS.items() if name != "mixed_mode"}
    for name, adjoint in {
        **general,
        "truncated (1)": truncated(1),
        "implicit": implicit(),
    }.items():
        cells = []
        for steps in counts:
            # One problem for all: only with a proximal term there is an implicit gradient.
            learner = imaml(
                strided_conv4(), inner_lr=0.1, proximity=0.5, steps=steps, adjoint=adjoint
            )
            cells.append("{:.0f} MiB / {:.0f} ms".format(*_measure(learner)))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _measure(learner: object) -> tuple[float, float]:
    """MiB of temporaries and milliseconds of one task's meta-gradient."""
    keys = jax.random.split(jax.random.key(0), 3)
    episode = Episode(
        *(
            Batch(jax.random.uniform(key, (n * _WAYS, 28, 28, 1)), jnp.tile(jnp.eye(_WAYS), (n, 1)))
            for key, n in zip(keys[:2], (1, _QUERIES), strict=True)
        )
    )
    params, state = jax.jit(learner.init)(keys[2], episode)
    gradient = jax.jit(jax.grad(lambda *a: learner.loss(*a)[0]))
    compiled = gradient.lower(params, state, episode, keys[2]).compile()
    seconds = []
    for _ in range(1 + FLAGS.repeats):  # the first run is not timed
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, state, episode, keys[2]))
        seconds.append(time.perf_counter() - start)
    return compiled.memory_analysis().temp_size_in_bytes / 2**20, 1e3 * min(seconds[1:])


if __name__ == "__main__":
    run_main(main)
