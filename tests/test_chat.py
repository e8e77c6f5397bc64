import contextlib

import pytest

from slmops_course.chat import (
    RecordedChatModel,
    TorchChatModel,
    batches_by_length,
    decode_reply,
    load_torch,
    prompt_ids,
)
from slmops_course.models import ModelError, check_model_folder
from slmops_course.tasks import TaskError

LENGTHS = ("card", "Where is my refund?", "I lost my card on the bus, the shop says it paid me back " * 4, "a", "Hello")


@pytest.fixture(scope="module")
def lively_folder(tiny_model_folder, tmp_path_factory):
    """The tiny model with louder layers: untrained, it repeats one token; so it says something else to everybody."""
    import torch

    folder = tmp_path_factory.mktemp("lively") / "lively_model"
    model, tokenizer = load_torch(tiny_model_folder)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter *= 10
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(lively_folder):
    with TorchChatModel(lively_folder) as chat:
        yield chat


@pytest.fixture
def asks(tiny_task):
    """Conversations of very different lengths: a batch of them needs padding."""
    return [tiny_task.messages(text) for text in LENGTHS]


# --- Recorded answers ---


def test_a_recorded_answer_is_found_by_the_last_message(tiny_task):
    chat = RecordedChatModel({"my card is gone": '{"intent":"card_lost","urgency":"high"}', "hi": "{}"})
    one, two = chat.generate([tiny_task.messages("hi"), tiny_task.messages("my card is gone")])
    assert one.text == "{}"
    assert tiny_task.parse(two.text) == {"intent": "card_lost", "urgency": "high"}
    assert chat.reply(tiny_task.messages("hi")) == one


def test_a_message_that_was_not_recorded_gets_a_reply_that_no_schema_accepts(tiny_task):
    reply = RecordedChatModel({"hi": "{}"}).reply(tiny_task.messages("bye"))
    assert reply.text == ""
    with pytest.raises(TaskError):
        tiny_task.parse(reply.text)


def test_recorded_answers_do_not_change_with_the_mapping_they_came_from(tiny_task):
    answers = {"hi": "one"}
    chat = RecordedChatModel(answers)
    answers["hi"] = "two"
    assert chat.reply(tiny_task.messages("hi")).text == "one"


# --- A PyTorch model ---


def test_the_answers_of_a_batch_are_the_answers_one_by_one_in_order(chat, asks):
    batched = chat.generate(asks, max_new_tokens=12)
    single = [chat.reply(ask, max_new_tokens=12) for ask in asks]
    assert [(r.text, r.prompt_tokens, r.output_tokens) for r in batched] == [
        (r.text, r.prompt_tokens, r.output_tokens) for r in single
    ]
    assert len({reply.text for reply in single}) == len(asks), "Equal answers would hide a wrong order."


def test_more_messages_than_fit_a_batch_are_all_answered(chat, tiny_task):
    asks = [tiny_task.messages(f"{'card ' * (n % 7)}{n}") for n in range(70)]
    replies = chat.generate(asks, max_new_tokens=1)
    assert [reply.prompt_tokens for reply in replies] == [len(prompt_ids(chat.tokenizer, ask)) for ask in asks]


def test_no_conversation_gives_no_reply(chat):
    assert chat.generate([]) == []


def test_tokens_are_counted_without_padding(tiny_model_folder, asks):
    with TorchChatModel(tiny_model_folder) as chat:
        replies = chat.generate(asks, max_new_tokens=5)
    assert [reply.prompt_tokens for reply in replies] == [len(prompt_ids(chat.tokenizer, ask)) for ask in asks]
    assert [reply.output_tokens for reply in replies] == [5] * len(asks)


def test_a_reply_ends_at_the_end_token_which_is_counted(lively_folder, asks):
    import torch

    model, tokenizer = load_torch(lively_folder)
    chat = TorchChatModel.from_loaded(model, tokenizer, "lively")
    long = chat.generate(asks, max_new_tokens=8)
    prompt = prompt_ids(tokenizer, asks[0])
    ids = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0, len(prompt) :].tolist()
    assert ids[2] not in ids[:2]

    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[2])
    short = chat.generate(asks, max_new_tokens=8)

    assert (long[0].text, long[0].output_tokens) == (tokenizer.decode(ids), 8)
    assert (short[0].text, short[0].output_tokens) == (tokenizer.decode(ids[:3]), 3)


def test_nothing_is_computed_after_the_end_token(lively_folder, asks):
    model, tokenizer = load_torch(lively_folder)
    chat = TorchChatModel.from_loaded(model, tokenizer, "lively")
    ids = tokenizer(chat.reply(asks[0], max_new_tokens=8).text, add_special_tokens=False)["input_ids"]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0])
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    assert chat.reply(asks[0], max_new_tokens=8).output_tokens == len(steps) == 1


def test_times_are_positive_and_the_first_token_comes_before_the_end(chat, asks):
    for reply in [*chat.generate(asks, max_new_tokens=20), chat.reply(asks[0], max_new_tokens=20)]:
        assert 0 < reply.time_to_first_token_s < reply.latency_s < 60


def test_the_time_to_the_first_token_does_not_grow_with_the_answer(chat, asks):
    chat.reply(asks[0], max_new_tokens=2)
    reply = min(
        (chat.reply(asks[0], max_new_tokens=40) for _ in range(3)),
        key=lambda reply: reply.time_to_first_token_s / reply.latency_s,
    )
    assert reply.time_to_first_token_s < reply.latency_s / 4


def test_the_same_question_gets_the_same_answer(chat, asks):
    assert chat.reply(asks[1]).text == chat.reply(asks[1]).text


def test_a_model_runs_in_bfloat16(tiny_model_folder, asks):
    import torch

    with TorchChatModel(tiny_model_folder, dtype="bfloat16") as chat:
        assert chat.model.dtype == torch.bfloat16
        assert chat.reply(asks[0], max_new_tokens=3).output_tokens == 3


def test_a_model_is_named_after_its_folder_unless_it_is_given_a_name(tiny_model_folder):
    assert TorchChatModel(tiny_model_folder).name == "tiny_model"
    assert TorchChatModel(tiny_model_folder, name="teacher").name == "teacher"


def test_a_model_is_closed_at_the_end_of_its_block_even_after_an_error(tiny_model_folder):
    chat = TorchChatModel(tiny_model_folder)
    with contextlib.suppress(ZeroDivisionError), chat:
        assert chat.model is not None
        raise ZeroDivisionError
    assert chat.model is None


def test_pickled_weights_are_not_loaded(tmp_path, tiny_model_folder):
    import torch

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model_folder / name).read_bytes())
    model, _ = load_torch(tiny_model_folder)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError):
        check_model_folder(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        load_torch(tmp_path)


# --- Prompts, batches, decoding ---


def test_a_prompt_ends_where_the_answer_begins(chat, tiny_task):
    text = chat.tokenizer.decode(prompt_ids(chat.tokenizer, tiny_task.messages("hi")))
    assert text == (
        "<|im_start|>system\nAnswer with JSON: intent, urgency.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_batches_hold_prompts_of_like_length_and_every_prompt_once():
    prompts = [[0] * size for size in (5, 1, 9, 2, 1)]
    batches = list(batches_by_length(prompts, 2))
    assert [indexes for indexes, _ in batches] == [[1, 4], [3, 0], [2]]
    assert all(batch == [prompts[i] for i in indexes] for indexes, batch in batches)
    assert list(batches_by_length([], 2)) == []


def test_long_prompts_share_a_batch_with_fewer_and_the_longest_comes_alone():
    prompts = [[1] * length for length in (4, 9, 3, 30, 4)]
    batches = [indexes for indexes, _ in batches_by_length(prompts, 64, batch_tokens=12)]
    assert batches == [[2, 0, 4], [1], [3]]


def test_decoding_stops_at_the_end_token(chat):
    words = chat.tokenizer("lost card", add_special_tokens=False)["input_ids"]
    end, pad = chat.tokenizer.eos_token_id, chat.tokenizer.pad_token_id
    assert decode_reply(chat.tokenizer, [*words, end, pad, pad]) == ("lost card", len(words) + 1)
    assert decode_reply(chat.tokenizer, [*words, end, *words]) == ("lost card", len(words) + 1)
    assert decode_reply(chat.tokenizer, words) == ("lost card", len(words))
    assert decode_reply(chat.tokenizer, [end]) == ("", 1)
    assert decode_reply(chat.tokenizer, []) == ("", 0)
