"""Makes rows of the results table: trains from the flagfile, tests, writes ledger and weights.

    python -m experiments.reproduce prototypical/omniglot_5w1s --data_dir=PATH

A model that several rows share is trained once; a training that was stopped is resumed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from absl import flags

from experiments import ledger, testing
from experiments.command_line import UsageError, claim_workdir, run_flag_values, run_main
from experiments.rows import ROWS, Row
from meta_jax.training.writers import write_text

FLAGS = flags.FLAGS
flags.DEFINE_string("runs", "runs", "Folder for the workdirs of the trainings.")
flags.DEFINE_string("data_dir", None, "Where Omniglot lies.")
_EPISODES = 1000
_WEIGHTS = Path("results/weights")


def main(names: list[str]) -> None:
    """Makes each row named on the command line, one line of output for each."""
    if not names:
        raise UsageError(f"name one row or more: {', '.join(ROWS)}")
    for name in names:
        if name not in ROWS:
            raise UsageError(f"unknown row '{name}': choose from {', '.join(ROWS)}")
    commit = _commit()
    for name in names:
        _reproduce(name, ROWS[name], commit)


def _reproduce(name: str, row: Row, commit: str) -> None:
    workdir = Path(FLAGS.runs) / row.model
    flagfile = ledger.ROOT / "experiments" / "flagfiles" / f"{row.model}.flags"
    train = [
        f"--flagfile={flagfile}",
        f"--workdir={workdir}",
        *([f"--data_dir={FLAGS.data_dir}"] if FLAGS.data_dir else []),
    ]
    claim_workdir(workdir, run_flag_values(flagfile))
    if not (workdir / "result.json").exists():
        # A process of its own: flags are global, and the training's memory is given back.
        status = subprocess.run([sys.executable, "-m", "experiments.train", *train]).returncode
        if status:
            sys.exit(status)
        if not (workdir / "result.json").exists():
            sys.exit("the training was stopped; the same command goes on from there")
    trained = json.loads((workdir / "result.json").read_text(encoding="utf-8"))
    weights = _ship_weights(workdir, ledger.ROOT / _WEIGHTS / row.model)
    found = testing.evaluate(
        weights,
        checkpoint="best",
        split="test",
        episodes=_EPISODES,
        seed=0,
        data_dir=FLAGS.data_dir,
        overrides=row.overrides(),
    )
    kept = ("learner", "dataset", "split", "ways", "shots", "episodes")
    rows = ledger.record(
        {
            "row": name,
            **{key: found[key] for key in kept},
            **row.accuracy(found),
            **{key: found[key] for key in ("batch_norm", "transductive")},
            "paper_accuracy": row.paper_accuracy,
            "paper_source": row.paper_source,
            "command": f"python -m experiments.reproduce {name}",
            "train_minutes": round(trained["seconds"] / 60, 1),
            "machine": ledger.machine(),
            "versions": ledger.versions("jax", "jaxlib", "flax", "optax"),
            "commit": commit,
            "weights": str(_WEIGHTS / row.model),
        }
    )
    readme = ledger.README.read_text(encoding="utf-8")
    write_text(ledger.README, ledger.with_table(readme, ledger.RESULTS, ledger.table(rows)))
    paper = "" if row.paper_accuracy is None else f"; the paper reports {row.paper_accuracy} %"
    print(f"{name}: {testing.line({**found, **row.accuracy(found)})}{paper}")


def _ship_weights(workdir: Path, folder: Path) -> Path:
    """Copies what a test needs of a workdir, a workdir in small."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(workdir / "checkpoints" / "best", folder / "checkpoints" / "best")
    shutil.copy(workdir / "flags.txt", folder / "flags.txt")
    return folder


def _commit() -> str:
    """The commit that the code is at, marked where the code differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ledger.ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # Results and README change with every row that is made.
        changed = git("status", "--porcelain", "--", "meta_jax", "experiments")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    run_main(main, positional=True)
