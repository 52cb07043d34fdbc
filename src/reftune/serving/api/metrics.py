"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MOST_ADAPTERS = 100
"""Adapters that have a label of their own; the rest are counted together as ``other``."""

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counts of one server.

    Args:
        gauges: numbers that are read when Prometheus asks: name -> (what it is, how to read it).
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "reftune_requests", "Requests by model and status.", ["model", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("reftune_prompt_tokens", "Tokens of prompts.", ["model"], registry=self.registry)
        self.completion_tokens = Counter(
            "reftune_completion_tokens", "Tokens of answers.", ["model"], registry=self.registry
        )
        self.first_token = Histogram(
            "reftune_time_to_first_token_seconds",
            "Seconds to the first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "reftune_request_seconds", "Seconds to the last token.", buckets=_SECONDS, registry=self.registry
        )
        for name, (text, read) in gauges.items():
            Gauge(f"reftune_{name}", text, registry=self.registry).set_function(read)
        self._labels: set[str] = set()

    def label(self, model: str) -> str:
        """The label that a model is counted under: its name while there are few, then ``other``."""
        if model in self._labels or len(self._labels) < MOST_ADAPTERS:
            self._labels.add(model)
            return model
        return "other"

    def text(self) -> bytes:
        """The counts in Prometheus' text format."""
        return generate_latest(self.registry)
