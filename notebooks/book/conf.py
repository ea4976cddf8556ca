"""How Sphinx makes the book. tests/tools/book.py runs it, and prepares the notebooks before."""

from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes

HERE = Path(__file__).resolve().parent
project = html_title = "LoRA Workbook"
extensions = ["myst_nb"]

nb_execution_mode = "off"  # the committed outputs are shown
nb_ipywidgets_js = {}  # no scripts of widgets: a widget's static picture is shown
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_merge_streams = True
nb_render_markdown_format = "myst"  # a table in an output is a table: commonmark has none
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4

html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = [str(HERE / "book.css")]
html_css_files = ["book.css"]
html_use_index = html_copy_source = html_show_copyright = False
html_show_search_summary = False  # its script fetches each page, which browsers refuse for files


def write_math(translator, node) -> None:
    """A formula as MathML, which browsers show without a script."""
    block = isinstance(node, nodes.math_block)
    formula = convert(node.astext(), display="block" if block else "inline")
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def drop_links_out_of_the_book(app, document) -> None:
    """A link to what is no page of the book becomes text. A link that is wrong stays an error."""
    here = HERE.parent.parent / Path(app.env.docname).parent
    for link in list(document.findall(addnodes.pending_xref)):
        target = link["reftarget"]
        if link.get("refdomain") is None and (here / target).exists():
            if link.astext() == Path(target).name:  # which says less than the whole path
                link.replace_self(nodes.literal("", target.replace("../", "")))
            else:
                link.replace_self(link.children)


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("doctree-read", drop_links_out_of_the_book)
