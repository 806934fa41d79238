"""What there is to count: Prometheus' figures of the server, and a line of log a request."""

import json
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from fusionkit.serving.gate import STATES, Record

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TASKS = 1000
"""Tasks that have figures of their own; those served after so many have one together."""
_QUIET = (*STATES, "/metrics")
"""What machines ask all the time: it has figures, and lines of log when it fails."""


class Figures:
    """Counts requests, and writes a line of log for each.

    Args:
        logged: whether to write lines.
    """

    def __init__(self, logged: bool = True) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._logged = logged
        self._known: set[str] = set()
        labels = ("endpoint", "task", "status")
        self._requests = Counter(
            "fusionkit_requests", "Requests that have ended.", labels, registry=self.registry
        )
        self._seconds = Histogram(
            "fusionkit_request_seconds",
            "How long requests took, whole.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "fusionkit_tokens",
            "Tokens that were read, and generated.",
            ("task", "kind"),
            registry=self.registry,
        )
        self.running = Gauge(
            "fusionkit_rows_waiting", "Rows that are not answered.", registry=self.registry
        )
        self._engine = _Engine()
        self.registry.register(self._engine)

    def ended(self, record: Record) -> None:
        """Count a request that has ended, and write its line."""
        task = self._label(record.task)
        self._requests.labels(record.endpoint, task, str(record.status)).inc()
        self._seconds.labels(record.endpoint).observe(record.seconds)
        if record.prompt_tokens:
            self._tokens.labels(task, "prompt").inc(record.prompt_tokens)
        if record.completion_tokens:
            self._tokens.labels(task, "completion").inc(record.completion_tokens)
        if self._logged and (record.status >= 400 or record.endpoint not in _QUIET):
            log(
                "request",
                request=record.number,
                endpoint=record.endpoint,
                task=record.task,
                status=record.status,
                ms=round(1000 * record.seconds, 1),
                prompt_tokens=record.prompt_tokens,
                completion_tokens=record.completion_tokens,
            )

    def text(self, engine: Mapping[str, Any]) -> bytes:
        """All figures, as Prometheus reads them.

        Args:
            engine: the engine's own.
        """
        self._engine.figures = engine
        return generate_latest(self.registry)

    def _label(self, task: str | None) -> str:
        if task is None:
            return ""
        if task not in self._known and len(self._known) >= _TASKS:
            return "others"
        self._known.add(task)
        return task.encode(errors="replace").decode()


class _Engine:
    """The engine's own figures: a number each."""

    def __init__(self) -> None:
        self.figures: Mapping[str, Any] = {}

    def collect(self) -> Iterable[Metric]:
        for name, value in self.figures.items():
            what = name.replace("_", " ")
            if isinstance(value, Mapping):
                yield _histogram(f"fusionkit_{name}", f"Engine: {what}.", value)
            elif name.endswith("_total"):
                yield CounterMetricFamily(f"fusionkit_{name}", f"Engine: {what}.", value=value)
            else:
                yield GaugeMetricFamily(f"fusionkit_{name}", f"Engine: {what}.", value=value)


def _histogram(name: str, meaning: str, counts: Mapping[int, int]) -> Metric:
    """Of a value → how often it was: the same by powers of two."""
    bounds = [2**power for power in range(max(counts, default=1).bit_length() + 1)]
    buckets = [
        (f"{bound}.0", float(sum(n for value, n in counts.items() if value <= bound)))
        for bound in bounds
    ]
    every = float(sum(counts.values()))
    total = float(sum(value * n for value, n in counts.items()))
    return HistogramMetricFamily(
        name, meaning, buckets=[*buckets, ("+Inf", every)], sum_value=total
    )


def log(event: str, **facts: Any) -> None:
    """Write a line of JSON on standard output."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03}Z"
    try:
        sys.stdout.write(json.dumps({"time": stamp, "event": event, **facts}) + "\n")
        sys.stdout.flush()
    except OSError:  # nobody reads it any more
        pass
