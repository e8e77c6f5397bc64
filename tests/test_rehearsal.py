"""The endpoint to rehearse with, asked by plain HTTP: it does what its script says and then answers well."""

import http.client
import json
import threading
import urllib.error
import urllib.request

import pytest

from slmops_course.rehearsal import RehearsalEndpoint, body, busy, cut

CONVERSATION = {"model": "m", "messages": [{"role": "user", "content": "Where is my card?"}]}


def post(endpoint, *, timeout=5):
    request = urllib.request.Request(f"{endpoint.url}/chat/completions", json.dumps(CONVERSATION).encode())
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return response.read().decode()


def test_steps_are_played_one_a_request_and_then_answers_are_good():
    with RehearsalEndpoint(str.upper, busy, cut, body("sign in")) as endpoint:
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(endpoint)
        with pytest.raises(http.client.IncompleteRead):
            post(endpoint)
        assert post(endpoint) == "sign in"
        answer = json.loads(post(endpoint))
    refused.value.close()
    assert (refused.value.code, refused.value.headers["Retry-After"]) == (429, "0")
    assert answer["choices"][0]["message"]["content"] == "WHERE IS MY CARD?"
    assert endpoint.asked == ["Where is my card?"] * 4


def test_it_is_gone_after_its_block_and_so_is_its_thread():
    before = threading.active_count()
    with RehearsalEndpoint(str.upper) as endpoint:
        post(endpoint)
    with pytest.raises(urllib.error.URLError):
        post(endpoint)
    assert threading.active_count() <= before + 1
