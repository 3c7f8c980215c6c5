import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode, cross_entropy
from meta_jax.model_based.mann import lstm_learner, mann
from meta_jax.model_based.sequence import (
    as_sequence,
    instance_accuracy,
    instance_numbers,
    neighbour_loss,
)
from meta_jax.networks.flatten import flatten
from tests.random_trees import moved, normal

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
UNITS, SLOTS, WIDTH, HEADS = 5, 6, 3, 2
LEARNERS = {
    "mann": mann(flatten(), units=UNITS, slots=SLOTS, width=WIDTH, heads=HEADS, decay=0.9),
    "mann_values": mann(
        flatten(), units=UNITS, slots=SLOTS, width=WIDTH, heads=HEADS, decay=0.9, values=True
    ),
    "lstm": lstm_learner(flatten(), units=UNITS),
}
every_learner = pytest.mark.parametrize("name", LEARNERS)


def sequence(seed=0, ways=3, each=4):
    labels = np.random.default_rng(seed).permutation(np.tile(np.eye(ways), (each, 1)))
    return Batch(normal(ways * each, 2, 2, 1, seed=seed), jnp.asarray(labels))


@functools.cache
def params_of(name):
    params, _ = jax.jit(LEARNERS[name].init)(KEY, Episode(sequence(), sequence()))
    return moved(params)


@functools.cache
def reader(name):
    return jax.jit(lambda params, batch: LEARNERS[name].adapt(params, {}, batch, KEY, train=False))


def read(name, batch):
    return reader(name)(params_of(name), batch)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def norm(x):
    return np.sqrt((x**2).sum(-1, keepdims=True) + 1e-8)


def access(rows, read_weights, usage, keys, gate, values):
    """One step of the memory, head by head."""
    least, written = np.argsort(usage, kind="stable")[:HEADS], []
    rows = rows.copy()
    rows[least] = 0
    for head in range(HEADS):
        weights = gate[head] * read_weights[head]
        weights[least[head]] += 1 - gate[head]
        written.append(weights)
    rows = rows + sum(np.outer(w, v) for w, v in zip(written, values, strict=True))
    read_weights = softmax((keys / norm(keys)) @ (rows / norm(rows)).T)
    usage = 0.9 * usage + sum(written) + read_weights.sum(0)
    return rows, read_weights, usage, (read_weights @ rows).reshape(-1)


def by_hand(name, params, batch):
    """The equations, one step after another, nothing hoisted."""
    params, batch = jax.tree.map(np.asarray, (params, batch))
    lstm = params["cell"] if name == "lstm" else params["cell"]["lstm"]
    h = c = np.zeros(UNITS)
    what = np.zeros(HEADS * WIDTH)
    memory = np.zeros((SLOTS, WIDTH)), np.full((HEADS, SLOTS), 1 / SLOTS), np.zeros(SLOTS)
    label, logits = np.zeros(batch.y.shape[1]), []
    for x, y in zip(batch.x.reshape(len(batch.x), -1), batch.y, strict=True):
        inputs = [x, label, h] if name == "lstm" else [x, label, what, h]
        i, f, u, o = np.split(np.concatenate(inputs) @ lstm["kernel"] + lstm["bias"], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(u)
        h = sigmoid(o) * np.tanh(c)
        output = h
        if name != "lstm":
            interface = params["cell"]["access"]
            out = (h @ interface["kernel"] + interface["bias"]).reshape(HEADS, -1)
            keys = np.tanh(out[:, :WIDTH])
            values = np.tanh(out[:, WIDTH + 1 :]) if name == "mann_values" else keys
            *memory, what = access(*memory, keys, sigmoid(out[:, WIDTH]), values)
            output = np.concatenate([h, what])
        logits.append(output @ params["output"]["kernel"] + params["output"]["bias"])
        label = y
    return np.stack(logits)


@every_learner
def test_the_answers_are_the_equations_step_by_step(name):
    adapted = read(name, sequence())
    expected = by_hand(name, params_of(name), sequence())
    np.testing.assert_allclose(adapted.logits, expected, atol=1e-9)


@every_learner
def test_a_query_is_the_next_step_of_the_sequence(name):
    x, y = sequence()
    adapted = read(name, Batch(x[:7], y[:7]))
    predict = jax.jit(functools.partial(LEARNERS[name].predict, train=False))
    answers, _ = predict(params_of(name), adapted, x[7:9], KEY)
    np.testing.assert_allclose(answers[0], read(name, sequence()).logits[7], atol=1e-9)
    swapped = jnp.concatenate([x[:7], x[8:9]]), y[:8]
    np.testing.assert_allclose(answers[1], read(name, Batch(*swapped)).logits[7], atol=1e-9)


@every_learner
@pytest.mark.parametrize("t", [0, 5])
def test_a_label_reaches_later_answers_alone(name, t):
    x, y = sequence()
    relabelled = Batch(x, y.at[t].set(jnp.roll(y[t], 1)))
    before, after = read(name, sequence()).logits, read(name, relabelled).logits
    np.testing.assert_array_equal(before[: t + 1], after[: t + 1])
    assert (abs(before[t + 1 :] - after[t + 1 :]).max(1) > 1e-6).all()


@every_learner
def test_an_input_reaches_its_own_and_later_answers(name):
    x, y = sequence()
    before, after = read(name, sequence()).logits, read(name, Batch(x.at[5].add(1), y)).logits
    np.testing.assert_array_equal(before[:5], after[:5])
    assert (abs(before[5:] - after[5:]).max(1) > 1e-6).all()


@every_learner
def test_every_task_starts_anew(name):
    # Two tasks vmapped, or one after the other: nothing is carried between them.
    batches = sequence(0), sequence(1)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    together = jax.vmap(lambda b: reader(name)(params_of(name), b).logits)(stacked)
    for logits, batch in zip(together, batches, strict=True):
        np.testing.assert_allclose(logits, read(name, batch).logits, atol=1e-12)


@every_learner
def test_the_training_loss_is_that_of_every_step_of_a_shuffled_sequence(name):
    x, y = sequence()
    episode = Episode(Batch(x[:3], y[:3]), Batch(x[3:], y[3:]))
    loss, aux = jax.jit(LEARNERS[name].loss)(params_of(name), {}, episode, KEY)
    shuffled = as_sequence(jax.random.split(KEY)[0], episode)
    logits = by_hand(name, params_of(name), shuffled)
    expected, metrics = cross_entropy(logits, shuffled.y)
    np.testing.assert_allclose(loss, expected, atol=1e-9)
    assert set(aux.metrics) == {"accuracy", *(f"instance_{i}" for i in range(1, 5))}
    np.testing.assert_allclose(aux.metrics["accuracy"], metrics["accuracy"])
    at_second = np.asarray(instance_numbers(shuffled.y)) == 2
    right = (logits.argmax(1) == np.asarray(shuffled.y).argmax(1))[at_second]
    assert right.size == 3
    np.testing.assert_allclose(aux.metrics["instance_2"], right.mean())


@every_learner
def test_the_gradient_agrees_with_central_differences(name):
    x, y = sequence(each=2)
    episode = Episode(Batch(x[:3], y[:3]), Batch(x[3:], y[3:]))
    value_and_grad = jax.jit(
        jax.value_and_grad(lambda params: LEARNERS[name].loss(params, {}, episode, KEY)[0])
    )
    params = params_of(name)
    _, gradient = value_and_grad(params)
    direction = moved(jax.tree.map(jnp.zeros_like, params), by=1.0)
    step = 1e-6
    ahead, behind = (
        value_and_grad(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction))[0]
        for s in (step, -step)
    )
    along = sum(
        (g * d).sum()
        for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose((ahead - behind) / (2 * step), along, rtol=1e-6)


def test_the_neighbour_loss_is_the_share_of_the_own_class_among_all_neighbours():
    z = np.random.default_rng(0).normal(size=(7, 3))
    labels = np.array([0, 1, 0, 2, 1, 2, 0])
    lost = []
    for i in range(7):
        near = np.exp(-((z[i] - z) ** 2).sum(1)) * (np.arange(7) != i)
        lost.append(-np.log(near[labels == labels[i]].sum() / near.sum()))
    y = jnp.eye(3)[labels]
    found = jax.jit(neighbour_loss)(jnp.asarray(z), y)
    np.testing.assert_allclose(found, np.mean(lost), atol=1e-12)
    # Padding is nobody's neighbour and has none to find; its gradient is zero, not NaN.
    padded = jnp.concatenate([z, 9 * jnp.ones((2, 3))]), jnp.concatenate([y, jnp.zeros((2, 3))])
    loss, gradient = jax.value_and_grad(neighbour_loss)(*padded)
    np.testing.assert_allclose(loss, np.mean(lost), atol=1e-12)
    np.testing.assert_array_equal(gradient[7:], 0)


def test_the_encoders_own_loss_is_added_with_its_weight():
    x, y = sequence()
    episode = Episode(Batch(x[:3], y[:3]), Batch(x[3:], y[3:]))
    plain, _ = jax.jit(LEARNERS["lstm"].loss)(params_of("lstm"), {}, episode, KEY)
    learner = lstm_learner(flatten(), units=UNITS, neighbour_weight=0.5)
    loss, aux = jax.jit(learner.loss)(params_of("lstm"), {}, episode, KEY)
    near = neighbour_loss(x.reshape(12, 4), y)
    np.testing.assert_allclose(loss, plain + 0.5 * near, atol=1e-12)
    np.testing.assert_allclose(aux.metrics["neighbour_loss"], near, atol=1e-12)


def test_a_shuffled_sequence_is_the_episode_with_its_padding_last():
    x, y = sequence()
    episode = Episode(Batch(x[:3], y[:3].at[1].set(0)), Batch(x[3:], y[3:]))
    orders = set()
    for seed in range(3):
        batch = as_sequence(jax.random.key(seed), episode)
        assert not batch.y[-1].any()
        assert batch.y[:-1].any(1).all()
        pairs = {
            (float(a), tuple(np.asarray(b)))
            for a, b in zip(batch.x[:, 0, 0, 0], batch.y, strict=True)
        }
        wanted = zip(x[:, 0, 0, 0], y.at[1].set(0), strict=True)
        assert pairs == {(float(a), tuple(np.asarray(b))) for a, b in wanted}
        orders.add(tuple(np.asarray(batch.x[:, 0, 0, 0])))
    assert len(orders) == 3


def test_instances_and_their_accuracy_by_hand():
    labels = np.array([1, 0, 1, 1, 0, 2])
    y = jnp.eye(3)[labels].at[4].set(0)  # the second 0 is padding
    np.testing.assert_array_equal(instance_numbers(y), [1, 1, 2, 3, 0, 1])
    answers = np.array([1, 2, 1, 0, 0, 2])
    found = instance_accuracy(jnp.eye(3)[answers], y, 4)
    np.testing.assert_allclose(found, [2 / 3, 1, 0, np.nan])
    # A tie is no answer.
    tied = jnp.eye(3)[answers].at[0].set(1)
    np.testing.assert_allclose(instance_accuracy(tied, y, 4), [1 / 3, 1, 0, np.nan])


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"slots": 3, "heads": 4}, "4 heads do not fit 3 memory slots"),
        ({"heads": 0}, "0 heads"),
        ({"decay": 1.0}, r"usage decay 1.0 is outside \[0, 1\)"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, culprit):
    with pytest.raises(ValueError, match=culprit):
        mann(flatten(), **settings)


def test_it_learns_to_bind_labels_to_inputs():
    """Five one-hot inputs whose labels are drawn anew for every task: memory alone can answer."""
    import optax

    learner = mann(flatten(), units=16, slots=8, width=8, heads=1)

    def draw(key):
        order_key, label_key = jax.random.split(key)
        symbol = jax.random.permutation(order_key, jnp.tile(jnp.arange(3), 4))
        label = jax.random.permutation(label_key, 3)[symbol]
        return Batch(3 * jnp.eye(3)[symbol], jnp.eye(3)[label])

    def mean_loss(params, key):
        def one(key):
            batch = draw(key)
            episode = Episode(*(Batch(batch.x[s], batch.y[s]) for s in (slice(3), slice(3, 12))))
            value, aux = learner.loss(params, {}, episode, key)
            return value, aux.metrics

        losses, metrics = jax.vmap(one)(jax.random.split(key, 16))
        return losses.mean(), metrics

    params, _ = learner.init(KEY, Episode(draw(KEY), draw(KEY)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            (_, metrics), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params, key)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), metrics

        _, metrics = jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(KEY, 300)
        )
        return jax.tree.map(lambda m: m[-20:].mean(), metrics)

    metrics = train(params)
    assert metrics["instance_4"] > 0.9
    assert metrics["instance_1"] < 0.75  # nobody can know it; the last of three can be inferred
