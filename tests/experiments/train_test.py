"""Training runs inside one process: changed learning rates, other weights to start from, seeds."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import records, run_flags, runs, train
from experiments.testing import Asked
from meta_jax.core import Batch, Episode
from meta_jax.data.source import source_from_sampler
from meta_jax.lookup import UsageError
from meta_jax.training.outer_step import init_train_state, make_outer_step
from meta_jax.training.record import read_config
from meta_jax.training.train_loop import make_train_loop
from meta_jax.training.trained import load, load_parameters
from meta_jax.training.writers import read_metrics

ASKED = Asked("test", 6)


def sample_of_size(size):
    def sample(key, data):
        x = jax.random.normal(key, (2 * size.ways, 4))
        y = jnp.tile(jnp.eye(size.ways), (2, 1))
        x = x.at[:, :3].add(y)
        return Episode(*(Batch(x[rows], y[rows]) for rows in (slice(3), slice(3, None))))

    return sample


SOURCE = source_from_sampler(sample_of_size, "cross_entropy")
SMALL = ["--ways=3", "--shots=1", "--queries=1", "--task_batch=2", "--log_every=2"]
SMALL += ["--eval_every=2", "--checkpoint_every=2", "--val_episodes=3", "--network=mlp"]


def build(*arguments):
    values = run_flags.run_values([*SMALL, "--network.widths=5", *arguments])
    run = runs.build_run(values, SOURCE)
    return run, train.build_program(run, ASKED), records.given_flags(values)


def run_in(workdir, *arguments):
    run, program, given = build(*arguments)
    program = train.start_from_weights(run, program, [workdir])
    return train.train_and_test(run, program, workdir, ASKED, given)


def params_of(workdir, checkpoint="latest"):
    return load_parameters(workdir, checkpoint)[0]


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_differ(tree, other):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    assert any(not np.array_equal(a, b) for a, b in pairs)


def test_a_changed_learning_rate_goes_on_as_if_switched_by_hand(tmp_path, capsys):
    workdir = tmp_path / "run"
    run_in(workdir, "--steps=4", "--optimizer.learning_rate=1e-2")
    for _ in range(2):
        run_in(workdir, "--steps=8", "--optimizer.learning_rate=1e-1")
    assert "resuming at step 4 of 8" in capsys.readouterr().out
    config = read_config(workdir)
    assert config["optimizer"]["learning_rate"] == 1e-1
    assert config["history"] == [
        {"step": 4, "changed": {"optimizer.learning_rate": [1e-2, 1e-1], "steps": [4, 8]}}
    ]
    run, _, _ = build()
    state = init_train_state(run.learner, run.optimizer, run.training, 0, task_batch=2)
    for rate in (1e-2, 1e-1):
        step = make_outer_step(run.learner, optax.adam(rate), run.training.sample, task_batch=2)
        loop = make_train_loop(step)
        for _ in range(2):
            state, _, _ = loop(state, run.training.data, 2)
    assert int(state.step) == 8
    assert_equal(params_of(workdir), state.params)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "run"
    run_in(folder, "--steps=4", "--optimizer.learning_rate=0.3")
    return folder


class TestInitFrom:
    def test_training_starts_from_the_weights_and_needs_them_no_more(self, weights, tmp_path):
        folder, workdir = shutil.copytree(weights, tmp_path / "weights"), tmp_path / "run"
        flags = (f"--init_from={folder}", "--optimizer.ema=0.9")
        run, program, _ = build("--steps=2", *flags)
        started = train.start_from_weights(run, program, [workdir])
        assert_equal(started.start.params, params_of(folder, "best"))
        assert_equal(started.start.opt_state, run.optimizer.init(started.start.params))
        assert_differ(started.start.params, started.untrained.params)
        assert_equal(started.untrained.params, program.start.params)
        run_in(workdir, "--steps=2", *flags)
        assert read_config(workdir)["run"]["init_from"] == str(folder)
        shutil.rmtree(folder)
        assert run_in(workdir, "--steps=4", *flags).record["steps"] == 4
        with pytest.raises(UsageError, match=f"no config.json in {folder}"):
            run_in(tmp_path / "other", *flags)
        assert not (tmp_path / "other").exists()

    def test_another_learner_of_the_same_structure_may_take_them(self, weights, tmp_path):
        run, program, _ = build("--learner=matching", f"--init_from={weights}")
        started = train.start_from_weights(run, program, [tmp_path])
        assert_equal(started.start.params, params_of(weights, "best"))

    def test_another_learner_takes_the_same_network_alone(self, weights, tmp_path, capsys):
        run, program, _ = build(
            "--learner=in_context", "--precision=bfloat16", f"--init_from={weights}"
        )
        assert run.config["learner"]["network"]["with_precision"] == "bfloat16"
        found = train.start_from_weights(run, program, [tmp_path]).start.params
        assert_equal(found["network"], params_of(weights, "best")["network"])
        assert_differ(found["network"], program.untrained.params["network"])
        assert_equal(found["reader"], program.untrained.params["reader"])
        said = capsys.readouterr().out
        assert f"{weights}: the network of prototypical with mlp is taken" in said

    @pytest.mark.parametrize("theirs", [{"network": {"mean": 1}}, {"mean": 1}])
    @pytest.mark.parametrize("nested", [True, False])
    def test_the_moments_of_a_network_come_with_it(self, weights, theirs, nested):
        _, program, _ = build("--learner=in_context", f"--init_from={weights}")
        mine = {"network": {"mean": 0}, "other": 2} if nested else {"mean": 0}
        trained = load(weights)._replace(state=theirs)
        found = train.with_network(program.untrained._replace(state=mine), trained).state
        assert found == ({"network": {"mean": 1}, "other": 2} if nested else {"mean": 1})

    def test_a_network_of_the_same_shapes_but_other_settings_is_not_taken(self, weights, tmp_path):
        flags = ("--learner=in_context", "--network.activation=tanh")
        run, program, _ = build(f"--init_from={weights}", *flags)
        with pytest.raises(UsageError, match="do not fit in_context with mlp"):
            train.start_from_weights(run, program, [tmp_path])

    def test_a_run_without_validation_gives_its_latest(self, tmp_path):
        folder = tmp_path / "weights"
        run_in(folder, "--steps=2", "--eval_every=0")
        assert_equal(train.load_weights(str(folder)).params, params_of(folder))

    @pytest.mark.parametrize(
        ("flags", "culprit"),
        [
            (["--network.widths=6"], r"float32\[5\] and float32\[6\] at params/.*bias"),
            (["--learner=maml"], r"do not fit maml with mlp \(float32.* and nothing at params/"),
            (["--learner=mann", "--network.widths=6"], "do not fit mann with mlp"),
            (["--network.activation=tanh"], r"\(activation=relu and activation=tanh of the net"),
        ],
    )
    def test_weights_that_do_not_fit_are_refused(self, weights, tmp_path, flags, culprit):
        run, program, _ = build(f"--init_from={weights}", *flags)
        with pytest.raises(UsageError, match=culprit) as raised:
            train.start_from_weights(run, program, [tmp_path])
        assert f"--init_from={weights} holds weights of prototypical with mlp" in str(raised.value)


class TestSeeds:
    def train(self, workdir, seeds, *flags):
        run, program, given = build("--steps=4", "--seed=5", *flags)
        config = records.with_seeds(run.config, seeds)
        folders = {seed: workdir / f"seed_{seed}" for seed in records.seeds_of(config)}
        program = train.start_from_weights(run, program, list(folders.values()))
        records.claim_workdir(workdir, config, given)
        train.train_seeds(run, program, folders, ASKED, given)
        return json.loads((workdir / "result.json").read_text())

    def test_each_is_a_run_of_its_own_and_all_are_reported(self, tmp_path, capsys, monkeypatch):
        result = self.train(tmp_path / "runs", 2)
        last = capsys.readouterr().out.splitlines()[-1]
        run_in(tmp_path / "alone", "--steps=4", "--seed=6")
        assert_equal(params_of(tmp_path / "runs" / "seed_6"), params_of(tmp_path / "alone"))
        assert_differ(
            params_of(tmp_path / "runs" / "seed_6"), params_of(tmp_path / "runs" / "seed_5")
        )
        assert read_metrics(tmp_path / "runs" / "seed_6") == read_metrics(tmp_path / "alone")
        alone = json.loads((tmp_path / "alone" / "result.json").read_text())
        assert result["seeds"]["6"] == alone["accuracy"]
        values = list(result["seeds"].values())
        assert result["accuracy"] == pytest.approx(np.mean(values), abs=1e-3)
        assert re.fullmatch(
            rf"test accuracy {np.mean(values):.2f} % ± \d+\.\d\d over 2 seeds \(standard deviation "
            rf"{np.std(values, ddof=1):.2f}; 3-way 1-shot, 6 episodes each, normalisation none\)",
            last,
        )
        # Finished seeds are not trained again, and one more is.
        trained, train_and_test = [], train.train_and_test
        monkeypatch.setattr(
            train,
            "train_and_test",
            lambda run, program, folder, *rest: (
                trained.append(folder.name) or train_and_test(run, program, folder, *rest)
            ),
        )
        assert self.train(tmp_path / "runs", 2) == result
        assert trained == []
        assert list(self.train(tmp_path / "runs", 3)["seeds"]) == ["5", "6", "7"]
        assert trained == ["seed_7"]

    def test_weights_to_start_from_serve_every_seed(self, tmp_path):
        run_in(tmp_path / "weights", "--steps=2", "--optimizer.learning_rate=0.3")
        flags = (f"--init_from={tmp_path / 'weights'}", "--optimizer.learning_rate=1e-30")
        self.train(tmp_path / "runs", 2, *flags)
        for seed in (5, 6):
            found = params_of(tmp_path / "runs" / f"seed_{seed}")
            assert_equal(found, params_of(tmp_path / "weights", "best"))
        first, second = (
            [line["loss"] for line in read_metrics(tmp_path / "runs" / f"seed_{seed}")]
            for seed in (5, 6)
        )
        assert first != second  # their tasks differ

    def test_what_is_new_beside_given_weights_is_another_under_every_seed(self, weights, tmp_path):
        flags = ("--learner=in_context", "--learner.width=8", "--learner.layers=1")
        flags += (f"--init_from={weights}", "--optimizer.learning_rate=1e-30")
        self.train(tmp_path, 2, *flags)
        first, second = (params_of(tmp_path / f"seed_{seed}") for seed in (5, 6))
        assert_equal(first["network"], second["network"])
        assert_differ(first["reader"], second["reader"])


def test_a_workdir_is_chosen_and_said_where_none_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, _, given = build()
    assert train.choose_workdir("~/x", run.config, given).name == "x"
    assert capsys.readouterr().out == ""
    assert str(train.choose_workdir(None, run.config, given)) == "runs/prototypical_glyphs"
    assert capsys.readouterr().out == "workdir runs/prototypical_glyphs (new)\n"


def test_tests_and_validations_take_the_chunk_and_find_the_same(weights):
    run, _, _ = build()
    learned = load(weights)
    programs = [train.build_program(run, ASKED._replace(chunk=chunk)) for chunk in (None, 4)]
    tested = [program.test(learned.params, learned.state).metrics["loss"] for program in programs]
    assert tested[0] == pytest.approx(tested[1], rel=1e-5)
    assert tested[0].ci95 > 0
    validated = [program.validate(program.start)["loss"] for program in programs]
    assert validated[0] == pytest.approx(validated[1], rel=1e-5)


def test_dials_of_memory_change_no_result():
    values = run_flags.run_values([*SMALL, "--learner=fomaml", "--network.widths=5"])
    turned = run_flags.run_values(
        [*SMALL, "--learner=fomaml", "--network.widths=5", "--task_chunk=2", "--remat"]
    )
    found = []
    for given, asked, val_chunk in (
        (values, ASKED, None),
        (turned, ASKED._replace(chunk=4, query_chunk=2), 2),
    ):
        program = train.build_program(runs.build_run(given, SOURCE), asked, val_chunk=val_chunk)
        state, metrics, _ = program.train_loop(program.start, program.data, 2)
        scores = program.test(state.params, state.state).metrics
        found.append((state.params, metrics, scores, program.validate(state)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)
