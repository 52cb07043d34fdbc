"""`reftune serve` beside `transformers serve` on the same base model: tokens a CPU second of the whole server.

Usage: python -m benchmarks.serving.beside_transformers [--rounds N] [--requests N] [--tokens N] [--at-once N ...]

Both are started as processes of one thread on SmolLM2, transformers with continuous batching and without. The same chat
prompts are streamed with greedy answers, so many at once; a round asks each server in turn. With an adapter there is
nothing to compare with: `reftune serve` answers with eight of them too. ``--out FILE`` writes JSON lines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx
import psutil

from benchmarks.serving.embedded import save_many
from reftune.models import load

PLACES = ("Kyoto", "Lagos", "Lima", "Oslo", "Quito", "Cairo", "Dublin", "Hanoi")
THINGS = ("bridges", "bread", "winters", "music", "markets", "trains", "birds", "festivals")


class Server:
    """A server in a process of its own, and the CPU seconds it has used."""

    def __init__(self, name: str, command: list[str], model: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.name, self.model, self.url = name, model, f"http://127.0.0.1:{port}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=self._said, stderr=subprocess.STDOUT
        )
        self._seen = psutil.Process(self._process.pid)

    def cpu_seconds(self) -> float:
        """Of the process and its children."""
        return sum(sum(process.cpu_times()[:2]) for process in (self._seen, *self._seen.children(recursive=True)))

    def wait(self, seconds: float = 180) -> None:
        """Until it answers."""
        until = time.time() + seconds
        while time.time() < until and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.5)
        raise SystemExit(f"{self.name} did not start.")

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)


async def ask(server: Server, models: list[str], requests: int, at_once: int, tokens: int) -> tuple[int, list[float]]:
    """Stream answers to so many prompts; return their tokens together and the seconds to each first token."""
    gate, first = asyncio.Semaphore(at_once), []

    async def one(client: httpx.AsyncClient, number: int) -> int:
        prompt = f"Tell me about the {THINGS[number % 8]} of {PLACES[number // 8 % 8]}."
        body = {
            "model": models[number % len(models)], "messages": [{"role": "user", "content": prompt}], "stream": True,
            "stream_options": {"include_usage": True}, "max_tokens": tokens, "temperature": 0, "seed": 0,
        }  # fmt: skip
        written = 0
        async with gate:
            begin, waiting = time.perf_counter(), True
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise SystemExit(f"{server.name}: {(await answer.aread()).decode()[:500]}")
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    if waiting and event["choices"] and event["choices"][0]["delta"].get("content"):
                        first.append(time.perf_counter() - begin)
                        waiting = False
                    if event.get("usage"):
                        written = event["usage"]["completion_tokens"]
        return written

    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        counts = await asyncio.gather(*(one(client, number) for number in range(requests)))
    return sum(counts), first


def main() -> None:
    """Print a JSON object a server and number at once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--at-once", type=int, nargs="+", default=(1, 8, 32))
    parser.add_argument("--out", type=Path, help="also write the JSON lines there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, adapters = Path(temporary) / "model", Path(temporary) / "adapters"
        model, tokenizer = load("smollm2")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        adapters.mkdir()
        save_many(model, adapters, {"positions": "l1", "layers_to_transform": [8], "r": 4}, 8)
        theirs = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--device", "cpu"]
        theirs += ["--dtype", "float32"]
        ours = [str(Path(sys.executable).with_name("reftune")), "serve", str(folder), "--engine", "embedded"]
        ours += ["--adapters", str(adapters), "--base-name", "base", "--no-ui"]
        servers = {
            "reftune serve": Server("reftune serve", ours, "base"),
            "transformers serve": Server("transformers serve", theirs, str(folder)),
            "transformers serve, continuous batching": Server(
                "transformers serve, continuous batching", [*theirs, "--continuous-batching"], str(folder)
            ),
        }
        cases = {name: (server, [server.model]) for name, server in servers.items()}
        cases["reftune serve, 8 adapters"] = (servers["reftune serve"], [str(number) for number in range(8)])
        lines: list[str] = []
        try:
            for server in servers.values():
                server.wait()
            for server, models in cases.values():
                asyncio.run(ask(server, models, 2, 2, 2))
            for at_once in options.at_once:
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
                for _ in range(options.rounds):
                    for name, (server, models) in cases.items():
                        before = server.cpu_seconds()
                        requests = max(at_once, options.requests // 4) if at_once == 1 else options.requests
                        count, first = asyncio.run(ask(server, models, requests, at_once, options.tokens))
                        found[name].append((count / (server.cpu_seconds() - before), median(first)))
                for name, rounds in found.items():
                    speed, first = (round(median(values), 3) for values in zip(*rounds, strict=True))
                    said = {"server": name, "at once": at_once, "tokens a CPU second": speed, "first token, s": first}
                    lines.append(json.dumps(said))
                    sys.stdout.write(lines[-1] + "\n")
                    sys.stdout.flush()
                    if options.out:
                        options.out.write_text("\n".join(lines) + "\n")
        finally:
            for server in servers.values():
                server.stop()


if __name__ == "__main__":
    main()
