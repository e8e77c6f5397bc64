"""Every check of a translation catches what it must, and lets pass what it must."""

import pytest

from slmops_course.authoring.translate.checks import CHECKS, Pair, check_pair
from slmops_course.authoring.translate.glossary import Term
from slmops_course.authoring.translate.languages import Language

HINDI = Language("hi", "हिन्दी", "Hindi", ("Devanagari",), "latin", (0.5, 2.0), "-", "-", "-", "{reviewer}", "-")
MALAYALAM = Language("ml", "മലയാളം", "Malayalam", ("Malayalam",), "latin", (0.5, 2.0), "-", "-", "-", "{reviewer}", "-")
NATIVE = Language("mr", "मराठी", "Marathi", ("Devanagari",), "native", (0.5, 2.0), "-", "-", "-", "{reviewer}", "-")
TERMS = (
    Term("model", False, ("मॉडल", "മോഡൽ")), Term("student model", False, ("विद्यार्थी मॉडल",)), Term("LoRA", True, ()),
    Term("token", False, ("टोकन",)), Term("quantisation", False, ("क्वांटाइज़ेशन",)), Term("recipe", False, ()),
)  # fmt: skip

# name of the check, English, a translation it must catch, one it must pass
CASES = [
    ("headings", "## Why\n\nSo.", "# क्यों\n\nतो।", "## क्यों\n\nतो।"),
    ("headings", "## Why\n\nSo.", "क्यों\n\nतो।", "## क्यों\n\nतो।"),
    ("blocks", "One.\n\nTwo.", "एक। दो।", "एक।\n\nदो।"),
    ("blocks", "- one\n- two", "- एक", "- एक\n- दो"),
    ("blocks", "| a | b |\n|---|---|\n| c | d |", "| क | ख |\n|---|---|", "| क | ख |\n|---|---|\n| ग | घ |"),
    ("blocks", "> One.\n\nTwo.", "दो।\n\n> एक।", "> एक।\n\nदो।"),
    ("fences", "Run:\n\n```\nmake\n```", "चलाइए:\n\n```\nबनाओ\n```", "चलाइए:\n\n```\nmake\n```"),
    ("fences", "Run:\n\n    make", "चलाइए:\n\n    बनाओ", "चलाइए:\n\n    make"),
    ("links", "See [it](a.md).", "[इसे](b.md) देखिए।", "[इसे](a.md) देखिए।"),
    ("links", "See [it](a.md).", "इसे देखिए।", "[इसे](a.md) देखिए।"),
    ("images", "![a plot](a.png)", "![एक चित्र](b.png)", "![एक चित्र](a.png)"),
    ("inline code", "Set `x` to 1.", "`क्ष` को 1 कीजिए।", "`x` को 1 कीजिए।"),
    ("inline code", "Set `x` to `x`.", "`x` रखिए।", "`x` को `x` कीजिए।"),
    ("formulas", "With $a_i$ it is so.", "$a_j$ के साथ ऐसा है।", "$a_i$ के साथ ऐसा है।"),
    ("tags", "<details><summary>Answer</summary>", "<summary>उत्तर</summary>", "<details><summary>उत्तर</summary>"),
    ("numbers", "It has 2,746 rows.", "इसमें 2,764 पंक्तियाँ हैं।", "इसमें 2746 पंक्तियाँ हैं।"),
    ("numbers", "From 0.5 to 100,000.", "0.5 तक।", "0.5 से 1,00,000 तक।"),
    ("placeholders", "{count} of {total:.1f} %(unit)s", "{count} में {total} %(unit)s", "%(unit)s {total:.1f} में {count}"),
    ("markup", "**Word.** So", "**शब्द।**तो", "**शब्द।** तो"),
    ("scripts", "A model α.", "एक மாதிரி मॉडल।", "एक मॉडल (model), α नहीं।"),
    ("digits", "It has 3 rows.", "इसमें ३ पंक्तियाँ हैं।", "इसमें 3 पंक्तियाँ हैं।"),
    ("glossary", "A model learns.", "एक प्रतिमान सीखता है।", "मॉडलों ने सीखा।"),
    ("glossary", "Student models learn.", "मॉडल सीखते हैं।", "विद्यार्थी मॉडल सीखते हैं।"),
    ("glossary", "LoRA learns.", "लोरा सीखता है।", "LoRA सीखता है।"),
    ("glossary", "By quantisation.", "मात्रा से।", "क्वांटाइज\u093cेशन से।"),
    ("error text", "It is ready.", "ERROR: rate limit exceeded", "यह तैयार है।"),
    ("error text", "It is ready.", "I'm sorry, I cannot translate this.", "यह तैयार है।"),
    ("error text", "It is ready.", "यह तै�ार है।", "यह तैयार है।"),
    ("untranslated", "One.\n\nThis was left as it is.", "एक।\n\nThis was left as it is.", "एक।\n\nयह रह गया।"),
    ("leftover English", "The weights are large.", "weights बड़े हैं।", "भार बड़े हैं।"),
    ("leftover English", "Rounding in place.", "राउंडिंग in place।", "जगह पर राउंडिंग।"),
    ("leftover English", "See “teacher less student”.", "“teacher without student” देखें।", "“teacher घटा student” देखें।"),
    ("length", "This is a long sentence, and then another one follows.", "यह।", "यह एक लंबा वाक्य है, और फिर एक और आता है।"),
    ("length", "Short.", "छोटा वाक्य जो बहुत लंबा हो गया है और समाप्त ही नहीं होता है।", "छोटा।"),
]


def problems(english, translation, language=HINDI):
    names = frozenset({"Microsoft", "Olive"})
    return dict(check_pair(Pair(english, translation, language, TERMS, names)))


@pytest.mark.parametrize(("check", "english", "wrong", "right"), CASES)
def test_a_check_catches_what_is_wrong_and_passes_what_is_right(check, english, wrong, right):
    assert check in problems(english, wrong)
    assert problems(english, right) == {}


def test_every_check_has_a_case_here_and_says_what_was_expected():
    assert {case[0] for case in CASES} == set(CHECKS)
    for check, english, wrong, _ in CASES:
        sentence = problems(english, wrong)[check]
        assert ":" in sentence, sentence


def test_an_empty_translation_fails_no_check_because_it_is_counted_as_missing():
    assert problems("A model.", "") == {}
    assert problems("", "") == {}


@pytest.mark.parametrize(
    "translation",
    [
        "Microsoft Olive का LoRA", "SmolLM2-135M, 5 ms में", "PEFT और GPU", "क्वांटाइज़ेशन (quantisation) और मॉडल (models)",
        "“I lost my card” जैसा संदेश", "https://example.org पर", "`weights` नाम", "$\\text{loss}$ यहाँ",
    ],
)  # fmt: skip
def test_names_units_terms_in_brackets_quotations_and_code_are_no_leftovers(translation):
    pair = Pair("Quoted: “I lost my card”", translation, HINDI, TERMS, frozenset({"Microsoft", "Olive"}))
    assert list(CHECKS["leftover English"](pair)) == []


def test_an_english_word_in_brackets_that_is_no_term_is_a_leftover():
    assert "leftover English" in problems("Good.", "अच्छा (good)।")


def test_a_message_that_is_a_name_may_stay_as_it_is():
    assert problems("Microsoft Olive", "Microsoft Olive") == {}


def test_no_tamil_in_malayalam():
    assert "scripts" in problems("A model.", "ഒരു മോഡல்.", MALAYALAM)
    assert problems("Models.", "മോഡലുകൾ.", MALAYALAM) == {}


def test_where_native_digits_are_the_policy_latin_ones_are_caught_but_in_names():
    assert "digits" in problems("It has 3 rows.", "यात 3 ओळी आहेत.", NATIVE)
    assert problems("It has 3 rows with int4.", "यात int4 सह ३ ओळी आहेत.", NATIVE) == {}
