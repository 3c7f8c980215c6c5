"""Learners by name, as `--learner` takes them."""

import functools
from collections.abc import Callable

import jax
import optax
from absl import flags
from jax.sharding import Mesh

from experiments.command_line import UsageError
from meta_jax.core import Criterion, MetaLearner, Network, cross_entropy, squared_error
from meta_jax.data.distortions import distorted_training
from meta_jax.metric_based.kernel import kernel_learner
from meta_jax.metric_based.matching import matching
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.metric_based.relation import relation
from meta_jax.metric_based.ridge import ridge
from meta_jax.metric_based.siamese import siamese
from meta_jax.model_based.mann import lstm_learner, mann
from meta_jax.model_based.meta_networks import meta_networks
from meta_jax.networks.conv4 import conv4, strided_conv4
from meta_jax.networks.flatten import flatten
from meta_jax.networks.koch import koch
from meta_jax.networks.mlp import mlp
from meta_jax.networks.relation_network import relation_encoder
from meta_jax.optimization_based.adjoints import ADJOINTS, Adjoint, implicit, truncated
from meta_jax.optimization_based.anil import anil
from meta_jax.optimization_based.boil import boil
from meta_jax.optimization_based.imaml import imaml
from meta_jax.optimization_based.lstm_meta_learner import lstm_meta_learner
from meta_jax.optimization_based.maml import first_order_maml, maml
from meta_jax.optimization_based.maml_plus_plus import maml_plus_plus
from meta_jax.optimization_based.meta_sgd import meta_sgd
from meta_jax.optimization_based.protomaml import protomaml
from meta_jax.optimization_based.reptile import reptile
from meta_jax.training.outer_step import task_mesh


def _classifies(values: flags.FlagValues, criterion: Criterion) -> None:
    if criterion is not cross_entropy:
        raise UsageError(f"{values.learner} classifies: give it a dataset of images, not sinusoid")


def _siamese(values: flags.FlagValues, network: Network, criterion: Criterion) -> MetaLearner:
    _classifies(values, criterion)
    return siamese(network)


def _matching(values: flags.FlagValues, network: Network, criterion: Criterion) -> MetaLearner:
    return matching(
        network,
        temperature=values.temperature,
        full_context_steps=values.full_context_steps if values.learner == "matching_fce" else 0,
        regression=criterion is squared_error,
    )


def _relation(values: flags.FlagValues, network: Network, criterion: Criterion) -> MetaLearner:
    _classifies(values, criterion)
    if values.network not in (None, "relation_encoder"):
        raise UsageError(
            f"relation compares feature maps, and '{values.network}' gives vectors: "
            "use --network=relation_encoder"
        )
    return relation(network, criterion=values.relation_criterion, features=values.features)


def _kernel(values: flags.FlagValues, network: Network, criterion: Criterion) -> MetaLearner:
    return kernel_learner(network, kernel=values.kernel, regression=criterion is squared_error)


def _ridge(values: flags.FlagValues, network: Network, criterion: Criterion) -> MetaLearner:
    return ridge(network, regression=criterion is squared_error)


def _prototypical(values: flags.FlagValues, network: Network, criterion: Criterion) -> MetaLearner:
    return prototypical(network, distance=values.distance, regression=criterion is squared_error)


def _meta_networks(values: flags.FlagValues, network: Network, criterion: Criterion) -> MetaLearner:
    del network
    _classifies(values, criterion)
    _one_output_for_each_way(values)
    if values.network is not None:
        raise UsageError("meta_networks has networks of its own: leave --network out")
    return meta_networks(values.features, strength=values.key_strength)


def _sequence_learner(
    values: flags.FlagValues, network: Network, criterion: Criterion
) -> MetaLearner:
    _classifies(values, criterion)
    _one_output_for_each_way(values)
    if values.learner == "lstm":
        return lstm_learner(network, units=values.units, neighbour_weight=values.neighbour_weight)
    return mann(
        network,
        units=values.units,
        slots=values.memory_slots,
        width=values.memory_width,
        heads=values.read_heads,
        decay=values.usage_decay,
        strength=values.key_strength,
        values=values.memory_values,
        neighbour_weight=values.neighbour_weight,
    )


def _one_output_for_each_way(values: flags.FlagValues) -> None:
    if values.train_ways not in (None, values.ways):
        raise UsageError(
            f"{values.learner} has one output for each of the {values.train_ways} ways it trains "
            f"with: --ways={values.ways} must equal --train_ways"
        )


def _adjoint(values: flags.FlagValues) -> Adjoint | None:
    """The adjoint that the flags ask for; None for the method's own."""
    parametrised = {
        "truncated": lambda: truncated(1 if values.truncation is None else values.truncation),
        "implicit": lambda: implicit(**_given(cg_steps=values.cg_steps, damping=values.cg_damping)),
    }
    if values.adjoint == "mixed_mode" and "mlp" not in (values.network, _default_network(values)):
        raise UsageError(
            "convolutions have no forward derivative, which --adjoint=mixed_mode takes: "
            "use --adjoint=checkpointed or --network=mlp"
        )
    if values.adjoint in parametrised:
        return parametrised[values.adjoint]()
    if values.adjoint not in (None, *ADJOINTS):
        names = ", ".join([*ADJOINTS, *parametrised])
        raise UsageError(f"unknown adjoint '{values.adjoint}': choose one of {names}")
    return None if values.adjoint is None else ADJOINTS[values.adjoint]


def _given(**settings: object) -> dict[str, object]:
    """Those that a flag gives; the others stay with the method."""
    return {name: value for name, value in settings.items() if value is not None}


def _steps(values: flags.FlagValues) -> dict[str, object]:
    return {"steps": values.inner_steps, "eval_steps": values.eval_inner_steps}


def _inner_loop(method: Callable[..., MetaLearner]) -> Callable[..., MetaLearner]:
    """MAML or a relative with its settings."""

    def build(values: flags.FlagValues, network: Network, criterion: Criterion) -> MetaLearner:
        _one_output_for_each_way(values)
        return method(
            network,
            inner_lr=values.inner_learning_rate,
            criterion=criterion,
            **_steps(values),
            **_given(adjoint=_adjoint(values), reduction=values.inner_reduction),
        )

    return build


def _maml_plus_plus(
    values: flags.FlagValues, network: Network, criterion: Criterion
) -> MetaLearner:
    annealing = _given(
        multi_step_steps=values.multi_step_steps, first_order_steps=values.first_order_steps
    )
    return _inner_loop(functools.partial(maml_plus_plus, **annealing))(values, network, criterion)


def _imaml(values: flags.FlagValues, network: Network, criterion: Criterion) -> MetaLearner:
    settings = _given(
        proximity=values.proximity, cg_steps=values.cg_steps, damping=values.cg_damping
    )
    return _inner_loop(functools.partial(imaml, **settings))(values, network, criterion)


def _protomaml(values: flags.FlagValues, network: Network, criterion: Criterion) -> MetaLearner:
    _classifies(values, criterion)
    return protomaml(
        network,
        inner_lr=values.inner_learning_rate,
        **_steps(values),
        **_given(adjoint=_adjoint(values), reduction=values.inner_reduction),
    )


def _reptile(values: flags.FlagValues, network: Network, criterion: Criterion) -> MetaLearner:
    _one_output_for_each_way(values)
    if values.adjoint is not None:
        raise UsageError("reptile differentiates no inner loop: leave --adjoint out")
    return reptile(
        network,
        inner_lr=values.inner_learning_rate,
        batch_size=values.inner_batch,
        eval_batch_size=values.eval_inner_batch,
        criterion=criterion,
        **_steps(values),
    )


def _lstm_meta_learner(
    values: flags.FlagValues, network: Network, criterion: Criterion
) -> MetaLearner:
    _one_output_for_each_way(values)
    return lstm_meta_learner(
        network, criterion=criterion, **_steps(values), **_given(adjoint=_adjoint(values))
    )


# Name -> (builder, its network, its batch norm).
LEARNERS: dict[str, tuple[Callable[..., MetaLearner], str, str]] = {
    "siamese": (_siamese, "conv4", "running"),
    "matching": (_matching, "conv4", "running"),
    "matching_fce": (_matching, "conv4", "running"),
    "relation": (_relation, "relation_encoder", "batch"),
    "kernel": (_kernel, "conv4", "running"),
    "ridge": (_ridge, "conv4", "running"),
    "prototypical": (_prototypical, "conv4", "running"),
    "mann": (_sequence_learner, "flatten", "running"),
    "lstm": (_sequence_learner, "flatten", "running"),
    "meta_networks": (_meta_networks, "flatten", "running"),  # its network is its own
    "maml": (_inner_loop(maml), "strided_conv4", "batch"),
    "fomaml": (_inner_loop(first_order_maml), "strided_conv4", "batch"),
    "anil": (_inner_loop(anil), "strided_conv4", "batch"),
    "boil": (_inner_loop(boil), "strided_conv4", "batch"),
    "meta_sgd": (_inner_loop(meta_sgd), "strided_conv4", "batch"),
    "maml_plus_plus": (_maml_plus_plus, "strided_conv4", "batch"),
    "imaml": (_imaml, "strided_conv4", "batch"),
    "protomaml": (_protomaml, "strided_conv4", "batch"),
    "reptile": (_reptile, "flat_strided_conv4", "batch"),
    "lstm_meta_learner": (_lstm_meta_learner, "strided_conv4", "support"),
}
SEQUENCE_LEARNERS = ("mann", "lstm")  # those that the sequence protocol can test
_CONVOLUTIONAL = {
    "conv4": conv4,
    "strided_conv4": strided_conv4,
    "flat_strided_conv4": functools.partial(strided_conv4, mean=False),
    "relation_encoder": relation_encoder,
}
_SHARING = ("conv4", "strided_conv4", "flat_strided_conv4")  # of an episode's images, among devices
_PLAIN = {"koch": koch, "mlp": mlp, "flatten": flatten}  # without batch norm and `features`


def _entry(values: flags.FlagValues) -> tuple[Callable[..., MetaLearner], str, str]:
    if values.learner not in LEARNERS:
        raise UsageError(f"unknown learner '{values.learner}': choose one of {', '.join(LEARNERS)}")
    return LEARNERS[values.learner]


def _default_network(values: flags.FlagValues) -> str:
    return "mlp" if values.dataset == "sinusoid" else _entry(values)[1]


def image_mesh(values: flags.FlagValues) -> Mesh | None:
    """The devices that share the images of a step's one task; None where it is not alone.

    Nor where the network cannot share them: every device would compute the whole task.
    """
    name = values.network or _default_network(values)
    alone = values.task_batch == 1 and name in _SHARING
    return task_mesh(jax.device_count()) if alone else None


def build_network(values: flags.FlagValues, mesh: Mesh | None = None) -> Network:
    """The embedding network that the flags describe.

    Args:
      values: flags of the run.
      mesh: devices that share the images of an episode, where the network can.

    Raises:
      UsageError: an unknown network or batch norm.
    """
    _, _, batch_norm = _entry(values)
    name = values.network or _default_network(values)
    if name in _PLAIN:
        return _PLAIN[name]()
    if name not in _CONVOLUTIONAL:
        raise UsageError(
            f"unknown network '{name}': choose one of {', '.join((*_CONVOLUTIONAL, *_PLAIN))}"
        )
    settings = {} if mesh is None or name not in _SHARING else {"mesh": mesh}
    try:
        return _CONVOLUTIONAL[name](
            values.features, batch_norm=values.batch_norm or batch_norm, **settings
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def build_learner(
    values: flags.FlagValues, mesh: Mesh | None = None
) -> tuple[MetaLearner, Criterion]:
    """The learner that the flags describe, and the criterion it is tested with.

    Args:
      values: flags of the run.
      mesh: see `build_network`.

    Raises:
      UsageError: an unknown learner, network, batch norm, distance or adjoint.
    """
    criterion = squared_error if values.dataset == "sinusoid" else cross_entropy
    build, _, _ = _entry(values)
    if values.protocol not in ("few_shot", "sequence"):
        raise UsageError(f"unknown protocol '{values.protocol}': choose few_shot or sequence")
    if values.protocol == "sequence" and values.learner not in SEQUENCE_LEARNERS:
        raise UsageError(
            f"--protocol=sequence tests learners that answer while they adapt "
            f"({', '.join(SEQUENCE_LEARNERS)}), not {values.learner}"
        )
    if values.distort and criterion is not cross_entropy:
        raise UsageError("--distort distorts images: give it a dataset of them, not sinusoid")
    try:
        learner = build(values, build_network(values, mesh), criterion)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return distorted_training(learner) if values.distort else learner, criterion


def build_optimizer(values: flags.FlagValues) -> optax.GradientTransformation:
    """The outer optimizer with its learning rate's schedule and its clipping.

    Raises:
      UsageError: an unknown optimizer or decay, or two schedules at once.
    """
    # Reptile's learning rate is its epsilon, the share of the way that a plain step goes.
    name = values.optimizer or ("sgd" if values.learner == "reptile" else "adam")
    optimizers = {"adam": optax.adam, "sgd": optax.sgd}
    if name not in optimizers:
        raise UsageError(f"unknown optimizer '{name}': choose one of {', '.join(optimizers)}")
    if values.decay and values.halve_every:
        raise UsageError("--decay and --halve_every exclude each other: give one of the two")
    if values.halve_every:
        rate = optax.exponential_decay(
            values.learning_rate, values.halve_every, 0.5, staircase=True
        )
    else:
        rate = decayed_rate(values)
    return clipped(optimizers[name](rate), values.clip_norm)


def decayed_rate(values: flags.FlagValues) -> optax.ScalarOrSchedule:
    """The outer learning rate, or its way to zero at the last step.

    Raises:
      UsageError: an unknown decay.
    """
    rate, steps = values.learning_rate, values.steps
    decays = {
        None: lambda: rate,
        "linear": lambda: optax.linear_schedule(rate, 0.0, steps),
        "cosine": lambda: optax.cosine_decay_schedule(rate, steps),
    }
    if values.decay not in decays:
        raise UsageError(f"unknown decay '{values.decay}': choose linear or cosine")
    return decays[values.decay]()


def clipped(
    optimizer: optax.GradientTransformation, norm: float | None
) -> optax.GradientTransformation:
    """An optimizer that sees gradients of at most this norm; None leaves them as they are."""
    return optimizer if norm is None else optax.chain(optax.clip_by_global_norm(norm), optimizer)
