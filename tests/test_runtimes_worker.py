"""Workers are real processes here: small Python programs that keep to the protocol, and some that do not."""

import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from slmops_course.runtimes.worker import RuntimesError, WorkerChatModel

ECHO = """
    import json, sys
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        text = request["messages"][-1]["content"]
        if text == "die":
            sys.exit("it was too much")
        if text == "refuse":
            print(json.dumps({"error": "no"}), flush=True)
            continue
        text = text[: request["max_new_tokens"]]
        rest = {"prompt_ids": [1, 2], "output_ids": [3, 4, 5], "first_s": 0.1, "latency_s": 0.2}
        print(json.dumps({"text": text, **rest}), flush=True)
"""


@pytest.fixture
def start(tmp_path):
    def start(program=ECHO, **options):
        path = Path(tmp_path / "program.py")
        path.write_text(textwrap.dedent(program), "utf-8")
        return WorkerChatModel([sys.executable, "-P", str(path)], name="the echo", **options)

    return start


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def test_replies_come_in_order_with_their_counts_and_times(start):
    with start() as model:
        replies = model.generate(ask("a", "नमस्ते\n😀", "long"), max_new_tokens=9)
        assert [reply.text for reply in replies] == ["a", "नमस्ते\n😀", "long"]
        assert vars(replies[0]) == {
            "text": "a", "prompt_tokens": 2, "output_tokens": 3, "time_to_first_token_s": 0.1, "latency_s": 0.2,
        }  # fmt: skip
        assert model.reply(ask("long")[0], max_new_tokens=2).text == "lo"
        assert model.generate([]) == []


def test_a_refusal_is_an_error_and_the_worker_goes_on(start):
    with start() as model:
        with pytest.raises(RuntimesError, match=r"the echo cannot answer this message \(no\)"):
            model.generate(ask("refuse"))
        assert model.generate(ask("b"))[0].text == "b"


def test_a_worker_that_ends_is_said_with_its_last_words(start):
    with start() as model:
        for _ in range(2):
            with pytest.raises(RuntimesError, match=r"the echo ended without an answer \(it was too much\)"):
                model.generate(ask("die"))


@pytest.mark.parametrize(
    ("program", "words"),
    [("", "exit code 0"), ("print('hello')", "hello"), ("import no_such_runtime", "No module named 'no_such_runtime'")],
)
def test_a_worker_that_does_not_start_is_said_with_why(start, program, words):
    with pytest.raises(RuntimesError, match=f"ended without an answer .*{words}"):
        start(program)


def test_a_program_that_is_not_there_is_said():
    with pytest.raises(RuntimesError, match=r"nothing could not be started .*expected no-such-program on this machine"):
        WorkerChatModel(["no-such-program"], name="nothing")


def test_closing_ends_the_process_even_twice_and_one_that_does_not_listen(start):
    before = set(psutil.Process().children())
    model = start("    import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + ECHO + "    signal.pause()")
    (worker,) = set(psutil.Process().children()) - before
    model.close()
    model.close()
    assert not worker.is_running()
    with pytest.raises(RuntimesError, match="it was closed"):
        model.generate(ask("a"))


def test_its_surroundings_are_its_own(start, tmp_path):
    program = """
        import json, os
        print(json.dumps({"ready": True}), flush=True)
        input()
        text = " ".join([os.environ["SLMOPS_TEST"], os.environ["HF_HUB_OFFLINE"], os.path.basename(os.getcwd())])
        print(json.dumps({"text": text, "prompt_ids": [], "output_ids": [], "first_s": 0, "latency_s": 0}), flush=True)
    """
    with start(program, env={"SLMOPS_TEST": "seen"}, folder=tmp_path) as model:
        assert model.generate(ask("a"))[0].text == f"seen 1 {tmp_path.name}"
