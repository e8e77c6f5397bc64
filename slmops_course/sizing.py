"""Arithmetic to do before choosing a model or a device: memory, what fits, cost and break-even. Pure functions."""

import math

from slmops_course.errors import CourseError

PRECISIONS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}  # bits a parameter
# The course's parameter classes, in parameters, both ends included.
SIZE_CLASSES = {"micro": (0.1e9, 1.4e9), "small": (1.5e9, 13.9e9), "medium": (14e9, 30e9)}


class SizingError(CourseError):
    """A quantity with which the arithmetic makes no sense."""


def size_class(parameters: float) -> str:
    """The course's class of a parameter count; what falls into a gap counts to the class below it.

    Example: 0.135e9 -> "micro", 3.8e9 -> "small", 14e9 -> "medium", 70e9 -> "large", 1e6 -> "below micro"
    """
    if parameters > SIZE_CLASSES["medium"][1]:
        return "large"
    reached = [name for name, (low, _) in SIZE_CLASSES.items() if parameters >= low]
    return reached[-1] if reached else "below micro"


def memory_bytes(parameters: float, bits: float, *, group_size: int | None = None, scale_bits: float = 16) -> int:
    """What a model's weights take: parameters x bits / 8, and one scale for each group of weights, if they have one.

    Example: memory_bytes(1_000_000, 4) -> 500_000; memory_bytes(1_000_000, 4, group_size=32) -> 562_500
    """
    _check(parameters=parameters, bits=bits)
    each = bits + (scale_bits / group_size if group_size else 0)
    return math.ceil(parameters * each / 8)


def cache_bytes(*, tokens: int, layers: int, kv_heads: int, head_size: int, bits: float = 16) -> int:
    """What a conversation takes on top of the weights: a key and a value for each token, layer and key-value head.

    Example: tokens=1000, layers=30, kv_heads=3, head_size=64, bits=16 -> 23_040_000
    """
    return math.ceil(2 * tokens * layers * kv_heads * head_size * bits / 8)


def fits(parameters: float, bits: float, device_bytes: float, *, share: float = 0.5) -> bool:
    """Whether a model's weights take at most a share of a device's memory; the rest is for everything else.

    Example: fits(3.8e9, 4, 8e9) -> True (1.9 of 4 GB); fits(3.8e9, 16, 8e9) -> False (7.6 of 4 GB)
    """
    _check(device_bytes=device_bytes)
    if not 0 < share <= 1:
        raise SizingError(f"The share of memory is {share}: expected above 0 and at most 1, such as 0.5.")
    return memory_bytes(parameters, bits) <= share * device_bytes


def cloud_cost(messages: float, *, tokens_in: float, tokens_out: float, price_in: float, price_out: float) -> float:
    """What a service that charges by the token takes for some messages; prices are for a million tokens.

    Example: 1_000_000 messages of 400 + 30 tokens at 0.50 and 2.00 -> 260.0
    """
    return messages * (tokens_in * price_in + tokens_out * price_out) / 1e6


def devices_needed(messages: float, *, latency_s: float, hours: float) -> int:
    """How many devices answer so many messages, one at a time each, in so many hours.

    Example: 1125 messages of 3.2 s in 1 hour -> 1; one message more -> 2
    """
    _check(latency_s=latency_s, hours=hours)
    # Rounded first: 1125 x 3.2 is a little more than 3600 in binary fractions.
    return max(1, math.ceil(round(messages * latency_s / (hours * 3600), 9)))


def break_even_months(once: float, *, local_a_month: float, cloud_a_month: float) -> float:
    """After how many months local costs, paid once and monthly, have been no more than the cloud's; inf for never.

    Example: once=600, local_a_month=10, cloud_a_month=60 -> 12.0; with cloud_a_month=10 -> inf
    """
    if min(once, local_a_month, cloud_a_month) < 0:
        raise SizingError(f"A cost is below 0 ({once}, {local_a_month}, {cloud_a_month}): expected 0 or more.")
    if once == 0 and local_a_month <= cloud_a_month:
        return 0.0
    saved = cloud_a_month - local_a_month
    return once / saved if saved > 0 else math.inf


def _check(**quantities: float) -> None:
    for name, value in quantities.items():
        if not value > 0:
            raise SizingError(f"{name} is {value}: expected above 0.")
