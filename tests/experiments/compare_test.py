"""Tables and pictures of several runs, from workdirs that the tests write."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import compare, records
from meta_jax.lookup import UsageError
from meta_jax.training.pictures import Curve, validation_curves
from meta_jax.training.record import write_config
from tests.binaries import command, process
from tests.experiments.command_line_test import assert_refused


def config_of(learner="prototypical", objective="cross_entropy", steps=10, **optimizer):
    return {
        "learner": {"name": learner, "network": {"name": "conv4", "features": 64}},
        "tasks": {"name": "glyphs", "objective": objective},
        "example": None,
        "optimizer": {"name": "adam", "learning_rate": 1e-3, **optimizer},
        "run": {"ways": 5, "seed": 0, "steps": steps},
    }


def write_run(folder, config, result=None, validations=()):
    """A workdir; `validations` are (step, metric)."""
    metric = "mse" if config["tasks"]["objective"] == "squared_error" else "accuracy"
    write_config(folder, config)
    lines = [{"step": step, "split": "val", metric: value} for step, value in validations]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result is not None:
        value, ci95 = result
        record = {metric: value, "ci95": ci95, "steps": config["run"]["steps"], "seconds": 61.2}
        (folder / "result.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def runs(tmp_path):
    """One that is worse, one that is better, one that is not finished."""
    return [
        write_run(tmp_path / "worse", config_of(), (90.0, 0.5), [(5, 0.8), (10, 0.85)]),
        write_run(tmp_path / "better", config_of("maml"), (95.25, 0.25), [(5, 0.9), (10, 0.96)]),
        write_run(tmp_path / "begun", config_of(steps=20, learning_rate=0.1), None, [(5, 0.99)]),
    ]


def report(*workdirs):
    return compare.report([compare.summary(workdir) for workdir in workdirs])


def test_the_best_comes_first_and_the_unfinished_last(runs):
    worse, better, begun = map(str, runs)
    table, settings = report(*runs).split("\n\n")
    rows = [line.split("  ") for line in table.splitlines()]
    rows = [[cell.strip() for cell in row if cell] for row in rows]
    assert rows == [
        ["workdir", "learner", "tasks", "test accuracy (%)", "steps", "seconds"],
        [better, "maml", "glyphs", "95.25 ± 0.25", "10", "61"],
        [worse, "prototypical", "glyphs", "90.00 ± 0.50", "10", "61"],
        [begun, "prototypical", "glyphs", "unfinished, validation 99.00", "5 of 20"],
    ]
    assert [line.split() for line in settings.splitlines()[1:]] == [
        ["optimizer.learning_rate", "0.001", "0.001", "0.1"]
    ]


def test_columns_are_aligned(runs):
    header, *rows = report(*runs).split("\n\n")[0].splitlines()
    for name in ("learner", "tasks", "test", "steps"):
        column = header.index(name)
        assert all(row[column - 1] == " " and row[column] != " " for row in rows)


def test_where_less_is_better_the_least_comes_first(tmp_path):
    workdirs = [
        write_run(tmp_path / name, config_of(objective="squared_error"), (value, 0.1))
        for name, value in (("a", 2.0), ("b", 1.0))
    ]
    lines = report(*workdirs).splitlines()
    assert "test mse  " in lines[0]
    assert [line.split()[0] for line in lines[1:]] == [str(workdirs[1]), str(workdirs[0])]
    assert "1.000 ± 0.100" in lines[1]


def test_runs_of_other_metrics_are_compared_apart(runs, tmp_path):
    errors = write_run(tmp_path / "e", config_of(objective="squared_error"), (2.0, 0.1))
    parts = report(runs[0], errors, runs[1]).split("\n\n")
    assert [part.splitlines()[0].split("test ")[1].split("  ")[0] for part in parts] == [
        *("accuracy (%)", "mse")
    ]
    assert len(parts[0].splitlines()) == 3


def test_several_seeds_are_one_row_with_mean_and_spread(tmp_path):
    workdir = tmp_path / "five"
    config = records.with_seeds(config_of(), 2)
    write_config(workdir, config)
    for seed in (0, 1):
        one = records.with_seed(config_of(), seed)
        write_run(
            workdir / f"seed_{seed}", one, (90.0 + seed, 0.5), [(5, 0.8), (10, 0.9 + seed / 10)]
        )
    assert "unfinished, validation 95.00" in report(workdir)  # the mean of both seeds
    record = {"accuracy": 90.5, "ci95": 6.35, "std": 0.7071, "seeds": {"0": 90.0, "1": 91.0}}
    (workdir / "result.json").write_text(json.dumps({**record, "steps": 10, "seconds": 9.0}))
    assert "90.50 ± 6.35 (2 seeds, std 0.71)" in report(workdir)
    assert len(compare.summary(workdir).validations) == 2
    write_config(workdir, records.with_seeds(config_of(), 3))
    assert "unfinished" in report(workdir)


def test_a_run_that_was_given_more_steps_is_unfinished(runs):
    write_config(runs[0], config_of(steps=20))
    assert "unfinished, validation 85.00" in report(runs[0])
    assert "10 of 20" in report(runs[0])


def test_a_run_that_has_just_begun_has_a_row(tmp_path):
    workdir = write_run(tmp_path / "new", config_of())
    assert report(workdir).splitlines()[1].split()[-4:] == ["unfinished", "0", "of", "10"]


def test_a_damaged_result_is_named(runs):
    (runs[0] / "result.json").write_text("[]")
    with pytest.raises(UsageError, match=r"result\.json is damaged"):
        report(*runs)


def test_the_binary_prints_and_draws_and_refuses_what_is_no_workdir(runs, tmp_path):
    picture = tmp_path / "pictures" / "curves.png"
    found = process("compare", *runs, f"--output={picture}")
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"{report(*runs)}\n\nvalidation curves in {picture}\n"
    assert np.asarray(Image.open(picture)).std() > 0
    assert_refused(command("compare", runs[0], tmp_path), "no config.json", str(tmp_path))
    assert_refused(command("compare", runs[0], f"--output={tmp_path}"), "no PNG file")
    assert_refused(process("compare"), "name the workdirs")


class TestValidationCurves:
    def test_the_band_of_seeds_is_at_their_common_steps(self, tmp_path):
        seeds = [Curve(np.array([1, 2, 3]), np.array([0.0, 1.0, 9.0]))]
        validation_curves({"accuracy": {"a": seeds}}, tmp_path / "one.png")
        seeds.append(Curve(np.array([1, 2]), np.array([0.5, 0.5])))
        validation_curves({"accuracy": {"a": seeds, "none": []}}, tmp_path / "two.png")
        seeds.append(Curve(np.array([7]), np.array([0.5])))
        validation_curves({"accuracy": {"a": seeds}}, tmp_path / "three.png")
        pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("one", "two", "three")]
        assert len(set(pictures)) == 2  # a seed that shares no step leaves the longest alone
        assert pictures[0] == pictures[2]

    def test_nothing_to_draw_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="no validations"):
            validation_curves({"accuracy": {"a": []}}, tmp_path / "x.png")
        assert not (tmp_path / "x.png").exists()
