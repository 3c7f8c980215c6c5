"""A frozen network embeds as it did when it was trained."""

import jax
import numpy as np
import pytest
from small_networks import normalised

from meta_jax.lookup import UsageError
from meta_jax.networks.frozen import frozen

X = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 1), np.uint8)


def test_embeddings_are_the_networks_whatever_the_chunk():
    network = normalised("running")
    x = np.float32(X) / 255
    params, state = network.init(jax.random.key(0), x)
    state = jax.tree.map(lambda leaf: leaf + 0.3, state)
    expected, _ = network.apply(params, state, x, key=None, train=False)
    for chunk in (3, 7, 100):
        found = frozen(network, params, state, chunk=chunk)(X)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("mode", ["batch", "support", "one_at_a_time", "tasknorm"])
def test_a_mode_that_looks_at_other_inputs_is_refused(mode):
    with pytest.raises(UsageError, match="cannot be frozen"):
        frozen(normalised(mode), {})
