"""Malformed, oversized and hostile bodies: a 4xx with OpenAI's error object, never a 500, and nothing is written."""

import json
from typing import Any

import pytest

CHAT: dict[str, Any] = {"model": "pirate", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TEXT: dict[str, Any] = {"model": "pirate", "prompt": "hi", "max_tokens": 4}
DEEP = "[" * 100_000 + "]" * 100_000

CHAT_FIELDS: list[dict[str, Any]] = [
    {"model": None}, {"model": 5}, {"model": ""}, {"model": "x" * 2000}, {"model": ["pirate"]}, {"model": "nobody"},
    {"model": "../pirate"}, {"model": "/etc/passwd"}, {"model": "pirate/../formal"}, {"model": "pirate\x00"},
    {"model": ".."}, {"model": "."}, {"model": "pirate/"}, {"model": "~"}, {"model": "%2e%2e"}, {"model": "C:\\pirate"},
    {"model": "pirate + nobody"}, {"model": "1e999*pirate"}, {"model": "2*"}, {"model": "*pirate"}, {"model": " + "},
    {"model": " + ".join(["pirate"] * 2 + [f"n{i}" for i in range(40)])}, {"model": "broken"},
    {"messages": None}, {"messages": []}, {"messages": "hi"}, {"messages": {}}, {"messages": [None]}, {"messages": ["hi"]},
    {"messages": [{}]}, {"messages": [{"role": "alien", "content": "hi"}]}, {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, {"messages": [{"content": "hi"}]},
    {"messages": [{"role": "user", "content": "\ud800"}]}, {"messages": [{"role": "user", "content": "a" * 10_000}]},
    {"messages": [{"role": ["user"], "content": "hi"}]}, {"messages": [{"role": "user", "content": {"text": "hi"}}]},
    {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": "4"}, {"max_tokens": True},
    {"max_tokens": 10**9}, {"max_tokens": 10**400}, {"max_completion_tokens": 0}, {"max_completion_tokens": "x"},
    {"temperature": -1}, {"temperature": 3}, {"temperature": "hot"}, {"temperature": [1]}, {"temperature": 1e400},
    {"top_p": 0}, {"top_p": 1.1}, {"top_p": -1}, {"top_p": "all"}, {"top_k": -1}, {"top_k": 1.5}, {"top_k": "x"},
    {"n": 0}, {"n": 17}, {"n": -1}, {"n": "2"}, {"n": 10**30}, {"stop": ""}, {"stop": ["a"] * 5}, {"stop": [1]},
    {"stop": {"a": 1}}, {"stop": "x" * 300}, {"stop": [""]}, {"stop": "\udfff"}, {"seed": "x"}, {"seed": 1.5},
    {"seed": 2**70}, {"stream": "yes"}, {"stream": 1}, {"stream_options": {"other": True}}, {"stream_options": 1},
    {"logit_bias": {"x": 1}}, {"logit_bias": {"1": 1000}}, {"logit_bias": {"-1": 1}}, {"logit_bias": [1]},
    {"logit_bias": {str(i): 1 for i in range(2000)}}, {"logit_bias": {"999999999": 1}}, {"logit_bias": {"1": "a"}},
    {"frequency_penalty": 3}, {"frequency_penalty": "x"}, {"presence_penalty": -3}, {"repetition_penalty": 0},
    {"repetition_penalty": -1}, {"scale": 1e9}, {"scale": "x"}, {"logprobs": 3}, {"logprobs": "x"},
    {"top_logprobs": 50}, {"top_logprobs": -1}, {"response_format": {"type": "json_object"}}, {"tools": [1]},
    {"tools": {}}, {"tool_choice": "required"}, {"tool_choice": {"type": "function", "function": {"name": "look"}}},
    {"functions": [{}]}, {"unknown_field": 1}, {"__proto__": {}}, {"trust_remote_code": True}, {"adapter_path": "/"},
]  # fmt: skip

TEXT_FIELDS: list[dict[str, Any]] = [
    {"prompt": None}, {"prompt": ""}, {"prompt": []}, {"prompt": 5}, {"prompt": {}}, {"prompt": [[]]}, {"prompt": [-1]},
    {"prompt": [10**9]}, {"prompt": [1.5]}, {"prompt": ["a", 1]}, {"prompt": [["a"]]}, {"prompt": "\ud800"},
    {"prompt": "a" * 600}, {"prompt": [1] * 600}, {"logprobs": 6}, {"logprobs": True}, {"echo": True}, {"suffix": "x"},
    {"messages": []},
]  # fmt: skip

RAW: list[tuple[bytes, str]] = [
    (b"", "application/json"), (b"{", "application/json"), (b"nul", "application/json"), (b"[]", "application/json"),
    (b'"x"', "application/json"), (b"5", "application/json"), (b"\xff\xfe", "application/json"),
    (b"\x00" * 100, "application/json"), (DEEP.encode(), "application/json"),
    (b'{"model": ' + b"9" * 10_000 + b"}", "application/json"), (b'{"model": NaN}', "application/json"),
    (json.dumps(CHAT).encode(), "text/plain"), (json.dumps(CHAT).encode(), "application/x-www-form-urlencoded"),
    (json.dumps(CHAT).encode(), "multipart/form-data; boundary=x"), (json.dumps(CHAT).encode(), ""),
    (b'{"model": "pirate", "messages": ' + DEEP.encode() + b"}", "application/json"),
    (b"{" + b'"a":{' * 5000 + b"}" * 5001, "application/json"),
]  # fmt: skip


def refused(answer: Any) -> None:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]


def case_name(value: Any) -> str:
    return repr(value)[:40]


@pytest.mark.parametrize("fields", CHAT_FIELDS, ids=case_name)
def test_a_chat_body_with_a_bad_field_is_refused(ask: Any, fields: dict[str, Any]) -> None:
    body = json.dumps(CHAT | fields).encode()
    refused(ask("POST", "/v1/chat/completions", content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("fields", TEXT_FIELDS, ids=case_name)
def test_a_completion_body_with_a_bad_field_is_refused(ask: Any, fields: dict[str, Any]) -> None:
    body = json.dumps(TEXT | fields).encode()
    refused(ask("POST", "/v1/completions", content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(("body", "kind"), RAW, ids=lambda value: case_name(value)[:24])
def test_a_body_that_is_no_request_is_refused(ask: Any, body: bytes, kind: str) -> None:
    refused(ask("POST", "/v1/chat/completions", content=body, headers={"content-type": kind}))


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/completions"])
def test_an_empty_object_is_refused_everywhere(ask: Any, path: str) -> None:
    refused(ask("POST", path, json={}))


def test_the_bodies_above_are_right_without_their_bad_field(ask: Any) -> None:
    assert ask("POST", "/v1/chat/completions", json=CHAT).status_code == 200
    assert ask("POST", "/v1/completions", json=TEXT).status_code == 200


def test_fields_that_change_nothing_may_be_sent(ask: Any) -> None:
    more = {
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "stop": None,
    }
    more |= dict.fromkeys(("temperature", "top_p", "top_k", "n", "stream", "repetition_penalty", "scale", "seed"))
    assert ask("POST", "/v1/chat/completions", json=CHAT | more).status_code == 200


def test_a_body_over_the_limit_is_refused_by_its_length_and_by_its_bytes(ask: Any) -> None:
    body = json.dumps(CHAT | {"user": "x" * 5000}).encode()
    headers = {"content-type": "application/json"}
    small = {"body_bytes": 2000}
    for content in (body, _chunks(body)):
        answer = ask("POST", "/v1/chat/completions", small, content=content, headers=headers)
        assert answer.status_code == 413
        refused(answer)


async def _chunks(body: bytes) -> Any:
    for start in range(0, len(body), 500):
        yield body[start : start + 500]


def test_unknown_routes_and_methods_have_openai_errors(ask: Any) -> None:
    for method, path in (
        ("GET", "/v1/nowhere"),
        ("GET", "/v1/chat/completions"),
        ("DELETE", "/v1/models"),
        ("GET", "/docs"),
    ):
        refused(ask(method, path))
