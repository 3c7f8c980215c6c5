import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax import registry
from meta_jax.core import Batch, Episode, Network, Objective, Tasks
from meta_jax.data.source import EpisodeSize, load_source
from meta_jax.lookup import UsageError
from meta_jax.networks.mlp import mlp
from meta_jax.networks.normalisation import init_normalisation, normalise
from meta_jax.objectives import cross_entropy
from meta_jax.optimization_based.adjoints import UNROLLED
from meta_jax.optimization_based.learned_optimizers.estimators import (
    full_unroll,
    persistent_es,
    truncated_gradient,
)
from meta_jax.optimization_based.learned_optimizers.families import (
    ProblemFamily,
    draw_minibatch,
    network_family,
)
from meta_jax.optimization_based.learned_optimizers.hand_designed import (
    HAND_DESIGNED,
    with_learning_rate,
)
from meta_jax.optimization_based.learned_optimizers.learned_optimizer import (
    last_loss_objective,
    learned_optimizer,
    make_training_curves,
    training_run,
)
from meta_jax.optimization_based.learned_optimizers.lstm import coordinatewise_lstm
from meta_jax.optimization_based.learned_optimizers.mlp import adafactor_mlp_rule, mlp_rule
from meta_jax.optimization_based.learned_optimizers.quadratics import (
    quadratics,
    sample_quadratic,
    sum_of_squares,
)
from meta_jax.optimization_based.learned_optimizers.tuning import tune_learning_rate
from meta_jax.optimization_based.learner import gradient_learner
from meta_jax.training.outer_step import init_train_state, make_outer_step
from meta_jax.training.train_loop import make_train_loop
from tests.checkers import key_and_leak_checks
from tests.optimization_based.tasks import (
    KEY,
    assert_trees_close,
    loss_and_gradient,
    tanh_network,
    vectors,
)
from tests.random_trees import dtypes, moved

QUADRATICS = Tasks(sample_quadratic, (), sum_of_squares)
SMALL = coordinatewise_lstm((3,), preprocessing=None, output_scale=1.0)


def tanh_family():
    """Smooth, so that finite differences are exact."""
    return network_family(tanh_network(3))


def directional(function, meta, direction, step=1e-5):
    """The central difference of a function of the meta-parameters."""
    ahead = function(jax.tree.map(lambda m, d: m + step * d, meta, direction))
    behind = function(jax.tree.map(lambda m, d: m - step * d, meta, direction))
    return (np.asarray(ahead) - np.asarray(behind)) / (2 * step)


def inner_product(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (np.asarray(a) * b).sum(), a, b)))


def compiled(run, steps):
    """A run's init and advance, where all the arguments are arrays."""
    return jax.jit(run.init), jax.jit(functools.partial(run.advance, steps=steps))


def small_meta():
    return jax.jit(SMALL.init_meta)(KEY, np.zeros(2))


def pieces(adjoint):
    run = training_run(tanh_family(), SMALL, adjoint=adjoint)
    episode = vectors()
    zeros = jax.tree.map(np.zeros_like, small_meta())
    meta, direction = moved(small_meta()), moved(zeros, by=1.0, seed=3)
    meta, direction = jax.tree.map(np.asarray, (meta, direction))
    start = jax.jit(run.init)(meta, episode, KEY)
    return run, meta, direction, start


@pytest.mark.usefixtures("x64")
def test_second_derivatives_on_equal_finite_differences():
    run, meta, direction, start = pieces("unrolled")

    @jax.jit
    def loss(meta):
        return run.advance(meta, start, KEY, 4)[1].mean()

    slope = inner_product(jax.jit(jax.grad(loss))(meta), direction)
    np.testing.assert_allclose(slope, directional(loss, meta, direction), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_second_derivatives_off_equal_finite_differences_with_the_gradients_held():
    run, meta, direction, start = pieces("first_order")

    def mean_loss(meta):
        found = run.advance(meta, start, KEY, 4)[1]
        return found.mean(), found

    gradient, of_the_run = jax.jit(jax.grad(mean_loss, has_aux=True))(meta)
    slope = inner_product(gradient, direction)
    network = tanh_family().network(start.batch)

    def loss_at(params):
        outputs, _ = network.apply(params, {}, start.batch.x, key=None, train=True)
        return cross_entropy.loss(outputs, start.batch.y, None)[0]

    def losses(meta, gradients):
        """The run's losses; with gradients given, the rule sees these and not its own."""
        params, state, found, seen = start.params, start.rule_state, [], []
        for step in range(4):
            seen.append(jax.grad(loss_at)(params) if gradients is None else gradients[step])
            updates, state = SMALL.update(meta, seen[-1], state, params)
            params = optax.apply_updates(params, updates)
            found.append(loss_at(params))
        return jnp.stack(found), seen

    found, held = jax.jit(lambda meta: losses(meta, None))(meta)
    np.testing.assert_allclose(of_the_run, found, rtol=1e-10)
    numeric = directional(jax.jit(lambda m: losses(m, held)[0].mean()), meta, direction)
    np.testing.assert_allclose(slope, numeric, rtol=1e-6)
    # And that is not what the exact derivative gives.
    exact = directional(jax.jit(lambda m: losses(m, None)[0].mean()), meta, direction)
    assert abs(slope - exact) > 1e-3 * abs(exact)


@pytest.mark.usefixtures("x64")
def test_losses_are_those_after_each_step():
    rule, meta = with_learning_rate(optax.identity(), 0.01), {"learning_rate": 0.01}
    run = training_run(quadratics(), rule, objective=sum_of_squares)
    episode = jax.jit(sample_quadratic)(KEY)
    init, advance = compiled(run, 3)
    start = init(meta, episode, jax.random.key(1))
    w, y = np.asarray(episode.support.x), np.asarray(episode.support.y)[:, 0]
    theta, wanted = np.asarray(start.params), []
    for _ in range(3):
        theta = theta - 0.01 * 2 * w.T @ (w @ theta - y)
        wanted.append(((w @ theta - y) ** 2).sum())
    end, losses = advance(meta, start, KEY)
    np.testing.assert_allclose(losses, wanted, rtol=1e-10)
    np.testing.assert_allclose(end.params, theta, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_segments_go_on_where_the_last_one_ended():
    run = training_run(tanh_family(), SMALL)
    meta = small_meta()
    init, advance = compiled(run, 4)
    _, advance_half = compiled(run, 2)
    start = init(meta, vectors(), KEY)
    whole, losses = advance(meta, start, KEY)
    half, first = advance_half(meta, start, KEY)
    end, second = advance_half(meta, half, KEY)
    assert_trees_close(end, whole)
    np.testing.assert_allclose(np.concatenate([first, second]), losses, rtol=1e-10)


def test_minibatches_are_drawn_anew_and_are_no_larger():
    seen = []

    def loss(outputs, y, mask):
        assert mask is None
        seen.append(y.shape)
        return (outputs.sum(-1) * jnp.arange(outputs.shape[0])).sum(), {}

    family = ProblemFamily(lambda batch: mlp((2,)), minibatch=4)
    rule = with_learning_rate(optax.identity(), 0.0)
    run = training_run(family, rule, objective=Objective(loss, "loss", maximise=False))
    meta = {"learning_rate": 0.0}
    init, advance = compiled(run, 5)
    _, losses = advance(meta, init(meta, vectors(), KEY), KEY)
    assert set(seen) == {(4, 3)}
    assert len(np.unique(losses)) == 5  # the parameters stay where they are


@pytest.mark.parametrize("rule", [SMALL, adafactor_mlp_rule((2,))])
def test_a_rule_is_learned(rule):
    learner = learned_optimizer(
        quadratics(), rule, truncated_gradient(8, 4), objective=sum_of_squares
    )
    optimizer = optax.adam(1e-2)
    initial = init_train_state(learner, optimizer, QUADRATICS, 0, task_batch=4)
    before = jax.tree.map(np.asarray, initial.params)
    step = make_outer_step(learner, optimizer, sample_quadratic, task_batch=4, task_chunk=4)
    state, metrics, finite = make_train_loop(step)(initial, (), 3)
    assert finite
    assert metrics["loss"] > 0
    assert state.state.age.tolist() == [4] * 4  # 4, 8, and 4 of the next run
    first, second, *_ = np.asarray(state.state.run.batch.x)
    assert abs(first - second).max() > 0.1
    change = jax.tree.map(lambda a, b: abs(a - np.asarray(b)).max(), before, state.params)
    assert max(jax.tree.leaves(change)) > 1e-3


def test_adapt_trains_a_network_and_predict_asks_it():
    rule = with_learning_rate(HAND_DESIGNED["adam"](), 0.1)
    learner = learned_optimizer(network_family(mlp((8,))), rule, full_unroll(5), test_steps=60)
    episode = vectors()

    @jax.jit
    def accuracy_of_the_support_set(key):
        meta, state = learner.init(key, episode)
        adapted = learner.adapt(meta, state, episode.support, key, train=False)
        outputs, _ = learner.predict(meta, adapted, episode.support.x, key, train=False)
        return cross_entropy.loss(outputs, episode.support.y, None)[1]["accuracy"]

    assert accuracy_of_the_support_set(KEY) == 1


@pytest.mark.usefixtures("x64")
def test_evaluate_gives_what_a_training_curve_does():
    rule, meta = with_learning_rate(optax.identity(), 0.01), {"learning_rate": jnp.asarray(0.01)}
    learner = learned_optimizer(quadratics(), rule, full_unroll(3), objective=sum_of_squares)
    task_key, key = jax.random.split(KEY)
    task = jax.jit(sample_quadratic)(task_key)
    found = jax.jit(learner.evaluate)(meta, {}, task, key)
    theta, losses = 0.01 * np.asarray(jax.random.normal(jax.random.split(key)[0], (10,))), []
    w, y = np.asarray(task.support.x), np.asarray(task.support.y)[:, 0]
    for _ in range(3):  # as many as the estimator's horizon
        theta = theta - 0.01 * 2 * w.T @ (w @ theta - y)
        losses.append(((w @ theta - y) ** 2).sum())
    np.testing.assert_allclose(found["last_loss"], losses[-1], rtol=1e-10)
    np.testing.assert_allclose(found["loss"], np.mean(losses), rtol=1e-10)


def test_a_rule_is_selected_by_its_last_loss_whatever_the_tasks_ask():
    for objective in (cross_entropy, sum_of_squares):
        selection = last_loss_objective(objective)
        assert (selection.metric, selection.maximise, selection.unit) == ("last_loss", False, "")
        assert selection.loss is objective.loss


def padded(batch, rows=3):
    """The batch with rubbish in between its rows, and the mask that says so."""
    n = batch.y.shape[0]
    order = np.random.default_rng(0).permutation(n + rows)
    mask = order < n
    place = np.where(mask, np.cumsum(mask) - 1, 0)
    x, y = (np.where(mask[:, None], np.asarray(leaf)[place], 7.0) for leaf in (batch.x, batch.y))
    return Batch(x, y, mask)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("minibatch", [None, 4])
def test_padding_changes_no_training(minibatch):
    def init(key, x):
        scale, state = init_normalisation(4, "batch")
        return {"w": jax.random.normal(key, (4, 4)), "normalisation": scale}, state

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        return normalise(
            params["normalisation"],
            state,
            x @ params["w"],
            mode="batch",
            moments=moments,
            mask=mask,
        )

    family = network_family(Network(init, apply, "batch"), minibatch=minibatch)
    rule, meta = with_learning_rate(optax.identity(), 0.1), {"learning_rate": 0.1}
    run = training_run(family, rule)
    support = vectors().support
    ends = []
    init, advance = compiled(run, 3)
    for batch in (support, padded(support)):
        start = init(meta, Episode(batch, batch), KEY)
        end, losses = advance(meta, start, KEY)
        ends.append((end.params, losses))
    assert_trees_close(*ends)


def test_minibatches_of_dictionaries_come_from_the_same_rows():
    x = {"ids": np.arange(6), "half": np.arange(6) / 2}
    y = np.arange(6.0)[:, None]
    drawn = jax.jit(draw_minibatch, static_argnums=2)(KEY, Batch(x, y), 5)
    labels = np.asarray(drawn.y)[:, 0]
    np.testing.assert_array_equal(drawn.x["ids"], labels)
    np.testing.assert_array_equal(drawn.x["half"], labels / 2)
    assert drawn.x["ids"].dtype == jnp.int32


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_all_is_finite_and_in_the_precision_of_what_comes_in(dtype):
    learner = learned_optimizer(tanh_family(), SMALL, truncated_gradient(4, 2))
    inputs = *jax.jit(learner.init)(KEY, vectors()), vectors()
    params, state, episode = jax.tree.map(
        lambda leaf: np.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        inputs,
    )

    def both(params, state, episode):
        adapted = learner.adapt(params, state, episode.support, KEY, train=False)
        outputs, _ = learner.predict(params, adapted, episode.query.x, KEY, train=False)
        loss, aux = learner.loss(params, state, episode, KEY)
        return outputs, loss, aux.state

    outputs, loss, new = jax.jit(both)(params, state, episode)
    assert outputs.dtype == loss.dtype == dtype
    assert np.isfinite(np.float32(outputs)).all() and np.isfinite(np.float32(loss))
    assert dtypes(new) == dtypes(state)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "estimator", [full_unroll(1), truncated_gradient(2, 1), persistent_es(2, 1)]
)
def test_a_loss_uses_no_key_twice_and_leaks_no_tracer(estimator):
    with key_and_leak_checks():

        def gradient(key):
            # Built here too: what a factory computes once must not stay in a trace.
            family, rule = network_family(mlp((2,)), minibatch=2), mlp_rule((2,))
            learner = learned_optimizer(family, rule, estimator)
            init_key, loss_key = jax.random.split(key)
            params, state = learner.init(init_key, vectors())
            return jax.grad(lambda p: learner.loss(p, state, vectors(), loss_key)[0])(params)

        jax.block_until_ready(jax.jit(gradient)(jax.random.key(5)))


@pytest.mark.usefixtures("x64")
def test_a_test_uses_no_key_twice_and_leaks_no_tracer():
    learner = learned_optimizer(network_family(mlp((2,)), minibatch=2), SMALL, full_unroll(1))
    with key_and_leak_checks():

        def test(key):
            keys = jax.random.split(key, 4)
            params, state = learner.init(keys[0], vectors())
            adapted = learner.adapt(params, state, vectors().support, keys[1], train=False)
            outputs, _ = learner.predict(params, adapted, vectors().query.x, keys[2], train=False)
            return outputs, learner.evaluate(params, state, vectors(), keys[3])

        jax.block_until_ready(jax.jit(test)(jax.random.key(5)))


def test_equal_keys_give_every_rule_equal_problems():
    ask = {"steps": 2, "num_tasks": 6, "task_chunk": 3}
    still, again = (
        make_training_curves(quadratics(), with_learning_rate(make(), 0.0), QUADRATICS, **ask)(
            {"learning_rate": jnp.asarray(0.0)}, KEY
        )
        for make in (HAND_DESIGNED["sgd"], HAND_DESIGNED["adam"])
    )
    assert still.shape == (6, 2)
    np.testing.assert_array_equal(still, again)
    assert len(np.unique(np.asarray(still)[:, 0])) == 6


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"num_tasks": 0}, {"task_chunk": 0}])
def test_curves_of_nothing_are_refused(wrong):
    ask = {"steps": 2, "num_tasks": 6, "task_chunk": 3, **wrong}
    with pytest.raises(UsageError, match="at least 1"):
        make_training_curves(quadratics(), SMALL, QUADRATICS, **ask)


def test_the_tuner_finds_the_best_rate_and_survives_those_that_diverge():
    rates = (1e-4, 1e-3, 1e-2, 1e3)
    ask = {"steps": 30, "num_tasks": 8, "task_chunk": 8}
    tuned = tune_learning_rate(
        optax.identity(), quadratics(), QUADRATICS, KEY, learning_rates=rates, **ask
    )
    assert tuned.learning_rate == 1e-2
    assert tuned.losses[1e3] == np.inf
    curves = make_training_curves(
        quadratics(), with_learning_rate(optax.identity(), 1.0), QUADRATICS, **ask
    )
    wanted = np.asarray(curves({"learning_rate": jnp.asarray(1e-3)}, KEY))[:, -1].mean()
    np.testing.assert_allclose(tuned.losses[1e-3], wanted, rtol=1e-6)


@pytest.mark.parametrize("rates", [(1e3,), ()])
def test_a_grid_on_which_all_diverges_is_refused(rates):
    with pytest.raises(UsageError, match="give smaller ones"):
        tune_learning_rate(
            optax.identity(),
            quadratics(),
            QUADRATICS,
            KEY,
            steps=40,
            num_tasks=2,
            learning_rates=rates,
        )


def test_quadratics_are_as_published():
    keys, draw = jax.random.split(KEY, 500), jax.vmap(sample_quadratic)
    draw_uniform = jax.vmap(functools.partial(sample_quadratic, distribution="uniform"))
    system = jax.tree.map(np.asarray, jax.jit(draw_uniform)(keys).support)
    assert system.x.shape == (500, 10, 10)
    assert (system.x >= 0).all()
    np.testing.assert_allclose((system.y**2).sum((1, 2)).mean(), 10 / 3, rtol=0.05)
    system = jax.tree.map(np.asarray, jax.jit(draw)(keys).support)
    np.testing.assert_allclose((system.y**2).sum((1, 2)).mean(), 10, rtol=0.05)
    with pytest.raises(UsageError, match="choose normal or uniform"):
        sample_quadratic(KEY, distribution="cauchy")


def test_quadratics_are_a_source_of_tasks_with_settings_of_their_own():
    source = load_source("quadratics", dimensions=3, distribution="uniform")
    tasks = source.tasks("val", EpisodeSize(5, 1, 15), train=False)
    episode = tasks.sample(KEY, tasks.data)
    assert episode.support.x.shape == (3, 3)
    assert (episode.support.x >= 0).all()
    assert tasks.objective.name.endswith(":sum_of_squares")
    with pytest.raises(UsageError, match="cauchy"):
        load_source("quadratics", distribution="cauchy")


def test_the_sum_of_squares_forgets_padding_and_broadcasts_nothing():
    outputs, y = np.array([[1.0], [2.0], [9.0]]), np.zeros((3, 1))
    loss, metrics = jax.jit(sum_of_squares.loss)(outputs, y, np.array([True, True, False]))
    assert loss == metrics["squares"] == 5
    with pytest.raises(ValueError, match="differ in shape"):
        sum_of_squares.loss(outputs[:, 0], y, None)


def test_quadratics_of_something_else_are_refused():
    run = training_run(quadratics(), SMALL, objective=sum_of_squares)
    meta = jax.eval_shape(SMALL.init_meta, KEY, np.zeros(2))
    with pytest.raises(UsageError, match="quadratics"):
        jax.eval_shape(run.init, meta, vectors(), KEY)


@pytest.mark.parametrize(
    ("name", "settings", "outputs"),
    [
        ("quadratics", {}, (10, 1)),
        ("mlp", {"width": 3, "depth": 2, "activation": "tanh"}, (6, 3)),
        ("convnet", {"features": 2}, (6, 3)),
    ],
)
def test_a_family_is_found_by_its_name_and_its_settings_are_its_own(name, settings, outputs):
    component = registry.find("family", name)
    known = registry.settings(component)
    assert set(settings) <= set(known)
    assert all(setting.doc for setting in known.values())
    batch = Batch(jnp.zeros((6, 8, 8, 1)), np.eye(3).repeat(2, 0))
    if name == "quadratics":
        batch = jax.jit(sample_quadratic)(KEY).support
    network = component.factory(**settings).network(batch)

    def ask(key):
        params, state = network.init(key, batch.x)
        return network.apply(params, state, batch.x, key=key, train=True, moments="batch")[0]

    assert jax.eval_shape(ask, KEY).shape == outputs


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mlp", {"width": 0}),
        ("mlp", {"activation": "gelu-ish"}),
        ("mlp", {"minibatch": 0}),
        ("convnet", {"minibatch": -1}),
    ],
)
def test_families_that_cannot_be_are_refused(name, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong.values()))}"):
        registry.find("family", name).factory(**wrong)


@pytest.mark.usefixtures("x64")
def test_learned_rules_are_inner_optimizers_of_maml_s_relatives():
    learner = gradient_learner(
        tanh_network(),
        SMALL,
        steps=2,
        eval_steps=2,
        adjoint=UNROLLED,
        mask=None,
        objective=cross_entropy,
    )
    episode = vectors()
    params, state = jax.jit(learner.init)(KEY, episode)
    _, gradient = loss_and_gradient(learner, params, state, episode, KEY)
    gradient = jax.tree.map(np.asarray, gradient)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient["rule"]):
        assert abs(leaf).max() > 0, jax.tree_util.keystr(path)
    assert abs(gradient["learner"]["network"]["w"]).max() > 0


@pytest.mark.usefixtures("x64")
def test_a_chunk_of_tasks_keeps_each_its_state():
    learner = learned_optimizer(
        quadratics(), SMALL, persistent_es(4, 2, sigma=0.1), objective=sum_of_squares
    )
    optimizer = optax.sgd(0.01)
    ends = []
    for chunk in (1, 2):
        initial = init_train_state(learner, optimizer, QUADRATICS, 0, task_batch=4)
        step = make_outer_step(learner, optimizer, sample_quadratic, task_batch=4, task_chunk=chunk)
        ends.append(make_train_loop(step)(initial, (), 3)[0])
    for end in ends[1:]:
        assert_trees_close(
            (end.params, end.state), (ends[0].params, ends[0].state), rtol=1e-9, atol=1e-9
        )
    # Each task's state is what the task alone would have.
    assert len(np.unique(np.asarray(ends[0].state.run.plus.params)[:, 0])) == 4
