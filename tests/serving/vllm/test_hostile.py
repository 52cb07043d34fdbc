"""Malformed, oversized and hostile bodies at vLLM's server with the plug-in: never a 500, and the server goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.api.test_bodies import CHAT, CHAT_FIELDS, RAW, TEXT, TEXT_FIELDS, case_name
from tests.serving.vllm.cases import Cases
from tests.serving.vllm.served import Server

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", autouse=True)
def pirate(server: Server, cases: Cases) -> Iterator[None]:
    """The adapter that the bodies name, and a damaged one; the folder is left as it was."""
    before = set(server.adapters.iterdir())
    for name in ("pirate", "broken"):
        shutil.copytree(cases.adapter("l1"), server.adapters / name)
    (server.adapters / "broken" / "adapter_model.safetensors").write_bytes(b"x")
    yield
    for added in set(server.adapters.iterdir()) - before:
        added.unlink() if added.is_symlink() else shutil.rmtree(added)
    time.sleep(1.2)  # folders are looked at once a second


VLLMS_OWN = [{"stop": "\udfff"}]
"""What vLLM itself, without adapters, answers with 500."""


def goes_on(server: Server, status: int, answer: Any, fields: dict[str, Any] | None = None) -> None:
    assert 200 <= status < 500 or fields in VLLMS_OWN, (status, answer)
    assert "Traceback" not in str(answer)
    assert server("/health")[0] == 200


@pytest.mark.parametrize("fields", CHAT_FIELDS, ids=case_name)
def test_a_chat_body_with_a_strange_field(server: Server, fields: dict[str, Any]) -> None:
    status, answer = server("/v1/chat/completions", CHAT | fields)
    goes_on(server, status, answer, fields)
    if fields.get("model"):  # with none, vLLM takes the base model
        assert status >= 400, answer


@pytest.mark.parametrize("fields", TEXT_FIELDS, ids=case_name)
def test_a_completion_body_with_a_strange_field(server: Server, fields: dict[str, Any]) -> None:
    goes_on(server, *server("/v1/completions", TEXT | fields))


@pytest.mark.parametrize(("body", "kind"), RAW, ids=lambda value: case_name(value)[:24])
def test_a_body_that_is_no_request(server: Server, body: bytes, kind: str) -> None:
    goes_on(server, *server("/v1/chat/completions", body, headers={"Content-Type": kind}))


PATHS = (
    "", ".", "..", "/", "/etc", "/etc/passwd", "/proc/self/root", "~", "~root", "someone/repository", "l1", "../l1",
    "{adapters}", "{adapters}/..", "{adapters}/../outside", "{adapters}/l1/../../outside", "{adapters}/link",
    "{adapters}/l1\x00", "{adapters}/nowhere", "{adapters}/broken", "{adapters}/l1*", "{adapters}/l1*nan",
    "{adapters}/l1*1*2", "{adapters}*2", "https://example.com/adapter", "file:///etc", "x" * 5000, "reftune-self-test+",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=case_name)
def test_only_adapters_of_the_served_folders_are_loaded(path: str, server: Server, cases: Cases) -> None:
    outside, link = server.adapters.parent / "outside", server.adapters / "link"
    if not outside.exists():
        shutil.copytree(cases.adapter("l1"), outside)
        link.symlink_to(outside)
    body = {"lora_name": "stranger", "lora_path": path.replace("{adapters}", str(server.adapters))}
    status, answer = server("/v1/load_lora_adapter", body)
    assert 400 <= status < 500, (status, answer)
    assert server.complete("stranger", [5, 6])[0] == 404


@pytest.mark.parametrize(
    "body",
    [{}, {"lora_name": "a"}, {"lora_name": 5, "lora_path": 5}, {"lora_name": "tiny", "lora_path": "l1"},
     {"lora_name": None, "lora_path": None}, [], "x", {"lora_name": ["a"], "lora_path": {}}],
    ids=case_name,
)  # fmt: skip
@pytest.mark.parametrize("route", ["load", "unload"])
def test_bodies_of_loading_that_name_nothing(route: str, body: Any, server: Server) -> None:
    status, answer = server(f"/v1/{route}_lora_adapter", body)
    assert 400 <= status < 500, (status, answer)


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Bearer"}, {"Authorization": "secret"}, {"Authorization": "Basic c2VjcmV0"},
     {"Authorization": "Bearer secret, Bearer x"}, {"Authorization": "Bearer " + "x" * 5000}, {"X-Api-Key": "secret"},
     {"Authorization": "Bearer Secret"}],
    ids=case_name,
)  # fmt: skip
def test_tricks_with_headers_open_nothing(headers: dict[str, str], server: Server) -> None:
    for path, body in (("/v1/models", None), ("/v1/completions", TEXT), ("/v1/load_lora_adapter", {})):
        assert server(path, body, key=None, headers=headers)[0] == 401


def test_the_bodies_above_are_right_without_their_strange_field(server: Server) -> None:
    assert server("/v1/chat/completions", CHAT)[0] == 200
    assert server("/v1/completions", json.dumps(TEXT).encode())[0] == 200


def test_it_is_the_folder_that_counts(server: Server) -> None:
    shutil.copytree(server.adapters / "pirate", server.adapters / "late")
    body = {"lora_name": "named_otherwise", "lora_path": str(Path(server.adapters) / "late")}
    assert server("/v1/load_lora_adapter", body)[0] == 200
    assert server.complete("named_otherwise", [5, 6])[0] == 200
    assert server("/v1/unload_lora_adapter", {"lora_name": "named_otherwise"})[0] == 200
