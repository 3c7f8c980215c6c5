import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.metric_based.heads import (
    cosine_similarity,
    prototype_head,
    prototypes,
    squared_distance,
)

pytestmark = pytest.mark.usefixtures("x64")

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 0])


def embeddings(n=8, d=5, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, d))


def logits(z, y, queries):
    head = prototype_head(lambda z, c: -squared_distance(z, c))
    params = head.init(jax.random.key(0), z, y)
    assert jax.tree.leaves(params) == []
    return head.predict(params, head.fit(params, z, y), queries)


def test_prototypes_are_class_means():
    z = embeddings()
    expected = [np.asarray(z)[k == LABELS].mean(0) for k in range(3)]
    np.testing.assert_allclose(prototypes(z, jnp.eye(3)[LABELS]), expected, atol=1e-14)


def test_three_classes_by_hand():
    support = jnp.array([[0.0, 0.0], [2.0, 2.0], [1.0, -1.0]])
    found = logits(support, jnp.eye(3), jnp.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(found, [[-5.0, -1.0, -9.0]])
    np.testing.assert_allclose(
        jax.nn.softmax(found)[0], [0.01798, 0.98169, 0.000329], rtol=0, atol=5e-6
    )


def test_a_linear_classifier_gives_the_same_probabilities():
    z, queries = embeddings(), embeddings(4, seed=1)
    c = prototypes(z, jnp.eye(3)[LABELS])
    linear = 2 * queries @ c.T - (c * c).sum(1)
    np.testing.assert_allclose(
        jax.nn.softmax(-squared_distance(queries, c)), jax.nn.softmax(linear), atol=1e-12
    )


def test_support_order_does_not_matter():
    z, y, queries = embeddings(), jnp.eye(3)[LABELS], embeddings(4, seed=1)
    order = jax.random.permutation(jax.random.key(2), 8)
    np.testing.assert_allclose(
        logits(z[order], y[order], queries), logits(z, y, queries), atol=1e-12
    )


def test_moving_and_turning_the_embedding_space_does_not_matter():
    z, y, queries = embeddings(), jnp.eye(3)[LABELS], embeddings(4, seed=1)
    turn, _ = jnp.linalg.qr(embeddings(5, seed=3))
    shift = embeddings(1, seed=4)
    expected = logits(z, y, queries)
    np.testing.assert_allclose(logits(z + shift, y, queries + shift), expected, atol=1e-11)
    np.testing.assert_allclose(logits(z @ turn, y, queries @ turn), expected, atol=1e-11)
    assert abs(logits(z + shift, y, queries) - expected).max() > 0.1


def test_rows_of_padding_change_nothing():
    z, y, queries = embeddings(), jnp.eye(3)[LABELS], embeddings(4, seed=1)
    padded = jnp.concatenate([z, 100 * embeddings(3, seed=5)])
    labels = jnp.concatenate([y, jnp.zeros((3, 3))])
    np.testing.assert_allclose(logits(padded, labels, queries), logits(z, y, queries), atol=1e-13)


def test_a_class_without_examples_has_a_zero_prototype_and_finite_gradients():
    z, y = embeddings(), jnp.eye(4)[LABELS]
    np.testing.assert_array_equal(prototypes(z, y)[3], np.zeros(5))
    gradient = jax.grad(lambda z: (prototypes(z, y) ** 2).sum())(z)
    assert jnp.isfinite(gradient).all()


def test_squared_distance_keeps_its_digits_far_from_the_origin():
    with jax.enable_x64(False):
        a = jnp.array([[1e4, 1e4]], jnp.float32)
        b = a + jnp.array([[0.25, 0.5]], jnp.float32)
        np.testing.assert_array_equal(squared_distance(a, b), [[0.3125]])
        np.testing.assert_array_equal(squared_distance(a, a), [[0.0]])


def test_cosine_similarity_against_its_formula():
    a, b = np.asarray(embeddings(4)), np.asarray(embeddings(3, seed=1))
    expected = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(cosine_similarity(a, b), expected, atol=1e-13)
    np.testing.assert_allclose(cosine_similarity(3 * a, 0.01 * b), expected, atol=1e-13)


def test_cosine_similarity_and_its_gradient_are_finite_at_zero():
    zero, b = jnp.zeros((2, 5)), embeddings(3)
    np.testing.assert_array_equal(cosine_similarity(zero, b), np.zeros((2, 3)))
    for arguments in ((zero, b), (b, zero), (zero, zero)):
        gradients = jax.grad(lambda a, b: cosine_similarity(a, b).sum(), (0, 1))(*arguments)
        assert all(jnp.isfinite(g).all() for g in gradients)
    with jax.enable_x64(False):
        gradient = jax.grad(lambda a: cosine_similarity(a, a).sum())(jnp.zeros((2, 5)))
        assert jnp.isfinite(gradient).all()
