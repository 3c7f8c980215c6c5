"""Tests a trained learner again, from its workdir or from shipped weights.

python -m experiments.evaluate --workdir=runs/glyphs --shots=5
python -m experiments.evaluate --weights=results/weights/prototypical_omniglot --data_dir=PATH
"""

import json
import sys
from pathlib import Path

import jax
from absl import flags

from experiments import learners, tasks, testing
from experiments.command_line import UsageError, run_flag_values, run_main
from meta_jax.core import MetaLearner, PyTree
from meta_jax.training import checkpoints
from meta_jax.training.outer_step import init_train_state
from meta_jax.training.writers import write_text

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "The workdir of a training run.")
flags.DEFINE_string("weights", None, "A folder of shipped weights, instead of a workdir.")
flags.DEFINE_string("checkpoint", "best", "Of a workdir: best (on validation) or latest.")
flags.DEFINE_string("split", "test", "Split to test on.")
flags.DEFINE_integer("episodes", 1000, "Test episodes.", 2)
flags.DEFINE_integer("seed", 0, "Of the test episodes.")
flags.DEFINE_string("output", None, "Where to write the result as JSON.")
flags.DEFINE_string("data_dir", None, "Where Omniglot or the prepared TFDS sets lie.")
# What a test may change of the run; None leaves it as it was trained.
_OVERRIDES = ("ways", "shots", "queries", "eval_inner_steps")
for _name in _OVERRIDES:
    flags.DEFINE_integer(_name, None, f"{_name} of the test, if not the run's.", 0)
flags.DEFINE_string("batch_norm", None, "batch, running or support, if not the run's.")
flags.DEFINE_string("rotations", None, "Quarter turns of the test, if not the run's.")


def main(arguments: list[str]) -> None:
    """Prints one line; with --output, writes the keys of result.json too."""
    del arguments
    if bool(FLAGS.workdir) == bool(FLAGS.weights):
        raise UsageError("name what to test: --workdir=W of a training run, or --weights=FOLDER")
    overrides = {name: FLAGS[name].value for name in (*_OVERRIDES, "batch_norm", "rotations")}
    found = evaluate(
        Path(FLAGS.workdir or FLAGS.weights),
        checkpoint=FLAGS.checkpoint,
        split=FLAGS.split,
        episodes=FLAGS.episodes,
        seed=FLAGS.seed,
        data_dir=FLAGS.data_dir,
        overrides={name: value for name, value in overrides.items() if value is not None},
    )
    if FLAGS.output:
        write_text(Path(FLAGS.output), json.dumps(found, indent=1) + "\n")
    print(testing.line(found))


def evaluate(
    folder: Path,
    *,
    checkpoint: str,
    split: str,
    episodes: int,
    seed: int,
    data_dir: str | None,
    overrides: dict,
) -> dict:
    """Tests the learner of a workdir, or of shipped weights, which are a workdir in small.

    Args:
      folder: holds flags.txt and checkpoints/.
      checkpoint: 'best' or 'latest'.
      split: of the classes to test on.
      episodes: how many.
      seed: of the episodes.
      data_dir: where the data lie.
      overrides: flags of the run that the test changes.

    Returns:
      The keys of result.json.

    Raises:
      UsageError, DataError, CheckpointError: what is asked for cannot be had.
    """
    path = folder / "flags.txt"
    if not path.exists():
        raise UsageError(f"no flags.txt in {folder}: name the workdir of a training run")
    values = run_flag_values(path)
    if values.train_ways is None:
        values.train_ways = values.ways
    if values.eval_every == 0 and checkpoint == "best":
        raise UsageError(
            "the run had no validation, so no best checkpoint: use --checkpoint=latest"
        )
    for name, value in overrides.items():
        setattr(values, name, value)
    try:
        learner, criterion = learners.build_learner(values)
        splits = tasks.load(values, data_dir)
        source = tasks.tasks(splits, split, tasks.test_spec(values))
    except ValueError as error:
        raise UsageError(str(error)) from error
    params, state, seconds = _restore(folder / "checkpoints", checkpoint, learner, source, values)
    name, score = testing.test(
        learner, criterion, params, state, source, split=split, episodes=episodes, seed=seed
    )
    return testing.result(
        values,
        name,
        score,
        batch_norm=learners.network(values).batch_norm,
        split=split,
        episodes=episodes,
        seconds=seconds,
    )


def _restore(
    folder: Path,
    checkpoint: str,
    learner: MetaLearner,
    source: tasks.Tasks,
    values: flags.FlagValues,
) -> tuple[PyTree, PyTree, float]:
    """Parameters, state, and the seconds that training them took."""
    optimizer = learners.build_optimizer(values)
    like = jax.eval_shape(
        lambda data: init_train_state(learner, optimizer, source.sampler, data, 0), source.data
    )
    if checkpoint == "best":
        learned = {"params": like.params, "state": like.state}
        learned, metadata = checkpoints.restore(folder / "best", learned)
        return learned["params"], learned["state"], metadata["seconds"]
    if checkpoint != "latest":
        raise UsageError(f"unknown checkpoint '{checkpoint}': choose best or latest")
    found = checkpoints.restore_latest(folder, like)
    if found is None:
        raise UsageError(f"no checkpoint in {folder}: train first")
    train_state, metadata, warnings = found
    for warning in warnings:
        print(warning, file=sys.stderr)
    return train_state.params, train_state.state, metadata["seconds"]


if __name__ == "__main__":
    run_main(main)
