"""The training loop: exact resume from any interruption, selection of the best, stops."""

import os
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import Batch, Episode, Objective, Tasks
from meta_jax.host import OutOfMemoryError
from meta_jax.lookup import UsageError
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.flatten import flatten
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy, squared_error
from meta_jax.training import checkpoints, loop
from meta_jax.training.checkpoints import CheckpointError
from meta_jax.training.evaluation import make_validate
from meta_jax.training.loop import LoopConfig, TrainingDivergedError, fit, is_better
from meta_jax.training.optimizers import average_params, averaged_params
from meta_jax.training.outer_step import init_train_state, make_outer_step
from meta_jax.training.record import make_config, write_config
from meta_jax.training.train_loop import make_train_loop
from meta_jax.training.trained import load
from meta_jax.training.writers import read_metrics

CONFIG = LoopConfig(steps=17, log_every=2, eval_every=4, checkpoint_every=4)
OPTIMIZER = optax.adam(1e-2)
LEARNER = prototypical(mlp((4,)))


def sample(key, data):
    x = jax.random.normal(key, (6, 3)) + data
    y = jnp.tile(jnp.eye(3), (2, 1))
    return Episode(Batch(x[:3], y[:3]), Batch(x, y))


DATA = jnp.zeros(3)
TASKS = Tasks(sample, DATA, cross_entropy)
TRAIN = make_train_loop(make_outer_step(LEARNER, OPTIMIZER, sample, task_batch=2))


class TestExhaustedMemory:
    def exhausted(self, *arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    def test_a_step_names_its_dials_and_the_same_call_goes_on(self, tmp_path):
        def late(train_state, *arguments):
            run = TRAIN if int(train_state.step) < 9 else self.exhausted
            return run(train_state, *arguments)

        with pytest.raises(OutOfMemoryError, match=r"a step of training.*lower --task_chunk"):
            train(tmp_path, late)
        said = []
        assert train(tmp_path, said=said).finished
        assert said == ["resuming at step 8 of 17"]

    def test_a_validation_names_its_dials(self, tmp_path):
        learner = LEARNER._replace(evaluate=self.exhausted)
        with pytest.raises(OutOfMemoryError, match=r"--eval_chunk \(--val_chunk of a validation\)"):
            train(tmp_path, validate=make_validate(learner, TASKS, episodes=2))

    def test_another_error_of_the_device_stays_as_it_is(self, tmp_path):
        def broken(*arguments):
            raise jax.errors.JaxRuntimeError("INTERNAL: no memory of that")

        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
            train(tmp_path, broken)


class Interrupted(Exception):
    """Stands for a kill: nothing after it is executed."""


def initial_state():
    return init_train_state(LEARNER, OPTIMIZER, TASKS, 0)


def validate(train_state):
    # A score that goes up and down, and depends on the parameters.
    leaf = jax.tree.leaves(train_state.params)[-1]
    return {"accuracy": float(jnp.sin(1e3 * leaf.sum())), "loss": float(leaf.sum())}


def train(workdir, train_loop=TRAIN, said=None, train_state=None, **changes):
    settings = {
        "config": CONFIG,
        "workdir": workdir,
        "tasks_per_step": 2,
        "validate": validate,
        "objective": cross_entropy,
        "learner_config": LEARNER.config,
        "say": (said if said is not None else []).append,
    }
    start = initial_state() if train_state is None else train_state
    return fit(start, train_loop, DATA, **(settings | changes))


def arrays(tree):
    return [
        np.asarray(
            jax.random.key_data(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )
        for leaf in jax.tree.leaves(tree)
    ]


def restore_best(workdir, like):
    return checkpoints.restore(workdir / "checkpoints" / "best", like, config=LEARNER.config)


def assert_same(workdir, result, reference, expected):
    for ours, theirs in zip(arrays(result.train_state), arrays(expected.train_state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, result.history, expected.history)
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert metrics == (reference / "metrics.jsonl").read_bytes()
    like = {"params": expected.train_state.params, "state": expected.train_state.state}
    best, metadata = restore_best(workdir, like)
    wanted, wanted_metadata = restore_best(reference, like)
    assert metadata["step"] == wanted_metadata["step"]
    for ours, theirs in zip(arrays(best), arrays(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(autouse=True)
def calls_of_any_length(monkeypatch):
    """On a slow machine a call would end before the next line of metrics."""
    monkeypatch.setattr(loop, "_CALL_SECONDS", 1e9)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, train(workdir)


@pytest.mark.parametrize("name", ["before_run", "after_run", "save_step", "save_best", "validate"])
@pytest.mark.parametrize("nth", [1, 3])
def test_resume_is_bitwise_wherever_it_was_killed(tmp_path, uninterrupted, monkeypatch, name, nth):
    calls = []

    def kill(here):
        if here == name:
            calls.append(here)
            if len(calls) == nth:
                raise Interrupted

    def train_loop(*arguments):
        kill("before_run")
        result = TRAIN(*arguments)
        kill("after_run")
        return result

    def killed_validate(train_state):
        kill("validate")
        return validate(train_state)

    save = checkpoints.save

    def killed_save(directory, name, *arguments, **settings):
        kind = "save_best" if name == "best" else "save_step"
        path = save(directory, name, *arguments, **settings)
        kill(kind)
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", killed_save)
        with pytest.raises(Interrupted):
            train(tmp_path, train_loop, validate=killed_validate)
    result = train(tmp_path)
    assert result.finished
    assert_same(tmp_path, result, *uninterrupted)


@pytest.mark.parametrize("at", [4, 5])
def test_a_signal_between_two_lines_of_metrics_saves_their_mean_so_far(
    tmp_path, uninterrupted, monkeypatch, at
):
    """Calls of one step give bitwise what calls of several gave, stopped anywhere."""
    monkeypatch.setattr(loop, "_CALL_SECONDS", 0.0)
    result = train(tmp_path, killing(signal.SIGTERM, at=at))
    assert int(result.train_state.step) == at + 1
    assert_same(tmp_path, train(tmp_path), *uninterrupted)


def test_a_call_takes_the_steps_that_fit_its_time():
    pace = loop._Pace()
    assert pace.fitting(50) == 1
    pace.measured(1, 100.0)  # compilation says nothing of a step
    assert pace.fitting(50) == 1
    pace.measured(1, loop._CALL_SECONDS / 8)
    assert (pace.fitting(50), pace.fitting(3)) == (8, 3)
    pace.measured(8, 16 * loop._CALL_SECONDS)
    assert pace.fitting(50) == 1
    pace.measured(1, 0.0)
    assert pace.fitting(50) == 50


def test_what_killed_saves_left_is_removed_at_the_next_start(tmp_path):
    config = CONFIG._replace(steps=2)
    train(tmp_path, config=config)
    folder = tmp_path / "checkpoints"
    left = sorted(path.name for path in folder.iterdir())
    for name in ("best.saved", "step_00000001.replaced", "step_00000009.saving"):
        (folder / name / "tree").mkdir(parents=True)
    train(tmp_path, config=config)
    assert sorted(path.name for path in folder.iterdir()) == left


def killing(number, at, times=1):
    """A train loop during which a signal comes."""

    def train_loop(train_state, *arguments):
        if int(train_state.step) == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return TRAIN(train_state, *arguments)

    return train_loop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, uninterrupted, number):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    said = []
    result = train(tmp_path, killing(number, at=4), said=said)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not result.finished
    assert result.history["train"]["step"].tolist() == [2, 4, 6]
    assert said == [
        f"stopped at step 6 of 17 and saved in {tmp_path}: the same command goes on from there"
    ]
    assert (tmp_path / "checkpoints" / "step_00000006").is_dir()
    said = []
    assert_same(tmp_path, train(tmp_path, said=said), *uninterrupted)
    assert said == ["resuming at step 6 of 17"]


def test_a_signal_before_the_first_step_saves_nothing_and_says_so(
    tmp_path, uninterrupted, monkeypatch
):
    start = loop._start

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*arguments)

    said = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_start", signalled)
        assert not train(tmp_path, said=said).finished
    assert said == ["stopped at step 0 of 17, nothing to save yet"]
    assert_same(tmp_path, train(tmp_path), *uninterrupted)


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, killing(signal.SIGINT, at=4, times=2))
    assert not (tmp_path / "checkpoints" / "step_00000006").exists()


def test_it_trains_in_another_thread_where_signals_cannot_be_handled(tmp_path):
    results = []
    config = CONFIG._replace(steps=2)
    thread = threading.Thread(target=lambda: results.append(train(tmp_path, config=config)))
    thread.start()
    thread.join()
    assert results[0].finished


def test_a_workdir_by_its_name_and_a_state_that_stays_usable(tmp_path, uninterrupted):
    start = initial_state()
    before = arrays(start)
    config = CONFIG._replace(steps=3)
    first = train(str(tmp_path / "first"), train_state=start, config=config)
    for ours, theirs in zip(arrays(start), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    again = train(tmp_path / "again", train_state=start, config=config)
    assert_same(tmp_path / "again", again, tmp_path / "first", first)


def test_the_address_of_a_remote_store_is_no_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (
        train,
        lambda folder: checkpoints.save(folder, "best", {"w": DATA}, {}),
        load,
    ):
        with pytest.raises(UsageError, match=r"gs://bucket/run is no local path: mount"):
            write("gs://bucket/run")
    assert list(tmp_path.iterdir()) == []


def test_the_history_holds_arrays(uninterrupted):
    workdir, result = uninterrupted
    assert set(result.history) == {"train", "val"}
    assert set(result.history["train"]) == {"step", "loss", "accuracy", "gradient_norm"}
    assert result.history["train"]["step"].tolist() == [2, 4, 6, 8, 10, 12, 14, 16, 17]
    assert result.history["val"]["step"].tolist() == [4, 8, 12, 16, 17]
    losses = [line["loss"] for line in read_metrics(workdir) if line["split"] == "train"]
    np.testing.assert_array_equal(result.history["train"]["loss"], losses)


def test_a_function_is_given_the_metrics_and_what_it_raises_is_no_loss(tmp_path, uninterrupted):
    seen = []

    def on_metrics(step, split, metrics):
        seen.append({"step": step, "split": split, **metrics})
        if len(seen) == 9:  # the validation at step 12, after the checkpoint of step 8
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tmp_path, on_metrics=on_metrics)
    assert seen == read_metrics(uninterrupted[0])[:9]
    assert_same(tmp_path, train(tmp_path), *uninterrupted)


def test_a_finished_run_is_left_as_it_is(uninterrupted):
    workdir, expected = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()

    def train_loop(*arguments):
        raise AssertionError("nothing is left to run")

    result = train(workdir, train_loop)
    assert result.finished
    assert (workdir / "metrics.jsonl").read_bytes() == before
    for ours, theirs in zip(arrays(result.train_state), arrays(expected.train_state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_more_steps_go_on_at_the_usual_steps(tmp_path):
    """The end of the first run is between two lines of metrics."""
    train(tmp_path, config=CONFIG._replace(steps=5))
    result = train(tmp_path, config=CONFIG._replace(steps=10))
    assert result.history["train"]["step"].tolist() == [2, 4, 5, 6, 8, 10]
    assert result.history["val"]["step"].tolist() == [4, 5, 8, 10]


def test_a_damaged_latest_checkpoint_is_skipped_and_said_so(tmp_path, uninterrupted):
    train(tmp_path)
    header = tmp_path / "checkpoints" / "step_00000017" / "header.json"
    header.write_bytes(header.read_bytes()[:-20])
    said = []
    result = train(tmp_path, said=said)
    assert "step_00000017" in said[0] and "\n" not in said[0]
    assert said[1] == "resuming at step 16 of 17"
    assert_same(tmp_path, result, *uninterrupted)


def test_a_workdir_of_another_learner_is_refused(tmp_path):
    train(tmp_path, config=CONFIG._replace(steps=1))
    other = prototypical(mlp((4,)), distance="cosine").config
    with pytest.raises(CheckpointError, match='distance = "squared_euclidean", and here distance'):
        train(tmp_path, learner_config=other)


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    def train_loop(train_state, data, *arguments):
        return TRAIN(train_state, data * jnp.nan if train_state.step == 8 else data, *arguments)

    good = tmp_path / "checkpoints" / "step_00000008"
    with pytest.raises(TrainingDivergedError, match=rf"step 9;.*last good checkpoint is {good}\)"):
        train(tmp_path, train_loop)
    config = LEARNER.config
    good, metadata, _ = checkpoints.restore_latest(
        tmp_path / "checkpoints", initial_state(), config=config
    )
    assert metadata["step"] == 8
    assert all(np.isfinite(leaf).all() for leaf in arrays(good))


def test_a_finite_loss_with_a_gradient_of_nan_is_never_saved(tmp_path):
    @jax.custom_vjp
    def poisoned(params):
        return 0.0

    poisoned.defvjp(
        lambda params: (0.0, params),
        lambda params, g: (jax.tree.map(lambda p: p * jnp.nan, params),),
    )

    def loss(params, state, episode, key):
        value, aux = LEARNER.loss(params, state, episode, key)
        return value + poisoned(params), aux

    learner = LEARNER._replace(loss=loss)
    step = make_outer_step(learner, OPTIMIZER, sample, task_batch=2)
    with pytest.raises(
        TrainingDivergedError,
        match=r"the loss or its gradient is not finite at step 1;.*\(nothing was saved yet\)",
    ):
        train(tmp_path, make_train_loop(step))
    assert not (tmp_path / "checkpoints").exists()


def best_metadata(workdir):
    like = initial_state()
    return restore_best(workdir, {"params": like.params, "state": like.state})[1]


def test_best_is_chosen_by_validation_alone(tmp_path):
    scores = iter([0.2, 0.9, 0.9, 0.1, 0.3])
    train(tmp_path, validate=lambda train_state: {"accuracy": next(scores)})
    metadata = best_metadata(tmp_path)
    assert (metadata["step"], metadata["accuracy"]) == (8, 0.9)  # the earlier of equals


def test_the_best_stays_though_the_lines_of_metrics_are_gone(tmp_path):
    def run(steps, *scores):
        left = iter(scores)
        return train(
            tmp_path,
            config=CONFIG._replace(steps=steps),
            validate=lambda train_state: {"accuracy": next(left)},
        )

    run(8, 0.2, 0.9)
    (tmp_path / "metrics.jsonl").unlink()
    run(12, 0.5)
    assert (best_metadata(tmp_path)["step"], best_metadata(tmp_path)["accuracy"]) == (8, 0.9)
    run(16, 0.95)
    assert best_metadata(tmp_path)["step"] == 16


def test_a_best_of_steps_that_are_done_again_does_not_count(tmp_path):
    scores = iter([0.2, 0.9])

    def stopped(train_state):
        if int(train_state.step) == 12:
            raise Interrupted
        return {"accuracy": next(scores)}

    with pytest.raises(Interrupted):
        train(tmp_path, validate=stopped)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000008")
    scores = iter([0.5, 0.3, 0.1, 0.2])  # from step 4 on
    train(tmp_path, validate=lambda train_state: {"accuracy": next(scores)})
    assert (best_metadata(tmp_path)["step"], best_metadata(tmp_path)["accuracy"]) == (8, 0.5)


def test_a_learner_without_parameters_is_saved_and_resumed(tmp_path):
    learner = prototypical(flatten())
    step = make_outer_step(learner, OPTIMIZER, sample, task_batch=2)
    start = init_train_state(learner, OPTIMIZER, TASKS, 0)
    assert not jax.tree.leaves(start.params)
    settings = {
        "train_state": start,
        "validate": make_validate(learner, TASKS, episodes=2),
        "learner_config": learner.config,
    }
    train(tmp_path, make_train_loop(step), config=CONFIG._replace(steps=4), **settings)
    said = []
    more = CONFIG._replace(steps=8)
    result = train(tmp_path, make_train_loop(step), config=more, said=said, **settings)
    assert said == ["resuming at step 4 of 8"]
    assert int(result.train_state.step) == 8
    write_config(tmp_path, make_config(learner, TASKS))
    assert jax.tree.leaves(load(tmp_path).params) == []


def test_the_smallest_is_the_best_of_a_metric_of_ones_own(tmp_path):
    scores = iter([3.0, 1.0, float("nan"), float("-inf"), 4.0])
    mae = Objective(None, "mean_absolute_error", False)
    said = []
    train(
        tmp_path,
        said=said,
        objective=mae,
        validate=lambda train_state: {"mean_absolute_error": next(scores), "accuracy": 0.0},
    )
    assert best_metadata(tmp_path)["step"] == 8
    assert said == [
        "validation at step 12 gave mean_absolute_error = nan: not selected",
        "validation at step 16 gave mean_absolute_error = -inf: not selected",
    ]


def test_which_is_better():
    assert is_better(0.5, None, cross_entropy)
    assert is_better(0.5, 0.4, cross_entropy)
    assert is_better(0.4, 0.5, squared_error)
    for score, best in ((0.4, 0.5), (0.5, 0.5), (np.nan, 0.5), (np.inf, 0.5), (np.nan, None)):
        assert not is_better(score, best, cross_entropy)


def test_a_metric_that_validation_does_not_give_is_named(tmp_path):
    with pytest.raises(
        UsageError, match=r"no 'mse', which .* selects by, but accuracy, loss:"
    ) as e:
        train(tmp_path, objective=squared_error)
    assert "\n" not in str(e.value)
    with pytest.raises(UsageError, match="validate is given without an objective"):
        train(tmp_path / "other", objective=None)
    assert not (tmp_path / "other").exists()


def test_no_finite_validation_is_an_error(tmp_path):
    config = CONFIG._replace(steps=4)
    with pytest.raises(TrainingDivergedError, match="no validation gave a finite accuracy"):
        train(tmp_path, config=config, validate=lambda train_state: {"accuracy": np.nan})


def test_training_without_validation_needs_no_objective(tmp_path):
    config = CONFIG._replace(steps=2)
    result = train(tmp_path, config=config, validate=None, objective=None)
    assert set(result.history) == {"train"}


def test_averaged_parameters_are_validated_and_are_the_best_checkpoint(tmp_path):
    optimizer = optax.chain(optax.adam(1e-2), average_params(0.9))
    train_loop = make_train_loop(make_outer_step(LEARNER, optimizer, sample, task_batch=2))
    validated = []

    def recording(train_state):
        validated.append(train_state.params)
        return validate(train_state)

    start = init_train_state(LEARNER, optimizer, TASKS, 0)
    config = CONFIG._replace(steps=2)
    result = train(tmp_path, train_loop, train_state=start, validate=recording, config=config)
    average = averaged_params(result.train_state)
    learned = {"params": average, "state": result.train_state.state}
    best, _ = restore_best(tmp_path, learned)
    for saved, seen, expected, newest in zip(
        *map(arrays, (best["params"], validated[0], average, result.train_state.params)),
        strict=True,
    ):
        np.testing.assert_array_equal(saved, expected)
        np.testing.assert_array_equal(seen, expected)
        assert (newest != expected).any()


@pytest.mark.parametrize(
    ("change", "culprit"),
    [({"steps": 0}, "steps"), ({"eval_every": 3}, "eval_every=3"), ({"checkpoint_every": 5}, "=5")],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, culprit):
    with pytest.raises(UsageError, match=culprit):
        train(tmp_path, config=CONFIG._replace(**change))
    assert not list(tmp_path.iterdir())


def test_one_compilation_serves_the_whole_run_and_its_resumption(tmp_path):
    train_loop = make_train_loop(make_outer_step(LEARNER, OPTIMIZER, sample, task_batch=2))
    train(tmp_path, train_loop, config=CONFIG._replace(steps=5))
    train(tmp_path, train_loop)
    assert train_loop.programs() == 1
