import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode, Network
from meta_jax.metric_based.relation import class_maps, relation, relation_error
from meta_jax.networks.relation_network import relation_module
from tests.random_trees import moved, normal

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
module = jax.jit(relation_module, static_argnames=("batch_norm", "train"))


def identity(batch_norm):
    """Feature maps are the inputs themselves."""
    return Network(
        lambda key, x: ({}, {}), lambda params, state, x, *, key, train: (x, state), batch_norm
    )


def episode(ways=3, shots=2, queries=2, seed=0):
    sets = []
    for i, n in enumerate((shots, queries)):
        x = normal(ways * n, 4, 4, 2, seed=2 * seed + i)
        sets.append(Batch(x, jnp.tile(jnp.eye(ways), (n, 1))))
    return Episode(*sets)


def initial(learner):
    params, state = jax.jit(learner.init)(KEY, episode())
    return moved(params), state


def answer(mode, support, x):
    learner = relation(identity(mode), features=3)

    @jax.jit
    def logits_and_state(params, state, support, x):
        adapted = learner.adapt(params, state, support, KEY, train=False)
        return learner.predict(params, adapted, x, KEY, train=False)

    return logits_and_state(*initial(learner), support, x)


def test_class_maps_are_sums_over_the_shots():
    support, _ = episode()
    np.testing.assert_allclose(class_maps(*support), support.x[:3] + support.x[3:], atol=1e-14)


def test_identical_shots_give_as_many_times_the_map():
    support, query = episode(shots=1)
    many = Batch(jnp.tile(support.x, (4, 1, 1, 1)), jnp.tile(support.y, (4, 1)))
    np.testing.assert_allclose(class_maps(*many), 4 * class_maps(*support), atol=1e-14)
    # Four times the map is another map: the sum is no mean.
    scaled = Batch(4 * support.x, support.y)
    found, _ = answer("running", many, query.x)
    np.testing.assert_allclose(found, answer("running", scaled, query.x)[0], atol=1e-12)
    assert abs(found - answer("running", support, query.x)[0]).max() > 1e-3


def test_scores_are_the_modules_on_class_maps():
    support, query = episode()
    learner = relation(identity("running"), features=3)
    params, state = initial(learner)
    maps = support.x[:3] + support.x[3:]
    expected, _ = module(
        params["head"], state["head"], maps, query.x, batch_norm="running", train=False
    )
    np.testing.assert_allclose(answer("running", support, query.x)[0], expected, atol=1e-12)


def test_support_mode_takes_the_modules_statistics_from_pairs_of_support_alone():
    support, query = episode()
    learner = relation(identity("support"), features=3)
    params, state = initial(learner)
    maps = class_maps(*support)
    _, stats = module(
        params["head"], state["head"], maps, support.x, batch_norm="support", train=True
    )
    expected, _ = module(params["head"], stats, maps, query.x, batch_norm="support", train=False)
    found, new_state = answer("support", support, query.x)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), new_state["head"], stats
    )


@pytest.mark.parametrize(("ways", "floor"), [(5, 0.16), (20, 0.0475)])
def test_a_score_that_ignores_its_pair_sits_at_the_floor(ways, floor):
    y = jnp.eye(ways)

    def loss(score):
        return relation_error(jnp.full((ways, ways), score), y)[0]

    best = jnp.log(1 / (ways - 1))  # a sigmoid of 1 / ways
    np.testing.assert_allclose(loss(best), floor, atol=1e-12)
    assert loss(best - 0.1) > floor < loss(best + 0.1)


def test_the_error_by_hand_and_without_padding():
    logits = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1 / 3]]))  # sigmoids 3/4, 1/2; 1/2, 1/4
    loss, metrics = relation_error(logits, jnp.eye(2))
    np.testing.assert_allclose(loss, (1 / 16 + 1 / 4 + 1 / 4 + 9 / 16) / 4, atol=1e-14)
    np.testing.assert_allclose(metrics["accuracy"], 0.5)
    padded, _ = relation_error(logits, jnp.array([[1.0, 0.0], [0.0, 0.0]]))
    np.testing.assert_allclose(padded, (1 / 16 + 1 / 4) / 2, atol=1e-14)


@pytest.mark.parametrize("criterion", ["squared_error", "cross_entropy"])
def test_the_criterion_is_a_setting(criterion):
    learner = relation(identity("running"), features=3, criterion=criterion)
    params, state = initial(learner)
    loss, _ = learner.loss(params, state, episode(), KEY)
    support, query = episode()
    logits, _ = module(
        params["head"],
        state["head"],
        class_maps(*support),
        query.x,
        batch_norm="running",
        train=True,
    )
    expected = (
        ((jax.nn.sigmoid(logits) - query.y) ** 2).mean()
        if criterion == "squared_error"
        else -(jax.nn.log_softmax(logits) * query.y).sum(1).mean()
    )
    np.testing.assert_allclose(loss, expected, atol=1e-12)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="unknown criterion 'x': choose one of squared_error"):
        relation(identity("batch"), criterion="x")
    with pytest.raises(ValueError, match="unknown batch norm 'none': choose one of batch"):
        relation(identity("none"))
