"""Weights as they are shipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.weights import compact
from meta_jax.core import Array, Batch, Episode, Tasks
from meta_jax.lookup import UsageError
from meta_jax.metric_based.baseline import simple_shot
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy
from meta_jax.training.record import make_config
from meta_jax.training.trained import Trained, load, save_trained

CLASSES = 3000


@pytest.fixture(name="support")
def fixture_support():
    x = jnp.asarray(np.random.default_rng(0).random((4, 6)), jnp.float32)
    return Batch(x, jnp.eye(4))


@pytest.fixture(name="trained")
def fixture_trained(support):
    task = Episode(*[Batch(support.x, jax.nn.one_hot(jnp.arange(4), CLASSES))] * 2)
    tasks = Tasks(lambda key, data: task, (), cross_entropy)
    learner = simple_shot(mlp((8,)), train_classes=CLASSES)
    params, state = learner.init(jax.random.key(0), task)
    config = make_config(learner, tasks, run={"steps": 1})
    return Trained(learner, params, state, cross_entropy, None, config, {"seconds": 1.0})


def answers(trained: Trained, support: Batch) -> Array:
    key = jax.random.key(1)
    adapted = trained.learner.adapt(trained.params, trained.state, support, key, train=False)
    return trained.learner.predict(trained.params, adapted, 1 - support.x, key, train=False)[0]


def saved(folder, trained: Trained) -> tuple[Trained, int]:
    save_trained(folder, trained)
    return load(folder), sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_classifier_of_training_classes_is_shipped_empty_and_not_missed(
    tmp_path, trained, support
):
    whole, whole_size = saved(tmp_path / "whole", trained)
    less, size = saved(tmp_path / "less", compact(trained))
    assert less.params["head"]["kernel"].shape == (8, CLASSES)
    assert less.metadata["seconds"] == 1
    assert size < whole_size - 3 * 8 * CLASSES
    np.testing.assert_allclose(*(answers(it, support) for it in (less, whole)), rtol=0.01)


def test_weights_are_shipped_in_float16_and_loaded_in_their_own(tmp_path, trained):
    less, _ = saved(tmp_path / "less", compact(trained))
    network, was = (it.params["network"] for it in (less, trained))
    for leaf, before in zip(jax.tree.leaves(network), jax.tree.leaves(was), strict=True):
        assert leaf.dtype == before.dtype
        np.testing.assert_allclose(leaf, before, rtol=2**-11, atol=2**-25)
        np.testing.assert_array_equal(leaf, leaf.astype(jnp.float16))
    again, _ = saved(tmp_path / "again", compact(less))
    jax.tree.map(np.testing.assert_array_equal, again.params, less.params)


def test_a_weight_that_float16_cannot_hold_is_not_shipped_as_infinity(trained):
    network = jax.tree.map(lambda leaf: leaf + 1e5, trained.params["network"])
    with pytest.raises(UsageError, match="65504"):
        compact(trained._replace(params={**trained.params, "network": network}))
