import threading
import time

import pytest

from slmops_course.sampling import Sampler


class Counter(Sampler):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.looks = 0

    def sample(self):
        self.looks += 1


def test_it_looks_many_times_while_the_block_runs():
    with Counter(interval_s=0.005) as counter:
        deadline = time.monotonic() + 10
        while counter.looks < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert counter.looks >= 5


def test_it_looks_once_more_at_the_end_and_then_stops():
    with Counter(interval_s=60) as counter:
        pass
    assert counter.looks == 1
    assert not counter._thread.is_alive()


def test_an_error_in_the_block_ends_the_thread_and_is_passed_on():
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), Counter(interval_s=0.005):
        1 / 0  # noqa: B018
    assert threading.active_count() == before
