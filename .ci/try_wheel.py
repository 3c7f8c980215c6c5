"""Tries an installed meta_jax outside of the repository: `try_wheel.py REPOSITORY`.

README's code, weights of the repository and a training must work, and nothing but meta_jax may have
been installed.
"""

import importlib.metadata
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import jax
import numpy as np

import meta_jax as mj


def main(repository: Path) -> None:
    """Runs everything in the current folder, which should be empty."""
    check_files(repository)
    run_readme(repository)
    load_weights(repository / "results" / "weights")
    runpy.run_path(str(repository / "docs" / "extending" / "fit_in_python.py"), run_name="__main__")
    print(f"meta_jax {mj.__version__} works where nothing else is")


def check_files(repository: Path) -> None:
    """Fails where the package is that of the repository, or brings other packages with it."""
    assert not Path(mj.__file__).is_relative_to(repository), mj.__file__
    files = importlib.metadata.files("meta_jax") or []
    top = {file.parts[0] for file in files}
    assert top == {"meta_jax", f"meta_jax-{mj.__version__}.dist-info"}, top


def run_readme(repository: Path) -> None:
    """Runs the blocks of Python in README, the first of which asks for two folders of photos."""
    sys.path.append(str(repository / "tests"))
    from photo_folder import make_photos

    make_photos(Path("photos"), classes=5, photos=3, first=13)
    shutil.copytree("photos/owl", "new")
    here = Path.cwd()
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text("utf-8"), re.DOTALL)
    ):
        # Others may name files of the repository, which is not on Python's path.
        os.chdir(repository if number else here)
        exec(compile(code, "README.md", "exec"), {})
    os.chdir(here)


def load_weights(folder: Path) -> None:
    """Adapts a trained learner of the repository, from its folder alone."""
    trained = mj.load(folder / "maml_sinusoid_frequency")
    x = np.linspace(-5, 5, 10, dtype=np.float32)[:, None]
    keys = jax.random.split(jax.random.key(0))
    adapted = trained.learner.adapt(
        trained.params, trained.state, mj.Batch(x, np.sin(x)), keys[0], train=False
    )
    y, _ = trained.learner.predict(trained.params, adapted, x, keys[1], train=False)
    assert np.isfinite(y).all()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
