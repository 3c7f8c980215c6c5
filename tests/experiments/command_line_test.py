"""The binaries as a user meets them: in processes of their own."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import folder_tests, recorded_tasks
from experiments.testing import Asked
from meta_jax.lookup import UsageError
from tests.binaries import QUICK, ROOT, command, process

RESULT_KEYS = [
    *("learner", "tasks", "split", "ways", "shots", "queries", "episodes", "accuracy", "ci95"),
    *("normalisation", "transductive", "steps", "seed", "seconds", "metrics"),
]
TINY_EPISODES = [
    *("--tasks.image_size=16", "--ways=3", "--queries=2", "--task_batch=2", "--steps=6"),
    *("--log_every=2", "--eval_every=4", "--checkpoint_every=2", "--val_episodes=4"),
]
TINY = ["--network.features=4", *TINY_EPISODES]


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
    arguments = (f"--tasks=folder:{folder}", *TINY, f"--workdir={workdir}", "--eval_episodes=40")
    return workdir, arguments, process("train", *arguments)


def test_train_keeps_the_contract(trained):
    workdir, _, found = trained
    assert found.returncode == 0, found.stderr
    result = json.loads((workdir / "result.json").read_text())
    assert list(result) == RESULT_KEYS
    assert re.fullmatch(
        r"test accuracy \d+\.\d\d % ± \d+\.\d\d "
        r"\(3-way 1-shot, 40 episodes, normalisation running\); "
        r"untrained network .* %.*; nearest neighbour .* %.*\n",
        found.stdout,
    )
    assert f"{result['accuracy']:.2f} %" in found.stdout
    assert result["split"] == "test"
    assert result["transductive"] is False
    assert result["metrics"]["accuracy"] == [result["accuracy"], result["ci95"]]
    config = json.loads((workdir / "config.json").read_text())
    assert config["learner"]["network"]["features"] == 4
    assert config["tasks"]["preprocessing"]["image_size"] == 16
    for name in (
        "config.json",
        "metrics.jsonl",
        "learning_curve.png",
        "episode.png",
        "tensorboard",
    ):
        assert (workdir / name).exists()
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {
        *("best", "step_00000004", "step_00000006")
    }


def test_evaluate_gives_the_test_accuracy_again(trained, tmp_path):
    workdir, _, _ = trained
    output = tmp_path / "out.json"
    found = process("evaluate", f"--workdir={workdir}", "--eval_episodes=40", f"--output={output}")
    assert found.returncode == 0, found.stderr
    assert re.fullmatch(
        r"test accuracy .* \(3-way 1-shot, 40 episodes, normalisation running\)\n", found.stdout
    )
    ours, theirs = json.loads(output.read_text()), json.loads((workdir / "result.json").read_text())
    assert list(ours) == RESULT_KEYS
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_evaluate_on_other_tasks_names_them(trained):
    workdir, _, _ = trained
    found = command(
        *("evaluate", f"--workdir={workdir}", "--checkpoint=latest", "--split=val", "--ways=2"),
        *("--shots=2", "--network.normalisation=batch", "--eval_episodes=4"),
    )
    assert re.match(
        r"val accuracy .* \(2-way 2-shot, 4 episodes, normalisation batch\)", found.stdout
    ), found.stderr


def test_evaluate_refuses_what_does_not_fit_what_was_trained(trained):
    workdir, _, _ = trained
    found = command("evaluate", f"--workdir={workdir}", "--network.features=8")
    assert_refused(found, "features=4", "normalisation alone")
    for settings, tasks, culprit in (
        ({}, "sinusoid", "trained for classification.*other tasks"),
        ({"network": {"normalisation": "layer"}}, None, "layer.*batch, running"),
        ({"learner": {"eval_steps": 3}}, None, "prototypical has no setting 'eval_steps'"),
        ({"tasks": {"split_rule": "lake"}}, "glyphs", "no setting 'split_rule'"),
    ):
        with pytest.raises(UsageError, match=culprit):
            folder_tests.evaluate(workdir, Asked(episodes=2), tasks=tasks, settings=settings)


def test_other_tasks_have_inputs_of_the_trained_form(trained):
    # The glyphs are drawn with the 16 pixels that the network was trained on.
    found = folder_tests.evaluate(trained[0], Asked(episodes=2), tasks="glyphs")
    assert (found.record["tasks"], found.record["episodes"]) == ("glyphs", 2)


def test_a_workdir_trained_with_other_settings_is_refused_and_left_alone(trained):
    workdir, arguments, _ = trained
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    found = command("train", *arguments, "--optimizer.schedule=cosine", "--learner.distance=cosine")
    assert_refused(found, "(learner.distance, optimizer.schedule; ", "another workdir")
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_the_same_command_with_more_steps_goes_on(trained, tmp_path):
    workdir, arguments, _ = trained
    grown = shutil.copytree(workdir, tmp_path / "grown")
    arguments = [argument for argument in arguments if not argument.startswith("--workdir")]
    found = command("train", *arguments, f"--workdir={grown}", "--steps=8")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("resuming at step 6 of 8\n")
    assert json.loads((grown / "config.json").read_text())["run"]["steps"] == 8
    assert json.loads((grown / "result.json").read_text())["steps"] == 8


def test_a_folder_that_was_moved_is_named_anew_and_another_is_tested_on(trained, folder, tmp_path):
    workdir, arguments, _ = trained
    tasks = f"--tasks=folder:{folder}"
    assert tasks in arguments
    moved = shutil.copytree(folder, tmp_path / "moved")
    workdir = shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["tasks"]["name"] = f"folder:{tmp_path / 'gone'}"
    (workdir / "config.json").write_text(json.dumps(config))
    asked = Asked(episodes=40)
    with pytest.raises(UsageError, match=r"gone does not exist.* give --tasks=folder:NEWPATH"):
        folder_tests.evaluate(workdir, asked)
    # The same images under the recorded settings: the same result.
    output = tmp_path / "out.json"
    arguments = (f"--tasks=folder:{moved}", "--eval_episodes=40", f"--output={output}")
    command("evaluate", f"--workdir={workdir}", *arguments)
    found = json.loads(output.read_text())
    result = json.loads((workdir / "result.json").read_text())
    assert found["accuracy"] == pytest.approx(result["accuracy"], abs=1e-3)
    assert found["tasks"] == f"folder:{moved}"
    # Images in colour and of another size get the form of those that were trained on.
    coloured = tmp_path / "coloured"
    generator = np.random.default_rng(1)
    for name in "abcdefghijkl":
        (coloured / name).mkdir(parents=True)
        for example in range(3):
            pixels = generator.integers(0, 256, (30, 20, 3), np.uint8)
            Image.fromarray(pixels).save(coloured / name / f"{example}.png")
    size = {"ways": 2, "shots": 1, "queries": 2}
    found = folder_tests.evaluate(workdir, asked, tasks=f"folder:{coloured}", size=size).record
    assert (found["tasks"], found["ways"]) == (f"folder:{coloured}", 2)
    with pytest.raises(UsageError, match=r"do not fit these tasks \(.*\[3, 3, 1, 4\]"):
        settings = {"tasks": {"grey": False}}
        folder_tests.evaluate(
            workdir, asked, tasks=f"folder:{coloured}", size=size, settings=settings
        )


def test_settings_of_a_test_follow_the_record():
    recorded = {
        "name": "folder:a",
        **{"image_size": 16, "grey": None, "rotations": "classes", "split_seed": 3},
        "preprocessing": {"image_size": 16, "channels": 1},
    }
    kept = recorded_tasks.recorded_settings(recorded, "folder:b")
    assert kept.pop("split_fractions") == "0.64,0.16,0.2"  # those of before they were a setting
    assert kept == {"image_size": 16, "grey": True, "rotations": "classes", "split_seed": 3}
    divided = {**recorded, "split_fractions": None}
    assert recorded_tasks.recorded_settings(divided, "folder:b")["split_fractions"] is None
    assert recorded_tasks.recorded_settings(recorded, "sinusoid") == {}
    own = {**recorded, "name": "gone.module:tasks"}
    assert recorded_tasks.recorded_settings(own, "glyphs") == {"image_size": 16}


def test_several_seeds_are_one_command_and_each_is_tested_by_its_folder(tmp_path):
    workdir = tmp_path / "runs"
    found = command(
        *("train", "--learner=fomaml", "--tasks=sinusoid", "--network.widths=4", "--seed=3"),
        *("--learner.steps=1", "--steps=2", "--eval_every=0", "--eval_episodes=4", "--seeds=2"),
        f"--workdir={workdir}",
    )
    assert found.returncode == 0, found.stderr
    assert re.fullmatch(r"test mse .* over 2 seeds \(.*", found.stdout.splitlines()[-1])
    assert {path.name for path in workdir.iterdir()} == {
        *("config.json", "result.json", "seed_3", "seed_4")
    }
    with pytest.raises(UsageError, match=f"2 seeds: name one of them, such as {workdir}/seed_3"):
        folder_tests.evaluate(workdir, Asked(episodes=4))
    asked = Asked(episodes=4)
    again = folder_tests.evaluate(workdir / "seed_4", asked, checkpoint="latest").record["mse"]
    seeds = json.loads((workdir / "result.json").read_text())["seeds"]
    assert again == pytest.approx(seeds["4"], rel=1e-3)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("train", ["--workdir=gs://bucket/run"]),
        ("train", ["--tasks=folder:s3://bucket/images"]),
        ("evaluate", ["--weights", "https://host/weights"]),
        ("classify", ["--support=a", "--query=b,gs://bucket/c.png"]),
        ("learn_optimizer", ["--workdir=gs://bucket/run"]),
        ("reproduce", ["maml/omniglot_5w1s", "--runs=gs://bucket/run"]),
        ("compare", ["gs://bucket/run"]),
    ],
)
def test_addresses_of_remote_stores_are_refused(tmp_path, module, arguments):
    found = command(module, *arguments, cwd=tmp_path)
    assert_refused(found, "://", "is no local path: mount the store")
    assert list(tmp_path.iterdir()) == []


def test_the_binaries_need_no_home_folder_and_no_known_user(tmp_path):
    """As in a container that is run under any number of a user."""
    program = (
        "import os, pwd, runpy, sys\n"
        "def unknown(user): raise KeyError(f'uid not found: {user}')\n"
        "pwd.getpwuid = unknown\n"
        "os.environ.pop('HOME')\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    )

    def start(module, *arguments):
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "removed"}
        environment |= QUICK
        return subprocess.run(
            [sys.executable, "-c", program, f"experiments.{module}", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    found = start("train", "--help")
    assert (found.returncode, found.stderr) == (0, "")
    # Nor a name for the workdir: that of the learner and the tasks is taken.
    small = ("--learner=fomaml", "--tasks=sinusoid", "--network.widths=4", "--learner.steps=1")
    found = start("train", *small, "--steps=2", "--eval_every=0", "--eval_episodes=4")
    assert found.returncode == 0, found.stderr
    workdir = "runs/fomaml_sinusoid"
    assert found.stdout.startswith(f"workdir {workdir} (new)\ntest mse ")
    assert (tmp_path / workdir / "result.json").exists()
    arguments = (f"--workdir={workdir}", "--checkpoint=latest", "--eval_episodes=4")
    found = start("evaluate", *arguments, "--eval_chunk=2")
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    assert_refused(start("train", "--workdir=~/run"), "~/run", "set HOME")


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        (["--nonsense=1"], ["nonsense", "--help"]),
        (["--learner=protypical"], ["protypical", "prototypical"]),
        (["--learner=maml", "--learner.num_slots=4"], ["maml has no setting", "inner_lr"]),
        (["--tasks=folder:no/such/folder"], ["no/such/folder"]),
        (["--tasks=glyphs", "--ways=2000"], ["2000 ways", "640 classes", "set ways=640"]),
        (["ways=5"], ["ways=5", "two dashes"]),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, arguments, culprits):
    workdir = tmp_path / "run"
    assert_refused(command("train", f"--workdir={workdir}", *arguments), *culprits)
    assert not workdir.exists()


def test_help_shows_the_chosen_learner_and_ends_well():
    found = process("train", "--learner=maml", "--help")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("Meta-trains a learner")
    for text in ("usage: python -m experiments.train", "--workdir=", "--learner.inner_lr=FLOAT"):
        assert text in found.stdout
    assert "chex" not in found.stdout  # flags of libraries


def test_a_result_that_is_not_finite_is_an_error(folder, tmp_path):
    workdir = tmp_path / "run"
    found = command(
        *("train", f"--tasks=folder:{folder}", *TINY_EPISODES, "--steps=2", "--eval_every=0"),
        *("--learner=maml", "--learner.steps=0", "--learner.eval_steps=9", f"--workdir={workdir}"),
        *("--learner.inner_lr=1e38", "--network=mlp", "--network.widths=4", "--eval_episodes=4"),
    )
    assert found.returncode == 1, found.stderr
    assert found.stderr.count("\n") == 1
    assert "there is no result" in found.stderr
    assert not (workdir / "result.json").exists()


def test_evaluate_without_a_run_is_refused(tmp_path):
    assert_refused(process("evaluate"), "--workdir")
    assert_refused(command("evaluate", f"--workdir={tmp_path}"), "config.json")


def test_reproduce_refuses_what_it_cannot_make():
    assert_refused(process("reproduce", "prototypical/omniglot_5w2s"), "omniglot_5w2s", "5w1s")
    assert_refused(process("reproduce", "--all", "--hours=0"), "--hours=0", "above 0")


def test_a_sequence_is_tested_at_every_instance(folder, tmp_path):
    workdir = tmp_path / "mann"
    found = command(
        *("train", f"--tasks=folder:{folder}", *TINY_EPISODES, "--learner=mann", "--queries=3"),
        "--network=flatten",
        *("--learner.protocol=sequence", "--learner.hidden_size=8", "--learner.num_slots=8"),
        *(f"--workdir={workdir}", "--eval_episodes=20"),
    )
    assert found.returncode == 0, found.stderr
    result = json.loads((workdir / "result.json").read_text())
    assert list(result) == RESULT_KEYS
    assert result["normalisation"] == "none"
    # Equally many of each instance: 4 of each of 3 classes.
    instances = [result["metrics"][f"instance_{i + 1}"][0] for i in range(4)]
    assert "instance_5" not in result["metrics"]
    assert result["accuracy"] == pytest.approx(np.mean(instances), abs=1e-3)
    line, numbers, trained, untrained = found.stdout.splitlines()
    assert re.match(
        r"test accuracy .* \(sequences of 3 classes x 4 instances, 20 episodes, "
        r"normalisation none\)",
        line,
    )
    assert numbers.split() == ["instance", "1", "2", "3", "4"]
    assert trained.split() == ["trained", *(f"{value:.1f}" for value in instances)]
    assert untrained.split()[0] == "untrained"
    assert (workdir / "instances.png").exists()
    again = command("evaluate", f"--workdir={workdir}", "--eval_episodes=20")
    assert again.stdout.splitlines()[2].split()[1:] == trained.split()[1:]
    few_shot = command(
        *("evaluate", f"--workdir={workdir}", "--learner.protocol=few_shot", "--eval_episodes=4")
    )
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
