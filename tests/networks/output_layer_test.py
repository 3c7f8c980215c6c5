import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.networks.conv4 import strided_conv4
from meta_jax.networks.mlp import mlp
from meta_jax.networks.output_layer import with_output_layer


def test_the_output_is_linear_in_what_the_network_gives():
    body = mlp((4,))
    network = with_output_layer(body, 3)
    x = jax.random.normal(jax.random.key(0), (5, 2))
    params, state = network.init(jax.random.key(1), x)
    head = {"kernel": jnp.arange(12.0).reshape(4, 3), "bias": jnp.array([1.0, 2.0, 3.0])}
    y, _ = network.apply({**params, "head": head}, state, x, key=None, train=False)
    z, _ = body.apply(params["network"], state, x, key=None, train=False)
    np.testing.assert_allclose(y, z @ head["kernel"] + head["bias"], rtol=1e-6)
    assert params["head"]["kernel"].shape == (4, 3)


def test_moments_mask_and_mode_reach_the_network():
    body = strided_conv4(2, normalisation="running")
    network = with_output_layer(body, 3)
    assert network.normalisation == "running"
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    with jax.debug_key_reuse(True):
        params, state = jax.jit(network.init)(jax.random.key(1), x)
    settings = {"key": None, "train": True, "moments": "update", "mask": jnp.arange(4) < 3}
    _, new_state = jax.jit(lambda p: network.apply(p, state, x, **settings))(params)
    _, expected = jax.jit(lambda p: body.apply(p, state, x, **settings))(params["network"])
    jax.tree.map(np.testing.assert_array_equal, new_state, expected)


def test_no_outputs_are_refused():
    with pytest.raises(ValueError, match="outputs of at least 1, not 0"):
        with_output_layer(mlp((4,)), 0)
