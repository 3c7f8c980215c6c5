import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meta_jax.backend import use_backend
from meta_jax.networks import convolution, fused_block
from meta_jax.networks.convolution import max_pool
from meta_jax.networks.fused_block import convolve_pool_moments, first_moments, prepared_chunks

pytestmark = pytest.mark.usefixtures("x64")


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


def test_pooling_and_moments_without_padding(monkeypatch):
    x, kernel = inputs(n=7)
    sign = jnp.array([1.0, -1.0, 1.0, 1.0])
    y = np.asarray(reference(x, kernel, 1, "VALID"))
    expected = jax.jit(lambda y: sign * max_pool(sign * y))(y)
    for chunks in (1, 3):
        monkeypatch.setattr(fused_block, "_chunks", lambda *_, chunks=chunks: chunks)
        convolve = functools.partial(convolve_pool_moments, stride=1, pool=True, padding="VALID")
        pooled, moments = jax.jit(convolve)(x, kernel, sign)
        np.testing.assert_allclose(pooled, expected, atol=1e-12)
        np.testing.assert_allclose(moments.mean, y.mean((0, 1, 2)), atol=1e-12)
        np.testing.assert_allclose(moments.var, y.var((0, 1, 2)), atol=1e-11)


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
    monkeypatch.setattr(fused_block, "_chunks", lambda *_: 3)
    assert_close(moments_and_gradients(*arguments), whole, atol=1e-7)
    y = reference(x, kernel, stride)
    np.testing.assert_allclose(whole[0][1].mean, y.mean((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(whole[0][1].var, y.var((0, 1, 2)), atol=1e-11)


def test_moments_do_not_cancel_in_single_precision():
    with jax.enable_x64(False):
        x = np.float32(1000 + np.random.default_rng(0).normal(size=(8, 6, 6, 1)))
        kernel = np.zeros((3, 3, 1, 1), np.float32)
        kernel[1, 1] = 1
        convolve = jax.jit(functools.partial(convolve_pool_moments, stride=1, pool=False))
        _, moments = convolve(x, kernel, np.ones(1, np.float32))
    np.testing.assert_allclose(moments.var, np.asarray(x, np.float64).var((0, 1, 2)), rtol=1e-4)


def test_chunks_are_as_many_as_the_cache_asks_for(monkeypatch):
    x, kernel = inputs(n=7)
    output_bytes = 7 * 6 * 6 * 4 * 8
    for wanted in (1, 3, 7):
        monkeypatch.setattr(fused_block, "_CHUNK_BYTES", -(-output_bytes // wanted))
        with use_backend("cpu"):
            assert fused_block._chunks(x, kernel, 1) == wanted
        with use_backend("gpu"):
            assert fused_block._chunks(x, kernel, 1) == 1


def test_only_a_cpu_prepares_a_first_block(monkeypatch):
    monkeypatch.setattr(fused_block, "_PREPARED_BYTES", 1)
    x, kernel = inputs(n=7)
    for backend, chunks in (("cpu", 7), ("gpu", 1)):
        with use_backend(backend):
            assert prepared_chunks(x, kernel, stride=1, pool=True) == chunks


@pytest.mark.parametrize("form", ["patches", "bilinear maps"])
def test_moments_in_bfloat16_stay_positive(monkeypatch, form):
    monkeypatch.setattr(convolution, "_SMALL_PATCH", 999 if form == "patches" else 0)
    # A kernel that takes differences, on images that hardly have any.
    x = 200 + jax.random.normal(jax.random.key(0), (6, 8, 8, 1)).astype(jnp.bfloat16)
    kernel = jnp.zeros((3, 3, 1, 1), jnp.bfloat16).at[1, :2, 0, 0].set(jnp.array([1, -1]))
    y, moments = convolve_pool_moments(
        x, kernel, jnp.ones(1, x.dtype), stride=1, pool=False, padding="VALID"
    )
    assert y.dtype == jnp.bfloat16
    assert moments.mean.dtype == moments.var.dtype == jnp.float32
    expected = reference(x.astype(float), kernel.astype(float), 1, "VALID")
    np.testing.assert_allclose(moments.var.astype(float), expected.var((0, 1, 2)), rtol=0.05)
    again = first_moments(x, kernel, stride=1, padding="VALID")
    assert again.var.dtype == jnp.float32
    np.testing.assert_allclose(again.var.astype(float), expected.var((0, 1, 2)), rtol=0.05)
