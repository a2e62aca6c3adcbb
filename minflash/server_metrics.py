"""Counters in Prometheus's text format (version 0.0.4 of its exposition formats)."""

from __future__ import annotations

from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# name: type, meaning. A summary without quantiles is a sum and a count.
FAMILIES = {
    "minflash_requests_total": ("counter", "HTTP requests, by path and status."),
    "minflash_prompt_tokens_total": ("counter", "Tokens of prompts that were started."),
    "minflash_generation_tokens_total": ("counter", "Tokens made."),
    "minflash_generations_cancelled_total": ("counter", "Generations that the client left."),
    "minflash_queue_length": ("gauge", "Requests that wait for the model."),
    "minflash_running": ("gauge", "Requests that the model works on: 0 or 1."),
    "minflash_queue_seconds": ("summary", "Time from the request to its turn."),
    "minflash_first_token_seconds": ("summary", "Time from the turn to the first token."),
    "minflash_generation_seconds": ("summary", "Time from the turn to the last token."),
}


class Metrics:
    """Numbers by family and labels. Belongs to one thread."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, float]] = {name: {} for name in FAMILIES}
        for name, (kind, _) in FAMILIES.items():
            if kind == "summary":
                self._values[name] = {"_sum": 0.0, "_count": 0.0}
            elif name != "minflash_requests_total":
                self._values[name] = {"": 0.0}

    def add(self, name: str, amount: float = 1, labels: Mapping[str, str] | None = None) -> None:
        """Raises a counter."""
        values, key = self._values[name], _labels(labels or {})
        values[key] = values.get(key, 0) + amount

    def set(self, name: str, value: float) -> None:
        """Sets a gauge."""
        self._values[name][""] = value

    def observe(self, name: str, seconds: float) -> None:
        """Adds one observation to a summary."""
        self._values[name]["_sum"] += seconds
        self._values[name]["_count"] += 1

    def render(self) -> str:
        lines = []
        for name, (kind, meaning) in FAMILIES.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{key} {value:.15g}" for key, value in self._values[name].items()]
        return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    """``labels`` hold paths of our own and numbers: nothing that needs escapes."""
    inside = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""
