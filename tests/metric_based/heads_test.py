import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from meta_jax.metric_based.heads import (
    attention,
    cosine_similarity,
    kernel_head,
    kernel_logits,
    kernel_regression,
    linear_head,
    manhattan_distance,
    pairwise_distance,
    prototype_head,
    prototypes,
    ridge_head,
    ridge_solve,
    squared_distance,
)
from tests.random_trees import normal

pytestmark = pytest.mark.usefixtures("x64")

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 0])


def embeddings(n=8, d=5, seed=0):
    return normal(n, d, seed=seed)


def logits(z, y, queries):
    head = prototype_head(lambda z, c: -squared_distance(z, c))
    assert jax.tree.leaves(head.init(jax.random.key(0), z, y)) == []
    return answer(head, z, y, queries)


def answer(head, z, y, queries):
    @jax.jit
    def outputs(z, y, queries):
        params, state = head.init(jax.random.key(0), z, y)
        assert state == {}
        fitted, state = head.fit(params, state, z, y, train=False)
        outputs, state = head.predict(params, state, fitted, queries, train=False)
        assert state == {}
        return outputs

    return outputs(z, y, queries)


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
    gradient = jax.jit(jax.grad(lambda a, b: cosine_similarity(a, b).sum(), (0, 1)))
    for arguments in ((zero, b), (b, zero), (zero, zero)):
        assert all(np.isfinite(g).all() for g in gradient(*arguments))
    with jax.enable_x64(False):
        gradient = jax.jit(jax.grad(lambda a: cosine_similarity(a, a).sum()))(jnp.zeros((2, 5)))
        assert np.isfinite(gradient).all()


def test_manhattan_distance_against_its_formula():
    a, b = np.asarray(embeddings(4)), np.asarray(embeddings(3, seed=1))
    expected = [[sum(abs(p - q)) for q in b] for p in a]
    np.testing.assert_allclose(manhattan_distance(a, b), expected, atol=1e-13)


@pytest.mark.parametrize("metric", ["squared_euclidean", "manhattan", "cosine"])
def test_a_pairwise_distance_is_zero_on_the_diagonal_alone(metric):
    a = embeddings(4)
    found = np.array(pairwise_distance(a, a, metric=metric))
    np.testing.assert_allclose(found, found.T, atol=1e-13)
    np.testing.assert_allclose(np.diag(found), np.zeros(4), atol=1e-13)
    assert (found + np.eye(4) > 0.1).all()


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="unknown metric 'x': choose one of squared_eucl"):
        pairwise_distance(embeddings(1), embeddings(1), metric="x")


def test_kernel_regression_against_its_formula():
    k = np.exp(np.asarray(embeddings(4, 8)))
    y = np.asarray(embeddings(8, 2, seed=1))
    expected = k @ y / k.sum(1, keepdims=True)
    np.testing.assert_allclose(kernel_regression(jnp.log(k), y), expected, atol=1e-12)
    # Masked rows are as good as absent.
    mask = np.arange(8) < 5
    expected = k[:, :5] @ y[:5] / k[:, :5].sum(1, keepdims=True)
    np.testing.assert_allclose(kernel_regression(jnp.log(k), y, mask=mask), expected, atol=1e-12)


def test_attention_weights_and_class_probabilities_sum_to_one():
    y = jnp.eye(3)[LABELS]
    scores = 4 * embeddings(6, 8)
    np.testing.assert_allclose(kernel_regression(scores, jnp.ones((8, 1))), 1, atol=1e-12)
    np.testing.assert_allclose(kernel_regression(scores, y).sum(1), 1, atol=1e-12)


def test_attention_against_its_formula():
    q, k, v = embeddings(3), embeddings(4, seed=1), embeddings(4, 2, seed=2)
    weights = np.exp(np.asarray(q) @ np.asarray(k).T / 0.5)
    expected = weights @ np.asarray(v) / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(attention(q, k, v, temperature=0.5), expected, atol=1e-12)


def test_the_softmax_of_kernel_logits_is_kernel_regression():
    scores, y = 4 * embeddings(6, 8), jnp.eye(3)[LABELS]
    np.testing.assert_allclose(
        jax.nn.softmax(kernel_logits(scores, y)), kernel_regression(scores, y), atol=1e-12
    )


def test_kernel_logits_stay_finite_far_from_the_support_and_without_examples():
    with jax.enable_x64(False):
        scores = jnp.array([[-1e4, -2e4, -3e4]], jnp.float32)
        y = jnp.array([[1.0, 0, 0], [0, 1, 0], [0, 1, 0]], jnp.float32)  # the last class: none

        def loss(scores):
            return -jax.nn.log_softmax(kernel_logits(scores, y))[0, 1]

        value, gradient = jax.jit(jax.value_and_grad(loss))(scores)
        np.testing.assert_allclose(value, 1e4)
        np.testing.assert_allclose(gradient, [[1.0, -1.0, 0.0]])
        assert jax.nn.softmax(kernel_logits(scores, y))[0, 2] == 0


def gaussian(bandwidth):
    return kernel_head(lambda a, b: -squared_distance(a, b), bandwidth=bandwidth)


def test_a_narrow_kernel_is_the_nearest_neighbour_and_a_wide_one_the_class_frequencies():
    z, y, queries = embeddings(), jnp.eye(3)[LABELS], embeddings(6, seed=1)
    nearest = LABELS[np.asarray(squared_distance(queries, z)).argmin(1)]
    narrow = jax.nn.softmax(answer(gaussian(1e-3), z, y, queries))
    np.testing.assert_allclose(narrow, np.eye(3)[nearest], atol=1e-6)
    wide = jax.nn.softmax(answer(gaussian(1e6), z, y, queries))
    np.testing.assert_allclose(wide, np.tile([4 / 8, 2 / 8, 2 / 8], (6, 1)), atol=1e-4)


def test_more_examples_of_a_class_weigh_more_in_a_kernel_but_not_in_a_prototype():
    z = jnp.array([[-1.0], [1.0]])
    middle = jnp.array([[0.0]])
    y = jnp.eye(2)
    twice = (jnp.concatenate([z, z[1:]]), jnp.concatenate([y, y[1:]]), middle)
    np.testing.assert_allclose(
        jax.nn.softmax(answer(gaussian(1.0), *twice)), [[1 / 3, 2 / 3]], atol=1e-12
    )
    np.testing.assert_allclose(jax.nn.softmax(logits(*twice)), [[0.5, 0.5]], atol=1e-12)


def test_the_bandwidth_is_learned_where_asked():
    z, y = embeddings(), jnp.eye(3)[LABELS]
    head = gaussian(2.5)
    params, state = head.init(jax.random.key(0), z, y)
    assert set(params) == {"log_bandwidth"}

    @jax.jit
    def loss(log_bandwidth):
        params = {"log_bandwidth": log_bandwidth}
        fitted, _ = head.fit(params, state, z, y, train=True)
        return head.predict(params, state, fitted, embeddings(4, seed=1), train=True)[0].sum()

    width, step = params["log_bandwidth"], 1e-5
    np.testing.assert_allclose(jnp.exp(width), 2.5)
    expected = (loss(width + step) - loss(width - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(width), expected, rtol=1e-7)
    assert kernel_head(cosine_similarity, learn_bandwidth=False).init(width, z, y) == ({}, {})


@pytest.mark.parametrize(("n", "d"), [(8, 5), (5, 8)])
def test_ridge_primal_and_dual_agree(n, d):
    x, y = embeddings(n, d), embeddings(n, 2, seed=1)
    primal, dual, auto = (ridge_solve(x, y, 0.3, form=f) for f in ("primal", "dual", "auto"))
    np.testing.assert_allclose(primal, dual, atol=1e-12)
    np.testing.assert_array_equal(auto, primal if d <= n else dual)
    # The gradient of ||xW - y||^2 + penalty ||W||^2 vanishes.
    np.testing.assert_allclose(x.T @ (x @ primal - y) + 0.3 * primal, np.zeros((d, 2)), atol=1e-12)
    with jax.enable_x64(False):
        forms = [
            ridge_solve(jnp.float32(x), jnp.float32(y), 0.3, form=f) for f in ("primal", "dual")
        ]
        np.testing.assert_allclose(*forms, atol=1e-5)


def test_ridge_on_orthonormal_inputs():
    x, _ = jnp.linalg.qr(embeddings(8, 5))
    y = embeddings(8, 2, seed=1)
    np.testing.assert_allclose(ridge_solve(x, y, 0.7), x.T @ y / 1.7, atol=1e-13)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_ridge_gradients_equal_finite_differences(form):
    x, y = embeddings(4, 3), embeddings(4, 2, seed=1)
    jax.test_util.check_grads(
        lambda x, y, penalty: ridge_solve(x, y, penalty, form=form), (x, y, 0.4), 1, ["rev"]
    )


def test_an_unknown_form_of_ridge_is_refused():
    with pytest.raises(ValueError, match="unknown form 'x': choose one of auto, primal, dual"):
        ridge_solve(embeddings(), embeddings(), 1.0, form="x")


def test_the_ridge_head_by_hand():
    z, y, queries = np.asarray(embeddings()), np.eye(3)[LABELS], np.asarray(embeddings(4, seed=1))
    x = np.hstack([z, np.ones((8, 1))])
    # Inputs and targets over sqrt(n) are a penalty n times as large.
    w = np.linalg.solve(x.T @ x + 8 * 0.2 * np.eye(6), x.T @ y)
    expected = 3.0 * np.hstack([queries, np.ones((4, 1))]) @ w
    for learned in (True, False):
        head = ridge_head(penalty=0.2, scale=3.0, learned=learned)
        np.testing.assert_allclose(answer(head, z, y, queries), expected, atol=1e-12)


def test_the_linear_head_by_hand():
    z, y = embeddings(), embeddings(8, 2, seed=1)
    queries = embeddings(4, seed=2)
    expected = np.asarray(queries) @ (np.asarray(z).T @ np.asarray(y) / 8)
    np.testing.assert_allclose(answer(linear_head(), z, y, queries), expected, atol=1e-12)


def test_primitives_map_over_tasks():
    z, y = (jnp.stack([embeddings(seed=s) for s in seeds]) for seeds in ((0, 1), (2, 3)))
    for primitive in (prototypes, squared_distance, ridge_solve_one, attention_on_itself):
        together = jax.jit(jax.vmap(primitive))(z, y)
        for i in range(2):
            np.testing.assert_allclose(together[i], primitive(z[i], y[i]), atol=1e-12)


def ridge_solve_one(x, y):
    return ridge_solve(x, y, 1.0)


def attention_on_itself(z, y):
    return attention(z, z, y)
