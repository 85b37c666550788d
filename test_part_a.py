"""Demo upstream, presets, the provider commands, engines on this machine."""
import base64
import contextlib
import http.client
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest

import iflow2api as ifl

HERE = os.path.dirname(os.path.abspath(__file__))
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city", "parameters": {
    "type": "object", "required": ["city", "unit"],
    "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "kelvin"]}}}}}


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    ours = {preset.key for preset in ifl.PRESETS.values()}
    for name in list(os.environ):
        if name in ours or name.startswith("IFLOW2API_") and name != "IFLOW2API_REQUIRE_SDK":
            monkeypatch.delenv(name)


@pytest.fixture
def demo():
    server = ifl.DemoUpstream(pace_s=0, first_s=0)
    yield server
    server.close()


@pytest.fixture
def url(demo):
    """A gateway in front of the demo upstream."""
    with ifl.serve(ifl.Gateway(ifl.Settings(**demo.settings())), port=0) as server:
        yield server.url


@contextlib.contextmanager
def gateway_with(**settings):
    gateway = ifl.Gateway(ifl.Settings(**settings))
    with ifl.serve(gateway, port=0) as server:
        yield gateway, server.url


def call(url, path, body=None, **headers):
    """Status and JSON (or the records of a stream, without [DONE]) of one raw request."""
    host, port = url.split("//")[1].split("/")[0].split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    data = None if body is None else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, data, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if "event-stream" not in response.getheader("Content-Type", ""):
        return response.status, json.loads(text)
    lines = [line[5:] for line in text.splitlines() if line[:5] == "data:" and "[DONE]" not in line]
    return response.status, list(map(json.loads, lines))


def user(text):
    return {"role": "user", "content": text}


def chat(url, messages, **more):
    messages = [user(messages)] if isinstance(messages, str) else messages
    status, answer = call(url, "/v1/chat/completions", {"model": "demo", "messages": messages, **more})
    assert status == 200, answer
    return answer


def message_of(answer):
    return answer["choices"][0]["message"]


def joined(chunks, name):
    return "".join(c["choices"][0]["delta"].get(name) or "" for c in chunks if c["choices"])


# --- the demo model ----------------------------------------------------------

def test_demo_answers_plain_and_streamed_alike(url):
    plain = chat(url, "What is this?")
    chunks = chat(url, "What is this?", stream=True, stream_options={"include_usage": True})
    assert "What is this?" in message_of(plain)["content"] and message_of(plain)["reasoning_content"]
    assert joined(chunks, "content") == message_of(plain)["content"]
    assert joined(chunks, "reasoning_content") == message_of(plain)["reasoning_content"]
    assert chunks[-1]["usage"] == plain["usage"] and chunks[-1]["choices"] == []
    usage = plain["usage"]
    assert usage["prompt_tokens"] > 0 and usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    assert len(chunks) > 20


def test_demo_reports_usage_of_a_stream_only_when_asked(demo):
    chunks = call(demo.base_url, "/v1/chat/completions", {"messages": [user("hi")], "stream": True})[1]
    assert not any("usage" in chunk for chunk in chunks)


def test_demo_speaks_chinese_when_spoken_to_in_chinese(url):
    assert "演示模型" in message_of(chat(url, "你好"))["content"]


@pytest.mark.parametrize("switch", [
    {"thinking": {"type": "disabled"}}, {"enable_thinking": False}, {"reasoning_effort": "none"},
    {"chat_template_kwargs": {"enable_thinking": False}}])
def test_demo_thinks_unless_told_not_to(url, switch):
    message = message_of(chat(url, "hi", **switch))
    assert message["content"] and "reasoning_content" not in message


def test_demo_keeps_to_limit_and_stop(url):
    cut = chat(url, "hi", max_tokens=6)
    assert cut["choices"][0]["finish_reason"] == "length" and cut["usage"]["completion_tokens"] == 6
    assert message_of(cut)["content"]
    assert message_of(chat(url, "hi", stop=["demo"]))["content"] == "This is the "


def test_demo_calls_a_tool_once_and_uses_its_result(url):
    first = chat(url, "Weather?", tools=[WEATHER])
    assert first["choices"][0]["finish_reason"] == "tool_calls"
    made = message_of(first)["tool_calls"][0]
    assert made["function"]["name"] == "get_weather"
    assert json.loads(made["function"]["arguments"]) == {"city": "Paris", "unit": "celsius"}
    result = {"role": "tool", "tool_call_id": made["id"], "content": "18 degrees"}
    history = [user("Weather?"), message_of(first), result]
    second = chat(url, history, tools=[WEATHER])
    assert "get_weather answered: 18 degrees" in message_of(second)["content"]
    third = chat(url, history + [message_of(second), user("And now?")], tools=[WEATHER])
    assert "tool_calls" not in message_of(third) and "And now?" in message_of(third)["content"]


def test_demo_streams_arguments_in_pieces(url):
    chunks = chat(url, "Weather?", tools=[WEATHER], stream=True)
    calls = [c["choices"][0]["delta"]["tool_calls"][0] for c in chunks if c["choices"][0]["delta"].get("tool_calls")]
    assert calls[0]["id"] and calls[0]["function"]["name"] == "get_weather" and len(calls) > 2
    assert json.loads("".join(c["function"]["arguments"] for c in calls)) == {"city": "Paris", "unit": "celsius"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize("offered, asked, choice, expected", [
    (["write_file", "read_file"], "go", None, "read_file"),
    (["write_file", "read_file"], "use write_file", None, "write_file"),
    (["delete"], "go", None, "delete"),
    (["write_file", "read_file"], "go", {"type": "function", "function": {"name": "write_file"}}, "write_file"),
    (["read_file"], "go", "required", "read_file"),
    (["read_file"], "go", "none", None)])
def test_demo_prefers_tools_that_only_look(offered, asked, choice, expected):
    body = {"messages": [user(asked)], "tools": [tool(name) for name in offered], "tool_choice": choice}
    calls = ifl.demo_answer(body).calls
    assert (calls[0][0] if calls else None) == expected


def test_demo_arguments_fit_the_schema():
    schema = {"type": "object", "required": ["command", "n", "who", "tags", "maybe", "flag"], "$defs": {
        "person": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}}, "properties": {
            "command": {"type": "array", "items": {"type": "string"}},
            "n": {"type": "integer", "minimum": 5, "maximum": 5}, "who": {"$ref": "#/$defs/person"},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2},
            "maybe": {"type": ["null", "string"]}, "flag": {"type": "boolean"}}}
    body = {"messages": [user("go")], "tools": [{"type": "function", "function": {"name": "t", "parameters": schema}}]}
    assert ifl.demo_answer(body).calls[0][1] == {
        "command": ["echo", "hello from the demo"], "n": 5, "who": {"name": "demo"}, "tags": ["a", "a"], "maybe": "demo",
        "flag": False}


def test_demo_fits_a_json_schema(url):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(message_of(chat(url, "hi", response_format=form))["content"]) == {"city": "Paris"}
    assert json.loads(message_of(chat(url, "hi", response_format={"type": "json_object"}))["content"])


def endless(schema):
    schema["properties"]["self"] = {"$ref": "#"}
    schema["required"] = ["self"]
    return schema


def test_demo_survives_a_schema_without_end():
    schema = endless({"type": "object", "properties": {}})
    body = {"messages": [user("go")], "tools": [{"type": "function", "function": {"name": "t", "parameters": schema}}]}
    assert ifl.demo_answer(body).calls


PICTURES = {
    "png": b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 640, 480) + b"\x08\x02\x00\x00\x00",
    "gif": b"GIF89a" + struct.pack("<HH", 640, 480) + b"\x00" * 8,
    "jpeg": b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x11\x08" + struct.pack(">HH", 480, 640) + b"\x03" * 10}
WEBP = {
    "lossy": b"VP8 " + struct.pack("<I", 30) + b"\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", 640, 480) + b"\x00" * 8,
    "lossless": b"VP8L" + struct.pack("<I", 30) + b"\x2f" + struct.pack("<I", 639 | 479 << 14) + b"\x00" * 12,
    "extended": b"VP8X" + struct.pack("<II", 10, 0) + (639).to_bytes(3, "little") + (479).to_bytes(3, "little") + b"\x00" * 4}


@pytest.mark.parametrize("kind, data", [*PICTURES.items(), *(
    ("webp", b"RIFF" + struct.pack("<I", 40) + b"WEBP" + body) for body in WEBP.values())])
def test_demo_names_type_and_size_of_an_image(url, kind, data):
    packed = base64.b64encode(data).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{packed}"}}
    answer = chat(url, [user([{"type": "text", "text": "What is it?"}, part])], model="demo-vision")
    assert message_of(answer)["content"] == f"I see 1 image: {kind.upper()} 640 × 480"
    source = {"type": "base64", "media_type": f"image/{kind}", "data": packed}
    body = {"model": "demo-vision", "max_tokens": 200, "messages": [user([{"type": "image", "source": source}])]}
    answer = call(url, "/v1/messages", body)[1]
    assert f"{kind.upper()} 640 × 480" in answer["content"][-1]["text"]


@pytest.mark.parametrize("link, words", [
    ("https://example.com/a.png", "a link to https://example.com/a.png"),
    ("data:image/png;base64,AAAA", "PNG of unknown size"), ("data:,", "IMAGE of unknown size")])
def test_demo_follows_no_link_and_guesses_no_size(url, link, words):
    content = [{"type": "image_url", "image_url": {"url": link}}] * 2
    assert message_of(chat(url, [user(content)]))["content"] == f"I see 2 images: {words}, {words}"


def test_demo_embeds(url):
    body = {"model": "demo-embedding", "input": ["a", "b", "a"], "dimensions": 8}
    rows = [row["embedding"] for row in call(url, "/v1/embeddings", body)[1]["data"]]
    assert rows[0] == rows[2] != rows[1] and abs(sum(v * v for v in rows[0]) - 1) < 1e-6
    packed = call(url, "/v1/embeddings", {**body, "encoding_format": "base64"})[1]["data"][0]["embedding"]
    assert struct.unpack("<8f", base64.b64decode(packed)) == pytest.approx(rows[0], abs=1e-6)
    assert call(url, "/v1/embeddings", {"model": "demo-embedding", "input": [1, 2, 3]})[1]["data"][0]["index"] == 0


def test_demo_completes_prompts(url):
    plain = call(url, "/v1/completions", {"model": "demo", "prompt": "Once"})[1]
    chunks = call(url, "/v1/completions", {"model": "demo", "prompt": "Once", "stream": True})[1]
    assert "Once" in plain["choices"][0]["text"]
    assert "".join(c["choices"][0]["text"] for c in chunks) == plain["choices"][0]["text"]


def test_demo_lists_its_models(url):
    assert [m["id"] for m in call(url, "/v1/models")[1]["data"]] == [m["id"] for m in ifl.DEMO_MODELS]


def test_demo_serves_foreign_names_on_messages_and_responses(demo, url):
    body = {"model": "claude-sonnet-4-5", "max_tokens": 500, "messages": [user("Hello")]}
    answer = call(url, "/v1/messages", body)[1]
    assert [b["type"] for b in answer["content"]] == ["thinking", "text"] and "Hello" in answer["content"][1]["text"]
    answer = call(url, "/v1/responses", {"model": "gpt-5", "input": "Hello"})[1]
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    assert [request.body["model"] for request in demo.requests] == ["demo", "demo"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_demo_text_is_told_of_images_only(demo, url, path):
    data = base64.b64encode(PICTURES["png"]).decode()
    body = {"model": "demo-text", "max_tokens": 100, "messages": [user([{"type": "image", "source": {
        "type": "base64", "media_type": "image/png", "data": data}}])]}
    if path == "/v1/responses":
        image = {"type": "input_image", "image_url": "data:image/png;base64," + data}
        body = {"model": "demo-text", "input": [user([image])]}
    assert call(url, path, body)[0] == 200
    assert data not in json.dumps(demo.requests[-1].body)


@pytest.mark.parametrize("body", [
    {"messages": [user("x")], "tools": [7]}, {"messages": 5}, {"messages": [user([7])]},
    {"messages": [{"role": "assistant", "tool_calls": [{}]}, user("x")]}])
def test_demo_refuses_nonsense_with_a_sentence(demo, body):
    status, answer = call(demo.base_url, "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["message"]


def test_demo_has_nothing_elsewhere(demo):
    assert call(demo.base_url, "/v1/elsewhere")[0] == 404
    assert call(demo.base_url, "/v1/elsewhere", {})[0] == 404


def test_demo_follows_a_script_and_demands_its_key():
    script = [ifl.DemoAnswer("scripted"), lambda body: ifl.DemoAnswer(str(len(body["messages"]))),
              ifl.DemoAnswer("later", status=429)]
    demo = ifl.DemoUpstream(pace_s=0, first_s=0, key="k1", script=script)
    try:
        with gateway_with(**demo.settings()) as (gateway, url):
            assert message_of(chat(url, "1"))["content"] == "scripted"
            assert message_of(chat(url, "2"))["content"] == "1"
            status, answer = call(url, "/v1/chat/completions", {"messages": [user("3")]})
            assert (status, answer["error"]["message"]) == (429, "later")
            assert "demo model" in message_of(chat(url, "4"))["content"]
            assert demo.requests[0].headers["authorization"] == "Bearer k1"
        assert call(demo.base_url, "/v1/models")[0] == 401
    finally:
        demo.close()


def test_demo_keeps_a_pace(demo):
    demo.pace_s = 0.01
    started = time.monotonic()
    chunks = call(demo.base_url, "/v1/chat/completions", {"messages": [user("hi")], "stream": True})[1]
    assert time.monotonic() - started >= 0.01 * (len(chunks) - 1)


@contextlib.contextmanager
def running(tmp_path, *flags):
    """`serve` as a process on a free port; its URL."""
    command = [sys.executable, os.path.join(HERE, "iflow2api.py"), "serve", "--port", "0", "--config-dir", str(tmp_path)]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_serve_demo_needs_nothing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({
        "default_model": "glm-5", "aliases": {"*": "nowhere/x"},
        "providers": [{"name": "nowhere", "base_url": "http://127.0.0.1:1/v1"}]}))
    with running(tmp_path, "--demo") as (process, url):
        assert [m["id"] for m in call(url, "/v1/models")[1]["data"]][:2] == ["demo", "demo-vision"]
        assert "demo model" in message_of(chat(url, "hi"))["content"]
        body = {"model": "claude-opus-4-1", "max_tokens": 90, "stream": True, "messages": [user("hi")]}
        events = call(url, "/v1/messages", body)[1]
        assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
        if os.name == "posix":
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0


def test_demo_and_upstream_exclude_each_other(capsys):
    assert ifl.main(["--demo", "--upstream", "http://127.0.0.1:1"]) == 2
    assert "--demo brings its own upstream" in capsys.readouterr().err


# --- official SDKs -----------------------------------------------------------

def sdk(name):
    if os.environ.get("IFLOW2API_REQUIRE_SDK"):
        return __import__(name)
    return pytest.importorskip(name)


def test_openai_sdk_runs_a_tool_loop_on_the_demo(url):
    client = sdk("openai").OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    messages, said = [user("Weather in Paris?")], ""
    for _ in range(4):
        answer = client.chat.completions.create(model="demo", messages=messages, tools=[WEATHER]).choices[0].message
        messages.append(answer.model_dump(exclude_none=True))
        for made in answer.tool_calls or ():
            city = json.loads(made.function.arguments)["city"]
            messages.append({"role": "tool", "tool_call_id": made.id, "content": city + ": 18"})
        if not answer.tool_calls:
            said = answer.content
            break
    assert said == "The tool get_weather answered: Paris: 18"
    stream = client.chat.completions.create(model="gpt-4o", messages=[user("hi")], stream=True)
    assert "demo model" in "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert len(client.embeddings.create(model="demo-embedding", input="x").data[0].embedding) == 32
    assert "demo" in [model.id for model in client.models.list()]
    assert "hi" in client.responses.create(model="gpt-5", input="hi").output_text


def test_anthropic_sdk_runs_a_tool_loop_on_the_demo(url):
    client = sdk("anthropic").Anthropic(base_url=url, api_key="none", max_retries=0)
    tools = [{"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}]
    messages = [user("Weather?")]
    with client.messages.stream(model="claude-sonnet-4-5", max_tokens=500, messages=messages, tools=tools) as stream:
        answer = stream.get_final_message()
    assert answer.stop_reason == "tool_use"
    made = next(block for block in answer.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": made.id, "content": "18"}
    messages += [{"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]},
                 user([result, {"type": "text", "text": "(a reminder)"}])]
    answer = client.messages.create(model="claude-sonnet-4-5", max_tokens=500, messages=messages, tools=tools)
    assert answer.stop_reason == "end_turn" and "get_weather answered: 18" in answer.content[-1].text


# --- presets and facts -------------------------------------------------------

@pytest.mark.parametrize("name", ifl.PRESETS)
def test_each_preset_is_a_provider(name):
    preset = ifl.PRESETS[name]
    provider = ifl.parse_provider(preset.entry(name), {})
    assert not provider.problem and provider.base_url == preset.base_url
    assert set(preset.profile) <= set(ifl.DEFAULT_PROFILE)
    assert len(provider.models) == len(preset.models)
    assert bool(preset.key) is (name not in ifl.LOCAL_ENGINES) and preset.base_url.startswith(
        "http://127.0.0.1:" if name in ifl.LOCAL_ENGINES else "https://")
    assert all(limit <= context for _, context, limit, _ in preset.models)


def test_presets_are_those_that_were_promised():
    assert set(ifl.PRESETS) == set(
        "zhipu zai moonshot-cn moonshot deepseek dashscope dashscope-intl minimax-cn minimax siliconflow modelscope "
        "openrouter nvidia openai ollama lmstudio llamacpp vllm".split())


def test_facts_of_models_reach_the_profile():
    entry = {"name": "p", "base_url": "http://h/v1", "profile": {"vision": True, "top_k": True},
             "models": ["plain", {"id": "known", "context": 1000, "max_output": 100, "vision": False}]}
    provider = ifl.parse_provider(entry, {})
    assert provider.models == ("plain", "known") and provider.facts["known"]["context"] == 1000
    known = ifl.profile_of(ifl.Target(provider, "known"))
    assert (known["max_output"], known["vision"], known["top_k"]) == (100, False, True)
    plain = ifl.profile_of(ifl.Target(provider, "plain"))
    assert "max_output" not in plain and plain["vision"] is True
    assert "max_output" not in ifl.DEFAULT_PROFILE


@pytest.mark.parametrize("model", [7, "", {}, {"id": 1}, {"id": "a", "max_output": "8k"}, {"id": "a", "vision": 1},
                                   {"id": "a", "context": True}, {"id": "a", "context": -1}])
def test_bad_models_disable_their_provider_alone(model):
    assert "models" in ifl.parse_provider({"name": "p", "base_url": "http://h", "models": [model]}, {}).problem


def test_output_limit_of_a_model_cuts_max_tokens(demo, url):
    call(url, "/v1/messages", {"model": "demo-text", "max_tokens": 99999, "messages": [user("hi")]})
    assert demo.requests[-1].body["max_tokens"] == 4096


@pytest.mark.parametrize("given, base_url, first", [
    ("https://open.bigmodel.cn", "https://open.bigmodel.cn/api/paas/v4", "glm-5.2"),
    ("https://api.deepseek.com/", "https://api.deepseek.com/v1", "deepseek-flash"),
    ("https://api.deepseek.com/beta", "https://api.deepseek.com/beta", "deepseek-flash"),
    ("https://mine.example", "https://mine.example", None), ("nonsense", "nonsense", None), ("http://[", "http://[", None)])
def test_an_address_brings_the_facts_of_its_preset(given, base_url, first):
    entry = ifl.entry_at(given)
    assert entry["base_url"] == base_url
    assert (entry["models"][0]["id"] if "models" in entry else None) == first


# --- provider commands -------------------------------------------------------

def run(capsys, *argv):
    """Exit status, stdout and stderr of a command."""
    status = ifl.main(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


def config():
    with open(os.path.expanduser("~/.iflow2api/config.json"), encoding="utf-8") as file:
        return json.load(file)


def test_provider_add_takes_everything_from_the_preset_but_the_secret(capsys, monkeypatch):
    monkeypatch.setenv("ZHIPU_API_KEY", "sk-very-secret-1234567890")
    status, out, err = run(capsys, "provider", "add", "zhipu", "--api-key", "$ZHIPU_API_KEY")
    assert status == 0 and "provider test zhipu" in err
    entry = config()["providers"][0]
    assert entry["api_keys"] == ["$ZHIPU_API_KEY"] and entry["base_url"] == "https://open.bigmodel.cn/api/paas/v4"
    assert entry["profile"]["thinking_style"] == "thinking_type" and entry["models"][0]["id"] == "glm-5.2"
    assert "very-secret" not in json.dumps(config()) + out + err
    provider = ifl.Gateway(config=ifl.ConfigFile("~/.iflow2api")).state.router.providers["zhipu"]
    assert provider.api_keys == ("sk-very-secret-1234567890",) and provider.facts["glm-5v-turbo"]["vision"] is True


def test_provider_add_knows_the_variable_and_says_when_it_is_not_set(capsys):
    status, _, err = run(capsys, "provider", "add", "deepseek")
    assert status == 0 and "DEEPSEEK_API_KEY is not set" in err
    assert config()["providers"][0]["api_keys"] == ["$DEEPSEEK_API_KEY"]
    assert run(capsys, "provider", "add", "ollama")[0] == 0
    assert config()["providers"][1]["api_keys"] == []


def test_provider_add_of_another_server(capsys):
    status, _, err = run(capsys, "provider", "add", "mine", "--base-url", "https://h.example/api/v3/chat/completions/",
                         "--api-key", "sk-literal-key", "--models", "a, b,")
    assert status == 0 and "is taken as https://h.example/api/v3" in err and "warning" in err
    assert config()["providers"] == [{"name": "mine", "base_url": "https://h.example/api/v3", "kind": "openai",
                                      "models": ["a", "b"], "api_keys": ["sk-literal-key"]}]


def test_provider_add_of_a_preset_elsewhere(capsys):
    run(capsys, "provider", "add", "work", "--preset", "moonshot", "--base-url", "https://proxy.example/kimi",
        "--api-key", "$WORK_KEY", "--models", "kimi-k3,new")
    entry = config()["providers"][0]
    assert entry["base_url"] == "https://proxy.example/kimi" and entry["profile"]["prefill"] == "partial"
    assert entry["models"] == [{"id": "kimi-k3", "context": 1048576, "max_output": 262144, "vision": True}, "new"]


def test_provider_add_reads_a_key_from_standard_input(capsys, monkeypatch):
    import io
    monkeypatch.setattr(sys, "stdin", io.StringIO("$odd-key\n"))
    run(capsys, "provider", "add", "mine", "--base-url", "http://h.example", "--api-key", "-")
    assert ifl.Gateway(config=ifl.ConfigFile("~/.iflow2api")).state.router.providers["mine"].api_keys == ("$odd-key",)


def test_provider_add_keeps_what_it_does_not_know(capsys, tmp_path):
    (tmp_path / ".iflow2api").mkdir()
    known = {"name": "a", "base_url": "http://h", "x": 2}
    (tmp_path / ".iflow2api" / "config.json").write_text(json.dumps({"future": 1, "providers": [known]}))
    assert run(capsys, "provider", "add", "vllm")[0] == 0
    assert config()["future"] == 1 and config()["providers"][0] == known


@pytest.mark.parametrize("argv, words", [
    (["zhipuu"], "did you mean zhipu"), ([], "needs a NAME"), (["x", "--preset", "kimi"], "no preset 'kimi'"),
    (["x", "--base-url", "h.example/v1"], "write http://h.example/v1 or https://h.example/v1"),
    (["x", "--base-url", "ftp://h"], "is no http:// or https:// address"),
    (["x", "--base-url", "http://h:99999"], "no such port"),
    (["x", "--base-url", "http://h/?a=1"], "do not belong here"), (["x", "--base-url", "http://["], "base_url"),
    (["a/b", "--base-url", "http://h"], "without blanks, commas and slashes"),
    (["zhipu", "--api-key", ""], "single quotes: '$ZHIPU_API_KEY'"), (["x", "--base-url", ""], "no preset 'x'"),
    (["x", "--base-url", "http://h", "--api-key", "two words"], "a key is empty, or has blanks")])
def test_provider_add_names_a_mistake_in_one_line(capsys, argv, words):
    status, out, err = run(capsys, "provider", "add", *argv)
    last = err.strip().splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and words in last and not out
    assert not os.path.exists(os.path.expanduser("~/.iflow2api/config.json"))


def test_provider_names_are_taken_once_and_removed_by_name(capsys):
    run(capsys, "provider", "add", "ollama")
    status, _, err = run(capsys, "provider", "add", "ollama")
    assert status == 2 and "provider remove ollama" in err
    assert run(capsys, "provider", "remove", "olama")[2].strip().endswith("did you mean ollama?")
    run(capsys, "config", "set", "default_provider", "ollama")
    assert run(capsys, "provider", "remove", "ollama")[0] == 0
    assert config() == {"providers": []}
    assert run(capsys, "provider", "remove")[0] == 2


def test_provider_list_and_presets_show_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("ZAI_API_KEY", "sk-very-secret-1234567890")
    run(capsys, "provider", "add", "zai")
    status, out, _ = run(capsys, "provider", "list")
    assert status == 0 and "zai (default)  https://api.z.ai/api/paas/v4" in out and "very-secret" not in out
    status, out, _ = run(capsys, "provider", "presets")
    assert status == 0 and len(out.splitlines()) == len(ifl.PRESETS) and "$ZAI_API_KEY (set)" in out
    status, out, _ = run(capsys, "provider", "presets", "zai")
    assert status == 0 and "glm-5v-turbo" in out and "images" in out
    assert run(capsys, "provider", "presets", "zaai")[0] == 2


def test_status_offers_a_preset_whose_variable_is_set(capsys, monkeypatch):
    monkeypatch.setattr(ifl.Gateway, "local_engines", {})
    monkeypatch.setenv("IFLOW2API_PORT", str(unused_port()))
    monkeypatch.setenv("MOONSHOT_API_KEY", "sk-1234")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1234")
    out = run(capsys, "status")[1]
    assert "MOONSHOT_API_KEY is set: python iflow2api.py provider add moonshot-cn (or moonshot)" in out
    assert "OPENAI_API_KEY is set: python iflow2api.py provider add openai\n" in out and "ZHIPU" not in out
    run(capsys, "provider", "add", "moonshot")
    assert "MOONSHOT_API_KEY is set" not in run(capsys, "status")[1]


def unused_port():
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def add_demo(capsys, demo, key="k1"):
    argv = ["--api-key", key] if key else []
    run(capsys, "provider", "add", "mine", "--base-url", demo.base_url, "--models", "demo", *argv)


def test_provider_test_says_what_works(capsys, demo):
    add_demo(capsys, demo)
    status, out, _ = run(capsys, "provider", "test", "mine")
    assert status == 0 and out.startswith("mine: key ok, model demo ok (") and out.endswith("s), stream ok, tools ok\n")
    assert [r.body.get("stream") for r in demo.requests] == [None, True, None]
    assert run(capsys, "provider", "test")[0] == 0
    assert run(capsys, "test", "mine")[1].startswith("mine: ok, demo answered in")


@pytest.mark.parametrize("script, status, words", [
    ([ifl.DemoAnswer("no such model", status=404)], 1, "mine: does not work, the model: no such model"),
    ([ifl.DemoAnswer("Insufficient Balance", status=402)], 1, "mine: does not work, the balance: Insufficient Balance"),
    ([ifl.DemoAnswer("bad key", status=401)], 1, "mine: does not work, the key: "),
    ([ifl.DemoAnswer("hi"), ifl.DemoAnswer("no streams", status=400)], 1, "stream failed (400: no streams), tools ok"),
    ([ifl.DemoAnswer("hi")] * 2 + [ifl.DemoAnswer("no tools", status=400)], 1, "stream ok, tools failed (400: no tools)"),
    ([ifl.DemoAnswer("hi")] * 3, 0, "stream ok, tools taken, but none called")])
def test_provider_test_says_what_does_not_work(capsys, script, status, words):
    demo = ifl.DemoUpstream(pace_s=0, first_s=0, script=script)
    try:
        add_demo(capsys, demo)
        result, out, _ = run(capsys, "provider", "test", "mine")
        assert result == status and words in out and len(out.splitlines()) == 1
    finally:
        demo.close()


def test_provider_test_of_what_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(ifl.Gateway, "local_engines", {})
    assert run(capsys, "provider", "test")[0] == 1
    assert "provider add zhipu" in run(capsys, "provider", "test", "zhipu")[2]
    run(capsys, "provider", "add", "dead", "--base-url", f"http://127.0.0.1:{unused_port()}", "--models", "m")
    status, out, _ = run(capsys, "provider", "test", "dead")
    assert status == 1 and out.startswith("dead: does not work, the connection: ")
    run(capsys, "provider", "add", "zhipu")
    assert "its settings: the environment variable ZHIPU_API_KEY is not set" in run(capsys, "provider", "test", "zhipu")[1]


def test_provider_test_limits_tokens_in_the_provider_s_own_field(capsys, demo):
    run(capsys, "provider", "add", "mine", "--base-url", demo.base_url, "--preset", "openai", "--api-key", "k1")
    assert run(capsys, "provider", "test", "mine")[0] == 0
    assert all("max_tokens" not in r.body and "max_completion_tokens" in r.body for r in demo.requests)


def test_upstream_flag_brings_facts(monkeypatch):
    monkeypatch.setenv("K", "sk-1")
    gateway = ifl._gateway_of(ifl._parse_args(["--upstream", "https://api.deepseek.com", "--api-key", "$K"]))
    provider = gateway.state.router.providers["upstream"]
    assert provider.profile["require_reasoning_on_tool_calls"] and provider.api_keys == ("sk-1",)
    assert gateway.state.router.resolve("claude-sonnet-4-5", True)[0].model == "deepseek-flash"


# --- engines on this machine -------------------------------------------------

@pytest.fixture
def engines(monkeypatch):
    """Sets where engines are looked for."""
    def put(**where):
        monkeypatch.setattr(ifl.Gateway, "local_engines", where)
    put()
    return put


def looks(demo):
    return [r for r in demo.requests if r.path == "/v1/models"]


def test_an_engine_is_found_at_the_first_request(demo, engines, caplog):
    engines(ollama=demo.base_url, vllm=f"http://127.0.0.1:{unused_port()}/v1")
    caplog.set_level(logging.INFO, "iflow2api")
    with gateway_with() as (gateway, url):
        assert not looks(demo) and call(url, "/health")[1]["status"] == "degraded"
        body = {"model": "claude-sonnet-4-5", "max_tokens": 99, "messages": [user("hi")]}
        assert call(url, "/v1/messages", body)[0] == 200 and demo.requests[-1].body["model"] == "demo"
        assert message_of(chat(url, "hi", model="ollama/demo-vision"))["content"]
        assert len(looks(demo)) == 1                     # the second request came within 30 seconds
        assert call(url, "/health")[1]["providers"][0]["name"] == "ollama"
        assert "demo" in [m["id"] for m in call(url, "/v1/models")[1]["data"]]
    assert any(r.getMessage().startswith(f"found ollama at {demo.base_url}: demo") for r in caplog.records)
    assert ifl.LOCAL_TTL_S == 30


def test_an_engine_is_looked_for_again_and_its_end_noticed(demo, engines, monkeypatch, caplog):
    monkeypatch.setattr(ifl, "LOCAL_TTL_S", 0)
    engines(lmstudio=demo.base_url)
    caplog.set_level(logging.INFO, "iflow2api")
    with gateway_with() as (gateway, url):
        assert chat(url, "hi") and chat(url, "hi")
        assert len(looks(demo)) == 2
        demo.close()
        status, answer = call(url, "/v1/chat/completions", {"model": "demo", "messages": [user("hi")]})
        assert status == 403 and "no other provider" in answer["error"]["message"]
    said = [r.getMessage() for r in caplog.records if "engine" in r.getMessage() or "found" in r.getMessage()]
    assert [line.split()[0] for line in said] == ["found", "no"]


def test_many_requests_at_once_look_once(demo, engines):
    engines(llamacpp=demo.base_url)
    with gateway_with() as (gateway, url):
        threads = [threading.Thread(target=gateway.current) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(looks(demo)) == 1 and list(gateway.current().router.providers) == ["llamacpp"]


def test_engines_are_left_alone_where_a_provider_is_set_up_or_it_is_switched_off(demo, engines):
    engines(ollama=demo.base_url)
    with gateway_with(detect_local=False) as (gateway, url):
        assert call(url, "/v1/chat/completions", {"model": "demo", "messages": [user("hi")]})[0] == 403
    with gateway_with(providers=[{"name": "dead", "base_url": f"http://127.0.0.1:{unused_port()}"}]) as (gateway, url):
        assert call(url, "/v1/chat/completions", {"model": "demo", "messages": [user("hi")]})[0] == 502
    assert not demo.requests


def test_a_gateway_never_finds_itself_nor_another_one(demo, engines):
    with gateway_with(**demo.settings()) as (_, other), gateway_with() as (gateway, url):
        engines(vllm=url + "/v1", llamacpp=other + "/v1")
        status, answer = call(url, "/v1/chat/completions", {"model": "demo", "messages": [user("hi")]})
        assert status == 403 and gateway.metrics_text().count("requests_total{") == 1


def test_new_settings_end_the_search(demo, engines):
    engines(ollama=demo.base_url)
    with gateway_with() as (gateway, url):
        assert chat(url, "hi")
        gateway.apply(ifl.Settings(detect_local=False))
        assert gateway.current().router.default is None


def test_chat_models_come_before_embeddings(engines, monkeypatch):
    monkeypatch.setattr(ifl, "DEMO_MODELS", ({"id": "text-embedding-nomic"}, {"id": "qwen3"}))
    demo = ifl.DemoUpstream(pace_s=0, first_s=0)
    engines(lmstudio=demo.base_url)
    try:
        with gateway_with() as (gateway, url):
            assert gateway.current().router.providers["lmstudio"].models == ("qwen3", "text-embedding-nomic")
    finally:
        demo.close()


@pytest.mark.parametrize("data", [b"", b"<html>", b"[]", b'{"data": 5}', b'{"data": [1, {"id": 2}, {"id": ""}]}'])
def test_what_is_no_model_list_names_no_models(data):
    try:
        assert ifl.parse_model_list(data) == []
    except ifl.UpstreamGarbled:
        assert data in (b"", b"<html>")


def test_env_names_the_model_of_a_found_engine(capsys, demo, engines):
    engines(ollama=demo.base_url)
    assert "demo" in run(capsys, "env", "codex", "--shell", "bash")[1]
