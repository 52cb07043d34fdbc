"""`vllm serve`, started as `reftune serve --engine vllm` starts it, over HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reftune.serving.vllm.server import CurrentAdapters, served_path
from reftune.users.store import import_folder
from tests.serving.vllm.cases import REFT, Cases, turns
from tests.serving.vllm.served import Server

pytestmark = pytest.mark.timeout(400)


def test_every_adapter_of_the_folder_is_listed_before_it_is_loaded(server: Server) -> None:
    status, listed = server("/v1/models")
    assert status == 200
    assert sorted(card["id"] for card in listed["data"]) == sorted(["tiny", "anna 2", *REFT])
    assert all(card["parent"] == "tiny" for card in listed["data"] if card["id"] != "tiny")


def test_many_clients_at_once_get_the_answers_of_transformers(server: Server, cases: Cases) -> None:
    requests = [request for request in cases.all_requests(tokens=8) if request["adapter"] != "lora"]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda r: server.complete(r["adapter"] or "tiny", r["prompt"]), requests))
    assert [answer for status, answer in answers if status != 200] == []
    assert [answer["choices"][0]["token_ids"] for _, answer in answers] == cases.expected(requests)
    assert [answer["model"] for _, answer in answers] == [request["adapter"] or "tiny" for request in requests]


def test_turns_of_a_chat_are_those_of_transformers(server: Server, cases: Cases) -> None:
    """The prefix cache is asked in a process of its own, which has to know of the edits."""
    for batch in turns(cases):
        answers = [server.tokens(request["adapter"] or "tiny", request["prompt"], 12) for request in batch]
        assert answers == cases.expected(batch)


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
    assert status == 400 and "only" in answer["error"]["message"]


def test_a_strength_before_the_name_is_another_adapter(server: Server, cases: Cases) -> None:
    request = cases.request("l1_everywhere", cases.prompts[3], tokens=8)
    request["path"] += "*0.5"
    status, answer = server.complete("0.5*l1_everywhere", request["prompt"])
    assert status == 200
    assert [answer["choices"][0]["token_ids"]] == cases.expected([request])


def test_users_of_a_store_answer_as_their_folders_would(server: Server, cases: Cases) -> None:
    prompt, base = cases.prompts[0], server.tokens("tiny", cases.prompts[0])
    [right] = cases.expected([cases.request("l1", prompt, 8)])
    assert server.tokens("anna 2", prompt) == right != base
    assert server.tokens("0.5*anna 2", prompt) == server.tokens("0.5*l1", prompt)
    tensors = server.users.read("anna 2")
    server.users.write({"anna 2": {name: t if name.endswith("rotation") else -4 * t for name, t in tensors.items()}})
    assert server.tokens("anna 2", prompt) not in (right, base)
    server.users.import_folder(server.adapters / "l1", "bob")
    assert server.tokens("bob", prompt) == right
    server.users.delete("bob")
    assert server.complete("bob", prompt)[0] == 404
    server.users.import_folder(server.adapters / "l1", "anna 2")
    assert server.tokens("anna 2", prompt) == right


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


def replaced_by(source: str, target: Path) -> None:
    """File by file, each at once, as a training does."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(Path(source) / name, target / f".{name}")
        (target / f".{name}").replace(target / name)


@pytest.mark.parametrize("what", ["replaced", "damaged", "deleted"])
def test_requests_in_flight_keep_the_adapter_that_they_began_with(what: str, server: Server, cases: Cases) -> None:
    hit = any(change_in_flight(what, server, cases, server.adapters / f"used_{what}_{attempt}") for attempt in range(6))
    assert hit, "answers had ended before the folder changed, six times"


def change_in_flight(what: str, server: Server, cases: Cases, folder: Path) -> bool:
    """Whether a folder changed while all requests that name it were being answered; the answers are checked if so."""
    prompt, new = cases.prompts[3], 200
    shutil.copytree(cases.adapter("all_orthogonal"), folder)
    time.sleep(1.2)
    long = cases.request("all_orthogonal", prompt, tokens=new)
    others = [cases.request(name, prompt, tokens=new) for name in ("l1", "l1_generated_consreft")]
    before, after = cases.expected([long])[0], cases.expected([cases.request("f7l7_noreft", prompt, tokens=8)])[0]
    assert server.tokens(folder.name, prompt) == before[:8]
    with ThreadPoolExecutor(40) as clients:
        with server.slowed():
            flying = [clients.submit(server.tokens, folder.name, prompt, new) for _ in range(24)]
            beside = [clients.submit(server.tokens, request["adapter"], prompt, new) for request in others]
            while server.running() < len(flying) + len(beside) and not any(future.done() for future in flying):
                pass
            if what == "replaced":
                replaced_by(cases.adapter("f7l7_noreft"), folder)
            elif what == "damaged":
                (folder / "adapter_model.safetensors").write_bytes(b"half of it")
            else:
                shutil.rmtree(folder)
            still = server.running()
        if still != len(flying) + len(beside):
            return False
        time.sleep(1.2)
        status, answer = server.complete(folder.name, prompt)
        assert [future.result() for future in flying] == [before] * len(flying)
        assert [future.result() for future in beside] == cases.expected(others)
    if what == "deleted":
        assert status == 404, answer
    else:  # a damaged folder is taken up when it is whole again
        assert answer["choices"][0]["token_ids"] == (after if what == "replaced" else before[:8])
    return True


def test_the_reason_of_a_refusal_reaches_the_client(server: Server, cases: Cases) -> None:
    folder = server.adapters / "inside"
    shutil.copytree(cases.adapter("l1"), folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"component": "mlp_output"}))
    time.sleep(1.2)
    for status, answer in (
        server.complete("inside", [5, 6, 7]),
        server("/v1/load_lora_adapter", {"lora_name": "other", "lora_path": str(folder)}),
    ):
        assert status == 400 and "component='mlp_output': vLLM can edit block_output only" in answer["error"]["message"]
    shutil.rmtree(folder)


def test_beam_search_is_refused_in_words(server: Server, cases: Cases) -> None:
    status, answer = server.complete("l1", cases.prompts[2], use_beam_search=True, n=2)
    assert status == 400 and "beam search" in answer["error"]["message"]


def test_names_become_folders_with_their_strength_and_nothing_else(written: Cases, tmp_path: Path) -> None:
    from reftune.serving.catalogue import Catalogue

    catalogue = Catalogue([written.folder / "adapters"])
    assert served_path(catalogue, "l1") == written.adapter("l1")
    assert served_path(catalogue, "0.5*l1") == written.adapter("l1") + "*0.5"
    store = import_folder(tmp_path / "users", written.adapter("l1"), "anna 2")
    users = Catalogue([store.path])
    assert [served_path(users, name) for name in ("anna 2", "-0.5*anna 2", "bob")] == [
        f"{store.path}/anna 2", f"{store.path}/anna 2*-0.5", None
    ]  # fmt: skip
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


def test_a_user_who_is_replaced_or_deleted_is_no_longer_loaded(written: Cases, tmp_path: Path) -> None:
    from types import SimpleNamespace

    store = import_folder(tmp_path / "users", written.adapter("l1"), "anna")
    table = CurrentAdapters({"anna": SimpleNamespace(lora_path=f"{store.path}/anna*0.5")})
    store.import_folder(written.adapter("l1"), "bob")
    assert "anna" in table
    store.write({"anna": {name: -value for name, value in store.read("anna").items()}})
    assert "anna" not in table
    table["bob"] = SimpleNamespace(lora_path=f"{store.path}/bob")
    store.delete("bob")
    assert "bob" not in table


def test_a_killed_server_starts_again_and_answers_as_before(server: Server, cases: Cases) -> None:
    """By `kill -9` of the server's own process while clients wait; the others of its processes must not stay behind."""
    requests = [cases.request(name, cases.prompts[3]) for name in (None, "l1", "f2l3_untied", "prompt_direft")]
    expected = cases.expected(requests)
    ended, broken, heard = threading.Event(), [], []

    def client(request: dict[str, Any], right: list[int]) -> None:
        while not ended.is_set():
            try:
                heard.append(server.tokens(request["adapter"] or "tiny", request["prompt"], request["tokens"]) == right)
            except (OSError, urllib.error.URLError) as error:
                broken.append(error)
                return

    with ThreadPoolExecutor(8) as clients:
        running = [clients.submit(client, *pair) for pair in [*zip(requests, expected, strict=True)] * 2]
        time.sleep(1)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        ended.set()
        for future in running:
            future.result()
    assert broken and heard and all(heard)
    assert server.gone()
    server.start()
    answers = [server.tokens(request["adapter"] or "tiny", request["prompt"], 12) for request in requests]
    assert answers == expected


def test_a_server_that_is_told_to_end_ends_with_its_streams(server: Server) -> None:
    """EngineCore stands still, so that an answer is under way when the time for it is over."""
    assert server.process is not None
    engine = [pid for pid in server.processes() if pid != server.process.pid]
    body = {"model": "l1", "prompt": [5] * 8, "max_tokens": 240, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=90) as answer:
        assert answer.readline().startswith(b"data: ")
        for pid in engine:
            os.kill(pid, signal.SIGSTOP)
        os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does
        assert server.process.wait(60) == 0
        text = answer.read().decode()
    assert '"finish_reason":"abort"' in text and text.rstrip().endswith("data: [DONE]")
    for pid in server.processes():  # one that keeps count of shared memory stood still too
        os.kill(pid, signal.SIGCONT)
    assert server.gone() and not re.search(r'File ".*/reftune/', server.log.read_text())


def test_a_server_stops_with_the_reason_where_answers_could_be_wrong(server: Server) -> None:
    process = server.launch("--kv-offloading-size", "0.01")
    assert process.wait(250) != 0
    assert (
        "ReftuneError: vLLM with ReFT adapters and kv_transfer_config: a connector may name blocks"
        in server.log.read_text()
    )
