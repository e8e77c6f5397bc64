"""A served model is counted: rightly, cheaply, without a word of what was asked, and without getting in its way."""

import functools
import itertools
import logging
import math
import threading
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from slmops_course.chat import ChatModel, RecordedChatModel, Reply, TorchChatModel, load_torch
from slmops_course.evaluation import INVALID
from slmops_course.operations.monitoring import (
    BUCKETS_S,
    Metrics,
    MonitoredChatModel,
    MonitoringError,
    answer_confidence,
    serve_metrics,
)
from slmops_course.serving import GenAIChatModel
from slmops_course.tasks import Example
from slmops_course.textmetrics import answer_probabilities

LOST = '{"intent":"card_lost","urgency":"high"}'
WORD = "xylophone-quartz"  # a word that no metric would hold by chance


class Script(ChatModel):
    """Answers with the replies that it is given, in turn, and raises those that are errors."""

    name = "script"

    def __init__(self, *replies):
        self.replies, self.closed = list(replies), False

    def generate(self, conversations, *, max_new_tokens=48):
        replies = [self.replies.pop(0) for _ in conversations]
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def close(self):
        self.closed = True


class Slow(ChatModel):
    """Answers when it is let."""

    name = "slow"

    def __init__(self):
        self.may_answer, self.asked = threading.Event(), 0

    def generate(self, conversations, *, max_new_tokens=48):
        self.asked += 1
        assert self.may_answer.wait(20)
        return [reply(LOST) for _ in conversations]


def reply(text, prompt_tokens=40, output_tokens=17, first_s=0.03, latency_s=0.07):
    return Reply(text, prompt_tokens, output_tokens, first_s, latency_s)


@pytest.fixture
def metrics(tiny_task):
    return Metrics(tiny_task, model="support-desk", version="3")


@pytest.fixture
def ask(tiny_task):
    return lambda *texts: [tiny_task.messages(text) for text in texts]


def samples(metrics: Metrics) -> dict:
    """All samples of a model's metrics, but for those of the process and the times at which they began."""
    families = text_string_to_metric_families(metrics.text())
    found = {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}
    return {key: value for key, value in found.items() if key[0].startswith("slmops") and not key[0].endswith("_created")}


def eventually(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


# --- Counting ---


def test_replies_pass_unchanged_and_are_counted(tiny_task, metrics, ask):
    replies = [reply(LOST), reply('{"intent":"card_lost","urgency":"low"}', 60, 20, 0.2, 4.0), reply("no JSON")]
    served = MonitoredChatModel(Script(*replies), tiny_task, metrics)
    assert [*served.generate(ask("a", "b")), served.reply(*ask("c"))] == replies
    assert served.name == "script"
    expected = {
        "slmops_requests_total": 3, "slmops_errors_total": 0, "slmops_invalid_replies_total": 1,
        "slmops_prompt_tokens_total": 140, "slmops_output_tokens_total": 54,
        "slmops_requests_in_progress": 0, "slmops_requests_waiting": 0,
        "slmops_time_to_first_token_seconds_count": 3, "slmops_request_duration_seconds_count": 3,
        "slmops_confidence_ratio_count": 0, "slmops_unwatched_replies_total": 0,
    }  # fmt: skip
    assert {name: metrics.value(name) for name in expected} == expected
    assert metrics.value("slmops_predictions_total", label="card_lost") == 2
    assert metrics.value("slmops_predictions_total", label=INVALID) == 1
    assert metrics.value("slmops_model_info", model="support-desk", version="3") == 1
    assert metrics.value("slmops_request_duration_seconds_bucket", le="0.1") == 2
    assert metrics.value("slmops_request_duration_seconds_bucket", le="3.0") == 2
    assert metrics.value("slmops_request_duration_seconds_bucket", le="5.0") == 3
    assert metrics.value("slmops_time_to_first_token_seconds_sum") == pytest.approx(0.26, abs=0.02)


def test_no_messages_change_nothing(tiny_task, metrics):
    before = samples(metrics)
    assert MonitoredChatModel(Script(), tiny_task, metrics).generate([]) == []
    assert samples(metrics) == before


def test_every_label_is_there_from_the_start_at_zero(tiny_task, metrics):
    counts = [(dict(key[1:]), value) for key, value in samples(metrics).items() if key[0] == "slmops_predictions_total"]
    found = {labels["label"]: value for labels, value in counts}
    assert found == dict.fromkeys([*tiny_task.fields["intent"], INVALID], 0)


def test_a_failure_of_the_model_is_raised_and_counted(tiny_task, metrics, ask):
    served = MonitoredChatModel(Script(ValueError("no memory"), reply(LOST)), tiny_task, metrics)
    with pytest.raises(ValueError, match="no memory"):
        served.reply(*ask("a"))
    served.reply(*ask("b"))
    names = ("slmops_requests_total", "slmops_errors_total", "slmops_requests_in_progress", "slmops_requests_waiting")
    assert [metrics.value(name) for name in names] == [2, 1, 0, 0]
    assert metrics.value("slmops_request_duration_seconds_count") == 1


def test_a_live_model_is_counted_by_its_own_replies(tiny_task, tiny_model_folder, metrics, ask):
    with MonitoredChatModel(TorchChatModel(tiny_model_folder), tiny_task, metrics) as served:
        replies = served.generate(ask("where is my card", "tell me a joke"), max_new_tokens=5)
    assert metrics.value("slmops_output_tokens_total") == sum(r.output_tokens for r in replies) > 0
    assert metrics.value("slmops_prompt_tokens_total") == sum(r.prompt_tokens for r in replies) > 0
    first = metrics.value("slmops_time_to_first_token_seconds_sum")
    assert sum(r.time_to_first_token_s for r in replies) <= first <= metrics.value("slmops_request_duration_seconds_sum")
    assert metrics.value("slmops_invalid_replies_total") == 2, "an untrained model answers nonsense"


def test_no_word_of_a_message_or_a_reply_is_in_the_metrics(tiny_task, metrics, ask, caplog):
    texts = [WORD, f'{{"intent":"{WORD}","urgency":"low"}}', f'{{"{WORD}":1}}']
    script = Script(*(reply(text) for text in texts), ValueError(WORD))
    served = MonitoredChatModel(script, tiny_task, metrics, watch=lambda *_: 1 / 0)
    with caplog.at_level(logging.DEBUG):
        for _ in texts:
            served.reply(*ask(f"my password is {WORD}"))
        with pytest.raises(ValueError, match=WORD):
            served.reply(*ask(WORD))
    assert WORD not in metrics.text()
    assert WORD not in caplog.text


def test_no_reply_makes_a_series_of_its_own(tiny_task, metrics, ask):
    before = samples(metrics).keys()
    replies = [reply(f'{{"intent":"made up {n}","urgency":"low"}}') for n in range(50)]
    MonitoredChatModel(Script(*replies), tiny_task, metrics).generate(ask(*map(str, range(50))))
    assert samples(metrics).keys() == before
    assert metrics.value("slmops_predictions_total", label=INVALID) == 50


def test_two_models_in_one_process_do_not_mix(tiny_task, metrics, ask):
    other = Metrics(tiny_task)
    MonitoredChatModel(Script(reply(LOST)), tiny_task, metrics).generate(ask("a"))
    assert (metrics.value("slmops_requests_total"), other.value("slmops_requests_total")) == (1, 0)
    assert not any(family.name.startswith("slmops") for family in REGISTRY.collect())


def test_the_buckets_tell_the_courses_times_apart():
    assert (BUCKETS_S[0], BUCKETS_S[-1]) == (0.01, 5.0)
    steps = [after / before for before, after in itertools.pairwise(BUCKETS_S)]
    assert max(steps) <= 2


def test_counting_takes_next_to_nothing(tiny_task, metrics, ask):
    """About 12 microseconds on a quiet machine, of which 9 go into reading the JSON; a millisecond would still be under 2 %."""
    conversations, replies = ask("a") * 200, [reply(LOST)] * 200
    best = math.inf
    for _ in range(5):
        served = MonitoredChatModel(Script(*replies), tiny_task, metrics)
        start = time.perf_counter()
        for conversation in conversations:
            served.reply(conversation)
        best = min(best, (time.perf_counter() - start) / len(conversations))
    assert best < 1e-3


def test_closing_it_closes_the_model(tiny_task, metrics):
    script = Script()
    with MonitoredChatModel(script, tiny_task, metrics):
        assert not script.closed
    assert script.closed


# --- The queue ---


def test_calls_wait_for_their_turn_and_the_wait_counts(tiny_task, metrics, ask):
    slow = Slow()
    served = MonitoredChatModel(slow, tiny_task, metrics, at_once=1)
    threads = [threading.Thread(target=served.generate, args=(ask("a"),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: metrics.value("slmops_requests_waiting") == 2)
    assert (metrics.value("slmops_requests_in_progress"), slow.asked) == (3, 1)
    time.sleep(0.15)
    slow.may_answer.set()
    for thread in threads:
        thread.join()
    assert [metrics.value(f"slmops_requests_{name}") for name in ("waiting", "in_progress", "total")] == [0, 0, 3]
    assert metrics.value("slmops_request_duration_seconds_bucket", le="0.1") == 1, "two of three waited 0.15 s or more"


def test_without_a_limit_nobody_waits(tiny_task, metrics, ask):
    slow = Slow()
    served = MonitoredChatModel(slow, tiny_task, metrics)
    threads = [threading.Thread(target=served.generate, args=(ask("a"),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: slow.asked == 3)
    assert (metrics.value("slmops_requests_waiting"), metrics.value("slmops_requests_in_progress")) == (0, 3)
    slow.may_answer.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("options", [{"at_once": 0}, {"confidence_every": 0}])
def test_limits_below_one_are_refused(tiny_task, metrics, options):
    with pytest.raises(MonitoringError, match="expected whole numbers from 1"):
        MonitoredChatModel(Script(), tiny_task, metrics, **options)


# --- Watching and confidence ---


def test_a_watcher_is_told_of_every_reply(tiny_task, metrics, ask):
    told = []
    script, sure = Script(reply(LOST), reply("?")), [0.97, 0.2]
    served = MonitoredChatModel(
        script, tiny_task, metrics, confidence=lambda c, r: sure, watch=lambda *what: told.append(what)
    )
    served.generate(ask("gone", "eh"))
    assert told == [("gone", "card_lost", 0.97), ("eh", INVALID, 0.2)]
    assert metrics.value("slmops_confidence_ratio_count") == 2
    assert metrics.value("slmops_confidence_ratio_bucket", le="0.5") == 1


def test_confidence_is_asked_for_every_nth_reply(tiny_task, metrics, ask):
    asked, told = [], []

    def sure(conversations, replies):
        asked.append([conversation[-1]["content"] for conversation in conversations])
        return [0.5] * len(replies)

    options = {"confidence": sure, "confidence_every": 3, "watch": lambda *what: told.append(what[2])}
    served = MonitoredChatModel(Script(*[reply(LOST)] * 7), tiny_task, metrics, **options)
    served.generate(ask("0", "1"))
    served.generate(ask("2", "3", "4", "5", "6"))
    assert asked == [["0"], ["3", "6"]]
    assert told == [0.5, None, None, 0.5, None, None, 0.5]


@pytest.mark.parametrize(
    "broken",
    [{"watch": lambda *_: 1 / 0}, {"confidence": lambda c, r: 1 / 0}, {"confidence": lambda c, r: []}],
    ids=["watch", "confidence", "too-few"],
)
def test_where_monitoring_fails_the_reply_is_given_all_the_same(tiny_task, metrics, ask, caplog, broken):
    served = MonitoredChatModel(Script(reply(LOST)), tiny_task, metrics, **broken)
    assert served.reply(*ask("a")).text == LOST
    assert metrics.value("slmops_unwatched_replies_total") == 1
    assert "the reply was given" in caplog.text


def test_a_models_confidence_is_the_probability_of_its_whole_answer(tiny_task, tiny_model_folder, ask):
    model, tokenizer = load_torch(tiny_model_folder)
    answer = {"intent": "card_lost", "urgency": "high"}
    with TorchChatModel.from_loaded(model, tokenizer, "tiny") as chat:
        found = answer_confidence(chat, ask("gone", "gone"), [reply(LOST), reply("another answer")])
        assert answer_confidence(chat, [], []) == []
    right = answer_probabilities(model, tokenizer, tiny_task, [Example("a", "gone", answer)])["a"]
    assert found[0] == pytest.approx(right, rel=1e-4, abs=0)
    assert found[1] != found[0]


@pytest.mark.slow
def test_an_onnx_models_confidence_is_the_product_of_its_steps(tiny_onnx_folder, ask):
    import numpy as np
    from scipy.special import softmax

    with GenAIChatModel(tiny_onnx_folder) as chat:
        conversation = ask("gone")[0]
        given = chat._tokenizer.decode(chat._tokenizer.encode(LOST))
        steps = [*chat._tokenizer.encode(LOST).tolist(), chat._end]
        params = chat._genai.GeneratorParams(chat._model)
        params.set_search_options(max_length=200)
        generator = chat._genai.Generator(chat._model, params)
        generator.append_tokens(np.array([chat.prompt_ids(conversation)], dtype=np.int32))
        product = 1.0
        for token in steps:  # one token after the other, as a model writes
            product *= float(softmax(generator.get_output("logits")[0, -1].astype(np.float64))[token])
            generator.append_tokens(np.array([[token]], dtype=np.int32))
        assert given == LOST
        (found,) = answer_confidence(chat, [conversation], [reply(LOST)])
        assert math.log(found) == pytest.approx(math.log(product), rel=0.015)  # rounding differs with the batch


def test_a_model_that_hides_its_probabilities_is_named(tiny_task, metrics, ask):
    model = RecordedChatModel({"a": LOST})
    with pytest.raises(MonitoringError, match="recorded does not show its probabilities"):
        answer_confidence(model, ask("a"), [reply(LOST)])
    served = MonitoredChatModel(model, tiny_task, metrics, confidence=functools.partial(answer_confidence, model))
    assert served.reply(*ask("a")).text == LOST
    assert metrics.value("slmops_unwatched_replies_total") == 1


# --- Serving ---


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode("utf-8")


def test_metrics_are_served_on_loopback_until_they_are_closed(tiny_task, metrics, ask):
    with serve_metrics(metrics) as server:
        assert server.url.startswith("http://127.0.0.1:")
        MonitoredChatModel(Script(reply(LOST)), tiny_task, metrics).generate(ask("a"))
        assert "\nslmops_requests_total 1.0\n" in read(server.url)
        threads = threading.active_count()
    assert threading.active_count() < threads
    with pytest.raises(urllib.error.URLError, match="refused"):
        read(server.url)
    server.close()


def test_a_port_that_is_taken_is_named(metrics):
    with serve_metrics(metrics) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        with pytest.raises(MonitoringError, match=f"Port {port} is in use or not allowed .* choose another, or 0 for any"):
            serve_metrics(metrics, port=port)
    with serve_metrics(metrics, port=port) as again:
        assert again.url == server.url
    with pytest.raises(MonitoringError, match="Port 70000 is in use or not allowed"):
        serve_metrics(metrics, port=70000)
