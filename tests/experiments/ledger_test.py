"""The ledger, the table made from it, and the weights that ship with it."""

import functools
import json
import shutil

import pytest

from experiments import ledger, returns, testing
from experiments.benchmark import report
from experiments.rows import ROWS
from meta_jax.data.source import load_source
from meta_jax.training.record import read_config

ROWS_IN_LEDGER = ledger.read()
KEYS = {
    *("row", "learner", "tasks", "split", "ways", "shots", "episodes", "ci95"),
    *("metric", "value", "normalisation", "transductive", "paper", "paper_source"),
    *("command", "train_minutes", "machine", "versions", "commit", "weights"),
}


def test_readme_tables_are_the_ledger(tmp_path, monkeypatch):
    copy = tmp_path / "README.md"
    shutil.copy(ledger.README, copy)
    monkeypatch.setattr(ledger, "README", copy)
    before = copy.read_text(encoding="utf-8")
    ledger.write_tables(ROWS_IN_LEDGER)
    ledger.write_readme(ledger.STRATEGIES, returns.table(returns.read(), ROWS_IN_LEDGER))
    assert copy.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("place", "file"),
    [(ledger.SPEED, "benchmark_cpu.json"), (ledger.GPU_SPEED, "benchmark_gpu.json")],
)
def test_readme_tables_of_speed_are_the_benchmarks(place, file):
    readme = ledger.README.read_text(encoding="utf-8")
    found = json.loads((ledger.ROOT / "results" / file).read_text(encoding="utf-8"))
    assert ledger.with_table(readme, place, report.table(found)) == readme


def test_every_row_can_be_made_again():
    assert {row["row"] for row in ROWS_IN_LEDGER} <= set(ROWS)
    for row in ROWS_IN_LEDGER:
        assert set(row) == KEYS
        made = ROWS[row["row"]]
        assert (row["ways"], row["shots"]) == (made.ways, made.shots)
        assert row["paper"] == made.paper
        assert row["metric"] == made.metric
        assert (ledger.ROOT / "experiments/flagfiles" / f"{made.model}.flags").is_file()
        size = sum(p.stat().st_size for p in (ledger.ROOT / row["weights"]).rglob("*"))
        assert 0 < size <= 1 << 20


@functools.cache
def load_once(name, settings):  # the whole Omniglot takes seconds
    return load_source(name, **dict(settings))


def rows_by_test():
    """Rows of the same weights and settings, such as the instances of a sequence, share a test."""
    tests = {}
    for row in ROWS_IN_LEDGER:
        made = ROWS[row["row"]]
        key = (row["weights"], made.ways, made.shots, made.normalisation, made.protocol)
        tests.setdefault(key, []).append(row)
    return list(tests.values())


@pytest.mark.parametrize("rows", rows_by_test(), ids=lambda rows: rows[0]["row"])
def test_weights_give_the_accuracy_again(rows, omniglot_zips, monkeypatch, request):
    monkeypatch.setattr(
        testing, "load_source", lambda name, **settings: load_once(name, tuple(settings.items()))
    )
    if rows[0]["learner"] in ("reptile", "lstm_meta_learner", "meta_networks"):  # they take long
        request.getfixturevalue("optimized")
    first, weights = ROWS[rows[0]["row"]], ledger.ROOT / rows[0]["weights"]
    is_sequence = first.metric.startswith("instance_")
    queries = min(5, read_config(weights)["run"]["queries"])
    found = testing.evaluate(
        weights,
        testing.Asked(episodes=30, seed=1),
        size={**first.size(), "queries": 10 - first.shots if is_sequence else queries},
        settings=first.settings(),
        data_dir=str(omniglot_zips),
    )
    assert found.record["normalisation"] == rows[0]["normalisation"]
    assert found.record["transductive"] == rows[0]["transductive"]
    for row in rows:
        scores = ROWS[row["row"]].score(found.record)
        value, ci95 = scores["value"], scores["ci95"]
        # Fewer queries and fewer episodes, other ones too: three standard errors of the small test.
        assert abs(value - row["value"]) < 3 / 1.96 * ci95 + row["ci95"]


def test_a_row_takes_the_place_of_its_older_self(tmp_path):
    path = tmp_path / "ledger.json"
    ledger.record({"row": "b", "value": 1}, path)
    ledger.record({"row": "a", "value": 2}, path)
    rows = ledger.record({"row": "b", "value": 3}, path)
    assert rows == ledger.read(path) == [{"row": "a", "value": 2}, {"row": "b", "value": 3}]


def test_a_readme_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="put the two lines back"):
        ledger.with_table("# meta_jax\n", ledger.RESULTS, "")
