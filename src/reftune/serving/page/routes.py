"""What the page asks of its server beyond OpenAI's interface."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field

from reftune.errors import ReftuneError
from reftune.serving.api.answers import DONE, event
from reftune.serving.api.app import check_admin, permission_of
from reftune.serving.api.bodies import Body
from reftune.serving.api.errors import RequestError
from reftune.serving.api.service import Service
from reftune.serving.page.looking import picture_of
from reftune.serving.page.training import Run, Trainings
from reftune.users.store import user_of

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class TrainBody(Body):
    """`POST /ui/train`."""

    name: str = Field(min_length=1, max_length=128)
    table: str = Field(min_length=1)
    epochs: int = Field(5, ge=1, le=1000)
    lr: float = Field(4e-3, gt=0, le=1, allow_inf_nan=False)
    rank: int = Field(1, ge=1, le=64)
    positions: str = Field("l1+generated", max_length=40)


def page_routes(
    service: Service, model: str, device: str | None = None
) -> tuple[APIRouter, Callable[[], Awaitable[None]]]:
    """The routes, and what ends a training run when the server ends.

    Args:
        service: of the server.
        model: the base, as the command line takes it.
        device: of training and explaining.
    """
    router, trainings = APIRouter(), Trainings(model, service.catalogue, device)
    explained: dict[tuple[Path, int], Any] = {}
    explaining = asyncio.Lock()

    def file(name: str, kind: str) -> Response:
        text = (resources.files("reftune.serving.page") / name).read_text(encoding="utf-8")
        return Response(text, media_type=kind, headers=_HEADERS)

    @router.get("/")
    async def page() -> Response:
        return file("index.html", "text/html")

    @router.get("/ui/page.css")
    async def style() -> Response:
        return file("page.css", "text/css")

    @router.get("/ui/page.js")
    async def script() -> Response:
        return file("page.js", "text/javascript")

    @router.get("/ui/about")
    async def about(request: Request) -> Any:
        admin = not service.keys or permission_of(request).admin
        return {"base": service.base_name, "trains": admin and bool(service.catalogue.folders)}

    @router.post("/ui/train")
    async def train(request: Request, body: TrainBody) -> Any:
        _may_train(service, request)
        try:
            run = trainings.start(body.name, body.table, body.epochs, body.lr, body.positions, body.rank)
        except ReftuneError as error:
            raise RequestError(400, str(error), "name") from None
        return _told(run)

    @router.post("/ui/train/stop")
    async def stop(request: Request) -> Any:
        _may_train(service, request)
        trainings.stop()
        return {"stopped": True}

    @router.get("/ui/train/{name}")
    async def progress(request: Request, name: str) -> Response:
        if name not in trainings.runs or not permission_of(request).allows(name):
            raise RequestError(404, f"no training run is called {name!r}.")

        async def events() -> AsyncIterator[str]:
            async for run in trainings.follow(trainings.runs[name]):
                yield event(_told(run))
            yield DONE

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @router.get("/ui/adapters/{name}/picture.png")
    async def picture(request: Request, name: str) -> Response:
        folder = _folder(service, request, name)
        try:
            return Response(await asyncio.to_thread(picture_of, folder), media_type="image/png")
        except ReftuneError as error:
            raise RequestError(400, str(error)) from None

    @router.get("/ui/adapters/{name}/explanation")
    async def explanation(request: Request, name: str) -> Response:
        folder = _folder(service, request, name)
        key = (folder, folder.stat().st_mtime_ns)
        async with explaining:
            if key not in explained:
                if len(explained) > 64:
                    explained.clear()
                explained[key] = await _explain(model, folder, device)
        return JSONResponse(explained[key])

    return router, trainings.close


async def _explain(model: str, folder: Path, device: str | None) -> Any:
    arguments = [model, str(folder), *([device] if device else [])]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "ignore", "-m", "reftune.serving.page.looking", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        said, error = await asyncio.wait_for(process.communicate(), 300)
    except BaseException:
        if process.returncode is None:
            process.kill()
        raise
    if process.returncode:
        lines = error.decode("utf-8", "replace").strip().splitlines()
        raise RequestError(400, f"this adapter cannot be explained: {lines[-1][:500] if lines else 'no reason given'}")
    return json.loads(said.decode("utf-8").strip().splitlines()[-1])


def _folder(service: Service, request: Request, name: str) -> Path:
    folder = service.target(name, permission_of(request)).folders[0] if name != service.base_name else _no_edit(name)
    if user_of(folder) is not None:
        raise RequestError(404, f"{name!r} is a user of a store: what its edit does is shown once it is exported.")
    return folder


def _no_edit(name: str) -> Path:
    raise RequestError(404, f"{name!r} is the base model: it has no edit to look into.")


def _may_train(service: Service, request: Request) -> None:
    if service.keys:
        check_admin(service, request)


def _told(run: Run) -> dict[str, Any]:
    return {"name": run.name, "state": run.state, "error": run.error, "losses": run.losses[-2000:]}
