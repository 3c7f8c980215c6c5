"""The API reference: a page for each namespace, written from what the namespace lists.

A public name without documentation, a field without its own, a reference to what is not there, and
an example in a docstring that fails are warnings, which end a build with -W.
"""

import ast
import doctest
import importlib
import inspect
import io
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import public_api
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

import meta_jax

_LOG = logging.getLogger(__name__)
_OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
_CODE = re.compile("(`[^`]+`)")
_MARKUP = re.compile(r"([|*]|_(?=\W|$))")
# Titles of the parts of a page, by the module that its names are defined in.
_PARTS = {
    "meta_jax.metric_based": "Metric-based learners",
    "meta_jax.model_based": "Model-based learners",
    "meta_jax.optimization_based": "Optimization-based learners",
    "meta_jax.networks": "Networks",
    "meta_jax.core": "Core types",
    "meta_jax.training": "Training and loading",
}


def write_pages(app: Sphinx) -> None:
    """Writes the pages of all namespaces into `api/`, those alone whose text has changed."""
    folder = Path(app.srcdir) / "api"
    pages = {
        f"{name}.rst": page(name, module)
        for name, module in public_api.namespaces(meta_jax, "meta_jax")
    }
    for old in folder.glob("meta_jax*.rst"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def page(name: str, module: ModuleType) -> str:
    """The reStructuredText of one namespace's page."""
    values = {child: getattr(module, child) for child in public_api.public_names(module)}
    elsewhere = {n: v for n, v in values.items() if _at_the_top(name, n, v)}
    own = {n: v for n, v in values.items() if n not in elsewhere and not isinstance(v, ModuleType)}
    parts: dict[str, list[str]] = {}
    for child, value in own.items():
        parts.setdefault(_part(name, child, value), []).append(child)
    lines = [name, "=" * len(name), "", f".. automodule:: {name}", "   :no-members:", ""]
    if elsewhere:
        there = ", ".join(f":py:obj:`meta_jax.{child}`" for child in elsewhere)
        lines += [f"Listed here as well: {there}.", ""]
    titles = [title for title in _PARTS.values() if title in parts]
    for title in [*titles, *(other for other in parts if other not in titles)]:
        if len(parts) > 1:
            lines += [title, "-" * len(title), ""]
        lines += _table(name, {child: own[child] for child in parts[title]})
        for child in parts[title]:
            lines += _entry(name, module, child, own[child])
    return "\n".join(lines) + "\n"


def _at_the_top(namespace: str, name: str, value: Any) -> bool:
    """Whether a name of a namespace is one of `meta_jax` itself too, where it is documented."""
    return namespace != "meta_jax" and getattr(meta_jax, name, None) is value


def _part(namespace: str, name: str, value: Any) -> str:
    if namespace != "meta_jax":
        return ""
    defined = getattr(value, "__module__", "")
    for module, title in _PARTS.items():
        if defined.startswith(module):
            return title
    return "Other names"


def _table(namespace: str, values: dict[str, Any]) -> list[str]:
    lines = [".. list-table::", "   :widths: 30 70", ""]
    for name, value in values.items():
        text = public_api.summary(value) if callable(value) else ""
        lines += [f"   * - :py:obj:`~{namespace}.{name}`", f"     - {as_rst(text)}"]
    return [*lines, ""]


def _entry(namespace: str, module: ModuleType, name: str, value: Any) -> list[str]:
    full = f"{namespace}.{name}"
    if inspect.isclass(value):
        special = ["   :special-members: __call__"] if "__call__" in vars(value) else []
        return [f".. autoclass:: {full}", "   :members:", *special, ""]
    if callable(value):
        return [f".. autofunction:: {full}", ""]
    comment = [as_rst(line) for line in _comment(module, name)]
    if not comment:
        _LOG.warning("%s has no comment that begins with '#:' where it is defined", full)
    return [
        f".. py:data:: {name}",
        f"   :module: {namespace}",
        "",
        *(f"   {line}" for line in comment),
        "",
    ]


def _comment(module: ModuleType, name: str) -> list[str]:
    """The lines '#: ...' above the assignment of a name, in the module that assigns it."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return _comment(importlib.import_module(node.module or ""), name)
    lines = inspect.getsource(module).splitlines()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        if name in [target.id for target in targets if isinstance(target, ast.Name)]:
            above = lines[: node.lineno - 1]
            first = len(above)
            while first and above[first - 1].startswith("#:"):
                first -= 1
            return [line.removeprefix("#:").strip() for line in above[first:]]
    return []


def as_rst(line: str) -> str:
    """A line of a docstring, whose only markup is backticks, as reStructuredText."""
    bullet = re.match(r"\s*\* ", line)
    start = bullet.end() if bullet else 0
    parts = _CODE.split(line[start:])
    for i in range(0, len(parts), 2):
        joined = i > 0 and parts[i][:1].isalnum()  # as in `Array`s
        parts[i] = ("\\ " if joined else "") + _MARKUP.sub(r"\\\1", parts[i])
    return line[:start] + "".join(parts)


def escape(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Makes reStructuredText of a docstring, but for its examples."""
    example = False
    for i, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example:
            lines[i] = as_rst(line)


def check(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Warns of a public name, or a field, that is not documented, and of failing examples."""
    if what not in ("function", "class", "exception", "method"):
        return
    if not public_api.is_documented(value, name.rsplit(".", 1)[-1]):
        _LOG.warning("%s has no docstring", name)
    for field in public_api.undocumented_fields(value):
        _LOG.warning("%s: the docstring's Attributes lack '%s'", name, field)
    failures = run_examples(value, name)
    if failures:
        _LOG.warning("the examples of %s fail:\n%s", name, failures)


def run_examples(value: Any, name: str) -> str:
    """What an example in a docstring gives other than it says; empty where all is well."""
    defined = inspect.unwrap(value)
    names = dict(vars(importlib.import_module(defined.__module__)))
    text = inspect.getdoc(defined) or ""
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    said = io.StringIO()
    doctest.DocTestRunner(optionflags=_OPTIONS).run(test, out=said.write)
    return said.getvalue()


def skip_fields(
    app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any
) -> bool | None:
    """Leaves the fields of NamedTuples to the section *Attributes* of their docstrings."""
    return True if type(value).__name__ == "_tuplegetter" else None


class Symbol(SphinxRole):
    """`name` in a docstring: a link where it is a public name, else code.

    A dotted name of meta_jax that cannot be imported is a broken reference.
    """

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Builds the node."""
        target = _public(self.text)
        if target is None:
            if self.text.startswith("meta_jax.") and not _importable(self.text):
                _LOG.warning("there is no '%s'", self.text, location=self.get_location())
            return [nodes.literal(self.rawtext, self.text)], []
        link = addnodes.pending_xref(
            "", refdomain="py", reftype="obj", reftarget=target, refexplicit=True, refwarn=True
        )
        link += nodes.literal(self.rawtext, self.text)
        link["refdoc"] = self.env.docname
        return [link], []


def _public(text: str) -> str | None:
    """The documented name of what a text such as 'fit' or 'meta_jax.heads.attention' names."""
    short = text.removeprefix("mj.").removeprefix("meta_jax.")
    for name, module in public_api.namespaces(meta_jax, "meta_jax"):
        prefix = "" if name == "meta_jax" else name.removeprefix("meta_jax.") + "."
        child = short.removeprefix(prefix)
        if (short.startswith(prefix) or short == child) and child in public_api.public_names(
            module
        ):
            value = getattr(module, child)
            if not isinstance(value, ModuleType):
                top = _at_the_top(name, child, value)
                return f"meta_jax.{child}" if top else f"{name}.{child}"
    return None


def _importable(text: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, _, attribute = text.rpartition(".")
    try:
        importlib.import_module(text)
    except ImportError:
        try:
            return hasattr(importlib.import_module(module), attribute)
        except ImportError:
            return False
    return True


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers what this file has."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    app.add_role("symbol", Symbol())
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", check)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon's
    app.connect("autodoc-skip-member", skip_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
