"""Networks that read a sequence at once, or step by step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.networks.sequences import (
    causal_transformer,
    linear_transformer,
    recurrent,
    running_sums,
    snail,
)

pytestmark = pytest.mark.usefixtures("x64")

XS = np.random.default_rng(1).normal(size=(6, 3))
MASK = np.array([True, True, False, True, True, True])
NETWORKS = {
    "gru": recurrent(4, "gru"),
    "lstm": recurrent(4, "lstm"),
    "transformer": causal_transformer(8, layers=2, heads=2),
    "linear_transformer": linear_transformer(8, layers=2, heads=2),
    "sums": running_sums(4),
    "snail": snail(width=4, filters=3, key_size=2, value_size=3),
}


@functools.cache
def params(name):
    init = jax.jit(NETWORKS[name].init, static_argnums=(1, 2))
    leaves, treedef = jax.tree.flatten(init(jax.random.key(0), 3, 6))
    noise = np.random.default_rng(0)
    return treedef.unflatten([leaf + 0.3 * noise.standard_normal(leaf.shape) for leaf in leaves])


@functools.cache
def read(name):
    return jax.jit(NETWORKS[name].read)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sequence_read_at_once_is_its_steps_one_by_one(name):
    network = NETWORKS[name]

    def read_step(params, memory, step):
        x, real = step
        after, features = network.step(params, memory, x)
        return network.keep(real, after, memory), features

    def one_by_one(params):
        start = network.start(params, len(XS))
        return jax.lax.scan(functools.partial(read_step, params), start, (XS, MASK))[1]

    expected = jax.jit(one_by_one)(params(name))[MASK]
    found = read(name)(params(name), XS, MASK)
    np.testing.assert_allclose(found[MASK], expected, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_sees_all_steps_before_and_none_after(name):
    gradient = jax.jit(jax.jacobian(lambda p, xs: NETWORKS[name].read(p, xs, MASK).sum(1), 1))
    depends = np.asarray(abs(gradient(params(name), XS)).sum(2) > 1e-12)[MASK][:, MASK]
    np.testing.assert_array_equal(depends, np.tril(np.ones((5, 5), bool)))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sequence_absorbed_at_once_is_what_its_steps_leave(name):
    network = NETWORKS[name]

    @jax.jit
    def last(params, xs, mask):
        memory = network.absorb(params, xs, mask, len(xs) + 1)
        return network.step(params, memory, -xs[0])[1]

    everything = np.concatenate([XS[MASK], -XS[:1]])
    expected = read(name)(params(name), everything, np.ones(len(everything), bool))[-1]
    np.testing.assert_allclose(last(params(name), XS, MASK), expected, atol=1e-10)


def test_the_gru_is_that_of_flax():
    ours = params("gru")
    gates = {}
    for i, name in enumerate("rzn"):
        columns = slice(4 * i, 4 * i + 4)
        gates[f"i{name}"] = jax.tree.map(lambda leaf, c=columns: leaf[..., c], ours["input"])
        gates[f"h{name}"] = {"kernel": ours["recurrent"]["kernel"][:, columns]}
    gates["hn"]["bias"] = ours["recurrent"]["bias"]
    h = np.random.default_rng(4).normal(size=4)
    expected, _ = nn.GRUCell(4).apply({"params": gates}, h, XS[0])
    found, features = jax.jit(NETWORKS["gru"].step)(ours, h, XS[0])
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_array_equal(features, found)


def test_the_transformer_is_that_of_flax():
    """One layer: attention and an MLP of flax's, each behind a normalisation."""
    network = causal_transformer(8, layers=1, heads=2)
    ours = jax.jit(lambda k: network.init(k, 3, 6))(jax.random.key(3))
    (layer,) = ours["layers"]
    projected = layer["query_key_value"]["kernel"].reshape(8, 2, 12)
    kernels = np.split(projected, 3, axis=-1)
    attention = {
        name: {"kernel": kernel, "bias": np.zeros((2, 4))}
        for name, kernel in zip(("query", "key", "value"), kernels, strict=True)
    }
    output = layer["attention_output"]
    attention["out"] = {"kernel": output["kernel"].reshape(2, 4, 8), "bias": output["bias"]}

    def normalised(z):
        return nn.LayerNorm(epsilon=1e-5, use_bias=False, use_scale=False).apply({}, z)

    @jax.jit
    def expected(xs):
        angles = np.arange(6)[:, None] * np.array([1, 0.1, 0.01, 0.001])
        z = xs @ ours["input"]["kernel"] + np.concatenate([np.sin(angles), np.cos(angles)], 1)
        z += nn.MultiHeadDotProductAttention(2).apply(
            {"params": attention}, normalised(z), mask=nn.make_causal_mask(jnp.ones(6))
        )
        hidden = nn.gelu(normalised(z) @ layer["hidden"]["kernel"])
        return normalised(z + hidden @ layer["output"]["kernel"])

    found = jax.jit(network.read)(ours, XS, np.ones(6, bool))
    np.testing.assert_allclose(found, expected(XS), atol=1e-6)


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="width=6, heads=4"):
        causal_transformer(6, heads=4)
    with pytest.raises(UsageError, match="snail needs filters of at least 1"):
        snail(filters=0)
    with pytest.raises(UsageError, match="hidden_size"):
        recurrent(0)


def test_linear_attention_is_a_weighted_mean_of_values():
    """One layer against the sum over steps, written out."""
    network = linear_transformer(4, layers=1, heads=1)
    init = jax.jit(network.init, static_argnums=(1, 2))(jax.random.key(0), 3, 6)
    (layer,) = init["layers"]
    silent = jax.tree.map(jnp.zeros_like, layer)
    layer = silent | {key: layer[key] for key in ("attention_output", "query_key_value")}
    layer["attention_normalisation"] = {"scale": jnp.ones(4), "offset": jnp.zeros(4)}
    found = jax.jit(network.read)(init | {"layers": [layer]}, XS, np.ones(6, bool))

    def normalised(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

    z = XS @ np.asarray(init["input"]["kernel"])
    q, k, v = np.split(normalised(z) @ np.asarray(layer["query_key_value"]["kernel"]), 3, axis=1)
    phi = [np.where(x > 0, x + 1, np.exp(x)) for x in (q, k)]
    for t in range(6):
        weights = phi[1][: t + 1] @ phi[0][t]
        mean = weights @ v[: t + 1] / weights.sum()
        expected = normalised(z[t] + mean @ np.asarray(layer["attention_output"]["kernel"]))
        np.testing.assert_allclose(found[t], expected, atol=1e-10)


def test_sums_do_not_depend_on_the_order_of_the_steps_before():
    order = np.array([2, 0, 1, 4, 3, 5])
    everything = np.ones(6, bool)
    found = read("sums")(params("sums"), XS, everything)
    shuffled = read("sums")(params("sums"), XS[order], everything)
    np.testing.assert_allclose(shuffled[-1], found[-1], atol=1e-12)
    assert abs(shuffled[3] - found[3]).max() > 1e-3
