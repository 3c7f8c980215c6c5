"""Compares two files of the benchmark: exit status 1 where a training step has become slower.

    python -m experiments.benchmark.alarm --before=last.json --now=this.json

What is compared is the time of a step by that of the fastest peer in the same rounds or, where no
peer ran in both, by that of its matrix products alone: another machine changes both.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments.command_line import run_main
from meta_jax.lookup import UsageError, local_path

FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the binary; an import alone leaves those of others as they are."""
    required = {"required": True, "flag_values": values}
    flags.DEFINE_string("before", None, "File that an earlier benchmark wrote.", **required)
    flags.DEFINE_string("now", None, "File that the benchmark wrote now.", **required)
    flags.DEFINE_float(
        "most",
        1.5,
        "Growth of a step's relative time that is still no alarm.",
        1,
        flag_values=values,
    )


def main(arguments: list[str]) -> None:
    """Prints a line for each training step that both files have."""
    del arguments
    found = growths(*(read_rows(path) for path in (FLAGS.before, FLAGS.now)))
    for work, growth in found.items():
        alarm = f", more than {FLAGS.most:.0%}" if growth > FLAGS.most else ""
        print(f"{work}: {growth:.0%} of the relative time before{alarm}")
    if any(growth > FLAGS.most for growth in found.values()):
        sys.exit(1)


def growths(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> dict[str, float]:
    """Relative time of each training step now, by that before.

    Args:
      before: Rows of the earlier benchmark.
      now: Rows of the later one.

    Raises:
      UsageError: they have no step in common.

    Examples:
      >>> rows = [[{"work": "maml", "share_of_ceiling": {"median": m}}] for m in (0.6, 0.3)]
      >>> growths(*rows)
      {'maml': 2.0}
    """
    earlier = {row["work"]: row for row in before}
    pairs = {row["work"]: (earlier[row["work"]], row) for row in now if row["work"] in earlier}
    if not pairs:
        raise UsageError("the two files have no training step in common: run the same works")
    return {work: _growth(*pair) for work, pair in pairs.items()}


def _growth(before: Mapping[str, Any], now: Mapping[str, Any]) -> float:
    peers_ran = before.get("ratio_to_fastest_peer") and now.get("ratio_to_fastest_peer")
    # Both say how fast we are: the fastest peer's time, or that of the matrix products, by ours.
    speed = "ratio_to_fastest_peer" if peers_ran else "share_of_ceiling"
    return before[speed]["median"] / now[speed]["median"]


def read_rows(path: str) -> list[dict[str, Any]]:
    """Reads the rows of a benchmark's file.

    Raises:
      UsageError: it is missing, or no file of the benchmark.
    """
    try:
        return json.loads(local_path(path).read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no file of experiments.benchmark: name what its --output wrote"
        ) from error


if __name__ == "__main__":
    define_flags(FLAGS)
    run_main(main)
