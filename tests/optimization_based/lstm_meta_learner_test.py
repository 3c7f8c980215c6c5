import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import Batch, Episode, Network
from meta_jax.networks.conv4 import conv4
from meta_jax.networks.normalisation import batch_moments, init_normalisation, normalise
from meta_jax.optimization_based.adjoints import FIRST_ORDER
from meta_jax.optimization_based.inner_loop import run_inner_loop
from meta_jax.optimization_based.lstm_meta_learner import (
    lstm_meta_learner,
    lstm_rule,
    per_task_statistics,
)
from meta_jax.optimization_based.update_rules import from_optax, log_and_sign
from tests.optimization_based.tasks import (
    KEY,
    assert_trees_close,
    images,
    tanh_network,
    two_blocks,
    vectors,
)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        (1.0, (0.0, 1.0)),
        (-0.1, (-0.23025850929940457, -1.0)),
        (math.exp(-10) * (1 + 1e-15), (-1.0, 1.0)),
        (1e-6, (-1.0, 0.02202646579480672)),
        (0.0, (-1.0, 0.0)),
    ],
)
def test_preprocessing(x, wanted):
    np.testing.assert_allclose(jax.jit(log_and_sign)(x), wanted, rtol=1e-12, atol=1e-15)


def test_preprocessing_has_a_gradient_at_zero():
    slopes = jax.jit(jax.jacobian(log_and_sign))(0.0)
    np.testing.assert_allclose(slopes, [0.0, math.exp(10)], rtol=1e-12)


def meta(rule, params, seed=0):
    """Meta-parameters away from their timid beginning."""
    shapes = jax.eval_shape(rule.init_meta, KEY, params)
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.5 * random.normal(size=leaf.shape), shapes)


def saturated(rule, params, alpha):
    shapes = jax.eval_shape(rule.init_meta, KEY, params)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    zeros["forget"]["bias"] += 1e3
    zeros["input"]["bias"] += math.log(alpha / (1 - alpha))
    return zeros


W = np.random.default_rng(0).normal(size=(4, 3))
THETA = {"a": np.array([0.3, -0.5]), "b": np.array(0.7)}


def problem(p, state, step):
    del step
    return (jnp.tanh(W @ jnp.append(p["a"], p["b"])) ** 2).sum(), state


def test_saturated_gates_are_gradient_descent():
    rule, sgd = lstm_rule(), from_optax(optax.sgd(0.05))

    @jax.jit
    def both(meta, theta):
        loops = ((rule, meta), (sgd, {}))
        return [run_inner_loop(problem, *each, theta, {}, steps=6).params for each in loops]

    end, wanted = both(saturated(rule, THETA, 0.05), THETA)
    assert_trees_close(end, wanted, rtol=1e-13)
    assert abs(np.asarray(end["a"]) - THETA["a"]).max() > 0.1


def test_the_number_of_parameters_and_how_they_begin():
    parameters = jax.tree.map(np.asarray, jax.jit(lstm_rule().init_meta)(KEY, THETA))
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters["lstm"])) == 2_000
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters["input"])) == 23
    assert 4 <= parameters["forget"]["bias"] <= 5
    assert -5 <= parameters["input"]["bias"] <= -4
    assert 0.0099 < abs(parameters["lstm"]["kernel"]).max() <= 0.01


def test_the_paper_s_network_has_its_number_of_parameters():
    batch = Batch(np.zeros((5, 84, 84, 3)), np.eye(5))
    learner = lstm_meta_learner(conv4(32, normalisation="support"))
    params, _ = jax.eval_shape(learner.init, KEY, Episode(batch, batch))
    assert sum(leaf.size for leaf in jax.tree.leaves(params["learner"])) == 32_901


def test_one_coordinate_by_hand():
    rule = lstm_rule(hidden_size=2)
    m = meta(rule, THETA)
    update, preprocess = jax.jit(rule.update), jax.jit(log_and_sign)
    theta, state = 0.4, jax.jit(rule.init)(m, np.array([0.4]))
    h = c = np.zeros(2)
    before = {"input": 0.0, "forget": 0.0}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for gradient, loss in ((0.5, 2.0), (-1e-6, 0.3)):
        seen = np.concatenate([preprocess(loss), preprocess(gradient), h])
        f, i, o, g = np.split(seen @ m["lstm"]["kernel"] + m["lstm"]["bias"], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        for name in before:
            inputs = np.concatenate([h, [theta, before[name]]])
            before[name] = float((inputs @ m[name]["kernel"] + m[name]["bias"])[0])
        wanted = sigmoid(before["forget"]) * theta - sigmoid(before["input"]) * gradient
        updates, state = update(m, np.array([gradient]), state, np.array([theta]), loss=loss)
        theta = theta + float(np.asarray(updates)[0])
        np.testing.assert_allclose(theta, wanted, rtol=1e-12)


def test_permuted_coordinates_permute_the_updates():
    rule = lstm_rule(hidden_size=3)
    random = np.random.default_rng(1)
    theta, gradients = random.normal(size=(2, 600))  # more than one chunk on a CPU
    order = random.permutation(600)

    m = meta(rule, theta)
    init, update = jax.jit(rule.init), jax.jit(rule.update)

    def run(theta, gradient):
        state = init({}, theta)
        for _ in range(3):
            updates, state = update(m, gradient, state, theta, loss=0.5)
            theta = theta + np.asarray(updates)
        return theta

    moved = run(theta, gradients)
    np.testing.assert_allclose(run(theta[order], gradients[order]), moved[order], rtol=1e-12)
    assert abs(moved[order] - moved).max() > 1e-2


def test_independent_gradients_leave_no_hessian():
    """d theta_T / d c_0 is that of a replay with the same gradients and losses as constants."""
    rule = lstm_rule(hidden_size=3)
    m = meta(rule, THETA)

    def end(theta):
        return run_inner_loop(problem, rule, m, theta, {}, steps=3, adjoint=FIRST_ORDER).params

    def unrolled_end(theta):
        return run_inner_loop(problem, rule, m, theta, {}, steps=3).params

    @jax.jit
    def observe(theta):
        seen, state = [], rule.init(m, theta)
        for _ in range(3):
            (loss, _), gradient = jax.value_and_grad(problem, has_aux=True)(theta, {}, 0)
            seen.append((loss, gradient))
            updates, state = rule.update(m, gradient, state, theta, loss=loss)
            theta = optax.apply_updates(theta, updates)
        return seen

    def replay(theta, seen):
        state = rule.init(m, theta)
        for loss, gradient in seen:
            updates, state = rule.update(m, gradient, state, theta, loss=loss)
            theta = optax.apply_updates(theta, updates)
        return theta

    @jax.jit
    def jacobians(theta, seen):
        ours = (jax.jacobian(f)(theta) for f in (end, unrolled_end))
        return *ours, jax.jacobian(replay)(theta, seen)

    found, unrolled, wanted = jax.tree.map(np.asarray, jacobians(THETA, observe(THETA)))
    assert_trees_close(found, wanted, atol=1e-10)
    assert abs(unrolled["b"]["b"] - found["b"]["b"]) > 1e-3


def test_statistics_begin_anew_in_every_task_and_are_averaged_over_its_steps():
    network = two_blocks("support")
    learner = lstm_meta_learner(network, steps=2, momentum=0.8, hidden_size=2)
    params, state = jax.jit(learner.init)(KEY, vectors())
    _, aux = jax.jit(learner.loss)(params, state, vectors(), KEY)
    assert_trees_close(aux.state, state)
    # Saturated at a rate of zero, the parameters stay: each step sees the same statistics.
    still = {**params, "rule": saturated(lstm_rule(2), params["learner"], 1e-300)}

    @jax.jit
    def adapted_and_wanted(params, support, query):
        adapted = learner.adapt(params, state, support, KEY, train=True)
        body = params["learner"]["network"]
        _, own = network.apply(body, state, support.x, key=None, train=True, moments="replace")
        # Two steps, and once more after the last update.
        wanted = jax.tree.map(lambda old, new: 0.2**3 * old + (1 - 0.2**3) * new, state, own)
        queries, same = per_task_statistics(network, 0.8).apply(
            body, wanted, query.x, key=None, train=False, moments="stored"
        )
        return adapted.state, wanted, queries, same

    found, wanted, queries, same = adapted_and_wanted(still, *vectors())
    assert_trees_close(found, wanted)
    assert_trees_close(same, wanted)
    assert np.isfinite(queries).all()


def test_the_count_of_tasknorm_is_not_averaged():
    network = per_task_statistics(normalised_maps("tasknorm"), 0.8)

    @jax.jit
    def new_and_batch(x):
        params, state = network.init(KEY, x)
        _, new = network.apply(params, state, x, key=None, train=True, moments="replace")
        return new, batch_moments(x)

    new, batch = jax.tree.map(np.asarray, new_and_batch(images().support.x))
    assert new["count"] == 6
    np.testing.assert_allclose(new["mean"], 0.8 * batch.mean)
    np.testing.assert_allclose(new["var"], 0.2 + 0.8 * batch.var)


def normalised_maps(mode):
    """Normalisation of images alone."""

    def init(key, x):
        return init_normalisation(x.shape[-1], mode)

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        return normalise(params, state, x, mode=mode, moments=moments, mask=mask)

    return Network(init, apply, mode)


def test_the_rule_needs_the_loss():
    rule = lstm_rule(2)
    params = np.ones(3)
    with pytest.raises(TypeError, match="give it loss="):
        rule.update(meta(rule, params), params, rule.init({}, params), params)
    with pytest.raises(ValueError, match="must be at least 1"):
        lstm_rule(0)


def test_it_learns_to_learn_one_task():
    learner = lstm_meta_learner(tanh_network(), steps=3, hidden_size=4)
    params, state = jax.jit(learner.init)(KEY, vectors())
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(params, opt_state):
        loss, gradient = jax.value_and_grad(lambda p: learner.loss(p, state, vectors(), KEY)[0])(
            params
        )
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = optimizer.init(params), []
    for _ in range(30):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
