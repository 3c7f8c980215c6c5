"""The reproduction ledger, and the tables of `docs/results.md` and README generated from it."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import jax

from meta_jax.training.writers import write_text

ROOT = Path(__file__).parents[1]
LEDGER = ROOT / "results" / "ledger.json"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"
# Where a table lies; the binary that writes it is named in its first line.
RESULTS = "<!-- table of results: written by experiments.reproduce -->"
SPEED = "<!-- table of speed: written by experiments.benchmark -->"
FUNCTIONS = "<!-- table of functions: written by experiments.reproduce -->"
RETURNS = "<!-- table of returns: written by experiments.reproduce -->"
STRATEGIES = "<!-- table of strategies: written by experiments.strategies -->"
GPU_SPEED = "<!-- table of speed on a GPU: written by experiments.benchmark -->"
# The one table of README.
HEAD = "<!-- head of the table of results: written by experiments.reproduce -->"
_END = "<!-- end of table -->"


def read(path: Path = LEDGER) -> list[dict]:
    """All rows, in the order of their names; none where there is no ledger yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def record(row: dict, path: Path = LEDGER) -> list[dict]:
    """Writes one row in place of an older one of its name, and returns all rows."""
    rows = {old["row"]: old for old in read(path)} | {row["row"]: row}
    ordered = [rows[name] for name in sorted(rows)]
    write_text(path, json.dumps(ordered, indent=1) + "\n")
    return ordered


def table(rows: list[dict]) -> str:
    """Rows of classification as a Markdown table, setting by setting."""
    lines = [
        "| row | metric | ours | paper | rerun | normalisation | training | weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_setting):
        mode = row["normalisation"] + (", transductive" if row["transductive"] else "")
        rerun = "none" if row["rerun"] is None else row["rerun"]
        lines.append(f"| {_score(row)} | {rerun} | {mode} | {_training(row)} |")
    return "\n".join(lines) + "\n"


def _setting(row: dict) -> tuple[bool, int, int]:
    """Few-shot settings from the smallest on, then other metrics."""
    return row["metric"] != "accuracy", row["ways"], row["shots"]


def table_of_returns(rows: list[dict]) -> str:
    """Rows of reinforcement learning as a Markdown table."""
    lines = ["| row | metric | ours | paper | training | weights |", "|---|---|---|---|---|---|"]
    lines += [f"| {_score(row)} | {_training(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def table_of_functions(rows: list[dict]) -> str:
    """Rows of regression as a Markdown table, with the exact answer to the same tasks."""
    lines = [
        "| row | metric | ours | paper | exact answer | training | weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        exact = ", ".join(f"{value:.4f}" for value in row["exact"].values()) or "none"
        lines.append(f"| {_score(row, digits=4)} | {exact} | {_training(row)} |")
    return "\n".join(lines) + "\n"


def _score(row: dict, digits: int = 2) -> str:
    value = f"{row['value']:.{digits}f} ± {row['ci95']:.{digits}f}"
    paper = "none" if row["paper"] is None else row["paper"]
    return f"`{row['row']}` | {row['metric'].replace('_', ' ')} | {value} | {paper}"


def _training(row: dict) -> str:
    return f"{row['train_minutes']:.0f} min | `{row['weights']}`"


def head(rows: list[dict], count: int = 8) -> str:
    """The methods of highest 5-way one-shot accuracy as a short Markdown table."""
    few_shot = [row for row in rows if row["row"].endswith("/omniglot_5w1s")]
    best = sorted(few_shot, key=lambda row: -row["value"])[:count]
    lines = ["| method | accuracy, % | queries normalised | training |", "|---|---|---|---|"]
    for row in best:
        method, _, _ = row["row"].partition("/")
        together = "together" if row["transductive"] else "one by one"
        lines.append(
            f"| `{method}` | {row['value']:.2f} ± {row['ci95']:.2f} | {together} | "
            f"{row['train_minutes']:.0f} min |"
        )
    return "\n".join(lines) + "\n"


_TABLES = {
    "classification": (RESULTS, table),
    "regression": (FUNCTIONS, table_of_functions),
    "control": (RETURNS, table_of_returns),
}


def write_tables(rows: list[dict]) -> None:
    """Writes the page's tables of the ledger, one for each kind of task, and the head in README."""
    for kind, (place, as_table) in _TABLES.items():
        write_table(place, as_table([row for row in rows if row["kind"] == kind]))
    write_table(HEAD, head(rows), README)


def write_table(place: str, table: str, path: Path | None = None) -> None:
    """Writes one table in its place.

    Args:
      place: Line that marks the place.
      table: The new table, in Markdown.
      path: File that it is in; the page of results by default.
    """
    path = PAGE if path is None else path
    write_text(path, with_table(path.read_text(encoding="utf-8"), place, table))


def with_table(text: str, place: str, table: str) -> str:
    """A text with one of its tables replaced.

    Args:
      text: The text.
      place: `HEAD`, `RESULTS`, `FUNCTIONS`, `RETURNS`, `STRATEGIES`, `SPEED` or `GPU_SPEED`.
      table: The new one, in Markdown.

    Raises:
      ValueError: the text has no place marked for the table.
    """
    before, begin, rest = text.partition(place)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"there is no '{place}' ... '{_END}': put the two lines back")
    return f"{before}{begin}\n{table}{end}{after}"


def machine() -> str:
    """What the figures of this process come from."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"{os.cpu_count()}-core {platform.machine()} CPU"
    return f"{jax.device_count()} x {device.device_kind}"


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages."""
    return {package: importlib.metadata.version(package) for package in packages}
