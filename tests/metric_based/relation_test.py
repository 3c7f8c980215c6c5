import jax
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.metric_based.relation import class_maps, relation, relation_error
from meta_jax.networks.mlp import mlp
from meta_jax.networks.relation_network import relation_module
from meta_jax.objectives import squared_error
from tests.random_trees import moved, normal
from tests.small_networks import identity

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
module = jax.jit(relation_module, static_argnames=("normalisation", "moments"))
sums = jax.jit(class_maps)
error = jax.jit(relation_error)


def episode(ways=3, shots=2, queries=2, seed=0):
    sets = []
    for i, n in enumerate((shots, queries)):
        x = np.asarray(normal(ways * n, 4, 4, 2, seed=2 * seed + i))
        sets.append(Batch(x, np.tile(np.eye(ways), (n, 1))))
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

    return jax.tree.map(np.asarray, logits_and_state(*initial(learner), support, x))


def test_class_maps_are_sums_over_the_shots():
    support, _ = episode()
    np.testing.assert_allclose(
        np.asarray(sums(support.x, support.y)), support.x[:3] + support.x[3:], atol=1e-14
    )


def test_identical_shots_give_as_many_times_the_map():
    support, query = episode(shots=1)
    many = Batch(np.tile(support.x, (4, 1, 1, 1)), np.tile(support.y, (4, 1)))
    np.testing.assert_allclose(
        sums(many.x, many.y), 4 * np.asarray(sums(support.x, support.y)), atol=1e-14
    )
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
        params["head"], state["head"], maps, query.x, normalisation="running", moments="stored"
    )
    np.testing.assert_allclose(answer("running", support, query.x)[0], expected, atol=1e-12)


def test_support_mode_takes_the_modules_statistics_from_pairs_of_support_alone():
    support, query = episode()
    learner = relation(identity("support"), features=3)
    params, state = initial(learner)
    maps = np.asarray(sums(support.x, support.y))
    _, stats = module(
        params["head"], state["head"], maps, support.x, normalisation="support", moments="replace"
    )
    expected, _ = module(
        params["head"], stats, maps, query.x, normalisation="support", moments="stored"
    )
    found, new_state = answer("support", support, query.x)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), new_state["head"], stats
    )


@pytest.mark.parametrize(("ways", "floor"), [(5, 0.16), (20, 0.0475)])
def test_a_score_that_ignores_its_pair_sits_at_the_floor(ways, floor):
    y = np.eye(ways)

    def loss(score):
        return float(error(np.full((ways, ways), score), y)[0])

    best = np.log(1 / (ways - 1))  # a sigmoid of 1 / ways
    np.testing.assert_allclose(loss(best), floor, atol=1e-12)
    assert loss(best - 0.1) > floor < loss(best + 0.1)


def test_the_error_by_hand_and_without_padding():
    logits = np.log(np.array([[3.0, 1.0], [1.0, 1 / 3]]))  # sigmoids 3/4, 1/2; 1/2, 1/4
    loss, _ = error(logits, np.eye(2))
    np.testing.assert_allclose(loss, (1 / 16 + 1 / 4 + 1 / 4 + 9 / 16) / 4, atol=1e-14)
    padded, _ = error(logits, np.eye(2), np.array([True, False]))
    np.testing.assert_allclose(padded, (1 / 16 + 1 / 4) / 2, atol=1e-14)
    with pytest.raises(ValueError, match="differ in shape"):
        relation_error(logits, np.eye(2)[:1])


@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_the_training_loss_is_a_setting_and_tests_measure_the_objective(loss):
    learner = relation(identity("batch"), features=3, loss=loss)
    params, state = initial(learner)
    value, aux = jax.jit(learner.loss)(params, state, episode(), KEY)
    assert set(aux.metrics) == {"accuracy"}
    support, query = episode()
    logits, _ = module(
        params["head"],
        state["head"],
        np.asarray(sums(support.x, support.y)),
        query.x,
        normalisation="batch",
        moments="batch",
    )
    logits = np.asarray(logits)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    cross = -(log_p * query.y).sum(1).mean()
    squared = ((1 / (1 + np.exp(-logits)) - query.y) ** 2).mean()
    np.testing.assert_allclose(value, squared if loss == "squared_error" else cross, atol=1e-12)
    measured = jax.jit(learner.evaluate)(params, state, episode(), KEY)
    np.testing.assert_allclose(measured["loss"], cross, atol=1e-12)


def test_one_at_a_time_normalises_each_query_s_pairs_beside_the_support_s():
    support, query = episode()
    learner = relation(identity("one_at_a_time"), features=3)
    params, state = initial(learner)
    maps = np.asarray(sums(support.x, support.y))
    found, new_state = answer("one_at_a_time", support, query.x)
    for i in (0, 3):
        beside = np.concatenate([support.x, query.x[i : i + 1]])
        expected, _ = module(
            params["head"], state["head"], maps, beside, normalisation="batch", moments="batch"
        )
        np.testing.assert_allclose(found[i], np.asarray(expected)[-1], atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, new_state, state)


def test_joint_encoding_follows_the_mode():
    assert relation(identity("running")).config["joint_encoding"]
    assert not relation(identity("batch")).config["joint_encoding"]


def test_a_network_that_gives_vectors_is_refused_in_one_line():
    learner = relation(mlp((4,)))
    with pytest.raises(
        UsageError, match=r"network gives \[6, 4\]: use --network=relation_enc"
    ) as e:
        learner.init(KEY, episode())
    assert "\n" not in str(e.value)


def test_unknown_settings_are_refused():
    with pytest.raises(UsageError, match="unknown loss 'x': choose one of squared_error"):
        relation(identity("batch"), loss="x")
    with pytest.raises(UsageError, match="unknown normalisation 'x': choose one of"):
        relation(identity("x"))
    with pytest.raises(UsageError, match="relation is for classification"):
        relation(identity("batch"), objective=squared_error)
