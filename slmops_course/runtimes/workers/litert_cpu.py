"""A LiteRT-LM file on the CPU, asked over standard input and output: python -P litert_cpu.py FOLDER THREADS

The folder holds model.litertlm, with its tokenizer inside, and chat.json. Lines of JSON both ways, as
slmops_course/runtimes/worker.py has them. The runtime gives text, so the reply's token ids are those of its text.
"""

import json
import sys
import tempfile
import time
from pathlib import Path


def main(folder: str, threads: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from litert_lm import Backend, Engine, LogSeverity, SamplerConfig, set_min_log_severity

    set_min_log_severity(LogSeverity.ERROR)
    chat = json.loads((Path(folder) / "chat.json").read_text("utf-8"))
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(chat["template"])
    processor = Backend.CPU(thread_count=int(threads))
    cache = tempfile.TemporaryDirectory()  # else the runtime writes its packed weights beside the model
    options = {"backend": processor, "max_num_tokens": chat["length"], "cache_dir": cache.name}
    engine = Engine(str(Path(folder) / "model.litertlm"), **options)
    greedy = SamplerConfig(top_k=1, temperature=0.0)
    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        text = template.render(messages=request["messages"], add_generation_prompt=True)
        prompt = engine.tokenize(text)
        if len(prompt) + request["max_new_tokens"] > chat["length"]:
            say({"error": f"the prompt has {len(prompt)} tokens, and {chat['length']} fit"})
            continue
        pieces, first_s = [], None
        limit = {"max_output_tokens": request["max_new_tokens"], "apply_prompt_template": False}
        with engine.create_session(sampler_config=greedy, **limit) as session:
            session.run_prefill([text])
            for step in session.run_decode_async():
                first_s = first_s or time.perf_counter() - start
                pieces += step.texts
        reply, latency_s = "".join(pieces), time.perf_counter() - start
        ids = [*engine.tokenize(reply), chat["end"]]
        say({"text": reply, "prompt_ids": prompt, "output_ids": ids, "first_s": first_s or latency_s, "latency_s": latency_s})


def say(value: dict) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
