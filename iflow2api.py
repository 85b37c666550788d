#!/usr/bin/env python3
"""iflow2api: one file between any AI client and any OpenAI-compatible model.

    curl -O https://raw.githubusercontent.com/iflow2api/iflow2api/main/iflow2api.py
    python iflow2api.py --upstream https://api.deepseek.com --api-key '$DEEPSEEK_API_KEY'
    curl http://127.0.0.1:28000/v1/chat/completions -d '{"model": "deepseek-chat",
         "messages": [{"role": "user", "content": "hi"}]}'

Chat Completions is the hub.  A dialect turns its request into a chat request and chat chunks into
its own events; nothing else in the file knows that there is more than one.

The way of one request:

    1 socket -> Handler.handle_one_request   head, body: bounded, timed, strict
    2 ROUTES[method, path] -> endpoint       names its dialect
    3 Handler.admit                          Host, Origin, client key -> 401 / 403
    4 Router.resolve(model)                  the chain of (provider, model) to try
    5 dialect.turn(call, target)             the bytes for this upstream; pure
    6 Upstream.open(…) -> Exchange           waits on the upstream and on the client at once
    7 turn.stream().feed(payload)            bytes for the client; pure
    8 Sink.send(bytes)                       a client that is gone closes hop 6

A plain answer takes the same road with turn.reply() in place of 7.  An error is an exception until
it reaches Handler.send_error_of (or Sink.fail, once an answer has begun): only there it becomes bytes.

Contents

    1  Preamble          versions, imports, what the process needs
    2  Constants         names, limits and their reasons
    3  Errors            one tree
    4  Small tools       ids, redaction, files
    5  Settings          settings, config.json, providers, routes
    6  Chat and SSE      the hub: parsing, holding back, usage (pure)
    7  Anthropic Messages  requests, answers, streams, errors (pure)
    8  OpenAI Responses  the other API, and what Codex needs of it (pure)
    9  Dialects          what an endpoint speaks (pure)
    10 Upstream          connections, TLS, proxies, waiting
    11 Credentials       logging in, refreshing, accounts, the browser
    12 Services          slots, keys, metrics, file watching
    13 Gateway           owns 5 and 10 to 12; one call from route to answer
    14 HTTP              server, handler, routes of the URL space, errors as bytes
    15 Documents         OpenAPI 3.1 and its readers
    16 Admin             the page, who may see it, and its JSON API
    17 Demo upstream     what `--demo` talks to, and the tests
    18 Command line      one cmd_* each

Embedding: `server = serve(Gateway(Settings(providers=[…])), port=0)`, then server.url, server.close().
"""
# === 1. Preamble =============================================================

from __future__ import annotations

import os
import sys

if sys.version_info < (3, 9):
    sys.exit("iflow2api needs Python 3.9 or newer; this is %d.%d." % sys.version_info[:2])


def _serve_from_byte_code(code: Any, source: str) -> None:
    """Replace a process that is about to serve by one that runs this file's byte code: it takes 10 MB less.

    Python caches no script, only imports, and keeps a script's syntax tree until it ends.  The byte code lies in our
    own folder.  Without `site`, which nothing here needs, the second start is nearly free.  Where any of it can't be
    had (Windows, a read-only home) the program goes on as it is.
    """
    if os.name != "posix" or source.endswith(".pyc") or sys.flags.interactive:
        return
    folder = os.environ.get("IFLOW2API_CONFIG_DIR") or os.path.join("~", ".iflow2api")
    for word, following in zip(sys.argv, sys.argv[1:] + [""]):
        if word.partition("=")[0] == "--config-dir":
            folder = word.partition("=")[2] or following
    cached = os.path.join(os.path.expanduser(folder), "cache", str(sys.implementation.cache_tag), "iflow2api.pyc")
    try:
        import marshal
        from importlib.util import MAGIC_NUMBER
        facts = os.stat(source)
        head = MAGIC_NUMBER + bytes(4) + (int(facts.st_mtime) & 0xFFFFFFFF).to_bytes(4, "little") + (
            facts.st_size & 0xFFFFFFFF).to_bytes(4, "little")
        if not os.path.exists(cached) or open(cached, "rb").read(16) != head or os.stat(cached).st_uid != os.getuid():
            os.makedirs(os.path.dirname(cached), mode=0o700, exist_ok=True)
            with open(f"{cached}.{os.getpid()}", "wb") as file:
                file.write(head + marshal.dumps(code))
            os.replace(f"{cached}.{os.getpid()}", cached)
        os.execv(sys.executable, [sys.executable, "-S", cached, *sys.argv[1:]])
    except (OSError, ValueError, ImportError):
        return


if __name__ == "__main__" and (not sys.argv[1:] or sys.argv[1] == "serve" or sys.argv[1][:2] == "--") and not (
        {"-h", "--help", "--version"} & set(sys.argv)):
    _serve_from_byte_code(sys._getframe().f_code, __file__)

#: Modules that OpenWrt's python3-light leaves to packages of their own (package lists of 21.02 to 25.12).
OPENWRT_PACKAGE = {"urllib": "python3-urllib", "email": "python3-urllib", "_ssl": "python3-openssl",
                   "_hashlib": "python3-openssl", "ssl": "python3-openssl", "logging": "python3-logging"}

try:
    import base64
    import codecs
    import contextlib
    import errno
    import hashlib
    import heapq
    import hmac
    import http.client
    import http.server
    import json
    import logging
    import re
    import secrets
    import select
    import selectors
    import signal
    import socket
    import socketserver
    import ssl
    import struct
    import threading
    import time
    import urllib.parse
    import zlib
    from bisect import bisect_left
    from collections import deque
    from dataclasses import dataclass, field, fields, replace
    from datetime import datetime, timezone
    from email.utils import formatdate, parsedate_to_datetime
    from fnmatch import fnmatchcase
    from functools import cached_property, lru_cache
    from typing import (Any, Callable, Collection, Deque, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional,
                        Sequence, Set, Tuple, Type, Union)
except ImportError as exc:
    _missing = (exc.name or "").split(".")[0]
    sys.exit("iflow2api needs the Python module '%s'. On OpenWrt install it with: opkg install %s (or apk add); "
             "elsewhere Python itself is incomplete." % (exc.name, OPENWRT_PACKAGE.get(_missing, "python3")))

__version__ = "0.1.0"
__all__ = ["Gateway", "Settings", "serve", "main", "GatewayError", "__version__"]

Json = Dict[str, Any]

log = logging.getLogger("iflow2api")
log.addHandler(logging.NullHandler())

#: A JSON text of 10 000 levels kills a thread with a 1 MiB stack on 3.13 (128 KiB on musl is far worse);
#: with 2 MiB it raises RecursionError.  The memory is virtual, not resident.
THREAD_STACK_BYTES = 2 << 20


def prepare_process() -> None:
    """What a server needs of its process; called by `serve` and `main`, so that an import changes nothing."""
    threading.stack_size(max(threading.stack_size(), THREAD_STACK_BYTES))
    try:
        "a".encode("idna")
    except LookupError:                  # OpenWrt without python3-codecs: getaddrinfo and ssl ask for idna
        codecs.register(lambda name: codecs.lookup("ascii") if name == "idna" else None)
    try:
        import resource
    except ImportError:                  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:     # 1000 streams need over 2000 descriptors
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# === 2. Constants ============================================================

#: The program's own folder and the iFlow CLI's; `--config-dir` and IFLOW2API_CONFIG_DIR move the first.
CONFIG_DIR = os.path.join("~", ".iflow2api")

#: Environment variables of settings are this plus the key in upper case.
ENV_PREFIX = "IFLOW2API_"

class Model(NamedTuple):
    """What is known of a model: tokens of context, most tokens of an answer, whether it takes images."""
    title: str
    context: int
    max_output: int
    vision: bool = False


#: iFlow's models (its /models can't be relied on), with what its platform allows.
IFLOW_MODELS = {
    "glm-4.6": Model("GLM 4.6", 200_000, 32_000),
    "glm-4.7": Model("GLM 4.7", 200_000, 32_000),
    "glm-5": Model("GLM 5", 200_000, 32_000),
    "iFlow-ROME-30BA3B": Model("iFlow ROME", 256_000, 64_000),
    "deepseek-v3.2-chat": Model("DeepSeek V3.2", 128_000, 8_192),
    "qwen3-coder-plus": Model("Qwen3 Coder Plus", 256_000, 64_000),
    "kimi-k2": Model("Kimi K2", 128_000, 32_000),
    "kimi-k2-0905": Model("Kimi K2 0905", 256_000, 32_000),
    "kimi-k2-thinking": Model("Kimi K2 Thinking", 256_000, 32_000),
    "kimi-k2.5": Model("Kimi K2.5", 256_000, 32_768),
    "minimax-m2.5": Model("MiniMax M2.5", 200_000, 64_000),
    "qwen-vl-max": Model("Qwen VL Max", 128_000, 8_192, True)}

IFLOW_BASE_URL = "https://apis.iflow.cn/v1"

#: The iFlow CLI's own file.
IFLOW_FILE = os.path.join("~", ".iflow", "settings.json")

#: The iFlow CLI's variables, the first that is set.
IFLOW_KEY_VARIABLES = ("IFLOW_apiKey", "IFLOW_API_KEY", "iflow_apiKey", "iflow_API_KEY")
IFLOW_URL_VARIABLES = ("IFLOW_baseUrl", "IFLOW_BASE_URL", "iflow_baseUrl", "iflow_BASE_URL")

#: Beside the CLI's file: who holds it may refresh the login in there.
IFLOW_LOCK = ".iflow2api.lock"

#: Opens the models that iFlow keeps for its CLI.
IFLOW_AGENT = "iFlow-Cli"

#: One line of an upstream's head; a request's whole head, and its header lines (nginx: 32 KiB, http.server: 100).
LINE_LIMIT = 65536
HEAD_LIMIT_BYTES = 65536
HEADERS_LIMIT = 200

#: An upstream's plain answer; embeddings of a large batch stay below it.
ANSWER_LIMIT_BYTES = 256 << 20

#: An upstream's error page is read this far.
REFUSAL_LIMIT_BYTES = 1 << 20

#: A record of an event stream that never ends is passed on, or given up, at this size.
RECORD_LIMIT_BYTES = 8 << 20

#: A time limit beyond this (three weeks) is a mistake, and more milliseconds than poll() can count.
LONGEST_S = 2_000_000

#: A kept client connection without a request is closed after this (nginx: 75 s, Node: 5 s).
CLIENT_IDLE_S = 75

#: A kept upstream connection is not used again after this: most servers close theirs at 60 s or later.
UPSTREAM_IDLE_S = 45

#: One that was used within this time is taken as it is: a closed one is found out soon enough, and replaced.
FRESH_S = 1.0

#: How long a client that still sends is listened to after its answer: closing at once could destroy that.
LINGER_S = 2

#: Slowest body that is not taken for a slow loris, beyond `body_timeout_s`.
BODY_BYTES_PER_S = 16 << 10

#: A key that was refused, or that ran into a limit without saying for how long, rests.
REFUSED_KEY_REST_S = 300
LIMITED_KEY_REST_S = 30
LONGEST_REST_S = 3600                    # whatever an upstream's Retry-After says

#: `Retry-After` where a 429 came without one: Codex gives up at once on a bare 429.
DEFAULT_RETRY_AFTER_S = 5

#: A provider's own model list is asked for this often, and waited for this long.
MODELS_TTL_S = 300
MODELS_TIMEOUT_S = 5

#: Engines on this machine are looked for this often, and waited for this long: they are near.
LOCAL_TTL_S = 30
LOCAL_TIMEOUT_S = 1

#: What `retry` and `circuit` are without the user's word.  No retries: clients make their own, and ours would multiply them.
RETRY = {"count": 0, "backoff_s": 0.5, "max_backoff_s": 10, "total_s": 60}
CIRCUIT = {"failures": 5, "rest_s": 30}

#: The same target is asked again on these, where `retry` says so; the rest will not get better by waiting.
RETRY_STATUS = frozenset((408, 409, 425, 429)) | frozenset(range(500, 600))

#: Seconds that the limits of a client key or an address look back: requests a minute, hour and day, tokens a day.
LIMIT_SPANS = {"rpm": 60, "rph": 3600, "rpd": 86400, "tpd": 86400}
LIMIT_WORDS = {"rpm": "requests a minute", "rph": "requests an hour", "rpd": "requests a day", "tpd": "tokens a day",
               "concurrency": "requests at once"}

#: Addresses whose requests are counted; beyond it the one not seen for longest is forgotten.
ADDRESSES_LIMIT = 10_000

#: Rows of the usage table: names come from clients, so beyond these a day's rest is counted as "other".
USAGE_ROWS_A_DAY, USAGE_ROWS = 500, 20_000

#: The next target of a chain is tried on these; 401 and 403 mean that all keys were refused.
FALLBACK_STATUS = frozenset((401, 402, 403, 408, 409, 425, 429)) | frozenset(range(500, 600))

#: A key rests and the next one is tried on these.
KEY_STATUS = (401, 403, 429)

#: Names that Messages and Responses clients insist on; they become `default_model`.
FOREIGN_MODELS = ("claude-*", "gpt-*", "codex-*", "o1*", "o3*", "o4*")

#: Claude Code's tiers -> a name of each that it knows; its gateway discovery keeps only ids with claude or anthropic.
CLAUDE_MODELS = {"OPUS": "claude-opus-4-8", "SONNET": "claude-sonnet-4-6", "HAIKU": "claude-haiku-4-5"}

#: The page: sessions at once, how long one lasts, and how long when nobody uses it.
SESSIONS_LIMIT, SESSION_S, SESSION_IDLE_S = 64, 30 * 86400, 7 * 86400

#: Wrong passwords within SIGN_IN_SPAN_S seconds after which an address, and everybody, has to wait.
SIGN_IN_SPAN_S, SIGN_IN_TRIES, SIGN_IN_TRIES_OF_ALL = 300, 10, 60
SIGN_IN_ADDRESSES = 1000

#: Characters of a password: below the first anybody guesses it, beyond the second nobody types it.
PASSWORD_LENGTH = (8, 1024)

#: Letters of a one-time code: none that looks like another.
CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"

#: What the page may send, the playground apart; who may watch at once; log lines kept for it, and how much of each.
ADMIN_BODY_BYTES, VIEWERS_LIMIT, LOG_LINES, LOG_LINE_CHARS = 1 << 20, 16, 10_000, 4000

#: Label sets of a metric family beyond this are counted as "other": names come from clients.
METRIC_SERIES_LIMIT = 500

#: A client's header reaches a chat upstream unless its name says that it is hop-by-hop (RFC 9110, 7.6.1), ours,
#: a proxy's, a browser's, or looks like a secret.
HEADER_STAYS = re.compile(
    r"(connection|keep-alive|te|trailer|transfer-encoding|upgrade|host|expect|via|forwarded|origin|referer|accept.*|"
    r"content-.*|proxy-.*|x-forwarded-.*|x-real-ip|cf-.*|sec-.*|access-control-.*|anthropic-.*|originator|"
    r".*(auth|cookie|secret|token|password|credential|session|api-?key|signature).*)")

#: Of an upstream's answer these reach the client.
HEADER_RETURNS = re.compile(r"(x-ratelimit-.*|openai-.*|retry-after(-ms)?|x-should-retry)")


# === 3. Errors ===============================================================

class GatewayError(Exception):
    """Whatever a client has to be told: a status, a wire code and one sentence.

    Dialects turn it into bytes (section 9), the HTTP section sends them; nobody else does either.
    `code` and `param` are OpenAI's fields, `should_retry` becomes `x-should-retry`, `retry_after_s`
    becomes `Retry-After`, `body` is the upstream's own error object where it had one, and
    `overflow` is (prompt tokens, limit, output tokens) of a prompt too long for the model, 0 where unknown.
    """
    status = 500
    type = "server_error"
    code: Optional[str] = None
    should_retry: Optional[bool] = None
    retry_after_s: Optional[float] = None

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.param: Optional[str] = None
        self.body: Optional[Json] = None
        self.allow: Sequence[str] = ()
        self.overflow: Optional[Tuple[int, int, int]] = None
        for name, value in facts.items():
            setattr(self, name, value)


class BadRequest(GatewayError):
    """The client's JSON, fields or HTTP."""
    status, type = 400, "invalid_request_error"


class Unauthorized(GatewayError):
    """The client's own key is missing or wrong."""
    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(GatewayError):
    """A Host or Origin that may not talk to us."""
    status, type, should_retry = 403, "permission_error", False


class NotFound(GatewayError):
    """No such path, model or stored thing."""
    status, type = 404, "invalid_request_error"


class Conflict(GatewayError):
    """Somebody else has changed, in the meantime, what was to be written; or the name is taken."""
    status, type, code = 409, "invalid_request_error", "conflict"


class RateLimited(GatewayError):
    """Our own limiter; the upstream's 429 is an UpstreamRefused."""
    status, type, code, retry_after_s = 429, "rate_limit_error", "rate_limit_exceeded", 5


class Busy(GatewayError):
    """Our queue or connection limit is reached, or we are shutting down."""
    status, type, code, retry_after_s = 503, "server_error", "server_is_overloaded", 2


class NotLoggedIn(GatewayError):
    """We hold no credential that could serve this; the text says what to run."""
    status, type, should_retry = 403, "permission_error", False


class LoginFailed(GatewayError):
    """Logging in or refreshing did not work; the text says why, in one sentence, and what was kept.

    `refused`: the login host answered and said no.  `dead`: only a new login helps.
    """
    status, type, should_retry = 403, "permission_error", False
    refused = dead = False


class UpstreamError(GatewayError):
    """The upstream's fault; `provider` names it once the transport knows."""
    status = 502


class UpstreamRefused(UpstreamError):
    """An answer of the upstream that is an error: its status, message and body are passed on."""


class UpstreamTimeout(UpstreamError):
    """It accepted the request and then said nothing for too long."""
    status, type = 504, "timeout_error"


class UpstreamUnreachable(UpstreamError):
    """No connection: refused, unknown host, TLS, proxy."""


class UpstreamGarbled(UpstreamError):
    """Not JSON, not SSE, empty, or cut off."""


class UsageError(Exception):
    """A mistake on the command line: one line on stderr, exit status 2."""


class ClientGone(Exception):
    """The client hung up; nobody is left to be told."""


# === 4. Small tools ==========================================================

_SECRET = re.compile(r"(?i)\b(bearer\s+|sk-|api[-_]?key[\"'=:\s]+|access_?token=)[^\s\"'&,;@]{4,}")
_USERINFO = re.compile(r"://([^/\s:@]*:)?[^\s\"'&,;@]*(?=@)")     # user and password in a URL, not its port
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def new_id(prefix: str) -> str:
    """`prefix` and 24 random hex digits."""
    return prefix + secrets.token_hex(12)


def mask(secret: str) -> str:
    """Enough of a key to recognise it, not to use it."""
    return secret[:3] + "…" + secret[-4:] if len(secret) >= 16 else "…" if secret else ""


def redact(text: str) -> str:
    """`text` without what looks like a credential."""
    text = _SECRET.sub(lambda found: found.group(1) + "…", text)
    return _USERINFO.sub(lambda found: f"://{found.group(1) or ''}…", text) if "@" in text else text


def one_line(text: Any, limit: int = 300) -> str:
    """`text` fit for a log line or an error: no control or direction characters, not too long, no credential."""
    line = _CONTROL.sub(" ", redact(str(text))).strip()
    return line if len(line) <= limit else line[:limit - 1] + "…"


def near_names(name: str, names: Iterable[str], cutoff: float = 0.5) -> List[str]:
    """The up to three of `names` that a mistyped `name` may have meant."""
    import difflib                       # only on the way to an error message
    return difflib.get_close_matches(name, list(names), 3, cutoff)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """`; did you mean …?` for a mistyped name, empty where nothing is near."""
    near = near_names(name, names, cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def is_loopback(host: str) -> bool:
    """Whether `host` (a literal or localhost name, without port) can only be this machine."""
    host = host.strip("[]").lower().rstrip(".")
    return host in ("localhost", "::1", "0:0:0:0:0:0:0:1") or host.endswith(".localhost") or (
        re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None)


#: Why a file can't be replaced but may be written: a bind mount, another device, a folder that is not ours.
_IRREPLACEABLE = {getattr(errno, name, None) for name in ("EBUSY", "EXDEV", "EPERM", "EACCES", "EROFS")}


def write_file(path: str, data: bytes) -> None:
    """Write `data` so that a crash leaves the old file or the new one, readable by the owner alone.

    A link is followed; a file that can't be replaced (bind mount) is written in place.
    """
    path = os.path.realpath(path)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    temp = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        _sync_folder(os.path.dirname(path))
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        if exc.errno not in _IRREPLACEABLE or not os.path.isfile(path):
            raise
        with open(path, "r+b") as file:
            file.write(data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())


def _sync_folder(folder: str) -> None:
    """Make a rename durable where folders can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_stamp(path: str) -> Tuple[int, ...]:
    """Changes when the file does; () where there is none."""
    try:
        facts = os.stat(path)
    except OSError:
        return ()
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


class Cipher:
    """Authenticated encryption out of the standard library alone, which has no cipher.

    HMAC-SHA-256 in counter mode makes the key stream; the tag covers nonce and cipher text (encrypt-then-MAC).  The
    nonce is a MAC of the text itself, as in SIV: no randomness is needed, two different texts never share a key
    stream, and the same text is sealed to the same bytes.  All a bystander learns is that two texts are the same.
    """
    NONCE_BYTES, TAG_BYTES = 16, 32

    def __init__(self, key: bytes, purpose: bytes) -> None:
        """`purpose` keeps apart what one key is used for."""
        self._cipher_key, self._tag_key, self._nonce_key = (
            hmac.digest(key, purpose + use, "sha256") for use in (b"cipher", b"tag", b"nonce"))

    def seal(self, plain: bytes) -> bytes:
        nonce = hmac.digest(self._nonce_key, plain, "sha256")[:self.NONCE_BYTES]
        sealed = nonce + self._mask(nonce, plain)
        return sealed + hmac.digest(self._tag_key, sealed, "sha256")

    def open(self, data: bytes) -> Optional[bytes]:
        """What was sealed; None: with another key, or damaged."""
        sealed, tag = data[:-self.TAG_BYTES], data[-self.TAG_BYTES:]
        if len(sealed) < self.NONCE_BYTES or not hmac.compare_digest(hmac.digest(self._tag_key, sealed, "sha256"), tag):
            return None
        return self._mask(sealed[:self.NONCE_BYTES], sealed[self.NONCE_BYTES:])

    def _mask(self, nonce: bytes, data: bytes) -> bytes:
        """`data` XOR key stream; as two big integers, since a loop over bytes takes thirty times as long."""
        blocks = range((len(data) + 31) // 32)
        stream = b"".join(hmac.digest(self._cipher_key, nonce + block.to_bytes(8, "big"), "sha256") for block in blocks)
        masked = int.from_bytes(data, "big") ^ int.from_bytes(stream[:len(data)], "big")
        return masked.to_bytes(len(data), "big")


def encode_base64(data: bytes) -> str:
    """For texts that have to survive any channel: the URL alphabet, no padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode_base64(text: str) -> Optional[bytes]:
    """The inverse; b64decode skips foreign characters and spare bits, but only the one true spelling counts."""
    try:
        data = base64.b64decode(text + "==", b"-_")
    except ValueError:
        return None
    return data if encode_base64(data) == text else None


class FileLock:
    """One holder at a time among processes and threads: each open file counts.  Who is killed holds no longer.

    The file stays: removing it would let two processes lock two files of the same name.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path, self._timeout_s, self._fd = path, timeout_s, -1

    def __enter__(self) -> "FileLock":
        """OSError where the file can't be made; TimeoutError, which is one, when another holds it for too long."""
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        until, pause = time.monotonic() + self._timeout_s, threading.Event()
        try:
            while not self._take(fd):
                if time.monotonic() >= until:
                    text = f"another process has held {self.path} for {self._timeout_s:g} s"
                    raise TimeoutError(errno.ETIMEDOUT, text)
                pause.wait(0.02)
            self._fd = fd
        finally:
            if self._fd != fd:
                os.close(fd)
        return self

    @staticmethod
    def _take(fd: int) -> bool:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)           # type: ignore[attr-defined]
            else:
                import fcntl
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                return False
            if exc.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                raise                    # those four: a file system that knows no locks
        return True

    def __exit__(self, *exc: Any) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)                     # lets go, too


# === 5. Settings =============================================================

def setting(kind: str, default: Any, zh: str, en: str, **facts: Any) -> Any:
    """A field of `Settings`; its metadata serve file, environment, flags, help and forms alike.

    `kind`: str, int, float, bool, list or dict.  `facts`: flag, low, high, choices, secret, restart
    (takes effect at the next start), older (a name of the older program, kept for it).
    """
    metadata = {"kind": kind, "label": (zh, en), **facts}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Everything the user can change.  Frozen: a request works on the snapshot it started with."""
    host: str = setting("str", "127.0.0.1", "监听地址", "address to listen on", flag="--host", restart=True)
    port: int = setting("int", 28000, "端口，0 表示自动选择", "port; 0 picks a free one", flag="--port", low=0, high=65535,
                        restart=True)
    providers: List[Any] = setting("list", [], "上游列表", "upstreams: name, base_url, api_keys, …")
    default_provider: str = setting("str", "", "默认上游", "where names go that nothing else claims")
    aliases: Dict[str, Any] = setting("dict", {}, "模型别名",
                                      "shell pattern -> model, or list of models to try, with conditions")
    default_model: str = setting("str", "", "默认模型", "for requests without a model and for foreign names",
                                 flag="--model")
    api_concurrency: int = setting("int", 1, "每个 iFlow 账号的并发数，0 为不限",
                                   "requests at once for each iFlow account; 0: no limit",
                                   low=0)
    retry: Dict[str, Any] = setting("dict", {}, "重试",
                                    "count, backoff_s, max_backoff_s, total_s: asking a failed upstream again")
    circuit: Dict[str, Any] = setting("dict", {}, "熔断",
                                      "failures in a row after which an upstream rests for rest_s; 0: never")
    sticky: bool = setting("bool", False, "同一会话使用同一密钥", "keys by conversation instead of in turn, for the prefix cache")
    client_keys: List[Any] = setting("list", [], "客户端密钥列表",
                                     "keys for clients, made by `key add`: name, sha256, models, limits")
    address_limits: Dict[str, Any] = setting("dict", {}, "按地址限流",
                                             "limits of each address: rpm, rph, rpd, tpd, concurrency")
    usage: bool = setting("bool", True, "记录用量", "count tokens and requests, in usage.jsonl")
    usage_days: int = setting("int", 92, "用量保留天数", "days that usage is kept", low=1, high=3660)
    prices: Dict[str, Any] = setting("dict", {}, "价格", "model pattern -> {input, output, cached} for a million tokens")
    history_size: int = setting("int", 200, "请求历史条数", "requests remembered, without their bodies", low=0, high=10000)
    custom_api_key: str = setting("str", "", "客户端密钥", "the key that clients must send", secret=True)
    admin_password: str = setting("str", "", "管理页面密码", "of the page: a hash, made there or by `admin reset-password`",
                                  secret=True)
    custom_auth_header: str = setting("str", "", "额外读取密钥的请求头", "an extra header to read the client key from")
    allowed_hosts: List[Any] = setting("list", [], "允许的 Host", "Host names allowed besides this machine's own")
    allowed_origins: List[Any] = setting("list", [], "允许的 Origin", "web origins that may call without a key")
    trusted_proxies: List[Any] = setting("list", [], "可信代理", "addresses whose X-Forwarded-For is believed")
    preserve_reasoning_content: bool = setting("bool", False, "保留 reasoning_content",
                                               "iFlow: keep reasoning in its own field")
    vision_model: str = setting("str", "qwen-vl-max", "识图模型", "iFlow: takes requests with images")
    vision_mode: str = setting("str", "route", "识图方式", "iFlow: route images to vision_model, or pass them on",
                               choices=("route", "pass"))
    upstream_proxy: str = setting("str", "", "上游代理", "http://, socks5://, socks5h:// or env", secret=True)
    upstream_proxy_enabled: bool = setting("bool", False, "启用上游代理", "use upstream_proxy")
    ca_file: str = setting("str", "", "额外的 CA 证书", "a file with further trust anchors (PEM)")
    connect_timeout_s: float = setting("float", 10, "连接超时", "upstream: to connect", low=0.1)
    first_byte_timeout_s: float = setting("float", 300, "首字节超时", "upstream: to the first byte of an answer", low=0.1)
    idle_timeout_s: float = setting("float", 300, "空闲超时", "upstream: silence within an answer", low=0.1)
    header_timeout_s: float = setting("float", 15, "请求头超时", "client: to send a request's head", low=0.1)
    body_timeout_s: float = setting("float", 60, "请求体超时", "client: to send a body, plus a second for each 16 KiB",
                                    low=0.1)
    write_timeout_s: float = setting("float", 60, "写超时", "client: to take what we send", low=0.1)
    body_limit_bytes: int = setting("int", 64 << 20, "请求体上限", "largest request body", low=1024)
    max_connections: int = setting("int", 2000, "最大连接数", "client connections at once", low=1)
    queue_limit: int = setting("int", 64, "排队上限", "requests waiting for a place at one upstream", low=0)
    queue_timeout_s: float = setting("float", 300, "排队超时", "longest wait for a place", low=0.1)
    keepalive_s: float = setting("float", 10, "保活间隔", "silence on a stream before a keep-alive", low=0.05)
    drain_s: float = setting("float", 10, "退出等待", "time for running answers to end when stopping", low=0)
    detect_local: bool = setting("bool", True, "自动发现本地引擎", "look for local engines when nothing else is there")
    docs_cdn: bool = setting("bool", True, "文档页使用 CDN",
                             "/docs and /redoc: Swagger UI and ReDoc from jsdelivr; else the built-in reader alone")
    language: str = setting("str", "", "语言", "zh or en; empty: by locale", choices=("", "zh", "en"))
    theme_mode: str = setting("str", "system", "主题", "of the page", choices=("system", "light", "dark"))
    log_level: str = setting("str", "info", "日志级别", "debug, info, warning or error", flag="--log-level",
                             choices=("debug", "info", "warning", "error"))
    log_file: str = setting("str", "", "日志文件", "a file to log to as well", restart=True)
    responses_file: str = setting("str", "", "Responses 存档文件", "keep answers of Responses over a restart in this file",
                                  restart=True)
    iflow_auth_url: str = setting("str", "https://iflow.cn/oauth", "iFlow 授权地址", "iFlow: where the browser logs in")
    iflow_token_url: str = setting("str", "https://iflow.cn/oauth/token", "iFlow 令牌地址", "iFlow: where tokens come from")
    iflow_userinfo_url: str = setting("str", "https://iflow.cn/api/oauth/getUserInfo", "iFlow 用户信息地址",
                                      "iFlow: where the API key comes from")
    oauth_client_id: str = setting("str", "10009311001", "OAuth 客户端 ID", "iFlow: id of the installed application")
    oauth_client_secret: str = setting("str", "4Z3YjXycVsQvyGF1etiNlIBB4RsqSDtW", "OAuth 客户端密钥",
                                       "iFlow: published in every copy of its CLI (RFC 8252, 8.5)", secret=True)
    accounts: Dict[str, Any] = setting("dict", {}, "更多 iFlow 账号", "iFlow: what `login --account` keeps")
    encrypt_secrets: bool = setting("bool", True, "加密保存密钥", "keep keys and tokens encrypted in config.json")
    api_key: str = setting("str", "", "iFlow 密钥", "iFlow: key of the model API", secret=True)
    base_url: str = setting("str", "", "iFlow 接口地址", "iFlow: its chat API")
    auth_type: str = setting("str", "", "iFlow 登录方式", "iFlow: openai-compatible makes it a plain provider", older=True)
    auto_start: bool = setting("bool", False, "开机启动", "of the older program", older=True)
    start_minimized: bool = setting("bool", False, "最小化启动", "of the older program", older=True)
    close_action: str = setting("str", "", "关闭窗口时", "of the older program", older=True)
    check_update_on_startup: bool = setting("bool", False, "启动时检查更新", "of the older program", older=True)


SETTING = {item.name: item for item in fields(Settings)}

#: Where a form shows each setting.
SETTING_GROUPS: Dict[str, Tuple[str, ...]] = {
    "server": ("host", "port", "admin_password", "header_timeout_s", "body_timeout_s", "write_timeout_s",
               "body_limit_bytes", "max_connections", "keepalive_s", "drain_s", "encrypt_secrets", "auto_start",
               "start_minimized", "close_action", "check_update_on_startup"),
    "upstream": ("providers", "default_provider", "aliases", "default_model", "retry", "circuit", "sticky",
                 "upstream_proxy", "upstream_proxy_enabled", "ca_file", "connect_timeout_s", "first_byte_timeout_s",
                 "idle_timeout_s", "queue_limit", "queue_timeout_s", "detect_local"),
    "clients": ("custom_api_key", "custom_auth_header", "client_keys", "address_limits", "allowed_hosts",
                "allowed_origins", "trusted_proxies", "responses_file"),
    "iflow": ("api_key", "base_url", "auth_type", "accounts", "api_concurrency", "preserve_reasoning_content",
              "vision_model", "vision_mode", "iflow_auth_url", "iflow_token_url", "iflow_userinfo_url",
              "oauth_client_id", "oauth_client_secret"),
    "logs": ("log_level", "log_file", "history_size", "usage", "usage_days", "prices"),
    "appearance": ("language", "theme_mode", "docs_cdn")}
_KINDS = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict}
_KIND_NAME = {"str": "a string", "int": "a whole number", "float": "a number", "bool": "true or false",
              "list": "a list",
              "dict": "an object"}
_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def default_of(name: str) -> Any:
    """The default value of a setting, a fresh one where it is a list or an object."""
    return getattr(Settings(), name)


def check_setting(name: str, value: Any) -> Any:
    """`value` as the setting's kind; ValueError says what was expected instead."""
    facts = SETTING[name].metadata
    kind = facts["kind"]
    if not isinstance(value, _KINDS[kind]) or isinstance(value, bool) is not (kind == "bool"):
        hidden = facts.get("secret") or isinstance(value, (list, dict))      # problems are shown on /health
        raise ValueError(f"{_KIND_NAME[kind]} expected" + ("" if hidden
                                                           else f", not {one_line(json.dumps(value), 60)}"))
    if "choices" in facts and value not in facts["choices"]:
        raise ValueError(f"one of {', '.join(c or chr(34) * 2 for c in facts['choices'])} expected")
    if kind == "float" and not abs(value) <= LONGEST_S:
        raise ValueError(f"a number of seconds up to {LONGEST_S} expected")
    if kind in ("int", "float") and not facts.get("low", value) <= value <= facts.get("high", value):
        limits = [f"{facts[end]} at {word}" for end, word in (("low", "least"), ("high", "most")) if end in facts]
        raise ValueError(f"a number of {', '.join(limits)} expected")
    if name in INNER_CHECKS:
        INNER_CHECKS[name](value)
    return value


def parse_setting(name: str, text: str) -> Any:
    """The value that `text` (a variable, a flag, an argument) stands for; lists and objects are JSON."""
    kind = SETTING[name].metadata["kind"]
    value: Any = text
    if kind == "bool":
        value = _TRUTH.get(text.strip().lower(), text)
    elif kind != "str":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{_KIND_NAME[kind]}{' as JSON' if kind in ('list', 'dict') else ''} expected") from None
    return check_setting(name, value)


class Loaded(NamedTuple):
    """Settings, where each value that is not a default came from, and what was wrong, a sentence each."""
    settings: Settings
    origins: Dict[str, str]
    problems: List[str]


def load_settings(raw: Json, environ: Mapping[str, str], flags: Mapping[str, Any],
                  last: Optional[Settings] = None) -> Loaded:
    """Settings out of flags > environment > file > defaults; a bad value leaves what stood below it.

    `last` are the settings in force, kept where a value of the file has become bad.
    """
    values: Json = {}
    origins: Dict[str, str] = {}
    problems: List[str] = []
    for name in SETTING:
        # a secret that can't be opened is named by the vault; of the client key its sealed text stays in force, for
        # else a server that wanted a key would suddenly want none
        locked = name != "custom_api_key" and SETTING[name].metadata.get("secret") and is_sealed(raw.get(name))
        if name in raw and not locked:
            try:
                values[name], origins[name] = check_setting(name, raw[name]), "file"
            except ValueError as exc:
                problems.append(f"config.json: {name}: {exc}")
                if last is not None:
                    values[name] = getattr(last, name)
                elif name == "client_keys":              # a typing error must not open the door
                    values[name] = raw[name] if isinstance(raw[name], list) and raw[name] else [None]
        variable = ENV_PREFIX + name.upper()
        if environ.get(variable):
            try:
                values[name], origins[name] = parse_setting(name, environ[variable]), "environment"
            except ValueError as exc:
                problems.append(f"{variable}: {exc}")
    values.update(flags)
    origins.update({name: "flag" for name in flags})
    return Loaded(Settings(**values), origins, problems)


# --- config.json -------------------------------------------------------------

class ConfigBroken(Exception):
    """config.json can't be read; the text says where and why."""


def read_json_file(path: str) -> Json:
    """The object in `path`, {} where there is no such file; ConfigBroken says what is wrong with it.

    A byte order mark is accepted: Notepad and PowerShell write one.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise ConfigBroken(f"{path}: {exc.strerror or exc}") from None
    try:
        text = data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
        value = json.loads(text)
    except json.JSONDecodeError as exc:
        raise ConfigBroken(f"{path}: line {exc.lineno}, column {exc.colno}: {exc.msg}") from None
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        column = exc.start - data.rfind(b"\n", 0, exc.start)
        raise ConfigBroken(f"{path}: line {line}, column {column}: not UTF-8 text") from None
    except (RecursionError, ValueError) as exc:
        raise ConfigBroken(f"{path}: line 1, column 1: {exc}") from None
    if not isinstance(value, dict):
        raise ConfigBroken(f"{path}: line 1, column 1: an object expected")
    return value


# --- secrets at rest -----------------------------------------------------------

SEALED = "enc:"
_REFERENCE = re.compile(r"\$[A-Za-z_]\w*")
_SECRET_HEADER = re.compile(r"(?i).*(auth|cookie|secret|token|password|credential|key).*")

#: Of an account these are secret.
LOGIN_SECRETS = ("apiKey", "searchApiKey", "oauth_access_token", "oauth_refresh_token")


def is_sealed(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(SEALED)


class SealBroken(ValueError):
    """A sealed value that can't be opened; the text says why, and names no secret."""


class Vault:
    """Keeps the secrets of config.json and its .bak encrypted: `enc:v1:PARAMETERS.KEY_ID.DATA`.

    It protects what leaves this machine without the key: a config.json shown in a bug report, synchronised, committed
    or backed up.  The key is `secret.key` beside it (random, 0600), so it does not protect against who can read the
    whole folder as this user or as root; with IFLOW2API_PASSPHRASE, from which the key is derived, it does, as long as
    the environment is safe.  The iFlow CLI's file is not ours and stays as the CLI reads it.  DATA is base64 of what
    Cipher makes; PARAMETERS are `k` (key file) or `pITERATIONS-SALT` (PBKDF2-HMAC-SHA-256).
    """
    PURPOSE = b"iflow2api secrets 1: "
    #: PBKDF2 takes about this long here, but never fewer rounds than the first (a router) nor more than the second.
    DERIVE_S, ITERATIONS = 0.2, (20_000, 2_000_000)

    def __init__(self, folder: str, environ: Optional[Mapping[str, str]] = None) -> None:
        self.key_path = os.path.join(folder, "secret.key")
        self._environ = os.environ if environ is None else environ
        self._derived: Dict[str, bytes] = {}     #: by PARAMETERS and passphrase: 0.2 s each
        self._parameters = ""                    #: of the passphrase, as found in the file, else made new

    def open(self, text: str) -> str:
        """The secret; SealBroken."""
        found = re.fullmatch(r"enc:v1:([^.]*)\.([^.]*)\.([^.]*)", text)
        if not found:
            newer = "" if text.startswith(SEALED + "v1:") else "a newer version encrypted it, or "
            raise SealBroken(newer + "it is damaged")
        parameters, key_id, body = found.groups()
        data = decode_base64(body)
        for key in self._keys(parameters):
            if self._id(key) == key_id:
                plain = None if data is None else Cipher(key, self.PURPOSE + parameters.encode()).open(data)
                if plain is None:
                    raise SealBroken("it is damaged")
                self._parameters = parameters if parameters != "k" else self._parameters
                return plain.decode("utf-8", "surrogatepass")
        raise SealBroken("it is encrypted with another passphrase, or damaged" if parameters != "k" else
                         f"it is encrypted with another key than {self.key_path} holds, or damaged")

    def seal(self, secret: str) -> str:
        """The text to store; OSError where there is no key and none can be made."""
        parameters, key = "k", b""
        if self._environ.get(ENV_PREFIX + "PASSPHRASE"):
            parameters = self._parameters = self._parameters or f"p{self.iterations()}-{secrets.token_hex(16)}"
            key = self._keys(parameters)[0]
        else:
            key = (self._filed_keys() or [self._make_key()])[0]
        data = Cipher(key, self.PURPOSE + parameters.encode()).seal(secret.encode("utf-8", "surrogatepass"))
        return f"{SEALED}v1:{parameters}.{self._id(key)}.{encode_base64(data)}"

    def renew(self) -> None:
        """A new key for what is sealed from now on; the old ones still open what they sealed."""
        self._parameters = ""
        if not self._environ.get(ENV_PREFIX + "PASSPHRASE"):
            write_file(self.key_path, secrets.token_bytes(32) + b"".join(self._filed_keys()))

    def drop_old_keys(self) -> None:
        """Once nothing is sealed with them any more."""
        keys = self._filed_keys()
        if len(keys) > 1:
            write_file(self.key_path, keys[0])

    @staticmethod
    def _id(key: bytes) -> str:
        """Tells a wrong key from a damaged value."""
        return hmac.digest(key, b"iflow2api key id", "sha256")[:6].hex()

    def _keys(self, parameters: str) -> List[bytes]:
        """The keys that may have sealed a value with these parameters; SealBroken."""
        if parameters == "k":
            try:
                return self._filed_keys()
            except OSError as exc:
                raise SealBroken(f"its key can't be read: {exc.strerror or exc}") from None
        found = re.fullmatch(r"p(\d{1,8})-([0-9a-f]{32})", parameters)
        if not found or not 1 <= int(found.group(1)) <= 10_000_000:
            raise SealBroken("it is damaged")
        passphrase = self._environ.get(ENV_PREFIX + "PASSPHRASE", "")
        if not passphrase:
            raise SealBroken(f"it is encrypted with a passphrase: set {ENV_PREFIX}PASSPHRASE")
        mark = parameters + passphrase
        if mark not in self._derived:
            self._derived[mark] = hashlib.pbkdf2_hmac("sha256", passphrase.encode("utf-8", "surrogateescape"),
                                                      bytes.fromhex(found.group(2)), int(found.group(1)))
        return [self._derived[mark]]

    def _filed_keys(self) -> List[bytes]:
        """The keys in the key file, the current one first; OSError where it is there and no key file."""
        try:
            with open(self.key_path, "rb") as file:
                data = file.read(32 * 64 + 1)
        except FileNotFoundError:
            return []
        if not data or len(data) % 32:
            raise OSError(errno.EINVAL, f"{self.key_path} is damaged: 32 bytes expected")
        return [data[at:at + 32] for at in range(0, len(data), 32)]

    def _make_key(self) -> bytes:
        key = secrets.token_bytes(32)
        write_file(self.key_path, key)
        return key

    @classmethod
    def iterations(cls) -> int:
        """Rounds that take about DERIVE_S on this machine."""
        started = time.perf_counter()
        hashlib.pbkdf2_hmac("sha256", b"measure", b"measure", cls.ITERATIONS[0])
        taken = max(time.perf_counter() - started, 1e-6)
        fewest, most = cls.ITERATIONS
        return max(fewest, min(most, int(fewest * cls.DERIVE_S / taken) // 1000 * 1000))


# --- the page's password --------------------------------------------------------

_PASSWORD_HASH = re.compile(r"pbkdf2-sha256\$([1-9]\d{0,7})\$([0-9a-f]{32})\$([0-9a-f]{64})")


def hash_password(password: str) -> str:
    """`pbkdf2-sha256$ITERATIONS$SALT$HASH`, as `admin_password` keeps it; ValueError for one too short or too long."""
    least, most = PASSWORD_LENGTH
    if not least <= len(password) <= most:
        raise ValueError(f"a password has from {least} to {most} characters")
    iterations, salt = Vault.iterations(), secrets.token_bytes(16)
    return f"pbkdf2-sha256${iterations}${salt.hex()}${_stretch(password, salt, iterations).hex()}"


def is_password(password: str, stored: str) -> bool:
    """Whether it is the one that hash_password made `stored` of."""
    found = _PASSWORD_HASH.fullmatch(stored)
    return found is not None and hmac.compare_digest(
        _stretch(password, bytes.fromhex(found.group(2)), int(found.group(1))), bytes.fromhex(found.group(3)))


def _stretch(password: str, salt: bytes, iterations: int) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", password.encode("utf-8", "surrogatepass"), salt, iterations)


def check_password_hash(value: str) -> None:
    if value and not _PASSWORD_HASH.fullmatch(value):
        raise ValueError("a hash expected, never the password itself; set it on the page, or by `admin reset-password`")


# --- secrets in config.json -------------------------------------------------------

def map_secrets(raw: Json, change: Callable[[str, str], str]) -> Json:
    """`raw` (config.json's object) with `change(place, secret)` in each secret's place; a new object.

    `$NAME` is no secret, only the name of one, and stays.
    """
    def on(place: str, value: Any) -> Any:
        return change(place, value) if isinstance(value, str) and value and not _REFERENCE.fullmatch(value) else value

    def on_members(place: str, value: Any, names: Callable[[str], Any]) -> Any:
        return {key: on(f"{place}.{key}", item) if names(key) else item for key, item in value.items()} if isinstance(
            value, dict) else value

    def in_provider(place: str, entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        entry = dict(entry)
        if isinstance(entry.get("api_keys"), list):
            entry["api_keys"] = [on(f"{place}.api_keys[{at}]", key) for at, key in enumerate(entry["api_keys"])]
        if "@" in str(entry.get("proxy")) or is_sealed(entry.get("proxy")):
            entry["proxy"] = on(f"{place}.proxy", entry["proxy"])
        if "headers" in entry:
            entry["headers"] = on_members(f"{place}.headers", entry["headers"], _SECRET_HEADER.fullmatch)
        return entry

    raw = on_members("", raw, lambda key: key in SETTING and SETTING[key].metadata.get("secret"))
    if isinstance(raw.get("providers"), list):
        raw["providers"] = [in_provider(f"providers[{at}]", entry) for at, entry in enumerate(raw["providers"])]
    if isinstance(raw.get("accounts"), dict):
        raw["accounts"] = {name: on_members(f"accounts.{name}", login, LOGIN_SECRETS.__contains__)
                           for name, login in raw["accounts"].items()}
    return raw


class ConfigFile:
    """config.json and its `.bak`: what we do not know in it survives, and a crash leaves one of the two whole.

    Who reads it sees secrets in clear, in the file they are sealed; one that can't be opened stays as it is.
    """

    def __init__(self, folder: str, environ: Optional[Mapping[str, str]] = None) -> None:
        self.folder = os.path.abspath(os.path.expanduser(folder))
        self.path = os.path.join(self.folder, "config.json")
        self.backup = self.path + ".bak"
        self.vault = Vault(self.folder, environ)
        self.locked: List[str] = []      #: the secrets that the last reading could not open, a sentence each
        self._lock = threading.RLock()

    def read(self) -> Json:
        """The file, its secrets opened; ConfigBroken."""
        return self._opened(read_json_file(self.path))

    def _opened(self, raw: Json) -> Json:
        locked: List[str] = []

        def open_it(place: str, secret: str) -> str:
            if not is_sealed(secret):
                return secret
            try:
                return self.vault.open(secret)
            except SealBroken as exc:
                locked.append(f"config.json: {place.lstrip('.')} can't be read: {exc}")
                return secret

        opened = map_secrets(raw, open_it)
        self.locked = locked
        return opened

    def _sealed(self, raw: Json) -> Json:
        """`raw` as it goes into the file."""
        if raw.get("encrypt_secrets") is False:
            return raw
        return map_secrets(raw, lambda place, secret: secret if is_sealed(secret) else self.vault.seal(secret))

    def _sealed_if_possible(self, raw: Json) -> Json:
        """A key file that is damaged or can't be made must not keep anybody from changing a setting."""
        try:
            return self._sealed(raw)
        except (OSError, SealBroken) as exc:
            log.warning("secrets in %s stay unencrypted: %s", self.path, getattr(exc, "strerror", None) or exc)
            return raw

    def recover(self) -> Tuple[Json, List[str]]:
        """The file, else its backup, else nothing; and what was wrong, a sentence each."""
        try:
            return self.read(), []
        except ConfigBroken as exc:
            problem = str(exc)
        try:
            raw = self._opened(read_json_file(self.backup)) if os.path.exists(self.backup) else None
        except ConfigBroken:
            raw = None
        if raw is None:
            return {}, [problem + " (running with defaults)"]
        return raw, [problem + f" (running with {os.path.basename(self.backup)})"]

    def change(self, edit: Callable[[Json], None]) -> None:
        """Let `edit` change the object in the file and write it; a file that did not parse is moved aside, not lost.

        Raises OSError where nothing can be written.
        """
        with self._lock, self.lock():
            raw, problems = self.recover()
            edit(raw)
            sealed = self._sealed_if_possible(raw)
            if problems and os.path.isfile(self.path):
                self._put_aside(f"{self.path}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
            elif os.path.isfile(self.path):
                self._back_up()
            write_file(self.path, self.to_bytes(sealed))

    def lock(self) -> Any:
        """One writer at a time; where there is no place for a lock (a lone bind-mounted file), the thread's must do."""
        lock = FileLock(os.path.join(self.folder, "config.lock"), 30.0)
        if os.path.isdir(self.folder) and not os.access(self.folder, os.W_OK):
            return contextlib.nullcontext()
        return lock

    @staticmethod
    def to_bytes(raw: Json) -> bytes:
        text = json.dumps(raw, ensure_ascii=False, indent=2)
        if re.search("[\ud800-\udfff]", text):                  # JSON may carry them, UTF-8 may not
            text = json.dumps(raw, indent=2)
        return text.encode() + b"\n"

    def _put_aside(self, path: str) -> None:
        """A copy of the broken file; it stays where it is until the new one replaces it, should the disk be full."""
        with open(self.path, "rb") as file:
            write_file(path, file.read())

    def _back_up(self) -> None:
        """Keep the last good file; where only the file itself may be written (bind mount) there is no place for one."""
        with open(self.path, "rb") as file:
            data = file.read()
        try:
            plain = read_json_file(self.path)
            sealed = self._sealed_if_possible(plain)
            write_file(self.backup, data if sealed == plain else self.to_bytes(sealed))
        except (OSError, ConfigBroken) as exc:
            log.warning("no backup of %s: %s", self.path, getattr(exc, "strerror", None) or exc)

    def encrypt(self, mode: str) -> List[str]:
        """`on`, `off` or `rotate` for the file and its .bak at once; what can't be opened stays as it is and is named.

        A rotation first makes the new key lasting, then seals anew, then forgets the old key: wherever a crash cuts it
        short, everything can still be read.  OSError, ConfigBroken.
        """
        with self._lock, self.lock():
            contents: Dict[str, Json] = {}
            locked: List[str] = []
            for path in (self.path, self.backup):
                if os.path.isfile(path):
                    contents[path] = self._opened(read_json_file(path))
                    locked += [os.path.basename(path) + problem[len("config.json"):] for problem in self.locked]
            if mode == "rotate":
                self.vault.renew()
            if mode == "off":
                contents.setdefault(self.path, {})
            for path, raw in contents.items():
                raw = {**raw, "encrypt_secrets": mode != "off"}
                if mode != "off":
                    del raw["encrypt_secrets"]           # the default
                write_file(path, self.to_bytes(self._sealed(raw)))
            if mode == "rotate" and not locked:
                self.vault.drop_old_keys()
            return locked


class ConfigVersions:
    """What config.json held whenever it was shown, so that who writes learns what somebody else has changed since.

    A place is a setting, `providers/NAME` or `client_keys/NAME`; only digests are kept.
    """
    LIMIT = 64

    def __init__(self) -> None:
        self._seen: Dict[str, Dict[str, str]] = {}
        self._lock = threading.Lock()

    @staticmethod
    def places(raw: Json) -> Dict[str, str]:
        def digest(value: Any) -> str:
            return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]

        found = {name: digest(value) for name, value in raw.items()}
        for name in ("providers", "client_keys"):
            entries = raw.get(name) if isinstance(raw.get(name), list) else []
            found.update((f"{name}/{entry.get('name')}", digest(entry)) for entry in entries if isinstance(entry, dict))
        return found

    def note(self, raw: Json) -> str:
        """Remember what `raw` holds; the name of this version: the same for the same content."""
        places = self.places(raw)
        version = hashlib.sha256(repr(sorted(places.items())).encode()).hexdigest()[:16]
        with self._lock:
            self._seen.pop(version, None)
            self._seen[version] = places
            while len(self._seen) > self.LIMIT:
                del self._seen[next(iter(self._seen))]
        return version

    def has_changed(self, version: str, raw: Json, place: str) -> bool:
        """Whether `raw` holds something else at `place` than `version` did; also where nobody remembers it."""
        before = self._seen.get(version)
        return before is None or before.get(place) != self.places(raw).get(place)


# --- what is inside of settings -----------------------------------------------

#: Field -> its type, the least and the most it may be.
Numbers = Mapping[str, Tuple[Any, float, float]]
_NUMBER = (int, float)
RETRY_FIELDS: Numbers = {"count": (int, 0, 10), "backoff_s": (_NUMBER, 0, 600), "max_backoff_s": (_NUMBER, 0, 600),
                         "total_s": (_NUMBER, 0, 3600)}
CIRCUIT_FIELDS: Numbers = {"failures": (int, 0, 1000), "rest_s": (_NUMBER, 0.1, 86400)}
LIMIT_FIELDS: Numbers = {name: (int, 1, 10 ** 12) for name in LIMIT_WORDS}
PRICE_FIELDS: Numbers = {name: (_NUMBER, 0, 10 ** 9) for name in ("input", "output", "cached")}


def check_numbers(value: Mapping[str, Any], known: Numbers, where: str = "") -> None:
    """ValueError with the exact place of the first name that is unknown or number that can't be."""
    for name, number in value.items():
        if name not in known:
            raise ValueError(f"{where}{name}: no such field; there are {', '.join(known)}")
        kind, low, high = known[name]
        if not isinstance(number, kind) or isinstance(number, bool) or not low <= number <= high:
            what = "a whole number" if kind is int else "a number"
            hint = " (leave it out for no limit)" if number == 0 and low else ""
            raise ValueError(f"{where}{name}: {what} from {low} to {high} expected, not {one_line(json.dumps(number), 40)}{hint}")


def check_prices(value: Json) -> None:
    for pattern, price in value.items():
        if not isinstance(price, dict):
            raise ValueError(f"{pattern}: an object with input, output and cached expected")
        check_numbers(price, PRICE_FIELDS, f"{pattern}.")


def check_networks(value: Sequence[Any]) -> None:
    for number, text in enumerate(value):
        try:
            parse_network(text)
        except ValueError:
            raise ValueError(f"[{number}]: {one_line(json.dumps(text), 60)} is no address and no network") from None


def check_client_keys(value: Sequence[Any]) -> None:
    problems = parse_client_keys(value)[1]
    if problems:
        raise ValueError("; ".join(problems))


#: Settings with something inside of them -> what raises ValueError about it.
INNER_CHECKS: Dict[str, Callable[[Any], None]] = {
    "retry": lambda value: check_numbers(value, RETRY_FIELDS),
    "circuit": lambda value: check_numbers(value, CIRCUIT_FIELDS),
    "address_limits": lambda value: check_numbers(value, LIMIT_FIELDS), "prices": check_prices,
    "trusted_proxies": check_networks, "client_keys": check_client_keys, "admin_password": check_password_hash}


# --- client keys --------------------------------------------------------------

class ClientKey(NamedTuple):
    """A key that clients may send.  Only its hash is kept: SHA-256 without salt or rounds is enough for 192 random bits."""
    name: str
    digest: bytes
    models: Tuple[str, ...] = ()         #: shell patterns of what it may ask for; () is everything
    limits: Mapping[str, int] = {}       #: LIMIT_FIELDS
    expires_at: float = float("inf")


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def parse_expiry(text: Any) -> float:
    """Epoch seconds of `2027-01-31` (to the end of that day) or `2027-01-31T12:00:00Z`; UTC unless it says otherwise."""
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
        moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        return moment.timestamp() + (86400 if len(text) == 10 else 0)
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise ValueError(f"expires: a date such as 2027-01-31 expected, not {one_line(json.dumps(text), 40)}") from None


def parse_client_key(entry: Any) -> ClientKey:
    """One entry of `client_keys`; ValueError says what is wrong with it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not _NAME.fullmatch(entry["name"]):
        raise ValueError("an object with a name without blanks, commas and slashes expected; `key add` makes one")
    unknown = sorted(set(entry) - {"name", "sha256", "models", "expires", "created", *LIMIT_FIELDS})
    if unknown:
        raise ValueError(f"{unknown[0]}: no such field; there are name, sha256, models, expires, {', '.join(LIMIT_FIELDS)}")
    if not isinstance(entry.get("sha256"), str) or not re.fullmatch(r"[0-9a-fA-F]{64}", entry["sha256"]):
        raise ValueError("sha256: the key's SHA-256 in hex expected; `key add` makes one")
    models = entry.get("models", [])
    if not isinstance(models, list) or not all(isinstance(model, str) and model for model in models):
        raise ValueError("models: a list of names or patterns expected")
    limits = {name: entry[name] for name in LIMIT_FIELDS if name in entry}
    check_numbers(limits, LIMIT_FIELDS)
    expires_at = parse_expiry(entry["expires"]) if entry.get("expires") is not None else float("inf")
    return ClientKey(entry["name"], bytes.fromhex(entry["sha256"]), tuple(models), limits, expires_at)


def parse_client_keys(entries: Sequence[Any]) -> Tuple[List[ClientKey], List[str]]:
    """The keys that are as they should be, and a sentence for each of the others."""
    keys: Dict[str, ClientKey] = {}
    problems: List[str] = []
    for number, entry in enumerate(entries):
        try:
            key = parse_client_key(entry)
            if key.name in keys:
                raise ValueError(f"the name {key.name} is taken by an earlier one")
            keys[key.name] = key
        except ValueError as exc:
            problems.append(f"client_keys[{number}]: {exc}")
    return list(keys.values()), problems


def make_client_key(name: str, facts: Json) -> Tuple[str, Json]:
    """A new key and its entry of `client_keys`, with its hash alone; `facts`: models, expires, limits.  ValueError."""
    key = "sk-" + secrets.token_hex(24)
    entry = {"name": name, "sha256": hash_key(key).hex(), "created": time.strftime("%Y-%m-%d"), **facts}
    if parse_client_key(entry).expires_at <= time.time():
        raise ValueError(f"expires: {facts['expires']} is over")
    return key, entry


class Doorkeeper:
    """Who may ask: `custom_api_key` and the keys of `client_keys`, out of one snapshot of the settings.  Pure."""

    def __init__(self, settings: Settings) -> None:
        self.keys, self.problems = parse_client_keys(settings.client_keys)
        #: Entries that can't be used demand a key all the same: closed by default.
        self.required = bool(settings.custom_api_key or settings.client_keys)
        self.limited = bool(settings.address_limits or any(key.limits for key in self.keys))
        self._master = ClientKey("custom_api_key",
                                 hash_key(settings.custom_api_key)) if settings.custom_api_key else None

    def find(self, given: Iterable[str]) -> Optional[ClientKey]:
        """The key that one of `given` is; every known one is compared, each in constant time."""
        known = [*([self._master] if self._master else []), *self.keys]
        digests = [hash_key(text) for text in given if text]
        found = [key for key in known if any([hmac.compare_digest(key.digest, digest) for digest in digests])]
        return found[0] if found else None


def may_use(key: ClientKey, model: str, chain: Sequence[Target]) -> bool:
    """Whether the key covers the name asked for, or else every place that it leads to."""
    def covered(name: str) -> bool:
        return any(name == pattern or fnmatchcase(name, pattern) for pattern in key.models)

    return not key.models or covered(model) or all(
        covered(target.model) or covered(f"{target.provider.name}/{target.model}") for target in chain)


# --- addresses ----------------------------------------------------------------

def parse_address(text: str) -> bytes:
    """An IP address as its 4 or 16 bytes, whatever its spelling; ValueError.  IPv4 within IPv6 is IPv4."""
    text = text.strip()
    ported = re.fullmatch(r"\[([^\]]+)\](?::\d+)?|(\d+\.\d+\.\d+\.\d+):\d+", text)
    text = (ported.group(1) or ported.group(2) if ported else text).partition("%")[0]
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, UnicodeError):
        raise ValueError(f"{one_line(text, 60)!r} is no IP address") from None
    return packed[12:] if packed[:12] == bytes(10) + b"\xff\xff" else packed


def parse_network(text: Any) -> Tuple[bytes, int]:
    """`10.0.0.0/8` or a single address as bytes and the number of bits that count; ValueError."""
    if not isinstance(text, str):
        raise ValueError("an address expected")
    address, slash, bits = text.partition("/")
    packed = parse_address(address)
    if slash and not (bits.isdigit() and int(bits) <= 8 * len(packed)):
        raise ValueError("no such network")
    return packed, int(bits) if slash else 8 * len(packed)


def is_within(address: bytes, network: Tuple[bytes, int]) -> bool:
    base, bits = network
    shift = 8 * len(base) - bits
    return len(base) == len(address) and int.from_bytes(base, "big") >> shift == int.from_bytes(address, "big") >> shift


def client_address(peer: str, forwarded: str, trusted: Sequence[str]) -> str:
    """Who asks, for limits: the peer, or what a trusted proxy says of it in X-Forwarded-For (read from the right).

    An IPv6 client counts as its /64: that is what one subscriber gets.
    """
    networks = [parse_network(text) for text in trusted]
    address = parse_address(peer)
    hops = [hop for hop in forwarded.split(",") if hop.strip()]
    with contextlib.suppress(ValueError):                # a hop that makes no sense: the proxy before it answers for it
        while hops and any(is_within(address, network) for network in networks):
            address = parse_address(hops.pop())
    return address.hex() if len(address) == 4 else address[:8].hex()


# --- providers ---------------------------------------------------------------

@dataclass(frozen=True)
class Provider:
    """One upstream.  `problem` is why it can't be used, empty when it can."""
    name: str
    base_url: str = ""
    kind: str = "openai"
    api_keys: Tuple[str, ...] = ()
    models: Tuple[str, ...] = ()          #: models it is known to serve; they decide routes
    facts: Mapping[str, Json] = field(default_factory=dict)     #: model -> context, max_output, vision, as far as known
    headers: Tuple[Tuple[str, str], ...] = ()
    proxy: str = ""
    timeout_s: Optional[float] = None     #: instead of first_byte_timeout_s and idle_timeout_s
    concurrency: int = 0                  #: requests at once; 0: no limit
    key_concurrency: int = 0              #: requests at once for each key
    sticky: Optional[bool] = None         #: instead of the setting of that name
    profile: Json = field(default_factory=dict)
    vision_model: str = ""
    preserve_reasoning_content: Optional[bool] = None
    problem: str = ""

    @property
    def places(self) -> int:
        """Requests at once: what `concurrency` says, else as many as its keys can take together; 0: no limit."""
        return self.concurrency or self.key_concurrency * max(1, len(self.api_keys))


KINDS = ("openai", "iflow")
_PROVIDER_KINDS = {"name": str, "base_url": str, "kind": str, "api_keys": list, "models": list, "headers": dict,
                   "proxy": str,
                   "timeout_s": (int, float), "concurrency": int, "key_concurrency": int, "sticky": bool,
                   "profile": dict, "vision_model": str,
                   "preserve_reasoning_content": bool}
_NAME = re.compile(r"[^\s/,]{1,64}")


def clean_base_url(url: str) -> str:
    """`url` as the part before /chat/completions; ValueError names what is wrong.

    A bare host gets /v1, where nearly every server keeps its API; a pasted full endpoint loses its end.
    """
    url = url.strip()
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as exc:            # http://[
        raise ValueError(f"base_url {one_line(url, 80)!r}: {exc}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        hint = f"; write http://{url} or https://{url}" if url and "://" not in url else ""
        raise ValueError(f"base_url {one_line(url, 80)!r} is no http:// or https:// address{hint}")
    try:
        parts.port
    except ValueError:
        raise ValueError(f"base_url {one_line(url, 80)!r}: no such port") from None
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"base_url of {one_line(parts.hostname, 80)}: credentials, ? and # do not belong here; use api_keys "
                         "and headers")
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError("base_url contains blanks or control characters")
    path = parts.path.rstrip("/")
    if path.endswith("/chat/completions"):
        path = path[:-len("/chat/completions")]
    elif not path:
        path = "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _resolve_secret(text: Any, environ: Mapping[str, str]) -> str:
    """A literal, or the variable that `$NAME` names; `$$` begins a literal dollar.  ValueError when undefined."""
    if not isinstance(text, str):
        raise ValueError(f"a string expected, not {one_line(json.dumps(text), 40)}")
    if is_sealed(text):
        raise ValueError("a secret of it is encrypted and can't be opened")
    if text.startswith("$$"):
        return text[1:]
    if re.fullmatch(r"\$[A-Za-z_]\w*", text):
        if not environ.get(text[1:]):
            raise ValueError(f"the environment variable {text[1:]} is not set")
        text = environ[text[1:]]
    return text


def _header_safe(text: str, what: str) -> str:
    text = text.strip()
    if not text or not text.isprintable() or not text.isascii() or (what == "key" and " " in text):
        raise ValueError(f"a {what} is empty, or has blanks, line breaks or characters that no HTTP header may have")
    return text


def parse_provider(entry: Any, environ: Mapping[str, str]) -> Provider:
    """The Provider of one entry of `providers`; an entry that can't work becomes one with a `problem`.

    ValueError where there is not even a name to call it by.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not _NAME.fullmatch(entry["name"]):
        raise ValueError("each provider needs a name without blanks, commas and slashes")
    name = entry["name"]
    try:
        return _parse_provider(name, entry, environ)
    except ValueError as exc:
        return Provider(name, problem=str(exc))


def _parse_provider(name: str, entry: Json, environ: Mapping[str, str]) -> Provider:
    for key, kind in _PROVIDER_KINDS.items():
        value = entry.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool)):
            raise ValueError(f"{key}: it is of the wrong type")
    given = {key: entry[key] for key in _PROVIDER_KINDS if entry.get(key) is not None}
    if given.get("kind", "openai") not in KINDS:
        raise ValueError(f"kind {given['kind']!r}: one of {', '.join(KINDS)} expected")
    if min(given.get("concurrency", 0), given.get("key_concurrency", 0)) < 0 or not 0 < given.get("timeout_s",
                                                                                                  1) <= LONGEST_S:
        raise ValueError("concurrency, key_concurrency and timeout_s can't be negative")
    keys = tuple(_header_safe(_resolve_secret(key, environ), "key") for key in given.get("api_keys", ()))
    headers = tuple((_token(key), _header_safe(_resolve_secret(value, environ), "header value"))
                    for key, value in given.get("headers", {}).items())
    facts = dict(map(_parse_model, given.get("models", ())))
    return Provider(**{**given, "name": name, "base_url": clean_base_url(given.get("base_url", "")), "api_keys": keys,
                       "headers": headers, "models": tuple(facts), "facts": facts})


#: What may be said of a model in a provider's `models`.
_MODEL_FACTS = {"context": int, "max_output": int, "vision": bool}


def _parse_model(entry: Any) -> Tuple[str, Json]:
    """Name and facts of an entry of `models`: a name, or {"id", "context", "max_output", "vision"}."""
    known = entry if isinstance(entry, dict) else {"id": entry}
    if not isinstance(known.get("id"), str) or not known["id"]:
        raise ValueError('models: names expected, or objects as {"id": "name", "max_output": 8192}')
    facts = {key: known[key] for key in _MODEL_FACTS if known.get(key) is not None}
    for key, value in facts.items():
        if not isinstance(value, _MODEL_FACTS[key]) or isinstance(value, bool) is not (key == "vision") or value < 0:
            raise ValueError(f"models: {known['id']}: {key}: {one_line(json.dumps(value), 40)} makes no sense")
    return known["id"], {key: value for key, value in facts.items() if key == "vision" or value}


def _token(name: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError(f"headers: {name!r} is no header name")
    return name


# --- iFlow's own file ---------------------------------------------------------

def account_keys(accounts: Json) -> Dict[str, str]:
    """The API keys of config.json's `accounts`, by account; without those that no request could bear."""
    keys = {name: login.get("apiKey") for name, login in accounts.items() if isinstance(login, dict)}
    return {name: key for name, key in keys.items() if isinstance(key, str) and not is_sealed(key) and (
        key.isascii() and key.isprintable() and key.strip() == key and key and " " not in key)}


def iflow_provider(settings: Settings, origins: Mapping[str, str], environ: Mapping[str, str],
                   login: Json) -> Optional[Provider]:
    """The provider `iflow` out of the settings, the CLI's variables and its file (`login`); None without a key.

    Flag and IFLOW2API_API_KEY > IFLOW_… > config.json > the CLI's file; the same for the address.
    """
    def text(name: str) -> str:
        value = login.get(name)
        return value.strip() if isinstance(value, str) else ""

    def first(name: str, variables: Sequence[str], *filed: str) -> str:
        ours = getattr(settings, name).strip()
        theirs = next((environ[variable] for variable in variables if environ.get(variable)), "").strip()
        candidates = [theirs, ours] if origins.get(name) == "file" else [ours, theirs]
        return next((value for value in [*candidates, *filed] if value), "")

    key = first("api_key", IFLOW_KEY_VARIABLES, text("apiKey"), text("searchApiKey"))
    foreign = (settings.auth_type or text("selectedAuthType")) == "openai-compatible"
    plain = foreign and bool(key)
    given = origins.get("api_key") in ("flag", "environment") or any(environ.get(name) for name in IFLOW_KEY_VARIABLES)
    keys = [key] if key else []
    if not given and not plain:          # a key for this run is used alone, and another service gets its own alone
        keys += [other for other in account_keys(settings.accounts).values() if other not in keys]
    if not keys:
        return None
    filed_url = text("baseUrl") if plain or not foreign else ""
    entry = {"name": "iflow", "kind": "openai" if plain else "iflow",
             "api_keys": ["$" + key if key[0] == "$" else key for key in keys],
             "base_url": first("base_url", IFLOW_URL_VARIABLES, filed_url, IFLOW_BASE_URL),
             "models": [text("modelName")] if plain and text("modelName") else [],
             "key_concurrency": settings.api_concurrency}
    return with_iflow_facts(parse_provider(entry, {}), settings)


def with_iflow_facts(provider: Provider, settings: Settings) -> Provider:
    """A provider of kind iflow with what is known of iFlow, where the user did not say otherwise."""
    if provider.kind != "iflow":
        return provider
    preserve = provider.preserve_reasoning_content
    each = provider.key_concurrency or (0 if provider.concurrency else settings.api_concurrency)
    facts = {name: {"context": model.context, "max_output": model.max_output, "vision": model.vision}
             for name, model in IFLOW_MODELS.items()}
    return replace(
        provider, models=provider.models or tuple(IFLOW_MODELS), facts={**facts, **provider.facts},
        key_concurrency=each,
        vision_model=(provider.vision_model or settings.vision_model) if settings.vision_mode == "route" else "",
        preserve_reasoning_content=settings.preserve_reasoning_content if preserve is None else preserve)


# --- presets -----------------------------------------------------------------

class Preset(NamedTuple):
    """A known OpenAI-compatible API; `provider add` writes it into config.json, where it can be changed."""
    base_url: str
    key: str = ""                         #: the environment variable its users keep the key in; "": it needs none
    profile: Json = {}                    #: how its Chat differs (DEFAULT_PROFILE, section 6)
    models: Tuple[Tuple[str, int, int, bool], ...] = ()     #: name, context, output limit (0: unknown), sees images

    def entry(self, name: str) -> Json:
        """It as an entry of `providers`, without keys."""
        models = [{"id": model, **({"context": context} if context else {}), **({"max_output": limit} if limit else {}),
                   "vision": vision} for model, context, limit, vision in self.models]
        return {"name": name, "base_url": self.base_url, **({"models": models} if models else {}),
                **({"profile": dict(self.profile)} if self.profile else {})}


#: The first model of each is the default one: one that may think and need not, as agents want both.
#: GLM takes json_object, no strict schemas, and tool_choice "auto" alone (docs.bigmodel.cn).
_GLM_PROFILE: Json = {"thinking_style": "thinking_type", "structured_output": "json_object", "strict_tools": False,
                      "forced_tool_choice_with_thinking": False, "files": False}


def _glm_search(engine: str) -> Json:
    return {**_GLM_PROFILE, "server_tools": {"web_search": {"type": "web_search", "web_search": {
        "enable": True, "search_engine": engine, "search_result": True}}}}


_GLM = (("glm-5.2", 1_000_000, 131072, False), ("glm-5.3", 1_000_000, 131072, False),
        ("glm-5.1", 200_000, 131072, False), ("glm-5", 204800, 131072, False), ("glm-4.7", 204800, 131072, False),
        ("glm-4.7-flash", 200_000, 131072, False), ("glm-5v-turbo", 200_000, 131072, True),
        ("glm-4.6v", 128_000, 32768, True))
#: kimi-k3 and kimi-k2.7-code can't stop thinking; a call's reasoning must come back with it (platform.kimi.com).
_KIMI_PROFILE: Json = {"thinking_style": "thinking_type", "require_reasoning_on_tool_calls": True, "prefill": "partial",
                       "efforts": ["low", "high", "max"], "strict_tools": False, "files": False}
_KIMI = (("kimi-k2.6", 262144, 262144, True), ("kimi-k3", 1_048_576, 262144, True),
         ("kimi-k2.7-code", 262144, 262144, True), ("kimi-k2.5", 262144, 262144, True))
#: A budget and an effort exclude each other there, so that the effort, which not all models know, stays away.
_QWEN_PROFILE: Json = {"thinking_style": "enable_thinking", "top_k": True, "forced_tool_choice_with_thinking": False,
                       "efforts": [], "strict_tools": False, "files": False,
                       "server_tools": {"web_search": {"fields": {"enable_search": True}}}}
_QWEN = (("qwen3.7-plus", 1_000_000, 65536, True), ("qwen3.8-max", 1_000_000, 131072, True),
         ("qwen3.8-flash", 1_000_000, 131072, True), ("qwen3-coder-plus", 1_000_000, 65536, False),
         ("qwen3-vl-plus", 262144, 32768, True))
#: Thinks between <think> tags and always (M2), knows no response_format (platform.minimax.io, OpenAI API).
_MINIMAX_PROFILE: Json = {"thinking_style": "none", "think_tags": True, "efforts": [], "structured_output": "prompt",
                          "max_tokens_field": "max_completion_tokens", "strict_tools": False, "files": False}
_MINIMAX = (("MiniMax-M3", 512_000, 128_000, True), ("MiniMax-M2.7", 204800, 131072, False),
            ("MiniMax-M2.5", 204800, 131072, False))
#: Houses of many models: a thinking switch that one model knows is a 400 from the next.
_MIXED_PROFILE: Json = {"thinking_style": "none", "efforts": [], "strict_tools": False, "files": False}
#: Engines on this machine: chat templates that allow system at the top only, parts they can't read.
_ENGINE_PROFILE: Json = {"thinking_style": "chat_template_kwargs", "efforts": [], "top_k": True, "mid_system": "user",
                         "strict_tools": False, "files": False}

#: By name; looked up in the makers' documentation and on models.dev, November 2026.
PRESETS: Dict[str, Preset] = {
    "zhipu": Preset("https://open.bigmodel.cn/api/paas/v4", "ZHIPU_API_KEY", _glm_search("search_std"), _GLM),
    "zai": Preset("https://api.z.ai/api/paas/v4", "ZAI_API_KEY", _glm_search("search-prime"), _GLM),
    "moonshot-cn": Preset("https://api.moonshot.cn/v1", "MOONSHOT_API_KEY", _KIMI_PROFILE, _KIMI),
    "moonshot": Preset("https://api.moonshot.ai/v1", "MOONSHOT_API_KEY", _KIMI_PROFILE, _KIMI),
    "deepseek": Preset("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY", {
        "thinking_style": "thinking_type", "require_reasoning_on_tool_calls": True, "efforts": ["low", "high", "max"],
        "vision": False, "files": False, "structured_output": "json_object", "strict_tools": False}, (
            ("deepseek-flash", 1_000_000, 384_000, True), ("deepseek-v4-pro", 1_000_000, 384_000, False),
            ("deepseek-v4-flash", 1_000_000, 384_000, True))),
    "dashscope": Preset("https://dashscope.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY", _QWEN_PROFILE, _QWEN),
    "dashscope-intl": Preset("https://dashscope-intl.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY",
                             _QWEN_PROFILE, _QWEN),
    "minimax-cn": Preset("https://api.minimaxi.com/v1", "MINIMAX_API_KEY", _MINIMAX_PROFILE, _MINIMAX),
    "minimax": Preset("https://api.minimax.io/v1", "MINIMAX_API_KEY", _MINIMAX_PROFILE, _MINIMAX),
    "siliconflow": Preset("https://api.siliconflow.cn/v1", "SILICONFLOW_API_KEY", _MIXED_PROFILE, (
        ("zai-org/GLM-5.2", 1_000_000, 131072, False), ("deepseek-ai/DeepSeek-V4-Flash", 1_000_000, 384_000, False),
        ("deepseek-ai/DeepSeek-V4-Pro", 1_000_000, 384_000, False),
        ("Pro/moonshotai/Kimi-K2.6", 262_000, 262_000, True))),
    "modelscope": Preset("https://api-inference.modelscope.cn/v1", "MODELSCOPE_API_KEY", _MIXED_PROFILE, (
        ("ZhipuAI/GLM-4.6", 202752, 0, False), ("Qwen/Qwen3-235B-A22B-Instruct-2507", 262144, 0, False),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", 262144, 0, False))),
    "openrouter": Preset("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", {
        "thinking_style": "reasoning_effort", "efforts": ["none", "minimal", "low", "medium", "high", "xhigh"],
        "reasoning_field": "reasoning", "top_k": True}, (
            ("z-ai/glm-5.2", 1_048_576, 0, False), ("deepseek/deepseek-v4-flash", 1_048_576, 0, False),
            ("moonshotai/kimi-k2.6", 262144, 0, True))),
    "nvidia": Preset("https://integrate.api.nvidia.com/v1", "NVIDIA_API_KEY", {
        **_MIXED_PROFILE, "reasoning_field": None, "user_field": None, "parallel_tool_calls": False}, (
            ("z-ai/glm-5.1", 202752, 131072, False), ("minimaxai/minimax-m2.7", 204800, 0, False),
            ("nvidia/nemotron-3-super-120b-a12b", 262144, 0, False))),
    "openai": Preset("https://api.openai.com/v1", "OPENAI_API_KEY", {
        "thinking_style": "reasoning_effort", "efforts": ["none", "low", "medium", "high", "xhigh"],
        "reasoning_field": None, "max_tokens_field": "max_completion_tokens", "user_field": "safety_identifier"}, (
            ("gpt-5.6", 1_050_000, 128_000, True), ("gpt-5.5", 1_050_000, 128_000, True),
            ("gpt-5.4", 1_050_000, 128_000, True))),
    "ollama": Preset("http://127.0.0.1:11434/v1", "", {
        **_ENGINE_PROFILE, "thinking_style": "none", "reasoning_field": "reasoning"}),
    "lmstudio": Preset("http://127.0.0.1:1234/v1", "", {**_ENGINE_PROFILE, "thinking_style": "none"}),
    "llamacpp": Preset("http://127.0.0.1:8080/v1", "", _ENGINE_PROFILE),
    "vllm": Preset("http://127.0.0.1:8000/v1", "", {**_ENGINE_PROFILE, "prefill": "continue_final_message"}),
}

#: Presets of engines that are looked for on this machine.
LOCAL_ENGINES = ("ollama", "lmstudio", "llamacpp", "vllm")


def entry_at(base_url: str, preset: Optional[Preset] = None) -> Json:
    """An entry of `providers` for an address, with the facts of `preset` or of the one that lives there.

    Whoever pastes an address gets the facts as well, and a bare host of a known API gets its path.
    """
    place, slash, path = base_url.strip().partition("://")[2].partition("/")
    at_home = next((known for known in PRESETS.values() if urllib.parse.urlsplit(known.base_url).netloc == place), None)
    known = preset or at_home
    facts = known.entry("") if known else {}
    return {**facts, "base_url": at_home.base_url if at_home and not path.strip("/") else base_url}


def entry_for(name: str, kind: str, base_url: str, preset: Optional[Preset], models: Iterable[Any]) -> Json:
    """An entry of `providers` out of a preset, an address or both; of `models` named here a preset knows the facts."""
    entry = entry_at(base_url, preset) if base_url or preset is None else preset.entry("")
    entry = {**entry, "name": name, "kind": kind or "openai"}
    known = {model["id"]: model for model in entry.get("models", ())}
    wanted = [known.get(model, model) if isinstance(model, str) else model for model in models]
    return {**entry, "models": wanted} if wanted else entry


# --- what may be shown ---------------------------------------------------------

def hide_secrets(name: str, value: Any) -> Any:
    """A setting's value as it may be shown."""
    if name == "admin_password":
        return "…" if value else ""
    if name in SETTING and SETTING[name].metadata.get("secret"):
        return redact(value) if "://" in str(value) else mask(value)
    if name == "providers" and isinstance(value, list):
        return [_hide_in_provider(entry) if isinstance(entry, dict) else entry for entry in value]
    if name == "accounts" and isinstance(value, dict):
        return {account: {key: mask(str(item)) if key in LOGIN_SECRETS else item for key, item in login.items()}
                if isinstance(login, dict) else "…" for account, login in value.items()}
    return value


def _hide_in_provider(entry: Json) -> Json:
    def hide(text: Any) -> Any:
        return text if isinstance(text, str) and re.fullmatch(r"\$\w+", text) else mask(str(text))

    shown = dict(entry)
    for name, value in entry.items():
        if name == "headers" and isinstance(value, dict):
            shown[name] = {header: hide(text) for header, text in value.items()}
        elif name in ("proxy", "base_url") and isinstance(value, str):
            shown[name] = re.sub(r"[?#].*", "…", redact(value))
        elif re.search(r"(?i)keys?$|token|secret|password|headers", name):
            shown[name] = [hide(key) for key in value] if isinstance(value, list) else hide(value)
    return shown


# --- routes ------------------------------------------------------------------

class Target(NamedTuple):
    """One place a request may go: a provider and the name of the model there."""
    provider: Provider
    model: str


class Asked(NamedTuple):
    """What conditions ask of a request; a Call answers the same questions, each when it is asked."""
    speaks: str = "chat"
    size_tokens: int = 0
    shows_images: bool = False
    thinks: bool = False
    has_tools: bool = False


#: Condition of a route -> what its value may be, in words, whether it is so, and whether a request meets it.
CONDITIONS: Dict[str, Tuple[str, Callable[[Any], bool], Callable[[Any, Any], bool]]] = {
    "over_tokens": ("a whole number of 1 at least", lambda value: type(value) is int and value > 0,
                    lambda asked, value: asked.size_tokens > value),
    "images": ("true or false", lambda value: isinstance(value, bool), lambda asked,
               value: asked.shows_images is value),
    "thinking": ("true or false", lambda value: isinstance(value, bool), lambda asked, value: asked.thinks is value),
    "tools": ("true or false", lambda value: isinstance(value, bool), lambda asked, value: asked.has_tools is value),
    "dialect": ("chat, messages or responses", lambda value: value in ("chat", "messages", "responses"),
                lambda asked, value: asked.speaks == value)}


class Branch(NamedTuple):
    """An entry of an alias: models to try, and what a request must be like for them."""
    models: Tuple[str, ...]
    conditions: Tuple[Tuple[str, Any], ...] = ()

    def holds(self, asked: Any) -> bool:
        return all(CONDITIONS[name][2](asked, value) for name, value in self.conditions)


def parse_branch(entry: Any) -> Branch:
    """`"glm-5"` or `{"model": "glm-5", "over_tokens": 60000}`; ValueError, empty where it is nothing of the kind."""
    if isinstance(entry, str) and entry:
        return Branch((entry,))
    named = entry.get("model") if isinstance(entry, dict) else None
    models = [named] if isinstance(named, str) else named
    if not isinstance(models, list) or not models or not all(isinstance(model, str) and model for model in models):
        raise ValueError
    conditions = [(name, value) for name, value in entry.items() if name != "model"]
    for name, value in conditions:
        if name not in CONDITIONS:
            raise ValueError(f"{name}: no such condition; there are {', '.join(CONDITIONS)}")
        if not CONDITIONS[name][1](value):
            raise ValueError(f"{name}: {CONDITIONS[name][0]} expected, not {one_line(json.dumps(value), 40)}")
    return Branch(tuple(models), tuple(conditions))


#: Why a name goes where it goes.
WHY = {"named": "{model}: its first part is the name of a provider",
       "listed": "{model}: {provider} lists it among its models",
       "foreign": "{model}: a name of the client's own, which means default_model ({default})",
       "default": "{model}: nobody claims it, so it goes to the default provider, {provider}, as it is"}


class Router:
    """Names to targets, out of one snapshot of the settings (DESIGN: providers and resolution).  Pure."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], iflow: Optional[Provider] = None,
                 model_name: str = "") -> None:
        """`iflow` and `model_name` are the CLI's login and the model it is set to."""
        self.providers: Dict[str, Provider] = {}
        self.problems: List[str] = []
        self.faults: Set[str] = set()    #: settings that do not fit together; a reload leaves what was in force
        for number, entry in enumerate(settings.providers):
            try:
                provider = parse_provider(entry, environ)
            except ValueError as exc:
                self._blame("providers", f"providers[{number}]: {exc}")
                continue
            if provider.name in self.providers:
                self._blame("providers", f"providers[{number}]: the name {provider.name} is taken by an earlier one")
                continue
            self.providers[provider.name] = with_iflow_facts(provider, settings)
        if iflow is not None:
            self.providers.setdefault("iflow", iflow)
        for provider in self.providers.values():
            if provider.problem:
                self.problems.append(f"provider {provider.name} is disabled: {provider.problem}")
        self.default = self._default(settings.default_provider)
        self.aliases = self._parse_aliases(settings.aliases)
        self.default_model = settings.default_model or model_name or self._first_model()

    def _first_model(self) -> str:
        if self.default is None:
            return ""
        if self.default.kind == "iflow" and "glm-5" in self.default.models:
            return "glm-5"
        return self.default.models[0] if self.default.models else ""

    def _blame(self, name: str, problem: str) -> None:
        self.problems.append(problem)
        self.faults.add(name)

    def _parse_aliases(self, aliases: Json) -> List[Tuple[str, List[Branch]]]:
        parsed: List[Tuple[str, List[Branch]]] = []
        for pattern, entries in aliases.items():
            branches = self._parse_alias(f"alias {pattern!r}", entries if isinstance(entries, list) else [entries])
            taken = next((known for known, earlier in parsed if self._hides(known, earlier, pattern)), None)
            if taken is not None:
                self._blame("aliases", f"alias {pattern!r} is never reached: {taken!r} above it takes every such name")
            if not pattern:
                self._blame("aliases", "alias '' matches nothing: a request without a model means default_model")
            if branches:
                parsed.append((pattern, branches))
        return parsed

    def _parse_alias(self, where: str, entries: Sequence[Any]) -> List[Branch]:
        """The branches of one alias, none where it is of no use; a target that can't be reached is left out."""
        try:
            branches = [parse_branch(entry) for entry in entries]
            if not branches:
                raise ValueError
        except ValueError as exc:
            self._blame("aliases", f"{where}: {str(exc) or 'a model or a list of models expected'}")
            return []
        found: List[Branch] = []
        for number, branch in enumerate(branches):
            strays = {model: self._stray(model) for model in branch.models}
            for model, reason in strays.items():
                if reason:
                    self._blame("aliases", f"{where}[{number}]: {one_line(model, 80)!r}: {reason}")
            models = tuple(model for model in branch.models if not strays[model])
            found += [branch._replace(models=models)] if models else []
        return found

    @staticmethod
    def _hides(pattern: str, branches: Sequence[Branch], later: str) -> bool:
        """Whether an alias takes every name that a later one could; `?` and `[` are not judged."""
        return not re.search(r"[?\[]", pattern) and fnmatchcase(later, pattern) and (
            any(not branch.conditions for branch in branches))

    def _stray(self, model: str) -> str:
        """Why `provider/model` leads nowhere; empty where it may well be a name of the default provider's own."""
        head, slash, rest = model.partition("/")
        if not slash or not rest or self.claimed(model):
            return ""
        near = nearest(head, self.providers, 0.8)
        plain = self.default is not None and self.default.models and not any("/" in name
                                                                             for name in self.default.models)
        return f"there is no provider {one_line(head, 60)!r}{near}" if plain or near else ""

    def _default(self, name: str) -> Optional[Provider]:
        if name and name not in self.providers:
            self._blame("default_provider", f"default_provider {name!r} is no provider" + nearest(name, self.providers))
        return self.providers.get(name) or next(iter(self.providers.values()), None)

    def resolve(self, model: Optional[str], foreign: bool = False, asked: Any = Asked()) -> List[Target]:
        """The chain of targets for `model`; `foreign`: asked by Messages or Responses, whose own names mean the default.

        `asked` answers the questions of conditions (Asked, Call).  BadRequest without any model, NotLoggedIn without
        any provider.
        """
        model = self.named(model)
        found = self._alias_of(model, asked)
        return [self._locate(name, foreign)[0] for name in (found[1] if found else (model,))]

    def named(self, model: Optional[str]) -> str:
        """The name asked for, `default_model` where there is none; BadRequest."""
        if not model and not self.default_model:
            raise BadRequest("the request names no model, and default_model is not set", param="model",
                             code="missing_model")
        return model or self.default_model

    def has_alias(self, model: str) -> bool:
        """Whether an alias takes the name when Messages asks for it."""
        return self._alias_of(model, Asked("messages")) is not None

    def redirects(self, model: str) -> bool:
        """Whether an alias takes the name, or Messages and Responses take it for default_model."""
        return self.has_alias(model) or self._means_default(model)

    def _means_default(self, model: str) -> bool:
        return bool(self.default_model) and not self.claimed(model) and any(
            fnmatchcase(model, pattern) for pattern in FOREIGN_MODELS)

    def _alias_of(self, model: str, asked: Any) -> Optional[Tuple[str, List[str]]]:
        """The alias that takes a name, and the models it stands for in this request."""
        for pattern, branches in self.aliases:
            if model == pattern or fnmatchcase(model, pattern):      # `m[1m]` is a name before it is a pattern
                names = self._chain(branches, asked)
                if names:
                    return pattern, names
        return None

    @staticmethod
    def _chain(branches: Sequence[Branch], asked: Any) -> List[str]:
        """The first branch whose conditions all hold, then those without; each model once."""
        first = next((branch for branch in branches if branch.conditions and branch.holds(asked)), None)
        names = [name for branch in branches if not branch.conditions for name in branch.models]
        return [*first.models, *(name for name in names if name not in first.models)] if first else names

    def explain(self, model: Optional[str], foreign: bool, asked: Asked) -> Tuple[List[str], List[Target]]:
        """What `resolve` does with a name, step by step, and what comes of it."""
        name = self.named(model)
        steps = [] if model else [f"no model named: default_model is {name}"]
        for pattern, branches in self.aliases:
            if name == pattern or fnmatchcase(name, pattern):
                steps += self._told(pattern, branches, asked)
                if self._chain(branches, asked):
                    break
        found = self._alias_of(name, asked)
        if found is None:
            steps.append("no alias takes it" if steps else "no alias matches it")
        targets = []
        for wanted in found[1] if found else [name]:
            target, reasons = self._locate(wanted, foreign)
            targets.append(target)
            steps += [WHY[reason].format(model=wanted if number == 0 else target.model, provider=target.provider.name,
                                         default=self.default_model) for number, reason in enumerate(reasons)]
            if target.provider.problem:
                steps.append(f"but {target.provider.name} is disabled: {target.provider.problem}")
        return steps, targets

    def _told(self, pattern: str, branches: Sequence[Branch], asked: Asked) -> Iterator[str]:
        """What one alias that matches makes of a request, in sentences."""
        for branch in branches:
            if branch.conditions:
                wish = ", ".join(f"{name} {json.dumps(value)}" for name, value in branch.conditions)
                yield f"alias {pattern}: {', '.join(branch.models)} if {wish}: {'yes' if branch.holds(asked) else 'no'}"
        names = self._chain(branches, asked)
        yield f"alias {pattern} " + (f"makes it {', then '.join(names)}" if names else "has nothing for such a request")

    def _locate(self, model: str, foreign: bool) -> Tuple[Target, Sequence[str]]:
        """Where one name goes, aliases aside, and why (WHY)."""
        found, why = self.claimed(model), ()
        if foreign and self._means_default(model):
            model, why = self.default_model, ("foreign",)
            found = self.claimed(model)
        if found:
            return found, (*why, "listed" if model in found.provider.models else "named")
        if self.default is None:
            raise NotLoggedIn("there is no iFlow login and no other provider: run `python iflow2api.py login`, put "
                              "iFlow's key into IFLOW_API_KEY, start with --upstream URL, or add one to `providers`")
        return Target(self.default, model), (*why, "default")

    def claimed(self, model: str) -> Optional[Target]:
        """`provider/model`, or the first provider that lists the model."""
        head, slash, rest = model.partition("/")
        if slash and rest and head in self.providers:
            return Target(self.providers[head], rest)
        for provider in self.providers.values():
            if model in provider.models:
                return Target(provider, model)
        return None


# === 6. Chat and SSE (pure) ==================================================
#
# Sections 6 to 9 know no socket, clock, file, thread or log: ids and the time come in as arguments.

#: How an upstream's Chat differs from the plain one (anthropic-messages.md section 10); a provider's `profile` overrides.
DEFAULT_PROFILE: Json = {
    "thinking_style": "thinking_type",        #: thinking_type, enable_thinking, chat_template_kwargs, reasoning_effort, none
    "reasoning_field": "reasoning_content",   #: where earlier reasoning goes back; None: nowhere
    "require_reasoning_on_tool_calls": False,  #: DeepSeek, Kimi: 400 without it
    "vision": True,
    "files": True,
    "mid_system": "system",                   #: "user" for templates that allow system at the top only
    "max_tokens_field": "max_tokens",
    "structured_output": "json_schema",       #: json_schema, json_object, prompt
    "efforts": ["low", "medium", "high", "xhigh", "max"],
    "top_k": False,
    "user_field": "user",
    "forced_tool_choice_with_thinking": True,
    "parallel_tool_calls": True,
    "stream_usage": True,
    "think_tags": False,
    "server_tools": "drop",                   #: drop, error, or family -> its `tools` entry, or {"fields": {…}} for the request
    "strict_tools": True,
    "prefill": None,                          #: partial, prefix, continue_final_message
}

#: Weakest to strongest; a provider knows some of them.
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

#: finish_reason values that are failures, with the status they stand for (DeepSeek; GLM and iFlow).
FATAL_FINISH = {"insufficient_system_resource": 503, "network_error": 502, "error": 502, "abort": 502}

#: An answer that ended this way was meant to be empty.
MEANT_EMPTY = ("length", "content_filter", "sensitive", "repetition_truncation", "model_context_window_exceeded")


def _no_constant(name: str) -> Any:
    """NaN and Infinity are Python's, not JSON's."""
    raise ValueError(name)


def _finite(text: str) -> float:
    """A number that can be written again; 1e999 is JSON, but would come out as Infinity."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(text)
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


#: Made once: json.dumps makes an encoder for each call that is not a plain one.
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def dump_json(value: Any) -> bytes:
    """Compact UTF-8; lone surrogates, which JSON may carry and UTF-8 may not, stay escapes."""
    try:
        return _ENCODE(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def clamp_effort(effort: str, allowed: Sequence[str]) -> Optional[str]:
    """The strongest allowed effort not above the wish, else the weakest allowed; None where none is."""
    known = [name for name in EFFORTS if name in allowed]
    if not known:
        return None
    below = [name for name in known if effort in EFFORTS and EFFORTS.index(name) <= EFFORTS.index(effort)]
    return below[-1] if below else known[0]


def set_thinking(chat: Json, profile: Json, on: Optional[bool], budget: Optional[int] = None,
                 effort: Optional[str] = None) -> None:
    """Write the provider's own thinking switch into `chat`; `on` None leaves the provider's default."""
    style = profile["thinking_style"]
    if on is not None:
        if style == "thinking_type":
            chat["thinking"] = {"type": "enabled" if on else "disabled"}
        elif style == "enable_thinking":
            chat["enable_thinking"] = on
            if on and budget:
                chat["thinking_budget"] = budget
        elif style == "chat_template_kwargs":
            chat["chat_template_kwargs"] = {"enable_thinking": on}
        elif style == "reasoning_effort" and not on:
            effort = None
            if "none" in profile["efforts"]:
                chat["reasoning_effort"] = "none"
        elif style == "reasoning_effort" and budget and not effort:
            effort = "low" if budget <= 4096 else "medium" if budget <= 16384 else "high"
    if effort and on is not False:
        allowed = clamp_effort(effort, profile["efforts"])
        if allowed:
            chat["reasoning_effort"] = allowed


#: What a model is told where a conversation lacks something: the same words in each dialect keep prefixes alike.
NO_RESULT = "[no output recorded for this call]"
NO_IMAGE = "[an image was here; this model takes text only]"
NO_TOOL = "These tools are not available here: {}. Say so instead of guessing what they would give."
NO_PDF = "[a PDF ({}) was here; this model can't see it: use a tool to extract its text]"


def short_name(name: str, limit: int = 64) -> str:
    """`name` cut to what Chat allows, the same each time and different for different names."""
    if len(name) <= limit:
        return name
    return name[:limit - 9] + "_" + hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]


def reasoning_of(message: Json) -> str:
    """The reasoning text of a message or delta: several fields are often filled with the same text, take one."""
    for field in ("reasoning_content", "reasoning"):
        value = message.get(field)
        if isinstance(value, str) and value:
            return value
    details = message.get("reasoning_details")
    if isinstance(details, list):
        return "".join(d["text"] for d in details if isinstance(d, dict) and isinstance(d.get("text"), str))
    return ""


def first_choice(chunk: Json) -> Json:
    """choices[0] of a chunk or completion, {} where there is none."""
    choices = chunk.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    return {}


def usage_of(chunk: Json) -> Optional[Json]:
    """The usage object of a chunk: its own, or the one Kimi puts into the choice."""
    usage = chunk.get("usage")
    if not isinstance(usage, dict) or not usage:
        usage = first_choice(chunk).get("usage")
    return usage if isinstance(usage, dict) and usage else None


@dataclass(frozen=True)
class Usage:
    """Token counts in Chat's sense: `prompt` includes the cached ones, `completion` the reasoning."""
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    cache_write: int = 0
    reasoning: Optional[int] = None      #: None: the provider does not say
    estimated: bool = False              #: our guess, not the upstream's count


def parse_usage(raw: Any) -> Usage:
    """One `Usage` from the spellings of OpenAI, DeepSeek, Kimi, vLLM and others; {} or None gives zeros."""
    def count(value: Any) -> int:
        return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else 0

    raw = raw if isinstance(raw, dict) else {}
    given = raw.get("prompt_tokens_details")
    made = raw.get("completion_tokens_details")
    given, made = (given if isinstance(given, dict) else {}), (made if isinstance(made, dict) else {})
    prompt, completion = count(raw.get("prompt_tokens")), count(raw.get("completion_tokens"))
    cached = count(given.get("cached_tokens")) or count(raw.get("prompt_cache_hit_tokens")) or count(raw.get("cached_tokens"))
    write = count(given.get("cache_write_tokens")) or count(raw.get("cache_creation_input_tokens"))
    reasoning = count(made["reasoning_tokens"]) if made.get("reasoning_tokens") is not None else None
    if reasoning and count(raw.get("total_tokens")) == prompt + completion + reasoning:
        completion += reasoning          # some report the reasoning beside the completion
    return Usage(prompt, completion, cached, write, reasoning)


def estimate_tokens(value: Any) -> int:
    """About how many tokens `value` (text, or any JSON) takes: 3.5 characters each, CJK about one and a half each.

    Data URLs count as a picture (1 500), not as text.
    """
    if isinstance(value, str):
        if value.startswith("data:") and ";base64," in value[:100]:
            return 1500
        wide = 0 if value.isascii() else sum(1 for char in value if char > "\u2e7f")
        return int((len(value) - wide) / 3.5 + wide / 1.5 + 0.99)
    if isinstance(value, dict):
        if value.get("type") == "base64" and isinstance(value.get("data"), str):
            return 1500
        return sum(estimate_tokens(key) + estimate_tokens(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(estimate_tokens(item) for item in value)
    return 0 if value is None else 1


def parse_arguments(text: str) -> Json:
    """Tool arguments as an object, whatever a model made of them; what is not JSON stays readable to the client."""
    try:
        value = json.loads(text, parse_constant=_no_constant) if text.strip() else {}
        if isinstance(value, str):                 # encoded twice
            value = json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return {"INVALID_JSON": text}
    return {} if value is None else value if isinstance(value, dict) else {"INVALID_JSON": text}


_OUTSIDE, _INSIDE = re.compile(r'[{}\[\]"]'), re.compile(r'["\\]')


class ObjectScanner:
    """Tells where a JSON object that arrives in pieces ends; reads each character once."""

    def __init__(self) -> None:
        self.depth, self.in_string, self.escaped, self.complete = 0, False, False, False

    def feed(self, text: str) -> int:
        """How many leading characters of `text` belong to the object; what follows came after its end."""
        at = 0
        while not self.complete:
            if self.escaped and at < len(text):
                self.escaped, at = False, at + 1
            found = (_INSIDE if self.in_string else _OUTSIDE).search(text, at)
            if not found:
                return len(text)
            at, mark = found.end(), found.group()
            if mark == '"':
                self.in_string = not self.in_string
            elif mark == "\\":
                self.escaped = True
            else:
                self.depth += 1 if mark in "{[" else -1
                self.complete = self.depth <= 0
        return at

class ThinkTags:
    """Tells `<think>…</think>` at the start of the content from the text after it; blanks at their edges go."""
    START, END = "<think>", "</think>"

    def __init__(self) -> None:
        self.state = "start"                      #: start, opened, thinking, closed, text
        self.buffer = ""

    def feed(self, text: str) -> List[Tuple[str, str]]:
        """Pieces of ("thinking" or "text", text)."""
        self.buffer += text
        if self.state == "start":
            self._decide()
        if self.state in ("opened", "closed"):
            self.buffer = self.buffer.lstrip()
            if self.buffer:
                self.state = "thinking" if self.state == "opened" else "text"
        pieces = self._thinking() if self.state == "thinking" else []
        if self.state == "text":
            pieces.append(("text", self.buffer))
            self.buffer = ""
        return [piece for piece in pieces if piece[1]]

    def close(self) -> List[Tuple[str, str]]:
        kind = "thinking" if self.state in ("opened", "thinking") else "text"
        text, self.buffer, self.state = self.buffer, "", "text"
        return [(kind, text)] if text.strip() else []

    def _decide(self) -> None:
        head = self.buffer.lstrip()
        if head.startswith(self.START):
            self.state, self.buffer = "opened", head[len(self.START):]
        elif not self.START.startswith(head):
            self.state = "text"

    def _thinking(self) -> List[Tuple[str, str]]:
        thought, end, rest = self.buffer.partition(self.END)
        if end:
            rest = rest.lstrip()
            self.state, self.buffer = ("text" if rest else "closed"), rest
            return [("thinking", thought.rstrip())]
        keep = next((n for n in range(len(self.END) - 1, 0, -1) if thought.endswith(self.END[:n])), 0)
        thought = thought[:len(thought) - keep].rstrip()
        self.buffer = self.buffer[len(thought):]
        return [("thinking", thought)]


def merge_details(known: List[Json], fresh: Any) -> None:
    """Join streamed pieces of `reasoning_details` (OpenRouter, MiniMax) to the entries they belong to."""
    for piece in fresh if isinstance(fresh, list) else ():
        last = known[-1] if known else {}
        if not isinstance(piece, dict):
            continue
        if not last or any(last.get(name) != piece.get(name) for name in ("type", "index")):
            known.append(dict(piece))
            continue
        for name, value in piece.items():
            grows = name in ("text", "summary", "data") and isinstance(value, str) and isinstance(last.get(name), str)
            if value is not None:
                last[name] = last[name] + value if grows else value


# --- requests ----------------------------------------------------------------

def parse_body(data: bytes) -> Tuple[Json, str]:
    """The JSON object of a request body and the text it was read from; BadRequest says where it goes wrong."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise BadRequest(f"the body is not UTF-8: byte {exc.start} is 0x{exc.object[exc.start]:02x}") from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as exc:
        raise BadRequest(f"the body is not JSON: line {exc.lineno}, column {exc.colno}: {exc.msg}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError as exc:            # NaN and Infinity, or a number of thousands of digits
        raise BadRequest(f"the body is not JSON: {one_line(exc, 80)} is no JSON value") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value, text


def splice_model(text: str, model: str) -> str:
    """`text`, a JSON object, with the value of its `model` replaced and every other byte as it was."""
    pieces, written, at = [], 0, text.index("{") + 1
    while True:
        at = _BLANK.match(text, at).end()
        if text[at] == ",":
            at = _BLANK.match(text, at + 1).end()
        if text[at] == "}":
            break
        key, at = json.decoder.scanstring(text, at + 1)
        at = _BLANK.match(text, _BLANK.match(text, at).end() + 1).end()
        value_at = at
        _, at = _DECODER.raw_decode(text, at)
        if key == "model":
            pieces += [text[written:value_at], json.dumps(model)]
            written = at
    if not written:                      # there was none: the default model was meant
        return "{" + f'"model":{json.dumps(model)}' + ("," if text[_BLANK.match(text, text.index("{") + 1).end()] != "}" else "") \
            + text[text.index("{") + 1:]
    return "".join(pieces) + text[written:]


_BLANK = re.compile(r"[ \t\r\n]*")


# --- answers -----------------------------------------------------------------

def has_content(chunk: Json) -> bool:
    """Whether a chunk or completion holds anything of an answer: text, reasoning, a call, a refusal."""
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            message = choice.get("delta") or choice.get("message")
            if choice.get("text") or isinstance(message, dict) and any(
                    value for key, value in message.items() if key != "role"):
                return True
    return False


def is_answer(chunk: Json) -> bool:
    """Whether a chunk or completion is, or belongs to, an answer: content, or the sign that none was meant."""
    return has_content(chunk) or first_choice(chunk).get("finish_reason") in MEANT_EMPTY or (
        parse_usage(usage_of(chunk)).completion > 0)


def check_completion(completion: Any, status: int = 200) -> Json:
    """A plain completion that really is one; UpstreamRefused or UpstreamGarbled otherwise."""
    refusal = refusal_in(completion, status)
    if refusal:
        raise refusal
    if not isinstance(completion, dict) or not is_answer(completion):
        raise UpstreamGarbled("the upstream's answer is empty")
    return completion


def completion_to_sse(completion: Json) -> bytes:
    """A plain completion as the event stream that was asked for."""
    chunk = {**completion, "object": "chat.completion.chunk"}
    chunk["choices"] = [
        {**{k: v for k, v in choice.items() if k != "message"}, "delta": choice.get("message") or {}}
        for choice in completion.get("choices") or () if isinstance(choice, dict)]
    for choice in chunk["choices"]:
        calls = choice["delta"].get("tool_calls") if isinstance(choice["delta"], dict) else None
        for index, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict):
                call.setdefault("index", index)
    return b"data: " + dump_json(chunk) + b"\n\ndata: [DONE]\n\n"


# --- refusals ----------------------------------------------------------------

#: What an error without an HTTP status stands for, by its code or type.
SAID_STATUS = {
    "rate_limit_exceeded": 429, "rate_limit_error": 429, "rate_limit": 429, "insufficient_quota": 429,
    "overloaded_error": 503,
    "server_is_overloaded": 503, "invalid_request_error": 400, "BadRequestError": 400, "context_length_exceeded": 400,
    "model_not_found": 404, "authentication_error": 401, "invalid_api_key": 401, "permission_error": 403}


def refusal_in(payload: Any, status: int = 200) -> Optional[UpstreamRefused]:
    """The error that a JSON answer or record stands for, None where it is none.

    Shapes: OpenAI `{"error": {…}}`, `{"error": "text"}`, vLLM `{"object": "error", …}`, FastAPI `{"detail": …}`,
    `{"code", "message"}`.  Without an HTTP error the status is the body's own, else 502.
    """
    if not isinstance(payload, dict):
        return None
    business = business_refusal(payload, status)
    if business:
        return business
    error = payload.get("error")
    if not error and status < 400 and payload.get("object") != "error":
        return None
    facts = error if isinstance(error, dict) else payload
    message = error if isinstance(error, str) else facts.get("message") or facts.get("detail") or facts.get("msg")
    if not isinstance(message, str):
        message = json.dumps(message if message else payload, ensure_ascii=False)
    code, kind = facts.get("code"), facts.get("type")
    if status < 400:
        said = [str(facts.get(name)) for name in ("status", "code", "type")]
        status = next((int(word) for word in said if re.fullmatch(r"[45]\d\d", word)), 0) or next(
            (SAID_STATUS[word] for word in said if word in SAID_STATUS), 502)
    return UpstreamRefused(
        message[:4000], status=status, type=kind if isinstance(kind, str) else error_type(status),
        code=code if isinstance(code, str) else None, param=facts.get("param") if isinstance(facts.get("param"), str)
        else None,
        body=payload if isinstance(error, dict) else None)


def parse_refusal(status: int, content_type: str, data: bytes) -> UpstreamRefused:
    """The error of an answer with an HTTP error status, whatever its body is."""
    try:
        refusal = refusal_in(_DECODER.decode(data.decode("utf-8-sig")), status)
    except (ValueError, RecursionError):
        refusal = None
    if refusal:
        return refusal
    text = data.decode("utf-8", "replace")
    if "html" in content_type or text.lstrip()[:1] == "<":       # a proxy's page: its title says enough
        title = re.search(r"(?is)<title[^>]*>(.*?)</title>", text) or re.search(r"(?is)<h1[^>]*>(.*?)</h1>", text)
        text = re.sub(r"<[^>]*>", " ", title.group(1)) if title else "an HTML page"
    text = one_line(" ".join(text.split())) or http.client.responses.get(status, "no message")
    return UpstreamRefused(f"the upstream answered {status}: {text}", status=status, type=error_type(status))


#: OpenAI's `type` for a status (openai-chat.md section 5).
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error",
               503: "service_unavailable_error", 504: "timeout_error"}


def error_type(status: int) -> str:
    """The error type that goes with a status where nobody said one."""
    return ERROR_TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")


#: (prompt tokens, the model's limit, output tokens asked for); 0 where the upstream does not say.
Overflow = Tuple[int, int, int]

#: Context overflow in the words of those who say it, the most telling first (from their issue trackers).
#: LIMIT, PROMPT, OUTPUT and TOTAL stand for the numbers.
OVERFLOW_WORDS = (
    # OpenAI, DeepSeek, older vLLM, OpenRouter: "However, you requested 131134 tokens (122942 in the messages, …)"
    r"length is LIMIT tokens.{0,20}you requested (?:about )?TOTAL tokens \(.*?OUTPUT (?:in|for) the (?:comple|output)",
    # vLLM now, Bedrock, Cloudflare: "you requested 32000 output tokens and your prompt contains at least 769 input"
    r"length is LIMIT tokens.{0,20}you requested OUTPUT output tokens and your prompt contains \D*PROMPT input",
    # vLLM in between
    r"too large: OUTPUT\. This model's maximum context length is LIMIT tokens and your request has PROMPT input tokens",
    # SGLang; iFlow hands it through ("Bad request!: Requested token count …", numbers like 524300.0)
    r"context length of LIMIT tokens.{0,60}?: PROMPT(?:\.0)? tokens from the input messages and OUTPUT",
    # Anthropic
    r"exceed context limit: PROMPT \+ OUTPUT > LIMIT",
    r"prompt is too long: PROMPT tokens > LIMIT",
    # Moonshot: "Invalid request: Your request exceeded model token limit: 262144 (requested: 269030)", max_tokens in it
    r"exceeded model token limit: LIMIT(?: \(requested: TOTAL)?",
    r"input token length too long(?:.{0,40}requested: PROMPT)?",
    # vLLM's latest, with and without the output
    r"you passed PROMPT input tokens and requested OUTPUT output tokens.{0,40}context length is only LIMIT tokens",
    r"length is (?:only )?LIMIT tokens.{0,20}your request has PROMPT input tokens",
    # OpenAI: "However, your messages resulted in 8202 tokens"; Azure: "Input tokens exceed the configured limit of"
    r"(?:context length is|configured limit of) LIMIT tokens\..{0,20}your messages resulted in PROMPT tokens",
    r"context length is LIMIT tokens.{0,20}you requested (?:about )?PROMPT tokens",
    # llama.cpp (Ollama and LM Studio hand it through): numbers in the text, older ones beside it
    r"request \(PROMPT tokens\) exceeds the available context size \(LIMIT tokens",
    r"exceeds the available context size.*n_prompt_tokens\W+PROMPT\W+n_ctx\W+LIMIT",
    r"requested tokens \(PROMPT\) exceed context window of LIMIT",
    # vLLM's engine; SGLang; Ollama
    r"prompt \(length PROMPT\) is longer than the maximum model length of LIMIT",
    r"input \(PROMPT tokens\) is longer than the model's context length \(LIMIT",
    r"input length \(PROMPT tokens\) exceeds the model's maximum context length \(LIMIT",
    # Volcengine; OpenRouter: "Input length 203743 exceeds the maximum length 202752"
    r"input length PROMPT exceeds the maximum (?:allowed )?(?:input )?length (?:of )?LIMIT",
    # SiliconFlow
    r"input tokens \(PROMPT\) have exceeded max_prompt_tokens \(LIMIT",
    r"prompt_tokens \(PROMPT\) must be less than max_seq_len \(LIMIT",
    # xAI; Gemini; Copilot
    r"maximum prompt length is LIMIT but the request contains PROMPT",
    r"input token count \(?PROMPT\)? exceeds the maximum number of tokens allowed \(?LIMIT",
    r"token count of PROMPT exceeds the limit of LIMIT",
    # DashScope: "<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 204800]"
    r"range of input length should be \[\d+, ?LIMIT\]",
    r"token length must be less than LIMIT", r"token length exceeds? model limit \(LIMIT tokens",
    # LM Studio
    r"keep the first PROMPT tokens when context the overflows.*context length of only LIMIT",
    r"greater than the context length",
    # Ollama
    r"exceeded max context length by|(?:prompt|input) (?:length )?(?:is longer than|exceeds) the context length",
    # Zhipu (codes 1210, 1261); MiniMax; iFlow
    r"tokens exceeds? the maximum:? ?LIMIT|input length too long",
    r"prompt exceeds max length|prompt ?超长|context window exceeds limit|内容长度超出",
    # whoever else
    r"(?:maximum|max) context length (?:is|of|:) ?LIMIT",
    r"prompt is too long|input is too long|context[_ ](?:length|window)[_ ]exceeded|maximum context length|"
    r"exceeds (?:the|this) (?:model's )?(?:maximum |available )?context|reduce the length of the (?:messages|prompt)")

#: Codes that say it where the text may not: OpenAI; llama.cpp; Zhipu; iFlow.
OVERFLOW_CODES = ("context_length_exceeded", "exceed_context_size_error", "model_context_window_exceeded", "1261",
                  "511", "413")


def find_overflow(status: int, message: Any, code: Any = None, asked: int = 0) -> Optional[Overflow]:
    """Whether an upstream's error means that the prompt is too long for the model; the numbers it tells.

    `message` may be the error's text or its whole body; `asked` is the max_tokens that a total includes which tells of
    no parts.  429 is about speed ("tokens per min"), 401 and 403 about keys.
    """
    text = message[:10000] if isinstance(message, str) else ""
    if status in (401, 403, 404, 429):
        return None
    for words in OVERFLOW_WORDS:                   # compiled when first needed; re keeps them
        named = re.sub(r"\b(LIMIT|PROMPT|OUTPUT|TOTAL)\b", r"(?P<\1>\\d[\\d,]*)", words)
        found = re.search(named, text, re.I | re.S)
        if found:
            number = {name: int(value.replace(",", "")) for name, value in found.groupdict().items() if value}
            output = number.get("OUTPUT") or (asked if number.get("TOTAL", 0) > asked else 0)
            prompt = number.get("PROMPT", 0) or max(0, number.get("TOTAL", 0) - output)
            return prompt, number.get("LIMIT", 0), output
    return (0, 0, 0) if str(code) in OVERFLOW_CODES else None


#: "Range of max_tokens should be [1, 8192]" (DashScope, DeepSeek, Zhipu); OpenAI's "is too large: 32000. This model
#: supports at most 16384 completion tokens"; "`max_tokens` must be less than or equal to `8192`" (Groq and others).
_OUTPUT_CAP = re.compile(r"max_(?:\w+_)?tokens(?:\D{0,60}\[\d+, ?(\d[\d,]*)\]|\W+is too large: \d+\.\D{0,40}at most (\d+)|"
                         r".{0,60}less than or equal to\W+(\d+))", re.I | re.S)


def find_output_cap(status: int, message: str) -> int:
    """The most output tokens a model gives, where a refusal of max_tokens says so; else 0."""
    found = _OUTPUT_CAP.search(message[:10000]) if status in (400, 422) else None
    return int(next(filter(None, found.groups())).replace(",", "")) if found else 0


#: What no waiting heals: a balance or quota that is used up (OpenAI, DeepSeek, Moonshot; Zhipu's 1113; DashScope).
_SPENT = re.compile(r"insufficient[_ ](?:quota|balance|credits?|funds)|exceeded[_ ](?:your )?current[_ ]quota|余额不足|欠费|"
                    r'arrearage|"code": ?"?1113\b', re.I)


def is_spent(status: int, text: str) -> bool:
    """Whether an upstream refuses because nothing is left to pay with."""
    return status == 402 or status >= 400 and _SPENT.search(text[:10000]) is not None


def parse_retry_after(headers: Mapping[str, str], now: float) -> Optional[float]:
    """Seconds from `retry-after-ms` or `retry-after` (a number or an HTTP date, RFC 9110, 10.2.3), None without."""
    value = headers.get("retry-after-ms", "")
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value) / 1000
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,7}(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now) if value else None
    except (TypeError, ValueError, IndexError):
        return None


# --- iFlow's quirks ----------------------------------------------------------

#: Fields set by model where the client did not set them (iflow.md); later patterns add to earlier ones.
IFLOW_TWEAKS: Tuple[Tuple[str, Json], ...] = (
    ("deepseek*", {"thinking_mode": True, "reasoning": True}),
    ("glm-5", {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": True,
               "thinking": {"type": "enabled"}}),
    ("glm-*", {"chat_template_kwargs": {"enable_thinking": True}}),
    ("kimi-k2.5*", {"thinking": {"type": "enabled"}}),
    ("mimo-*", {"thinking": {"type": "enabled"}}),
    ("*thinking*", {"thinking_mode": True}),
    ("*reasoning*", {"reasoning": True}))

#: Models that take none of these.
IFLOW_REMOVED = (("qwen*4b*", ("thinking_mode", "reasoning", "chat_template_kwargs")),)

#: Models that want their earlier reasoning back in multi-turn tool use.
REASONING_BACK = ("glm-4*", "glm-5*", "kimi-*thinking*", "kimi-k2.5*", "minimax-*", "deepseek*")

#: Business codes in bodies, also under HTTP 200 -> the status they stand for.  401 and 403 become the 403 about our key.
IFLOW_CODES = {434: 401, 438: 403, 439: 401, 435: 404, 429: 429, 449: 429, 8211: 429, 511: 400, 413: 400, 514: 502,
               406: 403}


def wants_reasoning_back(model: str) -> bool:
    return any(fnmatchcase(model.lower(), pattern) for pattern in REASONING_BACK)


def _refuses_thinking(chat: Json) -> bool:
    """Whether the client switched thinking off, in any provider's way."""
    thinking, template = chat.get("thinking"), chat.get("chat_template_kwargs")
    switches = [chat.get("enable_thinking"), chat.get("thinking_mode"), chat.get("reasoning"),
                template.get("enable_thinking", template.get("thinking")) if isinstance(template, dict) else None]
    return any(switch is False for switch in switches) or chat.get("reasoning_effort") == "none" or (
        isinstance(thinking, dict) and thinking.get("type") == "disabled")


def adapt_to_iflow(chat: Json, model: str, recall: Callable[[Json], str]) -> Json:
    """A chat request as iFlow wants it; `recall` gives the reasoning that went with a tool call.  A new object."""
    chat = dict(chat)
    name = model.lower()
    if not _refuses_thinking(chat):
        for pattern, fields_added in IFLOW_TWEAKS:
            if fnmatchcase(name, pattern):
                chat = {**fields_added, **chat}
    for pattern, names in IFLOW_REMOVED:
        if fnmatchcase(name, pattern):
            chat = {key: value for key, value in chat.items() if key not in names}
    if chat.get("tools") == []:
        chat = {key: value for key, value in chat.items() if key not in ("tools", "tool_choice")}
    known = IFLOW_MODELS.get(model)
    for key in ("max_tokens", "max_completion_tokens"):
        if known and isinstance(chat.get(key), int) and chat[key] > known.max_output:
            chat[key] = known.max_output
    if wants_reasoning_back(model) and isinstance(chat.get("messages"), list):
        chat["messages"] = refill_reasoning(chat, recall)
    return chat


def refill_reasoning(chat: Json, recall: Callable[[Json], str]) -> Any:
    """The messages of `chat` with the reasoning that their client dropped; the same object where nothing is to be added.

    DeepSeek, Kimi and some models of iFlow refuse a tool call without the reasoning that led to it; where nobody
    knows it any more an empty one will do.
    """
    messages, wanted = chat.get("messages"), not _refuses_thinking(chat)
    filled = [_with_reasoning(message, recall, wanted) for message in messages] if isinstance(messages, list) else []
    return filled if any(new is not old for new, old in zip(filled, messages or ())) else messages


def _with_reasoning(message: Any, recall: Callable[[Json], str], wanted: bool) -> Any:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(calls, list) or not calls or reasoning_of(message):
        return message
    reasoning = recall(calls[0]) if isinstance(calls[0], dict) else ""
    missing = wanted and message.get("reasoning_content") is None
    return {**message, "reasoning_content": reasoning} if reasoning or missing else message


def call_digest(scope: str, call: Json) -> str:
    """What a call's reasoning is kept under.  An id alone is not enough: Kimi's `functions.t:0` is in each conversation."""
    function = call.get("function") if isinstance(call.get("function"), dict) else {}
    given = function.get("arguments")
    given = parse_arguments(given) if isinstance(given, str) else given      # some clients write it anew
    facts = json.dumps([scope, call.get("id"), function.get("name"), given or {}], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


def opening_of(messages: Any) -> str:
    """The first thing the user said: with it a conversation keeps its name, however it goes on."""
    said = [message.get("content") for message in messages if isinstance(message, dict) and message.get("role") == "user"] \
        if isinstance(messages, list) else []
    parts = said[0] if said and isinstance(said[0], list) else said[:1]
    return "\n".join(str(part.get("text") or part) if isinstance(part, dict) else str(part) for part in parts)


def business_refusal(payload: Json, status: int) -> Optional[UpstreamRefused]:
    """iFlow's `{"status": "439", "msg": "…", "body": null}` (or `error_code`), None where it is something else."""
    code = str(payload.get("error_code") or payload.get("status") or "")
    if "choices" in payload or not code.isdigit() or not ("msg" in payload or "error_code" in payload):
        return None
    number = int(code)
    if number in (0, 200):
        return None
    meant = IFLOW_CODES.get(number, status if status >= 400 else 502)
    message = payload.get("msg") or payload.get("message") or "no message"
    return UpstreamRefused(
        f"{one_line(message, 500)} (code {number})", status=meant, type=error_type(meant),
        code="model_not_found" if meant == 404 else "context_length_exceeded" if meant == 400 else None,
        overflow=(0, 0, 0) if meant == 400 else None, retry_after_s=DEFAULT_RETRY_AFTER_S if meant == 429 else None)


class ReasoningNote:
    """Listens to an answer and remembers which reasoning went with which tool calls."""

    def __init__(self, keep: Callable[[Json, str], None]) -> None:
        self._keep = keep
        self._reasoning: List[str] = []
        self._calls: List[Json] = []              #: as they stand in a message
        self._by_index: Dict[Any, Json] = {}

    def hear(self, chunk: Json) -> None:
        choice = first_choice(chunk)
        message = choice.get("delta") or choice.get("message")
        if not isinstance(message, dict):
            return
        reasoning = reasoning_of(message)
        if reasoning:
            self._reasoning.append(reasoning)
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict) and isinstance(call.get("function"), dict):
                self._join(call.get("index"), call.get("id"), **call["function"])

    def _join(self, index: Any, ident: Any, name: Any = None, arguments: Any = None, **_: Any) -> None:
        """A piece of a call to the call that it belongs to."""
        call = self._by_index.get(index) if index is not None else self._calls[-1] if self._calls and not name else None
        if call is None or ident and call["id"] not in (None, ident):
            call = self._by_index[index] = {"id": ident, "function": {"name": "", "arguments": ""}}
            self._calls.append(call)
        function, call["id"] = call["function"], call["id"] or ident
        if isinstance(name, str) and name != function["name"]:
            function["name"] += name
        function["arguments"] += arguments if isinstance(arguments, str) else dump_json(arguments or {}).decode()

    def close(self, ids: Sequence[str] = ()) -> None:
        """`ids`: what the client knows the calls by, where it may differ from what the upstream said."""
        text = "".join(self._reasoning)
        for number, call in enumerate(self._calls if text else ()):
            self._keep({**call, "id": ids[number]} if len(ids) == len(self._calls) else call, text)


class ReasoningMerge:
    """Chat chunks with reasoning and answer brought together as `preserve_reasoning_content` says (iflow.md).

    False: reasoning deltas become content deltas, a blank line before the answer's first.  True: fields as they came;
    where no content ever came, the reasoning once more as content at the end.
    """

    def __init__(self, preserve: bool) -> None:
        self._preserve = preserve
        self._heard: Dict[Any, List[str]] = {}           # reasoning by choice, until its answer begins
        self._answered: Set[Any] = set()
        self.usage: Optional[Json] = None
        self.finish_reason: Optional[str] = None

    def feed(self, chunk: Json) -> Iterator[Any]:
        self.usage = usage_of(chunk) or self.usage
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._merge(choice)
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
        yield chunk

    def close(self) -> Iterator[Any]:
        yield "[DONE]"

    def _merge(self, choice: Json) -> None:
        delta, index = choice.get("delta"), choice.get("index", 0)
        if not isinstance(delta, dict):
            delta = {}
        content = delta.get("content")
        reasoning = reasoning_of(delta)
        if reasoning:
            self._heard.setdefault(index, []).append(reasoning)
        if not self._preserve:
            for name in ("reasoning_content", "reasoning", "reasoning_details"):
                delta.pop(name, None)
            if content and index in self._heard and index not in self._answered:
                content = ("\n\n" + content) if isinstance(content, str) else content
            if reasoning and isinstance(content, (str, type(None))):
                content = reasoning + (content or "")
            if reasoning or content:
                delta["content"] = content
        if delta.get("content") and (self._preserve or content != reasoning):
            self._answered.add(index)
        if self._preserve and choice.get("finish_reason") and index in self._heard and index not in self._answered:
            delta["content"] = "".join(self._heard[index])
            choice["delta"] = delta


def merge_reasoning(completion: Json, preserve: bool) -> Json:
    """The same for a plain answer: reasoning, blank line and answer in `content`, or both fields filled."""
    for choice in completion.get("choices") or ():
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            continue
        reasoning, content = reasoning_of(message), message.get("content")
        if not preserve:
            for name in ("reasoning_content", "reasoning", "reasoning_details"):
                message.pop(name, None)
            if reasoning and isinstance(content, (str, type(None))):
                message["content"] = reasoning + ("\n\n" + content if content else "")
        elif reasoning and not content:
            message["content"] = reasoning
    return completion


def encode_chunk(chunk: Any) -> bytes:
    """A chat chunk, or the end, as a record."""
    return b"data: " + (b"[DONE]" if chunk == "[DONE]" else dump_json(chunk)) + b"\n\n"


_IMAGE_PARTS = ("image_url", "image", "input_image")


def has_images(value: Any) -> bool:
    """Whether a request of any dialect shows an image, in tool results, too."""
    if isinstance(value, list):
        return any(has_images(item) for item in value)
    if isinstance(value, dict):
        return value.get("type") in _IMAGE_PARTS or any(
            has_images(item) for item in value.values() if isinstance(item, (list, dict)))
    return False


# --- streams -----------------------------------------------------------------

class SSEDecoder:
    """Bytes of an event stream in, the data of whole records out.

    Accepts any line end but a bare CR, `data:` with and without a blank, several data lines, comments, a byte order mark.
    """

    def __init__(self) -> None:
        self._pieces: List[bytes] = []   # of a line without its end
        self._data: List[bytes] = []     # of a record without its blank line
        self._size = 0

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > RECORD_LIMIT_BYTES:
            raise UpstreamGarbled("a record of the upstream's stream never ends")

    def feed(self, payload: bytes) -> List[bytes]:
        if b"\n" not in payload:         # joined once, not anew at each read
            self._pieces.append(payload)
            self._grow(len(payload))
            return []
        lines = b"".join([*self._pieces, payload]).split(b"\n")
        self._pieces = [lines.pop()]
        records: List[bytes] = []
        for line in lines:
            if line[:5] == b"data:":
                self._data.append(line[5:].strip(b" \r"))
            elif self._data and line in (b"", b"\r"):
                records.append(b"\n".join(self._data))
                self._data, self._size = [], 0
            elif line[:3] == codecs.BOM_UTF8 and line[3:8] == b"data:":
                self._data.append(line[8:].strip(b" \r"))
        if self._data:
            self._grow(len(payload))
        return records

    def close(self) -> List[bytes]:
        """What a stream that ended without its last blank line still holds."""
        return self.feed(b"\n\n") if any(self._pieces) or self._data else []


def read_records(records: Iterable[bytes]) -> Iterator[Optional[Json]]:
    """The chunks of records, None for [DONE]; UpstreamGarbled, or the UpstreamRefused that a record stands for.

    Some servers leave out the blank line between records: then each line is one.
    """
    for record in records:
        if record == b"[DONE]":
            yield None
            continue
        try:
            chunk = _DECODER.decode(record.decode())
        except RecursionError:
            raise UpstreamGarbled("a record of the upstream's stream is nested too deeply") from None
        except ValueError:
            if b"\n" not in record:
                raise UpstreamGarbled("a record of the upstream's stream is not JSON") from None
            yield from read_records(record.split(b"\n"))
            continue
        refusal = refusal_in(chunk)
        if refusal:
            raise refusal
        if isinstance(chunk, dict):
            yield chunk


#: Enough of a stream's end to hold the last records: finish_reason, usage, [DONE].
TAIL_BYTES = 4096

_FINISH = re.compile(rb'"finish_reason"\s*:\s*"([^"]*)"')
_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{\s*")')
_DONE = re.compile(rb"(?m)^data: ?\[DONE\]")
_ERROR = re.compile(rb'(?m)^data: ?\{\s*"error"\s*:\s*[{"]')


class RelayStream:
    """An upstream's event stream on its way to a chat client, as it came.

    Nothing goes out before the answer begins (role-only and empty chunks are held back) so that an error before it can
    be a status, and nothing but whole records afterwards so that a comment or an error fits in at any time.  Once
    begun, records are not parsed; how the answer ended is read from the tail.
    """

    def __init__(self, fail: Callable[[GatewayError], bytes], choices: int = 1) -> None:
        self.fail = fail                 #: an error as the last thing within the stream
        self._choices = choices          #: how many answers were asked for
        self.began, self.done = False, False
        self.failed = False              #: the upstream itself told the client of an error
        self.finish_reason: Optional[str] = None
        self.usage: Optional[Json] = None
        self.records = 0
        self._decoder, self._held, self._tail = SSEDecoder(), b"", b""

    def passes(self, payload: bytes) -> bool:
        """Whether `payload` may go out exactly as it came; the caller then sends it instead of calling feed()."""
        if not self.began or self._held or payload[-2:] != b"\n\n":
            return False
        self.records += 1
        self._tail = (self._tail + payload)[-TAIL_BYTES:]
        if b"[DONE]" in payload[-64:] or b'"error"' in payload[:24] or len(payload) > TAIL_BYTES:
            self._look_for_end(payload)
        return True

    def feed(self, payload: bytes) -> bytes:
        """What may go out now; UpstreamRefused or UpstreamGarbled while it is still no answer."""
        if not self.began:
            for chunk in read_records(self._decoder.feed(payload)):
                if chunk is None:
                    self.done = True
                elif is_answer(chunk):
                    self.began = True
                    break                # from here on nothing is parsed
        self._held += payload
        if len(self._held) > RECORD_LIMIT_BYTES:
            raise UpstreamGarbled("a record of the upstream's stream never ends")
        if not self.began:
            return b""
        end = max(self._held.rfind(b"\n\n") + 2, self._held.rfind(b"\n\r\n") + 3)
        out, self._held = (self._held[:end], self._held[end:]) if end > 2 else (b"", self._held)
        self._note(out)
        return out

    def close(self) -> bytes:
        """What has to follow the upstream's proper end; UpstreamGarbled where it was no end of an answer."""
        out = b""
        if self._held.strip() and (not self.began or self._is_whole(self._held)):
            out = self.feed(b"\n\n")    # the last record lacked its blank line
        if not self.began:
            raise UpstreamGarbled("the upstream's answer is empty")
        self._read_tail()
        if not self.done and not self.finish_reason and not self.failed:
            raise UpstreamGarbled("the upstream's answer was cut off")
        return out if self.done or self.failed or not self.finish_reason else out + b"data: [DONE]\n\n"

    def is_over(self) -> bool:
        """Whether all answers have ended, though the upstream has not said [DONE]."""
        return self.began and len(_FINISH.findall(self._tail)) >= self._choices

    @staticmethod
    def _is_whole(record: bytes) -> bool:
        """Whether a record without its blank line is all there."""
        try:
            return bool(list(read_records(SSEDecoder().feed(record + b"\n\n"))))
        except UpstreamRefused:
            return True
        except UpstreamGarbled:
            return False

    def _note(self, sent: bytes) -> None:
        self.records += sent.count(b"data:")
        self._tail = (self._tail + sent)[-TAIL_BYTES:]
        self._look_for_end(sent)

    def _look_for_end(self, sent: bytes) -> None:
        """Whether these records say that it is over: the end, or an error of the upstream's own."""
        if b"[DONE]" in sent[-64:] and _DONE.search(sent):
            self.done = True
        if b'"error"' in sent and _ERROR.search(sent):
            self.failed = True
        if len(sent) > TAIL_BYTES:       # the tail may not hold all of it
            for found in _FINISH.finditer(sent):
                self.finish_reason = found.group(1).decode("utf-8", "replace")

    def _read_tail(self) -> None:
        self.done = self.done or _DONE.search(self._tail) is not None
        for found in _FINISH.finditer(self._tail):
            self.finish_reason = found.group(1).decode("utf-8", "replace")
        for found in _USAGE.finditer(self._tail):
            with contextlib.suppress(ValueError):
                self.usage = _DECODER.raw_decode(self._tail[found.end():].decode("utf-8", "replace"))[0]


class HeardStream(RelayStream):
    """The same, with an ear for what a later request has to bring back."""

    def __init__(self, fail: Callable[[GatewayError], bytes], choices: int, note: ReasoningNote) -> None:
        super().__init__(fail, choices)
        self._listener, self._ear = note, SSEDecoder()

    def _hear(self, payload: bytes) -> None:
        for record in self._ear.feed(payload):
            if b'"reasoning' in record or b'"tool_calls"' in record:
                with contextlib.suppress(UpstreamError):         # what it is worth, the client will see
                    for chunk in read_records([record]):
                        self._listener.hear(chunk or {})

    def passes(self, payload: bytes) -> bool:
        passed = super().passes(payload)
        if passed:
            self._hear(payload)
        return passed

    def feed(self, payload: bytes) -> bytes:
        self._hear(payload)
        return super().feed(payload)

    def close(self) -> bytes:
        out = super().close()
        self._listener.close()
        return out


#: Events that say nothing of the answer yet.
_LEADING = ("message_start", "response.created", "response.in_progress")


class TranslatedStream:
    """An upstream's event stream turned into a dialect's own events, as they come.

    The first of them wait for one that tells something: until then another upstream may still answer instead.
    """

    def __init__(self, translator: Any, encode: Callable[[Any], bytes], fail: Callable[[GatewayError], bytes],
                 note: Optional[ReasoningNote] = None) -> None:
        self._fail, self._note, self.failed = fail, note, False
        self._lead: Optional[List[bytes]] = []           #: None: they are with the client
        self.began, self.done, self.records = False, False, 0
        self._decoder, self._held = SSEDecoder(), []
        self._broken: Optional[UpstreamError] = None     # raised once what came before it is with the client
        self._translator, self._encode = translator, encode

    @property
    def usage(self) -> Optional[Json]:
        return self._translator.usage

    @property
    def finish_reason(self) -> Optional[str]:
        return self._translator.finish_reason

    def is_over(self) -> bool:
        return self.began and bool(self.finish_reason)

    def passes(self, payload: bytes) -> bool:
        return False

    def feed(self, payload: bytes) -> bytes:
        return self._take(self._decoder.feed(payload))

    def _take(self, records: Sequence[bytes]) -> bytes:
        out: List[bytes] = []
        try:
            for chunk in read_records(records):
                if self._note is not None and chunk is not None:
                    self._note.hear(chunk)
                if chunk is None:
                    self.done = True
                elif self._lead is None:
                    out.extend(map(self._encode, self._translator.feed(chunk)))
                else:
                    self._open(chunk, out)
        except UpstreamError as exc:
            if not out:
                raise
            self.done, self._broken = True, exc
        self.done = self.done or getattr(self._translator, "ended", False)
        self.records += len(records)
        return b"".join(out)

    def _open(self, chunk: Json, out: List[bytes]) -> None:
        """Hold chunks back until there is an answer in one; then nothing is lost."""
        self._held.append(chunk)
        self.began = self.began or is_answer(chunk)
        if self.began:
            held, self._held = self._held, []
            for chunk in held:
                self._lead_in(self._translator.feed(chunk), out)

    def _lead_in(self, events: Iterator[Any], out: List[bytes]) -> None:
        for event in events:
            if self._lead is None:
                out.append(self._encode(event))
                continue
            self._lead.append(self._encode(event))
            if not isinstance(event, dict) or event.get("type") not in _LEADING:
                out += self._lead
                self._lead = None

    def fail(self, exc: GatewayError) -> bytes:
        """An error as the last thing within the stream."""
        return b"".join(self._lead or ()) + self._fail(exc)

    def close(self) -> bytes:
        """The end of the answer; UpstreamGarbled where the upstream's end was none."""
        out = self._take(self._decoder.close())
        if self._broken is not None:
            raise self._broken
        if not self.began:
            raise UpstreamGarbled("the upstream's answer is empty")
        if not self.done and not self.finish_reason:
            raise UpstreamGarbled("the upstream's answer was cut off")
        rest: List[bytes] = []
        self._lead_in(self._translator.close(), rest)
        if self._note is not None:
            self._note.close(getattr(self._translator, "call_ids", ()))
        return out + b"".join(rest)


# === 7. Anthropic Messages (pure) ============================================
#
# A Messages request becomes a chat request, a completion a message, chunks become events. The plain
# answer is the stream of the same completion, folded: one state machine tells both stories.

#: finish_reason -> stop_reason; any other means `tool_use` where there is a call, else `end_turn`.
STOP_REASON = {"length": "max_tokens", "repetition_truncation": "max_tokens", "content_filter": "refusal",
               "sensitive": "refusal", "model_context_window_exceeded": "model_context_window_exceeded"}

#: HTTP status -> error.type; others: `api_error` from 500 on, else `invalid_request_error`.
MESSAGES_ERROR_TYPE = {401: "authentication_error", 402: "billing_error", 403: "permission_error",
                       404: "not_found_error", 409: "conflict_error", 413: "request_too_large",
                       429: "rate_limit_error", 504: "timeout_error", 529: "overloaded_error"}

#: Claude Code's attribution block; it changes with each prompt and would defeat the upstream's prefix cache.
BILLING_HEADER = "x-anthropic-billing-header:"

#: Claude Code's stand-in for tools it has not loaded yet ("never call").
PLACEHOLDER_TOOL = "DeferredToolPlaceholder"

#: thinking.display values that leave reasoning blocks without text; `updates` shows only the notes between calls.
HIDDEN_DISPLAYS = ("omitted", "updates")

#: OpenAI takes at most this many; the rest is watched for here.
STOP_LIMIT = 4

IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")

_TOOL_CHANGES = ("tool_addition", "tool_removal")
_NOUN = {str: "string", dict: "dictionary", list: "list"}


def _field(block: Json, name: str, kind: type, path: str) -> Any:
    """A required field, or the 400 in Anthropic's words."""
    value = block.get(name)
    if value is None:
        raise BadRequest(f"{path}.{name}: Field required")
    if not isinstance(value, kind):
        raise BadRequest(f"{path}.{name}: Input should be a valid {_NOUN[kind]}")
    return value


def _optional(body: Json, name: str, kind: type) -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        raise BadRequest(f"{name}: Input should be a valid {_NOUN[kind]}")
    return value


def _compact(value: Any) -> str:
    return dump_json(value).decode()


# --- what travels through the client: signatures and ids

#: Starts each signature made here; the rest is base64 of JSON, to be given back to the provider.
SIGNATURE_PREFIX = "iflow2api-1."


def make_signature(text: str, details: Sequence[Json]) -> str:
    """A signature that carries `text` (where the block shows none) and the provider's `reasoning_details`."""
    state = {name: value for name, value in (("text", text), ("details", list(details))) if value}
    return SIGNATURE_PREFIX + base64.b64encode(dump_json(state)).decode()


def read_signature(signature: Any) -> Json:
    """What make_signature put in; {} for a foreign or damaged one."""
    if not isinstance(signature, str) or not signature.startswith(SIGNATURE_PREFIX):
        return {}
    try:
        state = json.loads(base64.b64decode(signature[len(SIGNATURE_PREFIX):]))
    except (ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


_LEGAL_ID = re.compile(r"[A-Za-z0-9_-]+")
_WRAPPED_ID = re.compile(r"toolu_.*?_raw_([A-Za-z0-9_-]+)")


def wrap_id(fresh: str, ident: str) -> str:
    """An id Anthropic allows (`fresh`), with the upstream's own (Kimi: `functions.name:0`) inside."""
    return fresh + "_raw_" + base64.urlsafe_b64encode(ident.encode("utf-8", "replace")).decode().rstrip("=")


def unwrap_id(ident: str) -> str:
    """The upstream's own id, if wrap_id hid one in `ident`."""
    found = _WRAPPED_ID.fullmatch(ident)
    if not found:
        return ident
    try:
        return base64.urlsafe_b64decode(found.group(1) + "=" * (-len(found.group(1)) % 4)).decode()
    except ValueError:
        return ident


# --- content blocks

@dataclass
class _Turn:
    """Consecutive messages of one role; `blocks` come with their place in the request, for error texts."""
    role: str
    blocks: List[Tuple[str, Json]]
    message: Json


def _blocks(content: Any, path: str) -> List[Tuple[str, Json]]:
    if isinstance(content, str):
        return [(path, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise BadRequest(f"{path}: " + ("Field required" if content is None else "Input should be a string or a list"))
    for i, block in enumerate(content):
        if not isinstance(block, dict):
            raise BadRequest(f"{path}.{i}: Input should be a valid dictionary")
    return [(f"{path}.{i}", block) for i, block in enumerate(content)]


def _turns(messages: Any) -> List[_Turn]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: at least one message is required")
    turns: List[_Turn] = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRequest(f"messages.{i}: Input should be a valid dictionary")
        role = message.get("role")
        if role not in ("user", "assistant", "system"):
            raise BadRequest(f"messages.{i}.role: Input should be 'user', 'assistant' or 'system'")
        blocks = _blocks(message.get("content"), f"messages.{i}.content")
        if turns and turns[-1].role == role != "system":
            turns[-1].blocks += blocks
        else:
            turns.append(_Turn(role, blocks, message))
    if next((turn.role for turn in turns if turn.role != "system"), "") != "user":
        raise BadRequest("messages: the first message must use the 'user' role")
    users = [i for i, turn in enumerate(turns) if turn.role == "user"]
    return [turn for i, turn in enumerate(turns)
            if not (turn.message.get("clear_at") == "next_user_message" and i < users[-1])]


def _system_text(blocks: Sequence[Tuple[str, Json]]) -> str:
    texts = [_field(block, "text", str, path) for path, block in blocks if block.get("type") == "text"]
    return "\n\n".join(text for text in texts if text and not text.startswith(BILLING_HEADER))


def _text_part(text: str) -> Json:
    return {"type": "text", "text": text}


def _tool_message(source: str, text: str) -> Json:
    return {"role": "tool", "tool_call_id": source, "content": text}


def _texts(parts: Sequence[Json]) -> List[str]:
    return [part["text"] for part in parts if part["type"] == "text"]


def _joined(parts: List[Json]) -> Any:
    """A plain string when all parts are text (widest compatibility), else the list."""
    texts = _texts(parts)
    return "\n\n".join(texts) if len(texts) == len(parts) else parts


def _merged(first: Json, second: Json) -> Json:
    """Two user messages as one: some chat templates refuse them in a row."""
    parts = [part for content in (first["content"], second["content"])
             for part in ([_text_part(content)] if isinstance(content, str) else content)]
    return {"role": "user", "content": _joined(parts)}


def _enclosed(tag: str, block: Json, names: Sequence[str], inner: List[Json]) -> List[Json]:
    """`inner` between <tag …> and </tag>."""
    given = [(name, block.get(name)) for name in names]
    head = tag + "".join(' {}="{}"'.format(name, value.replace('"', "&quot;"))
                         for name, value in given if isinstance(value, str) and value)
    body = _joined(inner)
    if isinstance(body, str):
        return [_text_part(f"<{head}>\n{body}\n</{tag}>")]
    return [_text_part(f"<{head}>"), *inner, _text_part(f"</{tag}>")]


_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\r\n"


def _base64_data(source: Json, types: Sequence[str], path: str) -> str:
    """The data URL of a base64 source; translate() looks at a megabyte in a millisecond."""
    kind, data = _field(source, "media_type", str, path), _field(source, "data", str, path)
    if kind not in types:
        raise BadRequest(f"{path}.media_type: Input should be " + " or ".join(repr(name) for name in types))
    if not data or data.encode("utf-8", "replace").translate(None, _BASE64):
        raise BadRequest(f"{path}.data: Input should be valid base64")
    return f"data:{kind};base64,{data}"


#: Fields of server-tool results worth reading; encrypted_content and encrypted_index are never sent to a model.
_READABLE = ("text", "stdout", "stderr", "data", "content", "source", "lines", "tool_references", "tabs")


def _readable(value: Any) -> str:
    """The text of a result of Anthropic's own tools: error code, title and URL, output."""
    if isinstance(value, list):
        return "\n".join(filter(None, map(_readable, value)))
    if not isinstance(value, dict):
        return value if isinstance(value, str) else ""
    if value.get("type") == "base64":
        return f"[{value.get('media_type')}]"
    lines = [f"error: {value['error_code']}"] if value.get("error_code") else []
    if isinstance(value.get("url"), str):
        lines.append(f"- {value.get('title') or 'untitled'} ({value['url']})")
    elif isinstance(value.get("tool_name"), str):
        lines.append(value["tool_name"])
    return "\n".join(filter(None, lines + [_readable(value.get(name)) for name in _READABLE]))


class _History:
    """Anthropic's turns as chat messages.

    Tool messages follow their call at once, whatever stood between; a call without a result gets one.
    """

    def __init__(self, profile: Json, thinking: Optional[bool]) -> None:
        self.profile, self.thinking = profile, thinking
        self.messages: List[Json] = []
        self.ids: set = set()                     #: tool_use ids of the conversation
        self.tool_changes: List[Json] = []        #: tool_addition and tool_removal blocks
        self.effort: Any = None                   #: of the last system message that bears one
        self.skipped: List[str] = []              #: block types nobody here knows, for the log

    def add(self, turns: Sequence[_Turn]) -> None:
        at = 0
        while at < len(turns):
            end = at + 1
            while end < len(turns) and turns[end].role != "assistant":
                end += 1
            self._round(turns[at:end])
            at = end

    def _round(self, turns: Sequence[_Turn]) -> None:
        """An assistant turn and what answers it (or what stands before the first)."""
        waiting: List[str] = []
        if turns[0].role == "assistant":
            said = _AssistantTurn(self, turns[0].blocks)
            self.messages.append(said.message())
            waiting, turns = said.ids, turns[1:]
        rest: List[Json] = []
        for turn in turns:
            first = not (self.messages or rest)
            for message in self._user(turn, waiting) if turn.role == "user" else self._system(turn, first):
                neighbours = rest and rest[-1]["role"] == message["role"] == "user"      # a system text between them
                rest.append(_merged(rest.pop(), message) if neighbours else message)
        self.messages += [_tool_message(unwrap_id(ident), NO_RESULT) for ident in waiting] + rest

    def _system(self, turn: _Turn, first: bool) -> List[Json]:
        config = turn.message.get("output_config")
        if isinstance(config, dict) and config.get("effort"):
            self.effort = config["effort"]
        self.tool_changes += [block for _, block in turn.blocks if block.get("type") in _TOOL_CHANGES]
        text = _system_text(turn.blocks)
        if text and self.profile["mid_system"] == "user" and not first:
            return [{"role": "user", "content": f"<system>\n{text}\n</system>"}]
        return [{"role": "system", "content": text}] if text else []

    def _user(self, turn: _Turn, waiting: List[str]) -> List[Json]:
        """Emits the tool messages; returns what is left of the turn, attachments of results first."""
        hoisted: List[Json] = []
        rest: List[Json] = []
        results = [(path, block) for path, block in turn.blocks if block.get("type") == "tool_result"]
        for path, block in results:
            hoisted += self._result(block, path, waiting)
        for path, block in turn.blocks:
            if block.get("type") != "tool_result":
                rest += self.read(block, path)
        parts = hoisted + rest
        return [{"role": "user", "content": _joined(parts)}] if parts or not results else []

    def _result(self, block: Json, path: str, waiting: List[str]) -> List[Json]:
        ident, content = _field(block, "tool_use_id", str, path), block.get("content")
        parts = [] if content is None else self.parts(content, f"{path}.content")
        text, files = "\n\n".join(_texts(parts)), [part for part in parts if part["type"] != "text"]
        if block.get("is_error") is True:
            text = f"[tool error] {text}".rstrip()
        source = unwrap_id(ident)
        if ident not in waiting:              # never an unmatched tool message: the upstream would refuse the whole
            return [_text_part(f"[result of tool call {source}]\n{text}"), *files]
        waiting.remove(ident)
        if files:
            note = f"[{len(files)} attachment(s) of this result follow in the next user message]"
            text = f"{text}\n\n{note}" if text else note
            files.insert(0, _text_part(f"Attachment(s) of tool result {source}:"))
        self.messages.append(_tool_message(source, text))
        return files

    def parts(self, content: Any, path: str) -> List[Json]:
        return [part for at, block in _blocks(content, path) for part in self.read(block, at)]

    def read(self, block: Json, path: str) -> List[Json]:
        kind = block.get("type")
        reader = _PART_READERS.get(kind) if isinstance(kind, str) else None
        if reader:
            return reader(self, block, path)
        self.skipped.append(str(kind))
        return []

    def text(self, block: Json, path: str) -> List[Json]:
        text = _field(block, "text", str, path)
        return [_text_part(text)] if text else []

    def image(self, block: Json, path: str) -> List[Json]:
        source, path = _field(block, "source", dict, path), f"{path}.source"
        if source.get("type") == "base64":
            url = _base64_data(source, IMAGE_TYPES, path)
        elif source.get("type") == "url":
            url = _field(source, "url", str, path)
        else:
            raise BadRequest(f"{path}: an image must be given as 'base64' or 'url'; there is no file store here")
        return [{"type": "image_url", "image_url": {"url": url}}] if self.profile["vision"] else [_text_part(NO_IMAGE)]

    def document(self, block: Json, path: str) -> List[Json]:
        source, path = _field(block, "source", dict, path), f"{path}.source"
        kind = source.get("type")
        if kind == "text":
            text = _field(source, "data", str, path)
            return _enclosed("document", block, ("title", "context"), [_text_part(text)])
        if kind == "content":
            inner = self.parts(source.get("content"), f"{path}.content")
            return _enclosed("document", block, ("title", "context"), inner)
        if kind != "base64":
            raise BadRequest(f"{path}: a document must be given as 'base64', 'text' or 'content'; none is fetched here")
        data = _base64_data(source, ("application/pdf",), path)
        title = block.get("title")
        name = title if isinstance(title, str) and title else "document.pdf"
        if not self.profile["files"]:                    # never a 400: it would come again with each later request
            return [_text_part(NO_PDF.format(name))]
        return [{"type": "file", "file": {"filename": name, "file_data": data}}]

    def search_result(self, block: Json, path: str) -> List[Json]:
        inner = self.parts(block.get("content") or [], f"{path}.content")
        return _enclosed("search_result", block, ("source", "title"), inner)

    def tool_reference(self, block: Json, path: str) -> List[Json]:
        return [_text_part(f"Tool {_field(block, 'tool_name', str, path)} is available now.")]

    def browser_state(self, block: Json, path: str) -> List[Json]:
        tabs = _readable(block.get("tabs"))
        return [_text_part(f"Open tabs:\n{tabs}")] if tabs else []

    def container_upload(self, block: Json, path: str) -> List[Json]:
        return [_text_part(f"[uploaded file {block.get('file_id')}]")]

    def compaction(self, block: Json, path: str) -> List[Json]:
        text = _readable(block.get("content"))
        return [_text_part(text)] if text else []


#: Blocks of users, tool results and documents.
_PART_READERS: Dict[str, Callable[[_History, Json, str], List[Json]]] = {
    "text": _History.text, "image": _History.image, "document": _History.document,
    "search_result": _History.search_result, "tool_reference": _History.tool_reference,
    "browser_state": _History.browser_state, "container_upload": _History.container_upload,
    "compaction": _History.compaction}


class _AssistantTurn:
    """One assistant turn; texts that only citations cut apart are glued, others get a blank line between."""

    def __init__(self, history: _History, blocks: Sequence[Tuple[str, Json]]) -> None:
        self.history = history
        self.texts: List[str] = []
        self.thoughts: List[str] = []
        self.details: List[Json] = []
        self.calls: List[Json] = []
        self.ids: List[str] = []                  #: of the calls, as the client knows them
        self.labels: Dict[str, str] = {}          #: server tool call -> its name
        glue = False
        for path, block in blocks:
            kind = str(block.get("type"))
            if kind != "text":
                reader = _ASSISTANT_READERS.get(kind)
                if reader is None:
                    reader = _AssistantTurn.server_result if kind.endswith("_tool_result") else _AssistantTurn.other
                reader(self, block, path)
                glue = False
            elif _field(block, "text", str, path):
                self.texts.append((self.texts.pop() if glue else "") + block["text"])
                glue = True

    def thinking(self, block: Json, path: str) -> None:
        state = read_signature(block.get("signature"))
        thought = block.get("thinking") or state.get("text")
        if isinstance(thought, str) and thought:
            self.thoughts.append(thought)
        if isinstance(state.get("details"), list):
            self.details += state["details"]

    def tool_use(self, block: Json, path: str) -> None:
        ident, name = _field(block, "id", str, path), _field(block, "name", str, path)
        given = {} if block.get("input") is None else _field(block, "input", dict, path)
        self.ids.append(ident)
        self.history.ids.add(ident)
        self.calls.append({"id": unwrap_id(ident), "type": "function",
                           "function": {"name": short_name(name), "arguments": _compact(given)}})

    def server_call(self, block: Json, path: str) -> None:
        """Not a tool call: its result stands in this same turn, so no tool message would follow."""
        label = ".".join(str(block[name]) for name in ("server_name", "name") if block.get(name))
        self.labels[str(block.get("id"))] = label
        self.texts.append(f"[{label} {_compact(block.get('input') or {})}]")

    def server_result(self, block: Json, path: str) -> None:
        label = self.labels.get(str(block.get("tool_use_id"))) or str(block["type"]).replace("_tool_result", "")
        outcome = "error" if block.get("is_error") is True else "results"
        self.texts.append(f"[{label} {outcome}]\n{_readable(block.get('content'))}".rstrip())

    def other(self, block: Json, path: str) -> None:
        parts = self.history.read(block, path)
        self.texts += [part["text"] if part["type"] == "text" else f"[{block['type']}]" for part in parts]

    def dropped(self, block: Json, path: str) -> None:
        """Opaque, or of no meaning to another model."""

    def message(self) -> Json:
        profile = self.history.profile
        field, thought = profile["reasoning_field"], "\n\n".join(self.thoughts)
        message: Json = {"role": "assistant", "content": "\n\n".join(self.texts) or (None if self.calls else "")}
        if self.calls:
            message["tool_calls"] = self.calls
        if field and self.details:
            message["reasoning_details"] = self.details
        elif field == "reasoning_details" and thought:
            message["reasoning_details"] = [{"type": "reasoning.text", "text": thought}]
        required = self.calls and profile["require_reasoning_on_tool_calls"] and self.history.thinking is not False
        if field and field != "reasoning_details" and (thought or required):
            message[field] = thought
        return message


_ASSISTANT_READERS: Dict[str, Callable[[_AssistantTurn, Json, str], None]] = {
    "thinking": _AssistantTurn.thinking, "tool_use": _AssistantTurn.tool_use,
    "server_tool_use": _AssistantTurn.server_call, "mcp_tool_use": _AssistantTurn.server_call,
    "redacted_thinking": _AssistantTurn.dropped, "mcp_tool_listing": _AssistantTurn.dropped,
    "fallback": _AssistantTurn.dropped}


# --- tools

def _schema(required: Sequence[str], **properties: Any) -> Json:
    """An object schema; a property is its type, its enum values, or a schema."""
    spelled = {name: {"type": value} if isinstance(value, str) else
               {"type": "string", "enum": list(value)} if isinstance(value, tuple) else value
               for name, value in properties.items()}
    return {"type": "object", "properties": spelled, "required": list(required)}


_POINT = {"type": "array", "items": {"type": "integer"}}
_EDITING = {"file_text": "string", "old_str": "string", "new_str": "string", "insert_line": "integer",
            "insert_text": "string", "view_range": _POINT}
_EDITS = ("view", "create", "str_replace", "insert")
_POINTING = ("key", "type", "mouse_move", "left_click", "left_click_drag", "right_click", "middle_click",
             "double_click", "screenshot", "cursor_position")
_HOLDING = ("left_mouse_down", "left_mouse_up", "scroll", "hold_key", "wait", "triple_click")


def _bash_tool(tool: Json, version: int) -> Tuple[str, Json]:
    return ("Run a command in a persistent bash session; `restart` starts a new one.",
            _schema([], command="string", restart="boolean"))


def _editor_tool(tool: Json, version: int) -> Tuple[str, Json]:
    commands = _EDITS + (("undo_edit",) if version < 20250429 else ())
    return ("View, create and edit text files. `old_str` must occur exactly once; `insert_line` 0 is the top.",
            _schema(["command", "path"], command=commands, path="string", **_EDITING))


def _memory_tool(tool: Json, version: int) -> Tuple[str, Json]:
    return ("Read and keep notes in files under /memories, which outlive this conversation.",
            _schema(["command"], command=_EDITS + ("delete", "rename"), path="string", old_path="string",
                    new_path="string", **_EDITING))


def _computer_tool(tool: Json, version: int) -> Tuple[str, Json]:
    actions = _POINTING + (_HOLDING if version >= 20250124 else ()) + (("zoom",) if version >= 20251124 else ())
    size = f"{tool.get('display_width_px')}x{tool.get('display_height_px')}"
    return (f"Use the mouse, the keyboard and screenshots of a {size} pixel display; coordinates are [x, y].",
            _schema(["action"], action=actions, coordinate=_POINT, start_coordinate=_POINT, region=_POINT,
                    text="string", duration="number", scroll_direction=("up", "down", "left", "right"),
                    scroll_amount="integer"))


#: Tools the client runs and whose schema only Claude knows by heart.
_CLIENT_TOOLS: Dict[str, Callable[[Json, int], Tuple[str, Json]]] = {
    "bash": _bash_tool, "text_editor": _editor_tool, "memory": _memory_tool, "computer": _computer_tool}
_CLIENT_TOOL = re.compile(r"(bash|text_editor|memory|computer)_(\d{8})")

#: Tools Anthropic's servers run; profile["server_tools"] says what becomes of them, by these names.
SERVER_TOOLS = ("web_search", "web_fetch", "code_execution", "tool_search_tool", "advisor", "mcp_toolset")

#: One entry standing for a family of tools with no definition on the wire: refused, for it cannot be honoured.
TOOLSETS = ("computer_toolset", "browser_toolset")


class _Tools:
    """The request's tools as Chat's; `names` maps shortened names back."""

    def __init__(self, profile: Json) -> None:
        self.profile = profile
        self.chat: List[Json] = []
        self.fields: Json = {}                    #: what switches the provider's own tools on beside `tools`
        self.missing: List[str] = []              #: tools nobody here runs
        self.names: Dict[str, str] = {}
        self.known: Dict[str, bool] = {}          #: name -> whether the model may be made to call it

    def add(self, tool: Any, path: str) -> None:
        if not isinstance(tool, dict):
            raise BadRequest(f"{path}: Input should be a valid dictionary")
        kind = str(tool.get("type") or "custom")
        if kind.startswith(TOOLSETS):
            raise BadRequest(f"{path}.type: {kind} is not supported here; name the tools one by one")
        client = _CLIENT_TOOL.fullmatch(kind)
        served = not client and (kind.startswith(SERVER_TOOLS) or kind != "custom" and "input_schema" not in tool)
        name = "" if kind == "mcp_toolset" else _field(tool, "name", str, path)
        if not served and not name:
            raise BadRequest(f"{path}.name: String should have at least 1 character")
        if name and name in self.known:
            raise BadRequest(f"tools: Tool names must be unique; {name!r} is there twice")
        if name == PLACEHOLDER_TOOL:
            return
        self.known[name] = not served
        if served:
            self._server(tool, kind, path)
        elif client:
            description, schema = _CLIENT_TOOLS[client.group(1)](tool, int(client.group(2)))
            self._function(name, {"description": description, "parameters": schema})
        else:
            self._custom(name, tool, path)

    def _custom(self, name: str, tool: Json, path: str) -> None:
        schema = {} if tool.get("input_schema") is None else _field(tool, "input_schema", dict, path)
        given = schema.get("properties")                 # LM Studio refuses less than both
        schema = {**schema, "type": schema.get("type") or "object", "properties": given if isinstance(given, dict) else {}}
        function: Json = {"parameters": schema}
        if isinstance(tool.get("description"), str):
            function["description"] = tool["description"]
        if isinstance(tool.get("strict"), bool) and self.profile["strict_tools"]:
            function["strict"] = tool["strict"]
        self._function(name, function)

    def _function(self, name: str, function: Json) -> None:
        short = short_name(name)
        self.names[short] = name
        self.chat.append({"type": "function", "function": {"name": short, **function}})

    def _server(self, tool: Json, kind: str, path: str) -> None:
        policy = self.profile["server_tools"]
        if policy == "error":
            raise BadRequest(f"{path}.type: {kind} runs on Anthropic's servers and is not available here")
        family = next((family for family in SERVER_TOOLS if kind.startswith(family)), kind)
        native = policy.get(family) if isinstance(policy, dict) else None
        if not isinstance(native, dict):
            if family not in ("tool_search_tool", "mcp_toolset"):        # all tools are listed anyway
                self.missing.append(str(tool.get("name")))
        elif isinstance(native.get("fields"), dict):
            self.fields.update(native["fields"])
        else:
            self.chat.append(native)

    def choice(self, choice: Any, thinking: Optional[bool]) -> Json:
        """The chat fields for `tool_choice`."""
        if choice is None or not self.chat:
            return {}
        kind = choice.get("type") if isinstance(choice, dict) else None
        if kind not in ("auto", "any", "tool", "none"):
            raise BadRequest("tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'")
        fields: Json = {"tool_choice": {"any": "required", "tool": "auto"}.get(kind, kind)}
        if kind == "tool":
            name = _field(choice, "name", str, "tool_choice")
            if name not in self.known:
                raise BadRequest(f"tool_choice.name: Tool {name!r} not found in provided tools")
            if self.known[name]:
                fields["tool_choice"] = {"type": "function", "function": {"name": short_name(name)}}
        free = thinking and not self.profile["forced_tool_choice_with_thinking"] or not any(self.known.values())
        if free and kind in ("any", "tool"):
            fields["tool_choice"] = "auto"
        if choice.get("disable_parallel_tool_use") is True and self.profile["parallel_tool_calls"]:
            fields["parallel_tool_calls"] = False
        return fields


def _changed_tools(tools: Sequence[Any], changes: Sequence[Json]) -> List[Any]:
    """`tools` after the additions and removals that system messages brought."""
    gone: Dict[str, bool] = {}
    offered = list(tools)
    for change in changes:
        target = change.get("tool") if isinstance(change.get("tool"), dict) else {}
        definition = target.get("definition")
        named = definition if isinstance(definition, dict) else target
        gone[str(named.get("name"))] = change["type"] == "tool_removal"
        if named is definition and change["type"] == "tool_addition":
            offered = [tool for tool in offered if not isinstance(tool, dict) or tool.get("name") != named.get("name")]
            offered.append(definition)
    return [tool for tool in offered if not isinstance(tool, dict) or not gone.get(str(tool.get("name")))]


# --- the request

_USER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_THINKING = {"enabled": True, "adaptive": True, "between_tools": True, "disabled": False}
_COPIED = ("temperature", "top_p", "top_k")


def _max_tokens(body: Json, profile: Json) -> int:
    value = body.get("max_tokens")
    if value is None:
        raise BadRequest("max_tokens: Field required")
    whole = isinstance(value, int) or isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not whole:
        raise BadRequest("max_tokens: Input should be a valid integer")
    if value < 0:
        raise BadRequest("max_tokens: Input should be greater than or equal to 0")
    return min(int(value), profile.get("max_output") or int(value))


def _refuse(body: Json) -> None:
    """Fields that ask for something only Anthropic's servers can do; silence would change the answer."""
    for name, why in (("thread", "history kept on the server"), ("compaction", "compaction on the server"),
                      ("mcp_servers", "MCP calls from the server")):
        if body.get(name):
            raise BadRequest(f"{name}: {why} is not available here")


def _stop_sequences(body: Json) -> List[str]:
    given = _optional(body, "stop_sequences", list) or []
    if not all(isinstance(text, str) and text for text in given):
        raise BadRequest("stop_sequences: each stop sequence must be a non-empty string")
    return given


def _answer_schema(config: Json, body: Json) -> Optional[Json]:
    wish = config.get("format") or body.get("output_format")
    if wish is None:
        return None
    if not isinstance(wish, dict) or wish.get("type") != "json_schema":
        raise BadRequest("output_config.format.type: Input should be 'json_schema'")
    return _field(wish, "schema", dict, "output_config.format")


def _demand_schema(chat: Json, schema: Json, style: str) -> None:
    """Structured output, as strictly as the provider can."""
    if style == "json_schema":
        chat["response_format"] = {"type": "json_schema",
                                   "json_schema": {"name": "output", "schema": schema, "strict": True}}
        return
    if style == "json_object":
        chat["response_format"] = {"type": "json_object"}
    rule = "Answer with nothing but JSON that fits this JSON Schema:\n" + _compact(schema)
    _instruct(chat["messages"], rule)


def _instruct(messages: List[Json], rule: str) -> None:
    """Add a rule to the system text."""
    if messages[0]["role"] == "system":
        messages[0] = {**messages[0], "content": messages[0]["content"] + "\n\n" + rule}
    else:
        messages.insert(0, {"role": "system", "content": rule})


def _user_of(body: Json) -> Optional[str]:
    metadata = body.get("metadata")
    user = metadata.get("user_id") if isinstance(metadata, dict) else None
    if not isinstance(user, str) or not user or _USER_ID.fullmatch(user):
        return user if isinstance(user, str) and user else None
    return hashlib.sha256(user.encode("utf-8", "replace")).hexdigest()    # Claude Code: a JSON document


class MessagesTurn:
    """One Messages request: its chat request, and its answers in Anthropic's shape.

    `hide_reasoning` (set by the caller): no thinking blocks; reasoning is text only where there is nothing else.
    `estimate` may be replaced by a better one; it seeds message_start and stands in for a missing count.
    """

    def __init__(self, body: Json, profile: Json, model: str) -> None:
        _refuse(body)
        self.body, self.profile = body, profile
        self.model = body["model"] if isinstance(body.get("model"), str) else model
        self.max_tokens = _max_tokens(body, profile)
        self.stop_sequences = _stop_sequences(body)
        self.hide_reasoning = False
        self.omit_thinking = False
        self.scale: Callable[[int], int] = int     #: estimated tokens -> as this model counts them
        self.chat = self._to_chat(model)

    def _to_chat(self, model: str) -> Json:
        body, profile = self.body, self.profile
        config, (thinking, budget) = _optional(body, "output_config", dict) or {}, self._thinking()
        history = _History(profile, thinking)
        system = body.get("system")
        if isinstance(system, str) and system.startswith(BILLING_HEADER):
            system = system.partition("\n")[2]
        top = _system_text(_blocks(system, "system")) if system is not None else ""
        if top:
            history.messages.append({"role": "system", "content": top})
        turns = _turns(body.get("messages"))
        history.add(turns)
        self.ids, self.skipped = history.ids, history.skipped
        chat: Json = {"model": model, "messages": history.messages, profile["max_tokens_field"]: self.max_tokens}
        if turns[-1].role == "assistant" and history.messages[-1]["role"] == "assistant":
            self._prefill(chat)
        self._set_options(chat)
        self._set_tools(chat, history, thinking)
        effort = history.effort or config.get("effort")
        set_thinking(chat, profile, thinking, budget, effort if isinstance(effort, str) else None)
        schema = _answer_schema(config, body)
        if schema is not None:
            _demand_schema(chat, schema, profile["structured_output"])
        return chat

    def _thinking(self) -> Tuple[Optional[bool], Optional[int]]:
        """Whether the client wants thinking (None: it does not say), and its budget."""
        wish = _optional(self.body, "thinking", dict)
        if wish is None:
            return None, None
        if str(wish.get("type")) not in _THINKING:
            raise BadRequest("thinking.type: Input should be " + ", ".join(repr(name) for name in _THINKING))
        self.omit_thinking = wish.get("display") in HIDDEN_DISPLAYS
        budget = wish.get("budget_tokens")
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
            raise BadRequest("thinking.enabled.budget_tokens: Input should be a valid integer")
        # Clamped, not refused: with interleaved thinking a budget above max_tokens is legal, and ours may be lowered.
        return _THINKING[wish["type"]], min(max(budget, 1024), max(1, self.max_tokens - 1)) if budget else None

    def _prefill(self, chat: Json) -> None:
        switch = self.profile["prefill"]
        if switch == "continue_final_message":
            chat.update(continue_final_message=True, add_generation_prompt=False)
        elif switch:
            chat["messages"][-1][switch] = True

    def _set_options(self, chat: Json) -> None:
        body, profile = self.body, self.profile
        for name in _COPIED:
            if body.get(name) is not None and (name != "top_k" or profile["top_k"]):
                chat[name] = body[name]
        if self.stop_sequences:
            chat["stop"] = self.stop_sequences[:STOP_LIMIT]
        if body.get("stream") is True:
            chat["stream"] = True
            if profile["stream_usage"]:
                chat["stream_options"] = {"include_usage": True}
        user = _user_of(body)
        if user and profile["user_field"]:
            chat[profile["user_field"]] = user

    def _set_tools(self, chat: Json, history: _History, thinking: Optional[bool]) -> None:
        tools = _Tools(self.profile)
        self.names = tools.names
        for i, tool in enumerate(_changed_tools(_optional(self.body, "tools", list) or [], history.tool_changes)):
            tools.add(tool, f"tools.{i}")
        if tools.chat:
            chat["tools"] = tools.chat
        if tools.missing and chat["messages"][0]["role"] == "system":    # else a model makes results up
            _instruct(chat["messages"], NO_TOOL.format(", ".join(tools.missing)))
        chat.update(tools.fields)
        chat.update(tools.choice(self.body.get("tool_choice"), thinking))

    @cached_property
    def raw_estimate(self) -> int:
        """About how many tokens the prompt has, before the model's own way of counting."""
        return count_message_tokens(self.body)

    @cached_property
    def estimate(self) -> int:
        return self.scale(self.raw_estimate)

    @property
    def local(self) -> Optional[Json]:
        """The whole answer to `max_tokens: 0` (warming a cache), which no upstream knows; else None."""
        if self.max_tokens:
            return None
        ident = hashlib.sha256(dump_json(self.body)).hexdigest()[:24]
        return _fold(self.local_events(lambda prefix: prefix + ident))

    def local_events(self, new_id: Callable[[str], str]) -> Iterator[Json]:
        """The same answer as a stream."""
        stream = self.stream(new_id)
        yield from stream.feed({"choices": [{"finish_reason": "length"}]})
        yield from stream.close()

    def reply(self, completion: Json, new_id: Callable[[str], str]) -> Json:
        """The message for a whole completion."""
        choice = first_choice(completion)
        message = choice.get("message")
        if not isinstance(message, dict):
            raise UpstreamGarbled("the upstream's answer has no message in it")
        calls = message.get("tool_calls")
        calls = [{**call, "index": i} for i, call in enumerate(calls) if isinstance(call, dict)] \
            if isinstance(calls, list) else None
        stream = self.stream(new_id)
        events = list(stream.feed({"choices": [{**choice, "delta": {**message, "tool_calls": calls}}],
                                   "usage": usage_of(completion)}))
        return _fold(events + list(stream.close()), cut=stream.finish_reason == "length")

    def stream(self, new_id: Callable[[str], str]) -> MessagesStream:
        return MessagesStream(self, new_id)


# --- tool arguments

def partial_object(text: str) -> Json:
    """The most of an object that was cut off by the length limit."""
    closers, cuts, scan = "", [], re.compile(r'"(?:[^"\\]|\\.)*"|["{}\[\],]', re.S)
    tail = ""
    for found in scan.finditer(text):
        mark = found.group()
        if mark == '"':                            # a string without an end
            tail = '"'
            break
        if mark in ("{", "["):
            closers = ("}" if mark == "{" else "]") + closers
            cuts.append((found.end(), closers))
        elif mark in ("}", "]"):
            closers = closers[1:]
        elif mark == ",":
            cuts.append((found.start(), closers))
    for end, closing in [(len(text), tail + closers), *reversed(cuts[-4:])]:
        try:
            value = json.loads(text[:end] + closing, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}


class _ToolCall:
    """A call as it arrives: its name may come in pieces, its arguments before the name or more than once."""

    def __init__(self, ident: str, source: str) -> None:
        self.id, self.source, self.name = ident, source, ""
        self.pending = ""                 #: arguments not sent yet
        self.begun = False                #: an argument byte has come
        self.odd = False                  #: not an object (encoded twice, null, …): kept to the end and mended
        self.opened = False
        self.scanner = ObjectScanner()

    @property
    def settled(self) -> bool:
        return self.opened and self.scanner.complete

    def add(self, function: Json) -> None:
        name, given = function.get("name"), function.get("arguments")
        if isinstance(name, str) and not self.opened and name != self.name:    # equal: some repeat it in each chunk
            self.name += name
        text = _compact(given) if isinstance(given, dict) else given
        if not isinstance(text, str) or self.scanner.complete:
            return
        if not self.begun:
            text = text.lstrip()
            self.begun, self.odd = bool(text), text[:1] not in ("", "{")
        self.pending += text if self.odd else text[:self.scanner.feed(text)]

    def take(self, last: bool) -> str:
        """The arguments to send now."""
        if self.odd and not last:
            return ""
        text, self.pending = self.pending, ""
        return _compact(parse_arguments(text)) if self.odd else text


class _ToolCalls:
    """The calls of one answer, in the order they appeared."""

    def __init__(self, ids: set, new_id: Callable[[str], str]) -> None:
        self.all: List[_ToolCall] = []
        self.current = 0                  #: the active call, the first that is not closed
        self.ids, self.new_id = set(ids), new_id
        self.by_index: Dict[int, _ToolCall] = {}
        self.by_source: Dict[str, _ToolCall] = {}
        self.touched: List[_ToolCall] = []        #: by the entries of this chunk

    @property
    def busy(self) -> bool:
        """Whether a call is still to be completed."""
        return not all(call.settled for call in self.all[self.current:])

    def find(self, item: Json, function: Json) -> _ToolCall:
        """The call a delta belongs to: by index, else by id, else the last one; or a new one."""
        index, source, name = item.get("index"), item.get("id"), function.get("name")
        index = index if isinstance(index, int) and not isinstance(index, bool) else None
        source = source if isinstance(source, str) else ""
        if index is not None:
            call = self.by_index.get(index)
        elif source:
            call = self.by_source.get(source)
        else:
            call = self.all[-1] if self.all else None
        twice = name and not source and call in self.touched     # two entries of one chunk are two calls
        if call is None or twice or name and self._is_another(call, source, function):
            call = _ToolCall(self._claim(source), source)
            self.all.append(call)
        self.touched.append(call)
        if index is not None:
            self.by_index[index] = call
        if source:
            call.source = call.source or source
            self.by_source.setdefault(source, call)
        return call

    @staticmethod
    def _is_another(call: _ToolCall, source: str, function: Json) -> bool:
        """Servers that send every call under index 0 show a new one by a new id, or a new name after the end.

        An id that comes late, with the name once more, is still the call's own.
        """
        if source and call.source:
            return source != call.source
        renamed = bool(call.name) and function["name"] != call.name
        if call.scanner.complete:
            return renamed or bool(source and call.name and function.get("arguments"))
        return renamed and bool(source) and call.begun

    def _claim(self, source: str) -> str:
        """An id that is legal and new in this conversation: the upstream's if it is both."""
        ident = source
        if source and not _LEGAL_ID.fullmatch(source):
            ident = wrap_id(self.new_id("toolu_"), source)
        elif not source or source in self.ids:
            ident = self.new_id("toolu_")
        self.ids.add(ident)
        return ident


# --- the stream

class _StopWatch:
    """Ends the text at stop sequences the upstream was not told of; holds back what may be the start of one."""

    def __init__(self, sequences: Sequence[str]) -> None:
        self.sequences, self.hit = sequences, ""
        self.keep, self.tail = max(map(len, sequences)) - 1, ""

    def feed(self, text: str) -> str:
        text, self.tail = self.tail + text, ""
        found = [(text.find(sequence), sequence) for sequence in self.sequences if sequence in text]
        if found:
            at, self.hit = min(found)
            return text[:at]
        at = max(0, len(text) - self.keep)
        self.tail = text[at:]
        return text[:at]

    def close(self) -> str:
        text, self.tail = self.tail, ""
        return text


def _content_text(content: Any) -> str:
    """The text of a `content` that is a part list."""
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts = [part.get("text") or part.get("refusal") for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


class MessagesStream:
    """Chat chunks in, Messages events out. At most one block is open; indexes rise by one.

    Of several calls one is active and streams live, the others wait; what a model says while a call is
    incomplete is kept back until the calls are done.
    """

    def __init__(self, turn: MessagesTurn, new_id: Callable[[str], str]) -> None:
        self.turn, self.new_id = turn, new_id
        self.usage: Optional[Json] = None
        self.finish_reason: Optional[str] = None
        self.stop_sequence: Optional[str] = None
        self.started = self.spoke = self.refused = False
        self.index, self.open = -1, ""             #: of the latest block; the type of the open one
        self.blank = ""                            #: whitespace that waits for a visible character
        self.size = 0                              #: UTF-8 bytes of the answer, for a missing usage
        self.hidden: List[str] = []                #: reasoning that becomes text only if nothing else comes
        self.thought: List[str] = []               #: reasoning that only the signature carries
        self.details: List[Json] = []              #: reasoning_details of the open thinking block
        self.held: List[Tuple[str, str, Any]] = []  #: said while a call was incomplete
        self.calls = _ToolCalls(turn.ids, new_id)
        self.tags = ThinkTags() if turn.profile["think_tags"] else None
        self.watch = _StopWatch(turn.stop_sequences[STOP_LIMIT:]) if turn.stop_sequences[STOP_LIMIT:] else None

    def feed(self, chunk: Json) -> Iterator[Json]:
        choice = first_choice(chunk)
        if choice.get("finish_reason"):
            self._finish(choice)
        if "usage" in chunk or "usage" in choice:
            self.usage = usage_of(chunk) or self.usage
        if not self.started:
            yield self._message_start()
        delta = choice.get("delta")
        if isinstance(delta, dict) and delta and not (self.watch and self.watch.hit):
            reasoning, details = reasoning_of(delta), delta.get("reasoning_details")
            if reasoning or details:
                yield from self._reasoning(reasoning, details)
            content = delta.get("content")
            if content:
                yield from self._content(content if isinstance(content, str) else _content_text(content))
            if delta.get("refusal"):
                self.refused = True
                yield from self._content(_content_text([delta]))
            if delta.get("tool_calls") or delta.get("function_call"):
                yield from self._tool_calls(delta)

    def close(self) -> Iterator[Json]:
        if not self.started:
            yield self._message_start()
        yield from self._flush_text()
        yield from self._advance(last=True)
        yield from self._release()
        if self.hidden and not self.spoke:
            yield from self._text("".join(self.hidden))
        yield from self._close_block()
        reason, sequence, details = self._stop()
        yield {"type": "message_delta", "usage": self._usage(),
               "delta": {"stop_reason": reason, "stop_sequence": sequence, "stop_details": details}}
        yield {"type": "message_stop"}

    @property
    def ended(self) -> bool:
        """Whether a stop sequence of ours was hit, after which the upstream talks to nobody."""
        return self.watch is not None and bool(self.watch.hit)

    @property
    def call_ids(self) -> List[str]:
        """What the calls are called when they come back."""
        return [unwrap_id(call.id) for call in self.calls.all if call.opened]

    # --- the frame

    def _message_start(self) -> Json:
        self.started = True
        usage = {"input_tokens": parse_usage(self.usage).prompt or self.turn.estimate, "cache_creation_input_tokens": 0,
                 "cache_read_input_tokens": 0, "output_tokens": 0, "service_tier": "standard"}
        return {"type": "message_start", "message": {
            "id": self.new_id("msg_"), "type": "message", "role": "assistant", "model": self.turn.model, "content": [],
            "stop_reason": None, "stop_sequence": None, "stop_details": None, "usage": usage}}

    def _finish(self, choice: Json) -> None:
        reason = choice["finish_reason"]
        if not isinstance(reason, str):
            return
        if reason in FATAL_FINISH:
            raise UpstreamRefused(f"the upstream broke off its answer ({reason})", status=FATAL_FINISH[reason])
        self.finish_reason = reason
        for name in ("stop_reason", "matched_stop"):          # vLLM, SGLang
            if isinstance(choice.get(name), str) and choice[name] in self.turn.stop_sequences:
                self.stop_sequence = choice[name]

    def _stop(self) -> Tuple[str, Optional[str], Optional[Json]]:
        called = any(call.opened for call in self.calls.all)
        sequence = self.watch.hit if self.watch and self.watch.hit else self.stop_sequence
        reason = STOP_REASON.get(self.finish_reason or "") or ("tool_use" if called else "end_turn")
        if sequence and (reason == "end_turn" or sequence != self.stop_sequence):
            return "stop_sequence", sequence, None
        if reason == "refusal" or reason == "end_turn" and self.refused:
            return "refusal", None, {"type": "refusal", "category": None, "explanation": None}
        return reason, None, None

    def _usage(self) -> Json:
        usage = parse_usage(self.usage)
        prompt = usage.prompt or self.turn.estimate
        counts: Json = {"input_tokens": max(0, prompt - usage.cached - usage.cache_write),
                        "cache_creation_input_tokens": usage.cache_write, "cache_read_input_tokens": usage.cached,
                        "output_tokens": usage.completion or int(self.size / 3.5 + 0.99)}
        if usage.reasoning is not None:
            counts["output_tokens_details"] = {"thinking_tokens": usage.reasoning}
        return counts

    # --- blocks

    def _open(self, block: Json) -> Iterator[Json]:
        yield from self._close_block()
        self.index += 1
        self.open = block["type"]
        yield {"type": "content_block_start", "index": self.index, "content_block": block}

    def _close_block(self) -> Iterator[Json]:
        if not self.open:
            return
        if self.open == "thinking":
            signature = make_signature("".join(self.thought), self.details)
            yield self._delta("signature_delta", "signature", signature)
            self.thought, self.details = [], []
        elif self.open == "tool_use":
            self.calls.current += 1
        self.open = ""
        yield {"type": "content_block_stop", "index": self.index}

    def _delta(self, kind: str, field: str, text: str) -> Json:
        return {"type": "content_block_delta", "index": self.index, "delta": {"type": kind, field: text}}

    def _count(self, text: str) -> None:
        self.size += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))

    # --- text and reasoning

    def _content(self, text: str) -> Iterator[Json]:
        if not self.tags:
            yield from self._answer(text)
            return
        for kind, piece in self.tags.feed(text):
            yield from self._answer(piece) if kind == "text" else self._thinking(piece, None)

    def _answer(self, text: str) -> Iterator[Json]:
        yield from self._text(self.watch.feed(text) if self.watch else text)

    def _flush_text(self) -> Iterator[Json]:
        """Let go what the tag splitter and the stop watch hold back."""
        for kind, piece in self.tags.close() if self.tags else ():
            yield from self._answer(piece) if kind == "text" else self._thinking(piece, None)
        if self.watch:
            yield from self._text(self.watch.close())

    def _text(self, text: str) -> Iterator[Json]:
        if not text:
            return
        if self.open != "text":
            if self.calls.busy:
                self.held.append(("text", text, None))
                return
            self.blank += text
            if self.blank.isspace():               # dropped if nothing visible follows
                return
            text, self.blank, self.spoke = self.blank, "", True
            yield from self._open({"type": "text", "text": ""})
        self._count(text)
        yield self._delta("text_delta", "text", text)

    def _reasoning(self, text: str, details: Any) -> Iterator[Json]:
        if self.watch:
            yield from self._text(self.watch.close())
        yield from self._thinking(text, details)

    def _thinking(self, text: str, details: Any) -> Iterator[Json]:
        if self.turn.hide_reasoning:
            self._count(text)
            if not self.spoke:
                self.hidden.append(text)
            return
        if self.calls.busy:
            self.held.append(("thinking", text, details))
            return
        if self.open != "thinking":
            yield from self._open({"type": "thinking", "thinking": "", "signature": ""})
        merge_details(self.details, details)
        self._count(text)
        if self.turn.omit_thinking:
            self.thought.append(text)
        elif text:
            yield self._delta("thinking_delta", "thinking", text)

    # --- tool calls

    def _tool_calls(self, delta: Json) -> Iterator[Json]:
        yield from self._flush_text()
        items = delta.get("tool_calls") or [{"function": delta.get("function_call")}]
        self.calls.touched = []
        for item in items if isinstance(items, list) else ():
            function = item.get("function") if isinstance(item, dict) else None
            if isinstance(function, dict) or isinstance(item, dict) and item.get("id"):
                function = function if isinstance(function, dict) else {}
                call = self.calls.find(item, function)
                before = len(call.pending)
                call.add(function)
                self.size += len(call.pending) - before
                yield from self._advance(last=False)
        if self.held and not self.calls.busy:
            yield from self._release()

    def _release(self) -> Iterator[Json]:
        """What was said while a call was incomplete."""
        held, self.held = self.held, []
        for kind, text, details in held:
            yield from self._text(text) if kind == "text" else self._thinking(text, details)

    def _advance(self, last: bool) -> Iterator[Json]:
        """Send what can be sent of the active call; go to the next one when it is complete and another waits."""
        calls = self.calls
        while calls.current < len(calls.all):
            call, more = calls.all[calls.current], calls.current + 1 < len(calls.all)
            if last and not call.name:             # it never got one
                calls.current += 1
                continue
            if not call.opened:
                if not call.name or not (call.begun or more or last):
                    return
                self.blank, self.spoke, call.opened = "", True, True
                name = self.turn.names.get(call.name, call.name)
                yield from self._open({"type": "tool_use", "id": call.id, "name": name, "input": {}})
            text = call.take(last)
            if text:
                yield self._delta("input_json_delta", "partial_json", text)
            if not last and not (more and call.scanner.complete):
                return
            yield from self._close_block()


def _fold(events: Iterator[Json], cut: bool = False) -> Json:
    """The message that a stream of events amounts to; `cut`: its last call may be a torn one."""
    message: Json = {}
    block: Json = {}
    texts: List[str] = []
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            message = event["message"]
        elif kind == "content_block_start":
            block, texts = dict(event["content_block"]), []
            message["content"].append(block)
        elif kind == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "signature_delta":
                block["signature"] = delta["signature"]
            else:
                texts.append(delta[_FOLDED[block["type"]]])
        elif kind == "content_block_stop":
            _fill(block, "".join(texts), cut)
        elif kind == "message_delta":
            message.update(event["delta"])
            message["usage"].update(event["usage"])
    return message


#: Block type -> the field its deltas add to.
_FOLDED = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}


def _fill(block: Json, text: str, cut: bool) -> None:
    if block["type"] == "tool_use":
        block["input"] = parse_arguments(text)
        if cut and "INVALID_JSON" in block["input"]:
            block["input"] = partial_object(text)
        return
    block[block["type"]] = text
    if block["type"] == "text":
        block["citations"] = None


# --- counting

#: Not read by the model, or not as text.
_UNCOUNTED = ("type", "id", "tool_use_id", "signature", "cache_control", "encrypted_content", "encrypted_index")
_FRAME_MARKER = re.compile(rb"[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]")


def _jpeg_size(head: bytes) -> Optional[Tuple[int, int]]:
    at = 2
    while at + 9 < len(head) and head[at] == 0xFF:
        if _FRAME_MARKER.match(head[at + 1:at + 2]):
            return int.from_bytes(head[at + 7:at + 9], "big"), int.from_bytes(head[at + 5:at + 7], "big")
        at += 2 + int.from_bytes(head[at + 2:at + 4], "big")
    return None


def _webp_size(head: bytes) -> Optional[Tuple[int, int]]:
    """Lossy (VP8), lossless (VP8L: 14 bits each, less one) or extended (VP8X: 24 bits each, less one)."""
    kind, little = head[12:16], "little"
    if kind == b"VP8 ":
        return int.from_bytes(head[26:28], little) & 0x3FFF, int.from_bytes(head[28:30], little) & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], little)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], little) + 1, int.from_bytes(head[27:30], little) + 1
    return None


def image_size(data: str) -> Optional[Tuple[int, int]]:
    """Width and height of a base64 PNG, GIF, WebP or JPEG, read from its first 48 KB."""
    try:
        head = base64.b64decode(data[:65536][:len(data) // 4 * 4])
    except ValueError:
        return None
    if head.startswith(b"\x89PNG") and len(head) >= 24:
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if head.startswith(b"GIF8") and len(head) >= 10:
        return int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP" and len(head) >= 30:
        return _webp_size(head)
    return _jpeg_size(head) if head.startswith(b"\xff\xd8") else None


def _image_tokens(block: Json) -> int:
    """Width times height by 750, as Anthropic counts; larger pictures are scaled down to about 1 600."""
    source = block.get("source")
    data = source.get("data") if isinstance(source, dict) else None
    size = image_size(data) if isinstance(data, str) else None
    return min(1600, size[0] * size[1] // 750 + 1) if size else 1500


def _content_tokens(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_content_tokens, value))
    if not isinstance(value, dict):
        return estimate_tokens(value) if isinstance(value, str) else 0
    if value.get("type") == "image":
        return _image_tokens(value)
    if value.get("type") == "base64":                      # a PDF
        return estimate_tokens(value)
    return sum(estimate_tokens(_compact(item)) if name == "input" else _content_tokens(item)
               for name, item in value.items() if name not in _UNCOUNTED)


def count_message_tokens(body: Json) -> int:
    """About how many input tokens a Messages request (with or without max_tokens) takes."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: at least one message is required")
    defined = estimate_tokens(_compact(body["tools"])) if body.get("tools") else 0
    said = sum(4 + _content_tokens(message.get("content")) for message in messages if isinstance(message, dict))
    return defined + said + _content_tokens(body.get("system"))


# --- errors

def overflow_text(overflow: Sequence[int]) -> str:
    """The two sentences Claude Code acts on: it shrinks max_tokens where the prompt fits, else it compacts."""
    prompt, limit, output = (*overflow, 0)[:3]
    limit = limit or max(0, prompt - 1)
    if output and 0 < prompt < limit:
        return (f"input length and `max_tokens` exceed context limit: {prompt} + {output} > {limit}, "
                "decrease input length or `max_tokens` and try again")
    return f"prompt is too long: {max(prompt, limit + 1)} tokens > {limit} maximum"


def messages_status(status: int) -> int:
    """The HTTP status in Anthropic's vocabulary."""
    return {422: 400, 408: 504, 503: 529}.get(status, status)


def messages_error(exc: GatewayError, request_id: str) -> Json:
    """The error body; the status beside it is messages_status(exc.status), 400 for an overflow."""
    status, message = messages_status(exc.status), exc.message
    if exc.overflow is not None:
        status, message = 400, overflow_text(exc.overflow)
    kind = MESSAGES_ERROR_TYPE.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


# === 8. OpenAI Responses (pure) ==============================================
#
# The rules and their sources: openai-responses.md; what Codex does with an answer: clients.md.

#: What a field must be, where it is there and not null.
_FIELD_TYPES: Dict[str, Tuple[type, ...]] = {
    "instructions": (str,), "previous_response_id": (str,), "truncation": (str,), "tools": (list,),
    "include": (list,), "metadata": (dict,), "text": (dict,), "reasoning": (dict,), "store": (bool,),
    "stream": (bool,), "parallel_tool_calls": (bool,), "temperature": (int, float), "top_p": (int, float),
    "max_output_tokens": (int,)}

#: What needs a service behind it that we are not: a 400 is kinder than an answer that ignored it.
_REFUSED_FIELDS = {
    "conversation": "conversations are not kept here: send the items in `input`, or use `previous_response_id`",
    "background": "background responses are not available here: leave `background` out",
    "prompt": "stored prompts are not available here: send `instructions` and `input`"}

_FOREIGN_SUMMARY = ("the `compaction` item was made by another service, or with a key we no longer have: "
                    "it can't be read here; start a new conversation")
_SUMMARY_HEAD = "Summary of the conversation so far:\n\n"
_SUMMARISE = (
    "Summarise our conversation so that somebody who has not seen it can carry on at once. Say what the user "
    "wants and every constraint they gave, what was decided and why, what has been done (files, commands, "
    "results), what is still open, and the next step. Keep names, paths, numbers and code that will be needed "
    "word for word. Call no tool; answer with the summary and nothing else.")


# --- the reasoning carrier ---

class Seal:
    """Reasoning and summaries in the client's keeping: nobody else can read them, nobody can change them."""
    PREFIX = "if2a1."                    #: ours, and the version of all this

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(key, b"iflow2api seal 1: ")

    def close(self, value: Json) -> str:
        return self.PREFIX + encode_base64(self._cipher.seal(zlib.compress(dump_json(value))))

    def open(self, text: Any) -> Optional[Json]:
        """What was closed, or None: another service's, another key's, or damaged."""
        if not isinstance(text, str) or not text.startswith(self.PREFIX):
            return None
        data = decode_base64(text[len(self.PREFIX):])
        plain = None if data is None else self._cipher.open(data)
        return None if plain is None else json.loads(zlib.decompress(plain))


# --- tools ---

class _Tool(NamedTuple):
    """A tool as the client knows it."""
    kind: str
    name: str
    namespace: Optional[str] = None

    @property
    def flat(self) -> str:
        return f"{self.namespace}__{self.name}" if self.namespace else self.name


class _Kind(NamedTuple):
    """How calls of one kind of tool travel in Responses."""
    call: str                            #: item type of the call …
    output: str                          #: … and of its output
    prefix: str                          #: of the call's item id
    field: str                           #: what it is called with stands here
    events: Optional[str] = None         #: stem of its delta events; None: the item comes whole


_TOOL_KINDS = {
    "function": _Kind("function_call", "function_call_output", "fc_", "arguments", "function_call_arguments"),
    "custom": _Kind("custom_tool_call", "custom_tool_call_output", "ctc_", "input", "custom_tool_call_input"),
    "local_shell": _Kind("local_shell_call", "local_shell_call_output", "lsh_", "action"),
    "shell": _Kind("shell_call", "shell_call_output", "sh_", "action"),
    "apply_patch": _Kind("apply_patch_call", "apply_patch_call_output", "apc_", "operation"),
    "tool_search": _Kind("tool_search_call", "tool_search_output", "tsc_", "arguments"),
}
_KIND_OF_CALL = {kind.call: name for name, kind in _TOOL_KINDS.items()}
_KIND_OF_OUTPUT = {kind.output: name for name, kind in _TOOL_KINDS.items()}

_STRING: Json = {"type": "string"}
_INTEGER: Json = {"type": "integer"}
_STRINGS: Json = {"type": "array", "items": _STRING}


def _parameters(required: Sequence[str] = (), **properties: Json) -> Json:
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


#: Tools whose schema is not on the wire: OpenAI's models know them by heart, others do not.
_FIXED_TOOLS: Dict[str, Tuple[str, Json]] = {
    "local_shell": (
        "Runs a program on the user's machine and returns its output. `command` is the program and its "
        "arguments, for example [\"bash\", \"-lc\", \"ls -la\"].",
        _parameters(["command"], command=_STRINGS, working_directory=_STRING, timeout_ms=_INTEGER,
                    env={"type": "object", "additionalProperties": _STRING})),
    "shell": (
        "Runs shell commands on the user's machine and returns what each of them prints.",
        _parameters(["commands"], commands=_STRINGS, timeout_ms=_INTEGER, max_output_length=_INTEGER)),
    "apply_patch": (
        "Creates, updates or deletes one file. `diff` is a V4A diff without the Begin/End Patch lines: for a "
        "new file each line starts with +; for an update @@ opens a section, in which unchanged lines start "
        "with a space, removed ones with -, added ones with +.",
        _parameters(["type", "path"], path=_STRING, diff=_STRING,
                    type={"type": "string", "enum": ["create_file", "update_file", "delete_file"]})),
    "tool_search": (
        "Searches for more tools; those it finds can be called from then on.",
        _parameters(["query"], query=_STRING, limit=_INTEGER)),
}

#: Families of tools that OpenAI runs itself; their types bear versions (web_search_preview_2025_03_11).
_SERVER_FAMILIES = ("web_search", "file_search", "code_interpreter", "image_generation", "mcp", "computer",
                    "programmatic_tool_calling")


def _family(kind: str) -> str:
    return next((family for family in _SERVER_FAMILIES if kind.startswith(family)), kind)


def _client_runs(tool: Json) -> bool:
    """Whether a tool with a fixed schema is run by the client, not in OpenAI's containers or index."""
    if tool["type"] == "tool_search":
        return tool.get("execution") == "client"
    environment = tool.get("environment")
    return not (isinstance(environment, dict) and str(environment.get("type")).startswith("container"))


def _describe(tool: Json) -> Json:
    """description, parameters and strict of the function that stands for `tool`."""
    description, parameters = tool.get("description"), tool.get("parameters")
    if tool["type"] == "custom":
        parameters, form = _parameters(["input"], input=_STRING), tool.get("format")
        if isinstance(form, dict) and form.get("type") == "grammar":
            grammar = f"The input must match this {form.get('syntax')} grammar:\n{form.get('definition')}"
            description = f"{description}\n\n{grammar}" if description else grammar
    elif tool["type"] in _FIXED_TOOLS:
        standard = _FIXED_TOOLS[tool["type"]]
        description, parameters = description or standard[0], parameters or standard[1]
    function: Json = {"description": description} if description else {}
    parameters = parameters if isinstance(parameters, dict) else {}
    function["parameters"] = {"type": "object", "properties": {}, **parameters}    # LM Studio refuses less
    return function


class _ResponseTools:
    """The request's tools under the names Chat knows them by, and the way back."""

    def __init__(self, profile: Json) -> None:
        self._profile = profile
        self._names: Dict[_Tool, str] = {}
        self._tools: Dict[str, _Tool] = {}
        self._chat: Dict[str, Json] = {}     #: by Chat's name
        self._native: Dict[str, Json] = {}   #: by family

    def add(self, tools: Any, namespace: Optional[str] = None) -> None:
        for tool in _objects(tools, "tools"):
            kind = str(tool.get("type"))
            if kind == "namespace":
                self.add(tool.get("tools"), _required(tool, "name", "tools"))
            elif kind in ("function", "custom"):
                self._define(_Tool(kind, _required(tool, "name", "tools"), namespace), tool)
            elif kind in _FIXED_TOOLS and _client_runs(tool):
                self._define(_Tool(kind, kind), tool)
            elif kind != "tool_search":          # the server's own search: all tools are listed anyway
                self._serve(kind)

    def names(self, tools: Any) -> str:
        """The names to call `tools` by, for a model that has just found them."""
        found = _ResponseTools({"server_tools": "drop", "strict_tools": False})
        found.add(tools)
        return ", ".join(self.name(tool) for tool in found._names)

    def name(self, tool: _Tool) -> str:
        """What Chat calls `tool`, which may be one of an earlier turn and not listed any more."""
        if tool in self._names:
            return self._names[tool]
        return self._alike(tool.name) if not tool.namespace and self._alike(tool.name) else short_name(tool.flat)

    def tool(self, name: str) -> _Tool:
        """What the client calls the function `name`."""
        return self._tools.get(name) or self._tools.get(self._alike(name)) or _Tool("function", name)

    def listed(self) -> List[Json]:
        return [*self._chat.values(), *(tool for tool in self._native.values() if "fields" not in tool)]

    def fields(self) -> Json:
        """What switches the provider's own tools on beside `tools`."""
        return {name: value for tool in self._native.values() for name, value in tool.get("fields", {}).items()}

    def choose(self, choice: Any) -> Any:
        """tool_choice for Chat; `allowed_tools` shortens the list."""
        if choice is None or choice in ("none", "auto", "required"):
            return choice
        if not isinstance(choice, dict):
            raise BadRequest(f"`tool_choice` {choice!r} is unknown", param="tool_choice", code="invalid_value")
        if choice.get("type") == "allowed_tools":
            allowed = _objects(choice.get("tools"), "tool_choice")
            names = {self._named(tool) for tool in allowed}
            families = {_family(str(tool.get("type"))) for tool in allowed}
            self._chat = {name: tool for name, tool in self._chat.items() if name in names}
            self._native = {family: tool for family, tool in self._native.items() if family in families}
            return choice.get("mode") or "auto"
        name = self._named(choice)
        if name in self._chat:
            return {"type": "function", "function": {"name": name}}
        if choice.get("type") in ("function", "custom"):
            raise BadRequest(f"`tool_choice` names a tool that is not in `tools`: {choice.get('name')!r}",
                             param="tool_choice", code="invalid_value")
        return "auto"                        # a tool of OpenAI's own

    def _named(self, tool: Json) -> Optional[str]:
        kind = str(tool.get("type"))
        if kind in ("function", "custom"):
            namespace = tool.get("namespace")
            return self.name(_Tool(kind, _required(tool, "name", "tool_choice"), str(namespace) if namespace else None))
        return self._names.get(_Tool(kind, kind))

    def _define(self, key: _Tool, tool: Json) -> None:
        name = self._names.get(key) or short_name(key.flat)
        if self._tools.get(name, key) != key:    # `a__b` and `b` of namespace `a`
            name = f"{name[:55]}_{hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:8]}"
        function = {"name": name, **_describe(tool)}
        if tool.get("strict") is not None and key.kind == "function" and self._profile["strict_tools"]:
            function["strict"] = tool["strict"]
        self._names[key], self._tools[name] = name, key
        self._chat[name] = {"type": "function", "function": function}

    def _serve(self, kind: str) -> None:
        policy = self._profile["server_tools"]
        if policy == "error":
            raise BadRequest(f"tools of type `{kind}` are not available here", param="tools", code="unsupported_value")
        if isinstance(policy, dict) and _family(kind) in policy:
            self._native[_family(kind)] = policy[_family(kind)]

    def _alike(self, name: str) -> str:
        """The one tool of that bare name in whatever namespace: models, and Codex in `functions`, leave that out."""
        found = [known for tool, known in self._names.items() if tool.name == name]
        return found[0] if len(found) == 1 else ""


# --- request: items ---

def _objects(value: Any, param: str) -> List[Json]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise BadRequest(f"`{param}` must be a list of objects", param=param, code="invalid_type")
    return value


def _required(value: Json, field: str, param: str) -> str:
    found = value.get(field)
    if not isinstance(found, str) or not found:
        raise BadRequest(f"`{field}` is missing in an entry of `{param}`", param=param,
                         code="missing_required_parameter")
    return found


def _check_fields(body: Json) -> None:
    for field, types in _FIELD_TYPES.items():
        value = body.get(field)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise BadRequest(f"`{field}` has the wrong type", param=field, code="invalid_type")
    if body.get("conversation") and body.get("previous_response_id"):
        raise BadRequest("`previous_response_id` and `conversation` exclude each other", param="previous_response_id",
                         code="mutually_exclusive_parameters")
    for field, sentence in _REFUSED_FIELDS.items():
        if body.get(field):
            raise BadRequest(sentence, param=field, code="unsupported_parameter")
    if body.get("max_output_tokens") is not None and body["max_output_tokens"] < 1:
        raise BadRequest("`max_output_tokens` must be at least 1", param="max_output_tokens",
                         code="integer_below_min_value")


def _input_items(body: Json, recall: Callable[[str], Optional[List[Json]]],
                 find: Callable[[str], Optional[Json]]) -> List[Json]:
    """All items of the conversation: the stored ones, then the given ones, each with its type."""
    previous, given = body.get("previous_response_id"), body.get("input")
    if given is None and not previous:
        raise BadRequest("`input` is missing", param="input", code="missing_required_parameter")
    items = recall(previous) if previous else []
    if items is None:
        raise BadRequest(f"Previous response with id '{previous}' not found.", param="previous_response_id",
                         code="previous_response_not_found")
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [*items, *(_typed(item, find) for item in _objects(given, "input"))]


def _typed(item: Json, find: Callable[[str], Optional[Json]]) -> Json:
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    if not isinstance(kind, str):
        raise BadRequest("the `type` of an item must be a string", param="input", code="invalid_type")
    if kind != "item_reference":
        return item if item.get("type") else {**item, "type": kind}
    found = find(_required(item, "id", "input"))
    if found is None:
        raise BadRequest(f"Item with id '{item['id']}' not found.", param="input", code="item_not_found")
    return found


def _image_part(part: Json, profile: Json) -> Json:
    if not profile["vision"]:
        return {"type": "text", "text": NO_IMAGE}
    if not isinstance(part.get("image_url"), str):
        raise BadRequest("an `input_image` needs an `image_url`: files are not kept here", param="input",
                         code="unsupported_value")
    detail = part.get("detail")
    return {"type": "image_url", "image_url": {"url": part["image_url"],
                                               **({"detail": detail} if detail not in (None, "auto") else {})}}


def _file_part(part: Json, profile: Json) -> Json:
    if not profile["files"]:
        raise BadRequest("this model takes no files: send their text", param="input", code="unsupported_value")
    if not isinstance(part.get("file_data"), str):
        raise BadRequest("an `input_file` needs `file_data`: files are neither kept nor fetched here", param="input",
                         code="unsupported_value")
    return {"type": "file", "file": {"filename": part.get("filename") or "document.pdf",
                                     "file_data": part["file_data"]}}


def _audio_part(part: Json, profile: Json) -> Json:
    return {"type": "input_audio", "input_audio": part.get("input_audio")}


#: Which field of a part is its text; `encrypted_content` is Codex's for agent_message, plain text through us.
_TEXT_FIELDS = {"input_text": "text", "output_text": "text", "text": "text", "summary_text": "text",
                "reasoning_text": "text", "refusal": "refusal", "encrypted_content": "encrypted_content"}
_OTHER_PARTS = {"input_image": _image_part, "input_file": _file_part, "input_audio": _audio_part}


def _texts_of(content: Any) -> List[str]:
    """The texts of a content, which is a string or a list of parts."""
    if isinstance(content, str):
        return [content] if content else []
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts = [part.get(_TEXT_FIELDS.get(str(part.get("type")), "")) for part in parts]
    return [text for text in texts if isinstance(text, str) and text]


def _chat_parts(content: Any, profile: Json) -> List[Json]:
    parts: List[Json] = []
    for part in content if isinstance(content, list) else [content]:
        made = _OTHER_PARTS.get(str(part.get("type"))) if isinstance(part, dict) else None
        if made:
            parts.append(made(part, profile))
        else:
            parts += [{"type": "text", "text": text} for text in _texts_of([part] if isinstance(part, dict) else part)]
    return parts


def _chat_content(parts: List[Json]) -> Any:
    """A plain string where all is text: every server takes that."""
    if all(part["type"] == "text" for part in parts):
        return "\n\n".join(part["text"] for part in parts)
    return parts


def _loads(text: Any) -> Any:
    """The JSON value of `text`, decoded twice where it is a string that holds an object; None for what is no JSON."""
    try:
        value = _DECODER.decode(text)
        return _DECODER.decode(value) if isinstance(value, str) and value.lstrip().startswith("{") else value
    except (ValueError, TypeError):
        return None


def _function_arguments(item: Json, kind: str) -> str:
    """Arguments of a call in the history; always a JSON object, since chat templates parse them."""
    value = item.get(_TOOL_KINDS[kind].field)
    if kind == "custom":
        return dump_json({"input": value if isinstance(value, str) else ""}).decode()
    if isinstance(value, str):
        parsed = _loads(value) if value.strip() not in ("", "null") else {}
        if isinstance(parsed, dict) and value.lstrip().startswith("{"):
            return value
        value = parsed if isinstance(parsed, dict) else {"INVALID_JSON": value}
    fields = value.items() if isinstance(value, dict) else ()
    return dump_json({k: v for k, v in fields if v is not None and (k, v) != ("type", "exec")}).decode()


def _shell_text(item: Json) -> Any:
    """What the commands of a shell_call printed, and how each ended."""
    if not isinstance(item.get("output"), list):
        return _output_content(item)
    lines: List[str] = []
    for entry in _objects(item["output"], "input"):
        outcome = entry.get("outcome") if isinstance(entry.get("outcome"), dict) else {}
        timeout = outcome.get("type") == "timeout"
        lines += [str(entry.get("stdout") or ""), f"[stderr]\n{entry['stderr']}" if entry.get("stderr") else "",
                  "[timed out]" if timeout else f"[exit code {outcome.get('exit_code', 'unknown')}]"]
    return "\n".join(line.rstrip("\n") for line in lines if line)


def _patch_text(item: Json) -> str:
    failed = "[tool error] " if item.get("status") == "failed" else ""
    return failed + str(item.get("output") or item.get("status") or "")


_RESULT_TEXTS: Dict[str, Callable[[Json], Any]] = {
    "shell_call_output": _shell_text, "apply_patch_call_output": _patch_text}


def _output_content(item: Json) -> Any:
    """The output of a call as the content of a message: a string, or parts."""
    output = item.get("output")
    if isinstance(output, str) or output is None:
        return output or ""
    if isinstance(output, list) and all(isinstance(part, dict) and part.get("type") for part in output):
        return output
    return dump_json(output).decode()


def _call_id(item: Json) -> str:
    return next((item[key] for key in ("call_id", "id") if isinstance(item.get(key), str)), "")


def _answered_id(item: Json) -> str:
    """The call an output belongs to; a local shell's has none but its own id."""
    return _call_id({**item, "id": item.get("id") if item["type"] == "local_shell_call_output" else None})


def _is_call(item: Json) -> bool:
    return item["type"] in _KIND_OF_CALL and item.get("execution") != "server"


def _pair_outputs(items: Sequence[Json]) -> Tuple[Dict[int, Json], Set[int]]:
    """Each call's output by the call's place, and the places of outputs that belong to no call.

    Outputs stand anywhere; ids may repeat; without an id the name decides.
    """
    waiting = [(place, item) for place, item in enumerate(items) if _is_call(item)]
    by_id: Dict[str, List[int]] = {}
    for place, item in waiting:
        by_id.setdefault(_call_id(item), []).append(place)
    paired: Dict[int, Json] = {}
    strays: Set[int] = set()
    for place, item in enumerate(items):
        if item["type"] in _KIND_OF_OUTPUT:
            wanted = _answered_id(item)
            calls = by_id.get(wanted, []) if wanted else [
                call for call, made in waiting if item.get("name") and made.get("name") == item["name"]]
            call = next((call for call in calls if call not in paired), None)
            if call is None:
                strays.add(place)
            else:
                paired[call] = item
    return paired, strays


# --- request: messages ---

@dataclass
class _Step:
    """One assistant message in the making."""
    reasoning: List[str] = field(default_factory=list)
    details: List[Json] = field(default_factory=list)
    texts: List[str] = field(default_factory=list)
    calls: List[Json] = field(default_factory=list)
    outputs: List[Optional[Json]] = field(default_factory=list)
    spoke: bool = False


class _ItemHistory:
    """Input items into chat messages: each step becomes one assistant message and its tool messages."""

    def __init__(self, tools: _ResponseTools, profile: Json, seal: Seal, thinking: Optional[bool]) -> None:
        self.leading: List[str] = []         #: system texts before anything else
        self.messages: List[Json] = []
        self._tools, self._profile, self._seal = tools, profile, seal
        self._pads = profile["require_reasoning_on_tool_calls"] and thinking is not False
        self._step: Optional[_Step] = None
        self._attached: List[Json] = []      #: images and files of tool results, for the next user message

    def read(self, items: Sequence[Json]) -> None:
        paired, strays = _pair_outputs(items)
        for place, item in enumerate(items):
            if _is_call(item):
                self._add_call(place, item, paired.get(place))
            elif item["type"] in _KIND_OF_OUTPUT:
                self._end_step()
                if place in strays:
                    self._add_stray(item)
            elif item["type"] in self._READERS:
                self._READERS[item["type"]](self, item)
        self._end_step()
        self._attach()

    def _current(self) -> _Step:
        """The step that reasoning or text goes to: after a call a new one."""
        if self._step and self._step.calls:
            self._end_step()
        if self._step is None:
            self._step = _Step()
        return self._step

    def _add_message(self, item: Json) -> None:
        role = item.get("role")
        if role == "assistant":
            step = self._current()
            step.spoke = True
            step.texts.append("".join(_texts_of(item.get("content"))))
        elif role in ("system", "developer"):
            self._end_step()
            self._attach()
            self._add_system("\n\n".join(_texts_of(item.get("content"))))
        elif role == "user":
            self._say(_chat_parts(item.get("content"), self._profile))
        else:
            raise BadRequest(f"a message can't have the role {role!r}", param="input", code="invalid_value")

    def _add_system(self, text: str) -> None:
        if not self.messages:
            self.leading.append(text)
        elif not text:
            return
        elif self._profile["mid_system"] == "user":
            self.messages.append({"role": "user", "content": f"<system>\n{text}\n</system>"})
        else:
            self.messages.append({"role": "system", "content": text})

    def _add_agent_message(self, item: Json) -> None:
        head = [f"Message from {item['author']}:"] if isinstance(item.get("author"), str) else []
        self._say(_chat_parts("\n".join(head + _texts_of(item.get("content"))), self._profile))

    def _add_compaction(self, item: Json) -> None:
        summary = (self._seal.open(item.get("encrypted_content")) or {}).get("summary")
        if not isinstance(summary, str):
            raise BadRequest(_FOREIGN_SUMMARY, param="input", code="invalid_encrypted_content")
        self._say(_chat_parts(_SUMMARY_HEAD + summary, self._profile))

    def _add_reasoning(self, item: Json) -> None:
        step = self._current()
        carried = self._seal.open(item.get("encrypted_content")) or {}
        shown, summary = ("\n\n".join(_texts_of(item.get(name))) for name in ("content", "summary"))
        text = shown or carried.get("reasoning") or summary
        if text:
            step.reasoning.append(text)
            step.details += carried.get("details") or []

    def _add_call(self, place: int, item: Json, output: Optional[Json]) -> None:
        if self._step is None:
            self._step = _Step()
        kind, namespace = _KIND_OF_CALL[item["type"]], item.get("namespace")
        name = _required(item, "name", "input") if kind in ("function", "custom") else kind
        tool = _Tool(kind, name, namespace if isinstance(namespace, str) else None)
        self._step.calls.append({
            "id": _call_id(item) or f"call_{place}", "type": "function",
            "function": {"name": self._tools.name(tool), "arguments": _function_arguments(item, kind)}})
        self._step.outputs.append(output)

    def _add_stray(self, item: Json) -> None:
        if item["type"] != "tool_search_output":     # its tools have joined the list
            parts = self._output_parts(item)
            said = "\n\n".join(part["text"] for part in parts if part["type"] == "text")
            self._say([{"type": "text", "text": f"[result of tool call {_answered_id(item)}]\n{said}"},
                       *(part for part in parts if part["type"] != "text")])

    def _say(self, parts: List[Json]) -> None:
        self._end_step()
        parts, self._attached = self._attached + parts, []
        self.messages.append({"role": "user", "content": _chat_content(parts)})

    def _attach(self) -> None:
        if self._attached:
            self._say([])

    def _end_step(self) -> None:
        step, self._step = self._step, None
        if step is None or not (step.spoke or step.calls):
            return                               # reasoning that led to nothing
        self._attach()
        text = "\n\n".join(text for text in step.texts if text)
        message: Json = {"role": "assistant", "content": text or (None if step.calls else "")}
        self._put_reasoning(message, step)
        if step.calls:
            message["tool_calls"] = step.calls
        self.messages.append(message)
        for call, output in zip(step.calls, step.outputs):
            self._attached += self._add_result(call["id"], output)

    def _put_reasoning(self, message: Json, step: _Step) -> None:
        target, text = self._profile["reasoning_field"], "\n\n".join(step.reasoning)
        if target and step.details:
            message["reasoning_details"] = step.details
        elif target == "reasoning_details" and text:
            message[target] = [{"type": "reasoning.text", "text": text}]
        if target and target != "reasoning_details" and (text or (self._pads and step.calls)):
            message[target] = text

    def _add_result(self, call_id: str, output: Optional[Json]) -> List[Json]:
        """The tool message, text only; returns the parts that must follow in a user message."""
        parts = self._output_parts(output) if output else [{"type": "text", "text": NO_RESULT}]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        files = [part for part in parts if part["type"] != "text"]
        if files:
            texts.append(f"[{len(files)} attachment(s) of this result follow in the next user message]")
            files.insert(0, {"type": "text", "text": f"Attachment(s) of tool result {call_id}:"})
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": "\n\n".join(texts)})
        return files

    def _output_parts(self, item: Json) -> List[Json]:
        if item["type"] == "tool_search_output":
            found = self._tools.names(item.get("tools"))
            return [{"type": "text", "text": f"Tools found: {found}" if found else "No tools found."}]
        render = _RESULT_TEXTS.get(item["type"], _output_content)
        return _chat_parts(render(item), self._profile)

    #: Types that are no call and no output. The effect of OpenAI's own calls (web_search_call, mcp_call, …) is in the
    #: text that follows them; Codex's ghost_snapshot and whatever is unknown means nothing to a model.
    _READERS: Dict[str, Callable[[_ItemHistory, Json], None]] = {
        "message": _add_message, "agent_message": _add_agent_message, "reasoning": _add_reasoning,
        "compaction": _add_compaction, "compaction_summary": _add_compaction}


# --- request: the turn ---

def _answer_format(form: Any, profile: Json) -> Tuple[Optional[Json], Optional[str]]:
    """response_format for Chat, and what to add to the system message where the provider can't do it."""
    kind = form.get("type") if isinstance(form, dict) else None
    if kind not in ("json_object", "json_schema"):
        return None, None
    known = profile["structured_output"]
    as_object = {"type": "json_object"} if known != "prompt" else None
    if kind == "json_object":
        return as_object, None if as_object else "Answer with nothing but a JSON object."
    schema = form.get("schema") if isinstance(form.get("schema"), dict) else {}
    if known != "json_schema":
        text = dump_json(schema).decode()
        return as_object, f"Answer with nothing but JSON that fits this JSON Schema:\n{text}"
    extra = {key: form[key] for key in ("strict", "description") if form.get(key) is not None}
    named = {"name": form.get("name") or "output", "schema": schema, **extra}
    return {"type": "json_schema", "json_schema": named}, None


class ResponsesTurn:
    """One Responses request: the chat request for the upstream, and the way back."""

    def __init__(self, body: Json, profile: Json, model: str, *, now: float,
                 recall: Callable[[str], Optional[List[Json]]], item: Callable[[str], Optional[Json]],
                 seal: Seal, codex: bool = False, compact: bool = False) -> None:
        _check_fields(body)
        items = _input_items(body, recall, item)
        self.compacts = compact or bool(items) and items[-1]["type"] == "compaction_trigger"
        self.items = [entry for entry in items if entry["type"] != "compaction_trigger"]
        self.store = body.get("store") is not False
        self.model = body.get("model") or model
        self.now, self.seal, self.codex, self.profile = now, seal, codex, profile
        self._body = body
        self._reasoning, self._text = self._configuration()
        include = body.get("include") or []
        self.carries = "reasoning.encrypted_content" in include
        self._logprobs = "message.output_text.logprobs" in include
        summary = self._reasoning.get("summary") or self._reasoning.get("generate_summary")
        self.summarises = summary not in (None, "none")
        self.echo = self._echoed(summary)
        self.tools = _ResponseTools(profile)
        self.chat = self._convert(model)

    @property
    def call_ids(self) -> Set[str]:
        """Ids that earlier calls of the conversation have."""
        return {_call_id(item) for item in self.items if _is_call(item)}

    def reply(self, completion: Json, new_id: Callable[[str], str]) -> Json:
        """The response object: what the last event of a stream of the same answer bears."""
        choice = first_choice(completion)
        message = choice.get("message") if isinstance(choice.get("message"), dict) else {}
        calls = message.get("tool_calls") if isinstance(message.get("tool_calls"), list) else []
        numbered = [{**call, "index": index} for index, call in enumerate(calls) if isinstance(call, dict)]
        delta = {**message, "tool_calls": numbered or None}
        stream = self.stream(new_id)
        for _ in stream.feed({**completion, "choices": [{**choice, "delta": delta}]}):
            pass
        return list(stream.close())[-1]["response"]

    def stream(self, new_id: Callable[[str], str]) -> ResponsesStream:
        return (_CompactionStream if self.compacts else ResponsesStream)(self, new_id)

    def _configuration(self) -> Tuple[Json, Json]:
        """reasoning and text, as changed by the conversation's configuration_update items."""
        reasoning, text = dict(self._body.get("reasoning") or {}), dict(self._body.get("text") or {})
        for item in self.items:
            if item["type"] == "configuration_update":
                for settings, name in ((reasoning, "reasoning"), (text, "text")):
                    settings.update(item[name] if isinstance(item.get(name), dict) else {})
        return reasoning, text

    def _echoed(self, summary: Optional[str]) -> Json:
        body = self._body

        def given(name: str, default: Any) -> Any:
            return default if body.get(name) is None else body[name]

        return {"background": False, "instructions": body.get("instructions"), "metadata": given("metadata", {}),
                "max_output_tokens": body.get("max_output_tokens"),
                "parallel_tool_calls": given("parallel_tool_calls", True),
                "previous_response_id": body.get("previous_response_id"),
                "reasoning": {"effort": self._reasoning.get("effort"), "summary": summary}, "store": self.store,
                "text": {**self._text, "format": self._text.get("format") or {"type": "text"}},
                "temperature": given("temperature", 1.0), "top_p": given("top_p", 1.0),
                "tool_choice": given("tool_choice", "auto"), "tools": given("tools", []),
                "truncation": given("truncation", "disabled")}

    def _convert(self, model: str) -> Json:
        effort = self._reasoning.get("effort")
        thinking = None if effort is None else effort != "none"
        self._collect_tools()
        form, demand = (None, None) if self.compacts else _answer_format(self._text.get("format"), self.profile)
        chat: Json = {"model": model, "messages": self._messages(thinking, demand)}
        if self._body.get("stream"):
            chat["stream"] = True
            if self.profile["stream_usage"]:
                chat["stream_options"] = {"include_usage": True}
        self._put_sampling(chat)
        set_thinking(chat, self.profile, thinking, effort=effort)
        if form:
            chat["response_format"] = form
        if not self.compacts:
            self._put_tools(chat, thinking)
        return chat

    def _collect_tools(self) -> None:
        self.tools.add(self._body.get("tools"))
        for item in self.items:
            if item["type"] in ("additional_tools", "tool_search_output"):
                self.tools.add(item.get("tools"))

    def _messages(self, thinking: Optional[bool], demand: Optional[str]) -> List[Json]:
        history = _ItemHistory(self.tools, self.profile, self.seal, thinking)
        history.read(self.items)
        system = "\n\n".join(text for text in (self._body.get("instructions"), *history.leading, demand) if text)
        if not history.messages and not history.leading:
            raise BadRequest("`input` holds no message", param="input", code="invalid_value")
        messages = [{"role": "system", "content": system}] if system else []
        messages += history.messages
        if self.compacts:
            messages.append({"role": "user", "content": _SUMMARISE})
        return messages

    def _put_sampling(self, chat: Json) -> None:
        limit, ceiling = self._body.get("max_output_tokens"), self.profile.get("max_output")
        if limit is not None:
            chat[self.profile["max_tokens_field"]] = min(limit, ceiling) if ceiling else limit
        for name in ("temperature", "top_p"):
            if self._body.get(name) is not None:
                chat[name] = self._body[name]
        if self._logprobs and not self.compacts:
            chat["logprobs"] = True
            if self._body.get("top_logprobs") is not None:
                chat["top_logprobs"] = self._body["top_logprobs"]

    def _put_tools(self, chat: Json, thinking: Optional[bool]) -> None:
        chat.update(self.tools.fields())
        choice = self.tools.choose(self._body.get("tool_choice")) if self.tools.listed() else None
        listed = self.tools.listed()
        if not listed:
            return
        forced = choice not in (None, "none", "auto")
        if forced and thinking and not self.profile["forced_tool_choice_with_thinking"]:
            choice = "auto"
        chat["tools"] = listed
        if choice is not None:
            chat["tool_choice"] = choice
        if self._body.get("parallel_tool_calls") is not None and self.profile["parallel_tool_calls"]:
            chat["parallel_tool_calls"] = self._body["parallel_tool_calls"]


def compact_reply(turn: ResponsesTurn, completion: Json, new_id: Callable[[str], str]) -> Json:
    """The answer of POST /v1/responses/compact to a turn made with `compact=True`: user messages, then the summary."""
    response = turn.reply(completion, new_id)
    said = [{"id": new_id("msg_"), "status": "completed", **item} for item in turn.items
            if item["type"] == "message" and item.get("role") == "user"]
    return {"id": response["id"], "object": "response.compaction", "created_at": response["created_at"],
            "output": said + response["output"], "usage": response["usage"]}


def count_response_tokens(body: Json) -> int:
    """About how many tokens the request takes, for /v1/responses/input_tokens."""
    items = body.get("input")
    if isinstance(items, list):          # sealed reasoning would count twice and far too high
        items = [{key: value for key, value in item.items() if key != "encrypted_content"} if isinstance(item, dict)
                 else item for item in items]
    return sum(estimate_tokens(part) for part in (items, body.get("instructions"), body.get("tools"), body.get("text")))


# --- answer: arguments that arrive in pieces ---

class _FunctionArguments:
    """Passes a JSON object on as it comes; anything else waits for its end."""

    def __init__(self) -> None:
        self._held, self._live = "", False

    def feed(self, text: str) -> str:
        if self._live:
            return text
        self._held += text
        started = self._held.lstrip()
        self._live = started.startswith("{")
        return started if self._live else ""

    def close(self, cut: bool) -> str:
        """What is still to be sent: {} for nothing, the object in a string that holds one."""
        if self._live or cut:
            return "" if self._live else self._held
        value = _loads(self._held)
        if isinstance(value, dict):
            return dump_json(value).decode()
        return self._held if self._held.strip() and self._held.strip() not in ("null", '""') else "{}"


#: As much of a JSON string as can be unescaped already: no half escape, no high surrogate whose low one may follow.
#: A backslash before something JSON does not know (models write \s and C:\users) stands for itself.
_STRING_BODY = re.compile(r'(?:[^"\\]+|\\(?:[^u]|u(?=[0-9a-fA-F]{0,3}[^0-9a-fA-F])|u(?![dD][89abAB])[0-9a-fA-F]{4}'
                          r'|u[dD][89abAB][0-9a-fA-F]{2}(?!\Z|\\\Z|\\u[0-9a-fA-F]{0,3}\Z)))*')
_ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|(["\\/bfnrt]))')
_ESCAPED = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_INPUT_HEAD = re.compile(r'\s*\{\s*"input"\s*:\s*"')


def _unescape(body: str) -> str:
    if "\\" not in body:
        return body
    text = _ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else _ESCAPED[found[2]], body)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")    # joins pairs


class _CustomInput:
    """Takes the text out of {"input": "…"} as it comes; another shape waits for its end."""

    def __init__(self) -> None:
        self._held, self._live, self._ended = "", False, False

    def feed(self, text: str) -> str:
        if self._ended:
            return ""
        self._held += text
        if not self._live:
            head = _INPUT_HEAD.match(self._held)
            if not head:
                return ""
            self._live, self._held = True, self._held[head.end():]
        body = _STRING_BODY.match(self._held).group()
        self._held = self._held[len(body):]
        self._ended = self._held.startswith('"')
        return _unescape(body)

    def close(self, cut: bool) -> str:
        """The input where it was not the only, first key; what is no such object at all is the input itself."""
        if self._live or cut:
            return ""
        value = _loads(self._held)
        if isinstance(value, dict):
            texts = [text for text in value.values() if isinstance(text, str)]
            value = value["input"] if "input" in value else texts[0] if len(texts) == 1 else value or ""
        if value is None:
            return self._held
        return value if isinstance(value, str) else dump_json(value).decode()


_ARGUMENT_READERS = {"function": _FunctionArguments, "custom": _CustomInput}


def _exec_action(value: Json) -> Optional[Json]:
    command = value.get("command")
    if isinstance(command, str):
        command = ["bash", "-lc", command]
    if not isinstance(command, list) or not command:
        return None
    extra = {key: value[key] for key in ("working_directory", "timeout_ms", "user") if value.get(key) is not None}
    return {"type": "exec", "command": [str(part) for part in command], "env": value.get("env") or {}, **extra}


def _shell_action(value: Json) -> Optional[Json]:
    commands = value.get("commands")
    if isinstance(commands, str):
        commands = [commands]
    if not isinstance(commands, list) or not commands:
        return None
    return {"commands": [str(command) for command in commands], "timeout_ms": value.get("timeout_ms"),
            "max_output_length": value.get("max_output_length")}


def _patch_operation(value: Json) -> Optional[Json]:
    if value.get("type") not in ("create_file", "update_file", "delete_file") or not isinstance(value.get("path"), str):
        return None
    return {key: value[key] for key in ("type", "path", "diff") if value.get(key) is not None}


#: What a call of a fixed tool says in its item; None where the model got it wrong.
_PAYLOADS: Dict[str, Callable[[Json], Optional[Json]]] = {
    "local_shell": _exec_action, "shell": _shell_action, "apply_patch": _patch_operation,
    "tool_search": lambda value: value}


def _payload(kind: str, text: str) -> Optional[Json]:
    value = _loads(text)
    if not isinstance(value, dict):
        return None
    inner = value.get(_TOOL_KINDS[kind].field)
    return _PAYLOADS[kind](inner if isinstance(inner, dict) and len(value) == 1 else value)


# --- answer: items ---

class _Voice(NamedTuple):
    """How one kind of running text travels."""
    prefix: str                          #: of the item's id
    item: Json                           #: the item when it is announced
    parts: str                           #: the item's field its one part goes to
    part: Json                           #: that part, but for the text …
    text: str                            #: … which stands here
    index: str                           #: name of the part's number in events
    part_events: str
    text_events: str
    extra: Json                          #: what its text events need besides


_MESSAGE = {"type": "message", "role": "assistant", "status": "in_progress", "content": []}
_REASONING = {"type": "reasoning", "summary": []}
_TEXT = _Voice("msg_", _MESSAGE, "content", {"type": "output_text", "annotations": [], "logprobs": []}, "text",
               "content_index", "content_part", "output_text", {"logprobs": []})
_REFUSAL = _Voice("msg_", _MESSAGE, "content", {"type": "refusal"}, "refusal",
                  "content_index", "content_part", "refusal", {})
_RAW = _Voice("rs_", _REASONING, "content", {"type": "reasoning_text"}, "text",
              "content_index", "content_part", "reasoning_text", {})
_SUMMARY = _Voice("rs_", _REASONING, "summary", {"type": "summary_text"}, "text",
                  "summary_index", "reasoning_summary_part", "reasoning_summary_text", {})


class _Item:
    """One output item: announced once, done once; its number is its turn of being announced."""

    def __init__(self, stream: ResponsesStream) -> None:
        self.stream, self.index = stream, -1

    def announce(self, item: Json) -> Json:
        self.index = self.stream.items
        self.stream.items += 1
        return self.stream.event("output_item.added", {"output_index": self.index, "item": item})

    def finish(self, item: Json) -> Json:
        self.stream.finished[self.index] = item
        return self.stream.event("output_item.done", {"output_index": self.index, "item": item})


class _Speech(_Item):
    """An item whose text runs: a message, a refusal, or reasoning."""

    def __init__(self, stream: ResponsesStream, voice: _Voice) -> None:
        super().__init__(stream)
        self.voice = voice
        self.details: List[Json] = []
        self._item = {"id": stream.new_id(voice.prefix), **voice.item}
        self._pieces: List[str] = []
        self._logprobs: List[Json] = []
        self._place: Json = {}
        self._delta: Json = {}

    def open(self) -> Iterator[Json]:
        voice = self.voice
        yield self.announce(self._item)
        self._place = {"item_id": self._item["id"], "output_index": self.index, voice.index: 0}
        self._delta = {"type": f"response.{voice.text_events}.delta", **self._place, **voice.extra}
        yield self.stream.event(voice.part_events + ".added", {**self._place, "part": {**voice.part, voice.text: ""}})

    def delta(self, text: str, logprobs: List[Json]) -> Json:
        self._pieces.append(text)
        event = {**self._delta, "delta": text, "sequence_number": self.stream.number()}
        if logprobs:
            self._logprobs += logprobs
            event["logprobs"] = logprobs
        return event

    def close(self) -> Iterator[Json]:
        voice, text = self.voice, "".join(self._pieces)
        said = {"logprobs": self._logprobs} if voice.extra else {}
        part = {**voice.part, voice.text: text, **said}
        yield self.stream.event(voice.text_events + ".done", {**self._place, voice.text: text, **said})
        yield self.stream.event(voice.part_events + ".done", {**self._place, "part": part})
        item = {**self._item, voice.parts: [part]}
        if voice.item is _MESSAGE:
            item["status"] = "completed"
        elif self.stream.turn.carries:
            value = {"reasoning": text, **({"details": self.details} if self.details else {})}
            item["encrypted_content"] = self.stream.turn.seal.close(value)
        yield self.finish(item)


class _Call(_Item):
    """A tool call: announced when its name is final, done when its JSON is whole and something else begins."""

    def __init__(self, stream: ResponsesStream, upstream_id: Optional[str], call_id: str) -> None:
        super().__init__(stream)
        self.upstream_id, self.call_id = upstream_id, call_id
        self.name, self.done = "", False
        self._tool: Optional[_Tool] = None       #: once the name is final
        self._raw: List[str] = []
        self._sent: List[str] = []
        self._scanner = ObjectScanner()
        self._is_object: Optional[bool] = None   #: None: not known yet
        self._reader: Any = None                 #: None: the item comes whole
        self._item: Json = {}

    @property
    def whole(self) -> bool:
        return self._scanner.complete

    def feed(self, function: Json) -> Iterator[Json]:
        name, arguments = function.get("name"), function.get("arguments")
        if self._tool is None and isinstance(name, str) and name != self.name:
            self.name += name                    # in pieces; the same again is a repetition
        if isinstance(arguments, dict):
            arguments = dump_json(arguments).decode()
        if not isinstance(arguments, str) or not arguments:
            return
        if self._is_object is None and arguments.strip():
            self._is_object = arguments.lstrip().startswith("{")
        if self._is_object:
            arguments = arguments[:self._scanner.feed(arguments)]        # a second copy is not passed on
        self._raw.append(arguments)
        if self._tool:
            yield from self._pass_on(arguments)
        elif self.name:
            yield from self._open(self.stream.turn.tools.tool(self.name))

    def settle(self) -> Iterator[Json]:
        """Something else begins."""
        if self._tool is None and self.name:
            yield from self._open(self.stream.turn.tools.tool(self.name))
        if self.whole and self.name:
            yield from self.close(cut=False)

    def close(self, cut: bool) -> Iterator[Json]:
        self.done = True
        if not self.name:
            return                               # nothing could be called
        if self._tool is None:
            yield from self._open(self.stream.turn.tools.tool(self.name))
        if self._reader is None:
            payload = _payload(self._tool.kind, "".join(self._raw))
            if payload is not None:
                self._item[_TOOL_KINDS[self._tool.kind].field] = payload
                yield self.announce({**self._item, "status": "in_progress"})
                yield self.finish({**self._item, "status": "completed"})
                return
            yield from self._open(_Tool("function", self._tool.name))    # lets the client tell the model
        yield from self._end(cut and not self.whole)

    def _open(self, tool: _Tool) -> Iterator[Json]:
        self._tool, kind = tool, _TOOL_KINDS[tool.kind]
        self._item = {"id": self.stream.new_id(kind.prefix), "type": kind.call, "call_id": self.call_id}
        if kind.events is None:
            self._item.update({"execution": "client"} if tool.kind == "tool_search" else {})
            return
        self._item.update({"name": tool.name, **({"namespace": tool.namespace} if tool.namespace else {})})
        self._reader = _ARGUMENT_READERS[tool.kind]()
        yield self.announce({**self._item, kind.field: "", "status": "in_progress"})
        yield from self._pass_on("".join(self._raw))

    def _pass_on(self, text: str) -> Iterator[Json]:
        if self._reader:
            yield from self._send(self._reader.feed(text))

    def _send(self, text: str) -> Iterator[Json]:
        if text:
            self._sent.append(text)
            yield self._event("delta", "delta", text)

    def _end(self, cut: bool) -> Iterator[Json]:
        yield from self._send(self._reader.close(cut))
        name, text = _TOOL_KINDS[self._tool.kind].field, "".join(self._sent)
        yield self._event("done", name, text)
        yield self.finish({**self._item, name: text, "status": "incomplete" if cut else "completed"})

    def _event(self, step: str, name: str, text: str) -> Json:
        return self.stream.event(f"{_TOOL_KINDS[self._tool.kind].events}.{step}",
                                 {"item_id": self._item["id"], "output_index": self.index, name: text})


# --- answer: the stream ---

#: finish_reason values after which a response is incomplete, and the reason it gives.
_INCOMPLETE = {"length": "max_output_tokens", "repetition_truncation": "max_output_tokens",
               "model_context_window_exceeded": "max_output_tokens", "content_filter": "content_filter",
               "sensitive": "content_filter"}

#: Codes that Codex acts upon (codex-api, responses stream): passed on where the upstream says them …
_FAILURE_CODES = ("insufficient_quota", "usage_not_included", "context_length_exceeded", "rate_limit_exceeded",
                  "server_is_overloaded", "slow_down", "invalid_prompt", "bio_policy", "cyber_policy")
#: … or made from the status. What asking again can't heal is invalid_prompt, at which Codex stops; else it reconnects.
_FAILURE_STATUS = {400: "invalid_prompt", 402: "insufficient_quota", 403: "invalid_prompt", 404: "invalid_prompt",
                   413: "invalid_prompt", 422: "invalid_prompt", 429: "rate_limit_exceeded",
                   503: "server_is_overloaded", 529: "server_is_overloaded"}


def _failure(exc: GatewayError) -> Json:
    """`error` of a failed response."""
    body = exc.body.get("error", exc.body) if exc.body else {}
    said = [exc.code] + ([body.get("code"), body.get("type")] if isinstance(body, dict) else [])
    code = "context_length_exceeded" if exc.overflow else next((code for code in said if code in _FAILURE_CODES), None)
    code, message = code or _FAILURE_STATUS.get(exc.status, "server_error"), exc.message
    if code == "rate_limit_exceeded" and "try again in" not in message.lower():
        wait = 5 if exc.retry_after_s is None else exc.retry_after_s
        message = f"{message.rstrip('. ')}. Please try again in {wait:g}s."    # Codex reads the delay from the text
    return {"code": code, "message": message}


def _response_usage(usage: Usage) -> Json:
    return {"input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": usage.cache_write},
            "output_tokens": usage.completion, "output_tokens_details": {"reasoning_tokens": usage.reasoning or 0},
            "total_tokens": usage.prompt + usage.completion}


class ResponsesStream:
    """Chat chunks in, Responses events out. One running text and any number of calls are open at a time."""

    def __init__(self, turn: ResponsesTurn, new_id: Callable[[str], str]) -> None:
        self.turn, self.new_id = turn, new_id
        self.usage: Optional[Json] = None
        self.finish_reason: Optional[str] = None
        self.items = 0                           #: how many were announced
        self.finished: Dict[int, Json] = {}
        self._number = 0
        self._id, self._created_at = "", 0
        self._reasoning_voice = _SUMMARY if turn.summarises else _RAW
        self._think_tags = ThinkTags() if turn.profile["think_tags"] else None
        self._speech: Optional[_Speech] = None
        self._blank = ""                         #: white space that may turn out to be no message
        self._calls: Dict[Any, _Call] = {}       #: by the upstream's index, or id
        self._open_calls: List[_Call] = []
        self._last_call: Any = None              #: its key
        self._call_ids = turn.call_ids

    def feed(self, chunk: Json) -> Iterator[Json]:
        choice = first_choice(chunk)
        if "usage" in chunk or "usage" in choice:
            self.usage = usage_of(chunk) or self.usage
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finish_reason = reason
            if reason in FATAL_FINISH:
                raise UpstreamRefused(f"the model's server broke the answer off: {reason}", status=FATAL_FINISH[reason])
        if not self._id:
            yield from self._start(chunk)
        delta = choice.get("delta")
        if isinstance(delta, dict):
            yield from self._take(delta, choice)

    def close(self) -> Iterator[Json]:
        if not self._id:
            yield from self._start({})
        if self._think_tags:
            yield from self._write_pieces(self._think_tags.close(), [])
        reason = _INCOMPLETE.get(self.finish_reason or "")
        yield from self._end_items(cut=reason is not None)
        if reason == "max_output_tokens" and self.turn.codex:
            reason = None                        # Codex takes `incomplete` for a broken stream and asks the same again
        details, status = {"reason": reason} if reason else None, "incomplete" if reason else "completed"
        usage = parse_usage(self.usage) if self.usage else self._estimate()
        yield self._terminal(status, incomplete_details=details, usage=_response_usage(usage),
                             completed_at=None if reason else max(self._created_at, int(self.turn.now)))

    @property
    def call_ids(self) -> List[str]:
        """What the calls are called when they come back."""
        return [item["call_id"] for _, item in sorted(self.finished.items()) if "call_id" in item]

    def fail(self, exc: GatewayError) -> Iterator[Json]:
        """The end of a stream that broke."""
        if not self._id:
            yield from self._start({})
        usage = _response_usage(parse_usage(self.usage)) if self.usage else None
        yield self._terminal("failed", error=_failure(exc), usage=usage)

    def number(self) -> int:
        self._number += 1
        return self._number - 1

    def event(self, name: str, fields: Json) -> Json:
        return {"type": "response." + name, **fields, "sequence_number": self.number()}

    def _start(self, chunk: Json) -> Iterator[Json]:
        created = chunk.get("created")
        self._id = self.new_id("resp_")
        self._created_at = int(created if isinstance(created, (int, float)) and created > 0 else self.turn.now)
        yield self.event("created", {"response": self._response("in_progress")})
        yield self.event("in_progress", {"response": self._response("in_progress")})

    def _response(self, status: str, **facts: Any) -> Json:
        return {"id": self._id, "object": "response", "created_at": self._created_at, "status": status, "error": None,
                "incomplete_details": None, **self.turn.echo, "model": self.turn.model,
                "output": [self.finished[index] for index in sorted(self.finished)], "usage": None, **facts}

    def _terminal(self, status: str, **facts: Any) -> Json:
        return self.event(status, {"response": self._response(status, **facts)})

    def _estimate(self) -> Usage:
        chat = self.turn.chat
        return Usage(estimate_tokens(chat["messages"]) + estimate_tokens(chat.get("tools")),
                     sum(estimate_tokens({**item, "encrypted_content": None}) for item in self.finished.values()),
                     estimated=True)

    def _take(self, delta: Json, choice: Json) -> Iterator[Json]:
        reasoning = reasoning_of(delta)
        if reasoning:
            yield from self._say(self._reasoning_voice, reasoning, [])
            merge_details(self._speech.details if self._speech else [], delta.get("reasoning_details"))
        content = delta.get("content")
        if content:
            text = content if isinstance(content, str) else "".join(_texts_of(content))
            logprobs = choice.get("logprobs")
            logprobs = logprobs.get("content") if isinstance(logprobs, dict) else None
            pieces = self._think_tags.feed(text) if self._think_tags else [("text", text)]
            yield from self._write_pieces(pieces, logprobs if isinstance(logprobs, list) else [])
        if isinstance(delta.get("refusal"), str) and delta["refusal"]:
            yield from self._say(_REFUSAL, delta["refusal"], [])
        calls = delta.get("tool_calls")
        if not calls and isinstance(delta.get("function_call"), dict):     # the oldest form
            calls = [{"index": 0, "function": delta["function_call"]}]
        if isinstance(calls, list):
            yield from self._take_calls(calls)

    def _write_pieces(self, pieces: Sequence[Tuple[str, str]], logprobs: List[Json]) -> Iterator[Json]:
        for kind, text in pieces:
            if kind == "thinking":
                yield from self._say(self._reasoning_voice, text, [])
                continue
            if self._speech is None or self._speech.voice is not _TEXT:
                text = self._blank = self._blank + text
                if not text.strip():
                    continue
            yield from self._say(_TEXT, text, logprobs)

    def _say(self, voice: _Voice, text: str, logprobs: List[Json]) -> Iterator[Json]:
        if self._speech is None or self._speech.voice is not voice:
            yield from self._end_speech()
            yield from self._settle(None)
            self._speech = _Speech(self, voice)
            yield from self._speech.open()
        yield self._speech.delta(text, logprobs)

    def _end_speech(self) -> Iterator[Json]:
        speech, self._speech, self._blank = self._speech, None, ""
        if speech:
            yield from speech.close()

    def _take_calls(self, deltas: List[Any]) -> Iterator[Json]:
        for delta in deltas:
            if not isinstance(delta, dict):
                continue
            function = delta.get("function") if isinstance(delta.get("function"), dict) else {}
            key, before = self._key_of(delta, function), self._last_call
            begins = key not in self._calls
            if begins:
                yield from self._end_speech()
                self._begin_call(key, delta.get("id"))
            self._last_call, call = key, self._calls[key]
            if begins or key != before:
                yield from self._settle(call)
            if not call.done:
                yield from call.feed(function)

    def _key_of(self, delta: Json, function: Json) -> Any:
        """Which call a delta belongs to: by index, else id, else the last one; a free key for one that is new."""
        index, ident = delta.get("index"), delta.get("id")
        key = index if isinstance(index, int) else ident if isinstance(ident, str) and ident else self._last_call
        call = self._calls.get(key)
        if call is None:
            return 0 if key is None else key
        renamed = ident and call.upstream_id and ident != call.upstream_id     # all calls under index 0
        repeated = index is None and not ident and call.whole                  # neither index nor id
        if function.get("name") and (renamed or repeated):
            del self._calls[key]
        return key

    def _begin_call(self, key: Any, ident: Any) -> None:
        ident = ident if isinstance(ident, str) and ident else None
        taken = ident is None or ident in self._call_ids or not re.match(r"\S+\Z", ident)
        call = self._calls[key] = _Call(self, ident, self.new_id("call_") if taken else str(ident))
        self._call_ids.add(call.call_id)
        self._open_calls.append(call)

    def _settle(self, active: Optional[_Call]) -> Iterator[Json]:
        """Something else than the other calls goes on: those that are whole are done."""
        for call in self._open_calls:
            if call is not active:
                yield from call.settle()
        self._open_calls = [call for call in self._open_calls if not call.done]

    def _end_items(self, cut: bool) -> Iterator[Json]:
        yield from self._end_speech()
        for call in self._open_calls:
            yield from call.close(cut)


class _CompactionStream(ResponsesStream):
    """The answer to a compaction_trigger: whatever the model writes becomes one sealed item."""

    def __init__(self, turn: ResponsesTurn, new_id: Callable[[str], str]) -> None:
        super().__init__(turn, new_id)
        self._written: List[str] = []

    def _write_pieces(self, pieces: Sequence[Tuple[str, str]], logprobs: List[Json]) -> Iterator[Json]:
        self._written += [text for kind, text in pieces if kind == "text"]
        return iter(())

    def _say(self, voice: _Voice, text: str, logprobs: List[Json]) -> Iterator[Json]:
        return iter(())

    def _take_calls(self, deltas: List[Any]) -> Iterator[Json]:
        return iter(())

    def _end_items(self, cut: bool) -> Iterator[Json]:
        summary = "".join(self._written).strip()
        if not summary:
            raise UpstreamGarbled("the model wrote no summary")
        sealed = self.turn.seal.close({"summary": summary})
        item, compaction = _Item(self), {"id": self.new_id("cmp_"), "type": "compaction", "encrypted_content": sealed}
        yield item.announce(compaction)
        yield item.finish(compaction)


# === 9. Dialects (pure) ======================================================

class Context(NamedTuple):
    """What a conversion needs of the world, passed in so that it stays pure."""
    now: float
    new_id: Callable[[str], str]
    seal: Seal
    store: Any                           #: a ResponseStore
    reasoning: Any                       #: a ReasoningCache
    scale: Callable[[int], int] = int    #: an estimate of tokens as the target's model counts them


#: What clients name a conversation by: Claude Code, Codex, others.
_SESSION_HEADERS = ("x-claude-code-session-id", "session-id", "session_id", "thread-id", "x-session-id")

_BASE64_RUN = re.compile(r'(?:;base64,|"data": ?")[A-Za-z0-9+/=]{500,}')


class ReasoningMemory(NamedTuple):
    """The part of a ReasoningCache that belongs to one conversation of one client."""
    cache: Any
    scope: str

    def keep(self, call: Json, text: str) -> None:
        self.cache.keep(call_digest(self.scope, call), text)

    def recall(self, call: Json) -> str:
        return self.cache.recall(call_digest(self.scope, call))


@dataclass
class Call:
    """One request as its client made it."""
    dialect: ChatDialect
    body: Json
    text: str                            #: what `body` was parsed from
    headers: Mapping[str, str]           #: names in lower case
    request_id: str
    key: Optional[ClientKey] = None      #: whose request it is, None where none is needed
    meters: Sequence[Any] = ()           #: Meters that its tokens count on

    @property
    def model(self) -> Optional[str]:
        return self.body.get("model")

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def shows_images(self) -> bool:
        return any(f'"{kind}"' in self.text for kind in _IMAGE_PARTS) and has_images(self.body)

    @property
    def speaks(self) -> str:
        return self.dialect.name

    @property
    def size_tokens(self) -> int:
        """About how long it is: four bytes a token (CJK in UTF-8: 0.75 each), pictures apart.  For routes, not for bills."""
        pictures = [found.end() - found.start() for found in _BASE64_RUN.finditer(self.text)]
        return (len(self.text.encode("utf-8", "replace")) - sum(pictures)) // 4 + 1500 * len(pictures)

    @property
    def thinks(self) -> bool:
        """Whether the client asks for reasoning, in whichever dialect's words."""
        body, kwargs = self.body, self.body.get("chat_template_kwargs")
        thinking, reasoning = body.get("thinking"), body.get("reasoning")
        effort = reasoning.get("effort") if isinstance(reasoning, dict) else body.get("reasoning_effort")
        switches = (body.get("enable_thinking"), kwargs.get("enable_thinking") if isinstance(kwargs, dict) else None,
                    reasoning.get("enabled") if isinstance(reasoning, dict) else None)
        return True in switches or (thinking.get("type") not in ("disabled", None) if isinstance(thinking, dict)
                                    else False) or (
            isinstance(effort, str) and effort not in ("none", "minimal", ""))

    @property
    def has_tools(self) -> bool:
        """Whether tools are offered; the newest Codex puts them into its first item (clients.md)."""
        items = self.body.get("input")
        return bool(self.body.get("tools") or self.body.get("functions")) or isinstance(items, list) and any(
            isinstance(item, dict) and item.get("type") == "additional_tools" for item in items[:3])

    @property
    def conversation(self) -> int:
        """A number that stays the same throughout a conversation: its session's, else its first messages'."""
        said = next((self.headers[name] for name in _SESSION_HEADERS if self.headers.get(name)), None) or (
            self.body.get("prompt_cache_key"))
        if not isinstance(said, str):
            items = self.body.get("messages") or self.body.get("input")
            said = json.dumps(items[:2] if isinstance(items, list) else items)[:8000]
        return zlib.crc32(said.encode("utf-8", "replace"))

    def memory(self, cache: Any, messages: Any) -> ReasoningMemory:
        """What is remembered of this conversation of this client, known by its session and by what it began with."""
        named = [self.headers.get(name) for name in (*_SESSION_HEADERS, "x-claude-code-agent-id")]
        return ReasoningMemory(cache, json.dumps([self.key.name if self.key else "", named, opening_of(messages)]))

    @property
    def is_codex(self) -> bool:
        """Codex reads comments as silence, and a cut answer as an error (clients.md)."""
        return self.headers.get("originator", "").startswith("codex")


class ChatTurn:
    """A chat request on its way to a chat upstream: every byte but the model's name as it came, where that will do."""
    local: Optional[Json] = None         #: an answer that needs no upstream
    estimate = max_output = 0            #: of the prompt's tokens; the most tokens it asks for; 0: not known

    def __init__(self, call: Call, target: Target, context: Context) -> None:
        self._call, self._target, self._context = call, target, context
        self._is_iflow = target.provider.kind == "iflow" and call.dialect.judged
        self._insists = call.dialect.judged and bool(profile_of(target)["require_reasoning_on_tool_calls"])
        self._preserve = target.provider.preserve_reasoning_content      #: None: reasoning passes untouched

    def encode(self) -> bytes:
        """The body for the upstream."""
        call, model = self._call, self._target.model
        if self._is_iflow:
            return dump_json({**adapt_to_iflow(call.body, model, self._memory.recall), "model": model})
        if self._insists:
            messages = refill_reasoning(call.body, self._memory.recall)
            if messages is not call.body.get("messages"):
                return dump_json({**call.body, "messages": messages, "model": model})
        return (call.text if call.model == model else splice_model(call.text, model)).encode()

    def reply(self, data: bytes, completion: Json) -> bytes:
        """The plain answer for the client, out of the upstream's bytes and what they parse to."""
        note = self._note()
        if note is not None:
            note.hear(completion)
            note.close()
        return data if self._preserve is None else dump_json(merge_reasoning(completion, self._preserve))

    def stream(self) -> Any:
        def fail(exc: GatewayError) -> bytes:
            return self._call.dialect.error_event(exc, self._call.request_id)

        note = self._note()
        if self._preserve is None and not self._is_iflow:
            choices = self._call.body.get("n")
            choices = choices if isinstance(choices, int) else 1
            return RelayStream(fail, choices) if note is None else HeardStream(fail, choices, note)
        return TranslatedStream(ReasoningMerge(bool(self._preserve)), encode_chunk, fail, note)

    @cached_property
    def _memory(self) -> ReasoningMemory:
        return self._call.memory(self._context.reasoning, self._call.body.get("messages"))

    def _note(self) -> Optional[ReasoningNote]:
        wanted = self._is_iflow or self._insists and "tools" in self._call.body
        return ReasoningNote(self._memory.keep) if wanted else None


class TranslatedTurn:
    """A request in a dialect of its own, its chat request, and the way back."""

    def __init__(self, call: Call, turn: Any, target: Target, context: Context) -> None:
        self._call, self._turn, self._target, self._context = call, turn, target, context
        self._is_iflow = target.provider.kind == "iflow"
        self._insists = bool(profile_of(target)["require_reasoning_on_tool_calls"])

    @property
    def local(self) -> Optional[Json]:
        return getattr(self._turn, "local", None)

    def local_events(self) -> bytes:
        """`local` as a stream."""
        return b"".join(map(encode_event, self._turn.local_events(self._context.new_id)))

    @property
    def estimate(self) -> int:
        return getattr(self._turn, "estimate", 0)

    @property
    def max_output(self) -> int:
        value = self._turn.chat.get("max_tokens") or self._turn.chat.get("max_completion_tokens")
        return value if isinstance(value, int) else 0

    def raw_estimate(self, worth: bool) -> int:
        """The estimate to learn from; 0 where there is none, or only one that is not worth the time."""
        turn = self._turn
        known = worth or "raw_estimate" in vars(turn)
        return getattr(turn, "raw_estimate", 0) if known and not self._call.shows_images else 0

    def encode(self) -> bytes:
        chat = self._turn.chat
        if self._is_iflow:
            chat = adapt_to_iflow(chat, chat["model"], self._memory.recall)
        elif self._insists:
            chat = {**chat, "messages": refill_reasoning(chat, self._memory.recall)}
        return dump_json(chat)

    @cached_property
    def _memory(self) -> ReasoningMemory:
        return self._call.memory(self._context.reasoning, self._call.body.get("messages") or self._turn.chat["messages"])

    def _note(self) -> Optional[ReasoningNote]:
        return ReasoningNote(self._memory.keep) if self._is_iflow or self._insists else None

    def reply(self, data: bytes, completion: Json) -> bytes:
        note = self._note()
        if note is not None:
            note.hear(completion)
        answer = self._turn.reply(completion, self._context.new_id)
        if note is not None:
            note.close(call_ids(answer))
        return dump_json(self._kept(answer))

    def stream(self) -> TranslatedStream:
        translator = self._turn.stream(self._context.new_id)
        fail = getattr(translator, "fail", None)

        def error(exc: GatewayError) -> bytes:
            if fail is None:
                return self._call.dialect.error_event(exc, self._call.request_id)
            return b"".join(map(encode_event, fail(exc)))

        return TranslatedStream(translator, self._encode, error, self._note())

    def _encode(self, event: Json) -> bytes:
        return encode_event(event)

    def _kept(self, answer: Json) -> Json:
        return answer


class ResponsesRoad(TranslatedTurn):
    """A Responses request, whose answer is kept for `previous_response_id` unless it was made not to be."""

    def _encode(self, event: Json) -> bytes:
        if event["type"] in ("response.completed", "response.incomplete"):
            self._kept(event["response"])
            return encode_event(event) + b"data: [DONE]\n\n"    # harmless, and some clients wait for it
        return encode_event(event)

    def _kept(self, answer: Json) -> Json:
        if self._turn.store and answer.get("object") == "response":
            self._context.store.keep(answer, self._turn.items)
        return answer


class CompactRoad(ResponsesRoad):
    """POST /v1/responses/compact: the same request, answered by its summary."""

    def reply(self, data: bytes, completion: Json) -> bytes:
        return dump_json(compact_reply(self._turn, completion, self._context.new_id))


def call_ids(answer: Json) -> List[str]:
    """What the calls of a message or response are called when they come back."""
    return [item.get("call_id") or unwrap_id(item["id"]) for item in answer.get("content") or answer.get("output") or ()
            if "call_id" in item or item["type"] == "tool_use"]


def encode_event(event: Json) -> bytes:
    """An event of Messages or Responses as a record; clients go by the `event:` line."""
    return b"event: " + event["type"].encode() + b"\ndata: " + dump_json(event) + b"\n\n"


class ChatDialect:
    """OpenAI's own endpoints: passed on as they are, once they are what they claim to be."""
    name = "chat"
    foreign = False                      #: whether its clients insist on model names of their own (FOREIGN_MODELS)

    def __init__(self, path: str, needs: str = "", judged: bool = True) -> None:
        self.path = path                 #: under the upstream's base URL
        self._needs = needs              #: a list that must be there
        self.judged = judged             #: whether an answer without choices is an empty answer

    def check(self, body: Json) -> None:
        """BadRequest where no upstream could make sense of it."""
        model, stream = body.get("model"), body.get("stream")
        if model is not None and not isinstance(model, str):
            raise BadRequest("`model` must be a string", param="model", code="invalid_type")
        if stream is not None and not isinstance(stream, bool):
            raise BadRequest("`stream` must be true or false", param="stream", code="invalid_type")
        if not self._needs:
            return
        items = body.get(self._needs)
        if items is None:
            raise BadRequest(f"`{self._needs}` is missing", param=self._needs, code="missing_required_parameter")
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise BadRequest(f"`{self._needs}` must be a list of objects", param=self._needs, code="invalid_type")
        if not items:
            raise BadRequest(f"`{self._needs}` must not be empty", param=self._needs, code="empty_array")

    def turn(self, call: Call, target: Target, context: Context) -> Any:
        """The way there and back for one target: a ChatTurn, or something like it."""
        return ChatTurn(call, target, context)

    def keepalive(self, call: Call, began: bool) -> bytes:
        """What tells the client in silence that we are there."""
        return b": keep-alive\n\n"

    def error(self, exc: GatewayError, request_id: str) -> Json:
        """The body of an error; an upstream's own error object is passed on with all its keys."""
        if exc.body:
            return exc.body
        return {"error": {"message": exc.message, "type": exc.type, "param": exc.param, "code": exc.code}}

    def status(self, exc: GatewayError) -> int:
        return 400 if exc.overflow is not None else exc.status

    def error_event(self, exc: GatewayError, request_id: str) -> bytes:
        """An error within a stream; no [DONE] follows (the Python SDK raises APIError on it)."""
        return b"data: " + dump_json(self.error(exc, request_id)) + b"\n\n"


def profile_of(target: Target) -> Json:
    """How Chat is spoken with this very model: the plain way, the provider's, and what is known of the model."""
    profile = {**DEFAULT_PROFILE, **target.provider.profile, **target.provider.facts.get(target.model, {})}
    if target.provider.kind == "iflow":
        profile["require_reasoning_on_tool_calls"] = wants_reasoning_back(target.model)
    return profile


class MessagesDialect(ChatDialect):
    """Anthropic Messages."""
    name = "messages"
    foreign = True

    def turn(self, call: Call, target: Target, context: Context) -> Any:
        turn = MessagesTurn(call.body, profile_of(target), target.model)
        thinking = call.body.get("thinking")
        asked = isinstance(thinking, dict) and thinking.get("type") != "disabled"
        turn.hide_reasoning = target.provider.kind == "iflow" and not asked
        turn.scale = context.scale
        return TranslatedTurn(call, turn, target, context)

    def keepalive(self, call: Call, began: bool) -> bytes:
        """A ping is legal after message_start alone."""
        return b'event: ping\ndata: {"type":"ping"}\n\n' if began else b": keep-alive\n\n"

    def error(self, exc: GatewayError, request_id: str) -> Json:
        return messages_error(exc, request_id)

    def status(self, exc: GatewayError) -> int:
        return 400 if exc.overflow is not None else messages_status(exc.status)

    def error_event(self, exc: GatewayError, request_id: str) -> bytes:
        return encode_event(self.error(exc, request_id))


class ResponsesDialect(ChatDialect):
    """OpenAI Responses."""
    name = "responses"
    foreign = True
    compact = False

    def turn(self, call: Call, target: Target, context: Context) -> Any:
        store = context.store
        turn = ResponsesTurn(call.body, profile_of(target), target.model, now=context.now,
                             recall=store.recall, item=store.item, seal=context.seal, codex=call.is_codex,
                             compact=self.compact)
        return (CompactRoad if self.compact else ResponsesRoad)(call, turn, target, context)

    def keepalive(self, call: Call, began: bool) -> bytes:
        return b'data: {"type":"ping"}\n\n' if call.is_codex else b": keep-alive\n\n"


class CompactDialect(ResponsesDialect):
    """POST /v1/responses/compact."""
    compact = True


CHAT = ChatDialect("/chat/completions", needs="messages")
COMPLETIONS = ChatDialect("/completions")
EMBEDDINGS = ChatDialect("/embeddings", judged=False)
MESSAGES = MessagesDialect("/chat/completions")
RESPONSES = ResponsesDialect("/chat/completions")
COMPACT = CompactDialect("/chat/completions")


# === 10. Upstream ============================================================

class Caller:
    """Who waits for an upstream's answer: somebody who may leave, and who may have to be kept awake."""
    sock: Optional[socket.socket] = None  #: watched for the end of the connection
    tick_s = 3600.0
    pumped = False                       #: what he is sent must not block: the rest waits in `backlog`
    backlog = b""
    wrote_at = 0.0                       #: when he last took something, on the monotonic clock

    def tick(self) -> None:
        """Called in silence, about every `tick_s`."""

    def flush(self) -> None:
        """Send what goes of `backlog` without waiting; ClientGone."""

    def is_stuck(self, now: float) -> bool:
        """Whether he has taken nothing of `backlog` for too long."""
        return False


NOBODY = Caller()                        #: for our own requests

_POLLIN = getattr(select, "POLLIN", 1)
_POLLOUT = getattr(select, "POLLOUT", 4)
_HANGUP = getattr(select, "POLLRDHUP", 0) | getattr(select, "POLLHUP", 0) | getattr(select, "POLLERR", 0)


class _SelectPoller:
    """The part of select.poll that we use, for Windows, which lacks it."""

    def __init__(self) -> None:
        self._wanted: Dict[int, int] = {}

    def register(self, fd: int, events: int) -> None:
        self._wanted[fd] = events

    def poll(self, timeout_ms: float) -> List[Tuple[int, int]]:
        reads = [fd for fd, events in self._wanted.items() if events & _POLLIN]
        writes = [fd for fd, events in self._wanted.items() if events & _POLLOUT]
        ready = select.select(reads, writes, reads + writes, timeout_ms / 1000)
        return [(fd, 1) for fd in set(ready[0] + ready[1] + ready[2])]


Poller = getattr(select, "poll", _SelectPoller)


def has_left(sock: socket.socket, hung_up: bool = False) -> bool:
    """Whether the peer closed.  Behind a pipelined request only a hang-up can be seen."""
    try:
        return hung_up or not sock.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True


class Lookout:
    """One thread that looks at all waiting clients twice a second and cuts off the wire of one who left.

    So who waits for an upstream waits for one socket only, and a stream costs two system calls a chunk.
    """
    EVERY_S = 0.5

    def __init__(self) -> None:
        self._wires: Dict[int, Wire] = {}
        self._lock = threading.Lock()
        self._wanted, self._closed = threading.Event(), threading.Event()
        self._thread: Optional[threading.Thread] = None

    def watch(self, wire: Wire, sock: socket.socket) -> None:
        fd = sock.fileno()
        if fd < 0:
            raise ClientGone
        with self._lock:
            self._wires[fd] = wire
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)
                self._thread.start()
        if not self._wanted.is_set():
            self._wanted.set()

    def forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._wires.pop(sock.fileno(), None)

    def _run(self) -> None:
        while not self._closed.is_set():
            if not self._wires:
                self._wanted.clear()
            if self._wires or self._wanted.wait(60):
                self._closed.wait(self.EVERY_S)
                try:
                    self._look()
                except Exception:        # a thread body: without it nobody would notice who leaves
                    log.exception("looking after waiting clients failed")

    def close(self) -> None:
        self._closed.set()
        self._wanted.set()

    def _look(self) -> None:
        with self._lock:                 # so that no wire goes back to the pool meanwhile
            poller = Poller()
            for fd in self._wires:
                poller.register(fd, _POLLIN | _HANGUP)
            for fd, events in poller.poll(0) if self._wires else ():
                wire = self._wires.get(fd)
                if wire is not None and has_left(wire.caller.sock, bool(events & _HANGUP)):
                    wire.cut()


_HEAD_END = re.compile(rb"\r?\n\r?\n")


class HeadReader:
    """Reads heads, and what follows them, on top of `_receive`."""
    _buffer = b""

    def _receive(self) -> bytes:
        """The next bytes of the connection, b"" at its end."""
        raise NotImplementedError

    def take(self) -> bytes:
        """The next bytes, b"" at the end."""
        if self._buffer:
            data, self._buffer = self._buffer, b""
            return data
        return self._receive()

    def read_head(self, stray: bytes = b"") -> Optional[bytes]:
        """A head without the blank line that ends it; b"" when the connection ends before, None when it is too large.

        Bytes of `stray` before it are skipped.
        """
        while True:
            if stray:
                self._buffer = self._buffer.lstrip(stray)
            found = _HEAD_END.search(self._buffer)
            if found and found.start() <= HEAD_LIMIT_BYTES:
                head, self._buffer = self._buffer[:found.start()], self._buffer[found.end():]
                return head
            if len(self._buffer) > HEAD_LIMIT_BYTES:
                return None
            more = self._receive()
            if not more:
                return b""
            self._buffer += more


def _timeval(seconds: float) -> bytes:
    """A C `struct timeval` for SO_RCVTIMEO."""
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))


def _set_kernel_timeout(sock: socket.socket, option: int, seconds: float) -> bool:
    """Let the kernel end a wait; False where it did not take it (Windows, 32-bit musl with 64-bit times)."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, _timeval(seconds))
        taken = struct.unpack("@ll", sock.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("@ll")))
    except (OSError, struct.error):
        return False
    return os.name == "posix" and abs(taken[0] + taken[1] / 1e6 - seconds) < 0.1


class Wire(HeadReader):
    """A socket to an upstream, whose reader may be called upon to keep its caller awake, or be cut off when he left.

    `timeout_s` is the longest silence.  Reading raises UpstreamTimeout, ClientGone, OSError.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.caller = sock, NOBODY
        self.timeout_s, self.received, self.idle_since = 60.0, False, 0.0
        self._left, self._quiet_s, self._slice_s = False, 0.0, 0.0
        self._poller = Poller()
        self._poller.register(sock.fileno(), _POLLIN)
        self._blocking = not isinstance(sock, ssl.SSLSocket) and _set_kernel_timeout(sock, socket.SO_RCVTIMEO, 60)
        self._now = socket.MSG_DONTWAIT if self._blocking else 0
        sock.setblocking(self._blocking)

    def attach(self, caller: Caller, timeout_s: float) -> None:
        """From here on `caller` is who waits."""
        self.caller, self.received = caller, False
        self.set_timeout(timeout_s)

    def set_timeout(self, timeout_s: float) -> None:
        self.timeout_s, self._quiet_s = timeout_s, 0.0
        self._set_slice(min(self.caller.tick_s, timeout_s))

    def _set_slice(self, seconds: float) -> None:
        """How long one wait may take before somebody has to be heeded."""
        if seconds != self._slice_s:
            self._slice_s = seconds
            if self._blocking:
                _set_kernel_timeout(self.sock, socket.SO_RCVTIMEO, seconds)

    def is_stale(self) -> bool:
        """Whether an idle connection was closed by the other side, or babbles."""
        return bool(self._buffer) or bool(self._poller.poll(0))

    def cut(self) -> None:
        """The caller left: end the wait, whoever is in it."""
        self._left = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock,
                                   socket.SHUT_RDWR)      # not TLS's own, which would pull the rug from the reader

    def _receive(self) -> bytes:
        while True:
            data = self._receive_some(0)
            if data is not None:
                return data
            if self._blocking or not self._poller.poll(self._slice_s * 1000):
                self._pass_silence()

    def take_now(self) -> Optional[bytes]:
        """What `take` gives, None where nothing has come."""
        return self.take() if self._buffer else self._receive_some(self._now)

    def _receive_some(self, flags: int) -> Optional[bytes]:
        try:
            data = self.sock.recv(65536, flags)
        except (BlockingIOError, ssl.SSLWantReadError):
            return None
        except ssl.SSLWantWriteError:
            self._wait_writable()
            return None
        except OSError as exc:
            if self._left:
                raise ClientGone from None
            if isinstance(exc, ssl.SSLEOFError):                 # no close_notify: as good as an end
                return b""
            raise
        if self._left:
            raise ClientGone
        self.received, self._quiet_s = self.received or bool(data), 0.0
        return data

    def holds_more(self) -> bool:
        """Whether TLS has read ahead: then the socket is silent although there is something to take."""
        return isinstance(self.sock, ssl.SSLSocket) and self.sock.pending() > 0

    def _pass_silence(self) -> None:
        """A slice of silence is over: who waits is kept awake, or it was too much."""
        if self._left:
            raise ClientGone
        self._quiet_s += self._slice_s
        self.check_silence(self._quiet_s)
        self.caller.tick()
        self._set_slice(max(0.001, min(self.caller.tick_s, self.timeout_s - self._quiet_s)))

    def check_silence(self, quiet_s: float) -> None:
        if quiet_s >= self.timeout_s - 0.001:
            raise UpstreamTimeout(f"the upstream said nothing for {self.timeout_s:g} s")

    def _wait_writable(self) -> None:
        poller = Poller()
        poller.register(self.sock.fileno(), _POLLOUT)
        if not poller.poll(self.timeout_s * 1000):
            raise UpstreamTimeout(f"the upstream took nothing for {self.timeout_s:g} s")

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        flags = (getattr(socket, "MSG_DONTWAIT", 0),) if self._blocking else ()
        while view:
            try:
                view = view[self.sock.send(view[:1 << 18], *flags):]
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._wait_writable()

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()


_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")


class Dechunker:
    """Chunked framing off (RFC 9112, 7.1), whatever way it is cut."""

    def __init__(self) -> None:
        self.done = False
        self.whole = False               #: the last feed was whole chunks and not the end: it can be forwarded as it came
        self._rest, self._left = b"", 0  # unread framing; payload bytes left of the current chunk, and its CRLF

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`; ValueError when it is no chunked framing."""
        if not self._rest and not self._left:            # the usual case: one whole chunk a read
            end = data.find(b"\r\n")
            if 0 < end < 9 and data[:end].isalnum() and data[1:2] not in b"xX":
                size = int(data[:end], 16)
                if size and len(data) == end + size + 4 and data[-2:] == b"\r\n":
                    self.whole = True
                    return data[end + 2:-2]
        return self._feed_slowly(data)

    def _feed_slowly(self, data: bytes) -> bytes:
        if self.done:
            self._rest += data
            return b""
        clean = not self._rest and not self._left
        data, self._rest, out = self._rest + data, b"", []
        at = 0
        while at < len(data) and not self.done:
            if self._left > 2:
                piece = data[at:at + self._left - 2]
                out.append(piece)
                self._left -= len(piece)
                at += len(piece)
            elif self._left:
                piece = data[at:at + self._left]
                if not b"\r\n"[2 - self._left:].startswith(piece):
                    raise ValueError("no line end after a chunk")
                self._left, at = self._left - len(piece), at + len(piece)
            else:
                at = self._read_size(data, at)
        self.whole = clean and not self.done and not self._left and not self._rest
        return b"".join(out)

    def _read_size(self, data: bytes, at: int) -> int:
        found = _CHUNK_SIZE.match(data, at)
        if not found:
            self._rest = data[at:]
            if b"\n" in self._rest or len(self._rest) > LINE_LIMIT:
                raise ValueError("no chunk size")
            return len(data)
        size = int(found.group(1), 16)
        if size:
            self._left = size + 2
            return found.end()
        end = re.compile(rb"(?:[^\r\n]+\r\n)*\r\n").match(data, found.end())     # trailers
        if not end:
            self._rest = data[at:]
            if len(self._rest) > LINE_LIMIT:
                raise ValueError("endless trailers")
            return len(data)
        self.done, self._rest = True, data[end.end():]
        return len(data)

    @property
    def surplus(self) -> bytes:
        """What came after the end."""
        return self._rest if self.done else b""


_STATUS_LINE = re.compile(r"HTTP/1\.([01]) +([1-9]\d\d)(?: .*)?")
_ANSWER_FIELD = re.compile(r"(?m)^([^:\s]+)[ \t]*:[ \t]*([^\n]*?)[ \t\r]*$")


class AnswerHead(NamedTuple):
    """What an upstream's head says.  `length` None: chunked, or up to the end of the connection."""
    status: int
    headers: Dict[str, str]              #: names in lower case, repeated ones joined
    chunked: bool
    length: Optional[int]
    reusable: bool


def parse_answer_head(head: bytes, method: str) -> AnswerHead:
    """Read an answer's head as leniently as browsers do; ValueError where it is no HTTP/1 (RFC 9112, 6.3 for the framing).

    http.client's parser, which is the one for e-mail, took a fifth of the time of a plain request.
    """
    first, _, rest = head.decode("latin-1").partition("\n")
    found = _STATUS_LINE.fullmatch(first.rstrip("\r"))
    if not found:
        raise ValueError("no status line")
    if rest.count("\n") >= HEADERS_LIMIT:
        raise ValueError("too many headers")
    headers: Dict[str, str] = {}
    for name, value in _ANSWER_FIELD.findall(re.sub(r"\r?\n[ \t]+", " ", rest) if "\n " in rest or "\n\t" in rest else rest):
        name = name.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    status, token = int(found.group(2)), headers.get("connection", "").lower()
    chunked = headers.get("transfer-encoding", "").lower().rpartition(",")[2].strip() == "chunked"
    length: Optional[int] = None
    if method == "HEAD" or status in (204, 304) or status < 200:
        chunked, length = False, 0
    elif not chunked and "content-length" in headers:
        lengths = {text.strip() for text in headers["content-length"].split(",")}
        if len(lengths) > 1 or not re.fullmatch(r"\d{1,18}", *lengths, re.ASCII):
            raise ValueError("no Content-Length")
        length = int(*lengths)
    keeps = "close" not in token if found.group(1) == "1" else "keep-alive" in token
    return AnswerHead(status, headers, chunked, length, keeps and (chunked or length is not None))


class Exchange:
    """One request to an upstream and its answer; closing it gives the connection back, or ends it."""

    def __init__(self, release: Callable[[Wire, bool], None], wire: Wire, head: AnswerHead, idle_timeout_s: float) -> None:
        self.status, self.headers = head.status, head.headers
        self.content_type = head.headers.get("content-type", "").lower()
        self.framed: Optional[bytes] = None       #: the last read with its chunk framing, where it can be forwarded so
        self._release, self.wire = release, wire
        self._chunks = Dechunker() if head.chunked else None
        self._left, self._will_close = head.length, not head.reusable
        self.next_timeout_s: Optional[float] = idle_timeout_s     #: for the body, until it begins
        self.complete = self._left == 0           #: all of the answer was read
        self._inflate = self._decoder(head.headers.get("content-encoding", "identity").lower())

    @staticmethod
    def _decoder(encoding: str) -> Any:
        if encoding in ("identity", ""):
            return None
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise UpstreamGarbled(f"the upstream's answer is encoded as {one_line(encoding, 40)}, which nobody asked for")
        return zlib.decompressobj(47)    # 32 + 15: gzip or zlib, told apart by the header

    def read(self) -> bytes:
        """Payload of the next network read, b"" at the proper end; UpstreamGarbled when it is cut off."""
        return self._read(self.wire.take) or b""

    def read_now(self) -> Optional[bytes]:
        """The same, None where nothing has come."""
        return self._read(self.wire.take_now)

    def _read(self, take: Callable[[], Optional[bytes]]) -> Optional[bytes]:
        while not self.complete:
            try:
                data = take()
            except OSError as exc:
                self._will_close = True
                raise UpstreamGarbled(f"the connection to the upstream broke: {exc.strerror or exc}") from None
            if data is None:
                return None
            if self.next_timeout_s is not None:                 # the first byte of the body is here
                self.wire.set_timeout(self.next_timeout_s)
                self.next_timeout_s = None
            if not data:
                self._end_of_connection()
                break
            payload = self._unframe(data)
            if self._inflate is not None:
                self.framed = None
                payload = self._decompress(payload)
            if payload:
                return payload
        return b""

    def _unframe(self, data: bytes) -> bytes:
        if self._chunks is None:
            if self._left is not None:
                data, surplus = data[:self._left], data[self._left:]
                self._left -= len(data)
                self.complete, self._will_close = not self._left, self._will_close or bool(surplus)
            return data
        try:
            payload = self._chunks.feed(data)
        except ValueError as exc:
            self._will_close = True
            raise UpstreamGarbled(f"the upstream's chunked answer is broken: {exc}") from None
        self.framed = data if self._chunks.whole else None
        self.complete, self._will_close = self._chunks.done, self._will_close or bool(self._chunks.surplus)
        return payload

    def _end_of_connection(self) -> None:
        self._will_close = True
        if self._chunks is not None or self._left:
            raise UpstreamGarbled("the upstream closed the connection in the middle of its answer")
        self.complete = True

    def _decompress(self, payload: bytes) -> bytes:
        try:
            return self._inflate.decompress(payload)
        except zlib.error as exc:
            raise UpstreamGarbled(f"the upstream's answer can't be decompressed: {exc}") from None

    def read_all(self, limit: int) -> bytes:
        """The whole body; UpstreamGarbled above `limit` bytes."""
        parts, size = [], 0
        while True:
            payload = self.read()
            if not payload:
                return b"".join(parts)
            parts.append(payload)
            size += len(payload)
            if size > limit:
                raise UpstreamGarbled(f"the upstream's answer is larger than {limit >> 20} MiB")

    def close(self) -> None:
        """Keep the connection if the answer was read to its end."""
        if not self.complete and self._chunks is not None and not self._will_close:
            self._read_terminator()
        self._release(self.wire, self.complete and not self._will_close)

    def _read_terminator(self) -> None:
        """After [DONE] only the last chunk is missing; it is mostly there already."""
        self.wire.set_timeout(0.05)
        with contextlib.suppress(UpstreamError, ClientGone):
            self.read()

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, kind: Any, exc: Any, trace: Any) -> None:
        if kind is not None:
            self._will_close = True      # nobody knows what still comes
        self.close()


class Flow:
    """One stream on its way: what Upstream.move and the pump move.  `error` is what ended it before its time."""
    AFTER_FINISH_S = 3.0                 #: silence after which nothing more is waited for, if the answer is over

    def __init__(self, exchange: Exchange, caller: Caller, move: Callable[[bytes], bool],
                 is_over: Callable[[], bool]) -> None:
        self._exchange, self.caller, self.wire, self._move = exchange, caller, exchange.wire, move
        self._is_over = is_over
        self._heard_at, self.idle = time.monotonic(), False      #: idle: all that had come is moved
        self.place: Optional[socket.socket] = None               #: the socket that a pump waits for
        self.due = 0.0                   #: when the pump has to heed it
        self.ended, self.error = threading.Lock(), None
        self.ended.acquire()

    def step(self) -> bool:
        """Move what has come; whether there may be more.  Raises what reading and moving raise."""
        caller = self.caller
        if caller.backlog:
            caller.flush()
        while not caller.backlog:
            payload = self._exchange.read_now()
            if payload is None:
                self.idle = True
                break
            if not payload or not self._move(payload) or self._exchange.complete:
                return False
            self._heard_at = time.monotonic()
            if not self.wire.holds_more():
                break
        return True

    def heed(self) -> Optional[float]:
        """Keep who waits awake; the moment to do so again, None where all came but the end.  UpstreamTimeout, ClientGone."""
        caller, now = self.caller, time.monotonic()
        if caller.backlog:
            if caller.is_stuck(now):
                raise ClientGone
            self._heard_at = now         # it is not the upstream that is slow
            return now + 1.0
        quiet_s = now - self._heard_at
        if quiet_s >= min(self.AFTER_FINISH_S, self.wire.timeout_s) - 0.001 and self._is_over():
            return None
        self.wire.check_silence(quiet_s)
        due = caller.wrote_at + caller.tick_s
        if due - now <= caller.tick_s * 0.01:
            caller.tick()
            due = now + caller.tick_s
        if self._exchange.next_timeout_s is not None:
            due = min(due, now + self._exchange.next_timeout_s)
        if quiet_s < self.AFTER_FINISH_S:
            due = min(due, self._heard_at + self.AFTER_FINISH_S)
        return min(due, self._heard_at + self.wire.timeout_s)

    def end(self, error: Optional[BaseException]) -> None:
        """Wake who waits for the end; nothing is kept for the pump, which may know of this flow for a while."""
        self.error, self.place = error, None
        del self._exchange, self.caller, self.wire, self._move, self._is_over
        self.ended.release()


class Pump:
    """One thread that moves the streams of all requests, whose own threads sleep until theirs has ended.

    Threads that each wait for their own upstream fight over the interpreter's lock at each chunk: with 32 streams that
    took more than half of the time of a chunk, whatever `sys.setswitchinterval` says.
    """
    #: select(), where there is nothing better (Windows), takes 512 sockets.
    ROOM = 500 if selectors.DefaultSelector is selectors.SelectSelector else 1 << 20

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._fresh: Deque[Flow] = deque()
        self._due: List[Tuple[float, int, Flow]] = []    #: a heap: when somebody has to be heeded
        self._number, self._load, self._closing, self._lock = 0, 0, False, threading.Lock()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="pump", daemon=True)
        self._thread.start()

    def admit(self) -> bool:
        """Take a place for one more flow, if there is one."""
        with self._lock:
            free = self._load < self.ROOM and not self._closing
            self._load += free
            return free

    def run(self, flow: Flow) -> None:
        """Move a flow that was admitted, until it has ended."""
        wire = flow.wire
        self._fresh.append(flow)
        self._ring()
        try:
            flow.ended.acquire()
        except BaseException:            # a signal, in a main thread: the wire must not be let go while it is watched
            wire.cut()
            flow.ended.acquire()
            raise

    def _ring(self) -> None:
        with contextlib.suppress(OSError):               # full: it will wake up
            self._bell.send(b"!")

    def close(self) -> None:
        """End once the last flow has."""
        with self._lock:
            self._closing = True
        self._ring()

    def _run(self) -> None:
        while not self._closing or self._load:
            wait_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            for key, _ in self._selector.select(wait_s):
                if key.data is None:
                    self._let_in()
                else:
                    self._serve(key.data, key.data.step)
            while self._due and self._due[0][0] <= time.monotonic():
                due, _, flow = heapq.heappop(self._due)
                if due == flow.due:      # else it was planned anew
                    self._heed(flow)
        self._selector.close()
        self._bell.close()
        self._ear.close()

    def _let_in(self) -> None:
        with contextlib.suppress(OSError):
            self._ear.recv(4096)
        while self._fresh:
            self._serve(self._fresh[0], lambda: True)
            self._heed(self._fresh.popleft())

    def _heed(self, flow: Flow) -> None:
        def act() -> bool:
            due = flow.heed()
            if due is not None:
                self._plan(flow, due)
            return due is not None

        if flow.place is not None:       # it may have ended meanwhile
            self._serve(flow, act)

    def _plan(self, flow: Flow, due: float) -> None:
        self._number += 1
        flow.due = due
        heapq.heappush(self._due, (due, self._number, flow))

    def _serve(self, flow: Flow, act: Callable[[], bool]) -> None:
        """Let a flow act, and wait for its upstream, or for a slow client, until the next time; or it has ended."""
        error: Optional[BaseException] = None
        try:
            if act():
                return self._wait_for(flow)
        except BaseException as exc:     # whatever it is, it belongs to the request's own thread
            error = exc
        if flow.place is not None:
            self._selector.unregister(flow.place)
        with self._lock:
            self._load -= 1
        flow.end(error)

    def _wait_for(self, flow: Flow) -> None:
        slow = bool(flow.caller.backlog)
        place = flow.caller.sock if slow else flow.wire.sock
        if place is not flow.place:
            if flow.place is not None:
                self._selector.unregister(flow.place)
                flow.place = None
            self._selector.register(place, selectors.EVENT_WRITE if slow else selectors.EVENT_READ, flow)
            flow.place = place
            if slow and flow.due > time.monotonic() + 1:
                self._plan(flow, time.monotonic() + 1)


class Pool:
    """Idle connections by (scheme, host, port, proxy), the latest used first."""
    SIZE = 128                           #: for each key

    def __init__(self) -> None:
        self._idle: Dict[Tuple, Deque[Wire]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def take(self, key: Tuple) -> Optional[Wire]:
        while True:
            with self._lock:
                idle = self._idle.get(key)
                if not idle:
                    return None
                wire = idle.pop()
            idle_s = time.monotonic() - wire.idle_since
            if idle_s < UPSTREAM_IDLE_S and (idle_s < FRESH_S or not wire.is_stale()):
                return wire
            wire.hang_up()

    def give(self, key: Tuple, wire: Wire) -> None:
        wire.idle_since = time.monotonic()
        with self._lock:
            idle = self._idle.setdefault(key, deque())
            idle.append(wire)
            too_old = idle.popleft() if len(idle) > self.SIZE or self._closed else None
        if too_old:
            too_old.hang_up()

    def clear(self, final: bool = False) -> None:
        with self._lock:
            wires = [wire for idle in self._idle.values() for wire in idle]
            self._idle.clear()
            self._closed = final
        for wire in wires:
            wire.hang_up()


#: OpenSSL's verify codes that have a cause a user can act on.
_VERIFY_HINT = {
    9: "its certificate is not valid yet: is this machine's clock right?",
    10: "its certificate has expired, or this machine's clock is wrong",
    18: "its certificate is self-signed: put it into a file and set `ca_file`",
    19: "its certificate chain ends in an unknown root: set `ca_file`, or install the CA certificates (ca-certificates)",
    20: "its issuer is unknown: install the CA certificates (ca-certificates, on OpenWrt ca-bundle), or set `ca_file`",
    62: "its certificate is for another host name"}


def _transport_error(exc: Exception, where: str) -> UpstreamError:
    """The one translation of what sockets, TLS and heads that make no sense raise."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        hint = _VERIFY_HINT.get(exc.verify_code, exc.verify_message)
        return UpstreamUnreachable(f"{where}: TLS failed: {hint}", should_retry=False)
    if isinstance(exc, socket.timeout):
        return UpstreamTimeout(f"{where}: no connection within the time limit (connect_timeout_s)")
    if isinstance(exc, ssl.SSLError):
        hint = "it does not speak TLS; should the address begin with http://?" if "WRONG_VERSION" in str(exc.reason) else \
            exc.reason or str(exc)
        return UpstreamUnreachable(f"{where}: TLS failed: {hint}")
    if isinstance(exc, (socket.gaierror, UnicodeError)):
        return UpstreamUnreachable(f"{where}: unknown host ({getattr(exc, 'strerror', None) or exc})")
    if isinstance(exc, ConnectionRefusedError):
        return UpstreamUnreachable(f"{where}: connection refused; is it running?")
    if isinstance(exc, ValueError):
        return UpstreamGarbled(f"{where}: the answer is not HTTP ({one_line(exc, 60)})")
    if isinstance(exc, OSError):
        return UpstreamUnreachable(f"{where}: {exc.strerror or exc or type(exc).__name__}")
    return UpstreamUnreachable(f"{where}: {exc}")


class Endpoint(NamedTuple):
    """Where a base URL leads."""
    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    @lru_cache(256)
    def of(cls, base_url: str) -> "Endpoint":
        parts = urllib.parse.urlsplit(base_url)
        return cls(parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80),
                   parts.path)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"


def uuid4() -> str:
    """A random UUID (RFC 9562, 5.4); the uuid module is a package of its own on OpenWrt."""
    digits = secrets.token_hex(16)
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{'89ab'[int(digits[16], 16) & 3]}{digits[17:20]}-{digits[20:]}"


class IFlowIdentity:
    """The headers iFlow knows its CLI by: one session and conversation a process, each request signed."""

    def __init__(self) -> None:
        self.session_id, self.conversation_id = f"session-{uuid4()}", uuid4()

    def headers(self, key: str, now: float) -> List[Tuple[str, str]]:
        """For a request at `now` (epoch seconds) with the API key `key`; the signature is HMAC-SHA-256 in hex."""
        stamp = str(int(now * 1000))
        signed = hmac.new(key.encode(), f"{IFLOW_AGENT}:{self.session_id}:{stamp}".encode(), "sha256").hexdigest()
        trace = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
        return [("user-agent", IFLOW_AGENT), ("session-id", self.session_id), ("conversation-id", self.conversation_id),
                ("x-iflow-timestamp", stamp), ("x-iflow-signature", signed), ("traceparent", trace)]


# --- proxies -----------------------------------------------------------------

#: What a proxy's address may begin with, and the port where it names none (SOCKS: RFC 1928, 3).
PROXY_PORTS = {"http": 80, "socks5": 1080, "socks5h": 1080}


class Proxy(NamedTuple):
    """Where a proxy is; as text without its credentials."""
    scheme: str
    host: str
    port: int
    user: str = ""
    password: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def parse_proxy(text: str) -> Proxy:
    """`text` as a Proxy; a bare `host:port` is an HTTP one, as in every proxy variable.

    ValueError shows nothing of `text` but its scheme: a password may stand anywhere in an address that can't be read.
    """
    text = text.strip()
    if "://" not in text:
        text = "http://" + text
    scheme = text.partition("://")[0].lower()
    if scheme not in PROXY_PORTS:
        shown = f"with {scheme}://" if re.fullmatch(r"[a-z0-9+.-]{1,12}", scheme) else "like this"
        raise ValueError(f"a proxy address that begins {shown} is not supported; write http://, socks5://, "
                         "socks5h:// (or env)")
    try:
        parts = urllib.parse.urlsplit(text)
        host, port = parts.hostname, parts.port or PROXY_PORTS[scheme]
    except ValueError:
        host, port = None, 0
    odd = re.search(r"[\s\x00-\x1f\x7f]", text)
    if not host or odd or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(f"the proxy's address can't be read; write {scheme}://HOST:PORT or "
                         f"{scheme}://USER:PASSWORD@HOST:PORT, with %40 for @, %2F for /, %3A for :, %23 for #")
    user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
    return Proxy(scheme, host, port, user, password)


def proxy_problems(settings: Settings, providers: Iterable[Provider]) -> List[str]:
    """What is wrong with the proxies that are set, a sentence each: told at the start, not at the first request."""
    problems = []
    named = [("upstream_proxy", settings.upstream_proxy)] if settings.upstream_proxy_enabled else []
    for where, proxy in named + [(f"provider {p.name}: proxy", p.proxy) for p in providers]:
        try:
            if proxy not in ("", "env"):
                parse_proxy(proxy)
        except ValueError as exc:
            problems.append(f"{where}: {exc}")
    return problems


def proxy_for(provider: Provider, settings: Settings, endpoint: Endpoint) -> str:
    """The address of the proxy that leads to `endpoint`, "" for none; this machine is never reached through one."""
    proxy = provider.proxy or (settings.upstream_proxy if settings.upstream_proxy_enabled else "")
    if not proxy or is_loopback(endpoint.host):
        return ""
    return _environment_proxy(endpoint) if proxy == "env" else proxy


def _environment_proxy(endpoint: Endpoint) -> str:
    """HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY in either case; else what Windows or macOS is set to."""
    from urllib.request import getproxies, proxy_bypass      # takes 2 MB: only for who asks for it
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    if proxy_bypass(f"{host}:{endpoint.port}"):
        return ""
    proxies = getproxies()
    return proxies.get(endpoint.scheme) or proxies.get("all") or ""


#: What a proxy means by refusing CONNECT; any other status is shown as it is.
_CONNECT_HINT = {
    400: "is it an HTTP proxy?", 404: "is it an HTTP proxy?", 405: "is it an HTTP proxy?", 501: "is it an HTTP proxy?",
    403: "it does not allow this host or port", 502: "it can't reach the upstream", 503: "it can't reach the upstream",
    504: "it can't reach the upstream"}

#: SOCKS5 reply codes (RFC 1928, 6).
_SOCKS_REPLY = {
    1: "it failed for no stated reason", 2: "it does not allow this address", 3: "it can't reach that network",
    4: "it can't reach the upstream", 5: "the upstream refused the connection", 6: "the upstream is too far away",
    7: "it can't connect", 8: "it does not take this kind of address"}


class ProxyTalk:
    """What is said to a proxy until the upstream's own bytes begin; all of it ends before `until`.

    CONNECT serves http upstreams as well as https ones, where absolute-form requests would do for the former: the proxy
    sees bytes only, so it can't hold a stream back, its refusals can't be taken for the upstream's answers, and its
    credentials are sent once and never with a request.  The price: a proxy that tunnels to port 443 alone says so.
    """

    def __init__(self, sock: socket.socket, proxy: Proxy, where: str, until: float) -> None:
        self._sock, self._proxy, self._where, self._until = sock, proxy, where, until

    def open(self, endpoint: Endpoint) -> None:
        """Have the proxy connect to `endpoint`; UpstreamUnreachable, OSError."""
        if self._proxy.scheme == "http":
            self._open_http(endpoint)
        else:
            self._open_socks(endpoint)

    def _failed(self, text: str, should_retry: Optional[bool] = None) -> UpstreamUnreachable:
        return UpstreamUnreachable(f"{self._where}: {text}", should_retry=should_retry)

    def _receive(self, limit: int) -> bytes:
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise socket.timeout
        self._sock.settimeout(left_s)
        data = self._sock.recv(limit)
        if not data:
            kind = "an HTTP" if self._proxy.scheme == "http" else "a SOCKS5"
            raise self._failed(f"it closed the connection without an answer; is it {kind} proxy?")
        return data

    def _receive_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self._receive(size - len(data))
        return data

    def _encoded_host(self, host: str) -> bytes:
        try:
            return host.encode("ascii" if host.isascii() else "idna")
        except UnicodeError:
            raise self._failed("the upstream's host name can't be encoded", False) from None

    # HTTP

    def _open_http(self, endpoint: Endpoint) -> None:
        host = self._encoded_host(endpoint.host).decode()
        place = f"{f'[{host}]' if ':' in host else host}:{endpoint.port}"
        head = f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\nUser-Agent: iflow2api/{__version__}\r\n"
        if self._proxy.user or self._proxy.password:
            token = base64.b64encode(f"{self._proxy.user}:{self._proxy.password}".encode()).decode()
            head += f"Proxy-Authorization: Basic {token}\r\n"
        self._sock.sendall(head.encode() + b"\r\n")
        answer = b""
        while b"\r\n\r\n" not in answer and b"\n\n" not in answer:
            answer += self._receive(4096)
            if answer[:5] != b"HTTP/"[:len(answer)] or len(answer) > HEAD_LIMIT_BYTES:
                raise self._failed("what it answers is not HTTP; is it an HTTP proxy?")
        status = re.match(rb"HTTP/1\.\d (\d{3})\b", answer)
        if not status:
            raise self._failed("what it answers is not HTTP/1.1; is it an HTTP proxy?")
        self._check_status(int(status.group(1)), place)
        if not answer.endswith((b"\r\n\r\n", b"\n\n")):        # a web server's page: nobody has asked the upstream yet
            raise self._failed("it answers with a page of its own; is it an HTTP proxy?")

    def _check_status(self, status: int, place: str) -> None:
        if 200 <= status < 300:
            return
        if status == 407:
            raise self._wants_login()
        hint = _CONNECT_HINT.get(status)
        raise self._failed(f"it refused CONNECT {place} (HTTP {status}{f': {hint}' if hint else ''})")

    def _wants_login(self) -> UpstreamUnreachable:
        if self._proxy.user or self._proxy.password:
            return self._failed("it refused the user and password in its address", False)
        address = str(self._proxy).replace("://", "://USER:PASSWORD@")
        return self._failed(f"it wants a user and a password; write {address}", False)

    # SOCKS5 (RFC 1928, 1929)

    def _open_socks(self, endpoint: Endpoint) -> None:
        address = self._socks_address(endpoint)
        has_login = bool(self._proxy.user or self._proxy.password)
        self._sock.sendall(b"\5\2\0\2" if has_login else b"\5\1\0")
        version, method = self._receive_exactly(2)
        if version != 5:
            hint = "it speaks HTTP: write http://" if bytes((version, method)) == b"HT" else "is it a SOCKS5 proxy?"
            raise self._failed(f"what it answers is not SOCKS5; {hint}", False)
        if method == 2 and has_login:
            self._send_login()
        elif method != 0:
            raise self._wants_login()
        self._sock.sendall(b"\5\1\0" + address + struct.pack(">H", endpoint.port))
        version, reply = self._receive_exactly(2)
        if version != 5 or reply:
            raise self._failed(_SOCKS_REPLY.get(reply, f"it failed with code {reply}"))
        kind = self._receive_exactly(2)[1]
        size = {1: 4, 4: 16}.get(kind) or self._receive_exactly(1)[0]
        self._receive_exactly(size + 2)                      # the address it connects from, and its port

    def _send_login(self) -> None:
        user, password = self._proxy.user.encode(), self._proxy.password.encode()
        if len(user) > 255 or len(password) > 255:
            raise self._failed("SOCKS5 takes a user and a password of 255 bytes at most", False)
        self._sock.sendall(b"\1" + bytes([len(user)]) + user + bytes([len(password)]) + password)
        if self._receive_exactly(2)[1]:
            raise self._wants_login()

    def _socks_address(self, endpoint: Endpoint) -> bytes:
        """Kind and address of the upstream: a name is looked up here for socks5, there for socks5h."""
        host = endpoint.host
        if self._proxy.scheme == "socks5":
            try:
                found = socket.getaddrinfo(host, endpoint.port, type=socket.SOCK_STREAM)
            except OSError:
                raise self._failed(f"{host} can't be looked up here; with socks5h:// the proxy does it") from None
            host = min(found, key=lambda each: each[0] != socket.AF_INET)[4][0]      # many a proxy has no IPv6
        for family, kind in ((socket.AF_INET, b"\1"), (socket.AF_INET6, b"\4")):
            with contextlib.suppress(OSError):
                return kind + socket.inet_pton(family, host.partition("%")[0])
        name = self._encoded_host(host)
        if len(name) > 255:
            raise self._failed("the upstream's host name is too long", False)
        return b"\3" + bytes([len(name)]) + name


class Upstream:
    """All HTTP that goes out: connections are kept, TLS is set up once, errors are UpstreamErrors."""

    def __init__(self) -> None:
        self._pool, self._lookout = Pool(), Lookout()
        self._pumps: List[Pump] = []
        self._tls: Tuple[str, Optional[ssl.SSLContext]] = ("", None)
        self._lock = threading.Lock()
        self.identity = IFlowIdentity()
        self.own_ports: Set[int] = set()     #: ports this process listens on: never an upstream

    def open(self, provider: Provider, settings: Settings, method: str, path: str, headers: Iterable[Tuple[str, str]],
             body: Optional[bytes], caller: Caller = NOBODY, timeout_s: Optional[float] = None,
             content_type: str = "application/json") -> Exchange:
        """Send one request, return its answer once the head is there.

        Raises UpstreamError (unreachable, TLS, silent, no HTTP) and ClientGone.  A kept connection that turns out
        to be closed before a byte was received is replaced by a new one, once.
        """
        endpoint = Endpoint.of(provider.base_url)
        request = self._head(endpoint, method, path, headers, body, content_type) + (body or b"")
        first_s = timeout_s or provider.timeout_s or settings.first_byte_timeout_s
        idle_s = timeout_s or provider.timeout_s or settings.idle_timeout_s
        proxy = proxy_for(provider, settings, endpoint)
        key = (endpoint.scheme, endpoint.host, endpoint.port, proxy)
        where = f"{provider.name} ({endpoint.authority})"
        wire = self._pool.take(key)
        while True:
            kept = wire is not None
            if wire is None:
                wire = self._connect(endpoint, settings, where, proxy)
            try:
                return self._exchange(key, wire, request, method, caller, first_s, idle_s)
            except (OSError, ValueError) as exc:
                self._part(wire)
                wire.hang_up()
                if not kept or wire.received:
                    if isinstance(exc, ConnectionError):
                        raise UpstreamUnreachable(f"{where} closed the connection without an answer") from None
                    raise _transport_error(exc, where) from exc
                wire = None
            except BaseException:
                self._part(wire)
                wire.hang_up()
                raise

    def _exchange(self, key: Tuple, wire: Wire, request: bytes, method: str, caller: Caller, first_s: float,
                  idle_s: float) -> Exchange:
        wire.attach(caller, first_s)
        if caller.sock is not None:
            self._lookout.watch(wire, caller.sock)
        try:
            wire.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            if not wire.is_stale():      # it may have answered (413, 401) without reading the body
                raise
        answer = self._read_head(wire, method)
        while answer.status < 200:       # 103 Early Hints and the like come before the answer
            answer = self._read_head(wire, method)

        def release(wire: Wire, reusable: bool) -> None:
            self._part(wire)
            if reusable:
                self._pool.give(key, wire)
            else:
                wire.hang_up()

        return Exchange(release, wire, answer, idle_s)

    @staticmethod
    def _read_head(wire: Wire, method: str) -> AnswerHead:
        head = wire.read_head()
        if head is None:
            raise ValueError("its head is too large")
        if not head:
            if not b"HTTP/".startswith(wire.take()[:5]):
                raise ValueError("no status line")
            raise ConnectionResetError("closed before the end of the head")
        return parse_answer_head(head, method)

    def _part(self, wire: Wire) -> None:
        if wire.caller.sock is not None:
            self._lookout.forget(wire.caller.sock)
        wire.caller = NOBODY

    @staticmethod
    def _head(endpoint: Endpoint, method: str, path: str, headers: Iterable[Tuple[str, str]], body: Optional[bytes],
              content_type: str) -> bytes:
        lines = [f"{method} {endpoint.path}{path} HTTP/1.1", f"Host: {endpoint.authority}", "Accept-Encoding: identity"]
        if body is not None:
            lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def _connect(self, endpoint: Endpoint, settings: Settings, where: str, address: str) -> Wire:
        """A connection to `endpoint`, through the proxy at `address` unless that is empty."""
        sock, proxy = None, self._read_proxy(address, where)
        place, until = proxy or endpoint, time.monotonic() + settings.connect_timeout_s
        if proxy is not None:
            where = f"{where} through the proxy {proxy}"
        try:
            sock = socket.create_connection((place.host, place.port), settings.connect_timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._refuse_ourselves(sock, place.port, where, settings if proxy else None)
            if proxy is not None:
                ProxyTalk(sock, proxy, where, until).open(endpoint)
                sock.settimeout(settings.connect_timeout_s)
            if endpoint.scheme == "https":
                sock = self._context(settings.ca_file).wrap_socket(sock, server_hostname=endpoint.host)
            return Wire(sock)
        except Exception as exc:
            if sock is not None:
                sock.close()
            if isinstance(exc, UpstreamError):
                raise
            raise _transport_error(exc, where) from exc

    @staticmethod
    def _read_proxy(address: str, where: str) -> Optional[Proxy]:
        try:
            return parse_proxy(address) if address else None
        except ValueError as exc:
            raise UpstreamUnreachable(f"{where}: {exc}", should_retry=False) from None

    def _refuse_ourselves(self, sock: socket.socket, port: int, where: str, proxied: Optional[Settings]) -> None:
        """A request must not come back to us.  As a proxy our configured port is refused too: commands run apart."""
        ours = port in self.own_ports or proxied is not None and port == proxied.port
        if ours and sock.getpeername()[0] == sock.getsockname()[0]:
            what = "base_url to the real upstream"
            if proxied is not None:
                what = "upstream_proxy, or the provider's proxy, to a real one"
            raise UpstreamUnreachable(f"{where} is this program's own address; set {what}", should_retry=False)

    def _context(self, ca_file: str) -> ssl.SSLContext:
        """The one TLS context: making one takes 2 MB and 20 ms."""
        with self._lock:
            if self._tls[1] is None or self._tls[0] != ca_file:
                context = ssl.create_default_context()
                if ca_file:
                    try:
                        context.load_verify_locations(os.path.expanduser(ca_file))
                    except (OSError, ssl.SSLError) as exc:
                        raise UpstreamUnreachable(f"ca_file {ca_file}: {getattr(exc, 'strerror', None) or exc}") from None
                self._tls = (ca_file, context)
            return self._tls[1]

    def move(self, exchange: Exchange, caller: Caller, move: Callable[[bytes], bool],
             is_over: Callable[[], bool] = lambda: False) -> None:
        """Give `move` each payload as it comes, until it says False or the answer has ended; raises what they raise.

        Some upstreams do not close: where `is_over` says in silence that nothing of worth is missing, that is the end.
        What is there already is moved at once; then another thread does it, and nothing that is sent to `caller` waits.
        """
        flow = Flow(exchange, caller, move, is_over)
        while not flow.idle:
            if not flow.step():
                return
        caller.pumped = True
        try:
            self._pump().run(flow)
        finally:
            caller.pumped = False
        if flow.error is not None:
            raise flow.error

    def _pump(self) -> Pump:
        with self._lock:
            for pump in self._pumps:
                if pump.admit():
                    return pump
            pump = Pump()
            pump.admit()
            self._pumps.append(pump)
            return pump

    def close(self) -> None:
        self._lookout.close()
        self._pool.clear(final=True)
        with self._lock:
            for pump in self._pumps:
                pump.close()
            self._pumps = []


# === 11. Credentials =========================================================
#
# iFlow's login; what is known of it and of its host's ways to fail: iflow.md.

#: The name of the login in the iFlow CLI's own file.
DEFAULT_ACCOUNT = "default"

#: The CLI's port and path: the login host may know no other.  Taken: a free port.
OAUTH_PORT = 11451
OAUTH_PATH = "/oauth2callback"

#: Longest silence and longest answer of the login host; longest wait for who else is refreshing (two requests of his).
OAUTH_SILENCE_S, OAUTH_ANSWER_S, OAUTH_LOCK_S = 20, 30, 120

#: How long a login may take in the browser.
LOGIN_TIMEOUT_S = 300

ACCESS, REFRESH = "oauth_access_token", "oauth_refresh_token"

#: Ours in a login: the tokens are new, but the API key that belongs to them could not be asked for yet.
KEY_DUE = "iflow2api_key_due"

#: What a logout takes away; the rest of the file is the CLI's.
LOGIN_FIELDS = (*LOGIN_SECRETS, "oauth_expires_at", "api_key_expires_at", KEY_DUE)


def parse_time(value: Any) -> Optional[float]:
    """Epoch seconds of an ISO 8601 text (without a zone: local time, as in JavaScript) or of a number."""
    import datetime
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value / 1000 if value > 1e11 else float(value)
    try:
        return datetime.datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", value.strip())).timestamp()
    except (AttributeError, TypeError, ValueError, OverflowError, OSError):
        return None


def format_time(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


class OAuth:
    """The talk with iFlow's login host.  Whatever it answers, what comes out is usable, or a LoginFailed."""

    def __init__(self, upstream: Upstream, settings: Callable[[], Settings],
                 clock: Callable[[], float] = time.time) -> None:
        self._upstream, self._settings, self._clock = upstream, settings, clock

    def address(self, redirect_uri: str, state: str) -> str:
        """Where the browser logs in."""
        settings = self._settings()
        query = urllib.parse.urlencode({"loginMethod": "phone", "type": "phone", "client_id": settings.oauth_client_id,
                                        "redirect": redirect_uri, "state": state})
        return f"{settings.iflow_auth_url}{'&' if '?' in settings.iflow_auth_url else '?'}{query}"

    def exchange(self, code: str, redirect_uri: str) -> Json:
        """Tokens for the code that the browser came back with."""
        return self._tokens({"grant_type": "authorization_code", "code": code, "redirect_uri": redirect_uri})

    def refresh(self, refresh_token: str) -> Json:
        """New tokens for a refresh token, which is used up by this."""
        return {REFRESH: refresh_token, **self._tokens({"grant_type": "refresh_token", "refresh_token": refresh_token})}

    def user_info(self, access_token: str) -> Json:
        """Whose login it is, and the `apiKey` of the model API, which is never the access token."""
        url = self._settings().iflow_userinfo_url
        query = urllib.parse.urlencode({"accessToken": access_token})
        status, answer = self._ask("GET", f"{url}{'&' if '?' in url else '?'}{query}", None, [])
        data = answer.get("data")
        key = data.get("apiKey") if isinstance(data, dict) else None
        if status != 200 or answer.get("success") is False:
            raise self._refusal("the API key", status, answer, access_token)
        if not isinstance(key, str) or not account_keys({"": {"apiKey": key.strip()}}):
            raise LoginFailed("iFlow knows the login, but has no API key for it: see at https://iflow.cn whether the "
                              "account has one, then run: python iflow2api.py login", refused=True)
        return {**data, "apiKey": key.strip()}

    def _tokens(self, form: Dict[str, str]) -> Json:
        settings = self._settings()
        pair = {"client_id": settings.oauth_client_id, "client_secret": settings.oauth_client_secret}
        basic = base64.b64encode(":".join(pair.values()).encode()).decode()
        status, answer = self._ask("POST", settings.iflow_token_url, urllib.parse.urlencode({**form, **pair}).encode(),
                                   [("Authorization", "Basic " + basic)])
        access = answer.get("access_token")
        if status != 200 or answer.get("success") is False or not isinstance(access, str) or not access:
            raise self._refusal("tokens", status, answer, form.get("code") or form["refresh_token"])
        tokens: Json = {ACCESS: access}
        if isinstance(answer.get("refresh_token"), str) and answer["refresh_token"]:
            tokens[REFRESH] = answer["refresh_token"]
        try:
            lasts_s = float(answer.get("expires_in"))
        except (TypeError, ValueError):
            lasts_s = 0.0
        tokens["oauth_expires_at"] = format_time(self._clock() + lasts_s) if 0 < lasts_s < 1e9 else None
        return tokens

    def _ask(self, method: str, url: str, body: Optional[bytes], headers: List[Tuple[str, str]]) -> Tuple[int, Json]:
        """Status and JSON object of an answer; the address is not named in errors, since it may hold a token."""
        base, _, query = url.partition("?")
        if not re.match(r"https?://[^/\s]", base):
            raise LoginFailed(f"{one_line(base, 80)!r} is no address: see iflow_token_url and iflow_userinfo_url")
        host = Provider("iFlow's login host", base)
        until = time.monotonic() + OAUTH_ANSWER_S
        headers = [("User-Agent", f"iflow2api/{__version__}"), ("Accept", "application/json"), *headers]
        parts: List[bytes] = []
        try:
            with self._upstream.open(host, self._settings(), method, query and "?" + query, headers, body, NOBODY,
                                     OAUTH_SILENCE_S, "application/x-www-form-urlencoded") as exchange:
                while not parts or parts[-1]:
                    parts.append(exchange.read())
                    if time.monotonic() > until or len(parts) > 10_000:
                        raise UpstreamTimeout(f"iFlow's login host did not finish its answer within {OAUTH_ANSWER_S} s")
        except UpstreamError as exc:
            raise LoginFailed(f"{one_line(exc.message)}; what is stored stays as it is") from None
        except ValueError:
            raise LoginFailed(f"{one_line(base, 80)!r} has no valid port") from None
        try:
            answer = json.loads(b"".join(parts).decode("utf-8-sig"))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            is_page = "html" in exchange.content_type or parts[0].lstrip()[:1] == b"<"
            what = "an HTML page" if is_page else "something else"
            raise LoginFailed(f"iFlow's login host answered {exchange.status} with {what} instead of JSON; "
                              "what is stored stays as it is")
        return exchange.status, answer

    @staticmethod
    def _refusal(wanted: str, status: int, answer: Json, secret: str) -> LoginFailed:
        """What an answer without what was wanted means: overloaded, dead, or refused for now."""
        texts = [answer.get(name) for name in ("error_description", "message", "msg", "error")]
        text = next((text for text in texts if isinstance(text, str) and text), "no reason")
        said = one_line(text.replace(secret, "…"), 200)
        if answer.get("error") == "invalid_grant":
            return LoginFailed(f"iFlow refused the login as used up or too old ({said}); "
                               "run: python iflow2api.py login", refused=True, dead=True)
        if status == 200 and answer.get("success") is False or status in (408, 429) or status >= 500:
            return LoginFailed(f"iFlow's login host is overloaded or out of order ({status}: {said}); "
                               "what is stored stays as it is")
        return LoginFailed(f"iFlow's login host gave no {wanted} ({status}: {said})", refused=400 <= status < 500)


class LoginFile:
    """Where one account's login lies: in the iFlow CLI's own file, or in `accounts` of config.json.

    Both speak the CLI's field names.  Everything else in the file survives.  Errors are LoginFailed.
    """

    def __init__(self, account: str, config: Optional[ConfigFile]) -> None:
        self.account, self._config = account or DEFAULT_ACCOUNT, config
        self.path = os.path.expanduser(IFLOW_FILE)
        self._lock_path = os.path.join(os.path.dirname(self.path), IFLOW_LOCK)
        if self.account != DEFAULT_ACCOUNT:
            if config is None:
                raise LoginFailed("accounts are kept in config.json, and there is none")
            self.path, self._lock_path = config.path, os.path.join(config.folder, "login.lock")

    @property
    def is_default(self) -> bool:
        return self.account == DEFAULT_ACCOUNT

    def read(self) -> Json:
        """The login, {} where there is none."""
        try:
            if self.is_default:
                return read_json_file(self.path)
            accounts = self._config.read().get("accounts") if self._config else None
        except ConfigBroken as exc:
            raise LoginFailed(f"{exc}; repair the file or move it away, nothing was written to it") from None
        login = accounts.get(self.account) if isinstance(accounts, dict) else None
        return login if isinstance(login, dict) else {}

    def update(self, changes: Json) -> None:
        """Change fields of the login; None takes one away."""
        def merge(login: Json) -> Json:
            return {name: value for name, value in {**login, **changes}.items() if value is not None}

        def edit(raw: Json) -> None:
            accounts = raw.get("accounts") if isinstance(raw.get("accounts"), dict) else {}
            known = accounts.get(self.account)
            login = merge(known if isinstance(known, dict) else {})
            raw["accounts"] = {**{name: value for name, value in accounts.items() if name != self.account},
                               **({self.account: login} if login else {})}

        try:
            if self.is_default:
                write_file(self.path, ConfigFile.to_bytes(merge(self.read())))
            elif self._config is not None:
                self._config.change(edit)
        except OSError as exc:
            raise LoginFailed(f"{self.path} can't be written: {exc.strerror or exc}") from None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For the time of the `with` nobody else refreshes this login, and the file can be written.

        Asked before the host is: tokens that can't be stored would be lost, and the old ones are used up by then.
        """
        if self.path.startswith("~"):
            raise LoginFailed("there is no home folder to keep the login in: set HOME")
        lock = FileLock(self._lock_path, OAUTH_LOCK_S)
        try:
            lock.__enter__()
        except OSError as exc:
            raise LoginFailed(f"{os.path.dirname(self.path)} can't be written: {exc.strerror or exc}") from None
        try:
            if os.path.isdir(self.path):
                raise LoginFailed(f"{self.path} is a folder; move it away")
            if os.path.exists(self.path) and not os.access(self.path, os.W_OK):
                raise LoginFailed(f"{self.path} is read-only, so the login can't be kept")
            yield
        finally:
            lock.__exit__()


def login_end(login: Json) -> Optional[float]:
    """When the login has to be refreshed at the latest, epoch seconds; None: unknown."""
    ends = [parse_time(login.get(name)) for name in ("oauth_expires_at", "api_key_expires_at")]
    return min((end for end in ends if end is not None), default=None)


# --- refreshing ----------------------------------------------------------------

@dataclass
class Refreshed:
    """How the refreshing of one account goes; `unsaved` are tokens, got for `unsaved_for`, that await being written."""
    at: Optional[float] = None
    ok: Optional[bool] = None
    message: str = ""
    refused: bool = False
    dead_token: str = ""
    failures: int = 0
    next_at: float = 0.0                  #: monotonic; not before this
    unsaved: Json = field(default_factory=dict)
    unsaved_for: str = ""


class Refresher:
    """Keeps logins fresh: looks now and then, and at once when the API has refused a key.

    A refresh token works only once, so one refreshes at a time, among threads and processes (LoginFile.held), and reads
    the file again before.  New tokens are written before anything else is asked.  Clocks only decide when to ask: no
    login is given up because of one, since a router's is wrong until NTP has set it.
    """
    LOOK_S, AHEAD_S = 15 * 60.0, 24 * 3600.0
    BACKOFF_S = (30.0, 60.0, 120.0, 240.0, 300.0)        #: the host is overloaded; then at every look
    RENEWED_S = 60.0                     #: a key refused again so soon is not an old one

    def __init__(self, oauth: OAuth, files: Callable[[], List[LoginFile]], changed: Callable[[], None],
                 clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        """`files` are the logins to look after, `changed` is called when one of them was written."""
        self._oauth, self._files, self._changed = oauth, files, changed
        self._clock, self._monotonic = clock, monotonic
        self._states: Dict[str, Refreshed] = {}
        self._wake, self._closing = threading.Event(), False
        self._thread: Optional[threading.Thread] = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="login-refresh", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Look now: a login has changed."""
        self._wake.set()

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(5)

    def _run(self) -> None:
        while not self._closing:
            wait_s = self.LOOK_S
            try:
                wait_s = self.look()
            except Exception:            # a thread body: logins must be kept whatever happens
                log.exception("looking after the iFlow login failed")
            self._wake.wait(wait_s)
            self._wake.clear()

    def state(self, account: str) -> Refreshed:
        return self._states.setdefault(account, Refreshed())

    def look(self) -> float:
        """Refresh what is due; the seconds until the next look."""
        wait_s = self.LOOK_S
        for file in self._files():
            try:
                login = file.read()
            except LoginFailed:          # the gateway names a broken file
                continue
            state = self.state(file.account)
            if state.dead_token and login.get(REFRESH) != state.dead_token:      # somebody logged in again
                state = self._states[file.account] = Refreshed()
            due = self._is_due(login, state)
            if due and not self._closing:
                self._refresh(file, None)
            if state.failures:
                wait_s = min(wait_s, max(1.0, state.next_at - self._monotonic()))
        return wait_s

    def _is_due(self, login: Json, state: Refreshed) -> bool:
        token, end = login.get(REFRESH), login_end(login)
        if not isinstance(token, str) or not token or token == state.dead_token or self._monotonic() < state.next_at:
            return False
        ends_soon = end is not None and end - self._clock() < self.AHEAD_S
        return login.get(KEY_DUE) is True or bool(state.unsaved) or ends_soon

    def renew(self, account: str, key: str, caller: Caller) -> str:
        """The key to use instead of `key`, which the API refused; "" where a refresh brings none.

        On a thread of its own: a client that leaves, for which `caller` is watched, must not cut a refresh in half.
        """
        found: List[str] = []
        done = threading.Event()

        def _run() -> None:
            try:
                found.append(self._renew(account, key))
            finally:
                done.set()

        threading.Thread(target=_run, name="login-renew", daemon=True).start()
        while not done.wait(min(caller.tick_s, 0.5)):
            if caller.sock is not None and has_left(caller.sock):
                raise ClientGone
            caller.tick()
        return "".join(found)

    def _renew(self, account: str, key: str) -> str:
        for file in self._files():
            if file.account == account:
                return self._refresh(file, key)
        return ""

    def _refresh(self, file: LoginFile, stale: Optional[str]) -> str:
        """Refresh one login, unless somebody else just did; its key, "" if that failed.  `stale`: a refused key."""
        state, token = self.state(file.account), ""
        try:
            before = file.read()
            token = before.get(REFRESH) or ""
            if stale is not None and not self._may_renew(before, state):
                return self._key_of(before) if state.ok or self._key_of(before) != stale else ""
            with file.held():
                token = self._save_left_over(file, state) or token
                login = file.read()
                others = login.get(REFRESH) != token or stale not in (None, self._key_of(login))
                if not others and (stale is not None or self._is_due(login, state)):
                    login = self._ask(file, login, state, stale is not None)
                    self._note(state, file, None, token)
        except LoginFailed as exc:
            self._note(state, file, exc, token)
            return ""
        self._changed()
        return self._key_of(login)

    def _may_renew(self, login: Json, state: Refreshed) -> bool:
        """Whether a refused key is a reason to ask the host: the token lives, and it was not asked just now."""
        token = login.get(REFRESH)
        return isinstance(token, str) and token not in ("", state.dead_token) and self._monotonic() >= state.next_at

    @staticmethod
    def _key_of(login: Json) -> str:
        key = login.get("apiKey")
        return key.strip() if isinstance(key, str) else ""

    @staticmethod
    def _save_left_over(file: LoginFile, state: Refreshed) -> str:
        """Write tokens that an earlier refresh could not write, unless others lie there; the refresh token of them."""
        token = ""
        if state.unsaved and file.read().get(REFRESH) == state.unsaved_for:
            file.update(state.unsaved)
            token = state.unsaved[REFRESH]
        state.unsaved = {}
        return token

    def _ask(self, file: LoginFile, login: Json, state: Refreshed, refused_key: bool) -> Json:
        """The login with new tokens and the key that belongs to them, both written."""
        if refused_key or login.get(KEY_DUE) is not True or state.refused:
            tokens = {**self._oauth.refresh(login[REFRESH]), KEY_DUE: True}
            state.unsaved, state.unsaved_for = tokens, login[REFRESH]
            file.update(tokens)          # at once: the old ones are used up
            state.unsaved = {}
            login = {**login, **tokens}
        info = self._oauth.user_info(str(login.get(ACCESS)))
        news = {"apiKey": info["apiKey"], "api_key_expires_at": None, KEY_DUE: None}
        file.update(news)
        return {**login, **news}

    def _note(self, state: Refreshed, file: LoginFile, failure: Optional[LoginFailed], token: str) -> None:
        """Remember how it went, say so in one line, and say when to try again."""
        state.at, state.ok = self._clock(), failure is None
        state.message = one_line(failure.message) if failure else ""
        state.refused = bool(failure and failure.refused)
        state.failures = state.failures + 1 if failure else 0
        if failure is None:
            state.next_at = self._monotonic() + self.RENEWED_S
            log.info("iFlow login %s refreshed", file.account)
        elif failure.dead:
            state.dead_token, state.failures, state.next_at = token, 0, 0.0
            log.warning("the iFlow login %s has ended: %s", file.account, state.message)
        else:
            tries = len(self.BACKOFF_S)
            delay_s = self.BACKOFF_S[state.failures - 1] if state.failures <= tries else self.LOOK_S
            state.next_at = self._monotonic() + delay_s
            log.warning("the iFlow login %s could not be refreshed (next try in %d s): %s", file.account, delay_s,
                        state.message)

    def report(self, logins: Mapping[str, Json]) -> Dict[str, Json]:
        """account -> when its login ends and how the last refresh went; nothing in it is secret."""
        found = {}
        for account, login in logins.items():
            state, end, token = self.state(account), login_end(login), login.get(REFRESH)
            ended = bool(token) and token == state.dead_token
            if token or login.get("apiKey"):
                found[account] = {
                    "renewable": bool(token) and not ended, "ended": ended,
                    "expires_at": format_time(end) if end is not None else None,
                    "refreshed_at": format_time(state.at) if state.at is not None else None, "refresh_ok": state.ok,
                    **({"message": state.message} if state.message else {})}
        return found


# --- logging in ----------------------------------------------------------------

LOGIN_PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>iflow2api</title><style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:36rem;
margin:4rem auto;padding:0 1rem}</style><h1>TITLE</h1><p>TEXT</p>"""

LOGIN_TITLES = {True: "Logged in / 登录成功", False: "Not logged in / 登录未成功"}


class _CallbackHandler(http.server.BaseHTTPRequestHandler):
    """Takes the browser that comes back from the login, and tells it how that went."""
    server: "_CallbackServer"
    timeout = 10
    server_version, sys_version = "iflow2api", ""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path != OAUTH_PATH:           # a stranger, or the browser's /favicon.ico
            return self.send_error(404)
        ok, text = self.server.flow.visit(query)
        import html
        page = LOGIN_PAGE.replace("TITLE", LOGIN_TITLES[ok]).replace("TEXT", html.escape(text)).encode()
        self.send_response(200 if ok else 400)
        for name, value in (("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(page))),
                            ("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer"), ("Connection", "close"),
                            ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")):
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(page)
        finally:
            self.server.flow.settle()    # only now: the process may end with it

    def log_message(self, format: str, *args: Any) -> None:
        """Not logged: the request line holds the code."""


class _CallbackServer(http.server.ThreadingHTTPServer):
    """One of the two listeners, 127.0.0.1 and ::1: `localhost` may mean either to a browser."""
    daemon_threads, block_on_close = True, False
    allow_reuse_address = os.name == "posix"

    def __init__(self, family: int, address: Tuple[str, int], flow: "LoginFlow") -> None:
        self.address_family, self.flow = family, flow
        super().__init__(address, _CallbackHandler)
        threading.Thread(target=self.serve_forever, args=(0.1,), name="login-callback", daemon=True).start()

    def server_bind(self) -> None:
        """Without HTTPServer's reverse DNS lookup, and for nobody else."""
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection to the login's port failed")

    def close(self) -> None:
        self.shutdown()
        self.server_close()


def listen_for_login(flow: "LoginFlow", port: int) -> List[_CallbackServer]:
    """Listeners on one port of 127.0.0.1 and ::1, `port` if both are free; LoginFailed."""
    for wanted in (port, *[0] * 8):
        servers: List[_CallbackServer] = []
        try:
            servers.append(_CallbackServer(socket.AF_INET, ("127.0.0.1", wanted), flow))
            servers.append(_CallbackServer(socket.AF_INET6, ("::1", servers[0].server_port), flow))
            return servers
        except OSError as exc:
            if servers and exc.errno not in (errno.EADDRINUSE, errno.EACCES, getattr(errno, "WSAEADDRINUSE", -1)):
                return servers           # no IPv6 here
            for server in servers:
                server.close()
    raise LoginFailed("no port of this machine can be listened on; log in with: python iflow2api.py login --paste")


class LoginFlow:
    """One login, from the address to open to its end.  The listeners are gone with the end, whatever it is.

    `state`: waiting, done or failed; `message` says how it went; `ended` is set at the end.
    """

    def __init__(self, oauth: OAuth, file: LoginFile, changed: Callable[[], None], listen: bool = True,
                 timeout_s: float = LOGIN_TIMEOUT_S, port: Optional[int] = None) -> None:
        """LoginFailed where the result could not be kept anyway."""
        port = OAUTH_PORT if port is None else port
        with file.held():
            file.read()
        self.file, self._oauth, self._changed = file, oauth, changed
        self.state, self.message, self.ended = "waiting", "", threading.Event()
        self._secret, self._lock = secrets.token_urlsafe(32), threading.Lock()
        self._servers = listen_for_login(self, port) if listen else []
        port = self._servers[0].server_port if listen else port
        self._redirect_uri = f"http://localhost:{port}{OAUTH_PATH}"
        self.url = oauth.address(self._redirect_uri, self._secret)
        late = f"nobody logged in within {timeout_s:g} s; nothing was changed"
        self._timer = threading.Timer(min(timeout_s, threading.TIMEOUT_MAX), self.fail, (late,))
        self._timer.daemon = True
        self._timer.start()

    def visit(self, query: str) -> Tuple[bool, str]:
        """The browser came back: whether it worked, and what to tell it.  Who lacks the state changes nothing."""
        try:
            code = self._code(urllib.parse.parse_qs(query), True)
        except LoginFailed as exc:
            if exc.refused and self.state == "waiting":
                self.state, self.message = "failed", exc.message
            return False, exc.message
        with contextlib.suppress(LoginFailed):
            self._finish(code, True)
        return self.state == "done", self.message

    def paste(self, text: str) -> None:
        """The user gives the address the browser ended on, or the code in it.  LoginFailed says what was wrong."""
        text = text.strip()
        if re.fullmatch(r"[\w.~+/=-]{6,512}", text):
            code = text
        else:
            query = (text.partition("?")[2] or text).partition("#")[0]
            code = self._code(urllib.parse.parse_qs(query), False)
        try:
            self._finish(code, False)
        finally:
            self.settle()

    def _code(self, query: Mapping[str, List[str]], by_browser: bool) -> str:
        """The code of a callback; LoginFailed, `refused` where the login host says no."""
        facts = {name: values[-1] for name, values in query.items()}
        if not {"code", "error"} & set(facts):
            raise LoginFailed("this request is no answer to a login" if by_browser else
                              "that is neither the address the browser ended on nor the code in it; "
                              f"it looks like {self._redirect_uri}?code=…&state=…")
        if not hmac.compare_digest(facts.get("state", "").encode("utf-8", "replace"), self._secret.encode()):
            raise LoginFailed("this answer belongs to another login (its state is wrong): open the address of this one")
        if "code" not in facts:
            said = one_line(facts.get("error_description") or facts["error"], 200)
            raise LoginFailed(f"iFlow did not log you in: {said}; nothing was changed", refused=True)
        return facts["code"]

    def _finish(self, code: str, final: bool) -> None:
        """Exchange, user info, file; a second caller waits and gets the first one's result.  LoginFailed."""
        with self._lock:
            if self.state != "waiting":
                return
            try:
                tokens = self._oauth.exchange(code, self._redirect_uri)
                info = self._oauth.user_info(tokens[ACCESS])
                with self.file.held():
                    self.file.update(self._login(tokens, info, self.file.read()))
            except LoginFailed as exc:
                if final or not exc.refused:
                    self.state, self.message = "failed", exc.message
                raise
            who = next((str(info[name]) for name in ("username", "email", "phone") if info.get(name)), "")
            self.state = "done"
            name = " as " + one_line(who, 80) if who else ""
            self.message = f"logged in to iFlow{name}; you can close this page / 可以关闭此页面"
        self._changed()

    @staticmethod
    def _login(tokens: Json, info: Json, before: Json) -> Json:
        """What a login writes.  One that was set to another service must not take iFlow's key there."""
        changes: Json = {**tokens, REFRESH: tokens.get(REFRESH), "apiKey": info["apiKey"], "api_key_expires_at": None,
                         KEY_DUE: None, "selectedAuthType": "oauth-iflow"}
        if before.get("selectedAuthType") == "openai-compatible":
            changes.update(baseUrl=None, modelName=None)
        return changes

    def fail(self, message: str) -> None:
        if self.state == "waiting":
            self.state, self.message = "failed", message
        self.settle()

    def settle(self) -> None:
        """If it is over: close what is open and tell who waits."""
        if self.state != "waiting":
            self._timer.cancel()
            with self._lock:
                servers, self._servers = self._servers, []
            for server in servers:
                server.close()
            self.ended.set()


class Logins:
    """Logging in, for the command line and the admin page alike; one attempt at a time."""

    def __init__(self, config: Optional[ConfigFile], oauth: OAuth, accounts: Callable[[], Iterable[str]],
                 changed: Callable[[], None]) -> None:
        self._config, self._oauth, self._accounts, self._taken_over = config, oauth, accounts, changed
        self.refresher = Refresher(oauth, self.files, changed)
        self.flow: Optional[LoginFlow] = None

    def files(self) -> List[LoginFile]:
        """The logins there may be."""
        return [LoginFile(name, self._config) for name in (DEFAULT_ACCOUNT, *self._accounts())] if self._config else []

    def start(self, account: str = "", paste: bool = False, timeout_s: float = LOGIN_TIMEOUT_S,
              port: Optional[int] = None) -> Json:
        """Begin a login; an earlier attempt ends.  LoginFailed."""
        if not re.fullmatch(r"[\w.@+-]{0,64}", account):
            raise LoginFailed("an account's name has letters, digits and . @ + - _ only, at most 64")
        if self.flow is not None:
            self.flow.fail("another login was begun")
        self.flow = LoginFlow(self._oauth, LoginFile(account, self._config), self._changed, not paste, timeout_s, port)
        return self.status()

    def _changed(self) -> None:
        self._taken_over()
        self.refresher.wake()

    def callback(self, query: str) -> Json:
        """The browser's way back through somebody else's listener."""
        if self.flow is None:
            raise LoginFailed("no login was begun")
        ok, message = self.flow.visit(query)
        self.flow.settle()
        return {**self.status(), "ok": ok, "message": message}

    def paste(self, text: str) -> Json:
        if self.flow is None:
            raise LoginFailed("no login was begun")
        self.flow.paste(text)
        return self.status()

    def status(self) -> Json:
        """`state` idle, waiting, done or failed; the `url` to open while it waits."""
        flow = self.flow
        if flow is None:
            return {"state": "idle", "message": ""}
        return {"state": flow.state, "message": flow.message, "account": flow.file.account,
                **({"url": flow.url} if flow.state == "waiting" else {})}

    def close(self) -> None:
        if self.flow is not None:
            self.flow.fail("the program ended before the login did; nothing was changed")
        self.refresher.close()


# --- the browser ---------------------------------------------------------------

#: platform -> what opens an address there, tried in turn; `webbrowser` is Python's own module, where it is installed.
BROWSERS: Dict[str, Tuple[Tuple[str, ...], ...]] = {
    "termux": (("termux-open-url",), ("termux-open",), ("xdg-open",)),
    "wsl": (("wslview",), ("rundll32.exe", "url.dll,FileProtocolHandler"), ("xdg-open",)),
    "windows": (("webbrowser",), ("rundll32", "url.dll,FileProtocolHandler")),
    "macos": (("open",), ("webbrowser",)),
    "desktop": (("xdg-open",), ("gio", "open"), ("webbrowser",)),
    "headless": ()}


def browser_platform(environ: Mapping[str, str], system: str = sys.platform) -> str:
    """Which row of BROWSERS is this machine's.  Without a display xdg-open would start a browser in the terminal."""
    if environ.get("TERMUX_VERSION") or "com.termux" in environ.get("PREFIX", ""):
        return "termux"                  # sys.platform is "linux" there, from Python 3.13 on "android"
    if system in ("win32", "cygwin", "darwin"):
        return "macos" if system == "darwin" else "windows"
    if environ.get("WSL_DISTRO_NAME") or environ.get("WSL_INTEROP"):
        return "wsl"
    return "desktop" if any(environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")) else "headless"


def run_opener(command: Sequence[str]) -> bool:
    """Start one of BROWSERS; whether it seems to have worked.  Some openers run as long as the browser does."""
    if command[0] == "webbrowser":
        try:
            import webbrowser            # not on OpenWrt
            return webbrowser.open(command[-1])
        except (ImportError, OSError, ValueError):
            return False
    import subprocess
    quiet = subprocess.DEVNULL
    try:
        process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
        return process.wait(3) == 0
    except subprocess.TimeoutExpired:
        return True
    except OSError:
        return False


def open_browser(url: str, environ: Mapping[str, str], run: Callable[[Sequence[str]], bool] = run_opener,
                 system: str = sys.platform) -> bool:
    """Show `url` in a browser; False where there is none."""
    return any(run((*command, url)) for command in BROWSERS[browser_platform(environ, system)])


# === 12. Services ============================================================

class Slots:
    """Places at one upstream, first come first served; `limit` 0 is no limit."""

    def __init__(self, limit: int) -> None:
        self._limit, self.active = limit, 0
        self._waiting: Deque[threading.Event] = deque()
        self._lock = threading.Lock()

    @property
    def limit(self) -> int:
        return self._limit

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def load(self) -> int:
        return self.active + len(self._waiting)

    def resize(self, limit: int) -> None:
        with self._lock:
            self._limit = limit
            self._hand_over()

    @contextlib.contextmanager
    def hold(self, caller: Caller, settings: Settings, name: str) -> Iterator[None]:
        """A place for the time of the `with`; Busy when the queue is full or the wait too long, ClientGone."""
        turn: Optional[threading.Event] = None
        with self._lock:
            if not self._limit or self.active < self._limit and not self._waiting:
                self.active += 1
            elif len(self._waiting) >= settings.queue_limit:
                raise Busy(f"{name} is busy and {len(self._waiting)} requests wait already",
                           retry_after_s=DEFAULT_RETRY_AFTER_S)
            else:
                turn = threading.Event()
                self._waiting.append(turn)
        try:
            if turn is not None:
                self._wait(turn, caller, settings, name)
            yield
        finally:
            with self._lock:
                if turn is None or turn.is_set():
                    self.active -= 1
                else:
                    self._waiting.remove(turn)
                self._hand_over()

    def _hand_over(self) -> None:
        while self._waiting and (not self._limit or self.active < self._limit):
            self.active += 1
            self._waiting.popleft().set()

    @staticmethod
    def _wait(turn: threading.Event, caller: Caller, settings: Settings, name: str) -> None:
        until = time.monotonic() + settings.queue_timeout_s
        while not turn.wait(min(caller.tick_s, 0.5)):
            if caller.sock is not None and has_left(caller.sock):
                raise ClientGone
            if time.monotonic() >= until:
                raise Busy(f"no place at {name} came free within {settings.queue_timeout_s:g} s",
                           retry_after_s=DEFAULT_RETRY_AFTER_S)
            caller.tick()


def wait_for(caller: Caller, seconds: float) -> None:
    """Let time pass before a retry and keep the client awake; ClientGone as soon as it leaves."""
    until, pause = time.monotonic() + seconds, threading.Event()
    while time.monotonic() < until:
        pause.wait(min(max(0.001, until - time.monotonic()), caller.tick_s, 0.5))
        if caller.sock is not None and has_left(caller.sock):
            raise ClientGone
        caller.tick()


class KeyRing:
    """The keys of one provider, in turn; one that was refused or limited rests while others are left."""

    def __init__(self, keys: Sequence[str], clock: Callable[[], float] = time.monotonic, each: int = 0) -> None:
        """`each`: requests at once for every key; 0: no limit."""
        self.keys = tuple(keys)
        self._clock, self._next = clock, 0
        self._rests_until: Dict[str, float] = {}
        self._refused: Set[str] = set()  #: of those that rest
        self._places = {key: Slots(each) for key in self.keys} if each else {}
        self.each = each
        self._lock = threading.Lock()

    def order(self, conversation: Optional[int] = None) -> List[str]:
        """Keys in the order to try them, [""] where the provider needs none; when all rest, the one nearest its end.

        A `conversation` keeps to its key, as long as that is awake and has a place.
        """
        if not self.keys:
            return [""]
        with self._lock:
            start = (self._next if conversation is None else conversation) % len(self.keys)
            self._next += conversation is None
            now = self._clock()
            turn = self.keys[start:] + self.keys[:start]
            awake = [key for key in turn if self._rests_until.get(key, 0) <= now]
            if self._places:
                awake.sort(key=lambda key: max(0, self._places[key].load - self.each + 1))
            return awake or [min(turn, key=lambda key: self._rests_until[key])]

    def hold(self, key: str, caller: Caller, settings: Settings, name: str) -> Any:
        """A place at the key for the time of a `with`; Busy, ClientGone."""
        places = self._places.get(key)
        return places.hold(caller, settings, f"a key of {name}") if places is not None else _NO_WAIT

    def rest(self, key: str, seconds: float, refused: bool = False) -> None:
        with self._lock:
            self._rests_until[key] = self._clock() + seconds
            (self._refused.add if refused else self._refused.discard)(key)

    def state(self, key: str) -> Tuple[str, float]:
        """`ok`, `resting` or `refused`, and for how many seconds it still rests."""
        rests_s = max(0.0, self._rests_until.get(key, 0.0) - self._clock()) if key in self._rests_until else 0.0
        return ("ok" if not rests_s else "refused" if key in self._refused else "resting"), rests_s

    def revive(self, key: str) -> None:
        if self._rests_until:
            with self._lock:
                self._rests_until.pop(key, None)

    def inherit(self, earlier: "KeyRing") -> "KeyRing":
        """Let keys that rested in an earlier ring rest on: a reload is no pardon."""
        with earlier._lock:
            self._rests_until = {key: until for key, until in earlier._rests_until.items() if key in self.keys}
            self._refused = earlier._refused & set(self.keys)
            self._places = {key: earlier._places.get(key, slots) for key, slots in self._places.items()}
        for slots in self._places.values():
            slots.resize(self.each)
        return self

    @property
    def resting(self) -> int:
        now = self._clock()
        return sum(until > now for until in list(self._rests_until.values()))

    @property
    def active(self) -> int:
        """Requests that hold a key; only where each key has a limit."""
        return sum(slots.active for slots in self._places.values())


_NO_WAIT = contextlib.nullcontext()


class Circuit:
    """Whether an upstream that keeps failing is asked.

    `closed`: it is.  `open`: it rests, others are asked first.  `half-open`: its rest is over, one request is let
    through, and how that ends decides; should it never end, another one may try after a further rest.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self.failures, self._until = 0, 0.0

    def admits(self, rest_s: float) -> bool:
        """Whether the request that asks may go there now."""
        if not self._until:
            return True
        with self._lock:
            now = self._clock()
            if now < self._until:
                return False
            self._until = now + rest_s
            return True

    def succeeded(self) -> None:
        if self.failures or self._until:
            with self._lock:
                self.failures, self._until = 0, 0.0

    def failed(self, limit: int, rest_s: float) -> None:
        """One more failure in a row; at `limit` of them it rests."""
        with self._lock:
            self.failures += 1
            if limit and self.failures >= limit:
                self._until = self._clock() + rest_s

    @property
    def rests_s(self) -> float:
        return max(0.0, self._until - self._clock()) if self._until else 0.0

    @property
    def state(self) -> str:
        return "closed" if not self._until else "open" if self.rests_s else "half-open"


class Window:
    """How much there was in the last `span_s` seconds, exact for small limits, to a twentieth of the span for others."""

    def __init__(self, span_s: float, limit: int) -> None:
        self.span_s, self.limit = span_s, limit
        self._marks: List[float] = []    #: time, amount, time, amount, …: half the memory of a list of pairs
        self._sum = 0

    def used(self, now: float) -> int:
        marks = self._marks
        while marks and marks[0] <= now - self.span_s:
            self._sum -= int(marks[1])
            del marks[:2]
        return self._sum

    def add(self, now: float, amount: int) -> None:
        marks = self._marks
        self._sum += amount
        if marks and now <= marks[-2]:
            marks[-1] += amount
        else:                            # a mark counts from its end, so that never more than the limit passes
            marks += [now + self.span_s / 20 if self.limit > 20 else now, amount]

    def wait_s(self, now: float) -> float:
        """Seconds until there is room for one more, 0.0 where there is."""
        over = self.used(now) - self.limit
        for at in range(0, len(self._marks), 2):
            if over < 0:
                break
            over -= int(self._marks[at + 1])
            if over < 0:
                return self._marks[at] + self.span_s - now
        return 0.0

    def reset_s(self, now: float) -> float:
        """Seconds until all of it is forgotten."""
        return max(0.0, self._marks[-2] + self.span_s - now) if self.used(now) else 0.0


class Meter:
    """What one key or address has used of its limits."""

    def __init__(self, name: str) -> None:
        self.name, self.active = name, 0
        self.concurrency = 0
        self.windows: Dict[str, Window] = {}
        self.limits: Mapping[str, int] = {}

    def adopt(self, limits: Mapping[str, int]) -> None:
        """Measure by `limits` from now on; what was used stays used."""
        self.limits, self.concurrency = limits, limits.get("concurrency", 0)
        windows = {name: self.windows.get(name) or Window(span_s, limits[name])
                   for name, span_s in LIMIT_SPANS.items() if name in limits}
        for name, window in windows.items():
            window.limit = limits[name]
        self.windows = windows

    def check(self, now: float) -> None:
        """RateLimited where no further request fits in; Codex reads the time out of the text."""
        if self.concurrency and self.active >= self.concurrency:
            raise self._refusal("concurrency", self.concurrency, 1.0)
        for name, window in self.windows.items():
            wait_s = window.wait_s(now)
            if wait_s > 0:
                raise self._refusal(name, window.limit, wait_s)

    def _refusal(self, name: str, limit: int, wait_s: float) -> RateLimited:
        return RateLimited(f"rate limit of {self.name}: {limit} {LIMIT_WORDS[name]}; try again in {wait_s:.1f}s",
                           retry_after_s=wait_s)

    def headers(self, now: float) -> List[Tuple[str, str]]:
        """`x-ratelimit-…` as OpenAI's: of several windows for requests the one with least left."""
        found: List[Tuple[str, str]] = []
        requests = [window for name, window in self.windows.items() if name != "tpd"]
        tightest = sorted(requests, key=lambda window: window.limit - window.used(now))[:1]
        for what, windows in (("requests", tightest), ("tokens", [w for n, w in self.windows.items() if n == "tpd"])):
            for window in windows:
                values = (window.limit, max(0, window.limit - window.used(now)), f"{window.reset_s(now):.1f}s")
                found += [(f"x-ratelimit-{word}-{what}", str(v)) for word,
                          v in zip(("limit", "remaining", "reset"), values)]
        return found


class RateLimiter:
    """The meters of keys and addresses; of addresses a bounded number, the one not seen for longest goes first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._keys: Dict[str, Meter] = {}
        self._addresses: Dict[str, Meter] = {}

    def of_key(self, key: ClientKey) -> Meter:
        with self._lock:
            return self._find(self._keys, key.name, f"the key {key.name}", key.limits)

    def of_address(self, address: str, limits: Mapping[str, int]) -> Meter:
        with self._lock:
            found = self._addresses.pop(address, None)
            if found is not None:
                self._addresses[address] = found         # seen last
            meter = self._find(self._addresses, address, "your address", limits)
            if len(self._addresses) > ADDRESSES_LIMIT:
                del self._addresses[next(iter(self._addresses))]
            return meter

    def used(self, key: ClientKey) -> Dict[str, int]:
        """What a key has used of each of its limits."""
        meter = self.of_key(key)
        with self._lock:
            now = self._clock()
            used = {name: window.used(now) for name, window in meter.windows.items()}
        return {**used, **({"concurrency": meter.active} if meter.concurrency else {})}

    @staticmethod
    def _find(meters: Dict[str, Meter], name: str, words: str, limits: Mapping[str, int]) -> Meter:
        meter = meters.get(name)
        if meter is None:
            meter = meters[name] = Meter(words)
        if meter.limits != limits:
            meter.adopt(limits)
        return meter

    def keep_keys(self, names: Iterable[str]) -> None:
        """Forget the meters of keys that are gone."""
        with self._lock:
            self._keys = {name: self._keys[name] for name in names if name in self._keys}

    @contextlib.contextmanager
    def hold(self, meters: Sequence[Meter]) -> Iterator[None]:
        """Count a request on all of them for the time of the `with`, or on none: RateLimited."""
        with self._lock:
            now = self._clock()
            for meter in meters:
                meter.check(now)
            for meter in meters:
                meter.active += 1
                for name, window in meter.windows.items():
                    if name != "tpd":
                        window.add(now, 1)
        try:
            yield
        finally:
            with self._lock:
                for meter in meters:
                    meter.active -= 1

    def spend(self, meters: Sequence[Meter], tokens: int) -> None:
        """Count tokens once they are known: the request that goes over a limit is answered, the next one is not."""
        with self._lock:
            now = self._clock()
            for meter in meters:
                if "tpd" in meter.windows and tokens:
                    meter.windows["tpd"].add(now, tokens)

    def headers(self, meters: Sequence[Meter]) -> List[Tuple[str, str]]:
        """Of the first meter that has any."""
        with self._lock:
            now = self._clock()
            return next((lines for lines in (meter.headers(now) for meter in meters) if lines), [])


Labels = Tuple[Tuple[str, str], ...]


class ReasoningCache:
    """Reasoning by call_digest, for clients that drop it; bounded, the oldest go first."""
    LIMIT, LIMIT_CHARS = 2000, 8 << 20

    def __init__(self) -> None:
        self._texts: Dict[str, str] = {}
        self._size, self._lock = 0, threading.Lock()

    def keep(self, ident: str, text: str) -> None:
        with self._lock:
            self._size += len(text) - len(self._texts.pop(ident, ""))
            self._texts[ident] = text
            while len(self._texts) > self.LIMIT or self._size > self.LIMIT_CHARS:
                self._size -= len(self._texts.pop(next(iter(self._texts))))

    def recall(self, ident: str) -> str:
        return self._texts.get(ident, "")


class TokenScale:
    """What models count for what we estimate: learnt from each answer's prompt_tokens, kept over a restart.

    Of a model it knows two sums in which older answers fade, so that the latest tens of thousands of tokens decide.
    """
    LIMIT = 500                          #: models; the one that was not heard of for longest goes first
    FADE = 0.85                          #: of the sums, at each answer
    BOUNDS = (0.2, 5.0)                  #: beyond these it is not the counting that differs
    SURE, EVERY = 10, 8                  #: after so many answers only each EVERYth is estimated for this alone
    WRITE_S = 5.0

    def __init__(self, path: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock, self._written_at, self._dirty = path, clock, -1e9, False
        self._lock = threading.Lock()
        self._sums: Dict[str, List[float]] = self._load()        #: model -> estimated, counted, answers

    def _load(self) -> Dict[str, List[float]]:
        try:
            raw = read_json_file(self._path) if self._path else {}
        except ConfigBroken:             # it will be learnt again
            return {}
        return {name: [float(number) for number in row] for name, row in raw.items()
                if isinstance(row, list) and len(row) == 3
                and all(isinstance(number, (int, float)) and 0 < number < 1e12 for number in row)}

    def scaled(self, model: str, estimate: int) -> int:
        """`estimate` as the model would count it."""
        row = self._sums.get(model)
        low, high = self.BOUNDS
        return int(estimate * min(max(row[1] / row[0], low), high) + 0.5) if row else estimate

    def is_worth(self, model: str) -> bool:
        """Whether there is something to learn from the next answer."""
        row = self._sums.get(model)
        return row is None or row[2] < self.SURE or row[2] % self.EVERY == 0

    def pass_over(self, model: str) -> None:
        """An answer that nothing was learnt from."""
        with self._lock:
            if model in self._sums:
                self._sums[model][2] += 1

    def learn(self, model: str, estimate: int, counted: int) -> None:
        with self._lock:
            estimated, real, answers = self._sums.pop(model, (0.0, 0.0, 0.0))
            self._sums[model] = [estimated * self.FADE + estimate, real * self.FADE + counted, answers + 1]
            if len(self._sums) > self.LIMIT:
                del self._sums[next(iter(self._sums))]
            self._dirty = True
            if self._clock() - self._written_at >= self.WRITE_S:
                self._write()

    def _write(self) -> None:
        self._written_at, self._dirty = self._clock(), False
        if self._path:
            try:
                write_file(self._path, dump_json({name: [round(number, 1) for number in row]
                                                  for name, row in self._sums.items()}))
            except OSError as exc:
                log.warning("%s: %s (what was learnt of token counts lasts for this run)", self._path, exc.strerror or exc)
                self._path = ""

    def close(self) -> None:
        with self._lock:
            if self._dirty:
                self._write()


class ResponseStore:
    """Answers of Responses with what they answered, for `previous_response_id`; bounded, the oldest go first.

    With a `path` they outlive a restart: a JSON line for each, the file made anew when it has grown to twice the limit.
    """
    LIMIT, LIMIT_BYTES, KEPT_S = 1000, 32 << 20, 24 * 3600

    def __init__(self, path: str = "", clock: Callable[[], float] = time.time) -> None:
        self._clock, self._path = clock, os.path.expanduser(path)
        self._kept: Dict[str, Tuple[float, int, Json, List[Json]]] = {}
        self._size, self._lock = 0, threading.Lock()
        self._written = 0
        if path:
            self._load()

    def _load(self) -> None:
        """Read the file; a line that a crash tore is left out."""
        try:
            with open(self._path, "rb") as file:
                lines = file.readlines()
        except OSError:
            return
        for line in lines:
            self._written += len(line)
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                self._drop(entry["id"])
                if "response" in entry:
                    self._kept[entry["id"]] = (float(entry["at"]), len(line), entry["response"], list(entry["items"]))
                    self._size += len(line)
        self._trim()

    def _write(self, entry: Json) -> None:
        """Add a line, or make the file anew from what is kept."""
        line = dump_json(entry) + b"\n"
        try:
            if self._written + len(line) > 2 * self.LIMIT_BYTES:
                lines = [dump_json({"id": ident, "at": at, "response": response, "items": items}) + b"\n"
                         for ident, (at, _, response, items) in self._kept.items()]
                write_file(self._path, b"".join(lines))
                self._written = sum(map(len, lines))
                return
            os.makedirs(os.path.dirname(os.path.abspath(self._path)), mode=0o700, exist_ok=True)
            with open(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
                file.write(line)
            self._written += len(line)
        except OSError as exc:
            log.warning("responses_file %s can't be written: %s", self._path, exc.strerror or exc)

    def keep(self, response: Json, items: List[Json]) -> None:
        """`items` are the whole input, of earlier responses, too."""
        size = len(dump_json(response)) + len(dump_json(items))
        with self._lock:
            now = self._clock()
            self._kept[response["id"]] = (now, size, response, items)
            self._size += size
            self._trim()
            if self._path:
                self._write({"id": response["id"], "at": now, "response": response, "items": items})

    def _trim(self) -> None:
        for ident in list(self._kept):
            old = self._clock() - self._kept[ident][0] >= self.KEPT_S
            if len(self._kept) <= self.LIMIT and self._size <= self.LIMIT_BYTES and not old:
                break
            self._drop(ident)

    def _drop(self, ident: str) -> bool:
        found = self._kept.pop(ident, None)
        self._size -= found[1] if found else 0
        return found is not None

    def drop(self, ident: str) -> bool:
        """Forget it; False where there is nothing to forget."""
        with self._lock:
            dropped = self._drop(ident)
            if dropped and self._path:
                self._write({"id": ident})
            return dropped

    def _find(self, ident: str) -> Optional[Tuple[float, int, Json, List[Json]]]:
        with self._lock:
            found = self._kept.get(ident)
        return found if found and self._clock() - found[0] < self.KEPT_S else None

    def response(self, ident: str) -> Optional[Json]:
        found = self._find(ident)
        return found[2] if found else None

    def items(self, ident: str) -> Optional[List[Json]]:
        """The input items of a response."""
        found = self._find(ident)
        return found[3] if found else None

    def recall(self, ident: str) -> Optional[List[Json]]:
        """Input and output items of a response: the conversation up to it."""
        found = self._find(ident)
        return found[3] + found[2]["output"] if found else None

    def item(self, ident: str) -> Optional[Json]:
        """One item by its id, for `item_reference`."""
        with self._lock:
            kept = list(self._kept.values())
        for _, _, response, items in reversed(kept):
            for item in [*response["output"], *items]:
                if item.get("id") == ident:
                    return item
        return None


class Metrics:
    """Counters for `/metrics` in Prometheus' text format 0.0.4; the number of series is bounded."""

    #: family -> (type, help)
    FAMILIES = {
        "requests_total": ("counter", "Requests answered, by dialect, provider and status."),
        "tokens_total": ("counter", "Tokens as the upstreams counted them; estimated=\"true\" where they did not."),
        "upstream_errors_total": ("counter", "Attempts at an upstream that failed, by provider and status."),
        "request_duration_seconds": ("histogram", "Time to the end of an answer."),
        "first_token_seconds": ("histogram", "Time to the first byte of an answer.")}
    BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

    def __init__(self) -> None:
        self._values: Dict[str, Dict[Tuple, Any]] = {family: {} for family in self.FAMILIES}
        self._lock = threading.Lock()

    def count(self, family: str, series: Labels, amount: float = 1) -> None:
        values = self._values[family]
        with self._lock:
            series = self._bounded(values, series)
            values[series] = values.get(series, 0) + amount

    def observe(self, family: str, series: Labels, value: float) -> None:
        with self._lock:
            values = self._values[family]
            row = values.setdefault(self._bounded(values, series), [0] * (len(self.BUCKETS) + 1) + [0.0])
            row[bisect_left(self.BUCKETS, value)] += 1
            row[-1] += value

    @staticmethod
    def _bounded(values: Dict[Labels, Any], series: Labels) -> Labels:
        if series in values or len(values) < METRIC_SERIES_LIMIT:
            return series
        return tuple((name, "other") for name, _ in series)

    def render(self, gauges: Iterable[Tuple[str, str, Mapping[str, Any], float]]) -> str:
        """The text; `gauges` are (family, help, labels, value) of the moment."""
        lines: List[str] = []
        with self._lock:
            for family, (kind, text) in self.FAMILIES.items():
                lines += [f"# HELP iflow2api_{family} {text}", f"# TYPE iflow2api_{family} {kind}"]
                for series, value in self._values[family].items():
                    lines += self._histogram(family, series, value) if kind == "histogram" else [
                        f"iflow2api_{family}{self._labels(series)} {value:g}" if value < 1e6 else
                        f"iflow2api_{family}{self._labels(series)} {int(value)}"]
        seen: Set[str] = set()
        for family, text, labels, value in gauges:
            if family not in seen:
                lines += [f"# HELP iflow2api_{family} {text}", f"# TYPE iflow2api_{family} gauge"]
                seen.add(family)
            lines.append(f"iflow2api_{family}{self._labels(tuple(labels.items()))} {value:.16g}")
        return "\n".join(lines) + "\n"

    def _histogram(self, family: str, series: Labels, row: List[float]) -> Iterator[str]:
        total = 0
        for edge, number in zip([*map(str, self.BUCKETS), "+Inf"], row):
            total += int(number)
            yield f"iflow2api_{family}_bucket{self._labels(series + (('le', edge),))} {total}"
        yield f"iflow2api_{family}_sum{self._labels(series)} {row[-1]:.6f}"
        yield f"iflow2api_{family}_count{self._labels(series)} {total}"

    @staticmethod
    def _labels(series: Iterable[Tuple[str, Any]]) -> str:
        quoted = [name + '="' + one_line(value, 100).replace("\\", "\\\\").replace('"', '\\"') + '"' for name,
                  value in series]
        return "{" + ",".join(quoted) + "}" if quoted else ""


#: What is counted of each row of usage; times in milliseconds, `first_ms` over `streams` answers.
USAGE_COUNTS = ("requests", "errors", "input", "output", "cached", "reasoning", "estimated", "streams", "first_ms",
                "total_ms")
USAGE_NAMES = ("day", "model", "provider", "key")

UsageName = Tuple[str, str, str, str]


def parse_usage_line(line: bytes) -> Tuple[UsageName, List[int]]:
    """A row of usage.jsonl; ValueError."""
    row = json.loads(line)
    if not isinstance(row, dict) or not re.fullmatch(r"\d{4}-\d\d-\d\d", str(row.get("day"))):
        raise ValueError("no usage")
    names = tuple(row.get(name, "") for name in USAGE_NAMES)
    counts = [row.get(name, 0) for name in USAGE_COUNTS]
    if not all(isinstance(name, str) for name in names) or not all(type(count) is int and count >= 0
                                                                   for count in counts):
        raise ValueError("no usage")
    return names, counts             # type: ignore[return-value]


def format_usage_line(names: UsageName, counts: Sequence[int]) -> bytes:
    row: Json = dict(zip(USAGE_NAMES, names))
    row.update((name, count) for name, count in zip(USAGE_COUNTS, counts) if count)
    return dump_json(row) + b"\n"


class UsageBook:
    """What was used, by day, model, provider and key; in a file of JSON lines where there is a folder.

    Each request appends a line in one write, so that a process that is killed loses none and another one's lines stay
    whole; a torn last line is passed over.  Once there are many more lines than rows, the file is written anew.
    """
    COMPACT_LINES = 2000

    def __init__(self, path: str = "", now: Callable[[], float] = time.time) -> None:
        self.path, self._now = path, now
        self.problems: List[str] = []
        self._rows: Dict[UsageName, List[int]] = {}
        self._a_day: Dict[str, int] = {}
        self._handle, self._lines, self._loaded = -1, 0, not path
        self._day: Tuple[float, str] = (0.0, "")
        self._lock = threading.Lock()

    def today(self) -> str:
        """The day by this machine's clock; looked up once a minute."""
        now = self._now()
        if not 0 <= now - self._day[0] < 60:
            self._day = (now - now % 60, time.strftime("%Y-%m-%d", time.localtime(now)))
        return self._day[1]

    def load(self) -> None:
        """Read the file, once; what is wrong in it goes to `problems`, with its line."""
        with self._lock:
            self._load()

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT), b""), 1):
                    self._lines = number
                    self._take(number, line)
        except FileNotFoundError:
            pass
        except OSError as exc:
            self.problems.append(f"{self.path}: {exc.strerror or exc} (usage is counted in memory only)")
            self.path = ""

    def _take(self, number: int, line: bytes) -> None:
        if not line.endswith(b"\n") or not line.strip():         # torn when the process was killed
            return
        try:
            names, counts = parse_usage_line(line)
        except (ValueError, RecursionError):
            if len(self.problems) < 5:
                self.problems.append(f"{self.path}: line {number} is no usage and does not count")
            return
        self._sum(names, counts)

    def _sum(self, names: UsageName, counts: Sequence[int]) -> UsageName:
        """Add to a row; names beyond what a day or the table may hold are `other`."""
        row = self._rows.get(names)
        if row is None and (self._a_day.get(names[0], 0) >= USAGE_ROWS_A_DAY or len(self._rows) >= USAGE_ROWS):
            names = (names[0], "other", "other", "other")
            row = self._rows.get(names)
        if row is None:
            row = self._rows[names] = [0] * len(USAGE_COUNTS)
            self._a_day[names[0]] = self._a_day.get(names[0], 0) + 1
        for at, count in enumerate(counts):
            if count:
                row[at] += count
        return names

    def add(self, model: str, provider: str, key: str, counts: Sequence[int], days: int) -> None:
        """Count one request; `days` is how long rows are kept."""
        with self._lock:
            self._load()
            day = self.today()
            if day not in self._a_day:
                self._forget(days)
            names = self._sum((day, model[:100], provider, key), counts)
            if self.path:
                self._append(format_usage_line(names, counts), days)

    def _append(self, line: bytes, days: int) -> None:
        try:
            if self._handle < 0 or not os.fstat(self._handle).st_nlink:      # somebody removed or replaced the file
                self._open()
            os.write(self._handle, line)
            self._lines += 1
            if self._lines > self.COMPACT_LINES + 4 * len(self._rows):
                self._compact(days)
        except OSError as exc:
            self.problems.append(f"{self.path}: {exc.strerror or exc} (usage is counted in memory only)")
            log.warning("%s", self.problems[-1])
            self.path = ""

    def _open(self) -> None:
        self._shut()
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o600)
        size = os.lseek(self._handle, 0, os.SEEK_END)
        os.lseek(self._handle, max(0, size - 1), os.SEEK_SET)
        if size and os.read(self._handle, 1) != b"\n":           # end the line that a kill has torn
            os.write(self._handle, b"\n")

    def _compact(self, days: int) -> None:
        """Write each row once; lines that another process appended in the meantime are in the rows first."""
        self._shut()
        self._rows, self._a_day, self._lines, self._loaded, self.problems = {}, {}, 0, False, []
        self._load()
        self._forget(days)
        write_file(self.path,
                   b"".join(format_usage_line(names, counts) for names, counts in sorted(self._rows.items())))
        self._lines = len(self._rows)

    def _forget(self, days: int) -> None:
        oldest = time.strftime("%Y-%m-%d", time.localtime(self._now() - (days - 1) * 86400))
        self._rows = {names: counts for names, counts in self._rows.items() if names[0] >= oldest}
        self._a_day = {}
        for names in self._rows:
            self._a_day[names[0]] = self._a_day.get(names[0], 0) + 1

    @property
    def is_empty(self) -> bool:
        return not self._rows

    def rows(self, days: int) -> List[Tuple[UsageName, List[int]]]:
        """The rows of the last `days`."""
        oldest = time.strftime("%Y-%m-%d", time.localtime(self._now() - (days - 1) * 86400))
        with self._lock:
            self._load()
            return [(names, list(counts)) for names, counts in self._rows.items() if names[0] >= oldest]

    def report(self, by: str, days: int, prices: Mapping[str, Mapping[str, float]]) -> List[Json]:
        """A row for each value of `by` (USAGE_NAMES) in the last `days`, the largest first; `cost` where there are prices."""
        found: Dict[str, Json] = {}
        for names, counts in self.rows(days):
            name = names[USAGE_NAMES.index(by)]
            total = found.setdefault(name, {by: name, **dict.fromkeys(USAGE_COUNTS, 0), "cost": None})
            for field_name, count in zip(USAGE_COUNTS, counts):
                total[field_name] += count
            cost = cost_of(names[1], names[2], dict(zip(USAGE_COUNTS, counts)), prices)
            total["cost"] = total["cost"] if cost is None else (total["cost"] or 0) + cost
        return sorted(found.values(), key=lambda row: (-row["input"] - row["output"], row[by]))

    def _shut(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def close(self) -> None:
        with self._lock:
            self._shut()


def cost_of(model: str, provider: str, counts: Mapping[str, int],
            prices: Mapping[str, Mapping[str, float]]) -> Optional[float]:
    """What a row costs by the first price whose pattern matches `provider/model` or `model`; None without one."""
    for pattern, price in prices.items():
        if fnmatchcase(f"{provider}/{model}", pattern) or fnmatchcase(model, pattern):
            cached = min(counts["cached"], counts["input"])
            return ((counts["input"] - cached) * price.get("input", 0) + cached * price.get("cached",
                                                                                            price.get("input", 0))
                    + counts["output"] * price.get("output", 0)) / 1e6
    return None


class Series:
    """Requests, errors and tokens of the last hour by minute and of the last day by hour.

    Names come from clients: in each step those beyond GROUPS are counted together.
    """
    #: span -> seconds of a step, number of steps
    SPANS = {"hour": (60, 60), "day": (3600, 24)}
    COUNTS = ("requests", "errors", "input", "output")
    GROUPS, OTHER = 64, "…"

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now, self._lock = now, threading.Lock()
        self._steps: Dict[str, Dict[int, Dict[Tuple[str, ...], List[int]]]] = {span: {} for span in self.SPANS}

    def add(self, model: str, provider: str, key: str, counts: Sequence[int]) -> None:
        """Count a request; `counts` begin with COUNTS."""
        now = self._now()
        with self._lock:
            for span, (step_s, number) in self.SPANS.items():
                at, steps = int(now // step_s * step_s), self._steps[span]
                if at not in steps:
                    kept = range(at - step_s * number + 1, at)       # a clock that was put back keeps nothing
                    steps = self._steps[span] = {old: rows for old, rows in steps.items() if old in kept}
                    steps[at] = {}
                names = (model, provider, key)
                if names not in steps[at] and len(steps[at]) >= self.GROUPS:
                    names = (self.OTHER,) * 3
                row = steps[at].setdefault(names, [0] * len(self.COUNTS))
                for place in range(len(row)):
                    row[place] += counts[place]

    def steps(self, span: str) -> List[Tuple[int, List[Tuple[Tuple[str, ...], List[int]]]]]:
        """Every step of a span, the oldest first: its beginning, and rows of (model, provider, key) and COUNTS."""
        step_s, number = self.SPANS[span]
        last = int(self._now() // step_s * step_s)
        with self._lock:
            return [(at, [(names, list(row)) for names, row in self._steps[span].get(at, {}).items()])
                    for at in range(last - step_s * (number - 1), last + 1, step_s)]


class Ring:
    """The last things of a kind, numbered from 1 on."""

    def __init__(self, size: int) -> None:
        self._items: Deque[Any] = deque(maxlen=size)
        self.count, self._lock = 0, threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: Any) -> None:
        with self._lock:
            self.count += self._items.maxlen != 0        # what nobody wants kept is not lost
            self._items.append(item)

    def resize(self, size: int) -> None:
        with self._lock:
            if size != self._items.maxlen:
                self._items = deque(self._items, size)

    def after(self, number: int, most: int = 1000) -> Tuple[int, List[Tuple[int, Any]]]:
        """How many after `number` are lost already, and the next ones there are, with their numbers."""
        with self._lock:
            first = self.count - len(self._items)        # so many are gone
            lost = max(0, first - number)
            at = number + lost - first
            found = list(self._items)[at:at + most] if at < len(self._items) else []
        return lost, list(enumerate(found, number + lost + 1))


class LogRing(logging.Handler):
    """The last lines of the log, for the page: (epoch seconds, level, logger, text); redacted when they are read."""

    def __init__(self, ring: Ring, rung: Callable[[], None]) -> None:
        super().__init__()
        self._ring, self._rung = ring, rung

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self._ring.add((record.created, record.levelno, record.name, text[:LOG_LINE_CHARS]))
        self._rung()


def told_log(number: int, line: Tuple[float, int, str, str]) -> Json:
    """A line of a LogRing as the page gets it."""
    at, level, logger, text = line
    level_name = logging.getLevelName(level).lower()
    return {"id": number, "at": at, "level": level_name, "logger": logger, "text": redact(text)}


class Live:
    """What viewers of the page read, each at its own pace, and the bell that wakes them.

    Nothing is queued for anybody: who is slow finds that the rings have moved on, and is told by how much.
    """

    def __init__(self) -> None:
        self.requests, self.logs = Ring(0), Ring(LOG_LINES)
        self.log_handler = LogRing(self.logs, lambda: self.ring(True))
        self.closed = False
        self._viewers: Dict[bool, int] = {False: 0, True: 0}     #: by whether they want logs
        self._rung, self._bell = 0, threading.Condition()

    def ring(self, log_only: bool = False) -> None:
        if self._viewers[True] or not log_only and self._viewers[False]:
            with self._bell:
                self._rung += 1
                self._bell.notify_all()

    def wait(self, rung: int, seconds: float) -> int:
        """Until the bell has rung since it was `rung`, but not longer; its new number."""
        with self._bell:
            if self._rung == rung and not self.closed:
                self._bell.wait(seconds)
            return self._rung

    @contextlib.contextmanager
    def viewer(self, logs: bool) -> Iterator[None]:
        with self._bell:
            if sum(self._viewers.values()) >= VIEWERS_LIMIT:
                raise Busy(f"{VIEWERS_LIMIT} pages are watching already", retry_after_s=30)
            self._viewers[logs] += 1
        try:
            yield
        finally:
            with self._bell:
                self._viewers[logs] -= 1

    def close(self) -> None:
        with self._bell:
            self.closed = True
            self._bell.notify_all()


@dataclass
class Session:
    """Somebody who is signed in: with which password (its hash), since when and until when.  Times are monotonic."""
    password: str
    began_at: float
    used_at: float


class Sessions:
    """Who may use the page.

    A session ends on time, by hand, or with the password it was opened with.  While there is no password, a one-time
    code that only the console shows lets its reader set one; the page itself never tells it.
    """

    def __init__(self, password: Callable[[], str], clock: Callable[[], float] = time.monotonic) -> None:
        """`password` is the hash in force."""
        self._password, self._clock = password, clock
        self._kept: Dict[bytes, Session] = {}            #: by hash of the token
        self._basic: Tuple[bytes, str] = (b"", "")       #: hash of the last good Authorization, and its password's
        self._code = ""
        self._everybody = Window(SIGN_IN_SPAN_S, SIGN_IN_TRIES_OF_ALL)
        self._tries: Dict[str, Window] = {}
        self._lock, self._judging = threading.Lock(), threading.Lock()

    @property
    def is_new(self) -> bool:
        return not self._password()

    def code(self) -> str:
        """The code that sets the first password, "" where there is a password."""
        with self._lock:
            if not self.is_new:
                self._code = ""
            elif not self._code:
                letters = "".join(secrets.choice(CODE_LETTERS) for _ in range(8))
                self._code = f"{letters[:4]}-{letters[4:]}"
            return self._code

    def try_code(self, address: str, code: str) -> bool:
        """Whether it is the code, which is used up by this; RateLimited."""
        def ours() -> bool:
            known = self.code().replace("-", "")
            given = re.sub(r"[\s-]", "", code).upper()
            return bool(known) and hmac.compare_digest(hash_key(given), hash_key(known))

        if not self._judge(address, ours):
            return False
        self._code = ""
        return True

    def try_password(self, address: str, password: str) -> bool:
        """RateLimited."""
        stored = self._password()
        return self._judge(address, lambda: len(password) <= PASSWORD_LENGTH[1] and is_password(password, stored))

    def _judge(self, address: str, is_right: Callable[[], bool]) -> bool:
        """One at a time: a guess takes a fifth of a second of a processor, and nobody shall take more than one."""
        with self._judging:
            now = self._clock()
            windows = (self._everybody, self._tries.get(address) or Window(SIGN_IN_SPAN_S, SIGN_IN_TRIES))
            wait_s = max(window.wait_s(now) for window in windows)
            if wait_s > 0:
                raise RateLimited(f"too many wrong attempts; try again in {wait_s:.0f} s", retry_after_s=wait_s,
                                  code="too_many_attempts")
            if is_right():
                return True
            self._tries.pop(address, None)
            self._tries[address] = windows[1]            # seen last
            while len(self._tries) > SIGN_IN_ADDRESSES:
                del self._tries[next(iter(self._tries))]
            for window in windows:
                window.add(now, 1)
            return False

    def open(self) -> str:
        """A new session's token; beyond SESSIONS_LIMIT the one not used for longest ends."""
        token, now = secrets.token_urlsafe(32), self._clock()
        with self._lock:
            self._kept = {name: session for name, session in self._kept.items() if self.is_alive(session)}
            while len(self._kept) >= SESSIONS_LIMIT:
                del self._kept[min(self._kept, key=lambda name: self._kept[name].used_at)]
            self._kept[hash_key(token)] = Session(self._password(), now, now)
        return token

    def find(self, token: str) -> Optional[Session]:
        """The session of a token, which is used by this; None where there is none any more."""
        session = self._kept.get(hash_key(token))
        if session is None or not self.is_alive(session):
            return None
        session.used_at = self._clock()
        return session

    def is_alive(self, session: Session) -> bool:
        now = self._clock()
        return session.password == self._password() != "" and now < session.began_at + SESSION_S and (
            now < session.used_at + SESSION_IDLE_S)

    def basic(self, address: str, given: str) -> Optional[Session]:
        """The session of one request that bears `admin:password` in base64; RateLimited, None where it is wrong.

        What was right is remembered as long as the password stays, so that a script's requests cost nothing.
        """
        digest, now = hash_key(given), self._clock()
        known, password = self._basic
        if not (hmac.compare_digest(known, digest) and password == self._password() != ""):
            try:
                user, _, secret = base64.b64decode(given, validate=True).decode().partition(":")
            except ValueError:
                return None
            password = self._password()
            if user != "admin" or not self.try_password(address, secret):
                return None
            self._basic = (digest, password)
        return Session(password, now, now)

    def close(self, token: str) -> None:
        with self._lock:
            ended = self._kept.pop(hash_key(token), None)
            if ended is not None:
                ended.password = ""                      # whoever still holds it

    def close_all(self) -> None:
        with self._lock:
            for session in self._kept.values():
                session.password = ""
            self._kept, self._basic = {}, (b"", "")


class FileWatch:
    """Calls back, on a thread of its own, when one of some files has changed on disk."""

    def __init__(self, paths: Sequence[str], changed: Callable[[], None], every_s: float = 2.0) -> None:
        self._paths, self._changed, self._every_s = paths, changed, every_s
        self._stamps = self._look()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="file-watch", daemon=True)
        self._thread.start()

    def _look(self) -> List[Tuple[int, ...]]:
        return [file_stamp(path) for path in self._paths]

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            stamps = self._look()
            if stamps != self._stamps:
                self._stamps = stamps
                try:
                    self._changed()
                except Exception:        # a thread body: it must outlive whatever a file makes of it
                    log.exception("taking over a changed file failed")

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)


# === 13. Gateway =============================================================

def _lasting_key(path: str) -> bytes:
    """32 random bytes, kept in `path` where that can be done."""
    with contextlib.suppress(OSError):
        with open(path, "rb") as file:
            key = file.read()
        if len(key) == 32:
            return key
    key = secrets.token_bytes(32)
    try:
        write_file(path, key)
    except OSError as exc:
        log.warning("%s can't be written (%s): conversations lose their reasoning at a restart", path, exc.strerror
                    or exc)
    return key


def parse_model_list(data: bytes) -> List[str]:
    """The names in an answer of `/models`; UpstreamGarbled."""
    try:
        listed = json.loads(data)
    except (ValueError, RecursionError):
        raise UpstreamGarbled("its /models is not JSON") from None
    items = listed.get("data") if isinstance(listed, dict) else None
    return [m["id"] for m in (items if isinstance(items, list) else ())
            if isinstance(m, dict) and isinstance(m.get("id"), str) and m["id"]]


class Attempt(NamedTuple):
    """One request to an upstream: where, with which key (masked), and what came of it."""
    provider: str
    model: str
    key: str
    status: int
    error: str
    total_s: float


@dataclass
class Record:
    """What is noted of one call: for its log line, the metrics, usage and history.  No content."""
    request_id: str
    dialect: str
    model: str
    stream: bool
    started: float
    target: Optional[Target] = None
    attempts: int = 0
    status: int = 0
    first_s: Optional[float] = None
    total_s: float = 0.0
    usage: Usage = Usage()
    error: str = ""
    key: str = ""                        #: name of the client's key
    at: float = 0.0                      #: epoch seconds
    trail: List[Attempt] = field(default_factory=list)

    def counts(self) -> List[int]:
        """As USAGE_COUNTS; a client that leaves is no error."""
        usage = self.usage if self.status == 200 or self.first_s is not None else Usage()
        timed = self.first_s is not None
        return [1, int(self.status not in (200, 499)), usage.prompt, usage.completion, usage.cached, usage.reasoning
                or 0,
                int(usage.estimated), int(timed), int((self.first_s or 0.0) * 1000), int(self.total_s * 1000)]

    def facts(self) -> Json:
        """For the history of requests."""
        usage = self.usage
        return {"at": self.at, "request_id": self.request_id, "dialect": self.dialect, "model": self.model,
                "stream": self.stream,
                "key": self.key, "status": self.status, "error": one_line(self.error), "first_s": self.first_s,
                "total_s": self.total_s, "input": usage.prompt, "output": usage.completion, "cached": usage.cached,
                "reasoning": usage.reasoning, "estimated": usage.estimated,
                "target": f"{self.target.provider.name}/{self.target.model}" if self.target else "",
                "attempts": [attempt._asdict() for attempt in self.trail]}

    def line(self) -> str:
        """`model → provider/model 200 first 0.4s total 2.1s in 12 out 340`; `~` marks an estimate."""
        where = f"{self.target.provider.name}/{self.target.model}" if self.target else "-"
        first = f" first {self.first_s:.2f}s" if self.first_s is not None and self.stream else ""
        mark = "~" if self.usage.estimated else ""
        tokens = f" in {mark}{self.usage.prompt} out {mark}{self.usage.completion}" if self.status == 200 else ""
        tries = f" attempts {self.attempts}" if self.attempts > 1 else ""
        error = f" ({one_line(self.error, 200)})" if self.error else ""
        return (f"{self.request_id[4:12]} {one_line(self.model, 64) or '-'} → {one_line(where, 100)} {self.status}{first} "
                f"total {self.total_s:.2f}s{tokens}{tries}{error}")


class AnswerSink(Caller):
    """Where an answer goes.  The HTTP section writes it to a socket."""
    began = False                        #: something of the answer was sent: no other target may be tried any more
    stream: Any = None                   #: what the answer goes through at the moment; it knows how to say that it failed
    returned: Sequence[Tuple[str, str]] = ()     #: headers of the upstream that the client gets

    def reply(self, data: bytes, content_type: str, headers: Sequence[Tuple[str, str]]) -> None:
        """The whole of a plain answer."""

    def send(self, payload: bytes, framed: Optional[bytes] = None) -> None:
        """A part of a stream: whole records, and the same in HTTP chunks if it came so."""

    def end(self, payload: bytes) -> None:
        """The last part."""


#: What `routes explain` is told of a request.
_EXPLAINED: Dict[str, type] = {"model": str, "dialect": str, "tokens": int, "images": bool, "thinking": bool,
                               "tools": bool, "aliases": dict}


def _forget_secrets(exc: GatewayError, provider: Provider) -> None:
    """Some upstreams repeat the key they refuse; it is not the client's."""
    for secret in (*provider.api_keys, *(value for _, value in provider.headers)):
        if len(secret) < 8:              # "none", "EMPTY": what local engines are given is no secret
            continue
        if secret in exc.message:
            exc.message = exc.message.replace(secret, mask(secret))
        if exc.body and secret in dump_json(exc.body).decode():
            exc.body = json.loads(dump_json(exc.body).decode().replace(secret, mask(secret)))


@lru_cache(1024)
def header_stays(name: str) -> bool:
    """Whether a client's header (its name in lower case) is not for the upstream."""
    return HEADER_STAYS.fullmatch(name) is not None


@lru_cache(1024)
def header_returns(name: str) -> bool:
    """Whether a header of an upstream's answer is for the client."""
    return HEADER_RETURNS.fullmatch(name) is not None


def scale_name(target: Target) -> str:
    """What token counts are kept under."""
    return f"{target.provider.name}/{target.model}"[:200]


class State(NamedTuple):
    """What a request works on from its start to its end, whatever is changed meanwhile."""
    settings: Settings
    router: Router
    door: Doorkeeper


class Gateway:
    """Routes calls to upstreams and answers back; knows no HTTP server.

    `config` makes it follow a config.json; `flags` are settings that stand above it for this run.
    """
    #: Where engines on this machine are looked for when no provider is set up; tests put their own here.
    local_engines: Mapping[str, str] = {name: PRESETS[name].base_url for name in LOCAL_ENGINES}
    #: Models whose cap on max_tokens is remembered.
    CAPS_LIMIT = 500

    def __init__(self, settings: Optional[Settings] = None, *, config: Optional[ConfigFile] = None,
                 environ: Optional[Mapping[str, str]] = None, flags: Optional[Mapping[str, Any]] = None,
                 clock: Callable[[], float] = time.monotonic,
                 pause: Callable[[Caller, float], None] = wait_for) -> None:
        self.config, self.flags = config, dict(flags or {})
        self.environ = os.environ if environ is None else environ
        self.upstream, self.metrics = Upstream(), Metrics()
        self.reasoning = ReasoningCache()
        self.scale = TokenScale(os.path.join(config.folder, "tokens.json") if config is not None else "")
        self._caps: Dict[str, int] = {}  #: by scale_name: most output tokens, as refusals have told
        self._login: Json = {}           #: the iFlow CLI's file, as last read well
        oauth = OAuth(self.upstream, lambda: self.settings)
        self.logins = Logins(config, oauth, lambda: self.settings.accounts, self.reload)
        self._seal: Optional[Seal] = None
        self.started_at = time.time()
        self.in_flight = 0
        self.origins: Dict[str, str] = {}
        self.problems: List[str] = []
        self.config_broken = self._must_have_key = False
        self._clock, self._pause = clock, pause
        self.limiter = RateLimiter(clock)
        self.usage = UsageBook(os.path.join(config.folder, "usage.jsonl") if config is not None else "")
        self.live, self.series = Live(), Series()
        self.sessions = Sessions(lambda: self.settings.admin_password, clock)
        self.versions = ConfigVersions()
        #: called whenever settings have been taken over
        self.listeners: List[Callable[[], None]] = [self.live.ring]
        self._circuits: Dict[str, Circuit] = {}
        self._slots: Dict[str, Slots] = {}
        self._rings: Dict[str, KeyRing] = {}
        self._lists: Dict[str, Tuple[float, List[str]]] = {}
        self._lock = threading.Lock()
        self._watch: Optional[FileWatch] = None
        self._looking = threading.Lock()
        #: the state without engines, until when the last look counts, the state with those that were found
        self._local: Tuple[Optional[State], float, Optional[State]] = (None, 0.0, None)
        self.state = State(Settings(), Router(Settings(), {}), Doorkeeper(Settings()))
        if config is None:
            self.apply(settings or Settings())
        else:
            raw, broken = config.recover()
            self.config_broken = bool(broken)
            self._take_over(load_settings(raw, self.environ, self.flags), broken + config.locked + self._read_login())
        self.responses = ResponseStore(self.settings.responses_file)

    @property
    def settings(self) -> Settings:
        return self.state.settings

    # settings

    def apply(self, settings: Settings) -> None:
        """Work with `settings` from the next request on; running ones keep theirs."""
        if self._must_have_key and not settings.custom_api_key and self.settings.custom_api_key:
            settings = replace(settings, custom_api_key=self.settings.custom_api_key)
        router, door = self.routed(settings), Doorkeeper(settings)
        with self._lock:
            for provider in router.providers.values():
                self._equip(provider)
            self.limiter.keep_keys(key.name for key in door.keys)
            self.live.requests.resize(settings.history_size)
            if [p.base_url for p in router.providers.values()] != [p.base_url
                                                                   for p in self.state.router.providers.values()]:
                self._lists = {}
            self.state = State(settings, router, door)
        log.setLevel(settings.log_level.upper())
        for tell in self.listeners:
            tell()

    def _equip(self, provider: Provider) -> None:
        """Places, keys and circuit of a provider, as far as they can stay those it had."""
        name = provider.name
        self._slots.setdefault(name, Slots(provider.places)).resize(provider.places)
        ring = self._rings.get(name)
        if ring is None or (ring.keys, ring.each) != (provider.api_keys, provider.key_concurrency):
            fresh = KeyRing(provider.api_keys, self._clock, provider.key_concurrency)
            self._rings[name] = fresh.inherit(ring) if ring else fresh
        before = self.state.router.providers.get(name)
        if name not in self._circuits or before is None or before.base_url != provider.base_url:
            self._circuits[name] = Circuit(self._clock)

    def routed(self, settings: Settings) -> Router:
        """The routes that `settings` would make."""
        if "providers" in self.flags:    # --upstream: that one alone
            return Router(settings, self.environ)
        name = self._login.get("modelName")
        iflow = iflow_provider(settings, self.origins, self.environ if self.config else {}, self._login)
        return Router(settings, self.environ, iflow, name if iflow and isinstance(name, str) else "")

    def _read_login(self) -> List[str]:
        """Take over the iFlow CLI's file; what is wrong with it, a sentence.  A bad one leaves the last good in force."""
        if self.config is None or "providers" in self.flags:
            return []
        try:
            self._login = read_json_file(os.path.expanduser(IFLOW_FILE))
        except ConfigBroken as exc:
            return [f"{exc} (the iFlow CLI's file; nothing is written to it)"]
        return []

    def _take_over(self, loaded: Loaded, broken: List[str]) -> None:
        self.origins = loaded.origins
        self.apply(loaded.settings)
        problems = broken + loaded.problems + self.state.router.problems + self._idle_patterns() + self.usage.problems
        problems += proxy_problems(loaded.settings, self.state.router.providers.values())
        for problem in problems:
            if problem not in self.problems:
                log.warning("%s", one_line(problem, 500))
        self.problems = problems

    def reload(self) -> None:
        """Take over config.json; one that does not parse leaves the last good settings in force."""
        if self.config is None:
            return
        try:
            raw = self.config.read()
        except ConfigBroken as exc:
            self.config_broken = True
            if [str(exc)] != self.problems:
                self.problems = [str(exc)]
                log.warning("%s (the settings in force stay)", one_line(exc, 500))
            before = self._login
            self._read_login()           # a login made meanwhile counts all the same
            if self._login != before:
                self.apply(self.settings)
            return
        loaded = self._sound(load_settings(raw, self.environ, self.flags, self.settings))
        before = (self.settings, self._login)
        broken = self.config.locked + self._read_login()
        if (loaded.settings, self._login) != before or self.config_broken or loaded.problems or broken or self.problems:
            self.config_broken = False
            self._take_over(loaded, broken)
            log.info("settings taken over from %s", self.config.path)

    def _sound(self, loaded: Loaded) -> Loaded:
        """`loaded`, with what does not fit together in it (unknown providers, names taken twice) as it was."""
        router, known = self.routed(loaded.settings), self.state.router
        bad = router.faults - known.faults
        if not bad:
            return loaded
        problems = [f"{problem} (what was in force stays)" for problem in router.problems
                    if problem not in known.problems]
        kept = replace(loaded.settings, **{name: getattr(self.settings, name) for name in bad})
        return Loaded(kept, loaded.origins, loaded.problems + problems)

    def _idle_patterns(self) -> List[str]:
        """Patterns of client keys that match nothing, where each provider says what it serves."""
        providers, aliases = self.state.router.providers.values(), self.state.router.aliases
        if not providers or not all(provider.models for provider in providers):
            return []
        names = {name for p in providers for model in p.models for name in (model, f"{p.name}/{model}")}
        patterns = [*FOREIGN_MODELS, *(pattern for pattern, _ in aliases)]
        return [f"client_keys: {key.name}: models: {wish!r} matches nothing" + nearest(wish, names)
                for key in self.state.door.keys for wish in key.models
                if not any(fnmatchcase(name, wish) for name in [*names, *patterns])
                and not any(fnmatchcase(wish, pattern) for pattern in patterns)]

    def watch_files(self) -> None:
        """Reload when config.json or the CLI's file changes on disk, and keep logins fresh."""
        if self.config is not None and self._watch is None:
            self._watch = FileWatch([self.config.path, os.path.expanduser(IFLOW_FILE)], self._files_changed)
            if "providers" not in self.flags:
                self.logins.refresher.start()

    def _files_changed(self) -> None:
        self.reload()
        self.logins.refresher.wake()

    def change_config(self, edit: Callable[[Json], None]) -> None:
        """Change config.json and take it over; OSError where it can't be written."""
        if self.config is None:
            raise OSError("this gateway has no config.json")
        self.config.change(edit)
        self.reload()

    def config_version(self) -> str:
        """The version of what config.json holds now (ConfigVersions)."""
        return self.versions.note(self.config.recover()[0] if self.config is not None else {})

    def set_password(self, stored: str) -> None:
        """Take `stored` for admin_password; where it can't be kept, for this run."""
        try:
            self.change_config(lambda raw: raw.update(admin_password=stored))
        except OSError as exc:
            log.warning("the page's password can't be stored: %s", exc.strerror or exc)
        if self.settings.admin_password != stored:
            self.flags["admin_password"] = stored
            self.apply(replace(self.settings, admin_password=stored))

    def open_to_network(self) -> None:
        """From here on there is always a client key, whatever becomes of config.json."""
        self._must_have_key = True
        self.ensure_client_key()

    def ensure_client_key(self) -> Tuple[str, bool]:
        """The client key, made if there is none, and whether it could be kept for the next start."""
        key = self.settings.custom_api_key
        if self.state.door.required:
            return key, True
        key = "sk-" + secrets.token_hex(24)
        kept = False
        if self.config is not None:
            try:
                self.change_config(lambda raw: raw.update(custom_api_key=key))
                kept = self.settings.custom_api_key == key
            except OSError as exc:
                log.warning("the new client key can't be stored in %s: %s", self.config.path, exc.strerror or exc)
        if not kept:
            self.flags["custom_api_key"] = key
            self.apply(replace(self.settings, custom_api_key=key))
        return key, kept

    def seal(self) -> Seal:
        """What reasoning is sealed with on its way through clients; the key outlives a restart where there is a folder."""
        if self._seal is None:
            path = os.path.join(self.config.folder, "seal.key") if self.config is not None else ""
            self._seal = Seal(_lasting_key(path) if path else secrets.token_bytes(32))
        return self._seal

    # engines on this machine

    def current(self, look: bool = True) -> State:
        """What a request starts from: the settings, or, where they lead nowhere, the engines found on this machine.

        `look` False takes what was found last.
        """
        state = self.state
        if state.router.default is not None or not state.settings.detect_local:
            return state
        if look:
            with self._looking:
                if self._local[0] is not state or time.monotonic() >= self._local[1]:
                    self._look_for_engines(state)
        base, _, found = self._local
        return found if found is not None and base is state else state

    def _look_for_engines(self, state: State) -> None:
        """Ask all of them at once; what is found serves until the next look."""
        entries: Dict[str, Json] = {}
        own = self.upstream.own_ports | {state.settings.port}
        threads = [threading.Thread(target=self._look_at, args=(name, base_url, state.settings, entries), daemon=True)
                   for name, base_url in self.local_engines.items() if Endpoint.of(base_url).port not in own]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * LOCAL_TIMEOUT_S)
        providers = [entries[name] for name in self.local_engines if name in entries]
        before = self._local[2].settings.providers if self._local[0] is state and self._local[2] else []
        found = self._local[2] if before else None
        if providers != before:
            settings = replace(state.settings, providers=providers)
            found = State(settings, Router(settings, self.environ), state.door) if providers else None
            self._announce_engines(found)
        self._local = (state, time.monotonic() + LOCAL_TTL_S, found)

    def _announce_engines(self, found: Optional[State]) -> None:
        if found is None:
            return log.info("no engine answers on this machine any more")
        with self._lock:
            for provider in found.router.providers.values():
                self._equip(provider)
        for provider in found.router.providers.values():
            log.info("found %s at %s: %s", provider.name, provider.base_url, one_line(", ".join(provider.models), 160))

    def _look_at(self, name: str, base_url: str, settings: Settings, entries: Dict[str, Json]) -> None:
        """Enter the engine into `entries` if one answers there that has a model; another iflow2api is none."""
        quick = replace(settings, connect_timeout_s=min(settings.connect_timeout_s, LOCAL_TIMEOUT_S))
        try:
            with self.upstream.open(Provider(name, base_url), quick, "GET", "/models", (), None, NOBODY,
                                    LOCAL_TIMEOUT_S) as exchange:
                ours = exchange.headers.get("server", "").startswith("iflow2api")
                models = parse_model_list(exchange.read_all(8 << 20)) if exchange.status == 200 and not ours else []
        except GatewayError as exc:
            return log.debug("no %s at %s: %s", name, base_url, one_line(exc.message))
        models.sort(key=lambda model: "embed" in model.lower())  # the first one is the default model
        if models:
            entries[name] = {"name": name, "base_url": base_url, "models": models, "profile": PRESETS[name].profile}

    # answering

    def answer(self, call: Call, sink: AnswerSink) -> None:
        """Serve one call: each target of its route in turn, until one has answered.

        Raises GatewayError, with nothing sent or (`sink.began`) in mid-answer, and ClientGone.
        """
        record = Record(call.request_id, call.dialect.name, (call.model or "")[:200], call.stream, time.monotonic(),
                        key=call.key.name if call.key else "", at=time.time())
        with self._lock:
            self.in_flight += 1
        try:
            self._try_targets(self.current(), call, sink, record)
            record.status = record.status or 200
        except GatewayError as exc:
            record.status, record.error = call.dialect.status(exc), exc.message
            raise
        except ClientGone:
            record.status, record.error = 499, "the client left"
            raise
        finally:
            with self._lock:
                self.in_flight -= 1
            self._note(record, call)

    def _try_targets(self, state: State, call: Call, sink: AnswerSink, record: Record) -> None:
        """The chain of targets, and after a pause those again that may do better then, as often as `retry` allows."""
        chain = state.router.resolve(call.model, call.dialect.foreign, call)
        if call.key is not None and not may_use(call.key, state.router.named(call.model), chain):
            raise Forbidden(f"the key {call.key.name} may not use the model {one_line(call.model, 100)}; it may use "
                            + ", ".join(call.key.models), code="model_not_allowed", param="model")
        began, waiting = self._clock(), []
        for number in range(RETRY_FIELDS["count"][2] + 1):
            error, again = self._try_chain(state, call, chain, sink, record)
            if error is None:
                return
            waiting += again
            pause_s = self._pause_s(state.settings, number, waiting, self._clock() - began)
            if pause_s is None:
                raise error
            log.info("%s trying again in %.1f s", call.request_id[4:12], pause_s)
            self._pause(sink, pause_s)
            now = self._clock() + 0.01   # clocks are grainy
            chain = [target for at, target in waiting if at <= now]
            waiting = [(at, target) for at, target in waiting if at > now]

    def _pause_s(self, settings: Settings, retries: int, waiting: Sequence[Tuple[float, Target]],
                 spent_s: float) -> Optional[float]:
        """Seconds until the next retry: the backoff, or what the upstreams asked for; None where there shall be none."""
        retry = {**RETRY, **settings.retry}
        if retries >= retry["count"] or not waiting:
            return None
        backoff_s = min(retry["max_backoff_s"],
                        retry["backoff_s"] * 2 ** retries) * (0.5 + secrets.randbelow(500) / 1000)
        pause_s = max(backoff_s, min(at for at, _ in waiting) - self._clock())
        return pause_s if spent_s + pause_s <= retry["total_s"] else None

    def _try_chain(self, state: State, call: Call, chain: Sequence[Target], sink: AnswerSink,
                   record: Record) -> Tuple[Optional[GatewayError], List[Tuple[float, Target]]]:
        """Each target in turn until one answers: None then, else the last error, and who may be asked again from when on."""
        error: Optional[GatewayError] = None
        again: List[Tuple[float, Target]] = []
        for target in self._in_turn(state.settings, chain):
            record.target = target
            try:
                self._try_target(state, call, target, sink, record)
                self._circuits[target.provider.name].succeeded()
                return None, []
            except (UpstreamError, Busy) as exc:
                self._judge(state.settings, target, exc)
                if sink.began or exc.status not in FALLBACK_STATUS:
                    raise
                error = exc
                if exc.status in RETRY_STATUS and exc.should_retry is not False and exc.overflow is None:
                    again.append((self._clock() + (exc.retry_after_s or 0), target))
                if len(chain) > 1:
                    log.info("%s %s failed (%s)", call.request_id[4:12], target.provider.name,
                             one_line(exc.message, 160))
        return error, again

    def _in_turn(self, settings: Settings, chain: Sequence[Target]) -> Iterator[Target]:
        """The chain, with upstreams that rest at its end: when nobody else answers, they are still worth a try.

        A route of one upstream is never rested: a local engine that has just been started should answer at once.
        """
        if len(chain) == 1:
            yield chain[0]
            return
        resting = []
        rest_s = {**CIRCUIT, **settings.circuit}["rest_s"]
        for target in chain:
            if self._circuits[target.provider.name].admits(rest_s):
                yield target
            else:
                resting.append(target)
        yield from resting

    def _judge(self, settings: Settings, target: Target, exc: GatewayError) -> None:
        """What a failure says of the upstream: out of order, or alive and refusing; our own full queue says nothing."""
        circuit = self._circuits[target.provider.name]
        if isinstance(exc, Busy) or target.provider.problem:
            return
        if exc.status != 408 and exc.status < 500 or exc.overflow is not None:
            return circuit.succeeded()
        limits = {**CIRCUIT, **settings.circuit}
        circuit.failed(limits["failures"], limits["rest_s"])
        if circuit.failures == limits["failures"]:
            log.warning("%s failed %d times in a row and rests for %g s where there is another", target.provider.name,
                        circuit.failures, limits["rest_s"])

    def _try_target(self, state: State, call: Call, target: Target, sink: AnswerSink, record: Record) -> None:
        """One target; a max_tokens of our translation that is above the model's cap is lowered to it, once."""
        try:
            return self._try_keys(state, call, target, sink, record)
        except UpstreamRefused as exc:
            cap = find_output_cap(exc.status, exc.message) if call.dialect.foreign and exc.overflow is None else 0
            name = scale_name(record.target or target)
            if not cap or cap >= self._caps.get(name, cap + 1) or sink.began:
                raise
        with self._lock:
            self._caps[name] = cap
            if len(self._caps) > self.CAPS_LIMIT:
                del self._caps[next(iter(self._caps))]
        log.info("%s %s takes max_tokens up to %d; asking again", call.request_id[4:12], name, cap)
        self._try_keys(state, call, target, sink, record)

    def _capped(self, target: Target) -> Target:
        """The target with what refusals have told of its longest answer."""
        cap, facts = self._caps.get(scale_name(target)), target.provider.facts
        if not cap:
            return target
        known = facts.get(target.model, {})
        known = {**known, "max_output": min(cap, known.get("max_output") or cap)}
        return Target(replace(target.provider, facts={**facts, target.model: known}), target.model)

    @staticmethod
    def _prepared(call: Call, target: Target, context: Context) -> Tuple[Any, bytes]:
        """The way there and back, and the body to send; BadRequest, also where it could be parsed only just so."""
        try:
            turn = call.dialect.turn(call, target, context)
            return turn, b"" if turn.local is not None else turn.encode()
        except RecursionError:
            raise BadRequest("the body is nested too deeply") from None

    def _try_keys(self, state: State, call: Call, target: Target, sink: AnswerSink, record: Record) -> None:
        """One target with each of its keys; a key that is refused or limited gives way to the next."""
        provider = target.provider
        if provider.problem:
            raise UpstreamRefused(f"provider {provider.name} is disabled: {provider.problem}", status=403,
                                  type="permission_error", should_retry=False)
        if provider.vision_model and provider.vision_model != target.model and call.shows_images and (
                not profile_of(target)["vision"]):
            target = record.target = Target(provider, provider.vision_model)
        context = Context(time.time(), new_id, self.seal(), self.responses, self.reasoning,
                          lambda estimate: self.scale.scaled(scale_name(target), estimate))
        turn, body = self._prepared(call, self._capped(target) if call.dialect.foreign else target, context)
        if turn.local is not None:
            return sink.end(turn.local_events()) if call.stream else sink.reply(dump_json(turn.local),
                                                                                "application/json", ())
        sink.stream = turn.stream()
        ring = self._rings[provider.name]
        if ring.keys != provider.api_keys:       # reloaded meanwhile: new keys must not go to the old address
            ring = KeyRing(provider.api_keys, self._clock, provider.key_concurrency)
        with self._slots[provider.name].hold(sink, state.settings, provider.name):
            sticky = state.settings.sticky if provider.sticky is None else provider.sticky
            keys = ring.order(call.conversation if sticky and len(ring.keys) > 1 else None)
            for key in keys:
                record.attempts += 1
                started = time.monotonic()
                try:
                    with ring.hold(key, sink, state.settings, provider.name):
                        self._attempt_with_login(state, call, target, key, turn, body, sink, record)
                    self._learn(target, turn, record.usage)
                    record.trail.append(Attempt(provider.name, target.model, mask(key), 200, "",
                                                time.monotonic() - started))
                    return ring.revive(key)
                except UpstreamError as exc:
                    record.trail.append(Attempt(provider.name, target.model, mask(key), exc.status,
                                                one_line(exc.message),
                                                time.monotonic() - started))
                    self.metrics.count("upstream_errors_total",
                                       (("provider", provider.name), ("status", str(exc.status))))
                    if exc.status in KEY_STATUS and not sink.began:
                        rest_s = REFUSED_KEY_REST_S if exc.status != 429 else min(
                            exc.retry_after_s or LIMITED_KEY_REST_S, LONGEST_REST_S)
                        ring.rest(key, rest_s, exc.status != 429)
                        if key != keys[-1]:
                            continue
                    raise self._explained(exc, target, turn) from None

    def _learn(self, target: Target, turn: Any, usage: Usage) -> None:
        """Compare what was estimated with what the upstream counted."""
        if usage.prompt and not usage.estimated and isinstance(turn, TranslatedTurn):
            name = scale_name(target)
            estimate = turn.raw_estimate(self.scale.is_worth(name))
            if estimate:
                self.scale.learn(name, estimate, usage.prompt)
            else:
                self.scale.pass_over(name)

    def count_tokens(self, body: Json, estimate: int) -> int:
        """`estimate` for a Messages request, as the model counts it that the request would go to."""
        try:
            model = body.get("model")
            chain = self.current(look=False).router.resolve(model if isinstance(model, str) else None, True)
        except GatewayError:
            return estimate
        return self.scale.scaled(scale_name(chain[0]), estimate) if chain else estimate

    @staticmethod
    def _explained(exc: UpstreamError, target: Target, turn: Any) -> UpstreamError:
        """An upstream's error as clients have to hear it.

        A prompt too long is recognised, whatever the words.  A refused key is the operator's trouble, not the client's:
        401 and 403 become a 403 that says what to do (Claude Code repeats a 401 for over a minute and shows a 403 at once).
        """
        if isinstance(exc, UpstreamRefused) and exc.status not in (401, 403):
            text = dump_json(exc.body).decode() if exc.body else exc.message
            found = find_overflow(exc.status, text, exc.code, turn.max_output)
            if exc.should_retry is None and is_spent(exc.status, f'"code":{exc.code} {text}'):
                exc.should_retry = False
            if found:
                exc.overflow = found
            if exc.overflow is not None:
                prompt, limit, output = exc.overflow
                exc.overflow = (prompt or turn.estimate, limit or profile_of(target).get("context", 0), output)
                exc.code = exc.code or "context_length_exceeded"
            elif exc.status == 404 and exc.code == "model_not_found" and target.model not in exc.message:
                exc.message = f"the model {target.model} does not exist there: {exc.message}"
        _forget_secrets(exc, target.provider)
        if exc.status == 429 and exc.retry_after_s is None:      # Codex gives up at once on a bare 429
            exc.retry_after_s = DEFAULT_RETRY_AFTER_S
        provider = target.provider
        if exc.status not in (401, 403):
            return exc
        keys = "its key" if provider.api_keys else "a request without a key"
        cure = "log in to iFlow again (python iflow2api.py login)" if provider.name == "iflow" else \
            "check its api_keys in config.json"
        return UpstreamRefused(
            f"provider {provider.name} refused {keys} (HTTP {exc.status}: {one_line(exc.message)}); {cure}, "
            f"then run: python iflow2api.py test {provider.name}", status=403, type="permission_error",
            should_retry=False)

    def _attempt_with_login(self, state: State, call: Call, target: Target, key: str, turn: Any, body: bytes,
                            sink: AnswerSink, record: Record) -> None:
        """An attempt; where iFlow says that the key has ended, the login is refreshed and it is made again."""
        try:
            return self._attempt(state, call, target, key, turn, body, sink, record)
        except UpstreamRefused as exc:
            account = self._account_of(target.provider, key)
            if exc.status != 401 or sink.began or account is None:
                raise
            fresh = self.logins.refresher.renew(account, key, sink)
            if not fresh:
                raise
        record.attempts += 1
        self._attempt(state, call, target, fresh, turn, body, sink, record)

    def _account_of(self, provider: Provider, key: str) -> Optional[str]:
        """The login that a key of the provider iflow comes from, None where it comes from elsewhere."""
        if self.config is None or provider.name != "iflow" or provider.kind != "iflow":
            return None
        keys = {**account_keys(self.settings.accounts), **account_keys({DEFAULT_ACCOUNT: self._login})}
        return next((name for name, known in keys.items() if known.strip() == key), None)

    def _attempt(self, state: State, call: Call, target: Target, key: str, turn: Any, body: bytes, sink: AnswerSink,
                 record: Record) -> None:
        headers = self._headers(state.settings, call, target.provider, key)
        if target.provider.kind == "iflow":
            headers = [*headers, *self.upstream.identity.headers(key, time.time())]
        with self.upstream.open(target.provider, state.settings, "POST", call.dialect.path, headers, body,
                                sink) as exchange:
            if exchange.status >= 300:
                raise self._refusal(exchange, target.provider)
            sink.returned = [(n, v) for n, v in exchange.headers.items() if header_returns(n) and v.isprintable()]
            if call.stream:
                sink.stream = stream = turn.stream()
            if call.stream and "json" not in exchange.content_type:
                try:
                    self._pump(exchange, stream, sink, record)
                finally:
                    record.usage = self._usage(stream.usage, call, stream.records)
                return
            data = exchange.read_all(ANSWER_LIMIT_BYTES)
            completion = self._parse_answer(data, call, exchange.status)
            record.usage = self._usage(usage_of(completion), call, len(data) // 5)
            if call.stream:              # a server that does not stream: its answer becomes one
                sink.end(stream.feed(completion_to_sse(completion)) + stream.close())
            else:
                content_type = "application/json" if call.dialect.foreign else exchange.content_type or "application/json"
                sink.reply(turn.reply(data, completion), content_type, sink.returned)
            record.first_s = time.monotonic() - record.started

    def _pump(self, exchange: Exchange, stream: Any, sink: AnswerSink, record: Record) -> None:
        """Upstream's payload through `stream` to the client, a write for each read, until the answer is whole."""
        def move(payload: bytes) -> bool:
            if stream.passes(payload):
                sink.send(payload, exchange.framed)
                return not stream.done
            out = stream.feed(payload)
            if out:
                if record.first_s is None:
                    record.first_s = time.monotonic() - record.started
                sink.send(out)
            return not stream.done

        try:
            self.upstream.move(exchange, sink, move, stream.is_over)
        except UpstreamGarbled:
            if not stream.began:
                raise
        sink.end(stream.close())         # raises, unless all of an answer came before the connection broke
        if stream.failed:
            record.status, record.error = 502, "the upstream broke off with an error"

    @staticmethod
    def _parse_answer(data: bytes, call: Call, status: int) -> Json:
        """A plain answer's JSON, once it is known to be an answer."""
        try:
            decode = _DECODER.decode if call.dialect.judged else json.loads      # embeddings: floats by the thousand
            completion = decode(data.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            raise UpstreamGarbled("the upstream's answer is not JSON" if data.strip() else
                                  "the upstream's answer is empty") from None
        if call.dialect.judged:
            return check_completion(completion, status)
        refusal = refusal_in(completion, status)
        if refusal or not isinstance(completion, dict):
            raise refusal or UpstreamGarbled("the upstream's answer is no JSON object")
        return completion

    @staticmethod
    def _refusal(exchange: Exchange, provider: Provider) -> UpstreamError:
        """What an answer with an error status stands for; 429 always says when to come back."""
        if exchange.status < 400:
            place = one_line(exchange.headers.get("location", "nowhere"), 120)
            return UpstreamGarbled(f"the upstream redirects to {place}; set base_url to where it really is")
        try:
            data = exchange.read_all(REFUSAL_LIMIT_BYTES)
        except UpstreamError:
            data = b""
        refusal = parse_refusal(exchange.status, exchange.content_type, data)
        if refusal.status == 406 and provider.kind == "iflow":   # unsigned, or a model this key may not use
            refusal.status, refusal.body = 403, None
        said = parse_retry_after(exchange.headers, time.time())
        refusal.retry_after_s = refusal.retry_after_s if said is None else said
        verdict = exchange.headers.get("x-should-retry", "").lower()
        refusal.should_retry = {"true": True, "false": False}.get(verdict)
        return refusal

    @staticmethod
    def _headers(settings: Settings, call: Call, provider: Provider, key: str) -> List[Tuple[str, str]]:
        """The provider's own headers, the key, and of a chat client's what is meant for the upstream."""
        headers: Dict[str, Tuple[str, str]] = {"user-agent": ("User-Agent", f"iflow2api/{__version__}")}
        if provider.kind == "iflow":
            headers.clear()              # its own, and nothing of the client's
        elif not call.dialect.foreign:
            ours = settings.custom_auth_header.lower()
            for name, value in call.headers.items():
                if not header_stays(name) and name != ours and value.isprintable():
                    headers[name] = (name, value)
        if key:
            headers["authorization"] = ("Authorization", "Bearer " + key)
        headers.update((name.lower(), (name, value)) for name, value in provider.headers)
        return list(headers.values())

    @staticmethod
    def _usage(raw: Optional[Json], call: Call, records: int) -> Usage:
        """The upstream's counts, else an estimate that is marked as one: a record is about a token."""
        if raw:
            return parse_usage(raw)
        return Usage(prompt=len(call.text) // 4, completion=records, estimated=True)

    def _note(self, record: Record, call: Call) -> None:
        record.total_s = time.monotonic() - record.started
        settings = self.settings
        counts, target = record.counts(), record.target
        model, provider = (target.model[:100], target.provider.name) if target else ("", "")
        if call.meters:
            self.limiter.spend(call.meters, counts[2] + counts[3])
        if settings.usage:
            self.usage.add(model, provider, record.key, counts, settings.usage_days)
        self.series.add(model, provider, record.key, counts)
        self.live.requests.add(record)
        self.live.ring()
        labels = (("dialect", record.dialect), ("provider", provider))
        self.metrics.count("requests_total", (*labels, ("status", str(record.status))))
        self.metrics.observe("request_duration_seconds", labels, record.total_s)
        if record.first_s is not None:
            self.metrics.observe("first_token_seconds", labels, record.first_s)
        if record.status == 200:
            source = (("provider", provider), ("estimated", str(record.usage.estimated).lower()))
            self.metrics.count("tokens_total", (("direction", "in"), *source), record.usage.prompt)
            self.metrics.count("tokens_total", (("direction", "out"), *source), record.usage.completion)
        if log.isEnabledFor(logging.INFO):
            log.info("%s", record.line())

    # what is there

    def models(self, key: Optional[ClientKey] = None, more: Collection[str] = ()) -> List[Json]:
        """All names that can be asked for, each with the provider it leads to; nothing that would not be routed.

        With a client's `key` those that it may use.  `more`: names to list, too, if they are redirected.
        """
        router = self.current().router
        found = {name: router.resolve(name, True)[0].provider.name for name in more
                 if router.redirects(name) and router.default is not None}
        for pattern, branches in router.aliases:
            if not re.search(r"[*?\[]", pattern):
                first = branches[0].models[0]
                found.setdefault(pattern, first.partition("/")[0] if "/" in first else "")
        lists = self._fetch_lists([p for p in router.providers.values() if not p.problem and p.kind != "iflow"])
        for provider in router.providers.values():
            for model in provider.models:
                claimed = router.claimed(model)
                plain = claimed is not None and claimed.provider is provider
                found.setdefault(model if plain else f"{provider.name}/{model}", provider.name)
        for name, models in lists.items():
            for model in models:
                plain = router.default is not None and name == router.default.name and not router.claimed(model)
                if plain or model not in router.providers[name].models:
                    found.setdefault(model if plain else f"{name}/{model}", name)
        created = int(self.started_at)
        if key is not None and key.models:
            found = {model: owner for model, owner in found.items() if may_use(key, model, router.resolve(model, model in more))}
        return [{"id": model, "object": "model", "created": created, "owned_by": owner or "iflow2api"}
                for model, owner in found.items()]

    def target_of(self, name: str) -> Optional[Target]:
        """Where a request of Messages for the model would go first."""
        try:
            return next(iter(self.current(look=False).router.resolve(name, True, Asked("messages"))), None)
        except GatewayError:
            return None

    def vision_models(self, key: Optional[ClientKey] = None) -> List[Json]:
        """Of models() those that are known to take images."""
        seeing = set()
        for provider in self.state.router.providers.values():
            for model in provider.models:
                if provider.facts.get(model, {}).get("vision") or model == provider.vision_model:
                    seeing |= {model, f"{provider.name}/{model}"}
        return [model for model in self.models(key) if model["id"] in seeing]

    def _fetch_lists(self, providers: Sequence[Provider]) -> Dict[str, List[str]]:
        """What the providers themselves list, from the cache where it is fresh; a provider that fails lists nothing."""
        now = time.monotonic()
        missing = [p for p in providers if self._lists.get(p.name, (0.0,))[0] < now]
        threads = [threading.Thread(target=self._fetch_list, args=(p, now), daemon=True) for p in missing]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * MODELS_TIMEOUT_S)
        return {p.name: self._lists[p.name][1] for p in providers if p.name in self._lists}

    def _fetch_list(self, provider: Provider, now: float) -> None:
        try:
            names = self.fetch_models(provider)
            self._lists[provider.name] = (now + MODELS_TTL_S, names)
        except GatewayError as exc:
            log.debug("no model list from %s: %s", provider.name, one_line(exc.message))
            kept = self._lists.get(provider.name, (0.0, []))[1]
            self._lists[provider.name] = (now + MODELS_TTL_S / 10, kept)

    def fetch_models(self, provider: Provider) -> List[str]:
        """The provider's own `/models`; UpstreamError."""
        settings = replace(self.settings, connect_timeout_s=min(self.settings.connect_timeout_s, MODELS_TIMEOUT_S))
        key = self._rings[provider.name].order()[0] if provider.name in self._rings else ""
        headers = [*provider.headers, *([("Authorization", "Bearer " + key)] if key else [])]
        with self.upstream.open(provider, settings, "GET", "/models", headers, None, NOBODY,
                                MODELS_TIMEOUT_S) as exchange:
            if exchange.status != 200:
                raise self._refusal(exchange, provider)
            return parse_model_list(exchange.read_all(8 << 20))

    def explain(self, body: Json) -> Json:
        """Where a model's name goes, step by step; `body` has `model` and what conditions ask: dialect, tokens, images, …

        With `aliases` it says where the name would go with those, and `problems` what is wrong with them.
        """
        wrong = [name for name, kind in _EXPLAINED.items() if name in body and (
            not isinstance(body[name], kind) or isinstance(body[name], bool) is not (kind is bool))]
        if wrong:
            raise BadRequest(f"{wrong[0]}: {_KIND_NAME[_EXPLAINED[wrong[0]].__name__]} expected", param=wrong[0])
        dialect = body.get("dialect", "chat")
        if dialect not in ("chat", "messages", "responses"):
            raise BadRequest("dialect: chat, messages or responses expected", param="dialect")
        asked = Asked(dialect, body.get("tokens", 0), body.get("images", False), body.get("thinking", False),
                      body.get("tools", False))
        state = self.current(look=False)
        router = state.router
        if "aliases" in body:
            router = self.routed(replace(state.settings, aliases=body["aliases"]))
        steps, targets = router.explain(body.get("model"), dialect != "chat", asked)
        told = {"model": body.get("model"), "steps": steps, "chain": [self._told(target) for target in targets]}
        return {**told, **({"problems": [p for p in router.problems if p not in state.router.problems]}
                           if "aliases" in body else {})}

    def _told(self, target: Target) -> Json:
        """What there is to know of a target before anybody asks it."""
        provider = target.provider
        return {"provider": provider.name, "model": target.model, "base_url": provider.base_url,
                "usable": not provider.problem,
                "problem": provider.problem, "circuit": self._circuits[provider.name].state,
                "keys": len(provider.api_keys),
                "keys_resting": self._rings[provider.name].resting, "vision_model": provider.vision_model}

    def queues(self) -> List[Json]:
        """Who is asked and who waits, at each upstream."""
        return [{"provider": name, "active": slots.active, "waiting": slots.waiting, "limit": slots.limit}
                for name, slots in self._slots.items() if name in self.current(look=False).router.providers]

    def circuit_of(self, provider: Provider) -> str:
        return self._circuits[provider.name].state

    def key_states(self, provider: Provider) -> List[Tuple[str, float]]:
        """KeyRing.state of each of its keys."""
        return [self._rings[provider.name].state(key) for key in provider.api_keys]

    def history(self) -> List[Json]:
        """The last requests, the newest first: route, attempts, counts; no bodies."""
        return [record.facts() for _, record in reversed(self.live.requests.after(0, 10 ** 6)[1])]

    def health(self) -> Json:
        """The body of /health: nothing in it is secret."""
        providers = [{"name": p.name, "kind": p.kind, "usable": not p.problem,
                      **({"problem": p.problem} if p.problem else {}),
                      "circuit": self._circuits[p.name].state, "keys_resting": self._rings[p.name].resting,
                      "models": len(p.models)} for p in self.current(look=False).router.providers.values()]
        logins = self.login_report()
        healthy = any(p["usable"] for p in providers) and not self.config_broken and not any(
            login["ended"] for login in logins.values())
        return {"status": "healthy" if healthy else "degraded", "iflow_logged_in": self._is_logged_in(),
                "version": __version__,
                "uptime_s": int(time.time() - self.started_at), "in_flight": self.in_flight, "providers": providers,
                "logins": logins,
                "problems": [one_line(p) for p in self.problems]}

    def _is_logged_in(self) -> bool:
        iflow = self.state.router.providers.get("iflow")
        return iflow is not None and not iflow.problem and bool(iflow.api_keys)

    def metrics_text(self) -> str:
        gauges: List[Tuple[str, str, Mapping[str, Any], float]] = [
            ("info", "The program.", {"version": __version__}, 1),
            ("start_time_seconds", "When it started.", {}, self.started_at),
            ("in_flight", "Requests being answered.", {}, self.in_flight)]
        for family, text, attribute in (("upstream_active", "Requests at an upstream.", "active"),
                                        ("upstream_waiting", "Requests queued for an upstream.", "waiting")):
            gauges += [(family, text, {"provider": name}, getattr(slots, attribute)) for name,
                       slots in self._slots.items()]
        gauges += [("keys_resting", "Keys put to rest.", {"provider": name}, ring.resting) for name,
                   ring in self._rings.items()]
        gauges += [("upstream_rested",
                    "1 while an upstream that kept failing rests, 0.5 until it has been tried again.",
                    {"provider": name}, {"closed": 0, "half-open": 0.5, "open": 1}[circuit.state])
                   for name, circuit in self._circuits.items()]
        return self.metrics.render(gauges + self._login_gauges())

    def login_report(self) -> Dict[str, Json]:
        """Refresher.report for the logins in force."""
        accounts = {name: login for name, login in self.settings.accounts.items() if isinstance(login, dict)}
        in_force = {DEFAULT_ACCOUNT: self._login, **accounts} if "providers" not in self.flags else {}
        return self.logins.refresher.report(in_force)

    def _login_gauges(self) -> List[Tuple[str, str, Mapping[str, Any], float]]:
        gauges: List[Tuple[str, str, Mapping[str, Any], float]] = []
        report = self.login_report()
        for family, text, name in (("login_expires_at_seconds", "When a login has to be refreshed.", "expires_at"),
                                   ("login_refreshed_at_seconds", "When a refresh was last tried.", "refreshed_at"),
                                   ("login_refresh_ok", "Whether the last refresh worked.", "refresh_ok"),
                                   ("login_ended", "Whether only a new login helps.", "ended")):
            for account, login in report.items():
                value = parse_time(login[name]) if name.endswith("_at") else login[name]
                if value is not None:
                    gauges.append((family, text, {"account": account}, float(value)))
        return gauges

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self.logins.close()
        self.upstream.close()
        self.usage.close()
        self.scale.close()


# --- trying a provider ---------------------------------------------------------

class Collect(AnswerSink):
    """Keeps an answer: for our own requests."""
    data = b""

    def reply(self, data: bytes, content_type: str, headers: Sequence[Tuple[str, str]]) -> None:
        self.began, self.data = True, data

    def send(self, payload: bytes, framed: Optional[bytes] = None) -> None:
        self.began, self.data = True, self.data + payload

    def end(self, payload: bytes) -> None:
        self.send(payload)


def ask_provider(gateway: Gateway, provider: Provider, model: str, key: Optional[ClientKey] = None,
                 **more: Any) -> Json:
    """The message of a tiny real request; of a streamed one {}.  `key` is whose usage it is.  GatewayError."""
    limit = profile_of(Target(provider, model))["max_tokens_field"]
    body = {"model": f"{provider.name}/{model}", limit: 512 if "tools" in more else 16,
            "messages": [{"role": "user", "content": "Say hi."}], **more}
    sink = Collect()
    gateway.answer(Call(CHAT, body, dump_json(body).decode(), {}, new_id("req_"), key), sink)
    return {} if body.get("stream") else first_choice(json.loads(sink.data)).get("message") or {}


def model_to_try(gateway: Gateway, provider: Provider) -> str:
    """A model to try: the default one if it is this provider's, its first configured one, or the first it lists."""
    if provider.problem:
        raise NotLoggedIn(provider.problem)
    router = gateway.current().router
    if router.default_model and (gateway.settings.default_model in provider.models or provider is router.default):
        head, slash, rest = router.default_model.partition("/")
        return rest if slash and head == provider.name else router.default_model
    if provider.models:
        return provider.models[0]
    listed = [model for model in gateway.fetch_models(provider) if "embed" not in model]
    if not listed:
        raise UpstreamGarbled("it lists no models; name one in its `models`, or with --model")
    return listed[0]


#: What is at fault, by the status that a trial ends with, and which check that is.
FAULTS = {401: ("key", "the key"), 402: ("key", "the balance"), 403: ("key", "the key"), 404: ("model", "the model"),
          429: ("key", "the rate limit"), 502: ("reach", "the connection"), 504: ("reach", "the connection")}

PROBE_TOOL = {"type": "function", "function": {
    "name": "report", "description": "Report a number.",
    "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}}}


CHECKS = ("reach", "key", "model", "stream", "tools")


class Check(NamedTuple):
    """One thing tried at a provider: `ok` None means that it came to nothing, for something before it failed."""
    what: str
    ok: Optional[bool] = None
    message: str = ""
    took_s: float = 0.0


def examine(gateway: Gateway, provider: Provider, key: Optional[ClientKey] = None) -> List[Check]:
    """Reach, key, model, stream and tools of one provider (CHECKS); without an answer there is nothing more to try."""
    started = time.monotonic()
    try:
        model = model_to_try(gateway, provider)
        ask_provider(gateway, provider, model, key)
    except GatewayError as exc:
        failed, fault = ("reach", "its settings") if provider.problem else FAULTS.get(exc.status, (
            "model", f"HTTP {exc.status}"))
        at = CHECKS.index(failed)
        return [*(Check(what, True) for what in CHECKS[:at]),
                Check(failed, False, f"{fault}: {one_line(exc.message, 300)}", time.monotonic() - started),
                *(Check(what) for what in CHECKS[at + 1:])]
    took_s = time.monotonic() - started
    checks = [Check("reach", True), Check("key", True, "key ok" if provider.api_keys else "needs no key"),
              Check("model", True, f"model {model} ok ({took_s:.1f} s)", took_s)]
    tool_request = {"tools": [PROBE_TOOL],
                    "messages": [{"role": "user", "content": "Call the tool report with the number 7."}]}
    for what, more in (("stream", {"stream": True}), ("tools", tool_request)):
        started = time.monotonic()
        try:
            message = ask_provider(gateway, provider, model, key, **more)
            lazy = what == "tools" and not message.get("tool_calls")
            said = "tools taken, but none called" if lazy else f"{what} ok"
            checks.append(Check(what, True, said, time.monotonic() - started))
        except GatewayError as exc:
            said = f"{what} failed ({exc.status}: {one_line(exc.message, 160)})"
            checks.append(Check(what, False, said, time.monotonic() - started))
    return checks


# --- logging out ----------------------------------------------------------------

def remove_login(gateway: Gateway, account: str) -> bool:
    """Take a login away, and nothing else of its file; whether there was one.  LoginFailed, ConfigBroken, OSError."""
    file, gone = LoginFile(account, gateway.config), False
    login = file.read()
    foreign = login.get("selectedAuthType") == "openai-compatible"               # another service's key is not ours
    fields = [name for name in LOGIN_FIELDS if not (foreign and name.endswith("piKey"))]
    if any(name in login for name in fields):
        with file.held():
            file.update(dict.fromkeys(login if not file.is_default else fields))
        gone = True
    if file.is_default and gateway.config and gateway.config.read().get("api_key"):
        gateway.config.change(lambda raw: raw.pop("api_key", None))
        gone = True
    return gone


def log_path(gateway: Gateway) -> str:
    """Where log_file is, "" if it is not set; a relative one stands in the folder of config.json."""
    path = os.path.expanduser(gateway.settings.log_file)
    return os.path.join(gateway.config.folder if gateway.config is not None else "", path) if path else ""


# === 14. HTTP ================================================================

class ClientReader(HeadReader):
    """A client's bytes, with a moment by which they have to come: http.server's rfile."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self.deadline = sock, 0.0
        self._poller: Any = None

    def _receive(self) -> bytes:
        while True:
            try:
                return self._sock.recv(65536)
            except BlockingIOError:
                if not self._readable():
                    raise socket.timeout("the client is too slow") from None

    def _readable(self) -> bool:
        if self._poller is None:
            self._poller = Poller()
            self._poller.register(self._sock.fileno(), _POLLIN)
        return bool(self._poller.poll(max(0.0, self.deadline - time.monotonic()) * 1000))

    def read_request_head(self) -> bytes:
        """A request's head; BadRequest, ClientGone.  Stray empty lines after a body are skipped (RFC 9112, 2.2)."""
        head = self.read_head(b"\r\n")
        if head is None:
            raise BadRequest("the request's head is too large", status=431)
        if not head:
            raise ClientGone
        return head

    def wait(self, seconds: float) -> bool:
        """Whether a first byte comes in time; False at the end of the connection, too."""
        self.deadline = time.monotonic() + seconds
        if not self._buffer:
            try:
                self._buffer = self._receive()
            except OSError:
                return False
        return bool(self._buffer)

    def read_body(self, size: int, timeout_s: float) -> bytes:
        """Exactly `size` bytes; the time allowed grows with what came.  BadRequest when the client stops."""
        parts, got, start = [], 0, time.monotonic()
        while got < size:
            self.deadline = start + timeout_s + got / BODY_BYTES_PER_S
            piece = self.take()
            if not piece:
                raise ClientGone
            parts.append(piece)
            got += len(piece)
        body = b"".join(parts)
        self.put_back(body[size:])
        return body[:size] if len(body) > size else body

    def put_back(self, data: bytes) -> None:
        """What was read too much: it belongs to the next request."""
        self._buffer = data


_REQUEST_LINE = re.compile(r"([A-Z]{1,20}) (\S{1,16000}) HTTP/1\.([01])")
_FIELD = re.compile(r"(?m)^([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00\r\n]*?)[ \t]*\r?$")


def parse_head(head: bytes) -> Tuple[str, str, str, Dict[str, str]]:
    """Method, target, version and headers (names in lower case, repeated ones joined) of a request; BadRequest.

    Stricter than http.server, whose parser for e-mail lets folded lines and blanks before the colon pass: what a
    proxy before us might read in another way is refused.
    """
    first, _, rest = head.decode("latin-1").partition("\n")
    found = _REQUEST_LINE.fullmatch(first.rstrip("\r"))
    if not found:
        if re.search(r" HTTP/\d", first) and not re.search(r" HTTP/1\.[01]\r?$", first):
            raise BadRequest("this server speaks HTTP/1.1", status=505)
        raise BadRequest("the request line is malformed or too long", status=414 if len(first) > 16000 else 400)
    lines = rest.count("\n") + bool(rest)
    if lines > HEADERS_LIMIT:
        raise BadRequest("too many headers", status=431)
    pairs = _FIELD.findall(rest)
    if len(pairs) != lines:              # no line may be anything else
        raise BadRequest("the request's head is malformed")
    headers: Dict[str, str] = {}
    for name, value in pairs:
        name = name.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return found.group(1), found.group(2), "HTTP/1." + found.group(3), headers


def check_framing(headers: Mapping[str, str], version: str) -> Optional[int]:
    """The body's length, None for chunked; BadRequest where a proxy before us might see another one (RFC 9112, 6.3)."""
    if version == "HTTP/1.1" and not re.fullmatch(r"[^\s,/@]+", headers.get("host", "")):
        raise BadRequest("one Host header is needed")
    length = headers.get("content-length")
    if "transfer-encoding" in headers:
        if length is not None or version == "HTTP/1.0" or headers["transfer-encoding"].lower() != "chunked":
            raise BadRequest("Transfer-Encoding must be chunked alone, without Content-Length and with HTTP/1.1")
        return None
    if length is not None and not (length.isdigit() and length.isascii() and len(length) < 19):
        raise BadRequest("Content-Length must be one number")
    return int(length or 0)


@lru_cache(2)
def http_date(at: int) -> str:
    return formatdate(at, usegmt=True)


class Handler(http.server.BaseHTTPRequestHandler):
    """One client connection.  Reads heads strictly, finds the endpoint, turns errors into bytes."""
    server: "Server"
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"iflow2api/{__version__}", ""

    # the connection

    def setup(self) -> None:
        self.connection = self.request
        self.connection.setblocking(False)
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rfile = self.reader = ClientReader(self.connection)     # type: ignore[assignment]
        self.close_connection, self.busy = True, False
        self.is_surplus = self.server.enter(self)

    def finish(self) -> None:
        """Nothing to flush: every write went to the socket."""
        self.server.leave(self)

    def handle(self) -> None:
        try:
            wait_s = self.server.gateway.settings.header_timeout_s
            while self.reader.wait(wait_s) and not self.server.closing.is_set():
                self.busy = True
                self.handle_one_request()
                self.busy = False
                if self.close_connection or self.server.closing.is_set():
                    break
                wait_s = CLIENT_IDLE_S
        except (ClientGone, OSError):
            pass                         # it left; what it had asked for is noted where it was answered

    def handle_one_request(self) -> None:
        """One request: head, checks, endpoint; any error that comes up becomes an answer here."""
        self.request_id, self.close_connection = new_id("req_"), True
        self.headers: Dict[str, str] = {}                # type: ignore[assignment]
        self.path, self.command, self.request_version = "", "", "HTTP/1.1"
        self.endpoint, self._body_left = UNKNOWN, 0
        self.key: Optional[ClientKey] = None
        self.session: Optional[Session] = None
        self.meters: Sequence[Meter] = ()
        self.sink: Optional[Sink] = None
        started = time.monotonic()
        try:
            self.reader.deadline = started + self.server.gateway.settings.header_timeout_s
            head = self.reader.read_request_head()
            self.command, self.path, self.request_version, self.headers = parse_head(head)
            self._serve()
        except GatewayError as exc:
            self.send_error_of(exc)
            log.log(logging.INFO if self.sink is None and self.path != "/favicon.ico" else logging.DEBUG,
                    "%s %s %s %d (%s)", self.request_id[4:12], self.command, one_line(self.path.split("?")[0], 80),
                    self.endpoint.dialect.status(exc), one_line(exc.message, 200))
        except socket.timeout:
            self._fail_reading(BadRequest("the request did not arrive in time", status=408, code="request_timeout"))
        except (ClientGone, OSError):
            self.close_connection = True
        except RecursionError:
            self._fail_reading(BadRequest("the body is nested too deeply"))
        except Exception:                # the last resort: a defect of ours must not look like an answer
            log.exception("%s failed", self.request_id)
            self._fail_reading(GatewayError("iflow2api failed on this request; its log says why"))
        if self.close_connection:
            self._linger()

    def _fail_reading(self, exc: GatewayError) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError, ClientGone):
            self.send_error_of(exc)

    def log_message(self, format: str, *args: Any) -> None:
        """http.server's own log lines; ours are written where an answer ends."""

    def _linger(self) -> None:
        """Close without a reset, which would destroy an answer still on its way to a client still sending."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.reader.deadline = time.monotonic() + LINGER_S
            while self.reader.take() and time.monotonic() < self.reader.deadline:
                pass

    # one request

    def _serve(self) -> None:
        self.endpoint = dialect_of(self.path, self.headers)
        self.close_connection = True                     # until the framing is known to be sound
        length = check_framing(self.headers, self.request_version)
        self._body_left = -1 if length is None else length
        if not self.path.startswith("/") or self.path.startswith("//"):
            raise BadRequest("the request target must be a path")
        self.close_connection = self._wants_close()
        self._continue = self.headers.get("expect", "").lower() == "100-continue" and self.request_version != "HTTP/1.0"
        if self.headers.get("upgrade", "").lower() == "websocket":
            raise BadRequest("this server speaks no WebSocket; use plain HTTP", status=426, should_retry=False)
        if self.server.closing.is_set() or self.is_surplus:
            self.close_connection = True
            raise Busy("the server is shutting down" if self.server.closing.is_set() else
                       "too many connections; raise max_connections")
        self.endpoint, self.argument = find_endpoint(self.command, self.path, self.headers)
        check_origin(self.server, self.headers, self.command)
        if self.command == "OPTIONS":
            return self.respond(204, b"", "")
        if self.endpoint.admin:
            check_own_page(self.headers)
            self.session = None if self.endpoint.public else check_session(self)
        elif not self.endpoint.public:
            self.key = check_key(self.server.gateway.state, self.headers)
            if self.server.gateway.state.door.limited:
                self.meters = meters_of(self)
        self.endpoint.run(self)
        if self._body_left:              # an endpoint that wants no body got one
            self._skip_body()

    def _wants_close(self) -> bool:
        tokens = {token.strip().lower() for token in self.headers.get("connection", "").split(",")}
        return "close" in tokens or self.request_version == "HTTP/1.0" and "keep-alive" not in tokens

    def _skip_body(self) -> None:
        """Read a small body nobody wanted, so that the connection can be kept; otherwise it is closed."""
        if 0 < self._body_left <= 65536 and not self._continue and not self.close_connection:
            with contextlib.suppress(OSError, ClientGone):
                self.reader.read_body(self._body_left, 1)
                self._body_left = 0
                return
        self.close_connection = True

    def read_body(self, limit: int = 0) -> bytes:
        """The request's body, unpacked; BadRequest 411, 413, 415 or 400 where it can't be had."""
        limit = limit or self.server.gateway.settings.body_limit_bytes
        if self.headers.get("content-type", "").lower().startswith("multipart/"):
            raise BadRequest("a JSON body is expected, not multipart", status=415)
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise BadRequest(f"Content-Encoding {one_line(encoding, 40)} is not known; gzip and deflate are",
                             status=415)
        if "content-length" not in self.headers and self._body_left >= 0:
            raise BadRequest("Content-Length or Transfer-Encoding: chunked is needed", status=411)
        if self._body_left > limit:
            raise too_large(limit)
        if self._continue:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._continue = False
        timeout_s = self.server.gateway.settings.body_timeout_s
        body = self._read_chunked(limit, timeout_s) if self._body_left < 0 else \
            self.reader.read_body(self._body_left, timeout_s)
        self._body_left = 0
        return body if encoding in ("identity", "") else inflate(body, limit)

    def _read_chunked(self, limit: int, timeout_s: float) -> bytes:
        dechunker, parts, size, start = Dechunker(), [], 0, time.monotonic()
        while not dechunker.done:
            self.reader.deadline = start + timeout_s + size / BODY_BYTES_PER_S
            data = self.reader.take()
            if not data:
                raise ClientGone
            try:
                parts.append(dechunker.feed(data))
            except ValueError as exc:
                raise self._distrust(BadRequest(f"the chunked body is broken: {exc}")) from None
            size += len(parts[-1])
            if size > limit:
                raise self._distrust(too_large(limit))
        self.reader.put_back(dechunker.surplus)
        return b"".join(parts)

    def _distrust(self, exc: BadRequest) -> BadRequest:
        self.close_connection = True
        return exc

    @property
    def has_body(self) -> bool:
        return self._body_left != 0

    def read_json(self) -> Tuple[Json, str]:
        return parse_body(self.read_body())

    # answers

    def head(self, status: int, headers: Iterable[Tuple[str, str]]) -> bytes:
        """An answer's head, with what every answer has."""
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Error')}", f"Server: {self.server_version}",
                 f"Date: {http_date(int(time.time()))}", f"x-request-id: {self.request_id}"]
        if self.endpoint.dialect.name == "messages":
            lines.append(f"request-id: {self.request_id}")
        lines += cors_lines(self.headers, self.path, self.command == "OPTIONS")
        if self.endpoint.admin:
            lines += ["Cache-Control: no-store", "X-Content-Type-Options: nosniff"]
        if self.meters:                  # ours instead of the upstream's, which are about another key
            ours = self.server.gateway.limiter.headers(self.meters)
            headers = [*ours, *(pair for pair in headers if not ours or not pair[0].lower().startswith("x-ratelimit-"))]
        lines += [f"{name}: {value}" for name, value in headers]
        if self.close_connection or self.server.closing.is_set():
            lines.append("Connection: close")
        elif self.request_version == "HTTP/1.0":
            lines.append("Connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def respond(self, status: int, body: bytes, content_type: str, headers: Iterable[Tuple[str, str]] = ()) -> None:
        """A whole answer in one write."""
        if self._body_left:
            self._skip_body()
        own = [] if status in (204, 304) else [("Content-Type", content_type), ("Content-Length", str(len(body)))]
        self.write(self.head(status, [*own, *headers]) + (b"" if self.command == "HEAD" else body))

    def respond_json(self, value: Json, status: int = 200, headers: Iterable[Tuple[str, str]] = ()) -> None:
        self.respond(status, dump_json(value), "application/json", headers)

    def respond_static(self, body: bytes, content_type: str, headers: Iterable[Tuple[str, str]] = ()) -> None:
        """A page that seldom changes: packed where that is accepted, and not at all where the client has it already."""
        tag, packed = pack_static(body)
        own = [("ETag", tag), ("Cache-Control", "no-cache"), ("Vary", "Accept-Encoding"),
               ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"), *headers]
        if tag in self.headers.get("if-none-match", ""):
            return self.respond(304, b"", "", own)
        if re.search(r"\bgzip\b(?!\s*;\s*q=0(?![.\d]*[1-9]))", self.headers.get("accept-encoding", "")):
            body, own = packed, [*own, ("Content-Encoding", "gzip")]
        self.respond(200, body, content_type, own)

    def send_error_of(self, exc: GatewayError) -> None:
        """The one place where an error becomes bytes: as an answer, or within a stream that has begun."""
        if self.sink is not None and self.sink.open:
            return self.sink.fail(exc)
        status = self.endpoint.dialect.status(exc)
        headers: List[Tuple[str, str]] = []
        if exc.retry_after_s is not None:
            headers.append(("Retry-After", str(max(1, int(exc.retry_after_s + 0.999)))))
        if exc.should_retry is not None:
            headers.append(("x-should-retry", str(exc.should_retry).lower()))
        if exc.allow:
            headers.append(("Allow", ", ".join(exc.allow)))
        if status == 426:
            headers.append(("Upgrade", "HTTP/1.1"))
        if status == 401:
            headers.append(("WWW-Authenticate", "Bearer"))
        self.respond_json(self.endpoint.dialect.error(exc, self.request_id), status, headers)

    def write(self, data: bytes) -> None:
        """Everything to the client, or ClientGone."""
        send_all(self.connection, data, self.server.gateway.settings.write_timeout_s)


@lru_cache(8)
def pack_static(body: bytes) -> Tuple[str, bytes]:
    """A page's ETag, weak since it stands for the packed form as well, and that form."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)      # 16 + 15: gzip
    return f'W/"{hashlib.sha256(body).hexdigest()[:24]}"', packer.compress(body) + packer.flush()


def send_now(sock: socket.socket, data: bytes) -> bytes:
    """Write what goes to a non-blocking socket, mostly all; the rest.  ClientGone."""
    try:
        sent = sock.send(data)
    except BlockingIOError:
        return data
    except OSError:
        raise ClientGone from None
    return data[sent:]


def send_all(sock: socket.socket, data: bytes, timeout_s: float) -> None:
    """Write all to a non-blocking socket; ClientGone when it is closed or takes nothing."""
    rest = send_now(sock, data)
    if rest:
        poller = Poller()
        poller.register(sock.fileno(), _POLLOUT)
    view = memoryview(rest)
    while view:
        if not poller.poll(timeout_s * 1000):
            raise ClientGone
        try:
            view = view[sock.send(view):]
        except BlockingIOError:
            continue
        except OSError:
            raise ClientGone from None


def too_large(limit: int) -> BadRequest:
    return BadRequest(f"the body is larger than {limit} bytes (body_limit_bytes)", status=413, code="request_too_large")


def inflate(body: bytes, limit: int) -> bytes:
    """A gzip or deflate body unpacked, never beyond `limit` bytes; raw deflate is taken too, as browsers do."""
    for window in (47, -15):
        unpacker = zlib.decompressobj(window)
        try:
            data = unpacker.decompress(body, limit + 1)
        except zlib.error:
            continue
        if len(data) > limit:
            raise too_large(limit)
        if unpacker.eof:
            return data
    raise BadRequest("the body can't be decompressed as its Content-Encoding says")


class Sink(AnswerSink):
    """The client's side of one answer.  The head of a stream goes out with its first bytes, be it a keep-alive."""

    def __init__(self, handler: Handler, call: Call) -> None:
        settings = handler.server.gateway.settings
        self._handler, self._call = handler, call
        self.sock = handler.connection
        self.tick_s = settings.keepalive_s if call.stream else 3600.0
        self._timeout_s = settings.write_timeout_s
        self._chunked = handler.request_version != "HTTP/1.0"
        self.open = False                #: the head is out, and with it the chance of a status
        self.wrote_at = time.monotonic()

    def _head(self) -> bytes:
        """The head of a stream, once."""
        if self.open:
            return b""
        self.open = True
        handler = self._handler
        framing = [("Transfer-Encoding", "chunked")] if self._chunked else []
        handler.close_connection = handler.close_connection or not self._chunked
        return handler.head(200, [("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache"),
                                  ("X-Accel-Buffering", "no"), *framing, *self.returned])

    def _frame(self, payload: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(payload), payload) if self._chunked and payload else payload

    def _write(self, data: bytes) -> None:
        data = self.backlog + data if self.backlog else data
        if self.pumped:
            self.backlog = send_now(self.sock, data)
        else:
            self.backlog = b""
            send_all(self.sock, data, self._timeout_s)
        self.wrote_at = time.monotonic()

    def flush(self) -> None:
        rest = send_now(self.sock, self.backlog)
        if len(rest) < len(self.backlog):
            self.backlog, self.wrote_at = rest, time.monotonic()

    def is_stuck(self, now: float) -> bool:
        return now - self.wrote_at >= self._timeout_s

    def send(self, payload: bytes, framed: Optional[bytes] = None) -> None:
        if self.began:
            self._write(framed if framed is not None and self._chunked else self._frame(payload))
            return
        self.began = True
        self._write(self._head() + self._frame(payload))

    def end(self, payload: bytes) -> None:
        self.began = True
        last = b"0\r\n\r\n" if self._chunked else b""
        self._write(self._head() + self._frame(payload) + last)

    def reply(self, data: bytes, content_type: str, headers: Sequence[Tuple[str, str]]) -> None:
        self.began = True
        self._handler.respond(200, data, content_type, headers)

    def tick(self) -> None:
        if self._call.stream and time.monotonic() - self.wrote_at >= self.tick_s * 0.99:
            self._write(self._head() + self._frame(self._call.dialect.keepalive(self._call, self.began)))

    def fail(self, exc: GatewayError) -> None:
        """An error in the dialect's own words within the stream; then the connection ends."""
        self._handler.close_connection = True
        if self.stream is not None:
            return self.end(self.stream.fail(exc))
        self.end(self._call.dialect.error_event(exc, self._call.request_id))


# --- who may talk to us ------------------------------------------------------

def check_origin(server: "Server", headers: Mapping[str, str], method: str) -> None:
    """Forbidden for a Host that is not this machine's (DNS rebinding) and for a foreign web page without a key."""
    settings = server.gateway.settings
    host = headers.get("host", "")
    name = (re.sub(r":\d*$", "", host) if not host.startswith("[") else host.partition("]")[0] + "]").lower()
    door = server.gateway.state.door
    if server.is_local and not door.required and not (
            is_loopback(name) or name in ("host.docker.internal", "")
            or name in [str(host).lower() for host in settings.allowed_hosts]):
        raise Forbidden(f"Host {one_line(name, 80)!r} is not this machine; add it to `allowed_hosts`, or set custom_api_key",
                        code="host_not_allowed")
    origin = headers.get("origin")
    if origin is None or method == "OPTIONS" or origin in settings.allowed_origins or "*" in settings.allowed_origins:
        return
    if origin.partition("://")[2].lower() == host.lower() or door.required and door.find(client_keys(settings,
                                                                                                     headers)):
        return
    raise Forbidden(f"the web page at {one_line(origin, 80)} may not call this server; add it to `allowed_origins`"
                    + (", or send the key" if door.required else ""), code="origin_not_allowed")


def client_keys(settings: Settings, headers: Mapping[str, str]) -> Iterator[str]:
    """Every key that a request bears, wherever clients put it."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield token.strip()
    for name in ("x-api-key", "api-key", settings.custom_auth_header.lower()):
        value = headers.get(name, "") if name else ""
        if value:
            yield value.strip()
            yield value.partition(" ")[2].strip()        # a custom header may say Bearer too


def check_key(state: State, headers: Mapping[str, str]) -> Optional[ClientKey]:
    """Whose request it is, None where no key is needed; Unauthorized."""
    if not state.door.required:
        return None
    given = list(client_keys(state.settings, headers))
    key = state.door.find(given)
    ours = "custom_api_key" if state.settings.custom_api_key else "keys (`key add NAME` makes one)"
    if key is None:
        raise Unauthorized(f"the API key is wrong; it must be this server's {ours}" if any(given) else
                           f"an API key is needed: send this server's {ours} as `Authorization: Bearer KEY`")
    if time.time() >= key.expires_at:
        day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(key.expires_at))
        raise Unauthorized(f"the API key {key.name} expired on {day}", code="expired_api_key")
    return key


def check_own_page(headers: Mapping[str, str]) -> None:
    """Forbidden for a foreign web page, whatever `allowed_origins` says; another port of this host is foreign, too."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    foreign = origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()
    if foreign or site not in ("none", "same-origin"):
        raise Forbidden("the admin API answers to its own page only", code="origin_not_allowed")


def session_cookie(server: "Server") -> str:
    """Cookies know no ports: the name keeps two servers of one host apart."""
    return f"iflow2api_session_{server.port}"


def session_token(handler: Handler) -> str:
    """The token that a request's cookie bears, "" without one."""
    pairs = (pair.strip().partition("=") for pair in handler.headers.get("cookie", "").split(";"))
    return next((value for name, _, value in pairs if name == session_cookie(handler.server)), "")


def check_session(handler: Handler) -> Session:
    """Whose session it is, by cookie or by `Authorization: Basic`; Unauthorized, RateLimited."""
    sessions, token = handler.server.gateway.sessions, session_token(handler)
    session = sessions.find(token) if token else None
    scheme, _, given = handler.headers.get("authorization", "").partition(" ")
    if session is None and scheme.lower() == "basic":
        session = sessions.basic(address_of(handler), given.strip())
        if session is None:
            raise Unauthorized("user or password is wrong", code="wrong_password")
    if session is None:
        raise Unauthorized("the session has ended; sign in again" if token else "sign in at /admin first",
                           code="session_expired" if token else "no_session")
    return session


def address_of(handler: Handler) -> str:
    """Who asks, as limits count it."""
    return client_address(handler.client_address[0], handler.headers.get("x-forwarded-for", ""),
                          handler.server.gateway.settings.trusted_proxies)


def meters_of(handler: Handler) -> List[Meter]:
    """What a request is measured on: its key's limits, its address's."""
    gateway, meters = handler.server.gateway, []
    settings = gateway.settings
    if handler.key is not None and handler.key.limits:
        meters.append(gateway.limiter.of_key(handler.key))
    if settings.address_limits:
        meters.append(gateway.limiter.of_address(address_of(handler), settings.address_limits))
    return meters


def cors_lines(headers: Mapping[str, str], path: str, preflight: bool) -> List[str]:
    """What a browser needs to let its page read an answer; never for the admin page, never credentials."""
    origin = headers.get("origin")
    if not origin or not origin.isprintable() or normal_path(path).startswith("/admin"):
        return []
    lines = [f"Access-Control-Allow-Origin: {origin}", "Vary: Origin",
             "Access-Control-Expose-Headers: x-request-id, request-id, retry-after, x-should-retry"]
    if preflight:
        wanted = headers.get("access-control-request-headers", "")
        lines += ["Access-Control-Allow-Methods: GET, HEAD, POST, DELETE, OPTIONS", "Access-Control-Max-Age: 600",
                  f"Access-Control-Allow-Headers: {wanted if wanted and wanted.isprintable() else 'authorization, content-type'}"]
        if headers.get("access-control-request-private-network"):
            lines.append("Access-Control-Allow-Private-Network: true")
    return lines


# --- endpoints ---------------------------------------------------------------

def answer_call(handler: Handler) -> None:
    """Chat, completions, embeddings, whatever dialect the endpoint speaks."""
    with handler.server.gateway.limiter.hold(handler.meters) if handler.meters else _NO_WAIT:
        dialect = handler.endpoint.dialect
        body, text = handler.read_json()
        dialect.check(body)
        call = Call(dialect, body, text, handler.headers, handler.request_id, handler.key, handler.meters)
        handler.sink = Sink(handler, call)
        handler.server.gateway.answer(call, handler.sink)


def count_tokens(handler: Handler) -> None:
    """POST /v1/messages/count_tokens: an estimate, never a request to the upstream (anthropic-messages.md section 9)."""
    body, _ = handler.read_json()
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise BadRequest("messages: a list with at least one message is required", param="messages")
    handler.respond_json({"input_tokens": handler.server.gateway.count_tokens(body, count_message_tokens(body))})


def count_input_tokens(handler: Handler) -> None:
    body, _ = handler.read_json()
    handler.respond_json({"object": "response.input_tokens", "input_tokens": count_response_tokens(body)})


def kept_response(handler: Handler) -> None:
    """GET and DELETE /v1/responses/{id}, GET /v1/responses/{id}/input_items."""
    ident, _, rest = handler.argument.partition("/")
    store = handler.server.gateway.responses
    response = store.response(ident) if rest in ("", "input_items") else None
    if response is None:
        raise NotFound(f"Response with id '{one_line(ident, 80)}' not found.", param="id")
    if handler.command == "DELETE":
        store.drop(ident)
        return handler.respond_json({"id": ident, "object": "response.deleted", "deleted": True})
    handler.respond_json(item_page(store.items(ident) or [], handler.path) if rest else response)


def item_page(items: List[Json], target: str) -> Json:
    """A page of input items, the newest first unless `order=asc`; `limit` (20), `after` an item's id."""
    query = urllib.parse.parse_qs(target.partition("?")[2])
    limit = query.get("limit", ["20"])[-1]
    if not re.fullmatch(r"\d{1,3}", limit) or not 1 <= int(limit) <= 100:
        raise BadRequest("limit: a number from 1 to 100 expected", param="limit")
    named = [{**item, "id": item.get("id") or f"item_{number}"} for number, item in enumerate(items)]
    named = named if query.get("order", ["desc"])[-1] == "asc" else named[::-1]
    places = [number for number, item in enumerate(named) if item["id"] == query.get("after", [""])[-1]]
    page = named[places[0] + 1 if places else 0:]
    return {"object": "list", "data": page[:int(limit)], "has_more": len(page) > int(limit),
            "first_id": page[0]["id"] if page else None, "last_id": page[:int(limit)][-1]["id"] if page else None}


def drop_events(handler: Handler) -> None:
    """Where Anthropic's clients send their telemetry: taken, and forgotten."""
    handler.read_body()
    handler.respond_json({"accepted_count": 0, "rejected_count": 0})


def show_health(handler: Handler) -> None:
    handler.respond_json(handler.server.gateway.health())


def show_metrics(handler: Handler) -> None:
    handler.respond(200, handler.server.gateway.metrics_text().encode(), "text/plain; version=0.0.4; charset=utf-8")


def show_models(handler: Handler) -> None:
    """The list in the shape of who asks: Anthropic's for requests that bear `anthropic-version`."""
    gateway = handler.server.gateway
    if "anthropic-version" not in handler.headers:
        return handler.respond_json({"object": "list", "data": gateway.models(handler.key)})
    query = urllib.parse.parse_qs(handler.path.partition("?")[2])
    models = gateway.models(handler.key, CLAUDE_MODELS.values())
    handler.respond_json(anthropic_page([anthropic_model(m, gateway.target_of(m["id"])) for m in models], query))


def show_vision_models(handler: Handler) -> None:
    handler.respond_json({"object": "list", "data": handler.server.gateway.vision_models(handler.key)})


def show_model(handler: Handler) -> None:
    wanted, gateway = urllib.parse.unquote(handler.argument), handler.server.gateway
    for model in gateway.models(handler.key, [wanted]):
        if model["id"] == wanted:
            return handler.respond_json(anthropic_model(model, gateway.target_of(wanted))
                                        if "anthropic-version" in handler.headers else model)
    raise NotFound(f"the model {one_line(wanted, 100)!r} does not exist", code="model_not_found", param="model")


def anthropic_model(model: Json, target: Optional[Target] = None) -> Json:
    """A model as Anthropic's API lists it (anthropic-messages.md section 9); its display name says where it leads."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(model["created"]))
    told = {"type": "model", "id": model["id"], "display_name": model["id"], "created_at": created, "lifecycle": "active"}
    if target is None:
        return told
    if target.model != model["id"] and f"{target.provider.name}/{target.model}" != model["id"]:
        told["display_name"] = f"{model['id']} → {target.provider.name}/{target.model}"
    facts = target.provider.facts.get(target.model, {})
    limits = (("max_input_tokens", "context"), ("max_tokens", "max_output"))
    return {**told, **{name: facts[fact] for name, fact in limits if facts.get(fact)}}


def anthropic_page(models: List[Json], query: Mapping[str, List[str]]) -> Json:
    """One page of the list: `limit` (1 to 1000, 20 without), `after_id`, `before_id`; BadRequest on another limit."""
    limit = query.get("limit", ["20"])[-1]
    if not re.fullmatch(r"\d{1,4}", limit) or not 1 <= int(limit) <= 1000:
        raise BadRequest("limit: a number from 1 to 1000 expected", param="limit")
    names = [model["id"] for model in models]
    after, before = query.get("after_id", [""])[-1], query.get("before_id", [""])[-1]
    if after in names:
        models = models[names.index(after) + 1:]
    if before in names:
        page = models[:names.index(before)][-int(limit):]
        more = names.index(before) > len(page)
    else:
        page, more = models[:int(limit)], len(models) > int(limit)
    return {"data": page, "has_more": more, "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None}


CARD = r"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>iflow2api</title><style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:40rem;
margin:3rem auto;padding:0 1rem}code{font:14px ui-monospace,monospace}li{margin:.2rem 0}</style>
<h1>iflow2api</h1><p>It runs. Point an OpenAI client here / 服务已启动，将客户端的 base URL 设为：<br><code>URL/v1</code></p>
<ul><li><a href="/admin">/admin</a></li><li><a href="/health">/health</a></li>
<li><a href="/v1/models">/v1/models</a></li><li><a href="/metrics">/metrics</a></li>
<li>API 文档 / documents: <a href="/docs">/docs</a>, <a href="/redoc">/redoc</a>, <a href="/openapi.json">/openapi.json</a></li></ul>"""

#: No script, nothing from elsewhere; for pages that are only text and style.
PAGE_HEADERS = (("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
                ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"))


def show_card(handler: Handler) -> None:
    """What answers at `/`: JSON, or a small page for a browser."""
    if "text/html" in handler.headers.get("accept", ""):
        page = CARD.replace("URL", handler.server.url)
        return handler.respond(200, page.encode(), "text/html; charset=utf-8", PAGE_HEADERS)
    endpoints = sorted(path for path in ROUTES if path != "/" and not path.startswith("/admin/"))
    handler.respond_json({"name": "iflow2api", "version": __version__, "base_url": handler.server.url + "/v1",
                          "docs": handler.server.url + "/docs", "endpoints": endpoints})


class Route(NamedTuple):
    """What a method of a path does.

    `public`: without a client key.  `admin`: for the page alone, with a session instead of a key, unless it is public.
    """
    run: Callable[[Handler], None]
    dialect: ChatDialect = CHAT
    public: bool = False
    admin: bool = False


def _no_endpoint(handler: Handler) -> None:
    raise NotFound(f"there is nothing at {one_line(handler.path.partition('?')[0], 100)}", code="not_found")


UNKNOWN = Route(_no_endpoint)
UNKNOWN_MESSAGES = Route(_no_endpoint, MESSAGES)

#: path without /v1 -> method -> what it does; HEAD comes with GET.  A path that ends in a slash takes what follows it.
ROUTES: Dict[str, Dict[str, Route]] = {
    "/": {"GET": Route(show_card, public=True)},
    "/health": {"GET": Route(show_health, public=True)},
    "/metrics": {"GET": Route(show_metrics)},
    "/models": {"GET": Route(show_models)},
    "/models/": {"GET": Route(show_model)},
    "/vision-models": {"GET": Route(show_vision_models)},
    "/chat/completions": {"POST": Route(answer_call, CHAT)},
    "/completions": {"POST": Route(answer_call, COMPLETIONS)},
    "/embeddings": {"POST": Route(answer_call, EMBEDDINGS)},
    "/messages": {"POST": Route(answer_call, MESSAGES)},
    "/messages/count_tokens": {"POST": Route(count_tokens, MESSAGES)},
    "/responses": {"POST": Route(answer_call, RESPONSES)},
    "/responses/compact": {"POST": Route(answer_call, COMPACT)},
    "/responses/input_tokens": {"POST": Route(count_input_tokens, RESPONSES)},
    "/responses/": {"GET": Route(kept_response, RESPONSES), "DELETE": Route(kept_response, RESPONSES)},
    "/api/event_logging/batch": {"POST": Route(drop_events, MESSAGES, public=True)},
    "/api/event_logging/v2/batch": {"POST": Route(drop_events, MESSAGES, public=True)},
}

def dialect_of(target: str, headers: Mapping[str, str]) -> Route:
    """The route that errors before routing speak for: the dialect of the path, else of the client."""
    path = normal_path(target)
    if path.startswith("/messages") or path not in ROUTES and "anthropic-version" in headers:
        return UNKNOWN_MESSAGES
    return UNKNOWN


_VERSION_PREFIX = re.compile(r"^(/api)?/v1(?=/|$)")


def normal_path(target: str) -> str:
    """The path of a request target: no /v1, no /api/v1, no slash at its end, no query."""
    return _VERSION_PREFIX.sub("", target.partition("?")[0].partition("#")[0]).rstrip("/") or "/"


def find_endpoint(method: str, target: str, headers: Mapping[str, str]) -> Tuple[Route, str]:
    """The route of a request and what its path says beyond it; NotFound, or BadRequest 405 with `allow`."""
    path = normal_path(target)
    argument = ""
    methods = ROUTES.get(path)
    if methods is None:
        base = path
        while methods is None and base.count("/") > 1:
            base = base.rpartition("/")[0]
            methods, argument = ROUTES.get(base + "/"), path[len(base) + 1:]
    unknown = UNKNOWN_MESSAGES if "anthropic-version" in headers else UNKNOWN
    if methods is None:
        return unknown, ""
    route = methods.get("GET" if method == "HEAD" else method)
    if route is None and method == "OPTIONS":
        return unknown, argument
    if route is None:
        allow = sorted({*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])})
        raise BadRequest(f"{path} takes {', '.join(allow)}", status=405, allow=allow, code="method_not_allowed")
    if path.startswith("/models") and unknown is UNKNOWN_MESSAGES:
        route = route._replace(dialect=MESSAGES)         # the same path for both; who asks gets his own errors
    return route, argument


# --- the server --------------------------------------------------------------

def url_of(host: str, port: int) -> str:
    """Where a client on this machine reaches a server bound to `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host and host[0] != "[" else f"http://{host}:{port}"


def stop_accepting(server: socketserver.BaseServer) -> None:
    """End the accept loop at once: it looks up every few seconds, or when somebody connects."""
    stopper = threading.Thread(target=server.shutdown, daemon=True)
    stopper.start()
    with contextlib.suppress(OSError):
        socket.create_connection(server.server_address[:2], 0.2).close()
    stopper.join()
    server.server_close()


class Server(http.server.ThreadingHTTPServer):
    """The listening socket and its connections, one thread each."""
    daemon_threads, block_on_close = True, False
    request_queue_size = 1024
    allow_reuse_address = os.name == "posix"             # on Windows it would let two servers share the port

    def __init__(self, gateway: Gateway, host: str, port: int) -> None:
        self.gateway, self.closing = gateway, threading.Event()
        self._handlers: Set[Handler] = set()
        self._lock = threading.Lock()
        self.is_local = is_loopback(host)
        if not self.is_local:
            gateway.open_to_network()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host.strip("[]"), port), Handler)
        gateway.upstream.own_ports.add(self.port)
        log.addHandler(gateway.live.log_handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(5,), name="accept", daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """Like HTTPServer's, without its reverse DNS lookup; `::` takes IPv4 as well where the system can."""
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(OSError, AttributeError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        return url_of(self.server_address[0], self.port)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection; a few beyond the limit get a 503, the rest are closed."""
        if len(self._handlers) >= self.gateway.settings.max_connections + 64:
            return self.shutdown_request(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:             # the system gives no more threads
            self.shutdown_request(request)

    def enter(self, handler: Handler) -> bool:
        """Note a connection; True where it is one too many and is told so."""
        with self._lock:
            self._handlers.add(handler)
            return len(self._handlers) > self.gateway.settings.max_connections

    @property
    def connections(self) -> int:
        return len(self._handlers)

    def leave(self, handler: Handler) -> None:
        with self._lock:
            self._handlers.discard(handler)

    def get_request(self) -> Tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):        # wait for one to come back instead of spinning
                self.closing.wait(0.1)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection failed")

    def close(self, drain_s: float = 0.0) -> None:
        """Accept nothing more, let running answers end for `drain_s`, then cut them off."""
        self.closing.set()
        self.gateway.live.close()        # who only watches is not waited for
        stop_accepting(self)
        self._cut(lambda handler: not handler.busy)
        until = time.monotonic() + drain_s
        while self._handlers and time.monotonic() < until:
            threading.Event().wait(0.02)
        self._cut(lambda handler: True)
        log.removeHandler(self.gateway.live.log_handler)
        self.gateway.upstream.own_ports.discard(self.port)
        self.gateway.close()

    def _cut(self, wanted: Callable[[Handler], bool]) -> None:
        with self._lock:
            handlers = [handler for handler in self._handlers if wanted(handler)]
        for handler in handlers:
            with contextlib.suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def serve(gateway: Gateway, host: Optional[str] = None, port: Optional[int] = None) -> Server:
    """Start serving on a thread and return at once.  OSError where the address can't be had.

    An address beyond the loopback needs a client key; where there is none, one is made.
    """
    prepare_process()
    settings = gateway.settings
    if settings.usage:
        gateway.usage.load()             # now, so that what is wrong with the file is said at the start
        gateway.problems += [problem for problem in gateway.usage.problems if problem not in gateway.problems]
        for problem in gateway.usage.problems:
            log.warning("%s", one_line(problem, 500))
    return Server(gateway, settings.host if host is None else host, settings.port if port is None else port)


# === 15. Documents ===========================================================
#
# /openapi.json and its readers, built when first asked for.  ROUTES says what there is, OPERATIONS what it is for;
# answers and errors in examples come from the code that answers: the document promises what the program does.

Text = Tuple[str, str]                   #: 中文, English; a tuple in the tables below is always that

#: Shapes of bodies, in short: a type, `[` a list of, `#` another shape, `|` or, `=` one of these words; `*` after a
#: name: always there; a tuple adds what it means.  Fields that are not listed are allowed everywhere.
SHAPES: Dict[str, Json] = {
    "ChatRequest": {
        "model": ("string", "模型名、别名或 provider/model；省略时用 default_model",
                  "a model, an alias or provider/model; default_model where there is none"),
        "messages*": "[#ChatMessage",
        "stream": ("boolean", "以 SSE 逐段返回", "answer in pieces, as server-sent events"),
        "stream_options": ("object", "`include_usage`：最后一段带用量", "`include_usage`: the last chunk holds the usage"),
        "max_tokens": "integer", "max_completion_tokens": "integer", "temperature": "number", "top_p": "number",
        "stop": "string|[string", "tools": "[#ChatTool",
        "tool_choice": ("string|object", "none、auto、required 或指定某个函数", "none, auto, required, or one function"),
        "parallel_tool_calls": "boolean",
        "response_format": ("object", "text、json_object 或 json_schema", "text, json_object or json_schema"),
        "reasoning_effort": "=none,minimal,low,medium,high,xhigh,max",
        "thinking": ("object", "思考开关；各家的其他字段也会原样转发",
                     "the switch for thinking; other makers' fields pass untouched, too")},
    "ChatMessage": {
        "role*": "=system,developer,user,assistant,tool,function", "content": "string|[#ChatPart|null",
        "tool_calls": "[#ChatCall", "tool_call_id": "string",
        "reasoning_content": ("string", "模型的思考", "what the model thought")},
    "ChatPart": {"type*": "=text,image_url,input_audio,file", "text": "string",
                 "image_url": ("object", "url（https: 或 data:）、detail", "url (https: or data:), detail")},
    "ChatTool": {"type*": "string", "function": ("object", "name、description、parameters（JSON Schema）",
                                                 "name, description, parameters (JSON Schema)")},
    "ChatCall": {"id*": "string", "type*": "string", "function": ("object", "name、arguments（JSON 文本）",
                                                                  "name, arguments (JSON as text)")},
    "ChatCompletion": {"id*": "string", "object*": "=chat.completion", "created*": "integer", "model*": "string",
                       "choices*": "[#ChatChoice", "usage": "#ChatUsage"},
    "ChatChoice": {"index*": "integer", "message*": "#ChatMessage",
                   "finish_reason": ("string|null", "stop、length、tool_calls、content_filter……",
                                     "stop, length, tool_calls, content_filter, …")},
    "ChatChunk": {"id*": "string", "object*": "=chat.completion.chunk", "created*": "integer", "model*": "string",
                  "choices*": ("[#ChatChunkChoice", "末尾带用量的一段为空", "empty in the last one, which has the usage"),
                  "usage": "#ChatUsage|null"},
    "ChatChunkChoice": {"index*": "integer", "delta*": "object", "finish_reason": "string|null"},
    "ChatUsage": {"prompt_tokens*": "integer", "completion_tokens*": "integer", "total_tokens*": "integer",
                  "prompt_tokens_details": "object", "completion_tokens_details": "object"},
    "CompletionRequest": {"model": "string", "prompt*": "string|array|null", "suffix": "string",
                          "max_tokens": "integer", "temperature": "number", "stop": "string|[string",
                          "stream": "boolean"},
    "Completion": {"id*": "string", "object*": "=text_completion", "created*": "integer", "model*": "string",
                   "choices*": ("array", "index、text、finish_reason", "index, text, finish_reason"),
                   "usage": "#ChatUsage"},
    "EmbeddingRequest": {"model": "string", "input*": "string|array", "encoding_format": "=float,base64",
                         "dimensions": "integer"},
    "EmbeddingList": {"object*": "=list", "model": "string", "usage": "object",
                      "data*": ("array", "object、index、embedding（数组或 base64）",
                                "object, index, embedding (numbers or base64)")},
    "MessagesRequest": {
        "model": "string", "max_tokens*": ("integer", "会按模型上限收紧", "clamped to what the model can"),
        "messages*": "[#Message", "system": "string|[#Block", "stream": "boolean", "tools": "[#MessagesTool",
        "tool_choice": ("object", "type：auto、any、tool、none", "type: auto, any, tool, none"),
        "thinking": ("object", "type：enabled、adaptive、disabled；budget_tokens",
                     "type: enabled, adaptive, disabled; budget_tokens"),
        "stop_sequences": "[string", "temperature": "number", "top_p": "number", "top_k": "integer",
        "metadata": "object", "output_config": ("object", "effort、format", "effort, format")},
    "CountTokensRequest": {"model": "string", "messages*": "[#Message", "system": "string|[#Block",
                           "tools": "[#MessagesTool"},
    "Message": {"role*": "=user,assistant,system", "content*": "string|[#Block"},
    "Block": {"type*": ("string", "text、image、document、thinking、tool_use、tool_result……",
                        "text, image, document, thinking, tool_use, tool_result, …"),
              "text": "string", "source": ("object", "图片或文档：base64、url、text", "image or document: base64, url, text"),
              "id": "string", "name": "string", "input": "object", "tool_use_id": "string",
              "content": "string|[#Block"},
    "MessagesTool": {"name*": "string", "description": "string", "input_schema": "object"},
    "MessagesAnswer": {"id*": "string", "type*": "=message", "role*": "=assistant", "model*": "string",
                       "content*": "[#Block", "stop_reason*": "string|null", "stop_sequence": "string|null",
                       "usage*": ("object", "input_tokens（不含缓存）、output_tokens、cache_read_input_tokens……",
                                  "input_tokens (without cached ones), output_tokens, cache_read_input_tokens, …")},
    "MessagesEvent": {"type*": ("string", "message_start、content_block_delta、message_delta、message_stop、ping、error……",
                                "message_start, content_block_delta, message_delta, message_stop, ping, error, …")},
    "TokenCount": {"input_tokens*": "integer", "object": "=response.input_tokens"},
    "ResponsesRequest": {
        "model": "string", "input*": "string|[#Item",
        "instructions": ("string", "系统提示", "the system prompt"), "stream": "boolean",
        "previous_response_id": ("string", "接着已保存的回答继续", "carries on from an answer that was kept"),
        "store": ("boolean", "保存回答，默认 true", "keep the answer; true by default"), "max_output_tokens": "integer",
        "tools": ("[object", "function、custom、namespace、local_shell……", "function, custom, namespace, local_shell, …"),
        "tool_choice": "string|object", "reasoning": ("object", "effort、summary", "effort, summary"),
        "text": ("object", "format、verbosity", "format, verbosity"), "include": "[string", "metadata": "object",
        "temperature": "number", "top_p": "number"},
    "Item": {"type": ("string", "message、reasoning、function_call、function_call_output……",
                      "message, reasoning, function_call, function_call_output, …"),
             "id": "string", "role": "string", "content": "string|array|null", "call_id": "string", "name": "string",
             "arguments": "string", "output": "string|array"},
    "Response": {"id*": "string", "object*": "=response", "created_at*": "integer", "model*": "string",
                 "status*": "=completed,incomplete,failed,in_progress", "output*": "[#Item", "usage": "object|null",
                 "error": "object|null", "incomplete_details": "object|null", "previous_response_id": "string|null"},
    "ResponsesEvent": {"type*": ("string", "response.created、response.output_text.delta、response.completed……",
                                 "response.created, response.output_text.delta, response.completed, …"),
                       "sequence_number": "integer"},
    "Compaction": {"id*": "string", "object*": "=response.compaction", "created_at*": "integer", "output*": "[#Item",
                   "usage": "object"},
    "Deleted": {"id*": "string", "object*": "=response.deleted", "deleted*": "boolean"},
    "ItemList": {"object*": "=list", "data*": "[#Item", "has_more*": "boolean", "first_id": "string|null",
                 "last_id": "string|null"},
    "Model": {"id*": "string", "object*": "=model", "created*": "integer",
              "owned_by*": ("string", "通往哪个上游", "the provider it leads to")},
    "ModelList": {"object*": "=list", "data*": "[#Model"},
    "AnthropicModel": {"type*": "=model", "id*": "string", "display_name*": "string", "created_at*": "string",
                       "max_input_tokens": "integer", "max_tokens": "integer"},
    "AnthropicModelList": {"data*": "[#AnthropicModel", "has_more*": "boolean", "first_id": "string|null",
                           "last_id": "string|null"},
    "Health": {"status*": ("=healthy,degraded", "有可用的上游即为 healthy", "healthy where any provider can be used"),
               "version*": "string", "iflow_logged_in*": "boolean", "uptime_s": "integer", "in_flight": "integer",
               "providers*": "[object", "logins": "object", "problems": "[string"},
    "Card": {"name*": "string", "version*": "string", "base_url*": "string", "docs": "string", "endpoints*": "[string"},
    "Dropped": {"accepted_count*": "integer", "rejected_count*": "integer"},
    "openai_error": {"error*": ("object", "message、type、param、code；上游给出的其他字段会保留",
                                "message, type, param, code, and whatever the upstream said beyond")},
    "messages_error": {"type*": "=error", "request_id*": "string",
                       "error*": ("object", "type、message", "type, message")},
}


class Operation(NamedTuple):
    """What the document says of a route beyond the route itself."""
    name: str                            #: operationId
    tag: str
    title: Text
    text: Text
    gives: str                           #: shapes of the answer, `|` between them, or a media type
    asks: str = ""                       #: shape of the body
    params: str = ""                     #: names in PARAMETERS
    example: Any = None                  #: of an answer; a function makes it when it is needed
    event: str = ""                      #: shape of what a stream consists of


TAGS: Dict[str, Text] = {
    "chat": ("OpenAI Chat 及旧接口", "OpenAI Chat and its kin"), "messages": ("Anthropic Messages", "Anthropic Messages"),
    "responses": ("OpenAI Responses", "OpenAI Responses"), "models": ("模型", "Models"), "service": ("服务", "The service")}

#: name -> where it stands, its type, what it means, an example.
PARAMETERS: Dict[str, Tuple[str, str, str, str, Any]] = {
    "response": ("path", "string", "回答的 id", "the answer's id", "resp_0001"),
    "model": ("path", "string", "模型名；可含 `/` 和 `:`", "the model's name; `/` and `:` are allowed", "glm-5"),
    "anthropic-version": ("header", "string", "出现时，列表和错误均为 Anthropic 格式",
                          "where it is sent, lists and errors have Anthropic's shape", "2023-06-01"),
    "anthropic-beta": ("header", "string", "任意值均可接受", "any value is accepted", "interleaved-thinking-2025-05-14"),
    "limit": ("query", "integer", "每页条数，默认 20", "entries of a page, 20 without it", 20),
    "after": ("query", "string", "从此条目之后开始", "start after this item", "item_0"),
    "order": ("query", "=asc,desc", "默认新的在前", "the newest first without it", "desc"),
    "after_id": ("query", "string", "仅 Anthropic 格式：此模型之后", "Anthropic's shape only: after this model", "glm-5"),
    "before_id": ("query", "string", "仅 Anthropic 格式：此模型之前", "Anthropic's shape only: before this model", "glm-5"),
    "lang": ("query", "=zh,en", "语言；省略时按设置或浏览器", "language; the setting's or the browser's without it", "en"),
    "plain": ("query", "=1", "只用内置阅读页，不访问 CDN", "the built-in reader alone, no CDN", "1"),
}

_QUESTION, _SEEN = "What is the weather in Paris?", "What is in this picture?"
_WEATHER: Json = {"name": "get_weather", "description": "The weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
_PNG = ("iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAgMAAADXB5lNAAAACVBMVEXlSE0/Y9J4vnj1/2qiAAAAGUlEQVR42mNggIJQKGAYFRgVGBUYFSBO"
        "AACxOqoBr7vMrgAAAABJRU5ErkJggg==")             # 64 x 64, left half red, right half blue
_HI, _ASKED = [{"role": "user", "content": "Say hello."}], {"role": "user", "content": _QUESTION}
_CALLED: Json = {"name": "get_weather", "arguments": "{\"city\":\"Paris\"}"}
_CHAT_TOOLS, _TOOLS = [{"type": "function", "function": _WEATHER}], [{"type": "function", **_WEATHER}]
_MESSAGES_TOOLS = [{"name": "get_weather", "input_schema": _WEATHER["parameters"]}]
_EXAMPLE_MODEL = "glm-5"

#: What examples are called; the first word of a name picks the answer in STORIES.
_TITLES: Dict[str, Text] = {"text": ("最简单的请求", "the simplest"), "text_stream": ("流式", "as a stream"),
                            "tools": ("带工具", "with tools"), "tools_stream": ("带工具，流式", "with tools, as a stream"),
                            "tools_result": ("交回工具结果", "a tool's result"), "image": ("带图片", "with a picture"),
                            "thinking": ("带思考", "with thinking"), "fill": ("补全中间", "fill in the middle"),
                            "base64": ("base64 向量", "packed in base64"), "answer": ("回答", "the answer"),
                            "anthropic": ("带 anthropic-version 时", "with anthropic-version")}

#: operationId -> example requests by name; each is answered as it is.
REQUESTS: Dict[str, Dict[str, Json]] = {
    "createChatCompletion": {
        "text": {"messages": _HI},
        "text_stream": {"messages": _HI, "stream": True, "stream_options": {"include_usage": True}},
        "tools": {"messages": [_ASKED], "tools": _CHAT_TOOLS},
        "tools_result": {"tools": _CHAT_TOOLS, "messages": [
            _ASKED, {"role": "assistant", "content": None, "tool_calls": [
                {"id": "call_1", "type": "function", "function": _CALLED}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "18 °C, sunny"}]},
        "image": {"messages": [{"role": "user", "content": [
            {"type": "text", "text": _SEEN},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + _PNG}}]}]},
        "thinking": {"messages": _HI, "thinking": {"type": "enabled"}, "stream": True}},
    "createCompletion": {"text": {"prompt": "Once upon a time", "max_tokens": 20},
                         "fill": {"prompt": "def add(a, b):\n", "suffix": "\n    return c", "max_tokens": 40}},
    "createEmbedding": {"text": {"input": ["Hello", "世界"]}, "base64": {"input": "Hello", "encoding_format": "base64"}},
    "createMessage": {
        "text": {"max_tokens": 1024, "messages": _HI},
        "text_stream": {"max_tokens": 1024, "system": "Be brief.", "messages": _HI, "stream": True},
        "tools_stream": {"max_tokens": 1024, "messages": [_ASKED], "stream": True, "tools": _MESSAGES_TOOLS},
        "tools_result": {"max_tokens": 1024, "tools": _MESSAGES_TOOLS, "messages": [
            _ASKED, {"role": "assistant", "content": [
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "18 °C, sunny"}]}]},
        "image": {"max_tokens": 1024, "messages": [{"role": "user", "content": [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": _PNG}},
            {"type": "text", "text": _SEEN}]}]},
        "thinking": {"max_tokens": 4096, "messages": _HI, "thinking": {"type": "enabled", "budget_tokens": 2048}}},
    "countMessageTokens": {"text": {"messages": _HI}},
    "createResponse": {
        "text": {"input": "Say hello."},
        "text_stream": {"input": "Say hello.", "instructions": "Be brief.", "stream": True},
        "tools": {"input": _QUESTION, "tools": _TOOLS},
        "tools_result": {"tools": _TOOLS, "input": [
            _ASKED, {"type": "function_call", "call_id": "call_1", **_CALLED},
            {"type": "function_call_output", "call_id": "call_1", "output": "18 °C, sunny"}]},
        "image": {"input": [{"role": "user", "content": [
            {"type": "input_text", "text": _SEEN},
            {"type": "input_image", "image_url": "data:image/png;base64," + _PNG}]}]},
        "thinking": {"input": "Say hello.", "reasoning": {"effort": "low", "summary": "auto"}, "stream": True}},
    "compactResponse": {"text": {"input": [{"role": "user", "content": "Let us build a boat."},
                                           {"role": "assistant", "content": "Oak or pine?"}]}},
    "countResponseTokens": {"text": {"input": "Say hello."}},
    **{name: {"text": {"events": []}} for name in ("dropEvents", "dropEventsV2")},
}

#: What an upstream says to the examples: message, finish_reason.
STORIES: Dict[str, Tuple[Json, str]] = {
    "text": ({"content": "Hello!"}, "stop"), "image": ({"content": "Red on the left, blue on the right."}, "stop"),
    "thinking": ({"reasoning_content": "A greeting will do.", "content": "Hello!"}, "stop"),
    "tools_result": ({"content": "It is sunny in Paris, 18 °C."}, "stop"),
    "tools": ({"content": None, "tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": _CALLED}]},
              "tool_calls")}
_HEAD: Json = {"id": "chatcmpl-1", "created": 1790000000, "model": _EXAMPLE_MODEL}
_USED: Json = {"usage": {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}}
_MODEL_CARD: Json = {"id": _EXAMPLE_MODEL, "object": "model", "created": 1790000000, "owned_by": "zhipu"}


def _reply_to(name: str, story: str = "text") -> Any:
    """What REQUESTS[name][story] is answered with: an object, or the text of a stream."""
    body = {"model": _EXAMPLE_MODEL, **REQUESTS[name][story]}
    dialect = {"createChatCompletion": CHAT, "createMessage": MESSAGES, "createResponse": RESPONSES,
               "compactResponse": COMPACT}[name]
    numbers = iter(range(1, 1000))
    context = Context(_HEAD["created"], lambda prefix: f"{prefix}{next(numbers):04d}", Seal(bytes(32)), ResponseStore(),
                      ReasoningCache())
    call = Call(dialect, body, dump_json(body).decode(), {}, "req_0001")
    turn = dialect.turn(call, Target(Provider("example"), _EXAMPLE_MODEL), context)
    said, finish = STORIES.get(story) or STORIES[story.partition("_")[0]]
    if not call.stream:
        whole = {**_HEAD, "object": "chat.completion", **_USED, "choices": [
            {"index": 0, "message": {"role": "assistant", **said}, "finish_reason": finish}]}
        return json.loads(turn.reply(dump_json(whole), whole))
    deltas: List[Tuple[Json, Optional[str]]] = [({"role": "assistant", name: part}, None)
                                                for name, part in said.items() if part]
    chunks: List[Json] = [{**_HEAD, "object": "chat.completion.chunk", "choices": [
        {"index": 0, "delta": delta, "finish_reason": end}]} for delta, end in [*deltas, ({}, finish)]]
    last = {**_HEAD, "object": "chat.completion.chunk", "choices": [], **_USED}
    stream = turn.stream()
    data = b"".join(stream.feed(b"data: " + dump_json(chunk) + b"\n\n") for chunk in [*chunks, last])
    return (data + stream.feed(b"data: [DONE]\n\n") + stream.close()).decode()


#: What there is, as it is documented: `METHOD /path`.  Each public row of ROUTES is in here (a test sees to it).
OPERATIONS: Dict[str, Operation] = {
    "POST /v1/chat/completions": Operation(
        "createChatCompletion", "chat", ("对话", "Chat completion"),
        ("请求原样转发，只替换模型名；未列出的字段照样通过。流式回答中的空闲以注释行保活，中途的错误是一条 `error` 记录，其后没有 `[DONE]`。",
         "The request passes as it came but for the model's name; fields not listed pass, too. A silent stream is kept "
         "alive with comment lines; an error within it is a record `error` without a `[DONE]` after it."),
        "ChatCompletion", "ChatRequest", event="ChatChunk"),
    "POST /v1/completions": Operation(
        "createCompletion", "chat", ("文本补全（旧接口）", "Text completion (legacy)"),
        ("原样转发给上游。", "Passed on to the upstream as it is."), "Completion", "CompletionRequest",
        example=lambda: {**_HEAD, "id": "cmpl-1", "object": "text_completion", **_USED, "choices": [
            {"index": 0, "text": " there was a gateway.", "finish_reason": "stop", "logprobs": None}]},
        event="Completion"),
    "POST /v1/embeddings": Operation(
        "createEmbedding", "chat", ("向量", "Embeddings"), ("原样转发给上游。", "Passed on to the upstream as it is."),
        "EmbeddingList", "EmbeddingRequest", example=lambda: {
            "object": "list", "model": "embedding-3", "usage": {"prompt_tokens": 2, "total_tokens": 2},
            "data": [{"object": "embedding", "index": 0, "embedding": [0.0023, -0.0093]}]}),
    "POST /v1/messages": Operation(
        "createMessage", "messages", ("消息", "Message"),
        ("Claude Code 及 Anthropic SDK 使用的接口。`claude-*` 之类的模型名会变成 default_model，除非另有别名。",
         "What Claude Code and Anthropic's SDKs use. Names like `claude-*` become default_model unless an alias says "
         "otherwise."),
        "MessagesAnswer", "MessagesRequest", "anthropic-version anthropic-beta", event="MessagesEvent"),
    "POST /v1/messages/count_tokens": Operation(
        "countMessageTokens", "messages", ("估算 token 数", "Count tokens"),
        ("本机估算，不询问上游。", "An estimate made here; the upstream is not asked."), "TokenCount", "CountTokensRequest",
        "anthropic-version", lambda: {"input_tokens": count_message_tokens(REQUESTS["countMessageTokens"]["text"])}),
    "POST /v1/responses": Operation(
        "createResponse", "responses", ("回答", "Response"),
        ("Codex 使用的接口。回答保存一天，供 `previous_response_id` 使用；`background`、`conversation` 和 `prompt` 返回 400。",
         "What Codex uses. Answers are kept for a day, for `previous_response_id`; `background`, `conversation` and "
         "`prompt` are a 400."), "Response", "ResponsesRequest", event="ResponsesEvent"),
    "POST /v1/responses/compact": Operation(
        "compactResponse", "responses", ("压缩对话", "Compact a conversation"),
        ("用户的消息原样保留，其余变成一段密封的摘要。", "The user's messages as they are, the rest as a sealed summary."),
        "Compaction", "ResponsesRequest"),
    "POST /v1/responses/input_tokens": Operation(
        "countResponseTokens", "responses", ("估算 token 数", "Count tokens"),
        ("本机估算，不询问上游。", "An estimate made here; the upstream is not asked."), "TokenCount", "ResponsesRequest",
        example=lambda: {"object": "response.input_tokens",
                         "input_tokens": count_response_tokens(REQUESTS["countResponseTokens"]["text"])}),
    "GET /v1/responses/{response}": Operation(
        "getResponse", "responses", ("已保存的回答", "A kept answer"), ("保存一天。", "Kept for a day."), "Response",
        params="response", example=lambda: _reply_to("createResponse")),
    "DELETE /v1/responses/{response}": Operation(
        "deleteResponse", "responses", ("删除回答", "Forget an answer"), ("立即删除。", "At once."), "Deleted",
        params="response", example={"id": "resp_0001", "object": "response.deleted", "deleted": True}),
    "GET /v1/responses/{response}/input_items": Operation(
        "listInputItems", "responses", ("回答的输入", "What an answer answered"), ("分页列出。", "In pages."), "ItemList",
        params="response limit order after", example=lambda: item_page([
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Say hello."}]}], "")),
    "GET /v1/models": Operation(
        "listModels", "models", ("模型列表", "List models"),
        ("一切可以请求的名字。带 `anthropic-version` 时为 Anthropic 格式，并分页。",
         "Every name that can be asked for. In Anthropic's shape, and in pages, where `anthropic-version` is sent."),
        "ModelList|AnthropicModelList", params="anthropic-version limit after_id before_id",
        example=lambda: {"object": "list", "data": [_MODEL_CARD]}),
    "GET /v1/models/{model}": Operation(
        "getModel", "models", ("一个模型", "One model"), ("未知的名字返回 404。", "404 for a name that is not known."),
        "Model|AnthropicModel", params="model anthropic-version", example=_MODEL_CARD),
    "GET /v1/vision-models": Operation(
        "listVisionModels", "models", ("能看图的模型", "Models that take pictures"),
        ("列表中已知能看图的那些。", "Those of the list that are known to."), "ModelList",
        example={"object": "list", "data": [{**_MODEL_CARD, "id": "glm-4.6v"}]}),
    "GET /health": Operation(
        "getHealth", "service", ("状态", "Health"), ("总是 200；不含任何秘密。", "Always a 200, and nothing secret in it."),
        "Health", example={"status": "healthy", "iflow_logged_in": False, "version": __version__, "uptime_s": 3600,
                           "in_flight": 0, "providers": [{"name": "zhipu", "kind": "openai", "usable": True,
                                                          "circuit": "closed", "keys_resting": 0, "models": 2}],
                           "logins": {}, "problems": []}),
    "GET /metrics": Operation("getMetrics", "service", ("指标", "Metrics"),
                              ("Prometheus 文本格式。", "As Prometheus reads them."), "text/plain",
                              example="# TYPE iflow2api_in_flight gauge\niflow2api_in_flight 0\n"),
    "GET /": Operation("getCard", "service", ("服务名片", "Card"),
                       ("`Accept` 含 text/html 时为网页。", "A small page where `Accept` asks for text/html."), "Card",
                       example={"name": "iflow2api", "version": __version__, "base_url": "http://127.0.0.1:28000/v1",
                                "docs": "http://127.0.0.1:28000/docs", "endpoints": ["/chat/completions", "…"]}),
    **{f"POST /api/event_logging{path}/batch": Operation(
        name, "service", (f"丢弃客户端遥测{more}", f"Telemetry, dropped{more}"),
        ("Anthropic 客户端会发到这里；收下即丢弃。", "Anthropic's clients post here; it is taken and forgotten."), "Dropped", "object",
        example={"accepted_count": 0, "rejected_count": 0})
       for path, name, more in (("", "dropEvents", ""), ("/v2", "dropEventsV2", " (v2)"))},
    "GET /openapi.json": Operation("getOpenapi", "service", ("本文档", "This document"), ("OpenAPI 3.1。", "OpenAPI 3.1."),
                                   "object", params="lang", example={"openapi": "3.1.0", "info": {}, "paths": {}}),
    "GET /docs": Operation("getDocs", "service", ("Swagger UI", "Swagger UI"),
                           ("CDN 不可用或 `docs_cdn` 为 false 时为内置阅读页。",
                            "The built-in reader where the CDN can't be had, or `docs_cdn` is false."),
                           "text/html", params="lang plain", example="<!doctype html>…"),
    "GET /redoc": Operation("getRedoc", "service", ("ReDoc", "ReDoc"), ("同上。", "The same as /docs."), "text/html",
                            params="lang plain", example="<!doctype html>…"),
}


def _causes() -> List[Tuple[GatewayError, Text]]:
    """Why a request fails (DESIGN's table of statuses), each with an error that will be dressed by its dialect."""
    return [
        (BadRequest("`messages` is missing", param="messages", code="missing_required_parameter"),
         ("请求有误，或超出模型的上下文长度", "the request is wrong, or longer than the model's context")),
        (Unauthorized("the API key is wrong; it must be this server's custom_api_key"),
         ("缺少或错误的客户端密钥", "this server's key is missing or wrong")),
        (NotLoggedIn("the upstream zhipu refused its API key; check it with: iflow2api test zhipu"),
         ("没有可用的上游或登录，或上游拒绝了网关的密钥", "no provider or login can serve it, or the upstream refused our key")),
        (Forbidden("the web page at null may not call this server; add it to `allowed_origins`",
                   code="origin_not_allowed"),
         ("不允许的 Host 或 Origin", "a Host or Origin that is not allowed")),
        (NotFound("the model 'none' does not exist", code="model_not_found", param="model"),
         ("没有这个模型或对象", "no such model or object")),
        (BadRequest("the request did not arrive in time", status=408, code="request_timeout"),
         ("请求没有按时到达", "the request did not arrive in time")),
        (BadRequest("Content-Length or Transfer-Encoding: chunked is needed", status=411),
         ("没有说明请求体长度", "neither a length nor chunked")),
        (too_large(default_of("body_limit_bytes")), ("请求体过大", "the body is too large")),
        (BadRequest("a JSON body is expected, not multipart", status=415),
         ("multipart，或未知的 Content-Encoding", "multipart, or an unknown Content-Encoding")),
        (RateLimited("60 requests a minute are allowed"), ("限流（网关的或上游的）", "a rate limit, ours or the upstream's")),
        (GatewayError("iflow2api failed on this request; its log says why"), ("网关自身的缺陷", "a defect of this gateway")),
        (UpstreamGarbled("zhipu: the upstream's answer was cut off"),
         ("无法连接上游，或其回答损坏、为空、中断", "the upstream can't be reached, or its answer is garbled, empty or cut off")),
        (Busy("too many requests are waiting"), ("队列或连接已满，或正在停止", "queue or connections are full, or it is stopping")),
        (UpstreamTimeout("zhipu said nothing for 300 s"), ("上游超时", "the upstream took too long"))]


#: Statuses by what a route does; those of an upstream come on top of a body's.
_STATUS_OF_BODY, _STATUS_OF_CALL = {400, 408, 411, 413, 415}, {404, 429, 500, 502, 503, 504}


class Scene(NamedTuple):
    """What a document depends on."""
    language: str
    url: str                             #: where the client reaches this server
    key_header: str                      #: custom_auth_header
    needs_key: bool
    theme: str


def _scene_of(handler: Handler) -> Scene:
    """The address is the asked one, https where a trusted proxy says so; the language `?lang=`, the setting's, the
    browser's."""
    settings, headers = handler.server.gateway.settings, handler.headers
    host, peer = headers.get("host", ""), parse_address(handler.client_address[0])
    trusted = any(is_within(peer, parse_network(text)) for text in settings.trusted_proxies)
    scheme = "https" if trusted and headers.get("x-forwarded-proto", "").strip().lower() == "https" else "http"
    url = f"{scheme}://{host}" if re.fullmatch(r"[\w.:\[\]-]{1,255}", host) else handler.server.url
    asked = urllib.parse.parse_qs(handler.path.partition("?")[2]).get("lang", [""])[-1]
    first = headers.get("accept-language", "").strip().lower()[:2]
    language = next((word for word in (asked, settings.language, first) if word in ("zh", "en")), "en")
    return Scene(language, url, settings.custom_auth_header.lower(), handler.server.gateway.state.door.required,
                 settings.theme_mode)


def _said(value: Any, language: str) -> Any:
    """A table's value in one language."""
    if isinstance(value, tuple):
        return value[language == "en"]
    if isinstance(value, dict):
        return {name: _said(part, language) for name, part in value.items()}
    return [_said(part, language) for part in value] if isinstance(value, list) else value


def _shape(short: Any) -> Json:
    """A JSON Schema out of an entry of SHAPES or a type in it."""
    if isinstance(short, tuple):
        return {**_shape(short[0]), "description": short[1:]}
    if isinstance(short, dict):
        must = [name[:-1] for name in short if name[-1] == "*"]
        return {"type": "object", **({"required": must} if must else {}),
                "properties": {name.rstrip("*"): _shape(part) for name, part in short.items()}}
    if "|" in short:
        return {"anyOf": [_shape(part) for part in short.split("|")]}
    if short[0] == "[":
        return {"type": "array", "items": _shape(short[1:])}
    if short[0] in "#=":
        return {"$ref": "#/components/schemas/" + short[1:]} if short[0] == "#" else {
            "type": "string", "enum": short[1:].split(",")}
    return {"type": short}


def _error_components() -> Json:
    """`openai_401` and the like: every cause in both vocabularies, by the dialects' own words."""
    found: Json = {}
    for dialect in (CHAT, MESSAGES):
        family = "messages" if dialect is MESSAGES else "openai"
        for number, (exc, cause) in enumerate(_causes()):
            status = dialect.status(exc)
            entry = found.setdefault(f"{family}_{status}", {"description": cause, "headers": {
                "x-request-id": {"schema": {"type": "string"}, "example": "req_0001"}},
                "content": {"application/json": {"schema": _shape(f"#{family}_error"), "examples": {}}}})
            if entry["description"] is not cause:
                entry["description"] = tuple(f"{one}; {two}" for one, two in zip(entry["description"], cause))
            entry["content"]["application/json"]["examples"][f"cause_{number}"] = {
                "summary": cause, "value": dialect.error(exc, "req_0001")}
            if exc.retry_after_s:
                entry["headers"]["Retry-After"] = {"schema": {"type": "integer"}, "example": int(exc.retry_after_s)}
            if exc.should_retry is not None:
                entry["headers"]["x-should-retry"] = {"schema": {"type": "string"}, "example": "false"}
    return found


def _security_schemes(scene: Scene) -> Json:
    names = ["x-api-key", "api-key", *([scene.key_header] if scene.key_header else [])]
    return {"bearer": {"type": "http", "scheme": "bearer"},
            **{name: {"type": "apiKey", "in": "header", "name": name} for name in names}}


def _asked_for(operation: Operation) -> List[Json]:
    rows = [(name, *PARAMETERS[name]) for name in operation.params.split()]
    return [{"name": name, "in": place, "required": place == "path", "description": (zh, en), "schema": _shape(short),
             "example": example} for name, place, short, zh, en, example in rows]


def _example_requests(operation: Operation) -> Json:
    """Name -> {"summary", "value"}; with a model where the shape has one."""
    shape = SHAPES.get(operation.asks, {})
    model = {"model": _EXAMPLE_MODEL} if "model" in shape else {}
    return {name: {"summary": _TITLES[name], "value": {**model, **body}}
            for name, body in REQUESTS.get(operation.name, {}).items()}


def _example_answers(operation: Operation) -> Json:
    """The same of answers, under the names of their requests."""
    if operation.example is None:
        return {name: {"summary": _TITLES[name], "value": _reply_to(operation.name, name)}
                for name in REQUESTS[operation.name]}
    value = operation.example() if callable(operation.example) else operation.example
    answers = {"answer": {"summary": _TITLES["answer"], "value": value}}
    if "Anthropic" in operation.gives:
        model = anthropic_model(_MODEL_CARD)
        answers["anthropic"] = {"summary": _TITLES["anthropic"], "value":
                                model if operation.name == "getModel" else anthropic_page([model], {})}
    return answers


def _answer_content(operation: Operation) -> Json:
    """Media types of the 200, with their examples."""
    answers = _example_answers(operation)
    if "/" in operation.gives:
        return {operation.gives: {"schema": {"type": "string"}, "examples": answers}}
    shapes = "|".join(part if part == "object" else "#" + part for part in operation.gives.split("|"))
    streams = {name: answer for name, answer in answers.items() if isinstance(answer["value"], str)}
    plain = {name: answer for name, answer in answers.items() if name not in streams}
    content: Json = {"application/json": {"schema": _shape(shapes), "examples": plain}}
    if operation.event:
        content["text/event-stream"] = {"schema": {
            "type": "string", "contentMediaType": "application/json", "contentSchema": _shape("#" + operation.event),
            "description": ("`stream` 为 true 时：每条记录的 `data:` 如此", "with `stream`: the `data:` of each record is this")}}
        if streams:
            content["text/event-stream"]["examples"] = streams
    if operation.name == "getCard":
        content["text/html"] = {"schema": {"type": "string"}}
    return content


def _curl(key: str, operation: Operation, scene: Scene, needs_key: bool) -> str:
    """A line for a POSIX shell that asks the first example."""
    import shlex
    method, _, path = key.partition(" ")
    for name in operation.params.split():
        path = path.replace("{%s}" % name, str(PARAMETERS[name][4]))
    lines = ["curl " + ("" if method in ("GET", "POST") else f"-X {method} ") + scene.url + path]
    if needs_key:
        lines.append('-H "Authorization: Bearer $IFLOW2API_KEY"')
    for example in list(_example_requests(operation).values())[:1]:
        lines.append("-d " + shlex.quote(json.dumps(example["value"], ensure_ascii=False, indent=2)))
    return " \\\n  ".join(lines)


def _operation(key: str, operation: Operation, scene: Scene) -> Json:
    """One operation of the document: what ROUTES knows of it, and what OPERATIONS says."""
    route, _ = find_endpoint(key.partition(" ")[0], key.partition(" ")[2].replace("{", "").replace("}", ""), {})
    needs_key = scene.needs_key and not route.public
    statuses = {403, *([404] if "{" in key else []), *([] if route.public else [401]),
                *(_STATUS_OF_BODY if operation.asks else []), *(_STATUS_OF_CALL if route.run is answer_call else [])}
    family, dialect = ("messages" if route.dialect is MESSAGES else "openai"), route.dialect
    answers: Json = {"200": {"description": ("成功", "done"), "content": _answer_content(operation)}}
    for status in sorted(dialect.status(GatewayError("", status=status)) for status in statuses):
        answers[str(status)] = {"$ref": f"#/components/responses/{family}_{status}"}
    if route.run is answer_call:
        answers["default"] = {"description": ("上游的其他状态，原样传回", "any other status of the upstream, passed on"),
                              "content": {"application/json": {"schema": _shape(f"#{family}_error")}}}
    found: Json = {"operationId": operation.name, "tags": [operation.tag], "summary": operation.title,
                   "description": operation.text, "parameters": _asked_for(operation), "responses": answers,
                   "x-codeSamples": [{"lang": "Shell", "label": "curl",
                                      "source": _curl(key, operation, scene, needs_key)}]}
    if operation.asks:
        shape = _shape(operation.asks if operation.asks == "object" else "#" + operation.asks)
        found["requestBody"] = {"required": True, "content": {"application/json": {
            "schema": shape, "examples": _example_requests(operation)}}}
    if needs_key:
        found["security"] = [{name: []} for name in _security_schemes(scene)]
    return found


def _introduction() -> Text:
    """Markdown: what it is, and the table of statuses."""
    rows = ["".join(f"| {word} " for word in (str(CHAT.status(exc)), str(MESSAGES.status(exc)), cause)) + "|"
            for exc, causes in _causes() for cause in causes]
    return ("一个网关，任何客户端接任何 OpenAI 兼容的模型：OpenAI Chat、Anthropic Messages、OpenAI Responses 都能听懂。\n\n"
            "每个 API 路径不带 `/v1`、以 `/api/v1` 开头、末尾带斜杠也可访问；`GET` 处也可用 `HEAD`。"
            "上游的状态码和消息会传到客户端，网关自己的见下表。\n\n"
            "| OpenAI | Messages | 原因 |\n|---|---|---|\n" + "\n".join(rows[::2]),
            "One gateway between any client and any OpenAI-compatible model: it understands OpenAI Chat, Anthropic "
            "Messages and OpenAI Responses, whatever the model speaks.\n\n"
            "Every API path also answers without `/v1`, with `/api/v1`, and with a slash at its end; `HEAD` answers "
            "wherever `GET` does. An upstream's own status and message reach the client; ours are these.\n\n"
            "| OpenAI | Messages | cause |\n|---|---|---|\n" + "\n".join(rows[1::2]))


@lru_cache(4)
def openapi(scene: Scene) -> Json:
    """The OpenAPI 3.1 document of the public endpoints."""
    paths: Json = {}
    for key, operation in OPERATIONS.items():
        method, _, path = key.partition(" ")
        paths.setdefault(path, {})[method.lower()] = _operation(key, operation, scene)
    info = {"title": "iflow2api", "version": __version__, "description": _introduction(),
            "license": {"name": "MIT", "identifier": "MIT"}}
    document = {"openapi": "3.1.0", "info": info, "servers": [{"url": scene.url}], "paths": paths,
                "tags": [{"name": name, "x-displayName": text, "description": text} for name, text in TAGS.items()],
                "components": {"schemas": {name: _shape(shape) for name, shape in SHAPES.items()},
                               "responses": _error_components(), "securitySchemes": _security_schemes(scene)}}
    return _said(document, scene.language)


# --- the readers -------------------------------------------------------------

#: What the CDN serves is what npm has: `npm pack swagger-ui-dist@5.35.0 redoc@2.5.4`, unpacked, then
#: `openssl dgst -sha384 -binary FILE | base64`.  Path below CDN -> the hash that a browser insists on.
CDN = "https://cdn.jsdelivr.net/npm/"
READERS: Dict[str, Tuple[str, Dict[str, str]]] = {
    "docs": ("Swagger UI", {
        "swagger-ui-dist@5.35.0/swagger-ui.css": "WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I",
        "swagger-ui-dist@5.35.0/swagger-ui-bundle.js":
            "gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9"}),
    "redoc": ("ReDoc", {
        "redoc@2.5.4/bundles/redoc.standalone.js": "w447zOpYfw/1Tv/5AK9NfHTlQIqE3RVR6KY62jCyy9zNDgO64cMwGGP1Fj0zJVf5"})}

READER_TEXTS: Dict[str, Text] = {
    "contents": ("目录", "Contents"), "request": ("请求", "Request"), "answers": ("回答", "Answers"),
    "parameters": ("参数", "Parameters"), "key": ("需要密钥", "needs a key"), "required": ("必填", "required"),
    "shapes": ("结构", "Shapes"), "other": ("English", "中文"),
    "wait": ("正在从 cdn.jsdelivr.net 载入 {}……", "Fetching {} from cdn.jsdelivr.net …"),
    "late": ("{} 已载入，打开", "{} has come: show it"), "plain": ("内置阅读页", "Built-in reader"),
    "note": ("此页与管理页隔离，只供阅读，不能发送请求：请复制 curl，或用管理页的操练场。",
             "This page is kept apart from the admin page and sends no requests: copy a curl line, or use the "
             "playground there.")}

# language=CSS
BAR_CSS = r"""
:root{color-scheme:light dark;--bg:light-dark(#fff,#14171c);--side:light-dark(#f6f7f9,#1a1e25);
--text:light-dark(#1b1f24,#e4e7eb);--muted:light-dark(#57606a,#a0a9b4);--line:light-dark(#d9dee4,#2f363f);
--link:light-dark(#0b5cad,#7cb8ff);--get:light-dark(#14713a,#7ee2a0);--post:light-dark(#0b5cad,#7cb8ff);
--delete:light-dark(#b3261e,#ff9c94)}
[data-theme=light]{color-scheme:light}[data-theme=dark]{color-scheme:dark}
body{margin:0;background:var(--bg);color:var(--text)}[hidden]{display:none!important}
#bar{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;align-items:baseline;padding:.6rem 1.2rem;background:var(--side);
border-bottom:1px solid var(--line);font:14px/1.5 system-ui,sans-serif;color:var(--muted)}
#bar b{color:var(--text);font-size:16px}#bar .note{flex:1 1 20rem}#bar button{font:inherit}
#bar a{color:var(--link);text-decoration:none}#bar a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.wait #reader{visibility:hidden;animation:appear 0s 2.5s forwards}@keyframes appear{to{visibility:visible}}
#waiting{display:none}.wait #waiting{display:inline}.mounted #reader{display:none}
.swagger-ui .scheme-container .auth-wrapper{display:none!important}
.mounted{color-scheme:light}.mounted.dark-mode{color-scheme:dark}
"""

READER_CSS = r"""
*{box-sizing:border-box}a{color:var(--link)}nav a{text-decoration:none}nav a:hover{text-decoration:underline}
#reader{font:16px/1.6 system-ui,sans-serif;display:grid;grid-template-columns:18rem minmax(0,1fr);max-width:90rem;
margin:auto}
#reader nav{position:sticky;top:0;max-height:100vh;overflow:auto;padding:1.2rem;font-size:14px;line-height:1.4}
nav ul{list-style:none;margin:.2rem 0 .8rem;padding:0}nav li{margin:.35rem 0}nav summary{font-weight:600}
main{padding:1.2rem 1.5rem 6rem;min-width:0}h2{margin:2.5rem 0 0}h3{margin:0;font-size:1.05rem;overflow-wrap:anywhere}
h4{margin:1.1rem 0 .3rem;font-size:.9rem;color:var(--muted)}section{border-top:1px solid var(--line);padding:1.3rem 0}
h3 a{color:inherit;text-decoration:none}section p{margin:.4rem 0}.muted{color:var(--muted);font-size:14px}
.verb{font:600 12px ui-monospace,monospace;border:1px solid;border-radius:4px;padding:1px 5px;margin-right:.4rem}
.get{color:var(--get)}.post{color:var(--post)}.delete{color:var(--delete)}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--side);border:1px solid var(--line);border-radius:6px;padding:.7rem;overflow:auto;max-height:28rem;
margin:.4rem 0}
.curl{user-select:all}summary{cursor:pointer;padding:.15rem 0}details details{margin-left:1rem}
[id^=shape-]{scroll-margin-top:3rem}table{border-collapse:collapse;font-size:14px}main p{max-width:52rem}
td,th{border-bottom:1px solid var(--line);padding:.3rem .9rem .3rem 0;text-align:left;vertical-align:top}
@media(max-width:50rem){#reader{display:block}main{padding:1rem}
.facts tr{display:block;padding:.3rem 0;border-bottom:1px solid var(--line)}
.facts td{display:inline;border:0;overflow-wrap:anywhere}
#reader nav{position:static;max-height:40vh;border-bottom:1px solid var(--line)}}
"""

# language=JavaScript
READER_JS = r"""
(() => {
  "use strict";
  const root = document.documentElement, classes = root.classList, byId = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(byId(id).textContent), late = byId("late"), page = root.dataset.page;
  const dark = () => root.dataset.theme === "dark"
    || root.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches;
  const MOUNT = {
    docs(spec, domNode) {
      classes.toggle("dark-mode", dark());
      SwaggerUIBundle({spec, domNode, deepLinking: true, supportedSubmitMethods: [], validatorUrl: null,
        defaultModelsExpandDepth: 0, docExpansion: "list"});
    },
    redoc(spec, domNode) {
      // Its footer's logo would come from yet another host; one that can't be shown is left out.
      const set = Element.prototype.setAttribute, own = (value) => String(value).startsWith("data:") ? value : "data:,";
      Object.defineProperty(HTMLImageElement.prototype, "src", {set(value) { set.call(this, "src", own(value)); }});
      Redoc.init(spec, {untrustedSpec: true, hideLoading: true}, domNode);
    },
  };
  const mount = () => {
    classes.remove("wait");
    classes.add("mounted");
    late.hidden = byId("look").disabled = true;
    MOUNT[page](read("document"), byId("ui"));
  };
  const load = ([href, integrity]) => new Promise((done, failed) => {
    const style = href.endsWith(".css"), node = document.createElement(style ? "link" : "script");
    Object.assign(node, style ? {rel: "stylesheet", href} : {src: href},
      {integrity, crossOrigin: "anonymous", onload: done, onerror: failed});
    document.head.append(node);
  });
  const reader = () => classes.remove("wait");
  const timer = setTimeout(reader, 2000);
  Promise.all(Object.entries(read("files")).map(load)).then(() => {
    clearTimeout(timer);
    if (classes.contains("wait")) return mount();
    late.hidden = false;
    late.addEventListener("click", mount);
  }, reader);
})();
"""


class Markup(str):
    """HTML; any other string is escaped on its way into it."""


def node(tag: str, *inner: Any, **facts: Any) -> Markup:
    """An element: `inner` are strings, Markup, or lists of both; of `facts` those that are None are left out."""
    import html
    parts = [part for item in inner for part in (item if isinstance(item, list) else [item])]
    said = "".join(part if isinstance(part, Markup) else html.escape(part, quote=False) for part in parts)
    named = "".join(f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
                    for name, value in facts.items() if value is not None)
    return Markup(f"<{tag}{named}>{said}" + ("" if tag in ("meta", "input") else f"</{tag}>"))


def _code_spans(text: str) -> List[str]:
    """Text with what stands in backticks as code."""
    return [node("code", part) if number % 2 else part for number, part in enumerate(text.split("`"))]


def _table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> Markup:
    lines = [node("tr", [node("td", cell) for cell in row]) for row in rows]
    return node("table", [node("tr", [node("th", cell) for cell in head])] if head else [], lines,
                class_=None if head else "facts")


def _markdown(text: str) -> List[Markup]:
    """As much of Markdown as our texts use: paragraphs, code, tables."""
    blocks = []
    for block in text.split("\n\n"):
        head, _, *rows = [[_code_spans(cell.strip()) for cell in line.strip("|").split("|")]
                          for line in f"{block}\n".split("\n")]
        blocks.append(_table(rows[:-1], head) if block.startswith("|") else node("p", _code_spans(block)))
    return blocks


def _type_words(schema: Json) -> List[str]:
    """A schema in a few words, with links to the shapes it names."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return [node("a", name, href=f"#shape-{name}")]
    if "anyOf" in schema:
        parts = [_type_words(part) for part in schema["anyOf"]]
        return [word for part in parts for word in [" | ", *part]][1:]
    if "enum" in schema:
        return [" | ".join(map(json.dumps, schema["enum"]))]
    return ["[ ", *_type_words(schema["items"]), " ]"] if "items" in schema else [schema.get("type", "any")]


def _code(text: str, class_: Optional[str] = None) -> Markup:
    return node("pre", node("code", text), tabindex="0", class_=class_)


def _example_folds(examples: Json) -> List[Markup]:
    """Examples of a media type, each folded away."""
    shown = []
    for example in examples.values():
        value = example["value"]
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)
        shown.append(node("details", node("summary", example["summary"]), _code(text)))
    return shown


class Reader:
    """The document as a page that needs no script."""

    def __init__(self, document: Json, language: str) -> None:
        self._document = document
        self._words = {name: text[language == "en"] for name, text in READER_TEXTS.items()}

    def page(self) -> Markup:
        document, words = self._document, self._words
        operations: Dict[str, List[Tuple[str, str, Json]]] = {}
        for path, methods in document["paths"].items():
            for verb, operation in methods.items():
                operations.setdefault(operation["tags"][0], []).append((verb, path, operation))
        listed, told = [], []
        for tag in document["tags"]:
            entries = operations[tag["name"]]
            listed += [node("b", tag["description"]), node("ul", [node("li", node(
                "a", operation["summary"], href="#" + operation["operationId"], title=f"{verb.upper()} {path}"))
                for verb, path, operation in entries])]
            told += [node("h2", tag["description"], id=tag["name"]), *(self._operation(*entry) for entry in entries)]
        nav = node("nav", node("details", node("summary", words["contents"]), listed,
                               node("a", words["shapes"], href="#shapes"), open=""), aria_label=words["contents"])
        intro = [node("h1", f"{document['info']['title']} {document['info']['version']}"),
                 node("p", node("code", document["servers"][0]["url"])), *_markdown(document["info"]["description"])]
        return node("div", nav, node("main", intro, told, self._shapes()), id="reader")

    def _operation(self, verb: str, path: str, operation: Json) -> Markup:
        words, name = self._words, operation["operationId"]
        key = " · " + words["key"] if "security" in operation else ""
        parts = [node("h3", node("span", verb.upper(), class_="verb " + verb),
                      node("a", node("code", path), href="#" + name)), node("p", node("b", operation["summary"]), key),
                 *_markdown(operation["description"])]
        if operation["parameters"]:
            rows = [[node("code", row["name"]), row["in"], _type_words(row["schema"]),
                     row["description"], node("code", str(row["example"]))] for row in operation["parameters"]]
            parts += [node("h4", words["parameters"]), _table(rows)]
        parts.append(node("h4", words["request"]))
        for content in operation.get("requestBody", {}).get("content", {}).values():
            parts += [node("p", _type_words(content["schema"])), *_example_folds(content["examples"])]
        parts.append(_code(operation["x-codeSamples"][0]["source"], "curl"))
        parts.append(node("h4", words["answers"]))
        parts += [self._answer(status, answer) for status, answer in operation["responses"].items()]
        return node("section", parts, id=name)

    def _answer(self, status: str, answer: Json) -> Markup:
        if "$ref" in answer:
            answer = self._document["components"]["responses"][answer["$ref"].rpartition("/")[2]]
        inside: List[Any] = []
        for media, content in answer["content"].items():
            shape = content["schema"].get("contentSchema", content["schema"])
            inside += [node("p", node("code", media), " · ", _type_words(shape)),
                       *_example_folds(content.get("examples", {}))]
        return node("details", node("summary", node("code", status), " " + answer["description"]), inside)

    def _shapes(self) -> List[Markup]:
        """Every schema, folded; a link to one opens it, since its name stands inside."""
        shapes = [node("h2", self._words["shapes"], id="shapes")]
        for name, schema in self._document["components"]["schemas"].items():
            must = schema.get("required", ())
            rows = [[node("code", field_name), _type_words(part), self._words["required"] if field_name in must else "",
                     part.get("description", "")] for field_name, part in schema.get("properties", {}).items()]
            inside = _table(rows) if rows else node("p", _type_words(schema))
            shapes.append(node("details", node("summary", name), node("div", inside, id="shape-" + name)))
        return shapes


def _json_block(ident: str, value: Any) -> Markup:
    """Data for a script; `<` is escaped, so that nothing in it ends the element."""
    return Markup(f'<script type="application/json" id="{ident}">'
                  + dump_json(value).decode().replace("<", "\\u003c") + "</script>")


@lru_cache(4)
def reader_page(scene: Scene, name: str, plain: bool, cdn: bool) -> Tuple[bytes, str]:
    """/docs or /redoc, and its Content-Security-Policy; `plain`: by the built-in reader though the `cdn` may be used.

    `sandbox` without allow-same-origin gives the page an origin of its own, which is nobody's: no cookie, no storage,
    nothing of the admin page within reach.  Without the CDN there is no script at all.
    """
    document, language = openapi(scene), scene.language
    words = {key: text[language == "en"] for key, text in READER_TEXTS.items()}
    title, files = READERS[name]
    urls = {CDN + path: "sha384-" + digest for path, digest in files.items()} if cdn and not plain else {}
    links = {"openapi.json": "/openapi.json?"}
    if cdn:
        links.update({READERS[other][0]: f"/{other}?" for other in READERS if other != name or plain})
        links.update({words["plain"]: f"/{name}?plain=1&"} if urls else {})
    links = {word: f"{path}lang={language}" for word, path in links.items()}
    links[words["other"]] = f"/{name}?{'plain=1&' if plain else ''}lang={'zh' if language == 'en' else 'en'}"
    bar = node("header", node("b", "iflow2api API"), node("span", words["note"], class_="note"),
               [node("a", word, href=href) for word, href in links.items()],
               [node("span", words["wait"].format(title), id="waiting", role="status"),
                node("button", words["late"].format(title), id="late", type="button", hidden="")] if urls else [],
               id="bar")
    script = [_json_block("document", document), _json_block("files", urls),
              node("script", Markup(READER_JS))] if urls else []
    wakes = node("noscript", node("style", Markup(".wait #reader{visibility:visible}.wait #waiting{display:none}")))
    head = node("head", node("meta", charset="utf-8"), node("title", "iflow2api API"), node(
        "meta", name="viewport", content="width=device-width, initial-scale=1"), node("style", Markup(BAR_CSS)),
        node("style", Markup(READER_CSS), id="look"), wakes)
    body = node("body", bar, node("div", id="ui"), Reader(document, language).page(), script)
    page = node("html", head, body, lang=language, class_="wait" if urls else None, data_page=name,
                data_theme=scene.theme)
    digest = base64.b64encode(hashlib.sha256(READER_JS.encode()).digest()).decode()
    scripts, styles = ([url for url in urls if url.endswith(end)] for end in (".js", ".css"))
    policy = "; ".join([
        "default-src 'none'", " ".join(["style-src 'unsafe-inline'", *styles]),
        *([f"script-src 'sha256-{digest}' {' '.join(scripts)}", "img-src data:", "font-src data:", "worker-src blob:"]
          if urls else []), "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "sandbox" + (" allow-scripts allow-popups allow-popups-to-escape-sandbox allow-downloads" if urls else "")])
    return b"<!doctype html>" + page.encode(), policy


def show_openapi(handler: Handler) -> None:
    handler.respond_static(dump_json(openapi(_scene_of(handler))), "application/json", (("Vary", "Accept-Language"),))


def show_docs(handler: Handler) -> None:
    """/docs and /redoc; `?plain` is the built-in reader alone."""
    query = urllib.parse.parse_qs(handler.path.partition("?")[2])
    page, policy = reader_page(_scene_of(handler), normal_path(handler.path)[1:], "plain" in query,
                               handler.server.gateway.settings.docs_cdn)
    handler.respond_static(page, "text/html; charset=utf-8", (
        ("Vary", "Accept-Language"), ("Content-Security-Policy", policy)))


ROUTES.update({"/openapi.json": {"GET": Route(show_openapi, public=True)},
               **{f"/{name}": {"GET": Route(show_docs, public=True)} for name in READERS}})


# === 16. Admin ===============================================================
#
# The page at /admin and its API.  The page is static; all that it shows comes from /admin/api/… as JSON.

# --- what a request says --------------------------------------------------------

def query_of(handler: Handler) -> Dict[str, str]:
    """The query of a request's target, the last of each name."""
    found = urllib.parse.parse_qs(handler.path.partition("?")[2], keep_blank_values=True)
    return {name: values[-1] for name, values in found.items()}


def number_in(query: Mapping[str, str], name: str, default: int, high: int) -> int:
    """A whole number of a query, from 1 to `high`; BadRequest."""
    text = query.get(name, "") or str(default)
    if not re.fullmatch(r"\d{1,16}", text) or not 1 <= int(text) <= high:
        raise BadRequest(f"{name}: a whole number from 1 to {high} expected", param=name)
    return int(text)


def choice_in(query: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    """One of `choices`, the first where the query names none; BadRequest."""
    if query.get(name, choices[0]) not in choices:
        raise BadRequest(f"{name}: one of {', '.join(choices)} expected", param=name)
    return query.get(name, choices[0])


def read_fields(handler: Handler, kinds: Mapping[str, str]) -> Json:
    """The fields of a request's body, each of its kind (as of settings) or null; BadRequest names the bad one."""
    body = parse_body(handler.read_body(ADMIN_BODY_BYTES))[0]
    for name, value in body.items():
        if name not in kinds:
            raise BadRequest(f"{one_line(name, 60)}: no such field" + nearest(name, kinds), param=one_line(name, 60))
        wanted = kinds[name]
        if value is not None and (not isinstance(value, _KINDS[wanted])
                                  or isinstance(value, bool) is not (wanted == "bool")):
            raise BadRequest(f"{name}: {_KIND_NAME[wanted]} expected", param=name)
    return body


def needed(body: Json, name: str) -> Any:
    if not body.get(name):
        raise BadRequest(f"{name}: it is missing", param=name)
    return body[name]


def named_in(handler: Handler) -> str:
    """The name that a path ends in."""
    return urllib.parse.unquote(handler.argument)


def no_content(handler: Handler, *headers: Tuple[str, str]) -> None:
    handler.respond(204, b"", "", headers)


# --- signing in ------------------------------------------------------------------

def cookie_header(handler: Handler, token: str) -> Tuple[str, str]:
    """A session's cookie; without a token the one that takes it away."""
    secure = "; Secure" if address_for(handler).startswith("https:") else ""
    return "Set-Cookie", (f"{session_cookie(handler.server)}={token}; Path=/admin; HttpOnly; SameSite=Strict; "
                          f"Max-Age={SESSION_S if token else 0}{secure}")


def show_session(handler: Handler) -> None:
    """GET /admin/api/session: whether somebody is signed in, and what the page needs before."""
    gateway, state = handler.server.gateway, "new"
    if not gateway.sessions.is_new:
        try:
            check_session(handler)
            state = "signed_in"
        except Unauthorized:
            state = "signed_out"
    settings = gateway.settings
    handler.respond_json({"state": state, "user": "admin", "version": __version__, "language": settings.language,
                          "theme_mode": settings.theme_mode, "base_url": address_for(handler)})


def sign_in(handler: Handler) -> None:
    """POST /admin/api/session."""
    body, sessions = read_fields(handler, {"user": "str", "password": "str"}), handler.server.gateway.sessions
    password = needed(body, "password")
    if sessions.is_new:
        raise Unauthorized("there is no password yet; the code on the server's console lets you set one",
                           code="no_password")
    right = sessions.try_password(address_of(handler), password)
    if not right or body.get("user") not in (None, "admin"):
        raise Unauthorized("user or password is wrong", code="wrong_password")
    no_content(handler, cookie_header(handler, sessions.open()))


def sign_out(handler: Handler) -> None:
    """DELETE /admin/api/session."""
    sessions = handler.server.gateway.sessions
    body = read_fields(handler, {"everywhere": "bool"}) if handler.has_body else {}
    if body.get("everywhere"):
        sessions.close_all()
    sessions.close(session_token(handler))
    handler.server.gateway.live.ring()                   # who watches with it is told
    no_content(handler, cookie_header(handler, ""))


def set_password(handler: Handler) -> None:
    """POST /admin/api/password: the first one by the console's code, another one by who is signed in."""
    body = read_fields(handler, {"code": "str", "current": "str", "password": "str"})
    gateway, address = handler.server.gateway, address_of(handler)
    password = needed(body, "password")
    if gateway.origins.get("admin_password") == "environment":
        raise Conflict(f"{ENV_PREFIX}ADMIN_PASSWORD sets the password; change it there", code="set_elsewhere")
    if not gateway.sessions.is_new:
        check_session(handler)
    least, most = PASSWORD_LENGTH
    if not least <= len(password) <= most:               # before the code is used up
        raise BadRequest(f"a password has from {least} to {most} characters", param="password", code="bad_password")
    if gateway.sessions.is_new:
        if not gateway.sessions.try_code(address, needed(body, "code")):
            raise Forbidden("the code is wrong; it stands on the server's console", code="wrong_code", param="code",
                            should_retry=None)
    elif not gateway.sessions.try_password(address, needed(body, "current")):
        raise Forbidden("the current password is wrong", code="wrong_password", param="current", should_retry=None)
    gateway.set_password(hash_password(password))
    no_content(handler, cookie_header(handler, gateway.sessions.open()))


# --- what is going on -------------------------------------------------------------

def limits_of(gateway: Gateway) -> List[Json]:
    """Each client key's limits, and what is used of them."""
    rows = []
    for key in gateway.state.door.keys:
        used = gateway.limiter.used(key) if key.limits else {}
        rows.append({"key": key.name, **{name: {"used": used.get(name, 0), "limit": limit}
                                         for name, limit in key.limits.items()}})
    return rows


def today_of(gateway: Gateway) -> Json:
    """Requests, errors and tokens since midnight, or of the last day where usage is not kept."""
    rows = [counts for _, counts in gateway.usage.rows(1)] if gateway.settings.usage else [
        counts for _, step in gateway.series.steps("day") for _, counts in step]
    return {name: sum(row[place] for row in rows) for place, name in enumerate(Series.COUNTS)}


def next_step(gateway: Gateway) -> str:
    """The one thing to do now: `login_or_provider`, `models`, `client`, or nothing more."""
    router = gateway.current(look=False).router
    if all(provider.problem for provider in router.providers.values()):
        return "login_or_provider"
    if not router.default_model and not router.aliases:
        return "models"
    return "" if gateway.live.requests.count or not gateway.usage.is_empty else "client"


def overview_of(server: Server) -> Json:
    gateway = server.gateway
    return {"health": gateway.health(), "address": server.url, "needs_key": gateway.state.door.required,
            "queue": gateway.queues(), "connections": server.connections, "in_flight": gateway.in_flight,
            "today": today_of(gateway), "limits": limits_of(gateway), "next": next_step(gateway)}


def show_overview(handler: Handler) -> None:
    handler.respond_json(overview_of(handler.server))


def show_requests(handler: Handler) -> None:
    limit = number_in(query_of(handler), "limit", 200, 10_000)
    handler.respond_json({"data": handler.server.gateway.history()[:limit]})


#: Groups that a chart shows apart; the rest together are `…`.
CHART_GROUPS = 8

SERIES_BY = ("model", "provider", "key")


def show_series(handler: Handler) -> None:
    """GET /admin/api/series: the last hour and day out of the memory, the last month out of the usage book."""
    query, gateway = query_of(handler), handler.server.gateway
    span = choice_in(query, "span", ("hour", "day", "month"))
    place = SERIES_BY.index(choice_in(query, "by", SERIES_BY))
    steps = month_of(gateway) if span == "month" else gateway.series.steps(span)
    totals: Dict[str, int] = {}
    for _, rows in steps:
        for names, counts in rows:
            totals[names[place]] = totals.get(names[place], 0) + sum(counts)
    shown = sorted(totals, key=lambda name: -totals[name])[:CHART_GROUPS]
    points = []
    for at, rows in steps:
        groups: Dict[str, Json] = {}
        for names, counts in rows:
            name = names[place] if names[place] in shown else Series.OTHER
            row = groups.setdefault(name, dict.fromkeys(Series.COUNTS, 0))
            for field_name, count in zip(Series.COUNTS, counts):
                row[field_name] += count
        points.append({"at": at, "groups": groups})
    step_s = 86400 if span == "month" else Series.SPANS[span][0]
    handler.respond_json({"span": span, "step_s": step_s, "start": points[0]["at"], "points": points})


def month_of(gateway: Gateway, days: int = 31) -> List[Tuple[int, List[Tuple[Tuple[str, ...], List[int]]]]]:
    """Like Series.steps, a step for each of the last days; the book's names are day, model, provider, key."""
    today = time.localtime()
    steps: Dict[str, Tuple[int, List[Any]]] = {}
    for back in range(days - 1, -1, -1):                 # mktime knows what the 0th of a month is, and summer time
        at = int(time.mktime((today.tm_year, today.tm_mon, today.tm_mday - back, 0, 0, 0, 0, 0, -1)))
        steps[time.strftime("%Y-%m-%d", time.localtime(at))] = (at, [])
    for names, counts in gateway.usage.rows(days):
        if names[0] in steps:
            steps[names[0]][1].append((names[1:], counts))
    return list(steps.values())


def usage_rows(handler: Handler) -> Tuple[str, int, List[Json]]:
    """By what, of how many days, and the rows; times are averages in seconds, null where there are none."""
    query, gateway = query_of(handler), handler.server.gateway
    by, days = choice_in(query, "by", ("model", "provider", "key", "day")), number_in(query, "days", 30, 3660)
    rows = gateway.usage.report(by, days, gateway.settings.prices)
    if by == "day":
        rows.sort(key=lambda row: row["day"])
    return by, days, [told_usage(row.pop(by), row) for row in rows]


def told_usage(name: str, row: Mapping[str, Any]) -> Json:
    """A row of UsageBook.report for the page."""
    counts = {count: row[count] for count in USAGE_COUNTS if count not in ("streams", "first_ms", "total_ms")}
    return {"name": name, **counts, "first_s": row["first_ms"] / row["streams"] / 1000 if row["streams"] else None,
            "total_s": row["total_ms"] / row["requests"] / 1000 if row["requests"] else None,
            "cost": None if row["cost"] is None else round(row["cost"], 6)}


def show_usage(handler: Handler) -> None:
    by, days, rows = usage_rows(handler)
    gateway = handler.server.gateway
    total: Dict[str, Any] = dict.fromkeys((*USAGE_COUNTS, "cost"), 0)
    reports = gateway.usage.report(by, days, gateway.settings.prices)
    for row in reports:
        for name in USAGE_COUNTS:
            total[name] += row[name]
    costs = [row["cost"] for row in reports if row["cost"] is not None]
    handler.respond_json({"by": by, "days": days, "rows": rows, "enabled": gateway.settings.usage,
                          "total": told_usage("", {**total, "cost": sum(costs) if costs else None})})


def csv_field(text: str) -> str:
    """RFC 4180; what a spreadsheet would take for a formula (names come from clients) begins with a quote."""
    text = "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
    return '"' + text.replace('"', '""') + '"' if re.search(r'[",\r\n]', text) else text


def csv_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Lines of the fields `names`, and a head; null is empty."""
    lines = [list(names), *([("" if row[name] is None else str(row[name])) for name in names] for row in rows)]
    return "\n".join(",".join(map(csv_field, line)) for line in lines)


def download(handler: Handler, text: str, content_type: str, name: str) -> None:
    handler.respond(200, text.encode("utf-8", "backslashreplace"), content_type + "; charset=utf-8",
                    [("Content-Disposition", f'attachment; filename="{name}"')])


def download_usage(handler: Handler) -> None:
    by, days, rows = usage_rows(handler)
    names = [*told_usage("", {**dict.fromkeys(USAGE_COUNTS, 0), "cost": None})]
    text = csv_of(rows, names).replace("name,", by + ",", 1)
    download(handler, "\ufeff" + text + "\n", "text/csv", f"iflow2api-usage-{days}d.csv")       # Excel wants the mark


def log_lines_of(ring: Ring) -> List[Json]:
    return [told_log(number, line) for number, line in ring.after(0, LOG_LINES)[1]]


def show_logs(handler: Handler) -> None:
    """GET /admin/api/logs: the last lines at a level or above that hold `search`, the oldest first."""
    query, ring = query_of(handler), handler.server.gateway.live.logs
    level = getattr(logging, choice_in(query, "level", ("debug", "info", "warning", "error")).upper())
    limit, before = number_in(query, "limit", 1000, LOG_LINES), number_in(query, "before", 10 ** 15, 10 ** 15)
    wanted = query.get("search", "").lower()
    found = [pair for pair in ring.after(0, LOG_LINES)[1] if pair[0] < before and pair[1][1] >= level]
    lines = [told_log(number, line) for number, line in (found if wanted else found[-limit:])]
    lines = [line for line in lines if wanted in line["text"].lower()]
    handler.respond_json({"data": lines[-limit:], "first": ring.count - len(ring) + 1, "last": ring.count})


def download_logs(handler: Handler) -> None:
    lines = [f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(line['at']))} {line['level'].upper()} {line['text']}"
             for line in log_lines_of(handler.server.gateway.live.logs)]
    download(handler, "\n".join(lines) + "\n", "text/plain", "iflow2api.log")


def memory_bytes() -> Optional[int]:
    """What the process takes of the memory now, where Linux says so."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def show_about(handler: Handler) -> None:
    """GET /admin/api/about; `diagnostics` is for bug reports and holds no secret."""
    server = handler.server
    gateway, config = server.gateway, server.gateway.config
    paths = {"program": os.path.abspath(__file__), "iflow": os.path.expanduser(IFLOW_FILE)}
    if config is not None:
        paths.update(config=config.path, usage=os.path.join(config.folder, "usage.jsonl"), log=log_path(gateway))
    facts = {"version": __version__, "python": sys.version.split()[0], "platform": sys.platform,
             "executable": sys.executable, "pid": os.getpid(), "started_at": gateway.started_at,
             "uptime_s": int(time.time() - gateway.started_at), "paths": {n: path for n, path in paths.items() if path},
             "threads": threading.active_count(), "memory_bytes": memory_bytes()}
    lines = [f"iflow2api {__version__}, Python {sys.version}, {sys.platform}, {ssl.OPENSSL_VERSION}",
             *(f"{name}: {value}" for name, value in facts.items() if name not in ("version", "python", "paths")),
             *(f"{name}: {path}" for name, path in facts["paths"].items()), "health: " + json.dumps(gateway.health())]
    for name, origin in gateway.origins.items():
        shown = hide_secrets(name, getattr(gateway.settings, name))
        lines.append(f"{name} ({origin}): {json.dumps(shown, ensure_ascii=False)}")
    home = os.path.expanduser("~")
    text = redact("\n".join(lines))
    handler.respond_json({**facts, "diagnostics": text.replace(home, "~") if len(home) > 1 else text})


def show_instances(handler: Handler) -> None:
    server = handler.server
    handler.respond_json({"data": [{"name": "default", "url": server.url, "version": __version__,
                                    "started_at": server.gateway.started_at, "this": True}]})


# --- live --------------------------------------------------------------------------

#: A viewer gets news at most every EVENTS_GAP_S, the overview every OVERVIEW_S while it changes, and a sign of life.
EVENTS_GAP_S, OVERVIEW_S, LIFE_S = 0.1, 2.0, 15.0


class Viewer:
    """One open page: how far it has read, and what it has to be told next.

    The id of an event is `START-REQUESTS-LOGS`, how far the rings were read, of a server that started at START.
    """

    def __init__(self, server: Server, logs: bool, last_id: str) -> None:
        gateway = server.gateway
        self._server, self._gateway, self._logs = server, gateway, logs
        self._start = int(gateway.started_at * 1000)
        self._requests, self._lines = gateway.live.requests.count, gateway.live.logs.count
        found = re.fullmatch(r"(\d{1,15})-(\d{1,15})-(\d{1,15})", last_id)
        if found and int(found.group(1)) == self._start:
            self._requests = min(self._requests, int(found.group(2)))
            self._lines = min(self._lines, int(found.group(3)))
        elif found:                      # of an earlier run: all of this one is news
            self._requests = self._lines = 0
        self._version = ""
        self._overview: Json = {}
        self._looked_at = self._told_at = 0.0            #: monotonic

    def news(self) -> bytes:
        """The events that have come up; b"" for none."""
        now, live, events = time.monotonic(), self._gateway.live, []
        lost, records = live.requests.after(self._requests)
        self._requests += lost + len(records)
        lines: List[Tuple[int, Any]] = []
        if self._logs:
            missed, lines = live.logs.after(self._lines)
            self._lines, lost = self._lines + missed + len(lines), lost + missed
        events += [("dropped", {"count": lost})] if lost else []
        events += [("request", record.facts()) for _, record in records]
        events += [("log", told_log(number, line)) for number, line in lines]
        if now - self._looked_at >= OVERVIEW_S:
            self._looked_at = now
            events += self._state(now)
        ident = f"{self._start}-{self._requests}-{self._lines}"
        return b"".join(f"id: {ident}\nevent: {name}\ndata: ".encode() + dump_json(value) + b"\n\n"
                        for name, value in events)

    def _state(self, now: float) -> List[Tuple[str, Json]]:
        """The overview, if it has changed or nothing was said for long; the config's version, if that has changed."""
        events: List[Tuple[str, Json]] = []
        version = self._gateway.config_version()
        if version != self._version:
            events.append(("config", {"version": version}))
        overview = overview_of(self._server)
        essence = {**overview, "health": {**overview["health"], "uptime_s": 0}}
        if essence != self._overview or now - self._told_at >= LIFE_S:
            events.append(("overview", overview))
            self._told_at = now
        self._version, self._overview = version, essence
        return events


def stream_events(handler: Handler) -> None:
    """GET /admin/api/events: what happens, until the session ends, the page leaves or the server stops."""
    server, session, query = handler.server, handler.session, query_of(handler)
    gateway, logs = server.gateway, query.get("logs") == "1"
    live = gateway.live
    viewer = Viewer(server, logs, handler.headers.get("last-event-id", query.get("last_event_id", "")))
    with live.viewer(logs):
        handler.close_connection = True                  # no length, no chunks: the end is the end
        handler.write(handler.head(200, [("Content-Type", "text/event-stream; charset=utf-8"),
                                         ("X-Accel-Buffering", "no")]))
        pause = threading.Event()
        handler.busy = False             # a server that stops does not wait for this one
        while handler.command != "HEAD" and not live.closed and gateway.sessions.is_alive(session):
            rung = live.wait(-1, 0)
            news = viewer.news()
            if news:
                handler.write(news)
            if has_left(handler.connection):
                raise ClientGone
            pause.wait(EVENTS_GAP_S)
            live.wait(rung, OVERVIEW_S)


# --- what is set up ----------------------------------------------------------------

def told_setting(gateway: Gateway, name: str) -> Json:
    """A setting with what a form needs to know of it."""
    facts, default = SETTING[name].metadata, default_of(name)
    value, secret = getattr(gateway.settings, name), bool(facts.get("secret"))
    told: Json = {"name": name, "kind": facts["kind"], "label": dict(zip(("zh", "en"), facts["label"])),
                  "group": next(group for group, names in SETTING_GROUPS.items() if name in names),
                  "value": hide_secrets(name, value), "default": hide_secrets(name, default),
                  "origin": gateway.origins.get(name, "default"), "secret": secret,
                  "restart": bool(facts.get("restart"))}
    told.update((key, facts[key]) for key in ("choices", "low", "high", "flag", "older") if key in facts)
    return {**told, **({"set": bool(value)} if secret else {})}


def config_document(gateway: Gateway) -> Json:
    return {"version": gateway.config_version(), "path": gateway.config.path if gateway.config else "",
            "settings": [told_setting(gateway, name) for name in SETTING], "problems": list(gateway.problems)}


def show_config(handler: Handler) -> None:
    handler.respond_json(config_document(handler.server.gateway))


def told_provider(gateway: Gateway, provider: Provider, entry: Json, source: str) -> Json:
    """A provider with its keys' state; `entry` is what stands in the settings, {} where it stems from elsewhere."""
    given = entry.get("api_keys") if isinstance(entry.get("api_keys"), list) else None
    masked = _hide_in_provider({"api_keys": provider.api_keys if given is None else given})["api_keys"]
    states = gateway.key_states(provider) if len(provider.api_keys) == len(masked) else []
    keys = [{"index": index, "masked": text, "state": states[index][0] if states else "ok",
             "rest_s": round(states[index][1], 1) if states else 0} for index, text in enumerate(masked)]
    shown = _hide_in_provider({"headers": entry.get("headers") or {},
                               "proxy": provider.proxy or entry.get("proxy") or ""})
    preset = next((name for name, known in PRESETS.items() if known.base_url == provider.base_url), "")
    return {"name": provider.name, "kind": provider.kind, "base_url": provider.base_url or entry.get("base_url", ""),
            "preset": preset, "models": list(provider.models), "facts": dict(provider.facts), "keys": keys, **shown,
            "concurrency": provider.concurrency, "key_concurrency": provider.key_concurrency,
            "timeout_s": provider.timeout_s, "profile": provider.profile, "vision_model": provider.vision_model,
            "sticky": provider.sticky, "preserve_reasoning_content": provider.preserve_reasoning_content,
            "usable": not provider.problem, "problem": provider.problem,
            "circuit": gateway.circuit_of(provider), "source": source}


def told_providers(gateway: Gateway) -> List[Json]:
    entries = {entry.get("name"): entry for entry in gateway.settings.providers if isinstance(entry, dict)}
    source = {"environment": "flag", "default": "file"}.get(gateway.origins.get("providers", "file"), "")
    source = source or gateway.origins.get("providers", "file")
    return [told_provider(gateway, provider, entries.get(provider.name, {}), source if provider.name in entries else
                          "login" if provider.name == "iflow" else "detected")
            for provider in gateway.current(look=False).router.providers.values()]


def show_providers(handler: Handler) -> None:
    gateway = handler.server.gateway
    default = gateway.current(look=False).router.default
    handler.respond_json({"version": gateway.config_version(), "default_provider": default.name if default else "",
                          "data": told_providers(gateway)})


def show_presets(handler: Handler) -> None:
    environ = handler.server.gateway.environ
    handler.respond_json({"data": [
        {"name": name, "title": name, "base_url": preset.base_url, "key_variable": preset.key,
         "key_set": bool(preset.key and environ.get(preset.key)), "local": name in LOCAL_ENGINES,
         "models": [{"id": model, "context": context or None, "max_output": limit or None, "vision": vision}
                    for model, context, limit, vision in preset.models]} for name, preset in PRESETS.items()]})


def show_admin_models(handler: Handler) -> None:
    """GET /admin/api/models: every name that can be asked for, and what is known of the model behind it."""
    gateway = handler.server.gateway
    router, data = gateway.current().router, []
    aliases = {pattern for pattern, _ in router.aliases}
    for model in gateway.models():
        target = router.resolve(model["id"])[0]
        facts = target.provider.facts.get(target.model, {})
        sees = facts.get("vision") or target.model == target.provider.vision_model or None
        data.append({"id": model["id"], "provider": target.provider.name, "context": facts.get("context"),
                     "max_output": facts.get("max_output"), "vision": facts.get("vision", sees),
                     "listed": "config" if target.model in target.provider.models else "provider",
                     "alias": model["id"] in aliases})
    handler.respond_json({"data": data, "default_model": router.default_model, "aliases": gateway.settings.aliases,
                          "version": gateway.config_version()})


def explain_route(handler: Handler) -> None:
    """POST /admin/api/routes/explain; with `aliases` as they would be after a save."""
    handler.respond_json(handler.server.gateway.explain(parse_body(handler.read_body(ADMIN_BODY_BYTES))[0]))


def show_keys(handler: Handler) -> None:
    gateway, data = handler.server.gateway, []
    entries = {entry.get("name"): entry for entry in gateway.settings.client_keys if isinstance(entry, dict)}
    for key in gateway.state.door.keys:
        entry = entries.get(key.name, {})
        data.append({"name": key.name, "created": entry.get("created"), "expires": entry.get("expires"),
                     "expired": key.expires_at <= time.time(), "models": list(key.models), "limits": dict(key.limits),
                     "used": gateway.limiter.used(key) if key.limits else {}})
    handler.respond_json({"version": gateway.config_version(), "data": data,
                          "address_limits": gateway.settings.address_limits,
                          "custom_api_key": mask(gateway.settings.custom_api_key)})


# --- changing what is set up ---------------------------------------------------------

#: Settings with endpoints of their own.
SET_ELSEWHERE = ("admin_password", "providers", "client_keys", "accounts")


def change_config(gateway: Gateway, edit: Callable[[Json], None]) -> None:
    """Gateway.change_config, its failures in words for the page.  Where `edit` raises, nothing is written."""
    if gateway.config is None:
        raise Conflict("this server has no config.json, so nothing can be changed here", code="no_config")
    try:
        gateway.change_config(edit)
    except OSError as exc:
        reason = exc.strerror or exc
        raise GatewayError(f"{gateway.config.path} can't be written: {reason}", code="cannot_write") from None


def check_ours(gateway: Gateway, name: str) -> None:
    """Conflict where a setting comes from the environment or a flag: what the file says would not count."""
    origin = gateway.origins.get(name)
    if origin in ("environment", "flag"):
        where = ENV_PREFIX + name.upper() if origin == "environment" else "a flag of this run"
        raise Conflict(f"{name} is set by {where}, which stands above config.json", code="set_elsewhere", param=name)


def conflict(gateway: Gateway, raw: Json, changed: Json) -> Conflict:
    """What tells a writer that somebody else was faster: name -> what he wanted, what is there now (no secrets)."""
    message = f"changed by somebody else in the meantime: {', '.join(map(one_line, changed))}"
    exc = Conflict(message, code="changed_meanwhile")
    exc.body = {"error": {"message": message, "type": exc.type, "param": next(iter(changed)), "code": exc.code},
                "version": gateway.versions.note(raw), "changed": changed}
    return exc


def save_config(handler: Handler) -> None:
    """PATCH /admin/api/config: `set` and `unset` settings, unless another one has changed them since `version`."""
    gateway = handler.server.gateway
    body = read_fields(handler, {"version": "str", "set": "dict", "unset": "list"})
    version = needed(body, "version")
    values = checked_settings(gateway, body.get("set") or {}, body.get("unset") or [])

    def edit(raw: Json) -> None:
        changed = {}
        for name, (value, keep) in values.items():
            theirs = raw.get(name, default_of(name))
            if gateway.versions.has_changed(version, raw, name) and (theirs != value or keep != (name in raw)):
                changed[name] = {"yours": hide_secrets(name, value), "theirs": hide_secrets(name, theirs)}
        if changed:
            raise conflict(gateway, raw, changed)
        for name, (value, keep) in values.items():
            raw.pop(name, None)
            if keep:
                raw[name] = value

    change_config(gateway, edit)
    handler.respond_json(config_document(gateway))


def checked_settings(gateway: Gateway, given: Json, dropped: Sequence[Any]) -> Dict[str, Tuple[Any, bool]]:
    """name -> (value, whether it is to stand in the file) of what shall change; BadRequest names the bad one.

    A secret that comes as it is shown, masked, is left alone.
    """
    values: Dict[str, Tuple[Any, bool]] = {}
    for name in [*given, *dropped]:
        shown = one_line(name, 60)
        if not isinstance(name, str) or name not in SETTING:
            raise BadRequest(f"there is no setting {shown!r}" + nearest(shown, SETTING), param=shown)
        if name in SET_ELSEWHERE:
            raise BadRequest(f"{name} is not changed here", param=name, code="set_elsewhere")
        if name not in given:
            values[name] = (default_of(name), False)
            continue
        try:
            value = check_setting(name, given[name])
        except ValueError as exc:
            raise BadRequest(f"{name}: {exc}", param=name) from None
        current = getattr(gateway.settings, name)
        if not (SETTING[name].metadata.get("secret") and value and value == hide_secrets(name, current)):
            values[name] = (value, True)
    check_together(gateway, {name: value for name, (value, _) in values.items()})
    return values


def check_together(gateway: Gateway, values: Json) -> None:
    """BadRequest for settings that are sound by themselves, but not with the others."""
    known, settings = gateway.state.router, replace(gateway.settings, **values)
    if {"aliases", "default_provider"} & set(values):
        router = gateway.routed(replace(settings, providers=gateway.current(look=False).settings.providers))
        problems = [problem for problem in router.problems if problem not in known.problems]
        if problems and router.faults - known.faults:
            raise BadRequest(problems[0], param=next(iter(router.faults - known.faults)))
        if problems:
            raise BadRequest(problems[0], param="aliases" if "aliases" in values else "default_provider")
    if values.get("upstream_proxy"):
        problems = proxy_problems(Settings(upstream_proxy=values["upstream_proxy"], upstream_proxy_enabled=True), ())
        if problems:
            raise BadRequest(problems[0], param="upstream_proxy")


#: What a provider is made of, as the page sends it.
PROVIDER_FIELDS = {"name": "str", "preset": "str", "base_url": "str", "api_keys": "list", "models": "list",
                   "kind": "str", "concurrency": "int", "key_concurrency": "int", "timeout_s": "float", "proxy": "str",
                   "headers": "dict", "profile": "dict", "vision_model": "str", "sticky": "bool",
                   "preserve_reasoning_content": "bool"}


def provider_entry(body: Json, before: Json) -> Json:
    """The entry of `providers` that a request describes; of `before` what the request does not name.  BadRequest.

    What comes masked, or as {"keep": index}, is what `before` has there; null takes a field away.
    """
    if body.get("preset") and body["preset"] not in PRESETS:
        raise BadRequest(f"there is no preset {one_line(body['preset'], 60)!r}", param="preset")
    preset = PRESETS.get(body.get("preset") or "")
    if not before and preset is None and not body.get("base_url"):
        raise BadRequest("base_url: it is missing; or name a preset", param="base_url")
    entry = before or entry_for("", body.get("kind") or "", body.get("base_url") or "", preset, ())
    given = {name: body[name] for name in PROVIDER_FIELDS if name in body and name != "preset"}
    facts = {model["id"]: model for model in entry.get("models") or () if isinstance(model, dict) and "id" in model}
    if given.get("models"):
        given["models"] = [facts.get(model, model) if isinstance(model, str) else model for model in given["models"]]
    if given.get("base_url"):            # a bare host of a known API gets its path
        given["base_url"] = entry_at(given["base_url"])["base_url"]
    if given.get("api_keys"):
        given["api_keys"] = [kept_key(key, place, before) for place, key in enumerate(given["api_keys"])]
    if given.get("headers"):
        given["headers"] = {name: kept_header(name, value, before) for name, value in given["headers"].items()}
    if given.get("proxy") and given["proxy"] == _hide_in_provider(before).get("proxy"):
        given["proxy"] = before["proxy"]
    made = {name: value for name, value in {**entry, **given}.items() if value is not None}
    return {**made, "base_url": check_provider(made).base_url}


def kept_key(key: Any, place: int, before: Json) -> str:
    """A key as it is to be stored; new ones may be no references to the environment."""
    old = before.get("api_keys") if isinstance(before.get("api_keys"), list) else []
    if isinstance(key, dict):
        index = key.get("keep")
        if type(index) is not int or not 0 <= index < len(old):
            raise BadRequest(f"api_keys[{place}]: no key is at {one_line(json.dumps(index), 40)}", param="api_keys")
        return old[index]
    if not isinstance(key, str) or not key.strip():
        raise BadRequest(f"api_keys[{place}]: a string expected", param="api_keys")
    masked = _hide_in_provider({"api_keys": old})["api_keys"]
    if key in masked:
        return old[place] if place < len(old) and masked[place] == key else old[masked.index(key)]
    if "…" in key:
        raise BadRequest(f"api_keys[{place}]: this masked key is none of those there are", param="api_keys")
    return new_secret(key.strip(), "api_keys")


def kept_header(name: str, value: Any, before: Json) -> str:
    headers = before.get("headers") if isinstance(before.get("headers"), dict) else {}
    if not isinstance(value, str):
        raise BadRequest(f"headers: {one_line(name, 60)}: a string expected", param="headers")
    if name in headers and value == _hide_in_provider({"headers": headers})["headers"][name]:
        return headers[name]
    return new_secret(value, "headers")


def new_secret(text: str, param: str) -> str:
    """A secret as providers keep it; `$NAME` would read the server's environment, which the page may not."""
    if _REFERENCE.fullmatch(text) or is_sealed(text):
        raise BadRequest(f"{param}: {one_line(text, 40)} can't be added here; put it into config.json, or use "
                         "`provider add` on the command line", param=param, code="reference")
    return "$" + text if text.startswith("$$") else text


def check_provider(entry: Json) -> Provider:
    """BadRequest for an entry that can't work; whether its variables are set is not the page's business."""
    def literal(text: Any) -> bool:
        return not (isinstance(text, str) and (_REFERENCE.fullmatch(text) or is_sealed(text)))

    tried = {**entry, "api_keys": [key for key in entry.get("api_keys", ()) if literal(key)],
             "headers": {name: value for name, value in entry.get("headers", {}).items() if literal(value)}}
    try:
        provider = parse_provider(tried, {})
        problem = provider.problem or "".join(proxy_problems(Settings(), [provider])[:1])
    except ValueError as exc:
        raise BadRequest(str(exc), param="name") from None
    if problem:
        param = next((name for name in PROVIDER_FIELDS if problem.startswith(name)), None)
        raise BadRequest(problem, param=param or ("api_keys" if problem.startswith("a key") else
                                                  "headers" if "header" in problem else "proxy"))
    return provider


def place_of(raw: Json, name: str) -> int:
    """Where a provider stands in config.json; NotFound."""
    for place, entry in enumerate(raw.get("providers") if isinstance(raw.get("providers"), list) else ()):
        if isinstance(entry, dict) and entry.get("name") == name:
            return place
    raise NotFound(f"config.json has no provider {one_line(name, 60)!r}", code="not_found", param="name")


def has_provider(raw: Json, name: str) -> bool:
    try:
        return place_of(raw, name) >= 0
    except NotFound:
        return False


def name_taken(name: str) -> Conflict:
    return Conflict(f"the name {one_line(name, 60)} is taken", code="name_taken", param="name")


def shown_provider(handler: Handler, name: str, status: int) -> None:
    """Answer with the provider as the list has it."""
    gateway = handler.server.gateway
    found = next((row for row in told_providers(gateway) if row["name"] == name), {"name": name})
    handler.respond_json({"version": gateway.config_version(), **found}, status)


def add_provider(handler: Handler) -> None:
    """POST /admin/api/providers."""
    gateway, body = handler.server.gateway, read_fields(handler, {**PROVIDER_FIELDS, "version": "str"})
    check_ours(gateway, "providers")
    name = needed(body, "name")
    entry = provider_entry(body, {})

    def edit(raw: Json) -> None:
        if has_provider(raw, name):
            raise name_taken(name)
        raw["providers"] = [*(raw["providers"] if isinstance(raw.get("providers"), list) else []), entry]

    change_config(gateway, edit)
    shown_provider(handler, name, 201)


def edit_provider(handler: Handler) -> None:
    """PUT /admin/api/providers/NAME; a new name follows wherever settings name it."""
    gateway, name = handler.server.gateway, named_in(handler)
    body = read_fields(handler, {**PROVIDER_FIELDS, "version": "str"})
    check_ours(gateway, "providers")
    version, wanted = needed(body, "version"), body.get("name") or name

    def edit(raw: Json) -> None:
        place = place_of(raw, name)
        before = raw["providers"][place]
        if gateway.versions.has_changed(version, raw, f"providers/{name}"):
            yours = {field_name: value for field_name, value in body.items() if field_name not in ("version", "preset")}
            raise conflict(gateway, raw, {name: {"yours": _hide_in_provider(yours),
                                                 "theirs": _hide_in_provider(before)}})
        if wanted != name and has_provider(raw, wanted):
            raise name_taken(wanted)
        raw["providers"][place] = provider_entry({**body, "name": wanted}, before)
        if wanted != name:
            rename_provider(raw, name, wanted)

    change_config(gateway, edit)
    shown_provider(handler, wanted, 200)


def rename_provider(raw: Json, old: str, new: str) -> None:
    """Let whatever names a provider in config.json name it anew."""
    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(item) for item in value]
        if isinstance(value, dict):
            return {**value, "model": renamed(value.get("model"))}
        return f"{new}/{value[len(old) + 1:]}" if isinstance(value, str) and value.startswith(old + "/") else value

    if raw.get("default_provider") == old:
        raw["default_provider"] = new
    if isinstance(raw.get("aliases"), dict):
        raw["aliases"] = {pattern: renamed(value) for pattern, value in raw["aliases"].items()}
    if "default_model" in raw:
        raw["default_model"] = renamed(raw["default_model"])


def remove_provider(handler: Handler) -> None:
    """DELETE /admin/api/providers/NAME."""
    gateway, name = handler.server.gateway, named_in(handler)
    check_ours(gateway, "providers")

    def edit(raw: Json) -> None:
        del raw["providers"][place_of(raw, name)]
        if raw.get("default_provider") == name:
            del raw["default_provider"]

    change_config(gateway, edit)
    no_content(handler)


def order_providers(handler: Handler) -> None:
    """POST /admin/api/providers/order: all names in their new order; the first is the default, unless one is chosen."""
    gateway, body = handler.server.gateway, read_fields(handler, {"version": "str", "names": "list"})
    check_ours(gateway, "providers")
    names = needed(body, "names")

    def edit(raw: Json) -> None:
        entries = raw.get("providers") if isinstance(raw.get("providers"), list) else []
        known = {entry["name"]: entry for entry in entries
                 if isinstance(entry, dict) and isinstance(entry.get("name"), str)}
        if not all(isinstance(name, str) for name in names) or sorted(names) != sorted(known):
            if gateway.versions.has_changed(needed(body, "version"), raw, "providers"):
                raise conflict(gateway, raw, {"providers": {"yours": names, "theirs": list(known)}})
            raise BadRequest("names: every provider of config.json once expected", param="names")
        raw["providers"] = [*(known[name] for name in names), *(e for e in entries if e not in known.values())]

    change_config(gateway, edit)
    show_providers(handler)


#: Whose usage the page's own requests are.
ADMIN_KEY = ClientKey("admin", b"")


def try_provider(handler: Handler) -> None:
    """POST /admin/api/providers/test: one there is, by its name, or a draft; `provider test` says the same."""
    gateway, body = handler.server.gateway, read_fields(handler, PROVIDER_FIELDS)
    providers = gateway.current().router.providers
    name = body.get("name") or "draft"
    if set(body) == {"name"}:
        if name not in providers:
            raise NotFound(f"there is no provider {one_line(name, 60)!r}" + nearest(name, providers), param="name")
        return handler.respond_json(trial_of(gateway, providers[name]))
    known = {entry.get("name"): entry for entry in gateway.settings.providers if isinstance(entry, dict)}
    entry = provider_entry({**body, "name": name}, known.get(name, {}))
    alone = Gateway(replace(gateway.settings, providers=[entry], default_provider=name, aliases={}, default_model="",
                            accounts={}, api_key="", client_keys=[], usage=False, responses_file=""),
                    environ=gateway.environ)
    try:
        told = trial_of(alone, alone.state.router.providers[name])
    finally:
        alone.close()
    handler.respond_json(told)


def trial_of(gateway: Gateway, provider: Provider) -> Json:
    checks = examine(gateway, provider, ADMIN_KEY)
    models = list(provider.models)
    if all(check.ok for check in checks[:2]):
        with contextlib.suppress(GatewayError):
            models = gateway.fetch_models(provider) or models
    return {"ok": all(check.ok for check in checks), "checks": [check._asdict() for check in checks], "models": models}


def add_key(handler: Handler) -> None:
    """POST /admin/api/keys: the key is in the answer, and nowhere else."""
    gateway = handler.server.gateway
    body = read_fields(handler, {"version": "str", "name": "str", "models": "list", "expires": "str",
                                 **dict.fromkeys(LIMIT_FIELDS, "int")})
    check_ours(gateway, "client_keys")
    name = needed(body, "name")
    facts = {field_name: value for field_name, value in body.items()
             if value not in (None, [], "") and field_name not in ("version", "name")}
    try:
        key, entry = make_client_key(name, facts)
    except ValueError as exc:
        param = next((field_name for field_name in body if str(exc).startswith(field_name)), "name")
        raise BadRequest(str(exc), param=param) from None

    def edit(raw: Json) -> None:
        entries = raw["client_keys"] if isinstance(raw.get("client_keys"), list) else []
        if any(isinstance(known, dict) and known.get("name") == name for known in entries):
            raise name_taken(name)
        raw["client_keys"] = [*entries, entry]

    change_config(gateway, edit)
    handler.respond_json({"name": name, "key": key, "version": gateway.config_version()}, 201)


def remove_key(handler: Handler) -> None:
    """DELETE /admin/api/keys/NAME."""
    gateway, name = handler.server.gateway, named_in(handler)
    check_ours(gateway, "client_keys")

    def edit(raw: Json) -> None:
        entries = raw["client_keys"] if isinstance(raw.get("client_keys"), list) else []
        kept = [entry for entry in entries if not isinstance(entry, dict) or entry.get("name") != name]
        if len(kept) == len(entries):
            raise NotFound(f"there is no key {one_line(name, 60)!r}", code="not_found", param="name")
        raw["client_keys"] = kept

    change_config(gateway, edit)
    no_content(handler)


def end_login(handler: Handler) -> None:
    """DELETE /admin/api/logins/ACCOUNT."""
    gateway, account = handler.server.gateway, named_in(handler)
    if account not in (DEFAULT_ACCOUNT, *gateway.settings.accounts) or gateway.config is None:
        raise NotFound(f"there is no account {one_line(account, 60)!r}", code="not_found", param="account")
    try:
        gone = remove_login(gateway, account)
    except (ConfigBroken, OSError) as exc:
        raise LoginFailed(one_line(exc)) from None
    if not gone:
        raise NotFound(f"the account {account} is not logged in", code="not_found", param="account")
    gateway.reload()
    no_content(handler)


PLAYED = {"chat": CHAT, "messages": MESSAGES, "responses": RESPONSES}


def play(handler: Handler) -> None:
    """The playground: a dialect's own endpoint, for who is signed in instead of for a client's key."""
    dialect = PLAYED[normal_path(handler.path).rpartition("/")[2]]
    handler.key, handler.endpoint = ADMIN_KEY, handler.endpoint._replace(dialect=dialect)
    answer_call(handler)


# --- logging in at iFlow --------------------------------------------------------------

def show_logins(handler: Handler) -> None:
    gateway = handler.server.gateway
    data = [{"account": account, "keys": 1, "message": "", **login}
            for account, login in gateway.login_report().items()]
    handler.respond_json({"data": data})


def steer_login(handler: Handler) -> None:
    """/admin/api/oauth/start, callback, paste (POST) and status (GET): a login, as the page drives it."""
    logins = handler.server.gateway.logins
    action = normal_path(handler.path).rpartition("/")[2]
    body = read_fields(handler, {"account": "str", "text": "str", "query": "str", "paste": "bool"}) \
        if handler.command == "POST" else {}
    if action == "start":
        return handler.respond_json(logins.start(body.get("account") or "", body.get("paste") is True))
    if action == "status":
        return handler.respond_json(logins.status())
    text = body.get("text") or "" if action == "paste" else body.get("query") or ""
    handler.respond_json(logins.paste(text) if action == "paste" else logins.callback(text))


# --- clients ---------------------------------------------------------------------------

#: client -> (variables, what it is).  URL is the server's address, KEY the client key, MODEL the default model; OPUS,
#: SONNET, HAIKU and CONTEXT as claude_words tells.
CLIENTS: Dict[str, Tuple[Dict[str, str], str]] = {
    "claude": ({"ANTHROPIC_BASE_URL": "URL", "ANTHROPIC_AUTH_TOKEN": "KEY", "ANTHROPIC_MODEL": "SONNET",
                "ANTHROPIC_DEFAULT_OPUS_MODEL": "OPUS", "ANTHROPIC_DEFAULT_SONNET_MODEL": "SONNET",
                "ANTHROPIC_DEFAULT_HAIKU_MODEL": "HAIKU", "ANTHROPIC_SMALL_FAST_MODEL": "HAIKU",
                "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "CONTEXT"}, "Claude Code"),
    "codex": ({"IFLOW2API_KEY": "KEY"}, "Codex CLI"),
    "openai": ({"OPENAI_BASE_URL": "URL/v1", "OPENAI_API_KEY": "KEY"}, "the OpenAI SDKs and what is built on them"),
    "anthropic": ({"ANTHROPIC_BASE_URL": "URL", "ANTHROPIC_API_KEY": "KEY"}, "the Anthropic SDKs"),
    "aider": ({"OPENAI_API_BASE": "URL/v1", "OPENAI_API_KEY": "KEY", "AIDER_MODEL": "openai/MODEL"}, "aider"),
    "qwen": ({"OPENAI_BASE_URL": "URL/v1", "OPENAI_API_KEY": "KEY", "OPENAI_MODEL": "MODEL"}, "Qwen Code")}

#: Codex takes its provider from config.toml or from -c flags, never from a variable.
CODEX_SETTINGS = (("model", "MODEL"), ("model_provider", "iflow2api"), ("model_providers.iflow2api.name", "iflow2api"),
                  ("model_providers.iflow2api.base_url", "URL/v1"),
                  ("model_providers.iflow2api.env_key", "IFLOW2API_KEY"),
                  ("model_providers.iflow2api.wire_api", "responses"))


class Shell(NamedTuple):
    """How a shell is told: a variable, a comment, and a command that stands for another one with flags."""
    variable: str
    comment: str
    command: str
    quote: Callable[[str], str]
    reference: str = '"${}"'


def _quote_posix(text: str) -> str:
    return text if re.fullmatch(r"[\w@%+=:,./-]+", text) else "'" + text.replace("'", "'\"'\"'") + "'"


SHELLS = {
    "bash": Shell("export {name}={value}", "# {}", "codex() {{ command codex {flags} \"$@\"; }}", _quote_posix),
    "fish": Shell("set -gx {name} {value}", "# {}", "function codex; command codex {flags} $argv; end",
                  lambda text: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"),
    "powershell": Shell("$env:{name} = {value}", "# {}",
                        "function codex {{ & (Get-Command codex -CommandType Application | Select-Object -First 1) {flags} @args }}",
                        lambda text: "'" + text.replace("'", "''") + "'", "$env:{}"),
    "cmd": Shell("set \"{name}={value}\"", "REM {}", "doskey codex=codex.exe {flags} $*", lambda text: text, "%{}%")}


def claude_words(router: Router, model: str = "") -> Dict[str, str]:
    """The models of Claude Code's tiers: `model`, else a name of its own where an alias takes that, else default_model.

    CONTEXT is the window of a model whose name says nothing to it; it would take it for 200 000 tokens.
    """
    words = {tier: model or (name if router.has_alias(name) else router.default_model)
             for tier, name in CLAUDE_MODELS.items()}
    target = router.claimed(words["SONNET"])
    context = target.provider.facts.get(target.model, {}).get("context") if target else None
    return {**words, "CONTEXT": str(context or "")}


def filled(text: str, words: Mapping[str, str]) -> str:
    """An entry of CLIENTS or CODEX_SETTINGS with its words replaced."""
    return re.sub(r"\b[A-Z]+\b", lambda found: words.get(found.group(), found.group()), text)


def env_values(client: str, words: Mapping[str, str]) -> Dict[str, str]:
    """The variables of one of CLIENTS; those are left out whose model nobody knows."""
    given = {name: filled(value, words) for name, value in CLIENTS[client][0].items()}
    return {name: value for name, value in given.items() if value.strip("/") not in ("", "openai")}


def env_lines(client: str, shell: Shell, words: Mapping[str, str]) -> List[str]:
    """What points one of CLIENTS at this server; `words` are URL, KEY (`$IFLOW2API_KEY`: the user has it), MODEL, ….

    Each word a CLIENTS entry or CODEX_SETTINGS may name.
    """
    title = CLIENTS[client][1]
    theirs, lines = words["KEY"] == "$IFLOW2API_KEY", []
    if theirs:
        lines.append(shell.comment.format("put your key into IFLOW2API_KEY first; `key add NAME` makes one"))
    for name, value in env_values(client, words).items():
        if value == "$IFLOW2API_KEY":
            if name != "IFLOW2API_KEY":                  # a variable of the shell's, not its name in quotes
                lines.append(shell.variable.format(name=name, value=shell.reference.format("IFLOW2API_KEY")))
        else:
            lines.append(shell.variable.format(name=name, value=shell.quote(value)))
    if client == "codex":
        pairs = [(name, filled(value, words)) for name, value in CODEX_SETTINGS if filled(value, words)]
        lines.append(codex_command(shell, pairs))
        lines.append(shell.comment.format("or for good, in ~/.codex/config.toml:"))
        lines += [shell.comment.format(line) for line in codex_toml(pairs)]
    if not words["MODEL"]:
        lines.append(shell.comment.format(f"{title} asks for models of its own; tell which one to use instead: "
                                          "python iflow2api.py config set default_model NAME"))
    return lines


def codex_command(shell: Shell, pairs: Sequence[Tuple[str, str]]) -> str:
    flags = " ".join("-c " + shell.quote(f'{name}="{value}"') for name, value in pairs)
    if shell is SHELLS["cmd"]:
        flags = " ".join(f'-c {name}="{value}"' for name, value in pairs)
    return shell.command.format(flags=flags)


def codex_toml(pairs: Sequence[Tuple[str, str]]) -> Iterator[str]:
    for name, value in pairs:
        if name == "model_providers.iflow2api.name":
            yield "[model_providers.iflow2api]"
        yield f'{name.rpartition(".")[2]} = {json.dumps(value, ensure_ascii=False)}'


class Setup(NamedTuple):
    """What a client's lines are made of; `key` for files, `shell_key` for shells, where a variable may hold it."""
    base: str
    key: str
    shell_key: str
    model: str
    tiers: Mapping[str, str]             #: claude_words

    def words(self) -> Dict[str, str]:
        """As env_lines takes them."""
        return {"URL": self.base, "KEY": self.shell_key, "MODEL": self.model, **self.tiers}


def code_block(title: Union[str, Tuple[str, str]], language: str, text: str) -> Json:
    zh, en = (title, title) if isinstance(title, str) else title
    return {"title": {"zh": zh, "en": en}, "language": language, "text": text}


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def shell_blocks(client: str, setup: Setup) -> List[Json]:
    """The lines of `env` for each shell; without its comments, which speak one language."""
    blocks = []
    for name, shell in SHELLS.items():
        lines = [line for line in env_lines(client, shell, setup.words())
                 if not line.startswith(shell.comment.partition(" ")[0])]
        if setup.shell_key != setup.key:
            lines.insert(0, shell.variable.format(name="IFLOW2API_KEY", value=shell.quote(setup.key)))
        blocks.append(code_block(name, name, "\n".join(lines)))
    return blocks


def claude_blocks(setup: Setup) -> List[Json]:
    return [*shell_blocks("claude", setup),
            code_block(("长期设置：~/.claude/settings.json", "for good: ~/.claude/settings.json"), "json",
                       json_text({"env": env_values("claude", {**setup.words(), "KEY": setup.key})}))]


def codex_blocks(setup: Setup) -> List[Json]:
    pairs = [(name, filled(value, setup.words())) for name, value in CODEX_SETTINGS]
    return [*shell_blocks("codex", setup), code_block("~/.codex/config.toml", "toml", "\n".join(codex_toml(pairs)))]


def python_blocks(setup: Setup) -> List[Json]:
    base, key, model = map(json.dumps, (setup.base + "/v1", setup.key, setup.model))
    return [code_block("pip install openai", "python", "from openai import OpenAI\n\n"
                  f"client = OpenAI(base_url={base}, api_key={key})\n"
                  f"answer = client.chat.completions.create(\n    model={model},\n"
                  '    messages=[{"role": "user", "content": "Hello"}])\nprint(answer.choices[0].message.content)'),
            *shell_blocks("openai", setup)]


def javascript_blocks(setup: Setup) -> List[Json]:
    base, key, model = map(json.dumps, (setup.base + "/v1", setup.key, setup.model))
    lines = ['import OpenAI from "openai";', "", f"const client = new OpenAI({{ baseURL: {base}, apiKey: {key} }});",
             "const answer = await client.chat.completions.create({", f"  model: {model},",
             '  messages: [{ role: "user", content: "Hello" }],', "});",
             "console.log(answer.choices[0].message.content);"]
    return [code_block("npm install openai", "javascript", "\n".join(lines)), *shell_blocks("openai", setup)]


def curl_blocks(setup: Setup) -> List[Json]:
    body = json.dumps({"model": setup.model, "messages": [{"role": "user", "content": "Hello"}]})
    url, blocks = setup.base + "/v1/chat/completions", []
    for name, token in (("bash", "$IFLOW2API_KEY"), ("powershell", "$env:IFLOW2API_KEY")):
        quote = SHELLS[name].quote
        bearer = f'"Authorization: Bearer {token}"' if setup.shell_key[:1] == "$" else \
            quote(f"Authorization: Bearer {setup.shell_key}")
        flags = f"{quote(url)} -H {bearer} -H 'Content-Type: application/json' -d"
        text = f"curl {flags} {quote(body)}" if name == "bash" else f"{quote(body)} | curl.exe {flags} '@-'"
        blocks.append(code_block(name, name, text))
    return blocks


def opencode_blocks(setup: Setup) -> List[Json]:
    key = "{env:IFLOW2API_KEY}" if setup.shell_key[:1] == "$" else setup.key
    return [code_block("opencode.json", "json", json_text({
        "$schema": "https://opencode.ai/config.json", "model": f"iflow2api/{setup.model}",
        "provider": {"iflow2api": {"npm": "@ai-sdk/openai-compatible", "name": "iflow2api",
                                   "options": {"baseURL": setup.base + "/v1", "apiKey": key},
                                   "models": {setup.model: {"name": setup.model}}}}}))]


def form_blocks(setup: Setup, zh: str, en: str, base: str) -> List[Json]:
    """What goes into the fields of a form, which is found at `zh`, `en`."""
    values = (((f"{zh} → 接口地址", f"{en} → Base URL"), base), (("API 密钥", "API key"), setup.key),
              (("模型", "model"), setup.model))
    return [code_block(title, "text", value) for title, value in values]


def environ_blocks(variables: Mapping[str, str]) -> List[Json]:
    """Variables for a container's environment; there this machine has another name."""
    return [code_block(("环境变量（自行部署）", "environment (self-hosted)"), "text",
                  "\n".join(f"{name}={value}" for name, value in variables.items()))]


def seen_from_container(base: str) -> str:
    return re.sub(r"//(localhost|127\.0\.0\.1|\[::1\])(?=:|$)", "//host.docker.internal", base)


def webui_blocks(setup: Setup) -> List[Json]:
    base = seen_from_container(setup.base) + "/v1"
    quote = SHELLS["bash"].quote
    return [code_block("Docker", "bash", "docker run -d -p 3000:8080 --add-host=host.docker.internal:host-gateway \\\n"
                  f"  -e OPENAI_API_BASE_URL={quote(base)} \\\n  -e OPENAI_API_KEY={quote(setup.key)} \\\n"
                  "  -v open-webui:/app/backend/data --name open-webui ghcr.io/open-webui/open-webui:main"),
            *form_blocks(setup, "管理员面板 → 设置 → 外部连接 → OpenAI API", "Admin Panel → Settings → Connections → OpenAI API",
                         setup.base + "/v1")]


def continue_blocks(setup: Setup) -> List[Json]:
    model, base, key = map(json.dumps, (setup.model, setup.base + "/v1", setup.key))
    return [code_block("~/.continue/config.yaml", "yaml", "name: iflow2api\nversion: 1.0.0\nschema: v1\nmodels:\n"
                       f"  - name: {model}\n    provider: openai\n    model: {model}\n    apiBase: {base}\n"
                       f"    apiKey: {key}\n    roles: [chat, edit, apply]")]


#: id -> title and what makes its blocks.
CLIENT_SETUPS: Dict[str, Tuple[str, Callable[[Setup], List[Json]]]] = {
    "claude-code": ("Claude Code", claude_blocks), "codex": ("Codex", codex_blocks),
    "openai-python": ("OpenAI SDK (Python)", python_blocks),
    "openai-js": ("OpenAI SDK (JavaScript)", javascript_blocks),
    "curl": ("curl", curl_blocks), "opencode": ("opencode", opencode_blocks),
    "aider": ("aider", lambda setup: shell_blocks("aider", setup)),
    "cherry-studio": ("Cherry Studio", lambda setup: form_blocks(
        setup, "设置 → 模型服务 → 添加 → 提供商类型 OpenAI", "Settings → Model Provider → Add → provider type OpenAI", setup.base)),
    "lobechat": ("LobeChat", lambda setup: [
        *form_blocks(setup, "设置 → AI 服务商 → OpenAI", "Settings → AI Service Provider → OpenAI", setup.base + "/v1"),
        *environ_blocks({"OPENAI_PROXY_URL": seen_from_container(setup.base) + "/v1", "OPENAI_API_KEY": setup.key,
                         "OPENAI_MODEL_LIST": f"+{setup.model}"})]),
    "chatgpt-next-web": ("ChatGPT-Next-Web (NextChat)", lambda setup: [
        *form_blocks(setup, "设置 → 自定义接口 → OpenAI", "Settings → Custom Endpoint → OpenAI", setup.base),
        *environ_blocks({"BASE_URL": seen_from_container(setup.base), "OPENAI_API_KEY": setup.key,
                         "CUSTOM_MODELS": f"+{setup.model}", "DEFAULT_MODEL": setup.model})]),
    "open-webui": ("Open WebUI", webui_blocks), "continue": ("Continue", continue_blocks),
    "cline": ("Cline", lambda setup: form_blocks(
        setup, "Cline 设置 → API Provider → OpenAI Compatible", "Cline settings → API Provider → OpenAI Compatible",
        setup.base + "/v1"))}


def address_for(handler: Handler) -> str:
    """This server's address as whoever asks knows it: behind a proxy or on another machine it is not ours."""
    host, scheme = handler.headers.get("host", ""), handler.headers.get("x-forwarded-proto", "http")
    fits = re.fullmatch(r"[\w.-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?", host) and scheme in ("http", "https")
    return f"{scheme}://{host}" if fits else handler.server.url


def show_clients(handler: Handler) -> None:
    """GET /admin/api/clients: what to copy into each client.  No key is in there, only where it goes."""
    query, gateway = query_of(handler), handler.server.gateway
    router, needs_key = gateway.current().router, gateway.state.door.required
    model, given = query.get("model") or router.default_model, query.get("key", "")
    if not re.fullmatch(r"[\x21-\x7e]{0,200}", given):
        raise BadRequest("key: printable characters without blanks expected", param="key")
    model = re.sub(r'[\x00-\x1f\x7f"]', "", model)       # names come from upstreams, and these lines go into shells
    key = given or ("YOUR_KEY" if needs_key else "sk-none")
    setup = Setup(address_for(handler), key, given or ("$IFLOW2API_KEY" if needs_key else key), model or "MODEL",
                  claude_words(router, model if query.get("model") and model != router.default_model else ""))
    handler.respond_json({"base_url": setup.base, "model": model, "needs_key": needs_key, "data": [
        {"id": name, "title": title, "blocks": make(setup)} for name, (title, make) in CLIENT_SETUPS.items()]})


# --- the page ------------------------------------------------------------------------

# language=CSS
ADMIN_CSS = r"""
:root{color-scheme:light;--bg:#f5f6f8;--surface:#fff;--surface-2:#eef0f3;--text:#171b21;--muted:#565f6b;--line:#dde1e7;
--edge:#858e9b;--accent:#0d6e6a;--accent-text:#fff;--accent-soft:#e1f1ef;--ok:#17703a;--ok-soft:#e2f3e7;--warn:#855600;
--warn-soft:#fbf0d9;--bad:#b3261e;--bad-soft:#fce9e7;--shadow:0 1px 2px #10182814,0 0 0 1px #10182808;
--shadow-2:0 12px 32px #10182833,0 2px 6px #1018281f;--series-1:#0e7f79;--series-2:#c76a06;--series-3:#3d63dd;
--series-4:#b13a92;--series-5:#5b8a16;--series-6:#7c53e0;--series-7:#c43a31;--series-8:#6b7480;--radius:10px;--gap:16px;
--font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans","PingFang SC","Microsoft YaHei",
"Noto Sans CJK SC","WenQuanYi Micro Hei",sans-serif;
--mono:ui-monospace,SFMono-Regular,"SF Mono",Menlo,Consolas,"Liberation Mono","DejaVu Sans Mono",monospace}
:root[data-theme=dark]{color-scheme:dark;--bg:#0e1116;--surface:#161a21;--surface-2:#20262f;--text:#e7eaef;
--muted:#9ba5b3;--line:#2a313b;--edge:#6f7a89;--accent:#4cc9bd;--accent-text:#04211f;--accent-soft:#143633;--ok:#56c97a;
--ok-soft:#15311f;--warn:#e3b34f;--warn-soft:#352a12;--bad:#ff8a80;--bad-soft:#3c1c1a;--shadow:0 0 0 1px #ffffff0d;
--shadow-2:0 16px 40px #000a,0 0 0 1px #ffffff1a;--series-1:#2fc4b6;--series-2:#f0a045;--series-3:#86a2fb;
--series-4:#e681cc;--series-5:#a4cc5c;--series-6:#b39bfa;--series-7:#f3867e;--series-8:#9aa4b2}
*,*::before,*::after{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;font:14px/1.55 var(--font);color:var(--text);background:var(--bg)}
h1,h2,h3,p,ul,ol,dl,dd,pre,figure{margin:0;padding:0}
h1{font-size:20px;font-weight:650;letter-spacing:-.01em;line-height:1.3}
h2{font-size:15px;font-weight:650;line-height:1.4}
h3{font-size:14px;font-weight:600}
a{color:var(--accent);text-underline-offset:2px}
button,input,select,textarea{font:inherit;color:inherit}
button{cursor:pointer}
[hidden]{display:none!important}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
::selection{background:var(--accent);color:var(--accent-text)}
::placeholder{color:var(--muted);opacity:1}
.visually-hidden{position:absolute!important;width:1px!important;height:1px!important;min-height:0!important;padding:0!important;
border:0!important;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.skip{position:fixed;left:12px;top:-60px;z-index:30;padding:8px 14px;border-radius:8px;background:var(--accent);
color:var(--accent-text)}
.skip:focus{top:12px}
.icon{width:18px;height:18px;flex:none;fill:none;stroke:currentColor;stroke-width:1.8;stroke-linecap:round;
stroke-linejoin:round}
#mark{width:28px;height:28px;flex:none}
/* the frame */
#app{display:grid;grid-template:auto 1fr/236px minmax(0,1fr);min-height:100vh}
#nav{grid-row:1/3;position:sticky;top:0;height:100vh;overflow-y:auto;padding:14px 12px;background:var(--surface);
border-inline-end:1px solid var(--line);display:flex;flex-direction:column;gap:2px}
.brand{display:flex;align-items:center;gap:10px;padding:2px 8px 12px;font-weight:680;font-size:16px;color:inherit;
text-decoration:none;letter-spacing:-.01em}
.brand small{font-weight:400;font-size:12px;color:var(--muted);margin-inline-start:auto;letter-spacing:0}
#nav h2{font-size:12px;font-weight:600;color:var(--muted);padding:14px 10px 4px}
#nav ul{list-style:none;display:grid;gap:1px}
#nav li a{display:flex;align-items:center;gap:10px;padding:6px 10px;border-radius:8px;color:inherit;text-decoration:none}
#nav li a:hover{background:var(--surface-2)}
#nav li a[aria-current]{background:var(--accent-soft);color:var(--accent);font-weight:500}
#nav .icon{opacity:.8}
#top{position:sticky;top:0;z-index:5;display:flex;align-items:center;gap:6px;min-height:56px;padding:8px 28px;
background:var(--bg);border-bottom:1px solid var(--line)}
#top h1{flex:1;min-width:0;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
#burger{display:none}
#main{padding:24px 28px 64px;outline:none;min-width:0}
#main>*{max-width:1240px;margin-inline:auto}
#main>.page-lead{color:var(--muted);margin-bottom:18px;max-width:1240px}
.stack{display:grid;gap:var(--gap);grid-template-columns:minmax(0,1fr)}
.stack.tight{gap:8px}
#veil{display:none}
.live{display:inline-flex;align-items:center;gap:6px;padding:0 8px;font-size:12.5px;color:var(--muted);white-space:nowrap}
.dot{width:8px;height:8px;border-radius:50%;background:var(--muted);flex:none}
.dot.ok{background:var(--ok)}.dot.warn{background:var(--warn)}.dot.bad{background:var(--bad)}
/* parts */
.card{background:var(--surface);border:1px solid var(--line);border-radius:var(--radius);padding:16px 18px;min-width:0}
.card>.spread:first-child,.card>h2:first-child{margin-bottom:12px}
.grid{display:grid;gap:var(--gap);grid-template-columns:repeat(auto-fit,minmax(min(100%,260px),1fr))}
.row{display:flex;flex-wrap:wrap;align-items:center;gap:8px}
.row.end{justify-content:flex-end}
.spread{display:flex;flex-wrap:wrap;align-items:center;justify-content:space-between;gap:8px 12px}
.grow{flex:1;min-width:0}
.btn,.icon-btn{display:inline-flex;align-items:center;justify-content:center;gap:7px;min-height:34px;padding:5px 13px;
border:1px solid var(--line);border-radius:8px;background:var(--surface);text-decoration:none;color:inherit;
font-weight:500;white-space:nowrap;transition:background-color .12s,border-color .12s}
.btn:hover,.icon-btn:hover{background:var(--surface-2)}
.btn.primary{background:var(--accent);border-color:var(--accent);color:var(--accent-text)}
.btn.primary:hover{background:color-mix(in srgb,var(--accent) 88%,var(--text))}
.btn.danger{color:var(--bad)}
.btn.danger:hover{background:var(--bad-soft);border-color:var(--bad)}
.btn.quiet,.icon-btn{border-color:transparent;background:none}
.btn.quiet:hover,.icon-btn:hover{background:var(--surface-2)}
.btn.small{min-height:28px;padding:2px 9px;font-size:13px}
.icon-btn{width:34px;padding:0;flex:none;color:var(--muted)}
.icon-btn:hover{color:var(--text)}
.icon-btn.text{width:auto;min-width:34px;padding:0 8px;font-size:13px}
.btn:disabled,.icon-btn:disabled{opacity:.55;cursor:default}
.btn[aria-busy]::before{content:"";width:13px;height:13px;border-radius:50%;border:2px solid;border-right-color:transparent;
animation:spin .8s linear infinite}
@keyframes spin{to{transform:rotate(1turn)}}
.field{display:grid;gap:4px;align-content:start;min-width:0}
.field>label,.field>.label{font-weight:500}
.field.check{grid-template-columns:auto 1fr;column-gap:9px;align-items:center}
.field.check>.hint,.field.check>.error{grid-column:2}
.hint{font-size:13px;color:var(--muted)}
.field .error,.error{font-size:13px;color:var(--bad)}
.error:empty{display:none}
input:not([type=checkbox],[type=radio],[type=range],[type=file],[type=color]),select,textarea{width:100%;min-height:34px;
padding:5px 10px;border:1px solid var(--edge);border-radius:8px;background:var(--surface);min-width:0}
input[type=checkbox],input[type=radio]{width:16px;height:16px;margin:0;accent-color:var(--accent);flex:none}
textarea{resize:vertical;line-height:1.5;min-height:56px}
select{padding-inline-end:6px}
input:focus-visible,select:focus-visible,textarea:focus-visible{outline-offset:-1px;border-color:var(--accent)}
[aria-invalid=true]{border-color:var(--bad)!important}
input:disabled,select:disabled,textarea:disabled{background:var(--surface-2);color:var(--muted);border-color:var(--line)}
.search{max-width:320px}
.row>input,.row>select{width:auto!important}
.row>.search{width:220px!important;flex:0 1 220px}
.badge{display:inline-flex;align-items:center;gap:5px;padding:1px 8px;border-radius:99px;background:var(--surface-2);
color:var(--muted);font-size:12px;font-weight:500;white-space:nowrap;line-height:1.6}
.badge.ok{background:var(--ok-soft);color:var(--ok)}
.badge.warn{background:var(--warn-soft);color:var(--warn)}
.badge.bad{background:var(--bad-soft);color:var(--bad)}
.note{padding:10px 14px;border-radius:8px;background:var(--surface-2);overflow-wrap:anywhere}
.note.ok{background:var(--ok-soft)}.note.warn{background:var(--warn-soft)}.note.bad{background:var(--bad-soft)}
.mono{font-family:var(--mono);font-size:.93em}
.muted{color:var(--muted)}
.num{font-variant-numeric:tabular-nums}
.break{overflow-wrap:anywhere}
bdi{overflow-wrap:anywhere}
.data td{overflow-wrap:break-word}
.data td bdi{overflow-wrap:inherit}
.data .break,.data td.break{overflow-wrap:anywhere}
.nowrap,.data .end{white-space:nowrap}
kbd{font:12px var(--mono);padding:1px 5px;border:1px solid var(--line);border-radius:5px;background:var(--surface-2)}
.scroll{overflow-x:auto;margin:0 -18px;padding:0 18px;scrollbar-width:thin}
table.data{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
.data th{text-align:start;font-size:12.5px;font-weight:500;color:var(--muted);white-space:nowrap;
border-bottom:1px solid var(--line);padding:6px 10px}
.data td{padding:7px 10px;border-bottom:1px solid var(--line);vertical-align:top}
.data tr:last-child td{border-bottom:0}
.data th:first-child,.data td:first-child{padding-inline-start:0}
.data th:last-child,.data td:last-child{padding-inline-end:0}
.data .end{text-align:end}
.data tr.open{cursor:pointer}
.data .icon-btn{width:26px;min-height:24px;margin:-1px 0}
.data tr.open:hover td{background:var(--surface-2)}
.empty{padding:28px 12px;text-align:center;color:var(--muted);text-wrap:balance}
.code,pre{font:13px/1.6 var(--mono);background:var(--surface-2);border-radius:8px;padding:12px 14px;overflow:auto;
white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4;margin:0}
.tabs{display:flex;flex-wrap:wrap;gap:2px;padding:3px;border-radius:9px;background:var(--surface-2);width:fit-content;
max-width:100%}
.tabs>*{border:0;border-radius:7px;padding:4px 12px;background:none;color:var(--muted);font-weight:500;min-height:28px}
.tabs>:hover{color:var(--text)}
.tabs>[aria-selected=true],.tabs>[aria-pressed=true]{background:var(--surface);color:var(--text);box-shadow:var(--shadow)}
.facts{display:grid;grid-template-columns:minmax(90px,max-content) minmax(0,1fr);gap:6px 18px}
.facts dt{color:var(--muted)}
.facts dd{overflow-wrap:anywhere;min-width:0}
.figure{font-size:24px;font-weight:650;letter-spacing:-.02em;line-height:1.25;font-variant-numeric:tabular-nums}
.menu{position:absolute;inset-inline-end:0;top:calc(100% + 6px);z-index:20;display:grid;min-width:210px;padding:6px;
background:var(--surface);border-radius:10px;box-shadow:var(--shadow-2)}
.menu button{padding:7px 10px;border:0;border-radius:6px;background:none;text-align:start}
.menu button:hover{background:var(--surface-2)}
.holder{position:relative}
/* dialogs, toasts */
dialog{width:min(560px,calc(100vw - 24px));max-height:calc(100dvh - 32px);padding:0;border:0;border-radius:14px;color:inherit;
background:var(--surface);box-shadow:var(--shadow-2)}
dialog.wide{width:min(860px,calc(100vw - 24px))}
dialog::backdrop{background:#0b0f1480}
dialog.gate::backdrop{background:var(--bg)}
dialog.over::backdrop{background:#0b0f1480}
dialog form{display:flex;flex-direction:column;max-height:calc(100dvh - 32px)}
dialog header,dialog footer{display:flex;align-items:center;gap:8px;padding:14px 20px;flex:none}
dialog header h2{flex:1;font-size:16px}
dialog footer{flex-wrap:wrap;justify-content:flex-end;border-top:1px solid var(--line)}
.dialog-body{padding:2px 20px 18px;overflow-y:auto;display:grid;gap:14px;grid-template-columns:minmax(0,1fr)}
.gate header{padding-top:26px}
#toasts{position:fixed;inset:auto 16px 16px auto;z-index:40;display:grid;gap:8px;max-width:min(420px,calc(100vw - 32px));
margin:0;padding:0;border:0;background:none;overflow:visible;color:inherit}
.toast{display:flex;align-items:flex-start;gap:10px;padding:10px 12px 10px 14px;border-radius:10px;background:var(--surface);
box-shadow:var(--shadow-2);overflow-wrap:anywhere;border-inline-start:4px solid var(--ok)}
.toast.bad{border-color:var(--bad)}
.toast .icon-btn{width:24px;min-height:24px}
/* views */
.card h3{margin:6px 0 2px}
.tiles{grid-template-columns:repeat(auto-fit,minmax(min(100%,200px),1fr))}
.tile{display:grid;gap:2px}
.tile .figure{display:flex;align-items:baseline;gap:8px;flex-wrap:wrap}
.grid.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));align-items:start}
.grid.small{grid-template-columns:repeat(auto-fit,minmax(min(100%,150px),1fr))}
.dot.big{width:11px;height:11px;align-self:center}
.lead{margin-bottom:12px}
ul.plain{list-style:none;display:grid;gap:2px}
.limit{display:grid;grid-template-columns:minmax(0,1fr) minmax(50px,120px) minmax(96px,auto);gap:10px;align-items:center;font-size:13px}
.limit .num{text-align:end}
.meter{height:6px;border-radius:3px;background:var(--surface-2);overflow:hidden;display:block}
.meter span{display:block;height:100%;border-radius:3px;background:var(--accent)}
.meter .full{background:var(--bad)}
.chips{display:flex;flex-wrap:wrap;gap:6px;list-style:none;margin:0;padding:0;min-width:0}
.chip{display:inline-flex;align-items:center;gap:6px;padding:2px 9px;border:1px solid var(--line);border-radius:99px;
background:none;font-size:12.5px;max-width:100%;min-height:26px}
.chip .icon-btn{width:22px;min-height:22px;margin-inline-end:-6px}
.chip .icon{width:14px;height:14px}
.chip .btn{margin-inline-end:-8px;min-height:24px}
button.chip:hover{border-color:var(--accent)}
button.chip[aria-pressed=true]{background:var(--accent-soft);border-color:var(--accent);color:var(--accent)}
.checks{list-style:none;display:grid;gap:6px;padding:10px 12px;border-radius:8px;background:var(--surface-2)}
.checks li{display:grid;grid-template-columns:auto minmax(0,1fr);gap:10px;align-items:baseline}
.checks .badge{min-width:64px;justify-content:center}
.card>.checks,.card>div>.checks,.card>.note{margin-block:10px}
summary{cursor:pointer;color:var(--muted);font-weight:500;padding:4px 0;border-radius:6px;width:fit-content}
summary:hover{color:var(--text)}
details[open]>summary{margin-bottom:8px}
.spin{width:14px;height:14px;border-radius:50%;border:2px solid var(--accent);border-right-color:transparent;
animation:spin .8s linear infinite}
.masked:not(:focus){-webkit-text-security:disc}
.alias{display:grid;grid-template-columns:minmax(80px,1fr) auto minmax(110px,2fr) auto;gap:4px 8px;align-items:center}
.alias .tools{gap:0;flex-wrap:nowrap}
.alias .error{grid-column:1/-1}
.chain{list-style:none;display:grid;gap:6px;margin-top:4px}
.chain li{padding:8px 12px;border-radius:8px;background:var(--surface-2)}
.settings{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));gap:20px 28px}
.setting{display:flex;flex-direction:column;align-items:flex-start;gap:2px;min-width:0}
.setting .field{width:100%}
.savebar{position:sticky;bottom:14px;z-index:4;display:flex;flex-wrap:wrap;align-items:center;justify-content:space-between;gap:8px;
padding:10px 10px 10px 16px;border-radius:12px;background:var(--surface);box-shadow:var(--shadow-2)}
fieldset{border:1px solid var(--line);border-radius:10px;padding:10px 14px;margin:0;min-width:0}
.choice{display:flex;gap:10px;align-items:flex-start}
.choice>span{display:grid;gap:4px;flex:1;min-width:0}
.choice input{margin-top:4px}
.choice .code{max-height:180px}
.steps{max-width:900px;list-style:none;display:grid;gap:var(--gap);counter-reset:step}
.step{display:flex;gap:16px}
.step-n{display:grid;place-items:center;width:30px;height:30px;flex:none;border-radius:50%;background:var(--accent-soft);
color:var(--accent);font-weight:650}
.step.done .step-n{background:var(--ok-soft);color:var(--ok)}
.step .stack{gap:10px}
.step h2{font-size:16px}
.row.bottom{align-items:flex-end}
.row.bottom .field{flex:1 1 200px;max-width:340px}
.tall{max-height:420px}
.log-box{position:relative}
.log-pane{height:max(300px,calc(100dvh - 250px));overflow:auto;background:var(--surface);border:1px solid var(--line);
border-radius:var(--radius);font:12.5px/22px var(--mono);overflow-anchor:none}
.log-space{position:relative;overflow:hidden}
.log-lines{position:absolute;inset:0 0 auto}
.log-line{display:flex;gap:12px;height:22px;padding:0 12px;white-space:pre;cursor:default}
.log-line bdi{flex:1;min-width:0;overflow:hidden;text-overflow:ellipsis}
.log-line:hover{background:var(--surface-2)}
.log-line.chosen{background:var(--accent-soft)}
.level{width:58px;flex:none;color:var(--muted)}
.warning .level{color:var(--warn)}.error .level{color:var(--bad)}
.log-line.error{font-size:inherit;color:inherit}
.log-newest{position:absolute;inset:auto 0 14px;margin:auto;width:fit-content;border-radius:99px}
.log-detail{max-height:240px}
@media (min-width:1180px){.grid.uneven{grid-template-columns:minmax(0,3fr) minmax(0,2fr)}}
@media (max-width:900px){
#app{grid-template-columns:minmax(0,1fr)}
#nav{position:fixed;inset:0 auto 0 0;z-index:11;width:260px;height:auto;grid-row:auto;transform:translateX(-105%);
visibility:hidden;transition:transform .18s ease,visibility .18s;box-shadow:var(--shadow-2)}
#nav.open{transform:none;visibility:visible}
#nav.open~#veil{display:block;position:fixed;inset:0;z-index:10;background:#0b0f1480}
#nav li a{padding-block:9px}
#burger{display:inline-flex;margin-inline-start:-8px}
#top{padding:8px 16px}
#main{padding:16px 16px 56px}
}
@media (max-width:640px){
h1{font-size:17px}
#top h1{white-space:normal;line-height:1.2}
.row>.search{width:auto!important;flex:1 1 200px}
.live span:not(.dot){position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.btn,.icon-btn,input:not([type=checkbox],[type=radio],[type=range]),select{min-height:38px}
input,select,textarea{font-size:16px!important}
.card{padding:14px}
.scroll{margin:0;padding:0;overflow:visible}
.data,.data tbody{display:block}
.data thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.data tr{display:grid;grid-template-columns:minmax(0,1fr);gap:2px;padding:10px 0;border-bottom:1px solid var(--line)}
.data tr:last-child{border-bottom:0}
.data td,.data .end{display:flex;justify-content:space-between;gap:14px;padding:1px 0;border:0;text-align:end;
align-items:baseline}
.data td>*{min-width:0}
.data td::before{content:attr(data-label);color:var(--muted);font-size:13px;text-align:start;flex:none}
.data td:first-child::before,.data td.bare::before{content:none}
.data td:first-child{font-weight:600;text-align:start}
.data td.blank,.data .minor{display:none}
.data tr.open{position:relative}
.data tr.open td.bare{position:absolute;inset:4px 0 auto auto}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr));gap:10px}
.tile .figure{font-size:18px;gap:5px}
.spread>.row:has(.search){width:100%}
.facts{grid-template-columns:minmax(0,1fr);gap:0}
.facts dd{margin-bottom:8px}
.search{max-width:none}
.alias{grid-template-columns:minmax(0,1fr) auto;padding-bottom:10px;border-bottom:1px solid var(--line)}
.alias>:nth-child(2){display:none}
.alias>:nth-child(3){grid-column:1/-1;grid-row:2}
.step{flex-direction:column;gap:10px}
.limit{grid-template-columns:minmax(0,1fr) auto}.limit .meter{grid-row:2;grid-column:1/-1}
.log-line{gap:8px;padding:0 8px}.log-line>span:first-child{display:none}
.log-pane{height:max(300px,calc(100dvh - 320px))}
#toasts{inset-inline:16px}
}
@media (prefers-reduced-motion:reduce){*,*::before,*::after{animation-duration:.01s!important;transition:none!important;
scroll-behavior:auto!important}}
@media (forced-colors:active){.badge,.tabs>[aria-pressed=true]{border:1px solid}.dot{forced-color-adjust:none}}
"""

# language=HTML
ADMIN_HTML = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="robots" content="noindex">
<title>iflow2api</title>
<style>@CSS@</style>
</head>
<body>
<a class="skip" id="skip" href="#main"></a>
<noscript><p>This page needs JavaScript. Without it: <code>python iflow2api.py --help</code>.</p>
<p lang="zh">此页面需要 JavaScript。没有它也可以用命令行：<code>python iflow2api.py --help</code>。</p></noscript>
<div id="app" hidden>
<nav id="nav"><a class="brand" href="#overview"><svg id="mark" viewBox="0 0 32 32" aria-hidden="true"><rect
 width="32" height="32" rx="8" fill="#0d6e6a"/><path d="M7 9h4c6 0 4 7 9 7h5M7 23h4c6 0 4-7 9-7M7 16h9" fill="none"
 stroke="#fff" stroke-width="2.6" stroke-linecap="round" stroke-linejoin="round"/></svg><span>iflow2api</span></a></nav>
<div id="veil"></div>
<header id="top"></header>
<main id="main" tabindex="-1"></main>
</div>
<div id="toasts" role="status" aria-live="polite"></div>
<script type="application/json" id="texts">@TEXTS@</script>
<script>@JS@</script>
</body>
</html>
"""

#: What every view is made of: nodes, words, figures, the server, parts, the way in, the frame.
# language=JavaScript
_JS_CORE = r"""
const $ = (selector, root = document) => root.querySelector(selector);
const TEXTS = JSON.parse($('#texts').textContent);
const SVG = $('#mark').namespaceURI;               // as the parser knows it: no address in this page
const BASE = location.pathname.replace(/\/+$/, '') + '/api/';
const isNarrow = matchMedia('(max-width: 900px)'), isDark = matchMedia('(prefers-color-scheme: dark)');
const VIEWS = {};
const NAV = [['', ['overview', 'guide']], ['use', ['playground', 'clients', 'usage']],
  ['setup', ['providers', 'models', 'keys', 'instances', 'settings']], ['system', ['logs', 'about']]];
let session = {language: '', theme_mode: 'system', version: ''};

// --- nodes: text only, never markup; of styles `style: {…}` alone, for the page's policy forbids the attribute

function fill(node, props, children) {
  let value = null;
  for (const [name, given] of Object.entries(props)) {
    if (name === 'text') node.textContent = given;
    else if (name === 'on') for (const type in given) node.addEventListener(type, given[type]);
    else if (name === 'data') Object.assign(node.dataset, given);
    else if (name === 'style') for (const part in given) node.style.setProperty(part, given[part]);
    else if (name === 'value') value = given;
    else if (given !== null && given !== undefined && given !== false) node.setAttribute(name, given === true ? '' : given);
  }
  node.append(...children.flat(9).filter(child => child !== null && child !== undefined && child !== false));
  if (value !== null && value !== undefined) node.value = value;         // after the options of a select
  return node;
}
const isProps = value => value !== null && typeof value === 'object' && !(value instanceof Node) && !Array.isArray(value);
const make = create => (tag, props, ...children) =>
  isProps(props) || props === undefined || props === null ? fill(create(tag), props || {}, children) :
    fill(create(tag), {}, [props, ...children]);
const el = make(tag => document.createElement(tag));
const svg = make(tag => document.createElementNS(SVG, tag));

const ICONS = {                                    // strokes in a square of 24
  overview: 'M3 12h4l3-8 4 16 3-8h4', guide: 'M5 21V4h11l-2 4 2 4H5', clients: 'M8 8l-4 4 4 4M16 8l4 4-4 4M13 5l-2 14',
  playground: 'M4 5h16v11H9l-5 4z', usage: 'M5 20V11M12 20V4M19 20v-6', keys: 'M14.5 14a5 5 0 1 0-4.6-3L3 18v3h4v-3h3v-3z',
  providers: 'M4 4h16v6H4zM4 14h16v6H4zM8 7h.01M8 17h.01', models: 'M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9',
  instances: 'M8 8h12v12H8zM4 16V4h12', settings: 'M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5',
  logs: 'M4 6h16M4 11h11M4 16h16M4 21h8', about: 'M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18zM12 11v5M12 8h.01',
  menu: 'M4 7h16M4 12h16M4 17h16', close: 'M6 6l12 12M18 6L6 18', up: 'M12 19V5M6 11l6-6 6 6', down: 'M12 5v14M6 13l6 6 6-6',
  plus: 'M12 5v14M5 12h14', edit: 'M4 20h4L19 9l-4-4L4 16z', trash: 'M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13',
    more: 'M9 6l6 6-6 6',
  copy: 'M9 9h11v11H9zM5 15H4V4h11v1', check: 'M5 13l4 4L19 7',
  user: 'M12 12a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM5 20c1-4 4-5 7-5s6 1 7 5',
  system: 'M3 5h18v11H3zM9 20h6', dark: 'M20 14.5A8.5 8.5 0 1 1 9.5 4a7 7 0 0 0 10.5 10.5z',
  light: 'M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1 1M18 18l1 1M5 19l1-1M18 6l1-1',
  play: 'M7 4l13 8-13 8z', image: 'M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M9 9h.01',
  stop: 'M6 6h12v12H6z', download: 'M12 4v11M7 11l5 5 5-5M4 20h16', link: 'M10 14L20 4M14 4h6v6M18 14v6H4V6h6'};
const icon = name => svg('svg', {class: 'icon', viewBox: '0 0 24 24', 'aria-hidden': 'true'},
  svg('path', {d: ICONS[name] || ''}));
const button = (label, run, kind = '', image = '') =>
  el('button', {class: 'btn ' + kind, type: 'button', on: {click: run}}, image && icon(image), label);
const iconButton = (image, label, run) =>
  el('button', {class: 'icon-btn', type: 'button', 'aria-label': label, title: label, on: {click: run}}, icon(image));
const badge = (text, kind = '') => el('span', {class: 'badge ' + kind, text});

// --- words and figures

const stored = {
  get(name) { try { return localStorage.getItem('iflow2api.' + name) || ''; } catch { return ''; } },
  set(name, value) { try { localStorage.setItem('iflow2api.' + name, value); } catch { /* private windows */ } }};
const lang = () => stored.get('lang') || session.language || (/^zh/i.test(navigator.language) ? 'zh' : 'en');
const theme = () => stored.get('theme') || session.theme_mode || 'system';
const pick = pair => pair[lang()] || pair.en || pair.zh || '';
/** The text of a key; `{name}` is put in, `{n:line|lines}` chooses by number. */
function t(key, vars = {}) {
  const text = TEXTS[key] ? TEXTS[key][lang() === 'zh' ? 0 : 1] : key;
  return text.replace(/\{(\w+)(?::([^|}]*)\|([^}]*))?\}/g, (all, name, one, many) =>
    !(name in vars) ? all : one === undefined ? vars[name] : Number(vars[name]) === 1 ? one : many);
}
const has = key => key in TEXTS;
/** Foreign text with what can't be seen, or would turn the line around, made visible. */
const clean = text => String(text ?? '').replace(
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
  c => '⟨' + c.charCodeAt(0).toString(16).toUpperCase().padStart(2, '0') + '⟩');
const foreign = (text, css) => el('bdi', {class: css, text: clean(text)});
const locale = () => lang() === 'zh' ? 'zh-CN' : 'en-GB';
/** Epoch seconds, of ISO 8601 too. */
const epochOf = when => typeof when === 'string' ? Date.parse(when) / 1000 : when;
const moment = (when, style) => epochOf(when) ? new Intl.DateTimeFormat(locale(), style).format(epochOf(when) * 1000) : '–';
const fmt = {
  number: n => n === null || n === undefined ? '–' : new Intl.NumberFormat(locale()).format(n),
  tokens: n => n === null || n === undefined ? '–' : n < 10000 ? fmt.number(n) :
    n < 1e6 ? (n / 1e3).toFixed(n < 1e5 ? 1 : 0) + 'k' :
      n < 1e9 ? (n / 1e6).toFixed(n < 1e8 ? 1 : 0) + 'M' : (n / 1e9).toFixed(1) + 'G',
  time: epoch => moment(epoch, {hour: '2-digit', minute: '2-digit', second: '2-digit', hour12: false}),
  date: epoch => moment(epoch, {year: 'numeric', month: 'short', day: 'numeric', hour: '2-digit', minute: '2-digit',
    hour12: false}),
  seconds: s => s === null || s === undefined ? '–' : s < 0.9995 ? Math.round(s * 1000) + ' ms' :
    s < 99.95 ? s.toFixed(s < 9.95 ? 2 : 1) + ' s' : fmt.span(s),
  bytes: n => n < 1 << 20 ? Math.round(n / 1024) + ' KiB' : (n / (1 << 20)).toFixed(1) + ' MiB',
  span(s) {
    const [unit, size] = s < 90 ? ['second', 1] : s < 5400 ? ['minute', 60] : s < 129600 ? ['hour', 3600] : ['day', 86400];
    return new Intl.NumberFormat(locale(), {style: 'unit', unit, unitDisplay: 'long',
      maximumFractionDigits: 0}).format(s / size);
  },
  ago(when) {
    const epoch = epochOf(when), s = epoch - Date.now() / 1000, far = Math.abs(s);
    const [unit, size] = far < 90 ? ['second', 1] : far < 5400 ? ['minute', 60] : far < 129600 ? ['hour', 3600] :
      ['day', 86400];
    return epoch ? new Intl.RelativeTimeFormat(locale(), {numeric: 'auto'}).format(Math.round(s / size), unit) : '–';
  }};

// --- the server

class ApiError extends Error {
  constructor(status, body) {
    const error = (body && body.error) || {};
    super(error.message || t('error_status', {status}));
    Object.assign(this, {status, body, code: error.code || '', param: error.param || ''});
  }
}
const errorText = error => error instanceof ApiError ? clean(error.message) : t('error_page',
  {text: clean(error.message || error)});
/** A Response that is fine, else ApiError.  Where the session has ended it waits for the sign-in and asks once more. */
async function request(path, {method, body, signal, headers = {}} = {}) {
  for (;;) {
    let response;
    try {
      response = await fetch(BASE + path, {method: method || (body === undefined ? 'GET' : 'POST'), signal, cache: 'no-store',
        headers: body === undefined ? headers : {'content-type': 'application/json', ...headers},
        body: body === undefined ? undefined : JSON.stringify(body)});
    } catch (error) {
      throw error.name === 'AbortError' ? error : new ApiError(0, {error: {message: t('error_offline')}});
    }
    if (response.ok) return response;
    const failure = new ApiError(response.status, await response.json().catch(() => null));
    failure.retryAfter = Number(response.headers.get('retry-after')) || 0;
    if (response.status !== 401 || !/^(no_session|session_expired)$/.test(failure.code)) throw failure;
    await signIn();
  }
}
async function api(path, options) {
  const response = await request(path, options);
  return response.status === 204 ? null : response.json();
}

/** The one stream of events: comes back after a pause, goes on where it was, sleeps with a hidden page. */
const live = (() => {
  const listeners = {};
  let wanted = false, withLogs = false, last = '', control = null, timer = 0, pause = 500, state = '';
  const emit = (event, data) => { for (const fn of [...(listeners[event] || [])]) fn(data); };
  const turn = now => { if (state !== now) emit('state', state = now); };
  function take(record) {
    const fields = {event: 'message', data: ''};
    for (const line of record.split('\n')) {
      const [, name, value] = line.match(/^(\w+): ?(.*)$/) || [];
      if (name === 'data') fields.data += value;
      else if (name) fields[name] = value;
    }
    if (fields.id) last = fields.id;
    if (!fields.data) return;
    const data = JSON.parse(fields.data);
    if (fields.event === 'overview') live.overview = data;
    emit(fields.event, data);
  }
  async function read() {
    const mine = control = new AbortController();
    let watch, text = '';
    const alive = () => { clearTimeout(watch); watch = setTimeout(() => mine.abort(), 45000); };
    try {
      const response = await request('events' + (withLogs ? '?logs=1' : ''),
        {signal: mine.signal, headers: last ? {'last-event-id': last} : {}});
      const reader = response.body.getReader(), decoder = new TextDecoder();
      turn('open');
      for (pause = 500, alive(); ;alive()) {
        const {value, done} = await reader.read();
        if (done) break;
        const records = (text + decoder.decode(value, {stream: true}).replace(/\r\n?/g, '\n')).split('\n\n');
        text = records.pop();
        records.forEach(take);
      }
    } catch (error) {
      if (error.name !== 'AbortError' && !(error instanceof ApiError)) console.warn(error);
    }
    clearTimeout(watch);
    if (control !== mine || !wanted) return;
    turn('closed');
    timer = setTimeout(read, pause = Math.min(pause * 1.7, 15000));
  }
  function stop() { const old = control; control = null; clearTimeout(timer); if (old) old.abort(); }
  function restart() { stop(); if (wanted) { pause = 500; read(); } }
  let hidden;
  document.addEventListener('visibilitychange', () => {
    clearTimeout(hidden);              // a browser has six connections for all tabs of one server
    if (document.hidden) hidden = setTimeout(() => { if (wanted) { stop(); turn('closed'); } }, 20000);
    else if (wanted && !control) restart();
  });
  addEventListener('pagehide', stop);                  // nor may a page that is kept for going back hold one
  addEventListener('pageshow', event => { if (event.persisted) restart(); });
  return {overview: null, start() { if (!wanted) { wanted = true; restart(); } }, stop() { wanted = false; stop(); },
    on(event, fn) { (listeners[event] = listeners[event] || new Set()).add(fn); return () => listeners[event].delete(fn); },
    logs(on) { if (withLogs !== on) { withLogs = on; restart(); } }, get state() { return state; }};
})();

// --- parts

function toast(text, kind = 'ok') {
  const box = $('#toasts'), item = el('div', {class: 'toast ' + kind}, el('span', {class: 'grow', text: clean(text)}),
    iconButton('close', t('close'), () => item.remove()));
  box.append(item);
  while (box.children.length > 4) box.firstChild.remove();
  if (box.showPopover) { box.popover = 'manual'; if (box.matches(':popover-open')) box.hidePopover(); box.showPopover(); }
  setTimeout(() => item.remove(), kind === 'bad' ? 12000 : 5000);
}
/** While `promise` runs the button turns and can't be pressed. */
async function busy(node, promise) {
  const focused = document.activeElement === node;
  node.disabled = true;
  node.setAttribute('aria-busy', 'true');
  try { return await promise; } finally {
    node.disabled = false;
    node.removeAttribute('aria-busy');
    if (focused && document.activeElement === document.body && node.isConnected) node.focus();
  }
}
/** A handler for clicks: busy while it runs, an error becomes a toast. */
const act = run => event => busy(event.currentTarget, Promise.resolve().then(() => run(event)))
  .catch(error => error.name === 'AbortError' || toast(errorText(error), 'bad'));
/** `actions`: [{label, kind, run}]; a `run` that returns false, or throws, leaves it open.  Enter presses the last one. */
function dialog({title, body, actions = [], wide, closable = true, css = '', onclose}) {
  const error = el('p', {class: 'error', role: 'alert'});
  const close = () => { if (node.open) node.close(); };
  const press = async (action, node_) => {
    error.textContent = '';
    try { if (!action.run || await busy(node_, Promise.resolve(action.run())) !== false) close(); } catch (failure) {
      if (failure.name !== 'AbortError') { error.textContent = errorText(failure); error.scrollIntoView({block: 'nearest'}); }
    }
  };
  const buttons = actions.map(action => el('button', {class: 'btn ' + (action.kind || ''), text: action.label,
    type: action === actions[actions.length - 1] ? 'submit' : 'button',
    on: {click(event) { event.preventDefault(); if (!action.run || this.form.reportValidity()) press(action, this); }}}));
  const heading = el('h2', {text: title, id: uid()});
  const form = el('form', {method: 'dialog', on: {submit(event) { event.preventDefault(); }}},
    el('header', heading, closable ? iconButton('close', t('close'), close) : !shown &&
      languageButton(() => location.reload())),
    el('div', {class: 'dialog-body'}, body, error), buttons.length > 0 && el('footer', buttons));
  const node = el('dialog', {class: css + (wide ? ' wide' : ''), 'aria-labelledby': heading.id, on: {
    cancel(event) { if (!closable) event.preventDefault(); },
    keydown(event) { if (!closable && event.key === 'Escape') event.preventDefault(); },
    close() { node.remove(); if (onclose) onclose(); }}}, form);
  document.body.append(node);
  node.showModal();
  (form.querySelector('[autofocus], .dialog-body :is(input:not([tabindex]),select,textarea,a,button)') ||
    buttons[buttons.length - 1] ||
    form).focus();
  return {close, node, error};
}
const confirmBox = (text, {danger, title, action} = {}) => new Promise(done => {
  let answer = false;
  dialog({title: title || t('confirm'), body: el('p', {class: 'break', text: clean(text)}), onclose: () => done(answer),
    actions: [
    {label: t('cancel'), kind: 'quiet'},
    {label: action || (danger ? t('remove') : t('ok')), kind: danger ? 'danger' : 'primary', run: () => { answer = true;
      }}]});
});
let ids = 0;
const uid = () => 'i' + ++ids;
/** A control with its label; `.fail(text)` shows what is wrong with it. */
function field({label, hint, error, input}) {
  const id = input.id || (input.id = uid()), isCheck = input.type === 'checkbox';
  const hintNode = hint && el('div', {class: 'hint', id: id + 'h'}, hint);
  const errorNode = el('div', {class: 'error', id: id + 'e', role: 'alert'});
  const name = el('label', {for: id}, label);
  const node = el('div', {class: 'field' + (isCheck ? ' check' : '')}, isCheck ? [input, name] : [name, input], hintNode,
    errorNode);
  input.setAttribute('aria-describedby', (hint ? id + 'h ' : '') + id + 'e');
  node.fail = text => {
    errorNode.textContent = text ? clean(text) : '';
    input.setAttribute('aria-invalid', Boolean(text));
    if (text) input.focus();
  };
  node.input = input;
  input.addEventListener('input', () => errorNode.textContent && node.fail(''));
  input.addEventListener('invalid', event => {     // in the page's language, not the browser's
    const {valueMissing, tooShort} = input.validity;
    event.preventDefault();
    node.fail(valueMissing ? t('invalid_missing') : tooShort ? t('password_hint') : t('invalid'));
  });
  if (error) node.fail(error);
  return node;
}
const option = (value, text = value) => el('option', {value, text});
const input = (props = {}) => el('input', {type: 'text', autocomplete: 'off', spellcheck: 'false', ...props});
/** Also where there is no clipboard: plain http beyond this machine. */
async function copyText(text, near) {
  try { await navigator.clipboard.writeText(text); } catch {
    const area = el('textarea', {class: 'visually-hidden', value: text, 'aria-hidden': 'true'});
    near.after(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    near.focus();
    if (!done) throw new Error(t('copy_failed'));
  }
}
function copyButton(text, label = t('copy')) {
  const word = el('span', {text: label});
  return el('button', {class: 'btn small', type: 'button', on: {async click(event) {
    const node = event.currentTarget;
    try { await copyText(text(), node); } catch (error) { return toast(errorText(error), 'bad'); }
    word.textContent = t('copied');
    node.firstChild.replaceWith(icon('check'));
    setTimeout(() => { word.textContent = label; node.firstChild.replaceWith(icon('copy')); }, 1600);
  }}}, icon('copy'), el('span', {'aria-live': 'polite'}, word));
}
/** A table; `.update(rows)` keeps the lines whose `id(row)` stays.  `render` may return text or a node. */
function dataTable({columns, rows = [], empty, label, open, id}) {
  const body = el('tbody'), table = el('table', {class: 'data', 'aria-label': label},
    el('thead', el('tr', columns.map(column => el('th', {scope: 'col', class: column.align},
      column.label || el('span', {class: 'visually-hidden', text: t('actions')}))))), body);
  const nothing = el('div', {class: 'empty'}, empty || t('nothing'));
  const box = el('div', {class: 'scroll', tabindex: '0', role: 'group', 'aria-label': label || t('table')}, table);
  const press = row => ({click: event => event.target.closest('button,a,input') || open(row)});
  const line = row => el('tr', {class: open && 'open', on: open && press(row)},
    columns.map(column => {
      const value = column.render ? column.render(row) : row[column.key];
      const blank = value === null || value === undefined || value === '' || value === false;
      return el('td', {class: [column.align, blank && 'blank', !column.label && 'bare', column.css].filter(Boolean).join(' '),
        'data-label': column.label || null}, blank ? null : el('div', {}, value instanceof Node || Array.isArray(value) ?
          value : foreign(value)));
    }));
  let kept = new Map();
  const root = el('div', box, nothing);
  root.update = list => {
    const now = new Map(list.map((row, number) => [id ? id(row) : number, row]));
    const nodes = new Map();
    for (const [key, row] of now) {
      const old = kept.get(key);
      nodes.set(key, old && old.row === row ? old : {row, node: line(row)});
    }
    for (const [key, old] of kept) if (nodes.get(key) !== old) old.node.remove();
    let place = body.firstChild;
    for (const {node} of nodes.values()) if (node === place) place = place.nextSibling; else body.insertBefore(node, place);
    kept = nodes;
    box.hidden = !list.length;
    nothing.hidden = list.length > 0;
  };
  root.update(rows);
  return root;
}
/** A button that opens a small menu; `items`: [[label, run]]. */
function menuButton(node, items) {
  const close = () => { menu.remove(); node.setAttribute('aria-expanded', 'false'); };
  const menu = el('div', {class: 'menu', on: {keydown(event) {
    const all = [...menu.children], step = {ArrowDown: 1, ArrowUp: -1}[event.key];
    if (event.key === 'Escape') { close(); node.focus(); }
    if (step) { event.preventDefault(); all[(all.indexOf(document.activeElement) + step + all.length) % all.length].focus(); }
  }, focusout(event) { if (!holder.contains(event.relatedTarget)) close(); }}},
  items.map(([label, run]) => el('button', {type: 'button', text: label, on: {click() { close(); node.focus(); run(); }}})));
  const holder = el('div', {class: 'holder'}, node);
  node.setAttribute('aria-expanded', 'false');
  node.addEventListener('click', () => {
    if (menu.isConnected) return close();
    holder.append(menu);
    node.setAttribute('aria-expanded', 'true');
    menu.firstChild.focus();
  });
  node.addEventListener('mousedown', event => event.preventDefault());   // else the menu would lose its focus first
  return holder;
}
/** What a view shows while it loads, and when that fails, with a way to try again. */
async function load(root, promise, show) {
  const wait = setTimeout(() => root.append(el('p', {class: 'empty', role: 'status', text: t('loading')})), 150);
  const route = shown;
  try {
    const data = await promise;
    if (route !== shown) return;
    root.textContent = '';
    show(data);
  } catch (error) {
    if (error.name === 'AbortError' || route !== shown) return;
    root.textContent = '';
    root.append(el('div', {class: 'card empty', role: 'alert'}, el('p', foreign(errorText(error))),
      button(t('retry'), () => go())));
    if (!(error instanceof ApiError)) console.error(error);
  } finally { clearTimeout(wait); }
}

// --- the way in

const password = (props = {}) => input({type: 'password', required: true, minlength: 8, maxlength: 200, ...props});
const userName = () => el('input', {class: 'visually-hidden', autocomplete: 'username', value: 'admin', tabindex: '-1',
  'aria-hidden': 'true', readonly: true});     // for password managers
let signingIn = null;
/** Asks for the password above whatever is there; what was typed below stays. */
function signIn() {
  return signingIn = signingIn || new Promise(done => {
    const word = password({autocomplete: 'current-password', minlength: null}),
      box = field({label: t('password'), input: word});
    dialog({title: t('sign_in'), closable: false, css: 'gate' + (shown ? ' over' : ''), onclose() { signingIn = null; done();
      },
      body: [el('p', {class: 'muted', text: shown ? t('sign_in_again') : t('sign_in_lead')}), userName(), box],
      actions: [{label: t('sign_in'), kind: 'primary', async run() {
        try { await api('session', {body: {user: 'admin', password: word.value}}); } catch (error) {
          word.select();
          return box.fail(error.status === 429 ? t('sign_in_slow', {time: fmt.span(error.retryAfter || 1)}) :
            error.status === 401 ? t('sign_in_wrong') : errorText(error)), false;
        }
      }}]});
  });
}
const twoPasswords = () => {
  const first = password({autocomplete: 'new-password'}), second = password({autocomplete: 'new-password'});
  const boxes = [field({label: t('password_new'), hint: t('password_hint'), input: first}),
    field({label: t('password_repeat'), input: second})];
  return {boxes, get value() { return first.value; },
    check: () => first.value === second.value || (boxes[1].fail(t('password_differ')), false)};
};
const firstPassword = () => new Promise(done => {
  const code = input({required: true, maxlength: 16, autocomplete: 'one-time-code', autocapitalize: 'characters',
    placeholder: 'ABCD-EFGH', class: 'mono'});
  const box = field({label: t('setup_code'), hint: t('setup_code_hint'), input: code}), words = twoPasswords();
  dialog({title: t('setup_title'), closable: false, css: 'gate', onclose: done,
    body: [el('p', {class: 'muted', text: t('setup_lead')}), box, userName(), words.boxes],
    actions: [{label: t('setup_go'), kind: 'primary', async run() {
      if (!words.check()) return false;
      try {
        await api('password', {body: {code: code.value.trim().toUpperCase(), password: words.value}});
      } catch (error) {
        if (error.status === 429 || !/code/.test(error.param + error.code)) throw error;
        return box.fail(errorText(error)), false;
      }
    }}]});
});
function changePassword() {
  const current = password({autocomplete: 'current-password', minlength: null}), words = twoPasswords();
  const box = field({label: t('password_current'), input: current});
  const hint = el('p', {class: 'hint', text: t('password_others_end')});
  dialog({title: t('password_change'), body: [userName(), box, words.boxes, hint], actions: [
    {label: t('cancel'), kind: 'quiet'}, {label: t('save'), kind: 'primary', async run() {
      if (!words.check()) return false;
      await api('password', {body: {current: current.value, password: words.value}});
      toast(t('password_changed'));
    }}]});
}
async function signOut(everywhere) {
  await api('session', {method: 'DELETE', body: everywhere ? {everywhere: true} : undefined});
  live.stop();
  dirty = () => false;
  location.reload();
}

// --- the frame

let shown = null, dirty = () => false, here = '';
/** While `fn()` is true, leaving the view asks first. */
const guard = fn => { dirty = fn; };
function paint() {
  const now = theme();
  document.documentElement.dataset.theme = now === 'system' ? (isDark.matches ? 'dark' : 'light') : now;
  document.documentElement.lang = lang() === 'zh' ? 'zh-CN' : 'en';
}
async function mayLeave() {
  return !dirty() || confirmBox(t('unsaved'), {title: t('unsaved_title'), action: t('discard'), danger: true});
}
function languageButton(then) {
  const other = lang() === 'zh' ? 'en' : 'zh';
  return el('button', {class: 'icon-btn text', type: 'button', lang: other, id: 'lang', text: other === 'zh' ? '中文' : 'EN',
    'aria-label': other === 'zh' ? '切换到中文' : 'Switch to English', on: {async click() {
      if (!await mayLeave()) return;
      stored.set('lang', other);
      then();
    }}});
}
function frame() {
  paint();
  $('#skip').textContent = t('skip');
  const nav = $('#nav'), top = $('#top');
  nav.setAttribute('aria-label', t('nav'));
  nav.replaceChildren(nav.firstChild, ...NAV.flatMap(([group, all]) => {
    const names = all.filter(name => VIEWS[name]);
    if (!names.length) return [];
    const head = group && el('h2', {text: t('nav_' + group), id: 'nav-' + group});
    const list = el('ul', {'aria-labelledby': head ? head.id : null}, names.map(name =>
      el('li', el('a', {href: '#' + name, data: {view: name}}, icon(VIEWS[name].icon || name), t('view_' + name)))));
    return head ? [head, list] : [list];
  }), el('p', {class: 'hint', style: {margin: 'auto 10px 0', 'padding-top': '16px'}, text: 'v' + session.version}));
  const next = {system: 'light', light: 'dark', dark: 'system'}[theme()];
  top.replaceChildren(
    el('button', {class: 'icon-btn', id: 'burger', type: 'button', 'aria-label': t('nav'), 'aria-expanded': 'false',
      'aria-controls': 'nav', on: {click: () => drawer(!nav.classList.contains('open'))}}, icon('menu')),
    el('h1', {id: 'title'}), el('div', {class: 'live', id: 'live', role: 'status'}),
    languageButton(async () => { frame(); await go(); $('#lang').focus(); }),
    fill(iconButton(theme(), t('theme', {now: t('theme_' + theme()), next: t('theme_' + next)}), () => {
      stored.set('theme', next);
      const title = $('#title').textContent;
      frame(); mark(title); $('#theme').focus(); }), {id: 'theme'}, []),
    menuButton(fill(iconButton('user', t('account')), {id: 'account'}, []), [[t('password_change'), changePassword],
      [t('sign_out'), () => signOut(false)], [t('sign_out_everywhere'), () => signOut(true)]]));
  pulse();
  mark('');
}
function pulse() {
  const open = live.state === 'open', box = $('#live');
  if (!box) return;
  box.replaceChildren(el('span', {class: 'dot ' + (open ? 'ok' : 'warn')}),
    el('span', {text: t(open ? 'live_on' : 'live_off')}));
}
function drawer(open) {
  $('#nav').classList.toggle('open', open);
  $('#burger').setAttribute('aria-expanded', open);
  if (open) ($('#nav [aria-current]') || $('#nav a')).focus();
}
function mark(title) {
  const name = here.split('/')[0];
  for (const link of document.querySelectorAll('#nav li a'))
    if (link.dataset.view === name) link.setAttribute('aria-current', 'page'); else link.removeAttribute('aria-current');
  $('#title').textContent = title;
  document.title = (title ? title + ' · ' : '') + 'iflow2api';
}
/** Shows what location.hash says: `#view/argument/…`. */
async function go(focus = false) {
  let wanted = location.hash.slice(1) || 'overview';
  if (wanted !== here && !await mayLeave()) return void history.replaceState(null, '', '#' + here);
  if (!VIEWS[wanted.split('/')[0]]) history.replaceState(null, '', '#' + (wanted = 'overview'));
  dirty = () => false;
  drawer(false);
  if (shown && shown.cleanup) shown.cleanup();
  here = wanted;
  const plain = part => { try { return decodeURIComponent(part); } catch { return part; } };
  const [name, ...args] = wanted.split('/').map(plain);
  const root = el('div', {class: 'stack'}), mine = shown = {};
  mark(t('view_' + name));
  $('#main').replaceChildren(root);
  if (focus) { scrollTo(0, 0); $('#main').focus({preventScroll: true}); }
  const cleanup = await VIEWS[name].show(root, args);
  if (typeof cleanup === 'function') { if (shown === mine) mine.cleanup = cleanup; else cleanup(); }
}
async function start() {
  $('#skip').addEventListener('click', event => { event.preventDefault(); $('#main').focus(); });
  $('#veil').addEventListener('click', () => drawer(false));
  $('#nav').addEventListener('keydown', event => { if (event.key === 'Escape') { drawer(false); $('#burger').focus(); } });
  $('#nav').addEventListener('focusout', event => {
    if (isNarrow.matches && event.relatedTarget && !$('#nav').contains(event.relatedTarget)) drawer(false); });
  const picture = new XMLSerializer().serializeToString($('#mark'));
  document.head.append(el('link', {rel: 'icon', href: 'data:image/svg+xml,' + encodeURIComponent(picture)}));
  isDark.addEventListener('change', paint);
  addEventListener('beforeunload', event => { if (dirty()) event.preventDefault(); });
  paint();
  for (;;) {
    try { session = await api('session'); break; } catch (error) {
      await new Promise(done => dialog({title: 'iflow2api', closable: false, css: 'gate', onclose: done,
        body: el('p', {text: errorText(error)}), actions: [{label: t('retry'), kind: 'primary'}]}));
    }
  }
  paint();
  const isNew = session.state === 'new';
  if (isNew) await firstPassword();
  else if (session.state !== 'signed_in') await signIn();
  if (isNew) history.replaceState(null, '', '#guide');
  else if (!location.hash) {
    live.overview = await api('overview').catch(() => null);
    if (live.overview && live.overview.next) history.replaceState(null, '', '#guide');
  }
  session = await api('session').catch(() => session);
  frame();
  $('#app').hidden = false;
  addEventListener('hashchange', () => go(true));
  live.on('state', pulse);
  live.start();
  await go();
}
"""

#: State, figures, requests as they happen.
# language=JavaScript
_JS_OVERVIEW = r"""
/** A card with its title and, to the right of it, what can be done. */
const card = (title, tools, ...body) => el('section', {class: 'card', 'aria-label': title},
  el('div', {class: 'spread'}, el('h2', {text: title}), tools), body);
const tile = (label, figure, note, href) => el('div', {class: 'card tile'}, el('div', {class: 'muted', text: label}),
  el('div', {class: 'figure'}, figure), el('div', {class: 'hint'}, note));
const facts = rows => el('dl', {class: 'facts'}, rows.filter(row => row && row[1] !== null && row[1] !== undefined &&
  row[1] !== '' && row[1] !== false)
  .map(([name, value]) => [el('dt', {text: name}), el('dd', {}, value instanceof Node || Array.isArray(value) ? value :
    foreign(value))]));
const problems = list => list && list.length ? el('div', {class: 'note warn', role: 'status'},
  el('strong', {text: t('problems')}), el('ul', {class: 'plain'}, list.map(line => el('li', {}, foreign(line))))) : null;
const statusBadge = row => badge(row.status === 499 ? t('status_left') : String(row.status || '–'),
  row.status === 200 ? 'ok' : row.status === 499 ? '' : row.status === 429 ? 'warn' : 'bad');
const tokensOf = row => (row.estimated ? '≈ ' : '') + fmt.tokens(row.input) + ' → ' + fmt.tokens(row.output);
/** Calls `fn` at most every `pause_ms`, and once more at the end. */
function throttle(fn, pause_ms) {
  let timer = 0;
  return () => { timer = timer || setTimeout(() => { timer = 0; fn(); }, pause_ms); };
}
const meter = (used, limit) => el('span', {class: 'meter', 'aria-hidden': 'true'},
  el('span', {class: used >= limit ? 'full' : '',
  style: {width: Math.min(100, limit ? 100 * used / limit : 0) + '%'}}));
const limitLines = limits => Object.entries(limits).filter(([, value]) => value && value.limit).map(([name, {used, limit}]) =>
  el('div', {class: 'limit'}, el('span', {text: t('limit_' + name)}), meter(used, limit),
    el('span', {class: 'num', text: fmt.tokens(used) + ' / ' + fmt.tokens(limit)})));
/** Health of a provider, as /health and the list tell it alike. */
function healthBadge(item, resting) {
  if (!item.usable) return badge(t('health_disabled'), 'bad');
  if (item.circuit && item.circuit !== 'closed') return badge(t(item.circuit === 'open' ? 'health_rests' : 'health_tried'),
    'warn');
  return resting ? badge(t('health_keys_rest', {n: resting}), 'warn') : badge(t('health_ok'), 'ok');
}
function requestDialog(row) {
  const table = dataTable({label: t('attempts'), rows: row.attempts, columns: [
    {key: 'provider', label: t('provider')}, {key: 'model', label: t('model')}, {key: 'key', label: t('key'), css: 'mono'},
    {label: t('status'), render: statusBadge}, {label: t('duration'), align: 'end', render: a => fmt.seconds(a.total_s)},
    {key: 'error', label: t('error')}]});
  dialog({title: t('request_details'), wide: true,
    body: [facts([[t('time'), moment(row.at, {dateStyle: 'medium', timeStyle: 'medium'})],
    [t('request_id'), [foreign(row.request_id, 'mono')]], [t('model'), row.model], [t('target'), row.target],
    [t('dialect'), row.dialect + (row.stream ? ' · ' + t('streamed') : '')], [t('key'), row.key],
      [t('status'), [statusBadge(row)]],
    [t('error'), row.error], [t('first_token'), row.stream && fmt.seconds(row.first_s)],
      [t('duration'), fmt.seconds(row.total_s)],
    [t('tokens_in'), fmt.number(row.input) + (row.cached ? ' · ' + t('of_cached', {n: fmt.number(row.cached)}) : '')],
    [t('tokens_out'), fmt.number(row.output) + (row.reasoning ? ' · ' + t('of_reasoning', {n: fmt.number(row.reasoning)}) :
      '')],
    [t('tokens_note'), row.estimated && t('estimated')]]), el('h3', {text: t('attempts')}), table]});
}
VIEWS.overview = {icon: 'overview', async show(root) {
  const parts = {}, rows = [];
  const filter = input({type: 'search', placeholder: t('filter'), 'aria-label': t('filter'), class: 'search'});
  const which = el('select', {'aria-label': t('status')}, option('', t('all')), option('ok', t('only_ok')),
    option('bad', t('only_bad')));
  const table = dataTable({label: t('requests'), empty: t('requests_none'), open: requestDialog, id: row => row.request_id +
    row.at,
    columns: [
      {label: t('time'), render: row => fmt.time(row.at), css: 'num nowrap'},
      {label: t('model'), css: 'break wide', render: row => [foreign(row.model || '–'), row.target &&
        row.target !== row.model &&
        el('span', {class: 'muted'}, ' → ', foreign(row.target))]},
      {label: t('status'), render: statusBadge}, {label: t('first_token'), align: 'end', css: 'minor',
        render: row => row.stream && fmt.seconds(row.first_s)},
      {label: t('duration'), align: 'end', render: row => fmt.seconds(row.total_s)},
      {label: t('tokens'), align: 'end', render: row => row.status === 200 && tokensOf(row)}, {key: 'key', label: t('key'),
        css: 'nowrap minor'},
      {label: t('attempts'), align: 'end', css: 'minor', render: row => row.attempts.length > 1 &&
        String(row.attempts.length)},
      {label: '', align: 'end', render: row => iconButton('more', t('request_details'), () => requestDialog(row))}]});
  const draw = () => {
    const word = filter.value.toLowerCase(), kind = which.value;
    table.update(rows.filter(row => (!kind || (row.status === 200) === (kind === 'ok')) &&
      (!word || [row.model, row.target, row.key, row.status, row.error,
        row.request_id].join(' ').toLowerCase().includes(word))).slice(0, 100));
  };
  const later = throttle(draw, 250);
  filter.addEventListener('input', draw);
  which.addEventListener('change', draw);
  const show = data => {
    const {health, today} = data, waiting = data.queue.reduce((sum, item) => sum + item.waiting, 0);
    parts.top.replaceChildren(...[problems(health.problems), data.next && el('div', {class: 'note spread'},
      t('guide_open_' + data.next), el('a', {class: 'btn primary', href: '#guide', text: t('view_guide')}))].filter(Boolean));
    parts.top.hidden = !parts.top.firstChild;
    parts.tiles.replaceChildren(
      tile(t('server'), [el('span', {class: 'dot big ' + (health.status === 'healthy' ? 'ok' : 'warn'),
        'aria-hidden': 'true'}),
        t(health.status === 'healthy' ? 'healthy' : 'degraded')], t('running_for', {time: fmt.span(health.uptime_s)})),
      tile(t('today'), fmt.number(today.requests), today.errors ? t('errors_n', {n: today.errors}) : t('errors_none')),
      tile(t('tokens_today'), [fmt.tokens(today.input), el('span', {class: 'muted', text: ' → '}), fmt.tokens(today.output)],
        t('in_out')),
      tile(t('right_now'), fmt.number(data.in_flight), t('waiting_n', {n: waiting, c: data.connections})));
    parts.address.replaceChildren(facts([[t('base_url'), el('div', {class: 'row'},
      el('span', {class: 'mono break', text: data.address + '/v1'}), copyButton(() => data.address + '/v1'))],
    [t('needs_key'), t(data.needs_key ? 'needs_key_yes' : 'needs_key_no')]]));
    parts.providers.update(health.providers.map(item =>
      ({...item, ...data.queue.find(entry => entry.provider === item.name)})));
    const limits = data.limits.map(({key, ...rest}) => [el('h3', {}, foreign(key || t('address'))), limitLines(rest)]);
    parts.limits.replaceChildren(...limits.flat(2));
    parts.limitCard.hidden = !limits.length;
  };
  await load(root, Promise.all([api('overview'), api('requests?limit=200')]), ([data, list]) => {
    rows.push(...list.data);
    const logins = Object.entries(data.health.logins || {});
    parts.providers = dataTable({label: t('providers'), empty: el('a', {href: '#guide', text: t('providers_none')}),
      id: item => item.name, columns: [
      {label: t('provider'), render: item => [foreign(item.name), item.problem && el('div', {class: 'hint'},
        foreign(item.problem))]},
      {label: t('state'), render: item => healthBadge(item, item.keys_resting)},
      {label: t('active_waiting'), align: 'end', render: item => (item.active || 0) + (item.limit ? ' / ' + item.limit : '') +
        (item.waiting ? ' · ' + t('waiting', {n: item.waiting}) : '')}]});
    root.append(parts.top = el('div', {class: 'stack'}), parts.tiles = el('div', {class: 'grid tiles'}));
    if (typeof charts !== 'undefined') parts.stop = charts.series(root);
    root.append(el('div', {class: 'grid wide'},
      card(t('providers'), el('a', {class: 'btn small quiet', href: '#providers', text: t('manage')}), parts.providers,
        logins.map(([name, login]) => login.ended && el('p', {class: 'note bad'}, t('login_ended', {name: clean(name)})))),
      card(t('connect'), el('a', {class: 'btn small quiet', href: '#clients', text: t('view_clients')}),
        parts.address = el('div'),
        parts.limitCard = el('div', {class: 'stack tight', style: {'margin-top': '16px'}}, el('h3', {text: t('limits')}),
          parts.limits = el('div', {class: 'stack tight'})))));
    root.append(card(t('requests'), el('div', {class: 'row'}, filter, which), table));
    show(data);
    draw();
  });
  const stops = [live.on('overview', data => parts.top && show(data)), live.on('request', row => {
    if (rows.some(old => old.request_id === row.request_id && old.at === row.at)) return;
    rows.unshift(row);
    rows.length = Math.min(rows.length, 300);
    later();
  })];
  return () => { stops.forEach(stop => stop()); if (typeof parts.stop === 'function') parts.stop(); };
}};
"""

#: Accounts of iFlow and providers: log in, add, edit, test, order, remove.
# language=JavaScript
_JS_PROVIDERS = r"""
/** iFlow's login: opens its page in a window of its own, waits, shows what came of it.  `done()` after a login. */
async function loginDialog(done, account = '') {
  const away = !/^(localhost|127\.|\[::1\])/.test(location.hostname);   // the way back then leads to another machine
  const tab = window.open('about:blank');                               // within the click, or it would be blocked
  let status;
  try { status = await api('oauth/start', {body: {account, paste: away}}); } catch (error) {
    if (tab) tab.close();
    throw error;
  }
  if (tab) { tab.opener = null; tab.location = status.url; }
  const url = status.url, text = el('textarea', {rows: 3, class: 'mono', 'aria-label': t('login_paste_label'),
    placeholder: 'http://localhost:…/oauth2callback?code=…'});
  const word = el('p', {role: 'status', class: 'row'}, el('span', {class: 'spin', 'aria-hidden': 'true'}),
    t('login_waiting'));
  const body = [el('p', {text: t(tab ? 'login_lead' : 'login_lead_blocked')}), word,
    el('div', {class: 'row'}, el('a', {class: tab ? 'btn' : 'btn primary', href: url, target: '_blank',
      rel: 'noreferrer noopener'}, icon('link'),
      t('login_open')), copyButton(() => url, t('login_copy'))),
    el('details', {open: away}, el('summary', {text: t('login_paste')}), el('div', {class: 'stack tight'},
      el('p', {class: 'hint', text: t('login_paste_hint')}), text,
      el('div', {}, button(t('login_paste_go'),
        act(async () => take(await api('oauth/paste', {body: {text: text.value}})))))))];
  let over = false;
  const box = dialog({title: t('login_iflow'), body, onclose() { over = true; }});
  function take(now) {
    if (now.state === 'waiting' || over) return;
    over = true;
    const fine = now.state === 'done';
    if (fine) { box.close(); toast(now.message || t('login_done')); done(); }
    else { word.replaceChildren(badge(t('login_failed'), 'bad'), foreign(now.message)); word.className = 'note bad'; }
  }
  (async () => {
    while (!over) {
      await new Promise(resolve => setTimeout(resolve, 1000));
      if (!over) try { take(await api('oauth/status')); } catch (error) { if (!error.status) continue;
        box.error.textContent = errorText(error); }
    }
  })();
}
const checkList = checks => el('ul', {class: 'checks'}, checks.map(check => el('li', {},
  badge(t('check_' + check.what), check.ok === null ? '' : check.ok ? 'ok' : 'bad'), el('span', {}, foreign(check.message),
    check.took_s > 0 && el('span', {class: 'muted num', text: ' · ' + fmt.seconds(check.took_s)})))));
const lines = text => text.split(/[\n,]/).map(part => part.trim()).filter(Boolean);
/** A text area for JSON; '' stands for nothing.  `read()` throws what is wrong. */
function jsonArea(value, label) {
  const empty = value === null || value === undefined || !Object.keys(value).length;
  const area = el('textarea', {class: 'mono', rows: empty ? 2 : Math.min(14, JSON.stringify(value, null,
    2).split('\n').length + 1),
    spellcheck: 'false', value: empty ? '' : JSON.stringify(value, null, 2), 'aria-label': label});
  return Object.assign(area, {read(nothing) {
    try { return area.value.trim() ? JSON.parse(area.value) : nothing;
      } catch (error) { throw new Error(t('bad_json', {text: error.message})); }
  }});
}
/** The form of a provider, new or old; `done()` after it was saved. */
async function providerDialog(old, version, done) {
  const presets = old ? [] : (await api('presets')).data;
  const draft = old || {name: '', base_url: '', keys: [], models: [], kind: 'openai', headers: {}, profile: {},
    concurrency: null};
  const boxes = {}, kept = draft.keys.map(key => ({...key}));
  const add = (name, label, control, hint) => boxes[name] = field({label, hint, input: control});
  const preset = el('select', {}, option('', t('preset_none')), presets.map(item => option(item.name, item.title)));
  add('name', t('provider_name'), input({value: draft.name, required: true, maxlength: 64, autofocus: Boolean(old)}),
    t('provider_name_hint'));
  add('base_url', t('base_url'), input({type: 'url', value: draft.base_url, required: true,
    placeholder: 'https://api.example.com/v1'}));
  const fresh = el('textarea', {rows: 2, class: 'mono masked', autocomplete: 'off', spellcheck: 'false',
    placeholder: 'sk-…'});
  add('api_keys', t(kept.length ? 'api_keys_more' : 'api_keys'), fresh, t('api_keys_hint'));
  const keys = el('ul', {class: 'chips'}, kept.map(key => {
    const chip = el('li', {class: 'chip mono'}, foreign(key.masked),
      iconButton('close', t('remove') + ' ' + clean(key.masked), () => { kept.splice(kept.indexOf(key), 1); chip.remove();
      }));
    return chip;
  }));
  const models = el('textarea', {rows: 2, class: 'mono', value: draft.models.join('\n'), spellcheck: 'false'});
  add('models', t('provider_models'), models, t('provider_models_hint'));
  const found = el('div', {class: 'chips'}), result = el('div', {role: 'status', class: 'stack tight'});
  const offer = list => found.replaceChildren(...list.slice(0, 60).map(name => {
    const chip = el('button', {class: 'chip mono', type: 'button',
        'aria-pressed': String(lines(models.value).includes(name)), on: {click() {
      const now = lines(models.value), on = now.includes(name);
      models.value = (on ? now.filter(other => other !== name) : [...now, name]).join('\n');
      chip.setAttribute('aria-pressed', String(!on));
    }}}, foreign(name));
    return chip;
  }));
  add('kind', t('kind'), el('select', {value: draft.kind}, option('openai', 'OpenAI'), option('iflow', 'iFlow')));
  add('concurrency', t('concurrency'), input({type: 'number', min: 0, value: draft.concurrency ?? '', placeholder: '0'}),
    t('concurrency_hint'));
  add('timeout_s', t('timeout_s'), input({type: 'number', min: 1, step: 'any', value: draft.timeout_s ?? ''}), t('seconds'));
  add('proxy', t('proxy'), input({value: draft.proxy || '', placeholder: 'socks5h://127.0.0.1:1080'}), t('proxy_hint'));
  add('vision_model', t('vision_model'), input({value: draft.vision_model || ''}), t('vision_model_hint'));
  const headers = jsonArea(draft.headers), profile = jsonArea(draft.profile);
  add('headers', t('headers'), headers, t('headers_hint'));
  add('profile', t('profile'), profile, t('profile_hint'));
  preset.addEventListener('change', () => {
    const chosen = presets.find(item => item.name === preset.value);
    if (!chosen) return;
    boxes.name.input.value = chosen.name;
    boxes.base_url.input.value = chosen.base_url;
    models.value = chosen.models.map(item => item.id).join('\n');
    offer(chosen.models.map(item => item.id));
    (chosen.key_variable ? fresh : boxes.name.input).focus();
  });
  const read = () => {                 // null takes away what there was
    const value = name => boxes[name].input.value.trim(), number = name => value(name) === '' ? null : Number(value(name));
    return {name: value('name'), base_url: value('base_url'), kind: value('kind'),
      models: old || models.value.trim() ? lines(models.value) : undefined,
      ...(old ? {} : {preset: preset.value || null}), proxy: value('proxy') || null, concurrency: number('concurrency'),
      api_keys: [...kept.map(key => ({keep: key.index})), ...lines(fresh.value)], timeout_s: number('timeout_s'),
      vision_model: value('vision_model') || null, headers: headers.read(old ? null : undefined),
        profile: profile.read(old ? null : undefined)};
  };
  const blame = error => {
    const name = (error.param || '').split(/[.[]/)[0];
    if (!boxes[name]) throw error;
    boxes[name].closest('details')?.setAttribute('open', '');
    boxes[name].fail(errorText(error));
    return false;
  };
  dialog({title: old ? t('provider_edit', {name: clean(old.name)}) : t('provider_add'), wide: true, body: [
    !old && field({label: t('preset'), input: preset, hint: t('preset_hint')}), el('div', {class: 'grid'}, boxes.name,
      boxes.base_url),
    kept.length > 0 && el('div', {class: 'field'}, el('span', {class: 'label', text: t('api_keys')}), keys), boxes.api_keys,
      boxes.models, found, result,
    el('details', {}, el('summary', {text: t('more_options')}), el('div', {class: 'grid'}, boxes.kind, boxes.concurrency,
      boxes.timeout_s, boxes.proxy,
      boxes.vision_model, boxes.headers, boxes.profile))], actions: [
    {label: t('cancel'), kind: 'quiet'},
    {label: t('test'), async run() {
      result.replaceChildren(el('p', {class: 'muted', text: t('testing')}));
      try {
        const answer = await api('providers/test', {body: {...read(), ...(old ? {name: old.name} : {})}});
        result.replaceChildren(checkList(answer.checks));
        if (answer.models && answer.models.length) offer(answer.models);
      } catch (error) { result.textContent = ''; return blame(error); }
      return false;
    }},
    {label: t('save'), kind: 'primary', async run() {
      try {
        await api(old ? 'providers/' + encodeURIComponent(old.name) : 'providers', {method: old ? 'PUT' : 'POST',
          body: {version, ...read()}});
      } catch (error) { return blame(error); }
      toast(t('saved'));
      done();
    }}]});
}
VIEWS.providers = {icon: 'providers', async show(root) {
  const redraw = focus => load(root, Promise.all([api('providers'), api('logins')]), ([list, logins]) => draw(list, logins,
    focus));
  const keyLine = key => el('span', {class: 'chip mono'}, foreign(key.masked), key.state !== 'ok' &&
    badge(key.state === 'resting' ? t('key_rests', {time: fmt.span(key.rest_s)}) : t('key_refused'),
      key.state === 'resting' ? 'warn' : 'bad'));
  function draw(list, logins, focus) {
    const own = list.data.filter(item => item.source === 'file');
    const move = (item, step) => act(async () => {
      const names = own.map(other => other.name), at = names.indexOf(item.name);
      names.splice(at + step, 0, ...names.splice(at, 1));
      await api('providers/order', {body: {version: list.version, names}});
      await redraw([item.name, step]);
    });
    const one = item => {
      const at = own.indexOf(item), result = el('div', {role: 'status'});
      const test = act(async () => {
        result.replaceChildren(el('p', {class: 'muted', text: t('testing')}));
        try { result.replaceChildren(checkList((await api('providers/test', {body: {name: item.name}})).checks)); }
        catch (error) { result.textContent = ''; throw error; }
      });
      const arrow = (step, image, label, off) => { const node = iconButton(image, label, move(item, step));
        node.disabled = off;
        node.dataset.move = item.name + step; return node; };
      return el('section', {class: 'card', 'aria-label': clean(item.name)}, el('div', {class: 'spread'},
        el('div', {class: 'row'}, el('h2', {}, foreign(item.name)),
          healthBadge(item, item.keys.filter(key => key.state !== 'ok').length),
          item.name === list.default_provider && badge(t('is_default'))),
        el('div', {class: 'row'}, button(t('test'), test, 'small'), at >= 0 && [
          button(t('edit'), act(() => providerDialog(item, list.version, redraw)), 'small'),
          own.length > 1 && [arrow(-1, 'up', t('move_up'), at === 0), arrow(1, 'down', t('move_down'),
            at === own.length - 1)],
          iconButton('trash', t('remove') + ' ' + clean(item.name), act(async () => {
            if (!await confirmBox(t('provider_remove', {name: item.name}), {danger: true})) return;
            await api('providers/' + encodeURIComponent(item.name), {method: 'DELETE', body: {version: list.version}});
            await redraw();
          }))])),
      item.problem && el('p', {class: 'note bad'}, foreign(item.problem)),
      el('p', {class: 'hint lead'}, foreign(item.base_url, 'mono'),
        ' · ' + (item.concurrency ? t('at_once', {n: item.concurrency}) : t('at_once_any')),
        item.source !== 'file' && ' · ' + t('source_' + item.source)),
      facts([[t('api_keys'), item.keys.length ? el('div', {class: 'chips'}, item.keys.map(keyLine)) : t('none')],
        [t('provider_models'), item.models.length ? el('div', {class: 'chips'},
          item.models.slice(0, 12).map(name => el('span', {class: 'chip mono'}, foreign(name))),
          item.models.length > 12 && badge('+' + (item.models.length - 12))) : null],
        [t('proxy'), item.proxy], [t('vision_model'), item.vision_model]]), result);
    };
    const begin = act(async () => {
      if (!logins.data.length) return loginDialog(redraw);
      const name = input({placeholder: 'work', maxlength: 64, pattern: '[\\w.@+\\-]*'});
      dialog({title: t('login_iflow'), body: field({label: t('account_name'), hint: t('account_name_hint'), input: name}),
        actions: [{label: t('cancel'), kind: 'quiet'}, {label: t('login_begin'), kind: 'primary',
          run: () => void loginDialog(redraw, name.value.trim())
          .catch(error => toast(errorText(error), 'bad'))}]});
    });
    const table = dataTable({label: t('accounts'), rows: logins.data, columns: [
      {label: t('account'), render: item => foreign(item.account === 'default' ? t('account_default') : item.account)},
      {label: t('state'), render: item => [item.ended ? badge(t('login_over'), 'bad') : item.refresh_ok === false ?
        badge(t('refresh_failed'), 'warn') :
        badge(t('logged_in'), 'ok'), item.message && el('div', {class: 'hint'}, foreign(item.message))]},
      {label: t('expires'), render: item => item.expires_at && fmt.ago(item.expires_at)},
      {label: t('refreshed'), render: item => item.refreshed_at && fmt.ago(item.refreshed_at)},
      {label: '', align: 'end', render: item => el('div', {class: 'row end'}, item.ended && button(t('login_again'),
        act(() => loginDialog(redraw, item.account === 'default' ? '' : item.account)), 'small'),
        button(t('log_out'), act(async () => {
          if (!await confirmBox(t('log_out_sure', {name: item.account}), {danger: true, action: t('log_out')})) return;
          await api('logins/' + encodeURIComponent(item.account), {method: 'DELETE'});
          await redraw();
        }), 'small danger'))}]});
    root.append(card(t('iflow_accounts'), button(t(logins.data.length ? 'login_another' : 'login_iflow'), begin,
      logins.data.length ? '' : 'primary', 'user'),
      logins.data.length ? table : el('p', {class: 'muted', text: t('iflow_lead')})),
    el('div', {class: 'spread'}, el('h2', {text: t('providers')}), button(t('provider_add'),
      act(() => providerDialog(null, list.version, redraw)), 'primary', 'plus')),
    own.length > 1 && el('p', {class: 'hint', text: t('order_hint')}) || '',
    ...list.data.map(one));
    if (!list.data.length) root.append(el('div', {class: 'card empty', text: t('providers_empty')}));
    if (focus) {
      const wanted = [focus[1], -focus[1]].map(step =>
        root.querySelector(`[data-move="${CSS.escape(focus[0] + step)}"]`)).find(node => node && !node.disabled);
      if (wanted) wanted.focus();
    }
  }
  await redraw();
  return live.on('config', data => document.querySelector('dialog') || redraw());
}};
"""

#: Models, aliases and chains, and where a name goes.
# language=JavaScript
_JS_MODELS = r"""
/** An alias's value as text: names with commas between; where it has conditions it is JSON.  And back; throws. */
const isPlain = value => typeof value === 'string' || Array.isArray(value) && value.every(item => typeof item === 'string');
const aliasText = value => [value].flat().join(', ');
function aliasValue(text) {
  if (!/^\s*[[{]/.test(text)) { const names = lines(text); return names.length === 1 ? names[0] : names; }
  try { return JSON.parse(text); } catch (error) { throw new Error(t('bad_json', {text: error.message})); }
}
const chainNodes = chain => el('ol', {class: 'chain'},
  chain.map((item, at) => el('li', {}, at > 0 && el('span', {class: 'muted', text: t('else_then') + ' '}),
  foreign(item.provider + ' / ' + item.model, 'mono'), ' ', item.usable ? item.circuit === 'open' ? badge(t('health_rests'),
    'warn') : null : badge(t('health_disabled'), 'bad'),
  item.problem && el('div', {class: 'hint'}, foreign(item.problem)))));
VIEWS.models = {icon: 'models', async show(root) {
  let rows = [], version = '', saved = '', serial = 0;
  const list = el('div', {class: 'stack tight'}), names = el('datalist', {id: 'model-names'});
  const fallback = input({list: names.id, class: 'mono'}),
    fallbackBox = field({label: t('default_model'), hint: t('default_model_hint'), input: fallback});
  const table = () => Object.fromEntries(rows.map(row => [row.pattern.value.trim(),
    aliasValue(row.targets.value)]).filter(([name]) => name));
  const asText = () => JSON.stringify(rows.map(row => [row.pattern.value, row.targets.value])) + fallback.value;
  const changed = () => asText() !== saved;
  const save = el('button', {class: 'btn primary', type: 'button', text: t('save')});
  const note = () => { save.disabled = !changed(); later(); };
  // where does X go
  const asked = input({value: 'claude-sonnet-4-5', list: names.id, class: 'mono'}), dialect = el('select', {},
    ['chat', 'messages', 'responses'].map(name => option(name)));
  const checks = ['images', 'thinking', 'tools'].map(name => el('label', {class: 'row'},
    el('input', {type: 'checkbox', data: {name}}), t('with_' + name)));
  const size = input({type: 'number', min: 0, placeholder: '0', style: {width: '110px'}});
  const answer = el('div', {'aria-live': 'polite', class: 'stack tight'});
  const explain = async () => {
    const mine = ++serial, body = {model: asked.value.trim() || undefined, dialect: dialect.value,
      tokens: Number(size.value) || 0};
    for (const label of checks) body[label.firstChild.dataset.name] = label.firstChild.checked;
    let nodes;
    try {
      const {steps, chain} = await api('routes/explain', {body: {...body, aliases: table()}});
      nodes = [chain.length ? chainNodes(chain) : '', el('ul', {class: 'plain hint'},
        steps.map(step => el('li', {}, foreign(step))))];
    } catch (error) { nodes = [el('p', {class: 'note bad'}, errorText(error))]; }
    if (mine === serial) answer.replaceChildren(...nodes);
  };
  const later = throttle(explain, 300);
  function line(name, value) {
    const props = {class: 'mono', placeholder: 'glm-5, deepseek/deepseek-chat', 'aria-label': t('alias_targets')};
    const row = {pattern: input({value: name, class: 'mono', placeholder: 'claude-*', 'aria-label': t('alias_name')}),
      targets: isPlain(value) ? input({value: aliasText(value), list: names.id, ...props}) :
        el('textarea', {value: JSON.stringify(value, null, 1), rows: 5, spellcheck: 'false', ...props}),
      error: el('div', {class: 'error', role: 'alert'})};
    const move = step => () => {
      const at = rows.indexOf(row), to = at + step;
      if (to < 0 || to >= rows.length) return;
      rows.splice(to, 0, ...rows.splice(at, 1));
      list.replaceChildren(...rows.map(item => item.node));
      row.node.querySelector(step < 0 ? '.to-up' : '.to-down').focus();
      note();
    };
    const arrow = (image, label, step, css) => fill(iconButton(image, label, move(step)), {class: 'icon-btn ' + css}, []);
    row.node = el('div', {class: 'alias', role: 'group', 'aria-label': t('alias')}, row.pattern,
      el('span', {class: 'muted', 'aria-hidden': 'true', text: '→'}), row.targets,
      el('div', {class: 'row tools'}, arrow('up', t('move_up'), -1, 'to-up'), arrow('down', t('move_down'), 1, 'to-down'),
        iconButton('trash', t('remove'), () => { rows = rows.filter(item => item !== row); row.node.remove(); add.focus();
          note(); })), row.error);
    row.targets.addEventListener('input', () => { try { aliasValue(row.targets.value); row.error.textContent = '';
      } catch (error) { row.error.textContent = error.message; } note(); });
    row.pattern.addEventListener('input',
      () => { if (row.pattern.value && !asked.dataset.own) asked.value = row.pattern.value.replace(/\*/g, ''); note(); });
    return row;
  }
  const add = button(t('alias_add'), () => { const row = line('', ''); rows.push(row); list.append(row.node);
    row.pattern.focus(); note(); }, '', 'plus');
  fallback.addEventListener('input', note);
  asked.addEventListener('input', () => { asked.dataset.own = 'yes'; later(); });
  for (const node of [dialect, size, ...checks]) node.addEventListener('input', later);
  save.addEventListener('click', act(async () => {
    const set = {aliases: table()}, unset = [];
    if (fallback.value.trim()) set.default_model = fallback.value.trim(); else unset.push('default_model');
    const now = await patchConfig(version, set, unset);
    if (!now) return;
    take(now);
    toast(t('saved'));
  }));
  function take(config) {
    const value = name => (config.settings.find(item => item.name === name) || {}).value;
    version = config.version;
    rows = Object.entries(value('aliases') || {}).map(([name, targets]) => line(name, targets));
    list.replaceChildren(...rows.map(item => item.node));
    fallback.value = value('default_model') || '';
    saved = asText();
    note();
  }
  await load(root, Promise.all([api('models'), api('config')]), ([models, config]) => {
    fallback.placeholder = models.default_model || '';
    names.append(...models.data.map(item => option(item.id)));
    const word = input({type: 'search', class: 'search', placeholder: t('filter'), 'aria-label': t('filter')});
    const shownTable = dataTable({label: t('models'), id: item => item.provider + '/' + item.id, empty: t('models_none'),
      columns: [
      {label: t('model'), render: item => [foreign(item.id, 'mono break'), ' ', item.alias && badge(t('alias')),
        item.id === models.default_model && badge(t('is_default'), 'ok')]},
      {label: t('provider'), key: 'provider'}, {label: t('context'), align: 'end', render: item => item.context &&
        fmt.tokens(item.context)},
      {label: t('max_output'), align: 'end', render: item => item.max_output && fmt.tokens(item.max_output)},
      {label: t('vision'), render: item => item.vision && badge(t('images'), 'ok')},
      {label: '', align: 'end', render: item => !item.alias && el('div', {class: 'row end'}, copyButton(() => item.id),
        el('a', {class: 'btn small', href: '#playground/' + encodeURIComponent(item.id), text: t('try')}))}]});
    const draw = () => shownTable.update(models.data.filter(item =>
      (item.id + ' ' + item.provider).toLowerCase().includes(word.value.toLowerCase())));
    word.addEventListener('input', draw);
    draw();
    root.append(names, el('div', {class: 'grid wide uneven'},
      card(t('routes'), save, el('p', {class: 'hint lead', text: t('routes_hint')}), list,
        el('div', {class: 'row', style: {margin: '10px 0 16px'}}, add), fallbackBox),
      card(t('where'), null, el('div', {class: 'stack tight'}, field({label: t('where_label'), input: asked}),
        el('details', {}, el('summary', {text: t('where_more')}), el('div', {class: 'row'},
          field({label: t('dialect'), input: dialect}), field({label: t('where_tokens'), input: size})),
          el('div', {class: 'row', style: {'margin-top': '8px'}}, checks)), answer))),
    card(t('models'), word, shownTable));
    take(config);
  });
  guard(changed);
}};
"""

#: The form made of the settings' metadata; a conflict loses nothing.
# language=JavaScript
_JS_SETTINGS = r"""
/** Saves; where somebody else changed the same meanwhile, asks for each which is to hold.  The new document, or null. */
async function patchConfig(version, set, unset = []) {
  try { return await api('config', {method: 'PATCH', body: {version, set, unset}}); } catch (error) {
    if (error.status !== 409 || !error.body.changed) throw error;
    return conflictDialog(error.body, set, unset);
  }
}
const shownValue = value => value === undefined || value === null ? t('unset') :
  value === '' || typeof value === 'object' && !Object.keys(value).length ? t('empty') :
    typeof value === 'string' ? value : JSON.stringify(value, null, 1);
const titled = text => /^[a-z]+[ ,;]/.test(text) ? text[0].toUpperCase() + text.slice(1) : text;
const conflictDialog = (conflict, set, unset) => new Promise(done => {
  const theirs = new Set();
  let result = null;
  const choice = (name, side, value, isTheirs) => el('label', {class: 'choice'},
    el('input', {type: 'radio', name: 'conflict-' + name, checked: !isTheirs,
      on: {change: () => isTheirs ? theirs.add(name) : theirs.delete(name)}}),
    el('span', {}, el('strong', {text: side}), el('span', {class: 'code'}, foreign(shownValue(value)))));
  dialog({title: t('conflict'), wide: true, onclose: () => done(result), body: [el('p', {text: t('conflict_lead')}),
    Object.entries(conflict.changed).map(([name, values]) => el('fieldset', {}, el('legend', {class: 'mono'}, foreign(name)),
      el('div', {class: 'grid'},
      choice(name, t('yours'), values.yours, false), choice(name, t('theirs'), values.theirs, true))))],
  actions: [{label: t('cancel'), kind: 'quiet'}, {label: t('save'), kind: 'primary', async run() {
    const kept = Object.fromEntries(Object.entries(set).filter(([name]) => !theirs.has(name)));
    result = await patchConfig(conflict.version, kept, unset.filter(name => !theirs.has(name)));
  }}]});
});
/** How each kind of setting is asked for: {node, read() -> value, throws}. */
function control(item) {
  const {kind, value, choices, low, high, secret} = item;
  if (kind === 'bool') {
    const node = el('input', {type: 'checkbox', checked: Boolean(value)});
    return {node, read: () => node.checked};
  }
  if (choices) {
    const node = el('select', {value}, choices.map(name => option(name, name || t('automatic'))));
    return {node, read: () => node.value};
  }
  if (kind === 'list' && value.every(entry => typeof entry === 'string')) {
    const node = el('textarea', {class: 'mono', rows: Math.max(2, value.length), value: value.join('\n'),
      spellcheck: 'false', placeholder: t('one_a_line')});
    return {node, read: () => node.value.split('\n').map(line => line.trim()).filter(Boolean)};
  }
  if (kind === 'list' || kind === 'dict') {
    const node = jsonArea(value);
    return {node, read: () => node.read(kind === 'list' ? [] : {})};
  }
  if (secret) {
    const node = input({class: 'mono masked', placeholder: item.set ? value : t('not_set')});
    return {node, read: () => node.value || value};
  }
  const node = input(kind === 'str' ? {value} : {type: 'number', value, min: low, max: high, step: kind === 'int' ? 1 :
    'any', required: true});
  return {node, read: () => kind === 'str' ? node.value : Number(node.value)};
}
VIEWS.settings = {icon: 'settings', async show(root) {
  const own = ['providers', 'client_keys', 'accounts', 'admin_password', 'aliases'];
  let parts = new Map(), version = '';
  const count = el('span', {class: 'muted', role: 'status'}), save = el('button', {class: 'btn primary', type: 'button',
    text: t('save')});
  const undo = button(t('discard'), () => { parts.clear(); go(); }, 'quiet');
  const bar = el('div', {class: 'savebar', hidden: true}, count, el('div', {class: 'row'}, undo, save));
  const changes = () => [...parts.values()].filter(part => part.changed());
  const note = () => {
    const n = changes().length;
    bar.hidden = !n;
    count.textContent = t('changes_n', {n});
  };
  function one(item) {
    const {node, read} = control(item), fixed = item.origin === 'environment' || item.origin === 'flag';
    const first = JSON.stringify(item.value), shownDefault = shownValue(item.default);
    let cleared = false;
    const [, unit] = item.name.match(/_(s|bytes|days)$/) || [];
    node.disabled = fixed;
    const reset = item.origin === 'file' && button(t('to_default'), () => {
      cleared = true;
      if (item.kind === 'bool') node.checked = item.default; else node.value = typeof item.default === 'object' ? '' :
        item.default;
      node.focus();
      note();
    }, 'small quiet');
    const hint = [item.hint && pick(item.hint) + ' ', el('span', {class: 'mono'}, foreign(item.name)), item.secret &&
      !fixed ? '' : ' · ', fixed ?
      t(item.origin === 'flag' ? 'from_flag' : 'from_environment', {name: item.origin === 'flag' ? item.flag || '' :
        'IFLOW2API_' + item.name.toUpperCase()}) :
      item.secret ? '' : [t('default') + ' ', el('span', {class: 'mono'}, foreign(shownDefault.length > 60 ? '…' :
        shownDefault))]];
    const box = field({label: [titled(pick(item.label)),
      unit && el('span', {class: 'muted', text: ` (${t('unit_' + unit)})`}), ' ', item.origin !== 'default' &&
      badge(t('origin_' + item.origin)),
      item.restart && badge(t('needs_restart'), 'warn')], hint, input: node});
    const part = {item, box, read, get unset() { return cleared; }, changed() {
      if (cleared) return true;
      try { return JSON.stringify(read()) !== first; } catch { return true; }
    }};
    node.addEventListener('input', () => { cleared = false; note(); });
    parts.set(item.name, part);
    return el('div', {class: 'setting', data: {words: [item.name, item.label.zh, item.label.en].join(' ').toLowerCase()}},
      box, reset);
  }
  save.addEventListener('click', act(async () => {
    const set = {}, unset = [];
    for (const {item, box, read, unset: cleared} of changes()) {
      if (cleared) { unset.push(item.name); continue; }
      if (!box.input.checkValidity()) return;
      try { set[item.name] = read(); } catch (error) { return box.fail(error.message); }
    }
    let now;
    try { now = await patchConfig(version, set, unset); } catch (error) {
      const part = parts.get((error.param || '').split('.')[0]);
      if (!part) throw error;
      part.box.closest('section').hidden = false;
      return part.box.fail(errorText(error));
    }
    if (!now) return;
    const restart = [...Object.keys(set), ...unset].some(name => parts.get(name).item.restart);
    parts.clear();
    await show(now);
    toast(restart ? t('saved_restart') : t('saved'));
  }));
  const show = config => {
    const at = scrollY, search = input({type: 'search', class: 'search', placeholder: t('settings_search'),
      'aria-label': t('settings_search')});
    version = config.version;
    parts = new Map();
    const groups = new Map();
    for (const item of config.settings.filter(item => !own.includes(item.name) && !(item.older && item.origin === 'default')))
      groups.set(item.group,
      [...(groups.get(item.group) || []), item]);
    const cards = [...groups].map(([group, items]) => card(has('group_' + group) ? t('group_' + group) : group, null,
      el('div', {class: 'settings'}, items.map(one))));
    search.addEventListener('input', () => {
      for (const section of cards) {
        const found = [...section.querySelectorAll('.setting')].filter(node =>
          !(node.hidden = !node.dataset.words.includes(search.value.toLowerCase())));
        section.hidden = !found.length;
      }
    });
    root.replaceChildren(el('div', {class: 'spread'}, el('p', {class: 'hint'}, t('settings_path') + ' ',
      el('span', {class: 'mono break'}, foreign(config.path))), search),
      problems(config.problems) || '', ...cards, bar);
    scrollTo(0, at);
    note();
  };
  await load(root, api('config'), show);
  guard(() => changes().length > 0);
  return live.on('config', async data => { if (data.version !== version && !changes().length &&
    !document.querySelector('dialog')) show(await api('config')); });
}};
"""

#: Client keys and limits; instances; about.
# language=JavaScript
_JS_KEYS = r"""
const LIMITS = ['rpm', 'rph', 'rpd', 'tpd', 'concurrency'];
const limitFields = given => LIMITS.map(name => field({label: t('limit_' + name),
  input: input({type: 'number', min: 0, step: 1, data: {name}, value: (given || {})[name] ?? '',
    placeholder: t('unlimited')})}));
const day = date => moment(date, {dateStyle: 'medium', timeZone: String(date).length === 10 ? 'UTC' : undefined});
const readLimits = boxes => Object.fromEntries(boxes.map(box => [box.input.dataset.name, Number(box.input.value)]).filter(([,
  value]) => value > 0));
VIEWS.keys = {icon: 'keys', async show(root) {
  const redraw = () => load(root, Promise.all([api('keys'), api('config')]), ([list, config]) => draw(list, config));
  function create(list) {
    const name = field({label: t('key_name'), hint: t('key_name_hint'),
      input: input({required: true, maxlength: 64, placeholder: 'laptop'})});
    const models = field({label: t('key_models'), hint: t('key_models_hint'),
      input: input({class: 'mono', placeholder: 'glm-*, deepseek-chat'})});
    const expires = field({label: t('expires'), hint: t('key_expires_hint'),
      input: input({type: 'date', min: new Date().toISOString().slice(0, 10)})});
    const limits = limitFields();
    dialog({title: t('key_add'), wide: true, body: [el('div', {class: 'grid'}, name, expires), models,
      el('h3', {text: t('limits')}), el('div', {class: 'grid small'}, limits)], actions: [
      {label: t('cancel'), kind: 'quiet'}, {label: t('key_create'), kind: 'primary', async run() {
        const until = expires.input.value;
        let made;
        try {
          made = await api('keys', {body: {version: list.version, name: name.input.value.trim(),
            models: lines(models.input.value), ...readLimits(limits), ...(until ? {expires: until} : {})}});
        } catch (error) {
          const box = {name, models, expires}[error.param] || limits.find(item => item.input.dataset.name === error.param);
          if (!box) throw error;
          return box.fail(errorText(error)), false;
        }
        showKey(made);
        redraw();
      }}]});
  }
  const showKey = made => dialog({title: t('key_new', {name: clean(made.name)}), closable: false,
    body: [el('p', {text: t('key_once')}),
    el('div', {class: 'code', id: 'new-key', text: made.key}), el('div', {}, copyButton(() => made.key, t('key_copy')))],
      actions: [{label: t('key_kept'), kind: 'primary'}]});
  function draw(list, config) {
    const table = dataTable({label: t('keys'), rows: list.data, empty: t('keys_none'), columns: [
      {label: t('key_name'), render: item => [foreign(item.name), ' ', item.expired && badge(t('expired'), 'bad')]},
      {label: t('key_models'), render: item => item.models.length ? foreign(item.models.join(', '), 'mono') :
        t('all_models')},
      {label: t('limits'), render: item => {
        const all = Object.entries(item.limits).map(([name, limit]) => [name, {used: (item.used || {})[name] || 0, limit}]);
        const shown = limitLines(Object.fromEntries(all));
        return shown.length ? el('div', {class: 'stack tight'}, shown) : t('unlimited');
      }},
      {label: t('created'), render: item => day(item.created)}, {label: t('expires'), render: item => item.expires ?
        fmt.date(item.expires) : t('never')},
      {label: '', align: 'end', render: item => button(t('remove'), act(async () => {
        if (!await confirmBox(t('key_remove', {name: item.name}), {danger: true})) return;
        await api('keys/' + encodeURIComponent(item.name), {method: 'DELETE'});
        await redraw();
      }), 'small danger')}]});
    const boxes = limitFields(list.address_limits), save = el('button', {class: 'btn', type: 'button', text: t('save'),
        on: {click: act(async () => {
      const limits = readLimits(boxes);
      if (!boxes.every(box => box.input.checkValidity())) return;
      if (await patchConfig(config.version, Object.keys(limits).length ? {address_limits: limits} : {},
        Object.keys(limits).length ? [] : ['address_limits'])) { toast(t('saved')); await redraw(); }
    })}});
    const first = JSON.stringify(readLimits(boxes));
    guard(() => boxes[0].isConnected && JSON.stringify(readLimits(boxes)) !== first);
    root.append(el('div', {class: 'note'}, t(list.custom_api_key || list.data.length ? 'keys_needed' : 'keys_open')),
      card(t('keys'), button(t('key_add'), () => create(list), 'primary', 'plus'), table),
      list.custom_api_key && card(t('custom_key'), el('a', {class: 'btn small quiet', href: '#settings',
        text: t('view_settings')}),
        el('p', {}, foreign(list.custom_api_key, 'mono'), ' ', el('span', {class: 'hint', text: t('custom_key_hint')}))) ||
          '',
      card(t('address_limits'), save, el('p', {class: 'hint lead', text: t('address_limits_hint')}),
        el('div', {class: 'grid small'}, boxes)));
  }
  await redraw();
}};
VIEWS.instances = {icon: 'instances', async show(root) {
  await load(root, api('instances'),
    list => root.append(card(t('instances'), null, dataTable({label: t('instances'), rows: list.data, columns: [
    {label: t('name'), render: item => [foreign(item.name), ' ', item.this && badge(t('this_one'), 'ok')]},
    {label: t('address'), render: item => [foreign(item.url, 'mono'), ' ', copyButton(() => item.url)]},
      {key: 'version', label: t('version')},
    {label: t('started'), render: item => fmt.date(item.started_at)}]}),
      el('p', {class: 'hint', style: {'margin-top': '12px'}, text: t('instances_hint')}))));
}};
VIEWS.about = {icon: 'about', async show(root) {
  await load(root, api('about'), about => root.append(
    card('iflow2api ' + about.version, null, facts([['Python', about.python], [t('platform'), about.platform],
      [t('executable'), [foreign(about.executable, 'mono')]],
      ['PID', about.pid], [t('started'), fmt.date(about.started_at) + ' · ' + t('running_for',
        {time: fmt.span(about.uptime_s)})],
      [t('memory'), about.memory_bytes && fmt.bytes(about.memory_bytes)], [t('threads'), about.threads],
      ...Object.entries(about.paths).map(([name, path]) => [has('path_' + name) ? t('path_' + name) : name,
        path && [foreign(path, 'mono')]])])),
    card(t('diagnostics'), copyButton(() => about.diagnostics), el('p', {class: 'hint lead', text: t('diagnostics_hint')}),
      el('pre', {tabindex: '0', class: 'tall', 'aria-label': t('diagnostics')}, foreign(about.diagnostics))),
    card(t('documents'), null, el('div', {class: 'row'}, ['docs', 'redoc', 'openapi.json', 'metrics', 'health'].map(name =>
      el('a', {class: 'btn', href: '/' + name, target: '_blank', rel: 'noopener', text: '/' + name}))))));
}};
"""

#: The log, live.
# language=JavaScript
_JS_LOGS = r"""
const LOG_KEPT = 20000, LOG_LINE = 22, LEVELS = ['debug', 'info', 'warning', 'error'];
/** The lines are kept in an array; only those in sight are nodes, each of the same height. */
VIEWS.logs = {icon: 'logs', async show(root) {
  let all = [], seen = [], follow = true, chosen = -1, missed = 0, frameAsked = 0, word = '', level = 'info';
  const search = input({type: 'search', class: 'search', placeholder: t('logs_search'), 'aria-label': t('logs_search')});
  const levels = el('select', {'aria-label': t('log_level'), value: level},
    LEVELS.map(name => option(name, t('level_' + name))));
  const view = el('div', {class: 'log-lines'}), space = el('div', {class: 'log-space'}, view),
    detail = el('pre', {class: 'log-detail', hidden: true, 'aria-live': 'polite'});
  const pane = el('div', {class: 'log-pane', tabindex: '0', role: 'log', 'aria-live': 'off', 'aria-label': t('view_logs')},
    space);
  const newest = button('', () => { follow = true; draw(); pane.focus(); }, 'small primary log-newest', 'down'),
    count = el('span', {class: 'hint num'});
  const wanted = item => LEVELS.indexOf(item.level) >= LEVELS.indexOf(level) &&
    (!word || (item.text + ' ' + item.logger).toLowerCase().includes(word));
  const line = (item, at) => el('div', {class: 'log-line ' + item.level + (at === chosen ? ' chosen' : ''), data: {at}},
    el('span', {class: 'muted', text: fmt.time(item.at)}), el('span', {class: 'level', text: item.level}),
      foreign(item.text.replace(/\n/g, ' ⏎ ')));
  function draw() {
    frameAsked = 0;
    space.style.height = seen.length * LOG_LINE + 'px';
    if (follow) { pane.scrollTop = pane.scrollHeight; missed = 0; }
    const first = Math.max(0, Math.floor(pane.scrollTop / LOG_LINE) - 10), end = Math.min(seen.length,
      first + Math.ceil(pane.clientHeight / LOG_LINE) + 20);
    view.style.transform = `translateY(${first * LOG_LINE}px)`;
    view.replaceChildren(...seen.slice(first, end).map((item, at) => line(item, first + at)));
    newest.hidden = follow;
    newest.lastChild.textContent = missed ? t('logs_new', {n: missed}) : t('logs_newest');
    count.textContent = t('logs_count', {n: fmt.number(seen.length)});
  }
  const ask = () => { frameAsked = frameAsked || requestAnimationFrame(draw); };
  const sift = () => { seen = all.filter(wanted); chosen = -1; detail.hidden = true; follow = true; ask(); };
  function choose(at) {
    if (at < 0 || at >= seen.length) return;
    chosen = at;
    const item = seen[at], top = at * LOG_LINE;
    detail.hidden = false;
    detail.replaceChildren(foreign(new Date(item.at * 1000).toISOString() + '  ' + item.level + '  ' + item.logger + '\n' +
      item.text));
    if (top < pane.scrollTop) pane.scrollTop = top;
      else if (top + LOG_LINE > pane.scrollTop + pane.clientHeight) pane.scrollTop = top + LOG_LINE - pane.clientHeight;
    follow = false;
    ask();
  }
  pane.addEventListener('scroll', () => { follow = pane.scrollTop + pane.clientHeight >= pane.scrollHeight - LOG_LINE; ask();
    });
  pane.addEventListener('click', event => { const node = event.target.closest('.log-line');
    if (node && !String(getSelection())) choose(Number(node.dataset.at)); });
  pane.addEventListener('keydown', event => {
    const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
    if (step) { event.preventDefault(); choose(chosen < 0 ? seen.length - 1 : chosen + step); }
    if (event.key === 'End') follow = true;
  });
  search.addEventListener('input', throttle(() => { word = search.value.toLowerCase(); sift(); }, 150));
  levels.addEventListener('change', () => { level = levels.value; sift(); });
  const add = item => {
    if (all.length && item.id <= all[all.length - 1].id) return;
    all.push(item);
    if (wanted(item)) { seen.push(item); if (!follow) missed++; }
    if (all.length > LOG_KEPT + 2000) {                // in steps: cutting at each line would copy them all each time
      const gone = all.splice(0, 2000), cut = seen.findIndex(kept => kept.id > gone[gone.length - 1].id);
      const lost = cut < 0 ? seen.length : cut;
      seen.splice(0, lost);
      chosen = chosen < lost ? -1 : chosen - lost;
      if (!follow) pane.scrollTop -= lost * LOG_LINE;
    }
    ask();
  };
  let waiting = [], ready = false;
  const stops = [live.on('log', item => ready ? add(item) : waiting.push(item)),
    live.on('dropped', async () => { (await api('logs?level=debug&limit=10000')).data.forEach(add); })];
  live.logs(true);
  await load(root, api('logs?level=debug&limit=10000'), data => {
    all = data.data;
    root.append(el('div', {class: 'spread'}, el('div', {class: 'row grow'}, levels, search, count),
      el('a', {class: 'btn', href: BASE + 'logs.txt', download: 'iflow2api.log'}, icon('download'), t('download'))),
    el('div', {class: 'log-box'}, pane, newest), detail);
    ready = true;
    waiting.forEach(add);
    waiting = [];
    sift();
  });
  addEventListener('resize', ask);
  return () => { stops.forEach(stop => stop()); live.logs(false); removeEventListener('resize', ask); };
}};
"""

#: The first start in three steps.
# language=JavaScript
_JS_GUIDE = r"""
VIEWS.guide = {icon: 'guide', async show(root) {
  let model = '', client = '';
  const step = (n, title, done, ...body) => el('li', {class: 'card step' + (done ? ' done' : '')},
    el('span', {class: 'step-n', 'aria-hidden': 'true'}, done ? icon('check') : String(n)),
    el('div', {class: 'grow stack tight'},
      el('h2', {}, title, done && el('span', {class: 'visually-hidden', text: ' – ' + t('done')})), body));
  const redraw = () => load(root, Promise.all([api('providers'), api('logins'), api('models'), api('config')]), draw);
  async function draw([list, logins, models, config]) {
    const usable = list.data.filter(item => item.usable), choices = models.data.filter(item => !item.alias &&
      usable.some(other => other.name === item.provider));
    model = model || models.default_model || (choices[0] || {}).id || '';
    const login = button(t('login_iflow'), act(() => loginDialog(redraw)), usable.length ? '' : 'primary', 'user');
    const add = button(t('provider_add'), act(() => providerDialog(null, list.version, redraw)), '', 'plus');
    const one = step(1, t('guide_1'), usable.length > 0, el('p', {class: 'muted', text: t('guide_1_lead')}),
      usable.length > 0 && el('ul', {class: 'chips'},
      usable.map(item => el('li', {class: 'chip'}, el('span', {class: 'dot ok', 'aria-hidden': 'true'}), foreign(item.name),
          button(t('test'), act(async () => {
        const answer = await api('providers/test', {body: {name: item.name}});
        const failed = answer.checks.find(check => check.ok === false);
        toast(answer.ok ? t('test_fine', {name: item.name}) : failed ? failed.message : t('test_bad'), answer.ok ? 'ok' :
          'bad');
      }), 'small quiet')))), el('div', {class: 'row'}, login, add));
    const select = el('select', {value: model},
      [...new Set([model, ...choices.map(item => item.id)])].filter(Boolean).map(name => option(name, clean(name))));
    const typed = input({value: model, class: 'mono'}), source = choices.length ? select : typed;
    const keep = button(t('guide_2_keep'), act(async () => {
      model = source.value.trim();
      if (!model || !await patchConfig(config.version, {default_model: model})) return;
      toast(t('saved'));
      await redraw();
    }));
    const offer = () => keep.classList.toggle('primary', usable.length > 0 && models.default_model !== source.value.trim());
    source.addEventListener('input', offer);
    source.addEventListener('change', () => { model = source.value.trim(); blocks(); });
    offer();
    const two = step(2, t('guide_2'), usable.length > 0 && Boolean(models.default_model),
      el('p', {class: 'muted', text: t('guide_2_lead')}),
      el('div', {class: 'row bottom'}, field({label: t('model'), input: source}), keep,
        el('a', {class: 'btn quiet', href: '#models', text: t('guide_2_more')})));
    const box = el('div', {class: 'stack tight'});
    const three = step(3, t('guide_3'), false, el('p', {class: 'muted', text: t('guide_3_lead')}), box,
      el('div', {class: 'row'}, VIEWS.playground && el('a', {class: 'btn', href: '#playground', text: t('guide_try')}),
        el('a', {class: 'btn quiet', href: '#clients', text: t('guide_more')})));
    async function blocks() {
      try {
        const data = await api('clients' + (model ? '?model=' + encodeURIComponent(model) : ''));
        const chosen = data.data.find(item => item.id === client) || data.data[0];
        client = chosen.id;
        const kinds = el('select', {value: client, id: 'guide-client',
          on: {change() { client = kinds.value; blocks().then(() => $('#guide-client').focus()); }}},
          data.data.map(item => option(item.id, item.title)));
        box.replaceChildren(field({label: t('client'), input: kinds}),
          ...chosen.blocks.map(part => el('div', {class: 'stack tight'},
          el('div', {class: 'spread'}, el('h3', {text: pick(part.title)}), copyButton(() => part.text)),
            el('pre', {tabindex: '0'}, foreign(part.text)))),
        data.needs_key && el('p', {class: 'note'}, t('guide_needs_key') + ' ',
          el('a', {href: '#keys', text: t('view_keys')})) || '');
      } catch (error) { box.replaceChildren(el('p', {class: 'note bad'}, errorText(error))); }
    }
    root.append(el('p', {class: 'muted', text: t('guide_lead')}), el('ol', {class: 'steps'}, one, two, three));
    await blocks();
  }
  await redraw();
}};
"""

_TEXTS_CORE: Dict[str, Tuple[str, str]] = {
    "skip": ("跳到内容", "Skip to the content"), "nav": ("导航", "Navigation"), "nav_use": ("使用", "Use"),
    "nav_setup": ("配置", "Set up"), "nav_system": ("系统", "System"), "view_guide": ("快速开始", "Get started"),
    "view_overview": ("概览", "Overview"), "view_playground": ("试一试", "Playground"),
    "view_providers": ("账号与上游", "Accounts & providers"), "view_models": ("模型与路由", "Models & routes"),
    "view_keys": ("密钥与限额", "Keys & limits"), "view_usage": ("用量", "Usage"), "view_instances": ("实例", "Instances"),
    "view_settings": ("设置", "Settings"), "view_logs": ("日志", "Logs"), "view_clients": ("接入客户端", "Client setup"),
    "view_about": ("关于", "About"), "theme": ("主题：{now}，点击切换为{next}", "Theme: {now}. Switch to {next}"),
    "theme_system": ("跟随系统", "system"), "theme_light": ("浅色", "light"), "theme_dark": ("深色", "dark"),
    "account": ("账户", "Account"), "sign_in": ("登录", "Sign in"), "sign_out": ("退出登录", "Sign out"),
    "sign_out_everywhere": ("在所有设备上退出", "Sign out everywhere"),
    "sign_in_lead": ("输入管理密码，用户名是 admin。", "Enter the admin password. The user is admin."),
    "sign_in_again": ("登录已过期。重新登录后可以接着做，已填写的内容都还在。",
                      "Your session has ended. Sign in to go on; everything you typed is still here."),
    "sign_in_wrong": ("密码不对。忘记了？在服务器上运行 admin reset-password。",
                      "That password is wrong. Forgotten? Run admin reset-password on the server."),
    "sign_in_slow": ("尝试太频繁，请在 {time} 后再试。", "Too many attempts. Try again in {time}."),
    "password": ("密码", "Password"), "password_new": ("新密码", "New password"), "password_repeat": ("再输一次", "Repeat it"),
    "password_hint": ("至少 8 个字符", "At least 8 characters"),
    "password_differ": ("两次输入的密码不一致", "The two passwords differ"),
    "password_current": ("当前密码", "Current password"), "password_change": ("修改密码", "Change password"),
    "password_others_end": ("其他设备上的登录会随之失效。", "Other sessions will end."),
    "password_changed": ("密码已修改", "Password changed"),
    "setup_title": ("欢迎使用 iflow2api", "Welcome to iflow2api"),
    "setup_lead": ("先给这个管理页面设一个密码，只需一次。", "First, set a password for this page. You do this once."),
    "setup_code": ("一次性代码", "One-time code"),
    "setup_code_hint": ("启动 iflow2api 的终端窗口里印着它", "It is printed in the terminal where iflow2api was started"),
    "setup_go": ("设置密码并继续", "Set the password and continue"),
    "live_on": ("实时", "Live"), "live_off": ("正在重新连接…", "Reconnecting…"),
    "error_status": ("服务器返回了 {status}", "The server answered {status}"),
    "error_offline": ("连不上 iflow2api，它可能已停止", "iflow2api does not answer; it may have stopped"),
    "error_page": ("页面出错：{text}", "The page failed: {text}"), "retry": ("重试", "Try again"),
    "loading": ("加载中…", "Loading…"), "nothing": ("暂无内容", "Nothing here yet"), "actions": ("操作", "Actions"), "table": ("表格", "Table"),
    "copy": ("复制", "Copy"), "copied": ("已复制", "Copied"),
    "copy_failed": ("浏览器不允许复制，请手动选中复制", "The browser does not allow copying; select the text instead"),
    "close": ("关闭", "Close"), "cancel": ("取消", "Cancel"), "ok": ("确定", "OK"), "save": ("保存", "Save"),
    "remove": ("删除", "Remove"), "confirm": ("请确认", "Please confirm"), "discard": ("放弃更改", "Discard changes"),
    "unsaved_title": ("有未保存的更改", "Unsaved changes"),
    "unsaved": ("离开后这些更改会丢失。", "They will be lost if you leave."),
    "invalid_missing": ("请填写此项", "This is needed"), "invalid": ("这个值不对", "This value does not fit"),
}

_TEXTS_VIEWS: Dict[str, Tuple[str, str]] = {
    # figures, requests, state
    "problems": ("需要留意", "Needs attention"), "status_left": ("已断开", "client left"), "server": ("服务", "Server"),
    "healthy": ("正常", "Healthy"), "degraded": ("异常", "Degraded"), "running_for": ("已运行 {time}", "up for {time}"),
    "today": ("今日请求", "Requests today"), "errors_n": ("{n} 次失败", "{n} failed"), "errors_none": ("没有失败", "none failed"),
    "tokens_today": ("今日 token", "Tokens today"), "in_out": ("输入 → 输出", "in → out"), "right_now": ("进行中", "In flight"),
    "waiting_n": ("{n} 个排队 · {c} 个连接", "{n} waiting · {c} {c:connection|connections}"),
    "waiting": ("{n} 个排队", "{n} waiting"), "address": ("地址", "Address"), "base_url": ("接口地址", "Base URL"),
    "needs_key": ("客户端密钥", "Client key"), "needs_key_yes": ("需要", "required"),
    "needs_key_no": ("不需要（仅限本机访问）", "not needed (this machine only)"), "connect": ("连接", "Connect"),
    "manage": ("管理", "Manage"), "filter": ("筛选…", "Filter…"), "all": ("全部", "All"), "only_ok": ("成功", "Succeeded"),
    "only_bad": ("失败", "Failed"), "requests": ("最近请求", "Recent requests"),
    "requests_none": ("还没有请求。把客户端指向上面的接口地址，请求会实时出现在这里。",
                      "No requests yet. Point a client at the base URL above and they appear here as they happen."),
    "request_details": ("请求详情", "Request details"), "request_id": ("请求 ID", "Request ID"), "time": ("时间", "Time"),
    "model": ("模型", "Model"), "target": ("发往", "Sent to"), "dialect": ("协议", "Dialect"), "streamed": ("流式", "streamed"),
    "key": ("密钥", "Key"), "status": ("状态", "Status"), "error": ("错误", "Error"), "first_token": ("首字", "First token"),
    "duration": ("耗时", "Duration"), "tokens": ("token", "Tokens"), "tokens_in": ("输入 token", "Tokens in"),
    "tokens_out": ("输出 token", "Tokens out"), "of_cached": ("缓存命中 {n}", "{n} cached"),
    "of_reasoning": ("其中思考 {n}", "{n} reasoning"), "tokens_note": ("说明", "Note"),
    "estimated": ("上游没有报告用量，此为估算", "Estimated: the upstream reported no usage"), "attempts": ("尝试", "Attempts"),
    "state": ("状态", "State"), "active_waiting": ("占用", "In use"), "health_ok": ("可用", "usable"),
    "health_disabled": ("不可用", "disabled"), "health_rests": ("暂停中", "resting"), "health_tried": ("试探中", "being tried"),
    "health_keys_rest": ("{n} 个密钥暂停", "{n} {n:key|keys} resting"),
    # first start
    "guide_lead": ("三步，从零到能用。", "Three steps, from nothing to a working client."),
    "guide_1": ("接入模型服务", "Connect to a model service"),
    "guide_1_lead": ("登录 iFlow 账号，或者添加任何兼容 OpenAI 的服务商。两个都用也可以。",
                     "Log in to iFlow, or add any OpenAI-compatible provider. You can have both."),
    "guide_2": ("选择默认模型", "Pick the default model"),
    "guide_2_lead": ("客户端没有指定模型，或使用自己的模型名（如 claude-*、gpt-*）时，就用它。",
                     "It answers when a client names no model, or one of its own such as claude-* or gpt-*."),
    "guide_2_keep": ("设为默认", "Make it the default"), "guide_2_more": ("别名与备用模型", "Aliases and fallbacks"),
    "guide_3": ("配置你的客户端", "Set up your client"),
    "guide_3_lead": ("选择客户端，复制下面的内容。", "Choose your client and copy these lines."),
    "guide_try": ("先在网页里试一试", "Try it here first"), "guide_more": ("所有客户端", "All clients"),
    "guide_needs_key": ("此服务需要客户端密钥：", "This server needs a client key:"),
    "guide_open_login_or_provider": ("还没有可用的模型服务。", "No model service is connected yet."),
    "guide_open_models": ("还没有选定默认模型。", "No default model is chosen yet."),
    "guide_open_client": ("一切就绪，只差客户端。", "All is ready; only a client is missing."), "client": ("客户端", "Client"),
    "done": ("已完成", "done"), "test_fine": ("{name} 工作正常", "{name} works"), "test_bad": ("测试未通过", "The test failed"),
    # accounts and providers
    "iflow_accounts": ("iFlow 账号", "iFlow accounts"), "accounts": ("账号", "Accounts"),
    "iflow_lead": ("登录后，iFlow 的模型就能直接使用，令牌会自动续期。",
                   "After logging in, iFlow's models are ready to use, and the token renews itself."),
    "login_iflow": ("登录 iFlow", "Log in to iFlow"), "login_another": ("添加账号", "Add an account"),
    "login_begin": ("去登录", "Go to the login"), "account_name": ("账号名称", "Name of the account"),
    "account_name_hint": ("自己取名，便于区分；留空则替换默认账号", "Yours to choose; empty replaces the default account"),
    "account_default": ("默认", "Default"), "login_lead": ("iFlow 的登录页已在新窗口打开，请在那里完成登录。",
                                                       "iFlow's login page has opened in a new window. Finish there."),
    "login_lead_blocked": ("浏览器拦截了新窗口，请点下面的按钮打开登录页。",
                           "The browser blocked the new window. Open the login page with the button below."),
    "login_waiting": ("等待登录完成…", "Waiting for the login…"), "login_open": ("打开登录页", "Open the login page"),
    "login_copy": ("复制地址", "Copy the address"),
    "login_paste": ("最后停在打不开的页面？", "It ends on a page that does not load?"),
    "login_paste_hint": ("把那个页面的完整地址（或其中的 code）粘贴到这里。",
                         "Paste the full address of that page here, or the code in it."),
    "login_paste_label": ("回跳地址", "Address it ended on"), "login_paste_go": ("完成登录", "Finish the login"),
    "login_done": ("登录成功", "Logged in"), "login_failed": ("登录失败", "Login failed"), "login_over": ("已失效", "ended"),
    "login_again": ("重新登录", "Log in again"), "logged_in": ("已登录", "logged in"),
    "login_ended": ("iFlow 账号 {name} 的登录已失效，请重新登录。", "The iFlow login {name} has ended. Log in again."),
    "refresh_failed": ("续期失败", "renewal failed"), "refreshed": ("上次续期", "Renewed"), "log_out": ("退出", "Log out"),
    "log_out_sure": ("退出 iFlow 账号 {name}？它的令牌会从本机删除。",
                     "Log out of the iFlow account {name}? Its tokens are removed from this machine."),
    "provider": ("上游", "Provider"), "providers": ("上游", "Providers"),
    "providers_none": ("还没有上游，从这里开始", "No provider yet. Start here"),
    "providers_empty": ("还没有上游。登录 iFlow，或添加一个。", "No provider yet. Log in to iFlow or add one."),
    "provider_add": ("添加上游", "Add a provider"), "provider_edit": ("编辑 {name}", "Edit {name}"),
    "provider_name": ("名称", "Name"), "provider_name_hint": ("用于 名称/模型 的写法", "Used as name/model"),
    "provider_models": ("模型", "Models"),
    "provider_models_hint": ("每行一个。列出的模型会直接发到这里；点「测试」可获取列表。",
                             "One a line. Listed models come here directly; Test fetches what there is."),
    "provider_remove": ("删除上游 {name}？它的密钥也会一并删除。", "Remove the provider {name}? Its keys are removed with it."),
    "preset": ("服务商", "Service"), "preset_none": ("自定义", "Custom"),
    "preset_hint": ("选一个常见服务商，地址和兼容选项会自动填好", "Fills in the address and what is special about it"),
    "api_keys": ("API 密钥", "API keys"), "api_keys_more": ("再加密钥", "More API keys"),
    "api_keys_hint": ("每行一个；多个密钥轮流使用。本地引擎可留空。",
                      "One a line; several take turns. Local engines need none."),
    "kind": ("类型", "Kind"), "concurrency": ("并发上限", "Requests at once"), "concurrency_hint": ("0 为不限", "0: no limit"),
    "timeout_s": ("超时", "Timeout"), "seconds": ("秒", "Seconds"), "proxy": ("代理", "Proxy"),
    "proxy_hint": ("留空则按全局设置", "Empty: as in the settings"), "vision_model": ("识图模型", "Vision model"),
    "vision_model_hint": ("带图片的请求改用它", "Takes requests with images"), "headers": ("附加请求头", "Extra headers"),
    "headers_hint": ('JSON，例如 {"X-Team": "blue"}', 'JSON, such as {"X-Team": "blue"}'), "profile": ("兼容选项", "Profile"),
    "profile_hint": ("JSON；一般由服务商预设填好", "JSON; the presets fill it in"), "more_options": ("更多选项", "More options"),
    "order_hint": ("同名模型由排在前面的上游提供。", "Where several list the same model, the first one gets it."),
    "move_up": ("上移", "Move up"), "move_down": ("下移", "Move down"), "test": ("测试", "Test"),
    "testing": ("正在发送真实的小请求…", "Sending small real requests…"), "edit": ("编辑", "Edit"), "saved": ("已保存", "Saved"),
    "check_reach": ("连接", "Reach"), "check_key": ("密钥", "Key"), "check_model": ("模型", "Model"),
    "check_stream": ("流式", "Stream"), "check_tools": ("工具", "Tools"),
    "key_rests": ("暂停 {time}", "rests {time}"), "key_refused": ("被拒绝", "refused"), "none": ("无", "none"),
    "unlimited": ("不限", "no limit"),
    "at_once": ("并发 {n}", "{n} at once"), "at_once_any": ("并发不限", "no limit at once"), "is_default": ("默认", "default"),
    "source_flag": ("命令行参数", "command-line flag"), "source_detected": ("自动发现的本地引擎", "local engine, found by itself"),
    "source_login": ("iFlow 登录", "iFlow login"), "bad_json": ("JSON 有误：{text}", "Not valid JSON: {text}"),
    # models and routes
    "models": ("模型", "Models"), "models_none": ("没有模型", "No models"), "context": ("上下文", "Context"),
    "max_output": ("最大输出", "Max output"), "vision": ("识图", "Vision"), "images": ("图片", "images"), "try": ("试一试", "Try"),
    "alias": ("别名", "alias"), "alias_add": ("添加别名", "Add an alias"), "alias_name": ("客户端用的名字", "Name that clients use"),
    "alias_targets": ("依次尝试的模型", "Models to try, in order"), "routes": ("别名与备用", "Aliases and fallbacks"),
    "routes_hint": ("客户端用的名字（可含 *）→ 依次尝试的模型，用逗号分隔；从上往下第一个匹配的生效。需要按条件分流时写 JSON。",
                    "A name that clients use, * allowed → the models to try, with commas between. The first match counts. "
                    "For conditions, write JSON."),
    "default_model": ("默认模型", "Default model"), "default_model_hint": ("没有指定模型，或没有人认领的客户端模型名",
                                                                "For requests without a model, and for foreign names"),
    "where": ("请求会去哪里？", "Where does it go?"), "where_label": ("客户端请求的模型", "Model a client asks for"),
    "where_more": ("请求的条件", "What the request is like"), "where_tokens": ("输入 token", "Input tokens"),
    "with_images": ("含图片", "Images"), "with_thinking": ("开启思考", "Thinking"), "with_tools": ("带工具", "Tools"),
    "else_then": ("失败则", "else"),
    # keys and limits
    "keys": ("客户端密钥", "Client keys"), "keys_none": ("还没有客户端密钥", "No client keys yet"),
    "keys_open": ("现在不需要密钥，只有本机可以访问。添加第一个密钥后，所有请求都要带密钥。",
                  "No key is needed now, and only this machine has access. Once there is a key, every request needs one."),
    "keys_needed": ("所有请求都要带上下面的一个密钥。", "Every request must carry one of these keys."),
    "key_add": ("添加密钥", "Add a key"), "key_create": ("生成密钥", "Make the key"), "key_name": ("名称", "Name"),
    "key_name_hint": ("给谁或什么用的", "Who or what it is for"), "key_models": ("可用模型", "Models"),
    "key_models_hint": ("用逗号分隔，可含 *；留空为全部", "With commas between, * allowed; empty is all"),
    "all_models": ("全部", "all"), "key_expires_hint": ("当天结束时失效；留空则长期有效", "At the end of that day; empty: never"),
    "key_new": ("{name} 的新密钥", "The new key of {name}"),
    "key_once": ("请现在复制：只保存了它的摘要，以后无法再次显示。",
                 "Copy it now: only its hash is kept, so it can't be shown again."),
    "key_copy": ("复制密钥", "Copy the key"), "key_kept": ("我已保存", "I have kept it"),
    "key_remove": ("删除密钥 {name}？使用它的客户端会立即失去访问权限。",
                   "Remove the key {name}? Clients that use it lose access at once."),
    "custom_key": ("固定密钥", "Fixed key"), "custom_key_hint": ("设置项 custom_api_key", "the setting custom_api_key"),
    "expired": ("已过期", "expired"), "expires": ("到期", "Expires"), "created": ("创建于", "Created"), "never": ("永不", "never"),
    "limits": ("限额", "Limits"), "limit_rpm": ("每分钟请求", "Requests / minute"), "limit_rph": ("每小时请求", "Requests / hour"),
    "limit_rpd": ("每天请求", "Requests / day"), "limit_tpd": ("每天 token", "Tokens / day"), "limit_concurrency": ("并发", "At once"),
    "address_limits": ("每个地址的限额", "Limits of each address"),
    "address_limits_hint": ("对每个客户端 IP 分别计算，与密钥无关。", "Counted for each client address, whatever its key."),
    # instances, about
    "instances": ("实例", "Instances"), "instances_hint": ("这个服务目前单独运行。", "This server runs on its own."),
    "name": ("名称", "Name"), "this_one": ("当前", "this one"), "version": ("版本", "Version"), "started": ("启动于", "Started"),
    "platform": ("平台", "Platform"), "executable": ("解释器", "Executable"), "memory": ("内存", "Memory"),
    "threads": ("线程", "Threads"), "path_config": ("配置文件", "Configuration"), "path_usage": ("用量记录", "Usage book"),
    "path_log": ("日志文件", "Log file"), "diagnostics": ("诊断信息", "Diagnostics"),
    "diagnostics_hint": ("反馈问题时请附上，其中不含密钥。", "For bug reports. There are no secrets in it."),
    "documents": ("接口文档", "API documents"),
    # settings
    "settings_search": ("搜索设置…", "Search settings…"), "settings_path": ("保存在", "Kept in"),
    "group_server": ("服务", "Server"), "group_upstream": ("上游与路由", "Upstreams and routes"),
    "group_clients": ("客户端与访问", "Clients and access"), "group_iflow": ("iFlow", "iFlow"),
    "group_logs": ("日志与用量", "Logs and usage"), "group_appearance": ("界面", "Appearance"),
    "unit_s": ("秒", "seconds"), "unit_bytes": ("字节", "bytes"), "unit_days": ("天", "days"),
    "automatic": ("自动", "automatic"), "one_a_line": ("每行一个", "One a line"), "not_set": ("未设置", "not set"),
    "empty": ("空", "empty"), "unset": ("未设置", "not set"), "default": ("默认", "default"), "to_default": ("恢复默认", "Use the default"),
    "origin_file": ("已修改", "changed"), "origin_environment": ("环境变量", "environment"), "origin_flag": ("命令行", "flag"),
    "from_flag": ("由命令行参数 {name} 指定，此处不能修改", "Given by the flag {name}; it can't be changed here"),
    "from_environment": ("由环境变量 {name} 指定，此处不能修改", "Given by the variable {name}; it can't be changed here"),
    "needs_restart": ("需重启", "restart"), "changes_n": ("{n} 项未保存", "{n} unsaved {n:change|changes}"),
    "saved_restart": ("已保存，重启后生效", "Saved; some of it takes effect after a restart"),
    "conflict": ("同时有人改了相同的设置", "Somebody else changed the same"),
    "conflict_lead": ("请逐项选择保留哪一个，没有内容会丢失。", "Choose for each which one to keep. Nothing is lost."),
    "yours": ("你的", "Yours"), "theirs": ("对方的", "Theirs"),
    # logs
    "logs_search": ("搜索日志…", "Search the log…"), "log_level": ("级别", "Level"), "level_debug": ("调试及以上", "Debug and above"),
    "level_info": ("信息及以上", "Info and above"), "level_warning": ("警告及以上", "Warnings and errors"),
    "level_error": ("仅错误", "Errors only"), "logs_new": ("{n} 条新日志", "{n} new {n:line|lines}"),
    "logs_newest": ("回到最新", "Newest"), "logs_count": ("{n} 行", "{n} lines"), "download": ("下载", "Download"),
}

#: The playground, charts, usage and client setup: what the core has no look for.
# language=CSS
_CSS_PLAY = r"""
.play{display:grid;grid-template-columns:minmax(0,1fr) 300px;gap:var(--gap);align-items:start}
.play-main{display:flex;flex-direction:column;gap:12px;height:calc(100dvh - 57px - 48px);min-height:440px;
margin-bottom:-40px}
.play-main>.spread:first-child{margin:0}
.play-log,.play-sheet{flex:1;min-height:0;overflow-y:auto;overscroll-behavior:contain;margin:0 -18px;padding:4px 18px;
border-block:1px solid var(--line)}
.play-log{display:flex;flex-direction:column;gap:18px;padding-block:16px}
.play-log>.empty{margin:auto;max-width:44ch}
.play-log:focus-visible{outline-offset:-2px}
.play-text{white-space:pre-wrap;overflow-wrap:anywhere}
.play-parts{display:grid;gap:10px;grid-template-columns:minmax(0,1fr);margin-bottom:8px}
.play-user{align-self:flex-end;max-width:min(86%,720px);display:grid;gap:2px;justify-items:end}
.play-bubble{padding:9px 14px;border-radius:14px 14px 4px 14px;background:var(--accent-soft);display:grid;gap:8px;
max-width:100%;grid-template-columns:minmax(0,1fr)}
.play-acts{gap:0;margin-inline:-8px}
@media (hover:hover){.play-user .play-acts:not(:focus-within){opacity:0}.play-user:hover .play-acts{
opacity:1!important}}
.play-log .btn.small{border-color:transparent;background:none;color:var(--muted);min-height:26px;padding:1px 8px}
.play-log .btn.small:hover{color:var(--text);background:var(--surface-2)}
.play-answer{max-width:860px;width:100%}
.play-meta{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12.5px;color:var(--muted);
font-variant-numeric:tabular-nums}
.play-fold{border:1px solid var(--line);border-radius:8px;padding:0 12px}
.play-fold>summary{padding:6px 0;cursor:pointer;color:var(--muted);font-size:13px}
.play-fold>summary b{color:var(--text)}
.play-fold>.play-text{color:var(--muted);font-size:13px;padding-bottom:10px;max-height:340px;overflow:auto}
.play-fold>.field{margin:10px 0 12px}
.play-code{background:var(--surface-2);border-radius:8px;min-width:0}
.play-code>.spread{padding:3px 4px 3px 14px;font-size:12.5px;border-bottom:1px solid var(--line);flex-wrap:nowrap}
.play-code>.spread .muted{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;min-width:0}
.play-code .btn.small{border-color:transparent;background:none;min-height:26px}
.play-code>pre{scrollbar-width:thin;background:none;white-space:pre;overflow-wrap:normal;max-height:60vh}
.play-sheet .play-code{margin-block:12px}
.play-sheet .play-code>pre{scrollbar-width:thin;white-space:pre-wrap;overflow-wrap:anywhere;max-height:none}
.play-composer{display:grid;gap:8px;border-radius:10px}
.play-composer.drop{outline:2px dashed var(--accent);outline-offset:6px}
.play-composer textarea{min-height:58px;max-height:34vh;field-sizing:content}
.play-thumb{display:inline-flex;align-items:center;gap:4px;max-width:260px;border:1px solid var(--line);
border-radius:8px;
padding:3px;background:var(--surface)}
.play-thumb img{height:56px;max-width:140px;object-fit:cover;border-radius:6px;display:block}
.play-thumb .mono{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;padding:4px 6px}
.play-settings>summary{cursor:pointer;font-weight:650;font-size:15px}
.play-settings>.stack{margin-top:14px}
.play-pair{display:grid;grid-template-columns:1fr 1fr;gap:12px}
.picker{position:relative;flex:1 1 220px;max-width:420px}
.picker-list{position:absolute;z-index:4;inset:calc(100% + 4px) 0 auto;max-height:min(320px,50vh);overflow-y:auto;
padding:6px;
list-style:none;background:var(--surface);border-radius:10px;box-shadow:var(--shadow-2);min-width:260px}
.picker-list li{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 12px;padding:6px 10px;
border-radius:6px;cursor:pointer}
.picker-list li .muted{font-size:12.5px}
.picker-list li:hover,.picker-list [aria-selected=true]{background:var(--surface-2)}
.picker-list [aria-selected=true]{box-shadow:inset 3px 0 var(--accent)}
.chart{display:grid;gap:12px;grid-template-columns:minmax(0,1fr)}
.chart-plot{position:relative;height:200px;border-radius:6px;touch-action:pan-y}
.chart-art svg{display:block}
.chart-art text{font-size:12px;fill:var(--muted);font-variant-numeric:tabular-nums}
.chart-line{stroke:var(--line);shape-rendering:crispEdges}
.chart-band{fill:var(--surface-2)}
.chart-bar{stroke:var(--surface);stroke-width:1}
.series-1{--c:var(--series-1)}.series-2{--c:var(--series-2)}.series-3{--c:var(--series-3)}.series-4{--c:var(--series-4)}
.series-5{--c:var(--series-5)}.series-6{--c:var(--series-6)}.series-7{--c:var(--series-7)}.series-8{--c:var(--series-8)}
.series-rest{--c:var(--muted)}
.chart-bar{fill:var(--c)}
.chart-dot{display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--c);flex:none}
.chart-tip{position:absolute;top:4px;z-index:3;min-width:150px;max-width:min(320px,64%);padding:8px 10px;
border-radius:8px;
background:var(--surface);box-shadow:var(--shadow-2);font-size:12.5px;pointer-events:none;
font-variant-numeric:tabular-nums}
.chart-tip .spread{flex-wrap:nowrap;gap:14px}
.chart-tip .spread>span:first-child{display:flex;align-items:center;gap:6px;min-width:0}
.chart-tip span>span,.chart-legend span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.chart-legend{display:flex;flex-wrap:wrap;gap:4px;margin-inline:-9px}
.chart-legend button{display:inline-flex;align-items:center;gap:7px;max-width:100%;padding:2px 9px;
border:1px solid transparent;
border-radius:99px;background:none;font-size:13px;min-height:28px}
.chart-legend button:hover{background:var(--surface-2)}
.chart-legend b{font-weight:500;color:var(--muted);font-variant-numeric:tabular-nums}
.chart-legend [aria-pressed=false]{color:var(--muted);text-decoration:line-through}
.chart-legend [aria-pressed=false] .chart-dot{background:none;box-shadow:inset 0 0 0 2px var(--c)}
.usage .row{flex-wrap:nowrap}
.usage .row select{width:auto}
.usage .end{white-space:nowrap}
.usage-sum tr:last-child td{font-weight:650;border-top:2px solid var(--line)}
.clients{display:grid;grid-template-columns:200px minmax(0,1fr);gap:24px}
.clients-names{display:grid;gap:1px}
.clients-names button{padding:6px 10px;border:0;border-radius:8px;background:none;text-align:start}
.clients-names button:hover{background:var(--surface-2)}
.clients-names [aria-current]{background:var(--accent-soft);color:var(--accent);font-weight:600}
.clients-select{display:none}
.clients-steps{list-style:none;counter-reset:step;display:grid;gap:26px;grid-template-columns:minmax(0,1fr);
margin-top:6px}
.clients-steps>li{position:relative;display:grid;gap:12px;grid-template-columns:minmax(0,1fr);counter-increment:step;
padding-inline-start:36px}
.clients-steps>li::before{content:counter(step);position:absolute;inset-inline-start:0;display:grid;place-items:center;
width:24px;height:24px;border-radius:50%;background:var(--accent-soft);color:var(--accent);font-size:13px}
.clients-steps h2+p{margin-top:-8px}
@media (max-width:1200px){.play{grid-template-columns:minmax(0,1fr)}.play-settings{margin-top:40px}}
@media (max-width:720px){.clients{grid-template-columns:minmax(0,1fr);gap:16px}.clients-names{display:none}
.clients-select{display:block}
.clients-steps>li{padding:0}.clients-steps h2{padding-inline-start:34px}.clients-steps h2+p{margin:0}
.clients pre{white-space:pre-wrap;overflow-wrap:anywhere}}
@media (max-width:640px){.play-main{height:calc(100dvh - 57px - 32px);padding:12px 14px}.play-log,.play-sheet{
margin:0 -14px;padding-inline:14px}
.play-composer .btn.quiet{font-size:0;gap:0;width:40px;padding:0}
.play-main .tabs>*{padding-inline:9px;font-size:13px}.play-log .btn.small,.play-code .btn.small{min-height:32px}
.play-user{max-width:94%}
.picker{max-width:none}}
"""

#: The playground: requests and streams of the three dialects first, which know nothing of the page; then the view.
# language=JavaScript
_JS_PLAY = r"""
// --- the three dialects: requests, streams, curl (pure: tests run this part alone) ---

/** Server-sent events out of text that is cut anywhere: each call gives [{event, data}]. */
function sseReader() {
  let rest = '', event = '', data = [];
  return text => {
    const found = [], lines = (rest + text).split(/\r\n|\n|\r(?!$)/);      // a CR at the end may get its LF yet
    rest = lines.pop();
    for (const line of lines) {
      const [, name, value] = /^([^:]*):? ?([^]*)$/.exec(line);
      if (!line) {
        if (data.length) found.push({event, data: data.join('\n')});
        [event, data] = ['', []];
      } else if (name === 'data') data.push(value);
      else if (name === 'event') event = value;
    }
    return found;
  };
}

const newAnswer = () => ({role: 'assistant', parts: [], usage: null, stop: '', error: '', ended: false});
const partsOf = (turn, kind) => turn.parts.filter(part => part.kind === kind);
const textOf = (turn, kind) => partsOf(turn, kind).map(part => part.text).join('\n\n');
const words = value => typeof value === 'string' ? value
  : Array.isArray(value) ? value.map(part => part && (part.text || part.refusal || '')).join('') : '';
const jsonText = value => typeof value === 'string' ? value : JSON.stringify(value);
const parseJson = (text, otherwise) => { try { return JSON.parse(text); } catch { return otherwise; } };
const errorOf = body => body.error ? words(body.error.message) || jsonText(body.error)
  : words(body.message) || words(body.detail) || JSON.stringify(body);

/** The part an answer goes on with: the one of `key`, without a key the last one if it is of this kind. */
function partOf(answer, kind, key) {
  const {parts} = answer;
  let part = key === undefined ? parts[parts.length - 1] : parts.find(each => each.key === key);
  if (!part || part.kind !== kind) parts.push(part = {kind, key, text: ''});
  return part;
}

function chatDelta(answer, delta) {
  const thought = words(delta.reasoning_content) || words(delta.reasoning) || words(delta.reasoning_details);
  if (thought) partOf(answer, 'thinking').text += thought;
  const text = words(delta.content) || words(delta.refusal);
  if (text) partOf(answer, 'text').text += text;
  const calls = delta.tool_calls || (delta.function_call ? [{function: delta.function_call}] : []);
  calls.forEach((call, at) => {
    const key = call.index ?? at, said = call.function || call.custom || {};
    let part = partOf(answer, 'call', key);
    if (call.id && part.id && call.id !== part.id) {         // servers that give every call the index 0
      part.key = null;
      part = partOf(answer, 'call', key);
    }
    part.id = part.id || call.id;
    if (said.name && said.name !== part.name) part.name = (part.name || '') + said.name;
    part.text += jsonText(said.arguments ?? said.input ?? '');
  });
}

function chatUsage(usage) {
  const {prompt_tokens_details: sent, completion_tokens_details: made} = usage;
  return {input: usage.prompt_tokens, output: usage.completion_tokens, reasoning: made && made.reasoning_tokens,
    cached: sent?.cached_tokens ?? usage.prompt_cache_hit_tokens ?? usage.cached_tokens};
}

/** Anthropic counts what came out of the cache apart from input_tokens; we show the whole. */
function messagesUsage(usage) {
  const cached = usage.cache_read_input_tokens || 0;
  return {input: (usage.input_tokens || 0) + cached + (usage.cache_creation_input_tokens || 0), cached,
    output: usage.output_tokens, reasoning: usage.output_tokens_details?.thinking_tokens};
}

function responsesUsage(usage) {
  return {input: usage.input_tokens, output: usage.output_tokens, cached: usage.input_tokens_details?.cached_tokens,
    reasoning: usage.output_tokens_details?.reasoning_tokens};
}

const BLOCKS = {text: 'text', thinking: 'thinking', tool_use: 'call', server_tool_use: 'call'};
function messagesBlock(answer, block, key) {
  const part = partOf(answer, BLOCKS[block.type] || 'call', key);
  part.text += block.text || block.thinking || '';
  if (block.signature) part.signature = block.signature;
  if (part.kind !== 'call') return;
  [part.id, part.name] = [block.id, block.name || block.type];
  if (!BLOCKS[block.type]) part.text += JSON.stringify(block.content);
  else if (block.input && Object.keys(block.input).length) part.text += JSON.stringify(block.input);
}

const MESSAGES = {
  message_start(answer, {message}) { answer.counts = message.usage; },
  content_block_start(answer, {index, content_block: block}) { messagesBlock(answer, block, index); },
  content_block_delta(answer, {index, delta}) {
    const part = answer.parts.find(each => each.key === index);
    if (!part) return;
    part.text += delta.text || delta.thinking || delta.partial_json || '';
    if (delta.signature) part.signature = delta.signature;
  },
  message_delta(answer, {delta, usage}) {
    answer.stop = delta.stop_reason || answer.stop;
    answer.usage = messagesUsage(answer.counts = {...answer.counts, ...usage});
  },
  message_stop(answer) { answer.ended = true; },
  error(answer, data) { answer.error = errorOf(data); }
};

/** An item of an answer that is complete: fills what did not come as deltas. */
function responsesItem(answer, item, at) {
  if (item.type === 'message') {
    (item.content || []).forEach((piece, index) => {
      const part = partOf(answer, 'text', at + '.' + index);
      part.text = part.text || piece.text || piece.refusal || '';
    });
  } else if (item.type === 'reasoning') {
    const part = partOf(answer, 'thinking', at);
    part.text = part.text || words(item.summary) || words(item.content);
    if (item.encrypted_content) part.item = item;
  } else {
    const part = partOf(answer, 'call', at), {id, type, status, ...rest} = item;
    part.id = item.call_id || id;
    part.name = item.namespace ? item.namespace + '.' + item.name : item.name || type;
    part.text = part.text || jsonText(item.arguments ?? item.input ?? item.action ?? rest);
  }
}

function responsesEnd(answer, {response}) {
  answer.ended = true;
  answer.stop = response.incomplete_details?.reason || response.status || '';
  answer.usage = response.usage ? responsesUsage(response.usage) : null;
  if (response.error) answer.error = errorOf(response);
}

const grows = kind => (answer, data) => {
  const key = kind === 'text' ? data.output_index + '.' + data.content_index : data.output_index;
  const part = partOf(answer, kind, key), piece = data.summary_index ?? data.content_index;
  if (kind === 'thinking' && part.text && part.piece !== piece) part.text += '\n\n';
  part.piece = piece;
  part.text += data.delta;
};
const RESPONSES = {
  'output_item.added': (answer, {item, output_index: at}) => item.type !== 'message' && item.type !== 'reasoning'
    && responsesItem(answer, {...item, arguments: item.arguments || ''}, at),
  'output_item.done': (answer, data) => responsesItem(answer, data.item, data.output_index),
  'output_text.delta': grows('text'), 'refusal.delta': grows('text'),
  'reasoning_summary_text.delta': grows('thinking'), 'reasoning_text.delta': grows('thinking'),
  'function_call_arguments.delta': grows('call'), 'custom_tool_call_input.delta': grows('call'),
  completed: responsesEnd, incomplete: responsesEnd, failed: responsesEnd
};

/** What is sent again of an answer: its text, and the calls whose results are there. */
function saidBefore(turn) {
  const calls = partsOf(turn, 'call').filter(call => call.result);
  return {calls, text: textOf(turn, 'text'), thoughts: calls.length ? partsOf(turn, 'thinking') : []};
}

const withImages = (turn, text, image) => [...turn.images.map(image), ...(turn.text ? [text(turn.text)] : [])];

function chatTurn(turn) {
  if (turn.role === 'user') {
    return [{role: 'user', content: turn.images.length ? withImages(turn, text => ({type: 'text', text}),
      url => ({type: 'image_url', image_url: {url}})) : turn.text}];
  }
  const {calls, text, thoughts} = saidBefore(turn);
  const message = {role: 'assistant', content: text || null};
  if (thoughts.length) message.reasoning_content = thoughts.map(part => part.text).join('\n\n');
  if (calls.length) {
    message.tool_calls = calls.map(({id, name, text}) => ({id, type: 'function', function: {name, arguments: text}}));
  }
  return [...(text || calls.length ? [message] : []),
    ...calls.map(call => ({role: 'tool', tool_call_id: call.id, content: call.result}))];
}

function messagesTurn(turn) {
  if (turn.role === 'user') {
    return [{role: 'user', content: turn.images.length ? withImages(turn, text => ({type: 'text', text}), url => {
      const [, media_type, data] = /^data:([^;,]+);base64,([^]*)$/.exec(url) || [];
      return {type: 'image', source: data ? {type: 'base64', media_type, data} : {type: 'url', url}};
    }) : turn.text}];
  }
  const {calls, text, thoughts} = saidBefore(turn);
  const content = [...thoughts.filter(part => part.signature).map(part => ({type: 'thinking', thinking: part.text,
    signature: part.signature})), ...(text ? [{type: 'text', text}] : []),
  ...calls.map(({id, name, text}) => ({type: 'tool_use', id, name, input: parseJson(text, {})}))];
  return [...(content.length ? [{role: 'assistant', content}] : []), ...(calls.length ? [{role: 'user',
    content: calls.map(call => ({type: 'tool_result', tool_use_id: call.id, content: call.result}))}] : [])];
}

function responsesTurn(turn) {
  if (turn.role === 'user') {
    return [{role: 'user', content: turn.images.length ? withImages(turn, text => ({type: 'input_text', text}),
      image_url => ({type: 'input_image', image_url})) : turn.text}];
  }
  const {calls, text, thoughts} = saidBefore(turn);
  return [...thoughts.filter(part => part.item).map(part => part.item),
    ...(text ? [{role: 'assistant', content: [{type: 'output_text', text}]}] : []),
    ...calls.map(({id, name, text}) => ({type: 'function_call', call_id: id, name, arguments: text})),
    ...calls.map(call => ({type: 'function_call_output', call_id: call.id, output: call.result}))];
}

/** talk: {model, system, stream, turns, temperature, top_p, max_tokens, effort, extra}; what is undefined stays out. */
const DIALECTS = {
  chat: {
    path: '/v1/chat/completions', headers: ['Authorization: Bearer YOUR_KEY'],
    build: talk => ({model: talk.model,
      messages: [...(talk.system ? [{role: 'system', content: talk.system}] : []), ...talk.turns.flatMap(chatTurn)],
      stream: talk.stream, stream_options: talk.stream ? {include_usage: true} : undefined,
      temperature: talk.temperature, top_p: talk.top_p, max_tokens: talk.max_tokens, reasoning_effort: talk.effort,
      ...talk.extra}),
    event(answer, data) {
      if (data.error) { answer.error = errorOf(data); return; }
      const choice = (data.choices || [])[0] || {};
      chatDelta(answer, choice.delta || choice.message || {});
      answer.stop = choice.finish_reason || answer.stop;
      answer.ended = answer.ended || !!choice.finish_reason;
      if (data.usage || choice.usage) answer.usage = chatUsage(data.usage || choice.usage);
    },
    reply(answer, body) { this.event(answer, body); answer.ended = true; }
  },
  messages: {
    path: '/v1/messages', headers: ['x-api-key: YOUR_KEY', 'anthropic-version: 2023-06-01'],
    build: talk => ({model: talk.model, max_tokens: talk.max_tokens || 8192, system: talk.system || undefined,
      messages: talk.turns.flatMap(messagesTurn), stream: talk.stream, temperature: talk.temperature, top_p: talk.top_p,
      thinking: talk.effort && {type: talk.effort === 'none' ? 'disabled' : 'adaptive'},
      output_config: talk.effort && talk.effort !== 'none' ? {effort: talk.effort} : undefined, ...talk.extra}),
    event(answer, data) { MESSAGES[data.type]?.(answer, data); },
    reply(answer, body) {
      (body.content || []).forEach((block, at) => messagesBlock(answer, block, at));
      MESSAGES.message_delta(answer, {delta: body, usage: body.usage});
      answer.ended = true;
    }
  },
  responses: {
    path: '/v1/responses', headers: ['Authorization: Bearer YOUR_KEY'],
    build: talk => ({model: talk.model, instructions: talk.system || undefined,
      input: talk.turns.flatMap(responsesTurn), stream: talk.stream, temperature: talk.temperature, top_p: talk.top_p,
      max_output_tokens: talk.max_tokens, reasoning: talk.effort && {effort: talk.effort, summary: 'auto'},
      store: false, ...talk.extra}),
    event(answer, data) {
      if (data.type === 'error') answer.error = errorOf(data);
      else RESPONSES[String(data.type).replace(/^response\./, '')]?.(answer, data);
    },
    reply(answer, body) {
      (body.output || []).forEach((item, at) => responsesItem(answer, item, at));
      responsesEnd(answer, {response: body});
    }
  }
};

const shellQuote = text => "'" + text.replace(/'/g, "'\\''") + "'";
/** A command for any POSIX shell; what is too long for an argument (128 KiB on Linux) goes through standard input. */
function asCurl(url, headers, body) {
  const data = JSON.stringify(body, null, 2), long = data.length > 30000;
  return [`curl ${body.stream ? '-N ' : ''}${shellQuote(url)}`, "-H 'Content-Type: application/json'",
    ...headers.map(each => '-H ' + shellQuote(each)),
    long ? `--data-binary @- <<'JSON'\n${data}\nJSON` : '-d ' + shellQuote(data)].join(' \\\n  ');
}

/** Code fences in text that streams in, nothing else: ['text', s], ['open', language], ['code', s], ['close']. */
function fences() {
  let rest = '', fence = '', gap = '', middle = false, fresh = true;
  return (text, last) => {
    const ops = [];
    const emit = piece => {
      const all = gap + piece, body = all.replace(/\n+$/, ''), kind = fence ? 'code' : 'text';
      gap = all.slice(body.length);                     // line ends wait: beside a fence they say nothing
      const more = fresh && !fence ? body.replace(/^\n+/, '') : body, before = ops[ops.length - 1];
      if (!more) return;
      fresh = false;
      if (before && before[0] === kind) before[1] += more; else ops.push([kind, more]);
    };
    rest += text;
    while (rest) {
      const at = rest.indexOf('\n'), line = at < 0 ? rest : rest.slice(0, at);
      const mark = !middle && /^[ \t]*(`{3,}|~{3,})([^`]*)$/.exec(line);
      const whole = at >= 0 || last;
      if (!whole && !middle && (mark || /^[ \t]*(`{0,2}|~{0,2})$/.test(line))) break;      // may become a fence
      if (mark && !fence) {
        [fence, gap, fresh] = [mark[1], '', true];
        ops.push(['open', mark[2].trim().split(/\s/)[0]]);
      } else if (mark && mark[1].startsWith(fence) && !mark[2].trim()) {
        [fence, gap, fresh] = ['', '', true];
        ops.push(['close']);
      } else emit(at < 0 ? line : line + '\n');
      middle = at < 0;
      rest = at < 0 ? '' : rest.slice(at + 1);
    }
    return ops;
  };
}

// --- playground

const EFFORTS = ['none', 'low', 'medium', 'high', 'xhigh', 'max'];
const IMAGE_TYPES = ['image/png', 'image/jpeg', 'image/webp', 'image/gif'], IMAGE_LIMIT = 15e6;
/** What the view shows; it outlives the view, so an answer goes on while another one is looked at. */
const talk = {dialect: 'chat', model: '', system: '', stream: true, temperature: '', top_p: '', max_tokens: '',
  effort: '', extra: '', draft: '', images: [], turns: [], sent: null, raw: null, abort: null, show: null};

/** For a reload of this tab: nothing of the wire, and images only if there is room. */
function keepTalk() {
  const {sent, raw, abort, show, ...kept} = talk;
  for (const most of [1e6, 1e5, 0]) {
    const small = url => url.length <= most || !url.startsWith('data:');
    const text = JSON.stringify(kept, (key, value) => key === 'images' ? value.filter(small) : value);
    try { return sessionStorage.setItem('iflow2api.talk', text); } catch { /* full: with fewer images */ }
  }
}
function recallTalk() {
  try { Object.assign(talk, JSON.parse(sessionStorage.getItem('iflow2api.talk'))); } catch { /* private windows */ }
  for (const turn of talk.turns) if (turn.role === 'assistant') turn.finished = true;
}

/** The body as it is sent now; throws what to show where the extra JSON is none. */
function talkBody(turns) {
  const number = text => text === '' ? undefined : Number(text), extra = parseJson(talk.extra.trim() || '{}', null);
  if (!isProps(extra)) throw new Error(t('play_extra_bad'));
  return DIALECTS[talk.dialect].build({...talk, turns, extra, effort: talk.effort || undefined,
    temperature: number(talk.temperature), top_p: number(talk.top_p), max_tokens: number(talk.max_tokens)});
}

/** Sends `turns`; the answer grows in `answer`, what came over the wire in talk.raw. */
async function runTalk(turns, answer) {
  const dialect = DIALECTS[talk.dialect], body = talkBody(turns), abort = new AbortController();
  const began = performance.now(), since = () => (performance.now() - began) / 1000;
  Object.assign(answer, {model: body.model, dialect: talk.dialect, streamed: body.stream === true});
  Object.assign(talk, {sent: {dialect: talk.dialect, body}, raw: {head: '', text: ''}, abort});
  try {
    const reply = await request('play/' + talk.dialect, {body, signal: abort.signal});
    talk.raw.head = `HTTP ${reply.status}\n${[...reply.headers].map(pair => pair.join(': ')).join('\n')}`;
    const isStream = /event-stream/.test(reply.headers.get('content-type')), read = sseReader();
    const reader = reply.body.getReader(), decoder = new TextDecoder();
    for (let done = false, value; !done;) {
      ({done, value} = await reader.read());
      const text = done ? decoder.decode() : decoder.decode(value, {stream: true});
      talk.raw.text += text;
      if (isStream) for (const {data} of read(done ? text + '\n\n' : text))
        if (data !== '[DONE]') dialect.event(answer, parseJson(data, {}));
      if (answer.first_s === undefined && answer.parts.length) answer.first_s = since();
      if (talk.show) talk.show();
    }
    if (!isStream) dialect.reply(answer, parseJson(talk.raw.text, {error: {message: t('play_garbled')}}));
    else if (!answer.ended && !answer.error) answer.error = t('play_cut');
  } catch (error) {
    if (error.name === 'AbortError') answer.stopped = true;
    else answer.error = (error.status ? error.status + ': ' : '') + errorText(error);
    if (error.status) talk.raw = {head: 'HTTP ' + error.status, text: JSON.stringify(error.body, null, 2)};
  }
  Object.assign(answer, {total_s: since(), finished: true});
  talk.abort = null;
  keepTalk();
  if (talk.show) talk.show();
}

/** How a part of each kind goes into `box`: a function to call when its text has grown, and a last time. */
const PART = {
  text(box, part) {
    const feed = fences();
    let seen = 0, prose = null, code = null;
    const ops = {
      text: text => text.split(/\n{2,}/).forEach((piece, at) => {      // of paragraphs only the last is laid out anew
        if (at || !prose) box.append(prose = el('p', {class: 'play-text', dir: 'auto'}));
        prose.append(piece);
      }),
      open(language) {
        const mine = code = el('code'), name = language || t('play_code');
        box.append(codeBox(name, mine, () => mine.textContent));
      },
      code: text => code.append(text), close() { prose = null; }
    };
    return last => {
      for (const [op, text] of feed(part.text.slice(seen), last)) ops[op](text);
      seen = part.text.length;
    };
  },
  thinking(box, part) {
    const text = el('div', {class: 'play-text', dir: 'auto'}), title = el('span');
    let seen = 0;
    part.began = part.began || performance.now();
    box.append(el('details', {class: 'play-fold'}, el('summary', title), text));
    return (last, isDone) => {
      text.append(part.text.slice(seen));
      seen = part.text.length;
      if (last && !isDone && !part.took_s) part.took_s = (performance.now() - part.began) / 1000;
      title.textContent = !last ? t('play_thinks') :
        part.took_s > 0.05 ? t('play_thought_for', {time: fmt.seconds(part.took_s)}) : t('play_thought');
    };
  },
  call(box, part) {
    const name = el('b', {class: 'mono'}), code = el('code');
    const fold = el('details', {class: 'play-fold', open: true}, el('summary', t('play_call'), ' ', name),
      codeBox(t('play_arguments'), code, () => code.textContent));
    let seen = 0;
    box.append(fold);
    return (last, isDone) => {
      name.textContent = part.name || '…';
      code.append(part.text.slice(seen));
      seen = part.text.length;
      if (!isDone) return;
      code.textContent = parseJson(part.text) === undefined ? part.text : JSON.stringify(parseJson(part.text), null, 2);
      fold.append(field({label: t('play_result'), hint: t('play_result_hint'), input: el('textarea', {rows: 2,
        class: 'mono', value: part.result || '', on: {input() { part.result = this.value; keepTalk(); }}})}));
    };
  }
};
const codeBox = (name, code, text) => el('div', {class: 'play-code'},
  el('div', {class: 'spread'}, el('span', {class: 'muted'}, name), copyButton(text)),
  el('pre', {tabindex: 0, role: 'group', 'aria-label': name}, code));

function metaLine(turn) {
  const {usage, first_s: first, total_s: total} = turn, made = usage && usage.output;
  const spent = turn.streamed && first !== undefined ? total - first : total;
  const count = (key, n) => n ? t(key, {n: fmt.number(n)}) : null;
  return el('p', {class: 'play-meta'}, [clean(turn.model), t('play_dialect_' + turn.dialect),
    turn.streamed && first !== undefined && t('play_first', {time: fmt.seconds(first)}),
    t('play_total', {time: fmt.seconds(total)}),
    usage && t('play_tokens', {input: fmt.number(usage.input || 0), output: fmt.number(made || 0)}),
    usage && count('play_cached', usage.cached), usage && count('play_reasoning', usage.reasoning),
    made > 1 && spent > 0.001 && !turn.stopped && count('play_speed', Math.round(made / spent)),
    turn.stop && !/^(stop|end_turn|completed)$/.test(turn.stop) && t('play_stop_reason', {reason: clean(turn.stop)})]
    .filter(Boolean).map(fact => el('span', {text: fact})));
}

/** One answer: grow() puts in what has come since, and the rest when it is over. */
function answerNode(turn, again) {
  const parts = el('div', {class: 'play-parts'}), foot = el('div', {class: 'stack tight'}), made = [];
  const wait = el('p', {class: 'muted play-wait', text: t('play_waiting')});
  const note = (key, css = 'muted') => foot.append(el('p', {class: css, text: t(key)}));
  let isOver = false;
  function grow() {
    if (isOver) return;
    turn.parts.forEach((part, at) => {
      made[at] = made[at] || PART[part.kind](parts, part);
      made[at](turn.finished || at < turn.parts.length - 1, turn.finished);
    });
    if (!turn.parts.length && !turn.finished) parts.append(wait); else wait.remove();
    if (!(isOver = turn.finished)) return;
    if (turn.stopped) note('play_stopped');
    else if (!turn.error && !turn.parts.length) note('play_empty');
    const failed = turn.error && [el('b', t('play_error')), ' ', clean(turn.error)];
    if (failed) foot.append(el('p', {class: 'note bad', role: 'alert'}, failed));
    foot.append(el('div', {class: 'spread'}, metaLine(turn), el('div', {class: 'row play-acts'},
      textOf(turn, 'text') ? copyButton(() => textOf(turn, 'text')) : null, button(t('play_again'), again, 'small'))));
  }
  return {node: el('article', {class: 'play-answer', 'aria-label': t('play_answer')}, parts, foot), grow};
}

function userNode(turn, edit) {
  const bubble = el('div', {class: 'play-bubble'},
    turn.images.length > 0 && el('div', {class: 'row'}, turn.images.map(url => thumbnail(url))),
    turn.text && el('p', {class: 'play-text', dir: 'auto', text: turn.text}));
  const acts = el('div', {class: 'row play-acts'}, turn.text && copyButton(() => turn.text),
    button(t('play_edit'), edit, 'small'));
  return {grow() {}, node: el('article', {class: 'play-user', 'aria-label': t('play_you')}, bubble, acts)};
}

/** Pictures from elsewhere are named, not loaded. */
const thumbnail = (url, remove) => el('span', {class: 'play-thumb'},
  url.startsWith('data:') ? el('img', {src: url, alt: t('play_image')}) : foreign(url.replace(/^https?:../, ''), 'mono'),
  remove && iconButton('close', t('play_remove_image'), remove));

const pictures = files => Promise.all([...files].map(file => new Promise(done => {
  const wrong = !IMAGE_TYPES.includes(file.type) ? 'play_image_type' : file.size > IMAGE_LIMIT && 'play_image_large';
  if (wrong) return done(toast(t(wrong, {name: file.name}), 'bad'));
  const reader = new FileReader();
  reader.onload = reader.onerror = () => done(reader.result);
  reader.readAsDataURL(file);
}))).then(urls => urls.filter(Boolean));

/** A text field with a list that is searched while one types; any other text is fine, too. */
function modelPicker(value, onPick) {
  const named = {id: uid(), 'aria-label': t('play_model')};
  const list = el('ul', {...named, class: 'picker-list', role: 'listbox', hidden: true});
  let models = [], active = -1;
  const keys = {ArrowDown: () => list.hidden ? open('') : move(active + 1),
    ArrowUp: () => list.hidden ? open('') : move(active < 0 ? -2 : active - 1),
    Enter: () => pick(active < 0 || list.hidden ? entry.value.trim() : list.children[active].dataset.id),
    Escape() { entry.value = value; show(false); }};
  const entry = input({...named, id: uid(), class: 'mono', role: 'combobox', 'aria-expanded': 'false',
    'aria-autocomplete': 'list', 'aria-controls': list.id, placeholder: t('play_model'), value, on: {
      focus() { entry.select(); open(''); }, click() { if (list.hidden) open(''); },
      input: () => open(entry.value), blur: () => pick(entry.value.trim()), keydown(event) {
        if (!keys[event.key] || event.isComposing) return;
        event.preventDefault();
        keys[event.key]();
      }}});

  function open(text) {
    const asked = text.toLowerCase().split(/\s+/), textOf = model => `${model.id} ${model.provider}`.toLowerCase();
    const found = models.filter(model => asked.every(word => textOf(model).includes(word))).slice(0, 200);
    list.replaceChildren(...found.map(model => {
      const facts = [model.provider, model.context && fmt.tokens(model.context), model.vision && t('play_sees')];
      return el('li', {role: 'option', id: uid(), data: {id: model.id}, on: {mousedown(event) {
        event.preventDefault();
        pick(model.id);
      }}}, foreign(model.id, 'mono'), el('span', {class: 'muted'}, facts.filter(Boolean).join(' · ')));
    }));
    show(found.length > 0);
  }
  function show(on) {
    list.hidden = !on;
    entry.setAttribute('aria-expanded', on);
    move(-1);
  }
  function move(to) {
    const rows = [...list.children];
    active = to < -1 ? rows.length - 1 : to >= rows.length ? 0 : to;
    rows.forEach((row, at) => row.setAttribute('aria-selected', at === active));
    entry.setAttribute('aria-activedescendant', active < 0 ? '' : rows[active].id);
    if (active >= 0) rows[active].scrollIntoView({block: 'nearest'});
  }
  function pick(id) {
    entry.value = id;
    show(false);
    if (id !== value) onPick(value = id);
  }
  return {entry, node: el('div', {class: 'picker'}, entry, list), fill(found, chosen) {
    models = found;
    if (!entry.value) entry.value = value = chosen || '';
  }};
}

function talkSettings(changed) {
  const keep = name => ({input() { talk[name] = this.value; changed(); }});
  const area = (name, props) => field({label: t('play_' + name), hint: name === 'extra' && t('play_extra_hint'),
    input: el('textarea', {...props, value: talk[name], on: keep(name)})});
  const number = (name, max, step) => field({label: t('play_' + name), input: el('input', {type: 'number', min: 0, max,
    step, placeholder: t('play_default'), value: talk[name], on: keep(name)})});
  const effort = el('select', {value: talk.effort, on: keep('effort')}, option('', t('play_default')),
    EFFORTS.map(name => option(name, name === 'none' ? t('play_effort_none') : name)));
  const stream = el('input', {type: 'checkbox', checked: talk.stream, on: {change() {
    talk.stream = this.checked;
    changed();
  }}});
  return el('details', {class: 'card play-settings', open: innerWidth > 1200}, el('summary', t('play_settings')),
    el('div', {class: 'stack'}, area('system', {rows: 4}), el('div', {class: 'play-pair'},
      number('temperature', 2, 0.1), number('top_p', 1, 0.05), number('max_tokens', null, 1),
      field({label: t('play_effort'), input: effort})),
    field({label: t('play_stream'), input: stream}),
    area('extra', {rows: 3, class: 'mono', spellcheck: 'false', placeholder: '{"seed": 7}'})));
}

/** What the tabs beside the conversation show: the request that waits to be sent, else the last one. */
function talkSheet(tab, turns) {
  const isNew = !talk.sent || turns !== talk.turns, key = isNew ? 'play_unsent' : 'play_sent';
  const sheet = (title, text, whole = text) => codeBox(title, el('code', text), () => whole);
  if (tab === 'raw') return talk.raw ? sheet(t('play_raw'), `${talk.raw.head}\n\n${talk.raw.text}`)
    : el('p', {class: 'empty', text: t('play_raw_none')});
  const {dialect, body} = isNew ? {dialect: talk.dialect, body: talkBody(turns)} : talk.sent;
  const {path, headers} = DIALECTS[dialect], address = location.origin + BASE.replace('/admin/api/', path);
  if (tab === 'curl') return sheet(`${t(key)}. ${t('play_curl_hint')}`, asCurl(address, headers, body));
  const short = (name, value) => typeof value === 'string' && value.length > 400 && /^(data:|[\w+/]{200})/.test(value) ?
    `${value.slice(0, 60)}… (${fmt.number(value.length)})` : value;
  return sheet(`${t(key)}: POST ${path}`, JSON.stringify(body, short, 2), JSON.stringify(body, null, 2));
}

VIEWS.playground = {show(root) {
  if (!talk.turns.length && !talk.draft) recallTalk();
  let nodes = [], tab = 'chat', frame = 0, said = 0, saidAt = 0, rawSeen = 0, keeping = 0;
  const log = el('div', {class: 'play-log', tabindex: '0', role: 'region', 'aria-label': t('play_tab_chat')});
  const voice = el('div', {class: 'visually-hidden', role: 'log', 'aria-live': 'polite'});
  const sheet = el('div', {class: 'play-sheet', hidden: true}), thumbs = el('div', {class: 'row'});
  const text = el('textarea', {rows: 2, 'aria-label': t('play_message'), placeholder: t('play_placeholder'),
    value: talk.draft, on: {input() { talk.draft = text.value; changed(); }, keydown(event) {
      if (event.key === 'Escape' && talk.abort) talk.abort.abort();
      const isTyping = event.isComposing || event.keyCode === 229;       // Enter ends a word in an input method
      if (event.key !== 'Enter' || event.shiftKey || isTyping) return;
      event.preventDefault();
      if (!talk.abort) submit();
    }, paste(event) {
      if (event.clipboardData.files.length) { event.preventDefault(); attach(event.clipboardData.files); }
    }}});
  const file = el('input', {type: 'file', accept: IMAGE_TYPES.join(), multiple: true, hidden: true,
    on: {async change() { await attach(file.files); file.value = ''; }}});
  const send = el('button', {type: 'submit'}), clear = button(t('play_clear'), forget, 'quiet small', 'trash');
  const picker = modelPicker(talk.model, id => { talk.model = id; changed(); });
  const composer = el('form', {class: 'play-composer', on: {submit(event) {
    event.preventDefault();
    if (talk.abort) talk.abort.abort(); else submit();
  }}}, thumbs, text, el('div', {class: 'spread'}, el('div', {class: 'row'},
    button(t('play_attach'), () => file.click(), 'quiet small', 'image'),
    button(t('play_url'), askUrl, 'quiet small', 'link'), clear, file), send));
  const hasImage = ({dataTransfer: {types}}) => types.includes('Files') || types.includes('text/uri-list');
  const drop = {dragleave() { composer.classList.remove('drop'); }, dragover(event) {
    if (!hasImage(event)) return;
    event.preventDefault();
    composer.classList.add('drop');
  }, drop(event) {
    const {files} = event.dataTransfer, url = event.dataTransfer.getData('text/uri-list').split(/\r?\n/)[0];
    if (hasImage(event)) event.preventDefault();
    composer.classList.remove('drop');
    if (files.length) attach(files); else if (/^https?:/.test(url)) { talk.images.push(url); redraw(); }
  }};
  const dialects = segments(t('play_dialect'), choicesOf('play_dialect_', Object.keys(DIALECTS)), talk.dialect, key => {
    talk.dialect = key;
    changed();
  });
  root.append(el('div', {class: 'play', on: drop}, el('div', {class: 'play-main card'},
    el('div', {class: 'spread'}, picker.node, dialects),
  segments(t('play_shown'), choicesOf('play_tab_', ['chat', 'request', 'raw', 'curl']), tab,
    key => { tab = key; showTab(); }), log, sheet, composer, voice), talkSettings(changed)));

  const waiting = () => talk.draft.trim() || talk.images.length ?
    [...talk.turns, {role: 'user', text: talk.draft, images: talk.images}] : talk.turns;
  function changed() {
    clearTimeout(keeping);
    keeping = setTimeout(keepTalk, 400);
    if (tab !== 'chat') showTab();
  }
  function showTab() {
    [log.hidden, sheet.hidden, rawSeen] = [tab !== 'chat', tab === 'chat', talk.raw ? talk.raw.text.length : 0];
    if (tab === 'chat') return void (log.scrollTop = log.scrollHeight);
    try { sheet.replaceChildren(talkSheet(tab, waiting())); } catch (error) {
      sheet.replaceChildren(el('p', {class: 'note bad', role: 'alert', text: error.message}));
    }
  }

  /** Sentences that are complete are read out every few seconds, the rest at the end. */
  function speak(answer) {
    const whole = textOf(answer, 'text'), now = performance.now();
    const end = answer.finished ? whole.length : whole.search(/[^.!?。！？\n]*$/);
    if (end <= said || !answer.finished && now - saidAt < 4000) return;
    voice.append(el('p', whole.slice(said, end)));
    [said, saidAt] = [end, now];
  }
  /** At most once in a frame, however fast the answer comes. */
  talk.show = () => {
    frame = frame || requestAnimationFrame(() => {
      const answer = talk.turns[talk.turns.length - 1], node = nodes[nodes.length - 1];
      frame = 0;
      if (!answer || !node) return;
      const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60, code = sheet.querySelector('code');
      node.grow();
      if (isAtEnd) log.scrollTop = log.scrollHeight;
      if (tab === 'raw') if (rawSeen && code) code.append(talk.raw.text.slice(rawSeen)); else showTab();
      if (talk.raw) rawSeen = talk.raw.text.length;
      if (answer.role === 'assistant') speak(answer);
      buttons();
    });
  };
  function buttons() {
    const isBusy = Boolean(talk.abort);
    clear.disabled = isBusy || !talk.turns.length;
    if (send.dataset.busy === String(isBusy)) return;
    send.dataset.busy = isBusy;
    send.className = 'btn ' + (isBusy ? 'danger' : 'primary');
    send.replaceChildren(icon(isBusy ? 'stop' : 'play'), t(isBusy ? 'play_stop' : 'play_send'));
  }
  function redraw() {
    nodes = talk.turns.map((turn, at) => turn.role === 'user' ? userNode(turn, () => edit(at)) :
      answerNode(turn, () => talk.abort || ask(talk.turns.slice(0, at))));
    log.replaceChildren(...nodes.map(each => each.node));
    nodes.forEach(each => each.grow());
    if (!nodes.length) log.append(el('p', {class: 'empty', text: t('play_start')}));
    log.scrollTop = log.scrollHeight;
    thumbs.replaceChildren(...talk.images.map((url, at) => thumbnail(url, () => {
      talk.images.splice(at, 1);
      redraw();
    })));
    thumbs.hidden = !talk.images.length;
    buttons();
    changed();
  }

  function ask(turns) {
    if (!talk.model) return picker.entry.focus(), toast(t('play_no_model'), 'bad');
    try { talkBody(turns); } catch (error) { return toast(error.message, 'bad'); }
    const answer = newAnswer();
    if (turns.length > talk.turns.length) Object.assign(talk, {draft: text.value = '', images: []});
    talk.turns = [...turns, answer];
    [said, saidAt] = [0, performance.now()];
    voice.replaceChildren(el('p', t('play_waiting')));
    runTalk(turns, answer);
    redraw();
  }
  function submit() {
    const turns = waiting(), last = turns[turns.length - 1];
    const isReady = last && (last.role === 'user' || partsOf(last, 'call').some(call => call.result));
    if (isReady) ask(turns); else text.focus();
  }
  function edit(at) {
    if (talk.abort) return;
    const {text: draft, images} = talk.turns[at];
    Object.assign(talk, {draft, images, turns: talk.turns.slice(0, at)});
    text.value = draft;
    redraw();
    text.focus();
  }
  async function forget() {
    if (!await confirmBox(t('play_clear_sure'), {danger: true, action: t('play_clear')})) return;
    Object.assign(talk, {turns: [], sent: null, raw: null});
    redraw();
    text.focus();
  }
  async function attach(files) {
    talk.images = [...talk.images, ...await pictures(files)];
    redraw();
  }
  function askUrl() {
    const url = input({type: 'url', required: true, placeholder: 'https://…/image.png'});
    const box = field({label: t('play_url_label'), hint: t('play_url_hint'), input: url});
    dialog({title: t('play_url'), body: box, actions: [{label: t('play_add'), kind: 'primary', run() {
      if (!/^(https?:\/\/|data:image\/)/.test(url.value)) return box.fail(t('invalid')), false;
      talk.images.push(url.value);
      redraw();
    }}]});
  }

  api('models').then(({data, default_model: usual}) => {
    talk.model = talk.model || usual || '';
    picker.fill(data, talk.model);
  }).catch(error => error.name === 'AbortError' || toast(errorText(error), 'bad'));
  redraw();
  addEventListener('pagehide', keepTalk);
  return () => {
    cancelAnimationFrame(frame);
    clearTimeout(keeping);
    keepTalk();
    removeEventListener('pagehide', keepTalk);
    talk.show = null;
  };
}};
"""

#: `charts.series(root)`, for the overview and the usage.
# language=JavaScript
_JS_CHARTS = r"""
// --- charts: ticks (pure, as above)

/** Nice steps from 0 to at least `max`, about `count` of them: 1, 2 or 5 times a power of ten. */
function niceTicks(max, count = 4) {
  const top = Math.max(max, 1), power = 10 ** Math.floor(Math.log10(top / count));
  const step = Math.max(1, [1, 2, 5, 10].find(each => each * power * count >= top) * power);
  return Array.from({length: Math.ceil(top / step) + 1}, (_, at) => at * step);
}

const CLOCK = {hour: '2-digit', minute: '2-digit', hour12: false}, DATE = {month: 'short', day: 'numeric'};
const SPANS = {                                    // what a step is counted in, and how many may lie between two labels
  hour: {unit: at => new Date(at * 1000).getMinutes(), strides: [1, 2, 5, 10, 15, 30], label: CLOCK},
  day: {unit: at => new Date(at * 1000).getHours(), strides: [1, 2, 3, 4, 6, 12], label: CLOCK},
  month: {unit: (at, index, count) => count - 1 - index, strides: [1, 2, 3, 5, 7, 10, 15], label: DATE}};
/** Indexes of the steps that get a label: round times, no more than `room` of them where that can be had. */
function timeTicks(times, span, room) {
  const {unit, strides} = SPANS[span];
  const stride = strides.find(each => times.length / each <= room) || strides[strides.length - 1];
  return times.map((_, at) => at).filter(at => unit(times[at], at, times.length) % stride === 0);
}
// --- charts: drawing

/** A day is the server's: its noon has the same date nearly everywhere. */
const timeLabel = (at, span, style = SPANS[span].label) => moment(span === 'month' ? at + 43200 : at, style);

/** Buttons of which one is pressed; `choices`: {key: text}. */
function segments(label, choices, value, onPick) {
  const press = key => buttons.forEach(each => each.setAttribute('aria-pressed', each.dataset.key === key));
  const buttons = Object.entries(choices).map(([key, text]) => el('button', {type: 'button', text, data: {key},
    on: {click() { press(key); onPick(key); }}}));
  press(value);
  return el('div', {class: 'tabs', role: 'group', 'aria-label': label}, buttons);
}
const choicesOf = (prefix, keys) => Object.fromEntries(keys.map(key => [key, t(prefix + key)]));

const dot = series => el('i', {class: 'chart-dot ' + series.color});

/** Stacked columns over time.  One stop for the keyboard: arrows go through the steps, as on a slider. */
function columnChart(box) {
  const art = el('div', {class: 'chart-art', 'aria-hidden': 'true'});
  const tip = el('div', {class: 'chart-tip', hidden: true});
  const steps = {ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -6, PageUp: 6, Home: -99, End: 99};
  const plot = el('div', {class: 'chart-plot', role: 'slider', tabindex: 0, 'aria-valuemin': 0, on: {
    keydown(event) {
      if (!shown || !steps[event.key] && event.key !== 'Escape') return;
      event.preventDefault();
      point(event.key === 'Escape' ? -1 : keep((at < 0 ? shown.points.length - 1 : at) + steps[event.key]));
    },
    pointermove(event) {
      if (shown) point(keep(Math.floor((event.clientX - plot.getBoundingClientRect().left - place.left) / place.slot)));
    },
    focus() { if (shown && at < 0 && plot.matches(':focus-visible')) point(shown.points.length - 1); },
    pointerleave() { if (shown) point(-1); }, blur() { if (shown) point(-1); }}}, art, tip);
  const table = el('div', {class: 'visually-hidden'}), resized = new ResizeObserver(() => shown && draw());
  const keep = index => Math.min(Math.max(index, 0), shown.points.length - 1);
  let shown = null, at = -1, place = null;
  box.append(plot, table);
  resized.observe(plot);

  const when = index => timeLabel(shown.points[index].at, shown.span,
    shown.span === 'day' ? {...DATE, ...CLOCK} : undefined);
  const visible = () => shown.series.filter(each => !each.hidden);
  const sum = index => visible().reduce((all, each) => all + each.values[index], 0);

  function draw() {
    const {points, span} = shown, width = Math.max(plot.clientWidth, 200), left = 50, top = 8, height = 200, base = 176;
    const ticks = niceTicks(Math.max(...points.map((_, index) => sum(index)))), max = ticks[ticks.length - 1];
    const slot = (width - left - 4) / points.length, bar = Math.max(1, Math.min(28, slot * 0.74)).toFixed(1);
    const y = value => (base - (base - top) * value / max).toFixed(1), x = index => left + slot * (index + 0.5);
    const band = svg('rect', {class: 'chart-band', y: top, height: base - top, width: slot});
    const foot = points.map(() => 0);
    const column = (value, index) => {
      const from = foot[index], to = foot[index] += value;
      return value ? `M${(x(index) - bar / 2).toFixed(1)} ${y(from)}V${y(to)}h${bar}V${y(from)}z` : '';
    };
    const times = timeTicks(points.map(each => each.at), span, (width - left) / 66);
    art.replaceChildren(svg('svg', {width, height}, ticks.map(value => [
      svg('line', {class: 'chart-line', x1: left, x2: width, y1: y(value), y2: y(value)}),
      svg('text', {x: left - 8, y: Number(y(value)) + 4, 'text-anchor': 'end'}, fmt.tokens(value))]), band,
    visible().map(each => svg('path', {class: 'chart-bar ' + each.color, d: each.values.map(column).join('')})),
    times.map(index => svg('text', {x: x(index) > width - 28 ? width : x(index), y: height - 6,
      'text-anchor': x(index) > width - 28 ? 'end' : 'middle'}, timeLabel(points[index].at, span))),
    !foot.some(Boolean) && svg('text', {x: width / 2, y: height / 2, 'text-anchor': 'middle'}, t('chart_none'))));
    place = {left, slot, width, band};
    plot.setAttribute('aria-label', shown.label);
    plot.setAttribute('aria-valuemax', points.length - 1);
    point(Math.min(at, points.length - 1));
  }

  /** Marks a step and says what is in it; -1: none. */
  function point(index) {
    const now = index < 0 ? shown.points.length - 1 : index;
    const parts = visible().filter(each => each.values[now]).reverse();
    const line = (name, value, tag) => el('div', {class: 'spread'}, el(tag, name), el(tag, fmt.number(value)));
    at = index;
    plot.setAttribute('aria-valuenow', now);
    plot.setAttribute('aria-valuetext', `${when(now)}: ${fmt.number(sum(now))}` +
      parts.map(each => `; ${each.name} ${fmt.number(each.values[now])}`).join(''));
    tip.hidden = index < 0;
    place.band.setAttribute('visibility', index < 0 ? 'hidden' : 'visible');
    if (index < 0) return;
    const x = place.left + place.slot * index;
    place.band.setAttribute('x', x);
    tip.replaceChildren(line(when(index), sum(index), 'b'), ...parts.map(each =>
      line([dot(each), el('span', each.name)], each.values[index], 'span')));
    const right = x + place.slot + 8, isLeft = right + tip.offsetWidth > place.width;
    tip.style.left = Math.max(0, isLeft ? x - 8 - tip.offsetWidth : right) + 'px';
  }

  /** {points: [{at}], span, label, series: [{name, color, values, hidden}]} */
  function show(what) {
    shown = what;
    draw();
    const rows = what.points.map((_, index) => index).filter(index => what.series.some(each => each.values[index]));
    table.replaceChildren(el('table', el('caption', what.label), el('thead', el('tr',
      [t('chart_time'), ...what.series.map(each => each.name)].map(name => el('th', {scope: 'col'}, name)))),
    el('tbody', rows.map(index => el('tr', el('th', {scope: 'row'}, when(index)),
      what.series.map(each => el('td', fmt.number(each.values[index]))))))));
  }
  return {show, close: () => resized.disconnect()};
}

const METRICS = {tokens: row => row.input + row.output, requests: row => row.requests, errors: row => row.errors};
const charts = {
  /** Tokens, requests or errors over time.  `options`: {span, by, fixed}; fixed: whoever asked has the choice of `by`.
      Gives a function that ends it, which bears `by(name)`. */
  series(root, {span = 'day', by = 'model', fixed} = {}) {
    let metric = 'tokens';
    const note = el('p', {class: 'error', role: 'status'}), colors = new Map(), hidden = new Set();
    const legend = el('div', {class: 'chart-legend', role: 'group', 'aria-label': t('chart_legend')});
    const choose = (name, prefix, keys, value, pick) => segments(t(name), choicesOf(prefix, keys), value, pick);
    const box = el('section', {class: 'card chart'}, el('div', {class: 'spread'}, el('h2', t('chart_title')),
      el('div', {class: 'row'},
        choose('chart_metric', 'chart_', Object.keys(METRICS), metric, key => { metric = key; show(); }),
        !fixed && choose('chart_by', 'chart_by_', ['model', 'key', 'provider'], by, group),
        choose('chart_span', 'chart_', Object.keys(SPANS), span, key => { span = key; fetchAll(); }))));
    const chart = columnChart(box), isRest = name => name === '…';
    let data = null, turn = 0, timer = 0, soon = 0;
    box.append(legend, note);
    root.append(box);

    function colorOf(name) {                       // a name keeps its colour as long as the chart is there
      if (!colors.has(name)) colors.set(name, isRest(name) ? 'series-rest' : 'series-' + (colors.size % 8 + 1));
      return colors.get(name);
    }
    function show() {
      if (!data) return;
      const sums = new Map(), value = (point, name) => point.groups[name] ? METRICS[metric](point.groups[name]) : 0;
      for (const point of data.points)
        for (const name in point.groups) sums.set(name, (sums.get(name) || 0) + value(point, name));
      const order = [...sums].sort((a, b) => isRest(a[0]) - isRest(b[0]) || b[1] - a[1]);
      const series = order.map(([name]) => ({name: isRest(name) ? t('chart_rest') : clean(name) || t('chart_nameless'),
        color: colorOf(name), hidden: hidden.has(name), values: data.points.map(point => value(point, name))}));
      chart.show({points: data.points, span: data.span, series, label: t('chart_label', {metric: t('chart_' + metric),
        by: t('chart_by_' + by), span: t('chart_' + data.span)})});
      const held = legend.contains(document.activeElement) ? document.activeElement.dataset.name : null;
      legend.replaceChildren(...order.map(([name, total], at) => el('button', {type: 'button', title: t('chart_toggle'),
        'aria-pressed': String(!hidden.has(name)), data: {name}, on: {click() {
          if (!hidden.delete(name)) hidden.add(name);
          show();
        }}}, dot(series[at]), el('span', series[at].name), el('b', fmt.tokens(total)))));
      if (held !== null) for (const each of legend.children) if (each.dataset.name === held) each.focus();
    }
    async function fetchAll() {
      const mine = ++turn;
      clearTimeout(timer);
      timer = setTimeout(fetchAll, 60000);
      try {
        const found = await api(`series?span=${span}&by=${by}`);
        if (mine !== turn) return;
        data = found;
        note.textContent = '';
        show();
      } catch (error) { if (mine === turn) note.textContent = errorText(error); }
    }
    function group(name) {
      by = name;
      colors.clear();
      hidden.clear();
      fetchAll();
    }
    const stop = live.on('request', () => { soon = soon || setTimeout(() => { soon = 0; fetchAll(); }, 1500); });
    fetchAll();
    const end = () => {
      turn = NaN;
      [timer, soon].forEach(clearTimeout);
      stop();
      chart.close();
    };
    return Object.assign(end, {by: group});
  }
};
"""

# language=JavaScript
_JS_USAGE = r"""
// --- usage

VIEWS.usage = {show(root) {
  const now = {days: '30', by: 'model'}, csv = el('a', {class: 'btn', download: ''}, icon('download'), t('usage_csv'));
  const table = el('div', {class: 'stack'}), plot = el('div');
  const days = el('select', {'aria-label': t('usage_days'), value: now.days, on: {change() {
    now.days = days.value;
    fetchAll();
  }}}, ['1', '7', '30', '90', '365'].map(count => option(count, t('usage_days_' + count))));
  const by = segments(t('usage_by'), choicesOf('usage_by_', ['model', 'key', 'provider', 'day']), now.by, key => {
    now.by = key;
    if (key !== 'day') stop.by(key);
    fetchAll();
  });
  let turn = 0;
  root.append(plot, el('section', {class: 'card usage'},
    el('div', {class: 'spread'}, by, el('div', {class: 'row'}, days, csv)), table));
  const stop = charts.series(plot, {span: 'month', fixed: true});

  const column = (key, render) => ({key, label: t('usage_' + key), align: 'end', render});
  const tokens = key => column(key, row => el('span', {title: fmt.number(row[key])},
    (row.estimated && /put/.test(key) ? '~' : '') + fmt.tokens(row[key] || 0)));
  const isPriced = row => row.cost !== null && row.cost !== undefined;
  const columns = priced => [{key: 'name', label: t('usage_by_' + now.by), css: 'break',
    render: row => row.sum ? t('usage_sum') : foreign(row.name || t('chart_nameless'), 'mono')},
  column('requests', row => fmt.number(row.requests)),
  column('errors', row => row.errors ? badge(fmt.number(row.errors), 'bad') : '0'),
  ...['input', 'output', 'cached', 'reasoning'].map(tokens),
  ...['first_s', 'total_s'].map(key => column(key, row => fmt.seconds(row[key]))),
  ...(priced ? [column('cost', row => isPriced(row) ? row.cost.toFixed(row.cost < 1 ? 4 : 2) : '–')] : [])];

  async function fetchAll() {
    const mine = ++turn, query = `days=${now.days}&by=${now.by}`;
    csv.href = `${BASE}usage.csv?${query}`;
    await load(table, api('usage?' + query), ({rows, total, enabled}) => {
      if (mine !== turn) return;
      const priced = rows.some(isPriced), hints = [rows.some(row => row.estimated) && 'usage_estimated',
        priced ? 'usage_cost_hint' : rows.length && 'usage_no_prices'].filter(Boolean);
      if (enabled === false) table.append(el('p', {class: 'note', text: t('usage_off')}));
      table.append(fill(dataTable({columns: columns(priced), empty: t('usage_none'), label: t('usage_by_' + now.by),
        rows: rows.length > 1 ? [...rows, {...total, sum: true}] : rows}), {class: rows.length > 1 && 'usage-sum'}, []),
      ...hints.map(key => el('p', {class: 'hint', text: t(key)})));
    });
  }
  fetchAll();
  return () => { turn = -1; stop(); };
}};
"""

# language=JavaScript
_JS_CLIENTS = r"""
// --- client setup

const SHELLS = {bash: 'macOS · Linux', fish: 'fish', powershell: 'PowerShell', cmd: 'cmd'};
const HINTS = {json: 'clients_file', toml: 'clients_file', yaml: 'clients_file'};
const setup = {client: '', model: '', shell: /Win/.test(navigator.platform) ? 'powershell' : 'bash'};

/** Blocks that say the same for several shells follow each other: they become one with a choice of the shell. */
function groupBlocks(blocks) {
  const groups = [];
  for (const block of blocks) {
    const last = groups[groups.length - 1] || [{}], isNew = last.every(each => each.language !== block.language);
    if (SHELLS[block.language] && SHELLS[last[0].language] && isNew) last.push(block); else groups.push([block]);
  }
  return groups;
}

VIEWS.clients = {show(root, args) {
  const names = el('div', {class: 'clients-names', role: 'group', 'aria-label': t('clients_list')});
  const select = el('select', {class: 'clients-select', 'aria-label': t('clients_list'),
    on: {change: () => choose(select.value)}});
  const picker = modelPicker(setup.model, model => { setup.model = model; fetchAll().catch(fail); });
  const pane = el('div', {class: 'stack'}), address = el('code', {class: 'mono'});
  const fail = error => toast(errorText(error), 'bad');
  let found = null, turn = 0;
  setup.client = args[0] || setup.client;
  root.append(el('section', {class: 'card clients'}, el('div', select, names), el('div', {class: 'stack'},
    el('div', {class: 'field'}, el('label', {for: picker.entry.id}, t('clients_model')), picker.node),
    el('p', {class: 'hint'}, t('clients_address') + ' ', address), pane)));

  function choose(id) {
    setup.client = id;
    history.replaceState(null, '', '#' + (here = 'clients/' + id));
    draw();
  }
  function blockNode(group) {
    const shown = group.find(block => block.language === setup.shell) || group[0], code = el('code', shown.text);
    const shells = Object.fromEntries(group.map(block => [block.language, SHELLS[block.language]]));
    const title = pick(shown.title), isPlain = title === shown.language, hint = HINTS[shown.language];
    if (shown.language === 'text') return codeBox(title, code, () => shown.text);
    return el('div', {class: 'stack tight'}, el('h3', isPlain ? t('clients_terminal') : title),
      (isPlain || hint) && el('p', {class: 'hint'}, t(isPlain ? 'clients_window' : hint)),
      group.length > 1 && segments(t('clients_shell'), shells, shown.language, language => {
        setup.shell = language;
        draw();
        $(`[data-key=${language}]`, pane).focus();
      }), codeBox(shown.language, code, () => shown.text));
  }
  function draw() {
    const client = found.data.find(each => each.id === setup.client) || found.data[0];
    const groups = groupBlocks(client.blocks), isForm = groups.some(group => group[0].language === 'text');
    const link = view => el('a', {href: '#' + view}, t('view_' + view));
    const step = (title, ...body) => el('li', el('h2', title), ...body), held = names.contains(document.activeElement);
    names.replaceChildren(...found.data.map(each => el('button', {type: 'button', text: each.title,
      'aria-current': each === client && 'true', on: {click: () => choose(each.id)}})));
    if (held) $('[aria-current]', names).focus();
    select.replaceChildren();
    fill(select, {value: client.id}, found.data.map(each => option(each.id, each.title)));
    address.textContent = found.base_url;
    pane.replaceChildren(el('ol', {class: 'clients-steps'},
      found.needs_key && step(t('clients_key'), el('p', t('clients_key_hint'), ' ', link('keys'))),
      step(t('clients_connect', {client: client.title}), el('p', t(isForm ? 'clients_form' : groups.length > 1 ?
        'clients_either' : 'clients_copy') + (found.needs_key ? '' : ' ' + t('clients_no_key'))),
      groups.map(blockNode)),
      step(t('clients_try'), el('p', t('clients_try_hint'), ' ', link('overview')))));
  }
  async function fetchAll() {
    const mine = ++turn, answer = await api('clients?model=' + encodeURIComponent(setup.model));
    if (mine !== turn) return;
    [found, setup.model] = [answer, setup.model || answer.model];
    draw();
  }
  load(pane, Promise.all([fetchAll(), api('models')]), ([, models]) => {
    picker.fill(models.data, setup.model);
    draw();
  });
  return () => { turn = NaN; };
}};
"""

_TEXTS_PLAY: Dict[str, Tuple[str, str]] = {
    "play_model": ("模型", "Model"), "play_sees": ("可看图", "sees images"), "play_dialect": ("接口格式", "API"),
    "play_dialect_chat": ("Chat", "Chat"), "play_dialect_messages": ("Messages", "Messages"),
    "play_dialect_responses": ("Responses", "Responses"), "play_shown": ("显示内容", "What is shown"),
    "play_tab_chat": ("对话", "Conversation"), "play_tab_request": ("请求", "Request"), "play_tab_raw": ("原文", "Raw"),
    "play_tab_curl": ("curl", "curl"), "play_clear": ("清空", "Clear"),
    "play_clear_sure": ("要清空整段对话吗？清空后无法恢复。", "Clear the whole conversation? It can't be brought back."),
    "play_start": ("选一个模型，说点什么。可以贴图片，也可以随时换模型或接口格式接着聊。",
                   "Choose a model and say something. You can paste images, and change model and API at any time."),
    "play_message": ("消息", "Message"),
    "play_placeholder": ("输入消息。回车发送，Shift+回车换行", "Your message. Enter sends, Shift+Enter makes a new line"),
    "play_attach": ("图片", "Image"), "play_url": ("图片链接", "Image link"),
    "play_url_label": ("图片地址", "Address of the image"),
    "play_url_hint": ("由上游去下载，本页不会加载它", "The provider fetches it; this page does not load it"),
    "play_add": ("添加", "Add"), "play_image": ("附带的图片", "Attached image"),
    "play_remove_image": ("移除图片", "Remove the image"),
    "play_image_type": ("{name}：只支持 PNG、JPEG、WebP 和 GIF 图片", "{name}: only PNG, JPEG, WebP and GIF images can be sent"),
    "play_image_large": ("{name} 超过 15 MB，太大了", "{name} is larger than 15 MB"),
    "play_send": ("发送", "Send"), "play_stop": ("停止", "Stop"), "play_no_model": ("请先选一个模型", "Choose a model first"),
    "play_you": ("你", "You"), "play_answer": ("回答", "Answer"), "play_edit": ("编辑", "Edit"),
    "play_again": ("重新生成", "Regenerate"),
    "play_waiting": ("等待回答…", "Waiting for the answer…"), "play_thinks": ("思考中…", "Thinking…"),
    "play_thought": ("思考过程", "Thoughts"),
    "play_thought_for": ("思考了 {time}", "Thought for {time}"), "play_call": ("调用工具", "Tool call"),
    "play_arguments": ("参数", "Arguments"), "play_result": ("工具结果", "Result of the tool"),
    "play_result_hint": ("填好后点“发送”，模型会接着回答", "Fill it in and press Send: the model goes on with it"),
    "play_code": ("代码", "Code"), "play_stopped": ("已停止", "Stopped"), "play_empty": ("回答是空的", "The answer is empty"),
    "play_error": ("出错了：", "Failed:"), "play_cut": ("回答中途断开，没有正常结束", "The answer broke off before its end"),
    "play_garbled": ("回答不是 JSON", "The answer is not JSON"), "play_first": ("首字 {time}", "first token {time}"),
    "play_total": ("共 {time}", "total {time}"),
    "play_tokens": ("输入 {input}，输出 {output} token", "{input} in, {output} out"),
    "play_cached": ("缓存命中 {n}", "{n} cached"), "play_reasoning": ("思考 {n}", "{n} for thinking"),
    "play_speed": ("{n} token/秒", "{n} tokens/s"), "play_stop_reason": ("结束原因：{reason}", "ended by: {reason}"),
    "play_settings": ("参数", "Parameters"), "play_system": ("系统提示词", "System prompt"),
    "play_temperature": ("温度", "Temperature"), "play_top_p": ("Top P", "Top P"),
    "play_max_tokens": ("最大 token 数", "Max tokens"),
    "play_effort": ("思考强度", "Thinking"), "play_effort_none": ("关闭", "off"), "play_default": ("默认", "default"),
    "play_stream": ("流式输出", "Stream the answer"), "play_extra": ("附加 JSON", "Extra JSON"),
    "play_extra_hint": ("并入请求体，同名字段以此为准", "Merged into the request; wins over the fields above"),
    "play_extra_bad": ("附加 JSON 不是一个 JSON 对象", "The extra JSON is not a JSON object"),
    "play_sent": ("上次发出的请求", "The last request"), "play_unsent": ("将要发出的请求", "The request as it would be sent"),
    "play_curl_hint": ("把 YOUR_KEY 换成你的客户端密钥", "Put your client key for YOUR_KEY"),
    "play_raw": ("收到的原文", "As it came over the wire"), "play_raw_none": ("还没有发过请求", "Nothing has been sent yet"),
    "chart_title": ("用量走势", "Traffic"), "chart_metric": ("指标", "Figure"), "chart_tokens": ("Token", "Tokens"),
    "chart_requests": ("请求", "Requests"),
    "chart_errors": ("失败", "Errors"), "chart_by": ("分组", "Grouped by"), "chart_by_model": ("模型", "Model"),
    "chart_by_key": ("密钥", "Key"),
    "chart_by_provider": ("上游", "Provider"), "chart_span": ("时间范围", "Period"), "chart_hour": ("1 小时", "Hour"),
    "chart_day": ("24 小时", "Day"), "chart_month": ("31 天", "Month"), "chart_time": ("时间", "Time"),
    "chart_rest": ("其他", "others"), "chart_none": ("这段时间没有请求", "No requests in this period"),
    "chart_nameless": ("（无）", "(none)"),
    "chart_legend": ("图例，点击可隐藏或显示", "Legend; each entry can be hidden"), "chart_toggle": ("点击隐藏或显示", "Hide or show"),
    "chart_label": ("{metric}（按{by}，{span}），用方向键逐项查看", "{metric} by {by}, {span}; arrow keys move through it"),
    "usage_csv": ("下载 CSV", "Download CSV"), "usage_days": ("时间范围", "Period"), "usage_days_1": ("今天", "Today"),
    "usage_days_7": ("最近 7 天", "Last 7 days"), "usage_days_30": ("最近 30 天", "Last 30 days"),
    "usage_days_90": ("最近 90 天", "Last 90 days"), "usage_days_365": ("最近一年", "Last year"),
    "usage_by": ("分组", "Grouped by"),
    "usage_by_model": ("模型", "Model"), "usage_by_key": ("密钥", "Key"), "usage_by_provider": ("上游", "Provider"),
    "usage_by_day": ("日期", "Day"), "usage_requests": ("请求", "Requests"), "usage_errors": ("失败", "Errors"),
    "usage_input": ("输入", "Input"),
    "usage_output": ("输出", "Output"), "usage_cached": ("缓存命中", "Cached"), "usage_reasoning": ("思考", "Thinking"),
    "usage_first_s": ("平均首字", "First token"), "usage_total_s": ("平均耗时", "Duration"), "usage_cost": ("费用", "Cost"),
    "usage_sum": ("合计", "Total"), "usage_none": ("这段时间没有用量", "Nothing was used in this period"),
    "usage_off": ("用量记录已在设置里关闭。", "Usage is not recorded: it is off in the settings."),
    "usage_estimated": ("~ 表示含估算：上游没有返回 token 数。", "~ is in part an estimate: the provider did not count the tokens."),
    "usage_cost_hint": ("费用按设置里的价格（每百万 token）算出，币种与价格一致。",
                        "Costs follow the prices in the settings (for a million tokens), in their currency."),
    "usage_no_prices": ("在设置里填上价格，就能看到费用。", "Set prices in the settings to see costs here."),
    "clients_list": ("客户端", "Clients"), "clients_model": ("模型", "Model"), "clients_shell": ("系统或终端", "System or shell"),
    "clients_address": ("服务地址：", "Address of the server:"), "clients_key": ("准备一个客户端密钥", "Have a client key ready"),
    "clients_key_hint": ("下面的 YOUR_KEY 要换成它，变量 IFLOW2API_KEY 里放的也是它。还没有的话，在这里创建：",
                         "It goes where YOUR_KEY stands below, or into the variable IFLOW2API_KEY. Make one under"),
    "clients_no_key": ("不需要密钥，里面的占位密钥照抄即可。", "No key is needed: leave the one in there as it is."),
    "clients_connect": ("接入 {client}", "Connect {client}"), "clients_copy": ("复制下面的内容。", "Copy what is below."),
    "clients_either": ("下面的方式任选一种。", "Any one of these will do."),
    "clients_form": ("在客户端里找到对应的位置，逐项填入。", "Find these places in the client and fill them in."),
    "clients_terminal": ("在终端里运行", "In a terminal"),
    "clients_window": ("只对当前终端窗口有效，请接着在同一个窗口里操作。",
                       "It holds for this terminal window only; go on in the same one."),
    "clients_file": ("合并到这个文件里。", "Merge it into this file."),
    "clients_try": ("发一条消息试试", "Send a message"),
    "clients_try_hint": ("收到的请求会马上出现在这里：", "The request shows up at once in the"),
}

ADMIN_CSS += _CSS_PLAY

#: One script of all parts; each view adds itself to VIEWS, then `start` begins.
ADMIN_JS = "\n".join(("(() => {", "'use strict';", *(part.strip() for part in (
    _JS_CORE, _JS_CHARTS, _JS_PLAY, _JS_USAGE, _JS_CLIENTS,
    _JS_OVERVIEW, _JS_PROVIDERS, _JS_MODELS, _JS_SETTINGS, _JS_KEYS, _JS_LOGS, _JS_GUIDE)), "start();", "})();"))

#: What the page says: key -> (Chinese, English).
ADMIN_TEXTS: Dict[str, Tuple[str, str]] = {**_TEXTS_CORE, **_TEXTS_VIEWS, **_TEXTS_PLAY}


_HTML = "text/html; charset=utf-8"


class Page(NamedTuple):
    """A page made once: its bytes, the same packed, its ETag, and the headers it goes out with."""
    body: bytes
    packed: bytes
    etag: str
    headers: Tuple[Tuple[str, str], ...]


def slim_script(script: str) -> str:
    """Without indents, empty lines, and comments that fill lines: a tenth of what the page takes on its way."""
    return re.sub(r"^(?: *(?://.*|/\*\*(?:(?!\*/)[\s\S])*\*/)?\n| +)", "", script, flags=re.M)


@lru_cache(maxsize=None)
def admin_page() -> Page:
    """The page with style, texts and script in their places; its policy admits those two blocks and nothing else."""
    texts = json.dumps(ADMIN_TEXTS, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    code = slim_script(ADMIN_JS)
    body = ADMIN_HTML.replace("@CSS@", ADMIN_CSS).replace("@TEXTS@", texts).replace("@JS@", code).encode()
    style, script = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (ADMIN_CSS, code))
    policy = ("default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; "
              f"style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
              "form-action 'none'; base-uri 'none'; frame-ancestors 'none'")
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    etag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
    return Page(body, packer.compress(body) + packer.flush(), etag, (
        ("Content-Security-Policy", policy), ("X-Frame-Options", "DENY"), ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-cache"), ("Vary", "Accept-Encoding"), ("ETag", etag)))


def show_page(handler: Handler) -> None:
    """GET /admin: the page, to anybody who may reach this server; it holds nothing but itself."""
    page, headers = admin_page(), handler.headers
    if page.etag in headers.get("if-none-match", ""):
        return handler.respond(304, b"", "", page.headers)
    if re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", headers.get("accept-encoding", "")):
        return handler.respond(200, page.packed, _HTML, [*page.headers, ("Content-Encoding", "gzip")])
    handler.respond(200, page.body, _HTML, page.headers)


#: path below /admin/api/ -> method -> what it does; all but the public ones want a session.
_ADMIN_ROUTES: Dict[str, Dict[str, Callable[[Handler], None]]] = {
    "overview": {"GET": show_overview}, "events": {"GET": stream_events}, "requests": {"GET": show_requests},
    "series": {"GET": show_series}, "usage": {"GET": show_usage}, "usage.csv": {"GET": download_usage},
    "config": {"GET": show_config, "PATCH": save_config}, "presets": {"GET": show_presets},
    "providers": {"GET": show_providers, "POST": add_provider}, "providers/test": {"POST": try_provider},
    "providers/order": {"POST": order_providers},
    "providers/": {"PUT": edit_provider, "DELETE": remove_provider},
    "models": {"GET": show_admin_models}, "routes/explain": {"POST": explain_route},
    "keys": {"GET": show_keys, "POST": add_key}, "keys/": {"DELETE": remove_key},
    "logins": {"GET": show_logins}, "logins/": {"DELETE": end_login},
    **{f"oauth/{action}": {"POST": steer_login} for action in ("start", "callback", "paste")},
    "oauth/status": {"GET": steer_login}, "logs": {"GET": show_logs}, "logs.txt": {"GET": download_logs},
    "clients": {"GET": show_clients}, "about": {"GET": show_about}, "instances": {"GET": show_instances}}

ROUTES.update({f"/admin/api/{path}": {method: Route(run, admin=True) for method, run in methods.items()}
               for path, methods in _ADMIN_ROUTES.items()})
ROUTES.update({
    "/admin": {"GET": Route(show_page, public=True)},
    **{f"/admin/api/play/{name}": {"POST": Route(play, admin=True)} for name in PLAYED},
    "/admin/api/session": {"GET": Route(show_session, public=True, admin=True),
                           "POST": Route(sign_in, public=True, admin=True), "DELETE": Route(sign_out, admin=True)},
    "/admin/api/password": {"POST": Route(set_password, public=True, admin=True)}})


# === 17. Demo upstream =======================================================
#
# A small upstream built in: `--demo` runs the program against it, without account or network, and the tests use the
# same one with a script.  What it says is pure; only the two classes at the end know sockets and clocks.

#: demo-text shows what becomes of images for a model that can't see; any other name is answered, too.
DEMO_MODELS: Tuple[Json, ...] = (
    {"id": "demo", "context": 131072, "max_output": 16384, "vision": True},
    {"id": "demo-vision", "context": 131072, "max_output": 16384, "vision": True},
    {"id": "demo-text", "context": 32768, "max_output": 4096, "vision": False}, {"id": "demo-embedding"})

#: Of many tools one is tried that only looks; a word of its name tells.
_LOOKS = re.compile(r"(?i)get|list|read|search|find|look|fetch|weather|time|glob|grep|^ls$|view|status|query|calc")

#: Arguments that harm nothing, by a word of their name.
_DEMO_VALUES = {"command": "echo hello from the demo", "cmd": "echo hello from the demo", "file": "README.md",
                "path": ".", "pattern": "*", "city": "Paris", "location": "Paris", "url": "https://example.com/",
                "lang": "en",
                "unit": "celsius", "date": "2026-01-01", "zone": "UTC"}

_DEMO_PIECE = re.compile(r"[\u2e80-\uffff]|[^\s\u2e80-\uffff]+\s*|\s+")
_CHINESE = re.compile(r"[\u2e80-\uffff]")


class DemoAnswer(NamedTuple):
    """What the demo model says to one request; a `status` other than 200 makes `text` the message of an error."""
    text: str = ""
    reasoning: str = ""
    calls: Tuple[Tuple[str, Json], ...] = ()      #: name and arguments of each
    finish: str = ""                              #: finish_reason; "": by what there is
    status: int = 200

    @property
    def finish_reason(self) -> str:
        return self.finish or ("tool_calls" if self.calls else "stop")


# --- what it says

def demo_answer(body: Json) -> DemoAnswer:
    """Think, call an offered tool once, say what came of it; describe images; else say what was asked."""
    messages = [message for message in body.get("messages") or () if isinstance(message, dict)]
    spoken = max([at for at, message in enumerate(messages) if message.get("role") == "assistant"], default=-1)
    fresh = messages[spoken + 1:]        # what the model has not seen yet
    asked = next((_texts_of(m.get("content"))[-1] for m in reversed(messages)
                  if m.get("role") == "user" and _texts_of(m.get("content"))), "")
    chinese = bool(_CHINESE.search(asked))
    tool = _demo_tool(body, messages, fresh, asked)
    if tool:
        name, parameters = tool
        thought = f"有一个工具 {name} 可用，先调用它。" if chinese else f"The tool {name} is offered; calling it, to see it work. "
        return _demo_bounded(body, DemoAnswer("", thought, ((name, _sample(parameters, parameters, name)),)))
    thought = f"问题是：“{one_line(asked, 60)}”。" if chinese else f"Let me see. I was asked: “{one_line(asked, 60)}”. "
    text = (_demo_json(body) or _demo_result(messages, fresh, chinese) or _demo_images(fresh, chinese)
            or _demo_echo(asked, chinese))
    return _demo_bounded(body, DemoAnswer(text, thought))


def _demo_bounded(body: Json, answer: DemoAnswer) -> DemoAnswer:
    """The answer as the thinking switches, `stop` and the token limit leave it."""
    thinking, template = body.get("thinking"), body.get("chat_template_kwargs")
    off = (body.get("enable_thinking") is False or body.get("reasoning_effort") == "none"
           or isinstance(thinking, dict) and thinking.get("type") == "disabled"
           or isinstance(template, dict) and template.get("enable_thinking") is False)
    text = answer.text
    for stop in body["stop"] if isinstance(body.get("stop"), list) else [body.get("stop")]:
        text = text.partition(stop)[0] if isinstance(stop, str) and stop else text
    answer = answer._replace(text=text, reasoning="" if off else answer.reasoning)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    thought, said = demo_pieces(answer.reasoning), demo_pieces(text)
    if not isinstance(limit, int) or answer.calls or len(thought) + len(said) <= limit:
        return answer
    thought = thought[:limit // 2]       # a short limit leaves room for some of the answer itself
    return DemoAnswer("".join(said[:max(1, limit - len(thought))]), "".join(thought), finish="length")


def demo_pieces(text: str) -> List[str]:
    """`text` as a model would stream it: words, or single Chinese characters."""
    return _DEMO_PIECE.findall(text)


def _demo_echo(asked: str, chinese: bool) -> str:
    quoted = one_line(asked, 200)
    if chinese:
        return f"这是 iflow2api 内置的演示模型，不需要账号，也不联网。您说：“{quoted}”。接入真正的模型：python iflow2api.py provider add zhipu"
    return (f"This is the demo model built into iflow2api: no account, no network. You said: “{quoted}”. "
            "For a real model: python iflow2api.py provider add zhipu")


def _demo_result(messages: List[Json], fresh: List[Json], chinese: bool) -> str:
    """What the tools answered, "" where none did."""
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls") or ()}
    said = []
    for message in fresh:
        if message.get("role") == "tool":
            name = names.get(message.get("tool_call_id"), "?")
            result = one_line(" ".join(_texts_of(message.get("content"))), 400)
            said.append(f"工具 {name} 返回：{result}" if chinese else f"The tool {name} answered: {result}")
    return "\n".join(said)


def _demo_images(fresh: List[Json], chinese: bool) -> str:
    """Type and size of each image, "" where there is none."""
    parts = [part for message in fresh if isinstance(message.get("content"), list) for part in message["content"]
             if part.get("type") == "image_url"]
    urls = [part["image_url"] if isinstance(part["image_url"], str) else part["image_url"]["url"] for part in parts]
    listed = ", ".join(map(_describe_image, urls))
    if not urls:
        return ""
    return f"我看到 {len(urls)} 张图片：{listed}" if chinese else f"I see {len(urls)} image{'s' * (len(urls) > 1)}: {listed}"


def _describe_image(url: str) -> str:
    """`PNG 640 × 480`; a link is not followed: the demo needs no network."""
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not comma:
        return "a link to " + one_line(url, 80)
    kind = re.sub(r"data:(image/)?|;.*", "", head).upper() or "IMAGE"
    size = image_size(data)
    return f"{kind} {size[0]} × {size[1]}" if size else f"{kind} of unknown size"


# --- tools and schemas

def _demo_tool(body: Json, messages: List[Json], fresh: List[Json], asked: str) -> Optional[Tuple[str, Json]]:
    """Name and parameters of the tool to call, once in a conversation: the demanded, named, harmless or first one."""
    choice = body.get("tool_choice")
    functions = [tool["function"] for tool in body.get("tools") or () if tool.get("type") == "function"]
    known = {function["name"]: function.get("parameters") or {} for function in functions}
    demanded = choice["function"]["name"] if isinstance(choice, dict) and "function" in choice else None
    called = any(message.get("role") == "tool" for message in (fresh if demanded or choice == "required" else messages))
    if not known or choice == "none" or called:
        return None
    named = [name for name in known if name.lower() in asked.lower()]
    harmless = [name for name in known if _LOOKS.search(name)]
    name = demanded if demanded in known else (named + harmless + list(known))[0]
    return name, known[name]


def _demo_json(body: Json) -> str:
    """An answer that fits `response_format`, "" where none is asked for."""
    form = body.get("response_format")
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_schema":
        schema = (form.get("json_schema") or {}).get("schema")
        return json.dumps(_sample(schema if isinstance(schema, dict) else {}, schema, "answer"), ensure_ascii=False)
    return '{"answer": "demo"}' if kind == "json_object" else ""


def _sample(schema: Any, root: Any, name: str, depth: int = 0) -> Any:
    """A value that fits a JSON Schema, as small and as harmless as can be."""
    schema = schema if isinstance(schema, dict) and depth < 12 else {}
    if isinstance(schema.get("$ref"), str):
        return _sample(_follow(root, schema["$ref"]), root, name, depth + 1)
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    for key in ("enum", "examples"):
        if isinstance(schema.get(key), list) and schema[key]:
            return schema[key][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list) and schema[key]:
            return _sample(schema[key][0], root, name, depth + 1)
    kinds = schema.get("type", "object" if "properties" in schema or not depth else "string")
    kind = next((k for k in kinds if k != "null"), "null") if isinstance(kinds, list) else kinds
    return _SAMPLES.get(str(kind), _sample_text)(schema, root, name, depth)


def _follow(root: Any, reference: str) -> Any:
    """What `#/$defs/name` points at."""
    for step in reference.lstrip("#/").split("/"):
        root = root.get(step) if isinstance(root, dict) else None
    return root


def _sample_object(schema: Json, root: Any, name: str, depth: int) -> Json:
    known = schema.get("properties") if isinstance(schema.get("properties"), dict) else {}
    required = schema.get("required") if isinstance(schema.get("required"), list) else list(known)[:1]
    return {key: _sample(known.get(key), root, key, depth + 1) for key in required if isinstance(key, str)}


def _sample_array(schema: Json, root: Any, name: str, depth: int) -> List[Any]:
    if name.lower() in ("command", "cmd"):
        return ["echo", "hello from the demo"]
    return [_sample(schema.get("items"), root, name, depth + 1)] * min(schema.get("minItems") or 1, 8)


def _sample_text(schema: Json, root: Any, name: str, depth: int) -> str:
    return next((value for word, value in _DEMO_VALUES.items() if word in name.lower()), "demo")


def _sample_number(schema: Json, root: Any, name: str, depth: int) -> Any:
    value = (schema.get("minimum") or schema.get("exclusiveMinimum") or 0) + 1
    return min(value, schema.get("maximum", value))


_SAMPLES: Dict[str, Callable[[Json, Any, str, int], Any]] = {
    "object": _sample_object, "array": _sample_array, "string": _sample_text, "integer": _sample_number,
    "number": _sample_number, "boolean": lambda *_: False, "null": lambda *_: None}


# --- how it says it

def demo_usage(body: Json, answer: DemoAnswer) -> Json:
    """Tokens as an upstream counts them: estimated for what came in, pieces for what goes out."""
    given = estimate_tokens([body.get(key) for key in ("messages", "tools", "prompt", "input")])
    thought = len(demo_pieces(answer.reasoning))
    made = thought + len(demo_pieces(answer.text)) + sum(8 + len(json.dumps(c[1])) // 4 for c in answer.calls)
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made,
            "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": thought}}


def demo_calls(answer: DemoAnswer) -> List[Json]:
    return [{"id": new_id("call_"), "type": "function",
             "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
            for name, arguments in answer.calls]


def demo_completion(body: Json, answer: DemoAnswer, base: Json) -> Json:
    """The plain answer, of /completions where there is a prompt."""
    if "messages" not in body:
        choice: Json = {"index": 0, "text": answer.text, "logprobs": None, "finish_reason": answer.finish_reason}
        return {**base, "object": "text_completion", "choices": [choice], "usage": demo_usage(body, answer)}
    message = {"role": "assistant", "content": answer.text or None,
               **({"reasoning_content": answer.reasoning} if answer.reasoning else {}),
               **({"tool_calls": demo_calls(answer)} if answer.calls else {})}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
    return {**base, "object": "chat.completion", "choices": [choice], "usage": demo_usage(body, answer)}


def demo_deltas(answer: DemoAnswer) -> Iterator[Json]:
    """The deltas of a streamed answer, arguments in pieces too."""
    yield {"role": "assistant", "content": ""}
    for piece in demo_pieces(answer.reasoning):
        yield {"reasoning_content": piece}
    for piece in demo_pieces(answer.text):
        yield {"content": piece}
    for index, call in enumerate(demo_calls(answer)):
        arguments = call["function"].pop("arguments")
        yield {"tool_calls": [{"index": index, **call, "function": {**call["function"], "arguments": ""}}]}
        for at in range(0, len(arguments), 12):
            yield {"tool_calls": [{"index": index, "function": {"arguments": arguments[at:at + 12]}}]}


def demo_chunks(body: Json, answer: DemoAnswer, base: Json) -> Iterator[Json]:
    """The chunks of a streamed answer; usage where it was asked for."""
    chat = "messages" in body
    base = {**base, "object": "chat.completion.chunk" if chat else "text_completion"}
    if chat:
        for delta in demo_deltas(answer):
            yield {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    else:
        for piece in demo_pieces(answer.text):
            yield {**base, "choices": [{"index": 0, "text": piece, "logprobs": None, "finish_reason": None}]}
    nothing: Json = {"delta": {}} if chat else {"text": ""}
    yield {**base, "choices": [{"index": 0, **nothing, "finish_reason": answer.finish_reason}]}
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        yield {**base, "choices": [], "usage": demo_usage(body, answer)}


def demo_embeddings(body: Json) -> Json:
    """Small vectors of length 1, the same for the same text."""
    given = body.get("input")
    texts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    size = body.get("dimensions") if isinstance(body.get("dimensions"), int) and 0 < body["dimensions"] <= 4096 else 32
    data = []
    for index, text in enumerate(texts):
        vector = _demo_vector(json.dumps(text), size)
        packed = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
        data.append({"object": "embedding", "index": index,
                     "embedding": packed if body.get("encoding_format") == "base64" else vector})
    count = estimate_tokens(given)
    return {"object": "list", "data": data, "model": body.get("model"),
            "usage": {"prompt_tokens": count, "total_tokens": count}}


def _demo_vector(text: str, size: int) -> List[float]:
    noise = hashlib.shake_128(text.encode("utf-8", "replace")).digest(2 * size)
    raw = [value / 32768 - 1 for value in struct.unpack(f"<{size}H", noise)]
    length = sum(value * value for value in raw) ** 0.5 or 1.0
    return [value / length for value in raw]


# --- the server

class DemoRequest(NamedTuple):
    """What reached the demo upstream; for tests."""
    method: str
    path: str
    headers: Dict[str, str]
    body: Json


class DemoUpstream(http.server.ThreadingHTTPServer):
    """A small OpenAI-compatible server on a loopback port.

    `pace_s` lies between two pieces of a stream, `first_s` before an answer; `key` is demanded where given.  `script`
    holds what to answer to the first requests: DemoAnswers, or functions that make one of the body; then `demo_answer`
    takes over.  `requests` are the latest that came.
    """
    daemon_threads, block_on_close = True, False
    request_queue_size = 128

    def __init__(self, pace_s: float = 0.03, first_s: float = 0.3, key: str = "",
                 script: Iterable[Union[DemoAnswer, Callable[[Json], DemoAnswer]]] = (), port: int = 0) -> None:
        self.pace_s, self.first_s, self.key = pace_s, first_s, key
        self._script: Iterator[Any] = iter(script)
        self.requests: Deque[DemoRequest] = deque(maxlen=100)
        self.connections: Set[socket.socket] = set()
        self.closing, self._lock = threading.Event(), threading.Lock()
        super().__init__(("127.0.0.1", port), _DemoHandler)
        threading.Thread(target=self.serve_forever, args=(5,), name="demo", daemon=True).start()

    def server_bind(self) -> None:
        """Without HTTPServer's reverse DNS lookup."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def entry(self, name: str = "demo") -> Json:
        """It as an entry of `providers`."""
        return {"name": name, "base_url": self.base_url, "models": list(DEMO_MODELS),
                **({"api_keys": [self.key]} if self.key else {})}

    def settings(self, model: str = "demo") -> Json:
        """Settings that lead everything to it, whatever config.json says."""
        return {"providers": [self.entry()], "aliases": {}, "default_provider": "demo", "default_model": model,
                "api_key": ""}

    def answer(self, body: Json) -> DemoAnswer:
        """The next of the script, else what the demo model says; to a prompt without thinking and tools."""
        with self._lock:
            said = next(self._script, demo_answer)
        if "messages" not in body:
            body = {"messages": [{"role": "user", "content": str(body.get("prompt") or "")}], "enable_thinking": False,
                    **{key: body[key] for key in ("max_tokens", "stop") if key in body}}
        return said(body) if callable(said) else said

    def pause(self, seconds: float) -> bool:
        """Wait; False when the server is closing."""
        return not self.closing.wait(seconds) if seconds else not self.closing.is_set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("the demo upstream lost a client", exc_info=True)

    def close(self) -> None:
        """Stop, and cut off who is connected, so that nothing answers any more."""
        self.closing.set()
        stop_accepting(self)
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _DemoHandler(http.server.BaseHTTPRequestHandler):
    """One connection to the demo upstream."""
    server: DemoUpstream
    protocol_version, server_version, sys_version = "HTTP/1.1", "demo", ""
    disable_nagle_algorithm, timeout = True, 75

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Hops that lie in this process need no log."""

    def do_GET(self) -> None:
        if not self._enters({}):
            return
        if not self.path.endswith("/models"):
            return self._fail(404, f"the demo has nothing at {self.path}")
        data = [{"id": model["id"], "object": "model", "created": 1767225600, "owned_by": "demo"}
                for model in DEMO_MODELS]
        self._send(200, {"object": "list", "data": data})

    def do_POST(self) -> None:
        try:
            body = parse_body(self.rfile.read(int(self.headers.get("Content-Length") or 0)))[0]
            if not self._enters(body):
                return
            if self.path.endswith("/embeddings"):
                return self._send(200, demo_embeddings(body))
            if not self.path.endswith("/completions"):
                return self._fail(404, f"the demo has nothing at {self.path}")
            answer = self.server.answer(body)
        except BadRequest as exc:
            return self._fail(400, exc.message)
        except (TypeError, ValueError, KeyError, AttributeError) as exc:     # the demo checks nothing beforehand
            return self._fail(400, f"the demo can't make sense of this request ({one_line(exc, 80)})")
        self._say(body, answer)

    def _say(self, body: Json, answer: DemoAnswer) -> None:
        base = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": body.get("model")}
        self.server.pause(self.server.first_s)
        if answer.status != 200:
            self._fail(answer.status, answer.text)
        elif body.get("stream") is True:
            self._stream(demo_chunks(body, answer, base))
        else:
            self._send(200, demo_completion(body, answer, base))

    def _enters(self, body: Json) -> bool:
        """Note the request; refuse one without the key."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append(DemoRequest(self.command, self.path, headers, body))
        if self.server.key and headers.get("authorization") != "Bearer " + self.server.key:
            self._fail(401, "the demo was given a wrong key")
            return False
        return True

    def _stream(self, chunks: Iterable[Json]) -> None:
        self._head(200, "text/event-stream", ("Transfer-Encoding", "chunked"))
        for chunk in chunks:
            self._write_chunk(b"data: " + dump_json(chunk) + b"\n\n")
            if not self.server.pause(self.server.pace_s):
                self.close_connection = True
                return
        self._write_chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _write_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _fail(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": error_type(status), "param": None, "code": None}})

    def _send(self, status: int, value: Json) -> None:
        data = dump_json(value)
        self._head(status, "application/json", ("Content-Length", str(len(data))))
        self.wfile.write(data)

    def _head(self, status: int, content_type: str, framing: Tuple[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header(*framing)
        self.end_headers()


# === 18. Command line ========================================================

# --- the console -------------------------------------------------------------

#: What the command line says, in Chinese and English; a command's and a flag's help stands beside it, in COMMANDS.
TEXTS: Dict[str, Tuple[str, str]] = {
    "error": ("错误：{text}", "error: {text}"),
    "warning": ("警告：{text}", "warning: {text}"),
    "near": ("；您是不是要输入 {names}？", "; did you mean {names}?"),
    "or": (" 或 ", " or "),
    "see": ("（用法：{program} {command}--help）", " (see: {program} {command}--help)"),
    # the card
    "address": ("地址", "address"),
    "providers": ("上游", "providers"),
    "clients": ("客户端", "clients"),
    "login": ("登录", "login"),
    "page": ("页面", "page"),
    "page_code": ("一次性验证码，用于设置页面密码：{code}", "one-time code, to set its password: {code}"),
    "next": ("下一步", "next"),
    "default": ("（默认）", " (default)"),
    "disabled": ("已停用：{problem}", "disabled: {problem}"),
    "more": ("还有 {count} 个：{program} status", "{count} more: {program} status"),
    "none": ("无", "none"),
    "problems": ("注意", "problems"),
    "new_key": ("需要密钥（因对外监听 {host} 而新生成）：", "need this key, made because {host} is open to the network:"),
    "key_needed": ("需要密钥 {key}（custom_api_key）", "need the key {key} (custom_api_key)"),
    "no_key": ("本机访问无需密钥", "need no key on this machine"),
    "logged_in": ("iFlow 已登录", "iFlow: logged in"),
    "not_logged_in": ("iFlow 未登录；登录：{program} login", "iFlow: not logged in; to log in: {program} login"),
    "next_provider": ("指定一个上游：\n{program} --upstream URL --api-key '$NAME'",
                      "stop it and give it a model:\n{program} --upstream URL --api-key '$NAME'"),
    "next_preset": ("添加一个上游：\n{program} provider presets", "add a provider:\n{program} provider presets"),
    "next_repair": ("检查上游：\n{program} test", "see what is wrong:\n{program} test"),
    "next_client": ("在客户端填写 {url}/v1\n（Anthropic 客户端填 {url}）",
                    "point clients at {url}/v1\n(Anthropic clients at {url})"),
    # running
    "stopping": ("正在停止；正在进行的回答最多再等 {seconds:g} 秒（再按一次立即停止）",
                 "stopping; running answers get {seconds:g} s to end (again to stop at once)"),
    "cannot_listen": ("无法监听 {host} 的端口 {port}：{reason}", "can't listen on {host} port {port}: {reason}"),
    "port_taken": ("{host} 的端口 {port} 已被其他程序占用；端口 {free} 空闲：加上 --port {free}",
                   "port {port} on {host} is taken by another program; port {free} is free: add --port {free}"),
    "no_log": ("无法写入日志文件 {path}：{reason}；仅在控制台输出日志", "no log_file {path}: {reason}; logging to the console alone"),
    # logs
    "log_unset": ("没有设置 log_file，日志只在控制台上。设置：{program} config set log_file iflow2api.log，然后重启",
                  "log_file is not set: the console alone has the log. To set it: {program} config set log_file "
                  "iflow2api.log, then restart"),
    "log_missing": ("还没有日志文件 {path}：{reason}；服务启动后才会写入",
                    "no log at {path}: {reason}; it is written once the gateway runs"),
    # mistakes
    "no_command": ("没有命令 {name}{near}", "there is no command {name!r}{near}"),
    "unknown_flag": ("{command} 没有参数 {flag}{near}", "{command} has no flag {flag}{near}"),
    "stray": ("{command} 不接受多余的 {word!r}{near}", "{command} has no use for {word!r}{near}"),
    "needs_value": ("{flag} 需要一个值：{flag} {metavar}", "{flag} needs a value: {flag} {metavar}"),
    "takes_no_value": ("{flag} 不带值，去掉 {value}", "{flag} takes no value; leave out {value}"),
    "bad_choice": ("{flag} 不能是 {value}；可选：{choices}{near}", "{flag} can't be {value}; one of {choices}{near}"),
    "no_number": ("{flag} 不能是 {value}；需要整数", "{flag} can't be {value}; a whole number expected"),
    "missing": ("{command} 还需要：{program} {command} {flag}", "{command} needs more: {program} {command} {flag}"),
    "bad_value": ("{where} 不能是 {value}；需要{expected}", "{where} can't be {value}; {expected} expected"),
    "key_shown": ("命令行上的密钥，本机其他用户都能看到；更好的写法：--api-key '$NAME'，或 -（标准输入）",
                  "every user of this machine can see a key on the command line; better: --api-key '$NAME' or -"),
    "key_no_input": ("--api-key -：标准输入里没有密钥；例如：{program} --api-key - < 文件",
                     "--api-key -: standard input holds no key; for example: {program} --api-key - < FILE"),
    "key_undefined": ("--api-key {name}：没有设置环境变量 {variable}；先执行：{verb} {variable}=…",
                      "--api-key {name}: the environment variable {variable} is not set; first: {verb} {variable}=…"),
    "config_no_key": ("config {action} 需要一个名称（KEY）；{program} config list 列出全部",
                      "config {action} needs a KEY; {program} config list shows them"),
    "config_no_value": ("config set {name} 需要一个值：{program} config set {name} VALUE",
                        "config set {name} needs a VALUE: {program} config set {name} VALUE"),
    "no_setting": ("没有名为 {name!r} 的设置{near}（全部：{program} config list）",
                   "there is no setting {name!r}{near} (all: {program} config list)"),
    "saved": ("已保存到 {path}", "saved in {path}"),
    "cannot_write": ("无法写入 {path}：{reason}", "{path} can't be written: {reason}"),
    "proxy_is_off": ("上游代理尚未启用；启用：{program} config set upstream_proxy_enabled true",
                     "the proxy is not in use yet; to use it: {program} config set upstream_proxy_enabled true"),
    # the page's password
    "new_password": ("新密码：", "new password: "),
    "same_again": ("再输入一次：", "the same again: "),
    "not_the_same": ("两次输入不一致；没有改动", "these were not the same; nothing was changed"),
    "no_terminal": ("这里没有终端；从标准输入读取密码：{program} admin reset-password -",
                    "there is no terminal here; to read it from standard input: {program} admin reset-password -"),
    "password_shown": ("不要把密码写在命令行上；直接运行 {program} admin reset-password，或用 -（标准输入）",
                       "a password does not belong on the command line; run {program} admin reset-password, or use - "
                       "(standard input)"),
    "password_length": ("密码需要 {least} 到 {most} 个字符", "a password has from {least} to {most} characters"),
    "password_set": ("页面密码已更改；所有已登录的会话都已结束", "the page's password is changed; whoever was signed in is signed out"),
    "password_above": ("环境变量 {variable} 优先于它", "the variable {variable} is set, and stands above it"),
    # what a setting may be
    "kind_str": ("文字", "a string"),
    "kind_int": ("整数", "a whole number"),
    "kind_float": ("数字", "a number"),
    "kind_bool": (" true 或 false", "true or false"),
    "kind_list": (" JSON 列表", "a list as JSON"),
    "kind_dict": (" JSON 对象", "an object as JSON"),
    "kind_choice": ("以下之一：{choices}", "one of {choices}"),
    "at_least": ("，不小于 {low:g}", " of at least {low:g}"),
    "between": ("，{low:g} 到 {high:g}", " from {low:g} to {high:g}"),
    # help
    "about": ("连接任意 AI 客户端与任意 OpenAI 兼容模型的单文件网关", "one file between any AI client and any OpenAI-compatible model"),
    "usage": ("用法", "Usage"),
    "arguments": ("参数", "Arguments"),
    "flags": ("选项", "Flags"),
    "serve_flags": ("serve 的选项", "Flags of serve"),
    "examples": ("示例", "Examples"),
    "help_flag": ("显示本帮助；每个命令都有自己的帮助：COMMAND --help", "this text; each command has its own: COMMAND --help"),
    "config_dir": ("config.json 所在的文件夹（~/.iflow2api）", "folder of config.json (~/.iflow2api)"),
    "settings_too": ("更多设置：{program} config，或环境变量 IFLOW2API_<大写名称>",
                     "More settings: {program} config, or variables IFLOW2API_<KEY>"),
    "group_run": ("运行", "Run"),
    "group_setup": ("设置", "Set up"),
    "group_look": ("查看", "Look"),
    "group_more": ("其他", "More"),
}

#: How this program is called in what it tells people to type.
PROGRAM = "python iflow2api.py"

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}

#: Instead of a character that the console's encoding lacks; any other is shown as its escape.
_PLAIN = {"→": "->", "←": "<-", "…": "...", "·": "-", "—": "-", "–": "-", "’": "'", "‘": "'", "“": '"', "”": '"',
          "✓": "ok", "✗": "x", "，": ", ", "；": "; ", "：": ": ", "（": " (", "）": ")"}

#: Characters two columns wide (Unicode TR 11, W and F), without unicodedata, which OpenWrt leaves to a package.
_WIDE = ("\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6"
         "\U0001f300-\U0001faff\U00020000-\U0003fffd")


class Console:
    """What this process's terminal can show.  There is one, as there is one stderr; `main` alone sets it up."""

    def __init__(self) -> None:
        self.language, self.colours, self.columns = "en", False, 80

    def set_up(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        codecs.register_error("iflow2api", _plain_characters)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="iflow2api")           # a GBK or ASCII console must not end the program
        self.language = find_language(argv, environ)
        if self.language == "zh" and not _can_show("中", sys.stderr):
            self.language = "en"
        is_terminal = bool(sys.stderr) and sys.stderr.isatty()
        plain = environ.get("NO_COLOR") or environ.get("TERM") == "dumb"
        self.colours = is_terminal and not plain and _takes_ansi(sys.stderr)
        self.columns = 80
        if is_terminal:
            with contextlib.suppress(OSError, ValueError):
                self.columns = min(max(os.get_terminal_size(sys.stderr.fileno()).columns, 40), 80)

    def text(self, pair: Union[str, Tuple[str, str]]) -> str:
        """The one of (中文, English) that is wanted; what has no translation as it is."""
        return pair if isinstance(pair, str) else pair[self.language == "en"]

    def paint(self, text: str, colour: str) -> str:
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self.colours and text and colour else text


CONSOLE = Console()


def tr(key: str, /, **facts: Any) -> str:
    """TEXTS[key] in the console's language, filled in."""
    return CONSOLE.text(TEXTS[key]).format(program=PROGRAM, **facts)


def _plain_characters(error: UnicodeError) -> Tuple[str, int]:
    """The codec error handler of consoles."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start:error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


def _can_show(text: str, stream: Any) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeError, LookupError):
        return False
    return True


def find_language(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """zh or en: the setting `language` if there is one, else the locale's.

    It is wanted before settings are read (for help, for errors of the command line), so it is looked up here by itself.
    """
    wanted = environ.get(ENV_PREFIX + "LANGUAGE")
    if wanted not in ("zh", "en"):
        flags = dict([*zip(argv, argv[1:]), *(word.split("=", 1) for word in argv if "=" in word)])
        folder = flags.get("--config-dir") or environ.get(ENV_PREFIX + "CONFIG_DIR") or CONFIG_DIR
        wanted = ""
        with contextlib.suppress(ConfigBroken):
            wanted = read_json_file(os.path.join(os.path.expanduser(folder), "config.json")).get("language")
    if wanted in ("zh", "en"):
        return str(wanted)
    locale = next((environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environ.get(name)), "")
    if not locale and os.name == "nt":
        return "zh" if _windows_is_chinese() else "en"
    return "zh" if locale.lower().startswith("zh") else "en"


def _windows_is_chinese() -> bool:
    try:
        import ctypes
        return ctypes.windll.kernel32.GetUserDefaultUILanguage() & 0x3FF == 4       # type: ignore[attr-defined]
    except (ImportError, AttributeError, OSError):
        return False


def _takes_ansi(stream: Any) -> bool:
    """Whether the terminal understands colours; Windows' console must be told to (1607 and later can)."""
    if os.name != "nt":
        return True
    try:
        import ctypes
        import msvcrt
        kernel, mode = ctypes.windll.kernel32, ctypes.c_uint32()                    # type: ignore[attr-defined]
        handle = ctypes.c_void_p(msvcrt.get_osfhandle(stream.fileno()))             # type: ignore[attr-defined]
        known = kernel.GetConsoleMode(handle, ctypes.byref(mode))
        return bool(known and kernel.SetConsoleMode(handle, mode.value | 4))        # ENABLE_VIRTUAL_TERMINAL_PROCESSING
    except (ImportError, AttributeError, OSError, ValueError):
        return False


def columns_of(text: str) -> int:
    """How many columns of a terminal `text` takes."""
    return len(text) + len(re.findall(f"[{_WIDE}]", text))


def wrap(text: str, columns: int) -> List[str]:
    """Lines that fit, broken at blanks and beside wide characters; what is too long for a line is cut into pieces."""
    lines, line = [], ""
    for piece in re.findall(rf"\s+|[{_WIDE}][，。；：、？！）]*|[^\s{_WIDE}]+[，。；：、？！）]*", text):
        if columns_of(line + piece.rstrip()) <= columns:
            line += piece
            continue
        if line.strip():
            lines.append(line.rstrip())
        line = piece.lstrip()
        while columns_of(line) > columns:
            lines.append(line[:columns])
            line = line[columns:]
    return lines + [line.rstrip()] if line.strip() or not lines else lines


def cut_to(text: str, columns: int) -> str:
    """`text`, its end cut off where it takes more columns."""
    if columns_of(text) <= columns:
        return text
    while text and columns_of(text) > columns - 3:
        text = text[:-1]
    return text + "..."


def lay_out(rows: Sequence[Sequence[str]], columns: int, label_colour: str = "", width: int = 0) -> List[str]:
    """Rows of label and text (and a colour) as aligned lines; too wide a label gets a line of its own."""
    width = width or min(max([columns_of(row[0]) for row in rows] + [0]), max(columns // 3, 12))
    lines = []
    for label, text, *colour in rows:
        own_line = columns_of(label) > width
        if own_line:
            lines.append("  " + CONSOLE.paint(label, label_colour))
        for number, part in enumerate(wrap(text, columns - width - 4)):
            head = "" if own_line or number else label
            padded = "  " + CONSOLE.paint(head, label_colour) + " " * (width - columns_of(head) + 2)
            lines.append((padded + CONSOLE.paint(part, colour[0] if colour else "")).rstrip())
    return lines


def _say(text: str) -> None:
    """Talk goes to stderr; stdout is for the answer."""
    print(text, file=sys.stderr, flush=True)


def _near(name: str, names: Iterable[str]) -> str:
    """What a mistyped name may have meant, as the end of a sentence."""
    near = near_names(name, names)
    return tr("near", names=tr("or").join(near)) if near else ""


def _expected(name: str) -> str:
    """What a setting may be, in words."""
    facts = SETTING[name].metadata
    if "choices" in facts:
        return tr("kind_choice", choices=", ".join(choice or '""' for choice in facts["choices"]))
    limits = tr("between", **facts) if "high" in facts else tr("at_least", **facts) if "low" in facts else ""
    return tr("kind_" + facts["kind"]) + limits


def _parse_for(where: str, name: str, text: str) -> Any:
    """`text` as a value of the setting `name`; UsageError says what `where` takes instead."""
    try:
        return parse_setting(name, text)
    except ValueError as exc:
        facts = SETTING[name].metadata
        if facts.get("secret") or facts["kind"] in ("list", "dict") and text.lstrip()[:1] in ("[", "{"):
            raise UsageError(f"{where}: {exc}") from None        # which part of it, and why
        shown = one_line(text, 60) or '""'
        raise UsageError(tr("bad_value", where=where, value=shown, expected=_expected(name))) from None


def _read_key(text: str) -> str:
    """A key given on the command line: `$NAME`, `-` for standard input, or itself, with a warning."""
    if text == "-":
        text = sys.stdin.readline().strip()
        if not text:
            raise UsageError(tr("key_no_input"))
        return text
    if not text.startswith("$"):
        _say(tr("warning", text=tr("key_shown")))
        return text
    if not os.environ.get(text[1:]):
        raise UsageError(tr("key_undefined", name=text, variable=text[1:], verb="set" if os.name == "nt" else "export"))
    return os.environ[text[1:]]


def _flag_settings(args: Any) -> Json:
    """The settings that flags of this run stand for; UsageError for a bad one."""
    flags: Json = {}
    for name, item in SETTING.items():
        value = getattr(args, name, None)
        if value is not None and "flag" in item.metadata:
            flags[name] = _parse_for(item.metadata["flag"], name, value)
    key = _read_key(args.api_key) if getattr(args, "api_key", None) else ""
    if getattr(args, "verbose", False):
        flags["log_level"] = "debug"
    if getattr(args, "upstream", None):
        entry = {**entry_at(args.upstream), "name": "upstream",
                 "api_keys": ["$" + key if key.startswith("$") else key] if key else []}
        problem = parse_provider(entry, {}).problem
        if problem:
            raise UsageError(f"--upstream: {problem}")
        flags.update(providers=[entry], aliases={}, default_provider="upstream", api_key="")
    elif key:
        flags["api_key"] = key
    return flags


def _config_of(args: Any) -> ConfigFile:
    return ConfigFile(args.config_dir or os.environ.get(ENV_PREFIX + "CONFIG_DIR") or CONFIG_DIR)


def _gateway_of(args: Any) -> Gateway:
    return Gateway(config=_config_of(args), flags=_flag_settings(args))


# --- serve -------------------------------------------------------------------

def cmd_serve(args: Any) -> int:
    _log_to_console()
    if args.demo and (args.upstream or args.api_key):
        raise UsageError("--demo brings its own upstream: leave out --upstream and --api-key")
    demo = DemoUpstream() if args.demo else None
    gateway = Gateway(config=_config_of(args), flags={**(demo.settings() if demo else {}), **_flag_settings(args)})
    _log_to_file(gateway)
    had_key = gateway.state.door.required
    host, port = gateway.settings.host, gateway.settings.port
    try:
        server = serve(gateway)
    except OSError as exc:
        _say(tr("error", text=_bind_problem(host, port, exc)))
        return 1
    stopping = _heed_signals(gateway)
    print(f"iflow2api {__version__} listening on {server.url}", flush=True)
    _say("\n".join(["", *_card(gateway, server, had_key), ""]))
    _show_page(gateway, server, args.no_browser)
    gateway.watch_files()
    while not stopping.wait(1 if os.name == "nt" else 3600):     # Windows: Ctrl-C does not end an endless wait
        pass
    _say(tr("stopping", seconds=gateway.settings.drain_s))
    server.close(gateway.settings.drain_s)
    if demo is not None:
        demo.close()
    return 0


def _show_page(gateway: Gateway, server: Server, stay: bool) -> None:
    """Open the page at the first start, where somebody sees it; from now on, no password any more means a new code."""
    said = [gateway.sessions.code()]

    def say_code() -> None:
        code = gateway.sessions.code()
        if code not in ("", said[0]):
            said[0] = code
            _say(tr("page_code", code=code))

    gateway.listeners.append(say_code)
    if said[0] and not stay and sys.stdout.isatty():
        threading.Thread(target=open_browser, args=(server.url + "/admin", os.environ), daemon=True).start()


def _bind_problem(host: str, port: int, exc: OSError) -> str:
    """Why the address can't be had, in one line, with a port that can."""
    if exc.errno not in (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", -1)):
        return tr("cannot_listen", host=host, port=port, reason=exc.strerror or exc)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host.strip("[]"), 0))
        free = probe.getsockname()[1]
    return tr("port_taken", host=host, port=port, free=free)


#: The card names this many providers.
CARD_PROVIDERS = 8


def _card(gateway: Gateway, server: Server, had_key: bool) -> List[str]:
    """What somebody who has just started it has to know, in the lines of a narrow terminal."""
    rows = [(tr("address"), server.url, "green"), *_card_providers(gateway.state.router, CONSOLE.columns - 14),
            *_card_access(gateway, had_key)]
    rows.append((tr("page"), server.url + "/admin", ""))
    if gateway.sessions.is_new:
        rows.append(("", tr("page_code", code=gateway.sessions.code()), "bold"))
    problems = [problem for problem in gateway.problems if not problem.startswith("provider ")]      # these stand above
    rows += [(tr("problems"), one_line(problem, 200), "yellow") for problem in problems[:1]]
    step, *rest = _next_step(gateway, server).split("\n")
    rows += [(tr("next"), step, "bold"), *(("", line, "bold") for line in rest)]
    return lay_out(rows, CONSOLE.columns, "dim")


def _card_providers(router: Router, room: int) -> List[Tuple[str, str, str]]:
    rows = []
    for provider in list(router.providers.values())[:CARD_PROVIDERS]:
        mark = tr("default") if provider is router.default else ""
        if provider.problem:
            rows.append(("", f"{provider.name}{mark}  {tr('disabled', problem=one_line(provider.problem))}", "yellow"))
        else:
            rows.append(("", cut_to(f"{provider.name}{mark}  {provider.base_url}", room), ""))
    if len(router.providers) > CARD_PROVIDERS:
        rows.append(("", tr("more", count=len(router.providers) - CARD_PROVIDERS), ""))
    rows = rows or [("", tr("none"), "yellow")]
    return [(tr("providers"), *rows[0][1:]), *rows[1:]]


def _card_access(gateway: Gateway, had_key: bool) -> List[Tuple[str, str, str]]:
    """Who may use it, and whether we are logged in at iFlow.  A key made just now is shown once, in full."""
    key = gateway.settings.custom_api_key
    if key and not had_key:
        rows = [(tr("clients"), tr("new_key", host=gateway.settings.host), ""), ("", key, "bold")]
    else:
        rows = [(tr("clients"), tr("key_needed", key=mask(key)) if key else tr("no_key"), "")]
    if gateway.health()["iflow_logged_in"]:
        rows.append((tr("login"), tr("logged_in"), ""))
    elif "login" in COMMANDS:
        rows.append((tr("login"), tr("not_logged_in"), ""))
    return rows


def _next_step(gateway: Gateway, server: Server) -> str:
    """The one thing to do now."""
    providers = gateway.state.router.providers.values()
    if not providers:
        return tr("next_preset") if "provider" in COMMANDS else tr("next_provider")
    if all(provider.problem for provider in providers):
        return tr("next_repair")
    return tr("next_client", url=server.url)


def _heed_signals(gateway: Gateway) -> threading.Event:
    """Set at the first SIGINT or SIGTERM; a second one ends the process at once, SIGHUP reloads."""
    stopping = threading.Event()

    def stop(number: int, frame: Any) -> None:
        if stopping.is_set():
            os._exit(130)
        stopping.set()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda number, frame: gateway.reload())
    return stopping


_LEVEL_COLOURS = {logging.DEBUG: "dim", logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _ConsoleFormat(logging.Formatter):
    """`12:00:01 text`, with the level in front of what is not news."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else record.levelname.lower() + ": "
        text = f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"
        text += "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return CONSOLE.paint(text, _LEVEL_COLOURS.get(record.levelno, ""))


def _log_to_console() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_ConsoleFormat())
    log.handlers[:] = [handler]
    logging.raiseExceptions = False      # a console that is gone must not end a request


# --- the log file ------------------------------------------------------------

#: log_file is followed by a new one at this size, and so many older ones are kept: routers have little flash.
LOG_FILE_BYTES = 2 << 20
LOG_FILES_KEPT = 2

LOG_LEVELS = ("debug", "info", "warning", "error")

#: A line of log_file begins like this; one that does not (a traceback) belongs to the one before.
_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ([A-Z]+) ")


class _FileFormat(logging.Formatter):
    """`2026-01-31 12:00:01 WARNING text`, without what looks like a credential."""

    def format(self, record: logging.LogRecord) -> str:
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return redact(f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')} {record.levelname} {record.getMessage()}{trace}")


def _log_to_file(gateway: Gateway) -> None:
    """Log to log_file as well, if it is set; what was wrong with the settings is noted there, too."""
    path = log_path(gateway)
    if not path:
        return
    try:
        handler = _open_log(path)
    except OSError as exc:
        return _say(tr("warning", text=tr("no_log", path=path, reason=exc.strerror or exc)))
    log.addHandler(handler)
    notes = [(logging.INFO, f"iflow2api {__version__} starts")]
    for level, text in notes + [(logging.WARNING, one_line(problem, 500)) for problem in gateway.problems]:
        handler.handle(log.makeRecord(log.name, level, "", 0, text, (), None))


def _open_log(path: str) -> logging.Handler:
    """The handler that writes `path`, for its owner alone, and keeps it from growing; OSError."""
    from logging.handlers import RotatingFileHandler     # takes 1 MB: only for who wants a file

    class PrivateFile(RotatingFileHandler):
        def _open(self) -> Any:
            return open(self.baseFilename, self.mode, encoding="utf-8", errors="backslashreplace",
                        opener=lambda name, flags: os.open(name, flags, 0o600))

    os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
    handler = PrivateFile(path, maxBytes=LOG_FILE_BYTES, backupCount=LOG_FILES_KEPT, encoding="utf-8")
    handler.setFormatter(_FileFormat())
    return handler


class LogReader:
    """Lines of a log at a level or above.  The file is open for moments only: Windows can't rotate an open one."""

    def __init__(self, path: str, level: str) -> None:
        self.path, self._wanted = path, {name.upper() for name in LOG_LEVELS[LOG_LEVELS.index(level):]} | {"CRITICAL"}
        self._offset, self._inode, self._rest, self._shown = 0, 0, b"", True

    def tail(self, count: int) -> List[str]:
        """The last `count` lines there are, some perhaps from the file before; OSError where there is no file."""
        lines: List[str] = []
        if os.path.exists(self.path + ".1"):
            older = LogReader(self.path + ".1", "debug")
            older._wanted = self._wanted
            lines = older.fresh()
        lines += self.fresh()
        return lines[-count:] if count else []

    def fresh(self) -> List[str]:
        """The whole lines that came since the last call."""
        with open(self.path, "rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_ino != self._inode or facts.st_size < self._offset:      # another file, or it was emptied
                self._offset, self._rest = 0, b""
            self._inode = facts.st_ino
            file.seek(self._offset)
            data = file.read(2 * LOG_FILE_BYTES)
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line for line in (part.decode("utf-8", "replace").rstrip("\r") for part in whole) if self._wants(line)]

    def _wants(self, line: str) -> bool:
        found = _LOG_LINE.match(line)
        if found:
            self._shown = found.group(1) in self._wanted
        return self._shown


def cmd_logs(args: Any) -> int:
    path = log_path(_gateway_of(args))
    if not path:
        _say(tr("log_unset"))
        return 1
    reader = LogReader(path, args.level)
    try:
        lines = reader.tail(args.lines)
    except OSError as exc:
        _say(tr("log_missing", path=path, reason=exc.strerror or exc))
        return 1
    pause = threading.Event()
    while True:
        for line in lines:
            print(_CONTROL.sub(" ", line), flush=True)
        if not args.follow:
            return 0
        pause.wait(0.3)
        with contextlib.suppress(OSError):           # between two files there is none
            lines = reader.fresh()


# --- asking ------------------------------------------------------------------

def cmd_status(args: Any) -> int:
    gateway = _gateway_of(args)
    settings, router = gateway.settings, gateway.current().router
    health = _ask_running(settings)
    running = "not running"
    if health:
        running = f"running, {health.get('status')}, version {health.get('version')}, {health.get('in_flight')} in flight"
    print(f"server    http://{settings.host}:{settings.port}  {running}")
    print(f"config    {gateway.config.path if gateway.config else '-'}")
    for provider in router.providers.values():
        keys = ", ".join(map(mask, provider.api_keys)) or "no key"
        print(f"provider  {provider.name}{' (default)' if provider is router.default else ''}  {provider.problem or provider.base_url}"
              f"  {keys if not provider.problem else ''}{_rest_of(health, provider.name)}".rstrip())
    for account, login in {**gateway.login_report(), **(health or {}).get("logins", {})}.items():
        print(one_line(_login_line(account, login)))
    if not router.providers:
        print("provider  none; run `login` for iFlow, add one to `providers`, or start with --upstream URL")
    for variable, names in offered_presets(router, os.environ).items():
        either = " (or ".join(names) + ")" * (len(names) > 1)
        print(f"offer     {variable} is set: python iflow2api.py provider add {either}")
    for problem in gateway.problems:
        print(f"problem   {one_line(problem, 300)}")
    return 0 if health else 1


def _rest_of(health: Optional[Json], name: str) -> str:
    """What the running server says of a provider that is not quite well."""
    listed = health.get("providers") if health else None
    facts = next((p for p in listed or () if isinstance(p, dict) and p.get("name") == name), {})
    circuit, resting = facts.get("circuit", "closed"), facts.get("keys_resting", 0)
    words = {"open": "  keeps failing, rests", "half-open": "  kept failing, is tried again"}.get(circuit, "")
    return words + (f"  {resting} of its keys rest" if resting else "")


def _ask_running(settings: Settings) -> Optional[Json]:
    """/health of the server that these settings describe, None where none answers."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    connection = http.client.HTTPConnection(host, settings.port, timeout=2)
    try:
        connection.request("GET", "/health")
        value = json.loads(connection.getresponse().read(1 << 20))
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return value if isinstance(value, dict) and "iflow_logged_in" in value else None


def cmd_models(args: Any) -> int:
    gateway = _gateway_of(args)
    models = gateway.models()
    for model in models:
        print(f"{model['id']}  ({model['owned_by']})")
    if not models:
        _say("no models known: " + ("; ".join(gateway.problems)
                                    or "no provider lists any; `status` shows the providers"))
    return 0 if models else 1


def cmd_test(args: Any) -> int:
    """One tiny real request to each provider, or to the one named."""
    gateway = _gateway_of(args)
    providers = gateway.current().router.providers
    if args.provider and args.provider not in providers:
        raise UsageError(f"there is no provider {args.provider!r}" + nearest(args.provider, providers))
    if not providers:
        _say("no provider to test: add one to `providers`, or give --upstream URL")
        return 1
    failed = 0
    for name in [args.provider] if args.provider else providers:
        ok, line = _probe(gateway, providers[name])
        failed += not ok
        print(f"{name}: {line}")
    return 1 if failed else 0


def _probe(gateway: Gateway, provider: Provider) -> Tuple[bool, str]:
    """Whether a one-word chat works, and a line that says so or why not."""
    started = time.monotonic()
    try:
        model = model_to_try(gateway, provider)
        message = ask_provider(gateway, provider, model)
    except GatewayError as exc:
        return False, f"failed ({exc.status}): {one_line(exc.message, 400)}"
    said = one_line(message.get("content") or reasoning_of(message), 40)
    return True, f"ok, {model} answered in {time.monotonic() - started:.1f} s: {said}"


# --- providers ---------------------------------------------------------------

def cmd_provider(args: Any) -> int:
    return {"list": _provider_list, "add": _provider_add, "remove": _provider_remove, "test": _provider_test,
            "presets": _provider_presets}[args.action or "list"](args)


def offered_presets(router: Router, environ: Mapping[str, str]) -> Dict[str, List[str]]:
    """Variable -> presets that it holds the key of, where it is set and none of them is there yet."""
    known = {provider.base_url for provider in router.providers.values()}
    found: Dict[str, List[str]] = {}
    for name, preset in PRESETS.items():
        if preset.key and environ.get(preset.key):
            found.setdefault(preset.key, []).append(name)
    return {variable: names for variable, names in found.items()
            if not known.intersection(PRESETS[name].base_url for name in names)}


def _provider_list(args: Any) -> int:
    router = _gateway_of(args).current().router
    for provider in router.providers.values():
        mark = " (default)" if provider is router.default else ""
        keys = ", ".join(map(mask, provider.api_keys)) or "no key"
        facts = f"{provider.base_url}  {keys}  {len(provider.models)} models"
        print(f"{provider.name}{mark}  {provider.problem or facts}")
    for problem in router.problems:
        _say(f"problem: {one_line(problem, 300)}")
    if not router.providers:
        _say("no provider yet: `provider add NAME` with a name of `provider presets`, or with any and --base-url URL")
    return 0


def _provider_presets(args: Any) -> int:
    if args.name:
        return _show_preset(args.name)
    for name, preset in PRESETS.items():
        state = " (set)" if os.environ.get(preset.key) else ""
        print(f"{name:<15} {preset.base_url:<56} {preset.key and '$' + preset.key + state or 'no key'}")
    _say("add one with: python iflow2api.py provider add NAME --api-key '$VARIABLE'")
    return 0


def _show_preset(name: str) -> int:
    preset = _preset(name)
    print(f"{name}  {preset.base_url}  {preset.key and '$' + preset.key or 'no key'}")
    for model, context, limit, vision in preset.models:
        print(f"  {model:<36} context {context or '?'}  output {limit or '?'}{'  images' if vision else ''}")
    return 0


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}{nearest(name, PRESETS)} (`provider presets` lists them; "
                         "any other server needs --base-url URL)")
    return PRESETS[name]


def _stored_key(text: str, variable: str) -> str:
    """A key as config.json is to hold it: `$NAME` stays `$NAME`, so that the secret itself is not in the file."""
    if not text:
        raise UsageError("--api-key is empty: the shell has replaced the variable; put it in single quotes: "
                         f"'${variable or 'NAME'}'")
    if re.fullmatch(r"\$[A-Za-z_]\w*", text):
        if not os.environ.get(text[1:]):
            _say(f"note: {text[1:]} is not set here; set it where the server starts")
        return text
    key = _read_key(text) if not text.startswith("$") else text
    return "$" + key if text == "-" and key.startswith("$") else key


def _new_provider(args: Any) -> Json:
    """The entry that the flags of `provider add` describe; UsageError."""
    if not args.name:
        raise UsageError("provider add needs a NAME: one of `provider presets`, or any with --base-url URL")
    preset = _preset(args.preset or args.name) if args.preset or args.name in PRESETS or not args.base_url else None
    entry = entry_for(args.name, args.kind, args.base_url or "", preset,
                      filter(None, map(str.strip, (args.models or "").split(","))))
    variable = preset.key if preset else ""
    key = args.api_key if args.api_key is not None else "$" + variable if variable else None
    entry["api_keys"] = [] if key is None else [_stored_key(key, variable)]
    literal = [key for key in entry["api_keys"] if not re.fullmatch(r"\$\w+", key)]
    try:
        provider = parse_provider({**entry, "api_keys": literal}, os.environ)
    except ValueError as exc:
        raise UsageError(f"provider add: {exc}") from None
    if provider.problem:
        raise UsageError(f"provider add {args.name}: {provider.problem}")
    if args.base_url and provider.base_url != args.base_url.strip():
        _say(f"base_url {args.base_url} is taken as {provider.base_url}")
    return {"name": args.name, **entry, "base_url": provider.base_url}


def _provider_add(args: Any) -> int:
    entry = _new_provider(args)

    def add(raw: Json) -> None:
        providers = _raw_providers(raw)
        if any(isinstance(known, dict) and known.get("name") == args.name for known in providers):
            raise UsageError(f"there is a provider {args.name} already; `provider remove {args.name}` first, "
                             "or choose another NAME")
        raw["providers"] = providers + [entry]

    failed = _change_config(args, add)
    if not failed:
        _say(f"added {args.name} ({entry['base_url']}); try it: python iflow2api.py provider test {args.name}")
    return failed


def _provider_remove(args: Any) -> int:
    if not args.name:
        raise UsageError("provider remove needs a NAME; `provider list` shows them")

    def remove(raw: Json) -> None:
        providers = _raw_providers(raw)
        names = [known.get("name") for known in providers if isinstance(known, dict)]
        if args.name not in names:
            raise UsageError(f"config.json has no provider {args.name!r}" + nearest(args.name, filter(None, names)))
        raw["providers"] = [known for known in providers
                            if not isinstance(known, dict) or known.get("name") != args.name]
        if raw.get("default_provider") == args.name:
            del raw["default_provider"]

    return _change_config(args, remove)


def _raw_providers(raw: Json) -> List[Any]:
    providers = raw.get("providers", [])
    if not isinstance(providers, list):
        raise UsageError("`providers` in config.json is no list; see `config unset providers`")
    return providers


def _provider_test(args: Any) -> int:
    """One line for each provider: what works, what does not, and why."""
    gateway = _gateway_of(args)
    providers = gateway.current().router.providers
    if args.name and args.name not in providers:
        hint = f"; add it first: provider add {args.name}" if args.name in PRESETS else nearest(args.name, providers)
        raise UsageError(f"there is no provider {args.name!r}{hint}")
    if not providers:
        _say("no provider to test: add one with `provider add NAME`")
        return 1
    failed = 0
    for name in [args.name] if args.name else providers:
        checks = examine(gateway, providers[name])
        broken = next((check.message for check in checks[:3] if check.ok is False), "")
        said = f"does not work, {broken}" if broken else ", ".join(c.message for c in checks if c.message)
        print(f"{name}: {said}")
        failed += any(not check.ok for check in checks)
    return 1 if failed else 0


def cmd_version(args: Any) -> int:
    print(f"iflow2api {__version__} (Python {sys.version.split()[0]}, {sys.platform})")
    return 0


# --- env ---------------------------------------------------------------------

def cmd_env(args: Any) -> int:
    """Shell lines that point a client at this server: eval "$(python iflow2api.py env claude)"."""
    gateway = _gateway_of(args)
    settings, router = gateway.settings, gateway.current().router
    if not settings.port:
        raise UsageError("the server takes a free port at each start (port 0): say with --port which one it has printed")
    if _ask_running(settings) is None:
        _say(f"no iflow2api answers at {url_of(settings.host, settings.port)} now; if it runs elsewhere, say so with "
             "--host and --port")
    key = settings.custom_api_key or ("$IFLOW2API_KEY" if settings.client_keys else "not-needed")
    words = {"URL": url_of(settings.host, settings.port), "KEY": key, "MODEL": router.default_model,
             **claude_words(router, args.default_model or "")}
    if args.json:
        if key == "$IFLOW2API_KEY":
            _say("put a key instead of YOUR_KEY; `key add NAME` makes one")
            words["KEY"] = "YOUR_KEY"
        print(json_text({"env": env_values(args.client, words)}))
    else:
        print("\n".join(env_lines(args.client, SHELLS[args.shell or _guess_shell()], words)))
    return 0


def _guess_shell() -> str:
    if os.name == "nt":
        return "powershell" if os.environ.get("PSModulePath") else "cmd"
    return "fish" if os.path.basename(os.environ.get("SHELL", "")) == "fish" else "bash"


# --- logging in ----------------------------------------------------------------

def cmd_login(args: Any) -> int:
    """Log in by the browser, or store a key."""
    gateway = Gateway(config=_config_of(args))
    try:
        if args.api_key:
            return _store_key(gateway, args)
        paste = args.paste
        found = gateway.logins.start(args.account or "", paste, args.timeout)
        _say("open this address in a browser to log in to iFlow:")
        print(found["url"], flush=True)
        if not paste and not args.no_browser and not open_browser(found["url"], os.environ):
            _say("no browser was found here: open the address yourself; for a browser elsewhere there is login --paste")
        return _wait_for_login(gateway, paste)
    except LoginFailed as exc:
        _say(f"error: {exc.message}")
        return 1
    except KeyboardInterrupt:
        _say("login given up; nothing was changed")
        return 130
    finally:
        gateway.close()


def _wait_for_login(gateway: Gateway, paste: bool) -> int:
    """Wait for the browser, or for an address at the terminal, until the login has ended."""
    flow = gateway.logins.flow
    if flow is None:
        return 1
    if paste or sys.stdin is not None and sys.stdin.isatty():
        _say("after logging in the browser ends on an address that begins with http://localhost; "
             + ("it need not show a page: paste that address here" if paste else "if it shows no page, paste it here"))
        threading.Thread(target=_read_pastes, args=(flow, sys.stdin.fileno(), paste), name="paste", daemon=True).start()
    while not flow.ended.wait(0.5):      # Windows: Ctrl-C does not end an endless wait
        pass
    _say(flow.message.partition(";")[0] if flow.state == "done" else f"error: {flow.message}")
    if flow.state != "done":
        return 1
    _say(f"stored in {flow.file.path}; a running server takes it over by itself")
    above = _above_login(gateway) if flow.file.is_default else ""
    if above:
        _say(f"warning: {above} is set, too, and stands above this login")
    return 0


def _read_pastes(flow: LoginFlow, fd: int, final: bool) -> None:
    """Hand what is typed to the login, line by line.  os.read: at exit a thread in sys.stdin would end in a crash."""
    typed = b""
    while not flow.ended.is_set():
        try:
            data = os.read(fd, 4096)
        except OSError:
            data = b""
        typed += data if data else b"\n"
        *lines, typed = typed.split(b"\n")
        for line in filter(None, (line.decode("utf-8", "replace").strip() for line in lines)):
            try:
                flow.paste(line)
            except LoginFailed as exc:
                _say(f"error: {exc.message}")
        if not data:
            return flow.fail("the input ended before the login did; nothing was changed") if final else None


def _above_login(gateway: Gateway) -> str:
    """What gives iFlow another key than the CLI's file does."""
    return next((name for name in IFLOW_KEY_VARIABLES if os.environ.get(name)), "") or (
        (ENV_PREFIX + "API_KEY" if gateway.origins.get("api_key") == "environment" else "api_key in config.json")
        if gateway.settings.api_key else "")


def _store_key(gateway: Gateway, args: Any) -> int:
    """`login --api-key`: into our own file, where it is kept encrypted."""
    key = _read_key(args.api_key)
    if not account_keys({"": {"apiKey": key}}):
        raise UsageError("--api-key: a key has no blanks, line breaks or characters beyond ASCII")
    if args.account and args.account != DEFAULT_ACCOUNT:
        file = LoginFile(args.account, gateway.config)
        with file.held():
            file.update({**dict.fromkeys(LOGIN_FIELDS), "apiKey": key})
        _say(f"stored the key {mask(key)} as account {args.account} in {file.path}")
        return 0
    return _change_config(args, lambda raw: raw.update(api_key=key))


def cmd_logout(args: Any) -> int:
    """Take the login away, and nothing else of the file it is in."""
    gateway = Gateway(config=_config_of(args))
    account = args.account or DEFAULT_ACCOUNT
    if account != DEFAULT_ACCOUNT and account not in gateway.settings.accounts:
        raise UsageError(f"there is no account {account!r}" + nearest(account, gateway.settings.accounts))
    try:
        gone = remove_login(gateway, account)
    except (LoginFailed, ConfigBroken, OSError) as exc:
        _say(f"error: {exc}")
        return 1
    finally:
        gateway.close()
    _say(f"logged out ({account})" if gone else f"there was no login to remove ({account})")
    return 0


def _login_line(account: str, login: Json) -> str:
    """A login for `status`."""
    state = "ended: run python iflow2api.py login" if login.get("ended") else \
        f"until {login['expires_at']}" if login.get("expires_at") else "end unknown"
    last = ""
    if login.get("refreshed_at"):
        last = f"  last refresh {login['refreshed_at']} {'ok' if login.get('refresh_ok') else 'failed'}"
    message = f" ({login['message']})" if login.get("message") else ""
    return f"login     {account}  {state}{'' if login.get('renewable') else '  not refreshable'}{last}{message}"


# --- config ------------------------------------------------------------------

def cmd_config(args: Any) -> int:
    return {"list": _config_list, "get": _config_get, "set": _config_set, "unset": _config_unset,
            "path": _config_path, "encrypt": _config_encrypt}[args.action or "list"](args)


def _setting_name(args: Any) -> str:
    if not args.key:
        raise UsageError(tr("config_no_key", action=args.action))
    if args.key not in SETTING:
        raise UsageError(tr("no_setting", name=args.key, near=_near(args.key, SETTING)))
    return args.key


def _shown(name: str, value: Any, args: Any) -> str:
    value = value if args.show_secrets else hide_secrets(name, value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _config_list(args: Any) -> int:
    gateway = _gateway_of(args)
    for name in SETTING:
        origin = gateway.origins.get(name)
        shown = _shown(name, getattr(gateway.settings, name), args)
        print(f"{name} = {shown}" + (f"    # {origin}" if origin else ""))
    for problem in gateway.problems:
        _say(f"problem: {one_line(problem, 300)}")
    return 0


def _config_get(args: Any) -> int:
    name = _setting_name(args)
    print(_shown(name, getattr(_gateway_of(args).settings, name), args))
    return 0


def _config_set(args: Any) -> int:
    name = _setting_name(args)
    if args.value is None:
        raise UsageError(tr("config_no_value", name=name))
    facts = SETTING[name].metadata
    text = _read_key(args.value) if facts.get("secret") and args.value[:1] in ("-", "$") else args.value
    value = _parse_for(f"config set {name}", name, text)
    if name == "upstream_proxy":
        _check_proxy(args, value)
    if name in ("providers", "aliases"):                 # with all the rest as it is: aliases name providers
        gateway = _gateway_of(args)
        known = gateway.state.router.problems
        problems = [p for p in gateway.routed(replace(gateway.settings, **{name: value})).problems if p not in known]
        if problems:
            raise UsageError(f"config set {name}: {problems[0]}")
    return _change_config(args, lambda raw: raw.update({name: value}))


def _check_proxy(args: Any, proxy: str) -> None:
    """UsageError for one that can't work; a hint where the switch is still off."""
    problems = proxy_problems(Settings(upstream_proxy=proxy, upstream_proxy_enabled=True), ())
    if problems:
        raise UsageError(problems[0])
    if proxy and not _gateway_of(args).settings.upstream_proxy_enabled:
        _say(tr("proxy_is_off"))


def _config_unset(args: Any) -> int:
    name = args.key or _setting_name(args)               # a key we do not know may be removed, too
    if name not in SETTING and name not in _config_of(args).recover()[0]:
        return _setting_name(args) and 2
    return _change_config(args, lambda raw: raw.pop(name, None))


def _change_config(args: Any, edit: Callable[[Json], Any]) -> int:
    config = _config_of(args)
    try:
        config.change(edit)
    except OSError as exc:
        _say(tr("error", text=tr("cannot_write", path=config.path, reason=exc.strerror or exc)))
        return 1
    _say(tr("saved", path=config.path))
    return 0


def _config_encrypt(args: Any) -> int:
    """`on`, `off`, `rotate`; without, how it stands."""
    config = _config_of(args)
    mode = args.key or ""
    if mode not in ("", "on", "off", "rotate"):
        raise UsageError(f"config encrypt {mode}: one of on, off, rotate expected")
    try:
        if not mode:
            gateway = _gateway_of(args)
            print("on" if gateway.settings.encrypt_secrets else "off")
            locked = config.locked or (gateway.config.locked if gateway.config else [])
        else:
            locked = config.encrypt(mode)
            _say({"on": "secrets in {} are encrypted", "off": "secrets in {} are plain text now",
                  "rotate": "secrets in {} are encrypted with a new key"}[mode].format(config.path))
    except (OSError, ConfigBroken, SealBroken) as exc:
        _say(f"error: {getattr(exc, 'strerror', None) or exc}")
        return 1
    for problem in locked:
        _say(f"problem: {one_line(problem, 300)} (left as it is)")
    return 1 if locked else 0


def _config_path(args: Any) -> int:
    print(_config_of(args).path)
    return 0


# --- the page's password --------------------------------------------------------

def cmd_admin(args: Any) -> int:
    """`admin reset-password`: a running server takes it over, and ends the sessions of before."""
    if args.password not in (None, "-"):
        raise UsageError(tr("password_shown"))
    password = sys.stdin.readline().rstrip("\r\n") if args.password else _ask_password()
    try:
        stored = hash_password(password)
    except ValueError:
        least, most = PASSWORD_LENGTH
        raise UsageError(tr("password_length", least=least, most=most)) from None
    failed = _change_config(args, lambda raw: raw.update(admin_password=stored))
    if not failed:
        _say(tr("password_set"))
    if os.environ.get(ENV_PREFIX + "ADMIN_PASSWORD"):
        _say(tr("warning", text=tr("password_above", variable=ENV_PREFIX + "ADMIN_PASSWORD")))
    return failed


def _ask_password() -> str:
    """A password typed twice at the terminal, unseen."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(tr("no_terminal"))
    import getpass
    password = getpass.getpass(tr("new_password"))
    if password != getpass.getpass(tr("same_again")):
        raise UsageError(tr("not_the_same"))
    return password


# --- routes, keys, usage -------------------------------------------------------

def cmd_routes(args: Any) -> int:
    """`routes explain MODEL`: where the name goes, and why."""
    asked: Json = {name: getattr(args, name) for name in ("images", "thinking", "tools")}
    if not re.fullmatch(r"\d{1,12}", args.tokens):
        raise UsageError(f"--tokens {args.tokens}: a whole number expected")
    asked.update(model=args.name, dialect=args.dialect, tokens=int(args.tokens))
    gateway = _gateway_of(args)
    try:
        told = gateway.explain(asked)
    except GatewayError as exc:
        _say(f"error: {exc.message}")
        return 1
    if args.json:
        print(json.dumps(told, ensure_ascii=False, indent=2))
        return 0
    for number, step in enumerate(told["steps"], 1):
        print(f"{number}. {one_line(step, 500)}")
    for number, target in enumerate(told["chain"]):
        state = one_line(target["problem"]) or f"{target['base_url']}  {target['keys']} key{'s' if target['keys'] != 1 else ''}"
        print(f"{'then' if number else '=>'} {target['provider']}/{one_line(target['model'])}  {state}")
    for problem in gateway.problems:
        _say(f"problem: {one_line(problem, 300)}")
    return 0


def cmd_key(args: Any) -> int:
    return {"list": _key_list, "add": _key_add, "remove": _key_remove}[args.action or "list"](args)


def _key_name(args: Any) -> str:
    if not args.name:
        raise UsageError(f"key {args.action} needs a NAME")
    return args.name


def _key_entries(config: ConfigFile) -> List[Any]:
    entries = config.recover()[0].get("client_keys")
    return entries if isinstance(entries, list) else []


def _key_add(args: Any) -> int:
    """Make a key: it is printed once, only its hash is kept."""
    name = _key_name(args)
    facts: Json = {}
    if args.models:
        facts["models"] = [model.strip() for model in args.models.split(",") if model.strip()]
    for limit in LIMIT_FIELDS:
        text = getattr(args, limit)
        if text is not None:
            facts[limit] = int(text) if re.fullmatch(r"-?\d{1,15}", text) else text
    if args.expires:
        facts["expires"] = args.expires
    entries = _key_entries(_config_of(args))
    try:
        key, entry = make_client_key(name, facts)
    except ValueError as exc:
        raise UsageError(f"key add {name}: {exc}") from None
    if any(isinstance(known, dict) and known.get("name") == name for known in entries):
        raise UsageError(f"key add {name}: there is a key of this name; remove it first, or take another name")
    if _change_config(args, lambda raw: raw.update(client_keys=[*_listed(raw), entry])):
        return 1
    print(key)
    _say("this is the only time it is shown; clients send it as `Authorization: Bearer KEY`, or as x-api-key")
    for problem in _gateway_of(args).problems:
        _say(f"problem: {one_line(problem, 300)}")
    return 0


def _listed(raw: Json) -> List[Any]:
    """The keys in config.json, which a running server or another command may have changed meanwhile."""
    return raw["client_keys"] if isinstance(raw.get("client_keys"), list) else []


def _key_remove(args: Any) -> int:
    name = _key_name(args)
    names = [entry.get("name") for entry in _key_entries(_config_of(args)) if isinstance(entry, dict)]
    if name not in names:
        raise UsageError(f"there is no key {name!r}" + nearest(name, [known for known in names
                                                                      if isinstance(known, str)]))
    failed = _change_config(args, lambda raw: raw.update(
        client_keys=[entry for entry in _listed(raw) if not isinstance(entry, dict) or entry.get("name") != name]))
    if not failed and not _gateway_of(args).state.door.required:
        _say("warning: no key is left, so whoever reaches this server's address may use it")
    return failed


def _key_list(args: Any) -> int:
    gateway = _gateway_of(args)
    used = {row["key"]: row for row in gateway.usage.report("key", 1, {})}
    for key in gateway.state.door.keys:
        row = used.get(key.name)
        facts = [f"{limit} {LIMIT_WORDS[name]}" for name, limit in key.limits.items()]
        facts += [f"models {', '.join(key.models)}"] if key.models else []
        if key.expires_at != float("inf"):
            over = "expired" if key.expires_at <= time.time() else "expires"
            facts.append(f"{over} {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(key.expires_at))}")
        facts += [f"today {row['requests']} requests, {row['input'] + row['output']} tokens"] if row else []
        print(f"{key.name}  {key.digest.hex()[:8]}  {'; '.join(facts) or 'no limits'}")
    for problem in gateway.problems:
        _say(f"problem: {one_line(problem, 300)}")
    if not gateway.settings.client_keys:
        _say("no client keys; `key add NAME` makes one")
    return 0


def cmd_usage(args: Any) -> int:
    """What was used, from usage.jsonl."""
    gateway = _gateway_of(args)
    if not re.fullmatch(r"[1-9]\d{0,3}", args.days):
        raise UsageError(f"--days {args.days}: a whole number from 1 to 9999 expected")
    rows = gateway.usage.report(args.by, int(args.days), gateway.settings.prices)
    for problem in gateway.usage.problems:
        _say(f"problem: {one_line(problem, 300)}")
    if not gateway.settings.usage:
        _say("usage is not being counted: config set usage true")
    for row in rows:
        row["cost"] = None if row["cost"] is None else round(row["cost"], 6)
    if args.json:
        print(json.dumps({"by": args.by, "days": int(args.days), "rows": rows}, ensure_ascii=False, indent=2))
        return 0
    names = [args.by, *USAGE_COUNTS, "cost"]
    print(csv_of(rows, names) if args.csv else _usage_table(args.by, rows))
    return 0


def _usage_table(by: str, rows: Sequence[Json]) -> str:
    """Aligned columns; `~` where the upstream did not count and we had to guess."""
    if not rows:
        return "nothing was used"
    costs = any(row["cost"] is not None for row in rows)
    table = [[by, "requests", "errors", "input", "output", "cached", "reasoning", "first", "total",
              *(["cost"] if costs else [])]]
    for row in rows:
        mark, count = "~" if row["estimated"] else "", row["requests"] or 1
        first = f"{row['first_ms'] / row['streams'] / 1000:.2f}s" if row["streams"] else "-"
        cost = ["-" if row["cost"] is None else f"{row['cost']:.4f}"] if costs else []
        table.append([one_line(row[by], 60) or "-", str(row["requests"]), str(row["errors"]), f"{mark}{row['input']}",
                      f"{mark}{row['output']}", str(row["cached"]), str(row["reasoning"]), first,
                      f"{row['total_ms'] / count / 1000:.2f}s", *cost])
    widths = [max(len(line[at]) for line in table) for at in range(len(table[0]))]
    lines = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
             for line in table]
    return "\n".join([*lines,
                      *(["~ in part our estimate: the upstream did not count"] if any(r["estimated"] for r in rows)
                        else [])])


# --- the parser --------------------------------------------------------------

class Command(NamedTuple):
    """A command: what runs, what it is for, its arguments as argparse takes them, and what to type for example.

    Help is (中文, English).
    """
    run: Callable[[Any], int]
    help: Union[str, Tuple[str, str]]
    arguments: Tuple[Tuple[str, Json], ...] = ()
    examples: Tuple[str, ...] = ()


#: Settings of this run that any command understands which looks at providers.
RUN_FLAGS: Tuple[Tuple[str, Json], ...] = (
    ("--upstream", {"metavar": "URL", "help": ("只用这个 OpenAI 兼容服务，不看 config.json",
                                               "use this OpenAI-compatible server alone, whatever config.json says")}),
    ("--api-key", {"metavar": "KEY", "help": ("它的密钥（或 iFlow 的）：$NAME、-（标准输入）或密钥本身",
                                              "its key, or iFlow's: $NAME, - (standard input), or the key itself")}),
    ("--model", {"metavar": "MODEL", "dest": "default_model",
                 "help": ("本次运行的 default_model", "default_model for this run")}))

SERVE_FLAGS: Tuple[Tuple[str, Json], ...] = (
    ("--host", {"metavar": "ADDR", "help": ("监听地址（127.0.0.1）", "address to listen on (127.0.0.1)")}),
    ("--port", {"metavar": "N", "help": ("端口（28000；0 为自动选择）", "port to listen on (28000; 0: a free one)")}),
    *RUN_FLAGS,
    ("--demo", {"action": "store_true", "help": ("由内置的小模型应答：不要账号，不要网络",
                                                 "answer from a small model built in: no account, no network")}),
    ("--no-browser", {"action": "store_true", "help": ("不打开网页", "do not open the page")}),
    ("--log-level", {"metavar": "LEVEL", "help": ("debug、info、warning 或 error", "debug, info, warning or error")}),
    ("--verbose", {"action": "store_true", "help": ("等于 --log-level debug", "the same as --log-level debug")}),
    ("--version", {"action": "store_true", "help": ("显示版本", "print the version")}))


def cmd_completion(args: Any) -> int:
    print(COMPLETERS[args.shell](CompletionWords()))
    return 0


COMMANDS: Dict[str, Command] = {
    "serve": Command(cmd_serve, ("运行网关（不写命令时也是它）", "run the gateway (also without any command)"), SERVE_FLAGS,
                     ("", "--port 8080", "--upstream https://api.deepseek.com --api-key '$KEY'")),
    "status": Command(cmd_status, ("是否在运行、有哪些上游、有什么问题", "is it running, with what, and what is wrong")),
    "models": Command(cmd_models, ("列出可用的模型", "list the models that can be asked for"), RUN_FLAGS),
    "test": Command(cmd_test, ("向上游发一个极小的真实请求", "one tiny real request to a provider, or to each"), (
        ("provider", {"nargs": "?", "metavar": "PROVIDER", "help": ("上游名称；不写则全部", "its name; all without")}),
        *RUN_FLAGS), ("test", "test --upstream http://127.0.0.1:11434/v1")),
    "env": Command(cmd_env, ("输出让客户端指向本服务的 shell 语句", "shell lines that point a client at this server"), (
        ("client", {"choices": tuple(CLIENTS), "metavar": "CLIENT",
                    "help": ("客户端：" + ", ".join(CLIENTS), ", ".join(CLIENTS))}),
        ("--shell", {"choices": tuple(SHELLS), "help": ("哪种 shell；不写则看 $SHELL", "for which shell; by $SHELL without")}),
        ("--host", {"metavar": "ADDR", "help": ("服务的地址", "the server's address")}),
        ("--port", {"metavar": "N", "help": ("服务的端口", "its port")}), RUN_FLAGS[2],
        ("--json", {"action": "store_true", "help": ("输出 JSON：Claude Code 的 settings.json",
                                                     "as JSON, for Claude Code's settings.json")})),
        ("env claude", "env claude --json", "env codex --shell fish")),
    "provider": Command(cmd_provider, ("管理和测试上游，查看预设", "list, add, remove and test upstreams; show the known ones"), (
        ("action", {"nargs": "?", "choices": ("list", "add", "remove", "test", "presets"),
                    "help": ("不写则为 list", "list without")}),
        ("name", {"nargs": "?", "metavar": "NAME",
                  "help": ("名称；add 时写预设名即可", "a preset's name is all that `add` needs")}),
        ("--base-url", {"metavar": "URL", "help": ("add：OpenAI 兼容服务的地址", "add: where an OpenAI-compatible server is")}),
        ("--api-key", {"metavar": "KEY", "help": ("add：'$NAME'（原样保存）、-（标准输入）或密钥",
                                                  "add: '$NAME' (stored as such), - (standard input), or the key")}),
        ("--models", {"metavar": "A,B", "help": ("add：模型，第一个为默认", "add: models it serves; the first is its default")}),
        ("--preset", {"metavar": "PRESET",
                      "help": ("add：用别的名称套用此预设", "add: take the facts of this preset under another name")}),
        ("--kind", {"choices": KINDS, "help": ("add：不写则为 openai", "add: openai without")})),
        ("provider presets", "provider add zhipu --api-key '$ZHIPU_API_KEY'", "provider test zhipu")),
    "login": Command(cmd_login, ("用浏览器登录 iFlow", "log in to iFlow in the browser"), (
        ("--paste", {"action": "store_true", "help": ("用于 SSH 和容器：粘贴浏览器最后停在的地址",
                                                      "for SSH and containers: paste the address the browser ends on")}),
        ("--no-browser", {"action": "store_true", "help": ("只显示要打开的地址", "only print the address to open")}),
        ("--api-key", {"metavar": "KEY", "help": ("改为保存此密钥：$NAME、-（标准输入）或密钥本身",
                                                  "store this key instead: $NAME, - (standard input), or itself")}),
        ("--account", {"metavar": "NAME", "help": ("另一个账号；请求在各账号间轮换",
                                                   "a further account; requests take turns among all of them")}),
        ("--timeout", {"metavar": "S", "type": float, "default": LOGIN_TIMEOUT_S,
                       "help": ("最多等待的秒数（300）", "seconds to wait (300)")})), ("login", "login --paste")),
    "logout": Command(cmd_logout, ("移除 iFlow 登录", "remove the iFlow login"), (
        ("--account", {"metavar": "NAME", "help": ("哪个账号", "of this account")}),)),
    "config": Command(cmd_config, ("查看和修改设置", "show and change settings"), (
        ("action", {"nargs": "?", "choices": ("list", "get", "set", "unset", "path", "encrypt"),
                    "help": ("不写则为 list", "list without")}),
        ("key", {"nargs": "?", "metavar": "KEY", "help": ("设置的名称", "name of a setting")}),
        ("value", {"nargs": "?", "metavar": "VALUE",
                   "help": ("新的值；列表和对象写成 JSON", "its value; lists and objects as JSON")}),
        ("--show-secrets", {"action": "store_true", "help": ("完整显示密钥", "show keys in full")})),
        ("config list", "config set port 8080", "config set upstream_proxy socks5h://127.0.0.1:1080")),
    "admin": Command(cmd_admin, ("重设管理页面的密码", "set the page's password anew"), (
        ("action", {"choices": ("reset-password",), "help": ("重设密码", "set it")}),
        ("password", {"nargs": "?", "metavar": "-", "help": ("- 表示从标准输入读取", "-: read it from standard input")})),
        ("admin reset-password", "admin reset-password - < FILE")),
    "routes": Command(cmd_routes, ("说明某个模型名会去哪里、为什么", "say where a model's name goes, and why"), (
        ("action", {"choices": ("explain",), "help": ("说明去向", "say where it goes")}),
        ("name", {"metavar": "MODEL", "help": ("模型名", "the model's name")}),
        ("--dialect", {"choices": ("chat", "messages", "responses"), "default": "chat",
                       "help": ("客户端的接口（chat）", "the client's API (chat)")}),
        ("--tokens", {"metavar": "N", "default": "0", "help": ("请求的大小", "size of the request")}),
        ("--images", {"action": "store_true", "help": ("带有图片", "it shows an image")}),
        ("--thinking", {"action": "store_true", "help": ("要求思考", "it asks for reasoning")}),
        ("--tools", {"action": "store_true", "help": ("提供工具", "it offers tools")}),
        ("--json", {"action": "store_true", "help": ("输出 JSON", "as JSON")}), *RUN_FLAGS),
        ("routes explain claude-sonnet-4 --dialect messages",)),
    "key": Command(cmd_key, ("客户端的密钥，各有模型和限额", "keys of clients: each with its models and limits"), (
        ("action", {"nargs": "?", "choices": ("list", "add", "remove"), "help": ("不写则为 list", "list without")}),
        ("name", {"nargs": "?", "metavar": "NAME", "help": ("密钥的名称", "name of the key")}),
        ("--models", {"metavar": "A,B", "help": ("可用的模型或模式", "models it may use, or patterns")}),
        *((f"--{name}", {"metavar": "N", "help": (f"{name} 上限", f"most {words}")}) for name,
          words in LIMIT_WORDS.items()),
        ("--expires", {"metavar": "DATE", "help": ("最后一天，如 2027-01-31", "last day, such as 2027-01-31")})),
        ("key add alice --rpm 20 --models 'glm-*'", "key remove alice")),
    "usage": Command(cmd_usage, ("用量：按模型、密钥或上游", "tokens and requests, by model, key or provider"), (
        ("--days", {"metavar": "N", "default": "30", "help": ("最近 N 天（30）", "the last N days (30)")}),
        ("--by", {"choices": ("model", "key", "provider", "day"), "default": "model",
                  "help": ("按什么汇总（model）", "a row for each (model)")}),
        ("--json", {"action": "store_true", "help": ("输出 JSON", "as JSON")}),
        ("--csv", {"action": "store_true", "help": ("输出 CSV", "as CSV")})), ("usage --by key --days 7",)),
    "logs": Command(cmd_logs, ("显示日志文件（log_file）的末尾", "show the end of log_file"), (
        ("-n", {"metavar": "N", "type": int, "default": 50, "dest": "lines",
                "help": ("行数（50）", "number of lines (50)")}),
        ("--follow", {"action": "store_true", "short": "-f", "help": ("持续显示新的行", "go on with what is added")}),
        ("--level", {"choices": LOG_LEVELS, "default": "debug", "help": ("只显示此级别及以上", "this level and above")})),
        ("logs -f", "logs -n 200 --level warning")),
    "completion": Command(cmd_completion, ("输出 shell 的自动补全脚本", "print a script that completes commands in a shell"), (
        ("shell", {"choices": ("bash", "zsh", "fish", "powershell"), "help": ("哪种 shell", "which shell")}),), (
        "completion bash >> ~/.bashrc", "completion zsh >> ~/.zshrc",
        "completion fish >> ~/.config/fish/config.fish", "completion powershell >> $PROFILE")),
    "version": Command(cmd_version, ("显示版本", "print the version")),
}

#: The groups of the help text, in which commands stand in this order; one that is named nowhere is among the last.
COMMAND_GROUPS: Tuple[Tuple[str, Tuple[str, ...]], ...] = (
    ("group_run", ("serve", "stop", "restart", "instance")),
    ("group_setup", ("login", "logout", "provider", "config", "key", "routes", "env", "admin")),
    ("group_look", ("status", "models", "test", "usage", "logs", "gui")),
    ("group_more", ("autostart", "service", "docker", "update", "completion", "version")))


def _flag_rows(arguments: Iterable[Tuple[str, Json]]) -> List[Tuple[str, str]]:
    """`-f, --follow` or `--port N`, and what it does."""
    rows = []
    for flag, facts in arguments:
        names = f"{facts['short']}, {flag}" if "short" in facts else flag
        value = facts.get("metavar") or "|".join(facts.get("choices", ()))
        names += f" {value}" if value and _takes_value(facts) else ""
        rows.append((names, CONSOLE.text(facts.get("help", ""))))
    return rows


def _takes_value(facts: Json) -> bool:
    return not str(facts.get("action", "")).startswith(("store_", "count", "append_const"))


def _positional(name: str, facts: Json) -> str:
    """An argument without a flag as the usage line shows it."""
    text = "|".join(facts.get("choices", ())) or facts.get("metavar") or name.upper()
    many = "..." if facts.get("nargs") in ("*", "+") else ""
    return f"[{text}{many}]" if facts.get("nargs") in ("?", "*") else text + many


def _section(title: str, rows: Sequence[Tuple[str, str]], width: int = 0) -> List[str]:
    return ["", CONSOLE.paint(title, "bold"), *lay_out(rows, CONSOLE.columns, width=width)] if rows else []


def _examples(examples: Sequence[str]) -> List[str]:
    """Lines to copy: they are never wrapped."""
    lines = [f"  {PROGRAM} {example}".rstrip() for example in examples]
    return ["", CONSOLE.paint(tr("examples"), "bold"), *lines] if lines else []


def command_help(name: str) -> str:
    """`NAME --help`."""
    command = COMMANDS[name]
    places = [(flag, facts) for flag, facts in command.arguments if flag[0] != "-"]
    flags = [(flag, facts) for flag, facts in command.arguments if flag[0] == "-"]
    usage = " ".join([PROGRAM, name, *(_positional(*place) for place in places), "[FLAGS]"])
    lines = [f"iflow2api {name}: {CONSOLE.text(command.help)}", "", *wrap(f"{tr('usage')}: {usage}", CONSOLE.columns)]
    lines += _section(tr("arguments"), [(_positional(name, facts).strip("[]"), CONSOLE.text(facts.get("help", "")))
                                        for name, facts in places])
    lines += _section(tr("flags"), [*_flag_rows(flags), ("--config-dir DIR", tr("config_dir"))])
    return "\n".join(lines + _examples(command.examples)) + "\n"


def program_help() -> str:
    """`--help`: every command in its group, and the flags of serve, which is the command where none is named."""
    lines = [f"iflow2api {__version__}: {tr('about')}", "", f"{tr('usage')}: {PROGRAM} [COMMAND] [FLAGS]"]
    placed = {name for group, names in COMMAND_GROUPS for name in names}
    for group, names in COMMAND_GROUPS:
        shown = [name for name in names if name in COMMANDS]
        if group == COMMAND_GROUPS[-1][0]:
            shown += [name for name in COMMANDS if name not in placed]
        rows = [(name, CONSOLE.text(COMMANDS[name].help)) for name in shown]
        lines += _section(tr(group), rows, max(map(len, COMMANDS)))
    flags = [*_flag_rows(COMMANDS["serve"].arguments), ("--config-dir DIR", tr("config_dir")),
             ("-h, --help", tr("help_flag"))]
    lines += _section(tr("serve_flags"), flags) + ["", *wrap(tr("settings_too"), CONSOLE.columns)]
    return "\n".join(lines + _examples(COMMANDS["serve"].examples)) + "\n"


#: argparse's complaints (all versions), and ours instead, which say what to type.
_COMPLAINTS = tuple((re.compile(pattern), key) for pattern, key in (
    (r"argument (?P<flag>.+?): expected .*arguments?", "needs_value"),
    (r"argument (?P<flag>.+?): invalid choice: (?P<value>.*?) \(choose from (?P<choices>.*)\)", "bad_choice"),
    (r"argument (?P<flag>.+?): invalid int value: (?P<value>.*)", "no_number"),
    (r"argument (?P<flag>.+?): ignored explicit argument (?P<value>.*)", "takes_no_value"),
    (r"the following arguments are required: (?P<flag>.*)", "missing")))


def _complaint(message: str, command: str) -> str:
    """What argparse found wrong, in our words and the user's language."""
    found = next(((known.fullmatch(message), key) for known, key in _COMPLAINTS if known.fullmatch(message)), None)
    if found is None:
        return message
    facts = {name: one_line(value, 200) for name, value in found[0].groupdict().items()}     # type: ignore[union-attr]
    entries = dict(_arguments_of(command))
    if found[1] == "missing":
        facts["flag"] = " ".join(_positional(name, entries[name]) if name in entries else name
                                 for name in facts["flag"].split(", "))
    if "choices" in facts:
        names = re.findall(r"[\w.-]+", facts["choices"])
        facts.update(choices=", ".join(names), near=_near(facts["value"].strip("'"), names))
    facts["flag"] = facts["flag"].split("/")[-1]
    return tr(found[1], command=command, metavar=entries.get(facts["flag"], {}).get("metavar", "VALUE"), **facts)


def _arguments_of(command: str) -> List[Tuple[str, Json]]:
    """A command's arguments with those that every command has."""
    arguments = COMMANDS[command].arguments if command in COMMANDS else ()
    return [*arguments, ("--config-dir", {"metavar": "DIR"}), ("--help", {"action": "store_true", "short": "-h"})]


def build_parser() -> Any:
    """argparse's parser for COMMANDS; errors are UsageError, help and complaints are ours."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            command = self.prog.partition(" ")[2]
            raise UsageError(_complaint(message, command) + tr("see", command=command + " " if command else ""))

        def format_help(self) -> str:
            command = self.prog.partition(" ")[2]
            return command_help(command) if command else program_help()

    parser = Parser(prog="iflow2api.py", allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        child = commands.add_parser(name, allow_abbrev=False)
        child.add_argument("--config-dir", metavar="DIR")
        for flag, facts in command.arguments:
            names = [facts["short"], flag] if "short" in facts else [flag]
            child.add_argument(*names, **{key: value for key, value in facts.items() if key not in ("help", "short")})
    return parser


def _in_order(argv: Sequence[str]) -> List[str]:
    """`argv` as command, arguments, flags.  argparse takes a flag for the end of optional arguments."""
    words: List[str] = []
    flags: List[str] = []
    valued = {name for command in COMMANDS for flag, facts in _arguments_of(command) if _takes_value(facts)
              for name in (flag, facts.get("short")) if name and name[0] == "-"}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            words += rest
            break
        if word[:1] != "-" or word == "-":
            words.append(word)
            continue
        flags.append(word)
        if word in valued and rest and rest[0][:2] != "--":
            flags.append(rest.pop(0))
    return words + flags


def _parse_args(argv: Sequence[str]) -> Any:
    """The namespace of `argv`, where `serve` may be left out; UsageError."""
    words = _in_order(argv)
    if not words or words[0] not in (*COMMANDS, "-h", "--help", "--version"):
        if argv and argv[0][:1] != "-":
            text = tr("no_command", name=one_line(argv[0], 60), near=_near(argv[0], COMMANDS))
            raise UsageError(text + tr("see", command=""))
        words.insert(0, "serve")
    args, stray = build_parser().parse_known_args(words)
    if stray:
        worst = next((word for word in stray if word[0:1] == "-"), stray[0])
        command = args.command or ""
        raise UsageError(_stray_word(worst, command) + tr("see", command=command + " " if command else ""))
    return args


def _stray_word(word: str, command: str) -> str:
    if word[:1] != "-":
        return tr("stray", command=command, word=one_line(word, 60), near=_near(word, COMMANDS))
    flag = word.partition("=")[0]
    return tr("unknown_flag", command=command, flag=one_line(flag, 60),
              near=_near(flag, [name for name, facts in _arguments_of(command) if name[0] == "-"]))


# --- completion --------------------------------------------------------------

class CompletionWords:
    """What the shells' scripts are made of, all of it out of COMMANDS and the settings."""

    def __init__(self) -> None:
        #: flags by command; "" is what serve takes without being named
        self.flags = {name: [word for flag, facts in _arguments_of(name) for word in (flag, facts.get("short"))
                             if word and word[0] == "-"] for name in COMMANDS}
        self.flags[""] = self.flags["serve"]
        #: words by the words before them: "config get" -> names of settings
        self.words: Dict[str, List[str]] = {"": list(COMMANDS)}
        #: values by flag, [] where nobody knows them
        self.values: Dict[str, List[str]] = {}
        for name in COMMANDS:
            self._add(name)
        for action in ("get", "set", "unset") if "config" in COMMANDS else ():
            self.words[f"config {action}"] = list(SETTING)
        for name, item in SETTING.items():
            choices = item.metadata.get("choices") or (("true", "false") if item.metadata["kind"] == "bool" else ())
            if choices:
                self.words[f"config set {name}"] = [choice for choice in choices if choice]

    def _add(self, command: str) -> None:
        first = True
        for flag, facts in _arguments_of(command):
            if flag[0] == "-" and _takes_value(facts):
                item = SETTING.get(facts.get("dest", flag.strip("-").replace("-", "_")))
                choices = facts.get("choices") or (item.metadata.get("choices") if item else ())
                self.values.update((name, list(choices or ())) for name in (flag, facts.get("short")) if name)
            elif flag[0] != "-" and first:
                self.words[command] = list(facts.get("choices", ()))
                first = False
        if not self.words.get(command):
            self.words.pop(command, None)

    def sets(self) -> List[Tuple[str, List[str]]]:
        """The values of flags that have known ones."""
        return [(flag, values) for flag, values in self.values.items() if values]

    def free(self) -> List[str]:
        """Flags whose value nobody knows; folders are `--config-dir`'s."""
        return [flag for flag, values in self.values.items() if not values and flag != "--config-dir"]


_BASH = r"""# iflow2api completion for bash: put this into ~/.bashrc, or: eval "$(python iflow2api.py completion bash)"
# It serves the names iflow2api and iflow2api.py, also as an alias: alias iflow2api='python /path/to/iflow2api.py'
_iflow2api() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} line="" words="" i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            @VALUED@) ((i++)) ;;
            -*) ;;
            *) line+="${line:+ }${COMP_WORDS[i]}" ;;
        esac
    done
    COMPREPLY=()
    case $prev in
            --config-dir) COMPREPLY=($(compgen -d -- "$cur")); return ;;
@VALUES@
            @FREE@) return ;;
    esac
    if [[ $cur == -* ]]; then
        case ${line%% *} in
@FLAGS@
        esac
    else
        case $line in
@WORDS@
        esac
    fi
    @SHOW@
}
complete -F _iflow2api iflow2api iflow2api.py"""

_ZSH = r"""# iflow2api completion for zsh: put this into ~/.zshrc, or: eval "$(python iflow2api.py completion zsh)"
# It serves the names iflow2api and iflow2api.py, also as an alias: alias iflow2api='python /path/to/iflow2api.py'
_iflow2api() {
    local cur=${words[CURRENT]} prev=${words[CURRENT-1]} line="" i
    local -a found
    for ((i = 2; i < CURRENT; i++)); do
        case ${words[i]} in
            @VALUED@) ((i++)) ;;
            -*) ;;
            *) line+="${line:+ }${words[i]}" ;;
        esac
    done
    case $prev in
            --config-dir) _files -/; return ;;
@VALUES@
            @FREE@) return ;;
    esac
    if [[ $cur == -* ]]; then
        case ${line%% *} in
@FLAGS@
        esac
    else
        case $line in
@WORDS@
        esac
    fi
    @SHOW@
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }
compdef _iflow2api iflow2api iflow2api.py"""

_FISH = r"""# iflow2api completion for fish: put this into ~/.config/fish/config.fish, or:
#   python iflow2api.py completion fish | source
# It serves the names iflow2api and iflow2api.py, also as an alias: alias iflow2api 'python /path/to/iflow2api.py'
function __iflow2api_line
    set -l words (commandline -opc)
    set -e words[1]
    set -l line
    set -l skip 0
    for word in $words
        if test $skip = 1
            set skip 0
        else if contains -- $word @VALUED@
            set skip 1
        else if not string match -q -- '-*' $word
            set -a line $word
        end
    end
    echo "$line"
end
function __iflow2api_after
    set -l line (__iflow2api_line)
    test "$line" = "$argv[1]"
end
function __iflow2api_of
    set -l words (__iflow2api_line | string split ' ')
    test "$words[1]" = "$argv[1]"
end
for name in iflow2api iflow2api.py
    complete -c $name -f
@LINES@
end"""

_POWERSHELL = r"""# iflow2api completion for PowerShell: put this into $PROFILE, or:
#   python iflow2api.py completion powershell | Out-String | Invoke-Expression
# It serves the names iflow2api and iflow2api.py: function iflow2api { python C:\path\to\iflow2api.py @args }
Register-ArgumentCompleter -Native -CommandName iflow2api, iflow2api.py -ScriptBlock {
    param($wordToComplete, $commandAst, $cursorPosition)
    $words = @{
@WORDS@
    }
    $flags = @{
@FLAGS@
    }
    $values = @{
@VALUES@
    }
    $before = @($commandAst.CommandElements | Select-Object -Skip 1 |
        Where-Object { $_.Extent.EndOffset -lt $cursorPosition } | ForEach-Object { $_.Extent.Text })
    $line = @()
    $last = ''
    foreach ($word in $before) {
        if (-not $values.ContainsKey($last) -and -not $word.StartsWith('-')) { $line += $word }
        $last = $word
    }
    if ($values.ContainsKey($last)) { $found = $values[$last] }
    elseif ($wordToComplete.StartsWith('-')) { $found = $flags[[string]($line | Select-Object -First 1)] }
    else { $found = $words[$line -join ' '] }
    $found | Where-Object { $_ -and $_.StartsWith($wordToComplete) } | ForEach-Object {
        [System.Management.Automation.CompletionResult]::new($_, $_, 'ParameterValue', $_)
    }
}"""


def _fill_in(script: str, **parts: str) -> str:
    """`script` with its @MARKS@ replaced; the shells have a use for every kind of bracket."""
    for name, part in parts.items():
        script = script.replace(f"@{name.upper()}@", part)
    return script


def _posix_completion(script: str, form: str, show: str, words: CompletionWords) -> str:
    """bash's or zsh's; `form` is how a list of words is assigned, `show` how it is handed over."""
    def cases(table: Iterable[Tuple[str, List[str]]], end: str = "") -> str:
        return "\n".join(f'            "{name}") {form % " ".join(found)}{end} ;;' for name, found in table)

    return _fill_in(script, valued="|".join(words.values), free="|".join(words.free()), show=show,
                    values=cases(words.sets(), f"; {show}; return"), flags=cases(words.flags.items()),
                    words=cases(words.words.items()))


def _fish_completion(words: CompletionWords) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = []
    for line, found in words.words.items():
        test = quoted(f'__iflow2api_after "{line}"')
        for word in found:
            about = CONSOLE.text(COMMANDS[word].help) if not line else CONSOLE.text(SETTING[word].metadata["label"]) \
                if line in ("config get", "config set", "config unset") else ""
            about = f" -d {quoted(about)}" if about else ""
            lines.append(f"    complete -c $name -n {test} -a {quoted(word)}{about}")
    for command, flags in words.flags.items():
        test = quoted(f'__iflow2api_of "{command}"')
        helps = {name: CONSOLE.text(facts.get("help", "")) for name, facts in _arguments_of(command or "serve")}
        for flag in flags:
            kind = "-l" if flag[:2] == "--" else "-s"
            value = "" if flag not in words.values else " -x -a " + quoted(
                " ".join(words.values[flag]) or ("(__fish_complete_directories)" if flag == "--config-dir" else ""))
            about = f" -d {quoted(helps[flag])}" if helps.get(flag) else ""
            lines.append(f"    complete -c $name -n {test} {kind} {flag.lstrip('-')}{value}{about}")
    return _fill_in(_FISH, valued=" ".join(words.values), lines="\n".join(lines))


def _powershell_completion(words: CompletionWords) -> str:
    def rows(table: Iterable[Tuple[str, List[str]]]) -> str:
        return "\n".join(f"        '{name}' = @({', '.join(repr(word) for word in found)})" for name, found in table)

    return _fill_in(_POWERSHELL, words=rows(words.words.items()), flags=rows(words.flags.items()),
                    values=rows(words.values.items()))


COMPLETERS: Dict[str, Callable[[CompletionWords], str]] = {
    "bash": lambda words: _posix_completion(_BASH, 'words="%s"', 'COMPREPLY=($(compgen -W "$words" -- "$cur"))', words),
    "zsh": lambda words: _posix_completion(_ZSH, "found=(%s)", "compadd -- $found", words),
    "fish": _fish_completion, "powershell": _powershell_completion}


# --- main --------------------------------------------------------------------

def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; 0 done, 1 failed, 2 used wrongly."""
    prepare_process()
    argv = list(sys.argv[1:] if argv is None else argv)
    CONSOLE.set_up(argv, os.environ)
    try:
        args = _parse_args(argv)
        return cmd_version(args) if getattr(args, "version", False) else COMMANDS[args.command].run(args)
    except UsageError as exc:
        _say(tr("error", text=exc))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:              # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


if __name__ == "__main__":
    sys.exit(main())
