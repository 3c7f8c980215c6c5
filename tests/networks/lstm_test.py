import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.networks.lstm import init_lstm, lstm


def test_one_step_by_hand():
    # Gates i, f, u, o = (0, ln 3, ln 2, ln 4) after the bias, from x = 1 and h = 2.
    params = {
        "kernel": jnp.array([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, -1.0, 0.5]]),
        "bias": jnp.log(jnp.array([1.0, 3.0, 2.0, 4.0])) - jnp.array([1.0, 2.0, 0.0, 1.0]),
    }
    h, c = lstm(params, jnp.array([1.0]), jnp.array([2.0]), jnp.array([4.0]))
    np.testing.assert_allclose(c, [0.75 * 4 + 0.5 * 0.6], rtol=1e-6)
    np.testing.assert_allclose(h, [0.8 * np.tanh(3.3)], rtol=1e-6)


def test_it_maps_over_leading_axes():
    params = init_lstm(jax.random.key(0), 3, 2, recurrent=5)
    keys = jax.random.split(jax.random.key(1), 3)
    x, h, c = (jax.random.normal(k, (4, n)) for k, n in zip(keys, (3, 5, 2), strict=True))
    together = lstm(params, x, h, c)
    alone = jax.vmap(lambda x, h, c: lstm(params, x, h, c))(x, h, c)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), together, alone)


def test_the_first_parameters_leave_the_forget_gate_open():
    params = init_lstm(jax.random.key(0), 3, 2)
    assert params["kernel"].shape == (5, 8)
    np.testing.assert_array_equal(params["bias"], [0, 0, 1, 1, 0, 0, 0, 0])
