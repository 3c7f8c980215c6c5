"""3x3 convolutions of stride 1 with fewer multiplications (Lavin & Gray 2016, arXiv:1509.09308).

A tile of m x m outputs y, seen through a kernel k, depends on m + 2 by m + 2 inputs x:

    y = A' [(G k G') * (B' x B)] A    (* elementwise)

Summed over channels, the elementwise products of all tiles are (m + 2)^2 matrix products, in place
of 9 m^2 for a plain convolution: 16 in place of 36 at m = 2, 36 in place of 144 at m = 4. The
kernel's gradient is G' [sum over tiles (B' x B) * (A dy A')] G, with as many products. The sums
before and after them are cheap while they stay in a core's cache, so images go through in chunks.

At m = 2 rounding errors are those of a plain convolution. At m = 4 they are about five times as
large, a few parts in a million of float32: enough for a kernel's gradient, which is a sum anyway.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from meta_jax.core import Array
from meta_jax.networks.chunks import chunks_within, in_chunks, is_known

_TILES_BYTES = 3 << 19  # transformed tiles of one chunk of images
_LEAST_CHANNELS = 64  # of inputs and of outputs; with fewer, the sums cost more than is saved
_LEAST_SIDE = 8  # pixels of the output

Pads = Sequence[tuple[int, int]]  # pixels added before and after, for height and width
_Matrix = tuple[tuple[float, ...], ...]


class _Tile(NamedTuple):
    """The matrices of a tile of `size` x `size` outputs."""

    size: int
    inputs: _Matrix  # B' [size + 2, size + 2]
    kernel: _Matrix  # G [size + 2, 3]
    outputs: _Matrix  # A' [size, size + 2]


_TWO = _Tile(
    2,
    ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    ((1, 1, 1, 0), (0, 1, -1, -1)),
)
_FOUR = _Tile(
    4,
    (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)


def is_faster(x: Array, features: int, sides: tuple[int, int]) -> bool:
    """Whether a CPU convolves faster by tiles, by measurement.

    Args:
      x: Images [n, height, width, channels].
      features: Channels of the output.
      sides: Height and width of the output.
    """
    exact = x.dtype in (jnp.float32, jnp.float64)  # the sums would cost bfloat16 its few digits
    wide = min(x.shape[3], features) >= _LEAST_CHANNELS
    return exact and wide and min(sides) >= _LEAST_SIDE and is_known(x.shape[0])


def convolve(x: Array, kernel: Array, pads: Pads) -> Array:
    """Two-dimensional convolution (cross-correlation) of stride 1.

    Args:
      x: Images [n, height, width, channels].
      kernel: [3, 3, channels, features].
      pads: Zeros around the images.

    Returns:
      [n, height + pads - 2, width + pads - 2, features].
    """
    height, width = (s + sum(pad) - 2 for s, pad in zip(x.shape[1:3], pads, strict=True))
    grid = _grid(_TWO, height, width)
    rows = _combined(_TWO.kernel, kernel)
    factors = jnp.stack([jnp.stack(_combined(_TWO.kernel, row)) for row in rows])

    def chunk(x: Array) -> Array:
        products = jnp.einsum("abtc,abcf->abtf", _input_tiles(_TWO, x, grid, pads), factors)
        products = products.reshape(4, 4, -1, *grid, kernel.shape[3])
        pairs = [_combined(_TWO.outputs, row) for row in _combined(_TWO.outputs, products)]
        y = jnp.stack([jnp.stack(pair, 3) for pair in pairs], 2)
        return y.reshape(-1, 2 * grid[0], 2 * grid[1], kernel.shape[3])

    chunks = _chunks(_TWO, x, grid)
    if chunks == 1:
        return chunk(x)[:, :height, :width]
    y = lax.map(chunk, in_chunks(x, chunks))
    return y.reshape(-1, *y.shape[2:])[: x.shape[0], :height, :width]


def kernel_gradient(x: Array, dy: Array, pads: Pads) -> Array:
    """The gradient of `convolve` with respect to its kernel.

    Args:
      x: Images [n, height, width, channels].
      dy: Gradient of the output [n, height + pads - 2, width + pads - 2, features].
      pads: As in `convolve`.

    Returns:
      [3, 3, channels, features].
    """
    grid = _grid(_FOUR, *dy.shape[1:3])

    def chunk(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        tiles = _input_tiles(_FOUR, pair[0], grid, pads)
        return total + jnp.einsum(
            "abtc,abtf->abcf", tiles, _gradient_tiles(_FOUR, pair[1], grid)
        ), None

    chunks, side = _chunks(_FOUR, x, grid), _FOUR.size + 2
    zeros = jnp.zeros((side, side, x.shape[3], dy.shape[3]), x.dtype)
    total, _ = lax.scan(chunk, zeros, (in_chunks(x, chunks), in_chunks(dy, chunks)))
    turned = tuple(zip(*_FOUR.kernel, strict=True))
    return jnp.stack([jnp.stack(_combined(turned, row)) for row in _combined(turned, total)])


def _grid(tile: _Tile, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the tiles of an output."""
    return math.ceil(height / tile.size), math.ceil(width / tile.size)


def _chunks(tile: _Tile, x: Array, grid: tuple[int, int]) -> int:
    """In how many chunks of images their transformed tiles fit the cache."""
    image = math.prod(grid) * (tile.size + 2) ** 2 * x.shape[3] * x.dtype.itemsize
    return chunks_within(x.shape[0], image, _TILES_BYTES)


def _input_tiles(tile: _Tile, x: Array, grid: tuple[int, int], pads: Pads) -> Array:
    """B' x B of all tiles, [size + 2, size + 2, tiles, channels]."""
    (rows, columns), ((top, _), (left, _)) = grid, pads
    bottom = tile.size * rows + 2 - x.shape[1] - top
    right = tile.size * columns + 2 - x.shape[2] - left
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    return _both_sides(tile.inputs, x, tile.size, grid)


def _gradient_tiles(tile: _Tile, dy: Array, grid: tuple[int, int]) -> Array:
    """A dy A' of all tiles, [size + 2, size + 2, tiles, features]."""
    bottom, right = (
        tile.size * count - side for count, side in zip(grid, dy.shape[1:3], strict=True)
    )
    dy = jnp.pad(dy, ((0, 0), (0, bottom), (0, right), (0, 0)))
    return _both_sides(tuple(zip(*tile.outputs, strict=True)), dy, tile.size, grid)


def _both_sides(matrix: _Matrix, x: Array, step: int, grid: tuple[int, int]) -> Array:
    """A matrix on the left and, turned, on the right of all squares of images, `step` apart.

    Args:
      matrix: [n, side of a square].
      x: Images [images, height, width, channels].
      step: Pixels from a square to the next.
      grid: Rows and columns of squares.

    Returns:
      [n, n, images * rows * columns, channels].
    """
    (rows, columns), side = grid, range(len(matrix[0]))
    tall = _combined(matrix, [_every(x, 1, i, step, rows) for i in side])
    squares = [
        jnp.stack(_combined(matrix, [_every(part, 2, j, step, columns) for j in side]))
        for part in tall
    ]
    return jnp.stack(squares).reshape(len(matrix), len(matrix), -1, x.shape[3])


def _every(x: Array, axis: int, start: int, step: int, count: int) -> Array:
    """`count` entries along an axis, `step` apart."""
    return lax.slice_in_dim(x, start, start + step * (count - 1) + 1, step, axis)


def _combined(matrix: _Matrix, parts: Sequence[Array] | Array) -> list[Array]:
    """A matrix times a vector of arrays; products with zero are left out."""
    parts = list(parts)
    return [functools.reduce(operator.add, _scaled(row, parts)) for row in matrix]


def _scaled(row: tuple[float, ...], parts: list[Array]) -> list[Array]:
    """Arrays times their factors, but those of factor zero."""
    pairs = [(factor, part) for factor, part in zip(row, parts, strict=True) if factor]
    return [part if factor == 1 else factor * part for factor, part in pairs]
