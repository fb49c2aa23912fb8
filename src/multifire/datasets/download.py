"""Resumable downloads: a file grows as NAME.part, is checked, and is then renamed."""

import hashlib
import http
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from multifire.datasets.registry import Download, get_info
from multifire.utils.files import hold_lock
from multifire.utils.log import log

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes downloaded so far and its size."""

TIMEOUT_SECONDS = 30.0
CHUNK = 1 << 18


def download(name: str, root: str | Path, on_progress: Progress | None = None) -> Path:
    """Download the missing files of a data set into `root/name`, continuing an interrupted download.

    Returns:
        The folder `root/name`.

    Raises:
        ValueError: unknown or embedded data set, or a file with another size or checksum than the published one.
        OSError: network, server or disk failed; the downloaded part is kept.
    """
    info, folder = get_info(name), Path(root) / name
    items = info.downloads
    if info.fetch:
        raise ValueError(f"{name} cannot be downloaded by a program: {info.fetch}, and put it into {folder}")
    if not items:
        raise ValueError(f"{name} is embedded; nothing to download")
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder.with_name(f"{folder.name}.lock"), _say_busy):
        missing = [item for item in items if not _is_complete(item, folder)]
        _check_space(folder, sum(max(item.size - _size(_part(item, folder)), 0) for item in missing))
        for item in missing:
            _fetch(item, folder, on_progress or (lambda filename, done, total: None))
    return folder


def _say_busy() -> None:
    log.info("another process downloads the same; waiting for it")


def _part(item: Download, folder: Path) -> Path:
    return folder / f"{item.filename}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _is_complete(item: Download, folder: Path) -> bool:
    """Return True if the file exists. One that differs from the published file may be the user's: it is kept."""
    target = folder / item.filename
    if not target.exists():
        return False
    wrong = _what_is_wrong(item, target)
    if wrong:
        raise ValueError(f"{target} is not the published file: {wrong}; move it away to download that one")
    return True


def _what_is_wrong(item: Download, path: Path) -> str | None:
    if _size(path) != item.size:
        return f"it has {_size(path):,} bytes, expected {item.size:,}"
    algorithm, _, expected = item.checksum.partition(":")
    with path.open("rb") as file:
        # some authors publish md5 only; it detects damage, which is all that is needed here
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    return None if found == expected else f"its {algorithm} is {found}, expected {expected}"


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: the download needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; "
            "make room or choose another --root"
        )


def _fetch(item: Download, folder: Path, on_progress: Progress) -> None:
    part = _part(item, folder)
    if _size(part) > item.size:
        part.unlink()
    if _size(part) < item.size:
        _transfer(item, part, on_progress)
    wrong = _what_is_wrong(item, part)
    if wrong:
        part.unlink()
        raise ValueError(f"{item.url} is not the published file: {wrong}; deleted it, the same command starts anew")
    part.replace(folder / item.filename)


def _transfer(item: Download, part: Path, on_progress: Progress) -> None:
    """Append to the partial file, or write it again from the start, until it is complete."""
    failure = None
    try:
        response, done = _request(item, _size(part))
    except (OSError, http.client.HTTPException) as error:
        raise _broken_off(item, _size(part), error) from error
    with response, part.open("ab" if done else "wb") as file:
        on_progress(item.filename, done, item.size)
        while done < item.size:
            try:
                chunk = response.read1(min(CHUNK, item.size - done))
            except (OSError, http.client.HTTPException) as error:
                failure = error
                break
            if not chunk:
                break
            done += file.write(chunk)
            on_progress(item.filename, done, item.size)
        file.flush()
        os.fsync(file.fileno())
    if done < item.size:
        raise _broken_off(item, done, failure) from failure


def _request(item: Download, start: int) -> tuple[http.client.HTTPResponse, int]:
    """Return the server's response and the offset at which it begins: `start`, or 0 if the server cannot resume."""
    headers = {"User-Agent": "multifire"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = _opener().open(urllib.request.Request(item.url, headers=headers), timeout=TIMEOUT_SECONDS)  # noqa: S310 - the opener allows HTTP only
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        error.close()
        return _request(item, 0)
    begin, total = _offered(response)
    if total not in (None, item.size):
        response.close()
        raise ValueError(
            f"{item.url} has {total:,} bytes, expected {item.size:,}: it is not the published file; try again later, "
            f"or get {item.filename} elsewhere and put it into the data set's folder"
        )
    if begin not in (0, start):
        response.close()
        if not start:
            raise ConnectionError("the server sent a part of the file, unasked")
        return _request(item, 0)
    return response, begin


def _offered(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Return the offset at which the response begins, and the size of the whole file if the server states it."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not span:
        return -1, None
    return int(span[1]), None if span[2] == "*" else int(span[2])


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for HTTP and HTTPS with redirects and proxies, without file: and ftp:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _broken_off(item: Download, done: int, error: Exception | None) -> ConnectionError:
    reason = getattr(error, "reason", None) if type(error) is urllib.error.URLError else error
    what_now = "they are kept, and the same command resumes" if done else "run the same command again later"
    return ConnectionError(
        f"{item.url} stopped at {done:,} of {item.size:,} bytes ({reason or 'the server hung up'}); {what_now}"
    )
