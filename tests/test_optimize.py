import json
import math

import onnx
import pytest
from onnx import TensorProto, helper

from slmops_course.models import ModelError
from slmops_course.olive import OliveError, collect, olive_config, plan_of_optimize, portable, run_olive, write_conversations
from slmops_course.optimize import (
    MODEL_FILES,
    RECIPES,
    ROBUST,
    VARIANTS,
    OptimizeError,
    model_bytes,
    optimize,
    parameter_count,
    recipe_passes,
    weight_bytes,
)
from slmops_course.training import encode_rows


@pytest.fixture(scope="session")
def tiny_formats(tiny_model_folder, tiny_task, tiny_onnx_folder, tmp_path_factory):
    """The tiny model in fp32, int8 and int4."""
    root = tmp_path_factory.mktemp("formats")
    for recipe in ("fp32", "int8"):
        optimize(recipe, model=tiny_model_folder, task=tiny_task, folder=root / recipe)
    return {"fp32": root / "fp32", "int8": root / "int8", "int4": tiny_onnx_folder}


# --- Recipes ---


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_ends_with_an_onnx_model_whose_tied_matrix_is_kept_once(recipe):
    types = [p["type"] for p in recipe_passes(recipe).values()]
    last = ["OnnxFloatToFloat16"] if recipe == "fp16" else []
    assert types[types.index("ModelBuilder") :] == ["ModelBuilder", "GraphSurgeries", *last]


def test_only_gptq_needs_data():
    needing = {r for r in RECIPES if any("data_config" in p for p in recipe_passes(r).values())}
    assert needing == {"int4-gptq"}


def test_two_bits_go_only_to_matrices_that_bear_them():
    overrides = recipe_passes("int2-mixed", layers=2)["quantize"]["overrides"]
    assert set(overrides) == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ROBUST}
    assert all(choice == {"bits": 2} for choice in overrides.values())


def test_mixed_precision_chooses_before_it_quantizes():
    for recipe in VARIANTS:
        passes = recipe_passes(recipe, layers=2)
        assert passes["quantize"]["bits"] == (2 if recipe == "int2-rtn" else 4)
        assert (next(iter(passes)) == "choose") == ("mixed" in recipe and recipe != "int2-mixed")


def test_an_unknown_recipe_is_refused_with_the_known_ones_named():
    with pytest.raises(OptimizeError, match=r"no recipe 'int3'.*fp32, fp16, int8, int4-rtn.*int2-rtn"):
        recipe_passes("int3")


def test_an_unknown_recipe_writes_nothing(tmp_path, tiny_task):
    with pytest.raises(OptimizeError):
        optimize("int3", model=tmp_path / "model", task=tiny_task, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- What comes out ---


def test_fewer_bits_give_smaller_files(tiny_formats):
    sizes = {name: model_bytes(folder) for name, folder in tiny_formats.items()}
    assert sizes["int4"] < sizes["int8"] < sizes["fp32"]


def test_int8_weights_take_twice_the_bytes_of_int4_and_a_quarter_of_fp32(tiny_formats):
    weights = {name: weight_bytes(folder)["weights"] for name, folder in tiny_formats.items()}
    assert weights["int8"] == 2 * weights["int4"]
    assert weights["int8"] == pytest.approx(weights["fp32"] / 4, rel=0.01)  # norms count as other


def test_every_group_of_32_weights_has_one_scale(tiny_formats):
    stored = weight_bytes(tiny_formats["int8"])
    assert stored["scales"] == stored["weights"] / 32 * 4


def test_all_that_a_file_stores_is_counted(tiny_formats):
    for folder in tiny_formats.values():
        graph_bytes = (folder / "model.onnx").stat().st_size
        assert 0 <= model_bytes(folder) - sum(weight_bytes(folder).values()) <= graph_bytes


def test_an_onnx_folder_holds_what_is_served_and_how_it_was_made(tiny_onnx_folder):
    names = {path.name for path in tiny_onnx_folder.iterdir()}
    assert {name for name in MODEL_FILES if "*" not in name} | {"chat_template.jinja", "olive.json"} == names


def test_the_kept_configuration_names_no_folder_of_this_machine(tiny_onnx_folder, tiny_model_folder):
    config = json.loads((tiny_onnx_folder / "olive.json").read_text("utf-8"))
    assert config["input_model"]["model_path"] == "MODEL"
    assert config["output_dir"] == "WORK/out"
    assert str(tiny_model_folder.parent) not in json.dumps(config)


@pytest.mark.slow
def test_gptq_calibrates_on_the_tasks_own_messages_without_a_hub(tmp_path, tiny_model_folder, tiny_task):
    optimize("int4-gptq", model=tiny_model_folder, task=tiny_task, folder=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "olive.json").read_text("utf-8"))
    assert config["data_configs"][0]["load_dataset_config"]["data_files"] == "WORK/rows.jsonl"
    assert config["passes"]["quantize"]["type"] == "Gptq"
    assert (tmp_path / "out" / "model.onnx.data").is_file()


def test_parameters_that_are_tied_count_once(tiny_model_folder):
    config = json.loads((tiny_model_folder / "config.json").read_text("utf-8"))
    assert parameter_count(tiny_model_folder) < 2 * config["vocab_size"] * config["hidden_size"] + 100_000
    assert parameter_count(tiny_model_folder) * 4 == pytest.approx(model_bytes(tiny_model_folder), rel=0.05)


def test_the_size_of_a_folder_without_a_model_is_zero(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert model_bytes(tmp_path) == 0


def test_stored_numbers_are_sorted_into_kinds(tmp_path):
    shapes = {"w.qweight": [10, 50], "w.scales": [20], "w.qzeros": [10], "cos_cache": [4, 4], "norm.weight": [8]}
    kinds = {"w.qweight": TensorProto.UINT8, "w.qzeros": TensorProto.UINT8}
    tensors = [
        helper.make_tensor(name, kinds.get(name, TensorProto.FLOAT), dims, [1] * math.prod(dims))
        for name, dims in shapes.items()
    ]
    onnx.save(helper.make_model(helper.make_graph([], "numbers", [], [], initializer=tensors)), tmp_path / "model.onnx")
    assert weight_bytes(tmp_path) == {"weights": 500, "scales": 80, "zero points": 10, "other": 64 + 32}


# --- Olive ---


def test_a_configuration_has_data_only_where_rows_are_given(tmp_path):
    passes = recipe_passes("int4-gptq")
    without = olive_config(model=tmp_path, output=tmp_path / "out", passes=passes)
    given = olive_config(model=tmp_path, output=tmp_path / "out", passes=passes, rows=tmp_path / "rows.jsonl", max_tokens=7)
    assert "data_configs" not in without
    assert given["data_configs"][0]["name"] == passes["quantize"]["data_config"]
    assert given["data_configs"][0]["pre_process_data_config"]["max_seq_len"] == 7
    assert list(given["passes"]) == ["quantize", "embeddings", "build", "tie"]


def test_calibration_rows_are_whole_conversations(tmp_path, tiny_model_folder, tiny_task):
    from transformers import AutoTokenizer

    examples = tiny_task.splits["train"][:3]
    path = write_conversations(tmp_path / "rows.jsonl", tiny_task, examples, AutoTokenizer.from_pretrained(tiny_model_folder))
    rows = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    assert len(rows) == 3
    for row, example in zip(rows, examples, strict=True):
        assert example.text in row
        assert tiny_task.target(example.answer) in row


def test_olive_cuts_conversations_into_the_tokens_that_we_train_on(tmp_path, loaded, tiny_task):
    from datasets import load_dataset
    from olive.data.component.text_generation import text_gen_pre_process

    examples, tokenizer = tiny_task.splits["train"][:3], loaded[1]
    path = write_conversations(tmp_path / "rows.jsonl", tiny_task, examples, tokenizer)
    config = olive_config(model=tmp_path, output=tmp_path / "out", passes={}, rows=path)["data_configs"][0]
    texts = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    theirs = text_gen_pre_process(texts, tokenizer, dict(config["pre_process_data_config"]))
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]  # the template puts one after the end token
    for number, ours in enumerate(encode_rows(tokenizer, tiny_task, examples)):
        assert [int(token) for token in theirs[number][0]["input_ids"]] == ours.ids + line_break


def test_when_olive_fails_its_last_words_are_in_the_error(tmp_path):
    config = olive_config(model=tmp_path / "no-model", output=tmp_path / "out", passes={"bad": {"type": "NoSuchPass"}})
    with pytest.raises(OliveError, match=r"ended with code 1 \(.*nosuchpass.* not found.*expected.*slmops doctor"):
        run_olive(config, tmp_path)
    assert "NoSuchPass".lower() in (tmp_path / "olive.log").read_text("utf-8").lower()


def test_when_olive_leaves_no_model_that_is_said_and_its_log_stays(tmp_path):
    work = tmp_path / "work"
    (work / "out").mkdir(parents=True)
    (work / "olive.log").write_text("done")
    with pytest.raises(OliveError, match=r"without a model: expected genai_config\.json"):
        collect(work, tmp_path, marker="genai_config.json", config={}, model=tmp_path)
    assert (work / "olive.log").exists()


def test_collecting_takes_the_wanted_files_and_removes_the_work_folder(tmp_path):
    built = tmp_path / "folder" / "work" / "out" / "model"
    built.mkdir(parents=True)
    for name in ("genai_config.json", "model.onnx", "unwanted.bin"):
        (built / name).write_text(name)
    folder = tmp_path / "folder"
    collect(folder / "work", folder, marker="genai_config.json", config={"a": str(folder.resolve() / "work")},
            model=tmp_path / "model", names=("genai_config.json", "model.onnx"))  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == ["genai_config.json", "model.onnx", "olive.json"]
    assert json.loads((folder / "olive.json").read_text("utf-8")) == {"a": "WORK"}


def test_folders_in_a_configuration_become_names(tmp_path):
    assert portable({"path": [str(tmp_path.resolve() / "x")]}, HERE=tmp_path) == {"path": ["HERE/x"]}


def test_the_one_command_writes_a_plan_and_runs_nothing(tiny_model_folder):
    before = sorted(path.name for path in tiny_model_folder.iterdir())
    plan = plan_of_optimize(tiny_model_folder)
    assert plan["passes"]["model_builder"]["int4_block_size"] == 32
    assert plan["input_model"]["model_path"] == "MODEL"
    assert sorted(path.name for path in tiny_model_folder.iterdir()) == before


def test_the_one_command_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="has no config"):
        plan_of_optimize(tmp_path, precision="int4")
