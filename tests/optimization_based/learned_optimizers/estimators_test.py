"""The estimators on a run whose gradients are known: s <- 0.9 s + theta, four losses s^2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax import registry
from meta_jax.lookup import UsageError
from meta_jax.optimization_based.learned_optimizers.estimators import (
    Run,
    antithetic_loss,
    full_unroll,
    persistent_es,
    perturbation,
    truncated_es,
    truncated_gradient,
    with_gradient,
)
from tests.random_trees import dtypes

THETA, STEPS = 0.3, 4
EXACT = 14.2685  # sum_t 2 theta a_t^2, a_t = (1 - 0.9^t) / 0.1
TRUNCATED = 5.429  # sum_t 2 theta a_t: what is known of one step alone
TASKS = 100_000


def scalar_run():
    def advance(theta, s, key, steps):
        def step(s, _):
            s = 0.9 * s + theta
            return s, s**2

        return jax.lax.scan(step, s, None, steps)

    return Run(lambda theta, task, key: jnp.asarray(task), advance)


def gradients(estimator, tasks, segments, seed=0):
    """The estimates of every task, summed over the segments of a run, and what is carried."""
    run = scalar_run()
    carried = estimator.init(run, THETA, 0.0, jax.random.key(0))
    carried = jax.tree.map(lambda c: jnp.broadcast_to(c, (tasks, *jnp.shape(c))), carried)

    @jax.jit
    @jax.vmap
    def outer_step(carried, key):
        (loss, aux), gradient = jax.value_and_grad(
            lambda theta: estimator.loss(run, theta, carried, 0.0, key), has_aux=True
        )(THETA)
        return loss, aux.state, gradient

    total, losses = 0.0, []
    for i in range(segments):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), tasks)
        loss, carried, gradient = outer_step(carried, keys)
        total = total + np.asarray(gradient, np.float64)
        losses.append(np.asarray(loss))
    return total, losses, carried


def standard_error(values):
    return values.std() / np.sqrt(values.size)


def test_the_whole_run_has_the_exact_gradient():
    total, losses, _ = gradients(full_unroll(STEPS), 1, 1)
    np.testing.assert_allclose(STEPS * total, EXACT, rtol=1e-5)
    np.testing.assert_allclose(losses[0], 0.09 * 23.7808 / 4, rtol=1e-4)


def test_truncation_forgets_what_came_before():
    total, _, _ = gradients(truncated_gradient(STEPS, 1), 1, STEPS)
    np.testing.assert_allclose(total, TRUNCATED, rtol=1e-4)
    total, _, _ = gradients(truncated_gradient(STEPS, STEPS), 1, 1)
    np.testing.assert_allclose(STEPS * total, EXACT, rtol=1e-5)


def test_persistent_evolution_strategies_are_unbiased():
    total, _, _ = gradients(persistent_es(STEPS, 1), TASKS, STEPS)
    error = standard_error(total)
    assert error < 0.06
    assert abs(total.mean() - EXACT) < 3 * error


def test_truncated_evolution_strategies_are_as_biased_as_the_truncated_gradient():
    total, _, _ = gradients(truncated_es(STEPS, 1), TASKS, STEPS)
    error = standard_error(total)
    assert error < 0.06
    assert abs(total.mean() - TRUNCATED) < 3 * error
    assert abs(total.mean() - EXACT) > 30 * error


@pytest.mark.parametrize("make", [truncated_gradient, truncated_es, persistent_es])
def test_a_run_that_has_ended_begins_anew(make):
    _, losses, carried = gradients(make(STEPS, 2), 3, 5)
    # Four steps are a run, so segments 1 and 3 begin one; with noise of 0.01 they differ little.
    np.testing.assert_allclose(losses[2], losses[0], rtol=0.05)
    np.testing.assert_allclose(losses[3], losses[1], rtol=0.05)
    assert (losses[1] > 2 * losses[0]).all()
    assert carried.age.tolist() == [2, 2, 2]


def test_persistent_perturbations_are_those_of_this_run():
    estimator = persistent_es(STEPS, 1)
    _, _, carried = gradients(estimator, 5, 1)
    plus, minus, perturbation = carried.run
    # After one step from zero, s is theta perturbed.
    np.testing.assert_allclose(plus - THETA, perturbation, atol=1e-7)
    np.testing.assert_allclose(minus - THETA, -perturbation, atol=1e-7)
    # The fifth segment begins a run: nothing is left of the first four.
    _, _, carried = gradients(estimator, 5, 5)
    np.testing.assert_allclose(carried.run.plus - THETA, carried.run.perturbation, atol=1e-7)


def test_every_task_has_a_perturbation_of_its_own():
    _, _, carried = gradients(persistent_es(STEPS, 1), 5, 1)
    assert len(np.unique(carried.run.perturbation)) == 5


def test_a_gradient_may_be_given():
    params = {"a": jnp.ones(2), "b": jnp.array(3.0)}
    given = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(-1.0)}
    value, gradient = jax.value_and_grad(lambda p: with_gradient((p["a"] ** 5).sum(), p, given))(
        params
    )
    assert value == 2
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), gradient, given))


@pytest.mark.parametrize("make", [truncated_gradient, truncated_es, persistent_es])
@pytest.mark.parametrize("truncation", [3, 0, 8])
def test_segments_that_do_not_fit_are_refused(make, truncation):
    with pytest.raises(UsageError, match=r"divides the horizon|truncation=0 must be at least 1"):
        make(4, truncation)


@pytest.mark.parametrize("make", [truncated_es, persistent_es])
def test_evolution_strategies_without_noise_are_refused(make):
    with pytest.raises(UsageError, match="sigma"):
        make(4, 2, sigma=0.0)


def test_a_run_without_steps_is_refused():
    with pytest.raises(UsageError, match="horizon"):
        full_unroll(0)


def test_perturbations_are_normal_and_each_leaf_s_own():
    meta = {"a": jnp.zeros(20_000), "b": jnp.zeros(20_000, jnp.bfloat16)}
    found = perturbation(jax.random.key(0), meta, 0.1)
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == {"a": jnp.float32, "b": jnp.bfloat16}
    for leaf in found.values():
        np.testing.assert_allclose(leaf.astype(jnp.float32).std(), 0.1, rtol=0.02)
    correlation = np.corrcoef(found["a"], found["b"].astype(jnp.float32))[0, 1]
    assert abs(correlation) < 0.03


def test_an_antithetic_pair_s_gradient_is_the_slope_along_its_direction():
    plus, minus = jnp.array([3.0, 5.0]), jnp.array([1.0, 1.0])
    meta, direction = jnp.zeros(2), jnp.array([0.1, -0.2])
    value, gradient = jax.value_and_grad(
        lambda meta: antithetic_loss(plus, minus, meta, direction, 0.1)
    )(meta)
    assert value == 2.5
    np.testing.assert_allclose(gradient, 3 / (2 * 0.1**2) * direction, rtol=1e-6)


@pytest.mark.parametrize("make", [truncated_gradient, truncated_es, persistent_es])
def test_what_is_carried_keeps_its_structure_and_dtypes(make):
    estimator, run = make(4, 2), scalar_run()
    theta, task = jnp.asarray(THETA, jnp.bfloat16), jnp.zeros((), jnp.bfloat16)
    carried = estimator.init(run, theta, task, jax.random.key(0))
    loss, aux = estimator.loss(run, theta, carried, task, jax.random.key(1))
    assert dtypes(aux.state) == dtypes(carried)
    assert loss.dtype == jnp.bfloat16
    assert carried.age.dtype == jnp.int32  # a counter, which no outer step averages


@pytest.mark.parametrize("name", ["full", "truncated", "truncated_es", "pes"])
def test_an_estimator_is_found_by_its_name_and_its_settings_are_its_own(name):
    component = registry.find("estimator", name)
    settings = registry.settings(component)
    wanted = {"horizon"} | ({"truncation"} if name != "full" else set())
    wanted |= {"sigma"} if name in ("truncated_es", "pes") else set()
    assert set(settings) == wanted
    assert all(setting.doc for setting in settings.values())
    assert component.factory(horizon=40).horizon == 40
