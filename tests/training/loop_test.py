"""The training loop: exact resume from any interruption, selection of the best, stops."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.mlp import mlp
from meta_jax.training import checkpoints
from meta_jax.training.loop import Schedule, TrainingDivergedError, fit
from meta_jax.training.outer_step import init_train_state, make_outer_step, make_run

SCHEDULE = Schedule(steps=17, log_every=2, eval_every=4, checkpoint_every=4)
OPTIMIZER = optax.adam(1e-2)
LEARNER = prototypical(mlp((4,)))


def sampler(key, data):
    x = jax.random.normal(key, (6, 3)) + data
    y = jnp.tile(jnp.eye(3), (2, 1))
    return Episode(Batch(x[:3], y[:3]), Batch(x, y))


DATA = jnp.zeros(3)
RUN = make_run(make_outer_step(LEARNER, OPTIMIZER, sampler, task_batch=2))


class Interrupted(Exception):
    """Stands for a kill: nothing after it is executed."""


def validate(train_state):
    # A score that goes up and down, and depends on the parameters.
    leaf = jax.tree.leaves(train_state.params)[-1]
    return {"accuracy": float(jnp.sin(1e3 * leaf.sum())), "loss": float(leaf.sum())}


def train(workdir, run=RUN, schedule=SCHEDULE, said=None, validate=validate):
    return fit(
        init_train_state(LEARNER, OPTIMIZER, sampler, DATA, 0),
        run,
        DATA,
        schedule=schedule,
        workdir=workdir,
        tasks_per_step=2,
        validate=validate,
        say=(said if said is not None else []).append,
    )


def arrays(tree):
    return [
        np.asarray(
            jax.random.key_data(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )
        for leaf in jax.tree.leaves(tree)
    ]


def assert_same(workdir, outcome, reference, expected):
    for ours, theirs in zip(arrays(outcome.train_state), arrays(expected.train_state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert metrics == (reference / "metrics.jsonl").read_bytes()
    like = {"params": expected.train_state.params, "state": expected.train_state.state}
    best, metadata = checkpoints.restore(workdir / "checkpoints" / "best", like)
    wanted, wanted_metadata = checkpoints.restore(reference / "checkpoints" / "best", like)
    assert metadata["step"] == wanted_metadata["step"]
    for ours, theirs in zip(arrays(best), arrays(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)


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

    def run(*arguments):
        kill("before_run")
        result = RUN(*arguments)
        kill("after_run")
        return result

    def killed_validate(train_state):
        kill("validate")
        return validate(train_state)

    save = checkpoints.save

    def killed_save(directory, name, *arguments):
        kind = "save_best" if name == "best" else "save_step"
        path = save(directory, name, *arguments)
        kill(kind)
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", killed_save)
        with pytest.raises(Interrupted):
            train(tmp_path, run, validate=killed_validate)
    outcome = train(tmp_path)
    assert outcome.finished
    assert_same(tmp_path, outcome, *uninterrupted)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, uninterrupted):
    def run(train_state, data, until):
        if until == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return RUN(train_state, data, until)

    said = []
    outcome = train(tmp_path, run, said=said)
    assert not outcome.finished
    assert said == ["stopped at step 6 of 17: the same command goes on from there"]
    assert (tmp_path / "checkpoints" / "step_00000006").is_dir()
    said = []
    assert_same(tmp_path, train(tmp_path, said=said), *uninterrupted)
    assert said == ["resuming at step 6 of 17"]


def test_a_finished_run_is_left_as_it_is(uninterrupted):
    workdir, expected = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()

    def run(*arguments):
        raise AssertionError("nothing is left to run")

    outcome = train(workdir, run)
    assert outcome.finished
    assert (workdir / "metrics.jsonl").read_bytes() == before
    for ours, theirs in zip(arrays(outcome.train_state), arrays(expected.train_state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_damaged_latest_checkpoint_is_skipped_and_said_so(tmp_path, uninterrupted):
    train(tmp_path)
    header = tmp_path / "checkpoints" / "step_00000017" / "header.json"
    header.write_bytes(header.read_bytes()[:-20])
    said = []
    outcome = train(tmp_path, said=said)
    assert "step_00000017" in said[0] and "\n" not in said[0]
    assert said[1] == "resuming at step 16 of 17"
    assert_same(tmp_path, outcome, *uninterrupted)


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    def run(train_state, data, until):
        return RUN(train_state, data * jnp.nan if until == 10 else data, until)

    with pytest.raises(TrainingDivergedError, match="step 9;"):
        train(tmp_path, run)
    like = init_train_state(LEARNER, OPTIMIZER, sampler, DATA, 0)
    good, metadata, _ = checkpoints.restore_latest(tmp_path / "checkpoints", like)
    assert metadata["step"] == 8
    assert all(np.isfinite(leaf).all() for leaf in arrays(good))


def best_metadata(workdir):
    like = init_train_state(LEARNER, OPTIMIZER, sampler, DATA, 0)
    learned = {"params": like.params, "state": like.state}
    return checkpoints.restore(workdir / "checkpoints" / "best", learned)[1]


def test_best_is_chosen_by_validation_alone(tmp_path):
    scores = iter([0.2, 0.9, 0.9, 0.1, 0.3])
    train(tmp_path, validate=lambda train_state: {"accuracy": next(scores)})
    metadata = best_metadata(tmp_path)
    assert (metadata["step"], metadata["accuracy"]) == (8, 0.9)  # the earlier of equals


def test_the_smallest_error_is_the_best_in_regression(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 1.5, 4.0])
    train(tmp_path, validate=lambda train_state: {"mse": next(scores)})
    metadata = best_metadata(tmp_path)
    assert metadata["step"] == 8


@pytest.mark.parametrize(
    ("change", "culprit"),
    [({"steps": 0}, "steps"), ({"eval_every": 3}, "eval_every=3"), ({"checkpoint_every": 5}, "=5")],
)
def test_a_schedule_that_does_not_fit_is_refused(tmp_path, change, culprit):
    with pytest.raises(ValueError, match=culprit):
        train(tmp_path, schedule=SCHEDULE._replace(**change))
    assert not list(tmp_path.iterdir())


def test_one_compilation_serves_the_whole_run_and_its_resumption(tmp_path):
    run = make_run(make_outer_step(LEARNER, OPTIMIZER, sampler, task_batch=2))
    train(tmp_path, run, SCHEDULE._replace(steps=5))
    train(tmp_path, run)
    assert run._cache_size() == 1
