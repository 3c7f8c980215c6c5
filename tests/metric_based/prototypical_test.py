import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.conv4 import strided_conv4
from meta_jax.networks.mlp import mlp
from tests.random_trees import moved, normal
from tests.small_networks import normalised

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)


def episode(ways=3, shots=2, queries=2, seed=0):
    sets = []
    for i, n in enumerate((shots, queries)):
        x = normal(ways * n, 8, 8, 1, seed=2 * seed + i)
        sets.append(Batch(x, jnp.tile(jnp.eye(ways), (n, 1))))
    return Episode(*sets)


def conv_learner(mode, **settings):
    network = strided_conv4(4, normalisation=mode)
    return network, prototypical(network, **settings)


def encode(network, params, state, x, moments):
    return jax.jit(network.apply, static_argnames=("key", "train", "moments"))(
        params["network"], state["network"], x, key=None, train=False, moments=moments
    )


def answer(learner, *arguments):
    def test(params, state, support, x):
        adapted = learner.adapt(params, state, support, KEY, train=False)
        return learner.predict(params, adapted, x, KEY, train=False)

    return jax.jit(test)(*arguments)


def negative_distances(z_support, z_query, ways):
    labels = np.arange(len(z_support)) % ways
    c = np.stack([np.asarray(z_support)[labels == k].mean(0) for k in range(ways)])
    return -((np.asarray(z_query)[:, None] - c) ** 2).sum(-1)


@pytest.mark.parametrize("ways", [3, 5])  # whatever the number of ways in training
def test_the_test_protocol_by_hand(ways):
    network, learner = conv_learner("running")
    params, state = jax.jit(learner.init)(KEY, episode())
    params = moved(params)
    state = jax.tree.map(lambda s: abs(s) + 0.5, moved(state))
    support, query = episode(ways, 1, 3, seed=1)
    logits, new_state = answer(learner, params, state, support, query.x)
    z_support, z_query = (
        encode(network, params, state, x, "stored")[0] for x in (support.x, query.x)
    )
    assert logits.shape == (3 * ways, ways)
    np.testing.assert_allclose(logits, negative_distances(z_support, z_query, ways), atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, new_state, state)


def test_the_training_loss_embeds_support_and_queries_as_one_batch():
    network, learner = conv_learner("running")
    support, query = episode()
    params, state = jax.jit(learner.init)(KEY, episode())
    params = moved(params)
    loss, aux = jax.jit(learner.loss)(params, state, Episode(support, query), KEY)
    together = np.concatenate([support.x, query.x])
    z, new_state = encode(network, params, state, together, "update")
    z = np.asarray(z)
    logits = negative_distances(z[:6], z[6:], 3)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.arange(6) % 3
    np.testing.assert_allclose(loss, -np.log(p[np.arange(6), labels]).mean(), atol=1e-12)
    np.testing.assert_allclose(aux.metrics["accuracy"], (logits.argmax(1) == labels).mean())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b), aux.state["network"], new_state)


def losses(network):
    values = []
    for joint in (True, False):
        learner = prototypical(network, joint_encoding=joint)
        params, state = jax.jit(learner.init)(KEY, episode())
        loss = jax.jit(jax.value_and_grad(lambda *a, f=learner.loss: f(*a)[0]))
        values.append(loss(moved(params), state, episode(), KEY))
    return values


def test_joint_encoding_changes_nothing_without_normalisation():
    joint, apart = losses(mlp((6, 4)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), joint, apart)


@pytest.mark.parametrize(
    ("mode", "same"),
    [("batch", False), ("running", False), ("support", True), ("layer", True), ("tasknorm", True)],
)
def test_joint_encoding_matters_where_moments_are_the_batch_s(mode, same):
    joint, apart = losses(normalised(mode))
    assert bool(abs(joint[0] - apart[0]) < 1e-12) == same


def test_support_mode_normalises_queries_by_the_support_alone():
    network, learner = conv_learner("support")
    support, query = episode()
    params, state = jax.jit(learner.init)(KEY, episode())
    params = moved(params)
    logits, _ = answer(learner, params, state, support, query.x)
    z_support, of_support = encode(network, params, state, support.x, "replace")
    z_query, _ = encode(network, params, {"network": of_support}, query.x, "stored")
    np.testing.assert_allclose(logits, negative_distances(z_support, z_query, 3), atol=1e-12)


def test_cosine_logits_by_hand():
    learner = prototypical(mlp((6, 4)), distance="cosine")
    support, query = episode()
    params, state = jax.jit(learner.init)(KEY, episode())
    logits, _ = answer(learner, params, state, support, query.x)
    z_support, z = (
        np.asarray(mlp((6, 4)).apply(params["network"], {}, x, key=None, train=False)[0])
        for x in (support.x, query.x)
    )
    c = z_support.reshape(2, 3, 4).mean(0)
    expected = z @ c.T / (np.linalg.norm(z, axis=1)[:, None] * np.linalg.norm(c, axis=1))
    np.testing.assert_allclose(logits, expected, atol=1e-12)


def test_an_unknown_distance_is_refused():
    with pytest.raises(
        UsageError, match="unknown distance 'manhattan': choose one of squared_eucl"
    ):
        prototypical(mlp(), distance="manhattan")
