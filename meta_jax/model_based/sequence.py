"""Learners that read a task as a sequence: at step t the input x_t and the label y_{t-1}.

One such learner is a recurrent cell on embedded inputs. Its support set is a sequence too, so it
adapts by reading it; each query is one more step from where the support set left it. Its own
protocol (Santoro et al. 2016, section 4) is the sequence itself: every x_t is answered before its
label is shown, and the accuracy is that at the 1st, 2nd, ... instance of a class.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Aux, Batch, Episode, MetaLearner, Network, PyTree, cross_entropy
from meta_jax.networks.layers import init_linear, linear


class Cell(NamedTuple):
    """A recurrent cell, for one task; `drive` is all that does not depend on its state."""

    init: Callable[..., PyTree]  # (key, inputs, ways) -> params
    start: Callable[[PyTree], PyTree]  # params -> the carry before the first step
    drive: Callable[..., jax.Array]  # (params, z [n, inputs], y [n, ways]) -> [n, ...]
    step: Callable[..., tuple[PyTree, jax.Array]]  # (params, carry, drive) -> carry, output [F]
    outputs: int  # F


class SequenceAdapted(NamedTuple):
    """A support set that was read."""

    carry: PyTree  # the cell's, after the last input
    label: jax.Array  # [ways], the last label, which comes with the next input
    logits: jax.Array  # [n, ways], what was answered to each input before its label was shown
    state: PyTree  # the network's


def as_sequence(key: jax.Array, episode: Episode) -> Batch:
    """All examples of an episode, support and queries, in uniformly random order.

    Padding comes last, where it cannot be remembered.
    """
    x, y = (jnp.concatenate(parts) for parts in zip(*episode, strict=True))
    order = jnp.argsort(jax.random.uniform(key, y.shape[:1]) + ~y.any(-1))
    return Batch(x[order], y[order])


def instance_numbers(y: jax.Array) -> jax.Array:
    """Which instance of its class each step is: 1 for the first; 0 for padding.

    Args:
      y: one-hot labels of a sequence [n, ways].

    Returns:
      int [n].

    Examples:
      >>> instance_numbers(jnp.eye(3)[jnp.array([2, 0, 2, 2, 0])]).tolist()
      [1, 1, 2, 3, 2]
    """
    return (jnp.cumsum(y, 0) * y).sum(-1).astype(int)


def instance_accuracy(logits: jax.Array, y: jax.Array, count: int) -> jax.Array:
    """Accuracy at the 1st, 2nd, ... instance of each class (Santoro et al. 2016, table 1).

    Args:
      logits: answers [n, ways]; a tie for the largest counts as wrong.
      y: one-hot labels [n, ways]; all-zero rows are padding.
      count: how many instances of a class there are at most.

    Returns:
      [count] in [0, 1], NaN for an instance that no class has.

    Examples:
      >>> labels = jnp.eye(2)[jnp.array([0, 0, 1, 1])]
      >>> instance_accuracy(jnp.array([[0., 1.], [1., 0.], [0., 1.], [0., 1.]]), labels, 2).tolist()
      [0.5, 1.0]
    """
    right = jax.vmap(lambda a, b: cross_entropy(a[None], b[None])[1]["accuracy"])(logits, y)
    at = instance_numbers(y)[:, None] == jnp.arange(1, count + 1)
    return (right[:, None] * at).sum(0) / at.sum(0)


def sequence_criterion(logits: jax.Array, y: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy over all steps; metrics `accuracy` and, for each instance, `instance_i`.

    Args:
      logits: [n, ways].
      y: one-hot labels [n, ways], of n // ways instances of each class.
    """
    loss, metrics = cross_entropy(logits, y)
    each = instance_accuracy(logits, y, y.shape[0] // y.shape[1])
    return loss, {**metrics, **{f"instance_{i + 1}": value for i, value in enumerate(each)}}


def neighbour_loss(z: jax.Array, y: jax.Array) -> jax.Array:
    """Neighbourhood components analysis: -log of the share of z's neighbours in its own class.

    The mean over i of -log sum_{j: y_j = y_i} p_ij, p_ij = softmax_{j != i}(-||z_i - z_j||^2)
    (Goldberger et al. 2004, the variant with the logarithm).

    Args:
      z: embedded inputs [n, D].
      y: one-hot labels [n, ways], two of each class at least; all-zero rows are padding.

    Returns:
      The loss, in nats.

    Examples:
      >>> z, y = jnp.array([[0.0], [0.0], [1.0], [1.0]]), jnp.eye(2)[jnp.array([0, 0, 1, 1])]
      >>> round(float(neighbour_loss(z, y)), 4)  # -log(1 / (1 + 2 / e))
      0.5514
    """
    squares = (z * z).sum(-1)
    distances = squares[:, None] + squares - 2 * z @ z.T
    real = y.any(-1)
    others = real[None] & ~jnp.eye(y.shape[0], dtype=bool)
    logits = jnp.where(others, -distances, -jnp.inf)
    same = ((y @ y.T > 0) | ~real[:, None]) & others  # all are neighbours of padding: it loses 0
    near = jax.nn.logsumexp(jnp.where(same, logits, -jnp.inf), -1)
    return (jax.nn.logsumexp(logits, -1) - near).sum() / real.sum()


def sequence_learner(network: Network, cell: Cell, *, neighbour_weight: float = 0.0) -> MetaLearner:
    """A cell that reads embedded inputs, each with the label of the one before, and answers.

    `adapt` reads the support set in the order given; its `logits` are the answers on the way, so
    the sequence protocol is `adapt` on a whole sequence. `predict` takes one step for each query
    from the same carry. The training loss is the sequence's: support and queries, shuffled anew,
    sum to one sequence, and every step of it counts.

    Args:
      network: the embedding network. Where its batch norm takes statistics, it takes those of the
        whole sequence at once (in the mode 'running': in training alone).
      cell: the recurrent cell.
      neighbour_weight: of the encoder's own loss, `neighbour_loss`, which is added to the
        sequence's: a memory is of no use before the encoder tells classes apart, and the encoder
        learns nothing from a memory that is of no use.

    Returns:
      The learner; its parameters are {'network', 'cell', 'output'}. Labels are inputs and outputs,
      so the number of ways is fixed, and the order of the support matters.
    """

    def init(key: jax.Array, episode: Episode) -> tuple[PyTree, PyTree]:
        network_key, cell_key, output_key = jax.random.split(key, 3)
        x, y = episode.support
        params, state = network.init(network_key, x)
        z, _ = network.apply_to_support(params, state, x, key=cell_key, train=False)
        params = {
            "network": params,
            "cell": cell.init(cell_key, z.shape[-1], y.shape[-1]),
            "output": init_linear(output_key, cell.outputs, y.shape[-1]),
        }
        return params, state

    def answer(params: PyTree, outputs: jax.Array) -> jax.Array:
        return linear(params["output"], outputs)

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: jax.Array, *, train: bool
    ) -> SequenceAdapted:
        z, state = network.apply_to_support(
            params["network"], state, support.x, key=key, train=train
        )
        real = support.y.any(-1)
        labels = jnp.concatenate([jnp.zeros_like(support.y[:1]), support.y])
        # The index into `labels` of the last one shown, after each step: padding shows none.
        last = jax.lax.cummax(jnp.where(real, jnp.arange(1, real.size + 1), 0))
        before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])

        def step(carry: PyTree, inputs: tuple) -> tuple[PyTree, jax.Array]:
            drive, real = inputs
            new, output = cell.step(params["cell"], carry, drive)
            return jax.tree.map(lambda a, b: jnp.where(real, a, b), new, carry), output

        drive = cell.drive(params["cell"], z, labels[before])
        carry, outputs = jax.lax.scan(step, cell.start(params["cell"]), (drive, real))
        return SequenceAdapted(carry, labels[last[-1]], answer(params, outputs), state)

    def predict(
        params: PyTree, adapted: SequenceAdapted, x: jax.Array, key: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        z, state = network.apply_to_queries(
            params["network"], adapted.state, x, key=key, train=train
        )
        labels = jnp.broadcast_to(adapted.label, (z.shape[0], adapted.label.size))
        drive = cell.drive(params["cell"], z, labels)
        _, outputs = jax.vmap(lambda d: cell.step(params["cell"], adapted.carry, d))(drive)
        return answer(params, outputs), state

    def loss(
        params: PyTree, state: PyTree, episode: Episode, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        order_key, network_key = jax.random.split(key)
        x, y = as_sequence(order_key, episode)
        z, state = network.apply_to_support(
            params["network"], state, x, key=network_key, train=True
        )
        # No mask against padding, as `adapt` has: it comes last.
        drive = cell.drive(params["cell"], z, jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]]))
        _, outputs = jax.lax.scan(
            lambda carry, d: cell.step(params["cell"], carry, d), cell.start(params["cell"]), drive
        )
        value, metrics = sequence_criterion(answer(params, outputs), y)
        if neighbour_weight:
            near = neighbour_loss(z, y)
            value, metrics = value + neighbour_weight * near, {**metrics, "neighbour_loss": near}
        return value, Aux(state, metrics)

    return MetaLearner(init, adapt, predict, loss)
