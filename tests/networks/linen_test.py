import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.linen import from_linen, mentions_batch_norm
from meta_jax.networks.normalisation import is_normalisation
from meta_jax.optimization_based.maml import maml
from tests.networks.padding_checks import check_padding_alone
from tests.random_trees import normal

X = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
MOMENTS = ("stored", "batch", "update", "replace")


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(50)(x))


class Training(nn.Module):
    """The switch of many models, with a value by default that means a test."""

    @nn.compact
    def __call__(self, x, training=False):
        x = nn.BatchNorm(use_running_average=not training)(nn.Dense(20)(x))
        return nn.Dropout(0.5)(x, deterministic=not training)


class Unswitched(nn.Module):
    """Dropout that is always on, and batch norm that was left in training."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(20)(x))
        return nn.Dropout(0.5, deterministic=False)(x)


class AllNorms(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(4)(x))
        x = nn.GroupNorm(2)(x)
        x = nn.RMSNorm()(x)
        return nn.Dense(2)(x)


def start(network, x=X):
    return jax.tree.map(np.asarray, jax.jit(network.init)(jax.random.key(0), x))


def jitted(network, **settings):
    """`apply` of NumPy arrays."""
    apply = jax.jit(lambda p, s, x, key=None: network.apply(p, s, x, key=key, **settings))
    return lambda *arguments: jax.tree.map(np.asarray, apply(*arguments))


def hidden_of(params, x=X):
    return x @ params["weights"]["Dense_0"]["kernel"] + params["weights"]["Dense_0"]["bias"]


def test_batch_norm_statistics_are_the_state():
    network = from_linen(Normed())
    assert network.normalisation == "running"
    params, state = start(network)
    assert set(params["weights"]) == {"Dense_0"}
    assert set(params["normalisation"]) == {"BatchNorm_0"}
    assert set(state) == {"batch_stats"}
    hidden = hidden_of(params)

    z, new_state = jitted(network, train=True, moments="update")(params, state, X)
    np.testing.assert_allclose(z.mean(0), np.zeros(4), atol=1e-6)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    kept = new_state["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(kept["mean"], 0.1 * hidden.mean(0), atol=1e-6)
    np.testing.assert_allclose(kept["var"], 0.9 + 0.1 * hidden.var(0), atol=1e-6)

    z, same_state = jitted(network, train=False)(params, new_state, X)
    expected = (hidden - kept["mean"]) / np.sqrt(kept["var"] + 1e-5)
    np.testing.assert_allclose(z, expected, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same_state, new_state)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("moments", MOMENTS)
def test_moments_are_used_as_asked_whatever_the_switch(moments, train):
    network = from_linen(Normed())
    params, state = start(network)
    state = jax.tree.map(lambda leaf: leaf + 0.5, state)
    hidden = hidden_of(params)
    z, new_state = jitted(network, train=train, moments=moments)(params, state, X)
    old, kept = (s["batch_stats"]["BatchNorm_0"] for s in (state, new_state))
    batch = {"mean": hidden.mean(0), "var": hidden.var(0)}
    used = old if moments == "stored" else batch
    np.testing.assert_allclose(z, (hidden - used["mean"]) / np.sqrt(used["var"] + 1e-5), atol=1e-5)
    share = {"stored": 0, "batch": 0, "update": 0.1, "replace": 1}[moments]
    for name in ("mean", "var"):
        expected = (1 - share) * old[name] + share * batch[name]
        np.testing.assert_allclose(kept[name], expected, atol=1e-6)


def test_a_switch_called_training_is_set():
    network = from_linen(Training())
    assert network.normalisation == "running"
    params, state = start(network)
    apply = jitted(network, train=True, moments="update")
    z, new_state = apply(params, state, X, jax.random.key(1))
    assert 0.3 < (z == 0).mean() < 0.7
    assert abs(new_state["batch_stats"]["BatchNorm_0"]["mean"]).max() > 0
    # Statistics of the batch, and no dropout: the two are separate.
    z, _ = jitted(network, train=False, moments="batch")(params, state, X)
    np.testing.assert_allclose(z.mean(0), np.zeros(20), atol=1e-6)
    assert (z != 0).all()


def test_a_module_without_a_switch_follows_too():
    network = from_linen(Unswitched())
    params, state = start(network)
    z, same = jitted(network, train=False, moments="stored")(params, state, X)
    np.testing.assert_allclose(z, hidden_of(params) / np.sqrt(1 + 1e-5), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    z, _ = jitted(network, train=True, moments="stored")(params, state, X, jax.random.key(1))
    assert 0.3 < (z == 0).mean() < 0.7


@pytest.mark.parametrize("moments", ["update", "replace"])
def test_padding_enters_no_moment(moments):
    network = from_linen(Normed())
    params, state = start(network)
    apply = jax.jit(
        lambda x, mask: network.apply(
            params, state, x, key=None, train=True, moments=moments, mask=mask
        )
    )
    z, new_state = apply(X, None)
    padded = np.concatenate([X, np.full((2, 3), 1e4, np.float32)])
    z_padded, new_padded = apply(padded, np.arange(8) < 6)
    np.testing.assert_allclose(np.asarray(z_padded)[:6], z, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new_padded, new_state)


@pytest.mark.parametrize("moments", ["batch", "update", "replace"])
def test_padding_alone_leaves_the_moments(moments):
    check_padding_alone(from_linen(Normed()), X, moments)


def test_padding_that_cannot_be_told_apart_is_refused():
    class Folded(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm()(x.reshape(-1, 1)).reshape(x.shape)

    network = from_linen(Folded())
    params, state = start(network)
    settings = {"train": True, "mask": np.ones(6, bool)}
    with pytest.raises(ValueError, match="sees 18 rows, and the batch has 6"):
        jitted(network, moments="batch", **settings)(params, state, X)
    jitted(network, moments="stored", **settings)(params, state, X)


def test_gradients_flow_through_moments_that_are_kept():
    """In the mode 'support' queries are normalised by what the support set left."""
    network = from_linen(Normed(), normalisation="support")
    params, state = start(network)

    def loss(params):
        _, kept = network.apply(params, state, X, key=None, train=True, moments="replace")
        z, _ = network.apply(params, kept, X[:2], key=None, train=True, moments="stored")
        return (z**2).sum()

    def expected(params):
        hidden = hidden_of(params)
        z = (hidden[:2] - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
        return (z**2).sum()

    gradients = jax.jit(lambda params: [jax.grad(f)(params)["weights"] for f in (loss, expected)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *gradients(params))


def test_parameters_of_normalisation_are_known():
    x = np.asarray(normal(6, 4, 4, seed=2))
    network = from_linen(AllNorms())
    assert network.normalisation == "none"
    params, state = start(network, x)
    assert state == {}
    found = jax.tree_util.tree_map_with_path(lambda path, _: is_normalisation(path), params)
    assert set(params["normalisation"]) == {"LayerNorm_0", "GroupNorm_0", "RMSNorm_0"}
    assert all(jax.tree.leaves(found["normalisation"]))
    assert not any(jax.tree.leaves(found["weights"]))
    assert set(params["weights"]) == {"Dense_0", "Dense_1"}
    z, _ = jitted(network, train=True)(params, state, x)
    plain = {"params": {**params["normalisation"], **params["weights"]}}
    np.testing.assert_allclose(z, jax.jit(AllNorms().apply)(plain, x), atol=1e-6)


def test_the_module_itself_may_be_a_normalisation():
    network = from_linen(nn.LayerNorm())
    params, state = start(network)
    assert set(params) == {"normalisation"}
    z, _ = jitted(network, train=True)(params, state, X)
    np.testing.assert_allclose(z.mean(1), np.zeros(6), atol=1e-5)


def test_dropout_draws_from_the_key_while_training_only():
    network = from_linen(Dropped())
    params, state = start(network)
    assert state == {}

    applies = {train: jitted(network, train=train) for train in (True, False)}

    def apply(seed, train):
        key = None if seed is None else jax.random.key(seed)
        z, new_state = applies[train](params, state, X, key)
        assert new_state == state
        return z

    np.testing.assert_array_equal(apply(1, True), apply(1, True))
    assert (apply(1, True) != apply(2, True)).any()
    assert 0.3 < (apply(1, True) == 0).mean() < 0.7
    np.testing.assert_array_equal(apply(1, False), apply(None, False))
    np.testing.assert_allclose(apply(None, False), hidden_of(params), atol=1e-5)


def test_attention_s_dropout_follows_too():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(2, qkv_features=8, dropout_rate=0.5)(x, x)

    x = np.asarray(normal(2, 5, 4, seed=2))
    network = from_linen(Attention())
    params, state = start(network, x)
    test = jitted(network, train=False)
    train = jitted(network, train=True)
    np.testing.assert_array_equal(*(test(params, state, x, jax.random.key(i))[0] for i in (1, 2)))
    a, b = (train(params, state, x, jax.random.key(i))[0] for i in (1, 2))
    assert abs(a - b).max() > 1e-3


def test_a_module_without_flags_gets_none():
    network = from_linen(nn.Dense(2))
    params, state = start(network)
    for train in (True, False):
        z, new_state = jitted(network, train=train)(params, state, X)
        expected = X @ params["weights"]["kernel"] + params["weights"]["bias"]
        np.testing.assert_allclose(z, expected, atol=1e-6)
        assert new_state == state == {}


class Own(nn.Module):
    @nn.compact
    def __call__(self, x, augmenting=False):
        return nn.Dropout(0.5, deterministic=not augmenting)(nn.Dense(50)(x))


def test_a_switch_of_an_unknown_name_is_not_silent():
    with pytest.raises(ValueError, match="the Linen module Own takes 'augmenting', and whether"):
        from_linen(Own())
    network = from_linen(Own(), switches={"augmenting": True})
    params, state = start(network)
    z, _ = jitted(network, train=True)(params, state, X, jax.random.key(1))
    assert 0.3 < (z == 0).mean() < 0.7
    with pytest.raises(ValueError, match="has no parameter 'augment'"):
        from_linen(Own(), switches={"augment": True})


def test_modes_that_the_module_cannot_have_are_refused():
    with pytest.raises(ValueError, match="unknown normalisation 'tasknorm': choose one of none"):
        from_linen(Normed(), normalisation="tasknorm")
    with pytest.raises(ValueError, match="Dense has no batch norm, and normalisation='batch'"):
        from_linen(nn.Dense(3), normalisation="batch").init(jax.random.key(0), X)


def test_batch_norm_is_found_where_it_is_spoken_of():
    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.inner(x, True)

    class BySettings(nn.Module):
        norm: type | functools.partial = nn.LayerNorm

        @nn.compact
        def __call__(self, x):
            return self.norm()(x)

    assert mentions_batch_norm(Outer(Normed()))
    assert mentions_batch_norm(nn.Sequential([nn.Dense(2), nn.BatchNorm(False)]))
    assert mentions_batch_norm(BySettings(functools.partial(nn.BatchNorm, momentum=0.5)))
    assert not mentions_batch_norm(BySettings())
    assert not mentions_batch_norm(Dropped())
    assert not mentions_batch_norm(nn.Sequential([nn.Dense(2), nn.LayerNorm()]))


def test_batch_norm_that_was_not_found_beforehand_is_not_silent():
    hidden = {"norm": nn.BatchNorm}

    class Hidden(nn.Module):
        @nn.compact
        def __call__(self, x):
            return hidden["norm"](use_running_average=False)(x)

    network = from_linen(Hidden())
    with pytest.raises(ValueError, match="Hidden has batch norm where none was expected: name"):
        network.init(jax.random.key(0), X)
    # Frozen moments are a choice of one's own.
    network = from_linen(Hidden(), normalisation="none")
    params, state = start(network)
    z, _ = jitted(network, train=True)(params, state, X)
    np.testing.assert_allclose(z, X / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_inputs_may_be_pytrees():
    class OfWords(nn.Module):
        @nn.compact
        def __call__(self, x):
            z = nn.Embed(10, 4)(x["ids"])
            return (z * x["mask"][..., None]).sum(1)

    x = {"ids": np.array([[1, 2], [3, 0]]), "mask": np.array([[1.0, 1.0], [1.0, 0.0]])}
    network = from_linen(OfWords())
    params, state = start(network, x)
    z, _ = jitted(network, train=True)(params, state, x)
    table = params["weights"]["Embed_0"]["embedding"]
    np.testing.assert_allclose(z, [table[1] + table[2], table[3]], rtol=1e-6)


def test_what_a_module_sows_is_no_state():
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "x", x)
            return nn.Dense(2)(x)

    _, state = start(from_linen(Sowing()))
    assert state == {}


def test_types_are_kept():
    network = from_linen(Normed())
    tree = (*start(network), X)
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    for leaf in jax.tree.leaves(jitted(network, train=True, moments="replace")(*tree)):
        assert leaf.dtype == jnp.bfloat16


def test_no_key_is_used_twice():
    network = from_linen(Training())
    with jax.debug_key_reuse(True):
        params, state = jax.jit(network.init)(jax.random.key(0), X)
        apply = jitted(network, train=True, moments="update")
        jax.block_until_ready(apply(params, state, X, jax.random.key(1)))


@pytest.mark.parametrize("train", [True, False])
def test_it_works_under_vmap_and_jit(train):
    network = from_linen(Normed())
    params, state = start(network)
    tasks = np.stack([X, 2 * X + 1])

    def apply(x):
        return network.apply(params, state, x, key=None, train=train, moments="update")

    batched, states = jax.tree.map(np.asarray, jax.jit(jax.vmap(apply))(tasks))
    assert jax.tree.structure(states) == jax.tree.structure(state)
    for i in (0, 1):
        np.testing.assert_allclose(batched[i], jax.jit(apply)(tasks[i])[0], atol=1e-5)


class Noisy(nn.Module):
    """Draws from a stream of its own, and has a collection called as a part of learners is."""

    @nn.compact
    def __call__(self, x, train=False):
        scale = self.variable("head", "scale", lambda: jnp.full(3, 2.0))
        y = scale.value * nn.Dense(3)(x)
        return y + jax.random.normal(self.make_rng("noise"), y.shape)


def test_streams_and_collections_of_any_name_are_supported():
    network = from_linen(Noisy())
    params, state = start(network)
    assert state["head"]["scale"].tolist() == [2.0] * 3
    apply = jitted(network, train=True)
    one, two = (apply(params, state, X, jax.random.key(seed))[0] for seed in (0, 1))
    assert (one != two).all()
    with pytest.raises(ValueError, match=r"draws at random .*noise.*give apply a key"):
        network.apply(params, state, X, key=None, train=False)
    support = Batch(X, np.tile(np.eye(2, dtype=np.float32), (3, 1)))
    for learner in (maml(network, steps=1), prototypical(network)):
        task = Episode(support, support)
        initial = jax.jit(learner.init)(jax.random.key(0), task)
        assert np.isfinite(jax.jit(learner.loss)(*initial, task, jax.random.key(1))[0])


def test_what_is_no_linen_module_is_refused():
    with pytest.raises(UsageError, match=r"a module, not the class Normed: give Normed\("):
        from_linen(Normed)
    with pytest.raises(UsageError, match=r"not a function: .*from_nnx.*from_functions"):
        from_linen(lambda x: x)
