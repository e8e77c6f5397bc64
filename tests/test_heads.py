import pytest
import torch

from slmops_course.chat import Reply
from slmops_course.evaluation import ask_all
from slmops_course.heads import HeadChatModel, add_heads, head_loss, head_rows
from slmops_course.tasks import Example
from slmops_course.training import TrainingError, TrainingSettings, make_batch, train


@pytest.fixture
def headed(loaded, tiny_task):
    """The tiny model with heads; only these learn."""
    model, tokenizer = loaded
    model.requires_grad_(False)
    add_heads(model, tiny_task)
    return model, tokenizer


def test_a_head_has_a_row_for_each_allowed_value(headed, tiny_task):
    shapes = [tuple(head.weight.shape) for head in headed[0].task_heads]
    assert shapes == [(3, headed[0].config.hidden_size), (2, headed[0].config.hidden_size)]


def test_heads_begin_without_an_opinion(headed, tiny_task):
    train_split = tiny_task.splits["train"]
    rows, loss = head_rows(headed[1], tiny_task, train_split), head_loss(tiny_task, train_split)
    expected = torch.tensor(3.0).log() + torch.tensor(2.0).log()
    assert loss(headed[0], make_batch(rows, [0, 5])).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_row_is_the_prompt_and_one_more_token(headed, tiny_task):
    row = head_rows(headed[1], tiny_task, tiny_task.splits["train"])[0]
    assert row.answer_start == len(row.ids) - 1


def test_heads_and_layers_learn_twelve_messages_by_heart(headed, tiny_task):
    model, tokenizer = headed
    model.model.layers.requires_grad_(True)
    examples = tiny_task.splits["train"]
    settings = TrainingSettings(epochs=40, learning_rate=1e-2, batch_size=4)
    train(model, head_rows(tokenizer, tiny_task, examples), settings, loss=head_loss(tiny_task, examples))
    replies = ask_all(HeadChatModel(model, tokenizer, tiny_task), tiny_task, examples)
    assert [tiny_task.parse(reply.text) for reply in replies] == [dict(example.answer) for example in examples]


def test_a_frozen_model_stays_as_it_was(headed, tiny_task):
    model, tokenizer = headed
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    examples = tiny_task.splits["train"]
    settings = TrainingSettings(epochs=2, learning_rate=1e-2, batch_size=4)
    train(model, head_rows(tokenizer, tiny_task, examples), settings, loss=head_loss(tiny_task, examples))
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    assert model.task_heads[0].weight.abs().max() > 0


def test_replies_keep_the_messages_order_and_are_always_valid(headed, tiny_task):
    model, tokenizer = headed
    torch.manual_seed(0)
    for head in model.task_heads:
        torch.nn.init.normal_(head.weight)
    chat, examples = HeadChatModel(model, tokenizer, tiny_task), tiny_task.splits["test"]
    together = [reply.text for reply in ask_all(chat, tiny_task, examples)]
    alone = [chat.reply(tiny_task.messages(example.text)).text for example in examples]
    assert together == alone
    assert all(tiny_task.parse(text) for text in together)
    assert isinstance(chat.reply(tiny_task.messages("x")), Reply)


def test_a_message_without_an_answer_is_named(tiny_task):
    with pytest.raises(TrainingError, match="u-7 has no answer"):
        head_loss(tiny_task, [Example("u-7", "hello")])
