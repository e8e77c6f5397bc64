import pytest
import torch

from slmops_course.chat import load_torch, prompt_ids
from slmops_course.students import StudentError, cut_student, kept_layers, parameters_by_part, save_model


def test_a_student_keeps_the_first_layer_the_last_and_some_between():
    assert kept_layers(30, 8) == [0, 4, 8, 12, 17, 21, 25, 29]


def test_a_student_as_deep_as_its_teacher_keeps_every_layer():
    assert kept_layers(5, 5) == [0, 1, 2, 3, 4]


def test_the_shallowest_student_keeps_the_first_and_the_last_layer():
    assert kept_layers(30, 2) == [0, 29]


@pytest.mark.parametrize("depth", [2, 3, 7, 12, 29, 30])
def test_kept_layers_are_distinct_and_in_order(depth):
    layers = kept_layers(30, depth)
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
