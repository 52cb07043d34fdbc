"""What every request passes before a route: an id, its host, its key, its size, one line in the log."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from reftune.serving.api.errors import RequestError
from reftune.serving.api.keys import Keys

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

logger = logging.getLogger("reftune.serve")

OPEN = ("/health", "/ready", "/", "/ui/page.css", "/ui/page.js")
"""Paths that ask for no key: they tell nothing of prompts or adapters."""

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
_LOCAL = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?")


class Gate:
    """ASGI middleware that refuses before anything is read, and logs without prompts.

    Args:
        app: what comes behind.
        keys: who may ask.
        most_bytes: of a body.
        local_only: refuse hosts that do not name this machine (a page elsewhere could otherwise point a name here).
        count: is told the model and the status of each request that ended.
    """

    def __init__(self, app: Any, keys: Keys, most_bytes: int, local_only: bool, count: Callable[[str, int], None]):
        self.app, self.keys, self.most_bytes, self.local_only, self.count = app, keys, most_bytes, local_only, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        state: dict[str, Any] = {"request_id": given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, "log": {}}
        scope["state"] = scope.get("state", {}) | state
        begin, status = time.perf_counter(), 0

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", state["request_id"].encode("ascii", "replace")),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            self._check(scope, headers)
            await self.app(scope, await self._whole_body(receive), sending)
        except RequestError as error:
            if status == 0:
                await _refuse(error, sending)
        finally:
            line = {
                "request_id": state["request_id"], "method": scope["method"], "path": scope["path"][:200],
                "status": status, "seconds": round(time.perf_counter() - begin, 4), **state["log"],
            }  # fmt: skip
            logger.info(json.dumps(line))
            if scope["method"] == "POST":
                self.count(state["log"].get("model", "-"), status)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        if self.local_only and not _LOCAL.fullmatch(headers.get("host", "").lower()):
            raise RequestError(421, "this server answers to this machine's own name alone; start it with API keys.")
        permission = self.keys.permission(headers.get("authorization"))
        if permission is None and scope["path"] not in OPEN:
            raise RequestError(
                401, "missing or wrong API key.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
        scope["state"]["permission"] = permission
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length[:18]) > self.most_bytes:
            raise self._too_large()
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise RequestError(415, "the body must be JSON: send the header Content-Type: application/json.")

    async def _whole_body(self, receive: Receive) -> Receive:
        """Read the body as far as it may go, and hand it on as one message."""
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                break
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.most_bytes:
                raise self._too_large()
        begun = False

        async def receiving() -> MutableMapping[str, Any]:
            nonlocal begun
            if begun:
                return await receive()
            begun = True
            return {"type": "http.request", "body": b"".join(parts), "more_body": False}

        return receiving

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body is larger than the {self.most_bytes:,} bytes that are read here.")


async def _refuse(error: RequestError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
