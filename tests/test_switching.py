import json
import shutil

import numpy as np
import pytest
import torch

from slmops_course.adapters import AdapterError, LoraSettings, add_lora, forget_base_folder, open_adapter
from slmops_course.benchmark import BenchmarkError, run_apart
from slmops_course.chat import load_torch
from slmops_course.experiments.desks import cross_talk, even_share
from slmops_course.serving import GenAIChatModel
from slmops_course.switching import (
    SwitchingChatModel,
    adapter_widths,
    add_adapter,
    base_widths,
    build_onnx,
    export_switching,
    node_name,
    read_adapter,
)

RANKS = {"payments": 4, "clinic": 4, "repair": 2}


def write_adapter(base, folder, *, seed, std=0.1, **settings):
    """An adapter with random weights, so strong that it changes what the model says."""
    model, _ = load_torch(base)
    tuned = add_lora(model, LoraSettings(**{"rank": 4, "alpha": 8} | settings))
    torch.manual_seed(seed)
    for name, weight in tuned.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=std)
    tuned.save_pretrained(folder)
    forget_base_folder(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_model_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    ranks = enumerate(RANKS.items())
    return {name: write_adapter(tiny_model_folder, root / name, seed=i, rank=rank) for i, (name, rank) in ranks}


@pytest.fixture(scope="module", params=["fp32", "int4"])
def exported(request, tiny_model_folder, adapters, tmp_path_factory):
    """A switching model in a precision. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("switching") / request.param
    export_switching(folder, base=tiny_model_folder, adapters=adapters, precision=request.param)
    return folder


@pytest.fixture(scope="module")
def model(exported):
    with SwitchingChatModel(exported) as model:
        yield model


@pytest.fixture(scope="module")
def asks(tiny_task):
    return [tiny_task.messages(e.text) for e in (*tiny_task.splits["test"], *tiny_task.splits["dev"])]


@pytest.fixture(scope="module")
def merged(tiny_model_folder, adapters):
    """PyTorch's models with each adapter merged, and the base without one."""
    found = {}
    for name in (None, *adapters):
        found[name], _ = load_torch(tiny_model_folder)
        if name:
            found[name] = open_adapter(found[name], adapters[name], name=name).merge_and_unload()
    return found


def next_logits(merged, ids):
    with torch.no_grad():
        return merged(torch.tensor([ids])).logits[0, -1].numpy()


def greedy_text(merged, model, ask):
    """What PyTorch answers to a message in eight tokens, in the runtime's spelling: it ends a text at an incomplete letter."""
    ids = model.prompt_ids(ask)
    for _ in range(8):
        ids = [*ids, int(next_logits(merged, ids).argmax())]
    assert model._end not in ids[-8:]
    return model._tokenizer.decode(ids[-8:])


def texts(replies):
    return [reply.text for reply in replies]


def test_switched_adapters_answer_as_the_merged_models_do(model, merged, asks):
    if model.name == "int4":
        pytest.skip("A rounded base answers otherwise than PyTorch's.")
    for name in ("clinic", "payments", "repair", None, "clinic"):
        found = texts(model.generate(asks, adapter=name, max_new_tokens=8))
        assert found == [greedy_text(merged[name], model, ask) for ask in asks]


def test_each_adapter_answers_in_its_own_way(model, asks):
    replies = [texts(model.generate(asks, adapter=name, max_new_tokens=8)) for name in (None, *RANKS)]
    assert len({tuple(one) for one in replies}) == 1 + len(RANKS)


def runtime_logits(model, adapter, ids):
    desk = model.desk(adapter)
    params = desk._genai.GeneratorParams(desk._model)
    params.set_search_options(max_length=len(ids) + 1)
    generator = desk._genai.Generator(desk._model, params)
    generator.append_tokens(np.array([ids], dtype=np.int32))
    return np.array(generator.get_logits()).ravel()


def test_next_tokens_are_as_probable_as_in_the_merged_model(model, merged, asks):
    """In int4 the base is rounded and the adapter is not, so of all merged models its own is still the most alike."""
    for name in merged:
        for ask in asks:
            ids = model.prompt_ids(ask)
            found = runtime_logits(model, name, ids)
            if model.name == "fp32":
                assert np.allclose(found, next_logits(merged[name], ids), atol=1e-4)
            alike = {other: np.corrcoef(found, next_logits(merged[other], ids))[0, 1] for other in merged}
            assert max(alike, key=alike.get) == name
            assert alike[name] > 0.9


def test_the_base_is_the_same_before_and_after_a_switch(exported, asks):
    with SwitchingChatModel(exported) as model:
        before = texts(model.generate(asks, max_new_tokens=8))
        model.generate(asks, adapter="payments", max_new_tokens=8)
        assert texts(model.generate(asks, adapter=None, max_new_tokens=8)) == before


def test_without_an_adapter_the_model_is_the_plain_export(tiny_model_folder, model, asks, tmp_path):
    if model.name == "int4":
        pytest.skip("Once is enough.")
    build_onnx(tmp_path / "plain", model=tiny_model_folder, precision="fp32")
    with GenAIChatModel(tmp_path / "plain") as plain:
        assert texts(plain.generate(asks, max_new_tokens=8)) == texts(model.generate(asks, max_new_tokens=8))


def test_messages_of_several_desks_are_answered_in_their_order(model, asks):
    names = ["clinic", "payments", None, "repair", "clinic", "repair", "payments", None, "clinic"]
    expected = [model.desk(name).reply(ask, max_new_tokens=8).text for name, ask in zip(names, asks, strict=True)]
    assert texts(model.generate(asks, adapter=names, max_new_tokens=8)) == expected


def test_one_message_asked_of_all_desks_at_once_has_each_desks_answer(model, asks):
    replies = model.generate([asks[0]] * 6, adapter=[*RANKS] * 2, max_new_tokens=8)
    assert texts(replies[:3]) == texts(replies[3:])
    assert len(set(texts(replies))) == 3


def test_a_list_of_adapters_of_another_length_is_refused(model, asks):
    with pytest.raises(ValueError, match="zip"):
        model.generate(asks, adapter=["clinic"])


def test_no_messages_have_no_replies(model):
    assert model.generate([], adapter="clinic") == []


@pytest.mark.parametrize("name", ["dentist", "", "Clinic"])
def test_an_unknown_adapter_is_refused_with_those_that_are_known(model, asks, name):
    with pytest.raises(AdapterError, match=rf"no adapter {name!r}: expected one of payments, clinic, repair; "):
        model.generate(asks, adapter=name)


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copied")


def test_an_adapter_can_be_added_later(copied, tiny_model_folder, asks, tmp_path):
    before = (copied / "model.onnx").read_bytes()
    add_adapter(copied, "late", write_adapter(tiny_model_folder, tmp_path / "late", seed=9, rank=8))
    assert (copied / "model.onnx").read_bytes() == before
    with SwitchingChatModel(copied) as model:
        assert model.adapters == (*RANKS, "late")
        late, clinic = (texts(model.generate(asks, adapter=name, max_new_tokens=8)) for name in ("late", "clinic"))
        assert late != clinic


def test_an_adapter_in_fewer_layers_is_refused(copied, tiny_model_folder, tmp_path):
    fewer = write_adapter(tiny_model_folder, tmp_path / "fewer", seed=9, trained_layers=1)
    with pytest.raises(AdapterError, match=r"'fewer' model.layers.0.\S+ is absent: expected it \d+ wide"):
        add_adapter(copied, "fewer", fewer)
    assert not (copied / "fewer.onnx_adapter").exists()


@pytest.mark.parametrize("how", ["foreign", "changed", "missing"])
def test_a_file_that_was_not_made_for_this_model_is_refused(copied, how):
    path = copied / "clinic.onnx_adapter"
    if how == "foreign":
        shutil.copy(path, copied / "stranger.onnx_adapter")
    elif how == "changed":
        shutil.copy(copied / "payments.onnx_adapter", path)
    else:
        path.unlink()
    with pytest.raises(AdapterError, match=rf"^{'stranger' if how == 'foreign' else 'clinic'}.onnx_adapter in .*add_adapter"):
        SwitchingChatModel(copied)


def test_a_model_that_takes_no_adapters_is_refused(copied):
    (copied / "adapters.json").unlink()
    with pytest.raises(AdapterError, match=r"has no adapters.json: expected a model that takes adapters"):
        SwitchingChatModel(copied)


def other_base(tiny_model_folder, folder):
    """Half as wide in its inner layers as the tiny model."""
    from transformers import AutoConfig, LlamaForCausalLM

    shutil.copytree(tiny_model_folder, folder)
    config = AutoConfig.from_pretrained(folder)
    config.intermediate_size = 64
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_an_adapter_of_another_base_is_refused_before_anything_is_built(tiny_model_folder, adapters, tmp_path):
    stranger = write_adapter(other_base(tiny_model_folder, tmp_path / "other"), tmp_path / "stranger", seed=9)
    message = r"'stranger' model.layers.0.mlp.down_proj.lora_A.\S+ is 64 wide: expected it 128 wide"
    for given in ({"stranger": stranger}, {**adapters, "stranger": stranger}):
        with pytest.raises(AdapterError, match=message):
            export_switching(tmp_path / "out", base=tiny_model_folder, adapters=given)
    assert not (tmp_path / "out").exists()


def test_exporting_no_adapter_is_refused(tiny_model_folder, tmp_path):
    with pytest.raises(AdapterError, match="no adapters to export"):
        export_switching(tmp_path / "out", base=tiny_model_folder, adapters={})


def test_a_precision_the_builder_does_not_make_for_a_cpu_is_refused(tiny_model_folder, adapters, tmp_path):
    with pytest.raises(AdapterError, match="no precision 'fp16' here: expected one of fp32, int4"):
        export_switching(tmp_path / "out", base=tiny_model_folder, adapters=adapters, precision="fp16")


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"use_rslora": True}, {"peft_type": "IA3"}]
)
def test_other_kinds_of_adapter_are_refused(adapters, tmp_path, change):
    odd = shutil.copytree(adapters["clinic"], tmp_path / "odd")
    config = json.loads((odd / "adapter_config.json").read_text("utf-8")) | change
    (odd / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(AdapterError, match=r"is of the kind .*expected plain LORA"):
        read_adapter(odd)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"no adapter in .*: expected adapter_config.json"):
        read_adapter(tmp_path)


def test_matrices_are_turned_scaled_and_named_as_the_graph_takes_them(tiny_model_folder, tmp_path):
    folder = write_adapter(tiny_model_folder, tmp_path / "one", seed=1, alpha=12, trained_layers=1)
    weights = read_adapter(folder)
    tuned = open_adapter(load_torch(tiny_model_folder)[0], folder, name="one").base_model.model.model.layers[1].mlp.up_proj
    a, b = (weights[f"model.layers.1.mlp.up_proj.lora_{matrix}.MatMul.weight"] for matrix in "AB")
    assert np.allclose((a @ b).T, tuned.get_delta_weight("one").detach().numpy(), atol=1e-5)
    assert len(weights) == 14  # two for each of seven layers
    assert {value.dtype for value in weights.values()} == {np.dtype("float32")}


def test_an_adapter_in_all_layers_has_just_the_matrices_that_the_base_gives_room_for(tiny_model_folder, adapters):
    assert adapter_widths(read_adapter(adapters["clinic"])) == base_widths(tiny_model_folder)


def test_a_weight_names_its_node():
    assert node_name("model.layers.12.attn.q_proj.lora_A.MatMul.weight") == "/model/layers.12/attn/q_proj/lora_A/MatMul"


def test_an_even_share_takes_the_first_of_each_label_then_the_second(tiny_task):
    train = tiny_task.splits["train"]  # four of each of three labels, one label after the other
    assert [e.id for e in even_share(tiny_task, train, 7)] == [f"train-{n}" for n in (0, 4, 8, 1, 5, 9, 2)]
    assert even_share(tiny_task, train, 100) == [train[n] for n in (0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11)]
    assert even_share(tiny_task, train, 0) == []


def test_cross_talk_asks_every_adapter_every_desk_and_counts_equal_replies(exported, model, tiny_task):
    tests = dict.fromkeys(("clinic", "repair"), tiny_task.splits["dev"])
    own = {name: texts(model.generate([tiny_task.messages(e.text) for e in tests[name]], adapter=name)) for name in tests}
    own["repair"][1] = "something else"
    rows = cross_talk(exported, dict.fromkeys(tests, tiny_task), tests, own)
    asked = [(row["adapter"], row["desk"]) for row in rows if row["figure"] == "cross-talk"]
    assert asked == [("clinic", "clinic"), ("clinic", "repair"), ("repair", "clinic"), ("repair", "repair")]
    assert {row["adapter"]: row["share"] for row in rows if row["figure"] == "equal"} == {"clinic": 1, "repair": 2 / 3}


def test_memory_and_times_are_measured_in_a_process_of_its_own(exported, tiny_task):
    asks = {name: [tiny_task.messages(e.text) for e in tiny_task.splits["dev"]] for name in ("clinic", "repair")}
    found = run_apart("slmops_course.experiments.desks", {"folders": [str(exported)], "asks": asks}, what="Measuring")
    assert found["memory_bytes"] > (exported / "model.onnx.data").stat().st_size
    assert 0 < found["time_to_first_token_in_turns_s"] <= found["latency_in_turns_s"]


def test_a_measurement_that_fails_says_why(tmp_path):
    with pytest.raises(BenchmarkError, match=r"Measuring failed \(.*has no adapters\.json.*run it again alone"):
        run_apart("slmops_course.experiments.desks", {"folders": [str(tmp_path)], "asks": {}}, what="Measuring")
