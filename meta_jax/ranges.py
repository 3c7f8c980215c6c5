"""Ranges of numbers, declared in the annotation of a setting and checked wherever one is given.

    def maml(network, *, inner_lr: Positive | None = None, steps: NotNegativeInt = 1): ...

A flag refuses what is out of range while it is read, a registered factory when it is called.
"""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Annotated, Any, NamedTuple

from meta_jax.lookup import UsageError

LARGEST_INT = 2**31 - 1  # sizes, steps and seeds are counted in 32 bits


class Range(NamedTuple):
    """The numbers that a setting may have; all of them are finite.

    Attributes:
      least: The least number.
      largest: The largest number; None for any.
      excludes_least: Whether the least is excluded.
      excludes_largest: Whether the largest is excluded.
    """

    least: float = -math.inf
    largest: float | None = None
    excludes_least: bool = False
    excludes_largest: bool = False

    def has(self, number: float) -> bool:
        """Whether a number is in the range."""
        if not math.isfinite(number):
            return False
        above = number > self.least if self.excludes_least else number >= self.least
        if self.largest is None:
            return above
        below = number < self.largest if self.excludes_largest else number <= self.largest
        return above and below

    def __str__(self) -> str:
        """The range as it follows 'must be'."""
        bounds = []
        if self.least > -math.inf:
            words = "greater than" if self.excludes_least else "at least"
            bounds.append(f"{words} {self.least:g}")
        if self.largest is not None:
            bounds.append(f"{'below' if self.excludes_largest else 'at most'} {self.largest:g}")
        return " and ".join(bounds) or "a finite number"


Positive = Annotated[float, Range(0, excludes_least=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, excludes_largest=True)]
PositiveInt = Annotated[int, Range(1)]
NotNegativeInt = Annotated[int, Range(0)]
PositiveInts = Annotated[tuple[int, ...], Range(1)]  # each of them

_LARGEST_FLOAT = 3.4028235e38  # of float32


def out_of_range(value: Any, allowed: Range | None) -> str:
    """What a number must be where it is not allowed, in words; '' where it is, or is no number.

    Args:
      value: A number, or a tuple of them, each of which is checked.
      allowed: The range; None for any number that is finite.

    Returns:
      The words that follow the number's name. Whole numbers must have 32 bits too.

    Examples:
      >>> out_of_range(0.0, Range(0, excludes_least=True))
      'must be greater than 0'
      >>> out_of_range((64, 0), Range(1))
      'must be at least 1 each'
      >>> out_of_range(float("inf"), None)
      'must be a finite number'
    """
    if isinstance(value, tuple | list):
        found = [problem for number in value if (problem := out_of_range(number, allowed))]
        return f"{found[0]} each" if found else ""
    if isinstance(value, bool) or not isinstance(value, Real):
        return ""
    if isinstance(value, Integral) and abs(int(value)) > LARGEST_INT:
        return f"must be at most {LARGEST_INT}"
    number, allowed = float(value), allowed or Range()
    if not allowed.has(number):
        return f"must be {allowed}"
    return "" if abs(number) <= _LARGEST_FLOAT else f"must be at most {_LARGEST_FLOAT:g}"


def check_ranges(component: str, given: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Refuses settings of a component that are out of their ranges.

    Args:
      component: Name of the component.
      given: Its settings by name; what is no number is not looked at.
      ranges: By name, the ranges that are declared.

    Raises:
      UsageError: a setting is out of range.

    Examples:
      >>> check_ranges("maml", {"steps": -1}, {"steps": Range(0)})
      Traceback (most recent call last):
      meta_jax.lookup.UsageError: maml: steps=-1 must be at least 0
    """
    for name, value in given.items():
        problem = out_of_range(value, ranges.get(name))
        if problem:
            raise UsageError(f"{component}: {name}={value} {problem}")
