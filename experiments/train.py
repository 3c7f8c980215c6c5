"""Meta-trains a learner, resumes where it stopped, and tests it on classes it has never seen.

    python -m experiments.train --workdir=runs/glyphs
    python -m experiments.train --flagfile=experiments/flagfiles/prototypical_omniglot.flags \
        --data_dir=PATH --workdir=runs/prototypical_omniglot
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from experiments import learners, tasks, testing
from experiments.command_line import UsageError, claim_workdir, define_run_flags, run_main
from meta_jax.core import Episode, MetaLearner, PyTree
from meta_jax.metric_based.nearest_neighbour import nearest_neighbour
from meta_jax.training import checkpoints, pictures
from meta_jax.training.loop import Schedule, fit
from meta_jax.training.outer_step import (
    TrainState,
    init_train_state,
    make_outer_step,
    make_run,
    place,
    task_mesh,
)
from meta_jax.training.writers import read_metrics, write_text

FLAGS = flags.FLAGS
define_run_flags(FLAGS)
flags.DEFINE_string("workdir", None, "Where everything is written; an old one is resumed.")
flags.DEFINE_string("data_dir", None, "Where Omniglot or the prepared TFDS sets lie.")
flags.DEFINE_integer("eval_episodes", 1000, "Episodes of the final test.", 2)


def main(arguments: list[str]) -> None:
    """Trains, validates, tests; everything it finds out is in the workdir."""
    del arguments
    if not FLAGS.workdir:
        raise UsageError("--workdir is missing: name a folder for this run, e.g. --workdir=runs/1")
    workdir = Path(FLAGS.workdir)

    # ---- Everything that can be refused is refused before anything is written.
    learner, criterion = learners.build_learner(FLAGS)
    # Several devices share the tasks of a step, or else the images of its one task.
    mesh = task_mesh(FLAGS.task_batch)
    image_mesh = learners.image_mesh(FLAGS)
    training_learner, _ = learners.build_learner(FLAGS, image_mesh)
    schedule = Schedule(FLAGS.steps, FLAGS.log_every, FLAGS.eval_every, FLAGS.checkpoint_every)
    optimizer = learners.build_optimizer(FLAGS)
    try:
        schedule.check()
        splits = tasks.load(FLAGS, FLAGS.data_dir)
        training = tasks.tasks(splits, FLAGS.train_split, tasks.training_spec(FLAGS))
        validation, testing_tasks = (
            tasks.tasks(splits, split, tasks.test_spec(FLAGS)) for split in ("val", "test")
        )
        outer_step = make_outer_step(
            training_learner,
            optimizer,
            training.sampler,
            task_batch=FLAGS.task_batch,
            task_chunk=FLAGS.task_chunk,
            mesh=mesh,
        )
        initial = init_train_state(learner, optimizer, training.sampler, training.data, FLAGS.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    claim_workdir(workdir, FLAGS)

    # ---- Train.
    untrained = jax.tree.map(jnp.copy, (initial.params, initial.state))
    data = training.data
    devices = mesh or image_mesh
    if devices is not None:
        initial, data = place(initial, data, devices)
    evaluate = testing.make_evaluation(
        learner, criterion, validation, protocol=FLAGS.protocol, episodes=FLAGS.val_episodes
    )

    def validate(train_state: TrainState) -> dict[str, float]:
        # The same validation episodes every time: fold_in(0) is theirs alone.
        key = jax.random.fold_in(jax.random.key(0), 0)
        metrics = evaluate(train_state.params, train_state.state, validation.data, key)
        return {name: float(values.mean()) for name, values in metrics.items()}

    outcome = fit(
        initial,
        make_run(outer_step),
        data,
        schedule=schedule,
        workdir=workdir,
        tasks_per_step=FLAGS.task_batch,
        validate=validate if FLAGS.eval_every else None,
    )
    pictures.learning_curve(read_metrics(workdir), workdir / "learning_curve.png")
    if not outcome.finished:
        return

    # ---- Test the checkpoint that validation chose.
    learned = {"params": outcome.train_state.params, "state": outcome.train_state.state}
    if FLAGS.eval_every:
        learned, _ = checkpoints.restore(workdir / "checkpoints" / "best", learned)
    asked = {"split": "test", "episodes": FLAGS.eval_episodes}
    test = testing.make_test(learner, criterion, testing_tasks, protocol=FLAGS.protocol, **asked)
    tested = test(learned["params"], learned["state"])
    name = tested.name
    found = testing.result(
        FLAGS,
        tested,
        batch_norm=learners.build_network(FLAGS).batch_norm,
        seconds=outcome.seconds,
        **asked,
    )
    before = test(*untrained)
    text = f"{testing.line(found)}; untrained network {testing.score_text(name, before.score)}"
    baselines = {"untrained": before.score._asdict()}
    if tested.instances:
        curves = {"trained": tested.instances, "untrained": before.instances}
        pictures.instance_curve(curves, workdir / "instances.png")
        text += "\n" + testing.instance_table(
            {name: [score.mean for score in scores] for name, scores in curves.items()}
        )
    elif name == "accuracy":
        pixels = testing.make_test(nearest_neighbour(), criterion, testing_tasks, **asked)({}, {})
        text += f"; raw-pixel nearest neighbour {testing.score_text(name, pixels.score)}"
        baselines["nearest_neighbour"] = pixels.score._asdict()
    _draw_episode(learner, learned, testing_tasks, workdir / "episode.png")
    write_text(workdir / "baselines.json", json.dumps(baselines, indent=1) + "\n")
    write_text(workdir / "result.json", json.dumps(found, indent=1) + "\n")
    print(text)


def _draw_episode(learner: MetaLearner, learned: dict, source: tasks.Tasks, path: Path) -> None:
    @jax.jit
    def answer(learned: dict, data: PyTree) -> tuple[Episode, jax.Array]:
        keys = jax.random.split(jax.random.key(0), 3)
        episode = source.sampler(keys[0], data)
        params, state = learned["params"], learned["state"]
        adapted = learner.adapt(params, state, episode.support, keys[1], train=False)
        return episode, learner.predict(params, adapted, episode.query.x, keys[2], train=False)[0]

    episode, outputs = answer({key: learned[key] for key in ("params", "state")}, source.data)
    pictures.episode_picture(episode, outputs, path)


if __name__ == "__main__":
    run_main(main)
