"""Rollouts: a version goes to one ring of devices, is watched there, and goes to the next; or it is halted and taken back.

The rules know nothing of how devices are reached or what an hour is: they are told of reports, and asked once an hour.
The registry gives out a version only with a gate report that passed, the publisher offers it to a ring, and a device's
report says whether the version that it runs had a fault since the last one. The simulated fleet uses these rules, and a
real one could.

Not covered: rings are drawn by a hash and not by risk, so the same devices go first each time; what a device reports is
believed; and of several versions on their way the newest alone widens.
Source: https://sre.google/workbook/canarying-releases/
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from slmops_course.errors import CourseError
from slmops_course.operations.publisher import Publisher
from slmops_course.operations.registry import Registry
from slmops_course.operations.versions import RegistryError, Version, refuse_unjudged


class RolloutError(CourseError):
    """Rings that cannot show whether a version is good."""


@dataclass(frozen=True)
class Policy:
    """When a rollout widens and when it is halted. See `judge` for the two confidences."""

    rings: tuple[tuple[str, float], ...] = (("canary", 0.01), ("early", 0.10), ("half", 0.50), ("all", 1.0))  # and below
    max_error_share: float = 0.05  # of the devices that reported since the ring was opened
    soak_h: float = 24  # a ring is watched for so long at least
    go_confidence: float = 0.95
    halt_confidence: float = 0.99


@dataclass(frozen=True)
class Event:
    """Something that happened to a rollout, and why."""

    hour: float
    kind: str  # begun, widened, finished, halted, overtaken or refused
    number: int
    ring: str | None
    reason: str


def ring_of(device: int, rings: Sequence[tuple[str, float]]) -> int:
    """The narrowest ring that a device belongs to, by a hash of its number: stable, spread evenly, chosen by nobody.

    Example: with ("canary", 0.01) and ("all", 1.0), about 1 device in 100 -> 0, the others -> 1
    """
    place = int(hashlib.sha256(f"device-{device}".encode()).hexdigest()[:13], 16) / 16**13
    return next(number for number, (_, share) in enumerate(rings) if place < share)


def reports_needed(limit: float, confidence: float) -> int:
    """How many devices without a fault it takes to say that less than `limit` of all have one.

    Were the share `limit`, n devices would all be well with probability (1 - limit)^n, so n is where this falls below
    1 - confidence; for 0.95 it is nearly 3 / limit, the rule of three.
    Source: https://doi.org/10.1001/jama.1983.03330370053031 (Hanley, Lippman-Hand)
    Example: limit=0.05, confidence=0.95 -> 59; limit=0.01 -> 299
    """
    return math.ceil(math.log(1 - confidence) / math.log(1 - limit))


@functools.lru_cache(maxsize=100_000)
def judge(faults: int, count: int, policy: Policy) -> str:
    """Whether a share of faulty devices is "good" (surely below the limit), "bad" (surely above) or "unknown".

    Sure is meant at the two confidences, by the one-sided exact interval, so that neither luck with the first few devices
    nor one bad report decides. The verdict is asked for each hour and, for bad, for each class of devices, which makes
    an error likelier than one question would: hence the higher confidence for a halt. Of 400 simulated canary rings of 98
    devices in two days, none was halted and 390 were good where 0.5% of contacts report a fault; at 5%, the limit, 97 and
    46; at 10%, 384 and none.
    Source: Clopper, Pearson, "The use of confidence or fiducial limits", https://doi.org/10.1093/biomet/26.4.404
    Example, with Policy(): 0 of 58 -> "unknown", 0 of 59 -> "good", 2 of 2 -> "bad", 1 of 1 -> "unknown"
    """
    from scipy.stats import beta

    if faults and beta.ppf(1 - policy.halt_confidence, faults, count - faults + 1) > policy.max_error_share:
        return "bad"
    if count and faults < count and beta.ppf(policy.go_confidence, faults + 1, count - faults) < policy.max_error_share:
        return "good"
    return "unknown"


def check_rings(policy: Policy, devices: int) -> None:
    """Raise RolloutError for rings that do not widen to all devices, or whose first is too small to show anything."""
    shares = [share for _, share in policy.rings]
    if not shares or shares[-1] != 1 or shares != sorted(shares) or devices < 1:
        raise RolloutError(f"The rings hold {shares} of {devices} devices: expected rings that widen to 1.0; mend them.")
    needed, first = reports_needed(policy.max_error_share, policy.go_confidence), policy.rings[0]
    some = sum(ring_of(device, [first, ("", 1.0)]) == 0 for device in range(devices))
    if some < needed:
        raise RolloutError(
            f"The ring {first[0]} has {some} of {devices} devices: expected at least {needed}, the fewest that can show that "
            f"less than {policy.max_error_share:.0%} have a fault; widen the ring, or allow more faults."
        )


@dataclass
class _Rollout:
    """A version on its way through the rings, and what devices report of it in the ring that was opened last."""

    version: Version
    ring: int = -1
    opened: float = 0
    finished: bool = False
    latest: dict[int, bool] = field(default_factory=dict)  # device -> whether its latest report was a fault
    counts: dict[str, list[int]] = field(default_factory=dict)  # class -> [devices with a fault, devices]

    def note(self, device: int, kind: str, fault: bool) -> None:
        counts = self.counts.setdefault(kind, [0, 0])
        counts[0] += fault - self.latest.get(device, False)
        counts[1] += device not in self.latest
        self.latest[device] = fault

    def open_ring(self, ring: int, hour: float) -> None:
        self.ring, self.opened, self.latest, self.counts = ring, hour, {}, {}


class Rollouts:
    """Takes the versions of one model through the rings.

    Example:
        rollouts = Rollouts(registry, publisher, registry.get("desk"), Policy())
        rollouts.begin(registry.get("desk", 2), hour=24)                  # the first ring is offered version 2
        rollouts.note(2, device=17, kind="phone", fault=False)            # for each report that comes in
        rollouts.assess(hour=25)                                          # may widen, finish or halt
        rollouts.events[-1].kind                                          # "begun"

    Every change of what is offered has an event. Whether the rings can show anything, `check_rings` says.
    """

    def __init__(self, registry: Registry, publisher: Publisher, production: Version, policy: Policy):
        self.registry, self.publisher, self.production, self.policy = registry, publisher, production, policy
        self.active: dict[int, _Rollout] = {}  # those that are not halted, oldest first
        self.withdrawn: set[int] = set()
        self.events: list[Event] = []
        self._offered: dict[str, tuple] = {}
        self._offer()

    def begin(self, version: Version, *, hour: float) -> None:
        """Open the first ring for a version, if its gate report and its files are as they must be."""
        number = version.number
        try:
            refuse_unjudged(version, self.production)
        except RegistryError as error:
            return self._event(hour, "refused", number, None, str(error))
        problems = self.registry.verify(version)
        if problems:
            return self._event(hour, "refused", number, None, f"its files are not as registered: {'; '.join(problems)}")
        for other in self._under_way()[-1:]:
            reason = f"{number} is begun; this one widens no more"
            self._event(hour, "overtaken", other.version.number, self._ring(other), reason)
        self.active[number] = _Rollout(version)
        return self._widen(self.active[number], hour, "begun", "its gate report passed and its files are whole")

    def note(self, number: int, *, device: int, kind: str, fault: bool) -> None:
        """A device of some kind says how the version that it runs does. Its latest word counts."""
        if number in self.active:
            self.active[number].note(device, kind, fault)

    def assess(self, *, hour: float) -> None:
        """Judge each version that is on its way, and those that came through and may still turn out bad."""
        for rollout in list(self.active.values()):
            if rollout.version.number in self.active:
                self._assess(rollout, hour)

    def _assess(self, rollout: _Rollout, hour: float) -> None:
        """Halt a version that is surely bad, for all or for one kind of devices; widen one that is surely good."""
        policy = self.policy
        faults, count = (sum(counts[column] for counts in rollout.counts.values()) for column in (0, 1))
        for name, group in (rollout.counts | {"all kinds": (faults, count)}).items():
            if judge(*group, policy) == "bad":
                found = f"{group[0]} of {group[1]} devices of {name} reported a fault"
                return self._halt(rollout, hour, f"{found}, surely more than {policy.max_error_share:.0%}")
        soaked = hour - rollout.opened >= policy.soak_h
        if rollout.finished or not soaked or rollout not in self._under_way()[-1:] or judge(faults, count, policy) != "good":
            return None
        reason = f"{faults} of {count} devices reported a fault, surely less than {policy.max_error_share:.0%}"
        if rollout.ring + 1 < len(policy.rings):
            return self._widen(rollout, hour, "widened", reason)
        return self._finish(rollout, hour, reason)

    def _under_way(self) -> list[_Rollout]:
        """The rollouts that are neither finished nor halted. The newest alone may widen."""
        return [rollout for rollout in self.active.values() if not rollout.finished]

    def _widen(self, rollout: _Rollout, hour: float, kind: str, reason: str) -> None:
        rollout.open_ring(rollout.ring + 1, hour)
        self._offer()
        self._event(hour, kind, rollout.version.number, self._ring(rollout), reason)

    def _finish(self, rollout: _Rollout, hour: float, reason: str) -> None:
        """Put the version into production. It is still watched: a bad signal may come late."""
        number = rollout.version.number
        try:
            self.production = self.registry.promote(rollout.version.name, number)
        except RegistryError as error:
            return self._halt(rollout, hour, f"the registry does not promote it ({error})")
        rollout.finished = True
        self.active = {number: rollout}  # no ring is offered the older ones any more
        return self._event(hour, "finished", number, self._ring(rollout), reason)

    def _halt(self, rollout: _Rollout, hour: float, reason: str) -> None:
        """Take a version back: its rings are offered what they would have without it, and no device returns to it."""
        number = rollout.version.number
        del self.active[number]
        self.withdrawn.add(number)
        if rollout.finished:
            self.production = self.registry.rollback(rollout.version.name)
        self._offer()
        self._event(hour, "halted", number, self._ring(rollout), reason)

    def _offer(self) -> None:
        """Publish on each ring's channel the newest version that reached the ring, or what is in production."""
        wanted, versions, withdrawn = {}, {}, sorted(self.withdrawn)
        for ring, (channel, _) in enumerate(self.policy.rings):
            reached = [rollout.version for rollout in self.active.values() if rollout.ring >= ring]
            version = (reached or [self.production])[-1]
            wanted[channel], versions[version.number] = (version.number, withdrawn), version
        changed = [channel for channel, offer in wanted.items() if offer != self._offered.get(channel)]
        for number, version in versions.items():
            channels = [channel for channel in changed if wanted[channel][0] == number]
            if channels:
                self.publisher.publish(version, channels=channels, withdrawn=withdrawn)
        self._offered = wanted

    def _event(self, hour: float, kind: str, number: int, ring: str | None, reason: str) -> None:
        self.events.append(Event(hour, kind, number, ring, reason))

    def _ring(self, rollout: _Rollout) -> str:
        return self.policy.rings[rollout.ring][0]
