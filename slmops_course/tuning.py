"""Training as a stage, from folder to folder: load a model, cut it where asked, train it, save it with its history."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops_course import adapters, benchmark, losses, students, training
from slmops_course.chat import load_torch, prompt_ids
from slmops_course.tasks import Task


@dataclass(frozen=True)
class Teaching:
    """What a student learns from its teacher beside labels, and in which proportions."""

    temperature: float  # of the distributions that are compared
    label_share: float  # the share of plain cross-entropy; with 1 the teacher's distribution plays no part
    matched_layers: int = 0  # so many of the student's layers are drawn to the teacher's, of which they are copies
    matching_weight: float = 1.0  # how much that counts


def train_model(
    folder: Path, *, source: Path, task: Task, examples, settings, freeze, shape, teacher: Path | None,
    teaching: Teaching | None, lora,
) -> dict:  # fmt: skip
    """Load a model, cut it if asked, train it on the examples and save it with its history; returns measurements."""
    model, tokenizer = load_torch(source, dtype=training.fast_dtype())
    tokens, layers = None, list(range(len(model.model.layers)))
    if shape:
        tokens = students.kept_tokens(tokenizer, task_texts(tokenizer, task), shape.tokens)
        layers = students.kept_layers(len(layers), shape.layers, shape.kept)
        model = students.cut_student(model, layers, tokens)
    loss = training.next_token_loss
    if teaching:
        loss = teaching_loss(teaching, teacher, training.encode_rows(tokenizer, task, examples), layers, tokens)
    if shape:
        tokenizer = students.trim_tokenizer(tokenizer, tokens)
    rows = training.encode_rows(tokenizer, task, examples)
    tuned = adapters.add_lora(model, lora) if lora else None
    if tuned is None:
        freeze(model, settings.trained_layers)
    learns, total = adapters.trainable_parameters(model)
    with benchmark.MemoryWatch() as watch:
        history = training.train(model, rows, settings, loss=loss)
    (folder / "history.json").write_text(json.dumps(history), "utf-8")
    if tuned is not None:
        tuned.save_pretrained(folder / "adapter")
        model = tuned.merge_and_unload()
    students.save_model(model, tokenizer, folder)
    return {
        "trained_parameters": learns,
        "parameters": total,
        "tokens": sum(step["tokens"] for step in history),
        "peak_process_bytes": watch.peak_bytes,
    }


def teaching_loss(how: Teaching, teacher: Path, rows, layers: Sequence[int], tokens: Sequence[int] | None) -> Callable:
    """The loss of a student that is cut out of these layers of its teacher; rows are the teacher's, see `teacher_states`.

    Matched are layers spread evenly from the student's first one on, without its last: that one is judged by what it says.
    Raises TrainingError when more layers are to be matched than there are.
    """
    if not 0 <= how.matched_layers < len(layers):
        raise training.TrainingError(
            f"matched_layers is {how.matched_layers}: expected 0 to {len(layers) - 1}, fewer than the student's layers."
        )
    places = students.kept_layers(len(layers), how.matched_layers + 1)[:-1] if how.matched_layers else []
    states, head, inner = teacher_states(teacher, rows, tokens, layers=[layers[place] for place in places])
    loss = training.next_token_loss
    if how.label_share < 1:
        loss = losses.distillation_loss(states, head, temperature=how.temperature, label_share=how.label_share)
    if not places:
        return loss
    wanted = dict(zip(places, inner.values(), strict=True))
    return losses.matching_loss(wanted, weight=how.matching_weight, loss=loss)


def task_texts(tokenizer, task: Task) -> list[str]:
    """Every message to learn from as the model reads it, every labelled answer, and every value an answer may have."""
    examples = [*task.splits["train"], *task.splits["unlabelled"]]
    prompts = [
        tokenizer.apply_chat_template(list(task.messages(example.text)), tokenize=False, add_generation_prompt=True)
        for example in examples
    ]
    most = max(len(values) for values in task.fields.values())
    answers = [{name: values[i % len(values)] for name, values in task.fields.items()} for i in range(most)]
    return [*prompts, *(task.target(answer) for answer in [*answers, *(e.answer for e in examples if e.answer)])]


def teacher_states(
    folder: Path, rows: Sequence[training.Row], tokens: Sequence[int] | None = None, *, layers: Sequence[int] = ()
) -> tuple[list, "torch.Tensor", dict[int, list]]:  # noqa: F821
    """What the teacher computes where each row's answer is predicted: its final hidden states, its head, and inner states.

    States are one tensor a row, shape (answer tokens, hidden size); inner ones by layer, for `losses.matching_loss`. With
    `tokens`, the head's rows for these tokens only: what a student with a trimmed vocabulary can learn.
    """
    import torch

    teacher, _ = load_torch(folder, dtype=training.fast_dtype())
    teacher.requires_grad_(False)
    found: dict = {layer: [None] * len(rows) for layer in (*layers, "final")}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    with torch.inference_mode():
        for start in range(0, len(order), 32):
            indexes = order[start : start + 32]
            batch = training.make_batch(rows, indexes)
            sizes = [len(rows[i].ids) - rows[i].answer_start for i in indexes]
            with losses.inner_states(teacher, batch, layers) as states:
                states["final"] = training.answer_states(teacher, batch)
            for layer, parts in found.items():
                for index, part in zip(indexes, states[layer].split(sizes), strict=True):
                    parts[index] = part.clone()
    head = teacher.lm_head.weight.detach()
    return found.pop("final"), (head if tokens is None else head[list(tokens)]).clone(), found


def deciding_code(*, shape, teaching, lora) -> tuple:
    """What decides the result of `train_model`, besides settings and data: the functions that are called in it."""
    code = [
        train_model, prompt_ids, students.save_model, training.train, training.encode_rows, training.make_batch,
        training.batch_indexes, training.answer_states, training.first_trained_layer, training.answer_logits,
        training.project, training.next_token_loss, training.accumulate_gradients, training.update_weights,
        training.copy_weights, training.round_weights,
    ]  # fmt: skip
    if shape:
        code += [
            task_texts, students.cut_student, students.renumber, students.kept_layers, students.kept_tokens,
            students.trim_tokenizer,
        ]  # fmt: skip
    if teaching:
        code += [teaching_loss, teacher_states, losses.distillation_loss, losses.forward_divergence]
    if teaching and teaching.matched_layers:
        code += [losses.matching_loss, losses.inner_states]
    return (*code, adapters.add_lora if lora else training.freeze_below)
