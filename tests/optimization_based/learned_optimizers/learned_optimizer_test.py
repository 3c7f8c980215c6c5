import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import cross_entropy
from meta_jax.networks.mlp import mlp
from meta_jax.optimization_based.adjoints import FIRST_ORDER, UNROLLED
from meta_jax.optimization_based.learned_optimizers.estimators import (
    full_unroll,
    persistent_es,
    truncated_gradient,
)
from meta_jax.optimization_based.learned_optimizers.families import (
    ProblemFamily,
    classification,
    quadratics,
    sample_quadratic,
)
from meta_jax.optimization_based.learned_optimizers.hand_designed import HAND_DESIGNED, with_rate
from meta_jax.optimization_based.learned_optimizers.learned_optimizer import (
    learned_optimizer,
    make_training_curves,
    training_run,
)
from meta_jax.optimization_based.learned_optimizers.lstm import coordinatewise_lstm
from meta_jax.optimization_based.learned_optimizers.mlp import adafactor_mlp_rule
from meta_jax.optimization_based.learned_optimizers.tuning import tune_rate
from meta_jax.optimization_based.learner import gradient_learner
from meta_jax.training.outer_step import init_train_state, make_outer_step, make_run
from tests.optimization_based.tasks import (
    KEY,
    assert_trees_close,
    loss_and_gradient,
    tanh_network,
    vectors,
)

SMALL = coordinatewise_lstm((3,), preprocessing=None, scale=1.0)


def tanh_family():
    """Smooth, so that finite differences are exact."""
    return classification(tanh_network(3), ways=3, minibatch=None)


def directional(function, meta, direction, step=1e-5):
    """The central difference of a function of the meta-parameters."""
    ahead = function(jax.tree.map(lambda m, d: m + step * d, meta, direction))
    behind = function(jax.tree.map(lambda m, d: m - step * d, meta, direction))
    return (ahead - behind) / (2 * step)


def inner_product(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), a, b)))


def pieces(adjoint):
    run = training_run(tanh_family(), SMALL, adjoint=adjoint)
    episode = vectors()
    meta = jax.tree.map(
        lambda m: m + 0.3 * jax.random.normal(KEY, m.shape), SMALL.init_meta(KEY, jnp.zeros(2))
    )
    direction = jax.tree.map(lambda m: jax.random.normal(jax.random.key(3), m.shape), meta)
    start = run.begin(meta, episode, KEY)
    return run, meta, direction, start


@pytest.mark.usefixtures("x64")
def test_second_derivatives_on_equal_finite_differences():
    run, meta, direction, start = pieces(UNROLLED)

    @jax.jit
    def loss(meta):
        return run.go_on(meta, start, KEY, 4)[1].mean()

    slope = inner_product(jax.jit(jax.grad(loss))(meta), direction)
    np.testing.assert_allclose(slope, directional(loss, meta, direction), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_second_derivatives_off_equal_finite_differences_with_the_gradients_held():
    run, meta, direction, start = pieces(FIRST_ORDER)
    gradient = jax.jit(jax.grad(lambda m: run.go_on(m, start, KEY, 4)[1].mean()))(meta)
    slope = inner_product(gradient, direction)
    family = tanh_family()

    def loss_at(params):
        outputs, _ = family.network.apply(params, {}, start.batch.x, key=None, train=True)
        return family.criterion(outputs, start.batch.y)[0]

    def losses(meta, gradients):
        """The run's losses; with gradients given, the rule sees these and not its own."""
        params, state, found, seen = start.params, start.rule_state, [], []
        for step in range(4):
            seen.append(jax.grad(loss_at)(params) if gradients is None else gradients[step])
            updates, state = SMALL.update(meta, seen[-1], state, params, loss=None)
            params = optax.apply_updates(params, updates)
            found.append(loss_at(params))
        return jnp.stack(found), seen

    found, held = losses(meta, None)
    np.testing.assert_allclose(run.go_on(meta, start, KEY, 4)[1], found, rtol=1e-10)
    numeric = directional(jax.jit(lambda m: losses(m, held)[0].mean()), meta, direction)
    np.testing.assert_allclose(slope, numeric, rtol=1e-6)
    # And that is not what the exact derivative gives.
    exact = directional(jax.jit(lambda m: losses(m, None)[0].mean()), meta, direction)
    assert abs(slope - exact) > 1e-3 * abs(exact)


@pytest.mark.usefixtures("x64")
def test_losses_are_those_after_each_step():
    run, rule = training_run(quadratics(), with_rate(optax.identity(), 0.01)), {"rate": 0.01}
    episode = sample_quadratic(KEY)
    start = run.begin(rule, episode, jax.random.key(1))
    w, y = episode.support.x, episode.support.y[:, 0]
    theta, wanted = start.params, []
    for _ in range(3):
        theta = theta - 0.01 * 2 * w.T @ (w @ theta - y)
        wanted.append(((w @ theta - y) ** 2).sum())
    end, losses = run.go_on(rule, start, KEY, 3)
    np.testing.assert_allclose(losses, wanted, rtol=1e-10)
    np.testing.assert_allclose(end.params, theta, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_segments_go_on_where_the_last_one_ended():
    run = training_run(tanh_family(), SMALL)
    meta = SMALL.init_meta(KEY, jnp.zeros(2))
    start = run.begin(meta, vectors(), KEY)
    whole, losses = run.go_on(meta, start, KEY, 4)
    half, first = run.go_on(meta, start, KEY, 2)
    end, second = run.go_on(meta, half, KEY, 2)
    assert_trees_close(end, whole)
    np.testing.assert_allclose(jnp.concatenate([first, second]), losses, rtol=1e-10)


def test_minibatches_are_drawn_anew_and_are_no_larger():
    seen = []

    def criterion(outputs, y):
        seen.append(y.shape)
        return (outputs.sum(-1) * jnp.arange(outputs.shape[0])).sum(), {}

    family = ProblemFamily(mlp((2,)), criterion, 4)
    run = training_run(family, with_rate(optax.identity(), 0.0))
    _, losses = run.go_on({"rate": 0.0}, run.begin({}, vectors(), KEY), KEY, 5)
    assert set(seen) == {(4, 3)}
    assert len(np.unique(losses)) == 5  # the parameters stay where they are


@pytest.mark.parametrize("rule", [SMALL, adafactor_mlp_rule()])
def test_a_rule_is_learned(rule):
    learner = learned_optimizer(quadratics(), rule, truncated_gradient(8, 4))
    optimizer = optax.adam(1e-2)
    initial = init_train_state(learner, optimizer, sample_quadratic, None, 0, task_batch=4)
    step = make_outer_step(learner, optimizer, sample_quadratic, task_batch=4, task_chunk=4)
    state, metrics, finite = make_run(step)(initial, None, 3)
    assert finite
    assert metrics["loss"] > 0
    assert state.state.age.tolist() == [4] * 4  # 4, 8, and 4 of the next run
    first, second = (state.state.state.batch.x[i] for i in range(2))
    assert abs(first - second).max() > 0.1


def test_adapt_trains_a_network_and_predict_asks_it():
    rule = with_rate(HAND_DESIGNED["adam"](), 0.1)
    learner = learned_optimizer(
        classification(mlp((8,)), ways=3, minibatch=None), rule, full_unroll(5), test_steps=60
    )
    episode = vectors()
    meta, state = learner.init(KEY, episode)
    adapted = jax.jit(functools.partial(learner.adapt, train=False))(
        meta, state, episode.support, KEY
    )
    outputs, _ = learner.predict(meta, adapted, episode.support.x, KEY, train=False)
    assert cross_entropy(outputs, episode.support.y)[1]["accuracy"] == 1


def test_equal_keys_give_every_rule_equal_problems():
    ask = {"steps": 2, "tasks": 6, "task_chunk": 3}
    still, again = (
        make_training_curves(quadratics(), with_rate(make(), 0.0), sample_quadratic, **ask)(
            {"rate": jnp.asarray(0.0)}, None, KEY
        )
        for make in (HAND_DESIGNED["sgd"], HAND_DESIGNED["adam"])
    )
    assert still.shape == (6, 2)
    np.testing.assert_array_equal(still, again)
    assert len(np.unique(still[:, 0])) == 6


def test_the_tuner_finds_the_best_rate_and_survives_those_that_diverge():
    rates = (1e-4, 1e-3, 1e-2, 1e3)
    ask = {"steps": 30, "tasks": 8, "task_chunk": 8}
    tuned = tune_rate(
        optax.identity(), quadratics(), sample_quadratic, None, KEY, rates=rates, **ask
    )
    assert tuned.rate == 1e-2
    assert tuned.losses[1e3] == np.inf
    curves = make_training_curves(
        quadratics(), with_rate(optax.identity(), 1.0), sample_quadratic, **ask
    )
    wanted = curves({"rate": jnp.asarray(1e-3)}, None, KEY)[:, -1].mean()
    np.testing.assert_allclose(tuned.losses[1e-3], wanted, rtol=1e-6)


def test_a_grid_on_which_all_diverges_is_refused():
    with pytest.raises(ValueError, match="give smaller ones"):
        tune_rate(
            optax.identity(),
            quadratics(),
            sample_quadratic,
            None,
            KEY,
            steps=40,
            tasks=2,
            rates=(1e3,),
        )


def test_quadratics_are_as_published():
    draw = jax.vmap(functools.partial(sample_quadratic, distribution="uniform"))
    system = draw(jax.random.split(KEY, 500)).support
    assert system.x.shape == (500, 10, 10)
    assert (system.x >= 0).all()
    np.testing.assert_allclose((system.y**2).sum((1, 2)).mean(), 10 / 3, rtol=0.05)
    system = jax.vmap(sample_quadratic)(jax.random.split(KEY, 500)).support
    np.testing.assert_allclose((system.y**2).sum((1, 2)).mean(), 10, rtol=0.05)
    with pytest.raises(ValueError, match="choose normal or uniform"):
        sample_quadratic(KEY, distribution="cauchy")


@pytest.mark.usefixtures("x64")
def test_learned_rules_are_inner_optimizers_of_maml_s_relatives():
    learner = gradient_learner(
        tanh_network(),
        SMALL,
        steps=2,
        eval_steps=2,
        adjoint=UNROLLED,
        mask=None,
        criterion=cross_entropy,
    )
    episode = vectors()
    params, state = learner.init(KEY, episode)
    _, gradient = loss_and_gradient(learner, params, state, episode, KEY)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient["rule"]):
        assert abs(leaf).max() > 0, jax.tree_util.keystr(path)
    assert abs(gradient["learner"]["network"]["w"]).max() > 0


@pytest.mark.usefixtures("x64")
def test_a_chunk_of_tasks_keeps_each_its_state():
    learner = learned_optimizer(quadratics(), SMALL, persistent_es(4, 2, sigma=0.1))
    optimizer = optax.sgd(0.01)
    ends = []
    for chunk in (1, 2):
        initial = init_train_state(learner, optimizer, sample_quadratic, None, 0, task_batch=4)
        step = make_outer_step(learner, optimizer, sample_quadratic, task_batch=4, task_chunk=chunk)
        ends.append(make_run(step)(initial, None, 3)[0])
    for end in ends[1:]:
        assert_trees_close(
            (end.params, end.state), (ends[0].params, ends[0].state), rtol=1e-9, atol=1e-9
        )
    # Each task's state is what the task alone would have.
    assert len(np.unique(ends[0].state.state.plus.params[:, 0])) == 4
