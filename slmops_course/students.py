"""A smaller network cut out of a larger one."""

import copy
from pathlib import Path

from slmops_course.errors import CourseError


class StudentError(CourseError):
    """A student that cannot be cut out of this teacher."""


def kept_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """Which of the teacher's layers a student keeps: the first, the last, and the others spread evenly between.

    Example: teacher_layers=30, student_layers=8 -> [0, 4, 8, 12, 17, 21, 25, 29]
    Source: Sanh et al., "DistilBERT", 2019, https://arxiv.org/abs/1910.01108 (which keeps every second layer).
    """
    if not 1 < student_layers <= teacher_layers:
        raise StudentError(
            f"A student of {student_layers} layers was asked for: expected 2 to {teacher_layers}, the teacher's depth."
        )
    step = (teacher_layers - 1) / (student_layers - 1)
    return [round(number * step) for number in range(student_layers)]


def cut_student(teacher, layers: list[int]):
    """A new model with the teacher's embeddings, head, and the given layers of it, in that order, as copies."""
    import torch

    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    with torch.device("meta"):
        student = type(teacher)(config)
    weights = {}
    for name, value in teacher.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            if int(parts[2]) in layers:
                parts[2] = str(layers.index(int(parts[2])))
                weights[".".join(parts)] = value.clone()
        else:
            weights[name] = value.clone()
    student.load_state_dict(weights, assign=True)
    student.tie_weights()
    # Buffers that no checkpoint holds, such as the rotary frequencies, are still on the meta device.
    student.model.rotary_emb = copy.deepcopy(teacher.model.rotary_emb)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def parameters_by_part(model) -> dict[str, int]:
    """How many parameters are embeddings, in layers, and elsewhere. A head tied to the embeddings is counted with them.

    Example, SmolLM2-135M -> {"embeddings": 28311552, "layers": 106202880, "other": 576}
    """
    parts = {"embeddings": 0, "layers": 0, "other": 0}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        part = "layers" if "layers" in words else "embeddings" if {"embed_tokens", "lm_head"} & set(words) else "other"
        parts[part] += parameter.numel()
    return parts


def save_model(model, tokenizer, folder: Path) -> None:
    """Write a model in fp32 safetensors, with its tokenizer, as a Hugging Face folder."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
