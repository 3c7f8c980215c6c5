"""Weights as they are shipped."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.weights import without_classifier
from meta_jax.core import Batch, Episode, Tasks
from meta_jax.metric_based.baseline import simple_shot
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy
from meta_jax.training.record import make_config
from meta_jax.training.trained import Trained, load, save_trained


def test_a_classifier_of_training_classes_is_shipped_empty_and_not_missed(tmp_path):
    classes, generator = 3000, np.random.default_rng(0)
    x = jnp.asarray(generator.random((4, 6)), jnp.float32)
    task = Episode(*[Batch(x, jax.nn.one_hot(jnp.arange(4), classes))] * 2)
    tasks = Tasks(lambda key, data: task, (), cross_entropy)
    learner = simple_shot(mlp((8,)), train_classes=classes)
    params, state = learner.init(jax.random.key(0), task)
    config = make_config(learner, tasks, run={"steps": 1})
    whole = Trained(learner, params, state, cross_entropy, None, config, {"seconds": 1.0})
    sizes, answers = [], []
    for name, trained in (("whole", whole), ("less", without_classifier(whole))):
        save_trained(tmp_path / name, trained)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        sizes.append(sum(path.stat().st_size for path in files))
        loaded = load(tmp_path / name)
        assert loaded.params["head"]["kernel"].shape == (8, classes)
        assert loaded.metadata["seconds"] == 1
        key, support = jax.random.key(1), Batch(x, jnp.eye(4))
        adapted = learner.adapt(loaded.params, loaded.state, support, key, train=False)
        answers.append(learner.predict(loaded.params, adapted, 1 - x, key, train=False)[0])
    assert sizes[1] < sizes[0] - 3 * 8 * classes
    np.testing.assert_array_equal(*answers)
