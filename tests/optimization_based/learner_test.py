import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import Batch, Episode, Network
from meta_jax.data.sinusoid import sample_sinusoid
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy, squared_error
from meta_jax.optimization_based.anil import anil
from meta_jax.optimization_based.boil import boil
from meta_jax.optimization_based.imaml import imaml
from meta_jax.optimization_based.learner import init_learner, support_problem, with_reduction
from meta_jax.optimization_based.lstm_meta_learner import lstm_meta_learner
from meta_jax.optimization_based.maml import first_order_maml, maml
from meta_jax.optimization_based.maml_plus_plus import maml_plus_plus
from meta_jax.optimization_based.meta_sgd import meta_sgd
from meta_jax.optimization_based.reptile import reptile
from tests.checkers import key_and_leak_checks
from tests.optimization_based.tasks import (
    KEY,
    assert_trees_close,
    identity_network,
    images,
    loss_and_gradient,
    normalised_network,
    padded,
    tanh_network,
    vectors,
)

pytestmark = pytest.mark.usefixtures("x64")


def test_reductions_of_a_loss():
    logits, y = jnp.arange(12.0).reshape(4, 3) % 5, jnp.eye(3)[jnp.array([0, 1, 2, 2])]
    mask = jnp.array([True, True, True, False])
    mean, metrics = cross_entropy.loss(logits, y, mask)
    for reduction, factor in {"mean": 1, "sum": 3, "class_sum": 3}.items():
        loss, same = with_reduction(cross_entropy, reduction).loss(logits, y, mask)
        np.testing.assert_allclose(loss, factor * mean, rtol=1e-14)
        assert same == metrics
    twice = jnp.concatenate([logits[:3], logits[:3]]), jnp.concatenate([y[:3], y[:3]]), None
    total = with_reduction(cross_entropy, "sum").loss(*twice)[0]
    assert float(total / mean) == pytest.approx(6)
    over_classes = with_reduction(cross_entropy, "class_sum").loss(*twice)[0]
    assert float(over_classes / mean) == pytest.approx(3)
    with pytest.raises(ValueError, match="unknown reduction 'median'"):
        with_reduction(cross_entropy, "median")


def test_the_authors_rate_goes_with_their_reduction():
    """A sum over 3 classes with 0.4 is the mean with 1.2: finding 1 of the reproduction."""
    params, state = maml(tanh_network()).init(KEY, vectors())
    adapted = [
        maml(tanh_network(), inner_lr=rate, steps=2, reduction=reduction).adapt(
            params, state, vectors().support, KEY, train=True
        )
        for rate, reduction in ((0.4, "class_sum"), (1.2, "mean"), (0.2, "sum"))
    ]
    for other in adapted[1:]:
        assert_trees_close(other, adapted[0])


def test_any_optax_transformation_is_an_inner_optimizer():
    params, state = maml(tanh_network()).init(KEY, vectors())
    chain = optax.chain(optax.scale(-0.25), optax.trace(0.0), optax.scale(2.0))
    adapted = [
        maml(tanh_network(), steps=2, **settings).adapt(
            params, state, vectors().support, KEY, train=True
        )
        for settings in ({"inner_lr": 0.5}, {"inner_optimizer": chain})
    ]
    assert_trees_close(*adapted)


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(maml, inner_lr=0.1, steps=10),
        functools.partial(first_order_maml, inner_lr=0.1, steps=10),
        functools.partial(anil, inner_lr=0.1, steps=10),
        functools.partial(boil, inner_lr=0.05, steps=20),
        functools.partial(meta_sgd, inner_lr=0.2, steps=10),
        functools.partial(maml_plus_plus, inner_lr=0.1, steps=10),
        functools.partial(imaml, inner_lr=0.1, proximity=0.1, steps=10),
        functools.partial(reptile, inner_lr=0.05, steps=10),
        functools.partial(lstm_meta_learner, steps=2, hidden_size=2),
    ],
    ids=lambda build: build.func.__name__,
)
def test_regression(build):
    x = jnp.linspace(-1, 1, 6)[:, None]
    episode = Episode(*[Batch(x, jnp.concatenate([x, 2 * x], 1))] * 2)
    learner = build(mlp((8,)), objective=squared_error)
    params, state = learner.init(KEY, episode)
    (loss, aux), gradient = jax.jit(jax.value_and_grad(learner.loss, has_aux=True))(
        params, state, episode, KEY
    )
    assert set(aux.metrics) == {"mse"}
    assert np.isfinite(loss)
    assert max(abs(g).max() for g in jax.tree.leaves(gradient)) > 1e-4
    if build.func is lstm_meta_learner:  # it has to learn to descend
        return
    start = params.get("learner", params)
    hidden = jax.nn.relu(x @ start["network"]["layer1"]["kernel"])
    before = ((hidden @ start["head"]["kernel"] - episode.query.y) ** 2).mean()
    assert aux.metrics["mse"] < 0.8 * before


# ---- Settings that are safe.


@pytest.mark.parametrize(
    ("method", "normalised", "plain", "regression"),
    [
        (maml, 0.4, 0.1, 0.01),
        (first_order_maml, 0.4, 0.1, 0.01),
        (anil, 2.0, 0.1, 0.01),
        (boil, 0.5, 0.1, 0.01),
        (meta_sgd, 1.0, 0.1, 0.01),
        (maml_plus_plus, 0.5, 0.1, 0.01),
        (imaml, 0.4, 0.1, 0.005),
        (reptile, 1e-3, 1e-3, 1e-3),
    ],
)
def test_the_inner_rate_follows_the_network_and_the_objective(
    method, normalised, plain, regression
):
    def rate(network, objective):
        return method(network, objective=objective).config["inner_lr"]

    assert rate(normalised_network("running"), cross_entropy) == normalised
    assert rate(normalised_network("layer"), cross_entropy) == normalised
    assert rate(tanh_network(), cross_entropy) == plain
    assert rate(tanh_network(), squared_error) == regression
    assert rate(normalised_network("batch"), squared_error) == regression
    assert method(mlp(), inner_lr=0.3).config["inner_lr"] == 0.3


@pytest.mark.parametrize("method", [maml, anil, boil, meta_sgd, maml_plus_plus, imaml, reptile])
def test_nothing_diverges_on_sinusoids_with_a_method_s_own_settings(method):
    learner = method(mlp((40, 40)), objective=squared_error)

    def error(key):
        init_key, task_key, test_key = jax.random.split(key, 3)
        task = sample_sinusoid(task_key, 5, 50)
        params, state = learner.init(init_key, task)
        return learner.evaluate(params, state, task, test_key)["mse"]

    errors = jax.jit(jax.vmap(error))(jax.random.split(KEY, 64))
    assert errors.max() < 60  # amplitudes are up to 5, so that answers of zero have at most 25


def test_steps_in_tests_are_those_of_training_unless_given():
    params, state = maml(tanh_network()).init(KEY, vectors())
    arguments = params, state, vectors().support, KEY
    learner = maml(tanh_network(), inner_lr=0.5, steps=3)
    trained, tested = (learner.adapt(*arguments, train=train) for train in (True, False))
    assert_trees_close(tested, trained)


# ---- Inner optimizers.


def dead_episode():
    """Inputs whose first coordinate is always zero, so that some gradients are."""
    return jax.tree.map(lambda a: a.at[:, 0].set(0) if a.shape[1] == 4 else a, vectors())


def meta_gradient(**settings):
    learner = maml(tanh_network(), steps=2, **settings)
    params, state = learner.init(KEY, dead_episode())
    return loss_and_gradient(learner, params, state, dead_episode(), KEY)


def assert_finite(tree):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("adjoint", ["unrolled", "checkpointed", "truncated:1"])
def test_an_optimizer_without_a_derivative_at_zero_is_refused(adjoint):
    with pytest.raises(ValueError, match=r"optax\.adam\(rate, eps_root=1e-8\)") as error:
        maml(tanh_network(), inner_optimizer=optax.adam(1e-2), adjoint=adjoint)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("optimizer", "adjoint"),
    [
        (optax.adam(1e-2), "first_order"),
        (optax.adam(1e-2, eps_root=1e-8), "unrolled"),
        (optax.chain(optax.sgd(0.5), optax.contrib.reduce_on_plateau(patience=1)), "unrolled"),
    ],
    ids=["adam", "adam_eps_root", "plateau"],
)
def test_the_outer_gradient_comes_back_through_an_inner_optimizer(optimizer, adjoint):
    loss, gradient = meta_gradient(inner_optimizer=optimizer, adjoint=adjoint)
    assert_finite((loss, gradient))
    assert max(abs(g).max() for g in jax.tree.leaves(gradient)) > 1e-3


def test_a_line_search_is_of_first_order():
    with pytest.raises(ValueError, match="line search and no derivative: use adjoint first_order"):
        maml(tanh_network(), inner_optimizer=optax.lbfgs())
    learner = maml(tanh_network(), inner_optimizer=optax.lbfgs(), adjoint="first_order")
    params, state = learner.init(KEY, vectors())
    # What cannot be differentiated says so when it is traced.
    jax.eval_shape(jax.grad(lambda *a: learner.loss(*a)[0]), params, state, vectors(), KEY)


# ---- Randomness, padding, kinds of inputs.


def problem_losses(train):
    network = normalised_network("support", dropout=0.5)
    learner, state = init_learner(network, KEY, vectors())
    support = vectors().support
    problem = support_problem(network, cross_entropy, lambda step: support, KEY, train=train)
    return [float(problem(learner, state, jnp.asarray(step))[0]) for step in range(3)]


def test_each_inner_step_draws_its_own_dropout_and_a_test_draws_none():
    assert len(set(problem_losses(train=True))) == 3
    assert len(set(problem_losses(train=False))) == 1


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(maml, adjoint="checkpointed", steps=3),
        functools.partial(maml, adjoint="mixed_mode"),
        functools.partial(maml_plus_plus, multi_step_steps=3, first_order_steps=3),
    ],
)
def test_keys_are_used_once_and_no_tracer_leaks_from_the_outer_gradient(build):
    learner = build(normalised_network("running", dropout=0.5))

    def step(key):
        init_key, loss_key, test_key = jax.random.split(key, 3)
        params, state = learner.init(init_key, vectors())
        gradient = jax.grad(learner.loss, has_aux=True)(params, state, vectors(), loss_key)
        return gradient, learner.evaluate(params, state, vectors(), test_key)

    with key_and_leak_checks():
        jax.eval_shape(jax.jit(step), KEY)


@pytest.mark.parametrize("mode", ["batch", "support"])
def test_padding_changes_nothing_in_an_inner_loop_that_sums(mode):
    learner = maml(normalised_network(mode), inner_lr=0.2, steps=2, reduction="sum")
    params, state = learner.init(KEY, vectors())
    x = vectors().query.x

    @jax.jit
    def answers(support):
        adapted = learner.adapt(params, state, support, KEY, train=False)
        return learner.predict(params, adapted, x, KEY, train=False)[0]

    support = vectors().support
    assert_trees_close(answers(padded(support)), answers(support))
    assert_trees_close(answers(padded(support, value=-1e6)), answers(support))


def test_the_support_is_kept_where_queries_are_normalised_beside_it():
    for mode, kept in (("batch", False), ("support", False), ("one_at_a_time", True)):
        learner = maml(normalised_network(mode))
        params, state = learner.init(KEY, vectors())
        adapted = jax.eval_shape(
            functools.partial(learner.adapt, train=False), params, state, vectors().support, KEY
        )
        assert (adapted.support is not None) == kept


def dictionary_episode():
    return jax.tree.map(
        lambda batch: batch._replace(x={"first": batch.x[:, :2], "second": batch.x[:, 2:]}),
        vectors(),
        is_leaf=lambda node: isinstance(node, Batch),
    )


def dictionary_network():
    inner = tanh_network()

    def joined(x):
        return jnp.concatenate([x["first"], x["second"]], 1)

    def apply(params, state, x, **settings):
        return inner.apply(params, state, joined(x), **settings)

    return Network(lambda key, x: inner.init(key, joined(x)), apply)


@pytest.mark.parametrize("build", [maml, anil, maml_plus_plus, reptile])
def test_inputs_may_be_dictionaries(build):
    values = []
    for network, episode in (
        (tanh_network(), vectors()),
        (dictionary_network(), dictionary_episode()),
    ):
        learner = build(network, steps=1)
        params, state = learner.init(KEY, episode)
        values.append(jax.jit(learner.loss)(params, state, episode, KEY))
    assert_trees_close(*values)


def test_inputs_that_fit_no_linear_head_are_refused():
    integers = jax.tree.map(lambda a: a.argmax(-1) if a.shape[1] == 3 else a, vectors())
    with pytest.raises(ValueError, match=r"support\.y must be one-hot"):
        maml(tanh_network()).init(KEY, integers)
    uneven = vectors()._replace(support=Batch(jnp.ones((5, 4)), jnp.eye(3)))
    with pytest.raises(ValueError, match="support needs the same number of rows"):
        maml(tanh_network()).init(KEY, uneven)
    with pytest.raises(ValueError, match="flatten or average them in the network"):
        maml(identity_network()).init(KEY, images())
