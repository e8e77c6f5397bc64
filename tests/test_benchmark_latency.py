"""Single times, their percentiles with what is known of them, and the rate at which weights can be fetched."""

import pytest

from slmops_course import benchmark
from slmops_course.benchmark import BenchmarkError, fetch_rate, percentile, time_each
from slmops_course.chat import TorchChatModel


def test_a_percentile_of_known_times_lies_where_it_must():
    found = percentile([number / 100 for number in range(1, 101)], 50)
    assert found.value_s == pytest.approx(0.505)
    assert 0.35 < found.low_s < found.value_s < found.high_s < 0.65
    assert str(found).startswith("p50 of 100 messages: 505 ms [")


@pytest.mark.parametrize(("level", "needed"), [(95, 72), (99, 368)])
def test_an_upper_end_is_known_from_so_many_times_on(level, needed):
    assert percentile([0.1 + number / 1e4 for number in range(needed)], level).high_s is not None
    few = percentile([0.1 + number / 1e4 for number in range(needed - 1)], level)
    assert few.high_s is None
    assert str(few).endswith(", unknown]")


@pytest.mark.parametrize(("seconds", "level"), [([], 50), ([0.1], 0), ([0.1], 100), ([0.1], -3)])
def test_a_percentile_that_cannot_be_is_refused(seconds, level):
    with pytest.raises(BenchmarkError, match=rf"Percentile {level} of {len(seconds)} times"):
        percentile(seconds, level)


def test_each_answer_has_its_own_times(tiny_model_folder, tiny_task):
    asks = [tiny_task.messages(example.text) for example in tiny_task.splits["test"]]
    with TorchChatModel(tiny_model_folder) as chat:
        found = time_each(chat, asks, max_new_tokens=4)
    assert len(found) == len(asks)
    assert all(0 < one.time_to_first_token_s <= one.latency_s and one.cpu_s > 0 and one.output_tokens > 0 for one in found)


def test_a_fetch_rate_is_that_of_a_memory_and_leaves_the_threads_as_they_were():
    import torch

    before = torch.get_num_threads()
    rate = fetch_rate(8_000_000, threads=1)
    assert 1e8 < rate < 1e13
    assert torch.get_num_threads() == before
    assert fetch_rate(0, threads=1) > 0


def test_the_first_messages_warm_up_and_are_timed_again(tiny_model_folder, tiny_task):
    asked = []

    class Counted(TorchChatModel):
        def reply(self, conversation, **options):
            asked.append(conversation)
            return super().reply(conversation, **options)

    asks = [tiny_task.messages(example.text) for example in tiny_task.splits["test"]][:3]
    with Counted(tiny_model_folder) as chat:
        time_each(chat, asks, max_new_tokens=2)
    assert asked == [*asks[: benchmark.WARM_UP], *asks]
