"""Find the package's public names, and write a page of the reference for each."""

import ast
import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = (
    "multifire",
    "multifire.nn",
    "multifire.ops",
    "multifire.datasets",
    "multifire.events",
    "multifire.analysis",
    "multifire.export",
    "multifire.engine",
    "multifire.config",
    "multifire.report",
)
"""Packages whose `__all__` is public, in the order of the reference. An object has one page, in the first of them."""


class Name(NamedTuple):
    """A public name of a package."""

    package: str
    name: str
    value: Any
    home: str
    """Full name of its page: an object that several packages export has its page in the first."""

    @property
    def kind(self) -> str:
        """Return "class", "function" or "data"."""
        if inspect.isclass(self.value):
            return "class"
        return "function" if inspect.isroutine(self.value) else "data"

    @property
    def full(self) -> str:
        return f"{self.package}.{self.name}"


def public_names() -> list[Name]:
    """Return every public name but those of packages, which have pages of their own."""
    homes: dict[int, str] = {}
    names = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                home = homes.setdefault(id(value), f"{package}.{name}") if _is_object(value) else f"{package}.{name}"
                names.append(Name(package, name, value, home))
    return names


def _is_object(value: Any) -> bool:
    return inspect.isclass(value) or inspect.isroutine(value)


def doc_of(name: Name) -> str:
    """Return the docstring of a name; that of a constant is the string below its assignment."""
    if name.kind == "data":
        return inspect.cleandoc(_doc_of_constant(name.package, name.name))
    return inspect.cleandoc(name.value.__doc__ or "")


def _doc_of_constant(module: str, name: str) -> str:
    """Return the string below the assignment of a constant, in this module or in the one that it comes from."""
    body = ast.parse(inspect.getsource(importlib.import_module(module))).body
    for statement, after in zip(body, [*body[1:], None], strict=True):
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return str(after.value.value)
            return ""
        if isinstance(statement, ast.ImportFrom) and statement.module:
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _doc_of_constant(statement.module, alias.name)
    return ""


def write_pages(folder: Path, convert: Callable[[Sequence[str]], list[str]]) -> list[Path]:
    """Write a page for each package and each public object; return their paths.

    Files of equal content are not touched, so that Sphinx reads only what has changed. Other pages in the folder are
    removed.

    Args:
        folder: the folder, created if necessary.
        convert: turns the lines of a docstring into reStructuredText.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = public_names()
    pages = {package: _package_page(package, names, convert) for package in PACKAGES}
    pages |= {name.full: _name_page(name, convert) for name in names if name.full == name.home}
    paths = {folder / f"{page}.rst": text for page, text in pages.items()}
    for old in set(folder.glob("*.rst")) - paths.keys():
        old.unlink()
    for path, text in paths.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return list(paths)


def _package_page(package: str, names: Sequence[Name], convert: Callable[[Sequence[str]], list[str]]) -> str:
    """Return the page of a package: its docstring, and a list of its names with their summaries."""
    lines = [package, "=" * len(package), "", f".. py:module:: {package}", ""]
    lines += convert(inspect.cleandoc(importlib.import_module(package).__doc__ or "").split("\n"))
    own = [name for name in names if name.package == package]
    lines += [".. list-table::", "   :widths: 30 70", "   :class: names", ""]
    for name in own:
        summary = " ".join(convert([doc_of(name).split("\n")[0]])).strip()
        lines += [f"   * - :doc:`{name.name} <{name.home}>`", f"     - {summary}"]
    lines += ["", ".. toctree::", "   :hidden:", ""]
    lines += [f"   {name.name} <{name.full}>" for name in own if name.full == name.home]
    return "\n".join(lines) + "\n"


def _name_page(name: Name, convert: Callable[[Sequence[str]], list[str]]) -> str:
    lines = [name.full, "=" * len(name.full), ""]
    if name.kind == "class":
        fields = getattr(name.value, "_fields", None) or getattr(name.value, "__dataclass_fields__", None)
        lines += [f".. autoclass:: {name.full}", "   :members:", *["   :undoc-members:"] * bool(fields)]
    elif name.kind == "function":
        lines += [f".. autofunction:: {name.full}"]
    else:
        lines += [f".. py:data:: {name.full}", ""]
        lines += [f"   {line}".rstrip() for line in convert(doc_of(name).split("\n"))]
    return "\n".join(lines) + "\n"
