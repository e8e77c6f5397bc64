"""An ExecuTorch program, asked over standard input and output: python -P executorch_cpu.py FOLDER

The folder holds model.pte, tokenizer.json and chat.json (template, end token, how many tokens fit). Lines of JSON both ways,
as slmops_course/runtimes/worker.py has them. No transformers, and of PyTorch only its tensors: little more than a device has.
"""

import json
import sys
import time
from pathlib import Path


def main(folder: str) -> None:
    import torch
    from executorch.runtime import Runtime
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    chat = json.loads((Path(folder) / "chat.json").read_text("utf-8"))
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(chat["template"])
    method = Runtime.get().load_program(str(Path(folder) / "model.pte")).load_method("forward")

    def next_token(ids: list[int], position: int) -> int:
        tensors = torch.tensor([ids]), torch.arange(position, position + len(ids))
        return int(method.execute(tensors)[0][0, -1].argmax())

    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        text = template.render(messages=request["messages"], add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        if len(prompt) + request["max_new_tokens"] > chat["length"]:
            say({"error": f"the prompt has {len(prompt)} tokens, and {chat['length']} fit"})
            continue
        output = [next_token(prompt, 0)]
        first_s = time.perf_counter() - start
        while output[-1] != chat["end"] and len(output) < request["max_new_tokens"]:
            output.append(next_token(output[-1:], len(prompt) + len(output) - 1))
        text = tokenizer.decode([i for i in output if i != chat["end"]])
        latency_s = time.perf_counter() - start
        say({"text": text, "prompt_ids": prompt, "output_ids": output, "first_s": first_s, "latency_s": latency_s})


def say(value: dict) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
