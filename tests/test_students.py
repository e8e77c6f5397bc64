import copy

import pytest
import torch

from slmops_course.chat import load_torch, prompt_ids
from slmops_course.students import (
    StudentError,
    cut_student,
    cut_width,
    kept_layers,
    kept_tokens,
    parameters_by_part,
    save_model,
    trim_tokenizer,
)


def test_a_student_keeps_the_first_layer_the_last_and_some_between():
    assert kept_layers(30, 8) == [0, 4, 8, 12, 17, 21, 25, 29]


def test_a_student_as_deep_as_its_teacher_keeps_every_layer():
    assert kept_layers(5, 5) == [0, 1, 2, 3, 4]


def test_the_shallowest_student_keeps_the_first_and_the_last_layer():
    assert kept_layers(30, 2) == [0, 29]


def test_a_student_of_both_ends_keeps_nothing_between_them():
    assert kept_layers(30, 8, "ends") == [0, 1, 2, 3, 26, 27, 28, 29]
    assert kept_layers(30, 5, "ends") == [0, 1, 2, 28, 29]
    assert kept_layers(4, 4, "ends") == [0, 1, 2, 3]


def test_another_choice_of_layers_is_refused():
    with pytest.raises(StudentError, match="Which layers to keep is 'middle': expected 'even' or 'ends'"):
        kept_layers(30, 8, "middle")


@pytest.mark.parametrize("kept", ["even", "ends"])
@pytest.mark.parametrize("depth", [2, 3, 7, 12, 29, 30])
def test_kept_layers_are_distinct_and_in_order(depth, kept):
    layers = kept_layers(30, depth, kept)
    assert len(layers) == depth
    assert layers == sorted(set(layers))
    assert set(layers) <= set(range(30))


@pytest.mark.parametrize("depth", [-1, 0, 1, 31])
def test_a_depth_that_cannot_be_cut_is_refused(depth):
    with pytest.raises(StudentError, match=rf"A student of {depth} layers .* expected 2 to 30"):
        kept_layers(30, depth)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_torch(tiny_model_folder)[1]


@pytest.fixture
def teacher(tiny_model_folder):
    """The tiny model, with its two layers made five, all different."""
    from transformers import LlamaForCausalLM

    config = load_torch(tiny_model_folder)[0].config
    config.num_hidden_layers = 5
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ids(tokenizer, tiny_task):
    return torch.tensor([prompt_ids(tokenizer, tiny_task.messages("I lost my card on the bus"))])


def logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits


def test_a_cut_student_has_the_teachers_weights_in_the_right_places(teacher):
    student = cut_student(teacher, [0, 2, 4])
    assert len(student.model.layers) == student.config.num_hidden_layers == 3
    for place, layer in enumerate((0, 2, 4)):
        theirs, ours = (m.state_dict() for m in (teacher.model.layers[layer], student.model.layers[place]))
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert torch.equal(student.model.norm.weight, teacher.model.norm.weight)


def test_a_cut_students_weights_are_copies(teacher):
    student = cut_student(teacher, [0, 4])
    before = teacher.model.layers[4].mlp.down_proj.weight.clone()
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight.zero_()
    assert torch.equal(teacher.model.layers[4].mlp.down_proj.weight, before)
    assert teacher.config.num_hidden_layers == 5


def test_a_cut_students_head_stays_tied_to_its_embeddings(teacher):
    student = cut_student(teacher, [0, 4])
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_a_cut_student_gives_finite_logits_that_are_not_the_teachers(teacher, ids):
    found = logits(cut_student(teacher, [0, 2, 4]), ids)
    assert found.shape == logits(teacher, ids).shape
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, logits(teacher, ids))


def test_a_student_of_full_depth_gives_the_teachers_very_logits(teacher, ids):
    assert torch.equal(logits(cut_student(teacher, kept_layers(5, 5)), ids), logits(teacher, ids))


def test_layers_in_another_order_are_another_model(teacher, ids):
    assert not torch.allclose(logits(cut_student(teacher, [0, 1, 3, 2, 4]), ids), logits(teacher, ids))


def test_no_weight_of_a_cut_student_is_without_values(teacher):
    student = cut_student(teacher, [0, 4])
    assert not any(value.is_meta for value in (*student.parameters(), *student.buffers()))


def test_a_saved_student_answers_as_it_did_before(teacher, tokenizer, ids, tmp_path):
    student = cut_student(teacher, [0, 4])
    save_model(student, tokenizer, tmp_path / "student")
    again, _ = load_torch(tmp_path / "student")
    assert torch.equal(logits(again, ids), logits(student, ids))


def test_parameters_are_all_counted_and_once(teacher):
    parts = parameters_by_part(teacher)
    assert sum(parts.values()) == teacher.num_parameters()
    assert parts["embeddings"] == teacher.model.embed_tokens.weight.numel()
    assert parts["other"] == teacher.model.norm.weight.numel()


def test_a_cut_takes_parameters_from_the_layers_alone(teacher):
    whole, cut = parameters_by_part(teacher), parameters_by_part(cut_student(teacher, [0, 4]))
    assert cut == {**whole, "layers": whole["layers"] * 2 // 5}


TEXTS = ["I lost my card on the bus", '{"intent":"card_lost"}']


@pytest.fixture
def kept(tokenizer):
    return kept_tokens(tokenizer, TEXTS, 0)


def test_a_trimmed_tokenizer_cuts_the_texts_it_was_made_for_into_the_same_tokens(tokenizer, kept):
    trimmed = trim_tokenizer(tokenizer, kept)
    for text in TEXTS:
        assert [kept[number] for number in trimmed(text)["input_ids"]] == tokenizer(text)["input_ids"]
    assert len(trimmed) == len(kept) < len(tokenizer)


@pytest.mark.parametrize("text", ["entirely other words, 12345", "नमस्ते 😀", "\x00\x01\n", ""])
def test_a_trimmed_tokenizer_still_writes_any_text(tokenizer, kept, text):
    trimmed = trim_tokenizer(tokenizer, kept)
    assert trimmed.decode(trimmed(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


def test_a_trimmed_tokenizer_keeps_its_template_and_end_token_when_saved(tokenizer, kept, tmp_path):
    from transformers import AutoTokenizer

    trim_tokenizer(tokenizer, kept).save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert (read.eos_token, read.chat_template, len(read)) == (tokenizer.eos_token, tokenizer.chat_template, len(kept))
    assert kept[read.eos_token_id] == tokenizer.eos_token_id


def test_the_original_tokenizer_is_left_alone(tokenizer, kept):
    before = len(tokenizer), tokenizer(TEXTS[0])["input_ids"]
    trim_tokenizer(tokenizer, kept)
    assert (len(tokenizer), tokenizer(TEXTS[0])["input_ids"]) == before


def test_more_tokens_are_kept_up_to_the_size_and_never_more_than_there_are(tokenizer, kept):
    more = kept_tokens(tokenizer, TEXTS, len(kept) + 20)
    assert set(kept) < set(more)
    assert len(more) == len(kept) + 20
    assert kept_tokens(tokenizer, TEXTS, 10**6) == list(range(len(tokenizer)))
    assert set(kept_tokens(tokenizer, [], 0)) < set(kept)


def test_a_trimmed_student_gives_its_kept_tokens_the_logits_of_the_whole_one(teacher, tokenizer, kept, ids):
    trimmed_ids = torch.tensor([[kept.index(number) if number in kept else 0 for number in ids[0].tolist()]])
    whole_ids = torch.tensor([[kept[number] for number in trimmed_ids[0].tolist()]])
    whole, trimmed = cut_student(teacher, [0, 4]), cut_student(teacher, [0, 4], kept)
    torch.testing.assert_close(logits(trimmed, trimmed_ids), logits(whole, whole_ids)[..., kept])
    assert trimmed.config.vocab_size == len(kept)
    assert kept[trimmed.config.eos_token_id] == teacher.config.eos_token_id


def test_a_tokenizer_of_another_kind_is_refused_in_a_sentence(tokenizer):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(StudentError, match="of the type WordLevel: expected BPE"):
        kept_tokens(words, ["a"], 1)


def test_tokens_that_a_tokenizer_adds_itself_get_their_new_numbers(tokenizer, kept):
    from tokenizers.processors import TemplateProcessing

    adding, end = copy.deepcopy(tokenizer), tokenizer.eos_token
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    trimmed = trim_tokenizer(adding, kept[::-1])
    assert trimmed("I")["input_ids"][-1] == trimmed.eos_token_id != tokenizer.eos_token_id


class TestWidth:
    def test_a_student_of_the_full_width_answers_as_its_teacher(self, teacher):
        config, ids = teacher.config, torch.arange(3, 11)[None]
        whole = cut_width(teacher, inner=config.intermediate_size, groups=config.num_key_value_heads)
        with torch.no_grad():
            assert torch.allclose(whole(ids).logits, teacher(ids).logits, atol=1e-5)

    def test_neurons_that_do_nothing_are_the_first_to_go(self, teacher):
        config, ids = teacher.config, torch.arange(3, 11)[None]
        idle = torch.arange(0, config.intermediate_size, 2)
        with torch.no_grad():
            for layer in teacher.model.layers:
                layer.mlp.down_proj.weight[:, idle] = 0
            narrow = cut_width(teacher, inner=config.intermediate_size // 2)
            assert torch.allclose(narrow(ids).logits, teacher(ids).logits, atol=1e-5)

    def test_a_group_of_heads_that_does_nothing_is_the_first_to_go(self, teacher):
        config, ids = teacher.config, torch.arange(3, 11)[None]
        assert config.num_key_value_heads == 2
        half = config.num_attention_heads // 2 * config.head_dim
        with torch.no_grad():
            for layer in teacher.model.layers:
                layer.self_attn.o_proj.weight[:, :half] = 0
            narrow = cut_width(teacher, inner=config.intermediate_size, groups=1)
            assert torch.allclose(narrow(ids).logits, teacher(ids).logits, atol=1e-5)

    def test_the_student_has_the_widths_asked_for_and_shares_nothing(self, teacher):
        narrow = cut_width(teacher, inner=8, groups=1)
        attention, mlp = narrow.model.layers[0].self_attn, narrow.model.layers[0].mlp
        size, hidden = teacher.config.head_dim, teacher.config.hidden_size
        each = teacher.config.num_attention_heads // teacher.config.num_key_value_heads
        assert attention.q_proj.weight.shape == (each * size, hidden)
        assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (size, hidden)
        assert attention.o_proj.weight.shape == (hidden, each * size)
        assert mlp.up_proj.weight.shape == (8, hidden)
        assert mlp.down_proj.weight.shape == (hidden, 8)
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        with torch.no_grad():
            for weight in narrow.parameters():
                weight.zero_()
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())

    def test_it_can_be_saved_and_opened(self, teacher, tokenizer, tmp_path):
        narrow = cut_width(teacher, inner=8, groups=1)
        save_model(narrow, tokenizer, tmp_path)
        ids = torch.arange(3, 11)[None]
        with torch.no_grad():
            assert torch.allclose(load_torch(tmp_path)[0](ids).logits, narrow(ids).logits, atol=1e-5)

    @pytest.mark.parametrize("sizes", [{"inner": 0}, {"inner": 10_000}, {"inner": 8, "groups": 0}, {"inner": 8, "groups": 9}])
    def test_widths_that_the_teacher_does_not_have_are_refused(self, teacher, sizes):
        with pytest.raises(StudentError, match=f"A student of {sizes['inner']} inner neurons .* was asked for: expected 1 to"):
            cut_width(teacher, **sizes)
