"""Body Only update in Inner Loop (Oh, Yoo, Kim and Yun 2021, arXiv:2008.08882)."""

from meta_jax.core import MetaLearner, Network
from meta_jax.optimization_based.learner import body_only
from meta_jax.optimization_based.maml import maml


def boil(network: Network, *, inner_lr: float = 0.5, **settings: object) -> MetaLearner:
    """`maml` whose inner loop adapts the body alone; the same settings but `mask`.

    The body, its batch norm included, follows its gradient with rate 0.5, the head with rate 0
    (section 4): the complement of `anil`.
    """
    return maml(network, inner_lr=inner_lr, mask=body_only, **settings)
