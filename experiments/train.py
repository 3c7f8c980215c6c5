"""Meta-trains a learner, resumes where it stopped, and tests it on classes it has never seen.

python -m experiments.train --workdir=runs/glyphs
python -m experiments.train --learner=maml --help
python -m experiments.train --flagfile=experiments/flagfiles/prototypical_omniglot.flags
"""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh

from experiments import records, run_flags, runs, testing
from experiments.command_line import run_main
from experiments.testing import Asked, Tested
from meta_jax.core import Array, Episode, MetaLearner, PyTree, Tasks
from meta_jax.lookup import UsageError
from meta_jax.training import pictures
from meta_jax.training.evaluation import make_validate
from meta_jax.training.loop import FitResult, fit
from meta_jax.training.outer_step import (
    OuterStep,
    TrainState,
    init_train_state,
    make_outer_step,
    make_train_loop,
    place,
    task_mesh,
)
from meta_jax.training.trained import load_parameters
from meta_jax.training.writers import read_metrics, write_text

FLAGS = flags.FLAGS
run_flags.define_run_flags(FLAGS)
flags.DEFINE_string("workdir", None, "Folder where everything is written; an old one is resumed.")
flags.DEFINE_string("data_dir", None, "Folder where Omniglot or the prepared TFDS sets lie.")
flags.DEFINE_integer("eval_episodes", 1000, "Episodes of the final test.", 2)


class Program(NamedTuple):
    """What is compiled, and where it begins."""

    outer_step: OuterStep
    initial: TrainState
    data: PyTree
    mesh: Mesh | None  # the devices that share the tasks of a step, or else the images of its one


def main(arguments: list[str]) -> None:
    """Trains, validates, tests; everything it finds out is in the workdir."""
    del arguments
    if not FLAGS.workdir:
        raise UsageError("--workdir is missing: name a folder for this run, e.g. --workdir=runs/1")
    workdir = Path(FLAGS.workdir)
    # Everything that can be refused is refused before anything is written.
    run = runs.build_run(FLAGS, runs.load_tasks(FLAGS))
    try:
        program = build_program(run)
    except ValueError as error:
        raise UsageError(str(error)) from error
    records.claim_workdir(workdir, run.config, records.given_flags(FLAGS))
    fitted = train(run, program, workdir)
    if fitted.finished:
        report(run, program, fitted, workdir, Asked("test", FLAGS.eval_episodes))


def build_program(run: runs.Run) -> Program:
    """The outer step of a run and its first state, on all devices that share the work.

    Raises:
      ValueError: sizes that do not fit each other, the network or the devices.
    """
    settings = run.config["run"]
    task_batch, mesh = settings["task_batch"], task_mesh(settings["task_batch"])
    outer_step = make_outer_step(
        run.training_learner,
        run.optimizer,
        run.training.sample,
        task_batch=task_batch,
        task_chunk=settings["task_chunk"],
        mesh=mesh,
    )
    initial = init_train_state(
        run.learner, run.optimizer, run.training, settings["seed"], task_batch=task_batch
    )
    data, devices = run.training.data, mesh or run.image_mesh
    if devices is not None:
        per_task = run.learner.state_scope == "task"
        initial, data = place(initial, data, devices, per_task=per_task)
    return Program(outer_step, initial, data, devices)


def train(run: runs.Run, program: Program, workdir: Path) -> FitResult:
    """Trains from where the workdir stands."""
    validate, episodes = None, run.config["run"]["val_episodes"]
    if run.validation is not None:
        validate = make_validate(
            run.learner, run.validation, episodes=episodes, mesh=task_mesh(episodes)
        )
    fitted = fit(
        program.initial,
        make_train_loop(program.outer_step),
        program.data,
        config=run.loop,
        workdir=workdir,
        tasks_per_step=run.config["run"]["task_batch"],
        validate=validate,
        objective=run.training.objective,
        learner_config=run.learner.config,
    )
    curve = workdir / "learning_curve.png"
    pictures.learning_curve(read_metrics(workdir), curve, objective=run.training.objective)
    return fitted


def report(run: runs.Run, program: Program, fitted: FitResult, workdir: Path, asked: Asked) -> None:
    """Tests the checkpoint that validation chose, beside what is untrained; writes and prints."""
    params, state, _ = load_parameters(
        workdir,
        "latest" if run.validation is None else "best",
        learner=run.learner,
        example=runs.example_task(run.training),
    )
    test = testing.make_test(run.learner, run.testing, asked)
    found = testing.result(run.config, test(params, state), asked, seconds=fitted.seconds)
    beside = {"untrained": test(program.initial.params, program.initial.state)}
    text = f"{testing.line(found)}; untrained network {beside['untrained'].text()}"
    if found.tested.instances:
        text += "\n" + _report_instances(found.tested, beside["untrained"], workdir)
    else:
        baselines = testing.test_baselines(run.source, run.testing, asked)
        beside |= baselines
        text += "".join(f"; {name.replace('_', ' ')} {t.text()}" for name, t in baselines.items())
    _draw_episode(run.learner, (params, state), run.testing, workdir / "episode.png")
    scores = {name: tested.score._asdict() for name, tested in beside.items()}
    write_text(workdir / "baselines.json", json.dumps(scores, indent=1) + "\n")
    write_text(workdir / "result.json", json.dumps(found.record, indent=1) + "\n")
    print("\n".join([text, *(f"note: {note}" for note in run.source.notes)]))


def _report_instances(tested: Tested, untrained: Tested, workdir: Path) -> str:
    """Draws the metric at each instance of a class, and returns it as a table."""
    curves = {"trained": tested.instances, "untrained": untrained.instances}
    pictures.instance_curve(curves, workdir / "instances.png")
    return testing.instance_table(curves)


def _draw_episode(learner: MetaLearner, learned: tuple, tasks: Tasks, path: Path) -> None:
    """Draws a test episode with the learner's answers, where it can be drawn."""

    @jax.jit
    def answer(learned: tuple, data: PyTree) -> tuple[Episode, Array]:
        keys = jax.random.split(jax.random.key(0), 3)
        episode = tasks.sample(keys[0], data)
        params, state = learned
        adapted = learner.adapt(params, state, episode.support, keys[1], train=False)
        return episode, learner.predict(params, adapted, episode.query.x, keys[2], train=False)[0]

    if runs.example_inputs(tasks) is None:
        return
    episode, outputs = answer(learned, tasks.data)
    # Numbers and images can be drawn; other inputs have no picture.
    with contextlib.suppress(ValueError):
        pictures.episode_picture(episode, outputs, path)


if __name__ == "__main__":
    run_main(main, selections=run_flags.SELECTIONS, choose=run_flags.choose)
