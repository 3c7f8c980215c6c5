import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meta_jax.networks import convolution
from meta_jax.networks.convolution import convolve, convolve_pool_moments, max_pool, patches

pytestmark = pytest.mark.usefixtures("x64")

CASES = [(stride, size) for stride in (1, 2) for size in ((6, 6), (7, 5))]


@pytest.fixture(params=["bilinear maps", "patches"])
def form(monkeypatch, request):
    """Both ways of computing a convolution, whatever the number of channels."""
    monkeypatch.setattr(convolution, "_SMALL_PATCH", 0 if request.param == "bilinear maps" else 999)


def reference(x, kernel, stride, padding="SAME"):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def inputs(size=(6, 6), n=3, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return jax.random.normal(keys[0], (n, *size, 2)), jax.random.normal(keys[1], (3, 3, 2, 4))


def assert_close(actual, expected, atol=1e-11):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), actual, expected)
    # A comparison of zeros would prove nothing.
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-3


def derivatives(f, stride):
    """Value, gradient, and the gradient of a function of the gradient, by input and kernel."""

    def scalar(x, kernel):
        return jnp.sin(f(x, kernel, stride)).sum()

    def of_gradient(x, kernel):
        return sum((jnp.cos(g) * g).sum() for g in jax.grad(scalar, (0, 1))(x, kernel))

    @jax.jit
    def all_of_them(x, kernel):
        arguments = (x, kernel)
        return (
            f(x, kernel, stride),
            jax.grad(scalar, (0, 1))(*arguments),
            jax.grad(of_gradient, (0, 1))(*arguments),
        )

    return all_of_them


def ours(x, kernel, stride):
    return convolve(x, kernel, stride=stride)


@pytest.mark.parametrize(("stride", "size"), CASES)
@pytest.mark.usefixtures("form")
def test_convolve_and_two_derivatives_equal_lax(stride, size):
    arguments = inputs(size)
    assert_close(derivatives(ours, stride)(*arguments), derivatives(reference, stride)(*arguments))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.usefixtures("form")
def test_convolve_with_a_kernel_for_each_task(stride):
    tasks = [inputs((5, 5), n=2, seed=seed) for seed in range(3)]
    batched = jax.vmap(derivatives(ours, stride))(*(jnp.stack(a) for a in zip(*tasks, strict=True)))
    expected = [derivatives(reference, stride)(*task) for task in tasks]
    assert_close(batched, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected))


@pytest.mark.usefixtures("form")
def test_convolve_with_one_kernel_for_all_tasks():
    x, kernel = inputs((5, 5), n=6)
    f = jax.vmap(derivatives(ours, 1), (0, None))
    expected = jax.vmap(derivatives(reference, 1), (0, None))
    x = x.reshape(3, 2, *x.shape[1:])
    assert_close(f(x, kernel), expected(x, kernel))


@pytest.mark.parametrize("stride", [1, 2])
def test_kernel_gradients_of_many_images(monkeypatch, stride):
    monkeypatch.setattr(convolution, "_SMALL_PATCH", 0)
    arguments = inputs((4, 4), n=70)  # more than go through at a time
    assert_close(derivatives(ours, stride)(*arguments), derivatives(reference, stride)(*arguments))


@pytest.mark.usefixtures("form")
def test_convolve_with_a_window_of_five():
    x, _ = inputs((7, 6))
    kernel = jax.random.normal(jax.random.key(9), (5, 5, 2, 3))
    for stride in (1, 2):
        assert_close(convolve(x, kernel, stride=stride), reference(x, kernel, stride))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("window", [3, 4])
@pytest.mark.usefixtures("form")
def test_convolve_without_padding_and_two_derivatives_equal_lax(stride, window):
    x, _ = inputs((7, 6))
    kernel = jax.random.normal(jax.random.key(9), (window, window, 2, 3))

    def unpadded(x, kernel, stride):
        return convolve(x, kernel, stride=stride, padding="VALID")

    def plain(x, kernel, stride):
        return reference(x, kernel, stride, "VALID")

    assert_close(derivatives(unpadded, stride)(x, kernel), derivatives(plain, stride)(x, kernel))


def test_pooling_and_moments_without_padding(monkeypatch):
    x, kernel = inputs(n=7)
    sign = jnp.array([1.0, -1.0, 1.0, 1.0])
    y = reference(x, kernel, 1, "VALID")
    for chunks in (1, 3):
        monkeypatch.setattr(convolution, "_chunks", lambda *_, chunks=chunks: chunks)
        pooled, moments = convolve_pool_moments(
            x, kernel, sign, stride=1, pool=True, padding="VALID"
        )
        np.testing.assert_allclose(pooled, sign * max_pool(sign * y), atol=1e-12)
        np.testing.assert_allclose(moments.mean, y.mean((0, 1, 2)), atol=1e-12)
        np.testing.assert_allclose(moments.var, y.var((0, 1, 2)), atol=1e-11)


def test_patches_without_padding():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    unfolded = patches(x, 2, 2, "VALID")
    np.testing.assert_array_equal(
        unfolded[0].reshape(4, 4), [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    )


@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_max_pool_equals_reduce_window_without_ties(size):
    x, _ = inputs(size)
    weight = jax.random.normal(jax.random.key(5), (3, size[0] // 2, size[1] // 2, 2))

    def window(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    assert_close(max_pool(x), window(x), atol=0)
    gradients = [jax.grad(lambda x, f=f: (f(x) * weight).sum())(x) for f in (max_pool, window)]
    assert_close(*gradients, atol=0)


def test_max_pool_sends_one_gradient_to_each_window_of_ties():
    x = (jax.random.uniform(jax.random.key(0), (5, 8, 8, 3)) < 0.5).astype(float)
    weight = jax.random.normal(jax.random.key(1), (5, 4, 4, 3))
    gradient = jax.grad(lambda x: (max_pool(x) * weight).sum())(x)
    assert_close(gradient.reshape(5, 4, 2, 4, 2, 3).sum((2, 4)), weight, atol=1e-14)
    # Nothing goes to what is not a maximum.
    highest = max_pool(x).repeat(2, 1).repeat(2, 2)
    assert not (gradient * (x < highest)).any()
    windows = x.reshape(5, 4, 2, 4, 2, 3)
    assert ((windows == windows.max((2, 4), keepdims=True)).sum((2, 4)) > 1).mean() > 0.5


def moments_and_gradients(x, kernel, sign, stride, pool):
    def f(x, kernel):
        return convolve_pool_moments(x, kernel, sign, stride=stride, pool=pool)

    def scalar(x, kernel):
        y, moments = f(x, kernel)
        weight = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        return (weight * y).sum() + jnp.sin(moments.mean).sum() + (moments.var**2).sum()

    def of_gradient(x, kernel):
        return sum((g**3).sum() for g in jax.grad(scalar, (0, 1))(x, kernel))

    return jax.jit(
        lambda *a: (f(*a), jax.grad(scalar, (0, 1))(*a), jax.grad(of_gradient, (0, 1))(*a))
    )(x, kernel)


@pytest.mark.parametrize("n", [6, 7])  # 7 images in 3 chunks need two of filling
@pytest.mark.parametrize(("stride", "pool"), [(1, True), (2, False)])
def test_chunks_of_images_equal_one_chunk(monkeypatch, n, stride, pool):
    x, kernel = inputs(n=n)
    x = x + 3.0  # filling of zeros would shift these moments
    sign = jnp.array([1.0, -1.0, 1.0, -1.0])
    arguments = x, kernel, sign, stride, pool
    whole = moments_and_gradients(*arguments)
    monkeypatch.setattr(convolution, "_chunks", lambda *_: 3)
    assert_close(moments_and_gradients(*arguments), whole, atol=1e-7)
    y = reference(x, kernel, stride)
    np.testing.assert_allclose(whole[0][1].mean, y.mean((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(whole[0][1].var, y.var((0, 1, 2)), atol=1e-11)


def test_moments_do_not_cancel_in_single_precision():
    with jax.enable_x64(False):
        x = 1000 + jax.random.normal(jax.random.key(0), (8, 6, 6, 1))
        kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
        _, moments = convolve_pool_moments(x, kernel, jnp.ones(1), stride=1, pool=False)
    np.testing.assert_allclose(moments.var, np.asarray(x, np.float64).var((0, 1, 2)), rtol=1e-4)


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="an accelerator takes all images at once"
)
def test_chunks_are_as_many_as_the_cache_asks_for(monkeypatch):
    x, kernel = inputs(n=7)
    output_bytes = 7 * 6 * 6 * 4 * 8
    for wanted in (1, 3, 7):
        monkeypatch.setattr(convolution, "_CHUNK_BYTES", -(-output_bytes // wanted))
        assert convolution._chunks(x, kernel, 1) == wanted
