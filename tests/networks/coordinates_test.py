import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.backend import use_backend
from meta_jax.networks.coordinates import (
    join_coordinates,
    linear_across,
    lstm_across,
    map_chunks,
    split_coordinates,
)
from meta_jax.networks.layers import init_linear, linear
from meta_jax.networks.lstm import init_lstm, lstm


@pytest.mark.parametrize(("backend", "chunks"), [("cpu", 3), ("gpu", 1)])
def test_chunks_give_what_all_coordinates_at_once_give(backend, chunks):
    params = init_linear(jax.random.key(0), 2, 3)
    x = jax.random.normal(jax.random.key(1), (2, 1100))
    with use_backend(backend):
        split = split_coordinates(x)
    assert split.shape[0] == chunks
    y = join_coordinates(map_chunks(lambda chunk: linear_across(params, chunk), split), 1100)
    np.testing.assert_allclose(y, linear(params, x.T).T, rtol=1e-5, atol=1e-6)


def test_layers_across_are_layers_on_columns():
    params = init_lstm(jax.random.key(0), 2, 3)
    x, h, c = (jnp.arange(4.0 * n).reshape(n, 4) / 10 for n in (2, 3, 3))
    across = lstm_across(params, x, h, c)
    plain = lstm(params, x.T, h.T, c.T)
    for a, b in zip(across, plain, strict=True):
        np.testing.assert_allclose(a, b.T, rtol=1e-5)
