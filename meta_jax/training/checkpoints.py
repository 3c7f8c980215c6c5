"""Checkpoints: one folder each, complete or absent, and checked when they are read.

A checkpoint `name` is a folder that holds `tree/`, the arrays as orbax stores them (a flat
dictionary from leaf path to array, so neither optax nor flax types are part of the format; no
folder where there are no arrays), and
`header.json`, the caller's metadata, the settings of the learner whose parameters these are, and
the SHA-256 of every file. `name.saving` is a save under
way, `name.saved` a complete one about to take its place, `name.replaced` what stood there before:

    write name.saving; rename it to name.saved; rename name to name.replaced, name.saved to name

Renames are atomic, so at every moment `name` or `name.saved` is there and complete. Readers never
write; `tidy`, and the next save, remove what a killed one left behind. Of several processes one
writes, and what it finds is the outcome of all.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.core import Config, PyTree
from meta_jax.lookup import UsageError, local_path
from meta_jax.training import processes

T = TypeVar("T")
_UNSET = "not set"
_SAVING, _SAVED, _REPLACED = ".saving", ".saved", ".replaced"
_STEP = re.compile(r"step_(\d{8,})(?:\.saved)?")
_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "disk quota exceeded"}


class CheckpointError(UsageError):
    """A checkpoint cannot be written or read; one line names it and says what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's files are missing, cut short or altered."""


class Contents(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      leaves: Arrays by path, such as 'params/conv/kernel'.
      metadata: What else was written, such as the step.
      config: Settings of the learner; None where none were recorded.
    """

    leaves: dict[str, jax.Array]
    metadata: dict[str, Any]
    config: Config | None


def save(
    directory: Path | str,
    name: str,
    tree: PyTree,
    metadata: dict[str, Any],
    *,
    config: Config | None = None,
) -> Path:
    """Writes the checkpoint `directory/name`, in place of an older one of that name.

    When it returns, the checkpoint is complete on disk. A kill at any point leaves the older or
    the newer checkpoint readable. One run at a time may save under a name; all its processes call
    this, and the first of them writes.

    Args:
      directory: Where checkpoints live; made if it is not there.
      name: The checkpoint's folder name, such as 'best'.
      tree: Arrays of any shape, typed PRNG keys among them; sharded arrays are gathered.
      metadata: What JSON can hold (step, best accuracy, ...).
      config: The learner's, `learner.config`; who restores the checkpoint must have the same.

    Returns:
      The checkpoint's folder.

    Raises:
      CheckpointError: the disk is full; earlier checkpoints are as they were.
      TypeError: a leaf is not an array or has a dtype that JAX would not give back (64 bits,
        without `jax_enable_x64`), or the metadata or the config is not JSON.
    """
    path = local_path(directory) / name
    # Leaves of size zero have nothing to save, and orbax refuses them.
    leaves = {leaf_path: leaf for leaf_path, leaf in _flatten(tree).items() if np.size(leaf)}
    arrays = {leaf_path: _to_host(leaf_path, leaf) for leaf_path, leaf in leaves.items()}
    json.dumps([metadata, config])  # refused before anything is written
    contents = {
        "metadata": metadata,
        "config": config,
        "leaves": _describe(tree),
        "key_impls": {p: jax.random.key_impl(x) for p, x in leaves.items() if _is_key(x)},
    }
    processes.from_writer(functools.partial(_write, path, arrays, contents))
    return path


def _write(path: Path, arrays: dict[str, np.ndarray], contents: dict[str, Any]) -> None:
    """Writes the checkpoint `path`, in place of an older one."""
    saving, size = _beside(path, _SAVING), sum(array.nbytes for array in arrays.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path)
        saving.mkdir()
        _check_space(saving, size)
        if arrays:  # orbax refuses a tree of nothing; a learner may have no parameters
            _write_arrays(saving / "tree", arrays)
        contents = {**contents, "files": _digest_files(saving)}
        header = {**contents, "sha256": _digest_json(contents)}
        (saving / "header.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        _swap_in(path)
    # tensorstore reports a full disk as ValueError; what is not about space is raised as it was.
    except (OSError, ValueError, RuntimeError) as error:
        reason = _full_disk(error) or _lack_of_space(path.parent, size)
        if reason is None:
            raise
        raise CheckpointError(
            f"cannot save checkpoint {path}: {reason}; free some space and run the same command "
            "again"
        ) from error
    finally:
        shutil.rmtree(saving, ignore_errors=True)


def restore(
    path: Path | str, like: PyTree, *, config: Config | None = None
) -> tuple[PyTree, dict[str, Any]]:
    """Reads the checkpoint at `path`, bitwise as it was saved, onto the default device.

    Args:
      path: A checkpoint's folder.
      like: A tree of arrays, or of `jax.ShapeDtypeStruct`s, with the structure to restore; its
        shapes and dtypes must be those that were saved, its values are not looked at.
      config: Settings of the learner that is to use it, `learner.config`; they must be those that
        were saved.

    Returns:
      The tree, and the metadata.

    Raises:
      DamagedCheckpointError: a file is missing, cut short or altered.
      CheckpointError: there is no checkpoint, or it is another learner's, or holds other arrays
        than `like`.
    """
    path = Path(path)
    folder, header = _open(path)
    check_config(path, header.get("config"), config)
    _check_fit(path, header["leaves"], _describe(like))
    leaves = _read_leaves(folder, header)
    restored = [leaves[name] for name in _flatten(like)]
    return jax.tree.unflatten(jax.tree.structure(like), restored), header["metadata"]


def read(path: Path | str) -> Contents:
    """Reads all that a checkpoint holds, where its structure is not known beforehand.

    Args:
      path: A checkpoint's folder.

    Raises:
      DamagedCheckpointError: a file is missing, cut short or altered.
      CheckpointError: there is no checkpoint.
    """
    folder, header = _open(Path(path))
    return Contents(_read_leaves(folder, header), header["metadata"], header.get("config"))


def read_metadata(path: Path | str) -> dict[str, Any]:
    """Reads the metadata of a checkpoint alone.

    Args:
      path: A checkpoint's folder.

    Raises:
      DamagedCheckpointError: a file is missing, cut short or altered.
      CheckpointError: there is no checkpoint.
    """
    return _open(Path(path))[1]["metadata"]


def unflatten(path: Path | str, leaves: Mapping[str, jax.Array], like: PyTree) -> PyTree:
    """Puts leaves of a checkpoint into a tree; shapes are compared, dtypes are the checkpoint's.

    Args:
      path: The checkpoint, for the message.
      leaves: By path, as in `Contents`; no more than the tree has.
      like: The tree of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      CheckpointError: the tree has other leaves, or other shapes.
    """
    wanted = _flatten(like)
    shapes = (
        {name: str(list(leaf.shape)) for name, leaf in tree.items()} for tree in (leaves, wanted)
    )
    _check_fit(Path(path), *shapes)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])


def check_config(path: Path | str, saved: Config | None, given: Config | None) -> None:
    """Refuses a checkpoint whose learner has other settings than the one that is to use it.

    Args:
      path: The checkpoint, for the message.
      saved: Settings that were saved with it.
      given: Settings of the learner at hand.

    Raises:
      CheckpointError: they differ, or one of the two is missing.
    """
    if saved is None and given is None:
        return
    if given is None:
        raise CheckpointError(
            f"checkpoint {path} holds parameters of {_name(saved)}, and no config is given to "
            "compare with: give config=learner.config, or use meta_jax.load"
        )
    if saved is None:
        raise CheckpointError(
            f"checkpoint {path} does not say which learner it is of: train with "
            "fit(learner_config=learner.config), or leave config out if you know that it fits"
        )
    there, here = _settings(saved), _settings(given)
    for name in sorted(there.keys() | here.keys()):
        was, now = there.get(name, _UNSET), here.get(name, _UNSET)
        # As text too: NaN differs from itself.
        if was != now and json.dumps(was) != json.dumps(now):
            raise CheckpointError(
                f"checkpoint {path} was saved with {name} = {json.dumps(was)}, and here {name} = "
                f"{json.dumps(now)}: use the settings it was trained with (to change those of a "
                "test alone, use meta_jax.load)"
            )


def _settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config's settings, as JSON gives them back, by dotted name ('network.normalisation')."""
    if not isinstance(config, Mapping):
        return {prefix: json.loads(json.dumps(config))}
    nested = (
        _settings(value, f"{prefix}.{name}" if prefix else str(name))
        for name, value in config.items()
    )
    return {name: value for settings in nested for name, value in settings.items()}


def _name(config: Config | None) -> str:
    return str((config or {}).get("name", "a learner"))


def save_step(
    directory: Path | str,
    step: int,
    tree: PyTree,
    metadata: dict[str, Any],
    keep: int = 2,
    *,
    every: int = 1,
    config: Config | None = None,
) -> Path:
    """Saves `step_<step>` and removes all but the newest `keep` steps up to this one.

    Later steps stay: they were found damaged when the run was resumed, and will be overwritten.
    A run that was stopped between two checkpoints and went on has the same ones as any other.

    Args:
      directory: Where checkpoints live.
      step: Outer steps done.
      tree: As in `save`.
      metadata: As in `save`.
      keep: How many step checkpoints stay, at least 1.
      every: Steps between checkpoints. Others are those of a stop, and go when the next is saved.
      config: As in `save`.

    Returns:
      The checkpoint's folder.

    Raises:
      ValueError: `keep` is less than 1.
      CheckpointError: as in `save`; nothing was removed then.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    directory = Path(directory)
    path = save(directory, _step_name(step), tree, metadata, config=config)
    processes.from_writer(functools.partial(_remove_stale, directory, step, keep, every))
    return path


def _remove_stale(directory: Path, step: int, keep: int, every: int) -> None:
    """Removes what killed saves left, and all but the newest `keep` steps up to one."""
    tidy(directory)
    earlier = [s for s in _steps(directory) if s < step]
    kept = [*(s for s in earlier if s % every == 0), step][-keep:]
    for stale in [s for s in earlier if s not in kept]:
        path = directory / _step_name(stale)
        # Renamed first: what a kill leaves half removed is no checkpoint, and is tidied.
        os.rename(path, _beside(path, _REPLACED))
        shutil.rmtree(_beside(path, _REPLACED))


def tidy(directory: Path | str) -> None:
    """Ends or undoes the saves in a folder that a kill cut short, and the removals.

    Args:
      directory: Where checkpoints live; it need not be there.
    """
    directory = Path(directory)
    left = [p for s in (_SAVING, _SAVED, _REPLACED) for p in directory.glob(f"*{s}")]
    for path in {path.with_suffix("") for path in left}:
        _tidy(path)


def restore_latest(
    directory: Path | str, like: PyTree, *, config: Config | None = None
) -> tuple[PyTree, dict[str, Any], list[str]] | None:
    """Reads the newest intact step checkpoint.

    Args:
      directory: Where checkpoints live.
      like: As in `restore`.
      config: As in `restore`.

    Returns:
      The tree, its metadata, and one line for each newer checkpoint that was skipped because it
      is damaged; None if the directory holds no step checkpoint.

    Raises:
      CheckpointError: every step checkpoint is damaged, or the newest intact one is another
        learner's, or holds other arrays than `like`.
    """
    found = _newest(Path(directory), lambda path: restore(path, like, config=config))
    if found is None:
        return None
    (tree, metadata), warnings = found
    return tree, metadata, warnings


def read_latest(directory: Path | str) -> tuple[Contents, list[str]] | None:
    """Reads all that the newest intact step checkpoint holds.

    Args:
      directory: Where checkpoints live.

    Returns:
      Its contents, and one line for each newer checkpoint that was skipped because it is damaged;
      None if the directory holds no step checkpoint.

    Raises:
      CheckpointError: every step checkpoint is damaged.
    """
    return _newest(Path(directory), read)


def latest_step(directory: Path | str) -> int | None:
    """The step of the newest intact step checkpoint, at which a run goes on; None without one.

    Args:
      directory: Where checkpoints live.

    Raises:
      CheckpointError: every step checkpoint is damaged.
    """
    found = _newest(Path(directory), lambda path: _open(path)[1])
    return None if found is None else int(found[0]["metadata"]["step"])


def latest_path(directory: Path | str, step: int) -> Path | None:
    """The folder of the newest checkpoint up to a step, not checked; None where there is none.

    Args:
      directory: Where checkpoints live.
      step: Outer steps done; checkpoints of later ones are those of steps that are done again.
    """
    steps = [saved for saved in _steps(Path(directory)) if saved <= step]
    return Path(directory) / _step_name(steps[-1]) if steps else None


def _newest(directory: Path, read_one: Callable[[Path], T]) -> tuple[T, list[str]] | None:
    """What is read of the newest step that is not damaged, and why newer ones were skipped."""
    steps = _steps(directory)
    warnings = []
    for step in reversed(steps):
        try:
            return read_one(directory / _step_name(step)), warnings
        except DamagedCheckpointError as error:
            warnings.append(f"skipped: {error}")
    if not steps:
        return None
    raise CheckpointError(
        f"every checkpoint in {directory} is damaged ({', '.join(map(_step_name, steps))}); "
        "restore the folder from a copy, or train anew in another workdir"
    )


def _step_name(step: int) -> str:
    return f"step_{step:08d}"


def _steps(directory: Path) -> list[int]:
    """The steps saved in `directory`, ascending."""
    if not directory.is_dir():
        return []
    matches = (_STEP.fullmatch(entry.name) for entry in directory.iterdir())
    return sorted({int(match[1]) for match in matches if match})


def _beside(path: Path, suffix: str) -> Path:
    # Not `with_suffix`: a name may have dots of its own.
    return path.with_name(path.name + suffix)


def _swap_in(path: Path) -> None:
    """Lets the complete `path.saving` take the place of `path`."""
    saved, replaced = _beside(path, _SAVED), _beside(path, _REPLACED)
    os.rename(_beside(path, _SAVING), saved)
    if path.exists():
        os.rename(path, replaced)
    os.rename(saved, path)
    shutil.rmtree(replaced, ignore_errors=True)


def _tidy(path: Path) -> None:
    """Ends or undoes a save of `path` that a kill cut short."""
    if not path.exists() and _beside(path, _SAVED).exists():
        os.rename(_beside(path, _SAVED), path)
    for suffix in (_SAVING, _SAVED, _REPLACED):
        shutil.rmtree(_beside(path, suffix), ignore_errors=True)


def _flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves by path, such as 'params/conv/kernel', in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the tree have the same path; rename one")
    return flat


def _describe(tree: PyTree) -> dict[str, str]:
    """Dtype and shape by leaf path, such as 'float32[3, 64]'."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _flatten(tree).items()}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_host(path: str, leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"leaf {path} is a {type(leaf).__name__}, not an array")
    # numpy arrays also give the smallest checkpoints: no sharding files, fewer data files.
    data = jax.random.key_data(jnp.asarray(leaf)) if _is_key(leaf) else leaf
    host = processes.gathered(data)
    if jax.dtypes.canonicalize_dtype(host.dtype) != host.dtype:
        raise TypeError(f"leaf {path} is {host.dtype}, which JAX would restore in 32 bits")
    return host


def _from_host(host: np.ndarray, key_impl: str | None) -> jax.Array:
    array = jnp.asarray(host)
    return array if key_impl is None else jax.random.wrap_key_data(array, impl=key_impl)


def _digest_files(folder: Path) -> dict[str, str]:
    """SHA-256 by path within `folder`, as 'tree/manifest.ocdbt', of the files below it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _digest_json(contents: dict[str, Any]) -> str:
    # Read back first: JSON turns integer keys into strings, which sort differently.
    contents = json.loads(json.dumps(contents))
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _check_space(folder: Path, size: int) -> None:
    # tensorstore's threads may print tracebacks when they meet a full disk, so it is met first.
    # Compression might make the arrays fit, but a disk that full fails at the next save.
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _write_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp  # takes a second to import

    with _quiet_log(), _checkpointer() as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(arrays))
    # It only repeats, with this machine's path in it, what our own rename says.
    with contextlib.suppress(FileNotFoundError):
        (folder / "commit_success.txt").unlink()


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Keeps orbax's threads from logging tracebacks of the error that it also raises."""
    logger = logging.getLogger("absl")
    logger.addFilter(_reject)
    try:
        yield
    finally:
        logger.removeFilter(_reject)


def _reject(record: logging.LogRecord) -> bool:
    del record
    return False


def _read_leaves(folder: Path, header: dict[str, Any]) -> dict[str, jax.Array]:
    """All leaves by path; those of size zero, which were not saved, among them."""
    arrays = _read_arrays(folder / "tree") if header["files"] else {}
    leaves = {}
    for path, description in header["leaves"].items():
        if path in arrays:
            leaves[path] = _from_host(arrays[path], header["key_impls"].get(path))
        else:
            leaves[path] = jnp.zeros(shape_of(description), dtype_of(description))
    return leaves


def shape_of(description: str) -> tuple[int, ...]:
    """The shape in a leaf's description.

    Examples:
      >>> shape_of("float32[3, 64]")
      (3, 64)
    """
    return tuple(map(int, re.findall(r"\d+", description.partition("[")[2])))


def dtype_of(description: str) -> Any:
    """The dtype in a leaf's description; random keys are of JAX's default kind.

    Examples:
      >>> dtype_of("float32[3, 64]")
      dtype('float32')
    """
    name = description.partition("[")[0]
    return jax.eval_shape(jax.random.key, 0).dtype if name.startswith("key<") else jnp.dtype(name)


def _read_arrays(folder: Path) -> dict[str, np.ndarray]:
    with _checkpointer() as checkpointer:
        return checkpointer.restore(folder.absolute())


def _checkpointer() -> Any:
    """Orbax's, which waits for no process but this one."""
    import orbax.checkpoint as ocp

    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process{this}"
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _open(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder that holds the checkpoint `path`, and its header; all files are checked."""
    folder = path if path.exists() else _beside(path, _SAVED)
    if not folder.exists():
        raise CheckpointError(f"no checkpoint at {path}; train first, or name another one")
    return folder, _read_header(path, folder)


def _read_header(path: Path, folder: Path) -> dict[str, Any]:
    """Reads the header and checks all files, so that orbax only meets what it wrote itself."""
    try:
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        digest = header.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(path, "header.json is missing or unreadable") from error
    if _digest_json(header) != digest:
        raise _damaged(path, "header.json was altered")
    found = _digest_files(folder)
    for name, sha256 in header["files"].items():
        if found.get(name) != sha256:
            raise _damaged(path, f"{name} was altered" if name in found else f"{name} is missing")
    return header


def _check_fit(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(name, "nothing"), wanted.get(name, "nothing")
        if there != here:
            raise CheckpointError(
                f"checkpoint {path} holds {there} at {name}, where {here} is expected; use the "
                "flags it was trained with"
            )


def _damaged(path: Path, how: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"checkpoint {path} is damaged: {how}; remove it, or restore it from a copy"
    )


def _lack_of_space(folder: Path, size: int) -> str | None:
    """Why the disk takes no more, by what is left of it: a thread may fail for what another met."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < size:
            return _FULL[errno.ENOSPC]
    return None


def _full_disk(error: BaseException | None) -> str | None:
    """Why the disk takes no more, if that is what `error` or a cause of it says."""
    while error is not None:
        for code, reason in _FULL.items():
            if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                return reason
        error = error.__cause__ or error.__context__
    return None
