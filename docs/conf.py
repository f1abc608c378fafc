"""How the documentation is built: `sphinx-build -W -b html docs docs/_build/html`."""

import importlib.metadata
import os
import re
from pathlib import Path

from docutils import nodes

os.environ["JAX_PLATFORMS"] = "cpu"

project = "jaxce"
author = "The jaxce authors"
project_copyright = author
version = release = importlib.metadata.version("jaxce")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True
# `words` of a docstring are code, and links where they name something of jaxce.
nitpick_ignore_regex = [("py:obj", r"(?!jaxce\.).*")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Types stand in the text of the docstrings; jaxtyping's would fill the signatures, and overloads repeat them.
autodoc_typehints = "none"
python_maximum_signature_line_length = 60
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False

copybutton_prompt_text = r">>> |\.\.\. "  # what is copied can be pasted into a script
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"jaxce {release}"
html_copy_source = False
html_domain_indices = False
html_use_index = False
html_show_sourcelink = False

# One script draws all formulas, as SVG and without fonts. It is a package's, so that no page asks a network for it.
_mathjax = importlib.metadata.distribution("sphinx-mathjax-offline").locate_file(
    "sphinx-mathjax-offline/static/mathjax/tex-svg-full.js"
)
mathjax_path = "tex-svg-full.js"
mathjax3_config = {"options": {"enableMenu": False}}
html_static_path = ["_static", str(_mathjax)]
html_css_files = ["site.css"]


def setup(app):
    """Connects what happens to pages on their way."""
    app.connect("source-read", take_outer_text)
    app.connect("source-read", link_outer_pages)
    app.connect("doctree-read", draw_formulas)
    app.connect("doctree-read", end_blocks)


def take_outer_text(app, name, source):
    """Gives two pages the text of files in the directory above, from where their links are."""
    file = {"index": "README.md", "contributing": "CONTRIBUTING.md"}.get(name)
    if file is not None:
        text = Path(app.srcdir, "..", file).read_text()
        text = re.sub(r"(\]\()(?!https?:|docs/)", r"\1../", text).replace("](docs/", "](")
        source[0] = text.replace("](../CONTRIBUTING.md)", "](contributing.md)") + "\n" + source[0]


def link_outer_pages(app, name, source):
    """Makes a Markdown file outside of `docs` a file to download, as every other file is, and no page of the site."""
    source[0] = re.sub(r"(?<!!)(\[[^\]]*\]\()(\.\./[^)#]*\.md)(#[^)]*)?\)", r"\1path:\2)", source[0])


def draw_formulas(app, document):
    """Draws formulas. In docstrings they are literal blocks, written to be read in a terminal and in an editor.

    The Σ of a formula becomes a sum, with what it runs over below it.
    """
    if app.env.docname == "api":
        for block in list(document.findall(nodes.literal_block)):
            if "language" not in block:
                numbering = {"number": None, "label": None, "docname": "api"}
                block.replace_self(nodes.math_block(block.rawsource, _tex(block.astext()), **numbering))
    for formula in list(document.findall(nodes.math_block)):
        text = formula.astext().replace("Σ", r"\sum ")
        formula.replace_self(nodes.math_block(formula.rawsource, text, **formula.attributes))


def _tex(text):
    text = re.sub(r"√(\w+)", r"\\sqrt{\1}", text.replace("²", "^2").replace("\n", "\n\n"))
    text = re.sub(
        r"(?<!\\)\b[A-Za-z]{2,}(_[A-Za-z]+)*", lambda word: "\\text{" + word[0].replace("_", r"\_") + "}", text
    )
    return re.sub(r"\\text{(exp|log|max|tanh)}", r"\\\1 ", text)


def end_blocks(app, document):
    """Leaves out the empty line at the end of a block of code, which is there to end its last doctest."""
    for block in document.findall(nodes.literal_block):
        block.rawsource = block.astext().rstrip()
        block[:] = [nodes.Text(block.rawsource)]
