"""Memory, time and compilation of a meta-gradient by inner steps, a table of all adjoints.

python -m experiments.benchmark_adjoints
"""

import time

import jax
import jax.numpy as jnp
from absl import flags

from experiments.command_line import run_main
from meta_jax.core import Batch, Episode, MetaLearner
from meta_jax.networks.conv4 import strided_conv4
from meta_jax.optimization_based.imaml import imaml

FLAGS = flags.FLAGS
flags.DEFINE_list("inner_steps", ["1", "10", "50"], "Numbers of inner steps.")
flags.DEFINE_integer("repeats", 3, "Timed runs of each, of which the fastest counts.", 1)
_WAYS, _QUERIES = 5, 5
# But 'mixed_mode': it takes forward derivatives, and the convolutions have none.
_ADJOINTS = ("unrolled", "checkpointed", "first_order", "truncated:1", "implicit")


def main(arguments: list[str]) -> None:
    """A line for each adjoint: MiB of temporaries, milliseconds and seconds of compilation."""
    del arguments
    jax.config.update("jax_enable_compilation_cache", False)
    counts = [int(steps) for steps in FLAGS.inner_steps]
    print(f"| adjoint | {' | '.join(f'{n} steps' for n in counts)} |")
    print(f"|---|{'---|' * len(counts)}")
    for name in _ADJOINTS:
        cells = []
        for steps in counts:
            # One problem for all: only with a proximal term there is an implicit gradient.
            learner = imaml(strided_conv4(), inner_lr=0.1, proximity=0.5, steps=steps, adjoint=name)
            cells.append("{:.0f} MiB / {:.0f} ms / {:.1f} s".format(*_measure(learner)))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _measure(learner: MetaLearner) -> tuple[float, float, float]:
    """MiB of temporaries, milliseconds and seconds of compilation of one task's meta-gradient."""
    keys = jax.random.split(jax.random.key(0), 3)
    episode = Episode(
        *(
            Batch(jax.random.uniform(key, (n * _WAYS, 28, 28, 1)), jnp.tile(jnp.eye(_WAYS), (n, 1)))
            for key, n in zip(keys[:2], (1, _QUERIES), strict=True)
        )
    )
    params, state = jax.jit(learner.init)(keys[2], episode)
    gradient = jax.jit(jax.grad(lambda *a: learner.loss(*a)[0]))
    lowered = gradient.lower(params, state, episode, keys[2])
    start = time.perf_counter()
    compiled = lowered.compile()
    compilation, seconds = time.perf_counter() - start, []
    for _ in range(1 + FLAGS.repeats):  # the first run is not timed
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, state, episode, keys[2]))
        seconds.append(time.perf_counter() - start)
    memory = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0) / 2**20
    return memory, 1e3 * min(seconds[1:]), compilation


if __name__ == "__main__":
    run_main(main)
