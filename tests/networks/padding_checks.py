"""What networks of either flax API promise of batches that are padding alone."""

import jax
import numpy as np
import pytest


def check_padding_alone(network, x, moments):
    """Padding alone leaves the moments as they are; some real rows change them."""
    n = x.shape[0]
    params, state = jax.jit(network.init)(jax.random.key(0), x)
    state = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.5, state)
    apply = jax.jit(
        lambda mask: network.apply(
            params, state, x, key=None, train=True, moments=moments, mask=mask
        )
    )
    z, kept = apply(np.zeros(n, bool))
    assert np.isfinite(z).all()
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    _, changed = apply(np.arange(n) < 2)
    leaves = (map(np.asarray, jax.tree.leaves(tree)) for tree in (changed, state))
    same = [(a == b).all() for a, b in zip(*leaves, strict=True)]
    assert all(same) if moments == "batch" else not any(same)
    with pytest.raises(ValueError, match=rf"mask must be bool \[{n}\]"):
        apply(np.ones(n))
    with pytest.raises(ValueError, match="unknown moments 'udpate'"):
        network.apply(params, state, x, key=None, train=True, moments="udpate")
