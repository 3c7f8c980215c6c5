"""Devices that share the images of one batch: moments are those of all of them."""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from meta_jax.core import Array, Normalisation, PyTree
from meta_jax.networks.chunks import is_known
from meta_jax.networks.normalisation import BATCH_MODES


class Embed(Protocol):
    """A network whose images may lie on several devices."""

    def __call__(
        self, params: PyTree, state: PyTree, x: Array, *, mask: Array | None, axis: str | None
    ) -> tuple[Array, PyTree]:
        """Features [n, ...] and the new state; moments are those over the devices of `axis`."""
        ...


def embed_on(
    mesh: Mesh | None,
    normalisation: Normalisation,
    embed: Embed,
    params: PyTree,
    state: PyTree,
    x: Array,
    mask: Array | None,
) -> tuple[Array, PyTree]:
    """Embeds images on the devices of a mesh, a part on each.

    Where their number is no multiple of the devices', the last devices get blank images too, which
    are masked. Every device embeds all images where their number is a symbol, and in the mode
    tasknorm, whose moments are not pooled over devices.

    Args:
      mesh: Devices along one axis; None: embeds as usual.
      normalisation: Mode of the network's normalisation.
      embed: The network; `axis` is the name of the devices' axis, None where images are not shared.
      params, state: The network's, the same on all devices.
      x: Images [n, height, width, channels].
      mask: bool [n], False for padding.
    """
    if mesh is None or not _is_shared(normalisation, x):
        return embed(params, state, x, mask=mask, axis=None)
    n, (axis,) = x.shape[0], mesh.axis_names
    filling = -n % mesh.size
    if filling:
        mask = jnp.pad(jnp.ones(n, bool) if mask is None else mask, (0, filling))
        x = jnp.pad(x, ((0, filling), *[(0, 0)] * (x.ndim - 1)))
    everywhere, each = PartitionSpec(), PartitionSpec(axis)

    def part(params: PyTree, state: PyTree, x: Array, mask: Array | None) -> tuple[Array, PyTree]:
        return embed(params, state, x, mask=mask, axis=axis)

    z, state = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(everywhere, everywhere, each, each),
        out_specs=(each, everywhere),
        check_vma=False,
    )(params, state, x, mask)
    return z[:n], state


def _is_shared(normalisation: Normalisation, x: Array) -> bool:
    """Whether the images can be counted out, and their moments be pooled."""
    return is_known(x.shape[0]) and normalisation in (*BATCH_MODES, "none", "layer", "instance")
