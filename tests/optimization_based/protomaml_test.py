import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Episode
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.objectives import squared_error
from meta_jax.optimization_based.protomaml import protomaml, prototype_linear_head
from tests.optimization_based.tasks import (
    KEY,
    assert_trees_close,
    loss_and_gradient,
    padded,
    tanh_network,
    vectors,
)

pytestmark = pytest.mark.usefixtures("x64")


def logits(learner, params, episode):
    _, state = learner.init(KEY, episode)
    adapted = learner.adapt(params, state, episode.support, KEY, train=False)
    return learner.predict(params, adapted, episode.query.x, KEY, train=False)[0]


def test_without_steps_it_is_a_prototypical_network():
    ours = protomaml(tanh_network(), steps=0, eval_steps=0)
    theirs = prototypical(tanh_network(), joint_encoding=False)
    params, state = ours.init(KEY, vectors())
    assert set(params["learner"]) == {"network"}
    body, their_state = theirs.init(KEY, vectors())
    body = {**body, **params["learner"]}
    difference = logits(ours, params, vectors()) - logits(theirs, body, vectors())
    # ||z||^2, the same for every class of a query.
    np.testing.assert_allclose(difference, difference[:, :1].repeat(3, 1), rtol=1e-10)
    assert difference.min() > 1e-3
    value, gradient = loss_and_gradient(ours, params, state, vectors(), KEY)
    expected, wanted = loss_and_gradient(theirs, body, their_state, vectors(), KEY)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert_trees_close(gradient["learner"]["network"], wanted["network"])


def test_steps_start_from_the_prototypes():
    learner = protomaml(tanh_network(), inner_lr=0.3, steps=1)
    params, state = jax.jit(learner.init)(KEY, vectors())
    support = vectors().support

    def loss(p):
        z = jnp.tanh(support.x @ p["network"]["w"] + p["network"]["b"])
        outputs = z @ p["head"]["kernel"] + p["head"]["bias"]
        return -(support.y * jax.nn.log_softmax(outputs)).sum(1).mean()

    body = params["learner"]["network"]
    z = np.tanh(np.asarray(support.x) @ body["w"] + body["b"])
    centres = np.stack([z[label::3].mean(0) for label in range(3)])
    head = {"kernel": 2 * centres.T, "bias": -(centres**2).sum(1)}
    assert_trees_close(jax.jit(prototype_linear_head)(z, support.y), head)
    at_prototypes = {"network": body, "head": head}
    gradient = jax.jit(jax.grad(loss))(at_prototypes)
    wanted = jax.tree.map(lambda p, g: np.asarray(p) - 0.3 * np.asarray(g), at_prototypes, gradient)
    adapt = jax.jit(functools.partial(learner.adapt, train=True))
    assert_trees_close(adapt(params, state, support, KEY).params, wanted)


def test_padding_changes_no_prototype():
    learner = protomaml(tanh_network(), inner_lr=0.3)
    params, _ = learner.init(KEY, vectors())
    support, query = vectors()
    assert_trees_close(
        logits(learner, params, Episode(padded(support), query)), logits(learner, params, vectors())
    )


def test_regression_is_refused():
    with pytest.raises(ValueError, match="protomaml is for classification"):
        protomaml(tanh_network(), objective=squared_error)


def test_ways_may_differ_at_test():
    learner = protomaml(tanh_network(), inner_lr=0.1)
    params, _ = learner.init(KEY, vectors(ways=3))
    assert logits(learner, params, vectors(ways=5)).shape == (10, 5)
