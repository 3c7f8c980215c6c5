import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.networks.flatten import flatten


def test_it_keeps_every_value():
    x = jnp.arange(24.0).reshape(2, 2, 3, 2)
    network = flatten()
    assert network.init(jax.random.key(0), x) == ({}, {})
    z, state = network.apply({}, {}, x, key=None, train=True)
    np.testing.assert_array_equal(z, np.arange(24.0).reshape(2, 12))
    assert state == {}
