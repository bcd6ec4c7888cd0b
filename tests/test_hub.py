"""A name that is no folder: what is asked of the hub, for how long, and what is said then."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

import hybrimoe
from hybrimoe import hub
from hybrimoe.cli.main import main
from hybrimoe.errors import CheckpointError, CheckpointNotFoundError
from paths import TINY_MOE

DOORS = {
    "plan": lambda name, **place: hybrimoe.plan(name, **place),
    "from_pretrained": lambda name, **place: hybrimoe.from_pretrained(name, **place),
    "gguf": lambda name: hybrimoe.from_pretrained(name, gguf_file="a.gguf"),
}


class Answer(BaseHTTPRequestHandler):
    """Says the same to everything. said: status and X-Error-Code, set for each server."""

    said: tuple[int, str] = (404, "")

    def do_HEAD(self) -> None:
        status, code = self.said
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def ask(monkeypatch):
    """`ask(address)` makes that address the hub."""

    def ask(address: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub, "PATIENCE_S", 0.4)
        monkeypatch.setattr(hub, "CACHED_PATIENCE_S", 0.2)
        monkeypatch.delenv(hub.TIMEOUT, raising=False)

    return ask


@pytest.fixture
def answering(ask) -> Iterator:
    """`answering(status, code)` makes a server that says that the hub."""
    servers = []

    def start(status: int, code: str = "") -> None:
        handler = type("Handler", (Answer,), {"said": (status, code)})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,)).start()
        ask(f"http://127.0.0.1:{servers[-1].server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def closed(ask) -> None:
    """Nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ask(f"http://127.0.0.1:{port}")


@pytest.fixture
def silent(ask) -> Iterator:
    """A server that takes a call and never answers it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ask(f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


@pytest.fixture
def lost(ask, monkeypatch) -> Iterator[list]:
    """A name server that never answers; what it was asked."""
    ask("http://hub.invalid")
    asked: list = []
    ended = threading.Event()

    def hang(host, *_, **__):
        asked.append(host)
        if threading.current_thread() is not threading.main_thread():
            ended.wait(30)
        raise socket.gaierror("the name server is silent")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    yield asked
    ended.set()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache that holds owner/tiny, which is the bundled model."""
    repository = tmp_path / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(TINY_MOE, repository / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots" / "abc"


def failure(name: str, door: str) -> str:
    """What a door says about a name, in time."""
    start = time.monotonic()
    with pytest.raises(CheckpointNotFoundError) as error:
        DOORS[door](name)
    assert time.monotonic() - start < 5
    return str(error.value)


@pytest.mark.parametrize("door", ["plan", "from_pretrained", "gguf"])
@pytest.mark.parametrize("network", ["closed", "silent", "lost"])
def test_without_a_network_it_says_so_in_time(request, network, door):
    request.getfixturevalue(network)
    if door == "gguf":
        pytest.importorskip("gguf")
    said = failure("nobody/has-this", door)

    assert "'nobody/has-this' is no folder here and not in the cache" in said
    assert f"the hub ({constants.ENDPOINT}) cannot be reached" in said
    assert ("HF_HUB_ETAG_TIMEOUT=30" in said) == (network != "closed")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, "RepoNotFound"), "the hub has no model of that name"),
        ((404, ""), "the hub has no model of that name"),
        ((401, "RepoNotFound"), "if it is private, log in"),
        ((401, ""), "if it is private, log in"),
        ((401, "GatedRepo"), "is gated: ask for access at http"),
        ((403, "GatedRepo"), "is gated: ask for access at http"),
        ((403, ""), "your token lacks that permission"),
        ((404, "RevisionNotFound"), "has no revision"),
        ((503, ""), "the hub answers HTTP 503: try again later"),
        ((429, ""), "the hub answers HTTP 429"),
    ],
)
def test_what_the_hub_answers_is_told_apart(answering, answer, said):
    answering(*answer)
    for door in ("plan", "from_pretrained"):
        assert said in failure("nobody/has-this", door)
        assert "cannot be reached" not in failure("nobody/has-this", door)


def test_a_cached_model_needs_no_network(lost, cache):
    assert hybrimoe.plan("owner/tiny").checkpoint.place == "cache"
    assert lost == []
    model = hybrimoe.from_pretrained("owner/tiny", weights="int4")

    assert len(model.hybrimoe.layers) == 12
    assert len(lost) == 1  # the hub may have a newer one


def test_a_cached_model_is_generated_from(closed, cache, capsys):
    quick = ("--max-new-tokens", "2", "--greedy", "--weights", "int4")
    assert main(["generate", "owner/tiny", "--prompt", "def main(", *quick]) == 0

    out, err = capsys.readouterr()
    assert out.strip()
    assert "Retrying" not in err


def test_a_part_in_the_cache_says_what_is_missing(closed, cache):
    (cache / "model.safetensors").unlink()
    for door in ("plan", "from_pretrained"):
        with pytest.raises(CheckpointError, match="safetensors"):
            DOORS[door]("owner/tiny")


def test_offline_mode_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in failure("nobody/has-this", "plan")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointNotFoundError, match="local_files_only=True"):
        hybrimoe.from_pretrained("nobody/x", local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["./foo", "../foo", "~/foo", "/no/where", "a/b/c", "models\\qwen"])
@pytest.mark.parametrize("door", ["plan", "from_pretrained"])
def test_a_path_to_nowhere_is_called_that(name, door):
    assert failure(name, door) == f"no folder {name!r}"


@pytest.mark.parametrize("name", ["no/x.gguf", "./a/b/x.gguf", "a/b/c/x.gguf"])
def test_a_file_that_is_not_there_is_called_that(name):
    assert failure(name, "plan") == f"no file {name!r}"


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    assert failure(str(path), "plan") == f"no file {str(path)!r}"
    path.touch()
    assert "is a file, no folder with a checkpoint" in failure(str(path), "plan")
    (tmp_path / "a.gguf").touch()
    assert "gguf_file='a.gguf'" in failure(str(tmp_path / "a.gguf"), "from_pretrained")


@pytest.mark.parametrize("command", ["plan", "generate", "bench", "trace"])
def test_commands_end_with_code_2_and_one_line(command, closed, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("x\n")
    more = {
        "generate": ["--prompt", "x"],
        "trace": ["--prompts", str(tmp_path / "p.txt"), "-o", str(tmp_path / "t.npz")],
    }
    for name, said in (("nobody/x", "cannot be reached"), ("./x", "no folder './x'")):
        assert main([command, name, *more.get(command, [])]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"hybrimoe {command}: ")
        assert said in err
        assert len(err.splitlines()) == 1
