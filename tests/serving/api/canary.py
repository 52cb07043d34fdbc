"""An engine without a model: every answer spells the adapters that were asked for, so that a mix-up shows."""

import asyncio
from pathlib import Path
from typing import Any

from reftune.errors import ReftuneError
from reftune.serving.requests import Sampling, Token
from tests.cli.tiny_folder import tiny_tokenizer


class CanaryStream:
    def __init__(self, engine: "CanaryEngine", tokens: list[int]):
        self.engine, self.tokens = engine, tokens

    async def __aenter__(self) -> "CanaryStream":
        self.engine.running += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self.engine.running -= 1

    def __aiter__(self) -> Any:
        return self._run()

    async def _run(self) -> Any:
        for index, token in enumerate(self.tokens):
            await asyncio.sleep(self.engine.pause)
            self.engine.written += 1
            last = index == len(self.tokens) - 1
            yield [Token(token, -0.5, ((token, -0.5),))], ("length" if last else None)


class CanaryEngine:
    """The part of `EmbeddedEngine` that the HTTP interface uses."""

    def __init__(self, pause: float = 0.0, context: int = 512):
        self.tokenizer: Any = tiny_tokenizer()
        self.context, self.vocabulary, self.alive, self.pause = context, len(self.tokenizer), True, pause
        self.running = self.written = 0
        self.broken: set[str] = set()

    def start(self) -> None: ...

    def close(self) -> None:
        self.alive = False

    def statistics_help(self) -> dict[str, str]:
        return {"bank_hits": "Adapters found in the bank."}

    def statistics(self) -> dict[str, float]:
        return {"bank_hits": 3.0}

    def edited(self, folders: list[Path], length: int) -> list[int]:
        return [length - 1] if folders else []

    def check(self, folder: Path) -> None:
        if folder.name in self.broken:
            raise ReftuneError(f"{folder}: is damaged.")

    async def submit(
        self, prompt: list[int], *, adapters: list[tuple[Path, float]], max_new_tokens: int, sampling: Sampling
    ) -> CanaryStream:
        for folder, _ in adapters:
            self.check(folder)
        text = " ".join(f"{folder.name} {weight:g}" for folder, weight in adapters) or "base"
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return CanaryStream(self, ids[:max_new_tokens])
