"""A method of one's own: a Conditional Neural Process (Garnelo et al. 2018) on sinusoids.

Its outputs are a pytree, a mean and a scale, and its objective is a likelihood.

    python -m experiments.train --learner=docs.extending.neural_process:neural_process \
        --tasks=sinusoid --tasks.objective=docs.extending.neural_process:gaussian_likelihood \
        --shots=10 --queries=50 --task_batch=16 --workdir=runs/neural_process
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import meta_jax as mj


class Gaussian(NamedTuple):
    """A prediction for each query."""

    mean: jax.Array  # [m, D]
    scale: jax.Array  # [m, D], the standard deviation


def negative_log_likelihood(
    outputs: Gaussian, y: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean of -log N(y; mean, scale^2) over targets, in nats, and the squared error."""
    log_density = jax.scipy.stats.norm.logpdf(y, outputs.mean, outputs.scale).mean(-1)
    loss = -mj.objectives.masked_mean(log_density, mask)
    error = mj.objectives.masked_mean(((outputs.mean - y) ** 2).mean(-1), mask)
    return loss, {"nll": loss, "mse": error}


gaussian_likelihood = mj.Objective(negative_log_likelihood, metric="nll", maximise=False)


@mj.registry.learner("neural_process", network=None)
def neural_process(
    *, objective: mj.Objective = gaussian_likelihood, width: int = 64, layers: int = 3
) -> mj.MetaLearner:
    """Builds a Conditional Neural Process: the support's mean code conditions the prediction.

    Args:
      objective: Objective of the outputs, a `Gaussian`.
      width: Units of each layer and size of the code.
      layers: Layers of the encoder and of the decoder.
    """
    encoder = mj.mlp((width,) * layers)

    def init(key: jax.Array, task: mj.Episode) -> tuple[dict, dict]:
        x, y, _ = task.support
        keys = jax.random.split(key, 3)
        code = jnp.zeros((x.shape[0], width), x.dtype)
        encoder_params, _ = encoder.init(keys[0], jnp.concatenate([x, y], 1))
        decoder_params, _ = encoder.init(keys[1], jnp.concatenate([x, code], 1))
        output = mj.networks.init_linear(keys[2], width, 2 * y.shape[1])
        return {"encoder": encoder_params, "decoder": decoder_params, "output": output}, {}

    def adapt(
        params: dict, state: dict, support: mj.Batch, key: jax.Array, *, train: bool
    ) -> tuple[jax.Array, dict]:
        x, y, mask = support
        codes, _ = encoder.apply(
            params["encoder"], {}, jnp.concatenate([x, y], 1), key=key, train=train
        )
        return jax.vmap(mj.objectives.masked_mean, (1, None))(codes, mask), state

    def predict(
        params: dict,
        adapted: tuple[jax.Array, dict],
        x: jax.Array,
        key: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
    ) -> tuple[Gaussian, dict]:
        code, state = adapted
        codes = jnp.broadcast_to(code, (x.shape[0], code.size))
        hidden, _ = encoder.apply(
            params["decoder"], {}, jnp.concatenate([x, codes], 1), key=key, train=train
        )
        mean, raw = jnp.split(mj.networks.linear(params["output"], hidden), 2, axis=-1)
        return Gaussian(mean, 0.05 + 0.95 * jax.nn.softplus(raw)), state

    return mj.MetaLearner(
        init,
        adapt,
        predict,
        mj.supervised_loss(adapt, predict, objective),
        mj.supervised_evaluate(adapt, predict, objective),
    )
