import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.metric_based.matching import (
    embed_queries_in_context,
    embed_support_in_context,
    init_full_context,
    matching,
    matching_fce,
)
from meta_jax.metric_based.primitives import cosine_similarity, kernel_logits
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.objectives import cross_entropy_loss
from tests.random_trees import moved, normal
from tests.small_networks import IDENTITY

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)


def episode(ways=3, shots=2, queries=2, size=4, seed=0):
    sets = []
    for i, n in enumerate((shots, queries)):
        x = normal(ways * n, size, seed=2 * seed + i)
        sets.append(Batch(x, jnp.tile(jnp.eye(ways), (n, 1))))
    return Episode(*sets)


def answer(learner, support, x, change=moved):
    @jax.jit
    def logits(params, state, support, x):
        adapted = learner.adapt(params, state, support, KEY, train=False)
        return learner.predict(params, adapted, x, KEY, train=False)[0]

    params, state = jax.jit(learner.init)(KEY, Episode(support, support))
    return logits(change(params), state, support, x)


def test_probabilities_by_hand():
    support, query = episode()
    a, b = np.asarray(query.x), np.asarray(support.x)
    cos = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    for temperature in (1.0, 0.1):
        weights = np.exp(cos / temperature)
        weights /= weights.sum(1, keepdims=True)
        found = answer(matching(IDENTITY, temperature=temperature), support, query.x)
        p = np.asarray(jax.nn.softmax(found))
        np.testing.assert_allclose(p, weights @ np.asarray(support.y), atol=1e-12)
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize(("ways", "floor"), [(5, 0.7636), (20, 2.032)])
def test_the_floor_of_the_loss_without_a_temperature(ways, floor):
    """Equally distant classes, each query on its own: as good as all classes at once can be."""
    simplex = jnp.eye(ways) - 1 / ways

    @jax.jit
    def loss(z):
        logits = kernel_logits(cosine_similarity(z, z), jnp.eye(ways))
        return cross_entropy_loss(logits, jnp.eye(ways))[0]

    np.testing.assert_allclose(loss(simplex), floor, atol=5e-4)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(simplex), np.zeros((ways, ways)), atol=1e-12)
    for seed in range(3):
        away = moved(simplex, by=0.1, seed=seed)
        assert loss(away) > loss(simplex)


def test_no_query_costs_less_than_the_bound_on_cosines():
    """The best for one query: its class at cosine 1, the four others at -1."""
    support = Batch(jnp.array([[1.0, 0], *[[-1.0, 0]] * 4]), jnp.eye(5))
    query = jnp.array([[2.0, 0]])
    for temperature, bound in ((1.0, 0.4327), (0.1, 8.2446e-9)):
        logits = answer(matching(IDENTITY, temperature=temperature), support, query)
        loss, _ = cross_entropy_loss(logits, jnp.eye(5)[:1])
        np.testing.assert_allclose(loss, bound, rtol=2e-4)


def test_one_shot_squared_euclidean_matching_is_a_prototypical_network():
    support, query = episode(shots=1)
    learner = matching(IDENTITY, similarity="squared_euclidean", temperature=1.0)
    np.testing.assert_allclose(
        answer(learner, support, query.x),
        answer(prototypical(IDENTITY), support, query.x),
        atol=1e-12,
    )


def context(size=4):
    return moved(jax.jit(init_full_context, static_argnums=1)(KEY, size))


def logistic(x):
    return 1 / (1 + np.exp(-x))


def cell(params, x, h, c):
    i, f, u, o = np.split(
        np.concatenate([x, h]) @ np.asarray(params["kernel"]) + np.asarray(params["bias"]), 4
    )
    c = logistic(f) * c + logistic(i) * np.tanh(u)
    return logistic(o) * np.tanh(c), c


def test_the_support_in_context_by_hand():
    params, z = context(), np.asarray(episode().support.x)
    expected = z.copy()
    for direction, order in (("forward", range(6)), ("backward", range(5, -1, -1))):
        h, c = np.zeros(4), np.zeros(4)
        for i in order:
            h, c = cell(params[direction], z[i], h, c)
            expected[i] += h
    found = jax.jit(embed_support_in_context)(params, z)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_queries_in_context_by_hand(steps):
    params = context()
    g, z = (np.asarray(batch.x) for batch in episode())
    expected = []
    for x in z:
        h, c = np.zeros(4), np.zeros(4)
        for _ in range(steps):
            weights = np.exp(g @ h)
            r = weights @ g / weights.sum()
            h, c = cell(params["attention"], x, np.concatenate([h, r]), c)
            h = h + x
        expected.append(h)
    found = embed_queries_in_context(params, z, g, steps=steps)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_recurrent_input_is_twice_as_wide_as_the_output():
    shapes = jax.tree.map(jnp.shape, init_full_context(KEY, 4))
    assert shapes["attention"]["kernel"] == (4 + 2 * 4, 16)
    assert shapes["forward"]["kernel"] == shapes["backward"]["kernel"] == (4 + 4, 16)


def test_full_context_of_zero_weights_is_the_identity():
    support, query = episode()

    def zeros(params):
        return jax.tree.map(jnp.zeros_like, params)

    plain = answer(matching(IDENTITY), support, query.x)
    in_context = matching_fce(IDENTITY)
    np.testing.assert_allclose(answer(in_context, support, query.x, zeros), plain, atol=1e-12)
    assert abs(answer(in_context, support, query.x) - plain).max() > 1e-2


@pytest.mark.parametrize(("steps", "same"), [(0, True), (2, False)])
def test_the_order_of_the_support_matters_to_full_context_embeddings_alone(steps, same):
    support, query = episode()
    learner = matching_fce(IDENTITY, full_context_steps=steps) if steps else matching(IDENTITY)
    reversed_support = Batch(support.x[::-1], support.y[::-1])
    difference = abs(
        answer(learner, support, query.x) - answer(learner, reversed_support, query.x)
    ).max()
    assert difference < 1e-12 if same else difference > 1e-3


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"similarity": "x"}, "unknown similarity 'x': choose one of cosine, squared_euclidean"),
        ({"temperature": 0.0}, "temperature=0.0 must be greater than 0"),
        ({"full_context_steps": 0}, "full_context_steps=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, culprit):
    with pytest.raises(UsageError, match=culprit):
        matching_fce(IDENTITY, **settings)
    if "full_context_steps" not in settings:
        with pytest.raises(UsageError, match=culprit):
            matching(IDENTITY, **settings)
