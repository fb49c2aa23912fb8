"""Networks to and from a hub: a server of our own, which the real library takes for Hugging Face's."""

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

NAME = "somebody/a-network"
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="the extra `hub` is not installed"
)


class Hub(ThreadingHTTPServer):
    """As much of a hub as the library needs to make a repository, commit, list files at a revision and fetch them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        """Files by path, of each revision, of each name."""
        self.fetched: list[str] = []

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
                sha = next(oid for oid, held in oids if held is files and oid != "main")
                self.say({"id": found[1], "sha": sha, "siblings": [{"rfilename": path} for path in files]})
        elif found := re.fullmatch(r"/api/models/(\w+/[\w-]+)/tree/([^/?]+)(?:\?.*)?", self.path):
            if (files := self.files(found[1], found[2])) is not None:
                entry = {"type": "file"}
                self.say([entry | {"path": p, "size": len(f), "oid": etag(f)} for p, f in files.items()])
        elif found := re.fullmatch(r"/(\w+/[\w-]+)/resolve/([^/]+)/(.+)", self.path):
            if (files := self.files(found[1], found[2])) is not None:
                content = files[found[3]]
                self.server.fetched += [found[3]] * (self.command == "GET")
                self.answer(200, content, {"X-Repo-Commit": found[2], "ETag": f'"{etag(content)}"'})
        else:
            self.answer(404, self.path.encode())

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.say({"url": f"{address}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            paths = [one["path"] for one in json.loads(body)["files"]]
            self.say({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif found := re.fullmatch(r"/api/models/(\w+/[\w-]+)/commit/main(?:\?.*)?", self.path):
            said = [json.loads(line) for line in body.splitlines()]
            files = {s["value"]["path"]: base64.b64decode(s["value"]["content"]) for s in said if s["key"] == "file"}
            oid = self.server.commit(found[1], files)
            self.say({"success": True, "commitOid": oid, "commitUrl": f"{address}/{found[1]}/commit/{oid}"})
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

    def say(self, value):
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
    """The library reads when it is imported where the hub is, so it is imported anew."""
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
    """Folders of two networks."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        save_pretrained(build_model("ds_resnet8", width=4), folder)
    return folders


def same(a, b) -> bool:
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@needs_library
def test_there_and_back_and_pinned(hub, shared):
    (shared[0] / "secret.txt").write_text("not of the network")
    first = push_to_hub(shared[0], NAME)
    second = push_to_hub(str(shared[1]), NAME)
    assert sorted(hub.repositories[NAME][first]) == ["README.md", "config.json", "model.safetensors"]
    assert same(from_pretrained(NAME), from_pretrained(shared[1]))
    for commit, folder in ((first, shared[0]), (second, shared[1])):
        assert same(from_pretrained(NAME, revision=commit), from_pretrained(folder))
    assert not same(from_pretrained(NAME, revision=first), from_pretrained(NAME))


@needs_library
def test_only_weights_and_configuration_are_fetched(hub, shared):
    files = {path.name: path.read_bytes() for path in shared[0].iterdir()}
    hub.commit(NAME, files | {"pytorch_model.bin": b"cos\nsystem\n", "modeling.py": b"raise SystemExit"})
    from_pretrained(NAME)
    assert sorted(hub.fetched) == ["config.json", "model.safetensors"]
    hub.commit(NAME, {"pytorch_model.bin": b"cos\nsystem\n"})
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        from_pretrained(NAME)
    assert sorted(hub.fetched) == ["config.json", "model.safetensors"]


@needs_library
def test_what_the_hub_has_not_or_has_damaged(hub, shared):
    with pytest.raises(FileNotFoundError, match="no such network on the hub"):
        from_pretrained("nobody/nothing")
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
def test_what_was_fetched_is_there_without_the_hub(hub, shared):
    commit = push_to_hub(shared[0], NAME)
    from_pretrained(NAME)
    hub.shutdown()
    hub.server_close()
    assert same(from_pretrained(NAME), from_pretrained(shared[0]))
    assert same(from_pretrained(NAME, revision=commit), from_pretrained(shared[0]))
    with pytest.raises(FileNotFoundError):
        from_pretrained("somebody/another")
    with pytest.raises(ConnectionError, match=f"{NAME}: the hub was not reached"):
        push_to_hub(shared[0], NAME)


@needs_library
def test_nothing_damaged_goes_up(hub, shared):
    (shared[0] / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        push_to_hub(shared[0], NAME)
    assert hub.repositories == {}


def test_without_the_library_it_says_what_to_install(shared, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'multifire\[hub\]'"):
        from_pretrained(NAME)
    with pytest.raises(ValueError, match=r"pip install 'multifire\[hub\]'"):
        push_to_hub(shared[0], NAME)


@pytest.mark.parametrize("name", ["name", "a/b/c", "../name", "owner/", "owner/na me", "owner/näme"])
def test_what_is_no_name(shared, name):
    with pytest.raises(ValueError, match="no network's name"):
        push_to_hub(shared[0], name)
    with pytest.raises(ValueError, match="no network's name"):
        from_pretrained(name, revision="main")


def test_a_folder_comes_before_the_hub(shared, monkeypatch):
    monkeypatch.chdir(shared[0].parents[1])
    assert same(from_pretrained(f"{shared[0].parent.name}/first"), from_pretrained(shared[0]))
