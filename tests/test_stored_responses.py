"""Responses that are kept are each its own client's, however another asks for them."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager

import pytest

pytest.importorskip("prometheus_client", reason="the server's packages are not installed")

from qaa_serve.server.context import RequestContext, current_request
from qaa_serve.server.keys import make_key
from qaa_serve.server.stored_responses import KeptResponses

A, B = make_key("secret-a", "a"), make_key("secret-b", "b")


@contextmanager
def request_of(key):
    token = current_request.set(RequestContext(key, "10.0.0.9"))
    try:
        yield
    finally:
        current_request.reset(token)


@pytest.fixture
def table():
    table = KeptResponses().table()
    with request_of(A):
        table["resp_1"] = "a's"
    return table


def test_a_client_finds_what_it_has_made_and_nobody_else_does(table):
    with request_of(A):
        assert table.get("resp_1") == "a's"
    for other in (B, None):
        with request_of(other):
            assert table.get("resp_1") is None
            assert table.get("resp_1", "nothing") == "nothing"
    assert table.get("resp_1") is None, "nor does a task of the server's own"


def test_each_client_has_its_own(table):
    with request_of(B):
        table["resp_2"] = "b's"
        assert (table.get("resp_1"), table.get("resp_2")) == (None, "b's")
    with request_of(A):
        assert (table.get("resp_1"), table.get("resp_2")) == ("a's", None)


def test_another_clients_response_cannot_be_written_over(table):
    for other in (B, None):
        with request_of(other), pytest.raises(ValueError, match="leave request_id out") as caught:
            table["resp_1"] = "mine"
        assert "secret" not in str(caught.value)
    with request_of(A):
        assert table.get("resp_1") == "a's"
        table["resp_1"] = "newer"
        assert table.get("resp_1") == "newer"


def test_what_is_not_there_is_nobodys(table):
    for key in (A, B, None):
        with request_of(key):
            assert table.get("resp_9") is None
            assert table.get("resp_9", "nothing") == "nothing"


def test_without_keys_all_have_all():
    table = KeptResponses().table()
    with request_of(None):
        table["resp_1"] = "anybody's"
    with request_of(None):
        assert table.get("resp_1") == "anybody's"
    assert table.get("resp_1") == "anybody's"


def test_a_key_with_another_name_is_the_same_client_and_one_with_the_same_name_is_not(table):
    with request_of(make_key("secret-a", "renamed")):
        assert table.get("resp_1") == "a's"
    with request_of(make_key("secret-c", "a")):
        assert table.get("resp_1") is None


def test_a_task_that_a_request_starts_writes_for_its_client():
    table = KeptResponses().table()

    async def main():
        async def later():
            await asyncio.sleep(0)
            table["resp_1"] = "queued"
            table["resp_1"] = "done"

        with request_of(A):
            task = asyncio.create_task(later())
        await task

    asyncio.run(main())
    with request_of(A):
        assert table.get("resp_1") == "done"
    with request_of(B):
        assert table.get("resp_1") is None


def test_the_oldest_is_forgotten_in_all_tables():
    kept = KeptResponses(limit=3)
    messages, responses, events = (kept.table() for _ in range(3))
    with request_of(A):
        for i in range(3):
            messages[f"resp_{i}"] = responses[f"resp_{i}"] = i
        messages["failed"] = "of a response that never came"
        assert "resp_0" not in messages
        assert "resp_0" not in responses
        responses["resp_1"] = "written anew, so it is not the oldest any more"
    with request_of(B):
        events["resp_4"] = responses["resp_4"] = 4
    assert (len(messages), len(responses), len(events)) == (2, 2, 1)
    with request_of(A):
        assert responses.get("resp_1")
        assert responses.get("resp_2") is None
        responses["resp_2"] = "anybody's again"
    assert (len(messages), len(responses)) == (1, 3)
