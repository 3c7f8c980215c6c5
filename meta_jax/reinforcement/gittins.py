"""Gittins indices of Bernoulli arms, and Bayes-optimal values of small bandits, in NumPy."""

import functools

import numpy as np

from meta_jax.lookup import UsageError

# The table of their indices has an entry for every state and number of pulls that remain.
MOST_PULLS_WITHOUT_DISCOUNT = 200
_LEVELS = 401  # of a known arm, between which the difference is interpolated
_MOST_FURTHER_PULLS = 1000  # beyond the table, after which an arm is as good as known
_MOST_STATES = 200_000


@functools.cache
def gittins_indices(discount: float, pulls: int) -> np.ndarray:
    """Gittins indices of an arm whose probability is uniform on [0, 1] before it is pulled.

    The index is the probability of a known arm beside which it makes no difference whether the
    arm is pulled once more or given up (Gittins et al. 2011, calibration): with W the value of an
    optimal stopping problem times 1 - discount, and p the posterior mean,

        W(s, f) = max(known, p (1 - discount + discount W(s + 1, f)) + (1 - p) discount W(s, f + 1))

    is solved backwards for a grid of known arms, and the crossing is interpolated: the error is
    below 1e-3, and mostly below 1e-4.

    Args:
      discount: Discount of a pull, in [0, 1).
      pulls: Largest number of pulls that the table is for.

    Returns:
      Indices by successes and failures, [pulls, pulls]; NaN where their sum is `pulls` or more.

    Raises:
      UsageError: a discount outside [0, 1), or no pull.

    Examples:
      >>> round(float(gittins_indices(0.9, 1)[0, 0]), 4)
      0.7029
    """
    if not 0 <= discount < 1:
        raise UsageError(f"discount={discount} of Gittins indices must lie in [0, 1)")
    _check_pulls(pulls)
    angles, known = _levels()
    # What lies further than this hardly counts.
    further = np.ceil(np.log(1e-5) / np.log(discount)) if discount else 1
    last = pulls + int(min(further, _MOST_FURTHER_PULLS))
    indices = np.full((pulls, pulls), np.nan)
    values = np.maximum(known, _means(np.arange(last + 1), last)[:, None])
    for n in range(last - 1, -1, -1):  # number of pulls so far; rows are successes
        successes = np.arange(n + 1)
        p = _means(successes, n)[:, None]
        pulled = p * (1 - discount + discount * values[1:]) + (1 - p) * discount * values[:-1]
        values = np.maximum(known, pulled)
        if n < pulls:
            indices[successes, n - successes] = _crossings(angles, pulled - known)
    return indices


@functools.cache
def finite_horizon_indices(pulls: int) -> np.ndarray:
    """Indices of an arm without discount, of a limited number of pulls.

    As `gittins_indices`, but the known arm is beside it for all pulls that remain, and the sum of
    rewards counts. Unlike there, the arm of the largest index is not always the best one.

    Args:
      pulls: Number of pulls of a trial, at most 200.

    Returns:
      Indices by pulls that remain less 1, successes and failures, [pulls, pulls, pulls]; NaN where
      all three add up to `pulls` or more.

    Raises:
      UsageError: no pull, or too many for a table of this kind.

    Examples:
      >>> finite_horizon_indices(2)[0, 1, 0]  # at the last pull it is the posterior mean, 2/3
      np.float64(0.666...)
    """
    _check_pulls(pulls)
    if pulls > MOST_PULLS_WITHOUT_DISCOUNT:
        raise UsageError(
            f"pulls={pulls} are more than the {MOST_PULLS_WITHOUT_DISCOUNT} of indices without "
            "discount: give a discount"
        )
    angles, known = _levels()
    indices = np.full((pulls, pulls, pulls), np.nan)
    values = np.zeros((pulls + 1, pulls + 1, 1))
    for remaining in range(1, pulls + 1):
        size = pulls - remaining + 1
        successes, failures = np.indices((size, size))
        p = _means(successes, successes + failures)[..., None]
        pulled = p * (1 + values[1:, :-1]) + (1 - p) * values[:-1, 1:]
        values = np.maximum(remaining * known, pulled)
        found = _crossings(angles, pulled - remaining * known)
        # States that need more pulls than there were are computed with the others, and left out.
        reached = successes + failures < size
        indices[remaining - 1, :size, :size] = np.where(reached, found, np.nan)
    return indices


def _levels() -> tuple[np.ndarray, np.ndarray]:
    """Known probabilities, and the angles of equal steps of which they are the squared sines.

    A posterior is as wide in the angle wherever it lies, and narrow at probabilities near 0 and 1.
    """
    angles = np.linspace(0, np.pi / 2, _LEVELS)
    return angles, np.sin(angles) ** 2


def _check_pulls(pulls: int) -> None:
    if pulls < 1:
        raise UsageError(f"pulls={pulls} must be at least 1")


def _means(successes: np.ndarray, pulls: np.ndarray | int) -> np.ndarray:
    """Posterior means of the probability, after a uniform prior."""
    return (successes + 1) / (pulls + 2)


def _crossings(angles: np.ndarray, falling: np.ndarray) -> np.ndarray:
    """Known probabilities where functions of their angles, [..., angles], fall to 0.

    Between two points a function is the cubic of its central differences: they bend so much at the
    crossing that a line would be wrong by more than what indices differ by.
    """
    after = np.clip(np.argmax(falling <= 0, axis=-1), 1, None)
    after = np.where((falling <= 0).any(-1), after, len(angles) - 1)  # rounding may leave it above
    around = np.clip(after[..., None] + np.arange(-2, 2), 0, len(angles) - 1)
    before, left, right, beyond = np.moveaxis(np.take_along_axis(falling, around, -1), -1, 0)
    slopes = (right - before) / 2, (beyond - left) / 2
    low, high = np.zeros(after.shape), np.ones(after.shape)
    for _ in range(30):
        middle = (low + high) / 2
        above = _cubic(middle, left, right, *slopes) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.sin(angles[after - 1] + high * (angles[after] - angles[after - 1])) ** 2


def _cubic(
    t: np.ndarray, left: np.ndarray, right: np.ndarray, rise: np.ndarray, later_rise: np.ndarray
) -> np.ndarray:
    """The cubic with these values and slopes at 0 and 1."""
    u = 1 - t
    return u * u * ((1 + 2 * t) * left + t * rise) + t * t * ((1 + 2 * u) * right - u * later_rise)


# ---- Small bandits, exactly.


def bayes_optimal_return(*, arms: int = 2, pulls: int = 10) -> float:
    """Largest mean return of a trial over bandits with uniform arms: no strategy has a larger one.

    By dynamic programming over the successes and failures of the arms, whose order means nothing.

    Args:
      arms: Number of arms.
      pulls: Number of pulls of a trial; time and memory grow with about its fifth power.

    Returns:
      The expectation over tasks p_i ~ U[0, 1] and rewards.

    Raises:
      UsageError: no arm, or no pull.

    Examples:
      >>> bayes_optimal_return(arms=2, pulls=2)  # stay after a success, else change
      1.0833333333333333
    """
    if min(arms, pulls) < 1:
        raise UsageError(f"a bandit needs at least 1 arm and 1 pull: arms={arms}, pulls={pulls}")
    return _value(((0, 0),) * arms, pulls)


@functools.cache
def _value(counts: tuple[tuple[int, int], ...], remaining: int) -> float:
    """Largest expectation of the pulls that remain; counts are sorted pairs of an arm each."""
    if not remaining:
        return 0.0
    return max(_values_of_arms(counts, remaining))


def _values_of_arms(counts: tuple[tuple[int, int], ...], remaining: int) -> list[float]:
    found: dict[tuple[int, int], float] = {}
    for arm, (successes, failures) in enumerate(counts):
        if (successes, failures) not in found:
            p = (successes + 1) / (successes + failures + 2)
            others = counts[:arm] + counts[arm + 1 :]
            win, lose = (
                _value(tuple(sorted((*others, after))), remaining - 1)
                for after in ((successes + 1, failures), (successes, failures + 1))
            )
            found[successes, failures] = p * (1 + win) + (1 - p) * lose
    return [found[each] for each in counts]


@functools.cache
def bayes_optimal_arms(arms: int, pulls: int) -> np.ndarray:
    """The arm that the Bayes-optimal strategy pulls, by what it has seen.

    Args:
      arms: Number of arms.
      pulls: Number of pulls of a trial.

    Returns:
      Arms, ints [pulls] * (2 * arms): by the successes of each arm, then the failures of each; 0
      where no pull remains.

    Raises:
      UsageError: no arm, no pull, or a table of more than 200,000 entries.
    """
    bayes_optimal_return(arms=arms, pulls=1)  # refuses what is no bandit
    _check_pulls(pulls)
    shape = (pulls,) * (2 * arms)
    if pulls ** (2 * arms) > _MOST_STATES:
        raise UsageError(
            f"{arms} arms and {pulls} pulls have more than {_MOST_STATES} states: take fewer for "
            "the Bayes-optimal strategy"
        )
    table = np.zeros(shape, np.int32)
    for state in np.ndindex(shape):
        if sum(state) < pulls:
            counts = tuple(zip(state[:arms], state[arms:], strict=True))
            order = sorted(range(arms), key=counts.__getitem__)
            values = _values_of_arms(tuple(counts[i] for i in order), pulls - sum(state))
            table[state] = order[int(np.argmax(values))]
    return table
