"""A model folder under PyTorch, asked over standard input and output, as what the other runtimes are compared with:
python -P pytorch_cpu.py FOLDER THREADS

Lines of JSON both ways, as slmops_course/runtimes/worker.py has them.
"""

import json
import sys
import time


def main(folder: str, threads: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(threads))
    source = {"pretrained_model_name_or_path": folder, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, use_safetensors=True).eval()
    model.generation_config.max_length = None
    tokenizer = AutoTokenizer.from_pretrained(**source)
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    say({"ready": True})
    for line in sys.stdin:
        request, first = json.loads(line), []
        start = time.perf_counter()
        text = tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]

        def clock(ids, scores, first=first, **_):
            first.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        ids = torch.tensor([prompt])
        limits = {"max_new_tokens": request["max_new_tokens"], "stopping_criteria": [clock]}
        with torch.inference_mode():
            row = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **limits)[0]
        output = row[len(prompt) :].tolist()
        text = tokenizer.decode(output, skip_special_tokens=True)
        times = {"first_s": first[0] - start, "latency_s": time.perf_counter() - start}
        say({"text": text, "prompt_ids": prompt, "output_ids": output, **times})


def say(value: dict) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
