"""Learners by name, as `--learner` takes them."""

from collections.abc import Callable

import optax
from absl import flags

from experiments.command_line import UsageError
from meta_jax.core import Criterion, MetaLearner, Network, cross_entropy, squared_error
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.conv4 import conv4, strided_conv4
from meta_jax.networks.mlp import mlp
from meta_jax.optimization_based.adjoints import ADJOINTS
from meta_jax.optimization_based.maml import maml


def _prototypical(values: flags.FlagValues, criterion: Criterion) -> MetaLearner:
    if criterion is not cross_entropy:
        raise UsageError("prototypical classifies: give it a dataset of images, not sinusoid")
    return prototypical(network(values), distance=values.distance)


def _maml(values: flags.FlagValues, criterion: Criterion) -> MetaLearner:
    if values.train_ways not in (None, values.ways):
        raise UsageError(
            f"{values.learner} has one output for each of the {values.train_ways} ways it trains "
            f"with: --ways={values.ways} must equal --train_ways"
        )
    adjoint = values.adjoint or ("first_order" if values.learner == "fomaml" else "unrolled")
    if adjoint not in ADJOINTS:
        raise UsageError(f"unknown adjoint '{adjoint}': choose one of {', '.join(ADJOINTS)}")
    return maml(
        network(values),
        inner_lr=values.inner_learning_rate,
        steps=values.inner_steps,
        eval_steps=values.eval_inner_steps,
        adjoint=ADJOINTS[adjoint],
        criterion=criterion,
    )


# Name -> (builder, its network, its batch norm).
LEARNERS: dict[str, tuple[Callable[..., MetaLearner], str, str]] = {
    "prototypical": (_prototypical, "conv4", "running"),
    "maml": (_maml, "strided_conv4", "batch"),
    "fomaml": (_maml, "strided_conv4", "batch"),
}
_CONVOLUTIONAL = {"conv4": conv4, "strided_conv4": strided_conv4}


def _entry(values: flags.FlagValues) -> tuple[Callable[..., MetaLearner], str, str]:
    if values.learner not in LEARNERS:
        raise UsageError(f"unknown learner '{values.learner}': choose one of {', '.join(LEARNERS)}")
    return LEARNERS[values.learner]


def network(values: flags.FlagValues) -> Network:
    """The embedding network that the flags describe.

    Raises:
      UsageError: an unknown network or batch norm.
    """
    _, default, batch_norm = _entry(values)
    name = values.network or ("mlp" if values.dataset == "sinusoid" else default)
    if name == "mlp":
        return mlp()
    if name not in _CONVOLUTIONAL:
        raise UsageError(
            f"unknown network '{name}': choose one of {', '.join(_CONVOLUTIONAL)}, mlp"
        )
    try:
        return _CONVOLUTIONAL[name](values.features, batch_norm=values.batch_norm or batch_norm)
    except ValueError as error:
        raise UsageError(str(error)) from error


def build_learner(values: flags.FlagValues) -> tuple[MetaLearner, Criterion]:
    """The learner that the flags describe, and the criterion it is tested with.

    Raises:
      UsageError: an unknown learner, network, batch norm, distance or adjoint.
    """
    criterion = squared_error if values.dataset == "sinusoid" else cross_entropy
    build, _, _ = _entry(values)
    try:
        return build(values, criterion), criterion
    except ValueError as error:
        raise UsageError(str(error)) from error


def build_optimizer(values: flags.FlagValues) -> optax.GradientTransformation:
    """The outer Adam, its learning rate halved at regular intervals if the flags say so."""
    rate = values.learning_rate
    if values.halve_every:
        rate = optax.exponential_decay(rate, values.halve_every, 0.5, staircase=True)
    return optax.adam(rate)
