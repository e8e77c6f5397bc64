"""What the trained student does: a typo, a politeness word or a reordered clause must not change the intent.

Uses the artifacts of the fast profile, which the notebooks' tests build; a share is allowed to change, because a model of
this size is not right every time: the thresholds are far above what chance (1 of 25) would keep.
"""

from pathlib import Path

import pytest

from slmops_course.evaluation import ask_all, judge
from slmops_course.pipeline import open_course
from slmops_course.serving import GenAIChatModel
from slmops_course.tasks import Example

ROOT = Path(__file__).parent.parent

# Each base message with a variant that a person would take for the same request.
TYPOS = [
    ("My card was stolen on the bus this morning", "My card was stolln on the bus this mornign"),
    ("I forgot the PIN of my card", "I forgott the PIN of my crad"),
    ("The refund for my returned shoes has not come", "The refund for my retruned shoes has not come"),
    ("How much does it cost to send money abroad?", "How much dose it cost to send mony abroad?"),
    ("I sent the money to the wrong person", "I sent teh money to the wrong preson"),
    ("The electricity company says my bill is unpaid", "The electricty company says my bill is unpayed"),
    ("I was charged twice for the same taxi ride", "I was chargd twice for the same taxi ride"),
    ("My new card has not arrived", "My new card has not arived"),
]
POLITENESS = [
    ("Close my account", "Please be so kind and close my account, thank you"),
    ("The verification code does not come", "Hello, sorry to bother you, the verification code does not come"),
    ("My selfie was rejected again in the identity check", "Kindly help, my selfie was rejected again in the identity check"),
    ("I need to change my phone number in the app", "Good morning, I would need to change my phone number in the app, please"),
    ("There is a payment on my card that I do not know", "Thank you: there is a payment on my card that I do not know"),
    ("The QR code at my shop does not scan", "Dear team, the QR code at my shop does not scan, many thanks"),
    ("My account is blocked", "Hi there, my account is blocked, please help"),
    ("The cashback you promised did not come", "Sorry to ask, the cashback you promised did not come"),
]
REORDERED = [
    ("I lost my card when I was at the market", "When I was at the market I lost my card"),
    ("My card was declined although there is money on it", "Although there is money on it, my card was declined"),
    ("I cannot sign in since I got a new phone", "Since I got a new phone I cannot sign in"),
    ("My transfer is still pending after three days", "After three days my transfer is still pending"),
    ("The shop did not get my payment when I scanned the code", "When I scanned the code, the shop did not get my payment"),
    ("I want to stop the automatic payment because I moved", "Because I moved, I want to stop the automatic payment"),
    ("A man asked for my code, he said he was from the bank", "He said he was from the bank, a man asked for my code"),
    ("I added money from my bank, but the wallet is empty", "The wallet is empty, but I added money from my bank"),
]  # fmt: skip


@pytest.fixture(scope="module")
def course():
    return open_course(ROOT / "build" / "artifacts")


@pytest.fixture(scope="module")
def served(course):
    with GenAIChatModel(course.onnx(course.served_recipe).path) as chat:
        yield chat


def intents(course, chat, texts):
    examples = [Example(str(i), text, {}) for i, text in enumerate(texts)]
    outcomes = judge(course.task, examples, [reply.text for reply in ask_all(chat, course.task, examples)])
    return [outcome.answer["intent"] if outcome.answer else None for outcome in outcomes]


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [TYPOS, POLITENESS, REORDERED], ids=["typos", "politeness", "reordered"])
def test_the_intent_survives_a_change_that_a_person_would_not_notice(course, served, pairs):
    before = intents(course, served, [first for first, _ in pairs])
    after = intents(course, served, [second for _, second in pairs])
    changed = [(pair, a, b) for pair, a, b in zip(pairs, before, after, strict=True) if a != b]
    assert len(changed) <= 2, changed


@pytest.mark.slow
def test_messages_that_any_colleague_would_sort_get_their_intent(course, served):
    expected = {
        "I lost my card": "card_lost", "Please close my account": "close_account", "I forgot my card PIN": "card_pin",
        "What is the weather tomorrow?": "out_of_scope", "I was charged twice at the shop": "charged_twice",
        "My refund has not arrived": "refund_missing", "I sent money to the wrong number": "wrong_recipient",
        "What is the daily limit for transfers?": "limits",
    }  # fmt: skip
    found = intents(course, served, list(expected))
    wrong = [(text, got) for (text, want), got in zip(expected.items(), found, strict=True) if got != want]
    assert len(wrong) <= 1, wrong


@pytest.mark.slow
def test_every_served_reply_is_valid_json_of_the_schema(course):
    assert all(outcome.answer is not None for outcome in course.outcomes("foundry service"))
