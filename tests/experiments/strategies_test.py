"""`experiments.strategies` as a user meets it."""

import json

import pytest

from meta_jax.reinforcement.gittins import bayes_optimal_return
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
