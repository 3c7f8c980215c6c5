"""In-context learners: one network reads the support set and answers queries about it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import (
    Array,
    Batch,
    Episode,
    Loss,
    LossAux,
    MetaLearner,
    Network,
    Objective,
    PyTree,
    check_episode,
    supervised_evaluate,
)
from meta_jax.lookup import UsageError
from meta_jax.model_based.latent import (
    init_latent,
    join_latent,
    kl_divergence,
    latent_distribution,
)
from meta_jax.model_based.sequence import check_vectors, nca_loss
from meta_jax.networks.layers import init_linear, linear
from meta_jax.networks.normalisation import (
    embed_apart,
    embed_queries,
    embed_support,
    embed_together,
    may_embed_together,
    queries_need_support,
)
from meta_jax.networks.sets import (
    SetNetwork,
    cross_attention,
    equiangular_codes,
    set_encoder,
    target_masked_transformer,
    temporal_convolutions,
)
from meta_jax.objectives import (
    Gaussian,
    check_batch,
    check_targets,
    cross_entropy,
    gaussian,
    impossible_logit,
    row_mask,
    target_kind,
    tree_rows,
    without_padding,
)
from meta_jax.ranges import NotNegative, NotNegativeInt, Positive, PositiveInt
from meta_jax.shapes import take_rows

Reader = Literal["mean", "cross_attention", "target_masked", "snail"]
LabelCode = Literal["one_hot", "equiangular"]


class InContextAdapted(NamedTuple):
    """A support set that was read."""

    memory: Any  # what the set network keeps of it
    state: PyTree  # the embedding network's
    support: Batch | None  # where queries are embedded beside it, in the mode `one_at_a_time`
    latent: Array | None  # mean of the latent vector, where there is one
    classes: Array | None  # bool [ways], those with support examples; None in regression


def build_reader(
    reader: Reader, objective: Objective, width: int, layers: int, heads: int
) -> SetNetwork:
    """Builds the set network that a setting names; the arguments are those of `in_context`.

    Raises:
      UsageError: an unknown name, or sizes that do not fit each other.
    """
    if reader not in get_args(Reader):
        raise UsageError(f"unknown reader '{reader}': choose one of {', '.join(get_args(Reader))}")
    if reader == "mean":
        if objective.kind == "classification":
            # What encodes an image is the network: r is the mean of each class.
            return set_encoder(width, 0, decoder_layers=layers, pairing="product")
        return set_encoder(width, layers)
    if reader == "cross_attention":
        return cross_attention(width, layers, heads)
    if reader == "target_masked":
        return target_masked_transformer(width, layers, heads)
    return temporal_convolutions(width, width, width, width)


@registry.learner(
    "in_context", network="strided_conv4", normalisation="running", run={"task_batch": 16}
)
def in_context(
    network: Network,
    *,
    objective: Objective = cross_entropy,
    reader: Reader = "target_masked",
    label_code: LabelCode = "one_hot",
    width: PositiveInt = 64,
    layers: PositiveInt = 4,
    heads: PositiveInt = 4,
    latent: NotNegativeInt = 0,
    least_scale: Positive = 0.01,
    nca_weight: NotNegative = 0.0,
    nca_alone: bool = False,
) -> MetaLearner:
    """Builds a learner that reads the support set in context, with no update of its own.

    Each support example becomes a pair of its embedded input and its label; a network reads the
    pairs and answers each query, which never sees another. How it reads them makes it one method or
    another: a Conditional Neural Process (Garnelo et al. 2018) with the mean; an attentive one
    (Kim et al. 2019) with cross_attention; TNP-D (Nguyen and Grover 2022), which
    is a Prior-Fitted Network (Müller et al. 2022) on tasks drawn from a prior, and with equiangular
    codes the network of CAML (Fifty et al. 2024), with target_masked; SNAIL (Mishra et al. 2018)
    with snail. A latent vector makes a Neural Process (Garnelo et al. 2018) of the mean and an
    attentive one (Kim et al. 2019) of cross_attention: training adds KL(q || p) / m for m queries,
    where the support set and the queries give q and the support set alone gives p.

    On Gaussian processes (tasks gp), 1000 outer steps give a log-likelihood of 0.99 nat (untrained
    -9.1, the exact posterior 2.08).

    Args:
      network: Embedding network of inputs.
      objective: Objective of the tasks. Answers to gaussian_likelihood are a mean and a scale.
      reader: How queries look at the support set: mean for the mean of encoded pairs, or of each
        class's embeddings where there are classes; cross_attention for attention to encoded pairs;
        target_masked for a transformer in which all look at the support set in every layer; snail
        for temporal convolutions and attention over the support examples one after another.
      label_code: Codes of class labels: one_hot, or equiangular for the corners of a simplex.
      width: Units of every layer.
      layers: Layers of the transformer, or of each encoder and decoder there is; snail has its own.
      heads: Number of attention heads, where there are several; divides the width.
      latent: Size of a latent vector that a task's answers share, drawn in training from q; a test
        takes the mean of p, so that it is not random. 0 for none.
      least_scale: Smallest scale of an answer to gaussian_likelihood; the neural processes of the
        literature have 0.1, which bounds the log-likelihood by 1.38, and its TNP-D none.
      nca_weight: Weight of the network's own loss, `nca_loss`, in classification.
      nca_alone: Whether that loss alone trains the network: the loss of the answers then trains
        only what reads the embeddings.

    Returns:
      The learner. Labels are inputs and outputs, so tests have at most as many ways as training; to
      a class without support examples it gives a logit of about -1e30. Shots may differ, but for
      snail, whose convolutions fit those of training. Support sets of several sizes, of fewer
      classes too, pass through one compiled program as a `Batch` with a mask.

    Raises:
      UsageError: an unknown reader or label code, sizes that do not fit each other, or nca_alone
        without nca_loss.

    Examples:
      >>> import jax.numpy as jnp
      >>> from meta_jax.networks.flatten import flatten
      >>> from meta_jax.objectives import gaussian_likelihood
      >>> learner = in_context(flatten(), objective=gaussian_likelihood, width=8, layers=1)
      >>> support = Batch(jnp.array([[0.0], [1.0]]), jnp.array([[0.5], [0.7]]))
      >>> params, state = learner.init(jax.random.key(0), Episode(support, support))
      >>> adapted = learner.adapt(params, state, support, jax.random.key(1), train=False)
      >>> y, _ = learner.predict(params, adapted, support.x, jax.random.key(2), train=False)
      >>> y.mean.shape, bool((y.scale > 0.01).all())
      ((2, 1), True)
    """
    _check_settings(objective, label_code)
    _check_nca(objective, nca_weight, nca_alone)
    reads = build_reader(reader, objective, width, layers, heads)
    coded = functools.partial(_codes, objective, label_code)
    answer = functools.partial(_answer, reads, objective, least_scale)

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: Array, *, train: bool
    ) -> InContextAdapted:
        check_batch(support, "support")
        check_size(objective, params, support.y)
        z, state = embed_support(network, params["network"], state, support, key=key, train=train)
        codes = coded(params, support.y)
        memory = reads.absorb(params["reader"], z, codes, support.mask)
        kept = support if queries_need_support(network.normalisation) else None
        mean = None
        if latent:
            mean = latent_distribution(params["latent"], z, codes, support.mask).mean
        return InContextAdapted(memory, state, kept, mean, supported_classes(objective, support))

    def predict(
        params: PyTree,
        adapted: InContextAdapted,
        x: PyTree,
        key: Array,
        *,
        train: bool,
        mask: Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        z, state = embed_queries(
            network,
            params["network"],
            adapted.state,
            x,
            support=adapted.support,
            key=key,
            train=train,
            mask=mask,
        )
        return answer(params, adapted.memory, z, adapted.latent, adapted.classes), state

    loss = _training_loss(network, reads, objective, coded, answer, nca_weight, nca_alone)
    if reader == "snail":
        loss = in_any_order(loss)
    init = functools.partial(_init, network, reads, objective, latent, width)
    return MetaLearner(init, adapt, predict, loss, supervised_evaluate(adapt, predict, objective))


def _check_nca(objective: Objective, nca_weight: float, nca_alone: bool) -> None:
    if nca_alone and not (nca_weight and objective.kind == "classification"):
        raise UsageError(
            "nca_alone leaves the network without a loss: it needs classification tasks and an "
            "nca_weight above 0"
        )


def _check_settings(objective: Objective, label_code: LabelCode) -> None:
    target_kind(objective)
    if label_code not in get_args(LabelCode):
        codes = ", ".join(get_args(LabelCode))
        raise UsageError(f"unknown label_code '{label_code}': choose one of {codes}")


def label_codes(objective: Objective, label_code: LabelCode, y: Array) -> Array:
    """What a network reads of targets [n, D]: real targets as they are, labels as codes."""
    check_targets(y)
    if objective.kind != "classification" or label_code == "one_hot":
        return y
    return y @ equiangular_codes(y.shape[1]).astype(y.dtype)


def number_of_outputs(objective: Objective, targets: int) -> int:
    """Units of the output layer for targets [n, targets]."""
    return 2 * targets if objective.outputs == "gaussian" else targets


def check_size(objective: Objective, params: PyTree, y: Array) -> None:
    """Refuses targets that a learner has no outputs for.

    Raises:
      ValueError: y is not [n, D] of real numbers.
      UsageError: there are more ways than in training, or another number of dimensions.
    """
    check_targets(y)
    size = trained_size(objective, params)
    if objective.kind == "classification" and y.shape[1] > size:
        raise UsageError(
            f"this learner has outputs for the {size} ways it trains with, and y has {y.shape[1]}: "
            "tests may have fewer ways than training, but not more"
        )
    if objective.kind != "classification" and y.shape[1] != size:
        raise UsageError(
            f"this learner has outputs for the {size} dimensions of targets it trains with, and y "
            f"has {y.shape[1]}: tests need as many as training"
        )


def trained_size(objective: Objective, params: PyTree) -> int:
    """Ways, or dimensions of targets, of the tasks that the parameters were built for."""
    return params["output"]["kernel"].shape[1] // number_of_outputs(objective, 1)


def with_all_columns(objective: Objective, params: PyTree, y: Array) -> Array:
    """Targets [n, D], labels with zeros for the classes that training has and this task has not."""
    return jnp.pad(y, ((0, 0), (0, trained_size(objective, params) - y.shape[1])))


def _codes(objective: Objective, label_code: LabelCode, params: PyTree, y: Array) -> Array:
    return label_codes(objective, label_code, with_all_columns(objective, params, y))


def supported_classes(objective: Objective, support: Batch) -> Array | None:
    """Classes with support examples, bool [ways]; None in regression."""
    if objective.kind != "classification":
        return None
    return (without_padding(support.y, support.mask) != 0).any(0)


def _answer(
    reads: SetNetwork,
    objective: Objective,
    least_scale: float,
    params: PyTree,
    memory: Any,
    z: Array,
    latent: Array | None,
    classes: Array | None,
) -> Array | Gaussian:
    features = reads.answer(params["reader"], memory, z)
    if latent is not None:
        features = join_latent(params["latent"], features, latent)
    raw = linear(params["output"], features)
    if classes is not None:
        return jnp.where(classes, raw[:, : classes.size], impossible_logit(raw.dtype))
    return gaussian(raw, least_scale) if objective.outputs == "gaussian" else raw


def _init(
    network: Network,
    reads: SetNetwork,
    objective: Objective,
    latent: int,
    width: int,
    key: Array,
    episode: Episode,
) -> tuple[PyTree, PyTree]:
    network_key, embed_key, reader_key, output_key, latent_key = jax.random.split(key, 5)
    support = episode.support
    check_batch(support, "support")
    check_targets(support.y)
    params, state = network.init(network_key, support.x)
    z, _ = embed_support(network, params, state, support, key=embed_key, train=False)
    check_vectors(z)
    reader = reads.init(reader_key, z.shape[1], support.y.shape[1], len(z))

    def features(reader: PyTree, z: Array, y: Array) -> Array:
        return reads.answer(reader, reads.absorb(reader, z, y, support.mask), z)

    size = jax.eval_shape(features, reader, z, support.y).shape[1]
    outputs = number_of_outputs(objective, support.y.shape[1])
    parts = {"network": params, "reader": reader}
    if latent:
        inputs, codes = z.shape[1], support.y.shape[1]
        parts["latent"] = init_latent(latent_key, inputs, codes, size, size=latent, width=width)
    output = init_linear(output_key, width if latent else size, outputs)
    return parts | {"output": output}, state


def _training_loss(
    network: Network,
    reads: SetNetwork,
    objective: Objective,
    coded: Callable[[PyTree, Array], Array],
    answer: Callable[[PyTree, Any, Array, Array | None, Array | None], Array | Gaussian],
    nca_weight: float,
    nca_alone: bool,
) -> Loss:
    embed = embed_together if may_embed_together(network.normalisation) else embed_apart
    by_class = objective.kind == "classification"

    def loss(params: PyTree, state: PyTree, episode: Episode, key: Array) -> tuple[Array, LossAux]:
        support, query = episode
        check_episode(episode)
        check_size(objective, params, support.y)
        embed_key, latent_key = jax.random.split(key)
        z_support, z, state = embed(
            network, params["network"], state, support, query, key=embed_key
        )
        near = _loss_of_encoder(z_support, z, episode) if nca_weight and by_class else None
        if nca_alone:
            z_support, z = jax.lax.stop_gradient((z_support, z))
        codes = [coded(params, batch.y) for batch in episode]
        memory = reads.absorb(params["reader"], z_support, codes[0], support.mask)
        classes = supported_classes(objective, support)
        latent, divergence = None, None
        if "latent" in params:
            masks = [row_mask(batch) for batch in episode]
            latent, divergence = _draw_latent(
                params["latent"], [z_support, z], codes, masks, latent_key
            )
        value, metrics = objective.loss(
            answer(params, memory, z, latent, classes), query.y, query.mask
        )
        if divergence is not None:
            share = divergence / jnp.maximum(row_mask(query).sum(), 1).astype(value.dtype)
            value, metrics = value + share, {**metrics, "kl": share}
        if near is not None:
            value, metrics = value + nca_weight * near, {**metrics, "nca_loss": near}
        return value, LossAux(state, metrics)

    return loss


def _draw_latent(
    params: PyTree,
    embedded: Sequence[Array],
    codes: Sequence[Array],
    masks: Sequence[Array],
    key: Array,
) -> tuple[Array, Array]:
    """A latent vector drawn from q, and KL(q || p), of support and queries."""
    prior = latent_distribution(params, embedded[0], codes[0], masks[0])
    joined = map(jnp.concatenate, (embedded, codes, masks))
    posterior = latent_distribution(params, *joined)
    noise = jax.random.normal(key, posterior.mean.shape, posterior.mean.dtype)
    return posterior.mean + posterior.scale * noise, kl_divergence(posterior, prior)


def _loss_of_encoder(z_support: Array, z: Array, episode: Episode) -> Array:
    masks = [row_mask(batch) for batch in episode]
    y = jnp.concatenate([batch.y for batch in episode])
    return nca_loss(jnp.concatenate([z_support, z]), y, jnp.concatenate(masks))


def in_any_order(loss: Loss) -> Loss:
    """A loss that sees the support set in random order, for learners to which the order matters."""

    def shuffled(
        params: PyTree, state: PyTree, episode: Episode, key: Array
    ) -> tuple[Array, LossAux]:
        order_key, loss_key = jax.random.split(key)
        check_batch(episode.support, "support")
        order = jax.random.permutation(order_key, tree_rows(episode.support.x))
        return loss(
            params, state, Episode(take_rows(episode.support, order), episode.query), loss_key
        )

    return shuffled
