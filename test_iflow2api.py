"""Tests of iflow2api.py, in the order of its sections.

    python -m pytest -q

Only pytest is needed.  The SDKs of OpenAI, Anthropic and Google are used where they are (those
for Node.js and gemini-cli in .ci/npm), and so are selenium and Chromium with its driver; with
IFLOW2API_REQUIRE_SDK=1 and IFLOW2API_REQUIRE_BROWSER=1 their absence is a failure.  Everything
happens on the loopback at ports the system picks, with HOME in a folder of the test's own.  Nothing
sleeps: what has to happen is waited for with a deadline (`until`, `WAIT_S`), what must not happen
is waited for with an answer to something that comes after it.
"""
import array
import ast
import atexit
import base64
import contextlib
import copy
import errno
import functools
import gc
import gzip
import hashlib
import hmac
import http.client
import http.server
import io
import itertools
import json
import logging
import os
import pathlib
import py_compile
import random
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import urllib.parse
import weakref
import urllib.request
import zlib
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, NamedTuple

import pytest

import iflow2api as ifl

try:
    from compression import zstd
except ImportError:                      # before Python 3.14
    zstd = None

#: A missing SDK is then a failure; read before the tests get an environment of their own.
SDK_REQUIRED = os.environ.get("IFLOW2API_REQUIRE_SDK") == "1"

#: So is a missing browser.
BROWSER_REQUIRED = os.environ.get("IFLOW2API_REQUIRE_BROWSER") == "1"

#: Growth is measured everywhere but where this says that another interpreter does.
GROWTH_MEASURED = os.environ.get("IFLOW2API_GROWTH") != "0"

PROGRAM = os.path.abspath(ifl.__file__)
SOURCE = open(PROGRAM, encoding="utf-8").read()


@functools.lru_cache(maxsize=None)
def tree() -> ast.Module:
    """The program's syntax: Python 3.7's, so that 3.7 and 3.8 reach the sentence for them."""
    return ast.parse(SOURCE, feature_version=(3, 7))


@functools.lru_cache(maxsize=None)
def nodes() -> List[ast.AST]:
    """All of it; a walk takes longer than what most rules do with it."""
    return list(ast.walk(tree()))


@functools.lru_cache(maxsize=None)
def byte_code() -> str:
    """The program as a file that a process runs at once, in a folder to import it from.

    A script is compiled anew each time.  Tests of the script, as users start it, run PROGRAM.
    """
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return py_compile.compile(PROGRAM, os.path.join(folder, "iflow2api.pyc"), PROGRAM, doraise=True)


#: Whatever has to happen happens within this; only a failing test takes so long.
WAIT_S = 10.0

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="relies on Linux' TCP")
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


# === 0. Fixtures =============================================================

def until(condition, seconds=WAIT_S, what="it"):
    """Wait until `condition()` is true and return its value; fails at the deadline."""
    pause, deadline = threading.Event(), time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        pause.wait(0.005)


def check_growth(size, make, use) -> None:
    """Four times the input takes six times as long at most; what is quadratic takes sixteen.

    The best of three counts, and a machine under load gets further tries.  One interpreter is
    enough: IFLOW2API_GROWTH=0 leaves it out on the others.
    """
    if not GROWTH_MEASURED:
        pytest.skip("growth is measured on another interpreter")

    def spent_s(size):
        made = make(size)
        gc.disable()                     # a collection looks at the objects of all tests
        try:
            began = time.thread_time()
            use(made)
            return time.thread_time() - began
        finally:
            gc.enable()

    for _ in range(4):
        base_s = min(spent_s(size) for _ in range(3))
        for _ in range(3):
            more_s = spent_s(4 * size)
            if more_s <= 6 * max(base_s, 0.001):
                return
    assert more_s <= 6 * base_s, base_s


class Clock:
    """A clock that is cranked by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(scope="session")
def homes(tmp_path_factory):
    """New folders, one after the other; tmp_path looks through all of them for a free name."""
    base = tmp_path_factory.mktemp("home")
    return (base / str(number) for number in itertools.count())


#: How the variables begin that mean something to the program.
OWN_VARIABLES = ("IFLOW", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
                 *filter(None, (preset.key for preset in ifl.PRESETS.values())))


@pytest.fixture(autouse=True)
def home(homes, monkeypatch):
    """HOME in a folder of its own, and none of the variables that mean something to the program."""
    folder = next(homes)
    folder.mkdir()
    for name in list(os.environ):
        if name.upper().startswith(OWN_VARIABLES):
            monkeypatch.delenv(name)
    for name in ("LC_MESSAGES", "LANG", "LANGUAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")               # the program speaks the locale's language
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def log_lines():
    """What the program logged; an error in it fails the test that did not take it out."""
    records: List[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)

    keep, handlers, level = Keep(), ifl.log.handlers[:], ifl.log.level
    ifl.log.addHandler(keep)
    ifl.log.setLevel(logging.INFO)
    yield records
    ifl.log.handlers[:] = handlers
    ifl.log.setLevel(level)
    bad = [record for record in records if record.levelno >= logging.ERROR]
    assert not bad, "\n".join(logging.Formatter().format(record) for record in bad)


# --- chat in small pieces ----------------------------------------------------

DONE = "[DONE]"
MESSAGES = [{"role": "user", "content": "hi"}]
USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}


def chat(stream=False, model="m1", **more) -> Dict[str, Any]:
    """A chat request's body."""
    return {"model": model, "messages": MESSAGES, **({"stream": True} if stream else {}), **more}


def chunk(content=..., finish=None, usage=None, **delta) -> Dict[str, Any]:
    """A chat chunk with one choice; content None is null, without one there is none."""
    if content is not ...:
        delta["content"] = content
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "up",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
            **({"usage": usage} if usage else {})}


def usage_chunk(usage=None) -> Dict[str, Any]:
    return {**chunk(), "choices": [], "usage": usage or USAGE}


def completion(content="Hello", finish="stop", usage=None, **message) -> Dict[str, Any]:
    """A plain chat answer."""
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "up",
            "choices": [{"index": 0, "finish_reason": finish,
                         "message": {"role": "assistant", "content": content, **message}}],
            "usage": usage or USAGE}


ROLE = chunk("", role="assistant")
HELLO = [ROLE, chunk("Hel"), chunk("lo"), chunk(finish="stop"), usage_chunk(), DONE]


def record(item, start=b"data: ", end=b"\n\n") -> bytes:
    """One record of an event stream: a chunk, [DONE], or bytes as they are."""
    if isinstance(item, bytes):
        return item
    return start + (item.encode() if isinstance(item, str) else ifl.dump_json(item)) + end


def wire_of(items, start=b"data: ", end=b"\n\n") -> bytes:
    return b"".join(record(item, start, end) for item in items)


def records_of(data: bytes) -> List[Any]:
    """An event stream taken apart strictly: objects, "[DONE]", and comments as they are."""
    assert data == b"" or data.endswith((b"\n\n", b"\r\n\r\n")), data[-80:]
    found: List[Any] = []
    for part in re.split(r"(?:\r?\n){2,}", data.decode())[:-1]:
        if part.startswith("data:"):
            part = part[5:].strip()
            found.append(part if part == DONE else json.loads(part))
        else:
            assert part.startswith(":"), part
            found.append(part)
    return found


def text_of(items) -> str:
    """The answer's text in chunks."""
    return "".join(choice["delta"].get("content") or "" for item in items if isinstance(item, dict)
                   for choice in item.get("choices", ()))


# --- the upstream ------------------------------------------------------------

class Seen(NamedTuple):
    """A request as the upstream got it."""
    method: str
    path: str
    headers: Dict[str, str]                # names in lower case
    body: bytes
    connection: int                        # number of the connection it came on

    @property
    def json(self):
        return json.loads(self.body)


class Step:
    def __init__(self, name: str) -> None:
        self.name = name


#: Steps of a reply besides bytes (sent) and Events (waited for).
# say nothing until the peer hangs up; noted in FakeUpstream.hung_up
HOLD = Step("hold")
RESET = Step("reset")                      # end the connection with an RST
CLOSE = Step("close")                      # end it properly
PAUSE = Step("pause")                      # 20 ms, or until the peer hangs up


class Reply:
    """What an upstream does with one request, step by step."""

    def __init__(self, *steps: Any) -> None:
        self.steps = steps


def head(status=200, headers=(), version="HTTP/1.1") -> bytes:
    lines = [f"{version} {status} {http.client.responses.get(status, 'Odd')}",
             *(f"{n}: {v}" for n, v in headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def plain(body, status=200, headers=(), content_type="application/json") -> Reply:
    """An answer with a length; an object is sent as JSON."""
    data = body if isinstance(body, bytes) else ifl.dump_json(body)
    return Reply(head(status, [("Content-Type", content_type), ("Content-Length", str(len(data))),
                               *headers]) + data)


def framed(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse(*items, headers=(), end=True, start=b"data: ", stop=b"\n\n") -> Reply:
    """An event stream in HTTP chunks, one for each item; `end`: with the last chunk."""
    steps = [item if isinstance(item, (Step, threading.Event))
             else framed(record(item, start, stop)) for item in items]
    begin = head(200, [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked"),
                       *headers])
    return Reply(begin, *steps, *([b"0\r\n\r\n"] if end else [CLOSE]))


def usual_reply(seen: Seen) -> Reply:
    """What an upstream without a script answers."""
    if seen.path.endswith("/models"):
        return plain({"object": "list", "data": [{"id": "m1", "object": "model"},
                                                 {"id": "org/m2:free", "object": "model"}]})
    if seen.path.endswith("/embeddings"):
        packed = base64.b64encode(array.array("f", [0.5, -1.0]).tobytes()).decode()
        wanted = packed if seen.json.get("encoding_format") == "base64" else [0.5, -1.0]
        data = [{"object": "embedding", "index": 0, "embedding": wanted}]
        return plain({"object": "list", "model": "e", "data": data,
                      "usage": {"prompt_tokens": 2, "total_tokens": 2}})
    if seen.path.endswith("/completions") and not seen.path.endswith("/chat/completions"):
        return plain({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "up",
                      "usage": USAGE,
                      "choices": [{"index": 0, "text": "Hello", "finish_reason": "stop",
                                   "logprobs": None}]})
    return sse(*HELLO) if seen.json.get("stream") else plain(completion())


class _FakeHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.number = self.server.fake.note_connection(self.connection)

    def handle(self):
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, format, *args):
        pass

    def do_POST(self):
        fake = self.server.fake
        seen = Seen(self.command, self.path,
                    {name.lower(): value for name, value in self.headers.items()},
                    self.rfile.read(int(self.headers.get("Content-Length") or 0)), self.number)
        reply = fake.next_reply(seen)
        self.close_connection = False
        for step in reply.steps:
            self._play(step, fake)

    do_GET = do_POST

    def _play(self, step, fake):
        if isinstance(step, bytes):
            self.connection.sendall(step)
        elif isinstance(step, threading.Event):
            until(lambda: step.is_set() or fake.closing.is_set(), what="the upstream's next step")
        elif step is RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif callable(step):
            step()
        elif step is PAUSE:
            fake.closing.wait(0.02)
        elif step is CLOSE:
            self.connection.shutdown(socket.SHUT_WR)
            self.close_connection = True
        else:
            self.close_connection = True
            fake.hold(self.connection)


class FakeUpstream:
    """An upstream on the loopback: plays `script`, a reply for each request (then `usual`), and
    notes `requests`.

    An entry of the script is a Reply, or a function of the Seen that returns one.
    """

    def __init__(self, context=None, usual=usual_reply) -> None:
        self.script: deque = deque()
        self.usual = usual
        self.requests: List[Seen] = []
        self.connections = self.hung_up = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._sockets: List[socket.socket] = []
        self._server = ifl.Listener(("127.0.0.1", 0), _FakeHandler)
        self._server.daemon_threads, self._server.fake = True, self
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True,
                                                      do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def plays(self, *replies) -> "FakeUpstream":
        self.script.extend(replies)
        return self

    def note_connection(self, sock) -> int:
        with self._lock:
            self._sockets.append(sock)
            self.connections += 1
            return self.connections

    def next_reply(self, seen: Seen) -> Reply:
        with self._lock:
            entry = self.script.popleft() if self.script else self.usual
            self.requests.append(seen)
        return entry(seen) if callable(entry) else entry

    def hold(self, sock) -> None:
        sock.settimeout(0.02)
        while not self.closing.is_set():
            try:
                if not sock.recv(1):
                    break
            except socket.timeout:
                continue
            except OSError:
                break
        if not self.closing.is_set():
            with self._lock:
                self.hung_up += 1

    @property
    def last(self) -> Seen:
        return self.requests[-1]

    def wait(self, number: int = 1) -> None:
        """Until that many requests were seen."""
        until(lambda: len(self.requests) >= number, what=f"request {number} at the upstream")

    def drop_connections(self) -> None:
        """Close every connection, as a server does with idle ones."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.closing.set()
        ifl.stop_accepting(self._server)
        self.drop_connections()


@pytest.fixture
def upstreams():
    """A factory of FakeUpstreams."""
    with contextlib.ExitStack() as stack:
        def make(*replies, **facts):
            fake = FakeUpstream(**facts).plays(*replies)
            stack.callback(fake.close)
            return fake
        yield make


@pytest.fixture
def upstream(upstreams):
    return upstreams()


def provider(fake, name="up", **facts) -> Dict[str, Any]:
    """An entry of `providers` for a FakeUpstream or a URL."""
    return {"name": name, "base_url": getattr(fake, "url", fake), **facts}


# --- the gateway and its server ----------------------------------------------

def settings_for(providers, **settings) -> ifl.Settings:
    names = itertools.chain(["up"], (f"up{number}" for number in itertools.count(2)))
    entries = [item if isinstance(item, dict) else provider(item, next(names))
               for item in providers]
    return ifl.Settings(**{"port": 0, "providers": entries, **settings})


@pytest.fixture
def gateway():
    """gateway(*providers, **settings): FakeUpstreams, URLs or entries, named up, up2, …"""
    with contextlib.ExitStack() as stack:
        def make(*providers, environ=None, clock=time.monotonic, pause=ifl.wait_for, **settings):
            made = ifl.Gateway(settings_for(providers, **settings), environ=environ or {},
                               clock=clock, pause=pause)
            stack.callback(made.close)
            return made
        yield make


@pytest.fixture
def server(gateway):
    """server(*providers, **settings): the same, and serving; or server(gateway=…)."""
    with contextlib.ExitStack() as stack:
        def make(*providers, gateway=None, host="127.0.0.1", make_gateway=gateway, **settings):
            made = ifl.serve(gateway or make_gateway(*providers, **settings), host=host, port=0)
            stack.callback(made.close)
            return made
        yield make


@pytest.fixture
def chain(server):
    """chain(*providers, **settings): a server whose model m is one/a, two/b, … of these."""
    def make(*providers, **settings):
        entries = [item if isinstance(item, dict) else provider(item, name)
                   for item, name in zip(providers, ("one", "two", "three", "four"))]
        targets = [f"{entry['name']}/{model}" for entry, model in zip(entries, "abcd")]
        return server(*entries, **{"aliases": {"m": targets}, **settings})
    return make


@pytest.fixture
def looks_often(monkeypatch):
    """A client that has left is noticed soon instead of within half a second."""
    monkeypatch.setattr(ifl.StreamLoop, "LOOK_EVERY_S", 0.02)


@pytest.fixture
def config(home):
    """The ConfigFile in HOME."""
    return ifl.ConfigFile(str(home / ".iflow2api"))


def put_config(config, value) -> None:
    """Write config.json: bytes as they are, else as JSON."""
    os.makedirs(config.folder, exist_ok=True)
    with open(config.path, "wb") as file:
        file.write(value if isinstance(value, bytes) else json.dumps(value).encode())


# --- the client --------------------------------------------------------------

class Answer(NamedTuple):
    """An answer as a client got it."""
    status: int
    headers: Dict[str, str]                # names in lower case
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        """OpenAI's error object."""
        assert set(self.json) >= {"error"} and self.json["error"]["message"], self
        return self.json["error"]


def request_bytes(method="POST", path="/v1/chat/completions", body=b"", headers=None,
                  version="HTTP/1.1") -> bytes:
    """A request; headers with the value None are left out."""
    data = body if isinstance(body, bytes) else ifl.dump_json(body)
    length = {"Content-Length": str(len(data))} if data or method == "POST" else {}
    lines = {"Host": "127.0.0.1", **length,
             **(headers or {})}
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"{method} {path} {version}\r\n{text}\r\n".encode("latin-1") + data


#: The page's password in these tests, as the settings keep it (few rounds: it is asked for often),
#: and as scripts send it.
PASSWORD = "correct horse"
PASSWORD_HASH = "$".join(("pbkdf2-sha256", "10", "5a" * 16, hashlib.pbkdf2_hmac(
    "sha256", PASSWORD.encode(), b"Z" * 16, 10).hex()))
BASIC = "Basic " + base64.b64encode(f"admin:{PASSWORD}".encode()).decode()


class Client:
    """One connection to a server.  Reads answers strictly, so that framing errors show."""

    def __init__(self, server, timeout_s=WAIT_S) -> None:
        host = server.server_address[0]
        host = host if host != "0.0.0.0" else "127.0.0.1"
        self.sock = socket.create_connection((host, server.port), timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rb")

    def send(self, data: bytes) -> "Client":
        self.sock.sendall(data)
        return self

    def request(self, *args, **facts) -> "Client":
        return self.send(request_bytes(*args, **facts))

    def post(self, body, **facts) -> "Client":
        return self.send(request_bytes(body=body, **facts))

    def head(self):
        """Status and headers of the next answer."""
        line = self.file.readline()
        assert line, "the connection ended instead of an answer"
        version, status, _ = line.decode().split(" ", 2)
        assert version == "HTTP/1.1"
        headers: Dict[str, str] = {}
        while True:
            line = self.file.readline()
            assert line.endswith(b"\r\n"), line
            if line == b"\r\n":
                return int(status), headers
            name, value = line.decode("latin-1").rstrip("\r\n").split(": ", 1)
            headers[name.lower()] = value

    def piece(self) -> bytes:
        """The payload of the next HTTP chunk, b"" for the last."""
        line = self.file.readline()
        assert re.fullmatch(rb"[0-9a-f]+\r\n", line), f"no chunk: {line!r}"
        size = int(line, 16)
        data = self.file.read(size)
        assert len(data) == size and self.file.read(2) == b"\r\n"
        return data

    def pieces(self) -> bytes:
        """The payload of all chunks to the last."""
        return b"".join(iter(self.piece, b""))

    def answer(self, method="POST") -> Answer:
        status, headers = self.head()
        if method == "HEAD" or status in (204, 304) or status < 200:
            return Answer(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            return Answer(status, headers, self.pieces())
        if "content-length" in headers:
            size = int(headers["content-length"])
            body = self.file.read(size)
            assert len(body) == size
        else:
            body = self.file.read()
        return Answer(status, headers, body)

    def is_closed(self) -> bool:
        """Whether the server ended the connection, and said nothing more."""
        try:
            return self.file.read(1) == b""
        except ConnectionError:
            return True

    def hang_up(self, reset=False) -> None:
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.file.close()
        self.sock.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc) -> None:
        self.hang_up()


def post(server, body, path="/v1/chat/completions", **headers) -> Answer:
    """One POST on a connection of its own; header names in Python's spelling: x_api_key=…"""
    with Client(server) as client:
        return client.post(body, path=path, headers=_spelled(headers)).answer()


def get(server, path, method="GET", **headers) -> Answer:
    with Client(server) as client:
        return client.request(method, path, headers=_spelled(headers)).answer(method)


def _spelled(headers):
    return {name.replace("_", "-"): value for name, value in headers.items()}


def is_well(server) -> bool:
    """Whether the server still answers, and holds nothing of what happened before."""
    until(lambda: server.gateway.in_flight == 0, what="the end of all calls")
    return get(server, "/health").status == 200


def run(*argv, timeout_s=30, **facts):
    """The program in a process of its own."""
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True,
                          timeout=timeout_s,
                          cwd=os.path.dirname(byte_code()), encoding="utf-8", **facts)


# === 1. Preamble =============================================================

#: Hides modules as OpenWrt's python3-light does, but for `names`.
LIGHT = """
import sys, importlib.abc
hidden = set('''asyncio cgi cgitb _codecs_cn _codecs_hk _codecs_iso2022 _codecs_jp _codecs_kr
_codecs_tw unicodedata ctypes _ctypes dbm decimal _decimal distutils email lib2to3 logging lzma
_lzma multiprocessing curses _curses _ssl _hashlib pydoc doctest readline sqlite3 _sqlite3 unittest
urllib uuid _uuid xml xmlrpc pyexpat webbrowser tkinter'''.split()) - set({names!r})
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError("No module named %r" % name, name=name.partition(".")[0])
sys.meta_path.insert(0, Hide())
for name in list(sys.modules):
    if name.partition(".")[0] in hidden:
        del sys.modules[name]
sys.path.insert(0, {folder!r})
"""


def run_light(code, *names):
    """`code` in a process where only `names` of OpenWrt's split packages are installed."""
    light = LIGHT.format(names=names, folder=os.path.dirname(byte_code()))
    return run("-S", "-E", "-B", "-c", light + textwrap.dedent(code))


def test_old_pythons_get_a_sentence(monkeypatch):
    """3.7 can read the file; 2.7 stops at the first annotation and 3.6 at the import from the
    future, whose lines they show; what is above the gate runs everywhere.
    """
    lines = SOURCE.splitlines()
    for start in ("def ", "from __future__"):
        first = next(line for line in lines if line.startswith(start))
        assert first.endswith("# iflow2api needs Python 3.9 or newer")
    assert "coding: utf-8" in lines[1]   # else 2.7 complains of a character
    body = tree().body
    last = next(number for number, node in enumerate(body) if isinstance(node, ast.If))
    assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in body[:last])
    gate = compile(ast.Module(body=body[:last + 1], type_ignores=[]), "gate", "exec")
    for version in ((3, 8, 18), (3, 6, 15), (2, 7, 18)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(sys, "version_info", version)
            exec(gate, {"__name__": "iflow2api"})
        said = "iflow2api needs Python 3.9 or newer; this is %d.%d."
        assert str(stopped.value) == said % version[:2]


def test_it_runs_with_the_packages_that_the_readme_names_for_openwrt():
    """python3-light, -urllib, -openssl and -logging: no codecs, so no idna and no unicodedata."""
    done = run_light("""
        import iflow2api as ifl, socket
        try:
            "a".encode("idna")
            print("idna is there")
        except LookupError:
            pass
        server = ifl.serve(ifl.Gateway(ifl.Settings(detect_local=False), environ={}), port=0)
        print(server.url, "a".encode("idna"), bool(socket.getaddrinfo("localhost", 80)))
        server.close()
        print(ifl.main(["version"]), ifl.main(["config", "path", "--config-dir", "x"]))
        """, "urllib", "email", "_ssl", "_hashlib", "logging")
    assert done.returncode == 0, done.stderr
    assert re.match(r"http://127\.0\.0\.1:\d+ b'a' True\niflow2api .*\n", done.stdout), done.stdout
    assert done.stdout.endswith("0 0\n")


@pytest.mark.parametrize("there, package", [
    ("", "python3-urllib|python3-logging|python3-openssl"),
    ("logging _ssl _hashlib", "python3-urllib"), ("urllib email logging", "python3-openssl"),
    ("urllib email _ssl _hashlib", "python3-logging")])
def test_a_missing_module_names_the_package(there, package):
    done = run_light("import iflow2api", *there.split())
    wanted = (r"iflow2api needs the Python module '\w+'\. On OpenWrt install it with: "
              rf"opkg install ({package}) .*\n")
    assert done.returncode == 1 and re.fullmatch(wanted, done.stderr)


SLOW_IMPORTS = {"asyncio", "uuid", "webbrowser", "decimal", "sqlite3", "ctypes", "argparse",
                "difflib", "subprocess", "urllib.request", "logging.handlers"}


def test_an_import_changes_nothing_and_slow_imports_wait_until_they_are_needed(home):
    done = run("-W", "error", "-X", "dev", "-S", "-c", textwrap.dedent("""
        import os, sys, threading, signal, socket; sys.path.insert(0, os.getcwd())
        before = os.listdir(os.environ["HOME"])
        import iflow2api as ifl
        print(threading.stack_size(), threading.active_count(), socket.getdefaulttimeout(),
              signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
              os.listdir(os.environ["HOME"]) == before)
        ifl.serve(ifl.Gateway(ifl.Settings()), port=0).close()
        print(*sys.modules)
        """))
    facts, modules = done.stdout.splitlines()
    assert (facts, done.stderr) == ("0 1 None True True", "")
    assert "http.server" in modules.split() and not SLOW_IMPORTS & set(modules.split())
    assert re.fullmatch(r"\d+\.\d+\.\d+", ifl.__version__)
    assert {"Gateway", "Settings", "serve", "main"} <= set(ifl.__all__) <= set(dir(ifl))


@posix
def test_a_program_from_standard_input_says_what_is_wrong(home):
    """`curl … | python - --port x`: there is no file to start again from."""
    done = run("-", "--port", "x", input=SOURCE)
    assert done.returncode == 2 and "--port" in done.stderr and "Traceback" not in done.stderr


# --- starting ----------------------------------------------------------------

#: The program's preamble, and then what it has become.
PROBE = SOURCE[:SOURCE.index("#: Modules that OpenWrt")] + """
import base64, json
flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if name[0] != "_"}
malloc = {name: value for name, value in os.environ.items()
          if "MALLOC" in name or "RESTART" in name}
print(json.dumps({
    "flags": {name: value for name, value in flags.items() if isinstance(value, int)},
    "argv": sys.argv, "file": __file__, "path": sys.path[0], "name": __name__, "malloc": malloc,
    "base64": base64.__file__, "warn": sys.warnoptions, "unbuffered": sys.stdout.write_through,
    "is_loaded": "site" not in sys.modules,
    "open": os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []}))
"""


def probe_after(hindrance) -> str:
    return PROBE.replace("import sys\n", f"import sys\n{hindrance}\n", 1)


@pytest.fixture
def probe(tmp_path):
    """probe(*interpreter flags, …) -> what PROBE prints, started as a user starts the program."""
    folder = tmp_path / "place with blank"
    folder.mkdir()
    path = folder / "probe.py"

    def start(*flags, argv=("--port", "1"), text=PROBE, by_module=False, cwd=None, **environ):
        path.write_text(text, encoding="utf-8")
        own = {name: value for name, value in os.environ.items()
               if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")}
        script = ["-m", "probe"] if by_module else [str(path)]
        done = subprocess.run([sys.executable, *flags, *script, *argv], capture_output=True,
                              text=True, timeout=30, cwd=str(cwd or folder), env={**own, **environ},
                              stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    start.path = path
    return start


@posix
def test_a_start_hands_its_code_over(probe):
    """In memory: nothing is written, and what the process sees is what a script sees."""
    found = probe()
    assert found["is_loaded"] and found["name"] == "__main__"
    assert found["argv"] == [str(probe.path), "--port", "1"] and found["file"] == str(probe.path)
    assert found["path"] == str(probe.path.parent)
    assert os.listdir(probe.path.parent) == ["probe.py"]
    assert len(found["open"]) <= 4 and found["malloc"] == {}     # 0 to 2, and the listing
    for argv in (["status"], ["--help"], ["serve", "--version"]):
        assert not probe(argv=argv)["is_loaded"]
    with pytest.raises(AssertionError,
                       match=r'probe\.py", line \d+, in <module>(?s:.*)ZeroDivision'):
        probe(text=PROBE + "1 / 0\n")


@posix
@pytest.mark.parametrize("flags, held", [
    ("-I", {"isolated": 1}), ("-B", {"dont_write_bytecode": 1}), ("-u", {}),
    ("-OO", {"optimize": 2}),
    ("-E -s", {"ignore_environment": 1, "no_user_site": 1}),
    ("-X utf8 -bb", {"utf8_mode": 1, "bytes_warning": 2}),
    ("-W error::ResourceWarning -X dev", {"dev_mode": True}),
    pytest.param("-P", {"safe_path": True}, marks=pytest.mark.skipif(
        sys.version_info < (3, 11), reason="new in 3.11"))])
def test_the_interpreters_flags_are_kept(probe, flags, held):
    found = probe(*flags.split())
    assert found["is_loaded"] and {name: found["flags"][name] for name in held} == held
    assert found["unbuffered"] == (flags == "-u")
    assert ("error::ResourceWarning" in found["warn"]) == ("-W" in flags)
    safe = bool(found["flags"].get("safe_path") or found["flags"]["isolated"])
    assert (found["path"] == str(probe.path.parent)) != safe


@posix
@pytest.mark.parametrize("hindrance", ["", "vars(os).pop('memfd_create', None)"])
def test_no_folder_that_others_write_is_imported_from(probe, tmp_path, hindrance):
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("base64", "os", "marshal", "posix", "sys", "site", "re", "encodings"):
        (hostile / f"{name}.py").write_text("import os; os._exit(66)\n")
    before = sorted(os.listdir(hostile))
    found = probe(text=probe_after(hindrance), cwd=hostile, TMPDIR=str(hostile))
    assert found["is_loaded"] and not found["base64"].startswith(str(hostile))
    assert sorted(os.listdir(hostile)) == before


@posix
@pytest.mark.parametrize("hindrance", [
    "vars(os).pop('memfd_create', None); os.environ['TMPDIR'] = '/no/such/folder'",
    "sys.executable = ''", "sys.executable = '/no/such/python'", "os.name = 'nt'",
    "os.set_inheritable = lambda *_: os.stat('/no/such/file')"])
def test_a_start_that_can_not_be_replaced_goes_on(probe, hindrance):
    found = probe(text=probe_after(hindrance))
    assert not found["is_loaded"] and found["malloc"] == {} and len(found["open"]) <= 4


@posix
def test_an_edited_file_is_run_as_it_is_now(probe):
    """Of the same size and time, and after one that could not be read to its end."""
    for text in ("one", "two"):
        if probe.path.exists():
            os.utime(probe.path, (1, 1))
        assert probe(text=PROBE.replace('"name": __name__', f'"name": "{text}"'))["name"] == text
    with pytest.raises(AssertionError, match="SyntaxError"):
        probe(text=PROBE[:-40])
    assert probe()["name"] == "__main__"


@posix
def test_by_module_it_starts_by_module_again(probe):
    found = probe(by_module=True)
    assert not found["is_loaded"] and found["argv"] == [str(probe.path), "--port", "1"]
    elsewhere = str(probe.path.parent / "none")
    assert probe("-B", by_module=True, PYTHONPYCACHEPREFIX=elsewhere)["is_loaded"]


@linux
@pytest.mark.parametrize("by_module", [False, True])
def test_malloc_is_told_for_this_process_alone(probe, by_module):
    """The user's own win; what the process was started with shows that ours were there."""
    look = PROBE.replace('"file":', '"told": open("/proc/self/environ").read(), "file":')
    found = probe(text=look, by_module=by_module)
    assert found["malloc"] == {} and found["told"].count("MALLOC_") == 4     # and which are ours
    found = probe(text=look, by_module=by_module, MALLOC_ARENA_MAX="4")
    assert found["malloc"] == {"MALLOC_ARENA_MAX": "4"}


@linux
def test_a_server_is_small_with_a_home_that_can_not_be_written(home):
    """And `ps` names the file."""
    process = subprocess.Popen([sys.executable, PROGRAM, "--demo", "--port", "0"],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env={**os.environ, "HOME": "/proc/1"})
    try:
        url = process.stdout.readline().decode().split()[-1]
        assert json.loads(urllib.request.urlopen(url + "/health").read())["status"] == "healthy"
        proc = pathlib.Path(f"/proc/{process.pid}")
        assert PROGRAM.encode() in (proc / "cmdline").read_bytes()
        pages = int((proc / "statm").read_text().split()[1])
        assert pages * os.sysconf("SC_PAGE_SIZE") < 34 << 20
    finally:
        process.terminate()
        process.wait(WAIT_S)
        process.stdout.close()


# === 3. Errors ===============================================================

def test_errors_carry_status_code_and_facts():
    exc = ifl.BadRequest("no", param="model", code="c")
    assert (exc.status, exc.type, exc.message) == (400, "invalid_request_error", "no")
    assert (exc.param, exc.code) == ("model", "c") and ifl.BadRequest.param is None
    assert ifl.Busy("later").retry_after_s and ifl.Forbidden("no").should_retry is False
    assert issubclass(ifl.UpstreamTimeout, ifl.UpstreamError)
    assert ifl.UpstreamTimeout("t").status == 504


# === 4. Small tools ==========================================================

def test_ids_are_long_and_differ():
    names = {ifl.new_id("req_") for _ in range(500)}
    assert len(names) == 500 and all(re.fullmatch(r"req_[0-9a-f]{24}", name) for name in names)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_ids_of_a_child_are_not_its_parents():
    program = ("import os, iflow2api as ifl\n"
               "ifl.new_id('req_'); reader, writer = os.pipe(); child = os.fork()\n"
               "mine = ifl.new_id('req_')\n"
               "if not child: os.write(writer, mine.encode()); os._exit(0)\n"
               "os.waitpid(child, 0); print(os.read(reader, 100).decode() != mine)\n")
    assert run("-W", "ignore", "-c", program).stdout == "True\n"


@pytest.mark.parametrize("text, hidden", [
    ("Authorization: Bearer abcdefgh12", "abcdefgh12"),
    ("key sk-abcdefgh1234 refused", "abcdefgh1234"), ("http://user:pa55word@host/", "pa55word"),
    ("http://user:" + "x" * 5000 + "pa55word@host/", "pa55word"),
    ('{"api_key": "abcd1234"}', "abcd1234"), ("api-key=abcd1234&x=1", "abcd1234"),
    ("access_token=abcd1234", "abcd1234")])
def test_credentials_are_taken_out_of_texts(text, hidden):
    assert hidden not in ifl.redact(text) and "…" in ifl.redact(text)
    assert hidden not in ifl.one_line(text)


def test_texts():
    assert ifl.one_line("a\r\nb\x1b[31mc\u202ed\u2028e") == "a b [31mc d e"
    assert len(ifl.one_line("x" * 1000)) == 300 and ifl.one_line(None) == "None"
    assert ifl.nearest("prot", ["port", "language"]) == "; did you mean port?"
    assert ifl.nearest("xyz", ["port", "host"]) == ""
    assert list(map(ifl.mask, ("", "short", "sk-0123456789abcdef"))) == ["", "…", "sk-…cdef"]


def test_loopback_is_this_machine_alone():
    mine = ("127.0.0.1", "127.9.8.7", "localhost", "LOCALHOST", "app.localhost", "localhost.",
            "::1", "[::1]")
    others = ("0.0.0.0", "::", "", "192.168.1.1", "127.0.0.1.evil.example", "1270.0.0.1",
              "localhost.evil.example", "evillocalhost", "127.0.0.1\n")
    assert [host for host in mine + others if ifl.is_loopback(host)] == list(mine)


# --- files --------------------------------------------------------------------

def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@posix
@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_files_and_folders_that_are_made_are_their_owners_alone(home, umask):
    (home / "there").mkdir(mode=0o755)
    path = home / "there" / "a" / "b" / "file"
    before = os.umask(umask)
    try:
        ifl.write_file(str(path), b"one")
        ifl.write_file(str(path), b"two")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["file"]
    assert [mode_of(home / "there" / name) for name in ("", "a", "a/b")] == [0o755, 0o700, 0o700]
    assert mode_of(path) == (0o600 if umask != 0o777 else 0)
    with pytest.raises(OSError):
        ifl.make_folder(str(path / "x"))


@posix
def test_write_file_follows_a_link(home):
    (home / "real").write_bytes(b"old")
    (home / "link").symlink_to(home / "real")
    ifl.write_file(str(home / "link"), b"new")
    assert (home / "link").is_symlink() and (home / "real").read_bytes() == b"new"


def refuse_to_replace(monkeypatch, name, code=errno.EBUSY):
    """Let os.replace fail on the file `name`, as it does on a bind mount."""
    replace = os.replace

    def failing(source, target, **more):
        if name in (os.path.basename(str(source)), os.path.basename(str(target))):
            raise OSError(code, os.strerror(code), str(source))
        return replace(source, target, **more)
    monkeypatch.setattr(os, "replace", failing)


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES])
def test_a_file_that_can_not_be_replaced_is_written_in_place_after_its_copy(
        home, monkeypatch, code):
    path, copy, write, had_copy = home / "file", home / "file.bak", ifl._write, []
    path.write_bytes(b"something long")
    node = path.stat().st_ino
    refuse_to_replace(monkeypatch, "file", code)
    monkeypatch.setattr(ifl, "_write", lambda fd, data: (had_copy.append(copy.exists()),
                                                         write(fd, data)))
    ifl.write_file(str(path), b"short")
    assert (path.read_bytes(), path.stat().st_ino, had_copy[-1]) == (b"short", node, True)
    assert sorted(os.listdir(home)) == ["file", "file.bak"]
    assert os.name == "nt" or mode_of(path) == 0o600
    assert copy.read_bytes() == b"something long"


@pytest.mark.parametrize("full", [["file"], ["file.bak"]])
def test_a_full_disk_leaves_the_old_file(home, monkeypatch, full):
    path = home / "file"
    path.write_bytes(b"old")
    refuse_to_replace(monkeypatch, "file", errno.EBUSY)
    for name in full:
        refuse_to_replace(monkeypatch, name, errno.ENOSPC)
    with pytest.raises(OSError):
        ifl.write_file(str(path), b"new")
    assert path.read_bytes() == b"old" and os.listdir(home) == ["file"]


def holds(path, timeout_s=0):
    """Whether the lock can be had within the time, at least at the first attempt."""
    try:
        with ifl.file_lock(path, timeout_s):
            return True
    except TimeoutError as exc:
        assert str(exc).endswith(f"another process has held {path} for {timeout_s:g} s")
        return False


def test_one_holder_at_a_time(home):
    path, inside, most = str(home / "deep" / "a.lock"), [0], [0]

    def work():
        for _ in range(20):
            with ifl.file_lock(path, WAIT_S):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join(WAIT_S) for thread in threads]
    assert most == [1] and inside == [0] and os.listdir(home / "deep") == ["a.lock"]
    with ifl.file_lock(path, 1):
        assert not holds(path)
    assert holds(path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL,
                                  errno.EIO], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_named_once_other_errors_are_raised(
        home, monkeypatch, caplog, code):
    fcntl = pytest.importorskip("fcntl")

    def flock(fd, operation):
        raise OSError(code, "no")
    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(3):
        with pytest.raises(OSError) if code == errno.EIO else contextlib.nullcontext():
            with ifl.file_lock(str(home / "a.lock"), 0):
                pass
    told = caplog.text.count(f"only one process may write in {home}")
    assert told == (code != errno.EIO)


# === 5. Settings and routes ==================================================

def load(raw=None, environ=None, flags=None, last=None):
    return ifl.load_settings(raw or {}, environ or {}, flags or {}, last)


def test_every_setting_has_its_facts():
    for name, item in ifl.SETTING.items():
        facts = item.metadata
        texts = facts["label"] + facts["hint"]
        assert facts["kind"] in ("str", "int", "float", "bool", "list", "dict"), name
        assert len(texts) in (2, 4) and all(texts) and "  " not in "".join(texts), name
        assert texts[1][0].isupper() or texts[1].startswith("iFlow"), name
        assert facts["kind"] != "dict" or texts[2:] or name in ("aliases", "accounts"), name
        assert ifl.check_setting(name, ifl.default_of(name)) == ifl.default_of(name)
        with pytest.raises(AttributeError):              # settings are a value
            setattr(ifl.Settings(), name, None)
    assert ifl.Settings().providers is not ifl.Settings().providers


@pytest.mark.parametrize("raw, environ, flags, port, origin", [
    ({}, {}, {}, 28000, None), ({"port": 1}, {}, {}, 1, "file"),
    ({"port": 1}, {"IFLOW2API_PORT": "2"}, {}, 2, "environment"),
    ({"port": 1}, {"IFLOW2API_PORT": "2"}, {"port": 3}, 3, "flag"),
    ({"port": 1}, {"IFLOW2API_PORT": ""}, {}, 1, "file"),
    ({}, {"iflow2api_port": "2"}, {}, 28000, None)])
def test_flag_stands_above_environment_above_file_above_default(raw, environ, flags, port, origin):
    loaded = load(raw, environ, flags)
    assert (loaded.settings.port, loaded.origins.get("port"), loaded.warnings) == (port, origin, [])


@pytest.mark.parametrize("name, text, value", [
    ("port", "0", 0), ("keepalive_s", "2.5", 2.5), ("drain_s", "3", 3),
    ("detect_local", "off", False), ("detect_local", "TRUE", True),
    ("allowed_hosts", '["a"]', ["a"]), ("aliases", '{"a": "b"}', {"a": "b"}),
    ("default_model", "5", "5"), ("log_level", "debug", "debug")])
def test_variables_are_text_that_is_read_by_kind(name, text, value):
    loaded = load(environ={"IFLOW2API_" + name.upper(): text})
    assert getattr(loaded.settings, name) == value and not loaded.warnings
    assert type(getattr(loaded.settings, name)) is type(value)


@pytest.mark.parametrize("name, value", [
    ("port", "80"), ("port", 70000), ("port", -1), ("port", True), ("port", 1.5), ("port", None),
    ("detect_local", 1), ("detect_local", "yes"), ("host", 5), ("providers", {}), ("aliases", []),
    ("log_level", "loud"), ("keepalive_s", 0), ("keepalive_s", "10"), ("body_limit_bytes", 5),
    ("max_connections", 0), ("language", "fr"), ("keepalive_s", float("nan")),
    ("connect_timeout_s", float("inf")), ("connect_timeout_s", 1e300)])   # no socket waits so long
def test_a_bad_value_is_named_and_what_stood_below_is_used(name, value):
    loaded = load({name: value, "default_model": "kept"})
    assert getattr(loaded.settings, name) == ifl.default_of(name) and name not in loaded.origins
    assert loaded.settings.default_model == "kept"
    warning, = loaded.warnings
    assert warning.startswith(f"config.json: {name}: ") and "expected" in warning
    last = ifl.Settings(**{name: "in force"})            # at a reload that one stays
    assert getattr(load({name: value}, last=last).settings, name) == "in force"


@pytest.mark.parametrize("name, text", [
    ("port", "x"), ("port", "70000"), ("port", "1.5"), ("detect_local", "maybe"),
    ("aliases", "[1]"), ("providers", "{"), ("keepalive_s", "NaN"), ("aliases", "[" * 100_000)])
def test_a_bad_variable_is_named_and_the_file_counts(name, text):
    below = {"port": 5, "aliases": {"a": "b"}, "detect_local": False, "providers": [{"name": "p"}],
             "keepalive_s": 3}
    loaded = load(below, {"IFLOW2API_" + name.upper(): text})
    assert getattr(loaded.settings, name) == below[name] and loaded.origins[name] == "file"
    warning, = loaded.warnings
    assert warning.startswith(f"IFLOW2API_{name.upper()}: ")


# --- config.json -------------------------------------------------------------

def broken_files(config):
    return [open(os.path.join(config.folder, name), "rb").read()
            for name in os.listdir(config.folder) if name.startswith("config.json.broken-")]


@pytest.mark.parametrize("data", [
    b'{"port": 5, "x": "\xe4\xb8\xad"}', b'\xef\xbb\xbf{"port": 5, "x": "\xe4\xb8\xad"}',
    '{"port": 5, "x": "中"}'.encode("utf-16"),
    b"\xfe\xff" + '{"port": 5, "x": "中"}'.encode("utf-16-be"),
    b'{\r\n"port": 5,\r\n"x": "\\u4e2d"}\r\n'],
    ids=["utf-8", "bom", "utf-16-le", "utf-16-be", "crlf"])
def test_config_json_as_editors_write_it(config, data):
    put_config(config, data)
    assert config.read() == {"port": 5, "x": "中"}


@pytest.mark.parametrize("data, place", [
    (b"", "line 1, column 1"), (b"{", "line 1, column 2"),
    (b'{\n "port": 5,\n}', "line 3, column 1|line 2, column 11"),
    (b'{"a": "\xff"}', "line 1, column 8"), (b'{\n\n"a": "\xe4\xb8"}', "line 3, column 7"),
    (b"[1]", "line 1, column 1"), (b'{"a": ' + b"[" * 100_000, "line 1, column 1"),
    (b"\xff\xfe{", "line 1, column"), (b"\0\0", "line 1, column 1")])
def test_a_broken_config_json_says_where(config, data, place):
    put_config(config, data)
    with pytest.raises(ifl.ConfigBroken) as broken:
        config.read()
    assert config.path in str(broken.value) and re.search(rf"({place})", str(broken.value))


def test_a_broken_file_falls_back_to_its_backup_and_is_moved_at_the_next_write(config):
    put_config(config, {"port": 1, "foreign": {"deep": [1]}})
    config.change(lambda raw: raw.update(port=2))
    put_config(config, b'{"port": 3,}')
    made = ifl.Gateway(config=config, environ={})
    assert made.settings.port == 1 and made.health()["status"] == "degraded"
    assert "line 1, column" in made.problems[0] and "config.json.bak" in made.problems[0]
    assert os.path.exists(config.path)                    # looking at it moves nothing
    made.change_config(lambda raw: raw.update(default_model="m"))
    assert config.read() == {"port": 1, "foreign": {"deep": [1]}, "default_model": "m"}
    assert broken_files(config) == [b'{"port": 3,}']
    assert made.problems == [] and not made.config_broken


@pytest.mark.parametrize("data, backup", [(None, None), (b"{", None), (b"{", b"{broken")])
def test_without_a_file_or_a_good_backup_there_are_defaults(config, data, backup):
    if data is not None:
        put_config(config, data)
    if backup is not None:
        pathlib.Path(config.backup).write_bytes(backup)
    raw, warnings = config.recover()
    assert raw == {} and ["defaults" in text for text in warnings] == [True] * bool(data)
    made = ifl.Gateway(config=config, environ={})
    assert made.settings == ifl.Settings() and made.config_broken == bool(made.problems)
    assert made.config_broken == os.path.exists(config.folder) == bool(data)


@posix
def test_writing_keeps_unknown_keys_order_and_a_backup_and_is_private(config):
    """A lone surrogate is JSON, but not UTF-8."""
    put_config(config, '{"zzz": {"b": 1, "a": [null, 1.5]}, "port": 5, "名": "值"}'.encode())
    os.chmod(config.path, 0o644)
    config.change(lambda raw: raw.update(host="127.0.0.1"))
    assert list(config.read().items()) == [("zzz", {"b": 1, "a": [None, 1.5]}), ("port", 5),
                                           ("名", "值"), ("host", "127.0.0.1")]
    assert "值" in open(config.path, encoding="utf-8").read()
    assert json.load(open(config.backup, encoding="utf-8"))["port"] == 5
    assert [mode_of(path) for path in (config.path, config.backup)] == [0o600, 0o600]
    config.change(lambda raw: raw.update(odd="\ud83d"))
    assert config.read()["odd"] == "\ud83d"


@pytest.mark.parametrize("before, has_room", [(b'{"port": 1}', True), (b'{"port": 1}', False),
                                              (b"{broken", True)])
def test_a_bind_mounted_config_json_is_written_in_place_after_its_copy(
        config, monkeypatch, before, has_room):
    put_config(config, before)
    refuse_to_replace(monkeypatch, "config.json")
    if not has_room:
        refuse_to_replace(monkeypatch, "config.json.bak", errno.ENOSPC)
    with contextlib.nullcontext() if has_room else pytest.raises(OSError):
        config.change(lambda raw: raw.update(port=2))
    assert config.read() == {"port": 2 if has_room else 1}
    assert broken_files(config) == ([before] if before == b"{broken" else [])
    if has_room and not broken_files(config):
        assert json.load(open(config.backup)) == {"port": 1}


def test_changes_from_many_threads_are_all_kept(config):
    threads = [threading.Thread(target=config.change, args=[lambda raw, n=n: raw.update({n: n})])
               for n in map(str, range(8))]
    [thread.start() for thread in threads]
    [thread.join(WAIT_S) for thread in threads]
    assert config.read() == {n: n for n in map(str, range(8))}


@posix
@pytest.mark.parametrize("mode, said",
                         [(0o700, False), (0o755, False), (0o775, True), (0o777, True)])
def test_a_config_folder_that_others_may_write_is_named_at_the_start(tmp_path, mode, said):
    folder, lines = tmp_path / "c", tmp_path / "log"
    folder.mkdir()
    os.chmod(folder, mode)
    argv = ["--config-dir", str(folder), "--port", "0", "--no-browser"]
    process = subprocess.Popen([sys.executable, PROGRAM, *argv], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL,
                               env={**os.environ, "IFLOW2API_LOG_FILE": str(lines),
                                    "IFLOW2API_DETECT_LOCAL": "false"})
    process.stdout.readline()            # it listens
    process.terminate()
    process.communicate(timeout=WAIT_S)
    sentence = f"others may write the folder {folder}: run: chmod 700 {folder}"
    assert (sentence in lines.read_text()) is said


# --- secrets at rest ------------------------------------------------------------

KEY = bytes(range(32))
KNOWN_FILE = ("enc:v1:k.35ea7c0695ab.Nuz4z0sjy1b__eZpvG17P_NjDXF2ppx2JTrURdamCuJal6Q9"
              "Rc-aIPoKrkYyXO_ENqBM_ihVO64b1TckT__ZwytsWQ")
KNOWN_PHRASE = ("enc:v1:p1000-00112233445566778899aabbccddeeff.51608ea6573a.qsUkTjVQlo_"
                "HIU1L5z7f-XYYpFlnE2HCE_t4c8Y7Sme72EkC4p-7NBDyYhe52glA4NJh7ktmrMy9KQky5"
                "iGWDOtzOw")
PHRASE = {"IFLOW2API_PASSPHRASE": "correct horse"}


def test_known_answers_of_the_vault_and_no_byte_of_them_can_be_changed(tmp_path):
    """HMAC-SHA-256 in counter mode, nonce = MAC of the text; what was written has to stay readable.
    """
    (tmp_path / "secret.key").write_bytes(KEY)
    for known, environ in ((KNOWN_FILE, {}), (KNOWN_PHRASE, PHRASE)):
        vault = ifl.Vault(str(tmp_path), environ)
        assert vault.decrypt(known) == "sk-0123456789abcdef"
        assert vault.encrypt("sk-0123456789abcdef") == known     # salt and iterations are kept
        for at in range(len(known)):
            for wrong in (chr(ord(known[at]) ^ 1), "A" if known[at] != "A" else "B", ""):
                with pytest.raises(ifl.CannotDecrypt) as broken:
                    vault.decrypt(known[:at] + wrong + known[at + 1:])
                assert "sk-01" not in str(broken.value)


SECRETS = {"custom_api_key": "sk-client-key", "api_key": "sk-iflow-key",
           "upstream_proxy": "http://u:pw-proxy@h:1",
           "providers": [{"name": "p", "base_url": "http://x/v1",
                          "api_keys": ["sk-p-one", "$P_KEY", "$$dollar"], "api_key": "sk-typo",
                          "headers": {"X-Auth": "hdr-secret", "X-Plain": "plain"},
                          "proxy": "http://u:pw-secret@h:1"}],
           "accounts": {"work": {"apiKey": "sk-work", "oauth_access_token": "A-work",
                                 "oauth_refresh_token": "R-work", "email": "e"}},
           "foreign": {"api_keys": ["not ours"]}}
HIDDEN = ["sk-client-key", "sk-iflow-key", "pw-proxy", "sk-p-one", "$$dollar", "sk-typo",
          "hdr-secret", "pw-secret", "sk-work", "A-work", "R-work"]


def text_in(*paths):
    return "".join(open(path, encoding="utf-8").read() for path in paths)


@pytest.fixture
def quick(monkeypatch):
    """Passphrases and passwords of ten rounds."""
    monkeypatch.setattr(ifl.Vault, "DERIVE_S", 0.0)
    monkeypatch.setattr(ifl.Vault, "ITERATIONS", (10, 10))


@pytest.fixture
def secretive(home):
    made = ifl.ConfigFile(str(home / "c"), {})
    made.change(lambda raw: raw.update(SECRETS))
    return made


@pytest.mark.parametrize("is_written", [True, False])
def test_secrets_are_encrypted_in_the_file_and_its_backup_and_read_in_clear(home, is_written):
    """Whether the program wrote the file or its user."""
    config = ifl.ConfigFile(str(home / "c"), {})
    if is_written:
        config.change(lambda raw: raw.update(SECRETS))
    else:
        put_config(config, SECRETS)
    config.change(lambda raw: raw.update(port=1))
    assert config.read() == {**SECRETS, "port": 1} and config.unreadable == []
    for path in (config.path, config.backup):
        assert not [secret for secret in HIDDEN if secret in text_in(path)]
        assert all(text in text_in(path) for text in ("$P_KEY", "plain", "not ours", "http://x/v1"))
    assert os.name != "posix" or mode_of(config.vault.key_path) == 0o600


def test_what_is_shown_has_no_secret():
    """`$1…` is a key as it stands, since no variable can be called so."""
    secret = "$1very-secret-1234567890"
    more = {"name": "q", "api_keys": [secret], "headers": {"x-token": secret, "X-Odd": secret},
            "base_url": "http://u:pw-url@h/?key=in-query"}
    raw = {**SECRETS, "providers": [*SECRETS["providers"], more], "admin_password": "some-hash"}
    shown = json.dumps({name: ifl.hide_secrets(name, raw[name]) for name in raw},
                       ensure_ascii=False)
    for text in (*HIDDEN[:4], *HIDDEN[5:], secret, "pw-url", "in-query", "hash"):
        assert text not in shown, text
    assert '"$P_KEY"' in shown and '"http://u:…@h:1"' in shown


@pytest.mark.parametrize("is_mounted", [False, True])
def test_encrypt_off_and_on(secretive, monkeypatch, is_mounted):
    secretive.change(lambda raw: raw.update(port=1))
    if is_mounted:
        refuse_to_replace(monkeypatch, "config.json")
    assert secretive.encrypt(False) == []
    assert json.loads(text_in(secretive.path)) == {**SECRETS, "port": 1, "encrypt_secrets": False}
    assert "sk-p-one" in text_in(secretive.backup)
    secretive.change(lambda raw: raw.update(port=3))
    assert "sk-p-one" in text_in(secretive.path)
    assert secretive.encrypt(True) == [] and secretive.read() == {**SECRETS, "port": 3}
    assert "sk-p-one" not in text_in(secretive.path, secretive.backup)


def test_a_key_file_of_several_keys_decrypts_with_all_and_encrypts_with_the_first(secretive):
    """An earlier version could rotate keys."""
    path = pathlib.Path(secretive.vault.key_path)
    path.write_bytes(KEY + path.read_bytes())
    assert secretive.read() == SECRETS and secretive.unreadable == []
    secretive.change(lambda raw: raw.update(api_key="sk-another"))
    written = json.loads(text_in(secretive.path))["api_key"]
    path.write_bytes(KEY)
    assert secretive.vault.decrypt(written) == "sk-another"


def test_a_lost_key_is_named_and_nothing_is_overwritten(secretive):
    secretive.change(lambda raw: raw["providers"].append({"name": "q", "base_url": "http://y/v1"}))
    before = json.loads(text_in(secretive.path))
    os.unlink(secretive.vault.key_path)
    config = ifl.ConfigFile(secretive.folder, {})
    gateway = ifl.Gateway(config=config, environ={"P_KEY": "k"})
    problems = " ".join(gateway.problems)
    for words in ("custom_api_key", "providers[0].api_keys[0]", "secret.key"):
        assert words in problems
    router = gateway.state.router
    assert router.providers["p"].problem and not router.providers["q"].problem
    # a key is still wanted, of everybody
    assert gateway.settings.custom_api_key.startswith("enc:")
    assert gateway.ensure_client_key()[0].startswith("enc:")
    assert config.encrypt(True)
    config.change(lambda raw: raw.update(port=9))
    assert json.loads(text_in(secretive.path)) == {**before, "port": 9}
    assert not [s for s in HIDDEN if s in problems]


def test_a_damaged_value_is_named_and_the_rest_works(secretive):
    raw = json.loads(text_in(secretive.path))
    raw["api_key"] = raw["api_key"][:-1] + ("A" if raw["api_key"][-1] != "A" else "B")
    put_config(secretive, raw)
    gateway = ifl.Gateway(config=ifl.ConfigFile(secretive.folder, {}), environ={"P_KEY": "k"})
    assert [p for p in gateway.problems if "api_key can't be read" in p and "damaged" in p]
    assert gateway.settings.custom_api_key == "sk-client-key" and gateway.settings.api_key == ""
    assert gateway.state.router.providers["p"].api_keys == ("sk-p-one", "k", "$dollar")


def test_a_damaged_key_file_stops_no_other_change(secretive, caplog):
    path = pathlib.Path(secretive.vault.key_path)
    path.write_bytes(b"short")
    secretive.change(lambda raw: raw.update(port=7, custom_api_key="sk-new-one"))
    assert json.loads(text_in(secretive.path))["port"] == 7 and path.read_bytes() == b"short"
    assert "stay unencrypted" in caplog.text and "sk-new-one" not in caplog.text
    with pytest.raises(OSError):
        secretive.encrypt(True)


def test_a_passphrase_instead_of_a_key_file(home, quick):
    config = ifl.ConfigFile(str(home / "c"), PHRASE)
    config.change(lambda raw: raw.update(api_key="sk-iflow-key"))
    assert re.fullmatch(r"enc:v1:p10-[0-9a-f]{32}\.\w+\.\S+",
                        json.loads(text_in(config.path))["api_key"])
    assert not os.path.exists(config.vault.key_path)
    assert ifl.ConfigFile(config.folder, PHRASE).read()["api_key"] == "sk-iflow-key"
    for environ, word in (({}, "set IFLOW2API_PASSPHRASE"),
                          ({"IFLOW2API_PASSPHRASE": "wrong"}, "another passphrase")):
        other = ifl.ConfigFile(config.folder, environ)
        assert other.read()["api_key"].startswith("enc:") and word in other.unreadable[0]


def test_the_commands_of_encryption(home, capsys):
    path = home / ".iflow2api" / "config.json"
    for mode in ("on", "off"):
        assert ifl.main(["config", "encrypt", mode]) == 0
        assert "it holds none yet" in capsys.readouterr().err
    assert not (path.parent / "secret.key").exists()
    ifl.main(["config", "encrypt", "on"])
    assert ifl.main(["config", "set", "custom_api_key", "sk-a-client-key-0123"]) == 0
    assert "sk-a-client" not in text_in(path)
    capsys.readouterr()
    assert ifl.main(["config", "encrypt"]) == 0 and capsys.readouterr().out == "on\n"
    assert ifl.main(["config", "encrypt", "off"]) == 0 and "sk-a-client" in text_in(path)
    assert ifl.main(["config", "encrypt", "on"]) == 0 and "sk-a-client" not in text_in(path)
    for mode in ("maybe", "rotate"):
        assert ifl.main(["config", "encrypt", mode]) == 2
    assert "one of on, off expected" in capsys.readouterr().err
    ifl.main(["config", "list"])
    assert "sk-a-client" not in capsys.readouterr().out
    ifl.main(["config", "get", "custom_api_key", "--show-secrets"])
    assert capsys.readouterr().out == "sk-a-client-key-0123\n"


# --- providers ---------------------------------------------------------------

@pytest.mark.parametrize("url, clean, said", [
    ("http://host", "http://host/v1", ""), ("http://host/", "http://host/v1", ""),
    ("https://host:8443/api/v3/", "https://host:8443/api/v3", ""),
    ("https://host/v1/chat/completions", "https://host/v1", ""),
    ("  http://[::1]:8080/v1 ", "http://[::1]:8080/v1", ""),
    ("http://host/chat/completions", "http://host", ""),
    *[(url, "", said) for url, said in (
        ("", "base_url is missing"), (" ", "provider presets"),
        ("host:8080", "write http://host:8080"), ("ftp://host", "no http"), ("http://", "no http"),
        ("http://[", "Invalid IPv6"), ("http://host:99999", "no such port"),
        ("http://user:pw@host", "credentials"), ("http://host/v1?x=1", "credentials"),
        ("http://host/#x", "credentials"), ("http://ho st/", "blanks|no http"),
        ("http://host/\r\nX: y", "blanks|no http"))]])
def test_a_base_url_is_cleaned_or_what_is_wrong_is_said(url, clean, said):
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        assert ifl.clean_base_url(url) == clean


@pytest.mark.parametrize("key, environ, result", [
    ("literal", {}, "literal"), ("$KEY", {"KEY": "value"}, "value"),
    ("$KEY", {"KEY": " value\n"}, "value"), ("$$KEY", {"KEY": "value"}, "$KEY"), ("$$", {}, "$"),
    ("a$KEY", {"KEY": "value"}, "a$KEY"), ("$1a", {}, "$1a")])
def test_keys_and_headers_may_name_a_variable(key, environ, result):
    made = ifl.parse_provider({**provider("http://h"), "api_keys": [key], "headers": {"X-A": key}},
                              environ)
    assert (made.problem, made.api_keys, made.headers) == ("", (result,), (("X-A", result),))


@pytest.mark.parametrize("entry, said", [
    ({"api_keys": ["$NOT_THERE"]}, "NOT_THERE is not set"),
    ({"headers": {"A": "$NOT_THERE"}}, "NOT_THERE is not set"),
    ({"api_keys": ["$EMPTY"]}, "EMPTY is not set"), ({"api_keys": ["a b"]}, "blanks"),
    ({"api_keys": ["a\r\nX: y"]}, "line breaks"), ({"api_keys": [""]}, "empty"),
    ({"api_keys": [5]}, r"^api_keys\[0\]: a string expected$"),
    ({"api_keys": "k"}, "api_keys: a list expected$"),
    ({"headers": {"a b": "c"}}, "no header name"), ({"headers": {"a": "\u4e2d"}}, "characters"),
    ({"kind": "other"}, "kind"), ({"concurrency": -1}, "concurrency: a whole number from 0"),
    ({"concurrency": True}, "concurrency: a whole number"), ({"timeout_s": 0}, "timeout_s: a num"),
    ({"base_url": "nope"}, "no http"), ({"base_url": 5}, "base_url: a string expected"),
    ({"base_url": None}, "base_url is missing"),
    *[({"models": [bad]}, said) for bad, said in (
        (5, r"models\[0\]: a name or an object"), ("", "models"), ({}, "models"),
        ({"id": 1}, "models"), ({"id": "a", "max_output": "8k"}, r"models\[0\].max_output"),
        ({"id": "a", "vision": 1}, r"models\[0\].vision: true or false"),
        ({"id": "a", "context": True}, "models"), ({"id": "a", "context": -1}, "models"))]])
def test_a_provider_that_can_not_work_says_why(entry, said):
    made = ifl.parse_provider({**provider("http://h"), **entry}, {"EMPTY": ""})
    assert made.name == "up" and re.search(said, made.problem), made.problem
    router = ifl.Router(ifl.Settings(providers=[{**provider("http://h"), **entry}]), {"EMPTY": ""})
    assert router.warnings == [f"provider up is disabled: {made.problem}"]


@pytest.mark.parametrize("entry", [None, 5, {}, {"name": 5}, {"name": ""}, {"name": "a/b"},
                                   {"name": "a b"}, {"name": "a,b"}, provider("http://b", "ok")])
def test_an_entry_without_a_name_of_its_own_is_left_out_and_named(entry):
    router = ifl.Router(ifl.Settings(providers=[provider("http://h", "ok"), entry]), {})
    assert [known.base_url for known in router.providers.values()] == ["http://h/v1"]
    assert router.warnings[0].startswith("providers[1]: ")


def site_of(url):
    return ".".join(urllib.parse.urlsplit(url).hostname.split(".")[-2:])


@pytest.mark.parametrize("name", [name for name, row in ifl.PRESETS.items() if row.base_url])
def test_each_preset_is_a_provider(name):
    preset, is_local = ifl.PRESETS[name], name in ifl.LOCAL_ENGINES
    made = ifl.parse_provider({"name": name, "preset": name}, {})
    assert not made.problem and not made.warnings and made.facts == preset.models
    assert preset.roads and made.roads == list(preset.roads.values())
    assert all(url.startswith("http://127.0.0.1:" if is_local else "https://")
               for url in made.roads)
    assert bool(preset.key) is not is_local and len(made.models) <= 6
    assert all(facts["max_output"] <= facts["context"] for facts in made.facts.values())
    assert all(preset.titles) and set(preset.metered) <= set(ifl.PRESETS)
    assert not preset.key_page or site_of(preset.key_page) == site_of(made.roads[0])


def test_plans_come_first_and_what_is_known_of_models_reaches_the_profile():
    plans = [bool(preset.metered) for preset in ifl.PRESETS.values()]
    assert plans == sorted(plans, reverse=True) and any(plans)
    glm = ifl.parse_provider({"name": "z", "preset": "zai-coding"}, {})
    known = ifl.profile_of(ifl.Target(glm, "glm-5.3"))
    assert known["efforts"] == ["low", "high", "max"] and known["always_thinks"]
    assert (known["context"], known["max_output"], known["vision"]) == (1000000, 131072, False)
    assert ifl.profile_of(ifl.Target(glm, "glm-4.7"))["efforts"] == []
    assert ifl.profile_of(ifl.Target(glm, "glm-9"))["thinking_style"] == "thinking_type"


@pytest.mark.parametrize("on, effort, sent", [
    (None, None, {}), (False, None, {"reasoning_effort": "low"}),
    (True, None, {"thinking": {"type": "enabled"}}),
    (True, "xhigh", {"thinking": {"type": "enabled"}, "reasoning_effort": "high"})])
def test_a_model_that_always_thinks_gets_the_least_effort_instead_of_none(on, effort, sent):
    chat, known = {}, {"always_thinks": True, "efforts": ["low", "high", "max"]}
    ifl.set_thinking(chat, {**ifl.DEFAULT_PROFILE, **known}, on, None, effort)
    assert chat == sent


OWN = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize("entry, expected", [
    ({"preset": "deepseek"}, {"base_url": "https://api.deepseek.com/v1",
                              "messages_url": "https://api.deepseek.com/anthropic"}),
    ({"preset": "deepseek", "base_url": "https://api.deepseek.com/beta"},
     {"base_url": "https://api.deepseek.com/beta",
      "messages_url": "https://api.deepseek.com/anthropic"}),
    # a relay's key does not go to the maker
    ({"preset": "deepseek", "base_url": OWN}, {"base_url": OWN, "messages_url": ""}),
    ({"preset": "deepseek", "messages_url": ""}, {"messages_url": ""}),
    # an engine elsewhere may be another program
    ({"preset": "vllm", "base_url": "http://box:8000/v1"}, {"messages_url": ""}),
    ({"preset": "ollama"}, {"base_url": "http://127.0.0.1:11434/v1",
                            "messages_url": "http://127.0.0.1:11434",
                            "responses_url": "http://127.0.0.1:11434/v1"}),
    ({"preset": "deepseek", "models": ["deepseek-flash", "new"]},
     {"models": ("deepseek-flash", "new")}),
    ({"preset": "deepseek", "models": [{"id": "deepseek-flash", "context": 5}]},
     {"facts": {"deepseek-flash": {"context": 5, "max_output": 384000, "vision": True,
                                   "always_thinks": False, "efforts": ["low", "high", "max"]}}}),
    ({"preset": "nvidia", "headers": {"X-A": "b"}},
     {"headers": (("NVCF-POLL-SECONDS", "3600"), ("X-A", "b"))}),
    ({"preset": "nvidia", "headers": {"NVCF-POLL-SECONDS": "9"}},
     {"headers": (("NVCF-POLL-SECONDS", "9"),)}),
    ({"preset": None, "base_url": OWN}, {"models": ()}),
    ({"preset": "zhipo"}, {"problem": "preset: there is no 'zhipo'; did you mean zhipu?"}),
    ({"preset": "nothing"},
     {"problem": "preset: there is no 'nothing' (`provider presets` lists them)"}),
    ({"preset": []}, {"problem": "preset: a string expected"})])
def test_a_preset_fills_in_the_rest_of_a_provider(entry, expected):
    made = ifl.parse_provider({"name": "p", **entry}, {})
    problem = expected.pop("problem", "")
    assert made.problem.startswith(problem) and bool(made.problem) is bool(problem)
    assert {name: getattr(made, name) for name in expected} == expected


def test_a_profile_of_its_own_stands_above_the_preset_field_by_field():
    made = ifl.parse_provider({"name": "p", "preset": "zai", "profile": {"files": True}}, {})
    assert made.profile == {**ifl.PRESETS["zai"].profile, "files": True}


@pytest.mark.parametrize("preset, key, plan", [
    ("dashscope", "sk-sp-12345678", "dashscope-coding"), ("dashscope", "sk-12345678", ""),
    ("dashscope-intl", "sk-sp-12345678", "dashscope-coding-intl"),
    ("dashscope-coding", "sk-sp-12345678", ""), ("moonshot-cn", "sk-kimi-1234", "kimi-coding")])
def test_a_key_that_shows_its_plan_is_named_at_the_wrong_address(capsys, monkeypatch, preset, key,
                                                                 plan):
    monkeypatch.setenv("ITS_KEY", key)
    made = ifl.parse_provider({"name": "p", "preset": preset, "api_keys": ["$ITS_KEY"]},
                              {"ITS_KEY": key})
    said = [text for text in made.warnings if f"belongs to the preset {plan} " in text]
    assert not made.problem and len(said) == len(made.warnings) == bool(plan)
    assert key not in str(made.warnings)
    added = run_demo(capsys, "provider", "add", "p", "--preset", preset, "--api-key", "$ITS_KEY")
    assert added[0] == 0 and bool(plan) is (f"belongs to the preset {plan} " in added[2])


@pytest.mark.parametrize("profile, told", [
    ({"efforts": None}, "profile.efforts: a list expected; the default is used"),
    ({"efforts": [1]}, "profile.efforts[0]: a string expected, not 1; the default"),
    ({"thinking_style": "zzz"},
     'profile.thinking_style: one of "thinking_type", "enable_thinking", '),
    ({"vision": "no"}, 'profile.vision: true or false expected, not "no"; the default is used'),
    ({"vision": 1}, "profile.vision: true or false expected, not 1"),
    ({"max_output": True},
     "profile.max_output: a whole number from 0 to 1000000000 expected, not true"),
    ({"user_field": False}, "profile.user_field: a string expected, not false"),
    ({"visoin": True}, "profile.visoin is unknown; did you mean vision?"),
    ({"prefill": None, "reasoning_field": None, "server_tools": {"web_search": {}}}, ""),
    (ifl.DEFAULT_PROFILE, "")])
def test_what_makes_no_sense_in_a_profile_is_named(profile, told):
    entry = {**provider("http://h/v1"), "profile": {**profile, "top_k": True}}
    router = ifl.Router(ifl.Settings(providers=[entry]), {})
    assert [told in warning and warning.startswith("provider up: ")
            for warning in router.warnings] == ([True] if told else [])
    made = router.providers["up"]
    assert not made.problem and made.profile["top_k"] is True
    used = ifl.profile_of(ifl.Target(made, "m"))         # the default where the value made no sense
    assert used["efforts"] == ifl.DEFAULT_PROFILE["efforts"]
    assert used["thinking_style"] == "thinking_type"


def test_facts_of_models_reach_the_profile():
    entry = {**provider("http://h/v1"), "profile": {"vision": True, "top_k": True},
             "models": ["plain", {"id": "known", "context": 1000, "max_output": 100,
                                  "vision": False}]}
    made = ifl.parse_provider(entry, {})
    assert made.models == ("plain", "known") and made.facts["known"]["context"] == 1000
    known = ifl.profile_of(ifl.Target(made, "known"))
    assert (known["max_output"], known["vision"], known["top_k"]) == (100, False, True)
    plain = ifl.profile_of(ifl.Target(made, "plain"))
    assert "max_output" not in {**plain, **ifl.DEFAULT_PROFILE} and plain["vision"] is True


@pytest.mark.parametrize("given, base_url, first", [
    ("https://open.bigmodel.cn", "https://open.bigmodel.cn/api/paas/v4", "glm-5.3"),
    ("https://open.bigmodel.cn/api/coding/paas/v4", "https://open.bigmodel.cn/api/coding/paas/v4",
     "glm-5.3"),
    ("https://api.deepseek.com/", "https://api.deepseek.com/v1", "deepseek-flash"),
    ("https://api.deepseek.com/beta", "https://api.deepseek.com/beta", "deepseek-flash"),
    ("https://mine.example", "https://mine.example/v1", None), ("nonsense", "", None),
    ("http://[", "", None)])
def test_an_address_brings_the_facts_of_its_preset(given, base_url, first):
    made = ifl.parse_provider({"name": "p", **ifl.entry_at(given)}, {})
    assert made.base_url == base_url and next(iter(made.models), None) == first


# --- routes ------------------------------------------------------------------

def places(targets):
    return [f"{target.provider.name}/{target.model}" for target in targets]


ROUTED = ifl.Settings(
    providers=[provider("http://a", "a", models=["m1", "glm-5", "org/free"]),
               provider("http://b", "b", models=["m1", "m2", "own[1m]"]),
               provider("http://c", "org")],
    aliases={"fast": "b/m2", "chain": ["m2", "a/m1", "zzz"], "x-*": "m1", "x-1": "never",
             "[ab]1": "m2", "loop": "fast", "gpt-4o": ["a/x", "b/y"], "Case": "m2",
             "claude-3*": ["gpt-5", "b/o3"], "é": "b/ü:1/ß", "q[1m]": "b/one",
             "far*[[]1m]": "b/own[1m]", "far": "m2[1m]"},
    default_model="glm-5")


@pytest.mark.parametrize("model, foreign, targets", [
    # asked, by whom with names of their own, targets
    ("m1", False, "a/m1"), ("m2", False, "b/m2"), ("b/m1", False, "b/m1"),
    ("b/any/thing:free", False, "b/any/thing:free"), ("unknown", False, "a/unknown"),
    ("nobody/m1", False, "a/nobody/m1"), ("b/", False, "a/b/"), ("/m1", False, "a//m1"),
    ("b/模型:自由/x", False, "b/模型:自由/x"), ("é", False, "b/ü:1/ß"), ("q[1m]", False, "b/one"),
    ("fast", False, "b/m2"), ("chain", False, "b/m2 a/m1 a/zzz"), ("x-1", False, "a/m1"),
    ("x-", False, "a/m1"), ("X-1", False, "a/X-1"), ("case", False, "a/case"),
    ("Case", False, "b/m2"), ("a1", False, "b/m2"), ("loop", False, "a/fast"),
    ("org/free", False, "org/free"), (None, False, "a/glm-5"), ("", False, "a/glm-5"),
    ("claude-sonnet-4", False, "a/claude-sonnet-4"), ("claude-sonnet-4", True, "a/glm-5"),
    ("gpt-5", True, "a/glm-5"), ("codex-mini", True, "a/glm-5"), ("o3", True, "a/glm-5"),
    ("o4-mini", True, "a/glm-5"), ("o5", True, "a/o5"), ("gpt-4o", True, "a/x b/y"),
    ("b/gpt-5", True, "b/gpt-5"), ("Claude-x", True, "a/Claude-x"), (None, True, "a/glm-5"),
    # Claude Code's note to itself, and models that are called so
    ("m2[1m]", False, "b/m2"), ("m2[1M]", True, "b/m2"), ("b/m2[1m]", False, "b/m2"),
    ("any[1m]", False, "a/any"), ("b/any[1m]", False, "b/any"), ("claude-x[1m]", True, "a/glm-5"),
    ("fast[1m]", False, "b/m2"), ("chain[1m]", False, "b/m2 a/m1 a/zzz"),
    ("x-5[1m]", False, "a/m1"),
    ("gpt-4o[1m]", True, "a/x b/y"), ("own[1m]", False, "b/own[1m]"), ("own", False, "a/own"),
    ("b/own[1m]", True, "b/own[1m]"), ("far", False, "b/m2"), ("far[1m]", False, "b/own[1m]"),
    ("q", False, "a/q"), ("[1m]", False, "a/[1m]"), ("m[2m]", False, "a/m[2m]"),
    ("claude-3-opus", True, "a/gpt-5 b/o3")])            # an alias' targets are taken as they are
def test_where_a_name_leads(model, foreign, targets):
    told = []
    asked = ifl.Asked("messages" if foreign else "chat")
    assert places(ifl.Router(ROUTED, {}).resolve(model, asked, told)) == targets.split()
    assert all(ifl.explain_steps(told, True)) and len(told) > len(targets.split()) - 1


@pytest.mark.parametrize("settings, model, target", [
    ({"default_provider": "b"}, "unknown", "b/unknown"), ({"default_provider": "b"}, None, "b/m2"),
    ({"default_provider": "gone"}, "unknown", "a/unknown"), ({}, None, "a/m1"),
    ({"default_model": "b/m9"}, None, "b/m9"), ({"default_model": "m2"}, None, "b/m2"),
    ({"aliases": {"d": "b/m9"}, "default_model": "d"}, None, "b/m9")])
def test_defaults(settings, model, target):
    providers = [provider("http://a", "a", models=["m1"]), provider("http://b", "b", models=["m2"])]
    router = ifl.Router(ifl.Settings(providers=providers, **settings), {})
    assert places(router.resolve(model)) == [target]
    assert bool(router.warnings) == (settings.get("default_provider") == "gone")


def test_without_a_default_model_or_any_provider():
    router = ifl.Router(ifl.Settings(providers=[provider("http://a")]), {})
    assert places(router.resolve("claude-x", ifl.Asked("messages"))) == ["up/claude-x"]
    with pytest.raises(ifl.BadRequest) as missing:
        router.resolve(None)
    assert missing.value.param == "model"
    with pytest.raises(ifl.NotLoggedIn, match="--upstream"):
        ifl.Router(ifl.Settings(), {}).resolve("m1")


@pytest.mark.parametrize("targets", [5, [], [5], [""], None, {}, {"images": True}])
def test_a_bad_alias_is_named_and_left_out(targets):
    router = ifl.Router(ifl.Settings(providers=[provider("http://a")],
                                     aliases={"x": targets, "y": "z"}), {})
    assert router.warnings[0].startswith("alias 'x': a model or a list of models expected")
    assert router.resolve("x")[0].model == "x" and router.resolve("y")[0].model == "z"


# --- time is linear ----------------------------------------------------------

def many(use, *more, times=4):
    """What uses an input several times: a larger one would not fit into the caches."""
    def used(text):
        for _ in range(times):
            with contextlib.suppress(ValueError, ifl.LoginFailed, ifl.GatewayError):
                use(text, *more)
    return used


NO_FLOW = ifl.LoginFlow.__new__(ifl.LoginFlow)
NO_FLOW._redirect_uri, NO_FLOW._secret = "http://localhost", "s"
DEAD = {"name": "p", "base_url": "http://h"}

#: what, n, maker of an input of size n, its use
GROWTH_OF_SETTINGS = [
    ("a text full of ://", 10_000, lambda n: "://a" * n, many(ifl.redact)),
    ("users without an end", 10_000, lambda n: "://a:" + "b:" * n + "@", many(ifl.redact)),
    ("keys without a value", 5_000, lambda n: "api_key=: " * n + "sk-" * n, many(ifl.redact)),
    ("bearers and blanks", 2_500, lambda n: "bearer " + " " * n + "bearer\t" * n,
     many(ifl.redact, times=5)),
    ("control characters", 2_500, lambda n: "a\0\n" * n, many(ifl.one_line)),
    ("a mistyped name", 5_000, lambda n: "ab" * n,
     many(ifl.nearest, ["glm-5", "ab" * 40], times=40)),
    ("an address", 10_000, lambda n: "1." * n, many(ifl.parse_address)),
    ("an address in brackets", 10_000, lambda n: "[" + ":" * n, many(ifl.parse_address)),
    ("a network of many bits", 10_000, lambda n: "10.0.0.0/" + "9" * n,
     many(ifl.parse_network, times=100)),
    ("forwarded by many", 4_000, lambda n: "10.0.0.1," * n,
     lambda text: ifl.client_address("10.0.0.1", text, ["10.0.0.0/8"])),
    ("forwarded commas", 100_000, lambda n: "," * n,
     lambda text: ifl.client_address("10.0.0.1", text, ["10.0.0.0/8"])),
    ("a base URL of slashes", 50_000, lambda n: "http://h" + "/" * n, many(ifl.clean_base_url)),
    ("a base URL without scheme", 5_000, lambda n: "a:" * n, many(ifl.clean_base_url)),
    ("another address", 50_000, lambda n: "http://" + "a@" * n,
     many(ifl.leads_elsewhere, "http://b:80")),
    ("a pattern of stars", 50_000, lambda n: "a" * n, many(ifl.fits, "*a*a*a*b")),
    ("a damaged secret", 50_000, lambda n: "enc:v1:" + "k" * n + "." + "." * n,
     many(ifl.Vault("/nonexistent", {}).decrypt)),
    ("a key in a header", 100_000, lambda n: "k" * n, many(ifl.hashes_of_header)),
    ("a password's hash", 100_000, lambda n: "pbkdf2-sha256$" + "1" * n,
     many(lambda text: ifl.is_password("x", text))),
    ("a provider's headers", 4_000,
     lambda n: {**DEAD, "headers": {f"X-{at}": "v" for at in range(n)}},
     lambda entry: ifl.parse_provider(entry, {})),
    ("a provider's models", 4_000, lambda n: {**DEAD, "models": [f"m{at}" for at in range(n)]},
     lambda entry: ifl.parse_provider(entry, {})),
    ("client keys", 400, lambda n: [{"name": f"k{at}", "sha256": "0" * 64} for at in range(n)],
     ifl.parse_client_keys),
    ("a pasted text", 10_000, lambda n: "/oauth2callbac" * n,
     many(lambda text: ifl.LoginFlow.paste(NO_FLOW, text), times=5)),
    ("a pasted query", 5_000, lambda n: "a=b&" * n, lambda text: NO_FLOW._pasted("?" + text)),
    ("a callback's code", 50_000, lambda n: {"code": ["c" * n]},
     many(lambda query: NO_FLOW._code(query, True))),
    ("a date of blanks", 100_000, lambda n: " " * n + "z" * n, many(ifl.parse_time)),
]


@pytest.mark.parametrize("size, make, use", [row[1:] for row in GROWTH_OF_SETTINGS],
                         ids=[row[0] for row in GROWTH_OF_SETTINGS])
def test_settings_and_logins_take_linear_time(size, make, use):
    check_growth(size, make, use)


# === 7. Chat and SSE =========================================================

# --- requests ----------------------------------------------------------------

def test_parse_body_returns_the_object_and_its_text():
    assert ifl.decode_body(b'\xef\xbb\xbf {"a": 1.0}\n') == ' {"a": 1.0}\n'
    assert ifl.parse_body(' {"a": 1.0}\n') == {"a": 1.0}


BAD_BODIES = [
    ("empty", b"", "line 1, column 1"), ("cut", b'{"a": ', "line 1, column 7"),
    ("two", b"{} {}", "line 1, column 4"),
    ("list", b"[]", "object"), ("null", b"null", "object"), ("text", b'"{}"', "object"),
    ("number", b"5", "object"),
    ("nan", b'{"a": NaN}', "NaN"), ("infinity", b'{"a": -Infinity}', "Infinity"),
    ("latin-1", b'{"a": "\xe9"}', "0xe9"),
    ("bom and latin-1", b'\xef\xbb\xbf{"a": "\xe9"}', "0xe9"),
    ("cut utf-8", b'{"a": "\xe4\xb8"}', "UTF-8"),
    ("surrogate bytes", b'{"a": "\xed\xa0\x80"}', "UTF-8"), ("control", b'{"a": "\n"}', "line 1"),
    ("quotes", b"{'a': 1}", "line 1"),
    ("comment", b"{} // no", "line 1"), ("trailing comma", b'{"a": 1,}', "line 1"),
    ("utf-16", '{"a": 1}'.encode("utf-16"), "UTF-8"),
    ("digits", b'{"a": ' + b"1" * 100_000 + b"}", None),
    ("deep", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
                                                          "nested"),
    ("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested"),
    ("only opening", b"[" * 100_000, "nested|JSON|object")]


@pytest.mark.parametrize("data, said", [row[1:] for row in BAD_BODIES],
                         ids=[row[0] for row in BAD_BODIES])
def test_a_body_that_is_no_json_object_is_refused(data, said):
    if said is None and sys.version_info < (3, 11):
        return                                            # older Pythons read numbers of any length
    with pytest.raises(ifl.BadRequest) as refused:
        ifl.parse_body(ifl.decode_body(data))
    assert refused.value.status == 400
    assert re.search(said or "", refused.value.message), refused.value.message
    assert len(refused.value.message) < 400


def test_a_thousand_levels_are_passed_on_or_refused():
    for levels in (500, 900, 1000, 1100, 5000):
        with contextlib.suppress(ifl.BadRequest):
            assert ifl.parse_body('{"a":' + "[" * levels + "]" * levels + "}")["a"] is not None


WRITTEN = ['{"a":[{"b":[1,2]},"x",3, 4.0,true ,null],"c":{"d":[]},"e":[]}',
           ' { "a" : [ {"b":[1,2]} , "x" ,\n3,4.0 ] , "m":"\\u4e2d" }\n',
           '{"a":[{"b":[1,2,3]},"xy",33,40.0,true],"a":[1]}', "{}", '{"a":[1],"c":[[],[[1]],{}]}']


@pytest.mark.parametrize("before", WRITTEN)
def test_what_is_remembered_of_a_request_changes_nothing(before):
    for text in WRITTEN:
        known = ifl.Remembered()
        assert repr(ifl.parse_body(before, known)) == repr(json.loads(before)), "at first"
        assert repr(ifl.parse_body(text, known)) == repr(json.loads(text)), "then"


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_remembered_finds_the_same_faults(text):
    """Each place cut off, doubled, or with a mark too many."""
    for at in range(len(text) + 1):
        for wrong in (text[:at], text[:at] + text[at - 1:],
                      *(text[:at] + mark + text[at:] for mark in ',]}"1:')):
            known = ifl.Remembered()
            known.parse(text)
            try:
                right = repr(ifl.parse_body(wrong))
            except ifl.BadRequest as exc:
                with pytest.raises(ifl.BadRequest, match=re.escape(exc.message)):
                    ifl.parse_body(wrong, known)
                with pytest.raises((ValueError, IndexError)):
                    known.parse(wrong)
            else:
                assert repr(ifl.parse_body(wrong, known)) == right


def test_items_in_their_place_are_parsed_once():
    known, text = ifl.Remembered(), '{"messages":[{"a":1},{"b":2}],"model":"m"}'
    first, second = known.parse(text), known.parse(text.replace('{"b":2}', '{"b":2},{"c":3}'))
    assert second["messages"][2] == {"c": 3}
    assert all(new is old for new, old in zip(second["messages"], first["messages"]))
    third = known.parse('{"messages":[{"a":1},{"b":22}],"model":"m","input":[1,2,3]}')
    # a hundred thousand numbers are not looked at one by one
    assert list(known.lists) == ["messages"]
    assert third["messages"][0] is first["messages"][0] and third["messages"][1] == {"b": 22}


def test_only_what_talks_is_remembered(server, upstream):
    running = server(upstream)
    long = "word " * 2000
    for path, body in (("/v1/embeddings", {"model": "m1", "input": [long]}),
                       ("/v1/completions", {"model": "m1", "prompt": long})):
        post(running, body, path=path)
        assert not running.gateway.conversations._kept
    post(running, chat(pad=long))
    assert len(running.gateway.conversations._kept) == 1


def test_conversations_are_bounded_and_told_apart(monkeypatch):
    monkeypatch.setattr(ifl.Conversations, "LIMIT_SIZE", 30_000)
    kept, text = ifl.Conversations(), "a" * 9000
    assert kept.of("a" * 7999, []) is None is kept.of("a" * 30_001, [])
    known = kept.of(text, ["s"])
    assert kept.of(text + "b", ["s"]) is known
    assert kept.of(text, ["t"]) is not known is not kept.of("b" + text, ["s"])
    assert kept.of(text, ["s"]) is known
    kept.of(text, ["u"])                                  # the oldest but this goes
    assert kept.of(text, ["s"]) is known and len(kept._kept) == 3 and kept._size == 27_001


SPLICES = [
    ('{"model":"a","b":1}', '{"model":"NEW","b":1}'),
    ('{ "b" : 1.0 , "model" :  "a" }', '{ "b" : 1.0 , "model" :  "NEW" }'),
    ('{"b":{"model":"x","model":"y"},"model":"a"}',
     '{"b":{"model":"x","model":"y"},"model":"NEW"}'),
    ('{"model":{"model":"x"},"c":[{"model":1}]}', '{"model":"NEW","c":[{"model":1}]}'),
    ('{"model":"a","x":"\\"model\\":\\"q\\"","model":"b"}',
     '{"model":"NEW","x":"\\"model\\":\\"q\\"","model":"NEW"}'),
    ('{"model":null}', '{"model":"NEW"}'), ('{"model":"a\\"}b{"}', '{"model":"NEW"}'),
    ('{"m\\u006fdel":"a"}', '{"m\\u006fdel":"NEW"}'),
    ('{"x":{"model":"y"},"m\\u006fdel":"a"}', '{"x":{"model":"y"},"m\\u006fdel":"NEW"}'),
    ('{"x":"\\"model","model":"a"}', '{"x":"\\"model","model":"NEW"}'),
    ('{"x":{"model":"y"}}', '{"model":"NEW","x":{"model":"y"}}'),
    ('{"b":"中文😀\\ud83d","model":"模型","n":12345678901234567890,"f":1e5,"g":1.00}',
     '{"b":"中文😀\\ud83d","model":"NEW","n":12345678901234567890,"f":1e5,"g":1.00}'),
    ('{}', '{"model":"NEW"}'), ('{ }', '{"model":"NEW" }'),
    ('{"b":null}', '{"model":"NEW","b":null}'),
    (' \n\t{\n\t"b": [1, 2],\r\n "model" : "a"\n}\n',
     ' \n\t{\n\t"b": [1, 2],\r\n "model" : "NEW"\n}\n'),
    ('{"Model":"x","b":true}', '{"model":"NEW","Model":"x","b":true}'),
    ('{"":{"model":"x"},"model":"a"}', '{"":{"model":"x"},"model":"NEW"}')]


@pytest.mark.parametrize("text, spliced", SPLICES)
def test_splice_model_changes_nothing_else(text, spliced):
    assert ifl.splice_model(text, json.loads(text), "NEW") == spliced
    spliced = ifl.splice_model(text, json.loads(text), 'q"\\中')
    assert json.loads(spliced) == {**json.loads(text), "model": 'q"\\中'}


@pytest.mark.parametrize("model", ["a", "模型", 'q"\\', "a/b:c", "\ud83d"])
def test_splice_model_writes_any_name(model):
    assert json.loads(ifl.splice_model('{"model":"x","b":1}', {"model": "x"},
                                       model)) == {"model": model, "b": 1}


# --- numbers -----------------------------------------------------------------

@pytest.mark.parametrize("raw, usage", [
    (None, ifl.Usage()), ({}, ifl.Usage()), ([], ifl.Usage()),
    ({"prompt_tokens": "5", "completion_tokens": -1}, ifl.Usage()),
    ({"prompt_tokens": 5, "completion_tokens": 2.0}, ifl.Usage(5, 2)),
    ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
     ifl.Usage(5, 2, 4)),
    ({"prompt_tokens": 5, "prompt_cache_hit_tokens": 3}, ifl.Usage(5, 0, 3)),
    ({"prompt_tokens": 5, "cached_tokens": 3}, ifl.Usage(5, 0, 3)),
    ({"prompt_tokens": 5, "completion_tokens": 2,
      "completion_tokens_details": {"reasoning_tokens": 1}},
     ifl.Usage(5, 2, 0, 0, 1)),
    ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 10,
      "completion_tokens_details": {"reasoning_tokens": 3}},
     ifl.Usage(5, 5, 0, 0, 3)),
    ({"prompt_tokens": 5, "prompt_tokens_details": None, "completion_tokens_details": "x"},
     ifl.Usage(5))])
def test_usage_in_every_spelling(raw, usage):
    assert ifl.parse_usage(raw) == usage


def test_usage_of_a_chunk():
    assert ifl.usage_of(usage_chunk()) == USAGE
    assert ifl.usage_of({"choices": [{"usage": USAGE}], "usage": None}) == USAGE
    assert ifl.usage_of(chunk("x")) is None and ifl.usage_of({"usage": {}}) is None


def test_dump_json():
    assert ifl.dump_json({"a": "中", "b": 1.0}) == '{"a":"中","b":1.0}'.encode()
    assert ifl.dump_json({"a": "\ud83d"}) == b'{"a":"\\ud83d"}'
    with pytest.raises(ValueError):
        ifl.dump_json(float("nan"))


@pytest.mark.parametrize("text, low, high", [
    ("", 0, 0), ("hello world", 2, 5), ("\u4f60\u597d\u4e16\u754c", 2, 4)])
def test_estimate_tokens(text, low, high):
    assert low <= ifl.estimate_tokens(text) <= high


# --- answers -----------------------------------------------------------------


@pytest.mark.parametrize("item, answer", [
    (ROLE, False), (chunk("x"), True), (chunk("\n"), True), (chunk(reasoning_content="r"), True),
    (chunk(reasoning="r"), True), (chunk(tool_calls=[{"index": 0}]), True), (completion(), True),
    (chunk("", tool_calls=[]), False), (chunk(None, refusal=None), False), (usage_chunk(), True),
    (chunk(refusal="no"), True), (chunk(audio={"data": "x"}), True),
    (chunk(surprise={"a": 1}), True), (chunk(finish="stop"), False), (chunk(finish="length"), True),
    (chunk(finish="sensitive"), True), (chunk(finish="content_filter"), True),
    (chunk(finish="stop", usage=USAGE), True),
    (chunk(usage={"prompt_tokens": 3, "completion_tokens": 0}), False), ({}, False),
    *(({"choices": choices}, False)
      for choices in ([], None, [None, 5], [{"text": ""}], [{"delta": None}], [{"delta": "x"}])),
    ({"choices": [{"text": "x"}]}, True),
    ({"choices": [{"delta": {}}, {"delta": {"content": "x"}}]}, True)])
def test_what_is_an_answer(item, answer):
    assert ifl.is_answer(item) is answer


def test_a_plain_answer_as_a_stream():
    calls = [call("c1", "f"), {"id": "c2"}]
    answer = completion("Hi", "tool_calls", tool_calls=calls)
    first, last = records_of(ifl.completion_to_sse(answer))
    assert last == DONE and first["object"] == "chat.completion.chunk" and first["usage"] == USAGE
    choice = first["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and "message" not in choice
    assert choice["delta"]["content"] == "Hi"
    assert [call["index"] for call in choice["delta"]["tool_calls"]] == [0, 1]


@pytest.mark.parametrize(
    "odd",
    [{}, {"choices": None}, {"choices": [{"message": None}]}, {"choices": [None]}, {"choices": 5}])
def test_an_odd_answer_as_a_stream(odd):
    assert records_of(ifl.completion_to_sse(odd))[-1] == DONE
    assert ifl.ReasoningMerge(True).whole(odd) is odd


ODD = [5, 0.5, "x", [1], {"a": 1}, True]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "field",
    ["choices", "index", "finish_reason", "delta", "message", "content", "call index", "function"])
def test_a_stream_with_a_value_of_the_wrong_type_is_still_read(field, odd):
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    if field == "function":
        call["function"].update(self=odd, index=odd, ident=odd)
    elif field == "call index":
        call["index"] = odd
    choice = {"index": 0, "delta": {"content": "a", "tool_calls": [call]}}
    if field == "content":
        choice["delta"]["content"] = odd
    elif field != "choices":
        choice[field] = odd
    chunks = [{"choices": odd if field == "choices" else [choice]}, {"choices": [choice]},
              chunk("b"), chunk(finish="stop")]
    data = b"".join(map(ifl.encode_chunk, [*chunks, "[DONE]"]))
    folded = ifl.fold_stream(data)["choices"]
    assert any(choice["message"]["content"][-1] == "b" for choice in folded)
    stream = translation_of(preserve_reasoning_content=True)
    assert (stream.feed(data) + stream.close()).count(b'"b"') == 1


def test_a_folded_stream_ends_as_its_calls_do():
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    ends = [chunk(finish="tool_calls", tool_calls=[call]), chunk(finish="stop"), DONE]
    assert ifl.fold_stream(wire_of(ends))["choices"][0]["finish_reason"] == "tool_calls"


def test_a_folded_stream_joins_lists_as_well():
    parts = [[{"type": "text", "text": letter}] for letter in "ab"]
    data = wire_of([*map(chunk, parts), chunk(finish="stop"), DONE])
    assert ifl.fold_stream(data)["choices"][0]["message"]["content"] == parts[0] + parts[1]


# --- refusals ----------------------------------------------------------------

REFUSALS = [
    # id, status, body, what became of it: (status, message, type, code)
    ("openai", 400, {"error": {"message": "bad", "type": "t", "code": "c",
                               "param": "p"}}, (400, "bad", "t", "c")),
    ("openai in a 200", 200, {"error": {"message": "bad",
                                        "code": "429"}}, (429, "bad", "rate_limit_error", "429")),
    ("number", 200, {"error": {"message": "bad",
                               "code": 404}}, (404, "bad", "invalid_request_error", None)),
    ("odd number", 200, {"error": {"message": "bad",
                                   "code": 1302}}, (502, "bad", "server_error", None)),
    ("text", 200, {"error": "bad"}, (502, "bad", "server_error", None)),
    ("true", 200, {"error": True}, (502, None, "server_error", None)),
    ("list", 200, {"error": ["bad"]}, (502, None, "server_error", None)),
    ("object message", 400, {"error": {"message": {"a": 1}}}, (400, '{"a": 1}', None, None)),
    ("vllm", 200, {"object": "error", "message": "bad", "type": "BadRequestError",
                   "code": 400}, (400, "bad", "BadRequestError", None)),
    ("vllm text code", 404, {"object": "error", "message": "bad", "code": "not_found"},
     (404, "bad", "invalid_request_error", "not_found")),
    ("fastapi", 422, {"detail": "bad"}, (422, "bad", "invalid_request_error", None)),
    ("fastapi list", 422, {"detail": [{"loc": ["x"], "msg": "bad"}]},
     (422, '[{"loc": ["x"], "msg": "bad"}]', "invalid_request_error", None)),
    ("code and message", 500, {"code": "x1", "message": "bad"}, (500, "bad", "server_error", "x1")),
    ("msg", 500, {"msg": "bad", "code": 5}, (500, "bad", "server_error", None)),
    ("empty object", 500, {}, (500, "{}", "server_error", None)),
    ("superscript", 200, {"error": {"message": "bad",
                                    "code": "²"}}, (502, "bad", "server_error", "²")),
    ("superscript status", 500, {"status": "²", "msg": "bad"}, (500, "bad", "server_error", None)),
    ("long status", 500, {"status": "9" * 5000, "msg": "bad"}, (500, "bad", "server_error", None)),
    ("long code", 200, {"error": {"message": "bad",
                                  "code": "9" * 5000}}, (502, "bad", "server_error", "9" * 5000)),
    ("arabic digits", 200, {"error": {"message": "bad",
                                      "code": "٤٢٩"}}, (502, "bad", "server_error", "٤٢٩"))]


@pytest.mark.parametrize("status, body, wanted", [row[1:] for row in REFUSALS], ids=[
    row[0] for row in REFUSALS])
def test_errors_of_every_shape(status, body, wanted):
    found = ifl.refusal_in(body, status)
    got = (found.status, found.message, found.type, found.code)
    assert all(want in (None, have) for want, have in zip(wanted[:3], got)), got
    assert got[3] == wanted[3]
    assert found.message and (found.body == body) == isinstance(body.get("error"), dict)


@pytest.mark.parametrize("body", [
    completion(), {"error": None, "choices": []}, {"error": ""}, {"error": {}}, [], None, "x", 5, {
        "message": "x", "code": 5}])
def test_what_is_no_error(body):
    assert ifl.refusal_in(body) is None


@pytest.mark.parametrize("content_type, data, said", [
    ("text/html", b"<html><head><title>502 Bad\nGateway</title></head><body>x</body>",
     "the upstream answered 502: 502 Bad Gateway"),
    ("text/html", b"<h1>Sorry <b>now</b></h1>", "the upstream answered 502: Sorry now"),
    ("", b" <p>x</p>", "an HTML page"),
    ("text/plain", b"upstream  is\r\naway", "the upstream answered 502: upstream is away"),
    ("", b"", "Bad Gateway"), ("application/json", b"{", "the upstream answered 502: {"),
    ("", b"\xff\xfe", "502"), ("application/json", b"[1]", "[1]"),
    ("application/json", b'{"a":' * 100_000, "502"),
    ("application/json", b'{"error":{"message":"NaN","x":NaN}}', "NaN")])
def test_error_pages_of_every_kind(content_type, data, said):
    found = ifl.parse_refusal(502, content_type, data)
    assert found.status == 502 and said in found.message and len(found.message) < 400


@pytest.mark.parametrize("headers, seconds",
                         [({}, None), ({"Retry-After": "7"}, 7), ({"Retry-After": " 1.5 "}, 1.5),
                          ({"Retry-After": "-5"}, None), ({"Retry-After": "soon"}, None),
                          ({"Retry-After": "Thu, 01 Jan 1970 00:20:00 GMT"}, 200),
                          ({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
                          ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25),
                          ({"retry-after-ms": "x", "Retry-After": "9"}, 9),
                          ({"Retry-After": "9" * 50}, None),
                          ({"Retry-After": "Thu, 99 Jan 1970 00:00:00 GMT"}, None)])
def test_retry_after_in_every_spelling(headers, seconds):
    message = http.client.HTTPMessage()
    for name, value in headers.items():
        message[name] = value
    assert ifl.parse_retry_after(message, 1000.0) == seconds


# --- streams -----------------------------------------------------------------

def cuts(data: bytes):
    """`data` whole, byte by byte, and in two at each place."""
    yield [data]
    yield [data[at:at + 1] for at in range(len(data))]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]


SSE_TEXTS = [
    # id, bytes, data of the records
    ("plain", b'data: {"a":1}\n\ndata: [DONE]\n\n', [b'{"a":1}', b"[DONE]"]),
    ("no blank", b"data:1\n\ndata:2\n\n", [b"1", b"2"]),
    ("crlf", b"data: 1\r\n\r\ndata: 2\r\n\r\n", [b"1", b"2"]),
    ("mixed ends", b"data: 1\r\n\ndata: 2\n\r\n", [b"1", b"2"]),
    ("comments", b": hi\n\n:\n\ndata: 1\n: mid\n\n: end\n\n", [b"1"]),
    ("lines", b"data: a\ndata: b\n\n", [b"a\nb"]),
    ("fields", b"event: x\nid: 5\nretry: 9\ndata: 1\n\nevent: y\n\n", [b"1"]),
    ("bom", b"\xef\xbb\xbfdata: 1\n\n", [b"1"]),
    ("more blank lines", b"\n\n\ndata: 1\n\n\n\n\ndata: 2\n\n", [b"1", b"2"]),
    ("unicode", "data: 中😀\n\n".encode(), ["中😀".encode()]),
    ("empty data", b"data:\n\ndata: 1\n\n", [b"", b"1"]),
    ("no data", b"", [])]


@pytest.mark.parametrize("data, records", [row[1:] for row in SSE_TEXTS], ids=[
    row[0] for row in SSE_TEXTS])
def test_records_come_whole_however_the_bytes_are_cut(data, records):
    for pieces in cuts(data):
        decoder = ifl.SSEDecoder()
        found = [data for piece in pieces for data in decoder.feed(piece)] + decoder.close()
        assert found == records, pieces


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_last_record_may_lack_its_blank_line(end):
    decoder = ifl.SSEDecoder()
    assert decoder.feed(b"data: 1\n\ndata: 2" + end) + decoder.close() == [b"1", b"2"]


@pytest.mark.parametrize("dialect", ["chat", "messages"])
def test_records_without_blank_lines_go_out_as_they_come(dialect):
    """Only the first of them waits: what follows it shows that it is whole."""
    asked = {"model": "m1", "stream": True, "max_tokens": 9, "messages": MESSAGES}
    stream = translation_of(call_of(asked, dialect=ifl.MESSAGES) if dialect == "messages" else None)
    lines = [b"data: " + json.dumps(chunk(text)).encode() + b"\n" for text in "abc"]
    assert stream.feed(lines[0]) == b"" and b'"b"' in stream.feed(lines[1])
    assert b'"c"' in stream.feed(lines[2]) and not stream.done
    stream.feed(b"data: [DONE]\n")
    assert stream.done and stream.close() is not None


@pytest.mark.parametrize("data", [b"{", b"nonsense", b"\xff", b'{"a":' * 100_000, b'{"a": NaN}'])
def test_a_record_that_is_no_json(data):
    with pytest.raises(ifl.UpstreamGarbled):
        list(ifl.read_records([data]))


def delta(finish=None, **fields):
    """A chat chunk as streams of answers have it."""
    return {"created": 1, "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def tool(index=None, ident=None, name=None, arguments=None):
    function = {key: value for key, value in (("name", name), ("arguments", arguments))
                if value is not None}
    return {key: value for key, value in (("index", index), ("id", ident), ("function", function))
            if value is not None}


def tools(*items, finish=None):
    return delta(finish, tool_calls=list(items))


#: Streams as providers send them, all whole answers: id, records, finish_reason, usage, text.
RELAYED = [
    ("text", HELLO, "stop", USAGE, "Hello"),
    ("usage on the last chunk", [ROLE, chunk("Hi"),
                                 chunk(finish="stop", usage=USAGE), DONE], "stop", USAGE, "Hi"),
    ("usage in every chunk", [
        chunk("H", usage={"completion_tokens": 1}),
        chunk("i", usage=USAGE),
        chunk(finish="stop", usage=USAGE), DONE], "stop", USAGE, "Hi"),
    ("usage in the choice", [
        chunk("Hi"), {
            "choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": USAGE}]},
        DONE], "stop", USAGE, "Hi"),
    ("no usage", [ROLE, chunk("Hi"), chunk(finish="stop"), DONE], "stop", None, "Hi"),
    ("null usage", [{**chunk("Hi"), "usage": None}, {**chunk(finish="stop"), "usage": None},
                    DONE], "stop", None, "Hi"),
    ("reasoning", [
        ROLE,
        chunk(reasoning_content="Let"),
        chunk(reasoning_content=" me"),
        chunk("42"),
        chunk(finish="stop"), DONE], "stop", None, "42"),
    ("tools", [
        ROLE,
        chunk(None, tool_calls=[tool(0, "c1", "f", "")]),
        chunk(tool_calls=[tool(0, arguments='{"a"')]),
        chunk(tool_calls=[tool(0, arguments=':"\\"error\\": 1"}')]),
        chunk(tool_calls=[tool(1, "c2", "g", "{}")]),
        chunk(finish="tool_calls"),
        usage_chunk(), DONE], "tool_calls", USAGE, ""),
    ("whole call", [
        chunk(tool_calls=[{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
              finish="tool_calls"), DONE], "tool_calls", None, ""),
    ("utf-8", [
        ROLE,
        chunk("中文"),
        chunk("😀é"),
        chunk("\u2028"),
        chunk(finish="stop"),
        usage_chunk(), DONE], "stop", USAGE, "中文😀é\u2028"),
    ("length", [ROLE, chunk(finish="length"), DONE], "length", None, ""),
    ("filter", [ROLE, chunk(finish="content_filter"), DONE], "content_filter", None, ""),
    ("unknown finish", [chunk("x"), chunk(finish="weird"), DONE], "weird", None, "x"),
    ("no finish", [chunk("x"), DONE], None, None, "x"),
    ("two choices", [
        chunk("x"), {"choices": [{"index": 1, "delta": {"content": "y"}}]},
        chunk(finish="stop"), DONE], "stop", None, "xy"),
    ("empty deltas", [{"choices": []}, ROLE,
                      chunk(None),
                      chunk("x"),
                      chunk(None, reasoning_content=""),
                      chunk(finish="stop"), DONE], "stop", None, "x"),
    ("comments", [
        b": OPENROUTER PROCESSING\n\n", ROLE, b": ping\n\n",
        chunk("x"), b": ping\n\n",
        chunk(finish="stop"), DONE], "stop", None, "x"),
    ("done in the text", [chunk("data: [DONE]\n\n"),
                          chunk("more"),
                          chunk(finish="stop"), DONE], "stop", None, "data: [DONE]\n\nmore"),
    ("json in the text", [
        chunk('{"error": {"finish_reason": "length", "usage": {"prompt_tokens": 9}}}'),
        chunk(finish="stop"), DONE], "stop", None,
     '{"error": {"finish_reason": "length", "usage": {"prompt_tokens": 9}}}'),
    ("unknown fields", [
        {**chunk("x"), "system_fingerprint": "fp", "obfuscation": "aaa", "service_tier": None},
        chunk(finish="stop"), DONE], "stop", None, "x"),
    ("late usage", [
        chunk("x"),
        chunk(finish="stop"), {**usage_chunk(), "timings": {"pad": "x" * 3000}},
        DONE], "stop", USAGE, "x")]

ENDS = [("lf", b"data: ", b"\n\n"), ("no blank", b"data:", b"\n\n"),
        ("crlf", b"data: ", b"\r\n\r\n"), ("crlf, no blank", b"data:", b"\r\n\r\n")]


def translation_of(call=None, **provider):
    """How a call reaches a provider's model and comes back."""
    call = call or call_of({**chat(), "stream": True})
    return call.dialect.open(call, ifl.Target(ifl.Provider("up", **provider), "m1"), context_of())


def relay_stream():
    return translation_of()


def relay(payloads):
    """What a ChatRelay makes of reads: what goes out at each of them and at the end."""
    stream = relay_stream()
    out = []
    for payload in payloads:
        if stream.done:
            break
        out.append(payload if stream.can_forward(payload) else stream.feed(payload))
    out.append(stream.close())
    return out, stream


def cuts_in_characters(data: bytes):
    """`data` cut in the middle of each character that takes several bytes."""
    for at, byte in enumerate(data):
        if byte & 0xC0 == 0x80:
            yield [data[:at], data[at:]]


@pytest.mark.parametrize("end", ENDS, ids=[row[0] for row in ENDS])
@pytest.mark.parametrize("row", RELAYED, ids=[row[0] for row in RELAYED])
def test_golden_streams_are_relayed_as_they_came(row, end):
    """However they are cut, even within characters: the same bytes, the same facts."""
    _, items, finish, usage, text = row
    data = wire_of(items, *end[1:])
    boundary = len(data)
    ways = [[data], [data[at:at + 1] for at in range(boundary)],
            [record(item, *end[1:]) for item in items],
            [data[at:at + 7] for at in range(0, boundary, 7)], *cuts_in_characters(data)]
    for pieces in ways:
        out, stream = relay(pieces)
        assert b"".join(out) == data
        assert (stream.finish_reason, stream.began, stream.done) == (finish, True, True), pieces
        assert stream.usage == (ifl.parse_usage(usage) if usage else ifl.Usage(
            ifl.count_chat_tokens(stream._call.body), stream.records, estimated=True))
        assert text_of(records_of(b"".join(out))) == text
        for piece in out:                # only whole records: a comment fits in at any time
            assert piece == b"" or piece.endswith((b"\n\n", b"\n\r\n"))


@pytest.mark.parametrize("row", RELAYED, ids=[row[0] for row in RELAYED])
def test_golden_streams_in_two_reads(row):
    data = wire_of(row[1])
    for at in range(1, len(data), 1 if len(data) < 1200 else 37):
        out, stream = relay([data[:at], data[at:]])
        assert b"".join(out) == data and stream.done, at


def test_nothing_goes_out_before_the_answer_begins():
    quiet = [record(ROLE), b": wait\n\n", record({"choices": []}), record(chunk(None))]
    stream = relay_stream()
    assert [stream.feed(piece) for piece in quiet] == [b""] * 4 and not stream.began
    assert stream.feed(record(chunk("x"))) == b"".join(quiet) + record(chunk("x")) and stream.began


def test_once_begun_each_read_goes_out_at_once():
    stream = relay_stream()
    stream.feed(record(chunk("x")))
    for piece in (record(ROLE), b": c\n\n", record(chunk("y")) + record(chunk("z"))):
        assert stream.can_forward(piece)
    assert not stream.can_forward(b"data: {") and stream.feed(b"data: {") == b""
    assert not stream.can_forward(b"}\n\n") and stream.feed(b"}\n\n") == b"data: {}\n\n"


@pytest.mark.parametrize(
    "items",
    [[], [DONE], [ROLE], [ROLE, chunk(finish="stop"), DONE], [b": only\n\n"], [{"choices": []}, DONE
                                                                               ], [b"\n\n"],
     [ROLE, chunk(finish="stop", usage={"prompt_tokens": 5, "completion_tokens": 0}), DONE]])
def test_an_empty_stream_is_an_error(items):
    for pieces in ([wire_of(items)], [record(item) for item in items]):
        with pytest.raises(ifl.UpstreamGarbled, match="empty"):
            relay(pieces)


@pytest.mark.parametrize("end", ENDS, ids=[row[0] for row in ENDS])
def test_a_missing_done_is_added_after_a_proper_end(end):
    items = [chunk("x"), chunk(finish="stop")]
    out, stream = relay([wire_of(items, *end[1:])])
    assert b"".join(out) == wire_of(items, *end[1:]) + b"data: [DONE]\n\n"


@pytest.mark.parametrize("cut", [b"", b"\n", b"\r\n"])
def test_the_last_blank_line_may_be_missing(cut):
    finished = [chunk("x"), chunk(finish="stop")]
    for items in ([*finished, DONE], [chunk("x", "stop")], finished):
        out, stream = relay([wire_of(items).rstrip(b"\n") + cut])
        assert text_of(records_of(b"".join(out))) == "x" and records_of(b"".join(out))[-1] == DONE


@pytest.mark.parametrize("items", [[chunk("x")], [ROLE, chunk("x"), chunk("y")],
                                   [chunk("x"), b'data: {"choi'], [chunk("x"), b"data: [DO"]])
def test_a_stream_that_ends_in_the_middle_is_an_error(items):
    with pytest.raises(ifl.UpstreamGarbled, match="cut off"):
        relay([wire_of(items)])


ERROR_RECORD = {"error": {"message": "Rate limit reached", "type": "rate_limit", "code": "429"}}


@pytest.mark.parametrize("before", [[], [ROLE], [b": c\n\n", ROLE]])
def test_an_error_record_before_the_answer_is_an_error(before):
    data = wire_of([*before, ERROR_RECORD])
    for pieces in [[data]] if before else cuts(data):
        with pytest.raises(ifl.UpstreamRefused) as refused:
            relay(pieces)
        assert (refused.value.status, refused.value.message) == (429, "Rate limit reached")
        assert refused.value.body == ERROR_RECORD


@pytest.mark.parametrize("size", [10, 2000, 6000])
def test_an_error_record_in_mid_stream_is_passed_on_and_nothing_follows(size):
    items = [chunk("x"), {"error": {"message": "m" * size, "type": "t"}}]
    out, _ = relay([record(item) for item in items])
    assert records_of(b"".join(out)) == items


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_an_error_record_that_lacks_its_end_is_passed_on(end):
    items = [chunk("x"), ERROR_RECORD]
    out, _ = relay([wire_of(items).rstrip(b"\n") + end])
    assert records_of(b"".join(out)) == items


def test_a_record_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(ifl, "RECORD_LIMIT_BYTES", 1000)
    for begin in (b"", record(chunk("x"))):
        with pytest.raises(ifl.UpstreamGarbled, match="never ends"):
            relay([begin] + [b"x" * 100] * 20)


def test_a_record_that_never_ends_is_given_up_in_every_dialect(monkeypatch):
    monkeypatch.setattr(ifl, "RECORD_LIMIT_BYTES", 1000)
    for piece in (b"data: " + b"x" * 100, b"data: x\n" * 20):
        decoder = ifl.SSEDecoder()
        with pytest.raises(ifl.UpstreamGarbled, match="never ends"):
            for _ in range(100):
                decoder.feed(piece)


def test_a_finish_reason_before_a_long_text_is_an_end():
    choice = {"index": 0, "finish_reason": "stop", "delta": {"content": "x" * 9000}}
    out, stream = relay([record({"choices": [choice]})])
    assert stream.finish_reason == "stop" and records_of(b"".join(out))[-1] == DONE


def test_garbage_before_the_answer_is_an_error():
    with pytest.raises(ifl.UpstreamGarbled, match="not JSON"):
        relay([b"data: {oops}\n\n"])


@pytest.mark.parametrize("end", ENDS, ids=[row[0] for row in ENDS])
def test_records_are_counted(end):
    """The count stands in for the tokens where the upstream does not say."""
    items = [chunk(letter) for letter in "abcdefghij"] + [chunk(finish="stop"), DONE]
    for pieces in ([record(item, *end[1:]) for item in items], [wire_of(items, *end[1:])]):
        assert 10 <= relay(pieces)[1].records <= 13


# --- growth ------------------------------------------------------------------

def each_of(make):
    """What feeds the pieces of a text, one character each, to a new object, and closes it."""
    def feed(text):
        fed = make()
        for piece in text:
            fed.feed(piece)
        return fed.close()
    return feed


def relay_pieces(pieces):
    with contextlib.suppress(ifl.UpstreamGarbled):               # most of them are cut off
        relay(pieces)


def stream_of(dialect, chunks):
    """All events that a dialect makes of chunks."""
    turn = turn_of({}) if dialect == "messages" else make_turn({"input": "hi"})
    numbers = itertools.count()
    writer = turn.stream(lambda prefix: f"{prefix}{next(numbers)}")
    return [event for chunk in chunks for event in writer.feed(chunk)] + list(writer.close())


def call_deltas(size, turns=2):
    """`size` parallel calls whose arguments come in `turns` rounds."""
    return [{"choices": [{"index": 0, "delta": {"tool_calls": [
        {"index": at, **({"id": f"c{at}"} if not turn else {}), "function": {
            **({"name": "f"} if not turn else {}), "arguments": "{" if not turn else "}"}}]}}]}
        for turn in range(turns) for at in range(size)]


def outputs_by_name(size):
    return {"model": "m", "input": [
        *({"type": "function_call", "call_id": f"c{at}", "name": "f", "arguments": "{}"}
          for at in range(size)),
        *({"type": "function_call_output", "name": "f", "output": "x"} for _ in range(size))]}


def results_backwards(size):
    calls = [{"type": "tool_use", "id": f"c{at}", "name": "f", "input": {}} for at in range(size)]
    results = [{"type": "tool_result", "tool_use_id": f"c{at}", "content": "x"}
               for at in reversed(range(size))]
    return {"model": "m", "max_tokens": 9, "messages": [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": calls},
        {"role": "user", "content": results}]}


def refusal_of(page):
    return ifl.parse_refusal(502, "text/html", page.encode())


BEGUN = b"data: " + json.dumps(chunk("x")).encode() + b"\n\n"

#: (what, size of the base, maker of an input of a size, what reads it)
GROWTH_OF_STREAMS = [
    ("a page of opened titles", 30000, lambda n: "<title" * n, refusal_of),
    ("a page of titles", 30000, lambda n: "<title>x" * n, refusal_of),
    ("a page of headings", 30000, lambda n: "<h1>" * n, refusal_of),
    ("a title full of <", 100000, lambda n: "<title>" + "<" * n + "</title>", refusal_of),
    ("a wait in pieces", 4000, lambda n: "retry in 1d" + "1 d" * n,
     lambda text: ifl.find_delay(429, text)),
    ("a refusal of max_", 2000, lambda n: "max_" * n, lambda text: ifl.find_output_cap(400, text)),
    ("a number in pieces", 30000, lambda n: '{"a":' + "1" * n, each_of(ifl.ObjectMender)),
    ("a word in pieces", 30000, lambda n: '{"a":' + "t" * n, each_of(ifl.ObjectMender)),
    ("blanks after a comma", 30000, lambda n: '{"a":1,' + " " * n + '"b":2}',
     each_of(ifl.ObjectMender)),
    ("backslashes", 15000, lambda n: '{"a":"' + "\\" * n, each_of(ifl.ObjectMender)),
    ("brackets", 10000, lambda n: '{"a":' + "[" * n, each_of(ifl.ObjectMender)),
    ("blanks before a thought", 30000, lambda n: " " * n, each_of(ifl.ThinkTags)),
    ("blanks in a thought", 8000, lambda n: "<think>a" + " " * n, each_of(ifl.ThinkTags)),
    ("a record without an end", 20000, lambda n: [BEGUN, *[b"x"] * n], relay_pieces),
    ("a record of many lines", 4000, lambda n: [BEGUN, *[b"data: x\n"] * n], relay_pieces),
    ("records without blank lines", 3000, lambda n: [BEGUN, *[BEGUN[:-1]] * n], relay_pieces),
    ("chunks before the answer", 1000, lambda n: [
        b"data: " + json.dumps(ROLE).encode() + b"\n\n"] * n + [BEGUN], relay_pieces),
    ("a fold of many pieces", 2000, lambda n: BEGUN * n + b"data: [DONE]\n\n", ifl.fold_stream),
    ("calls side by side, Messages", 600, call_deltas,
     lambda chunks: stream_of("messages", chunks)),
    ("calls side by side, Responses", 600, call_deltas,
     lambda chunks: stream_of("responses", chunks)),
    ("blanks before a text, Messages", 3000, lambda n: [chunk(" ")] * n,
     lambda chunks: stream_of("messages", chunks)),
    ("blanks before a text, Responses", 3000, lambda n: [chunk(" ")] * n,
     lambda chunks: stream_of("responses", chunks)),
    ("details in pieces, Messages", 3000, lambda n: [chunk(reasoning_details=[
        {"type": "reasoning.text", "text": "x" * 40}])] * n,
     lambda chunks: stream_of("messages", chunks)),
    ("details in pieces, Responses", 3000, lambda n: [chunk(reasoning_details=[
        {"type": "reasoning.text", "text": "x" * 40}])] * n,
     lambda chunks: stream_of("responses", chunks)),
    ("a call that waits, Messages", 3000, lambda n: [
        chunk(tool_calls=[tool(0, "a", "f", '{"a":')]),
        chunk(tool_calls=[tool(1, "b", "g", '{"b":"')]),
        *[chunk(tool_calls=[tool(1, arguments="x" * 20)])] * n],
     lambda chunks: stream_of("messages", chunks)),
    ("a call that waits, Responses", 3000, lambda n: [
        chunk(tool_calls=[tool(0, "a", "f", '{"a":')]),
        chunk(tool_calls=[tool(1, "b", "g", '{"b":"')]),
        *[chunk(tool_calls=[tool(1, arguments="x" * 20)])] * n],
     lambda chunks: stream_of("responses", chunks)),
    ("arguments in a string, Messages", 3000, lambda n: [
        chunk(tool_calls=[tool(0, "a", "f", '"')]),
        *[chunk(tool_calls=[tool(0, arguments="x" * 20)])] * n],
     lambda chunks: stream_of("messages", chunks)),
    ("arguments in a string, Responses", 3000, lambda n: [
        chunk(tool_calls=[tool(0, "a", "f", '"')]),
        *[chunk(tool_calls=[tool(0, arguments="x" * 20)])] * n],
     lambda chunks: stream_of("responses", chunks)),
    ("folded details", 3000, lambda n: wire_of(
        [chunk(reasoning_details=[{"type": "reasoning.text", "text": "x" * 40}])] * n + [DONE]),
     ifl.fold_stream),
    ("folded arguments", 3000, lambda n: wire_of(
        [chunk(tool_calls=[tool(0, "a", "f", "x" * 40)])] * n + [DONE]),
     ifl.fold_stream),
    ("results in reverse order", 2000, results_backwards, lambda body: turn_of(body)),
    ("outputs by name alone", 2000, outputs_by_name, lambda body: make_turn(body)),
    ("an id of many marks", 30000, lambda n: "toolu_" + "_raw_" * n + "!", ifl.unwrap_id),
]


@pytest.mark.parametrize("size, make, use", [row[1:] for row in GROWTH_OF_STREAMS],
                         ids=[row[0] for row in GROWTH_OF_STREAMS])
def test_streams_and_requests_take_linear_time(size, make, use):
    check_growth(size, make, use)


# --- what ends an answer -----------------------------------------------------

HALF = b'data: {"choices": [{"index": 0, "delta": {"cont'


@pytest.mark.parametrize("end", [b"", HALF, HALF + b"\n\n", BEGUN, b"data: [DONE]\n\n"],
                         ids=["nothing", "half a record", "a broken record", "a chunk", "done"])
def test_nothing_joins_an_answer_after_done(end):
    """A fold, a relay and a translated stream tell the answer that came before [DONE]."""
    data = BEGUN + b"data: " + json.dumps(chunk(finish="stop")).encode() + b"\n\ndata: [DONE]\n\n"
    assert ifl.fold_stream(data + end)["choices"][0]["message"]["content"] == "x"
    for pieces in ([data + end], [BEGUN, data[len(BEGUN):] + end], [BEGUN, data[len(BEGUN):], end]):
        assert b"".join(relay(pieces)[0]) == data
        stream = translation_of(preserve_reasoning_content=False)
        out = b""
        for piece in pieces:
            out += b"" if stream.done else stream.feed(piece)
        assert text_of(records_of(out + stream.close())) == "x"


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_records_without_blank_lines_are_relayed_as_records(end):
    whole = [json.dumps(chunk(text)).encode() for text in "abc"]
    lines = [b"data: " + text + end for text in [*whole, b"[DONE]"]]
    for pieces in (lines, [b"".join(lines)], [lines[0], b"".join(lines[1:])]):
        out = b"".join(relay([BEGUN, *pieces])[0])
        records = [record for record in out.replace(b"\r", b"").split(b"\n\n") if record]
        assert records == [BEGUN.strip(), *(b"data: " + text for text in [*whole, b"[DONE]"])]


@pytest.mark.parametrize("content_type, start, streamed",
                         [("text/event-stream", b"retry: 5\n", True),
                          ("text/event-stream", b"id: 1\n", True),
                          ("text/event-stream; charset=utf-8", b"\xef\xbb\xbfdata: {}", True),
                          ("text/event-stream", b'{"choices": []}', False),
                          ("text/event-stream", b"\xef\xbb\xbf{", False),
                          ("application/json", b"data: {}", True), ("", b": hello\n", True),
                          ("application/json", b"{", False), ("text/plain", b"retry: 5\n", False)])
def test_what_is_an_event_stream(content_type, start, streamed):
    assert ifl.is_event_stream(content_type, start) is streamed


@pytest.mark.parametrize("choices", [None, [], [None], "x"], ids=[
    "null", "none", "no object", "text"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("path, body", [
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/messages", {"max_tokens": 9, "messages": MESSAGES}), ("/v1/responses", {"input": "hi"})],
    ids=["chat", "messages", "responses"])
def test_an_answer_without_choices_is_empty(server, upstream, path, body, stream, choices):
    """Whatever the count of its tokens says."""
    answer = {**completion("x"), "choices": choices}
    chunks = {**answer, "object": "chat.completion.chunk"}, DONE
    upstream.plays(sse(*chunks) if stream else plain(answer))
    told = post(server(upstream), {"model": "m1", "stream": stream, **body}, path)
    assert told.status == 502 and "empty" in told.body.decode()


# --- refusals, for clients of every dialect -----------------------------------

ASKS = {"/v1/chat/completions": {"messages": MESSAGES},
         "/v1/messages": {"messages": MESSAGES, "max_tokens": 9}, "/v1/responses": {"input": "hi"}}


def ask_in(server, path, stream, **more) -> Answer:
    return post(server, {"model": "m1", "stream": stream, **ASKS[path], **more}, path=path)


def events_of(answer):
    """The objects of a streamed answer, [DONE] and comments left out."""
    found = []
    for part in re.split(r"(?:\r?\n){2,}", answer.body.decode("utf-8-sig")):
        data = [line[5:] for line in part.splitlines() if line.startswith("data:")]
        found += [json.loads("\n".join(data))] if data and data[0].strip() != DONE else []
    return found


def said_in(path, answer) -> str:
    """The text of an answer, however it came; the message of one that is an error."""
    if "event-stream" in answer.headers["content-type"]:
        found = events_of(answer)
        failed = [item.get("error") or item["response"]["error"] for item in found
                  if item.get("error") or item.get("type") == "response.failed"]
        if failed:
            return failed[0]["message"]
        if path == "/v1/chat/completions":
            return text_of(found)
        kind = "content_block_delta" if path == "/v1/messages" else "response.output_text.delta"
        deltas = [item["delta"] for item in found if item["type"] == kind]
        return "".join(delta["text"] if isinstance(delta, dict) else delta for delta in deltas)
    if "error" in answer.json and answer.json["error"]:
        return answer.json["error"]["message"]
    if path == "/v1/chat/completions":
        return answer.json["choices"][0]["message"]["content"]
    items = answer.json["output"] if path == "/v1/responses" else [answer.json]
    return "".join(block["text"] for item in items for block in item["content"])


HELLO_WIRE, SAID = wire_of(HELLO), "Hello"
FINISHED = wire_of([ROLE, chunk("Hello"), chunk(finish="stop")])

#: id, event stream, what the client is told.
ODD_STREAMS = [
    ("more after the end", HELLO_WIRE + wire_of([chunk("more"), DONE, chunk("and more")]), SAID),
    ("more after the end, crlf", wire_of([*HELLO, chunk("more")], end=b"\r\n\r\n"), SAID),
    ("garbage after the end", HELLO_WIRE + b"data: {oops\n\n", SAID),
    ("half a record after the end", FINISHED + b'data: {"choi', SAID),
    ("half a record after [DONE]", HELLO_WIRE + b'data: {"choi', SAID),
    ("an error, then half a record",
     wire_of([ROLE, chunk("He"), {"error": {"message": "slow down", "code": 429}}]) + b'data: {"ch',
     "slow down"),
    ("an error at once, then half a record",
     wire_of([{"error": {"message": "slow down", "code": 429}}]) + b'data: {"ch', "slow down"),
    ("a mark of UTF-8", b"\xef\xbb\xbf" + HELLO_WIRE, SAID),
    ("retry first", b"retry: 1000\n\n" + HELLO_WIRE, SAID),
    ("id first", b"id: 7\n" + HELLO_WIRE, SAID),
    ("no blank lines", HELLO_WIRE.replace(b"\n\n", b"\n"), SAID),
    ("no blank lines, crlf", HELLO_WIRE.replace(b"\n\n", b"\r\n"), SAID),
    ("no blank lines, named", wire_of(HELLO, b"event: message\ndata: ", b"\n"), SAID),
    ("no blank lines, numbered", wire_of(HELLO, b"id: 7\ndata: ", b"\n"), SAID),
    ("indented", b"".join(b"data: " + json.dumps(item, indent=1).encode().replace(
        b"\n", b"\ndata: ") + b"\n\n" for item in HELLO[:-1]) + record(DONE), SAID),
    ("null choices, tokens", wire_of([{"choices": None, "usage": USAGE}, DONE]),
     "the upstream's answer is empty"),
    ("no choices, tokens", wire_of([usage_chunk(), DONE]), "the upstream's answer is empty"),
    ("tokens, no text", wire_of([ROLE, chunk(finish="stop"), usage_chunk(), DONE]), "")]


@pytest.mark.parametrize("sent, said", [row[1:] for row in ODD_STREAMS],
                         ids=[row[0] for row in ODD_STREAMS])
def test_an_odd_stream_is_told_rightly(server, upstream, sent, said):
    made = server(upstream)
    pieces = [sent[at:at + 50] for at in range(0, len(sent), 50)]
    for path, stream, reads in itertools.product(ASKS, (False, True), ([sent], pieces)):
        upstream.plays(sse(*reads))
        answer = ask_in(made, path, stream)
        told, where = said_in(path, answer), (path, stream, len(reads), answer)
        # and says for how long
        assert told == said or said == "slow down" and told.startswith(said), where
        if stream and answer.status == 200:
            assert b"more" not in answer.body and b"oops" not in answer.body, where
            numbers = [event["sequence_number"] for event in events_of(answer)
                       if "sequence_number" in event]
            assert numbers == list(range(len(numbers))), where
            if path == "/v1/chat/completions":
                assert answer.body.count(DONE.encode()) == (said != "slow down"), where


@pytest.mark.parametrize(
    "error, code", [({"error": {"message": "m", "code": 42, "param": ["a"]}}, "42"),
                    ({"detail": "m"}, None), ({"error": {"message": "m", "code": True}}, None),
                    ({"error": "m"}, None),
                    ({"error": {"message": "m", "code": "odd", "type": 7}}, "odd"),
                    ({"code": 42, "message": "m"}, None)])
def test_an_error_of_responses_has_a_code_and_a_param(server, upstream, error, code):
    upstream.plays(plain(error, 400))
    told = ask_in(server(upstream), "/v1/responses", False).error
    assert (told["message"], told["code"], told["param"]) == ("m", code, None)
    assert told["type"] == "invalid_request_error"


def keep_preset(monkeypatch, name, url):
    monkeypatch.setitem(ifl.PRESETS, name, ifl.PRESETS[name]._replace(base_url=url))


SPENT_GLM = {"error": {"code": "1113", "message": "余额不足或无可用资源包,请充值。"}}


@pytest.mark.parametrize("preset, status, body, named", [
    ("zhipu", 429, SPENT_GLM, "zhipu-coding"), ("zhipu-coding", 429, SPENT_GLM, "zhipu"),
    ("zai", 429, {"error": {"code": 1113, "message": "no resource package"}}, "zai-coding"),
    ("dashscope", 401, {"error": {"message": "Incorrect API key provided."}}, "dashscope-coding"),
    ("dashscope-coding-intl", 403, {"error": {"message": "no"}}, "dashscope-intl"),
    ("kimi-coding", 401, {"error": {"message": "invalid"}}, "moonshot or moonshot-cn"),
    ("volcengine", 402, {"error": {"message": "AccountOverdue"}}, "volcengine-coding"),
    ("zhipu", 429, {"error": {"code": "1302", "message": "too many requests"}}, ""),
    ("deepseek", 402, {"error": {"message": "Insufficient Balance"}}, ""),
    ("zhipu", 400, {"error": {"message": "bad"}}, "")])
def test_where_a_key_of_a_plan_or_one_paid_by_use_belongs_is_told(server, upstream, monkeypatch,
                                                                  preset, status, body, named):
    keep_preset(monkeypatch, preset, upstream.url)
    made = server({**provider(upstream), "api_keys": ["sk-0123456789"]})
    for path, stream in itertools.product(ASKS, (False, True)):
        upstream.plays(plain(body, status))
        answer = ask_in(made, path, stream)
        told = answer.json["error"]["message"]
        assert body["error"]["message"] in told and answer.status >= 400
        assert ("belong" in told) is bool(named), told
        assert not named or f"the preset {named} (`provider add {named.split()[0]}`)" in told


def test_a_relay_with_the_facts_of_a_preset_has_no_plan(server, upstream):
    made = server({**provider(upstream), "preset": "zhipu", "models": ["m1"]})
    upstream.plays(plain(SPENT_GLM, 429))
    assert "preset" not in ask_in(made, "/v1/messages", False).json["error"]["message"]


NO_IMAGES = [
    (500, "image input is not supported - hint: if this is unexpected, provide the mmproj"),
    (404, "No endpoints found that support image input"),
    (500, "this model is missing data required for image input"),
    (422, "messages[0]: unknown variant `image_url`, expected `text`"),
    (500, "model is not a multimodal model"), (503, "this model does not support image input")]
SHOWING = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}}]}]},
    "/v1/messages": {"messages": [{"role": "user", "content": [{"type": "image", "source": {
        "type": "base64", "media_type": "image/png", "data": "iVBO"}}]}]},
    "/v1/responses": {"input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": "data:image/png;base64,iVBO"}]}]}}


def test_an_image_for_a_model_that_takes_none_is_the_clients_mistake(server, upstream):
    made = server(upstream, retry={"count": 1, "backoff_s": 0})
    for path, (status, text) in itertools.product(ASKS, NO_IMAGES):
        upstream.plays(plain({"error": {"message": text}}, status))
        answer = ask_in(made, path, False, **SHOWING[path])
        assert answer.status == 400 and text in answer.json["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"
        upstream.plays(*[plain({"error": {"message": text}}, 500)] * 2)
        assert ask_in(made, path, False).status == 500, "no image was sent"


@pytest.mark.parametrize("text", [
    "max_" * 5000, "length is 9 tokens you requested 9 tokens (" + "1" * 9900,
    "exceeds the available context size" * 300, "models " * 2000,
    "exceeded model token limit: " + "9" * 9000])
def test_the_words_of_an_error_are_looked_for_in_no_time(text):
    began = time.thread_time()
    for _ in range(3):
        ifl.find_overflow(400, text)
        ifl.find_output_cap(400, text)
        ifl.find_delay(429, text)
        ifl.is_missing_model(400, text)
        ifl.is_spent(400, text)
        ifl.is_image_refusal(400, text)
    assert time.thread_time() - began < 1.5


# === 8. Anthropic Messages ===================================================

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 750, 100)
                       + b"\x08\x06\0\0\0").decode()
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
WEATHER = {"name": "get_weather", "description": "W",
           "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
TIME = {"name": "get_time", "input_schema": {"type": "object"}}
LONG = "mcp__a_very_long_server_name__and_a_very_long_tool_name_that_goes_on_and_on"
USAGE_MESSAGES = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def turn_of(body, known=None, **profile):
    body = {"model": "m1", "max_tokens": 256, "messages": [user("q")], **body}
    return ifl.MessagesTurn(body, {**ifl.DEFAULT_PROFILE, **profile}, "up", known)


def ids():
    numbers = itertools.count(1)
    return lambda prefix: f"{prefix}{next(numbers):024x}"


def user(*blocks):
    return {"role": "user", "content": blocks[0] if len(blocks) == 1 and isinstance(blocks[0], str)
            else list(blocks)}


def assistant(*blocks):
    return {"role": "assistant", "content": list(blocks)}


def text(value):
    return {"type": "text", "text": value}


def use(ident, name="get_time", **given):
    return {"type": "tool_use", "id": ident, "name": name, "input": given}


def result(ident, *content, **more):
    return {"type": "tool_result", "tool_use_id": ident,
            **({"content": content[0]} if content else {}), **more}


def call(ident, name="get_time", arguments="{}"):
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}


def image(**source):
    return {"type": "image",
            "source": source or {"type": "base64", "media_type": "image/png", "data": PNG}}


IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG}}
PDF = {"type": "document", "title": "a.pdf", "source": {
    "type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}}


def said_chat(role, content, **more):
    return {"role": role, "content": content, **more}


def tool_responses(text, call_id="c1"):
    return {"role": "tool", "tool_call_id": call_id, "content": text}


# --- a conversation that is known from its request before

#: A bit of everything; each beginning of it that ends with the user is a request.
LONG_TALK = [
    user(text("look at this"), image()),
    assistant({"type": "thinking", "thinking": "hm", "signature": "foreign"}, text("I will"),
              use("t1", LONG, path="a"), use("t2")),
    user(result("t2", is_error=True), result("t1", [text("é中")]), text("go on")),
    {"role": "assistant", "content": "done"}, user(text("and now?")), user("well?"),
    assistant(use("t3", n=1)), user(text("no result comes")),
    assistant(text("a")), assistant(text("b"), use("toolu_x_raw_ZnVuY3Rpb25zLmE6MA")),
    user(result("toolu_x_raw_ZnVuY3Rpb25zLmE6MA"), result("nobody")),
    {"role": "system", "content": "be brief"}, assistant(text("ok")), user(text("thanks")),
    assistant(use("t4")), user(result("t4")), assistant(text("bye")), user(text("bye"))]
PASSING = {"clear_at": "next_user_message"}


def in_both_ways(body, known, **profile):
    """A body converted with and without what is known of its conversation: the same; what is known
    afterwards.
    """
    plain, quick = turn_of(body, **profile), turn_of(body, known, **profile)
    assert json.loads(ifl.dump_chat(quick.chat)) == json.loads(ifl.dump_json(plain.chat))
    assert quick.chat == plain.chat and quick.raw_estimate == plain.raw_estimate
    assert (quick.ids, quick.names, sorted(quick.skipped)) == (
        plain.ids, plain.names, sorted(plain.skipped))
    return quick.known


def requests_of(talk):
    return [talk[:end] for end in range(1, len(talk) + 1) if talk[end - 1]["role"] == "user"]


@pytest.mark.parametrize("profile", [{}, {"vision": False, "mid_system": "user"},
                                     {"require_reasoning_on_tool_calls": True}])
@pytest.mark.parametrize("leading", [[], [{"role": "system", "content": "first"}]])
def test_a_conversation_that_is_known_becomes_the_same(profile, leading):
    known, body = None, {"system": "You are", "tools": [WEATHER, TIME]}
    for messages in requests_of(LONG_TALK):
        body["messages"] = [*leading, *messages]
        known = in_both_ways(body, known, **profile)
    assert len(known.rounds) == 7                         # all but the last
    again = in_both_ways(body, known, **profile)
    assert all(new is old for new, old in zip(again.rounds, known.rounds))
    assert again.tools is known.tools and again.system is known.system


def test_a_known_conversation_that_ends_in_a_passing_system_message():
    known = in_both_ways({"messages": LONG_TALK}, None)
    ending = [*LONG_TALK[:2], {"role": "system", "content": "hush", **PASSING}]
    in_both_ways({"messages": ending}, known)


@pytest.mark.parametrize("place", range(len(LONG_TALK)))
def test_a_history_that_was_edited_is_read_anew(place):
    known, message = in_both_ways({"messages": LONG_TALK}, None), LONG_TALK[place]
    for edit in ([], [{"role": message["role"], "content": "something else"}], [message] * 2,
                 [{**message, **PASSING}], [{**message, "cache_control": {"type": "ephemeral"}}]):
        body = {"messages": LONG_TALK[:place] + edit + LONG_TALK[place + 1:]}
        try:
            turn_of(body)
        except ifl.BadRequest as exc:
            with pytest.raises(ifl.BadRequest, match=re.escape(exc.message)):
                turn_of(body, known)
        else:
            in_both_ways(body, known)


@pytest.mark.parametrize("change", [
    {"system": "You are not"}, {"system": None}, {"tools": [TIME]}, {"tools": None},
    {"thinking": {"type": "disabled"}}, {"thinking": {"type": "enabled", "budget_tokens": 2000}},
    {"tool_choice": {"type": "any"}}, {"max_tokens": 7},
    {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}])
def test_what_else_changes_between_requests_is_heeded(change):
    body = {"messages": LONG_TALK, "system": "You are", "tools": [WEATHER, TIME]}
    known = in_both_ways(body, None)
    changed = {name: value for name, value in {**body, **change}.items() if value is not None}
    in_both_ways(body, in_both_ways(changed, known))
    in_both_ways(body, known, strict_tools=True, vision=False)


def test_what_changes_more_than_messages_is_not_remembered():
    system = {"role": "system", "content": [{"type": "unheard_of"}],
              "output_config": {"effort": "low"}}
    talk, known = LONG_TALK[:4] + [user(text("x")), system] + LONG_TALK[6:], None
    for messages in [*requests_of(talk), LONG_TALK]:
        known = in_both_ways({"messages": messages, "tools": [WEATHER, TIME]}, known)


def test_a_long_conversation_reaches_the_upstream_as_if_nothing_were_known(server, upstream):
    long = server(upstream, vision_mode="pass")
    for messages in [*requests_of(LONG_TALK), LONG_TALK[:1] + LONG_TALK[-1:], LONG_TALK]:
        body = {"model": "m1", "max_tokens": 256, "system": "You are " * 1100,
                "tools": [WEATHER, TIME], "messages": messages}
        fresh = server(upstream, vision_mode="pass")
        for running in (long, fresh, long):
            assert post(running, body, path="/v1/messages").status == 200
        assert len({request.body for request in upstream.requests[-3:]}) == 1
    (known, _), = long.gateway.conversations._kept.values()
    assert len(known.lists["messages"]) == len(LONG_TALK) and len(known.turns["m1"].rounds) == 7


# --- requests

def test_plain_request():
    assert turn_of({}).chat == {"model": "up", "messages": [user("q")], "max_tokens": 256}
    assert turn_of({}).model == "m1"


USER_ID = '{"device_id":"d","session_id":"s"}'
MISSED = {"service_tier": "auto", "speed": "fast", "inference_geo": "us", "container": {"id": None},
          "mcp_servers": [], "context_management": {"edits": []}, "fallbacks": [{"model": "m2"}],
          "cache_control": {"type": "ephemeral"}, "diagnostics": {},
          "output_config": {"task_budget": {"total": 1}}, "never_heard_of": 1}
ON, OFF = {"thinking": {"type": "enabled"}}, {"thinking": {"type": "disabled"}}


def budget(tokens, limit):
    return {"thinking": {"type": "enabled", "budget_tokens": tokens}, "max_tokens": limit}


#: What is asked, under which profile -> Chat's fields.
OPTIONS = [
    ({"temperature": 0.2, "top_p": 0.9, "top_k": 40}, {}, {"temperature": 0.2, "top_p": 0.9}),
    ({"top_k": 40}, {"top_k": True}, {"top_k": 40}),
    ({"stop_sequences": ["END"]}, {}, {"stop": ["END"]}),
    ({"stop_sequences": []}, {}, {}),
    ({"stop_sequences": list("abcdef")}, {}, {"stop": list("abcd")}),
    ({"stream": True}, {}, {"stream": True, "stream_options": {"include_usage": True}}),
    ({"stream": True}, {"stream_usage": False}, {"stream": True}),
    ({"stream": False}, {}, {}),
    ({"metadata": {"user_id": "u-1"}}, {}, {"user": "u-1"}),
    ({"metadata": {"user_id": "u-1"}}, {"user_field": "safety_identifier"},
     {"safety_identifier": "u-1"}),
    ({"metadata": {"user_id": "u-1"}}, {"user_field": None}, {}),
    ({"metadata": {"user_id": None}}, {}, {}),
    ({"metadata": {"user_id": USER_ID}}, {},
     {"user": "ddefa73278ab50967708691ef0c3825d68d4a8b7d9491d9dd5bcba4e16a7e2ad"}),
    ({"max_tokens": 128000}, {"max_output": 8192}, {"max_tokens": 8192}),
    ({"max_tokens": 7}, {"max_tokens_field": "max_completion_tokens"},
     {"max_completion_tokens": 7}),
    (budget(2048, 4096), {}, {**ON, "max_tokens": 4096}),
    ({"thinking": {"type": "adaptive", "display": "omitted"}}, {}, ON),
    ({"thinking": {"type": "between_tools"}}, {}, ON), (OFF, {}, OFF),
    (OFF, {"thinking_style": "none"}, {}),
    (budget(31999, 32000), {"thinking_style": "enable_thinking", "max_output": 8192},
     {"enable_thinking": True, "thinking_budget": 8191, "max_tokens": 8192}),
    (ON, {"thinking_extra": {"clear_thinking": False}},
     {"thinking": {"type": "enabled", "clear_thinking": False}}),
    (ON, {"thinking_style": "chat_template_kwargs", "template_switch": "thinking"},
     {"chat_template_kwargs": {"thinking": True}}),
    (OFF, {"thinking_style": "chat_template_kwargs"},
     {"chat_template_kwargs": {"enable_thinking": False}}),
    ({**OFF, "output_config": {"effort": "high"}}, {}, OFF),
    ({"output_config": {"effort": "xhigh"}}, {"efforts": ["low", "high", "max"]},
     {"reasoning_effort": "high"}),
    ({"output_config": {"effort": "low"}}, {"efforts": ["high", "max"]},
     {"reasoning_effort": "high"}),
    (budget(10000, 20000), {"thinking_style": "reasoning_effort"},
     {"reasoning_effort": "medium", "max_tokens": 20000}),
    ({"messages": [user("q"), {"role": "system", "output_config": {"effort": "high"},
                               "content": []}], "output_config": {"effort": "low"}}, {},
     {"reasoning_effort": "high"}),
    (MISSED, {}, {}),
]


@pytest.mark.parametrize("body, profile, fields", OPTIONS)
def test_options(body, profile, fields):
    limit = {} if "max_completion_tokens" in fields else {"max_tokens": 256}
    assert turn_of(body, **profile).chat == {"model": "up", "messages": [user("q")], **limit,
                                             **fields}


@pytest.mark.parametrize("system, expected", [
    ("Be brief.", ["Be brief."]), ([], []), ("", []),
    ([text("x-anthropic-billing-header: cc=1;"), {**text("A"), "cache_control": {}}, text(""),
      text("B")], ["A\n\nB"]),
    ("x-anthropic-billing-header: cc=1;\nRest", ["Rest"])])
def test_system(system, expected):
    messages = turn_of({"system": system}).chat["messages"]
    assert [m["content"] for m in messages if m["role"] == "system"] == expected


DOCUMENT = {"type": "document", "title": 'n "1"', "context": "draft",
            "source": {"type": "text", "media_type": "text/plain", "data": "L"}}


def document(content):
    return {"type": "document", "source": {"type": "content", "content": content}}


BLOCKS = [
    ([text(""), text("b")], "b"),
    ([text("a"), image()], [text("a"), IMAGE_PART]),
    ([image(type="url", url="https://e/a.jpg")],
     [{"type": "image_url", "image_url": {"url": "https://e/a.jpg"}}]),
    ([DOCUMENT, text("Sum up")],
     '<document title="n &quot;1&quot;" context="draft">\nL\n</document>\n\nSum up'),
    ([document([text("p1"), text("p2")])], "<document>\np1\n\np2\n</document>"),
    ([document("p")], "<document>\np\n</document>"),
    ([document([text("p"), image()])],
     [text("<document>"), text("p"), IMAGE_PART, text("</document>")]),
    ([PDF, text("Read")],
     [{"type": "file", "file": {"filename": "a.pdf",
                                "file_data": "data:application/pdf;base64,JVBERi0="}},
      text("Read")]),
    ([{"type": "search_result", "source": "https://s", "title": "S", "content": [text("found")]}],
     '<search_result source="https://s" title="S">\nfound\n</search_result>'),
    ([{"type": "container_upload", "file_id": "f1"}], "[uploaded file f1]"),
    ([{"type": "compaction", "content": "before"}, {"type": "compaction", "content": None}],
     "before"),
    ([text("q"), use("x", "f", a=1)], 'q\n\n[call of f {"a":1}]'),
    ([{"type": "web_search_tool_result", "content": [{"url": "http://u", "title": "T"}]}],
     "- T (http://u)"),
    ([{"type": "hologram"}, text("a")], "a"),
]


@pytest.mark.parametrize("blocks, expected", BLOCKS)
def test_user_blocks(blocks, expected):
    turn = turn_of({"messages": [user(*blocks)]})
    assert turn.chat["messages"] == [said_chat("user", expected)]
    assert turn.skipped == ["hologram"] * ({"type": "hologram"} in blocks)


NOTE_OF_PDF = ifl.NO_PDF.format("a.pdf")


def test_a_pdf_that_a_model_cannot_see_does_not_end_the_session():
    messages = [user(PDF, text("Read")), assistant(use("t1")), user(result("t1", [text("1"), PDF]))]
    made = turn_of({"messages": messages}, files=False).chat["messages"]
    assert made[0]["content"] == NOTE_OF_PDF + "\n\nRead"
    assert made[2:] == [tool_responses("1\n\n" + NOTE_OF_PDF, "t1")]
    with pytest.raises(ifl.BadRequest, match="base64"):      # what is no PDF at all is still said
        turn_of({"messages": [user({**PDF, "source": {**PDF["source"], "data": "%%%"}})]},
                files=False)


#: What only Messages can say: what an assistant's blocks, and what follows them, become.
CONVERSATIONS = [
    ("texts that citations cut, server tools as text, encrypted parts gone",
     [assistant(text("Searching."), {"type": "server_tool_use", "id": "s1", "name": "web_search",
                                     "input": {"query": "n"}},
                {"type": "web_search_tool_result", "tool_use_id": "s1", "content": [
                    {"type": "web_search_result", "url": "https://n", "title": "N",
                     "encrypted_content": "ENC"}]},
                text("It "), text("rained."))],
     [said_chat("assistant", 'Searching.\n\n[web_search {"query":"n"}]\n\n'
                             '[web_search results]\n- N (https://n)\n\nIt rained.')]),
    ("results of server tools",
     [assistant({"type": "web_fetch_tool_result", "tool_use_id": "s1",
                 "content": {"type": "web_fetch_tool_error", "error_code": "url_not_allowed"}},
                {"type": "mcp_tool_use", "id": "x", "server_name": "srv", "name": "t",
                 "input": {}},
                {"type": "mcp_tool_result", "tool_use_id": "x", "is_error": True,
                 "content": [text("boom")]},
                {"type": "bash_code_execution_tool_result", "tool_use_id": "y",
                 "content": {"stdout": "out", "stderr": "", "return_code": 0}},
                {"type": "mcp_tool_listing"}, {"type": "fallback"},
                {"type": "redacted_thinking", "data": "x"})],
     [said_chat("assistant", "[web_fetch results]\nerror: url_not_allowed\n\n[srv.t {}]\n\n"
                             "[srv.t error]\nboom\n\n[bash_code_execution results]\nout")]),
    ("messages of one role are one",
     [{"role": "assistant", "content": "Aloud."}, assistant(use("a")), user(result("a", "1"))],
     [said_chat("assistant", "Aloud.", tool_calls=[call("a")]), tool_responses("1", "a")]),
    ("results in two messages, in their order",
     [assistant(use("a"), use("b")), user(result("b", [text("x"), text("y")])),
      {"role": "system", "content": "S"}, user(text("note"), result("a"))],
     [said_chat("assistant", None, tool_calls=[call("a"), call("b")]),
      tool_responses("x\n\ny", "b"), tool_responses("", "a"), said_chat("system", "S"),
      said_chat("user", "note")]),
    ("an error, a missing result, one of nobody",
     [assistant(use("a"), use("b")), user(result("a", "no", is_error=True),
                                          result("zzz", "late"), text("hm"))],
     [said_chat("assistant", None, tool_calls=[call("a"), call("b")]),
      tool_responses("[tool error] no", "a"), tool_responses(ifl.NO_RESULT, "b"),
      said_chat("user", "[result of tool call zzz]\nlate\n\nhm")]),
    ("a tool that was found",
     [assistant(use("s")), user(result("s", [{"type": "tool_reference", "tool_name": "Grep"}]))],
     [said_chat("assistant", None, tool_calls=[call("s")]),
      tool_responses("Tool Grep is available now.", "s")]),
    ("thinking goes back without its signatures",
     [assistant({"type": "thinking", "thinking": "A", "signature": "sig"},
                {"type": "thinking", "thinking": "B", "signature": ""},
                text("ok"), use("a", city="Ö")), user(result("a", "1"))],
     [said_chat("assistant", "ok", reasoning_content="A\n\nB",
                tool_calls=[call("a", arguments='{"city":"Ö"}')]), tool_responses("1", "a")]),
    ("system messages that pass",
     [{"role": "system", "content": "old", **PASSING}, {"role": "assistant", "content": "a"},
      user("r"), {"role": "system", "content": [text("new")], **PASSING}],
     [said_chat("assistant", "a"), user("r"), said_chat("system", "new")]),
    ("an empty message", [assistant(), user("r")], [said_chat("assistant", ""), user("r")]),
    ("a result in an assistant's message", [assistant(text("so"), result("t9", [text("seen")]))],
     [said_chat("assistant", "so\n\n[result of tool call t9]\n\nseen")]),
]


@pytest.mark.parametrize("messages, expected", [row[1:] for row in CONVERSATIONS],
                         ids=[row[0] for row in CONVERSATIONS])
def test_conversations_of_messages(messages, expected):
    made = turn_of({"messages": [user("go"), *messages]}).chat["messages"]
    assert made == [user("go"), *expected]


@pytest.mark.parametrize("content", [[], "", [text("")], [text(""), text("")]])
def test_an_empty_user_message_is_refused_as_anthropic_does(content):
    for before in ([], [user("q"), assistant(text("a"))]):
        wanted = f"messages.{len(before)}: user messages must have non-empty content"
        with pytest.raises(ifl.BadRequest, match=wanted):
            turn_of({"messages": [*before, {"role": "user", "content": content}]})


def test_skipped_blocks_are_logged_once_by_type(server, upstream, log_lines):
    running = server(upstream)
    ask = {"model": "m1", "max_tokens": 9,
           "messages": [user(text("q"), {"type": "hologram", "data": "secret"})]}
    for _ in range(2):
        assert post(running, ask, "/v1/messages").status == 200
    lines = "\n".join(record.getMessage() for record in log_lines)
    assert lines.count("hologram") == 1 and "secret" not in lines


@pytest.mark.parametrize("prefill, message, chat", [
    ("partial", {"partial": True}, {}), ("prefix", {"prefix": True}, {}), (None, {}, {}),
    ("continue_final_message", {},
     {"continue_final_message": True, "add_generation_prompt": False})])
def test_prefill(prefill, message, chat):
    messages = [user("json"), {"role": "assistant", "content": "{"}]
    assert turn_of({"messages": messages}, prefill=prefill).chat == {
        "model": "up", "max_tokens": 256, "messages": [user("json"), {**messages[1], **message}],
        **chat}


def test_the_older_name_of_a_schema():
    for field in ("output_format", "output_config"):
        wish = {"type": "json_schema", "schema": SCHEMA}
        chat = turn_of({field: wish if field == "output_format" else {"format": wish}}).chat
        assert chat["response_format"]["json_schema"] == {
            "name": "output", "schema": SCHEMA, "strict": True}


def function(name, parameters=None, **more):
    parameters = parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
PARTS = {"properties": {"x": {"type": "string"}}, "required": ["x"]}


def served(tool):
    return {"server_tools": {"web_search": tool}}


TOOLS = [
    ([TIME], {}, {"tools": [function("get_time")]}),
    ([{**WEATHER, "type": "custom", "strict": True, "cache_control": {}, "defer_loading": True,
       "allowed_callers": [], "input_examples": []}], {},
     {"tools": [function("get_weather", WEATHER["input_schema"], description="W", strict=True)]}),
    ([{**TIME, "strict": True}], {"strict_tools": False}, {"tools": [function("get_time")]}),
    ([{"name": "a", "type": None}], {}, {"tools": [function("a")]}),
    ([{"name": "a", "input_schema": PARTS}], {},
     {"tools": [function("a", {"type": "object", **PARTS})]}),
    ([{"name": "a", "input_schema": {"type": "object", "properties": None}}], {},
     {"tools": [function("a")]}),
    ([SEARCH, TIME, {"name": "DeferredToolPlaceholder", "input_schema": {}}], {},
     {"tools": [function("get_time")]}),
    ([SEARCH], {}, {}),
    ([SEARCH], served({"type": "web_search", "web_search": {"enable": True}}),
     {"tools": [{"type": "web_search", "web_search": {"enable": True}}]}),
    ([{"type": "web_fetch_20250910", "name": "web_fetch"}], served({"type": "web_search"}), {}),
    ([SEARCH], served({"fields": {"enable_search": True}}), {"enable_search": True}),
    ([SEARCH, TIME], ifl.PRESETS["dashscope"].profile,
     {"tools": [function("get_time")], "enable_search": True}),
    ([SEARCH], ifl.PRESETS["zai"].profile, {"tools": [{"type": "web_search", "web_search": {
        "enable": True, "search_engine": "search-prime", "search_result": True}}]}),
    ([{"type": "mcp_toolset", "mcp_server_name": name} for name in "ab"], {}, {}),
]


@pytest.mark.parametrize("tools, profile, expected", TOOLS)
def test_tools(tools, profile, expected):
    chat = turn_of({"tools": tools}, **profile).chat
    assert {name: chat[name] for name in chat
            if name not in ("model", "messages", "max_tokens")} == expected


@pytest.mark.parametrize("kind, name, member, absent", [
    ("bash_20250124", "bash", "restart", "path"),
    ("text_editor_20250728", "str_replace_based_edit_tool", "str_replace", "undo_edit"),
    ("text_editor_20241022", "str_replace_editor", "undo_edit", "rename"),
    ("memory_20250818", "memory", "rename", "undo_edit")])
def test_typed_client_tools_get_schemas(kind, name, member, absent):
    tool, = turn_of({"tools": [{"type": kind, "name": name}]}).chat["tools"]
    assert tool["function"]["name"] == name and tool["function"]["parameters"]["properties"]
    assert member in json.dumps(tool) and absent not in json.dumps(tool)


ONE_BY_ONE = {"type": "any", "disable_parallel_tool_use": True}
CHOICES = [
    (ONE_BY_ONE, {}, {"tool_choice": "required", "parallel_tool_calls": False}),
    (ONE_BY_ONE, {"parallel_tool_calls": False}, {"tool_choice": "required"}),
    ({"type": "auto", "disable_parallel_tool_use": False}, {}, {"tool_choice": "auto"}),
    ({"type": "tool", "name": "get_time"}, {},
     {"tool_choice": {"type": "function", "function": {"name": "get_time"}}}),
    ({"type": "tool", "name": "web_search"}, {}, {"tool_choice": "auto"}),
]


@pytest.mark.parametrize("choice, profile, expected", CHOICES)
def test_tool_choice(choice, profile, expected):
    chat = turn_of({"tools": [TIME, SEARCH], "tool_choice": choice}, **profile).chat
    assert {name: chat[name] for name in ("tool_choice", "parallel_tool_calls")
            if name in chat} == expected


def test_no_tool_left_means_no_choice():
    choice = {"type": "tool", "name": "web_search"}
    chat = turn_of({"tools": [SEARCH], "tool_choice": choice}).chat
    assert "tools" not in chat and "tool_choice" not in chat
    with pytest.raises(ifl.BadRequest, match="web_search"):
        turn_of({"tools": [SEARCH]}, server_tools="error")


def test_long_names_there_and_back():
    turn = turn_of({"tools": [{"name": LONG, "input_schema": {}}],
                    "tool_choice": {"type": "tool", "name": LONG},
                    "messages": [user("q"), assistant(use("a", LONG)), user(result("a", "1"))]})
    short = turn.chat["tools"][0]["function"]["name"]
    assert len(short) <= 64 and turn.chat["tool_choice"]["function"]["name"] == short
    assert turn.chat["messages"][1]["tool_calls"][0]["function"]["name"] == short
    answer = completion(None, tool_calls=[call("x", short)])
    message = turn.stream(ids()).whole(answer)
    assert message["content"][0]["name"] == LONG


def test_a_request_is_left_as_it_came():
    body = {"system": [text("s")], "tools": [TIME, SEARCH],
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
            "messages": [user(text("q")), assistant(use("a")), user(result("a"))]}
    before = json.dumps(body)
    turn_of(body, structured_output="prompt")
    assert json.dumps(body) == before


def picture(**source):
    return {"messages": [user(image(**source))]}


def in_base64(data, media_type="image/png"):
    return picture(type="base64", media_type=media_type, data=data)


def schemas(*tools, **more):
    return {"tools": list(tools), **more}


BAD = [
    *({"max_tokens": wrong} for wrong in (None, "9", -1, True, 1.5, float("inf"))),
    *({"messages": wrong} for wrong in ([], None, "hi", ["hi"])),
    *({"messages": [message]} for message in (
        {"role": "tool", "content": "x"}, {"role": "user"}, {"role": "user", "content": 5},
        {"role": "user", "content": ["x"]}, {"role": "assistant", "content": "x"},
        {"role": "system", "content": "x"})),
    *({"messages": [user(block)]} for block in (
        {"type": "text"}, {"type": "text", "text": 5}, {"type": "image"}, {"type": "tool_result"},
        {"type": "document", "source": {"type": "url", "url": "https://e/a.pdf"}},
        {"type": "document", "source": {"type": "file", "file_id": "f"}},
        {"type": "document", "source": {"type": "base64", "media_type": "text/plain",
                                        "data": "QQ=="}})),
    picture(type="file", file_id="f"), picture(type="url"), picture(type="hologram"),
    in_base64(PNG, "image/tiff"), *map(in_base64, ("%%% not base64", "", "AAAAA", "AA=A")),
    *({"messages": [user("q"), assistant(block), user(result("a"))]} for block in (
        {"type": "tool_use", "id": "a"},
        {"type": "tool_use", "id": "a", "name": "f", "input": "x"})),
    {"messages": [user("q"), assistant(use("a"), use("a")), user(result("a"))]},
    {"system": 5}, {"tools": {}}, schemas("x"), schemas({"input_schema": {}}),
    schemas({"name": ""}), schemas(TIME, TIME), schemas({"name": "a", "input_schema": []}),
    schemas({"type": "computer_toolset_20260801"}),
    *(schemas({"name": name}) for name in ("a.b", "a b", "a" * 129, "天气")),
    *(schemas(TIME, tool_choice=choice) for choice in (
        "auto", {"type": "tool", "name": "nope"}, {"type": "tool"}, {"type": ["x"]})),
    {"thinking": "on"}, {"thinking": {"type": "sometimes"}}, {"thinking": {"type": []}},
    {"thinking": {"type": "enabled", "budget_tokens": "x"}},
    {"mcp_servers": [{"url": "https://m"}]}, {"thread": {"id": "t"}},
    {"compaction": {"type": "summarize"}},
    {"stop_sequences": "x"}, {"stop_sequences": [5]}, {"stop_sequences": [" \n"]},
    {"temperature": "x"}, {"top_p": True}, {"top_k": 1.5}, {"temperature": [1]},
    {"output_config": []}, {"output_config": {"format": {"type": "xml"}}},
    {"output_config": {"format": {"type": "json_schema"}}},
]


@pytest.mark.parametrize("body", BAD, ids=lambda body: json.dumps(body)[:60])
def test_bad_input(body):
    with pytest.raises(ifl.BadRequest) as caught:
        turn_of(body)
    error = ifl.messages_error(caught.value, "req_1")["error"]
    assert error["type"] == "invalid_request_error" and error["message"]


def test_what_is_odd_but_works_stays():
    body = {"temperature": 1, "stop_sequences": ["\n\nHuman:"], "tools": [{"name": "a" * 128}],
            "messages": [
                user(image(type="base64", media_type="image/png", data="QUJD\r\nRA==\n")),
                assistant(use("a")), user(result("a")), assistant(use("a")), user(result("a"))]}
    chat = turn_of(body).chat
    assert [m["role"] for m in chat["messages"]] == [
        "user", "assistant", "tool", "assistant", "tool"]
    assert (chat["temperature"], chat["stop"]) == (1, ["\n\nHuman:"])
    assert len(chat["tools"][0]["function"]["name"]) == 64


def test_counting():
    def count(**body):
        return ifl.count_message_tokens({"messages": [user("q")], **body})

    assert count(system="a" * 350) - count() == 104
    assert 80 <= count(system="汉" * 120) - count() <= 90
    assert count(tools=[WEATHER]) > count() + 20 and count(tools=[]) == count()
    for source in ({}, {"type": "url", "url": "https://e"}):
        assert count(messages=[user(image(**source))]) == 1504
    thinks = {"type": "thinking", "thinking": "a", "signature": "x" * 9999}
    assert count(messages=[user("q"), assistant(thinks), user("r")]) < 50
    assert count(compaction={"type": "summarize"}) == count()
    with pytest.raises(ifl.BadRequest):
        count(messages=[])


def test_reasoning_details_of_a_plain_answer_stay_apart():
    given = [{"type": "reasoning.text", "text": "a"}, {"type": "reasoning.text", "text": "b"},
             {"type": "reasoning.encrypted", "data": "c"}]
    block, _ = reply(content="x", reasoning_details=given)["content"]
    assert ifl.read_signature(block["signature"])["details"] == given
    known = ifl.Details()
    for piece in ([{"type": "t", "text": "a"}], [{"type": "t", "text": "b"}],
                  [{"type": "t", "text": "c", "index": 1}, {"type": "t", "text": "d", "index": 1}]):
        known.add(piece)
    assert known.joined() == [{"type": "t", "text": "ab"}, {"type": "t", "text": "cd", "index": 1}]


STREAMED_PLAIN = [
    (HELLO, completion("Hello")["choices"][0]["message"], "stop"),
    ([chunk(None, reasoning_content="be"), chunk(None, reasoning_content="cause"),
      chunk(None, tool_calls=[{"index": 0, "id": "a", "type": "function",
                               "function": {"name": "look", "arguments": ""}}]),
      chunk(None,
            tool_calls=[{"index": 1, "id": "b", "function": {"name": "see", "arguments": "{}"}}]),
      chunk(None, tool_calls=[{"index": 0, "function": {"arguments": '{"x":'}}]),
      chunk(None, tool_calls=[{"index": 0, "function": {"arguments": "1}"}}]),
      chunk(finish="tool_calls")],
     {"role": "assistant", "content": None, "reasoning_content": "because", "tool_calls": [
         call("a", "look", '{"x":1}'), call("b", "see", "{}")]}, "tool_calls")]


@pytest.mark.parametrize("items, message, finish", STREAMED_PLAIN)
def test_a_stream_that_nobody_asked_for_becomes_a_plain_answer(server, upstream, items, message,
                                                               finish):
    running = server(upstream)
    for kind in ("text/event-stream", "application/json", ""):
        body = b": hello\n\n" * (kind == "") + wire_of(items)
        upstream.plays(*[Reply(head(200, [("Content-Type", kind),
                                          ("Content-Length", str(len(body)))]) + body)] * 2)
        answer = post(running, chat())
        assert answer.headers["content-type"] == "application/json"
        assert answer.json["object"] == "chat.completion"
        assert answer.json["choices"] == [{"message": message, "index": 0, "finish_reason": finish}]
        told = post(running, {"model": "m1", "max_tokens": 9, "messages": [user("q")]},
                    "/v1/messages").json
        assert told["stop_reason"] == ("end_turn" if finish == "stop" else "tool_use")


@pytest.mark.parametrize("items, status, said", [
    ([chunk("Hi")], 502, "cut off"), ([{"error": {"message": "slow", "code": 429}}], 429, "slow"),
    ([DONE], 502, "empty")])
def test_a_stream_that_nobody_asked_for_may_be_a_failure(server, upstream, items, status, said):
    running = server(upstream)
    upstream.plays(sse(*items))
    answer = post(running, chat())
    assert answer.status == status and said in answer.error["message"]


# --- answers

def play(chunks, body=None, **profile):
    writer = writer_of("messages", body, **profile)
    return [event for each in chunks for event in writer.feed(each)] + list(writer.close())


def reply(body=None, finish="stop", profile=None, usage=USAGE_MESSAGES, **message):
    """The message for a plain answer."""
    answer = completion(**{"content": None, "finish": finish, **message})
    return writer_of("messages", body, **(profile or {})).whole({**answer, "usage": usage})


def check(events):
    """What holds for every stream: one open block, indexes 0, 1, 2 …, deltas that fit, an end."""
    fits = {"server_tool_use": ["input_json_delta"], "web_search_tool_result": [],
            "text": {"text_delta"}, "thinking": {"thinking_delta", "signature_delta"},
            "tool_use": {"input_json_delta"}}
    assert [event["type"] for event in events[:1] + events[-2:]] == [
        "message_start", "message_delta", "message_stop"]
    opened, count, signed = None, 0, False
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert opened is None and event["index"] == count
            opened, count, signed = event["content_block"], count + 1, False
            assert opened["type"] != "tool_use" or (
                opened["id"] and opened["name"] and opened["input"] == {})
        elif event["type"] == "content_block_delta":
            kind = event["delta"]["type"]
            assert event["index"] == count - 1 and kind in fits[opened["type"]] and not signed
            signed = kind == "signature_delta"
            assert signed or "" not in list(event["delta"].values())
        else:
            assert event["type"] == "content_block_stop" and event["index"] == count - 1 and opened
            assert opened["type"] != "thinking" or signed
            opened = None
    assert opened is None and isinstance(events[-2]["usage"]["output_tokens"], int)
    assert events[-2]["delta"]["stop_reason"]
    return events


def fold(events):
    """The message an SDK accumulates."""
    message, texts = json.loads(json.dumps(check(events)[0]["message"])), []
    for event in events:
        if event["type"] == "content_block_start":
            message["content"].append(dict(event["content_block"]))
            texts.append("")
        elif event["type"] == "content_block_delta":
            block, change = message["content"][event["index"]], event["delta"]
            if change["type"] == "signature_delta":
                block["signature"] = change["signature"]
            elif change["type"] == "input_json_delta":
                texts[event["index"]] += change["partial_json"]
            else:
                block[block["type"]] += change[block["type"]]
    for block, given in zip(message["content"], texts):
        if block["type"] in ("tool_use", "server_tool_use"):
            block["input"] = json.loads(given or "{}")
    message.update(events[-2]["delta"])
    message["usage"].update(events[-2]["usage"])
    return message


def sent_arguments(events):
    return "".join(event["delta"].get("partial_json", "") for event in events
                   if event["type"] == "content_block_delta")


def test_reply_frame():
    assert reply(content="Hi") == {
        "id": "msg_" + "1".zfill(24), "type": "message", "role": "assistant", "model": "m1",
        "content": [text("Hi")], "stop_reason": "end_turn", "stop_sequence": None,
        "stop_details": None, "usage": {
            "input_tokens": 10, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
            "output_tokens": 5, "service_tier": "standard"}}


ARGUMENTS = [
    ("", {}), (None, {}), ("  ", {}), ("null", {}), ('""', {}), ('{"a": 1}', {"a": 1}),
    ({"a": 1}, {"a": 1}), ('"{\\"a\\": 1}"', {"a": 1}), ('{"a":1}{"a":1}', {"a": 1}),
    ('{"a":1}\n', {"a": 1}), ("{'cmd': 1}", {"INVALID_JSON": "{'cmd': 1}"}),
    ('{"cmd": "ls" -la}', {"cmd": "ls", "INVALID_JSON": '{"cmd": "ls" -la}'}),
    ('{"cmd": "l', {"cmd": "l", "INVALID_JSON": '{"cmd": "l'}),
    ('{"a": [1, 2,], "b": {"c": 3,},}', {"a": [1, 2], "b": {"c": 3}}),
    ('{"a": "x\ny\tz"}', {"a": "x\ny\tz"}), ('{"a": {"b": [1, 2]', {"a": {"b": [1, 2]}}),
    ('{"re": "\\d+\\.", "on": True, "off": None}', {"re": "\\d+\\.", "on": True, "off": None}),
    ('[{"a": 1}]', {"a": 1}), ('```json\n{"a": "`b`",}\n```', {"a": "`b`"}),
    ('```\n{"a": 1}```', {"a": 1}), ("[1]", {"INVALID_JSON": "[1]"}),
    ('{"a": NaN}', {"a": None, "INVALID_JSON": '{"a": NaN}'}), ('{"a":"}{"}', {"a": "}{"}),
    ('{"a":"\\"}"}', {"a": '"}'}), ("[" * 50000, {"INVALID_JSON": "[" * 50000}),
    # numbers that could not be written again
    ('{"x": 1e999}', {"INVALID_JSON": '{"x": 1e999}'}),
    ('"{\\"x\\": 1e999}"', {"INVALID_JSON": '"{\\"x\\": 1e999}"'})]


@pytest.mark.parametrize("given, expected", ARGUMENTS, ids=lambda value: str(value)[:30])
def test_arguments(given, expected):
    block, = reply(tool_calls=[call("a", arguments=given)], finish="tool_calls")["content"]
    assert block["input"] == expected
    if isinstance(given, str) and given.strip() and len(given) < 1000 and "1e999" not in given:
        for size in (1, 3, 99):
            chunks = [tools(tool(0, "a", "f", ""))] + [
                tools(tool(0, arguments=given[at:at + size])) for at in range(0, len(given), size)]
            streamed, = fold(play(chunks))["content"]
            assert streamed["input"].keys() == expected.keys()


@pytest.mark.parametrize("cut, expected", [
    ('{"a":1,"b":"xy', {"a": 1, "b": "xy"}), ('{"a":1,"b', {"a": 1}), ('{"a":{"b":', {"a": {}}),
    ('{"a":[1,2,{"c"', {"a": [1, 2, {}]}), ('{"a":"x\\', {}), ("{", {}), ('{"a":1,', {"a": 1}),
    ('{"a":1}', {"a": 1}), ('{"a":tr', {}), ('{"x": 1e999, "y": "a', {})])
def test_arguments_cut_by_the_limit(cut, expected):
    """In a stream they stay half: no client may run them."""
    message = reply(tool_calls=[call("a", arguments=cut)], finish="length")
    assert message["content"][0]["input"] == expected and message["stop_reason"] == "max_tokens"
    events = play([tools(tool(0, "a", "f", cut)), delta("length")])
    assert check(events)[-2]["delta"]["stop_reason"] == "max_tokens"
    assert "1e999" in cut or sent_arguments(events) == cut


def test_mending_leaves_json_as_it_is():
    text = json.dumps({"a": [1.5e-7, True, None, "é\\\"\n😀\u2028"], "b": {}, "c": [],
                       "": {"x": [[], {}]}}, indent=1)
    for size in range(1, 12):
        mender = ifl.ObjectMender()
        pieces = [mender.feed(text[at:at + size]) for at in range(0, len(text), size)]
        assert "".join(pieces) == text == mender.raw() and mender.complete
        assert mender.close() == "" == mender.feed("more")


def test_a_cut_call_of_nothing_but_brackets_takes_little_memory():
    tracemalloc.start()
    try:
        for size in (600, 20_000):
            assert ifl.partial_object('{"a":' + "[" * size) == {}
        assert ifl.partial_object('{"a":' + "[" * 20) != {}
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


#: (finish_reason, whether a tool was called, stop_reason)
STOPS = [
    ("stop", False, "end_turn"), ("eos", False, "end_turn"), (None, False, "end_turn"),
    (5, False, "end_turn"), ("stop", True, "tool_use"), ("tool_calls", True, "tool_use"),
    ("tool_calls", False, "end_turn"), ("function_call", True, "tool_use"),
    ("length", True, "max_tokens"), ("length", False, "max_tokens"),
    ("repetition_truncation", False, "max_tokens"), ("content_filter", False, "refusal"),
    ("sensitive", False, "refusal"),
    ("model_context_window_exceeded", False, "model_context_window_exceeded")]


@pytest.mark.parametrize("finish, called, reason", STOPS)
def test_stop_reasons(finish, called, reason):
    given = {"tool_calls": [call("a")]} if called else {}
    message = reply(finish=finish, content="x", **given)
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, None)
    assert message["stop_details"] == ({"type": "refusal", "category": None, "explanation": None}
                                       if reason == "refusal" else None)
    assert reply(refusal="No.")["stop_reason"] == "refusal"


@pytest.mark.parametrize("fields, expected", [
    ({"stop_reason": "END"}, ("stop_sequence", "END")), ({"stop_reason": "x"}, ("end_turn", None)),
    ({"stop_reason": 151645}, ("end_turn", None)),
    ({"matched_stop": "END"}, ("stop_sequence", "END"))])
def test_stop_sequences_told_by_the_upstream(fields, expected):
    answer = completion("a")
    answer["choices"][0].update(fields)
    message = writer_of("messages", {"stop_sequences": ["END"]}).whole(answer)
    assert (message["stop_reason"], message["stop_sequence"]) == expected


@pytest.mark.parametrize("content, expected, sequence", [
    ("one STOP two", "one ", "STOP"), ("one STO", "one STO", None), ("a ENDING", "a ", "END"),
    ("STOP", "", "STOP"), ("nothing", "nothing", None)])
def test_stop_sequences_beyond_the_fourth_are_watched(content, expected, sequence):
    body = {"stop_sequences": ["1", "2", "3", "4", "STOP", "END"]}
    called = [tools(tool(0, "a", "f", "{}"))]
    for chunks in cut_in([1], content):
        message = fold(play([*chunks, *called * bool(sequence), delta("stop")], body))
        assert message["content"] == ([text(expected)] if expected else [])
        assert (message["stop_reason"], message["stop_sequence"]) == (
            "stop_sequence" if sequence else "end_turn", sequence)
    message = fold(play([delta(content="one STO"), *called], body))
    assert message["content"] == [text("one STO"), use("a", "f")]


@pytest.mark.parametrize("usage, expected", [
    ({"prompt_tokens": 1000, "completion_tokens": 7,
      "prompt_tokens_details": {"cached_tokens": 600, "cache_write_tokens": 300}},
     (100, 300, 600, 7, None)),
    ({"prompt_tokens": 100, "completion_tokens": 7, "cached_tokens": 100}, (0, 0, 100, 7, None)),
    ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 30,
      "completion_tokens_details": {"reasoning_tokens": 15}}, (10, 0, 0, 20, 15))])
def test_usage(usage, expected):
    """A plain answer's, and a stream's wherever it comes."""
    ends = [[{**delta("stop"), "usage": usage}], [delta("stop"), {"choices": [], "usage": usage}],
            [{"choices": [{"delta": {}, "finish_reason": "stop", "usage": usage}]}],
            [{**delta("stop"), "usage": usage}, {"choices": [], "usage": None}]]
    told = [fold(play([delta(content="a"), *end])) for end in ends]
    for got in [reply(usage=usage, content="x"), *told]:
        got = got["usage"]
        made = got.get("output_tokens_details", {}).get("thinking_tokens")
        assert (got["input_tokens"], got["cache_creation_input_tokens"],
                got["cache_read_input_tokens"], got["output_tokens"], made) == expected


def test_illegal_ids_come_back_as_they_were():
    block, = reply(tool_calls=[call("functions.a:0", "a")])["content"]
    assert ifl._LEGAL_ID.fullmatch(block["id"])
    history = [user("q"), assistant(block), user(result(block["id"], [image()]))]
    messages = turn_of({"messages": history}).chat["messages"]
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == "functions.a:0"
    assert messages[3]["content"][0]["text"] == "Attachment(s) of tool result functions.a:0:"


def test_ids_of_the_conversation_are_not_used_again():
    history = {"messages": [user("q"), assistant(use("call_0")), user(result("call_0", "1"))]}
    assert reply(history, tool_calls=[call("call_0")])["content"][0]["id"] != "call_0"


@pytest.mark.parametrize("ident", [
    "toolu_01A09q90qw", "call_1", "toolu_1_raw_!", "toolu_1_raw__w", ""])
def test_foreign_ids_stay(ident):
    assert ifl.unwrap_id(ident) == ident


def test_max_tokens_zero_is_answered_here():
    asked = {"model": "m1", "max_tokens": 0, "messages": MESSAGES}
    message = json.loads(translation_of(call_of(asked, dialect=ifl.MESSAGES)).local)
    assert message["content"] == [] and message["stop_reason"] == "max_tokens"
    assert message["usage"]["output_tokens"] == 0
    events = translation_of(call_of({**asked, "stream": True}, dialect=ifl.MESSAGES)).local
    assert [event["type"] for event in events_in(events)] == [
        "message_start", "message_delta", "message_stop"]
    assert translation_of(call_of({**asked, "max_tokens": 1}, dialect=ifl.MESSAGES)).local is None


DETAILS = [{"type": "reasoning.text", "text": "pl", "index": 0},
           {"type": "reasoning.text", "text": "an", "index": 0, "signature": "s"},
           {"type": "reasoning.encrypted", "data": "e", "index": 1}]
MERGED = [{"type": "reasoning.text", "text": "plan", "index": 0, "signature": "s"},
          {"type": "reasoning.encrypted", "data": "e", "index": 1}]


def test_signature_carries_reasoning_details():
    chunks = [delta(reasoning_details=[detail]) for detail in DETAILS] + [delta(content="x")]
    for message in (fold(play(chunks)), reply(content="x", reasoning_details=MERGED)):
        content = message["content"]
        assert content[0]["thinking"] == "plan"
        assert content[0]["signature"].startswith(ifl.SIGNATURE_PREFIX)
        again = turn_of({"messages": [user("q"), assistant(*content), user("r")]})
        assert again.chat["messages"][1] == {
            "role": "assistant", "content": "x", "reasoning_content": "plan",
            "reasoning_details": MERGED}


@pytest.mark.parametrize("display", ["omitted", "updates"])
def test_omitted_thinking_travels_in_the_signature(display):
    body = {"thinking": {"type": "adaptive", "display": display}}
    events = play([delta(reasoning_content="pl"), delta(reasoning_content="an"),
                   delta(content="x")], body)
    assert "thinking_delta" not in [event.get("delta", {}).get("type") for event in events]
    for message in (fold(events), reply(body, content="x", reasoning_content="plan")):
        content = message["content"]
        assert content[0]["thinking"] == "" and "plan" not in content[0]["signature"]
        again = turn_of({"messages": [user("q"), assistant(*content), user("r")]})
        assert again.chat["messages"][1]["reasoning_content"] == "plan"


@pytest.mark.parametrize("signature", [
    "", None, 5, "EqMDCk…", ifl.SIGNATURE_PREFIX + "!!", ifl.SIGNATURE_PREFIX + "W10=",
    ifl.SIGNATURE_PREFIX + base64.b64encode(b'{"details": [NaN]}').decode(),
    ifl.SIGNATURE_PREFIX + "eA=="])
def test_foreign_signatures(signature):
    assert ifl.read_signature(signature) == {}


@pytest.mark.parametrize("message, parts", [
    ({"content": "42", "reasoning_content": "hmm"}, ["42"]),
    ({"reasoning_content": "hmm"}, ["hmm"]),
    ({"reasoning_content": "hmm", "tool_calls": [call("a")]}, [("get_time", "a", {})])])
def test_hidden_reasoning(message, parts):
    turn = turn_of({})
    turn.hide_reasoning = True
    answer = completion(**{"content": None, **message})
    assert parts_of(turn.stream(ids()).whole(answer)) == parts


def test_events_come_as_early_as_they_can():
    turn = turn_of({"system": "s" * 3500})
    writer = turn.stream(ids())
    start, = writer.feed({"choices": []})
    assert start["message"]["usage"]["input_tokens"] == turn.estimate >= 1000
    list(writer.feed(tools(tool(0, "a", "f", '{"x'))))
    event, = writer.feed(tools(tool(0, arguments='":')))
    assert event["delta"] == {"type": "input_json_delta", "partial_json": '":'}
    assert list(writer.feed(delta(content="by the way"))) == []          # waits for the call's end
    *_, last = writer.feed(tools(tool(0, arguments="1}")))
    assert last["delta"] == {"type": "text_delta", "text": "by the way"}


# --- errors

@pytest.mark.parametrize("status, sent, kind", [
    *((status, status, "invalid_request_error") for status in (400, 405)),
    (422, 400, "invalid_request_error"), (401, 401, "authentication_error"),
    (402, 402, "billing_error"), (403, 403, "permission_error"), (404, 404, "not_found_error"),
    (408, 504, "timeout_error"), (409, 409, "conflict_error"), (413, 413, "request_too_large"),
    (429, 429, "rate_limit_error"), (500, 500, "api_error"), (502, 502, "api_error"),
    (503, 529, "overloaded_error"), (504, 504, "timeout_error"), (529, 529, "overloaded_error")])
def test_statuses(status, sent, kind):
    assert ifl.messages_status(status) == sent
    assert ifl.messages_error(ifl.UpstreamRefused("Nope", status=status), "req_1") == {
        "type": "error", "error": {"type": kind, "message": "Nope"}, "request_id": "req_1"}


OVERFLOWS = [
    ("This model's maximum context length is 131072 tokens. However, you requested 131134 "
     "tokens (122942 in the messages, 8192 in the completion). Please reduce the length of "
     "the messages or completion.", (122942, 131072, 8192)),
    ("This model's maximum context length is 8192 tokens. However, you requested 8213 tokens"
     " (6683 in the messages, 730 in the functions, and 800 in the completion).",
     (7413, 8192, 800)),
    ("This model's maximum context length is 8191 tokens, however you requested 10346 tokens"
     " (10341 in your prompt; 5 for the completion).", (10341, 8191, 5)),
    ("This model's maximum context length is 8192 tokens. However, your messages resulted in"
     " 8202 tokens. Please reduce the length of the messages.", (8202, 8192, 0)),
    ("Your input exceeds the context window of this model. Please adjust your input and try "
     "again.", (0, 0, 0)),
    ("This model's maximum context length is 32768 tokens. However, you requested 32000 "
     "output tokens and your prompt contains at least 769 input tokens, for a total of at "
     "least 32769 tokens. (parameter=input_tokens)", (769, 32768, 32000)),
    ("This model's maximum context length is 262144 tokens. However, you requested 0 output "
     "tokens and your prompt contains at least 262145 input tokens", (262145, 262144, 0)),
    ("'max_tokens' or 'max_completion_tokens' is too large: 32000. This model's maximum "
     "context length is 32768 tokens and your request has 1234 input tokens (32000 > 32768 -"
     " 1234).", (1234, 32768, 32000)),
    ("The decoder prompt (length 21535) is longer than the maximum model length of 16384. "
     "Make sure …", (21535, 16384, 0)),
    ("Requested token count exceeds the model's maximum context length of 131072 tokens. You"
     " requested a total of 524300.0 tokens: 12 tokens from the input messages and 524288.0 "
     "tokens for the completion.", (12, 131072, 524288)),
    ("The input (61709 tokens) is longer than the model's context length (40960 tokens).",
     (61709, 40960, 0)),
    ("request (14429 tokens) exceeds the available context size (8192 tokens), try "
     "increasing it", (14429, 8192, 0)),
    ('{"error":{"code":400,"message":"the request exceeds the available context size. try '
     '…","type":"exceed_context_size_error","n_prompt_tokens":14429,"n_ctx":8192}}',
     (14429, 8192, 0)),
    ("the request exceeds the available context size, try increasing it", (0, 0, 0)),
    ("prompt too long; exceeded max context length by 812 tokens", (0, 0, 0)),
    ("the input length exceeds the context length", (0, 0, 0)),
    ("input length (9533 tokens) exceeds the model's maximum context length (2048 tokens)",
     (9533, 2048, 0)),
    ("Invalid request: Your request exceeded model token limit: 262144 (requested: 269030)",
     (269030, 262144, 0)),
    ("Invalid request: Your request exceeded model token limit: 8192", (0, 8192, 0)),
    ("Prompt exceeds max length", (0, 0, 0)),
    ("<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 204800]",
     (0, 204800, 0)),
    ("内容长度超出大语言模型限制。TraceID：00-19e4", (0, 0, 0)),
    ("Input length 203743 exceeds the maximum length 202752", (203743, 202752, 0)),
    ("number of input tokens (83121) have exceeded max_prompt_tokens (65536) limit.",
     (83121, 65536, 0)),
    ("invalid params, context window exceeds limit (2013)", (0, 0, 0)),
    ("This model's maximum prompt length is 131072 but the request contains 537812 tokens.",
     (537812, 131072, 0)),
    ("prompt is too long: 213462 tokens > 200000 maximum", (213462, 200000, 0)),
    ("The number of tokens to keep from the initial prompt is greater than the context "
     "length", (0, 0, 0)),
    ("You passed 40000 input tokens and requested 100 output tokens. However, the model's "
     "context length is only 32768 tokens, resulting in a maximum input length of 32668 "
     "tokens.", (40000, 32768, 100)),
    ("This model's maximum context length is 32768 tokens. However, your request has 40000 "
     "input tokens. Please reduce the length of the input messages.", (40000, 32768, 0)),
    ("<400> InternalError.Algo.InvalidParameter: Input length too long or total message "
     "token length must be less than 30720", (0, 30720, 0)),
    ("Total message token length exceed model limit (131072 tokens).", (0, 131072, 0)),
    ("Invalid request: Input token length too long", (0, 0, 0)),
    ("input tokens exceed the maximum: 202752", (0, 202752, 0)),
    ("input length too long", (0, 0, 0))]


@pytest.mark.parametrize("message, expected", OVERFLOWS, ids=lambda value: str(value)[:40])
def test_overflow_in_every_wording(message, expected):
    assert ifl.find_overflow(400, message, None) == expected


@pytest.mark.parametrize("status, message, code, expected", [
    (400, "bad", "1261", (0, 0, 0)), (400, "bad", 1261, (0, 0, 0)), (200, "", "511", (0, 0, 0)),
    (400, None, "context_length_exceeded", (0, 0, 0)),
    (500, "the request exceeds the available context size", None, (0, 0, 0)),
    (429, "Request too large on tokens per min (TPM): maximum context length", None, None),
    (400, "bad", None, None), (400, {}, None, None),
    (400, "max_tokens is too large: 10000. This model supports at most 4096 completion tokens",
     None, None), (400, "Range of max_tokens should be [1, 8192]", "invalid_parameter_error", None),
    (400, "model not found", None, None)])
def test_overflow_by_code_and_what_is_none(status, message, code, expected):
    assert ifl.find_overflow(status, message, code) == expected


def test_a_total_without_its_parts_is_told_apart_by_what_was_asked_for():
    """Moonshot's number has max_tokens in it: Claude Code may have to shrink that."""
    said = "Your request exceeded model token limit: 8192 (requested: 9000)"
    assert ifl.find_overflow(400, said, None, 4000) == (5000, 8192, 4000)
    assert ifl.overflow_text(ifl.find_overflow(400, said, None, 100)) == (
        "prompt is too long: 8900 tokens > 8192 maximum")


@pytest.mark.parametrize("message, told", [
    ("input length too long", "prompt is too long: {0} tokens > {1} maximum"),
    ("Range of input length should be [1, 30]", "prompt is too long: {0} tokens > 30 maximum"),
    ("Range of input length should be [1, 99999]",
     "prompt is too long: 100000 tokens > 99999 maximum"),
    ("Your request exceeded model token limit: 8000 (requested: 8100)",
     "input length and `max_tokens` exceed context limit: 7100 + 1000 > 8000, "
     "decrease input length or `max_tokens` and "
     "try again")])
def test_an_overflow_without_numbers_tells_our_own(server, upstream, message, told):
    running = server(provider(upstream, models=["m1"]))
    upstream.plays(plain({"error": {"message": message}}, 400))
    ask = {"model": "m1", "max_tokens": 1000, "messages": [user("word " * 100)]}
    guess = post(running, ask, "/v1/messages/count_tokens").json["input_tokens"]
    answer = post(running, ask, "/v1/messages")
    assert (answer.status, answer.json["error"]["message"]) == (400, told.format(guess, guess - 1))


@pytest.mark.parametrize("status, error, spent", [
    (429, {"code": "1113", "message": "您的账户已欠费，请充值后重试"}, True),
    (429, {"code": 1113, "message": "no"}, True),
    (429, {"code": "insufficient_quota", "message": "You exceeded your current quota"}, True),
    (402, {"message": "Insufficient Balance"}, True),
    (400, {"code": "Arrearage", "message": "Access denied"}, True),
    (429, {"message": "余额不足或无可用资源包"}, True),
    (429, {"message": "slow down", "code": "1302"}, False),
    (500, {"message": "oops"}, False)])
def test_what_no_waiting_heals_is_not_to_be_tried_again(server, upstream, status, error, spent):
    running = server(upstream)
    upstream.plays(plain({"error": error}, status))
    answer = ask_in(running, "/v1/messages", False)
    assert answer.status == status
    assert answer.headers.get("x-should-retry") == ("false" if spent else None)


@pytest.mark.parametrize("text, seconds", [
    ("Please retry in 36.5s.", 36.5), ("Please try again in 2m3s.", 123),
    ("retry after 20 ms", 0.02),
    ("Rate limit reached. Try again in 1h2m3.5s", 3723.5), ("try again after 2 minutes", 120),
    ("try again in 1 minute 30 seconds", 90), ("请在 30 秒后重试", 30),
    ("请1分30秒后再试", 90), ("请在 24 小时内充值", None),
    ("retry after 2026-12-01", None),
    ('{"retryDelay": "36s"}', 36), ("Retry-After: 7", 7), ("retry_after_seconds=12", 12),
    ("slow down and try again", None), ("limit: 10 in 60s", None), ("retry in a while", None)])
def test_the_wait_that_a_refusal_tells(text, seconds):
    assert [ifl.find_delay(status, text) for status in (429, 503, 529)] == [seconds] * 3
    assert ifl.find_delay(400, text) is None


QUOTA = ("You exceeded your current quota, please check your plan and billing details.\n"
         "* Quota exceeded for metric: requests, limit: 10")
RETRY_INFO = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "36s"}]


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("error, headers", [
    ({"message": QUOTA + "\nPlease retry in 35.5s."}, []),
    ({"message": QUOTA, "details": RETRY_INFO}, []),
    ({"message": "余额不足，请在 36 秒后重试"}, []), ({"message": QUOTA}, [("Retry-After", "36")])])
@pytest.mark.parametrize("in_list", [True, False])
def test_a_quota_that_comes_back_is_a_limit(server, upstream, path, stream, error, headers,
                                            in_list):
    body = {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", **error}}
    upstream.plays(plain([body] if in_list else body, 429, headers))
    answer = ask_in(server(upstream), path, stream)
    assert (answer.status, answer.headers["retry-after"]) == (429, "36")
    assert answer.headers.get("x-should-retry") is None
    assert error["message"][:20] in said_in(path, answer)


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("wrap", [
    plain, lambda body: plain(body, content_type="text/event-stream"), lambda body: sse(body)])
def test_an_error_in_a_list_is_read_wherever_it_comes(server, upstream, path, stream, wrap):
    upstream.plays(wrap([{"error": {"code": 404, "message": "Nothing here."}}]))
    answer = ask_in(server(upstream), path, stream)
    assert answer.status == 404 and said_in(path, answer) == "Nothing here."


# --- what an upstream refuses

AGENT_TOOL = {"name": "f", "description": "d", "strict": True,
              "input_schema": {"type": "object", "properties": {}}}
#: What Claude Code and Codex send, and a chat client that wants as much.
AGENT_ASKS = {
    "/v1/messages": {
        "max_tokens": 32000, "thinking": {"type": "adaptive"}, "output_config": {"effort": "high"},
        "metadata": {"user_id": "u"}, "tools": [AGENT_TOOL], "system": "Be good.", "messages": [
            *MESSAGES, {"role": "system", "content": "Note."},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1",
                                          "content": "1"}]},
            {"role": "system", "content": "Late."}]},
    "/v1/responses": {
        "reasoning": {"effort": "high", "summary": "auto"}, "store": False, "tool_choice": "auto",
        "parallel_tool_calls": True, "prompt_cache_key": "k", "max_output_tokens": 32000,
        "include": ["reasoning.encrypted_content"], "user": "u",
        "tools": [{"type": "function", "name": "f", "strict": True, "parameters": {
            "type": "object", "properties": {}}}],
        "input": [{"role": "developer", "content": "Be good."}, {"role": "user", "content": "q"},
                  {"role": "developer", "content": "Note."}]},
    "/v1/chat/completions": {
        "max_tokens": 32000, "thinking": {"type": "enabled"}, "reasoning_effort": "high",
        "parallel_tool_calls": True, "user": "u", "messages": [
            {"role": "system", "content": "Be good."}, *MESSAGES,
            {"role": "system", "content": "Note."},
            {"role": "assistant", "content": "A.", "reasoning_content": "Hm."}, *MESSAGES]}}
THINKING = ("thinking", "enable_thinking", "reasoning_effort")


def told_of(message, **more):
    return {"error": {"message": message, "type": "invalid_request_error", **more}}


#: kind of upstream, the fields it refuses, how it says so: status and body for a list of them.
STRICT_UPSTREAMS = [
    ("groq", ("thinking", "reasoning_content"), 400, lambda names: told_of(
        f"'messages.2' : property '{names[0]}' is unsupported")),
    ("cerebras", (*THINKING, "reasoning_content", "reasoning"), 400, lambda names: {
        "message": f"messages.1.assistant.{names[0]}: property is unsupported"
                   if "content" in names[0] else f"property '{names[0]}' is unsupported",
        "type": "invalid_request_error", "param": "validation_error", "code": "wrong_api_format"}),
    ("mistral", (*THINKING, "stream_options", "user", "strict"), 422, lambda names: {"detail": [
        {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted",
         "input": {"temperature": 1}} for name in names]}),
    ("gemini", (*THINKING, "user", "parallel_tool_calls", "store"), 400, lambda names: [told_of(
        "\n".join(f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.'
                  for name in names), code=400, status="INVALID_ARGUMENT")]),
    ("azure", ("thinking", "max_tokens"), 400, lambda names: told_of(
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead." if names[0] == "max_tokens" else
        f"Unrecognized request argument supplied: {names[0]}",
        param=names[0] if names[0] == "max_tokens" else None)),
    ("openai", (*THINKING, "max_tokens", "strict"), 400, lambda names: told_of(
        f"Unsupported parameter: '{names[0]}'.", code="unsupported_parameter",
        param=f"tools[0].function.{names[0]}" if names[0] == "strict" else names[0])),
    ("vllm", ("middle", "twice", "thinking"), 400, lambda names: {
        "object": "error", "type": "BadRequestError", "param": None, "code": 400, "message": {
            "middle": "System message must be at the beginning.",
            "twice": "Conversation roles must alternate user/assistant/user/assistant/..."}.get(
            names[0], "[{'type': 'extra_forbidden', 'loc': ('body', 'thinking'), 'msg': 'Extra "
                      "inputs are not permitted', 'input': {'type': 'enabled'}}]")}),
    ("qwen", ("enable_thinking", "plain thinking"), 400, lambda names: told_of(
        "parameter.enable_thinking must be set to false for non-streaming calls"
        if "plain thinking" in names else "不支持参数 'enable_thinking'")),
    ("relay", ("thinking",), 400, lambda names: told_of("不支持的参数：`thinking`"))]


def what_is_wrong(body, refused):
    """Those of the refused fields and orders that a chat request has."""
    roles = [message["role"] for message in body["messages"]]
    inner = {name for message in body["messages"] for name in message}
    inner |= {name for tool in body.get("tools", ()) for name in tool["function"]}
    facts = {"middle": "system" in roles[1:], "twice": any(
        one == other != "tool" for one, other in zip(roles, roles[1:])),
        "plain thinking": "thinking" in body and not body.get("stream")}
    return [name for name in refused if facts.get(name, name in body or name in inner)]


def strict_upstream(refused, status, words):
    def reply(seen):
        wrong = what_is_wrong(seen.json, refused)
        return plain(words(wrong), status) if wrong else usual_reply(seen)
    return reply


@pytest.mark.parametrize("path", AGENT_ASKS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind, refused, status, words", STRICT_UPSTREAMS,
                         ids=lambda value: value if isinstance(value, str) else "")
def test_an_upstream_added_by_its_address_serves_agents_at_once(
        server, upstreams, log_lines, path, stream, kind, refused, status, words):
    fake = upstreams(usual=strict_upstream(refused, status, words))
    running, asked = server(provider(fake, models=["m1"])), []
    for _ in range(2):
        answer = ask_in(running, path, stream, **AGENT_ASKS[path])
        assert (answer.status, said_in(path, answer)) == (200, "Hello")
        asked.append(len(fake.requests))
    assert asked[1] == asked[0] + 1 <= 7
    assert what_is_wrong(fake.last.json, refused) == []
    learnt = [line for line in log_lines if '"profile": ' in line.getMessage()]
    assert len(learnt) == (asked[0] > 1)


def asked_change(message, sent, learnt=None, **facts):
    exc = ifl.UpstreamRefused(message, **{"status": 400, **facts})
    return ifl.find_changes(exc, ifl.dump_json(sent), learnt or {})


def left(*names):
    return {"leave_out": list(names)}


REFUSED_FORM = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
TEXTS = {"messages": MESSAGES}


@pytest.mark.parametrize("message, sent, facts, changes", [
    ("Unrecognized request arguments supplied: thinking, top_k", {"thinking": {}, "top_k": 1}, {},
     left("thinking", "top_k")),
    ("Unknown parameter: 'tools[0].function.strict'.", {"tools": [
        {"type": "function", "function": {"strict": True}}]}, {}, left("strict")),
    ("Argument not supported on this model: reasoningEffort", {"reasoning_effort": "low"}, {},
     left("reasoning_effort")),
    ("Model grok does not support parameter reasoningEffort.", {"reasoning_effort": "low"}, {},
     left("reasoning_effort")),
    ("The system role is only allowed as the first message", {"messages": [
        *MESSAGES, {"role": "system", "content": "x"}]}, {}, {"mid_system": "user"}),
    ("Conversation roles must alternate", {}, {}, {}),
    ("no", {"store": True}, {"param": "store", "code": "unknown_parameter"}, left("store")),
    ("Extra inputs are not permitted, field: 'service_tier', value: 'x'", {"service_tier": "x"}, {},
     left("service_tier")),
    ("thinking.type: Extra inputs are not permitted", {"thinking": {"type": "x"}}, {},
     left("thinking")),
    ("Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) "
     "value is supported.", {"temperature": 0}, {}, left("temperature")),
    ("'temperature' is not supported above 1", {"temperature": 2}, {}, {}),
    ("Unsupported parameter: 'user'", {}, {}, {}),
    ("Unsupported parameter: 'user'", {"user": "u"}, {"status": 500}, {}),
    ("Invalid value for 'user': unknown", {"user": "u"}, {}, {}),
    ("bad", {"user": "u"}, {"param": "user", "code": "invalid_value"}, {}),
    ("The user is unknown", {"user": "u"}, {}, {}),
    ("Unsupported parameter: 'stop'", {"stop": ["x"]}, {}, {}),
    ("Unsupported parameter: 'max_completion_tokens', use 'max_tokens'",
     {"max_completion_tokens": 9}, {}, {"max_tokens_field": "max_tokens"}),
    ("Unsupported parameter: 'max_completion_tokens'", {"max_completion_tokens": 9},
     {"learnt": {"max_tokens_field": "max_completion_tokens"}}, {}),
    ("property 'reasoning' is unsupported",
     {"messages": [{"role": "assistant", "content": "", "reasoning": "x"}]}, {},
     {"reasoning_field": None}),
    ("This model does not support response format `json_schema`", {"response_format": REFUSED_FORM},
     {}, {"structured_output": "json_object"}),
    ("`response_format` is not supported", {"response_format": {"type": "json_object"}},
     {"learnt": {"structured_output": "json_object"}}, {"structured_output": "prompt"}),
    ("`response_format` is not supported", {"response_format": {"type": "json_object"}}, {}, {}),
    ("max_tokens: integer above maximum value, expected a value <= 99", {"max_tokens": 100}, {},
     {"max_output": 99}),
    ("max_tokens: integer above maximum value, expected a value <= 99", {"max_tokens": 99}, {}, {}),
    ("Rejected: property 'thinking' is unsupported, you say", {"thinking": {}, "messages": [
        {"role": "user", "content": "property 'thinking' is unsupported"}]}, {}, {}),
    ("property 'thinking' is unsupported", {"thinking": {}, "messages": [
        {"role": "user", "content": "Why? property 'thinking' is unsupported"}]}, {},
     left("thinking"))])
def test_the_change_that_a_refusal_asks_for(message, sent, facts, changes):
    assert asked_change(message, {**TEXTS, **sent}, **facts) == changes


def test_a_schema_that_is_refused_becomes_a_prompt(server, upstream):
    def reply(seen):
        form = seen.json.get("response_format")
        return plain(told_of(f"response_format `{form['type']}` is not supported"), 400) if form \
            else plain(completion("```json\n{}\n```"))
    upstream.usual = reply
    running = server(provider(upstream, models=["m1"]))
    answer = ask_in(running, "/v1/messages", False, output_config={
        "format": {"type": "json_schema", "schema": {"type": "object"}}})
    assert said_in("/v1/messages", answer) == "{}" and len(upstream.requests) == 3
    assert "fits this JSON Schema" in upstream.last.json["messages"][0]["content"]


@pytest.mark.parametrize("path", AGENT_ASKS)
@pytest.mark.parametrize("message, times, told", [
    ("property 'thinking' is unsupported", 2, "`profile` in config.json"),
    ("Invalid value: 'thinking'", 1, ""), ("'messages' is unsupported", 1, "`profile`"),
    ('You wrote "thinking", which is no good', 1, "")])
def test_a_refusal_that_nothing_helps_against_is_told(server, upstreams, path, message, times,
                                                      told):
    fake = upstreams(usual=lambda seen: plain(told_of(message), 400))
    running = server(provider(fake, models=["m1"]))
    for number in (1, 2):                # nothing is learnt
        answer = post(running, {"model": "m1", **AGENT_ASKS["/v1/chat/completions"]}) \
            if path == "/v1/chat/completions" else ask_in(running, path, False, **{
                **AGENT_ASKS[path], "reasoning": {"effort": "high", "enabled": True}})
        said = said_in(path, answer)
        assert answer.status == 400 and message in said and told in said
        sends = "thinking" in fake.requests[0].json
        assert len(fake.requests) == number * (times if sends else 1)
        assert sends or path == "/v1/responses"


def test_field_after_field_ends_in_one_sentence(server, upstreams):
    fields = ["thinking", "top_k", "store", "user", "metadata", "service_tier", "reasoning_effort"]
    fake = upstreams(usual=lambda seen: plain(told_of("Unsupported parameter: '{}'".format(
        next(name for name in fields if name in seen.json))), 400))
    answer = post(server(fake), chat(**dict.fromkeys(fields, "x")))
    assert answer.status == 400 and len(fake.requests) == 6
    assert "Unsupported parameter: 'service_tier'; provider up refuses" in answer.error["message"]
    assert '"leave_out":["metadata","store","thinking","top_k","user"]' in answer.error["message"]


@pytest.mark.parametrize("path", AGENT_ASKS)
def test_what_a_profile_leaves_out_is_never_sent(server, upstream, path):
    names = ["thinking", "reasoning_effort", "strict", "user", "parallel_tool_calls"]
    running = server(provider(upstream, profile={"leave_out": names}))
    assert ask_in(running, path, False, **AGENT_ASKS[path]).status == 200
    assert what_is_wrong(upstream.last.json, names) == [] and len(upstream.requests) == 1


def test_a_stop_sequence_of_ours_ends_the_upstream_s_stream(server, upstream):
    running = server(upstream, idle_timeout_s=60)
    upstream.plays(sse(chunk("say EN"), chunk("D and more"), HOLD))
    answer = ask_in(running, "/v1/messages", True, stop_sequences=["1", "2", "3", "4", "END"])
    assert b'"stop_sequence":"END"' in answer.body and b"message_stop" in answer.body
    assert b"and more" not in answer.body
    until(lambda: upstream.hung_up)


CAPS = [
    ("Range of max_tokens should be [1, 8192]", 8192),
    ("<400> InternalError.Algo.InvalidParameter: Range of max_tokens should be [1, 65536]", 65536),
    ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", 8192),
    ("max_tokens is too large: 32000. This model supports at most 16384 completion tokens, "
     "whereas you provided 32000.",
     16384), ("max_tokens参数非法。限制数值范围[1,4095]", 4095),
    ("`max_tokens` must be less than or equal to `8192`, "
     "the maximum value for `max_tokens` is less than the "
     "`context_window` for this model", 8192),
    ("max_completion_tokens must be less than or equal to 4096", 4096),
    ("The parameter `max_tokens` specified in the request is not valid: integer above maximum "
     "value, expected a value <= 12288, but got 16000 instead.", 12288),
    ("Invalid 'max_tokens': integer above maximum value. Expected a value <= 16,384, but got "
     "32000 instead.", 16384),
    ("max_tokens: 200000 > 64000, which is the maximum allowed number of output tokens", 64000),
    ("integer above maximum value, expected a value <= 12288", 0),
    ("max_tokens 不能超过 8192", 8192),
    ("Range of input length should be [1, 204800]", 0),
    ("temperature must be less than or equal to 2", 0), ("bad", 0)]


@pytest.mark.parametrize("message, cap", CAPS, ids=lambda value: str(value)[:40])
def test_the_cap_that_a_refusal_tells(message, cap):
    assert ifl.find_output_cap(400, message) == cap and ifl.find_output_cap(500, message) == 0
    if "<=" in message:
        assert ifl.find_output_cap(422, message[-90:], "max_tokens") in (12288, 16384)
    assert not cap or ifl.find_overflow(400, message) is None


@pytest.mark.parametrize("path, field", [("/v1/messages", "max_tokens"),
                                         ("/v1/responses", "max_output_tokens")])
def test_max_tokens_above_the_cap_is_lowered_from_then_on(server, upstream, path, field):
    running = server(provider(upstream, models=["m1"]))
    upstream.plays(plain({"error": {"message": "Range of max_tokens should be [1, 8192]"}}, 400))
    ask = {"model": "m1", field: 32000, "messages": MESSAGES, "input": "q"}
    assert [post(running, ask, path).status for _ in range(2)] == [200, 200]
    assert [seen.json["max_tokens"] for seen in upstream.requests] == [32000, 8192, 8192]
    post(running, {**ask, field: 100}, path)
    assert upstream.last.json["max_tokens"] == 100


def test_a_cap_that_does_not_help_is_told(server, upstream):
    running = server(provider(upstream, models=["m1"]))
    refusal = plain({"error": {"message": "Range of max_tokens should be [1, 8192]"}}, 400)
    upstream.plays(refusal, refusal)
    ask = {"model": "m1", "max_tokens": 32000, "messages": [{"role": "user", "content": "q"}]}
    answer = post(running, ask, "/v1/messages")
    assert answer.status == 400 and "8192" in answer.json["error"]["message"]
    assert "`profile`" in answer.json["error"]["message"] and len(upstream.requests) == 2
    assert post(running, ask).status == 200 and upstream.last.json["max_tokens"] == 32000


@pytest.mark.parametrize("overflow, expected", [
    ((122942, 131072, 8192),
     "input length and `max_tokens` exceed context limit: 122942 + 8192 > 131072, "
     "decrease input length or `max_tokens` and try again"),
    ((140000, 131072, 8192), "prompt is too long: 140000 tokens > 131072 maximum"),
    ((269030, 262144, 0), "prompt is too long: 269030 tokens > 262144 maximum"),
    ((269030, 262144), "prompt is too long: 269030 tokens > 262144 maximum"),
    ((0, 204800, 0), "prompt is too long: 204801 tokens > 204800 maximum"),
    ((5000, 0, 0), "prompt is too long: 5000 tokens > 4999 maximum")])
def test_overflow_texts(overflow, expected):
    error = ifl.UpstreamRefused("whatever", status=500, overflow=overflow)
    assert ifl.messages_error(error, "r")["error"] == {
        "type": "invalid_request_error", "message": expected}


# === 9. OpenAI Responses =====================================================

SEAL = ifl.Seal(b"k" * 32)
FUNCTION = {"type": "function", "name": "f",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
USAGE_RESPONSES = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def make_turn(body, profile=None, codex=False, compact=False, store=None, items=None):
    body = {"model": "m", **body}
    return ifl.ResponsesTurn(
        body, {**ifl.DEFAULT_PROFILE, **(profile or {})}, body["model"], now=7.0,
        recall=(store or {}).get, item=(items or {}).get, seal=SEAL, codex=codex, compact=compact)


def counter():
    numbers = itertools.count()
    return lambda prefix: "%s%024x" % (prefix, next(numbers))


def user_responses(text):
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def said_responses(text):
    return {"type": "message", "role": "assistant",
            "content": [{"type": "output_text", "text": text}]}


def call_responses(call_id, name="f", arguments="{}", **more):
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments,
            **more}


def result_responses(call_id, output="ok", kind="function_call_output", **more):
    return {"type": kind, "call_id": call_id, "output": output, **more}


def thought_item(text, **more):
    return {"type": "reasoning", "summary": [],
            "content": [{"type": "reasoning_text", "text": text}] if text else None, **more}


def image_responses(url="https://e.example/i.png", **more):
    return {"type": "input_image", "image_url": url, **more}


def asked(name, arguments="{}", call_id="c1"):
    return call(call_id, name, arguments)


U = {"role": "user", "content": "q"}
Q = user_responses("q")


def step(*calls, **more):
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


# --- requests: messages

def shell_call(number, **action):
    return {"type": "local_shell_call", "id": f"lsh_{number}", "call_id": f"c{number}",
            "action": {"type": "exec", "command": ["ls"], **action}}


SHORT = [{"type": "summary_text", "text": "short"}]
FOUND = {"type": "tool_search_output", "call_id": "c1", "execution": "client", "tools": [
    {"type": "namespace", "name": "ns", "tools": [FUNCTION]}]}

#: What only Responses can say: id, the items after the first message, the messages after the first.
ITEMS = [
    ("no type", [{"role": "user", "content": "q"}], [U]),
    ("refusal and texts of one step", [said_responses("a"), {"role": "assistant", "content": [
        {"type": "refusal", "refusal": "no"}]}], [said_chat("assistant", "a\n\nno")]),
    ("cited text is glued", [{"role": "assistant", "phase": "final_answer", "content": [
        {"type": "output_text", "text": piece} for piece in "ab"]}],
     [said_chat("assistant", "ab")]),
    ("results in the order of their calls",
     [call_responses("c1"), call_responses("c2"), result_responses("c2", "2"),
      result_responses("c1", "1")],
     [step(asked("f"), asked("f", call_id="c2")), tool_responses("1"), tool_responses("2", "c2")]),
    ("text after a call opens a new step",
     [call_responses("c1"), said_responses("a"), result_responses("c1")],
     [step(asked("f")), tool_responses("ok"), said_chat("assistant", "a")]),
    ("users in a row stay", [result_responses("c9", "late"), Q],
     [said_chat("user", "[result of tool call c9]\nlate"), U]),
    ("output found by name", [call_responses("c1"), result_responses(None, "1", name="f")],
     [step(asked("f")), tool_responses("1")]),
    ("ids that repeat", [call_responses("c1"), result_responses("c1", "1"), call_responses("c1"),
                         result_responses("c1", "2")],
     [step(asked("f")), tool_responses("1"), step(asked("f")), tool_responses("2")]),
    ("one id twice in a step", [call_responses("c1"), call_responses("c1"),
                                result_responses("c1", "1")],
     [step(asked("f"), asked("f")), tool_responses("1"), tool_responses(ifl.NO_RESULT)]),
    ("call without id", [{"type": "function_call", "name": "f", "arguments": ""}],
     [step(asked("f", call_id="call_1")), tool_responses(ifl.NO_RESULT, "call_1")]),
    ("arguments that are no JSON", [call_responses("c1", arguments="{x"), result_responses("c1")],
     [step(asked("f", '{"INVALID_JSON":"{x"}')), tool_responses("ok")]),
    ("arguments encoded twice",
     [call_responses("c1", arguments='"{\\"x\\":1}"'), result_responses("c1")],
     [step(asked("f", '{"x":1}')), tool_responses("ok")]),
    ("output that is no schema's", [call_responses("c1"), result_responses("c1", {"a": 1})],
     [step(asked("f")), tool_responses('{"a":1}')]),
    ("output of unknown parts",
     [call_responses("c1"), result_responses("c1", [{"type": "video", "x": 1}])],
     [step(asked("f")), tool_responses('[{"type":"video","x":1}]')]),
    ("custom", [{"type": "custom_tool_call", "call_id": "c1", "name": "p", "input": 'a"\n'},
                result_responses("c1", "ok", "custom_tool_call_output")],
     [step(asked("p", '{"input":"a\\"\\n"}')), tool_responses("ok")]),
    ("local shell: the output's id is the call's",
     [shell_call(1, env={}, timeout_ms=None),
      {"type": "local_shell_call_output", "id": "c1", "output": "x"}],
     [step(asked("local_shell", '{"command":["ls"],"env":{}}')), tool_responses("x")]),
    ("local shell: the output names the call's item, or both",
     [shell_call(1), shell_call(2),
      {"type": "local_shell_call_output", "id": "lsh_2", "output": "y"},
      {"type": "local_shell_call_output", "id": "lsh_1", "call_id": "c1", "output": "x"}],
     [step(*(asked("local_shell", '{"command":["ls"]}', f"c{n}") for n in (1, 2))),
      tool_responses("x"), tool_responses("y", "c2")]),
    ("tool search", [{"type": "tool_search_call", "call_id": "c1", "execution": "client",
                      "arguments": {"query": "x"}}, FOUND],
     [step(asked("tool_search", '{"query":"x"}')), tool_responses("Tools found: ns__f")]),
    ("the server's tool search",
     [{"type": f"tool_search_{end}", "call_id": None, "execution": "server", "tools": [FUNCTION]}
      for end in ("call", "output")], []),
    ("types of no meaning", [{"type": "ghost_snapshot"}, {"type": "web_search_call", "id": "ws_1"},
                             {"type": "mcp_call"}, {"type": "shell_call", "call_id": "s"}], []),
    ("agent message", [{"type": "agent_message", "author": "/root/a", "content": [
        {"type": "encrypted_content", "encrypted_content": "done"}]}],
     [said_chat("user", "Message from /root/a:\ndone")]),
    ("reasoning that led to nothing", [thought_item("t"), Q], [U]),
    ("own carrier beats the summary", [
        thought_item("", summary=SHORT, encrypted_content=SEAL.encrypt({"reasoning": "long"})),
        said_responses("a")], [said_chat("assistant", "a", reasoning_content="long")]),
    ("foreign carrier",
     [thought_item("", summary=SHORT, encrypted_content="gAAAA"), said_responses("a")],
     [said_chat("assistant", "a", reasoning_content="short")]),
    ("details without text",
     [thought_item("", encrypted_content=SEAL.encrypt({"details": [{"x": 1}]})),
                              said_responses("a")],
     [said_chat("assistant", "a", reasoning_details=[{"x": 1}])]),
    ("own compaction",
     [{"type": "compaction", "encrypted_content": SEAL.encrypt({"summary": "S"})}],
     [said_chat("user", "Summary of the conversation so far:\n\nS")]),
    ("nothing", [{"role": "user", "content": None}], [said_chat("user", "")]),
    ("file and image", [{"role": "user", "content": [
        image_responses("data:image/png;base64,AA", detail="high"), image_responses(detail="auto"),
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,A"},
        ]}],
     [said_chat("user", [
         {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "high"}},
         {"type": "image_url", "image_url": {"url": "https://e.example/i.png"}},
         {"type": "file", "file": {"filename": "a.pdf",
                                   "file_data": "data:application/pdf;base64,A"}}])]),
    ("parts as in Chat, and of unknown kinds", [{"role": "user", "content": [
        IMAGE_PART, {"type": "input_video"}, {"type": "text", "text": "q"}]}],
     [said_chat("user", [IMAGE_PART, text("q")])]),
]


@pytest.mark.parametrize("given, messages", [row[1:] for row in ITEMS],
                         ids=[row[0] for row in ITEMS])
def test_items(given, messages):
    assert make_turn({"input": [Q, *given]}).chat["messages"] == [U, *messages]


# --- requests: other fields

FORMAT = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "description": "d",
          "strict": None}
EXTRAS = {"text": {"verbosity": "low"}, "prompt_cache_key": "k", "service_tier": "flex",
          "user": "u"}
DROPPED = {"metadata": {"a": "b"}, "safety_identifier": "s", "store": False, "truncation": "auto",
           "max_tool_calls": 1, "client_metadata": {}, "background": False, "conversation": None,
           "context_management": [{"type": "compaction"}], "top_logprobs": 2}
UPDATE = {"type": "configuration_update", "reasoning": {"effort": "high"},
          "text": {"format": {"type": "json_object"}}}

#: id, what is asked, under which profile, Chat's fields.
FIELDS = [
    ("effort", {"reasoning": {"effort": "minimal"}}, {}, {**ON, "reasoning_effort": "low"}),
    ("effort none", {"reasoning": {"effort": "none"}}, {}, OFF),
    ("summary alone", {"reasoning": {"summary": "auto"}}, {}, {}),
    ("limit", {"max_output_tokens": 900},
     {"max_output": 100, "max_tokens_field": "max_completion_tokens"},
     {"max_completion_tokens": 100}),
    ("stream", {"stream": True}, {}, {"stream": True, "stream_options": {"include_usage": True}}),
    ("stream without usage", {"stream": True}, {"stream_usage": False}, {"stream": True}),
    ("text", {"text": {"format": {"type": "text"}, "verbosity": "low"}}, {}, {}),
    ("json_object", {"text": {"format": {"type": "json_object"}}}, {},
     {"response_format": {"type": "json_object"}}),
    ("json_object that only a prompt can ask for", {"text": {"format": {"type": "json_object"}}},
     {"structured_output": "prompt"}, {"messages": [
         said_chat("system", "Answer with nothing but a JSON object."), U]}),
    ("json_schema", {"text": {"format": FORMAT}}, {}, {"response_format": {
        "type": "json_schema", "json_schema": {
            "name": "a", "schema": {"type": "object"}, "description": "d"}}}),
    ("configuration_update", {"input": [UPDATE, Q]}, {},
     {**ON, "reasoning_effort": "high", "response_format": {"type": "json_object"}}),
    ("logprobs", {"include": ["message.output_text.logprobs"], "top_logprobs": 2}, {},
     {"logprobs": True, "top_logprobs": 2}),
    ("what most do not know", {**DROPPED, **EXTRAS}, {}, {}),
    ("what OpenAI knows", EXTRAS, ifl.PRESETS["openai"].profile, {
        "verbosity": "low", "prompt_cache_key": "k", "service_tier": "flex",
        "safety_identifier": "u"}),
    ("whom it is for", {**EXTRAS, "safety_identifier": "s"}, {"extra_fields": ["user"]},
     {"user": "s"}),
    ("whom it is for is not wanted", EXTRAS, {"extra_fields": ["user"], "user_field": None}, {}),
    ("no tools", {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {}, {}),
]


@pytest.mark.parametrize("body, profile, chat", [row[1:] for row in FIELDS],
                         ids=[row[0] for row in FIELDS])
def test_fields(body, profile, chat):
    assert make_turn({"input": "q", **body}, profile).chat == {
        "model": "m", "messages": [U], **chat}


# --- tools

def functions_responses(body, profile=None):
    chat = make_turn({"input": "q", **body}, profile).chat
    return [entry["function"] for entry in chat.get("tools", [])]


def test_function_and_custom_tools():
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: x"}
    made = functions_responses({"tools": [
        {**FUNCTION, "strict": True, "defer_loading": True, "output_schema": {}},
        {"type": "function", "name": "g", "parameters": None},
        {"type": "custom", "name": "p", "description": "d", "format": grammar},
        {"type": "custom", "name": "t", "format": {"type": "text"}}]})
    text = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    assert made == [
        {"name": "f", "parameters": FUNCTION["parameters"], "strict": True},
        {"name": "g", "parameters": {"type": "object", "properties": {}}},
        {"name": "p", "parameters": text,
         "description": "d\n\nThe input must match this lark grammar:\nstart: x"},
        {"name": "t", "parameters": text}]
    strict = {"tools": [{**FUNCTION, "strict": True}]}
    assert "strict" not in functions_responses(strict, {"strict_tools": False})[0]


def test_tools_join_from_items():
    extra = {"type": "additional_tools", "role": "developer",
             "tools": [{"type": "custom", "name": "p"}]}
    items = [extra, {"role": "developer", "content": "s"}, Q, FOUND]
    chat = make_turn({"input": items, "tools": [FUNCTION]}).chat
    assert [entry["function"]["name"] for entry in chat["tools"]] == ["f", "p", "ns__f"]
    assert chat["messages"] == [said_chat("system", "s"), U]


def test_fixed_tools_have_schemas():
    kinds = ["local_shell", "tool_search"]
    made = functions_responses({"tools": [
        {"type": kind, "execution": "client"} for kind in kinds]})
    assert [entry["name"] for entry in made] == kinds
    assert all(entry["description"] and entry["parameters"]["required"] for entry in made)
    assert functions_responses({"tools": [{"type": "tool_search"}, {"type": "shell"}]}) == []


NATIVE = {"server_tools": {"web_search": {"type": "web_search", "n": 1}}}
FIELD = {"server_tools": {"web_search": {"fields": {"enable_search": True}}}}


@pytest.mark.parametrize("codex, profile, fields", [
    (False, {}, {}), (False, NATIVE, {"tools": [{"type": "web_search", "n": 1}],
                                      "tool_choice": "auto"}),
    (False, FIELD, {"enable_search": True}),
    (False, {"server_tools": {"web_search": "nonsense"}}, {}),
    (True, FIELD, {})])                  # Codex lists it in each request; it would be paid
def test_tools_of_servers(codex, profile, fields):
    given = [{"type": "web_search_preview_2025_03_11"}, {"type": "mcp", "server_label": "x"},
             {"type": "never heard of"}]
    body = {"input": "q", "tools": given, "tool_choice": {"type": "web_search_preview"}}
    assert make_turn(body, profile, codex=codex).chat == {"model": "m", "messages": [U], **fields}
    with pytest.raises(ifl.BadRequest):
        make_turn(body, {"server_tools": "error"})


def function_named(name):
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("choice, expected", [
    ({"type": "custom", "name": "p"}, function_named("p")),
    ({"type": "function", "name": "b", "namespace": "a"}, function_named("a__b")),
    ({"type": "local_shell"}, function_named("local_shell")),
    ({"type": "shell"}, "auto"), ({"type": "file_search"}, "auto")])
def test_responses_tool_choice(choice, expected):
    tools = [FUNCTION, {"type": "custom", "name": "p"}, {"type": "local_shell"},
             {"type": "namespace", "name": "a", "tools": [{"type": "function", "name": "b"}]}]
    chat = make_turn({"input": "q", "tools": tools, "tool_choice": choice}).chat
    assert chat["tool_choice"] == expected and len(chat["tools"]) == 4


SPACES = [FUNCTION, {"type": "custom", "name": "p"}, {
    "type": "namespace", "name": "mcp__docs",
    "tools": [{"type": "function", "name": name} for name in "ab"]}]


@pytest.mark.parametrize("allowed, left", [
    ([{"type": "custom", "name": "p"}, {"type": "mcp"}], ["p"]),
    ([{"type": "namespace", "name": "mcp__docs"}], ["mcp__docs__a", "mcp__docs__b"]),
    ([{"type": "mcp", "server_label": "docs"}], ["mcp__docs__a", "mcp__docs__b"]),
    ([{"type": "mcp", "server_label": "elsewhere"}], ["f", "p", "mcp__docs__a", "mcp__docs__b"]),
    ([{"type": "function", "name": "a", "namespace": "mcp__docs"}], ["mcp__docs__a"])])
def test_allowed_tools(allowed, left):
    chat = make_turn({"input": "q", "tools": SPACES, "parallel_tool_calls": False, "tool_choice": {
        "type": "allowed_tools", "mode": "required", "tools": allowed}}).chat
    assert [tool["function"]["name"] for tool in chat["tools"]] == left
    assert (chat["tool_choice"], chat["parallel_tool_calls"]) == ("required", False)


LONG_RESPONSES = "n" * 70
TWINS = [{"type": "function", "name": "a__b"}, {"type": "namespace", "name": "a", "tools": [
    {"type": "function", "name": "b"}, {"type": "custom", "name": "c"},
    {"type": "function", "name": LONG_RESPONSES + "1"},
    {"type": "function", "name": LONG_RESPONSES + "2"}]}, {"type": "custom", "name": "a__b"}]


def test_names_are_short_distinct_and_come_back():
    items = [Q, call_responses("c0", "b", namespace="a"),
             call_responses("c9", LONG_RESPONSES + "2", namespace="a")]
    turn = make_turn({"input": items, "tools": TWINS})
    names = [entry["function"]["name"] for entry in turn.chat["tools"]]
    assert len(set(names)) == 6 and max(map(len, names)) <= 64
    assert (names[0], names[2]) == ("a__b", "a__c")
    made = [made["function"]["name"] for made in turn.chat["messages"][1]["tool_calls"]]
    assert made == [names[1], names[4]]
    calls = [asked(name, '{"input":"i"}', f"c{n}") for n, name in enumerate(names, 1)]
    answer = {"choices": [{"message": {"tool_calls": calls}}]}
    output = turn.stream(counter()).whole(answer)["output"]
    assert [(item["type"], item["name"], item.get("namespace")) for item in output] == [
        ("function_call", "a__b", None), ("function_call", "b", "a"),
        ("custom_tool_call", "c", "a"), ("function_call", LONG_RESPONSES + "1", "a"),
        ("function_call", LONG_RESPONSES + "2", "a"), ("custom_tool_call", "a__b", None)]


def test_two_calls_of_one_chunk_without_index_id_or_arguments_are_two_calls():
    calls = [{"function": {"name": name, "arguments": ""}} for name in ("a", "b")]
    stream = make_turn({"input": "q"}).stream(counter())
    events = [*stream.feed({"choices": [{"delta": {"tool_calls": calls}}]}), *stream.close()]
    assert [(item["name"], item["arguments"])
            for item in events[-1]["response"]["output"]] == [("a", "{}"), ("b", "{}")]


# --- bad input and the store

def part_of_user(*parts):
    return {"input": [{"role": "user", "content": list(parts)}]}


BAD_RESPONSES = [
    ({}, "input", "missing_required_parameter"), ({"input": []}, "input", "invalid_value"),
    ({"input": ["x"]}, "input", "invalid_type"), ({"input": 5}, "input", "invalid_type"),
    ({"input": [{"type": 5}]}, "input", "invalid_type"),
    ({"input": [{}]}, "input", "missing_required_parameter"),
    ({"input": [{"id": "msg_x"}]}, "input", "item_not_found"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input", "invalid_value"),
    ({"input": [call_responses("c1", None)]}, "input", "missing_required_parameter"),
    ({"previous_response_id": "resp_x"}, "previous_response_id", "previous_response_not_found"),
    ({"previous_response_id": "r", "conversation": "c"}, "previous_response_id",
     "mutually_exclusive_parameters"),
    ({"conversation": {"id": "c"}}, "conversation", "unsupported_parameter"),
    ({"background": True}, "background", "unsupported_parameter"),
    ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
    ({"input": "q", "temperature": "1"}, "temperature", "invalid_type"),
    ({"input": "q", "max_output_tokens": True}, "max_output_tokens", "invalid_type"),
    ({"input": "q", "max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
    ({"input": "q", "tools": ["x"]}, "tools", "invalid_type"),
    ({"input": "q", "tools": [{"type": "function"}]}, "tools", "missing_required_parameter"),
    ({"input": "q", "tools": [FUNCTION], "tool_choice": {"type": "function", "name": "z"}},
     "tool_choice", "invalid_value"),
    ({"input": "q", "tools": [FUNCTION], "tool_choice": "any"}, "tool_choice", "invalid_value"),
    (part_of_user({"type": "input_image", "file_id": "f"}), "input", "unsupported_value"),
    (part_of_user({"type": "input_file", "file_id": "u"}), "input", "unsupported_value"),
    ({"input": [{"type": "compaction", "encrypted_content": "gAAAA"}]}, "input",
     "invalid_encrypted_content"),
    (part_of_user({"type": "input_video"}), "input", "invalid_value"),
    (part_of_user({"type": []}), "input", "invalid_value"),
    *((part_of_user(image_responses(url)), "input", "invalid_image_url") for url in (
        "data:image/png;base64,%%%", "data:image/png;base64,", "data:image/png;base64,AAAAA",
        "data:image/png,abc", "data:")),
    ({"input": [{"role": "user", "content": 5}]}, "input", "invalid_type"),
    ({"input": [{"role": "system", "content": {"text": "x"}}]}, "input", "invalid_type"),
    *(({"input": "q", "text": {"format": form}}, "text.format", "invalid_value")
      for form in ({"type": "grammar"}, "json", "json_schema")),
]


@pytest.mark.parametrize("body, param, code", BAD_RESPONSES)
def test_responses_bad_input(body, param, code):
    with pytest.raises(ifl.BadRequest) as caught:
        make_turn(body)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


def test_arguments_that_are_nested_too_deeply_stay_what_they_are():
    deep = '{"a":' + "[" * 200_000 + "]" * 200_000 + "}"
    chat = make_turn({"input": [Q, call_responses("c1", "f", deep)]}).chat
    arguments = chat["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {"INVALID_JSON": deep}
    assert ifl._payload("local_shell", deep) is None


def b64(data):
    return base64.b64encode(data).decode()


FILES_RESPONSES = [
    ({"filename": "a.txt", "file_data": "data:text/plain;base64," + b64("h\u00e9".encode())},
     "File a.txt:\nh\u00e9"),
    ({"filename": "a.py", "file_data": b64(b"x = 1")}, "File a.py:\nx = 1"),
    ({"file_data": "data:,a%20b"}, "a b"),
    ({"filename": "l", "file_data": "data:text/plain;base64," + b64(b"\xe9")}, "File l:\n\ufffd"),
    ({"filename": "a.pdf", "file_data": "data:application/pdf;base64," + b64(b"%PDF-1.7 x")},
     NOTE_OF_PDF),
    ({"filename": "a.zip", "file_data": b64(b"PK\0\xff")},
     "[a file (a.zip) was here; this model can't see it: use a tool to extract its text]"),
    ({"file_data": "not base64 \u00e9"}, ifl.NO_PDF.format("document.pdf")),
    ({"file_url": "https://h/a.pdf"}, "[a file was here (https://h/a.pdf); none is fetched by this "
                                      "server: use a tool to read it]")]


@pytest.mark.parametrize("facts, text", FILES_RESPONSES)
def test_a_file_that_a_model_cannot_take_becomes_its_text_or_a_note(facts, text):
    part = {"type": "input_file", **facts}
    body = part_of_user(part, {"type": "input_text", "text": "q"})
    assert make_turn(body, {"files": False}).chat["messages"] == [
        said_chat("user", text + "\n\nq")]
    parts = make_turn(body).chat["messages"][0]["content"]
    assert parts == text + "\n\nq" if "file_url" in facts else (
        parts[0]["file"]["file_data"] == facts["file_data"])
    in_result = {"input": [Q, call_responses("c1"), result_responses("c1", [part])]}
    assert make_turn(in_result, {"files": False}).chat["messages"][-1] == tool_responses(text)


def test_earlier_response_and_item_references():
    store = {"resp_1": [Q, call_responses("c1")]}
    turn = make_turn({"instructions": "NEW", "previous_response_id": "resp_1",
                      "input": [{"id": "fco_1"}]}, store=store,
                     items={"fco_1": result_responses("c1")})
    assert turn.chat["messages"] == [said_chat("system", "NEW"), U, step(asked("f")),
                                     tool_responses("ok")]
    assert turn.items == [*store["resp_1"], result_responses("c1")] and turn.store
    assert turn.echo["previous_response_id"] == "resp_1"
    assert not make_turn({"input": "q", "store": False}).store
    item = {"id": "m_1", **Q}
    assert make_turn({"input": [item, {"id": "m_1"}]}).chat["messages"] == [U]


def test_count_response_tokens():
    def count(body, **kept):
        return ifl.count_response_tokens(body, kept.get, kept.get, SEAL)

    item = {"id": "msg_" + "1" * 90, "status": "completed", **user_responses("x" * 35)}
    assert count({"input": "x" * 35}) == 14 == count({"input": [item]})
    assert 14 < count({"input": "x" * 35, "instructions": "y"}) < count(
        {"input": "x" * 35, "tools": [FUNCTION]}) < 60
    sealed = [thought_item("", encrypted_content="x" * 9000), said_responses("a")]
    assert count({"input": sealed}) < 20 and count({}) == 4
    assert count(part_of_user(image_responses())) == 1504
    earlier = [user_responses("x" * 350)]
    assert count({"input": "q", "previous_response_id": "r"}, r=earlier) == 4 + 100 + 4 + 1
    for wrong in ({"input": 5}, {"input": "q", "tools": "x"}, {"previous_response_id": "gone"}):
        with pytest.raises(ifl.BadRequest):
            count(wrong)


def test_an_estimate_of_usage_counts_texts_alone():
    text = "word " * 70
    last = play_responses([delta(content=text), tools(tool(0, "call_" + "x" * 50, "f", '{"x":1}')),
                           end("stop")],
                          {"input": text, **HERE})[-1]["response"]
    turn = make_turn({"input": text})
    # what the upstream says stands
    assert turn.estimate == 4 + 100 and last["usage"]["output_tokens"] == 5
    events = play_responses([delta(content=text),
                             tools(tool(0, "call_" + "x" * 50, "f", '{"x":1}'))], {"input": text})
    usage = events[-1]["response"]["usage"]
    assert usage["input_tokens"] == 104 and 100 < usage["output_tokens"] < 106


def test_reasoning_details_come_back_through_previous_response_id():
    details = [{"type": "reasoning.text", "index": 0, "text": "t", "signature": "s"}]
    turn = make_turn({"input": "q"})
    answer = {"choices": [{"message": {"reasoning_details": details, "tool_calls": [asked("f")]}}]}
    response = turn.stream(counter()).whole(answer)
    assert "encrypted_content" not in response["output"][0] and "signature" not in str(response)
    store = ifl.ResponseStore()
    store.keep(response, turn.items, "", turn.carriers)
    body = {"previous_response_id": response["id"], "input": [result_responses("c1")]}
    for conversation in (store.recall(response["id"]),
                         [turn.items[0], *map(store.item, (i["id"] for i in response["output"]))]):
        message = make_turn(body, store={response["id"]: conversation}).chat["messages"][1]
        assert message["reasoning_details"] == details and message["reasoning_content"] == "t"
    assert store.find(response["id"]).response == response


# --- streams

def end(reason, **usage):
    return {**delta(reason), "usage": {**USAGE_RESPONSES, **usage}}


def play_responses(chunks, body=None, codex=False, profile=None):
    turn = make_turn({"input": "q", "stream": True, **(body or {})}, profile, codex)
    writer = turn.stream(counter())
    return [event for each in chunks for event in writer.feed(each)] + list(writer.close())


def response_of(chunks, body=None, codex=False):
    """The response that a stream ends with, once it has kept the rules."""
    events = play_responses(chunks, body, codex)
    assert broken_rules(events) == []
    return events[-1]["response"]


def broken_rules(events):
    """The rules every Responses stream obeys (SDK accumulator, Codex)."""
    bad, items, done, texts = [], {}, {}, {}
    if [event["type"] for event in events[:2]] != ["response.created", "response.in_progress"]:
        bad.append("start")
    for number, event in enumerate(events):
        name, index = event["type"], event.get("output_index")
        if event["sequence_number"] != number:
            bad.append("sequence_number")
        if "response" in event and event["response"]["id"] != events[0]["response"]["id"]:
            bad.append("response id")
        if name == "response.output_item.added":
            bad += ["output_index"] if index != len(items) else []
            items[index] = event["item"]
        elif name == "response.output_item.done":
            before, after = [(item["type"], item["id"], item.get("call_id"))
                             for item in (items[index], event["item"])]
            bad += ["identity"] if before != after or index in done else []
            done[index] = event["item"]
        elif index is not None:
            if items[index]["id"] != event["item_id"] or index in done:
                bad.append("out of place: " + name)
            stem = name.rpartition(".")[0]
            if name.endswith(".delta"):
                texts[index, stem] = texts.get((index, stem), "") + event["delta"]
            elif not name.endswith(("part.added", "part.done", "annotation.added")):
                whole = next(event[key] for key in ("text", "refusal", "arguments", "input")
                             if key in event)
                bad += ["text of " + name] if texts.get((index, stem), "") != whole else []
            if stem.endswith("output_text") and not isinstance(event["logprobs"], list):
                bad.append("logprobs")
    last = events[-1]["response"]
    for index, item in enumerate(last["output"]):
        torn = ("custom_tool_call", items[index]["id"], "incomplete")
        if item != done.get(index) if index in done else (
                (item["type"], item["id"], item["status"]) != torn):
            bad.append("output")
    bad += ["number of items"] if len(last["output"]) != len(items) else []
    bad += ["end"] if events[-1]["type"] != "response." + last["status"] else []
    return bad


def brief(output):
    """Items reduced to what a client acts upon."""
    told = []
    for item in output:
        kind = item["type"]
        if kind == "message":
            told += [found.get("text") or "refused: " + found["refusal"]
                     for found in item["content"]]
        elif kind == "reasoning":
            told += ["(%s)" % part["text"] for part in item.get("content") or item["summary"]]
        elif kind in ("function_call", "custom_tool_call"):
            told.append((item["name"], item["call_id"], item.get("arguments", item.get("input"))))
        else:
            told.append((kind, item["call_id"], item.get("action") or item.get("arguments")))
    return told


HERE = {"tools": [FUNCTION, {"type": "custom", "name": "p"}, {"type": "local_shell"},
                  {"type": "tool_search", "execution": "client"}]}
#: (name of a tool, pieces of its arguments, what the client gets)
TOOL_CALLS = [
    ("f", ["ls {a} -la"], ("f", "c1", "ls {a} -la")),
    ("f", ['"{\\"x\\"', ':1}"'], ("f", "c1", '{"x":1}')),
    ("f", ['{"x":1', ""], ("f", "c1", '{"x":1}')), ("f", [""], ("f", "c1", "{}")),
    ("p", ['{"inp', 'ut": "a\\', 'n\\ud83d', '\\ude00 C:\\users \\d"}'],
     ("p", "c1", "a\n\U0001f600 C:\\users \\d")),
    ("p", ['{"why":"w","input":"a"}'], ("p", "c1", "a")),
    ("p", ['{"patch":"a"}'], ("p", "c1", "a")),
    ("p", ["*** Begin {x} y"], ("p", "c1", "*** Begin {x} y")), ("p", ["{}"], ("p", "c1", "")),
    ("local_shell", ['{"command":["ls"],', '"timeout_ms":5}'],
     ("local_shell_call", "c1", {"type": "exec", "command": ["ls"], "env": {}, "timeout_ms": 5})),
    ("local_shell", ['{"command":"ls | wc"}'],
     ("local_shell_call", "c1", {
         "type": "exec", "command": ["bash", "-lc", "ls | wc"], "env": {}})),
    ("local_shell", ['{"cmd":1}'], ("local_shell", "c1", '{"cmd":1}')),
    ("tool_search", ['{"query":"x"}'], ("tool_search_call", "c1", {"query": "x"}))]


@pytest.mark.parametrize("name, pieces, told", TOOL_CALLS)
def test_calls_of_each_kind_of_tool(name, pieces, told):
    chunks = [tools(tool(0, "c1", name)), *(tools(tool(0, arguments=piece)) for piece in pieces)]
    response = response_of([*chunks, end("stop")], HERE)
    assert brief(response["output"]) == [told] and response["status"] == "completed"
    assert name != "tool_search" or response["output"][0]["execution"] == "client"
    answer = completion(None, tool_calls=[call("c1", name, "".join(pieces))])
    whole = make_turn({"input": "q", **HERE}).stream(counter()).whole(answer)
    assert brief(whole["output"]) == [told]


@pytest.mark.parametrize("asked, summary, carried", [
    ({}, False, False), ({"reasoning": {"summary": "auto"}}, True, False),
    ({"include": ["reasoning.encrypted_content"]}, False, True)])
def test_where_reasoning_is_shown_and_carried(asked, summary, carried):
    item = response_of([delta(reasoning_content="r"), end("stop")], asked)["output"][0]
    shown = [{"type": "summary_text" if summary else "reasoning_text", "text": "r"}]
    assert item["summary"] == (shown if summary else []) and item.get("content") == (
        None if summary else shown)
    assert ("encrypted_content" in item) is carried


def test_custom_input_may_be_cut_anywhere():
    text = 'a "q" \\ \n\u00e9\U0001f600\ud800 C:\\users \\u00 end'
    for ascii_only in (True, False):
        whole = '{ "input" : %s}' % json.dumps(text, ensure_ascii=ascii_only)
        for size in range(1, 9):
            pieces = [whole[at:at + size] for at in range(0, len(whole), size)]
            chunks = [tools(tool(0, arguments=piece)) for piece in pieces]
            response = response_of([tools(tool(0, "c1", "p", "")), *chunks, end("stop")], HERE)
            assert response["output"][0]["input"] == text


def names(events):
    return [event["type"].replace("response.", "") for event in events]


def test_calls_open_and_end_as_early_as_they_can():
    writer = make_turn({"input": "q", **HERE}).stream(counter())
    shell = '{"command":["ls"]}'
    for given, told in [
            (tools(tool(0, "c1", "f")), ["created", "in_progress"]),
            (tools(tool(0, arguments='{"x"')),
             ["output_item.added", "function_call_arguments.delta"]),
            (tools(tool(0, arguments=":1}")), ["function_call_arguments.delta"]),
            (delta(content="b"), [
                "function_call_arguments.done", "output_item.done", "output_item.added",
                "content_part.added", "output_text.delta"]),
            (tools(tool(1, "c2", "p", '{"input":"')), [
                "output_text.done", "content_part.done", "output_item.done", "output_item.added"]),
            (tools(tool(2, "c3", "local_shell", shell)), []),
            (tools(tool(1, arguments='a"}')), [
                "output_item.added", "output_item.done", "custom_tool_call_input.delta"])]:
        assert names(writer.feed(given)) == told


def test_events_in_full():
    chunks = [delta(reasoning_content="t"), delta(content="a"), tools(tool(0, "c1", "f", "{}"))]
    events = play_responses([*chunks, end("tool_calls")], {
        "reasoning": {"summary": "auto"}, "instructions": "i", "metadata": {"k": "v"}})
    assert names(events) == [
        "created", "in_progress", "output_item.added", "reasoning_summary_part.added",
        "reasoning_summary_text.delta", "reasoning_summary_text.done",
        "reasoning_summary_part.done", "output_item.done", "output_item.added",
        "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed"]
    first, last = events[0]["response"], events[-1]["response"]
    assert first == {
        "id": first["id"], "object": "response", "created_at": 1, "status": "in_progress",
        "error": None, "model": "m", "output": [], "incomplete_details": None,
        "background": False, "instructions": "i", "metadata": {"k": "v"},
        "max_output_tokens": None, "parallel_tool_calls": True, "previous_response_id": None,
        "reasoning": {"effort": None, "summary": "auto"}, "store": True,
        "text": {"format": {"type": "text"}}, "temperature": 1.0, "top_p": 1.0,
        "tool_choice": "auto", "tools": [], "truncation": "disabled", "usage": None}
    thought, said, called = [item["id"] for item in last["output"]]
    assert (first["id"][:5], thought[:3], said[:4], called[:3]) == ("resp_", "rs_", "msg_", "fc_")
    assert last["completed_at"] == 7
    assert events[2]["item"] == {"id": thought, "type": "reasoning", "summary": []}
    assert events[8]["item"] == {"id": said, "type": "message", "role": "assistant",
                                 "status": "in_progress", "content": []}
    assert events[10] == {
        "type": "response.output_text.delta", "item_id": said, "output_index": 1,
        "content_index": 0, "delta": "a", "logprobs": [], "sequence_number": 10}


@pytest.mark.parametrize("reason, codex, why", [
    ("length", False, "max_output_tokens"), ("length", True, None),
    ("content_filter", False, "content_filter"), ("content_filter", True, None),
    ("sensitive", False, "content_filter"), ("stop", False, None), (None, False, None)])
def test_ends(reason, codex, why):
    response = response_of([delta(content="cut"), end(reason)], codex=codex)
    assert response["status"] == ("incomplete" if why else "completed")
    assert (response["incomplete_details"] or {}).get("reason") == why
    item, = response["output"]
    assert item["status"] == ("incomplete" if reason in ifl.CUT_SHORT else "completed")


@pytest.mark.parametrize("chunk", [
    delta(reasoning_content="t"), tools(tool(0, "c1", "p", '{"input":"a'))])
def test_codex_is_not_told_of_success_where_nothing_came(chunk):
    response = response_of([chunk, end("length")], HERE, codex=True)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize("reason", ["length", "tool_calls"])
@pytest.mark.parametrize("arguments, sent", [
    ('{"input":"*** Begin', "*** Begin"), ('{"inp', ""), ('{"why":"w","input":"a', ""),
    ('{"input":"a\\', "a"), ("", ""), ("*** Beg", "")])
def test_half_an_input_is_never_done(arguments, sent, reason):
    chunks = [tools(tool(0, "c0", "p", '{"input":"a"}')), tools(tool(1, "c1", "p", arguments)),
              end(reason)]
    events = play_responses(chunks, HERE)
    done = [event["item"]["call_id"] for event in events if "item.done" in event["type"]]
    if reason == "tool_calls" and not arguments.startswith("{"):         # whole, though no JSON
        assert done == ["c0", "c1"] and events[-1]["type"] == "response.completed"
        return
    assert broken_rules(events) == [] and done == ["c0"]
    whole = make_turn({"input": "q", **HERE}).stream(counter()).whole(
        ifl.fold_stream(wire_of([*chunks, DONE])))
    for response in (events[-1]["response"], whole):
        assert response["status"] == "incomplete"
        assert [(item["input"], item["status"]) for item in response["output"]] == [
            ("a", "completed"), (sent, "incomplete")]
    assert response_of(chunks, HERE, codex=True)["status"] == "completed"       # c0 is to be done


@pytest.mark.parametrize("name, arguments", [("f", '{"x'), ("f", ""), ("local_shell", '{"comm')])
def test_a_cut_call_says_so_and_is_not_made_whole(name, arguments):
    chunks = [tools(tool(0, "c0", "f", "{}")), tools(tool(1, "c1", name, arguments))]
    whole, cut = response_of([*chunks, end("length")], HERE)["output"]
    assert (whole["status"], cut["status"], cut["arguments"]) == (
        "completed", "incomplete", arguments)


def test_usage_and_logprobs():
    entry = {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}
    told = delta(content="a")
    told["choices"][0]["logprobs"] = {"content": [entry]}
    events = play_responses([told, end(
        "stop", prompt_tokens_details={"cached_tokens": 4, "cache_write_tokens": 2},
        completion_tokens_details={"reasoning_tokens": 3})])
    response = events[-1]["response"]
    assert response["usage"] == {
        "input_tokens": 10, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2},
        "output_tokens": 5, "output_tokens_details": {"reasoning_tokens": 3}, "total_tokens": 15}
    assert [event["logprobs"] for event in events if "logprobs" in event] == [[entry], [entry]]
    assert response["output"][0]["content"][0]["logprobs"] == [entry]


def test_citations_of_the_upstream_reach_the_client():
    cited = {"url": "https://e.example/", "title": "E", "start_index": 0, "end_index": 1}
    given = [{"type": "url_citation", "url_citation": cited}, {"type": "other"}, 5]
    flat = {"type": "url_citation", **cited}
    for chunks in ([delta(content="a", annotations=given)],
                   [delta(content="a"), delta(annotations=given)],
                   [delta(annotations=given), delta(content="a")]):
        events = play_responses([*chunks, end("stop")])
        added, = [event for event in events if event["type"].endswith("annotation.added")]
        assert broken_rules(events) == []
        assert (added["annotation_index"], added["annotation"]) == (0, flat)
        assert events[-1]["response"]["output"][0]["content"][0]["annotations"] == [flat]
    whole = writer_of("responses").whole(completion("a", annotations=given))
    assert whole["output"][0]["content"][0]["annotations"] == [flat]


def test_names_are_made_fit_for_chat_and_come_back():
    given = [{"type": "namespace", "name": "mcp.srv/1", "tools": [
        {"type": "function", "name": name} for name in ("do it", "do_it")]},
        {"type": "function", "name": "a.b"}, {"type": "function", "name": "\u00e9"}]
    history = [user_responses("q"), call_responses("c1", "do it", namespace="mcp.srv/1"),
               result_responses("c1")]
    turn = make_turn({"input": history, "tools": given})
    known = [each["function"]["name"] for each in turn.chat["tools"]]
    asked_for = turn.chat["messages"][1]["tool_calls"][0]["function"]["name"]
    assert known[0] == "mcp_srv_1__do_it" == asked_for and len(set(known)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in known)
    answer = completion(None, tool_calls=[
        asked(name, call_id=f"x{number}") for number, name in enumerate(known)])
    output = turn.stream(counter()).whole(answer)["output"]
    assert [(item.get("namespace"), item["name"]) for item in output] == [
        ("mcp.srv/1", "do it"), ("mcp.srv/1", "do_it"), (None, "a.b"), (None, "\u00e9")]


def test_reasoning_comes_back_word_for_word():
    body = {"include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"},
            "store": False}
    details = [{"type": "reasoning.text", "index": 0, "text": text} for text in ("se", "cret")]
    output = response_of([*(delta(reasoning_details=[detail]) for detail in details),
                          tools(tool(0, "c1", "f", "{}")), end("stop")], body)["output"]
    sealed = output[0]["encrypted_content"]
    assert "secret" not in sealed and brief(output)[0] == "(secret)"
    again = [user_responses("q"), {"type": "reasoning", "summary": [], "content": None,
                                   "encrypted_content": sealed}, output[1], result_responses("c1")]
    message = make_turn({"input": again}).chat["messages"][1]
    assert message["reasoning_content"] == "secret"
    assert message["reasoning_details"] == [{**details[0], "text": "secret"}]


def test_an_id_of_the_conversation_is_not_used_again():
    body = {"input": [user_responses("q"), call_responses("call_0"), result_responses("call_0")]}
    item, = response_of([tools(tool(0, "call_0", "f", "{}")), end("stop")], body)["output"]
    assert item["call_id"] != "call_0" and item["call_id"].startswith("call_")


def answered(status=502, said="x", **facts):
    return ifl.UpstreamRefused(said, status=status, **facts)


@pytest.mark.parametrize("exc, code, message", [
    (answered(429, "Slow down", retry_after_s=2.5), "rate_limit_exceeded",
     "Slow down. Please try again in 2.5s."),
    (answered(429, "Rate limit, try again in 2s"), "rate_limit_exceeded",
     "Rate limit, try again in 2s"),
    (answered(429, "x."), "rate_limit_exceeded", "x. Please try again in 5s."),
    (answered(429, body={"error": {"code": "insufficient_quota"}}), "insufficient_quota", "x"),
    (answered(400, overflow=(0, 0)), "context_length_exceeded", "x"),
    (ifl.Busy("x"), "server_is_overloaded", "x"), (answered(503), "server_is_overloaded", "x"),
    (ifl.UpstreamGarbled("x"), "server_error", "x"), (answered(400), "invalid_prompt", "x"),
    (ifl.UpstreamTimeout("x"), "server_error", "x")])
def test_failures(exc, code, message):
    events = list(make_turn({"input": "q"}).stream(counter()).fail(exc))
    assert names(events) == ["created", "in_progress", "failed"]
    assert [event["sequence_number"] for event in events] == [0, 1, 2]
    assert events[-1]["response"]["error"] == {"code": code, "message": message}


def test_failure_lists_what_was_done():
    writer = make_turn({"input": "q"}).stream(counter())
    chunks = [delta(content="a"), tools(tool(0, "c1", "f", "{"))]
    events = [event for each in chunks for event in writer.feed(each)]
    events += writer.fail(ifl.UpstreamGarbled("x"))
    last = events[-1]["response"]
    assert last["status"] == "failed" and brief(last["output"]) == ["a"] and last["usage"] is None
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


# --- compaction

TRIGGER = {"type": "compaction_trigger"}


def test_compaction_trigger_gives_exactly_one_item():
    body = {"input": [user_responses("q"), said_responses("a"), TRIGGER], "tools": [FUNCTION],
            "text": {"format": {"type": "json_object"}}}
    turn = make_turn(body)
    assert "tools" not in turn.chat and "response_format" not in turn.chat
    assert turn.chat["messages"][:2] == [U, {"role": "assistant", "content": "a"}]
    assert len(turn.chat["messages"]) == 3
    events = play_responses([delta(reasoning_content="t"), delta(content=" the "),
                             delta(content="sum"), end("stop")], body)
    assert broken_rules(events) == [] and names(events) == [
        "created", "in_progress", "output_item.added", "output_item.done", "completed"]
    [item] = events[-1]["response"]["output"]
    sealed = item["encrypted_content"]
    assert item["type"] == "compaction" and SEAL.decrypt(sealed) == {"summary": "the sum"}
    whole = turn.stream(counter()).whole(completion("the sum"))
    assert whole["output"][0]["encrypted_content"] == sealed
    again = make_turn({"input": [item, user_responses("q")]})
    assert "the sum" in again.chat["messages"][0]["content"]


def test_compaction_response_recalls_what_was_compacted_alone():
    turn = make_turn({"input": [user_responses("long"), said_responses("talk"), TRIGGER]})
    response = turn.stream(counter()).whole({"choices": [{"message": {"content": "the sum"}}]})
    store = ifl.ResponseStore()
    store.keep(response, turn.items)
    again = make_turn({"input": "q", "previous_response_id": "r"},
                      store={"r": store.recall(response["id"])})
    assert [message["content"] for message in again.chat["messages"]] == [
        "Summary of the conversation so far:\n\nthe sum", "q"]
    assert store.find(response["id"]).items == turn.items


def test_compact_endpoint():
    turn = make_turn({"input": [user_responses("q"), said_responses("a")]}, compact=True)
    answer = {"created": 3, "choices": [{"message": {"content": "sum"}}], "usage": USAGE_RESPONSES}
    made = turn.stream(counter()).whole(answer)
    assert (made["object"], made["created_at"]) == ("response.compaction", 3)
    assert made["usage"]["total_tokens"] == 15
    assert [(item["type"], item.get("role")) for item in made["output"]] == [
        ("message", "user"), ("compaction", None)]


@pytest.mark.parametrize(
    "chunks", [[tools(tool(0, "c1", "f", "{}")), end("stop")],
               [delta(content="half a"), end("length")]])
def test_no_summary_and_half_of_one_are_no_success(chunks):
    with pytest.raises(ifl.UpstreamGarbled):
        play_responses(chunks, {"input": [user_responses("q"), TRIGGER]})


# --- the seal

KNOWN = ("if2a1.eWXdDvNwGGIgT-VYBQWdnZhOKLJGa7tjUenX6VfNux20LD9NG3kKk2J-T9oC1QxnWlrFS65Eur"
         "0JAmGQMIOU2dWfIRW8tNiFEeACK56-2kg")


def test_seal_known_answer():
    assert SEAL.decrypt(KNOWN) == {"reasoning": "known \u00e9"}


def test_seal_is_deterministic_and_hides():
    value = {"reasoning": "plain text " * 9}
    sealed = SEAL.encrypt(value)
    assert SEAL.decrypt(sealed) == value and "plain" not in sealed
    assert SEAL.encrypt(dict(value)) == sealed
    assert SEAL.encrypt({"reasoning": "other"}) != sealed
    assert ifl.Seal(b"other key").decrypt(sealed) is None


def test_seal_notices_every_change():
    sealed = SEAL.encrypt({"reasoning": "x"})
    for at, char in enumerate(sealed):
        for other in "A_=\n\u00e9":
            if other != char:
                assert SEAL.decrypt(sealed[:at] + other + sealed[at + 1:]) is None
        assert SEAL.decrypt(sealed[:at]) is None
        assert SEAL.decrypt(sealed[:at] + sealed[at + 1:]) is None
    for foreign in (None, 5, "", "gAAAAABm", sealed + "=", sealed + "A", " " + sealed):
        assert SEAL.decrypt(foreign) is None


def _convert_messages(body):
    ifl.dump_chat(turn_of(body).chat)


def _convert_responses(body):
    ifl.dump_chat(make_turn(body).chat)


def _refill(chat):
    cache = ifl.ReasoningCache()
    request = ifl.Call(ifl.CHAT, chat, "", {}, "r")
    profile = {**ifl.DEFAULT_PROFILE, "require_reasoning_on_tool_calls": True, "origin": ""}
    ifl.refill(chat, request.memory(cache, chat["messages"]).recall, profile)


#: What grows with a client's request: id, size of the base, its maker, what is done with it.
GROWTH_OF_REQUESTS = [
    ("results of nobody", 1500, lambda n: {"messages": [
        user(*(result(f"t{at}", "x") for at in range(n)))]}, _convert_messages),
    ("text in small blocks", 10_000, lambda n: {"messages": [
        user("q"), assistant(*[text("abc")] * n), user("r")]}, _convert_messages),
    ("users with empty system texts between", 1200, lambda n: {"messages": [
        user("q" * 200), {"role": "system", "content": [text("")]}] * n + [user("r")]},
     _convert_messages),
    ("tools of a request", 1500, lambda n: {"tools": [
        {"name": f"t{at}", "input_schema": {}} for at in range(n)]}, _convert_messages),
    ("images in base64", 1_000_000, lambda n: {"messages": [
        user(image(type="base64", media_type="image/png", data="A" * n))]}, _convert_messages),
    ("a signature", 400_000, lambda n: {"messages": [user("q"), assistant(
        {"type": "thinking", "thinking": "t", "signature": ifl.SIGNATURE_PREFIX + "A" * n},
        text("a")), user("r")]}, _convert_messages),
    ("calls with one id", 700, lambda n: {"input": [
        user_responses("q"), *[call_responses("c")] * n, *[result_responses("c")] * n]},
     _convert_responses),
    ("outputs of nobody", 1000, lambda n: {"input": [
        user_responses("q"), *(result_responses(f"c{at}") for at in range(n))]},
     _convert_responses),
    ("calls of names that are not listed", 500, lambda n: {
        "tools": [{"type": "function", "name": f"t{at}"} for at in range(n)], "input": [
            user_responses("q"), *(call_responses(f"c{at}", f"x{at}") for at in range(n))]},
     _convert_responses),
    ("references to items of the request", 1000, lambda n: {"input": [
        *({**user_responses("q"), "id": f"m{at}"} for at in range(n)),
        *({"type": "item_reference", "id": f"m{at}"} for at in range(n))]}, _convert_responses),
    ("messages in small parts", 8000, lambda n: {"input": [
        {"role": "user", "content": [{"type": "input_text", "text": "abc"}] * n}]},
     _convert_responses),
    ("tools allowed by name", 1500, lambda n: {
        "input": "q", "tools": [{"type": "function", "name": f"t{at}"} for at in range(n)],
        "tool_choice": {"type": "allowed_tools", "tools": [
            {"type": "function", "name": f"t{at}"} for at in range(n)]}}, _convert_responses),
    ("reasoning of many calls after a long beginning", 1000, lambda n: {"messages": [
        {"role": "user", "content": "q" * 400 * n},
        *[{"role": "assistant", "tool_calls": [call("c")]}] * n]}, _refill),
]


@pytest.mark.parametrize("size, make, use", [row[1:] for row in GROWTH_OF_REQUESTS],
                         ids=[row[0] for row in GROWTH_OF_REQUESTS])
def test_requests_are_converted_in_linear_time(size, make, use):
    check_growth(size, make, use)


# --- one conversation in all dialects

SHOWN = "data:image/png;base64," + PNG
CALL_A, CALL_B = ("call", "a", {"x": 1}), ("call", "b", {})


def content_of(content, text_type, image_part):
    """A neutral content: texts, and SHOWN for an image."""
    return [image_part if piece == SHOWN else {"type": text_type, "text": piece}
            for piece in content]


def as_messages(*steps):
    """A neutral conversation as Messages has it; what an assistant does in a row is one message."""
    blocks = {"think": lambda thought: {"type": "thinking", "thinking": thought, "signature": ""},
              "say": text, "call": lambda ident, given: use(ident, "f", **given)}
    messages = []
    for kind, *facts in steps:
        if kind in blocks:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append(assistant())
            messages[-1]["content"].append(blocks[kind](*facts))
        elif kind in ("result", "error"):
            more = {"is_error": True} if kind == "error" else {}
            content = content_of(facts[1:], "text", image())
            messages.append(user(result(facts[0], content, **more)))
        else:
            messages.append({"role": kind, "content": content_of(facts, "text", image())})
    return {"messages": messages}


def as_items(*steps):
    """The same as Responses has it."""
    items = []
    for kind, *facts in steps:
        if kind == "think":
            items.append(thought_item(*facts))
        elif kind == "say":
            items.append(said_responses(*facts))
        elif kind == "call":
            given = json.dumps(facts[1], separators=(",", ":"))
            items.append(call_responses(facts[0], arguments=given))
        else:
            is_result = kind in ("result", "error")
            content = content_of(facts[is_result:], "input_text", image_responses(SHOWN))
            items.append(result_responses(facts[0], content) if is_result else
                         {"role": kind, "content": content})
    return {"input": items}


def as_contents(*steps):
    """The same as Gemini has it; what a role does in a row is one content."""
    shown = {"inlineData": {"mimeType": "image/png", "data": PNG}}
    blocks = {"think": lambda thought: {"text": thought, "thought": True},
              "say": lambda said: {"text": said},
              "call": lambda ident, given: {"functionCall": {"id": ident, "name": "f",
                                                             "args": given}}}
    contents = []
    for kind, *facts in steps:
        if kind in ("result", "error"):
            said = "\n\n".join(piece for piece in facts[1:] if piece != SHOWN)
            files = [shown for piece in facts[1:] if piece == SHOWN]
            field = "error" if kind == "error" else "output"
            parts = [{"functionResponse": {"id": facts[0], "name": "f", "parts": files,
                                           "response": {field: said}}}]
        else:
            parts = [blocks[kind](*facts)] if kind in blocks else [
                shown if piece == SHOWN else {"text": piece} for piece in facts]
        contents.append({"role": "model" if kind in blocks else "user", "parts": parts})
    return {"contents": contents}


def gemini_turn(body, profile=None, model="m"):
    return ifl.GeminiTurn({"contents": [{"parts": [{"text": "q"}]}], **body},
                          {**ifl.DEFAULT_PROFILE, **(profile or {})}, model)


def calls_chat(*idents, content=None, **more):
    given = {"a": '{"x":1}', "b": "{}"}
    return said_chat("assistant", content, tool_calls=[
        {**call(ident, "f", given[ident])} for ident in idents], **more)


ONE_FILE = "[1 attachment(s) of this result follow in the next user message]"
OF_A = [text("Attachment(s) of tool result a:"), IMAGE_PART]

#: id, neutral conversation, profile, the messages of the one chat request.
HISTORIES = [
    ("plain", [("user", "q"), ("say", "a"), ("user", "r")], {},
     [said_chat("user", "q"), said_chat("assistant", "a"), said_chat("user", "r")]),
    ("texts of one message", [("user", "q", "r")], {}, [said_chat("user", "q\n\nr")]),
    ("users in a row", [("user", "q"), ("user", "r"), ("user", SHOWN), ("user", "s")],
     {"mid_system": "user"},
     [said_chat("user", [text("q\n\nr"), IMAGE_PART, text("s")])]),
    ("an image for a text model", [("user", "q", SHOWN)], {"vision": False},
     [said_chat("user", "q\n\n" + ifl.NO_IMAGE)]),
    ("system texts at the beginning", [("system", "s"), ("system", "t"), ("user", "q")], {},
     [said_chat("system", "s\n\nt"), said_chat("user", "q")]),
    ("a later system text", [("user", "q"), ("system", "s"), ("user", "r")], {},
     [said_chat("user", "q"), said_chat("system", "s"), said_chat("user", "r")]),
    ("a later system text for a template with one at the top",
     [("system", "t"), ("user", "q"), ("system", "s"), ("user", "r")], {"mid_system": "user"},
     [said_chat("system", "t"), said_chat("user", "q\n\n<system>\ns\n</system>\n\nr")]),
    ("an empty system text", [("user", "q"), ("system", ""), ("say", "a"), ("user", "r")], {},
     [said_chat("user", "q"), said_chat("assistant", "a"), said_chat("user", "r")]),
    ("one step", [("user", "q"), ("think", "t"), ("say", "s"), CALL_A, CALL_B, ("result", "a", "1"),
                  ("result", "b", "2")], {},
     [said_chat("user", "q"), calls_chat("a", "b", content="s", reasoning_content="t"),
      tool_responses("1", "a"), tool_responses("2", "b")]),
    ("a result that comes late", [("user", "q"), CALL_A, ("user", "wait"), ("result", "a", "1")],
     {}, [said_chat("user", "q"), calls_chat("a"), tool_responses("1", "a"),
          said_chat("user", "wait")]),
    ("a result behind a system text", [("user", "q"), CALL_A, ("system", "s"),
                                       ("result", "a", "1")], {},
     [said_chat("user", "q"), calls_chat("a"), tool_responses("1", "a"), said_chat("system", "s")]),
    ("no result", [("user", "q"), CALL_A, ("user", "r")], {},
     [said_chat("user", "q"), calls_chat("a"), tool_responses(ifl.NO_RESULT, "a"),
      said_chat("user", "r")]),
    ("no result at the end", [("user", "q"), CALL_A], {},
     [said_chat("user", "q"), calls_chat("a"), tool_responses(ifl.NO_RESULT, "a")]),
    ("a result of nobody", [("user", "q"), ("result", "z", "1", SHOWN), ("user", "r")],
     {"mid_system": "user"},
     [said_chat("user", [text("q"), text("[result of tool call z]\n1"), IMAGE_PART, text("r")])]),
    ("an image in a result", [("user", "q"), CALL_A, ("result", "a", "1", SHOWN), ("user", "r")],
     {}, [said_chat("user", "q"), calls_chat("a"), tool_responses("1\n\n" + ONE_FILE, "a"),
          said_chat("user", [*OF_A, text("r")])]),
    ("nothing but an image in a result", [("user", "q"), CALL_A, ("result", "a", SHOWN),
                                          ("say", "s")], {},
     [said_chat("user", "q"), calls_chat("a"), tool_responses(ONE_FILE, "a"),
      said_chat("user", OF_A), said_chat("assistant", "s")]),
    ("an image in a result for a text model", [("user", "q"), CALL_A, ("result", "a", SHOWN)],
     {"vision": False},
     [said_chat("user", "q"), calls_chat("a"), tool_responses(ifl.NO_IMAGE, "a")]),
    ("reasoning that goes elsewhere", [("user", "q"), ("think", "t"), ("say", "s")],
     {"reasoning_field": "reasoning"},
     [said_chat("user", "q"), said_chat("assistant", "s", reasoning="t")]),
    ("reasoning in details", [("user", "q"), ("think", "t"), ("say", "s")],
     {"reasoning_field": "reasoning_details"},
     [said_chat("user", "q"), said_chat("assistant", "s", reasoning_details=[
         {"type": "reasoning.text", "text": "t"}])]),
    ("reasoning that nobody wants", [("user", "q"), ("think", "t"), ("say", "s")],
     {"reasoning_field": None}, [said_chat("user", "q"), said_chat("assistant", "s")]),
    ("reasoning that calls need", [("user", "q"), ("say", "s"), ("user", "r"), CALL_B,
                                   ("result", "b", "2")],
     {"require_reasoning_on_tool_calls": True},
     [said_chat("user", "q"), said_chat("assistant", "s"), said_chat("user", "r"),
      calls_chat("b", reasoning_content=""), tool_responses("2", "b")]),
    ("reasoning that all need", [("user", "q"), ("say", "s"), ("user", "r"), CALL_B,
                                 ("result", "b", "2")],
     {"require_reasoning_on_tool_calls": "all"},
     [said_chat("user", "q"), said_chat("assistant", "s", reasoning_content=""),
      said_chat("user", "r"), calls_chat("b", reasoning_content=""), tool_responses("2", "b")]),
]


@pytest.mark.parametrize("steps, profile, messages", [row[1:] for row in HISTORIES],
                         ids=[row[0] for row in HISTORIES])
def test_one_conversation_is_one_chat_request(steps, profile, messages):
    assert turn_of(as_messages(*steps), **profile).chat["messages"] == messages
    assert make_turn(as_items(*steps), profile).chat["messages"] == messages
    if not any(step[0] == "system" for step in steps):     # Gemini has none within a conversation
        assert gemini_turn(as_contents(*steps), profile).chat["messages"] == messages


def test_reasoning_is_not_required_where_thinking_is_off():
    required = {"require_reasoning_on_tool_calls": True}
    for kind, effort, field in ((None, None, ""), ("adaptive", "high", ""),
                                ("disabled", "none", None)):
        body = {**as_messages(("user", "q"), CALL_A), "thinking": kind and {"type": kind}}
        items = {**as_items(("user", "q"), CALL_A), "reasoning": {"effort": effort}}
        for turn in (turn_of(body, **required), make_turn(items, required)):
            assert turn.chat["messages"][1].get("reasoning_content") == field


# --- one wish in all dialects

def as_chat(*steps):
    """The same as Chat has it."""
    messages = []
    for kind, *facts in steps:
        if kind in ("think", "say", "call"):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append(said_chat("assistant", None))
            said = messages[-1]
            if kind == "call":
                given = json.dumps(facts[1], separators=(",", ":"))
                said.setdefault("tool_calls", []).append(call(facts[0], "f", given))
            else:
                said["content" if kind == "say" else "reasoning_content"] = facts[0]
        elif kind in ("result", "error"):
            messages.append(tool_responses(facts[1], facts[0]))
        else:
            parts = content_of(facts, "text", IMAGE_PART)
            messages.append(said_chat(kind, parts if SHOWN in facts else facts[0]))
    return {"messages": messages}


def chat_request(steps, wish):
    """A conversation with its wishes as a client of Chat writes it."""
    choice, schema = wish.get("choice"), wish.get("schema")
    is_named = choice not in (None, "auto", "required", "none")
    form = {"name": "output", "schema": schema, "strict": True}
    return {"model": "m", **as_chat(("system", "S"), *steps), **ifl.non_empty(
        tools=[function("f")] if wish.get("tools", True) else [],
        tool_choice=function_named(choice) if is_named else choice,
        response_format=schema and {"type": "json_schema", "json_schema": form},
        thinking={"type": "enabled"} if wish.get("thinks") else None,
        max_tokens=wish.get("limit"), temperature=wish.get("heat"), stop=wish.get("stop"))}


def messages_request(steps, wish):
    """The same of Messages."""
    choice, schema = wish.get("choice"), wish.get("schema")
    kinds = {"required": "any", "auto": "auto", "none": "none"}
    wanted = {"type": kinds[choice]} if choice in kinds else {"type": "tool", "name": choice}
    form = {"format": {"type": "json_schema", "schema": schema}}
    return {"model": "m", "max_tokens": wish.get("limit", 256), "system": "S",
            **as_messages(*steps), **ifl.non_empty(
                tools=[{"name": "f", "input_schema": {}}] if wish.get("tools", True) else [],
                tool_choice=choice and wanted, output_config=schema and form,
                thinking={"type": "adaptive"} if wish.get("thinks") else None,
                temperature=wish.get("heat"), stop_sequences=wish.get("stop"))}


def responses_request(steps, wish):
    """The same of Responses."""
    choice, schema = wish.get("choice"), wish.get("schema")
    is_named = choice not in (None, "auto", "required", "none")
    form = {"type": "json_schema", "name": "output", "schema": schema, "strict": True}
    return {"model": "m", "instructions": "S", **as_items(*steps), **ifl.non_empty(
        tools=[{"type": "function", "name": "f"}] if wish.get("tools", True) else [],
        tool_choice={"type": "function", "name": choice} if is_named else choice,
        text=schema and {"format": form}, max_output_tokens=wish.get("limit"),
        reasoning={"effort": "high"} if wish.get("thinks") else None,
        temperature=wish.get("heat"))}


def gemini_request(steps, wish):
    """The same of Gemini."""
    choice, schema = wish.get("choice"), wish.get("schema")
    modes = {"auto": "AUTO", "none": "NONE"}
    is_named = choice not in (None, "auto", "required", "none")
    config = {"mode": modes.get(choice, "ANY"), **({"allowedFunctionNames": [choice]}
                                                   if is_named else {})}
    offered = [{"functionDeclarations": [{"name": "f"}]}] if wish.get("tools", True) else []
    return {"systemInstruction": "S", **as_contents(*steps), **ifl.non_empty(
        tools=offered, toolConfig=choice and {"functionCallingConfig": config}),
        "generationConfig": ifl.non_empty(
            responseMimeType=schema and "application/json", responseJsonSchema=schema,
            thinkingConfig={"thinkingLevel": "HIGH"} if wish.get("thinks") else None,
            maxOutputTokens=wish.get("limit"), temperature=wish.get("heat"),
            stopSequences=wish.get("stop"))}


#: dialect -> how a client writes a request, and where it sends it.
DIALECTS = {"chat": (chat_request, "/v1/chat/completions"),
            "messages": (messages_request, "/v1/messages"),
            "responses": (responses_request, "/v1/responses"),
            "gemini": (gemini_request, "/v1beta/models/m:generateContent")}


def wished(dialect, choice=None, schema=None, tools=True, thinks=False, **profile):
    """The chat request for a conversation with a tool `f`, a choice and a schema, and a profile."""
    profile = {**ifl.DEFAULT_PROFILE, **profile}
    body = DIALECTS[dialect][0]([("user", "q")], {"choice": choice, "schema": schema,
                                                  "tools": tools, "thinks": thinks})
    if dialect == "messages":
        return turn_of(body, **profile).chat
    if dialect == "responses":
        return make_turn(body, profile).chat
    if dialect == "gemini":
        return gemini_turn(body, profile).chat
    done = ifl.finish_chat(body, profile, ifl.Wishes(thinking=thinks or None, is_chat=True))
    assert (done is body) == (done == body)                # what needs no change is not copied
    return done


STRICT = {"type": "json_schema", "json_schema": {"name": "output", "schema": SCHEMA,
                                                 "strict": True}}
RULE = ('S\n\nAnswer with nothing but JSON that fits this JSON Schema:\n'
        '{"type":"object","properties":{"a":{"type":"integer"}}}')
#: id, what is wished, under which profile -> tools are sent, tool_choice, format, system text.
WISHES = [
    ("nothing", {}, (True, None, None, "S")),
    ("auto", {"choice": "auto"}, (True, "auto", None, "S")),
    ("required", {"choice": "required"}, (True, "required", None, "S")),
    ("named", {"choice": "f"}, (True, function_named("f"), None, "S")),
    ("none", {"choice": "none"}, (True, "none", None, "S")),
    ("required where auto alone is known", {"choice": "required", "forced_tool_choice": False},
     (True, "auto", None, "S")),
    ("named where auto alone is known", {"choice": "f", "forced_tool_choice": False},
     (True, "auto", None, "S")),
    ("none where auto alone is known", {"choice": "none", "forced_tool_choice": False},
     (False, None, None, "S")),
    ("required while it thinks", {"choice": "required", "thinks": True,
                                  "forced_tool_choice_with_thinking": False},
     (True, "auto", None, "S")),
    ("required while it does not think", {"choice": "required",
                                          "forced_tool_choice_with_thinking": False},
     (True, "required", None, "S")),
    ("a schema", {"schema": SCHEMA}, (True, None, STRICT, "S")),
    ("a schema where an object is known", {"schema": SCHEMA, "structured_output": "json_object"},
     (True, None, {"type": "json_object"}, RULE)),
    ("a schema that only a prompt can ask for", {"schema": SCHEMA, "structured_output": "prompt"},
     (True, None, None, RULE)),
]


@pytest.mark.parametrize("dialect", ["messages", "responses", "gemini", "chat"])
@pytest.mark.parametrize("wish, expected", [row[1:] for row in WISHES],
                         ids=[row[0] for row in WISHES])
def test_one_wish_is_one_chat_request(dialect, wish, expected):
    chat = wished(dialect, **wish)
    form = chat.get("response_format")
    if dialect == "gemini" and form and "json_schema" in form:     # Google's are not OpenAI's
        assert form["json_schema"].pop("strict") is False
        form["json_schema"]["strict"] = True
    assert ("tools" in chat, chat.get("tool_choice"), form,
            chat["messages"][0]["content"]) == expected


STEP = [("user", "q"), ("think", "t"), ("say", "s"), CALL_A, CALL_B,
        ("result", "a", "1"), ("result", "b", "2")]
#: id, neutral conversation, its wishes.
SAME = [
    ("text", [("user", "q"), ("say", "a"), ("user", "r")], {}),
    ("an image", [("user", "q", SHOWN)], {}),
    ("thinking, parallel calls and their results", [*STEP, ("user", "r")], {}),
    ("a call without a text", [("user", "q"), CALL_A, ("result", "a", "1")], {}),
    ("a result that is an error", [("user", "q"), CALL_A, ("error", "a", "1")], {}),
    ("a forced tool", STEP, {"choice": "f"}),
    ("any tool", STEP, {"choice": "required"}),
    ("no tool", STEP, {"choice": "none"}),
    ("a schema", [("user", "q")], {"schema": SCHEMA, "tools": False}),
    ("thinking that is asked for", [("user", "q")], {"thinks": True}),
    ("stop", [("user", "q")], {"stop": ["x", "y"]}),
    ("limits", [("user", "q")], {"limit": 9, "heat": 0.5}),
]


#: Differences from the request of a Chat client that lie in the dialects: row, dialects, why, and
#: what becomes of that request.
APART = [
    ("a result that is an error", ("messages", "gemini"), "Chat's results have no mark of errors",
     lambda chat: chat["messages"][-1].update(content="[tool error] 1")),
    ("a schema", ("gemini",), "Google's schemas are not OpenAI's, so they are not strict",
     lambda chat: chat["response_format"]["json_schema"].update(strict=False)),
    ("thinking that is asked for", ("responses", "gemini"), "thinking is asked for by its effort",
     lambda chat: chat.update(reasoning_effort="high")),
    ("stop", ("responses",), "there is no such field", lambda chat: chat.pop("stop")),
]


@pytest.mark.parametrize("name, steps, wish", SAME, ids=[row[0] for row in SAME])
def test_one_conversation_reaches_the_upstream_as_one_request(server, upstream, name, steps, wish):
    running, sent = server(upstream), {}
    for dialect, (write, path) in DIALECTS.items():
        assert post(running, write(steps, {"limit": 256, **wish}), path).status == 200
        sent[dialect] = upstream.last.json
    for dialect in DIALECTS:
        expected = json.loads(json.dumps(sent["chat"]))
        for row, dialects, _, change in APART:
            if row == name and dialect in dialects:
                change(expected)
        assert sent[dialect] == expected, dialect


def test_tools_that_nobody_runs_are_told_in_both_dialects():
    told = "S\n\n" + ifl.NO_TOOL.format("web_search")
    assert turn_of({"system": "S", "tools": [SEARCH, TIME]}).chat["messages"][0]["content"] == told
    body = {"instructions": "S", "input": "q",
            "tools": [{"type": "web_search_preview"}, {"type": "mcp", "server_label": "x"}]}
    assert make_turn(body).chat["messages"][0]["content"] == told
    assert make_turn({**body, "instructions": None}).chat["messages"] == [U]
    native = {"server_tools": {"web_search": {"fields": {"enable_search": True}}}}
    assert make_turn(body, native).chat["messages"][0]["content"] == "S"


def test_a_chat_request_is_changed_where_its_provider_needs_it(server, upstream):
    body = chat(tools=[function("f")], tool_choice="required")
    plain = server(upstream)
    tame = server(provider(upstream, profile={"forced_tool_choice": False}))
    assert post(plain, body).status == 200 == post(tame, body).status
    assert upstream.requests[-2].json["tool_choice"] == "required"
    assert upstream.requests[-1].json == {**upstream.requests[-2].json, "tool_choice": "auto"}


# === 10. Gemini ==============================================================

ASKED = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
AT_GEMINI = "/v1beta/models/m1:"
STREAMED = "streamGenerateContent?alt=sse"


def gemini_chat(body, profile=None):
    """The chat request that a Gemini request becomes, without its model and messages."""
    chat = gemini_turn(body, profile).chat
    return {name: value for name, value in chat.items() if name not in ("model", "messages")}


def gemini_result(**facts):
    return {"functionResponse": {"name": "f", **facts}}


def gemini_call(name="f", ident=None, **args):
    return {"functionCall": {"name": name, **({"id": ident} if ident else {}), "args": args}}


SPELLINGS = {"inlineData": "inline_data", "mimeType": "mime_type", "topP": "top_p",
             "thinkingConfig": "thinking_config", "thinkingLevel": "thinking_level",
             "generationConfig": "generation_config", "systemInstruction": "system_instruction",
             "responseMimeType": "response_mime_type", "functionDeclarations":
                 "function_declarations", "parametersJsonSchema": "parameters_json_schema"}


def test_both_spellings_are_one_request():
    body = {"systemInstruction": {"parts": [{"text": "S"}]},
            "contents": [{"parts": [{"inlineData": {"mimeType": "image/png", "data": PNG}}]}],
            "tools": [{"functionDeclarations": [{
                "name": "f", "parametersJsonSchema": {"type": "object", "properties": {
                    "topP": {"type": "string"}, "mime_type": {"type": "string"}}}}]}],
            "generationConfig": {"topP": 0.5, "responseMimeType": "application/json",
                                 "thinkingConfig": {"thinkingLevel": "LOW"}}}
    text = json.dumps(body)
    for camel, snake in SPELLINGS.items():
        text = text.replace(f'"{camel}": ', f'"{snake}": ')
    other = json.loads(text)
    other["tools"][0]["function_declarations"][0]["parameters_json_schema"] = (
        body["tools"][0]["functionDeclarations"][0]["parametersJsonSchema"])
    assert other != body
    assert gemini_turn(other).chat == gemini_turn(body).chat


GEMINI_THINKS = {"thinking_style": "thinking_type"}
GENERATION = [
    ({"temperature": 1, "topP": 0.95, "topK": 64.0, "seed": 7, "maxOutputTokens": 9},
     {"temperature": 1, "top_p": 0.95, "top_k": 64, "seed": 7, "max_tokens": 9}),
    ({"presencePenalty": 0.5, "frequencyPenalty": 1.5, "candidateCount": 1, "mediaResolution": "x"},
     {"presence_penalty": 0.5, "frequency_penalty": 1.5}),
    ({"stopSequences": ["a", "b", "", "c", "d", "e"]}, {"stop": ["a", "b", "c", "d"]}),
    ({"responseLogprobs": True, "logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
    ({}, {}),
    ({"responseMimeType": "application/json"}, {"response_format": {"type": "json_object"}}),
    ({"responseMimeType": "text/plain", "responseSchema": {"type": "OBJECT"}}, {}),
    ({"responseMimeType": "application/json", "responseJsonSchema": {
        "type": "OBJECT", "properties": {"a": {"type": "STRING", "nullable": True}},
        "propertyOrdering": ["a"]}},
     {"response_format": {"type": "json_schema", "json_schema": {
         "name": "output", "strict": False, "schema": {
             "type": "object", "properties": {"a": {"type": ["string", "null"]}}}}}}),
    ({"thinkingConfig": {"includeThoughts": True}}, {}),
    ({"thinkingConfig": {"thinkingBudget": 0}}, {"thinking": {"type": "disabled"}}),
    ({"thinkingConfig": {"thinkingBudget": -1}}, {"thinking": {"type": "enabled"}}),
    ({"thinkingConfig": {"thinkingBudget": 8192}}, {"thinking": {"type": "enabled"}}),
    ({"thinkingConfig": {"thinking_level": "high"}},
     {"thinking": {"type": "enabled"}, "reasoning_effort": "high"})]


@pytest.mark.parametrize("config, expected", GENERATION)
def test_generation_config(config, expected):
    assert gemini_chat({"generationConfig": config}, {**GEMINI_THINKS, "top_k": True}) == expected


def test_an_enum_is_asked_for_by_a_rule():
    turn = gemini_turn({"generationConfig": {
        "responseMimeType": "text/x.enum",
        "responseSchema": {"type": "STRING", "enum": ["a", "b"]}}})
    assert turn.chat["messages"][0] == said_chat(
        "system", "Answer with nothing but one of these values: a, b")
    assert "response_format" not in turn.chat


SCHEMAS = [
    ({"type": "OBJECT", "properties": {"type": {"type": "INTEGER"}, "any_of": {"type": "STRING"}},
      "required": ["type"], "property_ordering": ["type"], "$schema": "x"},
     {"type": "object", "properties": {"type": {"type": "integer"}, "any_of": {"type": "string"}},
      "required": ["type"]}),
    ({"type": "ARRAY", "items": {"type": "STRING", "enum": ["A", "B"], "nullable": True},
      "minItems": "2", "max_items": 5},
     {"type": "array", "items": {"type": ["string", "null"], "enum": ["A", "B", None]},
      "minItems": 2, "maxItems": 5}),
    ({"any_of": [{"type": "STRING"}, {"$ref": "#/$defs/X"}], "nullable": True,
      "$defs": {"X": {"type": "NUMBER", "title": "X"}}},
     {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/X"}, {"type": "null"}],
      "$defs": {"X": {"type": "number", "title": "X"}}}),
    ({"type": ["STRING", "null"], "additionalProperties": False, "default": "TYPE"},
     {"type": ["string", "null"], "additionalProperties": False, "default": "TYPE"}),
    ({"type": "TYPE_UNSPECIFIED", "example": 1, "description": "STRING"},
     {"description": "STRING"})]


@pytest.mark.parametrize("schema, expected", SCHEMAS)
def test_schemas_of_both_kinds(schema, expected):
    assert ifl.plain_schema(schema) == expected
    declared = {"tools": [{"functionDeclarations": [{"name": "f", "parameters": schema}]}]}
    parameters = gemini_chat(declared)["tools"][0]["function"]["parameters"]
    assert parameters == {"type": "object", "properties": {}, **expected}


TWO = {"tools": [{"functionDeclarations": [{"name": "f"}, {"name": "g.h"}]}]}
GEMINI_CHOICES = [
    ({}, None, ["f", "g_h"]), ({"mode": "AUTO"}, "auto", ["f", "g_h"]),
    ({"mode": "validated"}, "auto", ["f", "g_h"]), ({"mode": "NONE"}, "none", ["f", "g_h"]),
    ({"mode": "ANY"}, "required", ["f", "g_h"]),
    ({"mode": "ANY", "allowedFunctionNames": ["g.h"]}, function_named("g_h"), ["f", "g_h"]),
    ({"mode": "ANY", "allowed_function_names": ["f", "g.h"]}, "required", ["f", "g_h"]),
    ({"mode": "ANY", "allowedFunctionNames": ["f", "x"]}, "required", ["f"])]


@pytest.mark.parametrize("config, choice, names", GEMINI_CHOICES)
def test_function_calling_config(config, choice, names):
    chat = gemini_turn({**TWO, "toolConfig": {"functionCallingConfig": config}}).chat
    assert chat.get("tool_choice") == choice
    assert [tool["function"]["name"] for tool in chat["tools"]] == names


def test_tools_that_google_runs():
    search = {"tools": [{"googleSearch": {}}, {"code_execution": {}}], "systemInstruction": "S"}
    told = gemini_turn(search).chat["messages"][0]["content"]
    assert told == "S\n\n" + ifl.NO_TOOL.format("web_search, code_interpreter")
    native = {"server_tools": {"web_search": {"fields": {"enable_search": True}}}}
    assert gemini_chat({"tools": [{"google_search": {}}]}, native)["enable_search"] is True


ANSWERS = [
    # parts of the model, parts of the user -> ids of calls, contents of their results
    ([gemini_call(ident="a"), gemini_call(ident="b")],
     [gemini_result(id="b", response={"output": "2"}), gemini_result(
         id="a", response={"result": {"n": 1}})], ["a", "b"], {"b": "2", "a": '{"n":1}'}),
    ([gemini_call(ident="a"), gemini_call(ident="b")],         # Python's SDK names no id
     [gemini_result(response={"result": 1}), gemini_result(response={"x": 1, "output": 2})],
     ["a", "b"], {"a": "1", "b": '{"x":1,"output":2}'}),
    ([gemini_call(), gemini_call("g")],
     [{"functionResponse": {"name": "g", "response": {"error": "no"}}}, gemini_result()],
     ["call_0_f", "call_1_g"], {"call_1_g": "[tool error] no", "call_0_f": "{}"}),
    ([gemini_call(ident="a"), gemini_call(ident="a")],
     [gemini_result(id="a", response={"output": "1"}), gemini_result(response={"output": "2"})],
     ["a", "call_1_f"], {"a": "1", "call_1_f": "2"})]


@pytest.mark.parametrize("called, answered, ids, contents", ANSWERS)
def test_results_find_their_calls(called, answered, ids, contents):
    chat = gemini_turn({"contents": [{"role": "model", "parts": called},
                                     {"role": "function", "parts": answered}]}).chat
    assert [call["id"] for call in chat["messages"][0]["tool_calls"]] == ids
    assert {message["tool_call_id"]: message["content"] for message in chat["messages"][1:]} == (
        contents)


def test_an_image_beside_a_result_follows_the_tool_messages():
    shown = {"inlineData": {"mimeType": "image/png", "data": PNG}}
    chat = gemini_turn({"contents": [
        {"role": "model", "parts": [gemini_call(ident="a")]},
        {"parts": [gemini_result(id="a", response={"output": "1"}), shown]}]}).chat
    assert chat["messages"][1:] == [tool_responses("1", "a"), said_chat("user", [IMAGE_PART])]


GEMINI_PARTS = [
    ({"inlineData": {"mimeType": "image/png", "data": PNG}}, IMAGE_PART),
    ({"fileData": {"mimeType": "image/png", "fileUri": "https://x/y.png"}},
     {"type": "image_url", "image_url": {"url": "https://x/y.png"}}),
    ({"inlineData": {"mimeType": "text/plain", "data": "aGVsbG8=", "displayName": "a.txt"}},
     text("File a.txt:\nhello")),
    ({"inlineData": {"mimeType": "application/pdf", "data": "JVBERi0xLjQ="}},
     text(ifl.NO_PDF.format("file.pdf"))),
    ({"executableCode": {"code": "1+1"}}, text('[executableCode: {"code":"1+1"}]')),
    ({"unknownPart": {}}, None), ({"text": ""}, None)]


@pytest.mark.parametrize("part, expected", GEMINI_PARTS)
def test_parts(part, expected):
    body = {"contents": [{"parts": [{"text": "q"}, part]}]}
    chat = gemini_turn(body, {"files": False}).chat
    parts = [text("q"), *([expected] if expected else [])]
    assert chat["messages"] == [said_chat("user", ifl.join_parts(parts))]


def test_thoughts_come_back_in_the_signature():
    """gemini-cli drops thought parts and joins texts; Google's SDKs keep each response's parts."""
    events, _ = play_in("gemini", [
        delta(reasoning_content="r1 "), delta(reasoning_content="r2"), delta(content="Hel"),
        delta(content="lo"), tools(tool(0, "a", "f", '{"x":1}')), delta("tool_calls")])
    parts = [part for each in events
             for part in each["candidates"][0].get("content", {}).get("parts", ())]
    signed = [part for part in parts if "thoughtSignature" in part]
    assert [("text" in part, "functionCall" in part) for part in signed] == [
        (True, False), (False, True)]
    kept_by_cli = [{"text": "Hello", "thoughtSignature": signed[0]["thoughtSignature"]},
                   gemini_call(ident="a", x=1)]
    for kept in (parts, kept_by_cli, signed[1:]):
        history = [{"role": "user", "parts": [{"text": "q"}]},
                   *({"role": "model", "parts": [part]} for part in kept)]
        message = gemini_turn({"contents": history}).chat["messages"][1]
        assert message["reasoning_content"] == "r1 r2"
        assert message["tool_calls"][0]["id"] == "a"
    urlsafe = signed[0]["thoughtSignature"].replace("+", "-").replace("/", "_")
    assert ifl.read_thought_signature(urlsafe)["text"] == "r1 r2"
    for foreign in ("skip_thought_signature_validator", "ZW1wdHk=", "é", "A" * 5, None):
        assert ifl.read_thought_signature(foreign) == {}


@pytest.mark.parametrize("chunks, reason, calls", [
    ([delta(content="a"), delta("stop")], "STOP", 0),
    ([delta(content="a"), delta("length")], "MAX_TOKENS", 0),
    ([delta(content="a"), delta("content_filter")], "SAFETY", 0),
    ([tools(tool(0, "a", "f", "{}")), delta("tool_calls")], "STOP", 1),
    ([tools(tool(0, "a", "f", '{"x": ')), delta("tool_calls")], "MALFORMED_FUNCTION_CALL", 0),
    ([tools(tool(0, "a", "f", '{"x": ')), delta("length")], "MAX_TOKENS", 0),
    ([tools(tool(0, "a", "nobody", "{}")), delta("tool_calls")], "UNEXPECTED_TOOL_CALL", 0),
    ([tools(tool(0, "a", "f", "{}")), tools(tool(1, "b", "nobody", "{}"))], "STOP", 1)])
def test_finish_reasons(chunks, reason, calls):
    events, parts = play_in("gemini", chunks)
    assert events[-1]["candidates"][0]["finishReason"] == reason
    assert sum(not isinstance(part, str) for part in parts) == calls


def test_an_id_that_gemini_cli_would_cut_is_replaced():
    _, parts = play_in("gemini", [tools(tool(0, "f__1", "f", "{}")), delta("stop")])
    assert parts == [used(NEW, "f")]


REFUSED = [
    ({}, "contents: at least one content is required"), ({"contents": 3}, "contents: a list of"),
    ({"contents": []}, "contents: at least one"),
    ({"contents": [{"parts": [{"text": 5}]}]}, "contents[0].parts[0].text: a string expected"),
    ({"contents": [{"parts": [{"inlineData": {"mimeType": "image/png", "data": "!"}}]}]},
     "contents[0].parts[0].inlineData.data: base64 expected"),
    ({"contents": [{"role": "model", "parts": [{"functionCall": {}}]}]},
     "contents[0].parts[0].functionCall.name: a name is required"),
    ({**ASKED, "generationConfig": {"candidateCount": 3}}, "candidateCount: only 1"),
    ({**ASKED, "generationConfig": {"temperature": "hot"}},
     "generationConfig.temperature: a number expected"),
    ({**ASKED, "generationConfig": []}, "generationConfig: an object expected"),
    ({**ASKED, "tools": [{"functionDeclarations": [{"description": "d"}]}]},
     "tools[0].functionDeclarations[0].name: a name is required"),
    ({**ASKED, "toolConfig": {"functionCallingConfig": {"mode": 1}}},
     "toolConfig.functionCallingConfig.mode: a string expected"),
    (b"{", "JSON")]


@pytest.mark.parametrize("body, said", REFUSED)
@pytest.mark.parametrize("verb", ["generateContent", STREAMED])
def test_bad_gemini_requests(server, upstream, body, said, verb):
    answer = post(server(upstream), body, AT_GEMINI + verb)
    assert answer.status == 400 == answer.json["error"]["code"]
    assert answer.json["error"]["status"] == "INVALID_ARGUMENT"
    assert said in answer.json["error"]["message"] and not upstream.requests


GEMINI_PATHS = ["/v1beta/models/{}", "/v1/models/{}", "/v1beta/v1beta/models/{}",
                "/v1beta/v1/models/{}", "/v1beta1/publishers/google/models/{}"]


@pytest.mark.parametrize("path", GEMINI_PATHS)
@pytest.mark.parametrize("model, wanted", [
    ("m1", "m1"), ("vendor/mod:free", "vendor/mod:free"), ("vendor%2Fm%3Afree", "vendor/m:free"),
    ("gemini-2.5-pro", "m1")])
def test_gemini_paths_and_models(server, upstream, path, model, wanted):
    running = server(upstream, default_model="m1")
    answer = post(running, ASKED, path.format(model) + ":generateContent")
    assert answer.status == 200, answer
    assert answer.json["candidates"] == [{
        "index": 0, "finishReason": "STOP",
        "content": {"role": "model", "parts": [{"text": "Hello"}]}}]
    assert answer.json["usageMetadata"] == {
        "promptTokenCount": 12, "candidatesTokenCount": 3, "totalTokenCount": 15}
    assert upstream.last.json["model"] == wanted


@pytest.mark.parametrize("method, path, status", [
    ("POST", "/v1beta/models/m1:unknownVerb", 404), ("POST", "/v1beta/models/m1", 404),
    ("POST", "/v1beta/interactions", 404), ("POST", "/v1beta/cachedContents", 404),
    ("POST", "/upload/v1beta/files?key=x", 404), ("GET", "/v1beta/models/nobody", 404),
    ("PUT", "/v1beta/models", 405)])
def test_what_gemini_has_and_this_server_has_not(server, upstream, method, path, status):
    with Client(server(upstream)) as client:
        answer = client.request(method, path, body=ASKED,
                                headers={"x-goog-api-key": "k"}).answer()
    error = answer.json["error"]
    assert (answer.status, error["code"]) == (status, status) and error["message"]
    assert error["status"] == ("NOT_FOUND" if status == 404 else "INVALID_ARGUMENT")


def test_cached_content_is_not_found(server, upstream):
    body = {**ASKED, "cachedContent": "cachedContents/1"}
    assert post(server(upstream), body, AT_GEMINI + "generateContent").status == 404


def test_a_gemini_stream_on_the_wire(server, upstream):
    running = server(upstream)
    upstream.usual = sse(*HELLO)
    answer = post(running, ASKED, AT_GEMINI + STREAMED)
    assert answer.headers["content-type"].startswith("text/event-stream")
    records = answer.body.split(b"\n\n")
    assert records[-1] == b"" and all(
        each.startswith(b"data: {") and b"\n" not in each for each in records[:-1])
    assert parts_of(joined_responses([
        {**json.loads(each[6:]), "modelVersion": "m"} for each in records[:-1]])) == ["Hello"]
    whole = post(running, ASKED, AT_GEMINI + "streamGenerateContent")
    assert whole.headers["content-type"].startswith("application/json")
    assert parts_of(joined_responses([{**each, "modelVersion": "m"} for each in whole.json])) == [
        "Hello"]
    for verb in (STREAMED, "streamGenerateContent"):     # a plain answer becomes a stream, too
        upstream.usual = plain(completion())
        assert b'"Hello"' in post(running, ASKED, AT_GEMINI + verb).body


def test_gemini_keep_alives_are_bare_newlines(server, upstream):
    go = threading.Event()
    upstream.usual = sse(ROLE, go, chunk("late"), chunk(finish="stop"), DONE)
    with Client(server(upstream, keepalive_s=0.02)) as client:
        client.post(ASKED, path=AT_GEMINI + STREAMED)
        assert client.head()[0] == 200 and client.piece() == b"\n" == client.piece()
        go.set()
        rest = client.pieces()
    assert rest.lstrip(b"\n").startswith(b"data: {") and b'"late"' in rest


@pytest.mark.parametrize("verb, start", [(STREAMED, b"{"), ("streamGenerateContent", b",\n{")])
def test_an_error_within_a_gemini_stream_is_a_bare_object(server, upstream, verb, start):
    upstream.usual = sse(ROLE, chunk("part"), RESET, end=False)
    with Client(server(upstream)) as client:
        assert client.post(ASKED, path=AT_GEMINI + verb).head()[0] == 200
        pieces = list(iter(client.piece, b""))
    assert pieces[-1].startswith(start)
    error = json.loads(pieces[-1].strip(b",\n]"))["error"]
    assert error["code"] == 502 and error["message"]


GEMINI_ERRORS = [
    (plain({"error": {"message": "slow down"}}, 429, [("Retry-After", "5")]), 429,
     "RESOURCE_EXHAUSTED", "RetryInfo"),
    (plain({"error": {"message": "bad", "code": "x"}}, 400), 400, "INVALID_ARGUMENT", None),
    (plain({"error": {"message": "insufficient balance"}}, 429), 429, "RESOURCE_EXHAUSTED", None),
    (plain({"error": {"message": "busy"}}, 503), 503, "UNAVAILABLE", None),
    (plain({"error": {"message": "prompt is too long: 9 tokens > 8 maximum"}}, 400), 400,
     "INVALID_ARGUMENT", None)]


@pytest.mark.parametrize("answer, code, status, detail", GEMINI_ERRORS)
def test_upstream_errors_as_gemini_has_them(server, upstream, answer, code, status, detail):
    upstream.usual = answer
    error = post(server(upstream), ASKED, AT_GEMINI + STREAMED).json["error"]
    assert (error["code"], error["status"]) == (code, status)
    kinds = [each["@type"].rpartition(".")[2] for each in error.get("details", ())]
    assert detail is None or detail in kinds
    if "too long" in str(answer.steps):
        assert error["message"] == ("The input token count (9) exceeds the maximum number of "
                                    "tokens allowed (8).")


@pytest.mark.parametrize("how", [
    {"x-goog-api-key": "k"}, {"Authorization": "Bearer k"}, {"query": "key=k"},
    {"query": "alt=sse&key=k"}])
def test_the_key_of_a_gemini_client(server, upstream, how, log_lines):
    running = server(upstream, custom_api_key="secret-key")
    query, headers = how.get("query", ""), {name: value for name, value in how.items()
                                            if name != "query"}
    for key, status in (("wrong", 401), ("secret-key", 200)):
        swap = lambda text: re.sub(r"\bk$", key, text)   # noqa: E731
        with Client(running) as client:
            answer = client.post(ASKED, path=f"{AT_GEMINI}generateContent?{swap(query)}", headers={
                name: swap(value) for name, value in headers.items()}).answer()
        assert answer.status == status, answer
        assert status == 200 or answer.json["error"]["status"] == "UNAUTHENTICATED"
    assert not any("secret-key" in line.getMessage() for line in log_lines)


def test_models_for_gemini_clients(server, upstream):
    running = server(provider(upstream, models=["m1", {"id": "m2", "context": 1000}, "a/b:c"]))
    listed = get(running, "/v1/models", x_goog_api_key="k").json
    assert [each["name"] for each in listed["models"]] == [
        "models/m1", "models/m2", "models/a/b:c", "models/org/m2:free"]
    assert listed["models"][1]["inputTokenLimit"] == 1000
    assert listed["models"][0]["supportedGenerationMethods"] == ["generateContent", "countTokens"]
    pages, token = [], "0"
    while token:
        page = get(running, f"/v1beta/models?pageSize=2&pageToken={token}").json
        pages += [each["name"] for each in page["models"]]
        token = page.get("nextPageToken")
    assert pages == [each["name"] for each in listed["models"]]
    assert get(running, "/v1beta/models/a/b:c").json["name"] == "models/a/b:c"
    assert "data" in get(running, "/v1/models").json
    assert get(running, "/v1beta/models?pageToken=x").status == 400


def test_tokens_are_counted_for_gemini_clients(server, upstream):
    running = server(upstream)
    for body in (ASKED, {"generateContentRequest": ASKED}):
        counted = post(running, body, AT_GEMINI + "countTokens")
        assert counted.status == 200 and 0 < counted.json["totalTokens"] < 20
    assert not upstream.requests


def test_embeddings_for_gemini_clients(server, upstream):
    rows = [{"index": 1, "embedding": [0.2]}, {"index": 0, "embedding": [0.1]}]
    upstream.usual = plain({"object": "list", "data": rows, "usage": {"prompt_tokens": 2}})
    running = server(upstream)
    many = post(running, {"requests": [{"content": {"parts": [{"text": each}]},
                                        "outputDimensionality": 8} for each in "ab"]},
                AT_GEMINI + "batchEmbedContents")
    assert many.json == {"embeddings": [{"values": [0.1]}, {"values": [0.2]}]}
    assert upstream.last.path.endswith("/embeddings")
    assert upstream.last.json == {"model": "m1", "input": ["a", "b"], "dimensions": 8}
    one = post(running, {"content": {"parts": [{"text": "a"}]}}, AT_GEMINI + "embedContent")
    assert one.json == {"embedding": {"values": [0.1]}}
    assert post(running, {"requests": []}, AT_GEMINI + "batchEmbedContents").status == 400
    upstream.usual = plain({"data": []})
    assert post(running, {"content": "a"}, AT_GEMINI + "embedContent").status == 502


def test_routes_are_explained_for_gemini(config, capsys):
    put_config(config, {"providers": [provider("http://127.0.0.1:9", models=["m1"])],
                        "default_model": "m1"})
    assert ifl.main(["routes", "explain", "gemini-3-pro", "--dialect", "gemini",
                     "--config-dir", config.folder]) == 0
    assert "up/m1" in capsys.readouterr().out


def test_routes_know_what_a_gemini_request_asks(server, upstream):
    aliases = {"x": [{"model": "thinker", "thinking": True}, {"model": "viewer", "images": True},
                     {"model": "google", "dialect": "gemini"}]}
    running = server(upstream, aliases=aliases)
    shown = {"contents": [{"parts": [{"inline_data": {"mime_type": "image/png", "data": PNG}}]}]}
    for body, model in ((ASKED, "google"), (shown, "viewer"), (
            {**ASKED, "generationConfig": {"thinkingConfig": {"thinkingBudget": -1}}}, "thinker")):
        assert post(running, body, "/v1beta/models/x:generateContent").status == 200
        assert upstream.last.json["model"] == model


@pytest.fixture(scope="module")
def google():
    """google-genai, Google's SDK."""
    try:
        from google import genai
    except ImportError:
        if SDK_REQUIRED:
            raise
        pytest.skip("google-genai is not installed")
    return genai


def test_google_genai(google, server, upstream):
    upstream.usual = lambda seen: gemini_script(seen.json if seen.body else None)
    client = google.Client(api_key="k", http_options={"base_url": server(upstream).url})

    def weather(city: str) -> dict:
        """The weather of a city."""
        return {"sky": f"sun in {city}"}

    models = client.models
    assert models.generate_content(model="m1", contents="hi").text == "Hello"
    said = [each.text for each in models.generate_content_stream(model="m1", contents="hi")]
    assert "".join(filter(None, said)) == "Hello"
    chats = client.chats.create(model="m1", config={"tools": [weather]})
    assert chats.send_message("weather?").text == "sun in Rome"
    chats = client.chats.create(model="m1", config={"tools": [weather]})
    said = [each.candidates[0].content.parts[0].text
            for each in chats.send_message_stream("weather?")]
    assert "".join(filter(None, said)) == "sun in Rome"
    assert models.count_tokens(model="m1", contents="hi").total_tokens > 0
    assert [each.name for each in models.list()] == ["models/m1"]
    with pytest.raises(google.errors.ClientError) as caught:
        models.generate_content(model="m1", contents="fail")
    assert (caught.value.code, caught.value.status) == (429, "RESOURCE_EXHAUSTED")


#: Google's SDK for Node.js: what it reads of each kind of answer, one line each.
NODE_GENAI = """
const {GoogleGenAI} = require('@google/genai');
const ai = new GoogleGenAI({apiKey: 'k', httpOptions: {baseUrl: process.argv.at(-1)}});
const model = 'm1', tools = [{functionDeclarations: [{name: 'weather',
  parametersJsonSchema: {type: 'object', properties: {city: {type: 'string'}}}}]}];
(async () => {
  console.log((await ai.models.generateContent({model, contents: 'hi'})).text);
  let said = '';
  for await (const each of await ai.models.generateContentStream({model, contents: 'hi'}))
    said += each.text || '';
  console.log(said);
  const first = await ai.models.generateContent({model, contents: 'weather?', config: {tools}});
  const [call] = first.functionCalls;
  const answer = {functionResponse: {id: call.id, name: call.name,
    response: {output: JSON.stringify({sky: 'sun in ' + call.args.city})}}};
  const contents = [{role: 'user', parts: [{text: 'weather?'}]}, first.candidates[0].content,
    {role: 'user', parts: [answer]}];
  console.log((await ai.models.generateContent({model, contents, config: {tools}})).text);
  console.log((await ai.models.countTokens({model, contents: 'hi'})).totalTokens > 0);
  for await (const each of await ai.models.list()) console.log(each.name);
  try { await ai.models.generateContent({model, contents: 'fail'}); }
  catch (error) { console.log(error.name, error.status); }
})();
"""


def test_google_genai_for_node(server, upstream):
    upstream.usual = lambda seen: gemini_script(seen.json if seen.body else None)
    said = run_in_node("@google/genai", NODE_GENAI, server(upstream).url)
    assert said.split("\n") == ["Hello", "Hello", "sun in Rome", "true", "models/m1",
                                "ApiError 429"]


def test_gemini_cli(server, upstream, home, tmp_path):
    """A loop with two calls at once, whose results come back under their ids."""
    (home / ".gemini").mkdir()
    (home / ".gemini/settings.json").write_text(
        json.dumps({"security": {"auth": {"selectedType": "gemini-api-key"}}}))
    (tmp_path / "inner").mkdir()
    calls = [{"index": at, **call(f"c{at}", "list_directory", json.dumps({"dir_path": path}))}
             for at, path in enumerate((".", "inner"))]
    upstream.plays(sse(ROLE, chunk(tool_calls=calls), chunk(finish="tool_calls"), DONE))
    command = os.path.join(npm_folder("@google/gemini-cli"), ".bin", "gemini")
    done = subprocess.run(
        [command, "-m", "m1", "--yolo", "-p", "look"], cwd=tmp_path, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=6 * WAIT_S,
        env={**os.environ, "GEMINI_API_KEY": "k", "GEMINI_CLI_TRUST_WORKSPACE": "true",
             "GOOGLE_GEMINI_BASE_URL": server(upstream).url})
    assert (done.returncode, done.stdout.strip()[-5:]) == (0, "Hello"), done.stderr[-500:]
    *_, first, second = upstream.last.json["messages"]
    assert [first["tool_call_id"], second["tool_call_id"]] == ["c0", "c1"]
    assert "inner" in first["content"] and "empty" in second["content"]


def gemini_script(body):
    """What the scripted upstream says to google-genai."""
    if body is None:
        return plain({"object": "list", "data": [{"id": "m1", "object": "model"}]})
    last, stream = body["messages"][-1], body.get("stream")
    if last["content"] == "fail":
        return plain({"error": {"message": "slow down"}}, 429)
    if last["role"] == "tool":
        told = json.loads(last["content"])["sky"]
        return sse(chunk(told), chunk(finish="stop"), DONE) if stream else plain(completion(told))
    if last["content"] == "weather?":
        calls = [{"id": "c1", "type": "function",
                  "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}]
        return sse(chunk(tool_calls=[{"index": 0, **calls[0]}]), chunk(finish="tool_calls"),
                   DONE) if stream else plain(completion(None, "tool_calls", tool_calls=calls))
    return sse(*HELLO) if stream else plain(completion())


# === 11. Dialects ============================================================

def call_of(body=None, text=None, dialect=ifl.CHAT, headers=None):
    body = chat() if body is None else body
    text = ifl.dump_json(body).decode() if text is None else text
    return ifl.Call(dialect, body, text, headers or {}, "req_1")


def context_of(**facts):
    """What a conversion needs of the world, small and predictable."""
    numbers = itertools.count(1)
    return ifl.Context(**{"now": 1000.0, "new_id": lambda prefix: f"{prefix}{next(numbers):024x}",
                          "seal": ifl.Seal(b"k" * 32),
                          "store": ifl.ResponseStore(), "reasoning": ifl.ReasoningCache(), **facts})


def encoded(call, target):
    """The body of `call` for `target`."""
    return call.dialect.open(call, target, context_of()).body


def test_a_chat_request_is_forwarded_byte_for_byte():
    text = '{ "model" : "m1", "messages":[ ],"x": 1.0 , "y":null}'
    target = ifl.Target(ifl.Provider("up"), "m1")
    assert encoded(call_of(json.loads(text), text), target) == text.encode()
    renamed = encoded(call_of(json.loads(text), text), target._replace(model="M"))
    assert renamed == text.replace('"m1"', '"M"').encode()


CHECKS = [
    # dialect, body, param of the error (None: accepted)
    (ifl.CHAT, {"messages": MESSAGES}, None),
    (ifl.CHAT, {"messages": MESSAGES, "model": None, "stream": None, "n": "odd"}, None),
    (ifl.CHAT, {}, "messages"),
    (ifl.CHAT, {"messages": None}, "messages"),
    (ifl.CHAT, {"messages": []}, "messages"),
    (ifl.CHAT, {"messages": "hi"}, "messages"),
    (ifl.CHAT, {"messages": ["hi"]}, "messages"),
    (ifl.CHAT, {"messages": {}}, "messages"),
    (ifl.CHAT, {"messages": MESSAGES, "model": 5}, "model"),
    (ifl.CHAT, {"messages": MESSAGES, "model": ["m"]}, "model"),
    (ifl.CHAT, {"messages": MESSAGES, "stream": "yes"}, "stream"),
    (ifl.CHAT, {"messages": MESSAGES, "stream": 1}, "stream"),
    (ifl.COMPLETIONS, {"prompt": "x"}, None),
    (ifl.EMBEDDINGS, {"input": ["x"]}, None),
    (ifl.EMBEDDINGS, {"model": {}}, "model")]


@pytest.mark.parametrize("dialect, body, param", CHECKS)
def test_what_no_upstream_could_make_sense_of(dialect, body, param):
    if param is None:
        return dialect.check(body)
    with pytest.raises(ifl.BadRequest) as refused:
        dialect.check(body)
    assert refused.value.param == param and f"`{param}`" in refused.value.message


def test_errors_in_the_words_of_each_dialect():
    exc = ifl.Unauthorized("who?")
    assert ifl.CHAT.error(exc, "req_1") == {"error": {
        "message": "who?", "type": "authentication_error", "param": None,
        "code": "invalid_api_key"}}
    assert ifl.MESSAGES.error(exc, "req_1") == {
        "type": "error", "error": {"type": "authentication_error", "message": "who?"},
        "request_id": "req_1"}
    assert ifl.CHAT.error_event(exc, "req_1").startswith(b'data: {"error":')
    assert ifl.CHAT.error_event(exc, "r").endswith(b"}\n\n")


@pytest.mark.parametrize("status, there, kind", [(400, 400, "invalid_request_error"),
                                                 (422, 400, "invalid_request_error"),
                                                 (401, 401, "authentication_error"),
                                                 (403, 403, "permission_error"),
                                                 (404, 404, "not_found_error"),
                                                 (413, 413, "request_too_large"),
                                                 (429, 429, "rate_limit_error"),
                                                 (408, 504, "timeout_error"),
                                                 (500, 500, "api_error"), (502, 502, "api_error"),
                                                 (503, 529, "overloaded_error"),
                                                 (504, 504, "timeout_error"),
                                                 (418, 418, "invalid_request_error")])
def test_statuses_on_messages(status, there, kind):
    exc = ifl.UpstreamRefused("m", status=status)
    assert ifl.MESSAGES.status(exc) == there
    assert ifl.MESSAGES.error(exc, "r")["error"]["type"] == kind
    assert ifl.CHAT.status(exc) == status


def test_an_upstream_error_object_keeps_all_its_keys():
    body = {"error": {"message": "m", "extra": [1]}, "beside": True}
    assert ifl.CHAT.error(ifl.refusal_in(body, 400), "r") == body


# --- one table of streams for every dialect

def used(ident, name, **given):
    """A call, as each dialect has to tell it."""
    return name, ident, given


NEW = "an id made here"
F, G = used("a", "f", x=1), used("b", "g", y=2)

#: (what, chunks, neutral parts: a text, "(a thought)", a call)
STREAMS = [
    ("text", [delta(role="assistant", content=""), delta(content="Hel"), delta(content="lo"),
              delta("stop")], ["Hello"]),
    ("thoughts as parts of the content", [
        delta(content=[{"type": "thinking", "thinking": [text("r")]}]),
        delta(content=[{"type": "thinking", "thinking": "s"}]), delta(content=[text("t")]),
        delta(content="u"), delta("stop")], ["(rs)", "tu"]),
    ("text and call in two choices", [
        {"choices": [*delta(content="t")["choices"],
                     *tools(tool(0, "a", "f", '{"x":1}'), finish="tool_calls")["choices"]]},
        delta("stop")], ["t", F]),
    ("refusal", [delta(refusal="I "), delta(refusal="won't"), delta("stop")], ["I won't"]),
    ("reasoning, text, call", [
        delta(reasoning_content="r"), delta(content="t"), tools(tool(0, "a", "f", "")),
        tools(tool(0, arguments='{"x"')), tools(tool(0, arguments=":1}")), delta("tool_calls")],
     ["(r)", "t", F]),
    ("late reasoning", [delta(content="t"), delta(reasoning_content="r"), delta(content="u")],
     ["t", "(r)", "u"]),
    ("reasoning aliases", [delta(reasoning="r", reasoning_content="r"), delta(content="t")],
     ["(r)", "t"]),
    ("details without text", [
        delta(reasoning_details=[{"type": "reasoning.encrypted", "data": "e"}]),
        delta(content="t")], ["()", "t"]),
    ("blank text before a call", [
        delta(content="\n"), delta(content="\n"), tools(tool(0, "a", "f", '{"x":1}'))], [F]),
    ("blank text at the end", [delta(reasoning_content="r"), delta(content="\n")], ["(r)"]),
    ("leading blank kept", [delta(content="\n"), delta(content=" x")], ["\n x"]),
    ("two calls in turn", [
        tools(tool(0, "a", "f", '{"x":1}')), tools(tool(1, "b", "g", "")),
        tools(tool(1, arguments='{"y":2}'))], [F, G]),
    ("two calls in one chunk", [
        tools(tool(0, "a", "f", '{"x":1}'), tool(1, "b", "g", '{"y":2}'), finish="tool_calls")],
     [F, G]),
    ("interleaved", [
        tools(tool(0, "a", "f", '{"x"')), tools(tool(1, "b", "g", '{"y"')),
        tools(tool(0, arguments=":1}")), tools(tool(1, arguments=":2}"))], [F, G]),
    ("the second ends first", [
        tools(tool(0, "a", "f", '{"x"')), tools(tool(1, "b", "g", '{"y":2}')),
        tools(tool(0, arguments=":1}"))], [F, G]),
    ("indexes from one", [
        tools(tool(1, "a", "f", '{"x":1}')), tools(tool(2, "b", "g", '{"y":2}'))], [F, G]),
    ("always index 0", [
        tools(tool(0, "a", "f", '{"x":1}')), tools(tool(0, "b", "g", '{"y":2}'))], [F, G]),
    ("always index 0, one function", [
        tools(tool(0, "a", "f", '{"x":1}')), tools(tool(0, "b", "f", '{"x":2}'))],
     [F, used("b", "f", x=2)]),
    ("always index 0, no ids", [
        tools(tool(0, None, "f", '{"x":1}')), tools(tool(0, None, "g", '{"y":2}'))],
     [used(NEW, "f", x=1), used(NEW, "g", y=2)]),
    ("index 0 twice in one chunk, no ids", [
        tools(tool(0, None, "f", '{"x":1}'), tool(0, None, "f", '{"x":2}'))],
     [used(NEW, "f", x=1), used(NEW, "f", x=2)]),
    ("index 0 twice, an id with the second", [
        tools(tool(0, None, "f", '{"x":1}')), tools(tool(0, "b", "f", '{"x":2}'))],
     [used(NEW, "f", x=1), used("b", "f", x=2)]),
    ("the id comes later, with the name", [
        tools(tool(0, None, "f", '{"x"')), tools(tool(0, "late", "f", ":1}"))],
     [used(NEW, "f", x=1)]),
    ("the id comes last, with the name", [
        tools(tool(0, None, "f", '{"x":1}')), tools(tool(0, "late", "f", ""))],
     [used(NEW, "f", x=1)]),
    ("the id comes later", [
        tools(tool(0, None, "f", '{"x"')), tools(tool(0, "late", arguments=":1}"))],
     [used(NEW, "f", x=1)]),
    ("text between calls", [
        tools(tool(0, "a", "f", '{"x"')), delta(content="by"), tools(tool(0, arguments=":1}")),
        delta(content=" the way"), tools(tool(1, "b", "g", '{"y":2}'))], [F, "by the way", G]),
    ("text while a call is open", [
        tools(tool(0, "a", "f", '{"x"')), delta(content="by the way"),
        tools(tool(0, arguments=":1}"))], [F, "by the way"]),
    ("reasoning while a call is open", [
        tools(tool(0, "a", "f", '{"x"')), delta(reasoning_content="r"),
        tools(tool(0, arguments=":1}"))], [F, "(r)"]),
    ("text after a call", [
        tools(tool(0, "a", "f", '{"x":1}')), delta(content="t"), tools(tool(0, arguments="\n")),
        tools(tool(1, "b", "g", '{"y":2}'))], [F, "t", G]),
    ("no index", [tools(tool(None, "a", "f", '{"x"')), tools(tool(arguments=":1}"))], [F]),
    ("by id only", [
        tools(tool(None, "a", "f", '{"x"')), tools(tool(None, "b", "g", '{"y"')),
        tools(tool(None, "a", arguments=":1}")), tools(tool(None, "b", arguments=":2}"))], [F, G]),
    ("neither index nor id", [
        tools(tool(name="f", arguments='{"x":1}'), tool(name="g", arguments='{"y":2}'))],
     [used(NEW, "f", x=1), used(NEW, "g", y=2)]),
    ("neither index nor id, twice the same", [
        tools(tool(name="f", arguments='{"x":1}')), tools(tool(name="f", arguments='{"x":1}'))],
     [used(NEW, "f", x=1)] * 2),
    ("missing ids", [
        tools(tool(0, None, "f", '{"x":1}')), tools(tool(1, "", "g", '{"y":2}'))],
     [used(NEW, "f", x=1), used(NEW, "g", y=2)]),
    ("one id for two", [
        tools(tool(0, "a", "f", '{"x":1}')), tools(tool(1, "a", "g", '{"y":2}'))],
     [F, used(NEW, "g", y=2)]),
    ("name repeated", [
        tools(tool(0, "a", "f", "")), tools(tool(0, "a", "f", '{"x"')),
        tools(tool(0, "a", "f", ":1}"))], [F]),
    ("name in pieces", [
        tools(tool(0, "a", "get_")), tools(tool(0, name="we")),
        tools(tool(0, name="ather", arguments='{"x":1}'))], [used("a", "get_weather", x=1)]),
    ("name in pieces, then repeated", [
        tools(tool(0, "a", "get_")), tools(tool(0, "a", "time")),
        tools(tool(0, "a", "get_time", "{")), tools(tool(0, "a", "get_time", "}"))],
     [used("a", "get_time")]),
    ("arguments first", [
        tools(tool(0, arguments='{"x"')), tools(tool(0, "a", "f")),
        tools(tool(0, arguments=":1}"))], [used(NEW, "f", x=1)]),
    ("arguments twice", [
        tools(tool(0, "a", "f", '{"x":1}')), tools(tool(0, arguments='{"x":1}')),
        tools(tool(0, arguments="\n"))], [F]),
    ("arguments as an object", [tools(tool(0, "a", "f", {"x": 1}))], [F]),
    ("arguments encoded twice", [
        tools(tool(0, "a", "f", '"{\\"x')), tools(tool(0, arguments='\\":1}"'))], [F]),
    ("arguments null", [
        tools({"index": 0, "id": "a", "function": {"name": "f", "arguments": None}}),
        delta("tool_calls")], [used("a", "f")]),
    ("arguments are null", [tools(tool(0, "a", "f", "null"))], [used("a", "f")]),
    ("arguments are no JSON", [tools(tool(0, "a", "f", "ls {a} -la"))],
     [used("a", "f", INVALID_JSON="ls {a} -la")]),
    ("the last bracket is missing", [
        tools(tool(0, "a", "f", '{"x":1')), delta("tool_calls")], [F]),
    ("no arguments", [tools(tool(0, "a", "f", "")), delta("tool_calls")], [used("a", "f")]),
    ("no arguments, then another", [
        tools(tool(0, "a", "f", "")), tools(tool(1, "b", "g", '{"y":2}'))], [used("a", "f"), G]),
    ("never a name", [
        tools(tool(0, "a", arguments='{"x":1}')), tools(tool(1, "b", "g", '{"y":2}'))], [G]),
    ("legacy function_call", [
        delta(function_call={"name": "f", "arguments": ""}),
        delta(function_call={"arguments": '{"x":1}'})], [used(NEW, "f", x=1)]),
    ("part lists", [
        delta(content=[text("a")]), delta(content=[text("b"), None, {"type": "text"}])], ["ab"]),
    ("shapes of nothing", [
        {}, {"choices": None}, {"choices": []}, {"choices": [None]},
        {"choices": [{"delta": None}]}, {"choices": "x"}, delta(content=None),
        delta(tool_calls=None), delta(tool_calls=[]),
        delta(tool_calls=[None, {}, {"function": None}, "x"]), delta(content=5),
        delta(reasoning_content=""), delta(tool_calls={"a": 1}), delta(refusal=[]),
        {"usage": "x", "choices": [{"usage": 1}]}], []),
]
PROMPTED = {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
            "generationConfig": {"responseMimeType": "application/json", "responseSchema": {}}}


OFFERED = {"tools": [{"functionDeclarations": [
    {"name": name} for name in ("f", "g", "get_weather", "get_time")]}],
           "generationConfig": {"thinkingConfig": {"includeThoughts": True}}}


def writer_of(dialect, body=None, **profile):
    """What writes an answer in a dialect."""
    if dialect == "gemini":
        return gemini_turn({**OFFERED, **(body or {})}, profile).stream(counter())
    if dialect == "messages":
        return turn_of({"stream": True, **(body or {})}, **profile).stream(ids())
    return make_turn({"input": "q", "stream": True, **(body or {})}, profile).stream(counter())


def play_in(dialect, chunks, body=None, **profile):
    """The events of a stream, once they keep the dialect's rules, and its neutral parts."""
    writer = writer_of(dialect, body, **profile)
    events = [event for chunk in chunks for event in writer.feed(chunk)] + list(writer.close())
    if dialect == "messages":
        return events, parts_of(fold(events))
    if dialect == "gemini":
        return events, parts_of(joined_responses(events))
    assert broken_rules(events) == []
    return events, parts_of(events[-1]["response"])


def joined_responses(responses):
    """What a Gemini client makes of a stream, once each response keeps the rules (gemini.md)."""
    parts, last = [], responses[-1]
    assert [each for each in responses if "finishReason" in each["candidates"][0]] == [last]
    assert last["usageMetadata"]["totalTokenCount"] >= last["usageMetadata"]["promptTokenCount"]
    for each in responses:
        assert (each["modelVersion"], each["responseId"]) == ("m", responses[0]["responseId"])
        content = each["candidates"][0].get("content", {"role": "model", "parts": []})
        assert content["role"] == "model"
        for part in content["parts"]:
            if part == {"text": ""}:               # at the end, and alone
                assert each is last and len(content["parts"]) == 1
                continue
            assert part.get("text") != ""
            before = parts[-1] if parts else {}
            if "text" in before and "text" in part and before.get("thought") == part.get("thought"):
                before["text"] += part["text"]
            else:
                parts.append(dict(part))
    return {"candidates": [{**last["candidates"][0], "content": {"parts": parts}}]}


def parts_of(answer):
    """The neutral parts of a message, a response or a chat completion."""
    found = []
    if "choices" in answer:
        message = answer["choices"][0]["message"] if answer["choices"] else {}
        if ifl.reasoning_of(message) or message.get("reasoning_details"):
            found.append("(%s)" % ifl.reasoning_of(message))
        for said in (message.get("content"), message.get("refusal")):
            pieces = ifl.content_pieces(said)
            thought = "".join(text for kind, text in pieces if kind == "thinking")
            said = "".join(text for kind, text in pieces if kind == "text")
            found += [f"({thought})"] * bool(thought) + [said] * bool(said.strip())
        oldest = [{"id": None, "function": message["function_call"]}] if (
            "function_call" in message) else []
        found += [(call["function"]["name"], call["id"], call["function"]["arguments"])
                  for call in [*message.get("tool_calls", ()), *oldest]]
    for block in answer.get("content", ()):
        found.append("(%s)" % block["thinking"] if block["type"] == "thinking" else block["text"]
                     if block["type"] == "text" else (block["name"], block["id"], block["input"]))
    for candidate in answer.get("candidates", ()):
        for part in candidate.get("content", {}).get("parts", ()):
            called = part.get("functionCall")
            if part != {"text": ""}:
                found.append((called["name"], called["id"], called["args"]) if called else
                             "(%s)" % part["text"] if part.get("thought") else part["text"])
    found += [part[9:] if isinstance(part, str) and part.startswith("refused: ") else part
              for part in brief(answer.get("output", ()))]
    idents = [part[1] for part in found if not isinstance(part, str)]
    assert len(set(idents)) == len(idents)
    return [part if isinstance(part, str) else (
        part[0], NEW if is_made_here(part) else part[1],
        ifl.parse_arguments(part[2]) if isinstance(part[2], str) else part[2]) for part in found]


def is_made_here(part):
    return not isinstance(part, str) and re.fullmatch(r"(toolu_|call_)\w{12,24}|None",
                                                      str(part[1])) is not None


def in_order(parts):
    """The parts as a plain chat answer has them: thoughts, texts and calls, each together."""
    said = [part for part in parts if isinstance(part, str)]
    thoughts = "".join(part[1:-1] for part in said if part[0] == "(")
    texts = "".join(part for part in said if part[0] != "(")
    return [*(["(%s)" % thoughts] if any(part[0] == "(" for part in said) else []),
            *([texts] if texts else []), *(part for part in parts if not isinstance(part, str))]


def in_characters(chunks):
    """The same chunks with each string in single characters."""
    for each in chunks:
        changes = each.get("choices")
        change = changes[0].get("delta") if isinstance(changes, list) and changes else None
        if not isinstance(change, dict):
            yield each
            continue
        rest = {name: value for name, value in change.items()
                if not (name in ("content", "reasoning_content") and isinstance(value, str))
                and name != "tool_calls"}
        yield delta(changes[0].get("finish_reason"), **rest)
        for name in ("reasoning_content", "content"):
            if isinstance(change.get(name), str):
                yield from (delta(**{name: character}) for character in change[name])
        for item in change.get("tool_calls") or ():
            given = item["function"].get("arguments")
            given = given if isinstance(given, str) else ""
            function = {"arguments": "", **item["function"], **({"arguments": ""} if given else {})}
            yield tools({**item, "function": function})
            known = {name: item[name] for name in ("index", "id") if name in item}
            yield from (tools({**known, "function": {"arguments": character}})
                        for character in given)


#: Rows whose chunks tell something by what comes together.
WHOLE = ("neither index nor id", "neither index nor id, twice the same", "shapes of nothing",
         "two calls in one chunk", "reasoning aliases", "index 0 twice in one chunk, no ids",
         "index 0 twice, an id with the second", "arguments null", "text and call in two choices")
BOTH = pytest.mark.parametrize("dialect", ["messages", "responses"])
ALL = pytest.mark.parametrize("dialect", ["messages", "responses", "gemini"])


def as_told(dialect, parts):
    """Gemini's clients get no thought without a text, and no call whose arguments are no object."""
    return parts if dialect != "gemini" else [
        part for part in parts if part != "()" and (
            isinstance(part, str) or "INVALID_JSON" not in part[2])]


@ALL
@pytest.mark.parametrize("name, chunks, parts", STREAMS, ids=[row[0] for row in STREAMS])
def test_a_stream_is_told_alike_in_each_dialect(dialect, name, chunks, parts):
    told = as_told(dialect, parts)
    assert play_in(dialect, chunks)[1] == told
    for length in range(len(chunks)):
        play_in(dialect, chunks[:length])
    if name not in WHOLE:
        assert play_in(dialect, list(in_characters(chunks)))[1] == told


SIGNED = {"extra_content": {"google": {"thought_signature": "c2ln"}}}
SECRET = {"type": "reasoning.encrypted", "data": "e"}
CALLED_A, CALLED_B = tool(0, "a", "f", "{}"), tool(1, "b", "f", "{}")

#: What comes with an answer and has to come back: id, chunks, what the next request has of it at
#: the upstream that it came from, and what at another one.
CARRIED = [
    ("a signature of a call", [tools({**CALLED_A, **SIGNED}), delta("tool_calls")],
     [{**call("a", "f"), **SIGNED}], {}, {}),
    ("a signature of the first of two calls", [
        delta(reasoning_content="r"), tools({**CALLED_A, **SIGNED}, CALLED_B)],
     [{**call("a", "f"), **SIGNED}, call("b", "f")], {"reasoning_content": "r"},
     {"reasoning_content": "r"}),
    ("a signature of the second call", [
        delta(content="t"), tools(CALLED_A), tools({**CALLED_B, **SIGNED})],
     [call("a", "f"), {**call("b", "f"), **SIGNED}], {"content": "t"}, {"content": "t"}),
    ("details without text", [delta(reasoning_details=[SECRET]), tools(CALLED_A)],
     [call("a", "f")], {"reasoning_details": [SECRET]}, {}),
    ("details and a signature", [
        delta(reasoning="r", reasoning_details=[SECRET]), tools({**CALLED_A, **SIGNED})],
     [{**call("a", "f"), **SIGNED}], {"reasoning_details": [SECRET], "reasoning": "r"},
     {"reasoning_content": "r"}),
    ("reasoning in a field of another name", [delta(reasoning="r"), tools(CALLED_A)],
     [call("a", "f")], {"reasoning": "r"}, {"reasoning_content": "r"}),
    ("thoughts as parts", [delta(content=[{"type": "thinking", "thinking": [text("r")]}]),
                           tools(CALLED_A)],
     [call("a", "f")], {"reasoning_content": "r"}, {"reasoning_content": "r"}),
]


def next_message(dialect, events, origin, spoil=lambda value: value):
    """The assistant's message of the next request, once a client has sent an answer back whole."""
    profile, results = {"origin": origin}, ["a", "b"]
    if dialect == "messages":
        blocks = json.loads(spoil(json.dumps(fold(events)["content"])))
        used = [block["id"] for block in blocks if block["type"] == "tool_use"]
        turn = turn_of({"messages": [user("q"), {"role": "assistant", "content": blocks},
                                     user(*(result(ident, "1") for ident in used))]}, **profile)
    elif dialect == "responses":
        items = json.loads(spoil(json.dumps(events[-1]["response"]["output"])))
        turn = make_turn({"input": [user_responses("q"), *items,
                                    *(result_responses(ident, "1") for ident in results)]}, profile)
    else:
        parts = [part for each in events for part in each["candidates"][0]["content"]["parts"]]
        parts = json.loads(spoil(json.dumps(parts)))
        said = [{"functionResponse": {"name": "f", "response": {"output": "1"}}}
                for part in parts if "functionCall" in part]
        turn = gemini_turn({"contents": [{"role": "user", "parts": [{"text": "q"}]}, {
            "role": "model", "parts": parts}, {"role": "user", "parts": said}]}, profile)
    return turn.chat["messages"][1]


@ALL
@pytest.mark.parametrize("chunks, calls, own, others", [row[1:] for row in CARRIED],
                         ids=[row[0] for row in CARRIED])
def test_what_comes_with_an_answer_comes_back(dialect, chunks, calls, own, others):
    body = {"include": ["reasoning.encrypted_content"]} if dialect == "responses" else {}
    events, _ = play_in(dialect, chunks, body, origin="here")
    bare = [{name: value for name, value in each.items() if name != "extra_content"}
            for each in calls]
    said = {"role": "assistant", "content": None}
    assert next_message(dialect, events, "here") == {**said, "tool_calls": calls, **own}
    assert next_message(dialect, events, "there") == {**said, "tool_calls": bare, **others}


@ALL
@pytest.mark.parametrize("change", [
    lambda found: found[:len(found) // 2], lambda found: found[:-1] + "\u00e9",
    lambda found: found[:12] + "A" * 40 + found[12:], lambda found: ""])
def test_a_damaged_carrier_is_no_error(dialect, change):
    chunks = [delta(reasoning_content="r", reasoning_details=[SECRET]), tools(CALLED_A)]
    body = {"include": ["reasoning.encrypted_content"]} if dialect == "responses" else {}
    events, _ = play_in(dialect, chunks, body, origin="here")
    places = r'("(?:signature|encrypted_content|thoughtSignature)": ")([^"]*)'
    message = next_message(dialect, events, "here", lambda sent: re.sub(
        places, lambda found: found.group(1) + change(found.group(2)), sent))
    assert [each["function"]["name"] for each in message["tool_calls"]] == ["f"]


@pytest.mark.parametrize("carrier", [
    {"calls": 5}, {"calls": {"a": 5}}, {"calls": {"a": {"extra_content": "x", "function": {}}}},
    {"details": 5}, {"details": [5]}, {"text": 5}, {"field": "role"}, {"field": []}, {"of": []}])
def test_a_carrier_of_another_shape_adds_nothing(carrier):
    block = {"type": "thinking", "thinking": "", "signature": ifl.make_signature(carrier)}
    ident = ifl.wrap_id("toolu_1", json.dumps({"calls": {"a": {}}, **carrier}))
    for blocks in ([block, use("a", "f")], [use(ident, "f")]):
        message = turn_of({"messages": [user("q"), assistant(*blocks), user("r")]}).chat[
            "messages"][1]
        assert message.keys() == {"role", "content", "tool_calls"}
        assert message["tool_calls"][0].keys() == {"id", "type", "function"}


@pytest.mark.parametrize("name, chunks, parts", STREAMS, ids=[row[0] for row in STREAMS])
def test_a_stream_is_folded_alike(name, chunks, parts):
    """The fold is a plain answer, and each dialect tells that as it tells the stream."""
    folded = ifl.fold_stream(wire_of([*chunks, DONE]))
    assert parts_of(folded) == in_order(parts)
    for dialect in ("messages", "responses", "gemini"):
        told = writer_of(dialect).whole(folded)
        assert parts_of(told) == as_told(dialect, in_order(parts)), dialect


@ALL
@pytest.mark.parametrize("reason", sorted(ifl.FATAL_FINISH))
def test_a_fatal_finish_reason_is_one_error(dialect, reason):
    for make in (lambda: play_in(dialect, [delta(content="a"), delta(reason)]),
                 lambda: writer_of(dialect).whole(completion("a", reason))):
        with pytest.raises(ifl.UpstreamBroke, match=f"broke the answer off: {reason}") as caught:
            make()
        assert caught.value.status == ifl.FATAL_FINISH[reason]


def events_in(data):
    """The events of a stream as its client gets it."""
    return [json.loads(line[6:]) for line in data.decode().splitlines()
            if line.startswith("data: {")]


def cut_in(sizes, content):
    """Chunks of a text in pieces of each size, the whole text last."""
    for size in (*sizes, len(content)):
        yield [delta(content=content[at:at + size]) for at in range(0, len(content), size)]


THINK = [
    ("<think>plan</think>42", ["(plan)", "42"]),
    ("<think>\nplan\n</think>\n\n42", ["(plan)", "42"]),
    (" <think>a < b</th</think>x", ["(a < b</th)", "x"]), ("<think></think>42", ["42"]),
    ("<think>cut", ["(cut)"]), ("<b>42</b>", ["<b>42</b>"]),
    ("x <think>y</think>", ["x <think>y</think>"]), ("<thi", ["<thi"]), ("42", ["42"])]


@ALL
@pytest.mark.parametrize("content, parts", THINK)
def test_think_tags(dialect, content, parts):
    for chunks in cut_in([1], content):
        assert play_in(dialect, chunks, think_tags=True)[1] == parts
    assert play_in(dialect, chunks)[1] == [content]
    told = writer_of(dialect, think_tags=True).whole(completion(content))
    assert parts_of(told) == parts


FENCED = [
    ('```json\n{"a": 1}\n```', '{"a": 1}'), ("```\n[1]\n```\n", "[1]"),
    ('\n```JSON \n{"a": "```"}\n```', '{"a": "```"}'), ('{"a": 1}', '{"a": 1}'), ("``x", "``x"),
    ("Here:\n```json\n{}\n```", "Here:\n```json\n{}\n```"), ('```json\n{"a": 1}', '{"a": 1}'),
    ("```json\n{}\n```\nSo.", "{}\n```\nSo."), ("```\n[]` ```` \n", "[]` `"),
    ("```\n[" + " " * 20000 + "]\n```", "[" + " " * 20000 + "]"), ("`", "`"), ("x  \n", "x  \n")]


@ALL
@pytest.mark.parametrize("content, expected", FENCED)
def test_fences_go_where_a_prompt_is_all_that_asks_for_json(dialect, content, expected):
    prompted = {"structured_output": "prompt"}
    for chunks in cut_in([1, 2, 3, 7] if len(content) < 99 else [7], content):
        assert play_in(dialect, chunks, PROMPTED, **prompted)[1] == [expected]
    assert play_in(dialect, chunks, PROMPTED)[1] == [content]
    assert play_in(dialect, chunks, **prompted)[1] == [content]


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 8}, USAGE])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("dialect, asked", [
    (ifl.MESSAGES, {"max_tokens": 9, "messages": MESSAGES}), (ifl.RESPONSES, {"input": "hi"})],
    ids=["messages", "responses"])
def test_client_and_ledger_are_told_the_same_counts(dialect, asked, stream, usage):
    call = call_of({"model": "m1", "stream": stream, **asked}, dialect=dialect)
    translation = translation_of(call)
    answer = {**completion("Hello there, " * 9), "usage": usage}
    out, _ = translation.reply(json.dumps(answer).encode(), "application/json", 200)
    told = events_in(out)[-2 if dialect is ifl.MESSAGES else -1] if stream else json.loads(out)
    told = told.get("response", told)["usage"]
    counted = translation.usage
    assert (told["input_tokens"], told["output_tokens"]) == (counted.prompt, counted.completion)
    assert counted.estimated is (usage is None)
    assert counted.completion == (3 if usage == USAGE else 34)


def test_what_comes_before_an_answer_has_a_limit(monkeypatch):
    monkeypatch.setattr(ifl, "RECORD_LIMIT_BYTES", 1000)
    asked = {"model": "m1", "stream": True, "max_tokens": 9, "messages": MESSAGES}
    for translation in (translation_of(), translation_of(call_of(asked, dialect=ifl.MESSAGES))):
        with pytest.raises(ifl.UpstreamGarbled, match="never begins"):
            for _ in range(20):
                assert translation.feed(record(ROLE)) == b""


# --- web search

GLM_FOUND = [{"title": "T1", "link": "https://a/1", "content": "snippet", "refer": "ref_1",
              "publish_date": "2026-11-01"}, {"title": "no address"}]
QWEN_FOUND = {"search_results": [{"index": 1, "title": "T1", "url": "https://a/1"}]}
MAKERS = [{"web_search": GLM_FOUND}, {"search_info": QWEN_FOUND}]
WISHES_OF_SEARCH = {
    "messages": {"max_tokens": 9, "messages": [{"role": "user", "content": "query: news"}],
                 "tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 2}]},
    "responses": {"input": "news", "tools": [{"type": "web_search"}]},
    "gemini": {"contents": [{"parts": [{"text": "news"}]}], "tools": [{"googleSearch": {}}]}}
PATHS_OF_SEARCH = {"messages": "/v1/messages", "responses": "/v1/responses",
                   "gemini": "/v1beta/models/m1:"}


def ask_search(server, dialect, stream, **more):
    """The answer, whole, however it comes."""
    path, body = PATHS_OF_SEARCH[dialect], {**WISHES_OF_SEARCH[dialect], **more}
    if dialect == "gemini":
        path += STREAMED if stream else "generateContent"
    else:
        body.update(model="m1", stream=stream)
    answer = post(server, body, path)
    assert answer.status == 200, answer
    if not stream:
        return answer.json
    events = events_in(answer.body)
    if dialect == "messages":
        return fold(events)
    return events[-1]["response"] if dialect == "responses" else joined_responses(
        [{**each, "modelVersion": "m"} for each in events])


def found_in(dialect, answer):
    """The query, the addresses that were found, and the text."""
    if dialect == "messages":
        call, result, text = answer["content"]
        assert call["type"] == "server_tool_use" and call["name"] == "web_search"
        assert result["tool_use_id"] == call["id"]
        assert answer["usage"]["server_tool_use"] == {"web_search_requests": 1}
        assert answer["stop_reason"] == "end_turn"
        urls = [each["url"] for each in result["content"] if isinstance(each, dict)]
        return call["input"]["query"], urls, text["text"]
    if dialect == "responses":
        call, message = answer["output"]
        assert call["type"] == "web_search_call" and call["status"] == "completed"
        return (call["action"]["query"], [each["url"] for each in call["action"]["sources"]],
                message["content"][0]["text"])
    candidate = answer["candidates"][0]
    grounding = candidate["groundingMetadata"]
    return (grounding["webSearchQueries"][0],
            [each["web"]["uri"] for each in grounding["groundingChunks"]],
            candidate["content"]["parts"][0]["text"])


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("dialect", list(WISHES_OF_SEARCH))
@pytest.mark.parametrize("results", MAKERS, ids=["GLM", "DashScope"])
def test_what_a_makers_search_found_is_told(server, upstream, dialect, stream, results):
    own = {"server_tools": {"web_search": {"fields": {"enable_search": True}}}}
    upstream.usual = sse({**chunk("It "), **results}, chunk("is so."), chunk(finish="stop"),
                         DONE) if stream else plain({**completion("It is so."), **results})
    running = server(provider(upstream, profile=own))
    answer = ask_search(running, dialect, stream)
    assert found_in(dialect, answer) == ("news", ["https://a/1"], "It is so.")
    assert upstream.last.json["enable_search"] is True


def search_call(stream, ident="c1", query="the news", **more):
    calls = [{"index": 0, **call(ident, "web_search", json.dumps({"query": query}))}]
    return sse(ROLE, chunk(tool_calls=calls), chunk(finish="tool_calls", usage=USAGE),
               DONE) if stream else plain(completion(None, "tool_calls", tool_calls=calls))


def said_of_search(stream):
    return sse(chunk("It is so."), chunk(finish="stop", usage=USAGE), DONE) if stream else plain(
        completion("It is so."))


ENGINES = [
    ({"engine": "searxng"}, "GET", "/search?q=the+news&format=json", None),
    ({"engine": "tavily", "api_key": "$TAVILY"}, "POST", "/search", "Bearer tv-1")]
ENGINE_ANSWER = {"results": [{"title": "T1", "url": "https://a/1", "content": "snippet"},
                             {"title": "none"}]}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("dialect", list(WISHES_OF_SEARCH))
@pytest.mark.parametrize("engine, method, path, key", ENGINES, ids=["searxng", "tavily"])
def test_a_search_that_this_server_runs(server, upstream, upstreams, dialect, stream, engine,
                                        method, path, key):
    found = upstreams(usual=plain(ENGINE_ANSWER))
    upstream.plays(search_call(stream), said_of_search(stream))
    running = server(upstream, environ={"TAVILY": "tv-1"}, search={
        **engine, "base_url": found.url[:-len("/v1")]})
    answer = ask_search(running, dialect, stream)
    assert found_in(dialect, answer) == ("the news", ["https://a/1"], "It is so.")
    asked = found.last
    assert (asked.method, asked.path, asked.headers.get("authorization")) == (method, path, key)
    first, second = (seen.json for seen in upstream.requests)
    assert first["tools"] == [ifl.SEARCH_TOOL] and "tool_choice" not in second
    assert second["messages"][-2]["tool_calls"][0]["id"] == "c1"
    assert "snippet" in second["messages"][-1]["content"]
    assert is_well(running)
    usage = running.gateway.ledger.report("model", 1, {})[0]
    assert (usage["requests"], usage["input"], usage["output"]) == (1, 24, 6)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("dialect", list(WISHES_OF_SEARCH))
def test_kimis_search_gets_its_arguments_back(server, upstream, dialect, stream):
    own = {"server_tools": ifl.PRESETS["moonshot"].profile["server_tools"]}
    given = {"search_result": {"search_id": "x"}, "usage": {"total_tokens": 9}}
    calls = [{"index": 0, **call("c1", ifl.KIMI_SEARCH, json.dumps(given))}]
    upstream.plays(sse(chunk(tool_calls=calls), chunk(finish="tool_calls"), DONE) if stream else
                   plain(completion(None, "tool_calls", tool_calls=calls)), said_of_search(stream))
    running = server(provider(upstream, profile=own))
    answer = ask_search(running, dialect, stream)
    assert found_in(dialect, answer) == ("news", [], "It is so.")
    first, second = (seen.json for seen in upstream.requests)
    assert first["tools"][0]["type"] == "builtin_function"
    assert json.loads(second["messages"][-1]["content"]) == given


@pytest.mark.parametrize("reply", [
    plain({"error": "x"}, 500), plain(b"<html>"), plain({"results": 5}), plain([]),
    plain(b"", 302, [("Location", "http://127.0.0.1:9/")]), Reply(RESET)])
def test_a_search_engine_that_fails(server, upstream, upstreams, reply, log_lines):
    engine = upstreams(usual=reply)
    upstream.plays(search_call(True), said_of_search(True))
    running = server(upstream, search={"engine": "tavily", "api_key": "tv-secret",
                                       "base_url": engine.url[:-len("/v1")]})
    answer = ask_search(running, "messages", True)
    assert answer["content"][1]["content"] == {"type": "web_search_tool_result_error",
                                               "error_code": "unavailable"}
    assert upstream.last.json["messages"][-1]["content"] == "the search failed"
    said = [line.getMessage() for line in log_lines]
    assert any("search engine" in line for line in said) and "tv-secret" not in "".join(said)


def test_searches_end(server, upstream, upstreams):
    """`max_uses` 2: then the model has no search any more."""
    engine = upstreams(usual=plain(ENGINE_ANSWER))
    upstream.plays(*(search_call(True, f"c{at}") for at in range(2)), said_of_search(True))
    running = server(upstream, search={"engine": "searxng",
                                       "base_url": engine.url[:-len("/v1")]})
    answer = ask_search(running, "messages", True)
    assert [block["type"] for block in answer["content"]] == [
        *("server_tool_use", "web_search_tool_result") * 2, "text"]
    assert len(engine.requests) == 2 and "tools" not in upstream.last.json


def test_a_forced_search_is_forced(server, upstream, upstreams):
    """Claude Code forces it in a request of its own; the second request is free to answer."""
    engine = upstreams(usual=plain(ENGINE_ANSWER))
    upstream.plays(search_call(True), said_of_search(True))
    running = server(upstream, search={"engine": "searxng",
                                       "base_url": engine.url[:-len("/v1")]})
    ask_search(running, "messages", True, tool_choice={"type": "tool", "name": "web_search"})
    first, second = (seen.json for seen in upstream.requests)
    assert first["tool_choice"] == function_named("web_search") and "tool_choice" not in second


def test_a_search_beside_calls_of_the_client_is_left(server, upstream, upstreams):
    engine = upstreams(usual=plain(ENGINE_ANSWER))
    both = [{"index": 0, **call("c1", "web_search", '{"query": "x"}')},
            {"index": 1, **call("c2", "get_time", "{}")}]
    upstream.plays(sse(chunk(tool_calls=both), chunk(finish="tool_calls"), DONE))
    running = server(upstream, search={"engine": "searxng",
                                       "base_url": engine.url[:-len("/v1")]})
    tools = [*WISHES_OF_SEARCH["messages"]["tools"], TIME]
    answer = ask_search(running, "messages", True, tools=tools)
    assert [block.get("name") for block in answer["content"]] == ["get_time"]
    assert answer["stop_reason"] == "tool_use" and not engine.requests


def test_without_an_engine_and_with_a_makers_own_no_search_is_offered(server, upstream):
    upstream.usual = plain(completion())
    own = {"server_tools": {"web_search": {"fields": {"enable_search": True}}}}
    for running in (server(upstream), server(provider(upstream, profile=own), search={
            "engine": "searxng", "base_url": "http://127.0.0.1:9"})):
        ask_search(running, "messages", False)
        assert "tools" not in upstream.last.json


@pytest.mark.parametrize("search, said", [
    ({"engine": "bing"}, 'not "bing"'), ({"engine": "tavily", "api_key": 5}, "api_key"),
    ({"engine": "searxng", "base_url": "ftp://x"}, "an http address"), ("x", "an object"),
    ({"engine": "searxng", "api_key": "$K"}, "search.base_url: it is missing"),
    ({"engine": "searxng", "base_url": ""}, "an http address"),
    ({"engine": "tavily"}, "search.api_key: it is missing")])
def test_bad_search_settings(config, search, said):
    put_config(config, {"search": search})
    gateway = ifl.Gateway(config=config)
    assert any(said in problem for problem in gateway.problems)
    gateway.close()


def test_the_key_of_the_engine_is_a_secret(config, capsys):
    put_config(config, {"search": {"engine": "tavily", "api_key": "tv-0123456789abcdef"}})
    assert ifl.main(["config", "encrypt", "on", "--config-dir", config.folder]) == 0
    assert "0123456789" not in pathlib.Path(config.path).read_text()
    assert ifl.main(["config", "get", "search", "--config-dir", config.folder]) == 0
    shown = capsys.readouterr().out
    assert "0123456789" not in shown and "tavily" in shown
    gateway = ifl.Gateway(config=config)
    assert gateway.settings.search["api_key"] == "tv-0123456789abcdef"
    gateway.close()


# === 12. Upstream ============================================================

CHUNKED = b"5\r\nhello\r\n6;ext=\"x\"\r\n world\r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n"


def dechunk(*pieces):
    dechunker = ifl.Dechunker()
    return b"".join(dechunker.feed(piece) for piece in pieces), dechunker.done, dechunker.surplus


def test_chunks_however_they_are_cut():
    wanted = b"hello world0123456789", True
    for pieces in cuts(CHUNKED):
        assert dechunk(*pieces) == (*wanted, b""), pieces
    for first, second in itertools.combinations(range(1, len(CHUNKED)), 2):
        assert dechunk(CHUNKED[:first], CHUNKED[first:second],
                       CHUNKED[second:] + b"more") == (*wanted, b"more"), (first, second)


@pytest.mark.parametrize("data", [
    b"x\r\n", b"-1\r\n", b"0x5\r\nhello\r\n", b"5 5\r\n", b"\r\n", b"5\r\nhelloX\r\n",
    b"5\r\nhello\n\n5\r\n", b"5\r\nhelloab0\r\n\r\n", b"f" * 16 + b"\r\n",
    b"1_0\r\n" + b"x" * 16 + b"\r\n", b" 5\r\nhello\r\n", b"+5\r\nhello\r\n", b"zz\r\n12\r\n",
    b";ext\r\n", b"5;" + b"x" * 70_000, b"0\r\n" + b"a: b\r\n" * 20_000])
def test_bad_chunked_framing(data):
    for pieces in ([data], [data[:3], data[3:]],
                   [data[at:at + 1] for at in range(len(data))] if len(data) < 100 else [data]):
        with pytest.raises(ValueError):
            dechunk(*pieces)


def test_whole_chunks_can_be_forwarded_as_they_came():
    dechunker = ifl.Dechunker()
    for data, payload, whole in [
            (b"5\r\nhello\r\n", b"hello", True), (b"1\r\na\r\n1\r\nb\r\n", b"ab", True),
            (b"1\r\na\r\n1", b"a", False), (b"\r\nb\r\n", b"b", False),
            (b"1\r\nc\r\n0\r\n\r\n", b"c", False)]:
        assert (dechunker.feed(data), dechunker.whole) == (payload, whole), data
    assert dechunker.done


def test_endpoints_of_base_urls():
    for url, wanted in [("https://host/v1", (("https", "host", 443, "/v1"), "host")),
                        ("http://[::1]:8080/x", (("http", "::1", 8080, "/x"), "[::1]:8080")),
                        ("http://h:80/x", (("http", "h", 80, "/x"), "h"))]:
        assert (ifl.Endpoint.of(url), ifl.Endpoint.of(url).authority) == wanted


# --- connections ---------------------------------------------------------------

@pytest.fixture
def transport():
    made = ifl.Upstream()
    yield made
    made.close()


PATIENT = ifl.Settings(connect_timeout_s=WAIT_S, first_byte_timeout_s=WAIT_S,
                       idle_timeout_s=WAIT_S)
QUICK = ifl.Settings(connect_timeout_s=WAIT_S, first_byte_timeout_s=0.3, idle_timeout_s=0.3)


@contextlib.contextmanager
def watching(transport, client):
    """For the time of the `with` the loop looks after a client, as it does during a call."""
    if client.sock is not None:
        transport.loop.watch(client)
    try:
        yield
    finally:
        if client.sock is not None:
            transport.loop.forget(client)


def ask_upstream(transport, fake, body=b"{}", settings=PATIENT, waiting=ifl.NOBODY, **facts):
    """One request by way of the transport: status, payload."""
    target = ifl.parse_provider(provider(fake, **facts), {})
    assert not target.problem
    with watching(transport, waiting), transport.open(
            target, settings, "POST", "/chat/completions", [("X-Test", "é")], body,
            waiting) as response:
        return response.status, response.read_all(1 << 20)


def test_what_an_upstream_is_asked_and_its_connection_used_again(transport, upstream):
    assert ask_upstream(transport, upstream, ifl.dump_json(chat()))[0] == 200
    seen, headers = upstream.last, upstream.last.headers
    assert (seen.method, seen.path, seen.json) == ("POST", "/v1/chat/completions", chat())
    assert headers["host"] == f"127.0.0.1:{upstream.port}" and headers["x-test"] == "é"
    assert headers["accept-encoding"] == "identity"
    assert headers["content-type"] == "application/json"
    for reply in (plain(b"x" * 100_000), sse("a", "b"), plain(b"", 400)) * 2:
        ask_upstream(transport, upstream.plays(reply))
    assert upstream.connections == 1


FIVE = [("Content-Length", "5")]
PACKED = {"gzip": gzip.compress(b"hello"), "x-gzip": gzip.compress(b"hello"),
          "deflate": zlib.compress(b"hello")}


@pytest.mark.parametrize("reply, connections", [
    (Reply(head(200, [*FIVE, ("Connection", "close")]) + b"hello"), 2),
    (Reply(head(200) + b"hello", CLOSE), 2),
    (Reply(head(200, FIVE, "HTTP/1.0") + b"hello"), 2),
    (Reply(head(200, FIVE) + b"hello and more"), 2),
    *((plain(data, headers=[("Content-Encoding", name)]), 1) for name, data in PACKED.items())],
    ids=["close", "no length", "HTTP/1.0", "surplus", *PACKED])
def test_an_answer_and_whether_its_connection_is_used_again(transport, upstream, reply,
                                                            connections):
    assert ask_upstream(transport, upstream.plays(reply)) == (200, b"hello")
    assert ask_upstream(transport, upstream)[0] == 200
    assert upstream.connections == connections


@pytest.mark.parametrize("kept, reply, requests, said", [
    (True, Reply(CLOSE), 3, ""),         # it looked alive until the request was sent
    (False, Reply(CLOSE), 1, "closed the connection without an answer"),
    (True, Reply(b"HTTP/1.1 2", CLOSE), 2, "closed the connection without an answer")])
def test_a_kept_connection_that_says_nothing_is_replaced_once(transport, upstream, kept, reply,
                                                              requests, said):
    if kept:
        ask_upstream(transport, upstream)
    upstream.plays(reply)
    with pytest.raises(ifl.UpstreamUnreachable, match=said) if said else contextlib.nullcontext():
        assert ask_upstream(transport, upstream)[0] == 200
    assert len(upstream.requests) == requests


def test_a_connection_that_was_closed_or_got_old_is_not_used_again(transport, upstream,
                                                                   monkeypatch):
    ask_upstream(transport, upstream)
    upstream.drop_connections()
    until(lambda: all(kept.is_stale() for idle in transport._idle.values() for kept in idle),
          what="the end of the connection")
    assert ask_upstream(transport, upstream.plays(plain(b"once"))) == (200, b"once")
    assert len(upstream.requests) == 2
    monkeypatch.setattr(ifl, "UPSTREAM_IDLE_S", -1)
    ask_upstream(transport, upstream)
    assert upstream.connections == 3


def test_a_connection_cut_off_is_closed_in_silence_and_not_used_again(
        transport, upstream, waiting):
    target = ifl.Provider("up", upstream.url)
    upstream.plays(sse("a", HOLD, end=False))
    with transport.open(target, PATIENT, "POST", "/chat/completions", [], b"{}") as response:
        assert response.read()
        response.connection.cut(ifl.Stopping("the server is shutting down"))
    assert response.connection.sock.fileno() == -1
    # a client leaves when the answer is read, but before its connection went back
    with watching(transport, waiting), transport.open(
            target, ifl.Settings(), "POST", "/chat/completions", [], b"{}", waiting) as response:
        response.read_all(1 << 20)
        waiting.client.close()
        until(lambda: waiting.left)
    assert ask_upstream(transport, upstream)[0] == 200 and upstream.connections == 3


@pytest.mark.parametrize("stray", [b"garbage", plain(completion("POISON")).steps[0], b"\r\n",
                                   b"HTTP/1.1 408 Request Timeout\r\n\r\n"])
def test_what_an_upstream_says_unasked_is_nobodys_answer(server, upstream, stray):
    """A kept connection is looked at before each use: bytes on it that nobody asked for would be
    the next answer.
    """
    running, go = server(upstream), threading.Event()
    for reply in (Reply(plain(completion("one")).steps[0], go, stray),
                  Reply(*sse(*HELLO).steps, go, stray)):
        upstream.plays(reply)
        go.clear()
        assert post(running, chat()).status == 200
        go.set()
        kept = running.gateway.upstream._idle
        until(lambda: any(each.is_stale() for idle in kept.values() for each in idle),
              what="the stray bytes")
        answer = post(running, chat())
        assert answer.status == 200 and answer.json["choices"][0]["message"]["content"] == "Hello"
    assert upstream.connections == 3


DRIP = [PAUSE if number % 2 else b"y" for number in range(200)]
EARLY = head(103, [("Link", "x")])


@pytest.mark.parametrize("steps, said", [
    ([b"HTTP/1.1 200 OK\r\nX: ", *DRIP], "head"),
    ([PAUSE if number % 2 else EARLY for number in range(200)], "head"),
    ([EARLY] * (ifl.INTERIM_ANSWERS + 2), "nothing but 1xx"),
    ([head(100), EARLY, *plain(completion("after all")).steps], "")],
    ids=["dripping head", "dripping 1xx", "many 1xx", "1xx first"])
def test_a_head_has_one_time_limit_and_1xx_before_it_are_bounded(server, upstream, steps, said):
    """Each byte is in time, the head is not; who waits is kept awake all the while."""
    running = server(upstream.plays(Reply(*steps)), first_byte_timeout_s=0.4, keepalive_s=0.1)
    answer = post(running, chat(True))
    assert said in answer.body.decode() and (not said) == (b"after all" in answer.body)
    assert answer.status == (502 if "1xx" in said else 200)
    if said == "head":
        assert records_of(answer.body)[:2] == [": keep-alive"] * 2


@linux
def test_who_waits_is_kept_awake_while_a_large_body_is_sent(server):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        running = server(f"http://127.0.0.1:{listener.getsockname()[1]}", keepalive_s=0.05)
        with Client(running).post(chat(True, pad="x" * (16 << 20))) as client:
            upstream, _ = listener.accept()
            assert client.head()[0] == 200
            assert client.piece() == client.piece() == b": keep-alive\n\n"
            upstream.close()


def test_a_compressed_answer_has_a_limit_of_its_own(transport, upstream, monkeypatch):
    monkeypatch.setattr(ifl, "UNPACKED_LIMIT_BYTES", 1 << 19)
    packed = gzip.compress(b" " * (200 << 20))
    upstream.plays(plain(packed, headers=[("Content-Encoding", "gzip")]))
    tracemalloc.start()
    with pytest.raises(ifl.UpstreamGarbled, match="larger than"):
        ask_upstream(transport, upstream)
    assert tracemalloc.get_traced_memory()[1] < 3 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name, value", [
    ("Content-Type", "text/\rplain"), ("Content-Type", "text/\0plain"),
    ("Content-Type", "a" * 30_000), ("x-ratelimit-\r", "1"), ("x-ratelimit-\0", "1"),
    ("x-ratelimit-a b", "1"), ("x-ratelimit-" + "a" * 30_000, "1"), ("x-ratelimit-a", "1\r2"),
    ("x-ratelimit-a", "1\0"), ("x-ratelimit-a", "1" * 30_000)])
def test_headers_that_no_client_may_get(server, upstream, name, value):
    data = ifl.dump_json(completion("fine"))
    upstream.plays(Reply(head(200, [(name, value), ("Content-Length", str(len(data)))]) + data))
    answer = post(server(upstream), chat())
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    assert not any(each.startswith("x-ratelimit") for each in answer.headers)


# --- faults ----------------------------------------------------------------------

IN_CHUNKS = head(200, [("Transfer-Encoding", "chunked")])
ZIPPED = ("Content-Encoding", "gzip")
SILENT, GARBLED, AWAY = ifl.UpstreamTimeout, ifl.UpstreamGarbled, ifl.UpstreamUnreachable
FAULTS = [
    # id, steps, error class, words
    ("silent", [HOLD], SILENT, "said nothing for 0.3 s"),
    ("silent in the head", [b"HTTP/1.1 200", HOLD], SILENT, "0.3 s"),
    ("silent in the body", [head(200, FIVE) + b"he", HOLD], SILENT, "0.3 s"),
    ("reset", [RESET], AWAY, "without an answer"),
    ("no HTTP", [b"SSH-2.0-x\r\n", CLOSE], GARBLED, "not HTTP"),
    ("endless line", [b"HTTP/1.1 200 " + b"x" * 70_000, CLOSE], GARBLED, "not HTTP"),
    ("many headers", [b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 300 + b"\r\n", CLOSE], GARBLED,
     "not HTTP"),
    ("two lengths", [head(200, [*FIVE, ("Content-Length", "6")]) + b"hello", CLOSE], GARBLED,
     "not HTTP"),
    ("cut body", [head(200, FIVE) + b"he", CLOSE], GARBLED, "in the middle"),
    ("reset body", [head(200, FIVE) + b"he", RESET], GARBLED, "in the middle|broke"),
    ("cut chunks", [IN_CHUNKS + b"5\r\nhe", CLOSE], GARBLED, "in the middle"),
    ("bad chunks", [IN_CHUNKS + b"nope\r\n"], GARBLED, "chunked answer is broken"),
    ("brotli", [head(200, [("Content-Encoding", "br"), ("Content-Length", "1")]) + b"x"], GARBLED,
     "encoded as br"),
    ("no gzip", [head(200, [ZIPPED, *FIVE]) + b"hello"], GARBLED, "decompressed"),
    ("half a gzip", [head(200, [ZIPPED]) + gzip.compress(os.urandom(999))[:700], CLOSE], GARBLED,
     "cut off"),
    ("too large", plain(b"x" * (2 << 20)).steps, GARBLED, "larger than 1 MiB")]


@pytest.mark.parametrize("steps, kind, said", [row[1:] for row in FAULTS],
                         ids=[row[0] for row in FAULTS])
def test_faults_of_an_upstream(transport, upstream, steps, kind, said):
    settings = QUICK if kind is SILENT else PATIENT
    with pytest.raises(kind, match=said):
        ask_upstream(transport, upstream.plays(Reply(*steps)), settings=settings)
    assert ask_upstream(transport, upstream)[0] == 200     # on a new connection


def test_an_answer_before_the_body_was_taken(transport):
    """nginx answers 413 and closes while the request is still being sent."""
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse():
        sock, _ = listener.accept()
        sock.recv(1000)
        sock.sendall(head(413, [("Content-Length", "3"), ("Connection", "close")]) + b"big")
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
        sock.close()
    thread = threading.Thread(target=refuse, daemon=True)
    thread.start()
    with listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert ask_upstream(transport, address, b"x" * (4 << 20)) == (413, b"big")
    thread.join(WAIT_S)


@linux
def test_an_upstream_that_takes_nothing_is_given_up(transport, monkeypatch):
    connect = socket.create_connection

    def connect_narrowly(*args, **facts):
        sock = connect(*args, **facts)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        return sock
    monkeypatch.setattr(socket, "create_connection", connect_narrowly)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(ifl.UpstreamTimeout, match="took nothing"):
            ask_upstream(transport, f"http://127.0.0.1:{listener.getsockname()[1]}",
                         b"x" * (32 << 20), QUICK)


@linux
def test_a_connection_that_does_not_come_about(transport):
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        # fill the queue: further attempts get no answer
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        with pytest.raises(ifl.UpstreamTimeout, match="no connection within the time limit"):
            ask_upstream(transport, f"http://127.0.0.1:{listener.getsockname()[1]}",
                         settings=ifl.Settings(connect_timeout_s=0.1))


def certificate_error(code):
    error = ssl.SSLCertVerificationError(1, "x")
    error.verify_code, error.verify_message = code, "as OpenSSL says it"
    return error


@pytest.mark.parametrize("error, kind, said", [
    (socket.timeout("x"), SILENT, "time limit"), (MemoryError("x"), AWAY, "x"),
    (OSError(errno.ENETUNREACH, "Network is unreachable"), AWAY, "Network is unreachable"),
    (ConnectionRefusedError(errno.ECONNREFUSED, "x"), AWAY, "connection refused; is it running?"),
    (socket.gaierror(socket.EAI_NONAME, "no such name"), AWAY, "unknown host (no such name)"),
    (UnicodeError("label empty or too long"), AWAY, "unknown host (label"),
    (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] x"), AWAY, "it does not speak TLS"),
    *((certificate_error(code), AWAY, said) for code, said in (
        (9, "clock"), (10, "expired"), (18, "self-signed"), (19, "ca_file"),
        (20, "ca-certificates"), (62, "host name"), (99, "as OpenSSL says it")))])
def test_what_sockets_raise_in_words(transport, monkeypatch, error, kind, said):
    def fail(*args, **facts):
        raise error
    monkeypatch.setattr(socket, "create_connection", fail)
    with pytest.raises(kind) as found:
        ask_upstream(transport, "http://nowhere.invalid")
    assert found.value.message.startswith("up (nowhere.invalid): ") and said in found.value.message
    is_certificate = isinstance(error, ssl.SSLCertVerificationError)
    assert found.value.should_retry is (False if is_certificate else None)


def test_our_own_address_is_no_upstream(server):
    running = server("http://127.0.0.1:1")
    running.gateway.apply(settings_for([running.url + "/v1"]))
    answer = post(running, chat())
    assert answer.status == 502 and "this program's own address" in answer.error["message"]
    assert answer.headers["x-should-retry"] == "false"
    until(lambda: not running._handlers)
    # another gateway in this process is not ourselves
    other = server(running.url + "/v1", detect_local=False)
    assert "own address" in post(other, chat()).error["message"]


@pytest.mark.parametrize("settings, facts, reply", [
    (ifl.Settings(), {"timeout_s": 0.1}, Reply(HOLD)),
    (ifl.Settings(first_byte_timeout_s=60, idle_timeout_s=0.1), {}, sse("a", HOLD))],
    ids=["a provider's own", "silence after the first byte"])
def test_time_limits(transport, upstream, settings, facts, reply):
    with pytest.raises(ifl.UpstreamTimeout, match="0.1 s"):
        ask_upstream(transport, upstream.plays(reply), settings=settings, **facts)


# --- TLS ---------------------------------------------------------------------------

@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Paths of a self-signed certificate for 127.0.0.1 and of its key."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    paths = str(folder / "cert.pem"), str(folder / "key.pem")
    done = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-out", paths[0], "-keyout",
         paths[1]], capture_output=True, timeout=60)
    if done.returncode:
        pytest.skip("this openssl makes no such certificate")
    return paths


@pytest.fixture
def tls_upstream(upstreams, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return upstreams(context=context)


def with_ca(certificate, **more):
    return ifl.replace(PATIENT, **{"ca_file": certificate[0], **more})


def test_tls_with_a_ca_file(transport, tls_upstream, certificate):
    settings, body = with_ca(certificate), ifl.dump_json(chat(pad="x" * 500_000))
    for _ in range(2):
        assert ask_upstream(transport, tls_upstream, body, settings)[0] == 200
    tls_upstream.plays(sse(*HELLO), plain(b"y" * 700_000))
    assert records_of(ask_upstream(transport, tls_upstream, settings=settings)[1]) == HELLO
    assert len(ask_upstream(transport, tls_upstream, settings=settings)[1]) == 700_000
    assert tls_upstream.connections == 1
    tls_upstream.plays(Reply(HOLD), sse("a", HOLD))
    settings = with_ca(certificate, first_byte_timeout_s=0.1, idle_timeout_s=0.1)
    for _ in range(2):
        with pytest.raises(ifl.UpstreamTimeout):
            ask_upstream(transport, tls_upstream, settings=settings)


@pytest.mark.parametrize("ca_file, change, said", [
    ("", ("", ""), "self-signed.*`ca_file`"), (None, ("127.0.0.1", "localhost"), "another host"),
    ("none.pem", ("", ""), "ca_file .*none.pem"), (".", ("", ""), "ca_file .")])
def test_tls_that_fails_says_what_to_do(transport, tls_upstream, certificate, home, monkeypatch,
                                        ca_file, change, said):
    monkeypatch.chdir(home)
    settings = with_ca(certificate, **({} if ca_file is None else {"ca_file": ca_file}))
    with pytest.raises(ifl.UpstreamUnreachable, match=said):
        ask_upstream(transport, tls_upstream.url.replace(*change), settings=settings)


def test_tls_to_a_server_without_it(transport, upstream):
    with pytest.raises(ifl.UpstreamUnreachable, match="TLS failed: .*"):
        ask_upstream(transport, upstream.url.replace("http:", "https:"))


# --- the loop and its clients ----------------------------------------------------

class Waiting(ifl.Client):
    """A client on one end of a socket pair."""
    keepalive_s = 0.02

    def __init__(self) -> None:
        super().__init__()
        self.sock, self.client = socket.socketpair()
        self.sock.setblocking(False)

    def close(self) -> None:
        self.sock.close()
        self.client.close()


@pytest.fixture
def waiting():
    made = Waiting()
    yield made
    made.close()


@pytest.mark.parametrize("reply", [Reply(HOLD), Reply(head(200, FIVE) + b"x", HOLD)],
                         ids=["head", "body"])
def test_who_has_left_is_not_waited_for_by_tls(transport, tls_upstream, certificate, waiting,
                                               looks_often, reply):
    tls_upstream.plays(reply)
    leaver = threading.Thread(target=lambda: (tls_upstream.wait(), waiting.client.close()))
    leaver.start()
    with pytest.raises(ifl.ClientGone):
        ask_upstream(transport, tls_upstream, waiting=waiting, settings=with_ca(
            certificate, first_byte_timeout_s=60, idle_timeout_s=60))
    until(lambda: tls_upstream.hung_up == 1, what="the end of the upstream's connection")
    leaver.join(WAIT_S)


LOTS = [chunk("x" * 60_000)] * 200


def begin_stream(running, *args, **facts):
    """A client that has read the first chunk of its stream."""
    client = Client(running, *args).post(chat(True), **facts)
    assert client.head()[0] == 200
    client.piece()
    return client


def test_a_slow_client_holds_up_nobody_and_gets_all_of_it(server, upstream):
    running = server(upstream)
    upstream.plays(sse(*LOTS, chunk(finish="stop"), DONE))
    with begin_stream(running) as slow:
        for _ in range(3):
            assert text_of(records_of(post(running, chat(True)).body)) == "Hello"
        rest = slow.pieces()
    assert len(text_of(records_of(rest))) >= 60_000 * 199
    assert is_well(running)


def test_more_streams_than_select_can_watch_are_refused(server, upstream, monkeypatch):
    monkeypatch.setattr(ifl.StreamLoop, "ROOM", 2)
    running, go = server(upstream), threading.Event()
    upstream.plays(*[sse(chunk("a"), go, chunk("b"), chunk(finish="stop"), DONE)] * 2)
    clients = [begin_stream(running) for _ in range(2)]
    until(lambda: len(running.gateway.upstream.loop._streams) == 2, what="two streams on their way")
    upstream.plays(sse(go, DONE))
    assert b"no more streams" in post(running, chat(True)).body
    go.set()
    for client in clients:
        assert b"[DONE]" in client.pieces()
        client.hang_up()
    assert is_well(running) and not running.gateway.upstream.loop._streams


def test_a_stream_that_ended_is_forgotten_by_the_loop(transport, upstream, waiting):
    upstream.plays(sse(chunk("a"), chunk("b"), DONE))
    got, waiting.keepalive_s = [], 60
    with transport.open(ifl.Provider("up", upstream.url), ifl.Settings(), "POST",
                        "/chat/completions", [], b"{}", waiting) as response:
        kept = weakref.ref(response)
        transport.move(response, waiting, lambda payload: got.append(payload) or True)
    del response
    gc.collect()
    assert b"".join(got).endswith(b"[DONE]\n\n") and kept() is None


def test_what_goes_wrong_while_a_stream_moves_reaches_its_own_request(transport, upstream, waiting):
    go = threading.Event()
    upstream.plays(sse(chunk("a"), go, chunk("b"), HOLD))

    def move(payload):
        if b'"b"' in payload:
            raise LookupError(threading.current_thread().name)
        go.set()
        return True

    with pytest.raises(LookupError, match="streams"), transport.open(
            ifl.Provider("up", upstream.url), ifl.Settings(), "POST", "/chat/completions", [],
            b"{}", waiting) as response:
        transport.move(response, waiting, move)
    until(lambda: upstream.hung_up == 1, what="the end of the upstream's connection")


def test_the_loop_ends_with_its_last_stream(server, upstream):
    running, go = server(upstream), threading.Event()
    upstream.plays(sse(chunk("a"), go, chunk(finish="stop"), DONE))
    client, loop = begin_stream(running), running.gateway.upstream.loop
    until(lambda: loop._streams, what="the stream")
    running.gateway.upstream.close()
    go.set()
    assert b"[DONE]" in client.pieces()
    client.hang_up()
    until(lambda: not loop._thread.is_alive(), what="the end of the loop")


#: path, how a stream that fails says so, how one ends that is whole
STREAM_ENDS = [("/v1/chat/completions", b'data: {"error"', b"data: [DONE]"),
               ("/v1/messages", b"event: error", b"event: message_stop"),
               ("/v1/responses", b"event: response.failed", b"event: response.completed")]
QUESTION = {"model": "m1", "max_tokens": 9, "stream": True, "input": "q",
            "messages": [{"role": "user", "content": "q"}]}


@pytest.mark.parametrize("path, told, end", STREAM_ENDS)
def test_a_stream_that_outlasts_the_drain_is_told_so(server, upstream, path, told, end):
    running = server(upstream.plays(sse(chunk("a"), HOLD)))
    with Client(running).post(QUESTION, path=path) as client:
        client.head()
        assert client.piece()
        closer = threading.Thread(target=running.close, args=(0.1,), daemon=True)
        closer.start()
        rest = client.pieces()
    closer.join(WAIT_S)
    assert told in rest and b"shutting down" in rest and not closer.is_alive()


@pytest.mark.parametrize("path, told, end", STREAM_ENDS)
@pytest.mark.parametrize("idle_s", [60, 0.05])
def test_a_stream_that_has_finished_but_does_not_close(
        server, upstream, monkeypatch, path, told, end, idle_s):
    monkeypatch.setattr(ifl.MovedStream, "AFTER_FINISH_S", 0.1)
    running = server(upstream.plays(sse(chunk("Hi"), chunk(finish="stop"), HOLD)),
                     idle_timeout_s=idle_s)
    answer = post(running, QUESTION, path)
    assert answer.status == 200 and end in answer.body and b"Hi" in answer.body
    assert told not in answer.body
    until(lambda: ifl.history_of(running.gateway))
    assert ifl.history_of(running.gateway)[0]["status"] == 200


@pytest.mark.parametrize("n, items", [(1, [chunk("Hi")]), (2, [chunk("Hi"), chunk(finish="stop")])])
def test_a_stream_that_has_not_finished_is_waited_for(server, upstream, monkeypatch, n, items):
    monkeypatch.setattr(ifl.MovedStream, "AFTER_FINISH_S", 0.01)
    running = server(upstream.plays(sse(*items, HOLD)), idle_timeout_s=0.1)
    answer = post(running, chat(True, n=n)).body.decode()
    assert "said nothing for 0.1 s" in answer and "[DONE]" not in answer


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("begun", [chunk(" "), chunk(
    None, tool_calls=[{"index": 0, "id": "a", "function": {"name": "look"}}])])
def test_another_upstream_may_answer_until_something_was_said(server, upstreams, path, begun):
    bad, good = upstreams(), upstreams()
    running = server(provider(bad, models=["m1"]), provider(good, "up2", models=["m2"]),
                     aliases={"m": ["up/m1", "up2/m2"]})
    for end in ([RESET], [{"error": {"message": "broken", "code": 500}}, DONE], []):
        bad.plays(sse(begun, *end))
        text = post(running, {**QUESTION, "model": "m"}, path).body.decode()
        assert '"Hel"' in text and "broken" not in text
        assert text.count("event: message_start") + text.count("event: response.created") == 1
    assert len(bad.requests) == len(good.requests) == 3


def test_more_sockets_than_select_takes_are_looked_at_in_parts(monkeypatch):
    taken = []
    monkeypatch.setattr(select, "select", lambda reads, writes, strange, wait_s: (
        taken.append(len(reads)), (reads[:1], [], []))[1])
    poller = ifl._SelectPoller()
    for fd in range(1, 1202):
        poller.register(fd, ifl._POLLIN)
    assert sorted(poller.poll(0)) == [(1, 1), (501, 1), (1001, 1)] and taken == [500, 500, 201]


def test_a_system_without_poll(server, upstream, monkeypatch, looks_often):
    """Windows has no select.poll."""
    monkeypatch.setattr(ifl, "BODY_TIME_S", 0.2)
    monkeypatch.setattr(ifl, "Poller", ifl._SelectPoller)
    running = server(upstream, provider(upstream, "short", timeout_s=0.3), keepalive_s=0.03)
    assert post(running, chat(pad="x" * 3_000_000)).status == 200
    assert upstream.last.json["pad"] == "x" * 3_000_000
    assert records_of(post(running, chat(True)).body) == HELLO
    for reply, size in ((Reply(HOLD), 0), (sse(chunk("x" * 900_000), HOLD), 900_000)):
        upstream.plays(reply)
        found = records_of(post(running, chat(True, "short/m")).body)
        assert len(text_of(found)) == size and "0.3 s" in found[-1]["error"]["message"]
        assert size or found[0] == ": keep-alive"
    upstream.plays(Reply(HOLD))
    hung_up, asked = upstream.hung_up, len(upstream.requests)
    client = Client(running).post(chat(True))
    upstream.wait(asked + 1)
    client.hang_up()
    until(lambda: upstream.hung_up > hung_up)
    with Client(running) as client:
        assert client.send(request_bytes(headers={"Content-Length": "9"})).answer().status == 408
    assert is_well(running)


# --- reasoning that has to come back ---------------------------------------------

LOOK = {"type": "function", "function": {"name": "look",
                                         "parameters": {"type": "object", "properties": {}}}}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
NAMELESS = {name: value for name, value in CALLED.items() if name != "id"}
GO = {"role": "user", "content": "go"}


def thinks(stream=False, call=CALLED, reason="because"):
    """An answer that reasons and calls a tool."""
    if stream:
        return sse(chunk(None, reasoning_content=reason[:2]),
                   chunk(None, reasoning_content=reason[2:]),
                   chunk(None, tool_calls=[{"index": 0, **call}]), chunk(finish="tool_calls"), DONE)
    return plain(completion(None, "tool_calls", reasoning_content=reason, tool_calls=[call]))


def after_call(call=CALLED, opening=GO, **said):
    """A Chat history in which the model has called the tool."""
    return [opening, {"role": "assistant", "content": None, "tool_calls": [call], **said},
            {"role": "tool", "tool_call_id": call["id"], "content": "seen"}]


@pytest.fixture
def insisting(server, upstream):
    """insisting(**settings): a server in front of a provider that wants its reasoning back."""
    def make(**settings):
        return server(provider(upstream, models=["m1"],
                               profile={"require_reasoning_on_tool_calls": True}), **settings)
    return make


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_client_that_drops_reasoning_is_helped_out(insisting, upstream, stream):
    running, ask = insisting(), {"model": "m1", "tools": [LOOK], "stream": stream}
    upstream.plays(thinks(stream))
    first = post(running, {**ask, "messages": [GO]})
    assert first.status == 200 and b"cause" in first.body
    post(running, {**ask, "messages": after_call()})
    assert [message.get("reasoning_content") for message in upstream.last.json["messages"]] == [
        None, "because", None]
    kept = {**ask, "messages": after_call(reasoning_content="mine")}
    post(running, kept)
    assert upstream.last.body == ifl.dump_json(kept)       # byte for byte: nothing to add


@pytest.mark.parametrize("stream, call", [(False, CALLED), (False, NAMELESS), (True, NAMELESS)])
def test_a_messages_client_that_drops_thinking_is_helped_out(insisting, upstream, stream, call):
    """A call without an id is kept under the one that we gave it."""
    running = insisting()
    upstream.plays(thinks(stream, call))
    ask = {"model": "m1", "max_tokens": 9, "messages": [GO],
           "tools": [{"name": "look", "input_schema": {"type": "object", "properties": {}}}]}
    answer = post(running, {**ask, "stream": stream}, "/v1/messages")
    ident = re.search(rb'"id":"((toolu|call)_\w+)"', answer.body).group(1).decode()
    used = {"type": "tool_use", "id": ident, "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": ident, "content": "seen"}
    post(running, {**ask, "messages": [GO, {"role": "assistant", "content": [used]},
                                       {"role": "user", "content": [result]}]}, "/v1/messages")
    assert upstream.last.json["messages"][1]["reasoning_content"] == "because"


SIGNED_CALL = {**CALLED, "extra_content": {"google": {"thought_signature": "c2ln"}}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_call_whose_signature_a_client_drops_gets_it_back(server, upstream, stream, path):
    """At the upstream that it came from, and nowhere else."""
    running = server(provider(upstream, "one"), provider(
        upstream.url.replace("127.0.0.1", "localhost"), "other"))
    upstream.plays(thinks(stream, SIGNED_CALL))
    schema = {"type": "object", "properties": {}}
    used = {"type": "tool_use", "id": "call_1", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "seen"}
    ask, first, later = {
        "/v1/chat/completions": ({"tools": [LOOK]}, {"messages": [GO]}, {"messages": after_call()}),
        "/v1/messages": ({"max_tokens": 9, "tools": [{"name": "look", "input_schema": schema}]},
                         {"messages": [GO]}, {"messages": [
                             GO, {"role": "assistant", "content": [used]},
                             {"role": "user", "content": [result]}]}),
        "/v1/responses": ({"tools": [{"type": "function", "name": "look", "parameters": schema}]},
                          {"input": [GO]}, {"input": [
                              GO, call_responses("call_1", "look"), result_responses("call_1")]}),
    }[path]
    assert post(running, {**ask, **first, "model": "one/m", "stream": stream}, path).status == 200
    until(lambda: running.gateway.in_flight == 0, what="the note, which follows the answer")
    for model, sent in (("one/m", SIGNED_CALL), ("other/m", CALLED)):
        assert post(running, {**ask, **later, "model": model}, path).status == 200
        assert upstream.last.json["messages"][1]["tool_calls"] == [sent]


def test_a_signature_that_a_chat_client_keeps_goes_to_its_own_upstream_only(server, upstream):
    running = server(provider(upstream, "one"), provider(
        upstream.url.replace("127.0.0.1", "localhost"), "other"))
    upstream.plays(thinks(call=SIGNED_CALL))
    ask = {"tools": [LOOK], "messages": [GO]}
    assert post(running, {**ask, "model": "one/m"}).status == 200
    until(lambda: running.gateway.in_flight == 0, what="the note, which follows the answer")
    known, foreign = after_call(SIGNED_CALL), after_call({**SIGNED_CALL, "id": "call_2"})
    for model, history, sent in (("one/m", known, SIGNED_CALL), ("other/m", known, CALLED),
                                 ("other/m", foreign, {**SIGNED_CALL, "id": "call_2"})):
        assert post(running, {**ask, "messages": history, "model": model}).status == 200
        assert upstream.last.json["messages"][1]["tool_calls"] == [sent]


def test_a_stored_response_has_what_its_upstream_wants_back(server, upstream):
    running = server(upstream)
    upstream.plays(plain(completion(None, "tool_calls", reasoning_details=[SECRET],
                                    tool_calls=[SIGNED_CALL])))
    schema = {"type": "object", "properties": {}}
    ask = {"model": "m1", "tools": [{"type": "function", "name": "look", "parameters": schema}]}
    told = post(running, {**ask, "input": [GO]}, "/v1/responses").json
    assert "encrypted_content" not in str(told["output"])
    until(lambda: running.gateway.in_flight == 0, what="the note, which follows the answer")
    running.gateway.reasoning.drop(*running.gateway.reasoning._kept)
    assert post(running, {**ask, "previous_response_id": told["id"],
                          "input": [result_responses("call_1")]}, "/v1/responses").status == 200
    message = upstream.last.json["messages"][1]
    assert message["reasoning_details"] == [SECRET] and message["tool_calls"] == [SIGNED_CALL]


@pytest.mark.parametrize("more, number", [({}, 1), ({"n": 1}, 1), ({"n": 2}, 2)])
def test_an_answer_in_two_choices_is_one_for_chat_as_well(server, upstream, more, number):
    answer = completion("Let me look.", "stop")
    second = completion(None, "tool_calls", tool_calls=[CALLED])["choices"][0]
    answer["choices"].append({**second, "index": 1})
    answer["web_search"] = [{"title": "t", "link": "l"}]
    upstream.plays(plain(answer))
    told = post(server(upstream), chat(**more)).json
    assert len(told["choices"]) == number and told["web_search"] == answer["web_search"]
    if number == 1:
        assert told["choices"] == [{"index": 0, "finish_reason": "tool_calls", "message": {
            "role": "assistant", "content": "Let me look.", "tool_calls": [CALLED]}}]


def test_what_a_search_found_stays_beside_an_answer_that_is_folded(server, upstream):
    found = [{"title": "t", "link": "l"}]
    upstream.plays(sse({**chunk("x"), "web_search": found}, chunk(finish="stop"), DONE))
    assert post(server(upstream), chat()).json["web_search"] == found


def test_reasoning_is_remembered_for_its_own_conversation_and_client_only(insisting, upstream):
    """Kimi's ids recur, and so do calls; what somebody else's conversation thought must not come
    in.
    """
    running = insisting(client_keys=[key_entry(name, f"sk-{name}-123456789") for name in "ab"])
    kimi = {**CALLED, "id": "functions.look:0"}

    def back(made=kimi, opening="go", key="a", **headers):
        history = after_call(made, {"role": "user", "content": opening})
        post(running, {"model": "m1", "messages": history, "tools": [LOOK]},
             Authorization=f"Bearer sk-{key}-123456789", **headers)
        return upstream.last.json["messages"][1]["reasoning_content"]

    upstream.plays(thinks(call=kimi))
    post(running, {"model": "m1", "messages": [GO], "tools": [LOOK]},
         Authorization="Bearer sk-a-123456789")
    parts = [{"type": "text", "text": "go", "cache_control": {"type": "ephemeral"}}]
    spaced = {**kimi, "function": {"name": "look", "arguments": " { } "}}     # written anew
    assert back() == back(opening=parts) == back(spaced) == "because"
    others = [back(opening="come"), back(session_id="other"), back(key="b"),
              back({**kimi, "id": "functions.look:1"}),
              back({**kimi, "function": {"name": "look", "arguments": '{"x": 1}'}})]
    assert others == [""] * 5


@pytest.mark.parametrize("more, sent", [({}, ""), ({"thinking": {"type": "disabled"}}, None)])
def test_an_insisting_provider_gets_the_field_even_where_nothing_is_known(
        insisting, upstream, more, sent):
    post(insisting(), {"model": "m1", "messages": after_call(), **more})
    assert upstream.last.json["messages"][1].get("reasoning_content") == sent


# --- what models count ---------------------------------------------------------

def prompt_of(words):
    return {"model": "m1", "max_tokens": 9,
            "messages": [{"role": "user", "content": "thing " * words}]}


def count_of(running, body):
    return post(running, body, "/v1/messages/count_tokens").json["input_tokens"]


def answer_counts(running, upstream, words, counted):
    """A prompt of so many words, and what the upstream says that it has counted."""
    upstream.plays(plain(completion(usage={"prompt_tokens": counted, "completion_tokens": 2})))
    assert post(running, prompt_of(words), "/v1/messages").status == 200
    until(lambda: running.gateway.in_flight == 0, what="the note, which follows the answer")


def first_count(running, upstream, words):
    """Of the tokens that message_start tells."""
    upstream.plays(sse(chunk("x"), chunk(finish="stop"), DONE))
    stream = post(running, {**prompt_of(words), "stream": True}, "/v1/messages").body
    begin = json.loads(stream.partition(b"data: ")[2].partition(b"\n")[0])
    return begin["message"]["usage"]["input_tokens"]


@pytest.mark.parametrize("each", [0.5, 0.9, 1.0, 1.6, 2.5])
@pytest.mark.parametrize("fixed", [0, 19, 120, 3000])
@pytest.mark.parametrize("asked", [(2, 60, 2000), (2000, 2, 60), (700, 3000, 30), (9, 400, 40),
                                   (150, 1, 700)])
def test_three_answers_teach_what_the_model_counts(server, upstream, each, fixed, asked):
    """So many tokens for each that we estimate, and so many that every prompt has."""
    running = server(upstream)

    def true_count(words):
        return int(ifl.count_message_tokens(prompt_of(words)) * each + fixed)

    for words in asked:
        answer_counts(running, upstream, words, true_count(words))
    for words in (min(asked), max(asked), 5 * max(asked)):
        expected = true_count(words)
        assert abs(count_of(running, prompt_of(words)) - expected) <= expected / 10 + 2, words
        assert abs(first_count(running, upstream, words) - expected) <= expected / 10 + 2, words
    assert count_of(running, {**prompt_of(600),
                              "model": "another"}) == ifl.count_message_tokens(prompt_of(600))


@pytest.mark.parametrize("words, counted", [
    # short prompts under what the upstream adds; an upstream that counts something else
    *((words, words + 24) for words in (1, 2, 5, 20)), (1, 4000), (300, 4300), (1, 900_000),
    (5000, 3), (400, 90_000)])
def test_one_answer_does_not_spoil_the_scale(server, upstream, words, counted):
    running = server(upstream)
    expected = count_of(running, prompt_of(20_000))
    answer_counts(running, upstream, words, counted)
    own = counted - words if words * 2.5 < counted < 20_000 else 0
    assert abs(count_of(running, prompt_of(20_000)) / (expected + own) - 1) < 0.1


@pytest.mark.parametrize("teacher", ["/v1/messages", "/v1/responses"])
def test_what_the_answers_of_one_dialect_teach_holds_for_the_other(server, upstream, teacher):
    running = server(upstream)

    def asked(path, words):
        body = {"model": "m1", "input": "thing " * words} if "responses" in path else (
            prompt_of(words))
        return post(running, body, path)

    for words in (2, 60, 2000):
        counted = 2 * ifl.count_message_tokens(prompt_of(words))
        upstream.plays(plain(completion(usage={"prompt_tokens": counted, "completion_tokens": 2})))
        assert asked(teacher, words).status == 200
        until(lambda: running.gateway.in_flight == 0, what="the note, which follows the answer")
    expected = 2 * ifl.count_message_tokens(prompt_of(700))
    for path in ("/v1/messages/count_tokens", "/v1/responses/input_tokens"):
        assert abs(asked(path, 700).json["input_tokens"] / expected - 1) < 0.1, path
    upstream.plays(plain(completion(usage={"completion_tokens": 2})))
    told = asked("/v1/responses", 700).json["usage"]["input_tokens"]
    assert abs(told / expected - 1) < 0.1


def test_what_was_learnt_outlives_a_restart_and_is_bounded(tmp_path):
    path, now = str(tmp_path / "tokens.json"), [0.0]
    scale = ifl.TokenScale(path, lambda: now[0])
    scale.learn("p/m", 10_000, 15_000)
    assert 14_500 < ifl.TokenScale(path).scaled("p/m", 10_000) < 15_000
    scale.learn("p/n", 10, 40)
    assert scale.scaled("p/n", 10) == 40 and ifl.TokenScale(path).scaled("p/n", 10) == 10
    scale.close()
    assert ifl.TokenScale(path).scaled("p/n", 10) == 40
    for number in range(scale.LIMIT):
        scale.learn(f"p/{number}", 1, 2)
        scale.pass_over(f"p/{number}")
    for _ in range(3 * scale.SURE):
        scale.learn("p/0", 1, 2)
    assert scale.scaled("p/m", 7) == 7 and ifl.dump_json(scale._pairs).count(b"[1,2]") == (
        scale.LIMIT - 1 + scale.SURE)
    assert len(scale._passed) <= scale.LIMIT


@pytest.mark.parametrize("damage", [
    b"{", b"[]", b'{"p/m": [5.0, 1.0, 1]}', b'{"p/m": "x"}', b'{"p/m": [[1, 2, 3]]}',
    b'{"p/m": [[0, 1]]}', b'{"p/m": [[1, 1e999]]}', b'{"p/m": [[true, "x"]]}'])
def test_a_damaged_file_of_token_counts_is_learnt_anew(tmp_path, damage):
    path = tmp_path / "tokens.json"
    path.write_bytes(damage)
    scale = ifl.TokenScale(str(path))
    assert scale.scaled("p/m", 7) == 7
    scale.learn("p/m", 1, 20)
    assert ifl.TokenScale(str(path)).scaled("p/m", 1) == 20


def test_a_model_that_is_known_is_estimated_now_and_then():
    scale = ifl.TokenScale()
    for _ in range(scale.SURE):
        assert scale.is_worth("m")
        scale.learn("m", 1, 2)
    worth = []
    for _ in range(16):
        worth.append(scale.is_worth("m"))
        scale.pass_over("m")
    assert worth.count(True) == 2


# === 12. iFlow as an upstream ================================================

def iflow_reply(answer) -> Reply:
    """What iFlow answers: an object, (status, object), or the records of a stream."""
    status, answer = answer if isinstance(answer, tuple) else (200, answer)
    return plain(answer, status) if isinstance(answer, dict) else sse(*answer, start=b"data:")


@pytest.fixture
def iflow_home(home):
    """A writer of the CLI's file, which returns its path."""
    path = home / ".iflow" / "settings.json"
    path.parent.mkdir()

    def write(content):
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        return path
    return write


@pytest.fixture
def iflow(iflow_home, config, server, upstream):
    """(upstream, start): start(login, **config) gives a server that is logged in to it."""
    def start(login=None, **raw):
        iflow_home({"apiKey": "sk-iflow", "baseUrl": upstream.url, **(login or {})})
        put_config(config, raw)
        return server(gateway=ifl.Gateway(config=config))
    return upstream, start


def glm(stream=False, model="glm-5", **more):
    return chat(stream, model, **more)


def test_iflow_headers_are_signed(iflow):
    upstream, start = iflow
    server = start()
    assert post(server, glm(), X_Private="no", User_Agent="curl").status == 200
    assert post(server, glm()).status == 200
    first, second = (seen.headers for seen in upstream.requests)
    assert first["authorization"] == "Bearer sk-iflow" and first["user-agent"] == "iFlow-Cli"
    message = f"iFlow-Cli:{first['session-id']}:{first['x-iflow-timestamp']}"
    assert first["x-iflow-signature"] == hmac.new(b"sk-iflow", message.encode(),
                                                  "sha256").hexdigest()
    assert abs(int(first["x-iflow-timestamp"]) / 1000 - time.time()) < 60
    assert re.fullmatch(r"session-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", first["session-id"])
    for name in ("session-id", "conversation-id"):
        assert first[name] == second[name]
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", first["traceparent"])
    assert first["traceparent"] != second["traceparent"]
    assert "x-private" not in first and upstream.last.json["model"] == "glm-5"


def test_openai_compatible_entry_is_a_plain_provider(iflow):
    upstream, start = iflow
    server = start({"selectedAuthType": "openai-compatible", "modelName": "my-model"})
    assert post(server, {"messages": MESSAGES}).status == 200
    names = set(upstream.last.headers)
    assert not [name for name in names if "iflow" in name] and "session-id" not in names
    assert upstream.last.headers["user-agent"] != "iFlow-Cli"
    assert upstream.last.json == {"model": "my-model", "messages": MESSAGES}


@pytest.mark.parametrize("flags, environ, config, login, wanted", [
    ({}, {}, "", {"apiKey": "file"}, "file"),
    ({}, {}, "", {"apiKey": "", "searchApiKey": "search"}, "search"),
    ({}, {}, "config", {"apiKey": "file"}, "config"),
    ({}, {"IFLOW_apiKey": "variable"}, "config", {"apiKey": "file"}, "variable"),
    ({}, {"iflow_API_KEY": "variable"}, "", {}, "variable"),
    ({}, {"IFLOW_API_KEY": "variable", "IFLOW2API_API_KEY": "ours"}, "config", {"apiKey": "f"},
     "ours"),
    ({"api_key": "flag"}, {"IFLOW_API_KEY": "variable", "IFLOW2API_API_KEY": "ours"}, "config",
     {"apiKey": "f"}, "flag"),
    ({}, {"IFLOW_API_KEY": ""}, "", {"apiKey": "file"}, "file")])
def test_which_key_stands_above(flags, environ, config, login, wanted):
    loaded = ifl.load_settings({"api_key": config} if config else {}, environ, flags)
    found = ifl.iflow_provider(loaded.settings, loaded.origins, environ, login)
    assert found.api_keys == (wanted,)


@pytest.mark.parametrize("config, environ, login, wanted", [
    ("http://config/v1", {}, "http://file/v1", "http://config/v1"),
    ("http://config/v1", {"IFLOW_baseUrl": "http://variable/v1"}, "", "http://variable/v1"),
    ("", {}, "http://file/v1", "http://file/v1"), ("", {}, "", ifl.IFLOW_BASE_URL)])
def test_which_base_url_stands_above(config, environ, login, wanted):
    loaded = ifl.load_settings({"base_url": config} if config else {}, environ, {})
    found = ifl.iflow_provider(loaded.settings, loaded.origins, environ,
                               {"apiKey": "k", **({"baseUrl": login} if login else {})})
    assert found.base_url == wanted


@pytest.mark.parametrize("content", [
    "", "{", "[]", '{"apiKey": ', "\x00", '{"apiKey": "sk good"}', '{"apiKey": "a\\nb"}',
    '{"apiKey": {}}', '{"apiKey": 5, "baseUrl": []}', None])
def test_a_broken_login_is_named_and_left_alone(iflow_home, config, content):
    path = iflow_home(content or "")
    if content is None:
        path.unlink()
        path.mkdir()
    with contextlib.closing(ifl.Gateway(config=config)) as gateway:
        health = gateway.health()
    assert health["status"] == "degraded" and health["iflow_logged_in"] is False
    assert len(health["problems"]) == (0 if content and content.endswith(("{}}", "[]}")) else 1)
    assert all("settings.json" in each or "iflow" in each for each in health["problems"])
    assert "good" not in json.dumps(health)
    assert content is None or path.read_text() == content


def test_a_login_with_bom_and_line_end_works_and_is_reread(iflow_home, config):
    path = iflow_home("\ufeff" + json.dumps({"apiKey": " sk-one\n"}))
    with contextlib.closing(ifl.Gateway(config=config)) as gateway:
        # half written: the last good stays
        for content, key in ((None, "sk-one"), ('{"apiKey": "sk-t', "sk-one"),
                             ('{"apiKey": "sk-two"}', "sk-two")):
            if content:
                path.write_text(content)
                gateway.reload()
            assert gateway.state.router.providers["iflow"].api_keys == (key,)
        assert gateway.health()["problems"] == []


def test_who_is_not_logged_in_is_told_what_to_run(config, server, iflow_home):
    running = server(gateway=ifl.Gateway(config=config, environ={}), detect_local=False)
    for path in ("/v1/chat/completions", "/v1/messages"):
        answer = post(running, glm(max_tokens=9), path)
        assert answer.status == 403 and answer.headers["x-should-retry"] == "false"
        assert "--upstream" in answer.json["error"]["message"]
    iflow_home({"apiKey": "sk-iflow"})
    flags = {"providers": [provider("http://127.0.0.1:9/v1", "upstream")], "api_key": ""}
    with contextlib.closing(ifl.Gateway(config=config, flags=flags)) as gateway:
        assert list(gateway.state.router.providers) == ["upstream"]


ENABLED = {"type": "enabled"}
THINKS = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.mark.parametrize("model, given, wanted", [
    ("deepseek-v3.2-chat", {}, {"thinking_mode": True, "reasoning": True}),
    ("glm-5", {}, {**THINKS, "enable_thinking": True, "thinking": ENABLED}),
    ("glm-4.7", {}, THINKS), ("kimi-k2.5", {}, {"thinking": ENABLED}),
    ("mimo-v2", {}, {"thinking": ENABLED}), ("kimi-k2-thinking", {}, {"thinking_mode": True}),
    ("some-reasoning-model", {}, {"reasoning": True}), ("qwen3-coder-plus", {}, {}),
    ("qwen3-4b", {"thinking_mode": True, "reasoning": True, "chat_template_kwargs": {}}, {}),
    *((model, off, off) for model, off in (
        ("glm-5", {"thinking": {"type": "disabled"}}), ("glm-5", {"enable_thinking": False}),
        ("glm-4.7", {"chat_template_kwargs": {"enable_thinking": False}}),
        ("deepseek-x", {"reasoning_effort": "none"}),
        ("glm-4.7", {"chat_template_kwargs": {"x": 1}}), ("unknown", {"max_tokens": 10 ** 9}))),
    ("glm-4.7", {"tools": [], "tool_choice": "auto"}, THINKS),
    ("deepseek-v3.2-chat", {"max_tokens": 99999, "thinking_mode": False},
     {"max_tokens": 8192, "thinking_mode": False}),
    ("glm-4.6", {"max_completion_tokens": 32001, "temperature": 0.10},
     {"max_completion_tokens": 32000, "temperature": 0.1, **THINKS})])
def test_tweaks(model, given, wanted):
    before = copy.deepcopy(given)
    assert ifl.adapt_to_iflow(given, model) == wanted
    assert given == before


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("http_status", [200, 400])
@pytest.mark.parametrize("code, wanted", [
    (434, 403), (438, 403), (439, 403), (435, 404), (429, 429), (449, 429), (8211, 429),
    (511, 400), (413, 400), (514, 502), (999, 502)])
def test_business_codes(iflow, code, wanted, http_status, stream):
    upstream, start = iflow
    upstream.plays(*[plain({"status": str(code), "msg": "sorry", "body": None}, http_status)] * 3)
    answer = post(start(), glm(stream))
    error, headers = answer.error, answer.headers
    assert answer.status == (400 if (code, http_status) == (999, 400) else wanted)
    assert "sorry" in error["message"]
    if wanted == 403:
        assert headers["x-should-retry"] == "false" and "test iflow" in error["message"]
    assert headers.get("retry-after") == ("5" if wanted == 429 else None)
    assert wanted != 404 or error["code"] == "model_not_found" and "glm-5" in error["message"]
    assert code not in (511, 413) or error["code"] == "context_length_exceeded"


def test_other_ways_to_say_a_business_code(iflow):
    upstream, start = iflow
    server = start()
    upstream.plays(iflow_reply([{"error_code": 449, "msg": "slow"}]))
    assert post(server, glm(True)).status == 429
    upstream.plays(plain({"status": "511", "msg": "too long"}))
    answer = post(server, glm(max_tokens=10), "/v1/messages")
    assert answer.status == 400 and "prompt is too long" in answer.json["error"]["message"]
    assert "200000" in answer.body.decode()
    upstream.plays(plain({"message": "Not Acceptable"}, 406))
    assert post(server, glm()).status == 403
    assert len(upstream.requests) == 3                   # never retried in a loop


@pytest.mark.parametrize("path, answer, status, has, lacks", [
    ("chat/completions", [chunk("hi"), chunk(finish="stop")], 200, "data: [DONE]", "error"),
    ("chat/completions", [], 502, "error", "[DONE]"),
    ("chat/completions", [chunk("hi"), chunk(finish="network_error"), DONE], 200, "network_error",
     '"error"'),
    ("messages", [chunk("hi"), chunk(finish="network_error"), DONE], 200, "event: error",
     "message_stop"),
    ("chat/completions", completion("whole"), 200, '"content":"whole"', "error")],
    ids=["no [DONE]", "no chunk", "network error", "on Messages", "JSON instead of a stream"])
def test_stream_oddities(iflow, path, answer, status, has, lacks):
    upstream, start = iflow
    upstream.plays(iflow_reply(answer))
    found = post(start(), glm(True, max_tokens=9), "/v1/" + path)
    text = found.body.decode()
    assert found.status == status and has in text.replace('": "', '":"') and lacks not in text


def thought(text, **more):
    return chunk(reasoning_content=text, **more)


CALLS = chunk(tool_calls=[{"index": 0, **CALLED}])
MERGES = [
    # preserved or not, what the model says, its content then, its reasoning then
    (False, [ROLE, thought("think "), thought("more"), chunk("an"), chunk("swer")],
     "think more\n\nanswer", ""),
    (True, [ROLE, thought("think "), thought("more"), chunk("an"), chunk("swer")], "answer",
     "think more"),
    (False, [thought("r")], "r", ""), (True, [thought("r")], "r", "r"),
    (False, [thought("r", content="a")], "r\n\na", ""), (False, [thought("r"), CALLS], "r", ""),
    (True, [thought("r"), CALLS], "r", "r"), (False, [chunk("a")], "a", ""),
    (False, [chunk(reasoning="r", reasoning_content=""), chunk("\n"), chunk("a")], "r\n\n\na", "")]


@pytest.mark.parametrize("preserve, chunks, content, reasoning", MERGES)
def test_preserve_reasoning(iflow, preserve, chunks, content, reasoning):
    upstream, start = iflow
    server = start(preserve_reasoning_content=preserve)
    deltas = [item["choices"][0]["delta"] for item in chunks]
    upstream.plays(iflow_reply([*chunks, chunk(finish="stop"), DONE]))
    found = records_of(post(server, glm(True)).body)
    assert text_of(found) == content
    assert "".join(item["choices"][0]["delta"].get("reasoning_content") or ""
                   for item in found if item != DONE) == reasoning
    heard = "".join(ifl.reasoning_of(delta) for delta in deltas)
    said = "".join(delta.get("content") or "" for delta in deltas)
    upstream.plays(plain(completion(said or None,
                                    **({"reasoning_content": heard} if heard else {}))))
    message = post(server, glm()).json["choices"][0]["message"]
    assert (message["content"], message.get("reasoning_content") or "") == (content, reasoning)


def test_other_providers_keep_their_reasoning_unless_they_say_so(iflow):
    upstream, start = iflow
    server = start(providers=[provider(upstream, "p"), provider(
        upstream, "merged", preserve_reasoning_content=False)])
    for name, content in (("p", "a"), ("merged", "r\n\na")):
        upstream.plays(plain(completion("a", reasoning_content="r")))
        found = post(server, glm(model=name + "/x")).json
        assert found["choices"][0]["message"]["content"] == content


@pytest.mark.parametrize("thinking, answer, wanted", [
    ({}, ("a", "r"), [("text", "a")]), ({}, (None, "only"), [("text", "only")]),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, ("a", "r"),
     [("thinking", "r"), ("text", "a")])])
def test_reasoning_on_messages(iflow, thinking, answer, wanted):
    upstream, start = iflow
    upstream.plays(plain(completion(answer[0], reasoning_content=answer[1])))
    found = post(start(), glm(max_tokens=9000, **thinking), "/v1/messages").json["content"]
    assert [(block["type"], block.get("text") or block.get("thinking"))
            for block in found] == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_dropped_reasoning_comes_back_in_tool_use(iflow, stream):
    upstream, start = iflow
    server = start()
    upstream.plays(thinks(stream))
    post(server, glm(stream))
    for model, wanted in (("glm-4.7", "because"), ("qwen3-coder-plus", None)):
        post(server, {"model": model, "messages": after_call(opening=MESSAGES[0])})
        assert upstream.last.json["messages"][1].get("reasoning_content") == wanted


def test_reasoning_cache_is_bounded():
    cache = ifl.ReasoningCache()
    for number in range(cache.LIMIT + 10):
        cache.keep(str(number), {"text": "x"})
    assert cache.recall("0") == {} and cache.recall(str(cache.LIMIT)) == {"text": "x"}
    cache.keep("big", {"text": "y" * cache.LIMIT_SIZE})
    assert cache.recall("1500") == {} and not cache._kept


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
BLOCK = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}


@pytest.mark.parametrize("path, messages", [
    ("/v1/chat/completions", [{"role": "user", "content": [PICTURE]}]),
    ("/v1/messages", [{"role": "user", "content": [BLOCK]}]),
    ("/v1/messages", [*MESSAGES, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "t1", "name": "f", "input": {}}]}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [BLOCK]}]}])])
def test_images_go_to_the_vision_model(iflow, path, messages):
    upstream, start = iflow
    server = start()
    for said, model in ((messages, "qwen-vl-max"),
                        ([{"role": "user", "content": '"image_url"'}], "glm-5")):
        assert post(server, {**glm(max_tokens=9), "messages": said}, path).status == 200
        assert upstream.last.json["model"] == model
        assert "image_url" in json.dumps(upstream.last.json)


def test_vision_mode_pass_and_other_providers(iflow):
    upstream, start = iflow
    blind = provider(upstream, "blind", profile={"vision": False})
    server = start(vision_mode="pass",
                   providers=[blind, {**blind, "name": "led", "vision_model": "sees"}])
    on_chat, on_messages = ({"max_tokens": 9, "messages": [{"role": "user", "content": [part]}]}
                            for part in (PICTURE, BLOCK))
    for model, wanted in (("iflow/glm-5", "glm-5"), ("blind/m", "m"), ("led/m", "sees")):
        post(server, {"model": model, **on_chat})
        assert upstream.last.json["model"] == wanted
        assert "image_url" in json.dumps(upstream.last.json)
    post(server, {"model": "blind/m", **on_messages}, "/v1/messages")
    assert "image_url" not in upstream.last.body.decode() and b"image" in upstream.last.body


def test_models_and_vision_models(iflow):
    upstream, start = iflow
    server = start()
    for path, wanted in (("/v1/models", list(ifl.IFLOW_MODELS)),
                         ("/v1/vision-models", ["qwen-vl-max"])):
        assert [model["id"] for model in get(server, path).json["data"]] == wanted
    health = get(server, "/health").json
    assert health["iflow_logged_in"] is True and health["status"] == "healthy"
    assert not upstream.requests                         # the list is a table: nobody was asked


@pytest.mark.parametrize("login, raw, wanted", [
    ({}, {}, "glm-5"), ({"modelName": "kimi-k2"}, {}, "kimi-k2"),
    ({"modelName": "kimi-k2"}, {"default_model": "glm-4.6"}, "glm-4.6")])
def test_default_model(iflow, login, raw, wanted):
    upstream, start = iflow
    ask = {"model": "claude-sonnet-4", "max_tokens": 9, "messages": MESSAGES}
    assert post(start(login, **raw), ask, "/v1/messages").status == 200
    assert upstream.last.json["model"] == wanted


@pytest.mark.parametrize("concurrency", [1, 0])
def test_one_request_at_a_time(iflow, concurrency):
    upstream, start = iflow
    server, go = start(api_concurrency=concurrency, keepalive_s=0.05), threading.Event()
    upstream.plays(*[Reply(go, *plain(completion()).steps)] * 2)
    with Client(server).post(glm()) as first:
        upstream.wait()
        with Client(server).post(glm()) as second:
            slots = server.gateway.lanes["iflow"].slots
            until(lambda: slots.waiting if concurrency else len(upstream.requests) == 2)
            assert f'upstream_waiting{{provider="iflow"}} {concurrency}' in ifl.metrics_text(
                server.gateway)
            go.set()
            assert first.answer().status == second.answer().status == 200
    until(lambda: slots.active == 0)


# === 13. Credentials =========================================================

class LoginHost:
    """iFlow's login host and its model API, by way of a FakeUpstream.

    `script`: path -> replies to give first, each a Reply or a function of the Seen.  A refresh
    token works once; the number of the login is in its tokens and its key: A1, R1, sk-key-1.
    """

    def __init__(self, fake) -> None:
        fake.usual = self.reply
        self.fake, self.url = fake, f"http://127.0.0.1:{fake.port}"
        self.script: Dict[str, List[Any]] = {}
        self.valid, self.number, self.good_keys, self.lock = {"R0"}, 0, None, threading.Lock()

    def settings(self):
        return {"iflow_auth_url": self.url + "/oauth", "iflow_token_url": self.url + "/oauth/token",
                "iflow_userinfo_url": self.url + "/userinfo", "base_url": self.url + "/v1"}

    def reply(self, seen) -> Reply:
        path, _, query = seen.path.partition("?")
        with self.lock:
            scripted = self.script.get(path)
            made = scripted.pop(0) if scripted else None
        made = made(seen) if callable(made) else made
        usual = {"/oauth/token": self.token, "/userinfo": self.user,
                 "/v1/chat/completions": self.chat}
        return made or usual[path](urllib.parse.parse_qs(query or seen.body.decode()), seen)

    def token(self, form, seen) -> Reply:
        given = form.get("refresh_token", form.get("code"))[0]
        with self.lock:
            if given not in self.valid | {"good-code"}:
                return plain({"error": "invalid_grant", "error_description": f"bad {given}"}, 400)
            self.valid.discard(given)
            self.number += 1
            self.valid.add(f"R{self.number}")
            return plain({"access_token": f"A{self.number}", "refresh_token": f"R{self.number}",
                          "expires_in": 7 * 86400, "token_type": "bearer", "scope": "all"})

    def user(self, query, seen) -> Reply:
        number = query["accessToken"][0][1:]
        return plain({"success": True, "data": {"apiKey": f"sk-key-{number}", "email": "a@b.c"}})

    def chat(self, form, seen) -> Reply:
        key = seen.headers["authorization"].partition(" ")[2]
        if self.good_keys is not None and key not in self.good_keys:
            return plain({"status": "439", "msg": "expired", "body": None})
        return plain(completion("hi from " + key))

    def count(self, path) -> int:
        return sum(seen.path.partition("?")[0] == path for seen in self.fake.requests)


@pytest.fixture
def home_login(home, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "TERMUX_VERSION", "PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ifl, "OAUTH_PORT", 0)
    monkeypatch.setattr(ifl.Vault, "DERIVE_S", 0.0)
    monkeypatch.setattr(ifl.Vault, "ITERATIONS", (10, 10))
    return home


@pytest.fixture
def host(upstreams):
    return LoginHost(upstreams())


@pytest.fixture
def config_login(home_login, config, host):
    config.change(lambda raw: raw.update(host.settings()))
    return config


@pytest.fixture
def gateways():
    """gateways(config, **environ): a Gateway, closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda config, **environ: stack.enter_context(
            contextlib.closing(ifl.Gateway(config=config, environ=environ)))


@pytest.fixture
def gateway_login(config_login, gateways):
    return gateways(config_login)


def cli_file(home):
    return home / ".iflow" / "settings.json"


def put_login(home, **login):
    """Write the CLI's file: a login that ends within the hour; None takes a field away."""
    cli_file(home).parent.mkdir(exist_ok=True)
    facts = {"apiKey": "sk-key-0", "oauth_access_token": "A0", "oauth_refresh_token": "R0",
             "foreign": {"kept": [1]},
             "oauth_expires_at": ifl.format_time(time.time() + 3600), **login}
    cli_file(home).write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))


def login_of(home):
    return json.loads(cli_file(home).read_text())


def tokens_of(home):
    """Key and refresh token in the CLI's file."""
    return login_of(home)["apiKey"], login_of(home)["oauth_refresh_token"]


def visit(url, address="127.0.0.1"):
    """What a browser shows that follows `url` on the loopback: (status, text)."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address, parts.port, timeout=WAIT_S)
    connection.request("GET", parts.path + "?" + parts.query)
    answer = connection.getresponse()
    with contextlib.closing(connection):
        return answer.status, answer.read().decode()


def callback_of(url, **facts):
    """The address a browser ends on after logging in at `url`."""
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
    facts = {"code": "good-code", "state": query["state"][0], **facts}
    given = {name: value for name, value in facts.items() if value is not None}
    return query["redirect"][0] + "?" + urllib.parse.urlencode(given)


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        return True
    except OSError:
        return False


def is_listening(url):
    try:
        socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(url).port), 1).close()
        return True
    except OSError:
        return False


# --- files ----------------------------------------------------------------------

def text_of_login(path):
    return pathlib.Path(path).read_text(encoding="utf-8")


def test_a_bind_mounted_login_is_written_in_place_after_its_backup(
        home_login, config_login, monkeypatch):
    put_login(home_login)
    before = text_of_login(cli_file(home_login))
    refuse_to_replace(monkeypatch, "settings.json")
    ifl.LoginFile("", config_login).update({"apiKey": "sk-new"})
    assert login_of(home_login)["apiKey"] == "sk-new"
    assert text_of_login(cli_file(home_login).parent / "settings.json.bak") == before


@posix
def test_kill_9_in_the_middle_of_a_write_leaves_a_readable_file(home_login):
    """A child writes the login and config.json over and over and is killed: both are whole."""
    script = textwrap.dedent("""
        import sys; sys.path.insert(0, sys.argv[1])
        import iflow2api as ifl
        config = ifl.ConfigFile(sys.argv[2])
        login = ifl.LoginFile("", config)
        number = 0
        while True:
            number += 1
            with login.held():
                login.update({"apiKey": "k" * 200_000, "number": number})
            config.change(lambda raw: raw.update(api_key="s" * 20_000, number=number))
            print(number, flush=True)
        """)
    put_login(home_login)
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", script, os.path.dirname(byte_code()),
                               str(home_login / "c")], stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            child.kill()
        assert login_of(home_login)["number"] and login_of(home_login)["foreign"] == {"kept": [1]}
        assert ifl.ConfigFile(str(home_login / "c")).read()["api_key"] == "s" * 20_000
        assert os.stat(cli_file(home_login)).st_mode & 0o777 == 0o600


# --- logging in -----------------------------------------------------------------

def test_a_login_through_the_browser(home_login, host, gateway_login):
    put_login(home_login, searchApiKey="web")
    found = gateway_login.logins.start()
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(found["url"]).query)
    assert found["state"] == "waiting" and query["client_id"] == ["10009311001"]
    assert query["loginMethod"] == ["phone"]
    assert re.fullmatch(r"http://localhost:\d+/oauth2callback", query["redirect"][0])
    callback = callback_of(found["url"])
    status, page = visit(callback)
    assert status == 200 and "a@b.c" in page and "sk-key" not in page
    assert gateway_login.logins.flow.ended.wait(WAIT_S)
    login = login_of(home_login)
    assert tokens_of(home_login) == ("sk-key-1", "R1")
    assert login["foreign"] == {"kept": [1]} and login["searchApiKey"] == "web"
    assert abs(ifl.parse_time(login["oauth_expires_at"]) - time.time() - 7 * 86400) < 60
    assert gateway_login.state.router.providers["iflow"].api_keys == ("sk-key-1",)     # at once
    until(lambda: not is_listening(callback), what="the listener's end")
    seen = host.fake.requests[0]
    form = urllib.parse.parse_qs(seen.body.decode())
    assert form["redirect_uri"] == query["redirect"] and form["client_secret"]
    assert seen.headers["authorization"].startswith("Basic ")
    assert seen.headers["content-type"] == "application/x-www-form-urlencoded"


@pytest.mark.parametrize("taken", ["127.0.0.1", "::1", ""])
def test_the_usual_port(home_login, gateway_login, taken):
    """The code must not go to another program that has the port on the other loopback address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    family = socket.AF_INET6 if ":" in taken else socket.AF_INET
    with contextlib.ExitStack() as stack:
        try:
            taken and stack.enter_context(socket.create_server((taken, port), family=family))
        except OSError:
            pytest.skip("no IPv6 here")
        callback = callback_of(gateway_login.logins.start(port=port)["url"])
        assert (urllib.parse.urlsplit(callback).port != port) is bool(taken)
        assert visit(callback)[0] == 200


@pytest.mark.parametrize("facts, word", [
    ({"state": "wrong"}, "another login"), ({"state": None}, "another login"),
    ({"code": None}, "no answer to a login"),
    ({"code": None, "error": "access_denied", "state": "x"}, "another login")])
def test_strangers_change_nothing(home_login, gateway_login, facts, word):
    url = gateway_login.logins.start()["url"]
    address = "::1" if has_ipv6() and not facts.get("state") else "127.0.0.1"
    status, page = visit(callback_of(url, **facts), address)
    assert status == 400 and word in page and gateway_login.logins.status()["state"] == "waiting"
    assert visit(callback_of(url).replace("/oauth2callback", "/favicon.ico"))[0] == 404
    assert not cli_file(home_login).exists()
    assert visit(callback_of(url))[0] == 200


def test_a_callback_twice_exchanges_once(home_login, host, gateway_login):
    url, flow, answers = gateway_login.logins.start()["url"], gateway_login.logins.flow, []
    query = urllib.parse.urlsplit(callback_of(url)).query
    threads = [threading.Thread(target=lambda: answers.append(flow.visit(query))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join(WAIT_S) for thread in threads]
    assert [ok for ok, _ in answers] == [True] * 4 and host.count("/oauth/token") == 1


def page_of_html(status):
    return plain(b"<html>sorry</html>", status, content_type="text/html")


#: what fails -> path at the host, its reply, what the user is told
HOST_FAILURES = {
    "400": ("/oauth/token", plain({"error": "invalid_grant"}, 400), "used up or too old"),
    "other 400": ("/oauth/token", plain({"error": "invalid_client"}, 400), "invalid_client"),
    "html": ("/oauth/token", page_of_html(200), "an HTML page"),
    "502": ("/oauth/token", page_of_html(502), "502 with an HTML page"),
    "garbage": ("/oauth/token", plain([1]), "instead of JSON"),
    "200 with failure": ("/oauth/token", plain({"success": False, "code": "500",
                                                "message": "太多"}), "太多"),
    "no token": ("/oauth/token", plain({"scope": "x"}), "no tokens"),
    "slow": ("/oauth/token", Reply(HOLD), "stays as it is"),
    "no apiKey": ("/userinfo", plain({"success": True, "data": {"email": "x"}}), "no API key"),
    "bad apiKey": ("/userinfo", plain({"success": True, "data": {"apiKey": "a\nb"}}),
                   "no API key"),
    "info fails": ("/userinfo", plain({"success": False, "message": "nope"}), "nope"),
    "refused by the user": ("", None, "&lt;b&gt;no"), "down": ("", None, "connection refused")}


@pytest.mark.parametrize("name", HOST_FAILURES)
def test_failures_of_a_login_leave_what_is_stored(home_login, host, gateway_login, name,
                                                  monkeypatch):
    monkeypatch.setattr(ifl, "OAUTH_SILENCE_S", 0.2)
    put_login(home_login)
    before, (path, reply, word) = cli_file(home_login).read_bytes(), HOST_FAILURES[name]
    host.script[path] = [reply]
    facts = {"code": None, "error": "access_denied", "error_description": "<b>no</b>"}
    callback = callback_of(gateway_login.logins.start()["url"],
                           **(facts if name.startswith("refused") else {}))
    if name == "down":
        host.fake.close()
    status, page = visit(callback)
    assert status == 400 and word in page and "good-code" not in page and "Traceback" not in page
    assert gateway_login.logins.flow.ended.wait(WAIT_S)
    assert gateway_login.logins.status()["state"] == "failed"
    assert cli_file(home_login).read_bytes() == before
    until(lambda: not is_listening(callback))


RUBBISH = ["", " ", "short", "hello world", "hello, world", "good-code!", "a" * 513,
           "\u4f60\u597d\u4f60\u597d\u4f60\u597d\u4f60\u597d", "?", "code=", "http://[",
           "localhost:1/oauth2callback", "localhost/oauth2callback",
           "http://localhost:1/oauth2callback", "https://iflow.cn/oauth?state=STATE",
           "http://x/?code=good-code&state=STATE",
           "http://localhost:1/other?code=good-code&state=STATE",
           "http://localhost:1/oauth2callback?code=a b&state=STATE",
           "http://localhost.evil/oauth2callback?code=good-code&state=STATE",
           "https://iflow.cn/oauth2callback?code=good-code&state=STATE", "error=",
           "python iflow2api.py login --paste"]


def test_pasting(home_login, host, gateway_login):
    found = gateway_login.logins.start(paste=True)
    flow, state = gateway_login.logins.flow, urllib.parse.parse_qs(found["url"])["state"][0]
    ours = "http://localhost:1/oauth2callback"
    said_no = ours + "?error=access_denied&error_description=you+said+no"
    refused = "^iFlow did not log you in: you said no; nothing was changed$"
    no_login = "^that is neither the address .* it looks like http://localhost:.*$"
    for text, said in [*((rubbish, no_login) for rubbish in RUBBISH),
                       (said_no + "&state=STATE", refused), (said_no, refused),
                       (ours + "?code=good-code&state=wrong", "another login")]:
        with pytest.raises(ifl.LoginFailed, match=said):
            gateway_login.logins.paste(text.replace("STATE", state))
        assert flow.state == "waiting", text
    assert not host.fake.requests                          # nothing was sent anywhere
    with pytest.raises(ifl.LoginFailed, match="used up"):
        gateway_login.logins.paste("not-the-code")                              # may be typed again
    assert gateway_login.logins.paste("  " + callback_of(found["url"]) + "\n")["state"] == "done"
    assert login_of(home_login)["apiKey"] == "sk-key-1" and flow.ended.is_set()


@pytest.mark.parametrize("text", [
    "good-code", "code=good-code", "QUERY", "?QUERY", "localhost:5/oauth2callback?QUERY#_=_",
    "http://127.0.0.1:5/oauth2callback?QUERY", "http://[::1]:5/oauth2callback/?QUERY"])
def test_pasting_the_code_alone_or_the_query_or_an_address_without_scheme(gateway_login, text):
    found = gateway_login.logins.start(paste=True)
    query = urllib.parse.urlsplit(callback_of(found["url"])).query
    assert gateway_login.logins.paste(text.replace("QUERY", query))["state"] == "done"


def test_a_login_that_nobody_finishes_or_that_another_follows_ends(home_login, gateway_login):
    first = callback_of(gateway_login.logins.start()["url"])
    flow = gateway_login.logins.flow
    second = callback_of(gateway_login.logins.start(timeout_s=0.05)["url"])
    assert flow.ended.is_set() and not is_listening(first)
    assert gateway_login.logins.flow.ended.wait(WAIT_S)
    assert "nobody logged in" in gateway_login.logins.status()["message"]
    until(lambda: not is_listening(second))
    assert not cli_file(home_login).exists()


@pytest.mark.parametrize("trouble, said", [
    ("broken", "line 1, column 2.*nothing was written"), ("folder", "is a folder"),
    ("read-only", "read-only"), ("no folder", "can't be written"), ("no home", "set HOME")])
def test_a_login_that_could_not_be_kept_is_not_begun(home_login, gateway_login, monkeypatch,
                                                     trouble, said):
    path = cli_file(home_login)
    if trouble == "no folder":
        path.parent.write_text("a file where the folder should be")
    elif trouble == "no home":
        monkeypatch.setattr(ifl.os.path, "expanduser", lambda path: path)
    else:
        put_login(home_login)
    if trouble == "read-only":
        monkeypatch.setattr(ifl.os, "access", lambda path, mode: "settings.json" not in str(path))
    elif trouble == "folder":
        path.unlink()
        path.mkdir()
    elif trouble == "broken":
        path.write_text("{broken")
    with pytest.raises(ifl.LoginFailed, match=said):
        gateway_login.logins.start()
    assert trouble != "broken" or path.read_text() == "{broken"


def test_a_login_does_not_take_the_key_to_another_service(home_login, gateway_login):
    put_login(home_login, selectedAuthType="openai-compatible", baseUrl="http://elsewhere/v1",
              apiKey="theirs")
    visit(callback_of(gateway_login.logins.start()["url"]))
    gateway_login.logins.flow.ended.wait(WAIT_S)
    assert login_of(home_login)["selectedAuthType"] == "oauth-iflow"
    assert "baseUrl" not in login_of(home_login)


# --- the command ----------------------------------------------------------------

@pytest.fixture
def run_login(config_login, monkeypatch, capsys):
    """run_login(*args, typed=…, browse=…): exit status, stdout and stderr of `login ARGS`.

    Once the address is printed a browser follows it, and `typed` comes from standard input, where
    URL stands for the address that the browser ends on; None: its end.
    """
    def call(*args, typed="", browse=False):
        urls, started, result, real = [], threading.Event(), [], ifl.Logins.start
        reader, writer = os.pipe()

        def start(self, *rest, **named):
            found = real(self, *rest, **named)
            urls.append(found["url"])
            started.set()
            return found

        monkeypatch.setattr(ifl.Logins, "start", start)
        monkeypatch.setattr(sys, "stdin", os.fdopen(reader))
        thread = threading.Thread(target=lambda: result.append(ifl.main(["login", *args])))
        thread.start()
        assert started.wait(WAIT_S)
        if browse:
            visit(callback_of(urls[0]))
        if typed is None:
            os.close(writer)
        else:
            os.write(writer, typed.replace("URL", callback_of(urls[0])).encode())
        thread.join(WAIT_S)
        monkeypatch.setattr(ifl.Logins, "start", real)
        return (result[0], *capsys.readouterr())
    return call


def test_login_in_the_browser(home_login, run_login, config_login, monkeypatch):
    opened = []
    config_login.change(lambda raw: raw.update(api_key="sk-other"))
    monkeypatch.setattr(ifl, "open_browser", lambda url, environ: opened.append(url) or True)
    status, out, err = run_login(browse=True)
    assert status == 0 and out.strip() == opened[0] and "logged in to iFlow as a@b.c" in err
    assert "settings.json" in err and "sk-key" not in out + err and "A1" not in err
    assert "warning: api_key in config.json is set" in err


@pytest.mark.skipif(os.name == "nt", reason="its browsers are found in another way")
@pytest.mark.parametrize("args, said, unsaid", [([], "--paste", "x-x"),
                                                (["--no-browser"], "", "no browser")])
def test_login_without_a_browser(home_login, run_login, monkeypatch, args, said, unsaid):
    monkeypatch.setattr(ifl.sys, "platform", "linux")
    status, _, err = run_login(*args, browse=True)
    assert status == 0 and said in err and unsaid not in err


@pytest.mark.parametrize("down, typed, status, said, unsaid", [
    (False, "what?\nURL\n", 0, ["neither the address", "paste it again"], "Traceback"),
    (True, "URL\n", 1, ["connection refused"], "paste it again"),
    (False, None, 1, ["the input ended"], "Traceback")])
def test_login_by_paste(home_login, host, run_login, down, typed, status, said, unsaid):
    if down:
        host.fake.close()
    found, _, err = run_login("--paste", typed=typed)
    assert found == status and unsaid not in err
    assert [err.count(part) for part in said] == [1] * len(said)
    assert cli_file(home_login).exists() is (status == 0)


def test_login_that_times_out(home_login, config_login, cli):
    status, _, err = cli("login", "--no-browser", "--timeout", "0.05")
    assert status == 1 and "nobody logged in within 0.05 s" in err


def test_login_to_an_account_and_turns_among_all(home_login, run_login, config_login, gateways,
                                                 cli):
    put_login(home_login)
    assert run_login("--no-browser", "--account", "work", browse=True)[0] == 0
    assert login_of(home_login)["apiKey"] == "sk-key-0"
    stored = json.loads(text_of_login(config_login.path))["accounts"]["work"]
    assert all(stored[name].startswith("enc:v1:")
               for name in ("apiKey", "oauth_access_token", "oauth_refresh_token"))
    found = gateways(config_login).state.router.providers["iflow"]
    assert found.api_keys == ("sk-key-0", "sk-key-1") and found.key_concurrency == 1
    status, out, _ = cli("config", "list")
    assert status == 0 and "sk-key-1" not in out
    status, _, err = cli("logout", "--account", "wrok")
    assert status == 2 and "did you mean work" in err
    assert cli("logout", "--account", "work")[0] == 0
    assert config_login.read()["accounts"] == {} and login_of(home_login)["apiKey"] == "sk-key-0"


def test_which_accounts_are_used(home_login, config_login, gateways):
    config_login.change(lambda raw: raw.update(accounts={"work": {"apiKey": "sk-work"}, "odd": 5,
                                                         "bad": {"apiKey": "a b"}}))

    def keys(**environ):
        return gateways(config_login, **environ).state.router.providers["iflow"].api_keys

    assert keys() == ("sk-work",) and keys(IFLOW_API_KEY="sk-env") == ("sk-env",)
    put_login(home_login, selectedAuthType="openai-compatible", baseUrl="http://elsewhere/v1")
    assert keys() == ("sk-key-0",)


def test_login_with_a_key(home_login, config_login, cli, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-a-key-of-mine-1234")
    said = [cli("login", "--api-key", "$MY_KEY"),
            cli("login", "--api-key", "$MY_KEY", "--account", "two")]
    assert config_login.read()["api_key"] == "sk-a-key-of-mine-1234"
    assert "sk-a-key-of" not in text_of_login(config_login.path)
    assert config_login.read()["accounts"] == {"two": {"apiKey": "sk-a-key-of-mine-1234"}}
    monkeypatch.setenv("MY_KEY", "two words")
    said += [cli("login", "--api-key", "$MY_KEY"), cli("login", "--account", "a/b", "--no-browser")]
    assert [status for status, _, _ in said] == [0, 0, 2, 1]
    assert "sk-a-key-of" not in "".join(out + err for _, out, err in said)


def test_logout_keeps_what_is_not_ours(home_login, config_login, cli):
    put_login(home_login, baseUrl="http://b/v1", modelName="m", searchApiKey="s",
              iflow2api_key_due=True)
    config_login.change(lambda raw: raw.update(api_key="sk-other"))
    assert cli("logout")[0] == 0
    assert login_of(home_login) == {"foreign": {"kept": [1]}, "baseUrl": "http://b/v1",
                                    "modelName": "m"}
    assert "api_key" not in config_login.read()
    status, _, err = cli("logout")
    assert status == 0 and "no login to remove" in err
    put_login(home_login, selectedAuthType="openai-compatible", apiKey="theirs")
    assert cli("logout")[0] == 0 and login_of(home_login)["apiKey"] == "theirs"
    assert "oauth_refresh_token" not in login_of(home_login)
    cli_file(home_login).write_text("{")
    assert cli("logout")[0] == 1 and cli_file(home_login).read_text() == "{"


@posix
def test_ctrl_c_leaves_nothing_behind(home_login, config_login):
    child = subprocess.Popen([sys.executable, "-X", "dev", byte_code(), "login", "--no-browser"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             stdin=subprocess.DEVNULL, text=True)
    callback = callback_of(child.stdout.readline().strip())
    assert is_listening(callback)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=WAIT_S)
    assert child.returncode == 130 and "login cancelled; nothing was changed" in err
    assert "Traceback" not in err and not is_listening(callback)
    assert not cli_file(home_login).exists()


# --- the browser ----------------------------------------------------------------

@pytest.mark.parametrize("environ, system, row", [
    ({"TERMUX_VERSION": "1"}, "linux", "termux"),
    ({"PREFIX": "/data/data/com.termux/files/usr"}, "android", "termux"),
    ({"DISPLAY": ":0", "WSL_DISTRO_NAME": "U"}, "linux", "wsl"),
    ({"WAYLAND_DISPLAY": "w"}, "freebsd14", "desktop"), ({}, "linux", "headless"),
    ({}, "darwin", "desktop"), ({}, "win32", "desktop")])
def test_which_browser(environ, system, row):
    assert ifl.browser_platform(environ, system) == row
    tried = []
    assert ifl.open_browser("http://u", environ, lambda command: tried.append(command) or False,
                            system) is False
    assert tried == [(*command, "http://u") for command in ifl.BROWSERS[row]]
    assert not tried or ifl.open_browser("http://u", environ, lambda command: True, system) is True


@pytest.mark.parametrize("command, works", [
    (("/nonexistent/opener",), False), ((sys.executable, "-c", "0"), True),
    ((sys.executable, "-c", "raise SystemExit(3)"), False)])
def test_running_an_opener(command, works):
    assert ifl.run_opener((*command, "http://u")) is works


# --- the admin API ----------------------------------------------------------------

@pytest.fixture
def server_login(gateway_login, server):
    gateway_login.keep_setting("admin_password", PASSWORD_HASH)
    return server(gateway=gateway_login)


def call_login(server, action, body=None, **headers):
    """GET, or POST where there is a body: status and JSON."""
    headers = {"Host": server.url[7:], "Authorization": BASIC, **_spelled(headers)}
    with Client(server) as client:
        answer = client.request("GET" if body is None else "POST", "/admin/api/oauth/" + action,
                                b"" if body is None else body, headers=headers).answer()
    return answer.status, answer.json


def test_a_login_by_the_admin_api(home_login, server_login):
    call = functools.partial(call_login, server_login)
    assert call("status") == (200, {"state": "idle", "message": ""})
    status, found = call("start", {"paste": True})
    assert status == 200 and found["state"] == "waiting"
    status, refused = call("paste", {"text": "what is this"})
    assert status == 403 and "neither the address" in refused["error"]["message"]
    assert call("paste", {"text": 5})[0] == 400 and call("status", {})[0] == 405
    assert call("paste", {"text": callback_of(found["url"])})[1]["state"] == "done"
    assert login_of(home_login)["apiKey"] == "sk-key-1"


@pytest.mark.parametrize("headers, status", [
    ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Sec_Fetch_Site": "cross-site"}, 403), ({"Authorization": "Bearer sk-client"}, 401)])
def test_no_foreign_page_and_no_client_may_log_in(gateway_login, server_login, headers, status):
    """A client's key is for models, not for accounts."""
    allowed = ["*", "https://evil.example", "null"]
    gateway_login.change_config(lambda raw: raw.update(allowed_origins=allowed,
                                                       custom_api_key="sk-client"))
    assert call_login(server_login, "start", {}, **headers)[0] == status
    assert gateway_login.logins.flow is None
    assert call_login(server_login, "status", **headers)[0] == status
    assert call_login(server_login, "status", Origin=server_login.url,
                      Sec_Fetch_Site="same-origin")[0] == 200


# --- refreshing -----------------------------------------------------------------

@pytest.fixture
def refresher(gateway_login):
    """The gateway's Refresher by clocks that are cranked by hand."""
    made = gateway_login.logins.refresher
    made._clock = made._oauth._clock = Clock()
    made._monotonic = Clock()
    made._clock.now = time.time()
    return made


def test_a_login_that_ends_soon_is_refreshed(home_login, host, gateway_login, refresher):
    put_login(home_login, api_key_expires_at="2020-01-01T00:00:00.000Z")
    gateway_login.reload()
    assert refresher.look() == refresher.LOOK_S
    login = login_of(home_login)
    assert tokens_of(home_login) == ("sk-key-1", "R1") and login["foreign"] == {"kept": [1]}
    assert "api_key_expires_at" not in login and ifl.KEY_DUE not in login
    assert gateway_login.state.router.providers["iflow"].api_keys == ("sk-key-1",)
    refresher._monotonic.now += 3600
    refresher.look()
    assert host.count("/oauth/token") == 1
    report = gateway_login.health()["logins"]["default"]
    assert report["refresh_ok"] is True and report["renewable"] and not report["ended"]
    assert report["expires_at"].endswith("Z")
    assert 'iflow2api_login_refresh_ok{account="default"} 1' in ifl.metrics_text(gateway_login)
    assert not re.search(r'"R1"|sk-key', json.dumps(gateway_login.health()))


@pytest.mark.parametrize("login", [
    {"oauth_refresh_token": None}, {"oauth_refresh_token": 5}, {"oauth_expires_at": None},
    {"oauth_expires_at": "rubbish"}, {"oauth_expires_at": "2199-01-01T00:00:00Z"}])
def test_what_is_not_refreshed(home_login, host, refresher, login):
    put_login(home_login, **login)
    refresher.look()
    assert not host.fake.requests


@pytest.mark.parametrize("value", ["2027-01-02T03:04:05Z", "2027-01-02T03:04:05.000Z",
                                   "2027-01-02T11:04:05+08:00", 1798859045, 1798859045000])
def test_times(value):
    assert ifl.format_time(ifl.parse_time(value)) == "2027-01-02T03:04:05Z"


@pytest.mark.parametrize("value",
                         [1e30, -1e30, float("inf"), float("nan"), 10 ** 400, True, None, []],
                         ids=lambda value: str(value)[:9])
def test_a_time_that_no_calendar_has_is_none(home_login, host, gateway_login, refresher, value):
    put_login(home_login, oauth_expires_at=value, api_key_expires_at=value)
    gateway_login.reload()
    assert gateway_login.health()["logins"]["default"]["expires_at"] is None
    assert ifl.metrics_text(gateway_login)
    put_login(home_login)
    tokens = {"access_token": "A1", "refresh_token": "R1", "expires_in": value}
    host.script["/oauth/token"] = [plain(json.dumps(tokens).encode())]
    refresher.look()
    assert tokens_of(home_login) == ("sk-key-1", "R1")


def test_an_overloaded_host_is_asked_again_later_and_nothing_is_lost(
        home_login, host, gateway_login, refresher, caplog):
    put_login(home_login)
    before, waits = cli_file(home_login).read_bytes(), []
    overloaded = plain({"success": False, "code": "500", "message": "太多"})
    host.script["/oauth/token"] = [overloaded] * 6
    for _ in range(6):
        waits.append(refresher.look())
        count = host.count("/oauth/token")
        refresher.look()
        assert host.count("/oauth/token") == count            # not before its time
        refresher._monotonic.now += waits[-1]
    assert waits == [30, 60, 120, 240, 300, 900] and cli_file(home_login).read_bytes() == before
    gateway_login.reload()
    assert gateway_login.health()["status"] == "healthy"
    assert gateway_login.health()["logins"]["default"]["refresh_ok"] is False
    refresher.look()
    assert login_of(home_login)["apiKey"] == "sk-key-1" and "R0" not in caplog.text


def test_a_dead_refresh_token_means_one_line_and_degraded_health(
        home_login, host, gateway_login, refresher, caplog):
    put_login(home_login, oauth_refresh_token="dead-refresh-token")
    gateway_login.reload()
    for _ in range(4):
        refresher.look()
        refresher._monotonic.now += 3600
    assert host.count("/oauth/token") == 1 and caplog.text.count("has ended") == 1
    assert "iflow2api.py login" in caplog.text and "dead-refresh-token" not in caplog.text
    health = gateway_login.health()
    assert health["status"] == "degraded" and health["logins"]["default"]["ended"]
    assert login_of(home_login)["apiKey"] == "sk-key-0"             # the key may work on
    put_login(home_login)                                           # somebody logged in again
    gateway_login.reload()
    refresher.look()
    assert gateway_login.health()["status"] == "healthy"
    assert login_of(home_login)["apiKey"] == "sk-key-1"


@pytest.mark.parametrize("now", [0.0, 4e9])
def test_a_wrong_clock_logs_nobody_out(home_login, gateway_login, refresher, now):
    put_login(home_login)
    for at in (now, time.time()):
        refresher._clock.now = at
        gateway_login.reload()
        refresher.look()
        health = gateway_login.health()
        assert health["iflow_logged_in"] and health["status"] == "healthy"
        refresher._monotonic.now += 3600
    assert login_of(home_login)["apiKey"] in ("sk-key-1", "sk-key-2")


def test_new_tokens_are_written_before_the_key_is_asked_for_which_may_wait(home_login, host,
                                                                           refresher):
    seen = []
    host.script["/userinfo"] = [lambda request: seen.append(login_of(home_login))
                                or page_of_html(502)]
    put_login(home_login)
    assert refresher.look() == 30 and tokens_of(home_login) == ("sk-key-0", "R1")
    assert seen[0]["oauth_refresh_token"] == "R1" and seen[0][ifl.KEY_DUE] is True
    refresher._monotonic.now += 30
    refresher.look()
    assert tokens_of(home_login) == ("sk-key-1", "R1") and host.count("/oauth/token") == 1


def test_tokens_that_could_not_be_written_are_tried_again_every_30_s(
        home_login, host, refresher, monkeypatch):
    def full(path, data, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    put_login(home_login)
    with monkeypatch.context() as patch:
        patch.setattr(ifl, "write_file", full)
        for _ in range(4):
            assert refresher.look() == 30 and tokens_of(home_login) == ("sk-key-0", "R0")
            refresher._monotonic.now += 30
    refresher.look()
    assert tokens_of(home_login) == ("sk-key-1", "R1") and host.count("/oauth/token") == 1


@posix
@pytest.mark.parametrize("account", ["default", "work"])
@pytest.mark.parametrize("used", ["R-spent", "another"])
def test_tokens_that_a_killed_older_version_left_are_used_once(
        home_login, host, config_login, gateways, account, used):
    """It wrote new tokens into a file of their own first; the refresh token was spent by then.

    They do not replace a newer login.
    """
    login = {"apiKey": "sk-work", "oauth_refresh_token": "R-spent",
             "oauth_expires_at": ifl.format_time(time.time())}
    put_login(home_login, **login)
    config_login.change(lambda raw: raw.update(accounts={"work": login}))
    file = ifl.LoginFile("" if account == "default" else account, config_login)
    tokens = {"oauth_access_token": "A9", "oauth_refresh_token": "left-by-it", ifl.KEY_DUE: True}
    left = {"accounts": {account: tokens}, "used": ifl.sha256(used).hex()}
    if account == "work":
        left = config_login._encrypted_if_possible(left)
        assert "left-by-it" not in json.dumps(left)
    path = pathlib.Path(file._pending_path)
    for rubbish in (b"{", b"[]", b'{"accounts": 5}',
                    b'{"accounts": {"default": {"oauth_refresh_token": 5}}, "used": "x"}'):
        path.write_bytes(rubbish)
        assert file.pending() == ({}, "")
    path.write_text(json.dumps(left))
    host.valid.add("R-spent")
    gateways(config_login).logins.refresher._refresh(file, None)
    is_used = used == "R-spent"
    assert file.read()["oauth_refresh_token"] == ("left-by-it" if is_used else "R1")
    assert file.read()["apiKey"] == ("sk-key-9" if is_used else "sk-key-1")
    assert host.count("/oauth/token") == (not is_used) and not path.exists()


def test_a_file_that_can_not_be_written_costs_no_token(home_login, host, refresher, monkeypatch):
    put_login(home_login)
    monkeypatch.setattr(ifl.os, "access", lambda path, mode: "settings.json" not in str(path))
    refresher.look()
    assert not host.fake.requests
    assert refresher.state("default").message.endswith("the login can't be kept")


def test_two_threads_use_a_refresh_token_once(home_login, host, gateway_login, refresher):
    put_login(home_login)
    gateway_login.reload()
    found = []
    threads = [threading.Thread(target=lambda: found.append(
        refresher.renew("default", "sk-key-0"))) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join(WAIT_S) for thread in threads]
    assert found == ["sk-key-1"] * 8 and host.count("/oauth/token") == 1


def test_who_asks_while_another_refreshes_gets_the_new_key(home_login, host, refresher,
                                                           monkeypatch):
    """It had read the file before the other wrote it, and the host may not be asked again so soon.
    """
    put_login(home_login)
    real, first = ifl.LoginFile.read, []

    def read(file):
        login = real(file)
        if not first:
            first.append(1)
            assert refresher.renew("default", "sk-key-0") == "sk-key-1"
        return login

    monkeypatch.setattr(ifl.LoginFile, "read", read)
    assert refresher.renew("default", "sk-key-0") == "sk-key-1"
    assert host.count("/oauth/token") == 1


def test_two_processes_use_a_refresh_token_once(home_login, host, config_login):
    put_login(home_login)
    script = textwrap.dedent("""
        import sys; sys.path.insert(0, sys.argv[1])
        import iflow2api as ifl
        gateway = ifl.Gateway(config=ifl.ConfigFile(sys.argv[2]), environ={})
        print("ready", flush=True)
        sys.stdin.readline()
        gateway.logins.refresher.look()
        key = gateway.state.router.providers["iflow"].api_keys[0]
        print(key, gateway.health()["status"], flush=True)
        """)
    children = [subprocess.Popen([sys.executable, "-c", script, os.path.dirname(byte_code()),
                                  config_login.folder], text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * 2
    [(child.stdin.write("go\n"), child.stdin.flush()) for child in children]
    said = [child.communicate(timeout=WAIT_S)[0] for child in children]
    assert host.count("/oauth/token") == 1 and tokens_of(home_login)[1] == "R1"
    assert "sk-key-1 healthy\n" in said
    assert set(said) <= {"sk-key-1 healthy\n", "sk-key-0 healthy\n"}


def test_an_account_of_ours_is_refreshed_in_config_json(home_login, host, config_login, gateways):
    host.valid.add("R-work")
    config_login.change(lambda raw: raw.update(accounts={"work": {
        "apiKey": "sk-work", "oauth_refresh_token": "R-work",
        "oauth_expires_at": ifl.format_time(time.time()), "email": "e"}}))
    gateway = gateways(config_login)
    gateway.logins.refresher.look()
    work = config_login.read()["accounts"]["work"]
    assert (work["apiKey"], work["email"]) == ("sk-key-1", "e")
    assert gateway.state.router.providers["iflow"].api_keys == ("sk-key-1",)
    assert "sk-key-1" not in text_of_login(config_login.path)


def test_the_refresh_thread_starts_and_ends(home_login, gateway_login):
    put_login(home_login)
    gateway_login.watch_files()
    until(lambda: login_of(home_login)["apiKey"] == "sk-key-1", what="a refresh")
    gateway_login.close()
    assert not gateway_login.logins.refresher._thread.is_alive()


# --- a refused key ----------------------------------------------------------------

def ask_login(gateway):
    body = chat(model="iflow/glm-4.6")
    sink = ifl.Collect()
    gateway.answer(ifl.Call(ifl.CHAT, body, json.dumps(body), {}, "req_1"), sink)
    return json.loads(sink.data)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("answer", [
    None, plain({"error": {"message": "no"}}, 401), plain({"status": "434", "msg": "invalid"})])
def test_a_refused_key_is_refreshed_and_the_request_made_once_more(home_login, host, gateway_login,
                                                                   answer):
    put_login(home_login, oauth_expires_at="2199-01-01T00:00:00Z")
    gateway_login.reload()
    host.good_keys = {"sk-key-1"}
    host.script["/v1/chat/completions"] = [answer] if answer else []
    assert ask_login(gateway_login) == ask_login(gateway_login) == "hi from sk-key-1"
    assert host.count("/oauth/token") == 1 and host.count("/v1/chat/completions") == 3


@pytest.mark.parametrize("login, answer, refreshed, asked", [
    ({}, None, 1, 2), ({"oauth_refresh_token": None}, None, 0, 1),
    ({}, plain({"status": "438", "msg": "blocked"}), 0, 1)],
    ids=["stays refused", "no refresh token", "blocked"])
def test_a_key_that_stays_refused_is_no_loop(home_login, host, gateway_login, login, answer,
                                             refreshed, asked):
    put_login(home_login, **login)
    gateway_login.reload()
    host.good_keys = set()
    host.script["/v1/chat/completions"] = [answer] if answer else []
    with pytest.raises(ifl.UpstreamRefused) as refused:
        ask_login(gateway_login)
    assert refused.value.status == 403 and "python iflow2api.py" in refused.value.message
    assert host.count("/v1/chat/completions") == asked
    for _ in range(2 if refreshed else 0):
        with pytest.raises(ifl.UpstreamRefused):
            ask_login(gateway_login)
    assert host.count("/oauth/token") == refreshed


def test_nobody_is_logged_in(gateway_login):
    with pytest.raises(ifl.NotLoggedIn, match="python iflow2api.py login"):
        gateway_login.state.router.resolve("glm-5")


def test_status_shows_the_login(home_login, config_login, cli):
    put_login(home_login)
    out = cli("status")[1]
    assert re.search(r"login +default +until 20\d\d-", out) and "sk-key-0" not in out
    assert "R0" not in out


# === 14. Services ============================================================

# --- places and keys ---------------------------------------------------------

def test_a_changed_number_of_places_counts_at_once(server, upstream):
    go = threading.Event()
    upstream.plays(*[sse(chunk("x"), go, chunk(finish="stop"), DONE)] * 4)
    running = server(provider(upstream, concurrency=1))
    slots = running.gateway.lanes["up"].slots
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(running)).post(chat(True)) for _ in range(4)]
        for places, asked in ((1, 1), (2, 2), (0, 4)):           # 0: no limit
            running.gateway.apply(settings_for([provider(upstream, concurrency=places)]))
            until(lambda: slots.waiting == 4 - asked == 4 - slots.active)
            upstream.wait(asked)
            assert len(upstream.requests) == asked
        go.set()
        assert [client.answer().status for client in clients] == [200] * 4
    until(lambda: slots.load == 0)


def lane_of(clock, *keys, **more):
    return ifl.Lane(ifl.Provider("p", api_keys=keys, **more), clock, ifl.TokenScale())


def key_load(lane) -> int:
    """Requests that hold a key or wait for one, where each key has a limit."""
    return sum(slots.load for slots in lane._key_slots.values())


def test_keys_take_turns_but_for_those_that_rest(clock):
    lane, keys = lane_of(clock), ["a", "b", "c"]
    assert [lane.keys(keys) for _ in range(4)] == [["a", "b", "c"], ["b", "c", "a"],
                                                   ["c", "a", "b"], ["a", "b", "c"]]
    lane.rests.rest("b", 10)
    assert lane.keys(keys) == ["c", "a"] and lane.rests.resting == 1
    clock.now += 10
    assert sorted(lane.keys(keys)) == keys and lane.rests.resting == 0
    assert lane.keys([]) == [""]                                 # a request without a key


def test_when_all_keys_rest_the_one_nearest_its_end_is_tried(clock):
    lane = lane_of(clock)
    lane.rests.rest("a", 20)
    lane.rests.rest("b", 10, refused=True)
    assert [lane.keys(["a", "b"]) for _ in range(3)] == [["b"]] * 3
    assert [lane.rests.key_state(key) for key in "abc"] == ["resting", "refused", "ok"]
    lane.rests.ok("a")
    assert lane.keys(["a", "b"]) == ["a"]


def test_accounts_have_places_of_their_own():
    entry = provider("http://h", "i", kind="iflow", api_keys=["k1", "k2", "k3"])
    found = ifl.Router(ifl.Settings(providers=[entry], api_concurrency=2), {}).providers["i"]
    assert (found.places, found.key_concurrency) == (6, 2)
    lane = ifl.Lane(ifl.replace(found, key_concurrency=1), time.monotonic, ifl.TokenScale())
    with lane.hold_key("k1", ifl.NOBODY, ifl.Settings()):
        assert [lane.keys(found.api_keys)[0] for _ in range(3)] == ["k2", "k2", "k3"]
        with lane.hold_key("k2", ifl.NOBODY, ifl.Settings()):
            assert lane.keys(found.api_keys, 0)[0] == "k3" and key_load(lane) == 2
    assert lane.keys(found.api_keys, 0)[0] == "k1" and key_load(lane) == 0


def test_a_lane_that_moves_forgets_what_was_true_of_the_old_address(clock):
    lane = lane_of(clock, "a", base_url="http://old")
    for url, left in (("http://old", ("open", 100, ["m"])), ("http://new", ("closed", 0, []))):
        lane.rests.fail(1, 60)
        lane.learn("m", {"max_output": 100})
        lane.listed = (1e9, ["m"])
        lane.rests.rest("a", 60)
        lane.adopt(ifl.replace(lane.provider, base_url=url, concurrency=3))
        assert (lane.rests.state, lane.learnt("m").get("max_output", 0), lane.listed[1]) == left
        assert lane.rests.resting == 1 and lane.slots.limit == 3


def test_what_refusals_teach_is_kept_for_an_hour_for_some_models(clock):
    lane = lane_of(clock, "a")
    lane.learn("m", {"leave_out": ["user"], "max_output": 9})
    clock.now += 1800
    lane.learn("m", {"leave_out": ["store"], "max_output": 8})
    assert lane.learnt("m") == {"leave_out": ["store", "user"], "max_output": 8}
    clock.now += 1801
    assert lane.learnt("m") == {}
    for number in range(300):
        lane.learn(f"m{number}", {"max_output": 1})
    assert sum(bool(lane.learnt(f"m{number}")) for number in range(300)) == 256


def test_a_client_that_leaves_ends_the_pause(transport, waiting):
    waiting.tick = lambda now: waiting.client.close()
    with watching(transport, waiting), pytest.raises(ifl.ClientGone):
        ifl.wait_for(waiting, 60)


# --- limits ------------------------------------------------------------------

def key_entry(name, secret, **more):
    """An entry of `client_keys`."""
    return {"name": name, "sha256": ifl.sha256(secret).hex(), **more}


def key_of(name, **limits):
    return ifl.parse_client_key(key_entry(name, f"sk-{name}", **limits))


def test_large_limits_never_pass_more_in_any_window(clock):
    window, passed, rnd = ifl.Window(60, 100), [], random.Random(1)
    for _ in range(3000):
        clock.now += rnd.random() * 0.5
        if window.wait_s(clock()) == 0:
            window.add(clock(), 1)
            passed.append(clock())
        assert len(window._marks) <= 46
    assert len(passed) > 100
    for at in passed:
        assert sum(at - 60 < other <= at for other in passed) <= 100


@pytest.mark.parametrize("limit", [1, 5, 50])
def test_waiting_as_long_as_told_is_enough(clock, limit):
    window = ifl.Window(60, limit)
    for _ in range(200):
        wait_s = window.wait_s(clock())
        clock.now += wait_s + 1e-6 if wait_s else 0.3
        assert window.wait_s(clock()) == 0 or not wait_s
        if window.wait_s(clock()) == 0:
            window.add(clock(), 1)
        assert window.used(clock()) <= limit


def count_once(limiter, key) -> None:
    with limiter.hold([limiter.of_key(key)]):
        pass


def test_of_two_limits_that_are_used_up_the_longer_one_is_told(clock):
    limiter, bob = ifl.RateLimiter(clock), key_of("bob", rpm=2, rpd=2)
    count_once(limiter, bob), count_once(limiter, bob)
    told = dict(limiter.headers([limiter.of_key(bob)]))
    assert told["x-ratelimit-reset-requests"] == "86400.0s"


def test_changed_limits_keep_what_was_used(clock):
    limiter = ifl.RateLimiter(clock)
    for limits in ({"rpm": 2}, {"rpm": 2}, {"rpm": 3, "concurrency": 5}):
        count_once(limiter, key_of("bob", **limits))
    with pytest.raises(ifl.RateLimited):
        count_once(limiter, key_of("bob", rpm=2))


def test_addresses_are_bounded_and_small_and_the_oldest_goes_first(clock, monkeypatch):
    monkeypatch.setattr(ifl, "ADDRESSES_LIMIT", 1000)
    limiter = ifl.RateLimiter(clock)
    tracemalloc.start()
    for number in [*range(1000), 0, *range(1000, 1100)]:
        with limiter.hold([limiter.of_address(str(number), {"rpm": 60, "rpd": 1000})]):
            pass
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert list(limiter._addresses) == [str(number) for number in [*range(101, 1000), 0,
                                                                   *range(1000, 1100)]]
    assert size < 2 << 20


class Restarts:
    """Limiters on one ledger, one process after the other: each has a monotonic clock of its own,
    wall time goes on.  Nobody closes the file, as after kill -9.
    """

    def __init__(self, home) -> None:
        self.path, self.wall = str(home / "usage.jsonl"), Clock()
        self.wall.now = 1.8e9 + 1800
        self.start()

    def start(self, after_s=0.0) -> None:
        self.wall.now += after_s
        started = self.wall.now
        self.ledger = ifl.Ledger(self.path, self.wall)
        self.limiter = ifl.RateLimiter(lambda: self.wall.now - started + 7,
                                       lambda key: self.ledger.spent(key, {}))

    def ask(self, key, tokens=0) -> None:
        count_once(self.limiter, key)
        self.limiter.spend([self.limiter.of_key(key)], tokens, 0.0)
        self.ledger.add(call_record(key=key.name, usage=ifl.Usage(prompt=tokens)))

    def refusal(self, key):
        with pytest.raises(ifl.RateLimited) as refused:
            self.ask(key)
        return refused.value


def test_requests_a_day_survive_restarts_and_are_forgotten_a_day_later(home):
    """To the hour: one that began before the restart counts until a day after its end."""
    runs, bob = Restarts(home), key_of("bob", rpd=3, rpm=100)
    for _ in range(3):
        runs.ask(bob)
        runs.start(3600)
    refused = runs.refusal(bob)
    assert "3 requests a day" in refused.message
    assert 86400 - 3 * 3600 <= refused.retry_after_s <= 86400 - 2 * 3600
    told = dict(runs.limiter.headers([runs.limiter.of_key(bob)]))
    assert told["x-ratelimit-remaining-requests"] == "0"
    runs.ask(key_of("eve", rpd=3))                               # the other key's day is its own
    runs.start(refused.retry_after_s)
    runs.ask(bob)
    assert runs.refusal(bob)


def test_tokens_a_day_survive_a_restart(home):
    runs, bob = Restarts(home), key_of("bob", tpd=1000)
    runs.ask(bob, 990)
    runs.start(40000)
    runs.ask(bob, 50)
    runs.start()
    assert "tokens a day" in runs.refusal(bob).message
    runs.wall.now += 86400 + 3600 - 40000 + 2
    runs.ask(bob)


def test_a_limit_that_is_set_later_knows_what_was_used_today(home):
    runs = Restarts(home)
    for _ in range(5):
        runs.ask(key_of("bob"))
    assert runs.refusal(key_of("bob", rpd=5))


def test_a_clock_that_was_put_back_locks_no_key_out_for_longer_than_a_day(home):
    runs, bob = Restarts(home), key_of("bob", rpd=1)
    runs.ask(bob)
    runs.start(-40 * 365 * 86400)                                # a router without a clock
    assert runs.refusal(bob).retry_after_s <= 86400 * 1.05 + 1


# --- metrics -----------------------------------------------------------------

_LABEL = r'\w+="([^"\\]|\\.)*"'
PROMETHEUS_LINE = re.compile(
    rf'# (HELP|TYPE) \w+ .+|\w+(\{{{_LABEL}(,{_LABEL})*\}})? (\+Inf|-?[\d.e+-]+)')


def check_prometheus(text):
    """The text format, line by line; returns the values by series."""
    values, families = {}, []
    for line in text.splitlines():
        assert PROMETHEUS_LINE.fullmatch(line), line
        if line.startswith("# TYPE"):
            families.append(line.split()[2])
        elif not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            assert series not in values, f"{series} twice"
            values[series] = float(value)
    assert len(families) == len(set(families)) and text.endswith("\n")
    return values


def call_record(model="m", provider="p", key="k", dialect="chat", status=200, tokens=1, **facts):
    """The record of a call that has ended."""
    facts = {"usage": ifl.Usage(prompt=tokens, completion=tokens), "first_s": 0.005,
             "total_s": 0.009, **facts}
    return ifl.Record("req_0", dialect, model, False, 0.0,
                      ifl.Target(ifl.Provider(provider), model),
                      status=status, key=key, **facts)


def metrics_of(ledger):
    return check_prometheus(ifl.prometheus_text(ledger.families()))


def test_metrics_in_the_text_format():
    ledger = ifl.Ledger()
    for tokens, total_s in ((1, 0.01), (123_456_789, 0.3), (123_456_789, 1000)):
        ledger.add(call_record(provider='a"\\\n', tokens=tokens, total_s=total_s))
    ledger.add(call_record(usage=ifl.Usage(7, 8, estimated=True), trail=[
        ifl.Attempt("p", "m", "", status, "", 0.0) for status in (429, 429, 200)]))
    values = metrics_of(ledger)
    assert values['iflow2api_tokens_total{direction="in",provider="p",estimated="true"}'] == 7
    assert sum(value for series, value in values.items() if "requests_total" in series) == 4
    assert values['iflow2api_upstream_errors_total{provider="p",status="429"}'] == 2
    times = {series: value for series, value in values.items()
             if "request_duration_seconds" in series and 'provider="a' in series}
    buckets = [value for series, value in times.items() if "_bucket" in series]
    assert buckets == sorted(buckets) and (buckets[0], buckets[-1]) == (1, 3)
    assert [value for series, value in times.items() if "_sum" in series] == [
        pytest.approx(1000.31)]


def test_the_number_of_series_is_bounded():
    ledger, most = ifl.Ledger(), ifl.METRIC_SERIES_LIMIT
    for number in range(3 * most):
        ledger.add(call_record(status=number))
    values = metrics_of(ledger)
    found = [value for series, value in values.items() if "requests_total" in series]
    assert len(found) <= most + 1 and sum(found) == 3 * most
    assert values['iflow2api_requests_total{dialect="other",provider="other",status="other"}'] > 0


def test_counters_never_fall_and_survive_a_restart(home, clock):
    clock.now, path = 1.8e9, str(home / "usage.jsonl")
    name = 'iflow2api_requests_total{dialect="chat",provider="p",status="200"}'
    ledger = ifl.Ledger(path, clock)
    for number in range(1, 101):
        ledger.add(call_record(), days=3)
        assert metrics_of(ledger)[name] == number
        clock.now += 6000
    ledger.close()
    assert 0 < metrics_of(ifl.Ledger(path, clock))[name] <= 100


# --- the ledger --------------------------------------------------------------

def used_in(ledger, days=30):
    """Requests of the last days."""
    return sum(row["requests"] for row in ledger.report("model", days, {}))


@pytest.fixture
def usage_file(home):
    return home / "usage.jsonl"


def lines_in(path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("waits, end, requests", [
    (False, "os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))", 50),
    (True, "pass", 50)], ids=["kill -9", "an end that closes nothing"])
def test_usage_survives_how_a_process_ends_and_a_torn_line(usage_file, waits, end, requests):
    run("-c", "import os, signal, iflow2api as ifl\n"
              f"ledger = ifl.Ledger({str(usage_file)!r})\n"
              "call = ifl.Record('r', 'chat', 'm', False, 0.0, status=200, usage=ifl.Usage(7, 3))\n"
              f"for _ in range(50): ledger.add(call, waits={waits})\n{end}\n")
    assert lines_in(usage_file) == 50
    with open(usage_file, "ab") as file:
        file.write(b'{"hour":1700000000,"mod')
    ledger = ifl.Ledger(str(usage_file))
    row, = ledger.report("model", 30, {})
    assert (row["requests"], row["input"], ledger.problems) == (requests, 7 * requests, [])
    ledger.add(call_record())
    ledger.close()
    assert used_in(ifl.Ledger(str(usage_file))) == requests + 1


#: Lines of a ledger that count two requests, and lines that do not count.
LEDGER_LINES = [
    ('{"day": "TODAY", "model": "m", "provider": "p", "key": "", "requests": 2}', True),
    ('{"hour": NOW, "model": "m", "provider": "p", "key": "k", "dialect": "chat", "status": 200, '
     '"requests": 2}', True),
    ("rubbish", False), ('{"day": 5}', False), ("[" * 5000, False), ("5", False), ("null", False),
    ('{"day": "2026-99-99", "model": "m", "requests": 1}', False),
    ('{"hour": "x", "requests": 2}', False),
    ('{"hour": 1e9, "model": "m", "requests": 2}', False),
    ('{"hour": %d, "requests": 2}' % 10 ** 400, False),
    ('{"hour": NOW, "model": ["m"], "status": 200, "requests": 1}', False),
    ('{"hour": NOW, "model": "m", "status": 200, "requests": -1}', False),
    ('{"day": "TODAY", "model": "m", "requests": 1, "input": %d}' % 10 ** 400, False),
    ('["key", "rpd", 1700000000, 1]', False), ('{"a": 1}', False)]


@pytest.mark.parametrize("line, counts", LEDGER_LINES, ids=[row[0][:60] for row in LEDGER_LINES])
def test_a_line_of_the_ledger_counts_or_is_named(server, config, line, counts):
    put_config(config, {})
    line = line.replace("TODAY", time.strftime("%Y-%m-%d")).replace("NOW", str(int(time.time())))
    path = pathlib.Path(config.folder, "usage.jsonl")
    path.write_bytes(line.encode() + b"\n\n" + line.encode()[:-1])
    running = server(gateway=ifl.Gateway(config=config, environ={}))
    said = [problem for problem in get(running, "/health").json["problems"]
            if "usage.jsonl" in problem]
    assert len(said) == (not counts) and (counts or "line 1 is no usage" in said[0])
    assert used_in(running.gateway.ledger, 1) == (2 if counts else 0)


def test_what_an_older_version_counted_is_there(usage_file, clock):
    """By the day, without dialect and status: in usage and the month, not among the hours."""
    clock.now = time.mktime((2026, 5, 17, 15, 30, 0, 0, 0, -1))
    line = '{"day":"2026-05-%d","model":"m","provider":"p","key":"k","requests":3}\n'
    usage_file.write_text("".join(line % day for day in (1, 16, 17)))
    ledger = ifl.Ledger(str(usage_file), clock)
    ledger.add(call_record(dialect="messages"))
    assert [used_in(ledger, days) for days in (1, 2, 30)] == [4, 7, 10] and not ledger.problems
    assert [row["day"] for row in ledger.report("day", 30, {})] == [
        "2026-05-17", "2026-05-01", "2026-05-16"]
    counts = {span: [sum(counts[0] for _, counts in rows) for _, rows in ledger.steps(span)]
              for span in ("month", "day")}
    assert counts == {"month": [0] * 13 + [3] + [0] * 14 + [3, 4], "day": [0] * 23 + [1]}
    ledger._compact()
    again = ifl.Ledger(str(usage_file), clock)
    assert [used_in(again, days) for days in (1, 2, 30)] == [4, 7, 10]


def test_the_hours_survive_a_restart(usage_file, clock):
    clock.now = time.mktime((2026, 5, 17, 23, 59, 59, 0, 0, -1))
    for hours in (3, 1, 1):
        ifl.Ledger(str(usage_file), clock).add(call_record(model=f"m{hours}"))
        clock.now += hours * 3600
    steps = [[(names[1], counts[0]) for names, counts in rows]
             for _, rows in ifl.Ledger(str(usage_file), clock).steps("day")]
    assert len(steps) == 24 and steps[-6:] == [[("m3", 1)], [], [], [("m1", 1)], [("m1", 1)], []]


def test_the_file_is_compacted_and_old_days_go(usage_file, clock):
    clock.now, ledger = 1.8e9, ifl.Ledger(str(usage_file), clock)
    ledger.COMPACT_LINES = 20
    for number in range(400):
        ledger.add(call_record(model=f"m{number % 3}"), days=5)
        clock.now += 86400 / 25
    rows = [json.loads(line) for line in usage_file.read_bytes().splitlines()]
    assert len(rows) < 300 and len({ifl.day_of(row["hour"]) for row in rows}) <= 13
    assert len(ledger._rows) <= 3 * (5 + 2) + 50 + 3
    total = used_in(ledger, 5)
    ledger.close()
    assert 100 <= total <= 126 and used_in(ifl.Ledger(str(usage_file), clock), 5) == total
    if os.name == "posix":
        assert stat.S_IMODE(usage_file.stat().st_mode) == 0o600


def test_two_processes_share_the_file(usage_file):
    one, two = ifl.Ledger(str(usage_file)), ifl.Ledger(str(usage_file))
    one.COMPACT_LINES = 10
    for _ in range(30):
        one.add(call_record()), two.add(call_record())
    one.close(), two.close()
    assert used_in(ifl.Ledger(str(usage_file))) == 60


def test_lines_of_a_busy_server_are_written_together(usage_file, monkeypatch):
    writes, real = [], os.write
    monkeypatch.setattr(ifl.Journal, "GATHER_S", 60)
    monkeypatch.setattr(os, "write", lambda handle, data: writes.append(data.count(b"\n"))
                        or real(handle, data))
    ledger = ifl.Ledger(str(usage_file))
    for _ in range(7):
        ledger.add(call_record(), waits=True)
    assert writes == [] and used_in(ledger) == 7                 # the count itself waits for none
    ledger.add(call_record())                                    # the only call that runs
    assert writes == [8] and lines_in(usage_file) == 8
    ledger.add(call_record(), waits=True)
    ledger.close()
    assert writes == [8, 1] and used_in(ifl.Ledger(str(usage_file))) == 9


@pytest.mark.parametrize("has_threads", [True, False], ids=["a moment", "no thread to be had"])
def test_a_line_waits_for_others_a_moment_only(usage_file, monkeypatch, has_threads):
    def no_thread(timer):
        raise RuntimeError("can't start new thread")

    if not has_threads:
        monkeypatch.setattr(threading.Timer, "start", no_thread)
    ledger = ifl.Ledger(str(usage_file))
    for number in (1, 2):
        ledger.add(call_record(), waits=True)
        assert has_threads or lines_in(usage_file) == number
        until(lambda: lines_in(usage_file) == number)
    ledger.close()


def test_lines_that_can_not_be_written_cost_nothing_else(home, log_lines):
    (home / "file").write_text("")
    ledger = ifl.Ledger(str(home / "file" / "usage.jsonl"))
    for number in (1, 2):
        ledger.add(call_record(), waits=True)
        assert used_in(ledger) == number
    ledger.close()
    assert "in memory only" in ledger.problems[0] and len(ledger.problems) == 1


@pytest.mark.skipif(os.name == "nt", reason="a file in use can't be removed there")
def test_usage_of_a_removed_file_goes_into_a_new_one(usage_file):
    ledger = ifl.Ledger(str(usage_file))
    for _ in range(2):
        ledger.add(call_record())
        assert lines_in(usage_file) == 1
        usage_file.unlink()
    ledger.close()


def test_names_from_clients_are_bounded(monkeypatch):
    monkeypatch.setattr(ifl, "USAGE_ROWS_AN_HOUR", 10)
    ledger = ifl.Ledger()
    for number in range(100):
        ledger.add(call_record(model="x" * 500 + str(number), key=str(number)))
    rows = {row["key"]: row["requests"] for row in ledger.report("key", 1, {})}
    assert len(rows) == 11 and rows["other"] == 90
    assert {len(row["model"]) for row in ledger.report("model", 1, {})} == {100, 5}


@posix
@pytest.mark.parametrize("zone, now, oldest", [
    ("EST5EDT,M3.2.0,M11.1.0", 1793593800, "2026-10-31"),
    ("CET-1CEST,M3.5.0,M10.5.0/3", 1774823400, "2026-03-29")], ids=["25 hours", "23 hours"])
def test_yesterday_is_a_day_ago_in_every_zone(monkeypatch, zone, now, oldest):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        ifl.day_of.cache_clear(), ifl.midnight_of.cache_clear()
        assert ifl.day_of(ifl.midnight_of(now, -1)) == oldest
    finally:
        monkeypatch.undo()
        time.tzset()
        ifl.day_of.cache_clear(), ifl.midnight_of.cache_clear()


# --- files -------------------------------------------------------------------

def test_a_watch_tells_each_change_and_outlives_what_a_file_makes_of_it(home, log_lines):
    path, told = home / "file", threading.Semaphore(0)

    def changed():
        told.release()
        raise KeyError("defect")
    watch = ifl.FileWatch([str(path)], changed, 0.01)
    try:
        for change in (lambda: path.write_text("one"), lambda: path.write_text("other"),
                       path.unlink):
            change()
            assert told.acquire(timeout=WAIT_S)
    finally:
        watch.close()
    assert not watch._thread.is_alive()
    assert [record.levelname for record in log_lines] == ["ERROR"] * 3
    log_lines.clear()


@posix
def test_what_killed_writers_left_goes_at_the_next_write(home):
    path, old = home / "usage.jsonl", time.time() - 3600
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine, gone = f"usage.jsonl.{os.getpid()}", f"usage.jsonl.{ended.pid}"
    stays = {f"{gone}-0123abcd.tmp": False, f"{mine}-0123abcd.tmp": True,
             f"{mine}-00000000.tmp": False, f"{gone}-0123abcd.txt": True,
             f"other.jsonl.{ended.pid}-0123abcd.tmp": True, "usage.jsonl.tmp": True,
             f"{gone}-0123ABCD.tmp": True, "usage.jsonl.99999999999-0123abcd.tmp": True}
    for name in stays:
        (home / name).write_text("")
    os.utime(home / f"{mine}-00000000.tmp", (old, old))
    ifl.write_file(str(path), b"{}")
    assert {name: (home / name).exists() for name in stays} == stays
    assert path.read_bytes() == b"{}"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
@pytest.mark.parametrize("name", ["usage.jsonl", "tokens.json", "seal.key"])
def test_a_file_that_others_could_read_is_closed_to_them(server, config, upstream, name):
    put_config(config, {"providers": [provider(upstream)],
                        "client_keys": [key_entry("bob", "sk", rpd=9)]})
    path = pathlib.Path(config.folder, name)
    path.write_bytes({"tokens.json": b"{}", "seal.key": b"k" * 32}.get(name, b""))
    path.chmod(0o644)
    server(gateway=ifl.Gateway(config=config, environ={})).gateway.seal()
    assert path.stat().st_mode & 0o777 == 0o600


# --- time is linear ----------------------------------------------------------

def _journal(line):
    def made(size, home):
        path = home / f"{size}.jsonl"
        path.write_bytes(b"".join(line(number) for number in range(size)))
        return str(path)
    return made


def _usage_line(number):
    return b'{"day":"2026-01-01","model":"m%d","provider":"p","key":"","requests":1}\n' % number


def _read_usage(path):
    ifl.Ledger(path).load()


def _use_windows(size):
    window = ifl.Window(86_400, 10 ** 9)
    for number in range(size):
        window.put(number, 1)
    assert window.used(2e9) == 0


def _list_router(size, home):
    entry = provider("http://h", models=[f"m{number}" for number in range(size)])
    return entry, [f"m{number}" for number in range(0, size, 2)]


def _route_all(made):
    router = ifl.Router(ifl.Settings(providers=[made[0]]), {})
    return [router.claimed(name) for name in made[1]]


def _stored(size, home):
    store = ifl.ResponseStore()
    items = [{"type": "message", "id": f"msg_{number}"} for number in range(size)]
    store.keep({"id": "resp_1", "output": []}, items)
    return store, [f"msg_{number}" for number in range(size)]


def _openrouter(size, home):
    key = key_of("bob", models=["up/m*", "*a*a*b", "m*"])
    text = '{"models": [%s]}' % ", ".join(f'"m{"a" * 30}{number}"' for number in range(size))
    return ifl.Router(ifl.Settings(providers=[provider("http://h")]), {}), key, text


def _check_openrouter(made):
    router, key, text = made
    assert ifl.may_use(router, key, "m", router.resolve("m"), ifl.models_in(text))


#: What grows with what comes from outside: id, size of the base, its maker, what is done with it.
GROWTH_OF_SERVICES = [
    ("usage of any names", 1500, _journal(_usage_line), _read_usage),
    ("no usage at all", 4000, _journal(lambda number: b"[" * 60 + b"\n"), _read_usage),
    ("one line without an end", 200_000, _journal(lambda number: b'{"day": "x" '), _read_usage),
    ("a limit used again and again", 20_000, lambda size, home: size, _use_windows),
    ("an engine with many models", 6000, _list_router, _route_all),
    ("references to items", 10_000, _stored, lambda made: [made[0].item(name) for name in made[1]]),
    ("openrouter's models", 12_000, _openrouter, _check_openrouter),
]


@pytest.mark.parametrize("size, make, use", [row[1:] for row in GROWTH_OF_SERVICES],
                         ids=[row[0] for row in GROWTH_OF_SERVICES])
def test_services_take_linear_time(home, size, make, use):
    check_growth(size, lambda size: make(size, home), use)


# === 15. Gateway =============================================================

# --- plain answers -----------------------------------------------------------

def test_a_plain_answer_comes_as_it_is(server, upstream):
    body = (b'{ "id": "x",  "choices":[{"message":{"content":"\\u4e2d","odd":1.0}}], '
            b'"big": 12345678901234567890,\n"usage":null}\n')
    kept = {"x-ratelimit-remaining": "5", "openai-version": "v"}
    upstream.plays(plain(body, headers=[*kept.items(), ("Set-Cookie", "a=b"), ("X-Own", "y")],
                         content_type="application/json; charset=utf-8"))
    status, headers, data = post(server(upstream), chat())
    assert (status, data) == (200, body)
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert re.fullmatch("req_[0-9a-f]{24}", headers["x-request-id"])
    assert {name: headers[name] for name in kept} == kept
    assert not {"set-cookie", "x-own"} & set(headers)


def test_a_request_reaches_the_upstream_byte_for_byte(server, upstream):
    body = ('{ "stream":false, "messages" : [{"role":"user","content":"中😀"}],\n'
            '"t": 1.0, "model": "m1", "x": {"model": null}}').encode()
    running = server(provider(upstream, api_keys=["key-1"], headers={"X-Provider": "p"}),
                     aliases={"short": "up/long/name"})
    for asked, told in ((b'"m1"', b'"m1"'), (b'"short"', b'"long/name"')):
        assert post(running, body.replace(b'"m1"', asked)).status == 200
        assert upstream.last.body == body.replace(b'"m1"', told)
        assert upstream.last.path == "/v1/chat/completions"
    seen = upstream.last.headers
    assert (seen["authorization"], seen["x-provider"]) == ("Bearer key-1", "p")


def test_headers_of_the_client_that_go_upstream_and_those_that_stay(server, upstream):
    """Those that Connection names are about this hop (RFC 9110, 7.6.1)."""
    running = server(provider(upstream, api_keys=["key-1"]), custom_api_key="client-key",
                     custom_auth_header="X-Mine")
    kept = {"X-Stainless-Lang": "python", "OpenAI-Beta": "x=1", "OpenAI-Organization": "o",
            "OpenAI-Project": "p", "X-Title": "t", "HTTP-Referer": "https://app",
            "Accept-Language": "zh", "anthropic-version": "1", "X-Request-Id": "r"}
    stay = {"X-Api-Key": "client-key", "Api-Key": "client-key", "X-Mine": "client-key",
            "Cookie": "a=b", "X-Forwarded-For": "1.2.3.4", "Via": "x", "Accept": "x/y",
            "Referer": "x", "Sec-Fetch-Mode": "cors", "TE": "trailers", "X-Auth-Token": "s",
            "X-Key": "s", "DPoP": "s", "Range": "bytes=0-1", "If-None-Match": "x",
            "X-Anything": "y", "Connection": "keep-alive, Anthropic-Beta , x-title-2",
            "anthropic-beta": "b", "X-Title-2": "t"}
    ours = {"Authorization": "Bearer client-key", "Accept-Encoding": "br",
            "Content-Type": "text/plain"}
    with Client(running) as client:
        assert client.post(chat(), headers={**kept, **stay, **ours}).answer().status == 200
    seen = upstream.last.headers
    assert {name: seen.get(name.lower()) for name in kept} == kept
    assert not {name.lower() for name in stay} & set(seen)
    assert seen["authorization"] == "Bearer key-1" and seen["content-type"] == "application/json"
    assert seen["accept-encoding"] == "identity" and seen["user-agent"].startswith("iflow2api/")


@pytest.mark.parametrize("path", ASKS)
def test_the_client_names_itself_where_the_profile_says_so(server, upstream, path):
    for forward, headers, seen in ((True, {}, "claude-cli/2.1 (x)"),
                                   (True, {"User-Agent": "mine/1"}, "mine/1"),
                                   (False, {}, f"iflow2api/{ifl.__version__}")):
        made = server(provider(upstream, profile={"forward_user_agent": forward}, headers=headers))
        asked = {"model": "m1", **ASKS[path]}
        assert post(made, asked, path, user_agent="claude-cli/2.1 (x)").status == 200
        assert upstream.last.headers["user-agent"] == seen
    assert ifl.PRESETS["kimi-coding"].profile["forward_user_agent"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
def test_completions_and_embeddings_are_passed_on(server, upstream, path):
    body = {"model": "m1", "prompt": "x", "input": ["x"], "encoding_format": "base64"}
    answer = post(server(upstream), body, path)
    assert answer.status == 200 and upstream.last.path == path and upstream.last.json == body
    assert "Hello" in str(answer.json) or isinstance(answer.json["data"][0]["embedding"], str)


def test_completions_stream(server, upstream):
    parts = [{"choices": [{"text": "", "index": 0}]}, {"choices": [{"text": "Hi", "index": 0}]},
             {"choices": [{"text": "", "finish_reason": "stop"}]}, DONE]
    upstream.plays(sse(*parts))
    body = {"model": "m", "prompt": "x", "stream": True}
    assert records_of(post(server(upstream), body, "/v1/completions").body) == parts


# --- errors ------------------------------------------------------------------

def error_reply(status, **headers):
    return plain({"error": {"message": f"status {status}"}}, status, list(headers.items()))


#: id, reply, status, words in the message.
PLAIN_FAULTS = [
    ("not JSON", plain(b"Hello", content_type="text/plain"), 502, "not JSON"),
    ("nothing", plain(b""), 502, "empty"),
    ("html", plain(b"<html>", content_type="text/html"), 502, "web page"),
    ("no choices", plain({"choices": []}), 502, "empty"),
    ("empty text", plain(completion("", usage={"prompt_tokens": 1})), 502, "empty"),
    ("list", plain([1]), 502, "empty"),
    ("error in a 200", plain({"error": {"message": "no such model", "code": 404}}), 404,
     "no such model"),
    ("limit in a 200", plain({"error": {"message": "slow down", "code": "429"}}), 429, "slow down"),
    ("redirect", Reply(head(302, [("Location", "https://else.where/"), ("Content-Length", "0")])),
     502, "redirects to https://else.where/"),
    ("html 502", plain(b"<html><title>Bad Gateway</title>", 502, content_type="text/html"), 502,
     "Bad Gateway"),
    ("cut", Reply(head(200, [("Content-Length", "500")]) + b'{"choices"', CLOSE), 502, "middle"),
    ("reset", Reply(RESET), 502, "without an answer"),
    ("no content", Reply(head(204)), 502, "empty"),
    ("deep", plain(b'{"a":' * 100_000), 502, "not JSON"),
    ("latin-1", plain(b'{"a":"\xe9"}'), 502, "not JSON"),
    ("404", plain({"error": {"message": "gone"}}, 404), 404, "gone"),
    ("418", plain({"error": "tea"}, 418), 418, "tea"),
    ("huge number", plain(b'{"error":{"message":"inf","n":1e999}}', 400), 400, "inf"),
    ("deep error", plain(b'{"error":{"message":"deep","n":' + b"[" * 700 + b"]" * 700 + b"}}", 400),
     400, "deep"),
    ("surrogate", plain(b'{"error":{"message":"odd \\ud83d"}}', 400), 400, "odd")]
EMBEDDING_FAULTS = [
    ("list", plain([1]), 502, "no JSON object"), ("not JSON", plain(b"x"), 502, "not JSON"),
    ("400", plain({"error": "no"}, 400), 400, "no"),
    ("error in a 200", plain({"error": {"message": "no", "code": 400}}), 400, "no"),
    ("cut", Reply(head(500, [("Content-Length", "500")]) + b"cut", CLOSE), 500, "500")]
FAULTS_BY_PATH = [*(("/v1/chat/completions", row) for row in PLAIN_FAULTS),
                  *(("/v1/embeddings", row) for row in EMBEDDING_FAULTS)]


@pytest.mark.parametrize("path, row", FAULTS_BY_PATH,
                         ids=[f"{path.split('/')[2]}, {row[0]}" for path, row in FAULTS_BY_PATH])
def test_faults_of_a_plain_answer(server, upstream, monkeypatch, path, row):
    monkeypatch.setattr(ifl.log, "propagate", False)     # a test report holds no lone surrogate
    _, reply, status, said = row
    running = server(upstream)
    upstream.plays(reply)
    answer = post(running, {**chat(), "input": "x"}, path)
    assert answer.status == status and said in answer.error["message"] and is_well(running)
    assert post(running, chat()).status == 200


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_an_answer_that_was_meant_to_be_empty_is_passed_on(server, upstream, finish):
    upstream.plays(plain(completion("", finish, usage={"prompt_tokens": 1})),
                   sse(ROLE, chunk(finish=finish), DONE))
    running = server(upstream)
    assert post(running, chat()).json["choices"][0]["finish_reason"] == finish
    assert records_of(post(running, chat(True)).body) == [ROLE, chunk(finish=finish), DONE]


#: An upstream's status and headers, the status that the client sees, and its headers.
UPSTREAM_STATUSES = [
    (400, {}, 400, {}), (422, {"Retry-After": "3"}, 422, {"retry-after": "3"}),
    (429, {}, 429, {"retry-after": "5"}), (429, {"Retry-After": "0"}, 429, {"retry-after": "1"}),
    (429, {"retry-after-ms": "1200"}, 429, {"retry-after": "2"}), (500, {}, 500, {}),
    (503, {"Retry-After": "7", "x-should-retry": "true"}, 503,
     {"retry-after": "7", "x-should-retry": "true"}),
    (529, {}, 529, {}), (401, {}, 403, {"x-should-retry": "false"}),
    (403, {}, 403, {"x-should-retry": "false"})]


@pytest.mark.parametrize("status, given, seen, there", UPSTREAM_STATUSES)
def test_statuses_of_an_upstream(server, upstream, status, given, seen, there):
    error = {"message": "its words", "type": "its type", "extra": 1}
    upstream.plays(plain({"error": error}, status, list(given.items())))
    answer = post(server(provider(upstream, api_keys=["k1"])), chat())
    assert answer.status == seen
    assert {name: answer.headers[name] for name in ("retry-after", "x-should-retry")
            if name in answer.headers} == there
    if seen == status and status != 403:
        assert answer.error == error
    else:
        message = answer.error["message"]
        assert "its words" in message and "provider up refused its key" in message
        assert "python iflow2api.py test up" in message
        assert answer.error["type"] == "permission_error"


def test_a_limit_within_a_200_says_when_to_come_back(server, upstream):
    limit = {"error": {"message": "slow", "code": "429"}}
    upstream.plays(plain(limit), sse(limit))
    running = server(upstream)
    for stream in (False, True):
        answer = post(running, chat(stream))
        assert answer.status == 429 and answer.headers.get("retry-after") == "5"


def test_timeouts_and_missing_upstreams(server, upstream):
    running = server(upstream, provider("http://127.0.0.1:9", "gone"),
                     provider(upstream, "off", api_keys=["$NOT_SET"]), first_byte_timeout_s=0.1)
    upstream.plays(Reply(HOLD), Reply(HOLD))
    for body, status, said in ((chat(), 504, ""), (chat(True), 504, ""),
                               (chat(model="gone/m"), 502, "gone"),
                               (chat(model="off/m"), 403, "NOT_SET is not set")):
        answer = post(running, body)
        assert answer.status == status and said in answer.error["message"]


def test_no_provider_at_all(server):
    answer = post(server(detect_local=False), chat())
    assert (answer.status, answer.error["type"], answer.headers["x-should-retry"]) == (
        403, "permission_error", "false")
    assert "--upstream" in answer.error["message"]


KEY_IN_WORDS = "provider-key-0123456789"


@pytest.mark.parametrize("status", [400, 401, 500, "stream"])
@pytest.mark.parametrize("field", ["message", "code", "type", "param", "extra"])
def test_a_key_in_any_field_of_an_error_is_taken_out(server, upstream, field, status):
    error = {"error": {"message": "no", field: f"no {KEY_IN_WORDS}"}}
    upstream.plays(sse(error) if status == "stream" else plain(error, status))
    running = server(provider(upstream, api_keys=[KEY_IN_WORDS]))
    answer = post(running, chat(status == "stream"))
    assert answer.status >= 400 and b"no" in answer.body
    assert KEY_IN_WORDS.encode() not in answer.body


@pytest.mark.parametrize("cut", [0, 30, 200])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_key_in_an_error_within_a_stream_is_taken_out(server, upstream, path, cut):
    """Also where the error comes with text before it in one read, or in two pieces."""
    data = wire_of([chunk("hello"), {"error": {"message": f"bad {KEY_IN_WORDS}",
                                               "code": f"x {KEY_IN_WORDS}"}}])
    upstream.plays(sse(chunk("hi"), *filter(None, (data[:cut], data[cut:]))))
    running = server(provider(upstream, api_keys=[KEY_IN_WORDS]))
    answer = post(running, {**chat(True), "max_tokens": 9, "input": "hi"}, path)
    assert b"hi" in answer.body and b"bad pro" in answer.body
    assert KEY_IN_WORDS.encode() not in answer.body


@pytest.mark.parametrize("key", ["x", "none", "EMPTY", "ollama"])
def test_a_key_that_is_no_secret_does_not_garble_errors(server, upstream, key):
    """Local engines want any key at all."""
    upstream.plays(plain({"error": {"message": "x none of EMPTY ollama models"}}, 400))
    answer = post(server(provider(upstream, api_keys=[key])), chat())
    assert answer.error["message"] == "x none of EMPTY ollama models"


def test_a_key_that_a_flag_brought_is_not_looked_for_in_the_file(server, upstream, config):
    upstream.plays(error_reply(401))
    flags = ifl._flag_settings(ifl._parse_args(["--upstream", upstream.url, "--api-key",
                                                "wrong-key-1"]))
    made = ifl.Gateway(config=config, flags=flags, environ={})
    message = post(server(gateway=made), chat()).error["message"]
    assert message.endswith("; give another --api-key") and "config.json" not in message


# --- places at a provider ----------------------------------------------------

def test_requests_beyond_the_concurrency_wait_in_order(server, upstream):
    goes = [threading.Event() for _ in range(4)]
    upstream.plays(*(sse(chunk("x"), go, chunk(finish="stop"), DONE) for go in goes))
    running = server(provider(upstream, concurrency=1))
    slots = running.gateway.lanes["up"].slots
    with contextlib.ExitStack() as stack:
        clients = []
        for number in range(4):
            clients.append(stack.enter_context(Client(running)).post(chat(True, n=number)))
            until(lambda: slots.load == number + 1)
        for number, (client, go) in enumerate(zip(clients, goes)):
            upstream.wait(number + 1)
            assert upstream.last.json["n"] == number and len(upstream.requests) == number + 1
            go.set()
            assert client.answer().status == 200
    until(lambda: slots.active == 0)


def test_a_full_queue_is_busy(server, upstream):
    go = threading.Event()
    upstream.plays(sse(chunk("x"), go, DONE))
    running = server(provider(upstream, concurrency=1), queue_limit=1)
    slots = running.gateway.lanes["up"].slots
    with Client(running) as first, Client(running) as second:
        first.post(chat(True))
        until(lambda: slots.active == 1)
        second.post(chat())
        until(lambda: slots.waiting == 1)
        answer = post(running, chat())
        assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
        assert "up is busy and 1 requests wait already" in answer.error["message"]
        go.set()
        assert first.answer().status == second.answer().status == 200
    assert is_well(running)


def test_a_long_wait_in_the_queue_ends(server, upstream, looks_often):
    running = server(provider(upstream, concurrency=1), queue_timeout_s=0.1, keepalive_s=0.03)
    upstream.plays(Reply(HOLD))
    with Client(running) as client:
        client.post(chat())
        upstream.wait()
        answer = post(running, chat())
        assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
        assert "no place at up came free within 0.1 s" in answer.error["message"]
        *comments, failed = records_of(post(running, chat(True)).body)
        assert comments and set(comments) == {": keep-alive"}
        assert failed["error"]["code"] == "server_is_overloaded"
    assert is_well(running)


# --- streams -----------------------------------------------------------------

@pytest.mark.parametrize("end", ENDS, ids=[row[0] for row in ENDS])
@pytest.mark.parametrize("row", RELAYED, ids=[row[0] for row in RELAYED])
def test_golden_streams_reach_the_client(server, upstream, row, end):
    upstream.plays(sse(*row[1], start=end[1], stop=end[2]))
    status, headers, body = post(server(upstream), chat(True))
    assert status == 200 and headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    assert body == wire_of(row[1], *end[1:])


WIRE, PACKED_HELLO = wire_of(HELLO), gzip.compress(wire_of(HELLO))
STREAM_TYPE, BY_CHUNKS = ("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")
WRAPPINGS = [
    ("length", Reply(head(200, [STREAM_TYPE, ("Content-Length", str(len(WIRE)))]) + WIRE)),
    ("no length", Reply(head(200, [STREAM_TYPE]) + WIRE, CLOSE)),
    ("no type", Reply(head(200) + WIRE, CLOSE)),
    ("gzip", Reply(head(200, [STREAM_TYPE, ("Content-Encoding", "gzip"), BY_CHUNKS]),
                   *(framed(PACKED_HELLO[at:at + 9]) for at in range(0, len(PACKED_HELLO), 9)),
                   b"0\r\n\r\n")),
    ("chunks of a byte", Reply(head(200, [BY_CHUNKS]), *(framed(bytes([byte])) for byte in WIRE),
                               b"0\r\n\r\n")),
    ("bytes", Reply(head(200, [BY_CHUNKS]),
                    *(bytes([byte]) for byte in framed(WIRE) + b"0\r\n\r\n"))),
    ("kept open after [DONE]", sse(*HELLO, HOLD)), ("no [DONE]", sse(*HELLO[:-1])),
    ("bom", sse(b"\xef\xbb\xbf" + record(HELLO[0]), *HELLO[1:])),
    ("no last chunk", sse(*HELLO, end=False)),
    ("neither [DONE] nor a last chunk", sse(*HELLO[:-1], end=False))]


@pytest.mark.parametrize("reply", [row[1] for row in WRAPPINGS], ids=[row[0] for row in WRAPPINGS])
def test_streams_in_every_wrapping(server, upstream, reply):
    running = server(upstream)
    upstream.plays(reply)
    answer = post(running, chat(True))
    assert records_of(answer.body.replace(b"\xef\xbb\xbf", b"")) == HELLO and is_well(running)


@pytest.mark.parametrize("done",
                         [b"data: [DONE]\r\n\r\n", b"data:[DONE]\n\n", b"data: [DONE] \n\n"])
def test_after_done_nothing_is_waited_for(server, upstream, done):
    """Some servers keep the connection open."""
    upstream.plays(sse(chunk("x"), chunk(finish="stop"), done, HOLD))
    with Client(server(upstream, idle_timeout_s=2), timeout_s=1.5) as client:
        body = client.post(chat(True)).answer().body
    assert body == wire_of([chunk("x"), chunk(finish="stop")]) + done


def test_a_stream_for_http_1_0_is_not_chunked(server, upstream):
    with Client(server(upstream)) as client:
        status, headers = client.send(request_bytes(body=chat(True), version="HTTP/1.0")).head()
        assert status == 200 and headers["connection"] == "close"
        assert "transfer-encoding" not in headers and records_of(client.file.read()) == HELLO


IN_PIECES = Reply(head(200, [("Content-Type", "text/plain"), BY_CHUNKS]),
                  *(framed(bytes([byte])) for byte in b'{"error": {"message": "in pieces"}}'),
                  b"0\r\n\r\n")


@pytest.mark.parametrize("reply, status, said", [
    (plain({"error": {"message": "quota is gone", "code": 402}}, content_type="text/plain"), 402,
     "quota is gone"),
    (plain(b'  \n{"status":"435","msg":"model not supported"}', content_type="text/event-stream"),
     404, "model not supported"),
    (plain(b'{"error": "no"}', content_type=""), 502, "no"),
    (plain(b'{"cut', content_type="text/plain"), 502, "not JSON"),
    (plain(b"Hello", content_type="text/plain"), 502, "empty"), (IN_PIECES, 502, "in pieces")])
def test_an_error_that_does_not_call_itself_json_on_a_stream(server, upstream, reply, status, said):
    upstream.plays(reply)
    answer = post(server(upstream), chat(True))
    assert answer.status == status and said in answer.error["message"]


@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_a_server_that_does_not_stream(server, upstream, content_type):
    upstream.plays(plain(completion("Hi", usage=USAGE), content_type=content_type))
    found = records_of(post(server(upstream), chat(True)).body)
    assert text_of(found) == "Hi" and found[0]["usage"] == USAGE and found[-1] == DONE


def test_each_token_arrives_before_the_next_is_sent(server, upstream):
    goes = [threading.Event() for _ in range(3)]
    upstream.plays(sse(ROLE, chunk("a"), goes[0], chunk("b"), goes[1], chunk("c"), goes[2],
                       chunk(finish="stop"), DONE))
    with Client(server(upstream)) as client:
        assert client.post(chat(True)).head()[0] == 200
        assert text_of(records_of(client.piece())) == "a"
        for letter, go in zip("bc", goes):
            go.set()
            assert text_of(records_of(client.piece())) == letter
        goes[2].set()
        assert records_of(client.pieces())[-1] == DONE


def test_a_record_in_two_reads_goes_out_whole(server, upstream):
    go, data = threading.Event(), record(chunk("中文"))
    middle = data.index("中".encode()) + 1
    upstream.plays(sse(chunk("a"), data[:middle], go, data[middle:], chunk(finish="stop"), DONE))
    with Client(server(upstream)) as client:
        client.post(chat(True)).head()
        assert records_of(client.piece()) == [chunk("a")]
        go.set()
        assert text_of(records_of(client.pieces())) == "中文"


# --- silence -----------------------------------------------------------------

KEEP_ALIVE = b": keep-alive\n\n"


def test_silence_before_the_first_token_is_kept_alive(server, upstream):
    go = threading.Event()
    upstream.plays(Reply(go, *sse(*HELLO).steps))
    with Client(server(upstream, keepalive_s=0.03)) as client:
        assert client.post(chat(True)).head()[0] == 200
        assert [client.piece() for _ in range(3)] == [KEEP_ALIVE] * 3
        go.set()
        assert text_of(records_of(client.pieces())) == "Hello"


def test_silence_within_an_answer_is_kept_alive_between_records(server, upstream):
    go, half = threading.Event(), record(chunk("lo"))
    upstream.plays(sse(ROLE, chunk("Hel"), half[:20], go, half[20:], chunk(finish="stop"), DONE))
    with Client(server(upstream, keepalive_s=0.03)) as client:
        client.post(chat(True)).head()
        data = client.piece()
        while data.count(KEEP_ALIVE) < 3:
            data += client.piece()
        assert data.replace(KEEP_ALIVE, b"") == record(ROLE) + record(chunk("Hel"))
        go.set()
        assert text_of(records_of(data + client.pieces())) == "Hello"


def test_empty_chunks_are_no_sign_of_life_for_the_client(server, upstream):
    """An upstream that sends what is held back must not silence the keep-alive."""
    trickle = itertools.chain.from_iterable((ROLE, PAUSE) for _ in range(20))
    upstream.plays(sse(*trickle, chunk("x"), chunk(finish="stop"), DONE))
    with Client(server(upstream, keepalive_s=0.05)) as client:
        assert client.post(chat(True)).head()[0] == 200 and client.piece() == KEEP_ALIVE
        assert text_of(records_of(client.pieces())) == "x"


def test_a_keep_alive_is_no_answer(chain, upstreams):
    """After it the next target may still be tried, and an error is in band."""
    go = threading.Event()
    first = upstreams(Reply(go, *error_reply(500).steps), Reply(HOLD))
    second = upstreams(sse(*HELLO), error_reply(400))
    running = chain(provider(first, "one", timeout_s=0.3), second, keepalive_s=0.03)
    with Client(running) as client:
        client.post(chat(True, "m")).head()
        assert client.piece() == KEEP_ALIVE
        go.set()
        assert text_of(records_of(client.pieces())) == "Hello" and len(second.requests) == 1
        client.post(chat(True, "m")).head()
        *comments, failed = records_of(client.pieces())
        assert set(comments) == {": keep-alive"} and failed == {"error": {"message": "status 400"}}
        assert client.is_closed()


def test_a_plain_answer_is_not_kept_alive(server, upstream):
    go = threading.Event()
    upstream.plays(Reply(go, *plain(completion()).steps))
    with Client(server(upstream, keepalive_s=0.02)) as client:
        client.post(chat())
        upstream.wait()
        assert not select.select([client.sock], [], [], 0.15)[0]
        go.set()
        assert client.answer().json == completion()


def test_silence_in_mid_stream_ends_in_an_error(server, upstream):
    upstream.plays(sse(chunk("x"), HOLD))
    found = records_of(post(server(upstream, idle_timeout_s=0.2), chat(True)).body)
    assert found[0] == chunk("x") and "said nothing for 0.2 s" in found[-1]["error"]["message"]


# --- ends in mid-stream ------------------------------------------------------

DEATHS = [("closed", [CLOSE]), ("reset", [RESET]), ("cut record", [framed(b"data: {"), CLOSE]),
          ("cut chunk", [b"50\r\ndata: {", CLOSE]),
          ("bad framing", [b"not a chunk\r\n", HOLD])]


@pytest.mark.parametrize("steps", [row[1] for row in DEATHS], ids=[row[0] for row in DEATHS])
def test_an_upstream_that_dies_in_mid_stream(server, upstream, steps):
    go = threading.Event()
    upstream.plays(Reply(*sse(ROLE, chunk("Hel")).steps[:-1], go, *steps))
    running = server(provider(upstream, concurrency=1))
    with Client(running) as client:
        assert client.post(chat(True)).head()[0] == 200
        begun = client.piece()
        go.set()
        *begun, failed = records_of(begun + client.pieces())
        assert text_of(begun) == "Hel" and DONE not in begun
        assert failed["error"]["message"] and client.is_closed()
    assert is_well(running) and post(running, chat()).status == 200      # its place is free again


def test_an_error_of_the_upstream_in_mid_stream_is_passed_on_once(server, upstream):
    upstream.plays(sse(chunk("x"), ERROR_RECORD), sse(chunk("x"), ERROR_RECORD, end=False))
    running = server(upstream)
    for _ in range(2):
        assert records_of(post(running, chat(True)).body) == [chunk("x"), ERROR_RECORD]


LEAVING = [("before the head", Reply(HOLD), 0), ("before the first token", sse(ROLE, HOLD), 0),
           ("in mid-stream", sse(ROLE, chunk("x"), HOLD), 1)]
#: How a client leaves: does it stream, does it reset the connection, is it looked after often.
WAYS_TO_LEAVE = {"as it is": (True, False, False), "stream, closed": (True, False, True),
                 "stream, reset": (True, True, True), "plain, closed": (False, False, True),
                 "plain, reset": (False, True, True)}


@pytest.mark.parametrize("way", WAYS_TO_LEAVE)
@pytest.mark.parametrize("reply, pieces", [row[1:] for row in LEAVING],
                         ids=[row[0] for row in LEAVING])
def test_a_client_that_hangs_up_stops_the_upstream(server, upstream, request, reply, pieces, way):
    """Even while it is silent, within a second; and its place is free again."""
    stream, reset, often = WAYS_TO_LEAVE[way]
    if often:
        request.getfixturevalue("looks_often")
    upstream.plays(reply)
    running = server(provider(upstream, concurrency=1))
    client = Client(running).post(chat(stream))
    upstream.wait()
    if stream and pieces:
        client.head(), client.piece()
    client.hang_up(reset)
    until(lambda: upstream.hung_up == 1, 1, "the end of the upstream's connection")
    until(lambda: running.gateway.lanes["up"].slots.active == 0, 1, "the place")
    assert post(running, chat()).status == 200 and is_well(running)


def test_a_client_that_hangs_up_in_the_queue_leaves_it(server, upstream, looks_often):
    running = server(provider(upstream, concurrency=1))
    slots = running.gateway.lanes["up"].slots
    upstream.plays(Reply(HOLD))
    with Client(running) as first:
        first.post(chat(True))
        upstream.wait()
        waiting = [Client(running).post(chat(stream)) for stream in (True, False)]
        until(lambda: slots.waiting == 2)
        for client in waiting:
            client.hang_up()
        until(lambda: slots.waiting == 0, 1.5, "the end of the waits")
        assert len(upstream.requests) == 1 and slots.active == 1
    until(lambda: slots.active == 0, 1.5)


def test_a_client_that_stops_reading_is_cut_off(server, upstream, monkeypatch):
    """Its place comes free after SEND_TIME_S, though the upstream would go on for ever."""
    upstream.plays(sse(chunk("x"), *[record(chunk("x" * 60_000))] * 400, HOLD))
    monkeypatch.setattr(ifl, "SEND_TIME_S", 0.3)
    running = server(provider(upstream, concurrency=1))
    with Client(running) as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.post(chat(True))
        upstream.wait()
        until(lambda: running.gateway.lanes["up"].slots.active == 0, 5)
    assert is_well(running)


def test_pipelined_bytes_do_not_hide_a_client_that_hangs_up(server, upstream, looks_often):
    upstream.plays(Reply(HOLD))
    client = Client(server(upstream)).post(chat(True)).request("GET", "/health")
    upstream.wait()
    client.hang_up(reset=True)
    until(lambda: upstream.hung_up == 1, 2, "the end of the upstream's connection")


def at_once(number, ask) -> List[Any]:
    """What `ask(index)` returns, called on so many threads."""
    found: List[Any] = [None] * number

    def call(index):
        found[index] = ask(index)
    threads = [threading.Thread(target=call, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def test_many_streams_at_once(server, upstream):
    running = server(upstream)
    found = at_once(40, lambda index: records_of(post(running, chat(True)).body))
    assert found == [HELLO] * 40 and is_well(running)


# --- records, metrics, models, health ----------------------------------------

def test_one_line_a_request(server, upstream, log_lines):
    running, answers = server(upstream), []
    upstream.plays(usual_reply, usual_reply, error_reply(400), sse(ROLE, chunk("x"), DONE))
    for number, body in enumerate((chat(model="up/m1"), chat(True), chat(), chat(True)), 1):
        answers.append(post(running, body))
        until(lambda: len(log_lines) >= number, what="the line, which is written after the answer")
    ident = answers[0].headers["x-request-id"][4:12]
    lines = [record.getMessage() for record in log_lines]
    for line, said in zip(lines, (
            rf"{ident} up/m1 → up/m1 200 total \d\.\d\ds in 12 out 3",
            r"[0-9a-f]{8} m1 → up/m1 200 first \d\.\d\ds total \d\.\d\ds in 12 out 3",
            r"[0-9a-f]{8} m1 → up/m1 400 total \d\.\d\ds \(status 400\)",
            r"[0-9a-f]{8} m1 → up/m1 200 first .* in ~\d+ out ~\d+")):
        assert re.fullmatch(said, line)
    assert len(lines) == 4


def test_a_stream_that_the_upstream_broke_off_is_no_success(server, upstream, log_lines):
    running = server(upstream)
    upstream.plays(sse(chunk("x"), end=False), sse(chunk("x"), ERROR_RECORD))
    for _ in range(2):
        post(running, chat(True))
    assert is_well(running)
    assert not [record for record in log_lines if " 200 " in record.getMessage()]


def metrics_at(running):
    return check_prometheus(get(running, "/metrics").body.decode())


def test_metrics_of_requests(server, upstream):
    running = server(upstream)
    upstream.plays(plain(completion()), error_reply(500), sse(*HELLO),
                   sse(chunk("x"), chunk(finish="stop"), DONE))
    for stream in (False, False, True, True):
        post(running, chat(stream))
    assert is_well(running)
    values = metrics_at(running)
    for series, value in (
            ('requests_total{dialect="chat",provider="up",status="200"}', 3),
            ('requests_total{dialect="chat",provider="up",status="500"}', 1),
            ('upstream_errors_total{provider="up",status="500"}', 1),
            ('tokens_total{direction="in",provider="up",estimated="false"}', 24),
            ('tokens_total{direction="out",provider="up",estimated="false"}', 6),
            ("in_flight", 0), ('upstream_waiting{provider="up"}', 0)):
        assert values["iflow2api_" + series] == value, series
    for series in ('tokens_total{direction="out",provider="up",estimated="true"}',
                   'first_token_seconds_count{dialect="chat",provider="up"}'):
        assert values["iflow2api_" + series] >= 1, series


def owners_of(gateway) -> Dict[str, str]:
    return {model["id"]: model["owned_by"] for model in ifl.models_of(gateway)}


def model_list(*names) -> Reply:
    return plain({"data": [{"id": name} for name in names]})


def test_the_names_that_can_be_asked_for(gateway, upstreams):
    """Each leads to where the list says; what would lead elsewhere is listed with its provider."""
    first, second = upstreams(), upstreams()
    made = gateway(provider(first, "one", models=["a", "shared"]),
                   provider(second, "two", models=["shared", "b"]),
                   aliases={"fast": "two/b", "pattern-*": "a"})
    found = owners_of(made)
    assert found == {"fast": "two", "a": "one", "shared": "one", "two/shared": "two", "b": "two",
                     "m1": "one", "org/m2:free": "one", "two/m1": "two", "two/org/m2:free": "two"}
    for name, owner in found.items():
        assert made.state.router.resolve(name)[0].provider.name == owner, name
    assert owners_of(made) == found                              # the lists are kept
    assert len(first.requests) == len(second.requests) == 1


def test_a_list_that_comes_after_its_provider_has_moved_is_not_the_new_one_s(gateway, upstreams):
    go = threading.Event()
    old, new = upstreams(Reply(go, *model_list("old").steps)), upstreams(model_list("new"))
    made = gateway(old)
    asking = threading.Thread(target=ifl.models_of, args=(made,))
    asking.start()
    old.wait()
    made.apply(settings_for([new]))
    go.set()
    asking.join(WAIT_S)
    assert list(owners_of(made)) == ["new"]


def test_providers_that_swap_their_names_do_not_swap_their_lists(gateway, upstreams):
    upper, lower = upstreams(*[model_list("a")] * 2), upstreams(*[model_list("b")] * 2)
    made = gateway(provider(upper, "one"), provider(lower, "two"))
    assert owners_of(made) == {"a": "one", "two/b": "two"}
    made.apply(settings_for([provider(upper, "two"), provider(lower, "one")]))
    assert owners_of(made) == {"a": "two", "one/b": "one"}


@pytest.mark.parametrize("reply", [error_reply(500), plain(b"nope"), plain([1]),
                                   plain({"data": [5, {"id": 5}, {"id": "ok"}]}), Reply(RESET),
                                   plain(b'{"a":' * 100_000)])
def test_a_model_list_that_can_not_be_had_is_left_out(gateway, upstream, reply):
    made = gateway(provider(upstream, models=["mine"]))
    upstream.plays(reply)
    assert "mine" in owners_of(made) and set(owners_of(made)) <= {"mine", "ok"}


def test_health_of_a_gateway(gateway, upstream):
    bad = provider(upstream, api_keys=["$NOT_SET"])
    for providers, status in (([upstream], "healthy"), ([], "degraded"), ([bad], "degraded"),
                              ([bad, provider(upstream, "ok")], "healthy")):
        told = gateway(*providers, detect_local=False).health()
        assert told["status"] == status
    assert told["providers"][0]["problem"] and not told["providers"][0]["usable"]


# --- taking over changes -----------------------------------------------------

@pytest.fixture
def following(config):
    """following(value) -> a gateway that follows a config.json with this in it."""
    made: List[ifl.Gateway] = []

    def make(value, flags=None, environ=None):
        put_config(config, value)
        made.append(ifl.Gateway(config=config, environ=environ or {}, flags=flags or {}))
        return made[-1]
    yield make
    for gateway in made:
        gateway.close()


def test_a_change_on_disk_is_taken_over(following, config, monkeypatch):
    made = following({"default_model": "a"})
    watch = ifl.FileWatch
    monkeypatch.setattr(ifl, "FileWatch", lambda *facts, log: watch(*facts, 0.01, log))
    made.watch_files()
    put_config(config, {"default_model": "bb"})
    until(lambda: made.settings.default_model == "bb")
    put_config(config, b'{"default_model": "c"')
    until(lambda: made.config_broken)
    assert made.settings.default_model == "bb" and made.health()["status"] == "degraded"
    assert "line 1" in made.problems[-1]
    put_config(config, {"default_model": "dd", "providers": [provider("http://h")]})
    until(lambda: made.settings.default_model == "dd")
    assert not made.config_broken and made.problems == [] and made.health()["status"] == "healthy"


def test_a_bad_value_on_disk_keeps_the_one_in_force_and_is_forgotten_once_mended(following, config):
    made = following({"queue_limit": 5, "default_model": "a"})
    put_config(config, {"queue_limit": "x", "default_model": "b"})
    made.reload()
    assert (made.settings.queue_limit, made.settings.default_model) == (5, "b")
    assert "queue_limit" in made.problems[0]
    put_config(config, {})
    made.reload()
    assert made.problems == []


def test_a_login_counts_although_config_json_is_broken(following, config, home):
    made = following({"default_model": "a"})
    put_config(config, b"{")
    (home / ".iflow").mkdir()
    (home / ".iflow" / "settings.json").write_text('{"apiKey": "sk-login-1"}')
    made.reload()
    assert made.config_broken and made.settings.default_model == "a"
    assert made.state.router.providers["iflow"].api_keys == ("sk-login-1",)


def test_typing_errors_do_not_pile_up(following, config):
    made = following({})
    for blanks in range(20):
        put_config(config, b"{" + b" " * blanks)
        made.reload()
    assert len(made.problems) == 1 and "column 21" in made.problems[0]


#: What is wrong in a config.json as a whole, and what is said of it.
BAD_RELOADS = [
    ({"aliases": {"x": ["m-a", "oo/y"]}}, "no provider 'oo'"),
    ({"aliases": {"x": {"model": "m-a", "over_tokens": 0}}}, "over_tokens"),
    ({"client_keys": [{"name": "bob", "sha256": "0" * 64, "rpm": 0}]}, "client_keys[0].rpm: "),
    ({"retry": {"count": -1}}, "retry.count: "),
    ({"client_keys": [{"name": "b", "sha256": "0" * 64}] * 2}, "taken by an earlier"),
    ({"address_limits": {"tpd": -5}}, "tpd"), ({"default_provider": "nope"}, "no provider"),
    ({"aliases": {"*": "m-a", "x": "m-a"}}, "never reached")]


@pytest.mark.parametrize("bad, said", BAD_RELOADS, ids=[row[1] for row in BAD_RELOADS])
def test_a_bad_reload_leaves_the_last_good_in_force(following, config, bad, said):
    base = {"providers": [provider("http://h", "a", models=["m-a"])], "aliases": {"x": "m-a"},
            "retry": {"count": 1}, "client_keys": [key_entry("bob", "sk-bob")],
            "address_limits": {"rpm": 7}}
    made = following(base)
    before = made.settings
    assert made.problems == []
    put_config(config, {**base, **bad})
    made.reload()
    assert made.settings == before and made.state.auth.find(["sk-bob"]), made.problems
    assert any(said in problem for problem in made.problems)
    put_config(config, {**base, "retry": {"count": 2}})
    made.reload()
    assert made.problems == [] and made.settings.retry == {"count": 2}


def test_a_pattern_of_a_key_that_matches_no_model_is_named(following):
    keys = [key_entry("bob", "s", models=["gml-5", "glm-*", "a/*", "fast-1", "claude-opus"])]
    made = following({"providers": [provider("http://h", "a", models=["glm-5"])],
                      "aliases": {"fast-*": "glm-5"}, "client_keys": keys})
    assert made.problems == [
        "client_keys: bob: models: 'gml-5' matches nothing; did you mean glm-5 or a/glm-5?"]


def test_a_range_that_runs_backwards_is_no_error(following, monkeypatch):
    def early(name, pattern):                            # what fnmatch does before Python 3.10
        if "[z-a]" in pattern:
            raise re.error("bad character range z-a")
        return name == pattern
    monkeypatch.setattr(ifl, "fnmatchcase", early)
    made = following({"providers": [provider("http://h", "a", models=["m"])],
                      "aliases": {"x[z-a]": "m", "y": "m"},
                      "prices": {"[z-a]": {"input": 1}, "m": {"input": 2}},
                      "client_keys": [key_entry("bob", "s", models=["[z-a]"])]})
    assert made.problems == ["client_keys: bob: models: '[z-a]' matches nothing"]
    router, prices = made.state.router, made.settings.prices
    assert [router.resolve(name)[0].model for name in ("y", "x[z-a]", "z")] == ["m", "m", "z"]
    assert not ifl.may_use(router, made.state.auth.keys[0], "m", router.resolve("m"))
    assert ifl.cost_of("m", "a", {"input": 10, "cached": 0, "output": 0}, prices) == 20 / 1e6


def test_flags_and_variables_stay_above_a_changed_file(following, config):
    made = following({"default_model": "a", "queue_limit": 1}, {"default_model": "flag"},
                     {"IFLOW2API_QUEUE_LIMIT": "9"})
    put_config(config, {"default_model": "b", "queue_limit": 2, "drain_s": 3})
    made.reload()
    assert (made.settings.default_model, made.settings.queue_limit,
            made.settings.drain_s) == ("flag", 9, 3)


def test_a_running_call_keeps_its_settings(server, upstreams):
    go = threading.Event()
    old, new = upstreams(sse(chunk("x"), go, chunk(finish="stop"), DONE)), upstreams()
    running = server(old)
    with Client(running) as client:
        client.post(chat(True)).head()
        running.gateway.apply(settings_for([new]))
        assert post(running, chat()).status == 200 and len(new.requests) == 1
        go.set()
        assert records_of(client.pieces())[-1] == DONE


def test_a_reload_keeps_streams_rests_and_places(server, following, config, upstream):
    go = threading.Event()
    upstream.plays(sse(chunk("x"), go, chunk(finish="stop"), DONE))
    entry = provider(upstream, "a", api_keys=["k1", "k2"], models=["m"], key_concurrency=1)
    running = server(gateway=following({"providers": [{**entry, "kind": "iflow"}]}))
    with Client(running) as client:
        client.post(chat(True)).head()
        running.gateway.lanes["a"].rests.rest("k2", 500)
        entry = {**entry, "kind": "iflow", "api_keys": ["k1", "k2", "k3"]}
        put_config(config, {"providers": [entry], "sticky": True})
        running.gateway.reload()
        lane = running.gateway.lanes["a"]
        assert lane.provider.api_keys == ("k1", "k2", "k3")
        assert (lane.rests.resting, key_load(lane), lane.slots.active) == (1, 1, 1)
        go.set()
        assert records_of(client.pieces())[-1] == DONE
    until(lambda: key_load(lane) == 0 == lane.slots.load)


def test_changes_by_the_program_are_taken_over_at_once(following, config):
    made = following({"extra": 1})
    made.change_config(lambda raw: raw.update(default_model="x"))
    assert made.settings.default_model == "x" and config.read() == {"extra": 1,
                                                                    "default_model": "x"}


def test_a_config_with_settings_that_are_gone_starts_and_keeps_them(following, config, upstream):
    gone = {"history_size": 7, "responses_file": "/x", "key_concurrency": 3}
    entry = provider(upstream, key_concurrency=2)
    made = following({"providers": [entry], **gone})
    assert made.problems == [] and made.lanes["up"].slots.limit == 0
    made.change_config(lambda raw: raw.update(default_model="m"))
    assert config.read() == {"providers": [entry], **gone, "default_model": "m"}


def test_an_address_open_to_the_network_needs_no_further_key(gateway):
    made = gateway(client_keys=[key_entry("bob", "sk-bob")])
    assert made.ensure_client_key() == ("", True) and made.settings.custom_api_key == ""


# === 15. Fallback, keys, limits, usage =======================================

# --- conditions and explanations ---------------------------------------------

def routed(aliases, **more):
    providers = [provider("http://h", "z", models=["glm-5", "glm-v"]), provider("http://o", "o")]
    return ifl.Router(ifl.Settings(providers=providers, aliases=aliases, **more), {})


ROUTE = ["glm-5", {"model": "o/long/context:x", "over_tokens": 60000},
         {"model": "glm-v", "images": True},
         {"model": ["o/think", "o/think2"], "thinking": True, "tools": False},
         {"model": "o/msg", "dialect": "messages"}, "o/last"]


@pytest.mark.parametrize("asked, chain", [
    ({}, ["z/glm-5", "o/last"]), ({"size_tokens": 60000}, ["z/glm-5", "o/last"]),
    ({"size_tokens": 60001}, ["o/long/context:x", "z/glm-5", "o/last"]),
    ({"size_tokens": 60001, "shows_images": True}, ["o/long/context:x", "z/glm-5", "o/last"]),
    ({"shows_images": True}, ["z/glm-v", "z/glm-5", "o/last"]),
    ({"thinks": True}, ["o/think", "o/think2", "z/glm-5", "o/last"]),
    ({"thinks": True, "has_tools": True}, ["z/glm-5", "o/last"]),
    ({"speaks": "messages"}, ["o/msg", "z/glm-5", "o/last"])])
def test_the_first_entry_whose_conditions_hold_begins_the_chain(asked, chain):
    router, told = routed({"claude-*": ROUTE}), []
    found = router.resolve("claude-opus", ifl.Asked(**asked), told)
    assert [f"{target.provider.name}/{target.model}" for target in found] == chain
    assert "makes it" in " ".join(ifl.explain_steps(told, True)) and "alias" in dict(told)
    assert router.warnings == []


def test_an_alias_of_conditions_alone_lets_other_requests_pass():
    router, told = routed({"glm-*": {"model": "o/x", "images": True}}), []
    assert router.resolve("glm-5", told=told)[0].provider.name == "z"
    assert "nothing for such a request" in ifl.explain_steps(told, True)[1]
    assert router.resolve("glm-5", ifl.Asked(shows_images=True))[0].model == "x"


@pytest.mark.parametrize("name, place", [
    ("z/模型:自由/x", "z/模型:自由/x"), ("é", "o/ü:1/ß"), ("m[1m]", "o/one"),
    ("a/b/c:d", "z/a/b/c:d")])
def test_names_with_slashes_colons_brackets_and_other_letters(name, place):
    target, = routed({"é": "o/ü:1/ß", "m[1m]": "o/one"}).resolve(name)
    assert f"{target.provider.name}/{target.model}" == place


@pytest.mark.parametrize("aliases, said", [
    ({"x": {"model": "glm-5", "over_tokens": 0}}, "alias 'x'.over_tokens: a whole number from 1"),
    ({"x": [{"model": "glm-5", "over_tokens": -5}]}, "over_tokens"),
    ({"x": [{"model": "glm-5", "images": 1}]}, "images: true or false"),
    ({"x": {"model": "glm-5", "weather": "fine"}}, "weather: no such field"),
    ({"x": {"images": True}}, "a model or a list"),
    ({"x": {"model": "glm-5", "dialect": "klingon"}}, 'dialect: one of "chat", "messages"'),
    ({"claude-*": "glm-5", "claude-opus": "o/x"}, "'claude-opus' is never reached: 'claude-*'"),
    ({"": "glm-5"}, "matches nothing")])
def test_bad_aliases_are_named(aliases, said):
    router = routed(aliases)
    assert said in router.warnings[0] and router.conflicting == {"aliases"}


def test_an_unknown_provider_in_a_chain_is_named_and_left_out():
    """Unless it may be a model of a default provider that lists nothing."""
    one = [provider("http://h", "zhipu", models=["glm-5"])]
    aliases = {"x": ["glm-5", "zhipo/glm"], "y": "deep/seek"}
    router = ifl.Router(ifl.Settings(providers=one, aliases=aliases), {})
    assert [router.resolve(name)[0].model for name in "xy"] == ["glm-5", "y"]
    assert len(router.resolve("x")) == 1 and router.warnings == [
        "alias 'x'[1]: 'zhipo/glm': there is no provider 'zhipo'; did you mean zhipu?",
        "alias 'y'[0]: 'deep/seek': there is no provider 'deep'"]
    assert routed({"x": ["glm-5", "a/b/c:d"]}, default_provider="o").warnings == []


BIG_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 90000}}


@pytest.mark.parametrize("body, size, facts", [
    ({"messages": [{"role": "user", "content": "x" * 4000}]}, 1000, ""),
    ({"messages": [{"role": "user", "content": "字" * 4000}]}, 3000, ""),
    ({"reasoning_effort": "high"}, 0, "t"), ({"reasoning_effort": "none"}, 0, ""),
    ({"thinking": {"type": "adaptive"}}, 0, "t"), ({"thinking": {"type": "disabled"}}, 0, ""),
    ({"reasoning": {"effort": "low"}}, 0, "t"), ({"enable_thinking": True}, 0, "t"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, 0, "t"),
    ({"tools": [{}]}, 0, "o"), ({"tools": []}, 0, ""),
    ({"input": [{"type": "additional_tools"}]}, 0, "o"),
    ({"thinking": 5, "reasoning": "x", "input": 5}, 0, ""),
    ({"messages": [{"content": [BIG_IMAGE]}]}, 1500, "i")])
def test_what_a_request_is_like(body, size, facts):
    dialect = ifl.RESPONSES if "input" in body else ifl.CHAT
    call = ifl.Call(dialect, body, json.dumps(body, ensure_ascii=False), {}, "r")
    assert abs(call.size_tokens - size) < 60
    assert (call.thinks, call.has_tools, call.shows_images) == tuple(
        letter in facts for letter in "toi")


def test_conditions_are_asked_for_only_where_there_are_any(monkeypatch, server, upstream):
    for name in ("size_tokens", "conversation"):
        monkeypatch.setattr(ifl.Call, name, property(lambda call: 1 / 0))
    assert post(server(upstream), chat()).status == 200


# --- plans -------------------------------------------------------------------

class Followed:
    """A plan of providers that each have some keys, and the answers that its attempts get."""

    def __init__(self, chain, keys=(), circuit=None, **retry):
        self.clock, self.chain, self.retry = Clock(), chain, {**ifl.RETRY, **retry}
        self.circuit = circuit or {"failures": 2, "rest_s": 30}
        self.rests = {name: ifl.Rests(self.clock) for name in chain}
        self.keys = {name: [f"{name}{n}" for n in range(1, dict(keys).get(name, 1) + 1)]
                     for name in chain}

    def rests_of(self, target):
        return self.rests[target.provider.name]

    def free_keys(self, target):
        free = [key for key in self.keys[target.provider.name]
                if not self.rests_of(target).left_s(key)]
        return free or ["last"]

    def plan(self):
        targets = [ifl.Target(ifl.Provider(name), "m") for name in self.chain]
        return ifl.Plan(targets, self.free_keys, self.rests_of, self.retry, self.circuit,
                        self.clock)

    def follow(self, *answers, began=False, **facts):
        """The steps of one call, `raises STATUS` where it ends in an error; the answers are its
        attempts'.
        """
        plan, steps, left = self.plan(), [], list(answers)
        try:
            while True:
                step = plan.next()
                self.clock.now += step.wait_s
                steps.append(plan.take_key() + (f" after {step.wait_s:g}" if step.wait_s else ""))
                answer = left.pop(0) if left else 200
                if answer == 200:
                    plan.succeeded()
                    return steps
                status, after_s = answer if isinstance(answer, tuple) else (answer, None)
                plan.failed(ifl.UpstreamRefused("no", status=status, retry_after_s=after_s,
                                                **facts), began)
        except ifl.UpstreamRefused as exc:
            return [*steps, f"raises {exc.status}"]


#: id, chain, number of keys, retries, answers of the attempts, the steps that come of them.
PLANS = [
    ("the first one answers", "ab", {}, 0, [200], ["a1"]),
    ("the next one is asked", "abc", {}, 0, [503, 429, 200], ["a1", "b1", "c1"]),
    ("nobody is left", "ab", {}, 0, [503, 429], ["a1", "b1", "raises 429"]),
    ("a refused key gives way", "ab", {"a": 3}, 0, [401, 429, 200], ["a1", "a2", "a3"]),
    ("all keys are refused", "ab", {"a": 2}, 0, [401, 403, 200], ["a1", "a2", "b1"]),
    ("not the fault of a key", "ab", {"a": 2}, 0, [500, 200], ["a1", "b1"]),
    ("no balance is no key's fault", "ab", {"a": 2}, 0, [402, 200], ["a1", "b1"]),
    ("the request is at fault", "ab", {"a": 2}, 5, [400], ["a1", "raises 400"]),
    ("no such model", "ab", {}, 5, [404], ["a1", "raises 404"]),
    ("too large", "ab", {}, 5, [413], ["a1", "raises 413"]),
    ("no sense in it", "ab", {}, 5, [422], ["a1", "raises 422"]),
    ("again after the backoff", "a", {}, 2, [503, 503, 200], ["a1", "a1 after 0.5", "a1 after 1"]),
    ("again, and no more", "a", {}, 1, [503, 500], ["a1", "a1 after 0.5", "raises 500"]),
    ("what was asked for", "a", {}, 1, [(529, 7), 200], ["a1", "a1 after 7"]),
    ("longer than the total", "a", {}, 1, [(529, 61)], ["a1", "raises 529"]),
    ("a refusal is final", "a", {}, 3, [403], ["a1", "raises 403"]),
    ("who asked for longer comes later", "ab", {}, 2, [(529, 9), 503, 503, 200],
     ["a1", "b1", "b1 after 0.5", "b1 after 1"]),
    ("each at its time", "ab", {}, 3, [(529, 2), (503, 1), 503, 503, 200],
     ["a1", "b1", "b1 after 1", "a1 after 1", "b1"]),
    ("a limited key that rests", "a", {}, 1, [(429, 4), 200], ["a1", "a1 after 4"]),
]


@pytest.mark.parametrize("chain, keys, count, answers, steps", [row[1:] for row in PLANS],
                         ids=[row[0] for row in PLANS])
def test_plans(chain, keys, count, answers, steps):
    assert Followed(chain, keys, count=count).follow(*answers) == steps


@pytest.mark.parametrize("facts, steps", [
    ({"should_retry": False}, ["a1", "raises 503"]),
    ({"overflow": (1, 2, 3)}, ["a1", "raises 503"]), ({}, ["a1", "a1 after 0.5"])])
def test_what_is_not_worth_a_retry(facts, steps):
    assert Followed("a", count=1).follow(503, **facts) == steps


def test_nobody_else_is_asked_once_the_answer_has_begun():
    made = Followed("ab", {"a": 2}, count=3)
    for status in (401, 429, 500, 503):
        assert made.follow(status, began=True) == ["a1", f"raises {status}"]
    assert not made.rests["a"].resting


def test_a_provider_that_keeps_failing_comes_last_and_is_tried_again():
    made = Followed("ab")
    rests = made.rests["a"]
    assert [made.follow(status) for status in (503, 408)] == [["a1", "b1"]] * 2
    assert rests.state == "open" and made.follow() == ["b1"]
    assert made.follow(503) == ["b1", "a1"]              # nobody else: it is worth a try, and works
    assert rests.state == "closed"
    made.follow(503), made.follow(503)
    made.clock.now += 30
    assert rests.state == "half-open"
    assert made.follow(503) == ["a1", "b1"] and made.follow() == ["b1"]
    made.clock.now += 30
    assert rests.admits(30) and not rests.admits(30)     # one is let through
    made.clock.now += 30
    assert made.follow() == ["a1"] == made.follow() and rests.state == "closed"


@pytest.mark.parametrize("answer", [400, 401, 404, 422, 429])
def test_a_refusal_shows_that_a_provider_is_alive(answer):
    made = Followed("a")
    made.follow(503), made.follow(answer)
    assert made.rests["a"].failures == 0


def test_a_provider_without_another_never_rests():
    made = Followed("a")
    for _ in range(5):
        assert made.follow(503) == ["a1", "raises 503"]
    assert made.rests["a"].state == "open" and made.follow() == ["a1"]


def test_a_mended_request_goes_to_the_same_place_with_the_same_key_or_a_fresh_one():
    plan, found = Followed("a", {"a": 2}).plan(), []
    for fresh in (None, "", "fresh"):
        if fresh is not None:
            plan.repeat(*filter(None, [fresh]))
        step = plan.next()
        found.append((step.target.provider.name, step.wait_s, step.is_same, plan.take_key()))
    assert found == [("a", 0, False, "a1"), ("a", 0, True, "a1"), ("a", 0, True, "fresh")]
    assert plan.take_key() == "a2"


def test_our_own_full_queue_says_nothing_of_the_provider():
    made = Followed("ab", circuit={"failures": 1, "rest_s": 30})
    plan = made.plan()
    for name in "ab":
        assert plan.next().target.provider.name == name
        assert not plan.failed(ifl.Busy("full"), False)
    with pytest.raises(ifl.Busy):
        plan.next()
    assert {rests.state for rests in made.rests.values()} == {"closed"}


# --- the next target ---------------------------------------------------------

#: Answers after which the next target is tried, and after which it is not.
FALLS = [
    ("refused connection", None), ("reset", Reply(RESET)), ("silence", Reply(HOLD)),
    ("empty", plain(b"")), ("garbage", plain(b"{")),
    ("cut", Reply(head(200, [("Content-Length", "9")]) + b"{", CLOSE)),
    ("redirect", Reply(head(301, [("Location", "/")]))),
    ("html", plain(b"<html><title>Bad Gateway</title>", 502, content_type="text/html")),
    *((f"{status}", error_reply(status))
      for status in (401, 402, 403, 408, 409, 425, 429, 500, 502, 503, 504, 529)),
    ("error in a 200", plain({"error": {"message": "x", "code": "500"}})),
    ("no answer", plain(completion("", usage={"prompt_tokens": 1})))]
STAYS = [(f"{status}", error_reply(status)) for status in (400, 404, 405, 413, 415, 418, 422)]
STREAM_FALLS = [
    ("only [DONE]", sse(DONE)), ("role only", sse(ROLE, DONE)), ("nothing", sse()),
    ("finish only", sse(ROLE, chunk(finish="stop"), DONE)),
    ("error first", sse({"error": {"message": "x", "code": 500}})),
    ("error after the role", sse(ROLE, {"error": {"message": "x"}})),
    ("died", sse(ROLE, end=False)), ("reset after the role", sse(ROLE, RESET)),
    ("garbage in a stream", sse(b"data: nope\n\n")), ("silent", sse(ROLE, HOLD)),
    ("page", plain(b"<html>", content_type="text/html")),
    ("empty completion", plain({"choices": []}))]
TARGETS_TRIED = [*((stream, *row, True) for stream in (False, True) for row in FALLS),
                 *((stream, *row, False) for stream in (False, True) for row in STAYS),
                 *((True, *row, True) for row in STREAM_FALLS)]


@pytest.mark.parametrize("stream, name, reply, falls", TARGETS_TRIED,
                         ids=[f"{row[1]}-{'stream' if row[0] else 'plain'}"
                              for row in TARGETS_TRIED])
def test_when_the_next_target_is_tried(chain, upstreams, stream, name, reply, falls):
    first, second = upstreams(), upstreams()
    is_silent = reply is not None and HOLD in reply.steps
    entry = provider(first, "one", **({"timeout_s": 0.2} if is_silent else {}))
    if reply is None:
        first.close()
    else:
        first.plays(reply)
    running = chain(entry, second)
    answer = post(running, chat(stream, "m"))
    assert (answer.status == 200) is falls, answer
    assert not falls or (records_of(answer.body) == HELLO if stream
                         else answer.json == completion())
    assert [seen.json["model"] for seen in first.requests] == ([] if reply is None else ["a"])
    assert [seen.json["model"] for seen in second.requests] == (["b"] if falls else [])
    assert is_well(running)
    record, = ifl.history_of(running.gateway)
    assert record["target"] == ("two/b" if falls else "one/a")
    assert [tried["provider"] for tried in record["attempts"]] == ["one", "two"][:1 + falls]


def test_nothing_follows_an_answer_that_has_begun(chain, upstreams):
    first, second = upstreams(sse(ROLE, chunk("x"), end=False)), upstreams()
    running = chain(first, second, retry={"count": 5})
    *begun, failed = records_of(post(running, chat(True, "m")).body)
    assert begun == [ROLE, chunk("x")] and "cut off" in failed["error"]["message"]
    assert (len(first.requests), len(second.requests)) == (1, 0)


def test_the_last_error_of_a_chain_is_told(chain, upstreams):
    answer = post(chain(upstreams(error_reply(500)), upstreams(error_reply(429))), chat(model="m"))
    assert (answer.status, answer.error["message"]) == (429, "status 429")
    assert answer.headers["retry-after"] == "5"


def test_a_disabled_provider_gives_way(chain, upstreams):
    first, second = upstreams(), upstreams()
    running = chain(provider(first, "one", api_keys=["$NOT_SET"]), second)
    assert post(running, chat(model="m")).status == 200
    assert (len(first.requests), len(second.requests)) == (0, 1)


def test_a_busy_target_gives_way_to_the_next(chain, upstreams):
    go = threading.Event()
    first, second = upstreams(sse(chunk("x"), go, DONE)), upstreams()
    running = chain(provider(first, "one", concurrency=1), second, queue_limit=0)
    with Client(running) as client:
        client.post(chat(True, "one/a"))
        first.wait()
        assert post(running, chat(model="m")).status == 200 and len(second.requests) == 1
        go.set()
        client.answer()


@pytest.fixture
def pauses(clock):
    """The pauses before retries, which crank the clock instead of passing."""
    class Pauses(list):
        def __call__(self, client, seconds):
            self.append(seconds)
            clock.now += seconds
    return Pauses()


def test_retries_back_off_with_jitter_and_end(server, upstream, clock, pauses):
    running = server(upstream, clock=clock, pause=pauses,
                     retry={"count": 4, "backoff_s": 1, "max_backoff_s": 3})
    upstream.plays(*[error_reply(503)] * 5, *[error_reply(500)] * 2)
    assert post(running, chat()).status == 503 and len(upstream.requests) == 5
    for pause, most in zip(pauses, (1, 2, 3, 3)):
        assert most / 2 <= pause <= most
    assert post(running, chat()).status == 200 and len(upstream.requests) == 8


def test_an_upstream_that_keeps_failing_rests_and_is_tried_again(chain, upstreams, clock):
    bad, good = upstreams(*[error_reply(500)] * 6), upstreams()
    running = chain(bad, good, clock=clock, circuit={"failures": 3, "rest_s": 20})

    def ask(times):
        for _ in range(times):
            assert post(running, chat(model="m")).status == 200
        circuit = get(running, "/health").json["providers"][0]["circuit"]
        return len(bad.requests), circuit

    assert ask(10) == (3, "open") and len(good.requests) == 10
    assert metrics_at(running)['iflow2api_upstream_rested{provider="one"}'] == 1
    for calls in (4, 5, 6):              # half-open: one request, and if that fails another rest
        clock.now += 20
        assert ask(0)[1] == "half-open" and ask(2) == (calls, "open")
    clock.now += 20
    assert ask(2) == (8, "closed")


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_rest_is_over_before_the_answer_that_ends_it(chain, upstreams, clock, path, stream):
    bad, good = upstreams(error_reply(500)), upstreams()
    running = chain(bad, good, clock=clock, circuit={"failures": 1, "rest_s": 20})
    ask_in(running, path, stream, model="m")
    clock.now += 20
    learnt, lane = threading.Event(), running.gateway.lanes["one"]
    lane.learn_count = lambda *counts: learnt.wait(WAIT_S)       # it comes after the answer's end
    assert lane.rests.state == "half-open"
    assert ask_in(running, path, stream, model="m").status == 200
    assert lane.rests.state == "closed" and len(bad.requests) == 2
    learnt.set()


# --- keys of an upstream -----------------------------------------------------

def used_keys(fake):
    return [seen.headers["authorization"].rpartition(" ")[2] for seen in fake.requests]


def keys_resting(running):
    return metrics_at(running)['iflow2api_keys_resting{provider="up"}']


@pytest.mark.parametrize("status", [401, 403, 429])
def test_a_refused_key_gives_way_rests_and_revives(server, upstream, clock, status):
    upstream.plays(error_reply(status))
    running = server(provider(upstream, api_keys=["k1", "k2", "k3"]), clock=clock)
    for _ in range(4):
        assert post(running, chat()).status == 200
    assert used_keys(upstream)[0] == "k1" and keys_resting(running) == 1
    assert set(used_keys(upstream)[1:]) == {"k2", "k3"}
    clock.now += ifl.REFUSED_KEY_REST_S
    for _ in range(3):
        assert post(running, chat()).status == 200
    assert "k1" in used_keys(upstream)[5:] and keys_resting(running) == 0


def test_a_limited_key_does_not_rest_for_ever(server, upstream, clock):
    upstream.plays(plain({"error": "x"}, 429, [("Retry-After", "9999999")]))
    running = server(provider(upstream, api_keys=["k1", "k2"]), clock=clock)
    assert post(running, chat()).status == 200 and keys_resting(running) == 1
    clock.now += 3600
    assert keys_resting(running) == 0


def test_an_error_that_is_not_about_the_key_is_not_tried_with_another(server, upstream):
    upstream.plays(error_reply(500), error_reply(400), error_reply(500))
    running = server(provider(upstream, api_keys=["k1", "k2"]))
    assert [post(running, chat()).status for _ in range(4)] == [500, 400, 500, 200]
    assert used_keys(upstream) == ["k1", "k2", "k1", "k2"] and keys_resting(running) == 0


@pytest.mark.parametrize("status, shown", [(401, 403), (403, 403), (429, 429)])
def test_when_every_key_is_refused_each_was_asked_once(chain, upstreams, status, shown):
    first, second = upstreams(*[error_reply(status)] * 4), upstreams()
    running = chain(provider(first, "one", api_keys=["k1", "k2", "k3"]), second)
    answer = post(running, chat(model="one/a"))
    assert answer.status == shown and used_keys(first) == ["k1", "k2", "k3"]
    assert answer.headers.get("x-should-retry") == ("false" if shown == 403 else None)
    assert post(running, chat(model="m")).status == 200 and len(second.requests) == 1


def test_a_conversation_keeps_its_key(server, upstream, clock):
    running = server(provider(upstream, api_keys=["k1", "k2", "k3"]), clock=clock, sticky=True)

    def ask(number):
        assert post(running, chat(), session_id=f"s{number}").status == 200
        return used_keys(upstream)[-1]

    keys = [ask(number % 4) for number in range(12)]
    assert keys[:4] * 3 == keys and len(set(keys)) > 1
    running.gateway.lanes["up"].rests.rest(keys[0], 60)
    assert ask(0) != keys[0]
    clock.now += 60
    assert ask(0) == keys[0]


def test_a_conversation_is_known_by_its_beginning():
    def of(*texts, headers=(), **body):
        body["messages"] = [{"role": "user", "content": text} for text in texts]
        return ifl.Call(ifl.CHAT, body, "", dict(headers), "r").conversation

    assert of("a", "b", "c") == of("a", "b", "d", "e") != of("x", "b")
    assert of("a", prompt_cache_key="k") == of("b", prompt_cache_key="k")
    session, agent = ("x-claude-code-session-id", "s"), ("x-claude-code-agent-id", "1")
    assert of("a", headers=[session]) == of("b", headers=[session])
    assert of("a", headers=[session, agent]) == of("b", headers=[session, agent])
    assert len({of("a", headers=headers) for headers in (
        [], [session], [agent], [session, agent], [session, (agent[0], "2")])}) == 5
    assert ifl.Call(ifl.CHAT, {"input": 5}, "", {}, "r").conversation != of("a")


def test_never_more_at_an_account_than_its_places(server, upstreams):
    now, most, lock, go = {}, {}, threading.Lock(), threading.Event()

    def answer(seen):
        key = seen.headers["authorization"]
        with lock:
            now[key] = now.get(key, 0) + 1
            most[key] = max(most.get(key, 0), now[key])
        go.wait(WAIT_S)
        with lock:
            now[key] -= 1
        return usual_reply(seen)

    fake = upstreams(usual=answer)
    running = server(provider(fake, kind="iflow", api_keys=["k1", "k2", "k3"]), api_concurrency=1)
    lane = running.gateway.lanes["up"]

    def ask(index):
        if index == 20:
            until(lambda: len(fake.requests) >= 2 and lane.slots.load == 20, what="the queue")
            go.set()
        return index == 20 or post(running, chat()).status

    assert set(at_once(21, ask)) == {200, True}
    assert len(fake.requests) == 20 and len(most) == 3 and set(most.values()) == {1}
    until(lambda: lane.slots.load == 0 == key_load(lane))


# --- whatever fails ----------------------------------------------------------

#: Without a reset: on a kept connection it is tried again on a new one.
FAILURES = [row[1] for row in FALLS if row[0] not in ("refused connection", "silence", "reset")]
RANDOM_REPLIES = [usual_reply, usual_reply, usual_reply, error_reply(400), error_reply(404),
                  plain({"error": "x"}, 429, [("Retry-After", "3")]), *FAILURES]


def check_answer(answer, path, stream) -> None:
    """One whole answer, or one error, in the words of its path."""
    text = answer.body.decode()
    if answer.status != 200:
        assert 400 <= answer.status < 600 and answer.json["error"]["message"]
    elif not stream:
        assert answer.json["id"]
    else:
        end = "event: message_stop" if "messages" in path else "[DONE]"
        assert text.count(end) == 1 and "error" not in text


@pytest.mark.parametrize("seed", range(12))
def test_whatever_fails_there_is_one_answer_and_few_calls(chain, upstreams, clock, pauses, seed):
    """At most (retries + 1) x keys calls at each upstream."""
    rnd = random.Random(seed)
    count, keys = rnd.choice((0, 1, 3)), [rnd.choice((1, 2, 3)) for _ in range(4)]
    fakes = [upstreams(*rnd.choices(RANDOM_REPLIES, k=100)) for _ in range(4)]
    entries = [provider(fake, name, api_keys=[f"{name}-{key}" for key in range(number)])
               for fake, name, number in zip(fakes, ("one", "two", "three", "four"), keys)]
    running = chain(*entries, clock=clock, pause=pauses,
                    retry={"count": count, "total_s": 1000},
                    circuit={"failures": rnd.choice((0, 2)), "rest_s": 9})
    for _ in range(6):
        before = [len(fake.requests) for fake in fakes]
        path, stream = rnd.choice(("/v1/chat/completions", "/v1/messages")), rnd.random() < 0.5
        check_answer(post(running, chat(stream, "m", max_tokens=9), path), path, stream)
        for fake, start, number in zip(fakes, before, keys):
            assert len(fake.requests) - start <= (count + 1) * number
        clock.now += rnd.choice((0, 5, 400))
    assert is_well(running) and len(ifl.history_of(running.gateway)) == 6
    assert all(lane.slots.load == 0 for lane in running.gateway.lanes.values())


class QuickUpstream:
    """Keep-alive on bare sockets; `plan(number)` is the status of each answer, None hangs up
    without one.
    """
    REQUEST = re.compile(rb"(?is)content-length: *(\d+).*?\r\n\r\n")

    def __init__(self, plan):
        self.plan, self.numbers, self.connections = plan, itertools.count(1), 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = "http://127.0.0.1:%d/v1" % self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                peer = self.listener.accept()[0]
                self.connections += 1
                threading.Thread(target=self.serve, args=(peer,), daemon=True).start()

    def serve(self, peer):
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with peer, contextlib.suppress(OSError):
            while True:
                data = self.request(peer)
                status = self.plan(next(self.numbers)) if data else None
                if status is None:
                    break
                for step in self.answer(status, b'"stream": true' in data).steps:
                    peer.sendall(step)

    def request(self, peer):
        data, found = b"", None
        while not found or len(data) < found.end() + int(found.group(1)):
            more = peer.recv(65536)
            if not more:
                return b""
            data += more
            found = self.REQUEST.search(data)
        return data

    @staticmethod
    @functools.lru_cache(maxsize=None)
    def answer(status, stream):
        if status != 200:
            return error_reply(status, **{"Retry-After": "1"})
        return sse(wire_of(HELLO)) if stream else plain(completion())

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def mixed_plan(offset):
    """Most requests are answered; each upstream fails at numbers of its own."""
    def plan(number):
        number += offset
        return (500 if number % 17 == 0 else 429 if number % 29 == 0
                else None if number % 101 == 0 else 200)
    return plan


class Load:
    """4 threads with 3 keys at 4 providers, of 3 keys each, that fail in turn; files on disk."""

    def __init__(self, config):
        self.ups = [QuickUpstream(mixed_plan(offset)) for offset in range(4)]
        providers = [provider(up, name, api_keys=[f"{name}-{key}" for key in range(3)],
                              models=[f"m-{name}"], concurrency=3)
                     for name, up in zip("abcd", self.ups)]
        keys = [key_entry(f"k{n}", f"sk-{n}", rpd=10 ** 6, tpd=10 ** 9, concurrency=100)
                for n in range(3)]
        put_config(config, {"providers": providers, "log_level": "error", "client_keys": keys,
                            "aliases": {"chain": [f"m-{name}" for name in "abcd"]}})
        self.gateway = ifl.Gateway(config=config, environ={}, clock=Clock())
        self.gateway.ledger.COMPACT_LINES = 200
        self.answered, self.failed, self.odd = [0] * 4, [0] * 4, []

    def ask(self, number, turn) -> None:
        gateway, stream = self.gateway, (turn + number) % 2 == 0
        key = gateway.state.auth.keys[turn % 3]
        meters = [gateway.limiter.of_key(key),
                  gateway.limiter.of_address(f"{turn % 40:08x}", {"rpd": 10 ** 6})]
        body = chat(stream, "chain" if turn % 3 else f"m-{'abcd'[turn % 4]}")
        client = ifl.Collect()
        try:
            with gateway.limiter.hold(meters):
                gateway.answer(ifl.Call(ifl.CHAT, body, json.dumps(body), {}, "req_0123456789",
                                        key, meters), client)
            self.answered[number] += 1
            if client.data.count(b"[DONE]") != stream:
                self.odd.append(client.data)
        except ifl.GatewayError as exc:
            self.failed[number] += 1
            self.odd.extend([exc] if exc.status not in (429, 500, 502) else [])

    def wave(self, requests) -> int:
        """Blocks in memory after so many requests of each thread."""
        at_once(4, lambda number: [self.ask(number, turn) for turn in range(requests)])
        gc.collect()
        return sys.getallocatedblocks()


def test_thousands_of_requests_leave_places_threads_and_memory_where_they_were(config):
    load = Load(config)
    gateway = load.gateway
    load.wave(300)                       # pools, caches and tables are filled
    before, threads = load.wave(100), threading.active_count()
    after, total = load.wave(600), 4000
    assert not load.odd and sum(load.answered) + sum(load.failed) == total
    assert sum(load.answered) > 0.9 * total and sum(load.failed) > 10
    assert after - before < 1200, after - before         # a block a request would be 2400
    assert threading.active_count() <= threads + 8       # the upstreams' own
    assert gateway.in_flight == 0
    assert all(lane.slots.load == key_load(lane) == 0 for lane in gateway.lanes.values())
    meters = [*gateway.limiter._keys.values(), *gateway.limiter._addresses.values()]
    assert all(meter.active == 0 for meter in meters) and len(meters) == 3 + 40
    assert len(ifl.history_of(gateway)) == ifl.HISTORY_SIZE
    assert sum(up.connections for up in load.ups) < 600          # kept, but for those that ended
    used = {row["key"]: row["requests"] for row in gateway.ledger.report("key", 2, {})}
    assert set(used) == {"k0", "k1", "k2"} and sum(used.values()) == total
    assert sum(gateway.limiter.of_key(key).windows["rpd"].used(1000.0)
               for key in gateway.state.auth.keys) == total
    assert lines_in(pathlib.Path(gateway.ledger.path)) < 1000 and not gateway.ledger.problems
    gateway.close()
    for up in load.ups:
        up.close()
    until(lambda: threading.active_count() < threads, what="the end of threads")


# --- client keys -------------------------------------------------------------

def bob(**limits):
    """Settings with a client key for bob, and with one for eve that has no limits."""
    return {"client_keys": [key_entry("bob", "sk-bob", **limits), key_entry("eve", "sk-eve")]}


def test_keys_are_taken_from_wherever_clients_put_them(server, upstream):
    running = server(provider(upstream, api_keys=["k1"]), **bob(), custom_api_key="sk-master",
                     custom_auth_header="X-My-Key")
    for headers in ({"authorization": "Bearer sk-bob"}, {"x_api_key": "sk-bob"},
                    {"api_key": "sk-bob"}, {"X_My_Key": "sk-bob"},
                    {"authorization": "bearer sk-master"}, {"x_api_key": "sk-master"}):
        assert post(running, chat(), **headers).status == 200
    for headers in ({}, {"authorization": "Bearer sk-bo"}, {"x_api_key": "sk-bobb"},
                    {"authorization": "Basic sk-bob"},
                    {"x_api_key": ifl.sha256("sk-bob").hex()}):
        answer = post(running, chat(), **headers)
        assert (answer.status, answer.error["type"]) == (401, "authentication_error")
    assert used_keys(upstream) == ["k1"] * 6
    assert get(running, "/health").status == 200 and get(running, "/metrics").status == 401
    assert get(running, "/metrics", x_api_key="sk-bob").status == 200


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_key_beyond_ascii(server, upstream, encoding):
    """HTTP has no charset for headers: most clients send UTF-8, some latin-1."""
    running = server(upstream, custom_api_key="schlüssel", client_keys=[key_entry("bob", "böb")])
    for key, status in (("schlüssel", 200), ("böb", 200), ("schlussel", 401)):
        sent = key.encode(encoding).decode("latin-1")
        assert post(running, chat(), x_api_key=sent).status == status
        assert post(running, chat(), authorization="Bearer " + sent).status == status


def test_an_expired_key_and_no_usable_one(server, upstream):
    running = server(upstream, client_keys=[key_entry("old", "sk-old", expires="2001-01-01"),
                                            {"name": "broken"}])
    answer = post(running, chat(), x_api_key="sk-old")
    assert answer.status == 401 and "old expired on 2001-01-02" in answer.error["message"]
    assert post(running, chat()).status == 401 and not upstream.requests


def test_a_key_sees_and_uses_its_models_alone(server, upstreams):
    running = server(provider(upstreams(usual=lambda seen: model_list() if "models" in seen.path
                                        else usual_reply(seen)), "a", models=["m-a"]),
                     provider("http://127.0.0.1:9", "b", models=["m-b"]),
                     aliases={"chain": ["m-a", "m-b"], "hidden": "m-b", "same": "a/m-a"},
                     **bob(models=["m-a", "cha*"]))

    def listed(key):
        models = get(running, "/v1/models", x_api_key=key).json["data"]
        return [model["id"] for model in models]

    assert listed("sk-bob") == ["chain", "same", "m-a"]
    assert listed("sk-eve") == ["chain", "hidden", "same", "m-a", "m-b"]
    for model, status in (("m-a", 200), ("same", 200), ("a/m-a", 200), ("chain", 200),
                          ("m-b", 403), ("hidden", 403), ("b/m-b", 403)):
        assert post(running, chat(model=model), x_api_key="sk-bob").status == status, model
    for model, status in (("m-b", 404), ("m-a", 200)):
        assert get(running, f"/v1/models/{model}", x_api_key="sk-bob").status == status


#: A key's models, what it is refused, what it gets, of two providers that both serve `demo-text`.
MODELS_OF_A_KEY = [
    (["demo-text"], ["other/demo-text", "other/x", "far", ""],
     ["demo-text", "one/demo-text", "near"]),
    (["other/demo-text"], ["demo-text", "one/demo-text", "near"], ["other/demo-text", "far"]),
    (["other/*"], ["demo-text", "near", "one/x"],
     ["other/demo-text", "other/x", "far", "only-other"]),
    (["*"], [], ["demo-text", "other/demo-text", "far", "anything", ""]),
    (["f*"], ["demo-text", "other/demo-text"], ["far", "free"]),
    (["demo-text", "x"], ["other/x", "only-other"], ["x", "one/x", "demo-text"])]


@pytest.mark.parametrize("mine, refused, granted", MODELS_OF_A_KEY,
                         ids=[row[0][0] for row in MODELS_OF_A_KEY])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses",
                                  "/v1/completions", "/v1/messages/count_tokens",
                                  "/v1/responses/input_tokens"])
def test_a_plain_name_of_a_key_is_one_place(server, upstreams, path, mine, refused, granted):
    one, other = upstreams(), upstreams()
    running = server(provider(one, "one", models=["demo-text", "z"]),
                     provider(other, "other", models=["demo-text", "only-other"]),
                     default_model="z", **bob(models=mine),
                     aliases={"far": "other/demo-text", "near": "demo-text"})
    for model in refused + granted:
        body = {"input": "hi"} if "responses" in path else {**chat(), "max_tokens": 9,
                                                            "prompt": "hi"}
        answer = post(running, {**body, "model": model or None}, path, x_api_key="sk-bob")
        assert answer.status == (403 if model in refused else 200), (model, answer.body)
    assert len(one.requests) + len(other.requests) == (0 if "token" in path else len(granted))


@pytest.mark.parametrize("models, status", [
    ('["m1", "one/m1"]', 200), ("[]", 200), ("null", 200), ('["m1", "m2"]', 403), ('"m2"', 403),
    ("5", 403), ('[{"id": "m1"}]', 403), ('["other/m1"]', 403), ('["m2"], "models": ["m1"]', 403),
    ('["m1"], "models": ["m2"]', 403), ('["m2"], "models": null', 403), ('[["m1"]]', 403)])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_a_key_s_models_are_those_of_openrouter_s_list_too(server, upstream, path, models, status):
    """The upstream may answer by any of them, and may read the first or the last of two lists."""
    other = provider("http://127.0.0.1:9", "other", models=["m1"])
    running = server(provider(upstream, "one"), other, **bob(models=["one/m1"]))
    body = b'{"model": "one/m1", "messages": [{"role": "user", "content": "hi"}], "models": %s}'
    body %= models.encode()
    answer = post(running, body, path, x_api_key="sk-bob")
    assert answer.status == status and len(upstream.requests) == (status == 200), answer.body
    assert status == 200 or "models" in answer.error["message"]
    assert post(running, body, path, x_api_key="sk-eve").status == 200


# --- limits of clients -------------------------------------------------------

def limits_told(answer, what="requests"):
    return tuple(answer.headers.get(f"x-ratelimit-{name}-{what}")
                 for name in ("limit", "remaining", "reset"))


@pytest.mark.parametrize("limit, span_s", [("rpm", 60), ("rph", 3600), ("rpd", 86400)])
def test_requests_are_counted_in_a_sliding_window(server, upstream, clock, limit, span_s):
    running = server(upstream, clock=clock, **bob(**{limit: 3}))
    for remaining in ("2", "1", "0"):
        answer = post(running, chat(), x_api_key="sk-bob")
        assert answer.status == 200 and limits_told(answer)[:2] == ("3", remaining)
        clock.now += span_s / 10
    answer = post(running, chat(), x_api_key="sk-bob")
    assert answer.status == 429 and "try again in" in answer.error["message"]
    assert answer.error["code"] == "rate_limit_exceeded"
    assert int(answer.headers["retry-after"]) == span_s * 7 // 10
    assert limits_told(answer) == ("3", "0", f"{span_s * 0.9:.1f}s")
    listed = get(running, "/v1/models", x_api_key="sk-bob")
    assert listed.status == 200 and limits_told(listed)[1] == "0"
    clock.now += span_s * 0.7
    assert [post(running, chat(), x_api_key="sk-bob").status for _ in range(2)] == [200, 429]
    assert len([seen for seen in upstream.requests if seen.method == "POST"]) == 4


def test_tokens_a_day(server, upstream, clock):
    running = server(upstream, clock=clock, **bob(tpd=30))
    answers = [post(running, chat(), x_api_key="sk-bob") for _ in range(3)]      # 15 tokens each
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert limits_told(answers[2], "tokens")[:2] == ("30", "0")
    assert int(answers[2].headers["retry-after"]) > 80000
    clock.now += 86400 * 1.06
    assert post(running, chat(), x_api_key="sk-bob").status == 200


def test_a_restarted_server_remembers_the_day(server, following, upstream):
    for expected in (200, 429):
        running = server(gateway=following({"providers": [provider(upstream)], **bob(rpd=2)}))
        for _ in range(2):
            assert post(running, chat(), x_api_key="sk-bob").status == expected
        running.close()
    assert len(upstream.requests) == 2


@pytest.mark.parametrize("path", ["/v1/messages/count_tokens", "/v1/responses/input_tokens"])
def test_counting_tokens_is_a_request(server, upstream, path):
    running = server(upstream, **bob(rpm=2))
    body = {**chat(), "input": "hi"}
    answers = [post(running, body, path, x_api_key="sk-bob") for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429] and not upstream.requests
    assert limits_told(answers[0])[1] == "1"
    assert post(running, chat(), x_api_key="sk-bob").status == 429


def test_concurrency_of_a_key(server, upstream):
    go = threading.Event()
    upstream.plays(Reply(go, *plain(completion()).steps))
    running = server(upstream, **bob(concurrency=1))
    with Client(running) as client:
        client.post(chat(), headers={"x-api-key": "sk-bob"})
        upstream.wait()
        answer = post(running, chat(), x_api_key="sk-bob")
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert post(running, chat(), x_api_key="sk-eve").status == 200
        go.set()
        assert client.answer().status == 200
    # the place comes back just after the answer
    until(lambda: post(running, chat(), x_api_key="sk-bob").status == 200)


def test_addresses_behind_trusted_proxies(server, upstream, clock):
    running = server(upstream, clock=clock, address_limits={"rpm": 1},
                     trusted_proxies=["127.0.0.0/8"])
    for address, status in (("1.2.3.4", 200), ("1.2.3.4", 429), ("9.9.9.9, 1.2.3.4", 429),
                            ("5.6.7.8", 200), ("1.2.3.4, 127.0.0.9", 429),
                            ("2001:db8::1", 200), ("[2001:db8::2]:443", 429),
                            ("2001:db8:1::2", 200), ("nonsense", 200), ("", 429)):
        assert post(running, chat(), x_forwarded_for=address).status == status, address


def test_nobody_else_is_believed(server, upstream):
    running = server(upstream, address_limits={"rpm": 1})
    assert [post(running, chat(), x_forwarded_for=address).status
            for address in ("1.1.1.1", "2.2.2.2")] == [200, 429]


def test_our_headers_replace_the_upstreams(server, upstream):
    upstream.plays(*[error_reply(400, **{"x-ratelimit-remaining-requests": "77"})] * 2)
    running = server(upstream, **bob(rpm=9))
    told = [limits_told(post(running, chat(), x_api_key=key)) for key in ("sk-bob", "sk-eve")]
    assert told[0][:2] == ("9", "8") and told[1][0] is None


# --- usage and history -------------------------------------------------------

def test_usage_by_model_provider_key_and_day(server, upstreams):
    usage = {**USAGE, "prompt_tokens_details": {"cached_tokens": 4},
             "completion_tokens_details": {"reasoning_tokens": 2}}
    good = upstreams(plain(completion(usage=usage)), sse(*HELLO[:-2], usage_chunk(usage), DONE))
    running = server(provider(good, "a", models=["m-a"]),
                     provider(upstreams(error_reply(500)), "b", models=["m-b"]), **bob())
    for stream, model, key in ((False, "m-a", "sk-bob"), (True, "m-a", "sk-eve"),
                               (False, "m-b", "sk-eve")):
        post(running, chat(stream, model), x_api_key=key)
    assert is_well(running)
    prices = {"a/*": {"input": 2, "cached": 1, "output": 10}}
    by = {name: {row[name]: row for row in running.gateway.ledger.report(name, 1, prices)}
          for name in ifl.USAGE_NAMES}
    row = by["model"]["m-a"]
    assert [row[name] for name in ("requests", "errors", "input", "output", "cached", "reasoning",
                                   "estimated")] == [2, 0, 24, 6, 8, 4, 0]
    assert row["cost"] == pytest.approx((16 * 2 + 8 + 6 * 10) / 1e6)
    row = by["provider"]["b"]
    assert [row[name] for name in ("requests", "errors", "input", "cost")] == [1, 1, 0, None]
    assert {name: row["requests"] for name, row in by["key"].items()} == {"eve": 2, "bob": 1}
    assert list(by["day"]) == [time.strftime("%Y-%m-%d")]


def test_estimates_are_marked(server, upstream):
    upstream.plays(plain({name: value for name, value in completion().items() if name != "usage"}))
    running = server(upstream)
    assert post(running, chat()).status == 200 and is_well(running)
    row, = ifl.usage_report(running.gateway, "model", 1)["rows"]
    assert row["estimated"] == 1 and row["input"] > 0


@pytest.mark.parametrize("more, written", [({"usage": False}, False), ({}, True),
                                           ({"usage": False, **bob(rpd=9)}, True)],
                         ids=["off", "on", "off, with limits"])
def test_usage_off_is_not_written_but_for_limits(server, following, config, upstream, more,
                                                 written):
    running = server(gateway=following({"providers": [provider(upstream)], **more}))
    assert post(running, chat(), x_api_key="sk-bob").status == 200 and is_well(running)
    assert used_in(running.gateway.ledger) == 1
    assert os.path.exists(os.path.join(config.folder, "usage.jsonl")) == written


def test_the_history_is_bounded_and_holds_no_content(server, upstream, home, monkeypatch):
    monkeypatch.setattr(ifl, "HISTORY_SIZE", 3)
    running = server(provider(upstream, api_keys=["k-secret-0123"]))
    for _ in range(5):
        assert post(running, chat()).status == 200
    assert is_well(running) and not list(home.iterdir())
    history = ifl.history_of(running.gateway)
    record, told = history[0], json.dumps(history)
    assert len(history) == 3 and "k-secret" not in told and '"hi"' not in told
    assert (record["model"], record["target"], record["status"], record["input"]) == (
        "m1", "up/m1", 200, 12)


# --- mistakes in settings ----------------------------------------------------

#: What is wrong with a client key, and what is said of it.
BAD_KEYS = [
    (None, ": an object"), ({"name": "a b", "sha256": "0" * 64}, ".name: a name without"),
    ({"name": "x"}, ".sha256: it is missing"),
    ({"name": "x", "sha256": "zz"}, ".sha256: the key's SHA-256"),
    *((key_entry("x", "sk-x", **fact), said) for fact, said in (
        ({"rpm": 0}, ".rpm: a whole number from 1"), ({"rpm": -1}, ".rpm: "),
        ({"rpd": 1.5}, ".rpd: "), ({"tpd": True}, ".tpd: "),
        ({"concurrency": "5"}, ".concurrency: "), ({"expires": "soon"}, ".expires: a date"),
        ({"expires": 5}, ".expires: "), ({"models": "m"}, ".models: a list"),
        ({"models": [""]}, ".models[0]: "), ({"colour": "red"}, ".colour: no such field"))),
    (key_entry("ok", "sk-x"), ": the name ok is taken")]


@pytest.mark.parametrize("bad, said", BAD_KEYS, ids=[row[1] for row in BAD_KEYS])
def test_bad_keys_are_named_and_disable_no_authentication(bad, said):
    keys = [key_entry("ok", "sk-ok"), bad]
    with pytest.raises(ValueError, match="^" + re.escape("client_keys[1]" + said)):
        ifl.check_setting("client_keys", keys)
    loaded = ifl.load_settings({"client_keys": keys}, {}, {})
    assert loaded.warnings[0].startswith(f"config.json: client_keys[1]{said}")
    auth = ifl.ClientAuth(loaded.settings)
    assert auth.required and auth.find(["sk-ok"]).name == "ok" and auth.find(["sk-x"]) is None
    assert ifl.ClientAuth(ifl.load_settings({"client_keys": 5}, {}, {}).settings).required


@pytest.mark.parametrize("name, value, said", [
    ("address_limits", {"rpm": 0}, "address_limits.rpm: .*leave it out"),
    ("address_limits", {"rps": 1}, "rps: no such field"), ("retry", {"count": 11}, "count"),
    ("retry", {"count": -1}, "count"), ("retry", {"backoff_s": "x"}, "backoff_s"),
    ("circuit", {"rest_s": 0}, "rest_s"), ("prices", {"m": 5}, "m: an object"),
    ("prices", {"m": {"input": -1}}, "m.input"), ("trusted_proxies", ["nope"], r"\[0\]"),
    ("trusted_proxies", ["1.2.3.4", "10.0.0.0/40"], r"\[1\]"),
    ("usage_days", 0, "usage_days: a whole number from 1 to 3660")])
def test_bad_settings_are_named_with_their_place(cli, name, value, said):
    with pytest.raises(ValueError, match=said):
        ifl.check_setting(name, value)
    status, _, err = cli("config", "set", name, json.dumps(value))
    assert status == 2 and name in err
    assert re.search(said, err) or not isinstance(value, (list, dict))
    warning = ifl.load_settings({name: value}, {}, {}, ifl.Settings()).warnings[0]
    assert warning.startswith(f"config.json: {name}") and re.search(said, warning)


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_a_text_that_no_file_name_may_hold_is_named_and_not_used(following, cli, text):
    names = ("base_url", "ca_file", "host", "log_file")
    made = following({**dict.fromkeys(names, text), "custom_api_key": text})
    assert sorted(made.problems) == [
        f"config.json: {name}: a string without NUL and lone surrogates expected"
        for name in names]
    assert made.settings.host == "127.0.0.1" and made.state.auth.required
    for command in ("status", "logs", "usage"):
        assert cli(command)[0] in (0, 1)


@pytest.mark.parametrize("end", ["1e999", "NaN", "-1e999", "1e30", "1" + "0" * 400])
def test_a_login_that_ends_at_no_time_is_shown_all_the_same(following, cli, end):
    made = following(b'{"accounts": {"w": {"apiKey": "kk", "oauth_refresh_token": "r", '
                     b'"oauth_expires_at": %s}}}' % end.encode())
    assert made.health()["logins"]["w"]["expires_at"] is None
    assert "end unknown" in cli("status")[1]


# --- commands ----------------------------------------------------------------

@pytest.mark.parametrize("host", ["\udcff", "é..", "a b"])
def test_a_host_that_can_be_no_name_is_told_in_one_line(cli, host):
    status, _, err = cli("serve", "--port", "0", "--host", host)
    assert status == 1 and "can't listen on" in err
    assert cli("env", "openai", "--host", host)[0] == 0          # nobody answers there


@pytest.mark.parametrize("argv", [("serve", "--port", "0"), ("models",), ("test",),
                                  ("routes", "explain", "m")], ids=" ".join)
def test_an_empty_upstream_is_a_mistake_and_its_key_goes_nowhere_else(cli, argv):
    status, out, err = cli(*argv, "--upstream", "", "--api-key", "sk-of-another-service")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: --upstream: base_url is missing")


@pytest.mark.parametrize("argv", [
    ("login", "--paste"), ("login", "--api-key", "-"), ("admin", "reset-password", "-"),
    ("config", "set", "api_key", "-")], ids=" ".join)
def test_a_standard_input_that_is_closed_or_no_text_is_told(config, capsys, monkeypatch, argv):
    stdins = [None] + [io.TextIOWrapper(io.BytesIO(b"\xff12345678\n"), "utf-8", errors)
                       for errors in ("strict", "surrogateescape")]
    for stdin in stdins[:1] if "--paste" in argv else stdins:
        monkeypatch.setattr(sys, "stdin", stdin)
        status = ifl.main(list(argv))
        out, err = capsys.readouterr()
        assert (status, out) == (2, "") and err.startswith("error: ") and "Traceback" not in err
    assert not os.path.exists(config.path)


@pytest.mark.parametrize("seconds", ["0", "-5", "nan"])
def test_a_login_needs_time(cli, seconds):
    assert cli("login", "--no-browser", f"--timeout={seconds}") == (
        2, "", f"error: --timeout can't be {seconds}; a number above 0 expected\n")


@posix
def test_a_terminal_that_is_gone_keeps_no_answer_from_ending(home):
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, PROGRAM, "--demo", "--port", "0"],
                               stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    try:
        url, card = process.stdout.readline().decode().split()[-1], b""
        while b"next" not in card:       # then the card is out, and nobody reads any more
            piece = os.read(reader, 65536)
            assert piece, card
            card += piece
        os.close(reader)
        with contextlib.closing(http.client.HTTPConnection(url[7:], timeout=WAIT_S)) as client:
            client.request("POST", "/v1/chat/completions", json.dumps(chat(True, "demo")))
            answer = client.getresponse()
            process.terminate()
            assert answer.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(WAIT_S) in (0, 120)      # 120: Python could not empty stderr at the end
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_key_add_list_remove(following, config, cli):
    made = following({"providers": [provider("http://h", "a", models=["m-a"])]})
    status, key, err = cli("key", "add", "bob", "--models", "m-a,x-*", "--rpm", "5",
                           "--tpd", "900", "--expires", "2999-01-31")
    key = key.strip()
    assert status == 0 and re.fullmatch("sk-[0-9a-f]{48}", key)
    assert "only time" in err and f"saved in {config.path}" in err
    text = json.dumps(config.read())
    assert key not in text and ifl.sha256(key).hex() in text
    listed = cli("key")[1]
    assert "bob" in listed and "requests / minute: 5" in listed and key not in listed
    made.reload()
    found = made.state.auth.find([key])
    assert found.limits == {"rpm": 5, "tpd": 900} and found.models == ("m-a", "x-*")
    assert cli("key", "add", "--rpm", "7", "eve")[0] == 0
    for argv in ("add", "add bob", "add x --rpm 0", "add x --rpm -1", "add x --rpm many",
                 "add a/b", "add x --expires 2001-01-01", "remove", "remove bo"):
        status, out, err = cli("key", *argv.split())
        assert (status, out) == (2, "") and err.startswith("error: "), argv
    assert cli("key", "remove", "eve")[0] == 0
    status, _, err = cli("key", "remove", "bob")
    assert status == 0 and "no key is left" in err


def test_key_add_writes_over_nothing_that_is_no_list(config, cli):
    put_config(config, {"client_keys": key_entry("bob", "s")})
    before = config.read()
    status, out, err = cli("key", "add", "eve")
    assert (status, out) == (2, "") and "`client_keys` in config.json is not a list" in err
    assert config.read() == before


@pytest.mark.parametrize("shell, line", [
    ("bash", 'export OPENAI_API_KEY="$IFLOW2API_KEY"'),
    ("cmd", 'set "OPENAI_API_KEY=%IFLOW2API_KEY%"'),
    ("powershell", "$env:OPENAI_API_KEY = $env:IFLOW2API_KEY")])
def test_env_with_only_such_keys(config, cli, shell, line):
    put_config(config, bob())
    lines = cli("env", "openai", "--shell", shell)[1].splitlines()
    assert line in lines and "put your key into IFLOW2API_KEY" in lines[0]
    assert "export IFLOW2API_KEY" not in cli("env", "codex", "--shell", "bash")[1]


def test_routes_explain(config, cli):
    put_config(config, {
        "providers": [provider("http://h", "z", models=["glm-5"]), provider("http://o", "o")],
        "aliases": {"claude-*": ["glm-5", {"model": "o/long:模/x", "over_tokens": 5000}]}})
    status, out, _ = cli("routes", "explain", "claude-é", "--tokens", "6000")
    assert status == 0 and "=> o/long:模/x  http://o/v1" in out
    assert "then z/glm-5" in out and "if over_tokens 5000: yes" in out
    told = json.loads(cli("routes", "explain", "x/y:z", "--json")[1])
    assert told["chain"][0]["model"] == "x/y:z" and "default provider, z" in told["steps"][-1]
    assert "default_model" in cli("routes", "explain", "gpt-5", "--dialect", "responses")[1]
    for more in ((), ("x", "--tokens", "-1")):
        assert cli("routes", "explain", *more)[0] == 2
    put_config(config, {})
    assert cli("routes", "explain", "x")[0] == 1


def test_the_endpoint_explains_to_who_may_ask(server, upstream):
    running = server(provider(upstream, "a", models=["m-a"]), aliases={"chain": ["m-a"]},
                     custom_api_key="sk-m", admin_password=PASSWORD_HASH,
                     allowed_origins=["*", "http://evil"])

    def ask(status=200, authorization=BASIC, origin=None, **body):
        headers = {"origin": origin} if origin else {}
        answer = post(running, body, "/admin/api/routes/explain", authorization=authorization,
                      Host=running.url[len("http://"):], **headers)
        assert answer.status == status, answer
        return answer

    first = ask(model="chain", tokens=5).json["chain"][0]
    assert (first["provider"], first["circuit"]) == ("a", "closed") and not upstream.requests
    ask(401, "Bearer sk-m", model="chain")
    for origin in ("http://evil", "null", "https://127.0.0.1.evil"):
        answer = ask(403, origin=origin, model="chain")
        assert "access-control-allow-origin" not in answer.headers
    ask(origin=running.url, model="chain")
    for bad in ({"model": 5}, {"model": "x", "tokens": "1"}, {"model": "x", "images": 1},
                {"model": "x", "dialect": "y"}, {"model": "x", "aliases": []}):
        ask(400, **bad)
    told = ask(model="m-new", aliases={"m-new": "b/x", "m-*": 5}).json
    assert told["problems"] and told["chain"]
    assert "m-new" not in running.gateway.settings.aliases
    assert get(running, "/admin/api/routes/explain", authorization=BASIC).status == 405


def test_the_usage_command(config, cli):
    put_config(config, {"prices": {"glm*": {"input": 1, "output": 2}}})
    assert "Nothing was used" in cli("usage")[1]
    ledger = ifl.Ledger(os.path.join(config.folder, "usage.jsonl"))
    ledger.add(call_record("glm-5", "z", "bob", usage=ifl.Usage(1000, 500), first_s=1.5,
                           total_s=3.0))
    ledger.add(call_record('=cmd|"x",1', "z", "eve", status=429, usage=ifl.Usage(estimated=True),
                           total_s=0.0))
    ledger.close()
    out = cli("usage", "--by", "key")[1]
    row = r"^bob +1 +0 +1000 +500 +0 +0 +1\.50s +3\.00s +0\.0020$"
    assert re.search(row, out, re.M) and "≈" in out
    assert re.search(r"^Total +2 +1 +≈1000 +≈500 +0 +0 +0\.75s +1\.50s +0\.0020$", out, re.M)
    told = json.loads(cli("usage", "--json", "--days", "7")[1])
    assert told["rows"][0]["cost"] == 0.002 and told["by"] == "model"
    assert told["total"]["requests"] == 2 and told["rows"][0]["model"] == "glm-5"
    lines = cli("usage", "--csv")[1].splitlines()
    assert lines[0].startswith("model,requests,errors")
    assert lines[2].startswith("\"'=cmd|\"\"x\"\",1\",1,1")
    assert cli("usage", "--days", "0")[0] == cli("usage", "--days", "x")[0] == 2


# --- speed -------------------------------------------------------------------

def test_redaction_takes_its_time_by_the_length_of_the_text_alone():
    text = "://" * 20000 + " @"          # an Origin may be as long, and needs no key
    started = time.thread_time()
    assert ifl.redact(text) == text
    assert time.thread_time() - started < 5
    assert ifl.redact("http://u:" + "p" * 500 + "@h") == "http://u:…@h"


def best_us(work, count=2000):
    """Microseconds of one turn, the best of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in itertools.repeat(None, count):
            work()
        times.append(time.perf_counter() - start)
    return min(times) / count * 1e6


def test_what_is_not_used_costs_next_to_nothing(usage_file, server):
    """Generous by a factor of ten or so: this is about a lock or a file too many, not about the
    machine.
    """
    rests, running = ifl.Rests(time.monotonic), server(detect_local=False)
    asked = types.SimpleNamespace(server=running, gateway=running.gateway, headers={}, path="/")
    assert best_us(lambda: ifl.check_key(asked)) < 10
    assert best_us(lambda: rests.admits(1)) < 10
    ledger, call = ifl.Ledger(str(usage_file)), call_record()
    assert best_us(lambda: ledger.add(call), 300) < 300
    assert best_us(lambda: ifl.Ledger().add(call), 300) < 300


PRICES = {"m1": {"input": 100_000, "output": 1_000_000}}     # a completion costs 1.2 + 3


def test_a_budget_is_spent_by_prices_and_outlives_a_restart(config, upstream):
    key = key_entry("bob", "sk-bob", budget_day=5.0, budget_month=100)
    put_config(config, {"providers": [{**provider(upstream), "models": ["m1", "free"]}],
                        "prices": PRICES, "client_keys": [key]})
    bob = {"x_api_key": "sk-bob"}
    with ifl.serve(ifl.Gateway(config=config), port=0) as running:
        assert post(running, chat(model="free"), **bob).status == 200      # no price, no cost
        assert post(running, chat(), **bob).status == 200
        limiter, auth = running.gateway.limiter, running.gateway.state.auth
        assert limiter.used(auth.keys[0]) == {"budget_day": 4.2, "budget_month": 4.2}
        assert post(running, chat(), **bob).status == 200                  # goes over it
        refused = post(running, chat(), **bob)
        assert refused.status == 429
        assert "budget of the key bob: 5.0 a day" in refused.error["message"]
        report = until(lambda: [told for told in [ifl.usage_report(running.gateway, "model", 1)]
                                if told["total"]["cost"] == 8.4])[0]
        assert report["unpriced"] == ["free"]
    with ifl.serve(ifl.Gateway(config=config), port=0) as running:
        assert post(running, chat(), **bob).status == 429


@pytest.mark.parametrize("path", ASKS)
def test_a_key_with_limits_is_told_why_no_upstream_is_asked(server, upstream, path):
    key = key_entry("bob", "sk-bob", models=["m1"], rpm=9, tpd=99, budget_day=5)
    running = server(upstream, client_keys=[key], prices=PRICES)
    body = {"model": "other", **ASKS[path]}
    answer = post(running, body, path=path, x_api_key="sk-bob")
    assert answer.status == 403 and "may not use the model other" in answer.error["message"]
    assert upstream.requests == []


@pytest.mark.parametrize("argv, said", [
    (["--budget-day", "2.5", "--budget-month", "10"], None), (["--budget-day", "0"], "above 0"),
    (["--budget-day", "-1"], "--budget-day"), (["--budget-month", "much"], "above 0")])
def test_budgets_on_the_command_line(config, capsys, argv, said):
    status = ifl.main(["key", "add", "bob", *argv, "--config-dir", config.folder])
    assert status == (2 if said else 0)
    if said:
        return_text = capsys.readouterr().err
        assert said in return_text
    else:
        entry, = config.read()["client_keys"]
        assert (entry["budget_day"], entry["budget_month"]) == (2.5, 10)
        capsys.readouterr()
        assert ifl.main(["key", "list", "--config-dir", config.folder]) == 0
        assert "budget / day: 2.5;" in capsys.readouterr().out


BALANCE_ANSWERS = [
    ("api.deepseek.com", {"balance_infos": [{"currency": "CNY", "total_balance": "110.00"}]},
     ["110.00 CNY"]),
    ("api.moonshot.cn", {"code": 0, "data": {"available_balance": 49.58894}}, ["49.59"]),
    ("api.siliconflow.cn", {"data": {"totalBalance": "88.88", "balance": "0.88"}}, ["88.88"]),
    ("openrouter.ai", {"data": {"total_credits": 110.5, "total_usage": 10.25}}, ["100.25 USD"]),
    ("open.bigmodel.cn", {"data": {"limits": [
        {"type": "TOKENS_LIMIT", "percentage": 12, "nextResetTime": 1000},
        {"type": "TIME_LIMIT", "percentage": 0}]}}, ["tokens 12 % used", "time 0 % used"]),
    ("api.kimi.com", {"usage": {"limit": "100", "used": "40"}, "limits": [
        {"window": {"duration": 300}, "detail": {"limit": "200", "used": "1"}}]},
     ["requests 40 % used", "requests 0 % used"])]


@pytest.mark.parametrize("host, answer, texts", BALANCE_ANSWERS)
def test_what_is_left_as_each_maker_says_it(host, answer, texts):
    assert ifl.read_balance(host, answer, 2000.0) == texts
    for odd in ({}, [], None, {"data": None}, {"data": {"limits": [5]}}, {"usage": {}}, "x"):
        with pytest.raises(ValueError, match="does not know"):
            ifl.read_balance(host, odd, 2000.0)


def test_a_balance_is_asked_once_and_only_of_its_maker(gateway, upstream, monkeypatch):
    entry = {**provider(upstream), "api_keys": ["k1"]}
    made = gateway(entry)
    up = made.state.router.providers["up"]
    assert ifl.balance_of(made, up) == {} and not upstream.requests
    monkeypatch.setitem(ifl.BALANCES, "127.0.0.1", ifl.BALANCES["api.deepseek.com"])
    upstream.plays(plain({"balance_infos": [{"currency": "CNY", "total_balance": "1.00"}]}))
    for _ in range(2):
        assert ifl.balance_of(made, up) == {"balance": ["1.00 CNY"]}
    seen, = upstream.requests
    assert (seen.path, seen.headers["authorization"]) == ("/user/balance", "Bearer k1")


@pytest.mark.parametrize("reply, said", [
    (plain({"error": {"message": "no such key"}}, 401), "no such key"),
    (plain(b"<html>", content_type="text/html"), "does not know|Expecting")])
def test_a_balance_that_is_not_told(gateway, upstream, monkeypatch, reply, said):
    monkeypatch.setitem(ifl.BALANCES, "127.0.0.1", ifl.BALANCES["open.bigmodel.cn"])
    upstream.plays(reply)
    made = gateway({**provider(upstream), "api_keys": ["k1"]})
    told = ifl.balance_of(made, made.state.router.providers["up"])
    assert re.search(said, told["problem"]) and "k1" not in told["problem"]
    assert upstream.last.headers["authorization"] == "k1"  # GLM takes it without Bearer


def test_status_shows_balances_when_asked(config, upstream, monkeypatch, capsys):
    monkeypatch.setitem(ifl.BALANCES, "127.0.0.1", ifl.BALANCES["api.deepseek.com"])
    put_config(config, {"providers": [{**provider(upstream), "api_keys": ["k1"]}]})
    upstream.usual = plain({"balance_infos": [{"currency": "CNY", "total_balance": "1.00"}]})
    ifl.main(["status", "--config-dir", config.folder])
    assert "1.00 CNY" not in capsys.readouterr().out
    ifl.main(["status", "--balance", "--config-dir", config.folder])
    assert "1.00 CNY" in capsys.readouterr().out


# === 16. HTTP ================================================================

# --- time is linear ----------------------------------------------------------

class Pieces(ifl.HeadReader):
    """A connection that brings `pieces`."""

    def __init__(self, pieces):
        self._pieces = iter(pieces)

    def _receive(self):
        return next(self._pieces, b"")


def each_byte(data):
    return [data[at:at + 1] for at in range(len(data))]


def often(use, *more, times=10):
    """Use an input several times: one that takes long alone would not fit into the caches."""
    def used(data):
        for _ in range(times):
            with contextlib.suppress(ifl.BadRequest, ValueError):
                use(data, *more)
    return used


def find(path):
    for _ in range(50):
        ifl.find_endpoint("GET", path, {})


HEAD, ANSWER_HEAD = b"GET / HTTP/1.1\r\n", b"HTTP/1.1 200 OK\r\n"
read_often = often(ifl.parse_head, times=100)

#: what, n, maker of an input of size n, its use
GROWTH_OF_HTTP = [
    ("blanks before a NUL", 100_000, lambda n: HEAD + b"A:" + b" " * n + b"\0", read_often),
    ("blanks within a value", 50_000, lambda n: HEAD + b"A: a" + b" \t" * n + b"b", read_often),
    ("one endless line", 100_000, lambda n: b"G" * n, read_often),
    ("blanks in an answer", 100_000, lambda n: ANSWER_HEAD + b"A: a" + b" \r" * n + b"b",
     often(ifl.parse_answer_head, "GET", times=100)),
    ("blanks before an answer's colon", 1_000_000, lambda n: ANSWER_HEAD + b"A" + b" " * n + b": b",
     often(ifl.parse_answer_head, "GET")),
    ("a folded answer", 25,
     lambda n: ANSWER_HEAD + b"A: b" + (b"\r\n" + b" " * n * 100) * 150 + b"c",
     often(ifl.parse_answer_head, "GET")),
    ("a head byte by byte", 15_000, lambda n: each_byte(b"A" * n + b"\r\n\r\n"),
     lambda d: Pieces(d).read_head()),
    ("a head of line ends", 15_000, lambda n: each_byte(b"A\r\n" * (n // 3) + b"\r\n"),
     lambda d: Pieces(d).read_head()),
    ("empty lines before a head", 10_000, lambda n: each_byte(b"\r\n" * n + b"A\n\n"),
     lambda d: Pieces(d).read_head(b"\r\n")),
    ("a chunk's extension byte by byte", 15_000,
     lambda n: each_byte(b"1;" + b"x" * n + b"\r\na\r\n"), lambda d: dechunk(*d)),
    ("trailers byte by byte", 15_000,
     lambda n: each_byte(b"0\r\n" + b"a:b\r\n" * (n // 5) + b"\r\n"), lambda d: dechunk(*d)),
    ("small chunks in one read", 10_000, lambda n: [b"1\r\na\r\n" * n], lambda d: dechunk(*d)),
    ("one chunk byte by byte", 20_000, lambda n: each_byte(b"%x\r\n" % n + b"x" * n),
     lambda d: dechunk(*d)),
    ("a path of slashes", 20_000, lambda n: "/" * n + "x", often(find)),
    ("a path of parts", 5_000, lambda n: "/models" * n, often(find)),
    ("an Accept-Encoding", 50_000, lambda n: "gzip ;q=0." + "0" * n + ", gzip;q=0, " * n,
     ifl.accepts_gzip),
    ("a body in members", 2_000, lambda n: gzip.compress(b"x" * 999) * n,
     lambda d: ifl.inflate(d, ifl.packings_of("gzip"), 1 << 30)),
    ("an Origin", 1_000_000, lambda n: {"origin": "://" * n},
     lambda d: ifl.cors_lines(d, "/v1/models", True))]


@pytest.mark.parametrize("size, make, use", [row[1:] for row in GROWTH_OF_HTTP],
                         ids=[row[0] for row in GROWTH_OF_HTTP])
def test_http_takes_linear_time(size, make, use):
    check_growth(size, make, use)


# --- heads -------------------------------------------------------------------

def test_a_head_is_taken_apart():
    head = b"GET /a?b=c HTTP/1.1\r\nHost: h\r\nX-A:  1 \r\nx-a:2\r\nX-Empty:\r\nX-L: \xe9:\t!"
    assert ifl.parse_head(head) == ("GET", "/a?b=c", "HTTP/1.1",
                                    {"host": "h", "x-a": "1, 2", "x-empty": "", "x-l": "é:\t!"})


BAD_HEADS = [
    (b"GET", 400), (b"GET /", 400), (b" GET / HTTP/1.1", 400), (b"GET  / HTTP/1.1", 400),
    (b"get / HTTP/1.1", 400), (b"GET /a b HTTP/1.1", 400), (b"GET / HTTP/2.0", 505),
    (b"PRI * HTTP/2.0", 505), (b"GET / HTTP/1.2", 505), (b"GET / HTTP/0.9", 505),
    (b"GET / HTTP/1.1x", 505), (b"GET / http/1.1", 400), (b"A" * 30 + b" / HTTP/1.1", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    (b"GET /" + b"a" * 17_000 + b" HTTP/1.1", 414), (b"GET /\0 HTTP/1.1\r\nA\0: b", 400),
    (HEAD + b"Host : h", 400), (HEAD + b" folded", 400), (HEAD + b"A: b\r\n c: d", 400),
    (HEAD + b": x", 400), (HEAD + b"A b: c", 400), (HEAD + b"no colon", 400),
    (HEAD + b"A: b\0c", 400), (HEAD + b"A: b\rc", 400), (HEAD + b"A\xe9: b", 400),
    (HEAD[:-2] + b"\r\na: b" * 300, 431), (HEAD + b"X: " + b"a" * 70_000, 431),
    (HEAD + b"X: " + b"a" * 3_000_000, 431), (HEAD[:-2] + b"\n\nmore", 400)]


def test_a_head_that_is_refused(server):
    running = server(detect_local=False)
    for head, status in BAD_HEADS:
        with Client(running) as client:
            answer = client.send(head + b"\r\n\r\n").answer()
            assert (answer.status, answer.headers["connection"]) == (status, "close"), head[:80]
            assert client.is_closed()
    assert is_well(running)


def test_a_refused_head_is_told_in_the_dialect_of_its_path(server, log_lines):
    running = server(detect_local=False)
    begin = b"POST /v1/messages HTTP/1.1\r\n"
    for data in (begin + b"X y: 1", begin + b"Transfer-Encoding : chunked",
                 begin + b"X: " + b"a" * 70_000, begin + b"X: y\r\n" * 300,
                 b"POST /v1/messages?" + b"a" * 20_000 + b" HTTP/1.1",
                 b"POST /v1/messages HTTP/3"):
        with Client(running) as client:
            answer = client.send(data + b"\r\n\r\n").answer()
            assert answer.status in (400, 413, 414, 431, 505) and answer.json["type"] == "error"
            ident = answer.headers["request-id"]
            assert answer.json["error"]["type"] and ident == answer.headers["x-request-id"]
        until(lambda: any(ident[4:12] in record.getMessage() for record in log_lines))
    assert is_well(running)


def test_tls_on_the_plain_port_is_answered_at_once(server):
    running = server(detect_local=False)
    for hello, words in ((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "http://"),
                         (b"\0", "malformed")):
        with Client(running).send(hello) as client:
            answer = client.answer()
            assert answer.status == 400 and words in answer.error["message"] and client.is_closed()


# --- paths and methods -------------------------------------------------------

@pytest.mark.parametrize("prefix", ["", "/v1", "/api/v1"])
@pytest.mark.parametrize("end", ["", "/", "?x=1", "/?x=1"])
def test_every_api_path_in_every_form(server, upstream, prefix, end):
    running = server(upstream)
    for path, body in (("chat/completions", chat()), ("completions", {"model": "m", "prompt": "x"}),
                       ("embeddings", {"model": "m", "input": "x"})):
        assert post(running, body, f"{prefix}/{path}{end}").status == 200
    assert get(running, f"{prefix}/models{end}").json["object"] == "list"
    assert get(running, f"{prefix}/models/m1{end}").json["id"] == "m1"
    assert get(running, f"{prefix}/health{end}").json["status"] == "healthy"


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/m1"])
def test_head_answers_wherever_get_does(server, upstream, path):
    with Client(server(upstream)) as client:
        whole = client.request("GET", path).answer()
        short = client.request("HEAD", path).answer("HEAD")
        assert short.status == whole.status == 200
        assert short.headers["content-type"] == whole.headers["content-type"]
        assert "content-length" in short.headers
        # nothing of a body lies about
        assert client.request("GET", "/health").answer().status == 200


def test_a_wrong_method_is_405_and_says_which_are_right(server):
    read, write = "GET, HEAD, OPTIONS", "OPTIONS, POST"
    with Client(server(detect_local=False)) as client:
        for method, path, allow in (
                ("GET", "/v1/chat/completions", write), ("HEAD", "/v1/embeddings", write),
                ("POST", "/v1/models", read), ("DELETE", "/v1/models/m1", read + ", POST"),
                ("PUT", "/health", read), ("BREW", "/", read),
                ("PATCH", "/chat/completions/", write)):
            answer = client.request(method, path).answer(method)
            assert (answer.status, answer.headers["allow"]) == (405, allow), path
        assert client.request("GET", "/health").answer().status == 200


def test_an_unknown_path_is_404_in_the_words_of_who_asks(server):
    running = server(detect_local=False)
    for path in ("/nothing", "/v1/nothing", "/v2/models", "/api/models", "/v1/v1/models",
                 "/v1/chat", "/..", "/%2e", "/v1x/models"):
        answer = get(running, path)
        assert answer.status == 404 and answer.error["type"] == "invalid_request_error"
        answer = get(running, path, anthropic_version="2023-06-01")
        assert answer.status == 404 and answer.json["error"]["type"] == "not_found_error"
        assert (answer.json["request_id"] == answer.headers["request-id"]
                == answer.headers["x-request-id"])


def test_a_target_that_is_no_path_is_refused(server):
    running = server(detect_local=False)
    for target in ("http://127.0.0.1/health", "https://x/", "*", "//evil/health", "health",
                   "127.0.0.1:80"):
        with Client(running) as client:
            answer = client.request("GET", target).answer()
            assert answer.status == 400 and "path" in answer.error["message"]
            assert client.is_closed()
        assert "path" in post(running, chat(), target).error["message"]


@pytest.mark.parametrize("upgrade", ["websocket", "WebSocket", "h2c, websocket"])
def test_a_websocket_is_426(server, upgrade):
    running = server(detect_local=False, custom_api_key="k" * 20)
    for path in ("/v1/responses", "/health", "/nothing"):
        answer = get(running, path, Upgrade=upgrade, Connection="Upgrade",
                     Sec_WebSocket_Version="13")
        assert answer.status == 426 and answer.headers["upgrade"] == "HTTP/1.1"
        assert answer.headers["x-should-retry"] == "false"
        assert "Upgrade" in answer.headers["connection"]


def test_every_answer_has_an_id_of_its_own(server, upstream):
    running = server(upstream)
    answers = [get(running, "/health"), get(running, "/nothing"),
               *(post(running, body) for body in (chat(), chat(True), b"{"))]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 5 and all(re.fullmatch("req_[0-9a-f]{24}", ident) for ident in ids)


def test_an_error_shows_what_was_sent_on_one_line_and_without_credentials(server):
    running = server(detect_local=False)
    for given, words in (("a\u202eb\x1b[31m", "b"), ("sk-0123456789abcdef", "sk-…"),
                         ("x" * 9000, "xxx")):
        answer = get(running, "/v1/models/" + urllib.parse.quote(given))
        message = answer.error["message"]
        assert answer.status == 404 and words in message and message.isprintable()
        assert len(message) < 1200 and "0123456789" not in message


# --- bodies ------------------------------------------------------------------

def test_a_body_is_json_whatever_it_is_called(server, upstream):
    with Client(server(upstream)) as client:
        for content_type in ("application/json", "text/plain", "application/x-www-form-urlencoded",
                             "", None, "nonsense"):
            client.post(chat(), headers={"Content-Type": content_type})
            assert client.answer().status == 200, content_type


#: zstd where this Python has it: raw blocks, several frames, a window, a frame to be skipped.
ZSTD_BODIES = [] if zstd is None else [
    ("zstd", zstd.compress),
    ("zstd", lambda data: zstd.compress(data[:9]) + zstd.compress(data[9:])),
    ("zstd", lambda data: b"\x28\xb5\x2f\xfd\x20" + bytes([len(data)]) + (
        len(data) << 3 | 1).to_bytes(3, "little") + data),
    ("zstd", lambda data: streamed_zstd(data[:9], data[9:])),
    ("zstd", lambda data: b"\x50\x2a\x4d\x18\x02\0\0\0xx" + zstd.compress(data))]


def streamed_zstd(*parts):
    """A frame that says no size, only that its window is 1 MiB."""
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 20})
    return b"".join(map(packer.compress, parts)) + packer.flush()


@pytest.mark.parametrize("encoding, pack", [
    *ZSTD_BODIES,
    ("gzip", gzip.compress), ("x-gzip", gzip.compress), ("GZIP", gzip.compress),
    ("gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(b"") + gzip.compress(data[9:])),
    ("gzip", lambda data: b"".join(gzip.compress(data[at:at + 1]) for at in range(len(data)))),
    ("gzip", lambda data: gzip.compress(data) + bytes(512)),     # tape blocks, as gzip(1) takes
    ("deflate", zlib.compress), ("deflate", lambda data: zlib.compress(data)[2:-4]),
    ("identity", bytes), ("", bytes)])
def test_a_compressed_body(server, upstream, encoding, pack):
    with Client(server(upstream)) as client:
        assert client.post(pack(ifl.dump_json(chat())),
                           headers={"Content-Encoding": encoding}).answer().status == 200
        assert upstream.last.json == chat() and "content-encoding" not in upstream.last.headers


GZIPPED, ZSTD = {"Content-Encoding": "gzip"}, {"Content-Encoding": "zstd"}
UNFRAMED = {"Content-Length": None}
SENT_IN_CHUNKS = {"Transfer-Encoding": "chunked", **UNFRAMED}
BODY_FAULTS = [
    # id, headers, body, status, does the connection stay
    ("no length", UNFRAMED, b"", 411, False),
    ("brotli", {"Content-Encoding": "br"}, b"{}", 415, True),
    ("multipart", {"Content-Type": "multipart/form-data; boundary=x"}, b"{}", 415, True),
    ("two encodings", {"Content-Encoding": "gzip, gzip"}, b"{}", 415, True),
    ("no gzip", GZIPPED, b"{}", 400, True),
    ("cut gzip", GZIPPED, gzip.compress(b"{}" * 50)[:-9], 400, True),
    ("gzip bomb", GZIPPED, gzip.compress(b" " * 500_000), 413, True),
    ("bomb of members", GZIPPED, gzip.compress(b" " * 4_000) * 3, 413, True),
    ("second member cut", GZIPPED, gzip.compress(b"{}") + gzip.compress(b" ")[:-3], 400, True),
    ("too large", {}, b" " * 20_000, 413, True),
    ("far too large", {}, b" " * 3_000_000, 413, False),
    ("said to be too large", {"Content-Length": "100001"}, b"", 413, False),
    ("not JSON", {}, b"{", 400, True), ("no messages", {}, b"{}", 400, True),
    ("NaN", {}, b'{"a": NaN}', 400, True), ("latin-1", {}, b'{"a": "\xe9"}', 400, True),
    ("empty", {"Content-Length": "0"}, b"", 400, True),
    ("deep", {}, b'{"messages":' + b"[" * 5_000, 400, True),
    *([("zstd before Python 3.14", ZSTD, b"{}", 415, True)] if zstd is None else [
        ("no zstd", ZSTD, b"{}", 400, True),
        ("cut zstd", ZSTD, zstd.compress(b"{}" * 50)[:-3], 400, True),
        ("zstd bomb", ZSTD, zstd.compress(b" " * 500_000), 413, True),
        ("streamed zstd bomb", ZSTD, streamed_zstd(b" " * 300_000, b" " * 300_000), 413, True),
        ("bomb of frames", ZSTD, zstd.compress(b" " * 4_000) * 3, 413, True),
        ("second frame cut", ZSTD, zstd.compress(b"{}") + zstd.compress(b" ")[:-3], 400, True),
        ("not only zstd", ZSTD, zstd.compress(b"{}") + b"\x1f\x8b", 400, True)]),
    ("no chunk end", SENT_IN_CHUNKS, b"5\r\nhelloX\r\n0\r\n\r\n", 400, False),
    ("no chunk size", SENT_IN_CHUNKS, b"x\r\n", 400, False),
    ("negative chunk", SENT_IN_CHUNKS, b"-5\r\nhello\r\n", 400, False),
    ("CR in a chunk's line", SENT_IN_CHUNKS, b"5 \r\r\nhello", 400, False),
    ("chunks too large", SENT_IN_CHUNKS, framed(b" " * 20_000) + b"0\r\n\r\n", 413, False)]


@pytest.mark.parametrize("headers, body, status, stays", [row[1:] for row in BODY_FAULTS],
                         ids=[row[0] for row in BODY_FAULTS])
def test_faults_of_a_body(server, upstream, headers, body, status, stays):
    running = server(upstream, body_limit_bytes=10_000)
    with Client(running) as client:
        answer = client.post(body, headers=headers).answer()
        assert answer.status == status and answer.error["type"] == "invalid_request_error"
        assert answer.headers.get("connection") == (None if stays else "close")
        assert status != 413 or answer.error["code"] == "request_too_large"
        assert client.post(chat()).answer().status == 200 if stays else client.is_closed()
    assert is_well(running)


def test_endless_members_are_given_up(monkeypatch):
    monkeypatch.setattr(ifl, "PACKED_PARTS", 50)
    formats = {"gzip": gzip.compress, **({"zstd": zstd.compress} if zstd else {})}
    for encoding, pack in formats.items():
        packings = ifl.packings_of(encoding)
        assert ifl.inflate(pack(b"x") * 50, packings, 1000) == b"x" * 50
        with pytest.raises(ifl.BadRequest, match="decompressed"):
            ifl.inflate(pack(b"x") * 51, packings, 1000)


def test_codex_is_told_how_to_stop_compressing(server, monkeypatch):
    """Where Python has no zstd; Codex shows the body of the answer."""
    monkeypatch.setitem(sys.modules, "compression", None)
    answer = post(server(detect_local=False), b"packed", RESPONSES_PATH, Content_Encoding="zstd")
    assert answer.status == 415 and "3.14" in answer.error["message"]
    assert "--disable enable_request_compression" in answer.error["message"]


def test_the_answer_does_not_wait_for_a_body_that_nobody_wants(server):
    """The body is read after the answer, and the connection stays, if it comes within a second."""
    running, paths = server(detect_local=False), {"/v1/nothing": 404, "/health": 405,
                                                  "/v1/models": 405}
    for path, status in paths.items():
        with Client(running, timeout_s=0.5) as client:
            client.send(request_bytes(path=path, headers={"Content-Length": "5"}))
            answer = client.answer()
            assert answer.status == status and "connection" not in answer.headers
            client.send(b"12345").request("GET", "/health", headers=UNFRAMED)
            assert client.answer().status == 200
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(running)) for _ in paths]
        for client, path in zip(clients, paths):
            client.send(request_bytes(path=path, headers={"Content-Length": "5"}))
        for client, status in zip(clients, paths.values()):
            assert client.answer().status == status and client.is_closed()


def test_too_large_is_heard_by_a_client_that_sends_all_first(server):
    """http.client and httpx read an answer only when they have sent everything."""
    running = server(detect_local=False, body_limit_bytes=1_000_000)
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=WAIT_S)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", b"x" * (24 << 20))
        assert connection.getresponse().status == 413


def test_a_thousand_levels_reach_the_upstream_or_are_refused(server, upstream):
    """Never a 500: where a body could just be parsed, the rest of its way needs stack, too."""
    upstream.usual = plain(completion("ok"))              # which parses nothing
    running = server(upstream, aliases={"m": "up/other"})
    with Client(running) as client:
        for levels in (*range(930, 1000, 3), 1_000, 2_000, 20_000, 100_000):
            body = b'{"model":"m","messages":[{}],"x":' + b"[" * levels + b"]" * levels + b"}"
            assert client.post(body).answer().status in (200, 400), levels
    assert is_well(running)


def test_chunked_bodies(server, upstream):
    wanted = chat(pad="x" * 5_000)
    data = ifl.dump_json(wanted)
    chunked = b"".join(framed(data[at:at + 999])
                       for at in range(0, len(data), 999)) + b"0\r\nX-Trailer: 1\r\n\r\n"
    begin = request_bytes(headers=SENT_IN_CHUNKS)
    with Client(server(upstream)) as client:
        for pieces in ([begin + chunked], [begin, *each_byte(chunked[:300]), chunked[300:]],
                       [begin, chunked[:1001], chunked[1001:]]):
            for piece in pieces:
                client.send(piece)
            assert client.answer().status == 200 and upstream.last.json == wanted
            assert "transfer-encoding" not in upstream.last.headers
        client.send(begin.replace(b"chunked", b"Chunked") + chunked
                    + request_bytes("GET", "/health"))
        assert client.answer().status == 200
        # what came with the last chunk was not lost
        assert client.answer().json["status"] == "healthy"


CUT_OFF = {"head": b"POST /v1/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nX-",
           "body": request_bytes(headers={"Content-Length": "99"}) + b"{",
           "chunks": request_bytes(headers=SENT_IN_CHUNKS) + b"5000\r\nhe"}


@pytest.mark.parametrize("part", CUT_OFF.values(), ids=list(CUT_OFF))
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_leaves_within_its_request(server, upstream, part, reset):
    running = server(upstream)
    client = Client(running).send(part)
    until(lambda: running.connections)
    client.hang_up(reset)
    until(lambda: not running.connections)
    assert is_well(running) and upstream.requests == []


@pytest.mark.parametrize("part", CUT_OFF.values(), ids=list(CUT_OFF))
@pytest.mark.parametrize("drips", [False, True], ids=["silent", "dripping"])
def test_a_slow_loris_is_cut_off_and_logged(server, part, drips, monkeypatch, log_lines):
    monkeypatch.setattr(ifl, "HEAD_TIME_S", 0.15)
    monkeypatch.setattr(ifl, "BODY_TIME_S", 0.15)
    running = server(detect_local=False)
    started = time.monotonic()
    with Client(running) as client:
        client.send(part)
        while drips and not select.select([client.sock], [], [], 0.02)[0]:
            client.send(b"a")
            assert time.monotonic() - started < 3
        answer = client.answer()
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")
        client.sock.shutdown(socket.SHUT_WR)
        assert client.is_closed()
    assert is_well(running)
    until(lambda: any(answer.headers["x-request-id"][4:12] in line and " 408 " in line
                      for line in [record.getMessage() for record in log_lines]))


def test_expect_100_continue(server, upstream):
    running, data = server(upstream), ifl.dump_json(chat())
    asking = {"Expect": "100-continue", "Content-Length": str(len(data))}
    with Client(running) as client:
        assert client.send(request_bytes(headers=asking)).head() == (100, {})
        assert client.send(data).answer().status == 200
        # nobody wants the body: it is not asked for
        answer = client.send(request_bytes(path="/nothing", headers=asking)).answer()
        assert (answer.status, answer.headers["connection"]) == (404, "close")
        assert client.is_closed()
    with Client(running) as client:
        client.send(request_bytes(headers=asking, version="HTTP/1.0") + data)
        # HTTP/1.0 knows no 100 (RFC 9110, 10.1.1)
        assert client.head()[0] == 200


# --- framing that can't be trusted -------------------------------------------

#: Lines of a head that has a Host line of its own.
SMUGGLING = [
    ["Content-Length: 5", "Transfer-Encoding: chunked"],
    ["Transfer-Encoding: chunked", "Content-Length: 5"],
    ["Content-Length: 5", "Content-Length: 6"],
    *(["Content-Length: " + text] for text in (
        "5, 5", "-1", "+5", "0x5", "5 5", "x", "", "9" * 30, "\xb2", "5\0")),
    ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
    *(["Transfer-Encoding: " + text] for text in (
        "gzip, chunked", "identity", "xchunked", "\x0bchunked")),
    ["Transfer-Encoding : chunked"], ["X: y", " Transfer-Encoding: chunked"],
    ["X: y\rTransfer-Encoding: chunked"], ["Host: a"], ["Host: a", "Transfer-Encoding: chunked"]]
WITHOUT_HOST = [[], ["Transfer-Encoding: chunked"], ["Host:"], ["Host: a/b"], ["Host: a@b"]]


def test_framing_that_two_servers_might_read_in_two_ways(server, upstream):
    """A 400, the connection closed, and the bytes behind it never taken for a request."""
    running = server(upstream)
    for version, *lines in (*(("1.1", "Host: 127.0.0.1", *lines) for lines in SMUGGLING),
                            *(("1.1", *lines) for lines in WITHOUT_HOST),
                            ("1.0", "Transfer-Encoding: chunked")):
        text = "\r\n".join([f"POST /v1/chat/completions HTTP/{version}", *lines])
        with Client(running) as client:
            client.send(text.encode("latin-1") + b"\r\n\r\n0\r\n\r\n"
                        + request_bytes("GET", "/v1/models"))
            answer = client.answer()
            assert (answer.status, answer.headers["connection"]) == (400, "close"), lines
            assert client.is_closed()
    assert upstream.requests == [] and is_well(running)


def test_a_length_that_lies(server, upstream, monkeypatch):
    """Too long: the rest never comes.  Too short: the rest is the next request, and no good one."""
    monkeypatch.setattr(ifl, "BODY_TIME_S", 0.2)
    running = server(upstream)
    for length, ends, statuses in (("5000", False, [408]), ("5000", True, [400]),
                                   ("2", False, [400, 400])):
        with Client(running) as client:
            client.post(chat(), headers={"Content-Length": length}).send(b"\r\n\r\n")
            if ends:
                client.sock.shutdown(socket.SHUT_WR)
            answers = [client.answer() for _ in statuses]
            assert [answer.status for answer in answers] == statuses and client.is_closed()
            assert ("ended before" in answers[0].error["message"]) == ends
    assert upstream.requests == [] and is_well(running)


@pytest.mark.parametrize("path", ["/api/event_logging/batch", "/api/event_logging/v2/batch"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_what_needs_no_key_keeps_nothing_of_a_body(server, path, framing):
    running = server(detect_local=False, custom_api_key="k" * 20)

    def sent(body):
        if framing == "length":
            return request_bytes(path=path, body=body, headers=GZIPPED)
        return request_bytes(path=path, headers=SENT_IN_CHUNKS) + (
            framed(body) if body else b"") + b"0\r\n\r\n"

    with Client(running) as client:
        for body in (b"x" * (1 << 20), gzip.compress(b" " * (50 << 20)), b"", b"{"):
            data = sent(body)
            tracemalloc.start()
            client.send(data)
            assert client.answer().status == 200
            peak, _ = tracemalloc.get_traced_memory()[1], tracemalloc.stop()
            assert peak < 600_000, peak
    with Client(running) as client:
        if framing == "length":
            client.send(request_bytes(path=path, headers={"Content-Length": str((1 << 20) + 1)}))
        else:
            with contextlib.suppress(OSError):
                client.send(sent(b"x" * (1 << 20))[:-5] + framed(b"x"))
        answer = client.answer()
        assert answer.status == 413 and answer.headers["connection"] == "close"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_request_is_forgotten_when_it_has_ended(server, upstream, monkeypatch, path, stream):
    """At once, also where it failed: large requests must not wait for a garbage collection."""
    calls = []

    def remember(call, *args, **facts):
        make(call, *args, **facts)
        calls.append(weakref.ref(call))
    make = ifl.Call.__init__
    monkeypatch.setattr(ifl.Call, "__init__", remember)
    running = server(upstream, first_byte_timeout_s=0.1, retry={"count": 1, "backoff_s": 0.01})
    body = {"model": "m", "max_tokens": 9, "input": "q", "messages": MESSAGES, "stream": stream}
    gc.disable()
    try:
        for reply in (usual_reply, plain({"error": {"message": "no"}}, 500), Reply(HOLD),
                      Reply(b"no HTTP", CLOSE), plain(b"{}"), sse(chunk("a"), RESET)):
            upstream.plays(reply, reply)
            with Client(running) as client:
                client.post(body, path=path).answer()
                until(lambda: calls and not any(call() for call in calls),
                      what="the end of the request's memory")
            upstream.script.clear()
    finally:
        gc.enable()


# --- connections -------------------------------------------------------------

def test_a_connection_is_kept_after_answers_and_errors(server, upstream):
    running = server(upstream)
    with Client(running) as client:
        for _ in range(2):
            for status, method, path, body in (
                    (200, "POST", "/v1/chat/completions", chat()),
                    (400, "POST", "/v1/chat/completions", b"{"), (404, "GET", "/nothing", b""),
                    (200, "GET", "/v1/models", b"unwanted body"),
                    (404, "POST", "/nothing", b"x" * 500), (204, "OPTIONS", "/v1/models", b"")):
                assert client.request(method, path, body).answer().status == status
            assert records_of(client.post(chat(True)).answer().body) == HELLO
        assert running.connections == 1
    until(lambda: not running.connections)


def test_pipelined_requests_are_answered_in_order(server, upstream):
    upstream.plays(*(plain(completion(f"answer {number}")) for number in range(3)))
    with Client(server(upstream)) as client:
        requests = [request_bytes(body=chat(n=number)) for number in range(3)]
        client.send(b"".join(requests) + b"\r\n" + request_bytes("GET", "/health"))
        for number in range(3):
            assert client.answer().json["choices"][0]["message"]["content"] == f"answer {number}"
        assert client.answer().json["status"] == "healthy"


@pytest.mark.parametrize("version, connection, told", [
    ("HTTP/1.1", None, None), ("HTTP/1.1", "close", "close"),
    ("HTTP/1.1", "Keep-Alive, Close", "close"), ("HTTP/1.0", None, "close"),
    ("HTTP/1.0", "keep-alive", "keep-alive")])
def test_who_wants_the_connection_closed(server, version, connection, told):
    with Client(server(detect_local=False)) as client:
        for _ in range(1 if told == "close" else 2):
            answer = client.request("GET", "/health", headers={"Connection": connection},
                                    version=version).answer()
            assert answer.headers.get("connection") == told
        assert told != "close" or client.is_closed()
    with Client(server(detect_local=False)) as client:   # HTTP/1.0 needs no Host
        assert client.send(b"GET /health HTTP/1.0\r\n\r\n").answer().status == 200


def test_a_connection_without_a_request_is_closed(server, monkeypatch):
    monkeypatch.setattr(ifl, "HEAD_TIME_S", 0.1)
    monkeypatch.setattr(ifl, "CLIENT_IDLE_S", 0.1)
    running = server(detect_local=False)
    with Client(running) as client:
        assert client.is_closed()
    with Client(running) as client:
        assert client.request("GET", "/health").answer().status == 200 and client.is_closed()


def test_more_connections_than_allowed(server, upstream):
    running = server(upstream, max_connections=2)
    with Client(running) as first, Client(running) as second:
        for client in (first, second):
            assert client.request("GET", "/health").answer().status == 200
        with Client(running) as third:
            answer = third.post(chat()).answer()
            assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
            assert answer.error["code"] == "server_is_overloaded" and third.is_closed()
        answer = post(running, {}, "/v1/messages")
        assert answer.status == 529 and answer.json["error"]["type"] == "overloaded_error"
        until(lambda: running.connections == 2)
        with Client(running):
            until(lambda: running.connections == 3)
            assert first.post(chat()).answer().status == 200       # who was there first is served
    until(lambda: not running.connections)
    assert post(running, chat()).status == 200


def test_far_more_connections_than_allowed_are_closed(server):
    running = server(detect_local=False, max_connections=1)
    with contextlib.ExitStack() as stack:
        for number in range(1, 66):
            stack.enter_context(Client(running))
            until(lambda: running.connections == number)
        for _ in range(5):
            assert stack.enter_context(Client(running)).is_closed()
    until(lambda: not running.connections)
    assert is_well(running)


def test_a_server_stops_where_the_system_has_no_thread_to_give(server, monkeypatch):
    running = server(detect_local=False)

    def refuse(thread):
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Client(running).request("GET", "/health") as client:
        assert client.is_closed()
    running.close()
    with pytest.raises(OSError):
        Client(running)


# --- who may talk to us ------------------------------------------------------

HOSTS = [
    # allowed_hosts, Hosts that are answered, Hosts that are not
    ([], ["127.0.0.1", "127.0.0.1:1234", "localhost", "LocalHost:80", "a.localhost:80", "[::1]:80",
          "[::1]", "127.1.2.3", "host.docker.internal:80"],
     ["evil.example", "127.0.0.1.evil.example", "192.168.1.5:80", "0.0.0.0", "[::2]",
      "localhost.evil.example:80"]),
    (["evil.example", "box.lan", "Case.LAN"], ["evil.example", "Box.lan:80", "case.lan"],
     ["x.evil.example"])]


@pytest.mark.parametrize("key", ["", "secret-client-key"])
@pytest.mark.parametrize("allowed, ours, foreign", HOSTS)
def test_names_that_are_ours(server, allowed, ours, foreign, key):
    """A page of another name must not reach us by DNS rebinding, not even with a key."""
    running = server(detect_local=False, allowed_hosts=allowed, custom_api_key=key)
    for host in (*ours, *foreign):
        for path in ("/health", "/v1/models"):
            answer = get(running, path, Host=host, Authorization="Bearer " + key)
            assert answer.status == (200 if host in ours else 403), host
            if host in foreign:
                assert answer.error["code"] == "host_not_allowed"
                assert "allowed_hosts" in answer.error["message"]
                assert answer.headers["x-should-retry"] == "false"


LIMITED = {"custom_api_key": "k" * 20}
ORIGINS = [
    # Origin, settings, key sent, answered
    (None, {}, None, True), ("http://evil.example", {}, None, False), ("null", {}, None, False),
    ("http://localhost:3000", {}, None, False), ("http://127.0.0.1", {}, None, True),
    ("http://ok.example", {"allowed_origins": ["http://ok.example"]}, None, True),
    ("http://ok.example:81", {"allowed_origins": ["http://ok.example"]}, None, False),
    ("null", {"allowed_origins": ["null"]}, None, True),
    ("http://x", {"allowed_origins": ["*"]}, None, True), ("http://x", LIMITED, "k" * 20, True),
    ("http://x", LIMITED, "wrong", False), ("http://x", LIMITED, None, False),
    ("", {}, None, False)]


@pytest.mark.parametrize("origin, settings, key, answered", ORIGINS)
def test_web_pages_that_may_call(server, upstream, origin, settings, key, answered):
    running = server(upstream, **settings)
    answer = post(running, chat(), Origin=origin, Authorization=key and "Bearer " + key)
    assert (answer.status == 200) is answered
    if not answered:
        assert answer.status == 403 and "allowed_origins" in answer.error["message"]
        assert upstream.requests == []
    if origin:
        assert answer.headers["access-control-allow-origin"] == origin
        assert "access-control-allow-credentials" not in answer.headers


def test_preflight(server):
    running = server(detect_local=False, **LIMITED)
    answer = get(running, "/v1/chat/completions", "OPTIONS", Origin="http://page",
                 Access_Control_Request_Method="POST",
                 Access_Control_Request_Headers="authorization,x-odd",
                 Access_Control_Request_Private_Network="true")
    assert answer.status == 204 and answer.body == b"" and "content-length" not in answer.headers
    told = {name.replace("access-control-", ""): value for name, value in answer.headers.items()}
    assert told["allow-origin"] == "http://page" and told["vary"] == "Origin"
    assert told["allow-headers"] == "authorization,x-odd" and "POST" in told["allow-methods"]
    assert told["allow-private-network"] == "true" and "allow-credentials" not in told


@pytest.mark.parametrize("path", ["/admin", "/admin/api/x", "/v1/admin", "/api/v1/admin/api"])
def test_no_web_page_reads_the_admin_page(server, path):
    for method in ("OPTIONS", "GET"):
        answer = get(server(detect_local=False), path, method, Origin="http://page")
        assert not [name for name in answer.headers if name.startswith("access-control")]


KEYS = [
    # headers, answered
    ({}, False), ({"Authorization": "Bearer the-key"}, True),
    ({"Authorization": "bearer  the-key "}, True), ({"Authorization": "Basic the-key"}, False),
    ({"Authorization": "the-key"}, False), ({"Authorization": "Bearer the-keyX"}, False),
    ({"Authorization": "Bearer"}, False), ({"Authorization": "Bearer "}, False),
    ({"X-Api-Key": "the-key"}, True), ({"Api-Key": "the-key"}, True), ({"X-Mine": "the-key"}, True),
    ({"X-Mine": "Bearer the-key"}, True), ({"X-Other": "the-key"}, False),
    ({"Authorization": "Bearer wrong", "X-Api-Key": "the-key"}, True),
    ({"Authorization": "Bearer \xe9"}, False)]


def test_keys_of_clients(server):
    running = server(detect_local=False, custom_api_key="the-key", custom_auth_header="X-Mine")
    for headers, answered in KEYS:
        for path in ("/v1/models", "/metrics", "/nothing", "/", "/health"):
            answer = get(running, path, **headers)
            if answered or path in ("/", "/health"):
                assert answer.status == (404 if path == "/nothing" else 200)
                continue
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), headers
            assert answer.error["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "the-key" not in answer.error["message"]
    answer = post(running, {}, "/v1/messages")           # in the words of Messages
    assert answer.status == 401 and answer.json["error"]["type"] == "authentication_error"
    assert answer.json["request_id"] == answer.headers["request-id"]


def test_an_open_address_gets_a_key(server, config):
    running = server(gateway=ifl.Gateway(config=config, environ={}), host="0.0.0.0")
    key = running.gateway.settings.custom_api_key
    assert re.fullmatch("sk-[0-9a-f]{48}", key) and config.read() == {"custom_api_key": key}
    assert get(running, "/v1/models").status == 401
    assert get(running, "/v1/models", Authorization=f"Bearer {key}",
               Host="any.example").status == 200
    again = server(gateway=ifl.Gateway(config=config, environ={}), host="0.0.0.0")
    assert again.gateway.settings.custom_api_key == key


@pytest.mark.parametrize("has_config", [True, False])
def test_an_open_address_gets_a_key_that_can_not_be_stored(server, config, has_config, monkeypatch):
    def change(self, edit):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(ifl.ConfigFile, "change", change)
    running = server(gateway=ifl.Gateway(config=config if has_config else None, environ={}),
                     host="0.0.0.0")
    assert get(running, "/v1/models").status == 401
    running.gateway.reload()
    key = running.gateway.settings.custom_api_key
    assert key and get(running, "/v1/models", X_Api_Key=key).status == 200


@pytest.mark.parametrize("keys", [
    {"custom_api_key": "sk-only"}, {"client_keys": [key_entry("bob", "sk-only")]}],
    ids=["custom", "named"])
@pytest.mark.parametrize("way", ["by hand", "by command", "by the page"])
def test_an_open_address_without_a_key_any_more_answers_nobody(server, config, upstream, keys, way):
    """Whoever took the last key away, and nothing is written in answer to it."""
    rest = {"providers": [provider(upstream)], "admin_password": PASSWORD_HASH, "x": 1}
    put_config(config, {**rest, **keys})
    running = server(gateway=ifl.Gateway(config=config, environ={}), host="0.0.0.0")
    assert post(running, chat(), x_api_key="sk-only").status == 200
    is_named = "client_keys" in keys
    if way == "by hand":
        put_config(config, rest)
    elif way == "by command":
        assert ifl.main(["key", "remove", "bob"] if is_named
                        else ["config", "unset", "custom_api_key"]) == 0
    elif is_named:
        assert get(running, "/admin/api/keys/bob", "DELETE", Authorization=BASIC).status == 204
    else:
        running.gateway.change_config(lambda raw: [raw.pop(name) for name in keys])
    running.gateway.reload()
    written = config.read()
    for given in ({}, {"x_api_key": "sk-only"}, {"Host": "elsewhere.example"}):
        refused = post(running, chat(), **given)
        assert refused.status == 401 and "`key add NAME`" in refused.error["message"], given
        assert get(running, "/metrics", **given).status == 401
    health = get(running, "/health").json
    assert health["needs_key"] and "no client key" in health["problems"][0]
    assert config.read() == written and "custom_api_key" not in written
    put_config(config, {**written, "client_keys": [key_entry("eve", "sk-new")]})
    running.gateway.reload()
    assert post(running, chat(), x_api_key="sk-new").status == 200
    assert post(running, chat(), x_api_key="sk-only").status == 401
    assert not get(running, "/health").json["problems"]


def test_each_server_decides_by_its_own_address(server, gateway, upstream):
    made = gateway(upstream)
    local, open_to_all = server(gateway=made), server(gateway=made, host="0.0.0.0")
    key = made.settings.custom_api_key
    assert post(local, chat()).status == post(open_to_all, chat()).status == 401
    assert post(open_to_all, chat(), x_api_key=key).status == 200
    made.apply(settings_for([upstream]))
    assert post(local, chat()).status == 200
    assert post(open_to_all, chat(), x_api_key=key).status == 401


LONG_KEY = {"custom_api_key": "sk-long-secret-key"}
NAMED_KEY = {"client_keys": [key_entry("b", "sk-b")]}


@pytest.mark.parametrize("host, keys, said", [
    ("127.0.0.1", {}, "need no key"), ("127.0.0.1", LONG_KEY, "need the key sk-…"),
    ("127.0.0.1", NAMED_KEY, "need a client key"), ("0.0.0.0", NAMED_KEY, "need a client key"),
    ("0.0.0.0", LONG_KEY, "need the key sk-…")])
def test_card_health_and_page_say_alike_whether_a_key_is_needed(server, gateway, host, keys, said):
    running = server(gateway=gateway("http://127.0.0.1:9", **keys), host=host)
    card = "\n".join(ifl._card(running.gateway, running, True))
    assert said in card and ("need no key" in card) == (not running.needs_key)
    told = [get(running, "/health").json["needs_key"], ifl.overview_of(running)["needs_key"]]
    assert told == [running.needs_key] * 2
    assert get(running, "/v1/models").status == (401 if running.needs_key else 200)


# --- endpoints ---------------------------------------------------------------

def listed(running, query="?limit=1000", **headers):
    """Models by name as Anthropic's API lists them."""
    found = get(running, "/v1/models" + query, anthropic_version="2023-06-01", **headers).json
    return {model["id"]: model for model in found["data"]}


def test_models_in_both_shapes(server, upstream):
    running = server(provider(upstream, models=["a", "b"]))
    found, names = get(running, "/v1/models").json, ["a", "b", "m1", "org/m2:free"]
    assert found["object"] == "list" and [model["id"] for model in found["data"]] == names
    assert {(*model, model["object"]) for model in found["data"]} == {
        ("id", "object", "created", "owned_by", "model")}
    found = get(running, "/v1/models", anthropic_version="2023-06-01").json
    names = [*ifl.CLAUDE_MODELS.values(), *names]
    assert [model["id"] for model in found["data"]] == names
    assert (found["has_more"], found["first_id"], found["last_id"]) == (False, names[0], names[-1])
    assert found["data"][0]["type"] == "model"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["data"][0]["created_at"])


#: Without one of these Codex 0.169 or an older one takes nothing of the list.
CODEX_INSISTS = {
    "slug": str, "display_name": str, "shell_type": str, "visibility": str, "priority": int,
    "supported_in_api": bool, "base_instructions": str, "supported_reasoning_levels": list,
    "supports_reasoning_summaries": bool, "support_verbosity": bool, "truncation_policy": dict,
    "supports_parallel_tool_calls": bool, "experimental_supported_tools": list}


@pytest.mark.parametrize("query, headers", [
    ("?client_version=0.169.0", {"originator": "codex_exec"}), ("?client_version=0.169.0", {}),
    ("", {"originator": "Codex Desktop"})])
def test_codex_list_of_models(server, upstream, query, headers):
    facts = [{"id": "big", "context": 200000, "vision": False}, {"id": "eye", "vision": True}, "m"]
    running = server(
        provider(upstream, models=facts, profile={"efforts": ["max", "low", "high"]}),
        provider(upstream, "b", models=["m", "n"], profile={"vision": False, "context": 9000}),
        default_model="eye", aliases={"fast": "big", "claude-*": "m"})
    answer = get(running, "/v1/models" + query, **headers).json
    assert answer["data"] == get(running, "/v1/models").json["data"]
    found = {model["slug"]: model for model in answer["models"]}
    assert list(found) == [model["id"] for model in answer["data"]]
    for model in found.values():
        assert {name: type(model[name]) for name in CODEX_INSISTS} == CODEX_INSISTS
    efforts = {name: [level["effort"] for level in model["supported_reasoning_levels"]]
               for name, model in found.items()}
    assert efforts == {name: [] if name.startswith(("b/", "n")) else ["low", "high", "max"]
                       for name in found}
    seen = {name: (model.get("context_window"), model["input_modalities"][1:], model["description"])
            for name, model in found.items()}
    assert [seen[name] for name in ("fast", "big", "eye", "m", "b/m", "n")] == [
        (200000, [], "up/big"), (200000, [], "up/big"), (None, ["image"], "up/eye"),
        (None, ["image"], "up/m"), (9000, [], "b/m"), (9000, [], "b/n")]
    ranks = {model["priority"]: name for name, model in found.items()}
    assert len(ranks) == len(found) and max(ranks) < 0 and ranks[min(ranks)] == "eye"


def test_other_clients_get_their_list_without_codex(server, upstream):
    running = server(upstream, custom_api_key="sk-client-key-1")
    assert get(running, "/v1/models?client_version=1", originator="codex").status == 401
    for headers in ({}, {"originator": "opencode"}, {"originator": "my-codex"}):
        answer = get(running, "/v1/models", x_api_key="sk-client-key-1", **headers)
        assert list(answer.json) == ["object", "data"]
    answer = get(running, "/v1/models?client_version=1", x_api_key="sk-client-key-1",
                 anthropic_version="2026-10-21")
    assert "models" not in answer.json and "first_id" in answer.json


def test_pages_of_the_list():
    for query, ids, more in (
            ("", "abcd", False), ("limit=2", "ab", True), ("limit=2&after_id=b", "cd", False),
            ("limit=1&after_id=b", "c", True), ("limit=2&before_id=d", "bc", True),
            ("limit=3&before_id=d", "abc", False), ("before_id=a", "", False),
            ("after_id=d", "", False), ("after_id=unknown", "abcd", False),
            ("limit=1000", "abcd", False)):
        page = ifl.anthropic_page([{"id": name} for name in "abcd"],
                                  dict(urllib.parse.parse_qsl(query)))
        assert [model["id"] for model in page["data"]] == [*ids] and page["has_more"] is more
        assert (page["first_id"], page["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
    for limit in ("0", "1001", "x", "-1", "1.5"):
        with pytest.raises(ifl.BadRequest, match="from 1 to 1000"):
            ifl.anthropic_page([], {"limit": limit})


def test_one_model(server, upstream):
    running = server(upstream)
    for path in ("/v1/models/org/m2:free", "/v1/models/org%2Fm2%3Afree", "/models/org/m2:free/"):
        assert get(running, path).json["id"] == "org/m2:free"
    assert get(running, "/v1/models/m1", anthropic_version="1").json["type"] == "model"
    answer = get(running, "/v1/models/unknown")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert get(running, "/v1/models/unknown",
               anthropic_version="1").json["error"]["type"] == "not_found_error"


def test_claude_s_names_are_listed_with_where_they_lead(server, upstream):
    facts = [{"id": "big", "context": 200000, "max_output": 8192}, "small"]
    running = server(provider(upstream, models=facts), default_model="big", aliases={
        "claude-haiku*": "small", "opus-of-mine": "up/big",
        "claude-when-long": {"model": "big", "over_tokens": 9}})
    found = listed(running)
    assert {name: m["display_name"].split(" → ")[1] for name, m in found.items()
            if m["display_name"].startswith(name + " → ")} == {
        "claude-fable-5": "up/big", "claude-opus-4-8": "up/big", "claude-sonnet-4-6": "up/big",
        "claude-haiku-4-5": "up/small", "opus-of-mine": "up/big", "claude-when-long": "up/big"}
    assert all((found[name]["max_input_tokens"], found[name]["max_tokens"]) == (200000, 8192)
               for name in ("big", "claude-opus-4-8", "opus-of-mine"))
    assert "max_tokens" not in found["claude-haiku-4-5"]
    plain_list = [m["id"] for m in get(running, "/v1/models").json["data"]]
    assert "opus-of-mine" in plain_list and "claude-opus-4-8" not in plain_list
    for name in ("claude-haiku-9", "claude-anything", "gpt-9"):
        assert get(running, "/v1/models/" + name, anthropic_version="1").json["id"] == name
        assert get(running, "/v1/models/" + name).json["owned_by"] == "up"
    assert get(running, "/v1/models/haiku-9", anthropic_version="1").status == 404


def test_claude_s_names_are_not_listed_where_they_lead_nowhere(server, upstream):
    running = server(detect_local=False)
    assert listed(running) == {}
    assert get(running, "/v1/models/claude-x", anthropic_version="1").status == 404
    limited = server(provider(upstream, models=["big", "small"]),
                     aliases={"claude-haiku*": "small"},
                     client_keys=[key_entry("a", "sk-a-123456789", models=["small"])])
    found = listed(limited, "", Authorization="Bearer sk-a-123456789")
    assert list(found) == ["claude-haiku-4-5", "small"]


def test_health(server, upstream):
    answer = get(server(provider(upstream, api_keys=["very-secret-key"])), "/health")
    assert answer.json["status"] == "healthy" and answer.json["version"] == ifl.__version__
    assert answer.json["iflow_logged_in"] is False
    assert answer.json["providers"][0]["name"] == "up" and b"secret" not in answer.body
    answer = get(server(detect_local=False), "/health")
    assert (answer.status, answer.json["status"]) == (200, "degraded")


def test_the_card(server, upstream):
    running = server(upstream)
    card = get(running, "/").json
    assert (card["name"], card["base_url"]) == ("iflow2api", running.url + "/v1")
    assert card["docs"] == running.url + "/docs"
    answer = get(running, "/", Accept="text/html,*/*")
    assert answer.headers["content-type"].startswith("text/html")
    assert running.url.encode() + b"/v1" in answer.body
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(rb"<script|src=|https?://(?!127)", answer.body)
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert f'href="{path}"'.encode() in answer.body and get(running, path).status == 200


def test_metrics_page(server):
    answer = get(server(detect_local=False), "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert check_prometheus(answer.body.decode())[
        f'iflow2api_info{{version="{ifl.__version__}"}}'] == 1


def test_a_defect_of_ours_is_a_500_that_says_nothing(server, monkeypatch, log_lines):
    def fail(handler):
        raise KeyError("secret detail")
    running = server(detect_local=False)
    monkeypatch.setitem(ifl.ROUTES, "/health", {"GET": ifl.Route(fail, public=True)})
    answer = get(running, "/health")
    assert answer.status == 500 and b"secret detail" not in answer.body
    assert answer.headers["connection"] == "close"
    assert any(record.exc_info for record in log_lines)
    log_lines.clear()
    assert get(running, "/").status == 200


# --- starting and stopping ---------------------------------------------------

def test_a_server_says_where_it_is(server, gateway):
    running = server(detect_local=False)
    assert running.url == f"http://127.0.0.1:{running.port}" and running.port
    assert server(detect_local=False, host="0.0.0.0").url.startswith("http://127.0.0.1:")
    with pytest.raises(OSError):                         # the port is taken
        ifl.serve(gateway(detect_local=False), host="127.0.0.1", port=running.port)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_ipv6(gateway):
    try:
        running = ifl.serve(gateway(detect_local=False), host="::1", port=0)
    except OSError:
        pytest.skip("no IPv6 here")
    with running:
        assert running.url == f"http://[::1]:{running.port}"
        assert get(running, "/health", Host=f"[::1]:{running.port}").status == 200


def closing(running, drain_s):
    """A thread that closes a server."""
    closer = threading.Thread(target=running.close, args=(drain_s,), daemon=True)
    closer.start()
    return closer


def test_closing_lets_running_answers_end_and_takes_nothing_new(server, upstream):
    go = threading.Event()
    upstream.plays(sse(chunk("x"), go, chunk(finish="stop"), DONE))
    running = server(upstream)
    with Client(running) as client, Client(running) as idle:
        assert idle.request("GET", "/health").answer().status == 200
        client.post(chat(True)).head()
        closer = closing(running, 60)
        assert idle.is_closed()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", running.port), 1).close()
        assert closer.is_alive()
        go.set()
        assert records_of(client.pieces()) == [chunk("x"), chunk(finish="stop"), DONE]
        # though the client would keep its connection
        closer.join(2)
        try:
            assert not closer.is_alive()
        finally:
            client.hang_up()
            closer.join(WAIT_S)


def test_closing_cuts_off_what_does_not_end(server, upstream):
    upstream.plays(sse(chunk("x"), HOLD))
    running = server(upstream)
    with Client(running) as client:
        client.post(chat(True)).head()
        started = time.monotonic()
        running.close(0.1)
        assert time.monotonic() - started < 2
        client.piece()
        assert records_of(client.pieces())[-1]["error"]["message"] == "the server is shutting down"
        assert client.is_closed()
    until(lambda: upstream.hung_up == 1, 2)
    running.close()                                       # once more does no harm


@pytest.fixture
def like_winsock(monkeypatch, looks_often):
    """Shutting a socket down tells its peer, and wakes nobody on this side."""
    monkeypatch.setattr(socket, "SHUT_RDWR", socket.SHUT_WR)
    monkeypatch.setattr(ifl.MovedStream, "AFTER_FINISH_S", 600.0)
    monkeypatch.setattr(ifl, "LOOK_UP_S", 0.05)


@pytest.mark.usefixtures("like_winsock")
@pytest.mark.parametrize("stream", [True, False])
def test_who_left_is_noticed_where_a_shutdown_wakes_nobody(server, upstream, stream):
    go = threading.Event()
    upstream.plays(sse(chunk("x"), go, DONE) if stream else lambda seen: go.wait(3 * WAIT_S)
                   and plain(b"{}"))
    running = server(upstream, keepalive_s=600)
    with Client(running) as client:
        client.post(chat(stream))
        until(lambda: running.gateway.in_flight == 1 and upstream.requests, what="the call")
        if stream:
            client.head()
            client.piece()
    try:
        until(lambda: running.gateway.in_flight == 0, what="the end of the call")
    finally:
        go.set()
    assert post(running, chat()).status == 200


@pytest.mark.usefixtures("like_winsock")
def test_closing_waits_for_nobody_idle_where_a_shutdown_wakes_nobody(server, upstream):
    running = server(upstream)
    with Client(running) as idle:
        assert idle.request("GET", "/health").answer().status == 200
        closer = closing(running, 60)
        closer.join(WAIT_S)
        assert not closer.is_alive()


def test_nothing_of_a_closed_gateway_stays_behind(upstream):
    before = set(threading.enumerate())
    with ifl.serve(ifl.Gateway(settings_for([upstream]), environ={}), port=0) as running:
        assert records_of(post(running, chat(True)).body) == HELLO
    until(lambda: not [thread for thread in set(threading.enumerate()) - before
                       if "_FakeHandler" not in repr(thread)
                       and not thread.name.startswith("Thread-")], 2, "the end of all threads")


def test_two_servers_in_one_process_know_nothing_of_each_other(server, upstreams):
    first, second = upstreams(), upstreams()
    one = server(provider(first, "p"), default_model="a", custom_api_key="key-of-one")
    two = server(provider(second, "p"), default_model="b")
    assert post(one, {"messages": MESSAGES}, X_Api_Key="key-of-one").status == 200
    assert post(two, {"messages": MESSAGES}).status == 200
    assert (first.last.json["model"], second.last.json["model"]) == ("a", "b")
    assert len(first.requests) == len(second.requests) == 1
    one.close()
    assert post(two, {"messages": MESSAGES}).status == 200


def test_a_server_of_another_gateway_may_be_the_upstream(server, upstream):
    outer = server(server(upstream).url + "/v1")
    assert records_of(post(outer, chat(True)).body) == HELLO


# === 16. Messages and Responses over HTTP ====================================

CHAT_PATH, MESSAGES_PATH, RESPONSES_PATH = (
    "/v1/chat/completions", "/v1/messages", "/v1/responses")
ALL_PATHS = (CHAT_PATH, MESSAGES_PATH, RESPONSES_PATH)

#: A request that each of them takes.
ASK = {"model": "x", "max_tokens": 9, "input": "q", "messages": MESSAGES}


@pytest.fixture
def alone(server, upstream):
    """A server with one provider, whose keep-alives come soon."""
    return server(provider(upstream, "p"), default_model="m", keepalive_s=0.05)


TOOL = {"type": "function", "function": {"name": "add",
                                         "parameters": {"type": "object", "properties": {}}}}
CALLING = sse(chunk(tool_calls=[{"index": 0, "id": "call_9", "type": "function",
                                 "function": {"name": "add", "arguments": ""}}]),
              chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"a": 1}'}}]),
              chunk(finish="tool_calls"), DONE)


def named_events(data):
    """(event name or None, data) of each record; comments are left out."""
    found = []
    for part in data.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in part.split("\n") if line[:1] not in ("", ":"))
        if lines.get("data", DONE) != DONE:
            found.append((lines.get("event"), json.loads(lines["data"])))
    return found


def test_messages_stream_over_http(alone, upstream):
    answer = post(alone, {**ASK, "model": "claude-x", "stream": True},
                  MESSAGES_PATH + "?beta=true", anthropic_version="2023-06-01")
    events = named_events(answer.body)
    assert answer.status == 200 and answer.headers["request-id"].startswith("req_")
    assert answer.headers["x-request-id"] == answer.headers["request-id"]
    assert [name for name, _ in events] == [event["type"] for _, event in events]
    assert (events[0][0], events[-1][0]) == ("message_start", "message_stop")
    assert upstream.last.json["model"] == "m"
    assert upstream.last.json["stream_options"] == {"include_usage": True}


def test_error_after_the_first_event_is_in_band(alone, upstream):
    for path, name in ((MESSAGES_PATH, "error"), (RESPONSES_PATH, "response.failed")):
        upstream.plays(sse(chunk("Hi"), {"error": {"message": "slow down", "code": 429}}))
        answer = post(alone, {**ASK, "stream": True}, path)
        last, facts = named_events(answer.body)[-1]
        assert (answer.status, last) == (200, name) and "slow down" in json.dumps(facts)
        assert b"Hi" in answer.body


@pytest.mark.parametrize("path", ALL_PATHS)
def test_error_after_a_keepalive_is_in_band(alone, upstream, path):
    go, error = threading.Event(), {"error": {"message": "broken", "type": "server_error"}}
    upstream.plays(lambda seen: go.wait(WAIT_S) and plain(error, 500))
    with Client(alone) as client:
        assert client.post({**ASK, "stream": True}, path=path).head()[0] == 200
        assert client.piece().startswith(b": keep-alive")
        go.set()
        rest = client.pieces()
    assert b"broken" in rest and b"[DONE]" not in rest
    assert path != RESPONSES_PATH or named_events(rest)[-1][0] == "response.failed"


@pytest.mark.parametrize("path, status, told", [
    (MESSAGES_PATH, 529, "overloaded_error"), (RESPONSES_PATH, 503, "server_error"),
    (CHAT_PATH, 200, None)])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_breaks_off_before_its_first_word_is_not_taken_for_an_empty_one(
        alone, upstream, path, status, told, stream):
    reason = "insufficient_system_resource"
    upstream.plays(sse(ROLE, chunk(finish=reason), DONE) if stream else
                   plain({**completion(None, reason), "usage": {}}))
    answer = post(alone, {**ASK, "stream": stream}, path)
    assert reason in answer.body.decode()
    if stream and path == RESPONSES_PATH:
        events = named_events(answer.body)
        assert answer.status == 200
        assert [name for name, _ in events] == ["response.created", "response.in_progress",
                                                "response.failed"]
        assert events[-1][1]["response"]["error"]["code"] == "server_is_overloaded"
        return
    assert answer.status == status and (status == 200 or answer.json["error"]["type"] == told)


def test_a_broken_answer_leaves_room_for_another_upstream(server, upstream):
    alone = server(upstream, aliases={"x": ["m", "n"]})
    upstream.plays(sse(ROLE, chunk(finish="network_error"), DONE))
    answer = post(alone, {"model": "x", "input": "q", "stream": True}, RESPONSES_PATH)
    assert named_events(answer.body)[-1][0] == "response.completed"
    assert [seen.json["model"] for seen in upstream.requests] == ["m", "n"]


@pytest.mark.parametrize("originator", ["codex_exec", "Codex Desktop", "codex_vscode", "CODEX"])
def test_codex_is_kept_awake_by_data(alone, upstream, originator):
    go = threading.Event()
    upstream.plays(lambda seen: go.wait(WAIT_S) and usual_reply(seen))
    with Client(alone) as client:
        client.post({**ASK, "stream": True}, path=RESPONSES_PATH,
                    headers={"originator": originator}).head()
        assert client.piece().startswith(b'data: {"type":"ping"}')
        go.set()
        assert b"response.completed" in client.pieces()


TOLD_OVERFLOWS = [
    {"message": "This model's maximum context length is 8192 tokens. However, you requested 9000 "
                "tokens (8500 in the messages, 500 in the completion).",
     "code": "context_length_exceeded"},
    {"message": "request (9000 tokens) exceeds the available context size (8192 tokens), try "
                "increasing it", "type": "exceed_context_size_error"},
    {"message": "Invalid request: Your request exceeded model token limit: 8192 (requested: 9000)"}]


@pytest.mark.parametrize("error", TOLD_OVERFLOWS)
def test_overflow_reaches_each_client_in_its_words(alone, upstream, error):
    upstream.plays(*[plain({"error": error}, 400)] * 3)
    answer = post(alone, ASK, MESSAGES_PATH)
    assert answer.status == 400 and re.search(
        r"prompt is too long: (9000|8991|8500) tokens > 8192 maximum",
        answer.json["error"]["message"])
    told = {**error, "code": "context_length_exceeded"}
    assert post(alone, ASK, CHAT_PATH).error == told
    answer = post(alone, ASK, RESPONSES_PATH)
    assert answer.status == 400
    assert answer.error == {"type": "invalid_request_error", "param": None, **told}


MISSING_MODELS = [
    (404, {"object": "error", "message": "The model `m` does not exist.", "type": "NotFoundError",
           "param": None, "code": 404}),
    (404, {"error": {"message": "model 'm' not found, try pulling it first"}}),
    (400, {"error": {"message": "Model Not Exist", "type": "invalid_request_error",
                     "code": "invalid_request_error"}}),
    (400, {"error": {"code": "1211", "message": "模型不存在，请检查模型代码。"}}),
    (200, {"error": {"code": 1211, "message": "?"}}),
    (404, {"error": {"message": "Not found the model m or Permission denied",
                     "type": "resource_not_found_error"}}),
    (400, {"error": {"message": "m is not a valid model ID", "code": 400}}),
    (200, {"status": "435", "msg": "no model"}),
    (400, {"error": {"message": "The model `m` does not exist", "code": "other", "x": 1}})]


@pytest.mark.parametrize("status, error", MISSING_MODELS)
def test_a_model_the_upstream_does_not_know_is_a_404(alone, upstream, status, error):
    upstream.plays(*[plain(error, status)] * 3)
    for path in (CHAT_PATH, RESPONSES_PATH):
        answer = post(alone, ASK, path)
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert answer.error.get("x") == error.get("error", {}).get("x")
    answer = post(alone, ASK, MESSAGES_PATH)
    assert answer.status == 404 and answer.json["error"]["type"] == "not_found_error"


def test_other_errors_are_no_missing_model():
    for status, message, code in (
            (429, "model m does not exist", "model_not_found"), (401, "model not found", None),
            (500, "model not found", None), (404, "404 page not found", None),
            (400, "The model does not support images. The file was not found", None),
            (400, "tool model_x not found", None)):
        assert not ifl.is_missing_model(status, message, code), message


def test_count_tokens_and_telemetry_need_no_upstream(alone, upstream):
    ask = {"model": "claude-x", "messages": [{"role": "user", "content": "hello " * 100}]}
    path = MESSAGES_PATH + "/count_tokens"
    assert 50 < post(alone, {**ask, "tools": []}, path + "?beta=true").json["input_tokens"] < 400
    assert post(alone, {"model": "x"}, path).status == 400
    for version in ("", "v2/"):
        path = f"/api/event_logging/{version}batch"
        assert post(alone, {"events": []}, path).status == 200
    counted = post(alone, {"model": "x", "input": "hello"}, "/v1/responses/input_tokens")
    assert counted.json["input_tokens"] > 0 and not upstream.requests


def test_cache_warm_up_is_answered_here(alone, upstream):
    message = post(alone, {**ASK, "max_tokens": 0}, MESSAGES_PATH).json
    assert message["content"] == [] and message["stop_reason"] == "max_tokens"
    answer = post(alone, {**ASK, "max_tokens": 0, "stream": True}, MESSAGES_PATH)
    assert named_events(answer.body)[-1][0] == "message_stop" and not upstream.requests


@pytest.mark.parametrize("facts, details", [
    ({"thread": {"id": "t"}}, {"error_code": "thread_unsupported_request", "unsupported": []}),
    ({"compaction": {"type": "summarize"}}, None), ({"thread": None}, "")])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_native", [False, True])
def test_what_the_tool_runners_of_the_sdks_read(
        server, upstream, facts, details, stream, is_native):
    """They go on without `thread` where the details say that it is not supported; a maker's own
    Messages would leave it unread.
    """
    road = NATIVE_ROADS[0]
    made = server(native(road, upstream) if is_native else upstream)
    if is_native:
        upstream.plays(native_sse(road) if stream else plain(road.plain))
    answer = post(made, {**ASK, "model": "m", **facts, "stream": stream}, MESSAGES_PATH)
    assert answer.status == (200 if details == "" else 400)
    assert answer.status == 200 or answer.json["error"].get("details") == details
    assert bool(upstream.requests) == (answer.status == 200)


@pytest.mark.parametrize("facts", [
    {"max_tokens": None}, {"messages": []}, {"messages": None}, {"max_tokens": "9"},
    {"messages": [{"role": "robot", "content": "q"}]}, {"thread": {"id": "t"}},
    {"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "file", "file_id": "f"}}]}]},
    {"mcp_servers": [{"url": "http://x"}]}, {"tools": [{"input_schema": {}}]}])
def test_bad_messages_requests(alone, upstream, facts):
    body = {**ASK, **facts}
    answer = post(alone, {name: value for name, value in body.items() if value is not None},
                  MESSAGES_PATH)
    assert answer.status == 400 and answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert answer.json["request_id"] == answer.headers["request-id"] and not upstream.requests


# --- stored responses ----------------------------------------------------------

def test_responses_are_kept_and_dropped(alone, upstream):
    first = post(alone, {"model": "x", "input": "one"}, RESPONSES_PATH).json
    second = post(alone, {"model": "x", "input": "two", "previous_response_id": first["id"]},
                  RESPONSES_PATH).json
    assert [m["content"] for m in upstream.last.json["messages"]] == ["one", "Hello", "two"]
    place = f"{RESPONSES_PATH}/{first['id']}"
    assert get(alone, place).json == first
    items = get(alone, f"{RESPONSES_PATH}/{second['id']}/input_items?order=asc&limit=2").json
    assert len(items["data"]) == 2 and items["has_more"] and items["data"][0]["role"] == "user"
    assert get(alone, place, "DELETE").json["deleted"] is True
    assert get(alone, place).status == 404
    answer = post(alone, {"model": "x", "input": "q", "previous_response_id": first["id"]},
                  RESPONSES_PATH)
    assert (answer.status, answer.error["code"]) == (400, "previous_response_not_found")
    gone = post(alone, {"model": "x", "input": "q", "store": False}, RESPONSES_PATH).json
    assert get(alone, f"{RESPONSES_PATH}/{gone['id']}").status == 404


def test_a_failed_response_is_kept(alone, upstream):
    upstream.plays(sse(chunk("Hi"), {"error": {"message": "broken", "code": 500}}))
    answer = post(alone, {**ASK, "stream": True}, RESPONSES_PATH)
    failed = named_events(answer.body)[-1][1]["response"]
    assert get(alone, f"{RESPONSES_PATH}/{failed['id']}").json == failed
    assert failed["status"] == "failed"


def test_what_can_be_done_to_a_kept_response(alone):
    place = f"{RESPONSES_PATH}/{post(alone, ASK, RESPONSES_PATH).json['id']}"
    for method, end, status in (("POST", "", 405), ("GET", "/cancel", 404),
                                ("DELETE", "/input_items", 404), ("GET", "", 200),
                                ("GET", "/input_items?after=item_0", 200),
                                ("GET", "/input_items?after=no", 400)):
        assert get(alone, place + end, method).status == status, (method, end)


@pytest.mark.parametrize("field", [
    {"background": True}, {"prompt": {"id": "p"}}, {"conversation": "c"},
    {"previous_response_id": "resp_x", "conversation": "c"}])
def test_what_responses_cannot_do_is_refused(alone, upstream, field):
    answer = post(alone, {"model": "x", "input": "q", **field}, RESPONSES_PATH)
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"
    assert not upstream.requests


def test_the_response_store(clock):
    store = ifl.ResponseStore(clock)
    store.keep({"id": "a", "output": [{"id": "m", "x": 1}]}, [{"role": "user"}])
    store.keep({"id": "b", "output": [{"id": "only"}]}, [])
    assert store.item("only")["id"] == "only"
    store.drop("b")
    store.keep({"id": "c", "output": [{"id": "n"}]}, [], "alice")
    assert store.recall("a") == [{"role": "user"}, {"id": "m", "x": 1}]
    assert store.item("m")["x"] == 1
    assert store.item("n", "alice") and store.recall("c", "alice")
    assert store.item("n") is store.recall("c") is None
    assert store.item("m", "alice") is store.recall("a", "alice") is None
    assert store.find("b") is store.item("only") is None
    clock.now += store.KEPT_S + 1
    assert store.find("a") is None


def test_the_response_store_is_bounded(monkeypatch):
    monkeypatch.setattr(ifl.ResponseStore, "LIMIT", 5)
    monkeypatch.setattr(ifl.ResponseStore, "LIMIT_SIZE", 2000)
    store = ifl.ResponseStore()
    for number in range(100):
        for _ in range(2):
            store.keep({"id": str(number), "output": []}, [{"text": "x" * 50}])
    assert store.find("94") is None and store.find("95") and 0 < store._size < 700
    store.keep({"id": "big", "output": []}, [{"text": "x" * 3000}])
    assert store.find("99") is store.find("big") is None and store._size == 0


def test_kept_responses_belong_to_the_key_that_made_them(server, upstream):
    alone = server(upstream, custom_api_key="sk-common", client_keys=[
        key_entry("alice", "sk-alice"), key_entry("custom_api_key", "sk-bob")])

    def ask(key, body=None, path=RESPONSES_PATH, method="POST"):
        with Client(alone) as client:
            return client.request(method, path, {"model": "x", **body} if body else b"",
                                  headers={"Authorization": "Bearer " + key}).answer()

    made = ask("sk-alice", {"input": "secret"}).json
    place = f"{RESPONSES_PATH}/{made['id']}"
    following = {"input": "q", "previous_response_id": made["id"]}
    item = {"input": [{"type": "item_reference", "id": made["output"][0]["id"]},
                      {"role": "user", "content": "q"}]}
    for other in ("sk-bob", "sk-common"):
        assert ask(other, following).error["code"] == "previous_response_not_found"
        assert ask(other, item).status == 400
        for method, end in (("GET", ""), ("GET", "/input_items"), ("DELETE", "")):
            assert ask(other, None, place + end, method).status == 404
    assert ask("sk-alice", following).status == ask("sk-alice", item).status == 200
    for method, status in (("GET", 200), ("DELETE", 200), ("GET", 404)):
        assert ask("sk-alice", None, place, method).status == status
    made = ask("sk-common", {"input": "q"}).json
    alone.gateway.apply(settings_for([upstream]))
    assert ask("any", None, f"{RESPONSES_PATH}/{made['id']}", "GET").status == 200


def test_the_three_dialects_reach_the_upstream_alike(alone, upstream):
    system, question = "Be brief.", {"role": "user", "content": "What is 1+1?"}
    schema = TOOL["function"]["parameters"]
    for path, body in (
            (CHAT_PATH, {"messages": [{"role": "system", "content": system}, question],
                         "tools": [TOOL], "max_tokens": 50}),
            (MESSAGES_PATH, {"system": system, "messages": [question], "max_tokens": 50,
                             "tools": [{"name": "add", "input_schema": schema}]}),
            (RESPONSES_PATH, {"instructions": system, "input": question["content"],
                              "max_output_tokens": 50, "tools": [
                                  {"type": "function", "name": "add", "parameters": schema}]})):
        assert post(alone, {"model": "m", **body}, path).status == 200
    first, second, third = (seen.json for seen in upstream.requests)
    assert first == second == third


def test_a_model_is_found_under_each_name_that_leads_to_it(server, upstream):
    alone = server(provider(upstream, "p", models=["a", "o/b"]),
                     provider(upstream, "q", models=["a"]))
    gateway = alone.gateway
    for name, owner in (("a", "p"), ("p/a", "p"), ("p/o/b", "p"), ("o/b", "p"), ("q/a", "q")):
        model = ifl.find_model(gateway, name)
        assert (model["id"], model["owned_by"]) == (name, owner)
    for name in ("p/zzz", "x/a", "p/"):
        assert ifl.find_model(gateway, name) is None
    assert get(alone, "/v1/models/p%2Fa").json["id"] == "p/a"
    assert get(alone, "/v1/models/q/b").status == 404
    alice = ifl.parse_client_key(key_entry("alice", "sk-alice", models=["p/a"]))
    assert ifl.find_model(gateway, "p/a", alice) and ifl.find_model(gateway, "q/a", alice) is None


def test_compact(alone, upstream):
    compact, summary = RESPONSES_PATH + "/compact", plain(completion("the summary"))
    upstream.plays(summary)
    talk = {"model": "x", "input": [{"role": "user", "content": "long talk"}]}
    answer = post(alone, talk, compact).json
    assert answer["object"] == "response.compaction"
    assert answer["output"][-1]["type"] == "compaction"
    for body in ({"input": [answer["output"][-1], {"role": "user", "content": "go on"}]},
                 {"input": "go on", "previous_response_id": answer["id"]}):
        assert post(alone, {"model": "x", **body}, RESPONSES_PATH).status == 200
        assert "the summary" in json.dumps(upstream.last.json["messages"])
    upstream.plays(summary)
    answer = post(alone, {"model": "x", "stream": True, "input": "long talk"}, compact)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["object"] == "response.compaction"
    assert not upstream.last.json.get("stream")


# --- the official SDKs -------------------------------------------------------

def npm_folder(package):
    """Where `.ci/run` has put the packages for Node.js, once this one is there."""
    modules = os.path.join(os.path.dirname(PROGRAM), ".ci", "npm", "node_modules")
    there = shutil.which("node") and os.path.isdir(os.path.join(modules, *package.split("/")))
    if not there and not SDK_REQUIRED:
        pytest.skip(f"Node.js or its package {package} is not installed")
    return modules


def run_in_node(package, script, *words):
    """What a script with the package prints."""
    done = subprocess.run(["node", "-e", script, *words], timeout=6 * WAIT_S, text=True,
                          env={**os.environ, "NODE_PATH": npm_folder(package)},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sdk_named(name):
    """The SDK, a skip where it is missing, a failure where it was promised."""
    try:
        return __import__(name)
    except ImportError:
        if SDK_REQUIRED:
            pytest.fail(f"the {name} SDK is missing")
        pytest.skip(f"needs the {name} SDK")


@pytest.fixture
def claude(alone):
    """(the anthropic SDK, its client)"""
    anthropic = sdk_named("anthropic")
    return anthropic, anthropic.Anthropic(base_url=alone.url, api_key="k", max_retries=0)


@pytest.fixture
def gpt(alone):
    """(the openai SDK, its client)"""
    openai = sdk_named("openai")
    return openai, openai.OpenAI(base_url=alone.url + "/v1", api_key="k", max_retries=0)


CLAUDE_ASK = {"model": "claude-x", "max_tokens": 50, "messages": MESSAGES}
PICTURE_BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                             "data": "AAAA"}}
PICTURE_URL = "data:image/png;base64,AAAA"


def test_anthropic_sdk(claude, upstream):
    _, client = claude
    assert client.messages.create(**CLAUDE_ASK).content[0].text == "Hello"
    with client.messages.stream(**CLAUDE_ASK) as stream:
        assert "".join(stream.text_stream) == "Hello"
        assert stream.get_final_message().stop_reason == "end_turn"
    upstream.plays(CALLING)
    tools = [{"name": "add", "input_schema": {"type": "object"}}]
    with client.messages.stream(**CLAUDE_ASK, tools=tools) as stream:
        block = stream.get_final_message().content[0]
    assert (block.type, block.name, block.input,
            block.id) == ("tool_use", "add", {"a": 1}, "call_9")
    question = {"role": "user", "content": [PICTURE_BLOCK]}
    client.messages.create(**{**CLAUDE_ASK, "messages": [question]})
    assert upstream.last.json["messages"][0]["content"][0]["image_url"]["url"] == PICTURE_URL
    assert client.messages.count_tokens(model="x", messages=MESSAGES).input_tokens > 0
    names = [model.id for model in client.models.list()]
    assert names[:len(ifl.CLAUDE_MODELS)] == list(ifl.CLAUDE_MODELS.values())


def test_anthropic_sdk_errors(claude, upstream):
    anthropic, client = claude
    for status, name in ((400, "BadRequestError"), (401, "PermissionDeniedError"),
                         (404, "NotFoundError"), (422, "BadRequestError"),
                         (429, "RateLimitError"), (500, "InternalServerError"),
                         (503, "InternalServerError")):
        upstream.plays(plain({"error": {"message": "no"}}, status))
        with pytest.raises(getattr(anthropic, name)) as caught:
            client.messages.create(**CLAUDE_ASK)
        assert caught.value.request_id.startswith("req_")
        assert status != 429 or caught.value.response.headers[
            "retry-after"] == str(ifl.DEFAULT_RETRY_AFTER_S)
    # the upstream dies in mid-answer
    upstream.plays(sse(chunk("Hi"), end=False))
    with pytest.raises(anthropic.APIError):
        with client.messages.stream(**CLAUDE_ASK) as stream:
            stream.get_final_message()
    upstream.plays(plain({"error": {"message": "Range of input length should be [1, 30720]"}}, 400))
    with pytest.raises(anthropic.BadRequestError,
                       match="prompt is too long: 30721 tokens > 30720 maximum"):
        client.messages.create(**CLAUDE_ASK)
    upstream.plays(*[plain({"error": {"message": "no", "code": "insufficient_quota"}}, 429)] * 2)
    with pytest.raises(anthropic.RateLimitError):        # is not tried again
        client.with_options(max_retries=3).messages.create(**CLAUDE_ASK)
    assert len(upstream.script) == 1


def test_anthropic_sdk_thinking_and_parallel_calls(claude, upstream):
    """What it accumulates from a stream goes back as it is, with the results, and reaches the
    upstream in order.
    """
    _, client = claude
    ask = {"model": "claude-x", "max_tokens": 5000,
           "thinking": {"type": "enabled", "budget_tokens": 1024},
           "tools": [{"name": "add", "input_schema": {"type": "object"}}]}
    idents = ["one", "functions.add:1"]
    upstream.plays(sse(
        chunk(reasoning_content="be"), chunk(reasoning_content="cause"), chunk("so"),
        *(chunk(tool_calls=[{"index": at, "id": ident, "type": "function",
                             "function": {"name": "add", "arguments": ""}}])
          for at, ident in enumerate(idents)),
        *(chunk(tool_calls=[{"index": at, "function": {"arguments": text}}])
          for at, text in ((1, '{"b": 2}'), (0, '{"a": 1,}'))), chunk(finish="tool_calls"), DONE))
    with client.messages.stream(**ask, messages=MESSAGES) as stream:
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    thought, _, *uses = message.content
    assert thought.thinking == "because" and thought.signature
    assert [use.input for use in uses] == [{"a": 1}, {"b": 2}]
    assert message.stop_reason == "tool_use" and re.fullmatch("[A-Za-z0-9_-]+", uses[1].id)
    results = [{"type": "tool_result", "tool_use_id": uses[0].id,
                "content": [{"type": "text", "text": "3"}, PICTURE_BLOCK]},
               {"type": "tool_result", "tool_use_id": uses[1].id, "content": "no",
                "is_error": True}]
    client.messages.create(**ask, messages=[
        *MESSAGES, {"role": "assistant", "content": message.content},
        {"role": "user", "content": results}])
    _, said, first, second, rest = upstream.last.json["messages"]
    assert said["reasoning_content"] == "because" and said["content"] == "so"
    assert [call["id"] for call in said["tool_calls"]] == idents == [
        first["tool_call_id"], second["tool_call_id"]]
    assert first["content"].startswith("3") and second["content"] == "[tool error] no"
    assert rest["content"][-1]["image_url"]["url"] == PICTURE_URL


#: What a model calls, and how it ends once it has seen the result.
LOOKS = {"id": "call_1", "type": "function", "function": {"name": "look",
                                                          "arguments": '{"at": "it"}'}}
#: Runs the loop of the SDK for Node.js against the address and with the `stream` it is given.
NODE_RUNNER = """
const {default: Anthropic} = require('@anthropic-ai/sdk');
const {betaTool} = require('@anthropic-ai/sdk/helpers/beta/json-schema');
const [url, stream] = process.argv.slice(-2);
const look = betaTool({name: 'look', description: 'Look.', run: input => 'seen ' + input.at,
  inputSchema: {type: 'object', properties: {at: {type: 'string'}}}});
new Anthropic({apiKey: 'none', baseURL: url, maxRetries: 0}).beta.messages.toolRunner({
  model: 'm1', max_tokens: 99, messages: [{role: 'user', content: 'go'}], tools: [look],
  stream: stream === 'true'}).runUntilDone().then(message => console.log(message.content[0].text));
"""


def run_tools_in_python(url, stream):
    """What the model says last in the loop of the SDK for Python."""
    anthropic = sdk_named("anthropic")

    @anthropic.beta_tool
    def look(at: str) -> str:
        """Look."""
        return "seen " + at

    with anthropic.Anthropic(api_key="none", base_url=url, max_retries=0, timeout=WAIT_S) as client:
        runner = client.beta.messages.tool_runner(
            model="m1", max_tokens=99, messages=[GO], tools=[look], stream=stream)
        return runner.until_done().content[0].text


def run_tools_in_node(url, stream):
    return run_in_node("@anthropic-ai/sdk", NODE_RUNNER, url, str(stream).lower())


@pytest.mark.parametrize("run_tools", [run_tools_in_python, run_tools_in_node])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_the_tool_runners_of_anthropic_s_sdks(server, upstream, run_tools, stream):
    """They send `thread`, and the whole history once they are told that there is none."""
    upstream.plays(thinks(stream, LOOKS), sse(chunk("done"), chunk(finish="stop"), DONE) if stream
                   else plain(completion("done")))
    running = server(upstream)
    assert run_tools(running.url, stream) == "done"
    first, second = [seen.json["messages"] for seen in upstream.requests]
    assert second[:len(first)] == first and [message["role"] for message in second] == [
        "user", "assistant", "tool"]
    assert second[1]["tool_calls"][0]["id"] == second[2]["tool_call_id"]
    assert second[2]["content"] == "seen it"


def test_openai_sdk_responses(gpt, upstream):
    openai, client = gpt
    first = client.responses.create(model="gpt-x", input="q")
    assert first.output_text == "Hello" and first.status == "completed"
    assert upstream.last.json["model"] == "m"
    upstream.plays(plain(completion("more")))
    assert client.responses.create(model="gpt-x", input="r",
                                   previous_response_id=first.id).output_text == "more"
    with client.responses.stream(model="gpt-x", input="q") as stream:
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == "Hello"
        assert stream.get_final_response().output_text == "Hello"
    upstream.plays(CALLING)
    tools = [{"type": "function", **TOOL["function"], "strict": False}]
    with client.responses.stream(model="gpt-x", input="q", tools=tools) as stream:
        call = stream.get_final_response().output[0]
    assert (call.type, call.name, call.arguments,
            call.call_id) == ("function_call", "add", '{"a": 1}', "call_9")
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="gpt-x", input="q", previous_response_id="resp_nothing")
    upstream.plays(plain({"error": {"message": "no"}}, 429))
    with pytest.raises(openai.RateLimitError):
        client.responses.create(model="gpt-x", input="q")


def test_openai_sdk_parses_structured_output(gpt, upstream):
    answer = sdk_named("pydantic").create_model("Answer", number=(int, ...))
    upstream.plays(plain(completion('{"number": 7}')))
    assert gpt[1].responses.parse(model="gpt-x", input="q",
                                  text_format=answer).output_parsed.number == 7
    assert upstream.last.json["response_format"]["type"] == "json_schema"


@pytest.mark.parametrize("preserve, content, reasoning",
                         [(False, "think\n\nanswer", None), (True, "answer", "think")])
def test_openai_sdk_reads_iflow_reasoning(iflow, preserve, content, reasoning):
    fake, start = iflow
    server = start(preserve_reasoning_content=preserve)
    client = sdk_named("openai").OpenAI(base_url=server.url + "/v1", api_key="k", max_retries=0)
    ask = {"model": "glm-5", "messages": MESSAGES}
    fake.plays(plain(completion("answer", reasoning_content="think")),
               sse(chunk(reasoning_content="think"), chunk("answer"), chunk(finish="stop")))
    message = client.chat.completions.create(**ask).choices[0].message
    assert message.content == content and getattr(message, "reasoning_content", None) == reasoning
    deltas = [chunk.choices[0].delta
              for chunk in client.chat.completions.create(**ask, stream=True)]
    assert "".join(d.content or "" for d in deltas) == content
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == (reasoning or "")


# === 16. Native roads ========================================================

class NativeRoad(NamedTuple):
    """A dialect that an upstream speaks itself: what it streams and answers there."""
    field: str
    path: str                              # of the client
    asked: str                             # path at the upstream
    lead: List[dict]                       # events before the answer begins
    content: dict
    end: List[dict]
    plain: dict
    counts: tuple                          # prompt, completion, cached


def _events(*events) -> List[bytes]:
    return [ifl.encode_event(event) for event in events]


def native_sse(road, *, lead=None, content=None, end=None, **facts):
    items = (road.lead if lead is None else lead, [road.content] if content is None else content,
             road.end if end is None else end)
    return sse(*_events(*itertools.chain(*items)), **facts)


_ANSWER = {"id": "resp_up", "object": "response", "status": "in_progress", "model": "up-model",
           "output": [], "error": None, "usage": None}
_ITEM = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "Hi", "annotations": []}]}
_RESPONSES_USAGE = {"input_tokens": 300, "input_tokens_details": {"cached_tokens": 250},
                    "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 2},
                    "total_tokens": 307}
_MESSAGE = {"id": "msg_up", "type": "message", "role": "assistant", "model": "up-model",
            "content": [], "stop_reason": None, "stop_sequence": None}
_MESSAGES_USAGE = {"input_tokens": 20, "cache_read_input_tokens": 250,
                   "cache_creation_input_tokens": 30, "output_tokens": 1}
NATIVE_ROADS = [
    NativeRoad(
        "messages_url", MESSAGES_PATH, "/v1/messages",
        [{"type": "message_start", "message": {**_MESSAGE, "usage": _MESSAGES_USAGE}},
         {"type": "ping"},
         {"type": "content_block_start", "index": 0,
          "content_block": {"type": "text", "text": ""}}],
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
        [{"type": "content_block_stop", "index": 0},
         {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
          "usage": {"output_tokens": 7}}, {"type": "message_stop"}],
        {**_MESSAGE, "content": [{"type": "text", "text": "Hi"}], "stop_reason": "end_turn",
         "usage": {**_MESSAGES_USAGE, "output_tokens": 7}}, (300, 7, 250)),
    NativeRoad(
        "responses_url", RESPONSES_PATH, "/v1/responses",
        [{"type": "response.created", "sequence_number": 0, "response": _ANSWER},
         {"type": "response.output_item.added", "sequence_number": 1, "output_index": 0,
          "item": {**_ITEM, "content": [], "status": "in_progress"}}],
        {"type": "response.output_text.delta", "sequence_number": 2, "item_id": "msg_1",
         "output_index": 0, "content_index": 0, "delta": "Hi"},
        [{"type": "response.output_item.done", "sequence_number": 3, "output_index": 0,
          "item": _ITEM},
         {"type": "response.completed", "sequence_number": 4, "response": {
             **_ANSWER, "status": "completed", "output": [_ITEM], "usage": _RESPONSES_USAGE}}],
        {**_ANSWER, "status": "completed", "output": [_ITEM], "usage": _RESPONSES_USAGE},
        (300, 7, 250))]
native_roads = pytest.mark.parametrize("road", NATIVE_ROADS, ids=lambda road: road.field)


def native(road, fake, name="p", **facts):
    """A provider whose only address is that of its native road."""
    url = fake.url if road.field == "responses_url" else fake.url[:-len("/v1")]
    return {"name": name, road.field: url, "api_keys": ["sk-key-one"], **facts}


def booked(made):
    """The usage of the only model that was asked, once it is booked."""
    until(lambda: made.gateway.ledger.report("model", 1, {}))
    row, = made.gateway.ledger.report("model", 1, {})
    return row


@native_roads
@pytest.mark.parametrize("stream", [True, False])
def test_native_road_passes_both_ways_as_it_came(server, upstream, road, stream):
    made = server(native(road, upstream), default_model="up-model")
    sent = (b'{ "model":"any",\n "max_tokens":9, "input":"q", "x_new":[1.50], "stream":%s,'
            b'"messages":[{"role":"user","content":"q"}] }' % (b"true" if stream else b"false"))
    upstream.plays(native_sse(road) if stream else plain(road.plain))
    answer = post(made, sent, road.path, anthropic_version="2026-10-21", anthropic_beta="a,b",
                  x_stainless_lang="js", cookie="secret", x_api_key="mine")
    whole = b"".join(_events(*road.lead, road.content, *road.end))
    assert answer.status == 200 and answer.body == (whole if stream else ifl.dump_json(road.plain))
    seen = upstream.last
    assert (seen.path, seen.body) == (road.asked, sent)
    assert seen.headers["authorization"] == "Bearer sk-key-one"
    assert (seen.headers["anthropic-version"], seen.headers["anthropic-beta"]) == (
        "2026-10-21", "a,b")
    assert "x-stainless-lang" in seen.headers and not {"cookie", "x-api-key"} & set(seen.headers)
    row = booked(made)
    assert (row["input"], row["output"], row["cached"]) == road.counts
    assert row["cache_write"] == (30 if road.field == "messages_url" else 0)


@native_roads
def test_only_the_name_of_the_model_is_spliced_in(server, upstream, road):
    made = server(native(road, upstream), aliases={"claude-*": "p/real"})
    upstream.plays(plain(road.plain))
    sent = b'{"max_tokens": 9,  "model": "claude-x", "input": "q", "messages": [{"role": "user", ' \
           b'"content": "\\u00e9"}]}'
    assert post(made, sent, road.path).status == 200
    assert upstream.last.body == sent.replace(b"claude-x", b"real")


@native_roads
@pytest.mark.parametrize("url", ["{}", "{}/", "{}END", "{}END/"])
def test_address_of_a_native_road_is_taken_with_and_without_its_end(server, upstream, road, url):
    end = ifl.ENDPOINTS[road.field]
    entry = native(road, upstream)
    entry[road.field] = url.replace("END", end).format(entry[road.field])
    upstream.plays(plain(road.plain))
    assert post(server(entry), ASK, road.path).status == 200
    assert upstream.last.path == road.asked


NATIVE_REFUSALS = [
    ("broken", lambda road: plain({"type": "error", "error": {
        "type": "api_error", "message": "broken"}}, 500)),
    ("overloaded", lambda road: native_sse(road, content=[{"type": "error", "error": {
        "type": "overloaded_error", "message": "overloaded"}}], end=[])),
    ("empty", lambda road: native_sse(road, content=[], end=[])),
    ("none of", lambda road: sse(*HELLO)),
    ("none of", lambda road: plain(completion())),
    ("none of", lambda road: native_sse(next(each for each in NATIVE_ROADS if each is not road))),
    ("none of", lambda road: plain(next(each for each in NATIVE_ROADS if each is not road).plain)),
    ("plain answer", lambda road: plain(road.plain)),
    ("web page", lambda road: plain(b"<html>", content_type="text/html"))]


@native_roads
@pytest.mark.parametrize("words, reply", NATIVE_REFUSALS)
def test_failure_before_the_answer_falls_back_to_a_translated_target(
        server, upstreams, road, words, reply):
    first, other = upstreams(), upstreams()
    made = server(native(road, first), provider(other, "q"), default_model="m",
                  aliases={"any": ["p/a", "q/b"]}, retry={"count": 0})
    first.plays(reply(road))
    answer = post(made, {**ASK, "model": "any", "stream": True}, road.path)
    assert answer.status == 200 and b"Hel" in answer.body and b"Hi" not in answer.body
    assert (len(first.requests), other.last.path) == (1, "/v1/chat/completions")
    first.plays(reply(road))
    alone = post(made, {**ASK, "model": "p/a", "stream": True}, road.path)
    assert alone.status in (500, 502, 503, 529) and words in alone.json["error"]["message"]
    assert len(first.requests) == 2


@native_roads
def test_native_target_answers_where_the_translated_one_fails(server, upstreams, road):
    first, other = upstreams(plain({"error": {"message": "no"}}, 500)), upstreams()
    other.plays(native_sse(road))
    made = server(provider(first, "q"), native(road, other), aliases={"any": ["q/b", "p/a"]})
    answer = post(made, {**ASK, "model": "any", "stream": True}, road.path)
    assert answer.status == 200 and b"Hi" in answer.body and len(other.requests) == 1


@native_roads
def test_refused_key_of_a_native_road_gives_way_to_the_next(server, upstream, road):
    made = server(native(road, upstream, api_keys=["sk-key-one", "key-two"]))
    upstream.plays(plain({"error": {"message": "no"}}, 401), plain(road.plain))
    assert post(made, ASK, road.path).status == 200
    assert [seen.headers["authorization"] for seen in upstream.requests] == [
        "Bearer sk-key-one", "Bearer key-two"]


@native_roads
def test_error_within_a_native_stream_is_passed_on_and_noted(server, upstream, road):
    made = server(native(road, upstream))
    error = {"type": "error", "code": "x", "message": "sk-key-one is bad", "error": {
        "type": "api_error", "message": "sk-key-one is bad"}}
    upstream.plays(native_sse(road, end=[error]))
    answer = post(made, {**ASK, "stream": True}, road.path)
    assert named_events(answer.body)[-1][0] == "error" and b"Hi" in answer.body
    assert b"sk-key-one" not in answer.body and booked(made)["errors"] == 1


@native_roads
def test_native_stream_that_is_cut_off_ends_with_an_error(server, upstream, road):
    made = server(native(road, upstream))
    upstream.plays(native_sse(road, end=[]))
    name, facts = named_events(post(made, {**ASK, "stream": True}, road.path).body)[-1]
    assert name in ("error", "response.failed") and "cut off" in json.dumps(facts)


def test_message_that_lacks_its_stop_is_ended(server, upstream):
    made = server(native(NATIVE_ROADS[0], upstream))
    upstream.plays(native_sse(NATIVE_ROADS[0], end=NATIVE_ROADS[0].end[:-1]))
    answer = post(made, {**ASK, "stream": True}, MESSAGES_PATH)
    assert named_events(answer.body)[-1] == ("message_stop", {"type": "message_stop"})


@native_roads
def test_native_road_is_kept_awake_in_silence(server, upstream, road):
    go, made = threading.Event(), server(native(road, upstream), keepalive_s=0.05)
    upstream.plays(sse(*_events(*road.lead, road.content), go, *_events(*road.end)))
    with Client(made) as client:
        client.post({**ASK, "stream": True}, path=road.path)
        client.head()
        seen = b""
        while seen.count(b"ping") + seen.count(b"keep-alive") < 3:
            seen += client.piece()
        go.set()
        whole = seen + client.pieces()
    events = [event for name, event in named_events(whole) if event["type"] != "ping"]
    assert events == [event for event in (*road.lead, road.content, *road.end)
                      if event["type"] != "ping"]


@native_roads
def test_records_cut_anywhere_arrive_whole(server, upstream, road):
    whole = b"".join(_events(*road.lead, road.content, road.content, *road.end))
    made = server(native(road, upstream))
    for size in (1, 7, 100):
        pieces = [whole[at:at + size] for at in range(0, len(whole), size)]
        upstream.plays(sse(*pieces))
        assert post(made, {**ASK, "stream": True}, road.path).body == whole


@native_roads
def test_client_of_another_dialect_is_told_which_road_there_is(server, upstreams, road):
    fake, other = upstreams(), upstreams()
    made = server(native(road, fake), provider(other, "q"), aliases={"both": ["p/a", "q/b"]})
    for path in set(ALL_PATHS) - {road.path}:
        answer = post(made, {**ASK, "model": "p/a"}, path)
        message = answer.json["error"]["message"]
        assert answer.status == 400 and road.field in message and "base_url" in message
        assert post(made, {**ASK, "model": "both"}, path).status == 200
    assert not fake.requests and other.requests


@native_roads
@pytest.mark.parametrize("status", [404, 405])
def test_native_road_that_is_not_there_is_replaced_by_chat(server, upstream, road, status):
    made = server({**native(road, upstream), "base_url": upstream.url})
    upstream.plays(plain(b"nothing here", status, content_type="text/plain"))
    for _ in range(2):
        assert post(made, {**ASK, "stream": True}, road.path).status == 200
    assert [seen.path for seen in upstream.requests] == [
        road.asked, "/v1/chat/completions", "/v1/chat/completions"]


@native_roads
def test_native_road_that_is_not_there_is_named_where_there_is_no_chat(server, upstream, road):
    made = server(native(road, upstream))
    upstream.plays(plain(b"nothing here", 404, content_type="text/plain"))
    answer = post(made, ASK, road.path)
    assert answer.status == 404 and road.field in answer.json["error"]["message"]
    assert answer.headers["x-should-retry"] == "false" and len(upstream.requests) == 1


@native_roads
def test_overflow_of_a_native_road_is_told_as_everywhere(server, upstream, road):
    made = server(native(road, upstream))
    upstream.plays(plain({"type": "error", "request_id": "req_up", "error": {
        "type": "invalid_request_error",
        "message": "This model's maximum context length is 1000 tokens, you requested 2000"}}, 400))
    answer = post(made, ASK, road.path)
    assert answer.status == 400
    if road.field == "messages_url":
        assert answer.json["error"]["message"].startswith("prompt is too long: ")
        assert answer.json["request_id"] == "req_up"
    else:
        assert answer.json["error"]["code"] == "context_length_exceeded"


OURS = ifl.make_signature({"text": "thought"})
CLEANED = [
    ("cache_control.ttl", {"system": [{"type": "text", "text": "s", "cache_control": {
        "type": "ephemeral", "ttl": "1h"}}]},
     {"system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]}),
    ("ttl in a result", {"messages": [{"role": "user", "content": [{
        "type": "tool_result", "tool_use_id": "t", "content": [{
            "type": "text", "text": "r", "cache_control": {"type": "ephemeral", "ttl": "5m"}}]}]}]},
     {"messages": [{"role": "user", "content": [{
         "type": "tool_result", "tool_use_id": "t", "content": [{
             "type": "text", "text": "r", "cache_control": {"type": "ephemeral"}}]}]}]}),
    ("billing block", {"system": [
        {"type": "text", "text": ifl.BILLING_HEADER + " cc_version=1"},
        {"type": "text", "text": "s"}]}, {"system": [{"type": "text", "text": "s"}]}),
    ("our signature", {"messages": [{"role": "user", "content": "q"}, {
        "role": "assistant", "content": [
            {"type": "thinking", "thinking": "shown", "signature": OURS},
            {"type": "thinking", "thinking": "", "signature": OURS},
            {"type": "redacted_thinking", "data": OURS}, {"type": "text", "text": "a"}]}]},
     {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [
         {"type": "thinking", "thinking": "shown"}, {"type": "text", "text": "a"}]}]}),
    ("a foreign signature", {"messages": [{"role": "assistant", "content": [
        {"type": "thinking", "thinking": "x", "signature": "Erk9"}]}]}, {})]


@pytest.mark.parametrize("sent, left", [row[1:] for row in CLEANED],
                         ids=[row[0] for row in CLEANED])
def test_what_makers_refuse_is_taken_out_of_messages(server, upstream, sent, left):
    upstream.plays(plain(NATIVE_ROADS[0].plain))
    asked = {**ASK, "temperature": 0.10, **sent}
    assert post(server(native(NATIVE_ROADS[0], upstream)), asked, MESSAGES_PATH).status == 200
    assert upstream.last.json == {**asked, **left}


def test_anthropic_gets_no_thought_with_a_signature_of_ours():
    body = {"model": "m", "data": OURS, "messages": [
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "shown", "signature": OURS}]},
        {"role": "user", "content": [{"type": "text", "text": "q", "cache_control": {
            "type": "ephemeral", "ttl": "1h"}}]}]}
    text = ifl.dump_text(body)
    target = ifl.Target(ifl.Provider("p", messages_url="https://api.anthropic.com"), "m")
    call = ifl.Call(ifl.MESSAGES, body, text, {}, "req_1")
    sent = json.loads(ifl.MESSAGES.open(call, target, context_of()).body)
    assert sent == {**body, "messages": body["messages"][1:]}


def test_type_of_a_custom_tool_is_left_out_for_deepseek(server, upstream):
    tool = {"type": "custom", "name": "f", "input_schema": {"type": "object", "properties": {}}}
    for preset, left in (("deepseek", ifl.without(tool, "type")), ("moonshot", tool)):
        upstream.plays(plain(NATIVE_ROADS[0].plain))
        made = server(native(NATIVE_ROADS[0], upstream, preset=preset))
        assert post(made, {**ASK, "tools": [tool]}, MESSAGES_PATH).status == 200
        assert upstream.last.json["tools"] == [left]


def test_refused_beta_is_left_out_from_then_on(server, upstream):
    made = server(native(NATIVE_ROADS[0], upstream))
    upstream.plays(plain({"type": "error", "error": {
        "type": "invalid_request_error",
        "message": "Unexpected value(s) `two-2026` for the `anthropic-beta` header."}}, 400),
        plain(NATIVE_ROADS[0].plain), plain(NATIVE_ROADS[0].plain))
    for _ in range(2):
        assert post(made, ASK, MESSAGES_PATH, anthropic_beta="one,two-2026,three").status == 200
    assert [seen.headers["anthropic-beta"] for seen in upstream.requests] == [
        "one,two-2026,three", "one,three", "one,three"]


def test_our_carriers_do_not_reach_a_responses_upstream(server, upstream):
    made = server(native(NATIVE_ROADS[1], upstream))
    seal = made.gateway.seal()
    upstream.plays(plain(NATIVE_ROADS[1].plain))
    foreign = {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "gAAA"}
    post(made, {"model": "x", "previous_response_id": "resp_theirs", "input": [
        {"type": "reasoning", "id": "rs_1", "summary": [],
         "encrypted_content": seal.encrypt({"reasoning": "t"})},
        {"type": "compaction", "encrypted_content": seal.encrypt({"summary": "before"})},
        foreign, {"role": "user", "content": "q"}]}, RESPONSES_PATH)
    assert upstream.last.json["input"] == [
        {"role": "user", "content": ifl.SUMMARY_HEAD + "before"}, foreign,
        {"role": "user", "content": "q"}]
    assert upstream.last.json["previous_response_id"] == "resp_theirs"


def test_a_response_of_ours_is_told_to_the_native_road_in_full(server, upstreams):
    first, other = upstreams(), upstreams()
    made = server(provider(first, "q"), native(NATIVE_ROADS[1], other))
    said = post(made, {"model": "q/m", "input": "one"}, RESPONSES_PATH).json
    other.plays(plain(NATIVE_ROADS[1].plain))
    asked = {"model": "p/m", "input": "two", "previous_response_id": said["id"]}
    assert post(made, asked, RESPONSES_PATH).status == 200
    told = other.last.json
    assert "previous_response_id" not in told and [
        item["role"] for item in told["input"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize("url, header", [
    ("http://api.anthropic.com", "x-api-key"), ("http://anthropic.com.example", "authorization")])
def test_key_goes_to_anthropic_in_its_own_header(url, header):
    names = dict(ifl.upstream_headers(
        {}, ifl.Settings(), ifl.Provider("p", messages_url=url), "k", road="messages_url"))
    assert header in {name.lower() for name in names}
    assert len({"x-api-key", "authorization"} & {name.lower() for name in names}) == 1


def test_tokens_are_counted_upstream_where_the_preset_says_so(server, upstream):
    made = server(native(NATIVE_ROADS[0], upstream, profile={"count_tokens": True}))
    body = {"model": "m", "messages": MESSAGES}
    upstream.plays(plain({"input_tokens": 4711}), plain({"error": {"message": "no"}}, 500))
    counts = [post(made, body, MESSAGES_PATH + "/count_tokens").json["input_tokens"]
              for _ in range(2)]
    assert counts[0] == 4711 and 0 < counts[1] < 100
    assert [seen.path for seen in upstream.requests] == ["/v1/messages/count_tokens"] * 2


@native_roads
def test_tokens_that_a_native_road_counts_are_learnt(server, upstream, road):
    made = server(native(road, upstream, "learnt"))
    counted = {**road.plain, "usage": {"input_tokens": 30000, "output_tokens": 5}}
    text = "word " * 4000
    asked = {**ASK, "input": text, "messages": [{"role": "user", "content": text}]}
    for _ in range(3):
        upstream.plays(plain(counted))
        assert post(made, asked, road.path).status == 200
    path = f"{road.path}/{'count_tokens' if road.field == 'messages_url' else 'input_tokens'}"
    until(lambda: abs(post(made, asked, path).json["input_tokens"] - 30000) < 3000)


@native_roads
def test_trying_a_provider_says_which_road_is_taken(gateway, upstream, road):
    made = gateway({**native(road, upstream), "base_url": upstream.url, "models": ["m"]})
    upstream.usual = lambda seen: usual_reply(seen) if seen.path != road.asked else (
        native_sse(road) if seen.json.get("stream") else plain(road.plain))
    checks = ifl.examine(made, made.state.router.providers["p"])
    assert all(check.ok for check in checks), checks
    assert checks[-1].message == f"{ifl.ROADS[road.field]} passed on as it is"
    upstream.usual = lambda seen: plain({}, 404) if seen.path == road.asked else usual_reply(seen)
    last = ifl.examine(made, made.state.router.providers["p"])[-1]
    assert last.ok and last.message == f"no {ifl.ROADS[road.field]} there, by Chat"


@native_roads
def test_provider_without_chat_is_tried_by_its_native_road(gateway, upstream, road):
    made = gateway(native(road, upstream, models=["m"]))
    upstream.usual = lambda seen: native_sse(road) if seen.json.get("stream") else (
        plain(road.plain))
    checks = ifl.examine(made, made.state.router.providers["p"])
    assert all(check.ok for check in checks), checks


@native_roads
def test_explain_says_which_road_is_taken(gateway, upstream, road):
    made = gateway({**native(road, upstream), "base_url": upstream.url})
    dialect = ifl.ROADS[road.field].lower()
    for asked, name in ((dialect, ifl.ROADS[road.field]), ("chat", "Chat")):
        target, = ifl.explain(made, {"model": "p/m", "dialect": asked})["chain"]
        assert target["road"] == name


@pytest.mark.parametrize("field, url, words", [
    ("messages_url", "https://h/v1/chat/completions", "is an address of Chat"),
    ("responses_url", "https://h/v1/messages", "is an address of Messages"),
    ("base_url", "https://h/v1/responses", "is an address of Responses"),
    ("messages_url", "ftp://h", "no http"), ("messages_url", "h", "no http")])
def test_address_of_another_road_is_named(field, url, words):
    problem = ifl.parse_provider({"name": "p", field: url}, {}).problem
    assert words in problem and field in problem


# === 17. Documents ===========================================================

#: A folder with the unpacked npm packages as PACKAGE@VERSION: the pinned hashes are compared.
NPM = os.environ.get("IFLOW2API_NPM", "")

#: Where Debian, other systems and CI keep it.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                "")
CHROMIUM_FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                  "disable-background-networking", "disable-component-update", "disable-sync")


def operations_of(document):
    return [(method.upper(), path, operation) for path, methods in document["paths"].items()
            for method, operation in methods.items()]


def sha384(data) -> str:
    return base64.b64encode(hashlib.sha384(data).digest()).decode()


def test_every_public_route_is_documented_and_nothing_else():
    rows = {(method, path) for path, methods in ifl.ROUTES.items() for method in methods
            if not path.startswith("/admin")}
    found = set()
    for method, path, _ in operations_of(ifl.openapi(1, "", False)):
        bare = ifl.normal_path(path)
        found.add((method, bare if bare in ifl.ROUTES else bare.partition("{")[0]))
        assert ifl.find_endpoint(method, path, {})[0] is not ifl.UNKNOWN
    assert found == rows - {("POST", "/responses/")}             # cancel, which is always refused


@pytest.mark.parametrize("language, needs_key", [(0, False), (1, True)])
def test_the_document_is_sound(language, needs_key):
    document = json.loads(ifl.dump_json(ifl.openapi(language, "x-own", needs_key)))
    assert document["openapi"].startswith("3.1.") and document["servers"] == [{"url": "/"}]
    assert document["info"]["version"] == ifl.__version__ and document["info"]["license"]["name"]
    operations, schemas = operations_of(document), document["components"]["schemas"]
    idents = [operation["operationId"] for *_, operation in operations]
    assert len(set(idents)) == len(idents) and all(re.fullmatch(r"\w+", name) for name in idents)
    text = json.dumps(document)
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) == set(schemas)
    assert "null" not in text
    for method, path, operation in operations:
        assert set(operation["tags"]) <= {tag["name"] for tag in document["tags"]}
        assert bool(CHINESE_CHARACTER.search(operation["summary"])) == (language == 0), path
        assert [row["name"] for row in operation["parameters"]] == re.findall(r"{(\w+)}", path)
        assert set(operation["responses"]) == {"200", "4XX", "5XX"}
        assert ("requestBody" in operation) == (method == "POST")
    for name, schema in schemas.items():
        assert set(schema["required"]) <= set(schema["properties"]), name


def test_a_key_is_asked_for_where_it_is_needed_and_nowhere_else(server, upstream):
    assert get(server(upstream), "/openapi.json").json["security"] == []
    running = server(upstream, custom_api_key="sk-right", custom_auth_header="X-Own")
    document = get(running, "/openapi.json").json
    schemes = document["components"]["securitySchemes"]
    assert list(schemes) == ["bearer", "x-api-key", "api-key", "x-own"]
    assert document["security"] == [{name: []} for name in schemes]
    for method, path, operation in operations_of(document):
        answer = post(running, {}, path) if method == "POST" else get(running, path, method)
        assert (answer.status == 401) == ("security" not in operation), path


@pytest.mark.parametrize("method, path, body", [
    ("POST", "/v1/chat/completions", {"messages": MESSAGES}),
    ("POST", "/v1/messages", {"max_tokens": 9, "messages": MESSAGES}),
    ("POST", "/v1/messages/count_tokens", {"messages": MESSAGES}),
    ("POST", "/v1/responses", {"input": "hi"}),
    ("POST", "/v1/responses/input_tokens", {"input": "hi"}),
    ("GET", "/v1/models", None), ("GET", "/v1/models/{model}", None),
    ("GET", "/v1/vision-models", None), ("GET", "/health", None), ("GET", "/", None)])
def test_bodies_and_answers_are_as_documented(server, upstream, method, path, body):
    running, where = server(upstream), path.replace("{model}", "m1")
    document = get(running, "/openapi.json").json
    operation = document["paths"][path][method.lower()]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool,
             "number": (int, float)}

    def check(value, place):
        name = place["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        schema = document["components"]["schemas"][name]
        assert set(schema["required"]) <= set(value), name
        for field, part in schema["properties"].items():
            if value.get(field) is not None and "type" in part:
                assert isinstance(value[field], kinds[part["type"]]), field

    body = body and {"model": "m1", **body}
    answer = post(running, body, where) if body else get(running, where)
    assert answer.status == 200
    check(answer.json, operation["responses"]["200"])
    if body:
        check(body, operation["requestBody"])
        refused = post(running, [], where)
        assert refused.status == 400
        check(refused.json, operation["responses"]["4XX"])


@pytest.mark.parametrize("setting, path, accepted, language", [
    ("", "/docs", "", "en"), ("", "/docs", "zh-CN,zh;q=0.9", "zh"),
    ("", "/docs", "de,zh;q=0.5", "en"), ("zh", "/redoc", "en", "zh"),
    ("zh", "/redoc?lang=en&x=<b>", "", "en")])
def test_the_language_is_the_asked_one_the_settings_or_the_browsers(
        server, upstream, setting, path, accepted, language):
    running = server(upstream, language=setting)
    assert f'<html lang="{language}' in get(running, path, accept_language=accepted).body.decode()


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/redoc", "/docs/"])
def test_documents_are_public_packed_and_not_made_twice(server, upstream, path):
    running = server(upstream, custom_api_key="sk-right", allowed_hosts=["a.example"])
    shown, packed = get(running, path), get(running, path, accept_encoding="br, gzip")
    assert shown.status == 200 and "content-encoding" not in shown.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == shown.body and len(packed.body) < 12_000
    again = get(running, path, if_none_match=shown.headers["etag"])
    assert (again.status, again.body) == (304, b"") and "content-length" not in again.headers
    assert shown.headers["x-content-type-options"] == "nosniff"
    made = ifl.openapi.cache_info().misses, ifl.docs_page.cache_info().misses
    assert get(running, path, Host="a.example").body == shown.body    # whatever it is called
    assert made == (ifl.openapi.cache_info().misses, ifl.docs_page.cache_info().misses)


def policy_of(answer) -> Dict[str, List[str]]:
    parts = [part.split() for part in answer.headers["content-security-policy"].split(";")]
    return {part[0]: part[1:] for part in parts}


@pytest.mark.parametrize("name, count", [("docs", 2), ("redoc", 1)])
def test_the_readers_are_pinned_hashed_and_in_a_sandbox(server, upstream, name, count):
    answer = get(server(upstream), "/" + name)
    page, policy = answer.body.decode(), policy_of(answer)
    for closed in ("default-src", "frame-ancestors", "base-uri", "form-action"):
        assert policy[closed] == ["'none'"]
    assert "allow-scripts" in policy["sandbox"] and "connect-src" not in policy
    assert not {"allow-same-origin", "allow-forms", "allow-modals"} & set(policy["sandbox"])
    urls = re.findall(r'<(?:script|link[^>]*) crossorigin="anonymous" integrity="sha384-'
                      r'[A-Za-z0-9+/]{64}" (?:src|href)="([^"]+)"', page)
    assert urls == re.findall(r'(?:src|href)="(https://[^"]+)"', page) and len(urls) == count
    pinned = r"https://cdn\.jsdelivr\.net/npm/[\w-]+@\d+\.\d+\.\d+/.+"
    assert all(re.fullmatch(pinned, url) for url in urls)
    assert sorted(policy["script-src"][1:] + policy["style-src"][1:]) == sorted(urls)
    script, = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["script-src"][0] == f"'sha256-{digest}'"
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r"<[^>]+\s(?:on\w+|style)=|javascript:", markup)


@pytest.mark.parametrize("path, digest", [item for files in ifl.READERS.values()
                                          for item in files.items()])
def test_the_hashes_are_those_of_the_npm_packages(path, digest):
    file = os.path.join(NPM, *path.split("/"))
    if not NPM or not os.path.exists(file):
        pytest.skip("IFLOW2API_NPM names no folder with the unpacked packages")
    with open(file, "rb") as opened:
        assert sha384(opened.read()) == digest


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
@pytest.mark.parametrize("cdn", [False, True])
def test_there_is_a_plain_list_of_the_same_paths(server, upstream, path, cdn):
    answer = get(server(upstream, docs_cdn=cdn), path)
    page = answer.body.decode()
    listed = re.findall(r"<dt><code>(\w+) ([^<]+)</code></dt><dd>[^<]+</dd>", page)
    assert listed == [row[:2] for row in operations_of(ifl.openapi(1, "", False))]
    if not cdn:
        assert "<script" not in page and "jsdelivr" not in page + str(answer.headers)
        assert "script-src" not in policy_of(answer) and policy_of(answer)["sandbox"] == []


#: Stands in for ReDoc, and tries what it must not be able to do.
REDOC_STUB = b"""window.Redoc = {init(spec, options, node) {
  let cookie = "none";
  try { cookie = document.cookie; } catch (error) { cookie = error.name; }
  try { localStorage.length; } catch (error) { cookie += error.name; }
  fetch("/admin/api/session").catch((error) => { node.append(" fetch:" + error.name); });
  node.append("shown:" + Object.keys(spec.paths).length + " origin:" + self.origin + " " + cookie);
}};"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("script, shown", [(REDOC_STUB, True), (REDOC_STUB + b" ", False)])
def test_a_browser_shows_what_the_cdn_has_or_else_the_list(
        server, upstream, upstreams, tmp_path, monkeypatch, script, shown):
    cdn = upstreams(plain(script, headers=[("Access-Control-Allow-Origin", "*")],
                          content_type="text/javascript"))
    monkeypatch.setattr(ifl, "CDN", cdn.url + "/")
    monkeypatch.setitem(ifl.READERS, "redoc", {"redoc@0.0.1/r.js": sha384(REDOC_STUB)})
    ifl.docs_page.cache_clear()
    flags = (*CHROMIUM_FLAGS, f"user-data-dir={tmp_path}", "virtual-time-budget=1500", "dump-dom")
    done = subprocess.run([CHROMIUM, *("--" + flag for flag in flags),
                           server(upstream).url + "/redoc"],
                          capture_output=True, timeout=90, encoding="utf-8", errors="replace")
    ifl.docs_page.cache_clear()
    root = re.search(r"<html[^>]*>", done.stdout).group()
    assert ("shown" in root) == shown and "wait" not in root, root
    place = re.search(r'<div id="ui">(.*?)</div>', done.stdout, re.S).group(1)
    count = len(ifl.openapi(1, "", False)["paths"])
    assert not shown or f"shown:{count} origin:null SecurityErrorSecurityError" in place
    assert ("fetch:TypeError" in place) == shown and (shown or place == "")


# === 18. The page's API ======================================================

class Admin:
    """A browser with the page open: it keeps the cookie, and sends what browsers send."""

    def __init__(self, server) -> None:
        self.server, self.gateway = server, server.gateway
        self.cookie, self.headers = "", {}

    def __call__(self, method, path, body=None, **headers) -> Answer:
        lines = {"Cookie": self.cookie or None, "Sec-Fetch-Site": "same-origin", **self.headers,
                 **_spelled(headers)}
        if body == b"":
            lines["Content-Length"] = "0"
        elif body is None:
            body = {} if method in ("POST", "PUT", "PATCH") else b""
        with Client(self.server) as client:
            client.request(method, "/admin/api/" + path, body, headers=lines)
            answer = client.answer(method)
        if "set-cookie" in answer.headers:
            self.cookie = answer.headers["set-cookie"].partition(";")[0]
        return answer

    def get(self, path):
        answer = self("GET", path)
        assert answer.status == 200, answer
        return answer.json

    def sign_in(self, password=PASSWORD) -> Answer:
        return self("POST", "session", {"user": "admin", "password": password})

    def edit(self, method, path, **facts) -> Answer:
        """A change of the version in force."""
        return self(method, path, {"version": self.get("config")["version"], **facts})

    def refuses(self, method, path, body, status, param=None, code=None) -> Answer:
        """The answer, which has to be this error, and to have changed nothing."""
        before = self.file()
        answer = self(method, path, body)
        assert answer.status == status, (body, answer)
        assert param is None or answer.error["param"] == param, (body, answer)
        assert code is None or answer.error["code"] == code, (body, answer)
        assert self.file() == before
        return answer

    def file(self) -> str:
        """config.json."""
        with open(self.gateway.config.path, encoding="utf-8") as file:
            return file.read()

    @property
    def version(self):
        return self.get("config")["version"]

    @property
    def settings(self):
        return self.gateway.settings


@pytest.fixture
def admin_server(config, server, monkeypatch):
    """admin_server(*providers, **settings): serving, with a config.json, a clock to crank, a quick
    password and events."""
    monkeypatch.setattr(ifl.Vault, "ITERATIONS", (10, 10))
    monkeypatch.setattr(ifl, "EVENTS_GAP_S", 0.01)

    def make(*providers, environ=None, flags=None, **settings):
        raw = {"providers": [item if isinstance(item, dict) else provider(item)
                             for item in providers],
               "detect_local": False, "admin_password": PASSWORD_HASH, **settings}
        put_config(config, {name: value for name, value in raw.items() if value is not None})
        clock = Clock()
        made = server(gateway=ifl.Gateway(config=config, environ=environ or {}, flags=flags,
                                          clock=clock))
        made.clock = clock
        return made
    return make


@pytest.fixture
def admin(admin_server):
    """admin(*providers, **settings): somebody who is signed in."""
    def make(*providers, **settings):
        found = Admin(admin_server(*providers, **settings))
        assert found.sign_in().status == 204
        return found
    return make


#: Every endpoint that wants a session, and those that do not.
ADMIN_ENDPOINTS = sorted((method,
                          path.replace("/admin/api/", "") + ("x" if path.endswith("/") else ""))
                         for path, methods in ifl.ROUTES.items() if path.startswith("/admin/api/")
                         for method, route in methods.items() if route.admin and not route.public)
PUBLIC_ENDPOINTS = [("GET", "session"), ("POST", "session"), ("POST", "password")]

#: Names with everything in them that a page must not take for markup.
HOSTILE = '<img src=x onerror=alert(1)>"\'&\u202e\x1b[31m\u2028\x00'


# --- the page ------------------------------------------------------------------

def test_the_page_is_sent_once_and_guarded(server):
    running = server(detect_local=False, custom_api_key="k" * 20)
    page = get(running, "/admin/", Sec_Fetch_Site="cross-site")  # by a link from elsewhere
    text, told = page.body.decode(), page.headers
    policy = told["content-security-policy"]
    assert page.status == 200 and told["content-type"] == "text/html; charset=utf-8"
    for name, part in (("style-src", ifl.PAGE_CSS), ("script-src", ifl.page_script())):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy and part in text
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and told["x-frame-options"] == "DENY"
    assert (told["x-content-type-options"], told["referrer-policy"],
            told["cache-control"]) == ("nosniff", "no-referrer", "no-cache")
    packed = get(running, "/admin", Accept_Encoding="br, gzip")
    assert packed.headers["content-encoding"] == "gzip" and len(packed.body) <= 45 << 10
    assert gzip.decompress(packed.body) == page.body
    assert "content-encoding" not in get(running, "/admin", Accept_Encoding="gzip;q=0").headers
    again = get(running, "/admin", If_None_Match=told["etag"])
    assert (again.status, again.body) == (304, b"") and is_well(running)
    assert get(running, "/admin", "HEAD").headers["content-length"] == str(len(page.body))
    assert get(running, "/admin", "POST").status == 405


# --- passwords and sessions ---------------------------------------------------------

def test_hashes_of_passwords(monkeypatch):
    kept, started = ifl.hash_password("a long password"), time.perf_counter()
    assert not ifl.is_password("x", kept)
    assert 0.02 < time.perf_counter() - started < WAIT_S and int(kept.split("$")[1]) >= 20_000
    monkeypatch.setattr(ifl.Vault, "ITERATIONS", (10, 10))
    stored = ifl.hash_password("päss wörd 密码")
    assert re.fullmatch(r"pbkdf2-sha256\$10\$[0-9a-f]{32}\$[0-9a-f]{64}", stored)
    assert stored != ifl.hash_password("päss wörd 密码")
    assert ifl.is_password("päss wörd 密码", stored) and not ifl.is_password("päss wörd 密", stored)
    assert not ifl.is_password("", "") and not ifl.is_password("x", "x")
    ifl.check_setting("admin_password", stored)
    for bad in ("hunter2hunter2", stored[:-1], stored.replace("$10$", "$0$"), " " + stored):
        with pytest.raises(ValueError, match="never the password itself"):
            ifl.check_setting("admin_password", bad)
    for bad in ("1234567", "x" * 1025):
        with pytest.raises(ValueError, match="from 8 to 1024"):
            ifl.hash_password(bad)


def test_the_first_password_by_the_code_on_the_console(admin_server):
    running = admin_server(admin_password=None)
    browser, sessions = Admin(running), running.gateway.sessions
    assert browser.get("session")["state"] == "new" and sessions.is_new
    code, wanted = sessions.code(), {"password": "correct horse"}
    assert re.fullmatch(r"[A-HJ-NP-Z2-9]{4}-[A-HJ-NP-Z2-9]{4}", code) and sessions.code() == code
    assert code.encode() not in b"".join(get(running, path).body for path in (
        "/admin", "/admin/api/session", "/health"))
    assert browser.sign_in("").status == 400 and browser.sign_in().error["code"] == "no_password"
    for bad, status in (("", 400), ("AAAA-AAAA", 403), (code[:-1], 403)):
        browser.refuses("POST", "password", {"code": bad, **wanted}, status, "code")
        assert browser.get("session")["state"] == "new"
    browser.refuses("POST", "password", {"code": code, "password": "short"}, 400, "password",
                    "bad_password")
    spelled = f" {code.lower().replace('-', ' ')} "
    assert browser("POST", "password", {"code": spelled, **wanted}).status == 204
    assert browser.get("session")["state"] == "signed_in" and browser.get("overview")
    assert browser.settings.admin_password.startswith("pbkdf2-sha256$10$")
    assert sessions.code() == "" and "correct horse" not in browser.file()
    other = Admin(running)                           # the code is used up
    assert other("POST", "password", {"code": code, "password": "another one"}).status == 401
    assert other.get("session")["state"] == "signed_out" and other.sign_in().status == 204


def test_the_code_is_exchanged_once_for_the_right_to_set_the_first_password(admin_server):
    running = admin_server(admin_password=None)
    browser, other, sessions = Admin(running), Admin(running), running.gateway.sessions
    code, told = sessions.code(), []
    sessions.on_new_code = lambda: told.append(sessions.code())
    for body, status in (({}, 400), ({"code": 1}, 400), ({"code": "AAAA-AAAA"}, 403)):
        browser.refuses("POST", "session/code", body, status, "code")
    assert browser("POST", "session/code", {"code": code}).status == 204
    assert browser.get("session")["state"] == "setup" and not told
    for method, path in (("GET", "overview"), ("GET", "config"), ("DELETE", "providers/x")):
        assert browser(method, path).status == 401       # it may set the password, nothing else
    other.refuses("POST", "session/code", {"code": code}, 403, "code", "wrong_code")
    assert other.get("session")["state"] == "new" and told == [sessions.code()] != [code]
    browser.refuses("POST", "password", {"password": "short"}, 400, "password", "bad_password")
    assert other("POST", "password", {"password": "correct horse"}).status == 400
    assert browser("POST", "password", {"password": "correct horse"}).status == 204
    assert browser.get("session")["state"] == "signed_in" and browser.get("overview")
    other.refuses("POST", "session/code", {"code": told[0]}, 403, "code")
    lines = [line["text"] for line in browser.get("logs")["data"]]
    assert ["used up is tried again by 127.0.0.1" in line for line in lines].count(True) == 1


def test_the_right_to_set_the_first_password_ends(admin_server):
    running = admin_server(admin_password=None)
    first, second, sessions = Admin(running), Admin(running), running.gateway.sessions
    for browser in (first, second):                      # the later one has it
        assert browser("POST", "session/code", {"code": sessions.code()}).status == 204
    assert [each.get("session")["state"] for each in (first, second)] == ["new", "setup"]
    running.clock.now += ifl.CODE_LIFE_S
    assert second.get("session")["state"] == "new"
    assert second("POST", "password", {"password": "correct horse"}).status == 400


def test_cookies_are_for_the_page_alone_and_tell_servers_apart(server):
    first, second = (Admin(server(detect_local=False, admin_password=PASSWORD_HASH))
                     for _ in range(2))
    assert re.fullmatch(f"iflow2api_session_{first.server.port}" + (
        r"=[\w-]{43}; Path=/admin; HttpOnly; SameSite=Strict; Max-Age=\d+"),
        first.sign_in().headers["set-cookie"])
    assert second.sign_in().status == 204
    both = f"{first.cookie}; theme=dark; {second.cookie}"
    for browser in (first, second):
        browser.cookie = both
        assert browser("GET", "overview").status == 200
    first("DELETE", "session")
    first.cookie = second.cookie = both
    assert first("GET", "overview").error["code"] == "session_expired"
    assert second("GET", "overview").status == 200


def test_no_endpoint_without_a_session(admin_server, upstream):
    running = admin_server(upstream, provider(upstream, "x"), client_keys=[key_entry("x", "sk-x")])
    browser = Admin(running)
    before = browser.file()
    for method, path in ADMIN_ENDPOINTS:
        for cookie, key, code in (("", None, "no_session"), ("", "Bearer sk-x", "no_session"),
                                  (f"iflow2api_session_{running.port}=forged", None,
                                   "session_expired"),
                                  ("iflow2api_session_1=forged", None, "no_session")):
            browser.cookie = cookie
            answer = browser(method, path, Authorization=key)
            assert (answer.status, answer.error["code"]) == (401, code), (method, path)
            assert answer.error["type"] == "authentication_error"
            # no browser's own dialog
            assert "Basic" not in answer.headers["www-authenticate"]
    assert browser.file() == before and upstream.requests == []


def test_no_endpoint_for_another_origin(admin, upstream):
    """Not even one that `allowed_origins` lets use the models, nor another port of this host, nor
    with the session's cookie."""
    browser = admin(upstream, provider(upstream, "x"), allowed_origins=["*", "http://page"],
                    client_keys=[key_entry("x", "sk-x")])
    before = browser.file()
    for method, path in ADMIN_ENDPOINTS + PUBLIC_ENDPOINTS:
        for headers in ({"Origin": "http://page"}, {"Origin": "null"},
                        {"Origin": f"http://127.0.0.1:{browser.server.port + 1}"},
                        {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "cross-site"}):
            answer = browser(method, path, **headers)
            assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
            assert not [name for name in answer.headers
                        if name.startswith(("access-control", "set-cookie"))]
    assert browser.file() == before and upstream.requests == []


def test_wrong_methods_and_paths(admin):
    browser, known = admin(), {}
    for method, path in ADMIN_ENDPOINTS + PUBLIC_ENDPOINTS:
        known.setdefault(path, set()).add(method)
    for path in (*known, "nothing"):
        preflight = browser("OPTIONS", path, Origin=browser.server.url,
                            Host=browser.server.url[7:])
        assert not [name for name in preflight.headers if name.startswith("access-control")]
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - known.get(path, set()):
            answer = browser(method, path)
            assert answer.status == (405 if path in known else 404), (method, path)
            assert path not in known or known[path] <= set(answer.headers["allow"].split(", "))


#: What is wrong with a body, whatever the endpoint.
BAD_FORMS = [b"", b"[]", b'"x"', b"null", b"{", b'{"a":', b"\xff", b'{"no_such_field": 1}',
             b"[" * 100_000, b'{"name": "%s"}' % (b"x" * (1 << 20))]


def test_bad_bodies(admin, upstream):
    browser = admin(upstream, provider(upstream, "x"))
    for method, path in ADMIN_ENDPOINTS + PUBLIC_ENDPOINTS:
        if method in ("POST", "PUT", "PATCH") and not path.startswith("play/"):
            for body in BAD_FORMS:
                if b"no_such" not in body or path != "routes/explain":
                    status = 413 if len(body) > 1 << 20 else 400
                    answer = browser.refuses(method, path, body, status)
                    assert "Traceback" not in answer.body.decode() and answer.error["message"]
    assert is_well(browser.server)


def test_sessions_end_on_time(admin):
    browser = admin()
    clock = browser.server.clock
    for _ in range(4):
        clock.now += ifl.SESSION_IDLE_S - 1              # used again and again
        assert browser("GET", "overview").status == 200
    clock.now += ifl.SESSION_IDLE_S + 1
    assert browser("GET", "overview").error["code"] == "session_expired"
    browser.sign_in()
    for _ in range(5):
        assert browser("GET", "overview").status == 200
        clock.now += ifl.SESSION_S / 5 + 1
    assert browser.get("session")["state"] == "signed_out"


def test_signing_out(admin):
    browser = admin()
    others = [Admin(browser.server) for _ in range(2)]
    assert all(other.sign_in().status == 204 for other in others)
    token = browser.cookie
    answer = browser("DELETE", "session")
    assert answer.status == 204 and "Max-Age=0" in answer.headers["set-cookie"]
    browser.cookie = token
    assert browser("GET", "overview").status == 401 and others[0]("GET", "overview").status == 200
    assert others[0]("DELETE", "session", {"everywhere": True}).status == 204
    assert others[1]("GET", "overview").status == 401


def test_a_new_password_ends_the_sessions_of_before(admin, config):
    browser = admin()
    other = Admin(browser.server)
    assert other.sign_in().status == 204
    change = {"current": PASSWORD, "password": "a new password"}
    for facts, status, param in (({"current": None}, 400, "current"),
                                 ({"current": "wrong one"}, 403, "current"),
                                 ({"password": "short"}, 400, "password"),
                                 ({"password": 12345678}, 400, "password")):
        browser.refuses("POST", "password", {**change, **facts}, status, param)
    assert other("GET", "overview").status == 200
    assert Admin(browser.server)("POST", "password", change).status == 401
    assert browser("POST", "password", change).status == 204
    assert browser("GET", "overview").status == 200
    assert other("GET", "overview").error["code"] == "session_expired"
    assert other.sign_in().status == 401 and other.sign_in("a new password").status == 204
    config.change(lambda raw: raw.update(admin_password=PASSWORD_HASH))
    browser.gateway.reload()
    assert other("GET", "overview").status == browser("GET", "overview").status == 401


def test_a_password_of_the_environment_is_changed_there(admin_server):
    running = admin_server(admin_password=None, environ={"IFLOW2API_ADMIN_PASSWORD": PASSWORD_HASH})
    browser = Admin(running)
    assert browser.sign_in().status == 204
    change = {"current": PASSWORD, "password": "a new password"}
    assert browser("POST", "password", change).error["code"] == "set_elsewhere"
    plain = {"IFLOW2API_ADMIN_PASSWORD": "plain text"}
    assert not admin_server(admin_password=None, environ=plain).gateway.settings.admin_password
    problems = ifl.Gateway(environ={}, config=running.gateway.config).problems
    assert "plain text" not in "".join(problems)


def test_a_password_without_a_config_lasts_for_the_run(server, monkeypatch):
    monkeypatch.setattr(ifl.Vault, "ITERATIONS", (10, 10))
    browser = Admin(server(detect_local=False))
    code = browser.gateway.sessions.code()
    assert browser("POST", "password", {"code": code, "password": PASSWORD}).status == 204
    assert browser.get("session")["state"] == "signed_in"
    assert Admin(browser.server).sign_in().status == 204
    answer = browser.edit("PATCH", "config", set={"port": 1})
    assert (answer.status, answer.error["code"]) == (409, "no_config")


def test_scripts_sign_in_by_basic(admin_server):
    running = admin_server()
    sessions, calls = running.gateway.sessions, []
    judge, sessions._judge = sessions._judge, lambda *args: calls.append(1) or judge(*args)
    for _ in range(3):
        assert get(running, "/admin/api/overview", Authorization=BASIC).status == 200
    assert len(calls) == 1                               # what was right is not computed again
    wrong = ["Basic " + base64.b64encode(pair.encode()).decode()
             for pair in ("admin:wrong", f"root:{PASSWORD}")]
    for bad in ("Basic", "Basic !", "Basic /w==", *wrong):
        answer = get(running, "/admin/api/overview", Authorization=bad)
        assert (answer.status, answer.error["code"]) == (401, "wrong_password")
    running.gateway.keep_setting("admin_password", ifl.hash_password("something else"))
    assert get(running, "/admin/api/overview", Authorization=BASIC).status == 401


def guess_code(browser, code="AAAA-AAAA", **headers):
    return browser("POST", "password", {"code": code, "password": "correct horse"}, **headers)


def guess_password(browser, password="wrong one", **headers):
    return browser("POST", "session", {"user": "admin", "password": password}, **headers)


@pytest.mark.parametrize("guess, wrong", [(guess_code, 403), (guess_password, 401)])
def test_each_address_has_ten_guesses_and_then_one_a_second(admin_server, guess, wrong):
    running = admin_server(trusted_proxies=["127.0.0.1"],
                           **({"admin_password": None} if guess is guess_code else {}))
    right = running.gateway.sessions.code() or PASSWORD
    browser = Admin(running)

    def tried(address, times=1, **facts):
        return [guess(browser, X_Forwarded_For=address, **facts).status for _ in range(times)]

    for origin in ("http://evil.example", "null"):       # what another page sends is not counted
        assert tried("10.0.0.1", 12, Origin=origin) == [403] * 12
    assert tried("10.0.0.1", 10) == [wrong] * 10
    for _ in range(3):
        answer = guess(browser, right, X_Forwarded_For="10.0.0.1")   # even the right one
        assert (answer.status, answer.error["code"]) == (429, "too_many_attempts")
        assert answer.headers["retry-after"] == "1"
    running.clock.now += 1
    assert tried("10.0.0.1", 2) == [wrong, 429]
    # a subscriber's /64 is one address
    assert tried("2001:db8:1:2::7", 10) + tried("2001:db8:1:2:f::8") == [wrong] * 10 + [429]
    for number in range(200):                            # many addresses block nobody else
        assert tried(f"10.1.{number}.1") == [wrong]
    assert guess(browser, right, X_Forwarded_For="2001:db8:1:3::7").status == 204
    running.clock.now += 10              # ten seconds without a guess, ten guesses
    if guess is guess_password:
        basic = functools.partial(get, running, "/admin/api/overview", Authorization=BASIC,
                                  X_Forwarded_For="10.0.0.1")
        assert tried("10.0.0.1", 11) == [wrong] * 10 + [429] and basic().status == 429
        running.clock.now += 1
        assert basic().status == 200


def test_a_code_lives_for_a_quarter_of_an_hour(admin_server):
    running = admin_server(admin_password=None)
    browser, sessions, told = Admin(running), running.gateway.sessions, []
    sessions.on_new_code = lambda: told.append(sessions.code())
    first = sessions.code()
    running.clock.now += 899
    assert sessions.code() == first and browser.get("session")["state"] == "new" and not told
    running.clock.now += 2
    # the console shows it
    assert guess_code(browser, first).status == 403 and told == [sessions.code()] != [first]
    assert guess_code(browser, told[0]).status == 204 and sessions.code() == "" and len(told) == 1


def test_sessions_and_guessers_are_bounded(clock):
    sessions, tokens = ifl.Sessions(lambda: PASSWORD_HASH, clock), []
    for _ in range(ifl.SESSIONS_LIMIT + 5):
        clock.now += 1
        tokens.append(sessions.open())
    assert [bool(sessions.find(token)) for token in tokens[:6]] == [False] * 5 + [True]
    sessions = ifl.Sessions(lambda: "", clock)
    for number in range(3 * ifl.SIGN_IN_ADDRESSES):
        sessions.try_code(str(number), "x")
    assert len(sessions._guessers) <= ifl.SIGN_IN_ADDRESSES


def test_the_names_of_the_host_count_for_the_page_too(admin_server, server):
    running = admin_server()
    for path in ("/admin", "/admin/api/session"):
        assert get(running, path, Host="evil.example").status == 403
        assert get(running, path, Host="localhost:1").status == 200
    running = server(detect_local=False, host="0.0.0.0", admin_password=PASSWORD_HASH)
    browser = Admin(running)             # beyond the loopback the password is enough
    assert get(running, "/v1/models").status == 401 and browser("GET", "overview").status == 401
    assert browser.sign_in().status == 204 and browser.get("overview")["needs_key"] is True
    assert get(running, "/admin", Host="any.example").status == 200


# --- reading -----------------------------------------------------------------------

def noted_chat(browser, **facts):
    """A chat that has been noted, which is after its answer."""
    answer = post(browser.server, chat(**facts))
    until(lambda: browser.gateway.in_flight == 0, what="the note of a call")
    return answer


def test_the_overview_leads_the_way(admin, upstream):
    keys = [key_entry("bob", "sk-bob", rpm=5)]
    assert admin().get("overview")["next"] == "login_or_provider"
    assert admin(upstream, client_keys=keys).get("overview")["next"] == "models"
    browser = admin(provider(upstream, models=["m1"], concurrency=3), client_keys=keys)
    found = browser.get("overview")
    assert found["next"] == "client" and found["needs_key"]
    assert found["address"] == browser.server.url
    assert found["queue"] == [{"provider": "up", "active": 0, "waiting": 0, "limit": 3}]
    assert post(browser.server, chat(), Authorization="Bearer sk-bob").status == 200
    until(lambda: browser.gateway.in_flight == 0, what="the note, which follows the answer")
    found = browser.get("overview")
    assert found["next"] == "" and found["today"] == {
        "requests": 1, "errors": 0, "input": USAGE["prompt_tokens"],
        "output": USAGE["completion_tokens"]}
    assert found["limits"] == [{"key": "bob", "rpm": {"used": 1, "limit": 5}}]
    assert found["health"]["status"] == "healthy" and found["connections"] >= 1


def test_requests_series_and_usage(admin, upstream):
    browser = admin(upstream)
    upstream.plays(plain(completion()), plain({"error": {"message": HOSTILE}}, 400))
    assert [noted_chat(browser, model=name).status for name in ("m1", HOSTILE)] == [200, 400]
    bad, good = browser.get("requests")["data"]
    assert good["target"] == "up/m1" and bad["status"] == 400 and bad["model"] == HOSTILE
    assert len(browser.get("requests?limit=1")["data"]) == 1
    for span, steps, step_s in (("day", 24, 3600), ("month", 30, 86400)):
        found = browser.get("series?span=" + span)
        assert found["span"] == span and len(found["points"]) == steps
        ats = [point["at"] for point in found["points"]]
        assert ats == sorted(set(ats)) and ats[0] <= time.time() - (steps - 1.1) * step_s + 4000
        rows = [pair for point in found["points"] for pair in point["groups"].items()]
        assert {name: (row["requests"], row["errors"]) for name, row in rows} == {
            "m1": (1, 0), HOSTILE: (1, 1)}
    found = browser.get("usage?by=model&days=7")
    assert {row["name"]: row["requests"] for row in found["rows"]} == {"m1": 1, HOSTILE: 1}
    assert found["total"]["requests"] == 2 and found["total"]["first_s"] >= 0
    assert found["total"]["cost"] is None
    for name in ("provider", "key", "day"):
        assert browser.get(f"usage?by={name}")["total"]["requests"] == 2
    answer = browser("GET", "usage.csv?by=model")
    assert answer.body.decode("utf-8-sig").startswith("model,requests,errors")
    assert "attachment" in answer.headers["content-disposition"]
    for path in ("requests?limit=0", "requests?limit=x", "series?span=year", "usage?by=x",
                 "usage?days=-1", "logs?level=fatal", "logs?limit=99999", "logs?before=x",
                 "clients?key=%20x"):
        browser.refuses("GET", path, None, 400, re.search(r"\?(\w+)", path).group(1))


def test_many_models_are_eight_and_the_rest(admin, upstream):
    browser = admin(upstream, usage=False)
    for number in range(12):
        browser.gateway.ledger.add(call_record(f"m{number}", "up", "",
                                               usage=ifl.Usage(prompt=number)))
    groups = {name for point in browser.get("series?span=day")["points"]
              for name in point["groups"]}
    assert groups == {*(f"m{number}" for number in range(4, 12)), "…"}
    assert browser.get("overview")["today"]["requests"] == 12


def test_logs_are_kept_without_secrets(admin, log_lines):
    browser = admin()
    log = browser.gateway.log
    log.info("hello %s", HOSTILE)
    log.warning("Authorization: Bearer sk-0123456789abcdef of http://me:hunter2@host/")
    found = browser.get("logs?search=BEARER")["data"]
    assert len(found) == 1 and found[0]["level"] == "warning"
    assert "0123456789" not in found[0]["text"] + str(browser.get("logs"))
    assert "hunter2" not in found[0]["text"] and abs(found[0]["at"] - time.time()) < WAIT_S
    texts = [line["text"] for line in browser.get("logs")["data"]]
    assert "hello " + HOSTILE in texts and browser.get("logs?level=error")["data"] == []
    last = browser.get("logs")["last"]
    before = browser.get(f"logs?before={last}&limit=1")["data"]
    assert [line["id"] for line in before] == [last - 1]
    answer = browser("GET", "logs.txt")
    assert "0123456789" not in answer.body.decode() and "WARNING" in answer.body.decode()
    assert answer.headers["content-type"].startswith("text/plain")
    assert "attachment" in answer.headers["content-disposition"]
    for number in range(ifl.LOG_LINES + 10):
        log.info("line %d", number)
    found = browser.get("logs?limit=10000")
    assert len(found["data"]) == ifl.LOG_LINES
    assert found["last"] - found["first"] == ifl.LOG_LINES - 1
    log.info("x" * 100_000)
    assert len(browser.get("logs?limit=1")["data"][0]["text"]) == ifl.LOG_LINE_CHARS
    log_lines.clear()


def test_each_server_of_a_process_has_a_log_of_its_own(server, upstreams, config, log_lines):
    """Its lines, its level: nothing of one is seen on the other's page."""
    put_config(config, {"providers": [provider(upstreams())], "log_level": "debug"})
    loud = server(gateway=ifl.Gateway(config=config, environ={}))
    quiet, silent = server(upstreams()), server(upstreams(), log_level="error")
    servers = {"loud": loud, "quiet": quiet, "silent": silent}
    for name, one in servers.items():
        assert post(one, chat(model=f"call-{name}")).status == 200 and is_well(one)
        one.gateway.ledger._log.warning("journal-%s", name)
        one.gateway.log.error("error-%s", name)

    def text_of(one):
        return "\n".join(line[3] for _, line in one.gateway.live.logs.after(0)[1])
    everything = "\n".join(record.getMessage() for record in log_lines)
    assert "call-loud" in everything and "call-silent" not in everything
    for name, one in servers.items():
        whats = ["error"] if one is silent else ["call", "journal", "error"]
        assert set(re.findall(r"(?:call|journal|error)-\w+", text_of(one))) == {
            f"{what}-{name}" for what in whats}
    quiet.gateway.apply(ifl.replace(quiet.gateway.settings, log_level="error"))
    assert post(quiet, chat(model="call-later")).status == 200 and is_well(quiet)
    assert "later" not in text_of(quiet)
    log_lines.clear()


def test_about_and_instances_hold_no_secret(admin, upstream, home):
    browser = admin(provider(upstream, api_keys=["sk-0123456789abcdef"],
                             headers={"X-Token": "tokentokentokentoken"}),
                    custom_api_key="sk-clientclientclient",
                    upstream_proxy="http://me:hunter2@proxy:1")
    found = browser.get("about")
    assert (found["version"], found["pid"]) == (ifl.__version__, os.getpid())
    assert found["threads"] >= 2 and found["paths"]["config"] == browser.gateway.config.path
    assert "up" in found["diagnostics"] and str(home) not in found["diagnostics"]
    everything = b"".join(browser("GET", path).body for method, path in ADMIN_ENDPOINTS
                          if method == "GET" and path != "events")
    for secret in ("0123456789abcdef", "tokentoken", "clientclient", "hunter2", PASSWORD_HASH[-20:],
                   PASSWORD_HASH[-4:]):
        assert secret.encode() not in everything, secret
    this, = browser.get("instances")["data"]
    assert this["url"] == browser.server.url and this["this"] is True


def test_the_config_as_a_form(admin):
    browser = admin(environ={"IFLOW2API_PORT": "5", "IFLOW2API_DRAIN_S": "x"},
                    flags={"host": "127.0.0.1"}, log_level="debug",
                    custom_api_key="sk-0123456789abcdef")
    found = browser.get("config")
    settings = {item["name"]: item for item in found["settings"]}
    assert list(settings) == list(ifl.SETTING)
    assert found["path"] == browser.gateway.config.path
    assert {name: settings[name]["origin"]
            for name in ("port", "host", "log_level", "drain_s", "detect_local", "retry")} == {
        "port": "environment", "host": "flag", "log_level": "file", "drain_s": "default",
        "detect_local": "file", "retry": "default"}
    facts = ifl.SETTING["custom_api_key"].metadata
    texts = facts["label"] + facts["hint"]
    assert settings["custom_api_key"] == {
        "name": "custom_api_key", "kind": "str", "label": dict(zip(("zh", "en"), texts)),
        "hint": dict(zip(("zh", "en"), texts[2:])), "group": "clients", "value": "sk-…cdef",
        "default": "", "origin": "file", "secret": True, "restart": False, "file_only": False,
        "set": True}
    assert settings["port"]["low"] == 0 and settings["port"]["restart"]
    assert settings["theme_mode"]["choices"][0] == "system"
    assert settings["admin_password"]["value"] == "…" and settings["admin_password"]["set"]
    assert any("IFLOW2API_DRAIN_S" in problem for problem in found["problems"])
    groups = {item.metadata["group"] for item in ifl.SETTING.values()}
    assert groups == {"server", "upstream", "clients", "iflow", "logs", "appearance"}


def test_models_presets_logins(admin, upstream):
    browser = admin(provider(upstream, models=[{"id": "m1", "context": 9000, "vision": True}]),
                    environ={"ZHIPU_API_KEY": "x"}, aliases={"short": "m1", "gpt-*": "m1"})
    found = browser.get("models")
    rows = {row["id"]: row for row in found["data"]}
    assert rows["m1"] == {"id": "m1", "provider": "up", "context": 9000, "max_output": None,
                          "vision": True, "listed": "config", "alias": False}
    assert rows["short"]["alias"] and rows["short"]["context"] == 9000
    assert rows["org/m2:free"]["listed"] == "provider" and found["default_model"] == "m1"
    presets = {row["name"]: row for row in browser.get("presets")["data"]}
    assert presets["zhipu"]["key_set"] and not presets["openai"]["key_set"]
    assert presets["ollama"]["local"] and presets["zhipu"]["models"][0]["context"] > 0
    assert browser.get("logins") == {"data": []}
    # aliases are listed before there is a provider; '' matches nothing
    row, = admin(aliases={"fast": "glm-5", "": "glm-5"}).get("models")["data"]
    assert row["alias"]
    assert (row["id"], row["provider"], row["context"], row["vision"]) == ("fast", "", None, None)


# --- writing: settings -----------------------------------------------------------------

def test_settings_are_saved(admin, config):
    browser = admin(port=28001, made_by_hand={"keep": "me"})
    version = browser.version
    answer = browser("PATCH", "config", {
        "version": version, "unset": ["port"],
        "set": {"log_level": "debug", "keepalive_s": 3, "retry": {"count": 2}}})
    assert answer.status == 200 and answer.json["version"] == browser.version != version
    settings = browser.settings
    assert (settings.log_level, settings.retry, settings.port) == ("debug", {"count": 2}, 28000)
    assert config.read()["made_by_hand"] == {"keep": "me"} and "port" not in config.read()


BAD_SETTINGS = [
    ("port", "80"), ("port", 70000), ("port", True), ("log_level", "loud"), ("sticky", 1),
    ("retry", {"count": "x"}), ("trusted_proxies", ["x"]), ("no_such", 1), (HOSTILE, 1),
    ("admin_password", PASSWORD_HASH), ("providers", []), ("client_keys", []), ("accounts", {}),
    ("aliases", {"x": 5}), ("aliases", {"x": ["nowhere2/m"], "": "y"}),
    ("default_provider", "nope"), ("upstream_proxy", "ftp://x"), ("body_limit_bytes", 1),
    ("idle_timeout_s", 1e9)]

#: Settings that would make the page a shell.
FILE_ONLY = ("host", "log_file", "ca_file", "iflow_auth_url", "iflow_token_url",
             "iflow_userinfo_url", "oauth_client_id", "oauth_client_secret")


def test_bad_settings_change_nothing(admin, upstream):
    browser = admin(upstream)
    version = browser.version
    for name, value in BAD_SETTINGS:
        body = {"version": version, "set": {"log_level": "debug", name: value}}
        browser.refuses("PATCH", "config", body, 400, ifl.one_line(name, 60))
    browser.refuses("PATCH", "config", {"version": version, "unset": [["x"]]}, 400, "unset")
    browser.refuses("PATCH", "config", {"set": {"port": 1}}, 400, "version")
    shown = {item["name"]: item for item in browser.get("config")["settings"]}
    for name in FILE_ONLY:
        value = "/tmp/x" if "file" in name else "http://127.0.0.1:9"
        for change in ({"set": {name: value}}, {"unset": [name]}):
            browser.refuses("PATCH", "config", {"version": version, **change}, 403, name,
                            "file_only")
        assert shown[name]["file_only"]


def test_masked_secrets_are_left_alone(admin):
    browser = admin(custom_api_key="sk-0123456789abcdef",
                    upstream_proxy="http://me:hunter2@proxy:1")
    shown = {item["name"]: item["value"] for item in browser.get("config")["settings"]}
    wanted = {name: shown[name] for name in (
        "custom_api_key", "upstream_proxy", "oauth_client_secret", "api_key")}
    assert browser.edit("PATCH", "config", set={**wanted, "drain_s": 4}).status == 200
    assert browser.settings.custom_api_key == "sk-0123456789abcdef"
    assert browser.settings.upstream_proxy == "http://me:hunter2@proxy:1"
    assert browser.settings.drain_s == 4
    for key in ("a new key", ""):
        assert browser.edit("PATCH", "config", set={"custom_api_key": key}).status == 200
        assert browser.settings.custom_api_key == key


def test_saving_never_loses_what_somebody_else_saved(admin, config):
    browser = admin(port=1)
    folder = os.path.dirname(config.path)

    def on_the_command_line():
        assert ifl.main(["config", "set", "port", "2", "--config-dir", folder]) == 0

    for change in (on_the_command_line, lambda: config.change(lambda raw: raw.update(drain_s=7))):
        version = browser.version
        change()
        for facts in ({"set": {"port": 3}}, {"set": {"log_level": "debug"}}, {"unset": ["port"]}):
            browser.refuses("PATCH", "config", {"version": version, **facts}, 409,
                            code="changed_meanwhile")
    assert browser.edit("PATCH", "config", set={"port": 3}).status == 200
    assert config.read()["port"] == 3 and config.read()["drain_s"] == 7
    browser.refuses("PATCH", "config", {"version": "of another life", "unset": ["port"]}, 409)
    # tokens renew themselves: that is no change
    version = browser.version
    config.change(lambda raw: raw.update(accounts={"x": {"apiKey": "sk-renewed-renewed"}}))
    assert browser("PATCH", "config", {"version": version, "unset": ["port"]}).status == 200


def test_of_two_tabs_at_once_one_is_told(admin, config):
    browser = admin()
    version, answers = browser.version, []
    names = ["drain_s", "keepalive_s", "queue_limit", "usage_days"]

    def save(name):
        body = {"version": version, "set": {name: 11}}
        answers.append((browser("PATCH", "config", body).status, name))

    tabs = [threading.Thread(target=save, args=(name,)) for name in names]
    [tab.start() for tab in tabs]
    [tab.join(WAIT_S) for tab in tabs]
    assert sorted(status for status, _ in answers) == [200, 409, 409, 409]
    assert [name for name in names if config.read().get(name) == 11] == [sorted(answers)[0][1]]


def test_a_config_that_can_not_be_written_is_said(admin, monkeypatch):
    browser = admin()

    def change(self, edit):
        raise OSError(errno.EROFS, "Read-only file system")
    version = browser.version
    monkeypatch.setattr(ifl.ConfigFile, "change", change)
    answer = browser.refuses("PATCH", "config", {"version": version, "set": {"port": 1}}, 500,
                             code="cannot_write")
    assert "Read-only" in answer.error["message"]


# --- writing: providers -------------------------------------------------------------------

def test_providers_are_added_edited_ordered_and_removed(admin, config, upstream):
    browser = admin()
    answer = browser("POST", "providers", {
        "name": "智谱", "base_url": upstream.url, "api_keys": ["sk-0123456789abcdef", " sk-second "],
        "models": ["m1", {"id": "m2", "context": 5}], "concurrency": 2, "timeout_s": 5.5,
        "headers": {"X-Token": "tokentokentokentoken"}})
    assert answer.status == 201 and answer.json["keys"] == [
        {"index": 0, "masked": "sk-…cdef", "state": "ok", "rest_s": 0},
        {"index": 1, "masked": "…", "state": "ok", "rest_s": 0}]
    assert "0123456789" not in answer.body.decode() and "tokentoken" not in answer.body.decode()
    browser.refuses("POST", "providers", {"name": "智谱", "base_url": upstream.url}, 409, "name",
                    "name_taken")
    assert browser("POST", "providers",
                   {"name": "deepseek", "preset": "deepseek", "api_keys": ["sk-x"]}).status == 201
    found = browser.get("providers")
    assert [row["name"] for row in found["data"]] == ["智谱", "deepseek"]
    assert found["default_provider"] == "智谱" and found["data"][1]["preset"] == "deepseek"
    assert found["data"][0]["facts"]["m2"] == {"context": 5}
    config.change(lambda raw: raw["providers"][0].update(note="by hand"))
    browser.gateway.change_config(
        lambda raw: raw.update(aliases={"a": ["智谱/m1", {"model": "智谱/m2", "tools": True}]},
                               default_provider="智谱"))
    answer = browser.edit("PUT", "providers/" + urllib.parse.quote("智谱"),
                          name="z", timeout_s=None, models=["m2", "m3"],
                          api_keys=[{"keep": 1}, "sk-…cdef", "sk-third"],
                          headers={"X-Token": "tok…oken", "X-B": "b"})
    assert answer.status == 200 and answer.json["name"] == "z"
    raw = config.read()
    assert raw["providers"][0] == {
        "base_url": upstream.url, "name": "z", "concurrency": 2,
        "note": "by hand", "api_keys": ["sk-second", "sk-0123456789abcdef", "sk-third"],
        "models": [{"id": "m2", "context": 5}, "m3"],
        "headers": {"X-Token": "tokentokentokentoken", "X-B": "b"}}
    assert raw["aliases"] == {"a": ["z/m1", {"model": "z/m2", "tools": True}]}
    assert raw["default_provider"] == "z"
    answer = browser.edit("POST", "providers/order", names=["deepseek", "z"])
    assert [row["name"] for row in answer.json["data"]] == ["deepseek", "z"]
    assert browser("DELETE", "providers/z").status == 204
    assert browser("DELETE", "providers/z").status == 404
    assert "default_provider" not in config.read() and len(config.read()["providers"]) == 1


def test_a_provider_of_a_preset_keeps_only_what_differs(admin, config):
    browser = admin()
    preset, key = ifl.PRESETS["deepseek"], "sk-0123456789abcdef"
    given = {**preset.roads, "models": list(preset.models), "profile": dict(preset.profile)}
    assert browser("POST", "providers", {"name": "d", "preset": "deepseek", "api_keys": [key],
                                         **given}).status == 201
    assert config.read()["providers"] == [
        {"name": "d", "preset": "deepseek", "api_keys": [key]}]
    shown, = browser.get("providers")["data"]
    assert {name: shown[name] for name in given} == given and shown["preset"] == "deepseek"
    answer = browser.edit("PUT", "providers/d", concurrency=2, **given)
    assert answer.status == 200 and answer.json["keys"][0]["masked"] == "sk-…cdef"
    browser.edit("PUT", "providers/d", profile={**given["profile"], "files": True})
    kept, = config.read()["providers"]
    assert kept == {"name": "d", "preset": "deepseek", "api_keys": [key], "concurrency": 2,
                    "profile": {"files": True}}
    browser.edit("PUT", "providers/d", messages_url="")          # its Chat alone
    assert config.read()["providers"][0]["messages_url"] == ""
    assert browser.get("providers")["data"][0]["messages_url"] == ""
    for moved in ({"base_url": "https://other.example/v1"}, {"preset": "zhipu"},
                  {"messages_url": "https://other.example"}):
        browser.refuses("PUT", "providers/d", {"version": browser.version, **moved}, 400,
                        "api_keys", "address_changed")


def test_the_page_knows_an_api_by_its_address(admin, config):
    browser = admin()
    for name, url in (("a", "https://api.deepseek.com/"), ("b", "https://mine.example"),
                      ("c", "https://api.deepseek.com/beta")):
        assert browser("POST", "providers", {"name": name, "base_url": url}).status == 201
    assert config.read()["providers"] == [
        {"name": "a", "preset": "deepseek"}, {"name": "b", "base_url": "https://mine.example/v1"},
        {"name": "c", "preset": "deepseek", "base_url": "https://api.deepseek.com/beta"}]


def test_the_page_is_told_titles_roads_and_how_each_preset_is_paid(admin):
    rows = {row["name"]: row for row in admin().get("presets")["data"]}
    plan, house, engine = rows["zhipu-coding"], rows["gemini"], rows["ollama"]
    assert plan["title"]["en"] == "Zhipu coding plan" and plan["title"]["zh"] != plan["title"]["en"]
    assert [row["paid_by"] for row in (plan, house, engine)] == ["plan", "use", "nothing"]
    assert plan["roads"] == ["Chat", "Messages"] and house["models"] == []
    assert plan["key_page"].startswith("https://open.bigmodel.cn/") and not engine["key_variable"]
    assert list(rows) == list(ifl.PRESETS)


def test_a_renamed_provider_keeps_its_clients_and_its_price(admin, config, upstream):
    browser = admin(provider(upstream, "old"),
                    client_keys=[key_entry("bob", "sk-bob", models=["old/*", "m9"])],
                    prices={"old/m1": {"input": 2}, "*": {"input": 1}})
    call = functools.partial(post, browser.server, Authorization="Bearer sk-bob")
    assert call(chat(model="old/m1")).status == 200
    assert browser.edit("PUT", "providers/old", name="new").status == 200
    assert call(chat(model="new/m1")).status == 200
    raw = config.read()
    assert raw["client_keys"][0]["models"] == ["new/*", "m9"]
    assert list(raw["prices"]) == ["old/m1", "new/m1", "*"]
    assert raw["prices"]["new/m1"] == {"input": 2}


#: Values of a provider's fields that are refused.
BAD_PROVIDERS = {
    "name": ["a b", "a/b", 5], "base_url": ["ftp://x", "http://u:p@x", "http://["],
    "kind": ["other"], "headers": [{"X": "$PATH"}, {"X": 5}, {"a b": "x"}, {"X": "a\r\nb"}],
    "api_keys": [["$HOME"], [5], [""], ["a\nb"], ["enc:v1:k.x.y"], [{"keep": 0}], ["sk-…cdef"],
                 "sk-x"],
    "models": [[5], [{"context": 5}]], "concurrency": [-1, "2"], "proxy": ["ftp://x"],
    "preset": ["nope"], "profile": [[], {"vision": "no"}], "no_such": [1]}


def test_bad_providers_change_nothing(admin, upstream):
    browser = admin(provider(upstream, "x"))
    version, new = browser.version, {"name": "new", "base_url": upstream.url}
    for name, values in BAD_PROVIDERS.items():
        for value in values:
            browser.refuses("POST", "providers", {**new, name: value}, 400, name)
            browser.refuses("PUT", "providers/x", {"version": version, name: value}, 400, name)
    for name, value in (("name", ""), ("base_url", None)):
        browser.refuses("POST", "providers", {**new, name: value}, 400, name)
    assert upstream.requests == []


@pytest.mark.parametrize("name, value, cure", [
    ("headers", "x", {}), ("api_keys", "sk-x", ["sk-y"]), ("api_keys", 5, []),
    ("models", 5, ["m"]), ("models", [{"id": ["m"]}], ["m"]), ("models", "m", ["m"])])
def test_what_is_of_the_wrong_type_in_config_json_can_be_mended_on_the_page(
        admin, config, upstream, name, value, cure):
    browser = admin({**provider(upstream, "x"), name: value})
    assert browser.get("providers")["data"][0]["problem"]
    browser.refuses("PUT", "providers/x", {"version": browser.version, "concurrency": 2}, 400, name)
    assert browser.edit("PUT", "providers/x", **{name: cure}).status == 200
    assert config.read()["providers"][0][name] == cure
    assert not browser.get("providers")["data"][0]["problem"]


def test_the_key_of_the_login_is_one_row(iflow):
    _, start = iflow
    browser = Admin(start({"apiKey": "sk-0123456789abcdef"}, admin_password=PASSWORD_HASH))
    assert browser.sign_in().status == 204
    assert browser.get("providers")["data"][0]["keys"] == [
        {"index": 0, "masked": "sk-…cdef", "state": "ok", "rest_s": 0}]


def test_entries_without_a_proper_name_are_no_obstacle(admin, config, upstream):
    browser = admin(provider(upstream, "x"), {"name": ["y"]}, {"base_url": "http://h"},
                    {"name": ""}, client_keys=[key_entry("bob", "sk-bob"), {"name": ["y"]}])
    assert [row["name"] for row in browser.get("providers")["data"]] == ["x"]
    assert [row["name"] for row in browser.get("keys")["data"]] == ["bob"]
    assert browser("POST", "providers/test", {"name": "draft", "base_url": upstream.url}).json["ok"]
    assert browser.edit("POST", "providers/order", names=["x"]).status == 200
    assert len(config.read()["providers"]) == 4


def test_a_provider_that_somebody_else_changed(admin, config, upstream):
    browser = admin(provider(upstream, "x", api_keys=["sk-0123456789abcdef"]),
                    provider(upstream, "y"))
    version = browser.version
    config.change(lambda raw: raw["providers"][0].update(concurrency=3))
    for method, path, facts in (("PUT", "x", {"concurrency": 5}),
                                ("POST", "order", {"names": ["y", "x"]})):
        browser.refuses(method, "providers/" + path, {"version": version, **facts}, 409,
                        code="changed_meanwhile")
    assert browser.edit("PUT", "providers/x", concurrency=5).status == 200
    assert browser.edit("PUT", "providers/x", name="y").error["code"] == "name_taken"
    assert browser.edit("PUT", "providers/nope").status == 404
    for names in (["y"], ["y", "x", "x"], ["y", "x", 5], [], "x"):
        assert browser.edit("POST", "providers/order", names=names).status == 400


def test_references_stay_what_they_are(admin, config, upstream):
    """The page shows $NAME and keeps it; it can't add one, which would read the server's
    environment."""
    browser = admin(provider(upstream, "x", api_keys=["$MY_KEY"], headers={"X-A": "$MY_HEADER"}),
                    environ={"MY_KEY": "sk-from-environment"})
    row, = browser.get("providers")["data"]
    assert row["keys"][0]["masked"] == "$MY_KEY" and row["headers"] == {"X-A": "$MY_HEADER"}
    assert "MY_HEADER" in row["problem"]
    assert browser.edit("PUT", "providers/x", api_keys=["$MY_KEY", "sk-b"],
                        headers={"X-A": "$MY_HEADER"}).status == 200
    assert config.read()["providers"][0]["api_keys"] == ["$MY_KEY", "sk-b"]
    for facts in ({"api_keys": ["$MY_KEY", "$PATH"]}, {"headers": {"X-A": "$MY_KEY"}},
                  {"headers": {"X-B": "$MY_HEADER"}}):
        assert browser.edit("PUT", "providers/x", **facts).error["code"] == "reference"
    assert b"sk-from-environment" not in browser("GET", "providers").body
    assert browser.edit("PUT", "providers/x", api_keys=["$$two", "$no-name"],
                        headers=None).status == 200
    assert browser.gateway.state.router.providers["x"].api_keys == ("$$two", "$no-name")


def test_providers_of_the_command_line_are_not_ours_to_change(admin, upstream):
    browser = admin(flags={"providers": [provider(upstream, "upstream")]})
    assert browser.get("providers")["data"][0]["source"] == "flag"
    for method, path, body in (("POST", "", {"name": "x", "base_url": upstream.url}),
                               ("DELETE", "/upstream", None),
                               ("PUT", "/upstream", {"version": "x"}),
                               ("POST", "/order", {"version": "x", "names": ["x"]})):
        browser.refuses(method, "providers" + path, body, 409, code="set_elsewhere")


def test_states_of_keys(admin, upstream):
    browser = admin(provider(upstream, "x", api_keys=["sk-a", "sk-b", "sk-c"]))
    rests = browser.gateway.lanes["x"].rests
    rests.rest("sk-a", 30)
    rests.rest("sk-b", 300, refused=True)

    def states():
        row, = browser.get("providers")["data"]
        return [(key["state"], key["rest_s"]) for key in row["keys"]]
    assert states() == [("resting", 30), ("refused", 300), ("ok", 0)]
    browser.server.clock.now += 31
    rests.ok("sk-b")
    assert states() == [("ok", 0)] * 3


TRIALS = [
    # what the upstream says, the checks' outcomes
    ([], (True, True, True, True, True), ""),
    ([plain({"error": {"message": "bad key"}}, 401)], (True, False, None, None, None), "the key"),
    ([plain({"error": {"message": "no such model"}}, 404)], (True, True, False, None, None),
     "the model"),
    ([plain({"error": {"message": HOSTILE}}, 402)], (True, False, None, None, None), "the balance"),
    ([Reply(CLOSE)], (False, None, None, None, None), "the connection")]


@pytest.mark.parametrize("script, outcome, fault", TRIALS)
@pytest.mark.parametrize("draft", [False, True])
def test_trying_a_provider(admin, upstream, script, outcome, fault, draft):
    facts = {"name": "x", "base_url": upstream.url, "api_keys": ["sk-a"], "models": ["m1"]}
    browser = admin() if draft else admin(facts)
    before = browser.file()
    upstream.script.extend(script)
    call = {"id": "1", "type": "function", "function": {"name": "report", "arguments": "{}"}}
    calling = plain(completion(None, "tool_calls", tool_calls=[call]))
    upstream.usual = lambda seen: (calling if seen.method == "POST" and "tools" in seen.json
                                   else usual_reply(seen))
    answer = browser("POST", "providers/test", facts if draft else {"name": "x"})
    found, checks = answer.json, answer.json["checks"]
    assert [check["what"] for check in checks] == ["reach", "key", "model", "stream", "tools"]
    assert tuple(check["ok"] for check in checks) == outcome and found["ok"] is all(outcome)
    said = "".join(check["message"] for check in checks if check["ok"] is False)
    assert said.startswith(fault) and all(check["took_s"] >= 0 for check in checks)
    assert browser.file() == before and (script or found["models"] == ["m1", "org/m2:free"])


def test_checks_and_routes_are_told_in_the_language_of_the_page(admin, upstream):
    browser = admin(provider(upstream, "x", models=["m1"]))
    for language, check, step in (("zh", "无需密钥", "没有适用的别名"), ("en", "needs no key", "no alias"),
                                  ("fr", "needs no key", "no alias")):
        said = [browser("POST", path, body, accept_language=language).json for path, body in (
            ("providers/test", {"name": "x"}), ("routes/explain", {"model": "m1"}))]
        assert said[0]["checks"][1]["message"] == check and said[1]["steps"][0].startswith(step)


def test_trying_what_does_not_work(admin, upstream):
    browser = admin(provider(upstream, "x", api_keys=["$MISSING_ONE"]))
    browser.refuses("POST", "providers/test", {"name": "nope"}, 404)
    browser.refuses("POST", "providers/test", {"base_url": "ftp://x"}, 400)
    for body, words in (({"name": "x"}, "its settings"),
                        ({"name": "me", "base_url": browser.server.url + "/v1"},
                         "this program's own address")):
        found = browser("POST", "providers/test", body).json
        assert not found["ok"] and words in found["checks"][0]["message"]
    assert upstream.requests == []


def test_a_draft_may_use_the_keys_that_are_kept(admin, upstream):
    browser = admin(provider(upstream, "x", api_keys=["sk-0123456789abcdef"]))
    for keys in (["sk-…cdef"], [{"keep": 0}]):
        draft = {"name": "x", "base_url": upstream.url + "/", "models": ["m1"], "api_keys": keys}
        assert browser("POST", "providers/test", draft).json["checks"][2]["ok"]
        assert upstream.last.headers["authorization"] == "Bearer sk-0123456789abcdef"
    assert browser.get("usage?by=key")["total"]["requests"] == 0


#: What an edit gives again of what is stored, at another address; and the field that is refused.
KEPT_ELSEWHERE = [
    ({}, "api_keys"), ({"api_keys": [{"keep": 0}]}, "api_keys"),
    ({"api_keys": ["$MY_KEY"]}, "api_keys"),
    ({"api_keys": ["sk-new-new-new-new", {"keep": 1}]}, "api_keys"),
    ({"api_keys": ["sk-new-new-new-new", "sk-…cdef"]}, "api_keys"),
    ({"api_keys": ["sk-new-new-new-new"]}, "headers"),
    ({"api_keys": [], "headers": {"X-A": "$MY_KEY"}}, "headers"),
    ({"api_keys": None, "headers": {"X-B": "…"}}, "headers")]


@pytest.mark.parametrize("place", ["base_url", "scheme", "proxy"])
def test_what_is_stored_does_not_leave_to_another_address(admin, upstreams, place):
    """Not even to test a draft: whoever may use the page must not read the keys."""
    upstream, thief = upstreams(), upstreams()
    browser = admin(provider(upstream, "x", api_keys=["$MY_KEY", "sk-0123456789abcdef"],
                             models=["m1"], headers={"X-A": "$MY_KEY", "X-B": "tok"}),
                    environ={"MY_KEY": "sk-e"})
    new = {"base_url": {"base_url": thief.url}, "proxy": {"proxy": thief.url[:-3]},
           "scheme": {"base_url": upstream.url.replace("http:", "https:")}}[place]
    version = browser.version
    for facts, param in KEPT_ELSEWHERE:
        for method, path, more in (("PUT", "providers/x", {"version": version}),
                                   ("POST", "providers/test", {"name": "x"})):
            browser.refuses(method, path, {**more, **new, **facts}, 400, param, "address_changed")
    fresh = {"api_keys": ["sk-new-new-new-new"], "headers": {"X-B": "typed again"}}
    assert browser.edit("PUT", "providers/x", **new, **fresh).status == 200 and not thief.requests


@pytest.mark.parametrize("settings, param", [
    ({"base_url": "http://127.0.0.1:9/v1"}, "base_url"),
    ({"upstream_proxy": "http://127.0.0.1:9"}, "upstream_proxy"),
    ({"base_url": "http://127.0.0.1:9/v1", "api_key": "sk-…cdef"}, "base_url")])
def test_nor_do_stored_secrets_by_a_setting(admin, upstream, settings, param):
    browser = admin(provider(upstream, "x", api_keys=["sk-0123456789abcdef"]),
                    api_key="sk-0123456789abcdef")
    browser.refuses("PATCH", "config", {"version": browser.version, "set": settings}, 400, param)


# --- writing: keys, logins, chat box -----------------------------------------------------

def test_keys_are_made_shown_once_and_removed(admin):
    browser = admin()
    answer = browser("POST", "keys", {"name": "小明", "models": ["glm-*"], "rpm": 5, "tpd": 1000,
                                      "expires": "2999-01-31", "rpd": None})
    key = answer.json["key"]
    assert answer.status == 201 and re.fullmatch(r"sk-[0-9a-f]{48}", key)
    assert key not in browser.file() and key.encode() not in browser("GET", "keys").body
    row, = browser.get("keys")["data"]
    assert row.pop("created") and row == {
        "name": "小明", "limits": {"rpm": 5, "tpd": 1000}, "models": ["glm-*"],
        "expires": "2999-01-31", "expired": False, "used": {"rpm": 0, "tpd": 0}}
    browser.refuses("POST", "keys", {"name": "小明"}, 409, "name", "name_taken")
    # from now on one is needed
    assert get(browser.server, "/v1/models").status == 401
    assert get(browser.server, "/v1/models", X_Api_Key=key).status == 200
    for name, value in (("name", ""), ("name", "a b"), ("rpm", 0), ("rpm", 1.5), ("models", [5]),
                        ("expires", "soon"), ("expires", "2001-01-01"), ("nope", 1)):
        browser.refuses("POST", "keys", {"name": "x", name: value}, 400, name)
    assert browser("DELETE", "keys/" + urllib.parse.quote("小明")).status == 204
    assert browser("DELETE", "keys/nobody").status == 404 and browser.get("keys")["data"] == []


def test_a_provider_is_switched_off_and_on(admin, upstream):
    browser = admin(provider(upstream, "a", models=["m"]), provider(upstream, "b", models=["m"]))
    for enabled, chosen in ((False, "b"), (True, "a")):
        answer = browser("PUT", "providers/a", {"version": browser.version, "enabled": enabled})
        assert answer.status == 200 and answer.json["enabled"] is answer.json["usable"] is enabled
        router = browser.gateway.current().router
        assert router.default.name == router.resolve("m")[0].provider.name == chosen
        assert not browser.gateway.problems
    browser.refuses("PUT", "providers/a", {"version": browser.version, "enabled": "no"}, 400,
                    "enabled")


def test_what_rests_says_why_and_is_tried_again_when_asked(admin, upstream):
    browser = admin(provider(upstream, "a", models=["m"], api_keys=["sk-0123456789abcdef"]))
    gateway = browser.gateway
    rests = gateway.lane(gateway.current().router.providers["a"]).rests
    rests.rest("sk-0123456789abcdef", 60, why="slow down, sk-0123456789abcdef")
    assert rests.fail(1, 30, "it is broken")
    row, = browser.get("providers")["data"]
    assert (row["circuit"], row["why"], row["rest_s"] > 25) == ("open", "it is broken", True)
    assert row["keys"][0]["why"].startswith("slow down")
    assert "0123456789abcdef" not in json.dumps(row)
    row = browser("POST", "providers/wake", {"name": "a"}).json
    assert (row["circuit"], row["why"], row["rest_s"], row["keys"][0]["state"]) == (
        "closed", "", 0, "ok")
    browser.refuses("POST", "providers/wake", {"name": "x"}, 404, "name")


def test_a_key_is_edited_and_stays_the_same_key(admin):
    browser = admin()
    key = browser("POST", "keys", {"name": "a-b", "models": ["glm-*"], "rpm": 5,
                                   "expires": "2999-01-31"}).json["key"]

    def edit(name="a-b", **facts):
        return browser("PUT", "keys/" + name, {"version": browser.version, **facts})

    def row():
        shown, = browser.get("keys")["data"]
        return shown["models"], shown["limits"], shown["expires"]

    assert edit(rpm=None, budget_day=1.5).status == 204
    assert row() == (["glm-*"], {"budget_day": 1.5}, "2999-01-31")
    assert edit(models=[], expires="2998-01-31").status == 204
    assert row() == ([], {"budget_day": 1.5}, "2998-01-31")
    assert edit(expires=None, budget_day=None).status == 204 and row() == ([], {}, None)
    assert get(browser.server, "/v1/models", X_Api_Key=key).status == 200
    for name, value in (("rpm", 0), ("models", [5]), ("expires", "soon"), ("sha256", "0" * 64),
                        ("name", "other")):
        browser.refuses("PUT", "keys/a-b", {"version": browser.version, name: value}, 400, name)
    assert edit("nobody", rpm=1).status == 404 and row() == ([], {}, None)
    assert browser("PUT", "keys/a-b", {"version": "old", "rpm": 1}).status == 409


def test_a_login_is_ended(admin, home):
    path = home / ".iflow" / "settings.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"apiKey": "sk-0123456789abcdef", "oauth_refresh_token": "r",
                                "theme": "dark"}))
    browser = admin(accounts={"second": {"apiKey": "sk-second-second-second"}})
    assert {row["account"] for row in browser.get("logins")["data"]} == {"default", "second"}
    assert [row["source"] for row in browser.get("providers")["data"]] == ["login"]
    for account, status in (("default", 204), ("default", 404), ("second", 204),
                            (urllib.parse.quote(HOSTILE), 404)):
        assert browser("DELETE", "logins/" + account).status == status
    assert json.loads(path.read_text()) == {"theme": "dark"}
    assert browser.get("logins")["data"] == []


def test_the_chat_box(admin, upstream):
    browser = admin(upstream, custom_api_key="sk-client-client")
    answer = browser("POST", "play/chat", chat())
    assert answer.status == 200 and "Hello" in answer.body.decode()
    assert "cookie" not in upstream.requests[0].headers
    answer = browser("POST", "play/chat", chat(True))
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
    assert until(lambda: browser.get("usage?by=key")["rows"])[0]["name"] == "admin"
    assert browser("POST", "play/chat", {"model": 5}).status == 400


# --- lines for clients ---------------------------------------------------------------------

def blocks_of(found, client):
    return {block["language"]: block["text"] for row in found["data"] if row["id"] == client
            for block in row["blocks"]}


@pytest.mark.parametrize("settings, shell_key, key", [
    ({}, "sk-none", "sk-none"),
    ({"custom_api_key": "sk-0123456789abcdef"}, '"$IFLOW2API_KEY"', "YOUR_KEY")])
def test_lines_for_every_client(admin, upstream, settings, shell_key, key):
    browser = admin(provider(upstream, "up", models=["m1"]), **settings)
    found = browser.get("clients")
    assert [row["id"] for row in found["data"]] == list(ifl.CLIENTS) == [
        "claude", "codex", "opencode", "gemini", "qwen", "aider", "openai", "curl"]
    assert found["model"] == "m1" and found["needs_key"] is bool(settings)
    assert "0123456789" not in str(found)
    for client, setup in ifl.CLIENTS.items():
        blocks = blocks_of(found, client)
        assert set(blocks) == {*ifl.SHELLS, *([setup.language] if setup.file else [])}
        if client == "gemini":           # its file says how to log in, and nothing of this server
            assert "selectedType" in blocks.pop("json")
        assert all(found["base_url"] in text for text in blocks.values())
        assert client in ("claude", "openai") or all("m1" in text for text in blocks.values())
    assert f"OPENAI_API_KEY={shell_key}" in blocks_of(found, "openai")["bash"]
    assert json.loads(blocks_of(found, "claude")["json"])["env"]["ANTHROPIC_AUTH_TOKEN"] == key
    opencode = json.loads(blocks_of(found, "opencode")["json"])
    assert opencode["provider"]["iflow2api"]["options"]["apiKey"] == key
    compile(blocks_of(found, "openai")["python"], "block", "exec")
    if sys.version_info >= (3, 11):
        codex = __import__("tomllib").loads(blocks_of(found, "codex")["toml"])
        assert codex["model_providers"]["iflow2api"]["wire_api"] == "responses"
        assert codex["model_providers"]["iflow2api"]["supports_websockets"] is False


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="needs bash")
def test_the_lines_of_shells_and_names_of_models(admin, upstream, tmp_path):
    """Names come from upstreams: whatever is in them, the lines set variables and do nothing
    else."""
    browser, touch = admin(upstream), "touch " + str(tmp_path / "gotcha")
    evil = f"m'\n\"; {touch} #`{touch}`$({touch})"
    found = browser.get("clients?model=" + urllib.parse.quote(evil) + "&key=mine")
    names = ("IFLOW2API_KEY OPENAI_API_KEY ANTHROPIC_AUTH_TOKEN OPENCODE_CONFIG_CONTENT "
             "GEMINI_API_KEY").split()
    said = "\necho end " + " ".join("$" + name for name in names)
    for client in ifl.CLIENTS:
        script = "curl() { echo end mine $#; }\n" + blocks_of(found, client)["bash"] + said
        done = subprocess.run(["/bin/bash", "-c", script], capture_output=True, text=True,
                              timeout=60, env={"PATH": os.environ["PATH"]})
        assert done.stdout.startswith(("end mine", 'end {"$schema"')), (client, done)
    assert not (tmp_path / "gotcha").exists()


def test_the_address_is_the_one_the_browser_uses(admin):
    browser = admin(allowed_hosts=["box.lan"])
    browser.headers = {"Host": "box.lan:8080"}
    assert browser.get("session")["base_url"] == "http://box.lan:8080" == browser.get(
        "clients")["base_url"]
    browser.headers = {"Host": "box.lan", "X-Forwarded-Proto": "https"}
    assert browser.get("clients")["base_url"] == "https://box.lan"
    assert browser.sign_in().headers["set-cookie"].endswith("; Secure")


@pytest.mark.parametrize("client", list(ifl.CLIENTS))
def test_env_prints_what_the_client_needs(monkeypatch, capsys, client):
    monkeypatch.setenv("IFLOW2API_CUSTOM_API_KEY", "sk-it's")
    for shell in ifl.SHELLS:
        assert ifl.main(["env", client, "--shell", shell, "--port", "4321",
                         "--model", "glm-5"]) == 0
        out = capsys.readouterr().out
        assert "127.0.0.1:4321" in out and "IFLOW2API_CUSTOM" not in out and "URL/" not in out
        assert "sk-it" in out


def env_json(capsys, config, facts, *flags):
    """(variables, what was said) of `env claude --json` with this config.json."""
    put_config(config, {"detect_local": False, **facts})
    assert ifl.main(["env", "claude", "--json", *flags]) == 0
    said = capsys.readouterr()
    return json.loads(said.out)["env"], said.err


HAIKU, SONNET, OPUS = "claude-haiku-4-5", "claude-sonnet-4-6", "claude-opus-4-8"


@pytest.mark.parametrize("facts, main, opus, haiku", [
    ({}, None, None, None), ({"default_model": "m"}, "m", "m", "m"),
    ({"default_model": "m", "aliases": {"claude-haiku-*": "s"}}, "m", "m", HAIKU),
    ({"default_model": "m", "aliases": {"claude-*": "s"}}, SONNET, OPUS, HAIKU),
    ({"providers": [{"name": "p", "base_url": "http://h/v1",
                     "models": [{"id": "m", "context": 65536}]}]}, "m", "m", "m")])
def test_env_claude_names_the_models_of_the_configuration(
        capsys, config, facts, main, opus, haiku):
    found, said = env_json(capsys, config, {**facts, "host": "::1", "port": unused_port()},
                           *([] if main else ["--host", "0.0.0.0"]))
    url = found.pop("ANTHROPIC_BASE_URL")
    assert url.startswith("http://[::1]:" if main else "http://127.0.0.1:")
    assert found.pop("ANTHROPIC_AUTH_TOKEN") == "not-needed" and "no iflow2api answers" in said
    tier = "ANTHROPIC_DEFAULT_{}_MODEL".format
    fable = opus and opus.replace("opus-4-8", "fable-5")
    wanted = {"ANTHROPIC_MODEL": main, tier("SONNET"): main, tier("OPUS"): opus,
              tier("FABLE"): fable, tier("HAIKU"): haiku, "ANTHROPIC_SMALL_FAST_MODEL": haiku,
              "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "65536" if "providers" in facts else None}
    assert found == {name: value for name, value in wanted.items() if value}


@pytest.mark.parametrize("entry, is_local", [
    ({"preset": "vllm"}, True), ({"preset": "ollama", "base_url": "http://box:1/v1"}, False),
    ({"base_url": "http://localhost:5000/v1"}, True), ({"preset": "deepseek"}, False)])
def test_env_claude_keeps_the_prompt_stable_for_an_engine_on_this_machine(
        capsys, config, entry, is_local):
    found, _ = env_json(capsys, config, {"providers": [{"name": "p", **entry, "models": ["m"]}]})
    assert found.get("CLAUDE_CODE_TOTAL_TOKENS_REMINDER") == ("off" if is_local else None)
    assert found.get("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC") == ("1" if is_local else None)


def test_env_claude_of_a_running_server(capsys, config, server, upstream):
    running = server(upstream)
    found, said = env_json(capsys, config, {"client_keys": [key_entry("a", "sk-a-123456789")]},
                           "--port", str(running.port), "--model", "glm-5")
    assert found["ANTHROPIC_BASE_URL"] == running.url and "answers" not in said
    assert found["ANTHROPIC_AUTH_TOKEN"] == "YOUR_KEY"
    assert found["ANTHROPIC_DEFAULT_OPUS_MODEL"] == "glm-5"
    assert ifl.main(["env", "claude", "--port", "0"]) == 2
    assert "--port" in capsys.readouterr().err


def test_values_and_arguments_are_quoted_for_their_shell():
    """PowerShell takes typographic quotes for its own; cmd heeds & and | outside of quotes."""
    for shell, value, quoted in (
            ("bash", "a'b", """'a'"'"'b'"""), ("fish", "a'b\\c", "'a\\'b\\\\c'"),
            ("powershell", "a'\u2018\u2019\u201a\u201bc",
             "'a''\u2018\u2018\u2019\u2019\u201a\u201a\u201b\u201bc'"),
            ("cmd", "a&b", "a&b"), ("cmd", 'a"&b"&c"|d', 'a"^&b"&c"^|d')):
        assert ifl.SHELLS[shell].quote(value) == quoted
    for text, argument in (("a b", '"a b"'), ('m="x"', '"m=\\"x\\""'), ("C:\\", '"C:\\\\"'),
                           ('a\\"b', '"a\\\\\\"b"'), ("a\\b", '"a\\b"')):
        assert ifl.SHELLS["cmd"].argument(text) == argument


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="needs bash")
def test_env_lines_survive_a_real_shell(tmp_path):
    command = f"{sys.executable} {byte_code()} env codex --model glm-5 --config-dir {tmp_path}"
    script = f'eval "$({command})"; ' \
             'codex_path=1; printf "%s|" "$IFLOW2API_KEY"; declare -f codex'
    environ = {**os.environ, "HOME": str(tmp_path), "IFLOW2API_CUSTOM_API_KEY": "a'b $c"}
    done = subprocess.run(["/bin/bash", "-c", script], capture_output=True, text=True, env=environ,
                          timeout=60)
    assert done.stdout.startswith("a'b $c|") and 'wire_api="responses"' in done.stdout, done


# --- live -----------------------------------------------------------------------------

class Watcher:
    """An open event stream."""

    def __init__(self, browser, query="", **headers) -> None:
        self.client = Client(browser.server)
        self.client.request("GET", "/admin/api/events" + query,
                            headers={"Cookie": browser.cookie, **_spelled(headers)})
        self.status, self.headers = self.client.head()
        self.ident = ""

    def next(self, *names):
        """The data of the next event that has one of the names."""
        while True:
            facts = {}
            for line in iter(lambda: self.client.file.readline().decode().rstrip("\n"), ""):
                name, _, value = line.partition(": ")
                facts[name] = value
            if not facts:
                return None
            self.ident = facts["id"]
            if not names or facts["event"] in names:
                return facts["event"], json.loads(facts["data"])

    def close(self):
        self.client.hang_up()


def test_events_as_they_happen(admin, upstream, monkeypatch):
    monkeypatch.setattr(ifl, "OVERVIEW_S", 0.05)
    browser = admin(upstream)
    watcher = Watcher(browser, "?logs=1")
    assert watcher.status == 200 and watcher.headers["content-type"].startswith("text/event-stream")
    assert watcher.next() == ("config", {"version": browser.version})
    assert watcher.next()[1]["address"] == browser.server.url
    post(browser.server, chat(model=HOSTILE))
    assert watcher.next("request")[1]["model"] == HOSTILE
    assert "up/" in watcher.next("log")[1]["text"]
    assert watcher.next("overview")[1]["today"]["requests"] == 1
    first = watcher.ident
    browser("PATCH", "config", {"version": browser.version, "set": {"drain_s": 3}})
    assert watcher.next("config")[1] == {"version": browser.version} and watcher.ident >= first
    watcher.close()
    until(lambda: browser.gateway.live._viewers == {False: 0, True: 0},
          what="the end of the viewer's thread")


def test_a_stream_resumes_where_it_broke(admin, upstream, monkeypatch):
    monkeypatch.setattr(ifl, "HISTORY_SIZE", 5)
    browser = admin(upstream)
    later = [f"n{number}" for number in range(8)]

    def heard(query, ident, count):
        """What a page that knows the events to `ident` hears: models, or how many were lost."""
        watcher = Watcher(browser, query, Last_Event_ID=ident)
        events = [watcher.next("request", "dropped")[1] for _ in range(count)]
        watcher.close()
        return [event.get("model", event.get("count")) for event in events]

    watcher = Watcher(browser)
    noted_chat(browser, model="one")
    assert watcher.next("request")[1]["model"] == "one"
    ident = watcher.ident
    watcher.close()
    for name in ("two", "three"):
        noted_chat(browser, model=name)
    assert heard("?last_event_id=ignored", ident, 2) == ["two", "three"]
    for name in later:
        noted_chat(browser, model=name)
    # ten since then, five are remembered
    assert heard("", ident, 6) == [5, *later[3:]]
    assert heard("", "1-2-3", 6) == [6, *later[3:]]      # of an earlier run: all of this one
    for odd in ("rubbish", "9" * 99):
        watcher = Watcher(browser, Last_Event_ID=odd)
        noted_chat(browser, model="fresh")
        assert watcher.next("request")[1]["model"] == "fresh"
        watcher.close()


def test_who_is_slow_is_told_how_much_was_lost(server):
    running = server(detect_local=False)
    viewer = ifl.Viewer(running, True, "")
    viewer.news()
    for number in range(ifl.LOG_LINES + 500):
        running.gateway.live.logs.add((1.0, logging.INFO, "x", f"line {number}"))
    first = viewer.news().decode()
    # in portions
    assert 'event: dropped\ndata: {"count":500}' in first and first.count("event: log") == 1000
    rest = [viewer.news().decode().count("event: log") for _ in range(10)]
    assert sum(rest) == ifl.LOG_LINES - 1000 and viewer.news() == b""


def test_viewers_are_bounded_and_leave(admin):
    browser = admin()
    watchers = [Watcher(browser) for _ in range(ifl.VIEWERS_LIMIT)]
    assert all(watcher.next() for watcher in watchers)
    extra = Watcher(browser)
    assert extra.status == 503
    extra.close()
    for watcher in watchers:
        watcher.close()
    browser.gateway.live.notify()
    until(lambda: browser.gateway.live._viewers[False] == 0, what="the end of the viewers")
    assert Watcher(browser).status == 200


def test_the_stream_ends_with_its_session(admin):
    browser = admin()
    watcher = Watcher(browser)
    watcher.next()
    browser("DELETE", "session", {"everywhere": True})
    until(lambda: watcher.next() is None, what="the end of the stream")
    assert Watcher(browser).status == 401
    browser.sign_in()
    watcher = Watcher(browser)
    watcher.next()
    browser.gateway.keep_setting("admin_password", ifl.hash_password("a new password"))
    until(lambda: watcher.next() is None, what="the end of the stream")


def test_a_server_that_stops_does_not_wait_for_viewers(admin):
    browser = admin()
    watchers = [Watcher(browser) for _ in range(3)]
    [watcher.next() for watcher in watchers]
    started = time.monotonic()
    browser.server.close(WAIT_S)
    assert time.monotonic() - started < WAIT_S / 2
    assert all(until(lambda: watcher.next() is None) for watcher in watchers)


def test_heads_of_streams_end(admin):
    browser = admin()
    assert browser("HEAD", "events").status == 200 and is_well(browser.server)


def test_nobody_looking_costs_next_to_nothing(gateway):
    running = gateway(detect_local=False)
    record = logging.LogRecord("x", logging.INFO, "", 0, "a line of %d", (5,), None)
    assert best_us(lambda: running.live.emit(record)) < 50
    call = call_record()
    assert best_us(lambda: running.ledger.add(call)) < 300


# --- the command line ---------------------------------------------------------------------

def test_reset_password(home, capsys, monkeypatch, config):
    monkeypatch.setattr(ifl.Vault, "ITERATIONS", (10, 10))
    monkeypatch.setattr("sys.stdin", io.StringIO("a new password\n"))
    assert ifl.main(["admin", "reset-password", "-"]) == 0
    said = capsys.readouterr()
    assert "sessions have ended" in said.err
    assert "a new password" not in said.out + said.err + open(config.path).read()
    assert ifl.is_password("a new password", config.read()["admin_password"])
    before = open(config.path).read()
    for argv, text, word in ((["hunter2hunter2"], "", "command line"),
                             (["-"], "short\n", "8 to 1024"), (["-"], "", "8 to 1024"),
                             ([], "x" * 20 + "\n", "no terminal")):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert ifl.main(["admin", "reset-password", *argv]) == 2
        said = capsys.readouterr()
        assert word in said.err and "hunter2" not in said.err and open(config.path).read() == before
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert ifl.main(["admin", "reset-password"]) == 2 and "没有终端" in capsys.readouterr().err
    assert ifl.main(["admin"]) == 2 and ifl.main(["admin", "other"]) == 2


@posix
def test_reset_password_at_the_terminal(config):
    import pty
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, byte_code(), "admin", "reset-password"])
    said = b""
    for word in (b"new password", b"again"):
        while word not in said:
            said += os.read(fd, 1024)
        os.write(fd, b"typed at the terminal\n")
    with contextlib.suppress(OSError):                   # the end of the terminal
        for data in iter(lambda: os.read(fd, 1024), b""):
            said += data
    assert os.waitpid(pid, 0)[1] == 0 and b"typed at" not in said
    os.close(fd)
    assert ifl.is_password("typed at the terminal", config.read()["admin_password"])


def test_a_plain_password_is_refused(home, capsys, config, gateway):
    assert ifl.main(["config", "set", "admin_password", "hunter2hunter2"]) == 2
    said = capsys.readouterr().err
    assert "never the password itself" in said and "hunter2" not in said
    put_config(config, {"admin_password": "hunter2hunter2"})
    made = ifl.Gateway(config=config, environ={})
    assert made.settings.admin_password == ""
    assert any("admin_password" in p and "hunter2" not in p for p in made.problems)
    made.close()
    put_config(config, {"admin_password": PASSWORD_HASH})
    assert ifl.main(["config", "list"]) == 0
    assert "admin_password = …" in capsys.readouterr().out


@posix
@pytest.mark.parametrize("argv, display, opened",
                         [([], ":1", True), (["--no-browser"], ":1", False), ([], "", False)])
def test_the_first_start_opens_the_page_and_shows_the_code(config, tmp_path, argv, display, opened):
    """The code is on the console and in a file of ours: in no process list, no log file."""
    seen, log, opener = tmp_path / "opened", tmp_path / "log", tmp_path / "xdg-open"
    opener.write_text(
        f'#!/bin/sh\nps ax > {tmp_path}/ps 2>/dev/null; echo "$@" > {seen}.new\n'
        f'cat "${{1#file://}}" >> {seen}.new; ls -l "${{1#file://}}" >> {seen}.new\n'
        f'mv {seen}.new {seen}\n')
    opener.chmod(0o755)
    environ = {name: value for name, value in os.environ.items()
               if name not in ("WAYLAND_DISPLAY", "BROWSER", "WSL_DISTRO_NAME")}
    environ.update(PATH=f"{tmp_path}:{os.environ['PATH']}", DISPLAY=display, TERM="dumb",
                   PYTHONIOENCODING="utf-8", IFLOW2API_LOG_FILE=str(log),
                   IFLOW2API_DETECT_LOCAL="false")
    reader, writer = __import__("pty").openpty()
    __import__("fcntl").ioctl(writer, __import__("termios").TIOCSWINSZ,
                              struct.pack("HHHH", 24, 80, 0, 0))
    program = PROGRAM if opened else byte_code()          # once as users start it
    process = subprocess.Popen([sys.executable, program, "--port", "0", *argv], stdout=writer,
                               stderr=writer, env=environ)
    os.close(writer)

    def said(pattern):
        """What is printed from here on, as far as it takes to find the pattern."""
        text = ""
        while not re.search(pattern, text, re.S):
            assert select.select([reader], [], [], 20)[0], text
            text += os.read(reader, 65536).decode()
        return text

    code_form = r"[A-Z0-9]{4}-[A-Z0-9]{4}"
    try:
        card = said(r"\n\r?\n.*next.*\r?\n\r?\n")
        code, page = (re.search(form, card).group() for form in (code_form, r"http://\S+/admin"))
        if opened:
            until(seen.exists)
            address, leads, mode = seen.read_text().splitlines()
            assert f'url={page}#code={code}"' in leads and mode.startswith("-rw------- ")
            assert code not in address and address.startswith("file://")
            assert not (tmp_path / "ps").exists() or code not in (tmp_path / "ps").read_text()
        body = json.dumps({"code": code, "password": PASSWORD}).encode()
        with urllib.request.urlopen(page + "/api/password", body) as answer:
            assert answer.status == 204
        assert opened or not seen.exists()
        assert code not in log.read_text()
        config.change(lambda raw: raw.pop("admin_password"))
        process.send_signal(signal.SIGHUP)
        # a new one, since there is no password any more
        assert code not in said(code_form)
    finally:
        process.terminate()
        process.wait(20)
        os.close(reader)
    assert not opened or not os.path.exists(address[7:])


@pytest.mark.parametrize("environ, system, browser, kept", [
    ({"DISPLAY": ":0"}, "linux", "firefox.desktop", "file"),
    ({"DISPLAY": ":0"}, "linux", "firefox_firefox.desktop", "bare"),
    ({"DISPLAY": ":0"}, "linux", "org.mozilla.firefox.desktop", "bare"),
    ({"DISPLAY": ":0"}, "linux", "", "file"), ({}, "darwin", "", "file"),
    ({"DISPLAY": ":0", "WSL_INTEROP": "1"}, "linux", "", "bare"),
    ({"TERMUX_VERSION": "1"}, "linux", "", "bare"), ({}, "linux", "", "bare"),
    ({}, "win32", "", "code")])
def test_where_the_code_for_the_browser_stands(monkeypatch, tmp_path, environ, system, browser,
                                               kept):
    def asked(command):
        if not browser:
            raise ifl.CommandFailed("no such program")
        return browser + "\n"

    monkeypatch.setattr(ifl, "run_tool", asked)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ifl.address_with_code("http://h/admin", "AB-CD", environ, system) as address:
        found = list(tmp_path.iterdir())
        assert [address] == {"file": [path.as_uri() for path in found], "bare": ["http://h/admin"],
                             "code": ["http://h/admin#code=AB-CD"]}[kept]
        assert all("http://h/admin#code=AB-CD" in path.read_text() for path in found)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    if kept == "file":
        with ifl.address_with_code("http://h/admin", "AB-CD", environ, system) as address:
            assert address == "http://h/admin"


@pytest.mark.parametrize("host, wanted", [("0.0.0.0", True), ("127.0.0.1", False)])
def test_the_card_names_the_address_for_other_machines(config, monkeypatch, host, wanted):
    gateway = ifl.Gateway(config=config, environ={}, flags={"detect_local": False, "host": host})
    with ifl.serve(gateway, port=0) as server:
        monkeypatch.setattr(socket.socket, "getsockname", lambda _: ("10.1.2.3", 0))
        card = "\n".join(ifl._card(gateway, server, True))
        assert (f"http://10.1.2.3:{server.port}" in card) is wanted


def test_a_start_with_a_password_opens_nothing_and_shows_no_code(serving, config):
    put_config(config, {"admin_password": PASSWORD_HASH})
    running = serving()
    card = running.card()
    assert f"{running.url}/admin" in card and not re.search(r"[A-Z0-9]{4}-[A-Z0-9]{4}", card)


# === 19. The page in a browser ===============================================

DRIVER = shutil.which("chromedriver") or ""


class Tab:
    """A tab of the browser, used by the visible labels."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def run(self, script, *args):
        return self.driver.execute_script(script, *args)

    def until(self, found, what):
        """Waits for a true value of `found()`; elements redrawn meanwhile are no failure."""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait
        return WebDriverWait(self.driver, WAIT_S, 0.05, [WebDriverException]).until(
            lambda _: found(), what)

    def find(self, selector, text=""):
        """The first visible, enabled element of `selector` that contains `text`."""
        script = """const [selector, text] = arguments;
            return [...document.querySelectorAll(selector)].find(node => node.checkVisibility() &&
              !node.disabled && !node.closest('[inert]') && node.textContent.includes(text))"""
        return self.until(lambda: self.run(script, selector, text),
                          f"{selector} {text}: not to be seen")

    def press(self, selector, text=""):
        def click():
            node = self.find(selector, text)
            self.run("arguments[0].scrollIntoView({block: 'center'})", node)
            node.click()
            return True
        self.until(click, f"{selector} {text}: can't be pressed")

    def fill(self, label, value):
        """Types into the control of the uppermost dialog, or of the page, that has this label."""
        script = """const roots = [document, ...document.querySelectorAll('dialog[open]')];
            const label = [...roots.pop().querySelectorAll('label')]
              .find(node => node.textContent.includes(arguments[0]));
            return label && document.getElementById(label.htmlFor)"""
        node = self.until(lambda: self.run(script, label), f"{label}: no such field")
        node.clear()
        node.send_keys(value)

    def show(self, view):
        self.run("location.hash = arguments[0]", view)

    def gone(self, selector):
        self.until(lambda: not self.run("return document.querySelector(arguments[0])", selector),
                   f"{selector}: still there")

    def complaints(self):
        """Errors in the browser's console since the last call, also violations of the policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")
                if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """One browser for all tests, without access to other machines."""
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        webdriver = None
    if not (webdriver and CHROMIUM and DRIVER):
        assert not BROWSER_REQUIRED, "selenium, chromium or chromedriver is missing"
        pytest.skip("needs selenium, chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*CHROMIUM_FLAGS, "disable-dev-shm-usage",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument("--" + flag)
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def tab(chromium):
    """tab(width, dark): an empty tab of that size."""
    def make(width=1400, dark=False):
        command = chromium.execute_cdp_cmd
        command("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600})
        command("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
        command("Browser.grantPermissions", {
            "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
        return Tab(chromium)
    yield make
    chromium.execute_cdp_cmd("Network.clearBrowserCookies", {})
    chromium.get("about:blank")
    chromium.get_log("browser")


@pytest.fixture
def fresh_server(config, monkeypatch):
    """A server without a password, whose config.json can be written."""
    monkeypatch.setattr(ifl.Vault, "ITERATIONS", (10, 10))
    gateway = ifl.Gateway(config=config, environ={}, flags={"detect_local": False})
    with ifl.serve(gateway, port=0) as made:
        yield made


def wording(key, language="en", **facts):
    """A text of the page."""
    text = ifl.texts_of(ifl.PAGE_TEXTS)[key][("zh", "en").index(language)]
    return re.sub(r"\{(\w+)\}", lambda found: str(facts[found.group(1)]), text)


def open_page(page, url, language="en"):
    page.driver.get(url)
    if page.find("html").get_attribute("lang")[:2] != language:
        page.press("#lang")
        page.until(lambda: page.find("html").get_attribute("lang")[:2] == language,
                   "the language stays")


def first_start(page, server, language="en"):
    """The first start: the code, a password, the guide."""
    open_page(page, server.url + "/admin", language)
    for key, value in (("setup_code", server.gateway.sessions.code()), ("password_new", PASSWORD)):
        page.fill(wording(key, language), value)
    page.press("dialog .primary")
    page.find("h1", wording("view_guide", language))


@pytest.mark.parametrize("language, dark, width", [("zh", True, 360), ("en", False, 1400)])
def test_the_browser_opens_signed_in_for_the_first_password(fresh_server, tab, language, dark,
                                                            width):
    page, code = tab(width, dark), fresh_server.gateway.sessions.code()
    open_page(page, fresh_server.url + "/admin")
    page.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    page.run("localStorage.setItem('iflow2api.lang', arguments[0])", language)
    page.driver.get("about:blank")
    page.driver.get(f"{fresh_server.url}/admin#code={code}")
    page.find("dialog input[type=password]")
    assert "#" not in page.driver.current_url
    page.press("dialog label", wording("password_show", language))
    page.find("dialog input[type=text][autocomplete=new-password]").send_keys(PASSWORD + "\ue007")
    page.find("h1", wording("view_guide", language))
    page.complaints()
    page.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    page.driver.get("about:blank")                       # the code is void
    page.driver.get(f"{fresh_server.url}/admin#code={code}")
    page.find("dialog h2", wording("sign_in", language))


def connect_demo(page, demo, language):
    """A provider with a key, tested by the button before it is kept."""
    page.press("main .btn", wording("provider_add", language))
    for key, value in (("provider_name", "mine"), ("base_url", demo.base_url),
                       ("api_keys", "sk-demo-1234567890")):
        page.fill(wording(key, language), value)
    page.press("dialog footer .btn", wording("test", language))
    page.find("dialog .badge.ok", wording("check_tools", language))
    page.press("dialog button.chip", "demo-text")
    page.press("dialog button.chip", "demo-vision")
    page.press("dialog .primary")
    page.gone("dialog")


def test_from_the_first_start_to_the_first_answer_in_seven_actions(fresh_server, demo, tab,
                                                                   monkeypatch):
    monkeypatch.setitem(ifl.PRESETS, "one", ifl.Preset("One", "ONE_KEY", demo.base_url,
                                                       listed="demo 131072 16384 -"))
    page, actions = tab(), []

    def act(done, *args):
        actions.append(done(*args))

    open_page(page, fresh_server.url + "/admin")
    page.driver.get("about:blank")
    code = fresh_server.gateway.sessions.code()
    act(page.driver.get, f"{fresh_server.url}/admin#code={code}")      # as the start does
    page.find("dialog h2", wording("setup_title"))
    act(page.fill, wording("password_new"), PASSWORD + "\ue007")
    act(page.press, "main .btn.primary", wording("provider_add"))
    act(page.find("dialog select").send_keys, "One")
    act(page.fill, wording("api_keys"), "sk-demo-1234567890")
    act(page.press, "dialog .primary")
    box = page.find(".play-composer textarea")
    page.until(lambda: page.driver.switch_to.active_element == box, "the box has no focus")
    act(box.send_keys, "Hello there\ue007")
    page.find(".play-log", "You said: “Hello there”")
    assert fresh_server.gateway.state.router.default_model == "demo" and len(actions) == 7


@pytest.mark.parametrize("language, dark, width", [
    ("zh", False, 360), ("en", True, 360), ("zh", True, 1400), ("en", False, 1400)])
def test_the_page_alone_leads_to_a_working_client(fresh_server, demo, tab, language, dark, width):
    page = tab(width, dark)
    first_start(page, fresh_server, language)
    theme = page.run("return document.documentElement.dataset.theme")
    assert theme == ("dark" if dark else "light")
    connect_demo(page, demo, language)
    page.find(".step.done .chip", "mine")
    page.find(".step select").send_keys("demo-vision")
    page.press(".step .primary", wording("guide_2_keep", language))
    page.until(lambda: fresh_server.gateway.settings.default_model == "demo-vision",
               "the model is not kept")
    page.press(".step:last-child .btn", wording("copy", language))
    page.find(".step:last-child .btn", wording("copied", language))
    copied = page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert fresh_server.url in copied and "ANTHROPIC_BASE_URL" in copied and "sk-demo" not in copied
    page.press("a.btn", wording("guide_try", language))
    page.find(".play-composer textarea").send_keys("Hello there\ue007")
    page.find(".play-log", "You said: “Hello there”")
    chat_demo(fresh_server.url, "hi", model="demo-vision")
    names = [name[5:] for name in ifl.texts_of(ifl.PAGE_TEXTS) if name.startswith("view_")]
    assert len(names) == 12
    for name in names:
        page.show(name)
        page.find("h1", wording("view_" + name, language))
        drawn = ("return document.querySelector('main :is(.card, .log-pane)') && "
                 "document.querySelector('main .stack').textContent.length > 20")
        page.until(lambda: page.run(drawn), f"{name} stays empty")
        assert page.run("return document.documentElement.scrollWidth <= innerWidth"), name
        assert not page.run("return document.querySelector('main [role=alert].card')"), name
    page.show("overview")
    page.find("main td", "demo-vision")
    assert page.complaints() == []


def test_a_preset_is_chosen_by_its_title_and_fills_in_the_form(fresh_server, tab):
    page, gateway = tab(), fresh_server.gateway
    first_start(page, fresh_server)
    page.press("main .btn", wording("provider_add"))
    page.find("dialog select")
    options = page.run("return [...document.querySelector('dialog select').options].map("
                       "item => item.text)")
    assert options[1] == "Zhipu coding plan · subscription" and "Zhipu · metered" in options
    page.find("dialog select").send_keys("Z.ai coding plan")
    page.find("dialog .hint", "Chat, Messages")
    page.find("dialog .hint", "Get a key")
    assert page.find("dialog a[target]").get_attribute("href").startswith("https://z.ai/")
    page.fill(wording("api_keys"), "sk-0123456789abcdef")
    page.press("dialog .primary")
    page.gone("dialog")
    page.show("providers")
    page.find("main section.card .hint", "https://api.z.ai/api/anthropic")
    entry, = gateway.config.read()["providers"]
    assert entry["name"] == entry["preset"] == "zai-coding" and not {
        "base_url", "messages_url", "models", "profile"} & set(entry)
    page.press("main section.card .btn", wording("edit"))
    page.press("dialog summary")
    page.fill(wording("concurrency"), "3")
    page.press("dialog .primary")
    page.gone("dialog")
    page.until(lambda: gateway.config.read()["providers"][0].get("concurrency") == 3, "not saved")
    assert set(gateway.config.read()["providers"][0]) - set(entry) <= {"concurrency"}
    assert page.complaints() == []


def test_what_was_typed_outlives_the_session(fresh_server, tab):
    page = tab()
    first_start(page, fresh_server)
    page.show("models")
    page.fill(wording("aliases"), 'claude-* -> mine/glm-5, a/b\ngpt-* -> [{"model": "a/b"}]')
    # the stream of events ends with it, and the page asks
    fresh_server.gateway.sessions.close_all()
    page.fill(wording("password"), PASSWORD)
    page.press("dialog .primary")
    page.gone("dialog")
    page.press("main .primary", wording("save"))
    page.until(lambda: fresh_server.gateway.settings.aliases == {
        "claude-*": ["mine/glm-5", "a/b"], "gpt-*": [{"model": "a/b"}]}, "nothing was saved")


def test_providers_are_ordered_edited_and_removed(fresh_server, demo, tab):
    page, gateway = tab(), fresh_server.gateway
    gateway.change_config(lambda raw: raw.update(providers=[
        {"name": name, "base_url": demo.base_url, "api_keys": [f"sk-{name}-1234567890"]}
        for name in ("one", "two")]))
    first_start(page, fresh_server)
    page.show("providers")
    page.find("section.card h2", "two")
    assert "sk-one-1234567890" not in page.run("return document.body.textContent")

    def becomes(*names):
        page.until(lambda: [entry["name"] for entry in gateway.settings.providers] == [*names],
                   f"the providers do not become {names}")
    page.find("[data-move='two-1']").send_keys("\ue007")                    # by the keyboard alone
    becomes("two", "one")
    page.until(lambda: page.run("return document.activeElement.dataset.move") == "two1",
               "the focus is lost")
    page.press("main .btn", wording("edit"))
    page.fill(wording("provider_name"), "three")
    page.fill(wording("api_keys_more"), "sk-more-1234567890")
    page.press("dialog .primary")
    becomes("three", "one")
    assert gateway.settings.providers[0]["api_keys"] == ["sk-two-1234567890", "sk-more-1234567890"]
    page.gone("dialog")
    page.press("main .btn[aria-label*=three]")
    page.press("dialog .danger")
    becomes("one")


@pytest.mark.parametrize("paste", [False, True])
def test_logging_in_to_iflow_by_the_page(home_login, server_login, tab, paste):
    page = tab(360)
    open_page(page, server_login.url + "/admin#providers")
    page.fill(wording("password"), PASSWORD)
    page.press("dialog .primary")
    page.run("window.open = () => null")                 # a browser that lets no window open
    page.press("main .btn", wording("login_iflow"))
    back = callback_of(page.find("dialog a.btn").get_attribute("href"))
    if paste:
        page.press("dialog summary")
        page.find("dialog textarea").send_keys("what is this")
        page.press("dialog .btn", wording("login_paste_go"))
        page.find("dialog .error", "neither the address")
        page.find("dialog textarea").clear()
        page.find("dialog textarea").send_keys(back)
        page.press("dialog .btn", wording("login_paste_go"))
    else:
        assert visit(back)[0] == 200
    page.gone("dialog")
    page.find("main td .badge.ok", wording("logged_in"))
    key = login_of(home_login)["apiKey"]
    assert key.startswith("sk-key-")
    assert key not in page.run("return document.documentElement.outerHTML")


def test_keys_and_the_password(fresh_server, tab):
    page, gateway = tab(360, True), fresh_server.gateway
    first_start(page, fresh_server)
    page.show("keys")
    page.press("main .btn", wording("key_add"))
    page.fill(wording("key_name"), "laptop")
    page.fill(wording("limit_rpm"), "60")
    page.press("dialog .primary")
    key = page.find("#new-key").text
    page.find("dialog pre", f"ANTHROPIC_AUTH_TOKEN={key}")
    page.find("dialog pre", "iflow2api.py env claude --write")
    page.press("dialog .primary", wording("key_kept"))
    page.find("main td", "laptop")
    assert gateway.state.auth.find([key]).limits == {"rpm": 60}
    page.press("main td .btn", wording("edit"))
    page.fill(wording("limit_rpm"), "70")
    page.press("dialog .primary")
    page.until(lambda: gateway.state.auth.find([key]).limits == {"rpm": 70}, "the limit stays")
    page.gone("dialog")
    assert key not in page.run("return document.documentElement.outerHTML")
    page.press("main td .btn", wording("remove"))
    page.press("dialog .danger")
    page.until(lambda: not gateway.settings.client_keys, "the key is not removed")
    page.press("#account")
    page.press("dialog .btn", wording("password_change"))
    for name, value in (("current", PASSWORD), ("new", "another horse")):
        page.fill(wording("password_" + name), value)
    page.press("dialog .primary")
    page.gone("dialog")
    assert gateway.sessions.try_password("here", "another horse")
    page.press("#account")
    page.press("dialog .btn", wording("sign_out"))
    page.find("dialog.gate h2", wording("sign_in"))


def test_settings_are_checked_and_what_somebody_else_changed_is_not_written_over(fresh_server, tab):
    page, gateway = tab(), fresh_server.gateway
    first_start(page, fresh_server)
    page.show("settings")

    def type_limit(text):
        page.find("input[type=search]").clear()
        page.find("input[type=search]").send_keys("queue_limit")
        node = page.find("main input[type=number]")
        node.clear()
        node.send_keys(text)
        page.press(".savebar .primary")
    type_limit("-1")
    page.find(".setting .error", "queue_limit: a whole number from 0")
    page.press(".savebar .btn", wording("discard"))
    gateway.change_config(lambda raw: raw.update(queue_timeout_s=9))
    page.until(lambda: page.run("return document.querySelector('.savebar').hidden"), "it stays")
    gateway.change_config(lambda raw: raw.update(queue_limit=9))
    type_limit("7")
    page.find("#elsewhere", wording("conflict"))
    assert page.find("main input[type=number]").get_attribute("value") == "7"
    assert gateway.settings.queue_limit == 9             # nothing was written over
    page.press("#elsewhere .btn", wording("reload"))
    page.gone("#elsewhere")
    type_limit("7")
    page.until(lambda: gateway.settings.queue_limit == 7, "it is not saved")


MARKUP = "<img src=x onerror=alert(1)>\u202eevil\u202c \x1b[31m' \" </script>"


def test_foreign_text_is_shown_as_text_and_a_hundred_thousand_lines_stay_smooth(fresh_server, tab):
    """The page keeps a limited number of lines and stays responsive while it draws them."""
    page, gateway = tab(), fresh_server.gateway
    first_start(page, fresh_server)
    page.show("logs")
    page.find(".log-pane")
    gateway.log.warning("upstream said %s", MARKUP)
    page.find(".log-line", "<img src=x")
    shown = page.run("return document.querySelector('.log-pane').textContent")
    assert "\u202e" not in shown and "\x1b" not in shown and "⟨202E⟩evil⟨202C⟩" in shown
    assert not page.run("return document.querySelector('main img')")
    for number in range(100_000):
        gateway.live.logs.add((time.time(), logging.INFO, "iflow2api", f"line {number} of many"))

    def arrived():
        gateway.live.notify()
        return page.run(
            "return document.querySelector('.log-pane').textContent.includes('line 99999')")
    page.until(arrived, "the last line is not to be seen")
    assert page.run("return document.querySelectorAll('.log-line').length") <= 2000

    def slowest_frame_ms():
        return page.driver.execute_async_script(
            """const done = arguments[0], pane = document.querySelector('.log-pane');
            let last = performance.now(), worst = 0, n = 0;
            const step = now => {
              worst = Math.max(worst, now - last);
              last = now;
              pane.scrollTop = n * 997;
              if (++n < 60) requestAnimationFrame(step); else done(worst); };
            requestAnimationFrame(step);""")
    # a machine under load gets further tries
    page.until(lambda: slowest_frame_ms() < 500, "it does not scroll smoothly")
    assert page.complaints() == []


# --- the page as text --------------------------------------------------------

def test_the_page_has_each_text_in_both_languages_and_uses_it():
    script, texts = ifl.page_script(), ifl.texts_of(ifl.PAGE_TEXTS)
    words = set(re.findall(r"\w+", script))
    beginnings = set(re.findall(r"'(\w+_)'", script)) - {"IFLOW2API_"} | {"group_", "guide_"}
    certain = set(re.findall(r"\bt\('(\w*[a-z0-9])'[,)]", script))
    assert [key for key, pair in texts.items() if len(pair) != 2 or not all(pair)] == []
    assert [key for key, (_, en) in texts.items() if re.search("[\u4e00-\u9fff]", en)] == []
    assert sorted(certain - set(texts)) == []
    assert [start for start in beginnings if not any(key.startswith(start) for key in texts)] == []
    assert [key for key in texts if not key.startswith((*beginnings, "lang")) and
            key not in words and key.replace("_hint", "") not in words] == []
    for key, pair in texts.items():
        zh, en = (set(re.findall(r"\{(\w+)", text)) for text in pair)
        assert zh <= en, key


def test_the_page_is_text_only_comes_from_here_alone_and_travels_light():
    script = ifl.page_script()
    for banned in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                   "new Function", "srcdoc", ".onclick", "</script"):
        assert banned not in script
    assert not re.search(r"\son\w+=|\sstyle=|javascript:", ifl.PAGE_HTML)
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//|@import|url\(|</style>\w",
                         ifl.PAGE_HTML + ifl.PAGE_CSS)
    assert set(re.findall(r"https?://[\w.]+", script + ifl.PAGE_CSS)) <= {
        "https://api.example.com", "http://localhost"}   # what empty fields show
    assert len(ifl.pack_static(ifl.admin_page()[0])[1]) <= 45 << 10
    # Python keeps one byte a character then
    assert all(value.isascii() for name, value in vars(ifl).items()
               if name.startswith(("_JS_", "PAGE_CSS")))


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_script_of_the_page_is_well_formed(tmp_path):
    path = tmp_path / "page.js"
    path.write_text(ifl.page_script(), encoding="utf-8")
    done = subprocess.run(["node", "--check", str(path)], capture_output=True, text=True)
    assert done.stderr == ""


# === 20. Demo upstream, presets, local engines ===============================

WEATHER_DEMO = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a city",
    "parameters": {"type": "object", "required": ["city", "unit"], "properties": {
        "city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "kelvin"]}}}}}


class SeenDemo(ifl.DemoUpstream):
    """A demo upstream without pauses; `requests` are (path, body) of what reached it."""

    def __init__(self) -> None:
        self.requests: List[Any] = []
        super().__init__(pace_s=0, first_s=0)

    def answer(self, path, body):
        self.requests.append((path, body))
        return super().answer(path, body)


@pytest.fixture
def demo():
    server = SeenDemo()
    yield server
    server.close()


@pytest.fixture
def url(demo):
    """A gateway in front of the demo upstream."""
    with gateway_with(**demo.settings()) as (_, url):
        yield url


@contextlib.contextmanager
def gateway_with(**settings):
    gateway = ifl.Gateway(ifl.Settings(**settings))
    with ifl.serve(gateway, port=0) as server:
        yield gateway, server.url


def call_demo(url, path, body=None, **headers):
    """Status and JSON (or the records of a stream, without [DONE]) of one raw request."""
    address = url.split("//")[1].split("/")[0]
    data = None if body is None else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    with contextlib.closing(http.client.HTTPConnection(address, timeout=30)) as connection:
        connection.request("GET" if body is None else "POST", path, data, headers)
        response = connection.getresponse()
        text = response.read().decode()
    if "event-stream" not in response.getheader("Content-Type", ""):
        return response.status, json.loads(text)
    lines = [line[5:] for line in text.splitlines() if line[:5] == "data:" and DONE not in line]
    return response.status, list(map(json.loads, lines))


def user_demo(text):
    return {"role": "user", "content": text}


def chat_demo(url, messages, **more):
    messages = [user_demo(messages)] if isinstance(messages, str) else messages
    body = {"model": "demo", "messages": messages, **more}
    status, answer = call_demo(url, "/v1/chat/completions", body)
    assert status == 200, answer
    return answer


def message_of(answer):
    return answer["choices"][0]["message"]


def joined(chunks, name):
    return "".join(c["choices"][0]["delta"].get(name) or "" for c in chunks if c["choices"])


# --- the demo model ----------------------------------------------------------

def test_demo_answers_plain_and_streamed_alike(url, demo):
    whole = chat_demo(url, "What is this?")
    chunks = chat_demo(url, "What is this?", stream=True, stream_options={"include_usage": True})
    said, usage = message_of(whole), whole["usage"]
    assert "What is this?" in said["content"] and said["reasoning_content"] and len(chunks) > 20
    for field in ("content", "reasoning_content"):
        assert joined(chunks, field) == said[field]
    assert chunks[-1]["usage"] == usage and chunks[-1]["choices"] == []
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 20
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    assert not any("usage" in each for each in chat_demo(demo.base_url, "hi", stream=True))
    assert "演示模型" in message_of(chat_demo(url, "你好"))["content"]


@pytest.mark.parametrize("switch", [
    {"thinking": {"type": "disabled"}}, {"enable_thinking": False}, {"reasoning_effort": "none"},
    {"chat_template_kwargs": {"enable_thinking": False}}])
def test_demo_thinks_unless_told_not_to(url, switch):
    message = message_of(chat_demo(url, "hi", **switch))
    assert message["content"] and "reasoning_content" not in message


def test_demo_keeps_to_its_limit_and_answers_json(url):
    cut = chat_demo(url, "hi", max_tokens=6)
    assert cut["choices"][0]["finish_reason"] == "length" and message_of(cut)["content"]
    assert cut["usage"]["completion_tokens"] == 6
    answer = chat_demo(url, "hi", response_format={"type": "json_object"})
    assert json.loads(message_of(answer)["content"]) == {"answer": "demo"}


def test_demo_calls_a_tool_once_and_uses_its_result(url):
    first = chat_demo(url, "Weather?", tools=[WEATHER_DEMO])
    chunks = chat_demo(url, "Weather?", tools=[WEATHER_DEMO], stream=True)
    made, = message_of(first)["tool_calls"]
    deltas = [call for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", ())]
    for choice in (first["choices"][0], chunks[-1]["choices"][0]):
        assert choice["finish_reason"] == "tool_calls"
    assert made["function"]["name"] == deltas[0]["function"]["name"] == "get_weather"
    streamed = "".join(delta["function"]["arguments"] for delta in deltas)
    for arguments in (streamed, made["function"]["arguments"]):
        assert json.loads(arguments) == {"city": "Paris", "unit": "celsius"}
    result = {"role": "tool", "tool_call_id": made["id"], "content": "18 degrees"}
    history = [user_demo("Weather?"), message_of(first), result]
    second = message_of(chat_demo(url, history, tools=[WEATHER_DEMO]))
    assert second["content"] == "The tool answered: 18 degrees"
    third = chat_demo(url, [*history, second, user_demo("And now?")], tools=[WEATHER_DEMO])
    assert "tool_calls" not in message_of(third) and "And now?" in message_of(third)["content"]


@pytest.mark.parametrize("offered, asked, choice, expected", [
    (["write_file", "read_file"], "go", None, "read_file"),
    (["write_file", "read_file"], "use write_file", None, "write_file"),
    (["delete"], "go", None, "delete"), (["read_file"], "go", "none", None),
    (["write_file", "read_file"], "go", {"type": "function", "function": {"name": "write_file"}},
     "write_file"), (["read_file"], "go", "required", "read_file")])
def test_demo_prefers_tools_that_only_read(offered, asked, choice, expected):
    endless = {"type": "object", "required": ["n", "self"],
               "properties": {"n": {"type": ["integer", "null"]}, "self": {"$ref": "#"}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": endless}}
             for name in offered]
    message, _ = ifl.demo_message({"messages": [user_demo(asked)], "tools": tools,
                                   "tool_choice": choice})
    assert [call["function"]["name"] for call in message.get("tool_calls", ())] == (
        [expected] if expected else [])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_demo_says_that_it_got_an_image_where_it_can_see(demo, url, path):
    data = base64.b64encode(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 640, 480) +
                            b"\x08\x02\x00\x00\x00").decode()
    link = "data:image/png;base64," + data
    source = {"type": "base64", "media_type": "image/png", "data": data}
    part = {"chat/completions": {"type": "image_url", "image_url": {"url": link}},
            "messages": {"type": "image", "source": source},
            "responses": {"type": "input_image", "image_url": link}}[path[4:]]
    body = {"max_tokens": 200, "input" if "resp" in path else "messages": [user_demo([part])]}
    status, answer = call_demo(url, path, {"model": "demo", **body})
    assert status == 200 and "Images that I got: 1." in json.dumps(answer)
    if "chat" not in path:               # it is told that there was one
        assert call_demo(url, path, {"model": "demo-text", **body})[0] == 200
        assert data not in json.dumps(demo.requests[-1])


def test_demo_lists_its_models_and_serves_foreign_names(demo, url):
    listed = call_demo(url, "/v1/models")[1]["data"]
    assert [m["id"] for m in listed] == [m["id"] for m in ifl.DEMO_MODELS]
    body = {"model": "claude-sonnet-4-5", "max_tokens": 500, "messages": [user_demo("Hello")]}
    answer = call_demo(url, "/v1/messages", body)[1]
    assert [b["type"] for b in answer["content"]] == ["thinking", "text"]
    answer = call_demo(url, "/v1/responses", {"model": "gpt-5", "input": "Hello"})[1]
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    assert [body["model"] for _, body in demo.requests if body] == ["demo", "demo"]


@pytest.mark.parametrize("path, body, status, words", [
    ("chat/completions", {"messages": [user_demo("x")], "tools": [7]}, 400, "can't read"),
    ("chat/completions", {"messages": 5}, 400, "can't read"),
    ("chat/completions", {"messages": [user_demo([7])]}, 400, "can't read"),
    ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{}]}, user_demo("x")],
                          "tools": "x"}, 400, "can't read"), ("chat/completions", {}, 400, ""),
    ("completions", {"prompt": "x"}, 404, "nothing is at /v1/completions"),
    ("elsewhere", None, 404, "nothing is at"), ("elsewhere", {}, 404, "nothing is at")])
def test_demo_refuses_nonsense_with_a_sentence(demo, path, body, status, words):
    found, answer = call_demo(demo.base_url, "/v1/" + path, body)
    assert found == status and words in answer["error"]["message"]


def test_demo_keeps_a_pace(demo):
    demo.pace_s = 0.01
    started = time.monotonic()
    chunks = chat_demo(demo.base_url, "hi", stream=True)
    assert joined(chunks, "content") and time.monotonic() - started >= 0.01 * (len(chunks) - 1)


@contextlib.contextmanager
def running(tmp_path, *flags):
    """`serve` as a process on a free port; its URL."""
    command = [sys.executable, byte_code(), "serve", "--port", "0", "--config-dir", str(tmp_path)]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    try:
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_serve_demo_needs_nothing_and_no_upstream(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({
        "default_model": "glm-5", "aliases": {"*": "nowhere/x"},
        "providers": [{"name": "nowhere", "base_url": "http://127.0.0.1:1/v1"}]}))
    with running(tmp_path, "--demo") as (process, url):
        assert call_demo(url, "/v1/models")[1]["data"][0]["id"] == "demo"
        body = {"model": "claude-opus-4-1", "max_tokens": 9, "stream": True, "messages": MESSAGES}
        events = call_demo(url, "/v1/messages", body)[1]
        assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
        if os.name == "posix":
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
    assert ifl.main(["--demo", "--host", "0.0.0.0"]) == 2
    assert "leave out the host 0.0.0.0" in capsys.readouterr().err
    assert ifl.main(["--demo", "--upstream", "http://127.0.0.1:1"]) == 2
    assert "--demo brings its own upstream" in capsys.readouterr().err


def test_a_demo_asks_for_no_password_and_touches_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("IFLOW2API_LOG_FILE", str(tmp_path / "log"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with running(tmp_path, "--demo") as (_, url):
        assert call_demo(url, "/v1/models")[0] == 200
        body = {"model": "demo", "messages": MESSAGES}
        assert call_demo(url, "/v1/chat/completions", body)[0] == 200
        assert call_demo(url, "/admin/api/session")[1]["state"] == "signed_in"
        assert call_demo(url, "/admin/api/config")[1]["path"] == ""
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            assert call_demo(url, "/admin/api/config", **headers)[0] == 403
    assert not list(tmp_path.iterdir())


# --- official SDKs -----------------------------------------------------------

def test_openai_sdk_runs_a_tool_loop_on_the_demo(url):
    client = sdk_named("openai").OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    messages, said = [user_demo("Weather in Paris?")], ""
    while not said:
        answer = client.chat.completions.create(model="demo", messages=messages,
                                                tools=[WEATHER_DEMO]).choices[0].message
        messages.append(answer.model_dump(exclude_none=True))
        messages += [{"role": "tool", "tool_call_id": made.id, "content":
                      json.loads(made.function.arguments)["city"] + ": 18"}
                     for made in answer.tool_calls or ()]
        said = answer.content
        assert len(messages) < 6
    assert said == "The tool answered: Paris: 18"
    stream = client.chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True)
    assert "demo model" in "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "demo" in [model.id for model in client.models.list()]
    assert "hi" in client.responses.create(model="gpt-5", input="hi").output_text


def test_anthropic_sdk_runs_a_tool_loop_on_the_demo(url):
    client = sdk_named("anthropic").Anthropic(base_url=url, api_key="none", max_retries=0)
    tools = [{"name": "get_weather", "input_schema": WEATHER_DEMO["function"]["parameters"]}]
    messages = [user_demo("Weather?")]
    facts = {"model": "claude-sonnet-4-5", "max_tokens": 500, "tools": tools}
    with client.messages.stream(messages=messages, **facts) as stream:
        answer = stream.get_final_message()
    assert answer.stop_reason == "tool_use"
    made = next(block for block in answer.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": made.id, "content": "18"}
    messages += [{"role": "assistant",
                  "content": [block.model_dump(exclude_none=True) for block in answer.content]},
                 user_demo([result, {"type": "text", "text": "(a reminder)"}])]
    answer = client.messages.create(messages=messages, **facts)
    assert answer.stop_reason == "end_turn" and "The tool answered: 18" in answer.content[-1].text


# --- presets -----------------------------------------------------------------

def test_output_limit_of_a_model_cuts_max_tokens(demo, url):
    call_demo(url, "/v1/messages",
              {"model": "demo-text", "max_tokens": 99999, "messages": [user_demo("hi")]})
    assert demo.requests[-1][1]["max_tokens"] == 4096


# --- provider commands -------------------------------------------------------

def run_demo(capsys, *argv):
    """Exit status, stdout and stderr of a command."""
    status = ifl.main(list(argv))
    return (status, *capsys.readouterr())


def config_demo():
    with open(os.path.expanduser("~/.iflow2api/config.json"), encoding="utf-8") as file:
        return json.load(file)


@pytest.mark.parametrize("argv, told, expected", [
    (["deepseek"], "DEEPSEEK_API_KEY is not set",
     {"name": "deepseek", "api_keys": ["$DEEPSEEK_API_KEY"]}),
    (["zhipu", "--api-key", "$ZHIPU_API_KEY"], "provider test zhipu",
     {"name": "zhipu", "preset": "zhipu", "api_keys": ["$ZHIPU_API_KEY"]}),
    (["ollama"], "added ollama", {"preset": "ollama", "api_keys": []}),
    (["mine", "--base-url", "https://api.deepseek.com", "--api-key", "$K"], "K is not set",
     {"preset": "deepseek", "api_keys": ["$K"]}),
    (["mine", "--base-url", "https://h.example/api/v3/chat/completions/", "--models", "a, b,"],
     "is taken as https://h.example/api/v3",
     {"name": "mine", "base_url": "https://h.example/api/v3", "models": ["a", "b"]}),
    (["mine", "--messages-url", "https://h.example/x/v1/messages/"],
     "messages_url https://h.example/x/v1/messages/ is taken as https://h.example/x",
     {"name": "mine", "messages_url": "https://h.example/x"}),
    (["mine", "--base-url", "https://h.example/v1", "--responses-url", "https://h.example"],
     "responses_url https://h.example is taken as https://h.example/v1",
     {"base_url": "https://h.example/v1", "responses_url": "https://h.example/v1"}),
    (["work", "--preset", "moonshot", "--base-url", "https://proxy.example/kimi", "--api-key",
      "$WORK_KEY", "--models", "kimi-k3,new"], "WORK_KEY is not set",
     {"preset": "moonshot", "base_url": "https://proxy.example/kimi",
      "models": ["kimi-k3", "new"]})])
def test_provider_add_takes_everything_from_the_preset_but_the_secret(capsys, monkeypatch, argv,
                                                                      told, expected):
    monkeypatch.setenv("ZHIPU_API_KEY", "sk-very-secret-1234567890")
    status, out, err = run_demo(capsys, "provider", "add", *argv)
    assert status == 0 and told in err
    assert "very-secret" not in json.dumps(config_demo()) + out + err
    entry, = config_demo()["providers"]
    assert {key: entry[key] for key in expected} == expected and "profile" not in entry
    if argv[0] == "zhipu":
        gateway = ifl.Gateway(config=ifl.ConfigFile("~/.iflow2api"))
        provider = gateway.state.router.providers["zhipu"]
        assert provider.api_keys == ("sk-very-secret-1234567890",)
        assert provider.profile["thinking_style"] == "thinking_type"
        assert provider.base_url == "https://open.bigmodel.cn/api/paas/v4"
        assert provider.facts["glm-4.6v"]["vision"] is True


def test_provider_add_encrypts_a_key_and_keeps_what_it_does_not_know(capsys, home, monkeypatch):
    import io
    known = {"name": "a", "base_url": "http://h", "x": 2}
    (home / ".iflow2api").mkdir()
    (home / ".iflow2api" / "config.json").write_text(json.dumps({"future": 1,
                                                                 "providers": [known]}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("$odd-key\n"))
    assert run_demo(capsys, "provider", "add", "mine", "--base-url", "http://h.example",
                    "--api-key", "-")[0] == 0
    assert "warning" in run_demo(capsys, "provider", "add", "vllm", "--api-key", "sk-literal")[2]
    assert config_demo()["future"] == 1 and config_demo()["providers"][0] == known
    assert [entry["api_keys"][0][:7] for entry in config_demo()["providers"][1:]] == ["enc:v1:"] * 2
    gateway = ifl.Gateway(config=ifl.ConfigFile("~/.iflow2api"))
    assert gateway.state.router.providers["mine"].api_keys == ("$odd-key",)


@pytest.mark.parametrize("argv, words", [
    (["zhipuu"], "did you mean zhipu"), ([], "needs a NAME"),
    (["x", "--preset", "kimi"], "no preset 'kimi'"),
    (["x", "--base-url", "h.example/v1"], "write http://h.example/v1 or https://h.example/v1"),
    (["x", "--base-url", "ftp://h"], "is no http:// or https:// address"),
    (["x", "--base-url", "http://h:99999"], "no such port"),
    (["x", "--base-url", "http://h/?a=1"], "do not belong here"),
    (["x", "--base-url", "http://["], "base_url"),
    (["a/b", "--base-url", "http://h"], "without blanks, commas and slashes"),
    (["zhipu", "--api-key", ""], "single quotes: '$ZHIPU_API_KEY'"),
    (["x", "--base-url", ""], "no preset 'x'"),
    (["x", "--base-url", "http://h", "--api-key", "two words"], "a key is empty, or has blanks")])
def test_provider_add_names_a_mistake_in_one_line(capsys, argv, words):
    status, out, err = run_demo(capsys, "provider", "add", *argv)
    last = err.strip().splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and words in last and not out
    assert not os.path.exists(os.path.expanduser("~/.iflow2api/config.json"))


def test_provider_names_are_taken_once_and_removed_by_name(capsys):
    for argv, status, words in [
            (["provider", "add", "ollama"], 0, "added"),
            (["provider", "add", "ollama"], 2, "provider remove ollama"),
            (["provider", "remove", "olama"], 2, "did you mean ollama?\n"),
            (["config", "set", "default_provider", "ollama"], 0, ""),
            (["provider", "remove", "ollama"], 0, ""), (["provider", "remove"], 2, "")]:
        found, _, err = run_demo(capsys, *argv)
        assert found == status and words in err, argv
    assert config_demo() == {"providers": []}
    run_demo(capsys, "config", "set", "providers", '[{"name": 3}, 4]')
    assert "no provider 'x'" in run_demo(capsys, "provider", "remove", "x")[2]


def test_provider_list_presets_and_status_show_what_there_is_and_no_secret(capsys, monkeypatch):
    monkeypatch.setattr(ifl.Gateway, "local_engines", {})
    monkeypatch.setenv("IFLOW2API_PORT", str(unused_port()))
    for name in ("ZAI", "MOONSHOT", "OPENAI"):
        monkeypatch.setenv(name + "_API_KEY", "sk-very-secret-1234567890")
    run_demo(capsys, "provider", "add", "zai")
    found = {line: run_demo(capsys, *line.split())[:2] for line in (
        "provider list", "provider presets", "provider presets zai", "status")}
    assert all("very-secret" not in out for _, out in found.values())
    assert "zai (default)  https://api.z.ai/api/paas/v4" in found["provider list"][1]
    status, out = found["provider presets"]
    assert status == 0 and re.search(
        r"(?m)^zai +Z\.ai +\$ZAI_API_KEY \(set\) +Chat, Messages$", out)
    status, out = found["provider presets zai"]
    assert status == 0 and "https://api.z.ai/api/anthropic" in out
    assert re.search(r"glm-5\.3-flash +context 1000000 +output 131072 +images +low/high/max\n", out)
    assert run_demo(capsys, "provider", "presets", "zaai")[0] == 2
    out = found["status"][1]
    assert ("MOONSHOT_API_KEY is set: python iflow2api.py provider add moonshot-cn "
            "(or moonshot)") in out
    assert "OPENAI_API_KEY is set: python iflow2api.py provider add openai\n" in out
    assert "ZHIPU" not in out and "ZAI_API_KEY is set" not in out


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_presets_fit_a_terminal_of_100_columns(capsys, monkeypatch, language):
    for preset in ifl.PRESETS.values():
        monkeypatch.setenv(preset.key or "K", "x")
    monkeypatch.setenv("IFLOW2API_LANGUAGE", language)
    status, out, _ = run_demo(capsys, "provider", "presets")
    lines = out.splitlines()
    assert status == 0 and len(lines) == len(ifl.PRESETS)
    assert max(map(ifl.columns_of, lines)) <= 100 and bool(CHINESE_CHARACTER.search(out)) is (
        language == "zh")


def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def add_demo(capsys, base_url, *argv):
    run_demo(capsys, "provider", "add", "mine", "--base-url", base_url, "--api-key", "k1",
             *(argv or ("--models", "demo")))


def test_provider_test_says_what_works(capsys, demo):
    add_demo(capsys, demo.base_url)
    status, out, _ = run_demo(capsys, "provider", "test", "mine")
    assert status == 0 and out.startswith("mine: key ok, model demo ok (")
    assert out.endswith("s), stream ok, tools ok\n")
    assert [body.get("stream") for _, body in demo.requests] == [None, True, None]
    assert run_demo(capsys, "provider", "test")[0] == 0
    assert run_demo(capsys, "test", "mine")[1].startswith("mine: key ok, model demo ok (")


def refusal(message, status) -> Reply:
    return plain({"error": {"message": message}}, status)


SAYS_HI = plain(completion("hi"))
CALLS_TOOL = plain(completion(None, "tool_calls", tool_calls=[
    {"id": "c1", "type": "function", "function": {"name": "ping", "arguments": "{}"}}]))


def test_provider_test_says_what_to_write_into_the_profile(capsys, upstreams):
    def reply(seen):
        wrong = [name for name in ("thinking", "max_tokens") if name in seen.json]
        return refusal(f"Unsupported parameter: '{wrong[0]}'", 400) if wrong else usual_reply(seen)
    add_demo(capsys, upstreams(usual=reply).url)
    status, out, _ = run_demo(capsys, "provider", "test", "mine")
    profile = json.loads(out.partition('"profile": ')[2])
    assert status == 0 and profile == {
        "leave_out": ["thinking"], "max_tokens_field": "max_completion_tokens"}
    assert ifl.check_profile(profile) == (profile, [])


@pytest.mark.parametrize("script, status, words", [
    ([refusal("no such model", 404)], 1,
     "mine: does not work, the model: the model demo does not exist there: no such model"),
    ([refusal("Insufficient Balance", 402)], 1,
     "mine: does not work, the balance: Insufficient Balance"),
    ([refusal("bad key", 401)], 1, "mine: does not work, the key: "),
    ([SAYS_HI, refusal("no streams", 400), CALLS_TOOL], 1,
     "tools ok, stream failed (400: no streams)"),
    ([SAYS_HI, sse(*HELLO), refusal("no tools", 400)], 1,
     "stream ok, tools failed (400: no tools)"),
    ([SAYS_HI, sse(*HELLO), SAYS_HI], 0, "stream ok, tools taken, but none called")])
def test_provider_test_says_what_does_not_work(capsys, upstreams, script, status, words):
    add_demo(capsys, upstreams(*script).url)
    result, out, _ = run_demo(capsys, "provider", "test", "mine")
    assert result == status and words in out and len(out.splitlines()) == 1


def test_provider_test_of_what_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(ifl.Gateway, "local_engines", {})
    assert run_demo(capsys, "provider", "test")[0] == 1
    assert "provider add zhipu" in run_demo(capsys, "provider", "test", "zhipu")[2]
    run_demo(capsys, "provider", "add", "dead", "--base-url", f"http://127.0.0.1:{unused_port()}",
             "--models", "m")
    status, out, _ = run_demo(capsys, "provider", "test", "dead")
    assert status == 1 and out.startswith("dead: does not work, the connection: ")
    run_demo(capsys, "provider", "add", "zhipu")
    assert "its settings: the environment variable ZHIPU_API_KEY is not set" in run_demo(
        capsys, "provider", "test", "zhipu")[1]


def test_provider_test_limits_tokens_in_the_provider_s_own_field(capsys, demo):
    add_demo(capsys, demo.base_url, "--preset", "openai")
    assert run_demo(capsys, "provider", "test", "mine")[0] == 0
    assert all("max_tokens" not in body and "max_completion_tokens" in body
               for _, body in demo.requests)


def test_upstream_flag_brings_facts(monkeypatch):
    monkeypatch.setenv("K", "sk-1")
    gateway = ifl._gateway_of(ifl._parse_args(["--upstream", "https://api.deepseek.com",
                                               "--api-key", "$K"]))
    provider = gateway.state.router.providers["upstream"]
    assert provider.profile["require_reasoning_on_tool_calls"] and provider.api_keys == ("sk-1",)
    target, = gateway.state.router.resolve("claude-sonnet-4-5", ifl.Asked("messages"))
    assert target.model == "deepseek-flash"


# --- engines on this machine -------------------------------------------------

@pytest.fixture
def engines(monkeypatch):
    """Sets where engines are looked for."""
    def put(**where):
        monkeypatch.setattr(ifl.Gateway, "local_engines", where)
    put()
    return put


def looks(demo):
    return [path for path, _ in demo.requests if path == "/v1/models"]


def test_an_engine_is_found_at_the_first_request(demo, engines, caplog):
    engines(ollama=demo.base_url, vllm=f"http://127.0.0.1:{unused_port()}/v1")
    caplog.set_level(logging.INFO, "iflow2api")
    with gateway_with() as (gateway, url):
        assert not looks(demo) and call_demo(url, "/health")[1]["status"] == "degraded"
        body = {"model": "claude-sonnet-4-5", "max_tokens": 99, "messages": [user_demo("hi")]}
        assert call_demo(url, "/v1/messages", body)[0] == 200
        assert demo.requests[-1][1]["model"] == "demo"
        assert message_of(chat_demo(url, "hi", model="ollama/demo-vision"))["content"]
        assert len(looks(demo)) == 1                     # the second request came within 30 seconds
        assert call_demo(url, "/health")[1]["providers"][0]["name"] == "ollama"
        assert "demo" in [m["id"] for m in call_demo(url, "/v1/models")[1]["data"]]
        assert call_demo(url, "/v1/models/ollama/demo")[1]["owned_by"] == "ollama"
    assert any(r.getMessage().startswith(f"found ollama at {demo.base_url}: demo")
               for r in caplog.records)
    assert ifl.LOCAL_TTL_S == 30


def test_an_engine_is_looked_for_again_and_its_end_noticed(demo, engines, monkeypatch, caplog):
    monkeypatch.setattr(ifl, "LOCAL_TTL_S", 0)
    engines(lmstudio=demo.base_url)
    caplog.set_level(logging.INFO, "iflow2api")
    with gateway_with() as (gateway, url):
        assert chat_demo(url, "hi") and chat_demo(url, "hi")
        assert len(looks(demo)) == 2
        demo.close()
        status, answer = call_demo(url, "/v1/chat/completions",
                                   {"model": "demo", "messages": [user_demo("hi")]})
        assert status == 403 and "no other provider" in answer["error"]["message"]
    said = [r.getMessage() for r in caplog.records if "engine" in r.getMessage()
            or "found" in r.getMessage()]
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
        assert call_demo(url, "/v1/chat/completions",
                         {"model": "demo", "messages": [user_demo("hi")]})[0] == 403
    with gateway_with(providers=[{"name": "dead",
                                  "base_url": f"http://127.0.0.1:{unused_port()}"}]) as (gateway,
                                          url):
        assert call_demo(url, "/v1/chat/completions",
                         {"model": "demo", "messages": [user_demo("hi")]})[0] == 502
    assert not demo.requests


def test_a_gateway_never_finds_itself_nor_another_one(demo, engines):
    with gateway_with(**demo.settings()) as (_, other), gateway_with() as (gateway, url):
        engines(vllm=url + "/v1", llamacpp=other + "/v1")
        status, answer = call_demo(url, "/v1/chat/completions",
                                   {"model": "demo", "messages": [user_demo("hi")]})
        assert status == 403 and ifl.metrics_text(gateway).count("requests_total{") == 1


def test_new_settings_end_the_search(demo, engines):
    engines(ollama=demo.base_url)
    with gateway_with() as (gateway, url):
        assert chat_demo(url, "hi")
        gateway.apply(ifl.Settings(detect_local=False))
        assert gateway.current().router.default is None


def test_chat_models_come_before_embeddings(engines, demo, monkeypatch):
    monkeypatch.setattr(ifl, "DEMO_MODELS", ({"id": "text-embedding-nomic"}, {"id": "qwen3"}))
    engines(lmstudio=demo.base_url)
    with gateway_with() as (gateway, _):
        found = gateway.current().router.providers["lmstudio"]
        assert found.models == ("qwen3", "text-embedding-nomic")


@pytest.mark.parametrize("data",
                         [b"", b"<html>", b"[]", b'{"data": 5}',
                          b'{"data": [1, {"id": 2}, {"id": ""}]}'])
def test_what_is_no_model_list_names_no_models(data):
    try:
        assert ifl.parse_model_list(data) == []
    except ifl.UpstreamGarbled:
        assert data in (b"", b"<html>")


def test_env_names_the_model_of_a_found_engine(capsys, demo, engines):
    engines(ollama=demo.base_url)
    assert "demo" in run_demo(capsys, "env", "codex", "--shell", "bash")[1]


# === 21. Platform ============================================================

HOSTILE_PATHS = ["/usr/bin/python3", "/home/jo doe/py", "/h/ü/\u4f60\u597d", "/h/a'b", '/h/"q"',
                 "/h/$HOME/`id`", "/h/100%/%h", "/h/back\\slash\\", "/h/a;b&c|d", "/h/<x>&y"]


def launch_of(path, **facts):
    return ifl.Launch(path, path + "/iflow2api.py", **facts)


def words_of_unit(text):
    """ExecStart as systemd reads it."""
    line, = (line for line in text.splitlines() if line.startswith("ExecStart="))
    words = re.findall(r'"((?:[^"\\]|\\.)*)"', line)
    return [re.sub(r"\\(.)", r"\1", word).replace("%%", "%").replace("$$", "$") for word in words]


def words_of_entry(text):
    """Exec as a desktop reads it: a string of the file, then arguments."""
    line, = (line for line in text.splitlines() if line.startswith("Exec="))
    words = re.findall(r'"((?:[^"\\]|\\.)*)"', line.replace("\\\\", "\\"))
    return [re.sub(r'\\(["`$\\])', r"\1", word).replace("%%", "%") for word in words]


def words_of_shell(line):
    done = subprocess.run(["/bin/sh", "-c", f"printf '%s\\n' {line}"], capture_output=True,
                          timeout=30)
    return done.stdout.decode().splitlines()


def words_of_agent(text):
    return __import__("plistlib").loads(text.encode())["ProgramArguments"]


WRITERS = [
    (ifl.user_unit, words_of_unit), (ifl.system_unit, words_of_unit),
    (ifl.desktop_entry, words_of_entry), (ifl.launch_agent, words_of_agent),
    (ifl.boot_script, lambda text: words_of_shell(re.search("exec (.*)", text).group(1))),
    (ifl.procd_script, lambda text: words_of_shell(re.search("command (.*)", text).group(1))),
    (ifl.cron_line, lambda text: words_of_shell(
        text.split(" ", 1)[1].rpartition(" >")[0].replace("\\%", "%")))]


@pytest.mark.skipif(not os.path.exists("/bin/sh"), reason="needs a shell")
@pytest.mark.parametrize("path", HOSTILE_PATHS)
@pytest.mark.parametrize("write, read", WRITERS, ids=[row[0].__name__ for row in WRITERS])
def test_each_file_starts_what_it_was_made_for(write, read, path):
    for launch in (launch_of(path), launch_of(path, is_module=True)):
        assert read(write(launch)) == launch.words
    assert write(launch).endswith("\n") or write is ifl.cron_line


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_the_unit_is_valid_and_hardened(tmp_path):
    script = tmp_path / "iflow2api.py"
    script.write_text("")
    unit = tmp_path / "iflow2api.service"
    unit.write_text(ifl.system_unit(ifl.Launch(sys.executable, str(script))))
    done = subprocess.run(["systemd-analyze", "security", "--offline=true", "--threshold=30",
                           str(unit)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-300:]


KINDS_OF_SYSTEM = [
    ({"TERMUX_VERSION": "0.119"}, "linux", "", "", "termux"),
    ({"PREFIX": "/data/data/com.termux/files/usr"}, "android", "", "", "termux"),
    ({}, "win32", "", "", "windows"), ({}, "darwin", "", "", "launchd"),
    ({}, "linux", "/etc/openwrt_release", "crontab", "openwrt"),
    ({"XDG_RUNTIME_DIR": "/r", "DISPLAY": ":0"}, "linux", "/run/systemd/system",
     "systemctl crontab", "systemd"),
    ({"DISPLAY": ":0"}, "linux", "/run/systemd/system", "systemctl crontab", "xdg"),
    ({"WAYLAND_DISPLAY": "w"}, "linux", "", "", "xdg"),
    ({}, "linux", "/run/systemd/system", "systemctl crontab", "cron"), ({}, "linux", "", "", "")]


@pytest.mark.parametrize("environ, system, paths, programs, kind", KINDS_OF_SYSTEM)
def test_which_starter_a_system_has(environ, system, paths, programs, kind):
    assert ifl.autostart_kind(environ, system, paths.split().__contains__,
                              programs.split().__contains__) == kind
    if not kind:
        with pytest.raises(ifl.CommandFailed, match="nothing that starts programs"):
            ifl.Autostart(kind, environ)


@pytest.fixture
def tools_of_system(tmp_path, monkeypatch):
    """tools(name, script): a program of the system, played by a shell script."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def make(name, script):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return make


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_autostart_by_crontab(tools_of_system, tmp_path):
    table = tmp_path / "table"
    table.write_text("5 4 * * * other\n")
    tools_of_system("crontab", f'[ "$1" = -l ] && exec cat {table}; exec cat > {table}')
    made = ifl.Autostart("cron", {})
    assert made.current() == "" and made.where == "crontab" and made.turn_off() is False
    for path in ("/a/b", "/c d/e"):      # the second replaces the first
        made.turn_on(launch_of(path))
        assert made.current() == ifl.cron_line(launch_of(path))
    assert table.read_text().count("@reboot") == 1
    assert made.turn_off() is True and table.read_text() == "5 4 * * * other\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_autostart_by_systemd(tools_of_system, tmp_path, home):
    told = tmp_path / "told"
    tools_of_system("systemctl", f'echo "$@" >> {told}')
    made = ifl.Autostart("systemd", {"XDG_CONFIG_HOME": str(tmp_path / "config")})
    made.turn_on(launch_of("/a/b"))
    assert made.path == str(tmp_path / "config/systemd/user/iflow2api.service")
    assert made.current() == ifl.user_unit(launch_of("/a/b"))
    assert made.turn_off() is True and made.current() == "" and not os.path.exists(made.path)
    assert told.read_text().split("\n")[:3] == [
        "--user --quiet daemon-reload", "--user --quiet enable iflow2api.service",
        "--user --quiet disable iflow2api.service"]
    tools_of_system("systemctl", "echo no bus >&2; exit 1")
    with pytest.raises(ifl.CommandFailed, match="no bus"):
        made.turn_on(launch_of("/a/b"))
    assert not os.path.exists(made.path)                   # nothing half done


def test_autostart_by_the_desktop_tells_the_truth(home, monkeypatch, capfd):
    for name in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "TERMUX_VERSION", "PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    if sys.platform != "linux" or os.path.exists("/etc/openwrt_release"):
        pytest.skip("a Linux desktop")
    entry = home / ".config/autostart/iflow2api.desktop"
    assert ifl.main(["autostart"]) == 1 and "does not start" in capfd.readouterr().out
    assert ifl.main(["autostart", "on"]) == 0 == ifl.main(["autostart", "status"])
    assert words_of_entry(entry.read_text()) == ifl.this_launch().words
    capfd.readouterr()
    entry.write_text(entry.read_text().replace("iflow2api.py", "moved.py"))
    assert ifl.main(["autostart", "status"]) == 1
    assert "something else" in capfd.readouterr().out
    assert ifl.main(["autostart", "off"]) == 0 and not list(entry.parent.iterdir())


def test_byte_code_is_used_where_nobody_else_can_change_it(tmp_path, monkeypatch):
    script = tmp_path / "iflow2api.py"
    script.write_text("")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    tmp_path.chmod(0o755)
    assert ifl.keeps_byte_code(str(script), [str(tmp_path)])
    assert not ifl.keeps_byte_code(str(script), ["/elsewhere", ""])
    assert not ifl.keeps_byte_code(str(tmp_path / "renamed.py"), [str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert not ifl.keeps_byte_code(str(script), [str(tmp_path)])
    monkeypatch.delenv("PYTHONPATH")
    if os.name != "nt":
        tmp_path.chmod(0o777)
        assert not ifl.keeps_byte_code(str(script), [str(tmp_path)])


@pytest.mark.parametrize("command", [*(f"service {name}" for name in ifl.SERVICES), "docker",
                                     *(f"docker {name}" for name in ifl.CONTAINERS)])
def test_files_are_printed(command, capsys, home):
    assert ifl.main(command.split()) == 0
    text = capsys.readouterr().out
    assert "iflow2api" in text and "@" not in text.replace("@reboot", "").replace(
        "@system-service", "").replace("@privileged @resources", "")
    if command in ("docker", "docker run"):
        done = subprocess.run(["/bin/sh", "-n"], input=text, text=True, timeout=30)
        assert done.returncode == 0


ARGVS = [(["--port", "1"], ["--port", "1"]),
         (["--api-key", "sk-1", "-n"], ["--api-key", "\0", "-n"]),
         (["--api-key=sk-1"], ["--api-key=\0"]), (["--api-key", "$K"], ["--api-key", "$K"]),
         (["--api-key=$K", "x"], ["--api-key=$K", "x"])]


@pytest.mark.parametrize("argv, kept", ARGVS)
def test_no_key_is_kept_in_the_pid_file(argv, kept):
    assert ifl.without_secrets(argv) == kept


def program(*argv, timeout_s=60, **environ):
    return run("iflow2api.pyc", *argv, timeout_s=timeout_s, stdin=subprocess.DEVNULL,
               env={**os.environ, **environ})


def test_in_the_background(home, upstream):
    serving = ("serve", "--detach", "--port", "0", "--upstream", upstream.url)
    assert program("stop").returncode == 1
    started = program(*serving)
    assert started.returncode == 0, started
    url = re.search(r"listening on (\S+)", started.stderr).group(1)
    try:
        facts = json.loads((home / ".iflow2api/iflow2api.pid").read_text())
        assert facts["url"] == url and facts["supervisor"] == ""
        assert json.load(urllib.request.urlopen(url + "/health", timeout=WAIT_S))["version"]
        for command in ("status",), ("env", "claude"), ("env", "gemini"):
            assert url in program(*command).stdout      # whatever port the settings name
        assert "starts" in program("logs").stdout
        second = program(*serving)                      # `stop` would find one of the two
        assert second.returncode == 1 and f"already runs at {url}" in second.stderr, second
        port = program("serve", "--port", url.rpartition(":")[2])
        assert port.returncode == 1 and f"already runs at {url}" in port.stderr, port
        elsewhere = program("env", "claude", "--port", "9").stdout
        assert url not in elsewhere and "http://127.0.0.1:9" in elsewhere
        again = program("restart")
        assert again.returncode == 0 and "listening on" in again.stderr, again
        assert json.loads((home / ".iflow2api/iflow2api.pid").read_text())["pid"] != facts["pid"]
    finally:
        stopped = program("stop")
    assert stopped.returncode == 0, stopped
    assert sorted(each.name for each in (home / ".iflow2api").iterdir()) == [
        "iflow2api.log", "iflow2api.pid.lock"]


def test_a_start_that_fails_in_the_background_says_why(home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = program("serve", "--detach", "--port", str(port))
    assert done.returncode == 1 and f"port {port}" in done.stderr


def test_no_server_in_the_background_that_stop_could_not_find(home, tmp_path):
    (tmp_path / "file").write_text("")
    done = program("serve", "--detach", "--port", "0", "--config-dir", str(tmp_path / "file"))
    assert done.returncode == 1 and "can't be written" in done.stderr, done
    assert "listening" not in done.stderr
    done = program("serve", "--detach", "--demo")
    assert done.returncode == 2 and "leave out --detach" in done.stderr, done


def test_a_dead_pid_file_and_a_strangers_number_are_no_server(home):
    folder = home / ".iflow2api"
    folder.mkdir()
    (folder / "iflow2api.pid").write_text(json.dumps({"pid": os.getpid(), "argv": []}))
    (folder / "iflow2api.pid.lock").write_text("")
    assert ifl.PidFile(str(folder)).running() == {}
    assert program("stop").returncode == 1


def test_as_process_1_it_stays_in_the_foreground(monkeypatch, capsys):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert ifl.main(["serve", "--detach"]) == 2
    assert "foreground" in capsys.readouterr().err
    assert ifl.supervisor({}, 1) == "the container"
    assert ifl.supervisor({"INVOCATION_ID": "x"}, 5) == "systemd"


# --- files of clients

CLIENT_WRITTEN = [
    # client, file, what it had before, what a program reads there afterwards
    ("claude", ".claude/settings.json", '{"env": {"A": "1", "ANTHROPIC_MODEL": "mine"}, "x": [1]}',
     ("env", "ANTHROPIC_BASE_URL")),
    ("opencode", ".config/opencode/opencode.json", '{"provider": {"other": {}}, "model": "o/m"}',
     ("provider", "iflow2api", "options", "baseURL")),
    ("qwen", ".qwen/settings.json", '{"security": {"folderTrust": {"enabled": true}}}',
     ("security", "auth", "baseUrl")),
    ("gemini", ".gemini/settings.json", '{"ui": {"theme": "x"}}',
     ("security", "auth", "selectedType"))]


def write_client(client, *flags):
    return ifl.main(["env", client, "--model", "glm-5", *flags])


@pytest.fixture
def folders_of_clients(monkeypatch):
    for name in ("CODEX_HOME", "CLAUDE_CONFIG_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("client, file, before, names", CLIENT_WRITTEN)
def test_what_is_written_for_a_client_can_be_undone(home, folders_of_clients, capsys, client, file,
                                                    before, names):
    path = home / file
    path.parent.mkdir(parents=True)
    path.write_text(before)
    path.chmod(0o640)
    for _ in range(2):                   # the second time nothing of the first is taken for theirs
        assert write_client(client, "--write", "--yes") == 0
    value = json.loads(path.read_text())
    for name in names:
        value = value[name]
    assert value in ("http://127.0.0.1:28000", "http://127.0.0.1:28000/v1", "gemini-api-key")
    assert os.name == "nt" or stat.S_IMODE(path.stat().st_mode) == 0o640
    assert write_client(client, "--undo", "--yes") == 0
    assert json.loads(path.read_text()) == json.loads(before)
    assert write_client(client, "--undo", "--yes") == 1    # there is nothing more to undo


def test_only_what_is_still_ours_is_undone(home, folders_of_clients):
    path = home / ".claude/settings.json"
    assert write_client("claude", "--write", "--yes") == 0
    changed = json.loads(path.read_text())
    changed["env"].update(ANTHROPIC_MODEL="theirs", MORE="1")
    path.write_text(json.dumps(changed))
    assert write_client("claude", "--undo", "--yes") == 0
    assert json.loads(path.read_text()) == {"env": {"ANTHROPIC_MODEL": "theirs", "MORE": "1"}}
    assert write_client("claude", "--write", "--yes") == 0 == write_client(
        "claude", "--undo", "--yes")
    path.unlink()
    assert write_client("claude", "--write", "--yes") == 0 == write_client(
        "claude", "--undo", "--yes")
    assert not path.exists()             # it was made here


@pytest.mark.parametrize("client", ["claude", "gemini", "qwen", "opencode"])
def test_no_key_is_shown_with_the_changes_of_a_file(home, folders_of_clients, capsys, client):
    for key in "own-first-0123456789", "own-second-0123456789":   # the second replaces the first
        assert ifl.main(["config", "set", "custom_api_key", key]) == 0
        assert write_client(client, "--write", "--yes") == 0
    assert write_client(client, "--undo", "--yes") == 0
    said = capsys.readouterr()
    assert "own-" not in said.out + said.err and "127.0.0.1:28000" in said.err


TOMLS = ["", 'model = "gpt-5"\n', "# mine\n[profiles.x]\nmodel = \"y\"\n",
         'approval = "never"\n\n[a.b]\nc = 1']


@pytest.mark.parametrize("before", TOMLS)
def test_codex_file(home, monkeypatch, before):
    monkeypatch.setenv("CODEX_HOME", str(home / "own"))
    path = home / "own/config.toml"
    path.parent.mkdir()
    path.write_text(before)
    for _ in range(2):
        assert write_client("codex", "--write", "--yes") == 0
    if sys.version_info >= (3, 11):
        read = __import__("tomllib").loads
        found, own = read(path.read_text()), read(before)
        provider = found.pop("model_providers")["iflow2api"]
        assert provider["base_url"] == "http://127.0.0.1:28000/v1" and "env_key" not in provider
        assert found.pop("model_provider") == "iflow2api"
        assert {"model": "glm-5", **own} == found
    assert write_client("codex", "--undo", "--yes") == 0
    assert not path.exists() if not before else path.read_text().rstrip("\n") == before.rstrip("\n")


def test_variables_of_gemini_cli(home, folders_of_clients):
    path = home / ".gemini/.env"
    path.parent.mkdir()
    path.write_text("OTHER=1")
    assert write_client("gemini", "--write", "--yes") == 0
    assert path.read_text().splitlines() == [
        "OTHER=1", ifl.BLOCK_BEGIN, "GOOGLE_GEMINI_BASE_URL=http://127.0.0.1:28000",
        "GEMINI_API_KEY=not-needed", "GEMINI_MODEL=glm-5", ifl.BLOCK_END]
    assert write_client("gemini", "--undo", "--yes") == 0 and path.read_text() == "OTHER=1\n"


LEFT_ALONE = [
    ("claude", ".claude/settings.json", "{\n  // mine\n}", "no plain JSON"),
    ("claude", ".claude/settings.json", "[1]", "no plain JSON"),
    ("claude", ".claude/settings.json", '{"env": "x"}', "no object there"),
    ("codex", ".codex/config.toml", 'model_provider = "mine"\n', "says model_provider already"),
    ("gemini", ".gemini/.env", "GEMINI_API_KEY=mine\n", "says GEMINI_API_KEY already")]


@pytest.mark.parametrize("client, file, before, said", LEFT_ALONE)
def test_files_that_are_left_alone(home, folders_of_clients, capsys, client, file, before, said):
    path = home / file
    path.parent.mkdir()
    path.write_text(before)
    assert write_client(client, "--write", "--yes") == 1
    told = capsys.readouterr()
    assert said in told.err and "28000" in told.out        # the lines to copy
    assert path.read_text() == before


def test_a_change_is_shown_and_confirmed_and_no_key_is_shown(home, folders_of_clients, config,
                                                            capsys, monkeypatch):
    put_config(config, {"custom_api_key": "sk-0123456789abcdef"})
    at = ("--config-dir", config.folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert write_client("claude", "--write", *at) == 2     # no terminal, and no --yes
    assert not (home / ".claude/settings.json").exists()
    assert write_client("claude", "--write", "--yes", *at) == 0
    told = capsys.readouterr()
    assert "ANTHROPIC_AUTH_TOKEN" in told.err and "0123456789" not in told.err + told.out
    assert "sk-0123456789abcdef" in (home / ".claude/settings.json").read_text()
    put_config(config, {"client_keys": [key_entry("bob", "sk-bob")]})
    assert write_client("claude", "--write", "--yes", *at) == 2
    assert "IFLOW2API_KEY" in capsys.readouterr().err
    assert write_client("aider", "--write", "--yes") == 2


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_run_starts_a_client_that_is_pointed_here(tools_of_system, config, server, upstream):
    running = server(upstream)
    put_config(config, {"port": running.port, "default_model": "glm-5"})
    tools_of_system("claude", 'echo "$ANTHROPIC_BASE_URL $ANTHROPIC_MODEL $*"; exit 7')
    done = program("run", "claude", "--config-dir", config.folder, "--", "-p", "a b", "--help")
    assert (done.returncode, done.stdout) == (7, f"{running.url} glm-5 -p a b --help\n"), done
    tools_of_system("codex", 'for word; do echo "$word"; done')
    done = program("run", "codex", "--config-dir", config.folder, "--", "exec", "hi")
    assert done.stdout.splitlines()[-2:] == ["exec", "hi"], done
    assert 'model_provider="iflow2api"' in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_run_starts_the_server_where_none_runs(tools_of_system, home, upstream):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tools_of_system("claude", 'echo "at $ANTHROPIC_BASE_URL"')
    (home / ".iflow2api").mkdir()
    (home / ".iflow2api/config.json").write_text(json.dumps({"port": port,
                                                             "providers": [provider(upstream)]}))
    try:
        done = program("run", "claude")
        assert done.stdout == f"at http://127.0.0.1:{port}\n", done
        assert "started in the background" in done.stderr
    finally:
        assert program("stop").returncode == 0
    missing = program("run", "opencode")
    assert missing.returncode == 2 and "install it first" in missing.stderr


NEW_VERSION = b"import sys\nprint('iflow2api 99.0.0')\n"
OFFERS = [
    # version, file, what is said instead of its SHA-256, the error (None: it is installed)
    ("99.0.0", NEW_VERSION, "", None), ("0.0.1", NEW_VERSION, "", "nothing newer"),
    ("99.0.0", NEW_VERSION, "0" * 64, "another SHA-256"),
    ("99.0.0", NEW_VERSION, "short", "names no SHA-256"),
    ("99.0.0", b"print(", "", "does not start"),
    ("99.0.1", NEW_VERSION, "", "answer with its version"),
    ("99.0.0", b"raise SystemExit(3)", "", "answer with its version"),
    ("new", NEW_VERSION, "", "no version")]


@pytest.mark.parametrize("version, data, said_hash, error", OFFERS)
def test_updates(upstreams, tmp_path, monkeypatch, capfd, version, data, said_hash, error):
    offer = {"version": version, "url": "new.py",
             "sha256": said_hash or hashlib.sha256(data).hexdigest()}
    fake = upstreams(usual=lambda seen: plain(
        data if seen.path == "/new.py" else offer, content_type="text/plain"))
    script = tmp_path / "iflow2api.py"
    script.write_bytes(pathlib.Path(ifl.__file__).read_bytes())
    before = script.read_bytes()
    monkeypatch.setattr(ifl, "__file__", str(script))
    monkeypatch.setattr(ifl, "check_replaceable", lambda path: None)
    monkeypatch.setenv("IFLOW2API_UPDATE_URL", f"http://127.0.0.1:{fake.port}/latest.json")
    assert ifl.main(["update", "--check"]) == (1 if error and error.endswith(
        ("no version", "no SHA-256")) else 0)
    assert ifl.main(["update"]) in (0, 1, 2) and script.read_bytes() == before
    assert ifl.main(["update", "--yes"]) == (0 if error in (None, "nothing newer") else 1)
    said = capfd.readouterr().err
    if error:
        assert error in said
        assert script.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == [
            "iflow2api.py"]
    else:
        assert script.read_bytes() == data
        assert (tmp_path / f"iflow2api.py.{ifl.__version__}").read_bytes() == before


def test_what_is_not_replaced_and_where_nobody_asks(tmp_path, capsys, home):
    script = tmp_path / "a/b/iflow2api.py"
    script.parent.mkdir(parents=True)
    script.write_text("")
    (tmp_path / ".git").mkdir()
    with pytest.raises(ifl.CommandFailed, match="git checkout"):
        ifl.check_replaceable(str(script))
    with pytest.raises(ifl.CommandFailed, match="container"):
        ifl.check_replaceable(str(script), lambda path: path == "/.dockerenv")
    for url in ("http://example.com/x", "ftp://x/y", "file:///etc/passwd"):
        with pytest.raises(ifl.CommandFailed, match="https only"):
            ifl.fetch(url, 10)
    assert ifl.main(["update"]) == 1 and "update_url is not set" in capsys.readouterr().err


# === 22. Command line ========================================================

@pytest.fixture
def cli(capsys, monkeypatch):
    """cli(*arguments, stdin="") -> (exit status, stdout, stderr) of a command."""
    def call(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = ifl.main([str(item) for item in argv])
        out, err = capsys.readouterr()
        return status, out, err
    return call


@pytest.fixture(params=["en", "zh"])
def language(request, monkeypatch):
    monkeypatch.setenv("IFLOW2API_LANGUAGE", request.param)
    monkeypatch.setattr(ifl.CONSOLE, "language", request.param)
    return request.param


CHINESE_CHARACTER = re.compile("[\u4e00-\u9fff]")


# --- texts, arguments and mistakes -------------------------------------------

def test_texts_are_whole_and_used():
    table, shared = ifl.texts_of(ifl.CONSOLE_TEXTS), ifl.texts_of(ifl.PAGE_TEXTS)
    for key, (zh, en) in table.items():
        places = [re.findall(r"\{(\w+)", text) for text in (zh, en)]
        assert zh.strip() and en.strip(), key
        assert set(places[0]) - {"program"} == set(places[1]) - {"program"}, key
    keys = re.findall(r"(?:^| \| )([\w-]+) = ", ifl.PAGE_TEXTS + ifl.CONSOLE_TEXTS, re.M)
    assert {key for key in keys if keys.count(key) > 1} == set()     # the last one would win
    assert {*table, *shared} <= set(keys)
    code = SOURCE[SOURCE.index("# --- the console ---"):]
    named = {f"{head}_{end}" for head, ends in (
        ("mark", ("error", "warning", "problem")), ("encrypt", ("on", "off")),
        ("rests", ("open", "half-open"))) for end in ends} | set(ifl.KIND_SHAPES)
    named |= set(errno.errorcode.values()) & set(table) | {
        "config_dir", "help_flag", "environment", "file", "flag"}
    assert set(re.findall(r'\b(?:tr|tr_word)\("([\w-]+)"[,)]', code)) <= {*table, *shared}
    assert {key for key in table if not re.search(f"[\"']{key}[\"']", code)} - named == set()


def test_a_flag_takes_a_value_in_all_commands_or_in_none_and_every_command_is_there():
    takes = {}
    for command in ifl.command_table().values():
        for argument in command.arguments:
            for flag in argument.flags:
                assert takes.setdefault(flag, bool(argument.value)) == bool(argument.value), flag
            assert all(argument.help) and CHINESE_CHARACTER.search(argument.help[0]), argument
        assert all(command.help) and CHINESE_CHARACTER.search(command.help[0]), command
    assert {name.partition(" ")[0] for name in ifl.COMMANDS} == set(ifl.command_table())


@pytest.mark.parametrize("name", ["", *ifl.command_table()])
def test_help_is_complete_and_fits(cli, language, name):
    status, text, err = cli(*([name] if name else []), "--help")
    assert (status, err) == (0, "") and cli(*([name] if name else []), "-h")[1] == text
    assert all(ifl.columns_of(line) <= 80 for line in text.splitlines())
    wanted = [flag for argument in ifl.command_table()[name or "serve"].arguments
              for flag in argument.flags] + list(ifl.command_table() if not name else [name])
    assert all(re.search(rf"(^|[\s,]){re.escape(word)}\b", text) for word in wanted)
    assert bool(CHINESE_CHARACTER.search(text)) == (language == "zh")
    assert name or len(text.splitlines()) < 70


#: What is typed, and what is said in both languages, or in each.
MISTAKES = [
    ("serv", "did you mean serve?", "serve"), ("statsu", "did you mean status?", "status"),
    ("coedx", "there is no command 'coedx' (", "没有命令 coedx（"), ("halt", "'halt' (", "halt（"),
    ("start", "did you mean restart?", "restart？"), ("", "there is no command ''", "没有命令"),
    ("serve --bogus", "serve has no flag --bogus", "serve 没有参数 --bogus"),
    ("--prot 80", "--port?", "--port？"), ("--port", "--port N", "--port N"),
    ("--port --demo", "--port needs a value", "--port 需要一个值"),
    ("--port x", "a whole number from 0 to 65535", "整数，0 到 65535"),
    ("--port=99999", "0 to 65535", "0 到 65535"), ("serve extra", "no argument 'extra'", "extra"),
    ("--log-level loud", "one of debug, info", "debug, info"),
    ("--verbose=1", "takes no value", "不带值"), ("status --no-browser", "status has no", "status"),
    ("--port 80 stats", "did you mean status?", "status"), ("test a b", "no argument 'b'", "b"),
    ("test nobody", "no provider 'nobody'", "没有上游 nobody"), ("--host=", "an address expected"),
    ("--upstream ftp://x", "--upstream: "), ("--upstream host:80", "write http://host:80"),
    ("--demo --upstream http://h", "leave out --upstream", "请去掉 --upstream"),
    ("--api-key $NOPE", "export NOPE=", "export NOPE="), ("--api-key -", "- < FILE", "- < FILE"),
    ("--api-key=", "single quotes: '$NAME'", "单引号：'$NAME'"),
    ("--config-dir= status", "a folder expected", "文件夹"),
    ("config frob", "one of list, get, set", "list, get, set"),
    ("config get", "config get needs a KEY", "config get 需要 KEY"),
    ("config get", "all: python iflow2api.py config list", "config list"),
    ("config get prot", "did you mean port?", "port"),
    ("config unset prot", "did you mean port?", "port"),
    ("config set port", "config set port needs a VALUE", "config set port VALUE"),
    ("config set port -5", "0 to 65535", "0 到 65535"),
    ("config set port x", "a whole number", "整数"),
    ("config set language fr", 'one of "", zh, en', '"", zh, en'),
    ("config set detect_local maybe", "true or false", "true 或 false"),
    ("config set keepalive_s -1", "a number", "数字"),
    ("config set providers x", "a list as JSON", "JSON 列表"),
    ("config set providers {}", "list"), ("config set providers [{}]", "name"),
    ('config set aliases {"a":5}', "alias 'a'"), ("config set host ", "an address expected"),
    ("config set custom_auth_header bad:", "no header name"),
    ("config set allowed_origins [1]", "[0]: 1 is no text"),
    ('config set allowed_hosts ["a",""]', "[1]"),
    ("config set upstream_proxy ftp://me:hunter2@x", "socks5h://"),
    ("config encrypt maybe", "one of on, off expected", "on, off"),
    ("provider remove", "needs a NAME", "需要 NAME"), ("key add", "needs a NAME", "需要 NAME"),
    ("key add x --rpm 0", "--rpm can't be 0; a whole number of at least 1", "--rpm 不能是 0"),
    ("logs -n x", "-n can't be x; a whole number of at least 0", "整数"),
    ("logs -n", "-n needs a value", "-n 需要一个值"), ("logs --level loud", "warning", "warning"),
    ("logs --folow", "--follow", "--follow"), ("env", "env claude|codex|", "env claude|codex|"),
    ("env coedx", "did you mean codex?", "codex"), ("usage --by foo", "one of model", "model"),
    ("usage --days 0", "from 1 to 9999", "1 到 9999"), ("admin other", "reset-password"),
    ("routes explain", "routes needs more", "routes 还需要"),
    ("routes explain m --tokens -1", "--tokens can't be -1", "--tokens 不能是 -1"),
    ("login --timeout 0", "a number above 0", "数字，大于 0"),
    ("login --api-key=a\u00a0b", "no blanks", "不能有空白")]


@posix                                   # export is a word of other shells
@pytest.mark.parametrize("typed, said", [(row[0], row[1:]) for row in MISTAKES],
                         ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_one_line_that_says_what_to_type_and_2(cli, language, typed, said):
    status, out, err = cli(*typed.split(" "))
    last = err.splitlines()[-1]
    assert (status, out) == (2, "") and "Traceback" not in err and "hunter2" not in err
    assert len(err.splitlines()) == 1 + err.startswith(("warning: ", "警告："))
    assert last.startswith("错误：" if CHINESE_CHARACTER.search(last[3:]) else "error: ")
    assert said[-1 if language == "zh" else 0] in last


def test_flags_may_stand_anywhere(cli, tmp_path):
    folder = str(tmp_path)
    for argv in (["config", "--show-secrets", "get", "port"], ["config", "get", "--", "port"],
                 ["--config-dir", folder, "config", "get", "port"],
                 ["config", "get", f"--config-dir={folder}", "port"]):
        assert cli(*argv) == (0, "28000\n", "")
    version = cli("version")
    assert re.fullmatch(rf"iflow2api {ifl.__version__} \(Python [\d.]+\S*, \w+\)\n", version[1])
    assert cli("--version") == cli("--port", "1", "--version") == version == (0, version[1], "")


# --- config ------------------------------------------------------------------

def test_config_path_and_folders(cli, home, monkeypatch):
    for variable, argv, folder in (("", (), ".iflow2api"), (str(home / "env"), (), "env"),
                                   ("", ("--config-dir", home / "flag"), "flag")):
        monkeypatch.setenv("IFLOW2API_CONFIG_DIR", variable)
        assert cli("config", "path", *argv)[1] == str(home / folder / "config.json") + "\n"
    assert os.listdir(home) == []


def test_config_set_get_unset(cli, config):
    put_config(config, {"unknown": 1})
    for name, text, value, shown in (
            ("port", "8080", 8080, "8080"), ("detect_local", "off", False, "false"),
            ("default_model", "glm-5", "glm-5", "glm-5"), ("drain_s", "2.5", 2.5, "2.5"),
            ("allowed_hosts", '["a"]', ["a"], '["a"]')):
        status, out, err = cli("config", "set", name, text)
        assert (status, out) == (0, "") and config.path in err
        assert ("next start" in err) == (name == "port")
        assert config.read()[name] == value and cli("config", "get", name) == (0, shown + "\n", "")
    for name in ("port", "detect_local", "default_model", "allowed_hosts", "drain_s", "unknown"):
        assert cli("config", "unset", name)[0] == 0
    assert config.read() == {} and cli("config", "get", "port")[1] == "28000\n"
    assert cli("config", "set", "custom_api_key", "-", stdin="from-stdin-secret\n")[0] == 0
    assert config.read() == {"custom_api_key": "from-stdin-secret"}
    assert "stdin" not in cli("config", "get", "custom_api_key")[1]


def test_config_list_explains_every_setting_and_hides_keys(cli, config, monkeypatch):
    put_config(config, {"port": 5, "custom_api_key": "sk-very-secret-client-key",
                        "upstream_proxy": "http://user:pa55word@proxy:1", "queue_limit": "x",
                        "providers": [
                            provider("http://h", headers={"X-Key": "header-secret-value"},
                                     api_keys=["sk-very-secret-provider-key", "$NAMED"])]})
    monkeypatch.setenv("IFLOW2API_DEFAULT_MODEL", "from-env")
    status, out, err = cli("config", "list")
    about, lines = out.splitlines()[::2], out.splitlines()[1::2]
    assert status == 0 and [line.split(" = ")[0] for line in lines] == list(ifl.SETTING)
    assert all(re.match(r"# \w", line) for line in about)
    assert about[1] == "# Port. 0 picks a free one (from the next start)"
    assert {"port = 5    # file", "default_model = from-env    # environment",
            "host = 127.0.0.1"} <= set(lines)
    assert not re.search("very-secret|pa55word|header-secret", out) and "$NAMED" in out
    assert "problem: config.json: queue_limit: " in err and "NAMED is not set" in err
    assert cli("config")[1] == out
    shown = cli("config", "list", "--show-secrets")[1]
    assert "sk-very-secret-client-key" in shown and "sk-very-secret-provider-key" in shown
    monkeypatch.setenv("IFLOW2API_LANGUAGE", "zh")
    about = cli("config", "list")[1].splitlines()[::2]
    assert about[1] == "# 端口。0 表示自动选一个空闲端口（下次启动生效）"
    assert all(CHINESE_CHARACTER.search(line) for line in about)


BROKEN_CONFIG = b'{"providers": [{"name": "p", "base_url": "http://x/v1"}],}'


@pytest.mark.parametrize("argv", [
    "config get port", "provider list", "config set port 5", "key list", "config unset port",
    "provider add q --base-url http://q/v1"])
def test_every_command_on_a_broken_file_names_what_is_wrong(cli, config, argv):
    put_config(config, BROKEN_CONFIG)
    status, out, err = cli(*argv.split())
    assert "problem: " in err and re.search(r"line 1, column 5[78]: ", err) and config.path in err
    kept = [name for name in os.listdir(config.folder) if ".broken-" in name]
    is_written = bool(re.search("set|add", argv))
    assert bool(kept) == is_written == ("what the broken file held is in" in err)
    for name in kept:
        with open(os.path.join(config.folder, name), "rb") as file:
            assert file.read() == BROKEN_CONFIG and name in err


def test_config_that_can_not_be_written_or_read(cli, home, monkeypatch):
    monkeypatch.setenv("IFLOW2API_PORT", "zz")
    status, out, err = cli("config", "get", "port")
    assert (status, out) == (0, "28000\n") and "IFLOW2API_PORT" in err
    (home / ".iflow2api").write_text("a file where the folder should be")
    status, out, err = cli("config", "set", "drain_s", "5")
    assert status == 1 and re.search(r"^error: .* can't be written: ", err, re.M)


def test_a_proxy_without_its_switch_is_noticed(cli):
    status, out, err = cli("config", "set", "upstream_proxy", "socks5h://127.0.0.1:1080")
    assert status == 0 and "config set upstream_proxy_enabled true" in err
    cli("config", "set", "upstream_proxy_enabled", "true")
    assert "enabled" not in cli("config", "set", "upstream_proxy", "env")[2]


# --- asking ------------------------------------------------------------------

def test_status(cli, config, server, upstream):
    put_config(config, {"port": 1, "queue_limit": -1,
                        "providers": [provider(upstream, api_keys=["sk-very-secret-key"])]})
    status, out, err = cli("status")
    assert status == 1 and "http://127.0.0.1:1  not running" in out and config.path in out
    assert f"provider  up (default)  {upstream.url}" in out and "very-secret" not in out
    assert "problem   config.json: queue_limit: " in out
    running = server(upstream)
    put_config(config, {"port": running.port})
    status, out, err = cli("status")
    assert status == 0 and f"running, healthy, version {ifl.__version__}, 0 in flight" in out
    assert "provider  up  in use" in out and "other providers than config.json" in out
    put_config(config, {"port": upstream.port, "detect_local": False})   # another program answers
    status, out, err = cli("status")
    assert status == 1 and "provider  none" in out


def test_status_and_env_go_by_the_running_server(cli, config, server, upstream):
    """--demo and --upstream leave config.json alone."""
    running = server(provider(upstream, "demo", models=["demo-1"]))
    filed = provider("http://127.0.0.1:1", "filed", models=["m-filed"])
    put_config(config, {"port": running.port, "providers": [filed]})
    out = cli("status")[1]
    assert "provider  demo  in use" in out and "filed" not in out
    assert cli("provider", "list") == (0, "demo  in use\n", "")
    assert "demo-1" in cli("env", "codex", "--shell", "bash")[1]
    assert "given" in cli("env", "codex", "--shell", "bash", "--model", "given")[1]
    running.close()
    status, out, err = cli("status")
    assert status == 1 and "provider  filed (default)  http://127.0.0.1:1" in out
    assert "m-filed" in cli("env", "codex", "--shell", "bash")[1]


def test_the_running_server_knows_variables_that_this_shell_lacks(cli, config, gateway, server,
                                                                  upstream):
    entry = provider(upstream, "kept", api_keys=["$ONLY_THERE"], models=["m-there"])
    made = gateway(entry, environ={"ONLY_THERE": "sk-of-the-server-1234"}, custom_api_key="sk-mine")
    running = server(gateway=made)
    put_config(config, {"port": running.port, "providers": [entry], "custom_api_key": "sk-mine"})
    assert "kept (default)  in use" in cli("status")[1]
    assert cli("provider", "list")[1] == "kept (default)  in use\n"
    assert "m-there  (kept)" in cli("models")[1].splitlines()
    assert cli("test") == (0, "kept: ok, the running server got an answer of m-there\n", "")
    assert upstream.last.headers["authorization"] == "Bearer sk-of-the-server-1234"
    running.close()
    assert "ONLY_THERE is not set" in cli("status")[1]
    assert "ONLY_THERE is not set" in cli("provider", "list")[1] + cli("test", "kept")[1]


def test_models(cli, config, upstream):
    models = "m1  (upstream)\norg/m2:free  (upstream)\n"
    assert cli("models", "--upstream", upstream.url) == (0, models, "")
    put_config(config, {"detect_local": False})
    status, out, err = cli("models")
    assert (status, out) == (1, "") and "no models known" in err


def test_test_is_one_tiny_request_and_provider_test_tries_more(cli, config, upstreams, monkeypatch):
    good, bad = upstreams(), upstreams(*[error_reply(401)] * 4)
    monkeypatch.setenv("GOOD_KEY", "good-key")
    put_config(config, {"providers": [provider(good, "good", api_keys=["$GOOD_KEY"]),
                                      provider(bad, "bad", models=["m"]),
                                      provider(good, "off", api_keys=["$GONE"])]})
    status, out, err = cli("test")
    lines = out.splitlines()
    assert status == 1 and re.fullmatch(r"good: key ok, model m1 ok \(\d\.\d s\)", lines[0])
    assert lines[1].startswith("bad: does not work, the key: provider bad refused")
    assert lines[2] == "off: does not work, its settings: the environment variable GONE is not set"
    asked = [seen for seen in good.requests if seen.method == "POST"]
    assert len(asked) == 1 and asked[0].json["max_tokens"] <= 16
    assert asked[0].headers["authorization"] == "Bearer good-key"
    assert cli("test", "good")[0] == 0 and cli("test", "bad")[0] == 1
    assert cli("provider", "test", "good")[1].endswith("stream ok, tools taken, but none called\n")
    put_config(config, {"detect_local": False})
    status, out, err = cli("test")
    assert (status, out) == (1, "") and "no provider yet" in err


@pytest.mark.parametrize("given, stdin, sent", [
    ("$SOME_KEY", "", "key-of-env"), ("a-literal-key", "", "a-literal-key"),
    ("-", "$from-stdin\n", "$from-stdin")])
def test_test_of_an_upstream_given_by_flags(cli, upstream, monkeypatch, given, stdin, sent):
    monkeypatch.setenv("SOME_KEY", "key-of-env")
    status, out, err = cli("test", "--upstream", upstream.url, "--api-key", given,
                           "--model", "mine", stdin=stdin)
    assert status == 0 and ("every user" in err) == given.startswith("a-")
    assert upstream.last.json["model"] == "mine"
    assert upstream.last.headers["authorization"] == f"Bearer {sent}"


def test_upstream_leaves_out_the_providers_and_aliases_of_the_file(config, upstreams):
    flags = ifl._flag_settings(ifl._parse_args(["--upstream", "http://flag"]))
    made = ifl.Gateway(config=config, environ={}, flags=flags)
    put_config(config, {"providers": [provider("http://file", "filed", models=["m"])],
                        "aliases": {"*": "filed/m"}, "default_provider": "filed"})
    for _ in range(2):
        assert list(made.state.router.providers) == ["upstream"]
        assert made.state.router.resolve("m")[0].provider.name == "upstream"
        made.reload()


# --- both languages ----------------------------------------------------------

#: Commands in the order of a first visit; {url} is an upstream, at {dead} nobody listens.
#: MISTAKES has those that are refused before anything is done.
WALK = """status | models | test | provider | provider presets | provider presets zhipu
provider presets zhipo | provider add zhipu | provider add zhipu | provider add x --base-url ftp://h
provider add up --base-url {url} --models m1
provider add down --base-url http://127.0.0.1:{dead}/v1 --api-key sk-literal-0123456789
provider list | status | models | test | test up | provider test up | provider test down
provider remove nobody | provider remove zhipu | config | config set aliases {"a":"upp/x"}
config set upstream_proxy socks5://h:1 | config encrypt off | config encrypt on | config encrypt
config set port 28000 | config unset nosuch | config unset upstream_proxy | config unset port
config set aliases {"fast":["up/m1",{"model":"m2","over_tokens":9}]} | routes explain fast
routes explain claude-x --dialect messages | routes explain up/y | routes explain down/y
routes explain zzz | routes explain up/y --json | key
key add alice --rpm 20 --models glm-* --expires 2001-01-01
key add alice --rpm 20 --tpd 9 --models nope | key add alice | key list | key remove bob
key remove alice | usage | usage --days 1 --by day | logs | config set log_file a.log | logs
env claude --shell bash | env codex --shell bash | login --timeout 0.05 --no-browser
login --paste | login --account a/b | logout | logout --account zz | admin reset-password
admin reset-password x | --host 192.0.2.1 | --upstream http://127.0.0.1:{dead} test
--upstream http://u:p@h test | version"""


def is_english(line) -> bool:
    """Three English words in a row; what is typed, and code, is no sentence."""
    line = re.sub(r"`[^`]*`|https?://\S+|python iflow2api\.py.*|config set \w+", "", line)
    return bool(re.search(r"\b[A-Za-z]{2,}:? [a-z]{2,}:? [a-z]{2,}\b", line))


def test_every_command_speaks_one_language(cli, language, monkeypatch, upstream):
    """zh: each line is wholly Chinese or wholly English; en: no Chinese."""
    monkeypatch.setenv("IFLOW2API_DETECT_LOCAL", "false")
    monkeypatch.setattr(ifl, "OAUTH_PORT", 0)
    monkeypatch.setattr(ifl, "open_browser", lambda url, environ: False)
    wrong, statuses, in_chinese = [], [], 0
    for line in re.split(r" \| |\n", WALK):
        typed = line.replace("{url}", upstream.url).replace("{dead}", str(unused_port()))
        status, out, err = cli(*typed.split(" "))
        statuses.append(status)
        for said in (out + err).splitlines():
            if re.match(r"export |codex\(|\w+ = |\s*[\[{}\]\"]|  python", said):         # code
                continue
            in_chinese += bool(CHINESE_CHARACTER.search(said))
            if CHINESE_CHARACTER.search(said) and (language == "en" or is_english(said)):
                wrong.append(f"{line}: {said}")
        assert status != 2 or len(err.strip().splitlines()) <= 2 and not out, (line, err)
    assert not wrong, "\n".join(wrong)
    assert set(statuses) == {0, 1, 2}
    assert in_chinese > 100 if language == "zh" else in_chinese == 0


def test_the_card_fits_into_80_columns(gateway, upstream, language):
    broken = provider("http://" + "very-long-name." * 9 + "example/v1", "long", api_keys=["$UNSET"])
    many_providers = [provider("http://h.test", f"p{number}") for number in range(30)]
    for made in (gateway(), gateway(upstream, broken), gateway(*many_providers),
                 gateway(upstream, custom_api_key="k" * 300)):
        made.problems = ["config.json: port: a whole number expected, not " + "9" * 80]
        with ifl.serve(made, port=0) as server:
            lines = ifl._card(made, server, True)
        assert all(ifl.columns_of(line) <= 80 for line in lines) and len(lines) < 22, lines
        assert ("22 " in "\n".join(lines)) == (len(made.state.router.providers) == 30)


# --- the console -------------------------------------------------------------

@pytest.mark.parametrize("environ, found", [
    ({"LC_ALL": "zh_CN.UTF-8"}, "zh"), ({"LC_ALL": "en_US.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
    ({"LC_MESSAGES": "zh_TW.UTF-8", "LANG": "en_US.UTF-8"}, "zh"), ({"LANG": "zh_CN"}, "zh"),
    ({"LANG": "C"}, "en"), ({}, "en"), ({"LANG": "zh_CN", "IFLOW2API_LANGUAGE": "en"}, "en"),
    ({"IFLOW2API_LANGUAGE": "zh"}, "zh"), ({"IFLOW2API_LANGUAGE": "fr", "LANG": "zh_CN"}, "zh")])
def test_language_by_variables(environ, found):
    assert ifl.find_language([], environ) == found


@pytest.mark.parametrize("argv", [["--config-dir", "DIR"], ["status", "--config-dir=DIR"]])
@pytest.mark.parametrize("text, found", [
    ('{"language": "zh"}', "zh"), ('{"language": ["zh"]}', "en"), ("{", "en"), ("[]", "en")])
def test_language_by_setting(tmp_path, argv, text, found):
    (tmp_path / "config.json").write_text(text)
    argv = [word.replace("DIR", str(tmp_path)) for word in argv]
    assert ifl.find_language(argv, {"LANG": "en_US"}) == found


def test_a_console_that_lacks_characters(home, config):
    for encoding, locale, said in (("ascii", "zh_CN.UTF-8", "error: there is no command"),
                                   ("gbk", "zh_CN.GBK", "错误：")):
        done = subprocess.run([sys.executable, byte_code(), "nope"], stderr=subprocess.PIPE,
                              timeout=30, env={**os.environ, "LC_ALL": locale,
                                               "PYTHONIOENCODING": encoding})
        assert done.returncode == 2 and done.stderr.decode(encoding).startswith(said)
    for encoding, shown in (("ascii", "a -> b... \\u4e2d (x)"), ("gbk", "a → b… 中（x）"),
                            ("cp437", "a -> b... \\u4e2d (x)")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(sys.stderr):
            ifl.Console().set_up([], {})
            print("a → b… 中（x）", end="", flush=True)
            assert sys.stdout.buffer.getvalue().decode(encoding).rstrip() == shown
    put_config(config, {"default_model": "模型😀"})
    done = run(byte_code(), "config", "get", "default_model",
               env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.stdout, done.stderr) == ("\\u6a21\\u578b\\U0001f600\n", "")


@pytest.mark.parametrize("text, columns, lines", [
    ("one two three", 7, ["one two", "three"]), ("", 10, [""]), ("ab 中文", 4, ["ab", "中文"]),
    ("abcdefghij", 4, ["abcd", "efgh", "ij"]), ("中文，很长", 6, ["中文，", "很长"]),
    ("中文很长很长", 6, ["中文很", "长很长"])])
def test_wrapping(text, columns, lines):
    assert ifl.wrap(text, columns) == lines
    assert all(ifl.columns_of(line) <= columns for line in lines)


def read_log(data):
    """A log file with `data` as the command reads it."""
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(data)
    try:
        return ifl.LogReader(file.name, "info").fresh()
    finally:
        os.unlink(file.name)


def feed_pieces(data):
    lines = ifl.Lines()
    return [lines.feed(data[at:at + 64]) for at in range(0, len(data), 64)]


#: What the command line reads or shows: what, n, maker of an input of size n, its use.
GROWTH_OF_COMMANDS = [
    ("one long word", 100_000, lambda n: "a" * n, many(lambda text: ifl.wrap(text, 80))),
    ("blanks", 200_000, lambda n: " " * n + "a", many(lambda text: ifl.wrap(text, 80))),
    ("short words", 10_000, lambda n: "ab " * n, many(lambda text: ifl.wrap(text, 80))),
    ("wide characters", 2000, lambda n: "中，" * n, many(lambda text: ifl.wrap(text, 80))),
    ("columns", 50_000, lambda n: "中a" * n, many(ifl.columns_of)),
    ("a character that is lacking", 50_000, lambda n: "→" * n,
     many(lambda text: text.encode("ascii", "iflow2api"))),
    ("a pasted text without a line end", 1_000_000, lambda n: b"a" * n, feed_pieces),
    ("pasted lines", 100_000, lambda n: b"ab\n" * n, feed_pieces),
    ("a log of one line", 400_000, lambda n: b"2026-01-01 00:00:01 INFO" + b" " * n, read_log),
    ("a log of short lines", 20_000, lambda n: b"2026-01-01 00:00:01 INFO a\n" * n, read_log),
    ("a log without levels", 20_000, lambda n: b"2026-01-01 00:00:01 A" * n + b"\n", read_log),
    ("arguments", 20_000, lambda n: ["status"] + ["--bogus=x"] * n,
     lambda argv: pytest.raises(ifl.UsageError, ifl._parse_args, argv)),
    ("words", 20_000, lambda n: ["status"] + ["x"] * n,
     lambda argv: pytest.raises(ifl.UsageError, ifl._parse_args, argv))]


@pytest.mark.parametrize("what, size, make, use", GROWTH_OF_COMMANDS,
                         ids=[row[0] for row in GROWTH_OF_COMMANDS])
def test_what_the_command_line_reads_takes_linear_time(what, size, make, use):
    ifl.Console().set_up([], {})
    check_growth(size, make, use)


# --- output ------------------------------------------------------------------

@linux
@pytest.mark.parametrize("argv", ["version", "config list", "provider presets"])
def test_an_answer_that_can_not_be_written_is_one_line_and_1(home, argv):
    command = [sys.executable, byte_code(), *argv.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "error: the disk is full\n")
    shell = ["/bin/sh", "-c", 'exec "$0" "$@" 2>/dev/full', *command]
    assert subprocess.run(shell, stdout=subprocess.DEVNULL, timeout=30).returncode == 0


@posix
def test_output_into_a_closed_pipe_and_a_start_without_a_warning(home):
    done = subprocess.run(f"{sys.executable} {byte_code()} config list | head -2", shell=True,
                          capture_output=True, text=True, timeout=30)
    assert done.stdout.endswith("\nhost = 127.0.0.1\n") and done.stderr == ""
    done = run("-W", "error", "-X", "dev", PROGRAM, "version")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("iflow2api ")
    assert os.listdir(home) == []


@posix
@pytest.mark.parametrize("outputs", [">/dev/full", ">&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_a_start_whose_output_can_not_be_written_serves_all_the_same(home, upstream, outputs):
    """A full disk, or a supervisor that closes what it does not read."""
    if "full" in outputs and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    port = unused_port()
    process = subprocess.Popen(
        ["/bin/sh", "-c", f'exec "$0" "$@" {outputs}', sys.executable, PROGRAM, "--port", str(port),
         "--upstream", upstream.url], stdout=subprocess.PIPE)
    try:
        assert until(lambda: health_at(port)) == "healthy"
    finally:
        process.terminate()
        assert process.wait(WAIT_S) == 0
        process.stdout.close()


def health_at(port):
    """What /health says of a server that may not listen yet."""
    with contextlib.suppress(OSError):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            return json.loads(answer.read())["status"]


# --- serving -----------------------------------------------------------------

class Process:
    """The program serving in a process of its own; on a pseudo terminal if wanted."""

    def __init__(self, *argv, terminal=False, **environ) -> None:
        self.reader, writer = __import__("pty").openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, byte_code(), *argv, "--port", "0"], stdout=subprocess.PIPE,
            stderr=writer, env={**os.environ, "PYTHONIOENCODING": "utf-8", **environ})
        os.close(writer)
        line, self.said = self.process.stdout.readline().decode(), ""
        found = re.fullmatch(r"iflow2api \S+ listening on (http://\S+?:(\d+))\n", line)
        if not found:
            self.process.kill()
        assert found, (line, self.read_until(r"\n"))
        self.url, self.port = found.group(1), int(found.group(2))
        self.server_address = ("127.0.0.1", self.port)

    def read_until(self, pattern) -> str:
        """stderr as far as `pattern`."""
        while not re.search(pattern, self.said, re.S | re.M):
            if os.name == "posix":       # elsewhere select() takes sockets only
                assert select.select([self.reader], [], [], WAIT_S)[0], self.said
            data = os.read(self.reader, 65536)
            assert data, self.said
            self.said += data.decode().replace("\r", "")
        return self.said

    def card(self) -> str:
        return self.read_until(r"(^|\n)\n.+\n\n")

    def signal(self, *numbers) -> None:
        for number in numbers:
            self.process.send_signal(number)

    def end(self) -> str:
        """The rest of its stderr, when it has ended."""
        try:
            self.process.wait(WAIT_S)
            with contextlib.suppress(OSError):           # the end of a pseudo terminal
                for data in iter(lambda: os.read(self.reader, 65536), b""):
                    self.said += data.decode().replace("\r", "")
        finally:
            self.close()
        return self.said

    def close(self) -> None:
        if not self.process.stdout.closed:
            self.process.kill()
            self.process.wait(WAIT_S)
            self.process.stdout.close()
            os.close(self.reader)


@pytest.fixture
def serving():
    """serving(*arguments, **environment) -> a Process."""
    with contextlib.ExitStack() as stack:
        def start(*argv, **facts):
            made = Process(*argv, **facts)
            stack.callback(made.close)
            return made
        yield start


@posix
def test_serve_and_sigterm(serving, upstream):
    go = threading.Event()
    upstream.plays(sse(chunk("x"), go, chunk(finish="stop"), DONE))
    running = serving("--upstream", upstream.url)
    with Client(running) as client:
        client.post(chat(True)).head()
        client.piece()
        running.signal(signal.SIGTERM)
        go.set()
        assert records_of(client.pieces())[-1] == DONE
    err = running.end()
    assert running.process.returncode == 0 and "stopping" in err and "Traceback" not in err
    assert re.search("upstream.*default.*" + re.escape(upstream.url), err) and "\x1b" not in err
    assert re.search(r"^\d\d:\d\d:\d\d [0-9a-f]{8} m1 → upstream/m1 200 ", err, re.M)


@posix
def test_a_second_signal_ends_it_at_once(serving, upstream):
    upstream.plays(sse(chunk("x"), HOLD))
    running = serving("serve", "--upstream", upstream.url, "--log-level", "error")
    with Client(running) as client:
        client.post(chat(True)).head()
        running.signal(signal.SIGINT)
        running.read_until("stopping")
        running.signal(signal.SIGINT)
        began = time.monotonic()
        running.end()
    assert time.monotonic() - began < 3 and running.process.returncode == 130


@posix
def test_sighup_takes_over_the_file(serving, config, upstream):
    put_config(config, {"detect_local": False})
    running = serving("--no-browser")
    assert post(running, chat()).status == 403
    put_config(config, {"providers": [provider(upstream)]})
    running.signal(signal.SIGHUP)        # it may come as soon as the address is printed
    until(lambda: get(running, "/health").json["status"] == "healthy")
    assert post(running, chat()).status == 200
    running.signal(signal.SIGTERM)
    running.end()
    assert running.process.returncode == 0


SIGNALS = {
    # as one that comes in the moment before the wait begins
    "a thread gets it": """
        begun = threading.Event()
        def elsewhere():
            begun.wait()
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        threading.Thread(target=elsewhere).start()
        begun.set()""",
    # the main thread may hold any lock just then, also the one that starting a thread takes
    "a lock is held": """
        with threading._active_limbo_lock:
            for number in (signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
            for _ in range(1000): pass                   # the handlers run in here"""}


@posix
@pytest.mark.parametrize("what", SIGNALS)
def test_a_signal_ends_the_wait_whatever_it_interrupts(what):
    script = textwrap.dedent("""
        import os, signal, sys, threading; sys.path.insert(0, sys.argv[1])
        import iflow2api as ifl
        signals = ifl._signals()
        wait = signals.__enter__()
        """) + textwrap.dedent(SIGNALS[what]) + "\nprint(wait())\n"
    done = run("-c", script, os.path.dirname(byte_code()), timeout_s=WAIT_S)
    assert done.stdout == "False\n", done.stderr


def test_a_port_that_is_taken_is_one_line_with_a_free_one(cli, server):
    port = server(detect_local=False).port
    status, out, err = cli("serve", "--port", port, "--no-browser")
    assert (status, out) == (1, "") and re.fullmatch(
        rf"error: port {port} on 127\.0\.0\.1 is taken by another program; port (\d+) is free: "
        r"add --port \1\n", err)


@pytest.mark.parametrize("host", ["192.0.2.1", "0.0.0.0"])
def test_a_start_that_fails_makes_no_key(cli, server, config, host):
    """Such a key would lock out the clients of a running server, and nobody has seen it."""
    running = server(detect_local=False, host="0.0.0.0")
    status, out, err = cli("serve", "--host", host, "--port", running.port)
    assert status == 1 and not os.path.exists(config.path) and "sk-" not in out + err
    assert host != "192.0.2.1" or err.splitlines()[-1].startswith(
        f"error: can't listen on 192.0.2.1 port {running.port}: ")


PROVIDERS = json.dumps([
    {"name": "zhipu", "base_url": "https://open.bigmodel.cn/api/paas/v4", "api_keys": ["$UNSET"]},
    {"name": "other", "base_url": "https://a-long-name.example.com/" + "path/" * 20}])


@pytest.mark.parametrize("locale, words", [
    ("C.UTF-8", ("address", "providers", "next", "disabled")),
    ("zh_CN.UTF-8", ("地址", "上游", "下一步", "已停用"))])
def test_the_card_says_what_there_is(serving, locale, words):
    running = serving(LC_ALL=locale, IFLOW2API_PROVIDERS=PROVIDERS,
                      IFLOW2API_CUSTOM_API_KEY="sk-0123456789abcdef")
    card = running.card()
    assert all(word in card for word in (*words, running.url, "zhipu", "other", "/admin")), card
    assert "\x1b" not in card and "0123456789" not in card
    labels = [re.match(r"  \S+ +", line) for line in card.splitlines() if re.match(r"  \S+ ", line)]
    assert len({ifl.columns_of(label.group()) for label in labels}) == 1, card


@posix
@pytest.mark.parametrize("environ, colours", [
    ({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False),
    ({"TERM": "xterm", "NO_COLOR": "1"}, False)])
def test_colours_on_terminals_only(serving, environ, colours):
    running = serving("--no-browser", terminal=True, **environ)
    assert ("\x1b[" in running.card()) == colours and running.url in running.said


def test_the_card_of_an_open_gateway_shows_its_new_key(serving):
    card = serving("--host", "0.0.0.0").card()
    assert re.search(r"sk-[0-9a-f]{48}", card)
    assert all(len(line) <= 80 or line[2] == ":" for line in card.splitlines())


def test_verbose_logs_more(serving):
    running = serving("--upstream", "http://127.0.0.1:1", "--verbose")
    urllib.request.urlopen(running.url + "/v1/models").read()
    running.read_until("debug")
    running = serving("--upstream", "http://127.0.0.1:1")
    urllib.request.urlopen(running.url + "/v1/models").read()
    running.signal(signal.SIGTERM)
    assert "debug" not in running.end()


# --- the log file ------------------------------------------------------------

def test_log_file_is_private_bounded_and_without_secrets(serving, home):
    serving(IFLOW2API_LOG_FILE="logs/a.log", IFLOW2API_PROVIDERS='[{"name": "x"}]').card()
    path = home / ".iflow2api" / "logs" / "a.log"
    assert os.name == "nt" or stat.S_IMODE(path.stat().st_mode) == 0o600
    begins = (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO iflow2api .* starts\n"
              r".* WARNING provider x is disabled")
    assert re.match(begins, path.read_text())
    handler = ifl._open_log(str(home / "b.log"))
    handler.maxBytes = 1000
    for number in range(200):
        text = f"{number} Bearer sk-verysecret"
        handler.handle(ifl.log.makeRecord("x", 30, "", 0, text, (), None))
    handler.close()
    files = sorted(home.glob("b.log*"))
    assert len(files) == 1 + ifl.LOG_FILES_KEPT and all(f.stat().st_size <= 1000 for f in files)
    assert os.name == "nt" or all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in files)
    assert "verysecret" not in files[0].read_text()


def test_a_log_file_that_cant_be_written_is_named_and_does_not_matter(serving, home):
    (home / "file").write_text("")
    said = serving(IFLOW2API_LOG_FILE=str(home / "file" / "x.log")).card()
    assert "log_file" in said and "warning" in said


LOG = """2026-01-01 00:00:01 INFO one
2026-01-01 00:00:02 WARNING two
2026-01-01 00:00:03 ERROR three
Traceback
  boom
2026-01-01 00:00:04 DEBUG four
2026-01-01 00:00:05 INFO unfinis"""


@pytest.mark.parametrize("argv, shown", [
    ("", "zero one two three Traceback boom four"), ("-n 2", "boom four"), ("-n2", "boom four"),
    ("-n 0", ""), ("--level error", "three Traceback boom"), ("--level warning -n 1", "boom"),
    ("--level info", "zero one two three Traceback boom")])
def test_logs_shows_the_tail(cli, home, monkeypatch, argv, shown):
    monkeypatch.setenv("IFLOW2API_LOG_FILE", str(home / "a.log"))
    (home / "a.log.1").write_text("2026-01-01 00:00:00 INFO zero\n")
    (home / "a.log").write_text(LOG)
    status, out, err = cli("logs", *argv.split())
    assert status == 0 and [line.split()[-1] for line in out.splitlines()] == shown.split()


def test_logs_says_what_to_set(cli, home, monkeypatch):
    status, out, err = cli("logs")
    assert (status, out) == (1, "") and "config set log_file" in err
    monkeypatch.setenv("IFLOW2API_LOG_FILE", "none.log")
    status, out, err = cli("logs")
    assert status == 1 and str(home / ".iflow2api" / "none.log") in err


def test_logs_follow_over_a_rotation(home):
    path = home / "a.log"
    path.write_text("2026-01-01 00:00:01 INFO one\n")
    process = subprocess.Popen([sys.executable, byte_code(), "logs", "-f", "--level", "info"],
                               stdout=subprocess.PIPE,
                               env={**os.environ, "IFLOW2API_LOG_FILE": str(path)})
    try:
        assert process.stdout.readline().split()[-1] == b"one"
        with path.open("a") as file:
            file.write("2026-01-01 00:00:01 DEBUG no\n2026-01-01 00:00:02 INFO t")
            file.flush()
            file.write("wo\n")
        assert process.stdout.readline().split()[-1] == b"two"
        os.rename(path, home / "a.log.1")
        path.write_text("2026-01-01 00:00:03 INFO three\n")
        assert process.stdout.readline().split()[-1] == b"three"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# === 22. Proxies =============================================================

def say_hello(seen):
    """An upstream's answer that says who it is."""
    leaked = [name for name in seen.headers if name.startswith("proxy")]
    return plain({"host": seen.headers["host"], "path": seen.path, "leaked": leaked})


@pytest.fixture
def hello(upstreams):
    return upstreams(usual=say_hello)


class FakeProxy:
    """A proxy on the loopback; every name leads to `target`.  `answer`: what it says instead."""

    def __init__(self, target=None, user=None, password=None, answer=None):
        self.target, self.login, self.answer = target, (user, password), answer
        self.seen, self.logins, self.open = [], [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.place = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock = self.listener.accept()[0]
                self.open.append(sock)
                threading.Thread(target=self.guarded, args=(sock,), daemon=True).start()

    def guarded(self, sock):
        with contextlib.suppress(OSError, ValueError, IndexError):
            try:
                self.serve(sock)
            finally:
                if self.answer != b"hang":
                    sock.close()

    def relay(self, one):
        with socket.create_connection(self.target) as two:
            self.open.append(two)
            while True:
                for sock in select.select([one, two], [], [])[0]:
                    data = sock.recv(65536)
                    if not data:
                        return
                    (two if sock is one else one).sendall(data)

    def close(self):
        for sock in [self.listener, *self.open]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class ConnectProxy(FakeProxy):
    scheme = "http"

    def serve(self, sock):
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(65536)
            if not data:
                return
            head += data
        if self.answer is not None:
            return None if self.answer == b"hang" else sock.sendall(self.answer)
        self.seen.append(head.split()[1].decode())
        found = re.search(rb"Proxy-Authorization: Basic (\S+)", head)
        self.logins.append(base64.b64decode(found.group(1)).decode() if found else None)
        if self.login[0] is not None and self.logins[-1] != ":".join(self.login):
            return sock.sendall(b"HTTP/1.1 407 Authenticate\r\nContent-Length: 0\r\n\r\n")
        for piece in (b"HTTP/1.1 200 Connection est", b"ablished\r\nVia: test\r\n\r", b"\n"):
            sock.sendall(piece)
        self.relay(sock)


class SocksProxy(FakeProxy):
    scheme, reply = "socks5h", 0

    def serve(self, sock):
        file = sock.makefile("rb")
        if self.answer is not None:
            file.read(2)
            return None if self.answer == b"hang" else sock.sendall(self.answer)
        version, count = file.read(2)
        wanted = 2 if self.login[0] is not None else 0
        if version != 5 or wanted not in file.read(count):
            return sock.sendall(b"\5\xff")
        sock.sendall(bytes([5, wanted]))
        if wanted:
            user = file.read(file.read(2)[1]).decode()
            self.logins.append((user, file.read(file.read(1)[0]).decode()))
            ok = self.logins[-1] == self.login
            sock.sendall(b"\1\0" if ok else b"\1\1")
            if not ok:
                return
        assert file.read(3) == b"\5\1\0"
        kind = file.read(1)[0]
        size = {1: 4, 4: 16}.get(kind) or file.read(1)[0]
        host = file.read(size)
        family = {1: socket.AF_INET, 4: socket.AF_INET6}.get(kind)
        host = socket.inet_ntop(family, host) if family else host.decode()
        self.seen.append((kind, host, struct.unpack(">H", file.read(2))[0]))
        if self.reply:
            return sock.sendall(bytes([5, self.reply]))
        sock.sendall(bytes([5, 0, 0, 3, 4]) + b"here\0\7")
        self.relay(sock)


@pytest.fixture
def proxy(hello):
    """Makes proxies that lead every name to the upstream `hello`."""
    with contextlib.ExitStack() as stack:
        def make(kind, *args, **facts):
            made = kind(("127.0.0.1", hello.port), *args, **facts)
            stack.callback(made.close)
            return made
        yield make


@pytest.fixture
def ask():
    """ask(base_url, proxy, times, **settings): GET base_url/models as the gateway would."""
    upstream = ifl.Upstream()

    def call(base_url="http://model.test:8000/v1", proxy="", times=1, **settings):
        target = ifl.Provider("p", base_url, proxy=proxy)
        settings = ifl.Settings(**{"connect_timeout_s": 5.0, **settings})
        for _ in range(times):
            with upstream.open(target, settings, "GET", "/models", (), None) as response:
                answer = json.loads(response.read_all(1 << 20))
        return answer
    yield call
    upstream.close()


@pytest.fixture
def refused(ask):
    """The error of `ask`: one line without the password."""
    def call(*args, **facts):
        with pytest.raises(ifl.UpstreamError) as caught:
            ask(*args, **facts)
        text = caught.value.message
        assert "\n" not in text and "hunter2" not in text and "model.test" in text
        return caught.value
    return call


@pytest.fixture
def lookup(monkeypatch):
    """lookup(answer): what looking up model.test gives, or raises."""
    real = socket.getaddrinfo

    def replace(answer):
        def found(host, *args, **kwargs):
            if host != "model.test":
                return real(host, *args, **kwargs)
            if isinstance(answer, BaseException):
                raise answer
            return answer
        monkeypatch.setattr(socket, "getaddrinfo", found)
    return replace


@pytest.mark.parametrize("kind, login, written, seen", [
    (ConnectProxy, (), "", "model.test:8000"),
    (ConnectProxy, ("me@home", "hunter2:x/é"), "me%40home:hunter2%3Ax%2F%C3%A9@",
     "model.test:8000"),
    (SocksProxy, (), "", (3, "model.test", 8000)),
    (SocksProxy, ("me", "hunter2"), "me:hunter2@", (3, "model.test", 8000))])
def test_a_proxy_is_told_the_name_and_its_connection_is_kept(ask, proxy, hello, lookup, kind, login,
                                                             written, seen):
    made = proxy(kind, *login)
    lookup(AssertionError("the proxy looks names up"))
    answer = ask(proxy=f"{kind.scheme}://{written}{made.place}", times=3)
    assert answer == {"host": "model.test:8000", "path": "/v1/models", "leaked": []}
    assert made.seen == [seen] and hello.connections == 1
    shown = (":".join(login) or None) if kind is ConnectProxy else login
    assert made.logins == [shown] if login or kind is ConnectProxy else made.logins == []


@pytest.mark.parametrize("url, kind, seen", [
    ("http://[2001:db8::1]:9/v1", ConnectProxy, "[2001:db8::1]:9"),
    ("http://münchen.test:9/v1", ConnectProxy, "xn--mnchen-3ya.test:9"),
    ("http://192.0.2.1/v1", SocksProxy, (1, "192.0.2.1", 80)),
    ("http://[2001:db8::5]/v1", SocksProxy, (4, "2001:db8::5", 80))])
def test_a_host_is_named_as_the_protocol_wants_it(ask, proxy, url, kind, seen):
    made = proxy(kind)
    ask(url, f"{kind.scheme}://{made.place}")
    assert made.seen == [seen]


def test_connect_with_tls_checks_the_upstream_not_the_proxy(refused, proxy):
    made = proxy(ConnectProxy)
    error = refused("https://model.test/v1", made.place)
    assert made.seen == ["model.test:443"]
    assert "it does not speak TLS" in error.message and "through the proxy" in error.message


def test_socks5_resolves_here_and_prefers_ipv4(ask, refused, proxy, lookup):
    made = proxy(SocksProxy)
    lookup([(socket.AF_INET6, 1, 6, "", ("2001:db8::1", 8000, 0, 0)),
            (socket.AF_INET, 1, 6, "", ("192.0.2.7", 8000))])
    ask(proxy=f"socks5://{made.place}")
    assert made.seen == [(1, "192.0.2.7", 8000)]
    lookup(socket.gaierror(-2, "Name or service not known"))
    assert "socks5h://" in refused("http://model.test:8001/v1", f"socks5://{made.place}").message


CONNECT, SOCKS = ConnectProxy, SocksProxy
NO_PROXIES = [
    (CONNECT, b"HTTP/1.1 407 Nope\r\n\r\n", "refused the user and password"),
    (CONNECT, b"HTTP/1.1 403 Forbidden\r\n\r\n", "does not allow this host or port"),
    (CONNECT, b"HTTP/1.1 405 Method Not Allowed\r\n\r\n", "is it an HTTP proxy?"),
    (CONNECT, b"HTTP/1.1 502 Bad\r\nA: b\r\n\r\nsorry", "it can't reach the upstream"),
    (CONNECT, b"HTTP/1.1 418 Teapot\r\n\r\n", "HTTP 418"),
    (CONNECT, b"HTTP/1.1 200 OK\r\n\r\n<html>", "a page of its own"),
    (CONNECT, b"220 mail.test ESMTP\r\n", "not HTTP"),
    (CONNECT, b"HTTP/2 200\r\n\r\n", "not HTTP/1.1"),
    (CONNECT, b"", "closed the connection without an answer; is it an HTTP proxy?"),
    (CONNECT, b"HTTP/1.1 200 OK\r\nA: " + b"a" * 70000, "not HTTP"),
    (SOCKS, b"HTTP/1.1 400 Bad Request\r\n\r\n", "write http://"), (SOCKS, b"\4\0", "not SOCKS5"),
    (SOCKS, b"\5", "is it a SOCKS5 proxy?"), (SOCKS, b"\5\xff", "refused the user and password"),
    (SOCKS, b"", "closed the connection without an answer; is it a SOCKS5 proxy?")]


@pytest.mark.parametrize("kind, answer, words", NO_PROXIES, ids=[row[2][:40] for row in NO_PROXIES])
def test_what_is_no_proxy_is_named(refused, proxy, kind, answer, words):
    place = proxy(kind, answer=answer).place
    error = refused(proxy=f"{kind.scheme}://me:hunter2@{place}")
    assert isinstance(error, ifl.UpstreamUnreachable) and words in error.message
    assert f"{kind.scheme}://{place}" in error.message and "me:" not in error.message


@pytest.mark.parametrize("reply, words", [(1, "no stated reason"), (2, "does not allow"),
                                          (5, "upstream refused"), (99, "code 99")])
def test_socks_replies_have_words(refused, proxy, reply, words):
    made = proxy(SocksProxy)
    made.reply = reply
    assert words in refused(proxy=f"socks5h://{made.place}").message


@pytest.mark.parametrize("kind, user, words", [
    (CONNECT, "", "write http://USER:PASSWORD@"), (SOCKS, "", "write socks5h://USER:PASSWORD@"),
    (SOCKS, "me:hunter22@", "refused the user and password"), (SOCKS, "u" * 256 + ":x@", "255")])
def test_a_login_that_a_proxy_lacks_or_refuses_is_told(refused, proxy, kind, user, words):
    error = refused(proxy=f"{kind.scheme}://{user}{proxy(kind, 'me', 'hunter2').place}")
    assert words in error.message and error.should_retry is False


class Drip(ConnectProxy):
    def serve(self, sock):
        sock.sendall(b"HTTP/1.1 200 OK\r\nA: ")
        gone = threading.Event()
        while not gone.wait(0.02):
            sock.sendall(b"a")


@pytest.mark.parametrize("kind, answer", [(CONNECT, b"hang"), (SOCKS, b"hang"), (Drip, None)])
def test_a_proxy_that_hangs_or_drips_is_given_up_in_time(refused, proxy, kind, answer):
    place, began = proxy(kind, answer=answer).place, time.monotonic()
    error = refused(proxy=f"{kind.scheme}://me:hunter2@{place}", connect_timeout_s=0.1)
    assert isinstance(error, ifl.UpstreamTimeout) and "connect_timeout_s" in error.message
    assert time.monotonic() - began < 3


def test_a_proxy_that_refuses_or_is_ourselves(refused, server):
    place = f"127.0.0.1:{unused_port()}"
    error = refused(proxy=f"http://me:hunter2@{place}")
    assert isinstance(error, ifl.UpstreamUnreachable)
    assert f"the proxy http://{place}: connection refused" in error.message
    running = server(provider("http://model.test/v1", "p",
                              proxy=f"http://localhost:{unused_port()}"))
    error = refused(proxy=f"http://localhost:{running.port}", port=running.port)
    assert "this program's own address" in error.message and "proxy" in error.message


@pytest.mark.parametrize("address", [
    "ftp://me:hunter2@h:1", "https://me:hunter2@h:1", "socks://h", "http://",
    "http://me:hunter2#@h:1", "http://me:12/hunter2@h", "http://h:99999", "http://[me:hunter2@h",
    "me:hunter2@h/x://", "http://me:hunter2@h:1/path", "http://h h:1"])
def test_a_bad_proxy_address_is_named_without_its_password(refused, config, address):
    error = refused(proxy=address)
    assert isinstance(error, ifl.UpstreamUnreachable) and "write " in error.message
    assert error.should_retry is False
    entry = provider("https://model.test", "p", proxy=address)
    put_config(config, {"upstream_proxy": address, "upstream_proxy_enabled": True,
                        "providers": [entry]})
    gateway = ifl.Gateway(config=config)
    assert len(gateway.problems) == 2 and "hunter2" not in "".join(gateway.problems)
    gateway.close()


def test_global_proxy_needs_its_switch_and_a_providers_own_comes_first(ask, proxy):
    everyone, own, other = proxy(ConnectProxy), proxy(ConnectProxy), proxy(SocksProxy)
    both = {"upstream_proxy": f"http://{everyone.place}", "upstream_proxy_enabled": True}
    for _ in range(2):                   # kept connections are those of one way
        ask(**both)
        ask(proxy=f"http://{own.place}", **both)
        ask(proxy=f"socks5h://{other.place}", **both)
    assert [len(each.seen) for each in (everyone, own, other)] == [1, 1, 1]
    off = ifl.Settings(upstream_proxy=both["upstream_proxy"])
    at = ifl.Endpoint.of("http://model.test/v1")
    assert ifl.proxy_for(ifl.Provider("p"), off, at) == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_never_proxied(ask, hello, monkeypatch, host):
    monkeypatch.setenv("ALL_PROXY", "http://192.0.2.1:9")
    for proxy in ("http://192.0.2.1:9", "env"):
        assert ask(f"http://{host}:{hello.port}/v1", proxy)["path"] == "/v1/models"


@pytest.mark.parametrize("variables, scheme, used", [
    ("HTTP_PROXY=P", "http", True), ("http_proxy=P", "http", True),
    ("HTTPS_PROXY=P", "https", True),
    ("https_proxy=P", "https", True), ("HTTPS_PROXY=P", "http", False),
    ("ALL_PROXY=P", "https", True), ("all_proxy=P", "http", True),
    ("ALL_PROXY=P NO_PROXY=*", "http", False), ("ALL_PROXY=P NO_PROXY=other,.test", "http", False),
    ("ALL_PROXY=P no_proxy=model.test:80", "http", False),
    ("ALL_PROXY=P no_proxy=model.test:81", "http", True)])
def test_env_reads_the_usual_variables(monkeypatch, variables, scheme, used):
    for name, _, value in (pair.partition("=") for pair in variables.split()):
        monkeypatch.setenv(name, value)
    usual = urllib.request.getproxies_environment
    monkeypatch.setattr("urllib.request.getproxies", usual)
    url = f"{scheme}://model.test/v1"
    found = ifl.proxy_for(ifl.Provider("p", url, proxy="env"), ifl.Settings(),
                          ifl.Endpoint.of(url))
    assert found == ("P" if used else "")


@pytest.mark.parametrize("host, no_proxy, exempt", [
    ("10.1.2.3", "10.0.0.0/8", True), ("11.1.2.3", "10.0.0.0/8", False),
    ("10.1.2.3", "10.9.9.9/8", True), ("10.1.2.3", "10.1.2.3", True),
    ("10.1.2.3", "10.1.2.3:8000", True), ("10.1.2.3", "10.1.2.3:81", False),
    ("10.1.2.3", "10.0.0.0/8:81", False), ("fd00::5", "fd00::/8", True),
    ("fd00::5", "[fd00::]/8", True), ("fd00::5", "fd00::5", True), ("fd00::5", "[fd00::5]", True),
    ("fd00::5", "[FD00:0::5]:8000", True), ("fd00::5", "[fd00::5]:81", False),
    ("fe80::5", "fd00::/8", False), ("10.1.2.3", "fd00::/8", False),
    ("::ffff:10.1.2.3", "10.0.0.0/8", True), ("a.test", ".test", True), ("a.test", "*.test", True),
    ("a.test", "TEST", True), ("Test.", "test", True), ("atest", "test", False),
    ("a.test", "test:8000", True), ("a.test", ".test:81", False), ("a.test", "b, *", True),
    ("10.1.2.3", "*", True), ("a.test", "x y\ta.test", True), ("a.test", "10.0.0.0/8", False),
    ("a.test", "", False), ("10.1.2.3", "10.0.0.0/99, 10.0.0/8, [::1, /8, :, a:b:c, 1e9", False),
    ("a.test", "., *., :8000, [", False), ("10.1.2.3", "10.0.0.0/99,10.0.0.0/8", True)])
def test_no_proxy_names_hosts_and_networks_and_what_is_odd_in_it_is_ignored(host, no_proxy,
                                                                            exempt):
    assert ifl.is_exempt(host, 8000, no_proxy) is exempt


@pytest.mark.parametrize("network, used", [("10.0.0.0/8", False), ("192.168.0.0/16", True)])
def test_networks_of_no_proxy_hold_for_the_upstreams(monkeypatch, network, used):
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"all": "P", "no": network})
    at = ifl.Endpoint.of("http://10.2.3.4:8000/v1")
    found = ifl.proxy_for(ifl.Provider("p", proxy="env"), ifl.Settings(), at)
    assert found == ("P" if used else "")


def test_env_end_to_end(ask, proxy, monkeypatch):
    made = proxy(SocksProxy)
    monkeypatch.setenv("ALL_PROXY", f"socks5h://{made.place}")
    ask(upstream_proxy="env", upstream_proxy_enabled=True)
    assert made.seen == [(3, "model.test", 8000)]


@pytest.mark.parametrize("text, shown", [
    ("http://127.0.0.1:28000/v1", "http://127.0.0.1:28000/v1"),
    ("http://token@h:1", "http://…@h:1"),
    ("socks5://me:hunter2@h:1080", "socks5://me:…@h:1080"),
    ("at http://u:a@h and http://u:b/c@h", "at http://u:…@h and http://u:…@h")])
def test_redaction_hides_credentials_and_leaves_ports(text, shown):
    assert ifl.redact(text) == shown


# === 23. The official OpenAI SDK =============================================

@pytest.fixture(scope="module")
def openai():
    return sdk_named("openai")


@pytest.fixture
def sdk(openai, server, upstream):
    """sdk(**settings) -> a client of the SDK for a server in front of `upstream`."""
    made = []

    def make(*providers, **settings):
        running = server(*(providers or [upstream]), **settings)
        key = settings.get("custom_api_key") or "none"
        made.append(openai.OpenAI(base_url=running.url + "/v1", api_key=key, max_retries=0,
                                  timeout=WAIT_S))
        return made[-1]
    yield make
    for client in made:
        client.close()


def test_sdk_plain_and_stream(sdk):
    client = sdk()
    answer = client.chat.completions.create(model="m1", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello" and answer.usage.total_tokens == 15
    found = list(client.chat.completions.create(model="m1", messages=MESSAGES, stream=True,
                                                stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in found if part.choices) == "Hello"
    assert found[-1].usage.total_tokens == 15


def test_sdk_tools(sdk, upstream):
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    upstream.plays(plain(completion(None, "tool_calls", tool_calls=calls)), sse(*RELAYED[7][1]))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    client = sdk()
    answer = client.chat.completions.create(model="m1", messages=MESSAGES, tools=tools)
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {"a": 1}
    assert upstream.last.json["tools"] == tools
    arguments: Dict[int, str] = {}
    for part in client.chat.completions.create(model="m1", messages=MESSAGES, tools=tools,
                                               stream=True):
        for call in (part.choices[0].delta.tool_calls or ()) if part.choices else ():
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    assert arguments == {0: '{"a":"\\"error\\": 1"}', 1: "{}"}


def test_sdk_images_and_extra_fields(sdk, upstream):
    image = {"url": "data:image/png;base64," + "A" * 200_000, "detail": "low"}
    content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": image}]
    sdk().chat.completions.create(model="m1", messages=[{"role": "user", "content": content}],
                                  extra_body={"thinking": {"type": "enabled"}, "top_k": 5},
                                  extra_headers={"X-Title": "t"})
    assert upstream.last.json["messages"][0]["content"] == content
    assert upstream.last.json["thinking"] == {"type": "enabled"}
    assert upstream.last.json["top_k"] == 5 and upstream.last.headers["x-title"] == "t"


def test_sdk_embeddings_completions_and_models(sdk):
    client = sdk()
    assert client.embeddings.create(model="m1", input="x").data[0].embedding == [0.5, -1.0]
    floats = client.embeddings.create(model="m1", input="x", encoding_format="float")
    assert floats.data[0].embedding == [0.5, -1.0]
    assert client.completions.create(model="m1", prompt="x").choices[0].text == "Hello"
    assert [model.id for model in client.models.list()] == ["m1", "org/m2:free"]
    assert client.models.retrieve("org/m2:free").id == "org/m2:free"


@pytest.mark.parametrize("status, name", [
    (400, "BadRequestError"), (401, "PermissionDeniedError"), (403, "PermissionDeniedError"),
    (404, "NotFoundError"),
    (409, "ConflictError"),
    (422, "UnprocessableEntityError"), (429, "RateLimitError"), (500, "InternalServerError"),
    (503, "InternalServerError")])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_sdk_errors(sdk, openai, upstream, status, name, stream):
    upstream.plays(error_reply(status))
    with pytest.raises(getattr(openai, name)) as raised:
        sdk().chat.completions.create(model="m1", messages=MESSAGES, stream=stream)
    assert f"status {status}" in str(raised.value) and raised.value.request_id.startswith("req_")


def test_sdk_errors_of_our_own(sdk, openai, upstream):
    client = sdk(custom_api_key="the-client-key")
    assert client.chat.completions.create(model="m1", messages=MESSAGES).choices
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(model="m1", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="m1", messages=[])
    assert raised.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("unknown")


def test_sdk_sees_an_upstream_that_dies(sdk, openai, upstream):
    upstream.plays(sse(chunk("Hel"), RESET), sse(chunk("Hel"), ERROR_RECORD))
    client = sdk()
    for said in ("", "Rate limit reached"):
        found = []
        with pytest.raises(openai.APIError, match=said or None):
            for part in client.chat.completions.create(model="m1", messages=MESSAGES, stream=True):
                found.append(part)
        assert found[0].choices[0].delta.content == "Hel"


def test_sdk_comes_back_after_a_busy_answer(sdk, upstream):
    upstream.plays(plain({"error": {"message": "busy"}}, 429, [("retry-after-ms", "10")]))
    client = sdk().with_options(max_retries=1)
    assert client.chat.completions.create(model="m1", messages=MESSAGES).choices
    assert len(upstream.requests) == 2


# === 24. House rules =========================================================

README = pathlib.Path(PROGRAM).with_name("README.md")


@pytest.mark.skipif(not README.exists(), reason="the program stands alone here")
def test_the_readme_is_short_in_both_languages_and_its_commands_are_right():
    halves = README.read_text(encoding="utf-8").split("\n# 中文\n")
    pattern = r"(?m)^python iflow2api\.py.*$|(?<=`)python iflow2api\.py[^`]*(?=`)"
    commands = [re.findall(pattern, half) for half in halves]
    assert sorted(commands[0]) == sorted(commands[1]) and len(commands[0]) > 30
    for half in halves:
        rows = [line for line in half.splitlines() if re.search(r"^\|.*(_API_KEY|vllm)", line)]
        assert half.count("\n") <= 200
        assert set(re.findall("`([a-z-]+)`", "".join(rows))) == set(ifl.PRESETS)
        for name, preset in ifl.PRESETS.items():
            assert preset.key in next(row for row in rows if f"`{name}`" in row)
    for command in commands[0]:
        words = shlex.split(command.partition(" | ")[0].partition(" >")[0])[2:]
        args = ifl._parse_args([word for word in words if word != "COMMAND"])
        assert args.get("KEY") in (None, "off", *ifl.SETTING), command


LINES = SOURCE.splitlines()
BANNERS = [(int(found.group(1)), found.group(2), number) for number, line in enumerate(LINES, 1)
           for found in [re.fullmatch(r"# === (\d+)\. (.+?) =+", line)] if found]

#: Functions that may catch whatever comes: the last resort, a thread's body, and two that clean up
#: and raise on.
BROAD = {"handle_one_request", "_run", "_connect", "open", "run", "_serve"}


def of_kind(*kinds):
    return [node for node in nodes() if isinstance(node, kinds)]


def test_functions_are_short_and_annotated():
    for node in of_kind(ast.FunctionDef, ast.AsyncFunctionDef):
        arguments = [argument for argument in node.args.args + node.args.kwonlyargs
                     if argument.arg not in ("self", "cls")]
        assert node.end_lineno - node.lineno < 60, node.name
        assert node.returns is not None and all(a.annotation for a in arguments), node.name


def test_lines_are_not_too_long():
    for number, line in enumerate(LINES, 1):
        assert len(line) <= 140 and line == line.rstrip() and "\t" not in line, number


def test_only_the_standard_library_is_imported():
    names = {alias.name for node in of_kind(ast.Import) for alias in node.names}
    names |= {node.module for node in of_kind(ast.ImportFrom)}
    deprecated = "cgi cgitb imp asyncore asynchat distutils telnetlib pipes crypt"
    assert not names & set(deprecated.split())
    known = getattr(sys, "stdlib_module_names", None)
    # compression: from Python 3.14 on
    assert known is None or {name.split(".")[0] for name in names} <= {*known, "compression"}


def test_the_banners_are_the_contents():
    contents = ast.get_docstring(tree(), clean=False).partition("Contents")[2]
    listed = re.findall(r"^    (\d+)\s+(\S.*?)  +\S", contents, re.M)
    assert [(str(number), title.replace(" (pure)", "")) for number, title, _ in BANNERS] == listed
    assert [number for number, _, _ in BANNERS] == sorted(number for number, _, _ in BANNERS)
    assert {len(LINES[line - 1]) for _, _, line in BANNERS} <= {78, 79}


def test_the_pure_sections_know_no_io():
    first, end = (next(line for number, _, line in BANNERS if number == at) for at in (6, 12))
    world = set("socket open time threading logging log os ssl subprocess select secrets print "
                "input".split())
    assert [f"{node.id} in line {node.lineno}" for node in of_kind(ast.Name)
            if first <= node.lineno < end and node.id in world] == []


def test_broad_excepts_are_few_and_known_and_nothing_is_global():
    found = set()
    for function in of_kind(ast.FunctionDef):
        for node in ast.walk(function):
            if isinstance(node, ast.ExceptHandler):
                name = getattr(node.type, "id", "") if node.type else "Exception"
                found |= {function.name} if name in ("Exception", "BaseException") else set()
    assert found <= BROAD
    assert not of_kind(ast.Global, ast.Nonlocal, ast.Assert)


def top_names(node):
    """What a statement of the module defines."""
    targets = [*getattr(node, "targets", ()), getattr(node, "target", None)]
    names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]
    return list(filter(None, names))


def test_one_direction_and_nothing_is_defined_twice():
    """A function's names are defined in its section, or in one before it."""
    def section_of(node):
        return max((number for number, _, line in BANNERS if line <= node.lineno), default=0)

    section, found = {}, []
    for node in tree().body:
        for name in top_names(node):
            section.setdefault(name, section_of(node))
    for node in tree().body:
        used = {name.id for name in ast.walk(node)
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load)}
        found += [f"{getattr(node, 'name', node.lineno)} uses {name}" for name in used
                  if section.get(name, 0) > section_of(node)]
    assert sorted(set(found)) == []
    names = [name for node in tree().body for name in top_names(node)]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_this_file_follows_its_own_rules():
    text = pathlib.Path(__file__).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            assert getattr(node.func, "attr", getattr(node.func, "id", "")) != "sleep"
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 70, node.name
    for lines in (text.splitlines(), LINES):
        assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []
    names = [name for node in ast.parse(text).body for name in top_names(node)]
    assert [name for name in set(names) if names.count(name) > 1] == []
