"""Meta-trains a learner, resumes where it stopped, and tests it on classes it has never seen.

    python -m experiments.train --workdir=runs/glyphs
    python -m experiments.train --workdir=runs/five --seeds=5
    python -m experiments.train --init_from=runs/glyphs --tasks=folder:PATH
    python -m experiments.train --learner=maml --help
    python -m experiments.train --flagfile=experiments/flagfiles/prototypical_omniglot.flags

A run that was stopped (exit status 130) goes on with the same command.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh

from experiments import records, reports, run_flags, runs, seed_reports, several_processes, testing
from experiments.command_line import run_main
from experiments.reports import Result
from experiments.testing import Asked, Tested
from experiments.trials import draw_trials
from meta_jax.core import Array, MetaLearner, PyTree, Tasks
from meta_jax.data.streams import task_data
from meta_jax.lookup import UsageError, local_path
from meta_jax.precision import record_precision
from meta_jax.ranges import LARGEST_INT
from meta_jax.shapes import shape_difference
from meta_jax.training import pictures, processes
from meta_jax.training.checkpoints import latest_step
from meta_jax.training.evaluation import make_validate
from meta_jax.training.lock import lock_workdir
from meta_jax.training.loop import FitResult, Validate, fit
from meta_jax.training.outer_step import (
    TrainState,
    init_train_state,
    make_outer_step,
    place,
    task_mesh,
    training_data,
)
from meta_jax.training.record import read_config
from meta_jax.training.train_loop import TrainLoop, make_train_loop
from meta_jax.training.trained import Trained, load, load_parameters
from meta_jax.training.writers import read_metrics, write_text

FLAGS = flags.FLAGS
_STOPPED = 130  # as a shell has it for Ctrl-C
_DRAWN_POINTS = 150  # of a function, where the tasks give any number


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this binary, but for the settings of its components."""
    run_flags.define_run_flags(values)
    run_flags.define_test_flags(values)
    several_processes.define_flags(values)
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder where everything is written; an old one is resumed. By default runs/LEARNER_TASKS, "
        "or with a number where that holds another run.",
        values,
    )
    flags.DEFINE_integer(
        "val_chunk",
        None,
        "Episodes of a validation that a device evaluates at a time, which changes memory and time "
        "alone; by default --eval_chunk.",
        1,
        LARGEST_INT,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "seeds",
        1,
        "Trainings, from --seed on, each in a folder of the workdir; with several, their mean and "
        "spread are reported.",
        1,
        LARGEST_INT,
        flag_values=values,
    )


class Program(NamedTuple):
    """What is compiled, once for all seeds, and where training begins."""

    train_loop: TrainLoop
    validate: Validate | None  # None without validations
    test: Callable[[PyTree, PyTree], Tested]
    data: PyTree
    mesh: Mesh | None  # the devices that share the tasks of a step, or else the images of its one
    untrained: TrainState
    start: TrainState  # the same, but where --init_from names weights


def main(arguments: list[str]) -> int:
    """Trains, validates, tests; everything it finds out is in the workdir.

    Returns:
      The exit status: 0, or 130 where training was stopped by a signal.
    """
    del arguments
    # Everything that can be refused is refused before anything is written.
    run = runs.build_run(FLAGS, runs.load_tasks(FLAGS))
    asked = Asked(
        "test", FLAGS.eval_episodes, chunk=FLAGS.eval_chunk, query_chunk=FLAGS.query_chunk
    )
    runs.check_episodes("eval_episodes", asked.episodes)
    check_seeds(FLAGS.seed, FLAGS.seeds)
    try:
        program = build_program(run, asked, val_chunk=FLAGS.val_chunk)
    except ValueError as error:
        raise UsageError(str(error)) from error
    given = records.given_flags(FLAGS)
    config = run.config if FLAGS.seeds == 1 else records.with_seeds(run.config, FLAGS.seeds)
    workdir = choose_workdir(FLAGS.workdir, config, given)
    if FLAGS.seeds == 1:
        program = start_from_weights(run, program, [workdir])
        result = train_and_test(run, program, workdir, asked, given)
        return _STOPPED if result is None else 0
    folders = {seed: workdir / f"seed_{seed}" for seed in records.seeds_of(config)}
    program = start_from_weights(run, program, list(folders.values()))
    with lock_workdir(workdir):
        processes.from_writer(lambda: records.claim_workdir(workdir, config, given))
        finished = train_seeds(run, program, folders, asked, given)
    return 0 if finished else _STOPPED


def check_seeds(first: int, number: int) -> None:
    """Refuses seeds that have no 32 bits.

    Raises:
      UsageError: the last of them is too large.
    """
    if first + number - 1 > LARGEST_INT:
        raise UsageError(
            f"--seed={first} and --seeds={number} reach beyond {LARGEST_INT}: choose smaller ones"
        )


def choose_workdir(name: str | None, config: dict[str, Any], given: Collection[str]) -> Path:
    """The folder that a flag names, or one by the learner and the tasks, which is printed."""
    if name:
        return local_path(name)
    workdir, why = processes.from_writer(lambda: records.default_workdir(config, given))
    print(f"workdir {workdir} ({why})")
    return workdir


# ---- What is compiled, and where it begins.


def build_program(run: runs.Run, asked: Asked, *, val_chunk: int | None = None) -> Program:
    """Everything that a run compiles, and its first state, on all devices that share the work.

    Args:
      run: The run.
      asked: What its test asks.
      val_chunk: Episodes of a validation that a device evaluates at a time; as in the test if None.

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
    mesh = mesh or run.image_mesh
    _check_sharing(task_batch, mesh)
    untrained = untrained_state(run, settings["seed"], mesh)
    check_functions(run, untrained)
    data = training_data(run.training, task_batch=task_batch, mesh=mesh)
    if mesh is not None:
        _, data = place(untrained, data, mesh, per_task=run.learner.state_scope == "task")
    tested = testing.answering_in_chunks(run.learner, run.testing, asked.query_chunk)
    test = testing.make_test(tested, run.testing, asked)
    validate = _build_validation(run, tested, val_chunk or asked.chunk)
    loop = make_train_loop(outer_step)
    return Program(loop, validate, test, data, mesh, untrained, untrained)


def _check_sharing(task_batch: int, mesh: Mesh | None) -> None:
    """Refuses a step that several processes cannot share: each would do all of it."""
    count = jax.process_count()
    owners = {d.process_index for d in mesh.devices.flat} if mesh is not None else {0}
    if len(owners) < count:
        raise UsageError(
            f"{count} processes cannot share --task_batch={task_batch} evenly: give a multiple of "
            f"{count}, or start fewer processes"
        )


def check_functions(run: runs.Run, initial: TrainState) -> None:
    """Refuses, before anything is written, a learner whose functions do not fit the tasks.

    Raises:
      ValueError: shapes that do not fit, or no metric of the objective's name.
    """
    params, state = jax.eval_shape(lambda: (initial.params, initial.state))
    if run.learner.state_scope == "task":
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    task, key = runs.example_task(run.training), jax.random.key(0)
    jax.eval_shape(run.learner.loss, params, state, task, key)
    metrics = jax.eval_shape(run.learner.evaluate, params, state, task, key)
    wanted = run.training.objective.metric
    if wanted not in metrics and not any(name.startswith("instance_") for name in metrics):
        raise UsageError(
            f"a test gives {', '.join(metrics)}, and the objective's metric is '{wanted}': "
            "let the objective's loss return it"
        )


def _build_validation(run: runs.Run, tested: MetaLearner, chunk: int | None) -> Validate | None:
    if run.validation is None:
        return None
    episodes = run.config["run"]["val_episodes"]
    mesh = task_mesh(episodes)
    return make_validate(tested, run.validation, episodes=episodes, mesh=mesh, chunk=chunk)


def untrained_state(run: runs.Run, seed: int, mesh: Mesh | None) -> TrainState:
    """The state before the first step under a seed."""
    task_batch = run.config["run"]["task_batch"]
    initial = init_train_state(
        run.learner, run.optimizer, run.training, seed, task_batch=task_batch
    )
    return _placed(run, initial, mesh)


def _placed(run: runs.Run, train_state: TrainState, mesh: Mesh | None) -> TrainState:
    if mesh is None:
        return train_state
    return place(train_state, (), mesh, per_task=run.learner.state_scope == "task")[0]


def start_from_weights(run: runs.Run, program: Program, folders: Sequence[Path]) -> Program:
    """Puts the weights that --init_from names where training starts.

    Where they are of another learner with the same network, the network's alone are taken, and a
    line says so. They are not read any more where every folder has a checkpoint to go on from.

    Args:
      run: The run.
      program: What it compiles.
      folders: Where it trains.

    Raises:
      UsageError: there are no such weights, or their parameters have another structure.
    """
    folder = run.config["run"]["init_from"]
    if folder is None or processes.from_writer(lambda: _all_go_on(folders)):
        return program
    weights = fitting_weights(run, program, load_weights(folder), folder)
    return program._replace(start=with_weights(run, program, weights))


def _all_go_on(folders: Sequence[Path]) -> bool:
    """Whether every folder has a checkpoint."""
    return all(latest_step(each / "checkpoints") is not None for each in folders)


def load_weights(folder: str) -> Trained:
    """The weights of a folder: the best on validation, the latest where there was none.

    Raises:
      UsageError, CheckpointError: there are none, or they are damaged.
    """
    recorded = read_config(folder)["run"] or {}
    # Folders that were written from Python have the best alone, and may not say how they trained.
    return load(folder, checkpoint="best" if recorded.get("eval_every", 1) else "latest")


def fitting_weights(run: runs.Run, program: Program, weights: Trained, folder: str) -> Trained:
    """The weights as a run can start from them: all of them, or those of the same network alone.

    Raises:
      UsageError: neither fits.
    """
    difference = _difference(run, weights) or _other_network(run, weights)
    if not difference:
        return weights
    names = [_names(config) for config in (weights.config, run.config)]
    if _has_same_network(run, weights):
        taken = with_network(program.untrained, weights)
        if not _difference(run, taken):
            print(f"{folder}: the network of {names[0]} is taken; the rest of {names[1]} is new")
            return taken
    raise UsageError(
        f"--init_from={folder} holds weights of {names[0]}, which do not fit {names[1]} "
        f"({difference}): give the learner, the network and the input size of the weights"
    )


def _difference(run: runs.Run, weights: Trained) -> str:
    """Where the structure or the shapes of weights are not those of a run; empty if nowhere."""
    params, state = runs.initial_shapes(run.learner, run.training)
    ours, theirs = {"params": params}, {"params": weights.params}
    if _takes_state(run, weights):
        ours["state"], theirs["state"] = state, weights.state
    return shape_difference(theirs, ours)


def _other_network(run: runs.Run, weights: Trained) -> str:
    """How networks of equal shapes differ, but for their normalisation; empty if nowhere."""
    theirs, ours = _network_records(run, weights)
    if not theirs or not ours:  # one that was built in Python
        return ""
    names = sorted((theirs.keys() & ours.keys()) - {"normalisation"})
    return ", ".join(
        f"{name}={theirs[name]} and {name}={ours[name]} of the network"
        for name in names
        if theirs[name] != ours[name]
    )


def _has_same_network(run: runs.Run, weights: Trained) -> bool:
    """Whether both records name the same network with the same settings."""
    theirs, ours = _network_records(run, weights)
    return theirs is not None and theirs == ours and "network" in _parts(weights.params)


def _network_records(run: runs.Run, weights: Trained) -> list[Any]:
    """The records of both networks, whose precision may differ."""
    found = [(config["learner"] or {}).get("network") for config in (weights.config, run.config)]
    return [network and record_precision(network, "float32") for network in found]


def with_network(untrained: TrainState, weights: Trained) -> Trained:
    """Weights with the parameters and the state of their network in what is untrained."""

    # A learner's state is its network's, or has it as a part.
    state = _parts(weights.state).get("network", weights.state)
    if "network" in _parts(untrained.state):
        state = {**untrained.state, "network": state}
    params = {**_parts(untrained.params), "network": weights.params["network"]}
    return weights._replace(params=params, state=state)


def _parts(tree: PyTree) -> dict[str, PyTree]:
    return tree if isinstance(tree, dict) else {}


def _takes_state(run: runs.Run, weights: Trained) -> bool:
    """Whether the state comes with the weights; one of scope 'task' is of tasks trained on."""
    return run.learner.state_scope == weights.learner.state_scope == "shared"


def _names(config: Any) -> str:
    learner = config["learner"] or {}
    network = learner.get("network") or {}
    named = str(learner.get("name"))
    return f"{named} with {network['name']}" if "name" in network else named


def with_weights(run: runs.Run, program: Program, weights: Trained) -> TrainState:
    """The state before the first step with other parameters, and the learner's state with them."""
    start = program.untrained._replace(params=weights.params)
    if _takes_state(run, weights):
        start = start._replace(state=weights.state)
    start = start._replace(opt_state=jax.jit(run.optimizer.init)(start.params))
    return _placed(run, start, program.mesh)


# ---- Training and testing.


def train_and_test(
    run: runs.Run, program: Program, workdir: Path, asked: Asked, given: Collection[str]
) -> Result | None:
    """Trains one seed and tests it; None where it was stopped."""
    with lock_workdir(workdir):
        params = runs.initial_shapes(run.learner, run.training)[0]
        processes.from_writer(
            lambda: records.claim_workdir(workdir, run.config, given, params=params)
        )
        fitted = train(run, program, workdir)
        return report(run, program, fitted, workdir, asked) if fitted.finished else None


def train_seeds(
    run: runs.Run,
    program: Program,
    folders: dict[int, Path],
    asked: Asked,
    given: Collection[str],
) -> bool:
    """Trains the seeds that are not finished, and reports the mean and spread of all.

    Returns:
      Whether all are finished now.
    """
    found = {}
    for seed, folder in folders.items():
        one = run._replace(config=records.with_seed(run.config, seed))
        record = processes.from_writer(
            functools.partial(
                records.finished_result, folder, one.config, given, episodes=asked.episodes
            )
        )
        if record is None:
            print(f"seed {seed}, in {folder}")
            untrained = untrained_state(run, seed, program.mesh)
            seeded = program._replace(untrained=untrained, start=untrained)
            # The weights are the same under every seed; the tasks, and what is new, are not.
            seeded = start_from_weights(one, seeded, [folder])
            result = train_and_test(one, seeded, folder, asked, given)
            if result is None:
                return False
            record = result.record
        found[seed] = record
    whole = seed_reports.over_seeds(found, run.training.objective)
    if processes.is_writer():
        workdir = folders[min(folders)].parent
        write_text(workdir / "result.json", json.dumps(whole, indent=1) + "\n")
    print(seed_reports.seeds_line(whole, run.training.objective))
    return True


def train(run: runs.Run, program: Program, workdir: Path) -> FitResult:
    """Trains from where the workdir stands."""
    fitted = fit(
        program.start,
        program.train_loop,
        program.data,
        config=run.loop,
        workdir=workdir,
        tasks_per_step=run.config["run"]["task_batch"],
        validate=program.validate,
        objective=run.training.objective,
        learner_config=run.learner.config,
    )
    if processes.is_writer():
        _draw_curve(run, workdir)
    return fitted


def _draw_curve(run: runs.Run, workdir: Path) -> None:
    lines = read_metrics(workdir)
    if lines:  # somebody may have deleted the file of a finished run
        path = workdir / "learning_curve.png"
        pictures.learning_curve(lines, path, objective=run.training.objective)


def report(
    run: runs.Run, program: Program, fitted: FitResult, workdir: Path, asked: Asked
) -> Result:
    """Tests the checkpoint that validation chose, beside what is untrained; writes and prints."""
    params, state, _ = processes.from_writer(
        lambda: load_parameters(
            workdir,
            "latest" if run.validation is None else "best",
            learner=run.learner,
            example=runs.example_task(run.training),
        )
    )
    test = program.test
    found = reports.result(run.config, test(params, state), asked, seconds=fitted.seconds)
    beside = {"untrained": test(program.untrained.params, program.untrained.state)}
    if not found.tested.instances:
        beside |= testing.test_baselines(run.source, run.testing, asked)
    if processes.is_writer():
        _write_report(run, (params, state), found, beside, workdir)
    return found


def _write_report(
    run: runs.Run, learned: tuple, found: Result, beside: dict[str, Tested], workdir: Path
) -> None:
    """Draws what can be drawn, writes the results and prints them."""
    text = f"{reports.line(found)}; untrained network {beside['untrained'].text()}"
    if found.tested.instances:
        text += "\n" + _report_instances(found.tested, beside["untrained"], workdir)
    else:
        text += reports.beside_text({n: t for n, t in beside.items() if n != "untrained"})
    if run.testing.objective.kind == "control":
        draw_trials(run.learner, learned, run.testing, workdir)
    else:
        _draw_episode(run, learned, workdir / "episode.png")
    scores = {
        name: tested.score._asdict()
        | {"metrics": {metric: list(score) for metric, score in tested.metrics.items()}}
        for name, tested in beside.items()
    }
    write_text(workdir / "baselines.json", json.dumps(scores, indent=1) + "\n")
    write_text(workdir / "result.json", json.dumps(found.record, indent=1) + "\n")
    print("\n".join([text, *(f"note: {note}" for note in run.source.notes)]))


def _report_instances(tested: Tested, untrained: Tested, workdir: Path) -> str:
    """Draws the metric at each instance of a class, and returns it as a table."""
    curves = {"trained": tested.instances, "untrained": untrained.instances}
    pictures.instance_curve(curves, workdir / "instances.png")
    return reports.instance_table(curves)


def _draw_episode(run: runs.Run, learned: tuple, path: Path) -> None:
    """Draws a test episode with the learner's answers, where it can be drawn."""
    if runs.example_inputs(run.testing) is None:
        return
    # Numbers and images can be drawn; other inputs have no picture.
    with contextlib.suppress(ValueError):
        if run.testing.exact_answers:
            # Such functions are drawn at as many points as are asked for.
            size = runs.test_size(run.config["run"])._replace(queries=_DRAWN_POINTS)
            tasks = run.source.tasks("test", size, train=False)
            pictures.functions_picture(_answered(run.learner, learned, tasks, 3), path)
        else:
            (drawn,) = _answered(run.learner, learned, run.testing, 1)
            pictures.episode_picture(drawn.episode, drawn.predictions, path)


def _answered(
    learner: MetaLearner, learned: tuple, tasks: Tasks, number: int
) -> list[pictures.DrawnFunction]:
    """Episodes, the learner's answers, and the exact ones where they are known."""
    exact = next(iter(tasks.exact_answers.values()), None)

    @jax.jit
    def answer(learned: tuple, data: PyTree, key: Array) -> pictures.DrawnFunction:
        keys = jax.random.split(key, 3)
        episode, best = exact(keys[0], data) if exact else (tasks.sample(keys[0], data), None)
        params, state = learned
        adapted = learner.adapt(params, state, episode.support, keys[1], train=False)
        outputs, _ = learner.predict(params, adapted, episode.query.x, keys[2], train=False)
        return pictures.DrawnFunction(episode, outputs, best)

    found: list[pictures.DrawnFunction] = []
    for key in map(jax.random.key, range(number)):
        data = task_data(tasks.sample, tasks.data, jax.random.split(key, 3)[0])
        found.append(answer(learned, data, key))
    return found


if __name__ == "__main__":
    define_flags(FLAGS)
    run_main(main, selections=run_flags.SELECTIONS, choose=run_flags.choose)
