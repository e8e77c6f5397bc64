"""Training as a stage, from folder to folder: load a model, cut it where asked, train it, save it with its history."""

import json
from collections.abc import Sequence
from pathlib import Path

from slmops_course import adapters, benchmark, students, training
from slmops_course.chat import load_torch, prompt_ids
from slmops_course.tasks import Task


def train_model(folder: Path, *, source: Path, task: Task, examples, settings, freeze, shape, soft, lora) -> dict:
    """Load a model, cut it if asked, train it on the examples and save it with its history; returns measurements."""
    model, tokenizer = load_torch(source, dtype=training.fast_dtype())
    tokens = None
    if shape:
        tokens = students.kept_tokens(tokenizer, task_texts(tokenizer, task), shape.tokens)
        model = students.cut_student(model, students.kept_layers(len(model.model.layers), shape.layers), tokens)
    loss = training.next_token_loss
    if soft:
        teacher_folder, temperature, label_share = soft
        states, head = teacher_states(teacher_folder, training.encode_rows(tokenizer, task, examples), tokens)
        loss = training.distillation_loss(states, head, temperature=temperature, label_share=label_share)
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


def teacher_states(folder: Path, rows: Sequence[training.Row], tokens: Sequence[int] | None = None):
    """The teacher's final hidden states where each row's answer is predicted, and its head; see `distillation_loss`.

    With `tokens`, the head's rows for these tokens only: what a student with a trimmed vocabulary can learn.
    """
    import torch

    teacher, _ = load_torch(folder, dtype=training.fast_dtype())
    teacher.requires_grad_(False)
    states: list = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    with torch.inference_mode():
        for start in range(0, len(order), 32):
            indexes = order[start : start + 32]
            batch = training.make_batch(rows, indexes)
            sizes = [len(rows[i].ids) - rows[i].answer_start for i in indexes]
            for index, state in zip(indexes, training.answer_states(teacher, batch).split(sizes), strict=True):
                states[index] = state.clone()
    head = teacher.lm_head.weight.detach()
    return states, (head if tokens is None else head[list(tokens)]).clone()


# What decides the result of training, besides settings and data.
TRAINING_CODE = (
    train_model, task_texts, teacher_states, training.train, training.encode_rows, training.make_batch,
    training.batch_indexes, training.answer_states, training.first_trained_layer, training.answer_logits,
    training.project, training.next_token_loss, training.distillation_loss, training.accumulate_gradients,
    training.update_weights, training.copy_weights, training.round_weights, training.freeze_below, prompt_ids,
    students.cut_student, students.renumber, students.kept_layers, students.kept_tokens, students.trim_tokenizer,
    students.save_model, adapters.add_lora,
)  # fmt: skip
