import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from meta_jax.model_based.memory import (
    Memory,
    access_memory,
    content_address,
    decay_usage,
    empty_memory,
    least_used,
    read_memory,
    write_memory,
    write_weights,
)

pytestmark = pytest.mark.usefixtures("x64")


address = jax.jit(content_address, static_argnames="key_strength")
access = jax.jit(access_memory, static_argnames=("usage_decay", "key_strength"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def used_memory(num_slots=7, slot_size=3, num_heads=2):
    weights = np.exp(normal(1, num_heads, num_slots))
    return Memory(
        normal(0, num_slots, slot_size),
        weights / weights.sum(1, keepdims=True),
        np.random.default_rng(2).uniform(size=num_slots),
    )


class TestTheFixture:
    """One step worked out by hand: 3 slots of width 2, one head, gamma 1/2, sigmoid(alpha) 1/4."""

    memory = Memory(
        np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]]),
        np.array([[0.2, 0.3, 0.5]]),
        np.array([0.9, 0.1, 0.4]),
    )
    key, gate = np.array([[1.0, 1.0]]), np.array([0.25])
    written = np.array([[0.05, 0.825, 0.125]])
    rows = np.array([[1.05, 0.05], [0.825, 0.825], [3.125, 1.125]])
    read_weights = np.array([[0.28767, 0.37310, 0.33923]])

    def test_least_used(self):
        np.testing.assert_array_equal(least_used(jnp.asarray(self.memory.usage), 1), [[0, 1, 0]])

    def test_write_weights(self):
        least = np.array([[0.0, 1.0, 0.0]])
        weights = write_weights(self.gate, self.memory.read_weights, least)
        np.testing.assert_allclose(weights, self.written, atol=1e-12)

    def test_write(self):
        rows = write_memory(self.memory.rows, self.written, self.key, np.array([[0.0, 1.0, 0.0]]))
        np.testing.assert_allclose(rows, self.rows, atol=1e-12)

    def test_content_address(self):
        weights = address(self.key, self.rows)
        np.testing.assert_allclose(weights, self.read_weights, atol=1e-5)

    def test_read(self):
        read_vectors = read_memory(self.rows, self.read_weights)
        np.testing.assert_allclose(read_vectors, [[1.66995, 0.70383]], atol=3e-5)

    def test_access_writes_then_reads(self):
        memory, read_vectors = access(self.memory, self.key, self.gate, usage_decay=0.5)
        np.testing.assert_allclose(memory.rows, self.rows, atol=1e-5)
        np.testing.assert_allclose(memory.read_weights, self.read_weights, atol=1e-5)
        np.testing.assert_allclose(memory.usage, [0.78767, 1.24810, 0.66423], atol=1e-5)
        np.testing.assert_allclose(read_vectors, [[1.66995, 0.70383]], atol=1e-5)

    def test_the_memory_before_the_write_would_read_differently(self):
        before = read_memory(self.memory.rows, address(self.key, self.memory.rows))
        assert abs(np.asarray(before) - np.array([[1.66995, 0.70383]])).max() > 0.05


def test_each_head_has_a_least_used_slot_of_its_own():
    usage = jnp.array([0.5, 0.1, 0.1, 0.1, 0.3])  # the paper's formula would mark three slots
    np.testing.assert_array_equal(least_used(usage, 2), np.eye(5)[[1, 2]])
    np.testing.assert_array_equal(least_used(usage, 4), np.eye(5)[[1, 2, 3, 4]])


@pytest.mark.parametrize("heads", [1, 3])
def test_write_and_read_weights_sum_to_one_for_each_head(heads):
    memory = used_memory(num_heads=heads)
    gate = 1 / (1 + np.exp(-normal(5, heads)))

    @jax.jit
    def written(gate, memory):
        return write_weights(gate, memory.read_weights, least_used(memory.usage, heads))

    weights = np.asarray(written(gate, memory))
    np.testing.assert_allclose(weights.sum(1), np.ones(heads), atol=1e-12)
    assert (weights >= 0).all()
    after, _ = access(memory, normal(6, heads, 3), gate, usage_decay=0.9)
    np.testing.assert_allclose(np.asarray(after.read_weights).sum(1), np.ones(heads), atol=1e-12)


@pytest.mark.parametrize(("heads", "decay"), [(1, 0.5), (3, 0.8)])
def test_usage_tends_to_its_fixed_point(heads, decay):
    def step(memory, seed):
        key = jax.random.key(seed)
        keys = jax.random.normal(key, (heads, 3))
        memory, _ = access_memory(
            memory, keys, jax.random.uniform(key, (heads,)), usage_decay=decay
        )
        return memory, memory.usage.sum()

    run = jax.jit(lambda: jax.lax.scan(step, empty_memory(7, 3, heads), jnp.arange(200))[1])
    sums = np.asarray(run())
    # sum u_t = gamma sum u_{t-1} + 2 R, from zero.
    expected = 2 * heads * (1 - decay ** np.arange(1, 201)) / (1 - decay)
    np.testing.assert_allclose(sums, expected, atol=1e-9)
    np.testing.assert_allclose(sums[-1], 2 * heads / (1 - decay), atol=1e-9)


def test_an_empty_memory_is_read_uniformly_and_its_gradient_is_finite():
    memory = empty_memory(5, 3, 2)
    keys = normal(3, 2, 3)
    np.testing.assert_allclose(address(keys, memory.rows), memory.read_weights)
    gradients = jax.jit(jax.grad(lambda *a: content_address(*a)[0, 0], (0, 1)))(keys, memory.rows)
    assert all(np.isfinite(g).all() for g in gradients)


def test_cosines_do_not_see_lengths():
    keys, rows = normal(3, 2, 3), normal(4, 5, 3)
    lengths = np.array([0.5, 2.0, 3.0, 1.0, 7.0])[:, None]
    np.testing.assert_allclose(address(4 * keys, lengths * rows), address(keys, rows), atol=1e-7)


def test_a_key_strength_sharpens():
    keys, rows = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    for strength in (1.0, 10.0):
        expected = np.exp(strength * np.array([[1.0, 0.0, -1.0]]))
        found = address(keys, rows, key_strength=strength)
        np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-6)


def test_gradients_flow_through_gate_keys_and_read_weights_and_agree_with_differences():
    memory, target = used_memory(), normal(9, 2, 3)

    @jax.jit
    def loss(gate, keys, read_weights, rows):
        after, read_vectors = access_memory(
            Memory(rows, read_weights, memory.usage), keys, jax.nn.sigmoid(gate), usage_decay=0.9
        )
        return (target * read_vectors).sum() + (after.rows**2).sum() + (after.read_weights**3).sum()

    arguments = normal(5, 2), normal(6, 2, 3), memory.read_weights, memory.rows
    check_grads(loss, arguments, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)
    for gradient in jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arguments):
        assert abs(np.asarray(gradient)).max() > 1e-3


def test_no_gradient_through_the_choice_of_the_least_used_slot_or_through_usage():
    memory = used_memory()

    def loss(usage, gate):
        step = memory._replace(usage=usage)
        step, _ = access_memory(step, normal(6, 2, 3), gate, usage_decay=0.9)
        step, read_vectors = access_memory(step, normal(7, 2, 3), gate, usage_decay=0.9)
        return (read_vectors**2).sum() + (least_used(step.usage, 2) * read_vectors[:, :1]).sum()

    gate = np.array([0.3, 0.6])
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(memory.usage, gate), np.zeros(7))


def test_usage_is_a_constant_to_the_gradient():
    def usage(gate):
        after, _ = access_memory(used_memory(), normal(6, 2, 3), gate, usage_decay=0.9)
        return (after.usage**2).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(usage))(np.array([0.3, 0.6])), np.zeros(2))


def test_usage_counts_reads_and_writes():
    reads, writes = np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[0.0, 1.0], [0.25, 0.75]])
    usage = jax.jit(decay_usage)(np.array([2.0, 4.0]), reads, writes, 0.5)
    np.testing.assert_allclose(usage, [1 + 1.75, 2 + 2.25])


def test_unused_rows_are_forgotten_and_used_ones_kept():
    @jax.jit
    def written(memory, key):
        # A gate of zero: to the least used row alone.
        return access_memory(memory, key[None], jnp.zeros(1), usage_decay=0.99)[0]

    memory = empty_memory(3, 2, 1)
    for key in ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]):
        memory = written(memory, np.array(key))
    np.testing.assert_array_equal(memory.rows, [[1, 0], [0, 1], [-1, 0]])
    # All are taken: the oldest gives way.
    memory = written(memory, np.array([2.0, 2.0]))
    np.testing.assert_array_equal(memory.rows, [[2, 2], [0, 1], [-1, 0]])


def test_rows_that_are_padding_are_never_read():
    keys, rows = normal(3, 2, 3), normal(4, 5, 3)
    mask = np.array([True, False, True, True, False])
    loud = np.where(mask[:, None], rows, 1e9)
    for strength in (1.0, 10.0):
        found = np.asarray(address(keys, loud, key_strength=strength, mask=mask))
        expected = address(keys, rows[mask], key_strength=strength)
        np.testing.assert_allclose(found[:, mask], expected, atol=1e-12)
        np.testing.assert_array_equal(found[:, ~mask], 0)
    assert np.isfinite(address(keys, rows, mask=np.zeros(5, bool))).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_and_is_finite(dtype):
    memory = empty_memory(5, 3, 2, dtype)
    keys, gate = normal(3, 2, 3).astype(dtype), np.full(2, 0.5, dtype)
    memory, read_vectors = access(memory, keys, gate, usage_decay=0.9, key_strength=10.0)
    for leaf in (*memory, read_vectors):
        assert leaf.dtype == dtype
        assert np.isfinite(np.float32(leaf)).all()


ROWS, KEYS, WEIGHTS = np.ones((5, 3)), np.ones((2, 3)), np.ones((2, 5))


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda: content_address(KEYS[0], ROWS), r"keys must be \[heads, slot_size\], not \[3\]"),
        (lambda: content_address(KEYS[:, :2], ROWS), r"rows \[5, 3\] must be .* with slot_size 2"),
        (lambda: content_address(KEYS, ROWS, mask=np.ones(2, bool)), r"mask \[2\] must be"),
        (lambda: read_memory(ROWS, WEIGHTS.T), r"weights \[5, 2\] must be"),
        (lambda: least_used(WEIGHTS, 1), r"usage must be \[slots\], not \[2, 5\]"),
        (lambda: write_weights(np.ones(3), WEIGHTS, WEIGHTS), r"read_weights \[2, 5\] must be"),
        (lambda: write_memory(ROWS, WEIGHTS, KEYS[:1], WEIGHTS), r"keys \[1, 3\] must be"),
        (lambda: empty_memory(0, 3, 2), "a memory needs num_slots of at least 1, not 0"),
        (lambda: empty_memory(5, 3, -1), "a memory needs num_heads of at least 1, not -1"),
        (lambda: decay_usage(np.ones(4), WEIGHTS, WEIGHTS, 0.9), r"read_weights \[2, 5\] must be"),
    ],
)
def test_what_does_not_fit_is_named(call, culprit):
    with pytest.raises(ValueError, match=culprit):
        call()
