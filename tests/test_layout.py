"""The public names of the design, and the house rules that a tool can check."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import multifire as mf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "multifire"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES, MAX_LINES_OF_LOOP = 450, 150


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports(file: Path) -> list[tuple[str, str]]:
    """Module and name of every import of the package in a file, also inside functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] == "multifire"]


def imported_modules(file: Path) -> set[str]:
    return {f"{module}.{name}" if f"{module}.{name}" in MODULES else module for module, name in imports(file)}


def test_public_names_exist_and_are_listed():
    for name in mf.__all__:
        assert getattr(mf, name) is not None
    assert dir(mf) == mf.__all__
    assert mf.ops.mlf
    assert mf.ops.tdbn_mlf
    for name in ("MLF", "TdBatchNorm2d", "DSBlock", "PlainBlock", "SpikingResNet"):
        assert hasattr(mf.nn, name)
    assert (PACKAGE / "py.typed").is_file()


def test_help_imports_no_torch():
    program = "import sys, multifire.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_imports_point_one_way():
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_import_circle():
    """Imports inside functions count too; those of the package's own __init__ are its lazy public names."""
    graph = {name: imported_modules(file) & MODULES.keys() for name, file in MODULES.items() if name != "multifire"}
    for imported in graph.values():
        imported.discard("multifire")  # __version__
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_uses_another_modules_private_names(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    private = [f"{module}.{name}" for module, name in imports(file) if name.startswith("_") and name != "__version__"]
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if f"{node.module}.{alias.name}" in MODULES
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            private += [f"{node.value.id}.{node.attr}"] * (node.attr.startswith("_") and not node.attr.startswith("__"))
    assert not private


def test_files_have_one_subject():
    lengths = {str(file.relative_to(PACKAGE)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
    assert lengths["training/loop.py"] <= MAX_LINES_OF_LOOP
    assert sorted(file.name for file in PACKAGE.glob("*.py")) == ["__init__.py", "__main__.py"]
