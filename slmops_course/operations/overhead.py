"""What the gateway costs: the same questions to the service and through the gateway, in turns.

    with ServedApart(folder, task) as served:
        overhead = measure_overhead(served, conversations, requests=200)
    print(overhead)

`course_overhead(course)` does so with the course's served model, once.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from slmops_course.chat import MAX_NEW_TOKENS, Conversation, Reply
from slmops_course.evaluation import Score, bootstrap
from slmops_course.operations.gateway import Gateway, GatewayError
from slmops_course.operations.served import Served, ServedApart
from slmops_course.operations.streams import Reply as StreamedReply
from slmops_course.operations.upstream import Upstream
from slmops_course.serving import OpenAIChatModel
from slmops_course.tasks import task_inputs

WARM_UP = 3


@dataclass(frozen=True)
class Compared:
    """One figure, by the median of the requests of each way, and what the gateway adds by the median of the pairs' shares."""

    direct: float
    through: float
    added: Score  # share of the direct figure: 0.05 is 5 % more; below 0 is less

    def __str__(self):
        interval = f"[{self.added.low:+.1%}, {self.added.high:+.1%}]"
        return f"{self.direct:.4g} direct, {self.through:.4g} through, {self.added.value:+.1%} {interval}"


@dataclass(frozen=True)
class Overhead:
    """The gateway's cost over `requests` streamed requests each way, with 95 % intervals."""

    requests: int
    time_to_first_token_s: Compared
    latency_s: Compared  # of the whole reply
    output_tokens_per_s: Compared  # of the whole reply: tokens / latency_s

    def __str__(self):
        names = ("time_to_first_token_s", "latency_s", "output_tokens_per_s")
        return "\n".join([f"{self.requests} requests each way", *(f"{name}: {getattr(self, name)}" for name in names)])


def course_overhead(course, *, requests: int = 200) -> Overhead:
    """The gateway's cost with the course's served model on the dev messages, kept as an artifact: it is measured once.

    Raises as measure_overhead does.
    """
    model = course.onnx(course.served_recipe)

    def write(folder: Path) -> None:
        conversations = [course.task.messages(example.text) for example in course.task.splits["dev"]]
        with ServedApart(model.path, course.task) as served:
            overhead = measure_overhead(served, conversations, requests=requests)
        (folder / "overhead.json").write_text(json.dumps(asdict(overhead)), "utf-8")

    artifact = course.store.build(
        "overhead", settings={"requests": requests}, inputs={"model": model, **task_inputs(course.task)}, write=write,
        code=(measure_overhead, compare_replies, Gateway, StreamedReply, Upstream, OpenAIChatModel),
    )  # fmt: skip
    return _read_overhead(artifact.json("overhead.json"))


def _read_overhead(kept: Mapping) -> Overhead:
    compared = {
        name: Compared(**figure | {"added": Score(**figure["added"])}) for name, figure in kept.items() if name != "requests"
    }
    return Overhead(kept["requests"], **compared)


def measure_overhead(
    served: Served | ServedApart, conversations: Sequence[Conversation], *, requests: int = 200,
    max_new_tokens: int = MAX_NEW_TOKENS, seed: int = 0,
) -> Overhead:  # fmt: skip
    """Ask each conversation of both in turns, the first of a pair now the one and now the other.

    Tokens per second are over the whole reply: the service's own stream brings its tokens in bursts, so the rate after the
    first token says little. Raises ServingError where one of the two does not answer, and GatewayError without requests.
    """
    if requests < 1 or not conversations:
        raise GatewayError(f"{requests} requests over {len(conversations)} conversations: expected at least one of each.")
    with OpenAIChatModel(served.direct, served.model) as direct, OpenAIChatModel(served.gateway, served.model) as through:
        pairs = []
        for number in range(WARM_UP + requests):
            conversation = conversations[number % len(conversations)]
            order = (direct, through) if number % 2 else (through, direct)
            replies = {id(chat): chat.reply(conversation, max_new_tokens=max_new_tokens) for chat in order}
            pairs.append((replies[id(direct)], replies[id(through)]))
    return compare_replies(pairs[WARM_UP:], seed=seed)


def compare_replies(pairs: Sequence[tuple[Reply, Reply]], *, seed: int = 0) -> Overhead:
    """Medians over pairs of replies, `(direct, through)`, and the median of what the second adds to the first."""

    def compared(figure: Callable[[Reply], float]) -> Compared:
        values = [(figure(one), figure(other)) for one, other in pairs]
        shares = [other / one - 1 for one, other in values]
        added = bootstrap(lambda rows: statistics.median(shares[i] for i in rows), len(shares), seed=seed)
        return Compared(*(statistics.median(column) for column in zip(*values, strict=True)), added)

    return Overhead(
        len(pairs), compared(lambda reply: reply.time_to_first_token_s), compared(lambda reply: reply.latency_s),
        compared(lambda reply: reply.output_tokens / reply.latency_s),
    )  # fmt: skip
