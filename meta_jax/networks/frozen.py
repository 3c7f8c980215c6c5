"""A pretrained network in front of any head: inputs are embedded once, not in every episode."""

from collections.abc import Callable

import jax
import numpy as np

from meta_jax.core import Array, Network, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.normalisation import keeps_support_moments, query_moments
from meta_jax.shapes import take_rows


def frozen(
    network: Network, params: PyTree, state: PyTree | None = None, *, chunk: int = 256
) -> Callable[[PyTree], np.ndarray]:
    """Builds a function that embeds inputs with a network that is not trained any more.

    With `meta_jax.data.embedded` a dataset's examples are replaced by their embeddings, which any
    learner then takes as its inputs.

    Args:
      network: Network; its normalisation uses stored moments in tests, or each example's own.
      params: The network's trained parameters.
      state: The network's moments; {} if None.
      chunk: Number of inputs embedded at a time.

    Returns:
      A function from inputs, leaves [n, ...] (bytes become [0, 1]), to float embeddings [n, ...].

    Raises:
      UsageError: an embedding would depend on the other inputs.

    Examples:
      >>> from meta_jax.networks.mlp import mlp
      >>> network, x = mlp((8,)), np.ones((3, 5), np.float32)
      >>> params, state = network.init(jax.random.key(0), x)
      >>> frozen(network, params, state)(x).shape
      (3, 8)
    """
    mode = network.normalisation
    if query_moments(mode, train=False) != "stored" or keeps_support_moments(mode):
        raise UsageError(
            f"a network of normalisation '{mode}' embeds an input by others of its task, so it "
            "cannot be frozen: use running, layer, instance or none"
        )

    @jax.jit
    def embed(params: PyTree, state: PyTree, x: PyTree) -> Array:
        x = jax.tree.map(lambda leaf: leaf / 255.0 if leaf.dtype == np.uint8 else leaf, x)
        return network.apply(params, state, x, key=None, train=False, moments="stored")[0]

    def embed_all(x: PyTree) -> np.ndarray:
        n = len(jax.tree.leaves(x)[0])
        size = min(chunk, n)
        found = []
        for start in range(0, n, size):
            # The last ones are embedded with some before them: one program serves all.
            begin = min(start, n - size)
            part = take_rows(x, slice(begin, begin + size))
            found.append(np.asarray(embed(params, state or {}, part))[start - begin :])
        return np.concatenate(found)

    return embed_all
