"""The measured training steps, on our side: what a step learns from, and what it must multiply."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
import optax

from meta_jax.core import Array, Batch, Episode, MetaLearner, PyTree, Tasks
from meta_jax.data.dataset import Dataset
from meta_jax.data.episodes import EpisodeSpec, sample_episode
from meta_jax.data.sinusoid import sample_sinusoid
from meta_jax.data.source import EpisodeSize
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.metric_based.relation import relation
from meta_jax.networks.conv4 import conv4, strided_conv4
from meta_jax.networks.mlp import mlp
from meta_jax.networks.relation_network import relation_encoder
from meta_jax.networks.sequences import recurrent
from meta_jax.objectives import cross_entropy, squared_error
from meta_jax.optimization_based.maml import maml
from meta_jax.optimization_based.reptile import minibatches, reptile
from meta_jax.reinforcement import bandit, rl2, source_from_environment
from meta_jax.reinforcement.ppo import (
    Experience,
    PolicyGradient,
    collect,
    normalised,
    surrogate_loss,
)
from meta_jax.reinforcement.trial_policy import TrialPolicy
from meta_jax.training.outer_step import task_mesh

INNER_LEARNING_RATE = {"images": 0.4, "sinusoid": 0.01, "reptile": 1e-3}
REPTILE_BATCH = 10
_SIDE, _FEATURES = 28, 64


class Work(NamedTuple):
    """One training step: sampling, forward, backward, optimizer."""

    method: str  # 'maml', 'reptile', 'prototypical', 'relation' or 'rl2'
    learner: MetaLearner
    tasks: Tasks
    task_batch: int
    flop: float  # of the step's matrix products, its convolutions being plain ones
    spec: EpisodeSpec | None = None  # of the images; None for sinusoid
    inner_steps: int = 0
    first_order: bool = False
    rl2: "Rl2Setting | None" = None


class Rl2Setting(NamedTuple):
    """RL^2 on bandits: the trials of an outer step, and PPO on them."""

    arms: int = 5
    pulls: int = 100
    trials: int = 400
    hidden_size: int = 64
    epochs: int = 3
    minibatches: int = 20
    discount: float = 0.99
    gae_lambda: float = 0.9
    entropy_weight: float = 0.01
    value_weight: float = 0.5
    clip: float = 0.2


def optimizer() -> optax.GradientTransformation:
    """The outer optimizer of all works."""
    return optax.adam(1e-3)


def _layers(stride: int, pool: int) -> list[float]:
    """Multiplications and additions of each of four 3x3 convolutions, for one image."""
    flop, side, channels = [], _SIDE, 1
    for _ in range(4):
        side = math.ceil(side / stride)
        flop.append(2.0 * side**2 * 9 * channels * _FEATURES)
        side, channels = side // pool, _FEATURES
    return flop


def _maml_flop(spec: EpisodeSpec, inner_steps: int, first_order: bool) -> float:
    """For one task. The first layer needs no gradient of its input."""
    layers = _layers(stride=2, pool=1)
    total, first = sum(layers), layers[0]
    once = 3 * total - first  # forward, and two products for each backward
    inner = once if first_order else 3 * once - 2 * first  # and the gradient of all of these
    return spec.ways * (inner_steps * spec.shots * inner + spec.queries * once)


def image_maml(
    data: Dataset, *, task_batch: int, inner_steps: int = 1, first_order: bool = False
) -> Work:
    """MAML 5-way 1-shot with 15 queries of each class; all leaves are adapted, as peers do."""
    spec = EpisodeSpec(ways=5, shots=1, queries=15, rotations="per_class")
    learner = maml(
        strided_conv4(_FEATURES),
        inner_lr=INNER_LEARNING_RATE["images"],
        steps=inner_steps,
        adjoint="first_order" if first_order else "unrolled",
        mask=None,
        objective=cross_entropy,
    )
    flop = task_batch * _maml_flop(spec, inner_steps, first_order)
    source = _images(data, spec)
    return Work("maml", learner, source, task_batch, flop, spec, inner_steps, first_order)


def image_prototypical(data: Dataset, *, ways: int, queries: int, task_batch: int) -> Work:
    """Prototypical Networks, 1-shot; support and queries encoded as one batch."""
    spec = EpisodeSpec(ways=ways, shots=1, queries=queries, rotations="classes")
    layers = _layers(stride=1, pool=2)
    flop = task_batch * ways * (1 + queries) * (3 * sum(layers) - layers[0])
    mesh = task_mesh(jax.device_count()) if task_batch == 1 else None
    learner = prototypical(conv4(_FEATURES, mesh=mesh))
    return Work("prototypical", learner, _images(data, spec), task_batch, flop, spec)


def image_reptile(data: Dataset, *, task_batch: int, inner_steps: int = 5) -> Work:
    """Reptile 5-way: 10 shots, steps of Adam with beta_1 = 0 on mini-batches of 10 images.

    Each task begins with a fresh Adam, so that tasks are independent and any library can take them
    in any order.
    """
    spec = EpisodeSpec(ways=5, shots=10, queries=1, rotations="classes")
    learner = reptile(
        strided_conv4(_FEATURES),
        inner_lr=INNER_LEARNING_RATE["reptile"],
        steps=inner_steps,
        batch_size=REPTILE_BATCH,
        carry=False,
    )
    layers = _layers(stride=2, pool=1)
    flop = task_batch * inner_steps * REPTILE_BATCH * (3 * sum(layers) - layers[0])
    source = _images(data, spec)
    return Work("reptile", learner, source, task_batch, flop, spec, inner_steps, first_order=True)


def image_relation(data: Dataset, *, queries: int = 19) -> Work:
    """Relation Networks 5-way 1-shot as in the paper: one task, its own batch statistics."""
    spec = EpisodeSpec(ways=5, shots=1, queries=queries, rotations="classes")
    images, pairs = spec.ways * (1 + queries), spec.ways**2 * queries
    product = 2.0 * 9 * _FEATURES**2  # of a 3x3 convolution at one place
    first = 26**2 * 2.0 * 9 * _FEATURES
    # Of the first pairwise convolution, each map's half once, not for every pair.
    flop = images * (2 * first + 3 * product * (11**2 + 2 * 5**2 + 5**2)) + pairs * 3 * product * 4
    mesh = task_mesh(jax.device_count())
    learner = relation(relation_encoder(_FEATURES, normalisation="batch", mesh=mesh))
    return Work("relation", learner, _images(data, spec), 1, flop, spec)


def sinusoid_maml(*, task_batch: int) -> Work:
    """MAML on sinusoids, 10 shots and 10 queries, one inner step, two hidden layers of 40."""
    layers = [2.0 * 1 * 40, 2.0 * 40 * 40, 2.0 * 40 * 1]
    once = 3 * sum(layers) - layers[0]
    flop = task_batch * 10 * (once + 3 * once - 2 * layers[0])
    learner = maml(
        mlp(), inner_lr=INNER_LEARNING_RATE["sinusoid"], steps=1, mask=None, objective=squared_error
    )
    source = Tasks(lambda key, _: sample_sinusoid(key, 10, 10), (), squared_error)
    return Work("maml", learner, source, task_batch, flop, None, 1)


def rl2_bandit(setting: Rl2Setting) -> Work:
    """RL^2 with a GRU on bandits; acting once, and 3 times forward and backward on minibatches."""
    shared = setting._asdict()
    arms, pulls, trials = (shared.pop(name) for name in ("arms", "pulls", "trials"))
    source = source_from_environment(bandit(arms=arms, pulls=pulls))
    inputs, hidden = arms + 2, setting.hidden_size
    once = 2.0 * trials * pulls * hidden * (3 * inputs + 3 * hidden + arms + 1)
    tasks = source.tasks("train", EpisodeSize(1, 1, 1), train=True)
    flop = once * (1 + 3 * setting.epochs)
    return Work("rl2", rl2(**shared), tasks, trials, flop, rl2=setting)


def trials_and_gradient(
    setting: Rl2Setting, tasks: Tasks, params: PyTree
) -> tuple[Experience, PyTree]:
    """16 trials that the policy acts, and the gradient of the surrogate on all of them."""
    policy = TrialPolicy(recurrent(setting.hidden_size))
    settings = PolicyGradient(
        "sampled",
        *(setting.discount, setting.gae_lambda, setting.entropy_weight, setting.value_weight),
        setting.clip,
    )
    keys = jax.random.split(jax.random.key(0), 16)
    problems = jax.vmap(tasks.sample, (0, None))(keys, tasks.data)
    act = functools.partial(collect, settings, policy, params)
    experience = jax.jit(jax.vmap(act))(problems, keys)
    loss_of = functools.partial(surrogate_loss, settings, policy, problems.environment.actions)

    def loss(params: PyTree) -> Array:
        return jax.vmap(loss_of, (None, 0))(params, normalised(experience))[0].mean()

    with jax.default_matmul_precision("float32"):
        return experience, jax.jit(jax.grad(loss))(params)


def works(data: Dataset) -> dict[str, Work]:
    """All works of the table by name."""
    found = {}
    for order in ("second", "first"):
        for steps in (1, 5):
            name = f"maml_{order}_order_{steps}step{'s' * (steps > 1)}"
            found[name] = image_maml(
                data, task_batch=8, inner_steps=steps, first_order=order == "first"
            )
    found["prototypical_60way"] = image_prototypical(data, ways=60, queries=5, task_batch=1)
    found["prototypical_5way"] = image_prototypical(data, ways=5, queries=15, task_batch=8)
    found["reptile"] = image_reptile(data, task_batch=5)
    found["relation_5way"] = image_relation(data)
    found["maml_sinusoid"] = sinusoid_maml(task_batch=25)
    found["rl2_bandit_100_5"] = rl2_bandit(Rl2Setting())
    return found


def _images(data: Dataset, spec: EpisodeSpec) -> Tasks:
    def sample(key: Array, data: PyTree) -> Episode:
        return sample_episode(key, data, spec)

    return Tasks(sample, data, cross_entropy)


def as_seen(work: Work, episode: Episode, key: jax.Array) -> Episode:
    """An episode with its support in the order in which our loss reads it under a key."""
    if work.method != "reptile":
        return episode
    adapt_key = jax.random.split(key)[0]
    rows_key = jax.random.split(adapt_key, 3)[0]  # of its mini-batches
    n = episode.support.x.shape[0]
    order = np.asarray(minibatches(rows_key, n, REPTILE_BATCH, work.inner_steps)).ravel()
    return episode._replace(support=Batch(*(a[order] for a in episode.support[:2])))


def parity_episodes(work: Work, seed: int = 0) -> list[Episode]:
    """A step's tasks as NumPy arrays, so that every library can take the gradient on them.

    Images get a little noise: where maxima are tied in a pool, libraries pass the gradient on
    differently, and the even background of characters is full of ties.
    """
    keys = jax.random.split(jax.random.key(seed), work.task_batch)
    draw, rng = jax.jit(work.tasks.sample), np.random.default_rng(seed)

    def untied(x: np.ndarray) -> np.ndarray:
        return x + rng.random(x.shape, np.float32) if work.spec else x

    episodes = [jax.tree.map(np.array, draw(key, work.tasks.data)) for key in keys]
    return [Episode(*(b._replace(x=untied(b.x)) for b in episode)) for episode in episodes]
