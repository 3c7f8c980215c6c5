import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.metric_based.primitives import (
    attention,
    cosine_similarity,
    kernel_logits,
    kernel_regression,
    manhattan_distance,
    pairwise_distance,
    prototypes,
    ridge_solve,
    squared_distance,
)
from tests.random_trees import normal

pytestmark = pytest.mark.usefixtures("x64")

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 0])


def embeddings(n=8, d=5, seed=0):
    return np.asarray(normal(n, d, seed=seed))


ridge = jax.jit(ridge_solve, static_argnames="form")


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def test_prototypes_are_class_means():
    z = embeddings()
    expected = [z[k == LABELS].mean(0) for k in range(3)]
    np.testing.assert_allclose(jax.jit(prototypes)(z, np.eye(3)[LABELS]), expected, atol=1e-14)


def test_a_linear_classifier_gives_the_same_probabilities():
    z, queries = embeddings(), embeddings(4, seed=1)
    c = np.asarray(jax.jit(prototypes)(z, np.eye(3)[LABELS]))
    linear = 2 * queries @ c.T - (c * c).sum(1)
    distance = np.asarray(jax.jit(squared_distance)(queries, c))
    np.testing.assert_allclose(softmax(-distance), softmax(linear), atol=1e-12)


def test_a_class_without_examples_has_a_zero_prototype_and_finite_gradients():
    z, y = embeddings(), np.eye(4)[LABELS]

    def square(z):
        means = prototypes(z, y)
        return (means**2).sum(), means

    gradient, means = jax.jit(jax.grad(square, has_aux=True))(z)
    np.testing.assert_array_equal(np.asarray(means)[3], np.zeros(5))
    assert np.isfinite(gradient).all()


def test_squared_distance_keeps_its_digits_far_from_the_origin():
    with jax.enable_x64(False):
        a = np.array([[1e4, 1e4]], np.float32)
        b = a + np.array([[0.25, 0.5]], np.float32)
        distance = jax.jit(squared_distance)
        np.testing.assert_array_equal(distance(a, b), [[0.3125]])
        np.testing.assert_array_equal(distance(a, a), [[0.0]])


def test_cosine_similarity_against_its_formula():
    a, b = np.asarray(embeddings(4)), np.asarray(embeddings(3, seed=1))
    expected = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    similarity = jax.jit(cosine_similarity)
    np.testing.assert_allclose(similarity(a, b), expected, atol=1e-13)
    np.testing.assert_allclose(similarity(3 * a, 0.01 * b), expected, atol=1e-13)


def test_cosine_similarity_and_its_gradient_are_finite_at_zero():
    zero, b = np.zeros((2, 5)), embeddings(3)
    np.testing.assert_array_equal(jax.jit(cosine_similarity)(zero, b), np.zeros((2, 3)))
    gradient = jax.jit(jax.grad(lambda a, b: cosine_similarity(a, b).sum(), (0, 1)))
    for arguments in ((zero, b), (b, zero), (zero, zero)):
        assert all(np.isfinite(g).all() for g in gradient(*arguments))
    with jax.enable_x64(False):
        gradient = jax.jit(jax.grad(lambda a: cosine_similarity(a, a).sum()))(zero)
        assert np.isfinite(gradient).all()


def test_manhattan_distance_against_its_formula():
    a, b = np.asarray(embeddings(4)), np.asarray(embeddings(3, seed=1))
    expected = [[sum(abs(p - q)) for q in b] for p in a]
    np.testing.assert_allclose(jax.jit(manhattan_distance)(a, b), expected, atol=1e-13)


@pytest.mark.parametrize("metric", ["squared_euclidean", "manhattan", "cosine"])
def test_a_pairwise_distance_is_zero_on_the_diagonal_alone(metric):
    a = embeddings(4)
    found = np.asarray(jax.jit(functools.partial(pairwise_distance, metric=metric))(a, a))
    np.testing.assert_allclose(found, found.T, atol=1e-13)
    np.testing.assert_allclose(np.diag(found), np.zeros(4), atol=1e-13)
    assert (found + np.eye(4) > 0.1).all()


def test_an_unknown_metric_is_refused():
    with pytest.raises(UsageError, match="unknown metric 'x': choose one of squared_eucl"):
        pairwise_distance(embeddings(1), embeddings(1), metric="x")


def test_kernel_regression_against_its_formula():
    k = np.exp(np.asarray(embeddings(4, 8)))
    y = np.asarray(embeddings(8, 2, seed=1))
    expected = k @ y / k.sum(1, keepdims=True)
    regression = jax.jit(kernel_regression)
    np.testing.assert_allclose(regression(np.log(k), y), expected, atol=1e-12)
    # Masked rows are as good as absent.
    mask = np.arange(8) < 5
    expected = k[:, :5] @ y[:5] / k[:, :5].sum(1, keepdims=True)
    np.testing.assert_allclose(regression(np.log(k), y, mask=mask), expected, atol=1e-12)


def test_attention_weights_and_class_probabilities_sum_to_one():
    y = np.eye(3)[LABELS]
    scores = 4 * embeddings(6, 8)
    regression = jax.jit(kernel_regression)
    np.testing.assert_allclose(regression(scores, np.ones((8, 1))), 1, atol=1e-12)
    np.testing.assert_allclose(np.asarray(regression(scores, y)).sum(1), 1, atol=1e-12)


def test_attention_against_its_formula():
    q, k, v = embeddings(3), embeddings(4, seed=1), embeddings(4, 2, seed=2)
    weights = np.exp(np.asarray(q) @ np.asarray(k).T / 0.5)
    expected = weights @ np.asarray(v) / weights.sum(1, keepdims=True)
    found = jax.jit(functools.partial(attention, temperature=0.5))(q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_softmax_of_kernel_logits_is_kernel_regression():
    scores, y = 4 * embeddings(6, 8), np.eye(3)[LABELS]
    logits, expected = jax.jit(lambda s: (kernel_logits(s, y), kernel_regression(s, y)))(scores)
    np.testing.assert_allclose(softmax(np.asarray(logits)), expected, atol=1e-12)


def test_kernel_logits_stay_finite_far_from_the_support_and_without_examples():
    with jax.enable_x64(False):
        scores = np.array([[-1e4, -2e4, -3e4]], np.float32)
        y = np.array([[1.0, 0, 0], [0, 1, 0], [0, 1, 0]], np.float32)  # the last class: none

        def loss(scores):
            logits = kernel_logits(scores, y)
            return -jax.nn.log_softmax(logits)[0, 1], jax.nn.softmax(logits)

        (value, p), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(scores)
        np.testing.assert_allclose(value, 1e4)
        np.testing.assert_allclose(gradient, [[1.0, -1.0, 0.0]])
        assert np.asarray(p)[0, 2] == 0


@pytest.mark.parametrize(("n", "d"), [(8, 5), (5, 8)])
def test_ridge_primal_and_dual_agree(n, d):
    x, y = embeddings(n, d), embeddings(n, 2, seed=1)
    forms = ("primal", "dual", "auto")
    primal, dual, auto = (np.asarray(ridge(x, y, 0.3, form=form)) for form in forms)
    np.testing.assert_allclose(primal, dual, atol=1e-12)
    np.testing.assert_array_equal(auto, primal if d <= n else dual)
    # The gradient of ||xW - y||^2 + penalty ||W||^2 vanishes.
    np.testing.assert_allclose(x.T @ (x @ primal - y) + 0.3 * primal, np.zeros((d, 2)), atol=1e-12)
    with jax.enable_x64(False):
        singles = (ridge(np.float32(x), np.float32(y), 0.3, form=form) for form in forms[:2])
        np.testing.assert_allclose(*singles, atol=1e-5)


def test_ridge_on_orthonormal_inputs():
    x, _ = np.linalg.qr(embeddings(8, 5))
    y = embeddings(8, 2, seed=1)
    np.testing.assert_allclose(ridge(x, y, 0.7), x.T @ y / 1.7, atol=1e-13)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_ridge_gradients_equal_finite_differences(form):
    x, y = embeddings(4, 3), embeddings(4, 2, seed=1)
    jax.test_util.check_grads(
        jax.jit(functools.partial(ridge_solve, form=form)), (x, y, 0.4), 1, ["rev"]
    )


def test_an_unknown_form_of_ridge_is_refused():
    with pytest.raises(UsageError, match="unknown form 'x': choose one of auto, primal, dual"):
        ridge_solve(embeddings(), embeddings(), 1.0, form="x")


def test_primitives_map_over_tasks():
    z, y = (np.stack([embeddings(seed=s) for s in seeds]) for seeds in ((0, 1), (2, 3)))

    @jax.jit
    def both_ways(z, y):
        primitives = (prototypes, squared_distance, ridge_solve_one, attention_on_itself)
        return [(jax.vmap(p)(z, y), [p(z[i], y[i]) for i in range(2)]) for p in primitives]

    for together, apart in both_ways(z, y):
        np.testing.assert_allclose(together, np.stack(apart), atol=1e-12)


def ridge_solve_one(x, y):
    return ridge_solve(x, y, 1.0)


def attention_on_itself(z, y):
    return attention(z, z, y)


MASK = np.array([True] * 8 + [False] * 3)


def with_rubbish(a):
    return np.concatenate([a, 1e30 * embeddings(3, a.shape[1], seed=7)])


PADDED = {
    "prototypes": lambda z, y, mask: prototypes(z, y, mask),
    "kernel_logits": lambda z, y, mask: kernel_logits(-squared_distance(z[:4], z), y, mask),
    "kernel_regression": lambda z, y, mask: kernel_regression(z[:4] @ z.T, y, mask),
    "attention": lambda z, y, mask: attention(z[:4], z, y, mask=mask),
    "ridge_primal": lambda z, y, mask: ridge_solve(z, y, 0.3, form="primal", mask=mask),
    "ridge_dual": lambda z, y, mask: ridge_solve(z, y, 0.3, form="dual", mask=mask),
}


@pytest.mark.parametrize("name", PADDED)
def test_rubbish_in_padding_changes_no_value_and_no_gradient(name):
    bare = embeddings(), np.eye(3)[LABELS]

    def loss(z, y, mask, target):
        return ((PADDED[name](z, y, mask) - 2 * target) ** 2).sum()

    @jax.jit
    def with_and_without(padded, bare):
        target, of = PADDED[name](*bare, None), jax.value_and_grad(loss)
        return of(*padded, MASK, target), of(*bare, None, target)

    both = with_and_without(tuple(map(with_rubbish, bare)), bare)
    (value, gradient), (expected, of_z) = jax.tree.map(np.asarray, both)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient[:8], of_z, atol=1e-9)
    np.testing.assert_array_equal(gradient[8:], 0)


@pytest.mark.parametrize("name", PADDED)
def test_all_padding_is_finite(name):
    found = jax.jit(PADDED[name])(embeddings(), np.eye(3)[LABELS], np.zeros(8, bool))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_and_is_finite(dtype):
    z, y = embeddings().astype(dtype), np.eye(4)[LABELS].astype(dtype)  # the last class: none

    @jax.jit
    def all_of_them(z, y):
        scores, mask = -squared_distance(z, z), np.arange(8) < 5
        return {
            "prototypes": prototypes(z, y),
            "cosine": cosine_similarity(z.at[0].set(0), z),
            "kernel_logits": kernel_logits(scores, y),
            "kernel_regression": kernel_regression(scores, y, mask),
            "attention": attention(z, z, y, mask=mask),
        }

    for name, value in all_of_them(z, y).items():
        assert value.dtype == dtype, name
        assert np.isfinite(np.float32(value)).all(), name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("form", ["primal", "dual"])
def test_ridge_is_solved_in_single_precision_where_inputs_have_half(dtype, form):
    x, y = embeddings().astype(dtype), embeddings(8, 2, seed=1).astype(dtype)
    found = ridge(x, y, np.asarray(0.25, dtype), form=form)
    assert found.dtype == dtype
    exact = ridge(*(np.asarray(a, np.float64) for a in (x, y)), 0.25, form=form)
    # As near as rounding the answer allows.
    np.testing.assert_allclose(
        np.float64(found), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-3
    )


Z, Y = np.ones((4, 3)), np.eye(4)


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda: prototypes(Z[0], Y), r"z must be vectors \[n, D\], not \[3\]"),
        (lambda: prototypes(np.ones((4, 2, 2, 3)), Y), r"z must be vectors .* \[4, 2, 2, 3\]"),
        (lambda: prototypes(Z, np.arange(4)), r"y must be one-hot .* int64\[4\]"),
        (lambda: prototypes(Z, Y.astype(int)), "one-hot"),
        (lambda: prototypes(Z, Y[:3]), "y has 3 rows and z 4"),
        (lambda: prototypes(Z, Y, np.ones(3, bool)), r"mask must be \[4\].* not \[3\]"),
        (lambda: prototypes(Z, Y, np.ones((4, 1), bool)), r"mask must be \[4\]"),
        (lambda: squared_distance(Z[0], Z), r"a must be vectors"),
        (lambda: manhattan_distance(Z, Z[0]), r"b must be vectors"),
        (lambda: cosine_similarity(Z, Z[:, :2]), "rows of a have 3 entries and those of b 2"),
        (lambda: kernel_logits(Z, Y), "log_kernel has 3 columns and y 4 rows"),
        (lambda: kernel_logits(Z.T, np.arange(4)), "one-hot"),
        (lambda: kernel_regression(Z.T, Y[:, 0]), "y must be one-hot labels"),
        (lambda: kernel_regression(Z.T, Y, np.ones(3, bool)), r"mask must be \[4\]"),
        (lambda: attention(Z, Z, Y[0]), "value must be vectors"),
        (lambda: attention(Z, Z[:, :2], Y), r"query \[4, 3\], key \[4, 2\]"),
        (lambda: ridge_solve(Z[0], Y, 1.0), "x must be vectors"),
        (lambda: ridge_solve(Z, Y[:2], 1.0), "y has 2 rows and z 4"),
    ],
)
def test_what_does_not_fit_is_named(call, culprit):
    with pytest.raises(ValueError, match=culprit):
        call()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, bool])
def test_integers_count_as_the_numbers_they_are(dtype):
    a, b = np.array([[1, 1, 0]], dtype), np.array([[2, 0, 0], [200, 200, 100]]).astype(dtype)
    y = np.eye(2)
    calls = [
        squared_distance,
        manhattan_distance,
        cosine_similarity,
        lambda a, b: kernel_regression(a[:, :2], y),
        lambda a, b: kernel_logits(a[:, :2], y),
        lambda a, b: attention(a, b, b),
        lambda a, b: attention(b, b, y),
        lambda a, b: ridge_solve(b, y, 0.5),
        lambda a, b: prototypes(b, y),
    ]
    every_call = jax.jit(lambda a, b: [call(a, b) for call in calls])
    expected = every_call(a.astype(float), b.astype(float))
    for found, of_floats in zip(every_call(a, b), expected, strict=True):
        assert jnp.issubdtype(found.dtype, jnp.floating)
        np.testing.assert_allclose(found, of_floats, rtol=1e-9)


@pytest.mark.parametrize("value", [0, -1.0, np.float32(0), float("nan")])
def test_what_must_be_positive_is_checked_where_it_is_known(value):
    x = embeddings()
    with pytest.raises(UsageError, match=r"penalty .* use a positive one"):
        ridge_solve(x, x, value)
    with pytest.raises(UsageError, match=r"temperature .* use a positive one"):
        attention(x, x, x, temperature=value)


def test_scalars_are_scalars():
    x = embeddings()
    with pytest.raises(ValueError, match=r"penalty must be a scalar, not \[5\]"):
        ridge_solve(x, x, np.ones(5))
    with pytest.raises(ValueError, match=r"temperature must be a scalar, not \[1\]"):
        attention(x, x, x, temperature=np.ones(1))
    learned = jax.jit(lambda penalty: ridge_solve(x, x, penalty))(0.5)
    np.testing.assert_allclose(learned, jax.jit(lambda: ridge_solve(x, x, 0.5))(), atol=1e-9)
