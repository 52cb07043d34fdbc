"""`model.generate_batch` and `model.init_continuous_batching` while edits are attached: each request has its adapter.

transformers' own methods do the work; these stand in for them on the model, as `generate`'s does, and are removed with
the edits. Everything that batches continuously goes through the second: the context manager, TRL, `transformers serve`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from reftune.engine.packed import Carried, CarriedEdits, carry, check_prompt, settings
from reftune.engine.row_plan import edited_ranges
from reftune.errors import ReftuneError

_NOT_HERE = ("prompt_lengths", "intervention_mask", "intervention_directions")


class _Prompt(list[int]):
    """A prompt that knows its adapters: transformers hands it from `generate_batch` to `add_request` as it is."""

    carried: Carried


class InitContinuousBatching:
    """Stands in for ``model.init_continuous_batching``.

    Args:
        engine: the ``Engine`` on the model.
    """

    def __init__(self, engine: Any):
        self.engine = engine

    def __call__(
        self, generation_config: Any = None, continuous_batching_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers', with requests that carry the adapters which are active when they are added.

        Raises:
            ReftuneError: settings under which edits would be lost.
        """
        model: Any = self.engine.model
        if continuous_batching_config is None:
            given = model.generation_config if generation_config is None else generation_config
            continuous_batching_config = getattr(given, "continuous_batching_config", None)
        config = settings(continuous_batching_config)
        manager = type(model).init_continuous_batching(model, generation_config, config, *args, **kwargs)
        return carry(manager, self._carried)

    def _carried(self, prompt: Sequence[int]) -> Carried:
        return prompt.carried if isinstance(prompt, _Prompt) else carried(self.engine, len(prompt), None, {})


class GenerateBatch:
    """Stands in for ``model.generate_batch``.

    Args:
        engine: the ``Engine`` on the model.
    """

    def __init__(self, engine: Any):
        self.engine = engine

    def __call__(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: Any = None,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers', with an adapter for each prompt.

        Args:
            inputs: token ids of each prompt.
            generation_config: as for transformers.
            *args: as for transformers.
            adapter_names: a name for each prompt, ``"__base__"`` for no edit; None: the active adapters.
            **kwargs: as for transformers.

        Raises:
            ReftuneError: names or prompts that do not fit, arguments that continuous batching does not have.
            RuntimeError: a request failed; transformers would leave it out of its answer.
        """
        model: Any = self.engine.model
        for name in _NOT_HERE:
            if name in kwargs:
                raise ReftuneError(f"{name}: continuous batching edits at the adapters' positions; use generate.")
        names = [None] * len(inputs) if adapter_names is None else list(adapter_names)
        if len(names) != len(inputs):
            raise ReftuneError(f"adapter_names has {len(names)} names for {len(inputs)} prompts: give one name each.")
        self.engine.check_names(name for name in names if name is not None)
        kinds = ("modules_to_save", "token_adapter")
        whole = [path for path, m in model.named_modules() if any(kind in m._modules for kind in kinds)]
        if adapter_names is not None and whole:
            raise ReftuneError(
                f"adapter_names: {whole[0]} is an adapter's own (modules_to_save, trainable_token_indices), and "
                "continuous batching runs one such module for all requests; use generate(adapter_names=...), or "
                "set_adapter and no adapter_names."
            )
        given = model.generation_config if generation_config is None else generation_config
        answers = given.num_return_sequences or 1
        keys: dict[str, str] = {}
        prompts = []
        for ids, name in zip(inputs, names, strict=True):
            check_prompt(ids, answers)
            prompt = _Prompt(ids)
            prompt.carried = carried(self.engine, len(prompt), name, keys)
            prompts.append(prompt)
        results = type(model).generate_batch(model, prompts, generation_config, *args, **kwargs)
        wanted = len(prompts) * answers
        errors = [result.error for result in results.values() if result.error is not None]
        if errors or len(results) < wanted:
            why = errors[0] if errors else "see the log of transformers"
            raise RuntimeError(f"continuous batching answered {len(results) - len(errors)} of {wanted} requests: {why}")
        return results


def carried(engine: Any, prompt_length: int, name: str | None, keys: dict[str, str]) -> Carried:
    """What a request carries: the adapter of that name, or those which are active now.

    Args:
        engine: whose adapters edit.
        prompt_length: tokens of the prompt.
        name: of the adapter; None: the active ones.
        keys: of the adapters looked at already; **added to**.
    """
    names = list(engine.active_positions()) if name is None else [name]
    edits = []
    for one in names:
        placements = engine.placements(one)
        if placements:
            if one not in keys:
                keys[one] = _key(engine, one)
            untied = len(engine.edits(one)) > len(placements)
            edits.append(CarriedEdits(one, edited_ranges(placements[0].positions, prompt_length, untied), keys[one]))
    return Carried(tuple(edits))


@torch.no_grad()
def _key(engine: Any, name: str) -> str:
    """A digest of an adapter's content: training between two calls of one manager makes another adapter of it."""
    digest = hashlib.blake2b(digest_size=16)
    for placement in engine.placements(name):
        digest.update(repr((placement.site.module_path, placement.site.side, placement.scale)).encode())
    for path, edit in engine.edits(name).items():
        digest.update(f"{path} {_described(edit)}".encode())
        for key, tensor in edit.state_dict().items():
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _described(edit: nn.Module) -> str:
    return f"{type(edit).__module__}.{type(edit).__qualname__}({edit.extra_repr()})"
