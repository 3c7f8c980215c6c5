"""The documentation site: `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import meta_jax as mj  # noqa: E402

project = "meta_jax"
author = "The meta_jax authors"
copyright = "2026, The meta_jax authors"  # noqa: A001
release = mj.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "extending", "**.ipynb_checkpoints"]

# ---- Pages are executed at every build; an error in a cell fails it.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "docs" / "_build" / "cells")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
mathjax3_config = {"tex": {"macros": {}}}

# ---- The reference is written from the docstrings.
autodoc_member_order = "alphabetical"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
default_role = "code"  # docstrings mark code as Markdown does, by single backticks

html_theme = "sphinx_book_theme"
html_title = "meta_jax"
html_static_path = []
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}


def namespaces() -> dict[str, ModuleType]:
    """The public namespaces: that of the top, and those which it lists."""
    modules = {name: getattr(mj, name) for name in mj.__all__}
    listed = {name: each for name, each in modules.items() if isinstance(each, ModuleType)}
    return {"meta_jax": mj, **listed}


def public_names(module: ModuleType) -> list[str]:
    """What a namespace lists, or else the public functions and classes that it defines."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not isinstance(getattr(module, name), ModuleType)]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def write_reference(app: object) -> None:
    """Writes a page of the reference for each namespace.

    Raises:
      ValueError: a public function or class without a docstring.
    """
    folder = Path(__file__).parent / "api"
    folder.mkdir(exist_ok=True)
    for name, module in namespaces().items():
        title = name if name == "meta_jax" else f"meta_jax.{name}"
        summary = (module.__doc__ or "").strip().splitlines()[0]
        lines = [title, "=" * len(title), "", summary, "", f".. currentmodule:: {module.__name__}"]
        for public in sorted(public_names(module), key=str.lower):
            value = getattr(module, public)
            if callable(value) and not value.__doc__:
                raise ValueError(f"{title}.{public} has no docstring: write one")
            lines += ["", *_directive(module.__name__, public, value)]
        (folder / f"{name}.rst").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _directive(module: str, name: str, value: object) -> list[str]:
    if isinstance(value, type):
        return [f".. autoclass:: {module}.{name}", "   :members:"]
    if callable(value):
        return [f".. autofunction:: {module}.{name}"]
    return [f".. autodata:: {module}.{name}", "   :no-value:"]


def escape_stars(app, what, name, obj, options, lines) -> None:  # noqa: ANN001, PLR0913
    """In docstrings a star is a product, as in Markdown's code; to Sphinx it begins emphasis."""
    code = False
    for i, line in enumerate(lines):
        code = line.lstrip().startswith((">>>", "...")) or (code and bool(line.strip()))
        if not code:
            parts = re.split(r"(`[^`]*`)", line)
            lines[i] = "".join(
                part if part.startswith("`") else re.sub(r"([*|])", r"\\\1", part) for part in parts
            )


def setup(app) -> None:  # noqa: ANN001
    """Registers both."""
    app.connect("builder-inited", write_reference)
    app.connect("autodoc-process-docstring", escape_stars, priority=100)
