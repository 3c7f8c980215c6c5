"""Convolutions that stay fast when every task has its own kernel.

Nothing else in the library knows how a convolution is computed. Four facts shape this file:

- A convolution, its input's gradient and its kernel's gradient are three bilinear maps, and each
  one's derivatives are the other two. Written so, every order of reverse differentiation runs
  through the three forms that libraries have fast code for; JAX's own second derivatives are
  convolutions of a kind that a CPU walks through one number at a time.
- Under `vmap` over tasks with per-task kernels, a convolution becomes a grouped one, an order of
  magnitude slower on a CPU. There, tasks go through one by one; elsewhere as patches and one
  batched matrix product.
- With one to four input channels, patches are small, and patches times a matrix are faster.
- On a CPU, wide 3x3 convolutions of stride 1 need half the products by `winograd`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from meta_jax.backend import on_cpu
from meta_jax.core import Array
from meta_jax.networks import winograd
from meta_jax.networks.chunks import chunks_within, in_chunks, is_known

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_SMALL_PATCH = 36  # numbers; 3x3 windows of up to four channels
_PATCHES_BYTES = 2 << 20  # patches of one chunk of images, where a kernel's gradient needs them

# A bilinear map: (images, kernel), (gradient, kernel) or (images, gradient) -> an array.
Bilinear = Callable[[Array, Array], Array]


def patches(x: Array, window: int, stride: int, padding: str) -> Array:
    """Unfolds images into the patches that a convolution sees.

    Args:
      x: Images [n, height, width, channels].
      window: Side of the square window, in pixels.
      stride: Step between windows, in pixels.
      padding: 'SAME' or 'VALID', as in `jax.lax`.

    Returns:
      Patches [n, out_height, out_width, window * window * channels], row by row in the order of a
      kernel [window, window, channels, features] reshaped to [-1, features].
    """
    size = x.shape[1:3]
    pads = lax.padtype_to_pads(size, (window, window), (stride, stride), padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, cols = ((s - window) // stride + 1 for s in x.shape[1:3])
    return jnp.concatenate(
        [
            x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (cols - 1) + 1 : stride]
            for i in range(window)
            for j in range(window)
        ],
        axis=-1,
    )


def convolve(x: Array, kernel: Array, *, stride: int = 1, padding: str = "SAME") -> Array:
    """Two-dimensional convolution (cross-correlation).

    Args:
      x: Images [n, height, width, channels].
      kernel: [window, window, channels, features].
      stride: Step between windows, in pixels.
      padding: 'SAME', or 'VALID' for none.

    Returns:
      [n, ceil(height / stride), ceil(width / stride), features] with 'SAME'; with 'VALID' the
      height and width are first less by window - 1. Reverse-mode differentiable to any order.
    """
    chex.assert_rank([x, kernel], 4)
    if x.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"images of {x.shape[3]} channels do not fit a kernel for {kernel.shape[2]}"
        )
    if small_patches(kernel):
        return patches_times(patches(x, kernel.shape[0], stride, padding), kernel)
    geometry = _Geometry((x.shape[1], x.shape[2]), kernel.shape[0], stride, padding)
    return _bilinear_maps(geometry)[0](x, kernel)


def small_patches(kernel: Array) -> bool:
    """Whether patches times a matrix are the faster form, by the kernel's window and channels."""
    return math.prod(kernel.shape[:3]) <= _SMALL_PATCH


def patches_times(unfolded: Array, kernel: Array) -> Array:
    """What `convolve` gives, from its `patches`."""
    flat = _product(unfolded.reshape(-1, unfolded.shape[-1]), kernel.reshape(-1, kernel.shape[-1]))
    return flat.reshape(*unfolded.shape[:-1], -1)


# ---- Matrix products, differentiated by means of each other.


@jax.custom_vjp
def _product(a: Array, b: Array) -> Array:
    """a b; a is [n, k], b is [k, m]."""
    return a @ b


@jax.custom_vjp
def _gram(a: Array, b: Array) -> Array:
    """a' b; a is [n, k], b is [n, m]."""
    if a.shape[1] <= b.shape[1]:
        return lax.dot_general(a, b, (((0,), (0,)), ((), ())))
    # The narrow operand first is twice as fast on a CPU. Without the barrier, the compiler would
    # merge the transposition into the product and turn the operands round again.
    return lax.optimization_barrier(lax.dot_general(b, a, (((0,), (0,)), ((), ())))).T


_product.defvjp(
    lambda a, b: (_product(a, b), (a, b)), lambda ab, d: (_product(d, ab[1].T), _gram(ab[0], d))
)
_gram.defvjp(
    lambda a, b: (_gram(a, b), (a, b)), lambda ab, d: (_product(ab[1], d.T), _product(ab[0], d))
)


# ---- The three maps: y = f(x, k), dx = t(dy, k), dk = w(x, dy).


class _Geometry(NamedTuple):
    """A convolution's images and windows, without their numbers."""

    size: tuple[int, int]  # height and width of the images
    window: int
    stride: int
    padding: str

    @property
    def pads(self) -> list[tuple[int, int]]:
        """Pixels added before and after, for height and width."""
        window, stride = (self.window, self.window), (self.stride, self.stride)
        return list(lax.padtype_to_pads(self.size, window, stride, self.padding))

    @property
    def outputs(self) -> tuple[int, int]:
        """Height and width of the output."""
        rows, columns = (
            (s + sum(p) - self.window) // self.stride + 1
            for s, p in zip(self.size, self.pads, strict=True)
        )
        return rows, columns


def _bilinear_maps(geometry: _Geometry) -> tuple[Bilinear, Bilinear, Bilinear]:
    """f, t and w for images of one size, each differentiated by means of the others."""
    unfolded = partial(_unfolded, geometry)
    f_apply, t_apply, w_apply = _forms(geometry)
    f = _differentiable(
        _over_tasks(f_apply, unfolded, shared=True), lambda x, k, dy: (t(dy, k), w(x, dy))
    )
    t = _differentiable(
        _over_tasks(t_apply, partial(_transposed, geometry, unfolded), shared=True),
        lambda dy, k, dx: (f(dx, k), w(dx, dy)),
    )
    w = _differentiable(
        _over_tasks(w_apply, partial(_weight_by_patches, geometry), shared=False),
        lambda x, dy, dk: (t(dy, dk), f(x, dk)),
    )
    return f, t, w


def _forms(geometry: _Geometry) -> tuple[Bilinear, Bilinear, Bilinear]:
    """How f, t and w of one task are computed."""
    native, unfolded = partial(_native, geometry), partial(_unfolded, geometry)
    if not on_cpu():
        return native, partial(_transposed, geometry, native), partial(_weight, geometry)
    w = partial(_weight_by_chunks, geometry)
    transposed = partial(_transposed, geometry, unfolded)
    if min(geometry.size) < geometry.window:  # nothing but borders is not a fast convolution
        return unfolded, transposed, w
    turned = partial(_turned, geometry)
    return partial(_fastest, geometry), turned if geometry.stride == 1 else transposed, w


def _native(geometry: _Geometry, x: Array, kernel: Array) -> Array:
    """f, as the backend's own convolution."""
    strides = (geometry.stride, geometry.stride)
    return lax.conv_general_dilated(
        x, kernel, strides, geometry.pads, dimension_numbers=_DIMENSIONS
    )


def _unfolded(geometry: _Geometry, x: Array, kernel: Array) -> Array:
    """f, as patches and a matrix product."""
    unfolded = patches(x, geometry.window, geometry.stride, geometry.padding)
    return unfolded @ kernel.reshape(-1, kernel.shape[-1])


def _fastest(geometry: _Geometry, x: Array, kernel: Array) -> Array:
    """f on a CPU."""
    if _by_tiles(geometry, x, kernel.shape[3], geometry.outputs):
        return winograd.convolve(x, kernel, geometry.pads)
    # The patches of few images are still at hand when the kernel's gradient needs them.
    few = is_known(x.shape[0]) and _patch_chunks(geometry, x) == 1
    return (_unfolded if few else _native)(geometry, x, kernel)


def _transposed(geometry: _Geometry, forward: Bilinear, dy: Array, kernel: Array) -> Array:
    """t, as the transposition of a form of f."""
    x = jax.ShapeDtypeStruct((dy.shape[0], *geometry.size, kernel.shape[2]), dy.dtype)
    return jax.linear_transpose(lambda x: forward(x, kernel), x)(dy)[0]


def _turned(geometry: _Geometry, dy: Array, kernel: Array) -> Array:
    """t as a convolution, for stride 1."""
    last, kernel = geometry.window - 1, kernel[::-1, ::-1].swapaxes(2, 3)
    pads = [(last - low, last - high) for low, high in geometry.pads]
    if _by_tiles(geometry, dy, kernel.shape[3], geometry.size):
        return winograd.convolve(dy, kernel, pads)
    return lax.conv_general_dilated(dy, kernel, (1, 1), pads, dimension_numbers=_DIMENSIONS)


def _by_tiles(geometry: _Geometry, x: Array, features: int, outputs: tuple[int, int]) -> bool:
    """Whether a convolution is of the kind that Winograd's tiles are for, and faster by them."""
    fits = geometry.window == 3 and geometry.stride == 1
    return fits and winograd.is_faster(x, features, outputs)


def _weight(geometry: _Geometry, x: Array, dy: Array) -> Array:
    """w, as the transposition of the backend's own convolution."""
    shape = (geometry.window, geometry.window, x.shape[-1], dy.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda kernel: _native(geometry, x, kernel), kernel)(dy)[0]


def _weight_by_patches(geometry: _Geometry, x: Array, dy: Array) -> Array:
    """w, as a product of patches and gradients."""
    unfolded = patches(x, geometry.window, geometry.stride, geometry.padding)
    dk = _gram(unfolded.reshape(-1, unfolded.shape[-1]), dy.reshape(-1, dy.shape[-1]))
    return dk.reshape(geometry.window, geometry.window, -1, dy.shape[-1])


def _weight_by_chunks(geometry: _Geometry, x: Array, dy: Array) -> Array:
    """w for some images at a time, whose patches or tiles fit the cache."""
    if _by_tiles(geometry, x, dy.shape[3], geometry.outputs):
        return winograd.kernel_gradient(x, dy, geometry.pads)
    chunks = _patch_chunks(geometry, x)
    if chunks == 1:
        return _weight_by_patches(geometry, x, dy)

    def body(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _weight_by_patches(geometry, *pair), None

    shape = (geometry.window, geometry.window, x.shape[-1], dy.shape[-1])
    # In bfloat16 a sum would lose what a late chunk adds.
    zeros = jnp.zeros(shape, jnp.promote_types(x.dtype, jnp.float32))
    total, _ = lax.scan(body, zeros, (in_chunks(x, chunks), in_chunks(dy, chunks)))
    return total.astype(x.dtype)


def _patch_chunks(geometry: _Geometry, x: Array) -> int:
    """How many chunks of images have patches that the cache holds."""
    image = math.prod(geometry.outputs) * geometry.window**2 * x.shape[-1] * x.dtype.itemsize
    return chunks_within(x.shape[0], image, _PATCHES_BYTES)


def _differentiable(apply: Bilinear, gradients: Callable[..., tuple[Array, Array]]) -> Bilinear:
    """A bilinear map with its gradients: (a, b, gradient of the output) -> those of a and b."""
    function = jax.custom_vjp(apply)
    function.defvjp(lambda a, b: (function(a, b), (a, b)), lambda saved, dy: gradients(*saved, dy))
    return function


def _over_tasks(native: Bilinear, unfolding: Bilinear, *, shared: bool) -> Bilinear:
    """`native` with a rule for `vmap`.

    Args:
      native: A form for one task.
      unfolding: The same by patches and a matrix product.
      shared: Whether the second argument is a kernel, which tasks may share.
    """
    function = custom_vmap(native)

    @function.def_vmap
    def rule(tasks: int, batched: list[bool], a: Array, b: Array) -> tuple[Array, bool]:
        if shared and not batched[1]:  # more images for the same kernel
            y = function(a.reshape(-1, *a.shape[2:]), b)
            return y.reshape(tasks, -1, *y.shape[1:]), True
        if not on_cpu():
            return jax.vmap(unfolding, [0 if each else None for each in batched])(a, b), True
        a, b = (
            array if each else jnp.broadcast_to(array, (tasks, *array.shape))
            for array, each in zip((a, b), batched, strict=True)
        )
        return lax.map(lambda pair: function(*pair), (a, b)), True

    return function


# ---- Behind a convolution.


def max_pool(x: Array) -> Array:
    """2x2 max-pooling with stride 2, odd borders dropped; one of tied maxima gets the gradient.

    Args:
      x: [n, height, width, channels].

    Returns:
      [n, height // 2, width // 2, channels].
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    rows = _larger(x[:, :, 0], x[:, :, 1])
    return _larger(rows[:, :, :, 0], rows[:, :, :, 1])


def _larger(a: Array, b: Array) -> Array:
    # The gradient of `max` goes where x equals the maximum. In a compiled program x may be computed
    # twice, with different rounding, and then it equals nothing: the gradient would be lost.
    return jnp.where((a < b) | jnp.isnan(b), b, a)
