"""The edits that own a rotation R: when it is retracted, how it is saved, and how it is loaded."""

import threading
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.edits.base import Edit, Init
from reftune.edits.rotation import complete_basis, householder, identity_reflectors, orthonormal, retract_
from reftune.errors import ReftuneError

Parametrization = Literal["cholesky", "householder"]
_IN_SYNC = "in sync"
_WRITING = threading.RLock()  # one thread retracts or folds at a time; the others then find it done


class RotatedEdit(Edit):
    """An edit with R, r orthonormal rows: the base class of LoReFT and its kin.

    - `parametrization="cholesky"`: `rotation` is the trained parameter. It is retracted lazily, at the start of a
      forward and before it is saved, so that any optimiser in any trainer can step it. In training every forward looks,
      as some optimisers (bitsandbytes, anything through `.data`) leave no trace in the version counter; in evaluation
      only a rotation that has changed since is looked at: by its content, on a GPU (where looking would wait for the
      device) by its version counter alone, so that after a write through `.data` there `eval()` must be called.
    - `parametrization="householder"`: what pyreft trains, for its training curve. `reflectors` is trained around a
      frozen `basis`; `rotation` is a buffer that holds the result when saved. A reload gives the same edit, with new
      reflectors around it.

    Either way equal parameters are the same function, whoever copied them and however, and a checkpoint holds
    `rotation`, `r x width`, and nothing else about it.

    A subclass either names its further parameters in `tensors`, which the constructor makes and then fills by
    `reset_parameters`, or has a constructor of its own that does so.
    """

    tensors: ClassVar[tuple[Literal["weight", "bias"], ...]] = ()
    default_init: ClassVar[Init] = "identity"
    rotation: Tensor
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        width: int,
        r: int,
        *,
        dropout: float = 0.0,
        act_fn: str | None = None,
        init: Init | None = None,
        parametrization: Parametrization = "cholesky",
    ) -> None:
        super().__init__(width, r, dropout=dropout, act_fn=act_fn, init=init or self.default_init)
        if parametrization not in get_args(Parametrization):
            raise ReftuneError(
                f"parametrization={parametrization!r}: must be one of {', '.join(get_args(Parametrization))}"
            )
        self.parametrization = parametrization
        self._seen: object = None  # the stored rotation that the trained parameters are known to stand for
        self._around: object = None  # the reflectors that were there then
        self._looked: Tensor | None = None  # a copy of what the rotation was last computed from
        if parametrization == "householder":
            self.register_buffer("rotation", torch.empty(r, width))
            self.basis = nn.Parameter(torch.empty(width, width), requires_grad=False)
            self.reflectors = nn.Parameter(torch.empty(width, r))
        else:
            self.rotation = nn.Parameter(torch.empty(r, width))
        self.check_options()
        self.make_tensors()
        if self.tensors:
            self.reset_parameters()

    def check_options(self) -> None:
        """Refuse what this method cannot do."""

    def make_tensors(self) -> None:
        """Register what the edit has beside the rotation; a subclass may add buffers."""
        for name in self.tensors:
            setattr(self, name, nn.Parameter(torch.empty((self.r, self.width) if name == "weight" else self.r)))

    @torch.no_grad()
    def reset_rotation(self) -> None:
        """**Draws a new rotation**, uniform over all: Gram-Schmidt of normal rows."""
        self.rotation.normal_()
        retract_(self._each(self.rotation))
        self._seen = None
        self.retract_()

    @torch.no_grad()
    def point_to(self, vector: Float[Tensor, " width"]) -> None:
        """**Turns the rotation** so that its first row is along the vector; the others are drawn anew."""
        self.rotation.normal_()
        self.rotation[0] = vector
        retract_(self.rotation)
        self._seen = None
        self.retract_()

    def current_rotation(self, dtype: torch.dtype) -> Float[Tensor, "r width"]:
        """R in `dtype`, orthonormal now, and differentiable with respect to what is trained."""
        if self.parametrization == "householder":
            self._follow_loaded_rotation()
            if self._may_fold(dtype):
                if not self._is_as_looked():
                    self.retract_()
                return self.rotation.to(dtype)
            return householder(self.reflectors.to(dtype), self.basis.detach().to(dtype))
        self._retract_if_moved()
        return orthonormal(self._each(self.rotation)).flatten(0, -2).to(dtype)

    def _each(self, rotation: Tensor) -> Tensor:
        """The rotations of a stacked edit, each to be orthonormal by itself: (copies, r, width)."""
        return rotation.unflatten(0, (self.copies, -1)) if self.copies > 1 else rotation

    def _stored(self) -> Tensor:
        """What the rotation is computed from; a basis is known by its first r columns (``complete_basis``)."""
        if self.parametrization == "householder":
            return torch.cat([self.reflectors.detach(), self.basis.detach()[:, : self.r]], dim=1)
        return self.rotation.detach()

    def _is_as_looked(self) -> bool:
        looked = self._looked
        return looked is not None and looked.dtype == (now := self._stored()).dtype and torch.equal(looked, now)

    def _may_fold(self, dtype: torch.dtype) -> bool:
        """Whether a Householder rotation may be computed once for many forwards: inference, on tensors of our own."""
        as_saved = dtype == self.rotation.dtype or self.rotation.element_size() < 4
        ours = isinstance(self.reflectors, nn.Parameter) and as_saved
        return ours and not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())

    def retract_(self) -> None:
        """**Makes `rotation` orthonormal now**, or what the reflectors stand for; idempotent."""
        if self.parametrization == "householder":
            self._follow_loaded_rotation()
            if not self.rotation.is_meta and not self.basis.is_meta:
                dtype = torch.promote_types(self.reflectors.dtype, torch.float32)
                with torch.no_grad(), _WRITING:
                    stored, self._around = self._stored(), self._identify(self.reflectors)
                    rotation = householder(self.reflectors.to(dtype), self.basis.to(dtype))
                    self.rotation.data.copy_(rotation)
                    self._looked = stored
            return
        retract_(self._each(self.rotation))
        self.trust_rotation()

    def trust_rotation(self) -> None:
        """Take `rotation`, just loaded, as orthonormal: it is used to the bit until it changes."""
        self._seen = self._identify()
        plain = self.rotation.device.type == "cpu" and type(self.rotation.detach()) is Tensor
        self._looked = self._stored().clone() if plain else None

    def _retract_if_moved(self) -> None:
        if torch.compiler.is_compiling():
            if self.training:  # the graph then holds the retraction; Python state such as _seen is not for graphs
                retract_(self._each(self.rotation))
            return
        if not isinstance(self.rotation, nn.Parameter):  # a stand-in of torch.func: not ours to write to
            return
        moved = self._seen != self._identify() or (self.training and self.rotation.requires_grad)
        if moved or (self._looked is not None and not self._is_as_looked()):
            with _WRITING:
                self.retract_()

    def _follow_loaded_rotation(self) -> None:
        """Whoever wrote `rotation` (load_state_dict, assign=True, any loader) meant it: start there."""
        if torch.compiler.is_compiling() or self.rotation.is_meta or self._seen == self._identify():
            return
        with _WRITING:
            if self._seen == self._identify():
                return
            in_place = isinstance(self._seen, tuple) and self._seen[0] == id(self.rotation)
            if in_place and self._around != self._identify(self.reflectors):
                with torch.no_grad():
                    meant = householder(self.reflectors.float(), self.basis.float())
                if not torch.allclose(meant, self.rotation.float(), atol=1e-2):
                    raise ReftuneError(
                        "A Householder edit's reflectors and its buffer rotation were both written and stand for two "
                        "rotations: whatever copies buffers beside parameters (averaging with AveragedModel, "
                        "DistributedDataParallel's broadcast_buffers) copies one that is only kept for saving. Use "
                        "parametrization='cholesky', leave buffers out, or load with load_state_dict."
                    )
                self._seen = self._identify()
                return
            self._start_at_rotation()

    def _start_at_rotation(self) -> None:
        starts = {"basis": complete_basis(self.rotation), "reflectors": identity_reflectors(self.rotation)}
        for name, start in starts.items():
            before = self.get_parameter(name)
            if before.is_meta or before.device != start.device:
                setattr(self, name, nn.Parameter(start, requires_grad=before.requires_grad))
            else:
                before.data.copy_(start)
        self._seen, self._around, self._looked = self._identify(), self._identify(self.reflectors), None

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those that are trained; a Householder edit's frozen basis is among `named_parameters` alone."""
        return (p for name, p in self.named_parameters(recurse=recurse) if name != "basis")

    def _identify(self, tensor: Tensor | None = None) -> tuple[int, int]:
        tensor = self.rotation if tensor is None else tensor
        return id(tensor), -1 if tensor.is_inference() else tensor._version

    def train(self, mode: bool = True) -> "RotatedEdit":
        """As `nn.Module.train`; evaluation begins by retracting, which a compiled forward does not do."""
        self._looked = None
        if self.parametrization == "cholesky":
            self._seen = None
            if not mode and type(self.rotation) is nn.Parameter:
                self._retract_if_moved()
        return super().train(mode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.retract_()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("reflectors", "basis"):
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "rotation" in state_dict:
            self._seen = None
            for name in (prefix + "reflectors", prefix + "basis"):
                if name in missing_keys:
                    missing_keys.remove(name)
            if self.parametrization == "householder":
                self._follow_loaded_rotation()

    # `_seen` names one tensor object. Where a copy or a move makes new objects of the same values, it is renewed.

    def _apply(self, *args: Any, **kwargs: Any) -> "RotatedEdit":
        in_sync = self.parametrization == "householder" and self._seen == self._identify()
        unmoved = self._is_unmoved()
        super()._apply(*args, **kwargs)
        self._seen = self._identify() if in_sync else None
        self._around = self._identify(self.reflectors) if unmoved else None
        self._looked = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        in_sync = self.parametrization == "householder" and self._seen == self._identify()
        around = _IN_SYNC if self._is_unmoved() else None
        return {**self.__dict__, "_seen": _IN_SYNC if in_sync else None, "_around": around, "_looked": None}

    def _is_unmoved(self) -> bool:
        return self.parametrization == "householder" and self._around == self._identify(self.reflectors)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._seen == _IN_SYNC:
            self._seen = self._identify()
        if self._around == _IN_SYNC:
            self._around = self._identify(self.reflectors)
