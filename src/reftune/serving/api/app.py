"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from reftune.data.tokenising import Encoding
from reftune.errors import ReftuneError
from reftune.serving.api.answers import CHAT, COMPLETION, RESPONSE, Answer, Choices, ResponseAnswer, Shape
from reftune.serving.api.bodies import (
    AdapterBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Generation,
    ResponseBody,
    TokenizeBody,
)
from reftune.serving.api.errors import RequestError
from reftune.serving.api.gate import Gate
from reftune.serving.api.keys import Permission
from reftune.serving.api.service import Service, Target
from reftune.serving.api.writing import Choice

_LOOK_FOR_THE_CLIENT = 0.25
"""Seconds between looks at whether the client of an unstreamed answer is still there."""


def build_app(
    service: Service,
    local_only: bool = True,
    more: APIRouter | None = None,
    closing: Callable[[], Awaitable[None]] | None = None,
) -> Any:
    """The ASGI application.

    Args:
        service: what answers.
        local_only: refuse requests whose ``Host`` is not this machine.
        more: further routes.
        closing: is awaited when the server ends.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.draining = True
        if closing is not None:
            await closing()
        await asyncio.to_thread(service.engine.close)

    app = FastAPI(title="reftune", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse(
            {"status": "ok"} if service.engine.alive else {"status": "stopped"}, 200 if service.engine.alive else 503
        )

    @app.get("/ready")
    async def ready() -> Response:
        fine = service.engine.alive and not service.draining
        return JSONResponse({"ready": fine}, 200 if fine else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> Any:
        names = await asyncio.to_thread(service.model_names, permission_of(request))
        return {"object": "list", "data": [_model(service, name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Any:
        service.target(name, permission_of(request))
        return _model(service, name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Response:
        target = service.target(body.model, permission_of(request))
        read = await service.read_prompts(target, [[message.as_message() for message in body.messages]])
        wanted = body.max_completion_tokens or body.max_tokens
        return await _answer(service, request, body, target, CHAT, read, wanted, body.wanted_logprobs)

    @app.post("/v1/responses")
    async def responses(request: Request, body: ResponseBody) -> Response:
        target = service.target(body.model, permission_of(request))
        read = await service.read_prompts(target, [body.messages])
        wanted = body.max_output_tokens or body.max_tokens
        return await _answer(service, request, body, target, RESPONSE, read, wanted, body.wanted_logprobs)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        target = service.target(body.model, permission_of(request))
        read = await service.read_prompts(target, body.prompts)
        if not read[1]:
            raise RequestError(400, "prompt: give at least one.", "prompt")
        return await _answer(service, request, body, target, COMPLETION, read, body.max_tokens, body.wanted_logprobs)

    @app.post("/tokenize")
    async def tokenize(request: Request, body: TokenizeBody) -> Any:
        if (body.prompt is None) == (body.messages is None):
            raise RequestError(400, "give either prompt or messages.", "prompt")
        target = service.target(body.model, permission_of(request))
        prompt = body.prompt if body.messages is None else [message.as_message() for message in body.messages]
        encoding, (ids,) = await service.read_prompts(target, [prompt])
        return {
            "count": len(ids),
            "max_model_len": service.engine.context,
            "tokens": ids,
            "token_strs": [encoding.tokenizer.decode([token]) for token in ids],
            "edited": await asyncio.to_thread(service.engine.edited, list(target.folders), len(ids)),
        }

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Any:
        if max(body.tokens, default=0) >= service.engine.vocabulary:
            raise RequestError(400, f"tokens: the vocabulary ends at {service.engine.vocabulary - 1}.", "tokens")
        return {"prompt": service.engine.tokenizer.decode(body.tokens)}

    @app.post("/v1/adapters")
    async def add_adapter(request: Request, body: AdapterBody) -> Any:
        check_admin(service, request)
        try:
            folder = service.catalogue.add(body.name, body.path)
            await asyncio.to_thread(service.engine.check, folder)
        except ReftuneError as error:
            if service.catalogue.folder(body.name) is not None and "served already" not in str(error):
                service.catalogue.remove(body.name)
            raise RequestError(400, str(error), "path") from None
        return _model(service, body.name)

    @app.delete("/v1/adapters/{name}")
    async def remove_adapter(request: Request, name: str) -> Any:
        check_admin(service, request)
        try:
            service.catalogue.remove(name)
        except ReftuneError as error:
            raise RequestError(404, str(error), code="model_not_found") from None
        return {"id": name, "object": "model", "deleted": True}

    if more is not None:
        app.include_router(more)
    return Gate(app, service.keys, service.limits.body_bytes, local_only and not service.keys, service.count)


async def _answer(
    service: Service,
    request: Request,
    body: Generation,
    target: Target,
    shape: Shape,
    read: tuple[Encoding, list[list[int]]],
    wanted: int | None,
    logprobs: int | None,
) -> Response:
    encoding, prompts = read
    room = [service.room(body, prompt, wanted) for prompt in prompts]
    request.state.log |= {"model": target.name, "prompt_tokens": sum(map(len, prompts))}
    if tools := getattr(body, "tools", None):
        request.state.log["tools_not_used"] = len(tools)
    service.take(len(prompts) * body.n)
    kind = ResponseAnswer if shape is RESPONSE else Choices
    answer = kind(shape, body, sum(map(len, prompts)), encoding.tokenizer)
    pieces = service.write(target, encoding, prompts, body, room, logprobs)
    if body.stream:
        # The first piece is waited for, so that an adapter that cannot be loaded is an error and not a broken stream.
        try:
            first = await anext(pieces)
        except RequestError:
            await pieces.aclose()
            raise
        return StreamingResponse(
            _events(request, answer, pieces, first),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    choices: dict[int, Choice] = {}
    async with aclosing(pieces):
        async for choice, piece in _while_connected(request, pieces):
            if piece.finish:
                choices[choice.index] = choice
    whole = answer.whole([choices[index] for index in sorted(choices)])
    request.state.log["completion_tokens"] = sum(len(choice.tokens) for choice in choices.values())
    return JSONResponse(whole)


async def _events(request: Request, answer: Answer, pieces: Any, first: Any) -> AsyncIterator[str]:
    written, begun = 0, set()
    try:
        async with aclosing(pieces):
            pending = first
            while pending is not None:
                choice, piece = pending
                if choice.index not in begun:
                    begun.add(choice.index)
                    for data in answer.begins(choice):
                        yield answer.sent(data)
                written += len(piece.tokens)
                for data in answer.pieces(choice, piece):
                    yield answer.sent(data)
                pending = await anext(pieces, None)
        for data in answer.ends(written):
            yield answer.sent(data)
    except RequestError as error:
        for data in answer.fails(error):
            yield answer.sent(data)
    finally:
        request.state.log["completion_tokens"] = written
    if answer.done:
        yield answer.done


async def _while_connected(request: Request, pieces: AsyncGenerator[Any, None]) -> AsyncIterator[Any]:
    """The pieces, until the client has gone; the loop then ends as a cancelled request does."""
    pending: asyncio.Future[Any] = asyncio.ensure_future(anext(pieces, None))  # type: ignore[arg-type]
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=_LOOK_FOR_THE_CLIENT)
            if done:
                if (found := pending.result()) is None:
                    return
                yield found
                pending = asyncio.ensure_future(anext(pieces, None))  # type: ignore[arg-type]
            elif await request.is_disconnected():
                raise RequestError(499, "the client has gone.")
    finally:
        pending.cancel()
        await asyncio.wait({pending})


def permission_of(request: Request) -> Permission:
    """What the request's key allows."""
    return request.state.permission or Permission(())


def check_admin(service: Service, request: Request) -> None:
    """Refuse (403) whoever may not change what is served."""
    if not service.keys:
        raise RequestError(
            403, "adapters are added and removed with an admin key alone; start the server with --api-keys."
        )
    if not permission_of(request).admin:
        raise RequestError(403, "this key may not add or remove adapters; it is no admin key.")


def _model(service: Service, name: str) -> dict[str, Any]:
    parent = None if name == service.base_name else service.base_name
    return {
        "id": name, "object": "model", "created": service.started, "owned_by": "reftune",
        "root": service.base_name, "parent": parent, "max_model_len": service.engine.context,
    }  # fmt: skip


def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status, error.headers)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _request_error(request, RequestError(error.status_code, message, headers=dict(error.headers or {})))


def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    places = [".".join(str(step) for step in problem["loc"] if step != "body") for problem in problems[:3]]
    said = [f"{place or 'body'}: {problem['msg']}" for place, problem in zip(places, problems, strict=False)]
    return _request_error(request, RequestError(400, "; ".join(said), places[0] or None))


def _unexpected(request: Request, error: Exception) -> Response:
    return _request_error(request, RequestError(500, "the server failed; its log says why."))
