"""The public face: few names at the top, namespaces that list what they hold, all documented."""

import subprocess
import sys
from types import ModuleType
from typing import NamedTuple

import pytest

import meta_jax as mj
from docs._extensions import public_api

NAMESPACES = dict(public_api.namespaces(mj, "mj"))
LISTED = {name: module for name, module in NAMESPACES.items() if hasattr(module, "__all__")}


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_and_field_is_documented(namespace):
    module = NAMESPACES[namespace]
    for name in public_api.public_names(module):
        value = getattr(module, name)
        if callable(value):
            assert public_api.is_documented(value, name), name
        assert not public_api.undocumented_fields(value), name


def test_a_name_or_a_field_without_documentation_is_found():
    class Pair(NamedTuple):
        left: int
        right: int

    assert not public_api.is_documented(Pair, "Pair")
    Pair.__doc__ = "Two numbers.\n\nAttributes:\n  left: The first one."
    assert public_api.is_documented(Pair, "Pair")
    assert public_api.undocumented_fields(Pair) == ["right"]


@pytest.mark.parametrize("namespace", LISTED)
def test_lists_are_sorted_and_hold_no_name_twice(namespace):
    names = LISTED[namespace].__all__
    assert len(set(names)) == len(names)


def test_all_lists_what_is_there():
    submodules = {
        name
        for name, value in vars(mj).items()
        if isinstance(value, ModuleType) and name not in mj.__all__
    }
    # Families and files, which the names at the top come from.
    assert submodules <= {
        "backend",
        "citations",
        "concrete",
        "core",
        "host",
        "linear_systems",
        "lookup",
        "metric_based",
        "model_based",
        "optimization_based",
        "precision",
        "ranges",
        "reinforcement",
        "shapes",
        "version",
    }
    public = {name for name in vars(mj) if not name.startswith("_")} - submodules
    assert public == set(mj.__all__)


def test_the_top_is_small_and_has_a_version():
    assert len(mj.__all__) <= 64
    assert mj.__version__[0].isdigit()


def test_import_needs_only_jax_and_optax():
    heavy = (
        "flax",
        "orbax",
        "PIL",
        "matplotlib",
        "tensorflow_datasets",
        "tqdm",
        "tensorboardX",
        "docstring_parser",
    )
    code = f"import sys, meta_jax; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
