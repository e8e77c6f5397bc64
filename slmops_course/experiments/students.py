"""Chapter 2's side experiments with students: they differ in one thing, see as many rows, and meet the same messages.

They are scored on the dev split: these experiments are for choosing, and the test split is not for that.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from slmops_course import evaluation, losses, students, training, tuning
from slmops_course.benchmark import give_back_memory
from slmops_course.chat import TorchChatModel, load_torch
from slmops_course.tasks import Example
from slmops_course.teachers import load_labelled

ORDERS = (0, 1, 2, 3)  # seeds
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
THIRDS = 3  # narrow students keep one or two thirds of the width, and are deeper to match: three times, or one and a half


class Bench:
    """What all students of a comparison share: the teacher and its labels, the kept tokens, the rows, the dev messages."""

    def __init__(self, course):
        self.task, self.profile, self.folder = course.task, course.profile, course.teacher().path
        self.teacher, self.tokenizer = load_torch(self.folder, dtype=training.fast_dtype())
        self.teacher.requires_grad_(False)
        self.depth = len(self.teacher.model.layers)
        texts = tuning.task_texts(self.tokenizer, self.task)
        self.tokens = students.kept_tokens(self.tokenizer, texts, self.profile.comparison_shape.tokens)
        self.trimmed = students.trim_tokenizer(self.tokenizer, self.tokens)
        self.labels = load_labelled(course.labels().path)
        self.examples = [*self.task.splits["train"], *self.labels.kept]
        self.layers = students.kept_layers(self.depth, self.profile.comparison_shape.layers)
        self.first: list[evaluation.Outcome] | None = None  # of the first student: the others are compared with it

    def cut(self, layers: Sequence[int] | None = None):
        """A student of the given layers, by default the course's own."""
        return students.cut_student(self.teacher, list(layers or self.layers), self.tokens)

    def soft(self, tokens: Sequence[int] | None, *, layers: Sequence[int] = ()):
        """The teacher's states for the rows of `examples`, its head for these tokens, None for all, and inner states."""
        rows = training.encode_rows(self.tokenizer, self.task, self.examples)
        return tuning.teacher_states(self.folder, rows, tokens, layers=layers)

    def distil(self, states, head, *, temperature: float | None = None, divergence=losses.forward_divergence) -> Callable:
        """The course's distillation loss, but for what is given."""
        return losses.distillation_loss(
            states, head, temperature=temperature or self.profile.logits.temperature,
            label_share=self.profile.logits.label_share, divergence=divergence,
        )  # fmt: skip

    def measure(
        self, name: str, student, *, loss: Callable = training.next_token_loss, examples: Sequence[Example] | None = None,
        tokenizer=None, seed: int = 0,
    ) -> dict:  # fmt: skip
        """Train a student on as many rows as any other here, and score it; returns a row of an experiment's record."""
        tokenizer, settings = tokenizer or self.trimmed, self.profile.comparison
        rows = training.encode_rows(tokenizer, self.task, self.examples if examples is None else examples)
        parameters = students.parameters_by_part(student)
        training.freeze_below(student, None)
        settings = replace(settings, epochs=settings.epochs * len(self.examples) / len(rows), seed=seed)
        start = time.perf_counter()
        training.train(student, rows, settings, loss=loss)
        seconds = round(time.perf_counter() - start, 1)
        row = self.score(name, training.to_fast_dtype(student), tokenizer)
        give_back_memory()
        print(f"{name}: {row['exact_match']['value']:.1%} in {seconds:.0f} s", flush=True)
        return row | {"rows": len(rows), "training_s": seconds, "parameters": parameters}

    def score(self, name: str, model, tokenizer) -> dict:
        """Exact match on dev with its interval, and its difference from the first one scored here, message by message."""
        dev = self.task.splits["dev"]
        outcomes = evaluation.ask_and_judge(TorchChatModel.from_loaded(model, tokenizer, name), self.task, dev)
        self.first = self.first or outcomes
        return {
            "name": name,
            "exact_match": asdict(evaluation.score_outcomes(self.task, outcomes)["exact_match"]),
            "difference": asdict(evaluation.paired_difference(self.first, outcomes)),
        }


def compare_losses(course) -> list[dict]:
    """Labels alone, the teacher's distribution in either direction, its inner layers, and mixes of these.

    Inner layers are matched in three of the student's, evenly spread, with the teacher's layers that they are copies of.
    """
    bench = Bench(course)
    places = students.kept_layers(len(bench.layers), min(4, len(bench.layers)))[:-1]
    states, head, inner = bench.soft(bench.tokens, layers=[bench.layers[place] for place in places])
    wanted = dict(zip(places, inner.values(), strict=True))
    forward = bench.distil(states, head)
    table = {
        "labels": training.next_token_loss,
        "labels + inner layers": losses.matching_loss(wanted, weight=1.0),
        "forward KL": forward,
        "reverse KL": bench.distil(states, head, divergence=losses.reverse_divergence),
        "forward KL + inner layers": losses.matching_loss(wanted, weight=1.0, loss=forward),
    }
    return [bench.measure(name, bench.cut(), loss=loss) for name, loss in table.items()]


def measure_luck(course) -> list[dict]:
    """One student several times, with nothing changed but the order of its rows."""
    bench = Bench(course)
    states, head, _ = bench.soft(bench.tokens)
    return [
        bench.measure(f"order {seed}", bench.cut(), loss=bench.distil(states, head), seed=seed) | {"seed": seed}
        for seed in ORDERS
    ]


def sweep_temperature(course) -> list[dict]:
    """The same student at several distillation temperatures."""
    bench = Bench(course)
    states, head, _ = bench.soft(bench.tokens)
    return [
        bench.measure(f"T = {value:g}", bench.cut(), loss=bench.distil(states, head, temperature=value))
        | {"temperature": value}
        for value in TEMPERATURES
    ]


def compare_shapes(course) -> list[dict]:
    """Students by depth, by which layers are kept, by width, and with the whole vocabulary; see `shapes_of`."""
    bench = Bench(course)
    states, head, _ = bench.soft(bench.tokens)
    loss = bench.distil(states, head)
    found = [
        bench.measure(name, bench.cut(layers), loss=loss) | {"kind": kind, "layers": len(layers)}
        for kind, name, layers in shapes_of(bench.depth, len(bench.layers))
    ]
    config = bench.teacher.config
    for kept in range(1, THIRDS):
        layers = students.kept_layers(bench.depth, min(bench.depth, len(bench.layers) * THIRDS // kept))
        inner, groups = config.intermediate_size * kept // THIRDS, max(1, config.num_key_value_heads * kept // THIRDS)
        student = students.cut_width(bench.cut(layers), inner=inner, groups=groups)
        name = f"{len(layers)} layers, {kept}/{THIRDS} as wide"
        found.append(bench.measure(name, student, loss=loss) | {"kind": "width", "layers": len(layers)})
    whole = students.cut_student(bench.teacher, bench.layers)
    loss = bench.distil(*bench.soft(None)[:2])
    name = f"{len(bench.layers)} layers, whole vocabulary"
    row = bench.measure(name, whole, loss=loss, tokenizer=bench.tokenizer)
    return [*found, row | {"kind": "vocabulary", "layers": len(bench.layers)}]


def shapes_of(depth: int, usual: int) -> list[tuple[str, str, list[int]]]:
    """The depths to compare, and at the usual one which layers: (kind, name, the teacher's layers).

    Example: depth=30, usual=10 -> 10 evenly; 5, 15 and 20 evenly; the bottom 10, the top 10, the bottom 5 with the top 5
    """
    counts = [count for count in (usual // 2, usual * 3 // 2, usual * 2) if 1 < count <= depth]
    half = usual // 2
    ends = [*range(half), *range(depth - (usual - half), depth)]
    return [
        ("depth", f"{usual} layers", students.kept_layers(depth, usual)),
        *(("depth", f"{count} layers", students.kept_layers(depth, count)) for count in counts),
        ("choice", f"the bottom {usual}", list(range(usual))),
        ("choice", f"the top {usual}", list(range(depth - usual, depth))),
        ("choice", f"the bottom {half} and the top {usual - half}", ends),
    ]
