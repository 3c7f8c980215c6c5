"""A picture of the ledger: accuracies by method and setting, beside papers and reruns."""

from collections.abc import Sequence
from pathlib import Path

from experiments import ledger
from meta_jax.training.figures import finish_figure, new_figure

PICTURE = ledger.ROOT / "results" / "omniglot.png"
_OURS, _PAPER, _RERUN = "#1f77b4", "#d95f02", "#2a9d3f"


def by_setting(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Rows of few-shot accuracy by setting, such as '5-way 1-shot', small settings first.

    Rows of another metric, such as those of sequences, are left out.
    """
    found: dict[tuple[int, int], list[dict]] = {}
    for row in rows:
        if row["kind"] == "classification" and row["metric"] == "accuracy":
            found.setdefault((row["ways"], row["shots"]), []).append(row)
    return {f"{ways}-way {shots}-shot": found[ways, shots] for ways, shots in sorted(found)}


def draw(rows: Sequence[dict], path: Path = PICTURE) -> None:
    """Draws our accuracies with their intervals, and those of papers and reruns as marks.

    Args:
      rows: Rows of the ledger; one panel for each setting that they have.
      path: The PNG to write, in place of an older one.

    Raises:
      ValueError: no row has an accuracy.
    """
    panels = by_setting(rows)
    if not panels:
        raise ValueError("there is no accuracy in these rows")
    most = max(map(len, panels.values()))
    figure = new_figure(4.2 * len(panels), 1.4 + 0.26 * most)
    found = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (setting, ours) in zip(found, panels.items(), strict=True):
        ours = sorted(ours, key=lambda row: row["value"])
        heights = range(len(ours))
        axes.errorbar(
            [row["value"] for row in ours],
            heights,
            xerr=[row["ci95"] for row in ours],
            fmt="o",
            color=_OURS,
            capsize=2,
            label="ours, 95 % interval",
        )
        for name, mark, colour in (("paper", "x", _PAPER), ("rerun", "D", _RERUN)):
            known = [(row[name], height) for height, row in enumerate(ours) if row[name]]
            axes.plot(*zip(*known, strict=True) if known else ([], []), mark, c=colour, label=name)
        axes.set_yticks(heights, [row["row"].partition("/")[0] for row in ours], fontsize=8)
        axes.set(title=setting, xlabel="accuracy (%)")
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = found[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    finish_figure(figure, path)
