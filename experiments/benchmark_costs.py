"""Memory and time of the shipped classifiers on a 5-way 1-shot task with 75 queries.

    python -m experiments.benchmark_costs

Nothing else should compute on the machine meanwhile. Writes results/costs.json, of which
`docs/choose.md` makes its table; with --output only the file named there.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from experiments import ledger
from experiments.benchmark import measure
from experiments.command_line import run_main
from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.training.record import task_like
from meta_jax.training.trained import Trained, load
from meta_jax.training.writers import write_text

FLAGS = flags.FLAGS
COSTS = ledger.ROOT / "results" / "costs.json"
flags.DEFINE_list("weights", [], "Names in results/weights; all with a 5-way 1-shot row if empty.")
flags.DEFINE_integer("rounds", 9, "Timed calls of each, of which the median counts.", 1)
flags.DEFINE_string("output", str(COSTS), "File to write, as JSON.")
_WAYS, _QUERIES = 5, 15


class Cost(NamedTuple):
    """What a method costs on one task.

    Attributes:
      memory_mib: Arguments, results and temporaries of the gradient of its loss, as in training.
      adapt_ms: Time to adapt to the support set.
      query_ms: Time to answer a query, of 75 that are asked together.
    """

    memory_mib: float
    adapt_ms: float
    query_ms: float


def main(arguments: list[str]) -> None:
    """Prints a line for each model, then writes all."""
    del arguments
    costs = {}
    for name in FLAGS.weights or classifiers(ledger.read()):
        costs[name] = cost(load(ledger.ROOT / "results" / "weights" / name), FLAGS.rounds)
        print(f"{name}: " + "{:.1f} MiB, {:.2f} ms, {:.3f} ms".format(*costs[name]), flush=True)
    found = {
        "command": "python -m experiments.benchmark_costs",
        "machine": ledger.machine(),
        "versions": ledger.versions("jax", "jaxlib"),
        "costs": {
            name: {field: float(f"{value:.3g}") for field, value in each._asdict().items()}
            for name, each in costs.items()
        },
    }
    write_text(Path(FLAGS.output), json.dumps(found, indent=1) + "\n")


def classifiers(rows: list[dict]) -> list[str]:
    """Names of the weights that were tested on 5-way 1-shot tasks, but the untrained ones."""
    methods = [row for row in rows if not row["row"].startswith("untrained/")]
    weights = [Path(r["weights"]).name for r in methods if r["row"].endswith("/omniglot_5w1s")]
    return list(dict.fromkeys(weights))


def read() -> dict[str, Cost]:
    """What was measured, by the name of the weights; nothing before the first measurement."""
    if not COSTS.exists():
        return {}
    costs = json.loads(COSTS.read_text(encoding="utf-8"))["costs"]
    return {name: Cost(**values) for name, values in costs.items()}


def cost(model: Trained, rounds: int) -> Cost:
    """Measures a trained classifier.

    Args:
      model: The learner and its parameters.
      rounds: Timed calls of each program, of which the median counts.

    Raises:
      UsageError: it does not say what an input looks like.
    """
    learner, params, state = model.learner, model.params, model.state
    task, keys = _task(model.config), jax.random.split(jax.random.key(1), 3)
    gradient = jax.jit(jax.grad(lambda *arguments: learner.loss(*arguments)[0]))
    # A classifier of all training classes learns from the labels of as many.
    to_learn = _task(model.config, model.config["learner"].get("train_classes", _WAYS))
    training = measure.compile_timed(gradient, params, state, to_learn, keys[0])
    adapt = jax.jit(functools.partial(learner.adapt, train=False))
    predict = jax.jit(functools.partial(learner.predict, train=False))
    adapted = adapt(params, state, task.support, keys[1])
    contenders = {
        "adapt": lambda: jax.block_until_ready(adapt(params, state, task.support, keys[1])),
        "predict": lambda: jax.block_until_ready(predict(params, adapted, task.query.x, keys[2])),
    }
    times = measure.alternate(contenders, rounds)
    adapt_ms, predict_ms = (measure.spread(times[name])["median"] for name in contenders)
    return Cost(training.peak_mib, adapt_ms, predict_ms / (_WAYS * _QUERIES))


def _task(config: Any, classes: int = _WAYS) -> Episode:
    """A task of random inputs of the form that a model was trained on.

    Args:
      config: The model's.
      classes: How many classes the labels tell apart, of which the first five occur.
    """
    example = task_like(config["example"])
    if not isinstance(example, Episode):
        raise UsageError("the model was not trained on few-shot tasks: choose other weights")
    shape, keys = example.support.x.shape[1:], jax.random.split(jax.random.key(0))
    parts = (
        Batch(
            jax.random.uniform(key, (n * _WAYS, *shape)),
            jnp.tile(jnp.eye(_WAYS, classes), (n, 1)),
        )
        for key, n in zip(keys, (1, _QUERIES), strict=True)
    )
    return Episode(*parts)


if __name__ == "__main__":
    run_main(main)
