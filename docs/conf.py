"""How Sphinx builds these pages: Markdown by MyST, the API from docstrings; nothing comes from a network."""

import re

import efreg

project = "efreg"
copyright = "efreg contributors"
release = efreg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
highlight_language = "none"
smartquotes = False
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # the tables of bench/results begin at the third level

html_theme = "furo"
html_title = f"efreg {release}"
html_static_path = ["_static"]
html_css_files = ["efreg.css"]
html_show_sourcelink = False
html_use_index = html_domain_indices = False

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88

NAMES = re.compile(r"(?:^|(?<=\. ))((?:[a-z]\w*|[A-Z])(?:, [a-z]\w*)*): ")
"""What begins an item of a docstring, at its paragraph's beginning or behind a full stop: "only, skip: "."""

TABLE = re.compile(r"\[([^]]+)\]\(\.\./bench/results/([\w-]+)\.md\)")


def restructured(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are prose with `code` and lists of "name: what it is"; autodoc reads reStructuredText."""
    text = re.sub(r"\n(?=(?:Raises|Returns) )", "\n\n", "\n".join(lines))
    lines[:] = "\n\n".join(map(block, re.split(r"\n{2,}", text.strip("\n")))).split("\n")


def block(paragraph: str) -> str:
    """A paragraph: code where all of it is indented, a list of definitions where it begins with a name."""
    if all(line.startswith("    ") for line in paragraph.split("\n")):
        return f"::\n\n{paragraph}"
    text = " ".join(paragraph.split())
    prose, *items = NAMES.split(text)
    if prose:
        return inline(text)
    pairs = zip(items[::2], items[1::2], strict=True)
    return "\n".join(f"{term(names)}\n    {inline(what)}" for names, what in pairs)


def term(names: str) -> str:
    return ", ".join(f"``{name}``" for name in names.split(", "))


def inline(text: str) -> str:
    """Text whose `names` link to what they name, other `code` is code, and all else is as it is written."""
    parts = re.split(r"`([^`]+)`", text)
    parts[::2] = [re.sub(r"([\\*|_])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [rf"\ {code(part)}\ " for part in parts[1::2]]
    return "".join(parts)


def code(text: str) -> str:
    return f":py:obj:`{text}`" if re.fullmatch(r"[\w.]+", text) else f"``{text}``"


def linked(app, docname: str, source: list[str]) -> None:
    """Pages link to tables as to files of bench/results; here these are the pages of tables/."""
    source[0] = TABLE.sub(r"{doc}`\1 <tables/\2>`", source[0])


def setup(app) -> None:
    app.connect("autodoc-process-docstring", restructured)
    app.connect("source-read", linked)
