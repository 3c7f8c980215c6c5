"""The rows that `reproduce` can make: which training, which test, and what the paper reports."""

from typing import NamedTuple

_SNELL = "Snell et al. 2017, table 1"
_FINN = "Finn et al. 2017, table 1"
_NICHOL = "Nichol et al. 2018, table 2"
_SANTORO = "Santoro et al. 2016, table 1"
_SUNG = "Sung et al. 2018, table 1, with the queries' own batch statistics"


class Row(NamedTuple):
    """One line of the results table. Training flags are in experiments/flagfiles/MODEL.flags."""

    model: str  # one trained model may serve several rows
    ways: int
    shots: int
    paper_accuracy: float | None  # per cent; None where none is published
    paper_source: str
    batch_norm: str | None = None  # of the test, if not the training's
    instance: int | None = None  # of the sequence protocol: which instance's accuracy it is

    def overrides(self) -> dict:
        """What the test changes of the training's flags."""
        return {
            "ways": self.ways,
            "shots": self.shots,
            "batch_norm": self.batch_norm,
            "protocol": "sequence" if self.instance else "few_shot",
        }

    def accuracy(self, found: dict) -> dict:
        """The row's accuracy and ci95, in per cent, from the contents of a result.json."""
        if self.instance:
            names = {"accuracy": "instances", "ci95": "instances_ci95"}
            return {key: found[name][self.instance - 1] for key, name in names.items()}
        return {key: found[key] for key in ("accuracy", "ci95")}


ROWS: dict[str, Row] = {
    "prototypical/omniglot_5w1s": Row("prototypical_omniglot", 5, 1, 98.8, _SNELL),
    "prototypical/omniglot_5w5s": Row("prototypical_omniglot", 5, 5, 99.7, _SNELL),
    "prototypical/omniglot_20w1s": Row("prototypical_omniglot", 20, 1, 96.0, _SNELL),
    "siamese/omniglot_5w1s": Row(
        "siamese_omniglot", 5, 1, 96.7, "Vinyals et al. 2016, table 1, as a baseline"
    ),
    "matching/omniglot_5w1s": Row("matching_omniglot", 5, 1, 98.1, "Vinyals et al. 2016, table 1"),
    "matching_fce/omniglot_5w1s": Row(
        "matching_fce_omniglot", 5, 1, None, "Vinyals et al. 2016 give none: no gain on Omniglot"
    ),
    "relation/omniglot_5w1s": Row("relation_omniglot", 5, 1, 99.6, _SUNG),
    "relation_transductive/omniglot_5w1s": Row("relation_omniglot", 5, 1, 99.6, _SUNG, "batch"),
    "ridge/omniglot_5w1s": Row(
        "ridge_omniglot", 5, 1, None, "Bertinetto et al. 2019 train a larger network"
    ),
    "kernel/omniglot_5w1s": Row("kernel_omniglot", 5, 1, None, "no paper has this on Omniglot"),
    "maml/omniglot_5w1s": Row("maml_omniglot", 5, 1, 98.7, _FINN),
    "fomaml/omniglot_5w1s": Row("fomaml_omniglot", 5, 1, 98.3, _FINN),
    "anil/omniglot_5w1s": Row(
        "anil_omniglot", 5, 1, None, "Raghu et al. 2020 have 20-way tasks only: 96.2 %"
    ),
    "boil/omniglot_5w1s": Row("boil_omniglot", 5, 1, None, "Oh et al. 2021 have no Omniglot"),
    "meta_sgd/omniglot_5w1s": Row("meta_sgd_omniglot", 5, 1, 99.53, "Li et al. 2017, table 2"),
    "maml_plus_plus/omniglot_5w1s": Row(
        "maml_plus_plus_omniglot", 5, 1, 99.47, "Antoniou et al. 2019, table 1"
    ),
    "imaml/omniglot_5w1s": Row(
        "imaml_omniglot", 5, 1, 99.16, "Rajeswaran et al. 2019, table 2, gradient descent"
    ),
    "protomaml/omniglot_5w1s": Row(
        "protomaml_omniglot", 5, 1, None, "Triantafillou et al. 2020 test on mixed datasets"
    ),
    "reptile/omniglot_5w1s": Row("reptile_omniglot", 5, 1, 95.39, _NICHOL, "support"),
    "reptile_transductive/omniglot_5w1s": Row("reptile_omniglot", 5, 1, 97.68, _NICHOL, "batch"),
    "lstm_meta_learner/omniglot_5w1s": Row(
        "lstm_meta_learner_omniglot", 5, 1, None, "Ravi and Larochelle 2017 have no Omniglot"
    ),
    "meta_networks/omniglot_5w1s": Row(
        "meta_networks_omniglot", 5, 1, 98.95, "Munkhdalai and Yu 2017, table 1"
    ),
    "mann/omniglot_5w1s": Row(
        "mann_omniglot", 5, 1, None, "Santoro et al. 2016 have sequences only"
    ),
    "mann/omniglot_sequence_2nd": Row("mann_omniglot", 5, 1, 82.8, _SANTORO, instance=2),
    "mann/omniglot_sequence_5th": Row("mann_omniglot", 5, 1, 94.9, _SANTORO, instance=5),
    "mann/omniglot_sequence_10th": Row("mann_omniglot", 5, 1, 98.1, _SANTORO, instance=10),
    "lstm/omniglot_sequence_2nd": Row("lstm_omniglot", 5, 1, 49.5, _SANTORO, instance=2),
    "lstm/omniglot_sequence_5th": Row("lstm_omniglot", 5, 1, 63.6, _SANTORO, instance=5),
    "lstm/omniglot_sequence_10th": Row("lstm_omniglot", 5, 1, 62.5, _SANTORO, instance=10),
}
