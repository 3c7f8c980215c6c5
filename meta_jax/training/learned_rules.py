"""A learned update rule from the folder of its weights alone."""

from pathlib import Path
from typing import NamedTuple

import jax
import optax

from meta_jax import registry
from meta_jax.core import Array, Config, Episode, PyTree
from meta_jax.lookup import UsageError
from meta_jax.optimization_based.learned_optimizers.export import to_optax
from meta_jax.optimization_based.learned_optimizers.families import ProblemFamily
from meta_jax.optimization_based.update_rules import UpdateRule
from meta_jax.training import checkpoints
from meta_jax.training.record import read_config, task_like


class LearnedRule(NamedTuple):
    """An update rule and what it learned.

    Attributes:
      rule: The update rule.
      meta: Its meta-parameters.
      config: Record of what it was trained on, the contents of config.json.
    """

    rule: UpdateRule
    meta: PyTree
    config: Config

    def to_optax(self) -> optax.GradientTransformationExtraArgs:
        """Converts the rule to an optax optimizer: see `to_optax`."""
        return to_optax(self.rule, self.meta)


def load_rule(folder: Path | str) -> LearnedRule:
    """Loads a learned update rule; its folder says all about it.

    Args:
      folder: Workdir of `experiments.learn_optimizer`, or a folder of weights such as
        'results/weights/lstm_glyphs': config.json and checkpoints/best.

    Returns:
      The rule, its meta-parameters, and the record of its training.

    Raises:
      UsageError: the folder has no record of a rule.
      CheckpointError: it has no intact checkpoint, or another rule's.
    """
    config = read_config(folder)
    learner = config["learner"]
    if "rule" not in (learner or {}):
        raise UsageError(f"{folder} holds no learned optimizer: load it with meta_jax.load")
    rule, family = (registry.build(kind, learner[kind]) for kind in ("rule", "family"))
    best = Path(folder) / "checkpoints" / "best"
    contents = checkpoints.read(best)
    checkpoints.check_config(best, contents.config, learner)
    like = meta_like(rule, family, task_like(config["example"]))
    meta = checkpoints.unflatten(best, contents.leaves, {"params": like})["params"]
    return LearnedRule(rule, meta, config)


def meta_like(rule: UpdateRule, family: ProblemFamily, task: Episode) -> PyTree:
    """Shapes of a rule's meta-parameters, where it trains the networks of a family.

    Args:
      rule: Update rule.
      family: Family of the networks.
      task: Task, whose shapes alone matter.
    """

    def init_meta(key: Array, task: Episode) -> PyTree:
        params, _ = family.network(task.support).init(key, task.support.x)
        return rule.init_meta(key, params)

    return jax.eval_shape(init_meta, jax.random.key(0), task)
