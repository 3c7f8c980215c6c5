import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.networks.conv4 import conv4
from meta_jax.optimization_based.adjoints import (
    CHECKPOINTED,
    FIRST_ORDER,
    MIXED_MODE,
    UNROLLED,
    annealed,
    as_adjoint,
    implicit,
    truncated,
)
from meta_jax.optimization_based.inner_loop import run_inner_loop, with_proximal_term
from meta_jax.optimization_based.maml import maml
from meta_jax.optimization_based.update_rules import from_optax
from tests.optimization_based.tasks import THETA, A, B, C, D

pytestmark = pytest.mark.usefixtures("x64")

ALPHA = 0.1
EYE = np.eye(4)


def outer(theta, centre, adjoint, steps, weight=0.0, rate=ALPHA):
    """The query loss after descent of 1/2 (p - c)'A(p - c) + (weight / 2)||p - theta||^2."""

    def support(p, state, step):
        del step
        return 0.5 * (p - centre) @ A @ (p - centre), state

    problem = with_proximal_term(support, theta, weight)
    rule = from_optax(optax.sgd(rate))
    p = run_inner_loop(problem, rule, {}, theta, {}, steps=steps, adjoint=adjoint).params
    return 0.5 * (p - D) @ B @ (p - D), p


def gradients(*arguments, **settings):
    function = functools.partial(outer, **settings)
    run = jax.jit(jax.grad(lambda t, c: function(t, c, *arguments), (0, 1), has_aux=True))
    return run(jnp.asarray(THETA), jnp.asarray(C))


def assert_close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("last", [0, 1, 3, 5, 9])
def test_truncation_of_a_quadratic(last):
    (gradient, _), p = gradients(truncated(last), 5)
    contraction = np.linalg.matrix_power(EYE - ALPHA * A, min(last, 5))
    assert_close(p, C + np.linalg.matrix_power(EYE - ALPHA * A, 5) @ (THETA - C))
    assert_close(gradient, contraction @ B @ (p - D))


WEIGHT = 2.0


class TestImplicit:
    def solve(self, adjoint):
        return gradients(adjoint, 200, weight=WEIGHT, rate=0.2)

    def test_the_closed_form_of_a_quadratic(self):
        (of_theta, of_centre), p = self.solve(implicit(cg_steps=4))
        inverse = np.linalg.inv(A + WEIGHT * EYE)
        minimum = inverse @ (A @ C + WEIGHT * THETA)
        assert_close(p, minimum)
        # (I + H / lambda)^-1 times the query gradient, and what reaches the data by A.
        assert_close(of_theta, np.linalg.inv(EYE + A / WEIGHT) @ B @ (minimum - D), 1e-10)
        assert_close(of_centre, A @ inverse @ B @ (minimum - D), 1e-10)

    def test_it_is_the_limit_of_the_unrolled_gradient(self):
        (implicitly, _), _ = self.solve(implicit(cg_steps=4))
        (unrolled, _), _ = self.solve(UNROLLED)
        assert_close(implicitly, unrolled, 1e-10)

    def test_fewer_steps_than_dimensions_are_not_exact(self):
        (exact, _), _ = self.solve(implicit(cg_steps=4))
        errors = [
            abs(self.solve(implicit(cg_steps=n))[0][0] - exact).max() / abs(exact).max()
            for n in (1, 3)
        ]
        assert 1e-2 > errors[1] > 1e-9
        assert errors[0] > 5 * errors[1]

    def test_damping_adds_to_the_diagonal(self):
        (gradient, _), p = self.solve(implicit(cg_steps=4, damping=3.0))
        wanted = WEIGHT * np.linalg.inv(A + (WEIGHT + 3.0) * EYE) @ B @ (p - D)
        assert_close(gradient, wanted, 1e-10)

    def test_an_infinite_weight_gives_the_query_gradient_at_the_start(self):
        weight = 1e9
        (gradient, _), p = gradients(implicit(cg_steps=4), 5, weight=weight, rate=1 / weight)
        assert_close(p, THETA, 1e-8)
        assert_close(gradient, B @ (THETA - D), 1e-7)

    def test_the_rule_and_the_start_get_nothing(self):
        def end(rate, start):
            def problem(p, state, step):
                del step
                return ((p - C) ** 2).sum(), state

            rule = from_optax(optax.sgd(rate))
            return run_inner_loop(
                problem, rule, {}, start, {}, steps=3, adjoint=implicit()
            ).params.sum()

        for gradient in jax.jit(jax.grad(end, (0, 1)))(0.1, jnp.asarray(THETA)):
            np.testing.assert_array_equal(gradient, 0)

    @pytest.mark.parametrize("settings", [{"cg_steps": 0}, {"damping": -1.0}])
    def test_impossible_settings_are_refused(self, settings):
        with pytest.raises(ValueError, match="give at least one"):
            implicit(**settings)

    def test_without_a_proximal_term_it_is_refused(
        self,
    ):
        with pytest.raises(ValueError, match="imaml has one"):
            maml(conv4(), adjoint=implicit())


def test_a_negative_truncation_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        truncated(-1)


@pytest.mark.parametrize(
    "adjoint",
    [
        UNROLLED,
        CHECKPOINTED,
        MIXED_MODE,
        FIRST_ORDER,
        truncated(3),
        implicit(),
        implicit(cg_steps=2, damping=0.5),
    ],
    ids=lambda adjoint: adjoint.name,
)
def test_an_adjoint_s_name_makes_it_again(adjoint):
    found = as_adjoint(adjoint.name)
    assert found.name == adjoint.name
    assert found[2:] == adjoint[2:]
    assert as_adjoint(found) is found


def test_settings_in_a_name_are_those_of_the_adjoint():
    for name, wanted in (("truncated:2", truncated(2)), ("truncated:0", FIRST_ORDER)):
        found, expected = (gradients(a, 4)[0][0] for a in (as_adjoint(name), wanted))
        assert_close(found, expected)
    assert as_adjoint("truncated:0").is_first_order
    assert as_adjoint("implicit").name == implicit().name
    assert as_adjoint("implicit:7").name == implicit(cg_steps=7).name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unroled", "unknown adjoint 'unroled': choose one of unrolled, checkpointed"),
        ("truncated", "truncated:K"),
        ("truncated:two", "adjoint 'truncated:two': invalid literal"),
        ("truncated:-1", "must not be negative"),
        ("implicit:0", "give at least one step"),
    ],
)
def test_a_mistaken_name_is_refused_in_one_line(name, message):
    with pytest.raises(UsageError, match=message) as error:
        as_adjoint(name)
    assert "\n" not in str(error.value)


X, Y = np.random.default_rng(3).normal(size=(2, 6, 3))


def awkward(adjoint):
    """Closes over a differentiated array, integers and a random key; its state has integers."""

    def end(inputs, labels, key):
        start, scale = inputs

        def problem(p, state, step):
            noise = jax.random.normal(jax.random.fold_in(key, step), (3,))
            z = jnp.tanh(X @ p["w"] * scale + noise)
            loss = -jax.nn.log_softmax(z * state["seen"])[jnp.arange(6), labels].mean()
            return loss, {"seen": state["seen"] + z.mean(), "steps": state["steps"] + 1}

        state = {"seen": scale.sum(), "steps": jnp.asarray(0)}
        rule = from_optax(optax.adam(0.1))
        run = run_inner_loop(problem, rule, {}, start, state, steps=3, adjoint=adjoint)
        return jnp.sin(run.params["w"]).sum() + run.losses.sum() + run.state["seen"]

    return jax.value_and_grad(end)


def awkward_inputs():
    rng = np.random.default_rng(5)
    inputs = {"w": jnp.asarray(rng.normal(size=(3, 3)))}, jnp.asarray(rng.normal(size=3))
    labels = jnp.asarray(rng.integers(0, 3, (2, 6)))
    return inputs, labels, jax.random.split(jax.random.key(0), 2)


@pytest.mark.parametrize("adjoint", [MIXED_MODE, CHECKPOINTED])
def test_the_exact_adjoints_agree_on_all_that_a_problem_may_close_over(adjoint):
    over_tasks = [jax.jit(jax.vmap(awkward(a), (None, 0, 0))) for a in (adjoint, UNROLLED)]
    found, wanted = (run(*awkward_inputs()) for run in over_tasks)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-10), found, wanted)
    assert min(abs(g).max() for g in jax.tree.leaves(wanted)) > 1e-2


def test_mixed_mode_refuses_a_network_with_a_custom_vjp_in_one_line():
    learner = maml(conv4(8, normalisation="batch"), adjoint=MIXED_MODE)
    batch = Batch(jnp.zeros((2, 16, 16, 1)), jnp.eye(2))
    params, state = jax.eval_shape(learner.init, jax.random.key(0), Episode(batch, batch))
    with pytest.raises(ValueError, match="use the checkpointed adjoint") as error:
        jax.eval_shape(
            jax.grad(lambda *a: learner.loss(*a)[0]),
            params,
            state,
            Episode(batch, batch),
            jax.random.key(0),
        )
    assert "\n" not in str(error.value)


def test_the_order_of_the_derivative_is_chosen_when_it_runs():
    run = jax.jit(jax.grad(lambda theta, first: outer(theta, C, annealed(first), 3)[0]))
    for first, adjoint in ((True, FIRST_ORDER), (False, UNROLLED)):
        (wanted, _), _ = gradients(adjoint, 3)
        assert_close(run(jnp.asarray(THETA), first), wanted)


def test_memory_at_fifty_steps():
    """Checkpointed, at most a quarter of the unrolled loop's; gradients equal."""
    x = np.random.default_rng(6).normal(size=(256, 8))

    def meta_loss(w, adjoint):
        def problem(w, state, step):
            del step
            return (jnp.tanh(jnp.tanh(x @ w) @ w) ** 2).mean(), state

        rule = from_optax(optax.sgd(0.1))
        return run_inner_loop(problem, rule, {}, w, {}, steps=50, adjoint=adjoint).params.sum()

    w = jnp.asarray(np.random.default_rng(7).normal(size=(8, 8)))
    memory, found = {}, {}
    for name, adjoint in {
        "unrolled": UNROLLED,
        "checkpointed": CHECKPOINTED,
        "mixed_mode": MIXED_MODE,
        "truncated": truncated(5),
        "first_order": FIRST_ORDER,
    }.items():
        gradient = jax.jit(jax.grad(functools.partial(meta_loss, adjoint=adjoint)))
        compiled = gradient.lower(w).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        found[name] = compiled(w)
    assert memory["checkpointed"] < memory["unrolled"] / 4
    assert memory["mixed_mode"] < memory["unrolled"] / 4
    assert memory["truncated"] < memory["unrolled"] / 4
    assert memory["first_order"] < memory["truncated"]
    assert_close(found["checkpointed"], found["unrolled"])
    assert_close(found["mixed_mode"], found["unrolled"], 1e-10)
