"""Known tests on Omniglot by name: which episodes they have, and how many.

'lake' is the within-alphabet one-shot classification of Lake et al. (Science 2015), on random
episodes: 20 characters of one of the 20 evaluation alphabets, one drawer's images of them against
another drawer's. The official 400 trials had chosen drawers, and are a test of their own. Training
sees background characters alone: tasks.split_rule=lake, lake_small1 or lake_small2.

'all_characters' asks for all 423 test characters of split_rule=vinyals at once, without turns
(Ramalho and Garnelo, "Adaptive Posterior Learning", ICLR 2019).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from meta_jax.lookup import UsageError


class Protocol(NamedTuple):
    """A test that others report too."""

    summary: str
    settings: Mapping[str, Any]  # of the tasks
    run: Mapping[str, int]  # ways, shots, queries and eval_episodes where no flag gives them
    tasks: str = "omniglot"


PROTOCOLS: dict[str, Protocol] = {
    "lake": Protocol(
        "20 characters of one alphabet, one drawer against another",
        {"split_rule": "lake", "rotations": "none", "within_group": True},
        {"ways": 20, "shots": 1, "queries": 1, "eval_episodes": 10_000},
    ),
    "all_characters": Protocol(
        "all 423 test characters at once",
        {"split_rule": "vinyals", "rotations": "none", "within_group": False},
        {"ways": 423, "shots": 1, "queries": 5, "eval_episodes": 100},
    ),
}


def described() -> str:
    """The protocols and what they are, for a line of help."""
    return "; ".join(f"{name}, {protocol.summary}" for name, protocol in PROTOCOLS.items())


def find(name: str | None) -> Protocol | None:
    """A protocol by its name; None without one.

    Raises:
      UsageError: an unknown name.
    """
    if name is None:
        return None
    if name not in PROTOCOLS:
        raise UsageError(f"unknown protocol '{name}': choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def tasks_of(
    name: str, tasks: str | None, settings: Mapping[str, Mapping[str, Any]]
) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """The tasks of a protocol and all settings of its test.

    Args:
      name: Name of the protocol.
      tasks: Name of the tasks that somebody asks for beside, or None.
      settings: Settings by component that somebody asks for beside.

    Returns:
      The name of the tasks, and the settings with the protocol's.

    Raises:
      UsageError: an unknown protocol, or other tasks or settings than its own are asked for.

    Examples:
      >>> tasks_of("lake", None, {"tasks": {"image_size": 35}})[1]["tasks"]["split_rule"]
      'lake'
    """
    protocol = find(name)
    assert protocol is not None
    if tasks not in (None, protocol.tasks):
        raise UsageError(f"protocol {name} is of {protocol.tasks}: leave tasks '{tasks}' out")
    given = settings.get("tasks", {})
    for setting, value in protocol.settings.items():
        if given.get(setting, value) != value:
            raise UsageError(
                f"protocol {name} has {setting}={value}: leave {setting}={given[setting]} out, or "
                "the protocol"
            )
    return protocol.tasks, {**settings, "tasks": {**given, **protocol.settings}}
