"""The order in which `reproduce --all` makes rows."""

import json
import sys
import time

from experiments.plan import make_plan, run_until
from experiments.rows import ROWS, Row

MODELS = {
    "trained/5w1s": ("trained", 5, 1),
    "trained/5w5s": ("trained", 5, 5),
    "trained/20w1s": ("trained", 20, 1),
    "quick/5w1s": ("quick", 5, 1),
    "new/5w1s": ("new", 5, 1),
    "new/20w1s": ("new", 20, 1),
}
NAMES = {name: Row(*model, None, "none") for name, model in MODELS.items()}


def row(name, minutes):
    return {
        "row": name,
        "weights": f"results/weights/{NAMES[name].model}",
        "train_minutes": minutes,
    }


def test_what_costs_least_for_a_row_comes_first(tmp_path):
    there = [row("trained/5w1s", 40.0), row("quick/5w1s", 10.0)]
    plan = make_plan(NAMES, there, tmp_path)
    assert [piece.rows for piece in plan.pieces] == [
        ("trained/5w5s", "trained/20w1s"),  # two tests of two minutes
        ("new/5w1s", "new/20w1s"),  # a training of the median, 25 minutes, and two tests
    ]
    assert [piece.minutes(plan.otherwise) for piece in plan.pieces] == [4.0, 29.0]
    assert plan.lines() == [
        "  0 h 04 min  test trained: trained/5w5s, trained/20w1s",
        "  0 h 29 min  train new (never measured: the median of all): new/5w1s, new/20w1s",
        "  0 h 33 min  in all",
    ]


def test_a_training_that_has_ended_costs_nothing(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "result.json").write_text(json.dumps({}))
    plan = make_plan(NAMES, [row("trained/5w1s", 40.0), row("quick/5w1s", 10.0)], tmp_path)
    assert plan.pieces[-1].minutes(plan.otherwise) == 4.0


def test_nothing_is_left_of_a_full_ledger(tmp_path):
    plan = make_plan(NAMES, [row(name, 5.0) for name in NAMES], tmp_path)
    assert plan.lines() == ["  0 h 00 min  in all"]


def test_without_a_ledger_every_row_is_trained(tmp_path):
    plan = make_plan(ROWS, [], tmp_path)
    assert sum(len(piece.rows) for piece in plan.pieces) == len(ROWS)
    assert not any(piece.shipped for piece in plan.pieces)


def test_a_command_runs_to_its_end_or_to_the_time_that_it_has():
    assert run_until([sys.executable, "-c", "raise SystemExit(3)"], None) == 3
    waits = [sys.executable, "-c", "import threading; threading.Event().wait()"]
    assert run_until(waits, time.monotonic()) is None
