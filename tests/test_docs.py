"""The documentation: docstrings of public names, their conversion for Sphinx, and the commands on its pages."""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

import multifire as mf
from multifire import cli
from multifire.cli.bench import BenchArguments
from multifire.cli.overrides import parse_overrides
from multifire.cli.sweep import SweepArguments
from multifire.cli.train import TrainArguments
from multifire.config import get_recipe
from multifire.datasets.registry import REGISTERED

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


api, docstrings, check_links = _load("api"), _load("docstrings"), _load("check_links")
NAMES = [name for name in api.public_names() if name.full == name.home]
OBJECTS = [name for name in NAMES if name.kind != "data"]
SENTENCE_END = re.compile(r"(?<!et al)(?<!e\.g)(?<!i\.e)[.!?] [A-Z]")
SHAPE = re.compile(r"\[(?:[A-Z]|\.\.\.)[^\]]*\]")  # such as [T, N, C, H, W] and [...]


def ids(name) -> str:
    return name.full


@pytest.mark.parametrize("name", NAMES, ids=ids)
def test_a_public_name_has_a_summary_of_one_sentence(name):
    if name.name == "__version__":
        return
    first, *rest = api.doc_of(name).split("\n")
    assert first.endswith((".", ":")), f"the docstring begins {first!r}"
    assert not SENTENCE_END.search(first), f"more than one sentence: {first!r}"
    assert name.kind == "data" or not rest or not rest[0], f"no empty line below the summary: {rest[0]!r}"


@pytest.mark.parametrize("name", OBJECTS, ids=ids)
def test_a_public_name_with_tensors_says_their_shapes(name):
    """Tensors and arrays among the parameters of a function, or of a module's forward; a shape stands in brackets."""
    function = getattr(name.value, "forward", None) if name.kind == "class" else name.value
    if function is None or "torch.nn" in getattr(function, "__module__", ""):
        return
    annotations = [str(p.annotation) for p in inspect.signature(function).parameters.values()]
    if any(re.search(r"\bTensor\b|ndarray", text) for text in annotations):
        text = api.doc_of(name) + (function.__doc__ or "")
        assert SHAPE.search(text), f"{annotations} without a shape in:\n{text}"


def _raised(function) -> set[str]:
    """Return what a function raises by its own `raise` statements.

    An error that a helper makes counts as ValueError. One within `try` may be caught there, and does not count.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and node.handlers]
    caught = {id(inner) for node in tries for statement in node.body for inner in ast.walk(statement)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None and id(node) not in caught:
            called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = called.id if isinstance(called, ast.Name) else ""
            found.add(name if name.endswith("Error") else "ValueError")
    return found - {"AttributeError", "AssertionError", "NotImplementedError"}


@pytest.mark.parametrize("name", OBJECTS, ids=ids)
def test_a_public_name_says_what_it_raises(name):
    """What a function, or a class's constructor, raises in its own body; errors of what it calls are not seen."""
    functions = [name.value]
    if name.kind == "class":
        made_by = (vars(name.value).get(method) for method in ("__init__", "__post_init__"))
        functions = [function for function in made_by if function and "__create_fn__" not in function.__qualname__]
    for function in functions:
        try:
            raised = _raised(function)
        except OSError:  # a constructor that dataclass has written
            continue
        text = api.doc_of(name) + (function.__doc__ or "")
        missing = {error for error in raised if error not in text.partition("Raises:")[2]}
        assert not missing, f"raises {sorted(missing)}, but its docstring does not say so"


def test_every_public_name_is_in_the_reference(tmp_path):
    pages = api.write_pages(tmp_path, docstrings.convert)
    texts = {page.stem: page.read_text(encoding="utf-8") for page in pages}
    assert {mf_name for mf_name in mf.__all__ if inspect.ismodule(getattr(mf, mf_name))} <= {
        package.removeprefix("multifire.") for package in api.PACKAGES
    }
    for package in api.PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            if not inspect.ismodule(getattr(module, name)):
                assert f":doc:`{name} <" in texts[package]
    for name in NAMES:
        assert re.search(rf"^\.\. .*:: {re.escape(name.full)}$", texts[name.full], re.M)
        assert f"   {name.name} <{name.full}>" in texts[name.package]
    index = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    assert re.findall(r"^api/(.*)$", index, re.M) == list(api.PACKAGES)
    assert len({page.name.lower() for page in pages}) == len(pages), "two pages on a disk that ignores case"
    stale = tmp_path / "multifire.gone.rst"
    stale.write_text("", encoding="utf-8")
    api.write_pages(tmp_path, docstrings.convert)
    assert not stale.exists()


def converted(text: str, **targets: str) -> str:
    return "\n".join(docstrings.convert(inspect.cleandoc(text).split("\n"), targets)).strip()


def test_equations_become_literal_blocks():
    text = """Fire.

        u[t] = decay · u[t-1]

        o[t] = Σ_k s_k[t]

    After *it*."""
    assert converted(text) == (
        "Fire.\n\n.. code-block:: text\n\n    u[t] = decay · u[t-1]\n\n    o[t] = Σ_k s_k[t]\n\nAfter \\*it\\*."
    )


def test_code_becomes_a_python_block():
    text = """Train.

        run = mf.train(mf.recipe("digits"))

    Done."""
    assert converted(text).split("\n")[2] == ".. code-block:: python"


def test_backticks_become_code_or_links():
    assert converted("See `MLF` and `a | b`.", MLF="multifire.nn.MLF") == (
        "See :py:obj:`MLF <multifire.nn.MLF>` and ``a | b``."
    )
    assert converted("Of `two\nlines`.") == "Of ``two lines``."


def test_special_characters_are_escaped():
    assert converted("|u| > θ, 2*x, raw_ and under_score") == r"\|u\| > θ, 2\*x, raw\_ and under_score"


def test_sections_keep_their_indentation():
    text = """Load.

    Args:
        path: the file,
            or a folder.

    Raises:
        ValueError: damaged.
        ValueError, OSError: both.

    Source: a paper."""
    lines = converted(text).split("\n")
    assert lines[2:5] == ["Args:", "    path: the file,", "        or a folder."]
    assert "    ValueError: both." in lines
    assert "    OSError: both." in lines
    assert not any("code-block" in line for line in lines)


PAGES = sorted([DOCS / "index.md", *DOCS.glob("how-to/*.md"), *DOCS.glob("tutorials/*.md")])
COMMAND = re.compile(r"^    (multifire [a-z](?:.*\\\n)*.*)$", re.M)


def commands_of(page: Path) -> list[str]:
    """Return the commands in indented blocks, in cells of %%bash, and in blocks of the language sh."""
    text = page.read_text(encoding="utf-8")
    shell = "".join(re.findall(r"^(?:```sh|%%bash)\n(.*?)^```$", text, re.M | re.S))
    return [found.replace("\\\n", " ") for found in COMMAND.findall(text + textwrap.indent(shell, "    "))]


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]
OVERRIDING = {"train": TrainArguments, "sweep": SweepArguments, "bench": BenchArguments}


def test_commands_are_found():
    assert len(COMMANDS) > 25


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=[f"{page.stem}: {command}"[:80] for page, command in COMMANDS]
)
def test_a_command_on_a_page_is_accepted(page, command):
    """Its names and options are known; what it computes is tested elsewhere."""
    command = re.sub(r"\$\([^)]*\)", "FILE", command)
    _, name, *args = shlex.split(re.split(" [<>|] ", command)[0], comments=True)
    if name in OVERRIDING:
        recipe = args.pop(1 if name == "sweep" else 0)
        parse_overrides(get_recipe(recipe), args[name == "sweep" :], name, OVERRIDING[name])
    else:
        cli._parser().parse_args([name, *args])


BLOCKS = [
    (page, block)
    for page in DOCS.glob("how-to/*.md")
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
]


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[page.stem for page, _ in BLOCKS])
def test_a_program_on_a_page_runs(page, block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = dict(REGISTERED)
    try:
        exec(compile(block, str(page), "exec"), {})
    finally:
        REGISTERED.clear()
        REGISTERED.update(before)
    assert capsys.readouterr().out


def test_the_version_of_the_citation():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {mf.__version__}\n" in text
    assert f"version = {{{mf.__version__}}}" in (DOCS / "citing.md").read_text(encoding="utf-8")


def test_broken_links_are_found(tmp_path):
    (tmp_path / "b.html").write_text("<h1 id='head'></h1><a href='https://example.org/x'></a>", encoding="utf-8")
    (tmp_path / "a.html").write_text(
        "<a href='b.html#head'></a><a href='b.html#tail'></a><img src='gone.png'><a href='#'></a>", encoding="utf-8"
    )
    assert check_links.broken_links(tmp_path) == [
        "a.html: b.html#tail: no such place in the page",
        "a.html: gone.png: no such file",
    ]


def test_every_page_is_in_a_list_of_contents_and_links_within_the_site():
    """Sphinx checks the same, but only `make docs` runs it."""
    pages = sorted(page for page in DOCS.rglob("*.md") if "api" not in page.parts)
    listed, wrong = {DOCS / "index.md"}, []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```$", text, re.M | re.S):
            listed |= {(page.parent / f"{name}.md").resolve() for name in re.findall(r"^[\w/-]+$", block, re.M)}
        for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", re.sub(r"^(?:    |```(?!\{)).*?$", "", text, flags=re.M)):
            target = (page.parent / link).resolve()
            outside = not target.is_relative_to(DOCS) or not (target.is_file() or "api" in target.parts)
            if "://" not in link and outside:
                wrong.append(f"{page.relative_to(DOCS)}: {link}")
    assert not wrong
    assert {str(page.relative_to(DOCS)) for page in pages if page not in listed} == set()
