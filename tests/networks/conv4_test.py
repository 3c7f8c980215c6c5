import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meta_jax import registry
from meta_jax.networks import fused_block
from meta_jax.networks.conv4 import conv4, flat_strided_conv4, strided_conv4
from meta_jax.networks.fused_block import Deferred, deferred_conv_block, fused_conv_block
from meta_jax.networks.layers import conv_block, init_conv_block
from meta_jax.networks.normalisation import MODES, init_normalisation, normalise
from tests.checkers import key_and_leak_checks


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def block(seed=0, side=7):
    keys = jax.random.split(jax.random.key(seed), 6)
    params, _ = init_conv_block(keys[0], 2, 4, "batch")
    params["conv"]["bias"] = jax.random.normal(keys[1], (4,))
    params["normalisation"] = {
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
    y = jnp.maximum(y * params["normalisation"]["scale"] + params["normalisation"]["offset"], 0)
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
@pytest.mark.parametrize("moments", ["batch", "stored"])
def test_block_with_negative_scales_equals_the_plain_one(x64, stride, pool, moments):
    params, stats, x = block()

    def ours(params, x):
        settings = {"normalisation": "running", "moments": moments}
        return conv_block(params, stats, x, stride=stride, pool=pool, **settings)[0]

    def plain(params, x):
        settings = {"stride": stride, "pool": pool, "batch_statistics": moments == "batch"}
        return plain_block(params, stats, x, **settings)

    assert_equal_with_two_derivatives(ours, plain, params, x)


@pytest.mark.parametrize(("stride", "pool"), [(1, True), (2, False)])
@pytest.mark.parametrize("moments", ["batch", "stored"])
def test_a_block_left_to_the_next_one_equals_the_plain_one(x64, monkeypatch, stride, pool, moments):
    monkeypatch.setattr(fused_block, "on_cpu", lambda: True)  # an accelerator defers nothing
    monkeypatch.setattr(fused_block, "_PREPARED_BYTES", 1024)  # 2 of 5 images: one of filling
    params, stats, x = block()
    params, stats = {"first": params}, {"first": stats}
    params["second"], stats["second"] = init_conv_block(jax.random.key(1), 4, 3, "batch")

    def ours(params, x):
        settings = {"stride": stride, "pool": pool, "moments": moments}
        y, _ = deferred_conv_block(params["first"], stats["first"], x, **settings)
        assert isinstance(y, Deferred)
        assert y.chunks == 3
        return fused_conv_block(params["second"], stats["second"], y, **settings)[0]

    def plain(params, x):
        for name in ("first", "second"):
            settings = {"stride": stride, "pool": pool, "batch_statistics": moments == "batch"}
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


def apply_block(moments, stats=None):
    params, kept, x = block()
    kept = kept if stats is None else stats
    y, new = conv_block(
        params, kept, x, stride=1, pool=True, normalisation="running", moments=moments
    )
    return y, new, kept, statistics(x, params)


def test_running_statistics_move_by_a_tenth(x64):
    _, new, kept, batch = apply_block("update")
    assert_trees_close(new, jax.tree.map(lambda k, b: 0.9 * k + 0.1 * b, kept, batch))
    _, new, kept, _ = apply_block("stored")
    assert_trees_close(new, kept)


def test_support_statistics_are_taken_whole_and_then_kept(x64):
    trained, new, _, batch = apply_block("replace")
    assert_trees_close(new, batch)
    again, unchanged, _, _ = apply_block("stored", stats=new)
    assert_trees_close(unchanged, new)
    np.testing.assert_allclose(again, trained, atol=1e-12)
    assert abs(apply_block("stored")[0] - trained).max() > 0.1


def test_the_batch_s_moments_ignore_the_state_and_leave_it(x64):
    y, new, kept, _ = apply_block("batch")
    assert_trees_close(new, kept)
    nan = {"mean": jnp.full(4, jnp.nan), "var": jnp.full(4, jnp.nan)}
    np.testing.assert_array_equal(y, apply_block("batch", nan)[0])
    np.testing.assert_allclose(y, apply_block("update")[0], atol=1e-12)


@pytest.mark.parametrize("moments", ["stored", "batch", "update", "replace"])
def test_a_mask_that_hides_nothing_changes_nothing(x64, moments):
    """The form for speed and the one of plain layers agree, negative scales included."""
    params, stats, x = block()
    settings = {"stride": 1, "pool": True, "normalisation": "running", "moments": moments}
    fast = conv_block(params, stats, x, **settings)
    plain = conv_block(params, stats, x, mask=jnp.ones(5, bool), **settings)
    assert_trees_close(plain, fast)


@pytest.mark.parametrize("mode", ["none", "layer", "instance", "tasknorm"])
def test_the_other_modes_are_plain_layers(x64, mode):
    params, _, x = block()
    params["normalisation"], stats = init_normalisation(4, mode)
    if mode == "none":
        del params["normalisation"]
    moments = "replace" if mode == "tasknorm" else "stored"
    settings = {"normalisation": mode, "moments": moments}
    y, new = conv_block(params, stats, x, stride=1, pool=True, **settings)
    z = lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    z, expected_stats = normalise(
        params.get("normalisation", {}),
        stats,
        z + params["conv"]["bias"],
        mode=mode,
        moments=moments,
    )
    z = lax.reduce_window(z, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    np.testing.assert_allclose(y, jnp.maximum(z, 0), atol=1e-12)
    assert_trees_close(new, expected_stats)


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
        return network.apply(params, state, x, key=None, train=True, moments="batch")

    z, _ = jax.eval_shape(embed, jax.random.key(0), x)
    assert z.shape == (2, features)


def test_the_flattened_form_of_the_strided_network():
    """With a head for five ways it has the 113,221 parameters of Nichol et al. (2018)."""
    x = jnp.zeros((2, 28, 28, 1))
    network = flat_strided_conv4()
    params, state = jax.eval_shape(network.init, jax.random.key(0), x)
    z, _ = jax.eval_shape(
        lambda p, s: network.apply(p, s, x, key=None, train=True, moments="batch"), params, state
    )
    assert z.shape == (2, 256)
    assert size(params) + 256 * 5 + 5 == 113_221


@pytest.mark.parametrize("pool", [True, False])
def test_four_plain_blocks_make_the_network(x64, pool):
    network = (conv4 if pool else strided_conv4)(3, normalisation="batch")
    settings = {"stride": 1 if pool else 2, "pool": pool, "batch_statistics": True}

    @jax.jit
    def found_and_expected(key):
        x = jax.random.normal(key, (4, 33 if pool else 13, 32 if pool else 16, 1))
        params, state = network.init(key, x)
        z, new_state = network.apply(params, state, x, key=None, train=False, moments="batch")
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        for name in ("block1", "block2", "block3", "block4"):
            x = plain_block(params[name], state[name], x, **settings)
        return z, x.reshape(4, -1) if pool else x.mean((1, 2))

    z, expected = found_and_expected(jax.random.key(1))
    np.testing.assert_allclose(z, expected, atol=1e-10)


def test_an_image_too_small_to_pool_four_times_is_refused():
    with pytest.raises(ValueError, match="28x15 pixels are too small"):
        conv4().init(jax.random.key(0), jnp.zeros((1, 28, 15, 1)))
    strided_conv4(2).init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))


@pytest.mark.parametrize("network", [conv4, strided_conv4, flat_strided_conv4])
def test_unknown_modes_and_empty_layers_are_refused(network):
    with pytest.raises(
        ValueError, match="unknown normalisation 'group': choose one of none, batch, running"
    ):
        network(normalisation="group")
    with pytest.raises(ValueError, match="conv4: features=0 must be at least 1"):
        network(0)


def test_each_form_says_what_it_is():
    assert strided_conv4(3).config == {
        "name": "strided_conv4",
        "features": 3,
        "normalisation": "batch",
        "mean": True,
        "mesh": None,
    }
    assert flat_strided_conv4().config["name"] == "flat_strided_conv4"
    settings = registry.settings(registry.find("network", "conv4"))
    assert set(settings) == {"features", "normalisation"}
    assert settings["normalisation"].choices == MODES


@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing_in_any_mode(x64, mode):
    network = strided_conv4(2, normalisation=mode)
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 1))
    params, state = jax.jit(network.init)(jax.random.key(0), x)
    assert set(state) == (set() if mode in ("none", "layer", "instance") else set(params))
    padded = jnp.concatenate([x, jnp.full((2, 16, 16, 1), 1e6)])
    mask = jnp.arange(6) < 4
    moments = "replace" if mode == "tasknorm" else "update"
    settings = {"key": None, "train": True, "moments": moments}
    apply = jax.jit(lambda x, mask: network.apply(params, state, x, mask=mask, **settings))
    z, new = apply(x, None)
    z_padded, new_padded = apply(padded, mask)
    np.testing.assert_allclose(z_padded[:4], z, rtol=1e-9, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), new_padded, new)


@pytest.mark.parametrize("mode", ["batch", "tasknorm"])
def test_no_leaks_and_no_key_used_twice(mode):
    network = conv4(2, normalisation=mode)
    x = jnp.ones((3, 16, 16, 1))
    with key_and_leak_checks():
        params, state = jax.jit(network.init)(jax.random.key(0), x)

        @jax.jit
        @jax.grad
        def gradient(params):
            settings = {"key": None, "train": True, "moments": "replace"}
            return (network.apply(params, state, x, **settings)[0] ** 2).sum()

        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient(params)))


@pytest.mark.parametrize("mode", ["batch", "tasknorm"])
def test_bfloat16_in_and_out(mode):
    network = conv4(2, normalisation=mode)
    x = jax.random.uniform(jax.random.key(1), (3, 16, 16, 1))
    params, state = jax.jit(network.init)(jax.random.key(0), x)
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, state, x))
    settings = {"key": None, "train": True, "moments": "replace"}
    apply = jax.jit(lambda p, s, x, mask: network.apply(p, s, x, mask=mask, **settings))
    for mask in (None, jnp.array([True, True, False])):
        for leaf in jax.tree.leaves(apply(*cast, mask)):
            assert leaf.dtype == jnp.bfloat16
            assert np.isfinite(np.asarray(leaf, np.float32)).all()


@pytest.mark.parametrize("moments", ["stored", "batch"])
@pytest.mark.parametrize("network", [conv4, strided_conv4])
def test_an_export_takes_any_number_of_images(network, moments):
    network = network(2)
    x = jax.random.normal(jax.random.key(1), (3, 16, 16, 1))
    params, state = jax.jit(network.init)(jax.random.key(0), x)

    def embed(params, x):
        return network.apply(params, state, x, key=None, train=False, moments=moments)[0]

    (n,) = jax.export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((n, 16, 16, 1), x.dtype)
    exported = jax.export.export(jax.jit(embed))(params, shape)
    expected = jax.jit(embed)(params, x)
    np.testing.assert_allclose(exported.call(params, x), expected, rtol=1e-4, atol=1e-5)
    if moments == "stored":
        np.testing.assert_allclose(exported.call(params, x[:1]), expected[:1], rtol=1e-4, atol=1e-5)
