import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import LossAux, Tasks
from meta_jax.data.sinusoid import sample_sinusoid
from meta_jax.lookup import UsageError
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import squared_error
from meta_jax.training.outer_step import (
    TrainState,
    default_task_chunk,
    gradient_norm,
    init_train_state,
    make_outer_step,
    mean_state,
    shared_chunk,
    task_gradients,
    task_mesh,
)
from meta_jax.training.train_loop import make_train_loop
from tests.checkers import key_and_leak_checks
from tests.training.small_runs import (
    LEARNER,
    OPTIMIZER,
    dataset,
    fresh_state,
    no_task,
    of_loss,
    outer_step,
    sample,
    with_plain_key,
    without_data,
)

pytestmark = pytest.mark.usefixtures("x64")


def normed_learner():
    """Prototypes of normalised inputs, with a running mean: a state that every task changes."""

    def loss(params, state, episode, key):
        x = jnp.concatenate([episode.support.x, episode.query.x])
        value, aux = LEARNER.loss(params, state["learner"], episode, key)
        state = {"learner": aux.state, "mean": 0.9 * state["mean"] + 0.1 * x.mean()}
        return value, LossAux(state, {**aux.metrics, "noise": jax.random.uniform(key)})

    def init(key, episode):
        params, state = LEARNER.init(key, episode)
        return params, {"learner": state, "mean": jnp.ones(())}

    return LEARNER._replace(init=init, loss=loss)


def test_a_learner_of_another_objective_is_refused():
    tasks = Tasks(lambda key, data: sample_sinusoid(key, 5, 5), (), squared_error)
    with pytest.raises(UsageError, match=r"built for cross_entropy, .* ask for squared_error"):
        init_train_state(LEARNER, OPTIMIZER, tasks, 0)
    init_train_state(prototypical(mlp((6,)), objective=squared_error), OPTIMIZER, tasks, 0)


def test_the_task_chunk_changes_nothing():
    learner, data = normed_learner(), dataset()
    params, state = learner.init(jax.random.key(0), jax.jit(sample)(jax.random.key(1), data))
    keys = jax.random.split(jax.random.key(2), 4)

    def gradients(chunk):
        return jax.jit(
            lambda: task_gradients(learner, sample, params, state, data, keys, task_chunk=chunk)
        )()

    whole = gradients(4)
    for chunk in (1, 2):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradients(chunk), whole
        )

    # And the whole is the mean over tasks, drawn and answered one by one.
    def task(key):
        episode_key, loss_key = jax.random.split(key)
        (loss, aux), gradient = jax.value_and_grad(learner.loss, has_aux=True)(
            params, state, sample(episode_key, data), loss_key
        )
        return gradient, aux.state, {"loss": loss, **aux.metrics}

    tasks = [jax.jit(task)(key) for key in keys]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *tasks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), whole, mean)
    assert abs(tasks[0][1]["mean"] - tasks[1][1]["mean"]) > 1e-6


def test_step_s_draws_from_the_key_folded_with_s():
    train_state = fresh_state()._replace(step=jnp.int32(5))
    new, metrics = jax.jit(outer_step())(train_state, dataset())
    keys = jax.random.split(jax.random.fold_in(train_state.key, 5), 4)
    gradient, _, expected = jax.jit(
        lambda params, state, data: task_gradients(
            LEARNER, sample, params, state, data, keys, task_chunk=4
        )
    )(train_state.params, train_state.state, dataset())
    norm = metrics.pop("gradient_norm")
    updates, _ = OPTIMIZER.update(gradient, train_state.opt_state, train_state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10),
        (new.params, metrics),
        (optax.apply_updates(train_state.params, updates), expected),
    )
    norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(gradient)]
    np.testing.assert_allclose(norm, np.linalg.norm(norms), rtol=1e-5)
    assert new.step == 6
    np.testing.assert_array_equal(
        jax.random.key_data(new.key), jax.random.key_data(train_state.key)
    )


def test_the_gradient_norm():
    gradient = {"a": jnp.array([[1.0, 2.0]]), "b": {"c": jnp.array(2.0)}}
    assert gradient_norm(gradient) == 3.0
    # 300^2 is infinite in float16.
    assert gradient_norm({"a": jnp.array([300.0], jnp.float16)}) == 300.0
    assert gradient_norm({}) == 0.0


def test_counters_are_not_averaged():
    states = {"mean": jnp.array([1.0, 2.0]), "count": jnp.array([7, 7], jnp.int32)}
    state = mean_state(states)
    assert state["mean"] == 1.5
    assert (state["count"], state["count"].dtype) == (7, jnp.int32)


@pytest.mark.parametrize("task_chunk", [1, 2, 4])
def test_a_state_with_a_counter_and_a_random_key_goes_through_every_chunking(task_chunk):
    def loss(params, state, task, key):
        count = state["count"] + 1
        noise = jax.random.uniform(key)
        state = {"count": count, "mean": noise, "seed": jax.random.fold_in(state["seed"], count)}
        return params["p"] * count, LossAux(state, {"count": count})

    start = {"count": jnp.int32(2**24), "mean": jnp.zeros(()), "seed": jax.random.key(3)}
    learner, optimizer = of_loss(loss, start), optax.sgd(0.0)
    step = make_outer_step(learner, optimizer, no_task, task_batch=4, task_chunk=task_chunk)
    train_state, metrics, _ = make_train_loop(step)(without_data(learner, optimizer), (), 3)
    # In float32 2^24 + 1 would be 2^24 again.
    assert (train_state.state["count"], train_state.state["count"].dtype) == (2**24 + 3, jnp.int32)
    assert metrics["count"] == 2**24 + 2
    seed = start["seed"]
    for i in range(1, 4):
        seed = jax.random.fold_in(seed, 2**24 + i)
    np.testing.assert_array_equal(
        jax.random.key_data(train_state.state["seed"]), jax.random.key_data(seed)
    )
    keys = jax.random.split(jax.random.fold_in(train_state.key, 2), 4)
    noise = [jax.random.uniform(jax.random.split(key)[1]) for key in keys]
    np.testing.assert_allclose(train_state.state["mean"], sum(noise) / 4, rtol=1e-6)


def test_an_optimizer_that_wants_the_value_gets_it():
    """On a loss that does not fall, the rate is halved after each two steps."""

    def loss(params, state, task, key):
        return 5.0 + params["p"] - jax.lax.stop_gradient(params["p"]), LossAux(state, {})

    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    optimizer = optax.chain(optax.sgd(1.0), plateau)
    learner = of_loss(loss)
    step = make_outer_step(learner, optimizer, no_task, task_batch=2)
    train_state, _, _ = make_train_loop(step)(without_data(learner, optimizer), (), 5)
    # The first loss is the best so far; the third and the fifth step end a plateau of two.
    np.testing.assert_allclose(train_state.params["p"], 1 - (1 + 1 + 0.5 + 0.5 + 0.25))


@pytest.mark.parametrize("task_chunk", [1, 4])
def test_a_line_search_gets_the_loss_of_the_same_tasks(task_chunk):
    def loss(params, state, task, key):
        target = jax.random.normal(task)
        return (params["p"] - target) ** 2, LossAux(state, {})

    learner, optimizer = of_loss(loss), optax.lbfgs()
    step = make_outer_step(learner, optimizer, no_task, task_batch=4, task_chunk=task_chunk)
    start = without_data(learner, optimizer)
    train_state, metrics = jax.jit(step)(start, ())
    keys = jax.random.split(jax.random.fold_in(start.key, 0), 4)
    targets = jnp.stack([jax.random.normal(jax.random.split(key)[0]) for key in keys])
    np.testing.assert_allclose(metrics["loss"], ((1 - targets) ** 2).mean(), rtol=1e-10)
    # A line search along the gradient of a parabola; other tasks' loss would have another minimum.
    assert ((train_state.params["p"] - targets) ** 2).mean() < metrics["loss"]
    value = optax.tree.get(train_state.opt_state, "value")
    np.testing.assert_allclose(value, ((train_state.params["p"] - targets) ** 2).mean(), rtol=1e-10)


def test_a_metric_that_is_no_scalar_is_named():
    def loss(params, state, task, key):
        return params["p"], LossAux(state, {"by_class": jnp.zeros(3)})

    learner, optimizer = of_loss(loss), optax.sgd(1.0)
    step = make_outer_step(learner, optimizer, no_task, task_batch=1)
    with pytest.raises(ValueError, match=r"metric 'by_class' .* has shape \[3\]: reduce"):
        step(without_data(learner, optimizer), ())


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "step", "ways"])
def test_a_metric_with_a_name_of_the_run_is_refused(name):
    def loss(params, state, task, key):
        return params["p"], LossAux(state, {name: params["p"]})

    learner, optimizer = of_loss(loss), optax.sgd(1.0)
    step = make_outer_step(learner, optimizer, no_task, task_batch=1)
    with pytest.raises(UsageError, match=f"a metric is called '{name}'.*rename it"):
        step(without_data(learner, optimizer), ())


def test_a_step_needs_a_task():
    for task_batch in (0, -2):
        with pytest.raises(ValueError, match=f"task_batch must be at least 1, not {task_batch}"):
            make_outer_step(LEARNER, OPTIMIZER, sample, task_batch=task_batch)
    with pytest.raises(ValueError, match="task_chunk must be at least 1, not 0"):
        outer_step(task_chunk=0)


def test_random_keys_are_used_once_and_nothing_leaks():
    step = make_outer_step(LEARNER, OPTIMIZER, sample, task_batch=2, task_chunk=1)
    with key_and_leak_checks():
        train_state = fresh_state(seed=5)
        train_state, _, finite = make_train_loop(step)(train_state, dataset(), 2)
    assert isinstance(train_state, TrainState)
    assert finite


def test_the_initial_state_can_be_donated():
    train_state = fresh_state()
    pointers = [
        leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(with_plain_key(train_state))
    ]
    assert len(set(pointers)) == len(pointers)
    assert train_state.step == 0
    assert train_state.step.dtype == jnp.int32


def test_a_chunk_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="task chunk 3 must divide the task batch 4"):
        outer_step(task_chunk=3)


@pytest.mark.parametrize(
    ("task_batch", "task_chunk", "devices", "used"),
    [(4, 1, 4, 4), (4, 1, 1, 1), (8, 1, 2, 2), (8, 4, 4, 4), (12, 3, 2, 4), (12, 4, 3, 6)],
)
def test_a_chunk_is_raised_to_what_the_devices_share(task_batch, task_chunk, devices, used):
    assert shared_chunk(task_batch, task_chunk, devices) == used


def test_devices_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="2 devices must divide the task batch 3"):
        shared_chunk(3, 1, 2)


def test_one_device_needs_no_mesh():
    assert task_mesh(4, jax.devices()[:1]) is None
    expected = (1, 4) if jax.default_backend() == "cpu" else (8, 8)
    assert (default_task_chunk(8), default_task_chunk(8, devices=4)) == expected


def test_tasks_that_come_from_no_data():
    def draw(key, data):
        del data
        return sample_sinusoid(key, 5, 5)

    learner = prototypical(mlp((3,)), objective=squared_error)._replace(
        loss=lambda params, state, episode, key: (
            (episode.query.y**2).mean(),
            LossAux(state, {}),
        )
    )
    step = make_outer_step(learner, OPTIMIZER, draw, task_batch=2)
    train_state = init_train_state(learner, OPTIMIZER, Tasks(draw, (), squared_error), 0)
    _, metrics = jax.jit(step)(train_state, ())
    assert metrics["loss"] > 0
