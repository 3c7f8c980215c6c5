"""`experiments.strategies` as a user meets it."""

import json
import re
import shutil

import jax
import pytest

from experiments import ledger, returns
from meta_jax.data.source import EpisodeSize, load_source
from meta_jax.reinforcement.gittins import bayes_optimal_return
from meta_jax.reinforcement.rl2 import rl2
from meta_jax.training.record import make_config
from meta_jax.training.trained import Trained, save_trained
from tests.binaries import command, process
from tests.experiments.command_line_test import assert_refused

FEW = ("--trials=40", "--tuning_trials=20")


@pytest.mark.parametrize(
    ("arguments", "parameters", "random"),
    [
        (
            ["--tasks=bandit", "--arms=2", "--pulls=6", "--strategies=epsilon_greedy,best_arm"],
            {"epsilon_greedy": (0.01, 0.02, 0.05, 0.1, 0.2), "best_arm": (None,)},
            3.0,
        ),
        (
            [
                *("--tasks=tabular_mdp", "--states=3", "--actions=2", "--episodes=2"),
                *("--published", "--strategies=greedy"),
            ],
            {"greedy": (None,)},
            20.0,
        ),
    ],
    ids=["bandit", "tabular_mdp"],
)
def test_it_prints_and_writes_what_strategies_reach(tmp_path, arguments, parameters, random):
    output = tmp_path / "found.json"
    found = process("strategies", *arguments, *FEW, f"--output={output}")
    assert found.returncode == 0, found.stderr
    assert output.with_suffix(".png").stat().st_size > 0
    result = json.loads(output.read_text())
    assert set(result["strategies"]) == set(parameters)
    for name, row in result["strategies"].items():
        assert row["parameter"] in parameters[name]
        assert len(row["tuning"]) == (len(parameters[name]) if row["parameter"] else 0)
        assert f"{row['mean']:.2f} ± {row['ci95']:.2f}" in found.stdout
        assert 0 < row["mean"] < 2 * result["references"]["optimum of these tasks"]
    assert random in result["references"].values()
    assert result["trials"] == 40
    if "bandit" in arguments[0]:
        assert result["references"]["Bayes-optimal"] == bayes_optimal_return(arms=2, pulls=6)


def test_what_cannot_be_run_is_refused_in_one_line():
    assert_refused(command("strategies", "--strategies=none"), "--strategies=none", "gittins")
    assert_refused(command("strategies", "--arms=0"), "arms=0")
    assert_refused(command("strategies", "--arms=3", "--record"), "--record", "bandit_10_5")


def test_a_learned_policy_stands_beside_strategies(tmp_path):
    source = load_source("bandit", arms=2, pulls=4)
    tasks, learner = source.tasks("train", EpisodeSize(1, 1, 1), train=True), rl2(hidden_size=4)
    params, state = learner.init(jax.random.key(0), tasks.sample(jax.random.key(0), ()))
    config = make_config(learner, tasks, source=source.config)
    save_trained(tmp_path, Trained(learner, params, state, tasks.objective, None, config))
    bandits = ("--strategies=best_arm", "--pulls=4", *FEW, f"--weights={tmp_path}")
    found = command("strategies", "--arms=2", *bandits)
    assert found.returncode == 0, found.stderr
    assert re.search(r"\nlearned +\d\.\d\d ± ", found.stdout)
    assert_refused(command("strategies", "--arms=3", *bandits), "--weights", "other actions")


def test_a_result_on_record_is_in_the_table(tmp_path, monkeypatch):
    copy = tmp_path / "results.md"
    shutil.copy(ledger.PAGE, copy)
    monkeypatch.setattr(ledger, "PAGE", copy)
    monkeypatch.setattr(returns, "RESULTS", tmp_path / "new" / "strategies")
    returns.record("bandit_500_50", {"strategies": {"gittins": {"mean": 461.25}}})
    assert "| 500, 50 | - / 249.6 | 461.2 / 463.7 |" in copy.read_text()
    assert list(returns.read()) == ["bandit_500_50"]


def test_the_table_has_ours_beside_the_papers():
    results = {"bandit_10_5": {"strategies": {"random": {"mean": 4.9444}, "other": {"mean": 1}}}}
    bandits, mdps = returns.table(results, [{"row": "rl2/bandit_10_10", "value": 6.7}]).split(
        "\n\n"
    )
    _, _, first, second = bandits.splitlines()
    assert first.startswith("| 10, 5 | 4.944 / 5 | - / 6.6 | ")
    assert second.startswith("| 10, 10 | - / 5 | ")
    assert second.endswith(" | 6.7 / 6.7 | - / 6.7 |")
    assert len(mdps.splitlines()) == 2
