import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import cross_entropy
from meta_jax.data.dataset import ImageDataset
from meta_jax.data.episodes import EpisodeSpec, sample_episode
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.model_based.mann import mann
from meta_jax.networks.mlp import mlp
from meta_jax.training.evaluation import (
    Score,
    confidence_interval,
    make_evaluate,
    make_evaluate_sequences,
)

LEARNER = prototypical(mlp((6,)))
EPISODES = 5


def dataset():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 4, 1), np.uint8)
    return ImageDataset(jnp.asarray(images), jnp.full(6, 4, jnp.int32), jnp.zeros(6, jnp.int32))


@jax.jit
def sampler(key, data):
    return sample_episode(key, data, EpisodeSpec(3, 1, 2))


@pytest.fixture(scope="module")
def evaluate():
    return make_evaluate(LEARNER, sampler, cross_entropy, episodes=EPISODES)


@pytest.fixture(scope="module")
def learned():
    return LEARNER.init(jax.random.key(0), sampler(jax.random.key(1), dataset()))


def test_one_value_for_each_episode(evaluate, learned):
    metrics = evaluate(*learned, dataset(), jax.random.key(2))
    assert set(metrics) == {"loss", "accuracy"}
    for values in metrics.values():
        assert isinstance(values, np.ndarray)
        assert values.shape == (EPISODES,)
        assert len(set(values.tolist())) > 1  # the episodes differ


def test_the_same_key_draws_the_same_episodes(evaluate, learned):
    first, again, other = (
        evaluate(*learned, dataset(), jax.random.key(seed))["loss"] for seed in (2, 2, 3)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_the_parameters_are_left_as_they_are(evaluate, learned):
    before = jax.tree.map(np.array, learned)
    evaluate(*learned, dataset(), jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, learned, before)


def test_values_are_those_of_the_learner_at_test(evaluate, learned):
    seen = []

    def recording(key, data):
        episode = sampler(key, data)
        jax.debug.callback(lambda *leaves: seen.append(leaves), *jax.tree.leaves(episode))
        return episode

    metrics = make_evaluate(LEARNER, recording, cross_entropy, episodes=EPISODES)(
        *learned, dataset(), jax.random.key(2)
    )
    jax.effects_barrier()
    assert len(seen) == EPISODES
    params, _ = learned
    losses = []
    for x, y, query_x, query_y in seen:
        z, query_z = (
            np.maximum(
                np.reshape(x, (len(x), -1)) @ params["network"]["layer1"]["kernel"]
                + params["network"]["layer1"]["bias"],
                0,
            )
            for x in (x, query_x)
        )
        logits = -((query_z[:, None] - np.asarray(y).T @ z) ** 2).sum(-1)
        losses.append(cross_entropy(logits, query_y)[0])
    np.testing.assert_allclose(np.sort(metrics["loss"]), np.sort(losses), rtol=1e-4)


def test_learners_are_told_that_they_are_tested(learned):
    told = []

    def adapt(*arguments, train):
        told.append(train)
        return LEARNER.adapt(*arguments, train=train)

    def predict(*arguments, train):
        told.append(train)
        return LEARNER.predict(*arguments, train=train)

    learner = LEARNER._replace(adapt=adapt, predict=predict)
    make_evaluate(learner, sampler, cross_entropy, episodes=1)(
        *learned, dataset(), jax.random.key(0)
    )
    assert told
    assert not any(told)


def test_the_confidence_interval_in_closed_form():
    # Mean 3/4; sample variance (3/16) 4/3 = 1/4 over four episodes: 1.96 (1/2) / 2.
    score = confidence_interval(np.array([1.0, 0.0, 1.0, 1.0]))
    assert isinstance(score, Score)
    assert score.mean == 0.75
    np.testing.assert_allclose(score.ci95, 0.49, atol=1e-9)
    assert confidence_interval(np.full(7, 0.5)) == Score(0.5, 0.0)


def test_the_sequence_protocol_scores_the_answers_on_the_way():
    learner = mann(mlp((6,)), units=4, slots=4, width=2, heads=1)
    learned = learner.init(jax.random.key(0), sampler(jax.random.key(1), dataset()))
    seen = []

    def recording(*arguments, train):
        assert not train
        adapted = learner.adapt(*arguments, train=train)
        jax.debug.callback(lambda *leaves: seen.append(leaves), adapted.logits, arguments[2].y)
        return adapted

    evaluate = make_evaluate_sequences(
        learner._replace(adapt=recording), sampler, episodes=EPISODES
    )
    metrics = evaluate(*learned, dataset(), jax.random.key(2))
    jax.effects_barrier()
    assert set(metrics) == {"loss", "accuracy", "instance_1", "instance_2", "instance_3"}
    assert len(seen) == EPISODES
    accuracies = []
    for logits, y in seen:
        assert logits.shape == y.shape == (9, 3)
        right = logits.argmax(1) == y.argmax(1)
        third = np.array([y[: t + 1].sum(0) @ y[t] == 3 for t in range(9)])
        accuracies.append((right.mean(), right[third].mean()))
    for name, values in zip(("accuracy", "instance_3"), zip(*accuracies, strict=True), strict=True):
        np.testing.assert_allclose(np.sort(metrics[name]), np.sort(values), atol=1e-6)
