"""A user's nested edit, seen from outside as one flat module."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.edits.base import compute_dtype, without_autocast


class FlatEdit(nn.Module):
    """h -> inner(h), with every tensor of `inner` registered here under its path with "__" for ".".

    PEFT tells an adapter's tensors by the last part of their keys, so an edit's tensors must sit directly on it. The
    inner module is kept as a skeleton on the meta device and run on these tensors by `torch.func.functional_call`.
    As the library's own edits do, it computes in float32 (float64 for a float64 `h`) and returns the dtype of `h`.

    **Takes `inner` over**: its tensors move here, and it is empty afterwards.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._paths: dict[str, str] = {}
        # Duplicates included, so that tied parameters stay one object under both names.
        for path, parameter in inner.named_parameters(remove_duplicate=False):
            self.register_parameter(self._flat_name(path), parameter)
        for path, buffer in inner.named_buffers(remove_duplicate=False):
            owner, _, name = path.rpartition(".")
            persistent = name not in inner.get_submodule(owner)._non_persistent_buffers_set
            self.register_buffer(self._flat_name(path), buffer, persistent=persistent)
        # Straight into __dict__: a registered child would bring its nested keys back.
        self.__dict__["inner"] = inner.to("meta")

    def forward(self, h: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """The edited hidden state in the dtype of `h`."""
        x = h.to(compute_dtype(h))
        tensors = {path: getattr(self, name) for name, path in self._paths.items()}
        tensors = {path: t.to(x.dtype) if t.is_floating_point() else t for path, t in tensors.items()}
        with without_autocast(h.device.type):
            # Every name of a tied tensor is in the dictionary, so there is nothing to tie.
            edited = torch.func.functional_call(self.__dict__["inner"], tensors, (x,), tie_weights=False)
        return edited.to(h.dtype)

    def train(self, mode: bool = True) -> "FlatEdit":
        """As `nn.Module.train`, for the inner module too."""
        self.__dict__["inner"].train(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """The inner module's class."""
        return type(self.__dict__["inner"]).__name__

    def _flat_name(self, path: str) -> str:
        name = path.replace(".", "__")
        self._paths[name] = path
        return name
