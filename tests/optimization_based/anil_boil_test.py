import functools

import jax
import numpy as np
import optax
import pytest

from meta_jax.objectives import cross_entropy
from meta_jax.optimization_based.adjoints import UNROLLED
from meta_jax.optimization_based.anil import anil
from meta_jax.optimization_based.boil import boil
from meta_jax.optimization_based.learner import body_only, gradient_learner, head_only
from meta_jax.optimization_based.update_rules import from_optax
from tests.optimization_based.tasks import (
    KEY,
    assert_trees_close,
    loss_and_gradient,
    two_blocks,
    vectors,
)

pytestmark = pytest.mark.usefixtures("x64")


def with_rates(body, head):
    """MAML with one inner rate for the body and one for the head."""
    rule = optax.partition(
        {"network": optax.sgd(body), "head": optax.sgd(head)},
        {"network": "network", "head": "head"},
    )
    return gradient_learner(
        two_blocks(),
        from_optax(rule),
        steps=2,
        eval_steps=2,
        adjoint=UNROLLED,
        mask=None,
        objective=cross_entropy,
    )


@functools.cache
def start():
    learner = anil(two_blocks())
    return jax.jit(learner.init)(KEY, vectors())


@pytest.mark.parametrize(
    ("method", "rates"), [(anil, {"body": 0.0, "head": 0.4}), (boil, {"body": 0.4, "head": 0.0})]
)
def test_it_is_maml_with_a_rate_of_zero(method, rates):
    ours = method(two_blocks(), inner_lr=0.4, steps=2, eval_steps=2)
    arguments = *start(), vectors(), KEY
    assert_trees_close(
        loss_and_gradient(ours, *arguments), loss_and_gradient(with_rates(**rates), *arguments)
    )


def test_the_masks_are_complements():
    params, _ = start()
    chosen = [
        jax.tree_util.tree_map_with_path(mask, params["learner"]) for mask in (head_only, body_only)
    ]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a != b, *chosen)))
    assert set(jax.tree.leaves(chosen[0]["head"])) == {True}


@pytest.mark.parametrize(("method", "kept"), [(anil, "network"), (boil, "head")])
def test_one_part_is_kept_and_the_other_adapts(method, kept):
    learner = method(two_blocks(), inner_lr=0.4, steps=2)
    params, state = start()
    adapted = jax.jit(functools.partial(learner.adapt, train=True))(
        params, state, vectors().support, KEY
    )
    jax.tree.map(np.testing.assert_array_equal, adapted.params[kept], params["learner"][kept])
    other = {"network": "head", "head": "network"}[kept]
    moved = jax.tree.map(
        lambda a, b: abs(a - b).max(), adapted.params[other], params["learner"][other]
    )
    assert max(jax.tree.leaves(moved)) > 1e-3
