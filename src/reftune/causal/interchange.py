"""Interventions on a running network: swap, zero, average, add, disturb and read hidden states, all undone on exit.

    with intervene(model, swap(Location("block_output", 8, -1), source_inputs)):
        output = model(**base_inputs)        # or model.generate(...)

A source is the inputs of another run, whose states at the same (or another) location are put into this one. It may
itself be a ``Run`` with interventions (a nested interchange), or a tensor of states. Every distinct source runs once
however many locations are read from it, and only as far as the last of them. Works on transformers models and any
``nn.Module``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from reftune.causal import actions
from reftune.causal.actions import Action, Subspace
from reftune.causal.locations import Location, Sites
from reftune.causal.session import Bound, Session, Stop
from reftune.errors import ReftuneError

Inputs = Mapping[str, Any] | Tensor


@dataclass(frozen=True, eq=False)
class Run:
    """Inputs and the interventions under which a network runs on them.

    Attributes:
        inputs: keyword arguments of its forward, or the one tensor that it takes.
        interventions: what is done to it.
    """

    inputs: Inputs
    interventions: tuple[Intervention, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no network reads."""
        if not isinstance(self.inputs, Mapping | Tensor):
            raise ReftuneError(
                f"inputs={self.inputs!r}: give what the model's forward takes, such as tokenizer(text, "
                "return_tensors='pt'), or a tensor"
            )

    @staticmethod
    def of(what: Run | Inputs) -> Run:
        """A run as it is; inputs as a run without interventions."""
        return what if isinstance(what, Run) else Run(what)


@dataclass(frozen=True, eq=False)
class Source:
    """Where the states come from that an intervention puts in.

    Attributes:
        run: a run, or states (batch, n, width), or (batch, width) for one position.
        location: where they are read; None: where they are put.
        mean: average them over the source's batch, which may then be of any size.
    """

    run: Run | Tensor
    location: Location | None = None
    mean: bool = False


@dataclass(frozen=True, eq=False)
class Intervention:
    """One action at one location.

    Attributes:
        location: where.
        action: what (see ``reftune.causal.actions``); any function of the states and the sources' states.
        sources: what the action takes beside the states.
    """

    location: Location
    action: Action
    sources: tuple[Source, ...] = ()


def swap(
    location: Location,
    source: Inputs | Run,
    source_location: Location | None = None,
    subspace: Subspace | None = None,
) -> Intervention:
    """Interchange: the state that the source has there; with a subspace, only the part of it within."""
    return Intervention(location, actions.SwapIn(subspace), (Source(Run.of(source), source_location),))


def put(location: Location, states: Tensor, subspace: Subspace | None = None) -> Intervention:
    """States given as a tensor, (batch, n, width), or (batch, width) for one position."""
    return Intervention(location, actions.SwapIn(subspace), (Source(states),))


def zero(location: Location) -> Intervention:
    """Zero ablation."""
    return Intervention(location, actions.Fill())


def fill(location: Location, vector: Tensor | float) -> Intervention:
    """The same vector everywhere."""
    return Intervention(location, actions.Fill(vector))


def mean(location: Location, source: Inputs | Run, source_location: Location | None = None) -> Intervention:
    """Mean ablation: the average over the rows of a source, position by position."""
    return Intervention(location, actions.SwapIn(), (Source(Run.of(source), source_location, mean=True),))


def add(location: Location, vector: Tensor, scale: float = 1.0) -> Intervention:
    """Steering: ``scale * vector`` on top; generated tokens included where positions are ``"all"``."""
    return Intervention(location, actions.Add(vector, scale))


def noise(location: Location, std: float, seed: int = 0) -> Intervention:
    """Normal noise of standard deviation ``std`` on top."""
    return Intervention(location, actions.AddNoise(std, seed))


def collect(location: Location) -> Intervention:
    """Read the states and change nothing."""
    return Intervention(location, actions.keep)


class intervene:  # noqa: N801 - a context manager, named as a verb
    """Run a model under interventions, for the length of a ``with`` block; **hooks the model** until its end.

    Sources run when the block is entered, on the model as it then is. ``collected(i)`` gives the states before the i-th
    intervention in the latest forward, (batch, n, width), with gradient if gradients are on.

    It acts in its own thread alone: forwards of other threads run as if it were not there, and so does a ``generate``
    that is started in a helper thread to stream its text; open the ``with`` block in the thread that calls the model.
    A second thread that enters one on the same model waits until the first has left.

    Args:
        model: any ``nn.Module``; in evaluation mode, as dropout would make each run differ.
        *interventions: applied in this order where locations meet.

    Raises:
        ReftuneError: on entering, a place that the model does not have; in the forward, a position past the end, a
            source of another batch size or with other positions.
    """

    def __init__(self, model: nn.Module, *interventions: Intervention) -> None:
        self.model = model
        self.interventions = interventions
        self._session: Session | None = None

    def __enter__(self) -> intervene:
        states = source_states(self.model, self.interventions)
        sites = Sites(self.model)
        bound = [
            Bound(i.location, sites(i.location), i.action, found)
            for i, found in zip(self.interventions, states, strict=True)
        ]
        self._session = Session(self.model, bound)
        self._session.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._session.__exit__()

    def collected(self, index: int = 0) -> Tensor:
        """States that the i-th intervention saw in the latest forward, (batch, n, width); before its own change."""
        if self._session is None:
            raise ReftuneError("nothing was collected: run the model inside the `with` block first")
        return self._session.bound[index].states()


def run(model: nn.Module, what: Run | Inputs) -> Any:
    """One forward under interventions.

    Returns:
        What the model returns.
    """
    what = Run.of(what)
    with intervene(model, *what.interventions):
        return call(model, what.inputs)


def read(model: nn.Module, what: Run | Inputs, *locations: Location) -> list[Tensor]:
    """The states at some locations, (batch, n, width) each, from one run that ends at the last of them."""
    what = Run.of(what)
    first = len(what.interventions)
    with intervene(model, *what.interventions, *map(collect, locations)) as found:
        assert found._session is not None
        found._session.stop_after = set(range(first, first + len(locations)))
        try:
            call(model, what.inputs)
        except Stop:
            pass
        return [found.collected(first + index) for index in range(len(locations))]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model on its keyword arguments, or on the one tensor that it takes."""
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def source_states(model: nn.Module, interventions: Sequence[Intervention]) -> list[list[Tensor]]:
    """The states of every source of every intervention; each distinct run is made once."""
    wanted: dict[int, tuple[Run, list[Location]]] = {}
    for intervention in interventions:
        for source in intervention.sources:
            if isinstance(source.run, Run):
                wanted.setdefault(_key(source.run), (source.run, []))[1].append(_source_location(intervention, source))
    found = {key: iter(read(model, what, *locations)) for key, (what, locations) in wanted.items()}

    def states(source: Source) -> Tensor:
        if isinstance(source.run, Run):
            state = next(found[_key(source.run)])
        else:
            state = source.run if source.run.ndim == 3 else source.run[:, None]
        return state.mean(0, keepdim=True) if source.mean else state

    return [[states(source) for source in intervention.sources] for intervention in interventions]


def _key(what: Run) -> int:
    """The same for runs that need be made only once."""
    return id(what) if what.interventions else id(what.inputs)


def _source_location(intervention: Intervention, source: Source) -> Location:
    there = source.location or intervention.location
    return replace(there, positions="prompt") if there.positions == "all" else there
