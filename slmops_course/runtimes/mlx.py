"""MLX: Apple's array library, made for their processors and run here on the CPU, which it supports on Linux too.

mlx-lm converts a Hugging Face folder and generates from it: https://github.com/ml-explore/mlx-lm. On a CPU its matrices of
4 and 8 bits save memory and cost time; on Apple's graphics processors they save both.
"""

import json
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from slmops_course.models import check_model_folder
from slmops_course.runtimes.worker import WORKERS, RuntimesError, WorkerChatModel, convert_apart

BITS = (32, 16, 8, 4)
GROUP_SIZE = 32  # weights that share a scale and an offset


def convert_to_mlx(folder: Path, out: Path, *, bits: int = 4, group_size: int = GROUP_SIZE) -> Path:
    """Write a model folder for MLX, its matrices in `bits` bits.

    Example: convert_to_mlx(student, Path("student-mlx"), bits=8)
    Raises RuntimesError without mlx-lm, for a number of bits that is not in `BITS`, and when mlx-lm fails.
    """
    check_model_folder(folder)
    check_mlx()
    if bits not in BITS:
        raise RuntimesError(f"MLX has no format of {bits} bits here: expected one of {', '.join(map(str, BITS))}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        readable = Path(scratch) / folder.name
        shutil.copytree(folder, readable, copy_function=_link)
        _name_rope_theta(readable / "config.json")
        expected = f"a model of a type that mlx-lm has, with rows of a multiple of {group_size}"
        return convert_apart("convert_mlx.py", readable, out, str(bits), str(group_size), expected=expected)


def _name_rope_theta(config_path: Path) -> None:
    """Write the base of the rotary positions where mlx-lm's Llama looks for it.

    transformers 5 writes it into `rope_parameters`. mlx-lm 0.32.2 reads `rope_theta` alone, finds none, and silently takes
    10,000, so a model trained with another base gets worse with every token, and no error says why.
    """
    config = json.loads(config_path.read_text("utf-8"))
    theta = config.get("rope_parameters", {}).get("rope_theta")
    if theta is not None:
        config_path.unlink()  # a link: the original stays as it is
        config_path.write_text(json.dumps(config | {"rope_theta": theta}), "utf-8")


def open_mlx(folder: Path, *, name: str = "") -> WorkerChatModel:
    """A folder of `convert_to_mlx` under MLX on the CPU, as a ChatModel. Raises RuntimesError without mlx-lm."""
    check_mlx()
    command = [sys.executable, "-P", str(WORKERS / "mlx_cpu.py"), str(folder.resolve())]
    return WorkerChatModel(command, name=name or f"MLX, {folder.name}")


def check_mlx() -> None:
    """Raise RuntimesError, saying how to get it, when mlx-lm is not in this environment."""
    if find_spec("mlx_lm") is None or find_spec("mlx") is None:
        raise RuntimesError(
            "MLX is not installed: expected mlx and mlx-lm in this environment; run `pip install 'slmops-course[runtimes]' "
            "-c constraints.txt`."
        )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
