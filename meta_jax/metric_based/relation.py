"""Relation Networks (Sung et al. 2018, arXiv:1711.06025)."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import (
    Array,
    MetaLearner,
    Metrics,
    Network,
    Normalisation,
    Objective,
    ObjectiveLoss,
    PyTree,
)
from meta_jax.lookup import UsageError
from meta_jax.metric_based.heads import Head
from meta_jax.metric_based.learner import metric_learner
from meta_jax.metric_based.primitives import check_examples, choose
from meta_jax.networks.normalisation import (
    check_mode,
    keeps_support_moments,
    queries_need_support,
    query_moments,
    support_moments,
)
from meta_jax.networks.relation_network import init_relation_module, relation_module
from meta_jax.objectives import check_kind, check_outputs, cross_entropy, masked_mean
from meta_jax.ranges import PositiveInt

Padding = Literal["SAME", "VALID"]


def class_maps(z: Array, y: Array, mask: Array | None = None) -> Array:
    """Sums of feature maps over the examples of each class (Sung et al. 2018, section 3.2).

    Args:
      z: Feature maps [n, height, width, channels].
      y: One-hot labels [n, ways].
      mask: bool [n], False for padding.

    Returns:
      [ways, height, width, channels].

    Raises:
      ValueError: y or mask does not fit z.

    Examples:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([1., 2., 5.]).reshape(3, 1, 1, 1)
      >>> y = jnp.array([[1., 0.], [1., 0.], [0., 1.]])
      >>> class_maps(z, y).ravel().tolist()
      [3.0, 5.0]
    """
    check_examples(z, y, mask)
    if mask is not None:
        z = jnp.where(mask.reshape(-1, *[1] * (z.ndim - 1)), z, 0)
    return jnp.einsum("nk,n...->k...", y, z)


def relation_error(logits: Array, y: Array, mask: Array | None = None) -> tuple[Array, Metrics]:
    """Mean over all pairs of (sigmoid(logit) - 1[y_i = y_j])^2 (eq. 2).

    Scores that do not depend on the pair cannot beat (1 - 1/ways) / ways: 0.16 for 5 ways.

    Args:
      logits: [n, ways], relation scores before their sigmoid.
      y: One-hot labels [n, ways].
      mask: bool [n], False for padding.

    Returns:
      The loss and no metrics.

    Raises:
      ValueError: logits and y differ in shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss, _ = relation_error(jnp.full((5, 5), -jnp.log(4.)), jnp.eye(5))
      >>> round(float(loss), 4)
      0.16
    """
    check_outputs(logits, y)
    return masked_mean(((jax.nn.sigmoid(logits) - y) ** 2).mean(-1), mask), {}


class RelationFitted(NamedTuple):
    """What the relation head keeps of a support set."""

    maps: Array  # one feature map for each class [ways, height, width, channels]
    # Where queries are compared beside the support examples, in the mode `one_at_a_time`:
    z: Array | None  # the support's feature maps [n, height, width, channels]
    mask: Array | None  # bool [n], False for padding


def relation_head(
    *, normalisation: Normalisation, features: int = 64, padding: Padding = "SAME"
) -> Head:
    """Builds the relation module on sums of feature maps.

    Its outputs are scores before their sigmoid. Where the mode keeps the support set's moments,
    `fit` takes the module's from the pairs of a class and a support example; in the mode
    `one_at_a_time` a query's pairs are normalised with these in tests.

    Args:
      normalisation: Mode of the module's normalisation layers.
      features: Channels of the module's convolutions.
      padding: Padding of its convolutions, see `init_relation_module`.

    Raises:
      UsageError: an unknown mode.
    """
    check_mode(normalisation)
    settings = {"normalisation": normalisation, "padding": padding}

    def init(key: Array, z: Array, y: Array, mask: Array | None) -> tuple[PyTree, PyTree]:
        del y, mask
        check_maps(z)
        return init_relation_module(key, z, features=features, **settings)

    def fit(
        params: PyTree, state: PyTree, z: Array, y: Array, mask: Array | None, *, train: bool
    ) -> tuple[RelationFitted, PyTree]:
        check_maps(z)
        maps = class_maps(z, y, mask)
        if keeps_support_moments(normalisation):
            moments = support_moments(normalisation, train=train)
            _, state = relation_module(
                params, state, maps, z, moments=moments, mask=mask, **settings
            )
        kept = (z, mask) if queries_need_support(normalisation) else (None, None)
        return RelationFitted(maps, *kept), state

    def predict(
        params: PyTree,
        state: PyTree,
        fitted: RelationFitted,
        z: Array,
        *,
        train: bool,
        mask: Array | None = None,
    ) -> tuple[Array, PyTree]:
        if fitted.z is not None and not train:
            return _one_at_a_time(params, state, fitted, fitted.z, z, settings), state
        moments = query_moments(normalisation, train=train)
        return relation_module(
            params, state, fitted.maps, z, moments=moments, mask=mask, **settings
        )

    return Head(init, fit, predict)


def _one_at_a_time(
    params: PyTree,
    state: PyTree,
    fitted: RelationFitted,
    z_support: Array,
    z: Array,
    settings: dict[str, Any],
) -> Array:
    """Scores of each query, its pairs normalised beside those of the support set."""
    mask = None
    if fitted.mask is not None:
        mask = jnp.concatenate([fitted.mask, jnp.ones(1, bool)])

    def score(query: Array) -> Array:
        beside = jnp.concatenate([z_support, query[None]])
        scores, _ = relation_module(
            params, state, fitted.maps, beside, moments="batch", mask=mask, **settings
        )
        return scores[-1]

    return jax.vmap(score)(z)


def check_maps(z: Array) -> None:
    """Refuses embeddings that are no feature maps.

    Raises:
      UsageError: z is not [n, height, width, channels].
    """
    if z.ndim != 4:
        raise UsageError(
            f"relation compares feature maps [n, height, width, channels], and its network gives "
            f"{list(z.shape)}: use --network=relation_encoder, or one that keeps the places"
        )


def default_joint_encoding(network: Network | None, objective: Objective) -> bool:
    """True where moments are kept for tests: those of support and queries together."""
    del objective
    return network is not None and network.normalisation == "running"


@registry.learner(
    "relation",
    network="relation_encoder",
    normalisation="batch",
    defaults={"joint_encoding": default_joint_encoding},
)
def relation(
    network: Network,
    *,
    objective: Objective = cross_entropy,
    loss: Literal["squared_error", "cross_entropy"] = "squared_error",
    features: PositiveInt = 64,
    padding: Padding = "SAME",
    joint_encoding: bool | None = None,
) -> MetaLearner:
    """Builds a Relation Network, which learns to compare queries with classes.

    r_ij = sigmoid(g([sum_k f(x_ik), f(x_j)])), g a network (eq. 1). Its normalisation has the
    mode of f. The paper's is batch: moments of whatever is asked, transductive on queries.

    With its flag alone, 1000 outer steps give 91.0 % on glyphs (untrained 20.0 %).

    Args:
      network: Encoder f, from images to feature maps.
      objective: Objective of the tasks; it classifies.
      loss: Training loss of the scores: squared_error of their sigmoids against 1[y_i = y_j], as
        in the paper, or cross_entropy, for the objective on the scores as logits.
      features: Channels of the relation module.
      padding: Padding of the relation module's convolutions: SAME (Omniglot), or VALID
        (miniImageNet).
      joint_encoding: Whether support and queries are embedded as one batch in training; by default
        in the normalisation mode running alone. The authors, who take the moments of each apart in
        tests, embed them apart in training too.

    Returns:
      The learner. Ways, shots and queries may differ between training and tests.

    Raises:
      UsageError: the objective does not classify, an unknown loss, or a network whose outputs are
        no feature maps.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from meta_jax.core import Batch, Episode
      >>> from meta_jax.networks.relation_network import relation_encoder
      >>> learner = relation(relation_encoder())
      >>> support = Batch(jnp.zeros((5, 28, 28, 1)), jnp.eye(5))
      >>> params, _ = jax.eval_shape(learner.init, jax.random.key(0), Episode(support, support))
      >>> {part: sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in params}
      {'head': 111505, 'network': 111936}
    """
    check_kind(objective, "classification", "relation")
    choose(dict.fromkeys(("SAME", "VALID")), "padding", padding)
    losses: dict[str, ObjectiveLoss] = {
        "squared_error": _with_metrics(relation_error, objective),
        "cross_entropy": objective.loss,
    }
    if joint_encoding is None:
        joint_encoding = default_joint_encoding(network, objective)
    return metric_learner(
        network,
        relation_head(normalisation=network.normalisation, features=features, padding=padding),
        objective,
        joint_encoding=joint_encoding,
        train_loss=choose(losses, "loss", loss),
    )


def _with_metrics(loss: ObjectiveLoss, objective: Objective) -> ObjectiveLoss:
    """A loss with the metrics of an objective."""

    def with_metrics(outputs: Array, y: Array, mask: Array | None) -> tuple[Array, Metrics]:
        value, metrics = loss(outputs, y, mask)
        return value, {**objective.loss(outputs, y, mask)[1], **metrics}

    return with_metrics
