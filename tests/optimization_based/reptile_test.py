import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from meta_jax.networks.layers import linear
from meta_jax.networks.mlp import mlp
from meta_jax.networks.normalisation import batch_moments
from meta_jax.objectives import squared_error, squared_error_loss
from meta_jax.optimization_based.adjoints import FIRST_ORDER, UNROLLED
from meta_jax.optimization_based.inner_loop import run_inner_loop
from meta_jax.optimization_based.reptile import masked_minibatches, minibatches, reptile
from meta_jax.optimization_based.update_rules import from_optax
from meta_jax.training.outer_step import TrainState, make_outer_step
from tests.optimization_based.tasks import (
    KEY,
    assert_trees_close,
    identity_network,
    loss_and_gradient,
    normalised_network,
    padded,
    tanh_network,
    vectors,
)
from tests.random_trees import normal

pytestmark = pytest.mark.usefixtures("x64")

ALPHA = 0.1


def whole_batches(network, **settings):
    """SGD on the whole support set."""
    settings = {"batch_size": None, "eval_batch_size": None, "carry": False, **settings}
    return reptile(network, inner_optimizer=optax.sgd(ALPHA), **settings)


@functools.cache
def quadratic():
    """A linear model's squared error: parameters, and its derivatives by the flat ones."""
    learner = whole_batches(identity_network(), objective=squared_error)

    @jax.jit
    def pieces(key, episode):
        params, _ = learner.init(key, episode)
        flat, unravel = ravel_pytree(params)
        x, y, _ = episode.support
        loss = lambda p: squared_error_loss(linear(unravel(p)["head"], x), y)[0]  # noqa: E731
        return params, jax.grad(loss)(flat), jax.hessian(loss)(flat)

    return jax.tree.map(np.asarray, pieces(KEY, vectors()))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_on_one_batch_sum_its_gradients(steps):
    """(phi - U(phi)) / alpha = sum_{j<k} (I - alpha A)^j grad L(phi), for k = 1 the gradient."""
    params, slope, hessian = quadratic()
    learner = whole_batches(identity_network(), steps=steps, objective=squared_error)
    value, gradient = loss_and_gradient(
        learner, params, {"network": {}, "rule": {}}, vectors(), KEY
    )
    contraction = np.eye(len(slope)) - ALPHA * hessian
    wanted = sum(np.linalg.matrix_power(contraction, j) for j in range(steps)) @ slope
    found = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
    np.testing.assert_allclose(found / ALPHA, wanted, rtol=1e-10)
    np.testing.assert_allclose(value, (found**2).sum() / 2, rtol=1e-12)


def two_batches():
    """Two smooth losses L_1, L_2 of three numbers; the inner loop's step t takes L_{t + 1}."""
    w = normal(2, 4, 3)
    return lambda p, t: (jnp.tanh(w[t] @ p) ** 2).sum() + jnp.sin(p).sum() * (t + 1)


@pytest.mark.parametrize("method", ["maml", "first_order", "reptile"])
def test_the_expansion_in_the_inner_rate(method):
    """To O(alpha^2), gradients g and Hessians H at phi (section 5.1); residuals fall 4 times."""
    loss = two_batches()

    def end(phi, alpha, steps, adjoint):
        problem = lambda p, state, step: (loss(p, step), state)  # noqa: E731
        rule = from_optax(optax.sgd(alpha))
        return run_inner_loop(problem, rule, {}, phi, {}, steps=steps, adjoint=adjoint).params

    @jax.jit
    def residual(phi, alpha):
        g1, g2 = (jax.grad(loss)(phi, t) for t in (0, 1))
        h1, h2 = (jax.hessian(loss)(phi, t) for t in (0, 1))
        if method == "reptile":
            found = (phi - end(phi, alpha, 2, FIRST_ORDER)) / alpha
            expansion = g1 + g2 - alpha * h2 @ g1
        else:
            adjoint = UNROLLED if method == "maml" else FIRST_ORDER
            found = jax.grad(lambda p: loss(end(p, alpha, 1, adjoint), 1))(phi)
            expansion = g2 - alpha * h2 @ g1 - (alpha * h1 @ g2 if method == "maml" else 0)
        return jnp.linalg.norm(found - expansion)

    phi = np.array([0.3, -0.5, 0.2])
    large, middle, small = (float(residual(phi, alpha)) for alpha in (2e-3, 1e-3, 5e-4))
    np.testing.assert_allclose([large / middle, middle / small], 4, rtol=0.02)
    assert small > 1e-8


@pytest.mark.parametrize(("epsilon", "tasks"), [(1.0, 1), (0.25, 1), (0.5, 3)])
def test_the_outer_step_goes_towards_the_adapted_parameters(epsilon, tasks):
    learner = whole_batches(tanh_network(), steps=3)
    params, state = jax.jit(learner.init)(KEY, vectors())
    drawn = [vectors(seed) for seed in range(tasks)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
    optimizer = optax.sgd(epsilon)

    # Task i has the i-th key of the step; drawing it counts the keys before it.
    @jax.jit
    def first_keys(key):
        keys = jax.random.split(jax.random.fold_in(key, 0), tasks)
        return jax.random.key_data(jax.vmap(jax.random.split)(keys)[:, 0])

    firsts = first_keys(KEY)

    def sampler(key, data):
        index = (jax.random.key_data(key) == firsts).all(-1).argmax()
        return jax.tree.map(lambda a: a[index], data)

    outer_step = make_outer_step(learner, optimizer, sampler, task_batch=tasks)
    start = TrainState(jnp.zeros((), jnp.int32), params, state, optimizer.init(params), KEY)
    after, _ = jax.jit(outer_step)(start, stacked)
    adapt = jax.jit(functools.partial(learner.adapt, train=True))
    adapted = [adapt(params, state, episode.support, KEY).params for episode in drawn]
    params, adapted = jax.tree.map(np.asarray, (params, adapted))
    wanted = jax.tree.map(lambda p, *ends: p + epsilon * (sum(ends) / tasks - p), params, *adapted)
    assert_trees_close(after.params, wanted)
    if epsilon == tasks == 1:
        assert_trees_close(after.params, adapted[0])


def test_minibatches_cycle_through_a_reshuffled_set():
    rows = np.asarray(jax.jit(lambda key: minibatches(key, 6, 4, 5))(KEY))
    assert rows.shape == (5, 4)
    rounds = rows.reshape(-1)[:18].reshape(3, 6)
    np.testing.assert_array_equal(np.sort(rounds, 1), np.tile(np.arange(6), (3, 1)))
    assert (rounds[0] != rounds[1]).any()
    assert jax.eval_shape(lambda key: minibatches(key, 5, 10, 2), KEY).shape == (2, 10)


def test_the_inner_optimizer_s_state_goes_on_from_task_to_task():
    adam = optax.adam(0.01, b1=0.0)
    learner = reptile(tanh_network(), inner_lr=0.01, steps=2, batch_size=None)
    params, state = jax.jit(learner.init)(KEY, vectors())
    opt_state = jax.jit(adam.init)(params)
    loss, adapt = jax.jit(learner.loss), jax.jit(functools.partial(learner.adapt, train=True))

    def loss_by_hand(p, batch):
        z = jnp.tanh(batch.x @ p["network"]["w"] + p["network"]["b"])
        return -(batch.y * jax.nn.log_softmax(linear(p["head"], z))).sum(1).mean()

    @jax.jit
    def two_steps(p, opt_state, batch):
        for _ in range(2):
            updates, opt_state = adam.update(jax.grad(loss_by_hand)(p, batch), opt_state)
            p = optax.apply_updates(p, updates)
        return p, opt_state

    for seed in range(2):
        episode = vectors(seed)
        before = params, state
        state = loss(params, state, episode, KEY)[1].state
        p, opt_state = two_steps(params, opt_state, episode.support)
        kept, theirs = state["rule"][0], opt_state[0]
        assert_trees_close(kept.nu, theirs.nu)
        assert kept.count == theirs.count == 2 * (seed + 1)
        assert {leaf.dtype for leaf in jax.tree.leaves(kept.nu)} == {jnp.dtype("float64")}
        assert kept.count.dtype == jnp.int32  # a counter, which is not averaged over tasks
        assert_trees_close(adapt(*before, episode.support, KEY).params, p)
    _, fresh = jax.eval_shape(reptile(tanh_network(), carry=False).init, KEY, vectors())
    assert fresh["rule"] == {}


def test_a_query_is_normalised_with_the_other_queries_or_with_the_support():
    """The paper's transductive rows and its others; a third mode keeps the support's moments."""
    params, state = jax.jit(whole_batches(normalised_network()).init)(KEY, vectors())
    support, query = vectors()
    support_x, query_x = np.asarray(support.x), np.asarray(query.x)

    @functools.partial(jax.jit, static_argnums=0)
    def logits(mode):
        learner = whole_batches(normalised_network(mode), eval_steps=2)
        adapted = learner.adapt(params, state, support, KEY, train=False)
        return learner.predict(params, adapted, query.x, KEY, train=False)[0], adapted.params

    network = normalised_network()

    @jax.jit
    def joint(p, x):
        stats = state["network"]
        z, _ = network.apply(p["network"], stats, x, key=None, train=False, moments="batch")
        return linear(p["head"], z)

    transductive, adapted = logits("batch")
    np.testing.assert_allclose(transductive, joint(adapted, query.x), atol=1e-9)
    inductive, same = logits("one_at_a_time")
    assert_trees_close(adapted, same)
    with_support, same = logits("support")
    assert_trees_close(adapted, same)

    @jax.jit
    def given_the_support(p):
        moments = batch_moments(support.x @ p["network"]["w"])._asdict()
        z, _ = network.apply(p["network"], moments, query.x, key=None, train=False)
        return linear(p["head"], z)

    np.testing.assert_allclose(with_support, given_the_support(adapted), atol=1e-9)
    for i in (0, 3):
        alone = joint(adapted, np.concatenate([support_x, query_x[i : i + 1]]))
        np.testing.assert_allclose(np.asarray(inductive)[i], np.asarray(alone)[-1], atol=1e-9)


def test_minibatches_of_a_padded_set_leave_padding_out():
    mask = np.array([True, False, True, True, False])
    draw = jax.jit(masked_minibatches, static_argnums=(2, 3))
    rows = np.asarray(draw(KEY, mask, 2, 6)).reshape(-1, 3)
    np.testing.assert_array_equal(np.sort(rows, 1), np.tile([0, 2, 3], (4, 1)))
    assert len({tuple(order) for order in rows}) > 1
    # A set that is all padding has no rows: the step sees one of padding, and loses nothing.
    assert draw(KEY, np.zeros(3, bool), 2, 2).shape == (2, 2)


def test_padding_changes_no_answer():
    learner = reptile(tanh_network(), inner_lr=0.01, eval_steps=4, eval_batch_size=3)
    params, state = jax.jit(learner.init)(KEY, vectors())

    @jax.jit
    def answers(support):
        adapted = learner.adapt(params, state, support, KEY, train=False)
        return learner.predict(params, adapted, vectors().query.x, KEY, train=False)[0]

    small, large = (padded(vectors().support, value=value) for value in (1.0, -1e3))
    np.testing.assert_array_equal(answers(small), answers(large))


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [({"steps": -1}, "steps=-1 must be at least 0"), ({"batch_size": 0}, "batch_size=0 must be")],
)
def test_impossible_settings_are_refused(settings, culprit):
    with pytest.raises(ValueError, match=culprit):
        reptile(mlp(), **settings)
