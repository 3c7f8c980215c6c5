import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax import registry
from meta_jax.networks.mlp import mlp


def test_two_layers_by_hand():
    network = mlp((2, 1))
    params = {
        "layer1": {"kernel": jnp.array([[1.0, -1.0], [2.0, 0.0]]), "bias": jnp.array([0.0, 0.5])},
        "layer2": {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.array([-1.0])},
    }
    x = jnp.array([[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    # Hidden units (3, 0), (0, 1.5), (0, 0.5).
    z, state = network.apply(params, {}, x, key=None, train=True)
    np.testing.assert_allclose(z, [[8.0], [5.0], [1.0]])
    assert state == {}


def test_inputs_are_flattened_and_the_sinusoid_network_has_its_size():
    params, state = mlp((40, 40)).init(jax.random.key(0), jnp.zeros((3, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 40 + 40 + 40 * 40 + 40
    assert state == {}
    network = mlp((5,))
    x = jax.random.normal(jax.random.key(1), (3, 2, 4, 1))
    params, state = network.init(jax.random.key(0), x)
    z, _ = network.apply(params, state, x, key=None, train=False)
    flat, _ = network.apply(params, state, x.reshape(3, 8), key=None, train=False)
    np.testing.assert_array_equal(z, flat)
    assert z.shape == (3, 5)


def test_the_nonlinearity_may_be_another():
    x, key = jnp.array([[1.0, -2.0]]), jax.random.key(0)
    for name, activation in ((jax.nn.sigmoid, jax.nn.sigmoid), ("tanh", jnp.tanh)):
        network = mlp((2,), activation=name)
        params, _ = network.init(key, x)
        z, _ = network.apply(params, {}, x, key=None, train=True)
        np.testing.assert_allclose(z, activation(x @ params["layer1"]["kernel"]), rtol=1e-6)


def test_no_layer_no_unit_and_no_activation_are_refused():
    with pytest.raises(ValueError, match="mlp without a layer"):
        mlp(())
    with pytest.raises(ValueError, match=r"widths=\(40, 0\) must be at least 1 each"):
        mlp((40, 0))
    with pytest.raises(ValueError, match="unknown activation 'selu': choose one of relu, tanh"):
        mlp(activation="selu")


def test_it_is_built_again_from_its_record():
    config = mlp((3, 2), activation="tanh").config
    assert config == {"name": "mlp", "widths": [3, 2], "activation": "tanh"}
    assert registry.build("network", config).config == config
