"""A task head: a layer that chooses among the allowed values, in place of a model that writes its answer token by token."""

import time
from collections.abc import Callable, Sequence

from slmops_course.chat import MAX_NEW_TOKENS, ChatModel, Reply, prompt_ids
from slmops_course.tasks import Example, Task
from slmops_course.training import Batch, Row, TrainingError, answer_states, make_batch

BATCH_ROWS = 32


def add_heads(model, task: Task) -> None:
    """Give a Llama-type model one head for each field of the answer: a matrix of the shape (allowed values, hidden size).

    They read the model's last state of the prompt. They begin at zero, so that every value is as likely as any other.
    """
    import torch

    weight = model.lm_head.weight
    heads = [torch.nn.Linear(model.config.hidden_size, len(values), dtype=weight.dtype) for values in task.fields.values()]
    for head in heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    model.task_heads = torch.nn.ModuleList(heads)


def head_rows(tokenizer, task: Task, examples: Sequence[Example]) -> list[Row]:
    """Each message's prompt as a row, with one token after it, so that the prompt's last state is the one that is used."""
    prompts = [prompt_ids(tokenizer, task.messages(example.text)) for example in examples]
    return [Row([*prompt, tokenizer.eos_token_id], len(prompt)) for prompt in prompts]


def head_loss(task: Task, examples: Sequence[Example]) -> Callable:
    """Cross-entropy of the right values, added up over the fields; for `training.train` with `head_rows`.

    Raises TrainingError for a message without an answer.
    """
    import torch

    missing = [example.id for example in examples if example.answer is None]
    if missing:
        raise TrainingError(f"The message {missing[0]} has no answer: expected labelled messages; label or drop it.")
    wanted = torch.tensor([[values.index(e.answer[name]) for name, values in task.fields.items()] for e in examples])

    def loss(model, batch: Batch):
        states, targets = answer_states(model, batch), wanted[batch.indexes]
        return sum(
            torch.nn.functional.cross_entropy(head(states).float(), targets[:, field])
            for field, head in enumerate(model.task_heads)
        )

    return loss


class HeadChatModel(ChatModel):
    """A model with task heads, as a ChatModel: it writes nothing, so its answers are always valid, and have no tokens."""

    def __init__(self, model, tokenizer, task: Task, name: str = "heads"):
        self.model, self.tokenizer, self.task, self.name = model.eval(), tokenizer, task, name

    def generate(self, conversations, *, max_new_tokens=MAX_NEW_TOKENS):
        start = time.perf_counter()
        prompts = [prompt_ids(self.tokenizer, conversation) for conversation in conversations]
        rows = [Row([*prompt, self.tokenizer.eos_token_id], len(prompt)) for prompt in prompts]
        replies: dict[int, Reply] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        for first in range(0, len(order), BATCH_ROWS):
            indexes = order[first : first + BATCH_ROWS]
            for index, answer in zip(indexes, self._choose(make_batch(rows, indexes)), strict=True):
                seconds = time.perf_counter() - start
                replies[index] = Reply(self.task.target(answer), len(prompts[index]), 0, seconds, seconds)
        return [replies[i] for i in range(len(rows))]

    def _choose(self, batch: Batch) -> list[dict[str, str]]:
        import torch

        with torch.inference_mode():
            states = answer_states(self.model, batch)
            best = [head(states).argmax(dim=1).tolist() for head in self.model.task_heads]
        fields = self.task.fields.items()
        return [
            {name: values[k] for (name, values), k in zip(fields, chosen, strict=True)} for chosen in zip(*best, strict=True)
        ]
