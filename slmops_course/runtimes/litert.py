"""LiteRT, formerly TensorFlow Lite: Google's runtime for phones and browsers. The model becomes one .litertlm file.

litert-torch converts a Hugging Face folder, and LiteRT-LM runs it: https://ai.google.dev/edge/litert. The converter needs
JAX, a compiler and pins of its own, 740 MB beyond the course's environment, so both stand in a folder of their own, which
only their processes see.
"""

import sys
from pathlib import Path

from slmops_course.models import check_model_folder
from slmops_course.runtimes.environments import install_packages, surroundings
from slmops_course.runtimes.worker import WORKERS, RuntimesError, WorkerChatModel, convert_apart

REQUIREMENTS = WORKERS / "litert" / "requirements.txt"
# Our names for the converter's recipes: what the weights are kept in. Activations are computed in floating point.
RECIPES = {"float": "none", "int8": "dynamic_wi8_afp32"}
CACHE_TOKENS = 1024  # prompt and answer together


def install_litert(folder: Path) -> Path:
    """Install LiteRT's converter and runtime into `folder`, once, from exact versions; returns `folder`.

    Raises RuntimesError when the package index does not send them.
    """
    return install_packages(folder, REQUIREMENTS)


def convert_to_litert(folder: Path, out: Path, *, environment: Path, recipe: str = "int8") -> Path:
    """Write a model folder as a LiteRT-LM file, `model.litertlm` in `out`; `environment` is `install_litert`'s.

    Example: convert_to_litert(student, Path("student-litert"), environment=install_litert(Path("build/litert")))
    Raises RuntimesError for a recipe that is not in `RECIPES`, and when the converter fails.
    """
    check_model_folder(folder)
    if recipe not in RECIPES:
        raise RuntimesError(f"There is no recipe {recipe!r} here: expected one of {', '.join(RECIPES)}.")
    return convert_apart(
        "convert_litert.py", folder, out, RECIPES[recipe], str(CACHE_TOKENS), env=surroundings(environment),
        expected="a decoder-only model that litert-torch can export",
    )  # fmt: skip


def open_litert(folder: Path, *, environment: Path, threads: int = 2, name: str = "") -> WorkerChatModel:
    """A folder of `convert_to_litert` under LiteRT-LM on the CPU, as a ChatModel; `environment` is `install_litert`'s."""
    command = [sys.executable, "-P", str(WORKERS / "litert_cpu.py"), str(folder.resolve()), str(threads)]
    return WorkerChatModel(command, name=name or f"LiteRT, {folder.name}", env=surroundings(environment))
