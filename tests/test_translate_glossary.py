"""Agreed terms are found in English, and in a language however they are inflected."""

import pytest

from slmops_course.authoring.translate.glossary import Term, english_words, find_terms, has_form

TERMS = [Term("model", False, ("मॉडल",)), Term("student model", False, ("विद्यार्थी",)), Term("LoRA", True, ())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two student models learn.", ["student model"]), ("A model and a student model.", ["student model", "model"]),
        ("QLoRA, remodel, model-free", []), ("LoRA.", ["LoRA"]), ("", []),
    ],
)  # fmt: skip
def test_the_longest_term_hides_those_in_it(text, expected):
    assert [term.english for term in find_terms(text, TERMS)] == expected


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("पैमाना", "इस पैमाने पर", True), ("मॉडल", "मॉडलों ने", True), ("मॉडल", "नमूने ने", False), ("मॉडल", "", False),
        ("മോഡൽ", "മോഡലുകൾ", True), ("ലെയർ", "ലെയറുകൾ", True), ("ടോക്കൺ", "ടോക്കണുകൾ", True), ("മോഡൽ", "മോഡി", False),
        ("छोटा भाषा मॉडल", "छोटे भाषा मॉडलों में", True), ("छोटा भाषा मॉडल", "भाषा मॉडल", False),
        ("क्वांटाइज़ेशन", "क्वांटाइज\u093cेशन", True), ("लस", "क्लस्टर", False),
    ],
)  # fmt: skip
def test_a_form_is_found_whatever_its_endings(form, text, expected):
    assert has_form(text, Term("x", False, (form,))) is expected


def test_a_kept_term_is_found_in_english_letters_only():
    assert has_form("LoRA से", TERMS[2])
    assert not has_form("लोरा से", TERMS[2])


def test_words_of_terms_say_whether_they_stay():
    assert english_words(TERMS) == {"model": False, "student": False, "lora": True}
    assert english_words([]) == {}
