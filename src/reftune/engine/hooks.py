"""The engine: hooks and child modules on a model, and their removal. `attach`, the tuner and causal methods call it.

Every target block gets a child module ``intervention`` and forward hooks that apply it; blocks are never wrapped or
replaced, so module paths, ``isinstance`` checks, device maps and gradient checkpointing stay as they were. Detaching
restores bit-exact outputs.

How a plan travels. The root's pre-hook makes one immutable ``PositionPlan`` a forward. The hook of the module that owns
the blocks adds it to their keyword arguments, a block's hook takes it out, and where an edit sits inside the block the
argument goes on to its attention module, whose own hook takes it: transformers checkpoints a block's ``forward``, so a
recomputation in backward passes through that attention hook again and sees the plan of its own forward, however many
forwards came in between. Where a model does not hand keyword arguments down, the plan is read from the planner, and two
forwards that both await a checkpointed backward are refused. Nothing of a forward lies on the model, the engine or an
intervention: what is under way belongs to its thread (``planning.py``), so several threads may use one model at once.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reftune.edits import make_edit
from reftune.engine.batching import GenerateBatch, InitContinuousBatching
from reftune.engine.blocks import device_of
from reftune.engine.forwards import accepts_any_keyword
from reftune.engine.intervention import Intervention, Placement
from reftune.engine.planning import Planner
from reftune.engine.position_grammar import Positions, parse_positions
from reftune.engine.quantised import Unpacked, check_unpacked
from reftune.engine.sites import Site, Stack, attention_module, find_sites
from reftune.engine.stand_ins import DirectForward
from reftune.engine.tensor_parallel import check_spread, edit_whole, share_tensors
from reftune.errors import ReftuneError

PLAN = "reft_plan"
CHILD = "intervention"
ENGINE = "_reftune_engine"
BASE_ROW = "__base__"
CHANGING = threading.RLock()
"""Held while adapters are added and removed."""


@dataclass(frozen=True)
class EditSpec:
    """Sites x positions x edit: everything that makes an adapter, in the names of the public contract.

    Attributes:
        method: a registered edit's name, or an ``nn.Module`` class.
        r: rank.
        layers_to_transform: a layer, a list of layers (negatives count from the end), or ``"all"``.
        component: where in the block (see ``reftune.engine.sites``).
        positions: which tokens (see ``reftune.engine.position_grammar``).
        share_weights: one edit for prefix and suffix; False: one each.
        options: further arguments of the edit (dropout, act_fn, init, parametrization).
    """

    method: str | type[nn.Module] = "loreft"
    r: int = 4
    layers_to_transform: int | Sequence[int] | Literal["all"] = "all"
    component: str = "block_output"
    positions: str = "l1"
    share_weights: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, site: Site) -> nn.Module:
        """A fresh edit for a site."""
        return make_edit(self.method, site.width, self.r, **self.options)


class _Generate:
    """Stands in for ``model.generate`` while edits are attached (docs/decisions/0002), and is removed with them."""

    def __init__(self, engine: Engine):
        self.planner = engine.planner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.planner.generate(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.planner.model).generate)  # type: ignore[attr-defined]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


_STAND_INS: dict[str, type[Any]] = {
    "generate": _Generate,
    "init_continuous_batching": InitContinuousBatching,
    "generate_batch": GenerateBatch,
}


class Engine:
    """All edits on one model. ``attach`` and the PEFT tuner make it; ``Engine.of(model)`` gives a model's own, if any.

    Args:
        model: the model, which keeps its class, modules and paths.
        make_intervention: makes the child module of a block.
    """

    def __init__(self, model: nn.Module, make_intervention: Callable[[nn.Module], Intervention]):
        self.model = model
        self.make_intervention = make_intervention
        self.interventions: dict[str, Intervention] = {}
        self.planner = Planner(model, self.active_positions)
        self._handles: dict[tuple[Any, ...], list[Any]] = {}

    @staticmethod
    def of(model: nn.Module) -> Engine | None:
        """The engine attached to a model, or None."""
        return model.__dict__.get(ENGINE)

    # Adding and removing adapters

    def add(self, name: str, spec: EditSpec) -> list[Site]:
        """Give every site of ``spec`` a fresh edit under ``name``, in place of what had it; **changes the model**.

        Returns:
            The sites.

        Raises:
            ReftuneError: a site that is not there, or a base that cannot be edited.
        """
        check_unpacked(self.model)
        positions = parse_positions(spec.positions)
        sites = find_sites(self.model, spec.component, spec.layers_to_transform)  # type: ignore[arg-type]
        untied = not spec.share_weights and positions.has_two_ends
        edits = [(spec.build(site), spec.build(site) if untied else None) for site in sites]
        with CHANGING:
            for site in sites:
                self._block(site.block_path)
            for found in self.interventions.values():
                found.remove(name)
            for site, (edit, pair) in zip(sites, edits, strict=True):
                self.place(name, Placement(site, positions), edit, pair)
            self.prune()
        return sites

    def _block(self, path: str) -> nn.Module:
        block = self.model.get_submodule(path)
        if path not in self.interventions and hasattr(block, CHILD):
            raise ReftuneError(f"{path or 'the model'} already has a child called {CHILD!r} that is not an edit's.")
        return block

    def place(self, name: str, placement: Placement, edit: nn.Module, pair: nn.Module | None = None) -> None:
        """Put a ready-made edit at one site (``refresh`` then makes it work); **changes the model**.

        Args:
            name: the adapter's name.
            placement: where and when it edits.
            edit: the edit, or the prefix's edit of an untied pair.
            pair: the suffix's edit of an untied pair.

        Raises:
            ReftuneError: the block has an edit of that name.
        """
        path = placement.site.block_path
        block = self._block(path)
        if path not in self.interventions:
            self.interventions[path] = self.make_intervention(block)
            self.interventions[path].engine = self
        elif name in self.interventions[path].placements:
            raise ReftuneError(f"{path or 'the model'} has an edit of the name {name!r} already: one name, one edit.")
        device = device_of(block)
        for module in (edit, pair):
            if module is None:
                continue
            module.train(self.model.training)
            if device is not None and not any(p.is_meta for p in module.parameters()):
                module.to(device=device)
                share_tensors(module, block)
        block.add_module(CHILD, self.interventions[path])
        self.interventions[path].add(name, placement, edit, pair)

    def remove(self, name: str) -> None:
        """Forget the adapter ``name``; **changes the model**. Removing the last one detaches the engine."""
        with CHANGING:
            for intervention in self.interventions.values():
                intervention.remove(name)
            self.prune()

    def prune(self) -> None:
        """Drop what no adapter uses any more; **changes the model**. Without any adapter the engine is detached."""
        with CHANGING:
            for path, intervention in list(self.interventions.items()):
                if not intervention.placements:
                    self._drop(path)
            self.refresh()

    def detach(self) -> None:
        """Remove everything that was added; **changes the model**, whose outputs are bit-exactly the base's again."""
        with CHANGING:
            for path in list(self.interventions):
                self._drop(path)
            self.refresh()

    def _drop(self, path: str) -> None:
        block = self.model.get_submodule(path)
        # A new dictionary, as PEFT deletes adapters while it walks through the modules.
        block._modules = {name: module for name, module in block._modules.items() if name != CHILD}
        del self.interventions[path]

    # Reading

    def adapter_names(self) -> list[str]:
        """Names of the adapters present."""
        return list(dict.fromkeys(name for found in self.interventions.values() for name in found.placements))

    def placements(self, name: str) -> list[Placement]:
        """Where an adapter edits."""
        return [found.placements[name] for found in self.interventions.values() if name in found.placements]

    def edits(self, name: str) -> dict[str, nn.Module]:
        """An adapter's edits by block path (``<path>:suffix`` for the second of an untied pair)."""
        return {
            f"{path}:suffix" if part == "suffix" else path: edit
            for path, found in self.interventions.items()
            if name in found.placements
            for part, edit in found.parts(name)
        }

    @contextmanager
    def mixed(self, row_adapters: Sequence[str] | None) -> Iterator[None]:
        """For the length of a ``with`` block, edit every row of a batch by its own adapter.

        Args:
            row_adapters: a name for each row, ``"__base__"`` for no edit; None changes nothing.

        Raises:
            ReftuneError: a name that is not on this model.
        """
        if row_adapters is None:
            yield
            return
        if isinstance(row_adapters, str):
            raise ReftuneError(f"adapter_names={row_adapters!r}: give a list with one name for each row.")
        names = list(row_adapters)
        self.check_names(names)
        with self.planner.mixed(names):
            yield

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse names of adapters that are not on this model.

        Raises:
            ReftuneError: one that is neither an adapter nor ``"__base__"``.
        """
        unknown = [name for name in dict.fromkeys(names) if name not in (*self.adapter_names(), BASE_ROW)]
        if unknown:
            raise ReftuneError(f"adapter_names: {unknown} not on this model, which has {self.adapter_names()}.")

    def active_positions(self) -> dict[str, Positions]:
        """Positions of the adapters that edit now."""
        active: dict[str, Positions] = {}
        row_adapters = self.planner.row_adapters
        for found in list(self.interventions.values()):
            for name in found.active_names(row_adapters):
                placement = found.placements.get(name)
                if placement is not None:
                    active[name] = placement.positions
        return active

    # Installing hooks

    def refresh(self) -> None:
        """Install the hooks that the present adapters need and remove all others; **changes the model**.

        Hooks that stay needed are left alone, so that a forward in another thread keeps them.
        """
        own = self.model.__dict__
        wanted = self._wanted() if self.interventions else {}
        for key in [key for key in self._handles if key not in wanted]:
            for handle in self._handles.pop(key):
                handle.remove()
        if not wanted:
            if own.pop(ENGINE, None) is not None:
                self._forward.remove()
                for name, stand_in in _STAND_INS.items():
                    if isinstance(own.get(name), stand_in):
                        del own[name]
            return
        for key, install in wanted.items():
            if key not in self._handles:
                self._handles[key] = install()
        if own.get(ENGINE) is not self:
            own[ENGINE] = self
            self._forward = DirectForward(self.model, self._begins)
        for name, stand_in in _STAND_INS.items():
            if hasattr(type(self.model), name) and name not in own:
                own[name] = stand_in(self)

    def _begins(self) -> bool:
        return not self.interventions or self.planner.begins_running()

    def _wanted(self) -> dict[tuple[Any, ...], Callable[[], list[Any]]]:
        """Groups of hooks, each with what installs it, by everything on which they depend."""
        wanted: dict[tuple[Any, ...], Callable[[], list[Any]]] = {
            ("root",): partial(self._on_forward, self.model, self.planner.enter),
            ("quantised",): lambda: [Unpacked(self.model)],
        }
        stacks = {
            placement.site.stack.owner_path: placement.site.stack
            for found in self.interventions.values()
            for placement in found.placements.values()
            if placement.site.stack is not None
        }
        handing = {owner_path: self._hands_down(stack) for owner_path, stack in stacks.items()}
        for owner_path, stack in stacks.items():
            enter = partial(self._enter_stack, stack.name, handing[owner_path])
            owner = self.model.get_submodule(owner_path)
            wanted["stack", owner_path, stack.name, handing[owner_path]] = partial(self._on_forward, owner, enter)
        for path, intervention in self.interventions.items():
            sites = [placement.site for placement in intervention.placements.values()]
            places = {(site.module_path, site.side): site for site in sites}
            stack = sites[0].stack
            key = ("block", path, id(intervention), tuple(places), stack.name if stack else "")
            handed = stack is not None and handing[stack.owner_path]
            wanted[(*key, handed)] = partial(self._hook_block, path, intervention, places, key[-1], handed)
        return wanted

    def _hands_down(self, stack: Stack) -> bool:
        """Whether a plan reaches the stack's blocks as a keyword argument."""
        paths = [stack.owner_path, *stack.block_paths]
        return all(accepts_any_keyword(self.model.get_submodule(path)) for path in paths)

    def _on_forward(self, module: nn.Module, enter: Callable[..., Any]) -> list[Any]:
        return [
            hook_before(module, enter),
            module.register_forward_hook(self.planner.leave, always_call=True),
        ]

    def _hook_block(
        self, path: str, intervention: Intervention, places: Mapping[tuple[str, str], Site], stack: str, handed: bool
    ) -> list[Any]:
        block = self.model.get_submodule(path)
        inside = any(module_path != path for module_path, _ in places)
        attention = attention_module(block) if inside else None
        hands_on = (
            attention is not None and attention is not block and all(map(accepts_any_keyword, (block, attention)))
        )
        enter = partial(self._enter_block, intervention, hands_on)
        handles = [hook_before(block, enter)]
        if attention is not None and hands_on:
            enter = partial(self._enter_attention, intervention)
            handles.append(hook_before(attention, enter))
        for site in places.values():
            at_block = handed and site.module_path == path
            edit = partial(self._edit, intervention, stack, site.module_path, site.side, at_block)
            handles.append(edit_passing(self.model, site, edit))
        return handles

    # The hooks

    def _enter_stack(self, stack: str, hands_down: bool, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self.planner.in_forward:
            args, kwargs = self.planner.enter(module, args, kwargs)
        if hands_down:
            kwargs = {**kwargs, PLAN: self.planner.plan_of(stack)}
        return args, kwargs

    def _enter_block(
        self, intervention: Intervention, hands_on: bool, block: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if not torch.compiler.is_compiling():
            intervention.is_handed = PLAN in kwargs  # a stack may take any keyword and keep it to itself
        if PLAN in kwargs:
            if not self.planner.in_forward:  # the whole block is computed again, with its hooks
                self.planner.hand(intervention, kwargs[PLAN])
            if not hands_on:
                kwargs = {name: value for name, value in kwargs.items() if name != PLAN}
        return args, kwargs

    def _enter_attention(
        self, intervention: Intervention, attention: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if PLAN in kwargs:
            self.planner.hand(intervention, kwargs[PLAN])
            kwargs = {name: value for name, value in kwargs.items() if name != PLAN}
        return args, kwargs

    def _edit(
        self, intervention: Intervention, stack: str, path: str, side: str, is_handed: bool, hidden: Tensor
    ) -> Tensor:
        is_handed = is_handed and intervention.is_handed
        return intervention.apply_at(path, side, hidden, self.planner.plan_at(intervention, stack, is_handed))


def hook_before(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """Let ``hook(module, args, kwargs)`` run before each forward of a module; **adds a hook**.

    A forward of another thread that meets the hook while it is being added or removed passes it by: torch then gives
    it no ``kwargs``.
    """
    return module.register_forward_pre_hook(partial(_before, hook), with_kwargs=True)


def _before(hook: Callable[..., Any], module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
    return None if kwargs is None else hook(module, args, kwargs)


def edit_passing(model: nn.Module, site: Site, edit: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Let the tensor that passes a site (of several, the first) go through ``edit``; **adds a hook**.

    Args:
        model: the model.
        site: the place.
        edit: is called at every forward of the module, with all channels, also where processes share them.

    Returns:
        The hook's handle; ``handle.remove()`` undoes it.

    Raises:
        ReftuneError: a place where tensor parallelism has no such tensor.
    """
    check_spread(model, site)
    module = model.get_submodule(site.module_path)
    edit = partial(edit_whole, edit, model.get_submodule(site.block_path), site.channels)
    if site.side == "output":
        return module.register_forward_hook(partial(_edit_output, edit))
    return hook_before(module, partial(_edit_input, edit))


def _edit_output(edit: Callable[[Tensor], Tensor], module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return edit(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return type(output)([edit(output[0]), *output[1:]])
    raise ReftuneError(
        f"{type(module).__name__} returns a {type(output).__name__}; an edit needs a tensor or a tuple of tensors."
    )


def _edit_input(edit: Callable[[Tensor], Tensor], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    if args and isinstance(args[0], Tensor):
        return (edit(args[0]), *args[1:]), kwargs
    name = (
        "hidden_states"
        if "hidden_states" in kwargs
        else next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
    )
    if name is None:
        raise ReftuneError(f"{type(module).__name__} is called without a tensor; its input cannot be edited.")
    return args, {**kwargs, name: edit(kwargs[name])}
