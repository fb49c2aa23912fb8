"""Upload and download networks with huggingface_hub; a local server answers in place of Hugging Face's."""

import base64
import hashlib
import importlib.util
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from multifire.export.pretrained import from_pretrained, push_to_hub, save_pretrained
from multifire.nn import build_model

NAME = "owner/a-network"
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="the extra `hub` is not installed"
)


class Hub(ThreadingHTTPServer):
    """A hub with the endpoints that the library uses to create a repository, commit, list and download files."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        """For each name and revision, the files by path."""
        self.downloaded: list[str] = []

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repositories.setdefault(name, {}).update({oid: files, "main": files})
        return oid


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        if found := re.fullmatch(r"/api/models/(\w+/[\w-]+)(?:/revision/([^/?]+))?(?:\?.*)?", self.path):
            if (files := self.files(found[1], found[2] or "main")) is not None:
                oids = self.server.repositories[found[1]].items()
                sha = next(oid for oid, stored in oids if stored is files and oid != "main")
                self.answer_json({"id": found[1], "sha": sha, "siblings": [{"rfilename": path} for path in files]})
        elif found := re.fullmatch(r"/api/models/(\w+/[\w-]+)/tree/([^/?]+)(?:\?.*)?", self.path):
            if (files := self.files(found[1], found[2])) is not None:
                entry = {"type": "file"}
                self.answer_json([entry | {"path": p, "size": len(f), "oid": etag(f)} for p, f in files.items()])
        elif found := re.fullmatch(r"/(\w+/[\w-]+)/resolve/([^/]+)/(.+)", self.path):
            if (files := self.files(found[1], found[2])) is not None:
                content = files[found[3]]
                self.server.downloaded += [found[3]] * (self.command == "GET")
                self.answer(200, content, {"X-Repo-Commit": found[2], "ETag": f'"{etag(content)}"'})
        else:
            self.answer(404, self.path.encode())

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            self.server.repositories.setdefault(name, {})
            self.answer_json({"url": f"{address}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer_json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif found := re.fullmatch(r"/api/models/(\w+/[\w-]+)/commit/main(?:\?.*)?", self.path):
            operations = [json.loads(line) for line in body.splitlines()]
            added = [operation["value"] for operation in operations if operation["key"] == "file"]
            files = {file["path"]: base64.b64decode(file["content"]) for file in added}
            oid = self.server.commit(found[1], files)
            self.answer_json({"success": True, "commitOid": oid, "commitUrl": f"{address}/{found[1]}/commit/{oid}"})
        else:
            self.answer(404, self.path.encode())

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        if name not in self.server.repositories:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in self.server.repositories[name]:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return self.server.repositories[name][revision]
        return None

    def answer_json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Start a hub and let the library import again, since it reads the hub's address when it is imported."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            monkeypatch.delitem(sys.modules, name)
        yield server
        server.shutdown()


@pytest.fixture
def shared(tmp_path):
    """Save two networks; return their folders."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        save_pretrained(build_model("ds_resnet8", width=4), folder)
    return folders


def same(a, b) -> bool:
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@needs_library
def test_download_equals_upload_at_every_revision(hub, shared):
    (shared[0] / "secret.txt").write_text("not part of the network")
    first = push_to_hub(shared[0], NAME)
    second = push_to_hub(str(shared[1]), NAME)
    assert sorted(hub.repositories[NAME][first]) == ["README.md", "config.json", "model.safetensors"]
    assert same(from_pretrained(NAME), from_pretrained(shared[1]))
    for commit, folder in ((first, shared[0]), (second, shared[1])):
        assert same(from_pretrained(NAME, revision=commit), from_pretrained(folder))
    assert not same(from_pretrained(NAME, revision=first), from_pretrained(NAME))


@needs_library
def test_only_weights_and_configuration_are_downloaded(hub, shared):
    files = {path.name: path.read_bytes() for path in shared[0].iterdir()}
    hub.commit(NAME, files | {"pytorch_model.bin": b"cos\nsystem\n", "modeling.py": b"raise SystemExit"})
    from_pretrained(NAME)
    assert sorted(hub.downloaded) == ["config.json", "model.safetensors"]
    hub.commit(NAME, {"pytorch_model.bin": b"cos\nsystem\n"})
    with pytest.raises(FileNotFoundError, match=r"contains no config\.json"):
        from_pretrained(NAME)
    assert sorted(hub.downloaded) == ["config.json", "model.safetensors"]


@needs_library
def test_missing_and_damaged_networks_are_refused(hub, shared):
    with pytest.raises(FileNotFoundError, match="no such network on the hub"):
        from_pretrained("owner/missing")
    files = {path.name: path.read_bytes() for path in shared[0].iterdir()}
    hub.commit(NAME, files)
    for revision in ("v9", "0" * 40):
        with pytest.raises(FileNotFoundError, match=f"no revision '{revision}'"):
            from_pretrained(NAME, revision=revision)
    weights = files["model.safetensors"]
    hub.commit(NAME, files | {"model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])})
    with pytest.raises(ValueError, match="digest"):
        from_pretrained(NAME)
    hub.commit(NAME, files | {"config.json": b"[" * (2 << 20)})
    with pytest.raises(ValueError, match="2,097,152 bytes"):
        from_pretrained(NAME)


@needs_library
def test_downloaded_networks_load_without_the_hub(hub, shared):
    commit = push_to_hub(shared[0], NAME)
    from_pretrained(NAME)
    hub.shutdown()
    hub.server_close()
    assert same(from_pretrained(NAME), from_pretrained(shared[0]))
    assert same(from_pretrained(NAME, revision=commit), from_pretrained(shared[0]))
    with pytest.raises(FileNotFoundError):
        from_pretrained("owner/another")
    with pytest.raises(ConnectionError, match=f"{NAME}: the hub was not reached"):
        push_to_hub(shared[0], NAME)


@needs_library
def test_damaged_folders_are_not_uploaded(hub, shared):
    (shared[0] / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        push_to_hub(shared[0], NAME)
    assert hub.repositories == {}


def test_missing_library_is_named(shared, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'multifire\[hub\]'"):
        from_pretrained(NAME)
    with pytest.raises(ValueError, match=r"pip install 'multifire\[hub\]'"):
        push_to_hub(shared[0], NAME)


@pytest.mark.parametrize("name", ["name", "a/b/c", "../name", "owner/", "owner/na me", "owner/näme"])
def test_invalid_names_are_refused(shared, name):
    with pytest.raises(ValueError, match="not a network's name"):
        push_to_hub(shared[0], name)
    with pytest.raises(ValueError, match="not a network's name"):
        from_pretrained(name, revision="main")


def test_local_folder_takes_precedence_over_the_hub(shared, monkeypatch):
    monkeypatch.chdir(shared[0].parents[1])
    assert same(from_pretrained(f"{shared[0].parent.name}/first"), from_pretrained(shared[0]))
