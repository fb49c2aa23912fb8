"""Check that every link within a built site leads to a file, and to a heading or name in it.

usage: python docs/check_links.py SITE
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is not None and name in ("id", "name"):
                self.anchors.add(value)
            elif value is not None and name in ("href", "src") and tag != "template":
                self.links.append(value)


def broken_links(site: Path) -> list[str]:
    """Return a line for each link of the site's pages that leads nowhere; links to other hosts are not followed."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{path.relative_to(site)}: {link}: no such file")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(site)}: {link}: no such place in the page")
    return broken


def main() -> int:
    """Print the broken links of the site; return 1 if there are any."""
    site = Path(sys.argv[1]).resolve()
    found = broken_links(site)
    print("\n".join(found) or f"{site}: all links lead somewhere")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
