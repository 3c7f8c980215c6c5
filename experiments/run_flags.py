"""The flags of a training run, and the components that they choose."""

from collections.abc import Mapping

from absl import flags

from experiments.command_line import Chosen, parse
from meta_jax import registry
from meta_jax.data.source import find_source
from meta_jax.lookup import UsageError
from meta_jax.precision import PRECISIONS
from meta_jax.ranges import LARGEST_INT
from meta_jax.registry import Component, Kind

# Parameters of a learner that its tasks give: no flags.
GIVEN_TO_LEARNERS = ("objective", "train_classes")
_NETWORK_OF_VECTORS = "mlp"
_CHOSEN: dict[Kind, str] = {
    "learner": "Meta-learning method",
    "network": "Network that embeds inputs, by default the learner's own",
    "tasks": "Source of the tasks, by default glyphs or the learner's usual one",
    "optimizer": "Outer optimizer, by default the learner's usual one",
}
SELECTIONS = (*_CHOSEN,)


def define_run_flags(values: flags.FlagValues) -> None:
    """Defines the flags that make a run what it is, but for the settings of its components."""

    def string(name: str, default: str | None, text: str) -> None:
        flags.DEFINE_string(name, default, text, values)

    def integer(name: str, default: int | None, text: str, lower_bound: int | None = 1) -> None:
        flags.DEFINE_integer(name, default, text, lower_bound, LARGEST_INT, flag_values=values)

    for kind, what in _CHOSEN.items():
        default = "prototypical" if kind == "learner" else None
        string(kind, default, f"{what}: {choices(kind)}.")
    integer("ways", 5, "Classes of a test episode.")
    integer("shots", 1, "Support examples of each class in a test episode.")
    integer("queries", 15, "Query examples of each class in a test episode.")
    integer("train_ways", None, "Classes of a training episode, by default as in tests.")
    integer("train_shots", None, "Support examples in training, by default as in tests.")
    integer("train_queries", None, "Query examples in training, by default as in tests.")
    string("train_split", "train", "Split to train on, such as train or trainval.")
    integer("task_batch", 1, "Tasks of an outer step.")
    integer(
        "task_chunk",
        None,
        "Tasks vmapped at a time, on all devices together: at least one on each. By default one on "
        "each device of a CPU, all elsewhere.",
    )
    flags.DEFINE_boolean(
        "remat",
        False,
        "Whether the derivative computes embeddings again instead of keeping them, which changes "
        "memory and time alone: less memory in inner loops.",
        values,
    )
    integer("steps", 1000, "Outer steps; raise it to continue a finished workdir.")
    integer("log_every", 50, "Outer steps between lines of metrics, at most in one compiled call.")
    integer("eval_every", 500, "Outer steps between validations; 0 for none.", 0)
    integer("checkpoint_every", 500, "Outer steps between checkpoints.")
    integer("val_episodes", 200, "Episodes of a validation.")
    integer("seed", 0, "Seed of the initial parameters and of the training tasks.", 0)
    flags.DEFINE_enum(
        "precision",
        "float32",
        PRECISIONS,
        "Precision in which the network computes; parameters, statistics and losses are float32.",
        flag_values=values,
    )
    string(
        "init_from",
        None,
        "Folder of weights, or another workdir, whose parameters training starts from; of another "
        "learner's the network's alone, if the networks are the same. Random ones by default.",
    )


def define_test_flags(values: flags.FlagValues) -> None:
    """Defines the flags of a test that change nothing of a run."""
    flags.DEFINE_integer(
        "eval_episodes", 1000, "Episodes of the test.", 2, LARGEST_INT, flag_values=values
    )
    flags.DEFINE_integer(
        "eval_chunk",
        None,
        "Episodes that a device evaluates at a time, which changes memory and time alone; by "
        "default 1 on a CPU, elsewhere up to 32, as many as fit 12 GB.",
        1,
        LARGEST_INT,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "query_chunk",
        None,
        "Queries of an episode that are answered at a time in tests, which changes memory and time "
        "alone; by default all. For many ways.",
        1,
        LARGEST_INT,
        flag_values=values,
    )
    flags.DEFINE_string(
        "data_dir", None, "Folder where Omniglot or the prepared TFDS sets lie.", values
    )


def choices(kind: Kind) -> str:
    """The names of all components of a kind, and how somebody's own is named."""
    known = (_with_argument(kind, name) for name in registry.names(kind))
    return f"{', '.join(known)}, or package.module:function"


def _with_argument(kind: Kind, name: str) -> str:
    """A task source's name with what must follow it, as 'folder:PATH'."""
    parameters = registry.parameters(registry.find(kind, name).factory).values()
    argument = [p.name.upper() for p in parameters if p.kind is p.POSITIONAL_ONLY]
    return ":".join([name, *argument]) if kind == "tasks" else name


def choose(selected: Mapping[str, str | None]) -> list[Chosen]:
    """The components that a run's flags choose.

    Raises:
      UsageError: an unknown name, or a network for a learner that has its own.
    """
    learner = registry.find("learner", selected["learner"] or "")
    tasks = tasks_chosen(selected["tasks"] or learner.tasks)
    return [
        Chosen("learner", learner, reserved=GIVEN_TO_LEARNERS, run=learner.run),
        *network_candidates(learner, selected["network"]),
        tasks._replace(run=tasks.component.run),
        optimizer_chosen(selected["optimizer"] or learner.optimizer or "adam"),
    ]


def tasks_name(values: flags.FlagValues) -> str:
    """The name of a run's tasks: what a flag says, or the learner's usual ones."""
    return values.tasks or registry.find("learner", values.learner).tasks


def tasks_chosen(name: str) -> Chosen:
    """A task source by its name; `--data_dir` is a flag of its own."""
    return Chosen("tasks", find_source(name)[0], reserved=("data_dir",))


def optimizer_chosen(name: str) -> Chosen:
    """An outer optimizer by its name; the number of steps is the run's."""
    return Chosen("optimizer", registry.find("optimizer", name), reserved=("steps",))


def network_candidates(learner: Component, name: str | None) -> list[Chosen]:
    """The networks that a learner may be used with: one that is named, or else which fits.

    Raises:
      UsageError: an unknown name, or one given to a learner that has networks of its own.
    """
    if learner.network is None:
        if name is not None:
            raise UsageError(f"{learner.name} has networks of its own: leave --network out")
        return []
    if name is not None or learner.network == _NETWORK_OF_VECTORS:
        return [_network_chosen(learner, name or learner.network)]
    return [
        _network_chosen(learner, learner.network, "by default"),
        _network_chosen(learner, _NETWORK_OF_VECTORS, f"where {learner.network} does not fit"),
    ]


def _network_chosen(learner: Component, name: str, note: str = "") -> Chosen:
    component = registry.find("network", name)
    usual = {"normalisation": learner.normalisation}
    follows = learner.normalisation and "normalisation" in registry.parameters(component.factory)
    return Chosen("network", component, defaults=usual if follows else {}, note=note)


def run_values(arguments: list[str]) -> flags.FlagValues:
    """A run's flags from arguments, flagfiles among them, without the global flags.

    Raises:
      UsageError: they are no flags of a run.
    """
    values = flags.FlagValues()
    define_run_flags(values)
    flags.DEFINE_string("data_dir", None, "Folder of the data.", values)
    try:
        parse(values, ["", *arguments], selections=SELECTIONS, choose=choose)
    except flags.Error as error:
        raise UsageError(str(error)) from error
    return values
