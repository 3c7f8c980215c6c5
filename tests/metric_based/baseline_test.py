import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.metric_based.baseline import (
    baseline,
    baseline_plus_plus,
    cosine_logits,
    descend,
    linear_logits,
    simple_shot,
)
from meta_jax.metric_based.heads import Examples
from meta_jax.networks.functions import from_functions
from meta_jax.objectives import squared_error
from tests.random_trees import normal

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
# Embeddings are the inputs themselves, so that what stands on them is seen alone.
IDENTITY = from_functions(lambda key, x: {}, lambda params, x: x)
FACTORIES = {f.__name__: f for f in (baseline, baseline_plus_plus, simple_shot)}


def batch(labels, classes, seed, size=4):
    return Batch(normal(len(labels), size, seed=seed), jnp.eye(classes)[np.array(labels)])


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def answers(learner, params, state, support, x):
    adapted = learner.adapt(params, state, support, KEY, train=False)
    return np.asarray(learner.predict(params, adapted, x, KEY, train=False)[0])


@pytest.mark.parametrize("name", FACTORIES)
def test_training_classifies_all_images_among_all_classes(name):
    learner = FACTORIES[name](IDENTITY, train_classes=6)
    task = Episode(batch([0, 5], 6, seed=1), batch([3, 3, 1], 6, seed=2))
    params, state = learner.init(KEY, task)
    value, aux = learner.loss(params, state, task, KEY)
    z = np.concatenate([task.support.x, task.query.x])
    head = params["head"]
    if name == "baseline_plus_plus":
        assert set(head) == {"kernel"}
        logits = 2 * unit(z) @ unit(np.asarray(head["kernel"]).T).T
    else:
        logits = z @ head["kernel"] + head["bias"]
    probability = softmax(np.asarray(logits))[np.arange(5), [0, 5, 3, 3, 1]]
    np.testing.assert_allclose(value, -np.log(probability).mean(), rtol=1e-9)
    assert 0 <= float(aux.metrics["accuracy"]) <= 1
    # A running mean of embeddings, for a test that centres them.
    np.testing.assert_allclose(
        aux.state["head"]["mean"], 0.01 * np.asarray(task.support.x).mean(0), rtol=1e-9
    )


def test_labels_of_another_number_of_classes_are_refused():
    learner = baseline(IDENTITY, train_classes=6)
    task = Episode(batch([0, 1], 2, seed=1), batch([1], 2, seed=2))
    params, state = learner.init(KEY, task)
    with pytest.raises(ValueError, match=r"train_classes=6, and labels are of 2 .*all_classes"):
        jax.eval_shape(learner.loss, params, state, task, KEY)


def test_the_head_is_trained_by_gradient_descent():
    z, y = np.asarray(normal(5, 3, seed=1)), np.eye(2)[[0, 1, 1, 0, 1]]
    kernel, bias = np.zeros((3, 2)), np.zeros(2)
    for _ in range(7):
        away = (softmax(z @ kernel + bias) - y) / 5
        kernel, bias = (
            kernel - 0.3 * (z.T @ away + 0.1 * kernel),
            bias - 0.3 * (away.sum(0) + 0.1 * bias),
        )
    settings = {"head_steps": 7, "head_lr": 0.3, "head_decay": 0.1}
    learner = baseline(IDENTITY, train_classes=6, **settings)
    support, x = Batch(jnp.asarray(z), jnp.asarray(y)), normal(4, 3, seed=2)
    params, state = learner.init(KEY, Episode(support, support))
    found = answers(learner, params, state, support, x)
    np.testing.assert_allclose(found, x @ kernel + bias, rtol=1e-9)


def test_descent_ends_where_the_gradient_is_zero():
    examples = Examples(normal(6, 3, seed=1), jnp.eye(2)[np.array([0, 1, 1, 0, 1, 0])], None)
    start = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
    found = descend(linear_logits, start, examples, steps=3000, learning_rate=0.5, weight_decay=0.1)
    away = softmax(np.asarray(linear_logits(found, examples.z))) - examples.y
    np.testing.assert_allclose(examples.z.T @ away / 6, -0.1 * found["kernel"], atol=1e-9)


def test_cosine_heads_start_from_the_class_means():
    learner = baseline_plus_plus(IDENTITY, train_classes=6, head_steps=0)
    support, x = batch([0, 1, 1, 0], 2, seed=1), normal(3, 4, seed=2)
    params, state = learner.init(KEY, Episode(support, support))
    z = unit(np.asarray(support.x))
    means = unit(np.stack([z[[0, 3]].mean(0), z[[1, 2]].mean(0)]))
    expected = 2 * unit(np.asarray(x)) @ means.T
    np.testing.assert_allclose(answers(learner, params, state, support, x), expected, rtol=1e-9)
    # Steps lower the loss on the support set.
    trained = baseline_plus_plus(IDENTITY, train_classes=6, head_steps=50, head_lr=0.1)
    before, after = (
        softmax(answers(one, params, state, support, support.x))[np.arange(4), [0, 1, 1, 0]]
        for one in (learner, trained)
    )
    assert -np.log(after).mean() < -np.log(before).mean() - 1e-3


def test_cosines_are_scaled_more_for_many_classes():
    z = jnp.array([[2.0, 0.0]])
    few, many = (cosine_logits({"kernel": jnp.ones((2, n))}, z) for n in (200, 201))
    np.testing.assert_allclose(few, 2 / 2**0.5)
    np.testing.assert_allclose(many, 10 / 2**0.5)


@pytest.mark.parametrize("transform", ["none", "l2", "centred_l2"])
def test_simple_shot_takes_the_nearest_class_mean(transform):
    learner = simple_shot(IDENTITY, train_classes=6, transform=transform)
    support, x = batch([0, 1, 1, 0], 2, seed=1), normal(3, 4, seed=2)
    params, state = learner.init(KEY, Episode(support, support))
    mean = np.array([0.5, -1.0, 0.0, 2.0])
    state = {**state, "head": {"mean": jnp.asarray(mean)}}
    z, queries = np.asarray(support.x), np.asarray(x)
    if transform == "centred_l2":
        z, queries = z - mean, queries - mean
    if transform != "none":
        z, queries = unit(z), unit(queries)
    means = np.stack([z[[0, 3]].mean(0), z[[1, 2]].mean(0)])
    expected = -((queries[:, None] - means) ** 2).sum(-1)
    np.testing.assert_allclose(answers(learner, params, state, support, x), expected, rtol=1e-9)


@pytest.mark.parametrize("name", FACTORIES)
def test_settings_that_make_no_sense_are_refused(name):
    with pytest.raises(UsageError, match=f"{name} is for classification"):
        FACTORIES[name](IDENTITY, train_classes=6, objective=squared_error)
    if name != "simple_shot":
        for setting in ("head_steps", "head_lr", "head_decay"):
            with pytest.raises(UsageError, match=setting):
                FACTORIES[name](IDENTITY, train_classes=6, **{setting: -1})
