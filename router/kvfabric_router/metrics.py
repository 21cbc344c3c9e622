"""Every metric of the router: name, unit, labels. Labels are of {tenant, template, tier, reason, result}."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvfabric.types import MissReason
from kvfabric_router.diagnosis import Totals

_TIERS = ("hbm", "host", "ssd", "peer")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_MILLI = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class TenantMetrics:
    """The children of one tenant that every request touches: looking one up costs more than counting."""

    def __init__(self, metrics: RouterMetrics, tenant: str) -> None:
        self.prompt_tokens = metrics.prompt_tokens.labels(tenant)
        self.predicted = {t: metrics.predicted_tokens.labels(tenant, t) for t in _TIERS}
        self.reused = {t: metrics.reused_tokens.labels(tenant, t) for t in (*_TIERS, "any")}
        self.reachable_tokens = metrics.reachable_tokens.labels(tenant)
        self.regret_tokens = metrics.regret_tokens.labels(tenant)
        self.regret_s = metrics.regret_s.labels(tenant)
        self.first_byte = metrics.first_byte.labels(tenant)


class RouterMetrics:
    """One router's metrics, in a collector registry of their own."""

    def __init__(self) -> None:
        self.collectors = CollectorRegistry()
        self._tenants: dict[str, TenantMetrics] = {}
        self.requests = self._counter(
            "requests",
            "Requests by outcome: HTTP status, disconnected or broken_off.",
            "tenant",
            "result",
        )
        self.retries = self._counter("retries", "Requests sent to another engine.", "reason")
        self.one_time_salts = self._counter(
            "one_time_salts", "Requests that could reuse nothing, by why.", "reason"
        )
        self.journal_dropped = self._counter(
            "journal_dropped_lines", "Lines of the journal that did not reach the disk."
        )
        self.misses = self._counter(
            "misses",
            "Requests that reused less than they may, by why the first block missed.",
            "reason",
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens, as engines count.", "tenant"
        )
        self.predicted_tokens = self._counter(
            "predicted_reuse_tokens",
            "Tokens that the index promised of the chosen engine.",
            "tenant",
            "tier",
        )
        self.reused_tokens = self._counter(
            "reused_tokens",
            "Tokens that engines report as reused; tier `any` where they do not tell.",
            "tenant",
            "tier",
        )
        self.reachable_tokens = self._counter(
            "reachable_reuse_tokens", "Reuse at the engine that had most of each prompt.", "tenant"
        )
        self.regret_tokens = self._counter(
            "regret_tokens", "Reuse given up for a shorter wait, own or others'.", "tenant"
        )
        self.regret_s = self._counter(
            "regret_seconds", "Expected time to first token given up for others.", "tenant"
        )
        self.approximate = self._counter(
            "approximate_requests",
            "Requests at engines that no node speaks for: their reuse is guessed.",
            "tenant",
        )
        self.templates = self._counter(
            "template_requests", "Requests that use a registered template.", "template", "result"
        )
        self.index_gaps = self._counter("index_snapshots", "Snapshots of nodes.", "result")
        self.handoffs = self._counter(
            "handoffs",
            "Prompts sent to one engine for another to answer: computed, failed, or stopped before that.",
            "result",
        )
        self.hints = self._counter(
            "prefetch_hints", "Hints to nodes: begun, refused, dropped or failed.", "result"
        )
        self.first_byte = Histogram(
            "kvfabric_router_first_byte_seconds",
            "From the request's arrival to the first byte of the answer.",
            ["tenant"],
            buckets=_SECONDS,
            registry=self.collectors,
        )
        self.decision = Histogram(
            "kvfabric_router_decision_seconds",
            "Tokens, identity, index and ranking of one request.",
            buckets=_MILLI,
            registry=self.collectors,
        )
        self.engines = self._gauge(
            "engines", "Known engines: taking requests or excluded.", "result"
        )
        self.in_flight = self._gauge("in_flight_requests", "Requests at engines now.")
        self.held = self._gauge("held_requests", "Requests that wait at the router for an engine.")
        self.refused = self._counter(
            "refused", "Requests refused: queue full, or their objective out of reach.", "reason"
        )
        self.lease = self._gauge("epoch_lease_valid", "1 while the router may act on its epochs.")
        self.index_blocks = self._gauge("index_blocks", "Blocks that the index knows a holder of.")
        self.index_bytes = self._gauge("index_bytes", "Memory of the index.")

    def of(self, tenant: str) -> TenantMetrics:
        """What is counted of this tenant's requests."""
        found = self._tenants.get(tenant)
        if found is None:
            found = self._tenants[tenant] = TenantMetrics(self, tenant)
        return found

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"kvfabric_router_{name}", what, labels, registry=self.collectors)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(f"kvfabric_router_{name}", what, labels, registry=self.collectors)

    def totals(self, index_blocks: int) -> Totals:
        """What a diagnosis looks at."""
        return Totals(
            prompt_tokens=_sum(self.prompt_tokens),
            promised_tokens=_sum(self.predicted_tokens),
            reused_tokens=_sum(self.reused_tokens),
            no_handle=_sum(self.misses, reason=MissReason.NO_HANDLE.value),
            index_blocks=index_blocks,
        )

    def text(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.collectors)


def _sum(counter: Counter, **labels: str) -> int:
    """Of all children with these labels."""
    return int(
        sum(
            sample.value
            for metric in counter.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and labels.items() <= sample.labels.items()
        )
    )
