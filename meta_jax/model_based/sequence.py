"""Learners that read a task as a sequence: at step t the input x_t and the label y_{t-1}.

One such learner is a recurrent cell on embedded inputs. Its support set is a sequence too, so it
adapts by reading it; each query is one more step from where the support set left it. Its own
protocol (Santoro et al. 2016, section 4) is the sequence itself: every x_t is answered before its
label is shown, and the accuracy is that at the 1st, 2nd, ... instance of a class.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp

from meta_jax.core import (
    Adapt,
    Array,
    Batch,
    Episode,
    Evaluate,
    Loss,
    LossAux,
    MetaLearner,
    Metrics,
    Network,
    Objective,
    PyTree,
    check_episode,
    check_mask,
    supervised_evaluate,
    with_loss,
)
from meta_jax.lookup import UsageError
from meta_jax.networks.layers import init_linear, linear
from meta_jax.networks.normalisation import embed_queries, embed_support, queries_need_support
from meta_jax.objectives import (
    as_real,
    check_batch,
    check_outputs,
    check_targets,
    cross_entropy,
    cross_entropy_loss,
    row_mask,
    without_padding,
)

EvaluationProtocol = Literal["few_shot", "sequence"]


class CellInit(Protocol):
    """(key, inputs, ways) -> params."""

    def __call__(self, key: Array, inputs: int, ways: int, /) -> PyTree:
        """Initial parameters for embeddings of that size and that many classes."""
        ...


class Cell(NamedTuple):
    """A recurrent cell, for one task.

    Attributes:
      init: Function (key, inputs, ways) -> params.
      start: Function params -> the carry before the first step.
      input_projection: Function (params, z [n, inputs], y [n, ways]) -> [n, ...]: all that does
        not depend on the carry.
      step: Function (params, carry, row of the projection) -> (carry, output [F]).
      outputs: Number F of outputs.
    """

    init: CellInit
    start: Callable[[PyTree], PyTree]
    input_projection: Callable[[PyTree, Array, Array], Array]
    step: Callable[[PyTree, PyTree, Array], tuple[PyTree, Array]]
    outputs: int


class SequenceAdapted(NamedTuple):
    """A support set that was read.

    Attributes:
      carry: Carry of the cell after the last input.
      label: The last label, [ways], which comes with the next input.
      logits: What was answered to each input before its label was shown, [n, ways].
      state: State of the network.
      support: The support set, where queries are embedded beside it, in the mode `one_at_a_time`;
        else None.
    """

    carry: PyTree
    label: Array
    logits: Array
    state: PyTree
    support: Batch | None


# ---- Sequences of labelled examples.


def as_sequence(key: Array, episode: Episode) -> Batch:
    """All examples of an episode, support and queries, in uniformly random order.

    Padding comes last, where it cannot be remembered.

    Args:
      key: A random key.
      episode: Inputs may be pytrees, leaves [n, ...].
    """
    support, query = episode
    check_episode(episode)
    x = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), support.x, query.x)
    y = jnp.concatenate([support.y, query.y])
    rank = jax.random.uniform(key, y.shape[:1])
    mask = None
    if support.mask is not None or query.mask is not None:
        mask = jnp.concatenate([row_mask(support), row_mask(query)])
        rank += ~mask
    order = jnp.argsort(rank)
    return jax.tree.map(lambda leaf: leaf[order], Batch(x, y, mask))


def instance_numbers(y: Array, mask: Array | None = None) -> Array:
    """Which instance of its class each step is: 1 for the first; 0 for padding.

    Args:
      y: One-hot labels of a sequence [n, ways].
      mask: bool [n], False for padding.

    Returns:
      int [n].

    Raises:
      ValueError: y is not one-hot [n, ways], or the mask is not bool [n].

    Examples:
      >>> instance_numbers(jnp.eye(3)[jnp.array([2, 0, 2, 2, 0])]).tolist()
      [1, 1, 2, 3, 2]
    """
    check_targets(y)
    shown = (without_padding(y, mask) > 0).astype(int)
    return (jnp.cumsum(shown, 0) * shown).sum(-1)


def instance_accuracy(logits: Array, y: Array, count: int, mask: Array | None = None) -> Array:
    """Accuracy at the 1st, 2nd, ... instance of each class (Santoro et al. 2016, table 1).

    Args:
      logits: Answers [n, ways]; a tie for the largest counts as wrong.
      y: One-hot labels [n, ways].
      count: Largest number of instances of a class.
      mask: bool [n], False for padding.

    Returns:
      [count] in [0, 1], NaN for an instance that no class has.

    Raises:
      ValueError: logits and y differ in shape.

    Examples:
      >>> labels = jnp.eye(2)[jnp.array([0, 0, 1, 1])]
      >>> instance_accuracy(jnp.array([[0., 1.], [1., 0.], [0., 1.], [0., 1.]]), labels, 2).tolist()
      [0.5, 1.0]
    """
    check_outputs(logits, y)
    right = jax.vmap(lambda a, b: cross_entropy_loss(a[None], b[None])[1]["accuracy"])(logits, y)
    at = instance_numbers(y, mask)[:, None] == jnp.arange(1, count + 1)[None]
    return jnp.where(at, right[:, None], 0).sum(0) / at.sum(0).astype(right.dtype)


def sequence_metrics(logits: Array, y: Array, mask: Array | None = None) -> Metrics:
    """Metrics of the sequence protocol: instance_1, instance_2, ..., the accuracy at each.

    Args:
      logits: Answers [n, ways].
      y: One-hot labels [n, ways], of n // ways instances of each class.
      mask: bool [n], False for padding.
    """
    each = instance_accuracy(logits, y, y.shape[0] // y.shape[1], mask)
    return {f"instance_{i + 1}": value for i, value in enumerate(each)}


def nca_loss(z: Array, y: Array, mask: Array | None = None) -> Array:
    """Neighbourhood components analysis: -log of the share of z's neighbours in its own class.

    The mean over i of -log sum_{j: y_j = y_i} p_ij, p_ij = softmax_{j != i}(-||z_i - z_j||^2)
    (Goldberger et al. 2004, the variant with the logarithm). Examples that are the only ones of
    their class do not count.

    Args:
      z: Embedded inputs [n, D].
      y: One-hot labels [n, ways].
      mask: bool [n], False for padding.

    Returns:
      The loss, in nats.

    Raises:
      ValueError: z is not of rank 2, or y is not one-hot with as many rows.

    Examples:
      >>> z, y = jnp.array([[0.0], [0.0], [1.0], [1.0]]), jnp.eye(2)[jnp.array([0, 0, 1, 1])]
      >>> round(float(nca_loss(z, y)), 4)  # -log(1 / (1 + 2 / e))
      0.5514
    """
    check_targets(y)
    if z.ndim != 2 or z.shape[0] != y.shape[0]:
        raise ValueError(f"z must be embeddings [{y.shape[0]}, D], as y has it, not {z.shape}")
    z, y = without_padding(as_real(z), mask), without_padding(y, mask)
    squares = (z * z).sum(-1)
    distances = squares[:, None] + squares[None] - 2 * z @ z.T
    others = ~jnp.eye(y.shape[0], dtype=bool)
    if mask is not None:
        others &= mask[None]
    same = (y @ y.T > 0) & others
    counts = same.any(-1)
    # All are neighbours of what does not count: it loses 0, and its gradient is 0. Where there are
    # no others, that is each example itself.
    others = others | ~others.any(-1, keepdims=True)
    same = same | (~counts[:, None] & others)
    logits = jnp.where(others, -distances, -jnp.inf)
    near = jax.nn.logsumexp(jnp.where(same, logits, -jnp.inf), -1)
    lost = (jax.nn.logsumexp(logits, -1) - near).sum()
    return lost / jnp.maximum(counts.sum(), 1).astype(lost.dtype)


def labels_before(y: Array, mask: Array | None = None) -> tuple[Array, Array]:
    """The label that was shown last before each step, zeros at first, and the last one of all.

    Args:
      y: One-hot labels [n, ways].
      mask: bool [n], False for padding, whose labels are not shown.

    Returns:
      [n, ways] and [ways].

    Raises:
      ValueError: y is not one-hot [n, ways], or the mask is not bool [n].

    Examples:
      >>> before, last = labels_before(jnp.eye(3))
      >>> before.argmax(1).tolist(), before.sum(1).tolist(), int(last.argmax())
      ([0, 0, 1], [0.0, 1.0, 1.0], 2)
    """
    check_targets(y)
    labels = jnp.concatenate([jnp.zeros_like(y[:1]), y])
    if mask is None:
        return labels[:-1], labels[-1]
    check_mask(mask, y.shape[0])
    # The index into `labels` of the last one shown, after each step.
    last = jax.lax.cummax(jnp.where(mask, jnp.arange(1, mask.size + 1), 0))
    return labels[jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])], labels[last[-1]]


def read_sequence(
    cell: Cell, params: PyTree, z: Array, y: Array, mask: Array | None = None
) -> tuple[PyTree, Array, Array]:
    """Steps through a sequence; padding leaves the carry as it is.

    Args:
      cell: The recurrent cell.
      params: The cell's.
      z: Embedded inputs [n, inputs].
      y: One-hot labels [n, ways], each shown with the next input.
      mask: bool [n], False for padding.

    Returns:
      The carry after the last input, the last label [ways], and the outputs [n, F].
    """
    before, last = labels_before(y, mask)
    projected = cell.input_projection(params, without_padding(z, mask), before)

    def step(carry: PyTree, inputs: tuple[Array, Array | None]) -> tuple[PyTree, Array]:
        row, real = inputs
        new, output = cell.step(params, carry, row)
        if real is not None:
            new = jax.tree.map(lambda a, b: jnp.where(real, a, b), new, carry)
        return new, output

    carry, outputs = jax.lax.scan(step, cell.start(params), (projected, mask))
    return carry, last, outputs


# ---- The learner.


def sequence_learner(
    network: Network,
    cell: Cell,
    objective: Objective = cross_entropy,
    *,
    nca_weight: float = 0.0,
    protocol: EvaluationProtocol = "few_shot",
) -> MetaLearner:
    """Builds a learner whose cell reads embedded inputs, each with the label before it.

    `adapt` reads the support set in the order given; its `logits` are the answers on the way.
    `predict` takes one step for each query from the same carry. The training loss is the
    sequence's: support and queries, shuffled anew, make one sequence, and each of its steps counts.

    Args:
      network: Embedding network. Where its normalisation takes moments of a batch, it takes those
        of the whole sequence at once.
      cell: Recurrent cell.
      objective: Objective of the tasks; it classifies.
      nca_weight: Weight of the encoder's own loss, `nca_loss`, which is added to the sequence's: a
        memory is of no use before the encoder tells classes apart, and the encoder learns nothing
        from a memory that is of no use.
      protocol: What a test measures: 'few_shot' for the queries after the support set, 'sequence'
        for every step of the shuffled whole (loss, accuracy, instance_1, instance_2, ...).

    Returns:
      The learner; its parameters are {'network', 'cell', 'output'}. Labels are inputs and outputs,
      so the number of ways is fixed, and the order of the support matters.

    Raises:
      UsageError: an unknown protocol.
    """
    protocols = get_args(EvaluationProtocol)
    if protocol not in protocols:
        raise UsageError(f"unknown protocol '{protocol}': choose one of {', '.join(protocols)}")

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: Array, *, train: bool
    ) -> SequenceAdapted:
        check_batch(support, "support")
        check_ways(params["output"]["kernel"].shape[1], support.y)
        z, state = embed_support(network, params["network"], state, support, key=key, train=train)
        carry, label, outputs = read_sequence(cell, params["cell"], z, support.y, support.mask)
        kept = support if queries_need_support(network.normalisation) else None
        return SequenceAdapted(carry, label, linear(params["output"], outputs), state, kept)

    def predict(
        params: PyTree,
        adapted: SequenceAdapted,
        x: PyTree,
        key: Array,
        *,
        train: bool,
        mask: Array | None = None,
    ) -> tuple[Array, PyTree]:
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
        labels = jnp.broadcast_to(adapted.label, (z.shape[0], adapted.label.size))
        projected = cell.input_projection(params["cell"], z, labels)
        _, outputs = jax.vmap(cell.step, (None, None, 0))(params["cell"], adapted.carry, projected)
        return linear(params["output"], outputs), state

    evaluate = {
        "few_shot": supervised_evaluate(adapt, predict, objective),
        "sequence": sequence_evaluate(adapt, objective),
    }
    loss = _sequence_loss(network, cell, objective, nca_weight)
    init = functools.partial(_init, network, cell)
    return MetaLearner(init, adapt, predict, loss, evaluate[protocol])


def _init(network: Network, cell: Cell, key: Array, episode: Episode) -> tuple[PyTree, PyTree]:
    network_key, embed_key, cell_key, output_key = jax.random.split(key, 4)
    support = episode.support
    check_batch(support, "support")
    check_targets(support.y)
    ways = support.y.shape[1]
    params, state = network.init(network_key, support.x)
    z, _ = embed_support(network, params, state, support, key=embed_key, train=False)
    check_vectors(z)
    params = {
        "network": params,
        "cell": cell.init(cell_key, z.shape[1], ways),
        "output": init_linear(output_key, cell.outputs, ways),
    }
    return params, state


def _sequence_loss(network: Network, cell: Cell, objective: Objective, nca_weight: float) -> Loss:
    def loss(params: PyTree, state: PyTree, episode: Episode, key: Array) -> tuple[Array, LossAux]:
        check_targets(episode.support.y, "support.y")
        check_targets(episode.query.y, "query.y")
        order_key, network_key = jax.random.split(key)
        sequence = as_sequence(order_key, episode)
        _, y, mask = sequence
        check_ways(params["output"]["kernel"].shape[1], y)
        z, state = embed_support(
            network, params["network"], state, sequence, key=network_key, train=True
        )
        _, _, outputs = read_sequence(cell, params["cell"], z, y, mask)
        logits = linear(params["output"], outputs)
        value, metrics = objective.loss(logits, y, mask)
        metrics = {**metrics, **sequence_metrics(logits, y, mask)}
        if nca_weight:
            near = nca_loss(z, y, mask)
            value, metrics = value + nca_weight * near, {**metrics, "nca_loss": near}
        return value, LossAux(state, metrics)

    return loss


def sequence_evaluate(adapt: Adapt, objective: Objective = cross_entropy) -> Evaluate:
    """Builds the sequence protocol of a learner whose `adapt` gives the `logits` on the way.

    All examples of an episode come one after another in random order; each is answered before its
    label is shown (Santoro et al. 2016, section 4). The metrics are the loss and those of the
    objective over all steps, and `sequence_metrics`.

    Args:
      adapt: The learner's; what it returns has `logits` [n, ways].
      objective: Objective of the tasks.
    """

    def evaluate(params: PyTree, state: PyTree, episode: Episode, key: Array) -> Metrics:
        order_key, adapt_key = jax.random.split(key)
        sequence = as_sequence(order_key, episode)
        logits = adapt(params, state, sequence, adapt_key, train=False).logits
        loss, metrics = objective.loss(logits, sequence.y, sequence.mask)
        metrics = metrics | sequence_metrics(logits, sequence.y, sequence.mask)
        return with_loss(loss, metrics)

    return evaluate


def check_vectors(z: Array) -> None:
    """Refuses embeddings that are not vectors.

    Raises:
      UsageError: z is not [n, D].
    """
    if z.ndim != 2:
        raise UsageError(
            f"this learner reads vectors [n, D], and its network gives {list(z.shape)}: use "
            "one that gives vectors, such as strided_conv4"
        )


def check_ways(ways: int, y: Array) -> None:
    """Refuses labels of another number of classes than a learner has outputs.

    Args:
      ways: Number of the outputs.
      y: One-hot labels [n, ways].

    Raises:
      ValueError: y is not one-hot.
      UsageError: the numbers differ.
    """
    check_targets(y)
    if y.shape[1] != ways:
        raise UsageError(
            f"this learner has one output for each of the {ways} ways it trains with, and y has "
            f"{y.shape[1]}: tests need as many ways as training"
        )
