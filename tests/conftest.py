"""Where the tests find the real data that does not come with the repository."""

import os
from pathlib import Path

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
