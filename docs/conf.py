"""Settings of the documentation: `sphinx-build -W docs build/docs`. A page needs nothing from the network."""

import os
from importlib import resources

import ziamath.fonts
from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import wsseg_layers

project = "wsseg_layers"
author = "The wsseg_layers authors"
project_copyright = "The wsseg_layers authors, Apache-2.0"
release = wsseg_layers.__version__
version = ".".join(release.split(".")[:2])

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nitpicky = False
default_role = "code"  # a single backtick in a docstring is code, as in Markdown
autodoc_typehints = "none"  # docstrings say what a type means
autodoc_member_order = "bysource"
napoleon_custom_sections = ["Source"]
napoleon_use_rtype = False
copybutton_prompt_text = ">>> "

html_theme = "furo"
# Read the Docs builds every tag and says where; search engines are sent to the stable version.
html_title = f"wsseg_layers {os.environ.get('READTHEDOCS_VERSION_NAME', release)}"
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
html_math_renderer = "mathml"
html_static_path = ["_static", str(resources.files(ziamath.fonts) / "STIXTwoMath-Regular.ttf")]
html_css_files = ["math.css"]

_to_mathml = LatexToMathML(annotation=True, fancy_error=False)


def _visit_math(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers draw without a script."""
    try:
        display = isinstance(node, nodes.math_block)
        translator.body.append(_to_mathml.convert_with_local_state(node.astext(), displaystyle=display))
    except LatexError as error:
        logging.getLogger(__name__).warning("formula %s: %s", node.astext(), error, location=node)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Add the renderer of formulas."""
    app.add_html_math_renderer("mathml", inline_renderers=(_visit_math, None), block_renderers=(_visit_math, None))
