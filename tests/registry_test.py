"""Components by name: settings from signatures, defaults that depend on others, records."""

import enum
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import pytest

from meta_jax import registry
from meta_jax.core import Array, MetaLearner, Network, Objective
from meta_jax.lookup import UsageError
from meta_jax.objectives import cross_entropy, squared_error


def wide(features: int = 3, *, mode: Literal["a", "b"] = "a") -> Network:
    """Builds a network that repeats its inputs.

    Args:
      features: Number of copies, which may
        take two lines.
      mode: Way of copying.
    """

    def init(key: Array, x: Array) -> tuple[dict, dict]:
        return {}, {}

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        return jnp.repeat(x, features, 1), state

    return Network(init, apply)


def method(
    network: Network,
    *,
    objective: Objective = cross_entropy,
    rate: float | None = None,
    steps: int = 2,
    sizes: tuple[int, ...] = (4, 4),
    inner: object = None,
    quiet: bool = False,
) -> MetaLearner:
    """Builds a learner that does nothing.

    Args:
      network: The embedding.
      objective: What is asked.
      rate: Learning rate; by default a tenth for classes, else a hundredth.
      steps: Number of steps.
      sizes: Layer sizes.
      inner: Something for Python alone.
      quiet: Whether it is quiet.
    """

    def nothing(*arguments, **settings):
        return {}, {}

    return MetaLearner(nothing, nothing, nothing, nothing, nothing)


by_kind = {"rate": lambda network, objective: 0.1 if objective.kind == "classification" else 0.01}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    registry.network("wide")(wide)
    registry.learner("method", network="wide", defaults=by_kind)(method)


def test_settings_are_read_from_signature_and_docstring():
    settings = registry.settings(registry.find("learner", "method"), reserved=("objective",))
    assert list(settings) == ["rate", "steps", "sizes", "quiet"]
    assert settings["rate"] == registry.Setting(
        "rate",
        float,
        None,
        (),
        True,
        "Learning rate; by default a tenth for classes, else a hundredth.",
    )
    assert settings["steps"][1:5] == (int, 2, (), False)
    assert settings["sizes"][1:3] == (tuple, (4, 4))
    assert settings["quiet"].type is bool
    network = registry.settings(registry.find("network", "wide"))
    assert network["mode"].choices == ("a", "b")
    assert network["features"].doc == "Number of copies, which may take two lines."


def test_what_is_built_says_what_it_is_with_defaults_resolved():
    factory = registry.find("learner", "method").factory
    network = registry.find("network", "wide").factory(mode="b")
    assert network.config == {"name": f"{__name__}:wide", "features": 3, "mode": "b"}
    config = factory(network, steps=5).config
    assert config["rate"] == 0.1
    assert config["steps"] == 5
    assert config["objective"] == "cross_entropy"
    assert config["network"] == network.config
    assert factory(network, objective="squared_error").config["rate"] == 0.01
    assert factory(network, objective=squared_error, rate=7.0).config["rate"] == 7.0


def test_a_record_builds_the_same_component_again():
    factory = registry.find("learner", "method").factory
    learner = factory(registry.find("network", "wide").factory(5), sizes=(1, 2))
    again = registry.build("learner", learner.config)
    assert again.config == learner.config


def test_a_record_of_what_only_python_can_say_is_refused():
    factory = registry.find("learner", "method").factory
    learner = factory(registry.find("network", "wide").factory(), inner=lambda x: x)
    with pytest.raises(UsageError, match="inner="):
        registry.build("learner", learner.config)
    with pytest.raises(UsageError, match=r"no setting 'speed'.*rate, steps"):
        registry.build("learner", {**learner.config, "inner": None, "speed": 1})


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(UsageError, match=r"unknown learner 'mathod'.*method.*package\.module"):
        registry.find("learner", "mathod")


def test_somebodys_own_component_is_found_by_its_path():
    found = registry.find("network", f"{__name__}:wide")
    assert found.factory(2).config == {"name": f"{__name__}:wide", "features": 2, "mode": "a"}
    x = jnp.ones((2, 1))
    assert found.factory(2).apply({}, {}, x, key=None, train=False)[0].shape == (2, 2)
    own = registry.find("learner", f"{__name__}:method")
    assert own.network == "conv4"
    for path, reason in (
        ("no.such.module:f", "cannot be imported"),
        (f"{__name__}:absent", "has no 'absent'"),
        ("math:pi", "not a function"),
    ):
        with pytest.raises(UsageError, match=reason):
            registry.find("network", path)


def test_what_is_no_network_is_refused_with_the_adapters_names():
    factory = registry.find("learner", "method").factory
    with pytest.raises(TypeError, match=r"method needs a meta_jax Network, not a int.*from_linen"):
        factory(3)


def test_every_registered_setting_has_a_sentence():
    registered = [
        component
        for kind in ("learner", "network", "tasks", "optimizer", "rule", "family", "estimator")
        for name in registry.names(kind)
        for component in [registry.find(kind, name)]
    ]
    for component in registered:
        for setting in registry.settings(component).values():
            assert setting.doc.endswith("."), (component.name, setting.name)


def test_a_learner_that_ignores_its_argument_is_still_a_function():
    # functools.wraps keeps name and docstring for help and documentation.
    factory = registry.find("learner", "method").factory
    assert factory.__name__ == "method"
    assert registry.summary(registry.find("learner", "method")) == (
        "Builds a learner that does nothing."
    )
    assert jax.tree.leaves(factory(wide()).init(None, None)) == []


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


def unannotated(network, *, objective=cross_entropy, depth=2, scale=0.5, level: Literal[1, 2] = 1):
    return method(network, objective=objective)


def positional(network: Network, /, *, objective=cross_entropy, colour: Colour = Colour.RED):
    return method(network, objective=objective)._replace(state_scope=colour.name.lower())


def passing(network: Network, *, objective=cross_entropy, **others):
    return method(network, objective=objective, **others)


def named(network: Network, *, objective=cross_entropy, name: str = "cub"):
    return method(network, objective=objective)


def test_settings_of_ones_own_learner_need_no_annotations():
    component = registry.find("learner", f"{__name__}:unannotated")
    settings = registry.settings(component, reserved=("objective",))
    assert {name: each.type for name, each in settings.items()} == {
        "depth": int,
        "scale": float,
        "level": str,
    }
    assert settings["level"].choices == (1, 2)


def test_keywords_that_are_passed_on_are_no_settings_but_recorded():
    component = registry.find("learner", f"{__name__}:passing")
    assert registry.settings(component, reserved=("objective",)) == {}
    network = registry.find("network", f"{__name__}:wide").factory()
    built = component.factory(network, rate=0.5)
    assert built.config["rate"] == 0.5
    assert registry.build("learner", built.config).config == built.config


def test_a_record_builds_the_same_values_again():
    component = registry.find("learner", f"{__name__}:positional")
    network = registry.find("network", f"{__name__}:wide").factory()
    built = component.factory(network)
    assert built.config["name"] == f"{__name__}:positional"
    assert built.config["network"] == network.config
    assert registry.build("learner", built.config).state_scope == "red"
    other = component.factory(network, colour=Colour.BLUE)
    with pytest.raises(UsageError, match=r"built in Python with colour=Colour\.BLUE"):
        registry.build("learner", other.config)


def test_a_setting_called_name_is_refused():
    with pytest.raises(UsageError, match=r"has a setting called 'name'.*rename it"):
        registry.find("learner", f"{__name__}:named")


@pytest.mark.parametrize("path", [":x", ".own:x", "own:"])
def test_a_path_that_names_nothing_is_refused(path):
    with pytest.raises(UsageError, match="names no function"):
        registry.find("learner", path)


def plain_sgd(learning_rate: float = 0.1):
    return optax.sgd(learning_rate)


def counted_sgd(steps, /, *, learning_rate: float = 0.1):
    return optax.sgd(optax.linear_schedule(learning_rate, 0, steps))


def no_optimizer():
    return None


def test_an_optimizer_gets_the_steps_where_it_has_them():
    def first_update(name, **given):
        found = registry.find("optimizer", f"{__name__}:{name}")
        optimizer = registry.build_optimizer(found, 1000, given)
        return float(optimizer.update(jnp.ones(()), optimizer.init(jnp.ones(())))[0])

    assert first_update("plain_sgd") == pytest.approx(-0.1)
    assert first_update("counted_sgd", learning_rate=0.2) == pytest.approx(-0.2)
    with pytest.raises(UsageError, match="returns nothing, not an optax"):
        first_update("no_optimizer")
    found = registry.find("optimizer", "optax:adam")
    assert registry.build_optimizer(found, 1000, {"learning_rate": 0.1}).update


def test_a_learner_called_on_arrays_compiles_itself_once():
    traced = []

    def counted(network: Network, *, objective: Objective = cross_entropy) -> MetaLearner:
        def adapt(params, state, support, key, *, train):
            traced.append(train)
            return jax.lax.fori_loop(0, 3, lambda i, s: s + params, support)

        return method(network, objective=objective)._replace(adapt=adapt)

    network = registry.find("network", f"{__name__}:wide").factory()
    learner = registry.learner("counted for a test")(counted)(network)
    key, x = jax.random.key(0), jnp.ones(2)
    for _ in range(3):
        found = learner.adapt(x, {}, x, key, train=False)
    assert found.tolist() == [4, 4]
    assert traced == [False]
    learner.adapt(x, {}, x, key, train=True)
    assert traced == [False, True]
    gradient = jax.grad(lambda p: learner.adapt(p, {}, x, key, train=True).sum())(x)
    assert gradient.tolist() == [3, 3]
