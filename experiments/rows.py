"""The rows that `reproduce` can make: which training, which test, and what the paper reports."""

from typing import NamedTuple

_SNELL = "Snell et al. 2017, table 1"
_FINN = "Finn et al. 2017, table 1"


class Row(NamedTuple):
    """One line of the results table. Training flags are in experiments/flagfiles/MODEL.flags."""

    model: str  # one trained model may serve several rows
    ways: int
    shots: int
    paper_accuracy: float  # per cent
    paper_source: str


ROWS: dict[str, Row] = {
    "prototypical/omniglot_5w1s": Row("prototypical_omniglot", 5, 1, 98.8, _SNELL),
    "prototypical/omniglot_5w5s": Row("prototypical_omniglot", 5, 5, 99.7, _SNELL),
    "prototypical/omniglot_20w1s": Row("prototypical_omniglot", 20, 1, 96.0, _SNELL),
    "maml/omniglot_5w1s": Row("maml_omniglot", 5, 1, 98.7, _FINN),
}
