import jax
import jax.numpy as jnp
import numpy as np

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
