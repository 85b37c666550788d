"""Tests of routes, retries, rested upstreams, client keys, limits, usage and history.

    python -m pytest -q test_part_d.py

Self-contained: upstreams are scripted and on the loopback, clocks are cranked by hand, nothing sleeps.
"""
import http.client
import http.server
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest

import iflow2api as ifl

WAIT_S = 10.0


class Clock:
    """A clock that is cranked by hand."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.upper().startswith(("IFLOW", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def until(condition, what="it"):
    deadline, pause = time.monotonic() + WAIT_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        pause.wait(0.005)


# --- scripted upstreams -------------------------------------------------------

USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4},
         "completion_tokens_details": {"reasoning_tokens": 2}}
GOOD = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "usage": USAGE, "choices": [
    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}}]}
CHUNKS = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": "hel"}, "finish_reason": None}]},
          {"choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": "stop"}]}, {"choices": [], "usage": USAGE}]


def sse(chunks):
    return b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks)


class Upstream:
    """Answers each request by `plan(number, body, key)`: ("ok",), ("status", 503, headers), ("drop",), ("cut",), …"""

    def __init__(self, plan=lambda number, body, key: ("ok",)):
        self.plan, self.seen, self.active, self.most = plan, [], 0, 0
        self.lock = threading.Lock()
        upstream = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = self.headers.get("Authorization", "").replace("Bearer ", "")
                with upstream.lock:
                    upstream.seen.append((body, key))
                    number = len(upstream.seen)
                    upstream.active += 1
                    upstream.most = max(upstream.most, upstream.active)
                try:
                    self.act(upstream.plan(number, body, key), body)
                finally:
                    with upstream.lock:
                        upstream.active -= 1

            def act(self, step, body):
                self.close_connection = True
                kind = step[0]
                if kind == "drop":
                    return
                if kind == "hold":
                    step[1].wait(WAIT_S)
                    kind = "ok"
                status, headers, kind_of = 200, {}, "application/json"
                data = json.dumps(GOOD).encode()
                if kind == "status":
                    status, headers = step[1], step[2] if len(step) > 2 else {}
                    data = json.dumps({"error": {"message": f"no {status}", "type": "x", "code": None}}).encode()
                elif kind == "html":
                    status, kind_of, data = 502, "text/html", b"<html><title>Bad Gateway</title></html>"
                elif kind == "garbage":
                    data = b"not json"
                elif kind == "empty":
                    data = json.dumps({"choices": []}).encode()
                elif body.get("stream"):
                    kind_of = "text/event-stream"
                    data = sse(CHUNKS) + b"data: [DONE]\n\n" if kind == "ok" else sse(CHUNKS[:1])
                    if kind == "nothing":
                        data = b"data: [DONE]\n\n"
                elif kind in ("cut", "nothing"):
                    data = data[:40]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", kind_of)
                self.send_header("Content-Length", str(len(data) + (9 if kind == "cut" else 0)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def upstreams():
    made = []

    def make(*plans):
        made.extend(Upstream(plan) for plan in plans)
        return made[-len(plans):]

    yield make
    for upstream in made:
        upstream.close()


def always(*step):
    return lambda number, body, key: step


def first(count, *step):
    return lambda number, body, key: step if number <= count else ("ok",)


def settings(upstreams, **more):
    providers = [{"name": name, "base_url": up.url, "api_keys": [f"{name}-key-{n}" for n in range(keys)], "models": [f"m-{name}"]}
                 for name, up, keys in zip("abcd", upstreams, more.pop("keys", (1, 1, 1, 1)))]
    aliases = {"chain": [f"m-{p['name']}" for p in providers]}
    return ifl.Settings(**{"providers": providers, "aliases": aliases, "log_level": "error", "keepalive_s": 5, **more})


class Gate:
    """A gateway whose pauses crank its clock."""

    def __init__(self, chosen, clock=None):
        self.clock, self.pauses = clock or Clock(), []
        self.gateway = ifl.Gateway(chosen, environ={}, clock=self.clock, pause=self.pause)

    def pause(self, caller, seconds):
        self.pauses.append(seconds)
        self.clock.now += seconds

    def ask(self, model="chain", stream=False, dialect=ifl.CHAT, headers=None, **body):
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, **body}
        if stream:
            body["stream"] = True
        sink = Bytes()
        self.gateway.answer(ifl.Call(dialect, body, json.dumps(body), headers or {}, "req_0123456789"), sink)
        return sink


class Bytes(ifl.AnswerSink):
    def __init__(self):
        self.sent, self.ends, self.replies = b"", 0, []

    def reply(self, data, content_type, headers):
        self.began = True
        self.replies.append(data)

    def send(self, payload, framed=None):
        self.began = True
        self.sent += payload

    def end(self, payload):
        self.began = True
        self.sent, self.ends = self.sent + payload, self.ends + 1


def error_of(gate, *args, **more):
    with pytest.raises(ifl.GatewayError) as caught:
        gate.ask(*args, **more)
    return caught.value


# --- conditions and explanations ----------------------------------------------

def routed(aliases, **more):
    providers = [{"name": "z", "base_url": "http://h", "models": ["glm-5", "glm-v"]}, {"name": "o", "base_url": "http://o"}]
    return ifl.Router(ifl.Settings(providers=providers, aliases=aliases, **more), {})


ROUTE = ["glm-5", {"model": "o/long/context:x", "over_tokens": 60000}, {"model": "glm-v", "images": True},
         {"model": ["o/think", "o/think2"], "thinking": True, "tools": False}, {"model": "o/msg", "dialect": "messages"}, "o/last"]


@pytest.mark.parametrize("asked, chain", [
    ({}, ["z/glm-5", "o/last"]), ({"size_tokens": 60000}, ["z/glm-5", "o/last"]),
    ({"size_tokens": 60001}, ["o/long/context:x", "z/glm-5", "o/last"]),
    ({"size_tokens": 60001, "shows_images": True}, ["o/long/context:x", "z/glm-5", "o/last"]),
    ({"shows_images": True}, ["z/glm-v", "z/glm-5", "o/last"]), ({"thinks": True}, ["o/think", "o/think2", "z/glm-5", "o/last"]),
    ({"thinks": True, "has_tools": True}, ["z/glm-5", "o/last"]), ({"speaks": "messages"}, ["o/msg", "z/glm-5", "o/last"])])
def test_the_first_entry_whose_conditions_hold_begins_the_chain(asked, chain):
    router = routed({"claude-*": ROUTE})
    assert router.problems == []
    found = router.resolve("claude-opus", True, ifl.Asked(**asked))
    assert [f"{t.provider.name}/{t.model}" for t in found] == chain
    steps, targets = router.explain("claude-opus", True, ifl.Asked(**asked))
    assert targets == found and any("makes it" in step for step in steps)


def test_an_alias_of_conditions_alone_lets_other_requests_pass():
    router = routed({"glm-*": {"model": "o/x", "images": True}})
    assert router.resolve("glm-5")[0].provider.name == "z"
    assert router.resolve("glm-5", False, ifl.Asked(shows_images=True))[0].model == "x"
    assert "nothing for such a request" in router.explain("glm-5", False, ifl.Asked())[0][1]


@pytest.mark.parametrize("name, place", [
    ("z/模型:自由/x", "z/模型:自由/x"), ("é", "o/ü:1/ß"), ("m[1m]", "o/one"), ("a/b/c:d", "z/a/b/c:d")])
def test_names_with_slashes_colons_brackets_and_other_letters(name, place):
    router = routed({"é": "o/ü:1/ß", "m[1m]": "o/one"})
    target, = router.resolve(name)
    assert f"{target.provider.name}/{target.model}" == place
    steps, targets = router.explain(name, False, ifl.Asked())
    assert targets == [target] and steps


@pytest.mark.parametrize("aliases, said", [
    ({"x": {"model": "glm-5", "over_tokens": 0}}, "alias 'x': over_tokens: a whole number of 1"),
    ({"x": [{"model": "glm-5", "over_tokens": -5}]}, "over_tokens"), ({"x": [{"model": "glm-5", "images": 1}]}, "images: true or false"),
    ({"x": {"model": "glm-5", "weather": "fine"}}, "weather: no such condition"), ({"x": {"images": True}}, "a model or a list"),
    ({"x": {"model": "glm-5", "dialect": "klingon"}}, "dialect: chat, messages or responses"),
    ({"claude-*": "glm-5", "claude-opus": "o/x"}, "'claude-opus' is never reached: 'claude-\\*'"), ({"": "glm-5"}, "matches nothing"),
    ({"x": ["glm-5", "zz/y"]}, None), ({"x": ["glm-5", "a/b/c:d"]}, None)])
def test_bad_aliases_are_named(aliases, said):
    router = routed(aliases, default_provider="o")
    assert bool(router.problems) is bool(said), router.problems      # o may well serve zz/y: it lists nothing
    assert not said or re.search(said, router.problems[0]) and router.faults == {"aliases"}


def test_an_unknown_provider_in_a_chain_is_named_and_left_out():
    one = [{"name": "zhipu", "base_url": "http://h", "models": ["glm-5"]}]
    router = ifl.Router(ifl.Settings(providers=one, aliases={"x": ["glm-5", "zhipo/glm"], "y": "deep/seek"}), {})
    assert [t.model for t in router.resolve("x")] == ["glm-5"] and router.resolve("y")[0].model == "y"
    assert router.problems == ["alias 'x'[1]: 'zhipo/glm': there is no provider 'zhipo'; did you mean zhipu?",
                               "alias 'y'[0]: 'deep/seek': there is no provider 'deep'"]


@pytest.mark.parametrize("body, size, facts", [
    ({"messages": [{"role": "user", "content": "x" * 4000}]}, 1000, ""),
    ({"messages": [{"role": "user", "content": "字" * 4000}]}, 3000, ""), ({"reasoning_effort": "high"}, 0, "t"),
    ({"reasoning_effort": "none"}, 0, ""), ({"thinking": {"type": "adaptive"}}, 0, "t"), ({"thinking": {"type": "disabled"}}, 0, ""),
    ({"reasoning": {"effort": "low"}}, 0, "t"), ({"enable_thinking": True}, 0, "t"), ({"tools": [{}]}, 0, "o"), ({"tools": []}, 0, ""),
    ({"input": [{"type": "additional_tools"}]}, 0, "o"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, 0, "t"), ({"thinking": 5, "reasoning": "x", "input": 5}, 0, ""),
    ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 90000}}]}]}, 1500, "i")])
def test_what_a_request_is_like(body, size, facts):
    call = ifl.Call(ifl.CHAT, body, json.dumps(body, ensure_ascii=False), {}, "r")
    assert abs(call.size_tokens - size) < 60
    assert (call.thinks, call.has_tools, call.shows_images) == ("t" in facts, "o" in facts, "i" in facts)


def test_conditions_are_asked_for_only_where_there_are_any(monkeypatch, upstreams):
    monkeypatch.setattr(ifl.Call, "size_tokens", property(lambda call: 1 / 0))
    monkeypatch.setattr(ifl.Call, "conversation", property(lambda call: 1 / 0))
    up, = upstreams(always("ok"))
    assert Gate(settings([up])).ask().replies


# --- fallback, retries, rest ----------------------------------------------------

FAILURES = {"drop": ("drop",), "html": ("html",), "garbage": ("garbage",), "empty": ("empty",), "cut": ("cut",),
            **{str(status): ("status", status) for status in (401, 402, 403, 408, 409, 425, 429, 500, 502, 503, 504, 529)}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_before_the_answer_falls_back(name, stream, upstreams):
    bad, good = upstreams(always(*FAILURES["nothing" if stream and name == "cut" else name] if name != "cut" or not stream
                                 else ("nothing",)), always("ok"))
    gate = Gate(settings([bad, good]))
    sink = gate.ask(stream=stream)
    assert (len(bad.seen), len(good.seen)) == (1, 1)
    assert (sink.ends, sink.sent.count(b"[DONE]")) == ((1, 1) if stream else (0, 0)) and len(sink.replies) == (not stream)
    record, = gate.gateway.history()
    assert record["target"] == "b/m-b" and [a["provider"] for a in record["attempts"]] == ["a", "b"]


def test_nothing_is_asked_again_once_the_client_has_a_part(upstreams):
    bad, good = upstreams(always("cut"), always("ok"))
    gate = Gate(settings([bad, good], retry={"count": 5}))
    assert error_of(gate, stream=True).status == 502
    assert (len(bad.seen), len(good.seen), gate.pauses) == (1, 0, [])


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_will_not_get_better_is_not_asked_again(status, upstreams):
    bad, good = upstreams(always("status", status), always("ok"))
    gate = Gate(settings([bad, good], retry={"count": 5}))
    assert error_of(gate).status == status and (len(bad.seen), len(good.seen)) == (1, 0)


def test_retries_back_off_with_jitter_and_end(upstreams):
    bad, = upstreams(always("status", 503))
    gate = Gate(settings([bad], retry={"count": 4, "backoff_s": 1, "max_backoff_s": 3}))
    assert error_of(gate).status == 503
    assert len(bad.seen) == 5
    for pause, most in zip(gate.pauses, (1, 2, 3, 3)):
        assert most / 2 <= pause <= most
    bad.plan = first(len(bad.seen) + 2, "status", 500)
    assert gate.ask().replies and len(bad.seen) == 8


def test_without_a_word_there_are_no_retries(upstreams):
    bad, = upstreams(always("status", 503))
    gate = Gate(settings([bad]))
    assert error_of(gate).status == 503 and (len(bad.seen), gate.pauses) == (1, [])


@pytest.mark.parametrize("retry_after, total_s, calls, pause", [("7", 60, 2, 7), ("7", 5, 1, None), ("3600", 60, 1, None)])
def test_retry_after_is_honoured_within_the_total(retry_after, total_s, calls, pause, upstreams):
    bad, = upstreams(first(1, "status", 429, {"Retry-After": retry_after}))
    gate = Gate(settings([bad], retry={"count": 3, "backoff_s": 0.1, "total_s": total_s}))
    if pause is None:
        assert error_of(gate).retry_after_s == float(retry_after)
    else:
        assert gate.ask().replies and gate.pauses == [pytest.approx(pause, abs=0.2)]
    assert len(bad.seen) == calls


def test_who_asked_for_longer_is_not_asked_sooner(upstreams):
    slow, quick = upstreams(always("status", 503, {"Retry-After": "30"}), first(1, "status", 503))
    gate = Gate(settings([slow, quick], retry={"count": 2, "backoff_s": 1}))
    assert gate.ask().replies and (len(slow.seen), len(quick.seen)) == (1, 2)


def test_a_client_that_leaves_ends_the_pause():
    import socket
    ours, theirs = socket.socketpair()

    class Leaving(ifl.Caller):
        sock, tick_s, ticks = ours, 0.01, 0

        def tick(self):
            self.ticks += 1
            theirs.close()

    ours.setblocking(False)
    caller = Leaving()
    with pytest.raises(ifl.ClientGone):
        ifl.wait_for(caller, 60)
    assert caller.ticks == 1
    ours.close()


def test_an_upstream_that_keeps_failing_rests_and_is_tried_again(upstreams, clock):
    bad, good = upstreams(first(6, "status", 500), always("ok"))
    gate = Gate(settings([bad, good], circuit={"failures": 3, "rest_s": 20}), clock)

    def state():
        return gate.gateway.health()["providers"][0]["circuit"]

    for _ in range(10):
        gate.ask()
    assert (len(bad.seen), len(good.seen), state()) == (3, 10, "open")
    assert 'upstream_rested{provider="a"} 1' in gate.gateway.metrics_text()
    for calls in (4, 5, 6):              # half-open: one request, and if that fails another rest
        clock.now += 20
        assert state() == "half-open"
        gate.ask(), gate.ask()
        assert (len(bad.seen), state()) == (calls, "open")
    clock.now += 20
    gate.ask(), gate.ask()
    assert (len(bad.seen), state()) == (8, "closed")


def test_a_resting_upstream_is_the_last_resort_and_never_the_only_ones_loss(upstreams, clock):
    bad, other = upstreams(first(3, "drop"), always("status", 500))
    gate = Gate(settings([bad, other], circuit={"failures": 2, "rest_s": 20}), clock)
    for _ in range(3):
        error_of(gate)
    assert gate.ask().replies            # the others failed: it is asked although it rests
    bad.plan = always("ok")
    gate.gateway._circuits["a"].failed(1, 100)
    assert gate.ask("m-a").replies       # a route of its own


def test_refusals_do_not_open_the_circuit(upstreams):
    bad, good = upstreams(always("status", 429), always("ok"))
    gate = Gate(settings([bad, good], circuit={"failures": 2}))
    for _ in range(5):
        gate.ask()
    assert gate.gateway._circuits["a"].state == "closed" and len(bad.seen) == 5


def test_keys_take_turns_rest_and_revive(upstreams, clock):
    up, = upstreams(lambda number, body, key: ("status", 401) if key == "a-key-1" and number < 5 else ("ok",))
    gate = Gate(settings([up], keys=[3]), clock)
    for _ in range(6):
        gate.ask()
    used = [key for _, key in up.seen]
    assert used.count("a-key-1") == 1 and gate.gateway._rings["a"].resting == 1
    clock.now += ifl.REFUSED_KEY_REST_S
    for _ in range(3):
        gate.ask()
    assert [key for _, key in up.seen].count("a-key-1") == 2 and gate.gateway._rings["a"].resting == 0


@pytest.mark.parametrize("status, shown", [(401, 403), (403, 403), (429, 429)])
def test_when_every_key_is_refused_each_was_asked_once(status, shown, upstreams):
    up, = upstreams(always("status", status))
    gate = Gate(settings([up], keys=[3]))
    assert error_of(gate).status == shown and sorted(key for _, key in up.seen) == ["a-key-0", "a-key-1", "a-key-2"]


def test_a_conversation_keeps_its_key(upstreams, clock):
    up, = upstreams(always("ok"))
    gate = Gate(settings([up], keys=[3], sticky=True), clock)
    for index in range(12):
        gate.ask(headers={"session-id": f"s{index % 4}"})
    keys = [key for _, key in up.seen]
    assert keys[:4] * 3 == keys and len(set(keys)) > 1
    gate.gateway._rings["a"].rest(keys[0], 60)
    gate.ask(headers={"session-id": "s0"})
    assert up.seen[-1][1] != keys[0]
    clock.now += 60
    gate.ask(headers={"session-id": "s0"})
    assert up.seen[-1][1] == keys[0]


def test_a_conversation_is_known_by_its_beginning():
    def call(*texts, **body):
        body["messages"] = [{"role": "user", "content": text} for text in texts]
        return ifl.Call(ifl.CHAT, body, "", {}, "r").conversation

    assert call("a", "b", "c") == call("a", "b", "d", "e") != call("x", "b")
    assert call("a", prompt_cache_key="k") == call("b", prompt_cache_key="k")
    ifl.Call(ifl.CHAT, {"input": 5}, "", {}, "r").conversation


def test_accounts_have_places_of_their_own():
    entry = {"name": "i", "kind": "iflow", "base_url": "http://h", "api_keys": ["k1", "k2", "k3"]}
    provider = ifl.Router(ifl.Settings(providers=[entry], api_concurrency=2), {}).providers["i"]
    assert (provider.places, provider.key_concurrency) == (6, 2)
    ring = ifl.KeyRing(provider.api_keys, each=1)
    with ring.hold("k1", ifl.NOBODY, ifl.Settings(), "i"):
        assert [ring.order()[0] for _ in range(3)] == ["k2", "k2", "k3"] and ring.active == 1
        with ring.hold("k2", ifl.NOBODY, ifl.Settings(), "i"):
            assert ring.order(0)[0] == "k3"
    assert ring.active == 0 and ring.order(0)[0] == "k1"


def test_never_more_at_an_account_than_its_places(upstreams):
    at_once, most, lock, go = {}, {}, threading.Lock(), threading.Event()

    def plan(number, body, key):
        with lock:
            at_once[key] = at_once.get(key, 0) + 1
            most[key] = max(most.get(key, 0), at_once[key])
        go.wait(WAIT_S)
        with lock:
            at_once[key] -= 1
        return ("ok",)

    up, = upstreams(plan)
    chosen = settings([up], keys=[3])
    chosen.providers[0]["key_concurrency"] = 1
    gate = Gate(chosen)
    threads = [threading.Thread(target=gate.ask) for _ in range(20)]
    [thread.start() for thread in threads]
    until(lambda: len(up.seen) >= 2 and gate.gateway._slots["a"].load == 20, "the queue")
    go.set()
    [thread.join(WAIT_S) for thread in threads]
    assert len(up.seen) == 20 and set(most.values()) == {1} and len(most) == 3
    assert gate.gateway._slots["a"].load == 0 == gate.gateway._rings["a"].active


# --- the property -----------------------------------------------------------------

STEPS = [("ok",), ("ok",), *FAILURES.values(), ("nothing",), ("status", 400), ("status", 404), ("status", 429, {"Retry-After": "3"})]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_fails_there_is_one_answer_and_few_calls(seed, upstreams):
    """One well-formed answer or one error, and at most (retries + 1) x keys calls at each upstream."""
    rnd = random.Random(seed)
    keys = [rnd.choice((1, 2, 3)) for _ in range(4)]
    count = rnd.choice((0, 1, 3))
    ups = upstreams(*[lambda number, body, key, r=random.Random(seed * 7 + n): r.choice(STEPS) for n in range(4)])
    gate = Gate(settings(ups, keys=keys, retry={"count": count, "total_s": 1000}, circuit={"failures": rnd.choice((0, 2)), "rest_s": 9}))
    for turn in range(6):
        before = [len(up.seen) for up in ups]
        stream, dialect = rnd.random() < 0.5, rnd.choice((ifl.CHAT, ifl.MESSAGES))
        sink = Bytes()
        body = {"model": "chain", "max_tokens": 9, "stream": stream, "messages": [{"role": "user", "content": "hi"}]}
        call = ifl.Call(dialect, body, json.dumps(body), {}, "req_0123456789")
        try:
            gate.gateway.answer(call, sink)
            assert sink.ends == stream and len(sink.replies) == (not stream)
            text = sink.sent.decode() if stream else sink.replies[0].decode()
            assert text.count("[DONE]") == (stream and dialect is ifl.CHAT)
            assert text.count("event: message_stop") == (stream and dialect is ifl.MESSAGES)
            assert stream or json.loads(text)
        except ifl.GatewayError as exc:
            assert 400 <= dialect.status(exc) < 600 and sink.ends == 0 and not sink.replies
            assert json.loads(json.dumps(dialect.error(exc, "req")))
        for up, start, number in zip(ups, before, keys):
            assert len(up.seen) - start <= (count + 1) * number
        gate.clock.now += rnd.choice((0, 5, 400))
    assert len(gate.gateway.history()) == 6 and gate.gateway.in_flight == 0
    assert all(slots.load == 0 for slots in gate.gateway._slots.values())


def test_many_requests_leave_everything_where_it_was(upstreams):
    """Scaled down from 10 000: what grows with each request shows in a tenth of them, too."""
    plans = [lambda number, body, key, n=n: ("status", 500) if (number + n) % 7 == 0 else
             ("status", 429, {"Retry-After": "1"}) if (number + n) % 11 == 0 else ("ok",) for n in range(4)]
    ups = upstreams(*plans)
    secrets = ["sk-one", "sk-two", "sk-three"]
    keys = [{"name": f"k{n}", "sha256": ifl.hash_key(secret).hex(), "rpm": 10 ** 6, "concurrency": 10 ** 6}
            for n, secret in enumerate(secrets)]
    gate = Gate(settings(ups, keys=[3, 3, 3, 3], client_keys=keys, history_size=50, address_limits={"rpm": 10 ** 6}))
    server = ifl.serve(gate.gateway, port=0)
    failures = []

    def client(number, requests):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
        for turn in range(requests):
            stream = (turn + number) % 2 == 0
            body = json.dumps({"model": "chain" if turn % 3 else f"m-{'abcd'[turn % 4]}", "stream": stream,
                               "messages": [{"role": "user", "content": "hi"}]})
            connection.request("POST", "/v1/chat/completions", body, {"x-api-key": secrets[turn % 3]})
            response = connection.getresponse()
            data = response.read()
            if response.status == 200 and (data.count(b"[DONE]") if stream else json.loads(data)["choices"]) in (0, []):
                failures.append(data)
            if response.status not in (200, 429, 500):
                failures.append(response.status)
        connection.close()

    def wave(requests):
        threads = [threading.Thread(target=client, args=(number, requests)) for number in range(8)]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
        until(lambda: not server._handlers and gate.gateway.in_flight == 0, "the end of all requests")
        for up in ups:
            up.seen.clear()

    wave(12)
    until(lambda: all(up.active == 0 for up in ups))
    threads_before = threading.active_count()
    tracemalloc.start()
    wave(12)
    small = tracemalloc.get_traced_memory()[0]
    wave(50)
    grown = tracemalloc.get_traced_memory()[0] - small
    tracemalloc.stop()
    assert not failures and grown < 400_000, (failures[:3], grown)
    until(lambda: threading.active_count() <= threads_before, "the end of threads")
    assert all(slots.load == 0 for slots in gate.gateway._slots.values())
    assert all(meter.active == 0 for meter in [*gate.gateway.limiter._keys.values(), *gate.gateway.limiter._addresses.values()])
    assert len(gate.gateway.history()) == 50
    used = gate.gateway.usage.report("key", 1, {})
    assert sum(row["requests"] for row in used) == 8 * 74 and {row["key"] for row in used} == {"k0", "k1", "k2"}
    server.close()


# --- client keys -------------------------------------------------------------------

def key_entry(name, secret, **more):
    return {"name": name, "sha256": ifl.hash_key(secret).hex(), **more}


class Client:
    def __init__(self, gateway):
        self.server = ifl.serve(gateway, port=0)

    def __call__(self, path="/v1/chat/completions", body=None, method=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=WAIT_S)
        if body is None and "completions" in path:
            body = {"model": "m-a", "messages": [{"role": "user", "content": "hi"}]}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("POST" if body else "GET"), path, json.dumps(body) if body else None, names)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, json.loads(data) if data[:1] == b"{" else data.decode()


@pytest.fixture
def client(request):
    made = []

    def make(gate):
        made.append(Client(gate.gateway))
        return made[-1]

    yield make
    for one in made:
        one.server.close()


def test_keys_are_taken_from_wherever_clients_put_them(upstreams, client):
    up, = upstreams(always("ok"))
    ask = client(Gate(settings([up], client_keys=[key_entry("bob", "sk-bob")], custom_api_key="sk-master",
                               custom_auth_header="X-My-Key")))
    for headers in ({"authorization": "Bearer sk-bob"}, {"x_api_key": "sk-bob"}, {"api_key": "sk-bob"}, {"X_My_Key": "sk-bob"},
                    {"authorization": "bearer sk-master"}, {"x_api_key": "sk-master"}):
        assert ask(**headers)[0] == 200
    for headers in ({}, {"authorization": "Bearer sk-bo"}, {"x_api_key": "sk-bobb"}, {"authorization": "Basic sk-bob"},
                    {"x_api_key": ifl.hash_key("sk-bob").hex()}):
        status, error = ask(**headers)
        assert status == 401 and error["error"]["type"] == "authentication_error"
    assert all(key == "a-key-0" for _, key in up.seen)
    assert ask("/health")[0] == 200 and ask("/metrics")[0] == 401 and ask("/metrics", x_api_key="sk-bob")[0] == 200


def test_an_expired_key_and_the_door_without_a_usable_one(upstreams, client):
    up, = upstreams(always("ok"))
    ask = client(Gate(settings([up], client_keys=[key_entry("old", "sk-old", expires="2001-01-01"), {"name": "broken"}])))
    status, error = ask(x_api_key="sk-old")
    assert status == 401 and "old expired on 2001-01-02" in error["error"]["message"]
    assert ask()[0] == 401 and not up.seen


def test_a_key_sees_and_uses_its_models_alone(upstreams, client):
    ups = upstreams(always("ok"), always("ok"))
    chosen = settings(ups, client_keys=[key_entry("bob", "sk-bob", models=["m-a", "cha*"]), key_entry("all", "sk-all")])
    chosen.aliases["hidden"] = "m-b"
    chosen.aliases["same"] = "a/m-a"
    ask = client(Gate(chosen))
    seen = [m["id"] for m in ask("/v1/models", x_api_key="sk-bob")[1]["data"]]
    assert seen == ["chain", "same", "m-a"]
    assert [m["id"] for m in ask("/v1/models", x_api_key="sk-all")[1]["data"]] == ["chain", "hidden", "same", "m-a", "m-b"]
    for model, status in (("m-a", 200), ("same", 200), ("a/m-a", 200), ("chain", 200), ("m-b", 403), ("hidden", 403), ("b/m-b", 403)):
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        assert ask(body=body, x_api_key="sk-bob")[0] == status, model
    assert ask("/v1/models/m-b", x_api_key="sk-bob")[0] == 404 and ask("/v1/models/m-a", x_api_key="sk-bob")[0] == 200


@pytest.mark.parametrize("entry, said", [
    (None, "an object with a name"), ({"name": "a b", "sha256": "0" * 64}, "name"), ({"name": "x"}, "sha256"),
    ({"name": "x", "sha256": "zz"}, "sha256"), ({"rpm": 0}, "rpm: a whole number from 1"), ({"rpm": -1}, "rpm"), ({"rpd": 1.5}, "rpd"),
    ({"tpd": True}, "tpd"), ({"concurrency": "5"}, "concurrency"), ({"expires": "soon"}, "expires: a date"), ({"expires": 5}, "expires"),
    ({"models": "m"}, "models"), ({"models": [""]}, "models"), ({"colour": "red"}, "colour: no such field"), ({"name": "ok"}, "taken")])
def test_bad_keys_are_named_and_close_the_door(entry, said):
    good = key_entry("ok", "sk-ok")
    bad = {**key_entry("x", "sk-x"), **entry} if entry and set(entry) - {"name", "sha256"} or entry == {"name": "ok"} else entry
    with pytest.raises(ValueError, match=re.escape("client_keys[1]: ") + ".*" + said):
        ifl.check_setting("client_keys", [good, bad])
    loaded = ifl.load_settings({"client_keys": [good, bad]}, {}, {})
    assert re.search(said, loaded.problems[0])
    door = ifl.Doorkeeper(loaded.settings)
    assert door.required and door.find(["sk-ok"]).name == "ok" and door.find(["sk-x"]) is None
    assert ifl.Doorkeeper(ifl.load_settings({"client_keys": 5}, {}, {}).settings).required


def test_an_address_open_to_the_network_needs_no_further_key():
    gate = Gate(ifl.Settings(client_keys=[key_entry("bob", "sk-bob")]))
    assert gate.gateway.ensure_client_key() == ("", True) and gate.gateway.settings.custom_api_key == ""


# --- limits -------------------------------------------------------------------------

@pytest.mark.parametrize("limit, span_s", [("rpm", 60), ("rph", 3600), ("rpd", 86400)])
def test_requests_are_counted_in_a_sliding_window(limit, span_s, upstreams, client, clock):
    up, = upstreams(always("ok"))
    ask = client(Gate(settings([up], client_keys=[key_entry("bob", "sk-bob", **{limit: 3})]), clock))
    for remaining in (2, 1, 0):
        assert ask(x_api_key="sk-bob")[0] == 200
        assert (ask.headers["x-ratelimit-limit-requests"], ask.headers["x-ratelimit-remaining-requests"]) == ("3", str(remaining))
        clock.now += span_s / 10
    status, error = ask(x_api_key="sk-bob")
    assert status == 429 and error["error"]["code"] == "rate_limit_exceeded" and "try again in" in error["error"]["message"]
    assert int(ask.headers["retry-after"]) == span_s * 7 // 10 and ask.headers["x-ratelimit-remaining-requests"] == "0"
    assert ask.headers["x-ratelimit-reset-requests"] == f"{span_s * 0.9:.1f}s"
    assert ask("/v1/models", x_api_key="sk-bob")[0] == 200 and ask.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += span_s * 0.7
    assert ask(x_api_key="sk-bob")[0] == 200 and ask(x_api_key="sk-bob")[0] == 429
    assert len(up.seen) == 4


def test_large_limits_never_pass_more_in_any_window(clock):
    window, passed = ifl.Window(60, 100), []
    rnd = random.Random(1)
    for _ in range(3000):
        clock.now += rnd.random() * 0.5
        if window.wait_s(clock()) == 0:
            window.add(clock(), 1)
            passed.append(clock())
        assert len(window._marks) <= 46
    assert len(passed) > 100
    for at in passed:
        assert sum(at - 60 < other <= at for other in passed) <= 100


def test_waiting_as_long_as_told_is_enough(clock):
    for limit in (1, 5, 50):
        window = ifl.Window(60, limit)
        for turn in range(200):
            wait_s = window.wait_s(clock())
            clock.now += wait_s + 1e-6 if wait_s else 0.3
            assert window.wait_s(clock()) == 0 or not wait_s
            if window.wait_s(clock()) == 0:
                window.add(clock(), 1)
            assert window.used(clock()) <= limit


def test_tokens_a_day(upstreams, client, clock):
    up, = upstreams(always("ok"))
    ask = client(Gate(settings([up], client_keys=[key_entry("bob", "sk-bob", tpd=30)]), clock))
    for _ in range(2):                   # 15 tokens each
        assert ask(x_api_key="sk-bob")[0] == 200
    assert ask(x_api_key="sk-bob")[0] == 429
    assert ask.headers["x-ratelimit-remaining-tokens"] == "0" and ask.headers["x-ratelimit-limit-tokens"] == "30"
    assert int(ask.headers["retry-after"]) > 80000
    clock.now += 86400 * 1.06
    assert ask(x_api_key="sk-bob")[0] == 200


def test_concurrency_of_a_key(upstreams, client):
    go = threading.Event()
    up, = upstreams(always("hold", go))
    ask = client(Gate(settings([up], client_keys=[key_entry("bob", "sk-bob", concurrency=1), key_entry("eve", "sk-eve")])))
    results = []
    thread = threading.Thread(target=lambda: results.append(ask(x_api_key="sk-bob")[0]))
    thread.start()
    until(lambda: up.seen)
    assert ask(x_api_key="sk-bob")[0] == 429 and ask.headers["retry-after"] == "1"
    go.set()
    thread.join(WAIT_S)
    assert results == [200] and ask(x_api_key="sk-bob")[0] == 200 and ask(x_api_key="sk-eve")[0] == 200


def test_addresses_behind_trusted_proxies(upstreams, client, clock):
    up, = upstreams(always("ok"))
    ask = client(Gate(settings([up], address_limits={"rpm": 1}, trusted_proxies=["127.0.0.0/8"]), clock))
    for address, status in (("1.2.3.4", 200), ("1.2.3.4", 429), ("9.9.9.9, 1.2.3.4", 429), ("5.6.7.8", 200), ("1.2.3.4, 127.0.0.9", 429),
                            ("2001:db8::1", 200), ("[2001:db8::2]:443", 429), ("2001:db8:1::2", 200), ("nonsense", 200), ("", 429)):
        assert ask(x_forwarded_for=address)[0] == status, address


def test_nobody_else_is_believed(upstreams, client):
    up, = upstreams(always("ok"))
    ask = client(Gate(settings([up], address_limits={"rpm": 1})))
    assert ask(x_forwarded_for="1.1.1.1")[0] == 200 and ask(x_forwarded_for="2.2.2.2")[0] == 429


def test_the_oldest_address_goes_first(monkeypatch, clock):
    monkeypatch.setattr(ifl, "ADDRESSES_LIMIT", 3)
    limiter = ifl.RateLimiter(clock)
    for address in ("a", "b", "c", "a", "d", "e"):
        limiter.of_address(address, {"rpm": 1})
    assert list(limiter._addresses) == ["a", "d", "e"]


def test_ten_thousand_addresses_stay_small(clock):
    limiter = ifl.RateLimiter(clock)
    tracemalloc.start()
    for number in range(11_000):
        with limiter.hold([limiter.of_address(str(number), {"rpm": 60, "rpd": 1000})]):
            pass
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(limiter._addresses) == 10_000 and size < 20 << 20


def test_our_headers_replace_the_upstreams(upstreams, client):
    up, = upstreams(lambda number, body, key: ("status", 200, {"x-ratelimit-remaining-requests": "77"}))
    up.plan = lambda number, body, key: ("status", 400, {"x-ratelimit-remaining-requests": "77"})
    ask = client(Gate(settings([up], client_keys=[key_entry("bob", "sk-bob", rpm=9), key_entry("eve", "sk-eve")])))
    assert ask(x_api_key="sk-bob")[0] == 400 and ask.headers["x-ratelimit-remaining-requests"] == "8"
    assert ask(x_api_key="sk-eve")[0] == 400 and "x-ratelimit-limit-requests" not in ask.headers


def test_changed_limits_keep_what_was_used(clock):
    limiter = ifl.RateLimiter(clock)
    key = ifl.parse_client_key(key_entry("bob", "s", rpm=2))
    for _ in range(2):
        with limiter.hold([limiter.of_key(key)]):
            pass
    with limiter.hold([limiter.of_key(key._replace(limits={"rpm": 3, "concurrency": 5}))]):
        pass
    with pytest.raises(ifl.RateLimited), limiter.hold([limiter.of_key(key)]):
        pass


@pytest.mark.parametrize("name, value, said", [
    ("address_limits", {"rpm": 0}, "rpm.*leave it out"), ("address_limits", {"rps": 1}, "rps: no such field"), ("retry", {"count": 11}, "count"),
    ("retry", {"count": -1}, "count"), ("retry", {"backoff_s": "x"}, "backoff_s"), ("circuit", {"rest_s": 0}, "rest_s"),
    ("prices", {"m": 5}, "m: an object"), ("prices", {"m": {"input": -1}}, "m.input"), ("trusted_proxies", ["nope"], "\\[0\\]"),
    ("trusted_proxies", ["1.2.3.4", "10.0.0.0/40"], "\\[1\\]"), ("usage_days", 0, "1 at least"), ("history_size", -1, "0 at least")])
def test_bad_settings_are_named_with_their_place(name, value, said, home, capsys):
    with pytest.raises(ValueError, match=said):
        ifl.check_setting(name, value)
    assert ifl.main(["config", "set", name, json.dumps(value)]) == 2
    err = capsys.readouterr().err
    assert name in err and (re.search(said, err) or not isinstance(value, (list, dict)))
    loaded = ifl.load_settings({name: value}, {}, {}, ifl.Settings())
    assert re.search(f"config.json: {name}: .*{said}", loaded.problems[0])


# --- usage and history ----------------------------------------------------------------

def test_usage_by_model_provider_key_and_day(upstreams, client):
    ups = upstreams(always("ok"), always("status", 500))
    gate = Gate(settings(ups, client_keys=[key_entry("bob", "sk-bob"), key_entry("eve", "sk-eve")]))
    ask = client(gate)
    ask(x_api_key="sk-bob")
    ask(body={"model": "m-a", "stream": True, "messages": [{"role": "user", "content": "hi"}]}, x_api_key="sk-eve")
    ask(body={"model": "m-b", "messages": [{"role": "user", "content": "hi"}]}, x_api_key="sk-eve")
    book, prices = gate.gateway.usage, {"a/*": {"input": 2, "cached": 1, "output": 10}}
    by = {name: {row[name]: row for row in book.report(name, 1, prices)} for name in ifl.USAGE_NAMES}
    a = by["model"]["m-a"]
    assert [a[n] for n in ("requests", "errors", "input", "output", "cached", "reasoning", "estimated")] == [2, 0, 24, 6, 8, 4, 0]
    assert a["cost"] == pytest.approx((16 * 2 + 8 + 6 * 10) / 1e6)
    b = by["provider"]["b"]
    assert (b["requests"], b["errors"], b["input"], b["cost"]) == (1, 1, 0, None)
    assert by["key"]["eve"]["requests"] == 2 and by["key"]["bob"]["requests"] == 1 and list(by["day"]) == [book.today()]


def test_estimates_are_marked(upstreams):
    up, = upstreams(always("ok"))
    bare = {name: value for name, value in GOOD.items() if name != "usage"}
    up.plan = lambda number, body, key: ("ok",)
    gate = Gate(settings([up]))
    original = dict(GOOD)
    GOOD.clear(), GOOD.update(bare)
    try:
        gate.ask()
    finally:
        GOOD.update(original)
    row, = gate.gateway.usage.report("model", 1, {})
    assert row["estimated"] == 1 and row["input"] > 0
    assert "~" in ifl._usage_table("model", [row])


def book_at(path, now):
    return ifl.UsageBook(str(path), now)


def add(book, model="m", key="k", days=92, tokens=1):
    book.add(model, "p", key, [1, 0, tokens, tokens, 0, 0, 0, 1, 5, 9], days)


def test_usage_survives_a_kill_and_a_torn_line(home):
    path = home / "usage.jsonl"
    program = ("import os, signal, iflow2api as ifl\n"
               f"book = ifl.UsageBook({str(path)!r})\n"
               "for _ in range(50): book.add('m', 'p', 'k', [1, 0, 7, 3, 0, 0, 0, 1, 5, 9], 92)\n"
               "os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, 'SIGKILL') else signal.SIGTERM)\n")
    subprocess.run([sys.executable, "-c", program], cwd=os.path.dirname(os.path.abspath(ifl.__file__)), check=False, timeout=60)
    with open(path, "ab") as file:
        file.write(b'{"day":"2026-01-01","mod')
    book = ifl.UsageBook(str(path))
    row, = book.report("model", 30, {})
    assert (row["requests"], row["input"], book.problems) == (50, 350, [])
    add(book)
    book.close()
    again = ifl.UsageBook(str(path))
    assert again.report("model", 30, {})[0]["requests"] == 51


def test_a_broken_usage_file_is_named_line_by_line(home):
    path = home / ".iflow2api" / "usage.jsonl"
    path.parent.mkdir()
    day = time.strftime("%Y-%m-%d")
    good = json.dumps({"day": day, "model": "m", "provider": "p", "key": "", "requests": 2}).encode() + b"\n"
    path.write_bytes(good + b"rubbish\n" + b"\xff\xfe\n" + b'{"day": 5}\n' + b"[" * 5000 + b"\n\n" + good)
    gateway = ifl.Gateway(config=ifl.ConfigFile(str(path.parent)), environ={})
    server = ifl.serve(gateway, port=0)
    assert [re.search(r"line (\d+)", p).group(1) for p in gateway.health()["problems"]] == ["2", "3", "4", "5"]
    assert gateway.usage.report("model", 1, {})[0]["requests"] == 4
    server.close()


def test_the_file_is_compacted_and_old_days_go(home):
    clock, path = Clock(1.8e9), home / "usage.jsonl"
    book = book_at(path, clock)
    book.COMPACT_LINES = 20
    for number in range(200):
        add(book, model=f"m{number % 3}", days=3)
        clock.now += 86400 / 25
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(rows) < 80 and len({row["day"] for row in rows}) <= 6
    total = sum(row["requests"] for row in book.report("model", 3, {}))
    assert 50 <= total <= 76
    book.close()
    assert sum(row["requests"] for row in book_at(path, clock).report("model", 3, {})) == total


def test_two_processes_share_the_file(home):
    path = home / "usage.jsonl"
    one, two = ifl.UsageBook(str(path)), ifl.UsageBook(str(path))
    one.COMPACT_LINES = 10
    for _ in range(30):
        add(one), add(two)
    one.close(), two.close()
    assert ifl.UsageBook(str(path)).report("model", 1, {})[0]["requests"] == 60


def test_names_from_clients_are_bounded(monkeypatch):
    monkeypatch.setattr(ifl, "USAGE_ROWS_A_DAY", 10)
    book = ifl.UsageBook()
    for number in range(100):
        add(book, model="x" * 500 + str(number), key=str(number))
    rows = book.report("key", 1, {})
    assert len(rows) == 11 and {row["key"]: row["requests"] for row in rows}["other"] == 90


def test_usage_off_and_history_bounded(upstreams, home):
    up, = upstreams(always("ok"))
    gate = Gate(settings([up], usage=False, history_size=3))
    for _ in range(5):
        gate.ask()
    assert gate.gateway.usage.report("model", 1, {}) == [] and len(gate.gateway.history()) == 3
    assert not list(home.iterdir())
    record = gate.gateway.history()[0]
    assert (record["model"], record["target"], record["status"], record["input"]) == ("chain", "a/m-a", 200, 12)
    assert "hi" not in json.dumps(record["attempts"]) and "a-key-0" not in json.dumps(record)


def test_a_folder_that_takes_no_file_costs_no_request(upstreams, home):
    up, = upstreams(always("ok"))
    gate = Gate(settings([up]))
    (home / "file").write_text("")
    gate.gateway.usage.path, gate.gateway.usage._loaded = str(home / "file" / "usage.jsonl"), True
    assert gate.ask().replies and gate.ask().replies
    assert gate.gateway.usage.report("model", 1, {})[0]["requests"] == 2 and "in memory only" in gate.gateway.usage.problems[0]


# --- reload ------------------------------------------------------------------------------

def write_config(home, **values):
    folder = home / ".iflow2api"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return ifl.ConfigFile(str(folder))


@pytest.mark.parametrize("bad, said", [
    ({"aliases": {"x": ["m-a", "oo/y"]}}, "no provider 'oo'"), ({"aliases": {"x": {"model": "m-a", "over_tokens": 0}}}, "over_tokens"),
    ({"client_keys": [{"name": "bob", "sha256": "0" * 64, "rpm": 0}]}, "client_keys\\[0\\]: rpm"), ({"retry": {"count": -1}}, "retry: count"),
    ({"client_keys": [{"name": "b", "sha256": "0" * 64}] * 2}, "taken by an earlier"), ({"address_limits": {"tpd": -5}}, "tpd"),
    ({"default_provider": "nope"}, "no provider"), ({"aliases": {"*": "m-a", "x": "m-a"}}, "never reached")])
def test_a_bad_reload_leaves_the_last_good_in_force(home, bad, said):
    base = {"providers": [{"name": "a", "base_url": "http://h", "models": ["m-a"]}], "aliases": {"x": "m-a"}, "retry": {"count": 1},
            "client_keys": [key_entry("bob", "sk-bob")], "address_limits": {"rpm": 7}}
    gateway = ifl.Gateway(config=write_config(home, **base), environ={})
    assert gateway.problems == []
    before = gateway.settings
    write_config(home, **{**base, **bad})
    gateway.reload()
    assert gateway.settings == before and gateway.state.door.find(["sk-bob"]), gateway.problems
    assert any(re.search(said, problem) for problem in gateway.problems)
    write_config(home, **{**base, "retry": {"count": 2}})
    gateway.reload()
    assert gateway.problems == [] and gateway.settings.retry == {"count": 2}


def test_a_pattern_that_matches_no_model_is_named(home):
    base = {"providers": [{"name": "a", "base_url": "http://h", "models": ["glm-5"]}], "aliases": {"fast-*": "glm-5"}}
    keys = [key_entry("bob", "s", models=["gml-5", "glm-*", "a/*", "fast-1", "claude-opus"])]
    gateway = ifl.Gateway(config=write_config(home, **base, client_keys=keys), environ={})
    assert gateway.problems == ["client_keys: bob: models: 'gml-5' matches nothing; did you mean glm-5 or a/glm-5?"]


def test_a_reload_keeps_streams_rests_and_places(upstreams, home):
    go = threading.Event()
    up, = upstreams(lambda number, body, key: ("hold", go) if number == 1 else ("ok",))
    entry = {"name": "a", "base_url": up.url, "api_keys": ["k1", "k2"], "models": ["m"], "key_concurrency": 1}
    gateway = ifl.Gateway(config=write_config(home, providers=[entry], log_level="error"), environ={})
    gate = Gate.__new__(Gate)
    gate.gateway = gateway
    results = []
    thread = threading.Thread(target=lambda: results.append(gate.ask("m", stream=True)))
    thread.start()
    until(lambda: up.seen)
    gateway._rings["a"].rest("k2", 500)
    write_config(home, providers=[{**entry, "api_keys": ["k1", "k2", "k3"]}], log_level="error", sticky=True)
    gateway.reload()
    ring = gateway._rings["a"]
    assert ring.keys == ("k1", "k2", "k3") and ring.resting == 1 and ring.active == 1
    go.set()
    thread.join(WAIT_S)
    assert results[0].sent.count(b"[DONE]") == 1 and ring.active == 0 and gateway._slots["a"].load == 0
    gateway.close()


# --- commands and the endpoint ---------------------------------------------------------------

def run(capsys, *argv):
    code = ifl.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_key_add_list_remove(home, capsys, upstreams, client):
    write_config(home, providers=[{"name": "a", "base_url": "http://h", "models": ["m-a"]}])
    code, key, err = run(capsys, "key", "add", "bob", "--models", "m-a,x-*", "--rpm", "5", "--tpd", "900", "--expires", "2999-01-31")
    assert code == 0 and re.fullmatch(r"sk-[0-9a-f]{48}\n", key) and "only time" in err
    text = (home / ".iflow2api" / "config.json").read_text()
    assert key.strip() not in text and ifl.hash_key(key.strip()).hex() in text
    assert run(capsys, "key", "add", "bob")[0] == 2
    code, listed, _ = run(capsys, "key")
    assert "bob" in listed and "5 requests a minute" in listed and key.strip() not in listed
    gateway = ifl.Gateway(config=ifl.ConfigFile(str(home / ".iflow2api")), environ={})
    found = gateway.state.door.find([key.strip()])
    assert found.limits == {"rpm": 5, "tpd": 900} and found.models == ("m-a", "x-*")
    assert run(capsys, "key", "add", "--rpm", "7", "eve")[0] == 0
    for argv in (["add"], ["add", "x", "--rpm", "0"], ["add", "x", "--rpm", "-1"], ["add", "x", "--rpm", "many"], ["add", "a/b"],
                 ["add", "x", "--expires", "2001-01-01"], ["remove"], ["remove", "bo"]):
        code, out, err = run(capsys, "key", *argv)
        assert (code, out) == (2, "") and err.startswith("error: "), argv
    assert run(capsys, "key", "remove", "eve")[0] == 0
    code, _, err = run(capsys, "key", "remove", "bob")
    assert code == 0 and "no key is left" in err


@pytest.mark.parametrize("shell, line", [("bash", 'export OPENAI_API_KEY="$IFLOW2API_KEY"'), ("cmd", 'set "OPENAI_API_KEY=%IFLOW2API_KEY%"'),
                                         ("powershell", "$env:OPENAI_API_KEY = $env:IFLOW2API_KEY")])
def test_env_with_only_such_keys(home, capsys, shell, line):
    write_config(home, client_keys=[key_entry("bob", "sk-bob")])
    _, out, _ = run(capsys, "env", "openai", "--shell", shell)
    assert line in out.splitlines() and "put your key into IFLOW2API_KEY" in out.splitlines()[0]
    assert "export IFLOW2API_KEY" not in run(capsys, "env", "codex", "--shell", "bash")[1]


def test_routes_explain(home, capsys):
    write_config(home, providers=[{"name": "z", "base_url": "http://h", "models": ["glm-5"]}, {"name": "o", "base_url": "http://o"}],
                 aliases={"claude-*": ["glm-5", {"model": "o/long:模/x", "over_tokens": 5000}]})
    code, out, _ = run(capsys, "routes", "explain", "claude-é", "--tokens", "6000")
    assert code == 0 and "=> o/long:模/x  http://o/v1" in out and "then z/glm-5" in out and "if over_tokens 5000: yes" in out
    told = json.loads(run(capsys, "routes", "explain", "x/y:z", "--json")[1])
    assert told["chain"][0]["model"] == "x/y:z" and "default provider, z" in told["steps"][-1]
    assert "default_model" in run(capsys, "routes", "explain", "gpt-5", "--dialect", "responses")[1]
    assert run(capsys, "routes", "explain")[0] == 2 and run(capsys, "routes", "explain", "x", "--tokens", "-1")[0] == 2
    write_config(home)
    assert run(capsys, "routes", "explain", "x")[0] == 1


def test_the_endpoint_explains_to_who_may_ask(upstreams, client):
    up, = upstreams(always("ok"))
    chosen = settings([up], custom_api_key="sk-m", allowed_origins=["*", "http://evil"])
    ask = client(Gate(chosen))
    path = "/admin/api/routes/explain"
    status, told = ask(path, {"model": "chain", "tokens": 5}, x_api_key="sk-m")
    assert status == 200 and told["chain"][0]["provider"] == "a" and told["chain"][0]["circuit"] == "closed" and not up.seen
    assert ask(path, {"model": "chain"})[0] == 401
    for origin in ("http://evil", "null", "https://127.0.0.1.evil"):
        assert ask(path, {"model": "chain"}, x_api_key="sk-m", origin=origin)[0] == 403
        assert "access-control-allow-origin" not in ask.headers
    assert ask(path, {"model": "chain"}, x_api_key="sk-m", origin=ask.server.url)[0] == 200
    for bad in ({"model": 5}, {"model": "x", "tokens": "1"}, {"model": "x", "images": 1}, {"model": "x", "dialect": "y"}):
        assert ask(path, bad, x_api_key="sk-m")[0] == 400
    assert ask(path, x_api_key="sk-m")[0] == 405


def test_the_usage_command(home, capsys):
    write_config(home, prices={"glm*": {"input": 1, "output": 2}})
    assert "nothing was used" in run(capsys, "usage")[1]
    book = ifl.UsageBook(str(home / ".iflow2api" / "usage.jsonl"))
    book.add("glm-5", "z", "bob", [1, 0, 1000, 500, 0, 0, 0, 1, 1500, 3000], 92)
    book.add('=cmd|"x",1', "z", "eve", [1, 1, 0, 0, 0, 0, 1, 0, 0, 0], 92)
    out = run(capsys, "usage", "--by", "key")[1]
    assert re.search(r"^bob +1 +0 +1000 +500 +0 +0 +1\.50s +3\.00s +0\.0020$", out, re.M) and "~" in out
    told = json.loads(run(capsys, "usage", "--json", "--days", "7")[1])
    assert told["rows"][0]["cost"] == 0.002 and told["by"] == "model"
    lines = run(capsys, "usage", "--csv")[1].splitlines()
    assert lines[0].startswith("model,requests,errors") and lines[2].startswith("\"'=cmd|\"\"x\"\",1\",1,1")
    assert run(capsys, "usage", "--days", "0")[0] == 2 and run(capsys, "usage", "--days", "x")[0] == 2


# --- speed -------------------------------------------------------------------------------

def best_us(work, count=2000):
    """Microseconds of one turn, the best of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in itertools.repeat(None, count):
            work()
        times.append(time.perf_counter() - start)
    return min(times) / count * 1e6


def test_what_is_not_used_costs_next_to_nothing(home):
    """Generous by a factor of ten or so: this is about a lock or a file too many, not about the machine."""
    state = ifl.State(ifl.Settings(), routed({}), ifl.Doorkeeper(ifl.Settings()))
    circuit = ifl.Circuit()
    assert best_us(lambda: ifl.check_key(state, {})) < 10
    assert best_us(lambda: circuit.admits(1)) < 10
    book = ifl.UsageBook(str(home / "usage.jsonl"))
    assert best_us(lambda: add(book), 300) < 300
    assert best_us(lambda: add(ifl.UsageBook()), 300) < 300
