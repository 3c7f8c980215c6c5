"""What strategies that know reach in bandits and tabular MDPs, beside exact references.

    python -m experiments.strategies --tasks=bandit --arms=5 --pulls=100
    python -m experiments.strategies --tasks=tabular_mdp --episodes=10 --published
    python -m experiments.strategies --arms=5 --pulls=100 --weights=results/weights/rl2_bandit_100_5

Each strategy's parameter is chosen on other tasks than those of the test, which are the same for
all. With --published the strategies for MDPs have the priors of Duan et al. (2016), not the tasks'.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import returns
from experiments.command_line import run_main
from experiments.compare import aligned
from meta_jax.lookup import UsageError, local_path
from meta_jax.reinforcement.bandit_strategies import bandit_candidates
from meta_jax.reinforcement.bandits import bandit
from meta_jax.reinforcement.environment import Environment, Problem
from meta_jax.reinforcement.evaluation import (
    Play,
    Trials,
    by_learner,
    by_strategy,
    optimal_returns,
    run_trials,
    tune,
)
from meta_jax.reinforcement.gittins import bayes_optimal_return
from meta_jax.reinforcement.mdp_strategies import mdp_candidates
from meta_jax.reinforcement.strategy import Candidate
from meta_jax.reinforcement.tabular_mdp import tabular_mdp
from meta_jax.shapes import shape_difference
from meta_jax.training.evaluation import MeanCI, confidence_interval
from meta_jax.training.trained import load
from meta_jax.training.trial_pictures import regret_curves
from meta_jax.training.writers import write_text

FLAGS = flags.FLAGS
_SETTINGS = {"bandit": ("arms", "pulls"), "tabular_mdp": ("states", "actions", "episodes")}
_CHUNK = 125  # trials vmapped at a time
_MOST_PULLS = 15  # of a Bayes-optimal return, which takes seconds there


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this binary."""

    def integer(name: str, default: int, text: str, lower_bound: int | None = None) -> None:
        flags.DEFINE_integer(name, default, text, lower_bound, flag_values=values)

    flags.DEFINE_enum("tasks", "bandit", list(_SETTINGS), "Environment.", flag_values=values)
    integer("arms", 5, "Arms of a bandit.")
    integer("pulls", 10, "Pulls of a trial of a bandit.")
    integer("states", 10, "States of a tabular MDP.")
    integer("actions", 5, "Actions of a tabular MDP.")
    integer("episodes", 10, "Episodes of a trial of a tabular MDP.")
    flags.DEFINE_bool("published", False, "Whether MDPs are met with published priors.", values)
    flags.DEFINE_list("strategies", None, "Strategies to run, by default all.", values)
    integer("trials", 1000, "Trials of the test.", 2)
    integer("tuning_trials", 375, "Trials for each value of a parameter.", 1)
    integer("seed", 0, "Seed of the tasks.")
    flags.DEFINE_string(
        "output", None, "JSON file to write the results to; beside it a picture of regret.", values
    )
    flags.DEFINE_string("weights", None, "Trained policy to test beside them, a folder.", values)
    flags.DEFINE_bool("record", False, "Whether to write results/strategies and the table.", values)


class Row(NamedTuple):
    """What a strategy reached, and the returns by which its parameter was chosen."""

    parameter: Any
    tuning: Mapping[Any, float]
    score: MeanCI


def main(arguments: list[str]) -> None:
    """Prints the table, and writes the file."""
    del arguments
    settings = {name: FLAGS[name].value for name in _SETTINGS[FLAGS.tasks]}
    published = _published_name(settings) if FLAGS.record else None
    environment, candidates = _parts(settings)
    tuning_key, test_key = jax.random.split(jax.random.key(FLAGS.seed))
    # The same programs for tuning and test.
    chunk = min(_CHUNK, FLAGS.trials, FLAGS.tuning_trials)
    rows: dict[str, Row] = {}
    trials: dict[str, Trials] = {}
    for name, candidate in _chosen(candidates).items():
        tuned = tune(candidate, environment, tuning_key, FLAGS.tuning_trials, chunk=chunk)
        play = by_strategy(tuned.strategy)
        trials[name] = run_trials(environment, play, test_key, FLAGS.trials, chunk=chunk)
        rows[name] = Row(tuned.parameter, tuned.returns, confidence_interval(trials[name].returns))
    if FLAGS.weights:
        play = _learned(environment)
        trials["learned"] = run_trials(environment, play, test_key, FLAGS.trials, chunk=chunk)
        rows["learned"] = Row(None, {}, confidence_interval(trials["learned"].returns))
    references = _references(
        environment, settings, optimal_returns(environment, test_key, FLAGS.trials)
    )
    print(report(rows, references))
    result = _result(settings, rows, references)
    if FLAGS.output:
        output = local_path(FLAGS.output)
        write_text(output, json.dumps(result, indent=1) + "\n")
        regret_curves(trials, output.with_suffix(".png"))
    if published:
        returns.record(published, result)


def _published_name(settings: dict[str, Any]) -> str:
    """The row of the tables that these tasks are.

    Raises:
      UsageError: they are in none.
    """
    if FLAGS.tasks == "bandit":
        name = f"bandit_{settings['pulls']}_{settings['arms']}"
    else:
        name = f"mdp_{settings['episodes']}"
    if name not in returns.PUBLISHED or (FLAGS.tasks != "bandit" and not FLAGS.published):
        raise UsageError(
            f"--record is for the tasks of the papers' tables, {', '.join(returns.PUBLISHED)}, and "
            "for MDPs with --published"
        )
    return name


def _parts(settings: dict[str, Any]) -> tuple[Environment, dict[str, Candidate]]:
    if FLAGS.tasks == "bandit":
        return bandit(**settings), bandit_candidates(settings["pulls"])
    return tabular_mdp(**settings), mdp_candidates(published=FLAGS.published)


def _chosen(candidates: dict[str, Candidate]) -> dict[str, Candidate]:
    names = FLAGS.strategies or list(candidates)
    for name in names:
        if name not in candidates:
            raise UsageError(
                f"--strategies={name} is none for {FLAGS.tasks}: take some of "
                f"{', '.join(candidates)}"
            )
    return {name: candidates[name] for name in names}


def _learned(environment: Environment) -> Play:
    """The trained policy of --weights.

    Raises:
      UsageError: it was trained on tasks with other actions or observations.
    """
    learner, params, state = load(local_path(FLAGS.weights))[:3]
    problem = Problem(environment, environment.sample_task(jax.random.key(0)))
    expected, _ = jax.eval_shape(learner.init, jax.random.key(0), problem)
    difference = shape_difference(params, expected)
    if difference:
        raise UsageError(
            f"--weights={FLAGS.weights} was trained on tasks with other actions or observations "
            f"({difference}): name the tasks of its training"
        )
    return by_learner(learner, params, state)


def _references(
    environment: Environment, settings: dict[str, Any], optima: np.ndarray
) -> dict[str, float]:
    """Returns that need no strategy, by what they are."""
    found = {"optimum of these tasks": float(optima.mean())}
    if FLAGS.tasks == "bandit":
        arms, pulls = settings["arms"], settings["pulls"]
        found["random, n / 2"] = pulls / 2
        found["best arm known, n k / (k + 1)"] = pulls * arms / (arms + 1)
        if pulls <= _MOST_PULLS:
            found["Bayes-optimal"] = bayes_optimal_return(arms=arms, pulls=pulls)
    else:
        found["random, n * horizon"] = float(environment.episodes * environment.horizon)
    return found


def report(rows: dict[str, Row], references: dict[str, float]) -> str:
    """Both tables, for people.

    Args:
      rows: What each strategy reached, by its name.
      references: Returns that need no strategy, by what they are.
    """
    table = [["strategy", "parameter", "return"]]
    for name, (parameter, _, (mean, ci95)) in rows.items():
        shown = "" if parameter is None else f"{parameter:g}"
        table.append([name, shown, f"{mean:.2f} ± {ci95:.2f}"])
    exact = [["reference", "return"]]
    exact += [[name, f"{value:.2f}"] for name, value in references.items()]
    return f"{aligned(table)}\n\n{aligned(exact)}"


def _result(
    settings: dict[str, Any], rows: dict[str, Row], references: dict[str, float]
) -> dict[str, Any]:
    return {
        "tasks": {"name": FLAGS.tasks, **settings},
        "published": FLAGS.published,
        "trials": FLAGS.trials,
        "tuning_trials": FLAGS.tuning_trials,
        "seed": FLAGS.seed,
        "strategies": {
            name: {
                "parameter": row.parameter,
                **row.score._asdict(),
                "tuning": {str(value): mean for value, mean in row.tuning.items()},
            }
            for name, row in rows.items()
        },
        "references": references,
    }


if __name__ == "__main__":
    define_flags(FLAGS)
    run_main(main)
