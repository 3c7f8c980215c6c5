"""The picture of the ledger."""

import pytest

from experiments import ledger
from experiments.ledger_picture import PICTURE, by_setting, draw


def row(name, ways, shots, metric="accuracy", **values):
    return {
        **{"row": name, "kind": "classification", "metric": metric, "ways": ways, "shots": shots},
        **{"value": 90.0, "ci95": 0.5, "paper": None, "rerun": None, **values},
    }


ROWS = [
    row("b/omniglot_20w1s", 20, 1, paper=95.0),
    row("a/omniglot_5w1s", 5, 1, rerun=98.0),
    row("c/omniglot_sequence_2nd", 5, 1, metric="instance_2"),
    row("b/omniglot_5w1s", 5, 1),
]


def test_settings_are_panels_and_other_metrics_are_left_out():
    found = by_setting(ROWS)
    assert {setting: [r["row"][0] for r in rows] for setting, rows in found.items()} == {
        "5-way 1-shot": ["a", "b"],
        "20-way 1-shot": ["b"],
    }
    assert list(found) == ["5-way 1-shot", "20-way 1-shot"]


def test_it_is_drawn(tmp_path):
    path = tmp_path / "ledger.png"
    draw(ROWS, path)
    assert path.stat().st_size > 1000
    with pytest.raises(ValueError, match="no accuracy"):
        draw(ROWS[2:3], path)


def test_the_picture_of_the_ledger_is_there():
    assert PICTURE.is_file()
    assert by_setting(ledger.read())
