import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax import registry
from meta_jax.lookup import UsageError
from meta_jax.optimization_based.inner_loop import run_inner_loop
from meta_jax.optimization_based.learned_optimizers.export import to_optax
from meta_jax.optimization_based.learned_optimizers.hand_designed import (
    HAND_DESIGNED,
    with_learning_rate,
)
from meta_jax.optimization_based.learned_optimizers.lstm import coordinatewise_lstm
from meta_jax.optimization_based.learned_optimizers.mlp import (
    adafactor_mlp_rule,
    factored_axes,
    mlp_rule,
    time_features,
)
from meta_jax.optimization_based.lstm_meta_learner import lstm_rule
from meta_jax.optimization_based.update_rules import UpdateRule, log_and_sign
from meta_jax.training.checkpoints import restore, save
from tests.optimization_based.tasks import KEY, assert_trees_close, vectors
from tests.random_trees import dtypes, moved, normal

pytestmark = pytest.mark.usefixtures("x64")

RULES = {"lstm": coordinatewise_lstm(), "mlp": mlp_rule(), "adafactor_mlp": adafactor_mlp_rule()}
every_rule = pytest.mark.parametrize("name", RULES)


def some_params(seed=0):
    shapes = {"p0": (3, 4), "p1": (4,), "p2": (2, 2, 3)}
    return {name: normal(*shape, seed=seed) for name, shape in shapes.items()}


@functools.cache
def initial_meta(rule):
    return jax.jit(rule.init_meta)(KEY, some_params())


@functools.cache
def meta_of(rule):
    """Meta-parameters away from their initial values, decays only a little."""
    return moved(initial_meta(rule), by=0.03)


@functools.cache
def compiled(rule):
    """A rule's init and update, compiled once for all tests."""
    return jax.jit(rule.init), jax.jit(rule.update)


def run(rule, meta, params, steps=4, permute=lambda tree: tree):
    """Updates after some steps on gradients that differ from step to step."""
    init, update = compiled(rule)
    state = init(meta, params)
    for step in range(steps):
        gradient = permute(some_params(10 + step))
        updates, state = update(meta, gradient, state, params)
        params = optax.apply_updates(params, updates)
    return updates


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (coordinatewise_lstm(), 5141),
        (coordinatewise_lstm(preprocessing=None), 5061),
        (mlp_rule(), 19 * 32 + 32 + 32 * 32 + 32 + 32 * 2 + 2),
        (adafactor_mlp_rule(), 197),
    ],
)
def test_numbers_of_meta_parameters(rule, count):
    meta = jax.eval_shape(rule.init_meta, KEY, some_params())
    assert sum(leaf.size for leaf in jax.tree.leaves(meta)) == count


@pytest.mark.parametrize(
    ("x", "wanted"),
    [(-0.1, (-0.460517, -1)), (0.01, (-0.921034, 1)), (1e-3, (-1, 0.1484132)), (0.0, (-1, 0))],
)
def test_preprocessed_gradients_with_p_of_five(x, wanted):
    np.testing.assert_allclose(jax.jit(log_and_sign, static_argnums=1)(x, 5.0), wanted, atol=1e-6)


@every_rule
def test_permuted_coordinates_have_permuted_updates(name):
    rule, params = RULES[name], some_params()
    meta = meta_of(rule)

    def permute(tree):
        # Rows and columns of a matrix: what Adafactor's averages allow too.
        return {**tree, "p0": np.asarray(tree["p0"])[[2, 0, 1]][:, [3, 0, 2, 1]]}

    wanted = permute(run(rule, meta, params))
    assert_trees_close(run(rule, meta, permute(params), permute=permute), wanted)
    assert abs(wanted["p0"] - np.asarray(run(rule, meta, params)["p0"])).max() > 1e-9


@pytest.mark.parametrize("name", ["lstm", "mlp"])
def test_any_permutation_of_a_leaf_s_coordinates_will_do(name):
    rule, params = RULES[name], some_params()
    meta, order = meta_of(rule), np.random.default_rng(0).permutation(12)

    def permute(tree):
        return {**tree, "p0": np.asarray(tree["p0"]).reshape(-1)[order].reshape(3, 4)}

    assert_trees_close(
        run(rule, meta, permute(params), permute=permute), permute(run(rule, meta, params))
    )


@every_rule
def test_every_meta_parameter_has_a_part_in_the_updates(name):
    rule = RULES[name]
    gradient = jax.jit(
        jax.grad(
            lambda meta: sum((u**2).sum() for u in run(rule, meta, some_params(), steps=2).values())
        )
    )(meta_of(rule))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert abs(np.asarray(leaf)).max() > 0, jax.tree_util.keystr(path)


def test_the_lstm_keeps_a_state_for_every_coordinate():
    rule = coordinatewise_lstm((5, 3))
    state = jax.eval_shape(rule.init, meta_of(rule), some_params())
    assert state["lstm1"][0].shape == (28, 5)
    assert state["lstm2"][1].shape == (28, 3)


def test_the_lstm_of_plain_gradients_by_hand():
    rule = coordinatewise_lstm((2,), preprocessing=None, output_scale=3.0)
    meta = jax.tree.map(np.zeros_like, initial_meta(rule))
    # Gates i, f, u, o of two units each: only u sees the gradient; the output sums h.
    meta["lstm1"]["kernel"][0, 4:6] = 1.0
    meta["output"]["kernel"][:] = np.ones((2, 1))
    gradient = np.array([0.3, -2.0])
    init, update = compiled(rule)
    updates, _ = update(meta, gradient, init(meta, gradient), None)
    np.testing.assert_allclose(updates, 3 * 2 * 0.5 * np.tanh(0.5 * np.tanh(gradient)))


def test_features_of_time():
    features = np.asarray(jax.jit(time_features)(10))
    np.testing.assert_allclose(features[:3], np.tanh([9, 7 / 3, 0]), rtol=1e-6)
    assert features.shape == (11,)


def test_the_first_step_of_the_mlp_by_hand():
    rule, params = mlp_rule(), {"w": np.array([3.0, -4.0])}
    meta = jax.tree.map(np.asarray, meta_of(rule))
    gradient = {"w": np.array([0.5, 0.1])}
    g, p = gradient["w"], params["w"]
    decays = np.array([0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])
    seen = np.concatenate([np.stack([g, p], -1), (1 - decays) * np.asarray(g)[:, None]], -1)
    seen = seen / np.sqrt(1e-5 + (seen**2).mean(0))
    x = np.concatenate([seen, np.full((2, 11), np.tanh(-1))], -1)
    for layer in ("layer1", "layer2"):
        x = np.maximum(x @ meta["network"][layer]["kernel"] + meta["network"][layer]["bias"], 0)
    d, m = (x @ meta["head"]["kernel"] + meta["head"]["bias"]).T
    init, update = compiled(rule)
    updates, _ = update(meta, gradient, init(meta, params), params)
    np.testing.assert_allclose(updates["w"], -1e-3 * d * np.exp(1e-3 * m), rtol=1e-6)


def test_adafactor_s_statistics():
    rule = RULES["adafactor_mlp"]
    init, update = compiled(rule)
    meta = initial_meta(rule)
    g = {"w": np.arange(1.0, 7).reshape(2, 3), "b": np.array([2.0, 3.0])}
    _, state = update(meta, g, init(meta, g), g)
    state = jax.tree.map(np.asarray, state)
    new, share = state.moments["w"], 1 - np.array([0.9, 0.99, 0.999])
    np.testing.assert_allclose(new.momentum, g["w"][..., None] * share, rtol=1e-6)
    np.testing.assert_allclose(new.square[..., 0], g["w"] ** 2 * 1e-3, rtol=1e-6)
    np.testing.assert_allclose(new.row, (g["w"] ** 2).mean(1)[:, None] * share, rtol=1e-6)
    np.testing.assert_allclose(new.column, (g["w"] ** 2).mean(0)[:, None] * share, rtol=1e-6)
    np.testing.assert_allclose(state.moments["b"].row, (g["b"] ** 2)[:, None] * share, rtol=1e-6)


def test_learned_decays_move_by_powers_of_e_to_the_tenth():
    rule = RULES["adafactor_mlp"]
    init, update = compiled(rule)
    meta = jax.tree.map(np.asarray, initial_meta(rule))
    decays = {**meta["decays"], "momentum": meta["decays"]["momentum"] + np.array([0.0, 0.1, -0.1])}
    meta = {**meta, "decays": decays}
    g = {"b": jnp.array([1.0])}
    _, state = update(meta, g, init(meta, g), g)
    wanted = [0.1, 0.01 * np.e, 0.001 / np.e]
    np.testing.assert_allclose(np.asarray(state.moments["b"].momentum)[0], wanted, rtol=1e-6)


def test_the_two_longest_axes_are_factored():
    assert factored_axes((7, 2, 5)) == (2, 0)
    assert factored_axes(()) is None


OPTAX = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "rmsprop": lambda rate: optax.rmsprop(rate),
    "adam": lambda rate: optax.adam(rate),
}


@pytest.mark.parametrize("name", HAND_DESIGNED)
def test_hand_designed_rules_train_to_optax_does(name):
    rule, rate = with_learning_rate(HAND_DESIGNED[name](), 1.0), 0.03

    def problem(params, state, step):
        return sum((p**4).sum() for p in params.values()), state

    params = some_params()
    optimizer = OPTAX[name](rate)

    @jax.jit
    def ours(meta, params):
        return run_inner_loop(problem, rule, meta, params, {}, steps=20).params

    @jax.jit
    def theirs(params):
        def step(_, carry):
            params, state = carry
            gradient = jax.grad(lambda p: problem(p, {}, 0)[0])(params)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 20, step, (params, optimizer.init(params)))[0]

    assert_trees_close(ours({"learning_rate": rate}, params), theirs(params))


def test_adam_written_as_a_rule_equals_optax():
    """A rule from its equations, through the same interface."""

    def update(meta, gradient, state, params, *, loss, value_fn):
        del meta, params, loss, value_fn
        t, m, v = state
        t = t + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, gradient)
        updates = jax.tree.map(
            lambda m, v: -0.05 * m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8), m, v
        )
        return updates, (t, m, v)

    def init(meta, params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return 0, zeros, zeros

    rule = UpdateRule(lambda key, params: {}, init, update)
    ours, theirs = to_optax(rule, {}), optax.adam(0.05)
    params = some_params()
    states = [jax.jit(o.init)(params) for o in (ours, theirs)]
    steps = [jax.jit(o.update) for o in (ours, theirs)]
    for number in range(5):
        gradient = some_params(20 + number)
        (a, states[0]), (b, states[1]) = (
            step(gradient, state, params) for step, state in zip(steps, states, strict=True)
        )
        assert_trees_close(a, b)


@every_rule
def test_to_optax_is_exact_to_the_rule(name):
    rule, params = RULES[name], some_params()
    meta = meta_of(rule)
    optimizer = to_optax(rule, meta)
    inits = optimizer.init, functools.partial(rule.init, meta)
    updates = optimizer.update, functools.partial(rule.update, meta)
    ends = []
    for init, update in zip(map(jax.jit, inits), map(jax.jit, updates), strict=True):
        end, state = params, init(params)
        for step in range(4):
            change, state = update(some_params(10 + step), state, end)
            end = jax.tree.map(lambda p, u: np.asarray(p) + u, end, change)
        ends.append(end)
    assert_trees_close(*ends, rtol=0, atol=0)
    assert abs(ends[0]["p0"] - np.asarray(params["p0"])).max() > 1e-9


def test_the_loss_reaches_rules_that_look_at_it():
    rule, params = lstm_rule(3), {"w": np.ones(2)}
    meta = jax.jit(rule.init_meta)(KEY, params)
    optimizer = to_optax(rule, meta)
    state, loss = jax.jit(optimizer.init)(params), jnp.asarray(2.0)
    ours, _ = jax.jit(optimizer.update)(params, state, params, value=loss)
    state = jax.jit(rule.init)(meta, params)
    wanted, _ = jax.jit(rule.update)(meta, params, state, params, loss=loss)
    assert_trees_close(ours, wanted)


@pytest.mark.parametrize("hidden_sizes", [(), (20, 0)])
def test_an_lstm_without_units_is_refused(hidden_sizes):
    with pytest.raises(UsageError, match="hidden_sizes"):
        coordinatewise_lstm(hidden_sizes)


def test_preprocessing_that_is_no_power_is_refused():
    with pytest.raises(UsageError, match=r"preprocessing=0\.0 must be greater than 0"):
        coordinatewise_lstm(preprocessing=0.0)


@pytest.mark.parametrize("name", ["mlp", "adafactor_mlp"])
def test_rules_that_look_at_the_parameters_say_so(name):
    rule, params = RULES[name], some_params()
    meta = initial_meta(rule)
    optimizer = to_optax(rule, meta)
    with pytest.raises(ValueError, match=r"update\(gradients, state, params\)"):
        optimizer.update(params, jax.eval_shape(optimizer.init, params))


@every_rule
def test_a_rule_is_found_by_its_name_and_its_settings_are_its_own(name):
    component = registry.find("rule", name)
    settings = registry.settings(component)
    widths = "hidden_sizes" if name == "lstm" else "widths"
    assert settings[widths].type is tuple
    assert all(setting.doc for setting in settings.values())
    meta = jax.eval_shape(component.factory(**{widths: (3,)}).init_meta, KEY, some_params())
    assert {leaf.shape[0] for leaf in jax.tree.leaves(meta)} & {3, 5, 12}


@every_rule
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_updates_are_finite_and_of_the_gradients_dtype(name, dtype):
    rule = RULES[name]
    cast = functools.partial(jax.tree.map, lambda leaf: np.asarray(leaf, dtype))
    meta, params = cast(meta_of(rule)), cast(some_params())
    init, update = compiled(rule)
    state = init(meta, params)
    # Gradients that are exactly zero, and larger ones than a square of 16 bits holds exactly.
    for gradient in (jax.tree.map(np.zeros_like, params), cast(some_params(10)), params):
        updates, new = update(meta, gradient, state, params)
        assert dtypes(updates) == dtypes(params)
        assert dtypes(new) == dtypes(state)
        leaves = map(np.asarray, jax.tree.leaves((updates, new)))
        assert all(np.isfinite(leaf.astype(np.float32)).all() for leaf in leaves)
        state = new


@every_rule
def test_a_gradient_of_zero_has_a_finite_meta_gradient(name):
    rule, params = RULES[name], some_params()
    zeros = jax.tree.map(np.zeros_like, params)

    def loss(meta, gradient):
        updates, _ = rule.update(meta, gradient, rule.init(meta, params), params)
        return sum(leaf.sum() for leaf in jax.tree.leaves(updates))

    gradients = jax.jit(jax.grad(loss, (0, 1)))(meta_of(rule), zeros)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@every_rule
def test_an_exported_rule_trains_a_flax_model_and_checkpoints(name, tmp_path):
    rule = RULES[name]
    # Flax's parameters are in single precision, the rule's in double.
    optimizer = to_optax(rule, initial_meta(rule))
    model = nn.Sequential([nn.Dense(4), nn.sigmoid, nn.Dense(3)])
    x, y, _ = vectors().support

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(
            lambda params: optax.softmax_cross_entropy(model.apply(params, x), y).mean()
        )(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.jit(model.init)(KEY, x)
    state = jax.jit(optimizer.init)(params)
    ends = params, state
    for number in range(4):
        *ends, loss = step(*ends)
        if number == 1:
            path = save(tmp_path, "half", {"params": ends[0], "state": ends[1]}, {})
    assert step._cache_size() == 1
    assert np.isfinite(loss)
    half, _ = restore(path, {"params": params, "state": state})
    again = half["params"], half["state"]
    for _ in range(2):
        *again, _ = step(*again)
    assert_trees_close(again, ends, rtol=0, atol=0)
