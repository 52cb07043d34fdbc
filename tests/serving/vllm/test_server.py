"""`vllm serve`, started as `reftune serve --engine vllm` starts it, over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reftune.serving.vllm.server import CurrentAdapters, served_path
from tests.serving.vllm.cases import REFT, Cases

pytestmark = pytest.mark.timeout(400)


class Server:
    def __init__(self, port: int, adapters: Path, log: Path):
        self.port, self.adapters, self.log = port, adapters, log

    def __call__(self, path: str, body: Any = None, key: str | None = "secret") -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", None if body is None else json.dumps(body).encode()
        )
        request.add_header("Content-Type", "application/json")
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

    def complete(self, model: str, prompt: list[int], tokens: int = 8, **more: Any) -> tuple[int, Any]:
        body = {
            "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **more,
        }  # fmt: skip
        return self("/v1/completions", body)


@pytest.fixture(scope="module")
def server(cases: Cases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    adapters, log = folder / "adapters", folder / "log"
    shutil.copytree(cases.folder / "adapters", adapters)
    shutil.rmtree(adapters / "lora")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "from reftune.serving.vllm.launch import launch, supported; "
        f"assert supported({cases.model!r}, [{str(adapters)!r}]) is None; "
        f"launch({cases.model!r}, [{str(adapters)!r}], {port}, '127.0.0.1', {['--dtype', 'float32', '--enforce-eager', '--max-model-len', '256', '--block-size', '32', '--served-model-name', 'tiny', '--api-key', 'secret']!r})"
    )
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(folder / "cache"),
    }  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    found = Server(port, adapters, log)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                if found("/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text()[-4000:])
        yield found
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_every_adapter_of_the_folder_is_listed_before_it_is_loaded(server: Server) -> None:
    status, listed = server("/v1/models")
    assert status == 200
    assert {card["id"] for card in listed["data"]} == {"tiny", *REFT}
    assert all(card["parent"] == "tiny" for card in listed["data"] if card["id"] != "tiny")


def test_many_clients_at_once_get_the_answers_of_transformers(server: Server, cases: Cases) -> None:
    requests = [request for request in cases.all_requests(tokens=8) if request["adapter"] != "lora"]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda r: server.complete(r["adapter"] or "tiny", r["prompt"]), requests))
    assert [answer["choices"][0]["token_ids"] for _, answer in answers] == cases.expected(requests)
    assert [answer["model"] for _, answer in answers] == [request["adapter"] or "tiny" for request in requests]


def test_keys_names_and_paths_are_checked(server: Server, cases: Cases) -> None:
    assert server("/v1/models", key=None)[0] == 401
    assert server("/v1/models", key="wrong")[0] == 401
    for name in (
        "nobody",
        "../adapters/l1",
        "l1/../l1",
        str(server.adapters / "l1"),
        "l1*",
        "x*l1",
        "l1 + f7l7_noreft",
    ):
        status, answer = server.complete(name, [5, 6, 7])
        assert status == 404, (name, answer)
    status, answer = server("/v1/load_lora_adapter", {"lora_name": "outside", "lora_path": cases.adapter("l1")})
    assert status >= 400 and "only" in answer["error"]["message"]


def test_a_strength_before_the_name_is_another_adapter(server: Server, cases: Cases) -> None:
    request = cases.request("l1_everywhere", cases.prompts[3], tokens=8)
    request["path"] += "*0.5"
    status, answer = server.complete("0.5*l1_everywhere", request["prompt"])
    assert status == 200
    assert [answer["choices"][0]["token_ids"]] == cases.expected([request])


def test_answers_are_streamed_under_the_adapters_name(server: Server) -> None:
    body = {"model": "l1", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stream": True}
    status, text = server("/v1/chat/completions", body)
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200 and events[-1] == "[DONE]"
    assert {json.loads(event)["model"] for event in events[:-1]} == {"l1"}


def test_adapters_that_are_damaged_replaced_or_deleted_do_not_stop_the_server(server: Server, cases: Cases) -> None:
    prompt = cases.prompts[3]
    damaged, changing = server.adapters / "damaged", server.adapters / "changing"
    shutil.copytree(cases.adapter("l1"), damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"nothing")
    shutil.copytree(cases.adapter("l1"), changing)
    time.sleep(1.2)  # folders are looked at once a second
    assert server.complete("damaged", prompt)[0] == 400
    before, after = cases.expected([cases.request(name, prompt, tokens=8) for name in ("l1", "f7l7_noreft")])
    assert server.complete("changing", prompt)[1]["choices"][0]["token_ids"] == before
    shutil.rmtree(changing)
    shutil.copytree(cases.adapter("f7l7_noreft"), changing)
    assert server.complete("changing", prompt)[1]["choices"][0]["token_ids"] == after
    shutil.rmtree(changing)
    time.sleep(1.2)
    assert server.complete("changing", prompt)[0] == 404
    assert server("/health")[0] == 200
    assert server.complete("l1", prompt)[1]["choices"][0]["token_ids"] == before


def test_beam_search_is_refused_in_words(server: Server, cases: Cases) -> None:
    status, answer = server.complete("l1", cases.prompts[2], use_beam_search=True, n=2)
    assert status == 400 and "beam search" in answer["error"]["message"]


def test_names_become_folders_with_their_strength_and_nothing_else(written: Cases) -> None:
    from reftune.serving.catalogue import Catalogue

    catalogue = Catalogue([written.folder / "adapters"])
    assert served_path(catalogue, "l1") == written.adapter("l1")
    assert served_path(catalogue, "0.5*l1") == written.adapter("l1") + "*0.5"
    assert [served_path(catalogue, name) for name in ("l1 + lora", "../l1", "", "*", "1e9", "2*")] == [None] * 6


def test_a_changed_folder_is_taken_up_only_when_it_is_whole(written: Cases, tmp_path: Path) -> None:
    from types import SimpleNamespace

    folder = tmp_path / "a"
    shutil.copytree(written.adapter("l1"), folder)
    table = CurrentAdapters({"a": SimpleNamespace(lora_path=str(folder))})
    assert "a" in table and "b" not in table
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    assert "a" in table
    shutil.copyfile(
        Path(written.adapter("l1_everywhere")) / "adapter_model.safetensors", folder / "adapter_model.safetensors"
    )
    assert "a" in table  # its configuration speaks of other layers
    shutil.copyfile(Path(written.adapter("l1_everywhere")) / "adapter_config.json", folder / "adapter_config.json")
    assert "a" not in table and not list(table)
    table["a"] = SimpleNamespace(lora_path=str(folder))
    shutil.rmtree(folder)
    assert "a" not in table
    table["b"] = SimpleNamespace(lora_path=written.adapter("lora"))
    assert "b" in table
