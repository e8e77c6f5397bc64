"""The path from base model to scoreboard, on a model and a task so small that every stage takes seconds."""

import json
from dataclasses import replace

import pytest

from slmops_course.artifacts import Store, check_artifact
from slmops_course.errors import CourseError
from slmops_course.general import load_questions
from slmops_course.pipeline import Course, course_folder, few_shots, open_course
from slmops_course.profiles import PROFILES
from slmops_course.students import StudentShape
from slmops_course.teachers import load_labelled
from slmops_course.training import TrainingError, TrainingSettings, fast_dtype, freeze_below
from slmops_course.tuning import Teaching, teacher_states, teaching_loss, train_model


def test_the_teacher_learns_what_the_base_model_does_not_know(course):
    scores = [sum(o.answer is not None for o in course.outcomes(name)) for name in ("base zero-shot", "teacher")]
    assert scores == [0, len(course.task.splits["test"])]


def test_labels_come_from_the_teacher_and_none_is_lost(course):
    card = course.labels().json("data_card.json")
    assert card["kept"] + card["rejected"] == len(course.task.splits["unlabelled"])


def test_label_checks_hold_a_probability_for_every_label_and_samples_for_some(course):
    kept = load_labelled(course.labels().path).kept
    checks = course.label_checks().json("checks.json")
    assert set(checks["confidence"]) == {example.id for example in kept}
    assert all(0 < share <= 1 for share in checks["confidence"].values())
    assert {key: len(replies) for key, replies in checks["samples"].items()} == {e.id: 3 for e in kept[:2]}


@pytest.mark.parametrize("kind", ["alone", "sequence", "logit"])
def test_a_student_has_its_layers_and_its_history(course, kind):
    from transformers import AutoTokenizer

    student = course.compared_student(kind)
    config = student.json("config.json")
    assert config["num_hidden_layers"] == course.profile.comparison_shape.layers
    assert config["vocab_size"] == len(AutoTokenizer.from_pretrained(student.path))
    losses = [step["loss"] for step in student.json("history.json")]
    assert len(losses) > 5
    assert check_artifact(student.path) == []


@pytest.mark.parametrize(("kept", "layers"), [("even", [0, 2, 4]), ("ends", [0, 1, 4])])
def test_a_student_is_cut_out_of_the_layers_that_its_shape_names(course, tmp_path, kept, layers):
    from slmops_course.chat import load_torch
    from slmops_course.students import save_model

    model, tokenizer = load_torch(course.base().path)
    config = model.config
    config.num_hidden_layers = 5
    deep = type(model)(config)
    save_model(deep, tokenizer, tmp_path / "deep")
    (tmp_path / "student").mkdir()
    train_model(
        tmp_path / "student", source=tmp_path / "deep", task=course.task, examples=course.task.splits["train"][:8],
        settings=TrainingSettings(epochs=1, learning_rate=1e-12), freeze=freeze_below, shape=StudentShape(3, 300, kept),
        teacher=None, teaching=None, lora=None,
    )  # fmt: skip
    student, _ = load_torch(tmp_path / "student")
    for own, number in zip(student.model.layers, layers, strict=True):
        copied = deep.model.layers[number].mlp.up_proj.weight
        assert (own.mlp.up_proj.weight - copied).abs().max() < 0.01


def test_all_students_take_the_same_number_of_steps(course):
    steps = {kind: len(course.compared_student(kind).json("history.json")) for kind in ("alone", "sequence", "logit")}
    assert max(steps.values()) - min(steps.values()) <= course.profile.comparison.epochs


def test_a_second_course_over_the_same_store_builds_nothing(course, caplog):
    course.student()
    caplog.clear()
    caplog.set_level("INFO", logger="slmops_course")
    again = Course(Store(course.store.root), course.task, model=course.model_name)
    again.profile = course.profile
    again.student()
    assert "building" not in caplog.text


def test_the_lora_artifact_holds_the_adapter_alone_and_the_merged_model(course):
    folder = course.lora().path
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size < (folder / "model.safetensors").stat().st_size
    assert course.lora().measured["trained_parameters"] < course.lora().measured["parameters"]


def test_olive_fine_tunes_by_command_by_file_and_from_python(course):
    from safetensors.torch import load_file

    folder = course.olive_manners().path
    manners = json.loads((folder / "manners.json").read_text("utf-8"))
    assert [row["manner"] for row in manners] == ["command", "file", "python"]
    assert len({row["parameters"] for row in manners}) == 1
    for row in manners:
        weights = load_file(folder / row["manner"] / "adapter_model.safetensors")
        assert sum(weight.numel() for weight in weights.values()) == row["parameters"]
        assert all(weight.abs().sum() > 0 for weight in weights.values()), "B is zero where nothing was learned"
        assert str(folder.parent) not in row["command"]


def test_teacher_states_give_back_the_teachers_own_logits(course):
    import torch

    from slmops_course.chat import load_torch
    from slmops_course.training import encode_rows

    folder = course.teacher().path
    model, tokenizer = load_torch(folder)
    row = encode_rows(tokenizer, course.task, course.task.splits["train"][:1])[0]
    states, head, inner = teacher_states(folder, [row], layers=[0])
    with torch.inference_mode():
        out = model(torch.tensor([row.ids]), output_hidden_states=True)
    answer = slice(row.answer_start - 1, -1)
    torch.testing.assert_close((states[0] @ head.T).float(), out.logits[0, answer], atol=0.2, rtol=0.1)
    # Number 0 of a model's hidden states is what goes into its first layer.
    torch.testing.assert_close(inner[0][0].float(), out.hidden_states[1][0, answer], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("count", [-1, 2])
def test_more_matched_layers_than_the_student_has_are_refused(course, count):
    again = Course(course.store, course.task, model=course.model_name)
    again.profile = replace(course.profile, teaching=replace(course.profile.teaching, matched_layers=count))
    with pytest.raises(TrainingError, match=f"matched_layers is {count}: expected 0 to 1"):
        again.student()


def test_a_students_layer_is_matched_with_the_teachers_layer_that_it_is_a_copy_of(course):
    from slmops_course.chat import load_torch
    from slmops_course.training import encode_rows, make_batch, next_token_loss

    model, tokenizer = load_torch(course.teacher().path, dtype=fast_dtype())
    rows = encode_rows(tokenizer, course.task, course.task.splits["train"])
    how, batch = Teaching(temperature=1.0, label_share=1.0, matched_layers=1), make_batch(rows, [0, 1])
    plain = next_token_loss(model, batch).item()
    same, turned = (
        teaching_loss(how, course.teacher().path, rows, order, None)(model, batch).item() for order in ([0, 1], [1, 0])
    )
    assert same == pytest.approx(plain, abs=0.01)
    assert turned > plain + 0.05


def test_matched_layers_end_nearer_to_the_teachers_than_unmatched_ones(course):
    import torch

    from slmops_course.chat import load_torch
    from slmops_course.training import encode_rows

    def apart(weight):
        again = Course(course.store, course.task, model=course.model_name)
        teaching = Teaching(temperature=1.0, label_share=1.0, matched_layers=1, matching_weight=weight)
        again.profile = replace(course.profile, teaching=teaching, student=replace(course.profile.student, epochs=20))
        student, tokenizer = load_torch(again.student().path)
        ids = encode_rows(tokenizer, course.task, course.task.splits["train"][:1])[0].ids
        teacher, tokenizer = load_torch(course.teacher().path)
        wanted = encode_rows(tokenizer, course.task, course.task.splits["train"][:1])[0].ids
        with torch.inference_mode():
            pair = [model(torch.tensor([i]), output_hidden_states=True).hidden_states[1][0, -8:] for model, i in
                    ((student, ids), (teacher, wanted))]  # fmt: skip
        return (1 - torch.cosine_similarity(*pair)).mean().item()

    assert apart(100.0) < apart(0.001)


def test_a_model_says_how_sure_it_is_of_each_answer(course):
    sure = course.confidence("teacher")
    assert list(sure) == [outcome.id for outcome in course.outcomes("teacher") if outcome.answer]
    assert all(0 < share <= 1 for share in sure.values())


def test_what_a_model_still_knows_is_asked_once(course, caplog):
    found = course.knowledge("teacher")
    assert [one.question for one in found] == [question.question for question in load_questions()]
    caplog.set_level("INFO", logger="slmops_course")
    assert course.knowledge("teacher") == found
    assert "building" not in caplog.text


def test_a_scoreboard_row_holds_scores_size_memory_and_speed(course):
    (row,) = course.scoreboard(["student"])
    assert row["messages"] == len(course.task.splits["test"])
    assert row["size_bytes"] > 100_000
    assert row["time_to_first_token_s"] < row["latency_s"]
    assert row["output_tokens_per_s"] > 1
    json.dumps(row)


def test_an_unknown_model_or_profile_is_refused_in_a_sentence(course, tiny_task):
    with pytest.raises(CourseError, match=r"no model 'nobody' on the scoreboard: expected one of .*teacher"):
        course.outcomes("nobody")
    with pytest.raises(CourseError, match=r"no student 'best': expected one of alone, sequence, logit"):
        course.compared_student("best")
    with pytest.raises(CourseError, match=r"no profile 'huge': expected one of fast, full"):
        Course(course.store, tiny_task, profile="huge")


def test_few_shots_show_different_labels(tiny_task):
    shots = few_shots(tiny_task, 3)
    assert len({shot.answer["intent"] for shot in shots}) == 3


def test_the_courses_folder_is_found_from_wherever_a_notebook_lies(tmp_path):
    for folder in ("notebooks", "slmops_course", "translations/hi/notebooks", "elsewhere/notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    for place in (".", "notebooks", "translations/hi/notebooks", "elsewhere/notebooks"):
        assert course_folder(tmp_path / place) == tmp_path
    assert course_folder(tmp_path.parent) == tmp_path.parent, "where there is no course, the place itself"
    for folder in ("copy/notebooks", "copy/slmops_course"):
        (tmp_path / folder).mkdir(parents=True)
    assert course_folder(tmp_path / "copy") == tmp_path / "copy", "the nearest, not one around it"


def test_open_course_keeps_artifacts_in_the_courses_folder_and_an_absolute_path_as_it_is(tmp_path):
    assert open_course("some/artifacts").store.root == course_folder() / "some" / "artifacts"
    assert open_course(tmp_path / "artifacts").store.root == tmp_path / "artifacts"


def test_open_course_reads_the_bundled_task_and_both_profiles(tmp_path):
    for profile in PROFILES:
        assert open_course(tmp_path, profile=profile).task.name == "support_desk"
