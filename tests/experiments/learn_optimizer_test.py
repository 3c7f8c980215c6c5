"""`experiments.learn_optimizer` as a user meets it."""

import json
import shutil

import pytest

import meta_jax as mj
from meta_jax.optimization_based.learned_optimizers.tuning import RATES
from tests.experiments.command_line_test import ROOT, assert_refused, command

TINY = [
    *("--rule=mlp", "--estimator=pes", "--horizon=4", "--truncation=2", "--task_batch=4"),
    *("--log_every=2", "--eval_every=4", "--checkpoint_every=2", "--val_tasks=8", "--steps=6"),
]

# One process trains for all tests.
pytestmark = pytest.mark.xdist_group("learn_optimizer")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    found = command("learn_optimizer", *TINY, "--test_tasks=8", f"--workdir={workdir}")
    assert found.returncode == 0, found.stderr
    return workdir, found.stdout


def test_it_trains_and_compares_with_tuned_optimizers(trained):
    workdir, printed = trained
    result = json.loads((workdir / "result.json").read_text())
    assert (result["rule"], result["family"], result["steps"]) == ("mlp", "quadratics", 4)
    assert set(result["losses"]) == {"mlp", *mj.HAND_DESIGNED}
    for name, found in result["losses"].items():
        assert f"{name}: loss {found['loss']:.4f} ± {found['ci95']:.4f} after 4 steps" in printed
        assert found["rate"] is None if name == "mlp" else found["rate"] in RATES
    # A rule that has hardly learned leaves the loss where it was, about 10.
    assert result["losses"]["mlp"]["loss"] > 2 * result["losses"]["adam"]["loss"]
    for name in ("learning_curve.png", "result.png"):
        assert (workdir / name).stat().st_size > 0


def test_the_same_command_goes_on_and_ends_the_same(trained, tmp_path):
    workdir, printed = trained
    shutil.copytree(workdir, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step_00000006")
    (tmp_path / "half" / "result.json").unlink()
    found = command("learn_optimizer", *TINY, "--test_tasks=8", f"--workdir={tmp_path / 'half'}")
    assert found.stdout == f"resuming at step 4 of 6\n{printed}", found.stderr
    for name in ("metrics.jsonl", "result.json"):
        assert (tmp_path / "half" / name).read_bytes() == (workdir / name).read_bytes()


def test_weights_are_compared_elsewhere_without_training(trained, tmp_path):
    workdir, _ = trained
    output = tmp_path / "other.json"
    found = command(
        *("learn_optimizer", f"--weights={workdir}", "--test_tasks=4", "--test_steps=2"),
        *("--test_distribution=uniform", f"--output={output}"),
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(output.read_text())
    assert (result["distribution"], result["steps"], result["tasks"]) == ("uniform", 2, 4)
    assert result["losses"]["mlp"]["loss"] < 5  # 10 / 3 where nothing is learned; 10 on normal ones
    assert output.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        ((), ("--workdir", "--weights")),
        (("--rule=adamw", "--workdir=W"), ("adamw", "adafactor_mlp")),
        (("--family=mlp", "--activation=gelu", "--workdir=W"), ("gelu", "sigmoid")),
        (("--truncation=30", "--workdir=W"), ("30", "divides")),
        (("--weights=W",), ("flags.txt",)),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, arguments, culprits):
    arguments = [argument.replace("=W", f"={tmp_path / 'w'}") for argument in arguments]
    assert_refused(command("learn_optimizer", *arguments), *culprits)
    assert not (tmp_path / "w").exists()


def test_without_validation_the_last_rule_is_compared(tmp_path):
    flags = [*TINY, "--eval_every=0", "--steps=2", "--test_tasks=2", f"--workdir={tmp_path / 'w'}"]
    found = command("learn_optimizer", *flags)
    assert found.returncode == 0, found.stderr
    assert "mlp: loss" in found.stdout
    assert_refused(command("learn_optimizer", f"--weights={tmp_path / 'w'}"), "no best checkpoint")


def test_a_workdir_trained_with_other_flags_is_refused(trained):
    workdir, _ = trained
    before = sorted(workdir.rglob("*"))
    found = command("learn_optimizer", *TINY, "--sigma=0.02", f"--workdir={workdir}")
    assert_refused(found, "sigma")
    assert sorted(workdir.rglob("*")) == before


def test_the_shipped_optimizer_still_beats_tuned_ones(tmp_path):
    output = tmp_path / "shipped.json"
    found = command(
        *("learn_optimizer", f"--weights={ROOT / 'results' / 'weights' / 'lstm_quadratics'}"),
        *("--test_tasks=128", f"--output={output}"),
    )
    assert found.returncode == 0, found.stderr
    losses = {
        name: found["loss"] for name, found in json.loads(output.read_text())["losses"].items()
    }
    assert losses["lstm"] < min(loss for name, loss in losses.items() if name != "lstm")
