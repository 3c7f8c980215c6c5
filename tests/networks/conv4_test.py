import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meta_jax.networks import convolution
from meta_jax.networks.conv4 import conv4, strided_conv4
from meta_jax.networks.layers import Deferred, conv_block, init_conv_block

MODES = ("batch", "running", "support")


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def block(seed=0, side=7):
    keys = jax.random.split(jax.random.key(seed), 6)
    params, _ = init_conv_block(keys[0], 2, 4)
    params["conv"]["bias"] = jax.random.normal(keys[1], (4,))
    params["batch_norm"] = {
        "scale": jnp.array([1.5, -0.7, 0.4, -2.0]),
        "offset": jax.random.normal(keys[2], (4,)),
    }
    stats = {"mean": jax.random.normal(keys[3], (4,)), "var": jnp.array([0.5, 1.0, 2.0, 3.0])}
    return params, stats, jax.random.normal(keys[4], (5, side, side, 2))


def plain_block(params, stats, x, *, stride, pool, batch_statistics):
    """Convolution -> batch norm -> ReLU -> pooling, in this order and nothing clever."""
    y = lax.conv_general_dilated(
        x,
        params["conv"]["kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y + params["conv"]["bias"]
    mean, var = stats["mean"], stats["var"]
    if batch_statistics:
        mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    y = (y - mean) / jnp.sqrt(var + 1e-5)
    y = jnp.maximum(y * params["batch_norm"]["scale"] + params["batch_norm"]["offset"], 0)
    if pool:
        rows, cols = (s // 2 * 2 for s in y.shape[1:3])
        corners = [y[:, i:rows:2, j:cols:2] for i in (0, 1) for j in (0, 1)]
        y = functools.reduce(jnp.maximum, corners)
    return y


def with_two_derivatives(f):
    def scalar(params, x):
        return (f(params, x) ** 3).sum()

    def of_gradient(params, x):
        gradients = jax.grad(scalar, (0, 1))(params, x)
        return sum(jnp.sin(g / 10).sum() for g in jax.tree.leaves(gradients))

    return jax.jit(
        lambda *a: (f(*a), jax.grad(scalar, (0, 1))(*a), jax.grad(of_gradient, (0, 1))(*a))
    )


def assert_equal_with_two_derivatives(ours, plain, params, x):
    expected = with_two_derivatives(plain)(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8),
        with_two_derivatives(ours)(params, x),
        expected,
    )
    assert all(abs(leaf).max() > 1e-3 for leaf in (expected[0], expected[1][1], expected[2][1]))


@pytest.mark.parametrize(("stride", "pool"), [(1, True), (2, False)])
@pytest.mark.parametrize("train", [True, False])
def test_block_with_negative_scales_equals_the_plain_one(x64, stride, pool, train):
    params, stats, x = block()

    def ours(params, x):
        return conv_block(
            params, stats, x, stride=stride, pool=pool, batch_norm="running", train=train
        )[0]

    def plain(params, x):
        return plain_block(params, stats, x, stride=stride, pool=pool, batch_statistics=train)

    assert_equal_with_two_derivatives(ours, plain, params, x)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator defers nothing")
@pytest.mark.parametrize(("stride", "pool"), [(1, True), (2, False)])
@pytest.mark.parametrize("train", [True, False])
def test_a_block_left_to_the_next_one_equals_the_plain_one(x64, monkeypatch, stride, pool, train):
    monkeypatch.setattr(convolution, "_PREPARED_BYTES", 1024)  # 2 of 5 images: one of filling
    params, stats, x = block()
    params, stats = {"first": params}, {"first": stats}
    params["second"], stats["second"] = init_conv_block(jax.random.key(1), 4, 3)

    def ours(params, x):
        settings = {"stride": stride, "pool": pool, "batch_norm": "running", "train": train}
        y, _ = conv_block(params["first"], stats["first"], x, defer=True, **settings)
        assert isinstance(y, Deferred)
        assert y.chunks == 3
        return conv_block(params["second"], stats["second"], y, **settings)[0]

    def plain(params, x):
        for name in ("first", "second"):
            settings = {"stride": stride, "pool": pool, "batch_statistics": train}
            x = plain_block(params[name], stats[name], x, **settings)
        return x

    assert_equal_with_two_derivatives(ours, plain, params, x)


def statistics(x, params):
    y = lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = y + params["conv"]["bias"]
    return {"mean": y.mean((0, 1, 2)), "var": y.var((0, 1, 2))}


def assert_trees_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), actual, expected)


def apply_block(mode, train, stats=None):
    params, kept, x = block()
    kept = kept if stats is None else stats
    y, new = conv_block(params, kept, x, stride=1, pool=True, batch_norm=mode, train=train)
    return y, new, kept, statistics(x, params)


def test_running_statistics_move_by_a_tenth(x64):
    _, new, kept, batch = apply_block("running", True)
    assert_trees_close(new, jax.tree.map(lambda k, b: 0.9 * k + 0.1 * b, kept, batch))
    _, new, kept, _ = apply_block("running", False)
    assert_trees_close(new, kept)


def test_support_statistics_are_taken_whole_and_then_kept(x64):
    trained, new, _, batch = apply_block("support", True)
    assert_trees_close(new, batch)
    again, unchanged, _, _ = apply_block("support", False, stats=new)
    assert_trees_close(unchanged, new)
    np.testing.assert_allclose(again, trained, atol=1e-12)
    assert abs(apply_block("support", False)[0] - trained).max() > 0.1


def test_batch_mode_ignores_the_state(x64):
    outputs = [
        apply_block("batch", train, stats)[0]
        for train in (True, False)
        for stats in (None, {"mean": jnp.full(4, jnp.nan), "var": jnp.full(4, jnp.nan)})
    ]
    for y in outputs:
        np.testing.assert_array_equal(y, outputs[0])
    np.testing.assert_allclose(outputs[0], apply_block("running", True)[0], atol=1e-12)


@pytest.mark.parametrize(("channels", "parameters"), [(1, 111_936), (3, 113_088)])
@pytest.mark.parametrize("network", [conv4, strided_conv4])
def test_number_of_parameters(network, channels, parameters):
    params, state = jax.eval_shape(
        network().init, jax.random.key(0), jnp.zeros((1, 28, 28, channels))
    )
    assert size(params) == parameters
    assert size(state) == 4 * 2 * 64


@pytest.mark.parametrize(
    ("network", "side", "features"),
    [(conv4, 28, 64), (conv4, 84, 1600), (conv4, 16, 64), (strided_conv4, 28, 64)],
)
def test_embedding_size(network, side, features):
    x = jnp.zeros((2, side, side, 1))
    network = network()

    def embed(key, x):
        params, state = network.init(key, x)
        return network.apply(params, state, x, key=None, train=True)

    z, _ = jax.eval_shape(embed, jax.random.key(0), x)
    assert z.shape == (2, features)


def test_the_flattened_form_of_the_strided_network():
    """With a head for five ways it has the 113,221 parameters of Nichol et al. (2018)."""
    x = jnp.zeros((2, 28, 28, 1))
    network = strided_conv4(mean=False)
    params, state = jax.eval_shape(network.init, jax.random.key(0), x)
    z, _ = jax.eval_shape(lambda p, s: network.apply(p, s, x, key=None, train=True), params, state)
    assert z.shape == (2, 256)
    assert size(params) + 256 * 5 + 5 == 113_221


@pytest.mark.parametrize("pool", [True, False])
def test_four_plain_blocks_make_the_network(x64, pool):
    network = (conv4 if pool else strided_conv4)(3, batch_norm="batch")
    x = jax.random.normal(jax.random.key(1), (4, 33 if pool else 13, 32 if pool else 16, 1))
    params, state = network.init(jax.random.key(0), x)
    z, new_state = jax.jit(lambda x: network.apply(params, state, x, key=None, train=False))(x)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    for name in ("block1", "block2", "block3", "block4"):
        x = plain_block(
            params[name],
            state[name],
            x,
            stride=1 if pool else 2,
            pool=pool,
            batch_statistics=True,
        )
    expected = x.reshape(4, -1) if pool else x.mean((1, 2))
    np.testing.assert_allclose(z, expected, atol=1e-10)


def test_an_image_too_small_to_pool_four_times_is_refused():
    with pytest.raises(ValueError, match="28x15 pixels are too small"):
        conv4().init(jax.random.key(0), jnp.zeros((1, 28, 15, 1)))
    strided_conv4(2).init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))


@pytest.mark.parametrize("network", [conv4, strided_conv4])
def test_an_unknown_batch_norm_is_refused(network):
    with pytest.raises(
        ValueError, match="unknown batch norm 'layer': choose one of batch, running"
    ):
        network(batch_norm="layer")


@pytest.mark.parametrize("mode", MODES)
def test_support_and_queries_are_asked_in_the_mode_s_own_way(mode):
    network = strided_conv4(2, batch_norm=mode)
    calls = []

    def apply(params, state, x, *, key, train):
        calls.append(train)
        return x, state

    network = network._replace(apply=apply)
    for train in (True, False):
        network.apply_to_support({}, {}, 0, key=None, train=train)
        network.apply_to_queries({}, {}, 0, key=None, train=train)
    expected = [True, False, True, False] if mode == "support" else [True, True, False, False]
    assert calls == expected
