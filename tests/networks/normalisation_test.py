import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Network
from meta_jax.lookup import UsageError
from meta_jax.networks.conv4 import strided_conv4
from meta_jax.networks.normalisation import (
    MODES,
    Moments,
    batch_moments,
    blank_padding,
    check_mode,
    embed_queries,
    embed_support,
    embed_together,
    init_normalisation,
    is_normalisation,
    is_transductive,
    keeps_support_moments,
    may_embed_together,
    normalise,
    query_moments,
    support_moments,
    used_moments,
)
from tests.random_trees import normal

X = np.random.default_rng(0).normal(size=(4, 3, 2, 5))
SCALE, OFFSET = np.array([1.0, -2.0, 0.5, 0.0, 3.0]), np.array([0.0, 1.0, -1.0, 2.0, 0.5])


def layer(mode):
    """Parameters and moments away from their first values."""
    params, stats = init_normalisation(5, mode)
    params |= {"scale": jnp.asarray(SCALE), "offset": jnp.asarray(OFFSET)} if params else {}
    if stats:
        stats |= {"mean": jnp.asarray(np.arange(5.0)), "var": jnp.asarray(np.arange(1.0, 6.0))}
    return params, stats


@functools.partial(jax.jit, static_argnames=("mode", "moments"))
def normalised(params, stats, x, mask=None, *, mode, moments):
    return normalise(params, stats, x, mode=mode, moments=moments, mask=mask)


def by_hand(x, mean, var):
    return SCALE * (x - mean) / np.sqrt(var + 1e-5) + OFFSET


def over(x, axes):
    return x.mean(axes, keepdims=True), x.var(axes, keepdims=True)


@pytest.mark.parametrize("mode", ["batch", "running", "support", "one_at_a_time"])
@pytest.mark.parametrize("moments", ["stored", "batch", "update", "replace"])
def test_batch_norm_in_closed_form(x64, mode, moments):
    params, stats = layer(mode)
    y, new = normalised(params, stats, X, mode=mode, moments=moments)
    mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
    if moments == "stored":
        expected, kept = by_hand(X, np.arange(5), np.arange(1, 6)), stats
    else:
        expected = by_hand(X, mean, var)
        share = {"batch": 0.0, "update": 0.1, "replace": 1.0}[moments]
        kept = {
            "mean": (1 - share) * np.arange(5) + share * mean,
            "var": (1 - share) * np.arange(1, 6) + share * var,
        }
    np.testing.assert_allclose(y, expected, rtol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), new, kept)


@pytest.mark.parametrize(("mode", "axes"), [("layer", (1, 2, 3)), ("instance", (1, 2))])
def test_moments_of_each_example_in_closed_form(x64, mode, axes):
    params, stats = layer(mode)
    assert stats == {}
    y, new = normalised(params, stats, X, mode=mode, moments="stored")
    assert new == {}
    np.testing.assert_allclose(y, by_hand(X, *over(X, axes)), rtol=1e-10)
    # An example's answer does not depend on the others.
    alone, _ = normalised(params, stats, X[:1], mode=mode, moments="stored")
    np.testing.assert_allclose(y[:1], alone, rtol=1e-10)


def test_none_leaves_everything():
    assert init_normalisation(5, "none") == ({}, {})
    y, stats = normalise({}, {}, X, mode="none", moments="update")
    assert y is X
    assert stats == {}


def test_tasknorm_blends_moments_of_the_support_set_with_an_example_s_own(x64):
    """Equations 6 and 7 of Bronskill et al. (2020), with instance normalisation."""
    params, stats = layer("tasknorm")
    params |= {"slope": jnp.asarray(0.3), "intercept": jnp.asarray(-0.7)}
    support, queries = X[:3], X[3:]
    a = 1 / (1 + np.exp(-(0.3 * 3 - 0.7)))  # there are three support examples
    of_support = over(support, (0, 1, 2))

    def expected(x):
        own = over(x, (1, 2))
        mean = a * of_support[0] + (1 - a) * own[0]
        var = a * (of_support[1] + (of_support[0] - mean) ** 2)
        var += (1 - a) * (own[1] + (own[0] - mean) ** 2)
        return by_hand(x, mean, var)

    y, kept = normalised(params, stats, support, mode="tasknorm", moments="replace")
    np.testing.assert_allclose(y, expected(support), rtol=1e-10)
    assert kept["count"] == 3
    y, same = normalised(params, kept, queries, mode="tasknorm", moments="stored")
    np.testing.assert_allclose(y, expected(queries), rtol=1e-10)
    jax.tree.map(np.testing.assert_array_equal, same, kept)
    # At first both count the same, as in the authors' code.
    first, _ = init_normalisation(5, "tasknorm")
    assert first["slope"] == first["intercept"] == 0


@pytest.mark.parametrize("rubbish", [1e8, np.inf])
@pytest.mark.parametrize("mode", MODES)
def test_padding_enters_no_moment(x64, mode, rubbish):
    params, stats = layer(mode)
    padded = np.concatenate([X[:2], np.full((2, 3, 2, 5), rubbish), X[2:]])
    mask = np.array([True, True, False, False, True, True])
    settings = {"mode": mode, "moments": "replace"}
    y, new = normalised(params, stats, X, **settings)
    y_padded, new_padded = normalised(params, stats, padded, mask=mask, **settings)
    np.testing.assert_allclose(np.asarray(y_padded)[mask], y, rtol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), new_padded, new)


def test_gradients_do_not_pass_through_padding(x64):
    def loss(x):
        moments = batch_moments(x, np.array([True, True, True, False]))
        return (moments.mean + moments.var).sum()

    x = X.copy()
    x[3] = 1e8
    gradient = np.asarray(jax.jit(jax.grad(loss))(x))
    assert not gradient[3].any()
    assert abs(gradient[:3]).min() > 0


def test_a_batch_of_padding_alone_is_finite():
    moments = jax.jit(batch_moments)(X, np.zeros(4, bool))
    assert all(np.isfinite(leaf).all() for leaf in moments)


@pytest.mark.parametrize("moments", ["update", "replace"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("layer", "instance")])
def test_padding_alone_leaves_the_moments(mode, moments):
    params, stats = layer(mode)
    y, kept = normalised(params, stats, X, np.zeros(4, bool), mode=mode, moments=moments)
    assert np.isfinite(y).all()
    jax.tree.map(np.testing.assert_array_equal, kept, stats)
    _, changed = normalised(params, stats, X, np.arange(4) < 1, mode=mode, moments=moments)
    leaves = (map(np.asarray, jax.tree.leaves(tree)) for tree in (stats, changed))
    for old, new in zip(*leaves, strict=True):
        # A tasknorm layer counts one row, as it did at first.
        assert (old.ndim == 0 and mode == "tasknorm") or (new != old).all()


@pytest.mark.parametrize("mask", [np.ones(1, bool), np.ones((4, 1), bool), np.ones(4)])
def test_masks_that_would_broadcast_or_weigh_are_refused(mask):
    for mode in MODES:
        params, stats = layer(mode)
        with pytest.raises(ValueError, match=r"mask must be bool \[4\]"):
            normalise(params, stats, X, mode=mode, moments="batch", mask=mask)
    for call in (batch_moments, blank_padding):
        with pytest.raises(ValueError, match=r"mask must be bool \[4\]"):
            call(X, mask)


def test_running_averages_tend_to_what_comes_in():
    stats = {"mean": jnp.asarray(np.zeros(2)), "var": jnp.asarray(np.ones(2))}
    batch = Moments(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
    update = jax.jit(functools.partial(used_moments, moments="update"))
    for _ in range(200):
        used, stats = update(stats, batch)
        np.testing.assert_array_equal(used.mean, batch.mean)
    np.testing.assert_allclose(stats["mean"], batch.mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], batch.var, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_in_and_out(mode, masked):
    cast = lambda tree: jax.tree.map(lambda a: np.asarray(a, jnp.bfloat16), tree)  # noqa: E731
    mask = np.arange(4) < 3 if masked else None
    result = normalised(*cast(layer(mode)), cast(X), mask, mode=mode, moments="replace")
    for leaf in jax.tree.leaves(result):
        assert leaf.dtype == jnp.bfloat16
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match="unknown normalisation 'group': choose one of none, batch"
    ):
        init_normalisation(5, "group")
    with pytest.raises(UsageError, match="unknown moments 'udpate': choose one of stored, batch,"):
        normalise(*layer("batch"), X, mode="batch", moments="udpate")
    with pytest.raises(UsageError, match="unknown moments 'udpate'"):
        used_moments(layer("batch")[1], Moments(jnp.zeros(5), jnp.ones(5)), "udpate")
    with pytest.raises(ValueError, match="'layer': choose one of batch, none"):
        check_mode("layer", ("batch", "none"))
    for mode in ("instance", "tasknorm"):
        params, stats = layer(mode)
        with pytest.raises(ValueError, match=rf"'{mode}' needs inputs with places"):
            normalise(params, stats, X[:, 0, 0], mode=mode, moments="stored")


def test_a_path_says_whose_a_parameter_is():
    tree = {"a": {"normalisation": {"scale": 0}, "conv": {"kernel": 0}}, "normalisation": [0, 0]}
    found = jax.tree_util.tree_map_with_path(lambda path, _: is_normalisation(path), tree)
    assert found == {
        "a": {"normalisation": {"scale": True}, "conv": {"kernel": False}},
        "normalisation": [True, True],
    }


# ---- Which moments are used when.

# By mode: for a support set in training and in tests, for queries in training and in tests.
TABLE = {
    "none": ("stored", "stored", "stored", "stored"),
    "batch": ("batch", "batch", "batch", "batch"),
    "running": ("update", "stored", "update", "stored"),
    "support": ("replace", "replace", "stored", "stored"),
    "one_at_a_time": ("batch", "batch", "batch", "batch"),
    "layer": ("stored", "stored", "stored", "stored"),
    "instance": ("stored", "stored", "stored", "stored"),
    "tasknorm": ("replace", "replace", "stored", "stored"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_network_is_asked_for_its_mode_s_moments(mode):
    calls = []

    def apply(params, state, x, *, key, train, moments, mask):
        calls.append((train, moments, None if mask is None else mask.tolist(), x.shape))
        return x, state

    network = Network(lambda key, x: ({}, {}), apply, mode)
    support = Batch(np.ones((3, 2), np.float32), np.eye(3), jnp.array([True, True, False]))
    queries, mask = np.ones((2, 2), np.float32), jnp.array([True, False])
    for train in (True, False):
        embed_support(network, {}, {}, support, key=None, train=train)
        if mode == "one_at_a_time" and not train:
            continue
        embed_queries(network, {}, {}, queries, support=support, key=None, train=train, mask=mask)
    support_train, support_test, query_train, query_test = TABLE[mode]
    expected = [
        (True, support_train, [True, True, False], (3, 2)),
        (True, query_train, [True, False], (2, 2)),
        (False, support_test, [True, True, False], (3, 2)),
        (False, query_test, [True, False], (2, 2)),
    ]
    assert calls == expected[: len(calls)]
    assert len(calls) == (3 if mode == "one_at_a_time" else 4)
    assert support_moments(mode, train=True) == support_train
    assert query_moments(mode, train=False) == query_test


def test_modes_say_what_they_are():
    assert [mode for mode in MODES if is_transductive(mode)] == ["batch"]
    assert [mode for mode in MODES if keeps_support_moments(mode)] == ["support", "tasknorm"]
    assert [mode for mode in MODES if not may_embed_together(mode)] == ["support", "tasknorm"]


def small_network(mode):
    network = strided_conv4(3, normalisation=mode)
    x = np.array(normal(5, 8, 8, 1, seed=1))
    params, state = jax.jit(network.init)(jax.random.key(0), x)
    return network, params, state, x


@pytest.mark.parametrize("masked", [False, True])
def test_one_at_a_time_is_each_query_with_the_support_set(x64, masked):
    network, params, state, x = small_network("one_at_a_time")
    real = np.array([True, False, True]) if masked else None
    if masked:
        x[1] = 100.0
    support, queries = Batch(x[:3], np.eye(3), real), x[3:]
    rows = x[:3][real] if masked else x[:3]

    @functools.partial(jax.jit, static_argnames="train")
    def embed(queries, train):
        return embed_queries(
            network, params, state, queries, support=support, key=None, train=train
        )

    @functools.partial(jax.jit, static_argnames="train")
    def apply(x, train):
        return network.apply(params, state, x, key=None, train=train, moments="batch")[0]

    z, kept = embed(queries, train=False)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    for query, embedding in zip(queries, np.asarray(z), strict=True):
        expected = np.asarray(apply(np.concatenate([rows, query[None]]), train=False))
        np.testing.assert_allclose(embedding, expected[-1], rtol=1e-9, atol=1e-12)
    # In training it is the mode 'batch'.
    z, _ = embed(queries, train=True)
    np.testing.assert_array_equal(z, apply(queries, train=True))


def test_one_at_a_time_takes_pytrees():
    def apply(params, state, x, *, key, train, moments, mask):
        return x["a"] + x["b"].sum(), state

    network = Network(lambda key, x: ({}, {}), apply, "one_at_a_time")
    support = Batch({"a": np.ones(2), "b": np.array([1.0, 2.0])}, np.eye(2))
    queries = {"a": np.zeros(3), "b": np.array([10.0, 20.0, 30.0])}
    embed = functools.partial(embed_queries, network, {}, {}, key=None, train=False)
    z, _ = jax.jit(embed)(queries, support=support)
    np.testing.assert_array_equal(z, [13, 23, 33])


@pytest.mark.parametrize("masked", [False, True])
def test_support_and_queries_as_one_batch(x64, masked):
    network, params, state, x = small_network("running")
    support, query = Batch(x[:3], np.eye(3)), Batch(x[3:], np.eye(3)[:2])
    mask = np.arange(5) < (4 if masked else 5)
    if masked:  # one of the two has padding
        query = query._replace(mask=mask[3:])

    @jax.jit
    def both_ways(key):
        together = embed_together(network, params, state, support, query, key=key)
        return together, network.apply(
            params, state, x, key=None, train=True, moments="update", mask=mask
        )

    (zs, zq, kept), (expected, expected_kept) = jax.tree.map(
        np.asarray, both_ways(jax.random.key(0))
    )
    np.testing.assert_allclose(np.concatenate([zs, zq])[mask], expected[mask], rtol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), kept, expected_kept)


def test_what_stands_in_padding_reaches_no_network():
    """Not even as numbers that a network would turn into NaNs."""
    seen = []

    def apply(params, state, x, *, key, train, moments, mask):
        seen.append(x)
        return x, state

    network = Network(lambda key, x: ({}, {}), apply, "running")
    mask = jnp.array([True, False])
    batch = Batch(jnp.array([[1.0], [jnp.inf]]), np.eye(2), mask)
    embed_support(network, {}, {}, batch, key=None, train=True)
    embed_queries(network, {}, {}, batch.x, support=None, key=None, train=True, mask=mask)
    embed_together(network, {}, {}, batch, batch, key=jax.random.key(0))
    assert [x.ravel().tolist() for x in seen] == [[1, 0], [1, 0], [1, 0, 1, 0]]
    words = {"ids": np.array([[3, 4], [5, 6]]), "real": np.ones((2, 2), bool)}
    blank = jax.jit(blank_padding)(words, mask)
    assert blank["ids"].tolist() == [[3, 4], [0, 0]]
    assert blank["real"].tolist() == [[True, True], [False, False]]


def test_queries_one_at_a_time_need_the_support_set():
    network, params, state, x = small_network("one_at_a_time")
    with pytest.raises(ValueError, match="with the support set: give it"):
        embed_queries(network, params, state, x, support=None, key=None, train=False)


def test_an_export_takes_any_number_of_queries_one_at_a_time():
    network, params, state, x = small_network("one_at_a_time")
    support = Batch(x[:3], np.eye(3))

    def embed(params, x):
        return embed_queries(network, params, state, x, support=support, key=None, train=False)[0]

    (m,) = jax.export.symbolic_shape("m")
    shape = jax.ShapeDtypeStruct((m, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(embed))(params, shape)
    expected = jax.jit(embed)(params, x)
    np.testing.assert_allclose(exported.call(params, x[:2]), expected[:2], rtol=1e-4, atol=1e-5)
