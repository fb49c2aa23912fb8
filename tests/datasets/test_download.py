"""Downloads from a server on this machine that can be told to misbehave."""

import hashlib
import http.server
import re
import threading
import urllib.parse

import numpy as np
import pytest

from multifire import datasets
from multifire.datasets import DATASETS, DatasetInfo, Download
from multifire.datasets.download import download

CONTENT = np.random.default_rng(0).bytes(700_000)
NAME = "under-test"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under every path; its attributes select how it misbehaves."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.honours_range = True
        self.sends_length = True
        self.refuses_range = False
        self.wrong_range = False
        self.sends_unrequested_parts = False
        self.drops_after: int | None = None
        self.status: int | None = None
        self.redirect: str | None = None
        self.requests: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        server, requested_range = self.server, self.headers.get("Range")
        server.requests.append(requested_range)
        start = (
            int(re.fullmatch(r"bytes=(\d+)-", requested_range)[1]) if requested_range and server.honours_range else 0
        )
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
            return
        if server.status:
            self.send_error(server.status)
            return
        if start and (server.refuses_range or start >= len(server.content)):
            self.send_error(416)
            return
        if start and server.wrong_range:
            start -= 100
        if server.sends_unrequested_parts:
            start = 100
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.sends_length:
            self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        end = len(server.content) if server.drops_after is None else start + server.drops_after
        self.wfile.write(server.content[start:end])


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def register(server, monkeypatch):
    """Return a function that registers a data set of the server's file; its arguments change the file's properties."""

    def register(**changes) -> Download:
        checksum = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
        properties = {"url": server.url, "filename": "file.gz", "size": len(CONTENT), "checksum": checksum, **changes}
        item = Download(**properties)
        info = DatasetInfo("for a test", 1, 28, ("a", "b"), (0.0,), (1.0,), (1, 1), (item,))
        monkeypatch.setitem(DATASETS, NAME, info)
        return item

    register()
    return register


def test_download_writes_the_file_and_reports_its_progress(server, register, tmp_path):
    reports = []
    folder = download(NAME, tmp_path / "deep" / "data", lambda *report: reports.append(report))
    assert folder == tmp_path / "deep" / "data" / NAME
    assert [path.name for path in folder.iterdir()] == ["file.gz"]
    assert (folder / "file.gz").read_bytes() == CONTENT
    assert reports[0] == ("file.gz", 0, len(CONTENT))
    assert reports[-1] == ("file.gz", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in reports] == sorted({done for _, done, _ in reports})


def test_md5_checksum_is_supported(register, tmp_path):
    register(checksum=f"md5:{hashlib.md5(CONTENT).hexdigest()}")
    assert (download(NAME, tmp_path) / "file.gz").read_bytes() == CONTENT


def test_wrong_md5_checksum_is_refused(server, register, tmp_path):
    """The server's file has the published size."""
    register(checksum=f"md5:{hashlib.md5(CONTENT).hexdigest()}")
    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    found, expected = (hashlib.md5(content).hexdigest() for content in (server.content, CONTENT))
    with pytest.raises(ValueError, match=f"not the published file: its md5 is {found}, expected {expected}; deleted"):
        download(NAME, tmp_path)
    assert list((tmp_path / NAME).iterdir()) == []


def test_complete_file_is_not_requested_again(server, register, tmp_path):
    download(NAME, str(tmp_path))
    reports = []
    download(NAME, str(tmp_path), lambda *report: reports.append(report))
    assert server.requests == [None]
    assert reports == []


def test_server_may_omit_the_length(server, register, tmp_path):
    server.sends_length = False
    assert (download(NAME, tmp_path) / "file.gz").read_bytes() == CONTENT


@pytest.mark.parametrize("sends_length", [True, False])
def test_dropped_download_is_resumed_by_the_same_command(server, register, tmp_path, sends_length):
    server.drops_after, server.sends_length = 300_000, sends_length
    with pytest.raises(
        ConnectionError,
        match=r"file\.gz stopped at 300,000 of 700,000 bytes \(.+\); they are kept, and the same command resumes",
    ):
        download(NAME, tmp_path)
    assert (tmp_path / NAME / "file.gz.part").read_bytes() == CONTENT[:300_000]
    assert not (tmp_path / NAME / "file.gz").exists()
    server.drops_after = None
    reports = []
    download(NAME, tmp_path, lambda *report: reports.append(report))
    assert server.requests == [None, "bytes=300000-"]
    assert reports[0] == ("file.gz", 300_000, 700_000)
    assert (tmp_path / NAME / "file.gz").read_bytes() == CONTENT
    assert not (tmp_path / NAME / "file.gz.part").exists()


def write_part(tmp_path, content: bytes):
    (tmp_path / NAME).mkdir(exist_ok=True)
    part = tmp_path / NAME / "file.gz.part"
    part.write_bytes(content)
    return part


@pytest.mark.parametrize("misbehaviour", ["honours_range", "refuses_range", "wrong_range"])
def test_whole_file_is_downloaded_if_the_server_cannot_resume(server, register, tmp_path, misbehaviour):
    setattr(server, misbehaviour, misbehaviour != "honours_range")
    write_part(tmp_path, b"\0" * 1000)  # bytes that differ from the server's and must be overwritten
    reports = []
    download(NAME, tmp_path, lambda *report: reports.append(report))
    assert server.requests[0] == "bytes=1000-"
    assert reports[0] == ("file.gz", 0, 700_000)
    assert (tmp_path / NAME / "file.gz").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"", CONTENT[:1000]])
def test_unrequested_part_is_refused(server, register, tmp_path, part):
    server.sends_unrequested_parts = True
    kept = write_part(tmp_path, part)
    with pytest.raises(OSError, match="the server sent a part of the file, unasked"):
        download(NAME, tmp_path)
    assert kept.read_bytes() == part


def test_complete_part_is_checked_without_a_request(server, register, tmp_path):
    write_part(tmp_path, CONTENT)
    assert (download(NAME, tmp_path) / "file.gz").read_bytes() == CONTENT
    assert server.requests == []


def test_part_that_is_too_long_is_discarded(server, register, tmp_path):
    write_part(tmp_path, CONTENT + b"!")
    assert (download(NAME, tmp_path) / "file.gz").read_bytes() == CONTENT
    assert server.requests == [None]


def test_wrong_checksum_deletes_the_part(server, register, tmp_path):
    server.content = CONTENT[:-1] + b"!"
    found, expected = (hashlib.sha256(content).hexdigest() for content in (server.content, CONTENT))
    with pytest.raises(
        ValueError, match=f"not the published file: its sha256 is {found}, expected {expected}; deleted"
    ):
        download(NAME, tmp_path)
    assert list((tmp_path / NAME).iterdir()) == []


def test_resumed_part_with_wrong_bytes_is_detected(register, tmp_path):
    write_part(tmp_path, b"\0" * 1000)
    with pytest.raises(ValueError, match="the same command starts anew"):
        download(NAME, tmp_path)
    assert (download(NAME, tmp_path) / "file.gz").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"", CONTENT[:1000]])
@pytest.mark.parametrize("content", [b"<html>Please log in</html>" * 100, CONTENT + b"more"])
def test_file_of_another_size_is_refused_and_the_part_is_kept(server, register, tmp_path, content, part):
    server.content = content
    kept = write_part(tmp_path, part)
    with pytest.raises(
        ValueError, match=rf"file\.gz has {len(content):,} bytes, expected 700,000: it is not the publis"
    ):
        download(NAME, tmp_path)
    assert kept.read_bytes() == part


def test_incomplete_content_without_a_length_is_detected(server, register, tmp_path):
    server.content, server.sends_length = CONTENT[:1000], False
    with pytest.raises(ConnectionError, match=r"stopped at 1,000 of 700,000 bytes \(the server hung up\)"):
        download(NAME, tmp_path)


def test_existing_file_that_differs_is_not_overwritten(server, register, tmp_path):
    (tmp_path / NAME).mkdir()
    existing = tmp_path / NAME / "file.gz"
    for content, what in ((b"mine", "it has 4 bytes, expected 700,000"), (CONTENT[::-1], "its sha256 is")):
        existing.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"file\.gz is not the published file: {what}.*; move it away to download"
        ):
            download(NAME, tmp_path)
        assert existing.read_bytes() == content
    assert server.requests == []


def test_http_error_is_reported(server, register, tmp_path):
    server.status = 404
    with pytest.raises(
        OSError, match=r"stopped at 0 of 700,000 bytes \(HTTP Error 404: Not Found\); run the same command"
    ):
        download(NAME, tmp_path)
    write_part(tmp_path, CONTENT[:10])
    server.status = 503
    with pytest.raises(OSError, match=r"stopped at 10 of 700,000 bytes \(HTTP Error 503.*\); they are kept"):
        download(NAME, tmp_path)


def test_refused_connection_is_reported(register, tmp_path):
    register(url="http://127.0.0.1:9/file.gz")
    with pytest.raises(
        OSError, match=r"stopped at 0 of 700,000 bytes \(\[Errno \d+\] Connection refused\); run the same"
    ):
        download(NAME, tmp_path)


@pytest.mark.parametrize("scheme", ["file", "ftp"])
def test_urls_other_than_http_are_refused(server, register, tmp_path, scheme):
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    target = f"{scheme}://127.0.0.1{urllib.parse.quote(str(secret))}"
    register(url=target)
    with pytest.raises(OSError, match=f"unknown url type: {scheme}"):
        download(NAME, tmp_path)
    register()
    server.redirect = target
    with pytest.raises(OSError, match=r"stopped at 0 of 700,000 bytes"):
        download(NAME, tmp_path)
    assert list((tmp_path / NAME).iterdir()) == []


def test_redirect_is_followed(server, register, tmp_path):
    other = Server()
    other.redirect = server.url
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        register(url=other.url)
        assert (download(NAME, tmp_path) / "file.gz").read_bytes() == CONTENT
    finally:
        other.shutdown()
        other.server_close()
        thread.join()


def test_lack_of_disk_space_is_reported_before_the_download(server, register, tmp_path):
    register(size=10**18)
    with pytest.raises(
        OSError, match=r"the download needs 1,000,000,000,000\.0 MB, .* MB are free; make room or choose"
    ):
        download(NAME, tmp_path)
    assert server.requests == []


def test_embedded_and_unknown_data_sets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="digits is embedded; nothing to download"):
        download("digits", tmp_path)
    with pytest.raises(ValueError, match=r"unknown data set 'mnits'; did you mean mnist\?"):
        download("mnits", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_load_reports_an_incomplete_download(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz.part").write_bytes(b"1234")
    message = (
        f"{folder} is half-downloaded: train-images-idx3-ubyte.gz.part has 4 of 9,912,422 bytes; "
        f"`multifire data download mnist --root {tmp_path}` resumes it"
    )
    for root in (tmp_path, folder):
        with pytest.raises(FileNotFoundError, match=re.escape(message)):
            datasets.load("mnist", root)
