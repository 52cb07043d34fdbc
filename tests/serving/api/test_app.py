"""The interface as OpenAI's own client and others use it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.tiny_folder import tiny_tokenizer

CHAT: dict[str, Any] = {"model": "pirate", "messages": [{"role": "user", "content": "hi"}]}
KEYS = "admin-key-1 admin\nuser-key-22 adapters=pirate,base\n"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_models_are_the_base_and_every_adapter(ask: Any) -> None:
    found = ask("GET", "/v1/models").json()
    assert [model["id"] for model in found["data"]] == ["base", "broken", "formal", "pirate", "terse"]
    assert [model["parent"] for model in found["data"]] == [None, "base", "base", "base", "base"]
    assert ask("GET", "/v1/models/pirate").json()["id"] == "pirate"
    assert ask("GET", "/v1/models/nobody").status_code == 404


@pytest.mark.parametrize(
    ("model", "answer"),
    [
        ("base", "base"),
        ("pirate", "pirate 1"),
        ("0.5*pirate + 0.3*formal - terse", "pirate 0.5 formal 0.3 terse -1"),
        ("-pirate", "pirate -1"),
    ],
)
def test_the_model_picks_adapters_and_strengths(ask: Any, model: str, answer: str) -> None:
    found = ask("POST", "/v1/chat/completions", json=CHAT | {"model": model}).json()
    assert found["choices"][0]["message"] == {"role": "assistant", "content": answer}
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == len(answer)


def test_a_scale_multiplies_every_strength(ask: Any) -> None:
    found = ask("POST", "/v1/chat/completions", json=CHAT | {"model": "0.5*pirate + formal", "scale": 2}).json()
    assert found["choices"][0]["message"]["content"] == "pirate 1 formal 2"


@pytest.mark.parametrize("stop", [None, "e", "te 1", "zzz"])
def test_streamed_pieces_join_to_the_whole(ask: Any, stop: str | None) -> None:
    whole = ask("POST", "/v1/chat/completions", json=CHAT | {"stop": stop, "n": 2}).json()
    body = CHAT | {"stop": stop, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    pieces = events(ask("POST", "/v1/chat/completions", json=body).text)
    assert pieces[-1]["choices"] == [] and pieces[-1]["usage"] == whole["usage"]
    for index in (0, 1):
        mine = [piece["choices"][0] for piece in pieces[:-1] if piece["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(choice["delta"].get("content", "") for choice in mine)
        assert text == whole["choices"][index]["message"]["content"]
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == [
            whole["choices"][index]["finish_reason"]
        ]
        assert stop is None or stop not in text


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(ask: Any) -> None:
    choice = ask("POST", "/v1/chat/completions", json=CHAT | {"stop": ["te", "x"]}).json()["choices"][0]
    assert choice["message"]["content"] == "pira" and choice["finish_reason"] == "stop"


def test_logprobs_are_reported_token_by_token(ask: Any) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 1, "max_tokens": 3}
    content = ask("POST", "/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == ["p", "i", "r"]
    assert content[0]["logprob"] == -0.5 and content[0]["top_logprobs"][0]["token"] == "p"
    text = ask(
        "POST", "/v1/completions", json={"model": "pirate", "prompt": "a", "logprobs": 1, "max_tokens": 3}
    ).json()
    assert text["choices"][0]["logprobs"]["tokens"] == ["p", "i", "r"]
    assert text["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2]


def test_completions_take_several_prompts(ask: Any) -> None:
    found = ask("POST", "/v1/completions", json={"model": "pirate", "prompt": ["a", "b"], "n": 2}).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in found["choices"]} == {"pirate 1"}


def test_prompts_are_tokenised_as_they_are_read(ask: Any) -> None:
    found = ask("POST", "/tokenize", json={"model": "pirate", "messages": CHAT["messages"]}).json()
    assert found["count"] == len(found["tokens"]) and "".join(found["token_strs"]).endswith("<|im_start|>assistant\n")
    assert found["edited"] == [found["count"] - 1]
    assert ask("POST", "/detokenize", json={"tokens": found["tokens"]}).json()["prompt"] == "".join(found["token_strs"])
    assert ask("POST", "/tokenize", json={"model": "base", "prompt": "hi"}).json()["edited"] == []


def test_an_adapter_that_cannot_be_loaded_is_an_error_even_where_a_stream_was_asked_for(ask: Any) -> None:
    for stream in (False, True):
        answer = ask("POST", "/v1/chat/completions", json=CHAT | {"model": "broken", "stream": stream})
        assert answer.status_code == 400 and "is damaged" in answer.json()["error"]["message"]


def test_an_adapter_whose_weights_are_a_link_out_is_an_error_of_its_request(ask: Any, folder: Path) -> None:
    (folder.parent / "elsewhere").touch()
    (folder / "pirate" / "adapter_model.safetensors").symlink_to(folder.parent / "elsewhere")
    for model, status in (("pirate", 400), ("0.5*pirate + formal", 400), ("formal", 200)):
        response = ask("POST", "/v1/completions", json={"model": model, "prompt": "hi", "max_tokens": 4})
        assert response.status_code == status
        assert status == 200 or "is a link out" in response.json()["error"]["message"]
    assert ask("POST", "/tokenize", json={"model": "pirate", "prompt": "hi"}).status_code == 400


def test_keys_are_asked_for_and_allow_what_they_name(ask: Any) -> None:
    settings = {"keys": KEYS}
    for headers in (
        {},
        bearer("wrong"),
        bearer("user-key-2"),
        bearer(""),
        {"authorization": "user-key-22"},
        bearer("é" * 9),
    ):
        raw = {key: value.encode("utf-8") for key, value in headers.items()}
        assert ask("POST", "/v1/chat/completions", settings, json=CHAT, headers=raw).status_code == 401
        assert ask("GET", "/v1/models", settings, headers=raw).status_code == 401
        assert ask("GET", "/metrics", settings, headers=raw).status_code == 401
        assert ask("GET", "/health", settings, headers=raw).status_code == 200
    user = bearer("user-key-22")
    assert [m["id"] for m in ask("GET", "/v1/models", settings, headers=user).json()["data"]] == ["base", "pirate"]
    assert ask("POST", "/v1/chat/completions", settings, json=CHAT, headers=user).status_code == 200
    for model in ("formal", "pirate + formal", "0*formal"):
        answer = ask("POST", "/v1/chat/completions", settings, json=CHAT | {"model": model}, headers=user)
        assert answer.status_code == 403


def test_adapters_are_added_and_removed_by_an_admin_alone(served: Any) -> None:
    async def run() -> None:
        async with served(KEYS) as client:
            body = {"name": "mate", "path": "pirate"}
            for headers in (bearer("user-key-22"), {}):
                assert (await client.post("/v1/adapters", json=body, headers=headers)).status_code in (401, 403)
            admin = bearer("admin-key-1")
            assert (await client.post("/v1/adapters", json=body, headers=admin)).status_code == 200
            assert (await client.post("/v1/adapters", json=body, headers=admin)).status_code == 400
            answer = await client.post("/v1/chat/completions", json=CHAT | {"model": "mate"}, headers=admin)
            assert answer.json()["choices"][0]["message"]["content"] == "pirate 1"
            for path in ("..", "/etc", "../../x", "broken/../../adapters", "pirate/adapter_config.json", "", "\x00"):
                answer = await client.post("/v1/adapters", json={"name": "x", "path": path}, headers=admin)
                assert answer.status_code == 400, path
            answer = await client.post("/v1/adapters", json={"name": "bad", "path": "broken"}, headers=admin)
            assert answer.status_code == 400 and "damaged" in answer.text
            assert (await client.delete("/v1/adapters/mate", headers=bearer("user-key-22"))).status_code == 403
            assert (await client.delete("/v1/adapters/mate", headers=admin)).status_code == 200
            assert (await client.delete("/v1/adapters/mate", headers=admin)).status_code == 404
            answer = await client.post("/v1/chat/completions", json=CHAT | {"model": "mate"}, headers=admin)
            assert answer.status_code == 404
        async with served() as client:  # without keys there is no admin
            assert (await client.post("/v1/adapters", json=body)).status_code == 403
            assert (await client.delete("/v1/adapters/pirate")).status_code == 403

    asyncio.run(run())


def test_hosts_that_are_not_this_machine_are_refused_where_there_are_no_keys(ask: Any) -> None:
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "192.168.1.5"):
        assert ask("GET", "/v1/models", headers={"host": host}).status_code == 421
        assert (
            ask("GET", "/v1/models", {"keys": KEYS}, headers={"host": host} | bearer("admin-key-1")).status_code == 200
        )
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:80"):
        assert ask("GET", "/v1/models", headers={"host": host}).status_code == 200


def test_a_flood_is_told_to_come_again_and_the_rest_is_answered(served: Any) -> None:
    async def run() -> list[httpx.Response]:
        async with served(pause=0.01, requests=5) as client:
            found = await asyncio.gather(*(client.post("/v1/chat/completions", json=CHAT) for _ in range(20)))
            assert client.service.open == 0 and client.engine.running == 0
            return found

    found = asyncio.run(run())
    assert sorted(answer.status_code for answer in found) == [200] * 5 + [429] * 15
    assert all(answer.headers["retry-after"] for answer in found if answer.status_code == 429)


def test_a_request_for_more_answers_than_are_ever_written_is_not_told_to_come_again(ask: Any) -> None:
    answer = ask("POST", "/v1/completions", {"requests": 5}, json={"model": "pirate", "prompt": ["a"] * 2, "n": 3})
    assert answer.status_code == 400 and "at most 5" in answer.json()["error"]["message"]


def test_a_request_that_takes_too_long_is_ended(served: Any) -> None:
    async def run() -> None:
        async with served(pause=0.05, seconds=0.12) as client:
            answer = await client.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 504
            await asyncio.sleep(0.1)
            assert client.service.open == 0 and client.engine.running == 0 and client.engine.written < len("pirate 1")

    asyncio.run(run())


def test_a_stopped_engine_is_unhealthy_and_answers_nothing(served: Any) -> None:
    async def run() -> None:
        async with served() as client:
            assert (await client.get("/ready")).status_code == 200
            client.engine.alive = False
            assert (await client.get("/health")).status_code == 503
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503

    asyncio.run(run())


def test_metrics_count_requests_and_tokens_within_a_bounded_number_of_labels(served: Any, folder: Any) -> None:
    async def run() -> str:
        async with served() as client:
            for model in ("pirate", "pirate", "nobody"):
                await client.post("/v1/chat/completions", json=CHAT | {"model": model})
            for number in range(150):
                client.service.metrics.label(f"adapter-{number}")
            assert client.service.metrics.label("one more") == "other"
            return (await client.get("/metrics")).text

    text = asyncio.run(run())
    assert 'reftune_requests_total{model="pirate",status="200"} 2.0' in text
    assert 'reftune_completion_tokens_total{model="pirate"} 16.0' in text
    assert "reftune_bank_hits 3.0" in text and "reftune_time_to_first_token_seconds_count 2.0" in text


def test_the_log_has_no_prompt_and_names_the_request(ask: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="reftune.serve"):
        body = CHAT | {"messages": [{"role": "user", "content": "a secret"}]}
        answer = ask("POST", "/v1/chat/completions", json=body, headers={"x-request-id": "my-7"})
        ask(
            "POST", "/v1/chat/completions", json=body, headers={"x-request-id": 'x"\r\ninjected: 1'.replace("\r\n", "")}
        )
    assert answer.headers["x-request-id"] == "my-7"
    lines = [json.loads(record.message) for record in caplog.records if record.name == "reftune.serve"]
    assert lines[0]["request_id"] == "my-7" and lines[0]["model"] == "pirate" and lines[0]["completion_tokens"] == 8
    assert "secret" not in caplog.text and lines[1]["request_id"].isalnum()


def test_the_openai_client_and_langchain_read_every_answer(served: Any) -> None:
    openai = pytest.importorskip("openai")

    async def run() -> None:
        async with served(KEYS) as http:
            client = openai.AsyncOpenAI(api_key="admin-key-1", base_url="http://localhost/v1", http_client=http)
            assert [model.id async for model in await client.models.list()][0] == "base"
            whole = await client.chat.completions.create(**CHAT, n=2, logprobs=True, top_logprobs=1, seed=3)
            assert [choice.message.content for choice in whole.choices] == ["pirate 1"] * 2
            stream = await client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
            pieces = [piece async for piece in stream]
            assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == "pirate 1"
            assert pieces[-1].usage.completion_tokens == 8
            assert (await client.completions.create(model="formal", prompt="a")).choices[0].text == "formal 1"
            extra = await client.chat.completions.create(**CHAT, extra_body={"scale": 0.5})
            assert extra.choices[0].message.content == "pirate 0.5"
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="nobody", messages=CHAT["messages"])
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="wrong-key").models.list()
            langchain = pytest.importorskip("langchain_openai")
            chat = langchain.ChatOpenAI(
                model="pirate", api_key="admin-key-1", base_url="http://localhost/v1", http_async_client=http
            )
            assert (await chat.ainvoke("hi")).content == "pirate 1"
            assert "".join([piece.content async for piece in chat.astream("hi")]) == "pirate 1"

    asyncio.run(run())


def test_concurrent_requests_answer_their_own_names(served: Any, folder: Any) -> None:
    names = [f"adapter{number}" for number in range(64)]
    for name in names:
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text("{}", encoding="utf-8")

    async def run() -> None:
        async with served(requests=1000) as client:
            wanted = [names[(7 * number) % 64] for number in range(500)]
            asked = (client.post("/v1/chat/completions", json=CHAT | {"model": name}) for name in wanted)
            found = await asyncio.gather(*asked)
            said = [answer.json()["choices"][0]["message"]["content"] for answer in found]
            assert said == [f"{name} 1" for name in wanted]

    asyncio.run(run())


def test_an_adapters_own_tokenizer_reads_and_ends_its_answers(served: Any, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(folder / "formal")
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_start|>{% endfor %}"
    tokenizer.save_pretrained(folder / "terse")
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(folder / "pirate")

    async def run() -> None:
        async with served() as client:
            for name, text in (("formal", "[Hi]"), ("terse", "Hi<|im_start|>")):
                body = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
                found = (await client.post("/tokenize", json=body)).json()
                assert "".join(found["token_strs"]) == text
            body["model"] = "pirate"
            refused = (await client.post("/v1/chat/completions", json=body)).json()
            assert "this adapter cannot share its base" in refused["error"]["message"]
            assert client.service.open == 0

    asyncio.run(run())
