import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.model_based import meta_networks as module
from meta_jax.model_based.memory import content_address
from meta_jax.model_based.meta_networks import meta_networks, preprocess_gradient
from meta_jax.networks.augmented import classify, init_augmented, pool_up, represent
from meta_jax.objectives import cross_entropy_loss, squared_error

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
LEARNER = meta_networks(features=3, hidden=4, blocks=2, key_strength=1.0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def episode(shots=1, ways=3, seed=0):
    labels = jnp.tile(jnp.eye(ways), (shots, 1))
    x = normal(seed, 2 * len(labels), 6, 6, 1)
    return Episode(Batch(x[: len(labels)], labels), Batch(x[len(labels) :], labels))


def moved(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([p + 0.3 * normal(i, *p.shape) for i, p in enumerate(leaves)])


@functools.cache
def params():
    return moved(jax.jit(LEARNER.init)(KEY, episode())[0])


@functools.cache
def slow_and_fast():
    slow = jax.jit(lambda x: init_augmented(KEY, x, 3, 4, 5))(jnp.zeros((1, 28, 28, 1)))
    return moved(slow), jax.tree.map(lambda p: 0.2 * normal(p.size, *p.shape), slow)


adapt = jax.jit(functools.partial(LEARNER.adapt, train=False))
predict = jax.jit(functools.partial(LEARNER.predict, train=False))


def test_coordinates_are_preprocessed_by_the_paper_s_values():
    found = preprocess_gradient(jnp.array([0.0, np.exp(-7), 1.0, -1.0, np.exp(-3.5), np.exp(-9)]))
    expected = [[-1, 0], [-1, 1], [0, 1], [0, -1], [-0.5, 1], [-1, np.exp(-2)]]
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("side", [1, 4, 7])
def test_pooling_rounds_up(side):
    x = np.asarray(normal(1, 2, side, side, 3))
    pooled = np.asarray(pool_up(jnp.asarray(x)))
    half = -(-side // 2)
    assert pooled.shape == (2, half, half, 3)
    for i in range(half):
        for j in range(half):
            window = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_array_equal(pooled[:, i, j], window.max((1, 2)))


def test_28_pixels_shrink_to_one_place_in_five_poolings():
    slow, _ = slow_and_fast()
    assert slow["dense"]["hidden"].shape == (3, 4)
    full = jax.eval_shape(lambda x: init_augmented(KEY, x, 64, 64, 5), jnp.zeros((1, 28, 28, 1)))
    # 9 * 64 + 64, four times 9 * 64^2 + 64, 64^2, 5 * 64.
    assert sum(leaf.size for leaf in jax.tree.leaves(full)) == 640 + 4 * 36928 + 4096 + 320


def test_the_network_by_hand():
    slow, fast = slow_and_fast()
    x = normal(2, 2, 28, 28, 1)

    def layer(weights, x, name):
        conv = weights["conv"][name]
        y = jax.lax.conv_general_dilated(
            x, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.maximum(y + conv["bias"], 0)

    @jax.jit
    def convolutions(slow, fast, z):
        for name in slow["conv"]:
            z = layer(slow, z, name) + layer(fast, z, name)
            z = jax.lax.reduce_window(z, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        return z

    z = np.asarray(convolutions(slow, fast, x))
    assert z.shape == (2, 1, 1, 3)
    z = z.reshape(2, 3)
    z = sum(np.maximum(z @ w["dense"]["hidden"], 0) for w in (slow, fast))
    logits = sum(z @ w["dense"]["classifier"] for w in (slow, fast))
    np.testing.assert_allclose(jax.jit(represent)(slow, fast, x), z, atol=1e-10)
    np.testing.assert_allclose(jax.jit(classify)(slow, fast, x), logits, atol=1e-10)


def test_zero_fast_weights_are_the_slow_network():
    slow, _ = slow_and_fast()
    x = normal(2, 2, 28, 28, 1)
    nothing = jax.tree.map(jnp.zeros_like, slow)
    np.testing.assert_allclose(
        jax.jit(classify)(slow, nothing, x), jax.jit(classify, static_argnums=1)(slow, None, x)
    )


def test_training_begins_with_the_slow_network():
    support, query = episode()
    params, state = jax.jit(LEARNER.init)(KEY, episode())
    answers, _ = predict(params, adapt(params, state, support, KEY), query.x, KEY)
    expected = jax.jit(classify, static_argnums=1)(params["base"], None, query.x)
    np.testing.assert_allclose(answers, expected, atol=1e-12)


@pytest.mark.parametrize("strength", [1, 10])
def test_attention_is_a_softmax_of_cosines_that_sums_to_one(strength):
    queries, keys = np.asarray(normal(3, 4, 5)), np.asarray(normal(4, 3, 5))
    real = np.array([True, False, True])
    weights = np.asarray(content_address(queries, keys, key_strength=strength, mask=real))
    np.testing.assert_allclose(weights.sum(1), np.ones(4), atol=1e-12)
    np.testing.assert_array_equal(weights[:, 1], np.zeros(4))
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(keys, axis=1)
    expected = np.exp(strength * (queries @ keys.T) / lengths) * real
    np.testing.assert_allclose(weights, expected / expected.sum(1, keepdims=True), atol=1e-8)


def test_one_support_example_gives_its_fast_weights_to_every_query():
    support, query = episode()
    adapted = adapt(params(), {}, Batch(support.x[:1], support.y[:1]), KEY)
    answers, _ = predict(params(), adapted, query.x, KEY)
    only = jax.tree.map(lambda each: each[0], adapted.values)
    expected = jax.jit(classify)(params()["base"], only, query.x)
    np.testing.assert_allclose(answers, expected, atol=1e-10)


def test_a_query_is_answered_with_fast_weights_mixed_by_attention():
    support, query = episode()
    adapted = adapt(params(), {}, support, KEY)
    answers, _ = predict(params(), adapted, query.x, KEY)
    r = jax.jit(represent)(params()["embedding"], adapted.embedding, query.x)
    weights = np.asarray(content_address(r, adapted.keys))
    values = jax.tree.map(np.asarray, adapted.values)

    def answer(x, a):
        mixed = jax.tree.map(lambda each: sum(map(np.multiply, a, each)), values)
        return jax.jit(classify)(params()["base"], mixed, x[None])[0]

    for found, a, x in zip(answers, weights, query.x, strict=True):
        np.testing.assert_allclose(found, answer(x, a), atol=1e-12)
        # Noise images look much alike to so small a network, yet not quite.
        assert abs(answer(x, a) - answer(x, np.full(3, 1 / 3))).max() > 1e-9


def test_fast_weights_of_the_base_are_those_of_each_example_s_own_gradient():
    support, _ = episode()
    adapted = adapt(params(), {}, support, KEY)
    base, meta = params()["base"], params()["base_meta"]

    def loss(base, i):
        logits = classify(base, None, support.x[i : i + 1])[0]
        return -jax.nn.log_softmax(logits)[i]

    gradient = jax.jit(jax.grad(loss), static_argnums=1)(base, 1)
    for group, leaf in (("dense", "classifier"), ("dense", "hidden")):
        x = np.asarray(preprocess_gradient(gradient[group][leaf]))
        for name in ("layer1", "layer2"):
            x = np.maximum(x @ meta[group][name]["kernel"] + meta[group][name]["bias"], 0)
        x = x @ meta[group]["layer3"]["kernel"] + meta[group]["layer3"]["bias"]
        np.testing.assert_allclose(adapted.values[group][leaf][1], 0.01 * x[..., 0], atol=1e-10)


def test_there_are_no_second_order_terms(monkeypatch):
    def loss(params, episode):
        return LEARNER.loss(params, {}, episode, KEY)[0]

    gradient = jax.jit(jax.grad(loss))(params(), episode())
    names, gradients = ("embedding", "base"), jax.jit(module._gradients)
    constants = iter([gradients(params()[name], episode().support) for name in names])
    monkeypatch.setattr(module, "_gradients", lambda *_: next(constants))
    frozen = jax.jit(jax.grad(loss))(params(), episode())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradient, frozen)
    assert abs(gradient["base"]["conv"]["layer1"]["kernel"]).max() > 1e-4
    # The embedding's classifier has a gradient of second order alone.
    assert not gradient["embedding"]["dense"]["classifier"].any()


def test_the_loss_is_the_cross_entropy_of_the_queries():
    support, query = episode()
    value, aux = jax.jit(LEARNER.loss)(params(), {}, episode(), KEY)
    answers, _ = predict(params(), adapt(params(), {}, support, KEY), query.x, KEY)
    expected, metrics = cross_entropy_loss(answers, query.y)
    np.testing.assert_allclose(value, expected, atol=1e-10)
    np.testing.assert_allclose(aux.metrics["accuracy"], metrics["accuracy"])


def test_the_embedding_s_fast_weights_depend_on_every_support_example():
    support, _ = episode()
    before = adapt(params(), {}, support, KEY).embedding["conv"]["layer1"]["kernel"]
    for i in range(3):
        changed = Batch(support.x.at[i].multiply(2), support.y)
        after = adapt(params(), {}, changed, KEY).embedding["conv"]["layer1"]["kernel"]
        assert abs(after - before).max() > 1e-6


def test_bfloat16_gives_finite_bfloat16():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params(), episode()))
    found = jax.jit(jax.grad(LEARNER.loss, has_aux=True))(half[0], {}, half[1], KEY)
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype == jnp.bfloat16
        assert np.isfinite(np.float32(leaf)).all()


def test_what_it_cannot_serve_is_refused():
    with pytest.raises(UsageError, match="meta_networks is for classification"):
        meta_networks(objective=squared_error)
    with pytest.raises(UsageError, match="blocks=0 must be at least 1"):
        meta_networks(blocks=0)
    support, _ = episode()
    for batch, culprit in (
        (Batch(support.x, support.y.argmax(1)), "one-hot"),
        (Batch(support.x, support.y[:, :2]), "each of the 3 ways it trains with, and y has 2"),
        (Batch(support.x[..., 0], support.y), "images"),
        (Batch(support.x[:2], support.y), "same number of rows"),
    ):
        with pytest.raises(ValueError, match=culprit):
            LEARNER.adapt(params(), {}, batch, KEY, train=False)
