"""Causal models: variables, mechanisms, and what happens to the rest when some of them are set by hand.

A causal model is an acyclic graph of variables. Inputs have no parents; every other variable is computed from its
parents by its mechanism. Three questions can be asked of it: what are all values (``run``), what would they be had some
been fixed (``run(..., interventions)``), and what would they be had some taken the values that they have on other
inputs (``interchange``). Source: Geiger et al., "Causal Abstractions of Neural Networks" (arXiv 2106.02997), section 3.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx

from reftune.errors import ReftuneError

Setting = dict[str, Any]
"""Values of variables by name."""


@dataclass(frozen=True)
class Variable:
    """One variable of a causal model.

    Attributes:
        name: its name.
        mechanism: computes its value from its parents', in the order of ``parents``; None for an input.
        parents: names of the variables that it is computed from.
        values: what it may be; None where there is no list (numbers from a range, tuples). Inputs are drawn from it.
    """

    name: str
    mechanism: Callable[..., Any] | None = None
    parents: tuple[str, ...] = ()
    values: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if (self.mechanism is None) != (not self.parents):
            raise ReftuneError(
                f"variable {self.name!r}: an input has neither mechanism nor parents, every other variable has both"
            )


class CausalModel:
    """An acyclic graph of variables.

    Args:
        variables: the variables, in any order.
        sampler: draws one setting of the inputs; by default each input uniformly from its values.

    Raises:
        ReftuneError: a name given twice, an unknown parent, a cycle (named).
    """

    def __init__(
        self, variables: Sequence[Variable], sampler: Callable[[random.Random], Mapping[str, Any]] | None = None
    ) -> None:
        self.variables = {variable.name: variable for variable in variables}
        names = [variable.name for variable in variables]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ReftuneError(f"variable {twice[0]!r} is given twice")
        self._sampler = sampler
        self.graph = nx.DiGraph()
        self.graph.add_nodes_from(names)
        for variable in variables:
            for parent in variable.parents:
                if parent not in self.variables:
                    raise ReftuneError(f"variable {variable.name!r} has the parent {parent!r}, which is not a variable")
                self.graph.add_edge(parent, variable.name)
        if not nx.is_directed_acyclic_graph(self.graph):
            cycle = [edge[0] for edge in nx.find_cycle(self.graph)]
            raise ReftuneError(f"a causal model is acyclic, but {' -> '.join([*cycle, cycle[0]])} is a cycle")

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Every variable after its parents; inputs first, otherwise in the order given."""
        position = {name: index for index, name in enumerate(self.variables)}
        key = {name: (not self.is_input(name), position[name]) for name in self.variables}
        return tuple(nx.lexicographical_topological_sort(self.graph, key=key.__getitem__))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The variables without parents."""
        return tuple(name for name in self.order if self.is_input(name))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The variables without children."""
        return tuple(name for name in self.order if not self.graph.out_degree(name))  # pyright: ignore

    def is_input(self, name: str) -> bool:
        """Whether a variable has no parents."""
        return not self.variables[name].parents

    def run(self, inputs: Mapping[str, Any], interventions: Mapping[str, Any] | None = None) -> Setting:
        """Every variable's value on these inputs, some held at given values.

        Args:
            inputs: a value for each input (those under intervention may be left out).
            interventions: values that hold whatever the parents are.

        Raises:
            ReftuneError: an unknown variable, a missing input, or a value that an input or intervened variable cannot
                have.
        """
        interventions = interventions or {}
        for name in [*inputs, *interventions]:
            self._require(name)
        values: Setting = {}
        for name in self.order:
            variable = self.variables[name]
            if name in interventions:
                values[name] = self._check(variable, interventions[name])
            elif variable.mechanism is not None:
                values[name] = variable.mechanism(*(values[parent] for parent in variable.parents))
            elif name in inputs:
                values[name] = self._check(variable, inputs[name])
            else:
                raise ReftuneError(f"input {name!r} has no value; this model's inputs are {', '.join(self.inputs)}")
        return values

    def interchange(self, base: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]) -> Setting:
        """Run the base, with each variable of ``sources`` held at the value that it has on that source's inputs.

        Args:
            base: inputs of the base run.
            sources: inputs of a source run for each interchanged variable.
        """
        for name in sources:
            self._require(name)
        return self.run(base, {name: self.run(source)[name] for name, source in sources.items()})

    def sample(self, rng: random.Random | int = 0) -> Setting:
        """One setting of the inputs, from the model's sampler.

        Args:
            rng: a generator, or a seed.
        """
        rng = random.Random(rng) if isinstance(rng, int) else rng
        if self._sampler is not None:
            return dict(self._sampler(rng))
        return {name: rng.choice(self._values_of(name)) for name in self.inputs}

    def live_edges(self, setting: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The edges along which a change would be seen: another value of the parent alone gives another child.

        Args:
            setting: a full setting, as ``run`` returns it. Parents need a list of values.
        """
        return [(parent, child) for parent, child in self.graph.edges if self._is_live(parent, child, setting)]

    def live_paths(
        self, setting: Mapping[str, Any], start: str | None = None, end: str | None = None
    ) -> list[list[str]]:
        """The paths of live edges, shortest first, between two variables or (None) any inputs and outputs."""
        live = nx.DiGraph(self.live_edges(setting))
        live.add_nodes_from(self.graph.nodes)
        paths = [
            path
            for first in ([start] if start else self.inputs)
            for last in ([end] if end else self.outputs)
            for path in nx.all_simple_paths(live, self._require(first), self._require(last))
        ]
        return sorted(paths, key=len)

    def _is_live(self, parent: str, child: str, setting: Mapping[str, Any]) -> bool:
        variable = self.variables[child]
        assert variable.mechanism is not None
        for value in self._values_of(parent):
            arguments = [value if name == parent else setting[name] for name in variable.parents]
            if value != setting[parent] and variable.mechanism(*arguments) != setting[child]:
                return True
        return False

    def _values_of(self, name: str) -> tuple[Any, ...]:
        if (values := self.variables[name].values) is None:
            raise ReftuneError(f"variable {name!r} has no list of values: give Variable(values=...), or a sampler")
        return values

    def _require(self, name: str) -> str:
        if name not in self.variables:
            raise ReftuneError(f"variable {name!r} is not in this causal model, which has {', '.join(self.order)}")
        return name

    @staticmethod
    def _check(variable: Variable, value: Any) -> Any:
        if variable.values is not None and value not in variable.values:
            shown = ", ".join(map(repr, variable.values[:8])) + (", ..." if len(variable.values) > 8 else "")
            raise ReftuneError(f"variable {variable.name!r} cannot be {value!r}: its values are {shown}")
        return value
