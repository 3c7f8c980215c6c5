"""What `reproduce --all` does, and in which order: rows that the ledger lacks, cheapest first."""

import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.rows import Row

_MINUTES_OF_A_TEST = 2.0  # of 1000 episodes, about


class Piece(NamedTuple):
    """One model, and its rows that are missing."""

    model: str
    rows: tuple[str, ...]
    shipped: bool  # whether weights are there, so that nothing is trained
    training: float | None  # minutes that it took; None where it was never trained to its end

    def minutes(self, otherwise: float) -> float:
        """Minutes to expect.

        Args:
          otherwise: Minutes of a training that was never measured.
        """
        training = otherwise if self.training is None else self.training
        return (0.0 if self.shipped else training) + _MINUTES_OF_A_TEST * len(self.rows)


class Plan(NamedTuple):
    """Pieces in the order in which they are made."""

    pieces: list[Piece]
    otherwise: float  # minutes to expect of a training that was never measured

    def lines(self) -> list[str]:
        """The plan as a person reads it."""
        minutes = [piece.minutes(self.otherwise) for piece in self.pieces]
        lines = [
            f"{_hours(expected)}  {_what(piece)}: {', '.join(piece.rows)}"
            for piece, expected in zip(self.pieces, minutes, strict=True)
        ]
        return [*lines, f"{_hours(sum(minutes))}  in all"]


def make_plan(rows: Mapping[str, Row], ledger_rows: Sequence[dict], runs: Path) -> Plan:
    """Orders the rows that a ledger lacks by how many come of a minute, most first.

    Args:
      rows: All rows that there could be, by name.
      ledger_rows: Rows of the ledger, whose weights are shipped.
      runs: Folder for the workdirs of trainings; one that has ended is not trained again.
    """
    trained = {Path(row["weights"]).name: row["train_minutes"] for row in ledger_rows}
    there = {row["row"] for row in ledger_rows}
    missing: dict[str, list[str]] = {}
    for name, row in rows.items():
        if name not in there:
            missing.setdefault(row.model, []).append(name)
    pieces = []
    for model, names in missing.items():
        ended = (runs / model / "result.json").exists()
        training = 0.0 if ended else trained.get(model)
        pieces.append(Piece(model, tuple(names), model in trained, training))
    otherwise = statistics.median(trained.values()) if trained else 30.0
    pieces.sort(key=lambda piece: piece.minutes(otherwise) / len(piece.rows))
    return Plan(pieces, otherwise)


def run_until(command: list[str], ends: float | None) -> int | None:
    """Runs a command to its end, or asks it to stop.

    Args:
      command: Program and arguments.
      ends: Time of the monotonic clock at which it is told to stop, by SIGTERM; None for never.

    Returns:
      The exit status; None where the command was told to stop.
    """
    process = subprocess.Popen(command)
    try:
        return process.wait(None if ends is None else max(0.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return None


def _what(piece: Piece) -> str:
    if piece.shipped:
        return f"test {piece.model}"
    guessed = " (never measured: the median of all)" if piece.training is None else ""
    return f"train {piece.model}{guessed}"


def _hours(minutes: float) -> str:
    return f"{int(minutes) // 60:3d} h {int(minutes) % 60:02d} min"
