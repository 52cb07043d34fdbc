"""What Open WebUI asks of a connection: its requests, header by header and field by field, and what it reads of answers."""

import json
from typing import Any

import httpx
import pytest

from tests.serving.api.test_app import KEYS, bearer, events

USER = {
    "X-OpenWebUI-User-Name": "Ann%20Lee", "X-OpenWebUI-User-Id": "7", "X-OpenWebUI-User-Email": "ann@example.org",
    "X-OpenWebUI-User-Role": "user", "X-OpenWebUI-Chat-Id": "0b7e", "User-Agent": "Python/3.11 aiohttp/3.14",
}  # fmt: skip
CLOCK = {
    "name": "get_current_timestamp",
    "description": "The current time.",
    "parameters": {"type": "object", "properties": {}, "required": []},
}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {
    "model": "pirate",
    "messages": MESSAGES,
    "stream": True,
    "stream_options": {"include_usage": True},
}
SETTINGS: dict[str, Any] = {
    "temperature": 0.8, "top_p": 0.9, "top_k": 40, "frequency_penalty": 0.5, "presence_penalty": 0.5, "seed": 7,
    "max_tokens": 128, "stop": ["zzz"], "logit_bias": {"5": 1}, "repetition_penalty": 1.1,
}  # fmt: skip


def post(ask: Any, body: dict[str, Any], key: str = "admin-key-1") -> httpx.Response:
    """As its back end sends it, from another machine: a dumped body, a key, the user's headers."""
    headers = USER | bearer(key) | {"Content-Type": "application/json", "Host": "host.docker.internal:8000"}
    content = json.dumps(body).encode()
    return ask("POST", "/v1/chat/completions", {"keys": KEYS, "context": 4096}, content=content, headers=headers)


def test_its_list_of_models_has_ids_and_no_empty_name(ask: Any) -> None:
    answer = ask("GET", "/v1/models", {"keys": KEYS}, headers=USER | bearer("admin-key-1"))
    models = answer.json()["data"]
    assert [model.get("name", model["id"]) for model in models] == ["base", "broken", "formal", "pirate", "terse"]
    assert "error" not in models and answer.headers["content-type"] == "application/json"
    refused = ask("GET", "/v1/models", {"keys": KEYS}, headers=USER)  # a connection without a key sends none
    assert refused.status_code == 401 and "key" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "more",
    [{}, SETTINGS, {"tools": [{"type": "function", "function": CLOCK}]}],
    ids=["plain", "settings of a chat", "its own tools, as it sends them since it calls tools natively"],
)
def test_a_chat_is_streamed_to_its_end_with_its_usage(ask: Any, more: dict[str, Any]) -> None:
    answer = post(ask, CHAT | more)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in found[:-1]) == "pirate 1"
    assert found[-1]["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("room", [{"max_completion_tokens": 1000}, {"max_completion_tokens": 4}, {}], ids=str)
def test_titles_tags_and_follow_ups_are_answered_at_once(ask: Any, room: dict[str, Any]) -> None:
    task = {"model": "formal", "messages": [{"role": "user", "content": "### Task:\nA title." * 20}], "stream": False}
    message = post(ask, task | room).json()["choices"][0]["message"]
    assert message["content"] == "formal 1"[: room.get("max_completion_tokens", 1000)]


def test_parts_of_a_message_are_joined_and_a_picture_is_refused_in_words(ask: Any) -> None:
    parts = [{"type": "text", "text": "Look."}, {"type": "text", "text": " Here."}]
    assert post(ask, CHAT | {"messages": [{"role": "user", "content": parts}]}).status_code == 200
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    refused = post(ask, CHAT | {"messages": [{"role": "user", "content": [*parts, picture]}]})
    assert refused.status_code == 400 and "text" in refused.json()["error"]["message"]


def test_tools_that_were_offered_are_counted_in_the_log(ask: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="reftune.serve"):
        post(ask, CHAT | {"tools": [{"type": "function", "function": CLOCK}] * 2})
        post(ask, CHAT)
    lines = [json.loads(record.message) for record in caplog.records if record.name == "reftune.serve"]
    assert [line.get("tools_not_used") for line in lines] == [2, None]
