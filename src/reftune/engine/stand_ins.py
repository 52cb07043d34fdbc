"""Objects that stand in for a method of a model until they are removed, and hooks that act for one thread alone."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

from torch import nn


class OwnThread(threading.local):
    """Asked by hooks that act for one thread alone: ``here`` is true in the thread that made it, else false."""

    here = False

    def __new__(cls) -> OwnThread:
        """Made once, while ``__init__`` would run in every thread that asks."""
        made = super().__new__(cls)
        made.here = True
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (), {"here": self.here}


class StandIn:
    """Stands in for a method of a module from when it is made until ``remove``; **changes the module**.

    Args:
        module: whose method it is.
        name: the method.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self.replaced = module.__dict__.get(name)  # accelerate's forward, for one
        module.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What is called in place of the method."""
        raise NotImplementedError

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the method returns without this stand-in."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def remove(self) -> None:
        """Put back what was there, unless another has taken the place since."""
        own = self.module.__dict__
        if own.get(self.name) is not self:
            return
        if self.replaced is not None:
            own[self.name] = self.replaced
        else:
            del own[self.name]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.replaced or getattr(type(self.module), self.name).__get__(self.module))


class DirectForward(StandIn):
    """Stands in for ``model.forward``: called by itself, as sentence-transformers does, it runs the model's hooks.

    Args:
        model: the model.
        begins: whether it is now called within a call of the model, whose hooks ran.
    """

    def __init__(self, model: nn.Module, begins: Callable[[], bool]):
        self.begins = begins
        super().__init__(model, "forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What a call of the model returns."""
        return self.original(*args, **kwargs) if self.begins() else self.module(*args, **kwargs)
