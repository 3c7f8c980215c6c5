"""Tests a trained learner again, from its workdir or from shipped weights.

Settings that are not given are those of the run; --tasks=OTHER tests on tasks of another source,
--tasks=folder:PATH on another folder, or where a folder lies now.

    python -m experiments.evaluate --workdir=runs/glyphs --shots=5
    python -m experiments.evaluate --workdir=runs/glyphs --help
    python -m experiments.evaluate --weights=results/weights/prototypical_omniglot --data_dir=PATH
    python -m experiments.evaluate --workdir=runs/lake --protocol=lake --data_dir=PATH
"""

import json
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments import (
    folder_tests,
    protocols,
    recorded_tasks,
    reports,
    run_flags,
    several_processes,
)
from experiments.command_line import Chosen, given_settings, run_main
from experiments.testing import Asked
from experiments.weights import define_weights_flags, named_weights, weights_folder
from meta_jax import registry
from meta_jax.lookup import UsageError
from meta_jax.precision import PRECISIONS
from meta_jax.ranges import LARGEST_INT
from meta_jax.training import processes
from meta_jax.training.record import read_config
from meta_jax.training.writers import output_file, write_text

FLAGS = flags.FLAGS
SELECTIONS = ("workdir", "weights", "tasks", "protocol")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this binary, but for the settings of its components."""
    define_weights_flags(values)
    flags.DEFINE_string("split", "test", "Split to test on.", values)
    flags.DEFINE_integer("seed", 0, "Seed of the test's episodes.", 0, LARGEST_INT, values)
    flags.DEFINE_string("output", None, "File to write the result to, as JSON.", values)
    run_flags.define_test_flags(values)
    several_processes.define_flags(values)
    flags.DEFINE_string(
        "tasks",
        None,
        f"Source of the tasks, by default the run's: {run_flags.choices('tasks')}.",
        values,
    )
    flags.DEFINE_enum(
        "protocol",
        None,
        [*protocols.PROTOCOLS],
        f"A known test on Omniglot: {protocols.described()}.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "runs",
        None,
        "With --protocol=lake: all_runs.zip of the official 400 trials, or the folder of its run01 "
        "to run20, to test on these too.",
        values,
    )
    flags.DEFINE_enum(
        "precision",
        None,
        PRECISIONS,
        "Precision in which the network computes, by default the run's.",
        flag_values=values,
    )
    for name, what in (
        ("ways", "Classes of an episode"),
        ("shots", "Support examples of each class"),
        ("queries", "Query examples of each class"),
    ):
        text = f"{what}, by default as in the run."
        flags.DEFINE_integer(name, None, text, 1, LARGEST_INT, flag_values=values)


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
    found = [_recorded("learner", learner, (*run_flags.GIVEN_TO_LEARNERS, "network"))]
    if learner.get("network"):
        found.append(_recorded("network", learner["network"]))
    protocol = protocols.find(selected["protocol"])
    name = selected["tasks"] or (protocol.tasks if protocol else tasks["name"])
    chosen = run_flags.tasks_chosen(name)
    reserved = (*chosen.reserved, "objective")  # it is the learner's
    defaults, usual = recorded_tasks.recorded_settings(tasks, name), chosen.run
    if protocol:
        defaults, usual = {**defaults, **protocol.settings}, protocol.run
    return [*found, chosen._replace(reserved=reserved, defaults=defaults, run=usual)]


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
    output = output_file(FLAGS.output) if FLAGS.output and processes.is_writer() else None
    if FLAGS.runs and FLAGS.protocol != "lake":
        raise UsageError("--runs are the trials of another protocol: add --protocol=lake")
    sizes = {name: FLAGS[name].value for name in ("ways", "shots", "queries")}
    chosen = choose({name: FLAGS[name].value for name in SELECTIONS})
    settings: folder_tests.Settings = {
        each.kind: given_settings(FLAGS, each._replace(defaults={})) for each in chosen
    }
    found = folder_tests.evaluate(
        weights_folder(named),
        Asked(FLAGS.split, FLAGS.eval_episodes, FLAGS.seed, FLAGS.eval_chunk, FLAGS.query_chunk),
        checkpoint=FLAGS.checkpoint,
        size={name: value for name, value in sizes.items() if value is not None},
        tasks=FLAGS.tasks,
        settings=settings,
        data_dir=FLAGS.data_dir,
        protocol=FLAGS.protocol,
        precision=FLAGS.precision,
    )
    record, results = found.record, [found]
    if FLAGS.runs:
        results.append(
            folder_tests.evaluate_trials(
                weights_folder(named),
                FLAGS.runs,
                checkpoint=FLAGS.checkpoint,
                settings=settings,
                precision=FLAGS.precision,
            )
        )
        record = record | {"official_trials": results[-1].record}
    for each in results:
        print(reports.line(each) + reports.beside_text(each.beside))
    for note in found.notes:
        print(f"note: {note}")
    if found.tested.instances:
        print(reports.instance_table({found.tested.objective.metric: found.tested.instances}))
    if output:  # last: what was found is said even where the disk is full
        write_text(output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    define_flags(FLAGS)
    run_main(main, selections=SELECTIONS, choose=choose)
