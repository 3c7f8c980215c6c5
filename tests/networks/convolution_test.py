import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meta_jax.backend import on_cpu, use_backend
from meta_jax.networks import convolution, winograd
from meta_jax.networks.chunks import chunks_within
from meta_jax.networks.convolution import convolve, max_pool, patches
from tests.random_trees import normal

pytestmark = pytest.mark.usefixtures("x64")

CASES = [(stride, size) for stride in (1, 2) for size in ((6, 6), (7, 5))]


@pytest.fixture(params=["bilinear maps", "bilinear maps of an accelerator", "patches", "tiles"])
def form(monkeypatch, request):
    """Each way of computing a convolution, whatever the number of channels and the device."""
    small = 999 if request.param == "patches" else 0
    monkeypatch.setattr(convolution, "_SMALL_PATCH", small)
    if request.param == "tiles":
        monkeypatch.setattr(winograd, "_LEAST_CHANNELS", 1)
        monkeypatch.setattr(winograd, "_LEAST_SIDE", 1)
        monkeypatch.setattr(winograd, "_TILES_BYTES", 10_000)  # two chunks of three images
    with use_backend("gpu" if "accelerator" in request.param else "cpu"):
        yield


def reference(x, kernel, stride, padding="SAME"):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def inputs(size=(6, 6), n=3, seed=0):
    return draw(n, *size, 2, seed=2 * seed), draw(3, 3, 2, 4, seed=2 * seed + 1)


def draw(*shape, seed):
    return np.asarray(normal(*shape, seed=seed))


def assert_close(actual, expected, atol=1e-11):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), actual, expected)
    # A comparison of zeros would prove nothing.
    assert max(abs(np.asarray(leaf)).max() for leaf in jax.tree.leaves(expected)) > 1e-3


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
    stacked = (np.stack(leaves) for leaves in zip(*tasks, strict=True))
    batched = jax.jit(jax.vmap(derivatives(ours, stride)))(*stacked)
    one_task = derivatives(reference, stride)
    expected = [one_task(*task) for task in tasks]
    assert_close(batched, jax.tree.map(lambda *leaves: np.stack(leaves), *expected))


@pytest.mark.usefixtures("form")
def test_convolve_with_one_kernel_for_all_tasks():
    x, kernel = inputs((5, 5), n=6)
    f = jax.jit(jax.vmap(derivatives(ours, 1), (0, None)))
    expected = jax.jit(jax.vmap(derivatives(reference, 1), (0, None)))
    x = x.reshape(3, 2, *x.shape[1:])
    assert_close(f(x, kernel), expected(x, kernel))


@pytest.mark.parametrize("stride", [1, 2])
def test_kernel_gradients_of_many_images(monkeypatch, stride):
    monkeypatch.setattr(convolution, "_SMALL_PATCH", 0)
    monkeypatch.setattr(convolution, "_PATCHES_BYTES", 20_000)
    arguments = inputs((4, 4), n=70)  # more than go through at a time
    assert_close(derivatives(ours, stride)(*arguments), derivatives(reference, stride)(*arguments))


@pytest.mark.usefixtures("form")
def test_convolve_with_a_window_of_five():
    x, _ = inputs((7, 6))
    kernel = draw(5, 5, 2, 3, seed=9)

    @jax.jit
    def both(x, kernel):
        return [(ours(x, kernel, s), reference(x, kernel, s)) for s in (1, 2)]

    for found, expected in both(x, kernel):
        assert_close(found, expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("window", [3, 4])
@pytest.mark.usefixtures("form")
def test_convolve_without_padding_and_two_derivatives_equal_lax(stride, window):
    x, _ = inputs((7, 6))
    kernel = draw(window, window, 2, 3, seed=9)

    def unpadded(x, kernel, stride):
        return convolve(x, kernel, stride=stride, padding="VALID")

    def plain(x, kernel, stride):
        return reference(x, kernel, stride, "VALID")

    assert_close(derivatives(unpadded, stride)(x, kernel), derivatives(plain, stride)(x, kernel))


def test_a_backend_is_chosen_for_a_while():
    with use_backend("tpu"):
        assert not on_cpu()
        with use_backend("cpu"):
            assert on_cpu()
        assert not on_cpu()
    assert on_cpu() == (jax.default_backend() == "cpu")


@pytest.mark.parametrize("tasks", [False, True])
def test_the_backends_are_computed_in_different_ways(monkeypatch, tasks):
    monkeypatch.setattr(convolution, "_SMALL_PATCH", 0)
    x, kernel = (np.stack([a, a]) for a in inputs()) if tasks else inputs()

    def program(backend):
        def gradient(x, kernel):
            return jax.grad(lambda kernel: convolve(x, kernel).sum())(kernel)

        with use_backend(backend):
            return str(jax.make_jaxpr(jax.vmap(gradient) if tasks else gradient)(x, kernel))

    assert program("cpu") != program("gpu")


def test_channels_that_do_not_fit_are_refused():
    x, kernel = inputs()
    with pytest.raises(ValueError, match="images of 1 channels do not fit a kernel for 2"):
        convolve(x[..., :1], kernel)
    with pytest.raises(AssertionError):
        convolve(x[0], kernel)


def test_a_symbolic_number_of_images_goes_through_whole():
    (n,) = jax.export.symbolic_shape("n")
    assert chunks_within(n, 100, 1) == 1
    assert chunks_within(7, 100, 1) == 7


def test_patches_without_padding():
    x = np.arange(16.0).reshape(1, 4, 4, 1)
    unfolded = np.asarray(jax.jit(patches, static_argnums=(1, 2, 3))(x, 2, 2, "VALID"))
    np.testing.assert_array_equal(
        unfolded[0].reshape(4, 4), [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    )


@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_max_pool_equals_reduce_window_without_ties(size):
    x, _ = inputs(size)
    weight = draw(3, size[0] // 2, size[1] // 2, 2, seed=5)

    def window(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def value_and_gradient(f, x):
        return f(x), jax.grad(lambda x: (f(x) * weight).sum())(x)

    found, expected = jax.jit(lambda x: [value_and_gradient(f, x) for f in (max_pool, window)])(x)
    assert_close(found[0], expected[0], atol=0)
    assert_close(found[1], expected[1], atol=0)


def test_max_pool_sends_one_gradient_to_each_window_of_ties():
    x = (np.random.default_rng(0).uniform(size=(5, 8, 8, 3)) < 0.5).astype(float)
    weight = draw(5, 4, 4, 3, seed=1)

    def weighted(x):
        highest = max_pool(x)
        return (highest * weight).sum(), highest

    gradient, highest = jax.tree.map(np.asarray, jax.jit(jax.grad(weighted, has_aux=True))(x))
    assert_close(gradient.reshape(5, 4, 2, 4, 2, 3).sum((2, 4)), weight, atol=1e-14)
    # Nothing goes to what is not a maximum.
    highest = highest.repeat(2, 1).repeat(2, 2)
    assert not (gradient * (x < highest)).any()
    windows = x.reshape(5, 4, 2, 4, 2, 3)
    assert ((windows == windows.max((2, 4), keepdims=True)).sum((2, 4)) > 1).mean() > 0.5


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_max_pool_hides_no_nan(place):
    x = np.ones((1, 2, 2, 1))
    x[0, *place, 0] = np.nan
    assert np.isnan(jax.jit(max_pool)(x)).all()
