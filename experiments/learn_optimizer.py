"""Meta-trains an optimizer, resumes where it stopped, and compares it with tuned ones.

    python -m experiments.learn_optimizer --flagfile=experiments/flagfiles/lstm_quadratics.flags \
        --workdir=runs/lstm_quadratics
    python -m experiments.learn_optimizer --weights=results/weights/lstm_quadratics --test_steps=200
"""

import json
from pathlib import Path

import jax
from absl import flags

from experiments import optimizers
from experiments.command_line import UsageError, claim_workdir, run_flag_values, run_main
from experiments.tasks import Tasks
from meta_jax.core import PyTree
from meta_jax.optimization_based.learned_optimizers.hand_designed import HAND_DESIGNED, with_rate
from meta_jax.optimization_based.learned_optimizers.learned_optimizer import make_training_curves
from meta_jax.optimization_based.learned_optimizers.tuning import tune_rate
from meta_jax.training import checkpoints, pictures
from meta_jax.training.evaluation import confidence_interval
from meta_jax.training.loop import Outcome, Schedule, fit
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
optimizers.define_optimizer_flags(FLAGS)
flags.DEFINE_string("workdir", None, "Where everything is written; an old one is resumed.")
flags.DEFINE_string("weights", None, "Compare the trained rule of this folder instead of training.")
flags.DEFINE_string("data_dir", None, "Where Omniglot or the prepared TFDS sets lie.")
flags.DEFINE_string("output", None, "With --weights: also write result.json's keys to this file.")
flags.DEFINE_integer("test_tasks", 1024, "Training runs of the comparison, and of the tuning.", 2)
flags.DEFINE_integer("test_steps", None, "Inner steps of the comparison; default: the horizon.", 1)
flags.DEFINE_integer("test_seed", 0, "Of the comparison's problems.")
flags.DEFINE_integer("test_width", None, "As --width, for the comparison alone.", 1)
flags.DEFINE_integer("test_depth", None, "As --depth, for the comparison alone.", 1)
flags.DEFINE_string("test_activation", None, "As --activation, for the comparison alone.")
flags.DEFINE_string("test_distribution", None, "As --distribution, for the comparison alone.")

_CHUNK = 32  # training runs of a validation or comparison at a time


def main(arguments: list[str]) -> None:
    """Trains unless there are weights, and compares."""
    del arguments
    if bool(FLAGS.workdir) == bool(FLAGS.weights):
        raise UsageError("give either --workdir, to train in, or --weights, to compare alone")
    if FLAGS.weights:
        folder = Path(FLAGS.weights)
        if not (folder / "flags.txt").exists():
            raise UsageError(f"no flags.txt in {folder}: name the workdir of a training run")
        values = run_flag_values(folder / "flags.txt", optimizers.define_optimizer_flags)
    else:
        folder, values = Path(FLAGS.workdir), FLAGS
    problems = _problems(values)
    meta = None
    if FLAGS.workdir:
        outcome = _train(values, problems, folder)
        if not outcome.finished:
            return
        meta = outcome.train_state.params
    elif not values.eval_every:
        raise UsageError(f"the run of {folder} had no validation, so it left no best checkpoint")
    if values.eval_every:
        learner = optimizers.build_learner(values)
        example = problems["train"].sampler(jax.random.key(0), problems["train"].data)
        like, _ = jax.eval_shape(learner.init, jax.random.key(0), example)
        best, _ = checkpoints.restore(folder / "checkpoints" / "best", {"params": like})
        meta = best["params"]
    _compare(values, problems, meta, folder)


def _problems(values: flags.FlagValues) -> dict[str, Tasks]:
    try:
        return optimizers.load_problems(values, FLAGS.data_dir)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _train(values: flags.FlagValues, problems: dict[str, Tasks], workdir: Path) -> Outcome:
    """Trains from where the workdir stands."""
    learner, optimizer = optimizers.build_learner(values), optimizers.build_outer_optimizer(values)
    schedule = Schedule(values.steps, values.log_every, values.eval_every, values.checkpoint_every)
    mesh = task_mesh(values.task_batch)
    sampler, data = problems["train"]
    try:
        schedule.check()
        outer_step = make_outer_step(
            learner,
            optimizer,
            sampler,
            task_batch=values.task_batch,
            task_chunk=values.task_chunk,
            mesh=mesh,
        )
        initial = init_train_state(
            learner, optimizer, sampler, data, values.seed, task_batch=values.task_batch
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    claim_workdir(workdir, values, optimizers.define_optimizer_flags)
    if mesh is not None:
        initial, data = place(initial, data, mesh, per_task=True)
    curves = make_training_curves(
        optimizers.build_family(values),
        optimizers.build_rule(values),
        problems["val"].sampler,
        steps=values.horizon,
        tasks=values.val_tasks,
        task_chunk=_CHUNK,
    )

    def validate(train_state: TrainState) -> dict[str, float]:
        # The same problems every time: fold_in(0) is theirs alone.
        key = jax.random.fold_in(jax.random.key(0), 0)
        losses = curves(train_state.params, problems["val"].data, key)
        return {"loss": float(losses.mean()), "last_loss": float(losses[:, -1].mean())}

    outcome = fit(
        initial,
        make_run(outer_step),
        data,
        schedule=schedule,
        workdir=workdir,
        tasks_per_step=values.task_batch,
        validate=validate if values.eval_every else None,
        keep_state=False,
    )
    pictures.learning_curve(read_metrics(workdir), workdir / "learning_curve.png")
    return outcome


def _compare(
    values: flags.FlagValues, problems: dict[str, Tasks], meta: PyTree, folder: Path
) -> None:
    """On test problems, the rule beside hand-designed ones whose rates training problems tuned."""
    for name in ("width", "depth", "activation", "distribution"):
        asked = getattr(FLAGS, f"test_{name}")
        if asked is not None:
            setattr(values, name, asked)
    if FLAGS.test_distribution:
        problems = _problems(values)
    family, steps = optimizers.build_family(values), FLAGS.test_steps or values.horizon
    asked = {"steps": steps, "tasks": FLAGS.test_tasks, "task_chunk": _CHUNK}
    tuning_key, test_key = jax.random.split(jax.random.key(FLAGS.test_seed))
    sampler, data = problems["test"]
    rules = {values.rule: (optimizers.build_rule(values), meta, None)}
    for name, make in HAND_DESIGNED.items():
        train_sampler, train_data = problems["train"]
        tuned = tune_rate(make(), family, train_sampler, train_data, tuning_key, **asked)
        rules[name] = (with_rate(make(), tuned.rate), {"rate": tuned.rate}, tuned.rate)
    scores, found = {}, {}
    for name, (rule, params, rate) in rules.items():
        curves = make_training_curves(family, rule, sampler, **asked)(params, data, test_key)
        scores[name] = [confidence_interval(losses) for losses in jax.device_get(curves).T]
        last = scores[name][-1]
        found[name] = {"loss": last.mean, "ci95": last.ci95, "rate": rate}
        at = "" if rate is None else f", rate {rate:.2g}"
        print(f"{name}: loss {last.mean:.4f} ± {last.ci95:.4f} after {steps} steps{at}")
    result = {
        **{name: values[name].value for name in ("rule", "family", "width", "depth")},
        **{name: values[name].value for name in ("activation", "distribution", "dataset")},
        "split": "test",
        "steps": steps,
        "tasks": FLAGS.test_tasks,
        "losses": found,
    }
    path = Path(FLAGS.output) if FLAGS.output else folder / "result.json" if FLAGS.workdir else None
    if path is not None:
        pictures.loss_curves(scores, path.with_suffix(".png"))
        write_text(path, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
