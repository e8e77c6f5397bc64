"""Questions about the world: an answer counts where it names the thing, and only there."""

import pytest

from slmops_course.chat import RecordedChatModel
from slmops_course.general import ask_questions, load_questions, says


@pytest.mark.parametrize(
    ("reply", "accept", "right"),
    [
        ("The capital of France is Paris.", ["paris"], True), ("PARIS", ["paris"], True), ("Parisian", ["paris"], False),
        ("It is rice", ["ice"], False),
        ("It boils at 100°C", ["100"], True), ("It boils at 1000 degrees", ["100"], False), ("H₂O", ["h2o", "h₂o"], True),
        ('{"intent":"out_of_scope"}', ["cold"], False), ("", ["cold"], False),
    ],
)  # fmt: skip
def test_a_reply_is_right_where_it_has_an_accepted_word(reply, accept, right):
    assert says(reply, accept) is right


def test_every_question_has_its_own_words_and_accepted_answers_not_in_it():
    questions = load_questions()
    assert len({question.question for question in questions}) == len(questions) == 40
    assert [q.question for q in questions if not q.accept or says(q.question, q.accept)] == []


def test_models_are_asked_without_a_system_prompt_and_counted_alike():
    questions = load_questions()[:3]
    known = RecordedChatModel({questions[0].question: "It is Paris, of course.", questions[1].question: "No idea"})
    found = ask_questions(known, questions)
    assert [one.right for one in found] == [True, False, False]
    assert found[0].reply == "It is Paris, of course."
