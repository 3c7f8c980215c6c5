"""Flags from the components' own signatures, help, and how a user's mistake ends a binary.

A flag such as `--learner=maml` chooses a component, and its settings are then flags too:
`--learner.inner_lr=0.4`. So arguments are read twice, first for what is chosen, then for all else.
"""

import contextlib
import difflib
import errno
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from absl import app, flags, logging

from experiments import several_processes
from meta_jax import registry
from meta_jax.host import OutOfMemoryError, is_out_of_memory, usable_cores
from meta_jax.lookup import UsageError, local_path
from meta_jax.ranges import out_of_range
from meta_jax.registry import Component, Kind, Setting
from meta_jax.training.checkpoints import CheckpointError
from meta_jax.training.loop import TrainingDivergedError


class RunError(RuntimeError):
    """A run that came to a wrong end, such as a result that is not finite; exit status 1."""


# ---- The settings of chosen components as flags.


class Chosen(NamedTuple):
    """A component whose settings are flags, `--KIND.SETTING`."""

    kind: Kind
    component: Component
    reserved: tuple[str, ...] = ()  # parameters that the binary itself gives
    defaults: Mapping[str, Any] = {}  # of this run, where they are not the factory's
    note: str = ""  # when it is used, where a kind has several that may be
    run: Mapping[str, int] = {}  # defaults of the binary's own flags with this component

    def settings(self) -> dict[str, Setting]:
        """Its settings by name, with the defaults that they have here."""
        found = registry.settings(self.component, reserved=self.reserved)
        return {
            name: setting._replace(default=self.defaults.get(name, setting.default))
            for name, setting in found.items()
        }


# From the flags that choose components (None: not given) to the components.
Choose = Callable[[Mapping[str, str | None]], Sequence[Chosen]]


class SettingParser(flags.ArgumentParser):
    """Reads a flag as the type of a setting has it."""

    def __init__(self, setting: Setting) -> None:
        """Keeps the setting."""
        self.setting = setting
        self.syntactic_help = ""

    def parse(self, argument: str) -> Any:
        """The setting's value.

        Raises:
          ValueError: the text has another type, or is none of the choices.
        """
        return read_setting(self.setting, argument)

    def flag_type(self) -> str:
        """Name of the type in absl's own help."""
        return self.setting.type.__name__


def read_setting(setting: Setting, text: Any) -> Any:
    """A setting's value from a flag's text.

    Raises:
      ValueError: the text has another type, is none of the choices, or out of the range.

    Examples:
      >>> read_setting(Setting("widths", tuple, (40, 40), (), False, ""), "64,32")
      (64, 32)
    """
    if not isinstance(text, str):
        return text
    if setting.choices:
        values = {str(choice): choice for choice in setting.choices}
        if text in values:
            return values[text]
        if not (setting.optional and text.lower() == "none"):
            raise ValueError(f"choose one of {', '.join(values)}")
    if setting.optional and text.lower() == "none":
        return None
    if setting.type is bool:
        return flags.BooleanParser().parse(text)
    try:
        if setting.type is tuple:
            value = tuple(int(part) for part in text.split(",") if part.strip())
        else:
            value = setting.type(text)
    except ValueError:
        raise ValueError(f"it takes {_TYPES[setting.type][1]}") from None
    problem = out_of_range(value, setting.range)
    if problem:
        raise ValueError(f"it {problem}")
    return value


# How a type is called in the help, and in an error.
_TYPES = {
    bool: ("true|false", "true or false"),
    int: ("INT", "a whole number"),
    float: ("FLOAT", "a number"),
    str: ("TEXT", "a text"),
    tuple: ("INT,INT,...", "whole numbers, with commas between them"),
}


def define_component_flags(values: flags.FlagValues, chosen: Chosen) -> None:
    """Defines the settings of a component as flags; one that is there already stays.

    Args:
      values: Flags to which they are added.
      chosen: The component.
    """
    for name, setting in chosen.settings().items():
        flag = f"{chosen.kind}.{name}"
        if flag in values:
            continue
        if setting.type is bool and not setting.optional:
            flags.DEFINE_boolean(flag, None, setting.doc, values)
        else:
            parser = SettingParser(setting=setting)
            flags.DEFINE(parser, flag, None, setting.doc, values)


def given_settings(values: flags.FlagValues, chosen: Chosen) -> dict[str, Any]:
    """The settings of a component: those that flags give, and the defaults of this run.

    The factory's own defaults are not among them.

    Raises:
      UsageError: a flag gives one that the component does not have, or one is missing.
    """
    known = chosen.settings()
    given = {name: value for name, value in chosen.defaults.items() if name in known}
    for flag in values:
        kind, dot, name = flag.partition(".")
        if not dot or kind != chosen.kind or not values[flag].present:
            continue
        if name not in known:
            raise UsageError(has_no_setting(chosen, name))
        given[name] = values[flag].value
    for name, setting in known.items():
        if setting.default is inspect.Parameter.empty and name not in given:
            raise UsageError(
                f"{chosen.component.name} needs --{chosen.kind}.{name}: {setting.doc or 'give it'}"
            )
    return given


def resolved_settings(chosen: Chosen, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a component by name, as a record has them: those given, then defaults."""
    found = {name: given.get(name, setting.default) for name, setting in chosen.settings().items()}
    return {name: list(v) if isinstance(v, tuple) else _named(v) for name, v in found.items()}


def _named(default: Any) -> Any:
    """A default as a flag has it: an objective, for one, by its name."""
    plain = isinstance(default, bool | int | float | str | tuple | None)
    return default if plain else getattr(default, "name", type(default).__name__)


def has_no_setting(chosen: Chosen, name: str) -> str:
    """The error for a setting that a component does not have."""
    known = chosen.settings()
    what = f"{chosen.component.name} has no setting '{name}'"
    return f"{what}: it has {', '.join(known)}" if known else f"{what}: it has none"


# ---- Reading the arguments.


def selected(
    values: flags.FlagValues, arguments: Sequence[str], names: Sequence[str]
) -> dict[str, str | None]:
    """What some string flags will be, flagfiles read, before all flags are defined.

    Args:
      values: Defines these flags, with their defaults.
      arguments: Command line as in `sys.argv`, the program's name first.
      names: Names of the flags.

    Raises:
      flags.Error: one without its value, or a flagfile that cannot be opened.
      UsageError: a flagfile is no text.
    """
    found = flags.FlagValues()
    found.set_gnu_getopt(True)
    for name in names:
        flags.DEFINE_string(name, values[name].default, "", found)
    try:
        found(list(arguments), known_only=True)
    except UnicodeDecodeError as error:
        named = [text for text in arguments if "flagfile" in text]
        raise UsageError(f"{' '.join(named)} is no text in UTF-8: save it as such") from error
    return {name: found[name].value for name in names}


def parse(
    values: flags.FlagValues,
    arguments: Sequence[str],
    *,
    selections: Sequence[str] = (),
    choose: Choose | None = None,
) -> tuple[list[str], list[Chosen]]:
    """Reads the arguments, settings of the chosen components among them.

    Args:
      values: The binary's flags; the settings are defined there.
      arguments: Command line as in `sys.argv`, the program's name first.
      selections: Names of the flags that choose components.
      choose: Function from the values of these flags to the components.

    Returns:
      What is no flag, and the components.

    Raises:
      UsageError, flags.Error: a mistake in the arguments.
    """
    names = selected(values, arguments, selections)
    _check_paths(names)
    chosen = list(choose(names)) if choose else []
    for each in chosen:
        define_component_flags(values, each)
        for name, default in each.run.items():
            values.set_default(name, default)
    try:
        left = values(list(arguments))
    except flags.UnrecognizedFlagError as error:
        raise UsageError(unknown_flag(error.flagname, values, chosen)) from error
    given = {name: values[name].value for name in values if values[name].present}
    for name, value in given.items():
        if value == "":
            raise UsageError(f"--{name} is empty: give it a value, or leave it out")
    _check_paths(given)
    for argument in left[1:]:
        local_path(argument)
    return left[1:], chosen


def _check_paths(given: Mapping[str, Any]) -> None:
    """Refuses what is no local path among the values of flags; no flag of ours takes an address.

    Raises:
      UsageError: the address of a remote store, or '~' where there is no home folder.
    """
    for name, value in given.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(text, str):
                continue
            kind, _, argument = text.partition(":")
            try:
                local_path(argument if kind in registry.names("tasks") else text)
            except UsageError as error:
                raise UsageError(f"--{name}: {error}") from error


def unknown_flag(name: str, values: flags.FlagValues, chosen: Sequence[Chosen]) -> str:
    """The error for a flag that does not exist."""
    kind, dot, setting = name.partition(".")
    of_kind = [each for each in chosen if each.kind == kind]
    if dot and of_kind:
        return "; ".join(has_no_setting(each, setting) for each in of_kind)
    ours = [flag for flags_ in _binary_flags(values).values() for flag in flags_]
    proposals = closest(name, [*ours, *(flag for flag in values if "." in flag)])
    if proposals:
        return f"unknown flag --{name}: did you mean {' or '.join(f'--{p}' for p in proposals)}?"
    return f"unknown flag --{name}: --help lists all flags"


def closest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three names that one may have been meant by, the most alike first.

    A setting is compared with and without its component: 'inner_lr' is 'learner.inner_lr'.

    Examples:
      >>> closest("weight_decay", ["seed", "optimizer.weight_decay", "learner.usage_decay"])
      ['optimizer.weight_decay']
    """

    def alike(flag: str) -> float:
        forms = {flag, flag.rpartition(".")[2]}
        return max(difflib.SequenceMatcher(None, name, form).ratio() for form in forms)

    scores = {flag: alike(flag) for flag in known}
    best = max(scores.values(), default=0)
    near = [flag for flag, score in scores.items() if score >= 0.75 and score > best - 0.1]
    return sorted(near, key=lambda flag: -scores[flag])[:3]


# ---- Help.

_HELP = ("--help", "-help", "--helpshort", "-?", "-h")
_WHOLE_HELP = ("--helpfull", "-helpfull")


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the arguments ask for help."""
    return any(argument in (*_HELP, *_WHOLE_HELP) for argument in arguments)


def without_help(arguments: Sequence[str]) -> list[str]:
    """The arguments but those that ask for help."""
    return [argument for argument in arguments if argument not in (*_HELP, *_WHOLE_HELP)]


def help_text(values: flags.FlagValues, chosen: Sequence[Chosen], doc: str, program: str) -> str:
    """All flags of a binary, and the settings of the chosen components.

    Args:
      values: The binary's flags.
      chosen: The components.
      doc: The binary's docstring.
      program: Name of the program.
    """
    parts = [doc.strip(), f"usage: {program} [--flagfile=FILE] [--FLAG=VALUE ...]"]
    for names in _binary_flags(values).values():
        parts.append("\n".join(_flag_help(values[name]) for name in names))
    for each in chosen:
        named = f"--{each.kind}={each.component.name}{each.note and f' ({each.note})'}"
        lines = [f"{named}: {registry.summary(each.component)}"]
        for name, setting in each.settings().items():
            lines.append(_setting_help(f"{each.kind}.{name}", setting))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _binary_flags(values: flags.FlagValues) -> dict[str, list[str]]:
    """The flags of our modules, by module; those of libraries are left out, and settings."""
    found = {}
    for module, defined in values.flags_by_module_dict().items():
        names = [flag.name for flag in defined if "." not in flag.name]
        if names and (module == sys.argv[0] or module.startswith(("experiments", "tests"))):
            found[module] = names
    # The binary's own first.
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("experiments")))


def _flag_help(flag: flags.Flag) -> str:
    kinds = {"int": "INT", "float": "FLOAT", "bool": "true|false"}
    value, doc = kinds.get(flag.flag_type(), "TEXT"), flag.help
    if isinstance(flag.parser, flags.EnumParser):
        value = "|".join(flag.parser.enum_values)
        doc = doc.removeprefix(f"<{value}>: ")
    unsaid = flag.default in (None, [])
    return _entry(f"  --{flag.name}={value}", doc, None if unsaid else flag.default)


def _setting_help(flag: str, setting: Setting) -> str:
    value = "|".join(map(str, setting.choices)) or _TYPES[setting.type][0]
    # A default of None follows from others, or means that there is none: the sentence says which.
    unsaid = setting.default in (None, inspect.Parameter.empty)
    return _entry(f"  --{flag}={value}", setting.doc, None if unsaid else _as_text(setting.default))


def _as_text(default: Any) -> str:
    default = _named(default)
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def _entry(named: str, doc: str, default: Any) -> str:
    text = f"{doc} [default: {default}]" if default is not None else doc
    return named + "\n" + textwrap.fill(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)


# ---- Running a binary.


def run_main(
    main: Callable[[list[str]], int | None],
    *,
    selections: Sequence[str] = (),
    choose: Choose | None = None,
    positional: bool = False,
) -> None:
    """Parses the flags and runs a binary; a user's mistake is one line and exit status 2.

    Args:
      main: The binary's function; it gets the arguments that are not flags.
      selections: Names of the flags that choose components.
      choose: Function from the values of these flags to the components.
      positional: Whether there may be arguments that are not flags.
    """
    _use_all_cores()
    # A second start of the same program need not compile again. Without a home folder it must.
    with contextlib.suppress(UsageError):
        compiled = local_path("~/.cache/meta_jax/compiled")
        jax.config.update("jax_compilation_cache_dir", str(compiled))

    def read(arguments: list[str]) -> list[str]:
        wanted = without_help(arguments) if asks_for_help(arguments) else arguments
        left, chosen = parse_or_end(
            flags.FLAGS, wanted, selections=selections, choose=choose, positional=positional
        )
        if asks_for_help(arguments):
            with contextlib.suppress(BrokenPipeError):  # as `--help | head` has it
                _print_help(arguments, chosen)
                sys.stdout.flush()
                sys.exit(0)
            os._exit(0)  # the interpreter would complain of the pipe once more
        return left

    app.run(lambda left: guarded(main, left), flags_parser=read)


def parse_or_end(
    values: flags.FlagValues,
    arguments: Sequence[str],
    *,
    selections: Sequence[str] = (),
    choose: Choose | None = None,
    positional: bool = False,
) -> tuple[list[str], list[Chosen]]:
    """As `parse`, but a mistake ends the process in one line with exit status 2.

    Args:
      values, arguments, selections, choose: As for `parse`.
      positional: Whether there may be arguments that are not flags.
    """
    try:
        left, chosen = parse(values, arguments, selections=selections, choose=choose)
        if left and not positional:
            raise UsageError(f"unknown argument '{left[0]}': flags start with two dashes")
    except (flags.Error, ValueError, OSError) as error:
        _end(error, 2)
    return left, chosen


_OUTPUT_CLOSED = 141  # the status of a program whose output nobody reads, as in `... | head`
_DIALS = "take smaller chunks, episodes or images (docs/how_to/memory_and_speed.md lists the dials)"
_BAD_PATHS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)


def guarded(main: Callable[[list[str]], int | None], arguments: list[str]) -> int | None:
    """Runs a binary; a user's mistake ends it in one line, as a bad path and divergence do."""
    logging.set_verbosity(logging.WARNING)
    try:
        several_processes.join(flags.FLAGS)
        status = main(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os._exit(_OUTPUT_CLOSED)  # the interpreter's own end would complain of the pipe again
    except (UsageError, CheckpointError) as error:
        _end(error, 2, waits=not isinstance(error, OutOfMemoryError))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _end(f"{error}: free some space and run the same command again", 2)
        if error.errno not in _BAD_PATHS or error.filename is None:
            raise
        _end(f"{error.filename}: {error.strerror}: name another path", 2)
    except (TrainingDivergedError, RunError) as error:
        _end(error, 1)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            _end(f"there is not enough memory: {_DIALS} ({str(error)[:200]})", 2)
        if jax.process_count() == 1:
            raise
        _end(
            f"process {jax.process_index()} has lost the others, or failed itself "
            f"({str(error).splitlines()[0]}): see what the others say, and start all of them again",
            1,
            waits=False,
        )


def _print_help(arguments: Sequence[str], chosen: Sequence[Chosen]) -> None:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
    print(help_text(flags.FLAGS, chosen, main.__doc__ or "", f"python -m {name}"))
    if any(argument in _WHOLE_HELP for argument in arguments):
        libraries = set(flags.FLAGS.flags_by_module_dict()) - set(_binary_flags(flags.FLAGS))
        for module in sorted(libraries - {__name__}):
            print(flags.FLAGS.module_help(module))


# Together a tenth faster on a CPU, by measurement (python -m experiments.benchmark): vectors of all
# 512 bits that the CPU may have, and instructions in the order that needs least memory. The other
# order is for running several at a time, but tasks keep our devices busy, and what one instruction
# leaves in the cache the next one needs.
_CPU_FLAGS = {
    "xla_cpu_prefer_vector_width": "512",
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
}


def _use_all_cores() -> None:
    """Makes every usable core a CPU device, so that a step's tasks are shared among them.

    Small matrix products do not keep the threads of one device busy. What the user has in
    XLA_FLAGS stays as it is.
    """
    given = os.environ.get("XLA_FLAGS", "")
    ours = [f"--{name}={value}" for name, value in _CPU_FLAGS.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *ours]).strip()
    if "host_platform_device_count" not in given:
        jax.config.update("jax_num_cpu_devices", usable_cores())


def _end(error: Exception | str, status: int, *, waits: bool = True) -> NoReturn:
    """Ends the process in one line; of several one may have to leave before the others end."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if not waits and jax.process_count() > 1:
        os._exit(status)  # the interpreter's own end would wait for the others
    sys.exit(status)
