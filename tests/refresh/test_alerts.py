"""Alerts against a real command and a real server: what they are given, and that none of them fails an update."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest
from store_records import measured, outcome, version

from continual.refresh.alerts import tell
from continual.refresh.prometheus import exposition
from continual.refresh.records import Check, Found, Outcome, read_record
from continual.refresh.rules import AlertRules

LIVE = version(3, "mar", (measured("jan", 0.9, 0.95), measured("feb", 0.8, 0.7), measured("chat", 0.6, probe=True)))


@dataclass
class Server:
    """What a local server was sent, and how it answers."""

    address: str = ""
    status: int = 200
    location: str = ""
    wait: float = 0.0
    drip: bool = False
    got: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state, over = Server(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            state.got.append((self.command, self.path, dict(self.headers), body))
            over.wait(state.wait)
            while state.drip and not over.wait(0.05):
                self.wfile.write(b"H")
            self.send_response(state.status)
            if state.location:
                self.send_header("Location", state.location)
            self.end_headers()

        def do_POST(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                assert state.wait or state.drip

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{http.server_port}/hook/secret"
    yield state
    over.set()
    http.shutdown()
    http.server_close()
    thread.join(5)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_is_given_the_outcome(tmp_path: Path) -> None:
    rules = AlertRules(
        command=[*python("import sys; open('told', 'w').write(sys.stdin.read() + sys.argv[1])"), "$HOME; x"]
    )
    assert tell(outcome(sentence="'März' fell."), rules, tmp_path) == []
    text = (tmp_path / "told").read_text(encoding="utf-8")
    assert text.endswith("$HOME; x")
    assert read_record(Outcome, text.removesuffix("$HOME; x"), "it") == outcome(sentence="'März' fell.")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (
            python("import sys; print('no mail\\nserver'); sys.exit(3)"),
            "it ended with status 3 and said 'no mail server'",
        ),
        (python("import sys; sys.exit(4)"), "it ended with status 4"),
        (python("import sys; sys.exit('x' * 5000)"), f"it ended with status 1 and said '…{'x' * 200}'"),
        (["no-such-program-at-all"], "No such file or directory"),
        (["nul\0byte"], "embedded null byte"),
    ],
)
def test_a_command_that_fails_is_a_sentence(tmp_path: Path, command: list[str], why: str) -> None:
    (sentence,) = tell(outcome(), AlertRules(command=command), tmp_path)
    assert (
        sentence.startswith(f"the command '{command[0]}' was not told: ") and why in sentence and sentence.endswith(".")
    )


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import time, pathlib; time.sleep(1.5); pathlib.Path('late').touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    (sentence,) = tell(outcome(), AlertRules(command=python(code), timeout=0.5), tmp_path)
    assert "did not end within 0.5 s" in sentence and time.monotonic() - start < 10
    time.sleep(1.6)
    assert not (tmp_path / "late").exists()


def test_a_command_may_leave_something_in_the_background(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3)'])"
    start = time.monotonic()
    assert tell(outcome(), AlertRules(command=python(code), timeout=2.5), tmp_path) == []
    assert time.monotonic() - start < 2.5


def test_the_web_hook_is_posted_the_outcome(server: Server, tmp_path: Path) -> None:
    assert tell(outcome(), AlertRules(webhook=server.address), tmp_path) == []
    ((method, path, headers, body),) = server.got
    assert (method, path, headers["Content-Type"]) == ("POST", "/hook/secret", "application/json")
    assert read_record(Outcome, body, "it") == outcome()


def test_a_proxy_is_not_asked_for_this_machine(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert tell(outcome(), AlertRules(webhook=server.address), tmp_path) == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_redirects_are_not_followed(server: Server, tmp_path: Path, status: int, scheme: str) -> None:
    (tmp_path / "file").write_text("x")
    server.status = status
    server.location = f"{server.address}/other" if scheme == "http" else f"file://{tmp_path}/file"
    (sentence,) = tell(outcome(), AlertRules(webhook=server.address), tmp_path)
    assert f"it redirects (status {status})" in sentence and len(server.got) == 1


def test_a_web_hook_that_fails_is_a_sentence_without_its_secret(server: Server, tmp_path: Path) -> None:
    server.status = 500
    nobody = "http://127.0.0.1:1/secret"
    sentences = [tell(outcome(), AlertRules(webhook=one), tmp_path)[0] for one in (server.address, nobody)]
    assert "answered with status 500" in sentences[0] and "refused" in sentences[1]
    for address in ("http://localhost:80@elsewhere.example/secret", "http://localhost/a secret"):
        sentences += tell(outcome(), AlertRules(webhook=address), tmp_path)
        assert "its address is not valid" in sentences[-1]
    sentences += tell(outcome(), AlertRules(webhook="https://[secret"), tmp_path)
    assert "an address that is not valid was not told" in sentences[-1]
    assert not any("secret" in sentence or "hook/" in sentence for sentence in sentences)


@pytest.mark.parametrize("drip", [False, True])
def test_a_web_hook_that_does_not_answer_is_left(server: Server, tmp_path: Path, drip: bool) -> None:
    server.wait, server.drip = (0.0, True) if drip else (30.0, False)
    start = time.monotonic()
    (sentence,) = tell(outcome(), AlertRules(webhook=server.address, timeout=0.4), tmp_path)
    assert time.monotonic() - start < 5 and ("within 0.4 s" in sentence or "timed out" in sentence)


@pytest.mark.parametrize("happened", ["promoted", "failed", "cannot tell", "stopped", "known"])
def test_who_hears_of_what(tmp_path: Path, happened: Any) -> None:
    rules = AlertRules(
        command=python("open('told', 'w')"), prometheus="out/continual.prom", outcomes=("failed", "stopped")
    )
    assert tell(outcome(happened=happened), rules, tmp_path) == []
    assert (tmp_path / "told").exists() == (happened in ("failed", "stopped"))
    assert (tmp_path / "out/continual.prom").exists() == (happened != "known")


def test_one_that_fails_keeps_no_other_from_being_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rules = AlertRules(command=["no-such-program-at-all"], webhook=server.address, prometheus="file/x.prom")
    sentences = tell(outcome(), rules, tmp_path)
    assert len(sentences) == 2 and "could not be written" in sentences[1] and len(server.got) == 1
    hostile = tell(outcome(store="\ud800"), AlertRules(command=python("1"), prometheus="x.prom"), tmp_path)
    assert len(hostile) == 2


Parsed = dict[str, dict[tuple[tuple[str, str], ...], float]]


def parse(text: str) -> Parsed:
    """A strict reader of the text format: HELP, then TYPE, then the samples of each name, all together."""
    found: Parsed = {}
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    state: Literal["help", "type", "sample"] = "help"
    name = ""
    for line in lines:
        if line.startswith("# HELP "):
            assert state in ("help", "sample"), line
            name, state = line.split(" ")[2], "type"
            assert name not in found and name.replace("_", "").isalnum()
            found[name] = {}
        elif line.startswith("# TYPE "):
            assert state == "type" and line == f"# TYPE {name} gauge"
            state = "sample"
        else:
            assert state == "sample" and line.startswith(name + "{"), line
            labels, rest = _labels(line[len(name) + 1 :])
            assert rest.startswith(" ") and labels not in found[name]
            found[name][labels] = float(rest[1:])
    assert all(found.values())
    return found


def _labels(text: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """Labels up to the closing brace, and what is left."""
    found = []
    while True:
        key, text = text.split('="', 1)
        assert key.isidentifier()
        value = ""
        while text[0] != '"':
            if text[0] == "\\":
                value, text = value + {"\\": "\\", '"': '"', "n": "\n"}[text[1]], text[2:]
            else:
                value, text = value + text[0], text[1:]
        found.append((key, value))
        text = text[1:]
        if text[0] == "}":
            return tuple(found), text[1:]
        assert text[0] == ","
        text = text[1:]


def values(found: Parsed, name: str) -> dict[str, float]:
    """Value of each sample by its labels but the store."""
    return {",".join(text for key, text in labels if key != "store"): value for labels, value in found[name].items()}


def test_the_prometheus_file_says_what_is_live(tmp_path: Path) -> None:
    assert tell(outcome(), AlertRules(prometheus="continual.prom"), tmp_path, LIVE) == []
    assert [path.name for path in tmp_path.iterdir()] == ["continual.prom"]
    found = parse((tmp_path / "continual.prom").read_text(encoding="utf-8"))
    assert all(labels[0] == ("store", "intents") for samples in found.values() for labels in samples)
    assert values(found, "continual_live_version") == {"": 3}
    assert values(found, "continual_score") == {"jan": 0.9, "feb": 0.8}
    assert values(found, "continual_mean_score")[""] == pytest.approx(0.85)
    assert values(found, "continual_probe_score") == {"chat": 0.6}
    assert values(found, "continual_worst_drop")[""] == pytest.approx(0.05)
    assert values(found, "continual_gate_answer") == {"pass": 1, "fail": 0, "cannot tell": 0}
    assert values(found, "continual_last_update") == {"promoted": 1, "failed": 0, "cannot tell": 0, "stopped": 0}
    assert values(found, "continual_update_seconds") == {"": 12.5} and values(found, "continual_update_attempts") == {
        "": 2
    }
    assert values(found, "continual_state_bytes") == {k: float(v) for k, v in LIVE[1].bytes.items()}
    assert abs(values(found, "continual_last_update_timestamp_seconds")[""] - time.time()) < 60
    assert values(found, "continual_live_created_timestamp_seconds") == {"": 1740981600.0}


def test_the_gate_s_answer_is_that_of_the_worst_check() -> None:
    worst = Check(rule="floor", name="jan", answer="fail", value=0.1, limit=0.2)
    failed = parse(exposition(outcome(happened="failed", worst=worst), LIVE, 1.5))
    assert values(failed, "continual_gate_answer")["fail"] == 1
    assert values(failed, "continual_last_update_timestamp_seconds") == {"": 1.5}
    unsure = worst.model_copy(update={"answer": "cannot tell"})
    assert values(parse(exposition(outcome(worst=unsure), LIVE, 0)), "continual_gate_answer")["cannot tell"] == 1
    first = parse(exposition(outcome(worst=None), LIVE, 0))
    assert values(first, "continual_gate_answer")["pass"] == 1


def test_an_update_that_drift_stopped_before_any_version() -> None:
    shift = Found(kind="label-shift", sentence="x", effect=0.4)
    found = parse(exposition(outcome(happened="stopped", live=None, version=None, worst=None, found=(shift,)), None, 0))
    assert values(found, "continual_drift_effect")["label-shift"] == 0.4
    assert values(found, "continual_drift_effect")["leakage"] == 0
    assert not {"continual_gate_answer", "continual_live_version", "continual_score"} & set(found)


def test_hostile_names_are_escaped() -> None:
    names = ['a"} 1\nevil 2', "back\\slash", "\\n", "数", '","store="']
    live = version(1, "x", tuple(measured(name, 0.5) for name in names), created="no date")
    found = parse(exposition(outcome(store='s"\n\\'), live, math.pi))
    assert [dict(labels)["experience"] for labels in found["continual_score"]] == names
    assert {dict(labels)["store"] for labels in found["continual_score"]} == {'s"\n\\'}
    assert "continual_live_created_timestamp_seconds" not in found


def test_an_experience_that_was_not_measured_has_no_sample() -> None:
    live = version(1, "x", (measured("jan", None), measured("feb", None, 0.5)))
    assert not {"continual_score", "continual_worst_drop", "continual_mean_score"} & set(
        parse(exposition(outcome(), live, 0))
    )


def test_the_outcome_is_plain_json() -> None:
    assert json.loads(outcome().model_dump_json())["worst"]["answer"] == "pass"
