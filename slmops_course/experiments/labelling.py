"""Chapter 2's side experiment with labels: students that learn from a teacher's labels alone, filtered in several ways."""

from collections.abc import Mapping

from slmops_course import filters, teachers, textmetrics, training
from slmops_course.chat import TorchChatModel, load_torch
from slmops_course.experiments.students import Bench
from slmops_course.tasks import Example, Task
from slmops_course.teachers import Labelled

SURE = 0.7  # the least probability that a label must have


def compare_labels(course) -> list[dict]:
    """What filters, a second teacher, and right answers do to the labels and to a student that has no others.

    The second teacher is the course's LoRA model. Each row says how many labels are left ("labels"), which share of them
    is right by the key ("right"), and how the student does. A filter that changed nothing, or left nothing, trains no
    student of its own.
    """
    bench = Bench(course)
    key = teachers.load_key(course.task.folder / "unlabelled_key.jsonl")
    sets = label_sets(course, bench.labels, key)
    found, seen = [], {}
    for name, labels in sets.items():
        content = tuple((e.id, tuple(e.answer.items())) for e in labels.kept)
        if content and content not in seen:
            seen[content] = bench.measure(name, bench.cut(), examples=labels.kept)
        right = teachers.label_accuracy(labels, key).get("exact_match")
        found.append(seen.get(content, {}) | {"name": name, "labels": len(labels.kept), "right": right})
    return found


def label_sets(course, labelled: Labelled, key: Mapping) -> dict[str, Labelled]:
    """The same messages with the labels of one teacher, filtered; of another; of both; and the right ones, by a key."""
    task = course.task
    sure, samples = judge_labels(course.teacher().path, task, labelled.kept, sampled=True)
    with TorchChatModel(course.lora().path, dtype=training.fast_dtype()) as chat:
        second = teachers.label_messages(labelled.kept, chat, task)
    their_sure, _ = judge_labels(course.lora().path, task, second.kept, sampled=False)
    unsure, others = filters.drop_unsure(labelled, sure, least=SURE), [e.text for e in task.splits["dev"]]
    table = {
        "all labels": labelled,
        f"at least {SURE:.0%} sure": unsure,
        "samples agree": filters.drop_disagreed(labelled, samples, task),
        "no near copies": filters.drop_copies(labelled, others),
        "all three filters": filters.drop_copies(filters.drop_disagreed(unsure, samples, task), others),
        "the second teacher's labels": second,
        "both teachers agree": filters.drop_contested(labelled, second),
        "the surer teacher's label": take_surer(labelled, sure, second, their_sure),
    }
    right = tuple(Example(e.id, e.text, key[e.id]) for e in labelled.kept if e.id in key)
    return table | ({"the right labels": Labelled(right, ())} if right else {})


def judge_labels(folder, task: Task, examples, *, sampled: bool) -> tuple[dict[str, float], dict[str, list[str]]]:
    """By message id: the probability that a model gives to its own label, and, if asked, three answers drawn at random."""
    model, tokenizer = load_torch(folder, dtype=training.fast_dtype())
    sure = textmetrics.answer_probabilities(model, tokenizer, task, examples)
    if not sampled:
        return sure, {}
    asks = [task.messages(example.text) for example in examples]
    answers = teachers.sample_answers(model, tokenizer, asks, temperature=1.0)
    return sure, {example.id: replies for example, replies in zip(examples, answers, strict=True)}


def take_surer(first: Labelled, sure: Mapping, second: Labelled, their_sure: Mapping) -> Labelled:
    """For each message that `first` labelled, the label of the teacher that holds its own more probable."""
    theirs = {e.id: e for e in second.kept if their_sure[e.id] > sure.get(e.id, 0.0)}
    return Labelled(tuple(theirs.get(e.id, e) for e in first.kept), first.rejected)
