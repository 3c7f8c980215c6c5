"""README says what is true: its code runs, and the files it names are there."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


FEW_SHOT, OPTIMIZER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code, monkeypatch):
    """What a block of code defines, run from the repository's root."""
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_few_shot_code_runs_and_is_short(monkeypatch):
    assert len([line for line in FEW_SHOT.splitlines() if line.strip()]) <= 20
    names = run(FEW_SHOT, monkeypatch)
    assert int(names["trained"].step) == 10
    assert bool(names["finite"])
    assert names["logits"].shape == (25, 5)
    assert bool(jnp.isfinite(names["logits"]).all())


def test_the_learned_optimizer_trains_a_flax_model(monkeypatch):
    names = run(OPTIMIZER, monkeypatch)
    assert float(names["loss"]) < 0.01  # log 10 = 2.3 before the first step


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"experiments/flagfiles/\w+\.flags", README)))
)
def test_flagfiles_exist(path):
    assert (ROOT / path).is_file()


def test_binaries_exist():
    names = set(re.findall(r"python -m (experiments\.\w+)", README))
    assert len(names) >= 3
    for name in names:
        binary = ROOT / name.replace(".", "/")
        assert binary.with_suffix(".py").is_file() or (binary / "__main__.py").is_file()
