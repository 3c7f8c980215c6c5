"""Settings of the documentation site: `sphinx-build -W --keep-going docs docs/_build/html`."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
# The notebooks and the literal includes use docs.extending and experiments, as the binaries do.
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])

import meta_jax  # noqa: E402

project = "meta_jax"
author = "the authors of meta_jax"
copyright = author
release = version = meta_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "api_pages",
    "mathml",
    "tables",
]
exclude_patterns = ["_build", "extending"]
source_suffix = {".md": "myst-nb", ".rst": "restructuredtext"}

# Every reference that a page or a docstring makes must be found. Annotations name types of other
# libraries, whose pages a build without internet cannot look up.
nitpicky = True
nitpick_ignore_regex = [("py:(class|data|attr|exc)", ".*")]
default_role = "symbol"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
napoleon_use_ivar = False
napoleon_use_rtype = False
napoleon_numpy_docstring = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Notebooks run anew in every build, and an error in one of them is an error of the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_output_stderr = "remove"
nb_merge_streams = True

html_math_renderer = "mathml"
html_theme = "sphinx_book_theme"
html_title = "meta_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
