import functools

import jax
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.metric_based.siamese import pair_cross_entropy, pair_logits, siamese
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy, cross_entropy_loss, squared_error
from tests.random_trees import normal

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
PARAMS = {"weight": np.array([-1.0, 0.5, -2.0]), "bias": np.array(0.7)}
pair_loss = jax.jit(pair_cross_entropy)


def embeddings(n, seed):
    return np.asarray(normal(n, 3, seed=seed))


def episode(ways=3, shots=2, queries=2, seed=0):
    sets = []
    for i, n in enumerate((shots, queries)):
        x = np.asarray(normal(ways * n, 5, seed=2 * seed + i))
        sets.append(Batch(x, np.tile(np.eye(ways), (n, 1))))
    return Episode(*sets)


@jax.jit
def probability(params, a, b):
    return jax.nn.sigmoid(pair_logits(params, a, b))


def test_pairs_by_hand():
    a, b = embeddings(4, 1), embeddings(2, 2)
    expected = [
        [-abs(p - q)[0] + 0.5 * abs(p - q)[1] - 2 * abs(p - q)[2] + 0.7 for q in b] for p in a
    ]
    np.testing.assert_allclose(jax.jit(pair_logits)(PARAMS, a, b), expected, atol=1e-13)


def test_the_probability_is_symmetric_and_that_of_a_twin_is_the_biass():
    a, b = embeddings(4, 1), embeddings(2, 2)
    turned = np.asarray(probability(PARAMS, b, a)).T
    np.testing.assert_allclose(probability(PARAMS, a, b), turned, atol=1e-15)
    np.testing.assert_allclose(np.diag(probability(PARAMS, a, a)), 1 / (1 + np.exp(-0.7)))


def test_the_gradients_of_the_twins_add():
    network = mlp((4, 3))
    params, _ = jax.jit(network.init)(KEY, np.zeros((1, 5)))
    a, b = (batch.x for batch in episode())

    def loss(first, second):
        z = [network.apply(p, {}, x, key=None, train=True)[0] for p, x in ((first, a), (second, b))]
        return pair_logits(PARAMS, *z).sum()

    @jax.jit
    def gradients(params):
        return jax.grad(lambda p: loss(p, p))(params), jax.grad(loss, (0, 1))(params, params)

    shared, (first, second) = jax.tree.map(np.asarray, gradients(params))
    added = jax.tree.map(np.add, first, second)
    jax.tree.map(lambda s, t: np.testing.assert_allclose(s, t, atol=1e-12), shared, added)


def test_the_loss_by_hand():
    logits = np.array([[2.0, -1.0, 0.5], [0.3, 1.0, 9.0]])
    same = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    real = np.array([[True, True, True], [True, True, False]])
    p = 1 / (1 + np.exp(-logits))
    equal = -np.log(p[[0, 1], [0, 1]]).mean()
    unequal = -np.log(1 - p[[0, 0, 1], [1, 2, 0]]).mean()
    np.testing.assert_allclose(pair_loss(logits, same, real), (equal + unequal) / 2, atol=1e-13)
    # A net that is stuck at probability 0.5.
    np.testing.assert_allclose(pair_loss(0 * logits, same, real), np.log(2), atol=1e-13)


LEARNER = siamese(mlp((6, 4)))


@functools.cache
def built():
    params, state = jax.jit(LEARNER.init)(KEY, episode())
    params["head"]["bias"] = np.array(0.4)
    return params, state


loss_of = jax.jit(LEARNER.loss)


@jax.jit
def answer(params, state, support, x):
    adapted = LEARNER.adapt(params, state, support, KEY, train=False)
    return LEARNER.predict(params, adapted, x, KEY, train=False)[0]


@jax.jit
def logits_of_pairs(params, queries, support):
    z = (
        mlp((6, 4)).apply(params["network"], {}, x, key=None, train=False)[0]
        for x in (queries, support)
    )
    return pair_logits(params["head"], *z)


def test_a_class_is_as_good_as_its_best_pair():
    params, state = built()
    support, query = episode()
    outputs = answer(params, state, support, query.x)
    pairs = np.asarray(logits_of_pairs(params, query.x, support.x))
    np.testing.assert_allclose(outputs, np.maximum(pairs[:, :3], pairs[:, 3:]), atol=1e-12)


def test_the_training_loss_is_over_all_pairs():
    params, state = built()
    support, query = episode()
    loss, aux = loss_of(params, state, Episode(support, query), KEY)
    pairs = np.asarray(logits_of_pairs(params, query.x, support.x))
    same = query.y @ support.y.T
    np.testing.assert_allclose(loss, pair_loss(pairs, same), atol=1e-12)
    best = np.maximum(pairs[:, :3], pairs[:, 3:])
    np.testing.assert_allclose(
        aux.metrics["accuracy"], jax.jit(cross_entropy_loss)(best, query.y)[1]["accuracy"]
    )


def test_padding_counts_nowhere():
    params, state = built()
    support, query = episode()

    def padded(batch):
        x = np.concatenate([batch.x, 1e30 * np.ones_like(batch.x[:1])])
        y = np.concatenate([batch.y, batch.y[:1]])
        return Batch(x, y, np.arange(len(x)) < len(batch.x))

    loss = jax.jit(jax.value_and_grad(LEARNER.loss, has_aux=True))
    found = loss(params, state, Episode(padded(support), padded(query)), KEY)
    expected = loss(params, state, episode(), KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)


def test_training_has_the_pairs_loss_and_tests_the_objective_s():
    def margin(outputs, y, mask=None):
        return cross_entropy_loss(2 * outputs, y, mask)[0], {"margin": outputs.max()}

    objective = cross_entropy._replace(loss=margin, metric="margin")
    learner = siamese(mlp((6, 4)), objective=objective)
    params, state = built()
    support, query = episode()

    @jax.jit
    def both(params, episode):
        loss, aux = learner.loss(params, state, episode, KEY)
        adapted = learner.adapt(params, state, episode.support, KEY, train=False)
        outputs, _ = learner.predict(params, adapted, episode.query.x, KEY, train=False)
        expected, _ = margin(outputs, episode.query.y)
        return loss, aux, expected, learner.evaluate(params, state, episode, KEY)

    loss, aux, expected, measured = both(params, Episode(support, query))
    np.testing.assert_allclose(loss, loss_of(params, state, episode(), KEY)[0])
    assert set(aux.metrics) == {"margin"}
    np.testing.assert_allclose(measured["loss"], expected)


def test_real_targets_are_refused():
    with pytest.raises(UsageError, match="siamese is for classification, and its tasks ask for re"):
        siamese(mlp(), objective=squared_error)


def test_a_stuck_network_gets_no_point_for_the_first_class():
    """All probabilities 0.5: an argmax over ties would be right wherever the truth is class 0."""
    params, state = built()
    stuck = jax.tree.map(np.zeros_like, params)
    support, query = episode()
    loss, aux = loss_of(stuck, state, Episode(support, query), KEY)
    np.testing.assert_allclose(loss, np.log(2), atol=1e-12)
    assert aux.metrics["accuracy"] == 0
    outputs = answer(stuck, state, support, query.x)
    first = np.tile(np.eye(3)[:1], (6, 1))
    assert jax.jit(cross_entropy_loss)(outputs, first)[1]["accuracy"] == 0
