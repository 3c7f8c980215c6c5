import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.reinforcement.memories import recurrent

XS = jax.random.normal(jax.random.key(1), (6, 3))
MASK = jnp.array([True, True, False, True, True, True])


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_trial_read_at_once_is_its_steps_one_by_one(x64, cell):
    network = recurrent(4, cell)
    params = jax.jit(lambda key: network.init(key, 3))(jax.random.key(0))
    step = jax.jit(network.step)
    memory, expected = network.start(params), []
    for x, real in zip(XS, MASK, strict=True):
        after, features = step(params, memory, x)
        expected.append(features)
        memory = after if real else memory
    found = jax.jit(network.read)(params, XS, MASK)
    np.testing.assert_allclose(found, jnp.stack(expected), atol=1e-12)
    assert found.shape == (6, network.features)


def test_the_gru_is_that_of_flax(x64):
    network = recurrent(4)
    params = jax.jit(lambda key: network.init(key, 3))(jax.random.key(0))
    params["input"]["bias"] = jax.random.normal(jax.random.key(2), (12,))
    params["recurrent"]["bias"] = jax.random.normal(jax.random.key(3), (4,))
    gates = {}
    for i, name in enumerate("rzn"):
        columns = slice(4 * i, 4 * i + 4)
        gates[f"i{name}"] = {
            "kernel": params["input"]["kernel"][:, columns],
            "bias": params["input"]["bias"][columns],
        }
        gates[f"h{name}"] = {"kernel": params["recurrent"]["kernel"][:, columns]}
    gates["hn"]["bias"] = params["recurrent"]["bias"]
    h = jax.random.normal(jax.random.key(4), (4,))
    expected, _ = nn.GRUCell(4).apply({"params": gates}, h, XS[0])
    found, features = network.step(params, h, XS[0])
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_array_equal(features, found)
