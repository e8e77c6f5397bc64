"""Export a model folder for ExecuTorch: python -P convert_executorch.py MODEL_FOLDER OUT_FOLDER BITS LENGTH

BITS is 32, or 4 for whole numbers in groups of 32 with activations in 8 bits. LENGTH is how many tokens fit in the cache.
The cache is part of the program: transformers makes it exportable, and XNNPACK computes on the processor.
"""

import json
import shutil
import sys
from pathlib import Path


def convert(folder: str, out: str, bits: str, length: str) -> None:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    source = {"pretrained_model_name_or_path": folder, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, use_safetensors=True).eval()
    model.requires_grad_(False)
    if bits == "4":
        quantize(model)
    model.generation_config.use_cache, model.generation_config.cache_implementation = True, "static"
    with torch.no_grad():
        module = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=int(length))
        tokens = torch.export.Dim("tokens", max=int(length) - 1)
        program = module.export(
            input_ids=torch.tensor([[1, 2, 3]]), cache_position=torch.arange(3),
            dynamic_shapes={"input_ids": {1: tokens}, "cache_position": {0: tokens}},
            strict=True,  # the other way takes the cache for a constant as well, and lowering fails
        )  # fmt: skip
        # The check would refuse operators of the quantized layers that XNNPACK takes whole.
        options = EdgeCompileConfig(_check_ir_validity=False)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=options)
    folder_out = Path(out)
    folder_out.mkdir()
    (folder_out / "model.pte").write_bytes(lowered.to_executorch().buffer)
    shutil.copyfile(Path(folder) / "tokenizer.json", folder_out / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(**source)
    chat = {"template": tokenizer.chat_template, "end": tokenizer.eos_token_id, "length": int(length)}
    (folder_out / "chat.json").write_text(json.dumps(chat), "utf-8")


def quantize(model) -> None:
    """Put the linear layers' weights into 4 bits, in place; the head is one, the embeddings are not."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    if model.config.tie_word_embeddings:  # the head would be quantized together with the embeddings, which XNNPACK has not
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    quantize_(model, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)))


if __name__ == "__main__":
    convert(*sys.argv[1:])
