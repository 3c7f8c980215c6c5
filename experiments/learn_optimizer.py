r"""Meta-trains an optimizer, resumes where it stopped, and compares it with tuned ones.

    python -m experiments.learn_optimizer --flagfile=experiments/flagfiles/lstm_quadratics.flags \
        --workdir=runs/lstm_quadratics
    python -m experiments.learn_optimizer --weights=results/weights/lstm_quadratics --test_steps=200
    python -m experiments.learn_optimizer --weights=results/weights/lstm_quadratics \
        --tasks.distribution=uniform

With --weights nothing is trained: the rule is compared on test problems, as config.json records
them but for the flags that are given (--family.width=40, --tasks.distribution=uniform, --ways=5).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags

from experiments import records, run_flags, runs, several_processes
from experiments.command_line import (
    Chosen,
    RunError,
    given_settings,
    resolved_settings,
    run_main,
)
from meta_jax import registry
from meta_jax.core import MetaLearner, PyTree, Tasks
from meta_jax.data.dataset import HostDataset
from meta_jax.data.source import EpisodeSize, TaskSource, find_source, load_source
from meta_jax.lookup import UsageError, local_path
from meta_jax.optimization_based.learned_optimizers.estimators import Estimator
from meta_jax.optimization_based.learned_optimizers.families import ProblemFamily
from meta_jax.optimization_based.learned_optimizers.hand_designed import (
    HAND_DESIGNED,
    with_learning_rate,
)
from meta_jax.optimization_based.learned_optimizers.learned_optimizer import (
    last_loss_objective,
    learned_optimizer,
    make_training_curves,
)
from meta_jax.optimization_based.learned_optimizers.tuning import tune_learning_rate
from meta_jax.optimization_based.update_rules import UpdateRule
from meta_jax.ranges import LARGEST_INT
from meta_jax.registry import Component, Kind
from meta_jax.training import checkpoints, pictures, processes
from meta_jax.training.evaluation import MeanCI, confidence_interval
from meta_jax.training.learned_rules import meta_like
from meta_jax.training.lock import lock_workdir
from meta_jax.training.loop import FitResult, LoopConfig, fit
from meta_jax.training.optimizers import averaged_params
from meta_jax.training.outer_step import (
    TrainState,
    init_train_state,
    make_outer_step,
    place,
    task_mesh,
)
from meta_jax.training.record import make_config, read_config
from meta_jax.training.train_loop import make_train_loop
from meta_jax.training.writers import output_file, read_metrics, write_text

FLAGS = flags.FLAGS
# By kind, what is chosen where neither a flag nor a record says; the tasks follow the family.
_USUAL: dict[Kind, str] = {
    "rule": "lstm",
    "family": "quadratics",
    "estimator": "truncated",
    "optimizer": "adam",
}
_RESERVED = {"tasks": ("data_dir",), "optimizer": ("steps",)}
_PARTS: tuple[Kind, ...] = ("rule", "family", "estimator")  # what a learned optimizer is made of
SELECTIONS = (*_USUAL, "tasks", "weights")
_RUN = ("ways", "shots", "adjoint", "task_batch", "task_chunk", "steps", "log_every")
_RUN += ("eval_every", "checkpoint_every", "val_tasks", "seed")


# ---- Flags.


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this binary, but for the settings of its components."""

    def string(name: str, default: str | None, text: str) -> None:
        flags.DEFINE_string(name, default, text, values)

    def integer(name: str, default: int | None, text: str, lower_bound: int | None = 1) -> None:
        flags.DEFINE_integer(name, default, text, lower_bound, LARGEST_INT, flag_values=values)

    string("workdir", None, "Folder where everything is written; an old one is resumed.")
    string("weights", None, "Folder of a trained rule to compare, instead of training.")
    string("data_dir", None, "Folder where Omniglot or the prepared TFDS sets lie.")
    string("output", None, "File to which --weights also writes what result.json has.")
    string("rule", None, _text("Update rule that is learned", "rule"))
    string("family", None, _text("Family of the networks that are trained", "family"))
    string("estimator", None, _text("Estimator of the outer gradient", "estimator"))
    string("optimizer", None, _text("Outer optimizer", "optimizer"))
    string(
        "tasks",
        None,
        f"Source of the tasks, by default the family's own: {run_flags.choices('tasks')}.",
    )
    integer("ways", 10, "Classes that a network learns to tell apart.")
    integer("shots", 15, "Training examples of each class.")
    string("adjoint", "first_order", "Adjoint of the training; unrolled for second derivatives.")
    integer("task_batch", 128, "Training runs of an outer step.")
    integer(
        "task_chunk", None, "Training runs vmapped at a time, by default one a device on a CPU."
    )
    integer("eval_chunk", 32, "Training runs of a validation or comparison vmapped at a time.")
    integer("steps", 5000, "Outer steps; raise it to continue a finished workdir.")
    integer("log_every", 50, "Outer steps in one compiled call and between lines of metrics.")
    integer("eval_every", 500, "Outer steps between validations; 0 for none.", 0)
    integer("checkpoint_every", 500, "Outer steps between checkpoints.")
    integer("val_tasks", 256, "Training runs of a validation.")
    integer("seed", 0, "Seed of the initial rule and of the training runs.", 0)
    integer("test_tasks", 1024, "Training runs of the comparison, and of the tuning.", 2)
    integer("test_steps", None, "Inner steps of the comparison, by default the horizon.")
    integer("test_seed", 0, "Seed of the comparison's problems.", 0)
    several_processes.define_flags(values)


def _text(what: str, kind: Kind) -> str:
    return f"{what}, by default {_USUAL[kind]}: {run_flags.choices(kind)}."


def choose(selected: Mapping[str, str | None]) -> list[Chosen]:
    """The components that the flags choose, with the settings that --weights records.

    Args:
      selected: Values of the flags of `SELECTIONS`.

    Raises:
      UsageError: an unknown name, or weights that have no record.
    """
    weights = selected["weights"]
    recorded = recorded_components(Path(weights)) if weights else {}
    chosen = {kind: _chosen(kind, selected[kind], recorded) for kind in _USUAL}
    tasks = selected["tasks"]
    if tasks is None and "tasks" not in recorded:
        tasks = usual_tasks(chosen["family"].component)
    return [*chosen.values(), _chosen("tasks", tasks, recorded)]


def _chosen(kind: Kind, name: str | None, recorded: Mapping[str, Any]) -> Chosen:
    """A component by the name that a flag gives, or the record, or else the usual one."""
    record = dict(recorded.get(kind) or {})
    before = record.pop("name", None)
    name = name or before or _USUAL[kind]
    component = find_source(name)[0] if kind == "tasks" else registry.find(kind, name)
    defaults = {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}
    reserved = _RESERVED.get(kind, ())
    return Chosen(kind, component, reserved, defaults if name == before else {})


def usual_tasks(family: Component) -> str:
    """Name of the source of tasks that a family is used with by default."""
    parameters = registry.parameters(family.factory).values()
    if any(parameter.default is parameter.empty for parameter in parameters):
        raise UsageError(f"--tasks is missing: name the source of tasks of {family.name}")
    return family.factory().tasks


def read_record(folder: Path) -> dict[str, Any]:
    """The contents of config.json of a learned optimizer's workdir or weights.

    Raises:
      UsageError: there is none, or it is another method's.
    """
    config = read_config(folder)
    if "rule" not in (config["learner"] or {}):
        raise UsageError(f"{folder} holds no learned optimizer: test it with experiments.evaluate")
    if "eval_every" not in (config["run"] or {}) or "name" not in config["tasks"]:
        raise UsageError(
            f"{folder} does not say how its rule was trained: restore its config.json from a copy"
        )
    return config


def recorded_components(folder: Path) -> dict[str, Any]:
    """Names and settings of the recorded components, by kind."""
    config = read_record(folder)
    return {**config["learner"], "tasks": config["tasks"], "optimizer": config["optimizer"]}


# ---- What the flags build.


class Experiment(NamedTuple):
    """Everything that meta-training and comparing a rule are made of."""

    rule: UpdateRule
    family: ProblemFamily
    estimator: Estimator
    learner: MetaLearner
    optimizer: optax.GradientTransformation
    problems: Callable[[str], Tasks]  # split -> tasks
    loop: LoopConfig
    config: dict[str, Any]  # the contents of config.json
    eval_chunk: int  # training runs of a validation or comparison vmapped at a time


def build_experiment(values: flags.FlagValues) -> Experiment:
    """Builds what the flags describe.

    Raises:
      UsageError: settings that a component does not have, or that do not fit each other.
    """
    chosen = {each.kind: each for each in choose({n: values[n].value for n in SELECTIONS})}
    recorded = read_record(Path(values.weights)) if values.weights else {"run": {}, "tasks": {}}
    run = run_record(values, recorded["run"])
    try:
        rule, family, estimator = (
            chosen[kind].component.factory(**given_settings(values, chosen[kind]))
            for kind in _PARTS
        )
        optimizer = registry.build_optimizer(
            chosen["optimizer"].component,
            run["steps"],
            given_settings(values, chosen["optimizer"]),
        )
        name = values.tasks or recorded["tasks"].get("name") or family.tasks
        source = _load_source(values, chosen["tasks"], name)
        problems = _problems(source, EpisodeSize(run["ways"], run["shots"], 1))
        tasks = problems("train")
        if isinstance(tasks.data, HostDataset):
            raise UsageError("a learned optimizer has no streams: use --tasks.placement=device")
        learner = learned_optimizer(
            family, rule, estimator, objective=tasks.objective, adjoint=run["adjoint"]
        )
        loop = LoopConfig(*(run[name] for name in LoopConfig._fields))
        loop.check()
        check_size(values, run, learner, tasks)
    except ValueError as error:
        raise UsageError(str(error)) from error
    records = {kind: _record(values, each) for kind, each in chosen.items()}
    parts = {kind: records[kind] for kind in _PARTS}
    learner = learner._replace(config={"name": "learned_optimizer", **parts})
    config = make_config(
        learner,
        tasks,
        source={**records["tasks"], "name": name},
        preprocessing=source.preprocessing,
        optimizer=records["optimizer"],
        run=run,
    )
    return Experiment(
        rule, family, estimator, learner, optimizer, problems, loop, config, values.eval_chunk
    )


def check_size(
    values: flags.FlagValues, run: Mapping[str, Any], learner: MetaLearner, tasks: Tasks
) -> None:
    """Refuses tasks of another kind, sizes that they do not have, and more than the memory holds.

    Args:
      values: Parsed flags.
      run: The record of the run.
      learner: The learner.
      tasks: Its tasks.

    Raises:
      UsageError: something does not fit.
    """
    shapes, key = runs.initial_shapes(learner, tasks), jax.random.key(0)
    jax.eval_shape(learner.loss, *shapes, runs.example_task(tasks), key)
    if tasks.objective.kind != "classification" and values["ways"].present:
        raise UsageError(f"--ways={values.ways} is of no use: these tasks have no classes")
    runs.check_episode_memory(tasks, {name: run[name] for name in ("ways", "shots")})
    for name in ("task_batch", "val_tasks"):
        runs.check_episodes(name, run[name])
    runs.check_episodes("test_tasks", values.test_tasks)


def run_record(values: flags.FlagValues, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run: what flags give, or the record has, or else the flags' defaults."""
    asked = {name: values[name] for name in _RUN}
    return {
        name: flag.value if flag.present or name not in recorded else recorded[name]
        for name, flag in asked.items()
    }


def _load_source(values: flags.FlagValues, chosen: Chosen, name: str) -> TaskSource:
    data_dir = runs.data_dir_setting(chosen.component, values.data_dir)
    return load_source(name, **given_settings(values, chosen), **data_dir)


def _problems(source: TaskSource, size: EpisodeSize) -> Callable[[str], Tasks]:
    # One query for each class: for those who want to ask a trained network; training does not.
    return lambda split: source.tasks(split, size, train=split == "train")


def _record(values: flags.FlagValues, chosen: Chosen) -> dict[str, Any]:
    settings = resolved_settings(chosen, given_settings(values, chosen))
    return {"name": chosen.component.name, **settings}


# ---- Training.


def train(experiment: Experiment, workdir: Path, given: set[str]) -> FitResult:
    """Trains from where the workdir stands.

    Args:
      experiment: Parts of the run, from `build_experiment`.
      workdir: The folder; it is claimed when nothing can be refused any more.
      given: Names of the flags that were given.

    Raises:
      UsageError: numbers that do not fit each other, or a workdir of another run.
    """
    learner, optimizer, run = experiment.learner, experiment.optimizer, experiment.config["run"]
    tasks, mesh = experiment.problems("train"), task_mesh(run["task_batch"])
    selection = last_loss_objective(tasks.objective)
    validate = make_validate(experiment) if run["eval_every"] else None
    try:
        outer_step = make_outer_step(
            learner,
            optimizer,
            tasks.sample,
            task_batch=run["task_batch"],
            task_chunk=run["task_chunk"],
            mesh=mesh,
        )
        initial = init_train_state(
            learner, optimizer, tasks, run["seed"], task_batch=run["task_batch"]
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    shapes, data = jax.eval_shape(lambda: initial.params), tasks.data
    if mesh is not None:
        initial, data = place(initial, data, mesh, per_task=True)
    with lock_workdir(workdir):
        processes.from_writer(
            lambda: records.claim_workdir(workdir, experiment.config, given, params=shapes)
        )
        result = fit(
            initial,
            make_train_loop(outer_step),
            data,
            config=experiment.loop,
            workdir=workdir,
            tasks_per_step=run["task_batch"],
            validate=validate,
            objective=selection,
            learner_config=learner.config,
            keep_state=False,
        )
        if processes.is_writer():
            curve = workdir / "learning_curve.png"
            pictures.learning_curve(read_metrics(workdir), curve, objective=selection)
        return result


def make_validate(experiment: Experiment) -> Callable[[TrainState], dict[str, float]]:
    """Builds the validation: means over the same training runs at every call.

    Unlike `training.evaluation.make_validate` it runs many at a time, for they are small.
    """
    curves = make_training_curves(
        experiment.family,
        experiment.rule,
        experiment.problems("val"),
        steps=experiment.estimator.horizon,
        num_tasks=experiment.config["run"]["val_tasks"],
        task_chunk=experiment.eval_chunk,
    )

    def validate(train_state: TrainState) -> dict[str, float]:
        # fold_in(0) is theirs alone.
        losses = curves(
            processes.local(train_state.params), jax.random.fold_in(jax.random.key(0), 0)
        )
        return {"loss": float(losses.mean()), "last_loss": float(losses[:, -1].mean())}

    return validate


# ---- Comparing.


class Compared(NamedTuple):
    """One optimizer of a comparison."""

    scores: list[MeanCI]  # loss after the first step, after the second, and so on
    learning_rate: float | None  # the tuned one; None for the learned rule


def compare(
    experiment: Experiment, meta: PyTree, *, steps: int, num_tasks: int, seed: int
) -> dict[str, Compared]:
    """Compares a learned rule with hand-designed ones, whose rates training problems tuned.

    Args:
      experiment: Parts of the run, from `build_experiment`.
      meta: Meta-parameters of the rule.
      steps: Inner steps.
      num_tasks: Training runs of each optimizer, and of each learning rate.
      seed: Seed of the problems.

    Returns:
      What was found on test problems, by the optimizer's name.
    """
    family, train, test = (experiment.family, *map(experiment.problems, ("train", "test")))
    sizes = {"steps": steps, "num_tasks": num_tasks, "task_chunk": experiment.eval_chunk}
    tuning_key, test_key = jax.random.split(jax.random.key(seed))

    def scores(rule: UpdateRule, meta: PyTree) -> list[MeanCI]:
        losses = make_training_curves(family, rule, test, **sizes)(meta, test_key)
        return [confidence_interval(after_step) for after_step in np.asarray(losses).T]

    name = experiment.config["learner"]["rule"]["name"]
    found = {name: Compared(scores(experiment.rule, meta), None)}
    for name, make in HAND_DESIGNED.items():
        rate = tune_learning_rate(make(), family, train, tuning_key, **sizes).learning_rate
        rule = with_learning_rate(make(), rate)
        found[name] = Compared(scores(rule, {"learning_rate": rate}), rate)
    return found


def result(
    experiment: Experiment, compared: Mapping[str, Compared], *, steps: int, num_tasks: int
) -> dict[str, Any]:
    """The contents of result.json.

    Raises:
      RunError: the learned rule's loss is not finite.
    """
    losses = {
        name: {**each.scores[-1]._asdict(), "learning_rate": each.learning_rate}
        for name, each in compared.items()
    }
    for name, each in compared.items():
        if not np.isfinite(each.scores[-1].mean):
            raise RunError(f"the loss of {name} is not finite after {steps} steps: give fewer")
    config = experiment.config
    return {
        **{kind: config["learner"][kind] for kind in ("rule", "family")},
        "tasks": config["tasks"],
        **{name: config["run"][name] for name in ("ways", "shots")},
        "split": "test",
        "steps": steps,
        "num_tasks": num_tasks,
        "losses": losses,
    }


def lines(compared: Mapping[str, Compared], steps: int) -> list[str]:
    """What a comparison found, for people: one line for each optimizer."""
    found = []
    for name, (scores, rate) in compared.items():
        at = "" if rate is None else f", learning rate {rate:.2g}"
        mean, ci95 = scores[-1]
        found.append(f"{name}: loss {mean:.4f} ± {ci95:.4f} after {steps} steps{at}")
    return found


# ---- The binary.


def main(arguments: list[str]) -> None:
    """Trains unless there are weights, and compares."""
    del arguments
    if bool(FLAGS.workdir) == bool(FLAGS.weights):
        raise UsageError("give either --workdir, to train in, or --weights, to compare alone")
    folder = local_path(FLAGS.workdir or FLAGS.weights)
    output = output_file(FLAGS.output) if FLAGS.output and processes.is_writer() else None
    experiment = build_experiment(FLAGS)
    if FLAGS.workdir:
        trained = train(experiment, folder, records.given_flags(FLAGS))
        if trained.finished:
            report(experiment, folder, averaged_params(trained.train_state), output)
        return
    if not read_record(folder)["run"]["eval_every"]:
        raise UsageError(f"the run of {folder} had no validation, so it left no best checkpoint")
    report(experiment, folder, None, output)


def report(
    experiment: Experiment, folder: Path, latest: PyTree | None, output: Path | None
) -> None:
    """Compares the rule with tuned ones; writes and prints what is found.

    Args:
      experiment: Parts of the run, from `build_experiment`.
      folder: The workdir, or the folder of weights.
      latest: The meta-parameters after the last step, which are compared where a run has no
        validation; None for weights.
      output: File of the result; by default result.json in a workdir, and none beside weights.
    """
    if latest is None or experiment.loop.eval_every:
        meta = processes.from_writer(lambda: _best(experiment, folder))
    else:
        meta = processes.local(latest)
    steps = FLAGS.test_steps or experiment.estimator.horizon
    sizes = {"steps": steps, "num_tasks": FLAGS.test_tasks}
    compared = compare(experiment, meta, **sizes, seed=FLAGS.test_seed)
    found = result(experiment, compared, **sizes)
    print("\n".join(lines(compared, steps)))
    path = output or (folder / "result.json" if FLAGS.workdir else None)
    if path is not None and processes.is_writer():
        curves = {name: each.scores for name, each in compared.items()}
        pictures.loss_curves(curves, path.with_suffix(".png"))
        write_text(path, json.dumps(found, indent=1) + "\n")


def _best(experiment: Experiment, folder: Path) -> PyTree:
    """The meta-parameters that validation chose."""
    recorded, ours = (config["learner"] for config in (read_record(folder), experiment.config))
    if recorded["rule"] != ours["rule"]:
        raise UsageError(
            f"{folder} holds a rule with other settings ({recorded['rule']}): leave --rule out, a "
            "comparison changes its problems alone"
        )
    example = runs.example_task(experiment.problems("train"))
    like = meta_like(experiment.rule, experiment.family, example)
    best = folder / "checkpoints" / "best"
    return checkpoints.restore(best, {"params": like}, config=recorded)[0]["params"]


if __name__ == "__main__":
    define_flags(FLAGS)
    run_main(main, selections=SELECTIONS, choose=choose)
