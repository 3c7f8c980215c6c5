from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meta_jax.networks.layers import conv_block, linear
from meta_jax.networks.normalisation import MODES
from meta_jax.networks.relation_network import (
    init_relation_module,
    relation_encoder,
    relation_module,
)
from tests.random_trees import normal


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("side", "channels", "padding", "of_encoder", "of_module", "places"),
    [(28, 1, "SAME", 111_936, 111_505, 5), (84, 3, "VALID", 113_088, 115_601, 19)],
)
def test_parameters(side, channels, padding, of_encoder, of_module, places):
    network = relation_encoder()
    x = jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)

    def shapes(key, x):
        params, state = network.init(key, x)
        z, _ = network.apply(params, state, x, key=None, train=False)
        return params, z, init_relation_module(key, z, padding=padding)[0]

    encoder, z, module = jax.eval_shape(shapes, jax.random.key(0), x)
    assert (size(encoder), size(module)) == (of_encoder, of_module)
    assert z.shape == (2, places, places, 64)


def test_the_first_parameters_are_the_authors():
    maps = np.zeros((1, 5, 5, 64), np.float32)
    params, _ = jax.tree.map(np.asarray, jax.jit(init_relation_module)(jax.random.key(0), maps))
    for block in ("block1", "block2"):
        kernel = params[block]["conv"]["kernel"]
        np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
        assert abs(kernel.mean()) < 1e-3
        np.testing.assert_array_equal(params[block]["conv"]["bias"], 0)
    for layer in ("hidden", "output"):
        np.testing.assert_array_equal(params[layer]["bias"], 1)
    np.testing.assert_allclose(params["hidden"]["kernel"].std(), 0.01, rtol=0.1)


def test_the_encoder_of_plain_blocks(x64):
    network = relation_encoder(3)
    x = normal(3, 14, 13, 1, seed=1)
    params, state = jax.jit(network.init)(jax.random.key(0), x)
    z, _ = jax.jit(
        lambda x: network.apply(params, state, x, key=None, train=True, moments="batch")
    )(x)
    np.testing.assert_allclose(z, plain_blocks(params, x), atol=1e-10)


@jax.jit
def plain_blocks(params, x):
    for i, (padding, pool) in enumerate([("VALID", True)] * 2 + [("SAME", False)] * 2):
        block = params[f"block{i + 1}"]
        x = lax.conv_general_dilated(
            x,
            block["conv"]["kernel"],
            (1, 1),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
        x = jnp.maximum(x, 0)
        if pool:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x


@cache
def maps_and_module(padding="SAME"):
    """Parameters and statistics away from their first values, three class maps, two queries."""
    side = 5 if padding == "SAME" else 10
    classes, queries = (np.asarray(normal(n, side, side, 4, seed=n)) for n in (3, 2))
    init = jax.jit(partial(init_relation_module, features=4, padding=padding))
    tree, random = init(jax.random.key(0), classes), np.random.default_rng(0)
    params, stats = jax.tree.map(lambda a: a + 0.3 * abs(random.normal(size=a.shape)), tree)
    params["block1"]["normalisation"]["scale"] *= np.array([1, -1, 1, 1])
    return params, stats, classes, queries


@partial(jax.jit, static_argnames=("moments", "padding"))
def by_hand(params, stats, classes, queries, *, moments, padding):
    # One row for each pair: the class's channels first, then the query's.
    x = jnp.stack([jnp.concatenate([c, q], -1) for q in queries for c in classes])
    new_stats = {}
    for block in ("block1", "block2"):
        x, new_stats[block] = conv_block(
            params[block],
            stats[block],
            x,
            stride=1,
            pool=True,
            normalisation="running",
            moments=moments,
            padding=padding,
        )
    x = jax.nn.relu(linear(params["hidden"], x.reshape(6, -1)))
    return linear(params["output"], x).reshape(2, 3), new_stats


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("moments", ["update", "stored"])
@pytest.mark.parametrize("mask", [None, np.ones(2, bool)])
def test_the_module_looks_at_concatenated_maps(x64, padding, moments, mask):
    arguments, settings = maps_and_module(padding), {"moments": moments, "padding": padding}
    module = jax.jit(partial(relation_module, mask=mask, normalisation="running", **settings))
    scores, new_stats = jax.tree.map(np.asarray, module(*arguments))
    expected, expected_stats = by_hand(*arguments, **settings)
    np.testing.assert_allclose(scores, expected, atol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), new_stats, expected_stats
    )
    assert abs(scores - scores[0, 0]).max() > 1e-3


def test_inputs_that_are_no_feature_maps_or_too_small_are_refused():
    with pytest.raises(ValueError, match=r"not embeddings of shape \(64,\): use an encoder"):
        init_relation_module(jax.random.key(0), jnp.zeros((1, 64)))
    with pytest.raises(ValueError, match="feature maps of 5x5 are too small"):
        init_relation_module(jax.random.key(0), jnp.zeros((1, 5, 5, 2)), padding="VALID")
    with pytest.raises(ValueError, match="9x28 pixels are too small"):
        relation_encoder().init(jax.random.key(0), jnp.zeros((1, 9, 28, 1)))
    with pytest.raises(ValueError, match="unknown normalisation 'group'"):
        relation_encoder(normalisation="group")
    with pytest.raises(ValueError, match="relation_encoder: features=0 must be at least 1"):
        relation_encoder(0)


@pytest.mark.parametrize("mode", MODES)
def test_pairs_of_padding_enter_no_moment(x64, mode):
    _, _, classes, queries = maps_and_module()
    init = jax.jit(partial(init_relation_module, features=4, normalisation=mode))
    params, stats = init(jax.random.key(5), classes)
    settings = {"normalisation": mode, "moments": "replace"}
    module = jax.jit(partial(relation_module, **settings))
    expected = jax.tree.map(np.asarray, module(params, stats, classes, queries))
    rubbish = np.full((1, *classes.shape[1:]), 1e3)
    scores, new_stats = module(
        params,
        stats,
        classes,
        np.concatenate([queries, rubbish]),
        mask=np.array([True, True, False]),
    )
    np.testing.assert_allclose(np.asarray(scores)[:2], expected[0], rtol=1e-10)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14), new_stats, expected[1]
    )
    assert abs(expected[0] - expected[0][0, 0]).max() > 1e-9


def test_an_export_takes_any_number_of_images_and_queries():
    network = relation_encoder(2, normalisation="running")
    x = normal(3, 26, 26, 1, seed=1)
    settings = {"normalisation": "running", "moments": "stored"}

    @jax.jit
    def init(key, x):
        params, state = network.init(key, x)
        maps, _ = network.apply(params, state, x, key=None, train=False)
        return params, state, *init_relation_module(jax.random.key(2), maps, features=2)

    def scores(tree, x):
        params, state, module_params, stats = tree
        maps, _ = network.apply(params, state, x, key=None, train=False)
        return relation_module(module_params, stats, maps[:1], maps, **settings)[0]

    tree = init(jax.random.key(0), x)
    (n,) = jax.export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((n, 26, 26, 1), x.dtype)
    exported = jax.export.export(jax.jit(scores))(tree, shape)
    expected = jax.jit(scores)(tree, x)
    np.testing.assert_allclose(exported.call(tree, x), expected, atol=1e-6)
    np.testing.assert_allclose(exported.call(tree, x[:1]), expected[:1], atol=1e-6)


def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        init = jax.jit(relation_encoder(2).init)
        jax.block_until_ready(init(jax.random.key(0), np.zeros((1, 12, 12, 1))))
        init = jax.jit(partial(init_relation_module, features=2))
        jax.block_until_ready(init(jax.random.key(0), np.zeros((1, 5, 5, 2))))
