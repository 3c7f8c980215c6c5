"""Sentences as token ids of different lengths, with a mask: a dataset of dictionaries.

    python -m experiments.train --tasks=docs.extending.token_tasks:sentences \
        --network=docs.extending.token_tasks:token_network --workdir=runs/tokens
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import meta_jax as mj
from meta_jax.data import TaskSource

VOCABULARY = 200
COMMON = 20  # words that say nothing, such as "the": the first ids


def make_split(classes: int, seed: int, length: int = 12) -> mj.data.Split:
    """Draws 20 sentences of each class; a class has six words of its own, between common ones.

    Args:
      classes: Number of classes.
      seed: Seed of the words and sentences.
      length: Tokens of the longest sentence.

    Returns:
      A split of examples {"ids": int32 [length], "real": bool [length]}.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), 20)
    words = rng.integers(COMMON, VOCABULARY, (classes, 6))
    own = words[labels[:, None], rng.integers(0, 6, (len(labels), length))]
    common = rng.integers(0, COMMON, own.shape)
    ids = np.where(rng.random(own.shape) < 0.4, own, common).astype(np.int32)
    real = np.arange(length) < rng.integers(length // 2, length + 1, len(labels))[:, None]
    return mj.data.split_from_arrays({"ids": ids * real, "real": real}, labels)


@mj.registry.tasks("sentences")
def sentences(*, train_classes: int = 80, objective: str = "cross_entropy") -> TaskSource:
    """Builds a source of classification tasks on made-up sentences.

    Args:
      train_classes: Number of classes to train on; a quarter as many each for validation and tests.
      objective: Objective of the tasks.
    """
    sizes = {"train": train_classes, "val": train_classes // 4, "test": train_classes // 4}
    loaders = {
        split: functools.partial(make_split, size, seed)
        for seed, (split, size) in enumerate(sizes.items())
    }
    return mj.data.source_from_splits(mj.data.lazy_splits(loaders), objective=objective)


def init_tokens(key: jax.Array, x: dict[str, jax.Array], features: int) -> dict[str, jax.Array]:
    """Draws the embeddings of the tokens."""
    del x
    return {"embeddings": jax.random.normal(key, (VOCABULARY, features)) / features**0.5}


def apply_tokens(params: dict[str, jax.Array], x: dict[str, jax.Array]) -> jax.Array:
    """Averages the embeddings of the real tokens of each sentence, [n, features]."""
    real = x["real"][..., None]
    embedded = params["embeddings"][x["ids"]] * real
    return embedded.sum(1) / jnp.maximum(real.sum(1), 1)


@mj.registry.network("token_network")
def token_network(features: int = 32) -> mj.Network:
    """Builds a network that averages the embeddings of a sentence's tokens.

    Args:
      features: Size of an embedding.
    """
    return mj.from_functions(functools.partial(init_tokens, features=features), apply_tokens)
