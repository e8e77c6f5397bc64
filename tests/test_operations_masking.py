"""What tells who somebody is goes, what a desk works with stays."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops_course.operations.drift import load_new_product
from slmops_course.operations.masking import Masked, mask_personal_data
from slmops_course.tasks import load_task

# Numbers that no person has: made for documentation (RFC 2606, 3849, 5737), or the card networks' own test numbers.
GONE = [
    ("write to ravi.kumar+pay@mail.example.co.in please", "write to [e-mail] please"),
    ("रवि@उदाहरण.example पर", "[e-mail] पर"),
    ("my upi is ravi-k@okbank.", "my upi is [UPI id]."),
    ("ravi＠example．org", "[e-mail]"),
    ("see https://pay.example/reset?token=abc123.", "see [link]."),
    ("www.pay.example/u/8f3a9c2b77d1 (mine)", "[link] (mine)"),
    ("pay.example/login?user=ravi", "[link]"),
    ("https://ravi:secret@pay.example/", "[link]"),
    ("from 192.0.2.17, then 2001:db8::8a2e:370:7334", "from [IP address], then [IP address]"),
    ("card 4111 1111 1111 1111 exp 12/27", "card [card number] exp 12/27"),
    ("card 4111-1111-1111-1111!", "card [card number]!"),
    ("5555555555554444", "[card number]"),
    ("amex 3782 822463 10005", "amex [card number]"),
    ("one digit is wrong: 4111 1111 1111 1112", "one digit is wrong: [card number]"),
    ("4１11 1111\u00a01111 1111", "[card number]"),
    ("paid 500 4111 1111 1111 1111", "paid 500 [card number]"),
    ("IBAN DE89 3704 0044 0532 0130 00 is mine", "IBAN [IBAN] is mine"),
    ("gb82west12345698765432", "[IBAN]"),
    ("PAN abmpa3211g", "PAN [PAN]"),
    ("aadhaar 2341 2341 2346", "aadhaar [Aadhaar number]"),
    ("aadhaar 234123412346", "aadhaar [Aadhaar number]"),
    ("one digit is wrong: 2341-2341-2345", "one digit is wrong: [Aadhaar number]"),
    ("call +91 98765 43210", "call [phone number]"),
    ("फोन ९८७६५४३२१० पर", "फोन [phone number] पर"),
    ("कार्ड ४१११ ११११ ११११ ११११ और पिन", "कार्ड [card number] और पिन"),
    ("ആധാർ ൨൩൪൧ ൨൩൪൧ ൨൩൪൬", "ആധാർ [Aadhaar number]"),
    ("98\u200b765\u200d43210", "[phone number]"),
    ("+977-9841234567 or 020 7946 0958", "[phone number] or [phone number]"),
    ("call (212) 555-0100", "call [phone number]"),
    ("a/c no. 001234567890", "a/c no. [account number]"),
    ("my account number is 50100 1234 56780", "my account number is [account number]"),
    ("OTP is 482913", "OTP is [secret number]"),
    ("I typed pin:4821 and cvv 123", "I typed pin:[secret number] and cvv [secret number]"),
    ("password 00000 does not work", "password [secret number] does not work"),
]  # fmt: skip
STAYS = [
    "", " ", "I paid Rs 1,20,000 and got 1,200.50 back", "₹१,२०० कट गए", "order 4471882 of 12/05/2026 at 10:30:15",
    "order no. 1234567890123456", "UTR 412345678901 since 2026-05-12", "flight AI 101, train 12951, room 1204",
    "version 1.2.3, chapter 10.0.0", "three at @bank, tomatoes @ 40, milk@Rs 50", "see https://pay.example/help/cards",
    "PIN code 411001", "wrong PIN 3 times, OTP not received in 30 minutes", "PAN card lost", "ABMXA3211G is no PAN",
    "1000 2000 3000", "999.999.999.999", "12::30 and 10:15", "DE00 3704 0044 is cut", "x@y", "🙂", "my account since 2019",
]  # fmt: skip


@pytest.mark.parametrize(("text", "masked"), GONE, ids=range(len(GONE)))
def test_personal_data_is_masked(text, masked):
    assert mask_personal_data(text).text == masked


@pytest.mark.parametrize("text", STAYS, ids=range(len(STAYS)))
def test_what_is_not_personal_stays(text):
    assert mask_personal_data(text) == Masked(text, ())


def test_all_kinds_are_found_in_one_message_and_named_in_order():
    text = "I am ravi@example.org, card 4111111111111111, phone 9876543210."
    assert mask_personal_data(text) == Masked(
        "I am [e-mail], card [card number], phone [phone number].", ("e-mail", "card number", "phone number")
    )


def test_a_number_with_two_readings_goes_whole():
    assert mask_personal_data("IBAN DE89 3704 0044 0532 0130 00").found == ("IBAN",), "a card's groups are in it"


def test_numbers_do_not_hide_each_other():
    assert mask_personal_data("91 98765 43210 4111 1111 1111 1111").text == "[phone number] [card number]"
    assert mask_personal_data("9876543210 9123456780 4821").found[:2] == ("phone number", "phone number")


def test_telephone_numbers_are_those_of_the_regions():
    assert mask_personal_data("ring 01 42 68 53 00", regions=("FR",)).found == ("phone number",)
    assert mask_personal_data("ring 01 42 68 53 00", regions=()).found == ()
    assert mask_personal_data("ring +33 1 42 68 53 00").found == ("phone number",)


def test_names_are_not_found_and_the_docstring_says_so():
    assert mask_personal_data("I am Ravi Kumar of 12 Lake Road").found == ()
    assert "Not found are names of people, postal addresses" in mask_personal_data.__doc__


def test_the_desks_own_messages_hold_nothing_personal_and_come_back_unchanged():
    desk = load_task()
    splits = [*desk.splits.values(), *load_new_product(desk).values()]
    texts = [example.text for examples in splits for example in examples]
    assert len(texts) > 4700
    start = time.perf_counter()
    assert [text for text in texts if mask_personal_data(text) != Masked(text, ())] == []
    assert time.perf_counter() - start < 20, "it takes about 0.13 ms a message"


PARTS = st.one_of(
    st.text(max_size=12), st.sampled_from([text for text, _ in GONE]), st.text("0129९ @./:-+[]pin", min_size=1, max_size=20)
)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(PARTS, max_size=4))
def test_whatever_comes_in_the_rest_stays_in_order_and_nothing_is_left_to_mask(parts):
    text = " ".join(parts)
    masked = mask_personal_data(text)
    kept, outside = iter(text), masked.text
    for kind in masked.found:
        before, outside = outside.split(f"[{kind}]", 1)
        assert all(character in kept for character in before), "something was changed that is not personal"
    assert all(character in kept for character in outside)
    assert bool(masked.found) == (masked.text != text)


LONG = ["1 " * 1000, "1-" * 1000, "9" * 2000, "a@" * 1000, "a.b@" * 500, "AB12" * 500, "www." * 500, ":" * 2000, "pin " * 500]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_a_message_made_to_take_long_does_not(text):
    start = time.perf_counter()
    mask_personal_data(text)
    assert time.perf_counter() - start < 2
