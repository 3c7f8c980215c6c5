import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import MetaLearner, Tasks, supervised_evaluate
from meta_jax.data.dataset import dataset_from_classes
from meta_jax.data.episodes import EpisodeSpec, sample_episode
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.model_based.mann import mann
from meta_jax.model_based.sequence import sequence_evaluate
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy, cross_entropy_loss
from meta_jax.training.evaluation import (
    MeanCI,
    confidence_interval,
    evaluate_each,
    fitting_chunk,
    in_query_chunks,
    make_evaluate,
    make_validate,
)
from meta_jax.training.optimizers import average_params
from meta_jax.training.outer_step import init_train_state
from tests.checkers import key_and_leak_checks

LEARNER = prototypical(mlp((6,)))
EPISODES = 5


def dataset():
    return dataset_from_classes(
        np.random.default_rng(0).integers(0, 256, (6, 4, 4, 4, 1), np.uint8)
    )


@jax.jit
def sample(key, data):
    return sample_episode(key, data, EpisodeSpec(3, 1, 2))


@pytest.fixture(scope="module")
def evaluate():
    return make_evaluate(LEARNER, sample, episodes=EPISODES)


@pytest.fixture(scope="module")
def learned():
    return LEARNER.init(jax.random.key(0), sample(jax.random.key(1), dataset()))


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
    """Beside logits worked out in NumPy."""
    seen = []

    def recording(key, data):
        episode = sample(key, data)
        leaves = (*episode.support[:2], *episode.query[:2])
        jax.debug.callback(lambda *leaves: seen.append(leaves), *leaves)
        return episode

    metrics = make_evaluate(LEARNER, recording, episodes=EPISODES)(
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
        losses.append(cross_entropy_loss(logits, query_y)[0])
    np.testing.assert_allclose(np.sort(metrics["loss"]), np.sort(losses), rtol=1e-4)


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_the_result_does_not_depend_on_the_chunk(evaluate, learned, chunk):
    in_chunks = make_evaluate(LEARNER, sample, episodes=EPISODES, chunk=chunk)
    arguments = (*learned, dataset(), jax.random.key(2))
    found, expected = in_chunks(*arguments), evaluate(*arguments)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert len(set(values.tolist())) > 1  # the order counts
        np.testing.assert_allclose(found[name], values, rtol=1e-5)


def test_a_chunk_of_none_is_refused():
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        make_evaluate(LEARNER, sample, episodes=EPISODES, chunk=0)


class Planned:
    """A jitted test whose temporaries take `bytes_each` for each episode of a chunk."""

    def __init__(self, chunk, bytes_each):
        self.temp_size_in_bytes = chunk * bytes_each

    def lower(self):
        return self

    def compile(self):
        return self

    def memory_analysis(self):
        return self


@pytest.mark.parametrize(("bytes_each", "chunk"), [(1, 32), (100, 10), (600, 1), (2000, 1)])
def test_a_chunk_fits_the_memory(bytes_each, chunk):
    built = []

    def build(size):
        built.append(size)
        return Planned(size, bytes_each)

    assert fitting_chunk(build, (), 32, memory=1000) == chunk
    assert len(built) <= 2


def test_what_a_chunk_takes_is_read_off_the_compiled_program():
    def build(chunk):
        return jax.jit(lambda x: jax.lax.map(lambda k: jnp.sort(x + k).sum(), x, batch_size=chunk))

    x = jnp.zeros(256)
    taken = build(16).lower(x).compile().memory_analysis().temp_size_in_bytes
    assert fitting_chunk(build, (x,), 16, memory=taken) == 16
    assert 1 <= fitting_chunk(build, (x,), 16, memory=taken // 2) <= 8


def test_the_learner_says_what_is_measured():
    """Whatever a task is, and whatever its metrics are called."""

    def own(params, state, task, key):
        return {"distance": jnp.abs(task["goal"] - params), "noise": jax.random.uniform(key)}

    learner = MetaLearner(None, None, None, None, own)

    def sample_goal(key, data):
        return {"goal": data + jax.random.normal(key)}

    with key_and_leak_checks():
        metrics = make_evaluate(learner, sample_goal, episodes=4)(
            jnp.float32(2.0), {}, jnp.float32(10.0), jax.random.key(0)
        )
    keys = jax.random.split(jax.random.key(0), 4)
    pairs = [jax.random.split(key) for key in keys]
    goals = [10 + jax.random.normal(goal_key) for goal_key, _ in pairs]
    np.testing.assert_allclose(metrics["distance"], np.abs(np.array(goals) - 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["noise"], [jax.random.uniform(k) for _, k in pairs])


@pytest.mark.parametrize("episodes", [0, 3])
def test_episodes_that_devices_cannot_share_are_refused(episodes):
    class TwoDevices:
        size = 2

    with pytest.raises(ValueError, match=f"2 devices must divide {episodes} episodes"):
        make_evaluate(LEARNER, sample, episodes=episodes, mesh=TwoDevices())


def test_validation_tests_the_averaged_parameters_on_the_same_tasks_every_time(evaluate):
    tasks = Tasks(sample, dataset(), cross_entropy)
    optimizer = optax.chain(optax.sgd(1.0), average_params(0.5))
    train_state = init_train_state(LEARNER, optimizer, tasks, 0)
    zeros = jax.tree.map(jnp.zeros_like, train_state.params)
    moved = train_state._replace(params=zeros)  # the average is still where they were
    validate = make_validate(LEARNER, tasks, episodes=EPISODES)
    scores = validate(moved)
    assert scores == validate(train_state)
    key = jax.random.fold_in(jax.random.key(0), 0)
    expected = evaluate(train_state.params, train_state.state, tasks.data, key)
    assert scores == {name: float(values.mean()) for name, values in expected.items()}
    assert scores["loss"] != pytest.approx(np.log(3), rel=1e-3)  # which zeros would give


def test_the_confidence_interval_in_closed_form():
    # Mean 3/4; sample variance (3/16) 4/3 = 1/4 over four episodes: 1.96 (1/2) / 2.
    score = confidence_interval(np.array([1.0, 0.0, 1.0, 1.0]))
    assert isinstance(score, MeanCI)
    assert score.mean == 0.75
    np.testing.assert_allclose(score.ci95, 0.49, atol=1e-9)
    assert confidence_interval(np.full(7, 0.5)) == MeanCI(0.5, 0.0)


@pytest.mark.parametrize("shape", [(1,), (3, 2), ()])
def test_no_interval_of_less_than_two_values(shape):
    with pytest.raises(ValueError, match="values must be"):
        confidence_interval(np.zeros(shape))


def test_learners_are_told_that_they_are_tested(learned):
    told = []

    def adapt(*arguments, train):
        told.append(train)
        return LEARNER.adapt(*arguments, train=train)

    def predict(*arguments, train, mask=None):
        told.append(train)
        return LEARNER.predict(*arguments, train=train, mask=mask)

    learner = LEARNER._replace(evaluate=supervised_evaluate(adapt, predict, cross_entropy))
    make_evaluate(learner, sample, episodes=1)(*learned, dataset(), jax.random.key(0))
    assert told
    assert not any(told)


def test_the_sequence_protocol_scores_the_answers_on_the_way():
    learner = mann(mlp((6,)), hidden_size=4, num_slots=4, slot_size=2, num_heads=1)
    learned = learner.init(jax.random.key(0), sample(jax.random.key(1), dataset()))
    seen = []

    def recording(*arguments, train):
        assert not train
        adapted = learner.adapt(*arguments, train=train)
        jax.debug.callback(lambda *leaves: seen.append(leaves), adapted.logits, arguments[2].y)
        return adapted

    learner = learner._replace(evaluate=sequence_evaluate(recording))
    metrics = make_evaluate(learner, sample, episodes=EPISODES)(
        *learned, dataset(), jax.random.key(2)
    )
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


def test_where_the_chunk_is_found_one_compilation_serves(learned, evaluate, monkeypatch, caplog):
    arguments = (*learned, dataset(), jax.random.key(2))
    expected = evaluate(*arguments)["loss"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = make_evaluate(LEARNER, sample, episodes=EPISODES)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        values = [found(*arguments)["loss"] for _ in range(2)]
    compiled = [r for r in caplog.messages if r.startswith("Finished XLA compilation of jit(eval")]
    assert len(compiled) == 1, caplog.messages
    for value in values:
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_queries_in_chunks_get_the_same_answers(learned):
    task, key = sample(jax.random.key(5), dataset()), jax.random.key(6)
    expected = LEARNER.evaluate(*learned, task, key)
    mask = jnp.array([True, True, False, True, True, True])
    masked = task._replace(query=task.query._replace(mask=mask))
    of_masked = LEARNER.evaluate(*learned, masked, key)
    assert expected["loss"] != of_masked["loss"]
    for chunk in (1, 4, 6, 100):  # 6 queries
        learner = in_query_chunks(LEARNER, cross_entropy, chunk)
        for asked, answer in ((task, expected), (masked, of_masked)):
            found = jax.jit(learner.evaluate)(*learned, asked, key)
            for name, value in answer.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 1 query"):
        in_query_chunks(LEARNER, cross_entropy, 0)


def test_queries_in_chunks_take_less_memory():
    learner = prototypical(mlp((512,)))
    task = sample(jax.random.key(5), dataset())
    learned = jax.eval_shape(learner.init, jax.random.key(0), task)
    query = jax.tree.map(lambda leaf: jnp.tile(leaf, (1000, *[1] * (leaf.ndim - 1))), task.query)
    arguments = (*learned, task._replace(query=query), jax.random.key(0))

    def temporaries(one):
        return (
            jax.jit(one.evaluate).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        )

    chunked = in_query_chunks(learner, cross_entropy, 100)
    assert temporaries(chunked) < 0.5 * temporaries(learner)


def test_each_given_task_is_tested_once(learned):
    tasks = [sample(jax.random.key(seed), dataset()) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)
    found = evaluate_each(LEARNER, *learned, stacked, jax.random.key(0))
    for name, values in found.items():
        alone = [LEARNER.evaluate(*learned, task, jax.random.key(0))[name] for task in tasks]
        np.testing.assert_allclose(values, alone, rtol=1e-5)
    assert len(set(found["loss"].tolist())) == 3
