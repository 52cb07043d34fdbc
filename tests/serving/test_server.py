"""`reftune serve` as a process of its own, with a tiny model: its life, its signals, its clients, its files."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from reftune.cli import app
from tests.cli.tiny_folder import save_tiny_model
from tests.serving.tiny_adapters import answers, save_adapter

POSITIONS = {"last": "l1", "on": "l1+generated", "every": "all", "whole": "prompt", "ends": "f2+l2"}
CHAT: dict[str, Any] = {
    "model": "last",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 8,
    "temperature": 0,
}


class Served:
    """A running server."""

    def __init__(self, model: Path, adapters: Path, *flags: str, **environment: str):
        command = [sys.executable, "-W", "ignore", "-c", "from reftune.cli import main; main()", "serve", str(model)]
        command += ["--adapters", str(adapters), "--engine", "embedded", "--port", "0", *flags]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | environment,
        )  # fmt: skip
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if '"ready"' in line:
                break
        assert self.lines and '"ready"' in self.lines[-1], self.lines
        self.url = json.loads(self.lines[-1])["address"]
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()), daemon=True)
        self.reader.start()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        for _ in range(200):
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/ready").status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError("the server was never ready")

    def chat(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=CHAT | body)

    def text(self, **body: Any) -> str:
        answer = self.chat(**body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    def metric(self, name: str) -> float:
        found = [line for line in self.client.get("/metrics").text.splitlines() if line.startswith(f"reftune_{name} ")]
        return float(found[0].split()[-1])

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.client.close()
        self.process.send_signal(how)
        status = self.process.wait(40)
        self.reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    save_tiny_model(folder / "model")
    for seed, (name, positions) in enumerate(POSITIONS.items()):
        save_adapter(folder / "model", folder / "adapters" / name, seed, positions=positions)
    return folder


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[Served]:
    served = Served(files / "model", files / "adapters", "--max-requests", "12")
    yield served
    if served.process.poll() is None:
        assert served.end() == 0


def test_answers_are_those_of_generate_for_every_kind_of_position(server: Served, files: Path) -> None:
    for name in (None, *POSITIONS):
        prompts = ["a", "hello there", "hello there, how do you do?"]
        rows = [server.client.post("/tokenize", json={"model": "model", "prompt": p}).json()["tokens"] for p in prompts]
        wanted = answers(files / "model", None if name is None else files / "adapters" / name, rows, 10)
        body = {"model": name or "model", "prompt": rows, "max_tokens": 10, "temperature": 0, "logprobs": 0}
        choices = server.client.post("/v1/completions", json=body).json()["choices"]
        lengths = [len(choice["logprobs"]["tokens"]) for choice in choices]
        assert lengths == [len(row) for row in wanted]
        texts = server.client.post("/detokenize", json={"tokens": wanted[1]}).json()["prompt"]
        assert choices[1]["text"] == texts.replace("<|im_end|>", "")


def test_edited_tokens_of_a_prompt_are_told(server: Served) -> None:
    def edited(model: str) -> list[int]:
        return server.client.post("/tokenize", json={"model": model, "prompt": "abcdef"}).json()["edited"]

    assert edited("last") == edited("on") == [5] and edited("ends") == [0, 1, 4, 5]
    assert edited("every") == edited("whole") == list(range(6)) and edited("model") == []


def test_strengths_and_expressions_change_the_answer_as_they_say(server: Served) -> None:
    def logprob(**body: Any) -> float:
        answer = server.chat(**body, logprobs=True, top_logprobs=0, max_tokens=1)
        return answer.json()["choices"][0]["logprobs"]["content"][0]["logprob"]

    base = logprob(model="model")
    assert logprob(model="last", scale=0) == pytest.approx(base, abs=1e-5)
    assert logprob(model="0*last - 0*on") == pytest.approx(base, abs=1e-5)
    assert logprob(model="0.5*last") == pytest.approx(logprob(model="last", scale=0.5), abs=1e-5)
    assert logprob(model="last") != pytest.approx(base, abs=1e-3)


def test_a_seed_gives_the_same_answer_and_another_seed_another(server: Served) -> None:
    first, again, other = (server.text(temperature=1.5, seed=seed, max_tokens=24) for seed in (7, 7, 8))
    assert first == again != other


def test_a_flood_is_refused_and_the_server_goes_on(server: Served) -> None:
    with httpx.Client(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=40)) as client:
        statuses: list[int] = []
        body = CHAT | {"max_tokens": 150, "logit_bias": {"256": -100}}
        threads = [
            threading.Thread(target=lambda: statuses.append(client.post("/v1/chat/completions", json=body).status_code))
            for _ in range(36)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200, 429} and statuses.count(200) >= 12
    assert server.text() and server.metric("running_requests") == 0


def test_a_client_that_goes_away_is_forgotten(server: Served) -> None:
    body = CHAT | {"max_tokens": 200, "logit_bias": {"256": -100}}
    for stream in (True, False):
        before = server.metric("running_requests")
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            data = json.dumps(body | {"stream": stream}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            if stream:
                connection.recv(200)
            else:
                time.sleep(0.1)
        for _ in range(100):
            if server.metric("running_requests") == before:
                break
            time.sleep(0.05)
        assert server.metric("running_requests") == before == 0


def test_slow_and_broken_clients_do_not_stop_others(server: Served) -> None:
    port = int(server.url.rpartition(":")[2])
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for connection in slow:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n")
    for junk in (
        b"\x00\xff" * 200,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as connection, contextlib.suppress(OSError):
            connection.sendall(junk)
            connection.settimeout(5)
            assert connection.recv(100).startswith(b"HTTP/1.1 4")
    assert server.text()
    for connection in slow:
        connection.close()


def test_a_damaged_adapter_is_an_error_and_a_mended_one_is_served(server: Served, files: Path) -> None:
    folder = files / "adapters" / "new"
    shutil.copytree(files / "adapters" / "last", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    time.sleep(1.1)
    assert server.chat(model="new").status_code == 400
    assert server.text(model="last")
    shutil.copy(files / "adapters" / "every" / "adapter_model.safetensors", folder)
    shutil.copy(files / "adapters" / "every" / "adapter_config.json", folder)
    assert server.text(model="new") == server.text(model="every")
    shutil.rmtree(folder)
    time.sleep(1.1)
    assert server.chat(model="new").status_code == 404


def test_sigterm_ends_what_has_begun(files: Path) -> None:
    served = Served(files / "model", files / "adapters")
    found: list[httpx.Response] = []
    body = CHAT | {"max_tokens": 180, "logit_bias": {"256": -100}}
    asking = threading.Thread(target=lambda: found.append(served.client.post("/v1/chat/completions", json=body)))
    asking.start()
    while served.metric("running_requests") == 0:
        time.sleep(0.01)
    served.process.send_signal(signal.SIGTERM)
    asking.join()
    assert served.end() == 0
    assert found[0].status_code == 200 and found[0].json()["usage"]["completion_tokens"] == 180


def test_a_killed_server_starts_again_and_answers_the_same(files: Path) -> None:
    first = Served(files / "model", files / "adapters")
    said = first.text(model="on")
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    second = Served(files / "model", files / "adapters", REFTUNE_API_KEYS="a-long-key admin")
    second.client.headers["authorization"] = "Bearer a-long-key"
    assert second.text(model="on") == said
    assert httpx.get(f"{second.url}/v1/models").status_code == 401
    second.end()


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(part) for part in arguments])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], ["without a key"]),
        (["--api-keys", "nowhere.txt"], ["nowhere.txt", "cannot be read"]),
        (["--adapters", "nowhere"], ["nowhere", "no such folder"]),
        (["--adapters", __file__], ["test_server.py", "is a file"]),
        (["--max-new-tokens", "0"], ["at least 1"]),
        (["--timeout", "nan"], ["timeout"]),
        (["--port", "99999"], ["65535"]),
        (["--engine", "other"], ["auto, embedded, vllm"]),
        (["--engine", "embedded", "--tensor-parallel-size", "2"], ["--tensor-parallel-size"]),
        (["--base-name", "last"], ["another --base-name"]),
    ],
)
def test_what_cannot_be_served_is_one_message(files: Path, flags: list[str], words: list[str]) -> None:
    result = cli("serve", files / "model", "--adapters", files / "adapters", "--port", 0, *flags)
    assert result.exit_code == 2, result.output
    assert all(word in result.output for word in words) and "Traceback" not in result.output


def test_a_taken_port_is_told_before_the_model_is_loaded(files: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = cli("serve", files / "nowhere", "--engine", "embedded", "--port", taken.getsockname()[1])
    assert result.exit_code == 2 and "give another --port" in result.output
