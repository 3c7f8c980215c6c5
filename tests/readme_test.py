"""README and the site say what is true: their code runs, and the files they name are there."""

import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from photo_folder import make_photos

import meta_jax as mj

ROOT = Path(__file__).parents[1]

PAGES = [ROOT / "README.md", ROOT / "BUILD.md", *(ROOT / "docs").glob("*.md")]
PAGES += [path for part in ("how_to", "gallery") for path in (ROOT / "docs" / part).glob("*.md")]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)


def python_blocks(path):
    """The blocks of Python in a page, in their order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)


CLASSIFY, FEW_SHOT = python_blocks("README.md")
(OPTIMIZER,) = python_blocks("docs/how_to/learned_optimizers.md")


def run(code, monkeypatch, folder=ROOT):
    """What a block of code defines, run in a folder."""
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_photos_of_ones_own_are_classified_in_a_few_lines(monkeypatch, tmp_path):
    assert len([line for line in CLASSIFY.splitlines() if line.strip()]) <= 8
    make_photos(tmp_path / "photos", classes=5, photos=3, first=13)
    shutil.copytree(tmp_path / "photos" / "owl", tmp_path / "new")
    names = run(CLASSIFY, monkeypatch, tmp_path)
    classifier, photos = names["classifier"], names["photos"]
    assert len(photos) == 15
    assert classifier.classes == ("nut", "owl", "pear", "quill", "rake")
    found = mj.load_exported(tmp_path / "classifier")(photos)
    np.testing.assert_allclose(found, classifier(photos), atol=1e-6)


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


@pytest.mark.parametrize("path", sorted(set(re.findall(r"experiments/flagfiles/\w+\.flags", TEXT))))
def test_flagfiles_exist(path):
    assert (ROOT / path).is_file()


def test_binaries_exist():
    names = set(re.findall(r"python -m (experiments\.\w+)", TEXT))
    assert len(names) >= 3
    for name in names:
        binary = ROOT / name.replace(".", "/")
        assert binary.with_suffix(".py").is_file() or (binary / "__main__.py").is_file()
