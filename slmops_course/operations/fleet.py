"""A fleet of ten thousand devices, simulated hour by hour, with the real registry, gate report, publisher and update client.

Simulated are time, connections, power cuts and how well a version works on a kind of device; SimPy keeps the calendar.
Real are the registry that gives out a version, the gate's report without which nothing is rolled out, the publisher's
signatures, and the client that verifies, fetches, installs and goes back.

Ten thousand real clients that ask for weeks would verify the same signatures a million times. What a client does depends
on nothing but the folder that it keeps, what the server holds, its channel and which metadata has expired. So the real
client runs once for each such combination, and every device that shares it takes over the result. `reuse=False` gives
each device a folder and a client of its own, for a small fleet; a test holds both to the same result.
Source: https://simpy.readthedocs.io/
"""

import bisect
import math
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from slmops_course.artifacts import content_digest
from slmops_course.errors import CourseError
from slmops_course.operations.offers import UpdateError
from slmops_course.operations.publisher import Publisher
from slmops_course.operations.registry import Registry
from slmops_course.operations.rollout import Event, Policy, Rollouts, check_rings, ring_of
from slmops_course.operations.updates import Device, Offer

START = datetime(2026, 1, 5, tzinfo=UTC)  # hour 0; any Monday would do
CUTS = (0.25, 0.5, 0.75)  # of what is missing: where a transfer breaks off


class FleetError(CourseError):
    """A fleet that cannot be simulated."""


@dataclass(frozen=True)
class DeviceClass:
    """A kind of device."""

    name: str
    share: float  # of the fleet
    memory_bytes: float  # what a model may take
    bytes_per_s: float  # of its connection


@dataclass(frozen=True)
class Habit:
    """How often a device is connected."""

    name: str
    share: float  # of the fleet
    every_h: float  # between two contacts; give or take a fifth where it is regular, else exponentially distributed
    regular: bool = True


CLASSES = (
    DeviceClass("workstation", 0.20, 16e9, 12.5e6),
    DeviceClass("laptop", 0.45, 4e9, 2.5e6),
    DeviceClass("phone", 0.25, 2e9, 1.25e6),
    DeviceClass("board", 0.10, 0.5e9, 0.125e6),
)
HABITS = (
    Habit("always", 0.50, 6),
    Habit("daily", 0.30, 24),
    Habit("weekly", 0.10, 168),
    Habit("seldom", 0.10, 96, regular=False),  # offline for days at a time
)


@dataclass(frozen=True)
class Planned:
    """A release that is begun at some hour, and how its version behaves."""

    hour: float
    number: int  # in the registry
    memory_bytes: float = 0  # a device with less cannot start it, and goes back by itself
    error_share: float = 0.005  # of contacts that report a fault
    error_share_of: Mapping[str, float] = field(default_factory=dict)  # the same for some classes only


@dataclass(frozen=True)
class Corruption:
    """Some hours in which each file of a version that the server holds has a flipped bit."""

    hour: float
    lasts_h: float


@dataclass(frozen=True)
class Install:
    """One device began to run one version."""

    hour: float
    device: int
    ring: int  # the narrowest ring that the device belongs to
    number: int
    kept: bool  # False: it could not run there, and the device went back by itself


@dataclass(frozen=True)
class FleetResult:
    """What happened. The lists in `shares` and `reports` have one entry an hour, as `hours`."""

    hours: list[int]
    shares: dict[int, list[float]]  # version -> share of the devices that run it
    reports: dict[int, list[tuple[int, int]]]  # version -> contacts that reported (no fault, a fault) in the last hour
    events: list[Event]
    installs: list[Install]
    refusals: Counter  # sentences with which clients refused an update
    client_runs: int  # of the real client
    contacts: int
    metadata_bytes: int
    file_bytes: int  # that travelled
    full_bytes: int  # that would have travelled had every update fetched all of its files


def simulate(
    registry: Registry,
    name: str,
    plan: Sequence[Planned],
    *,
    folder: Path,
    devices: int = 10_000,
    days: float = 30,
    seed: int = 0,
    classes: Sequence[DeviceClass] = CLASSES,
    habits: Sequence[Habit] = HABITS,
    policy: Policy | None = None,
    cut_share: float = 0.02,
    corruptions: Sequence[Corruption] = (),
    file_scale: float = 1,
    reuse: bool = True,
    inspect: Callable[[Device], None] = lambda device: None,
) -> FleetResult:
    """Roll releases out over a fleet that begins with what is in production, and see what happens.

    `folder` must be new; a folder in memory, such as /dev/shm, is fastest. `cut_share` of all transfers break off. Each
    byte of the registered files stands for `file_scale` bytes of the fleet's, so a rehearsal with small files takes a real
    one's time and volume. `inspect` is called with the device after each run of the real client.

    A plan for the version in production says how that one behaves; it is not rolled out again.

    Example: `simulate(registry, "support-desk", [Planned(24, 2)], folder=Path("/dev/shm/fleet")).events[-1].kind` -> "finished"

    Raises FleetError for shares that are not a whole fleet, a version planned twice and a folder that is not empty,
    RolloutError as `check_rings` does, and RegistryError where a version is not there or none is in production.
    """
    policy = policy or Policy()
    check_rings(policy, devices)
    _check_fleet(plan, classes, habits, folder)
    import simpy

    env = simpy.Environment()
    clients = _Clients(env, folder, reuse=reuse, inspect=inspect)
    fleet = _Fleet(env, clients, registry, name, plan, policy)
    for device in range(devices):
        rng = random.Random(f"{seed}/{device}")
        kind, habit = (rng.choices(some, [each.share for each in some])[0] for some in (classes, habits))
        env.process(fleet.live(device, kind, habit, rng, cut_share=cut_share, file_scale=file_scale))
    for corruption in corruptions:
        env.process(fleet.corrupt(corruption))
    env.process(fleet.steer())
    env.run(until=math.nextafter(days * 24, math.inf))  # with the last hour's record
    totals = {key: fleet.totals[key] for key in ("contacts", "metadata_bytes")}
    totals |= {key: round(fleet.totals[key] * file_scale) for key in ("file_bytes", "full_bytes")}
    records = (fleet.hours, fleet.shares, fleet.reports, fleet.rollouts.events, fleet.installs, fleet.refusals)
    return FleetResult(*records, client_runs=clients.runs, **totals)


class _PowerCut(Exception):
    """Ends a transfer in the middle."""


@dataclass(frozen=True)
class _Outcome:
    """What one run of the client came to."""

    running: int | None
    started: int | None = None  # the version that was installed and started, were it only to go back at once
    offer: Offer | None = None
    metadata_bytes: int = 0
    file_bytes: int = 0
    error: str | None = None


class _Clients:
    """Runs the real client, once for each state of a device, of the server, channel and action; see the module."""

    def __init__(self, env, folder: Path, *, reuse: bool, inspect: Callable[[Device], None]):
        self.env, self.folder, self.reuse, self.inspect = env, folder, reuse, inspect
        self.publisher = Publisher(folder / "served", keys_folder=folder / "keys", clock=self.clock)
        self.known: dict[tuple, tuple[str, _Outcome]] = {}
        self.runs = 0
        self.served_changed()

    def clock(self) -> datetime:
        return START + timedelta(hours=self.env.now)

    def served_changed(self) -> None:
        """To be called whenever what the server holds has changed."""
        self.served = content_digest(self.publisher.folder)
        self.expiries_h = sorted((when - START) / timedelta(hours=1) for when in self.publisher.expiries().values())

    def new_state(self, device: int) -> str:
        """The name of the folder of a device that has just been built."""
        state = "empty" if self.reuse else f"device-{device}"
        (self.folder / "devices" / state).mkdir(parents=True, exist_ok=True)
        return state

    def run(self, action: str, state: str, channel: str, detail=None) -> tuple[str, _Outcome]:
        """Check, fetch (detail: the bytes after which the transfer breaks off, or None) or start (detail: what fails)."""
        if not self.reuse:
            return state, self._run(action, self.folder / "devices" / state, channel, detail)
        expired = bisect.bisect_right(self.expiries_h, self.env.now)
        key = (action, state, channel, detail, self.served, expired)
        if key not in self.known:
            folders = self.folder / "devices"
            scratch = folders / "scratch"
            # A device replaces its files and never writes into one, so states can share them.
            shutil.copytree(folders / state, scratch, symlinks=True, copy_function=_link)
            outcome = self._run(action, scratch, channel, detail)
            after = content_digest(scratch)
            if (folders / after).exists():
                shutil.rmtree(scratch)
            else:
                os.replace(scratch, folders / after)
            self.known[key] = after, outcome
        return self.known[key]

    def _run(self, action: str, folder: Path, channel: str, detail) -> _Outcome:
        self.runs += 1
        served = self.publisher
        device = Device(folder, source=served.folder, root=served.root, channel=channel, clock=served.clock)
        offer = started = error = None
        try:
            if action == "check":
                offer = device.check()
            elif action == "fetch":
                device.tap = device.tap if detail is None else _cutter(device, detail)
                offer = device.fetch()
            elif device.install():
                started = device.installed.running.number
                device.rollback() if started in detail else device.confirm()
        except UpdateError as refusal:
            error = str(refusal)
        except _PowerCut:
            error = "the transfer broke off"
        self.inspect(device)
        running = device.installed.running
        return _Outcome(running and running.number, started, offer, *device.received.values(), error)


def _cutter(device: Device, after_bytes: int):
    def tap(url: str, piece: bytes) -> bytes:
        if "/targets/files/" in url and device.received["files"] + len(piece) > after_bytes:
            device.received["files"] = after_bytes
            raise _PowerCut
        return piece

    return tap


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has hard links
        shutil.copyfile(source, target)


class _Fleet:
    """The devices, the rollouts that they are part of, and the record of both."""

    def __init__(self, env, clients: _Clients, registry: Registry, name: str, plan: Sequence[Planned], policy: Policy):
        self.env, self.clients = env, clients
        production = registry.get(name)
        in_order = sorted(plan, key=lambda planned: planned.hour)
        self.plan = {production.number: Planned(0, production.number)} | {each.number: each for each in in_order}
        self.versions = {number: registry.get(name, number) for number in self.plan}
        self.waiting = [planned for planned in self.plan.values() if planned.number != production.number]
        self.rollouts = Rollouts(registry, clients.publisher, production, policy)
        self.clients.served_changed()
        self.running, self.hourly, self.totals, self.refusals = Counter(), Counter(), Counter(), Counter()
        self.hours, self.installs = [], []
        self.shares, self.reports = ({number: [] for number in self.versions} for _ in range(2))

    def live(self, device: int, kind: DeviceClass, habit: Habit, rng: random.Random, *, cut_share: float, file_scale: float):
        """One device's life, as a SimPy process: contact, report, ask, perhaps update, and silence until the next contact."""
        rings = self.rollouts.policy.rings
        ring = ring_of(device, rings)
        channel = rings[ring][0]
        unfit = tuple(number for number, planned in self.plan.items() if planned.memory_bytes > kind.memory_bytes)
        shares = {number: planned.error_share_of.get(kind.name, planned.error_share) for number, planned in self.plan.items()}
        state = self.clients.new_state(device)
        for action, detail in (("fetch", None), ("start", ())):  # in the factory
            state, outcome = self.clients.run(action, state, channel, detail)
        number = outcome.running
        self.running[number] += 1
        yield self.env.timeout(rng.random() * habit.every_h)
        while True:
            silence_h = habit.every_h * (rng.uniform(0.8, 1.2) if habit.regular else rng.expovariate(1))
            self.totals["contacts"] += 1
            self.report(device, kind.name, number, rng.random() < shares[number])
            state, outcome = self.ask("check", state, channel)
            if outcome.offer and outcome.offer.new:
                cut = round(rng.choice(CUTS) * outcome.offer.missing_bytes) if rng.random() < cut_share else None
                state, outcome = self.ask("fetch", state, channel, cut)
                arriving_h = outcome.file_bytes * file_scale / kind.bytes_per_s / 3600
                yield self.env.timeout(arriving_h)
                if outcome.error is None:
                    self.totals["full_bytes"] += outcome.offer.total_bytes
                    state, outcome = self.ask("start", state, channel, unfit)
                if outcome.started:
                    kept = outcome.started == outcome.running
                    self.installs.append(Install(self.env.now, device, ring, outcome.started, kept))
                    self.running[number] -= 1
                    number = outcome.running
                    self.running[number] += 1
                if outcome.started in unfit:
                    self.report(device, kind.name, outcome.started, True)
            yield self.env.timeout(silence_h)

    def ask(self, action: str, state: str, channel: str, detail=None) -> tuple[str, _Outcome]:
        """What the client does now; its bytes and refusals are counted."""
        state, outcome = self.clients.run(action, state, channel, detail)
        self.totals["metadata_bytes"] += outcome.metadata_bytes
        self.totals["file_bytes"] += outcome.file_bytes
        if outcome.error:
            self.refusals[outcome.error] += 1
        return state, outcome

    def report(self, device: int, kind: str, number: int, fault: bool) -> None:
        """A device says how the version that it runs does."""
        self.hourly[number, fault] += 1
        self.rollouts.note(number, device=device, kind=kind, fault=fault)

    def steer(self):
        """Once an hour, as a SimPy process: begin what is planned, judge what is under way, and keep the record."""
        while True:
            seen = len(self.rollouts.events)
            resigned = self.env.now % 24 == 0 and self.clients.publisher.refresh()
            while self.waiting and self.waiting[0].hour <= self.env.now:
                self.rollouts.begin(self.versions[self.waiting.pop(0).number], hour=self.env.now)
            self.rollouts.assess(hour=self.env.now)
            if resigned or len(self.rollouts.events) > seen:
                self.clients.served_changed()
            self.hours.append(int(self.env.now))
            for number in self.versions:
                self.shares[number].append(self.running[number] / self.running.total())
                self.reports[number].append((self.hourly[number, False], self.hourly[number, True]))
            self.hourly.clear()
            yield self.env.timeout(1)

    def corrupt(self, corruption: Corruption):
        """Flip a bit in the served files, as a SimPy process, and mend them later."""
        yield self.env.timeout(corruption.hour)
        whole = {path: path.read_bytes() for path in (self.clients.publisher.folder / "targets" / "files").iterdir()}
        for after_h, flipped in ((corruption.lasts_h, 1), (0, 0)):
            for path, data in whole.items():
                path.write_bytes(bytes(first ^ flipped for first in data[:1]) + data[1:])
            self.clients.served_changed()
            yield self.env.timeout(after_h)


def _check_fleet(plan, classes, habits, folder: Path) -> None:
    for what, some in (("classes", classes), ("habits", habits)):
        total = sum(each.share for each in some)
        if not math.isclose(total, 1):
            raise FleetError(f"The {what} make up {total:.0%} of the fleet: expected 100%; mend their shares.")
    numbers = [planned.number for planned in plan]
    if len(set(numbers)) < len(numbers):
        raise FleetError(f"The plan has the versions {numbers}: expected each once; register a repaired version as a new one.")
    if folder.exists() and any(folder.iterdir()):
        raise FleetError(f"The folder {folder} is not empty: expected a new one; choose another.")
