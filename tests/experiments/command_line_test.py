"""The binaries as a user meets them: in processes of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
RESULT_KEYS = [
    *("learner", "dataset", "split", "ways", "shots", "queries", "episodes", "accuracy", "ci95"),
    *("batch_norm", "transductive", "steps", "seed", "seconds"),
]
TINY = [
    *("--features=4", "--image_size=16", "--ways=3", "--queries=2", "--task_batch=2", "--steps=6"),
    *("--log_every=2", "--eval_every=4", "--checkpoint_every=2", "--val_episodes=4"),
]


def command(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def assert_refused(found, *culprits):
    assert found.returncode == 2, found.stderr
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1, found.stderr
    assert found.stderr.startswith("error: ")
    for culprit in culprits:
        assert culprit in found.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 classes of 5 images: each class a bright bar at an angle and place of its own."""
    path = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(20):
        (path / f"class{number:02d}").mkdir()
        base = generator.uniform(0, 255, (4, 4)).repeat(4, 0).repeat(4, 1)
        for example in range(5):
            pixels = np.clip(base + generator.normal(0, 20, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path / f"class{number:02d}" / f"{example}.png")
    return path


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    arguments = (f"--dataset=folder:{folder}", *TINY, f"--workdir={workdir}", "--eval_episodes=40")
    return workdir, arguments, command("train", *arguments)


def test_train_keeps_the_contract(trained):
    workdir, _, found = trained
    assert found.returncode == 0, found.stderr
    result = json.loads((workdir / "result.json").read_text())
    assert list(result) == RESULT_KEYS
    assert re.fullmatch(
        r"test accuracy \d+\.\d\d % ± \d+\.\d\d \(3-way 1-shot, 40 episodes, batch norm running\); "
        r"untrained network .* %.*; raw-pixel nearest neighbour .* %.*\n",
        found.stdout,
    )
    assert f"{result['accuracy']:.2f} %" in found.stdout
    assert result["split"] == "test"
    assert result["transductive"] is False
    for name in ("flags.txt", "metrics.jsonl", "learning_curve.png", "episode.png", "tensorboard"):
        assert (workdir / name).exists()
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {
        *("best", "step_00000004", "step_00000006")
    }


def test_evaluate_gives_the_test_accuracy_again(trained, tmp_path):
    workdir, _, _ = trained
    output = tmp_path / "out.json"
    found = command("evaluate", f"--workdir={workdir}", "--episodes=40", f"--output={output}")
    assert found.returncode == 0, found.stderr
    assert re.fullmatch(
        r"test accuracy .* \(3-way 1-shot, 40 episodes, batch norm running\)\n", found.stdout
    )
    ours, theirs = json.loads(output.read_text()), json.loads((workdir / "result.json").read_text())
    assert list(ours) == RESULT_KEYS
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_evaluate_on_other_tasks_names_them(trained):
    workdir, _, _ = trained
    found = command(
        *("evaluate", f"--workdir={workdir}", "--checkpoint=latest", "--split=val", "--ways=2"),
        *("--shots=2", "--batch_norm=batch", "--episodes=4"),
    )
    assert re.match(
        r"val accuracy .* \(2-way 2-shot, 4 episodes, batch norm batch\)", found.stdout
    ), found.stderr


def test_a_workdir_trained_with_other_flags_is_refused_and_left_alone(trained):
    workdir, arguments, _ = trained
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert_refused(command("train", *arguments, "--learning_rate=0.5"), "learning_rate", "workdir")
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        (["--nonsense=1"], ["nonsense"]),
        (["--steps=many"], ["steps"]),
        (["--learner=protypical"], ["protypical", "prototypical"]),
        (["--learner=maml", "--dataset=sinusoid", "--distort"], ["--distort", "sinusoid"]),
        (["--dataset=omnigolt"], ["omnigolt", "omniglot"]),
        (["--dataset=folder:no/such/folder"], ["no/such/folder"]),
        (["--dataset=glyphs", "--ways=2000"], ["2000 ways", "640 classes", "lower ways"]),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, arguments, culprits):
    workdir = tmp_path / "run"
    assert_refused(command("train", *arguments, f"--workdir={workdir}"), *culprits)
    assert not workdir.exists()


def test_evaluate_without_a_run_is_refused(tmp_path):
    assert_refused(command("evaluate"), "--workdir")
    assert_refused(command("evaluate", f"--workdir={tmp_path}"), "flags.txt")


def test_reproduce_refuses_a_row_that_does_not_exist():
    assert_refused(command("reproduce", "prototypical/omniglot_5w2s"), "omniglot_5w2s", "5w1s")


def test_a_sequence_is_tested_at_every_instance(folder, tmp_path):
    workdir = tmp_path / "mann"
    found = command(
        *("train", f"--dataset=folder:{folder}", *TINY, "--learner=mann", "--protocol=sequence"),
        *("--queries=3", "--units=8", "--memory_slots=8", f"--workdir={workdir}"),
        "--eval_episodes=20",
    )
    assert found.returncode == 0, found.stderr
    result = json.loads((workdir / "result.json").read_text())
    assert list(result) == [*RESULT_KEYS, "protocol", "instances", "instances_ci95"]
    assert result["batch_norm"] == "none"
    # Equally many of each instance: 4 of each of 3 classes.
    assert len(result["instances"]) == 4
    assert result["accuracy"] == pytest.approx(np.mean(result["instances"]), abs=1e-3)
    line, numbers, trained, untrained = found.stdout.splitlines()
    assert re.match(
        r"test accuracy .* \(sequences of 3 classes x 4 instances, 20 episodes, batch norm none\)",
        line,
    )
    assert numbers.split() == ["instance", "1", "2", "3", "4"]
    assert trained.split() == ["trained", *(f"{value:.1f}" for value in result["instances"])]
    assert untrained.split()[0] == "untrained"
    assert (workdir / "instances.png").exists()
    again = command("evaluate", f"--workdir={workdir}", "--episodes=20")
    assert again.stdout.splitlines()[2].split()[1:] == trained.split()[1:]
    few_shot = command("evaluate", f"--workdir={workdir}", "--protocol=few_shot", "--episodes=4")
    assert re.match(r"test accuracy .* \(3-way 1-shot, 4 episodes, ", few_shot.stdout)


def test_maml_learns_sinusoids_and_reports_their_error(tmp_path):
    found = command(
        *("train", f"--flagfile={ROOT}/experiments/flagfiles/maml_sinusoid.flags", "--steps=2000"),
        *("--eval_every=1000", "--checkpoint_every=1000", "--eval_episodes=200"),
        f"--workdir={tmp_path / 'run'}",
    )
    assert found.returncode == 0, found.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    untrained = json.loads((tmp_path / "run" / "baselines.json").read_text())["untrained"]["mean"]
    assert "accuracy" not in result
    assert result["mse"] < 0.6 * untrained
    assert re.match(r"test mse \d\.\d+ ± \d\.\d+ \(10-shot, 200 episodes, ", found.stdout)
