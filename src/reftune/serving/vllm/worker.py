"""Worker: ReFT adapters in vLLM's cache of LoRA adapters, and the numbers of each step on their way to the slots."""
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMappingType
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from reftune.errors import ReftuneError
from reftune.serving.folded import FoldedAdapter
from reftune.serving.vllm.blocks import decoder_blocks
from reftune.serving.vllm.requested import ModelShape, is_reft, read_checked, refuse_lora_unless
from reftune.serving.vllm.slots import NAME, DenseSlots, PlannedSlots, Settings, Slots, Step

logger = init_logger(__name__)
VERSION = 1
"""Of what the hooks put into a compiled graph."""
_KEPT_BYTES = 1 << 30
"""Of folded edits kept beside vLLM's cache: what it throws out comes back as it was, whatever became of the folder."""


class ReftAdapter(LoRAModel):
    """A ReFT adapter in vLLM's table of LoRA adapters: one that has no weights for any linear layer."""

    def __init__(self, number: int, adapter: FoldedAdapter):
        super().__init__(number, 1, {})
        self.adapter = adapter


class ReftAdapters(LRUCacheLoRAModelManager):
    """vLLM's cache and slots; a ReFT adapter that enters a slot is written there."""

    reftune_slots: Slots | None = None

    def _add_adapter(self, lora: LoRAModel) -> None:
        if lora.loras:
            super()._add_adapter(lora)
        else:  # a ReFT adapter, or the dummy of a warm-up where no linear layer is wrapped
            self._registered_adapters[lora.id] = lora

    def activate_adapter(self, lora_id: int) -> bool:
        """As vLLM's; a ReFT adapter is written to its slot."""
        fresh = super().activate_adapter(lora_id)
        model = self._registered_adapters[lora_id]
        if fresh and isinstance(model, ReftAdapter) and self.reftune_slots is not None:
            self.reftune_slots.put(lora_id, self.lora_index_to_id.index(lora_id), model.adapter)
        return fresh

    def _deactivate_adapter(self, lora_id: int) -> None:
        super()._deactivate_adapter(lora_id)
        if self.reftune_slots is not None:
            self.reftune_slots.drop(lora_id)

    def set_adapter_mapping(self, mapping: Any) -> None:
        """As vLLM's."""
        if self.modules:  # with no linear layer wrapped there are no kernels of LoRA to tell
            super().set_adapter_mapping(mapping)


class ReftWorkerAdapters(LRUCacheWorkerLoRAManager):
    """Loads ReFT folders where vLLM loads LoRA folders, and lays out each step's edits."""

    _manager_cls = ReftAdapters
    next_step: Step | None = None

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> Any:
        """As vLLM's; **hooks the decoder blocks**, and names that in the key of compiled graphs."""
        if torch.device(self.device).type == "cpu":
            spare_base_rows()
        wrapped = super().create_lora_manager(model, vllm_config)
        self._shape = ModelShape.of(vllm_config)
        self._kept: OrderedDict[int, FoldedAdapter] = OrderedDict()
        self._contents: dict[int, tuple[str, str]] = {}
        self._slots = make_slots(model, self._shape, vllm_config, self.device)
        self._adapter_manager.reftune_slots = self._slots
        return wrapped

    def _load_adapter(self, lora_request: Any) -> LoRAModel:
        number, path = lora_request.lora_int_id, lora_request.lora_path
        kept = self._kept.get(number)
        if kept is not None and self._contents[number][0] == path:
            self._kept.move_to_end(number)
            return ReftAdapter(number, kept)
        folder = path if is_reft(path) else get_adapter_absolute_path(path)
        if not is_reft(folder):
            refuse_lora_unless(bool(self._adapter_manager.modules), path)
            return super()._load_adapter(lora_request)
        adapter = read_checked(folder, self._shape)
        if isinstance(self._slots, DenseSlots):
            self._slots.check(adapter)
        if self._contents.setdefault(number, (path, adapter.digest)) != (path, adapter.digest):
            raise ReftuneError(
                f"adapter {lora_request.lora_name!r} (id {number}) is not what it was when this id was first used: "
                "load changed weights under a new id, so that requests in flight keep what they began with."
            )
        self._kept[number] = adapter
        while sum(one.nbytes for one in self._kept.values()) > _KEPT_BYTES and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return ReftAdapter(number, adapter)

    def add_adapter(self, lora_request: Any) -> bool:
        """As vLLM's; a ReFT adapter is not replaced in place, for requests in flight use it.

        Raises:
            ReftuneError: ``load_inplace`` with changed weights.
        """
        number = lora_request.lora_int_id
        if lora_request.load_inplace and number in self._contents:
            if read_checked(lora_request.lora_path, self._shape).digest != self._contents[number][1]:
                raise ReftuneError(
                    f"adapter {lora_request.lora_name!r}: a ReFT adapter is not replaced in place, requests in flight "
                    "keep what they began with. Unload it and load it again."
                )
            return (
                self._adapter_manager.activate_adapter(number)
                if number in self.list_adapters()
                else self._fresh(lora_request)
            )
        return super().add_adapter(lora_request)

    def _fresh(self, lora_request: Any) -> bool:
        import msgspec

        return super().add_adapter(msgspec.structs.replace(lora_request, load_inplace=False))

    def _apply_adapters(self, lora_requests: set[Any]) -> None:
        # vLLM's own loop copies the table of all registered adapters once for each adapter of the batch.
        held = self._adapter_manager
        if len(lora_requests) > held.lora_slots:
            return super()._apply_adapters(lora_requests)
        new = []
        for request in lora_requests:
            number = request.lora_int_id
            if number in held._active_adapters and (not request.load_inplace or number in self._contents):
                held._registered_adapters.touch(number)  # before any newcomer, which throws out what is oldest
                held._active_adapters.touch(number)
            else:
                new.append(request)
        for request in new:
            self.add_adapter(request)

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """As vLLM's, and lay out the forward that follows; a dummy run, which comes without a step, edits nothing."""
        step, self.next_step = self.next_step, None
        super().set_active_adapters(requests, mapping)
        if mapping is None or mapping.type == LoRAMappingType.LANGUAGE:
            self._slots.plan(step)


def spare_base_rows() -> None:
    """Keep LoRA off the rows of the base model on CPUs; **changes vLLM's operations**.

    vLLM numbers those rows -1 and looks their weights up by it, in a batch with rows of any adapter: the base model's
    would get the LoRA adapter of the last slot.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    stock = lora_ops.bgmv_shrink
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def bgmv_shrink(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
        stock(inputs, weights, output, indices, scaling)
        output.masked_fill_((indices < 0).unsqueeze(1), 0)

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink


def make_slots(model: nn.Module, shape: ModelShape, vllm_config: Any, device: torch.device) -> Slots:
    """Hook a model's blocks in the form that this engine needs; **changes the model and the configuration**.

    Raises:
        ReftuneError: a model whose blocks are not found, a form that would not edit.
    """
    settings = Settings.of(vllm_config.additional_config)
    graphs = vllm_config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    on_cpu = torch.device(device).type == "cpu"
    form = settings.form if settings.form != "auto" else "planned" if on_cpu and not graphs else "dense"
    if form == "planned" and graphs:
        raise ReftuneError(
            "additional_config: reftune.form='planned' with CUDA graphs: a graph would replay the edits of the batch "
            "that it was captured with. Leave form out, or start vLLM with --enforce-eager."
        )
    blocks = decoder_blocks(model, shape.layers, lambda module: isinstance(module, AttentionLayerBase))
    if form == "planned":
        slots: Slots = PlannedSlots(blocks)
    else:
        largest = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(vllm_config.scheduler_config.max_num_batched_tokens, largest) + 1024
        slots = DenseSlots(blocks, settings, vllm_config.lora_config.max_loras, shape.width, rows, device)
    # vLLM looks its compiled graphs up by a hash of the configuration, before it traces anything.
    key = {
        "version": VERSION,
        "form": form,
        "rank": settings.rank,
        "untied": settings.untied,
        "layers": settings.layers,
    }
    vllm_config.additional_config = {**(vllm_config.additional_config or {}), NAME: key}
    logger.info("reftune: %d decoder blocks can be edited, in the %s form", len(blocks), form)
    return slots


def step_of_v1(input_batch: Any, scheduled: Any) -> Step:
    """A step of the first model runner."""
    n = len(scheduled)
    return Step(
        input_batch.request_lora_mapping[:n].tolist(),
        input_batch.num_computed_tokens_cpu[:n].tolist(),
        scheduled.tolist(),
        input_batch.num_prompt_tokens[:n].tolist(),
    )


def step_of_v2(runner: Any, rows: Any, scheduled: Any) -> Step:
    """A step of the second model runner.

    Its count of computed tokens is an upper bound, exact as long as the prompt is being computed, and after the prompt
    the edits depend on nothing more.
    """
    states = runner.req_states
    return Step(
        runner.lora_state.lora_ids[rows].tolist(),
        states.num_computed_tokens_np[rows].tolist(),
        scheduled.tolist(),
        states.prompt_len.np[rows].tolist(),
    )
