"""Rings, verdicts, and what a rollout does with the reports that it is told of: a real registry and a real publisher."""

from collections import Counter

import pytest

from slmops_course.operations.publisher import Publisher
from slmops_course.operations.rollout import (
    Policy,
    RolloutError,
    Rollouts,
    check_rings,
    judge,
    reports_needed,
    ring_of,
)

POLICY = Policy((("canary", 0.3), ("all", 1.0)), max_error_share=0.3, soak_h=8)


@pytest.fixture
def rollouts(registry, tmp_path, clock):
    publisher = Publisher(tmp_path / "served", keys_folder=tmp_path / "keys", clock=clock)
    return Rollouts(registry, publisher, registry.get("desk"), POLICY)


def tell(rollouts, number: int, *, faults: int, good: int, kind="phone") -> None:
    for device in range(faults + good):
        rollouts.note(number, device=device, kind=kind, fault=device < faults)


def story(rollouts) -> list[tuple]:
    return [(event.hour, event.kind, event.number, event.ring) for event in rollouts.events]


# --- Rings and verdicts ---


def test_rings_hold_their_share_of_devices_and_a_device_stays_in_its_ring():
    rings = Policy().rings
    found = Counter(ring_of(device, rings) for device in range(10_000))
    assert found == Counter({0: 98, 1: 886, 2: 3939, 3: 5077})
    assert all(ring_of(device, [*rings[:1], ("rest", 1.0)]) == 0 for device in range(10_000) if ring_of(device, rings) == 0)


def test_the_number_of_reports_needed_is_the_rule_of_three():
    assert reports_needed(0.05, 0.95) == 59
    assert reports_needed(0.01, 0.95) == 299
    assert 0.95**59 < 0.05 < 0.95**58


@pytest.mark.parametrize(
    ("faults", "devices", "verdict"),
    [
        (0, 0, "unknown"), (0, 58, "unknown"), (0, 59, "good"), (1, 59, "unknown"), (1, 93, "good"), (1, 1, "unknown"),
        (2, 2, "bad"), (2, 5, "unknown"), (50, 1000, "unknown"), (20, 1000, "good"), (90, 1000, "bad"), (1000, 1000, "bad"),
    ],
)  # fmt: skip
def test_a_verdict_needs_enough_reports(faults, devices, verdict):
    assert judge(faults, devices, Policy(max_error_share=0.05, go_confidence=0.95, halt_confidence=0.99)) == verdict


@pytest.mark.parametrize(
    ("rings", "devices", "sentence"),
    [
        ((("canary", 0.5),), 1000, r"hold \[0.5\] of 1000 devices: expected rings that widen to 1.0"),
        ((("canary", 0.5), ("early", 0.2), ("all", 1.0)), 1000, "expected rings that widen"),
        ((), 1000, "expected rings that widen"),
        (Policy().rings, 0, "of 0 devices"),
        (Policy().rings, 60, "ring canary has 1 of 60 devices: expected at least 59, the fewest that can show"),
    ],
)
def test_rings_that_show_nothing_are_refused(rings, devices, sentence):
    with pytest.raises(RolloutError, match=sentence):
        check_rings(Policy(rings), devices)


def test_rings_that_widen_and_begin_with_enough_devices_are_accepted():
    check_rings(Policy(), 10_000)


# --- What reports lead to ---


def test_before_anything_is_begun_every_ring_is_offered_what_is_in_production(rollouts):
    rollouts.assess(hour=1)
    rollouts.note(2, device=1, kind="phone", fault=True)
    assert (rollouts.events, rollouts.publisher.offered()) == ([], {"all": 1, "canary": 1})


def test_a_good_version_widens_after_its_time_and_ends_in_production(rollouts, registry):
    rollouts.begin(registry.get("desk", 2), hour=0)
    assert rollouts.publisher.offered() == {"all": 1, "canary": 2}
    tell(rollouts, 2, faults=0, good=9)
    rollouts.assess(hour=7)  # not watched for long enough
    rollouts.assess(hour=8)
    rollouts.assess(hour=16)  # no report since the ring was opened
    tell(rollouts, 2, faults=0, good=9)
    rollouts.assess(hour=17)
    assert story(rollouts) == [
        (0, "begun", 2, "canary"), (8, "widened", 2, "all"), (17, "finished", 2, "all"),
    ]  # fmt: skip
    assert (registry.get("desk").number, rollouts.publisher.offered()) == (2, {"all": 2, "canary": 2})


def test_the_latest_word_of_a_device_counts(rollouts, registry):
    rollouts.begin(registry.get("desk", 2), hour=0)
    tell(rollouts, 2, faults=9, good=0)
    tell(rollouts, 2, faults=0, good=9)
    rollouts.assess(hour=8)
    assert rollouts.events[-1].kind == "widened"


def test_a_bad_version_is_halted_at_once_and_withdrawn(rollouts, registry):
    rollouts.begin(registry.get("desk", 2), hour=0)
    tell(rollouts, 2, faults=8, good=1)
    rollouts.assess(hour=1)
    assert story(rollouts)[-1] == (1, "halted", 2, "canary")
    assert rollouts.events[-1].reason == "8 of 9 devices of phone reported a fault, surely more than 30%"
    assert (rollouts.publisher.offered(), rollouts.withdrawn) == ({"all": 1, "canary": 1}, {2})


def test_a_version_that_is_bad_on_one_kind_of_device_is_halted_for_all(rollouts, registry):
    rollouts.begin(registry.get("desk", 2), hour=0)
    for device in range(100):
        rollouts.note(2, device=device, kind="board" if device < 4 else "phone", fault=device < 4)
    rollouts.assess(hour=1)
    assert rollouts.events[-1].reason.startswith("4 of 4 devices of board reported a fault")


def test_what_turns_out_bad_in_production_is_rolled_back_in_the_registry(rollouts, registry):
    rollouts.begin(registry.get("desk", 2), hour=0)
    for hour in (8, 16):
        tell(rollouts, 2, faults=0, good=9)
        rollouts.assess(hour=hour)
    assert registry.get("desk").number == 2
    tell(rollouts, 2, faults=9, good=0)
    rollouts.assess(hour=20)
    assert story(rollouts)[-1] == (20, "halted", 2, "all")
    assert (registry.get("desk").number, rollouts.publisher.offered()) == (1, {"all": 1, "canary": 1})


def test_what_the_gate_refused_is_not_begun(rollouts, registry):
    rollouts.begin(registry.get("desk", 5), hour=0)
    assert story(rollouts) == [(0, "refused", 5, None)]
    assert rollouts.publisher.offered() == {"all": 1, "canary": 1}


def test_of_two_the_newer_widens_and_the_older_waits(rollouts, registry):
    rollouts.begin(registry.get("desk", 2), hour=0)
    rollouts.begin(registry.get("desk", 3), hour=1)
    for number in (2, 3):
        tell(rollouts, number, faults=0, good=9)
    rollouts.assess(hour=9)
    assert story(rollouts)[1:] == [(1, "overtaken", 2, "canary"), (1, "begun", 3, "canary"), (9, "widened", 3, "all")]
