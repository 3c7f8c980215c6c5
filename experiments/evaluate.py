"""Tests a trained learner again, from its workdir or from shipped weights.

python -m experiments.evaluate --workdir=runs/glyphs --shots=5
python -m experiments.evaluate --weights=results/weights/prototypical_omniglot --data_dir=PATH
"""

import json
from pathlib import Path

from absl import flags

from experiments import testing
from experiments.command_line import UsageError, run_main
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
flags.DEFINE_boolean("within_alphabet", None, "One alphabet an episode, if not as in the run.")
flags.DEFINE_string("rotations", None, "Quarter turns of the test, if not the run's.")
flags.DEFINE_string("protocol", None, "few_shot or sequence, if not the run's.")


def main(arguments: list[str]) -> None:
    """Prints one line; with --output, writes the keys of result.json too."""
    del arguments
    if bool(FLAGS.workdir) == bool(FLAGS.weights):
        raise UsageError("name what to test: --workdir=W of a training run, or --weights=FOLDER")
    overrides = {
        name: FLAGS[name].value
        for name in (*_OVERRIDES, "batch_norm", "rotations", "within_alphabet", "protocol")
    }
    found = testing.evaluate(
        Path(FLAGS.workdir or FLAGS.weights),
        checkpoint=FLAGS.checkpoint,
        split=FLAGS.split,
        episodes=FLAGS.episodes,
        seed=FLAGS.seed,
        data_dir=FLAGS.data_dir,
        overrides=overrides,
    )
    if FLAGS.output:
        write_text(Path(FLAGS.output), json.dumps(found, indent=1) + "\n")
    print(testing.line(found))
    if "instances" in found:
        print(testing.instance_table({"accuracy": found["instances"]}))


if __name__ == "__main__":
    run_main(main)
