"""`fusionkit serve`: what is said before anything is served; `tests/serving` serves."""

import signal
import socket
from pathlib import Path

import pytest
from program import run
from talking import bundle


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Servers are made, and not started; with what they were made."""
    pytest.importorskip("litserve", reason="pip install '.[serve]'")
    from fusionkit.serving.server import Server

    made: list[object] = []
    monkeypatch.setattr(Server, "__init__", lambda self, *given: made.extend(given))
    monkeypatch.setattr(Server, "serve", lambda self: None)
    return made


def test_the_help_is_short() -> None:
    said = run("serve", "--help")
    assert said.startswith("usage: fusionkit serve BUNDLE [options]")
    assert len(said.splitlines()) <= 100


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--host", "example.org"), 2, "--host: expected one of 127.0.0.1, 0.0.0.0, ::, got"),
        (("--port", "80"), 2, "--port: expected a port from 1024 to 65535, got 80"),
        (("--max-batch", "0"), 2, "--max_batch: expected at least 1, got 0"),
        (("--timeout", "0"), 2, "--timeout: expected more than 0, got 0.0"),
        (("--prot", "80"), 2, "no option 'prot'; did you mean 'port'?"),
        (("--tasks-root", "nowhere"), 1, "--tasks-root nowhere: no such folder"),
    ],
)
def test_what_can_not_be_is_refused_at_once(
    tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    made = bundle("gpt2", tmp_path)
    assert message in run("serve", made.path, *options, code=code)


def test_a_bundle_that_is_none_is_told(tmp_path: Path) -> None:
    assert "manifest.json" in run("serve", tmp_path, code=1)


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    made = bundle("gpt2", tmp_path)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = run("serve", made.path, "--port", port, code=1)
    assert f"port {port} of 127.0.0.1 can't be had (Address already in use)" in said
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_who_opens_it_to_others_is_warned_where_no_key_is_set(
    tmp_path: Path, stopped: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bundle("gpt2", tmp_path)
    monkeypatch.delenv("FUSIONKIT_API_KEYS", raising=False)
    warning = "note: anyone who reaches 0.0.0.0:8000 may ask"
    assert warning in run("serve", made.path, "--host", "0.0.0.0")
    assert "note" not in run("serve", made.path)
    monkeypatch.setenv("FUSIONKIT_API_KEYS", "one, two")
    assert "note" not in run("serve", made.path, "--host", "0.0.0.0")
    settings = stopped[-3]
    assert settings.keys.allow(b"Bearer two")  # type: ignore[attr-defined]
    assert not settings.keys.allow(b"Bearer one, two")  # type: ignore[attr-defined]
    assert not settings.admin  # type: ignore[attr-defined]
