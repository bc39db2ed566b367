"""The numbers at /metrics, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """The counters of one server; other servers in the process have their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "mlx_gpt_requests", "HTTP requests, by path and status.", ["path", "status"], registry=registry
        )
        self.queued = Gauge("mlx_gpt_queued_texts", "Texts that wait for a slot.", registry=registry)
        self.active = Gauge("mlx_gpt_active_texts", "Texts that are being generated.", registry=registry)
        self.slots = Gauge("mlx_gpt_slots", "Texts that can be generated at a time.", registry=registry)
        self.prompts = Counter("mlx_gpt_prompt_tokens", "Tokens in prompts.", registry=registry)
        self.generated = Counter("mlx_gpt_generated_tokens", "Tokens generated.", registry=registry)
        self.first_token = Histogram(
            "mlx_gpt_time_to_first_token_seconds", "From a request to its first token.", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.latency = Histogram(
            "mlx_gpt_request_seconds", "From a request to the end of its texts.", buckets=SECONDS, registry=registry
        )
        self.speed = Histogram(
            "mlx_gpt_tokens_per_second", "Tokens per second of a request, after its first.", buckets=SPEEDS,
            registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
