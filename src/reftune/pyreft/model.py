"""``ReftModel``: pyreft's model over this library's engine, and ``get_reft_model``."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reftune.engine.hooks import Engine
from reftune.engine.intervention import Intervention, Placement
from reftune.engine.position_grammar import Positions, parse_positions
from reftune.engine.transformers_names import enable_checkpointing
from reftune.errors import ReftuneError
from reftune.pyreft.config import ReftConfig
from reftune.pyreft.locations import location_masks, rows_by_intervention, subspace_directions

logger = logging.getLogger(__name__)

EVERYWHERE, ON_PROMPT, AFTER_PROMPT = (parse_positions(text) for text in ("all", "prompt", "generated"))


class ReftModel(nn.Module):
    """A model with edits, called as pyreft's is; **attaches the edits to ``model``**, which stays as it is by itself.

    The edits act inside this object's calls alone (after a training step, until ``eval()``); ``model`` called directly
    gives the base model's outputs.

    Args:
        config: where to edit and with what.
        model: a transformers model, or PEFT's model of LoRA or the like, whose own parameters then train too.

    Attributes:
        model: as given.
        reft_config: as given.
        config: the base model's configuration.
        interventions: the edits by pyvene's keys, in the order of the configuration.
    """

    def __init__(self, config: ReftConfig, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.reft_config = config
        base = self.get_base_model()
        self.config = getattr(base, "config", None)
        self._engine = Engine.of(base) or Engine(base, _plain_intervention)
        if self._engine.make_intervention is not _plain_intervention:
            raise ReftuneError("This model carries a PEFT ReFT adapter: use it as it is, or unload() it first.")
        self._names: list[str] = []
        number = len(self._engine.adapter_names())
        while any(name.startswith(f"edit{number}x") for name in self._engine.adapter_names()):
            number += 1
        counts: dict[str, int] = {}
        keys: list[str] = []
        for index, place in enumerate(config.representations):
            if place.intervention is None:
                raise ReftuneError(f"representations[{index}] has no intervention.")
            name = f"edit{number}x{index}"
            self._engine.place(name, Placement(place.site(base), EVERYWHERE), place.intervention)
            self._names.append(name)
            stem = _pyvene_key(place.component, place.layer)
            keys.append(f"{stem}#{counts.setdefault(stem, 0)}")
            counts[stem] += 1
        self._engine.refresh()
        # A plain dictionary: the edits are registered on the blocks, and belong to this module through `model`.
        edits = [place.intervention for place in config.representations]
        self.__dict__["interventions"] = dict(zip(keys, edits, strict=True))
        self._finalizer = weakref.finalize(self, _forget, self._engine, list(self._names))
        self._finalizer.atexit = False

    interventions: dict[str, nn.Module]

    def get_base_model(self) -> nn.Module:
        """The transformers model under PEFT's wrapping, if there is any."""
        found: Any = self.model
        return found.get_base_model() if hasattr(found, "get_base_model") else found

    # What is edited

    def train(self, mode: bool = True) -> ReftModel:
        """As ``nn.Module.train``; in evaluation the edits act inside this object's calls alone."""
        super().train(mode)
        if not mode:
            self._activate([])
        return self

    def _activate(self, names: list[str]) -> None:
        for found in self._engine.interventions.values():
            found._active_adapter = [name for name in names if name in found.placements]

    def _restore(self, active: Mapping[str, Any]) -> None:
        for path, found in self._engine.interventions.items():
            found._active_adapter = active.get(path, [])

    @contextmanager
    def _editing(self, without_locations: Positions = EVERYWHERE) -> Iterator[None]:
        before = {path: found._active_adapter for path, found in self._engine.interventions.items()}
        for found in self._engine.interventions.values():
            for name in self._names:
                if name in found.placements:
                    found.placements[name].positions = without_locations
        self._activate(self._names)
        try:
            yield
        finally:
            # Checkpointed layers run again in backward, when this call is over.
            if not (self.training and torch.is_grad_enabled()):
                self._restore(before)

    @contextmanager
    def _plain(self) -> Iterator[None]:
        before = {path: found._active_adapter for path, found in self._engine.interventions.items()}
        self._activate([])
        try:
            yield
        finally:
            self._restore(before)

    def _edit_arguments(self, inputs: Mapping[str, Any], locations: Any, subspaces: Any) -> dict[str, Any]:
        """``unit_locations`` and ``subspaces`` as the engine takes them."""
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is None:
            raise ReftuneError("The inputs hold neither input_ids nor inputs_embeds.")
        batch, length = int(tokens.shape[0]), int(tokens.shape[1])
        arguments: dict[str, Any] = {}
        masks = location_masks(locations, self._names, batch, length)
        if masks:
            arguments["intervention_mask"] = masks
        edits: list[Any] = list(self.interventions.values())
        wanted = [None] * len(edits) if subspaces is None else rows_by_intervention(subspaces, self._names)
        for index, edit in enumerate(edits):
            if getattr(edit, "own_forward", None) is not None:  # it makes of its subspaces what it will
                edit.call, wanted[index] = (batch, wanted[index]), None
        ranks = [getattr(edit, "r", 0) for edit in edits]
        partitions = [place.subspace_partition for place in self.reft_config.representations]
        directions = subspace_directions(wanted, self._names, ranks, partitions, batch)
        if directions:
            arguments["intervention_directions"] = directions
        return arguments

    def set_scale(self, value: float, key: str | None = None) -> None:
        """Multiply what the edits add: 1 as trained, 0 nothing, negative the other way.

        Args:
            value: the factor.
            key: of ``interventions``; None: all of them.

        Raises:
            ReftuneError: an unknown key.
        """
        if key is not None and key not in self.interventions:
            raise ReftuneError(f"key={key!r}: the interventions are {', '.join(self.interventions)}.")
        for name, own in zip(self._names, self.interventions, strict=True):
            for found in self._engine.interventions.values():
                if name in found.placements and key in (None, own):
                    found.placements[name].scale = float(value)

    # Calls

    def forward(
        self,
        base: Mapping[str, Any] | None = None,
        sources: Any = None,
        unit_locations: Any = None,
        source_representations: Any = None,
        subspaces: Any = None,
        labels: Any = None,
        output_original_output: bool = False,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """Run the model with its edits.

        Args:
            base: the model's inputs by name (``input_ids``, ``attention_mask``, ...).
            sources: has no place in ReFT, and must be None.
            source_representations: likewise.
            unit_locations: which tokens each edit touches (see ``reftune.pyreft.locations``); None: every token.
            subspaces: which directions of each edit act; None: all.
            labels: as the model takes them.
            output_original_output: whether the base model's output is wanted as well.
            return_dict: likewise.
            use_cache: likewise.
            **inputs: without ``base``: the inputs themselves, ``intervention_locations`` among them, as a trainer
                passes a batch.

        Returns:
            The pair (base model's output or None, edited output); without ``base``, the edited output.

        Raises:
            ReftuneError: locations or subspaces of a wrong shape, or source inputs.
        """
        _refuse_sources(sources, source_representations)
        given = dict(inputs if base is None else base)
        given.pop("id", None)
        if base is None:
            unit_locations = given.pop("intervention_locations", unit_locations)
        options = {"labels": labels, "return_dict": return_dict, "use_cache": use_cache}
        given |= {name: value for name, value in options.items() if value is not None}
        before = None
        if base is not None and output_original_output:
            with self._plain():
                before = self.model(**given)
        with self._editing():
            after = self.model(**given, **self._edit_arguments(given, unit_locations, subspaces))
        return after if base is None else (before, after)

    @torch.no_grad()
    def generate(
        self,
        base: Mapping[str, Any],
        sources: Any = None,
        unit_locations: Any = None,
        source_representations: Any = None,
        intervene_on_prompt: bool = False,
        subspaces: Any = None,
        output_original_output: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Generate with the edits, in evaluation mode.

        Args:
            base: the tokenised prompts, ``input_ids`` and ``attention_mask``.
            sources: must be None.
            source_representations: must be None.
            unit_locations: which tokens of the prompt each edit touches; None: all that ``intervene_on_prompt`` names.
            intervene_on_prompt: True: the prompt is edited. False (pyreft's default): the generated tokens are.
            subspaces: which directions of each edit act.
            output_original_output: whether to generate with the base model as well.
            **kwargs: as for transformers' ``generate``.

        Returns:
            The pair (base model's tokens or None, edited tokens).

        Raises:
            ReftuneError: as for calling; or locations without ``intervene_on_prompt=True``.
        """
        _refuse_sources(sources, source_representations)
        if unit_locations is not None and not intervene_on_prompt:
            raise ReftuneError(
                "unit_locations name tokens of the prompt: pass intervene_on_prompt=True, or no unit_locations to edit "
                "the generated tokens."
            )
        given: dict[str, Any] = {"pad_token_id": _pad_token(self.get_base_model()), **dict(base), **kwargs}
        model: Any = self.model
        was_training, before = self.training, None
        self.eval()
        try:
            if output_original_output:
                with self._plain():
                    before = model.generate(**given)
            with self._editing(ON_PROMPT if intervene_on_prompt else AFTER_PROMPT):
                after = model.generate(**given, **self._edit_arguments(given, unit_locations, subspaces))
        finally:
            self.train(was_training)
        return before, after

    # Parameters

    def set_device(self, device: str | torch.device, set_model: bool = True) -> None:
        """Move the edits, and unless ``set_model=False`` the model, to a device."""
        for edit in self.interventions.values():
            edit.to(device)
        if set_model:
            self.model.to(device)

    def get_device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.model.parameters()).device

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return self.get_device()

    def disable_model_gradients(self) -> None:
        """Freeze what is not an edit; a PEFT model's own adapters go on training."""
        if hasattr(self.model, "get_base_model"):
            return
        for name, parameter in self.model.named_parameters():
            if ".intervention." not in f".{name}":
                parameter.requires_grad = False

    def count_parameters(self, include_model: bool = False) -> int:
        """Trainable parameters of the edits, and with ``include_model`` of the model."""
        return self._trainable(True) + (self._trainable(False) if include_model else 0)

    def _trainable(self, of_edits: bool) -> int:
        edited = {id(p) for edit in self.interventions.values() for p in edit.parameters()}
        return sum(p.numel() for p in self.parameters() if p.requires_grad and (id(p) in edited) is of_edits)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in pyreft's words."""
        edits, model = self._trainable(True), self._trainable(False)
        inside = sum(p.numel() for name, p in self.model.named_parameters() if ".intervention." not in f".{name}")
        print(
            f"trainable intervention params: {edits:,d} || trainable model params: {model:,d}\n"
            f"model params: {inside:,d} || trainable%: {100 * (edits + model) / inside}"
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What training changes: the edits (``interventions.<key>.<tensor>``) and the model's trainable parameters."""
        own = {
            f"interventions.{key}.{name}": value
            for key, edit in self.interventions.items()
            for name, value in edit.state_dict().items()
        }
        return own | {f"model.{name}": p.detach() for name, p in self._trained_of_model().items()}

    def _trained_of_model(self) -> dict[str, nn.Parameter]:
        named = self.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad and ".intervention." not in f".{name}"}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over what ``state_dict`` gave; **changes the edits and the model's trainable parameters**.

        Raises:
            ReftuneError: a tensor is missing.
        """
        expected = self.state_dict()
        if missing := sorted(set(expected) - set(state_dict)):
            raise ReftuneError(f"The checkpoint has no {missing[0]}: it is of a model with other edits.")
        for key, edit in self.interventions.items():
            start = f"interventions.{key}."
            edit.load_state_dict({n.removeprefix(start): v for n, v in state_dict.items() if n.startswith(start)})
        with torch.no_grad():
            for name, parameter in self._trained_of_model().items():
                parameter.copy_(state_dict[f"model.{name}"])
        return torch.nn.modules.module._IncompatibleKeys([], [])

    # What trainers ask a model

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model's forward takes ``num_items_in_batch``."""
        parameters = inspect.signature(self.get_base_model().forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """As the base model's."""
        enable_checkpointing(self.get_base_model(), gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """As the base model's."""
        base: Any = self.get_base_model()
        base.gradient_checkpointing_disable()

    # Files

    def save(
        self,
        save_directory: str | Path,
        save_to_hf_hub: bool = False,
        hf_repo_name: str = "my-awesome-model",
        positions: str | None = None,
    ) -> None:
        """Write an adapter folder of this library (PEFT's layout, safetensors).

        Args:
            save_directory: the folder; made if need be.
            save_to_hf_hub: whether to upload it too.
            hf_repo_name: the repository's name there.
            positions: which tokens the adapter edits where nobody passes ``unit_locations``; by default the
                configuration's, which the trainers fill in, else ``l1`` (``f1+l1`` for an untied pair).
        """
        from reftune.pyreft.checkpoint import save_model

        save_model(self, Path(save_directory), positions)
        if save_to_hf_hub:
            from huggingface_hub import HfApi

            api = HfApi()
            api.create_repo(hf_repo_name, exist_ok=True)
            api.upload_folder(repo_id=hf_repo_name, folder_path=str(save_directory))

    @staticmethod
    def load(
        load_directory: str | Path,
        model: nn.Module,
        local_directory: str | None = None,
        from_huggingface_hub: bool = False,
        **other: Any,
    ) -> ReftModel:
        """Attach a saved adapter to a model: one of ours, or one that pyreft saved.

        Args:
            load_directory: a folder, or with ``from_huggingface_hub`` a repository's name.
            model: the base model.
            local_directory: where to download to.
            from_huggingface_hub: whether to download first.
            **other: pyvene's settings, which have no meaning here.

        Raises:
            ReftuneError: no adapter there, or one that does not fit the model.
        """
        from reftune.pyreft.checkpoint import load_config

        if from_huggingface_hub:
            from huggingface_hub import snapshot_download

            load_directory = snapshot_download(str(load_directory), local_dir=local_directory)
        return get_reft_model(model, load_config(Path(load_directory), model), set_device=True)


def get_reft_model(
    model: nn.Module, reft_config: ReftConfig, set_device: bool = True, disable_model_grads: bool = True
) -> ReftModel:
    """Attach edits to a model; **changes the model**: adds the edits and freezes everything else.

    Args:
        model: a transformers model, or PEFT's model of LoRA or the like, whose own parameters then go on training.
        reft_config: where to edit and with what.
        set_device: move the edits to the model's device.
        disable_model_grads: freeze the model.
    """
    reft_model = ReftModel(reft_config, model)
    if set_device:
        reft_model.set_device(reft_model.get_device(), set_model=False)
    if disable_model_grads:
        reft_model.disable_model_gradients()
    return reft_model


def _refuse_sources(*given: Any) -> None:
    if any(source is not None for source in given):
        raise ReftuneError(
            "sources: an edit of ReFT has no source inputs; interchange interventions are in reftune.causal."
        )


def _plain_intervention(block: nn.Module) -> Intervention:
    return Intervention()


def _pyvene_key(component: str, layer: int | None) -> str:
    if "{layer}" not in component and ":" not in component:
        return f"layer_{layer}_comp_{component}_unit_pos_nunit_1"
    path = component.format(layer=layer).replace(".", "_").replace(":", "_")
    return f"comp_{path}_unit_pos_nunit_1"


def _pad_token(model: Any) -> int | None:
    config = getattr(model, "generation_config", None)
    pad, eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    return pad if pad is not None else eos[0] if isinstance(eos, (list, tuple)) else eos


def _forget(engine: Engine, names: list[str]) -> None:
    for name in names:
        engine.remove(name)
