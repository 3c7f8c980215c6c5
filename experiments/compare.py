"""Compares training runs: a table of their results, and a picture of their validation curves.

    python -m experiments.compare runs/prototypical_glyphs runs/maml_glyphs --output=compare.png

A workdir of several seeds is one row, with mean and spread. A run that has not come to its end is
shown with its last validation. Runs of different metrics are compared apart.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import records
from experiments.command_line import run_main
from meta_jax.core import Objective
from meta_jax.lookup import UsageError, local_path
from meta_jax.objectives import as_objective
from meta_jax.training.pictures import Curve, validation_curves
from meta_jax.training.record import read_config
from meta_jax.training.writers import as_history, read_metrics

FLAGS = flags.FLAGS
_COLUMNS = ("learner", "tasks", "steps")  # of the table of results, not settings to list below it


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this binary."""
    flags.DEFINE_string(
        "output", "compare.png", "PNG file to draw, in place of an older one.", values
    )


class Summary(NamedTuple):
    """What a comparison shows of a workdir."""

    workdir: Path
    config: Mapping[str, Any]  # contents of config.json
    objective: Objective
    result: Mapping[str, Any] | None  # contents of result.json; None for an unfinished run
    validations: list[Curve]  # of each seed that has some

    @property
    def score(self) -> float:
        """The metric of the test, or else that of the last validation, NaN without one."""
        if self.result is not None:
            return self.result[self.objective.metric]
        last = [curve.values[-1] for curve in self.validations]
        return float(np.mean(last)) if last else float("nan")

    @property
    def steps(self) -> int:
        """Outer steps that the result or the last validation is of."""
        if self.result is not None:
            return self.result["steps"]
        return max((int(curve.steps[-1]) for curve in self.validations), default=0)


def main(arguments: list[str]) -> None:
    """Prints the table and draws the picture."""
    if not arguments:
        raise UsageError("name the workdirs to compare: python -m experiments.compare W1 W2 ...")
    output = local_path(FLAGS.output)
    if output.suffix.lower() != ".png" or output.is_dir():
        raise UsageError(f"--output={output} is no PNG file: name one, such as compare.png")
    summaries = [summary(local_path(name)) for name in dict.fromkeys(arguments)]
    print(report(summaries))
    panels = {
        _title(objective): {str(each.workdir): each.validations for each in group}
        for objective, group in groups(summaries)
    }
    if any(curves for panel in panels.values() for curves in panel.values()):
        validation_curves(panels, output)
        print(f"\nvalidation curves in {output}")


def summary(workdir: Path) -> Summary:
    """Reads what a workdir holds.

    Raises:
      UsageError: it is no workdir of a training run.
    """
    config = read_config(workdir)
    name = (config["learner"] or {}).get("name")
    if name in (None, "learned_optimizer") or "steps" not in (config.get("run") or {}):
        raise UsageError(f"{workdir} is no workdir of experiments.train: leave it out")
    objective = as_objective(config["tasks"]["objective"])
    several = "seeds" in config["run"]
    folders = [workdir / f"seed_{n}" for n in records.seeds_of(config)] if several else [workdir]
    curves = [_validations(folder, objective) for folder in folders]
    result = _result(workdir, config)
    return Summary(workdir, config, objective, result, [curve for curve in curves if curve])


def _result(workdir: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a workdir; None where the run goes on, for more steps or seeds, say."""
    path = workdir / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        steps, seeds = result["steps"], len(result.get("seeds", [0]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged: run the training again, which writes it") from error
    whole = (config["run"]["steps"], len(records.seeds_of(config)))
    return result if (steps, seeds) == whole else None


def _validations(workdir: Path, objective: Objective) -> Curve | None:
    try:
        found = as_history(read_metrics(workdir)).get("val", {})
    except ValueError as error:
        raise UsageError(str(error)) from error
    if objective.metric not in found:
        return None
    scale = 100 if objective.unit == "%" else 1
    return Curve(found["step"], scale * found[objective.metric])


# ---- What is printed.


def groups(summaries: Sequence[Summary]) -> list[tuple[Objective, list[Summary]]]:
    """The runs of each metric, the best result first and unfinished runs last."""
    found: dict[str, list[Summary]] = {}
    for each in summaries:
        found.setdefault(each.objective.metric, []).append(each)
    return [(group[0].objective, sorted(group, key=_order)) for group in found.values()]


def _order(each: Summary) -> tuple[bool, float]:
    score = -each.score if each.objective.maximise else each.score
    return each.result is None, float("inf") if np.isnan(score) else score


def report(summaries: Sequence[Summary]) -> str:
    """The tables of a comparison: results, and settings in which the runs differ, by metric."""
    parts = []
    for objective, group in groups(summaries):
        header = ["workdir", "learner", "tasks", f"test {_title(objective)}", "steps", "seconds"]
        parts.append(aligned([header, *map(_row, group)]))
        settings = differing_settings(group)
        if settings:
            header = ["differing settings", *(str(each.workdir) for each in group)]
            parts.append(aligned([header, *([name, *row] for name, row in settings.items())]))
    return "\n\n".join(parts)


def _title(objective: Objective) -> str:
    return f"{objective.metric.replace('_', ' ')}{' (%)' if objective.unit == '%' else ''}"


def _row(each: Summary) -> list[str]:
    config, result = each.config, each.result
    named = [str(each.workdir), config["learner"]["name"], config["tasks"]["name"]]
    of_all = f"{each.steps}" if result else f"{each.steps} of {config['run']['steps']}"
    seconds = f"{result['seconds']:.0f}" if result else ""
    return [*named, _score_text(each), of_all, seconds]


def _score_text(each: Summary) -> str:
    if each.result is None:
        if np.isnan(each.score):
            return "unfinished"
        return f"unfinished, validation {_number(each.score, each.objective)}"
    names = [name for name in (each.objective.metric, "ci95", "std") if name in each.result]
    score, ci95, *std = (_number(each.result[name], each.objective) for name in names)
    spread = f" ({len(each.result['seeds'])} seeds, std {std[0]})" if std else ""
    return f"{score} ± {ci95}{spread}"


def _number(value: float, objective: Objective) -> str:
    return f"{value:.2f}" if objective.unit == "%" else f"{value:.3f}"


def differing_settings(summaries: Sequence[Summary]) -> dict[str, list[str]]:
    """By flag, the values of all runs, where not all are equal; '-' where a run has no such flag.

    Args:
      summaries: What is compared.
    """
    given = [records.as_flags(each.config) for each in summaries]
    found = {}
    for name in sorted({name for each in given for name in each} - {*_COLUMNS}):
        values = [_text(each.get(name)) for each in given]
        if len(set(values)) > 1:
            found[name] = values
    return found


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, Mapping) else str(value)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines, their columns aligned.

    Examples:
      >>> print(aligned([["run", "steps"], ["a long one", "5"]]))
      run         steps
      a long one  5
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    define_flags(FLAGS)
    run_main(main, positional=True)
