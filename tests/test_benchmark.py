import json
import subprocess
import sys
import time

import numpy
import pytest

from slmops_course.benchmark import WARM_UP, BenchmarkError, MemoryWatch, Speed, measure_speed, open_model, time_replies
from slmops_course.chat import ChatModel, Reply


class ScriptedModel(ChatModel):
    """Replies with times and token counts that were written down before."""

    name = "scripted"

    def __init__(self, replies):
        self.replies, self.asked = list(replies), 0

    def generate(self, conversations, *, max_new_tokens=48):
        taken = [self.replies[self.asked + number] for number in range(len(conversations))]
        self.asked += len(conversations)
        return taken


def reply(first_s: float, latency_s: float, tokens: int = 11) -> Reply:
    return Reply("{}", 5, tokens, first_s, latency_s)


QUESTIONS = [[{"role": "user", "content": str(number)}] for number in range(3)]
SLOW = [reply(9.0, 99.0)] * WARM_UP


# --- Times ---


def test_medians_are_taken_after_the_warm_up():
    model = ScriptedModel([*SLOW, reply(0.1, 1.1), reply(0.2, 2.2), reply(0.3, 10.3)])
    times = time_replies(model, QUESTIONS)
    assert times == {
        "messages": 3,
        "time_to_first_token_s": 0.2,
        "output_tokens_per_s": pytest.approx(10 / 2.0),  # of 10, 5 and 1 tokens a second
        "latency_s": 2.2,
    }
    assert model.asked == WARM_UP + 3


def test_fewer_messages_than_the_warm_up_still_give_times():
    model = ScriptedModel([reply(9.0, 99.0), reply(0.5, 1.5)])
    assert time_replies(model, QUESTIONS[:1])["latency_s"] == 1.5


def test_replies_of_one_token_have_no_rate():
    model = ScriptedModel([*SLOW, *[reply(0.1, 0.1, tokens=1)] * 3])
    assert time_replies(model, QUESTIONS)["output_tokens_per_s"] == 0.0


def test_one_reply_of_one_token_does_not_spoil_the_rate():
    model = ScriptedModel([*SLOW, reply(0.1, 0.1, tokens=1), reply(0.1, 1.1), reply(0.1, 1.1)])
    assert time_replies(model, QUESTIONS)["output_tokens_per_s"] == pytest.approx(10.0)


# --- Memory ---


def test_the_memory_watch_sees_an_allocation_that_is_gone_again_at_the_end():
    with MemoryWatch(interval_s=0.005) as watch:
        before = watch.peak_bytes
        block = numpy.ones(200_000_000, dtype=numpy.uint8)
        time.sleep(0.1)
        del block
    assert 180_000_000 < watch.peak_bytes - before < 300_000_000


def test_the_memory_watch_sees_little_where_nothing_happens():
    with MemoryWatch(interval_s=0.005) as watch:
        before = watch.peak_bytes
        time.sleep(0.05)
    assert watch.peak_bytes - before < 50_000_000


def test_the_memory_watch_stops_after_an_error():
    with pytest.raises(ZeroDivisionError), MemoryWatch() as watch:
        raise ZeroDivisionError
    assert not watch._thread.is_alive()


# --- A whole measurement ---


def test_a_model_is_measured_in_a_process_of_its_own(tiny_onnx_folder, tiny_task):
    asked = [tiny_task.messages(example.text) for example in tiny_task.splits["dev"]]
    speed = measure_speed("genai", tiny_onnx_folder, asked, max_new_tokens=8)
    assert isinstance(speed, Speed)
    assert speed.messages == len(asked)
    assert 0 < speed.time_to_first_token_s <= speed.latency_s
    assert speed.output_tokens_per_s > 0
    assert 0 < speed.memory_bytes < speed.process_bytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["foundry", "foundry-service"])
def test_a_served_model_is_measured_with_its_constraint(kind, tiny_onnx_folder, tiny_task):
    asked = [tiny_task.messages(tiny_task.splits["dev"][0].text)]
    speed = measure_speed(kind, tiny_onnx_folder, asked, max_new_tokens=8, schema=dict(tiny_task.schema))
    assert speed.latency_s > 0
    assert speed.memory_bytes > 0


def test_a_measurement_that_fails_gives_one_sentence_with_its_last_words(tmp_path):
    with pytest.raises(BenchmarkError) as caught:
        measure_speed("genai", tmp_path / "nothing", QUESTIONS)
    sentence = str(caught.value)
    assert sentence.startswith("Measuring nothing as genai failed (slmops_course.serving.ServingError")
    assert "\n" not in sentence
    assert "expected" in sentence


def test_an_unknown_kind_of_model_is_refused_with_the_known_ones_named(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no kind of model 'gguf': expected one of torch, genai, foundry, .*service"):
        open_model("gguf", tmp_path)


def test_every_kind_opens_as_a_chat_model(tiny_onnx_folder, tiny_model_folder):
    for kind, folder in (("torch", tiny_model_folder), ("genai", tiny_onnx_folder)):
        with open_model(kind, folder) as model:
            assert isinstance(model, ChatModel)
            assert model.reply(QUESTIONS[0], max_new_tokens=2).output_tokens > 0


def test_foundry_is_closed_again_when_the_model_cannot_be_loaded(tmp_path, tiny_onnx_folder):
    # In a process of its own, since there is one Foundry Local a process.
    from test_serving import outside

    code = """
import sys
from pathlib import Path
from slmops_course.benchmark import open_model
from slmops_course.serving import ServingError

try:
    open_model("foundry", Path(sys.argv[1]))
except ServingError as error:
    print("refused")
with open_model("foundry", Path(sys.argv[2])) as model:
    print(model.reply([{"role": "user", "content": "hi"}], max_new_tokens=3).output_tokens > 0)
"""
    assert outside(code, tmp_path, tiny_onnx_folder).split() == ["refused", "True"]


def test_a_speed_survives_json():
    speed = Speed(3, 0.1, 20.0, 1.0, 5_000_000, 90_000_000)
    assert Speed(**json.loads(json.dumps(vars(speed)))) == speed


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be asked to give memory back")
def test_freed_memory_goes_back_to_the_system():
    code = (
        "import psutil\n"
        "from slmops_course.benchmark import give_back_memory\n"
        "size = lambda: psutil.Process().memory_info().rss\n"
        "keep, drop = [], []\n"
        "for _ in range(20_000): drop.append(bytearray(10_000)); keep.append(bytearray(1000))\n"
        "del drop\n"
        "before = size(); give_back_memory(); print(before - size())"
    )
    freed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(freed) > 50e6
