"""`experiments.learn_optimizer` as a user meets it."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.optimization_based.learned_optimizers.hand_designed import HAND_DESIGNED
from meta_jax.optimization_based.learned_optimizers.tuning import LEARNING_RATES
from meta_jax.training.learned_rules import load_rule
from tests.binaries import ROOT, command, process
from tests.experiments.command_line_test import assert_refused

TINY = [
    *("--rule=mlp", "--estimator=pes", "--estimator.horizon=4", "--estimator.truncation=2"),
    *("--task_batch=4", "--rule.widths=4,4"),
    *("--log_every=2", "--eval_every=4", "--checkpoint_every=2", "--val_tasks=8", "--steps=6"),
]

# One process trains for all tests.
pytestmark = pytest.mark.xdist_group("learn_optimizer")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    found = process("learn_optimizer", *TINY, "--test_tasks=8", f"--workdir={workdir}")
    assert found.returncode == 0, found.stderr
    return workdir, found.stdout


def test_it_trains_and_compares_with_tuned_optimizers(trained):
    workdir, printed = trained
    result = json.loads((workdir / "result.json").read_text())
    assert result["rule"] == {"name": "mlp", "widths": [4, 4]}
    assert (result["family"]["name"], result["steps"]) == ("quadratics", 4)
    assert set(result["losses"]) == {"mlp", *HAND_DESIGNED}
    for name, found in result["losses"].items():
        assert f"{name}: loss {found['mean']:.4f} ± {found['ci95']:.4f} after 4 steps" in printed
        rate = found["learning_rate"]
        assert rate is None if name == "mlp" else rate in LEARNING_RATES
    # A rule that has hardly learned leaves the loss where it was, about 10.
    assert result["losses"]["mlp"]["mean"] > 2 * result["losses"]["adam"]["mean"]
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
        *("--tasks.distribution=uniform", f"--output={output}"),
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(output.read_text())
    assert (result["tasks"]["distribution"], result["steps"]) == ("uniform", 2)
    assert result["num_tasks"] == 4
    assert result["losses"]["mlp"]["mean"] < 5  # 10 / 3 where nothing is learned; 10 on normal ones
    assert output.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        ((), ("--workdir", "--weights")),
        (("--rule=adamw", "--workdir=W"), ("adamw", "adafactor_mlp")),
        (("--family=mlp", "--family.activation=gelu", "--workdir=W"), ("gelu", "sigmoid")),
        (("--family=quadratics", "--tasks=glyphs", "--workdir=W"), ("quadratics", "x")),
        (("--family.width=4", "--workdir=W"), ("quadratics", "width", "none")),
        (("--rule.widths=4", "--workdir=W"), ("lstm", "widths", "hidden_sizes")),
        (("--adjoint=second_order", "--workdir=W"), ("second_order", "unrolled")),
        (("--estimator.truncation=30", "--workdir=W"), ("30", "divides")),
        (("--weights=W",), ("config.json",)),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, arguments, culprits):
    arguments = [argument.replace("=W", f"={tmp_path / 'w'}") for argument in arguments]
    assert_refused(command("learn_optimizer", *arguments), *culprits)
    assert not (tmp_path / "w").exists()


def test_the_record_holds_every_setting_of_what_is_chosen(trained):
    workdir, _ = trained
    config = json.loads((workdir / "config.json").read_text())
    learner = config["learner"]
    assert learner["rule"] == {"name": "mlp", "widths": [4, 4]}
    assert learner["estimator"] == {"name": "pes", "horizon": 4, "truncation": 2, "sigma": 0.01}
    assert learner["family"] == {"name": "quadratics"}
    assert config["tasks"].items() >= {"name": "quadratics", "dimensions": 10}.items()
    assert config["optimizer"].items() >= {"name": "adam", "learning_rate": 1e-3}.items()
    assert config["run"].items() >= {"steps": 6, "adjoint": "first_order", "seed": 0}.items()


def test_a_learned_rule_is_loaded_from_its_folder_alone(trained):
    workdir, _ = trained
    loaded = load_rule(workdir)
    optimizer, params = loaded.to_optax(), {"w": jnp.ones((2, 3))}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert jnp.isfinite(updates["w"]).all()
    assert abs(updates["w"]).max() > 0
    assert loaded.config["learner"]["rule"]["widths"] == [4, 4]


def test_a_folder_without_a_rule_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        load_rule(tmp_path)
    tasks = {"name": "glyphs", "objective": "cross_entropy"}
    config = {
        "learner": {"name": "maml"},
        "tasks": tasks,
        "optimizer": None,
        "run": {},
        "example": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="no learned optimizer"):
        load_rule(tmp_path)


def test_weights_are_not_read_as_another_rule(trained):
    workdir, _ = trained
    assert_refused(command("learn_optimizer", f"--weights={workdir}", "--rule=lstm"), "rule")


def test_examples_on_the_host_are_refused(tmp_path):
    file = tmp_path / "points.npz"
    np.savez(file, x=np.zeros((40, 3), np.float32), label=np.arange(40) % 10)
    flags = (f"--tasks=features:{file}", "--family=mlp", "--tasks.placement=host", "--ways=2")
    found = command("learn_optimizer", *flags, "--shots=2", f"--workdir={tmp_path / 'run'}")
    assert_refused(found, "use --tasks.placement=device")
    assert not (tmp_path / "run").exists()


def test_help_shows_the_settings_of_what_is_chosen_and_no_others():
    found = process("learn_optimizer", "--rule=lstm", "--family=mlp", "--help")
    assert found.returncode == 0, found.stderr
    for name in ("rule.preprocessing", "family.width", "estimator.horizon", "tasks.image_size"):
        assert f"\n  --{name}=" in found.stdout
    for name in ("rule.widths", "estimator.sigma", "tasks.distribution", "learner"):
        assert f"\n  --{name}=" not in found.stdout


def test_without_validation_the_last_rule_is_compared(tmp_path):
    flags = [*TINY, "--eval_every=0", "--steps=2", "--test_tasks=2", f"--workdir={tmp_path / 'w'}"]
    found = command("learn_optimizer", *flags)
    assert found.returncode == 0, found.stderr
    assert "mlp: loss" in found.stdout
    assert_refused(command("learn_optimizer", f"--weights={tmp_path / 'w'}"), "no best checkpoint")


def test_a_workdir_trained_with_other_flags_is_refused(trained):
    workdir, _ = trained
    before = sorted(workdir.rglob("*"))
    found = command("learn_optimizer", *TINY, "--estimator.sigma=0.02", f"--workdir={workdir}")
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
        name: found["mean"] for name, found in json.loads(output.read_text())["losses"].items()
    }
    assert losses["lstm"] < min(loss for name, loss in losses.items() if name != "lstm")
