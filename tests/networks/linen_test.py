import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.networks.linen import from_linen

X = jax.random.normal(jax.random.key(1), (6, 3))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(50)(x))


def test_batch_norm_statistics_are_the_state():
    network = from_linen(Normed(), batch_norm="running")
    assert network.batch_norm == "running"
    params, state = network.init(jax.random.key(0), X)
    assert set(params) == {"Dense_0", "BatchNorm_0"}
    assert set(state) == {"batch_stats"}
    hidden = X @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]

    z, new_state = network.apply(params, state, X, key=None, train=True)
    np.testing.assert_allclose(z.mean(0), np.zeros(4), atol=1e-6)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    kept = new_state["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(kept["mean"], 0.1 * hidden.mean(0), atol=1e-6)
    np.testing.assert_allclose(kept["var"], 0.9 + 0.1 * hidden.var(0), atol=1e-6)

    z, same_state = network.apply(params, new_state, X, key=None, train=False)
    expected = (hidden - kept["mean"]) / jnp.sqrt(kept["var"] + 1e-5)
    np.testing.assert_allclose(z, expected, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same_state, new_state)


def test_dropout_draws_from_the_key_while_training_only():
    network = from_linen(Dropped())
    params, state = network.init(jax.random.key(0), X)
    assert state == {}

    def apply(seed, train):
        key = None if seed is None else jax.random.key(seed)
        z, new_state = network.apply(params, state, X, key=key, train=train)
        assert new_state == state
        return z

    np.testing.assert_array_equal(apply(1, True), apply(1, True))
    assert (apply(1, True) != apply(2, True)).any()
    assert 0.3 < (apply(1, True) == 0).mean() < 0.7
    np.testing.assert_array_equal(apply(1, False), apply(None, False))
    dense = X @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    np.testing.assert_allclose(apply(None, False), dense, atol=1e-5)


def test_a_module_without_flags_gets_none():
    network = from_linen(nn.Dense(2))
    params, state = network.init(jax.random.key(0), X)
    for train in (True, False):
        z, new_state = network.apply(params, state, X, key=None, train=train)
        np.testing.assert_allclose(z, X @ params["kernel"] + params["bias"], atol=1e-6)
        assert new_state == state == {}


@pytest.mark.parametrize("train", [True, False])
def test_it_works_under_vmap_and_jit(train):
    network = from_linen(Normed(), batch_norm="running")
    params, state = network.init(jax.random.key(0), X)
    tasks = jnp.stack([X, 2 * X + 1])
    batched, states = jax.jit(
        jax.vmap(lambda x: network.apply(params, state, x, key=None, train=train))
    )(tasks)
    assert jax.tree.structure(states) == jax.tree.structure(state)
    for i in (0, 1):
        one, _ = network.apply(params, state, tasks[i], key=None, train=train)
        np.testing.assert_allclose(batched[i], one, atol=1e-5)
