"""The table of returns: strategies and learned policies, ours beside the papers'."""

import json
from typing import Any

from experiments import ledger
from meta_jax.training.writers import write_text

RESULTS = ledger.ROOT / "results" / "strategies"
# Duan et al. 2016, tables 1 and 2, and Mishra et al. 2018, tables 3 and 4, by tasks and our names.
# What they call optimistic Thompson sampling has the figures of our likeliest_thompson.
PUBLISHED = {
    "bandit_10_5": (5.0, 6.6, 5.7, 6.5, 6.7, 6.6, 6.6, 6.7, 6.6),
    "bandit_10_10": (5.0, 6.6, 5.5, 6.2, 6.7, 6.6, 6.6, 6.7, 6.7),
    "bandit_10_50": (5.1, 6.5, 5.2, 5.5, 6.6, 6.5, 6.5, 6.8, 6.7),
    "bandit_100_5": (49.9, 78.3, 74.7, 77.9, 78.0, 75.4, 74.8, 78.7, 79.1),
    "bandit_100_10": (49.9, 82.8, 76.7, 81.4, 82.4, 77.4, 77.1, 83.5, 83.5),
    "bandit_100_50": (49.8, 85.2, 64.5, 67.7, 84.3, 78.3, 78.0, 84.9, 85.1),
    "bandit_500_5": (249.8, 405.8, 402.0, 406.7, 405.8, 388.2, 380.6, 401.6, 408.1),
    "bandit_500_10": (249.0, 437.8, 429.5, 438.9, 437.1, 408.0, 395.0, 432.5, 432.4),
    "bandit_500_50": (249.6, 463.7, 427.2, 437.6, 457.6, 413.6, 402.8, 438.9, 442.6),
    "mdp_10": (100.1, 138.1, 144.1, 146.6, 150.2, 132.8, 134.8, 156.2, 159.1),
    "mdp_25": (250.2, 408.8, 425.2, 424.1, 427.8, 377.3, 368.8, 445.7, 447.2),
    "mdp_50": (499.7, 904.4, 930.7, 918.9, 917.8, 823.3, 769.3, 936.1, 942.3),
    "mdp_75": (749.9, 1417.1, 1449.2, 1427.6, 1422.6, 1293.9, 1172.9, 1428.8, 1447.5),
    "mdp_100": (999.4, 1939.5, 1973.9, 1942.1, 1935.1, 1778.2, 1578.5, 1913.7, 1953.1),
}
_LEARNED = ("rl2", "snail")
_COLUMNS = {
    "bandit": (
        *("random", "gittins", "thompson", "likeliest_thompson", "ucb1", "epsilon_greedy"),
        *("greedy", *_LEARNED),
    ),
    "mdp": (
        *("random", "psrl", "optimistic_psrl", "ucrl2", "beb", "epsilon_greedy", "greedy"),
        *_LEARNED,
    ),
}


def table(results: dict[str, dict[str, Any]], rows: list[dict]) -> str:
    """Ours beside the papers' as Markdown, for bandits and for tabular MDPs.

    Args:
      results: By tasks, what `experiments.strategies` wrote.
      rows: The ledger, which has the learned policies.
    """
    learned = {row["row"]: row["value"] for row in rows}
    parts = []
    for kind, columns in _COLUMNS.items():
        names = [name for name in PUBLISHED if name.startswith(kind)]
        lines = [_line([kind.replace("mdp", "MDP"), *columns]), "|---" * (len(columns) + 1) + "|"]
        for name in names:
            ours = {
                **{c: learned[f"{c}/{name}"] for c in _LEARNED if f"{c}/{name}" in learned},
                **{c: found["mean"] for c, found in _strategies(results, name).items()},
            }
            if ours:
                cells = [
                    _cell(ours.get(column), paper)
                    for column, paper in zip(columns, PUBLISHED[name], strict=True)
                ]
                lines.append(_line([name.removeprefix(f"{kind}_").replace("_", ", "), *cells]))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _strategies(results: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    return results.get(name, {}).get("strategies", {})


def _cell(ours: float | None, paper: float) -> str:
    return f"- / {paper:g}" if ours is None else f"{ours:.4g} / {paper:g}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def read() -> dict[str, dict[str, Any]]:
    """What is on record of strategies, by tasks."""
    files = sorted(RESULTS.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def record(name: str, result: dict[str, Any]) -> None:
    """Writes the result of strategies on some tasks in place of an older one, and the table.

    Args:
      name: The tasks, a key of `PUBLISHED`.
      result: What `experiments.strategies` found.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_table()


def write_table() -> None:
    """Writes the table from the records of strategies and the ledger."""
    ledger.write_table(ledger.STRATEGIES, table(read(), ledger.read()))
