"""The examples of docs/extending: each is one file, used through the binaries and from Python."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import meta_jax as mj
from docs.extending import (
    absolute_error,
    corridor,
    fit_in_python,
    mixed_inputs,
    neural_process,
    nnx_network,
    resnet12_backbone,
    signal_tasks,
    svm_head,
    token_tasks,
    warm_optimizer,
)
from experiments import run_flags, runs
from tests.binaries import command

PATH = "docs.extending"
SMALL = ["--eval_every=0", "--queries=2"]
SINUSOIDS = ["--tasks=sinusoid", "--shots=5", "--network.widths=8"]
FLAGS = {
    "svm_head": [f"--learner={PATH}.svm_head:svm", "--network.features=4"],
    "neural_process": [
        f"--learner={PATH}.neural_process:neural_process",
        "--learner.width=8",
        "--tasks=sinusoid",
        f"--tasks.objective={PATH}.neural_process:gaussian_likelihood",
    ],
    "resnet12_backbone": [
        f"--network={PATH}.resnet12_backbone:unit_resnet12",
        "--network.width=2",
        "--learner.distance=cosine",
    ],
    "nnx_maml": [
        "--learner=maml",
        f"--network={PATH}.nnx_network:nnx_network",
        "--network.features=4",
    ],
    "nnx_prototypical": [f"--network={PATH}.nnx_network:nnx_network", "--network.features=4"],
    "absolute_error": [
        "--learner=maml",
        *SINUSOIDS,
        f"--tasks.objective={PATH}.absolute_error:absolute_error",
    ],
    "signal_tasks": [f"--tasks={PATH}.signal_tasks:signals", "--network.widths=8"],
    "token_tasks": [
        f"--tasks={PATH}.token_tasks:sentences",
        f"--network={PATH}.token_tasks:token_network",
    ],
    "mixed_inputs": [
        f"--tasks={PATH}.mixed_inputs:measured_glyphs",
        f"--network={PATH}.mixed_inputs:mixed_network",
        "--network.features=4",
    ],
    "corridor": [
        "--learner=rl2",
        f"--tasks={PATH}.corridor:corridor_tasks",
        "--learner.hidden_size=4",
        "--learner.minibatches=1",
        "--learner.epochs=1",
    ],
    "warm_optimizer": [
        f"--optimizer={PATH}.warm_optimizer:warm_lion",
        "--optimizer.ema=0.5",
        "--network.features=4",
    ],
}


WITHOUT_CLASSES = ("neural_process", "absolute_error", "corridor")


@functools.cache
def built(name):
    small = SMALL if name in WITHOUT_CLASSES else [*SMALL, "--ways=3"]
    values = run_flags.run_values([*FLAGS[name], *small])
    return runs.build_run(values, runs.load_tasks(values))


@pytest.mark.parametrize("name", FLAGS)
def test_it_trains_through_the_flags(name):
    run = built(name)
    step = jax.jit(
        mj.make_outer_step(run.learner, run.optimizer, run.training.sample, task_batch=1)
    )
    start = mj.init_train_state(run.learner, run.optimizer, run.training, seed=0)
    state = start
    for _ in range(2):
        state, metrics = step(state, run.training.data)
    assert all(np.isfinite(value) for value in metrics.values())
    assert run.training.objective.metric in metrics
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), start.params, state.params)
    assert any(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", FLAGS)
def test_its_record_names_it(name):
    record = json.loads(json.dumps(built(name).config))
    text = json.dumps(record)
    paths = {flag.split("=")[1] for flag in FLAGS[name] if PATH in flag}
    assert all(path in text for path in paths)


def test_the_svm_separates_and_its_gradient_is_right(x64):
    z = jnp.array([[2.0, 0.1], [1.5, -0.3], [-1.0, 0.2], [-2.0, 0.4], [0.1, 2.0], [-0.2, 1.5]])
    y = jnp.eye(3)[jnp.array([0, 0, 1, 1, 2, 2])]
    solve = functools.partial(svm_head.dual_variables, mask=None, penalty=1.0, iterations=2000)
    alpha = jax.jit(solve)(z @ z.T, y)
    np.testing.assert_allclose(alpha.sum(1), 0, atol=1e-9)
    assert (alpha <= y + 1e-9).all()
    assert (jnp.argmax(z @ z.T @ alpha, 1) == jnp.argmax(y, 1)).all()

    # At the optimum no feasible direction improves: compare with scipy's general solver.
    def negative_dual(flat):
        a = flat.reshape(6, 3)
        return float(0.5 * jnp.trace(a.T @ z @ z.T @ a) - (a * y).sum())

    from scipy.optimize import minimize

    rows = [{"type": "eq", "fun": lambda flat, i=i: flat.reshape(6, 3)[i].sum()} for i in range(6)]
    bounds = [(None, bound) for bound in np.asarray(y).ravel()]
    best = minimize(negative_dual, np.zeros(18), bounds=bounds, constraints=rows, method="SLSQP")
    np.testing.assert_allclose(negative_dual(alpha.ravel()), best.fun, rtol=1e-3)


def test_the_likelihood_of_a_standard_normal():
    outputs = neural_process.Gaussian(jnp.zeros((3, 1)), jnp.ones((3, 1)))
    loss, metrics = neural_process.negative_log_likelihood(outputs, jnp.zeros((3, 1)))
    np.testing.assert_allclose(loss, 0.5 * np.log(2 * np.pi), rtol=1e-6)
    assert metrics["mse"] == 0


def test_the_embeddings_lie_on_the_sphere():
    network = resnet12_backbone.unit_resnet12(2, radius=3.0)
    x = jnp.ones((2, 16, 16, 1)) * jnp.array([0.1, 1.0])[:, None, None, None]
    params, state = jax.jit(network.init)(jax.random.key(0), x)
    z, _ = jax.jit(functools.partial(network.apply, key=None, train=False, moments="batch"))(
        params, state, x
    )
    np.testing.assert_allclose(jnp.linalg.norm(z, axis=1), 3.0, rtol=1e-5)


def test_mamls_inner_loop_leaves_the_nnx_batch_norm_alone():
    run = built("nnx_maml")
    task = run.training.sample(jax.random.key(0), run.training.data)
    params, state = jax.jit(run.learner.init)(jax.random.key(1), task)
    adapt = jax.jit(functools.partial(run.learner.adapt, train=False))
    adapted = adapt(params, state, task.support, jax.random.key(2))
    for path, before in jax.tree_util.tree_leaves_with_path(params["learner"]):
        after = adapted.params
        for key in path:
            after = after[key.key]
        moved = bool((after != before).any())
        assert moved != mj.networks.is_normalisation(path), path


def test_the_nnx_network_drops_out_in_training_alone():
    network = nnx_network.nnx_network(8, drop_rate=0.5)
    x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
    params, state = network.init(jax.random.key(1), x)

    def answers(train):
        apply = jax.jit(functools.partial(network.apply, train=train, moments="batch"))
        return [apply(params, state, x, key=jax.random.key(seed))[0] for seed in range(2)]

    assert (answers(True)[0] != answers(True)[1]).any()
    assert (answers(False)[0] == answers(False)[1]).all()


def test_the_absolute_error_is_minimised():
    loss, metrics = absolute_error.absolute_error_loss(
        jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [5.0]])
    )
    assert loss == metrics["mae"] == 1.5
    assert not absolute_error.absolute_error.maximise


def test_signals_of_a_class_are_alike():
    size = mj.data.EpisodeSize(ways=3, shots=2, queries=4)
    support, query = signal_tasks.sample_signals(jax.random.key(0), size, 32, 0.0)
    assert support.x.shape == (6, 32)
    assert query.x.shape == (12, 32)
    spectra = abs(jnp.fft.rfft(query.x))  # phases differ within a class, amplitudes do not
    for one, label in zip(spectra, query.y, strict=True):
        same = (query.y == label).all(1)
        np.testing.assert_allclose(
            spectra[same], jnp.broadcast_to(one, spectra[same].shape), atol=1e-3
        )
        assert (abs(spectra[~same] - one).max(1) > 1).all()


def test_training_from_python_is_validated_and_loaded(tmp_path):
    few = mj.training.LoopConfig(steps=60, log_every=30, eval_every=30, checkpoint_every=30)
    found = fit_in_python.train(tmp_path, few)
    assert found.finished
    assert found.history["val"]["step"].tolist() == [30, 60]
    assert found.history["val"]["accuracy"][-1] > 0.6  # of five classes
    assert fit_in_python.classify(tmp_path) > 0.8


def test_padding_of_a_sentence_does_not_count():
    examples = token_tasks.make_split(3, seed=0).dataset.examples
    lengths = examples["real"].sum(1)
    assert lengths.min() < lengths.max()
    network = token_tasks.token_network(5)
    params, state = network.init(jax.random.key(0), examples)
    z, _ = network.apply(params, state, examples, key=None, train=False)
    longest = {**examples, "ids": jnp.where(examples["real"], examples["ids"], 7)}
    np.testing.assert_array_equal(
        network.apply(params, state, longest, key=None, train=False)[0], z
    )
    words = params["embeddings"][examples["ids"][0, : lengths[0]]]
    np.testing.assert_allclose(z[0], words.mean(0), rtol=1e-5)


def test_the_picture_and_the_numbers_stay_together():
    images = np.zeros((3, 4, 4, 1), np.uint8)
    images[1, :, 2] = 255
    images[2] = 255
    split = mixed_inputs.measured(mj.data.split_from_arrays(images, ["b", "a", "a"]))
    numbers = split.dataset.examples["numbers"]
    np.testing.assert_allclose(numbers, [[0.25, 0.25], [1, 1], [0, 0]])
    assert split.dataset.examples["image"][1].min() == 255


def test_the_average_of_the_weights_is_what_tests_use():
    optimizer = warm_optimizer.warm_lion(10, ema=0.5)
    params = jnp.array(1.0)
    state = optimizer.init(params)
    expected = params
    for _ in range(3):
        updates, state = optimizer.update(jnp.array(1.0), state, params)
        params = optax.apply_updates(params, updates)
        expected = 0.5 * expected + 0.5 * params
    train_state = mj.TrainState(jnp.array(3), params, {}, state, jax.random.key(0))
    assert float(mj.training.averaged_params(train_state)) != float(params)


def test_a_binary_takes_a_component_of_ones_own(tmp_path):
    few = ("--steps=2", "--log_every=1", "--eval_episodes=4", "--eval_every=0")
    done = command("train", *FLAGS["signal_tasks"], *few, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["tasks"] == f"{PATH}.signal_tasks:signals"


def test_in_the_corridor_a_prize_that_was_found_is_found_again():
    environment = corridor.corridor()
    mj.reinforcement.check_environment(environment)

    def act(memory, percept, key):
        """Goes where the last prize was, and first to a side."""
        side = jnp.where(percept.reward > 0, percept.action, memory)
        failed = percept.begins & (percept.reward == 0) & (percept.action >= 0)
        side = jnp.where(failed, 1 - side, side)
        return side, side, ()

    def returns(task, side):
        agent = mj.reinforcement.Agent(jnp.int32(side), act)
        problem = mj.reinforcement.Problem(environment, task)
        trial = mj.reinforcement.run_trial(jax.random.key(0), problem, agent)
        return mj.reinforcement.episode_returns(trial, environment)

    found = jax.jit(jax.vmap(returns, (0, None)), static_argnums=1)(jnp.array([False, True]), 0)
    np.testing.assert_array_equal(found, [[1, 1, 1], [0, 1, 1]])
