import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.networks.functions import from_functions

X = jnp.arange(6.0).reshape(2, 3)


def init(key, x):
    return {"w": jax.random.normal(key, (x.shape[1], 4))}


def test_a_pure_pair_is_a_network():
    network = from_functions(init, lambda params, x: x @ params["w"])
    assert network.normalisation == "none"
    params, state = network.init(jax.random.key(0), X)
    settings = {"key": None, "train": True, "moments": "batch", "mask": jnp.ones(2, bool)}
    y, same = network.apply(params, state, X, **settings)
    np.testing.assert_array_equal(y, X @ params["w"])
    assert state == same == {}


def test_it_gets_what_it_has_parameters_for():
    def apply(params, x, *, key, deterministic, mask, moments):
        return {"key": key, "test": deterministic, "mask": mask, "moments": moments}

    network = from_functions(init, apply, normalisation="support")
    assert network.normalisation == "support"
    mask = jnp.array([True, False])
    y, _ = network.apply({}, {}, X, key=3, train=True, moments="replace", mask=mask)
    assert y == {"key": 3, "test": False, "mask": mask, "moments": "replace"}


def test_state_goes_in_and_comes_out():
    network = from_functions(
        lambda key, x: ({}, {"calls": jnp.zeros((), int)}),
        lambda params, state, x, train: (x, {"calls": state["calls"] + train}),
        has_state=True,
    )
    params, state = network.init(jax.random.key(0), X)
    _, state = network.apply(params, state, X, key=None, train=True)
    _, state = network.apply(params, state, X, key=None, train=False)
    assert state["calls"] == 1


def test_what_would_be_silent_is_refused():
    with pytest.raises(ValueError, match="<lambda> takes 'augmenting', and whether"):
        from_functions(init, lambda params, x, augmenting: x)
    with pytest.raises(ValueError, match="takes no 'moments', which normalisation='batch' asks"):
        from_functions(init, lambda params, x: x, normalisation="batch")
    # Settings that are no switch keep their values.
    from_functions(init, lambda params, x, scale=2.0: scale * x)
