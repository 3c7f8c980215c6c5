"""The rows that `reproduce` can make: which training, which test, and what the paper reports."""

from typing import Any, NamedTuple

from experiments import protocols

_DUAN = "Duan et al. 2016, table 1"
_DUAN_MDP = "Duan et al. 2016, table 2"
_MISHRA = "Mishra et al. 2018, table 3"
_NGUYEN = "Nguyen and Grover 2022 test on other length scales, see the rows 'published'"
_NGUYEN_CODE = "Nguyen and Grover 2022, table 1, on the tasks of the authors' code"
_GARG = "Garg et al. 2022 have 20 dimensions, in a figure"
_LI = "Li et al. 2017, table 1"
_FIFTY = "Fifty et al. 2024 have no Omniglot"
_GARNELO = "Garnelo et al. 2018, table 2"
_SNAIL_PORT = "github.com/eambutu/snail-pytorch: a public implementation"
_MISHRA_OMNIGLOT = "Mishra et al. 2018, table 1"
_MAML = "Finn et al. 2017, section 5.3"
_GRID = "Zintgraf et al. 2020 have curves only; the mean optimum of an episode is 11.07"
_BRONSKILL = "Bronskill et al. 2020, tables of Omniglot: the authors' training, normalisation named"
_SNELL = "Snell et al. 2017, table 1"
_FINN = "Finn et al. 2017, table 1"
_NICHOL = "Nichol et al. 2018, table 2"
_SANTORO = "Santoro et al. 2016, table 1"
_LAKE = "on the official trials alone, which are easier"
_OFFICIAL = "Lake et al. 2019, table 1, error 13.7 %"
_KOCH = "Koch et al. 2015, table 2, on the official trials alone, 92.0 %"
_RAMALHO = "Ramalho and Garnelo 2019 report another method, 73.5 and 88.0 %"
_SUNG = "Sung et al. 2018, table 1, with the queries' own batch statistics"


class Row(NamedTuple):
    """One line of the results table. Training flags are in experiments/flagfiles/MODEL.flags."""

    model: str  # one trained model may serve several rows
    ways: int | None  # None for trials and functions; tasks are then as in training
    shots: int | None
    paper: float | None  # accuracies in per cent; None where none is published
    paper_source: str
    metric: str = "accuracy"  # which one it is; instance_2 is that at the 2nd instance of a class
    normalisation: str | None = None  # of the test, if not the training's
    protocol: str | None = None  # of the test, if not the training's
    rerun: float | None = None  # what somebody else's careful rerun of the method found
    rerun_by: str = _BRONSKILL
    kernel: str | None = None  # of the test's Gaussian processes, if not the training's
    episodes: str | None = None  # which the test has, by the name of a protocol in `protocols`
    official: bool = False  # whether it is made on the official trials of 'lake'

    @property
    def number(self) -> int:
        """Number of the test's episodes."""
        found = protocols.find(self.episodes)
        return found.run["eval_episodes"] if found else 1000

    @property
    def rerun_source(self) -> str | None:
        """Where the rerun is published."""
        return None if self.rerun is None else self.rerun_by

    def size(self) -> dict[str, int]:
        """How large the test's episodes are, where they are not as in training."""
        found = protocols.find(self.episodes)
        queries = found.run["queries"] if found else None
        size = {"ways": self.ways, "shots": self.shots, "queries": queries}
        return {name: number for name, number in size.items() if number is not None}

    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings that the test changes, by component."""
        changed = {
            "learner": {"protocol": self.protocol},
            "network": {"normalisation": self.normalisation},
            "tasks": {"kernel": self.kernel},
        }
        return {
            kind: {name: value}
            for kind, settings in changed.items()
            for name, value in settings.items()
            if value is not None
        }

    def score(self, found: dict) -> dict[str, float]:
        """The row's value and ci95 from the contents of a result.json; accuracies in per cent."""
        value, ci95 = found["metrics"][self.metric]
        return {"value": round(value, 6), "ci95": round(ci95, 6)}


def _trials(model: str, paper: float | None, source: str, metric: str = "return") -> Row:
    """A row of reinforcement learning, on the tasks that were trained on."""
    return Row(model, None, None, paper, source, metric)


def _processes(model: str) -> Row:
    """A row of functions from Gaussian processes, on the tasks that were trained on."""
    return Row(model, None, None, None, _NGUYEN, "log_likelihood")


def _published_processes(model: str, kernel: str, paper: float) -> Row:
    """A row of the published comparison, whose models are trained on the kernel rbf alone."""
    other = None if kernel == "rbf" else kernel
    return Row(
        f"{model}_gp_published", None, None, paper, _NGUYEN_CODE, "log_likelihood", kernel=other
    )


def _linear(shots: int) -> Row:
    """A row of linear regression in context, from this many points."""
    return Row("tnpd_linear_regression", None, shots, None, _GARG, "mse")


def _sinusoids(model: str, shots: int, paper: float | None = None) -> Row:
    """A row of sinusoids of several frequencies, by a model trained with 5 shots."""
    return Row(f"{model}_sinusoid_frequency", None, shots, paper, _LI, "mse")


def _lake(model: str, source: str = _LAKE) -> Row:
    """A row of random episodes of the protocol 'lake'."""
    return Row(model, 20, 1, None, source, episodes="lake")


def _official(model: str, paper: float | None, source: str) -> Row:
    """A row of the official trials of the protocol 'lake'."""
    return Row(model, 20, 1, paper, source, episodes="lake", official=True)


def _all_characters(model: str, shots: int) -> Row:
    """A row of all test characters at once."""
    return Row(model, 423, shots, None, _RAMALHO, episodes="all_characters")


_SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways and shots
_BASELINES = {
    "baseline": "Chen et al. 2019 have no few-shot test on Omniglot alone",
    "baseline_plus_plus": "Chen et al. 2019 have no few-shot test on Omniglot alone",
    "simple_shot": "Wang et al. 2019 have no Omniglot",
    "nearest_neighbour": "on pixels, nothing is learned",
    "untrained": "nothing is learned",
}

ROWS: dict[str, Row] = {
    "prototypical/omniglot_5w1s": Row("prototypical_omniglot", 5, 1, 98.8, _SNELL, rerun=98.5),
    "prototypical/omniglot_5w5s": Row("prototypical_omniglot", 5, 5, 99.7, _SNELL, rerun=99.6),
    "prototypical/omniglot_20w1s": Row("prototypical_omniglot", 20, 1, 96.0, _SNELL, rerun=94.5),
    "prototypical/omniglot_20w5s": Row("prototypical_omniglot", 20, 5, 98.9, _SNELL, rerun=98.6),
    "siamese/omniglot_5w1s": Row(
        "siamese_omniglot", 5, 1, 96.7, "Vinyals et al. 2016, table 1, as a baseline"
    ),
    "matching/omniglot_5w1s": Row("matching_omniglot", 5, 1, 98.1, "Vinyals et al. 2016, table 1"),
    "matching_fce/omniglot_5w1s": Row(
        "matching_fce_omniglot", 5, 1, None, "Vinyals et al. 2016 give none: no gain on Omniglot"
    ),
    "relation/omniglot_5w1s": Row("relation_omniglot", 5, 1, 99.6, _SUNG),
    "relation_transductive/omniglot_5w1s": Row(
        "relation_omniglot", 5, 1, 99.6, _SUNG, normalisation="batch"
    ),
    "r2d2/omniglot_5w1s": Row(
        "r2d2_omniglot", 5, 1, None, "Bertinetto et al. 2019 train a larger network"
    ),
    "kernel/omniglot_5w1s": Row("kernel_omniglot", 5, 1, None, "no paper has this on Omniglot"),
    "siamese/omniglot_5w5s": Row(
        "siamese_omniglot", 5, 5, 98.4, "Vinyals et al. 2016, table 1, as a baseline"
    ),
    "siamese/omniglot_20w1s": Row(
        "siamese_omniglot", 20, 1, 88.0, "Vinyals et al. 2016, table 1, as a baseline"
    ),
    "siamese/omniglot_20w5s": Row(
        "siamese_omniglot", 20, 5, 96.5, "Vinyals et al. 2016, table 1, as a baseline"
    ),
    "matching/omniglot_5w5s": Row("matching_omniglot", 5, 5, 98.9, "Vinyals et al. 2016, table 1"),
    "matching/omniglot_20w1s": Row(
        "matching_omniglot", 20, 1, 93.8, "Vinyals et al. 2016, table 1"
    ),
    "matching/omniglot_20w5s": Row(
        "matching_omniglot", 20, 5, 98.5, "Vinyals et al. 2016, table 1"
    ),
    "relation/omniglot_5w5s": Row("relation_omniglot_5shot", 5, 5, 99.8, _SUNG),
    "relation/omniglot_20w1s": Row("relation_omniglot", 20, 1, 97.6, _SUNG),
    "relation/omniglot_20w5s": Row("relation_omniglot_5shot", 20, 5, 99.1, _SUNG),
    "r2d2/omniglot_5w5s": Row(
        "r2d2_omniglot", 5, 5, None, "Bertinetto et al. 2019 train a larger network"
    ),
    "r2d2/omniglot_20w1s": Row(
        "r2d2_omniglot", 20, 1, None, "Bertinetto et al. 2019 train a larger network"
    ),
    "r2d2/omniglot_20w5s": Row(
        "r2d2_omniglot", 20, 5, None, "Bertinetto et al. 2019 train a larger network"
    ),
    "kernel/omniglot_5w5s": Row("kernel_omniglot", 5, 5, None, "no paper has this on Omniglot"),
    "kernel/omniglot_20w1s": Row("kernel_omniglot", 20, 1, None, "no paper has this on Omniglot"),
    "kernel/omniglot_20w5s": Row("kernel_omniglot", 20, 5, None, "no paper has this on Omniglot"),
    "maml/omniglot_5w1s": Row("maml_omniglot", 5, 1, 98.7, _FINN),
    "fomaml/omniglot_5w1s": Row("fomaml_omniglot", 5, 1, 98.3, _FINN, rerun=98.4),
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
    "reptile/omniglot_5w1s": Row(
        "reptile_omniglot", 5, 1, 95.39, _NICHOL, normalisation="one_at_a_time"
    ),
    "reptile_transductive/omniglot_5w1s": Row(
        "reptile_omniglot", 5, 1, 97.68, _NICHOL, normalisation="batch"
    ),
    "lstm_meta_learner/omniglot_5w1s": Row(
        "lstm_meta_learner_omniglot", 5, 1, None, "Ravi and Larochelle 2017 have no Omniglot"
    ),
    "meta_networks/omniglot_5w1s": Row(
        "meta_networks_omniglot", 5, 1, 98.95, "Munkhdalai and Yu 2017, table 1"
    ),
    "mann/omniglot_5w1s": Row(
        "mann_omniglot",
        5,
        1,
        None,
        "Santoro et al. 2016 have sequences only",
        protocol="few_shot",
    ),
    "mann/omniglot_sequence_2nd": Row("mann_omniglot", 5, 1, 82.8, _SANTORO, "instance_2"),
    "mann/omniglot_sequence_5th": Row("mann_omniglot", 5, 1, 94.9, _SANTORO, "instance_5"),
    "mann/omniglot_sequence_10th": Row("mann_omniglot", 5, 1, 98.1, _SANTORO, "instance_10"),
    "lstm/omniglot_sequence_2nd": Row("lstm_omniglot", 5, 1, 49.5, _SANTORO, "instance_2"),
    "lstm/omniglot_sequence_5th": Row("lstm_omniglot", 5, 1, 63.6, _SANTORO, "instance_5"),
    "lstm/omniglot_sequence_10th": Row("lstm_omniglot", 5, 1, 62.5, _SANTORO, "instance_10"),
    **{
        f"{name}/omniglot_{ways}w{shots}s": Row(f"{name}_omniglot", ways, shots, None, source)
        for name, source in _BASELINES.items()
        for ways, shots in _SETTINGS
    },
    "prototypical/omniglot_lake": _lake("prototypical_omniglot_lake"),
    "prototypical/omniglot_lake_official": _official("prototypical_omniglot_lake", 86.3, _OFFICIAL),
    "prototypical/omniglot_lake_small1": _lake("prototypical_omniglot_lake_small1"),
    "prototypical/omniglot_lake_small1_official": _official(
        "prototypical_omniglot_lake_small1", 69.9, "Lake et al. 2019, table 1, minimal background"
    ),
    "prototypical/omniglot_lake_small2": _lake("prototypical_omniglot_lake_small2"),
    "prototypical/omniglot_lake_small2_official": _official(
        "prototypical_omniglot_lake_small2", 69.9, "Lake et al. 2019, table 1, minimal background"
    ),
    "siamese_koch/omniglot_lake": _lake("siamese_koch_omniglot", _KOCH),
    "siamese_koch/omniglot_lake_official": _official("siamese_koch_omniglot", 92.0, _KOCH),
    "prototypical/omniglot_423w1s": _all_characters("prototypical_omniglot", 1),
    "prototypical/omniglot_423w5s": _all_characters("prototypical_omniglot", 5),
    "rl2/bandit_10_5": _trials("rl2_bandit_10_5", 6.7, _DUAN),
    "rl2/bandit_10_10": _trials("rl2_bandit_10_10", 6.7, _DUAN),
    "rl2/bandit_100_5": _trials("rl2_bandit_100_5", 78.7, _DUAN),
    "rl2/bandit_100_10": _trials("rl2_bandit_100_10", 83.5, _DUAN),
    "snail/bandit_10_5": _trials("snail_bandit_10_5", 6.6, _MISHRA),
    "snail/bandit_100_5": _trials("snail_bandit_100_5", 79.1, _MISHRA),
    "tnpd/gp_rbf": _processes("tnpd_gp_rbf"),
    "tnpd/gp_matern52": _processes("tnpd_gp_matern52"),
    "canp/gp_rbf": _processes("canp_gp_rbf"),
    "canp/gp_matern52": _processes("canp_gp_matern52"),
    "cnp/gp_rbf": _processes("cnp_gp_rbf"),
    "cnp/gp_matern52": _processes("cnp_gp_matern52"),
    "anp/gp_rbf": _processes("anp_gp_rbf"),
    "anp/gp_matern52": _processes("anp_gp_matern52"),
    "np/gp_rbf": _processes("np_gp_rbf"),
    "np/gp_matern52": _processes("np_gp_matern52"),
    "tnpd/gp_rbf_published": _published_processes("tnpd", "rbf", 1.39),
    "tnpd/gp_matern52_published": _published_processes("tnpd", "matern52", 0.95),
    "canp/gp_rbf_published": _published_processes("canp", "rbf", 0.79),
    "canp/gp_matern52_published": _published_processes("canp", "matern52", 0.62),
    "cnp/gp_rbf_published": _published_processes("cnp", "rbf", 0.26),
    "cnp/gp_matern52_published": _published_processes("cnp", "matern52", 0.04),
    "tnpd/linear_regression_8_points": _linear(8),
    "tnpd/linear_regression_12_points": _linear(12),
    "tnpd/linear_regression_16_points": _linear(16),
    "maml/sinusoid_frequency_5_shots": _sinusoids("maml", 5, 1.13),
    "maml/sinusoid_frequency_10_shots": _sinusoids("maml", 10, 0.85),
    "maml/sinusoid_frequency_20_shots": _sinusoids("maml", 20, 0.71),
    "meta_sgd/sinusoid_frequency_5_shots": _sinusoids("meta_sgd", 5, 0.90),
    "meta_sgd/sinusoid_frequency_10_shots": _sinusoids("meta_sgd", 10, 0.63),
    "meta_sgd/sinusoid_frequency_20_shots": _sinusoids("meta_sgd", 20, 0.50),
    "anil/sinusoid_frequency_5_shots": _sinusoids("anil", 5),
    "anil/sinusoid_frequency_10_shots": _sinusoids("anil", 10),
    "anil/sinusoid_frequency_20_shots": _sinusoids("anil", 20),
    "tnpd/sinusoid_frequency_5_shots": _sinusoids("tnpd", 5),
    "tnpd/sinusoid_frequency_10_shots": _sinusoids("tnpd", 10),
    "tnpd/sinusoid_frequency_20_shots": _sinusoids("tnpd", 20),
    "caml/omniglot_5w1s": Row("caml_omniglot", 5, 1, None, _FIFTY),
    "caml/omniglot_20w1s": Row("caml_omniglot", 20, 1, None, _FIFTY),
    "cnp/omniglot_5w1s": Row("cnp_omniglot", 5, 1, 95.3, _GARNELO),
    "snail/omniglot_5w1s": Row(
        "snail_omniglot", 5, 1, 99.07, _MISHRA_OMNIGLOT, rerun=98.31, rerun_by=_SNAIL_PORT
    ),
    "snail/omniglot_20w1s": Row(
        "snail_omniglot_20way", 20, 1, 97.64, _MISHRA_OMNIGLOT, rerun=93.75, rerun_by=_SNAIL_PORT
    ),
    "rl2/mdp_10": _trials("rl2_mdp_10", 156.2, _DUAN_MDP),
    "rl2/mdp_25": _trials("rl2_mdp_25", 445.7, _DUAN_MDP),
    "rl2/grid_navigation_episode_2": _trials("rl2_grid_navigation", None, _GRID, "episode_2"),
    "rl2/grid_navigation_episode_3": _trials("rl2_grid_navigation", None, _GRID, "episode_3"),
    "rl2/grid_navigation_episode_4": _trials("rl2_grid_navigation", None, _GRID, "episode_4"),
    "maml_rl/navigation_0_steps": _trials("maml_rl_navigation", -40.41, _MAML, "return_after_0"),
    "maml_rl/navigation_1_step": _trials("maml_rl_navigation", -11.68, _MAML, "return_after_1"),
    "maml_rl/navigation_2_steps": _trials("maml_rl_navigation", -3.33, _MAML, "return_after_2"),
    "maml_rl/navigation_3_steps": _trials("maml_rl_navigation", -3.23, _MAML, "return_after_3"),
}
