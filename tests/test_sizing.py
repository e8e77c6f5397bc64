import math

import pytest

from slmops_course.sizing import (
    PRECISIONS,
    SIZE_CLASSES,
    SizingError,
    break_even_months,
    cache_bytes,
    cloud_cost,
    devices_needed,
    fits,
    memory_bytes,
    size_class,
)

# --- Memory ---


def test_memory_is_parameters_times_bits():
    assert memory_bytes(1000, 32) == 4000
    assert memory_bytes(1001, 4) == 501  # half a byte is a whole one in a file


def test_int4_saves_seven_eighths_of_fp32_and_three_quarters_of_fp16():
    sizes = {name: memory_bytes(1e9, bits) for name, bits in PRECISIONS.items()}

    assert 1 - sizes["int4"] / sizes["fp32"] == 0.875
    assert 1 - sizes["int4"] / sizes["fp16"] == 0.75


def test_a_scale_for_every_group_of_weights_is_counted():
    assert memory_bytes(1e6, 4, group_size=32) == 562_500
    assert memory_bytes(1e6, 4, group_size=32, scale_bits=32) == 625_000


@pytest.mark.parametrize(("parameters", "bits"), [(0, 4), (-1, 4), (1e9, 0), (math.nan, 4)])
def test_no_parameters_or_no_bits_are_refused(parameters, bits):
    with pytest.raises(SizingError, match="expected above 0"):
        memory_bytes(parameters, bits)


def test_the_cache_holds_a_key_and_a_value_a_token():
    one = cache_bytes(tokens=1, layers=1, kv_heads=1, head_size=1, bits=8)

    assert one == 2
    assert cache_bytes(tokens=1000, layers=30, kv_heads=3, head_size=64) == 23_040_000
    assert cache_bytes(tokens=0, layers=30, kv_heads=3, head_size=64) == 0


# --- Classes and devices ---


@pytest.mark.parametrize("name", SIZE_CLASSES)
def test_both_ends_of_a_class_belong_to_it(name):
    assert [size_class(end) for end in SIZE_CLASSES[name]] == [name, name]


def test_models_outside_the_classes_are_named_as_such():
    assert size_class(1e6) == "below micro"
    assert size_class(1.45e9) == "micro"
    assert size_class(70e9) == "large"


def test_a_model_fits_up_to_the_share_and_not_beyond():
    assert fits(1000, 8, 2000)
    assert not fits(1001, 8, 2000)
    assert fits(1001, 8, 2000, share=0.6)


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(SizingError, match="share of memory"):
        fits(1000, 8, 2000, share=share)


def test_a_device_without_memory_is_refused():
    with pytest.raises(SizingError, match="device_bytes"):
        fits(1000, 8, 0)


# --- Cost ---


def test_a_cloud_bill_is_tokens_times_prices():
    prices = {"price_in": 0.5, "price_out": 2.0}

    assert cloud_cost(1_000_000, tokens_in=400, tokens_out=30, **prices) == pytest.approx(260)
    assert cloud_cost(0, tokens_in=400, tokens_out=30, **prices) == 0


def test_one_device_answers_1125_messages_of_3_2_s_an_hour_and_not_one_more():
    assert devices_needed(1125, latency_s=3.2, hours=1) == 1
    assert devices_needed(1126, latency_s=3.2, hours=1) == 2
    assert devices_needed(0, latency_s=3.2, hours=1) == 1


def test_break_even_is_where_both_costs_meet():
    months = break_even_months(600, local_a_month=10, cloud_a_month=60)

    assert months == 12
    assert 600 + months * 10 == months * 60


def test_local_that_costs_as_much_a_month_never_breaks_even():
    assert break_even_months(600, local_a_month=10, cloud_a_month=10) == math.inf
    assert break_even_months(600, local_a_month=10, cloud_a_month=0) == math.inf


def test_nothing_to_pay_first_breaks_even_at_once_or_never():
    assert break_even_months(0, local_a_month=0, cloud_a_month=0) == 0
    assert break_even_months(0, local_a_month=5, cloud_a_month=60) == 0
    assert break_even_months(0, local_a_month=60, cloud_a_month=5) == math.inf


def test_a_negative_cost_is_refused():
    with pytest.raises(SizingError, match="below 0"):
        break_even_months(-1, local_a_month=0, cloud_a_month=5)
