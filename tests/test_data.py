"""The bundled support desk: its form, its labels, its balance, and that no split leaks into another."""

import json
import re
from collections import Counter, defaultdict

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from slmops_course.operations.gate import load_must_pass
from slmops_course.tasks import BUNDLED_TASK, DATA_FOLDER, MAX_MESSAGE_CHARS, SPLITS, load_task
from slmops_course.validation import NEAR, similar_pairs

FOLDER = DATA_FOLDER / BUNDLED_TASK
PER_INTENT = {"train": 40, "dev": 10, "test": 20, "unlabelled": 40}  # at least
OUT_OF_SCOPE = {"train": 72, "dev": 18, "test": 36, "unlabelled": 72}  # at least
SAME_START = 4  # messages of one intent that may share their first three words
PRODUCTS = {
    "account_blocked": {"account"},
    "autopay": {"bills", "card", "transfer"},
    "bill_unpaid": {"bills"},
    "card_declined": {"card"},
    "card_delivery": {"card"},
    "card_lost": {"card"},
    "card_pin": {"card"},
    "cashback_missing": {"wallet"},
    "change_details": {"account"},
    "charged_twice": {"bills", "card", "shop", "transfer"},
    "close_account": {"account"},
    "code_not_received": {"account", "card"},
    "fees": {"card", "transfer", "wallet"},
    "identity_check": {"account"},
    "limits": {"card", "transfer", "wallet"},
    "login_problem": {"account"},
    "out_of_scope": {"none"},
    "qr_problem": {"shop"},
    "refund_missing": {"bills", "card", "shop"},
    "scam_report": {"account", "transfer"},
    "top_up_failed": {"wallet"},
    "transfer_pending": {"transfer"},
    "unknown_charge": {"card", "wallet"},
    "withdraw_to_bank": {"wallet"},
    "wrong_recipient": {"transfer"},
}
PRIVATE = {
    "e-mail address": r"[\w.+-]+@[\w-]+\.\w",
    "web address": r"https?:|www\.|\b[\w-]+\.(com|org|net|info|app|in|io|np|co)\b",
    "phone number": r"(?<![\d.,])\+?\d(?:[ ().-]{0,2}\d){6,}",
    "card number": r"\d(?:[ -]?\d){12,18}",
}
CALM = r"\bno (rush|hurry)\b|just curious|for future reference|only asking|whenever you"
NOT_URGENT = r"(not|n't|nothing)\b[^.!?;:]{0,20}\burgent"


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return {split: read(f"{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="module")
def key() -> list[dict]:
    return read("unlabelled_key.jsonl")


@pytest.fixture(scope="module")
def rows(splits, key) -> list[dict]:
    """Every message of every split with its answer, the unlabelled ones with their key's."""
    answers = {row["id"]: row["answer"] for row in key}
    return [{"answer": answers.get(row["id"]), **row} for split in splits.values() for row in split]


# --- Form ---


def test_every_answer_fits_the_schema(rows):
    schema = json.loads((FOLDER / "schema.json").read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert [row["id"] for row in rows if not validator.is_valid(row["answer"])] == []


@pytest.mark.parametrize(
    "change", [{"intent": "card_eaten"}, {"urgency": "High"}, {"product": None}, {"note": "x"}], ids=str
)
def test_the_schema_refuses_other_answers(change):
    good = {"intent": "card_lost", "urgency": "high", "product": "card"}
    validator = Draft202012Validator(json.loads((FOLDER / "schema.json").read_text("utf-8")))
    validator.validate(good)
    with pytest.raises(ValidationError):
        validator.validate(good | change)
    for field in good:
        assert not validator.is_valid({name: value for name, value in good.items() if name != field})


def test_every_row_has_its_fields_and_no_others(splits, key):
    for split, split_rows in splits.items():
        expected = {"id", "text"} if split == "unlabelled" else {"id", "text", "answer"}
        assert [row for row in split_rows if set(row) != expected] == []
    assert [row for row in key if set(row) != {"id", "answer"}] == []


def test_ids_are_unique_and_name_their_split(splits, rows):
    assert [id for id, count in Counter(row["id"] for row in rows).items() if count > 1] == []
    for split, split_rows in splits.items():
        assert [row["id"] for row in split_rows if not re.fullmatch(rf"{split}-\d{{4}}", row["id"])] == []


def test_the_key_has_one_answer_for_every_unlabelled_message(splits, key):
    assert sorted(row["id"] for row in key) == sorted(row["id"] for row in splits["unlabelled"])


def test_every_message_is_one_that_the_desk_itself_takes(rows):
    task = load_task()
    assert [row["id"] for row in rows if task.check_message(row["text"]) != row["text"]] == []
    assert max(len(row["text"]) for row in rows) <= MAX_MESSAGE_CHARS
    assert [row["id"] for row in rows if not row["text"].isprintable()] == []


# --- Balance ---


def test_every_intent_has_enough_rows_in_every_split(splits, rows):
    intents = sorted(PRODUCTS.keys() - {"out_of_scope"})
    assert len(intents) == 24
    answers = {row["id"]: row["answer"] for row in rows}
    for split, split_rows in splits.items():
        counts = Counter(answers[row["id"]]["intent"] for row in split_rows)
        assert {intent: counts[intent] for intent in intents if counts[intent] < PER_INTENT[split]} == {}
        assert counts["out_of_scope"] >= OUT_OF_SCOPE[split]
        assert max(counts[intent] for intent in intents) <= 1.2 * min(counts[intent] for intent in intents)
    assert sum(row["answer"]["intent"] == "out_of_scope" for row in rows) >= 200


def test_the_datasheet_counts_what_is_there(splits, rows):
    answers = {row["id"]: row["answer"] for row in rows}
    sheet = (FOLDER / "DATASHEET.md").read_text("utf-8")
    for split, split_rows in splits.items():
        counts = Counter(answers[row["id"]]["intent"] for row in split_rows)
        line = rf"\| `{split}\.jsonl` \| {len(split_rows):,} \| {counts['card_lost']} \| {counts['out_of_scope']} \|"
        assert re.search(line, sheet), f"DATASHEET.md should hold: {line}"


def test_no_urgency_is_rare(splits):
    for split in ("train", "dev", "test"):
        counts = Counter(row["answer"]["urgency"] for row in splits[split])
        assert min(counts[urgency] for urgency in ("low", "normal", "high")) > 0.25 * len(splits[split])


def test_rows_are_shuffled(splits, key):
    for name, labelled in ({**splits, "unlabelled": key}).items():
        assert len({row["answer"]["intent"] for row in labelled[:100]}) >= 20, name


# --- Labels ---


def test_an_out_of_scope_message_is_low_and_about_no_product(rows):
    wrong = [
        row["id"]
        for row in rows
        if row["answer"]["intent"] == "out_of_scope"
        and (row["answer"]["urgency"], row["answer"]["product"]) != ("low", "none")
    ]
    assert wrong == []


def test_every_product_is_one_of_its_intents_and_every_one_occurs(rows):
    found = defaultdict(set)
    for row in rows:
        found[row["answer"]["intent"]].add(row["answer"]["product"])
    assert dict(found) == PRODUCTS


def stated_urgency(text: str) -> str | None:
    """The urgency that a message states in plain words, if it does.

    Example: "No rush, my card is late" -> "low"; "Urgent: card gone" -> "high"; "My card is late" -> None
    """
    if re.search(f"{CALM}|{NOT_URGENT}", text, re.IGNORECASE):
        return "low"
    return "high" if re.search(r"\burgent\b|\bright now\b", text, re.IGNORECASE) else None


def test_a_must_pass_message_expects_what_the_desk_is_taught(rows):
    """A model that answers as its training data do must not be refused for it."""
    taught = {tuple(row["answer"].values()) for row in rows}
    wrong = [row for row in read("must_pass.jsonl") if tuple(row["answer"].values()) not in taught]
    assert wrong == []


def test_a_message_that_says_how_urgent_it_is_is_labelled_so(rows):
    stated = [(row, stated_urgency(row["text"])) for row in rows if row["answer"]["intent"] != "out_of_scope"]
    assert sum(urgency is not None for _, urgency in stated) > 100
    assert [(row["id"], urgency) for row, urgency in stated if urgency not in (None, row["answer"]["urgency"])] == []


@pytest.mark.parametrize(
    ("text", "urgency"),
    [
        ("No rush, my card is late", "low"),
        ("It isn't at all urgent, but where is it?", "low"),
        ("URGENT: card gone", "high"),
        ("Block it right now!", "high"),
        ("My card is late", None),
        ("", None),
    ],
)
def test_stated_urgency_is_told_from_none(text, urgency):
    assert stated_urgency(text) == urgency


# --- Leakage ---


def shingles(text: str) -> set[str]:
    """The character 5-grams of a message's words, in lower case and without punctuation."""
    words = " ".join(re.findall(r"\w+", text.lower())) or text
    return {words[i : i + 5] for i in range(max(1, len(words) - 4))}


def near_duplicates(texts: list[str], *, threshold: float = 0.5) -> list[tuple[int, int]]:
    """Pairs of messages whose 5-grams overlap (Jaccard index) by the threshold or more.

    Each message is compared with those it shares a 5-gram with, through an index from 5-gram to messages.
    """
    found, index, sets = [], defaultdict(list), [shingles(text) for text in texts]
    for i, grams in enumerate(sets):
        shared = Counter(j for gram in grams for j in index[gram])
        found += [(j, i) for j, n in shared.items() if n >= threshold * (len(grams) + len(sets[j]) - n)]
        for gram in grams:
            index[gram].append(i)
    return found


def test_no_message_is_nearly_another_one_in_any_split(rows):
    pairs = near_duplicates([row["text"] for row in rows])
    assert [(rows[i]["id"], rows[j]["id"], rows[i]["text"], rows[j]["text"]) for i, j in pairs] == []


def test_near_duplicates_are_told_from_messages_on_the_same_subject():
    texts = [
        "My card was swallowed by the machine at the station",
        "Where can I see what you charge for a transfer?",
        "my card was swallowed by a machine at the station!!",
        "The cash machine kept my card",
        "where can i see what u charge for a transfer",
        "🙂",
        "🙂",
    ]
    assert sorted(near_duplicates(texts)) == [(0, 2), (1, 4), (5, 6)]
    assert near_duplicates([]) == []


def skeleton(text: str) -> list[str]:
    """A message's words in lower case, with `#` for every number and `@` for every name.

    Example: "Sir, I sent €40 to Ravi" -> ["sir", "i", "sent", "#", "to", "@"]
    """
    masked = []
    for position, word in enumerate(re.findall(r"[^\s.,;:!?()\"]+", text)):
        is_name = position > 0 and word[0].isupper() and not re.fullmatch(r"I('\w+)?", word)
        masked.append("#" if re.search(r"\d", word) else "@" if is_name else word.lower())
    return masked


def repeated(rows: list[dict], *, words: int | None = None, times: int) -> dict[tuple, int]:
    """The beginnings (or whole skeletons) that more than `times` messages of one intent share."""
    counts = Counter((row["answer"]["intent"], *skeleton(row["text"])[:words]) for row in rows)
    return {start: count for start, count in counts.items() if count > times}


def test_no_message_is_another_one_with_other_numbers_or_names(rows):
    assert repeated(rows, times=1) == {}


def test_messages_of_an_intent_do_not_begin_alike(rows):
    assert repeated([row for row in rows if len(skeleton(row["text"])) > 3], words=3, times=SAME_START) == {}


def test_a_template_with_slots_is_noticed():
    names = ("Ravi", "Meera", "Tom", "Sita", "Ann")
    rows = [{"text": f"I sent €{n}0 to {name}, help!", "answer": {"intent": "x"}} for n, name in enumerate(names)]
    other = [{"text": "I sent it twice, I'm sorry", "answer": {"intent": "x"}}]
    assert repeated(rows + other, times=1) == {("x", "i", "sent", "#", "to", "@", "help"): 5}
    assert repeated(rows + other, words=2, times=4) == {("x", "i", "sent"): 6}
    assert repeated([], times=1) == {}


def private(text: str) -> list[str]:
    """What a message should not hold: the kinds of private or outside addresses and numbers in it."""
    return [kind for kind, pattern in PRIVATE.items() if re.search(pattern, text, re.IGNORECASE)]


def test_no_message_holds_an_address_or_a_number_of_somebody(rows):
    assert {row["id"]: private(row["text"]) for row in rows if private(row["text"])} == {}


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to ravi.k@example.org", ["e-mail address", "web address"]),
        ("see http://x or www.x", ["web address"]),
        ("it said pay-fast.in", ["web address"]),
        ("call +91 98765 43210", ["phone number"]),
        ("call (022) 555-0199", ["phone number"]),
        ("my card 4111 1111 1111 1111", ["phone number", "card number"]),
        ("paid 1,20,000 on 12 May 2026, order 4471, 5.99 each, at 10:30", []),
        ("", []),
    ],
)
def test_private_numbers_and_addresses_are_told_from_amounts(text, kinds):
    assert private(text) == kinds


def test_must_pass_messages_fit_the_desk_cover_what_costs_most_and_repeat_nothing():
    task = load_task()
    rows = load_must_pass(FOLDER / "must_pass.jsonl", task)
    assert len(rows) >= 25
    costly = {"account_blocked", "card_lost", "scam_report", "unknown_charge", "wrong_recipient"}
    counts = Counter(row.answer["intent"] for row in rows)
    assert all(counts[intent] >= 2 for intent in costly)
    assert all(row.answer["product"] in PRODUCTS[row.answer["intent"]] for row in rows)
    texts = [row.text for row in rows] + [e.text for split in SPLITS for e in task.splits[split]]
    near = [(texts[i], texts[j]) for i, j, _ in similar_pairs(texts, threshold=NEAR) if i < len(rows)]
    assert near == []
