import json
import math
import random
from dataclasses import replace

import pytest
import torch

from slmops_course import training
from slmops_course.chat import TorchChatModel, load_torch, prompt_ids
from slmops_course.tasks import Example
from slmops_course.training import (
    Row,
    TrainingError,
    TrainingSettings,
    answer_states,
    batch_indexes,
    check_settings,
    encode_rows,
    freeze_below,
    make_batch,
    next_token_loss,
    train,
)

QUICK = TrainingSettings(epochs=2, learning_rate=5e-3, batch_size=4)


@pytest.fixture
def tokenizer(loaded):
    return loaded[1]


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def no_work(model, batch):
    raise AssertionError("work started before the settings were checked")


class TestRows:
    def test_a_row_is_the_prompt_the_answer_and_the_end_token(self, rows, tokenizer, tiny_task):
        example, row = tiny_task.splits["train"][0], rows[0]
        assert row.ids[: row.answer_start] == prompt_ids(tokenizer, tiny_task.messages(example.text))
        assert tokenizer.decode(row.ids[row.answer_start : -1]) == '{"intent":"card_lost","urgency":"high"}'
        assert row.ids[-1] == tokenizer.eos_token_id

    def test_positions_and_targets_of_a_known_batch(self):
        rows = [Row([5, 6, 7, 8, 2], 3), Row([9] * 17 + [3, 2], 17)]
        batch = make_batch(rows, [0, 1])
        assert batch.ids.shape == (2, 24)
        assert batch.ids[0].tolist() == [5, 6, 7, 8, 2] + [0] * 19
        # A token is predicted at the place before it; row 1 begins at 24 in the flattened ids.
        assert batch.positions.tolist() == [2, 3, 24 + 16, 24 + 17]
        assert batch.targets.tolist() == [8, 2, 3, 2]
        assert batch.indexes == [0, 1]

    @pytest.mark.parametrize(("length", "width"), [(2, 8), (8, 8), (9, 16), (16, 16), (17, 24)])
    def test_batches_are_padded_to_the_next_multiple_of_8(self, length, width):
        assert make_batch([Row([7] * length, 1)], [0]).ids.shape == (1, width)

    def test_each_row_is_in_one_batch_an_epoch_and_like_lengths_are_together(self):
        rows = [Row([1] * length, 1) for length in (40, 5, 38, 7, 6, 39, 8)]
        batches = batch_indexes(rows, batch_size=4, rng=random.Random(0))
        assert sorted(i for batch in batches for i in batch) == list(range(7))
        assert {1, 3, 4, 6} in [set(batch) for batch in batches]

    def test_batches_come_in_another_order_each_epoch(self):
        rng, rows = random.Random(0), [Row([1] * 5, 1)] * 20
        assert batch_indexes(rows, batch_size=4, rng=rng) != batch_indexes(rows, batch_size=4, rng=rng)


class TestLoss:
    def test_it_equals_transformers_own_loss_on_the_answer_tokens(self, model, rows):
        batch = make_batch(rows, range(len(rows)))
        labels = torch.full_like(batch.ids, -100)
        for number, row in enumerate(rows):
            labels[number, row.answer_start : len(row.ids)] = torch.tensor(row.ids[row.answer_start :])
        theirs = model(input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids), labels=labels).loss
        assert next_token_loss(model, batch).item() == pytest.approx(theirs.item(), abs=1e-5)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_no_token_sees_a_later_one_whichever_attention_computes_it(self, model, rows, attention):
        model.set_attn_implementation(attention)
        row = rows[0]
        changed_end = Row([*row.ids[:-2], 7, 8], row.answer_start)
        with torch.no_grad():
            states = [answer_states(model, make_batch([one], [0]))[:-2] for one in (row, changed_end)]
        torch.testing.assert_close(*states)

    def test_padding_does_not_change_it(self, model, rows):
        short = min(range(len(rows)), key=lambda i: len(rows[i].ids))
        alone = answer_states(model, make_batch(rows, [short]))
        long = max(range(len(rows)), key=lambda i: len(rows[i].ids))
        beside = answer_states(model, make_batch([rows[short], Row(rows[long].ids * 2, rows[long].answer_start)], [0, 1]))
        assert torch.allclose(alone, beside[: len(alone)], atol=1e-5)

    def test_it_reaches_the_embeddings_where_they_learn(self, model, rows):
        """Through the prompt's tokens as well as through the head that is tied to them."""
        batch = make_batch(rows, [0])
        model.requires_grad_(True)
        next_token_loss(model, batch).backward()
        ours = model.model.embed_tokens.weight.grad.clone()
        model.zero_grad()
        labels = torch.full_like(batch.ids, -100).flatten()
        labels[batch.positions + 1] = batch.targets
        model(input_ids=batch.ids, labels=labels.view_as(batch.ids)).loss.backward()
        assert torch.allclose(ours, model.model.embed_tokens.weight.grad, atol=1e-5)

    def test_frozen_lower_layers_keep_no_gradients(self, model, rows):
        model.model.layers[0].requires_grad_(False)
        next_token_loss(model, make_batch(rows, [0])).backward()
        assert all(p.grad is None for p in model.model.layers[0].parameters())
        assert all(p.grad is not None for p in model.model.layers[1].parameters())


class TestTraining:
    def test_the_tiny_model_learns_eight_rows_to_the_letter(self, model, tokenizer, tiny_task):
        examples = tiny_task.splits["train"][:8]
        model.requires_grad_(True)
        history = train(model, encode_rows(tokenizer, tiny_task, examples), replace(QUICK, epochs=200))
        assert history[-1]["loss"] < 0.1 * history[0]["loss"]
        with TorchChatModel.from_loaded(model, tokenizer, "tiny") as chat:
            replies = chat.generate([tiny_task.messages(example.text) for example in examples])
        assert [reply.text for reply in replies] == [tiny_task.target(example.answer) for example in examples]

    def test_same_seed_same_weights_and_another_seed_others(self, tiny_model_folder, rows):
        def tune(seed):
            model, _ = load_torch(tiny_model_folder)
            freeze_below(model, None)
            history = train(model, rows, replace(QUICK, seed=seed))
            return snapshot(model), history

        (first, history), (again, history_again), (other, _) = tune(1), tune(1), tune(2)
        assert history == history_again
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_only_the_layers_asked_for_change(self, tiny_model_folder, rows):
        model, _ = load_torch(tiny_model_folder)
        freeze_below(model, 1)
        before = snapshot(model)
        train(model, rows, QUICK)
        names = changed(model, before)
        assert any(name.startswith("model.layers.1.") for name in names)
        assert all(name.startswith(("model.layers.1.", "model.norm.")) for name in names)

    def test_updates_too_small_for_bfloat16_add_up_in_the_masters(self, tiny_model_folder, rows):
        model, _ = load_torch(tiny_model_folder, dtype="bfloat16")
        model.requires_grad_(False)
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.requires_grad_(True)
        weight.data.fill_(1.0)  # bfloat16 knows no number between 1 and 1.0078
        train(model, rows, TrainingSettings(epochs=20, learning_rate=1e-3, batch_size=4, weight_decay=0))
        assert (weight != 1.0).any()

    def test_the_history_has_one_entry_a_step_and_partial_epochs_count(self, model, rows):
        history = train(model, rows[:10], replace(QUICK, epochs=1.5))
        assert [entry["step"] for entry in history] == [0, 1, 2, 3]  # 3 steps an epoch, 4.5 rounded to even
        assert [entry["epoch"] for entry in history] == [0, 1 / 3, 2 / 3, 1]
        assert all(entry["tokens"] % 8 == 0 and math.isfinite(entry["loss"]) for entry in history)
        json.dumps(history)

    def test_a_step_in_parts_has_the_gradients_of_the_whole_step(self, model, rows):
        many = rows * 8
        longest = max(len(row.ids) for row in many)
        assert len(many) * longest > training.MICRO_BATCH_TOKENS, "the step must need more than one part"
        value, tokens = training.accumulate_gradients(model, many, list(range(len(many))), next_token_loss)
        parts = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        whole = next_token_loss(model, make_batch(many, range(len(many))))
        whole.backward()
        assert value == pytest.approx(whole.item(), rel=1e-5)
        assert tokens >= sum(len(row.ids) for row in many)
        pairs = zip(parts, (p.grad for p in model.parameters() if p.requires_grad), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)

    def test_rounded_matrices_take_few_values_and_the_rest_stays(self):
        matrix, vector = torch.randn(4, 64), torch.randn(64)
        rounded = [matrix.clone(), vector.clone()]
        training.round_weights(rounded, [matrix, vector], bits=4)
        groups = rounded[0].reshape(-1, training.GROUP_SIZE)
        assert all(2 < len(set(group.tolist())) <= 16 for group in groups)
        steps = (matrix.reshape(groups.shape).amax(1) - matrix.reshape(groups.shape).amin(1)) / 15
        assert ((rounded[0] - matrix).abs().reshape(groups.shape) <= steps[:, None] * 0.51).all()
        assert torch.equal(rounded[1], vector)

    def test_training_with_rounded_weights_helps_the_rounded_model(self, tiny_model_folder, rows):
        losses = {}
        for bits in (None, 2):
            model, _ = load_torch(tiny_model_folder)
            model.requires_grad_(False)
            model.model.layers.requires_grad_(True)
            train(model, rows, replace(QUICK, epochs=20, rounded_bits=bits))
            every = list(model.parameters())
            assert len(set(model.model.layers[0].mlp.up_proj.weight[0, :32].tolist())) > 4, "it is saved unrounded"
            training.round_weights(every, [p.detach().clone() for p in every], bits=2)
            losses[bits] = next_token_loss(model, make_batch(rows, range(len(rows)))).item()
        assert losses[2] < losses[None]

    def test_the_model_that_is_left_has_the_optimizers_own_weights_in_fp32(self, tiny_model_folder, rows):
        model, _ = load_torch(tiny_model_folder, dtype="bfloat16")
        model.requires_grad_(False)
        model.model.layers.requires_grad_(True)
        train(model, rows, QUICK)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        learned = model.model.layers[0].mlp.up_proj.weight
        assert not torch.equal(learned, learned.bfloat16().float()), "weights were left as bfloat16 holds them"

    def test_weights_that_do_not_learn_are_rounded_once_and_given_back(self, tiny_model_folder, rows, monkeypatch):
        sizes = []
        monkeypatch.setattr(training, "round_weights", lambda weights, masters, bits: sizes.append(len(weights)))
        model, _ = load_torch(tiny_model_folder)
        model.requires_grad_(False)
        model.model.layers[-1].requires_grad_(True)
        train(model, rows, replace(QUICK, epochs=3, rounded_bits=4))
        every, learned = len(list(model.parameters())), len(list(model.model.layers[-1].parameters()))
        assert sizes[0] == every
        assert set(sizes[1:]) == {learned}

    def test_very_few_rows_still_train_one_step(self, model, rows):
        assert len(train(model, rows[:1], replace(QUICK, epochs=0.1))) == 1

    def test_a_weight_that_takes_no_part_is_left_alone(self, tiny_model_folder, rows):
        model, _ = load_torch(tiny_model_folder, dtype="bfloat16")
        freeze_below(model, None)
        model.model.unused = torch.nn.Linear(2, 2, dtype=model.dtype)
        train(model, rows[:2], replace(QUICK, epochs=1))

    def test_a_loss_that_is_no_number_is_named_with_the_step_and_the_cure(self, model, rows):
        calls = []

        def loss(model, batch):
            calls.append(batch)
            return next_token_loss(model, batch) * (math.nan if len(calls) == 3 else 1)

        with pytest.raises(TrainingError, match=r"loss became nan at step 2.*lower the learning rate.*0\.005"):
            train(model, rows, QUICK, loss=loss)
        assert len(calls) == 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("epochs", 0), ("epochs", -1), ("epochs", math.inf), ("learning_rate", 0.0), ("learning_rate", math.nan),
            ("batch_size", 0), ("batch_size", 2.5), ("max_grad_norm", 0), ("warmup_share", -0.1), ("warmup_share", 1.0),
            ("weight_decay", -1), ("trained_layers", 0), ("trained_layers", 3),
            ("rounded_bits", 3),
        ],
    )  # fmt: skip
    def test_impossible_settings_are_refused_before_any_work(self, model, rows, setting, value):
        before = snapshot(model)
        with pytest.raises(TrainingError, match=f"{setting} is {value}: expected"):
            train(model, rows, replace(QUICK, **{setting: value}), loss=no_work)
        assert not changed(model, before)

    def test_no_rows_are_refused(self, model):
        with pytest.raises(TrainingError, match=r"There are no rows to train on.*train split"):
            train(model, [], QUICK, loss=no_work)

    @pytest.mark.parametrize("row", [Row([], 0), Row([5, 6], 2), Row([5, 6], 0)])
    def test_a_row_without_a_prompt_or_an_answer_is_refused_by_its_number(self, model, rows, row):
        with pytest.raises(TrainingError, match=r"Row 12 .*expected a prompt and an answer"):
            train(model, [*rows, row], QUICK, loss=no_work)

    def test_a_row_longer_than_the_model_reads_is_refused(self, model):
        with pytest.raises(TrainingError, match="longest row has 513 tokens: expected at most 512"):
            train(model, [Row([5] * 513, 2)], QUICK, loss=no_work)

    def test_a_model_with_nothing_to_learn_is_refused(self, model, rows):
        model.requires_grad_(False)
        with pytest.raises(TrainingError, match="No weight of the model learns"):
            train(model, rows, QUICK, loss=no_work)

    def test_good_settings_pass(self, model, rows):
        check_settings(model, rows, replace(QUICK, trained_layers=2, warmup_share=0.0, weight_decay=0.0))


def test_examples_without_an_answer_are_no_training_rows(tokenizer, tiny_task):
    with pytest.raises(TrainingError, match="u-1 has no answer"):
        encode_rows(tokenizer, tiny_task, [Example("u-1", "hello")])
