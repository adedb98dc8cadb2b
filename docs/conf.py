"""Settings of the documentation: `sphinx-build -W docs build/docs`."""

import wsseg_layers

project = "wsseg_layers"
author = "The wsseg_layers authors"
project_copyright = "The wsseg_layers authors, Apache-2.0"
release = wsseg_layers.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
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
html_title = "wsseg_layers"
