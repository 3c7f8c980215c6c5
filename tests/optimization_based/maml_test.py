import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.networks.conv4 import strided_conv4
from meta_jax.networks.layers import linear
from meta_jax.networks.mlp import mlp
from meta_jax.networks.normalisation import embed_support
from meta_jax.objectives import cross_entropy_loss, squared_error
from meta_jax.optimization_based.adjoints import CHECKPOINTED, FIRST_ORDER
from meta_jax.optimization_based.inner_loop import partition
from meta_jax.optimization_based.learner import all_but_normalisation
from meta_jax.optimization_based.maml import first_order_maml, maml
from tests.optimization_based.tasks import (
    KEY,
    assert_trees_close,
    tanh_network,
    two_blocks,
    vectors,
)

pytestmark = pytest.mark.usefixtures("x64")


def gradient_of(learner):
    return jax.jit(jax.grad(lambda *a: learner.loss(*a)[0]))


def adapt(learner, *arguments):
    return jax.jit(lambda *a: learner.adapt(*a, KEY, train=True))(*arguments)


def test_one_step_by_hand():
    learner = maml(tanh_network(), inner_lr=0.7, steps=1)
    params, state = learner.init(KEY, vectors())
    support, query = vectors()

    def answer(p, x):
        return linear(p["head"], jnp.tanh(x @ p["network"]["w"] + p["network"]["b"]))

    def loss(p, batch):
        return -(batch.y * jax.nn.log_softmax(answer(p, batch.x))).sum(1).mean()

    def outer(p):
        adapted = jax.tree.map(lambda p, g: p - 0.7 * g, p, jax.grad(loss)(p, support))
        return loss(adapted, query), adapted

    (expected, adapted), gradient = jax.jit(jax.value_and_grad(outer, has_aux=True))(
        params["learner"]
    )
    assert_trees_close(learner.adapt(params, state, support, KEY, train=True).params, adapted)
    value, aux = learner.loss(params, state, vectors(), KEY)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert set(aux.metrics) == {"accuracy"}
    assert_trees_close(gradient_of(learner)(params, state, vectors(), KEY)["learner"], gradient)


@pytest.mark.parametrize("settings", [{}, {"adjoint": CHECKPOINTED}])
def test_the_meta_gradient_agrees_with_central_differences(settings):
    learner = maml(tanh_network(), inner_lr=0.5, steps=3, **settings)
    params, state = learner.init(KEY, vectors())
    loss = jax.jit(lambda p: learner.loss(p, state, vectors(), KEY)[0])
    gradient = gradient_of(learner)(params, state, vectors(), KEY)
    leaves, treedef = jax.tree.flatten(params)
    for seed in range(4):
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        step = treedef.unflatten(
            [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
        )
        h = 1e-5
        up, down = (jax.tree.map(lambda p, d, s=s: p + s * d, params, step) for s in (h, -h))
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, step)))
        np.testing.assert_allclose((loss(up) - loss(down)) / (2 * h), slope, rtol=1e-7)


def test_first_order_is_maml_with_constant_inner_gradients():
    params, state = maml(tanh_network()).init(KEY, vectors())
    arguments = params, state, vectors(), KEY
    first = gradient_of(first_order_maml(tanh_network(), inner_lr=0.5, steps=2))(*arguments)
    same = gradient_of(maml(tanh_network(), inner_lr=0.5, steps=2, adjoint=FIRST_ORDER))(*arguments)
    second = gradient_of(maml(tanh_network(), inner_lr=0.5, steps=2))(*arguments)
    assert_trees_close(first, same, atol=0)

    # The first-order gradient is the query gradient at the adapted parameters.
    learner = maml(tanh_network(), inner_lr=0.5, steps=2)
    adapted = learner.adapt(params, state, vectors().support, KEY, train=True)

    def query_loss(p):
        logits, _ = learner.predict(
            params, adapted._replace(params=p), vectors().query.x, KEY, train=True
        )
        return cross_entropy_loss(logits, vectors().query.y)[0]

    assert_trees_close(first["learner"], jax.grad(query_loss)(adapted.params))
    gap = jax.tree.map(lambda a, b: abs(a - b).max(), first, second)
    assert min(jax.tree.leaves(gap)) > 1e-3


def test_vmap_over_tasks_equals_a_loop():
    learner = maml(two_blocks(), inner_lr=0.3, steps=2, eval_steps=3)
    params, state = jax.jit(learner.init)(KEY, vectors())
    tasks = [vectors(seed) for seed in range(3)]

    def test_task(episode):
        adapted = learner.adapt(params, state, episode.support, KEY, train=False)
        return learner.predict(params, adapted, episode.query.x, KEY, train=False)[0]

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)
    together = jax.jit(jax.vmap(test_task))(stacked)
    one = jax.jit(test_task)
    for i, task in enumerate(tasks):
        np.testing.assert_allclose(together[i], one(task), atol=1e-9)
    assert abs(together[0] - together[1]).max() > 1e-3


def test_without_an_inner_rate_the_gradient_is_that_of_the_queries():
    network = two_blocks()
    learner = maml(network, inner_lr=1e-300, steps=3)
    params, state = jax.jit(learner.init)(KEY, vectors())

    def joint(p):
        x = vectors().query.x
        z, _ = network.apply(
            p["learner"]["network"], state, x, key=None, train=True, moments="batch"
        )
        return cross_entropy_loss(linear(p["learner"]["head"], z), vectors().query.y)[0]

    assert_trees_close(
        gradient_of(learner)(params, state, vectors(), KEY), jax.jit(jax.grad(joint))(params)
    )


def test_normalisation_is_learned_but_not_adapted():
    learner = maml(two_blocks(), inner_lr=0.3, steps=2)
    params, state = jax.jit(learner.init)(KEY, vectors())
    adapted = adapt(learner, params, state, vectors().support).params
    gradient = gradient_of(learner)(params, state, vectors(), KEY)["learner"]
    for name, before in params["learner"]["network"].items():
        after = adapted["network"][name]
        jax.tree.map(np.testing.assert_array_equal, after["normalisation"], before["normalisation"])
        assert abs(after["w"] - before["w"]).max() > 1e-4
        for leaf in jax.tree.leaves(gradient["network"][name]["normalisation"]):
            assert abs(leaf).max() > 1e-4
    everything = maml(two_blocks(), inner_lr=0.3, steps=2, mask=None)
    adapted = adapt(everything, params, state, vectors().support).params
    before = params["learner"]["network"]["block1"]["normalisation"]["scale"]
    assert abs(adapted["network"]["block1"]["normalisation"]["scale"] - before).max() > 1e-4


def test_the_paper_s_number_of_adapted_parameters():
    learner = maml(strided_conv4())
    labels = jnp.eye(5)
    episode = Episode(*[Batch(jnp.zeros((5, 28, 28, 1)), labels)] * 2)
    params, _ = jax.eval_shape(learner.init, KEY, episode)
    chosen, others = partition(params["learner"], all_but_normalisation)
    assert sum(leaf.size for leaf in jax.tree.leaves(chosen)) == 111_749
    assert sum(leaf.size for leaf in jax.tree.leaves(others)) == 4 * 2 * 64


def test_tests_take_their_own_number_of_steps():
    settings = {"inner_lr": 0.5, "eval_steps": 4}
    params, state = maml(tanh_network()).init(KEY, vectors())
    arguments = params, state, vectors().support, KEY
    tested = maml(tanh_network(), steps=1, **settings).adapt(*arguments, train=False)
    trained = maml(tanh_network(), inner_lr=0.5, steps=4).adapt(*arguments, train=True)
    assert_trees_close(tested, trained)


@pytest.mark.parametrize("settings", [{"steps": -1}, {"eval_steps": -2}])
def test_negative_steps_are_refused(settings):
    with pytest.raises(ValueError, match=r"steps=-. must be at least 0"):
        maml(mlp(), **settings)


def test_regression_adapts_to_the_support():
    learner = maml(mlp((8,)), inner_lr=0.1, steps=20, objective=squared_error)
    still = maml(mlp((8,)), steps=0, objective=squared_error)
    x = np.linspace(-1, 1, 6)[:, None]
    episode = Episode(*[Batch(x, np.concatenate([x, 2 * x], 1))] * 2)
    params, state = jax.jit(learner.init)(KEY, episode)
    loss, aux = jax.jit(learner.loss)(params, state, episode, KEY)
    before, _ = jax.jit(still.loss)(params, state, episode, KEY)
    assert loss < before / 2
    np.testing.assert_array_equal(aux.metrics["mse"], loss)


@pytest.mark.parametrize("steps", [0, 2])
def test_support_statistics_are_those_of_the_adapted_parameters(steps):
    network = two_blocks("support")
    learner = maml(network, inner_lr=0.5, steps=steps)
    params, state = jax.jit(learner.init)(KEY, vectors())
    adapted = adapt(learner, params, state, vectors().support)

    @jax.jit
    def statistics(body, support):
        return embed_support(network, body, state, support, key=KEY, train=True)[1]

    wanted = statistics(adapted.params["network"], vectors().support)
    assert_trees_close(adapted.state, wanted)
