"""An outer optimizer of one's own, with warm-up, weight decay and an average of the weights.

    python -m experiments.train --optimizer=docs.extending.warm_optimizer:warm_lion \
        --optimizer.learning_rate=3e-4 --workdir=runs/lion
"""

import optax

import meta_jax as mj


@mj.registry.optimizer("warm_lion")
def warm_lion(
    steps: int,
    *,
    learning_rate: float = 3e-4,
    warmup_share: float = 0.1,
    weight_decay: float = 1e-3,
    ema: float = 0.99,
) -> optax.GradientTransformation:
    """Builds Lion with a linear warm-up, a cosine decay and an average of the weights.

    Args:
      steps: Outer steps of the run.
      learning_rate: Highest learning rate.
      warmup_share: Share of the steps in which the rate rises.
      weight_decay: Weight decay.
      ema: Decay of the average of the weights, which tests use.
    """
    rate = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, round(warmup_share * steps)), max(2, steps)
    )
    lion = optax.lion(rate, weight_decay=weight_decay)
    return optax.chain(lion, mj.training.average_params(ema))
