"""Fleets of devices with the real registry, publisher and client: what a rollout does, and what no device ever does."""

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from slmops_course.operations.fleet import (
    CLASSES,
    Corruption,
    DeviceClass,
    FleetError,
    Habit,
    Planned,
    simulate,
)
from slmops_course.operations.registry import Registry
from slmops_course.operations.rollout import Policy, RolloutError
from slmops_course.operations.updates import Device
from slmops_course.operations.versions import RegistryError

# A fleet small enough for a test: 9 devices without a fault show that less than 3 in 10 have one.
POLICY = Policy((("canary", 0.3), ("early", 0.6), ("all", 1.0)), max_error_share=0.3, soak_h=8)
HABITS = (Habit("always", 0.6, 3), Habit("daily", 0.4, 12))
AWAY = (Habit("always", 0.6, 3), Habit("daily", 0.2, 12), Habit("seldom", 0.2, 30, regular=False))
FLEETS = int(os.environ.get("SLMOPS_FLEETS", "4"))  # how many the invariants are tried on; 4 take five seconds


@pytest.fixture
def roll(registry, tmp_path):
    """Roll a plan out over a small fleet."""
    numbers = count()

    def run(*plan, devices=60, days=5, **options):
        options = {"policy": POLICY, "habits": HABITS, "cut_share": 0.0} | options
        place = tmp_path / f"fleet-{next(numbers)}"
        return simulate(registry, "desk", plan, folder=place, devices=devices, days=days, **options)

    return run


def story(result) -> list[tuple]:
    return [(event.kind, event.number, event.ring) for event in result.events]


def final(result) -> dict:
    return {number: shares[-1] for number, shares in result.shares.items() if shares[-1]}


def test_a_good_version_reaches_everyone_ring_by_ring_and_only_its_adapter_travels(roll, registry):
    result = roll(Planned(6, 2))
    assert story(result) == [("begun", 2, "canary"), ("widened", 2, "early"), ("widened", 2, "all"), ("finished", 2, "all")]
    assert final(result) == {2: 1.0}
    assert registry.get("desk").number == 2
    hours = {event.ring: event.hour for event in result.events[:-1]}
    assert min(later - earlier for earlier, later in pairwise(hours.values())) >= POLICY.soak_h
    assert all(install.hour >= hours[POLICY.rings[install.ring][0]] for install in result.installs)
    assert len(result.installs) == 60
    assert result.file_bytes == 60 * 2700
    assert result.full_bytes == 60 * (2700 + 120_000 + 2)
    assert result.hours == list(range(121))
    assert sum(good + bad for hours in result.reports.values() for good, bad in hours) == result.contacts
    assert result.client_runs < 100 < result.contacts


def test_a_bad_version_is_halted_in_its_first_ring_and_taken_back(roll, registry):
    result = roll(Planned(6, 2, error_share=0.9))
    assert story(result) == [("begun", 2, "canary"), ("halted", 2, "canary")]
    assert "devices of" in result.events[-1].reason
    assert final(result) == {1: 1.0}
    assert 0 < max(result.shares[2]) <= 0.35
    assert {install.ring for install in result.installs if install.number == 2} == {0}
    assert registry.get("desk").number == 1


def test_a_version_that_one_class_of_devices_cannot_start_is_halted_for_all(roll):
    classes = (*(replace(kind, share=kind.share * 0.8 / 0.9) for kind in CLASSES[:3]), replace(CLASSES[3], share=0.2))
    result = roll(Planned(6, 2, memory_bytes=1e9), classes=classes, devices=120)
    assert story(result)[-1] == ("halted", 2, "canary")
    assert "devices of board reported a fault, surely more than 30%" in result.events[-1].reason
    assert {install.kept for install in result.installs if install.number == 2} == {True, False}
    assert final(result) == {1: 1.0}


def test_a_version_that_turns_out_bad_in_production_is_taken_back_from_there(roll, registry):
    kinds = (DeviceClass("phone", 0.94, 1e9, 1e6), DeviceClass("watch", 0.06, 1e9, 1e6))
    plan = Planned(6, 2, error_share=0.0, error_share_of={"watch": 1.0})
    result = roll(plan, classes=kinds, policy=replace(POLICY, soak_h=0), devices=90, days=3)
    assert [event.kind for event in result.events] == ["begun", "widened", "widened", "finished", "halted"]
    assert "4 of 4 devices of watch reported a fault" in result.events[-1].reason
    assert final(result) == {1: 1.0}
    assert (registry.get("desk").number, registry.history("desk")[-1].action) == (1, "rollback")


def test_what_the_gate_refused_or_never_saw_reaches_no_device(roll):
    result = roll(Planned(6, 5), Planned(7, 6))
    assert [(event.kind, event.number) for event in result.events] == [("refused", 5), ("refused", 6)]
    assert "did not pass the gate (JSON validity: 50.0%" in result.events[0].reason
    assert "has no gate report" in result.events[1].reason
    assert result.installs == []
    assert final(result) == {1: 1.0}


def test_a_version_that_was_damaged_in_the_registry_reaches_no_device(roll, registry):
    path = registry.get("desk", 2).folder / "adapter.safetensors"
    path.chmod(0o600)
    path.write_bytes(b"changed")
    result = roll(Planned(6, 2))
    assert story(result) == [("refused", 2, None)]
    assert "adapter.safetensors was changed" in result.events[0].reason


def test_of_two_racing_versions_the_newer_goes_on_alone(roll):
    result = roll(Planned(6, 2), Planned(16, 3), days=6)
    begun = next(event.hour for event in result.events if (event.kind, event.number) == ("begun", 3))
    assert [e.kind for e in result.events if e.number == 2 and e.hour >= begun] == ["overtaken"]
    assert story(result)[-1] == ("finished", 3, "all")
    assert final(result) == {3: 1.0}


def test_where_the_newer_of_two_is_halted_the_older_goes_on(roll, registry):
    result = roll(Planned(6, 2), Planned(10, 3, error_share=0.9), days=7)
    kinds = story(result)
    assert kinds[:4] == [("begun", 2, "canary"), ("overtaken", 2, "canary"), ("begun", 3, "canary"), ("halted", 3, "canary")]
    assert kinds[-1] == ("finished", 2, "all")
    assert final(result) == {2: 1.0}
    assert registry.get("desk").number == 2


def test_a_device_that_was_away_for_days_skips_what_it_missed(roll):
    result = roll(Planned(6, 2), Planned(48, 3), habits=AWAY, days=9)
    assert [kind for kind, *_ in story(result)].count("finished") == 2
    versions = {}
    for install in result.installs:
        versions.setdefault(install.device, []).append(install.number)
    ways = Counter(map(tuple, versions.values()))
    assert set(ways) == {(2, 3), (3,)}
    assert final(result) == {3: 1.0}


def test_transfers_that_break_off_are_resumed(roll):
    result = roll(Planned(6, 4), cut_share=0.5, days=9)
    cut = result.refusals["the transfer broke off"]
    assert cut > 10
    assert final(result) == {4: 1.0}
    # Version 4 has two new files; what had arrived whole was not fetched again, what had not was.
    assert result.full_bytes * 1.0 < result.file_bytes < result.full_bytes + cut * 0.75 * 152_700


def test_a_changed_file_on_the_server_is_installed_nowhere(roll):
    result = roll(Planned(6, 4), corruptions=[Corruption(7, 30)], days=6)
    assert all("does not match expected hash" in sentence for sentence in result.refusals)
    assert result.refusals.total() > 10
    assert all(install.hour >= 37 for install in result.installs if install.hour > 7.5)
    assert final(result) == {4: 1.0}


def test_taking_over_the_result_of_a_client_is_the_same_as_running_each(kept_registry, tmp_path):
    results = []
    for reuse in (True, False):
        shutil.copytree(kept_registry, tmp_path / f"registry-{reuse}")
        options = {
            "devices": 24, "days": 1.5, "policy": replace(POLICY, rings=(("a", 0.5), ("b", 1.0))), "cut_share": 0.3,
            "habits": [Habit("often", 0.7, 4), Habit("seldom", 0.3, 9, regular=False)], "corruptions": [Corruption(6, 5)],
        }  # fmt: skip
        registry, plan = Registry(tmp_path / f"registry-{reuse}"), [Planned(4, 4), Planned(20, 3, error_share=0.9)]
        results.append(simulate(registry, "desk", plan, folder=tmp_path / f"fleet-{reuse}", reuse=reuse, **options))
    shared, single = results
    assert shared.client_runs < single.client_runs / 2
    assert replace(shared, client_runs=0) == replace(single, client_runs=0)
    assert {event.kind for event in single.events} >= {"begun", "widened", "halted"}
    assert single.refusals["the transfer broke off"] > 0
    assert any("does not match expected hash" in sentence for sentence in single.refusals)


def test_the_same_seed_gives_the_same_fleet(roll, registry, kept_registry):
    first, again, other = (roll(Planned(6, 2), days=1, seed=seed) for seed in (1, 1, 2))
    assert replace(first, client_runs=0) == replace(again, client_runs=0)
    assert first.installs != other.installs


# --- What cannot be simulated ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"classes": CLASSES[:2]}, "classes make up 65% of the fleet: expected 100%"),
        ({"habits": ()}, "habits make up 0% of the fleet"),
    ],
)
def test_a_fleet_that_is_none_is_refused(roll, options, sentence):
    with pytest.raises(FleetError, match=sentence):
        roll(Planned(6, 2), **options)


def test_a_fleet_whose_rings_show_nothing_is_refused(roll):
    with pytest.raises(RolloutError, match="ring canary has 1 of 60 devices"):
        roll(Planned(6, 2), policy=Policy())


def test_a_plan_that_is_none_is_refused(roll, tmp_path):
    with pytest.raises(FleetError, match=r"versions \[2, 2\]: expected each once"):
        roll(Planned(6, 2), Planned(7, 2))
    with pytest.raises(RegistryError, match="no version '9'"):
        roll(Planned(6, 9))
    (tmp_path / "fleet-2").mkdir()
    (tmp_path / "fleet-2" / "file").touch()
    with pytest.raises(FleetError, match="is not empty: expected a new one"):
        roll(Planned(6, 2))


def test_a_fleet_without_releases_stays_as_it_is(roll):
    result = roll(days=1)
    assert (result.events, result.installs, result.file_bytes, final(result)) == ([], [], 0, {1: 1.0})


# --- Invariants ---

releases = st.lists(
    st.builds(
        Planned,
        hour=st.integers(1, 40),
        number=st.sampled_from([2, 3, 4]),
        memory_bytes=st.sampled_from([0, 0, 1e9, 1e12]),
        error_share=st.sampled_from([0.0, 0.05, 0.6]),
    ),
    min_size=1, max_size=3, unique_by=lambda planned: planned.number,
)  # fmt: skip
troubles = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "cut_share": st.sampled_from([0.0, 0.4]),
        "corruptions": st.lists(st.builds(Corruption, st.integers(1, 60), st.integers(1, 30)), max_size=2),
        "habits": st.sampled_from([AWAY, (Habit("often", 0.5, 4), Habit("seldom", 0.5, 20, regular=False))]),
    }
)


def check_that_hashes_are_right(device: Device, right: dict) -> None:
    now = device.installed.running
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in device.running().folder.iterdir()}
    assert found == right[now.number]


def check_that_it_can_return(device: Device) -> None:
    """On a copy, without a connection."""
    now = device.installed
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(device.folder, f"{folder}/copy", symlinks=True, copy_function=os.link)
        copy = Device(Path(folder) / "copy", source="http://127.0.0.1:9", root=b"", channel="none")
        assert copy.rollback() == now.last_good
        back = copy.running()
        assert (back.release, back.confirmed) == (now.last_good, True)
        assert now.running.number in copy.installed.refused


def check_that_halted_versions_stopped(plan, result, seen: Counter) -> None:
    names = [name for name, _ in POLICY.rings]
    for event in result.events:
        installs = [install for install in result.installs if install.number == event.number]
        if event.kind == "halted":
            seen["halted"] += bool(installs)
            assert max((install.ring for install in installs), default=0) <= names.index(event.ring)
            assert max((install.hour for install in installs), default=0) <= event.hour
    unfit = {planned.number for planned in plan if planned.memory_bytes > 16e9}
    assert not any(install.kept for install in result.installs if install.number in unfit)


@pytest.mark.slow
def test_whatever_happens_hashes_are_right_halted_versions_stop_and_every_device_can_return(kept_registry):
    right = {version.number: version.files for version in Registry(kept_registry).versions("desk")}
    seen = Counter()

    def inspect(device: Device):
        if device.installed.running:
            check_that_hashes_are_right(device, right)
        if device.installed.last_good:
            check_that_it_can_return(device)
            seen["returned"] += 1

    # The plans are short, so looking for a shorter one that fails too would only take minutes.
    @settings(
        derandomize=True, deadline=None, max_examples=FLEETS, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(plan=releases, options=troubles)
    def simulate_anything(plan, options):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(kept_registry, Path(folder) / "registry")
            place, registry = Path(folder) / "fleet", Registry(Path(folder) / "registry")
            options |= {"devices": 40, "days": 3, "policy": POLICY, "inspect": inspect}
            result = simulate(registry, "desk", plan, folder=place, **options)
            check_that_halted_versions_stopped(plan, result, seen)
            seen["changed"] += any("does not match expected hash" in sentence for sentence in result.refusals)
            seen["cut"] += "the transfer broke off" in result.refusals

    simulate_anything()
    for what in ("halted", "returned", "changed", "cut"):  # else the examples would prove nothing
        assert seen[what] > 0, what
