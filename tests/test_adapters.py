import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from slmops_course.adapters import (
    ALL_LINEAR,
    AdapterError,
    LoraSettings,
    add_lora,
    linear_shapes,
    olive_lora_passes,
    open_adapter,
    quantize_frozen,
    search_lora,
    trainable_parameters,
)
from slmops_course.chat import load_torch
from slmops_course.students import cut_student
from slmops_course.training import TrainingError, TrainingSettings, has_fast_bfloat16, train

SMALL = LoraSettings(rank=4, alpha=8)
QUICK = TrainingSettings(epochs=2, learning_rate=5e-3, batch_size=4)


@pytest.fixture
def model(loaded):
    return loaded[0]


@pytest.mark.parametrize("rank", [0, -1, 33, 1000])
def test_a_rank_the_layers_cannot_have_is_refused(model, rank):
    with pytest.raises(AdapterError, match=f"rank is {rank}: expected 1 to 32"):  # keys and values are 32 wide
        add_lora(model, LoraSettings(rank=rank))


def test_the_largest_possible_rank_is_not_refused(model):
    add_lora(model, LoraSettings(rank=32))


@pytest.mark.parametrize("layers", [0, 3, -1])
def test_more_layers_than_there_are_or_none_are_refused(model, layers):
    with pytest.raises(AdapterError, match=f"trained_layers is {layers}: expected 1 to 2"):
        add_lora(model, LoraSettings(rank=4, trained_layers=layers))


def test_modules_the_model_does_not_have_are_named(model):
    with pytest.raises(AdapterError, match=r"no linear layer named c_attn: expected .*q_proj"):
        add_lora(model, LoraSettings(rank=4, target_modules=("q_proj", "c_attn")))


def test_a_refused_adapter_leaves_the_model_as_it_was(model):
    names = set(model.state_dict())
    with pytest.raises(AdapterError):
        add_lora(model, LoraSettings(rank=0))
    assert set(model.state_dict()) == names
    assert model.dtype == torch.float32


def test_a_new_adapter_changes_nothing_yet(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model.bfloat16()(ids).logits.clone()
        add_lora(model, SMALL)
        assert torch.equal(model.bfloat16()(ids).logits, before)


def test_only_adapter_weights_learn(model, rows):
    tuned = add_lora(model, SMALL)
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    train(model, rows, QUICK)
    changed = {name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])}
    adapters = {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert adapters
    assert changed == adapters


def test_adapters_are_kept_in_the_format_of_the_base(model):
    tuned = add_lora(model, SMALL)
    assert {p.dtype for p in tuned.parameters()} == {torch.bfloat16 if has_fast_bfloat16() else torch.float32}


def test_adapters_go_into_the_top_layers_asked_for(model):
    tuned = add_lora(model, LoraSettings(rank=4, trained_layers=1))
    learning = [name for name, weight in tuned.named_parameters() if weight.requires_grad]
    assert learning
    assert all(".layers.1." in name for name in learning)


def test_merging_gives_base_plus_scaled_update(model, rows):
    tuned = add_lora(model, LoraSettings(rank=4, alpha=12))
    train(model, rows, QUICK)
    tuned.float()
    part = tuned.base_model.model.model.layers[1].mlp.up_proj
    base, b, a = part.base_layer.weight, part.lora_B["default"].weight, part.lora_A["default"].weight
    expected = (base + 12 / 4 * b @ a).detach().clone()
    assert not torch.equal(expected, base)
    merged = tuned.merge_and_unload().model.layers[1].mlp.up_proj.weight
    assert torch.allclose(merged, expected, atol=1e-6)


def test_a_saved_adapter_comes_back_and_can_be_switched_off(model, rows, tiny_model_folder, tmp_path):
    ids = torch.tensor([rows[0].ids])
    tuned = add_lora(model, SMALL)
    train(model, rows, QUICK)
    tuned.save_pretrained(tmp_path / "adapter")
    base, _ = load_torch(tiny_model_folder)
    with torch.no_grad():
        plain = base(ids).logits
        again = open_adapter(base, tmp_path / "adapter", name="desk")
        adapted = again(ids).logits
        assert not torch.allclose(adapted, plain, atol=1e-3)
        # It was trained on a base in bfloat16 where the CPU has units for it, and is used on one in fp32.
        assert (adapted - tuned.float()(ids).logits).norm() < 0.1 * (adapted - plain).norm()
        with again.disable_adapter():
            assert torch.equal(again(ids).logits, plain)


def test_a_folder_without_an_adapter_is_named(model, tmp_path):
    with pytest.raises(AdapterError, match=r"no adapter in .*adapter_config\.json"):
        open_adapter(model, tmp_path, name="desk")


def test_an_adapter_for_another_base_is_refused_before_anything_changes(model, tmp_path):
    wide = copy.deepcopy(model.config)
    wide.hidden_size = 96
    add_lora(model, SMALL).save_pretrained(tmp_path / "adapter")
    other = LlamaForCausalLM(wide)
    before = list(other.state_dict())
    with pytest.raises(AdapterError, match=r"has 64 for a side of model\.layers\.0\..* and the model has 96: expected"):
        open_adapter(other, tmp_path / "adapter", name="desk")
    assert list(other.state_dict()) == before


def test_an_adapter_for_a_deeper_base_is_refused(model, tiny_model_folder, tmp_path):
    add_lora(model, SMALL).save_pretrained(tmp_path / "adapter")
    shallow = cut_student(load_torch(tiny_model_folder)[0], [0])
    with pytest.raises(AdapterError, match=r"for a side of model\.layers\.1\..* and the model has no such layer"):
        open_adapter(shallow, tmp_path / "adapter", name="desk")


class TestQuantizedBase:
    def test_only_frozen_matrices_are_packed_and_answers_stay_near(self, model, rows):
        ids = torch.tensor([rows[0].ids])
        add_lora(model, SMALL)
        with torch.no_grad():
            before = model(ids).logits.float()
        whole = sum(p.numel() * p.element_size() for p in model.model.layers.parameters())
        quantize_frozen(model)
        packed = model.model.layers[0].mlp.up_proj
        assert packed.base_layer.weight.dtype == torch.uint8
        assert packed.lora_A["default"].weight.is_floating_point()
        with torch.no_grad():
            after = model(ids).logits.float()
        assert not torch.equal(before, after)
        assert (after - before).norm() < 0.5 * before.norm()
        assert sum(p.numel() * p.element_size() for p in model.model.layers.parameters()) < 0.6 * whole

    def test_adapters_learn_beside_a_packed_base_that_stays_as_it_was(self, model, rows):
        add_lora(model, SMALL)
        quantize_frozen(model)
        before = model.model.layers[0].mlp.up_proj.base_layer.weight.clone()
        history = train(model, rows, replace(QUICK, epochs=20))
        assert history[-1]["loss"] < 0.9 * history[0]["loss"]
        assert torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight, before)


def test_dora_learns_the_lengths_too(model, rows):
    tuned = add_lora(model, replace(SMALL, use_dora=True))
    lengths = [name for name, p in tuned.named_parameters() if p.requires_grad and "magnitude" in name]
    assert len(lengths) == 2 * len(SMALL.target_modules)
    before = {name: p.clone() for name, p in tuned.named_parameters() if name in lengths}
    train(model, rows, QUICK)
    assert any(not torch.equal(p, before[name]) for name, p in tuned.named_parameters() if name in before)


def test_parameters_that_learn_are_counted(model):
    total = sum(p.numel() for p in model.parameters())
    assert trainable_parameters(model) == (total, total)
    tuned = add_lora(model, SMALL)
    learns, all_parameters = trainable_parameters(tuned)
    assert all_parameters == total + learns
    # Each adapter has rank x (inputs + outputs) weights; the tiny model has two layers.
    shapes = linear_shapes(model.config)
    assert learns == 2 * 4 * sum(inputs + outputs for inputs, outputs in shapes.values())


def test_the_shapes_told_by_a_configuration_are_the_models_own(model, tiny_model_folder):
    layer = model.model.layers[0]
    real = {
        name: (part.in_features, part.out_features)
        for block in (layer.self_attn, layer.mlp)
        for name, part in block.named_children()
        if isinstance(part, torch.nn.Linear)
    }
    assert linear_shapes(AutoConfig.from_pretrained(tiny_model_folder)) == real
    assert tuple(real) == ALL_LINEAR


class TestOlivePasses:
    def test_the_keys_are_olives_own(self):
        from olive.hardware import DEFAULT_CPU_ACCELERATOR
        from olive.passes.pytorch.lora import LoRA

        passes = olive_lora_passes(SMALL, QUICK)
        assert list(passes) == ["tune", "merge"]
        assert set(passes["tune"]) - {"type"} <= set(LoRA.default_config(DEFAULT_CPU_ACCELERATOR))
        assert "lora_alpha" not in passes["tune"]
        assert passes["merge"] == {"type": "MergeAdapterWeights"}

    def test_the_training_arguments_are_transformers_own(self):
        from transformers import TrainingArguments

        known = set(TrainingArguments.__dataclass_fields__)
        assert set(olive_lora_passes(SMALL, QUICK)["tune"]["training_args"]) <= known

    def test_the_settings_arrive(self):
        tune = olive_lora_passes(LoraSettings(rank=7, alpha=9, target_modules=("q_proj",)), QUICK)["tune"]
        assert (tune["r"], tune["alpha"], tune["target_modules"]) == (7, 9, ["q_proj"])
        assert tune["train_data_config"] == "rows"
        arguments = tune["training_args"]
        assert arguments["num_train_epochs"] == 2
        assert arguments["learning_rate"] == 5e-3
        assert arguments["per_device_train_batch_size"] == 4


class TestSearch:
    def test_it_tries_what_it_was_asked_to_and_reports_the_best(self, tiny_model_folder, rows):
        study = search_lora(tiny_model_folder, rows[:8], rows[8:], trials=4, rounds=3)
        assert len(study.trials) == 4
        assert {trial.state.name for trial in study.trials} <= {"COMPLETE", "PRUNED"}
        assert set(study.best_params) == {"rank", "learning_rate"}
        done = [trial.value for trial in study.trials if trial.state.name == "COMPLETE"]
        assert study.best_value == min(done)
        assert math.isfinite(study.best_value)

    def test_a_trial_that_falls_behind_is_stopped_early(self, tiny_model_folder, rows):
        study = search_lora(tiny_model_folder, rows[:8], rows[8:], trials=10, rounds=3)
        pruned = [trial for trial in study.trials if trial.state.name == "PRUNED"]
        assert pruned
        assert all(len(trial.intermediate_values) < 3 for trial in pruned)

    def test_after_the_last_round_no_trial_is_pruned(self, tiny_model_folder, rows):
        study = search_lora(tiny_model_folder, rows[:8], rows[8:], trials=8, rounds=1)
        assert {trial.state.name for trial in study.trials} == {"COMPLETE"}

    def test_the_same_seed_searches_the_same_places(self, tiny_model_folder, rows):
        first, again = (search_lora(tiny_model_folder, rows[:4], rows[8:], trials=2, rounds=1) for _ in range(2))
        assert [t.params for t in first.trials] == [t.params for t in again.trials]

    def test_a_search_that_was_stopped_goes_on_where_it_was(self, tiny_model_folder, rows, tmp_path):
        def search(trials, rows=rows[:4]):
            return search_lora(tiny_model_folder, rows, held_out, trials=trials, rounds=1, storage=tmp_path / "new" / "s.log")

        held_out = rows[8:]
        first = [(t.number, t.params, t.value) for t in search(2).trials]
        whole = [(t.number, t.params, t.value) for t in search(4).trials]
        assert len(first) == 2
        assert whole[:2] == first
        assert len({str(params) for _, params, _ in whole}) == 4, "a search that goes on must not repeat what it tried"
        assert len(search(4).trials) == 4
        assert len(search(1, rows=rows[:5]).trials) == 1, "other rows are another search"

    def test_held_out_rows_are_needed(self, tiny_model_folder, rows):
        with pytest.raises(TrainingError, match="no held-out rows"):
            search_lora(tiny_model_folder, rows, [], trials=1)
