import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meta_jax.data.dataset import DataError, dataset_from_classes
from meta_jax.data.episodes import (
    EpisodeSpec,
    check_spec,
    rotate_90,
    sample_batch,
    sample_episode,
)
from meta_jax.data.sinusoid import sample_sinusoid
from tests.checkers import key_and_leak_checks

SIDE = 4
COUNTS = (6, 2, 5, 6, 4, 6, 3, 5)
GROUPS = (0, 0, 0, 1, 1, 1, 1, 2)
SPECS = (
    EpisodeSpec(3, 1, 2),
    EpisodeSpec(7, 2, 2, "classes"),
    EpisodeSpec(3, 2, 3, "per_class"),
    EpisodeSpec(2, 1, 1, "per_episode"),
    EpisodeSpec(2, 1, 2, "none", True),
    EpisodeSpec(6, 2, 2, "classes", True),
)


def labelled_dataset(counts=COUNTS, groups=GROUPS):
    """Each image tells its class, example and turn."""
    images = np.zeros((len(counts), max(counts), SIDE, SIDE, 1), np.uint8)
    # A corner wanders with the turn; its neighbour on the edge is never a corner.
    images[:, :, 0, 0, 0] = np.arange(len(counts))[:, None] + 1
    images[:, :, 0, 1, 0] = np.arange(max(counts)) + 1
    return dataset_from_classes(
        [rows[:count] for rows, count in zip(images, counts, strict=True)], groups
    )


def read(x):
    """Class, example and turn [..., n] of images [..., n, SIDE, SIDE, 1]."""
    pixels = np.rint(np.asarray(x)[..., 0] * 255).astype(int)
    back = np.stack([np.rot90(pixels, -turn, axes=(-2, -1)) for turn in range(4)], -1)
    turn = back[..., 0, 0, :].argmax(-1)
    upright = np.take_along_axis(back, turn[..., None, None, None], -1)[..., 0]
    return upright[..., 0, 0] - 1, upright[..., 0, 1] - 1, turn


@functools.cache
def sampler(spec):
    return jax.jit(lambda key, dataset: sample_episode(key, dataset, spec))


@functools.cache
def many(spec, n=3000):
    """Class, example, turn and label [n, rows], for support and query of n episodes."""
    keys = jax.random.split(jax.random.key(7), n)
    draw = jax.jit(jax.vmap(lambda k, d: sample_episode(k, d, spec), (0, None)))
    support, query = draw(keys, labelled_dataset())
    return [(*read(x), np.asarray(y).argmax(-1)) for x, y, _ in (support, query)]


def assert_uniform(values, support):
    """Pearson's chi-square, five standard deviations above its mean at most."""
    assert set(np.unique(values)) == set(support)
    counts = np.array([(values == v).sum() for v in support])
    expected = counts.sum() / len(support)
    freedom = len(support) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_the_fixture_reads_what_was_turned():
    dataset = labelled_dataset()
    images = np.asarray(dataset.examples)[np.asarray(dataset.starts) + 1] / 255
    for turn in range(4):
        found = read(np.rot90(images, turn, axes=(1, 2)))
        np.testing.assert_array_equal(found[0], np.arange(8))
        assert set(found[1]) == {1}
        assert set(found[2]) == {turn}


@settings(max_examples=20, deadline=None)
@given(index=st.integers(0, len(SPECS) - 1), seed=st.integers(0, 2**31 - 1))
def test_every_episode_is_well_formed(index, seed):
    spec = SPECS[index]
    dataset = labelled_dataset()
    episode = jax.tree.map(np.asarray, sampler(spec)(jax.random.key(seed), dataset))
    seen, identity = set(), {}
    for (x, y, mask), n in zip(episode, (spec.shots, spec.queries), strict=True):
        assert x.shape == (spec.ways * n, SIDE, SIDE, 1)
        assert x.dtype == y.dtype == jnp.float32
        assert mask is None
        np.testing.assert_array_equal(np.sort(y, axis=1)[:, -2:], [[0, 1]] * len(y))
        np.testing.assert_array_equal(y.sum(0), [n] * spec.ways)
        for label, image in zip(np.argmax(y, 1), zip(*read(x), strict=True), strict=True):
            image_class, example, turn = map(int, image)
            assert image not in seen
            seen.add(image)
            assert example < COUNTS[image_class]
            assert COUNTS[image_class] >= spec.shots + spec.queries
            own = (image_class, turn)
            assert identity.setdefault(int(label), own) == own
    assert len(set(identity.values())) == spec.ways  # no class under two labels
    classes = [c for c, _ in identity.values()]
    turns = {t for _, t in identity.values()}
    if spec.rotations != "classes":
        assert len(set(classes)) == spec.ways
    if spec.rotations == "none":
        assert turns == {0}
    if spec.rotations == "per_episode":
        assert len(turns) == 1
    if spec.within_group:
        assert len({GROUPS[c] for c in classes}) == 1


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_the_same_key_draws_the_same_episode(seed):
    spec = SPECS[0]
    first, again, other = (
        sampler(spec)(jax.random.key(s), labelled_dataset()) for s in (seed, seed, seed + 1)
    )
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.asarray(first.support.x) != np.asarray(other.support.x)).any() or (
        np.asarray(first.query.x) != np.asarray(other.query.x)
    ).any()


@pytest.mark.parametrize("spec", [SPECS[2], SPECS[5]])
def test_jit_draws_what_plain_python_draws(spec):
    key, dataset = jax.random.key(3), labelled_dataset()
    compiled, plain = sampler(spec)(key, dataset), sample_episode(key, dataset, spec)
    # A compiled division by a constant may differ in the last bit.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-7), compiled, plain)


# The first row of a set is one uniform draw in each episode, so that draws are independent.
@pytest.mark.parametrize("which", [0, 1])
def test_classes_examples_and_labels_are_uniform(which):
    spec = SPECS[0]
    image_class, example, turn, label = (a[:, 0] for a in many(spec)[which])
    assert_uniform(image_class, [0, 2, 3, 4, 5, 6, 7])  # class 1 has too few images
    for c in (0, 2, 4):
        assert_uniform(example[image_class == c], range(COUNTS[c]))
    assert_uniform(label, range(spec.ways))
    # No label is tied to a class.
    assert_uniform(label[image_class == 5], range(spec.ways))
    assert (turn == 0).all()


@pytest.mark.parametrize("spec", [s for s in SPECS if s.rotations != "none"])
def test_turns_are_uniform(spec):
    assert_uniform(many(spec)[0][2][:, 0], range(4))


def test_rows_are_shuffled_in_support_and_query_apart():
    spec = EpisodeSpec(4, 1, 1)
    support, query = (np.asarray(part[3]) for part in many(spec))
    for labels in (support, query):
        for row in range(spec.ways):
            assert_uniform(labels[:, row], range(spec.ways))
    # The order of the support says nothing about the order of the queries.
    assert_uniform((support[:, 0] - query[:, 0]) % spec.ways, range(spec.ways))


def test_a_turned_class_is_a_class_of_its_own():
    spec = SPECS[1]
    image_class, _, turn, label = many(spec)[0]
    virtual = image_class * 4 + turn
    assert_uniform(virtual[:, 0], [c * 4 + t for c in (0, 2, 3, 4, 5, 7) for t in range(4)])
    # Two turns of one character do meet in an episode, under two labels.
    meets = (
        (image_class[:, :, None] == image_class[:, None])
        & (turn[:, :, None] != turn[:, None])
        & (label[:, :, None] != label[:, None])
    )
    assert meets.any((1, 2)).mean() > 0.5


def test_per_class_turns_are_independent_of_each_other():
    _, _, turn, label = many(SPECS[2])[0]
    by_label = np.stack([np.where(label == k, turn, -1).max(1) for k in range(2)])
    assert_uniform(by_label[0] * 4 + by_label[1], range(16))


def test_groups_are_drawn_uniformly_among_those_that_can_serve():
    groups = np.asarray(GROUPS)
    for spec in SPECS[4:]:
        # The group of one class, or of 4 turned classes, is too small for either.
        assert_uniform(groups[many(spec)[0][0][:, 0]], [0, 1])


def test_a_group_too_small_is_served_where_turned_classes_make_it_large_enough():
    spec = EpisodeSpec(3, 2, 2, "classes", True)
    assert_uniform(np.asarray(GROUPS)[many(spec)[0][0][:, 0]], [0, 1, 2])


def test_shared_drawers_ask_about_one_drawer_with_the_examples_of_another():
    support, query = many(EpisodeSpec(3, 1, 1, "none", True, True), n=300)
    for _, example, _, _ in (support, query):
        assert (example == example[:, :1]).all()
    drawers = support[1][:, 0], query[1][:, 0]
    assert (drawers[0] != drawers[1]).all()
    for drawer in drawers:  # no three classes of one group have more than four in common
        assert set(drawer) == set(range(4))
    # Only examples that all classes of the episode have.
    assert (np.array(COUNTS)[support[0]].min(1) > np.maximum(*drawers)).all()


def test_rotate_90_is_rot90_for_each_image(x64):
    images = np.random.default_rng(0).uniform(size=(4, 5, 5, 3))
    turned = np.asarray(jax.jit(rotate_90)(images, np.arange(4)))
    for k in range(4):
        np.testing.assert_array_equal(turned[k], np.rot90(images[k], k))


def test_pixels_are_scaled_to_one():
    dataset = dataset_from_classes([np.full((2, 1, 1, 1), 255, np.uint8)] * 2)
    episode = sampler(EpisodeSpec(2, 1, 1))(jax.random.key(0), dataset)
    np.testing.assert_array_equal(episode.support.x, np.ones((2, 1, 1, 1)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, bool])
def test_whatever_is_no_uint8_passes_unchanged(dtype):
    classes = [np.full((2, 3), k, dtype) for k in range(3)]
    episode = sampler(EpisodeSpec(3, 1, 1))(jax.random.key(0), dataset_from_classes(classes))
    assert episode.query.x.dtype == dtype
    assert episode.query.y.dtype == jnp.float32
    np.testing.assert_array_equal(
        np.sort(np.asarray(episode.support.x, np.float32)[:, 0]),
        np.float32([c[0, 0] for c in classes]),
    )


def test_the_leaves_of_an_example_stay_together():
    # Token ids [2, ...] tell class and example; their mask and the image tell the same.
    def examples(k, n):
        number = 10 * k + np.arange(n)
        ids = np.stack([number, number + 1], 1).astype(np.int32)
        return {"ids": ids, "mask": ids % 2 == 0, "pixel": number.astype(np.uint8)}

    dataset = dataset_from_classes([examples(k, 4 + k) for k in range(4)])
    episode = jax.jit(sample_episode, static_argnums=2)(
        jax.random.key(1), dataset, EpisodeSpec(3, 2, 2)
    )
    seen = []
    for x, y, _ in jax.tree.map(np.asarray, episode):
        number = np.asarray(x["ids"][:, 0])
        np.testing.assert_array_equal(x["ids"][:, 1], number + 1)
        np.testing.assert_array_equal(x["mask"], x["ids"] % 2 == 0)
        np.testing.assert_allclose(x["pixel"], number / 255, rtol=1e-6)
        assert len({(c, k) for c, k in zip(number // 10, y.argmax(1).tolist(), strict=True)}) == 3
        assert (number % 10 < 4 + number // 10).all()
        seen += number.tolist()
    assert len(set(seen)) == 12


@pytest.mark.parametrize(
    "spec",
    [
        EpisodeSpec(3, 1, 2),
        EpisodeSpec(2, 1, 2, "per_class", True),
        EpisodeSpec(2, 1, 2, "classes", True, True),
        EpisodeSpec(2, 1, 1, "per_episode"),
    ],
)
def test_no_key_is_used_twice_and_no_tracer_leaks(spec):
    dataset, key = labelled_dataset(), jax.random.key(0)
    with key_and_leak_checks():
        jax.jit(lambda k, d: sample_episode(k, d, spec))(key, dataset)
        sample_sinusoid(jax.random.key(0), 3, 3)


def test_rotate_90_names_the_argument_of_the_wrong_shape():
    with pytest.raises(ValueError, match="images must be"):
        rotate_90(np.zeros((2, 3, 4, 1)), np.zeros(2, int))
    with pytest.raises(ValueError, match=r"turns must be \[2\], not \[\]"):
        rotate_90(np.zeros((2, 3, 3, 1)), np.zeros((), int))


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (EpisodeSpec(2, 1, 1, "sideways"), "unknown rotations 'sideways'"),
        (EpisodeSpec(0, 1, 1), "ways=0"),
        (EpisodeSpec(2, 0, 1), "shots=0"),
        (EpisodeSpec(2, 1, -1), "queries=-1"),
        (EpisodeSpec(2, 3, 4), "shots + queries = 7 is more than the 6 examples"),
        (EpisodeSpec(9, 1, 1), "9 ways are more than the 8 classes"),
        (EpisodeSpec(4, 3, 3), "4 ways are more than the 3 classes"),
        (EpisodeSpec(13, 3, 3, "classes"), "13 ways are more than the 12 classes"),
        (EpisodeSpec(5, 1, 1, "none", True), "4 classes of the largest group"),
        (EpisodeSpec(3, 3, 3, "per_class", True), "2 classes of the largest group"),
    ],
)
def test_check_spec_refuses_in_one_line(spec, part):
    with pytest.raises(DataError) as error:
        check_spec(spec, labelled_dataset(), "split test")
    message = str(error.value)
    assert part in message
    assert "\n" not in message
    if "largest" in message or "ways are" in message:
        assert "split test" in message


def test_check_spec_refuses_turns_of_images_that_are_not_square():
    dataset = dataset_from_classes([np.zeros((2, 3, 4, 1), np.uint8)] * 2)
    with pytest.raises(DataError, match="not square"):
        check_spec(EpisodeSpec(2, 1, 1, "per_class"), dataset)
    check_spec(EpisodeSpec(2, 1, 1), dataset)


@pytest.mark.parametrize(
    "examples", [np.zeros((2, 8)), {"a": np.zeros((2, 4, 4)), "b": np.zeros(2)}]
)
def test_check_spec_refuses_turns_of_what_are_no_images(examples):
    dataset = dataset_from_classes([examples] * 2)
    with pytest.raises(DataError, match="examples of split val that are no images cannot be rot"):
        check_spec(EpisodeSpec(2, 1, 1, "per_class"), dataset, "split val")
    check_spec(EpisodeSpec(2, 1, 1), dataset)


@pytest.mark.parametrize(
    "spec",
    [
        *SPECS,
        EpisodeSpec(8, 1, 1),
        EpisodeSpec(12, 3, 3, "classes"),
        EpisodeSpec(4, 1, 1, "none", True),
    ],
)
def test_check_spec_accepts_what_can_be_served(spec):
    check_spec(spec, labelled_dataset())


@functools.cache
def sinusoids():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 2000)
        draw = jax.jit(jax.vmap(lambda key: sample_sinusoid(key, 10, 5)))
        return jax.tree.map(np.asarray, draw(keys))


def sinusoid_curves():
    """a and p of y = a sin(x - p) = (a cos p) sin x - (a sin p) cos x, from the support alone."""
    x, y, _ = sinusoids().support
    basis = np.concatenate([np.sin(x), -np.cos(x)], -1)
    u, v = np.moveaxis(np.linalg.pinv(basis) @ y, 1, 0)[..., 0]
    return np.hypot(u, v), np.arctan2(v, u)


def test_sinusoid_support_and_query_lie_on_one_curve():
    a, p = sinusoid_curves()
    for x, y, _ in sinusoids():
        np.testing.assert_allclose(
            y[..., 0], a[:, None] * np.sin(x[..., 0] - p[:, None]), atol=1e-8
        )
    assert sinusoids().support.x.shape == (2000, 10, 1)
    assert sinusoids().query.y.shape == (2000, 5, 1)
    assert not np.intersect1d(sinusoids().support.x, sinusoids().query.x).size


def test_sinusoid_ranges():
    a, p = sinusoid_curves()
    x = np.concatenate([part.x.ravel() for part in sinusoids()])
    for values, low, high in ((a, 0.1, 5.0), (p, 0.0, np.pi), (x, -5.0, 5.0)):
        slack = 1e-8
        assert low - slack <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high + slack
        assert_uniform(np.clip((values - low) / (high - low) * 10, 0, 9.99).astype(int), range(10))
    assert abs(np.corrcoef(a, p)[0, 1]) < 0.1


@pytest.mark.parametrize("rotations", ["none", "classes", "per_class"])
def test_a_batch_is_drawn_uniformly_and_labelled_among_all_classes(rotations):
    spec, classes = EpisodeSpec(5, 1, 3, rotations), len(COUNTS)
    draw = jax.jit(jax.vmap(lambda k, d: sample_batch(k, d, spec), (0, None)))
    support, query = draw(jax.random.split(jax.random.key(3), 600), labelled_dataset())
    turns = 4 if rotations == "classes" else 1
    assert support.y.shape == (600, 5, classes * turns)
    assert query.y.shape == (600, 15, classes * turns)
    read_off = [
        np.concatenate(parts, 1)
        for parts in zip(
            *((*read(x), np.asarray(y).argmax(-1)) for x, y, _ in (support, query)), strict=True
        )
    ]
    drawn, example, turn, label = (part.ravel() for part in read_off)
    np.testing.assert_array_equal(label, drawn + classes * turn * (turns == 4))
    assert set(turn) == ({0} if rotations == "none" else {0, 1, 2, 3})
    # Every example is as probable as any other, whatever the size of its class.
    _, found = np.unique(drawn * max(COUNTS) + example, return_counts=True)
    assert len(found) == sum(COUNTS)
    expected = len(drawn) / sum(COUNTS)
    assert (abs(found - expected) < 5 * expected**0.5).all()
