"""A smaller network cut out of a larger one."""

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops_course.errors import CourseError


class StudentError(CourseError):
    """A student that cannot be cut out of this teacher."""


@dataclass(frozen=True)
class StudentShape:
    """How much of its teacher a student keeps."""

    layers: int
    tokens: int  # of the vocabulary, or more if the task's texts need more; see `kept_tokens`
    kept: str = "even"  # which layers: "even" or "ends", see `kept_layers`


def kept_layers(teacher_layers: int, student_layers: int, kept: str = "even") -> list[int]:
    """Which of the teacher's layers a student keeps.

    "even" is the first, the last, and the others spread evenly between: 30, 8 -> [0, 4, 8, 12, 17, 21, 25, 29].
    Source: Sanh et al., "DistilBERT", 2019, https://arxiv.org/abs/1910.01108 (which keeps every second layer).

    "ends" is half of them from the bottom and half from the top: 30, 8 -> [0, 1, 2, 3, 26, 27, 28, 29].
    Source: Men et al., "ShortGPT", 2024, https://arxiv.org/abs/2403.03853 (of a large model's layers, those in the middle
    and behind it change what passes through them least); the experiment "shapes" measures it for this course's model.

    Raises StudentError for more layers than there are, fewer than two, and another word for `kept`.
    """
    if kept not in ("even", "ends"):
        raise StudentError(f"Which layers to keep is {kept!r}: expected 'even' or 'ends'; choose one.")
    if not 1 < student_layers <= teacher_layers:
        raise StudentError(
            f"A student of {student_layers} layers was asked for: expected 2 to {teacher_layers}, the teacher's depth."
        )
    if kept == "ends":
        top = student_layers // 2
        return [*range(student_layers - top), *range(teacher_layers - top, teacher_layers)]
    step = (teacher_layers - 1) / (student_layers - 1)
    return [round(number * step) for number in range(student_layers)]


def kept_tokens(tokenizer, texts: Iterable[str], size: int) -> list[int]:
    """The ids of the tokens a student keeps, sorted: all that the texts need, then the commonest, up to `size`.

    Example: SmolLM2 and the support desk, size=12_288 -> 12,288 of its 49,152 ids; more if the texts need more.
    Raises StudentError for a tokenizer that is not of the byte-pair kind.

    Kept as well, whatever the texts need: special tokens and single bytes, so that any text can still be written. A
    byte-pair tokenizer numbers its tokens in the order it found them, the commonest first. A token that is made by
    joining two others needs these too. So the texts are cut into the same tokens before and after.
    Source: Ushio, Zhou, Camacho-Collados, "Efficient Multilingual Language Model Compression through Vocabulary
    Trimming", 2023, https://arxiv.org/abs/2305.15020
    """
    model = _bpe(tokenizer)["model"]
    parts: dict[int, set[int]] = {}
    for pair in model["merges"]:
        left, right = pair if isinstance(pair, list) else pair.split(" ")
        parts.setdefault(model["vocab"][left + right], set()).update((model["vocab"][left], model["vocab"][right]))
    kept = {number for number in range(len(tokenizer)) if number not in parts}
    needed = {number for text in texts for number in tokenizer(text, add_special_tokens=False)["input_ids"]}
    while needed:
        kept |= needed
        needed = {part for number in needed for part in parts.get(number, ())} - kept
    for number in range(len(tokenizer)):
        if len(kept) >= size:
            break
        if parts.get(number, set()) <= kept:
            kept.add(number)
    return sorted(kept)


def trim_tokenizer(tokenizer, kept: Sequence[int]):
    """A copy of the tokenizer that knows only the kept tokens; the number of `kept[i]` becomes `i`.

    Raises StudentError for a tokenizer that is not of the byte-pair kind.
    """
    from tokenizers import Tokenizer

    number = {old: new for new, old in enumerate(kept)}
    state = _bpe(tokenizer)
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {token: number[old] for token, old in vocabulary.items() if old in number}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in state["model"]["merges"]]
    state["model"]["merges"] = [
        pair for pair in pairs if {vocabulary[pair[0]], vocabulary[pair[1]], vocabulary["".join(pair)]} <= number.keys()
    ]
    for part in (state["post_processor"] or {}).get("processors", [state["post_processor"] or {}]):
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [number[old] for old in token["ids"]]
    state["added_tokens"] = [{**token, "id": number[token["id"]]} for token in state["added_tokens"]]
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = Tokenizer.from_str(json.dumps(state))
    return trimmed


def _bpe(tokenizer) -> dict:
    """The state of a byte-pair tokenizer; StudentError for other kinds."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise StudentError(
            f"The tokenizer is of the type {state['model']['type']}: expected BPE, whose tokens can be "
            "trimmed; choose a model with a byte-pair tokenizer."
        )
    return state


def cut_student(teacher, layers: list[int], tokens: Sequence[int] | None = None):
    """A new model with copies of the given layers of the teacher, in that order, and of its embeddings and head.

    With `tokens`, only these rows of the embeddings and the head are kept: shape (tokens, hidden size); see `kept_tokens`.
    """
    import torch

    config, generation = copy.deepcopy(teacher.config), copy.deepcopy(teacher.generation_config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    if tokens is not None:
        config.vocab_size = len(tokens)
        number = {old: new for new, old in enumerate(tokens)}
        for settings in (config, generation):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                renumber(settings, name, number)
    with torch.device("meta"):
        student = type(teacher)(config)
    weights = {}
    for name, value in teacher.state_dict().items():
        words = name.split(".")
        if words[:2] == ["model", "layers"]:
            if int(words[2]) not in layers:
                continue
            words[2] = str(layers.index(int(words[2])))
        elif tokens is not None and {"embed_tokens", "lm_head"} & set(words):
            value = value[list(tokens)]
        weights[".".join(words)] = value.clone()
    student.load_state_dict(weights, assign=True)
    student.tie_weights()
    # Buffers that no checkpoint holds, such as the rotary frequencies, are still on the meta device.
    student.model.rotary_emb = copy.deepcopy(teacher.model.rotary_emb)
    student.generation_config = generation
    return student


def cut_width(teacher, *, inner: int, groups: int | None = None):
    """A new model as deep as the teacher, its layers narrower: `inner` feed-forward neurons and `groups` groups of heads each.

    A group is a key-value head with the query heads that share it. Kept are the neurons and groups whose weights are largest
    together: the product of the norms of what leads into a neuron and what leads out of it. The hidden size stays, so the
    embeddings and every layer still fit together.
    Source: Ma, Fang, Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023,
    https://arxiv.org/abs/2305.11627 (dependent weights are cut together); the score here is their simplest, by magnitude.
    Raises StudentError for sizes that the teacher does not have.
    """
    import torch

    config, old = copy.deepcopy(teacher.config), teacher.config
    groups = old.num_key_value_heads if groups is None else groups
    if not 0 < inner <= old.intermediate_size or not 0 < groups <= old.num_key_value_heads:
        raise StudentError(
            f"A student of {inner} inner neurons and {groups} groups of heads was asked for: expected 1 to "
            f"{old.intermediate_size} and 1 to {old.num_key_value_heads}, the teacher's own."
        )
    each = old.num_attention_heads // old.num_key_value_heads
    size = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    config.intermediate_size, config.head_dim = inner, size
    config.num_key_value_heads, config.num_attention_heads = groups, groups * each
    weights = dict(teacher.state_dict())
    for number, layer in enumerate(teacher.model.layers):
        name = f"model.layers.{number}."
        mlp, attention = layer.mlp, layer.self_attn
        strength = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
        kept = strength.topk(inner).indices.sort().values
        for part in ("gate_proj", "up_proj"):
            weights[f"{name}mlp.{part}.weight"] = getattr(mlp, part).weight[kept]
        weights[f"{name}mlp.down_proj.weight"] = mlp.down_proj.weight[:, kept]
        values = attention.v_proj.weight.view(-1, size, old.hidden_size).norm(dim=(1, 2))
        outputs = attention.o_proj.weight.view(old.hidden_size, -1, each * size).norm(dim=(0, 2))
        chosen = (values * outputs).topk(groups).indices.sort().values
        queries = torch.cat([torch.arange(g * each * size, (g + 1) * each * size) for g in chosen.tolist()])
        keys = torch.cat([torch.arange(g * size, (g + 1) * size) for g in chosen.tolist()])
        weights[f"{name}self_attn.q_proj.weight"] = attention.q_proj.weight[queries]
        weights[f"{name}self_attn.k_proj.weight"] = attention.k_proj.weight[keys]
        weights[f"{name}self_attn.v_proj.weight"] = attention.v_proj.weight[keys]
        weights[f"{name}self_attn.o_proj.weight"] = attention.o_proj.weight[:, queries]
    with torch.device("meta"):
        student = type(teacher)(config)
    student.load_state_dict({key: value.detach().clone() for key, value in weights.items()}, assign=True)
    student.tie_weights()
    student.model.rotary_emb = copy.deepcopy(teacher.model.rotary_emb)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def renumber(settings, name: str, number: dict[int, int]) -> None:
    """Replace the token ids under a name in a model's configuration by their new numbers."""
    value = getattr(settings, name, None)
    if isinstance(value, list):
        setattr(settings, name, [number[one] for one in value])
    elif value is not None:
        setattr(settings, name, number[value])


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
