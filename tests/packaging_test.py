"""What is installed with the package, and what is said of it in several files."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_requirements_are_the_dependencies_and_the_extras_of_the_binaries():
    extras = PROJECT["optional-dependencies"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    wanted = [line for extra in ("data", "streams", "tensorboard") for line in extras[extra]]
    assert listed == [*PROJECT["dependencies"], *wanted]


def test_messages_name_extras_that_there_are():
    named = set()
    for folder in ("meta_jax", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            code = path.read_text(encoding="utf-8")
            named |= set(re.findall(r"import_extra\(\"\w+\", \"(\w+)\"", code))
            named |= set(re.findall(r"meta_jax\[([a-z]+)\]", code))
    assert named >= {"data", "demo", "gymnax"}
    assert named <= PROJECT["optional-dependencies"].keys()


def test_changelog_and_citation_have_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{PROJECT['version']}] - " in changelog
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {PROJECT['version']}" in citation
