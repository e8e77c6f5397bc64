"""How fast a model answers, and what memory it takes: warm-up, one message at a time, in a process of its own.

    python -m slmops_course.benchmark SPEC.json

A model's memory is the growth of its process's resident memory over the same process with the libraries imported and
no model loaded. So the figure says what the model costs, not what Python and its libraries cost.
"""

import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from slmops_course.chat import MAX_NEW_TOKENS, ChatModel, Conversation, TorchChatModel
from slmops_course.errors import CourseError
from slmops_course.sampling import Sampler
from slmops_course.serving import FoundryChatModel, FoundryLocal, GenAIChatModel, OpenAIChatModel

WARM_UP = 2
# Which class answers for each kind of model folder; see `open_model`.
CHAT_MODELS = {
    "torch": TorchChatModel,
    "genai": GenAIChatModel,
    "foundry": FoundryChatModel,
    "foundry-service": OpenAIChatModel,
}


class BenchmarkError(CourseError):
    """A measurement that could not be made."""


@dataclass(frozen=True)
class Speed:
    """Medians over the messages, after warm-up."""

    messages: int
    time_to_first_token_s: float
    output_tokens_per_s: float  # after the first token
    latency_s: float  # for one message
    memory_bytes: int  # the model's own peak, see the module's docstring
    process_bytes: int  # the whole process's peak


def open_model(kind: str, folder: Path, **options) -> ChatModel:
    """Open a model folder as the ChatModel of a kind: "torch", "genai", "foundry" or "foundry-service"."""
    if kind not in CHAT_MODELS:
        raise BenchmarkError(f"There is no kind of model {kind!r}: expected one of {', '.join(CHAT_MODELS)}.")
    if kind.startswith("foundry"):
        return _Foundry(kind, folder, **options)
    return CHAT_MODELS[kind](folder, **options)


class _Foundry(ChatModel):
    """Foundry Local started, one model in it, and all of it stopped on close."""

    def __init__(self, kind: str, folder: Path, *, schema: Mapping | None = None, data_folder: str | None = None):
        self._scratch = tempfile.TemporaryDirectory()
        self._foundry = FoundryLocal(Path(data_folder or self._scratch.name)).__enter__()
        try:
            model = self._foundry.load(folder)
            if kind == "foundry":
                self._chat = FoundryChatModel(model, schema=schema)
            else:
                self._chat = OpenAIChatModel(self._foundry.start_service(), model.id, schema=schema)
        except BaseException:
            self.close()
            raise
        self.name = self._chat.name

    def generate(self, conversations, *, max_new_tokens=MAX_NEW_TOKENS):
        return self._chat.generate(conversations, max_new_tokens=max_new_tokens)

    def close(self):
        self._foundry.close()
        self._scratch.cleanup()


def measure_speed(
    kind: str, folder: Path, conversations: Sequence[Conversation], *, max_new_tokens: int = MAX_NEW_TOKENS, **options
) -> Speed:
    """Measure a model folder in a fresh process. Raises BenchmarkError, with its last words, when that fails."""
    spec = {"kind": kind, "folder": str(folder), "max_new_tokens": max_new_tokens, "options": options}
    spec["conversations"] = [list(conversation) for conversation in conversations]
    return Speed(**run_apart("slmops_course.benchmark", spec, what=f"Measuring {folder.name} as {kind}"))


def run_apart(module: str, spec: Mapping, *, what: str) -> dict:
    """Run `python -m MODULE SPEC.json` in a fresh process; returns the JSON object that it prints last.

    Raises BenchmarkError, with its last words, when `what` fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "spec.json"
        path.write_text(json.dumps(spec), "utf-8")
        quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", module, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet})
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BenchmarkError(f"{what} failed ({words}): expected a figure; run it again alone.")
    return json.loads(lines[-1])


def time_replies(model: ChatModel, conversations: Sequence[Conversation], *, max_new_tokens: int = MAX_NEW_TOKENS) -> dict:
    """Medians of time to first token (s), output tokens per second and latency (s), one message at a time."""
    for conversation in conversations[:WARM_UP]:
        model.reply(conversation, max_new_tokens=max_new_tokens)
    replies = [model.reply(conversation, max_new_tokens=max_new_tokens) for conversation in conversations]
    rates = [
        (r.output_tokens - 1) / (r.latency_s - r.time_to_first_token_s)
        for r in replies
        if r.output_tokens > 1 and r.latency_s > r.time_to_first_token_s
    ]
    return {
        "messages": len(replies),
        "time_to_first_token_s": statistics.median(r.time_to_first_token_s for r in replies),
        "output_tokens_per_s": statistics.median(rates) if rates else 0.0,
        "latency_s": statistics.median(r.latency_s for r in replies),
    }


@dataclass(frozen=True)
class Timed:
    """One answer's times."""

    time_to_first_token_s: float
    latency_s: float
    cpu_s: float  # processor time of this process, all threads together
    output_tokens: int


def time_each(model: ChatModel, conversations: Sequence[Conversation], *, max_new_tokens: int = MAX_NEW_TOKENS) -> list[Timed]:
    """Each answer's own times, one message at a time, after the warm-up."""
    for conversation in conversations[:WARM_UP]:
        model.reply(conversation, max_new_tokens=max_new_tokens)
    found = []
    for conversation in conversations:
        before = time.process_time()
        reply = model.reply(conversation, max_new_tokens=max_new_tokens)
        found.append(Timed(reply.time_to_first_token_s, reply.latency_s, time.process_time() - before, reply.output_tokens))
    return found


@dataclass(frozen=True)
class Percentile:
    """A percentile of some times with its 95 % interval; an end is None where there are too few times to know it."""

    level: float  # between 0 and 100
    value_s: float
    low_s: float | None
    high_s: float | None
    count: int

    def __str__(self):
        low, high = ("unknown" if end is None else f"{1e3 * end:.0f}" for end in (self.low_s, self.high_s))
        return f"p{self.level:g} of {self.count} messages: {1e3 * self.value_s:.0f} ms [{low}, {high}]"


def percentile(seconds: Sequence[float], level: float) -> Percentile:
    """A percentile of times that were measured one by one, with an interval that assumes nothing about how they spread.

    Example: percentile([0.1] * 8, 95) knows no upper end. That needs n times with (level / 100)^n <= 0.025: 72 for p95, 368
    for p99.
    Source: Conover, "Practical Nonparametric Statistics", 1999, by way of
    https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats.quantile_test.html
    Raises BenchmarkError without times, and for a level that is not between 0 and 100.
    """
    import numpy as np
    from scipy.stats import quantile_test

    if not len(seconds) or not 0 < level < 100:
        raise BenchmarkError(
            f"Percentile {level:g} of {len(seconds)} times was asked for: expected at least one time and a level between 0 and "
            "100; measure some messages first."
        )
    ends = quantile_test(np.asarray(seconds, float), p=level / 100).confidence_interval(0.95)
    low, high = (None if math.isnan(end) else float(end) for end in ends)
    return Percentile(level, float(np.percentile(seconds, level)), low, high, len(seconds))


def fetch_rate(size_bytes: int, *, threads: int, runs: int = 9) -> float:
    """Bytes a second at which this machine multiplies one fp32 matrix of about so many bytes with a vector: the fastest run.

    Writing a token does just that with each of a model's matrices, so the rate over a model's bytes limits its tokens a second.
    Source: Williams, Waterman, Patterson, "Roofline", 2009, https://doi.org/10.1145/1498765.1498785
    """
    import torch

    usual, seconds = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        matrix, vector = torch.ones(max(1, size_bytes // 4 // 2048), 2048), torch.ones(2048)
        for _ in range(runs):
            start = time.perf_counter()
            matrix @ vector
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(usual)
    return matrix.nbytes / min(seconds)


class MemoryWatch(Sampler):
    """Samples the resident memory of this process, and if asked that of all its children together.

    Example:
        with MemoryWatch() as watch: …
        watch.peak_bytes
    """

    def __init__(self, *, children: bool = False, interval_s: float = 0.02):
        import psutil

        super().__init__(interval_s=interval_s)
        self._process, self._children = psutil.Process(), children
        self.peak_bytes = self.peak_children_bytes = 0
        self.sample()

    def sample(self) -> None:
        """Raise the peaks to what is in use now."""
        import psutil

        self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)
        if self._children:
            total = 0
            for child in self._process.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_children_bytes = max(self.peak_children_bytes, total)


def give_back_memory() -> None:
    """Let the C library return freed memory to the system, where it can; without it a trained model's space stays taken.

    glibc keeps what was freed for the process's next needs: https://man7.org/linux/man-pages/man3/malloc_trim.3.html
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def main(spec_path: str) -> None:
    """Measure one model in this process and print a line of JSON."""
    spec = json.loads(Path(spec_path).read_text("utf-8"))
    _import_libraries(spec["kind"])
    watch = MemoryWatch()
    before = watch.peak_bytes
    with watch, open_model(spec["kind"], Path(spec["folder"]), **spec["options"]) as model:
        times = time_replies(model, spec["conversations"], max_new_tokens=spec["max_new_tokens"])
    print(json.dumps(asdict(Speed(**times, memory_bytes=watch.peak_bytes - before, process_bytes=watch.peak_bytes))))


def _import_libraries(kind: str) -> None:
    """Import what a kind needs, so that its memory is not counted as the model's."""
    if kind == "torch":
        import torch

        torch.ones(8, 8) @ torch.ones(8, 8)
    else:
        import numpy
        import onnxruntime_genai  # noqa: F401

        numpy.ones(1)
    if kind.startswith("foundry"):
        import foundry_local_sdk  # noqa: F401
        import openai  # noqa: F401


if __name__ == "__main__":
    main(*sys.argv[1:])
