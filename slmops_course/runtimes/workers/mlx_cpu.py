"""A model folder under MLX on the CPU, asked over standard input and output: python -P mlx_cpu.py FOLDER

Lines of JSON both ways, as slmops_course/runtimes/worker.py has them.
"""

import json
import sys
import time


def main(folder: str) -> None:
    import mlx.core as mx
    from mlx_lm import load, stream_generate

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(folder)
    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        prompt = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=False)
        pieces, ids, first_s = [], [], None
        for step in stream_generate(model, tokenizer, prompt, max_tokens=request["max_new_tokens"]):
            first_s = first_s or time.perf_counter() - start
            pieces.append(step.text)
            if step.generation_tokens > len(ids):  # the last step may bring the rest of the text and no new token
                ids.append(step.token)
        text, latency_s = "".join(pieces), time.perf_counter() - start
        say({"text": text, "prompt_ids": prompt, "output_ids": ids, "first_s": first_s, "latency_s": latency_s})


def say(value: dict) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
