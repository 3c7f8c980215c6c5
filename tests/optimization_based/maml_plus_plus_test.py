import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.networks.mlp import mlp
from meta_jax.networks.normalisation import is_normalisation
from meta_jax.optimization_based.adjoints import CHECKPOINTED, FIRST_ORDER
from meta_jax.optimization_based.inner_loop import run_inner_loop
from meta_jax.optimization_based.maml import maml
from meta_jax.optimization_based.maml_plus_plus import (
    PerStep,
    maml_plus_plus,
    multi_step_weights,
)
from meta_jax.optimization_based.update_rules import per_step_sgd
from tests.optimization_based.tasks import (
    KEY,
    assert_trees_close,
    loss_and_gradient,
    normalised_network,
    tanh_network,
    two_blocks,
    vectors,
)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("epoch", [0, 1, 9, 10, 30])
def test_multi_step_weights(steps, epoch):
    n, epochs = steps, 10
    weights = multi_step_weights(steps, jnp.asarray(epoch / epochs))
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    if epoch >= epochs:
        np.testing.assert_array_equal(weights, np.arange(n) == n - 1)
        return
    early = max(1 / n - epoch / (n * epochs), 0.03 / n)
    late = min(1 / n + epoch * (n - 1) / (n * epochs), 1 - (n - 1) * 0.03 / n)
    np.testing.assert_allclose(weights, [early] * (n - 1) + [late], rtol=1e-12)


def test_the_floor_of_the_weights():
    weights = multi_step_weights(5, jnp.asarray(0.999))
    np.testing.assert_allclose(weights, [0.006] * 4 + [0.976], rtol=1e-12)


@pytest.mark.parametrize("per_step", [False, True])
def test_constant_rates_and_the_last_loss_are_maml(per_step):
    network, settings = two_blocks(), {"inner_lr": 0.4, "steps": 2}
    ours = maml_plus_plus(network, per_step_normalisation=per_step, **settings)
    plain = maml(network, **settings)
    params, state = jax.jit(plain.init)(KEY, vectors())
    value, wanted = loss_and_gradient(plain, params, state, vectors(), KEY)
    params, state = jax.jit(ours.init)(KEY, vectors())
    found, gradient = loss_and_gradient(ours, params, state, vectors(), KEY)
    np.testing.assert_allclose(found, value, rtol=1e-10)
    if per_step:
        # What shared normalisation gets is the sum of what those of the steps get.
        stacked = jax.tree.map(
            lambda g, w: g.sum(0) if g.ndim > w.ndim else g, gradient["learner"], wanted["learner"]
        )
        offset = gradient["learner"]["network"]["block2"]["normalisation"]["offset"]
        assert offset.shape == (2, 3)
        assert abs(offset).max(1).min() > 1e-5
        assert_trees_close(stacked, wanted["learner"], atol=1e-10)
    else:
        assert_trees_close(gradient["learner"], wanted["learner"], atol=1e-10)


def test_the_multi_step_loss_is_the_weighted_sum_of_the_query_losses():
    settings = {"inner_lr": 0.4, "mask": None}
    ours = maml_plus_plus(tanh_network(), steps=3, multi_step_steps=10, **settings)
    params, state = jax.jit(ours.init)(KEY, vectors())
    state = {**state, "outer_step": jnp.asarray(4)}
    plain = {**params, "rule": {}}
    parts = [
        loss_and_gradient(maml(tanh_network(), steps=t, **settings), plain, {}, vectors(), KEY)
        for t in (1, 2, 3)
    ]
    weights = multi_step_weights(3, 0.4)
    value, gradient = loss_and_gradient(ours, params, state, vectors(), KEY)
    mix = jax.tree.map(
        lambda *leaves: sum(w * x for w, x in zip(weights, leaves, strict=True)), *parts
    )
    np.testing.assert_allclose(value, mix[0], rtol=1e-10)
    assert_trees_close(gradient["learner"], mix[1]["learner"])
    assert jax.jit(ours.loss)(params, state, vectors(), KEY)[1].state["outer_step"] == 5


@pytest.mark.parametrize(("outer_step", "first"), [(4, True), (5, False)])
def test_second_order_comes_in_after_its_steps(outer_step, first):
    settings = {"inner_lr": 0.4, "steps": 2, "mask": None}
    ours = maml_plus_plus(tanh_network(), first_order_steps=5, **settings)
    params, state = jax.jit(ours.init)(KEY, vectors())
    state = {**state, "outer_step": jnp.asarray(outer_step)}
    _, found = loss_and_gradient(ours, params, state, vectors(), KEY)
    plain = maml(tanh_network(), **settings, **({"adjoint": FIRST_ORDER} if first else {}))
    _, wanted = loss_and_gradient(plain, {**params, "rule": {}}, {}, vectors(), KEY)
    assert_trees_close(found["learner"], wanted["learner"])


def test_each_step_has_normalisation_of_its_own():
    per_step = PerStep(3, own=True)
    learner = {"network": {"w": jnp.ones(2), "normalisation": {"scale": jnp.arange(2.0)}}}
    stacked = per_step.stack_params(learner)
    assert stacked["network"]["w"].shape == (2,)
    assert stacked["network"]["normalisation"]["scale"].shape == (3, 2)
    assert_trees_close(per_step.params_at(stacked, jnp.asarray(1)), learner)

    state = per_step.stack_state({"mean": jnp.zeros(2)})
    state = per_step.put_state(state, {"mean": jnp.ones(2)}, jnp.asarray(1))
    np.testing.assert_array_equal(state["mean"].sum(1), [0, 2, 0])
    # Steps beyond the last one take the last one's.
    state = per_step.put_state(state, {"mean": jnp.full(2, 3.0)}, jnp.asarray(7))
    np.testing.assert_array_equal(state["mean"].sum(1), [0, 2, 6])
    np.testing.assert_array_equal(per_step.state_at(state, jnp.asarray(9))["mean"], [3, 3])


def test_shared_normalisation_is_left_alone():
    shared, tree = PerStep(3, own=False), {"normalisation": jnp.ones(2)}
    for found in (
        shared.stack_params(tree),
        shared.stack_state(tree),
        shared.params_at(tree, jnp.asarray(1)),
        shared.state_at(tree, jnp.asarray(1)),
        shared.put_state({"normalisation": jnp.zeros(2)}, tree, jnp.asarray(1)),
    ):
        assert_trees_close(found, tree)


@pytest.mark.parametrize("network", [tanh_network(), normalised_network("layer")])
def test_networks_without_moments_have_no_state_of_steps(network):
    learner = maml_plus_plus(network, steps=2, multi_step_steps=4)
    params, state = jax.jit(learner.init)(KEY, vectors())
    assert state["network"] == {}
    assert params["learner"]["network"]["w"].shape == (4, 6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["learner"]):
        assert is_normalisation(path) == (leaf.shape == (2, 6))
    loss, aux = jax.jit(learner.loss)(params, state, vectors(), KEY)
    assert np.isfinite(loss)
    assert_trees_close(aux.state, {"network": {}, "outer_step": jnp.asarray(1, jnp.int32)})
    assert aux.state["outer_step"].dtype == jnp.int32  # a counter, which is not averaged


def test_running_moments_are_kept_for_each_step():
    learner = maml_plus_plus(normalised_network("running"), steps=2)
    params, state = jax.jit(learner.init)(KEY, vectors())
    params["learner"]["network"]["normalisation"]["scale"] *= jnp.array([[1.0], [2.0]])
    _, aux = jax.jit(learner.loss)(params, state, vectors(), KEY)
    mean = aux.state["network"]["mean"]
    assert mean.shape == (2, 6)
    assert abs(mean).min(1).max() > 0
    # The step after an update sees other moments.
    assert abs(mean[0] - mean[1]).max() > 1e-4


def test_every_leaf_and_step_has_its_rate():
    rule = per_step_sgd(0.5, 2)
    params = {"a": jnp.ones(()), "b": jnp.ones(())}
    rates = {"a": jnp.array([0.1, 0.2]), "b": jnp.array([0.3, 0.4])}
    assert_trees_close(rule.init_meta(KEY, params), {k: jnp.full(2, 0.5) for k in "ab"})
    # The gradient is 1: three steps take 0.1, 0.2 and, the last again, 0.2.
    end = run_inner_loop(
        lambda p, s, _: (p["a"] + p["b"], s), rule, rates, params, {}, steps=3
    ).params
    assert_trees_close(end, {"a": jnp.asarray(0.5), "b": jnp.asarray(-0.1)})


def test_tests_use_the_last_step_s_normalisation():
    learner = maml_plus_plus(two_blocks(), inner_lr=1e-300, steps=2, eval_steps=3)
    params, state = jax.jit(learner.init)(KEY, vectors())
    adapt = jax.jit(functools.partial(learner.adapt, train=False))
    offsets = params["learner"]["network"]["block2"]["normalisation"]["offset"]
    params["learner"]["network"]["block2"]["normalisation"]["offset"] = offsets.at[1].add(0.5)
    adapted = adapt(params, state, vectors().support, KEY)
    found = adapted.last.params["network"]["block2"]["normalisation"]["offset"]
    np.testing.assert_allclose(found, offsets[1] + 0.5)


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"steps": 0}, "at least one step"),
        ({"eval_steps": -1}, "eval_steps=-1 must be at least 0"),
        ({"first_order_steps": 1, "adjoint": CHECKPOINTED}, "choose that one"),
        ({"multi_step_steps": -1}, "multi_step_steps=-1 must be at least 0"),
        ({"adjoint": "implicit"}, "is imaml's"),
    ],
)
def test_impossible_settings_are_refused(settings, culprit):
    with pytest.raises(ValueError, match=culprit):
        maml_plus_plus(mlp(), **settings)
