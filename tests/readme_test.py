"""README says what is true: its code runs, and the files it names are there."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_runs_and_is_short():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert int(names["trained"].step) == 10
    assert bool(names["finite"])
    assert names["logits"].shape == (5, 5)
    assert bool(jnp.isfinite(names["logits"]).all())


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
