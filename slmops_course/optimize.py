"""Olive recipes from a tuned model to ONNX: fp32, fp16, int8, int4 by three methods, and mixtures.

A recipe is a list of Olive's passes; ONNX Runtime GenAI and Foundry Local read what comes out.
"""

import json
import math
from pathlib import Path

from slmops_course.chat import load_torch
from slmops_course.errors import CourseError
from slmops_course.olive import collect, olive_config, run_olive, write_conversations
from slmops_course.tasks import Task
from slmops_course.training import GROUP_SIZE

RECIPES = ("fp32", "fp16", "int8", "int4-rtn", "int4-kquant", "int4-gptq")
# Compared in chapter 4, and not on the scoreboard: some matrices in 8 bits, or in 2, or all in 2.
VARIANTS = ("int4-mixed-last", "int4-mixed-down", "int4-mixed-snr", "int2-mixed", "int2-rtn")
# Which matrices get 8 bits: the output layer; some down-projections as well; those that rounding harms most.
CHOICES = {
    "int4-mixed-last": {"algorithm": "k_quant_last"},
    "int4-mixed-down": {"algorithm": "k_quant_down"},
    "int4-mixed-snr": {"algorithm": "snr", "ratio": 0.8, "group_size": GROUP_SIZE},
}
# These bear 2 bits, as chapter 4 measures. In ONNX q, k and v are one matrix and share their bits.
ROBUST = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj")
CALIBRATION_ROWS = 64
CALIBRATION_TOKENS = 96
# What ONNX Runtime GenAI and Foundry Local need, besides the model and its weights.
MODEL_FILES = (
    "genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json", "*.jinja",
)  # fmt: skip


class OptimizeError(CourseError):
    """A recipe that is unknown."""


def recipe_passes(recipe: str, *, layers: int = 0) -> dict[str, dict]:
    """The Olive passes of a recipe, in the order in which they run; "int2-mixed" needs the model's number of layers.

    The vocabulary head and the embeddings are quantized too: they are a fifth of SmolLM2, and a sixth of the student cut
    from it. Both are one matrix, so `TieWordEmbeddings` keeps it once.
    Raises OptimizeError for an unknown recipe.
    """
    whole = {"group_size": GROUP_SIZE, "sym": False, "lm_head": True, "embeds": True}
    quantize = {
        "fp32": {},
        "int8": {"quantize": {"type": "Rtn", "bits": 8, **whole}},
        "int4-rtn": {"quantize": {"type": "Rtn", "bits": 4, **whole}},
        "int4-kquant": {"quantize": {"type": "KQuant", "bits": 4, **whole}},
        "int4-gptq": {
            "quantize": {"type": "Gptq", "bits": 4, "group_size": GROUP_SIZE, "sym": False, "data_config": "rows"},
            "embeddings": {"type": "Rtn", "bits": 4, **whole},
        },
    }
    rtn = quantize["int4-rtn"]["quantize"]
    low = {f"model.layers.{layer}.{name}": {"bits": 2} for layer in range(layers) for name in ROBUST}
    quantize |= {
        "fp16": {},
        **{name: {"choose": {"type": "SelectiveMixedPrecision", **how}, "quantize": rtn} for name, how in CHOICES.items()},
        "int2-mixed": {"quantize": {**rtn, "overrides": low}},
        "int2-rtn": {"quantize": {**rtn, "bits": 2}},
    }
    if recipe not in quantize:
        raise OptimizeError(f"There is no recipe {recipe!r}: expected one of {', '.join((*RECIPES, *VARIANTS))}.")
    build = {"type": "ModelBuilder", "precision": "fp32" if recipe in ("fp32", "fp16") else "int4"}
    tie = {"type": "GraphSurgeries", "surgeries": [{"surgeon": "TieWordEmbeddings"}], "save_as_external_data": True}
    # On the CPU, ONNX Runtime turns fp16 back into fp32 where it has no kernel for it; see chapter 4.
    half = {"half": {"type": "OnnxFloatToFloat16", "save_as_external_data": True}} if recipe == "fp16" else {}
    return {**quantize[recipe], "build": build, "tie": tie, **half}


def optimize(recipe: str, *, model: Path, task: Task, folder: Path) -> None:
    """Carry out a recipe on a Hugging Face folder and leave in `folder` what ONNX Runtime GenAI needs.

    Raises OliveError, with Olive's own last words, when Olive fails or leaves no model.
    """
    recipe_passes(recipe)
    layers = json.loads((model / "config.json").read_text("utf-8"))["num_hidden_layers"]
    passes = recipe_passes(recipe, layers=layers)
    work = (folder / "work").resolve()
    work.mkdir(parents=True)
    rows = None
    if recipe == "int4-gptq":
        from transformers import AutoTokenizer

        examples = task.splits["train"][:CALIBRATION_ROWS]
        rows = write_conversations(work / "rows.jsonl", task, examples, AutoTokenizer.from_pretrained(model))
    config = olive_config(model=model.resolve(), output=work / "out", passes=passes, rows=rows, max_tokens=CALIBRATION_TOKENS)
    run_olive(config, work)
    collect(work, folder, marker="genai_config.json", config=config, model=model, names=MODEL_FILES)


def model_bytes(folder: Path) -> int:
    """The size of a model's weights and graph on disk, without its tokenizer."""
    names = ("*.safetensors", "*.onnx", "*.onnx.data", "*.gguf")
    return sum(path.stat().st_size for pattern in names for path in folder.glob(pattern))


def parameter_count(folder: Path) -> int:
    """How many parameters a Hugging Face folder holds, tied ones counted once."""
    model, _ = load_torch(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(folder: Path) -> dict[str, int]:
    """The bytes of an ONNX model's stored numbers by what they are: weights, scales, zero points, other.

    Example: 1,000 weights in 4 bits and groups of 50 -> {"weights": 500, "scales": 80, "zero points": 10, "other": 0}
    Rotary position tables, biases and norms are "other". The weights themselves are not read, so this is quick.
    """
    import onnx

    totals = {"weights": 0, "scales": 0, "zero points": 0, "other": 0}
    for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        kind = "weights" if len(tensor.dims) > 1 and not tensor.name.endswith("_cache") else "other"
        kind = {"scales": "scales", "qzeros": "zero points"}.get(tensor.name.rpartition(".")[2], kind)
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        totals[kind] += int(external.get("length", math.prod(tensor.dims) * itemsize))
    return totals
