import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meta_jax.lookup import UsageError
from meta_jax.networks.nnx import from_nnx
from meta_jax.networks.normalisation import is_normalisation
from tests.networks.padding_checks import check_padding_alone

X = jax.random.normal(jax.random.key(1), (6, 3))


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(4, momentum=0.9, rngs=rngs)])

    def __call__(self, x):
        return self.norms[0](self.dense(x))


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 50, rngs=rngs)
        self.dropouts = nnx.List([nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])

    def __call__(self, x):
        x = self.dense(x)
        return self.dropouts[0](x) + 100 * self.dropouts[1](x)


class Switched(nnx.Module):
    """Dropout and batch norm that are told of training in the call, by other values."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, training, rngs=None):
        x = self.norm(x, use_running_average=not training)
        return self.dropout(x, deterministic=not training, rngs=rngs)


def jitted(network, **settings):
    return jax.jit(lambda p, s, x, key=None: network.apply(p, s, x, key=key, **settings))


def hidden_of(params):
    return X @ params["weights"]["dense"]["kernel"] + params["weights"]["dense"]["bias"]


def test_parameters_and_state_are_plain_trees():
    network = from_nnx(Normed)
    assert network.normalisation == "running"
    params, state = network.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, params) == {
        "weights": {"dense": {"kernel": (3, 4), "bias": (4,)}},
        "normalisation": {"norms": {"0": {"scale": (4,), "bias": (4,)}}},
    }
    assert jax.tree.map(jnp.shape, state) == {"norms": {"0": {"mean": (4,), "var": (4,)}}}
    found = jax.tree_util.tree_map_with_path(lambda path, _: is_normalisation(path), params)
    assert all(jax.tree.leaves(found["normalisation"]))
    assert not any(jax.tree.leaves(found["weights"]))
    module = Normed(nnx.Rngs(jax.random.key(0)))
    np.testing.assert_array_equal(params["weights"]["dense"]["kernel"], module.dense.kernel[...])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("moments", ["stored", "batch", "update", "replace"])
def test_moments_are_used_as_asked(moments, train):
    network = from_nnx(Normed)
    params, state = network.init(jax.random.key(0), X)
    state = jax.tree.map(lambda leaf: leaf + 0.5, state)
    hidden = hidden_of(params)
    z, new_state = jitted(network, train=train, moments=moments)(params, state, X)
    old, kept = (s["norms"]["0"] for s in (state, new_state))
    batch = {"mean": hidden.mean(0), "var": hidden.var(0)}
    used = old if moments == "stored" else batch
    np.testing.assert_allclose(z, (hidden - used["mean"]) / jnp.sqrt(used["var"] + 1e-5), atol=1e-5)
    share = {"stored": 0, "batch": 0, "update": 0.1, "replace": 1}[moments]
    for name in ("mean", "var"):
        expected = (1 - share) * old[name] + share * batch[name]
        np.testing.assert_allclose(kept[name], expected, atol=1e-6)


def test_padding_enters_no_moment():
    network = from_nnx(Normed)
    params, state = network.init(jax.random.key(0), X)
    apply = jax.jit(
        lambda x, mask: network.apply(
            params, state, x, key=None, train=True, moments="update", mask=mask
        )
    )
    z, new_state = apply(X, None)
    padded = jnp.concatenate([X, jnp.full((2, 3), 1e4)])
    z_padded, new_padded = apply(padded, jnp.arange(8) < 6)
    np.testing.assert_allclose(z_padded[:6], z, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new_padded, new_state)


@pytest.mark.parametrize("moments", ["batch", "update", "replace"])
def test_padding_alone_leaves_the_moments(moments):
    check_padding_alone(from_nnx(Normed), X, moments)


def test_gradients_flow_through_moments_that_are_kept():
    network = from_nnx(Normed, normalisation="support")
    params, state = network.init(jax.random.key(0), X)

    def loss(params):
        _, kept = network.apply(params, state, X, key=None, train=True, moments="replace")
        z, _ = network.apply(params, kept, X[:2], key=None, train=True, moments="stored")
        return (z**2).sum()

    def expected(params):
        hidden = hidden_of(params)
        z = (hidden[:2] - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
        return (z**2).sum()

    found, wanted = jax.jit(lambda p: [jax.grad(f)(p)["weights"] for f in (loss, expected)])(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)


def test_dropout_draws_from_the_key_while_training_only():
    network = from_nnx(Dropped)
    assert network.normalisation == "none"
    params, state = network.init(jax.random.key(0), X)
    assert state == {}
    train, test = jitted(network, train=True), jitted(network, train=False)
    a, again, b = (train(params, state, X, jax.random.key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()
    # Two layers draw apart: a quarter of the units passes neither.
    assert 0.15 < (a == 0).mean() < 0.35
    hidden = hidden_of(params)
    np.testing.assert_allclose(test(params, state, X)[0], 101 * hidden, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Dropped draws random numbers while training: give"):
        network.apply(params, state, X, key=None, train=True)


def test_a_switch_in_the_call_is_overruled_by_what_is_asked():
    network = from_nnx(Switched)
    params, state = network.init(jax.random.key(0), X)
    z, _ = jitted(network, train=False, moments="batch")(params, state, X)
    np.testing.assert_allclose(z.mean(0), np.zeros(3), atol=1e-6)
    assert (z != 0).all()
    z, _ = jitted(network, train=True)(params, state, X, jax.random.key(1))
    assert (z == 0).any()
    kept = z[z != 0]
    np.testing.assert_allclose(kept, 2 * X[z != 0] / np.sqrt(1 + 1e-5), rtol=1e-5)


def test_what_cannot_be_is_refused():
    class Unknown(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x, augmenting=False):
            return self.dense(x) + augmenting

    with pytest.raises(ValueError, match="the NNX module Unknown takes 'augmenting'"):
        from_nnx(Unknown)
    network = from_nnx(Unknown, switches={"augmenting": True})
    params, state = network.init(jax.random.key(0), X)
    z, _ = network.apply(params, state, X, key=None, train=True)
    z_test, _ = network.apply(params, state, X, key=None, train=False)
    np.testing.assert_allclose(z - z_test, np.ones((6, 2)), rtol=1e-5)
    with pytest.raises(ValueError, match="Dropped has no batch norm"):
        from_nnx(Dropped, normalisation="support")
    with pytest.raises(ValueError, match="unknown normalisation 'layer'"):
        from_nnx(Normed, normalisation="layer")


def test_inputs_may_be_pytrees():
    class OfTwo(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.dense(x["a"]) * x["b"]

    network = from_nnx(OfTwo)
    x = {"a": X, "b": jnp.arange(6.0)[:, None]}
    params, state = network.init(jax.random.key(0), x)
    z, _ = network.apply(params, state, x, key=None, train=True)
    np.testing.assert_allclose(z, (X @ params["weights"]["dense"]["kernel"]) * x["b"], rtol=1e-5)


def test_vmap_types_and_keys():
    network = from_nnx(Normed)
    with jax.debug_key_reuse(True):
        params, state = network.init(jax.random.key(0), X)
        network.apply(params, state, X, key=jax.random.key(1), train=True, moments="update")
    tasks = np.stack([X, 2 * np.asarray(X) + 1])
    apply = jitted(network, train=True, moments="replace")
    z, _ = jax.vmap(lambda x: apply(params, state, x))(tasks)
    np.testing.assert_allclose(z[1], apply(params, state, tasks[1])[0], atol=1e-5)
    low = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), (params, state, X))
    for leaf in jax.tree.leaves(apply(*low)):
        assert leaf.dtype == jnp.bfloat16


def test_what_builds_no_nnx_module_is_refused():
    with pytest.raises(UsageError, match=r"not a Normed: give lambda rngs: Normed\("):
        from_nnx(Normed(nnx.Rngs(0)))
    for linen in (nn.Dense(3), nn.Dense):
        with pytest.raises(UsageError, match="Dense is a flax Linen module: wrap it with from_lin"):
            from_nnx(linen)
    with pytest.raises(UsageError, match="returns an NNX module, not a Dense"):
        from_nnx(lambda rngs: nn.Dense(3))
    with pytest.raises(UsageError, match="needs a function that builds the module, not a int"):
        from_nnx(7)
