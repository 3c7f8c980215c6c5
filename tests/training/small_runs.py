"""Small learners and their states, on which outer steps and loops are tested."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meta_jax.core import MetaLearner, Tasks
from meta_jax.data.dataset import dataset_from_classes
from meta_jax.data.episodes import EpisodeSpec, sample_episode
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy, squared_error
from meta_jax.training.outer_step import (
    init_train_state,
    make_outer_step,
)

LEARNER = prototypical(mlp((6,)))
OPTIMIZER = optax.adam(1e-2)
SPEC = EpisodeSpec(3, 1, 2)


def dataset():
    return dataset_from_classes(
        np.random.default_rng(0).integers(0, 256, (6, 4, 4, 4, 1), np.uint8)
    )


@jax.jit
def sample(key, data):
    return sample_episode(key, data, SPEC)


def fresh_state(seed=0):
    return init_train_state(LEARNER, OPTIMIZER, Tasks(sample, dataset(), cross_entropy), seed)


def outer_step(**settings):
    return make_outer_step(LEARNER, OPTIMIZER, sample, task_batch=4, **settings)


def with_plain_key(train_state):
    return train_state._replace(key=jax.random.key_data(train_state.key))


def of_loss(loss, state=None):
    """A learner of one parameter p, 1 at first, whose loss (params, state, task, key) is given."""

    def init(key, task):
        return {"p": jnp.ones(())}, {} if state is None else state

    return MetaLearner(init, None, None, loss, None)


def no_task(key, data):
    del data
    return key


def without_data(learner, optimizer):
    return init_train_state(learner, optimizer, Tasks(no_task, (), squared_error), 0)
