"""`vllm serve`, as `reftune serve --engine vllm` starts it, over HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reftune.users.store import import_folder
from tests.serving.vllm.cases import Cases

FLAGS = [
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--block-size", "32", "--served-model-name", "tiny",
    "--api-key", "secret", "--shutdown-timeout", "1",
]  # fmt: skip


class Server:
    """Started, ended and started again on one port; it serves the folder `adapters` and the store `users`."""

    def __init__(self, cases: Cases, folder: Path, cache: Path):
        self.model, self.cache = cases.model, cache
        self.adapters, self.log = folder / "adapters", folder / "log"
        shutil.copytree(cases.folder / "adapters", self.adapters)
        shutil.rmtree(self.adapters / "lora")
        self.users = import_folder(folder / "users", self.adapters / "l1", "anna 2")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self, *more: str) -> subprocess.Popen[bytes]:
        folders = [str(self.adapters), str(self.users.path)]
        code = (
            "from reftune.serving.vllm.launch import launch, supported; "
            f"assert supported({self.model!r}, {folders!r}) is None; "
            f"launch({self.model!r}, {folders!r}, {self.port}, '127.0.0.1', {[*FLAGS, *more]!r})"
        )
        environment = {
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(self.cache),
        }  # fmt: skip
        with self.log.open("w") as out:
            return subprocess.Popen(
                [sys.executable, "-c", code], cwd=self.log.parent, env=environment, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def start(self) -> None:
        self.process = self.launch()
        until = time.monotonic() + 380
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                if self("/health")[0] == 200:
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-4000:])

    def end(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal to the server's own process; its exit status."""
        assert self.process is not None
        self.process.send_signal(sent)
        return self.process.wait(60)

    def processes(self) -> list[int]:
        """Those of the server that are still there."""
        assert self.process is not None
        found = []
        for entry in Path("/proc").iterdir():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):
                continue
            if session == str(self.process.pid) and state != "Z":
                found.append(int(entry.name))
        return found

    def gone(self, seconds: float = 60) -> bool:
        """Whether all of them end within so many seconds."""
        until = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.2)
        return not left

    @contextmanager
    def slowed(self) -> Iterator[None]:
        """EngineCore runs for a fiftieth of the time, so that answers last long enough on any machine."""
        assert self.process is not None
        engine = " ".join(str(pid) for pid in self.processes() if pid != self.process.pid)
        turns = f"while kill -STOP {engine} && sleep 0.1 && kill -CONT {engine}; do sleep 0.002; done"
        with subprocess.Popen(["sh", "-c", turns]) as process:
            try:
                yield
            finally:
                process.kill()
                process.wait()
                subprocess.run(["sh", "-c", f"kill -CONT {engine}"], check=True)

    def __call__(
        self, path: str, body: Any = None, key: str | None = "secret", headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            request.add_header(name, value)
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def running(self) -> int:
        """Requests of which tokens are being written."""
        _, text = self("/metrics")
        return int(sum(map(float, re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE))))

    def complete(self, model: str, prompt: list[int], tokens: int = 8, **more: Any) -> tuple[int, Any]:
        body = {
            "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **more,
        }  # fmt: skip
        return self("/v1/completions", body)

    def tokens(self, model: str, prompt: list[int], tokens: int = 8) -> list[int]:
        status, answer = self.complete(model, prompt, tokens)
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]
