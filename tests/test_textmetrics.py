"""Text metrics and calibration: each has a case known right, one known wrong, and an empty one.

Numbers called sacreBLEU's and rouge-score's were computed with sacrebleu 2.6.0 and rouge-score 0.1.2.
"""

import math

import pytest

from slmops_course.evaluation import EvaluationError
from slmops_course.textmetrics import (
    ReliabilityBin,
    calibration,
    chrf,
    log_probabilities,
    perplexity,
    rouge_l,
    text_score,
)
from slmops_course.training import encode_rows

CAT = ("the cat is on the mat", "there is a cat on the mat")
CARD = ("I lost my card on the bus today", "My card was lost on a bus yesterday")
HINDI = ("मेरा कार्ड खो गया है", "मेरा कार्ड चोरी हो गया है")


# --- The model's own probabilities ---


def test_log_probabilities_are_those_of_the_answers_tokens_whatever_shares_their_batch(loaded, tiny_task):
    import torch

    model, tokenizer = loaded
    rows = encode_rows(tokenizer, tiny_task, tiny_task.splits["train"])
    expected = []
    for row in rows:
        with torch.inference_mode():
            logs = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        answer = range(row.answer_start, len(row.ids))
        expected.append(sum(logs[place - 1, row.ids[place]].item() for place in answer))
    assert log_probabilities(model, rows, batch_size=5) == pytest.approx(expected, rel=1e-4)
    assert log_probabilities(model, []) == []


# --- Perplexity ---


def test_a_certain_and_right_model_has_a_perplexity_of_one():
    assert perplexity([0.0, 0.0], [3, 5]) == 1.0


def test_a_model_that_guesses_among_v_tokens_has_a_perplexity_of_v():
    assert perplexity([-4 * math.log(50), -9 * math.log(50)], [4, 9]) == pytest.approx(50)


def test_perplexity_weighs_answers_by_their_tokens():
    assert perplexity([-2 * math.log(2), -3 * math.log(2)], [2, 1]) == pytest.approx(2 ** (5 / 3))


def test_perplexity_of_logits_is_what_torchmetrics_computes():
    torch = pytest.importorskip("torch")
    from torchmetrics.functional.text import perplexity as reference

    logits, ids = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0)), torch.arange(12).reshape(3, 4) % 7
    log_p = logits.log_softmax(-1).gather(-1, ids[..., None]).sum((1, 2))
    assert perplexity(log_p.tolist(), [4, 4, 4]) == pytest.approx(float(reference(logits, ids)), rel=1e-5)


def test_an_impossible_answer_has_an_infinite_perplexity():
    assert perplexity([-math.inf, -1.0], [2, 2]) == math.inf
    assert perplexity([-1000.0], [1]) == math.inf


@pytest.mark.parametrize(
    ("logs", "counts", "found"),
    [
        ([], [], "0 log-probabilities and 0 token counts"),
        ([-1.0], [1, 2], "1 log-probabilities and 2 token counts"),
        ([0.5], [1], "has the log-probability 0.5"),
        ([math.nan], [1], "has the log-probability nan"),
        ([-1.0], [0], "answer of 0 tokens"),
    ],
)
def test_what_has_no_perplexity_is_refused(logs, counts, found):
    with pytest.raises(EvaluationError, match=f"{found}.*expected"):
        perplexity(logs, counts)


# --- Free text ---


@pytest.mark.parametrize("metric", [rouge_l, chrf])
@pytest.mark.parametrize("text", ["Your refund is on its way.", "card", "नमस्ते, कार्ड", "a"])
def test_the_text_itself_scores_one(metric, text):
    assert metric(text, text) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("metric", [rouge_l, chrf])
@pytest.mark.parametrize(("found", "expected"), [("abc def", "xyz"), ("", "card"), ("card", ""), ("", ""), (" ", "\n")])
def test_nothing_in_common_and_nothing_at_all_score_zero(metric, found, expected):
    assert metric(found, expected) == 0.0


@pytest.mark.parametrize(("pair", "score"), [(CAT, 8 / 13), (CARD, 0.5)])
def test_rouge_l_is_that_of_rouge_score(pair, score):
    assert rouge_l(*pair) == pytest.approx(score, abs=1e-6)


def test_rouge_l_needs_the_words_in_order():
    assert rouge_l("one two three", "three two one") == pytest.approx(1 / 3)


def test_rouge_l_reads_other_scripts_than_latin():
    assert rouge_l(*HINDI) == pytest.approx(8 / 11, abs=1e-6)  # four words in common, of five and six
    assert rouge_l("मेरा बिल", "मेरी बोली") == 0.0  # vowel signs belong to the words


@pytest.mark.parametrize(("pair", "score"), [(CAT, 0.4789), (CARD, 0.2862), (HINDI, 0.5839), (("cad", "card"), 0.3824)])
def test_chrf_is_that_of_sacrebleu(pair, score):
    assert chrf(*pair) == pytest.approx(score, abs=0.001)


def test_chrf_does_not_see_white_space():
    assert chrf("a b\tc  d e f g", "a b c d e f g") == pytest.approx(1.0)


def test_a_mean_counts_the_messages_with_nothing_in_common():
    score = text_score(chrf, ["Your refund is here", "xyz"], ["Your refund is here", "abc"])
    assert score.value == pytest.approx(0.5, abs=1e-6)
    assert (score.low, score.high, score.count) == (0.0, pytest.approx(1.0), 2)
    assert text_score(rouge_l, ["a"], ["a"]).value == 1.0


@pytest.mark.parametrize(("found", "expected"), [([], []), (["a"], [])])
def test_no_texts_and_unlike_lists_are_refused(found, expected):
    with pytest.raises(EvaluationError, match="expected as many of each, at least one"):
        text_score(rouge_l, found, expected)


# --- Calibration ---


def test_a_model_that_is_right_as_often_as_it_is_sure_has_no_error():
    found = calibration([0.75] * 4 + [0.5] * 2, [True, True, True, False, True, False])
    assert found.error == pytest.approx(0.0)
    assert found.bins == (ReliabilityBin(0.5, 0.5, 2), ReliabilityBin(0.75, 0.75, 4))


def test_a_model_that_is_sure_and_wrong_has_the_greatest_error():
    assert calibration([1.0] * 3, [False] * 3).error == 1.0
    assert calibration([0.0] * 3, [True] * 3).error == 1.0


def test_bins_are_weighted_by_their_answers():
    found = calibration([0.9, 0.9, 0.9, 0.6], [True, True, True, False])
    assert found.error == pytest.approx(0.75 * 0.1 + 0.25 * 0.6)
    assert [one.count for one in found.bins] == [1, 3]


def test_a_bin_holds_its_upper_edge_and_the_first_holds_zero():
    assert [one.count for one in calibration([0.0, 0.25, 0.5, 0.75, 1.0], [True] * 5, bins=4).bins] == [2, 1, 1, 1]
    assert [one.count for one in calibration([0.0, 0.3, 1.0], [True] * 3, bins=1).bins] == [3]


def test_the_error_is_what_torchmetrics_computes():
    torch = pytest.importorskip("torch")
    from torchmetrics.functional.classification import binary_calibration_error

    sure = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    right = torch.rand(500, generator=torch.Generator().manual_seed(2)) < sure**2
    found = calibration(sure.tolist(), right.tolist(), bins=15)
    assert found.error == pytest.approx(float(binary_calibration_error(sure, right.int(), n_bins=15)))
    assert sum(one.count for one in found.bins) == 500


@pytest.mark.parametrize(
    ("confidences", "correct", "bins", "found"),
    [
        ([], [], 10, "0 confidences and 0 outcomes"),
        ([0.5], [True, False], 10, "1 confidences and 2 outcomes"),
        ([0.5, 1.2], [True, False], 10, "confidence is 1.2"),
        ([math.nan], [True], 10, "confidence is nan"),
        ([0.5], [True], 0, "0 bins"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(confidences, correct, bins, found):
    with pytest.raises(EvaluationError, match=f"{found}.*expected"):
        calibration(confidences, correct, bins=bins)
