"""The tuned model in every runtime, beside PyTorch: equal replies, score, size, memory and time. And which were only validated.

    python -m slmops_course.runtimes.comparison STUDENT_FOLDER [NAME …] [--work build/runtimes] [--save]
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from slmops_course import tasks
from slmops_course.artifacts import content_digest
from slmops_course.benchmark import WARM_UP, MemoryWatch
from slmops_course.errors import CourseError
from slmops_course.evaluation import judge, mean_score
from slmops_course.experiments import machine_class
from slmops_course.runtimes import executorch, litert, llama_cpp, mlx
from slmops_course.runtimes.worker import WORKERS, RuntimesError, WorkerChatModel
from slmops_course.tasks import Example, Task

KEPT = tasks.DATA_FOLDER / "runtimes.json"
COMMAND = "python -m slmops_course.runtimes.comparison STUDENT_FOLDER"
MESSAGES = 100  # of the dev split
THREADS = 2
REFERENCE = "PyTorch, 32 bits"
# What no machine of ours can run: what holds it, and against what it is held.
VALIDATED = {
    "Ollama": "deploy/ollama/Modelfile: its instructions, and its template against the tokenizer's",
    "vLLM on Kubernetes": "deploy/kubernetes: Kubernetes' own schemas, and rules for what a pod may do",
    "vLLM and Ollama under Docker Compose": "deploy/compose: the Compose specification's schema, and the same rules",
}


@dataclass(frozen=True)
class Row:
    """What one runtime made of the messages, one at a time after a warm-up."""

    name: str
    messages: int
    equal: float  # share of replies that are PyTorch's, letter for letter
    exact_match: dict  # the score, with its interval
    time_to_first_token_s: float  # median
    latency_s: float  # median
    processor_s: float  # processor time for a message, all threads together, with what they spend waiting for one another
    process_bytes: int  # the whole process's peak, with the language it is written in
    size_bytes: int  # the files that a device needs


def _pytorch(folder: Path, work: Path) -> tuple[WorkerChatModel, Path]:
    command = [sys.executable, "-P", str(WORKERS / "pytorch_cpu.py"), str(folder.resolve()), str(THREADS)]
    return WorkerChatModel(command, name=REFERENCE), folder


def _converted(convert: Callable[..., Path], folder: Path, work: Path, name: str, **options) -> Path:
    """What `convert` makes of a model folder, below `work`; once for each model, since some conversions take minutes."""
    out = work / f"model-{content_digest(folder)[:12]}" / name
    return out if out.exists() else convert(folder, out, **options)


def _llama_cpp(type_name: str) -> Callable:
    def open_it(folder: Path, work: Path):
        convert = llama_cpp.convert_to_gguf
        gguf = _converted(convert, folder, work, f"{type_name}.gguf", downloads=work, type_name=type_name)
        node = llama_cpp.install_node_runtime(work / "node-llama-cpp")
        return llama_cpp.open_llama_cpp(gguf, node_folder=node, threads=THREADS), gguf

    return open_it


def _mlx(bits: int) -> Callable:
    def open_it(folder: Path, work: Path):
        out = _converted(mlx.convert_to_mlx, folder, work, f"mlx-{bits}", bits=bits)
        return mlx.open_mlx(out), out

    return open_it


def _executorch(bits: int) -> Callable:
    def open_it(folder: Path, work: Path):
        environment = executorch.install_executorch(work / "executorch-environment")
        convert = executorch.convert_to_executorch
        out = _converted(convert, folder, work, f"executorch-{bits}", environment=environment, bits=bits)
        return executorch.open_executorch(out, environment=environment), out

    return open_it


def _litert(recipe: str) -> Callable:
    def open_it(folder: Path, work: Path):
        environment = litert.install_litert(work / "litert-environment")
        convert = litert.convert_to_litert
        out = _converted(convert, folder, work, f"litert-{recipe}", environment=environment, recipe=recipe)
        return litert.open_litert(out, environment=environment, threads=THREADS), out

    return open_it


RUNTIMES: dict[str, Callable[[Path, Path], tuple[WorkerChatModel, Path]]] = {
    REFERENCE: _pytorch,
    "llama.cpp, F16": _llama_cpp("F16"),
    "llama.cpp, Q8_0": _llama_cpp("Q8_0"),
    "llama.cpp, Q4_1": _llama_cpp("Q4_1"),
    "llama.cpp, Q4_0": _llama_cpp("Q4_0"),
    "MLX, 32 bits": _mlx(32),
    "MLX, 8 bits": _mlx(8),
    "MLX, 4 bits": _mlx(4),
    "ExecuTorch, 32 bits": _executorch(32),
    "ExecuTorch, 4 bits": _executorch(4),
    "LiteRT, 32 bits": _litert("float"),
    "LiteRT, 8 bits": _litert("int8"),
}


def measure(
    model: WorkerChatModel, task: Task, examples: Sequence[Example], *, expected: Sequence[str] | None, size_bytes: int
) -> tuple[Row, list[str]]:
    """Put the messages to a model one at a time; returns its row and its replies. `expected` are PyTorch's, None for itself.

    Raises RuntimesError when there is no message.
    """
    if not examples:
        raise RuntimesError("There is no message to compare the runtimes with: expected at least one; check the dev split.")
    asks = [task.messages(example.text) for example in examples]
    model.generate(asks[:WARM_UP])
    with MemoryWatch(children=True) as watch:
        before = model.processor_s()
        replies = [model.reply(conversation) for conversation in asks]
        used_s = model.processor_s() - before
    texts = [reply.text for reply in replies]
    exact = [outcome.answer == outcome.expected for outcome in judge(task, examples, texts)]
    same = [a == b for a, b in zip(texts, expected or texts, strict=True)]
    row = Row(
        model.name, len(asks), sum(same) / len(same), asdict(mean_score(exact)),
        statistics.median(reply.time_to_first_token_s for reply in replies),
        statistics.median(reply.latency_s for reply in replies), used_s / len(asks), watch.peak_children_bytes, size_bytes,
    )  # fmt: skip
    return row, texts


def compare(
    folder: Path, task: Task, *, work: Path, names: Sequence[str] = tuple(RUNTIMES), messages: int = MESSAGES
) -> Iterator[Row]:
    """Convert a model folder for each named runtime into `work` and measure it there; PyTorch comes first, always.

    A runtime that is not installed, or fails, is named on standard error with its sentence, and left out.
    Raises RuntimesError for a name that is none.
    """
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown:
        raise RuntimesError(f"There is no runtime {unknown[0]!r}: expected one of {'; '.join(RUNTIMES)}.")
    work.mkdir(parents=True, exist_ok=True)
    expected = None
    for name in (REFERENCE, *(name for name in names if name != REFERENCE)):
        try:
            model, files = RUNTIMES[name](folder, work)
            with model:
                model.name = name
                examples = task.splits["dev"][:messages]
                row, texts = measure(model, task, examples, expected=expected, size_bytes=total_bytes(files))
        except CourseError as error:
            if name == REFERENCE:
                raise
            print(f"{name}: {error}", file=sys.stderr)
            continue
        expected = expected or texts
        yield row


def total_bytes(path: Path) -> int:
    """The size of a file, or of the files in a folder that a device needs: no manifest and no training history."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.name not in ("manifest.json", "history.json")]
    return sum(file.stat().st_size for file in files if file.is_file())


def keep(rows: Sequence[Row], task: Task, path: Path = KEPT) -> None:
    """Write the rows where `table` finds them, with the day and the kind of machine; other runtimes' rows stay."""
    kept = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    conditions = {"task": task.name, "date": date.today().isoformat(), "machine": machine_class(), "threads": THREADS}
    kept |= {row.name: asdict(row) | conditions for row in rows}
    ordered = {name: kept[name] for name in RUNTIMES if name in kept}
    path.write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")


def table(path: Path = KEPT) -> list[dict]:
    """Every way to serve with its status: "run", with its figures, their date and machine; "not run" where none are kept;
    or "validated", with what was held against what.

    Raises RuntimesError when the kept figures cannot be read.
    """
    try:
        kept = dict(json.loads(path.read_text("utf-8")))
        rows = [{"name": name, "status": "run", **kept[name]} if name in kept else {"name": name, "status": "not run"}
                for name in RUNTIMES]  # fmt: skip
    except (OSError, ValueError, TypeError) as error:
        raise RuntimesError(
            f"The kept figures in {path.name} cannot be read ({error}): expected those of `{COMMAND} --save`; run it again."
        ) from error
    return rows + [{"name": name, "status": "validated", "how": how} for name, how in VALIDATED.items()]


def main(arguments: Sequence[str]) -> int:
    """Compare the runtimes and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m slmops_course.runtimes.comparison")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[])
    parser.add_argument("--work", type=Path, default=Path("build/runtimes"))
    parser.add_argument("--messages", type=int, default=MESSAGES)
    parser.add_argument("--save", action="store_true", help="keep the figures with the course (for authors)")
    options = parser.parse_args(arguments)
    task = tasks.load_task()
    names = options.names or tuple(RUNTIMES)
    try:
        for row in compare(options.folder, task, work=options.work, names=names, messages=options.messages):
            print(json.dumps(asdict(row)), flush=True)
            if options.save:
                keep([row], task)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
