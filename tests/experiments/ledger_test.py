"""The ledger, the table made from it, and the weights that ship with it."""

import functools
import json
import shutil

import pytest

from experiments import folder_tests, ledger, recorded_tasks, returns
from experiments.benchmark import report
from experiments.rows import ROWS
from experiments.testing import Asked
from meta_jax.data.source import load_source
from meta_jax.training.record import read_config

ROWS_IN_LEDGER = ledger.read()
KEYS = {
    *("row", "kind", "exact", "learner", "tasks", "split", "ways", "shots", "episodes", "ci95"),
    *("metric", "value", "normalisation", "transductive", "paper", "paper_source"),
    *("rerun", "rerun_source"),
    *("command", "train_minutes", "machine", "versions", "commit", "weights"),
}


def test_tables_are_the_ledger(tmp_path, monkeypatch):
    copies = {name: tmp_path / name for name in ("README", "PAGE")}
    for name, copy in copies.items():
        shutil.copy(getattr(ledger, name), copy)
        monkeypatch.setattr(ledger, name, copy)
    before = {name: copy.read_text(encoding="utf-8") for name, copy in copies.items()}
    ledger.write_tables(ROWS_IN_LEDGER)
    returns.write_table()
    assert {name: copy.read_text(encoding="utf-8") for name, copy in copies.items()} == before


def test_the_head_has_the_best_methods_first():
    lines = ledger.head(ROWS_IN_LEDGER, count=3).splitlines()[2:]
    scores = [float(line.split("|")[2].split("±")[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 3


@pytest.mark.parametrize(
    ("place", "file"),
    [(ledger.SPEED, "benchmark_cpu.json"), (ledger.GPU_SPEED, "benchmark_gpu.json")],
)
def test_tables_of_speed_are_the_benchmarks(place, file):
    page = ledger.PAGE.read_text(encoding="utf-8")
    found = json.loads((ledger.ROOT / "results" / file).read_text(encoding="utf-8"))
    assert ledger.with_table(page, place, report.table(found)) == page


def size_of(folder):
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_every_row_can_be_made_again():
    assert {row["row"] for row in ROWS_IN_LEDGER} <= set(ROWS)
    for row in ROWS_IN_LEDGER:
        assert set(row) == KEYS
        made = ROWS[row["row"]]
        assert (row["ways"], row["shots"]) == (made.ways, made.shots)
        assert row["paper"] == made.paper
        assert (row["metric"], row["rerun"]) == (made.metric, made.rerun)
        assert (ledger.ROOT / "experiments/flagfiles" / f"{made.model}.flags").is_file()
        assert 0 < size_of(ledger.ROOT / row["weights"]) <= 2 << 20
    assert size_of(ledger.ROOT / "results" / "weights") <= 20 << 20


@functools.cache
def load_once(name, settings):  # the whole Omniglot takes seconds
    return load_source(name, **dict(settings))


def rows_by_test(kind):
    """Two tests of each model, with their rows: its first and its last.

    Rows of the same weights and settings, such as the instances of a sequence, share a test.
    """
    tests = {}
    for row in ROWS_IN_LEDGER:
        made = ROWS[row["row"]]
        if row["kind"] != kind or made.official:  # the official trials are not everywhere
            continue
        settings = (made.ways, made.shots, str(made.settings()), made.episodes)
        tests.setdefault(row["weights"], {}).setdefault(settings, []).append(row)
    sample = []
    for of_model in map(list, map(dict.values, tests.values())):
        sample += of_model[:1] + of_model[1:][-1:]
    return sample


def tolerance(row, episodes, answers=1, answers_of_row=1):
    """How far a test of few episodes may be from a row: three standard errors of both.

    Args:
      row: Row of the ledger.
      episodes: Number of the test's episodes.
      answers: Number of queries in an episode of the test, where it differs from the row's.
      answers_of_row: Number of queries in an episode of the row's own test.
    """
    of_row = row["ci95"] ** 2 * row["episodes"] / 1.96**2  # variance between its episodes
    of_a_query = row["value"] * (100 - row["value"])
    variance = of_row + of_a_query * (1 / answers - 1 / answers_of_row)
    return 3 * (variance / episodes + (row["ci95"] / 1.96) ** 2) ** 0.5


@pytest.mark.parametrize("rows", rows_by_test("classification"), ids=lambda rows: rows[0]["row"])
def test_weights_give_the_accuracy_again(rows, omniglot_zips, monkeypatch):
    monkeypatch.setattr(
        recorded_tasks,
        "load_source",
        lambda name, **settings: load_once(name, tuple(settings.items())),
    )
    first, weights = ROWS[rows[0]["row"]], ledger.ROOT / rows[0]["weights"]
    episodes = 5 if rows[0]["learner"] == "reptile" else 10  # its inner loops are long
    episodes = 2 if rows[0]["ways"] > 100 else episodes
    is_sequence = first.metric.startswith("instance_")
    queries_of_row = first.size().get("queries", read_config(weights)["run"]["queries"])
    queries = min(5, queries_of_row)
    found = folder_tests.evaluate(
        weights,
        Asked(episodes=episodes, seed=1),
        size={**first.size(), "queries": 10 - first.shots if is_sequence else queries},
        settings=first.settings(),
        data_dir=str(omniglot_zips),
        protocol=first.episodes,
    )
    assert found.record["normalisation"] == rows[0]["normalisation"]
    assert found.record["transductive"] == rows[0]["transductive"]
    for row in rows:
        value = ROWS[row["row"]].score(found.record)["value"]
        # Fewer queries and fewer episodes, other ones too.
        asked, of_row = (1, 1) if is_sequence else (queries, queries_of_row)
        allowed = tolerance(row, episodes, row["ways"] * asked, row["ways"] * of_row)
        assert abs(value - row["value"]) < allowed


@pytest.mark.parametrize("rows", rows_by_test("control"), ids=lambda rows: rows[0]["row"])
def test_weights_give_the_return_again(rows):
    trials = 20 if rows[0]["learner"] == "maml_rl" else 100
    asked = Asked(episodes=trials, seed=1)
    found = folder_tests.evaluate(ledger.ROOT / rows[0]["weights"], asked)
    for row in rows:
        value = ROWS[row["row"]].score(found.record)["value"]
        assert abs(value - row["value"]) < tolerance(row, trials)


@pytest.mark.parametrize("rows", rows_by_test("regression"), ids=lambda rows: rows[0]["row"])
def test_weights_predict_functions_as_well_again(rows):
    asked = Asked(episodes=50, seed=1)
    size = ROWS[rows[0]["row"]].size()
    found = folder_tests.evaluate(ledger.ROOT / rows[0]["weights"], asked, size=size)
    for row in rows:
        value = ROWS[row["row"]].score(found.record)["value"]
        assert abs(value - row["value"]) < tolerance(row, 50)


def test_a_row_takes_the_place_of_its_older_self(tmp_path):
    path = tmp_path / "ledger.json"
    ledger.record({"row": "b", "value": 1}, path)
    ledger.record({"row": "a", "value": 2}, path)
    rows = ledger.record({"row": "b", "value": 3}, path)
    assert rows == ledger.read(path) == [{"row": "a", "value": 2}, {"row": "b", "value": 3}]


def test_a_text_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="put the two lines back"):
        ledger.with_table("# meta_jax\n", ledger.RESULTS, "")
