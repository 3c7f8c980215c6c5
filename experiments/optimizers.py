"""Flags of `experiments.learn_optimizer`, and what they describe."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from absl import flags

from experiments.command_line import UsageError
from experiments.learners import clipped, decayed_rate
from experiments.tasks import Tasks, tasks
from meta_jax.core import MetaLearner, Network
from meta_jax.data.episodes import EpisodeSpec
from meta_jax.data.registry import load_splits
from meta_jax.networks.conv4 import strided_conv4
from meta_jax.networks.mlp import mlp
from meta_jax.optimization_based.adjoints import FIRST_ORDER, UNROLLED
from meta_jax.optimization_based.learned_optimizers.estimators import (
    Estimator,
    full_unroll,
    persistent_es,
    truncated_es,
    truncated_gradient,
)
from meta_jax.optimization_based.learned_optimizers.families import (
    ProblemFamily,
    classification,
    quadratics,
    sample_quadratic,
)
from meta_jax.optimization_based.learned_optimizers.learned_optimizer import learned_optimizer
from meta_jax.optimization_based.learned_optimizers.lstm import coordinatewise_lstm
from meta_jax.optimization_based.learned_optimizers.mlp import adafactor_mlp_rule, mlp_rule
from meta_jax.optimization_based.update_rules import UpdateRule

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


def define_optimizer_flags(values: flags.FlagValues) -> None:
    """Defines the flags that make a run what it is; they are kept in the workdir's flags.txt."""

    def string(name: str, default: str | None, text: str) -> None:
        flags.DEFINE_string(name, default, text, flag_values=values)

    def integer(name: str, default: int | None, text: str, lower_bound: int = 1) -> None:
        flags.DEFINE_integer(name, default, text, lower_bound, flag_values=values)

    def number(name: str, default: float | None, text: str) -> None:
        flags.DEFINE_float(name, default, text, flag_values=values)

    string("rule", "lstm", "What is learned: lstm, mlp or adafactor_mlp.")
    number("preprocessing", 5.0, "Of lstm: p of the gradients' logarithms; 0 for plain gradients.")
    number("output_scale", 0.01, "Of lstm: what its output is multiplied by.")
    string("family", "quadratics", "What is optimized: quadratics, mlp or convnet.")
    string("distribution", "normal", "Of quadratics: normal or uniform.")
    string("dataset", "glyphs", "Of mlp and convnet: glyphs, omniglot, tfds:NAME or folder:PATH.")
    string("split_rule", "vinyals", "Class split of omniglot: vinyals or lake.")
    integer("image_size", 14, "Side of the images in pixels.")
    integer("ways", 10, "Classes that a network learns to tell apart.")
    integer("shots", 15, "Training images of each class.")
    integer("minibatch", 64, "Training images of an inner step.")
    integer("width", 20, "Units of each hidden layer of mlp, channels of each block of convnet.")
    integer("depth", 1, "Hidden layers of mlp.")
    string("activation", "sigmoid", f"Of mlp: {', '.join(_ACTIVATIONS)}.")
    string("estimator", "truncated", "Of the outer gradient: full, truncated, truncated_es or pes.")
    integer("horizon", 100, "Inner steps of a training run.")
    integer("truncation", 20, "Inner steps between two outer steps; not for full.")
    number("sigma", 0.01, "Of truncated_es and pes: standard deviation of a perturbation.")
    flags.DEFINE_boolean(
        "second_order", False, "Differentiate the inner gradients too.", flag_values=values
    )
    integer("task_batch", 128, "Training runs side by side.")
    integer("task_chunk", None, "Runs vmapped at a time; default: one for each device on a CPU.")
    integer("steps", 5000, "Outer steps.")
    number("learning_rate", 1e-3, "Of the outer optimizer, Adam.")
    string("decay", None, "Of the learning rate, to zero at the last step: linear or cosine.")
    number("clip_norm", None, "Largest norm of the outer gradient; default: any.")
    integer("log_every", 50, "Outer steps in one compiled call and between lines of metrics.")
    integer("eval_every", 500, "Outer steps between validations; 0: none.", 0)
    integer("checkpoint_every", 500, "Outer steps between checkpoints.")
    integer("val_tasks", 256, "Training runs of a validation.")
    integer("seed", 0, "Of everything.", 0)


def _one_of(what: str, name: str, choices: dict) -> object:
    if name not in choices:
        raise UsageError(f"unknown {what} '{name}': choose one of {', '.join(choices)}")
    return choices[name]


def build_rule(values: flags.FlagValues) -> UpdateRule:
    """The rule that the flags describe.

    Raises:
      UsageError: an unknown one.
    """
    lstm = functools.partial(
        coordinatewise_lstm,
        preprocessing=values.preprocessing or None,
        scale=values.output_scale,
    )
    rules = {"lstm": lstm, "mlp": mlp_rule, "adafactor_mlp": adafactor_mlp_rule}
    return _one_of("rule", values.rule, rules)()


def build_family(values: flags.FlagValues) -> ProblemFamily:
    """What the flags say is optimized.

    Raises:
      UsageError: an unknown family or activation.
    """

    def network() -> Network:
        if values.family == "convnet":
            return strided_conv4(values.width, batch_norm="batch")
        activation = _one_of("activation", values.activation, _ACTIVATIONS)
        return mlp((values.width,) * values.depth, activation=activation)

    def classifier() -> ProblemFamily:
        return classification(network(), ways=values.ways, minibatch=values.minibatch)

    families = {"quadratics": quadratics, "mlp": classifier, "convnet": classifier}
    return _one_of("family", values.family, families)()


def load_problems(values: flags.FlagValues, data_dir: str | None) -> dict[str, Tasks]:
    """Where problems come from: 'train', 'val' and 'test', of classes of their own.

    Raises:
      UsageError: an unknown distribution, or a split too small.
      DataError: the dataset is unknown, missing or damaged.
    """
    if values.family == "quadratics":
        sampler = functools.partial(sample_quadratic, distribution=values.distribution)
        return dict.fromkeys(("train", "val", "test"), Tasks(sampler, ()))
    splits = load_splits(
        values.dataset,
        data_dir=data_dir,
        image_size=values.image_size,
        seed=values.seed,
        split_rule=values.split_rule,
    )
    # The queries are for those who want to ask the trained network; training does not.
    spec = EpisodeSpec(values.ways, values.shots, 1, "none")
    return {split: tasks(splits, split, spec) for split in ("train", "val", "test")}


def build_learner(values: flags.FlagValues) -> MetaLearner:
    """The learned optimizer that the flags describe.

    Raises:
      UsageError: an unknown name, or a truncation that does not divide the horizon.
    """
    segments = (values.horizon, values.truncation)
    estimators: dict[str, Callable[[], Estimator]] = {
        "full": lambda: full_unroll(values.horizon),
        "truncated": lambda: truncated_gradient(*segments),
        "truncated_es": lambda: truncated_es(*segments, sigma=values.sigma),
        "pes": lambda: persistent_es(*segments, sigma=values.sigma),
    }
    try:
        return learned_optimizer(
            build_family(values),
            build_rule(values),
            _one_of("estimator", values.estimator, estimators)(),
            test_steps=values.horizon,
            adjoint=UNROLLED if values.second_order else FIRST_ORDER,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def build_outer_optimizer(values: flags.FlagValues) -> optax.GradientTransformation:
    """Adam with its schedule and clipping.

    Raises:
      UsageError: an unknown decay.
    """
    return clipped(optax.adam(decayed_rate(values)), values.clip_norm)
