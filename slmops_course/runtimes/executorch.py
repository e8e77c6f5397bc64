"""ExecuTorch: PyTorch's runtime for phones and small devices. The model becomes one program, with its cache inside.

transformers makes the model exportable (https://huggingface.co/docs/transformers/main/en/executorch), torch.export writes it
down, and ExecuTorch lowers it to XNNPACK, which computes on Arm and x86 processors: https://docs.pytorch.org/executorch

It stands in a folder of its own, 120 MB that only its processes see: it brings torchao, which transformers imports with every
model, for everybody, wherever it finds it.
"""

import sys
from pathlib import Path

from slmops_course.models import check_model_folder
from slmops_course.runtimes.environments import install_packages, surroundings
from slmops_course.runtimes.worker import WORKERS, RuntimesError, WorkerChatModel, convert_apart

REQUIREMENTS = WORKERS / "executorch" / "requirements.txt"
BITS = (32, 4)
CACHE_TOKENS = 1024  # prompt and answer together; memory for all of them is taken from the start


def install_executorch(folder: Path) -> Path:
    """Install ExecuTorch's export and runtime into `folder`, once, from exact versions; returns `folder`.

    Raises RuntimesError when the package index does not send them.
    """
    return install_packages(folder, REQUIREMENTS)


def convert_to_executorch(
    folder: Path, out: Path, *, environment: Path, bits: int = 4, cache_tokens: int = CACHE_TOKENS
) -> Path:
    """Write a model folder as an ExecuTorch program with its tokenizer; with 4 bits the embeddings stay in 32.

    Example: convert_to_executorch(student, Path("student-executorch"), environment=install_executorch(Path("build/et")))
    Raises RuntimesError for a number of bits that is not in `BITS`, and when the export fails.
    """
    check_model_folder(folder)
    if bits not in BITS:
        raise RuntimesError(f"ExecuTorch has no format of {bits} bits here: expected one of {', '.join(map(str, BITS))}.")
    return convert_apart(
        "convert_executorch.py", folder, out, str(bits), str(cache_tokens), env=surroundings(environment),
        expected="a decoder-only model that transformers can export",
    )  # fmt: skip


def open_executorch(folder: Path, *, environment: Path, name: str = "") -> WorkerChatModel:
    """A folder of `convert_to_executorch` under ExecuTorch, as a ChatModel; `environment` is `install_executorch`'s."""
    command = [sys.executable, "-P", str(WORKERS / "executorch_cpu.py"), str(folder.resolve())]
    return WorkerChatModel(command, name=name or f"ExecuTorch, {folder.name}", env=surroundings(environment))
