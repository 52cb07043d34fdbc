"""Edits by name: the library's own and a user's."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from reftune.edits.flat import FlatEdit
from reftune.errors import ReftuneError

_EDITS: dict[str, type[nn.Module]] = {}
_Class = TypeVar("_Class", bound=type[nn.Module])

# An option at its default asks for nothing, so a class that does not take it can still be built.
_DEFAULTS: dict[str, Any] = {
    "dropout": 0.0,
    "act_fn": None,
    "init": "identity",
    "parametrization": "cholesky",
    "add_bias": False,
}


def register_edit(*names: str) -> Callable[[_Class], _Class]:
    """A class decorator that makes an `nn.Module` available as `method=name`.

    The class is built as `Class(width, r)`, with whichever of `dropout`, `act_fn`, `init` and `parametrization` its
    constructor names, and its `forward` takes hidden states `(..., width)`, in the dtype of the base model unless it
    derives from `Edit`, and returns them edited. Registering a class
    of the same module and name again (a notebook cell run twice) replaces it.

    Raises:
        ReftuneError: the name belongs to another class, or the class is not an `nn.Module`.
    """

    def register(cls: _Class) -> _Class:
        _require_module_class(cls)
        for name in names:
            known = _EDITS.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ReftuneError(f"method {name!r} is {known.__module__}.{known.__qualname__}; pick another name")
            _EDITS[name] = cls
        return cls

    return register


def available_edits() -> list[str]:
    """The names that `method` may have, sorted."""
    return sorted(_EDITS)


def edit_class(method: str | type[nn.Module]) -> type[nn.Module]:
    """The class behind a name; a class is returned as it is.

    Raises:
        ReftuneError: an unknown name (the known ones are listed), or a class that is not an `nn.Module`.
    """
    if not isinstance(method, str):
        return _require_module_class(method)
    if method not in _EDITS:
        raise ReftuneError(
            f"method={method!r}: unknown; known are {', '.join(available_edits())}. "
            "A class of your own becomes a method with @reftune.register_edit(name)"
        )
    return _EDITS[method]


def method_name(cls: type[nn.Module]) -> str:
    """The name under which a class is registered; an unknown class is registered under its own name first."""
    for name, known in _EDITS.items():
        if known is cls:
            return name
    register_edit(cls.__name__)(cls)
    return cls.__name__


def make_edit(method: str | type[nn.Module], width: int, r: int, **options: Any) -> nn.Module:
    """Build an edit.

    Args:
        method: a registered name or a class.
        width: size of the hidden state's last dimension.
        r: rank.
        **options: `dropout`, `act_fn`, `init`, `parametrization`, or anything else the class takes by name.

    Returns:
        The class's instance, or a `FlatEdit` around it if it has nested modules.

    Raises:
        ReftuneError: an unknown name, an option out of range, or one that differs from its default and that the class
            does not take.
    """
    cls = edit_class(method)
    named = inspect.signature(cls).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values())
    accepted = {name: value for name, value in options.items() if takes_any or name in named}
    for name, value in options.items():
        if name not in accepted and (name not in _DEFAULTS or value != _DEFAULTS[name]):
            raise ReftuneError(f"{name}={value!r}: {cls.__name__} takes no {name}; leave it out")
    edit = cls(width, r, **accepted)
    return FlatEdit(edit) if any(True for _ in edit.children()) else edit


def _require_module_class(cls: Any) -> type[nn.Module]:
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ReftuneError(f"method={cls!r}: an edit is a name or a class derived from torch.nn.Module")
    return cls
