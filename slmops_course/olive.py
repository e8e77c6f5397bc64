"""Running Microsoft Olive: what all of its configurations share, and the process it runs in."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from slmops_course.errors import CourseError
from slmops_course.models import check_model_folder
from slmops_course.tasks import Example, Task


class OliveError(CourseError):
    """Olive could not carry out a configuration."""


def olive_config(*, model: Path, output: Path, passes: Mapping, rows: Path | None = None, max_tokens: int = 192) -> dict:
    """A configuration as `olive run --config` takes it; its passes run in the mapping's order, on this CPU.

    `rows` is a file of JSON lines with a `text` each; passes refer to it as the data config "rows".
    """
    place = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    config = {
        "input_model": {"type": "HfModel", "model_path": str(model)},
        "systems": {"here": {"type": "LocalSystem", "accelerators": [place]}},
        "host": "here",
        "target": "here",
        "passes": dict(passes),
        "output_dir": str(output),
        "cache_dir": str(output.parent / "olive-cache"),
        "evaluate_input_model": False,
        "log_severity_level": 2,
    }
    if rows is not None:
        config["data_configs"] = [
            {
                "name": "rows",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": str(rows), "split": "train"},
                "pre_process_data_config": {
                    "text_cols": ["text"], "strategy": "line-by-line", "max_seq_len": max_tokens, "pad_to_max_len": False,
                    "add_special_tokens": False,  # the chat template has put them where they belong
                },
            }
        ]  # fmt: skip
    return config


def write_conversations(path: Path, task: Task, examples: Sequence[Example], tokenizer) -> Path:
    """Write labelled messages as the JSON lines that Olive reads: whole conversations, answers included, as text."""
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            turns = [*task.messages(example.text), {"role": "assistant", "content": task.target(example.answer)}]
            file.write(json.dumps({"text": tokenizer.apply_chat_template(turns, tokenize=False)}) + "\n")
    return path


def run_olive(config: Mapping, work: Path) -> None:
    """Run `olive run` on a configuration, in a process of its own, without telemetry and without a hub."""
    path = work / "config.json"
    path.write_text(json.dumps(config, indent=1), "utf-8")
    run_process(["-m", "olive", "run", "--config", str(path)], work)


def run_process(arguments: Sequence[str], work: Path) -> None:
    """Run this Python with arguments that start Olive, in a work folder, and keep what it says in `olive.log` there.

    Raises OliveError, with Olive's own last words, when it fails.
    """
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(work), cwd=work)
    (work / "olive.log").write_text(done.stdout + done.stderr, "utf-8")
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise OliveError(
            f"Olive ended with code {done.returncode} ({lines[-1] if lines else 'no output'}): expected it to finish; "
            "run `slmops doctor` to see whether a version disagrees with the pins."
        )


def plan_of_optimize(model: Path, *, precision: str = "int4") -> dict:
    """What the one command `olive optimize` would do with a model, as the configuration it writes. Nothing is run.

    Raises ModelError for a folder that holds no model, and OliveError when the command ends without a configuration.
    """
    check_model_folder(model)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        command = [sys.executable, "-m", "olive", "optimize", "-m", str(model.resolve()), "--precision", precision]
        command += ["-o", str(work), "--dry_run", "--save_config_file", "--disable_telemetry"]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(work), cwd=work)
        if done.returncode or not (work / "config.json").is_file():
            raise OliveError(
                f"`olive optimize --dry_run` ended with code {done.returncode} and wrote no configuration: expected one; "
                "run `slmops doctor` to see whether a version disagrees with the pins."
            )
        return portable(json.loads((work / "config.json").read_text("utf-8")), WORK=work, MODEL=model)


def optimize_by_command(model: Path, folder: Path, *, names: Sequence[str]) -> list[dict]:
    """Run `olive optimize` for fp32 and for int4 without a hub, and for fp32 once more as a file by `olive run`.

    Returns a row a run: {"manner", "precision", "command", "result" ("a model", or Olive's complaint)}; the models, files that
    match `names`, are in `folder/MANNER-PRECISION`. The file's configuration comes from a dry run: a real one saves it as
    config.json, where the model's own config.json then takes its place (Olive 0.13).
    """
    rows = []
    for manner, precision in (("command", "fp32"), ("command", "int4"), ("file", "fp32")):
        work = (folder / f"{manner}-{precision}" / "work").resolve()
        work.mkdir(parents=True)
        config = plan_of_optimize(model, precision=precision)
        line = f"olive optimize -m MODEL --precision {precision} -o OUT --disable_telemetry"
        try:
            if manner == "file":
                text = json.dumps(config | {"output_dir": str(work / "out")}).replace("MODEL", str(model.resolve()))
                run_olive(json.loads(text), work)
            else:
                places = {"MODEL": str(model.resolve()), "OUT": str(work / "out")}
                run_process(["-m", *(places.get(word, word) for word in line.split())], work)
            collect(work, work.parent, marker="genai_config.json", config=config, model=model, names=names)
            result = "a model"
        except OliveError:
            log = (work / "olive.log").read_text("utf-8").splitlines()
            result = next((text.strip() for text in reversed(log) if "Error:" in text), "no model")
            shutil.rmtree(work)
        said = line if manner == "command" else "olive run --config FILE"
        rows.append({"manner": manner, "precision": precision, "command": said, "result": result})
    return rows


def finetune_three_ways(model: Path, rows: Path, folder: Path, *, rank: int, alpha: int, max_tokens: int) -> list[dict]:
    """Fine-tune a model by Olive's command, by a configuration file, and from Python; each adapter is in `folder/MANNER`.

    Returns one row a manner: {"manner", "command", "parameters" (of the adapter)}, with folders as names. The command writes
    the configuration that the other two carry out. Olive seeds the order of the rows and not the adapter's first weights,
    so the three learn the same without being equal.
    """
    from safetensors import safe_open

    config = "config.json"
    manners = {
        "command": [
            "-m", "olive", "finetune", "-m", str(model.resolve()), "-d", "json", "--data_files", str(rows.resolve()),
            "--text_field", "text", "--max_seq_len", str(max_tokens), "--method", "lora", "--lora_r", str(rank),
            "--lora_alpha", str(alpha), "--torch_dtype", "float32", "-o", "out", "--save_config_file", "--disable_telemetry",
        ],
        "file": ["-m", "olive", "run", "--config", config],
        "python": ["-c", f"from olive.workflows import run; run({config!r})"],
    }  # fmt: skip
    found, written = [], {}
    for manner, arguments in manners.items():
        work = (folder / manner / "work").resolve()
        work.mkdir(parents=True)
        if manner != "command":
            (work / config).write_text(json.dumps(written | {"output_dir": str(work / "out")}), "utf-8")
        run_process(arguments, work)
        if manner == "command":
            written = json.loads((work / "out" / config).read_text("utf-8"))
        collect(work, folder / manner, marker="adapter_config.json", config=written, model=model)
        with safe_open(folder / manner / "adapter_model.safetensors", "np") as adapter:
            count = sum(math.prod(adapter.get_slice(name).get_shape()) for name in adapter.keys())  # noqa: SIM118
        line = portable({"line": " ".join(["python", *arguments])}, MODEL=model, ROWS=rows)["line"]
        found.append({"manner": manner, "command": line, "parameters": count})
    return found


def _environment(work: Path) -> dict[str, str]:
    """The environment Olive runs in: no telemetry, no hub, no progress bars.

    Olive 0.13 queues a first message before it reads OLIVE_DISABLE_TELEMETRY; in continuous integration it does not.
    """
    return {
        **os.environ, "CI": "true", "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
        "HF_DATASETS_CACHE": str(work / "datasets"), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def portable(config: Mapping, **folders: Path) -> dict:
    """The configuration with folders of this machine replaced by names, for keeping beside a result."""
    text = json.dumps(config)
    for name, folder in folders.items():
        text = text.replace(str(folder.resolve()), name)
    return json.loads(text)


def collect(work: Path, folder: Path, *, marker: str, config: Mapping, model: Path, names: Sequence[str] = ("*",)) -> None:
    """Move what Olive made out of its work folder: the folder that holds `marker`, those files that match `names`.

    The configuration is kept beside them as `olive.json`, and the work folder is deleted.
    Raises OliveError when Olive left no such folder.
    """
    built = next((path.parent for path in sorted((work / "out").rglob(marker))), None)
    if built is None:
        raise OliveError(f"Olive ended without a model: expected {marker} in its output; run the same command again.")
    for path in {path for name in names for path in built.glob(name) if path.is_file()}:
        shutil.move(path, folder / path.name)
    (folder / "olive.json").write_text(json.dumps(portable(config, WORK=work, MODEL=model), indent=1), "utf-8")
    shutil.rmtree(work)
