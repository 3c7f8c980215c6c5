"""In-context learners: what they compute, what compiles, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.data.gaussian_process import gp
from meta_jax.data.source import EpisodeSize
from meta_jax.lookup import UsageError
from meta_jax.model_based.in_context import in_any_order, in_context, label_codes
from meta_jax.model_based.latent import kl_divergence, latent_distribution
from meta_jax.networks.flatten import flatten
from meta_jax.networks.mlp import mlp
from meta_jax.networks.sets import equiangular_codes
from meta_jax.objectives import (
    Gaussian,
    cross_entropy,
    gaussian_likelihood,
    squared_error,
    trial_return,
)
from meta_jax.training.outer_step import init_train_state, make_outer_step
from meta_jax.training.train_loop import make_train_loop
from tests.small_networks import normalised

READERS = ("mean", "cross_attention", "target_masked", "snail")
KEY = jax.random.key(0)
every_reader = pytest.mark.parametrize("reader", READERS)


def curves(key=KEY, shots=6, queries=4, real=None):
    x = jax.random.normal(key, (shots + queries, 1))
    batch = [Batch(x[rows], jnp.sin(x[rows])) for rows in (slice(shots), slice(shots, None))]
    mask = None if real is None else jnp.arange(shots) < real
    return Episode(batch[0]._replace(mask=mask), batch[1])


@functools.cache
def built(reader, objective=gaussian_likelihood, **settings):
    learner = in_context(
        flatten(), objective=objective, reader=reader, width=8, layers=2, heads=2, **settings
    )
    params, state = jax.jit(learner.init)(KEY, curves())
    return learner, params, state


@every_reader
def test_contexts_of_every_size_pass_through_one_program(reader):
    learner, params, state = built(reader)
    traces = []

    @jax.jit
    def step(params, task):
        traces.append(None)
        return jax.value_and_grad(learner.loss, has_aux=True)(params, state, task, KEY)

    losses = {real: float(step(params, curves(real=real))[0][0]) for real in range(1, 7)}
    assert len(traces) == 1
    assert len(set(losses.values())) == 6
    if reader != "snail":  # there the order is drawn anew for each number of rows
        whole = curves()
        few = Episode(Batch(whole.support.x[:4], whole.support.y[:4]), whole.query)
        loss, _ = jax.jit(learner.loss)(params, state, few, KEY)
        np.testing.assert_allclose(losses[4], loss, rtol=1e-4)


@every_reader
def test_answers_to_a_likelihood_have_scales_above_the_smallest(reader):
    learner, params, state = built(reader, least_scale=0.1)
    params = params | {"output": jax.tree.map(lambda leaf: 30 * leaf - 30, params["output"])}
    adapted = learner.adapt(params, state, curves().support, KEY, train=False)
    answer, _ = learner.predict(params, adapted, curves().query.x, KEY, train=False)
    assert isinstance(answer, Gaussian)
    assert answer.mean.shape == answer.scale.shape == (4, 1)
    assert (answer.scale >= 0.1).all()
    assert answer.scale.min() < 0.11


def test_the_mean_without_a_network_is_a_function_of_the_mean_pair_alone():
    learner, params, state = built("mean")
    first = curves().support
    # The same mean of encoded pairs: every pair twice.
    twice = Batch(jnp.concatenate([first.x, first.x]), jnp.concatenate([first.y, first.y]))
    memories = [
        learner.adapt(params, state, support, KEY, train=False).memory for support in (first, twice)
    ]
    np.testing.assert_allclose(*memories, rtol=1e-5)


def test_labels_enter_as_their_codes():
    y = jnp.eye(3)[jnp.array([2, 0])]
    np.testing.assert_array_equal(label_codes(cross_entropy, "one_hot", y), y)
    found = label_codes(cross_entropy, "equiangular", y)
    np.testing.assert_allclose(found, equiangular_codes(3)[jnp.array([2, 0])], rtol=1e-6)
    np.testing.assert_array_equal(label_codes(squared_error, "equiangular", y), y)


def test_the_encoders_own_loss_is_added_with_its_weight():
    images = jax.random.normal(KEY, (6, 2, 2, 3))
    batch = Batch(images, jnp.tile(jnp.eye(3), (2, 1)))
    task = Episode(batch, batch)

    def loss(weight):
        learner = in_context(normalised("batch"), width=8, layers=1, nca_weight=weight)
        params, state = jax.jit(learner.init)(KEY, task)
        return jax.jit(learner.loss)(params, state, task, KEY)

    (plain, _), (both, aux) = loss(0.0), loss(0.5)
    assert aux.metrics["nca_loss"] > 0
    np.testing.assert_allclose(both, plain + 0.5 * aux.metrics["nca_loss"], rtol=1e-5)


def test_the_answers_leave_the_network_alone_where_its_own_loss_trains_it():
    images = jax.random.normal(KEY, (6, 2, 2, 3))
    batch = Batch(images, jnp.tile(jnp.eye(3), (2, 1)))

    def gradients(alone):
        learner = in_context(
            normalised("layer"), width=8, layers=1, nca_weight=0.5, nca_alone=alone
        )
        params, state = jax.jit(learner.init)(KEY, Episode(batch, batch))

        def loss(params):
            value, aux = learner.loss(params, state, Episode(batch, batch), KEY)
            return jnp.stack([value, aux.metrics["nca_loss"]])

        return jax.jit(jax.jacrev(loss))(params)

    joint, alone = gradients(False), gradients(True)
    for together, apart in zip(
        *map(jax.tree.leaves, (joint["network"], alone["network"])), strict=True
    ):
        np.testing.assert_allclose(apart[0], 0.5 * apart[1], atol=1e-6)
        assert not np.allclose(together[0], apart[0], atol=1e-6)
    for part in ("reader", "output"):
        for together, apart in zip(*map(jax.tree.leaves, (joint[part], alone[part])), strict=True):
            np.testing.assert_allclose(together[0], apart[0], atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "weight"), [(cross_entropy, 0.0), (squared_error, 1.0)], ids=["no weight", "real"]
)
def test_a_network_needs_a_loss(objective, weight):
    with pytest.raises(UsageError, match="nca_alone leaves the network without a loss"):
        in_context(flatten(), objective=objective, nca_weight=weight, nca_alone=True)


def test_sequences_are_trained_in_any_order():
    def loss(params, state, episode, key):
        return (episode.support.y[0, 0], episode.support.mask[0]), None

    y = jnp.arange(4.0)[:, None]
    support = Batch(y, y, jnp.arange(4) < 3)
    shuffled = jax.jit(lambda key: in_any_order(loss)({}, {}, Episode(support, support), key)[0])
    found = {tuple(map(float, shuffled(key))) for key in jax.random.split(KEY, 40)}
    assert found == {(0, True), (1, True), (2, True), (3, False)}
    # Tests keep the order given.
    learner, params, state = built("snail")
    first, second = (learner.evaluate(params, state, curves(), jax.random.key(i)) for i in (0, 1))
    assert first == second


@pytest.mark.parametrize(("reader", "reached"), [("mean", -0.7), ("target_masked", -0.5)])
def test_it_learns_gaussian_processes(reader, reached):
    """A mean of zero and the same scale everywhere have -0.935 nat at best."""
    tasks = gp(noise=0.1).tasks("train", EpisodeSize(1, 12, 12), train=True)
    learner = in_context(
        mlp((16,)), objective=gaussian_likelihood, reader=reader, width=16, layers=2, heads=2
    )
    optimizer = optax.adam(3e-3)
    state = init_train_state(learner, optimizer, tasks, 0, task_batch=16)
    step = make_outer_step(learner, optimizer, tasks.sample, task_batch=16, task_chunk=16)
    before = likelihood(learner, state, tasks)
    state, _, _ = make_train_loop(step)(state, tasks.data, 200)
    assert before < -1
    assert likelihood(learner, state, tasks) > reached


def likelihood(learner, train_state, tasks):
    @jax.jit
    def test(params, keys):
        draw = jax.vmap(lambda key: tasks.sample(key, tasks.data))
        evaluate = jax.vmap(learner.evaluate, (None, None, 0, 0))
        return evaluate(params, train_state.state, draw(keys), keys)["log_likelihood"].mean()

    return float(test(train_state.params, jax.random.split(jax.random.key(9), 200)))


def test_mistakes_are_refused():
    with pytest.raises(UsageError, match="unknown reader 'max': choose one of mean"):
        in_context(flatten(), reader="max")
    with pytest.raises(UsageError, match="unknown label_code 'binary': choose one of one_hot"):
        in_context(flatten(), label_code="binary")
    with pytest.raises(UsageError, match="width=9, heads=2"):
        in_context(flatten(), width=9, heads=2)
    with pytest.raises(UsageError, match="a learner that acts"):
        in_context(flatten(), objective=trial_return)
    learner, params, state = built("mean")
    with pytest.raises(UsageError, match=r"1 dimensions of targets.*y has 2"):
        learner.adapt(params, state, Batch(jnp.ones((3, 1)), jnp.ones((3, 2))), KEY, train=False)


# ---- Fewer classes than in training.


def characters(ways, columns, absent=()):
    """Two examples of each of `ways` classes; those of absent classes are padding."""
    label = jnp.tile(jnp.arange(ways), 2)
    x = jax.random.normal(KEY, (2 * ways, 3))
    mask = ~jnp.isin(label, jnp.array(absent)) if absent else None
    return Batch(x, jax.nn.one_hot(label, columns), mask)


@functools.cache
def classifier(reader, label_code, **settings):
    learner = in_context(
        flatten(), reader=reader, label_code=label_code, width=8, layers=2, heads=2, **settings
    )
    batch = characters(4, 4)
    return learner, *jax.jit(learner.init)(KEY, Episode(batch, batch))


every_classifier = pytest.mark.parametrize(
    ("reader", "label_code"), [*((name, "one_hot") for name in READERS), ("mean", "equiangular")]
)


@every_classifier
def test_a_task_of_fewer_classes_is_answered_as_one_whose_other_classes_are_empty(
    reader, label_code
):
    learner, params, state = classifier(reader, label_code)
    x = jax.random.normal(jax.random.key(5), (3, 3))
    answers = []
    for columns in (2, 4):
        adapted = learner.adapt(params, state, characters(2, columns), KEY, train=False)
        answers.append(learner.predict(params, adapted, x, KEY, train=False)[0])
    few, wide = answers
    assert few.shape == (3, 2)
    np.testing.assert_array_equal(few, wide[:, :2])
    assert (wide[:, 2:] < -1e29).all()
    assert (jnp.abs(few) < 100).all()
    with pytest.raises(UsageError, match=r"outputs for the 4 ways it trains with, and y has 5"):
        learner.adapt(params, state, characters(5, 5), KEY, train=False)


@pytest.mark.parametrize("settings", [{}, {"latent": 2}])
def test_tasks_of_any_number_of_classes_are_trained_on_in_one_program(settings):
    learner, params, state = classifier("mean", "one_hot", **settings)
    traces = []

    @jax.jit
    def step(batch):
        traces.append(None)
        task = Episode(batch, batch)
        return jax.value_and_grad(learner.loss, has_aux=True)(params, state, task, KEY)

    losses = []
    for absent in ([3], [2, 3], [1, 2]):
        (loss, _), gradients = step(characters(4, 4, absent))
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        losses.append(float(loss))
    assert len(traces) == 1
    assert len(set(losses)) == 3
    # As if the padding and the classes were not there.
    present = characters(4, 4, [2, 3])
    batch = jax.tree.map(lambda leaf: leaf[present.mask], present)._replace(mask=None)
    loss, _ = jax.jit(learner.loss)(params, state, Episode(batch, batch), KEY)
    np.testing.assert_allclose(losses[1], loss, rtol=1e-5)


# ---- The latent vector.


def test_the_divergence_is_the_integral_of_the_log_ratio():
    first = Gaussian(jnp.array([0.3, -1.0]), jnp.array([0.5, 2.0]))
    second = Gaussian(jnp.array([-0.2, 0.5]), jnp.array([1.5, 0.7]))
    x = np.linspace(-25, 25, 200_001)

    def log_density(gaussian, i):
        mean, scale = float(gaussian.mean[i]), float(gaussian.scale[i])
        return -(((x - mean) / scale) ** 2) / 2 - np.log(scale * np.sqrt(2 * np.pi))

    integral = 0.0
    for i in range(2):
        p, q = log_density(first, i), log_density(second, i)
        integral += np.trapezoid(np.exp(p) * (p - q), x)
    np.testing.assert_allclose(kl_divergence(first, second), integral, rtol=1e-5)
    assert kl_divergence(first, first) == 0


@pytest.mark.parametrize("reader", ["mean", "cross_attention"])
def test_a_latent_vector_is_drawn_in_training_and_costs_its_divergence(reader):
    learner, params, state = built(reader, latent=5)
    loss = jax.jit(learner.loss)
    (first, aux), (second, _) = (loss(params, state, curves(), jax.random.key(i)) for i in (1, 2))
    assert first != second
    np.testing.assert_allclose(first, aux.metrics["kl"] - aux.metrics["log_likelihood"], rtol=1e-5)
    # The same set twice tells of the latent vector what it tells once: nothing is to pay.
    support = curves().support
    _, aux = loss(params, state, Episode(support, support), KEY)
    np.testing.assert_allclose(aux.metrics["kl"], 0, atol=1e-6)
    assert loss(params, state, curves(), KEY)[1].metrics["kl"] > 1e-6


def test_a_test_takes_the_mean_of_what_the_support_set_tells():
    learner, params, state = built("mean", latent=5)
    support, query = curves()
    adapted = learner.adapt(params, state, support, KEY, train=False)
    told = latent_distribution(params["latent"], support.x, support.y)
    np.testing.assert_allclose(adapted.latent, told.mean, rtol=1e-6)
    assert ((told.scale > 0.1) & (told.scale < 1)).all()
    # It matters to every answer.
    answers = [
        learner.predict(params, a, query.x, KEY, train=False)[0].mean
        for a in (adapted, adapted._replace(latent=adapted.latent + 1))
    ]
    assert (abs(answers[0] - answers[1]) > 1e-4).all()
    with pytest.raises(UsageError, match="latent=-1"):
        in_context(flatten(), latent=-1)
