"""What a pipeline would cost in the cloud, before anything is spent.

Two figures: what is expected, from how long the steps took when they were measured, and the most it can be, from the time
limits that the service enforces. Machines that start and stop, storage and traffic come on top.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slmops_course.cloud.checks import machine_type
from slmops_course.cloud.definition import CloudError, Pipeline, Step

START_MINUTES = 5.0  # for which a machine is paid before and after its step: it starts, fetches its image, and waits for more


@dataclass(frozen=True)
class Prices:
    """What machines cost by the hour."""

    per_hour: Mapping[str, float]
    as_of: str  # the day they were looked up: they change
    region: str
    currency: str
    source: str

    def of(self, size: str) -> float:
        """Raises CloudError for a machine that the table does not have."""
        if size not in self.per_hour:
            raise CloudError(
                f"There is no price for {size}: expected one of {', '.join(self.per_hour)}; look it up and add it to the table."
            )
        return self.per_hour[size]


@dataclass(frozen=True)
class Estimate:
    """One step's share of the bill."""

    step: str
    machine: str
    machines: int  # side by side
    expected_minutes: float  # of one machine
    most_minutes: float
    expected_cost: float
    most_cost: float


def read_prices(path: Path) -> Prices:
    """A price table. Raises CloudError for one without its day, or with a price that is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
        prices = Prices({str(k): float(v) for k, v in found["per_hour"].items()}, *(
            str(found[name]) for name in ("as_of", "region", "currency", "source")))  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CloudError(
            f"{path} is no price table ({type(error).__name__} {error}): expected per_hour, as_of, region, currency and "
            "source; see deploy/azure/prices.json."
        ) from None
    if not prices.per_hour or not all(0 < price < 1000 for price in prices.per_hour.values()):
        raise CloudError(f"{path} holds a price that is none: expected more than 0 an hour; look it up again.")
    return prices


def estimate(pipeline: Pipeline, prices: Prices) -> list[Estimate]:
    """One line a step, in the order in which they run.

    Example: a step of 6 minutes on a machine of 0.60 an hour, with a limit of an hour -> 0.11 expected (5 minutes to start
    and stop are paid too), at most 0.65.
    Raises CloudError for a step without an expected time, a limit or a price.
    """
    return [_estimate(pipeline, pipeline.steps[name], prices) for name in pipeline.order()]


def _estimate(pipeline: Pipeline, step: Step, prices: Prices) -> Estimate:
    expected = step.component.expected_minutes
    size = machine_type(pipeline, step)
    machines, runs, limit_s = _scale(pipeline, step)
    if expected is None or not limit_s:
        missing = "expected_minutes under its component's tags" if expected is None else "a timeout under limits"
        raise CloudError(f"{step.name}: its cost cannot be estimated: expected {missing}; write it.")
    hourly = prices.of(size)
    # Trials are whole runs; a parallel step's machines share one run's work.
    paid = expected * runs + START_MINUTES * machines
    most = limit_s / 60 * runs + START_MINUTES * machines
    return Estimate(step.name, size, machines, paid / machines, most / machines, paid / 60 * hourly, most / 60 * hourly)


def _scale(pipeline: Pipeline, step: Step) -> tuple[int, int, float]:
    """How many machines work side by side, how many runs there are, and the seconds that one run may take."""
    if step.kind == "sweep":
        limits = step.raw.get("limits") or {}
        trials = int(limits.get("max_total_trials", 0))
        most = min(float(limits.get("trial_timeout", 0)) * trials, float(limits.get("timeout", 0)) * _side_by_side(limits))
        return _side_by_side(limits), trials, most / max(1, trials)
    if step.kind == "parallel":
        raw = step.component.raw
        machines = int((raw.get("resources") or {}).get("instance_count", 1))
        retry = raw.get("retry_settings") or {}
        shards = next((int(value) for name, value in pipeline.inputs.items() if name == "shards"), machines)
        return machines, 1, float(retry.get("timeout", 0)) * (int(retry.get("max_retries", 0)) + 1) * shards
    return 1, 1, float((step.raw.get("limits") or {}).get("timeout", 0))


def _side_by_side(limits: Mapping) -> int:
    return max(1, min(int(limits.get("max_concurrent_trials", 1)), int(limits.get("max_total_trials", 1))))


def format_plan(pipeline: Pipeline, estimates: list[Estimate], prices: Prices) -> str:
    """The plan for a person: a line a step, the sum, and where the prices are from."""
    head = f"{'step':10} {'machines':22} {'minutes':>8} {'at most':>8} {'cost':>8} {'at most':>8}"
    lines = [
        f"{e.step:10} {f'{e.machines} x {e.machine}':22} {e.expected_minutes:8.0f} {e.most_minutes:8.0f} "
        f"{e.expected_cost:8.2f} {e.most_cost:8.2f}"
        for e in estimates
    ]
    expected, most = sum(e.expected_cost for e in estimates), sum(e.most_cost for e in estimates)
    return "\n".join(
        [
            f"{pipeline.raw.get('display_name', pipeline.path.name)}: {len(estimates)} steps, costs in {prices.currency}",
            head,
            *lines,
            f"{'together':50} {expected:8.2f} {most:8.2f}",
            f"Prices of {prices.as_of}, {prices.region}, pay as you go. They change: look them up before you rely on them.",
            "Expected times were measured on two cores with units for bfloat16; a machine without takes several times as long.",
            "Storage, traffic and an online endpoint come on top; an endpoint costs by the hour for as long as it is there.",
        ]
    )
