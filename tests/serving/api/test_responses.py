"""`/v1/responses` as OpenAI's own client and LangChain read it."""

import asyncio
import json
from typing import Any

import pytest

openai = pytest.importorskip("openai")
from openai.types.responses import Response, ResponseStreamEvent  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402

ASKED: dict[str, Any] = {"model": "pirate", "input": "hi"}


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def client_of(http: Any) -> Any:
    return openai.AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=http, max_retries=0)


@pytest.mark.parametrize("stop", [None, "te"])
@pytest.mark.parametrize("logprobs", [False, True])
def test_events_add_up_to_the_whole_response(served: Any, stop: str | None, logprobs: bool) -> None:
    more: dict[str, Any] = {"extra_body": {"stop": stop}}
    if logprobs:
        more |= {"include": ["message.output_text.logprobs"], "top_logprobs": 1}

    async def run() -> None:
        async with served() as http:
            whole = await client_of(http).responses.create(**ASKED, **more)
            assert whole.output_text == ("pirate 1" if stop is None else "pira")
            async with client_of(http).responses.stream(**ASKED, **more) as stream:
                events = [event async for event in stream]
                final = await stream.get_final_response() if whole.status == "completed" else events[-1].response
        assert [event.sequence_number for event in events] == list(range(len(events)))
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(pieces) == whole.output_text == final.output_text
        assert (final.status, final.usage) == (whole.status, whole.usage)
        found = final.output[0].content[0].logprobs
        assert len(found) == (whole.usage.output_tokens if logprobs else 0)
        assert [one.token for one in found] == [one.token for one in whole.output[0].content[0].logprobs]

    asyncio.run(run())


def test_every_field_is_of_the_type_that_openai_says(ask: Any) -> None:
    whole = ask("POST", "/v1/responses", json=ASKED | {"metadata": {"a": "b"}, "instructions": "Be kind."})
    TypeAdapter(Response).validate_json(whole.content, strict=True)
    text = ask("POST", "/v1/responses", json=ASKED | {"stream": True}).text
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        TypeAdapter(ResponseStreamEvent).validate_json(data.removeprefix("data: "), strict=True)
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_an_answer_cut_short_is_incomplete_and_one_with_an_end_is_complete(ask: Any) -> None:
    cut = ask("POST", "/v1/responses", json=ASKED | {"max_output_tokens": 3}).json()
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert cut["output"][0]["content"][0]["text"] == "pir" and cut["usage"]["output_tokens"] == 3
    ended = ask("POST", "/v1/responses", json=ASKED | {"stop": "e"}).json()
    assert (ended["status"], ended["incomplete_details"]) == ("completed", None)


def test_the_input_is_read_as_the_same_chat(ask: Any) -> None:
    turns = messages(("user", "hi"), ("assistant", "hello"), ("user", "bye"))
    parts = [turn | {"type": "message", "content": [{"type": "input_text", "text": turn["content"]}]} for turn in turns]
    chat = ask(
        "POST", "/v1/chat/completions", json={"model": "base", "messages": [*messages(("system", "Be kind.")), *turns]}
    ).json()
    for given in (turns, parts):
        body = {"model": "base", "input": given, "instructions": "Be kind."}
        assert ask("POST", "/v1/responses", json=body).json()["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    alone = ask("POST", "/v1/responses", json={"model": "base", "input": turns}).json()
    assert alone["usage"]["input_tokens"] != chat["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"previous_response_id": "resp-1"}, "send the whole conversation"),
        ({"conversation": "c"}, "send the whole conversation"),
        ({"tool_choice": {"type": "web_search"}}, "no tools can be called here"),
        ({"text": {"format": {"type": "json_object"}}}, "can be had"),
        ({"n": 2}, "n: "),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"role": "user"}]}, "a message has content"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"model": "broken"}, "is damaged"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_had_is_one_error(ask: Any, given: dict[str, Any], said: str, stream: bool) -> None:
    answer = ask("POST", "/v1/responses", json=ASKED | given | {"stream": stream})
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_a_failure_midway_is_the_last_event(served: Any) -> None:
    async def run() -> None:
        async with served(pause=0.05, seconds=0.12) as http:
            stream = await client_of(http).responses.create(**ASKED, stream=True)
            events = [event async for event in stream]
        assert events[-1].type == "response.failed" and events[-1].response.error.code == "timeout"
        assert sum(event.type == "response.output_text.delta" for event in events) > 0

    asyncio.run(run())


def test_langchain_reads_responses(served: Any) -> None:
    langchain = pytest.importorskip("langchain_openai")

    async def run() -> None:
        async with served() as http:
            chat = langchain.ChatOpenAI(
                model="pirate", api_key="none", base_url="http://localhost/v1", http_async_client=http,
                use_responses_api=True,
            )  # fmt: skip
            assert (await chat.ainvoke("hi")).text == "pirate 1"
            assert "".join([piece.text async for piece in chat.astream("hi")]) == "pirate 1"

    asyncio.run(run())
