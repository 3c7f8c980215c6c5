import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meta_jax.networks import winograd
from tests.random_trees import normal


def plain(x, kernel, pads):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("pads", [((1, 1), (1, 1)), ((0, 0), (0, 0)), ((2, 2), (0, 2))])
@pytest.mark.parametrize("chunks", [1, 3])
def test_convolution_and_kernel_gradient_equal_the_plain_ones(x64, monkeypatch, pads, chunks):
    monkeypatch.setattr(winograd, "_chunks", lambda *_: chunks)
    x, kernel = normal(7, 9, 6, 2, seed=0), normal(3, 3, 2, 4, seed=1)
    y, transposed = jax.vjp(lambda kernel: plain(x, kernel, pads), kernel)
    dy = normal(*y.shape, seed=2)
    np.testing.assert_allclose(winograd.convolve(x, kernel, pads), y, atol=1e-12)
    found = winograd.kernel_gradient(x, dy, pads)
    np.testing.assert_allclose(found, transposed(dy)[0], atol=1e-12)


def test_rounding_errors_in_single_precision():
    x, kernel = normal(4, 14, 14, 64, seed=0), normal(3, 3, 64, 64, seed=1)
    dy, pads = normal(4, 14, 14, 64, seed=2), ((1, 1), (1, 1))
    single = [jnp.float32(a) for a in (x, kernel, dy)]
    with jax.enable_x64(True):
        x, kernel, dy = (np.asarray(a, np.float64) for a in single)
        y, transposed = jax.vjp(lambda kernel: plain(x, kernel, pads), kernel)
        y, gradient = np.asarray(y), np.asarray(transposed(dy)[0])
    x, kernel, dy = single
    found = np.asarray(winograd.convolve(x, kernel, pads))
    assert found.dtype == np.float32
    assert abs(found - y).max() < 1e-6 * abs(y).max()
    found = np.asarray(winograd.kernel_gradient(x, dy, pads))
    assert abs(found - gradient).max() < 1e-5 * abs(gradient).max()


def test_tiles_are_for_wide_convolutions_of_large_images_in_full_precision():
    x = jax.ShapeDtypeStruct((5, 14, 14, 64), jnp.float32)
    assert winograd.is_faster(x, 64, (14, 14))
    assert not winograd.is_faster(x, 32, (14, 14))
    assert not winograd.is_faster(x, 64, (14, 7))
    assert not winograd.is_faster(x.update(shape=(5, 14, 14, 32)), 64, (14, 14))
    assert not winograd.is_faster(x.update(dtype=jnp.bfloat16), 64, (14, 14))
    (n,) = jax.export.symbolic_shape("n")
    assert not winograd.is_faster(x.update(shape=(n, 14, 14, 64)), 64, (14, 14))
