"""ReFT as a PEFT method: after ``import reftune``, everything that PEFT, transformers and TRL do with adapters works.

The tuner is thin: the engine (``reftune.attach``) does the work, PEFT's own code keeps the books. What is overridden
here is where PEFT's defaults, written for tuners that replace a linear layer, would do nothing or the wrong thing for
one that adds a child and hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _delete_auxiliary_adapter
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, set_additional_trainable_modules
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from reftune.adapter.checkpoint import CONFIG_FILE
from reftune.adapter.merging import merge_constant
from reftune.adapter.tensors import check_tensors, unchanged_on_error, under
from reftune.engine.blocks import device_of, inside
from reftune.engine.hooks import BASE_ROW, Engine
from reftune.engine.intervention import Intervention
from reftune.engine.planning import Planner
from reftune.engine.position_plan import rows_of
from reftune.engine.sites import attention_module, find_sites
from reftune.errors import ReftuneError

REFT = "REFT"
"""The adapter's kind, as PEFT and `adapter_config.json` have it."""
_FSDP_1 = "_fsdp_wrapped_module."
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""What PEFT adds to `modules_to_save` after the adapter is on the model."""


class ReftLayer(BaseTunerLayer, Intervention):
    """The child module of a block, as PEFT keeps books on it.

    Args:
        block: the block that carries it.
    """

    adapter_layer_names = Intervention.adapter_layer_names
    other_param_names: tuple[str, ...] = ()

    def __init__(self, block: nn.Module) -> None:
        Intervention.__init__(self)
        self._disable_adapters = False
        self._block = (block,)  # in a tuple, so that it is no child of its own child

    def get_base_layer(self) -> nn.Module:
        """The block."""
        return self._block[0]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: an edit is no weight of this layer. Another adapter on the same model may be merged around it."""

    def unmerge(self) -> None:
        """Nothing, as nothing was merged."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; **changes this module**, and removes it and its hooks when no adapter is left."""
        super().delete_adapter(adapter_name)
        self.placements.pop(adapter_name, None)
        self.engine.prune()

    def _of_block(self) -> Iterator[nn.Parameter]:
        """The block's own parameters."""
        return (p for n, p in self.get_base_layer().named_parameters() if "intervention." not in n)

    def _edits(self, adapter_name: str) -> list[nn.Module]:
        return [c[adapter_name] for c in (self.reft_edits, self.reft_suffix_edits) if adapter_name in c]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or device_of(self.get_base_layer())
        for edit in self._edits(adapter_name):
            if device is not None and not any(p.is_meta for p in edit.parameters()):
                edit.to(device=device)

    def cast_to_block(self, adapter_name: str) -> None:
        """Give an adapter's tensors the dtype of the block's; **changes this module**."""
        dtype = next((p.dtype for p in self._of_block() if p.is_floating_point()), None)
        for edit in self._edits(adapter_name):
            edit.to(dtype=dtype)


class ReftModel(BaseTuner):
    """The tuner that ``get_peft_model(model, ReftConfig(...))`` builds: ``peft_model.base_model``.

    A ReFT adapter that the model has under this name gives way to the new one, whole.

    Args:
        model: the base model, or a ``PeftModel`` over it.
        peft_config: as for ``BaseTuner``.
        adapter_name: as for ``BaseTuner``.
        **kwargs: as for ``BaseTuner``.

    Raises:
        ReftuneError: an adapter that does not fit, or the name of another method's; the model is as it was then.
    """

    prefix: str = "reft_"
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, list[str]] = {}
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *others: Any, **more: Any
    ) -> dict[str, Tensor]:
        """PEFT's, and under FSDP 1 the edits: a state's names are without the wrapping, the modules' are with it."""
        found: Any = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *others, **more)
        paths = tuple(
            f"{path.replace(_FSDP_1, '')}."
            for path, module in model.named_modules()
            if _FSDP_1 in path and isinstance(module, Intervention)
        )
        return found | {name: weight for name, weight in state_dict.items() if name.startswith(paths)}

    def __init__(self, model: Any, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        model = under(model)
        present = getattr(model, "peft_config", {}).get(adapter_name)
        if present is not None and present.peft_type != REFT:
            raise ReftuneError(
                f"adapter {adapter_name!r} of this model is a {present.peft_type.value} adapter: give this one a name "
                "of its own, as in get_peft_model(model, config, adapter_name='edit')."
            )
        with unchanged_on_error(model):
            super().__init__(model, peft_config, adapter_name, **kwargs)

    @property
    def engine(self) -> Engine:
        """The engine on the base model."""
        return Engine.of(self.model) or Engine(self.model, ReftLayer)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Attach an adapter's edits; **changes the model** (see ``BaseTuner.inject_adapter`` for the arguments).

        Raises:
            ReftuneError: a layer, component or rank that this model does not have.
        """
        config: Any = self.peft_config[adapter_name]
        if config.peft_type != REFT:
            raise ReftuneError(
                f"adapter {adapter_name!r} is a {config.peft_type} adapter; ReFT attaches ReftConfig only."
            )
        if adapter_name == BASE_ROW:
            raise ReftuneError(
                f"{BASE_ROW!r} names the base model's rows in a mixed batch; give the adapter another name."
            )
        self._check_new_adapter_config(config)
        self._check_tied_modules(model, config)
        self._check_trained_tokens(config)
        engine = self.engine
        if engine.make_intervention is not ReftLayer:
            raise ReftuneError(
                "This model carries edits from reftune.attach: detach them before making it a PEFT model."
            )
        if not engine.adapter_names():
            self.active_adapter = adapter_name
        first = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        trainable = [] if first else [(p, p.requires_grad) for p in model.parameters()]
        self._check_modules_to_save(config, adapter_name)
        with unchanged_on_error(model):
            self._attach(model, adapter_name, config, low_cpu_mem_usage)
        for parameter, required in trainable:
            parameter.requires_grad = required

    def _attach(self, model: nn.Module, adapter_name: str, config: Any, low_cpu_mem_usage: bool) -> None:
        engine = self.engine
        if adapter_name in engine.adapter_names():
            _delete_auxiliary_adapter(model, adapter_name, None)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            try:
                sites = engine.add(adapter_name, config.spec())
            except ReftuneError as error:
                path = config.weights_file
                raise error if path is None else ReftuneError(f"{path.parent / CONFIG_FILE}: {error}") from None
        self.targeted_module_names += [s.block_path for s in sites if s.block_path not in self.targeted_module_names]
        self._mark_only_adapters_as_trainable(model)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=BaseTuner.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_trained_tokens(self, config: Any) -> None:
        tied = self._get_module_names_tied_with_embedding() if config.trainable_token_indices is not None else []
        for name in config.modules_to_save or ():
            if any(f".{module}".endswith(f".{name}") for module in tied):
                raise ReftuneError(
                    f"modules_to_save={config.modules_to_save}: {name} shares the embedding's weights in this model, "
                    "and trainable_token_indices trains its tokens already: leave it out. (TRL's chat_template_path "
                    "puts it there: give the trainer a tokenizer that has the template and a model resized to it.)"
                )

    def _check_modules_to_save(self, config: Any, adapter_name: str) -> None:
        """Refuse modules whose copies, which PEFT makes and runs in their place, would hold an edit or carry one."""
        names = [*(config.modules_to_save or ()), *_HEADS.get(config.task_type, ())]
        saved = [(p, m) for p, m in self.model.named_modules(remove_duplicate=False) if p.endswith(tuple(names))]
        sites = find_sites(self.model, config.component, config.layers_to_transform) if saved else []
        others = [name for name in self.engine.adapter_names() if name != adapter_name]
        sites += [placed.site for name in others for placed in self.engine.placements(name)]
        for site in sites:
            block = self.model.get_submodule(site.block_path)
            carrier = attention_module(block) if site.module_path != site.block_path else None
            for path, module in saved:
                if inside(site.module_path, path) or inside(site.block_path, path) or module is carrier:
                    raise ReftuneError(
                        f"modules_to_save={names} names {path}, and {site.module_path} is edited: a module that is "
                        "trained whole holds no edit and carries none. Leave it out, or edit another component, such "
                        "as block_output."
                    )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self.engine.interventions.values():
                assert isinstance(layer, ReftLayer)
                layer.cast_to_block(adapter_name)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise ReftuneError("ReFT replaces no module; its adapters are attached by inject_adapter.")

    def set_scale(self, adapter_name: str, value: float) -> None:
        """Multiply what an adapter adds; **changes the model**, and is not saved with the adapter.

        Args:
            adapter_name: one of this model's ReFT adapters.
            value: 1 as trained, 0 nothing, between them weaker, negative the other way.

        Raises:
            ReftuneError: an adapter that is not on this model.
        """
        found = [
            layer.placements[adapter_name]
            for layer in self.engine.interventions.values()
            if adapter_name in layer.placements
        ]
        if not found:
            raise ReftuneError(
                f"adapter {adapter_name!r} is not on this model, which has {self.engine.adapter_names()}."
            )
        for placement in found:
            placement.scale = float(value)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        planner, given = self.engine.planner, kwargs.get("adapter_names")
        with self.engine.mixed(given), ExitStack() as hooks:
            own = [m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper)] if given else []
            for wrapper in own:
                choose = partial(_rows_own_modules, planner, planner.row_adapters or [])
                hooks.callback(wrapper.register_forward_hook(choose, with_kwargs=True).remove)
            yield

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; **changes the model**. If none is active then, the first that is left becomes it."""
        active = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        if left := active or self.engine.adapter_names()[:1]:
            self.set_adapter(left)

    def unload(self) -> nn.Module:
        """Remove every edit; **changes the model** back.

        Returns:
            The base model, bit-exactly as it was before the first adapter.
        """
        self.engine.detach()
        return self._finish_unloading(merge=False)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Fold the edits into the weights, where that is the same function, and remove them; **changes the model**.

        An edit at chosen positions depends on the token's place and cannot be a weight. What can: an edit that adds the
        same vector at every token (``lobireft`` at ``positions="all"``) to the output of a module that has a bias.

        Raises:
            ReftuneError: an adapter that no weight can express, or that is not here; nothing has been changed then.
        """
        engine = self.engine
        merge_constant(engine, self.active_adapters if adapter_names is None else adapter_names, safe=safe_merge)
        engine.detach()
        return self._finish_unloading(merge=True)

    def _finish_unloading(self, merge: bool) -> nn.Module:
        """Unwrap ``modules_to_save`` and forget PEFT's marks."""
        for path, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                parent, _, name = path.rpartition(".")
                if merge or not isinstance(module, ModulesToSaveWrapper):
                    kept = module.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)
                else:
                    kept = module.original_module
                setattr(self.model.get_submodule(parent), name, kept)
        others = {name: c for name, c in self.peft_config.items() if c.peft_type != REFT}
        if others:
            self.model.peft_config = others
        elif hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Not offered: a merged constant could not be told apart again; use ``merge_and_unload``."""
        raise ReftuneError(
            "ReFT adapters are not merged in place: use merge_and_unload(), or keep the adapter attached. (TRL's "
            "use_vllm=True asks for it, to write answers from weights alone: leave it out; "
            "use_transformers_continuous_batching=True writes many at once, edited.)"
        )

    def unmerge_adapter(self) -> None:
        """Not offered, as ``merge_adapter`` is not: there is never anything to take out again."""
        raise ReftuneError(
            "ReFT adapters are never merged in place, so that there is nothing to unmerge: disable_adapter() gives the "
            "base model for a while, unload() for good."
        )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not offered: edits are functions of the state, and a sum of their tensors is not the sum of what they do."""
        raise ReftuneError(
            "ReFT adapters do not add up to one: let several edit with base_model.set_adapter([...]), each as strongly "
            "as base_model.set_scale(name, value) says."
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        return check_tensors(model, config, adapter_name, remapped)


def _rows_own_modules(
    planner: Planner, names: list[str], wrapper: AuxiliaryTrainingWrapper, args: Any, kwargs: Any, output: Any
) -> Any:
    """After a forward of a saved module or trained tokens in a mixed batch: each row's output from its adapter's own.

    Args:
        planner: knows the batch that this thread is computing.
        names: the adapter of each row, as the planner has it while that batch is under way.
        wrapper: holds the base's own module and what each adapter has in its place.
        args: what it was called with; tensors have the rows (of beams: a multiple of them) as first dimension.
        kwargs: likewise.
        output: of the active adapter's module.
    """
    if planner.row_adapters is not names or wrapper.disable_adapters:  # another thread's forward
        return output
    first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    own = [name if name in wrapper._adapters else None for name in names]
    index = {name: rows_of(own, name, len(first), first.device).nonzero().squeeze(-1) for name in dict.fromkeys(own)}

    def forward(name: str | None, *args: Any, **kwargs: Any) -> Any:
        if name is None:
            return wrapper.original_module(*args, **kwargs)
        if isinstance(wrapper, ModulesToSaveWrapper):
            return wrapper.modules_to_save[name](*args, **kwargs)
        return wrapper._forward_wrapped_mixed_batch(args[0], name, *args[1:], **kwargs)

    def of(chosen: Tensor, value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.ndim and len(value) == len(first)
        return value.index_select(0, chosen) if has_rows else value

    parts = [
        forward(name, *tree_map(partial(of, chosen), args), **tree_map(partial(of, chosen), kwargs))
        for name, chosen in index.items()
    ]
    order = torch.cat(list(index.values())).argsort()
    return tree_map(lambda *found: torch.cat(found).index_select(0, order), *parts)
