"""Fixtures that many tests share: double precision, and where the real data lies."""

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.lowering import share_the_context

_XLA_FLAGS = (
    # Tests compile thousands of small programs, and XLA's older code generator for CPUs takes a
    # third of the time. A jaxlib without it ignores the option.
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    # Programs this small are not worth a second thread of the compiler: a sixth of the time.
    "--xla_cpu_parallel_codegen_split_count=1",
    # Without optimisations, this library of XLA gets some products wrong (jaxlib 0.10.2).
    "--xla_cpu_experimental_ynn_fusion_type=",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_XLA_FLAGS]).strip()

_tests = itertools.count()

# The scripts that made the golden files need libraries that the tests do not.
collect_ignore_glob = ["golden/*.py"]


def pytest_sessionstart() -> None:
    """Garbage is collected seldom (what tests trace is large and lives long); lowering is quick."""
    gc.freeze()
    gc.set_threshold(200_000, 10, 10)
    share_the_context()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share compiled programs run in one process: those of a module, or of a learner."""
    for item in items:
        learner = getattr(item, "callspec", None) and item.callspec.params.get("name")
        of_laws = item.path.name == "laws_test.py" and isinstance(learner, str)
        item.add_marker(pytest.mark.xdist_group(learner if of_laws else str(item.path)))


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


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between runs goes to a folder that all workers of one test session share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("META_JAX_CACHE", str(folder / "meta_jax_cache"))
        yield


@pytest.fixture(autouse=True)
def forget_compiled_programs() -> Iterator[None]:
    """Thousands of programs kept by one process exhaust its memory maps; Linux allows 65,530."""
    yield
    maps = Path("/proc/self/maps")
    # To read them takes as long as a small test.
    if next(_tests) % 16 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def unoptimized() -> None:
    """Compilation is most of a test's time, and what is tested holds however XLA optimises."""
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def optimized(unoptimized: None) -> None:
    """Programs as users have them: for long computations, and for the last bit."""
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test: two correct float32 forms may differ by a ReLU's flip."""
    with jax.enable_x64(True):
        yield
