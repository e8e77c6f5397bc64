"""Convert a model folder for LiteRT-LM: python -P convert_litert.py MODEL_FOLDER OUT_FOLDER RECIPE CACHE_TOKENS"""

import importlib.machinery
import json
import os
import sys
import tempfile
import types
from pathlib import Path


def convert(folder: str, out: str, recipe: str, cache_tokens: str) -> None:
    from transformers import AutoTokenizer

    stand_in_for_tensorflow()
    from litert_torch.generative.export_hf.export import export

    with tempfile.TemporaryDirectory(dir=Path(out).parent) as scratch:
        export(
            model=folder, output_dir=scratch, quantization_recipe=recipe, prefill_lengths=[64, 256],
            cache_length=int(cache_tokens),
        )  # fmt: skip
        (made,) = Path(scratch).glob("*.litertlm")
        Path(out).mkdir()
        os.replace(made, Path(out) / "model.litertlm")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    chat = {"template": tokenizer.chat_template, "end": tokenizer.eos_token_id, "length": int(cache_tokens)}
    (Path(out) / "chat.json").write_text(json.dumps(chat), "utf-8")


def stand_in_for_tensorflow() -> None:
    """Let litert-torch find the one module of TensorFlow that it imports, where LiteRT's own package has it too.

    litert-torch 0.10.0 imports tensorflow.lite.python.schema_py_generated for one image model, and does not say that it needs
    TensorFlow, which is 600 MB. The module is generated from LiteRT's file format, and ai-edge-litert carries the same.
    """
    from ai_edge_litert import schema_py_generated

    for name in ("tensorflow", "tensorflow.lite", "tensorflow.lite.python"):
        module = types.ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None, is_package=True), []
        sys.modules[name] = module
    sys.modules["tensorflow.lite.python"].schema_py_generated = schema_py_generated


if __name__ == "__main__":
    convert(*sys.argv[1:])
