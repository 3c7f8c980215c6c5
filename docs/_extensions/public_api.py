"""What is public in meta_jax: the names that its namespaces list."""

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any


def public_names(module: ModuleType) -> list[str]:
    """The names of `__all__`; in a module without it, the functions and classes it defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


def namespaces(module: ModuleType, name: str) -> Iterator[tuple[str, ModuleType]]:
    """A module and the modules among its public names, each by its public name, once."""
    yield name, module
    for child in public_names(module):
        value = getattr(module, child)
        if isinstance(value, ModuleType):
            yield from namespaces(value, f"{name}.{child}")


def is_documented(value: Any, name: str) -> bool:
    """Whether a function or a class has a docstring of its own.

    That of a NamedTuple without one is its signature, which documents nothing.
    """
    doc = inspect.getdoc(value) or ""
    return bool(doc.strip()) and not doc.startswith(f"{name}(")


def undocumented_fields(value: Any) -> list[str]:
    """The fields of a NamedTuple that the section *Attributes* of its docstring does not name."""
    if not (inspect.isclass(value) and hasattr(value, "_fields")):
        return []
    _, _, attributes = (inspect.getdoc(value) or "").partition("Attributes:")
    return [field for field in value._fields if f"  {field}:" not in attributes]


def summary(value: Any) -> str:
    """The first sentence of a docstring, in one line."""
    return " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
