"""Several LoRA adapters on one base model in memory, switched per request, under ONNX Runtime GenAI.

In a model folder made for this, the adapters' matrices are inputs of the graph and no weights in it. Each adapter is a file
NAME.onnx_adapter; `adapters.json` says which matrices the graph takes and which files were made for it.
Source: https://onnxruntime.ai/docs/genai/tutorials/finetune.html
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from slmops_course.adapters import AdapterError, linear_shapes
from slmops_course.artifacts import file_sha256
from slmops_course.chat import MAX_NEW_TOKENS
from slmops_course.models import check_model_folder
from slmops_course.olive import collect, olive_config, run_olive
from slmops_course.optimize import MODEL_FILES
from slmops_course.serving import GenAIChatModel
from slmops_course.training import GROUP_SIZE

PRECISIONS = ("fp32", "int4")  # of the base; adapters are fp32 beside either
DESCRIPTION, SUFFIX = "adapters.json", ".onnx_adapter"


def export_switching(folder: Path, *, base: Path, adapters: Mapping[str, Path], precision: str = "fp32") -> None:
    """Write one ONNX model folder out of a base model and PEFT's LoRA adapters, by name; their ranks may differ.

    Raises AdapterError, before anything is built, when an adapter does not fit the base or is not in the same layers and
    modules as the first. PEFT does not record the weights an adapter was trained on: shapes are all that can be compared.
    """
    if not adapters:
        raise AdapterError("There are no adapters to export: expected one at least; train one with `add_lora`.")
    found = {name: adapter_widths(read_adapter(path)) for name, path in adapters.items()}
    first = next(iter(found))
    whole = base_widths(base)
    _check_widths(first, found[first], {weight: whole.get(weight) for weight in found[first]})
    for name, widths in found.items():
        _check_widths(name, widths, found[first])
    build_onnx(folder, model=base, precision=precision, adapter=adapters[first])
    (folder / DESCRIPTION).write_text(json.dumps({"widths": found[first], "files": {}}, indent=1), "utf-8")
    for name, path in adapters.items():
        add_adapter(folder, name, path)


def build_onnx(folder: Path, *, model: Path, precision: str, adapter: Path | None = None) -> None:
    """Write a Hugging Face folder as ONNX; with an adapter, one whose matrices are inputs, so that any can be put in.

    Left alone, the builder would quantize the first adapter with the base, and others would not fit. A request without
    adapter gets matrices of rank 0, so that the base answers. fp16 is nothing that the builder makes for a CPU.
    """
    if precision not in PRECISIONS:
        raise AdapterError(f"There is no precision {precision!r} here: expected one of {', '.join(PRECISIONS)}.")
    work = (folder / "work").resolve()
    work.mkdir(parents=True)
    build = {"type": "ModelBuilder", "precision": precision}
    if precision == "int4":
        build |= {"int4_block_size": GROUP_SIZE, "int4_is_symmetric": False, "int4_op_types_to_quantize": ["MatMul", "Gather"]}
        build["int4_nodes_to_exclude"] = [node_name(weight) for weight in read_adapter(adapter)] if adapter else []
    tie = {"type": "GraphSurgeries", "surgeries": [{"surgeon": "TieWordEmbeddings"}], "save_as_external_data": True}
    extract = {"type": "ExtractAdapters", "save_as_external_data": True}
    passes = {"build": build, "tie": tie} | ({"extract": extract} if adapter else {})
    config = olive_config(model=model.resolve(), output=work / "out", passes=passes)
    if adapter:
        config["input_model"]["adapter_path"] = str(adapter.resolve())
    run_olive(config, work)
    collect(work, folder, marker="genai_config.json", config=config, model=model, names=MODEL_FILES)


def add_adapter(folder: Path, name: str, adapter: Path) -> Path:
    """Put one more of PEFT's adapters beside a model from `export_switching`, which stays as it is; returns its file.

    Raises AdapterError when the adapter has other matrices than the model takes.
    """
    import onnxruntime

    described, weights = read_description(folder), read_adapter(adapter)
    _check_widths(name, adapter_widths(weights), described["widths"])
    file, path = onnxruntime.AdapterFormat(), folder / f"{name}{SUFFIX}"
    file.set_parameters({key: onnxruntime.OrtValue.ortvalue_from_numpy(value) for key, value in weights.items()})
    file.export_adapter(str(path))
    described["files"][name] = file_sha256(path)
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=1), "utf-8")
    return path


def read_description(folder: Path) -> dict:
    """What `adapters.json` says. Raises AdapterError for a folder without one."""
    if not (folder / DESCRIPTION).is_file():
        raise AdapterError(f"{folder} has no {DESCRIPTION}: expected a model that takes adapters; use export_switching.")
    return json.loads((folder / DESCRIPTION).read_text("utf-8"))


def read_adapter(folder: Path) -> dict:
    """PEFT's LoRA matrices under the names of the graph's inputs, fp32; A is (inputs, rank), B (rank, outputs) and scaled.

    Example: "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (16, 576)
    -> "model.layers.0.attn.q_proj.lora_A.MatMul.weight", (576, 16)
    Raises AdapterError for a folder without an adapter, and for kinds that are not two plain matrices a layer.
    """
    from safetensors.torch import load_file

    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"There is no adapter in {folder}: expected adapter_config.json and its weights; train one first.")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    special = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("peft_type") != "LORA" or special:
        raise AdapterError(
            f"The adapter in {folder} is of the kind {' '.join([str(config.get('peft_type')), *special])}: expected plain LORA "
            "of one rank and scale; train it with `add_lora`."
        )
    weights = {}
    for name, weight in load_file(folder / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.").replace(".self_attn.", ".attn.").replace(".weight", ".MatMul.weight")
        scale = config["lora_alpha"] / config["r"] if ".lora_B." in name else 1
        weights[name] = (weight.float().T * scale).contiguous().numpy()
    return weights


def adapter_widths(weights: Mapping) -> dict[str, int]:
    """The side of each matrix that the base decides, not the rank: A's inputs and B's outputs."""
    return {name: weight.shape[0 if ".lora_A." in name else 1] for name, weight in weights.items()}


def base_widths(base: Path) -> dict[str, int]:
    """The same for every linear layer in the blocks of a Llama-type base model."""
    from transformers import AutoConfig

    check_model_folder(base)
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    return {
        f"model.layers.{layer}.{'attn' if module[0] in 'qkvo' else 'mlp'}.{module}.{matrix}.MatMul.weight": width
        for layer in range(config.num_hidden_layers)
        for module, sides in linear_shapes(config).items()
        for matrix, width in zip(("lora_A", "lora_B"), sides, strict=True)
    }


def node_name(weight: str) -> str:
    """The graph's node for a matrix. Example: "model.layers.0.attn.q_proj.lora_A.MatMul.weight"
    -> "/model/layers.0/attn/q_proj/lora_A/MatMul"
    """
    return "/" + re.sub(r"\.(?=\D)", "/", weight.removesuffix(".weight"))


def _check_widths(name: str, found: Mapping, expected: Mapping) -> None:
    wrong = [weight for weight in sorted(found.keys() | expected.keys()) if found.get(weight) != expected.get(weight)]
    if wrong:
        has, should = (f"{side[wrong[0]]} wide" if side.get(wrong[0]) else "absent" for side in (found, expected))
        raise AdapterError(
            f"In the adapter {name!r} {wrong[0]} is {has}: expected it {should}; train one on this base, in the same layers "
            "and modules as the others."
        )


class SwitchingChatModel(GenAIChatModel):
    """One base model in memory, and several adapters of which each request chooses one; None is the base alone.

    Example: `model.generate(conversations, adapter="clinic")`, or `model.desk("clinic")` where a ChatModel is expected.
    """

    def __init__(self, folder: Path, *, name: str | None = None):
        made = read_description(folder)["files"]
        there = {path.name.removesuffix(SUFFIX): file_sha256(path) for path in folder.glob(f"*{SUFFIX}")}
        foreign = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
        if foreign:
            raise AdapterError(
                f"{foreign[0]}{SUFFIX} in {folder} is missing, changed, or made for another model: expected the files of its "
                f"{DESCRIPTION}; put it there with add_adapter."
            )
        super().__init__(folder, name=name)
        self.adapters = tuple(made)
        self._loaded = self._genai.Adapters(self._model)
        for adapter in self.adapters:
            self._loaded.load(str(folder / f"{adapter}{SUFFIX}"), adapter)

    def generate(self, conversations, *, adapter: str | list | None = None, max_new_tokens=MAX_NEW_TOKENS):
        """Answer every conversation, in order, with one adapter for all or a list of one for each.

        Conversations with different adapters never share a batch: the runtime knows one adapter a generator.
        Raises AdapterError for an unknown adapter.
        """
        chosen = adapter if isinstance(adapter, list) else [adapter] * len(conversations)
        replies = {}
        for name, desk in {name: self.desk(name) for name in chosen}.items():
            indexes = [i for i, (_, one) in enumerate(zip(conversations, chosen, strict=True)) if one == name]
            answers = desk.generate([conversations[i] for i in indexes], max_new_tokens=max_new_tokens)
            replies.update(zip(indexes, answers, strict=True))
        return [replies[i] for i in range(len(conversations))]

    def desk(self, adapter: str | None) -> "DeskView":
        """The base with one adapter at work, as a ChatModel. Nothing is loaded. Raises AdapterError for an unknown one."""
        if adapter is not None and adapter not in self.adapters:
            raise AdapterError(f"There is no adapter {adapter!r}: expected one of {', '.join(self.adapters)}; see add_adapter.")
        return DeskView(self, adapter)

    def close(self):
        self._loaded = None
        super().close()


class DeskView(GenAIChatModel):
    """One desk of a SwitchingChatModel, whose memory it shares."""

    def __init__(self, shared: SwitchingChatModel, adapter: str | None):
        self.name = f"{shared.name}, {adapter or 'no adapter'}"
        self._model, self._tokenizer, self._end = shared._model, shared._tokenizer, shared._end

        def start(model, params):
            generator = shared._genai.Generator(model, params)
            if adapter is not None:
                generator.set_active_adapter(shared._loaded, adapter)
            return generator

        # The runtime as the parent calls it, with generators that begin with this adapter.
        self._genai = SimpleNamespace(GeneratorParams=shared._genai.GeneratorParams, Generator=start)
