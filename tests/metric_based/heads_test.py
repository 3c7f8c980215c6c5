import functools

import jax
import numpy as np
import pytest

from meta_jax.metric_based.heads import (
    kernel_head,
    prototype_head,
    prototype_regression_head,
    ridge_head,
)
from meta_jax.metric_based.matching import full_context_head
from meta_jax.metric_based.primitives import cosine_similarity, squared_distance
from meta_jax.metric_based.relation import relation_head
from meta_jax.metric_based.siamese import pairwise_head
from tests.random_trees import moved, normal

pytestmark = pytest.mark.usefixtures("x64")

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 0])


def embeddings(n=8, d=5, seed=0):
    return np.asarray(normal(n, d, seed=seed))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


PROTOTYPES = prototype_head(lambda z, c: -squared_distance(z, c))


def logits(z, y, queries):
    assert jax.tree.leaves(PROTOTYPES.init(jax.random.key(0), z, y, None)) == []
    return answer(PROTOTYPES, z, y, queries)


@functools.partial(jax.jit, static_argnums=0)
def outputs_of(head, z, y, queries):
    params, state = head.init(jax.random.key(0), z, y, None)
    assert state == {}
    fitted, state = head.fit(params, state, z, y, None, train=False)
    outputs, state = head.predict(params, state, fitted, queries, train=False)
    assert state == {}
    return outputs


def answer(head, z, y, queries):
    return np.asarray(outputs_of(head, z, y, queries))


def test_three_classes_by_hand():
    support = np.array([[0.0, 0.0], [2.0, 2.0], [1.0, -1.0]])
    found = logits(support, np.eye(3), np.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(found, [[-5.0, -1.0, -9.0]])
    np.testing.assert_allclose(softmax(found)[0], [0.01798, 0.98169, 0.000329], rtol=0, atol=5e-6)


def test_support_order_does_not_matter():
    z, y, queries = embeddings(), np.eye(3)[LABELS], embeddings(4, seed=1)
    order = np.random.default_rng(2).permutation(8)
    np.testing.assert_allclose(
        logits(z[order], y[order], queries), logits(z, y, queries), atol=1e-12
    )


def test_moving_and_turning_the_embedding_space_does_not_matter():
    z, y, queries = embeddings(), np.eye(3)[LABELS], embeddings(4, seed=1)
    turn, _ = np.linalg.qr(embeddings(5, seed=3))
    shift = embeddings(1, seed=4)
    expected = logits(z, y, queries)
    np.testing.assert_allclose(logits(z + shift, y, queries + shift), expected, atol=1e-11)
    np.testing.assert_allclose(logits(z @ turn, y, queries @ turn), expected, atol=1e-11)
    assert abs(logits(z + shift, y, queries) - expected).max() > 0.1


def gaussian(bandwidth):
    return kernel_head(lambda a, b: -squared_distance(a, b), bandwidth=bandwidth)


def test_a_narrow_kernel_is_the_nearest_neighbour_and_a_wide_one_the_class_frequencies():
    z, y, queries = embeddings(), np.eye(3)[LABELS], embeddings(6, seed=1)
    nearest = LABELS[((queries[:, None] - z) ** 2).sum(-1).argmin(1)]
    narrow = softmax(answer(gaussian(1e-3), z, y, queries))
    np.testing.assert_allclose(narrow, np.eye(3)[nearest], atol=1e-6)
    wide = softmax(answer(gaussian(1e6), z, y, queries))
    np.testing.assert_allclose(wide, np.tile([4 / 8, 2 / 8, 2 / 8], (6, 1)), atol=1e-4)


def test_more_examples_of_a_class_weigh_more_in_a_kernel_but_not_in_a_prototype():
    z = np.array([[-1.0], [1.0]])
    middle = np.array([[0.0]])
    y = np.eye(2)
    twice = (np.concatenate([z, z[1:]]), np.concatenate([y, y[1:]]), middle)
    np.testing.assert_allclose(softmax(answer(gaussian(1.0), *twice)), [[1 / 3, 2 / 3]], atol=1e-12)
    np.testing.assert_allclose(softmax(logits(*twice)), [[0.5, 0.5]], atol=1e-12)


def test_the_bandwidth_is_learned_where_asked():
    z, y, queries = embeddings(), np.eye(3)[LABELS], embeddings(4, seed=1)
    head = gaussian(2.5)
    params, state = head.init(jax.random.key(0), z, y, None)
    assert set(params) == {"log_bandwidth"}

    @jax.jit
    @jax.value_and_grad
    def loss(log_bandwidth):
        params = {"log_bandwidth": log_bandwidth}
        fitted, _ = head.fit(params, state, z, y, None, train=True)
        return head.predict(params, state, fitted, queries, train=True)[0].sum()

    width, step = np.asarray(params["log_bandwidth"]), 1e-5
    np.testing.assert_allclose(np.exp(width), 2.5)
    _, slope = loss(width)
    expected = (float(loss(width + step)[0]) - float(loss(width - step)[0])) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-7)
    assert kernel_head(cosine_similarity, learn_bandwidth=False).init(width, z, y, None) == ({}, {})


def test_the_ridge_head_by_hand():
    z, y, queries = np.asarray(embeddings()), np.eye(3)[LABELS], np.asarray(embeddings(4, seed=1))
    x = np.hstack([z, np.ones((8, 1))])
    # Inputs and targets over sqrt(n) are a penalty n times as large.
    w = np.linalg.solve(x.T @ x + 8 * 0.2 * np.eye(6), x.T @ y)
    expected = 3.0 * np.hstack([queries, np.ones((4, 1))]) @ w
    for learned in (True, False):
        head = ridge_head(penalty=0.2, scale=3.0, learned=learned)
        np.testing.assert_allclose(answer(head, z, y, queries), expected, atol=1e-12)


def test_the_prototype_regression_head_by_hand():
    z, y = embeddings(), embeddings(8, 2, seed=1)
    queries = embeddings(4, seed=2)
    expected = np.asarray(queries) @ (np.asarray(z).T @ np.asarray(y) / 8)
    np.testing.assert_allclose(
        answer(prototype_regression_head(), z, y, queries), expected, atol=1e-12
    )


def maps(z):
    """Feature maps [n, 4, 4, 1] that differ in every place."""
    return np.outer(z[:, 0], np.arange(1.0, 17.0)).reshape(-1, 4, 4, 1) % 1


HEADS = {
    "prototypes": prototype_head(lambda z, c: -squared_distance(z, c)),
    "prototype_regression": prototype_regression_head(),
    "kernel": kernel_head(cosine_similarity, bandwidth=0.3),
    "kernel_regression": kernel_head(cosine_similarity, bandwidth=0.3, kind="regression"),
    "ridge": ridge_head(penalty=0.2),
    "ridge_dual": ridge_head(penalty=0.2, form="dual"),
    "full_context": full_context_head(kernel_head(cosine_similarity), steps=2),
    "pairwise": pairwise_head(),
    **{
        f"relation_{mode}": relation_head(normalisation=mode, features=2)
        for mode in ("running", "batch", "support", "layer", "one_at_a_time")
    },
}


@pytest.mark.parametrize("name", HEADS)
def test_padding_changes_nothing_whatever_stands_there(name):
    head, z, y = HEADS[name], embeddings(), np.eye(3)[LABELS]
    prepare = maps if name.startswith("relation") else lambda z: z
    order = np.array([0, 1, 8, 2, 3, 9, 4, 5, 6, 7, 10])  # rubbish between the examples
    padded = np.concatenate([z, 1e6 * embeddings(3, seed=7)])[order]
    labels = np.concatenate([y, 5 * np.ones((3, 3))])[order]
    mask = order < 8
    params, state = jax.jit(head.init)(jax.random.key(0), prepare(z), y, None)
    params = moved(params)
    state = jax.tree.map(lambda s: np.asarray(s) + 0.5, state)
    queries = embeddings(5, seed=1)

    @jax.jit
    def answers(z, y, mask, queries, query_mask):
        fitted, fitted_state = head.fit(params, state, z, y, mask, train=False)
        return head.predict(params, fitted_state, fitted, queries, train=False, mask=query_mask)

    def outputs(*arguments):
        return jax.tree.map(np.asarray, answers(*arguments))

    expected, of_state = outputs(prepare(z), y, None, prepare(queries[:4]), None)
    found, new_state = outputs(prepare(padded), labels, mask, prepare(queries), np.arange(5) < 4)
    np.testing.assert_allclose(found[:4], expected, atol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), new_state, of_state)
    # Examples of which the mask says nothing do matter, where a query finds them near.
    near = np.concatenate([z, queries[:3]])[order]
    loud, _ = outputs(prepare(near), labels, None, prepare(queries[:4]), None)
    assert abs(loud - expected).max() > 1e-4


def test_the_loss_of_a_head_leaves_padding_out_too():
    head, z, y = pairwise_head(), embeddings(), np.eye(3)[LABELS]
    params = moved(jax.jit(head.init)(jax.random.key(0), z, y, None)[0])
    padded, labels = np.concatenate([z, 1e6 * z[:2]]), np.concatenate([y, y[:2]])
    mask = np.arange(10) < 8

    @jax.jit
    def loss(z, y, mask, queries, of_queries, query_mask):
        fitted, _ = head.fit(params, {}, z, y, mask, train=True)
        return head.loss(params, fitted, queries, of_queries, query_mask)

    expected = loss(z, y, None, z[::-1], y[::-1], None)
    found = loss(padded, labels, mask, padded[::-1], labels[::-1], mask[::-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), found, expected)


@pytest.mark.parametrize("name", [name for name in HEADS if "relation" not in name])
def test_heads_name_what_does_not_fit(name):
    z, y = embeddings(), np.eye(3)[LABELS]
    head = HEADS[name]
    params, state = jax.jit(head.init)(jax.random.key(0), z, y, None)
    for arguments, culprit in (
        ((z[:, None], y, None), "z must be vectors"),
        ((z, LABELS, None), "one-hot"),
        ((z, y[:4], None), "y has 4 rows and z 8"),
        ((z, y, np.ones(4, bool)), "mask must be"),
    ):
        with pytest.raises(ValueError, match=culprit):
            head.fit(params, state, *arguments, train=False)
