"""Tests a trained learner again, from its workdir or from shipped weights.

Settings that are not given are those of the run; --tasks=OTHER tests on tasks of another source,
--tasks=folder:PATH on another folder, or where a folder lies now.

    python -m experiments.evaluate --workdir=runs/glyphs --shots=5
    python -m experiments.evaluate --workdir=runs/glyphs --help
    python -m experiments.evaluate --weights=results/weights/prototypical_omniglot --data_dir=PATH
"""

import json
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments import run_flags, testing
from experiments.command_line import Chosen, given_settings, run_main
from experiments.weights import define_weights_flags, named_weights, weights_folder
from meta_jax import registry
from meta_jax.lookup import UsageError, local_path
from meta_jax.training.record import read_config
from meta_jax.training.writers import write_text

FLAGS = flags.FLAGS
define_weights_flags(FLAGS)
flags.DEFINE_string("split", "test", "Split to test on.")
flags.DEFINE_integer("seed", 0, "Seed of the test's episodes.", 0, 2**31 - 1)
flags.DEFINE_string("output", None, "File to write the result to, as JSON.")
run_flags.define_test_flags(FLAGS)
flags.DEFINE_string(
    "tasks", None, f"Source of the tasks, by default the run's: {run_flags.choices('tasks')}."
)
for _name, _what in (
    ("ways", "Classes of an episode"),
    ("shots", "Support examples of each class"),
    ("queries", "Query examples of each class"),
):
    flags.DEFINE_integer(_name, None, f"{_what}, by default as in the run.", 1)


def choose(selected: Mapping[str, str | None]) -> list[Chosen]:
    """The components of a run, with its settings as defaults; none before a run is named."""
    named = named_weights(selected["workdir"], selected["weights"])
    if named is None:
        return []
    folder = weights_folder(named)
    config = read_config(folder)
    learner, tasks = config["learner"], config["tasks"]
    if not learner or "name" not in tasks or "ways" not in (config.get("run") or {}):
        raise UsageError(
            f"{folder} was trained from Python and does not say how to test it: use mj.load and "
            "the learner's evaluate"
        )
    found = [_recorded("learner", learner, ("objective", "network"))]
    if learner.get("network"):
        found.append(_recorded("network", learner["network"]))
    name = selected["tasks"] or tasks["name"]
    chosen = run_flags.tasks_chosen(name)
    reserved = (*chosen.reserved, "objective")  # it is the learner's
    defaults = testing.recorded_settings(tasks, name)
    return [*found, chosen._replace(reserved=reserved, defaults=defaults)]


def _recorded(kind: registry.Kind, record: Mapping[str, Any], reserved: tuple = ()) -> Chosen:
    component = registry.find(kind, record["name"])
    return Chosen(kind, component, reserved, _without_lists(record))


def _without_lists(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}


def main(arguments: list[str]) -> None:
    """Prints one line; with --output, writes the keys of result.json too."""
    del arguments
    named = named_weights(FLAGS.workdir, FLAGS.weights)
    if named is None:
        raise UsageError("name what to test: --workdir=W of a training run, or --weights=FOLDER")
    output = local_path(FLAGS.output) if FLAGS.output else None
    if output and not output.absolute().parent.is_dir():
        raise UsageError(f"--output={FLAGS.output}: its folder does not exist, make it first")
    if output and output.is_dir():
        raise UsageError(f"--output={FLAGS.output} is a folder: name a file")
    sizes = {name: FLAGS[name].value for name in ("ways", "shots", "queries")}
    chosen = choose({name: FLAGS[name].value for name in ("workdir", "weights", "tasks")})
    found = testing.evaluate(
        weights_folder(named),
        testing.Asked(FLAGS.split, FLAGS.eval_episodes, FLAGS.seed, FLAGS.eval_chunk),
        checkpoint=FLAGS.checkpoint,
        size={name: value for name, value in sizes.items() if value is not None},
        tasks=FLAGS.tasks,
        settings={each.kind: given_settings(FLAGS, each._replace(defaults={})) for each in chosen},
        data_dir=FLAGS.data_dir,
    )
    if output:
        write_text(output, json.dumps(found.record, indent=1) + "\n")
    print(testing.line(found) + testing.beside_text(found.beside))
    if found.tested.instances:
        print(testing.instance_table({found.tested.objective.metric: found.tested.instances}))


if __name__ == "__main__":
    run_main(main, selections=("workdir", "weights", "tasks"), choose=choose)
