"""Against a real server on this machine, which behaves as told."""

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
    """Serves `content` under every path; the attributes say in which ways it misbehaves."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.honours_range = True
        self.says_length = True
        self.refuses_range = False
        self.wrong_range = False
        self.sends_parts_unasked = False
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
        server, asked = self.server, self.headers.get("Range")
        server.requests.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.honours_range else 0
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
        if server.sends_parts_unasked:
            start = 100
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.says_length:
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
    """Makes a data set of the server's file, as CONTENT is, with what the test says instead."""

    def register(**known) -> Download:
        checksum = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
        given = {"url": server.url, "filename": "file.gz", "size": len(CONTENT), "checksum": checksum, **known}
        item = Download(**given)
        info = DatasetInfo("for a test", 1, 28, ("a", "b"), (0.0,), (1.0,), (1, 1), (item,))
        monkeypatch.setitem(DATASETS, NAME, info)
        return item

    register()
    return register


def test_a_fresh_download(server, register, tmp_path):
    told = []
    folder = download(NAME, tmp_path / "deep" / "data", lambda *progress: told.append(progress))
    assert folder == tmp_path / "deep" / "data" / NAME
    assert [path.name for path in folder.iterdir()] == ["file.gz"]
    assert (folder / "file.gz").read_bytes() == CONTENT
    assert told[0] == ("file.gz", 0, len(CONTENT))
    assert told[-1] == ("file.gz", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})


def test_md5_is_checked_too(register, tmp_path):
    register(checksum=f"md5:{hashlib.md5(CONTENT).hexdigest()}")
    assert (download(NAME, tmp_path) / "file.gz").read_bytes() == CONTENT


def test_a_complete_file_is_not_asked_for_again(server, register, tmp_path):
    download(NAME, str(tmp_path))
    told = []
    download(NAME, str(tmp_path), lambda *progress: told.append(progress))
    assert server.requests == [None]
    assert told == []


def test_a_server_without_length(server, register, tmp_path):
    server.says_length = False
    assert (download(NAME, tmp_path) / "file.gz").read_bytes() == CONTENT


@pytest.mark.parametrize("says_length", [True, False])
def test_a_dropped_connection_is_resumed_by_the_same_command(server, register, tmp_path, says_length):
    server.drops_after, server.says_length = 300_000, says_length
    with pytest.raises(
        ConnectionError,
        match=r"file\.gz stopped at 300,000 of 700,000 bytes \(.+\); they are kept, and the same command resumes",
    ):
        download(NAME, tmp_path)
    assert (tmp_path / NAME / "file.gz.part").read_bytes() == CONTENT[:300_000]
    assert not (tmp_path / NAME / "file.gz").exists()
    server.drops_after = None
    told = []
    download(NAME, tmp_path, lambda *progress: told.append(progress))
    assert server.requests == [None, "bytes=300000-"]
    assert told[0] == ("file.gz", 300_000, 700_000)
    assert (tmp_path / NAME / "file.gz").read_bytes() == CONTENT
    assert not (tmp_path / NAME / "file.gz.part").exists()


def write_part(tmp_path, content: bytes):
    (tmp_path / NAME).mkdir(exist_ok=True)
    part = tmp_path / NAME / "file.gz.part"
    part.write_bytes(content)
    return part


@pytest.mark.parametrize("misbehaviour", ["honours_range", "refuses_range", "wrong_range"])
def test_a_server_that_cannot_resume_sends_all_of_it(server, register, tmp_path, misbehaviour):
    setattr(server, misbehaviour, misbehaviour != "honours_range")
    write_part(tmp_path, b"\0" * 1000)  # other bytes than the server's: they must not survive
    told = []
    download(NAME, tmp_path, lambda *progress: told.append(progress))
    assert server.requests[0] == "bytes=1000-"
    assert told[0] == ("file.gz", 0, 700_000)
    assert (tmp_path / NAME / "file.gz").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"", CONTENT[:1000]])
def test_a_server_that_sends_another_part_whatever_is_asked(server, register, tmp_path, part):
    server.sends_parts_unasked = True
    kept = write_part(tmp_path, part)
    with pytest.raises(OSError, match="the server sent a part of the file, unasked"):
        download(NAME, tmp_path)
    assert kept.read_bytes() == part


def test_a_complete_part_is_checked_without_asking(server, register, tmp_path):
    write_part(tmp_path, CONTENT)
    assert (download(NAME, tmp_path) / "file.gz").read_bytes() == CONTENT
    assert server.requests == []


def test_a_part_that_is_too_long_is_thrown_away(server, register, tmp_path):
    write_part(tmp_path, CONTENT + b"!")
    assert (download(NAME, tmp_path) / "file.gz").read_bytes() == CONTENT
    assert server.requests == [None]


def test_a_wrong_checksum_deletes_the_part(server, register, tmp_path):
    server.content = CONTENT[:-1] + b"!"
    found, expected = (hashlib.sha256(content).hexdigest() for content in (server.content, CONTENT))
    with pytest.raises(
        ValueError, match=f"not the published file: its sha256 is {found}, expected {expected}; deleted"
    ):
        download(NAME, tmp_path)
    assert list((tmp_path / NAME).iterdir()) == []


def test_a_resumed_part_of_other_bytes_is_found_out(register, tmp_path):
    write_part(tmp_path, b"\0" * 1000)
    with pytest.raises(ValueError, match="the same command starts anew"):
        download(NAME, tmp_path)
    assert (download(NAME, tmp_path) / "file.gz").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"", CONTENT[:1000]])
@pytest.mark.parametrize("content", [b"<html>Please log in</html>" * 100, CONTENT + b"more"])
def test_a_file_of_another_size_is_refused_and_the_part_kept(server, register, tmp_path, content, part):
    server.content = content
    kept = write_part(tmp_path, part)
    with pytest.raises(
        ValueError, match=rf"file\.gz has {len(content):,} bytes, expected 700,000: it is not the publis"
    ):
        download(NAME, tmp_path)
    assert kept.read_bytes() == part


def test_a_server_without_length_that_sends_too_little(server, register, tmp_path):
    server.content, server.says_length = CONTENT[:1000], False
    with pytest.raises(ConnectionError, match=r"stopped at 1,000 of 700,000 bytes \(the server hung up\)"):
        download(NAME, tmp_path)


def test_a_file_that_differs_is_left_alone(server, register, tmp_path):
    (tmp_path / NAME).mkdir()
    own = tmp_path / NAME / "file.gz"
    for content, what in ((b"mine", "it has 4 bytes, expected 700,000"), (CONTENT[::-1], "its sha256 is")):
        own.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"file\.gz is not the published file: {what}.*; move it away to download"
        ):
            download(NAME, tmp_path)
        assert own.read_bytes() == content
    assert server.requests == []


def test_an_error_of_the_server(server, register, tmp_path):
    server.status = 404
    with pytest.raises(
        OSError, match=r"stopped at 0 of 700,000 bytes \(HTTP Error 404: Not Found\); run the same command"
    ):
        download(NAME, tmp_path)
    write_part(tmp_path, CONTENT[:10])
    server.status = 503
    with pytest.raises(OSError, match=r"stopped at 10 of 700,000 bytes \(HTTP Error 503.*\); they are kept"):
        download(NAME, tmp_path)


def test_no_server_at_all(register, tmp_path):
    register(url="http://127.0.0.1:9/file.gz")
    with pytest.raises(
        OSError, match=r"stopped at 0 of 700,000 bytes \(\[Errno \d+\] Connection refused\); run the same"
    ):
        download(NAME, tmp_path)


@pytest.mark.parametrize("scheme", ["file", "ftp"])
def test_only_http_is_spoken(server, register, tmp_path, scheme):
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


def test_a_redirect_is_followed(server, register, tmp_path):
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


def test_a_full_disk_is_seen_before_the_start(server, register, tmp_path):
    register(size=10**18)
    with pytest.raises(
        OSError, match=r"the download needs 1,000,000,000,000\.0 MB, .* MB are free; make room or choose"
    ):
        download(NAME, tmp_path)
    assert server.requests == []


def test_embedded_and_unknown_data_sets(tmp_path):
    with pytest.raises(ValueError, match="digits is embedded; nothing to download"):
        download("digits", tmp_path)
    with pytest.raises(ValueError, match=r"unknown data set 'mnits'; did you mean mnist\?"):
        download("mnits", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_load_tells_of_a_download_that_was_broken_off(tmp_path):
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
