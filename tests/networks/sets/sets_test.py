"""Networks that read sets: closed forms, what sees what, and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.networks.sequences import recurrent
from meta_jax.networks.sets import (
    cross_attention,
    equiangular_codes,
    masked_row_mean,
    read_in_order,
    set_encoder,
    target_masked_transformer,
    temporal_convolutions,
)

pytestmark = pytest.mark.usefixtures("x64")

NORMAL = np.random.default_rng(0).normal
Z, Y, QUERIES = NORMAL(size=(5, 3)), NORMAL(size=(5, 2)), NORMAL(size=(4, 3))
READERS = {
    "mean": set_encoder(6, 2),
    "mean_of_products": set_encoder(6, 2, pairing="product"),
    "cross_attention": cross_attention(6, 2, 2),
    "target_masked": target_masked_transformer(6, 2, 2),
    "snail": temporal_convolutions(4, 3, 3, 2),
    "gru": read_in_order(recurrent(4)),
}
SETS = ("mean", "mean_of_products", "cross_attention", "target_masked")
every_reader = pytest.mark.parametrize("name", READERS)


def initial(reader):
    init = jax.jit(lambda key: reader.init(key, 3, 2, 5))
    return jax.tree.map(np.asarray, init(jax.random.key(0)))


@functools.cache
def params(name):
    leaves, treedef = jax.tree.flatten(initial(READERS[name]))
    noise = np.random.default_rng(1)
    return treedef.unflatten([leaf + 0.3 * noise.standard_normal(leaf.shape) for leaf in leaves])


@functools.cache
def program(name):
    reader = READERS[name]
    return jax.jit(lambda p, z, y, mask, x: reader.answer(p, reader.absorb(p, z, y, mask), x))


def features(name, z=Z, y=Y, mask=None, queries=QUERIES):
    return np.asarray(program(name)(params(name), z, y, mask, queries))


@every_reader
def test_a_query_is_answered_as_if_it_were_alone(name):
    alone = np.concatenate([features(name, queries=query[None]) for query in QUERIES])
    np.testing.assert_allclose(features(name), alone, atol=1e-12)


@every_reader
def test_the_order_of_a_set_matters_to_sequences_alone(name):
    order = np.array([2, 0, 4, 1, 3])
    difference = abs(features(name, Z[order], Y[order]) - features(name)).max()
    assert difference < 1e-12 if name in SETS else difference > 1e-3


@every_reader
def test_every_input_and_label_matters(name):
    def total(z, y):
        return program(name)(params(name), z, y, None, QUERIES).sum()

    for gradient in map(np.asarray, jax.jit(jax.grad(total, (0, 1)))(Z, Y)):
        assert (abs(gradient).max(1) > 1e-9).all()


@every_reader
def test_padding_is_passed_over_whatever_stands_in_it(name):
    mask = np.array([True, False, True, True, False])
    z, y = np.where(mask[:, None], Z, np.nan), np.where(mask[:, None], Y, np.inf)
    expected = features(name, Z[mask], Y[mask])
    if name == "snail":  # its depth follows the room for steps, that of `params`
        expected = features(name, np.r_[Z[mask], Z[:2]], np.r_[Y[mask], Y[:2]], np.arange(5) < 3)
    np.testing.assert_allclose(features(name, z, y, mask), expected, atol=1e-12)


@pytest.mark.parametrize("name", SETS)
def test_a_set_of_padding_alone_answers_finitely(name):
    assert np.isfinite(features(name, mask=np.zeros(5, bool))).all()


def test_without_layers_the_set_is_the_mean_of_its_pairs():
    """With an identity encoder, a linear decoder is one of the query and of the mean pair."""
    reader = set_encoder(7, 0)
    params = reader.init(jax.random.key(0), 3, 2, 5)
    assert jax.tree.leaves(params) == []
    mask = np.array([True, True, False, True, True])
    memory = reader.absorb(params, Z, Y, mask)
    expected = np.concatenate([Z, Y], 1)[mask].mean(0)
    np.testing.assert_allclose(memory, expected)
    answer = reader.answer(params, memory, QUERIES)
    np.testing.assert_allclose(answer, np.c_[QUERIES, np.tile(expected, (4, 1))])


def test_products_with_one_hot_labels_are_the_mean_of_each_class():
    reader = set_encoder(7, 0, pairing="product")
    labels = np.eye(2)[[0, 1, 1, 0, 0]]
    mask = np.array([True, True, True, True, False])
    memory = reader.absorb(reader.init(jax.random.key(0), 3, 2, 5), Z, labels, mask)
    np.testing.assert_allclose(memory, np.concatenate([Z[[0, 3]].mean(0), Z[[1, 2]].mean(0)]))
    with pytest.raises(UsageError, match="unknown pairing 'sum': choose one of concatenated"):
        set_encoder(pairing="sum")


def test_the_mean_of_rows_that_are_all_padding_is_zero():
    assert masked_row_mean(jnp.ones((2, 3)), jnp.zeros(2, bool)).tolist() == [0, 0, 0]


def test_cross_attention_to_keys_that_are_alike_is_the_mean_of_the_values():
    reader = cross_attention(4, 1, 2, self_attention=0)
    p = initial(reader)
    p["key"]["kernel"] = np.zeros((4, 4))
    memory = jax.jit(reader.absorb)(p, Z, Y, None)
    read = (
        np.asarray(memory.values).reshape(5, 4).mean(0) @ p["output"]["kernel"]
        + p["output"]["bias"]
    )
    decoder = p["decoder"][0]
    hidden = np.c_[QUERIES, np.tile(read, (4, 1))] @ decoder["kernel"] + decoder["bias"]
    answers = jax.jit(reader.answer)(p, memory, QUERIES)
    np.testing.assert_allclose(answers, np.maximum(hidden, 0), atol=1e-12)


def test_the_transformer_is_one_with_a_mask_over_set_and_query():
    """The keys and values that are kept are those of a single pass over six rows."""
    from meta_jax.networks.attention import after_attention, attend, layer_norm, project
    from meta_jax.networks.sets.set_network import feedforward

    p = params("target_masked")
    rows = np.zeros((6, 6))
    rows[:5, :5], rows[5, :3], rows[5, 5] = np.c_[Z, Y], QUERIES[0], 1
    seen = np.tile(np.arange(6) < 5, (6, 1))

    @jax.jit
    def last(p, rows):
        rows = feedforward(p["input"], rows)
        for layer in p["layers"]:
            query, keys, values = project(layer, rows, 2)
            rows = after_attention(layer, rows, attend(query, keys, values, seen))
        return layer_norm(p["normalisation"], rows)[5]

    np.testing.assert_allclose(features("target_masked")[0], last(p, rows), atol=1e-12)


def test_equiangular_codes_are_the_corners_of_a_simplex():
    for ways in (2, 5, 20):
        codes = np.asarray(equiangular_codes(ways))
        expected = np.where(np.eye(ways), 1, -1 / (ways - 1))
        np.testing.assert_allclose(codes @ codes.T, expected, atol=1e-6)
        np.testing.assert_allclose(codes.sum(0), 0, atol=1e-6)
    with pytest.raises(UsageError, match="at least 2 ways"):
        equiangular_codes(1)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="width=5, heads=2"):
        target_masked_transformer(5, 1, 2)
    with pytest.raises(UsageError, match="layers"):
        cross_attention(4, 0, 2)
    with pytest.raises(ValueError, match=r"a set needs inputs.*\[5, 3\] and \[4, 2\]"):
        features("mean", y=Y[:4])
