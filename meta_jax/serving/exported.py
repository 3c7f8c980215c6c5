"""Classifiers as programs of their own (StableHLO), which need JAX and flatbuffers alone."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.backend import use_backend
from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.serving.inputs import InputForm, prepare
from meta_jax.version import __version__

_PROGRAM, _RECORD, _README = "classifier.bin", "classifier.json", "README.md"
_PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Exported:
    """A classifier that was exported: inputs in, probabilities of its classes out."""

    program: Callable[[PyTree], Array]  # prepared inputs [n, ...] -> probabilities [n, classes]
    classes: tuple[Any, ...]
    form: InputForm

    def __call__(self, inputs: Any) -> np.ndarray:
        """Probabilities [n, classes] of inputs, as `prepare` takes them.

        Raises:
          UsageError: inputs that the classifier cannot take.
        """
        return np.asarray(self.program(prepare(inputs, self.form)[0]))


def load_exported(folder: str | os.PathLike) -> Exported:
    """Loads what `Classifier.export` wrote; the learner's code and weights are not needed.

    Args:
      folder: The folder.

    Raises:
      UsageError: the folder holds no export, or a damaged one.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        written, form = (folder / _PROGRAM).read_bytes(), record["input"]
        if hashlib.sha256(written).hexdigest() != record["sha256"]:
            raise ValueError(f"{_PROGRAM} is not what was written")
        program = jax.export.deserialize(bytearray(written))
        example = jax.tree.unflatten(
            program.in_tree, [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in program.in_avals]
        )[0][0]
    except OSError as error:
        raise UsageError(f"no export in {folder}: {error.strerror}: {error.filename}") from error
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"the export in {folder} is damaged: export the classifier again"
        ) from error
    return Exported(
        jax.jit(program.call),
        tuple(record["classes"]),
        InputForm(example, form["preprocessing"], form["value_range"], form["polarity"]),
    )


def write_exported(
    folder: Path,
    answer: Callable[[PyTree, PyTree, PyTree], Array],
    constants: tuple[PyTree, PyTree],
    classes: tuple[Any, ...],
    form: InputForm,
) -> Path:
    """Writes a classifier as a program.

    Args:
      folder: Where to write.
      answer: Function (params, adapted, x [n, ...]) -> probabilities [n, classes].
      constants: Its params and adapted, which become part of the program.
      classes: The classes.
      form: How an input must look.

    Returns:
      The folder.

    Raises:
      UsageError: the folder holds something else.
    """
    if (
        folder.exists()
        and not (folder / _RECORD).exists()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise UsageError(f"{folder} is not empty and holds no export: name another folder")
    (n,) = jax.export.symbolic_shape("n")
    x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape), leaf.dtype), form.example)
    program = jax.jit(functools.partial(_by_platform, answer, constants))
    written = jax.export.export(program, platforms=_PLATFORMS)(x).serialize()
    record = {
        "classes": list(classes),
        "input": form._asdict() | {"example": None},
        "version": __version__,
        "jax": jax.__version__,
        "sha256": hashlib.sha256(written).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _PROGRAM).write_bytes(written)
    (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / _README).write_text(_readme(form), encoding="utf-8")
    return folder


def _by_platform(
    answer: Callable[[PyTree, PyTree, PyTree], Array], constants: tuple[PyTree, PyTree], x: PyTree
) -> Array:
    """The answer in the form of convolutions meant for each platform."""

    def form(backend: str) -> Callable[..., Array]:
        def written(*arguments: PyTree) -> Array:
            with use_backend(backend):
                return answer(*arguments)

        return written

    constants = jax.tree.map(jnp.asarray, constants)
    return jax.lax.platform_dependent(*constants, x, cpu=form("cpu"), default=form("gpu"))


def _readme(form: InputForm) -> str:
    record = form.preprocessing or {}
    leaves = jax.tree.leaves(form.example)
    looks = ", ".join(f"{leaf.dtype} {['n', *leaf.shape]}" for leaf in leaves).replace("'", "")
    if record.get("kind") == "image":
        looks += " in [0, 1]"
        if record.get("polarity") in ("ink_light", "ink_dark"):
            looks += f", {record['polarity'].removeprefix('ink_')} ink"
    return f"""# A classifier, exported

Inputs: {looks}. Outputs: float [n, classes], probabilities of the classes of `{_RECORD}`.
It runs where JAX and flatbuffers are installed, on a CPU, a CUDA GPU or a TPU:

    import jax, json
    program = jax.export.deserialize(bytearray(open("{_PROGRAM}", "rb").read()))
    probabilities = jax.jit(program.call)(x)
    names = json.load(open("{_RECORD}"))["classes"]

With meta_jax, `mj.load_exported(folder)(inputs)` takes images of any size and range.
"""
