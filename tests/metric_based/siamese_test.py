import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.metric_based.siamese import pair_cross_entropy, pair_logits, siamese
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy, cross_entropy_loss, squared_error

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
PARAMS = {"weight": jnp.array([-1.0, 0.5, -2.0]), "bias": jnp.array(0.7)}


def embeddings(n, seed):
    return jax.random.normal(jax.random.key(seed), (n, 3))


def episode(ways=3, shots=2, queries=2, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    sets = []
    for key, n in zip(keys, (shots, queries), strict=True):
        x = jax.random.normal(key, (ways * n, 5))
        sets.append(Batch(x, jnp.tile(jnp.eye(ways), (n, 1))))
    return Episode(*sets)


def probability(params, a, b):
    return jax.nn.sigmoid(pair_logits(params, a, b))


def test_pairs_by_hand():
    a, b = embeddings(4, 1), embeddings(2, 2)
    expected = [
        [-abs(p - q)[0] + 0.5 * abs(p - q)[1] - 2 * abs(p - q)[2] + 0.7 for q in b] for p in a
    ]
    np.testing.assert_allclose(pair_logits(PARAMS, a, b), expected, atol=1e-13)


def test_the_probability_is_symmetric_and_that_of_a_twin_is_the_biass():
    a, b = embeddings(4, 1), embeddings(2, 2)
    np.testing.assert_allclose(probability(PARAMS, a, b), probability(PARAMS, b, a).T, atol=1e-15)
    np.testing.assert_allclose(np.diag(probability(PARAMS, a, a)), 1 / (1 + np.exp(-0.7)))


def test_the_gradients_of_the_twins_add():
    network = mlp((4, 3))
    params, _ = network.init(KEY, jnp.zeros((1, 5)))
    a, b = (batch.x for batch in episode())

    def loss(first, second):
        z = [network.apply(p, {}, x, key=None, train=True)[0] for p, x in ((first, a), (second, b))]
        return pair_logits(PARAMS, *z).sum()

    shared = jax.grad(lambda p: loss(p, p))(params)
    first, second = jax.grad(loss, (0, 1))(params, params)
    added = jax.tree.map(jnp.add, first, second)
    jax.tree.map(lambda s, t: np.testing.assert_allclose(s, t, atol=1e-12), shared, added)


def test_the_loss_by_hand():
    logits = jnp.array([[2.0, -1.0, 0.5], [0.3, 1.0, 9.0]])
    same = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    real = jnp.array([[True, True, True], [True, True, False]])
    p = 1 / (1 + np.exp(-np.asarray(logits)))
    equal = -np.log(p[[0, 1], [0, 1]]).mean()
    unequal = -np.log(1 - p[[0, 0, 1], [1, 2, 0]]).mean()
    np.testing.assert_allclose(
        pair_cross_entropy(logits, same, real), (equal + unequal) / 2, atol=1e-13
    )
    # A net that is stuck at probability 0.5.
    np.testing.assert_allclose(pair_cross_entropy(0 * logits, same, real), np.log(2), atol=1e-13)


def built():
    learner = siamese(mlp((6, 4)))
    params, state = learner.init(KEY, episode())
    params["head"]["bias"] = jnp.array(0.4)
    return learner, params, state


def embed(params, x):
    return mlp((6, 4)).apply(params["network"], {}, x, key=None, train=False)[0]


def test_a_class_is_as_good_as_its_best_pair():
    learner, params, state = built()
    support, query = episode()
    adapted = learner.adapt(params, state, support, KEY, train=False)
    outputs, _ = learner.predict(params, adapted, query.x, KEY, train=False)
    pairs = np.asarray(
        pair_logits(params["head"], embed(params, query.x), embed(params, support.x))
    )
    np.testing.assert_allclose(outputs, np.maximum(pairs[:, :3], pairs[:, 3:]), atol=1e-12)


def test_the_training_loss_is_over_all_pairs():
    learner, params, state = built()
    support, query = episode()
    loss, aux = learner.loss(params, state, Episode(support, query), KEY)
    pairs = pair_logits(params["head"], embed(params, query.x), embed(params, support.x))
    same = query.y @ support.y.T
    np.testing.assert_allclose(loss, pair_cross_entropy(pairs, same), atol=1e-12)
    best = jnp.maximum(pairs[:, :3], pairs[:, 3:])
    np.testing.assert_allclose(
        aux.metrics["accuracy"], cross_entropy_loss(best, query.y)[1]["accuracy"]
    )


def test_padding_counts_nowhere():
    learner, params, state = built()
    support, query = episode()

    def padded(batch):
        x = jnp.concatenate([batch.x, 1e30 * jnp.ones_like(batch.x[:1])])
        y = jnp.concatenate([batch.y, batch.y[:1]])
        return Batch(x, y, jnp.arange(len(x)) < len(batch.x))

    loss = jax.value_and_grad(learner.loss, has_aux=True)
    found = loss(params, state, Episode(padded(support), padded(query)), KEY)
    expected = loss(params, state, episode(), KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)


def test_training_has_the_pairs_loss_and_tests_the_objective_s():
    def margin(outputs, y, mask=None):
        return cross_entropy_loss(2 * outputs, y, mask)[0], {"margin": outputs.max()}

    objective = cross_entropy._replace(loss=margin, metric="margin")
    learner = siamese(mlp((6, 4)), objective=objective)
    _, params, state = built()
    loss, aux = learner.loss(params, state, episode(), KEY)
    np.testing.assert_allclose(loss, built()[0].loss(params, state, episode(), KEY)[0])
    assert set(aux.metrics) == {"margin"}
    support, query = episode()
    adapted = learner.adapt(params, state, support, KEY, train=False)
    outputs, _ = learner.predict(params, adapted, query.x, KEY, train=False)
    expected, _ = margin(outputs, query.y)
    np.testing.assert_allclose(learner.evaluate(params, state, episode(), KEY)["loss"], expected)


def test_real_targets_are_refused():
    with pytest.raises(UsageError, match="siamese is for classification, and its tasks ask for re"):
        siamese(mlp(), objective=squared_error)


def test_a_stuck_network_gets_no_point_for_the_first_class():
    """All probabilities 0.5: an argmax over ties would be right wherever the truth is class 0."""
    learner, params, state = built()
    stuck = jax.tree.map(jnp.zeros_like, params)
    support, query = episode()
    loss, aux = learner.loss(stuck, state, Episode(support, query), KEY)
    np.testing.assert_allclose(loss, np.log(2), atol=1e-12)
    assert aux.metrics["accuracy"] == 0
    adapted = learner.adapt(stuck, state, support, KEY, train=False)
    outputs, _ = learner.predict(stuck, adapted, query.x, KEY, train=False)
    first = jnp.tile(jnp.eye(3)[:1], (6, 1))
    assert cross_entropy_loss(outputs, first)[1]["accuracy"] == 0
