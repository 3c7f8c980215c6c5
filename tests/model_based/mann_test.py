import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.model_based.mann import lstm_learner, mann
from meta_jax.model_based.sequence import (
    as_sequence,
    instance_accuracy,
    instance_numbers,
    labels_before,
    nca_loss,
    sequence_metrics,
)
from meta_jax.networks.flatten import flatten
from meta_jax.objectives import cross_entropy_loss, squared_error
from tests.random_trees import moved, normal
from tests.small_networks import mixed_inputs, normalised

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
UNITS, SLOTS, SIZE, HEADS = 5, 6, 3, 2
PAPER = {"key_strength": 1.0, "nca_weight": 0.0}
SMALL = {
    "hidden_size": UNITS,
    "num_slots": SLOTS,
    "slot_size": SIZE,
    "num_heads": HEADS,
    "usage_decay": 0.9,
}
LEARNERS = {
    "mann": mann(flatten(), write_values=False, **SMALL, **PAPER),
    "mann_values": mann(flatten(), write_values=True, **SMALL, **PAPER),
    "lstm": lstm_learner(flatten(), hidden_size=UNITS, nca_weight=0.0),
}
every_learner = pytest.mark.parametrize("name", LEARNERS)


def sequence(seed=0, ways=3, each=4):
    labels = np.random.default_rng(seed).permutation(np.tile(np.eye(ways), (each, 1)))
    return Batch(np.asarray(normal(ways * each, 2, 2, 1, seed=seed)), labels)


@functools.cache
def params_of(name):
    params, _ = jax.jit(LEARNERS[name].init)(KEY, Episode(sequence(), sequence()))
    return moved(params)


@functools.cache
def reader(name):
    return jax.jit(lambda params, batch: LEARNERS[name].adapt(params, {}, batch, KEY, train=False))


def read(name, batch):
    return jax.tree.map(np.asarray, reader(name)(params_of(name), batch))


shuffle = jax.jit(as_sequence)
nca_and_gradient = jax.jit(jax.value_and_grad(nca_loss))


def in_the_order_of_training(key, episode):
    return jax.tree.map(np.asarray, shuffle(jax.random.split(key)[0], episode))


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
    read_vectors = np.zeros(HEADS * SIZE)
    memory = np.zeros((SLOTS, SIZE)), np.full((HEADS, SLOTS), 1 / SLOTS), np.zeros(SLOTS)
    label, logits = np.zeros(batch.y.shape[1]), []
    for x, y in zip(batch.x.reshape(len(batch.x), -1), batch.y, strict=True):
        inputs = [x, label, h] if name == "lstm" else [x, label, read_vectors, h]
        i, f, u, o = np.split(np.concatenate(inputs) @ lstm["kernel"] + lstm["bias"], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(u)
        h = sigmoid(o) * np.tanh(c)
        output = h
        if name != "lstm":
            interface = params["cell"]["access"]
            out = (h @ interface["kernel"] + interface["bias"]).reshape(HEADS, -1)
            keys = np.tanh(out[:, :SIZE])
            values = np.tanh(out[:, SIZE + 1 :]) if name == "mann_values" else keys
            *memory, read_vectors = access(*memory, keys, sigmoid(out[:, SIZE]), values)
            output = np.concatenate([h, read_vectors])
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
    x, y, _ = sequence()
    adapted = read(name, Batch(x[:7], y[:7]))
    predict = jax.jit(functools.partial(LEARNERS[name].predict, train=False))
    answers, _ = predict(params_of(name), adapted, x[7:9], KEY)
    np.testing.assert_allclose(answers[0], read(name, sequence()).logits[7], atol=1e-9)
    swapped = np.concatenate([x[:7], x[8:9]]), y[:8]
    np.testing.assert_allclose(answers[1], read(name, Batch(*swapped)).logits[7], atol=1e-9)


@every_learner
@pytest.mark.parametrize("t", [0, 5])
def test_a_label_reaches_later_answers_alone(name, t):
    x, y, _ = sequence()
    relabelled = Batch(x, y.copy())
    relabelled.y[t] = np.roll(y[t], 1)
    before, after = read(name, sequence()).logits, read(name, relabelled).logits
    np.testing.assert_array_equal(before[: t + 1], after[: t + 1])
    assert (abs(before[t + 1 :] - after[t + 1 :]).max(1) > 1e-6).all()


@every_learner
def test_an_input_reaches_its_own_and_later_answers(name):
    x, y, _ = sequence()
    changed = x.copy()
    changed[5] += 1
    before, after = read(name, sequence()).logits, read(name, Batch(changed, y)).logits
    np.testing.assert_array_equal(before[:5], after[:5])
    assert (abs(before[5:] - after[5:]).max(1) > 1e-6).all()


@every_learner
def test_every_task_starts_anew(name):
    # Two tasks vmapped, or one after the other: nothing is carried between them.
    batches = sequence(0), sequence(1)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    together = jax.vmap(lambda b: reader(name)(params_of(name), b).logits)(stacked)
    for logits, batch in zip(together, batches, strict=True):
        np.testing.assert_allclose(logits, read(name, batch).logits, atol=1e-12)


@every_learner
def test_the_training_loss_is_that_of_every_step_of_a_shuffled_sequence(name):
    x, y, _ = sequence()
    episode = Episode(Batch(x[:3], y[:3]), Batch(x[3:], y[3:]))
    loss, aux = jax.jit(LEARNERS[name].loss)(params_of(name), {}, episode, KEY)
    shuffled = in_the_order_of_training(KEY, episode)
    logits = by_hand(name, params_of(name), shuffled)
    expected, metrics = jax.jit(cross_entropy_loss)(logits, shuffled.y)
    np.testing.assert_allclose(loss, expected, atol=1e-9)
    assert set(aux.metrics) == {"accuracy", *(f"instance_{i}" for i in range(1, 5))}
    np.testing.assert_allclose(aux.metrics["accuracy"], metrics["accuracy"])
    at_second = np.asarray(instance_numbers(shuffled.y)) == 2
    right = (logits.argmax(1) == np.asarray(shuffled.y).argmax(1))[at_second]
    assert right.size == 3
    np.testing.assert_allclose(aux.metrics["instance_2"], right.mean())


@every_learner
def test_the_gradient_agrees_with_central_differences(name):
    x, y, _ = sequence(each=2)
    episode = Episode(Batch(x[:3], y[:3]), Batch(x[3:], y[3:]))
    value_and_grad = jax.jit(
        jax.value_and_grad(lambda params: LEARNERS[name].loss(params, {}, episode, KEY)[0])
    )
    params = params_of(name)
    _, gradient = value_and_grad(params)
    params, gradient = jax.tree.map(np.asarray, (params, gradient))
    direction = jax.tree.map(np.asarray, moved(jax.tree.map(np.zeros_like, params), by=1.0))
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


@pytest.mark.parametrize("real", [0, 1])
def test_the_nca_loss_without_neighbours_is_zero(real):
    z, mask = np.random.default_rng(0).normal(size=(3, 2)), np.arange(3) < real
    loss, gradient = nca_and_gradient(z, np.eye(2)[[0, 0, 1]], mask)
    assert loss == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-15)  # some compilers round to 1e-17


def test_masks_of_another_shape_are_refused():
    for call in (instance_numbers, labels_before):
        with pytest.raises(ValueError, match=r"mask must be bool \[3\]"):
            call(np.eye(3), np.ones((3, 1), bool))


def test_the_nca_loss_is_the_share_of_the_own_class_among_all_neighbours():
    z = np.random.default_rng(0).normal(size=(7, 3))
    labels = np.array([0, 1, 0, 2, 1, 2, 0])
    lost = []
    for i in range(7):
        near = np.exp(-((z[i] - z) ** 2).sum(1)) * (np.arange(7) != i)
        lost.append(-np.log(near[labels == labels[i]].sum() / near.sum()))
    y = np.eye(3)[labels]
    found = jax.jit(nca_loss)(z, y)
    np.testing.assert_allclose(found, np.mean(lost), atol=1e-12)
    # Padding is nobody's neighbour and has none to find; its gradient is zero, not NaN.
    padded = np.concatenate([z, 1e9 * np.ones((2, 3))]), np.concatenate([y, y[:2]])
    loss, gradient = nca_and_gradient(*padded, np.arange(9) < 7)
    gradient = np.asarray(gradient)
    np.testing.assert_allclose(loss, np.mean(lost), atol=1e-12)
    np.testing.assert_array_equal(gradient[7:], 0)


def test_examples_alone_in_their_class_do_not_count_for_the_nca_loss():
    z = np.asarray(normal(4, 3))
    value, gradient = nca_and_gradient(z, np.eye(3)[[0, 0, 1, 2]])
    lost = []
    for i in (0, 1):
        near = np.exp(-((z[i] - z) ** 2).sum(1)) * (np.arange(4) != i)
        lost.append(-np.log(near[1 - i] / near.sum()))
    np.testing.assert_allclose(value, np.mean(lost), atol=1e-12)
    assert np.isfinite(gradient).all()
    value, gradient = nca_and_gradient(z, np.eye(4))
    assert value == 0
    assert np.isfinite(gradient).all()


def test_the_encoders_own_loss_is_added_with_its_weight():
    x, y, _ = sequence()
    episode = Episode(Batch(x[:3], y[:3]), Batch(x[3:], y[3:]))
    plain, _ = jax.jit(LEARNERS["lstm"].loss)(params_of("lstm"), {}, episode, KEY)
    learner = lstm_learner(flatten(), hidden_size=UNITS, nca_weight=0.5)
    loss, aux = jax.jit(learner.loss)(params_of("lstm"), {}, episode, KEY)
    near = np.asarray(jax.jit(nca_loss)(x.reshape(12, 4), y))
    np.testing.assert_allclose(loss, np.asarray(plain) + 0.5 * near, atol=1e-12)
    np.testing.assert_allclose(aux.metrics["nca_loss"], near, atol=1e-12)


def test_a_shuffled_sequence_is_the_episode_with_its_padding_last():
    x, y, _ = sequence()
    mask = np.array([True, False, True])
    tree = {"pixels": x, "ids": np.arange(12)}
    first, last = (jax.tree.map(lambda a, s=s: a[s], tree) for s in (slice(3), slice(3, 12)))
    episode = Episode(Batch(first, y[:3], mask), Batch(last, y[3:]))
    orders = set()
    for seed in range(3):
        batch = shuffle(jax.random.key(seed), episode)
        ids = np.asarray(batch.x["ids"])
        assert ids[-1] == 1  # the padding
        np.testing.assert_array_equal(batch.mask, np.arange(12) < 11)
        np.testing.assert_array_equal(np.sort(ids), np.arange(12))
        np.testing.assert_array_equal(batch.x["pixels"], x[ids])
        np.testing.assert_array_equal(batch.y, y[ids])
        orders.add(tuple(ids))
    assert len(orders) == 3
    unmasked = Episode(Batch(first, y[:3]), Batch(last, y[3:]))
    assert jax.eval_shape(as_sequence, KEY, unmasked).mask is None


def test_labels_are_shown_one_step_late_and_those_of_padding_never():
    y, shown = np.eye(3), jax.jit(labels_before)
    before, last = shown(y)
    np.testing.assert_array_equal(before, [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(last, [0, 0, 1])
    before, last = shown(y, np.array([True, False, False]))
    np.testing.assert_array_equal(before, [[0, 0, 0], [1, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(last, [1, 0, 0])
    _, last = shown(y, np.zeros(3, bool))
    np.testing.assert_array_equal(last, [0, 0, 0])


def test_instances_and_their_accuracy_by_hand():
    labels = np.array([1, 0, 1, 1, 0, 2])
    y, mask = np.eye(3)[labels], np.arange(6) != 4  # the second 0 is padding
    numbers, accuracy = jax.jit(instance_numbers), jax.jit(instance_accuracy, static_argnums=2)
    np.testing.assert_array_equal(numbers(y, mask), [1, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(numbers(y), [1, 1, 2, 3, 2, 1])
    answers = np.array([1, 2, 1, 0, 0, 2])
    found = accuracy(np.eye(3)[answers], y, 4, mask)
    np.testing.assert_allclose(found, [2 / 3, 1, 0, np.nan])
    # A tie is no answer.
    tied = np.eye(3)[answers]
    tied[0] = 1
    np.testing.assert_allclose(accuracy(tied, y, 4, mask), [1 / 3, 1, 0, np.nan])
    metrics = jax.jit(sequence_metrics)(np.eye(3)[answers], y, mask)
    np.testing.assert_allclose(metrics["instance_1"], 2 / 3)
    assert set(metrics) == {"instance_1", "instance_2"}


def rubbish_between(batch):
    """Two more rows, of rubbish, in front and behind."""
    n = len(batch.y)
    mask = np.asarray([False, *[True] * n, False])
    rows = np.array([0, *range(n), 1])
    x = np.where(mask[:, None, None, None], batch.x[rows], 1e4)
    return Batch(x, np.where(mask[:, None], batch.y[rows], 7.0), mask)


def test_rubbish_in_padding_changes_nothing():
    learner = mann(normalised("running"), write_values=True, **SMALL)
    x, y, _ = sequence()
    bare = Episode(Batch(x[:3], y[:3]), Batch(x[3:], y[3:]))
    full = Episode(*map(rubbish_between, bare))
    params, state = jax.jit(learner.init)(KEY, bare)
    params, state = moved(params), jax.tree.map(lambda s: np.asarray(s) + 0.1, state)

    @jax.jit
    def test(task):
        adapted = learner.adapt(params, state, task.support, KEY, train=False)
        answers, _ = learner.predict(
            params, adapted, task.query.x, KEY, train=False, mask=task.query.mask
        )
        return answers, adapted.logits, learner.evaluate(params, state, task, KEY)

    expected, logits, metrics = jax.tree.map(np.asarray, test(bare))
    found, all_logits, same_metrics = jax.tree.map(np.asarray, test(full))
    np.testing.assert_allclose(found[1:-1], expected, atol=1e-9)
    np.testing.assert_allclose(all_logits[1:-1], logits, atol=1e-9)
    np.testing.assert_allclose(same_metrics["loss"], metrics["loss"], atol=1e-9)
    unmasked, _, _ = test(Episode(full.support._replace(mask=None), full.query))
    assert abs(np.asarray(unmasked)[1:-1] - expected).max() > 1e-4


@every_learner
def test_the_training_loss_leaves_padding_out(name):
    x, y, _ = sequence()
    # All padding behind: the shuffled order of the others stays as it is.
    mask = np.arange(14) < 9
    loud = np.concatenate([x[3:], 1e30 * x[:5]]), np.concatenate([y[3:], y[:5]])
    gradient = jax.jit(jax.value_and_grad(LEARNERS[name].loss, has_aux=True))
    support = Batch(x[:3], y[:3])
    (loss, aux), of_params = gradient(
        params_of(name), {}, Episode(support, Batch(*loud, mask)), KEY
    )
    # By hand on the sequence that was read.
    read_in = in_the_order_of_training(KEY, Episode(support, Batch(*loud, mask)))
    real = Batch(read_in.x[:12], read_in.y[:12])
    logits = by_hand(name, params_of(name), real)
    expected, metrics = jax.jit(cross_entropy_loss)(logits, real.y)
    np.testing.assert_allclose(loss, expected, atol=1e-9)
    np.testing.assert_allclose(aux.metrics["accuracy"], metrics["accuracy"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_params))


def test_the_sequence_protocol_equals_a_loop_over_steps():
    settings = {"hidden_size": UNITS, "nca_weight": 0.0}
    learner = lstm_learner(flatten(), protocol="sequence", **settings)
    x, y, _ = sequence()
    episode = Episode(Batch(x[:3], y[:3]), Batch(x[3:], y[3:]))
    params, traces = params_of("lstm"), []

    @jax.jit
    def evaluate(key):
        traces.append(None)
        return learner.evaluate(params, {}, episode, key)

    for seed in range(3):
        key = jax.random.key(seed)
        found = evaluate(key)
        shuffled = in_the_order_of_training(key, episode)
        logits = by_hand("lstm", params, shuffled)
        seen, right = dict.fromkeys(range(3), 0), {i: [] for i in range(1, 5)}
        for answer, label in zip(logits.argmax(1), np.asarray(shuffled.y).argmax(1), strict=True):
            seen[label] += 1
            right[seen[label]].append(answer == label)
        expected = {f"instance_{i}": np.mean(each) for i, each in right.items()}
        expected["accuracy"] = np.mean(list(right.values()))
        p = np.log(softmax(logits))
        expected["loss"] = -(p * np.asarray(shuffled.y)).sum(1).mean()
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-9, err_msg=name)
    assert len(traces) == 1
    # The other protocol looks at the queries alone.
    few_shot = jax.eval_shape(LEARNERS["lstm"].evaluate, params, {}, episode, KEY)
    assert set(few_shot) == {"loss", "accuracy"}


def test_inputs_may_be_trees():
    learner = lstm_learner(mixed_inputs(), hidden_size=UNITS)
    x = {"ids": np.arange(12).reshape(4, 3) % 5, "real": np.ones((4, 3), bool)}
    batch = Batch(x, np.eye(2)[[0, 1, 0, 1]])
    episode = Episode(batch, batch)

    @jax.jit
    def loss_and_metrics(key):
        params, state = learner.init(key, episode)
        loss, _ = learner.loss(params, state, episode, key)
        return loss, learner.evaluate(params, state, episode, key)

    loss, metrics = loss_and_metrics(KEY)
    assert np.isfinite(loss)
    assert np.isfinite(metrics["loss"])


@every_learner
def test_bfloat16_gives_finite_bfloat16(name):
    x, y, _ = sequence()
    task = Episode(Batch(x[:3], y[:3]), Batch(x[3:], y[3:]))
    half = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), (params_of(name), task))
    found = jax.jit(jax.value_and_grad(LEARNERS[name].loss, has_aux=True))(
        half[0], {}, half[1], KEY
    )
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype == jnp.bfloat16
        assert np.isfinite(np.float32(leaf)).all()


def test_what_cannot_be_read_is_refused():
    x, y, _ = sequence()
    learner, params = LEARNERS["lstm"], params_of("lstm")
    for batch, culprit in (
        (Batch(x, y.argmax(1)), "one-hot"),
        (Batch(x, y[:, :2]), "each of the 3 ways it trains with, and y has 2"),
        (Batch(x[:4], y), "same number of rows"),
    ):
        with pytest.raises(ValueError, match=culprit):
            learner.adapt(params, {}, batch, KEY, train=False)
    maps = mann(normalised("batch", flat=False))
    with pytest.raises(UsageError, match=r"reads vectors .* network gives"):
        maps.init(KEY, Episode(sequence(), sequence()))


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"num_slots": 3, "num_heads": 4}, "4 heads do not fit 3 memory slots"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"usage_decay": 1.0}, "usage_decay=1.0 must be at least 0 and below 1"),
        ({"protocol": "x"}, "unknown protocol 'x': choose one of few_shot, sequence"),
        ({"objective": squared_error}, "mann is for classification"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, culprit):
    with pytest.raises(UsageError, match=culprit):
        mann(flatten(), **settings)


def test_it_learns_to_bind_labels_to_inputs():
    """Five one-hot inputs whose labels are drawn anew for every task: memory alone can answer."""
    import optax

    learner = mann(
        flatten(),
        hidden_size=16,
        num_slots=8,
        slot_size=8,
        num_heads=1,
        **PAPER,
        write_values=False,
    )

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

    params, _ = jax.jit(lambda key: learner.init(key, Episode(draw(key), draw(key))))(KEY)
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
