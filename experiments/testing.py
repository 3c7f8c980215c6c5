"""Testing a trained learner, and what is reported: a line for people, keys for programs."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import protocols, runs
from experiments.command_line import RunError
from meta_jax import registry
from meta_jax.core import (
    Episode,
    MetaLearner,
    Objective,
    PyTree,
    Sample,
    Tasks,
    supervised_evaluate,
    supervised_loss,
)
from meta_jax.data.dataset import DataError
from meta_jax.data.omniglot import seen_characters
from meta_jax.data.omniglot_trials import load_trials
from meta_jax.data.source import EpisodeSize, TaskSource, find_source, load_source
from meta_jax.lookup import UsageError, local_path
from meta_jax.networks.normalisation import is_transductive, support_moments
from meta_jax.shapes import shape_difference
from meta_jax.training import trained
from meta_jax.training.evaluation import (
    MeanCI,
    confidence_interval,
    evaluate_each,
    in_query_chunks,
    make_evaluate,
)
from meta_jax.training.outer_step import task_mesh
from meta_jax.training.record import read_config

_SPLITS = ("train", "val", "test", "trainval")
_INSTANCE = "instance_"  # what begins the metrics of the sequence protocol
Settings = Mapping[str, Mapping[str, Any]]  # by component: 'learner', 'network', 'tasks'


class Asked(NamedTuple):
    """What a test asks: which episodes, and how many."""

    split: str = "test"
    episodes: int = 1000
    seed: int = 0
    chunk: int | None = None  # episodes that a device evaluates at a time; the result is the same
    query_chunk: int | None = None  # queries answered at a time, likewise; all if None


class Tested(NamedTuple):
    """What a test found."""

    objective: Objective
    metrics: dict[str, MeanCI]  # over episodes; shares are in per cent

    @property
    def score(self) -> MeanCI:
        """The metric that a result reports."""
        return self.metrics[self.objective.metric]

    @property
    def instances(self) -> tuple[MeanCI, ...]:
        """By the sequence protocol, the metric at the 1st, 2nd, ... instance of a class."""
        names = [f"{_INSTANCE}{i + 1}" for i in range(len(self.metrics))]
        return tuple(self.metrics[name] for name in names if name in self.metrics)

    def text(self) -> str:
        """The score as people read it."""
        return score_text(self.score, self.objective)


class Result(NamedTuple):
    """What a test found, and the contents of its result.json."""

    tested: Tested
    record: dict[str, Any]
    beside: Mapping[str, Tested] = {}  # exact answers to the same episodes, by name
    notes: tuple[str, ...] = ()  # what a reader should know of it


def make_test(
    learner: MetaLearner, tasks: Tasks, asked: Asked
) -> Callable[[PyTree, PyTree], Tested]:
    """Builds a test that is compiled once, on episodes drawn from a fixed seed.

    The same seed gives the same episodes to every learner and every time.

    Args:
      learner: The method.
      tasks: Tasks of the test.
      asked: Split, number and seed of the episodes.

    Returns:
      A function (params, state) -> what was found.
    """
    mesh = task_mesh(asked.episodes)
    evaluate = make_evaluate(
        learner, tasks.sample, episodes=asked.episodes, mesh=mesh, chunk=asked.chunk
    )
    key = jax.random.fold_in(jax.random.key(asked.seed), _split_number(asked.split))

    def test(params: PyTree, state: PyTree) -> Tested:
        return _tested(tasks.objective, evaluate(params, state, tasks.data, key))

    return test


def _tested(objective: Objective, metrics: Mapping[str, np.ndarray]) -> Tested:
    """What a test found, from the metrics of each episode."""
    scores = {
        name: confidence_interval(_factor(name, objective) * values)
        for name, values in metrics.items()
    }
    return Tested(objective, scores)


def _split_number(split: str) -> int:
    if split in _SPLITS:
        return 1 + _SPLITS.index(split)
    return zlib.crc32(split.encode())


def _factor(metric: str, objective: Objective) -> int:
    """What a metric is multiplied by: shares are reported in per cent."""
    is_share = metric == objective.metric or metric.startswith(_INSTANCE)
    return 100 if objective.unit == "%" and is_share else 1


def test_baselines(source: TaskSource, tasks: Tasks, asked: Asked) -> dict[str, Tested]:
    """Tests what is shown beside a result: learners without training, and exact answers.

    Args:
      source: Source, which names the learners.
      tasks: Tasks of the test, which know their exact answers.
      asked: Split, number and seed of the episodes.
    """
    found = {}
    for name in source.baselines:
        factory = registry.find("learner", name).factory
        takes_objective = "objective" in registry.parameters(factory)
        learner = factory(**({"objective": tasks.objective} if takes_objective else {}))
        like = jax.eval_shape(learner.init, jax.random.key(0), runs.example_task(tasks))
        params, state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        found[name] = make_test(learner, tasks, asked)(params, state)
    return found | test_exact_answers(tasks, asked)


def test_exact_answers(tasks: Tasks, asked: Asked) -> dict[str, Tested]:
    """Tests the exact answers of tasks that know them, on the episodes of a learner's test."""
    repeats = _repeater(tasks.objective)
    return {
        name: make_test(repeats, tasks._replace(sample=_with_answers(answered)), asked)({}, {})
        for name, answered in tasks.exact_answers.items()
    }


def _with_answers(answered: Sample) -> Sample:
    """Draws episodes whose queries are their own answers."""

    def sample(key: jax.Array, data: PyTree, /) -> Episode:
        (support, query), outputs = answered(key, data)
        return Episode(support, query._replace(x=outputs))

    return sample


def _repeater(objective: Objective) -> MetaLearner:
    """The learner that answers a query with the query."""

    def adapt(
        params: PyTree, state: PyTree, support: Any, key: jax.Array, *, train: bool
    ) -> PyTree:
        return state

    def predict(
        params: PyTree,
        adapted: PyTree,
        x: PyTree,
        key: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        return x, adapted

    return MetaLearner(
        lambda key, task: ({}, {}),
        adapt,
        predict,
        supervised_loss(adapt, predict, objective),
        supervised_evaluate(adapt, predict, objective),
    )


# ---- What is reported.


def result(
    config: Mapping[str, Any],
    tested: Tested,
    asked: Asked,
    *,
    size: EpisodeSize | None = None,
    tasks: str | None = None,
    seconds: float,
    protocol: str | None = None,
) -> Result:
    """Builds the result of a test; accuracy and ci95 are in per cent.

    Args:
      config: Record of the run, the learner's as it was tested.
      tested: Result of the test.
      asked: Split, number of episodes and seed of the test.
      size: Size of the episodes, where it is not the run's.
      tasks: Name of the tasks, if not the run's.
      seconds: Duration of the training.
      protocol: Name of the test's protocol, where there is one.

    Raises:
      RunError: what was found is not finite.
    """
    run, metric = config["run"], tested.objective.metric
    ways, shots, queries = _reported_size(tested.objective, size or runs.test_size(run))
    _check_finite(tested, asked.split)
    mode = trained.normalisation_of(config["learner"])
    # In a sequence, moments of the support set are those of inputs yet to come.
    peeks = bool(tested.instances) and support_moments(mode, train=False) != "stored"
    record = {
        "learner": config["learner"]["name"],
        "tasks": tasks or config["tasks"]["name"],
        "split": asked.split,
        "ways": ways,
        "shots": shots,
        "queries": queries,
        "episodes": asked.episodes,
        metric: _rounded(tested.score.mean),
        "ci95": _rounded(tested.score.ci95),
        "normalisation": mode,
        "transductive": is_transductive(mode) or peeks,
        "steps": run["steps"],
        "seed": run["seed"],
        "seconds": round(seconds, 1),
        "metrics": {name: [*map(_rounded, score)] for name, score in tested.metrics.items()},
        **({} if protocol is None else {"protocol": protocol}),
    }
    return Result(tested, record)


def _reported_size(
    objective: Objective, size: tuple[int, int, int]
) -> tuple[int | None, int | None, int | None]:
    """Ways, shots and queries; None for trials, which have none of them."""
    return (None, None, None) if objective.kind == "control" else size


def _check_finite(tested: Tested, split: str) -> None:
    for name, (mean, ci95) in tested.metrics.items():
        reported = name == tested.objective.metric
        # The loss of a sure and wrong answer may be infinite; what is not a number is always wrong.
        if math.isnan(mean) or (reported and not math.isfinite(mean + ci95)):
            raise RunError(
                f"{split} {name} is {mean}, so there is no result: lower the learning rates, or "
                "clip gradients with --optimizer.clip_norm"
            )


def _rounded(value: float) -> float:
    return round(value, 4) if abs(value) >= 1 else float(f"{value:.4g}")


def score_text(score: MeanCI, objective: Objective) -> str:
    """A score as people read it."""
    if objective.unit == "%":
        return f"{score.mean:.2f} % ± {score.ci95:.2f}"
    return f"{score.mean:.3f} ± {score.ci95:.3f}"


def line(found: Result) -> str:
    """The one human-readable line of a result."""
    tested, record = found.tested, found.record
    on = _measured_on(record, tested.objective, instances=len(tested.instances))
    return f"{record['split']} {tested.objective.metric} {tested.text()} ({on})"


def beside_text(beside: Mapping[str, Tested]) -> str:
    """What stands behind the line of a result: the scores of others on the same episodes."""
    return "".join(f"; {name.replace('_', ' ')} {t.text()}" for name, t in beside.items())


def _measured_on(
    record: Mapping[str, Any], objective: Objective, *, instances: int = 0, each: str = ""
) -> str:
    """What a result was measured on: the size and the number of episodes, or of trials."""
    if objective.kind == "control":
        return f"{record['episodes']} trials{each}"
    size = f"{record['shots']}-shot"
    if objective.kind == "classification":
        size = f"{record['ways']}-way {size}"
    if instances:
        size = f"sequences of {record['ways']} classes x {instances} instances"
    on = f"{size}, {record['episodes']} episodes{each}, normalisation {record['normalisation']}"
    return f"{on}, protocol {record['protocol']}" if "protocol" in record else on


def over_seeds(found: Mapping[int, Mapping[str, Any]], objective: Objective) -> dict[str, Any]:
    """Builds the result of several seeds from that of each: mean, spread and an interval.

    Args:
      found: Contents of result.json by seed, at least two.
      objective: What was asked.

    Returns:
      The keys of one result, in which the metric is its mean over seeds, `ci95` the half-width of
      Student's 95 % interval of that mean, and `metrics` likewise; besides, `std` (sample standard
      deviation over seeds) and `seeds`, the metric of each.
    """
    first = next(iter(found.values()))
    metric = objective.metric
    metrics = {
        name: [record["metrics"][name][0] for record in found.values()] for name in first["metrics"]
    }
    summary = {name: [*map(_rounded, seed_interval(v))] for name, v in metrics.items()}
    values = {str(seed): record[metric] for seed, record in found.items()}
    return {
        **first,
        metric: summary[metric][0],
        "ci95": summary[metric][1],
        "seconds": round(sum(record["seconds"] for record in found.values()), 1),
        "metrics": summary,
        "std": _rounded(float(np.std([*values.values()], ddof=1))),
        "seeds": values,
    }


def seed_interval(values: Sequence[float]) -> MeanCI:
    """Mean of one value for each seed, and the half-width of Student's 95 % interval of it.

    Args:
      values: [n], n at least 2.

    Examples:
      >>> mean, ci95 = seed_interval([1.0, 2.0, 3.0])
      >>> mean, round(ci95, 4)  # 4.3027 / sqrt(3), as s = 1
      (2.0, 2.4841)
    """
    from scipy import stats

    n, deviation = len(values), np.std(values, ddof=1)
    half = stats.t.ppf(0.975, n - 1) * deviation / np.sqrt(n)
    return MeanCI(float(np.mean(values)), float(half))


def seeds_line(record: Mapping[str, Any], objective: Objective) -> str:
    """The one human-readable line of a result over seeds."""
    score = MeanCI(record[objective.metric], record["ci95"])
    return (
        f"{record['split']} {objective.metric} {score_text(score, objective)} over "
        f"{len(record['seeds'])} seeds (standard deviation {record['std']:.2f}; "
        f"{_measured_on(record, objective, each=' each')})"
    )


def instance_table(curves: Mapping[str, Sequence[MeanCI]]) -> str:
    """The metric at the 1st, 2nd, ... instance of a class as lines of a table.

    Args:
      curves: By name, the scores.
    """
    count = max(map(len, curves.values()))
    rows = {"instance": [str(i + 1) for i in range(count)]}
    rows |= {name: [f"{score.mean:.1f}" for score in scores] for name, scores in curves.items()}
    width = max(map(len, rows))
    return "\n".join(
        f"{name:<{width}}" + "".join(f"{cell:>6}" for cell in cells) for name, cells in rows.items()
    )


# ---- A test from a folder.


def evaluate(
    folder: Path,
    asked: Asked,
    *,
    checkpoint: Literal["best", "latest"] = "best",
    size: Mapping[str, int] | None = None,
    tasks: str | None = None,
    settings: Settings | None = None,
    data_dir: str | None = None,
    protocol: str | None = None,
) -> Result:
    """Tests the learner of a workdir, or of shipped weights, which are a workdir in small.

    Args:
      folder: Holds config.json and checkpoints/.
      asked: Split, number and seed of the episodes.
      checkpoint: 'best' or 'latest'.
      size: Ways, shots and queries where they are not the run's.
      tasks: Name of other tasks than the run's.
      settings: Settings of learner, network and tasks that replace the run's.
      data_dir: Where the data lie.
      protocol: Name of a protocol, which chooses the tasks and their settings; the size and number
        of episodes are still the caller's.

    Raises:
      UsageError, CheckpointError: what is asked for cannot be had.
      RunError: the result is not finite.
    """
    settings, run = settings or {}, _tested_run(folder, checkpoint)
    if protocol is not None:
        tasks, settings = protocols.tasks_of(protocol, tasks, settings)
    wanted = runs.test_size(run)._replace(**(size or {}))
    try:
        loaded = _load(folder, checkpoint, settings)
        source = load_other_source(
            loaded.config["tasks"], tasks, settings.get("tasks", {}), data_dir
        )
        drawn = source.tasks(asked.split, wanted, train=False)
        check_fit(loaded, drawn)
    except ValueError as error:
        raise UsageError(str(error)) from error
    drawn = drawn._replace(objective=loaded.objective)
    test = make_test(_in_query_chunks(loaded, drawn, asked.query_chunk), drawn, asked)
    found = result(
        loaded.config,
        test(loaded.params, loaded.state),
        asked,
        size=wanted,
        tasks=tasks,
        seconds=_seconds(folder, checkpoint, loaded),
        protocol=protocol,
    )
    return found._replace(
        beside=test_exact_answers(drawn, asked),
        notes=_notes(loaded.config["tasks"], source.config or {}, asked.split),
    )


def _in_query_chunks(loaded: trained.Trained, tasks: Tasks, chunk: int | None) -> MetaLearner:
    """The learner, whose tests answer some queries at a time.

    Raises:
      UsageError: its answers depend on the other queries.
    """
    if chunk is None:
        return loaded.learner
    learner = in_query_chunks(loaded.learner, loaded.objective, chunk)
    arguments = (loaded.params, loaded.state, runs.example_task(tasks), jax.random.key(0))
    whole, chunked = (jax.eval_shape(one.evaluate, *arguments) for one in (loaded.learner, learner))
    if is_transductive(trained.normalisation_of(loaded.config["learner"])) or set(whole) != set(
        chunked
    ):
        name = loaded.config["learner"]["name"]
        raise UsageError(
            f"answers of {name} depend on the other queries of an episode: leave query_chunk out"
        )
    return learner


def evaluate_trials(
    folder: Path,
    path: str,
    *,
    checkpoint: Literal["best", "latest"] = "best",
    settings: Settings | None = None,
) -> Result:
    """Tests the learner of a workdir on the 400 official one-shot trials of Omniglot.

    Args:
      folder: Holds config.json and checkpoints/.
      path: all_runs.zip, or the folder of its runs.
      checkpoint: 'best' or 'latest'.
      settings: Settings of learner and network that replace the run's.

    Returns:
      The result, whose interval is that over the 20 runs.

    Raises:
      UsageError, CheckpointError: what is asked for cannot be had.
      RunError: the result is not finite.
    """
    _tested_run(folder, checkpoint)
    try:
        loaded = _load(folder, checkpoint, settings or {})
        form = recorded_settings(loaded.config["tasks"], "omniglot")
        form = {name: form[name] for name in ("image_size", "polarity") if name in form}
        trials = load_trials(path, **form)
        first = jax.tree.map(lambda leaf: leaf[0], trials)
        check_fit(loaded, Tasks(lambda key, data: data, first, loaded.objective))
    except ValueError as error:
        raise UsageError(str(error)) from error
    metrics = evaluate_each(loaded.learner, loaded.params, loaded.state, trials, jax.random.key(0))
    found = result(
        loaded.config,
        _tested(loaded.objective, metrics),
        Asked(episodes=trials.query.y.shape[0]),
        size=EpisodeSize(trials.query.y.shape[2], 1, 1),
        tasks="omniglot",
        seconds=_seconds(folder, checkpoint, loaded),
        protocol="lake, official trials",
    )
    return found._replace(notes=_notes(loaded.config["tasks"], {"split_rule": "lake"}, "test"))


def _tested_run(folder: Path, checkpoint: str) -> Mapping[str, Any]:
    """The record of a run of one seed that has the checkpoint."""
    run = read_config(folder)["run"]
    if "seeds" in run:
        one = folder / f"seed_{run['seed']}"
        raise UsageError(
            f"{folder} holds trainings of {run['seeds']} seeds: name one of them, such as {one}"
        )
    if checkpoint == "best" and not run["eval_every"]:
        raise UsageError(
            "the run had no validation, so no best checkpoint: use --checkpoint=latest"
        )
    return run


def _load(
    folder: Path, checkpoint: Literal["best", "latest"], settings: Settings
) -> trained.Trained:
    return trained.load(
        folder,
        checkpoint=checkpoint,
        learner_settings=settings.get("learner"),
        network_settings=settings.get("network"),
    )


def _seconds(folder: Path, checkpoint: Literal["best", "latest"], loaded: trained.Trained) -> float:
    """Duration of the training."""
    _, _, metadata = trained.load_parameters(folder, checkpoint, learner=loaded.learner)
    return metadata["seconds"]


def _notes(recorded: Mapping[str, Any], tested: Mapping[str, Any], split: str) -> tuple[str, ...]:
    """That classes of the test were trained on, where another rule of the split is tested."""
    trained_by, tested_by = recorded.get("split_rule"), tested.get("split_rule")
    if split != "test" or trained_by is None or tested_by is None:
        return ()
    seen = seen_characters(trained_by, tested_by)
    if not seen:
        return ()
    return (
        f"these weights were trained by split_rule={trained_by}, with {seen} of the characters "
        f"that split_rule={tested_by} tests: no result of characters never seen",
    )


def load_other_source(
    recorded: Mapping[str, Any],
    name: str | None,
    settings: Mapping[str, Any],
    data_dir: str | None,
) -> TaskSource:
    """The source of a test's tasks: the run's, or another that gives inputs of the same form.

    Args:
      recorded: Record of the run's tasks.
      name: Name of another source; None for the run's.
      settings: Settings that replace the run's.
      data_dir: Where the data lie.

    Raises:
      UsageError: an unknown source or setting, or data that is not there.
    """
    name = name or recorded["name"]
    component, argument = find_source(name)
    given = {
        **recorded_settings(recorded, name),
        **settings,
        **runs.data_dir_setting(component, data_dir),
    }
    try:
        return load_source(name, **given)
    except DataError as error:
        is_path = argument and "data_dir" not in registry.parameters(component.factory)
        if not is_path or name != recorded["name"] or local_path(argument).exists():
            raise
        kind = name.partition(":")[0]
        raise UsageError(
            f"{error}; the run was trained on it: if it was moved, give --tasks={kind}:NEWPATH"
        ) from error


def recorded_settings(recorded: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings that a run's record gives to the source of a test.

    Args:
      recorded: Record of the run's tasks.
      name: Name of the source. One of the same kind, such as another folder, gets all that it was
        trained with; others what makes an input: its size and channels.
    """
    parameters = registry.parameters(find_source(name)[0].factory).values()
    known = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    form = recorded["preprocessing"] or {}
    same_kind = _is_same_kind(name, recorded["name"])
    found = {**form, **(recorded if same_kind else {})}
    if found.get("grey") is None and "channels" in form:
        found["grey"] = form["channels"] == 1  # whatever colours the images of another set have
    if same_kind and "split_fractions" not in recorded:
        # The rule of random splits when this was recorded: no class that was trained on is tested.
        found["split_fractions"] = "0.64,0.16,0.2"
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in found.items()
        if key in known
    }


def _is_same_kind(name: str, other: str) -> bool:
    try:
        return find_source(name)[0].factory is find_source(other)[0].factory
    except UsageError:  # a source of somebody's own that is gone
        return False


def check_fit(loaded: trained.Trained, tasks: Tasks) -> None:
    """Refuses tasks that a trained learner cannot be tested on.

    Raises:
      UsageError: their objective is of another kind, or parameters would have other shapes.
    """
    config, kind = loaded.config, tasks.objective.kind
    name, run = config["learner"]["name"], config["run"]
    if kind != loaded.objective.kind:
        raise UsageError(
            f"{name} was trained for {loaded.objective.kind}, and these tasks ask for {kind}: "
            "name other tasks"
        )
    like = runs.initial_shapes(loaded.learner, tasks)
    difference = shape_difference((loaded.params, loaded.state), like)
    if difference:
        raise UsageError(
            f"{name} was trained with parameters that do not fit these tasks ({difference}): test "
            f"it on inputs as in training, and on {run['train_ways']} ways"
        )
