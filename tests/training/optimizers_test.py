"""Outer optimizers: schedules, settings out of range, averages of the parameters."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax import registry
from meta_jax.lookup import UsageError
from meta_jax.training.optimizers import (
    AverageState,
    average_params,
    averaged_params,
    averaged_path,
    learning_rate_schedule,
)
from meta_jax.training.outer_step import TrainState

NAMES = ("adam", "adamw", "sgd", "momentum")
PARAMS = {"w": jnp.array([3.0, -4.0])}
GRADIENT = {"w": jnp.array([30.0, 40.0])}


def build(name, steps=100, **settings):
    return registry.find("optimizer", name).factory(steps, **settings)


def update(optimizer, steps=1, gradient=GRADIENT):
    """The parameters and the optimizer's state after some steps with the same gradient."""

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        params, state = step(params, state)
    return params["w"], state


def test_all_are_registered_with_documented_settings():
    assert set(NAMES) <= set(registry.names("optimizer"))  # an own one may have come by
    for name in NAMES:
        component = registry.find("optimizer", name)
        first = next(iter(registry.parameters(component.factory).values()))
        assert (first.name, first.kind) == ("steps", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        settings = registry.settings(component, reserved=("steps",))
        shared = {"learning_rate", "schedule", "halve_every", "warmup_steps", "weight_decay"}
        assert shared | {"clip_norm", "ema"} <= settings.keys()
        assert settings["schedule"].choices == ("constant", "linear", "cosine", "step")
        assert all(setting.doc.endswith(".") for setting in settings.values())


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adam", optax.adam(1e-3)),
        ("adamw", optax.adamw(1e-3)),
        ("sgd", optax.sgd(1.0)),
        ("momentum", optax.sgd(0.1, 0.9)),
    ],
)
def test_defaults_are_optax_ones_and_nothing_is_in_the_way(name, reference):
    ours, theirs = update(build(name), 3), update(reference, 3)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_settings_work_together():
    """Clipped to norm 5, plus a tenth of the weights, times a rate that rises."""
    optimizer = build("sgd", learning_rate=0.5, clip_norm=5.0, weight_decay=0.1, warmup_steps=2)
    w = np.array([3.0, -4.0])
    for rate in (0.0, 0.25, 0.5):
        w = w - rate * (np.array([3.0, 4.0]) + 0.1 * w)
    np.testing.assert_allclose(update(optimizer, 3)[0], w, rtol=1e-6)


def test_the_weight_decay_of_adamw_is_decoupled():
    zero = {"w": jnp.zeros(2)}
    w, _ = update(build("adamw", learning_rate=0.1, weight_decay=0.5), gradient=zero)
    np.testing.assert_allclose(w, 0.95 * PARAMS["w"], rtol=1e-6)
    # In Adam it is a gradient like any other, whose size Adam divides out.
    w, _ = update(build("adam", learning_rate=0.1, weight_decay=0.5), gradient=zero)
    np.testing.assert_allclose(w, PARAMS["w"] - 0.1 * np.array([1.0, -1.0]), rtol=1e-5)


def test_momentum_and_nesterov():
    g = GRADIENT["w"]
    w, _ = update(build("momentum", learning_rate=0.1, decay=0.5), 2)
    np.testing.assert_allclose(w, PARAMS["w"] - 0.1 * (1 + 1.5) * g, rtol=1e-6)
    w, _ = update(build("momentum", learning_rate=0.1, decay=0.5, nesterov=True), 1)
    np.testing.assert_allclose(w, PARAMS["w"] - 0.1 * 1.5 * g, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "linear"}, {0: 0.4, 50: 0.2, 100: 0.0}),
        ({"schedule": "cosine"}, {0: 0.4, 50: 0.2, 75: 0.2 * (1 - math.sqrt(0.5)), 100: 0.0}),
        ({"schedule": "step", "halve_every": 30}, {0: 0.4, 29: 0.4, 30: 0.2, 60: 0.1}),
        ({"warmup_steps": 10}, {0: 0.0, 5: 0.2, 10: 0.4, 90: 0.4}),
        ({"schedule": "linear", "warmup_steps": 20}, {10: 0.2, 20: 0.4, 60: 0.2, 100: 0.0}),
        (
            {"schedule": "step", "halve_every": 30, "warmup_steps": 20},
            {20: 0.4, 49: 0.4, 50: 0.2},
        ),
    ],
)
def test_schedules(settings, rates):
    schedule = learning_rate_schedule(100, 0.4, **settings)
    for step, rate in rates.items():
        np.testing.assert_allclose(schedule(step), rate, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be greater than 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"learning_rate": math.inf}, "learning_rate=inf"),
        ({"schedule": "exponential"}, "unknown schedule 'exponential': choose one of constant"),
        ({"schedule": "step"}, "schedule=step needs halve_every of at least 1, not None"),
        ({"schedule": "step", "halve_every": 0}, "halve_every=0 must be at least 1"),
        ({"halve_every": 3}, "halve_every=3 needs schedule=step, not constant"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"warmup_steps": 100}, "warmup_steps=100 .* below steps=100"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be greater than 0"),
        ({"clip_norm": math.nan}, "clip_norm=nan must be greater than 0"),
        ({"ema": 1.0}, "ema=1.0 must be at least 0 and below 1"),
        ({"ema": -0.1}, "ema=-0.1"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_out_of_range_is_one_line(name, settings, culprit):
    with pytest.raises(UsageError, match=culprit) as caught:
        build(name, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "setting"), [("adam", "b1"), ("adamw", "b2"), ("momentum", "decay")]
)
def test_decays_of_their_own_are_checked_too(name, setting):
    with pytest.raises(UsageError, match=f"{setting}=1.5 must be"):
        build(name, **{setting: 1.5})


def state_of(params, opt_state):
    return TrainState(jnp.int32(0), params, {}, opt_state, jax.random.key(0))


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_the_average_is_over_what_the_updates_led_to(decay):
    """Beside the sum of all weights by hand; optax's own average of any sequence agrees."""
    optimizer = build("sgd", learning_rate=0.1, ema=decay)
    path = [np.array(PARAMS["w"]) - 0.1 * t * np.array(GRADIENT["w"]) for t in range(1, 6)]
    weights = [decay ** (5 - t) for t in range(1, 6)]
    expected = sum(w * p for w, p in zip(weights, path, strict=True)) / sum(weights)
    w, state = update(optimizer, 5)
    np.testing.assert_allclose(w, path[-1], rtol=1e-5)
    average = averaged_params(state_of({"w": w}, state))["w"]
    np.testing.assert_allclose(average, expected, rtol=1e-4)

    reference = optax.ema(decay)
    theirs = reference.init({"w": jnp.zeros(2)})
    for params in path:
        out, theirs = reference.update({"w": jnp.asarray(params, jnp.float32)}, theirs)
    np.testing.assert_allclose(average, out["w"], rtol=1e-4)


def test_before_any_step_the_average_is_the_parameters():
    optimizer = build("adam", ema=0.99)
    average = averaged_params(state_of(PARAMS, optimizer.init(PARAMS)))
    np.testing.assert_array_equal(average["w"], PARAMS["w"])


def test_without_an_average_there_are_the_parameters():
    state = state_of(PARAMS, build("adam").init(PARAMS))
    assert averaged_params(state) is PARAMS


def test_the_average_of_bfloat16_moves():
    """In bfloat16 a hundredth of a small change would be rounded away."""
    params = {"w": jnp.ones(1, jnp.bfloat16)}
    optimizer = optax.chain(optax.sgd(0.0), average_params(0.99))
    state = optimizer.init(params)
    for _ in range(50):  # fifty at 1, then fifty at 1.0625
        _, state = optimizer.update(params, state, params)
    params = {"w": jnp.full(1, 1.0625, jnp.bfloat16)}
    for _ in range(50):
        _, state = optimizer.update(params, state, params)
    average = averaged_params(state_of(params, state))["w"]
    assert average.dtype == jnp.bfloat16
    assert 1.03 < state[1].average_of_params["w"][0] < 1.05  # 1 + 0.0625 (0.622)


def test_two_averages_are_refused():
    optimizer = optax.chain(build("sgd", ema=0.9), average_params(0.5))
    with pytest.raises(ValueError, match="averages the parameters twice"):
        averaged_params(state_of(PARAMS, optimizer.init(PARAMS)))


def test_the_average_needs_parameters():
    optimizer = average_params(0.5)
    with pytest.raises(ValueError, match="give them to `update`"):
        optimizer.update(GRADIENT, optimizer.init(PARAMS))


def test_where_a_checkpoint_has_the_average():
    params = {"conv": {"w": jnp.zeros(1)}, "other": {"conv": {"w": jnp.ones(1)}}}
    for optimizer in (average_params(0.5), optax.chain(optax.adam(1.0), average_params(0.5))):
        state = state_of(params, optimizer.init(params))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        paths = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
        found = averaged_path("params/conv/w", paths)
        assert found.startswith("opt_state")
        assert paths[found] == 0
        assert paths[averaged_path("params/other/conv/w", paths)] == 1
    assert averaged_path("params/conv/w", {"params/conv/w"}) == "params/conv/w"


def test_the_average_counts_in_integers():
    _, state = update(average_params(0.5), 3)
    assert isinstance(state, AverageState)
    assert (state.count, state.count.dtype) == (3, jnp.int32)
