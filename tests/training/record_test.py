"""The record of a training run."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from meta_jax.core import Batch, Episode, Objective, Tasks
from meta_jax.lookup import UsageError
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy, squared_error
from meta_jax.training.record import (
    describe_task,
    make_config,
    read_config,
    task_like,
    write_config,
)


def episode(ways):
    batch = Batch(jnp.ones((2 * ways, 5)), jnp.tile(jnp.eye(ways), (2, 1)))
    return Episode(batch, batch)


VECTORS = Tasks(lambda key, data: episode(2), (), cross_entropy)


def test_the_record_is_that_of_the_layout(tmp_path):
    config = make_config(
        prototypical(mlp((4,))), VECTORS, source={"name": "glyphs"}, optimizer={"name": "adam"}
    )
    assert set(config) == {"version", "learner", "tasks", "optimizer", "run", "example"}
    assert config["tasks"] == {
        "name": "glyphs",
        "objective": "cross_entropy",
        "preprocessing": None,
    }
    assert config["learner"]["network"]["name"] == "mlp"
    write_config(tmp_path / "new", config)
    assert read_config(tmp_path / "new") == config


def test_an_objective_without_a_name_is_refused():
    nameless = VECTORS._replace(objective=cross_entropy._replace(name=""))
    with pytest.raises(UsageError, match="of metric 'accuracy' has no name: name it as it is"):
        make_config(prototypical(mlp((4,))), nameless)


def test_a_record_that_is_not_json_is_refused():
    with pytest.raises(UsageError, match="record of this run is not JSON"):
        make_config(prototypical(mlp((4,))), VECTORS, run={"started": jnp})


class Bandit(NamedTuple):
    arms: jax.Array
    context: dict


def test_a_task_is_described_and_built_again():
    task = Bandit(
        jnp.zeros(3, jnp.bfloat16),
        {
            "ids": jnp.zeros((2, 4), jnp.uint8),
            "mask": None,
            "pair": (jnp.ones((), bool), [jnp.zeros((0, 2))]),
            "key": jax.random.key(0),
        },
    )
    description = json.loads(json.dumps(describe_task(task)))
    like = task_like(description)
    assert jax.tree.structure(like) == jax.tree.structure(task)
    for ours, theirs in zip(jax.tree.leaves(like), jax.tree.leaves(task), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_the_metric_of_a_result_does_not_hide_what_else_it_has():
    steps = Objective(lambda *a: (jnp.zeros(()), {}), "steps", False, name="a:b")
    with pytest.raises(UsageError, match="a metric is called 'steps'"):
        make_config(prototypical(mlp((4,))), VECTORS._replace(objective=steps))
    make_config(prototypical(mlp((4,))), VECTORS._replace(objective=steps._replace(metric="loss")))


def test_one_way_is_refused_before_a_run_begins():
    one = VECTORS._replace(sample=lambda key, data: episode(1))
    with pytest.raises(UsageError, match="classification of 1 way is right"):
        make_config(prototypical(mlp((4,))), one)
    make_config(prototypical(mlp((4,))), one._replace(objective=squared_error))
