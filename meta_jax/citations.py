"""The papers of the methods, as BibTeX, from the one file `papers.bib`.

The field `learners` of an entry names the learners that the paper describes.
"""

import re
from importlib import resources
from typing import NamedTuple

from meta_jax.lookup import UsageError


class Paper(NamedTuple):
    """A paper.

    Attributes:
      key: Key of its entry.
      learners: Names of the learners that it describes, as `--learner` takes them.
      bibtex: The entry, without the field `learners`.
    """

    key: str
    learners: tuple[str, ...]
    bibtex: str


def papers() -> list[Paper]:
    """All papers, in the order of the file.

    Examples:
      >>> papers()[0].key, papers()[0].learners
      ('koch2015siamese', ('siamese',))
    """
    text = resources.files("meta_jax").joinpath("papers.bib").read_text(encoding="utf-8")
    return [_paper(entry) for entry in text.strip().split("\n\n")]


def _paper(entry: str) -> Paper:
    header, field, *rest = entry.split("\n")
    key = re.fullmatch(r"@\w+\{(\w+),", header)
    names = re.fullmatch(r"  learners = \{([\w, ]+)\},", field)
    if key is None or names is None:
        raise ValueError(f"papers.bib: the entry '{header}' must begin with a key and its learners")
    return Paper(key[1], tuple(names[1].split(", ")), "\n".join([header, *rest]))


def cite(learner: str) -> str:
    """The BibTeX of the papers that a learner comes from.

    Args:
      learner: Name of a learner, as `--learner` takes it.

    Returns:
      The entries, separated by an empty line.

    Raises:
      UsageError: no paper is recorded for a learner of that name.

    Examples:
      >>> print(cite("maml"))
      @inproceedings{finn2017model,
        title = {Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks},
        author = {Finn, Chelsea and Abbeel, Pieter and Levine, Sergey},
        booktitle = {International Conference on Machine Learning},
        year = {2017}
      }
    """
    found = [paper.bibtex for paper in papers() if learner in paper.learners]
    if not found:
        known = sorted({name for paper in papers() for name in paper.learners})
        raise UsageError(
            f"no paper is recorded for a learner '{learner}': there are papers of "
            f"{', '.join(known)}"
        )
    return "\n\n".join(found)
