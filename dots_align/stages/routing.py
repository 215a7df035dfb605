"""What stages do to the router and report about it."""

from __future__ import annotations

from typing import Any

from dots_align.config import RouterSection
from dots_align.model.balance import BalanceLoss, BiasPolicy
from dots_align.model.router import LoadMonitor, load_metrics
from dots_align.runtime import MetricsLog, sum_over_processes


def watch_router(model: Any, router: RouterSection) -> tuple[LoadMonitor, BalanceLoss | None, BiasPolicy]:
    """Counts the experts' load, adds the balance loss if the recipe has one, and keeps the bias policy."""
    monitor = LoadMonitor(model, sum_over_processes)
    balance = BalanceLoss(model, router.balance_loss_coef, sum_over_processes) if router.balance_loss_coef else None
    return monitor, balance, BiasPolicy(monitor, router.bias_policy, router.bias_update_rate)


def router_metrics(
    log: MetricsLog, step: int, monitor: LoadMonitor, balance: BalanceLoss | None, bias: BiasPolicy
) -> dict[str, float]:
    """Writes the load since the last call to `router.jsonl` and returns what belongs in `metrics.jsonl`. Collective."""
    metrics = bias.take()
    if balance is not None and (value := balance.take()) is not None:
        metrics["balance_loss"] = value
    load = monitor.take()
    if load is not None:
        log.log_router(step, monitor.layers, load)
        metrics |= load_metrics(load) | {"score_entropy": monitor.score_entropy}
    return metrics
