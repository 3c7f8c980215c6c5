"""Fixtures that many tests share: double precision, and where the real data lies."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest


def _real_data(name: str) -> Path:
    """META_JAX_OMNIGLOT names the folder of `omniglot` and `tensorflow_datasets`."""
    beside_the_repository = Path(__file__).parents[2] / "shared"
    path = Path(os.environ.get("META_JAX_OMNIGLOT") or beside_the_repository) / name
    if not path.is_dir():
        pytest.skip(f"real Omniglot is not at {path}: set META_JAX_OMNIGLOT to its parent folder")
    return path


@pytest.fixture(scope="session")
def omniglot_zips() -> Path:
    """The folder of images_background.zip and images_evaluation.zip."""
    return _real_data("omniglot")


@pytest.fixture(scope="session")
def omniglot_tfds() -> Path:
    """A TFDS data folder with omniglot prepared in array_record format."""
    return _real_data("tensorflow_datasets")


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test: two correct float32 forms may differ by a ReLU's flip.

    Compilation is most of such a test's time, and an identity holds however XLA optimises.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
