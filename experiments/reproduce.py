"""Makes rows of the results table: trains from the flagfile, tests, writes ledger and weights.

    python -m experiments.reproduce prototypical/omniglot_5w1s --data_dir=PATH
    python -m experiments.reproduce prototypical/omniglot_20w5s --data_dir=PATH --shipped
    python -m experiments.reproduce --all --hours=8 --data_dir=PATH

    python -m experiments.reproduce prototypical/omniglot_lake_official --trials=all_runs.zip

A model that several rows share is trained once; a training that was stopped is resumed.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from experiments import folder_tests, ledger, ledger_picture, records, returns, run_flags, runs
from experiments.command_line import run_main
from experiments.plan import make_plan, run_until
from experiments.reports import Result
from experiments.rows import ROWS, Row
from experiments.testing import Asked, score_text
from experiments.weights import compact
from meta_jax.lookup import UsageError
from meta_jax.training.lock import lock_workdir
from meta_jax.training.trained import load, save_trained

FLAGS = flags.FLAGS
flags.DEFINE_string("runs", "runs", "Folder for the workdirs of the trainings.")
flags.DEFINE_string("data_dir", None, "Folder where Omniglot lies.")
flags.DEFINE_bool("shipped", False, "Whether to test the weights that are shipped, untrained anew.")
flags.DEFINE_bool("all", False, "Whether to make all rows that are missing, cheapest first.")
flags.DEFINE_float(
    "hours", None, "Time for --all; a training that is not through goes on next time."
)
flags.DEFINE_bool("dry_run", False, "Whether --all only prints what it would do, and for how long.")
flags.DEFINE_string(
    "trials", None, "all_runs.zip of Omniglot's official trials, or its folder, for rows of them."
)
_WEIGHTS = Path("results/weights")


def main(names: list[str]) -> None:
    """Makes each row named on the command line, one line of output for each."""
    if FLAGS.all:
        _check_alone(names)
        _reproduce_all()
        return
    if not names:
        raise UsageError(f"name one row or more, or --all: {', '.join(ROWS)}")
    for name in names:
        if name not in ROWS:
            raise UsageError(f"unknown row '{name}': choose from {', '.join(ROWS)}")
        if ROWS[name].official and not FLAGS.trials:
            raise UsageError(f"{name} is made on the official trials: add --trials=all_runs.zip")
    if FLAGS.hours is not None or FLAGS.dry_run:
        raise UsageError("--hours and --dry_run belong to --all: leave them out")
    commit = _commit()
    for name in names:
        _reproduce(name, ROWS[name], commit, shipped=FLAGS.shipped, ends=None)


def _check_alone(names: list[str]) -> None:
    if names or FLAGS.shipped:
        raise UsageError("--all makes every row that is missing: leave row names and --shipped out")
    if FLAGS.hours is not None and not FLAGS.hours > 0:
        raise UsageError(f"--hours={FLAGS.hours} must be above 0")


def _reproduce_all() -> None:
    """Makes the rows that the ledger lacks, cheapest first, until the time is over."""
    # The official trials are not everywhere.
    rows = {name: row for name, row in ROWS.items() if FLAGS.trials or not row.official}
    plan = make_plan(rows, ledger.read(), Path(FLAGS.runs))
    print("\n".join(plan.lines()), flush=True)
    if FLAGS.dry_run:
        return
    commit = _commit()
    ends = None if FLAGS.hours is None else time.monotonic() + 3600 * FLAGS.hours
    for piece in plan.pieces:
        for name in piece.rows:
            over = ends is not None and time.monotonic() > ends
            if over or not _reproduce(name, ROWS[name], commit, shipped=piece.shipped, ends=ends):
                print("the time is over; the same command goes on from here")
                return


def _reproduce(name: str, row: Row, commit: str, *, shipped: bool, ends: float | None) -> bool:
    """Trains the row's model where that is not done, tests it, writes the row, prints a line.

    Returns:
      Whether the row was made before `ends`, a time of the monotonic clock.
    """
    weights = ledger.ROOT / _WEIGHTS / row.model
    if shipped:
        minutes = _minutes_on_record(row.model)
    else:
        workdir = Path(FLAGS.runs) / row.model
        result = _trained(row.model, workdir, ends)
        if result is None:
            return False
        minutes = round(result["seconds"] / 60, 1)
        _ship_weights(workdir, weights)
    if row.official:
        found = folder_tests.evaluate_trials(weights, FLAGS.trials, settings=row.settings())
    else:
        found = folder_tests.evaluate(
            weights,
            Asked(episodes=row.number),
            size=row.size(),
            settings=row.settings(),
            data_dir=_data_dir(row.model),
            protocol=row.episodes,
        )
    rows = ledger.record(_ledger_row(name, row, found, minutes, commit))
    ledger.write_tables(rows)
    ledger_picture.draw(rows)
    returns.write_table()  # learned policies stand beside strategies
    score, objective = found.tested.metrics[row.metric], found.tested.objective
    paper = "" if row.paper is None else f"; the paper reports {row.paper:g}"
    print(
        f"{name}: test {row.metric} {score_text(score, objective)} "
        f"(normalisation {found.record['normalisation']}){paper}",
        flush=True,
    )
    return True


def _flagfile(model: str) -> str:
    return f"--flagfile={ledger.ROOT / 'experiments' / 'flagfiles' / f'{model}.flags'}"


def _data_dir(model: str) -> str | None:
    """`--data_dir`, where the tasks that the model is trained on read a data folder."""
    name = run_flags.tasks_name(run_flags.run_values([_flagfile(model)]))
    return FLAGS.data_dir if runs.has_data_dir(run_flags.tasks_chosen(name).component) else None


def _trained(model: str, workdir: Path, ends: float | None) -> dict | None:
    """The result of a model's training, which is done here where it was not.

    At the time `ends` of the monotonic clock the training is told to save and to stop; there is no
    result then.
    """
    data_dir = _data_dir(model)
    train = [_flagfile(model), *([f"--data_dir={data_dir}"] if data_dir else [])]
    path = workdir / "result.json"
    if path.exists():
        values = run_flags.run_values(train)
        config = runs.build_run(values, runs.load_tasks(values)).config
        with lock_workdir(workdir):
            records.claim_workdir(workdir, config, records.given_flags(values))
    else:
        # A process of its own: flags are global, and the training's memory is given back.
        command = [sys.executable, "-m", "experiments.train", *train, f"--workdir={workdir}"]
        status = run_until(command, ends)
        if status is None and not path.exists():
            return None
        if status:
            sys.exit(status)
        if not path.exists():
            sys.exit("the training was stopped; the same command goes on from there")
    return json.loads(path.read_text(encoding="utf-8"))


def _minutes_on_record(model: str) -> float:
    """Minutes that the training of shipped weights took, by another row of theirs.

    Raises:
      UsageError: no row has these weights.
    """
    weights = str(_WEIGHTS / model)
    for row in ledger.read():
        if row["weights"] == weights:
            return row["train_minutes"]
    raise UsageError(f"no weights of {model} are shipped: leave --shipped out to train them")


def _ledger_row(name: str, row: Row, found: Result, minutes: float, commit: str) -> dict:
    record = found.record
    return {
        "row": name,
        "kind": found.tested.objective.kind,
        **{key: record[key] for key in ("learner", "tasks", "split")},
        **{"ways": row.ways, "shots": row.shots, "episodes": record["episodes"]},
        "metric": row.metric,
        **row.score(record),
        "exact": {name: round(t.metrics[row.metric].mean, 6) for name, t in found.beside.items()},
        **{key: record[key] for key in ("normalisation", "transductive")},
        "paper": row.paper,
        "paper_source": row.paper_source,
        "rerun": row.rerun,
        "rerun_source": row.rerun_source,
        "command": f"python -m experiments.reproduce {name}",
        "train_minutes": minutes,
        "machine": ledger.machine(),
        "versions": ledger.versions("jax", "jaxlib", "flax", "optax"),
        "commit": commit,
        "weights": str(_WEIGHTS / row.model),
    }


def _ship_weights(workdir: Path, folder: Path) -> None:
    """Writes what a test needs of a workdir, a workdir in small."""
    shipped = compact(load(workdir))
    shutil.rmtree(folder, ignore_errors=True)
    save_trained(folder, shipped)


def _commit() -> str:
    """The commit that the code is at, marked where the code differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ledger.ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # Results and their tables change with every row that is made.
        changed = git("status", "--porcelain", "--", "meta_jax", "experiments")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    run_main(main, positional=True)
