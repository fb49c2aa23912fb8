"""Turn the package's docstrings, plain text in Google style, into reStructuredText for Sphinx."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

SECTIONS = ("Args:", "Returns:", "Yields:", "Raises:")
INDENT = "    "


def convert(docstring: Sequence[str], targets: Mapping[str, str] | None = None) -> list[str]:
    """Return a docstring as reStructuredText; napoleon converts its sections afterwards.

    Indented blocks of equations or code become literal blocks, single backticks become code, or a link where the text
    is a key of `targets`, and characters that reStructuredText would interpret are escaped.

    Args:
        docstring: its lines, without common indentation.
        targets: full names of the objects that can be linked, by the text in backticks.
    """
    lines: list[str] = []
    in_section = False
    for paragraph in _paragraphs(docstring):
        if paragraph[0] in SECTIONS:
            in_section = True
        elif not paragraph[0].startswith(INDENT):
            in_section = False
        if paragraph[0] == "Raises:":
            paragraph = _one_error_each(paragraph)
        if paragraph[0].startswith(INDENT) and not in_section:
            lines += [f".. code-block:: {_language(paragraph)}", "", *paragraph, ""]
        else:
            lines += [*_inline("\n".join(paragraph), targets or {}).split("\n"), ""]
    return lines


def _paragraphs(docstring: Sequence[str]) -> Iterator[list[str]]:
    """Yield runs of lines without an empty one; indented runs that follow each other are one paragraph."""
    held: list[str] = []
    for is_text, lines in groupby(docstring, key=lambda line: bool(line.strip())):
        if not is_text:
            continue
        paragraph = list(lines)
        if held and held[0].startswith(INDENT) and paragraph[0].startswith(INDENT):
            held += ["", *paragraph]
            continue
        if held:
            yield held
        held = paragraph
    if held:
        yield held


def _one_error_each(paragraph: Sequence[str]) -> list[str]:
    """Return the section "Raises" with an entry for each error, where one entry names several."""
    entries: list[list[str]] = []
    for line in paragraph[1:]:
        if line.startswith(INDENT + " "):
            entries[-1].append(line)
        else:
            entries.append([line])
    lines = [paragraph[0]]
    for first, *rest in entries:
        errors, _, text = first.partition(": ")
        for error in errors.strip().split(", "):
            lines += [f"{INDENT}{error}: {text}", *rest]
    return lines


def _language(block: Sequence[str]) -> str:
    """Return "python" for lines that Python can parse, else "text"."""
    try:
        ast.parse("\n".join(line[len(INDENT) :] for line in block))
    except SyntaxError:
        return "text"
    return "python"


def _inline(text: str, targets: Mapping[str, str]) -> str:
    """Return text with its backticks as code or links, and everything else escaped."""
    parts = re.split(r"`([^`]+)`", text)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            parts[index] = _escape(part)
        elif part in targets:
            parts[index] = f":py:obj:`{part} <{targets[part]}>`"
        else:
            parts[index] = f"``{' '.join(part.split())}``"
    return "".join(parts)


def _escape(text: str) -> str:
    """Escape what starts emphasis, substitutions and references; bullets and underscores inside a word stay."""
    text = re.sub(r"[\\*|`]", r"\\\g<0>", text)
    return re.sub(r"(?<=\w)_(?!\w)", r"\_", text)
