"""ChatModel: the one interface that every stage's result answers to.

A ChatModel turns conversations into replies with their token counts and times. Evaluation, benchmarking and serving
know nothing else, so one table compares a PyTorch model, an ONNX model and a served one.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": "…"}
Conversation = Sequence[Message]

BATCH_SIZE = 64  # messages decoded together; more costs memory and gains little on two cores
BATCH_TOKENS = 8192  # of their prompts: long prompts are decoded by fewer at once, for the same reason
MAX_NEW_TOKENS = 48  # the longest answer of the support desk takes 32


@dataclass(frozen=True)
class Reply:
    """What a model answered, and what it took."""

    text: str
    prompt_tokens: int
    output_tokens: int  # with the end token
    time_to_first_token_s: float  # from the call to the first token of this reply (of its batch, in a batch)
    latency_s: float  # from the call to the end of this reply (of its batch, in a batch)


class ChatModel(ABC):
    """A model that answers conversations. Use it as a context manager, so that it is closed even after an error."""

    name: str

    @abstractmethod
    def generate(self, conversations: Sequence[Conversation], *, max_new_tokens: int = MAX_NEW_TOKENS) -> list[Reply]:
        """Answer every conversation, in order, by greedy decoding."""

    def reply(self, conversation: Conversation, *, max_new_tokens: int = MAX_NEW_TOKENS) -> Reply:
        """Answer one conversation."""
        return self.generate([conversation], max_new_tokens=max_new_tokens)[0]

    def close(self) -> None:  # noqa: B027 - not every model has something to give back
        """Give back memory, ports and files."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class RecordedChatModel(ChatModel):
    """Answers that were recorded earlier: a teacher that is not here today, or a known answer for a test.

    Example: `RecordedChatModel({"my card is gone": '{"intent":"card_lost"}'})`. A message that was not recorded gets
    an empty reply, which no schema accepts.
    """

    name = "recorded"

    def __init__(self, answers: Mapping[str, str]):
        self.answers = dict(answers)

    def generate(self, conversations, *, max_new_tokens=MAX_NEW_TOKENS):
        return [Reply(self.answers.get(c[-1]["content"], ""), 0, 0, 0.0, 0.0) for c in conversations]


class TorchChatModel(ChatModel):
    """A Hugging Face model under PyTorch on the CPU.

    `dtype` is "float32" or "bfloat16"; bfloat16 halves the memory, and is faster where the CPU has AMX or AVX512-BF16.
    """

    def __init__(self, folder: Path, *, dtype: str = "float32", name: str | None = None):
        model, tokenizer = load_torch(folder, dtype=dtype)
        self._set(model, tokenizer, name or folder.name)

    @classmethod
    def from_loaded(cls, model, tokenizer, name: str) -> "TorchChatModel":
        """Wrap a model that is in memory already, such as one with adapters."""
        chat = cls.__new__(cls)
        chat._set(model, tokenizer, name)
        return chat

    def _set(self, model, tokenizer, name):
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name

    def generate(self, conversations, *, max_new_tokens=MAX_NEW_TOKENS):
        replies: dict[int, Reply] = {}
        all_prompts = [prompt_ids(self.tokenizer, conversation) for conversation in conversations]
        for indexes, prompts in batches_by_length(all_prompts, BATCH_SIZE):
            replies.update(zip(indexes, self._generate_batch(prompts, max_new_tokens), strict=True))
        return [replies[i] for i in range(len(conversations))]

    def _generate_batch(self, prompts: list[list[int]], max_new_tokens: int) -> list[Reply]:
        import torch

        start = time.perf_counter()
        first = _FirstTokenClock()
        ids, mask = pad_left(prompts, pad=self.tokenizer.pad_token_id)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                stopping_criteria=[first],
            )
        latency_s = time.perf_counter() - start
        replies = []
        for prompt, row in zip(prompts, out[:, ids.shape[1] :].tolist(), strict=True):
            text, count = decode_reply(self.tokenizer, row)
            replies.append(Reply(text, len(prompt), count, first.time - start, latency_s))
        return replies

    def close(self):
        self.model = None


class _FirstTokenClock:
    """A stopping criterion that never stops and remembers when it was first asked: after the first token."""

    time: float | None = None

    def __call__(self, input_ids, scores, **_):
        import torch

        if self.time is None:
            self.time = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load_torch(folder: Path, *, dtype: str = "float32"):
    """Load `(model, tokenizer)` from a folder; safetensors only, nothing downloaded, no code from the folder run."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    model.generation_config.max_length = None
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def batches_by_length(
    prompts: Sequence[list[int]], batch_size: int, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield `(indexes, prompts)` with prompts of like length together, so that little padding is computed.

    A batch has at most `batch_size` prompts and, padded, at most `batch_tokens` tokens; a longer prompt comes alone.
    """
    indexes: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)):
        if indexes and (len(indexes) == batch_size or len(prompts[i]) * (len(indexes) + 1) > batch_tokens):
            yield indexes, [prompts[j] for j in indexes]
            indexes = []
        indexes.append(i)
    if indexes:
        yield indexes, [prompts[j] for j in indexes]


def pad_left(prompts: Sequence[list[int]], *, pad: int):
    """Prompts padded on the left, so that all answers begin at one place: ids and attention mask, shape (prompts, tokens).

    Several prompts take a multiple of 8 tokens, because oneDNN keeps a kernel for every shape it meets.
    """
    import torch

    width = -(-max(map(len, prompts)) // 8) * 8 if len(prompts) > 1 else len(prompts[0])
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def prompt_ids(tokenizer, conversation: Conversation) -> list[int]:
    """The token ids of a conversation up to where the assistant's answer begins."""
    text = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode_reply(tokenizer, ids: list[int]) -> tuple[str, int]:
    """Text and token count of generated ids up to the end token, which counts."""
    end = tokenizer.eos_token_id
    count = ids.index(end) + 1 if end in ids else len(ids)
    return tokenizer.decode(ids[:count], skip_special_tokens=True), count
