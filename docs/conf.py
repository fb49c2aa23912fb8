"""Configuration of Sphinx; `make docs` builds the site into build/docs."""

import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import api  # noqa: E402
import docstrings  # noqa: E402
import nbclient.client  # noqa: E402
from plotly.offline import get_plotlyjs  # noqa: E402
from sphinx.ext.napoleon import Config, GoogleDocstring  # noqa: E402
from traitlets import Bool  # noqa: E402

from multifire import __version__  # noqa: E402

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the tutorials share the machine with the build
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # they call `multifire`
os.environ |= {
    "COLUMNS": "100",
    "MULTIFIRE_DOCS": str(DOCS),
    "PLOTLY_RENDERER": "notebook_connected",
    "TTY_COMPATIBLE": "0",  # commands print lines, no bars
}


class WholeStreams(nbclient.client.NotebookClient):
    """Joins what a command prints, which comes in pieces of 100 bytes; MyST-NB would end a line after each piece."""

    coalesce_streams = Bool(True)


nbclient.client.NotebookClient = WholeStreams

project = "multifire"
copyright = "2026, the multifire authors"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "**/runs", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"multifire {__version__}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "auto" if os.environ.get("MULTIFIRE_DOCS_RUN", "1") == "1" else "off"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_show_tb = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # torch's text on forward() would stand below every module
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True


def _targets() -> dict[str, str]:
    """Return the page of each public name by the texts that docstrings have in backticks."""
    targets: dict[str, str] = {}
    for name in api.public_names():
        for text in (name.full, f"mf{name.full.removeprefix('multifire')}", name.name):
            targets.setdefault(text, name.home)
    return targets


TARGETS = _targets()
PLOTLY = re.compile(r'<script[^>]*src="https://cdn\.plot\.ly/[^"]*"[^>]*></script>')
PLOTLY_EXTRAS = re.compile(
    r'<script type="module">import "https://cdn\.plot\.ly/[^<]*</script>'
    r'|<script src="https://cdnjs\.cloudflare\.com/ajax/libs/mathjax/[^>]*></script>'
)


def _convert_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Convert a docstring in place. Those of attributes have no sections: napoleon would take `[K]: values` for one."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()
    lines[:] = docstrings.convert(lines, TARGETS)
    if what not in ("attribute", "data", "property"):
        settings: Any = Config(napoleon_use_rtype=False)  # its own class, which stands for that of Sphinx
        lines[:] = GoogleDocstring(lines, settings, app, what, name, obj, options).lines()


def _use_local_plotly(app, error: Exception | None) -> None:
    """Let the charts load plotly from this site instead of from a network that delivers it."""
    if error is None and app.builder.name == "html":
        (Path(app.outdir) / "_static" / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
        for page in Path(app.outdir, "tutorials").glob("*.html"):
            text = PLOTLY_EXTRAS.sub("", page.read_text(encoding="utf-8"))
            page.write_text(PLOTLY.sub('<script src="../_static/plotly.min.js"></script>', text), encoding="utf-8")


def setup(app) -> None:
    """Write the pages of the reference before Sphinx looks for sources, and convert docstrings."""
    api.write_pages(DOCS / "reference" / "api", lambda lines: docstrings.convert(lines, TARGETS))
    app.connect("autodoc-process-docstring", _convert_docstring)
    app.connect("build-finished", _use_local_plotly)
