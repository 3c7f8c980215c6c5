import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meta_jax import registry
from meta_jax.lookup import UsageError
from meta_jax.networks.resnet12 import drop_block, resnet12
from tests.checkers import key_and_leak_checks

X = jax.random.normal(jax.random.key(1), (4, 8, 9, 2))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def small(mode="running", widths=(3,), **settings):
    """Parameters away from their first values."""
    network = resnet12(widths, normalisation=mode, **settings)
    params, state = jax.jit(network.init)(jax.random.key(0), X)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.2 * rng.normal(size=p.shape).astype(p.dtype), params)
    return network, params, state


def test_its_size_is_the_published_one():
    network = resnet12()
    x = jax.ShapeDtypeStruct((2, 84, 84, 3), jnp.float32)
    params, state = jax.eval_shape(network.init, jax.random.key(0), x)
    convolutions = 0
    for inputs, width in ((3, 64), (64, 160), (160, 320), (320, 640)):
        convolutions += 9 * inputs * width + 2 * 9 * width**2 + inputs * width
    assert size(params) == convolutions + 4 * 2 * (64 + 160 + 320 + 640)
    assert size(state) == 4 * 2 * (64 + 160 + 320 + 640)

    def embed(network):
        return jax.eval_shape(
            lambda p, s, x: network.apply(p, s, x, key=None, train=False)[0], params, state, x
        )

    assert embed(network).shape == (2, 640)
    assert embed(resnet12(mean=False)).shape == (2, 5 * 5 * 640)


def plain(params, x):
    """The network by JAX's own convolutions and pooling, with moments of the batch."""

    def layer(params, x):
        kernel = params["conv"]["kernel"]
        y = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = (y - y.mean((0, 1, 2))) / jnp.sqrt(y.var((0, 1, 2)) + 1e-5)
        return y * params["normalisation"]["scale"] + params["normalisation"]["offset"]

    def leaky(x):
        return jnp.where(x > 0, x, 0.1 * x)

    for block in params.values():
        y = leaky(layer(block["layer1"], x))
        y = layer(block["layer3"], leaky(layer(block["layer2"], y)))
        x = leaky(y + layer(block["shortcut"], x))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.mean((1, 2))


def test_plain_layers_make_the_network(x64):
    network, params, state = small(widths=(3, 4))
    x = X.astype(float)
    z, new_state = jax.jit(
        lambda p, x: network.apply(p, state, x, key=None, train=False, moments="batch")
    )(params, x)
    np.testing.assert_allclose(z, jax.jit(plain)(params, x), rtol=1e-8)
    jax.tree.map(np.testing.assert_array_equal, new_state, state)


@pytest.mark.parametrize("mode", ["none", "running", "instance", "tasknorm"])
def test_padding_changes_nothing(mode):
    network, params, state = small(mode, drop_rate=0.0)
    moments = "replace" if mode == "tasknorm" else "update"
    apply = jax.jit(
        lambda x, mask: network.apply(
            params, state, x, key=None, train=True, moments=moments, mask=mask
        )
    )
    z, new_state = apply(X, None)
    padded = jnp.concatenate([X, jnp.full((2, *X.shape[1:]), 100.0)])
    z_padded, new_padded = apply(padded, jnp.arange(6) < 4)
    np.testing.assert_allclose(z_padded[:4], z, rtol=2e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), new_padded, new_state
    )
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert bool(state) == (mode not in ("none", "layer", "instance"))


def test_it_drops_features_while_training_alone():
    network, params, state = small(drop_rate=0.5)
    apply = jax.jit(
        lambda key, train: network.apply(params, state, X, key=key, train=train)[0],
        static_argnums=1,
    )
    keys = [jax.random.key(seed) for seed in (1, 2)]
    np.testing.assert_array_equal(apply(keys[0], False), apply(None, False))
    assert abs(apply(keys[0], True) - apply(keys[1], True)).max() > 0.01
    with pytest.raises(ValueError, match=r"needs a key while training, for its drop_rate is 0\.5"):
        network.apply(params, state, X, key=None, train=True)
    with key_and_leak_checks():
        jax.jit(network.init)(jax.random.key(0), X)
        jax.jit(lambda key: network.apply(params, state, X, key=key, train=True))(keys[0])


def test_what_cannot_be_is_refused():
    for arguments, message in (
        ({"widths": ()}, "without a block"),
        ({"widths": (4, 0)}, r"widths=\(4, 0\) must be at least 1 each"),
        ({"drop_rate": 1.0}, r"drop_rate=1\.0 must be at least 0 and below 1"),
        ({"drop_block": 0}, "drop_block=0 must be at least 1"),
        ({"normalisation": "group"}, "unknown normalisation 'group'"),
    ):
        with pytest.raises(ValueError, match=message):
            resnet12(**arguments)
    with pytest.raises(ValueError, match="15x84 pixels are too small for resnet12, which pools"):
        resnet12().init(jax.random.key(0), jnp.zeros((1, 15, 84, 3)))


def test_its_settings_are_flags_and_its_record_builds_it_again():
    settings = registry.settings(registry.find("network", "resnet12"))
    assert set(settings) == {"widths", "drop_rate", "drop_block", "mean", "normalisation"}
    assert all(setting.doc for setting in settings.values())
    config = resnet12((8, 16), drop_rate=0.2).config
    assert registry.build("network", config).config == config


@pytest.mark.parametrize(("block_size", "side"), [(1, 8), (3, 9), (5, 3)])
def test_drop_block_drops_squares_and_keeps_the_mean(block_size, side):
    x = jnp.ones((60, side, side, 20))
    y = jax.jit(lambda key: drop_block(key, x, rate=0.1, block_size=block_size))(jax.random.key(0))
    dropped = np.asarray(y == 0)
    # Overlaps of squares leave the share a little below the rate.
    assert 0.07 < dropped.mean() < 0.11
    np.testing.assert_allclose(np.asarray(y, np.float64).mean(), 1, rtol=1e-5)
    np.testing.assert_allclose(y[~dropped], 1 / (1 - dropped.mean()), rtol=1e-5)
    # Every dropped feature lies in a dropped square that lies within its map.
    edge = min(block_size, side)
    windows = np.lib.stride_tricks.sliding_window_view(dropped, (edge, edge), axis=(1, 2))
    whole = windows.all((-2, -1))
    covered = np.zeros_like(dropped)
    for i in range(edge):
        for j in range(edge):
            covered[:, i : i + whole.shape[1], j : j + whole.shape[2]] |= whole
    np.testing.assert_array_equal(covered, dropped)


def test_drop_block_draws_for_each_task_its_own():
    x = jnp.ones((2, 6, 6, 3))
    keys = jax.random.split(jax.random.key(0), 2)
    drop = jax.jit(lambda key, x: drop_block(key, x, rate=0.3, block_size=2))
    together = jax.vmap(drop, (0, None))(keys, x)
    for i in (0, 1):
        np.testing.assert_allclose(together[i], drop(keys[i], x), rtol=1e-6)
    assert (together[0] != together[1]).any()


def test_drop_block_leaves_types_and_survives_dropping_all():
    x = jnp.ones((1, 2, 2, 1), jnp.bfloat16)
    y = drop_block(jax.random.key(0), x, rate=0.999999, block_size=2)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), 0)
    with pytest.raises(AssertionError):
        drop_block(jax.random.key(0), x[0], rate=0.1, block_size=2)


@pytest.mark.parametrize("rate", [2, 1.0, -0.1, float("nan")])
def test_drop_block_refuses_what_is_no_share(rate):
    with pytest.raises(UsageError, match="drop_block needs a rate from 0 to below 1"):
        drop_block(jax.random.key(0), jnp.ones((1, 2, 2, 1)), rate=rate, block_size=1)
    with pytest.raises(UsageError, match="drop_block needs block_size of at least 1, not 0"):
        drop_block(jax.random.key(0), jnp.ones((1, 2, 2, 1)), rate=0.1, block_size=0)
