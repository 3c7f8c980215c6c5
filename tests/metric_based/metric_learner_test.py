"""What `metric_learner` promises with any head: masks, modes, trees, types and keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax import registry
from meta_jax.core import Batch, Episode, Network
from meta_jax.metric_based.kernel import kernel_learner
from meta_jax.metric_based.matching import matching, matching_fce
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.metric_based.r2d2 import r2d2
from meta_jax.metric_based.relation import relation
from meta_jax.metric_based.siamese import siamese
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import squared_error
from tests.random_trees import moved, normal
from tests.small_networks import mixed_inputs, normalised

KEY = jax.random.key(0)
LEARNERS = {
    "siamese": siamese,
    "matching": matching,
    "matching_fce": matching_fce,
    "relation": functools.partial(relation, features=2),
    "prototypical": prototypical,
    "kernel": kernel_learner,
    "r2d2": r2d2,
}
every_learner = pytest.mark.parametrize("name", LEARNERS)
MODES = ("running", "batch", "support", "one_at_a_time", "layer")


def build(name, mode="batch"):
    return LEARNERS[name](normalised(mode, flat=name != "relation"))


def episode(ways=3, shots=2, queries=2, seed=0):
    sets = []
    for i, n in enumerate((shots, queries)):
        x = normal(ways * n, 4, 4, 2, seed=2 * seed + i)
        sets.append(Batch(x, jnp.asarray(np.tile(np.eye(ways), (n, 1)))))
    return Episode(*sets)


def padded(batch, rubbish=1e4):
    """Two more rows, of rubbish, in front and behind."""
    n = len(batch.y)
    rows = np.array([0, *range(n), 1])
    mask = np.asarray([False, *[True] * n, False])

    def pad(leaf):
        leaf = np.asarray(leaf)
        rubbish_of_its_type = np.asarray(rubbish, leaf.dtype)
        return np.where(mask.reshape(-1, 1, 1, 1), leaf[rows], rubbish_of_its_type)

    return Batch(jax.tree.map(pad, batch.x), np.asarray(batch.y)[rows], mask)


def initial(learner, task=None):
    params, state = jax.jit(learner.init)(KEY, episode() if task is None else task)
    state = jax.tree.map(lambda s: np.asarray(s) + np.asarray(0.1, s.dtype), state)
    return moved(params), state


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), a, b)


@pytest.mark.parametrize("mode", MODES)
def test_rubbish_in_padding_changes_nothing(x64, mode):
    learner = build("prototypical", mode)
    params, state = initial(learner)
    training = jax.jit(jax.value_and_grad(learner.loss, has_aux=True))
    testing = jax.jit(learner.evaluate)
    bare, full = episode(), Episode(*map(padded, episode()))
    expected = training(params, state, bare, KEY), testing(params, state, bare, KEY)
    found = training(params, state, full, KEY), testing(params, state, full, KEY)
    close(found, expected)
    # What has no mask is seen.
    unmasked = Episode(*(batch._replace(mask=None) for batch in full))
    (loud, _), _ = training(params, state, unmasked, KEY)
    assert abs(float(loud) - float(expected[0][0][0])) > 1e-4


def test_rubbish_that_overflows_leaves_the_gradient_finite():
    learner = build("prototypical")
    params, state = initial(learner)
    full = Episode(*(padded(batch, rubbish=1e30) for batch in episode()))
    _, gradient = jax.jit(jax.value_and_grad(learner.loss, has_aux=True))(params, state, full, KEY)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def recording():
    """A network that writes down what it is asked for."""
    network, calls = normalised("running"), []

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        calls.append((x.shape[0], train, moments, None if mask is None else mask.shape))
        settings = {"key": key, "train": train, "moments": moments, "mask": mask}
        return network.apply(params, state, x, **settings)

    return network._replace(apply=apply), calls


def test_training_embeds_all_at_once_and_without_a_mask_where_there_is_none():
    network, calls = recording()
    learner = prototypical(network)
    params, state = jax.eval_shape(learner.init, KEY, episode())
    calls.clear()
    jax.eval_shape(learner.loss, params, state, episode(), KEY)
    assert calls == [(12, True, "update", None)]
    calls.clear()
    support, query = episode()
    jax.eval_shape(learner.loss, params, state, Episode(padded(support), query), KEY)
    assert calls == [(14, True, "update", (14,))]


def test_only_one_at_a_time_keeps_the_support_set():
    for mode in MODES:
        learner = build("prototypical", mode)
        params, state = jax.eval_shape(learner.init, KEY, episode())
        adapt = functools.partial(learner.adapt, train=False)
        adapted = jax.eval_shape(adapt, params, state, episode().support, KEY)
        assert (adapted.support is not None) == (mode == "one_at_a_time")


def test_one_at_a_time_answers_a_query_as_batch_does_where_it_stands_alone(x64):
    """Apart from the support set's own embeddings, which are taken alone."""
    network = normalised("one_at_a_time")
    learner = prototypical(network)
    params, state = initial(learner)
    support, query = jax.tree.map(np.asarray, episode())

    @jax.jit
    def answers(params, support, x):
        adapted = learner.adapt(params, state, support, KEY, train=False)
        return learner.predict(params, adapted, x, KEY, train=False)[0]

    found = np.asarray(answers(params, support, query.x))

    @jax.jit
    def embed(x):
        return network.apply(
            params["network"], state["network"], x, key=None, train=False, moments="batch"
        )[0]

    centres = np.asarray(embed(support.x)).reshape(2, 3, -1).mean(0)
    for i, x in enumerate(query.x):
        z = np.asarray(embed(np.concatenate([support.x, x[None]])))[-1]
        np.testing.assert_allclose(found[i], -((z - centres) ** 2).sum(-1), atol=1e-12)


def tokens(n, seed):
    rng = np.random.default_rng(seed)
    real = np.arange(6) < rng.integers(2, 7, (n, 1))
    return {"ids": rng.integers(0, 5, (n, 6)), "real": real}


@pytest.mark.parametrize("name", ["prototypical", "r2d2", "matching_fce", "siamese"])
def test_inputs_may_be_trees(name):
    learner = LEARNERS[name](mixed_inputs())
    y = np.eye(3, dtype=np.float32)
    task = Episode(Batch(tokens(3, 0), y), Batch(tokens(3, 1), y))

    @jax.jit
    def loss_and_metrics(task):
        params, state = learner.init(KEY, task)
        loss, _ = learner.loss(params, state, task, KEY)
        return loss, learner.evaluate(params, state, task, KEY)

    loss, metrics = loss_and_metrics(task)
    assert np.isfinite(loss)
    assert set(metrics) == {"loss", "accuracy"}
    # Another token that is not real says nothing.
    x = task.query.x
    other = {**x, "ids": np.where(x["real"], x["ids"], 4 - x["ids"])}
    same, _ = loss_and_metrics(Episode(task.support, Batch(other, y)))
    np.testing.assert_allclose(same, loss, rtol=1e-6)


@every_learner
def test_bfloat16_gives_finite_bfloat16(name):
    learner = build(name)
    params, state = jax.jit(learner.init)(KEY, episode())

    def half(tree):
        return jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), tree)

    @jax.jit
    def run(params, state, task):
        gradient, aux = jax.grad(learner.loss, has_aux=True)(params, state, task, KEY)
        adapted = learner.adapt(params, state, task.support, KEY, train=False)
        outputs, new_state = learner.predict(params, adapted, task.query.x, KEY, train=False)
        return gradient, aux, outputs, new_state

    found = run(half(params), half(state), half(episode()))
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype == jnp.bfloat16
        assert np.isfinite(np.float32(leaf)).all()


def with_noise():
    """A network whose every call draws: for a key that is used twice to be seen."""

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        return x + jax.random.normal(key, x.shape), state

    return Network(lambda key, x: ({"w": jax.random.normal(key, (2,))}, {}), apply)


@pytest.mark.parametrize("joint", [True, False])
def test_dropout_never_sees_a_key_twice(joint):
    learner = siamese(with_noise(), joint_encoding=joint)
    x = jnp.ones((3, 4))
    task = Episode(Batch(x, jnp.eye(3)), Batch(x, jnp.eye(3)))
    jax.config.update("jax_debug_key_reuse", True)
    try:
        params, state = learner.init(jax.random.key(1), task)
        jax.jit(learner.loss)(params, state, task, jax.random.key(2))
        jax.jit(learner.evaluate)(params, state, task, jax.random.key(3))
    finally:
        jax.config.update("jax_debug_key_reuse", False)


def test_nothing_compiles_again():
    learner, traces = build("prototypical", "running"), []

    @jax.jit
    def evaluate(params, state, task, key):
        traces.append(None)
        return learner.evaluate(params, state, task, key)

    params, state = initial(learner)
    for seed in range(3):
        task = Episode(*map(padded, episode(seed=seed)))
        evaluate(params, state, task, jax.random.key(seed))
    assert len(traces) == 1


@every_learner
def test_labels_that_are_not_one_hot_are_refused(name):
    learner = build(name)
    support, query = episode()
    integers = [batch._replace(y=np.asarray(batch.y).argmax(1)) for batch in (support, query)]
    short = Batch(support.x, np.asarray(support.y)[:4])
    params, state = jax.eval_shape(learner.init, KEY, episode())
    adapt = functools.partial(learner.adapt, train=False)
    with pytest.raises(ValueError, match="one-hot"):
        jax.eval_shape(adapt, params, state, integers[0], KEY)
    with pytest.raises(ValueError, match="one-hot"):
        jax.eval_shape(learner.loss, params, state, Episode(support, integers[1]), KEY)
    with pytest.raises(ValueError, match=r"support needs the same number of rows.*y 4"):
        jax.eval_shape(adapt, params, state, short, KEY)


def test_feature_maps_are_no_vectors():
    learner = prototypical(normalised("batch", flat=False))
    params, state = jax.jit(learner.init)(KEY, episode())
    with pytest.raises(ValueError, match=r"z must be vectors \[n, D\], not \[6, 4, 4, 3\]"):
        learner.adapt(params, state, episode().support, KEY, train=False)


def test_what_is_no_network_is_refused_with_the_adapters():
    with pytest.raises(TypeError, match=r"needs a meta_jax Network.*from_linen.*from_nnx"):
        prototypical(object())


def test_records_build_the_same_learner():
    learner = kernel_learner(mlp((4,)), kernel="cosine", bandwidth=0.3, objective=squared_error)
    assert learner.config["name"] == "kernel"
    again = registry.build("learner", learner.config)
    assert again.config == learner.config
    x = normal(4, 2)
    task = Episode(Batch(x, x), Batch(x, x))
    params, state = jax.jit(learner.init)(KEY, task)
    close(*(jax.jit(one.loss)(params, state, task, KEY) for one in (learner, again)))
