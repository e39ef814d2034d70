"""The docs site: `python -m sphinx -W --keep-going -b html docs OUT`. It needs no network."""

import re
import sys
import tomllib
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

HERE = Path(__file__).parent
# What is documented is this clone, whatever is installed.
sys.path[:0] = [str(HERE), str(HERE.parent)]

project = "bigbatch"
copyright = "the bigbatch authors, Apache-2.0"
release = tomllib.loads((HERE.parent / "pyproject.toml").read_text("utf-8"))["project"]["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "generated",
]
exclude_patterns = ["README.md", "tutorials/results"]
# They are shown as they were committed.
nb_execution_mode, nb_merge_streams, nb_render_markdown_format = "off", True, "myst"
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
# Docstrings say `name` of code.
default_role = "code"
napoleon_use_ivar = True
napoleon_use_rtype = napoleon_attr_annotations = False
# What the engine calls of an optimizer.
autodoc_default_options = {"exclude-members": "links, check"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"bigbatch {release}"
html_copy_source = html_show_search_summary = False
html_static_path, html_css_files = ["static"], ["style.css"]
html_math_renderer = "mathml"
pygments_style, pygments_dark_style = "friendly", "github-dark"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e4f", "color-brand-content": "#0b6e4f"},
    "dark_css_variables": {"color-brand-primary": "#5fd3a4", "color-brand-content": "#5fd3a4"},
}


def _math(as_block):
    """Formulas are MathML, which browsers draw by themselves."""

    def visit(writer, node):
        writer.body.append(tex2mathml(node.astext(), as_block=as_block))
        raise nodes.SkipNode

    return visit, None


def _named(app, page, source):
    """Links that leave docs/ name a file of the repository, which the site does not hold.

    It has the notebooks, under docs/tutorials, and no image from elsewhere, such as their badge.
    """
    out = re.escape("../" * (page.count("/") + 1))
    text = re.sub(r"\[!\[([^\]]*)\]\(http[^)]*\)\]", r"[\1]", source[0])
    notebook = rf"\[([^\]]*)\]\({out}notebooks/(\w+)\.ipynb\)"
    text = re.sub(notebook, r"{doc}`\1 </tutorials/\2>`", text)
    source[0] = re.sub(rf"(?<!!)\[([^\]]*)\]\({out}([^)#]+)[^)]*\)", r"\1 (`\2`)", text)


def setup(app):
    app.connect("source-read", _named)
    app.add_html_math_renderer("mathml", _math(as_block=False), _math(as_block=True))
