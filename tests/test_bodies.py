"""Bodies: what is read of them is what the app reads, within bounds, and nothing of them stays counted."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

pytest.importorskip("starlette", reason="the server's packages are not installed")
pytest.importorskip("msgspec", reason="the server's packages are not installed")

from qaa_serve.server.asgi import ClientGoneError
from qaa_serve.server.bodies import Asked, Bodies, Body, asked_by, limited_receive, media_type
from qaa_serve.server.errors import RefusedError

DEADLINE_S = 60
CHAT = "/v1/chat/completions"
URLENCODED = "application/x-www-form-urlencoded"


def scope_of(kind="application/json", **headers):
    headers = {"content-type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return {"type": "http", "method": "POST", "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}


def asked(data, kind="application/json", path=CHAT, **headers):
    """What the gate sees in a body."""
    if not isinstance(data, bytes):
        data = json.dumps(data).encode()
    return asyncio.run(asked_by(Body(data, Bodies(max_bytes=1, max_held_bytes=1, timeout_s=1)), path,
                                scope_of(kind, **headers)))  # fmt: skip


def refusal(data, *args, **kwargs):
    with pytest.raises(RefusedError) as caught:
        asked(data, *args, **kwargs)
    assert caught.value.status == 400
    return caught.value.message


# ---------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model": "one"}', "one"),
        (b'{"model": "two", "model": "one"}', "one"),
        (b'{"model": "one", "model": null}', None),
        (b'{"mod\\u0065l": "one"}', "one"),
        (b'{"Model": "one", " model": "two"}', None),
        (b' \n{"a": {"model": "two"}, "model": "one"} \t', "one"),
        (b'{"model": "\\ud83d\\ude00"}', "\N{GRINNING FACE}"),
        ('{"model": "\N{GRINNING FACE}"}'.encode(), "\N{GRINNING FACE}"),
        (b'{"model": ""}', None),
        (b'{"model": null}', None),
        (b"{}", None),
        (b"", None),
    ],
)
def test_the_model_that_a_body_names(body, model):
    assert asked(body) == Asked(model)


NO_JSON = [
    b'\xef\xbb\xbf{"model": "one"}',
    '{"model": "one"}'.encode("utf-16"),
    '{"model": "one"}'.encode("utf-16-le"),
    '{"model": "one"}'.encode("utf-16-be"),
    '{"model": "one"}'.encode("utf-32"),
    '{"model": "one"}'.encode("utf-32-le"),
    b'{"model": "\\ud800"}',
    b'{"model": "one", "x": "\\udc00"}',
    b'{"\\ud800": 1, "model": "one"}',
    b'{"model": "\xed\xa0\x80"}',
    b'{"model": "one", "x": "\xed\xa0\x80"}',
    b'{"model": "\xff"}',
    b'{"model": "one", "messages": [{"content": "\xff"}]}',
    b'{"\xff": 1, "model": "one"}',
    b'{"model": "one", "temperature": NaN}',
    b'{"model": "one", "messages": [Infinity]}',
    b'{"model": "one", "n": -Infinity}',
    b'{"model": "one"',
    b'{"model": "one"}}',
    b'{"model": "one"} {"model": "two"}',
    b"{'model': 'one'}",
    b'{"model": "one",}',
    b'{"model": "one" /* really */}',
    b'{"model": "one", "x": 01}',
    b'{"model": "a\nb"}',
    b'{"a": ' + b"[" * 100_000,
    b'{"model": "one", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"model": "one", "messages": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    b"\0",
    b" ",
    b"model=one",
]


@pytest.mark.parametrize("body", NO_JSON, ids=range(len(NO_JSON)))
def test_what_is_no_json_in_utf_8_is_refused(body):
    assert refusal(body).startswith("the body is not JSON in UTF-8: ")


@pytest.mark.parametrize("body", [5, "one", [1], None, True, {"model": 5}, {"model": ["one"]}, {"model": {}},
                                  {"model": False}, {"model": 1.5}])  # fmt: skip
def test_a_model_that_is_no_name_is_refused(body):
    assert refusal(body).startswith("the body is not what the route takes: ")


def test_the_model_of_an_invocation_is_its_headers():
    named = {"x_amzn_sagemaker_adapter_identifier": "one"}
    assert asked({"model": "two"}, path="/invocations", **named).model == "one"
    assert asked({"model": "two"}, path="/invocations").model is None
    assert asked({"model": "two"}, path=CHAT, **named).model == "two"


# ----------------------------------------------------------------------------------------------------- forms

PARTS = '--b\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'


@pytest.mark.parametrize(
    ("body", "kind", "model"),
    [
        (b"model=one&n=3", URLENCODED, "one"),
        (b"model=two&model=one", URLENCODED, "one"),
        (b"model=o%6ee+x", URLENCODED + "; charset=utf-8", "one x"),
        (b"model=", URLENCODED, None),
        (b"", URLENCODED, None),
        ((PARTS.format("model", "one") + "--b--").encode(), "multipart/form-data; boundary=b", "one"),
        ((PARTS.format("model", "one") + "--b--").encode(), 'Multipart/Form-Data ; boundary="b"', "one"),
        ((PARTS.format("file", "x") + "--b--").encode(), "multipart/form-data; boundary=b", None),
        (
            (PARTS.format('model"; filename="f', "one") + "--b--").encode(),
            "multipart/form-data; boundary=b",
            None,
        ),
    ],
)
def test_the_model_that_a_form_names(body, kind, model):
    assert asked(body, kind) == Asked(model)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"--c\r\n\r\n", "multipart/form-data; boundary=b"),
        (b"--b\r\nContent-Disposition form-data\r\n\r\nx\r\n--b--", "multipart/form-data; boundary=b"),
        (b"--b\r\n\r\nx\r\n--b--", "multipart/form-data; boundary=b"),
        (b"x", "multipart/form-data"),
        (b"&".join(b"a=1" for _ in range(2000)), URLENCODED),
    ],
)
def test_a_form_that_is_none_is_refused(body, kind):
    assert refusal(body, kind).startswith("the body is not the form that it is said to be")


@pytest.mark.parametrize("kind", ["", "text/plain", "application/json; charset=utf-16", f"{URLENCODED}+json",
                                  "multipart/form-data-json", "x multipart/form-data"])  # fmt: skip
def test_whatever_is_no_form_is_read_as_json(kind):
    assert asked(b'{"model": "one", "n": 2}', kind) == Asked("one", 1, 2)
    assert media_type(scope_of(kind)) == kind.partition(";")[0]


# ----------------------------------------------------------------------------------------- prompts and answers


@pytest.mark.parametrize(
    ("fields", "prompts"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": ["a"]}, 1),
        ({"prompt": ["a", "b", "c"]}, 3),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2, 3]]}, 1),
        ({"prompt": [[1, 2], [3], [4]]}, 3),
        ({"prompt": []}, 1),
        ({"prompt": None}, 1),
        ({"prompt": {"id": "x"}}, 1),
        ({"prompt": 5}, 1),
        ({"prompt": "[1, 2]"}, 1),
        ({"prompt_embeds": "AAAA"}, 1),
        ({"prompt_embeds": ["AAAA", "BBBB"]}, 2),
        ({"prompt_embeds": ["AAAA", "BBBB"], "prompt": ["a", "b", "c"]}, 5),
        ({"prompt_embeds": ["AAAA", "BBBB"], "prompt": []}, 2),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, 1),
        ({"messages": [[{"role": "user"}], [{"role": "user"}]]}, 2),
        ({"input": "a"}, 1),
        ({"input": ["a", "b"]}, 2),
        ({"input": [{"role": "user"}, {"role": "user"}]}, 1),
        ({"input": [[1], [2]]}, 2),
        ({"items": ["a", "b", "c"]}, 3),
        ({"items": [[1], [2]]}, 2),
        ({"query": "x"}, 1),
        ({}, 1),
    ],
)
def test_prompts_are_counted_as_the_app_runs_them(fields, prompts):
    assert asked({"model": "m", **fields}) == Asked("m", prompts, 1)
    spaced = json.dumps({"model": "m", **fields}, indent=3).encode()
    assert asked(spaced).prompts == prompts


@pytest.mark.parametrize(
    ("n", "answers"),
    [(1, 1), (3, 3), (3.0, 3), ("3", 3), ("3.0", 3), (" 3 ", 3), (True, 1), (None, 1), (0, 1), (-5, 1), ("x", 1),
     ("nan", 1), ("inf", 1), ([3], 1), ({"n": 3}, 1), ("", 1), (1 << 40, 1 << 40)],
)  # fmt: skip
def test_answers_are_counted_as_the_app_takes_n(n, answers):
    assert asked({"n": n}).n == answers
    assert asked({"sampling_params": {"n": n, "x": [1]}}).n == answers


@pytest.mark.parametrize("sampling_params", [None, [1], "n", 5, {}, {"m": 5}])
def test_sampling_params_without_an_n_ask_for_one_answer(sampling_params):
    assert asked({"sampling_params": sampling_params}).n == 1


def test_the_larger_n_counts():
    assert asked({"n": 2, "sampling_params": {"n": 5}}).n == 5
    assert asked({"n": 5, "sampling_params": {"n": 2}}).n == 5


def test_a_number_beyond_all_floats_is_no_error_of_the_servers():
    assert asked(b'{"model": "one", "n": 1e999}').n == 1


# ------------------------------------------------------------------------------- beside another JSON reader


def some_json(rng, depth=0):
    """JSON, or nearly."""
    kind = rng.randrange(12 if depth < 3 else 8)
    if kind < 3:
        return rng.choice(
            [b'"one"', b'"two"', b'""', b'"\\u006fne"', b'"\xc3\xa9"', b'"\\ud83d\\ude00"', b'"a\\"b"']
        )
    if kind < 6:
        return rng.choice([b"1", b"-1", b"2.0", b"3", b'"3"', b"1e2", b"null", b"true"])
    if kind == 6:
        return rng.choice(
            [b"NaN", b"Infinity", b"01", b"1e999", b"+1", b'"\\ud800"', b'"\xff"', b'"\xed\xa0\x80"']
        )
    if kind == 7:
        return rng.choice([b"[]", b"{}", b"[1,2]", b'["a","b"]', b"[[1],[2]]", b'"\\/"', b'"\\x"', b"'a'"])
    if kind < 10:
        return b"[" + b",".join(some_json(rng, depth + 1) for _ in range(rng.randrange(4))) + b"]"
    return some_object(rng, depth + 1)


def some_object(rng, depth=0):
    names = [b'"model"', b'"model"', b'"mod\\u0065l"', b'"n"', b'"prompt"', b'"messages"', b'"input"',
             b'"sampling_params"', b'"Model"', b'"x"', b'"\\ud800"', b"model"]  # fmt: skip
    space = rng.choice([b"", b"", b" ", b"\n\t"])
    weights = [8, 8, 4, 8, 8, 4, 4, 4, 2, 8, 0.3, 0.3]
    fields = [
        rng.choices(names, weights)[0] + space + b":" + space + some_json(rng, depth)
        for _ in range(rng.randrange(5))
    ]
    return b"{" + space + (space + b"," + space).join(fields) + space + b"}"


def damaged(rng, data):
    """The same with a byte more, less or other now and then, or in another encoding."""
    chance = rng.random()
    if chance < 0.75 or not data:
        return data
    if chance < 0.8:
        encoding = rng.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
        return data.decode("latin-1").encode(encoding)
    at = rng.randrange(len(data))
    byte = bytes([rng.choice(b'"\\{}[],:\0\x80\xff aN0')])
    return rng.choice(
        [data[:at] + byte + data[at:], data[:at] + data[at + 1 :], data[:at] + byte + data[at + 1 :]]
    )


def read(data):
    """As `asked`, without a loop for each: nothing is waited for where there is no form."""
    coroutine = asked_by(Body(data, Bodies(max_bytes=1, max_held_bytes=1, timeout_s=1)), CHAT, scope_of())
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def test_what_both_readers_take_names_the_same_model():
    rng = random.Random(5)
    both = only_theirs = 0
    for _ in range(20_000):
        data = damaged(rng, some_object(rng))
        try:
            theirs = json.loads(data)
        except (ValueError, RecursionError):
            continue
        try:
            ours = read(data)
        except RefusedError:
            only_theirs += 1
            continue
        assert isinstance(theirs, dict), data
        assert ours.model == (theirs.get("model") or None), data
        both += 1
    assert both > 5000
    assert only_theirs > 500, "among them what would be taken for something else"


def sequences_of_a_completion(fields):
    """prompts x n by the words of the API: a text or tokens, or a list of either."""
    prompt = fields["prompt"]
    prompts = len(prompt) if isinstance(prompt, list) and isinstance(prompt[0], str | list) else 1
    return prompts * int(float(fields.get("n", 1)))


def test_a_completion_counts_as_many_sequences_as_the_app_runs():
    rng = random.Random(7)

    def tokens():
        return [rng.randrange(9) for _ in range(rng.randint(1, 4))]

    for _ in range(2000):
        count = rng.randint(1, 5)
        n = rng.randint(1, 9)
        fields = {
            "prompt": rng.choice(
                [
                    "text",
                    "[1, 2]",
                    tokens(),
                    [rng.choice(["", "[", "x"]) for _ in range(count)],
                    [tokens()] * count,
                ]
            ),
            "x": rng.choice([None, ["a", "b"], {"prompt": ["a", "b"], "n": 7}]),
            **rng.choice([{}, {"n": n}, {"n": float(n)}, {"n": str(n)}]),
        }
        data = json.dumps(fields, indent=rng.choice([None, 0, 2])).encode()
        ours = read(data)
        assert ours.prompts * ours.n == sequences_of_a_completion(fields), data


# ---------------------------------------------------------------------------------------------------- limits


class Sender:
    """A client that sends its body part by part; None stands for its going away."""

    def __init__(self, *parts, whole=True):
        self.parts = list(parts)
        self.whole = whole
        self.read = 0

    async def __call__(self):
        if not self.parts:
            await asyncio.Event().wait()
        part = self.parts.pop(0)
        self.read += 1
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(self.parts) or not self.whole}


def bodies(max_bytes=100, max_held_bytes=1000, timeout_s=DEADLINE_S):
    return Bodies(max_bytes=max_bytes, max_held_bytes=max_held_bytes, timeout_s=timeout_s)


async def refused(coroutine):
    with pytest.raises(RefusedError) as caught:
        await coroutine
    return caught.value


def run(test):
    async def main():
        async with asyncio.timeout(DEADLINE_S):
            await test()

    asyncio.run(main())


def test_a_body_is_read_whole_and_counts_until_it_is_taken_or_let_go():
    async def test():
        held = bodies()
        first = await held.read(scope_of(), Sender(b"ab", b"", b"cd"))
        second = await held.read(scope_of(), Sender(b"xyz"))
        assert (first.data, held.held_bytes) == (b"abcd", 7)
        replay = first.replayed(Sender(None))
        assert await replay() == {"type": "http.request", "body": b"abcd"}
        assert held.held_bytes == 3, "the app has it now"
        assert (await replay())["type"] == "http.disconnect"
        first.let_go()
        second.let_go()
        second.let_go()
        assert held.held_bytes == 0

    run(test)


@pytest.mark.parametrize("parts", [[b"x" * 101], [b"x" * 50, b"x" * 51], [b"x"] * 101])
def test_a_body_that_is_too_large_is_413_and_counts_no_more(parts):
    async def test():
        held, sender = bodies(), Sender(*parts)
        error = await refused(held.read(scope_of(), sender))
        assert (error.status, held.held_bytes) == (413, 0)
        assert "100 bytes" in error.message
        error = await refused(held.read(scope_of(content_length="101"), Sender(b"")))
        assert (error.status, held.held_bytes) == (413, 0)
        assert (await held.read(scope_of(content_length="many"), Sender(b"x" * 100))).data == b"x" * 100

    run(test)


def test_all_bodies_together_have_a_limit_and_who_is_over_it_comes_back_later():
    async def test():
        held = bodies(max_held_bytes=250)
        first = [await held.read(scope_of(), Sender(b"x" * 100)) for _ in range(2)]
        error = await refused(held.read(scope_of(), Sender(b"x" * 40, b"x" * 11)))
        assert (error.status, error.headers, held.held_bytes) == (503, {"Retry-After": "1"}, 200)
        assert "--max-held-bytes" in error.message
        first += [await held.read(scope_of(), Sender(b"x" * 50))]
        first.pop(0).let_go()
        first += [await held.read(scope_of(), Sender(b"x" * 100))]
        for body in first:
            body.let_go()
        assert held.held_bytes == 0

    run(test)


def test_one_body_always_fits():
    async def test():
        held = bodies(max_bytes=100, max_held_bytes=10)
        assert len((await held.read(scope_of(), Sender(b"x" * 100))).data) == 100

    run(test)


@pytest.mark.parametrize("parts", [[], [b"half"], [b"x"] * 50])
def test_a_body_that_does_not_come_in_time_is_408_and_counts_no_more(parts):
    async def test():
        held = bodies(timeout_s=0.01)
        error = await refused(held.read(scope_of(), Sender(*parts, whole=False)))
        assert (error.status, error.headers, held.held_bytes) == (408, {"Connection": "close"}, 0)
        assert "0.01 s (--body-timeout)" in error.message

    run(test)


def test_a_body_whose_sender_leaves_or_whose_reader_is_cancelled_counts_no_more():
    async def test():
        held = bodies()
        with pytest.raises(ClientGoneError):
            await held.read(scope_of(), Sender(b"half", None))
        assert held.held_bytes == 0
        reading = asyncio.ensure_future(held.read(scope_of(), Sender(b"half", whole=False)))
        await asyncio.sleep(0)
        assert held.held_bytes == 4
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert held.held_bytes == 0

    run(test)


def test_bodies_that_end_in_every_way_leave_nothing_counted():
    async def test():
        rng, held = random.Random(3), bodies(max_held_bytes=300, timeout_s=0.02)

        async def one():
            parts = [b"x" * rng.randrange(60) for _ in range(rng.randrange(4))] + rng.choice([[], [None]])
            try:
                body = await held.read(scope_of(), Sender(*parts, whole=rng.random() < 0.8))
            except (RefusedError, ClientGoneError):
                return
            await asyncio.sleep(0)
            if rng.random() < 0.5:
                await body.replayed(Sender())()
            body.let_go()

        tasks = [asyncio.ensure_future(one()) for _ in range(300)]
        for task in rng.sample(tasks, 50):
            await asyncio.sleep(0)
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} == {type(None), asyncio.CancelledError}
        assert held.held_bytes == 0

    run(test)


def test_an_upload_passes_as_it_comes_up_to_its_limit():
    async def test():
        held, sender = bodies(), Sender(b"x" * 90, b"x" * 90, b"x" * 90)
        receive = held.limit_upload(scope_of(), sender, 200)
        assert [len((await receive())["body"]) for _ in range(2)] == [90, 90]
        assert held.held_bytes == 0, "it goes to disk"
        error = await refused(receive())
        assert (error.status, sender.read) == (413, 3)
        with pytest.raises(RefusedError, match="200 bytes"):
            held.limit_upload(scope_of(content_length="201"), sender, 200)

    run(test)


def test_an_upload_that_stops_is_408():
    async def test():
        receive = bodies(timeout_s=0.01).limit_upload(scope_of(), Sender(b"x", whole=False), 200)
        await receive()
        error = await refused(receive())
        assert (error.status, error.headers) == (408, {"Connection": "close"})
        assert "nothing of the upload arrived for 0.01 s" in error.message

    run(test)


def test_a_client_that_leaves_is_no_body():
    async def test():
        receive = limited_receive(Sender(None), {}, 0)
        assert await receive() == {"type": "http.disconnect"}

    run(test)
