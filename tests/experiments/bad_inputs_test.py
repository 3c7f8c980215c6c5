"""Wrong input is refused in one line: the lists of tests/bad_inputs*.py, or a part of them."""

import math

import pytest

from experiments.command_line import read_setting
from meta_jax import host, registry
from tests import bad_inputs, bad_inputs_of_other_binaries

KINDS = ("learner", "network", "tasks", "optimizer", "rule", "family", "estimator")
# Each of them trains; the figures in docs/faults.md are of all.
DAMAGES = (*("metrics.jsonl: line b''", "config.json: optimizer 7", "config.json: steps a text"),)

EVERY = 9  # line of the other binaries; the figures are of all


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """What fits the memory does not depend on the machine of the tests."""
    monkeypatch.setattr(host, "available_memory", lambda: bad_inputs.MEMORY)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_a_range_and_a_flag_keeps_it(kind):
    for name in registry.names(kind):
        component, reserved = registry.find(kind, name), ("steps",) if kind == "optimizer" else ()
        if not component.factory.__module__.startswith("meta_jax."):  # another test's
            continue
        for setting in registry.settings(component, reserved=reserved).values():
            if setting.type not in (int, float, tuple):
                continue
            assert setting.range is not None, f"{name} has no range of {setting.name}"
            assert setting.range.least > -math.inf, (name, setting.name)
            for value in ("nan", "inf", "1e39", "99999999999", f"{setting.range.least - 1:.0f}"):
                if setting.type is float and value == "99999999999":
                    continue
                with pytest.raises(ValueError, match=r"^it (must be|takes)"):
                    read_setting(setting, value)


def test_command_lines_that_are_wrong_get_one_line_and_write_nothing():
    lines = ((kind, line) for kind, lines in bad_inputs.COMMANDS.items() for line in lines)
    assert [one for one in bad_inputs.try_commands(lines) if not one.held] == []


def test_paths_that_lead_nowhere_get_one_line(tmp_path):
    lines = (("paths", line) for line in bad_inputs.bad_paths(tmp_path).values())
    assert [one for one in bad_inputs.try_commands(lines) if not one.held] == []


def test_damaged_workdirs_get_one_line_or_go_on():
    damages = {name: bad_inputs.DAMAGES[name] for name in DAMAGES}
    assert [one for one in bad_inputs.try_damages(damages) if not one.held] == []


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    return bad_inputs_of_other_binaries.make_names(tmp_path_factory.mktemp("named"))


@pytest.mark.parametrize("binary", bad_inputs_of_other_binaries.BINARIES)
def test_so_do_those_of_the_other_binaries(binary, names):
    lines = bad_inputs_of_other_binaries.try_lines(binary, names, EVERY)
    assert [one for one in lines if not one.held] == []
    damages = bad_inputs_of_other_binaries.try_damages(binary, names, EVERY)
    assert [one for one in damages if not one.held] == []


def test_what_is_right_is_done(names, tmp_path):
    """The lists prove something: without what is wrong, each binary comes to its end."""
    lines = {"evaluate": "--weights={weights}", "learn_optimizer": "--weights={rule}"}
    lines["classify"] = "--support={images}/support --query={images}/query"
    for binary, line in lines.items():
        out = tmp_path / binary
        arguments = [*line.format(**names).split(), f"--output={out}"]
        assert bad_inputs_of_other_binaries.BINARIES[binary](arguments) == "done"
        assert out.exists()
