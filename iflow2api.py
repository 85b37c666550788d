#!/usr/bin/env python3
# -*- coding: utf-8 -*-
"""iflow2api: one file between any AI client and any OpenAI-compatible model.

    curl -O https://raw.githubusercontent.com/iflow2api/iflow2api/main/iflow2api.py
    python iflow2api.py --upstream https://api.deepseek.com --api-key '$DEEPSEEK_API_KEY'
    python iflow2api.py --help

Chat Completions is the hub.  A dialect turns its request into a chat request and chat chunks into
its own events; nothing else in the file knows that there is more than one.

The path of one request:

    Handler._serve, answer_call       head and body: bounded, timed, strict; Host, Origin, key
    Gateway.answer(call, client)      StreamLoop.watch: from here on the loop keeps the client awake
    Attempts.run()                    does all that follows for one call, in a loop
    State.chain_for(call) -> Targets  Router.resolve: the models that may answer
    Plan.next(), Plan.take_key()      the next target and key, or the last error; pure
    dialect.open(call, target, …)     Translation: path, headers, body, and the way back; pure
    Upstream.open(…) -> response      sends the request, waits for the head of the answer
    Upstream.move(response, …)        reads the stream: here what has come, then in the StreamLoop
    translation.feed(payload)         bytes for the client, which client.send() writes; pure
    translation.close()               the last of them, for client.end()
    Gateway.note(record)              Ledger.add: usage, chart, metrics and limits read it

A plain answer takes translation.reply() and client.reply().  An error is an exception until
Handler.send_error_of (or the client's `fail`, once an answer has begun) makes bytes of it.  A
client that leaves ends all waiting with ClientGone.

Contents

    1  Preamble          versions, imports, what the process needs
    2  Constants         names, limits and their reasons
    3  Errors            one tree
    4  Small tools       ids, redaction, files
    5  Settings          settings, config.json, secrets, client keys, providers
    6  Routes            from a model's name to the targets that may answer (pure)
    7  Chat and SSE      the hub: parsing, holding back, usage (pure)
    8  Anthropic Messages  requests, answers, streams, errors (pure)
    9  OpenAI Responses    the other API, and what Codex needs of it (pure)
    10 Gemini            generateContent, for gemini-cli and Google's SDKs (pure)
    11 Dialects          what an endpoint speaks (pure)
    12 Upstream          connections, TLS, proxies, waiting
    13 Credentials       logging in, refreshing, accounts, the browser
    14 Services          slots, keys, metrics, file watching
    15 Gateway           owns 5 and 12 to 14; one call from route to answer
    16 HTTP              server, handler, routes of the URL space, errors as bytes
    17 Documents         OpenAPI 3.1 and its readers
    18 The page's API    who may see the page, and its JSON API
    19 The page          style, markup, script and texts
    20 Demo upstream     what `--demo` talks to, and the tests
    21 Command line      texts, arguments, one function a command

Embedding: `server = serve(Gateway(Settings(providers=[…])), port=0)`, server.url, server.close().
"""
# === 1. Preamble =============================================================

# Python 2.7 and 3.6 can't read this file: they show the line that stopped them.
from __future__ import annotations  # iflow2api needs Python 3.9 or newer

import os
import sys

if sys.version_info < (3, 9):
    sys.exit("iflow2api needs Python 3.9 or newer; this is %d.%d." % sys.version_info[:2])

#: One arena, and large blocks given back at once: memory falls after large requests (glibc).
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}

#: In the environment of a process that was restarted: which variables were added for it.
RESTARTED = "_IFLOW2API_RESTARTED"

#: Runs the code in a descriptor.  It imports only built-in modules, because with -c the current
#: folder comes first in sys.path.
LOADER = """import sys, marshal, posix
fd, folder, sys.argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
code = marshal.loads(b"".join(iter(lambda: posix.read(fd, 1 << 20), b"")))
posix.close(fd)
if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    sys.path[0] = folder
__file__ = sys.argv[0]
del fd, folder, marshal, posix
exec(globals().pop("code"))
"""


def _new_file() -> int:  # iflow2api needs Python 3.9 or newer
    """The descriptor of a file that no path leads to; OSError."""
    try:
        return os.memfd_create("iflow2api")
    except (AttributeError, OSError):    # not Linux, or an old or sandboxed one
        folder = os.environ.get("TMPDIR") or "/tmp"
        path = os.path.join(folder, ".iflow2api-" + os.urandom(16).hex())
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink(path)
        return fd


def _open_standard_descriptors() -> None:
    """Open os.devnull for the closed ones (`>&-`): else a file or socket gets their number."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd < 3:
        os.set_inheritable(fd, True)
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)


def _given_command() -> List[str]:
    """How this process was started, the interpreter first; OSError if unknown."""
    if hasattr(sys, "orig_argv"):
        return sys.orig_argv
    with open("/proc/self/cmdline", encoding=sys.getfilesystemencoding(),
              errors="surrogateescape") as file:         # Python 3.9
        return file.read().split("\0")[:-1]


def _restart_as_server(frame: Any) -> None:
    """Replace a process that is about to serve by one that runs the code of `frame`, this module's.

    Python keeps the memory that compiling a script took.  The code is handed over in memory, and
    without `site`, which nothing here needs; `-m`, with byte code, restarts for MALLOC alone.
    Where it can't be done (Windows, a debugger) the program goes on as it is.
    """
    if RESTARTED in os.environ:
        for name in os.environ.pop(RESTARTED).split(","):
            os.environ.pop(name, None)   # not for programs that we start
        return
    is_module = __spec__ is not None
    if (os.name != "posix" or not sys.executable or sys.flags.interactive or sys.flags.inspect
            or __file__.endswith(".pyc") or not os.path.isfile(__file__)
            or not is_module and frame.f_back):
        return
    added = {name: value for name, value in MALLOC.items() if name not in os.environ}
    fd = -1
    try:
        _open_standard_descriptors()
        command = [sys.executable, *_given_command()[1:]]
        if not is_module or not os.path.exists(__spec__.cached or ""):
            import marshal
            fd = _new_file()
            with open(fd, "wb", closefd=False) as file:
                marshal.dump(frame.f_code, file)
            os.lseek(fd, 0, os.SEEK_SET)
            os.set_inheritable(fd, True)
            flags = [flag for flag in command[1:-len(sys.argv)] if flag != "-m"]
            folder = os.path.dirname(os.path.realpath(__file__))
            command[1:] = [*flags, "-S", "-c", LOADER, str(fd), folder, __file__, *sys.argv[1:]]
        if added or fd >= 0:
            os.execve(sys.executable, command, {**os.environ, **added, RESTARTED: ",".join(added)})
    except (OSError, ValueError):
        if fd >= 0:
            os.close(fd)


if __name__ == "__main__" and (sys.argv[1:2] in ([], ["serve"]) or sys.argv[1][:2] == "--") and (
        not {"-h", "--help", "--version"} & set(sys.argv)):
    _restart_as_server(sys._getframe())

#: Modules that OpenWrt's python3-light leaves to packages of their own (lists of 21.02 to 25.12).
OPENWRT_PACKAGE = {"urllib": "python3-urllib", "email": "python3-urllib", "_ssl": "python3-openssl",
                   "_hashlib": "python3-openssl", "ssl": "python3-openssl",
                   "logging": "python3-logging"}

try:
    import base64
    import codecs
    import contextlib
    import errno
    import hashlib
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
    from collections import Counter, deque
    from dataclasses import dataclass, field, fields, replace
    from datetime import datetime, timezone
    from email.utils import formatdate, parsedate_to_datetime
    from fnmatch import fnmatchcase
    from functools import cached_property, lru_cache, partial
    from operator import is_
    from typing import (Any, Callable, Collection, Deque, Dict, Iterable, Iterator, List, Mapping,
                        NamedTuple, Optional, Sequence, Set, Tuple, Union)
except ImportError as exc:
    sys.exit("iflow2api needs the Python module '%s'. On OpenWrt install it with: opkg install %s "
             "(or apk add); elsewhere Python itself is incomplete." % (
                 exc.name, OPENWRT_PACKAGE.get((exc.name or "").split(".")[0], "python3")))

__version__ = "0.1.0"
__all__ = ["Gateway", "Settings", "serve", "main", "GatewayError", "__version__"]

Json = Dict[str, Any]

log = logging.getLogger("iflow2api")
log.addHandler(logging.NullHandler())

#: A JSON text of 10 000 levels kills a thread with a 1 MiB stack on 3.13 (musl: 128 KiB); with
#: 2 MiB it raises RecursionError.  The memory is virtual, not resident.
THREAD_STACK_BYTES = 2 << 20


@lru_cache(maxsize=None)
def _offer_idna() -> None:
    """For OpenWrt without python3-codecs: getaddrinfo and ssl ask for idna.  Python's own wins."""
    codecs.register(lambda name: codecs.lookup("ascii") if name == "idna" else None)


def prepare_process() -> None:
    """Set the process up for a server; `serve` and `main` call it, so an import changes nothing."""
    threading.stack_size(max(threading.stack_size(), THREAD_STACK_BYTES))
    _offer_idna()
    try:
        import resource
    except ImportError:                  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:     # 1000 streams need over 2000
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# === 2. Constants ============================================================

#: The program's own folder, which `--config-dir` and IFLOW2API_CONFIG_DIR move.
CONFIG_DIR = os.path.join("~", ".iflow2api")

#: Environment variables of settings are this plus the key in upper case.
ENV_PREFIX = "IFLOW2API_"


class Model(NamedTuple):
    """What is known of a model: tokens of context, most tokens of an answer, images."""
    context: int
    max_output: int
    vision: bool = False


#: iFlow's models (its /models can't be relied on), with what its platform allows.
IFLOW_MODELS = {
    "glm-4.6": Model(200_000, 32_000),
    "glm-4.7": Model(200_000, 32_000),
    "glm-5": Model(200_000, 32_000),
    "iFlow-ROME-30BA3B": Model(256_000, 64_000),
    "deepseek-v3.2-chat": Model(128_000, 8_192),
    "qwen3-coder-plus": Model(256_000, 64_000),
    "kimi-k2": Model(128_000, 32_000),
    "kimi-k2-0905": Model(256_000, 32_000),
    "kimi-k2-thinking": Model(256_000, 32_000),
    "kimi-k2.5": Model(256_000, 32_768),
    "minimax-m2.5": Model(200_000, 64_000),
    "qwen-vl-max": Model(128_000, 8_192, True)}

IFLOW_BASE_URL = "https://apis.iflow.cn/v1"

#: The iFlow CLI's own file.
IFLOW_FILE = os.path.join("~", ".iflow", "settings.json")

#: The iFlow CLI's variables, the first that is set.
IFLOW_KEY_VARIABLES = ("IFLOW_apiKey", "IFLOW_API_KEY", "iflow_apiKey", "iflow_API_KEY")
IFLOW_URL_VARIABLES = ("IFLOW_baseUrl", "IFLOW_BASE_URL", "iflow_baseUrl", "iflow_BASE_URL")

#: The lock beside the CLI's file; its holder may refresh the login in that file.
IFLOW_LOCK = ".iflow2api.lock"

#: The User-Agent that gets the models which iFlow reserves for its CLI.
IFLOW_AGENT = "iFlow-Cli"

#: One line of an upstream's head; a request's whole head, and its header lines (nginx: 32 KiB,
#: http.server: 100).
LINE_LIMIT = 65536
HEAD_LIMIT_BYTES = 65536
HEADERS_LIMIT = 200

#: Most 1xx answers before the final one.
INTERIM_ANSWERS = 1000

#: An upstream's plain answer; embeddings of a large batch stay below it.
ANSWER_LIMIT_BYTES = 256 << 20

#: A compressed answer, which was not asked for: most unpacked bytes, and the size of a part.
UNPACKED_LIMIT_BYTES, UNPACKED_AT_ONCE = 64 << 20, 1 << 18

#: Most bytes that are read of an upstream's error page.
REFUSAL_LIMIT_BYTES = 1 << 20

#: Largest record of an event stream, and most that is held back before an answer begins.
RECORD_LIMIT_BYTES = 8 << 20

#: A time limit beyond this (three weeks) is a mistake, and more milliseconds than poll() can count.
LONGEST_S = 2_000_000

#: A kept client connection without a request is closed after this (nginx: 75 s, Node: 5 s).
CLIENT_IDLE_S = 75

#: A kept upstream connection is not used after this: most servers close theirs at 60 s or later.
UPSTREAM_IDLE_S = 45

#: What a client still sends after its answer is read for this long: closing a connection with
#: unread data resets it, and the answer may be lost.
LINGER_S = 2

#: Endpoints that need no key: the largest body, and the largest that is kept (a sign-in's).
PUBLIC_BODY_BYTES, PUBLIC_KEPT_BYTES = 1 << 20, 128 << 10

#: Time that a client has to send a head, a body (and a second more for each 16 KiB), and to take
#: what is sent.
HEAD_TIME_S, BODY_TIME_S, SEND_TIME_S = 15, 60, 60
BODY_BYTES_PER_S = 16 << 10

#: How long a key rests that was refused, or that met a limit which does not say how long it lasts.
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

#: Defaults of `retry` and `circuit`.  No retries: clients make their own, ours would multiply them.
RETRY = {"count": 0, "backoff_s": 0.5, "max_backoff_s": 10, "total_s": 60}
CIRCUIT = {"failures": 5, "rest_s": 30}

#: Statuses that may be over after a while: the same target is asked again where `retry` says so.
RETRY_STATUS = frozenset((408, 409, 425, 429)) | frozenset(range(500, 600))

#: Limits of a client key or an address -> the seconds that they count over.
LIMIT_SPANS = {"rpm": 60, "rph": 3600, "rpd": 86400, "tpd": 86400, "budget_day": 86400,
               "budget_month": 30 * 86400}
#: Those of keys are still counted after a restart: the ledger knows what was used.
LIMITS_KEPT = ("rpd", "tpd", "budget_day", "budget_month")
#: Limits of keys alone, in the currency of `prices`; they are counted in millionths.
BUDGETS, BUDGET_UNIT = ("budget_day", "budget_month"), 1_000_000
LIMIT_WORDS = {"rpm": "requests a minute", "rph": "requests an hour", "rpd": "requests a day",
               "tpd": "tokens a day", "concurrency": "requests at once",
               "budget_day": "a day, in the currency of `prices`",
               "budget_month": "in 30 days, in the currency of `prices`"}

#: Most addresses whose requests are counted; the one seen longest ago is forgotten first.
ADDRESSES_LIMIT = 10_000

#: Finished requests that are kept for the page, without their content.
HISTORY_SIZE = 200

#: Most rows of the ledger; further ones count as "other", because names come from clients.
USAGE_ROWS_AN_HOUR, USAGE_ROWS = 500, 20_000

#: The next target of a chain is tried on these; 401 and 403 mean that all keys were refused.
FALLBACK_STATUS = RETRY_STATUS | {401, 402, 403}

#: A key rests and the next one is tried on these.
KEY_STATUS = (401, 403, 429)

#: Names that Messages and Responses clients insist on; they become `default_model`.
_BUILT_IN_NAMES = ("claude-*", "gpt-*", "codex-*", "o1*", "o3*", "o4*")
FOREIGN_MODELS: Dict[str, Sequence[str]] = {
    "chat": (), "messages": _BUILT_IN_NAMES, "responses": _BUILT_IN_NAMES,
    "gemini": (*_BUILT_IN_NAMES, "gemini-*")}

#: Claude Code appends this to a model's name to note the size of its own context window.
LONG_CONTEXT = "[1m]"

#: Claude Code's tiers -> a name of each that it knows; its gateway discovery keeps only ids with
#: claude or anthropic.
CLAUDE_MODELS = {"FABLE": "claude-fable-5", "OPUS": "claude-opus-4-8",
                 "SONNET": "claude-sonnet-4-6", "HAIKU": "claude-haiku-4-5"}

#: The page: sessions at once, how long one lasts at most, and how long without use.
SESSIONS_LIMIT, SESSION_S, SESSION_IDLE_S = 64, 30 * 86400, 7 * 86400

#: Wrong passwords or codes of an address before it may try only once a second; addresses kept.
SIGN_IN_TRIES, SIGN_IN_ADDRESSES = 10, 1000

#: How long the code for the first password is valid.
CODE_LIFE_S = 900

#: Fewest and most characters of a password.
PASSWORD_LENGTH = (8, 1024)

#: Letters of a one-time code: no two of them look alike.
CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"

#: The page: its largest request (but for the playground's), viewers at once, log lines that are
#: kept, and characters of each.
ADMIN_BODY_BYTES, VIEWERS_LIMIT, LOG_LINES, LOG_LINE_CHARS = 1 << 20, 16, 10_000, 4000

#: Most label sets of a metric family; further ones count as "other", as in the ledger.
METRIC_SERIES_LIMIT = 500

#: Headers of a client that are sent on to a chat upstream, and all that begin with the prefix.
HEADERS_FORWARDED = frozenset((
    "anthropic-version", "anthropic-beta", "openai-beta", "openai-organization", "openai-project",
    "accept-language", "http-referer", "x-title", "x-request-id", "x-client-request-id"))
HEADER_FORWARDED_PREFIX = "x-stainless-"

#: The longest name and value of a header that is passed on.
HEADER_NAME_CHARS, HEADER_VALUE_CHARS = 100, 1000

#: Headers of an upstream's answer that are passed on to the client.
HEADER_RETURNS = r"(x-ratelimit-.*|openai-.*|retry-after(-ms)?|x-should-retry)"


# --- presets -----------------------------------------------------------------

class Preset(NamedTuple):
    """A known API: `preset` in an entry of `providers` names it and takes the rest from here."""
    title: str                            #: Chinese = English, or one for both
    key: str = ""                         #: the variable its users keep the key in; "": no key
    base_url: str = ""                    #: of Chat
    messages_url: str = ""
    responses_url: str = ""
    profile: Json = {}                    #: how it differs from DEFAULT_PROFILE
    listed: str = ""                      #: its models, the default one first: see `models`
    metered: Tuple[str, ...] = ()         #: of a plan: the maker's presets that are paid by use
    key_start: str = ""                   #: how a plan's keys begin, where others do not
    key_page: str = ""                    #: where keys are made
    headers: Json = {}

    @property
    def titles(self) -> Tuple[str, str]:
        """In Chinese and in English."""
        chinese, _, english = self.title.partition(" = ")
        return chinese, english or chinese

    @property
    def roads(self) -> Json:
        """Its addresses, by the fields of a provider."""
        return {name: getattr(self, name) for name in ROADS if getattr(self, name)}

    @property
    def models(self) -> Dict[str, Json]:
        """What is known of each model, as an entry of `models` says it.

        A row is name, context, output limit (with + it sees images) and efforts: ! before them if
        it always thinks, - for none.
        """
        found: Dict[str, Json] = {}
        for row in filter(None, self.listed.split(",")):
            name, context, limit, efforts = row.split()
            found[name] = {"context": int(context), "max_output": int(limit.rstrip("+")),
                           "vision": limit.endswith("+"), "always_thinks": efforts[0] == "!",
                           "efforts": [each for each in efforts.strip("!-").split("/") if each]}
        return found


#: The fields of a provider that say where its Chat, Messages and Responses are.
ROADS = {"base_url": "Chat", "messages_url": "Messages", "responses_url": "Responses"}

#: Houses of many models: a thinking switch that one model knows is a 400 from the next.
_MIXED: Json = {"thinking_style": "none", "efforts": [], "strict_tools": False, "files": False}
#: As OpenAI does it.
_EFFORT: Json = {"thinking_style": "reasoning_effort", "efforts": ["none", "low", "medium", "high"],
                 "reasoning_field": None, "max_tokens_field": "max_completion_tokens"}
#: Engines on this machine: chat templates that allow system at the top only, parts they can't read.
_ENGINE: Json = {
    "thinking_style": "chat_template_kwargs", "efforts": [], "top_k": True, "mid_system": "user",
    "strict_tools": False, "files": False}

# What presets of one maker share.


def _glm(search_engine: str) -> Json:
    """GLM takes json_object, no strict schemas, and tool_choice "auto" alone (docs.bigmodel.cn)."""
    return {
        "thinking_style": "thinking_type", "thinking_extra": {"clear_thinking": False},
        "efforts": ["low", "high", "max"], "structured_output": "json_object",
        "strict_tools": False, "forced_tool_choice": False, "files": False,
        "server_tools": {"web_search": {"type": "web_search", "web_search": {
            "enable": True, "search_engine": search_engine, "search_result": True}}}}


_GLM_5 = ("glm-5.3 1000000 131072 !low/high/max, glm-5.3-flash 1000000 131072+ !low/high/max, "
          "glm-5.3-highspeed 1000000 131072 !low/high/max, ")
_ZHIPU: Json = {
    "key": "ZHIPU_API_KEY", "messages_url": "https://open.bigmodel.cn/api/anthropic",
    "profile": _glm("search_std"), "listed": _GLM_5 + "glm-4.6v 128000 32768+ -",
    "key_page": "https://open.bigmodel.cn/usercenter/apikeys"}
_ZAI: Json = {
    "key": "ZAI_API_KEY", "messages_url": "https://api.z.ai/api/anthropic",
    "profile": _glm("search-prime"),
    "listed": _GLM_5 + "glm-5.2 1000000 131072 none/high/max, glm-4.7 204800 131072 -",
    "key_page": "https://z.ai/manage-apikey/apikey-list"}

#: A call's reasoning must come back with it (platform.kimi.com).
_KIMI_PROFILE: Json = {
    "thinking_style": "thinking_type", "require_reasoning_on_tool_calls": True,
    "prefill": "partial", "efforts": ["low", "high", "max"], "strict_tools": False, "files": False}
_KIMI: Json = {
    "key": "MOONSHOT_API_KEY", "profile": _KIMI_PROFILE,
    "listed": "kimi-k3 1048576 1048576+ !low/high/max, kimi-k3.1-pro 1048576 1048576+ "
              "!low/high/max, kimi-k2.7-code 262144 262144+ !, kimi-k2.6 262144 262144+ -"}
_QWEN: Json = {
    "key": "DASHSCOPE_API_KEY",
    "profile": {
        "thinking_style": "enable_thinking", "top_k": True, "efforts": [], "strict_tools": False,
        "forced_tool_choice_with_thinking": False, "files": False,
        "server_tools": {"web_search": {"fields": {"enable_search": True}}}},
    "listed": "qwen3.8-max 1000000 131072+ low/medium/xhigh, qwen3.8-flash 1000000 131072+ "
              "low/medium/xhigh, qwen3.7-plus 1000000 65536+ -, qwen3.7-max 1000000 131072 -, "
              "qwen4-max-preview 1000000 393216+ low/medium/xhigh"}
#: Thinks between <think> tags and knows no response_format (platform.minimax.io).
_MINIMAX: Json = {
    "key": "MINIMAX_API_KEY",
    "profile": {
        "thinking_style": "none", "think_tags": True, "efforts": [], "strict_tools": False,
        "structured_output": "prompt", "max_tokens_field": "max_completion_tokens", "files": False},
    "listed": "MiniMax-M3 1000000 524288+ -, MiniMax-M3.1-Flash 1000000 524288+ "
              "!low/medium/high/xhigh/max, MiniMax-M2.7 204800 131072 -, "
              "MiniMax-M2.7-highspeed 204800 131072 -"}
_ARK: Json = {"key": "ARK_API_KEY", "profile": {**_MIXED, "thinking_style": "thinking_type"}}
_STEPFUN: Json = {"key": "STEPFUN_API_KEY", "profile": _MIXED,
                  "key_page": "https://platform.stepfun.com/interface-key"}
#: They answer in `reasoning`, and take that back.
_GROQ: Json = {**_EFFORT, "reasoning_field": "reasoning", "efforts": ["low", "medium", "high"],
               "strict_tools": False, "files": False}

#: By name, plans first.  From the makers' documentation and other programs' data, November 2026.
PRESETS: Dict[str, Preset] = {
    "zhipu-coding": Preset(
        "智谱编程套餐 = Zhipu coding plan", base_url="https://open.bigmodel.cn/api/coding/paas/v4",
        metered=("zhipu",), **_ZHIPU),
    "zai-coding": Preset(
        "Z.ai 编程套餐 = Z.ai coding plan", base_url="https://api.z.ai/api/coding/paas/v4",
        metered=("zai",), **_ZAI),
    "kimi-coding": Preset(
        "Kimi 编程套餐 = Kimi coding plan", "KIMI_API_KEY", "https://api.kimi.com/coding/v1",
        "https://api.kimi.com/coding", profile={**_KIMI_PROFILE, "forward_user_agent": True},
        listed="kimi-for-coding 1048576 32768+ !low/high/max, "
               "kimi-for-coding-highspeed 262144 32768+ !, k3 1048576 1048576+ !low/high/max, "
               "k3.1-pro 1048576 1048576+ !low/high/max",
        metered=("moonshot", "moonshot-cn"), key_start="sk-kimi-",
        key_page="https://www.kimi.com/code/console"),
    "dashscope-coding": Preset(
        "阿里云编程套餐 = Alibaba coding plan", base_url="https://coding.dashscope.aliyuncs.com/v1",
        messages_url="https://coding.dashscope.aliyuncs.com/apps/anthropic",
        metered=("dashscope",), key_start="sk-sp-", **_QWEN),
    "dashscope-coding-intl": Preset(
        "阿里云编程套餐（国际） = Alibaba plan, intl.",
        base_url="https://coding-intl.dashscope.aliyuncs.com/v1",
        messages_url="https://coding-intl.dashscope.aliyuncs.com/apps/anthropic",
        metered=("dashscope-intl",), key_start="sk-sp-", **_QWEN),
    # its /models does not tell what the plan serves
    "volcengine-coding": Preset(
        "火山方舟编程套餐 = Volcengine coding plan", _ARK["key"],
        "https://ark.cn-beijing.volces.com/api/coding/v3",
        "https://ark.cn-beijing.volces.com/api/coding", metered=("volcengine",),
        profile={**_ARK["profile"], "lists_models": False}),
    "stepfun-plan": Preset(
        "阶跃星辰套餐 = StepFun plan", base_url="https://api.stepfun.com/step_plan/v1",
        metered=("stepfun",), **_STEPFUN),
    "zhipu": Preset("智谱 = Zhipu", base_url="https://open.bigmodel.cn/api/paas/v4",
                    responses_url="https://open.bigmodel.cn/api/v1", **_ZHIPU),
    "zai": Preset("Z.ai", base_url="https://api.z.ai/api/paas/v4", **_ZAI),
    "moonshot-cn": Preset(
        "Kimi 开放平台 = Kimi (China)", base_url="https://api.moonshot.cn/v1",
        messages_url="https://api.moonshot.cn/anthropic",
        key_page="https://platform.moonshot.cn/console/api-keys", **_KIMI),
    "moonshot": Preset(
        "Kimi 开放平台（国际） = Kimi", base_url="https://api.moonshot.ai/v1",
        messages_url="https://api.moonshot.ai/anthropic",
        key_page="https://platform.moonshot.ai/console/api-keys", **_KIMI),
    "deepseek": Preset(
        "DeepSeek", "DEEPSEEK_API_KEY", "https://api.deepseek.com/v1",
        "https://api.deepseek.com/anthropic", profile={
            "thinking_style": "thinking_type", "require_reasoning_on_tool_calls": True,
            "efforts": ["low", "high", "max"], "vision": False, "files": False,
            "structured_output": "json_object", "strict_tools": False},
        listed="deepseek-flash 1000000 384000+ low/high/max, "
               "deepseek-v4-pro 1000000 384000 high/max",
        key_page="https://platform.deepseek.com/api_keys"),
    "dashscope": Preset(
        "阿里云百炼 = Alibaba Qwen", base_url="https://dashscope.aliyuncs.com/compatible-mode/v1",
        messages_url="https://dashscope.aliyuncs.com/apps/anthropic", **_QWEN),
    "dashscope-intl": Preset(
        "阿里云百炼（国际） = Alibaba Qwen, intl.",
        base_url="https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
        messages_url="https://dashscope-intl.aliyuncs.com/apps/anthropic", **_QWEN),
    "minimax-cn": Preset(
        "MiniMax = MiniMax (China)", base_url="https://api.minimaxi.com/v1",
        messages_url="https://api.minimaxi.com/anthropic", **_MINIMAX,
        key_page="https://platform.minimaxi.com/user-center/basic-information/interface-key"),
    "minimax": Preset(
        "MiniMax（国际） = MiniMax", base_url="https://api.minimax.io/v1",
        messages_url="https://api.minimax.io/anthropic", **_MINIMAX,
        key_page="https://platform.minimax.io/user-center/basic-information/interface-key"),
    "volcengine": Preset("火山方舟 = Volcengine Ark",
                         base_url="https://ark.cn-beijing.volces.com/api/v3", **_ARK),
    "xiaomi": Preset(
        "小米 MiMo = Xiaomi MiMo", "MIMO_API_KEY", "https://api.xiaomimimo.com/v1",
        "https://api.xiaomimimo.com/anthropic",
        profile={**_MIXED, "thinking_style": "thinking_type",
                 "require_reasoning_on_tool_calls": True},
        listed="mimo-v2.6-pro 1048576 131072+ -, mimo-v2.6-flash 1048576 131072+ -, "
               "mimo-v2.6-pro-ultraspeed 1048576 131072+ -",
        key_page="https://platform.xiaomimimo.com"),
    "stepfun": Preset("阶跃星辰 = StepFun", base_url="https://api.stepfun.com/v1", **_STEPFUN),
    "tencent": Preset("腾讯 TokenHub = Tencent TokenHub", "TENCENT_API_KEY",
                      "https://tokenhub.tencentmaas.com/v1", profile=_MIXED),
    "siliconflow": Preset(
        "硅基流动 = SiliconFlow (China)", "SILICONFLOW_API_KEY",
        "https://api.siliconflow.cn/v1", profile=_MIXED,
        key_page="https://cloud.siliconflow.cn/account/ak"),
    "siliconflow-intl": Preset(
        "硅基流动（国际） = SiliconFlow", "SILICONFLOW_API_KEY",
        "https://api.siliconflow.com/v1", profile=_MIXED,
        key_page="https://cloud.siliconflow.com/account/ak"),
    "modelscope": Preset(
        "魔搭 = ModelScope", "MODELSCOPE_API_KEY", "https://api-inference.modelscope.cn/v1",
        profile=_MIXED, key_page="https://modelscope.cn/my/myaccesstoken"),
    "openrouter": Preset(
        "OpenRouter", "OPENROUTER_API_KEY", "https://openrouter.ai/api/v1",
        "https://openrouter.ai/api", profile={
            "thinking_style": "reasoning_effort", "reasoning_field": "reasoning", "top_k": True,
            "efforts": ["none", "minimal", "low", "medium", "high", "xhigh"]},
        listed="z-ai/glm-5.3 1048576 943718 !low/high/max, "
               "moonshotai/kimi-k3 1048576 131072+ none/low/high/max, "
               "deepseek/deepseek-v4.1-flash 1048576 943718+ none/low/high/max, "
               "qwen/qwen3.8-max-0902 1000000 131072+ !minimal/low/medium/high/xhigh, "
               "minimax/minimax-m3.1-flash 1048576 524288+ !low/medium/high/xhigh/max",
        key_page="https://openrouter.ai/settings/keys"),
    "nvidia": Preset(
        "NVIDIA", "NVIDIA_API_KEY", "https://integrate.api.nvidia.com/v1",
        profile={**_MIXED, "reasoning_field": None, "user_field": None,
                 "parallel_tool_calls": False},
        listed="z-ai/glm-5.3-flash 1000000 131072+ -, "
               "minimaxai/minimax-m3.1-flash 262144 262144+ -, "
               "stepfun-ai/step-5-preview 1048576 1048576+ -, "
               "nvidia/nemotron-3-ultra-550b-a55b 1000000 65536 -",
        key_page="https://build.nvidia.com/settings/api-keys",
        headers={"NVCF-POLL-SECONDS": "3600"}),
    "anthropic": Preset(
        "Anthropic", "ANTHROPIC_API_KEY", messages_url="https://api.anthropic.com",
        profile={"count_tokens": True}, key_page="https://console.anthropic.com/settings/keys"),
    "openai": Preset(
        "OpenAI", "OPENAI_API_KEY", "https://api.openai.com/v1",
        responses_url="https://api.openai.com/v1", profile={
            **_EFFORT, "efforts": ["none", "low", "medium", "high", "xhigh"],
            "user_field": "safety_identifier",
            "extra_fields": ["user", "verbosity", "prompt_cache_key", "service_tier"]},
        listed="gpt-6.2-sol 272000 128000+ !low/medium/high/xhigh/max, "
               "gpt-6.2-astra 272000 128000+ !low/medium/high/xhigh/max, "
               "gpt-6.1-terra 272000 128000+ none/low/medium/high/xhigh/max, "
               "gpt-6-luna 272000 128000+ none/low/medium/high/xhigh/max, "
               "gpt-5.5 272000 128000+ none/low/medium/high/xhigh, "
               "gpt-5.4-mini 400000 128000+ none/low/medium/high/xhigh",
        key_page="https://platform.openai.com/api-keys"),
    "xai": Preset(
        "xAI", "XAI_API_KEY", "https://api.x.ai/v1", responses_url="https://api.x.ai/v1",
        profile=_EFFORT, listed="grok-4.7 500000 500000+ !low/medium/high/xhigh, "
                                "grok-4.6 500000 500000+ !low/medium/high/xhigh, "
                                "grok-4.3 1000000 30000+ none/low/medium/high/xhigh",
        key_page="https://console.x.ai"),
    "groq": Preset(
        "Groq", "GROQ_API_KEY", "https://api.groq.com/openai/v1", profile=_GROQ,
        listed="openai/gpt-oss-120b 131072 65536 !low/medium/high, "
               "openai/gpt-oss-20b 131072 65536 !low/medium/high, "
               "qwen/qwen3.8-27b 131072 16384+ none/low/medium/high, "
               "llama-3.3-70b-versatile 131072 32768 -", key_page="https://console.groq.com/keys"),
    "cerebras": Preset(
        "Cerebras", "CEREBRAS_API_KEY", "https://api.cerebras.ai/v1", profile=_GROQ,
        listed="gpt-oss-120b 131072 40960 !low/medium/high, "
               "qwen-3.8-27b 131072 40960+ none/low/medium/high",
        key_page="https://cloud.cerebras.ai"),
    "mistral": Preset(
        "Mistral", "MISTRAL_API_KEY", "https://api.mistral.ai/v1",
        profile={**_EFFORT, "max_tokens_field": "max_tokens", "user_field": None, "efforts": []},
        listed="mistral-medium-latest 262144 262144+ none/high, "
               "mistral-large-latest 1048576 262144+ !low/medium/high, "
               "devstral-latest 262144 262144 -, codestral-latest 256000 4096 -, "
               "mistral-small-latest 262144 256000+ none/high",
        key_page="https://console.mistral.ai/api-keys"),
    "together": Preset("Together AI", "TOGETHER_API_KEY", "https://api.together.ai/v1",
                       profile=_MIXED, key_page="https://api.together.ai/settings/api-keys"),
    "fireworks": Preset(
        "Fireworks AI", "FIREWORKS_API_KEY", "https://api.fireworks.ai/inference/v1",
        "https://api.fireworks.ai/inference", profile=_MIXED,
        key_page="https://app.fireworks.ai/settings/users/api-keys"),
    "gemini": Preset(
        "Google Gemini", "GEMINI_API_KEY",
        "https://generativelanguage.googleapis.com/v1beta/openai",
        profile={**_EFFORT, "user_field": None, "strict_tools": False, "files": False}),
    "ollama": Preset(
        "Ollama", "", "http://127.0.0.1:11434/v1", "http://127.0.0.1:11434",
        "http://127.0.0.1:11434/v1",
        {**_ENGINE, "thinking_style": "none", "reasoning_field": "reasoning"}),
    "lmstudio": Preset("LM Studio", "", "http://127.0.0.1:1234/v1", "http://127.0.0.1:1234",
                       profile={**_ENGINE, "thinking_style": "none"}),
    "llamacpp": Preset("llama.cpp", "", "http://127.0.0.1:8080/v1", "http://127.0.0.1:8080",
                       profile={**_ENGINE, "count_tokens": True}),
    "vllm": Preset("vLLM", "", "http://127.0.0.1:8000/v1", "http://127.0.0.1:8000", profile={
        **_ENGINE, "prefill": "continue_final_message", "reasoning_field": "reasoning"})}

#: Presets of engines that are looked for on this machine.
LOCAL_ENGINES = ("ollama", "lmstudio", "llamacpp", "vllm")


# === 3. Errors ===============================================================

class GatewayError(Exception):
    """What a client has to be told: a status, a wire code and one sentence.

    Dialects give it their shape, and Handler.send_error_of sends it; nothing else does.
    """
    status = 500
    type = "server_error"
    code: Optional[str] = None           #: OpenAI's field, as `param` is
    param: Optional[str] = None
    should_retry: Optional[bool] = None  #: becomes `x-should-retry`
    retry_after_s: Optional[float] = None
    body: Optional[Json] = None          #: the upstream's own error object
    allow: Sequence[str] = ()            #: methods, with a 405
    #: (prompt tokens, limit, output tokens) of a prompt too long for the model, 0 where unknown
    overflow: Optional[Tuple[int, int, int]] = None
    details: Optional[Json] = None       #: of Messages, for its SDKs to act upon

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
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
    """Somebody else has changed what was to be written, or the name is taken."""
    status, type, code = 409, "invalid_request_error", "conflict"


class RateLimited(GatewayError):
    """Our own limiter; the upstream's 429 is an UpstreamRefused."""
    status, type, code, retry_after_s = 429, "rate_limit_error", "rate_limit_exceeded", 5


class Busy(GatewayError):
    """Our queue or connection limit is reached, or we are shutting down."""
    status, type, code, retry_after_s = 503, "server_error", "server_is_overloaded", 2


class Stopping(GatewayError):
    """The program ends before this answer does; no other target is tried."""
    status, type, code, retry_after_s = 503, "server_error", "server_is_overloaded", 2


class NotLoggedIn(GatewayError):
    """We hold no credential that could serve this; the text says what to run."""
    status, type, should_retry = 403, "permission_error", False


class LoginFailed(GatewayError):
    """Logging in or refreshing did not work; the text says why, and what was kept.

    `refused`: the login host answered and said no.  `dead`: only a new login helps.
    """
    status, type, should_retry = 403, "permission_error", False
    refused = dead = False


class UpstreamError(GatewayError):
    """The upstream's fault."""
    status = 502


class UpstreamRefused(UpstreamError):
    """An answer of the upstream that is an error: its status, message and body are passed on."""


class UpstreamBroke(UpstreamRefused):
    """It broke the answer off and said so, in the finish reason."""


class UpstreamTimeout(UpstreamError):
    """It accepted the request and then said nothing for too long."""
    status = 504


class UpstreamUnreachable(UpstreamError):
    """No connection: refused, unknown host, TLS, proxy."""


class UpstreamGarbled(UpstreamError):
    """Not JSON, not SSE, empty, or cut off."""


class UsageError(Exception):
    """A mistake on the command line: one line on stderr, exit status 2."""


class CommandFailed(Exception):
    """A command that could not be carried out: one line on stderr, exit status 1."""


class ClientGone(Exception):
    """The client hung up; nobody is left to be told."""


def forget_trace(exc: Optional[BaseException]) -> None:
    """Drop the frames that an error has passed: they may hold the error, and a whole request."""
    while exc is not None:
        exc.__traceback__ = None
        exc = exc.__cause__ or exc.__context__


# === 4. Small tools ==========================================================

class Pattern:
    """A regular expression, compiled at its first use: all of them were a third of a start."""

    def __init__(self, text: Any, flags: int = 0) -> None:
        self._given = text, flags

    def __getattr__(self, name: str) -> Any:
        method = getattr(re.compile(*self._given), name)
        setattr(self, name, method)      # found at once from now on
        return method


#: Random digits for the next ids, drawn for many at once: each draw is a system call.
_DIGITS: List[str] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_DIGITS.clear)    # a child's ids must not be its parent's


def new_id(prefix: str) -> str:
    """`prefix` and 24 random hex digits."""
    while True:
        try:
            return prefix + _DIGITS.pop()
        except IndexError:               # another thread may have taken the last
            digits = secrets.token_hex(12 * 64)
            _DIGITS.extend(digits[at:at + 24] for at in range(0, len(digits), 24))


# --- texts --------------------------------------------------------------------

_SECRET = Pattern(r"(?i)\b(bearer\s+|sk-|api[-_]?key[\"'=:\s]+|access_?token=)[^\s\"'&,;@]{4,}")
#: User and password in a URL, not its port.  A URL without @ is matched as well, and left as it
#: is: a search from each :// anew would take a minute for a header full of them.
_USERINFO = Pattern(r"://([^/\s:@]*:)?[^\s\"'&,;@]*(@?)")
_CONTROL = Pattern("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def mask(secret: str) -> str:
    """Enough of a key to recognise it, not to use it."""
    return secret[:3] + "…" + secret[-4:] if len(secret) >= 16 else "…" if secret else ""


def redact(text: str) -> str:
    """`text` without what looks like a credential."""
    text = _SECRET.sub(r"\1…", text)
    return text if "@" not in text else _USERINFO.sub(
        lambda found: f"://{found[1] or ''}…@" if found[2] else found[0], text)


def one_line(text: Any, limit: int = 300) -> str:
    """`text` fit for a log line or an error: no control characters, not too long, no credential."""
    line = redact(str(text)[:1 << 16])
    line = (line if line.isprintable() else _CONTROL.sub(" ", line)).strip()
    return line if len(line) <= limit else line[:limit - 1] + "…"


def alike(name: str, names: Iterable[str], cutoff: float = 0.65) -> List[str]:
    """Names similar to a mistyped one, the most similar first; at 0.65 `stop` is not `test`."""
    import difflib                       # only on the way to an error message
    return difflib.get_close_matches(name[:100], list(names), 3, cutoff)  # time grows with n * n


def nearest(name: str, names: Iterable[str], cutoff: float = 0.65) -> str:
    """`; did you mean …?` for a mistyped name, "" where none is similar."""
    found = alike(name, names, cutoff)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def fits(name: str, pattern: str) -> bool:
    """Whether a shell pattern takes a name; `m[1m]` is a name before it is a pattern."""
    try:
        return name == pattern or fnmatchcase(name, pattern)
    except re.error:                     # a range that runs backwards, before Python 3.10
        return False


def is_loopback(host: str) -> bool:
    """Whether `host` (a literal or localhost name, without port) can only be this machine."""
    host = host.strip("[]").lower().rstrip(".")
    return host in ("localhost", "::1", "0:0:0:0:0:0:0:1") or host.endswith(".localhost") or (
        re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None)


def remember(table: Dict[Any, Any], name: Any, value: Any, limit: int) -> None:
    """Put a value last into a table; beyond `limit` the one put there longest ago goes."""
    table.pop(name, None)
    table[name] = value
    if len(table) > limit:
        del table[next(iter(table))]


def sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def encode_base64(data: bytes) -> str:
    """For texts that have to survive any channel: the URL alphabet, no padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode_base64(text: str) -> Optional[bytes]:
    """The inverse; None for other spellings: b64decode skips foreign characters and spare bits."""
    try:
        data = base64.b64decode(text + "==", b"-_")
    except ValueError:
        return None
    return data if encode_base64(data) == text else None


# --- files --------------------------------------------------------------------

#: Why a file can't be replaced but may be written: a bind mount, another device, a foreign folder.
_IRREPLACEABLE = {getattr(errno, name, None)
                  for name in ("EBUSY", "EXDEV", "EPERM", "EACCES", "EROFS")}

#: No write takes longer: an older temporary file is a leftover, even if its process id is in use.
TEMP_FILE_S = 60


def make_folder(path: str) -> None:
    """Make a folder and those that are missing above it, each its owner's alone; OSError.

    The mode of os.makedirs is for the last one only, and subject to the umask.
    """
    path, missing = os.path.abspath(path), []
    while not os.path.isdir(path) and os.path.dirname(path) != path:
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        try:
            os.mkdir(folder, 0o700)
            os.chmod(folder, 0o700)      # the umask may have denied the owner, too
        except FileExistsError:          # another process was faster
            if not os.path.isdir(folder):
                raise


def write_file(path: str, data: bytes, has_copy: bool = False) -> None:
    """Write `data` so that a crash leaves the old file or the new one, readable by the owner alone.

    A link is followed.  A file that can't be replaced (bind mount) is written in place, once there
    is a `.bak` of it, which the caller may have made (`has_copy`).  OSError.
    """
    path = os.path.realpath(path)
    make_folder(os.path.dirname(path))
    temp = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        _write(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), data)
        os.replace(temp, path)
        _sync_folder(os.path.dirname(path))
        _drop_leftovers(path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        if exc.errno not in _IRREPLACEABLE or not os.path.isfile(path):
            raise
        if not has_copy:
            with open(path, "rb") as file:
                write_file(path + ".bak", file.read())
        close_to_others(path)
        _write(os.open(path, os.O_WRONLY), data)


def _write(fd: int, data: bytes) -> None:
    """Make `data` the whole content of the open file `fd`, and sync it to the disk."""
    with open(fd, "wb") as file:         # which truncates no file that is given by descriptor
        file.write(data)
        file.truncate()
        file.flush()
        os.fsync(fd)


def close_to_others(path: str) -> None:
    """Take a file's permissions from all but its owner; earlier versions made files for all."""
    with contextlib.suppress(OSError):   # no file, somebody else's, or a system without permissions
        if os.stat(path).st_mode & 0o077:
            os.chmod(path, 0o600)


def _sync_folder(folder: str) -> None:
    """Make a rename durable: a refresh token works only once."""
    with contextlib.suppress(OSError):   # Windows opens no folders
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _drop_leftovers(path: str) -> None:
    """Remove what processes that were killed while they wrote `path` have left beside it."""
    folder, name = os.path.split(path)
    with contextlib.suppress(OSError):   # another process may do the same
        for entry in os.listdir(folder):
            found = re.fullmatch(r"\.(\d{1,9})-[0-9a-f]{8}\.tmp", entry[len(name):])
            if found and entry.startswith(name):
                temp = os.path.join(folder, entry)
                age_s = time.time() - os.stat(temp).st_mtime
                if age_s > TEMP_FILE_S or not _is_running(int(found[1])):
                    os.unlink(temp)


def _is_running(pid: int) -> bool:
    """Whether there is such a process, as far as that can be told."""
    with contextlib.suppress(PermissionError):
        try:
            if os.name == "posix":       # on Windows it ends the process
                os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True


def file_stamp(path: str) -> Tuple[int, ...]:
    """Changes when the file does; () where there is none."""
    try:
        facts = os.stat(path)
    except OSError:
        return ()
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


@contextlib.contextmanager
def file_lock(path: str, timeout_s: float) -> Iterator[None]:
    """One holder at a time among processes and threads; released when its holder dies.

    OSError where the file can't be made, TimeoutError when another holds it too long.  The file
    stays: removing it would let two processes lock two files of the same name.
    """
    make_folder(os.path.dirname(path))
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        until, pause = time.monotonic() + timeout_s, threading.Event()
        while not _lock(fd, path):
            if time.monotonic() >= until:
                raise TimeoutError(errno.ETIMEDOUT,
                                   f"another process has held {path} for {timeout_s:g} s")
            pause.wait(0.02)
        yield
    finally:
        os.close(fd)                     # releases it, too


def _lock(fd: int, path: str) -> bool:
    """Whether the lock was taken; True, and a warning, on a file system without locks."""
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)               # type: ignore[attr-defined]
        else:
            import fcntl
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if not exc.errno or exc.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False                 # Wine gives no number
        if exc.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
        _warn_of_missing_locks(path)
    return True


@lru_cache(maxsize=None)                 # once a file
def _warn_of_missing_locks(path: str) -> None:
    log.warning("this file system knows no locks: only one process may write in %s",
                os.path.dirname(path))


class Cipher:
    """Authenticated encryption out of the standard library alone, which has no cipher.

    HMAC-SHA-256 in counter mode makes the key stream; the tag covers nonce and cipher text
    (encrypt-then-MAC).  The nonce is a MAC of the text itself, as in SIV: two different texts never
    share a key stream, and equal texts give equal bytes, which is all that a bystander learns.
    """
    NONCE_BYTES, TAG_BYTES = 16, 32

    def __init__(self, key: bytes, purpose: bytes) -> None:
        """One key makes different ciphers for different purposes."""
        self._cipher_key, self._tag_key, self._nonce_key = (
            hmac.digest(key, purpose + use, "sha256") for use in (b"cipher", b"tag", b"nonce"))

    def encrypt(self, plain: bytes) -> bytes:
        """Nonce, cipher text and tag."""
        nonce = hmac.digest(self._nonce_key, plain, "sha256")[:self.NONCE_BYTES]
        data = nonce + self._xor(nonce, plain)
        return data + hmac.digest(self._tag_key, data, "sha256")

    def decrypt(self, data: bytes) -> Optional[bytes]:
        """What was encrypted; None: with another key, or damaged."""
        data, tag = data[:-self.TAG_BYTES], data[-self.TAG_BYTES:]
        expected = hmac.digest(self._tag_key, data, "sha256")
        if len(data) < self.NONCE_BYTES or not hmac.compare_digest(expected, tag):
            return None
        return self._xor(data[:self.NONCE_BYTES], data[self.NONCE_BYTES:])

    def _xor(self, nonce: bytes, data: bytes) -> bytes:
        """`data` XOR key stream, as two integers: a loop over bytes takes thirty times as long."""
        stream = b"".join(hmac.digest(self._cipher_key, nonce + block.to_bytes(8, "big"), "sha256")
                          for block in range((len(data) + 31) // 32))
        masked = int.from_bytes(data, "big") ^ int.from_bytes(stream[:len(data)], "big")
        return masked.to_bytes(len(data), "big")


# --- shapes of values ---------------------------------------------------------

#: Checks a value at a place such as `client_keys[0].rpm`: returns it, cleaned; ValueError names the
#: place and what was expected there.
Shape = Callable[[Any, str], Any]


def has_type(value: Any, kind: Any) -> bool:
    """Like isinstance, but true is no number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def object_of(value: Any) -> Json:
    """`value` where it is a JSON object, else {}."""
    return value if isinstance(value, dict) else {}


def objects_of(value: Any) -> List[Json]:
    """The JSON objects in a list; [] where it is none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def non_empty(**fields: Any) -> Json:
    """The fields that have a value: one that is not None, 0, false or empty."""
    return {name: value for name, value in fields.items() if value}


def misfit(where: str, expected: str, value: Any = (), hint: str = "") -> ValueError:
    """The error of a value at a place; it has the value, unless that has parts or is a secret."""
    shown = not isinstance(value, (list, dict, tuple))
    found = f", not {one_line(json.dumps(value), 60)}" if shown else ""
    return ValueError(f"{where + ': ' if where else ''}{expected} expected{found}{hint}")


def place(where: str, name: str) -> str:
    """`where.name`, for messages: the place of a field."""
    return f"{where}.{one_line(name, 60)}" if where else one_line(name, 60)


def anything(value: Any, where: str) -> Any:
    return value


def secret_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise misfit(where, "a string")
    return value


def any_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise misfit(where, "a string", value)
    # \udc80 to \udcff stand for bytes of file names that are no UTF-8; no name has the others
    if re.search("[\0\ud800-\udc7f\udd00-\udfff]", value):
        raise misfit(where, "a string without NUL and lone surrogates")
    return value


def filled_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {one_line(json.dumps(value), 60)} is no text")
    return value


def text_like(pattern: str, expected: str, hint: str = "", is_secret: bool = False) -> Shape:
    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise misfit(where, expected, () if is_secret else value, hint)
        return value
    return check


def truth(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise misfit(where, "true or false", value)
    return value


def number(low: float, high: float, whole: bool = False) -> Shape:
    def check(value: Any, where: str) -> Any:
        if not has_type(value, int if whole else (int, float)) or not low <= value <= high:
            what = f"{'a whole number' if whole else 'a number'} from {low} to {high}"
            no_limit = has_type(value, int) and value == 0 < low and high >= 10 ** 12
            raise misfit(where, what, value, " (leave it out for no limit)" if no_limit else "")
        return value
    return check


def one_of(*allowed: Any) -> Shape:
    def check(value: Any, where: str) -> Any:
        if not any(type(value) is type(known) and value == known for known in allowed):
            raise misfit(where, "one of " + ", ".join(map(json.dumps, allowed)), value)
        return value
    return check


def list_of(shape: Shape) -> Shape:
    def check(value: Any, where: str) -> Any:
        if not isinstance(value, list):
            raise misfit(where, "a list")
        return [shape(item, f"{where}[{at}]") for at, item in enumerate(value)]
    return check


def names_to(shape: Shape, name_shape: Shape = anything) -> Shape:
    """An object with any names."""
    def check(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise misfit(where, "an object")
        return {name_shape(name, where): shape(item, place(where, name))
                for name, item in value.items()}
    return check


def record(need: Mapping[str, Shape], may: Mapping[str, Shape], strict: bool = True) -> Shape:
    """An object of known fields; null is as good as missing.  Unless `strict`, others are left out.
    """
    known = {**need, **may}

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise misfit(where, "an object")
        for name in need:
            if value.get(name) is None:
                raise ValueError(f"{place(where, name)}: it is missing")
        for name in value:
            if name not in known and strict:
                raise ValueError(f"{place(where, name)}: no such field; "
                                 f"there are {', '.join(known)}")
        return {name: known[name](item, place(where, name))
                for name, item in value.items() if item is not None and name in known}
    return check


#: The kind of a setting, or of a field of a request to the page's API -> its shape.
KIND_SHAPES: Dict[str, Shape] = {
    "str": any_text, "bool": truth, "int": number(-10 ** 12, 10 ** 12, True),
    "float": number(-10 ** 12, 10 ** 12), "list": list_of(anything), "dict": names_to(anything)}
KIND_WORDS = {"str": "a string", "int": "a whole number", "float": "a number",
              "bool": "true or false", "list": "a list", "dict": "an object"}


# === 5. Settings =============================================================

def setting(kind: str, default: Any, group: str, text: str, **facts: Any) -> Any:
    """A field of `Settings`; its metadata serve file, environment, flags, help and forms alike.

    `kind`: str, int, float, bool, list or dict.  `group`: where a form shows it.  `text`: what it
    is called and, where there is more to say, a hint, each in Chinese and in English.  `facts`:
    flag, low, high, choices, secret, restart (takes effect at the next start), older (a name of the
    older program, kept for it), file_only (set by file and command line only: what names files,
    whom to trust and where logins go would make whoever has the page's password the master of this
    machine).
    """
    texts = tuple(text.split(" | "))
    metadata = {"kind": kind, "group": group, "label": texts[:2], "hint": texts[2:], **facts}
    if isinstance(default, (list, dict)):
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, repr=False)
class Settings:
    """Everything the user can change.  Frozen: a request works on the snapshot it started with."""
    host: str = setting("str", "127.0.0.1", "server", flag="--host", restart=True, file_only=True,
        text="监听地址 | Address to listen on | 127.0.0.1 仅限本机；0.0.0.0 允许其他机器访问，此时需要客户端密钥。 "
             "| 127.0.0.1 serves this machine only; 0.0.0.0 serves others too, with a client key.")
    port: int = setting("int", 28000, "server", low=0, high=65535, flag="--port", restart=True,
        text="端口 | Port | 0 表示自动选一个空闲端口。 | 0 picks a free one.")
    providers: List[Any] = setting("list", [], "upstream",
        "上游列表 | Providers: name, base_url, api_keys, …")
    default_provider: str = setting("str", "", "upstream",
        "默认上游 | Default provider | 没有别名匹配、也没有上游列出的模型名发到这里；留空则为第一个。 "
        "| Gets models that no alias and no provider knows. Empty: the first one.")
    aliases: Dict[str, Any] = setting("dict", {}, "upstream",
        "模型别名 | Model aliases: pattern -> model, or models to try in order")
    default_model: str = setting("str", "", "upstream", flag="--model",
        text="默认模型 | Default model | 请求没有指定模型，或用了 claude-*、gpt-* 等别家的模型名时使用。 "
             "| For requests without a model, or with a foreign name like claude-* or gpt-*.")
    api_concurrency: int = setting("int", 1, "iflow", low=0,
        text="每个 iFlow 账号的并发数 | Requests at once per iFlow account | 0 为不限。 | 0: no limit.")
    retry: Dict[str, Any] = setting("dict", {}, "upstream",
        '失败重试 | Retries of a failed provider | JSON，例如 {"count": 2, "backoff_s": 0.5, '
        '"max_backoff_s": 10, "total_s": 60}：次数、首次等待、最长等待、总时限（秒）。默认不重试。 '
        '| JSON: {"count": 2, "backoff_s": 0.5, "max_backoff_s": 10, "total_s": 60}: how often, '
        "first and longest pause, time for all (seconds). Default: none.")
    circuit: Dict[str, Any] = setting("dict", {}, "upstream",
        '熔断 | Rest for a failing provider | JSON，例如 {"failures": 5, "rest_s": 30}：连续失败 5 次后暂停 30 秒'
        "（默认）；failures 为 0 则从不暂停。 "
        '| JSON such as {"failures": 5, "rest_s": 30}: after 5 failures in a row it rests for 30 s '
        "(the default); 0 failures: never.")
    sticky: bool = setting("bool", False, "upstream",
        "同一会话使用同一密钥 | Same API key for a whole conversation | 有利于命中上游的前缀缓存；关闭时密钥轮流使用。 "
        "| Helps the provider's prefix cache. Off: the keys take turns.")
    client_keys: List[Any] = setting("list", [], "clients",
        "客户端密钥列表 | Client keys, made by `key add`")
    address_limits: Dict[str, Any] = setting("dict", {}, "clients",
        "每个地址的限额 | Limits per client address | JSON，可含 rpm、rph、rpd、tpd、concurrency；在“密钥与限额”里填写更方便。 "
        "| JSON: rpm, rph, rpd, tpd, concurrency; easier in Keys & limits.")
    usage: bool = setting("bool", True, "logs",
        "记录用量 | Record usage | 请求数与 token 数写入 usage.jsonl，不含内容；有限额时总会写入，以便重启后仍然有效。 "
        "| Counts requests and tokens in usage.jsonl, never their content; where keys or addresses "
        "have limits, always: they outlast a restart.")
    usage_days: int = setting("int", 92, "logs", low=1, high=3660,
        text="用量保留天数 | Days that usage is kept")
    prices: Dict[str, Any] = setting("dict", {}, "logs",
        '价格 | Prices | JSON，每百万 token，例如 {"glm-*": {"input": 2, "output": 8, "cached": 0.5}}。 '
        '| JSON, for a million tokens: {"glm-*": {"input": 2, "output": 8}}; also cached.')
    custom_api_key: str = setting("str", "", "clients", secret=True,
        text="固定的客户端密钥 | Fixed client key | 设置后，客户端可用它或“密钥与限额”里的密钥。 "
             "| Once set, clients must send it, or a key made under Keys & limits.")
    admin_password: str = setting("str", "", "server", secret=True,
        text="管理页面密码 | Password of the admin page, as a hash")
    custom_auth_header: str = setting("str", "", "clients",
        "额外读取密钥的请求头 | Extra header that carries the client key | 除 Authorization、x-api-key、api-key "
        "之外，例如 X-Gateway-Key。 "
        "| Besides Authorization, x-api-key and api-key; for example X-Gateway-Key.")
    allowed_hosts: List[Any] = setting("list", [], "clients",
        "允许的 Host | Allowed host names | 访问时用的域名，例如反向代理的 api.example.com；本机名称无需填写。 "
        "| Names this server is reached by, such as api.example.com behind a proxy. This machine's "
        "own need no entry.")
    allowed_origins: List[Any] = setting("list", [], "clients",
        "允许的网页来源 | Allowed web origins | 这些网页无需密钥即可调用，例如 https://chat.example.com。 "
        "| Web pages that may call without a key, as https://chat.example.com.")
    trusted_proxies: List[Any] = setting("list", [], "clients",
        "可信代理 | Trusted proxies | 信任其 X-Forwarded-For 的地址或网段，例如 10.0.0.0/8。 "
        "| Addresses or networks whose X-Forwarded-For counts: 10.0.0.0/8.")
    preserve_reasoning_content: bool = setting("bool", False, "iflow",
        "保留 reasoning_content | Keep reasoning_content apart | 仅 iFlow：思考内容放在单独的字段里，不并入正文。 "
        "| iFlow only: thinking stays in its own field, not in the text.")
    vision_model: str = setting("str", "qwen-vl-max", "iflow",
        "识图模型 | Model for images | 带图片的 iFlow 请求改用它。 | Takes iFlow requests that carry images.")
    vision_mode: str = setting("str", "route", "iflow", choices=("route", "pass"),
        text="图片的处理 | What happens to images | route：改用识图模型；pass：原样发给所请求的模型。 "
             "| route: the model for images answers. pass: the requested model gets them.")
    upstream_proxy: str = setting("str", "", "upstream", secret=True,
        text="上游代理 | Proxy to the providers | http://、socks5://、socks5h:// 地址，或 env（按环境变量）；需同时启用。 "
             "| An http://, socks5:// or socks5h:// address, or env for the environment's. Turn it "
             "on as well.")
    upstream_proxy_enabled: bool = setting("bool", False, "upstream",
        "启用上游代理 | Use the proxy to the providers")
    ca_file: str = setting("str", "", "upstream", file_only=True,
        text="额外的 CA 证书 | Additional CA certificates | PEM 文件的路径，用于自签名或公司内部的证书。 "
             "| Path of a PEM file, for self-signed or company certificates.")
    connect_timeout_s: float = setting("float", 10, "upstream", low=0.1,
        text="连接上游的时限 | Time to connect to a provider")
    first_byte_timeout_s: float = setting("float", 300, "upstream", low=0.1,
        text="等待上游首字节的时限 | Longest wait for an answer to begin")
    idle_timeout_s: float = setting("float", 300, "upstream", low=0.1,
        text="回答中断的时限 | Longest silence within an answer")
    body_limit_bytes: int = setting("int", 64 << 20, "server", low=1024,
        text="请求体上限 | Largest request body")
    max_connections: int = setting("int", 2000, "server", low=1,
        text="最大连接数 | Client connections at once")
    queue_limit: int = setting("int", 64, "upstream", low=0,
        text="排队上限 | Queue length per provider | 上游并发已满时最多排队的请求数，更多的会收到 503。 "
             "| Requests that may wait when a provider is busy; further ones get 503.")
    queue_timeout_s: float = setting("float", 300, "upstream", low=0.1,
        text="最长排队时间 | Longest wait in the queue")
    keepalive_s: float = setting("float", 10, "server", low=0.05,
        text="保活间隔 | Keep-alive interval of streams | 流式回答静默这么久后发一次保活，避免客户端超时。 "
             "| After such a silence a sign of life is sent, so that clients don't give up.")
    drain_s: float = setting("float", 10, "server", low=0,
        text="退出前的等待 | Time to finish when stopping | 停止时让进行中的回答有时间结束。 "
             "| Running answers may end before the program does.")
    detect_local: bool = setting("bool", True, "upstream",
        "自动发现本地引擎 | Find local engines by itself | 没有配置上游时，查找本机的 Ollama、LM Studio 等。 "
        "| Looks for Ollama, LM Studio and the like when no provider is set up.")
    docs_cdn: bool = setting("bool", True, "appearance",
        "文档页使用 CDN | API documents from a CDN | /docs 与 /redoc 从 jsdelivr 加载 Swagger UI 和 ReDoc；关闭"
        "则只显示路径列表。 "
        "| /docs and /redoc load Swagger UI and ReDoc from jsdelivr. Off: a plain list.")
    language: str = setting("str", "", "appearance", choices=("", "zh", "en"),
        text="语言 | Language | zh 中文，en 英文；自动则按系统或浏览器。 "
             "| zh: Chinese, en: English. Automatic follows the system or browser.")
    theme_mode: str = setting("str", "system", "appearance", choices=("system", "light", "dark"),
        text="主题 | Theme of this page")
    log_level: str = setting(
        "str", "info", "logs", choices=("debug", "info", "warning", "error"), flag="--log-level",
        text="日志级别 | Log level")
    log_file: str = setting("str", "", "logs", restart=True, file_only=True,
        text="日志文件 | Log file | 填写路径后，日志也写入这个文件。 "
             "| With a path here, the log goes to that file as well.")
    iflow_auth_url: str = setting("str", "https://iflow.cn/oauth", "iflow", file_only=True,
        text="iFlow 授权地址 | iFlow login page")
    iflow_token_url: str = setting("str", "https://iflow.cn/oauth/token", "iflow", file_only=True,
        text="iFlow 令牌地址 | iFlow token address")
    iflow_userinfo_url: str = setting(
        "str", "https://iflow.cn/api/oauth/getUserInfo", "iflow", file_only=True,
        text="iFlow 用户信息地址 | iFlow account address | 登录后从这里取得 API 密钥。 "
             "| Where the API key comes from after the login.")
    oauth_client_id: str = setting("str", "10009311001", "iflow", file_only=True,
        text="OAuth 客户端 ID | OAuth client ID")
    #: Published in its CLI (RFC 8252, 8.5).
    oauth_client_secret: str = setting(
        "str", "4Z3YjXycVsQvyGF1etiNlIBB4RsqSDtW", "iflow", secret=True, file_only=True,
        text="OAuth 客户端密钥 | OAuth client secret | iFlow CLI 公开的值，一般无需修改。 "
             "| Published with iFlow's CLI; rarely needs a change.")
    accounts: Dict[str, Any] = setting("dict", {}, "iflow",
        "更多 iFlow 账号 | Further iFlow accounts, kept by `login --account`")
    encrypt_secrets: bool = setting("bool", True, "server",
        "加密保存密钥 | Encrypt stored secrets | config.json 里的密钥和令牌。 | Keys and tokens in config.json.")
    api_key: str = setting("str", "", "iflow", secret=True,
        text="iFlow 密钥 | iFlow API key | 登录 iFlow 后无需填写。 "
             "| Not needed once you are logged in to iFlow.")
    base_url: str = setting("str", "", "iflow",
        "iFlow 接口地址 | iFlow API address | 留空则用 iFlow 自己的地址。 | Empty: iFlow's own.")
    auth_type: str = setting("str", "", "iflow", older=True,
        text="iFlow 登录方式 | iFlow login type; openai-compatible: a plain provider")


SETTING = {item.name: item for item in fields(Settings)}
_DEFAULTS = Settings()
_TRUTH = {"true": True, "1": True, "yes": True, "on": True,
          "false": False, "0": False, "no": False, "off": False}


def default_of(name: str) -> Any:
    """The default value of a setting, a fresh one where it is a list or an object."""
    value = getattr(_DEFAULTS, name)
    return type(value)(value) if isinstance(value, (list, dict)) else value


def check_setting(name: str, value: Any, where: str = "") -> Any:
    """`value`, checked for the setting; ValueError names the place (`where`, else the setting)."""
    facts = SETTING[name].metadata
    kind, is_whole = facts["kind"], facts["kind"] == "int"
    if name in SETTING_SHAPES:
        shape = SETTING_SHAPES[name]
    elif "choices" in facts:
        shape = one_of(*facts["choices"])
    elif kind in ("int", "float"):
        high = facts.get("high", 10 ** 12 if is_whole else LONGEST_S)
        shape = number(facts.get("low", 0), high, is_whole)
    else:
        shape = secret_text if facts.get("secret") else KIND_SHAPES[kind]
    return shape(value, where or name)


def parse_setting(name: str, text: str, where: str = "") -> Any:
    """The value that `text` (a variable, a flag, an argument) stands for; ValueError as above.

    Lists and objects are JSON.
    """
    kind = SETTING[name].metadata["kind"]
    value: Any = text
    if kind == "bool":
        value = _TRUTH.get(text.strip().lower(), text)
    elif kind != "str":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            what = KIND_WORDS[kind] + (" as JSON" if kind in ("list", "dict") else "")
            raise misfit(where or name, what) from None
    return check_setting(name, value, where)


class Loaded(NamedTuple):
    """Settings, the source of each that is no default, and warnings, a sentence each."""
    settings: Settings
    origins: Dict[str, str]
    warnings: List[str]


def load_settings(raw: Json, environ: Mapping[str, str], flags: Mapping[str, Any],
                  last: Optional[Settings] = None) -> Loaded:
    """Settings from flags > environment > file > defaults; of a bad value the next source counts.

    `last` are the settings in force, kept where a value of the file has become bad.
    """
    values: Json = {}
    origins: Dict[str, str] = {}
    warnings: List[str] = []
    for name, item in SETTING.items():
        # ConfigFile reports secrets that can't be decrypted.  A client key counts all the same: a
        # server that demanded a key must not suddenly demand none.
        unreadable = (item.metadata.get("secret") and is_encrypted(raw.get(name))
                      and name != "custom_api_key")
        if name in raw and not unreadable:
            try:
                values[name], origins[name] = check_setting(name, raw[name]), "file"
            except ValueError as exc:
                warnings.append(f"config.json: {exc}")
                if last is not None:
                    values[name] = getattr(last, name)
                elif name == "client_keys":      # a malformed value must not disable authentication
                    is_list = isinstance(raw[name], list) and raw[name]
                    values[name] = raw[name] if is_list else [None]
        variable = ENV_PREFIX + name.upper()
        if environ.get(variable):
            try:
                values[name] = parse_setting(name, environ[variable], variable)
                origins[name] = "environment"
            except ValueError as exc:
                warnings.append(str(exc))
    origins.update(dict.fromkeys(flags, "flag"))
    return Loaded(Settings(**{**values, **flags}), origins, warnings)


# --- secrets at rest -----------------------------------------------------------

ENCRYPTED = "enc:"
_REFERENCE = r"\$[A-Za-z_]\w*"

#: Secret fields of an account.
LOGIN_SECRETS = ("apiKey", "searchApiKey", "oauth_access_token", "oauth_refresh_token")

#: Fields of a provider that may hold secrets, also fields that we do not know; headers that may.
_SECRET_FIELD = r"(?i)keys?$|token|secret|password|headers|proxy|_url$"
_SECRET_HEADER = r"(?i)auth|cookie|secret|token|password|credential|key"


def is_encrypted(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(ENCRYPTED)


def map_secrets(raw: Json, change: Callable[[str, str], str]) -> Json:
    """`raw` (config.json's object) with `change(place, text)` for what may be secret; a new object.

    The one walk for encrypting, decrypting and masking.  `$NAME` is no secret, only the name of
    one, and stays.
    """
    def on_text(where: str, value: Any) -> Any:
        is_secret = isinstance(value, str) and value and not re.fullmatch(_REFERENCE, value)
        return change(where, value) if is_secret else value

    def on(where: str, value: Any) -> Any:
        if isinstance(value, list):
            return [on_text(f"{where}[{at}]", item) for at, item in enumerate(value)]
        if isinstance(value, dict):
            return {name: on_text(place(where, name), item) for name, item in value.items()}
        return on_text(where, value)

    def on_fields(where: str, value: Any, is_secret: Callable[[str], Any]) -> Any:
        if not isinstance(value, dict):
            return on_text(where, value)
        return {name: on(place(where, name), item) if is_secret(name) else item
                for name, item in value.items()}

    raw = on_fields("", raw, lambda name: name in SETTING and SETTING[name].metadata.get("secret"))
    if isinstance(raw.get("providers"), list):
        raw["providers"] = [
            on_fields(f"providers[{at}]", entry, lambda name: re.search(_SECRET_FIELD, name))
            for at, entry in enumerate(raw["providers"])]
    if isinstance(raw.get("accounts"), dict):
        raw["accounts"] = {name: on_fields(f"accounts.{name}", login, LOGIN_SECRETS.__contains__)
                           for name, login in raw["accounts"].items()}
    return raw


def _is_url(where: str) -> bool:
    return where.endswith(("proxy", "_url")) and ".headers." not in where


def is_to_encrypt(where: str, text: str) -> bool:
    """Whether a text that map_secrets found has to be encrypted.

    Not if it is already, nor a URL without a password or a header that holds no credential.
    """
    _, is_header, name = where.partition(".headers.")
    return not (is_encrypted(text) or _is_url(where) and "@" not in text
                or is_header and not re.search(_SECRET_HEADER, name))


def hide_secrets(name: str, value: Any) -> Any:
    """A setting's value as it may be shown."""
    def hide(where: str, text: str) -> str:
        if _is_url(where) and "://" in text:
            return re.sub("[?#].*", "…", redact(text))
        return mask(text) if name != "admin_password" else "…"
    return map_secrets({name: value}, hide)[name]


def hide_in_provider(entry: Json) -> Json:
    """An entry of `providers` as it may be shown."""
    return hide_secrets("providers", [entry])[0]


class CannotDecrypt(ValueError):
    """An encrypted value that can't be read; the text says why, and names no secret."""


class Vault:
    """Encrypts the secrets of config.json and its .bak: `enc:v1:PARAMETERS.KEY_ID.DATA`.

    It protects what leaves this machine without the key: a config.json shown in a bug report,
    synchronised, committed or backed up.  The key is `secret.key` beside it (random, 0600), so it
    does not protect against who can read the whole folder as this user or as root; with
    IFLOW2API_PASSPHRASE, from which the key is derived, it does, if the environment is safe.
    DATA is base64 of what Cipher makes; PARAMETERS are `k` (key file) or `pITERATIONS-SALT`
    (PBKDF2-HMAC-SHA-256).
    """
    PURPOSE = b"iflow2api secrets 1: "
    #: PBKDF2 takes about this long here; fewest (a router) and most rounds.
    DERIVE_S, ITERATIONS = 0.2, (20_000, 2_000_000)

    def __init__(self, folder: str, environ: Optional[Mapping[str, str]] = None) -> None:
        self.key_path = os.path.join(folder, "secret.key")
        self._environ = os.environ if environ is None else environ
        self._derived: Dict[str, bytes] = {}     #: by PARAMETERS and passphrase: 0.2 s each
        self._parameters = ""            #: of the passphrase, as found in the file, else made new

    def decrypt(self, text: str) -> str:
        """The secret; CannotDecrypt."""
        found = re.fullmatch(r"enc:v1:([^.]*)\.([^.]*)\.([^.]*)", text)
        if not found:
            is_ours = text.startswith(ENCRYPTED + "v1:")
            raise CannotDecrypt("it is damaged" if is_ours else
                                "a newer version encrypted it, or it is damaged")
        parameters, key_id, data = found[1], found[2], decode_base64(found[3])
        for key in self._keys(parameters):
            if self._id(key) == key_id:
                plain = None if data is None else self._cipher(key, parameters).decrypt(data)
                if plain is None:
                    raise CannotDecrypt("it is damaged")
                self._parameters = parameters if parameters != "k" else self._parameters
                return plain.decode("utf-8", "surrogatepass")
        other = f"key than {self.key_path} holds" if parameters == "k" else "passphrase"
        raise CannotDecrypt(f"it is encrypted with another {other}, or damaged")

    def encrypt(self, secret: str) -> str:
        """The text to store; OSError where there is no key and none can be made."""
        parameters = "k"
        if self._environ.get(ENV_PREFIX + "PASSPHRASE"):
            parameters = self._parameters or f"p{self.iterations()}-{secrets.token_hex(16)}"
            self._parameters = parameters
        elif not self._filed_keys():
            write_file(self.key_path, secrets.token_bytes(32))
        key = self._keys(parameters)[0]
        data = self._cipher(key, parameters).encrypt(secret.encode("utf-8", "surrogatepass"))
        return f"{ENCRYPTED}v1:{parameters}.{self._id(key)}.{encode_base64(data)}"

    def _cipher(self, key: bytes, parameters: str) -> Cipher:
        return Cipher(key, self.PURPOSE + parameters.encode())

    @staticmethod
    def _id(key: bytes) -> str:
        """Tells a wrong key from a damaged value."""
        return hmac.digest(key, b"iflow2api key id", "sha256")[:6].hex()

    def _keys(self, parameters: str) -> List[bytes]:
        """The keys that may have encrypted a value with these parameters; CannotDecrypt."""
        if parameters == "k":
            try:
                return self._filed_keys()
            except OSError as exc:
                raise CannotDecrypt(f"its key can't be read: {exc.strerror or exc}") from None
        found = re.fullmatch(r"p(\d{1,8})-([0-9a-f]{32})", parameters)
        if not found or not 1 <= int(found[1]) <= 10_000_000:
            raise CannotDecrypt("it is damaged")
        passphrase = self._environ.get(ENV_PREFIX + "PASSPHRASE", "")
        if not passphrase:
            raise CannotDecrypt(f"it is encrypted with a passphrase: set {ENV_PREFIX}PASSPHRASE")
        wanted = parameters + passphrase
        if wanted not in self._derived:
            encoded = passphrase.encode("utf-8", "surrogateescape")
            self._derived[wanted] = stretch(encoded, found[1], found[2])
        return [self._derived[wanted]]

    def _filed_keys(self) -> List[bytes]:
        """Those in the key file: all decrypt, the first encrypts; OSError where it is damaged."""
        try:
            with open(self.key_path, "rb") as file:
                data = file.read(32 * 64 + 1)
        except FileNotFoundError:
            return []
        if not data or len(data) % 32:
            raise OSError(errno.EINVAL, f"{self.key_path} is damaged: 32 bytes expected")
        return [data[at:at + 32] for at in range(0, len(data), 32)]

    @classmethod
    def iterations(cls) -> int:
        """Rounds that take about DERIVE_S on this machine."""
        fewest, most = cls.ITERATIONS
        started = time.perf_counter()
        stretch(b"measure", fewest, "00")
        taken_s = max(time.perf_counter() - started, 1e-6)
        return max(fewest, min(most, int(fewest * cls.DERIVE_S / taken_s) // 1000 * 1000))


def stretch(password: bytes, iterations: Any, salt: str) -> bytes:
    """32 bytes out of a password: slowly, so that guessing is slow."""
    return hashlib.pbkdf2_hmac("sha256", password, bytes.fromhex(salt), int(iterations))


_PASSWORD_HASH = r"pbkdf2-sha256\$([1-9]\d{0,7})\$([0-9a-f]{32})\$([0-9a-f]{64})"


def check_password_length(password: str) -> None:
    """ValueError for a password that is too short or too long."""
    least, most = PASSWORD_LENGTH
    if not least <= len(password) <= most:
        raise ValueError(f"a password has from {least} to {most} characters")


def hash_password(password: str) -> str:
    """`pbkdf2-sha256$ITERATIONS$SALT$HASH`, as `admin_password` keeps it; ValueError: length."""
    check_password_length(password)
    iterations, salt = Vault.iterations(), secrets.token_hex(16)
    made = stretch(password.encode("utf-8", "surrogatepass"), iterations, salt)
    return f"pbkdf2-sha256${iterations}${salt}${made.hex()}"


def is_password(password: str, stored: str) -> bool:
    """Whether `stored` is a hash_password of this password."""
    found = re.fullmatch(_PASSWORD_HASH, stored)
    return found is not None and hmac.compare_digest(
        stretch(password.encode("utf-8", "surrogatepass"), found[1], found[2]).hex(), found[3])


# --- config.json -------------------------------------------------------------

class ConfigBroken(Exception):
    """config.json can't be read; the text says where and why."""


def read_json_file(path: str) -> Json:
    """The object in `path`, {} where there is no such file; ConfigBroken says what is wrong.

    A byte order mark is accepted: Notepad and PowerShell write one.
    """
    where = "line 1, column 1"
    try:
        with open(path, "rb") as file:
            data = file.read()
        is_utf16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        value = json.loads(data.decode("utf-16" if is_utf16 else "utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError("an object expected")
        return value
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise ConfigBroken(f"{path}: {exc.strerror or exc}") from None
    except json.JSONDecodeError as exc:
        where, reason = f"line {exc.lineno}, column {exc.colno}", exc.msg
    except UnicodeDecodeError as exc:
        column = exc.start - data.rfind(b"\n", 0, exc.start)
        line = data.count(b"\n", 0, exc.start) + 1
        where, reason = f"line {line}, column {column}", "not UTF-8 text"
    except (RecursionError, ValueError) as exc:
        reason = str(exc)
    raise ConfigBroken(f"{path}: {where}: {reason}")


class ConfigFile:
    """config.json and its `.bak`: unknown keys survive, and a crash leaves one of the two whole.

    Reading decrypts secrets, writing encrypts them; one that can't be decrypted stays as it is.
    """

    def __init__(self, folder: str, environ: Optional[Mapping[str, str]] = None) -> None:
        self.folder = os.path.abspath(os.path.expanduser(folder))
        self.path = os.path.join(self.folder, "config.json")
        self.backup = self.path + ".bak"
        self.vault = Vault(self.folder, environ)
        self.unreadable: List[str] = []  #: what the last reading could not decrypt, a sentence each
        self._lock = threading.RLock()

    def warning(self) -> str:
        """A sentence where others may write the folder, and so decide whom to trust; else ""."""
        with contextlib.suppress(OSError):
            if os.name == "posix" and os.stat(self.folder).st_mode & 0o022:
                return f"others may write the folder {self.folder}: run: chmod 700 {self.folder}"
        return ""

    def read(self, name: str = "config.json") -> Json:
        """The file (or its backup, by name), the secrets in it decrypted; ConfigBroken."""
        unreadable: List[str] = []

        def decrypt(where: str, text: str) -> str:
            if not is_encrypted(text):
                return text
            try:
                return self.vault.decrypt(text)
            except CannotDecrypt as exc:
                unreadable.append(f"{name}: {where} can't be read: {exc}")
                return text

        raw = map_secrets(read_json_file(os.path.join(self.folder, name)), decrypt)
        self.unreadable = unreadable
        return raw

    def recover(self) -> Tuple[Json, List[str]]:
        """The file, else its backup, else nothing; and what was wrong, a sentence each."""
        try:
            return self.read(), []
        except ConfigBroken as exc:
            warning = str(exc)
        with contextlib.suppress(ConfigBroken):
            if os.path.exists(self.backup):
                return self.read("config.json.bak"), [
                    warning + " (running with config.json.bak)"]
        return {}, [warning + " (running with defaults)"]

    def change(self, edit: Callable[[Json], None]) -> List[str]:
        """Let `edit` change the object in the file and write it; a broken file is moved aside.

        Returns what was wrong, a sentence each.  Raises OSError where nothing can be written.
        """
        with self._lock, self.lock():
            raw, warnings = self.recover()
            edit(raw)
            data = self.to_bytes(self._encrypted_if_possible(raw))
            if warnings and os.path.isfile(self.path):   # copied, since the disk may be full
                kept = f"{self.path}.broken-{time.strftime('%Y%m%d-%H%M%S')}"
                with open(self.path, "rb") as file:
                    write_file(kept, file.read())
                warnings.append(f"what the broken file held is in {kept}")
            elif os.path.isfile(self.path):
                self._back_up()
            write_file(self.path, data, has_copy=bool(warnings) or os.path.isfile(self.backup))
        return warnings

    def lock(self) -> Any:
        """One writer at a time; beside a lone bind-mounted file there is no place for a lock."""
        if os.path.isdir(self.folder) and not os.access(self.folder, os.W_OK):
            return contextlib.nullcontext()
        return file_lock(os.path.join(self.folder, "config.lock"), 30.0)

    @staticmethod
    def to_bytes(raw: Json) -> bytes:
        """The text of the file for `raw`."""
        text = json.dumps(raw, ensure_ascii=False, indent=2)
        if re.search("[\ud800-\udfff]", text):                  # JSON may carry them, UTF-8 may not
            text = json.dumps(raw, indent=2)
        return text.encode() + b"\n"

    def _encrypted(self, raw: Json) -> Json:
        """`raw` as it goes into the file; OSError, CannotDecrypt: there is no usable key."""
        if raw.get("encrypt_secrets") is False:
            return raw
        return map_secrets(raw, lambda where, text: self.vault.encrypt(text)
                           if is_to_encrypt(where, text) else text)

    def _encrypted_if_possible(self, raw: Json) -> Json:
        """Without a usable key the secrets stay as they are, so that settings can still change."""
        try:
            return self._encrypted(raw)
        except (OSError, CannotDecrypt) as exc:
            reason = getattr(exc, "strerror", None) or exc
            log.warning("secrets in %s stay unencrypted: %s", self.path, reason)
            return raw

    def _back_up(self) -> None:
        """Keep the last good file, where there is a place for it (not beside a lone bind mount)."""
        with open(self.path, "rb") as file:
            data = file.read()
        try:
            raw = read_json_file(self.path)
            encrypted = self._encrypted_if_possible(raw)
            write_file(self.backup, data if encrypted == raw else self.to_bytes(encrypted))
        except (OSError, ConfigBroken) as exc:
            log.warning("no backup of %s: %s", self.path, getattr(exc, "strerror", None) or exc)

    def encrypt(self, on: bool) -> List[str]:
        """Write the file and its .bak with secrets encrypted, or (not `on`) in clear.

        Returns a sentence for each secret that can't be decrypted; it stays as it is.  Raises
        OSError, ConfigBroken, CannotDecrypt.
        """
        with self._lock, self.lock():
            raw = self.read()
            raw.pop("encrypt_secrets", None)     # which is on by default
            raw.update({} if on else {"encrypt_secrets": False})
            data = self.to_bytes(self._encrypted(raw))
            if os.path.isfile(self.path) or not on:
                write_file(self.backup, data)
                write_file(self.path, data, has_copy=True)
            return self.unreadable

    def count_secrets(self) -> int:
        """How many the file holds, encrypted or not; ConfigBroken."""
        found: List[str] = []

        def count(where: str, text: str) -> str:
            found.append(where)
            return text

        map_secrets(read_json_file(self.path), count)
        return len(found)


def entries_of(raw: Json, name: str) -> List[Any]:
    """A list in config.json, [] where it is none."""
    return raw[name] if isinstance(raw.get(name), list) else []


def name_of(entry: Any) -> str:
    """The name of an entry of `providers` or `client_keys`, "" where it has none."""
    name = object_of(entry).get("name")
    return name if isinstance(name, str) else ""


# --- contents of settings -----------------------------------------------------

LIMIT_FIELDS = {name: number(1 / BUDGET_UNIT, 10 ** 9) if name in BUDGETS else
                number(1, 10 ** 12, True) for name in LIMIT_WORDS}
_HEADER_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_NAME = r"[^\s/,]{1,64}"
entry_name = text_like(_NAME, "a name without blanks, commas and slashes")


def network(value: Any, where: str) -> str:
    try:
        parse_network(value)
    except ValueError:
        raise misfit(where, "an address or a network", value) from None
    return value


def host_name(value: Any, where: str) -> str:
    if not any_text(value, where).strip():       # an empty one would mean every address
        raise misfit(where, "an address", hint="; 0.0.0.0 stands for all of this machine's")
    return value


def header_name(value: Any, where: str) -> str:
    if not re.fullmatch(_HEADER_NAME, any_text(value, where)):
        raise ValueError(f"{where}: {one_line(value, 60)!r} is no header name")
    return value


def expiry(text: Any, where: str) -> float:
    """Epoch seconds of `2027-01-31` (to its end) or `2027-01-31T12:00:00Z`; UTC without a zone."""
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
        moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        return moment.timestamp() + (86400 if len(text) == 10 else 0)
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise misfit(where, "a date such as 2027-01-31", text) from None


def client_key_list(value: Any, where: str) -> List[Any]:
    warnings = parse_client_keys(list_of(anything)(value, where), where)[1]
    if warnings:
        raise ValueError("; ".join(warnings))
    return value


_CLIENT_KEY = record(
    {"name": entry_name, "sha256": text_like("[0-9a-fA-F]{64}", "the key's SHA-256 in hex",
                                             "; `key add` makes one", is_secret=True)},
    {"models": list_of(filled_text), "expires": expiry, "created": anything, **LIMIT_FIELDS})

#: Shapes of the settings that have contents, or rules of their own.
SETTING_SHAPES: Dict[str, Shape] = {
    "retry": record({}, {"count": number(0, 10, True), "backoff_s": number(0, 600),
                         "max_backoff_s": number(0, 600), "total_s": number(0, 3600)}),
    "circuit": record({}, {"failures": number(0, 1000, True), "rest_s": number(0.1, 86400)}),
    "prices": names_to(record({}, dict.fromkeys(("input", "output", "cached"),
                                                number(0, 10 ** 9)))),
    "address_limits": record({}, {name: shape for name, shape in LIMIT_FIELDS.items()
                                  if name not in BUDGETS}), "client_keys": client_key_list,
    "admin_password": text_like("|" + _PASSWORD_HASH, "a hash", ", never the password itself; set "
                                "it on the page, or by `admin reset-password`", is_secret=True),
    "host": host_name, "trusted_proxies": list_of(network),
    "allowed_hosts": list_of(filled_text), "allowed_origins": list_of(filled_text),
    "custom_auth_header": lambda value, where: (header_name if value else any_text)(value, where)}


# --- client keys --------------------------------------------------------------

class ClientKey(NamedTuple):
    """A key that clients may send.  Its hash is kept: SHA-256 is enough for 192 random bits."""
    name: str
    digest: bytes
    models: Tuple[str, ...] = ()         #: shell patterns of what it may ask for; () is everything
    limits: Mapping[str, int] = {}       #: LIMIT_FIELDS
    expires_at: float = float("inf")
    shared: bool = False                 #: `custom_api_key`, which all clients share


def hashes_of_header(text: str) -> Set[bytes]:
    """The hashes of a key out of a header (read as latin-1): clients send UTF-8 or latin-1."""
    return {sha256(text), hashlib.sha256(text.encode("latin-1", "replace")).digest()}


def parse_client_key(entry: Any, where: str = "") -> ClientKey:
    """One entry of `client_keys`; ValueError says what is wrong with it."""
    facts = _CLIENT_KEY(entry, where)
    limits = {name: facts[name] for name in LIMIT_FIELDS if name in facts}
    return ClientKey(facts["name"], bytes.fromhex(facts["sha256"]),
                     tuple(facts.get("models", ())), limits,
                     facts.get("expires", float("inf")))


def parse_client_keys(entries: Sequence[Any], where: str = "client_keys"
                      ) -> Tuple[List[ClientKey], List[str]]:
    """The valid keys, and a sentence for each of the others."""
    keys: Dict[str, ClientKey] = {}
    warnings: List[str] = []
    for at, entry in enumerate(entries):
        try:
            key = parse_client_key(entry, f"{where}[{at}]")
            if keys.setdefault(key.name, key) is not key:
                raise ValueError(f"{where}[{at}]: the name {key.name} is taken by an earlier one")
        except ValueError as exc:
            warnings.append(str(exc))
    return list(keys.values()), warnings


def make_client_key(name: str, facts: Json) -> Tuple[str, Json]:
    """A new key and its entry of `client_keys`, with its hash alone; ValueError.

    `facts`: models, expires, limits.
    """
    key = "sk-" + secrets.token_hex(24)
    entry = {"name": name, "sha256": sha256(key).hex(), "created": time.strftime("%Y-%m-%d"),
             **facts}
    if parse_client_key(entry).expires_at <= time.time():
        raise ValueError(f"expires: {facts['expires']} is over")
    return key, entry


class ClientAuth:
    """Who may ask: `custom_api_key` and `client_keys`, out of a snapshot of the settings.  Pure."""

    def __init__(self, settings: Settings) -> None:
        self.keys = parse_client_keys(settings.client_keys)[0]
        #: Entries that can't be used demand a key all the same: closed by default.
        self.required = bool(settings.custom_api_key or settings.client_keys)
        self.limited = bool(settings.address_limits or any(key.limits for key in self.keys))
        self._known = list(self.keys)
        if settings.custom_api_key:
            self._known.insert(0, ClientKey("custom_api_key", sha256(settings.custom_api_key),
                                            shared=True))

    def find(self, given: Iterable[str]) -> Optional[ClientKey]:
        """The key that one of `given` is; every known one is compared, each in constant time."""
        digests = [digest for text in given if text for digest in hashes_of_header(text)]
        found = [key for key in self._known
                 if any([hmac.compare_digest(key.digest, digest) for digest in digests])]
        return found[0] if found else None


# --- addresses ----------------------------------------------------------------

def parse_address(text: str) -> Any:
    """An IP address, whatever its spelling and with or without a port; ValueError.

    IPv4 within IPv6 is IPv4.
    """
    import ipaddress                     # where limits or proxies count addresses
    text = text.strip()
    ported = re.fullmatch(r"\[([^\]]+)\](?::\d+)?|(\d+\.\d+\.\d+\.\d+):\d+", text)
    text = (ported[1] or ported[2] if ported else text).partition("%")[0]
    address = ipaddress.ip_address(text[:60])
    return getattr(address, "ipv4_mapped", None) or address


def parse_network(text: Any) -> Any:
    """`10.0.0.0/8`, or a single address; ValueError."""
    import ipaddress
    if not isinstance(text, str) or len(text) > 60:
        raise ValueError("an address expected")
    return ipaddress.ip_network(text if "/" in text else parse_address(text), strict=False)


def client_address(peer: str, forwarded: str, trusted: Sequence[str]) -> str:
    """Who asks, for limits: the peer, or what a trusted proxy says in X-Forwarded-For.

    That is read from the right.  An IPv6 client counts as its /64: one subscriber gets that.
    """
    networks = [parse_network(text) for text in trusted]
    address = parse_address(peer)
    hops = [hop for hop in forwarded.split(",") if hop.strip()]
    with contextlib.suppress(ValueError):        # a malformed hop: the proxy before it counts
        while hops and any(address in network for network in networks):
            address = parse_address(hops.pop())
    return address.packed[:4 if address.version == 4 else 8].hex()


# --- providers ---------------------------------------------------------------

_TOKENS = number(0, 10 ** 9, True)

#: Fields of a message or delta that hold reasoning as text; the first one with text counts.
REASONING_FIELDS = ("reasoning_content", "reasoning")

#: How an upstream's Chat may differ from OpenAI's: name -> default and shape of the value.
PROFILE: Dict[str, Tuple[Any, Shape]] = {
    "thinking_style": ("thinking_type", one_of("thinking_type", "enable_thinking",
                                               "chat_template_kwargs", "reasoning_effort", "none")),
    #: beside "enabled": GLM {"clear_thinking": false}, Kimi {"keep": "all"}
    "thinking_extra": ({}, names_to(anything)),
    #: in chat_template_kwargs; other templates: thinking
    "template_switch": ("enable_thinking", one_of("enable_thinking", "thinking")),
    #: where earlier reasoning goes back; None: nowhere
    "reasoning_field": (REASONING_FIELDS[0], one_of(*REASONING_FIELDS, "reasoning_details", None)),
    #: DeepSeek, Kimi: 400 without it; "all": in each assistant message
    "require_reasoning_on_tool_calls": (False, one_of(True, False, "all")),
    "vision": (True, truth),
    "files": (True, truth),
    #: "user" for templates that allow system at the top only
    "mid_system": ("system", one_of("system", "user")),
    "max_tokens_field": ("max_tokens", one_of("max_tokens", "max_completion_tokens")),
    "structured_output": ("json_schema", one_of("json_schema", "json_object", "prompt")),
    "efforts": (["low", "medium", "high", "xhigh", "max"], list_of(any_text)),
    "top_k": (False, truth),
    "user_field": ("user", lambda value, where: value if value is None else any_text(value, where)),
    #: of Responses: user, verbosity, prompt_cache_key, service_tier
    "extra_fields": ([], list_of(any_text)),
    #: False: it knows tool_choice "auto" alone
    "forced_tool_choice": (True, truth),
    "forced_tool_choice_with_thinking": (True, truth),
    "parallel_tool_calls": (True, truth),
    "stream_usage": (True, truth),
    "think_tags": (False, truth),
    #: thinking can't be switched off: who wants none gets the least effort
    "always_thinks": (False, truth),
    #: drop, error, or family -> its `tools` entry or the request's {"fields": …}
    "server_tools": ("drop", lambda value, where: value if isinstance(value, dict) else
                     one_of("drop", "error")(value, where)),
    "strict_tools": (True, truth),
    "prefill": (None, one_of("partial", "prefix", "continue_final_message", None)),
    #: its Messages counts tokens, exactly
    "count_tokens": (False, truth),
    #: the client's own User-Agent is sent on: Kimi's plan admits known agents
    "forward_user_agent": (False, truth),
    #: False: its /models is not asked for, since it lists what it does not serve
    "lists_models": (True, truth)}
DEFAULT_PROFILE: Json = {name: default for name, (default, _) in PROFILE.items()}

#: A profile may also give facts, for the models that have none of their own.
_PROFILE_SHAPES = {**{name: shape for name, (_, shape) in PROFILE.items()},
                   "max_output": _TOKENS, "context": _TOKENS}

#: The end of a sentence about a bad value of a profile.
PROFILE_IGNORED = "the default is used"

KINDS = ("openai", "iflow")


@dataclass(frozen=True, repr=False)
class Provider:
    """One upstream.  `problem` is why it can't be used, empty when it can."""
    name: str
    base_url: str = ""                    #: of its Chat
    messages_url: str = ""
    responses_url: str = ""
    kind: str = "openai"
    api_keys: Tuple[str, ...] = ()
    models: Tuple[str, ...] = ()          #: models it is known to serve; they decide routes
    #: model -> context, max_output, vision, as far as known
    facts: Mapping[str, Json] = field(default_factory=dict)
    headers: Tuple[Tuple[str, str], ...] = ()
    proxy: str = ""
    timeout_s: Optional[float] = None     #: instead of first_byte_timeout_s and idle_timeout_s
    concurrency: int = 0                  #: requests at once; 0: no limit
    key_concurrency: int = 0              #: for each iFlow account (api_concurrency)
    sticky: Optional[bool] = None         #: instead of the setting of that name
    profile: Json = field(default_factory=dict)
    vision_model: str = ""
    preserve_reasoning_content: Optional[bool] = None
    problem: str = ""
    warnings: Tuple[str, ...] = ()        #: what of `profile` is not used, which keys do not fit

    @property
    def roads(self) -> List[str]:
        """Its addresses."""
        return list(filter(None, (getattr(self, road) for road in ROADS)))

    @property
    def is_local(self) -> bool:
        """Whether an engine on this machine answers."""
        return any(is_loopback(urllib.parse.urlsplit(url).hostname or "") for url in self.roads)

    @property
    def places(self) -> int:
        """Requests at once: `concurrency`, else as many as its keys take together; 0: no limit."""
        return self.concurrency or self.key_concurrency * max(1, len(self.api_keys))


def clean_base_url(url: str) -> str:
    """`url` as the part before /chat/completions; ValueError names what is wrong.

    A bare host gets /v1, where nearly every server keeps its API; a full endpoint loses its end.
    """
    url = url.strip()
    if not url:
        raise ValueError("base_url is missing (`provider presets` lists known ones)")
    shown = one_line(url, 80)
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port                       # reading it checks it
    except ValueError as exc:            # http://[, http://host:99999
        reason = "no such port" if str(exc).startswith("Port ") else exc
        raise ValueError(f"base_url {shown!r}: {reason}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        hint = f"; write http://{shown} or https://{shown}" if "://" not in url else ""
        raise ValueError(f"base_url {shown!r} is no http:// or https:// address{hint}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"base_url of {one_line(parts.hostname, 80)}: credentials, ? and # "
                         "do not belong here; use api_keys and headers")
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError("base_url contains blanks or control characters")
    path = parts.path.rstrip("/")
    if path.endswith("/chat/completions"):
        path = path[:-len("/chat/completions")]
    elif not path:
        path = "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _header_value(environ: Mapping[str, str], is_key: bool) -> Shape:
    """A literal, or the variable that `$NAME` names; `$$` begins a literal dollar."""
    def check(value: Any, where: str) -> str:
        text = secret_text(value, where)
        if is_encrypted(text):
            raise ValueError(f"{where}: it is encrypted and can't be decrypted")
        if text.startswith("$$"):
            text = text[1:]
        elif re.fullmatch(_REFERENCE, text):
            if not environ.get(text[1:]):
                raise ValueError(f"the environment variable {text[1:]} is not set")
            text = environ[text[1:]]
        text = text.strip()
        if not text or not text.isprintable() or not text.isascii() or is_key and " " in text:
            what = "key" if is_key else "header value"
            raise ValueError(f"{where}: a {what} is empty, or has blanks, line breaks or "
                             "characters that no HTTP header may have")
        return text
    return check


_MODEL_SHAPE = record({"id": filled_text}, _PROFILE_SHAPES, strict=False)


def model_entry(value: Any, where: str) -> Tuple[str, Json]:
    """Name and facts of an entry of `models`: a name, or an object; 0 tokens are unknown."""
    if not value or not isinstance(value, (str, dict)):
        raise misfit(where, 'a name or an object as {"id": "name", "max_output": 8192}', value)
    facts = _MODEL_SHAPE({"id": value} if isinstance(value, str) else value, where)
    name = facts.pop("id")
    return name, {fact: known for fact, known in facts.items()
                  if known or fact not in ("context", "max_output")}


def parse_provider(entry: Any, environ: Mapping[str, str]) -> Provider:
    """The Provider of one entry of `providers`; one that can't work becomes one with a `problem`.

    ValueError where there is not even a name to call it by.
    """
    if not re.fullmatch(_NAME, name_of(entry)):
        raise ValueError("each provider needs a name without blanks, commas and slashes")
    shape = record({"name": entry_name}, {
        "preset": preset_name, **dict.fromkeys(ROADS, any_text), "kind": one_of(*KINDS),
        "vision_model": any_text, "proxy": secret_text,
        "api_keys": list_of(_header_value(environ, True)), "models": list_of(model_entry),
        "headers": names_to(_header_value(environ, False), header_name),
        "timeout_s": number(0.001, LONGEST_S), "concurrency": number(0, 10 ** 6, True),
        "sticky": truth, "profile": names_to(anything), "preserve_reasoning_content": truth},
        strict=False)
    try:
        given = shape(entry, "")
        given = _filled({**given, **roads_of(given)})
        base_url = clean_base_url(given.get("base_url", ""))
    except ValueError as exc:
        return Provider(entry["name"], problem=str(exc))
    facts = dict(given.get("models", ()))
    profile, warnings = check_profile(given.get("profile", {}))
    warnings += _misplaced_keys(given.get("api_keys", ()), base_url)
    return Provider(**{**given, "base_url": base_url, "profile": profile,
                       "api_keys": tuple(given.get("api_keys", ())),
                       "headers": tuple(given.get("headers", {}).items()),
                       "models": tuple(facts), "facts": facts, "warnings": tuple(warnings)})


def check_profile(profile: Json) -> Tuple[Json, List[str]]:
    """The profile without values that make no sense, and a sentence for each of those.

    Unknown names stay.
    """
    good: Json = {}
    warnings = []
    for name, value in profile.items():
        if name not in _PROFILE_SHAPES:
            near = nearest(name, _PROFILE_SHAPES)
            warnings.append(f"profile.{one_line(name, 60)} is unknown{near}")
        try:
            good[name] = _PROFILE_SHAPES.get(name, anything)(value, f"profile.{name}")
        except ValueError as exc:
            warnings.append(f"{exc}; {PROFILE_IGNORED}")
    return good, warnings


# --- iFlow's own file ---------------------------------------------------------

def account_keys(accounts: Json) -> Dict[str, str]:
    """The API keys of config.json's `accounts`, without those that no HTTP header can hold."""
    is_key, keys = _header_value({}, True), {}
    for name, login in accounts.items():
        key = object_of(login).get("apiKey")
        with contextlib.suppress(ValueError):
            if isinstance(key, str) and is_key("$" + key if key[:1] == "$" else key, "") == key:
                keys[name] = key
    return keys


def iflow_provider(settings: Settings, origins: Mapping[str, str], environ: Mapping[str, str],
                   login: Json) -> Optional[Provider]:
    """The provider `iflow` out of settings, the CLI's variables and file; None without a key.

    Flag and IFLOW2API_API_KEY > IFLOW_… > config.json > the CLI's file; the same for the address.
    """
    def text(name: str) -> str:
        value = login.get(name)
        return value.strip() if isinstance(value, str) else ""

    def first(name: str, variables: Sequence[str], *filed: str) -> str:
        theirs = next((environ[variable] for variable in variables if environ.get(variable)), "")
        candidates = [theirs.strip(), getattr(settings, name).strip()]
        if origins.get(name) != "file":
            candidates.reverse()
        return next((value for value in [*candidates, *filed] if value), "")

    key = first("api_key", IFLOW_KEY_VARIABLES, text("apiKey"), text("searchApiKey"))
    foreign = (settings.auth_type or text("selectedAuthType")) == "openai-compatible"
    plain = foreign and bool(key)
    given = origins.get("api_key") in ("flag", "environment") or any(
        environ.get(name) for name in IFLOW_KEY_VARIABLES)
    keys = [key] if key else []
    if not given and not plain:          # a key for this run, or for another service, is used alone
        keys += [other for other in account_keys(settings.accounts).values() if other not in keys]
    if not keys:
        return None
    filed_url = text("baseUrl") if plain or not foreign else ""
    entry = {"name": "iflow", "kind": "openai" if plain else "iflow",
             "api_keys": ["$" + key if key[0] == "$" else key for key in keys],
             "base_url": first("base_url", IFLOW_URL_VARIABLES, filed_url, IFLOW_BASE_URL),
             "models": [text("modelName")] if plain and text("modelName") else []}
    provider = replace(parse_provider(entry, {}), key_concurrency=settings.api_concurrency)
    return with_iflow_facts(provider, settings)


def with_iflow_facts(provider: Provider, settings: Settings) -> Provider:
    """A provider of kind iflow with what is known of iFlow and the user did not set."""
    if provider.kind != "iflow":
        return provider
    each = provider.key_concurrency or (0 if provider.concurrency else settings.api_concurrency)
    vision_model = provider.vision_model or settings.vision_model
    facts = {name: model._asdict() for name, model in IFLOW_MODELS.items()}
    preserve = provider.preserve_reasoning_content
    return replace(
        provider, models=provider.models or tuple(IFLOW_MODELS), facts={**facts, **provider.facts},
        key_concurrency=each, vision_model=vision_model if settings.vision_mode == "route" else "",
        preserve_reasoning_content=settings.preserve_reasoning_content if preserve is None
        else preserve)


# --- presets -----------------------------------------------------------------

def preset_name(value: Any, where: str) -> str:
    if any_text(value, where) not in PRESETS:
        raise ValueError(f"{where}: there is no {one_line(value, 60)!r}"
                         f"{nearest(value, PRESETS)} (`provider presets` lists them)")
    return value


def preset_at(url: Any) -> str:
    """The name of the preset that an address belongs to, by its host; "" without one.

    Of those on one host the one whose address it begins with, else one that is paid by use.
    """
    fit = [(str(url).startswith(known) * len(known), not preset.metered, name)
           for name, preset in PRESETS.items() for known in preset.roads.values()
           if url and not leads_elsewhere(known, url)]
    return max(fit, key=lambda each: each[:2])[2] if fit else ""


def other_keys(provider: Provider) -> str:
    """Where the maker's keys that are paid in the other way belong; "" where there is one way.

    The ways: by a plan or by use.
    """
    here = preset_at(next(iter(provider.roads), ""))
    plans = [name for name, preset in PRESETS.items() if here in preset.metered]
    others = plans or list(PRESETS[here].metered if here else ())
    if not others:
        return ""
    whose = "a key of a plan belongs" if plans else "this is a plan's address; others' keys belong"
    return f"{whose} to the preset {' or '.join(others)} (`provider add {others[0]}`)"


def _misplaced_keys(keys: Iterable[str], url: str) -> List[str]:
    """A warning for each key that another preset's address takes, as its beginning tells."""
    here = preset_at(url)
    return [f"api_keys[{at}] begins with {preset.key_start} and so belongs to the preset {name} "
            f"(`provider add {name}`)" for at, key in enumerate(keys)
            for name, preset in PRESETS.items()
            if here in preset.metered and preset.key_start and key.startswith(preset.key_start)]


def _preset_of(entry: Json) -> Optional[Preset]:
    name = entry.get("preset")
    return PRESETS.get(name) if isinstance(name, str) else None


def roads_of(entry: Json) -> Json:
    """The addresses of an entry of `providers`, by ROADS: its own ("": none), else its preset's.

    Beside an own one that leads elsewhere none is taken from a preset that wants a key: a relay's
    key must not go to the maker.  An engine's addresses move along.
    """
    own = {road: entry[road] for road in ROADS if entry.get(road) is not None}
    preset = _preset_of(entry)
    known = preset.roads if preset else {}
    moved = [url for url in own.values() for home in known.values() if leads_elsewhere(home, url)]
    if moved and preset:
        origin = "/".join(str(moved[0]).split("/")[:3])
        known = {} if preset.key else {road: "/".join([origin, *url.split("/")[3:]])
                                       for road, url in known.items()}
    return {**known, **own}


def _filled(given: Json) -> Json:
    """The checked fields of a provider, with what its preset knows and they do not say."""
    preset = _preset_of(given)
    if preset is None:
        return given
    del given["preset"]
    models = given.get("models") or [(name, {}) for name in preset.models]
    return {**given, "models": [(name, {**preset.models.get(name, {}), **facts})
                                for name, facts in models],
            "profile": {**preset.profile, **given.get("profile", {})},
            "headers": {**preset.headers, **given.get("headers", {})}}


def entry_at(base_url: str, preset: str = "") -> Json:
    """An entry of `providers` for an address; of a known API it names the preset.

    A bare host of such gets its path.
    """
    known = preset_at(base_url)
    if known and not base_url.strip().partition("://")[2].partition("/")[2].strip("/"):
        base_url = PRESETS[known].base_url
    given = {"preset": preset or known, "base_url": base_url}
    return without_preset({name: value for name, value in given.items() if value})


def without_preset(entry: Json) -> Json:
    """An entry of `providers` without what its preset says as well."""
    preset = _preset_of(entry)
    same = {} if preset is None else {
        **preset.roads, "models": list(preset.models), "headers": preset.headers,
        "profile": preset.profile}
    left = {name: value for name, value in entry.items() if value not in (None, same.get(name, ""))}
    if preset is not None and isinstance(left.get("profile"), dict):
        left["profile"] = {name: value for name, value in left["profile"].items()
                           if name not in preset.profile or value != preset.profile[name]}
    return left


# --- what receives secrets ------------------------------------------------------

#: Fields of a provider that say where its keys and headers go.
SECRET_DESTINATIONS = (*ROADS, "proxy")


def leads_elsewhere(old: Any, new: Any) -> bool:
    """Whether a new URL has another scheme, host or port: stored secrets must not go there."""
    def origin(url: Any) -> Tuple[str, str]:
        scheme, _, rest = str(url or "").strip().lower().partition("://")
        host = re.split("[/?#]", rest, maxsplit=1)[0].rpartition("@")[2]
        standard = {"http": ":80", "https": ":443"}.get(scheme, "")
        return scheme, host[:-len(standard)] if standard and host.endswith(standard) else host
    return bool(new) and origin(old) != origin(new)


# === 6. Routes (pure) ========================================================

class Target(NamedTuple):
    """One place a request may go: a provider and the name of the model there."""
    provider: Provider
    model: str


class Asked(NamedTuple):
    """What conditions ask of a request; a Call answers the same questions, when it is asked."""
    speaks: str = "chat"
    size_tokens: int = 0
    shows_images: bool = False
    thinks: bool = False
    has_tools: bool = False


#: Condition of a route -> what its value may be, and whether a request meets it.
CONDITIONS: Dict[str, Tuple[Shape, Callable[[Any, Any], bool]]] = {
    "over_tokens": (number(1, 10 ** 9, True), lambda asked, value: asked.size_tokens > value),
    "images": (truth, lambda asked, value: asked.shows_images is value),
    "thinking": (truth, lambda asked, value: asked.thinks is value),
    "tools": (truth, lambda asked, value: asked.has_tools is value),
    "dialect": (one_of(*FOREIGN_MODELS),
                lambda asked, value: asked.speaks == value)}
_CONDITIONS_SHAPE = record({}, {name: shape for name, (shape, _) in CONDITIONS.items()})


class Branch(NamedTuple):
    """An entry of an alias: models to try, and what a request must be like for them."""
    models: Tuple[str, ...]
    conditions: Json

    def takes(self, asked: Any) -> bool:
        return all(CONDITIONS[name][1](asked, value) for name, value in self.conditions.items())


def parse_branch(entry: Any, where: str) -> Branch:
    """`"glm-5"` or `{"model": "glm-5", "over_tokens": 60000}`; ValueError for anything else."""
    conditions = dict(entry) if isinstance(entry, dict) else {"model": entry}
    models = conditions.pop("model", None)
    models = models if isinstance(models, list) else [models]
    if not models or not all(isinstance(model, str) and model for model in models):
        raise misfit(where, "a model or a list of models")
    return Branch(tuple(models), _CONDITIONS_SHAPE(conditions, where))


#: Steps of the way from a name to its targets, in Chinese and English.
STEPS = {
    "unnamed": ("没有写模型：default_model 是 {model}", "no model named: default_model is {model}"),
    "holds": ("别名 {pattern}：{models}，条件 {wish}：满足", "alias {pattern}: {models} if {wish}: yes"),
    "fails": ("别名 {pattern}：{models}，条件 {wish}：不满足", "alias {pattern}: {models} if {wish}: no"),
    "alias": ("别名 {pattern} 使它变为 {models}", "alias {pattern} makes it {models}"),
    "no branch": ("别名 {pattern} 没有适合这种请求的目标",
                  "alias {pattern} has nothing for such a request"),
    "no alias": ("没有适用的别名", "no alias takes it"),
    "bare": ("{model}：末尾的 [1m] 是 Claude Code 给自己的标记，已去掉",
             "{model}: [1m] at its end is Claude Code's note to itself and is left out"),
    "named": ("{model}：斜杠前是上游的名称", "{model}: its first part is the name of a provider"),
    "listed": ("{model}：{provider} 的模型列表里有它", "{model}: {provider} lists it among its models"),
    "foreign": ("{model}：客户端自带的名称，即 default_model（{default}）",
                "{model}: a name of the client's own, which means default_model ({default})"),
    "default": ("{model}：没有上游声明它，原样发给默认上游 {provider}", "{model}: nobody claims it, so it "
                "goes to the default provider, {provider}, as it is"),
    "disabled": ("但 {provider} 已停用：{problem}", "but {provider} is disabled: {problem}")}

#: What Router.resolve tells: a key of STEPS and the facts of its sentence.
Told = List[Tuple[str, Json]]


def explain_steps(told: Told, in_english: bool) -> List[str]:
    return [STEPS[step][in_english].format(**facts) for step, facts in told]


class Router:
    """Names to targets, from one snapshot of the settings (DESIGN: providers and resolution)."""

    def __init__(self, settings: Settings, environ: Mapping[str, str],
                 iflow: Optional[Provider] = None, model_name: str = "") -> None:
        """`iflow` and `model_name` are the CLI's login and the model it is set to."""
        self.providers: Dict[str, Provider] = {}
        self.warnings: List[str] = []
        #: settings that contradict others; a reload keeps the old ones
        self.conflicting: Set[str] = set()
        for at, entry in enumerate(settings.providers):
            try:
                provider = with_iflow_facts(parse_provider(entry, environ), settings)
                if self.providers.setdefault(provider.name, provider) is not provider:
                    raise ValueError(f"the name {provider.name} is taken by an earlier one")
            except ValueError as exc:
                self._warn("providers", f"providers[{at}]: {exc}")
        if iflow is not None:
            self.providers.setdefault("iflow", iflow)
        self._listing: Dict[str, Provider] = {}      #: model -> the first that lists it
        for provider in self.providers.values():
            for model in provider.models:
                self._listing.setdefault(model, provider)
            if provider.problem:
                self.warnings.append(f"provider {provider.name} is disabled: {provider.problem}")
            self.warnings += [f"provider {provider.name}: {text}" for text in provider.warnings]
        wanted = settings.default_provider
        if wanted and wanted not in self.providers:
            near = nearest(wanted, self.providers)
            self._warn("default_provider", f"default_provider {wanted!r} is no provider{near}")
        self.default = self.providers.get(wanted) or next(iter(self.providers.values()), None)
        models = self.default.models if self.default else ()
        first = "glm-5" if self.default and self.default.kind == "iflow" and (
            "glm-5" in models) else next(iter(models), "")
        self.default_model = settings.default_model or model_name or first
        self.aliases: List[Tuple[str, List[Branch]]] = []
        for pattern, entries in settings.aliases.items():
            self._add_alias(pattern, entries)

    def _warn(self, name: str, warning: str) -> None:
        self.warnings.append(warning)
        self.conflicting.add(name)

    def _add_alias(self, pattern: str, entries: Any) -> None:
        """An alias that is invalid is left out, and so are targets that can't be reached."""
        where, branches = f"alias {pattern!r}", []
        entries = entries if isinstance(entries, list) else [entries]
        if not pattern:
            self._warn("aliases", f"{where} matches nothing: a request without a model means "
                                  "default_model")
        try:
            parsed = [parse_branch(entry, where) for entry in entries or [None]]
        except ValueError as exc:
            return self._warn("aliases", str(exc))
        for known, earlier in self.aliases:
            # of ? and [ it is not known what they take
            if not re.search(r"[?\[]", known) and fits(pattern, known) and not all(
                    branch.conditions for branch in earlier):
                self._warn("aliases", f"{where} is never reached: {known!r} above it takes every "
                                      "such name")
                break
        for at, branch in enumerate(parsed):
            reasons = {model: self._unreachable(model) for model in branch.models}
            for model, reason in reasons.items():
                if reason:
                    self._warn("aliases", f"{where}[{at}]: {one_line(model, 80)!r}: {reason}")
            models = tuple(model for model in branch.models if not reasons[model])
            branches += [branch._replace(models=models)] if models else []
        if branches:
            self.aliases.append((pattern, branches))

    def _unreachable(self, model: str) -> str:
        """Why `provider/model` leads nowhere, "" where the default provider may know the name."""
        head, slash, rest = model.partition("/")
        if not slash or not rest or self.claimed(model):
            return ""
        near = nearest(head, self.providers, 0.8)
        models = self.default.models if self.default else ()
        plain = models and not any("/" in name for name in models)
        return f"there is no provider {one_line(head, 60)!r}{near}" if plain or near else ""

    # names to targets

    def resolve(self, model: Optional[str], asked: Any = Asked(),
                told: Optional[Told] = None) -> List[Target]:
        """The chain of targets.

        `asked` answers the questions of conditions (Asked, Call).  The steps of the way are put
        into `told`.  BadRequest without any model, NotLoggedIn without any provider.
        """
        told = [] if told is None else told
        name = self.named(model)
        if not model:
            told.append(("unnamed", {"model": name}))
        elif name != model:
            told.append(("bare", {"model": model}))
        names = self._alias_of(name, asked, told)
        foreign = FOREIGN_MODELS["chat" if names else asked.speaks]
        return [self.place_of(each, foreign, told) for each in names or [name]]

    def named(self, model: Optional[str]) -> str:
        """The name asked for, `default_model` where there is none; BadRequest.

        It bears `[1m]` only where a provider lists it so, or an alias takes it so alone.
        """
        name = model or self.default_model
        if not name:
            raise BadRequest("the request names no model, and default_model is not set",
                             param="model", code="missing_model")
        bare = self._bare(name)
        for pattern, _ in self.aliases if bare != name else ():
            if fits(bare, pattern):
                break
            if fits(name, pattern):
                return name
        return bare

    def _bare(self, model: str) -> str:
        """The name without `[1m]` at its end, unless a provider lists it so."""
        head, _, rest = model.partition("/")
        provider = self.providers.get(head)
        if not model[1:].lower().endswith(LONG_CONTEXT) or model in self._listing or (
                provider and rest in provider.models):
            return model
        return model[:-len(LONG_CONTEXT)]

    def has_alias(self, model: str) -> bool:
        """Whether an alias takes the name when Messages asks for it."""
        return bool(self._alias_of(model, Asked("messages"), []))

    def redirects(self, model: str) -> bool:
        """Whether an alias takes the name, or Messages and Responses take it for default_model."""
        return self.has_alias(model) or self._means_default(model, FOREIGN_MODELS["messages"])

    def _means_default(self, model: str, foreign: Sequence[str]) -> bool:
        return bool(self.default_model) and any(
            fnmatchcase(model, pattern) for pattern in foreign) and not self.claimed(model)

    def _alias_of(self, model: str, asked: Any, told: Told) -> List[str]:
        """The models that an alias makes of a name, none where no alias takes it.

        Those of the first entry whose conditions hold come first, then those without conditions.
        """
        for pattern, branches in self.aliases:
            if not fits(model, pattern):
                continue
            first: Tuple[str, ...] = ()
            for branch in branches:
                if branch.conditions and not first:
                    first = branch.models if branch.takes(asked) else ()
                    wish = ", ".join(f"{name} {json.dumps(value)}"
                                     for name, value in branch.conditions.items())
                    told.append(("holds" if first else "fails", {
                        "pattern": pattern, "models": ", ".join(branch.models), "wish": wish}))
            others = [name for branch in branches if not branch.conditions
                      for name in branch.models]
            names = list(dict.fromkeys([*first, *others]))
            told.append(("alias" if names else "no branch",
                         {"pattern": pattern, "models": ", then ".join(names)}))
            if names:
                return names
        told.append(("no alias", {}))
        return []

    def place_of(self, model: str, foreign: Sequence[str] = (),
                 told: Optional[Told] = None) -> Target:
        """Where one name goes, aliases aside; NotLoggedIn."""
        told = [] if told is None else told
        if self._means_default(model, foreign):
            told.append(("foreign", {"model": model, "default": self.default_model}))
            model = self.default_model
        model = self._bare(model)
        target, step = self.claimed(model), "named"
        if target is None:
            if self.default is None:
                raise NotLoggedIn(
                    "there is no iFlow login and no other provider: run `python iflow2api.py "
                    "login`, put iFlow's key into IFLOW_API_KEY, start with --upstream URL, or add "
                    "one with `provider add`")
            target, step = Target(self.default, model), "default"
        elif target.model == model:
            step = "listed"
        provider = target.provider
        told.append((step, {"model": model, "provider": provider.name}))
        if provider.problem:
            told.append(("disabled", {"provider": provider.name, "problem": provider.problem}))
        return target

    def claimed(self, model: str) -> Optional[Target]:
        """`provider/model`, or the first provider that lists the model."""
        head, slash, rest = self._bare(model).partition("/")
        if slash and rest and head in self.providers:
            return Target(self.providers[head], rest)
        model = head + slash + rest
        lister = self._listing.get(model)
        return Target(lister, model) if lister is not None else None


def may_use(router: Router, key: ClientKey, model: str, chain: Sequence[Target],
            others: Sequence[Any] = ()) -> bool:
    """Whether the key covers the name asked for, or else every place that it leads to.

    A plain name among its models stands for the one place where that name leads: `m` is not
    `other/m`.  `others` are names that the upstream may choose from; each has to be covered.
    """
    def covers(name: str) -> bool:
        return any(fits(name, pattern) for pattern in key.models)

    def covers_place(provider: Provider, name: Any) -> bool:
        return isinstance(name, str) and (
            covers(f"{provider.name}/{name}")
            or covers(name) and router.place_of(name).provider is provider)

    if not key.models:
        return True
    providers = {target.provider.name: target.provider for target in chain}
    return (covers(model) or all(covers_place(*target) for target in chain)) and all(
        covers_place(provider, name) for provider in providers.values() for name in others)


# --- what to ask next --------------------------------------------------------

class Rests:
    """What is passed over for a while: a key of one provider, or (None) the provider itself.

    A provider that keeps failing is `open` until its rest is over, then `half-open`: one request is
    let through, and how that ends decides; should it never end, another may try after a further
    rest.  Threads share it: every change is a single operation on a dictionary.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: Dict[Optional[str], float] = {}
        self._refused: Dict[Optional[str], bool] = {}    #: keys that rest because they were refused
        self.failures = 0                                #: of the provider, in a row

    def rest(self, what: Optional[str], seconds: float, refused: bool = False) -> None:
        self._until[what], self._refused[what] = self._clock() + seconds, refused

    def fail(self, limit: int, rest_s: float) -> bool:
        """One more failure of the provider; whether this is the one that begins its rest."""
        self.failures += 1
        if limit and self.failures >= limit:
            self.rest(None, rest_s)
        return self.failures == limit

    def ok(self, what: Optional[str]) -> None:
        """It works again."""
        self._until.pop(what, None)
        if what is None:
            self.failures = 0

    def admits(self, rest_s: float) -> bool:
        """Whether a request may go to the provider now."""
        state = self.state
        if state == "half-open":
            self.rest(None, rest_s)
        return state != "open"

    def left_s(self, what: Optional[str]) -> float:
        until = self._until.get(what)
        return 0.0 if until is None else max(0.0, until - self._clock())

    def key_state(self, key: str) -> str:
        """`ok`, `resting` or `refused`."""
        return "ok" if not self.left_s(key) else "refused" if self._refused.get(key) else "resting"

    @property
    def state(self) -> str:
        """The provider's: `closed`, `open` or `half-open`."""
        return "closed" if None not in self._until else "open" if self.left_s(None) else "half-open"

    @property
    def resting(self) -> int:
        """How many keys rest."""
        return sum(key is not None and self.left_s(key) > 0 for key in list(self._until))


class Step(NamedTuple):
    """Where the next attempt goes: to another target after a pause, or to the same again."""
    target: Target
    wait_s: float = 0.0
    is_same: bool = False


class Plan:
    """The attempts of one call: each target of its chain with each of its keys, until one answers.

    Targets that rest come last.  When all have failed, those that may do better later are asked
    again after a pause, as often as `retry` allows.
    """

    def __init__(self, chain: Sequence[Target], keys: Callable[[Target], Sequence[str]],
                 rests: Callable[[Target], Rests], retry: Mapping[str, float],
                 circuit: Mapping[str, float], clock: Callable[[], float],
                 jitter: Callable[[], float] = lambda: 1.0) -> None:
        """`keys`: a target's, in the order to try; `jitter`: a factor of 0.5 to 1 for pauses."""
        self._keys_of, self._rests_of, self._retry, self.circuit = keys, rests, retry, circuit
        self._clock, self._jitter, self._began = clock, jitter, clock()
        self._round: List[Target] = list(chain)          #: targets to ask before the next pause
        self._late: List[Target] = []                    #: those that rest
        self._only = len(chain) == 1                     #: a route of one provider never rests
        self._later: List[Tuple[float, Target]] = []     #: to be asked again, and not before when
        self._rounds = 0
        self._error: Optional[GatewayError] = None
        self.target: Any = None                          #: the one being asked
        self._keys: Optional[List[str]] = None           #: its keys not tried; None: not looked up
        self.key = ""                                    #: the one being tried

    def next(self) -> Step:
        """Where the next attempt goes; raises the last error where there is none."""
        if self.target is not None:
            return Step(self.target, is_same=True)
        self.target, wait_s = self._next_target(), 0.0
        if self.target is None:
            wait_s = self._begin_round()
            self.target = self._next_target()
        return Step(self.target, wait_s)

    def take_key(self) -> str:
        """The next key for the target.

        The keys are looked up once there is a place for the request: some may have begun to rest.
        """
        if self._keys is None:
            self._keys = list(self._keys_of(self.target))
        self.key = self._keys.pop(0)
        return self.key

    def _next_target(self) -> Optional[Target]:
        while self._round:
            target = self._round.pop(0)
            if self._only or self._rests_of(target).admits(self.circuit["rest_s"]):
                return target
            self._late.append(target)
        return self._late.pop(0) if self._late else None

    def _begin_round(self) -> float:
        """Seconds until targets are asked again: the backoff, or what they asked for."""
        retry, now = self._retry, self._clock()
        if self._rounds >= retry["count"] or not self._later:
            raise self._error                            # type: ignore[misc]
        backoff_s = min(retry["max_backoff_s"], retry["backoff_s"] * 2 ** self._rounds)
        wait_s = max(backoff_s * self._jitter(), min(at for at, _ in self._later) - now)
        if now - self._began + wait_s > retry["total_s"]:
            raise self._error                            # type: ignore[misc]
        due = now + wait_s + 0.01                        # clocks are coarse
        self._round = [target for at, target in self._later if at <= due]
        self._later = [(at, target) for at, target in self._later if at > due]
        self._only = len(self._round) == 1
        self._rounds += 1
        return wait_s

    def repeat(self, key: Optional[str] = None) -> None:
        """Ask the same target again, with a fresh key or a mended request; nobody is to blame."""
        self._keys = [self.key if key is None else key, *(self._keys or ())]

    def succeeded(self) -> None:
        for what in (None, self.key):
            self._rests_of(self.target).ok(what)

    def failed(self, exc: GatewayError, began: bool, status: int = 0) -> bool:
        """Note how the attempt failed; raises `exc` where nobody else may be asked.

        `began`: the client has a part of the answer.  `status`: the upstream's own, where `exc` has
        another for the client.  Returns whether the provider rests from now on.
        """
        target, status = self.target, status or exc.status
        rests, opened = self._rests_of(target), False
        ours = isinstance(exc, Busy)     # our own full queue says nothing of the upstream
        if status in KEY_STATUS and self._keys is not None and not began and not ours:
            asked_s = exc.retry_after_s or LIMITED_KEY_REST_S
            rest_s = min(asked_s, LONGEST_REST_S) if status == 429 else REFUSED_KEY_REST_S
            rests.rest(self.key, rest_s, refused=status != 429)
            if self._keys:
                return False
        self.target = self._keys = None
        if not ours and not target.provider.problem:
            if exc.overflow is None and (exc.status == 408 or exc.status >= 500):
                opened = rests.fail(int(self.circuit["failures"]), self.circuit["rest_s"])
            else:                        # it is alive, and refuses
                rests.ok(None)
        if began or exc.status not in FALLBACK_STATUS:
            raise exc
        self._error = exc
        if exc.status in RETRY_STATUS and exc.should_retry is not False and exc.overflow is None:
            self._later.append((self._clock() + (exc.retry_after_s or 0), target))
        return opened


# === 7. Chat and SSE (pure) ==================================================
#
# Sections 6 to 11 know no socket, clock, file, thread or log: ids and the time are arguments.

#: Weakest to strongest; a provider knows some of them.
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

#: finish_reason values that are failures, with the status they stand for (DeepSeek; GLM and iFlow).
FATAL_FINISH = {"insufficient_system_resource": 503, "network_error": 502, "error": 502,
                "abort": 502}

#: finish_reason values after which an answer may be empty or incomplete.
CUT_SHORT = ("length", "content_filter", "sensitive", "repetition_truncation",
             "model_context_window_exceeded")


def _no_constant(name: str) -> Any:
    """NaN and Infinity are Python's, not JSON's."""
    raise ValueError(name)


def _finite(text: str) -> float:
    """A number that can be written again; 1e999 is JSON, but would come out as Infinity."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(text)
    return value


def _whole(text: str) -> int:
    """A number as later Pythons read it: thousands of digits take quadratic time."""
    if len(text) > 4300:
        raise ValueError(text[:20])
    return int(text)


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite,
                            parse_int=None if hasattr(sys, "set_int_max_str_digits") else _whole)


#: Made once: json.dumps makes an encoder for each call that is not a plain one.
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def dump_json(value: Any) -> bytes:
    """Compact UTF-8; lone surrogates, which JSON may carry and UTF-8 may not, stay escapes."""
    try:
        return _ENCODE(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def dump_text(value: Any) -> str:
    """dump_json as a string."""
    return dump_json(value).decode()


class KnownMessage(dict):
    """A chat message that is written once; the next request of its conversation brings it again."""
    __slots__ = ("data", "tokens")


class KnownTools(list):
    """A chat request's tools, written once."""
    __slots__ = ("data", "tokens")


def _dump_known(value: Any) -> bytes:
    try:
        return value.data
    except AttributeError:               # a plain one, or not written yet
        data = dump_json(value)
        if isinstance(value, (KnownMessage, KnownTools)):
            value.data = data
        return data


def dump_chat(chat: Json) -> bytes:
    """dump_json for a chat request, parts of which may have been written before."""
    rest = {name: value for name, value in chat.items() if name not in ("messages", "tools")}
    parts = [dump_json(rest)[:-1], b',"messages":[',
             b",".join(map(_dump_known, chat["messages"])), b"]"]
    if "tools" in chat:
        parts += [b',"tools":', _dump_known(chat["tools"])]
    return b"".join([*parts, b"}"])


def clamp_effort(effort: str, allowed: Sequence[str]) -> Optional[str]:
    """The strongest allowed effort that is not above `effort`, else the weakest, else None."""
    known = [name for name in EFFORTS if name in allowed]
    if not known:
        return None
    below = [name for name in known
             if effort in EFFORTS and EFFORTS.index(name) <= EFFORTS.index(effort)]
    return below[-1] if below else known[0]


def set_thinking(chat: Json, profile: Json, on: Optional[bool], budget: Optional[int] = None,
                 effort: Optional[str] = None) -> None:
    """Write the provider's own thinking switch into `chat`; `on` None leaves its default."""
    style = profile["thinking_style"]
    if on is False and profile["always_thinks"]:
        on, effort = None, EFFORTS[0]
    if on is not None:
        if style == "thinking_type":
            chat["thinking"] = {"type": "enabled", **profile["thinking_extra"]} if on else {
                "type": "disabled"}
        elif style == "enable_thinking":
            chat["enable_thinking"] = on
            if on and budget and not (effort and profile["efforts"]):    # they exclude each other
                chat["thinking_budget"] = budget
        elif style == "chat_template_kwargs":
            chat["chat_template_kwargs"] = {profile["template_switch"]: on}
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


#: What a model is told where a conversation lacks something.
NO_RESULT = "[no output recorded for this call]"
NO_IMAGE = "[an image was here; this model takes text only]"
NO_TOOL = "These tools are not available here: {}. Say so instead of guessing what they would give."
NO_PDF = "[a PDF ({}) was here; this model can't see it: use a tool to extract its text]"


def short_name(name: str) -> str:
    """`name` cut to what Chat allows, the same each time and different for different names."""
    if len(name) <= 64:
        return name
    return name[:55] + "_" + sha256(name).hex()[:8]


def reasoning_of(message: Json) -> str:
    """The reasoning text of a message or delta; often several fields hold the same: take one."""
    for field in REASONING_FIELDS:
        value = message.get(field)
        if isinstance(value, str) and value:
            return value
    return "".join(detail["text"] for detail in objects_of(message.get("reasoning_details"))
                   if isinstance(detail.get("text"), str))


def choices_of(chunk: Json) -> List[Json]:
    """The choices of a chunk or completion."""
    return objects_of(chunk.get("choices"))


def choice_index(choice: Json) -> int:
    """Which of several answers a choice belongs to: the first one, where it does not say."""
    index = choice.get("index")
    return index if isinstance(index, int) else 0


def first_choice(chunk: Json) -> Json:
    """choices[0] of a chunk or completion, {} where there is none."""
    choices = chunk.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    return {}


def merge_choices(completion: Json) -> Json:
    """One answer that came in several choices, as the one that it is; the same object otherwise.

    Relays put the text into the first choice and the calls into the second.
    """
    choices = choices_of(completion)
    if len(choices) < 2 or not all(isinstance(each.get("message"), dict) for each in choices):
        return completion
    message: Json = {}
    for choice in reversed(choices):
        message.update((name, value) for name, value in choice["message"].items() if value)
    calls = [call for each in choices for call in objects_of(each["message"].get("tool_calls"))]
    message.update({"tool_calls": calls} if calls else {})
    reasons = [each["finish_reason"] for each in choices if each.get("finish_reason")]
    reason = next((reason for reason in reasons if reason != "stop"), *reasons[:1] or [None])
    return {**completion, "choices": [{
        **choices[0], "message": {"content": None, **message}, "finish_reason": reason}]}


def usage_of(chunk: Json) -> Optional[Json]:
    """The usage object of a chunk: its own, or the one Kimi puts into the choice."""
    for holder in (chunk, first_choice(chunk)):
        usage = holder.get("usage")
        if isinstance(usage, dict) and usage:
            return usage
    return None


@dataclass(frozen=True)
class Usage:
    """Token counts in Chat's sense: `prompt` has the cached ones, `completion` the reasoning."""
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    cache_write: int = 0
    reasoning: Optional[int] = None      #: None: the provider does not say
    estimated: bool = False              #: our guess, not the upstream's count


def parse_usage(raw: Any) -> Usage:
    """One `Usage` from the spellings of OpenAI, DeepSeek, Kimi, vLLM and others; zeros from {}."""
    def count(holder: Json, *names: str) -> int:
        """The first of these that is a count."""
        return next((int(value) for value in map(holder.get, names)
                     if has_type(value, (int, float)) and value > 0), 0)

    raw = object_of(raw)
    given = object_of(raw.get("prompt_tokens_details"))
    made = object_of(raw.get("completion_tokens_details"))
    prompt, completion = count(raw, "prompt_tokens"), count(raw, "completion_tokens")
    cached = count(given, "cached_tokens") or count(raw, "prompt_cache_hit_tokens", "cached_tokens")
    write = count(given, "cache_write_tokens") or count(raw, "cache_creation_input_tokens")
    reasoning = None if made.get("reasoning_tokens") is None else count(made, "reasoning_tokens")
    if reasoning and count(raw, "total_tokens") == prompt + completion + reasoning:
        completion += reasoning          # some report the reasoning beside the completion
    return Usage(prompt, completion, cached, write, reasoning)


#: As a negated set, because a set of so many characters takes milliseconds to compile.
_CJK = Pattern("[^\0-\u2e7f]+")


def estimate_tokens(text: str) -> int:
    """About how many tokens a text takes: 3.5 characters each, CJK about one and a half each."""
    wide = 0 if text.isascii() else len(text) - len(_CJK.sub("", text))
    return int((len(text) - wide) / 3.5 + wide / 1.5 + 0.99)


class ObjectMender:
    """Passes a JSON object on as it comes; the output is always a prefix of valid JSON.

    Mended on the way: line breaks and other control characters in strings, backslashes before what
    JSON does not know, commas before a closing bracket, Python's constants.  At anything else
    nothing more is passed, and close() ends the object with a member INVALID_JSON, which has all
    that came: clients report that to their model instead of running half a call.
    """
    #: State -> the marks that may come next; `s` is a number or constant.
    _MAY = {"start": "{", "first key": '"}', "key": '"', "colon": ":", "value": '"{[s',
            "first value": '"{[s]', "next": ",}]"}
    _STRING = Pattern(r'(?:[^"\\\x00-\x1f]+|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})+')
    _HALF_ESCAPE = Pattern(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
    _TOKEN = Pattern(r'[ \t\r\n]+|[{}\[\],:"]|[-+.\w]+')
    _WORD = Pattern(r"[-+.\w]+")
    _SCALAR = Pattern(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
    _PYTHON = {"True": "true", "False": "false", "None": "null"}

    def __init__(self) -> None:
        self.complete = self._broken = False
        self._raw: List[str] = []
        self._closers: List[str] = []
        self._state, self._in_string, self._in_key = "start", False, False
        self._held, self._comma = "", ""  #: the end of what came, to be continued; a comma waiting
        self._token: List[str] = []      #: of a number or word that may go on

    def feed(self, text: str) -> str:
        """What may be passed now; what comes after the end of the object is ignored."""
        self._raw.append(text)
        if self._in_string and not self._held:
            found = self._STRING.match(text)
            if found and found.end() == len(text):               # most of what comes
                return text
        if self._token and self._WORD.fullmatch(text):           # joined once, not at each piece
            self._token.append(text)
            return ""
        text, at, out = "".join([self._held, *self._token, text]), 0, []
        self._held, self._token = "", []
        while at < len(text) and not self.complete and not self._broken:
            read = self._read_string if self._in_string else self._read_token
            at = read(text, at, out)
        return "".join(out)

    def raw(self) -> str:
        """All that came."""
        return "".join(self._raw)

    def close(self, cut: bool = False) -> str:
        """What ends the object; `cut`: it was cut off by a limit and stays as it is."""
        held, out = "".join([self._held, *self._token]), []
        if self.complete or cut:
            return "" if self.complete else self._comma + held
        if held and not self._in_string:
            self._take("s", held, out)
        self.complete = True
        if self._state == "next" and not self._broken:
            return "".join(out + self._closers[::-1])            # only the end was forgotten
        return "".join(out) + self._give_up()

    def _read_string(self, text: str, at: int, out: List[str]) -> int:
        found = self._STRING.match(text, at)
        if found:
            out.append(found.group())
            return found.end()
        if text[at] == '"':
            out.append('"')
            self._in_string, self._state = False, "colon" if self._in_key else "next"
        elif self._HALF_ESCAPE.match(text, at):
            self._held = text[at:]
            return len(text)
        else:
            out.append(json.dumps(text[at])[1:-1])
        return at + 1

    def _read_token(self, text: str, at: int, out: List[str]) -> int:
        found = self._TOKEN.match(text, at)
        token = found.group() if found else ""
        if not found:
            self._broken = True
        elif token.isspace() and self._comma:
            self._comma += token if len(self._comma) < 256 else ""
        elif token.isspace():
            out.append(token)
        elif token in '{}[],:"':
            self._take(token, token, out)
        elif found.end() == len(text):                           # a number may go on
            self._token = [token]
        else:
            self._take("s", token, out)
        return found.end() if found else len(text)

    def _take(self, kind: str, token: str, out: List[str]) -> None:
        """One token that is no blank."""
        token, ends = self._PYTHON.get(token, token), kind in "}]"
        stray_comma = ends and bool(self._comma)                 # [1,] and {"a":1,}
        if not stray_comma and kind not in self._MAY[self._state] or (
                ends and self._closers[-1] != kind) or (
                kind == "s" and not self._SCALAR.fullmatch(token)):
            self._broken = True
            return
        out.append("" if ends else self._comma)
        self._comma = token if kind == "," else ""
        if kind in "{[":
            self._closers.append("}" if kind == "{" else "]")
            self._state = "first key" if kind == "{" else "first value"
        elif kind == '"':
            self._in_string, self._in_key = True, "key" in self._state
        elif kind == ",":
            self._state = "key" if self._closers[-1] == "}" else "value"
            return
        else:
            self._state = "value" if kind == ":" else "next"
            self.complete = ends and len(self._closers) == 1
            del self._closers[len(self._closers) - ends:]
        out.append(token)

    def _give_up(self) -> str:
        """The shortest way to the end of the object, with what came as it came."""
        empty = self._state == "first key" and not self._in_string and len(self._closers) == 1
        value = self._state == "value" and not self._comma and not self._in_string
        end = '"' if self._in_string else ""
        end += ":" if self._in_string and self._in_key or self._state == "colon" else ""
        end += "null" if end.endswith(":") or value else ""
        start = "{" if not self._closers else "" if empty else ","
        end += "".join(self._closers[:0:-1])
        return end + f'{start}"INVALID_JSON":{json.dumps(self.raw())}}}'


def parse_arguments(text: str) -> Json:
    """Tool arguments as an object; what is not JSON becomes {"INVALID_JSON": text}."""
    try:
        value = _DECODER.decode(text) if text.strip() else {}
        if isinstance(value, str):                 # encoded twice
            value = _DECODER.decode(value) if value.strip() else {}
    except (ValueError, RecursionError):
        value = _mended(text)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return {} if value is None else value if isinstance(value, dict) else {"INVALID_JSON": text}


def _mended(text: str) -> Any:
    """The object in `text` that is nearly JSON, perhaps between ```; False where there is none."""
    text = re.sub(r"\A\s*```(?:json)?\s*(\{.*\})\s*```\s*\Z", r"\1", text, flags=re.S).strip()
    mender = ObjectMender()
    try:
        return _DECODER.decode(mender.feed(text) + mender.close()) if text[:1] == "{" else False
    except (ValueError, RecursionError):
        return False


#: Most blanks that are held back because the text may end there: in a text of nothing else each
#: piece would take longer than the one before.
BLANKS_LIMIT = 256


class ThinkTags:
    """Separates `<think>…</think>` at the start of the content from the text after it.

    Blanks at their edges are removed.
    """
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
        if not head:
            self.buffer = self.buffer[-BLANKS_LIMIT:]
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
        keep = next((size for size in range(len(self.END) - 1, 0, -1)
                     if thought.endswith(self.END[:size])), 0)
        thought = thought[:len(thought) - keep]
        blanks = len(thought) - len(thought.rstrip())
        thought = thought[:-blanks] if 0 < blanks <= BLANKS_LIMIT else thought
        self.buffer = self.buffer[len(thought):]
        return [("thinking", thought)]


class Details:
    """Streamed pieces of `reasoning_details` (OpenRouter, MiniMax), joined to their entries.

    Entries of one chunk, or of a plain answer, are different ones unless they say the same index.
    """
    _GROWING = ("text", "summary", "data")

    def __init__(self) -> None:
        self._entries: List[Tuple[Json, Dict[str, List[str]]]] = []      # facts, texts in pieces

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, fresh: Any) -> None:
        for number, piece in enumerate(objects_of(fresh)):
            last = self._entries[-1][0] if self._entries else {}
            begins = not last or number and piece.get("index") is None or any(
                last.get(name) != piece.get(name) for name in ("type", "index"))
            if begins:
                self._entries.append((dict(piece), {}))
            facts, texts = self._entries[-1]
            for name, value in piece.items():
                if name in self._GROWING and isinstance(value, str):
                    texts.setdefault(name, []).append(value)
                elif value is not None:
                    facts[name] = value
                    texts.pop(name, None)

    def joined(self) -> List[Json]:
        return [{**facts, **{name: "".join(pieces) for name, pieces in texts.items()}}
                for facts, texts in self._entries]


# --- requests ----------------------------------------------------------------

_BLANK, _GAP = Pattern(r"[ \t\r\n]*"), Pattern(r"[ \t\r\n]*,?[ \t\r\n]*")
_OBJECTS = Pattern(r"\[[ \t\r\n]*\{")
_MODEL_FIELD = Pattern(r'"model"[ \t\r\n]*:[ \t\r\n]*')


def _past(text: str, at: int, mark: str) -> int:
    """The place behind `mark`, which has to be at `at`, and the blanks behind it."""
    if text[at] != mark:
        raise ValueError(f"no {mark} at {at}")
    return _BLANK.match(text, at + 1).end()


def _next_item(text: str, at: int, end: str) -> int:
    """Where the next item of a list or object begins, or its `end` stands."""
    gap = _GAP.match(text, at)
    if ("," in gap.group()) == (text[gap.end()] == end):
        raise ValueError(f"a comma missing or too many at {at}")
    return gap.end()


def walk_object(text: str, read: Callable[[str, int], int]) -> None:
    """Call `read` with the name of each member and where its value begins; it returns the end.

    ValueError, IndexError where `text` is no object; json.loads tells what exactly is wrong.
    """
    at = _past(text, _BLANK.match(text).end(), "{")
    while text[at] != "}":
        if text[at] != '"':
            raise ValueError(f"no name at {at}")
        name, at = json.decoder.scanstring(text, at + 1)
        at = _past(text, _BLANK.match(text, at).end(), ":")
        at = _next_item(text, read(name, at), "}")
    if _BLANK.match(text, at + 1).end() != len(text):
        raise ValueError("more follows")


class Remembered:
    """What a long request was parsed to and what it became, for the next of its conversation.

    Claude Code sends hundreds of kilobytes with each turn, all but the last few as before: to
    parse, convert and write them anew took most of the time of a request.  Nobody changes what is
    parsed, so requests share it; that a part is known is seen by the identity of its objects.
    """

    def __init__(self) -> None:
        #: name -> the items of a list of objects, as written and parsed
        self.lists: Dict[str, List[Tuple[str, Any]]] = {}
        self.turns: Dict[str, Any] = {}  #: a translator's own (KnownTurn), by the upstream's model

    def parse(self, text: str) -> Json:
        """What json.loads gives for an object; items that stood in their place before are not read
        again.  Raises as walk_object() does.
        """
        body: Json = {}
        lists: Dict[str, List[Tuple[str, Any]]] = {}

        def read(name: str, at: int) -> int:
            if not _OBJECTS.match(text, at):     # numbers by the thousand are quicker all at once
                body[name], at = _DECODER.raw_decode(text, at)
                return at
            lists[name], at = self._items(text, at, self.lists.get(name, ()))
            body[name] = [value for _, value in lists[name]]
            return at

        walk_object(text, read)
        self.lists = lists
        return body

    @staticmethod
    def _items(text: str, at: int,
               known: Sequence[Tuple[str, Any]]) -> Tuple[List[Tuple[str, Any]], int]:
        """The items of the list at `at`, as written and parsed, and where it ends."""
        items: List[Tuple[str, Any]] = []
        at = _past(text, at, "[")
        while text[at] != "]":
            item = known[len(items)] if len(items) < len(known) else None
            if item is None or not text.startswith(item[0], at):
                value, end = _DECODER.raw_decode(text, at)
                item = text[at:end], value
            items.append(item)
            at += len(item[0])
            at = at + 1 if text.startswith(",{", at) else _next_item(text, at, "]")
        return items, at + 1


def decode_body(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise BadRequest(f"the body is not UTF-8: byte {exc.start} is "
                         f"0x{exc.object[exc.start]:02x}") from None


def parse_body(text: str, known: Optional[Remembered] = None) -> Json:
    """The JSON object of a request body; BadRequest says where it goes wrong."""
    if known is not None:
        with contextlib.suppress(ValueError, IndexError, RecursionError):
            return known.parse(text)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as exc:
        raise BadRequest(f"the body is not JSON: line {exc.lineno}, column {exc.colno}: "
                         f"{exc.msg}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError as exc:            # NaN and Infinity, or a number of thousands of digits
        raise BadRequest(f"the body is not JSON: {one_line(exc, 80)} is no JSON value") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


def splice_model(text: str, body: Json, model: str) -> str:
    """`text`, which parses to `body`, with its `model` replaced and every other byte as it was."""
    written, places = json.dumps(model), []
    is_plain = "model" in body and text.count('"model"') == 1 and "\\u00" not in text
    found = _MODEL_FIELD.search(text) if is_plain else None

    def read(name: str, at: int) -> int:
        end = _DECODER.raw_decode(text, at)[1]
        if name == "model":
            places.append((at, end))
        return end

    if found:                            # no other place can be it: a long text is not read again
        read("model", found.end())
    else:
        walk_object(text, read)
    if not places:                       # the default model was meant
        rest = text.partition("{")[2]
        comma = "" if rest[_BLANK.match(rest).end()] == "}" else ","
        return f'{{"model":{written}{comma}{rest}'
    pieces, at = [], 0
    for start, end in places:
        pieces += [text[at:start], written]
        at = end
    return "".join(pieces) + text[at:]


# --- answers -----------------------------------------------------------------

def is_answer(chunk: Json) -> bool:
    """Whether a chunk or completion is part of an answer: text, reasoning, a call or a refusal; or
    says that there are tokens of one, or why there is none.
    """
    for choice in choices_of(chunk):
        message = choice.get("delta") or choice.get("message")
        if choice.get("text") or isinstance(message, dict) and any(
                value for name, value in message.items() if name != "role"):
            return True
    reason = first_choice(chunk).get("finish_reason")
    return reason in (*CUT_SHORT, *FATAL_FINISH) or parse_usage(usage_of(chunk)).completion > 0


def broken_off(reason: str) -> UpstreamBroke:
    """The error that a fatal finish reason is."""
    return UpstreamBroke(f"the model's server broke the answer off: {reason}",
                         status=FATAL_FINISH[reason])


def check_completion(completion: Any, status: int = 200) -> Json:
    """A plain completion that really is one; UpstreamRefused or UpstreamGarbled otherwise."""
    refusal = refusal_in(completion, status)
    if refusal:
        raise refusal
    if not isinstance(completion, dict) or not choices_of(completion) or not is_answer(completion):
        raise UpstreamGarbled("the upstream's answer is empty")
    return completion


def as_chunk(completion: Json) -> Json:
    """A plain completion as the one chunk of a stream."""
    choices = []
    for choice in choices_of(completion):
        message = object_of(choice.get("message"))
        calls = [{**call, "index": index}
                 for index, call in enumerate(objects_of(message.get("tool_calls")))]
        delta = {**message, "tool_calls": calls} if calls else message
        facts = {name: value for name, value in choice.items() if name != "message"}
        choices.append({**facts, "delta": delta})
    return {**completion, "object": "chat.completion.chunk", "choices": choices}


def completion_to_sse(completion: Json) -> bytes:
    """A plain completion as the event stream that was asked for."""
    return encode_chunk(as_chunk(completion)) + encode_chunk("[DONE]")


# --- refusals ----------------------------------------------------------------

#: What an error without an HTTP status stands for, by its code or type.
SAID_STATUS = {
    "rate_limit_exceeded": 429, "rate_limit_error": 429, "rate_limit": 429,
    "insufficient_quota": 429, "overloaded_error": 503, "server_is_overloaded": 503,
    "invalid_request_error": 400, "BadRequestError": 400, "context_length_exceeded": 400,
    "model_not_found": 404, "authentication_error": 401, "invalid_api_key": 401,
    "permission_error": 403}


def refusal_in(payload: Any, status: int = 200) -> Optional[UpstreamRefused]:
    """The error that a JSON answer or record stands for, None where it is none.

    Shapes: OpenAI `{"error": {…}}`, `{"error": "text"}`, vLLM `{"object": "error", …}`, FastAPI
    `{"detail": …}`, `{"code", "message"}`.  Without an HTTP error the status is the body's own,
    else 502.
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
    said = [error if isinstance(error, str) else None,
            *(facts.get(name) for name in ("message", "detail", "msg"))]
    message = next(filter(None, said), payload)
    if not isinstance(message, str):
        message = json.dumps(message, ensure_ascii=False)
    code, kind, param = (value if isinstance(value, str) else None
                         for value in map(facts.get, ("code", "type", "param")))
    if status < 400:
        words = [str(facts.get(name)) for name in ("status", "code", "type")]
        meant = [int(word) for word in words if re.fullmatch(r"[45]\d\d", word)]
        status = next(iter([*meant, *(SAID_STATUS[word] for word in words if word in SAID_STATUS)]),
                      502)
    return UpstreamRefused(message[:4000], status=status, type=kind or error_type(status),
                           code=code, param=param, body=payload if facts is error else None)


def _text_of_tag(page: str, name: str) -> str:
    """What stands in the first such element of a web page, without tags; "" where there is none."""
    start = re.search("(?i)<" + name, page)
    inner = page[start.end():].partition(">")[2] if start else ""
    end = re.search("(?i)</" + name + ">", inner)
    pieces = inner[:end.start()].split("<") if end else [""]
    return " ".join([pieces[0], *(piece.partition(">")[2] for piece in pieces[1:])]).strip()


def parse_refusal(status: int, content_type: str, data: bytes) -> UpstreamRefused:
    """The error of an answer with an HTTP error status, whatever its body is."""
    try:
        refusal = refusal_in(_DECODER.decode(data.decode("utf-8-sig")), status)
    except (ValueError, RecursionError):
        refusal = None
    if refusal:
        return refusal
    text = data.decode("utf-8", "replace")
    if "html" in content_type or text.lstrip()[:1] == "<":       # a proxy's page
        text = _text_of_tag(text, "title") or _text_of_tag(text, "h1") or "an HTML page"
    text = one_line(" ".join(text.split())) or http.client.responses.get(status, "no message")
    return UpstreamRefused(f"the upstream answered {status}: {text}", status=status,
                           type=error_type(status))


#: OpenAI's `type` for a status (openai-chat.md section 5).
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error",
               503: "service_unavailable_error"}


def error_type(status: int) -> str:
    """The error type that goes with a status where nobody said one."""
    return ERROR_TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")


#: Context overflow in the words of servers, those with most numbers first (from issue trackers).
#: LIMIT, PROMPT, OUTPUT and TOTAL stand for the numbers.
OVERFLOW_WORDS = (
    # OpenAI, DeepSeek, older vLLM, OpenRouter: "requested 131134 tokens (122942 in the messages"
    r"length is LIMIT tokens.{0,20}you requested (?:about )?TOTAL tokens "
    r"\(.{0,200}?OUTPUT (?:in|for) the (?:comple|output)",
    # vLLM now, Bedrock, Cloudflare
    r"length is LIMIT tokens.{0,20}you requested OUTPUT output tokens and your prompt contains "
    r"\D{0,40}PROMPT input",
    # vLLM in between
    r"too large: OUTPUT\. This model's maximum context length is LIMIT tokens "
    r"and your request has PROMPT input tokens",
    # SGLang; iFlow hands it through, with numbers like 524300.0
    r"context length of LIMIT tokens.{0,60}?: PROMPT(?:\.0)? tokens from the input messages "
    r"and OUTPUT",
    # Anthropic
    r"exceed context limit: PROMPT \+ OUTPUT > LIMIT",
    r"prompt is too long: PROMPT tokens > LIMIT",
    # Moonshot: "token limit: 262144 (requested: 269030)", max_tokens in it
    r"exceeded model token limit: LIMIT(?: \(requested: TOTAL)?",
    r"input token length too long(?:.{0,40}requested: PROMPT)?",
    # vLLM's latest, with and without the output
    r"you passed PROMPT input tokens and requested OUTPUT output tokens"
    r".{0,40}context length is only LIMIT tokens",
    r"length is (?:only )?LIMIT tokens.{0,20}your request has PROMPT input tokens",
    # OpenAI: "your messages resulted in 8202 tokens"; Azure: "exceed the configured limit of"
    r"(?:context length is|configured limit of) LIMIT tokens\."
    r".{0,20}your messages resulted in PROMPT tokens",
    r"context length is LIMIT tokens.{0,20}you requested (?:about )?PROMPT tokens",
    # llama.cpp (Ollama and LM Studio hand it through): numbers in the text, older ones beside it
    r"request \(PROMPT tokens\) exceeds the available context size \(LIMIT tokens",
    r"exceeds the available context size.{0,300}"
    r"n_prompt_tokens\W{1,9}PROMPT\W{1,9}n_ctx\W{1,9}LIMIT",
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
    # DashScope: "Range of input length should be [1, 204800]"
    r"range of input length should be \[\d{1,18}, ?LIMIT\]",
    r"token length must be less than LIMIT", r"token length exceeds? model limit \(LIMIT tokens",
    # LM Studio
    r"keep the first PROMPT tokens when context the overflows.{0,300}context length of only LIMIT",
    r"greater than the context length",
    # Ollama
    r"exceeded max context length by",
    r"(?:prompt|input) (?:length )?(?:is longer than|exceeds) the context length",
    # Zhipu (codes 1210, 1261); MiniMax; iFlow
    r"tokens exceeds? the maximum:? ?LIMIT|input length too long",
    r"prompt exceeds max length|prompt ?超长|context window exceeds limit|内容长度超出",
    # others
    r"(?:maximum|max) context length (?:is|of|:) ?LIMIT",
    r"prompt is too long|input is too long|context[_ ](?:length|window)[_ ]exceeded|"
    r"maximum context length|exceeds (?:the|this) (?:model's )?(?:maximum |available )?context|"
    r"reduce the length of the (?:messages|prompt)")

#: Codes that say it where the text may not: OpenAI; llama.cpp; Zhipu; iFlow.
OVERFLOW_CODES = ("context_length_exceeded", "exceed_context_size_error",
                  "model_context_window_exceeded", "1261", "511", "413")


def find_overflow(status: int, message: Any, code: Any = None,
                  asked: int = 0) -> Optional[Tuple[int, int, int]]:
    """GatewayError.overflow of an upstream's error; None where it does not mean that.

    `message` may be the error's text or its whole body; `asked` is the request's max_tokens, which
    is part of a TOTAL.  429 is about speed, 401 and 403 about keys.
    """
    text = message[:10000] if isinstance(message, str) else ""
    if status in (401, 403, 404, 429):
        return None
    for words in OVERFLOW_WORDS:         # compiled when first needed; re keeps them
        named = re.sub(r"\b(LIMIT|PROMPT|OUTPUT|TOTAL)\b", r"(?P<\1>\\d[\\d,]{0,18})", words)
        found = re.search(named, text, re.I | re.S)
        if found:
            number = {name: int(value.replace(",", ""))
                      for name, value in found.groupdict().items() if value}
            total = number.get("TOTAL", 0)
            output = number.get("OUTPUT") or (asked if total > asked else 0)
            return number.get("PROMPT", 0) or max(0, total - output), number.get("LIMIT", 0), output
    return (0, 0, 0) if str(code) in OVERFLOW_CODES else None


#: "There is no such model" in the words of OpenAI, vLLM, DeepSeek ("Model Not Exist"), Ollama, xAI;
#: Moonshot; MiniMax, Mistral; OpenRouter; Gemini; Zhipu.
_MISSING_MODEL = Pattern(
    r"(?i)\bmodels?\b[^.;{}]{0,160}?\b"
    r"(?:do(?:es)? not exist|not exist|(?:is |was )?not found|is not supported for)\b|"
    r"not found the model|(?:unknown|invalid|no such) model\b|is not a valid model|模型不存在")

#: Codes and types that say it: OpenAI, iFlow; Zhipu; Mistral; SiliconFlow; iFlow.
_MISSING_MODEL_CODES = ("model_not_found", "1211", "invalid_model", "20012", "435")


def is_missing_model(status: int, message: str, code: Any = None) -> bool:
    """Whether an upstream's error means that it does not know the model; `code` may be a number."""
    if status in (401, 403, 429):
        return False
    return str(code) in _MISSING_MODEL_CODES or (
        status in (400, 404, 422) and bool(_MISSING_MODEL.search(message[:2000])))


#: "I can't see" in the words of llama.cpp, Ollama, vLLM, OpenRouter, LM Studio, DeepSeek's parser.
_NO_IMAGES = Pattern(
    r"(?i)image (?:input|url)s? (?:is|are) not (?:supported|allowed)|"
    r"support(?:s|ing)? (?:for )?image|support (?:vision|multimodal)|"
    r"not a (?:multimodal|vision) model|data required for image input|at most 0 image|"
    r"unknown variant `image_url`|不支持(?:图片|图像)")


def is_image_refusal(status: int, message: str) -> bool:
    """Whether an upstream's error means that its model takes no images; llama.cpp says 500."""
    return status not in (401, 402, 403, 429) and _NO_IMAGES.search(message[:2000]) is not None


#: "Range of max_tokens should be [1, 8192]" (DashScope, DeepSeek, Zhipu); OpenAI's "is too large:
#: 32000. This model supports at most 16384 completion tokens"; "`max_tokens` must be less than or
#: equal to `8192`" (Groq and others).
_OUTPUT_CAP = Pattern(r"max_(?:[a-z]{1,20}_)?tokens(?:\D{0,60}\[\d+, ?(\d[\d,]*)\]|"
                      r"\W+is too large: \d+\.\D{0,40}at most (\d+)|"
                      r".{0,60}less than or equal to\W+(\d+))", re.I | re.S)


def find_output_cap(status: int, message: str) -> int:
    """The most output tokens a model gives, where a refusal of max_tokens says so; else 0."""
    found = _OUTPUT_CAP.search(message[:10000]) if status in (400, 422) else None
    return int(next(filter(None, found.groups())).replace(",", "")) if found else 0


#: What no waiting heals: a balance or quota that is used up (OpenAI, DeepSeek, Moonshot; Zhipu's
#: 1113; DashScope).
_SPENT = Pattern(r"insufficient[_ ](?:quota|balance|credits?|funds)|"
                 r"exceeded[_ ](?:your )?current[_ ]quota|余额不足|欠费|"
                 r'arrearage|"code": ?"?1113\b', re.I)


def is_spent(status: int, text: str) -> bool:
    """Whether an upstream refuses because nothing is left to pay with."""
    return status == 402 or status >= 400 and _SPENT.search(text[:10000]) is not None


def parse_retry_after(headers: Mapping[str, str], now: float) -> Optional[float]:
    """Seconds from `retry-after-ms` or `retry-after` (RFC 9110, 10.2.3), None without."""
    value = headers.get("retry-after-ms", "")
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value) / 1000
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,7}(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now) if value else None
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


# --- answers, read ------------------------------------------------------------

class StopWatch:
    """Ends the text at stop sequences the upstream was not sent; holds back what may be one."""

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences, self.hit = sequences, ""
        self._keep, self._tail = max(map(len, sequences)) - 1, ""

    def feed(self, text: str) -> str:
        text, self._tail = self._tail + text, ""
        found = [(text.find(each), each) for each in self._sequences if each in text]
        if found:
            at, self.hit = min(found)
            return text[:at]
        at = max(0, len(text) - self._keep)
        self._tail = text[at:]
        return text[:at]

    def close(self) -> str:
        text, self._tail = self._tail, ""
        return text


class Unfence:
    """Takes the ``` from around a text that is one fenced block; any other text passes as it is."""
    _HEAD = Pattern(r"\s*```[a-zA-Z]*[ \t]*\n")
    _MAYBE = Pattern(r"\s*(?:`{0,2}|```[a-zA-Z]*[ \t]*)")

    def __init__(self) -> None:
        self._fenced: Optional[bool] = None
        self._held = ""

    def feed(self, text: str) -> str:
        text, self._held = self._held + text, ""
        if self._fenced is None:
            head = self._HEAD.match(text)
            if not head and len(text) <= BLANKS_LIMIT and self._MAYBE.fullmatch(text):
                self._held = text
                return ""
            self._fenced, text = head is not None, text[head.end() if head else 0:]
        if self._fenced:                 # the last blanks and ` may be its end
            body = text[:-BLANKS_LIMIT] + text[-BLANKS_LIMIT:].rstrip()
            marks = min(3, len(body) - len(body.rstrip("`")))
            at = len(body[:len(body) - marks].rstrip())
            text, self._held = text[:at], text[at:]
        return text

    def close(self) -> str:
        text, self._held = self._held, ""
        return "" if self._fenced and "```" in text else text


def chat_call(ident: str, name: str, arguments: str) -> Json:
    """A call in an assistant's message."""
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}


# --- what comes with an answer and has to come back --------------------------------

#: Members of a call that its upstream wants back as they came (Gemini: its thought signature).
CALL_EXTRAS = ("extra_content",)

#: Starts each signature made here; the rest is base64 of JSON, to be given back to the provider.
SIGNATURE_PREFIX = "iflow2api-1."


def make_signature(carrier: Json) -> str:
    """A signature that holds a carrier: AnswerReader makes those, ChatHistory takes them back."""
    return SIGNATURE_PREFIX + base64.b64encode(dump_json(carrier)).decode()


def read_signature(signature: Any) -> Json:
    """What make_signature put in; {} for a foreign or damaged one."""
    if not isinstance(signature, str) or not signature.startswith(SIGNATURE_PREFIX):
        return {}
    try:
        state = _DECODER.decode(base64.b64decode(signature[len(SIGNATURE_PREFIX):]).decode())
    except (ValueError, RecursionError):
        return {}
    return object_of(state)


_LEGAL_ID = Pattern(r"[A-Za-z0-9_-]+")


def wrap_id(fresh: str, ident: str) -> str:
    """An id Anthropic allows (`fresh`) with the upstream's own (Kimi: `functions.f:0`) inside, or
    with the carrier of its call as JSON.
    """
    return f"{fresh}_raw_{encode_base64(ident.encode('utf-8', 'replace'))}"


def _hidden_in(ident: str) -> str:
    """What wrap_id hid in `ident`."""
    _, mark, hidden = ident.partition("_raw_")
    if not mark or not ident.startswith("toolu_"):       # nearly every one
        return ""
    try:
        return (decode_base64(hidden) or b"").decode()
    except UnicodeDecodeError:
        return ""


def carrier_of_id(ident: str) -> Json:
    """The carrier that wrap_id hid in `ident`, {} where there is none."""
    hidden = _hidden_in(ident)
    if not hidden.startswith("{"):
        return {}
    try:
        return object_of(_DECODER.decode(hidden))
    except (ValueError, RecursionError):
        return {}


def unwrap_id(ident: str) -> str:
    """The upstream's own id, if wrap_id hid one in `ident`."""
    return next(iter(object_of(carrier_of_id(ident).get("calls"))), "") or (
        _hidden_in(ident) or ident)


def give_back(message: Json, thought: str, carriers: Sequence[Json], profile: Json) -> None:
    """Add to an assistant's `message` what came with it: `thought` for any upstream, what is in the
    `carriers` of its answer for the one that it came from.
    """
    origin, field = profile.get("origin", ""), profile["reasoning_field"]
    own = [state for state in carriers if state.get("of", origin) == origin]
    names = [state.get("field") for state in own if state.get("field") in REASONING_FIELDS]
    if names and field == REASONING_FIELDS[0]:           # else a profile says it
        field = names[0]
    details = [each for state in own for each in objects_of(state.get("details"))]
    if field and details:
        message.setdefault("reasoning_details", details)
    elif field == "reasoning_details" and thought:
        message.setdefault(field, [{"type": "reasoning.text", "text": thought}])
    if thought and field not in (None, "reasoning_details"):
        message[field] = thought
    extras = {ident: object_of(extra) for state in own
              for ident, extra in object_of(state.get("calls")).items()}
    if extras:
        message["tool_calls"] = [{**_extras_in(extras.get(call.get("id"))), **call}
                                 for call in message.get("tool_calls", ())]


def _extras_in(given: Any) -> Json:
    """What of a client's carrier may be part of a call."""
    given = object_of(given)
    return {name: given[name] for name in CALL_EXTRAS if isinstance(given.get(name), dict)}


class ToolCall:
    """A call as it arrives: its name may come in pieces, its arguments before it, or twice."""

    def __init__(self, ident: str, source: str) -> None:
        self.id, self.source, self.name = ident, source, ""
        self.seen = self.named = False   #: by the writer; the client was told the name: it is final
        self.begun = False               #: an argument byte has come
        self.odd = False                 #: the arguments are no object (encoded twice, null, …)
        self.extras: Json = {}           #: members that the upstream wants back (CALL_EXTRAS)
        self._mender = ObjectMender()
        self._pending: List[str] = []    #: arguments not taken yet; of odd ones all

    @property
    def complete(self) -> bool:
        return self._mender.complete

    def add(self, function: Json) -> int:
        """How many characters of arguments it brought."""
        name, given = function.get("name"), function.get("arguments")
        # some repeat it in each chunk; nothing is called by more than a thousand characters
        if isinstance(name, str) and not self.named and name != self.name and len(self.name) < 1000:
            self.name += name
        text = dump_text(given) if isinstance(given, dict) else given
        if not isinstance(text, str) or self._mender.complete:
            return 0
        if not self.begun:
            text = text.lstrip()
            self.begun, self.odd = bool(text), text[:1] not in ("", "{")
        self._pending.append(text if self.odd else self._mender.feed(text))
        return len(text)

    def take(self, last: bool = False, cut: bool = False) -> str:
        """The arguments that may be passed on now, odd ones at last; `cut`: they may be half."""
        if self.odd and not last:
            return ""
        text = "".join(self._pending)
        if self.odd:
            return text                  # kept: they are asked for once
        self._pending = []
        return text + self._mender.close(cut) if last and self.begun else text

    def as_chat(self) -> Json:
        """The call in a message, once all has come; arguments that never became JSON as they came.
        """
        whole = self.odd or self.complete
        arguments = self.take(last=True) if whole else self._mender.raw()
        return {**chat_call(self.id, self.name, arguments), **self.extras}

    def as_said(self) -> Json:
        """The call with its arguments as they came, whatever was taken."""
        arguments = "".join(self._pending) if self.odd else self._mender.raw()
        return chat_call(unwrap_id(self.id), self.name, arguments)


class ToolCalls:
    """The calls of one answer, in the order in which they appeared.

    The one place that knows which call a delta belongs to.
    """

    def __init__(self, make_id: Callable[[str], str] = str,
                 taken: Iterable[str] = ()) -> None:
        """`make_id` makes a call's id of the upstream's own, which may be ""."""
        self.all: List[ToolCall] = []
        self._make_id, self._taken = make_id, set(taken)
        self._by_index: Dict[int, ToolCall] = {}
        self._by_source: Dict[str, ToolCall] = {}
        self.size = 0                    #: characters of arguments

    def add(self, deltas: Any) -> List[ToolCall]:
        """Take the `tool_calls` of one delta; the calls they belong to."""
        if deltas.__class__ is list and len(deltas) == 1:        # nearly every one
            call = self._continued(deltas[0])
            if call is not None:
                return [call]
        touched: Dict[ToolCall, None] = {}
        for delta in objects_of(deltas):
            function = object_of(delta.get("function"))
            if delta.get("id") or isinstance(delta.get("function"), dict):
                call = self._find(delta, function, touched)
                self.size += call.add(function)
                call.extras.update((name, delta[name]) for name in CALL_EXTRAS if delta.get(name))
                touched[call] = None
        return list(touched)

    def _continued(self, delta: Any) -> Optional[ToolCall]:
        """The call by index to which a delta adds nothing but arguments, None for another delta."""
        function = delta.get("function") if delta.__class__ is dict else None
        if function.__class__ is not dict or len(function) != 1 or "arguments" not in function or (
                not delta.keys().isdisjoint(CALL_EXTRAS)):
            return None
        index = delta.get("index")
        call = self._by_index.get(index) if index.__class__ is int and not delta.get("id") else None
        if call is not None:
            self.size += call.add(function)
        return call

    def _find(self, delta: Json, function: Json, touched: Collection[ToolCall]) -> ToolCall:
        """By index, else by id, else the last one; or a new one."""
        index, source, name = delta.get("index"), delta.get("id"), function.get("name")
        source = source if isinstance(source, str) else ""
        if index.__class__ is int:
            call = self._by_index.get(index)
        elif source:
            index, call = None, self._by_source.get(source)
        else:
            index, call = None, self.all[-1] if self.all else None
        twice = name and not source and call in touched  # two entries of one chunk are two calls
        if call is None or twice or name and self._is_another(call, source, function, index):
            call = ToolCall(self._claim(source), source)
            self.all.append(call)
        if index is not None:
            self._by_index[index] = call
        if source:
            call.source = call.source or source
            self._by_source.setdefault(source, call)
        return call

    @staticmethod
    def _is_another(call: ToolCall, source: str, function: Json, index: Optional[int]) -> bool:
        """Whether a name begins a call of its own, though it comes where `call` goes on.

        Servers that send every call under index 0 show a new one by a new id, or by a new name
        after the end.  An id that comes late, with the name once more, is still the call's own.
        """
        if source and call.source:
            return source != call.source
        renamed = bool(call.name) and function["name"] != call.name
        if call.complete:
            nameless = index is None and not source
            return renamed or bool(function.get("arguments")) and (
                nameless or bool(source and call.name))
        return renamed and bool(source) and call.begun

    def _claim(self, source: str) -> str:
        """An id that is new in this conversation."""
        ident = self._make_id("" if source in self._taken else source)
        self._taken.add(ident)
        return ident


#: ("thinking", text, reasoning_details), ("text", text, the choice), ("refusal", text, None),
#: ("annotations", "", a list), ("call", "", ToolCall)
Part = Tuple[str, str, Any]


_PLAIN_FIELDS = ("content", *REASONING_FIELDS)


def _size_of(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


class AnswerReader:
    """Chat chunks in, parts of an answer out, alike for all upstreams."""

    def __init__(self, profile: Json, calls: ToolCalls, stops: Sequence[str] = (),
                 wants_json: bool = False) -> None:
        self.calls = calls
        self.usage: Optional[Json] = None
        self.finish_reason: Optional[str] = None
        self.choice: Json = {}           #: of the latest chunk
        self.field = REASONING_FIELDS[0]         #: where the reasoning came
        self.thought: List[str] = []
        self.details = Details()
        self.watch = StopWatch(stops) if stops else None
        self._profile = profile
        self._tags = ThinkTags() if profile["think_tags"] else None
        # models that are asked by a prompt alone like to put ``` around their JSON
        by_prompt = wants_json and profile["structured_output"] == "prompt"
        self._fence = Unfence() if by_prompt else None
        self._is_plain = not (self._tags or self._fence or self.watch)
        self._size = 0                   #: UTF-8 bytes of texts

    @property
    def cut(self) -> bool:
        """Whether the answer was cut off: its last call may be incomplete, and must not run."""
        return self.finish_reason in CUT_SHORT

    @property
    def ended(self) -> bool:
        """Whether a stop sequence that the upstream does not know was hit: the rest is unwanted."""
        return self.watch is not None and bool(self.watch.hit)

    def counts(self, turn: Turn) -> Usage:
        """The upstream's counts; what it does not say is estimated."""
        usage = parse_usage(self.usage)
        if usage.prompt and usage.completion:
            return usage
        made = int((self._size + self.calls.size) / 3.5 + 0.99)
        return replace(usage, prompt=usage.prompt or turn.estimate, estimated=not self.usage,
                       completion=usage.completion or made)

    def carrier(self, text: str = "", details: Sequence[Json] = (),
                calls: Sequence[ToolCall] = ()) -> Json:
        """What has to come back of this answer, for ChatHistory to give it to its upstream again.

        The text may go to any upstream, the rest to the one that it came from.
        """
        extras = {unwrap_id(call.id): call.extras for call in calls if call.extras}
        thinks = bool(text or details or self.thought and not calls)
        field = self.field if thinks and self.field != REASONING_FIELDS[0] else ""
        state = non_empty(text=text, details=list(details), calls=extras, field=field)
        return state if state.keys() <= {"text"} else {
            **state, "of": self._profile.get("origin", "")}

    def kept(self, with_text: bool) -> Iterator[Tuple[Json, Json]]:
        """The calls as their client knows them, each with what has to come back with it."""
        calls = [call for call in self.calls.all if call.name]
        text = "".join(self.thought) if calls and with_text else ""
        state = self.carrier(text, self.details.joined(), calls)
        return ((call.as_said(), state) for call in calls if state)

    def feed(self, chunk: Json) -> List[Part]:
        """UpstreamBroke where the answer was broken off."""
        self.choice = choice = first_choice(chunk)
        choices = chunk.get("choices")
        if choices.__class__ is list and len(choices) > 1:
            return self._together(chunk)
        reason = choice.get("finish_reason")
        if reason and isinstance(reason, str):
            if reason != "stop" or not self.finish_reason:       # some end one answer twice
                self.finish_reason = reason
            if reason in FATAL_FINISH:
                raise broken_off(reason)
        if "usage" in chunk or "usage" in choice:
            self.usage = usage_of(chunk) or self.usage
        delta = choice.get("delta")
        if not isinstance(delta, dict) or not delta or self.ended:
            return []
        if len(delta) == 1 and self._is_plain:           # nearly every chunk
            (name, value), = delta.items()
            if name == "tool_calls":
                return [("call", "", call) for call in self.calls.add(value)]
            if name in _PLAIN_FIELDS and value.__class__ is str and value:
                self._size += len(value) if value.isascii() else _size_of(value)
                if name == "content":
                    return [("text", value, choice)]
                self.field = name
                self.thought.append(value)
                return [("thinking", value, None)]
        return self._parts(delta, choice)

    def _together(self, chunk: Json) -> List[Part]:
        """The parts of one answer that came in several choices."""
        parts: List[Part] = []
        for choice in choices_of(chunk):
            parts += self.feed({**chunk, "choices": [choice]})
        return parts

    def _parts(self, delta: Json, choice: Json) -> List[Part]:
        parts: List[Part] = []
        reasoning, details = reasoning_of(delta), delta.get("reasoning_details")
        if reasoning or details:
            self.field = next(filter(delta.get, REASONING_FIELDS), self.field)
            parts = self._thinking(reasoning, details)
        content, refusal = delta.get("content"), delta.get("refusal")
        for kind, text in content_pieces(content) if content else ():
            parts += self._content(text, choice) if kind == "text" else self._thinking(text, None)
        if isinstance(delta.get("annotations"), list):
            parts.append(("annotations", "", delta["annotations"]))
        if refusal and isinstance(refusal, str):
            self._size += _size_of(refusal)
            parts.append(("refusal", refusal, None))
        calls = delta.get("tool_calls")
        if not calls and delta.get("function_call"):     # the oldest form
            calls = [{"function": delta["function_call"]}]
        if calls:
            parts += [] if self._is_plain else self.close()
            parts += [("call", "", call) for call in self.calls.add(calls)]
        return parts

    def close(self) -> List[Part]:
        """What tag splitter, fence and stop watch hold back."""
        parts: List[Part] = []
        for kind, piece in self._tags.close() if self._tags else ():
            parts += self._answer(piece, {}) if kind == "text" else [("thinking", piece, None)]
        if self._fence:
            parts += self._watched(self._fence.close(), {})
        return parts + self._unwatched()

    def _thinking(self, text: str, details: Any) -> List[Part]:
        self._size += _size_of(text)
        self.thought.append(text)
        self.details.add(details)
        return [*self._unwatched(), ("thinking", text, details)]

    def _content(self, text: str, choice: Json) -> List[Part]:
        self._size += _size_of(text)
        parts: List[Part] = []
        for kind, piece in self._tags.feed(text) if self._tags else [("text", text)]:
            parts += self._answer(piece, choice) if kind == "text" else [("thinking", piece, None)]
        return parts

    def _answer(self, text: str, choice: Json) -> List[Part]:
        return self._watched(self._fence.feed(text) if self._fence else text, choice)

    def _watched(self, text: str, choice: Json) -> List[Part]:
        text = self.watch.feed(text) if self.watch else text
        return [("text", text, choice)] if text else []

    def _unwatched(self) -> List[Part]:
        text = self.watch.close() if self.watch else ""
        return [("text", text, {})] if text else []


def content_pieces(content: Any) -> List[Tuple[str, str]]:
    """The texts of a `content`: ("text", …), and Mistral's ("thinking", …) where it is a list.
    """
    if isinstance(content, str):
        return [("text", content)]
    pieces: List[Tuple[str, str]] = []
    for part in objects_of(content):
        thought = part.get("thinking")
        kind, text = ("thinking", thought) if thought else (
            "text", part.get("text") or part.get("refusal"))
        if isinstance(text, list):
            text = "".join(said for _, said in content_pieces(text))
        pieces += [(kind, text)] if isinstance(text, str) and text else []
    return pieces


class AnswerWriter:
    """Chat chunks in by feed(), a dialect's events out; close() gives the last ones.

    whole() does both for a plain completion.
    """

    def __init__(self, reader: AnswerReader, turn: Turn) -> None:
        self.reader, self.turn = reader, turn

    @property
    def usage(self) -> Usage:
        return self.reader.counts(self.turn)

    @property
    def finish_reason(self) -> Optional[str]:
        return self.reader.finish_reason

    @property
    def ended(self) -> bool:
        """Whether nothing more of the upstream is wanted."""
        return self.reader.ended


# --- iFlow's quirks ----------------------------------------------------------

#: Fields set by model where the client did not set them (iflow.md); later patterns add to earlier.
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

#: Business codes in bodies, also under HTTP 200 -> the status they mean.  401 and 403 become the
#: 403 about our key.
IFLOW_CODES = {434: 401, 438: 403, 439: 401, 435: 404, 429: 429, 449: 429, 8211: 429, 511: 400,
               413: 400, 514: 502, 406: 403}


def wants_reasoning_back(model: str) -> bool:
    return any(fnmatchcase(model.lower(), pattern) for pattern in REASONING_BACK)


def _refuses_thinking(chat: Json) -> bool:
    """Whether a Chat client switched thinking off, in any provider's way."""
    template = object_of(chat.get("chat_template_kwargs"))
    switches = [*map(chat.get, ("enable_thinking", "thinking_mode", "reasoning")),
                *map(template.get, ("enable_thinking", "thinking"))]
    return any(switch is False for switch in switches) or (
        chat.get("reasoning_effort") == "none") or (
        object_of(chat.get("thinking")).get("type") == "disabled")


def adapt_to_iflow(chat: Json, model: str) -> Json:
    """A chat request as iFlow wants it, a new object."""
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
    return chat


def refill(chat: Json, recall: Callable[[Json], Json], profile: Json) -> Json:
    """`chat` with what its client dropped of earlier answers with calls; the same object where
    there is nothing to add.  `recall` gives the carrier of a call.

    DeepSeek, Kimi and some models of iFlow refuse a tool call without the reasoning that led to it;
    where nobody knows it any more an empty one will do.
    """
    messages = chat.get("messages")
    if not isinstance(messages, list):
        return chat
    wanted = profile["require_reasoning_on_tool_calls"] and not _refuses_thinking(chat)
    complete = [_refilled(message, recall, bool(wanted), profile) for message in messages]
    same = all(new is old for new, old in zip(complete, messages))
    return chat if same else {**chat, "messages": complete}


def _refilled(message: Any, recall: Callable[[Json], Json], wanted: bool, profile: Json) -> Any:
    calls = object_of(message).get("tool_calls")
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict)
                                                           for call in calls):
        return message
    done = {**message, "tool_calls": calls}
    carried, thought = recall(calls[0]), reasoning_of(message)
    give_back(done, "" if thought else carried.get("text", ""), [carried], profile)
    if wanted and not reasoning_of(done):
        done[REASONING_FIELDS[0]] = ""
    return message if done == message else done


def call_digest(scope: str, call: Json) -> str:
    """What a call's reasoning is kept under; not its id: Kimi's `functions.t:0` is everywhere."""
    function = object_of(call.get("function"))
    given = function.get("arguments")
    # parsed, for some clients write it anew
    given = parse_arguments(given) if isinstance(given, str) else given
    facts = json.dumps([scope, call.get("id"), function.get("name"), given or {}], sort_keys=True)
    return sha256(facts).hex()


def opening_of(messages: Any) -> str:
    """The first user text: it stays the same as a conversation goes on."""
    said = [message.get("content") for message in objects_of(messages)
            if message.get("role") == "user"]
    parts = said[0] if said and isinstance(said[0], list) else said[:1]
    return "\n".join(str(part.get("text") or part) if isinstance(part, dict) else str(part)
                     for part in parts)


def business_refusal(payload: Json, status: int) -> Optional[UpstreamRefused]:
    """The error that iFlow's `{"status": "439", "msg": "…"}` (or `error_code`) is, else None."""
    code = str(payload.get("error_code") or payload.get("status") or "")
    told = "choices" not in payload and ("msg" in payload or "error_code" in payload)
    if not told or not re.fullmatch("[0-9]{1,9}", code) or int(code) in (0, 200):
        return None
    meant = IFLOW_CODES.get(int(code), status if status >= 400 else 502)
    message = payload.get("msg") or payload.get("message") or "no message"
    refusal = UpstreamRefused(f"{one_line(message, 500)} (code {int(code)})", status=meant,
                              type=error_type(meant))
    if meant == 400:
        refusal.code, refusal.overflow = "context_length_exceeded", (0, 0, 0)
    elif meant == 404:
        refusal.code = "model_not_found"
    elif meant == 429:
        refusal.retry_after_s = DEFAULT_RETRY_AFTER_S
    return refusal


class ReasoningMerge:
    """Chat chunks with reasoning and answer together, as `preserve_reasoning_content` says.

    False: reasoning deltas become content deltas, a blank line before the answer's first.  True:
    fields as they came; where no content ever came, the reasoning once more as content at the end.
    """
    ended = False                        #: nothing more of the upstream is wanted

    def __init__(self, preserve: bool) -> None:
        self._preserve = preserve
        self._reasoning: Dict[Any, List[str]] = {}   # reasoning by choice, until its answer begins
        self._answered: Set[Any] = set()
        self.usage: Optional[Json] = None
        self.finish_reason: Optional[str] = None

    def feed(self, chunk: Json) -> Iterator[Any]:
        self.usage = usage_of(chunk) or self.usage
        for choice in choices_of(chunk):
            self._merge(choice, "delta")
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        yield chunk

    def close(self) -> Iterator[Any]:
        yield "[DONE]"

    def whole(self, completion: Json) -> Json:
        """The same of a plain answer, which is changed in place."""
        for choice in choices_of(completion):
            if isinstance(choice.get("message"), dict):
                self._merge(choice, "message")
        return completion

    def _merge(self, choice: Json, field: str) -> None:
        delta, index = choice.get(field), choice_index(choice)
        if not isinstance(delta, dict):
            delta = {}
        content, reasoning = delta.get("content"), reasoning_of(delta)
        if reasoning:
            self._reasoning.setdefault(index, []).append(reasoning)
        if not self._preserve:
            for name in (*REASONING_FIELDS, "reasoning_details"):
                delta.pop(name, None)
            if content and index in self._reasoning and index not in self._answered:
                content = ("\n\n" + content) if isinstance(content, str) else content
            if reasoning and isinstance(content, (str, type(None))):
                content = reasoning + (content or "")
            if reasoning or content:
                delta["content"] = content
        if delta.get("content") and (self._preserve or content != reasoning):
            self._answered.add(index)
        ends = choice.get("finish_reason") or field == "message"
        if self._preserve and ends and index in self._reasoning and index not in self._answered:
            delta["content"] = "".join(self._reasoning[index])
            choice[field] = delta


def encode_chunk(chunk: Any) -> bytes:
    """A chunk or another object, or the end, as a record."""
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
    """Bytes of an event stream in, whole records out.

    Accepts any line end but a bare CR, `data:` with and without a blank, several data lines,
    comments, a BOM, and records without a blank line between them.
    """

    def __init__(self) -> None:
        self._by_line = False            # blank lines were missing
        self._pieces: List[bytes] = []   # of a line without its end
        self._lines: List[bytes] = []    # of a record without its blank line
        self._data: List[bytes] = []     # what its data lines hold
        self._size = 0

    def holds(self) -> bool:
        """Whether a part of a record waits for its end."""
        return bool(self._pieces or self._lines)

    def rest(self) -> bytes:
        """The part of a record that waits for its end."""
        return b"\n".join([*self._lines, b"".join(self._pieces)])

    def feed(self, payload: bytes) -> List[bytes]:
        """The data of the records that are whole now."""
        return [data for _, data in self.records(payload) if data is not None]

    def close(self) -> List[bytes]:
        """What a stream that ended without its last blank line still holds."""
        return self.feed(b"\n\n") if self.holds() else []

    def records(self, payload: bytes) -> List[Tuple[bytes, Optional[bytes]]]:
        """The records that are whole now, each as it came and its data, None where it has none.

        A blank line is put in where the upstream leaves it out.
        """
        if payload[:5] == b"data:" and payload[-2:] == b"\n\n" and not self.holds() and (
                payload.count(b"\n") == 2):      # nearly every read
            return [(payload, payload[5:].strip(b" \r\n"))]
        found: List[Tuple[bytes, Optional[bytes]]] = []
        if b"\n" not in payload:         # joined once, not anew at each read
            self._pieces += [payload] if payload else []
        else:
            lines = b"".join([*self._pieces, payload]).split(b"\n")
            rest = lines.pop()
            for line in lines:
                if line in (b"", b"\r"):
                    self._lines.append(line)
                    found.append(self._end_record())
                else:
                    self._take(line, found)
            self._pieces = [rest] if rest else []
        self._size = (0 if found else self._size) + (len(payload) if self.holds() else 0)
        if self._size > RECORD_LIMIT_BYTES:
            raise UpstreamGarbled("a record of the upstream's stream never ends")
        return found

    def _take(self, line: bytes, found: List[Tuple[bytes, Optional[bytes]]]) -> None:
        """A line that is not blank."""
        text = line[3:] if line[:3] == codecs.BOM_UTF8 else line
        if text[:5] != b"data:":
            return self._lines.append(line)
        if self._data and self._is_whole():
            self._by_line = True
            self._lines.append(b"")
            found.append(self._end_record())
        data = text[5:].strip(b" \r")
        self._lines.append(line)
        self._data.append(data)
        if data == b"[DONE]" or self._by_line and self._is_whole():
            self._lines.append(b"\r" if line[-1:] == b"\r" else b"")
            found.append(self._end_record())

    def _is_whole(self) -> bool:
        """Whether the data line that has come is a record by itself, not the first line of one."""
        if len(self._data) != 1:
            return False
        try:
            return isinstance(_DECODER.decode(self._data[0].decode()), dict)
        except (ValueError, RecursionError):
            return False

    def _end_record(self) -> Tuple[bytes, Optional[bytes]]:
        record = b"\n".join(self._lines) + b"\n"
        data = b"\n".join(self._data) if self._data else None
        self._lines, self._data = [], []
        return record, data


def read_records(records: Iterable[bytes]) -> Iterator[Optional[Json]]:
    """The chunks of records, None for [DONE], after which nothing is read.

    UpstreamGarbled, or the UpstreamRefused that a record stands for.
    """
    for record in records:
        if record == b"[DONE]":
            yield None
            return
        try:
            chunk = _DECODER.decode(record.decode())
        except RecursionError:
            raise UpstreamGarbled("a record of the upstream's stream is nested too deeply"
                                  ) from None
        except ValueError:
            raise UpstreamGarbled("a record of the upstream's stream is not JSON") from None
        refusal = refusal_in(chunk)
        if refusal:
            raise refusal
        if isinstance(chunk, dict):
            yield chunk


def is_event_stream(content_type: str, data: bytes) -> bool:
    """Whether a plain answer came as an event stream, by its Content-Type or by how it begins."""
    start = data[:64].removeprefix(codecs.BOM_UTF8).lstrip()
    return start.startswith((b"data:", b"event:", b":")) or (
        "event-stream" in content_type and start[:1] not in (b"{", b"["))


class _FoldedChoice:
    """One answer of a stream that is folded: what its chunks say of it, its message in pieces."""

    def __init__(self, make_id: Callable[[str], str]) -> None:
        self.facts: Json = {}
        self._fields: Json = {"role": "assistant", "content": None}
        self._texts: Dict[str, List[str]] = {}           # of fields that grow
        self._calls, self._details = ToolCalls(make_id), Details()
        self._function = ToolCalls()     # of the oldest form, `function_call`

    def add(self, choice: Json) -> None:
        self.facts.update((name, value) for name, value in choice.items()
                          if name not in ("delta", "message") and value is not None)
        delta = choice.get("delta") or choice.get("message")
        for name, value in delta.items() if isinstance(delta, dict) else ():
            self._add_field(name, value)

    def _add_field(self, name: str, value: Any) -> None:
        known = self._fields.get(name)
        if name == "content" and isinstance(value, str) and objects_of(known):
            value = [text_part(value)]   # Mistral's thoughts are parts, what follows is text
        if name == "tool_calls":
            self._calls.add(value)
        elif name == "function_call":
            self._function.add([{"function": value}])
        elif name == "reasoning_details":
            self._details.add(value)
            self._fields[name] = self._details
        elif isinstance(value, str) and name != "role":
            self._texts.setdefault(name, []).append(value)
            self._fields[name] = ""
        elif isinstance(value, list) and isinstance(known, list):
            known += value
        elif value is not None:
            self._texts.pop(name, None)
            self._fields[name] = list(value) if isinstance(value, list) else value

    def whole(self) -> Json:
        """The choice of a plain completion."""
        message = {**self._fields,
                   **{name: "".join(pieces) for name, pieces in self._texts.items()}}
        calls = [call.as_chat() for call in self._calls.all if call.name]
        message.update(non_empty(tool_calls=calls))
        for call in self._function.all[:1]:
            message["function_call"] = call.as_chat()["function"]
        if "reasoning_details" in message:
            message["reasoning_details"] = self._details.joined()
        return {"message": message, **self.facts}


def fold_stream(data: bytes) -> Json:
    """The completion that an event stream amounts to: some servers stream whatever they are asked.

    UpstreamError; an incomplete record after a finished answer is passed over.
    """
    decoder = SSEDecoder()
    whole: Json = {"object": "chat.completion"}
    choices: Dict[Any, _FoldedChoice] = {}
    done, numbers, sum_of = False, iter(range(1 << 30)), zlib.crc32(data)

    def make_id(source: str) -> str:
        return source or f"call_{sum_of:08x}{next(numbers):04x}"

    def is_finished() -> bool:
        return done or any(choice.facts.get("finish_reason") for choice in choices.values())

    try:
        for chunk in read_records([*decoder.feed(data), *decoder.close()]):
            done = done or chunk is None
            whole.update((name, value) for name, value in (chunk or {}).items()
                         if value and name not in ("object", "choices"))
            for choice in choices_of(chunk or {}):
                index = choice_index(choice)
                choices[index] = choices.get(index) or _FoldedChoice(make_id)
                choices[index].add(choice)
    except UpstreamGarbled:
        if not is_finished():
            raise
    if not is_finished():
        raise UpstreamGarbled("the upstream's answer was cut off")
    return {**whole, "choices": [choice.whole() for choice in choices.values()]}


# --- chat requests for other dialects -----------------------------------------

def text_part(text: str) -> Json:
    return {"type": "text", "text": text}


def join_parts(parts: List[Json]) -> Any:
    """Parts as a message's content: a string where all is text, for every server takes that."""
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return "\n\n".join(texts) if len(texts) == len(parts) else parts


_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\r\n"


def is_base64(data: str) -> bool:
    """Whether `data` holds bytes in base64; translate() looks at a megabyte in a millisecond."""
    body = data.rstrip("=\r\n")
    digits = len(body) - body.count("\n") - body.count("\r")
    return bool(body) and "=" not in body and digits % 4 != 1 and not (
        data.encode("utf-8", "replace").translate(None, _BASE64))


def image_part(url: str, profile: Json, detail: Optional[str] = None) -> Json:
    """An image for the model, or a note that it is not shown."""
    if not profile["vision"]:
        return text_part(NO_IMAGE)
    more = {"detail": detail} if detail not in (None, "auto") else {}
    return {"type": "image_url", "image_url": {"url": url, **more}}


def family_of(kind: str, families: Sequence[str]) -> str:
    """The family of a server tool; its type may have a version at the end."""
    return next((family for family in families if kind.startswith(family)), kind)


def provider_tool(profile: Json, family: str) -> Json:
    """What the provider has in place of a server tool, {} where it has nothing."""
    policy = profile["server_tools"]
    return object_of(policy.get(family)) if isinstance(policy, dict) else {}


def object_schema(required: Sequence[str], **properties: Any) -> Json:
    """The schema of an object; a property is its type, its enum values, or a schema."""
    spelled = {name: {"type": value} if isinstance(value, str) else
               {"type": "string", "enum": list(value)} if isinstance(value, tuple) else value
               for name, value in properties.items()}
    return {"type": "object", "properties": spelled,
            **non_empty(required=list(required))}


def function_schema(schema: Json) -> Json:
    """A schema with the members that LM Studio requires."""
    return {**schema, "type": schema.get("type") or "object",
            "properties": object_of(schema.get("properties"))}


def _tool_message(ident: str, text: str) -> Json:
    return {"role": "tool", "tool_call_id": ident, "content": text}


def _joined_contents(contents: Sequence[Any]) -> Any:
    """The contents of several messages as one, strings that are neighbours as one text."""
    parts: List[Json] = []
    texts: List[str] = []
    for content in [*contents, []]:
        if isinstance(content, str):
            texts += [content] if content else []
            continue
        parts += [text_part("\n\n".join(texts))] if texts else []
        parts += content
        texts = []
    return join_parts(parts)


class ChatHistory:
    """The messages of a chat request, built step by step from another dialect's conversation.

    What follows an assistant's message waits until the next one: results come directly behind
    their calls, wherever they stood; a call without one gets NO_RESULT, and images and files of
    results go into the user message that follows.  Users in a row become one where the dialect
    `merges` them, and for templates so strict that they want system texts at the top alone.
    System texts before anything else are `leading`: they belong into the first message.
    """

    def __init__(self, profile: Json, thinking: Optional[bool], merges: bool) -> None:
        self.messages: List[Json] = []
        self.leading: List[str] = []
        self._profile, self._merges = profile, merges or profile["mid_system"] == "user"
        self._wants_reasoning = thinking is not False and profile["require_reasoning_on_tool_calls"]
        self._waiting: Dict[str, int] = {}        #: calls without a result: how many have that id
        self._attached: List[Json] = []           #: images and files of results
        self._next: List[Json] = []               #: user and system messages of this step

    def add_user(self, parts: List[Json]) -> None:
        self._next.append({"role": "user", "content": join_parts(parts)})

    def add_system(self, text: str) -> None:
        if not text:
            return
        if not self.messages and not self._next:
            self.leading.append(text)
        elif self._profile["mid_system"] == "user":
            self.add_user([text_part(f"<system>\n{text}\n</system>")])
        else:
            self._next.append({"role": "system", "content": text})

    def add_assistant(self, texts: Sequence[str], thoughts: Sequence[str],
                      carriers: Sequence[Json], calls: List[Json]) -> None:
        """An assistant's message; `calls` as they stand in Chat."""
        self.end_step()
        field, thought = self._profile["reasoning_field"], "\n\n".join(filter(None, thoughts))
        message: Json = {"role": "assistant",
                         "content": "\n\n".join(filter(None, texts)) or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        give_back(message, thought, carriers, self._profile)
        required = self._wants_reasoning and (calls or self._wants_reasoning == "all")
        if field and field != "reasoning_details" and required:
            message.setdefault(field, "")
        self.messages.append(message)
        for call in calls:
            self._waiting[call["id"]] = self._waiting.get(call["id"], 0) + 1

    def add_result(self, ident: str, parts: Sequence[Json], is_error: bool = False) -> None:
        """The result of a call; one that answers no call becomes a user's text.

        An unmatched tool message would make the upstream refuse the whole.
        """
        files = [part for part in parts if part["type"] != "text"]
        text = "\n\n".join(part["text"] for part in parts if part["type"] == "text")
        if is_error:
            text = f"[tool error] {text}".rstrip()
        if not self._waiting.get(ident):
            return self.add_user([text_part(f"[result of tool call {ident}]\n{text}"), *files])
        self._waiting[ident] -= 1
        if files:
            note = (f"[{len(files)} attachment(s) of this result follow in the next user "
                    "message]")
            text = f"{text}\n\n{note}" if text else note
            self._attached += [text_part(f"Attachment(s) of tool result {ident}:"), *files]
        self.messages.append(_tool_message(ident, text))

    def with_system(self, *texts: Optional[str]) -> List[Json]:
        """The messages; the first has these system texts and the leading ones."""
        system = "\n\n".join(filter(None, [*texts, *self.leading]))
        return [*([{"role": "system", "content": system}] if system else []), *self.messages]

    def end_step(self) -> None:
        """Nothing more belongs to the latest assistant's message."""
        self.messages += [_tool_message(ident, NO_RESULT)
                          for ident, number in self._waiting.items() for _ in range(number)]
        runs: List[List[Json]] = []
        if self._attached:
            runs.append([{"role": "user", "content": self._attached}])
        for message in self._next:
            last = runs[-1][-1] if runs else {}
            joins = self._merges or last.get("content") is self._attached
            if joins and message["role"] == last.get("role") == "user":
                runs[-1].append(message)
            else:
                runs.append([message])
        self.messages += [run[0] if len(run) == 1 else {
            "role": "user", "content": _joined_contents([each["content"] for each in run])}
            for run in runs]
        self._waiting, self._attached, self._next = {}, [], []


class Wishes(NamedTuple):
    """What a request asks for and providers express in different ways."""
    thinking: Optional[bool] = None
    budget: Optional[int] = None         #: of thinking, in tokens
    effort: Optional[str] = None
    missing: Sequence[str] = ()          #: names of tools that can't be run here
    is_chat: bool = False                #: a chat client: it chose these and the limits itself


def finish_chat(chat: Json, profile: Json, wishes: Wishes) -> Json:
    """`chat`, in OpenAI's words, as the provider of `profile` takes it.

    The same object where nothing is to be changed; else a copy.
    """
    done = dict(chat)
    _fit_tools(done, profile, wishes.thinking)
    rules = [_fit_format(done, profile)]
    if wishes.missing and chat["messages"][0].get("role") == "system":
        rules.insert(0, NO_TOOL.format(", ".join(wishes.missing)))     # else it makes results up
    if any(rules):
        done["messages"] = _with_rule(done["messages"], "\n\n".join(filter(None, rules)))
    if not wishes.is_chat:
        _fit_options(done, profile, wishes)
    return chat if done == chat else done


def _fit_tools(chat: Json, profile: Json, thinks: Optional[bool]) -> None:
    choice = chat.get("tool_choice")
    can_force = profile["forced_tool_choice"] and (
        profile["forced_tool_choice_with_thinking"] or not thinks)
    if not can_force and (choice == "required" or isinstance(choice, dict)):
        chat["tool_choice"] = "auto"
    gone = [] if profile["parallel_tool_calls"] else ["parallel_tool_calls"]
    if choice == "none" and not profile["forced_tool_choice"]:
        gone = ["tools", "tool_choice", "parallel_tool_calls"]   # there is no other way to say it
    for name in gone:
        chat.pop(name, None)


def _fit_format(chat: Json, profile: Json) -> str:
    """Write response_format as strictly as the provider can; the rule that says the rest."""
    form, style = chat.get("response_format"), profile["structured_output"]
    kind = object_of(form).get("type")
    if kind not in ("json_object", "json_schema") or style in (kind, "json_schema"):
        return ""
    if style == "json_object":
        chat["response_format"] = {"type": "json_object"}
    else:
        del chat["response_format"]
    schema = object_of(form.get("json_schema")).get("schema")
    return "Answer with nothing but a JSON object." if kind == "json_object" else (
        "Answer with nothing but JSON that fits this JSON Schema:\n"
        + dump_text(schema or {}))


def _with_rule(messages: List[Json], rule: str) -> List[Json]:
    """`messages` with a rule at the end of the system text."""
    first = messages[0]
    content = first.get("content")
    if first.get("role") != "system" or not isinstance(content, (str, list)):
        return [{"role": "system", "content": rule}, *messages]
    content = f"{content}\n\n{rule}" if isinstance(content, str) else [*content, text_part(rule)]
    return [{**first, "content": content}, *messages[1:]]


def _fit_options(chat: Json, profile: Json, wishes: Wishes) -> None:
    """Limits, names of fields, and the thinking switch, for requests of other dialects."""
    limit, budget = chat.pop("max_tokens", None), wishes.budget
    if limit is not None:
        limit = min(limit, profile.get("max_output") or limit)
        chat[profile["max_tokens_field"]] = limit
    if budget and limit:
        # Clamped, not refused: a budget above max_tokens is legal with interleaved thinking.
        budget = min(max(budget, 1024), max(1, limit - 1))
    user = chat.pop("user", None)
    if user and profile["user_field"]:
        chat[profile["user_field"]] = user
    if not profile["top_k"]:
        chat.pop("top_k", None)
    if chat.get("stream") and profile["stream_usage"]:
        chat["stream_options"] = {"include_usage": True}
    set_thinking(chat, profile, wishes.thinking, budget, wishes.effort)


#: Fields with the texts of messages and items; no model reads the others (ids, types, signatures).
_SAID = ("content", "text", "refusal", "summary", "name", "arguments", "input", "output", "action",
         "function", "tool_calls", *REASONING_FIELDS)


def said_tokens(value: Any) -> int:
    """About how many tokens the texts of a message or an item take; an image or a file 1 500."""
    if isinstance(value, str):
        return estimate_tokens(value)
    if isinstance(value, list):
        return sum(map(said_tokens, value))
    if not isinstance(value, dict):
        return 0
    if value.get("type") in (*_IMAGE_PARTS, "file"):
        return 1500
    return sum(estimate_tokens(dump_text(said))
               if isinstance(said, dict) and name != "function" else said_tokens(said)
               for name, said in ((name, value[name]) for name in _SAID if name in value))


def _counted_once(value: Any, count: Callable[[Any], int]) -> int:
    """`count` of a message or of tools, which the next request may bring again."""
    if not isinstance(value, (KnownMessage, KnownTools)):
        return count(value)
    if not hasattr(value, "tokens"):
        value.tokens = count(value)
    return value.tokens


def count_chat_tokens(chat: Json) -> int:
    """About how many tokens the prompt of a chat request takes: the one estimate there is."""
    def schemas(value: Any) -> int:
        return estimate_tokens(dump_text(value)) if value else 0

    return sum(4 + _counted_once(message, said_tokens) for message in chat["messages"]) + (
        _counted_once(chat.get("tools"), schemas) + schemas(chat.get("response_format")))


class Turn:
    """A request of another dialect: `chat` is what it asks of Chat, stream() writes its answer."""
    chat: Json
    skipped: Sequence[str] = ()          #: unknown types of blocks in it, which were left out
    scale: Callable[[int], int] = int    #: estimated tokens -> as the target's model counts them

    def stream(self, new_id: Callable[[str], str]) -> AnswerWriter:
        raise NotImplementedError

    @cached_property
    def raw_estimate(self) -> int:
        """About how many tokens the prompt has, before the model's own way of counting."""
        return count_chat_tokens(self.chat)

    @cached_property
    def estimate(self) -> int:
        return self.scale(self.raw_estimate)


# === 8. Anthropic Messages (pure) ============================================
#
# A Messages request becomes a chat request, a completion a message, chunks become events. The plain
# answer is made of the events that a stream of the same completion would send.

#: finish_reason -> stop_reason; any other means `tool_use` where there is a call, else `end_turn`.
STOP_REASON = {"length": "max_tokens", "repetition_truncation": "max_tokens",
               "content_filter": "refusal", "sensitive": "refusal",
               "model_context_window_exceeded": "model_context_window_exceeded"}

#: HTTP status -> error.type; others: `api_error` from 500 on, else `invalid_request_error`.
MESSAGES_ERROR_TYPE = {401: "authentication_error", 402: "billing_error", 403: "permission_error",
                       404: "not_found_error", 409: "conflict_error", 413: "request_too_large",
                       429: "rate_limit_error", 504: "timeout_error", 529: "overloaded_error"}

#: Claude Code's attribution block; it changes with each prompt and would defeat the upstream's
#: prefix cache.
BILLING_HEADER = "x-anthropic-billing-header:"

#: Claude Code's stand-in for tools it has not loaded yet ("never call").
PLACEHOLDER_TOOL = "DeferredToolPlaceholder"

#: thinking.display values that leave reasoning blocks without text; `updates` shows only the notes
#: between calls.
HIDDEN_DISPLAYS = ("omitted", "updates")

#: OpenAI takes at most this many; the rest is watched for here.
STOP_LIMIT = 4

IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")

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


# --- the request: its history

def _blocks(content: Any, path: str) -> List[Tuple[str, Json]]:
    """The blocks of a content with their places, for error texts."""
    if isinstance(content, str):
        return [(path, text_part(content))]
    if content is None:
        raise BadRequest(f"{path}: Field required")
    if not isinstance(content, list):
        raise BadRequest(f"{path}: Input should be a string or a list")
    for i, block in enumerate(content):
        if not isinstance(block, dict):
            raise BadRequest(f"{path}.{i}: Input should be a valid dictionary")
    return [(f"{path}.{i}", block) for i, block in enumerate(content)]


def _message_blocks(message: Any, i: int) -> List[Tuple[str, Json]]:
    """The blocks of a request's message `i`, once it is known to be one."""
    if not isinstance(message, dict):
        raise BadRequest(f"messages.{i}: Input should be a valid dictionary")
    if message.get("role") not in ("user", "assistant", "system"):
        raise BadRequest(f"messages.{i}.role: Input should be 'user', 'assistant' or 'system'")
    blocks = _blocks(message.get("content"), f"messages.{i}.content")
    if message["role"] == "user" and not any(
            block.get("text") or block.get("type") != "text" for _, block in blocks):
        raise BadRequest(f"messages.{i}: user messages must have non-empty content")
    return blocks


def _system_text(blocks: Sequence[Tuple[str, Json]]) -> str:
    texts = [_field(block, "text", str, path) for path, block in blocks
             if block.get("type") == "text"]
    return "\n\n".join(text for text in texts if text and not text.startswith(BILLING_HEADER))


def _text_parts(text: Any) -> List[Json]:
    return [text_part(text)] if text else []


def _enclosed(tag: str, block: Json, names: Sequence[str], inner: List[Json]) -> List[Json]:
    """`inner` between <tag …> and </tag>."""
    given = [(name, block.get(name)) for name in names]
    head = tag + "".join(' {}="{}"'.format(name, value.replace('"', "&quot;"))
                         for name, value in given if isinstance(value, str) and value)
    body = join_parts(inner)
    if isinstance(body, str):
        return [text_part(f"<{head}>\n{body}\n</{tag}>")]
    return [text_part(f"<{head}>"), *inner, text_part(f"</{tag}>")]


def _base64_data(source: Json, types: Sequence[str], path: str) -> str:
    """The data URL of a base64 source."""
    kind, data = _field(source, "media_type", str, path), _field(source, "data", str, path)
    if kind not in types:
        wanted = " or ".join(repr(name) for name in types)
        raise BadRequest(f"{path}.media_type: Input should be {wanted}")
    if not is_base64(data):
        raise BadRequest(f"{path}.data: Input should be valid base64")
    return f"data:{kind};base64,{data}"


#: Fields of server-tool results worth reading; encrypted_content and encrypted_index are never
#: sent to a model.
_READABLE = ("text", "stdout", "stderr", "data", "content", "source", "lines", "tool_references",
             "tabs")


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


class _Round(NamedTuple):
    """Messages up to the next assistant's, which begins the next round, and what they became."""
    given: List[Json]                    #: that next one is the last of these
    chat: List[Json]
    leading: List[str]
    ids: List[str]


def _are_same(some: Any, others: Any) -> bool:
    """Whether two lists hold the very same objects; what is parsed is never changed."""
    return isinstance(some, list) and isinstance(others, list) and len(some) == len(others) and (
        all(map(is_, some, others)))


class _MessagesHistory:
    """Reads the blocks of Anthropic's messages into a ChatHistory."""

    def __init__(self, profile: Json, thinking: Optional[bool]) -> None:
        self.profile = profile
        self.chat = ChatHistory(profile, thinking, merges=True)
        self.ids: Set[str] = set()                #: tool_use ids of the conversation
        self.effort: Any = None                   #: of the last system message that has one
        self.skipped: List[str] = []              #: unknown block types, for the log
        self.rounds: List[_Round] = []            #: those that the next request will begin with

    def read(self, messages: Any, known: Sequence[_Round]) -> None:
        """Read a request's `messages`; what they begin with, as far as `known`, is not read again.
        """
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages: at least one message is required")
        at = self._take_over(messages, known)
        blocks = {i: _message_blocks(messages[i], i) for i in range(at, len(messages))}
        roles = [message["role"] for message in messages]
        if next((role for role in roles if role != "system"), "") != "user":
            raise BadRequest("messages: the first message must use the 'user' role")
        last_user = len(roles) - 1 - roles[::-1].index("user")
        limited = [i for i, message in enumerate(messages) if "clear_at" in message]
        cleared = {i for i in limited if i < last_user
                   and messages[i]["clear_at"] == "next_user_message"}
        lasting = not limited
        ends = [i for i in range(at + 1, len(roles)) if roles[i] == "assistant" != roles[i - 1]]
        for end in [*ends, len(roles)]:
            before, leading = len(self.chat.messages), len(self.chat.leading)
            places = [i for i in range(at, end) if i not in cleared]
            ids = self._round([(roles[i], messages[i], blocks[i]) for i in places])
            lasting = lasting and end < len(roles) and not (self.effort or self.skipped)
            if lasting:
                made = self.chat.messages[before:] = [
                    KnownMessage(message) for message in self.chat.messages[before:]]
                part = _Round(messages[at:end + 1], made, self.chat.leading[leading:], ids)
                self.rounds.append(part)
            at = end

    def _take_over(self, messages: List[Any], known: Sequence[_Round]) -> int:
        """Take what the rounds that `messages` begin with became; how many messages that are."""
        at = 0
        for part in known:
            if not _are_same(messages[at:at + len(part.given)], part.given):
                break
            self.rounds.append(part)
            self.chat.messages += part.chat
            self.chat.leading += part.leading
            self.ids.update(part.ids)
            at += len(part.given) - 1
        return at

    def _round(self, given: List[Tuple[str, Json, List[Tuple[str, Json]]]]) -> List[str]:
        """Read assistant messages in a row and what follows them; the ids of their calls."""
        said = [blocks for role, _, blocks in given if role == "assistant"]
        ids: List[str] = []
        if said:
            turn = _AssistantTurn(self, [block for blocks in said for block in blocks])
            self.chat.add_assistant(turn.texts, turn.thoughts, turn.carriers, turn.calls)
            ids = list(turn.ids)
        for role, message, blocks in given[len(said):]:
            if role == "user":
                self._user(blocks)
            else:
                self._system(message, blocks)
        self.chat.end_step()
        return ids

    def _system(self, message: Json, blocks: List[Tuple[str, Json]]) -> None:
        config = message.get("output_config")
        if isinstance(config, dict) and config.get("effort"):
            self.effort = config["effort"]
        self.skipped += [str(block.get("type")) for _, block in blocks
                         if block.get("type") != "text"]
        self.chat.add_system(_system_text(blocks))

    def _user(self, blocks: List[Tuple[str, Json]]) -> None:
        """Results first, wherever they stand: nothing may come between them and their calls."""
        rest = [(path, block) for path, block in blocks if block.get("type") != "tool_result"]
        for path, block in blocks:
            if block.get("type") == "tool_result":
                self._result(block, path)
        parts = [part for path, block in rest for part in self.part(block, path)]
        if parts or len(rest) == len(blocks):
            self.chat.add_user(parts)

    def _result(self, block: Json, path: str) -> None:
        ident, content = _field(block, "tool_use_id", str, path), block.get("content")
        parts = [] if content is None else self.parts(content, f"{path}.content")
        self.chat.add_result(unwrap_id(ident), parts, block.get("is_error") is True)

    def parts(self, content: Any, path: str) -> List[Json]:
        return [part for at, block in _blocks(content, path) for part in self.part(block, at)]

    def part(self, block: Json, path: str) -> List[Json]:
        """A block outside of an assistant's message as parts of Chat's."""
        kind = block.get("type")
        reader = _PART_READERS.get(kind) if isinstance(kind, str) else None
        if reader:
            return reader(self, block, path)
        if isinstance(kind, str) and kind.endswith("_tool_result"):      # of a server tool
            return _text_parts(_readable(block.get("content")))
        self.skipped.append(str(kind))
        return []

    def image(self, block: Json, path: str) -> List[Json]:
        source, path = _field(block, "source", dict, path), f"{path}.source"
        if source.get("type") == "base64":
            return [image_part(_base64_data(source, IMAGE_TYPES, path), self.profile)]
        if source.get("type") == "url":
            return [image_part(_field(source, "url", str, path), self.profile)]
        raise BadRequest(f"{path}: an image must be given as 'base64' or 'url'; "
                         "there is no file store here")

    def document(self, block: Json, path: str) -> List[Json]:
        source, path = _field(block, "source", dict, path), f"{path}.source"
        kind, title = source.get("type"), block.get("title")
        if kind in ("text", "content"):
            inner = [text_part(_field(source, "data", str, path))] if kind == "text" else (
                self.parts(source.get("content"), f"{path}.content"))
            return _enclosed("document", block, ("title", "context"), inner)
        if kind != "base64":
            raise BadRequest(f"{path}: a document must be given as 'base64', 'text' or 'content'; "
                             "none is fetched here")
        data = _base64_data(source, ("application/pdf",), path)
        name = title if isinstance(title, str) and title else "document.pdf"
        if not self.profile["files"]:    # no 400: it would come again with each later request
            return [text_part(NO_PDF.format(name))]
        return [{"type": "file", "file": {"filename": name, "file_data": data}}]

    def search_result(self, block: Json, path: str) -> List[Json]:
        inner = self.parts(block.get("content") or [], f"{path}.content")
        return _enclosed("search_result", block, ("source", "title"), inner)

    def call_of_user(self, block: Json, path: str) -> List[Json]:
        """A call in a user's message becomes text: no tool message could follow it."""
        name = _field(block, "name", str, path)
        return [text_part(f"[call of {name} {dump_text(block.get('input') or {})}]")]

    def misplaced_result(self, block: Json, path: str) -> List[Json]:
        """A result where none can stand, in an assistant's message or a document."""
        content = block.get("content")
        head = text_part(f"[result of tool call {unwrap_id(str(block.get('tool_use_id')))}]")
        return [head, *([] if content is None else self.parts(content, f"{path}.content"))]


#: Blocks of users, tool results and documents.
_PART_READERS: Dict[str, Callable[[_MessagesHistory, Json, str], List[Json]]] = {
    "text": lambda history, block, path: _text_parts(_field(block, "text", str, path)),
    "tool_reference": lambda history, block, path: [
        text_part(f"Tool {_field(block, 'tool_name', str, path)} is available now.")],
    "browser_state": lambda history, block, path: [
        text_part(f"Open tabs:\n{tabs}") for tabs in [_readable(block.get("tabs"))] if tabs],
    "container_upload": lambda history, block, path: [
        text_part(f"[uploaded file {block.get('file_id')}]")],
    "compaction": lambda history, block, path: _text_parts(_readable(block.get("content"))),
    "image": _MessagesHistory.image, "document": _MessagesHistory.document,
    "search_result": _MessagesHistory.search_result, "tool_use": _MessagesHistory.call_of_user,
    "tool_result": _MessagesHistory.misplaced_result}


class _AssistantTurn:
    """What an assistant said; texts that only citations cut apart are glued."""

    def __init__(self, history: _MessagesHistory, blocks: Sequence[Tuple[str, Json]]) -> None:
        self.history = history
        self.texts: List[str] = []
        self.thoughts: List[str] = []
        self.carriers: List[Json] = []
        self.calls: List[Json] = []
        self.ids: Dict[str, None] = {}            #: of the calls, as the client knows them
        self.labels: Dict[str, str] = {}          #: server tool call -> its name
        glued: List[str] = []                     #: neighbouring text blocks
        for path, block in [*blocks, ("", {"type": "fallback"})]:
            kind = str(block.get("type"))
            if kind == "text":
                glued.append(_field(block, "text", str, path))
                continue
            self.texts.append("".join(glued))
            glued = []
            reader = _ASSISTANT_READERS.get(kind)
            if reader is None:
                reader = _AssistantTurn.server_result if kind.endswith("_tool_result") else (
                    _AssistantTurn.other)
            reader(self, block, path)

    def thinking(self, block: Json, path: str) -> None:
        state = read_signature(block.get("signature"))
        thought = block.get("thinking") or state.get("text")
        if isinstance(thought, str):
            self.thoughts.append(thought)
        self.carriers.append(state)

    def tool_use(self, block: Json, path: str) -> None:
        ident, name = _field(block, "id", str, path), _field(block, "name", str, path)
        given = {} if block.get("input") is None else _field(block, "input", dict, path)
        if ident in self.ids:
            raise BadRequest(f"{path}.id: `tool_use` ids must be unique")
        self.ids[ident] = None
        self.history.ids.add(ident)
        self.carriers.append(carrier_of_id(ident))
        self.calls.append(chat_call(unwrap_id(ident), short_name(name), dump_text(given)))

    def server_call(self, block: Json, path: str) -> None:
        """No tool call: its result stands in this same message, so no tool message would follow."""
        label = ".".join(str(block[name]) for name in ("server_name", "name") if block.get(name))
        self.labels[str(block.get("id"))] = label
        self.texts.append(f"[{label} {dump_text(block.get('input') or {})}]")

    def server_result(self, block: Json, path: str) -> None:
        label = self.labels.get(str(block.get("tool_use_id")))
        label = label or str(block["type"]).replace("_tool_result", "")
        outcome = "error" if block.get("is_error") is True else "results"
        self.texts.append(f"[{label} {outcome}]\n{_readable(block.get('content'))}".rstrip())

    def other(self, block: Json, path: str) -> None:
        self.texts += [part["text"] if part["type"] == "text" else f"[{block['type']}]"
                       for part in self.history.part(block, path)]

    def dropped(self, block: Json, path: str) -> None:
        """Opaque, or of no meaning to another model."""


_ASSISTANT_READERS: Dict[str, Callable[[_AssistantTurn, Json, str], None]] = {
    "thinking": _AssistantTurn.thinking, "tool_use": _AssistantTurn.tool_use,
    "server_tool_use": _AssistantTurn.server_call, "mcp_tool_use": _AssistantTurn.server_call,
    "redacted_thinking": _AssistantTurn.dropped, "mcp_tool_listing": _AssistantTurn.dropped,
    "fallback": _AssistantTurn.dropped}


# --- the request: its tools

_EDITS = ("view", "create", "str_replace", "insert")
_EDITING = {"file_text": "string", "old_str": "string", "new_str": "string",
            "insert_line": "integer", "insert_text": "string",
            "view_range": {"type": "array", "items": {"type": "integer"}}}

#: Tools the client runs and whose schema only Claude knows by heart: description, schema.
_CLIENT_TOOLS: Dict[str, Tuple[str, Json]] = {
    "bash": ("Run a command in a persistent bash session; `restart` starts a new one.",
             object_schema([], command="string", restart="boolean")),
    "text_editor": (
        "View, create and edit text files. `old_str` must occur exactly once; `insert_line` 0 is "
        "the top.",
        object_schema(["command", "path"], command=_EDITS, path="string", **_EDITING)),
    "memory": (
        "Read and keep notes in files under /memories, which outlive this conversation.",
        object_schema(["command"], command=_EDITS + ("delete", "rename"), path="string",
                      old_path="string", new_path="string", **_EDITING))}
_CLIENT_TOOL = Pattern(r"(bash|text_editor|memory)_(\d{8})")

#: Until then the editor could take an edit back.
_UNDO_ENDS = 20250429

_TOOL_NAME = Pattern(r"[a-zA-Z0-9_-]{1,128}")

#: Tools Anthropic's servers run; profile["server_tools"] says what becomes of them, by these names.
SERVER_TOOLS = ("web_search", "web_fetch", "code_execution", "tool_search_tool", "advisor",
                "mcp_toolset")

#: Entries that stand for a family of tools whose definitions are not in the request.
TOOLSETS = ("computer_toolset", "browser_toolset")


class _Tools:
    """The request's tools as Chat's; `names` maps shortened names back."""

    def __init__(self, profile: Json, tools: Sequence[Any]) -> None:
        self.profile = profile
        self.chat = KnownTools()
        self.fields: Json = {}           #: what switches the provider's own tools on beside `tools`
        self.missing: List[str] = []              #: tools that can't be run here
        self.names: Dict[str, str] = {}
        self.known: Dict[str, bool] = {}     #: name -> whether the model may be made to call it
        for i, tool in enumerate(tools):
            self._add(tool, f"tools.{i}")

    def _add(self, tool: Any, path: str) -> None:
        if not isinstance(tool, dict):
            raise BadRequest(f"{path}: Input should be a valid dictionary")
        kind = str(tool.get("type") or "custom")
        if kind.startswith(TOOLSETS):
            raise BadRequest(f"{path}.type: {kind} is not supported here; "
                             "name the tools one by one")
        client = _CLIENT_TOOL.fullmatch(kind)
        served = not client and (
            kind.startswith(SERVER_TOOLS) or kind != "custom" and "input_schema" not in tool)
        name = "" if kind == "mcp_toolset" else _field(tool, "name", str, path)
        if not served and not name:
            raise BadRequest(f"{path}.name: String should have at least 1 character")
        if not served and not _TOOL_NAME.fullmatch(name):
            raise BadRequest(f"{path}.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'")
        if name and name in self.known:
            raise BadRequest(f"tools: Tool names must be unique; {name!r} is there twice")
        if name == PLACEHOLDER_TOOL:
            return
        self.known[name] = not served
        if served:
            self._server(tool, kind, path)
        else:
            function = self._client(*client.groups()) if client else self._custom(tool, path)
            short = short_name(name)
            self.names[short] = name
            self.chat.append({"type": "function", "function": {"name": short, **function}})

    @staticmethod
    def _client(kind: str, version: str) -> Json:
        description, schema = _CLIENT_TOOLS[kind]
        if kind == "text_editor" and int(version) < _UNDO_ENDS:
            command = {"type": "string", "enum": [*_EDITS, "undo_edit"]}
            schema = {**schema, "properties": {**schema["properties"], "command": command}}
        return {"description": description, "parameters": schema}

    def _custom(self, tool: Json, path: str) -> Json:
        schema = tool.get("input_schema")
        schema = {} if schema is None else _field(tool, "input_schema", dict, path)
        function: Json = {"parameters": function_schema(schema)}
        if isinstance(tool.get("description"), str):
            function["description"] = tool["description"]
        if isinstance(tool.get("strict"), bool) and self.profile["strict_tools"]:
            function["strict"] = tool["strict"]
        return function

    def _server(self, tool: Json, kind: str, path: str) -> None:
        if self.profile["server_tools"] == "error":
            raise BadRequest(f"{path}.type: {kind} runs on Anthropic's servers and is not "
                             "available here")
        family = family_of(kind, SERVER_TOOLS)
        native = provider_tool(self.profile, family)
        if not native:
            if family not in ("tool_search_tool", "mcp_toolset"):      # all tools are listed anyway
                self.missing.append(str(tool.get("name")))
        elif isinstance(native.get("fields"), dict):
            self.fields.update(native["fields"])
        else:
            self.chat.append(native)

    def choice(self, choice: Any) -> Json:
        """Chat's fields for `tool_choice`."""
        if choice is None or not self.chat:
            return {}
        kind = object_of(choice).get("type")
        if kind not in ("auto", "any", "tool", "none"):
            raise BadRequest("tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'")
        chosen: Any = kind if kind in ("auto", "none") else "auto"
        if kind == "any" and any(self.known.values()):
            chosen = "required"
        if kind == "tool":
            name = _field(choice, "name", str, "tool_choice")
            if name not in self.known:
                raise BadRequest(f"tool_choice.name: Tool {name!r} not found in provided tools")
            if self.known[name]:
                chosen = {"type": "function", "function": {"name": short_name(name)}}
        one_at_a_time = choice.get("disable_parallel_tool_use") is True
        return {"tool_choice": chosen,
                **({"parallel_tool_calls": False} if one_at_a_time else {})}


# --- the request as a whole

_USER_ID = Pattern(r"[A-Za-z0-9_-]{1,64}")
_THINKING = {"enabled": True, "adaptive": True, "between_tools": True, "disabled": False}
_COPIED = {"temperature": "number", "top_p": "number", "top_k": "integer"}


def _max_tokens(body: Json) -> int:
    value = body.get("max_tokens")
    if value is None:
        raise BadRequest("max_tokens: Field required")
    whole = isinstance(value, int) or isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not whole:
        raise BadRequest("max_tokens: Input should be a valid integer")
    if value < 0:
        raise BadRequest("max_tokens: Input should be greater than or equal to 0")
    return int(value)


#: Fields that only Anthropic's servers can honour; silence would change the answer.  The tool
#: runners of its SDKs send `thread`, and go on with the whole history when they read the details.
_REFUSED = {"thread": ("history kept on the server",
                       {"error_code": "thread_unsupported_request", "unsupported": []}),
            "compaction": ("compaction on the server", None),
            "mcp_servers": ("calling MCP servers", None)}


def _refuse(body: Json) -> None:
    for name, (why, details) in _REFUSED.items():
        if body.get(name):
            raise BadRequest(f"{name}: {why} is not available here", details=details)


def _stop_sequences(body: Json) -> List[str]:
    given = _optional(body, "stop_sequences", list) or []
    if not all(isinstance(text, str) and text.strip() for text in given):
        raise BadRequest("stop_sequences: each stop sequence must contain non-whitespace")
    return given


def _sampling(body: Json) -> Json:
    fields: Json = {}
    for name, noun in _COPIED.items():
        value = body.get(name)
        if isinstance(value, bool) or not isinstance(
                value, (int, float if noun == "number" else int, type(None))):
            raise BadRequest(f"{name}: Input should be a valid {noun}")
        if value is not None:
            fields[name] = value
    return fields


def _schema_format(config: Json, body: Json) -> Json:
    """Chat's response_format, as a field."""
    wish = config.get("format") or body.get("output_format")
    if wish is None:
        return {}
    if not isinstance(wish, dict) or wish.get("type") != "json_schema":
        raise BadRequest("output_config.format.type: Input should be 'json_schema'")
    schema = _field(wish, "schema", dict, "output_config.format")
    named = {"name": "output", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _user_of(body: Json) -> Json:
    """Chat's `user`, as a field; Claude Code's is a JSON document, too long for most."""
    user = object_of(body.get("metadata")).get("user_id")
    if not isinstance(user, str) or not user:
        return {}
    if not _USER_ID.fullmatch(user):
        user = sha256(user).hex()
    return {"user": user}


class KnownTurn(NamedTuple):
    """What a request became, so that the next one need not convert the same objects again."""
    profile: Json
    thinking: Optional[bool]
    system: Optional[Json]
    tools_given: Any
    tools: _Tools
    rounds: Sequence[_Round]


class MessagesTurn(Turn):
    """One Messages request.

    `hide_reasoning` (set by the dialect): no thinking blocks; reasoning is text only where there is
    nothing else.
    """

    def __init__(self, body: Json, profile: Json, model: str,
                 known: Optional[KnownTurn] = None) -> None:
        _refuse(body)
        self.body, self.profile = body, profile
        self.model = body["model"] if isinstance(body.get("model"), str) else model
        self.max_tokens = _max_tokens(body)
        self.stop_sequences = _stop_sequences(body)
        self.hide_reasoning = self.omit_thinking = False
        thinking, budget = self._thinking()
        if known and (known.profile, known.thinking) != (profile, thinking):
            known = None
        history = _MessagesHistory(profile, thinking)
        history.read(body.get("messages"), known.rounds if known else ())
        self.ids, self.skipped = history.ids, history.skipped
        system, tools = self._system(history.chat.leading, known), self._tools(known)
        self.names = tools.names
        self.known = KnownTurn(profile, thinking, system, body.get("tools"), tools, history.rounds)
        chat = self._to_chat(model, [*([system] if system else []), *history.chat.messages], tools)
        effort = history.effort or self._config.get("effort")
        self.wants_json = "response_format" in chat
        self.chat = finish_chat(chat, profile, Wishes(
            thinking, budget, effort if isinstance(effort, str) else None, tools.missing))

    @property
    def _config(self) -> Json:
        return _optional(self.body, "output_config", dict) or {}

    def _system(self, leading: Sequence[str], known: Optional[KnownTurn]) -> Optional[Json]:
        """The first message, where there are system texts."""
        given = self.body.get("system")
        if isinstance(given, str) and given.startswith(BILLING_HEADER):
            given = given.partition("\n")[2]
        top = "" if given is None else _system_text(_blocks(given, "system"))
        text = "\n\n".join(filter(None, [top, *leading]))
        if known and known.system and known.system["content"] == text:
            return known.system
        return KnownMessage(role="system", content=text) if text else None

    def _tools(self, known: Optional[KnownTurn]) -> _Tools:
        given = _optional(self.body, "tools", list) or []
        if known and _are_same(known.tools_given, given):
            return known.tools
        return _Tools(self.profile, given)

    def _to_chat(self, model: str, messages: List[Json], tools: _Tools) -> Json:
        """The chat request in OpenAI's words."""
        body = self.body
        chat: Json = {"model": model, "messages": messages, "max_tokens": self.max_tokens,
                      **_sampling(body), **_user_of(body), **_schema_format(self._config, body)}
        switch = self.profile["prefill"]
        if switch and body["messages"][-1]["role"] == messages[-1]["role"] == "assistant":
            if switch == "continue_final_message":
                chat.update(continue_final_message=True, add_generation_prompt=False)
            else:
                messages[-1][switch] = True
        if self.stop_sequences:
            chat["stop"] = self.stop_sequences[:STOP_LIMIT]
        if body.get("stream") is True:
            chat["stream"] = True
        if tools.chat:
            chat["tools"] = tools.chat
        chat.update(tools.fields)
        chat.update(tools.choice(body.get("tool_choice")))
        return chat

    def _thinking(self) -> Tuple[Optional[bool], Optional[int]]:
        """Whether the client wants thinking (None: it does not say), and its budget."""
        wish = _optional(self.body, "thinking", dict)
        if wish is None:
            return None, None
        if str(wish.get("type")) not in _THINKING:
            raise BadRequest("thinking.type: Input should be "
                             + ", ".join(repr(name) for name in _THINKING))
        self.omit_thinking = wish.get("display") in HIDDEN_DISPLAYS
        budget = wish.get("budget_tokens")
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
            raise BadRequest("thinking.enabled.budget_tokens: Input should be a valid integer")
        return _THINKING[wish["type"]], budget

    def stream(self, new_id: Callable[[str], str]) -> MessagesStream:
        return MessagesStream(self, new_id)


def count_message_tokens(body: Json) -> int:
    """About how many tokens a Messages request (with or without max_tokens) takes; BadRequest."""
    body = {**body, "max_tokens": 1, "compaction": None}         # counted as it was sent
    return MessagesTurn(body, DEFAULT_PROFILE, "").raw_estimate


# --- tool arguments

def partial_object(text: str) -> Json:
    """As much as can be read of an object that was cut off by the length limit."""
    closers, tail, scan = "", "", re.compile(r'"(?:[^"\\]|\\.)*"|["{}\[\],]', re.S)
    cuts: Deque[Tuple[int, str]] = deque(maxlen=4)       # more are not tried
    for found in scan.finditer(text):
        mark = found.group()
        if mark == '"':                            # a string without an end
            tail = '"'
            break
        if mark in ("{", "["):
            closers = ("}" if mark == "{" else "]") + closers
            if len(closers) > 500:       # some Pythons can read it, but not write it
                return {}
            cuts.append((found.end(), closers))
        elif mark in ("}", "]"):
            closers = closers[1:]
        elif mark == ",":
            cuts.append((found.start(), closers))
    for end, closing in [(len(text), tail + closers), *reversed(cuts)]:
        try:
            value = _DECODER.decode(text[:end] + closing)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}


# --- the answer

class MessagesStream(AnswerWriter):
    """Chat chunks in, Messages events out. At most one block is open; indexes rise by one.

    Of several calls one is active and streams live, the others wait; what a model says while a call
    is incomplete is kept back until the calls are done.
    """

    def __init__(self, turn: MessagesTurn, new_id: Callable[[str], str]) -> None:
        def call_id(source: str) -> str:
            if not source:
                return new_id("toolu_")
            return source if _LEGAL_ID.fullmatch(source) else wrap_id(new_id("toolu_"), source)

        super().__init__(AnswerReader(turn.profile, ToolCalls(call_id, turn.ids),
                                      turn.stop_sequences[STOP_LIMIT:], turn.wants_json), turn)
        self._new_id, self._id = new_id, new_id("msg_")
        self._calls: List[ToolCall] = []
        self._active = 0                 #: the first call that is not closed
        self._live: Optional[ToolCall] = None    #: the open one, as long as no other waits
        self._settled = 0                #: how many calls have come whole and were begun
        self._stop_sequence: Optional[str] = None
        self._started = self._spoke = self._refused = False
        self._index, self._open = -1, ""  #: of the latest block; the type of the open one
        self._blanks: List[str] = []     #: that wait for a visible character
        self._hidden: List[str] = []     #: reasoning that becomes text only if nothing else comes
        self._thought: List[str] = []    #: reasoning that only the signature carries
        self._details = Details()        #: of the open thinking block
        self._held: List[Part] = []      #: said while a call was incomplete

    def feed(self, chunk: Json) -> Iterable[Json]:
        parts = self.reader.feed(chunk)
        if self.turn.stop_sequences and self.reader.choice.get("finish_reason"):
            for name in ("stop_reason", "matched_stop"):         # vLLM, SGLang
                said = self.reader.choice.get(name)
                if isinstance(said, str) and said in self.turn.stop_sequences:
                    self._stop_sequence = said
        if len(parts) == 1 and self._open:
            kind, text, call = parts[0]
            if kind == self._open == "text":
                return (self._delta("text_delta", "text", text),)
            if call is self._live and call is not None and not self._held:
                text = call.take()
                return (self._delta("input_json_delta", "partial_json", text),) if text else ()
        return self._write(parts)

    def close(self) -> Iterator[Json]:
        yield from self._write(self.reader.close())
        yield from self._advance(last=True)
        yield from self._release()
        if self._hidden and not self._spoke:
            yield from self._text("".join(self._hidden))
        yield from self._close_block()
        reason, sequence, details = self._stop()
        yield {"type": "message_delta", "usage": self._usage(),
               "delta": {"stop_reason": reason, "stop_sequence": sequence, "stop_details": details}}
        yield {"type": "message_stop"}

    def whole(self, completion: Json) -> Json:
        """The message for a plain completion."""
        events = [*self.feed(as_chunk(completion)), *self.close()]
        return _fold(events, self.reader.cut)

    def _write(self, parts: Sequence[Part]) -> Iterator[Json]:
        if not self._started:
            yield self._message_start()
        for kind, text, more in parts:
            if kind == "call":
                if not more.seen:
                    more.seen = True
                    self._calls.append(more)
                yield from self._advance(last=False)
                last = self._active == len(self._calls) - 1
                self._live = self._calls[-1] if last and self._open == "tool_use" else None
            elif kind == "thinking":
                yield from self._thinking(text, more)
            else:
                self._refused = self._refused or kind == "refusal"
                yield from self._text(text)
        if self._held and not self._is_busy():
            yield from self._release()

    def _is_busy(self) -> bool:
        """Whether a call is still to be completed."""
        calls, self._settled = self._calls, max(self._settled, self._active)
        while self._settled < len(calls) and calls[self._settled].named and (
                calls[self._settled].complete):
            self._settled += 1
        return self._settled < len(calls)

    # the frame

    def _message_start(self) -> Json:
        self._started = True
        usage = {"input_tokens": parse_usage(self.reader.usage).prompt or self.turn.estimate,
                 "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
                 "output_tokens": 0, "service_tier": "standard"}
        return {"type": "message_start", "message": {
            "id": self._id, "type": "message", "role": "assistant",
            "model": self.turn.model, "content": [], "stop_reason": None, "stop_sequence": None,
            "stop_details": None, "usage": usage}}

    def _stop(self) -> Tuple[str, Optional[str], Optional[Json]]:
        watch, told = self.reader.watch, self._stop_sequence
        sequence = watch.hit if watch and watch.hit else told
        called = any(call.named for call in self._calls)
        reason = STOP_REASON.get(self.finish_reason or "") or ("tool_use" if called else "end_turn")
        if sequence and (reason == "end_turn" or sequence != told):
            return "stop_sequence", sequence, None
        if reason == "refusal" or reason == "end_turn" and self._refused:
            return "refusal", None, {"type": "refusal", "category": None, "explanation": None}
        return reason, None, None

    def _usage(self) -> Json:
        usage = self.usage
        counts: Json = {
            "input_tokens": max(0, usage.prompt - usage.cached - usage.cache_write),
            "cache_creation_input_tokens": usage.cache_write,
            "cache_read_input_tokens": usage.cached, "output_tokens": usage.completion}
        if usage.reasoning is not None:
            counts["output_tokens_details"] = {"thinking_tokens": usage.reasoning}
        return counts

    # blocks

    def _open_block(self, block: Json) -> Iterator[Json]:
        yield from self._close_block()
        self._index += 1
        self._open = block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _close_block(self) -> Iterator[Json]:
        if not self._open:
            return
        if self._open == "thinking":
            state = self.reader.carrier("".join(self._thought), self._details.joined())
            yield self._delta("signature_delta", "signature", make_signature(state))
            self._thought, self._details = [], Details()
        elif self._open == "tool_use":
            self._active, self._live = self._active + 1, None
        self._open = ""
        yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, kind: str, field: str, text: str) -> Json:
        return {"type": "content_block_delta", "index": self._index,
                "delta": {"type": kind, field: text}}

    def _text(self, text: str) -> Iterator[Json]:
        if not text:
            return
        if self._open != "text":
            if self._is_busy():
                self._held.append(("text", text, None))
                return
            if text.isspace():           # dropped if nothing visible follows
                self._blanks.append(text)
                return
            text, self._blanks, self._spoke = "".join((*self._blanks, text)), [], True
            yield from self._open_block({"type": "text", "text": ""})
        yield self._delta("text_delta", "text", text)

    def _thinking(self, text: str, details: Any) -> Iterator[Json]:
        if self.turn.hide_reasoning:
            if not self._spoke:
                self._hidden.append(text)
            return
        if self._is_busy():
            self._held.append(("thinking", text, details))
            return
        if self._open != "thinking":
            yield from self._open_block({"type": "thinking", "thinking": "", "signature": ""})
        self._details.add(details)
        if self.turn.omit_thinking:
            self._thought.append(text)
        elif text:
            yield self._delta("thinking_delta", "thinking", text)

    def _release(self) -> Iterator[Json]:
        """What was said while a call was incomplete."""
        held, self._held = self._held, []
        for kind, text, details in held:
            yield from self._text(text) if kind == "text" else self._thinking(text, details)

    def _advance(self, last: bool) -> Iterator[Json]:
        """Send what can be sent of the active call; go on to the next one when it is complete."""
        while self._active < len(self._calls):
            call, more = self._calls[self._active], self._active + 1 < len(self._calls)
            if last and not call.name:   # it never got one
                self._active += 1
                continue
            if not call.named:
                if not call.name or not (call.begun or more or last):
                    return
                self._blanks, self._spoke, call.named = [], True, True
                name = self.turn.names.get(call.name, call.name)
                if call.extras:
                    carrier = dump_text(self.reader.carrier(calls=[call]))
                    call.id = wrap_id(self._new_id("toolu_"), carrier)
                yield from self._open_block({"type": "tool_use", "id": call.id, "name": name,
                                             "input": {}})
            text = call.take(last, self.reader.cut)
            if text:
                text = dump_text(parse_arguments(text)) if call.odd else text
                yield self._delta("input_json_delta", "partial_json", text)
            if not last and not (more and call.complete):
                return
            yield from self._close_block()


def _fold(events: Iterable[Json], cut: bool) -> Json:
    """The message that a stream of events amounts to; `cut`: its last call may be incomplete."""
    message: Json = {}
    texts: List[str] = []
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            message = event["message"]
        elif kind == "content_block_start":
            message["content"].append(dict(event["content_block"]))
            texts = []
        elif kind == "content_block_delta":
            name, text = list(event["delta"].items())[1]
            if name == "signature":
                message["content"][-1]["signature"] = text
            else:
                texts.append(text)
        elif kind == "content_block_stop":
            _fill(message["content"][-1], "".join(texts), cut)
        elif kind == "message_delta":
            message.update(event["delta"])
            message["usage"].update(event["usage"])
    return message


def _fill(block: Json, text: str, cut: bool) -> None:
    if block["type"] == "tool_use":
        block["input"] = parse_arguments(text)
        if cut and "INVALID_JSON" in block["input"]:
            block["input"] = partial_object(text)
    else:                                # no `citations`: @ai-sdk/anthropic 3.0 refuses null there
        block[block["type"]] = text


# --- errors

def overflow_text(overflow: Sequence[int]) -> str:
    """The two sentences Claude Code acts on: it shrinks max_tokens where the prompt fits, else it
    compacts.
    """
    prompt, limit, output = (*overflow, 0)[:3]
    limit = limit or max(0, prompt - 1)
    if output and 0 < prompt < limit:
        return (f"input length and `max_tokens` exceed context limit: {prompt} + {output} > "
                f"{limit}, decrease input length or `max_tokens` and try again")
    return f"prompt is too long: {max(prompt, limit + 1)} tokens > {limit} maximum"


def messages_status(status: int) -> int:
    """The HTTP status in Anthropic's vocabulary."""
    return {422: 400, 408: 504, 503: 529}.get(status, status)


def messages_error(exc: GatewayError, request_id: str) -> Json:
    """The error body; the status beside it is messages_status(exc.status), 400 for an overflow."""
    status, message = messages_status(exc.status), exc.message
    if exc.overflow is not None:
        status, message = 400, overflow_text(exc.overflow)
    kind = MESSAGES_ERROR_TYPE.get(status) or (
        "api_error" if status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": message, **non_empty(details=exc.details)}
    return {"type": "error", "error": error, "request_id": request_id}


# === 9. OpenAI Responses (pure) ==============================================
#
# The rules and their sources: openai-responses.md; what Codex does with an answer: clients.md.

#: Types of the fields that are not null.
_FIELD_TYPES: Dict[str, Tuple[type, ...]] = {
    "instructions": (str,), "previous_response_id": (str,), "truncation": (str,), "tools": (list,),
    "include": (list,), "metadata": (dict,), "text": (dict,), "reasoning": (dict,),
    "store": (bool,), "stream": (bool,), "parallel_tool_calls": (bool,),
    "temperature": (int, float), "top_p": (int, float), "max_output_tokens": (int,)}

#: What needs a service that we do not have: a 400 is better than an answer that ignores it.
_REFUSED_FIELDS = {
    "conversation": "conversations are not kept here: send the items in `input`, or use "
                    "`previous_response_id`",
    "background": "background responses are not available here: leave `background` out",
    "prompt": "stored prompts are not available here: send `instructions` and `input`"}

_FOREIGN_SUMMARY = (
    "the `compaction` item was made by another service, or with a key we no longer have: it can't "
    "be read here; start a new conversation")
_SUMMARY_HEAD = "Summary of the conversation so far:\n\n"
_SUMMARISE = (
    "Summarise our conversation so that somebody who has not seen it can carry on at once. Say "
    "what the user wants and every constraint they gave, what was decided and why, what has been "
    "done (files, commands, results), what is still open, and the next step. Keep names, paths, "
    "numbers and code that will be needed word for word. Call no tool; answer with the summary and "
    "nothing else.")


# --- the reasoning carrier ---

class Seal:
    """Encrypts the reasoning and summaries that are stored at the client."""
    PREFIX = "if2a1."                    #: marks our own, and the version of the format

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(key, b"iflow2api seal 1: ")

    def encrypt(self, value: Json) -> str:
        return self.PREFIX + encode_base64(self._cipher.encrypt(zlib.compress(dump_json(value))))

    def decrypt(self, text: Any) -> Optional[Json]:
        """What was encrypted, or None: another service's, another key's, or damaged."""
        if not isinstance(text, str) or not text.startswith(self.PREFIX):
            return None
        data = decode_base64(text[len(self.PREFIX):])
        plain = None if data is None else self._cipher.decrypt(data)
        return None if plain is None else json.loads(zlib.decompress(plain))


# --- tools ---

class _Tool(NamedTuple):
    """A tool as the client knows it."""
    kind: str
    name: str
    namespace: Optional[str] = None

    @property
    def flat(self) -> str:
        """A name as Chat allows it: letters, digits, _ and -, no more than 64."""
        return short_name(_plain(
            f"{self.namespace}__{self.name}" if self.namespace else self.name))


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


class _Kind(NamedTuple):
    """How calls of one kind of tool are written in Responses."""
    call: str                            #: item type of the call …
    output: str                          #: … and of its output
    prefix: str                          #: of the call's item id
    field: str                           #: which holds the arguments
    events: Optional[str] = None         #: stem of its delta events; None: the item comes whole


_TOOL_KINDS = {
    "function": _Kind("function_call", "function_call_output", "fc_", "arguments",
                      "function_call_arguments"),
    "custom": _Kind("custom_tool_call", "custom_tool_call_output", "ctc_", "input",
                    "custom_tool_call_input"),
    "local_shell": _Kind("local_shell_call", "local_shell_call_output", "lsh_", "action"),
    "tool_search": _Kind("tool_search_call", "tool_search_output", "tsc_", "arguments"),
}
_KIND_OF_CALL = {kind.call: name for name, kind in _TOOL_KINDS.items()}
_OUTPUTS = {kind.output for kind in _TOOL_KINDS.values()}

#: Tools whose schema is not on the wire: OpenAI's models know them by heart, others do not.
_FIXED_TOOLS: Dict[str, Tuple[str, Json]] = {
    "local_shell": (
        "Runs a program on the user's machine and returns its output. `command` is the program and "
        "its arguments, for example [\"bash\", \"-lc\", \"ls -la\"].",
        object_schema(["command"], command={"type": "array", "items": {"type": "string"}},
                      working_directory="string", timeout_ms="integer",
                      env={"type": "object", "additionalProperties": {"type": "string"}})),
    "tool_search": (
        "Searches for more tools; those it finds can be called from then on.",
        object_schema(["query"], query="string", limit="integer")),
}

#: Families of tools that OpenAI runs itself; types may have a version at the end
#: (web_search_preview_2025_03_11).
_SERVER_FAMILIES = ("web_search", "file_search", "code_interpreter", "image_generation", "mcp",
                    "computer", "programmatic_tool_calling")


def _describe(tool: Json) -> Json:
    """description and parameters of the function that stands for `tool`."""
    description, parameters = tool.get("description"), tool.get("parameters")
    if tool["type"] == "custom":
        parameters, form = object_schema(["input"], input="string"), tool.get("format")
        if isinstance(form, dict) and form.get("type") == "grammar":
            grammar = (f"The input must match this {form.get('syntax')} grammar:\n"
                       f"{form.get('definition')}")
            description = f"{description}\n\n{grammar}" if description else grammar
    elif tool["type"] in _FIXED_TOOLS:
        standard = _FIXED_TOOLS[tool["type"]]
        description, parameters = description or standard[0], parameters or standard[1]
    return {**non_empty(description=description),
            "parameters": function_schema(object_of(parameters))}


class _ResponseTools:
    """The request's tools, and the names they have in Chat."""

    def __init__(self, profile: Json) -> None:
        self._profile = profile
        self.missing: List[str] = []         #: types of tools that can't be run here
        self._names: Dict[_Tool, str] = {}
        self._tools: Dict[str, _Tool] = {}
        self._chat: Dict[str, Json] = {}     #: by Chat's name
        self._native: Dict[str, Json] = {}   #: by family
        self._bare: Dict[str, Set[str]] = {}     #: a name without namespace -> those it may mean

    def add(self, tools: Any, namespace: Optional[str] = None) -> None:
        for tool in _objects(tools, "tools"):
            kind = str(tool.get("type"))
            if kind == "namespace":
                self.add(tool.get("tools"), _required(tool, "name", "tools"))
            elif kind in ("function", "custom"):
                self._define(_Tool(kind, _required(tool, "name", "tools"), namespace), tool)
            elif kind == "local_shell" or kind == "tool_search" and (
                    tool.get("execution") == "client"):
                self._define(_Tool(kind, kind), tool)
            elif kind != "tool_search":          # the server's own search: all are listed anyway
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
        return (self._alike(tool.name) if not tool.namespace else "") or tool.flat

    def tool(self, name: str) -> _Tool:
        """What the client calls the function `name`."""
        return self._tools.get(name) or self._tools.get(self._alike(name)) or (
            _Tool("function", name))

    def offers(self, name: str) -> bool:
        """Whether the client has a function that the model means by `name`."""
        return name in self._tools or bool(self._alike(name))

    def listed(self) -> List[Json]:
        return [*self._chat.values(),
                *(tool for tool in self._native.values() if "fields" not in tool)]

    def fields(self) -> Json:
        """What switches the provider's own tools on beside `tools`."""
        return {name: value for tool in self._native.values()
                for name, value in tool.get("fields", {}).items()}

    def choose(self, choice: Any) -> Any:
        """tool_choice for Chat; `allowed_tools` shortens the list."""
        if choice is None or choice in ("none", "auto", "required"):
            return choice
        if not isinstance(choice, dict):
            raise _bad(f"`tool_choice` {choice!r} is unknown", "tool_choice")
        if choice.get("type") == "allowed_tools":
            self._allow(_objects(choice.get("tools"), "tool_choice"))
            return choice.get("mode") or "auto"
        name = self._named(choice)
        if name in self._chat:
            return {"type": "function", "function": {"name": name}}
        if choice.get("type") in ("function", "custom"):
            raise _bad("`tool_choice` names a tool that is not in `tools`: "
                       f"{choice.get('name')!r}", "tool_choice")
        return "auto"                        # a tool of OpenAI's own

    def _allow(self, allowed: List[Json]) -> None:
        """Keep only these; all, where none of them is known here (a connector's, say)."""
        names = {self._named(tool) for tool in allowed}
        spaces = {label for tool in allowed if tool.get("type") in ("namespace", "mcp")
                  for label in (str(tool.get("name")), f"mcp__{tool.get('server_label')}")}
        names |= {name for tool, name in self._names.items()
                  if tool.namespace and tool.namespace in spaces}
        families = {family_of(str(tool.get("type")), _SERVER_FAMILIES) for tool in allowed}
        chat = {name: tool for name, tool in self._chat.items() if name in names}
        native = {family: tool for family, tool in self._native.items() if family in families}
        if chat or native:
            self._chat, self._native = chat, native

    def _named(self, tool: Json) -> Optional[str]:
        kind, namespace = str(tool.get("type")), tool.get("namespace")
        if kind in ("function", "custom"):
            return self.name(_Tool(kind, _required(tool, "name", "tool_choice"),
                                   str(namespace) if namespace else None))
        return self._names.get(_Tool(kind, kind))

    def _define(self, key: _Tool, tool: Json) -> None:
        name = self._names.get(key) or key.flat
        if self._tools.get(name, key) != key:    # `a__b` and `b` of namespace `a`
            name = f"{name[:55]}_{sha256(repr(tuple(key))).hex()[:8]}"
        function = {"name": name, **_describe(tool)}
        strict = tool.get("strict")
        if strict is not None and key.kind == "function" and self._profile["strict_tools"]:
            function["strict"] = strict
        self._names[key], self._tools[name] = name, key
        for bare in (key.name, _plain(key.name)):
            self._bare.setdefault(bare, set()).add(name)
        self._chat[name] = {"type": "function", "function": function}

    def _serve(self, kind: str) -> None:
        family = family_of(kind, _SERVER_FAMILIES)
        native = provider_tool(self._profile, family)
        if self._profile["server_tools"] == "error":
            raise _bad(f"tools of type `{kind}` are not available here", "tools",
                       "unsupported_value")
        if native:
            self._native[family] = native
        elif family not in ("mcp", "programmatic_tool_calling") and family not in self.missing:
            self.missing.append(family)

    def _alike(self, name: str) -> str:
        """The one tool of that bare name in whatever namespace: models, and Codex in `functions`,
        leave that out.
        """
        found = self._bare.get(name, ())
        return next(iter(found)) if len(found) == 1 else ""


# --- request: items ---

def _bad(message: str, param: str, code: str = "invalid_value") -> BadRequest:
    return BadRequest(message, param=param, code=code)


def _objects(value: Any, param: str) -> List[Json]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise _bad(f"`{param}` must be a list of objects", param, "invalid_type")
    return value


def _required(value: Json, field: str, param: str) -> str:
    found = value.get(field)
    if not isinstance(found, str) or not found:
        raise _bad(f"`{field}` is missing in an entry of `{param}`", param,
                   "missing_required_parameter")
    return found


def _check_fields(body: Json) -> None:
    for field, types in _FIELD_TYPES.items():
        value = body.get(field)
        is_wrong = not isinstance(value, types) or isinstance(value, bool) and bool not in types
        if value is not None and is_wrong:
            raise _bad(f"`{field}` has the wrong type", field, "invalid_type")
    if body.get("conversation") and body.get("previous_response_id"):
        raise _bad("`previous_response_id` and `conversation` exclude each other",
                   "previous_response_id", "mutually_exclusive_parameters")
    for field, sentence in _REFUSED_FIELDS.items():
        if body.get(field):
            raise _bad(sentence, field, "unsupported_parameter")
    if body.get("max_output_tokens") is not None and body["max_output_tokens"] < 1:
        raise _bad("`max_output_tokens` must be at least 1", "max_output_tokens",
                   "integer_below_min_value")


def _kind_of(item: Json) -> Any:
    return item.get("type") or ("message" if "role" in item else "item_reference")


def _input_items(body: Json, recall: Callable[[str], Optional[List[Json]]],
                 find: Callable[[str], Optional[Json]]) -> List[Json]:
    """All items of the conversation: the stored ones, then the given ones, each with its type."""
    previous, given = body.get("previous_response_id"), body.get("input")
    if given is None and not previous:
        raise _bad("`input` is missing", "input", "missing_required_parameter")
    items = recall(previous) if previous else []
    if items is None:
        raise _bad(f"Previous response with id '{previous}' not found.", "previous_response_id",
                   "previous_response_not_found")
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    given = _objects(given, "input")
    here = {item["id"] for item in [*items, *given]
            if isinstance(item.get("id"), str) and _kind_of(item) != "item_reference"}

    def is_repeated(item: Json) -> bool:
        return _kind_of(item) == "item_reference" and isinstance(item.get("id"), str) and (
            item["id"] in here)

    return [*items, *(_typed(item, find) for item in given if not is_repeated(item))]


def _typed(item: Json, find: Callable[[str], Optional[Json]]) -> Json:
    """An item with its type; what it stands for, where it is a reference."""
    kind = _kind_of(item)
    if not isinstance(kind, str):
        raise _bad("the `type` of an item must be a string", "input", "invalid_type")
    if kind != "item_reference":
        return item if item.get("type") else {**item, "type": kind}
    found = find(_required(item, "id", "input"))
    if found is None:
        raise _bad(f"Item with id '{item['id']}' not found.", "input", "item_not_found")
    return found


# --- request: parts of a content ---

def _image_part(part: Json, profile: Json) -> Json:
    if isinstance(part.get("image_url"), dict):          # as in Chat
        part = {**part["image_url"], "image_url": part["image_url"].get("url")}
    url = part.get("image_url")
    if not isinstance(url, str):
        raise _bad("an `input_image` needs an `image_url`: files are not kept here", "input",
                   "unsupported_value")
    head, comma, data = url.partition(",")
    if head.startswith("data:") and not (comma and head.endswith(";base64") and is_base64(data)):
        raise _bad("an `image_url` that begins with data: must hold an image in base64", "input",
                   "invalid_image_url")
    return image_part(url, profile, part.get("detail"))


def _file_part(part: Json, profile: Json) -> Json:
    """A file, its text or a note in its place: a 400 would come again with each later request."""
    name, data, url = (part.get(key) if isinstance(part.get(key), str) else ""
                       for key in ("filename", "file_data", "file_url"))
    if not data and not url:
        raise _bad("an `input_file` needs `file_data`: files are not kept here", "input",
                   "unsupported_value")
    if not data:
        return text_part(f"[a file was here ({one_line(name or url)}); none is fetched by this "
                         "server: use a tool to read it]")
    if profile["files"]:
        return {"type": "file", "file": {"filename": name or "document.pdf", "file_data": data}}
    text = _text_of_file(data)
    if text is None:
        note = NO_PDF if name.endswith(".pdf") or not name else NO_PDF.replace("PDF", "file")
        return text_part(note.format(name or "document.pdf"))
    return text_part(f"File {name}:\n{text}" if name else text)


def _text_of_file(data: str) -> Optional[str]:
    """What a data URL or bare base64 says, None where it is no text: UTF-8, or what is called text.
    """
    head, _, body = data.partition(",") if data.startswith("data:") else ("data:;base64", "", data)
    try:
        raw = base64.b64decode(body) if head.endswith(";base64") else (
            urllib.parse.unquote_to_bytes(body))
        text = raw.decode("utf-8-sig", "replace" if head.startswith("data:text/") else "strict")
    except ValueError:
        return None
    return None if "\0" in text or text.startswith("%PDF-") else text


#: Type of a part -> the field with its text.  Codex' agent_message has `encrypted_content`, which
#: is plain text here.
_TEXT_FIELDS = {"input_text": "text", "output_text": "text", "text": "text",
                "summary_text": "text", "reasoning_text": "text", "refusal": "refusal",
                "encrypted_content": "encrypted_content"}
_PART_OF_KIND: Dict[str, Callable[[Json, Json], Json]] = {
    "input_image": _image_part, "image_url": _image_part, "input_file": _file_part,
    "input_audio": lambda part, profile: {"type": "input_audio",
                                          "input_audio": part.get("input_audio")}}


def _texts_of(content: Any) -> List[str]:
    """The texts of a content, which is a string or a list of parts."""
    if isinstance(content, str):
        return [content] if content else []
    texts = [part.get(_TEXT_FIELDS.get(str(part.get("type")), "")) for part in objects_of(content)]
    return [text for text in texts if isinstance(text, str) and text]


def _chat_parts(content: Any, profile: Json) -> List[Json]:
    parts: List[Json] = []
    for part in content if isinstance(content, list) else [content]:
        make = _PART_OF_KIND.get(str(part.get("type"))) if isinstance(part, dict) else None
        if make:
            parts.append(make(part, profile))
        else:
            texts = _texts_of([part] if isinstance(part, dict) else part)
            parts += map(text_part, texts)
    return parts


def _knows(parts: List[Any]) -> bool:
    """Whether any of these parts is of a kind that can be converted."""
    return any(isinstance(part, str) or isinstance(part, dict) and (
        str(part.get("type")) in {**_TEXT_FIELDS, **_PART_OF_KIND}) for part in parts)


def _check_content(content: Any) -> None:
    """BadRequest for a message of which nothing would be left; an unknown part beside others is
    passed over.
    """
    if isinstance(content, list) and content and not _knows(content):
        kind = content[0].get("type") if isinstance(content[0], dict) else content[0]
        raise _bad(f"a message can't have content of type {one_line(json.dumps(kind), 60)}",
                   "input")
    if content is not None and not isinstance(content, (str, list)):
        raise _bad("the `content` of a message must be a string or a list of parts", "input",
                   "invalid_type")


# --- request: calls and their outputs ---

def _loads(text: Any) -> Any:
    """The JSON value of `text`, decoded twice where it is a string that holds an object; None for
    what is no JSON.
    """
    try:
        value = _DECODER.decode(text)
        is_twice = isinstance(value, str) and value.lstrip().startswith("{")
        return _DECODER.decode(value) if is_twice else value
    except (ValueError, TypeError, RecursionError):
        return None


def _function_arguments(item: Json, kind: str) -> str:
    """Arguments of a call in the history; always a JSON object, since chat templates parse them."""
    value = item.get(_TOOL_KINDS[kind].field)
    if kind == "custom":
        return dump_text({"input": value if isinstance(value, str) else ""})
    if isinstance(value, str):
        parsed = _loads(value) if value.strip() not in ("", "null") else {}
        if isinstance(parsed, dict) and value.lstrip().startswith("{"):
            return value
        value = parsed if isinstance(parsed, dict) else {"INVALID_JSON": value}
    fields = value.items() if isinstance(value, dict) else ()
    return dump_text({name: given for name, given in fields
                      if given is not None and (name, given) != ("type", "exec")})


def _output_content(item: Json) -> Any:
    """The output of a call as the content of a message: a string, or parts."""
    output = item.get("output")
    if isinstance(output, str) or output is None:
        return output or ""
    if isinstance(output, list) and all(isinstance(part, dict) for part in output) and (
            _knows(output) or not output):
        return output
    return dump_text(output)


def _call_id(item: Json) -> str:
    return next((item[key] for key in ("call_id", "id") if isinstance(item.get(key), str)), "")


def _answered_id(item: Json) -> str:
    """The call an output belongs to; a local shell's has none but its own id."""
    own = item.get("id") if item["type"] == "local_shell_call_output" else None
    return _call_id({**item, "id": own})


def _is_call(item: Json) -> bool:
    return item["type"] in _KIND_OF_CALL and item.get("execution") != "server"


def _pair_outputs(items: Sequence[Json]) -> Tuple[Dict[int, Json], Set[int]]:
    """Each call's output by the call's place, and the places of outputs that belong to no call.

    Outputs stand anywhere; ids may repeat; without an id the name decides.
    """
    by_id: Dict[str, Deque[int]] = {}
    named: Dict[str, Deque[int]] = {}
    for place, item in enumerate(items):
        if not _is_call(item):
            continue
        idents = {_call_id(item)}
        if item["type"] == "local_shell_call" and isinstance(item.get("id"), str):
            idents.add(item["id"])               # its output may name either
        for ident in idents:
            by_id.setdefault(ident, deque()).append(place)
        if isinstance(item.get("name"), str):
            named.setdefault(item["name"], deque()).append(place)
    paired: Dict[int, Json] = {}
    unmatched: Set[int] = set()
    for place, item in enumerate(items):
        if item["type"] not in _OUTPUTS:
            continue
        wanted, name = _answered_id(item), item.get("name")
        calls = by_id.get(wanted) if wanted else (
            named.get(name) if isinstance(name, str) else None)
        while calls and calls[0] in paired:
            calls.popleft()
        if calls:
            paired[calls.popleft()] = item
        else:
            unmatched.add(place)
    return paired, unmatched


# --- request: the history ---

@dataclass
class _Step:
    """What is collected for one assistant message."""
    reasoning: List[str] = field(default_factory=list)
    carriers: List[Json] = field(default_factory=list)
    texts: List[str] = field(default_factory=list)
    calls: List[Json] = field(default_factory=list)
    outputs: List[Optional[Json]] = field(default_factory=list)
    is_message: bool = False


class _ItemHistory:
    """Reads input items into a ChatHistory: reasoning, texts and calls in a row are one step."""

    def __init__(self, tools: _ResponseTools, profile: Json, seal: Seal,
                 thinking: Optional[bool]) -> None:
        self.chat = ChatHistory(profile, thinking, merges=False)
        self._tools, self._profile, self._seal = tools, profile, seal
        self._step = _Step()

    def read(self, items: Sequence[Json]) -> None:
        paired, unmatched = _pair_outputs(items)
        for place, item in enumerate(items):
            if _is_call(item):
                self._add_call(place, item, paired.get(place))
            elif item["type"] in _OUTPUTS:
                self._end_step()
                # the tools that a search found have joined the list
                if place in unmatched and item["type"] != "tool_search_output":
                    self.chat.add_result(_answered_id(item), self._output_parts(item))
            elif item["type"] in self._READERS:
                self._READERS[item["type"]](self, item)
        self._end_step()
        self.chat.end_step()

    def _current(self) -> _Step:
        """The step that reasoning or text goes to: after a call a new one."""
        if self._step.calls:
            self._end_step()
        return self._step

    def _add_message(self, item: Json) -> None:
        role, content = item.get("role"), item.get("content")
        _check_content(content)
        if role == "assistant":
            step = self._current()
            step.is_message = True
            step.texts.append("".join(_texts_of(content)))
        elif role in ("system", "developer"):
            self._end_step()
            self.chat.add_system("\n\n".join(_texts_of(content)))
        elif role == "user":
            self._add_user(content)
        else:
            raise _bad(f"a message can't have the role {role!r}", "input")

    def _add_user(self, content: Any) -> None:
        self._end_step()
        self.chat.add_user(_chat_parts(content, self._profile))

    def _add_agent_message(self, item: Json) -> None:
        author = item.get("author")
        head = [f"Message from {author}:"] if isinstance(author, str) else []
        self._add_user("\n".join(head + _texts_of(item.get("content"))))

    def _add_compaction(self, item: Json) -> None:
        summary = (self._seal.decrypt(item.get("encrypted_content")) or {}).get("summary")
        if not isinstance(summary, str):
            raise _bad(_FOREIGN_SUMMARY, "input", "invalid_encrypted_content")
        self._add_user(_SUMMARY_HEAD + summary)

    def _add_reasoning(self, item: Json) -> None:
        carried = self._seal.decrypt(item.get("encrypted_content")) or {}
        # what comes before a call of several is no new step
        step = self._step if carried.keys() <= {"calls", "of"} and carried else self._current()
        shown, summary = ("\n\n".join(_texts_of(item.get(name))) for name in ("content", "summary"))
        # it was called "reasoning" in conversations of earlier versions
        step.reasoning.append(shown or carried.get("text") or carried.get("reasoning") or summary)
        step.carriers.append(carried)

    def _add_call(self, place: int, item: Json, output: Optional[Json]) -> None:
        kind, namespace = _KIND_OF_CALL[item["type"]], item.get("namespace")
        name = _required(item, "name", "input") if kind in ("function", "custom") else kind
        tool = _Tool(kind, name, namespace if isinstance(namespace, str) else None)
        self._step.calls.append(chat_call(_call_id(item) or f"call_{place}", self._tools.name(tool),
                                          _function_arguments(item, kind)))
        self._step.carriers.append(self._seal.decrypt(item.get("encrypted_content")) or {})
        self._step.outputs.append(output)

    def _end_step(self) -> None:
        step, self._step = self._step, _Step()
        if not step.is_message and not step.calls:
            return                               # reasoning that led to nothing
        self.chat.add_assistant(step.texts, step.reasoning, step.carriers, step.calls)
        for call, output in zip(step.calls, step.outputs):
            self.chat.add_result(call["id"], self._output_parts(output) if output else
                                 [text_part(NO_RESULT)])

    def _output_parts(self, item: Json) -> List[Json]:
        if item["type"] == "tool_search_output":
            found = self._tools.names(item.get("tools"))
            return [text_part(f"Tools found: {found}" if found else "No tools found.")]
        return _chat_parts(_output_content(item), self._profile)

    #: Types that are no call and no output. The effect of OpenAI's own calls (web_search_call,
    #: mcp_call, …) is in the text that follows them; Codex's ghost_snapshot and whatever is
    #: unknown means nothing to a model.
    _READERS: Dict[str, Callable[[_ItemHistory, Json], None]] = {
        "message": _add_message, "agent_message": _add_agent_message, "reasoning": _add_reasoning,
        "compaction": _add_compaction, "compaction_summary": _add_compaction}


# --- request: the turn ---

def _answer_format(form: Any) -> Json:
    """Chat's response_format, as a field."""
    kind = form.get("type") if isinstance(form, dict) else form
    if kind in (None, "text"):
        return {}
    # a bare "json_schema" does not say which
    if kind not in ("json_object", "json_schema") or form == "json_schema":
        raise _bad(f"`text.format` can't be {one_line(json.dumps(kind), 60)}: text, json_object or "
                   "json_schema expected", "text.format")
    if kind == "json_object":
        return {"response_format": {"type": kind}}
    schema = object_of(form.get("schema"))
    more = {key: form[key] for key in ("strict", "description") if form.get(key) is not None}
    named = {"name": form.get("name") or "output", "schema": schema, **more}
    return {"response_format": {"type": kind, "json_schema": named}}


class ResponsesTurn(Turn):
    """One Responses request: the chat request for the upstream, and the way back."""

    def __init__(self, body: Json, profile: Json, model: str, *, now: float,
                 recall: Callable[[str], Optional[List[Json]]],
                 item: Callable[[str], Optional[Json]],
                 seal: Seal, codex: bool = False, compact: bool = False) -> None:
        _check_fields(body)
        items = _input_items(body, recall, item)
        self.is_compact = compact
        self.compacts = compact or bool(items) and items[-1]["type"] == "compaction_trigger"
        self.items = [entry for entry in items if entry["type"] != "compaction_trigger"]
        self.store = body.get("store") is not False
        self.model = body.get("model") or model
        self.now, self.seal, self.codex, self.profile = now, seal, codex, profile
        #: what to keep of reasoning beside what is shown, by its item
        self.carriers: Dict[str, Json] = {}
        self._body = body
        self._reasoning, self._text = self._configuration()
        include = body.get("include") or []
        self.carries = "reasoning.encrypted_content" in include
        self._logprobs = "message.output_text.logprobs" in include
        summary = self._reasoning.get("summary") or self._reasoning.get("generate_summary")
        self.summarises = summary not in (None, "none")
        self.echo = self._echoed(summary)
        # Codex lists web_search in each request: a maker's own would be made, and paid, each time
        searches = codex and isinstance(profile["server_tools"], dict)
        self.tools = _ResponseTools({**profile, "server_tools": "drop"} if searches else profile)
        self.tools.add(body.get("tools"))
        for entry in self.items:
            if entry["type"] in ("additional_tools", "tool_search_output"):
                self.tools.add(entry.get("tools"))
        effort = self._reasoning.get("effort")
        wishes = Wishes(None if effort is None else effort != "none", None, effort,
                        () if self.compacts else self.tools.missing)
        chat = self._to_chat(model, wishes.thinking)
        self.wants_json = "response_format" in chat
        self.chat = finish_chat(chat, profile, wishes)

    @property
    def call_ids(self) -> Set[str]:
        """Ids that earlier calls of the conversation have."""
        return {_call_id(item) for item in self.items if _is_call(item)}

    def stream(self, new_id: Callable[[str], str]) -> ResponsesStream:
        return (_CompactionStream if self.compacts else ResponsesStream)(self, new_id)

    def _configuration(self) -> Tuple[Json, Json]:
        """reasoning and text, as changed by the conversation's configuration_update items."""
        reasoning = dict(self._body.get("reasoning") or {})
        text = dict(self._body.get("text") or {})
        for item in self.items:
            if item["type"] == "configuration_update":
                for settings, name in ((reasoning, "reasoning"), (text, "text")):
                    settings.update(object_of(item.get(name)))
        return reasoning, text

    def _echoed(self, summary: Optional[str]) -> Json:
        given = {name: default if self._body.get(name) is None else self._body[name]
                 for name, default in _ECHOED.items()}
        form = self._text.get("format") or {"type": "text"}
        return {"background": False, **given, "store": self.store,
                "reasoning": {"effort": self._reasoning.get("effort"), "summary": summary},
                "text": {**self._text, "format": form}}

    def _to_chat(self, model: str, thinking: Optional[bool]) -> Json:
        """The chat request in OpenAI's words."""
        history = _ItemHistory(self.tools, self.profile, self.seal, thinking)
        history.read(self.items)
        if not history.chat.with_system():
            raise _bad("`input` holds no message", "input")
        chat: Json = {"model": model,
                      "messages": history.chat.with_system(self._body.get("instructions"))}
        if self._body.get("stream"):
            chat["stream"] = True
        chat.update((name, self._body[field]) for name, field in _SAMPLING.items()
                    if self._body.get(field) is not None)
        self._put_extras(chat)
        if self.compacts:
            chat["messages"].append({"role": "user", "content": _SUMMARISE})
            return chat
        chat.update(_answer_format(self._text.get("format")))
        if self._logprobs:
            chat["logprobs"] = True
            if self._body.get("top_logprobs") is not None:
                chat["top_logprobs"] = self._body["top_logprobs"]
        self._put_tools(chat)
        return chat

    def _put_extras(self, chat: Json) -> None:
        """Fields that only some providers know: the user, hints for caching and scheduling."""
        user = self._body.get("safety_identifier") or self._body.get("user")
        given = {**self._body, "verbosity": self._text.get("verbosity"),
                 "user": user if isinstance(user, str) else None}
        chat.update((name, given[name])
                    for name in ("user", "verbosity", "prompt_cache_key", "service_tier")
                    if name in self.profile["extra_fields"] and given.get(name) is not None)

    def _put_tools(self, chat: Json) -> None:
        chat.update(self.tools.fields())
        choice = self.tools.choose(self._body.get("tool_choice")) if self.tools.listed() else None
        listed = self.tools.listed()
        if not listed:
            return
        chat["tools"] = listed
        if choice is not None:
            chat["tool_choice"] = choice
        if self._body.get("parallel_tool_calls") is not None:
            chat["parallel_tool_calls"] = self._body["parallel_tool_calls"]


#: Fields of the request that its response repeats, with their defaults.
_ECHOED: Json = {
    "instructions": None, "metadata": {}, "max_output_tokens": None, "parallel_tool_calls": True,
    "previous_response_id": None, "temperature": 1.0, "top_p": 1.0, "tool_choice": "auto",
    "tools": [], "truncation": "disabled"}

#: Chat's names of fields that are passed on -> those of Responses.
_SAMPLING = {"max_tokens": "max_output_tokens", "temperature": "temperature", "top_p": "top_p"}


def count_response_tokens(body: Json, recall: Callable[[str], Optional[List[Json]]],
                          item: Callable[[str], Optional[Json]], seal: Seal) -> int:
    """About how many tokens a Responses request takes; BadRequest as for the request itself."""
    return ResponsesTurn({"input": "", **body}, DEFAULT_PROFILE, "", now=0, recall=recall,
                         item=item, seal=seal).raw_estimate


# --- answer: arguments that arrive in pieces ---

_INPUT_HEAD = Pattern(r'\s*\{\s*"input"\s*:\s*"')
#: As much of a JSON string as can be read already: no high surrogate whose low one may follow.
_INPUT_BODY = Pattern(r'(?:[^"\\]+|\\(?!u[dD][89abAB][0-9a-fA-F]{2}'
                      r'(?:\Z|\\\Z|\\u[0-9a-fA-F]{0,3}\Z)).)*')


class _CustomInput:
    """Takes the text out of {"input": "…"} as it comes; any other shape is read at its end."""

    def __init__(self) -> None:
        self._pieces: List[str] = []
        self._held, self._live, self._ended = "", False, False

    def feed(self, text: str) -> str:
        if self._ended:
            return ""
        if self._live:
            self._held += text
        else:
            self._pieces.append(text)
            if len(self._held) > BLANKS_LIMIT:           # another shape
                return ""
            self._held += text
            head = _INPUT_HEAD.match(self._held)
            if not head:
                return ""
            self._live, self._held = True, self._held[head.end():]
        body = _INPUT_BODY.match(self._held).group()
        self._held = self._held[len(body):]
        self._ended = self._held.startswith('"')
        return _DECODER.decode(f'"{body}"') if "\\" in body else body

    def close(self) -> str:
        """The input where it was not the only, first key; what is no object is the input itself."""
        if self._live:
            return ""
        held = "".join(self._pieces)
        value = _loads(held)
        if isinstance(value, dict):
            texts = [text for text in value.values() if isinstance(text, str)]
            value = value["input"] if "input" in value else texts[0] if len(texts) == 1 else (
                value or "")
        if value is None:
            return held
        return value if isinstance(value, str) else dump_text(value)


def _exec_action(value: Json) -> Optional[Json]:
    command = value.get("command")
    if isinstance(command, str):
        command = ["bash", "-lc", command]
    if not isinstance(command, list) or not command:
        return None
    extra = {key: value[key] for key in ("working_directory", "timeout_ms", "user")
             if value.get(key) is not None}
    return {"type": "exec", "command": [str(part) for part in command],
            "env": value.get("env") or {}, **extra}


def _payload(kind: str, text: str) -> Optional[Json]:
    """What a call of a fixed tool says in its item; None where the model got it wrong."""
    value = _loads(text)
    if not isinstance(value, dict):
        return None
    inner = value.get(_TOOL_KINDS[kind].field)
    value = inner if isinstance(inner, dict) and len(value) == 1 else value
    return _exec_action(value) if kind == "local_shell" else value


# --- answer: items ---

class _TextKind(NamedTuple):
    """How one kind of text is written, as an item and as events."""
    prefix: str                          #: of the item's id
    item: Json                           #: the item when it is announced
    parts: str                           #: the item's field for its one part
    part: Json                           #: that part without its text
    text: str                            #: the part's field for the text
    index: str                           #: name of the part's number in events
    part_events: str
    text_events: str
    extra: Json                          #: what its text events need besides


_MESSAGE = {"type": "message", "role": "assistant", "status": "in_progress", "content": []}
_REASONING = {"type": "reasoning", "summary": []}
_TEXT = _TextKind("msg_", _MESSAGE, "content",
                  {"type": "output_text", "annotations": [], "logprobs": []}, "text",
                  "content_index", "content_part", "output_text", {"logprobs": []})
_REFUSAL = _TextKind("msg_", _MESSAGE, "content", {"type": "refusal"}, "refusal",
                     "content_index", "content_part", "refusal", {})
_RAW = _TextKind("rs_", _REASONING, "content", {"type": "reasoning_text"}, "text",
                 "content_index", "content_part", "reasoning_text", {})
_SUMMARY = _TextKind("rs_", _REASONING, "summary", {"type": "summary_text"}, "text",
                     "summary_index", "reasoning_summary_part", "reasoning_summary_text", {})


class _Item:
    """One output item: announced once, done once; numbered in the order of being announced."""

    def __init__(self, stream: ResponsesStream) -> None:
        self.stream, self.index = stream, -1

    def announce(self, item: Json) -> Json:
        self.index = self.stream.items
        self.stream.items += 1
        return self.stream.event("output_item.added", {"output_index": self.index, "item": item})

    def carry(self, item: Json, state: Json) -> None:
        """Seal a carrier into an item: for the client where it wants that, else for the store."""
        turn = self.stream.turn
        carrier = {"encrypted_content": turn.seal.encrypt(state)}
        if turn.carries:
            item.update(carrier)
        else:
            turn.carriers[item["id"]] = carrier

    def finish(self, item: Json) -> Json:
        self.stream.finished[self.index] = item
        return self.stream.event("output_item.done", {"output_index": self.index, "item": item})


class _TextItem(_Item):
    """An item with text: a message, a refusal, or reasoning."""

    def __init__(self, stream: ResponsesStream, kind: _TextKind) -> None:
        super().__init__(stream)
        self.kind = kind
        self.details = Details()
        self._item = {"id": stream.new_id(kind.prefix), **kind.item}
        self._pieces: List[str] = []
        self._logprobs: List[Json] = []
        self._annotations: List[Json] = []
        self._place: Json = {}
        self._delta: Json = {}

    def open(self) -> Iterator[Json]:
        kind = self.kind
        yield self.announce(self._item)
        self._place = {"item_id": self._item["id"], "output_index": self.index, kind.index: 0}
        self._delta = {"type": f"response.{kind.text_events}.delta", **self._place, **kind.extra}
        yield self.stream.event(kind.part_events + ".added",
                                {**self._place, "part": {**kind.part, kind.text: ""}})

    def delta(self, text: str, choice: Any = None) -> Json:
        """`choice` may have log probabilities."""
        self._pieces.append(text)
        event = {**self._delta, "delta": text, "sequence_number": self.stream.number()}
        logprobs = choice.get("logprobs") if choice else None
        logprobs = logprobs.get("content") if isinstance(logprobs, dict) else None
        if logprobs and isinstance(logprobs, list):
            self._logprobs += logprobs
            event["logprobs"] = logprobs
        return event

    def annotate(self, annotation: Json) -> Json:
        self._annotations.append(annotation)
        return self.stream.event("output_text.annotation.added", {
            **self._place, "annotation_index": len(self._annotations) - 1,
            "annotation": annotation})

    def close(self, cut: bool) -> Iterator[Json]:
        kind, text = self.kind, "".join(self._pieces)
        said = {"logprobs": self._logprobs} if kind.extra else {}
        cited = {"annotations": self._annotations} if kind.extra else {}
        part = {**kind.part, kind.text: text, **said, **cited}
        yield self.stream.event(kind.text_events + ".done",
                                {**self._place, kind.text: text, **said})
        yield self.stream.event(kind.part_events + ".done", {**self._place, "part": part})
        item, turn = {**self._item, kind.parts: [part]}, self.stream.turn
        if kind.item is _MESSAGE:
            item["status"] = "incomplete" if cut else "completed"
        else:
            state = self.stream.reader.carrier(text, self.details.joined())
            if turn.carries or "of" in state:
                self.carry(item, state)
        yield self.finish(item)


class _CallItem(_Item):
    """A tool call: announced when its name is final, done when its JSON is whole and something
    else begins.
    """

    def __init__(self, stream: ResponsesStream, call: ToolCall) -> None:
        super().__init__(stream)
        self.call, self.done = call, False
        self._tool: Optional[_Tool] = None       #: once the name is final
        self._input: Optional[_CustomInput] = None       #: of a custom tool
        self._sent: List[str] = []
        self._item: Json = {}
        self._delta: Json = {}

    def feed(self) -> Iterator[Json]:
        """What has come since."""
        if self._tool is None and self.call.name and self.call.begun:
            yield from self._open(self.stream.turn.tools.tool(self.call.name))
        if self._delta:                  # else the item comes whole
            yield from self._send(self.call.take())

    def settle(self) -> Iterator[Json]:
        """Something else begins."""
        if self._tool is None and self.call.name:
            yield from self._open(self.stream.turn.tools.tool(self.call.name))
        if self.call.complete and self.call.name:
            yield from self.close(cut=False)

    def close(self, cut: bool) -> Iterator[Json]:
        self.done, call = True, self.call
        if not call.name:
            return                       # nothing could be called
        if self._tool is None:
            yield from self._open(self.stream.turn.tools.tool(call.name))
        torn = not call.complete and (cut or call.begun and not call.odd)
        text = call.take(last=True, cut=cut or torn and self._input is not None)
        if not self._delta:
            payload = _payload(self._tool.kind, text)
            if payload is not None:
                self._item[_TOOL_KINDS[self._tool.kind].field] = payload
                yield self.announce({**self._item, "status": "in_progress"})
                yield self.finish({**self._item, "status": "completed"})
                return
            # a function's arguments show the client, and so its model, what was wrong
            yield from self._open(_Tool("function", self._tool.name))
        yield from self._end(text, torn, cut)

    def _open(self, tool: _Tool) -> Iterator[Json]:
        if self._tool is None:
            yield from self._carry()
        self._tool, self.call.named, kind = tool, True, _TOOL_KINDS[tool.kind]
        self._item = {"id": self.stream.new_id(kind.prefix), "type": kind.call,
                      "call_id": self.call.id}
        if self.call.extras and not self.stream.turn.carries:
            self.carry(dict(self._item), self.stream.reader.carrier(calls=[self.call]))
        if kind.events is None:
            self._item.update({"execution": "client"} if tool.kind == "tool_search" else {})
            return
        self._item.update(name=tool.name, **non_empty(namespace=tool.namespace))
        self._input = _CustomInput() if tool.kind == "custom" else None
        yield self.announce({**self._item, kind.field: "", "status": "in_progress"})
        self._delta = {"type": f"response.{kind.events}.delta", "item_id": self._item["id"],
                       "output_index": self.index}

    def _carry(self) -> Iterator[Json]:
        """An item with what the upstream wants back with this call: clients drop it from the call.
        """
        stream = self.stream
        if self.call.extras and stream.turn.carries:
            item, given = _Item(stream), {"id": stream.new_id("rs_"), **_REASONING}
            yield item.announce(dict(given))
            item.carry(given, stream.reader.carrier(calls=[self.call]))
            yield item.finish(given)

    def _send(self, text: str) -> Iterator[Json]:
        text = self._input.feed(text) if self._input else text
        if text:
            self._sent.append(text)
            yield {**self._delta, "delta": text, "sequence_number": self.stream.number()}

    def _end(self, text: str, torn: bool, cut: bool) -> Iterator[Json]:
        kind = _TOOL_KINDS[self._tool.kind]
        if self._input is None and not cut:
            value = parse_arguments(text) if self.call.odd else None
            text = dump_text(value) if value is not None and (
                "INVALID_JSON" not in value) else text
            text = text if text or self._sent else "{}"
            torn = False                 # ObjectMender has ended it
        yield from self._send(text)
        if self._input and not torn:
            self._input, text = None, self._input.close()
            yield from self._send(text)
        said = "".join(self._sent)
        item = {**self._item, kind.field: said, "status": "incomplete" if torn else "completed"}
        if torn and self._tool.kind == "custom":
            # Codex runs what is done, and an incomplete input looks like a whole one
            return self.stream.withhold(self.index, item)
        place = {"item_id": self._item["id"], "output_index": self.index}
        yield self.stream.event(kind.events + ".done", {**place, kind.field: said})
        yield self.finish(item)


# --- answer: the stream ---

#: finish_reason values after which a response is incomplete, and the reason it gives.
_INCOMPLETE = {**dict.fromkeys(CUT_SHORT, "max_output_tokens"),
               "content_filter": "content_filter", "sensitive": "content_filter"}

#: Codes that Codex acts upon (codex-api, responses stream), where the upstream says them …
_FAILURE_CODES = ("insufficient_quota", "usage_not_included", "context_length_exceeded",
                  "rate_limit_exceeded", "server_is_overloaded", "slow_down", "invalid_prompt",
                  "bio_policy", "cyber_policy")
#: … or made from the status: at invalid_prompt Codex stops, else it reconnects.
_FAILURE_STATUS = {400: "invalid_prompt", 402: "insufficient_quota", 403: "invalid_prompt",
                   404: "invalid_prompt", 413: "invalid_prompt", 422: "invalid_prompt",
                   429: "rate_limit_exceeded", 503: "server_is_overloaded",
                   529: "server_is_overloaded"}


def _failure(exc: GatewayError) -> Json:
    """`error` of a failed response."""
    body = exc.body.get("error", exc.body) if exc.body else {}
    said = [exc.code] + ([body.get("code"), body.get("type")] if isinstance(body, dict) else [])
    code, message = next((code for code in said if code in _FAILURE_CODES), None), exc.message
    if exc.overflow:
        code = "context_length_exceeded"
    code = code or _FAILURE_STATUS.get(exc.status, "server_error")
    if code == "rate_limit_exceeded" and "try again in" not in message.lower():
        wait = 5 if exc.retry_after_s is None else exc.retry_after_s     # Codex reads it
        message = f"{message.rstrip('. ')}. Please try again in {wait:g}s."
    return {"code": code, "message": message}


def _response_usage(usage: Usage) -> Json:
    return {"input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached,
                                     "cache_write_tokens": usage.cache_write},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning or 0},
            "total_tokens": usage.prompt + usage.completion}


def _citations(annotations: Sequence[Any]) -> List[Json]:
    """Chat's url citations as Responses has them, where they are flat."""
    found = [object_of(entry.get("url_citation")) for entry in objects_of(annotations)]
    return [{"type": "url_citation", "start_index": 0, "end_index": 0, "title": "", **cited}
            for cited in found if isinstance(cited.get("url"), str)]


class ResponsesStream(AnswerWriter):
    """Chat chunks in, Responses events out.

    One running text and any number of calls are open at a time.
    """

    def __init__(self, turn: ResponsesTurn, new_id: Callable[[str], str]) -> None:
        def call_id(source: str) -> str:
            return source if re.match(r"\S+\Z", source) else new_id("call_")

        self.new_id = new_id
        calls = ToolCalls(call_id, turn.call_ids)
        reader = AnswerReader(turn.profile, calls, wants_json=turn.wants_json)
        super().__init__(reader, turn)
        self.items = 0                   #: how many were announced
        self.finished: Dict[int, Json] = {}
        self._withheld = 0               #: how many of them were never said to be done
        self._number = 0
        self._id, self._created_at = "", 0
        self._thought_kind = _SUMMARY if turn.summarises else _RAW
        self._text_item: Optional[_TextItem] = None
        self._citations: List[Json] = []         #: that wait for their text
        self._blanks: List[str] = []     #: that may turn out to be no message
        self._call_items: Dict[ToolCall, _CallItem] = {}
        self._last: Optional[_CallItem] = None   #: the one that goes on

    def feed(self, chunk: Json) -> Iterable[Json]:
        parts, item = self.reader.feed(chunk), self._text_item
        if len(parts) == 1:
            kind, text, more = parts[0]
            if item is not None and not self._citations and (
                    item.kind is (_TEXT if kind == "text" else self._thought_kind)) and (
                    kind == "text" or kind == "thinking" and more is None):
                return (item.delta(text, more),)
            if self._last is not None and more is self._last.call and item is None:
                return self._last.feed() if not self._last.done else ()
        return self._begin(chunk, parts) if not self._id else self._write(parts)

    def close(self) -> Iterator[Json]:
        yield from self._begin({}, self.reader.close())
        yield from self._end_items(self.reader.cut)
        reason = self._why_incomplete()
        yield self._terminal("incomplete" if reason else "completed",
                             incomplete_details={"reason": reason} if reason else None,
                             usage=_response_usage(self.usage),
                             completed_at=None if reason else max(self._created_at,
                                                                  int(self.turn.now)))

    def whole(self, completion: Json) -> Json:
        """The response for a plain completion: what the last event of a stream of it bears."""
        for _ in self.feed(as_chunk(completion)):
            pass
        return list(self.close())[-1]["response"]

    def fail(self, exc: GatewayError) -> Iterator[Json]:
        """The end of a stream that broke."""
        yield from self._begin({}, ())
        usage = _response_usage(parse_usage(self.reader.usage)) if self.reader.usage else None
        yield self._terminal("failed", error=_failure(exc), usage=usage)

    def _why_incomplete(self) -> Optional[str]:
        """Why the answer is not whole, None where it is.

        Codex takes `incomplete` for a broken stream and asks the same again: where there is
        something to show or to do, it is told that the answer is complete.
        """
        reason = _INCOMPLETE.get(self.finish_reason or "",
                                 "max_output_tokens" if self._withheld else None)
        useful = sum(item["type"] != "reasoning" for item in self.finished.values())
        return None if self.turn.codex and useful > self._withheld else reason

    def withhold(self, index: int, item: Json) -> None:
        """An item that goes into the response, but was cut off and so is never done."""
        self.finished[index] = item
        self._withheld += 1

    def number(self) -> int:
        self._number += 1
        return self._number - 1

    def event(self, name: str, fields: Json) -> Json:
        return {"type": "response." + name, **fields, "sequence_number": self.number()}

    def _begin(self, chunk: Json, parts: Sequence[Part]) -> Iterator[Json]:
        if not self._id:
            created = chunk.get("created")
            is_time = isinstance(created, (int, float)) and created > 0
            self._id = self.new_id("resp_")
            self._created_at = int(created if is_time else self.turn.now)
            yield self.event("created", {"response": self._response("in_progress")})
            yield self.event("in_progress", {"response": self._response("in_progress")})
        yield from self._write(parts)

    def _response(self, status: str, **facts: Any) -> Json:
        return {"id": self._id, "object": "response", "created_at": self._created_at,
                "status": status, "error": None, "incomplete_details": None, **self.turn.echo,
                "model": self.turn.model, "usage": None,
                "output": [self.finished[index] for index in sorted(self.finished)], **facts}

    def _terminal(self, status: str, **facts: Any) -> Json:
        return self.event(status, {"response": self._response(status, **facts)})

    def _write(self, parts: Sequence[Part]) -> Iterator[Json]:
        for kind, text, more in parts:
            if kind == "call":
                yield from self._call(more)
            elif kind == "thinking":
                yield from self._say(self._thought_kind, text)
                self._text_item.details.add(more)
            elif kind == "refusal":
                yield from self._say(_REFUSAL, text)
            elif kind == "annotations":
                self._citations += _citations(more)
            elif text.strip() or self._text_item and self._text_item.kind is _TEXT:
                yield from self._say(_TEXT, "".join((*self._blanks, text)), more)
            else:
                self._blanks.append(text)
        if self._citations and self._text_item and self._text_item.kind is _TEXT:
            yield from map(self._text_item.annotate, self._citations)
            self._citations = []

    def _say(self, kind: _TextKind, text: str, choice: Any = None) -> Iterator[Json]:
        if self._text_item is None or self._text_item.kind is not kind:
            yield from self._end_text()
            yield from self._settle(None)
            self._text_item = _TextItem(self, kind)
            yield from self._text_item.open()
        if kind is _TEXT:
            self._blanks = []
        if text:
            yield self._text_item.delta(text, choice)

    def _end_text(self, cut: bool = False) -> Iterator[Json]:
        item, self._text_item, self._blanks = self._text_item, None, []
        if item:
            yield from item.close(cut)

    def _call(self, call: ToolCall) -> Iterator[Json]:
        item = self._call_items.get(call)
        if item is None:
            yield from self._end_text()
            item = self._call_items[call] = _CallItem(self, call)
        if item is not self._last:
            yield from self._settle(item)
        if not item.done:
            yield from item.feed()

    def _settle(self, active: Optional[_CallItem]) -> Iterator[Json]:
        """Another call or text goes on: the call before is done if it is whole."""
        before, self._last = self._last, active or self._last
        if before is not None and not before.done:
            yield from before.settle()

    def _end_items(self, cut: bool) -> Iterator[Json]:
        yield from self._end_text(cut)
        for item in self._call_items.values():
            if not item.done:
                yield from item.close(cut)


class _CompactionStream(ResponsesStream):
    """The answer to a compaction: whatever the model writes becomes one sealed item."""

    def __init__(self, turn: ResponsesTurn, new_id: Callable[[str], str]) -> None:
        super().__init__(turn, new_id)
        self._written: List[str] = []

    def _write(self, parts: Sequence[Part]) -> Iterator[Json]:
        self._written += [text for kind, text, _ in parts if kind == "text"]
        return iter(())

    def _end_items(self, cut: bool) -> Iterator[Json]:
        summary = "".join(self._written).strip()
        if cut or not summary:
            raise UpstreamGarbled(f"the model's summary was cut off: {self.finish_reason}"
                                  if cut else "the model wrote no summary")
        sealed = self.turn.seal.encrypt({"summary": summary})
        compaction = {"id": self.new_id("cmp_"), "type": "compaction", "encrypted_content": sealed}
        item = _Item(self)
        yield item.announce(compaction)
        yield item.finish(compaction)

    def whole(self, completion: Json) -> Json:
        """That of POST /v1/responses/compact lists the user's messages, then the summary."""
        response = super().whole(completion)
        if not self.turn.is_compact:
            return response
        said = [{"id": self.new_id("msg_"), "status": "completed", **item}
                for item in self.turn.items
                if item["type"] == "message" and item.get("role") == "user"]
        return {"id": response["id"], "object": "response.compaction",
                "created_at": response["created_at"],
                "output": said + response["output"], "usage": response["usage"]}


# === 10. Gemini (pure) =======================================================
#
# generateContent as gemini-cli and Google's SDKs speak it; the rules and their sources: gemini.md.
# Members come in camelCase and in snake_case, mixed in one body.

#: HTTP status -> google.rpc.Code
_RPC_CODES = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED",
              404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED", 499: "CANCELLED", 500: "INTERNAL",
              503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}
_NUMBER = (int, float)
_EXPECTED = {dict: "an object", list: "a list", str: "a string", bool: "true or false",
             _NUMBER: "a number"}


@lru_cache(200)
def _snake_case(name: str) -> str:
    return re.sub("[A-Z]", lambda found: "_" + found.group().lower(), name)


def _camel_case(name: str) -> str:
    return re.sub("(?<=[a-z])_([a-z])", lambda found: found.group(1).upper(), name)


def member(holder: Json, name: str, kind: Any, where: str = "") -> Any:
    """A member in either spelling, None where it is missing; BadRequest for another kind."""
    value = holder.get(name)
    if value is None:
        value = holder.get(_snake_case(name))
    if value is not None and (not isinstance(value, kind)
                              or isinstance(value, bool) and kind is not bool):
        raise BadRequest(f"{where}{name}: {_EXPECTED[kind]} expected")
    return value


def _objects_at(holder: Json, name: str, where: str = "") -> List[Tuple[Json, str]]:
    """The objects of a list, each with its place; a single object stands for a list of one."""
    value = holder.get(name, holder.get(_snake_case(name)))
    items = [value] if isinstance(value, dict) else [] if value is None else value
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise BadRequest(f"{where}{name}: a list of objects expected")
    return [(item, f"{where}{name}[{at}].") for at, item in enumerate(items)]


_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_INNER_SCHEMAS = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf", "not")
_GOOGLES_OWN = ("$schema", "propertyOrdering", "nullable", "example")


def plain_schema(schema: Any) -> Any:
    """JSON Schema of either kind of schema, Google's own (OpenAPI 3.0) or JSON Schema.

    Types become lower case in both, for gemini-cli writes upper case into both.
    """
    if isinstance(schema, list):
        return [plain_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    done: Json = {}
    for name, value in ((_camel_case(name), value) for name, value in schema.items()):
        if name == "type":
            value = [str(kind).lower() for kind in value] if isinstance(value, list) else (
                str(value).lower())
        elif name in _NAMED_SCHEMAS and isinstance(value, dict):
            value = {key: plain_schema(inner) for key, inner in value.items()}
        elif name in _INNER_SCHEMAS:
            value = plain_schema(value)
        elif name.startswith(("min", "max")) and str(value).isdecimal():
            value = int(value)           # int64 is a string in Google's JSON
        if name not in _GOOGLES_OWN and value != "type_unspecified":
            done[name] = value
    if schema.get("nullable") is True:
        if isinstance(done.get("type"), str):
            done["type"] = [done["type"], "null"]
        if isinstance(done.get("anyOf"), list):
            done["anyOf"].append({"type": "null"})
        if isinstance(done.get("enum"), list):
            done["enum"] = [*done["enum"], None]
    return done


# --- the request: its history

def make_thought_signature(carrier: Json) -> str:
    """make_signature's in base64, for the SDKs decode it to bytes."""
    return base64.b64encode(make_signature(carrier).encode()).decode()


def read_thought_signature(signature: Any) -> Json:
    """What make_thought_signature put in; {} for a foreign or damaged one.

    google-genai sends it in the other base64 alphabet than it got it in.
    """
    try:
        return read_signature(base64.b64decode(
            signature.translate({45: "+", 95: "/"})).decode()) if signature else {}
    except ValueError:
        return {}


class _ContentHistory:
    """Reads `contents` into a chat history."""

    def __init__(self, tools: _ResponseTools, profile: Json, thinking: Optional[bool]) -> None:
        self.chat = ChatHistory(profile, thinking, merges=True)
        self.ids: Set[str] = set()       #: of all calls
        self._tools, self._profile = tools, profile
        self._answered: Set[str] = set()
        #: name -> ids of its calls that may wait for a result, the oldest first
        self._waiting: Dict[str, Deque[str]] = {}

    def read(self, contents: Sequence[Tuple[Json, str]]) -> None:
        said: List[Tuple[Json, str]] = []        # by the model; its contents in a row are one
        for content, where in contents:
            parts = _objects_at(content, "parts", where)
            if content.get("role") == "model":
                said += parts
            else:
                self._model(said)
                said = []
                self._user(parts)
        self._model(said)
        self.chat.end_step()

    def _model(self, parts: Sequence[Tuple[Json, str]]) -> None:
        """A model's turn; SDKs keep the deltas of a stream as parts, so they are joined as such."""
        texts, thoughts, calls, carriers = [], [], [], []
        for part, where in parts:
            state = read_thought_signature(member(part, "thoughtSignature", str, where))
            carriers.append(state)
            call = member(part, "functionCall", dict, where)
            if call is not None:
                calls.append(self._call(call, f"{where}functionCall."))
                extras = list(object_of(state.get("calls")).values())[:1]
                state["calls"] = {calls[-1]["id"]: extra for extra in extras}    # its id may differ
            elif part.get("thought") is True:
                thoughts.append(member(part, "text", str, where) or "")
            else:
                texts += [each.get("text", "") for each in self._parts(part, where)]
        carried = [state["text"] for state in carriers if isinstance(state.get("text"), str)]
        thought = "".join(thoughts) or "".join(carried[-1:])
        for state in [state for state in carriers if state.get("details")][:-1]:
            del state["details"]         # the last one has all that was thought before
        if texts or calls or thought:
            self.chat.add_assistant(["".join(texts)], [thought], carriers, calls)

    def _call(self, call: Json, where: str) -> Json:
        """A call under an id that no other call has: the client's, else one of its place."""
        name, ident, args = member(call, "name", str, where), call.get("id"), call.get("args")
        if not name:
            raise BadRequest(f"{where}name: a name is required")
        if not isinstance(ident, str) or not ident or ident in self.ids:
            ident = f"call_{len(self.ids)}_{_Tool('function', name).flat[:40]}"
        self.ids.add(ident)
        self._waiting.setdefault(name, deque()).append(ident)
        return chat_call(ident, self._tools.name(_Tool("function", name)),
                         dump_text(object_of(args)))

    def _user(self, parts: Sequence[Tuple[Json, str]]) -> None:
        said: List[Json] = []
        for part, where in parts:
            response = member(part, "functionResponse", dict, where)
            if response is None:
                said += self._parts(part, where)
            else:
                self._result(response, f"{where}functionResponse.")
        if said:
            self.chat.add_user(said)

    def _result(self, response: Json, where: str) -> None:
        """The result of a call, found by its id, else by its name: Python's SDK sends no ids."""
        name, ident = member(response, "name", str, where) or "", response.get("id") or ""
        waiting = self._waiting.get(name, deque())
        while (ident not in self.ids or ident in self._answered) and waiting:
            ident = waiting.popleft()
        self._answered.add(ident)
        given = member(response, "response", dict, where) or {}
        field = next(iter(given)) if len(given) == 1 else ""
        value = given[field] if field in ("output", "result", "error") else given
        text = value if isinstance(value, str) else dump_text(value)
        files = [each for part, at in _objects_at(response, "parts", where)
                 for each in self._parts(part, at)]
        said = [text_part(text)] if text or not files else []
        self.chat.add_result(ident or name, [*said, *files], is_error=field == "error")

    def _parts(self, part: Json, where: str) -> List[Json]:
        """A part that is no call, no result and no thought."""
        text = member(part, "text", str, where)
        data, file = (member(part, name, dict, where) for name in ("inlineData", "fileData"))
        kind = member(data or file or {}, "mimeType", str, where) or ""
        if text is not None:
            return [text_part(text)] if text else []
        if data is not None:
            body = (member(data, "data", str, where) or "").translate({45: "+", 95: "/"})
            if not is_base64(body):
                raise BadRequest(f"{where}inlineData.data: base64 expected")
            name = member(data, "displayName", str, where) or f"file.{kind.rpartition('/')[2]}"
            url, given = f"data:{kind};base64,{body}", {"filename": name}
        elif file is not None:
            url, given = member(file, "fileUri", str, where) or "", {}
        else:
            return [text_part(f"[{name}: {dump_text(value)}]")
                    for name, value in part.items() if _camel_case(name) in _TOLD]
        if kind.startswith("image/") or not kind:
            return [image_part(url, self._profile)]
        given["file_data" if data else "file_url"] = url
        return [_file_part(given, self._profile)]


#: Parts that a model is told as they are.
_TOLD = ("executableCode", "codeExecutionResult", "toolCall", "toolResponse")


# --- the request as a whole

#: Tools that Google runs itself -> the family a profile's server_tools knows them by.
_GOOGLE_TOOLS = {"googleSearch": "web_search", "googleSearchRetrieval": "web_search",
                 "urlContext": "web_fetch", "codeExecution": "code_interpreter"}

#: generationConfig -> Chat
_GENERATION = {"temperature": "temperature", "topP": "top_p", "topK": "top_k", "seed": "seed",
               "maxOutputTokens": "max_tokens", "presencePenalty": "presence_penalty",
               "frequencyPenalty": "frequency_penalty"}

_MODES = {"AUTO": "auto", "ANY": "required", "NONE": "none", "VALIDATED": "auto"}


class GeminiTurn(Turn):
    """One generateContent request: its chat request, and its answers in Google's shape."""

    def __init__(self, body: Json, profile: Json, model: str) -> None:
        if member(body, "cachedContent", str):
            raise NotFound("cachedContent: nothing is cached here", code="not_found")
        self.profile, self.model = profile, body.get("model") or model
        self._config = member(body, "generationConfig", dict) or {}
        if self._given("candidateCount", _NUMBER) not in (None, 1):
            raise BadRequest("generationConfig.candidateCount: only 1 is possible here")
        contents = _objects_at(body, "contents")
        if not contents:
            raise BadRequest("contents: at least one content is required")
        thinking = self._given("thinkingConfig", dict) or {}
        self.shows_thoughts = bool(member(thinking, "includeThoughts", bool))
        self.tools = self._tools(body)
        wishes = self.wishes(thinking)._replace(missing=self.tools.missing)
        history = _ContentHistory(self.tools, profile, wishes.thinking)
        history.read(contents)
        self.ids = history.ids
        form, rule = self._format()
        self.wants_json = bool(form)
        self.chat = finish_chat({**self._to_chat(body, model, history.chat, rule), **form},
                                profile, wishes)

    def _given(self, name: str, kind: Any) -> Any:
        return member(self._config, name, kind, "generationConfig.")

    @staticmethod
    def wishes(thinking: Json) -> Wishes:
        """What a thinkingConfig asks for."""
        where = "generationConfig.thinkingConfig."
        budget = member(thinking, "thinkingBudget", _NUMBER, where)
        level = (member(thinking, "thinkingLevel", str, where) or "").lower()
        if budget is not None:
            return Wishes(budget != 0, int(budget) if budget > 0 else None)
        return Wishes(True, None, level) if level in EFFORTS else Wishes()

    def _tools(self, body: Json) -> _ResponseTools:
        """As tools of Responses, whose reader makes Chat's of them."""
        tools = _ResponseTools(self.profile)
        for tool, where in _objects_at(body, "tools"):
            for each, at in _objects_at(tool, "functionDeclarations", where):
                if not member(each, "name", str, at):
                    raise BadRequest(f"{at}name: a name is required")
                schema = member(each, "parametersJsonSchema", dict, at) or member(
                    each, "parameters", dict, at)
                tools.add([{"type": "function", "name": each["name"],
                            "description": member(each, "description", str, at),
                            "parameters": plain_schema(schema)}])
            names = map(_camel_case, tool)
            tools.add([{"type": _GOOGLE_TOOLS.get(name, name)} for name in names
                       if name != "functionDeclarations"])
        return tools

    def _choice(self, body: Json) -> Any:
        """tool_choice; names that are allowed shorten the list of tools."""
        where = "toolConfig.functionCallingConfig."
        config = member(member(body, "toolConfig", dict) or {}, "functionCallingConfig", dict,
                        "toolConfig.") or {}
        choice = _MODES.get((member(config, "mode", str, where) or "").upper())
        names = member(config, "allowedFunctionNames", list, where)
        allowed = [{"type": "function", "name": str(name)} for name in names or ()]
        if choice != "required" or not allowed or not self.tools.listed():
            return choice
        return self.tools.choose(allowed[0] if len(allowed) == 1 else {
            "type": "allowed_tools", "mode": choice, "tools": allowed})

    def _to_chat(self, body: Json, model: str, history: ChatHistory, rule: str) -> Json:
        """The chat request in OpenAI's words, but for response_format."""
        given = body.get("systemInstruction", body.get("system_instruction")) or {}
        texts = [given] if isinstance(given, str) else [
            member(part, "text", str, at) for part, at in _objects_at(given, "parts", "system.")]
        chat: Json = {"model": model, "messages": history.with_system(*texts, rule)}
        for name, field in _GENERATION.items():
            value = self._given(name, _NUMBER)
            if value is not None:        # whole numbers come as floats, too
                chat[field] = int(value) if value == int(value) else value
        self.stops = [stop for stop in self._given("stopSequences", list) or () if stop]
        if self.stops:
            chat["stop"] = self.stops[:STOP_LIMIT]
        if self._given("responseLogprobs", bool):
            top = self._given("logprobs", _NUMBER)
            chat.update(logprobs=True, **non_empty(top_logprobs=int(top or 0)))
        if body.get("stream"):
            chat["stream"] = True
        choice = self._choice(body)
        chat.update(self.tools.fields())
        if self.tools.listed():
            chat["tools"] = self.tools.listed()
            chat.update(non_empty(tool_choice=choice))
        return chat

    def _format(self) -> Tuple[Json, str]:
        """Chat's response_format, as a field, and the rule that stands for one of `text/x.enum`."""
        kind = (self._given("responseMimeType", str) or "").lower()
        given = [self._given(name, dict) for name in ("responseJsonSchema", "responseSchema")]
        schema = next((plain_schema(each) for each in given if each is not None), None)
        if kind == "text/x.enum" and schema:
            values = ", ".join(map(str, schema.get("enum") or ()))
            return {}, f"Answer with nothing but one of these values: {values}"
        if kind != "application/json":
            return {}, ""
        if schema is None:
            return {"response_format": {"type": "json_object"}}, ""
        named = {"name": "output", "schema": schema, "strict": False}
        return {"response_format": {"type": "json_schema", "json_schema": named}}, ""

    def stream(self, new_id: Callable[[str], str]) -> GeminiStream:
        return GeminiStream(self, new_id)


def count_content_tokens(body: Json) -> int:
    """About how many tokens a countTokens request takes; BadRequest."""
    inner = member(body, "generateContentRequest", dict)
    return GeminiTurn(inner or body, DEFAULT_PROFILE, "").raw_estimate


# --- the answer

#: finish_reason -> finishReason; STOP for any other.
_FINISH_REASONS = {"length": "MAX_TOKENS", "repetition_truncation": "MAX_TOKENS",
                   "model_context_window_exceeded": "MAX_TOKENS",
                   "content_filter": "SAFETY", "sensitive": "SAFETY"}


class GeminiStream(AnswerWriter):
    """Chat chunks in, GenerateContentResponses out.

    Each text is a response with one part, a call another one, once all of it has come.  The last
    response has a part, too, if only an empty text: google-genai's chats take one without for
    broken, and ask again.  Beside other parts gemini-cli throws everything away for an empty text.
    """

    def __init__(self, turn: GeminiTurn, new_id: Callable[[str], str]) -> None:
        self._new_id, self._id = new_id, new_id("")
        calls = ToolCalls(lambda source: source or new_id("call_"), turn.ids)
        super().__init__(AnswerReader(turn.profile, calls, turn.stops[STOP_LIMIT:],
                                      turn.wants_json), turn)
        self._waiting: Deque[ToolCall] = deque()     #: calls that are not with the client, in order
        self._held: List[Part] = []      #: said while a call was incomplete
        self._blanks: List[str] = []     #: that wait for a visible character
        self._thought: List[str] = []
        self._details = Details()
        self._wrong = ""                 #: finishReason, where a call can't be passed on
        self._called = self._spoke = False
        self._citations: List[Json] = []

    def feed(self, chunk: Json) -> Iterable[Json]:
        parts = self.reader.feed(chunk)
        if len(parts) == 1 and parts[0][0] == "text" and self._spoke and not self._waiting:
            return (self._response({"text": parts[0][1]}),)
        return self._write(parts)

    def close(self) -> Iterator[Json]:
        rest = [*self._write(self.reader.close()), *self._calls(0, last=True)]
        end = rest.pop() if rest else self._response({"text": ""})
        yield from rest
        usage, reason = self.usage, _FINISH_REASONS.get(self.finish_reason or "")
        end["candidates"][0]["finishReason"] = reason or (
            not self._called and self._wrong or "STOP")
        if self._citations:
            end["candidates"][0]["groundingMetadata"] = {"groundingChunks": [
                {"web": {"uri": cited["url"], "title": cited["title"] or cited["url"]}}
                for cited in self._citations]}
        thoughts = min(usage.reasoning or 0, usage.completion)
        counts = {"promptTokenCount": usage.prompt, "thoughtsTokenCount": thoughts,
                  "candidatesTokenCount": usage.completion - thoughts,
                  "totalTokenCount": usage.prompt + usage.completion,
                  "cachedContentTokenCount": usage.cached}
        optional = ("thoughtsTokenCount", "cachedContentTokenCount")
        yield {**end, "usageMetadata": {name: count for name, count in counts.items()
                                        if count or name not in optional}}

    def whole(self, completion: Json) -> Json:
        """The response for a plain completion: neighbouring texts as one part."""
        parts: List[Json] = []
        last: Json = {}
        for last in [*self.feed(as_chunk(completion)), *self.close()]:
            part, = last["candidates"][0]["content"]["parts"]
            before = parts[-1] if parts else {}
            if "text" in part and "text" in before and part.get("thought") == before.get("thought"):
                before["text"] += part["text"]
            elif part.get("text") != "":
                parts.append(part)
        last["candidates"][0]["content"]["parts"] = parts or [{"text": ""}]
        return last

    def _response(self, part: Json) -> Json:
        candidate = {"content": {"role": "model", "parts": [part]}, "index": 0}
        return {"candidates": [candidate], "modelVersion": self.turn.model, "responseId": self._id}

    def _signed(self, part: Json, calls: Sequence[ToolCall] = (), first: bool = True) -> Json:
        """A part that bears what has to come back: with the first text and the first call what was
        thought so far.

        gemini-cli keeps the first signature of a text, and no thoughts.
        """
        thought = ("".join(self._thought), self._details.joined()) if first else ()
        state = self.reader.carrier(*thought, calls=calls)
        return {**part, "thoughtSignature": make_thought_signature(state)} if state else part

    def _write(self, parts: Sequence[Part]) -> Iterator[Json]:
        for part in parts:
            kind, text, more = part
            if kind == "call" and not more.seen:
                more.seen = True
                self._waiting.append(more)
            yield from self._calls(1 if kind == "call" else 0)
            if kind == "annotations":
                self._citations += _citations(more)
            elif kind != "call" and self._waiting:
                self._held.append(part)
            elif kind == "thinking":
                self._thought.append(text)
                self._details.add(more)
                if text and self.turn.shows_thoughts:
                    yield self._response({"text": text, "thought": True})
            elif kind != "call" and not self._spoke and not text.strip():
                self._blanks.append(text)
            elif kind != "call":
                part = {"text": "".join((*self._blanks, text))}
                yield self._response(part if self._spoke else self._signed(part))
                self._spoke, self._blanks = True, []

    def _calls(self, keep: int, last: bool = False) -> Iterator[Json]:
        """The calls that are whole, in order, but for the `keep` last; `last`: the others as well.
        """
        while len(self._waiting) > keep and (
                last or self._waiting[0].complete and self._waiting[0].name):
            call = self._waiting.popleft()
            is_torn = self.reader.cut and call.begun and not call.complete
            args = parse_arguments(call.take(last=True))
            if "INVALID_JSON" in args or not self.turn.tools.offers(call.name):
                self._wrong = self._wrong or ("MALFORMED_FUNCTION_CALL" if "INVALID_JSON" in args
                                              else "UNEXPECTED_TOOL_CALL")
            elif not is_torn:
                name = self.turn.tools.tool(call.name).name
                if call.id.startswith(f"{name}__"):      # gemini-cli cuts that off
                    call.id = self._new_id("call_")
                part = {"functionCall": {"id": call.id, "name": name, "args": args}}
                yield self._response(self._signed(part, [call], first=not self._called))
                call.named = self._called = True
                self._blanks = []
        if self._held and not self._waiting:
            held, self._held = self._held, []
            yield from self._write(held)


def gemini_error(exc: GatewayError, status: int) -> Json:
    """The error body; the status beside it is `status`."""
    message = exc.message
    details: List[Json] = []
    if exc.overflow is not None:
        prompt, limit = exc.overflow[0], exc.overflow[1] or max(0, exc.overflow[0] - 1)
        message = (f"The input token count ({max(prompt, limit + 1)}) exceeds the maximum number "
                   f"of tokens allowed ({limit}).")
    if exc.retry_after_s is not None:
        details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo",
                        "retryDelay": f"{max(1, int(exc.retry_after_s + 0.999))}s"})
    elif status == 429 and exc.should_retry is False:    # a spent balance: gemini-cli ends at once
        details.append({"@type": "type.googleapis.com/google.rpc.QuotaFailure",
                        "violations": [{"quotaId": "BalancePerDay"}]})
    kind = _RPC_CODES.get(status) or ("INTERNAL" if status >= 500 else "INVALID_ARGUMENT")
    return {"error": {"code": status, "message": message, "status": kind,
                      **non_empty(details=details)}}


# --- embeddings

def embedding_request(body: Json, model: str) -> Json:
    """OpenAI's request for what an embedContent or batchEmbedContents request asks for."""
    requests = _objects_at(body, "requests") if "requests" in body else [(body, "")]
    texts: List[str] = []
    for request, where in requests:
        content = request.get("content")
        parts = [({"text": content}, "")] if isinstance(content, str) else _objects_at(
            member(request, "content", dict, where) or {}, "parts", f"{where}content.")
        texts.append("\n".join(member(part, "text", str, at) or "" for part, at in parts))
    if not any(texts):
        raise BadRequest("content: there is no text to embed")
    size = member(requests[0][0], "outputDimensionality", _NUMBER)
    return {"model": model, "input": texts, **non_empty(dimensions=int(size or 0))}


def embedding_reply(completion: Json, is_batch: bool) -> Json:
    """Google's answer of OpenAI's; UpstreamGarbled."""
    rows = sorted(objects_of(completion.get("data")), key=choice_index)
    values = [{"values": row.get("embedding")} for row in rows]
    if not values or not all(isinstance(each["values"], list) for each in values):
        raise UpstreamGarbled("the upstream's answer has no embeddings")
    return {"embeddings": values} if is_batch else {"embedding": values[0]}


# === 11. Dialects (pure) =====================================================

class Context(NamedTuple):
    """What a conversion needs from outside, passed in so that it stays pure."""
    now: float
    new_id: Callable[[str], str]
    seal: Seal
    store: Any                           #: a ResponseStore
    reasoning: Any                       #: a ReasoningCache
    scale: Callable[[int], int] = int    #: an estimate of tokens as the target's model counts them


def owner_of(key: Optional[ClientKey]) -> str:
    """Whose kept responses a client sees: its key's; without one, or with `custom_api_key`, those
    of "", which are shared.
    """
    return "" if key is None or key.shared else key.name


#: What clients name a conversation by: Claude Code, Codex, others.
_SESSION_HEADERS = ("x-claude-code-session-id", "session-id", "session_id", "thread-id",
                    "x-session-id")
_AGENT_HEADER = "x-claude-code-agent-id"


def is_codex(headers: Mapping[str, str]) -> bool:
    """Codex reads comments as silence, and a cut answer as an error (clients.md)."""
    return headers.get("originator", "").lower().startswith("codex")


def conversation_names(headers: Mapping[str, str]) -> List[Optional[str]]:
    return [headers.get(name) for name in (*_SESSION_HEADERS, _AGENT_HEADER)]


_BASE64_RUN = Pattern(r'(?:;base64,|"data": ?")[A-Za-z0-9+/=]{500,}')


class ReasoningMemory(NamedTuple):
    """The part of a ReasoningCache that belongs to one conversation of one client."""
    cache: Any
    scope: str

    def keep(self, call: Json, carrier: Json) -> None:
        self.cache.keep(call_digest(self.scope, call), carrier)

    def recall(self, call: Json) -> Json:
        return self.cache.recall(call_digest(self.scope, call))


@dataclass(eq=False, repr=False)
class Call:
    """One request as its client made it."""
    dialect: ChatDialect
    body: Json
    text: str                            #: what `body` was parsed from
    headers: Mapping[str, str]           #: names in lower case
    request_id: str
    key: Optional[ClientKey] = None      #: whose request it is, None where none is needed
    meters: Sequence[Any] = ()           #: Meters that its tokens count on
    known: Optional[Remembered] = None   #: from the request before in its conversation

    @property
    def model(self) -> Optional[str]:
        return self.body.get("model")

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def shows_images(self) -> bool:
        return self.dialect.shows_images(self)

    @property
    def speaks(self) -> str:
        return self.dialect.name

    @property
    def owner(self) -> str:
        """Whose responses are kept."""
        return owner_of(self.key)

    @property
    def size_tokens(self) -> int:
        """About how long it is, for routes: four bytes a token, pictures apart."""
        pictures = [found.end() - found.start() for found in _BASE64_RUN.finditer(self.text)]
        size = len(self.text.encode("utf-8", "replace")) - sum(pictures)
        return size // 4 + 1500 * len(pictures)

    @property
    def thinks(self) -> bool:
        return self.dialect.thinks(self.body)

    @property
    def has_tools(self) -> bool:
        return self.dialect.has_tools(self.body)

    @property
    def conversation(self) -> int:
        """A number of the conversation: of its session, else of its first messages.

        Each agent within a session of Claude Code has a conversation of its own.
        """
        agent = self.headers.get(_AGENT_HEADER, "")
        named = (self.headers[name] + agent for name in _SESSION_HEADERS if self.headers.get(name))
        said = next(named, agent) or self.body.get("prompt_cache_key")
        if not isinstance(said, str):
            items = next(filter(None, map(self.body.get, ("messages", "input", "contents"))), None)
            said = json.dumps(items[:2] if isinstance(items, list) else items)[:8000]
        return zlib.crc32(said.encode("utf-8", "replace"))

    def memory(self, cache: Any, messages: Any) -> ReasoningMemory:
        """What is remembered of this conversation of this client, known by its session and by what
        it began with.
        """
        facts = [self.key.name if self.key else "", conversation_names(self.headers),
                 opening_of(messages)]
        return ReasoningMemory(cache, sha256(json.dumps(facts)).hex())


def encode_event(event: Json) -> bytes:
    """An event of Messages or Responses as a record; clients go by the `event:` line."""
    return b"event: " + event["type"].encode() + b"\ndata: " + dump_json(event) + b"\n\n"


def profile_of(target: Target) -> Json:
    """The profile of a model: the defaults, its provider's, what is known of itself."""
    profile = {**DEFAULT_PROFILE, **target.provider.profile,
               **target.provider.facts.get(target.model, {})}
    if target.provider.kind == "iflow":
        profile["require_reasoning_on_tool_calls"] = wants_reasoning_back(target.model)
    profile["origin"] = f"{zlib.crc32(target.provider.base_url.encode()):08x}"
    return profile


# --- translations: the way of a call to an upstream and back ------------------

def parse_answer(data: bytes, status: int, has_choices: bool) -> Json:
    """A plain answer's JSON, once it is known to be an answer; UpstreamError."""
    try:
        # embeddings: floats by the thousand
        decode = _DECODER.decode if has_choices else json.loads
        completion = decode(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise UpstreamGarbled("the upstream's answer is not JSON" if data.strip() else
                              "the upstream's answer is empty") from None
    if has_choices:
        return check_completion(completion, status)
    refusal = refusal_in(completion, status)
    if refusal or not isinstance(completion, dict):
        raise refusal or UpstreamGarbled("the upstream's answer is no JSON object")
    return completion


class Translation:
    """A call as one target is asked it, and the way back of its answer: the protocol.

    `dialect.open(call, target, context)` makes one; each road between two dialects is a class of
    it.  `path`, `headers` and `body` go to the upstream.  A stream comes back through feed() and
    close(), which give bytes for the client, and fail() ends it; a plain answer through reply().
    It serves one attempt at a time: begin() makes it ready for another.
    """
    headers: Mapping[str, str] = {}      #: of the client's, those that an upstream may get
    local: Optional[bytes] = None        #: the whole answer, where it needs no upstream
    max_output = estimate = 0            #: tokens it asks for, and has; 0: not known
    skipped: Sequence[str] = ()          #: unknown types in the request, which were left out
    began = False                        #: an answer; until then another upstream may give one
    done = False                         #: the upstream has nothing more to say
    failed = False                       #: its stream had an error in it
    finish_reason: Optional[str] = None
    records = 0                          #: of its stream, so far

    def __init__(self, call: Call, target: Target, context: Context) -> None:
        self.path = call.dialect.path
        self._call, self._target, self._context = call, target, context
        has_choices = call.dialect.has_choices
        self._is_iflow = target.provider.kind == "iflow" and has_choices
        self._requires_reasoning = has_choices and bool(
            profile_of(target)["require_reasoning_on_tool_calls"])
        self.body = b"" if self.local is not None else self._encode_request()
        self.begin()

    def begin(self) -> None:
        """Forget the answer of an attempt before."""
        self.began = self.done = self.failed = False
        self.finish_reason, self.records = None, 0
        #: what is read of the answer for a later request
        self._note: Optional[AnswerReader] = None
        self._told: Optional[Json] = None        # the upstream's counts, in a plain answer
        self._size = 0                           # of a plain answer

    @property
    def usage(self) -> Usage:
        """The upstream's counts, else an estimate marked as one: a record is about a token."""
        if self._told:
            return parse_usage(self._told)
        call = self._call
        prompt = count_chat_tokens(call.body) if call.dialect.converses else len(call.text) // 4
        return Usage(prompt, self.records or self._size // 5, estimated=True)

    def raw_estimate(self, is_worth: bool) -> int:
        """The prompt's tokens, for learning how the model counts; 0: unknown, or not worth it."""
        return 0

    def reply(self, data: bytes, content_type: str, status: int) -> Tuple[bytes, str]:
        """A plain answer for the client, and its content type; UpstreamError.

        One that came as a stream is folded; where the client wants a stream it becomes one.
        """
        if self._call.dialect.converses and is_event_stream(content_type, data):
            data, content_type = dump_json(fold_stream(data)), ""
        completion = parse_answer(data, status, self._call.dialect.has_choices)
        if self._call.body.get("n") in (None, 1):
            merged = merge_choices(completion)
            data = data if merged is completion else dump_json(merged)
            completion = merged
        self._told, self._size = usage_of(completion), len(data)
        if self._call.stream:
            return (self.feed(completion_to_sse(completion)) + self.close(),
                    self._call.dialect.stream_type)
        if self._note is not None:
            self._record(as_chunk(completion))
        answer = self._reply(data, completion)
        self._end_note()
        is_same = answer is data and content_type
        return answer, content_type if is_same else "application/json"

    def passes(self, payload: bytes) -> bool:
        """Whether `payload` may go out exactly as it came; else feed() is to be called."""
        return False

    def feed(self, payload: bytes) -> bytes:
        """What may go out now; UpstreamError while it is still no answer."""
        raise NotImplementedError

    def close(self) -> bytes:
        """The end of the answer; UpstreamError where the upstream's stream was cut off."""
        raise NotImplementedError

    def fail(self, exc: GatewayError) -> bytes:
        """An error as the last thing within the stream."""
        return self._call.dialect.error_event(exc, self._call.request_id)

    def is_over(self) -> bool:
        """Whether the answer has ended, though the upstream has not said [DONE]."""
        return self.began and bool(self.finish_reason)

    # for the classes

    def _encode_request(self) -> bytes:
        raise NotImplementedError

    def _reply(self, data: bytes, completion: Json) -> bytes:
        raise NotImplementedError

    def _messages(self) -> Any:
        """The request's messages as its client wrote them."""
        return self._call.body.get("messages")

    @cached_property
    def _memory(self) -> ReasoningMemory:
        return self._call.memory(self._context.reasoning, self._messages())

    def _keeps_reasoning(self) -> bool:
        """Whether a later request has to bring back the text of what this answer thinks."""
        return self._is_iflow or self._requires_reasoning

    def _refilled(self, chat: Json) -> Json:
        """A chat request with what its client dropped and this upstream wants back."""
        profile, reasoning = profile_of(self._target), self._context.reasoning
        if self._is_iflow:
            chat = adapt_to_iflow(chat, self._target.model)
        if self._requires_reasoning or profile["origin"] in reasoning.origins:
            chat = refill(chat, self._memory.recall, profile)
        return chat

    def _record(self, chunk: Json) -> None:
        """Note what a later request has to bring back; errors reach the client as they are."""
        with contextlib.suppress(UpstreamError):
            self._note.feed(chunk)

    def _end_note(self) -> None:
        for call, carrier in self._note.kept(self._keeps_reasoning()) if self._note else ():
            self._memory.keep(call, carrier)


class ChatTranslation(Translation):
    """Chat to Chat: every byte of the request but the model's name as it came, where that will do.
    """

    def __init__(self, call: Call, target: Target, context: Context) -> None:
        self.headers = call.headers
        #: None: reasoning passes untouched
        self._preserve = target.provider.preserve_reasoning_content
        super().__init__(call, target, context)

    def begin(self) -> None:
        super().begin()
        if self._is_iflow or "tools" in self._call.body:
            self._note = AnswerReader(profile_of(self._target), ToolCalls())

    def _encode_request(self) -> bytes:
        call, model = self._call, self._target.model
        body = call.body
        if call.dialect.converses:
            wishes = Wishes(thinking=call.thinks or None, is_chat=True)
            body = finish_chat(body, profile_of(self._target), wishes)
            body = self._refilled(body)
        if body is not call.body:
            return dump_json({**body, "model": model})
        return (call.text if call.model == model else
                splice_model(call.text, call.body, model)).encode()

    def _reply(self, data: bytes, completion: Json) -> bytes:
        return data if self._preserve is None else dump_json(
            ReasoningMerge(self._preserve).whole(completion))


#: Enough of a stream's end to hold the last records: finish_reason, usage, [DONE].
TAIL_BYTES = 4096

_FINISH = Pattern(rb'"finish_reason"\s*:\s*"([^"]*)"')
_USAGE = Pattern(rb'"usage"\s*:\s*(?=\{\s*")')
_DONE = Pattern(rb"(?m)^data: ?\[DONE\]")
_ERROR = Pattern(rb'(?m)^data: ?\{\s*"error"\s*:\s*[{"]')


#: One of these is in each record that has to be noted.
_NOTED = tuple(f'"{name}"'.encode() for name in (*REASONING_FIELDS, "reasoning_details",
                                                 "tool_calls"))
#: What has one of these has to come back, whether or not the upstream wants reasoning.
_CARRIED = tuple(f'"{name}"'.encode() for name in CALL_EXTRAS)


class ChatRelay(ChatTranslation):
    """Chat with nothing to change: the upstream's stream goes to the client as it came.

    Nothing goes out before the answer begins (role-only and empty chunks are held back) so that an
    error before it can be a status, and nothing but whole records afterwards so that a comment or
    an error fits in at any time.  Once begun, records are not parsed; how the answer ended is read
    from the tail.
    """

    def begin(self) -> None:
        super().begin()
        choices = self._call.body.get("n")
        self._choices = choices if isinstance(choices, int) else 1
        self._notes = self._note is not None and self._keeps_reasoning()
        self._decoder, self._holds = SSEDecoder(), False         # it has a part of a record
        self._recent: List[bytes] = []   # of what was sent, enough to hold the tail
        self._recent_size = 0
        self._lead: List[bytes] = []     # records that have not gone out yet
        self._lead_size, self._has_choices = 0, False

    def passes(self, payload: bytes) -> bool:
        if not self.began or self._holds or payload[-2:] != b"\n\n" or b"[DONE]" in payload or (
                b"\ndata:" in payload and self._lacks_blank_lines(payload)):
            return False
        self.records += 1
        self._recent.append(payload)
        self._recent_size += len(payload)
        if self._recent_size > 2 * TAIL_BYTES:
            self._recent = [self._tail]
            self._recent_size = len(self._recent[0])
        if b'"error"' in payload or len(payload) > TAIL_BYTES:
            self._look_for_end(payload)
        if self._notes or self._note is not None and any(mark in payload for mark in _CARRIED):
            for data in self._decoder.feed(payload):
                self._note_record(data)
        return True

    @property
    def _tail(self) -> bytes:
        """The end of what was sent."""
        return b"".join(self._recent)[-TAIL_BYTES:]

    @staticmethod
    def _lacks_blank_lines(payload: bytes) -> bool:
        """Whether two records may stand in `payload` without a blank line between them."""
        return payload.count(b"\ndata:") != payload.count(b"\n\ndata:")

    def feed(self, payload: bytes) -> bytes:
        for record, data in self._decoder.records(payload):
            if self.done:                # nothing joins an answer that has ended
                break
            self._lead.append(record)
            if data is not None:
                self._take(data)
        self._holds = self._decoder.holds()
        if not self.began:
            self._lead_size = check_lead(self._lead_size + len(payload))
            return b""
        out, self._lead = b"".join(self._lead), []
        self._recent = [self._tail, out]
        self._recent_size = len(self._recent[0]) + len(out)
        self._look_for_end(out)
        return out

    def _take(self, data: bytes) -> None:
        """Read a record as far as needed: once the answer has begun it is not parsed."""
        self.records += 1
        self.done = data == b"[DONE]"
        if self._note is not None:
            self._note_record(data)
        if self.began or self.done:
            return
        for chunk in read_records([data]):
            self._has_choices = self._has_choices or bool(choices_of(chunk))
            self.began = self._has_choices and is_answer(chunk)

    def close(self) -> bytes:
        """What is missing at the end of the upstream's stream."""
        out = b""
        rest = b"" if self.done else self._decoder.rest()
        if rest.strip() and (not self.began or self._is_whole(rest)):
            out = self.feed(b"\n\n")     # the last record lacked its blank line
        if not self.began:
            raise UpstreamGarbled("the upstream's answer is empty")
        self._read_tail()
        if not self.done and not self.finish_reason and not self.failed:
            raise UpstreamGarbled("the upstream's answer was cut off")
        self._end_note()
        if self.done or self.failed or not self.finish_reason:
            return out
        return out + b"data: [DONE]\n\n"

    def is_over(self) -> bool:
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

    def _look_for_end(self, sent: bytes) -> None:
        """Whether these records tell of an error of the upstream's own, or of the finish."""
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
                text = self._tail[found.end():].decode("utf-8", "replace")
                self._told = _DECODER.raw_decode(text)[0]

    def _note_record(self, data: bytes) -> None:
        self._notes = self._notes or any(mark in data for mark in _CARRIED)
        if self._notes and any(mark in data for mark in _NOTED):
            with contextlib.suppress(UpstreamError):
                for chunk in read_records([data]):
                    self._record(chunk or {})


def check_lead(size: int) -> int:
    """`size` of what came before an answer began; UpstreamGarbled where it is too much."""
    if size > RECORD_LIMIT_BYTES:
        raise UpstreamGarbled("the upstream's answer never begins")
    return size


class WrittenTranslation(Translation):
    """The upstream's stream is read, and written anew as a dialect's own events.

    The first events are held back until one has content; until then another upstream may still
    answer instead.
    """
    #: Events that say nothing of the answer yet.
    _LEADING = ("message_start", "response.created", "response.in_progress")
    #: finish reasons that become an error, as long as nothing was sent
    _fatal: Collection[str] = FATAL_FINISH

    def begin(self) -> None:
        super().begin()
        self._writer = self._new_writer()
        self._lead: Optional[List[bytes]] = []           # the first events; None: they were sent
        self._decoder, self._held, self._held_size = SSEDecoder(), [], 0
        self._has_choices = False
        # raised when what came before it has been sent
        self._broken: Optional[UpstreamError] = None

    def _new_writer(self) -> Any:
        """Chunks in by feed(), events out; close() gives the last ones."""
        raise NotImplementedError

    def _encode(self, event: Any) -> bytes:
        return encode_event(event)

    def feed(self, payload: bytes) -> bytes:
        return self._take(self._decoder.feed(payload))

    def _take(self, records: Sequence[bytes]) -> bytes:
        out: List[bytes] = []
        if not self.began:
            self._held_size = check_lead(self._held_size + sum(map(len, records)))
        try:
            for chunk in read_records(records):
                if self._note is not None and chunk is not None:
                    self._record(chunk)
                if chunk is None:
                    self.done = True
                elif self._lead is None:
                    out.extend(map(self._encode, self._writer.feed(chunk)))
                else:
                    self._open(chunk, out)
        except UpstreamError as exc:
            if not out:
                raise
            self.done, self._broken = True, exc
        finally:
            self.finish_reason = self._writer.finish_reason
        self.done = self.done or self._writer.ended
        self.records += len(records)
        return b"".join(out)

    def _open(self, chunk: Json, out: List[bytes]) -> None:
        """Hold chunks back until there is an answer in one; then write all of them."""
        self._held.append(chunk)
        reason = first_choice(chunk).get("finish_reason")
        if isinstance(reason, str) and reason in self._fatal:
            raise broken_off(reason)
        self._has_choices = self._has_choices or bool(choices_of(chunk))
        self.began = self.began or self._has_choices and is_answer(chunk)
        if self.began:
            held, self._held = self._held, []
            for chunk in held:
                self._lead_in(self._writer.feed(chunk), out)

    def _lead_in(self, events: Iterator[Any], out: List[bytes]) -> None:
        for event in events:
            if self._lead is None:
                out.append(self._encode(event))
                continue
            self._lead.append(self._encode(event))
            if not isinstance(event, dict) or event.get("type") not in self._LEADING:
                out += self._lead
                self._lead = None

    def fail(self, exc: GatewayError) -> bytes:
        return b"".join(self._lead or ()) + self._fail(exc)

    def _fail(self, exc: GatewayError) -> bytes:
        return super().fail(exc)

    def close(self) -> bytes:
        out: List[bytes] = []
        try:
            out.append(self._take_rest())
            if self._broken is not None:
                raise self._broken
            if not self.began:
                raise UpstreamGarbled("the upstream's answer is empty")
            if not self.done and not self.finish_reason:
                raise UpstreamGarbled("the upstream's answer was cut off")
            self._lead_in(self._writer.close(), out)
        except UpstreamError:
            self._lead = [*(self._lead or ()), *out]     # numbered already: fail() sends them
            raise
        self._end_note()
        return b"".join(out)

    def _take_rest(self) -> bytes:
        """The last record, if only its blank line was missing; after the end half a one is ignored.
        """
        if self.done:
            return b""
        try:
            return self._take(self._decoder.close())
        except UpstreamGarbled:
            if not self.finish_reason:
                raise
            return b""


class ChatMerge(WrittenTranslation, ChatTranslation):
    """Chat with changes: reasoning and answer are brought together (ReasoningMerge)."""
    _fatal = ()                          # Chat passes all on

    def _new_writer(self) -> ReasoningMerge:
        return ReasoningMerge(bool(self._preserve))

    def _encode(self, event: Any) -> bytes:
        return encode_chunk(event)

    @property
    def usage(self) -> Usage:
        self._told = self._writer.usage or self._told
        return super().usage


class TurnTranslation(WrittenTranslation):
    """Another dialect by Chat: its `turn` has the chat request, and writes the answer."""

    def __init__(self, call: Call, turn: Any, target: Target, context: Context) -> None:
        self._turn, turn.scale = turn, context.scale
        self.skipped = turn.skipped
        super().__init__(call, target, context)

    @property
    def max_output(self) -> int:
        chat = self._turn.chat
        value = chat.get("max_tokens") or chat.get("max_completion_tokens")
        return value if isinstance(value, int) else 0

    @property
    def estimate(self) -> int:
        return self._turn.estimate

    def raw_estimate(self, is_worth: bool) -> int:
        known = is_worth or "raw_estimate" in vars(self._turn)
        return self._turn.raw_estimate if known and not self._call.shows_images else 0

    def _messages(self) -> Any:
        return self._call.body.get("messages") or self._turn.chat["messages"]

    def _encode_request(self) -> bytes:
        return dump_chat(self._refilled(self._turn.chat))

    def _new_writer(self) -> Any:
        return self._turn.stream(self._context.new_id)

    def _end_note(self) -> None:
        self._note = self._writer.reader
        super()._end_note()

    @property
    def usage(self) -> Usage:
        """As the client is told."""
        return self._writer.usage

    def _reply(self, data: bytes, completion: Json) -> bytes:
        return dump_json(self._answer(completion))

    def _answer(self, completion: Json) -> Json:
        return self._writer.whole(completion)


class MessagesTranslation(TurnTranslation):
    """A Messages request."""

    @cached_property
    def local(self) -> Optional[bytes]:
        """The answer to `max_tokens: 0` (warming a cache), which no upstream knows."""
        if self._turn.max_tokens:
            return None
        writer, nothing = self._new_writer(), {"choices": [{"finish_reason": "length"}]}
        if not self._call.stream:
            return dump_json(writer.whole(nothing))
        return b"".join(map(encode_event, [*writer.feed(nothing), *writer.close()]))


class ResponsesTranslation(TurnTranslation):
    """A Responses request; its answer is kept for `previous_response_id` where it is to be."""

    def _encode(self, event: Json) -> bytes:
        if event["type"] in ("response.completed", "response.incomplete"):
            self._keep(event["response"])
            return encode_event(event) + b"data: [DONE]\n\n"    # some clients wait for it
        if event["type"] == "response.failed":
            self._keep(event["response"])
        return encode_event(event)

    def _fail(self, exc: GatewayError) -> bytes:
        return b"".join(map(self._encode, self._writer.fail(exc)))

    def _answer(self, completion: Json) -> Json:
        return self._keep(self._writer.whole(completion))

    def _keep(self, answer: Json) -> Json:
        turn = self._turn
        if turn.store:
            self._context.store.keep(answer, turn.items, self._call.owner, turn.carriers)
        return answer


class GeminiTranslation(TurnTranslation):
    """A generateContent request."""

    def _encode(self, event: Json) -> bytes:
        return encode_chunk(event)


class GeminiArrayTranslation(GeminiTranslation):
    """A stream without `alt=sse`: one JSON array, whose elements are sent as they come."""

    def begin(self) -> None:
        super().begin()
        self._mark = b"["

    def _encode(self, event: Json) -> bytes:
        mark, self._mark = self._mark, b",\n"
        return mark + dump_json(event)

    def close(self) -> bytes:
        return super().close() + b"]"

    def _fail(self, exc: GatewayError) -> bytes:
        return self._encode(self._call.dialect.error(exc, self._call.request_id)) + b"]"


class GeminiEmbedding(Translation):
    """An embedContent or batchEmbedContents request, by OpenAI's endpoint."""

    def _encode_request(self) -> bytes:
        return dump_json(embedding_request(self._call.body, self._target.model))

    def _reply(self, data: bytes, completion: Json) -> bytes:
        return dump_json(embedding_reply(completion, "requests" in self._call.body))


def models_in(text: str) -> List[Any]:
    """The entries of OpenRouter's `models` in a body: names that the upstream may choose from.

    If the field is there twice both count: the next reader may take the first or the last.
    """
    found: List[Any] = []

    def note(pairs: List[Tuple[str, Any]]) -> None:      # called for the outermost object last
        found[:] = [value for name, value in pairs if name == "models"]

    try:
        json.loads(text, object_pairs_hook=note)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    return [name for value in found if value is not None
            for name in (value if isinstance(value, list) else [value])]


class ChatDialect:
    """OpenAI's own endpoints: requests are passed on as they are, once they are checked."""
    name = "chat"
    stream_type = "text/event-stream; charset=utf-8"
    id_headers: Sequence[str] = ("x-request-id",)        #: which name a request in its answer

    def __init__(self, path: str, needs: str = "", has_choices: bool = True) -> None:
        self.path = path                 #: under the upstream's base URL
        self._needs = needs              #: a list that must be there
        self.has_choices = has_choices   #: whether an answer without choices is an empty answer
        #: whether it is a conversation, which the next request goes on with
        self.converses = path == "/chat/completions"

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
        code, fault = ("missing_required_parameter", "is missing") if items is None else (
            ("empty_array", "must not be empty") if items == [] else (
                ("invalid_type", "must be a list of objects")))
        if not items or not isinstance(items, list) or (
                not all(isinstance(item, dict) for item in items)):
            raise BadRequest(f"`{self._needs}` {fault}", param=self._needs, code=code)

    def open(self, call: Call, target: Target, context: Context) -> Translation:
        """The call as `target` is asked it, and the way back of its answer; BadRequest."""
        provider = target.provider
        is_changed = provider.preserve_reasoning_content is not None or (
            provider.kind == "iflow" and self.has_choices)
        return (ChatMerge if is_changed else ChatRelay)(call, target, context)

    def thinks(self, body: Json) -> bool:
        """Whether a request asks for reasoning, in whichever provider's words."""
        template, reasoning, thinking = (
            object_of(body.get(name)) for name in ("chat_template_kwargs", "reasoning", "thinking"))
        switches = (body, "enable_thinking"), (template, "enable_thinking"), (reasoning, "enabled")
        effort = reasoning.get("effort") if reasoning else body.get("reasoning_effort")
        return any(holder.get(name) is True for holder, name in switches) or (
            thinking.get("type") not in ("disabled", None)) or (
                isinstance(effort, str) and effort not in ("none", "minimal", ""))

    def has_tools(self, body: Json) -> bool:
        """Whether a request offers tools."""
        return bool(body.get("tools") or body.get("functions"))

    def shows_images(self, call: Call) -> bool:
        """Whether a request shows an image."""
        return any(f'"{kind}"' in call.text for kind in _IMAGE_PARTS) and has_images(call.body)

    def other_models(self, call: Call) -> List[Any]:
        """Models that the upstream may choose from beside the one that is asked for."""
        return models_in(call.text) if "models" in call.body else []

    def keepalive(self, call: Call, began: bool) -> bytes:
        """What is sent in silence, so that the client does not give up."""
        return b": keep-alive\n\n"

    def error(self, exc: GatewayError, request_id: str) -> Json:
        """The body of an error; an upstream's own is passed on with all its keys."""
        if exc.body:
            return {**exc.body, "error": {**exc.body["error"], **non_empty(code=exc.code)}}
        return {"error": {"message": exc.message, "type": exc.type, "param": exc.param,
                          "code": exc.code}}

    def status(self, exc: GatewayError) -> int:
        return 400 if exc.overflow is not None else exc.status

    def fails_in_stream(self, exc: GatewayError) -> bool:
        """Whether an error before the first word is told as a part of the stream."""
        return False

    def error_event(self, exc: GatewayError, request_id: str) -> bytes:
        """An error within a stream; no [DONE] follows (the Python SDK raises APIError on it)."""
        return encode_chunk(self.error(exc, request_id))


class MessagesDialect(ChatDialect):
    """Anthropic Messages."""
    name = "messages"
    id_headers = ("x-request-id", "request-id")

    def open(self, call: Call, target: Target, context: Context) -> Translation:
        turns = call.known.turns if call.known else {}
        turn = MessagesTurn(call.body, profile_of(target), target.model, turns.get(target.model))
        if len(turns) > 3:               # as a rule it is one model; clear() needs no lock
            turns.clear()
        turns[target.model] = turn.known
        thinking = call.body.get("thinking")
        asked = isinstance(thinking, dict) and thinking.get("type") != "disabled"
        turn.hide_reasoning = target.provider.kind == "iflow" and not asked
        return MessagesTranslation(call, turn, target, context)

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

    def __init__(self, path: str, compact: bool = False) -> None:
        super().__init__(path)
        self._compact = compact          #: POST /v1/responses/compact, which does not stream

    def check(self, body: Json) -> None:
        super().check(body)
        if self._compact:
            body.pop("stream", None)

    def open(self, call: Call, target: Target, context: Context) -> Translation:
        store, owner = context.store, call.owner
        turn = ResponsesTurn(call.body, profile_of(target), target.model, now=context.now,
                             recall=lambda ident: store.recall(ident, owner),
                             item=lambda ident: store.item(ident, owner), seal=context.seal,
                             codex=is_codex(call.headers), compact=self._compact)
        return ResponsesTranslation(call, turn, target, context)

    def has_tools(self, body: Json) -> bool:
        """The newest Codex puts them into its first item (clients.md)."""
        items = body.get("input")
        return super().has_tools(body) or isinstance(items, list) and any(
            isinstance(item, dict) and item.get("type") == "additional_tools" for item in items[:3])

    def keepalive(self, call: Call, began: bool) -> bytes:
        return (b'data: {"type":"ping"}\n\n' if is_codex(call.headers) else
                super().keepalive(call, began))

    def fails_in_stream(self, exc: GatewayError) -> bool:
        """Codex asks again after `response.failed`, and not after every status."""
        return isinstance(exc, UpstreamBroke)

    def error(self, exc: GatewayError, request_id: str) -> Json:
        """Clients of Responses take `code` and `param` for strings or null, as OpenAI's are."""
        body = super().error(exc, request_id)
        error, code = body["error"], body["error"].get("code")
        strings = {name: error[name] if isinstance(error.get(name), str) else None
                   for name in ("code", "param")}
        if isinstance(code, int) and not isinstance(code, bool):
            strings["code"] = str(code)
        message, kind = error.get("message"), error.get("type")
        return {**body, "error": {
            **error, "message": message if isinstance(message, str) else exc.message,
            "type": kind if isinstance(kind, str) else exc.type, **strings}}


class GeminiDialect(ChatDialect):
    """Google's generateContent; `model` and `stream` of its requests come from the path."""
    name = "gemini"
    _translation = GeminiTranslation

    def open(self, call: Call, target: Target, context: Context) -> Translation:
        turn = GeminiTurn(call.body, profile_of(target), target.model)
        return self._translation(call, turn, target, context)

    def thinks(self, body: Json) -> bool:
        config = member(body, "generationConfig", dict) or {}
        thinking = member(config, "thinkingConfig", dict) or {}
        return bool(GeminiTurn.wishes(thinking).thinking)

    def shows_images(self, call: Call) -> bool:
        return '"inlineData"' in call.text or '"inline_data"' in call.text or (
            '"fileData"' in call.text or '"file_data"' in call.text)

    def keepalive(self, call: Call, began: bool) -> bytes:
        """A comment breaks gemini-cli and google-genai."""
        return b"\n"

    def status(self, exc: GatewayError) -> int:
        return 400 if exc.overflow is not None else {422: 400, 408: 504, 529: 503}.get(
            exc.status, exc.status)

    def error(self, exc: GatewayError, request_id: str) -> Json:
        return gemini_error(exc, self.status(exc))

    def error_event(self, exc: GatewayError, request_id: str) -> bytes:
        """The bare object, for no client looks for an error in a record."""
        return dump_json(self.error(exc, request_id))


class GeminiArrayDialect(GeminiDialect):
    """A stream as one JSON array."""
    stream_type = "application/json"
    _translation = GeminiArrayTranslation

    def error_event(self, exc: GatewayError, request_id: str) -> bytes:
        return b"[" + super().error_event(exc, request_id) + b"]"


class GeminiEmbeddingDialect(GeminiDialect):
    """embedContent and batchEmbedContents."""

    def open(self, call: Call, target: Target, context: Context) -> Translation:
        return GeminiEmbedding(call, target, context)


CHAT = ChatDialect("/chat/completions", needs="messages")
COMPLETIONS = ChatDialect("/completions")
EMBEDDINGS = ChatDialect("/embeddings", has_choices=False)
MESSAGES = MessagesDialect("/chat/completions")
RESPONSES = ResponsesDialect("/chat/completions")
COMPACT = ResponsesDialect("/chat/completions", compact=True)
GEMINI = GeminiDialect("/chat/completions")
GEMINI_ARRAY = GeminiArrayDialect("/chat/completions")
GEMINI_EMBEDDING = GeminiEmbeddingDialect("/embeddings", has_choices=False)


# === 12. Upstream ============================================================

class Client:
    """Client side of a call: it may disconnect, and may need keep-alives while nothing is sent.

    A StreamLoop looks after both; all other code blocks, in `wait` or with `on_leave` set.
    This class itself stands for our own requests, which have no client.
    """
    sock: Optional[socket.socket] = None     #: watched for the end of the connection
    keepalive_s = 3600.0                 #: silence that is broken by `tick`
    began = False                        #: part of the answer was sent: no other target is tried
    #: the Translation, which knows how to say that it failed
    translation: Optional[Translation] = None
    returned: Sequence[Tuple[str, str]] = ()     #: headers of the upstream that the client gets
    nonblocking = False                  #: the loop sends; unsent bytes stay in `backlog`
    backlog = b""
    left: Optional[Exception] = None     #: why the answer is not needed any more
    _on_leave: Optional[Callable[[Exception], None]] = None

    def __init__(self) -> None:
        self._leaving = threading.Lock()

    def on_leave(self, wake: Optional[Callable[[Exception], None]]) -> None:
        """Set what ends a wait on behalf of this client when it leaves; raises `left`."""
        if self.sock is not None:
            with self._leaving:
                self._on_leave = wake
                if wake is not None and self.left is not None:
                    raise self.left

    def leave(self, reason: Exception) -> None:
        """The client is gone (ClientGone), or the server stops (Stopping)."""
        with self._leaving:
            self.left = self.left or reason
            if self._on_leave is not None:
                self._on_leave(self.left)

    def wait(self, event: threading.Event, seconds: Optional[float] = None) -> bool:
        """Whether `event` is set in time; raises `left`."""
        self.on_leave(lambda reason: event.set())
        try:
            came = event.wait(seconds)
        finally:
            self.on_leave(None)
        if self.left is not None:
            raise self.left
        return came

    def tick(self, now: float) -> None:
        """Called by the loop now and then: send a keep-alive where it is time, without waiting."""

    def flush(self) -> None:
        """Send as much of `backlog` as goes without waiting; ClientGone."""

    def is_stuck(self, now: float) -> bool:
        """Whether the client has taken nothing of `backlog` for too long."""
        return False

    def reply(self, data: bytes, content_type: str, headers: Sequence[Tuple[str, str]]) -> None:
        """Send a plain answer, all of it."""

    def send(self, payload: bytes, framed: Optional[bytes] = None) -> None:
        """A part of a stream: whole records, and the same in HTTP chunks if it came so."""

    def end(self, payload: bytes) -> None:
        """Send the last part of a stream."""


NOBODY = Client()                        #: for our own requests

_POLLIN = getattr(select, "POLLIN", 1)
_POLLOUT = getattr(select, "POLLOUT", 4)
_HANGUP = (getattr(select, "POLLRDHUP", 0) | getattr(select, "POLLHUP", 0)
           | getattr(select, "POLLERR", 0))


class _SelectPoller:
    """The part of select.poll that we use, for Windows, which lacks it."""
    ROOM = 500                           #: Winsock's select() takes 512 sockets

    def __init__(self) -> None:
        self._wanted: Dict[int, int] = {}

    def register(self, fd: int, events: int) -> None:
        self._wanted[fd] = events

    def poll(self, timeout_ms: float) -> List[Tuple[int, int]]:
        found: Set[int] = set()
        wanted = list(self._wanted.items())
        # a call that waits has one socket; a call with many does not wait
        for start in range(0, len(wanted), self.ROOM):
            part = wanted[start:start + self.ROOM]
            reads = [fd for fd, events in part if events & _POLLIN]
            writes = [fd for fd, events in part if events & _POLLOUT]
            found.update(*select.select(reads, writes, reads + writes, timeout_ms / 1000))
        return [(fd, 1) for fd in found]


Poller = getattr(select, "poll", _SelectPoller)

#: The longest wait in one piece.  Where there is poll(), a shutdown of the socket ends a wait for
#: it; on Windows it does not, so a wait that may be cut off has to check now and then.
LOOK_UP_S = 3600.0 if hasattr(select, "poll") else 0.5


def is_writable(sock: socket.socket, timeout_s: float) -> bool:
    """Whether something can be sent in time."""
    poller = Poller()
    poller.register(sock.fileno(), _POLLOUT)
    return bool(poller.poll(timeout_s * 1000))


def has_left(sock: socket.socket, hung_up: bool = False) -> bool:
    """Whether the peer closed; `hung_up`: poll() says so.

    While a pipelined request waits to be read, only poll() can tell.
    """
    try:
        return hung_up or not sock.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True


_BLANK_LINE = Pattern(rb"\r?\n\r?\n")


class HeadReader:
    """Reads heads, and what follows them, on top of `_receive`."""
    buffer = b""                         #: received and not taken yet

    def _receive(self) -> bytes:
        """The next bytes of the connection, b"" at its end."""
        raise NotImplementedError

    def take(self) -> bytes:
        """The next bytes, b"" at the end."""
        if self.buffer:
            data, self.buffer = self.buffer, b""
            return data
        return self._receive()

    def read_head(self, stray: bytes = b"") -> Optional[bytes]:
        """A head without its blank line; b"" where the connection ends, None where it is too large.

        Bytes of `stray` before it are skipped.  What has been searched is not searched again.
        """
        head, searched = bytearray(), 0
        more = self.take()
        while more:
            head += more if head else more.lstrip(stray)
            end = _BLANK_LINE.search(head, searched)
            if end and end.start() <= HEAD_LIMIT_BYTES:
                self.buffer = bytes(head[end.end():])
                return bytes(head[:end.start()])
            if len(head) > HEAD_LIMIT_BYTES:
                self.buffer = bytes(head)
                return None
            self.check_head(head)
            searched = max(0, len(head) - 3)
            more = self._receive()
        self.buffer = bytes(head)
        return b""

    def check_head(self, head: bytearray) -> None:
        """Called with a head that is not complete yet; raises at once what is wrong already."""


#: What a chunk's size is written in.
_HEX = b"0123456789abcdefABCDEF"


class Dechunker:
    """Takes chunked framing off (RFC 9112, 7.1), wherever reads cut it."""

    def __init__(self) -> None:
        self.done = False
        #: the last feed was whole chunks and not the end: it can be forwarded as is
        self.whole = False
        self.surplus = b""               #: what came after the end
        self._line = bytearray()         #: the beginning of a line of framing
        self._left = 0                   #: bytes left of the current chunk, its CRLF included
        self._trailer_bytes = -1         #: -1: the trailers have not begun

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`; ValueError where it is no chunked framing."""
        began_clean = not (self._left or self._line or self._trailer_bytes >= 0)
        if began_clean:                  # as a rule one whole chunk a read
            end = data.find(b"\r\n")
            if 0 < end < 9 and not data[:end].translate(None, _HEX):
                size = int(data[:end], 16)
                if size and len(data) == end + size + 4 and data[-2:] == b"\r\n":
                    self.whole = True
                    return data[end + 2:-2]
        at, out = 0, []
        while at < len(data) and not self.done:
            if self._left > 2:
                piece = data[at:at + self._left - 2]
                out.append(piece)
            elif self._left:
                piece = data[at:at + self._left]
                if not b"\r\n"[2 - self._left:].startswith(piece):
                    raise ValueError("no line end after a chunk")
            else:
                at = self._read_line(data, at)
                continue
            self._left, at = self._left - len(piece), at + len(piece)
        self.surplus += data[at:]
        self.whole = began_clean and not (self._left or self._line or self._trailer_bytes >= 0)
        return b"".join(out)

    def _read_line(self, data: bytes, at: int) -> int:
        """Read a line of framing, or its beginning; the offset of what follows."""
        end = data.find(b"\n", at) + 1 or len(data)
        self._line += data[at:end]
        if len(self._line) > LINE_LIMIT:
            raise ValueError("an endless line")
        if not self._line.endswith(b"\n"):
            return end
        line, self._line = bytes(self._line), bytearray()
        if line[-2:] != b"\r\n" or b"\r" in line[:-2]:
            raise ValueError("a line that does not end in CRLF alone")
        if self._trailer_bytes >= 0:
            self._trailer_bytes += len(line)
            self.done = line == b"\r\n"
            if self._trailer_bytes > LINE_LIMIT:
                raise ValueError("endless trailers")
            return end
        size = line[:-2].partition(b";")[0].rstrip(b" \t")
        if not 0 < len(size) < 16 or size.translate(None, _HEX):
            raise ValueError("no chunk size")
        self._left = int(size, 16)
        if self._left:
            self._left += 2
        else:
            self._trailer_bytes = 0
        return end


def join_headers(pairs: Iterable[Tuple[str, str]]) -> Dict[str, str]:
    """Headers of a head, their names in lower case, repeated ones joined (RFC 9110, 5.3)."""
    headers: Dict[str, str] = {}
    for name, value in pairs:
        name = name.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


#: What is stripped off a header's value, a bare CR included.
BLANKS = " \t\r"

#: What a header's name consists of (RFC 9110, 5.6.2).
_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

_STATUS_LINE = Pattern(r"HTTP/1\.([01]) +([1-9]\d\d)(?: .*)?")


def is_sound_header(name: str, value: str) -> bool:
    """Whether a header can be sent on: no control characters, and not too long."""
    return (0 < len(name) <= HEADER_NAME_CHARS
            and not name.encode("latin-1", "replace").translate(None, _TOKEN)
            and len(value) <= HEADER_VALUE_CHARS and value.isprintable())


class AnswerHead(NamedTuple):
    """What an upstream's head says.  `length` None: chunked, or up to the end of the connection."""
    status: int
    headers: Dict[str, str]              #: of join_headers
    chunked: bool
    length: Optional[int]
    reusable: bool


def _answer_fields(lines: Iterable[bytes]) -> List[Tuple[str, str]]:
    """Names and values of a head, unfolded; a line without a sound name is left out."""
    pairs: List[Tuple[str, str]] = []
    for line in lines:
        name, colon, value = line.partition(b":")
        name = name.rstrip(b" \t")
        if line[:1] in (b" ", b"\t"):
            if pairs:
                pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]} {line.decode('latin-1').strip(BLANKS)}")
        elif colon and name and not name.translate(None, _TOKEN):
            pairs.append((name.decode("ascii"), value.decode("latin-1").strip(BLANKS)))
    return pairs


def parse_answer_head(head: bytes, method: str) -> AnswerHead:
    """Read an answer's head as leniently as browsers do; ValueError (framing: RFC 9112, 6.3).

    http.client's parser, which is the one for e-mail, took a fifth of the time of a plain request.
    """
    first, *lines = head.split(b"\n")
    found = _STATUS_LINE.fullmatch(first.decode("latin-1").rstrip("\r"))
    if not found:
        raise ValueError("no status line")
    if len(lines) > HEADERS_LIMIT:
        raise ValueError("too many headers")
    headers = join_headers(_answer_fields(lines))
    status, token = int(found.group(2)), headers.get("connection", "").lower()
    chunked = headers.get("transfer-encoding", "").lower().rpartition(",")[2].strip() == "chunked"
    length: Optional[int] = None
    if method == "HEAD" or status in (204, 304) or status < 200:
        chunked, length = False, 0
    elif not chunked and "content-length" in headers:
        first_length, *others = map(str.strip, headers["content-length"].split(","))
        is_number = first_length.isascii() and first_length.isdigit() and len(first_length) < 19
        if not is_number or any(other != first_length for other in others):
            raise ValueError("no Content-Length")
        length = int(first_length)
    keeps = "close" not in token if found.group(1) == "1" else "keep-alive" in token
    return AnswerHead(status, headers, chunked, length, keeps and (chunked or length is not None))


class UpstreamConnection(HeadReader):
    """A socket to an upstream.  Raises UpstreamTimeout, OSError, and the reason given to `cut`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.received, self.idle_since = sock, False, 0.0
        self.timeout_s = 60.0            #: longest silence, and time for all of a head
        self._head_until: Optional[float] = None     #: when that is over, while a head is read
        self.cut_by: Optional[Exception] = None
        self._poller = Poller()
        self._poller.register(sock.fileno(), _POLLIN)
        sock.setblocking(False)

    def is_stale(self) -> bool:
        """Whether the other side has closed an idle connection, or sent something unasked."""
        return bool(self.buffer) or self.holds_more() or bool(self._poller.poll(0))

    def holds_more(self) -> bool:
        """Whether TLS has read ahead: poll() does not tell of such data."""
        return isinstance(self.sock, ssl.SSLSocket) and self.sock.pending() > 0

    def cut(self, reason: Exception) -> None:
        """End a wait for this connection on another thread, which then raises `reason`."""
        self.cut_by = reason
        # not SSLSocket's: it would change state that the reading thread uses
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()

    def read_answer_head(self, method: str) -> AnswerHead:
        """The head of an answer, all of it within `timeout_s`; ValueError where it is none."""
        self._head_until = time.monotonic() + self.timeout_s
        # 103 Early Hints and the like come before it
        for _ in range(INTERIM_ANSWERS):
            head = self.read_head()
            if head is None:
                raise ValueError("its head is too large")
            if not head:
                if not b"HTTP/".startswith(self.take()[:5]):
                    raise ValueError("no status line")
                raise ConnectionResetError("closed before the end of the head")
            answer = parse_answer_head(head, method)
            if answer.status >= 200:
                self._head_until = None
                return answer
        raise ValueError("it says nothing but 1xx")

    def _receive(self) -> bytes:
        in_head = self._head_until is not None and self.received
        until = self._head_until if in_head else time.monotonic() + self.timeout_s
        left_s = until - time.monotonic()
        while left_s > 0 and self.cut_by is None:
            if not self.holds_more():
                self._poller.poll(min(left_s, LOOK_UP_S) * 1000)
            data = self._receive_some()
            if data is not None:
                return data
            left_s = until - time.monotonic()
        if in_head and self.cut_by is None:
            raise UpstreamTimeout(f"the upstream gave no complete head in {self.timeout_s:g} s")
        self.check_silence(self.timeout_s)
        return b""

    def take_now(self) -> Optional[bytes]:
        """What `take` gives, None where nothing has come."""
        return self.take() if self.buffer else self._receive_some()

    def _receive_some(self) -> Optional[bytes]:
        try:
            data = self.sock.recv(65536)
        except (BlockingIOError, ssl.SSLWantReadError):
            return None
        except ssl.SSLWantWriteError:
            self._wait_writable()
            return None
        except OSError as exc:
            if self.cut_by is not None:
                raise self.cut_by from None
            if isinstance(exc, ssl.SSLEOFError):         # no close_notify: as good as an end
                return b""
            raise
        if self.cut_by is not None:
            raise self.cut_by
        self.received = self.received or bool(data)
        return data

    def check_silence(self, quiet_s: float) -> None:
        """Raises UpstreamTimeout after `timeout_s` without a byte, or the reason of a cut."""
        if self.cut_by is not None:
            raise self.cut_by
        if quiet_s >= self.timeout_s - 0.001:
            raise UpstreamTimeout(f"the upstream said nothing for {self.timeout_s:g} s")

    def _wait_writable(self) -> None:
        left_s, until = self.timeout_s, time.monotonic() + self.timeout_s
        while not is_writable(self.sock, min(left_s, LOOK_UP_S)):
            left_s = until - time.monotonic()
            if self.cut_by is not None:
                raise self.cut_by
            if left_s <= 0:
                raise UpstreamTimeout(f"the upstream took nothing for {self.timeout_s:g} s")

    def sendall(self, data: bytes) -> None:
        """Send all of a request, or as much as the upstream takes before it answers."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view[:1 << 18]):]
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._wait_writable()
            except (BrokenPipeError, ConnectionResetError):
                if self.cut_by is not None:
                    raise self.cut_by from None
                # it may have answered (413, 401) without reading the body
                if not self.is_stale():
                    raise
                return


class UpstreamResponse:
    """An upstream's answer; closing it gives the connection back, or ends it."""

    def __init__(self, release: Callable[[UpstreamConnection, bool], None],
                 connection: UpstreamConnection, head: AnswerHead, idle_timeout_s: float) -> None:
        self.status, self.headers = head.status, head.headers
        content_type = head.headers.get("content-type", "").lower()
        self.content_type = content_type if is_sound_header("content-type", content_type) else ""
        #: the last read with its chunk framing, where it can be forwarded so
        self.framed: Optional[bytes] = None
        self._release, self.connection = release, connection
        self._chunks = Dechunker() if head.chunked else None
        self._left, self._will_close = head.length, not head.reusable
        self.next_timeout_s: Optional[float] = idle_timeout_s     #: for the body, until it begins
        self._received_all = self._left == 0
        #: received and not decompressed yet; whether any of the rest was
        self._packed, self._unpacked = b"", False
        self._inflate: Any = None
        encoding = head.headers.get("content-encoding", "identity").lower()
        if encoding in ("gzip", "x-gzip", "deflate"):
            self._inflate = zlib.decompressobj(47)       # gzip or zlib, told apart by the header
        elif encoding not in ("identity", ""):
            raise UpstreamGarbled(f"the upstream's answer is encoded as {one_line(encoding, 40)}, "
                                  "which nobody asked for")

    @property
    def complete(self) -> bool:
        """Whether all of the answer was read."""
        return self._received_all and not self._packed

    @property
    def holds_more(self) -> bool:
        """Whether there is something to read that poll() does not tell of."""
        return bool(self._packed) or self.connection.holds_more()

    def read(self) -> bytes:
        """Payload of the next read, b"" at the proper end; UpstreamGarbled when it is cut off."""
        return self._read(self.connection.take) or b""

    def read_now(self) -> Optional[bytes]:
        """The same, None where nothing has come."""
        return self._read(self.connection.take_now)

    def _read(self, take: Callable[[], Optional[bytes]]) -> Optional[bytes]:
        while not self.complete:
            if not self._packed:
                data = self._take(take)
                if data is None:
                    return None
                payload = self._unframe(data) if data else self._end_of_connection()
            if self._inflate is not None:
                self.framed, payload = None, self._unpack(self._packed or payload)
            if payload:
                return payload
        if self._unpacked and not self._inflate.eof:
            raise UpstreamGarbled("the upstream's compressed answer is cut off")
        return b""

    def _take(self, take: Callable[[], Optional[bytes]]) -> Optional[bytes]:
        try:
            data = take()
        except OSError as exc:
            self._will_close = True
            text = f"the connection to the upstream broke: {exc.strerror or exc}"
            raise UpstreamGarbled(text) from None
        # the first byte of the body is here
        if data is not None and self.next_timeout_s is not None:
            self.connection.timeout_s, self.next_timeout_s = self.next_timeout_s, None
        return data

    def _unframe(self, data: bytes) -> bytes:
        if self._chunks is None:
            if self._left is not None:
                self._will_close = self._will_close or len(data) > self._left
                data = data[:self._left]
                self._left -= len(data)
                self._received_all = not self._left
            return data
        try:
            payload = self._chunks.feed(data)
        except ValueError as exc:
            self._will_close = True
            raise UpstreamGarbled(f"the upstream's chunked answer is broken: {exc}") from None
        self.framed = data if self._chunks.whole else None
        self._received_all = self._chunks.done
        self._will_close = self._will_close or bool(self._chunks.surplus)
        return payload

    def _end_of_connection(self) -> bytes:
        self._will_close = True
        if self._chunks is not None or self._left:
            raise UpstreamGarbled("the upstream closed the connection in the middle of its answer")
        self._received_all = True
        return b""

    def _unpack(self, packed: bytes) -> bytes:
        """Decompress the next part, UNPACKED_AT_ONCE bytes at most."""
        try:
            payload = self._inflate.decompress(packed, UNPACKED_AT_ONCE)
        except zlib.error as exc:
            raise UpstreamGarbled(f"the upstream's answer can't be decompressed: {exc}") from None
        self._packed = self._inflate.unconsumed_tail
        self._unpacked = self._unpacked or bool(payload)
        return payload

    def read_all(self, limit: int) -> bytes:
        """The whole body; UpstreamGarbled above `limit` bytes."""
        parts, size = [], 0
        limit = min(limit, UNPACKED_LIMIT_BYTES) if self._inflate is not None else limit
        for payload in iter(self.read, b""):
            parts.append(payload)
            size += len(payload)
            if size > limit:
                raise UpstreamGarbled(f"the upstream's answer is larger than {limit >> 20} MiB")
        return b"".join(parts)

    def close(self) -> None:
        """Keep the connection if the answer was read to its end."""
        if not self.complete and self._chunks is not None and not self._will_close:
            # after [DONE] only the last chunk is missing; it is mostly there already
            self.connection.timeout_s = 0.05
            with contextlib.suppress(GatewayError, ClientGone):      # Stopping is no UpstreamError
                self.read()
        self._release(self.connection, self.complete and not self._will_close)

    def __enter__(self) -> "UpstreamResponse":
        return self

    def __exit__(self, kind: Any, exc: Any, trace: Any) -> None:
        if kind is not None:
            self._will_close = True      # more of the answer may come
        self.close()


class MovedStream:
    """A stream on its way from an upstream to a client; `error`: what ended it too early."""
    #: silence after which nothing more is waited for, if the answer is over
    AFTER_FINISH_S = 3.0

    def __init__(self, response: UpstreamResponse, client: Client, move: Callable[[bytes], bool],
                 is_over: Callable[[], bool]) -> None:
        self._response, self.client, self._move, self._is_over = response, client, move, is_over
        self.connection = response.connection
        self._received_at = time.monotonic()
        self.idle = False                #: all that had come is moved
        self.waits_on: Optional[socket.socket] = None            #: what the loop waits for
        self.error: Optional[BaseException] = None
        self.ended = threading.Lock()    #: held until the end; StreamLoop.run waits for it
        self.ended.acquire()

    def step(self) -> bool:
        """Move what has come; whether there may be more.  Raises what reading and moving raise."""
        client = self.client
        if client.backlog:
            client.flush()
        while not client.backlog:
            payload = self._response.read_now()
            if payload is None:
                self.idle = True
                break
            if not payload or not self._move(payload) or self._response.complete:
                return False
            self._received_at = time.monotonic()
            if not self._response.holds_more:
                break
        return True

    def check(self) -> bool:
        """Whether the end is still to come; UpstreamTimeout, ClientGone."""
        now = time.monotonic()
        if self.client.backlog:
            if self.client.is_stuck(now):
                raise ClientGone
            self._received_at = now      # it is not the upstream that is slow
        quiet_s = now - self._received_at
        is_quiet = quiet_s >= min(self.AFTER_FINISH_S, self.connection.timeout_s)
        if is_quiet and not self.client.backlog and self._is_over():
            return False
        self.connection.check_silence(quiet_s)
        return True

    def end(self, error: Optional[BaseException]) -> None:
        """Wake StreamLoop.run; what belongs to the stream is freed at once, not with the stream."""
        self.error, self.waits_on = error, None
        del self._response, self.client, self.connection, self._move, self._is_over
        self.ended.release()


class StreamLoop:
    """One thread that moves all streams, sends keep-alives and notices clients that left.

    Threads that each wait for their own upstream fight over the interpreter's lock at each chunk:
    with 32 streams that took more than half of the time of a chunk, whatever
    `sys.setswitchinterval` says.
    """
    LOOK_EVERY_S = 0.5                   #: how often all clients and streams are looked at
    #: select(), where there is nothing better (Windows), takes 512 sockets
    ROOM = 500 if selectors.DefaultSelector is selectors.SelectSelector else 1 << 20

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._fresh: Deque[MovedStream] = deque()        #: not waited for yet
        self._streams: Set[MovedStream] = set()
        self._closing, self._lock = False, threading.Lock()
        self._clients: Set[Client] = set()
        #: when the next look is due, 0: there is nothing to look at; how often there is one
        self._look_at, self._look_every_s = 0.0, self.LOOK_EVERY_S
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="streams", daemon=True)
        self._thread.start()

    # clients

    def watch(self, client: Client) -> None:
        """From here on a client gets keep-alives, and `leave` is called when it has left."""
        with self._lock:
            self._clients.add(client)
            # a setting that is the same for all streams
            self._look_every_s = min(self._look_every_s, client.keepalive_s)
            is_first = self._plan_look()
        if is_first:
            self._wake_up()

    def forget(self, client: Client) -> None:
        """From here on no keep-alive is sent."""
        with self._lock:
            self._clients.discard(client)

    def _plan_look(self) -> bool:
        """Plan the next look unless it is planned; whether the loop has to be woken."""
        is_first = not self._look_at
        if is_first:
            self._look_at = time.monotonic() + self._look_every_s
        return is_first

    def _look(self) -> None:
        """Notice clients that left, send keep-alives, end streams that are silent for too long."""
        with self._lock:                 # no client is forgotten meanwhile
            self._look_at = 0.0
            if self._clients or self._streams:
                self._plan_look()
            poller, now = Poller(), time.monotonic()
            by_fd = {client.sock.fileno(): client for client in self._clients}
            for fd in by_fd:
                poller.register(fd, _POLLIN | _HANGUP)
            for fd, events in poller.poll(0) if by_fd else ():
                if has_left(by_fd[fd].sock, bool(events & _HANGUP)):
                    by_fd[fd].leave(ClientGone())
            for client in self._clients:
                client.tick(now)
            streams = list(self._streams)
        for stream in streams:
            if stream.waits_on is not None:      # else it is fresh
                self._serve(stream, stream.check)

    def end_all(self, reason: Exception) -> None:
        """Disconnect all clients and tell them the reason."""
        with self._lock:
            for client in self._clients:
                client.leave(reason)

    # streams

    def run(self, stream: MovedStream) -> None:
        """Move a stream until it has ended; Busy where it can't be taken."""
        with self._lock:
            if self._closing or len(self._streams) >= self.ROOM:
                raise Busy("this system can move no more streams at once")
            self._streams.add(stream)
            self._plan_look()
        connection = stream.connection
        self._fresh.append(stream)
        self._wake_up()
        try:
            stream.ended.acquire()
        except BaseException:            # a signal, in a main thread: the loop still reads it
            connection.cut(ClientGone())
            stream.ended.acquire()
            raise

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):               # full: it will wake up
            self._waker.send(b"!")

    def close(self) -> None:
        """End once the last stream has."""
        with self._lock:
            self._closing = True
        self._wake_up()

    def _run(self) -> None:
        while not self._closing or self._streams:
            look_at = self._look_at
            wait_s = max(0.0, look_at - time.monotonic()) if look_at else None
            for key, _ in self._selector.select(wait_s):
                if key.data is None:
                    self._take_fresh()
                else:
                    self._serve(key.data, key.data.step)
            if self._look_at and self._look_at <= time.monotonic():
                try:
                    self._look()
                except Exception:        # without this thread no stream would move any more
                    log.exception("looking after waiting clients failed")
        for closed in (self._selector, self._waker, self._woken):
            closed.close()

    def _take_fresh(self) -> None:
        """Take over the streams that `run` was given."""
        with contextlib.suppress(OSError):
            self._woken.recv(4096)
        while self._fresh:
            stream = self._fresh.popleft()
            self._serve(stream, stream.check)

    def _serve(self, stream: MovedStream, act: Callable[[], bool]) -> None:
        """Let a stream step or check, then wait for its upstream or a slow client, or end it."""
        error: Optional[BaseException] = None
        try:
            if act():
                return self._wait_for(stream)
        except BaseException as exc:     # it is raised again on the request's own thread
            error = exc
        if stream.waits_on is not None:
            self._selector.unregister(stream.waits_on)
        with self._lock:
            self._streams.discard(stream)
        stream.end(error)

    def _wait_for(self, stream: MovedStream) -> None:
        is_slow = bool(stream.client.backlog)
        sock = stream.client.sock if is_slow else stream.connection.sock
        if sock is not stream.waits_on:
            if stream.waits_on is not None:
                self._selector.unregister(stream.waits_on)
                stream.waits_on = None
            wanted = selectors.EVENT_WRITE if is_slow else selectors.EVENT_READ
            self._selector.register(sock, wanted, stream)
            stream.waits_on = sock


#: OpenSSL's verify codes that have a cause a user can act on.
_VERIFY_HINT = {
    9: "its certificate is not valid yet: is this machine's clock right?",
    10: "its certificate has expired, or this machine's clock is wrong",
    18: "its certificate is self-signed: put it into a file and set `ca_file`",
    19: "its certificate chain ends in an unknown root: set `ca_file`, "
        "or install the CA certificates (ca-certificates)",
    20: "its issuer is unknown: install the CA certificates (ca-certificates, on OpenWrt "
        "ca-bundle), or set `ca_file`",
    62: "its certificate is for another host name"}


def _transport_error(exc: Exception, where: str) -> UpstreamError:
    """The UpstreamError for what sockets, TLS and the parser of heads raise."""
    kind, retry, text = UpstreamUnreachable, None, getattr(exc, "strerror", None) or str(exc)
    if isinstance(exc, ssl.SSLCertVerificationError):
        text, retry = f"TLS failed: {_VERIFY_HINT.get(exc.verify_code, exc.verify_message)}", False
    elif isinstance(exc, socket.timeout):
        kind, text = UpstreamTimeout, "no connection within the time limit (connect_timeout_s)"
    elif isinstance(exc, ssl.SSLError):
        reason = getattr(exc, "reason", None) or str(exc)
        if "WRONG_VERSION" in reason:
            reason = "it does not speak TLS; should the address begin with http://?"
        text = f"TLS failed: {reason}"
    elif isinstance(exc, (socket.gaierror, UnicodeError)):
        text = f"unknown host ({text})"
    elif isinstance(exc, ConnectionRefusedError):
        text = "connection refused; is it running?"
    elif isinstance(exc, ValueError):
        kind, text = UpstreamGarbled, f"the answer is not HTTP ({one_line(exc, 60)})"
    return kind(f"{where}: {text or type(exc).__name__}", should_retry=retry)


def bracketed(host: str) -> str:
    """A host as it stands in front of a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


USUAL_PORTS = {"http": 80, "https": 443}


class Endpoint(NamedTuple):
    """Where a base URL leads."""
    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    @lru_cache(256)
    def of(cls, base_url: str) -> "Endpoint":
        """The parts of a base URL, the port filled in; ValueError where it is no port."""
        parts = urllib.parse.urlsplit(base_url)
        port = parts.port or USUAL_PORTS.get(parts.scheme, 80)
        return cls(parts.scheme, parts.hostname or "", port, parts.path)

    @property
    def authority(self) -> str:
        is_usual = self.port == USUAL_PORTS.get(self.scheme, 80)
        return bracketed(self.host) + ("" if is_usual else f":{self.port}")


def uuid4() -> str:
    """A random UUID (RFC 9562, 5.4); the uuid module is a package of its own on OpenWrt."""
    digits, variant = secrets.token_hex(16), secrets.choice("89ab")
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


class IFlowIdentity:
    """The headers iFlow knows its CLI by: a session and conversation, each request signed."""

    def __init__(self) -> None:
        self.session_id, self.conversation_id = f"session-{uuid4()}", uuid4()

    def headers(self, key: str, now: float) -> List[Tuple[str, str]]:
        """For a request at `now` (epoch seconds); the signature is HMAC-SHA-256 in hex."""
        stamp = str(int(now * 1000))
        signed = hmac.new(key.encode(), f"{IFLOW_AGENT}:{self.session_id}:{stamp}".encode(),
                          "sha256").hexdigest()
        trace = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
        return [("user-agent", IFLOW_AGENT), ("session-id", self.session_id),
                ("conversation-id", self.conversation_id),
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
        return f"{self.scheme}://{bracketed(self.host)}:{self.port}"


def parse_proxy(text: str) -> Proxy:
    """`text` as a Proxy; a bare `host:port` is an HTTP one, as in every proxy variable.

    ValueError shows nothing of `text` but its scheme: a password may stand anywhere in an address
    that can't be read.
    """
    text = text.strip()
    if "://" not in text:
        text = "http://" + text
    scheme = text.partition("://")[0].lower()
    if scheme not in PROXY_PORTS:
        shown = f"with {scheme}://" if re.fullmatch(r"[a-z0-9+.-]{1,12}", scheme) else "like this"
        raise ValueError(f"a proxy address that begins {shown} is not supported; write http://, "
                         "socks5://, socks5h:// (or env)")
    try:
        parts = urllib.parse.urlsplit(text)
        host, port = parts.hostname, parts.port or PROXY_PORTS[scheme]
    except ValueError:
        host, port = None, 0
    odd = re.search(r"[\s\x00-\x1f\x7f]", text)
    if not host or odd or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(f"the proxy's address can't be read; write {scheme}://HOST:PORT or "
                         f"{scheme}://USER:PASSWORD@HOST:PORT, with %40 for @, %2F for /, "
                         "%3A for :, %23 for #")
    user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
    return Proxy(scheme, host, port, user, password)


def proxy_warnings(settings: Settings, providers: Iterable[Provider]) -> List[str]:
    """What is wrong with the proxies that are set, a sentence each: told at the start."""
    warnings = []
    named = [("upstream_proxy", settings.upstream_proxy)] if settings.upstream_proxy_enabled else []
    for where, proxy in named + [(f"provider {p.name}: proxy", p.proxy) for p in providers]:
        try:
            if proxy not in ("", "env"):
                parse_proxy(proxy)
        except ValueError as exc:
            warnings.append(f"{where}: {exc}")
    return warnings


def proxy_for(provider: Provider, settings: Settings, endpoint: Endpoint) -> str:
    """The address of the proxy to `endpoint`, "" for none; this machine never needs one.

    `env` means HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, else the proxy that Windows or
    macOS is set to.
    """
    proxy = provider.proxy or (settings.upstream_proxy if settings.upstream_proxy_enabled else "")
    if not proxy or is_loopback(endpoint.host):
        return ""
    if proxy != "env":
        return proxy
    from urllib.request import getproxies, proxy_bypass      # 2 MB: only where it is used
    proxies = getproxies()
    if is_exempt(endpoint.host, endpoint.port, proxies.get("no", "")) or proxy_bypass(
            f"{bracketed(endpoint.host)}:{endpoint.port}"):
        return ""
    return proxies.get(endpoint.scheme) or proxies.get("all") or ""


def is_exempt(host: str, port: int, no_proxy: str) -> bool:
    """Whether a list like NO_PROXY names `host`; what can't be read in it names nobody.

    Entries: `*`, a name with all below it, an address or a network, each with or without a port.
    """
    address, host = None, host.lower().rstrip(".")
    with contextlib.suppress(ValueError):
        address = parse_address(host)
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        found = re.fullmatch(r"(\[[^\]]*\](?:/\d+)?|[^:]*)(?::(\d+))?", entry)
        name, its_port = found.groups() if found else (entry, None)     # IPv6 without brackets
        if its_port and int(its_port) != port:
            continue
        if name == "*":
            return True
        if address is None:
            name = name.lstrip("*").strip(".")
            if name and (host == name or host.endswith("." + name)):
                return True
        with contextlib.suppress(ValueError):
            if address is not None and address in parse_network(re.sub(r"[\[\]]", "", name)):
                return True
    return False


#: What a proxy means by refusing CONNECT; any other status is shown as it is.
_CONNECT_HINT = {**dict.fromkeys((400, 404, 405, 501), ": is it an HTTP proxy?"),
                 403: ": it does not allow this host or port",
                 **dict.fromkeys((502, 503, 504), ": it can't reach the upstream")}

#: SOCKS5 reply codes (RFC 1928, 6).
_SOCKS_REPLY = {
    1: "it failed for no stated reason", 2: "it does not allow this address",
    3: "it can't reach that network", 4: "it can't reach the upstream",
    5: "the upstream refused the connection", 6: "the upstream is too far away",
    7: "it can't connect", 8: "it does not take this kind of address"}


class ProxyTalk(HeadReader):
    """Has a proxy connect to the upstream; all of it ends before `until` (monotonic).

    CONNECT serves http upstreams as well as https ones, where absolute-form requests would do for
    the former: the proxy sees bytes only, so it can't hold a stream back, its refusals can't be
    taken for the upstream's answers, and its credentials are sent once and never with a request.
    The price: a proxy that tunnels to port 443 alone says so.
    """

    def __init__(self, sock: socket.socket, proxy: Proxy, where: str, until: float) -> None:
        self._sock, self._proxy, self._where, self._until = sock, proxy, where, until
        self._has_login = bool(proxy.user or proxy.password)

    def open(self, endpoint: Endpoint) -> None:
        """Have the proxy connect to `endpoint`; UpstreamUnreachable, OSError."""
        (self._open_http if self._proxy.scheme == "http" else self._open_socks)(endpoint)

    def _failed(self, text: str, should_retry: Optional[bool] = None) -> UpstreamUnreachable:
        return UpstreamUnreachable(f"{self._where}: {text}", should_retry=should_retry)

    def _wants_login(self) -> UpstreamUnreachable:
        if self._has_login:
            return self._failed("it refused the user and password in its address", False)
        address = str(self._proxy).replace("://", "://USER:PASSWORD@")
        return self._failed(f"it wants a user and a password; write {address}", False)

    def _receive(self, limit: int = 4096) -> bytes:
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

    def check_head(self, head: bytearray) -> None:
        if head[:5] != b"HTTP/"[:len(head)]:
            raise self._failed("what it answers is not HTTP; is it an HTTP proxy?")

    def _open_http(self, endpoint: Endpoint) -> None:
        place = f"{bracketed(self._encoded_host(endpoint.host).decode())}:{endpoint.port}"
        head = (f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n"
                f"User-Agent: iflow2api/{__version__}\r\n")
        if self._has_login:
            login = f"{self._proxy.user}:{self._proxy.password}".encode()
            head += f"Proxy-Authorization: Basic {base64.b64encode(login).decode()}\r\n"
        self._sock.sendall(head.encode() + b"\r\n")
        answer = self.read_head() or b"too large"
        self.check_head(bytearray(answer))
        found = re.match(rb"HTTP/1\.\d (\d{3})\b", answer)
        status = int(found.group(1)) if found else 0
        if not found:
            raise self._failed("what it answers is not HTTP/1.1; is it an HTTP proxy?")
        if status == 407:
            raise self._wants_login()
        if not 200 <= status < 300:
            hint = _CONNECT_HINT.get(status, "")
            raise self._failed(f"it refused CONNECT {place} (HTTP {status}{hint})")
        if self.buffer:                  # a web server's page: no request was sent yet
            raise self._failed("it answers with a page of its own; is it an HTTP proxy?")

    def _open_socks(self, endpoint: Endpoint) -> None:
        """RFC 1928, with the login of RFC 1929."""
        address = self._socks_address(endpoint)
        self._sock.sendall(b"\5\2\0\2" if self._has_login else b"\5\1\0")
        version, method = self._receive_exactly(2)
        if version != 5:
            is_http = bytes((version, method)) == b"HT"
            hint = "it speaks HTTP: write http://" if is_http else "is it a SOCKS5 proxy?"
            raise self._failed(f"what it answers is not SOCKS5; {hint}", False)
        if method == 2 and self._has_login:
            user, password = self._proxy.user.encode(), self._proxy.password.encode()
            if len(user) > 255 or len(password) > 255:
                raise self._failed("SOCKS5 takes a user and a password of 255 bytes at most", False)
            self._sock.sendall(b"\1%c%b%c%b" % (len(user), user, len(password), password))
            method = self._receive_exactly(2)[1]
        if method:
            raise self._wants_login()
        self._sock.sendall(b"\5\1\0" + address + struct.pack(">H", endpoint.port))
        version, reply = self._receive_exactly(2)
        if version != 5 or reply:
            raise self._failed(_SOCKS_REPLY.get(reply, f"it failed with code {reply}"))
        kind = self._receive_exactly(2)[1]
        size = {1: 4, 4: 16}.get(kind) or self._receive_exactly(1)[0]
        self._receive_exactly(size + 2)  # the address it connects from, and its port

    def _socks_address(self, endpoint: Endpoint) -> bytes:
        """The address of the upstream; a name is looked up here for socks5, there for socks5h."""
        host = endpoint.host
        if self._proxy.scheme == "socks5":
            try:
                found = socket.getaddrinfo(host, endpoint.port, type=socket.SOCK_STREAM)
            except OSError:
                raise self._failed(
                    f"{host} can't be looked up here; with socks5h:// the proxy does it") from None
            # many proxies have no IPv6
            host = min(found, key=lambda each: each[0] != socket.AF_INET)[4][0]
        for family, kind in ((socket.AF_INET, b"\1"), (socket.AF_INET6, b"\4")):
            with contextlib.suppress(OSError):
                return kind + socket.inet_pton(family, host.partition("%")[0])
        name = self._encoded_host(host)
        if len(name) > 255:
            raise self._failed("the upstream's host name is too long", False)
        return b"\3" + bytes([len(name)]) + name


class Upstream:
    """All HTTP that goes out: connections are kept, TLS is set up once."""

    IDLE_EACH = 128                      #: kept connections to one place

    def __init__(self) -> None:
        #: kept connections by (scheme, host, port, proxy), the latest used last
        self._idle: Dict[Tuple, Deque[UpstreamConnection]] = {}
        self._loop: Optional[StreamLoop] = None
        self._closed = False
        self._tls: Tuple[str, Optional[ssl.SSLContext]] = ("", None)
        self._lock = threading.Lock()
        self.identity = IFlowIdentity()
        self.own_ports: Set[int] = set()     #: ports this process listens on: never an upstream

    def open(self, provider: Provider, settings: Settings, method: str, path: str,
             headers: Iterable[Tuple[str, str]], body: Optional[bytes], client: Client = NOBODY,
             timeout_s: Optional[float] = None,
             content_type: str = "application/json") -> UpstreamResponse:
        """Send one request, return its answer once the head is there.

        Raises UpstreamError (unreachable, TLS, silent, no HTTP) and ClientGone.  A kept connection
        that turns out to be closed before a byte was received is replaced by a new one, once.
        """
        endpoint = Endpoint.of(provider.base_url)
        lines = [f"{method} {endpoint.path}{path} HTTP/1.1", f"Host: {endpoint.authority}",
                 "Accept-Encoding: identity"]
        if body is not None:
            lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers]
        request = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace") + (body or b"")
        first_s = timeout_s or provider.timeout_s or settings.first_byte_timeout_s
        idle_s = timeout_s or provider.timeout_s or settings.idle_timeout_s
        proxy = proxy_for(provider, settings, endpoint)
        key = (endpoint.scheme, endpoint.host, endpoint.port, proxy)
        where = f"{provider.name} ({endpoint.authority})"
        connection = self._take_idle(key)
        while True:
            kept = connection is not None
            if connection is None:
                connection = self._connect(endpoint, settings, where, proxy)
            try:
                connection.received, connection.timeout_s = False, first_s
                client.on_leave(connection.cut)
                connection.sendall(request)
                answer = connection.read_answer_head(method)
                return UpstreamResponse(partial(self._release, key, client), connection, answer,
                                        idle_s)
            except BaseException as exc:
                client.on_leave(None)
                connection.hang_up()
                if not isinstance(exc, (OSError, ValueError)):
                    raise
                if kept and not connection.received:
                    connection = None
                elif isinstance(exc, ConnectionError):
                    raise UpstreamUnreachable(
                        f"{where} closed the connection without an answer") from None
                else:
                    raise _transport_error(exc, where) from exc

    def _take_idle(self, key: Tuple) -> Optional[UpstreamConnection]:
        """A kept connection that is still good: nothing came on it since its last use."""
        while True:
            with self._lock:
                if not self._idle.get(key):
                    return None
                connection = self._idle[key].pop()
            idle_s = time.monotonic() - connection.idle_since
            if idle_s < UPSTREAM_IDLE_S and not connection.is_stale():
                return connection
            connection.hang_up()

    def _release(self, key: Tuple, client: Client, connection: UpstreamConnection,
                 reusable: bool) -> None:
        client.on_leave(None)            # from here on it is not cut
        dropped: Optional[UpstreamConnection] = connection
        if reusable and connection.cut_by is None:
            connection.idle_since = time.monotonic()
            with self._lock:
                idle = self._idle.setdefault(key, deque())
                idle.append(connection)
                is_full = len(idle) > self.IDLE_EACH or self._closed
                dropped = idle.popleft() if is_full else None
        if dropped is not None:
            dropped.hang_up()

    def _connect(self, endpoint: Endpoint, settings: Settings, where: str,
                 address: str) -> UpstreamConnection:
        """A connection to `endpoint`, through the proxy at `address` unless that is empty."""
        try:
            proxy = parse_proxy(address) if address else None
        except ValueError as exc:
            raise UpstreamUnreachable(f"{where}: {exc}", should_retry=False) from None
        sock, place = None, proxy or endpoint
        until = time.monotonic() + settings.connect_timeout_s
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
                context = self._context(settings.ca_file)
                sock = context.wrap_socket(sock, server_hostname=endpoint.host)
            return UpstreamConnection(sock)
        except Exception as exc:
            if sock is not None:
                sock.close()
            if isinstance(exc, UpstreamError):
                raise
            raise _transport_error(exc, where) from exc

    def _refuse_ourselves(self, sock: socket.socket, port: int, where: str,
                          proxied: Optional[Settings]) -> None:
        """A request must not come back to us, nor to a server that runs beside this command."""
        ours = port in self.own_ports or proxied is not None and port == proxied.port
        if ours and sock.getpeername()[0] == sock.getsockname()[0]:
            what = "base_url to the real upstream"
            if proxied is not None:
                what = "upstream_proxy, or the provider's proxy, to a real one"
            raise UpstreamUnreachable(f"{where} is this program's own address; set {what}",
                                      should_retry=False)

    def _context(self, ca_file: str) -> ssl.SSLContext:
        """The one TLS context: making one takes 2 MB and 20 ms."""
        with self._lock:
            if self._tls[1] is None or self._tls[0] != ca_file:
                context = ssl.create_default_context()
                if ca_file:
                    try:
                        context.load_verify_locations(os.path.expanduser(ca_file))
                    except OSError as exc:           # ssl.SSLError is one
                        text = f"ca_file {ca_file}: {exc.strerror or exc}"
                        raise UpstreamUnreachable(text) from None
                self._tls = (ca_file, context)
            return self._tls[1]

    def move(self, response: UpstreamResponse, client: Client, move: Callable[[bytes], bool],
             is_over: Callable[[], bool] = lambda: False) -> None:
        """Give `move` each payload as it comes, until it says False or the answer has ended.

        Some upstreams do not close: where `is_over` says in silence that nothing of worth is
        missing, that is the end.  What is there already is moved at once; then the loop does it,
        and nothing that is sent to `client` waits.
        """
        stream = MovedStream(response, client, move, is_over)
        while not stream.idle:
            if not stream.step():
                return
        client.nonblocking = True
        try:
            self.loop.run(stream)
        finally:
            client.nonblocking = False
        if stream.error is not None:
            try:
                raise stream.error
            finally:
                del stream               # else the error would hold the frame that holds it

    @property
    def loop(self) -> StreamLoop:
        """The loop for streams and clients, started when it is first asked for."""
        with self._lock:
            if self._loop is None:
                self._loop = StreamLoop()
            return self._loop

    def end_all(self, reason: Exception) -> None:
        """Cut off all answers that are on their way, and tell the clients the reason."""
        if self._loop is not None:
            self._loop.end_all(reason)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for connection in [each for idle in self._idle.values() for each in idle]:
                connection.hang_up()
            self._idle.clear()
            if self._loop is not None:
                self._loop.close()


# === 13. Credentials =========================================================
#
# iFlow's login; what is known of it and of its host's ways to fail: iflow.md.

#: The name of the login in the iFlow CLI's own file.
DEFAULT_ACCOUNT = "default"

#: The CLI's port and path, which the login host may insist on.  If the port is taken: a free one.
OAUTH_PORT, OAUTH_PATH = 11451, "/oauth2callback"

#: Longest silence, longest time and most bytes of an answer of the login host; longest wait for
#: the refresh of another process; how long a login may take in the browser.
OAUTH_SILENCE_S, OAUTH_ANSWER_S, OAUTH_ANSWER_BYTES = 20, 30, 1 << 20
OAUTH_LOCK_S, LOGIN_TIMEOUT_S = 120, 300

ACCESS, REFRESH = "oauth_access_token", "oauth_refresh_token"

#: The end of a sentence that says why nothing was changed.
KEPT = "what is stored stays as it is"

#: A field of ours in a login: the tokens are new, their API key still has to be asked for.
KEY_DUE = "iflow2api_key_due"

#: What a logout takes away; the rest of the file is the CLI's.
LOGIN_FIELDS = (*LOGIN_SECRETS, "oauth_expires_at", "api_key_expires_at", KEY_DUE)


def parse_time(value: Any) -> Optional[float]:
    """Epoch seconds of an ISO 8601 text (without a zone: local time, as in JavaScript) or a number.

    Numbers beyond 1e11 are milliseconds.  None for what is no time, or one that no calendar has.
    """
    try:
        if has_type(value, (int, float)):
            at = value / 1000 if value > 1e11 else float(value)
        else:
            text = value.strip()
            text = text[:-1] + "+00:00" if text[-1:] in ("z", "Z") else text
            at = datetime.fromisoformat(text).timestamp()
        format_time(at)
    except (AttributeError, TypeError, ValueError, OverflowError, OSError):
        return None
    return at


def format_time(at: float) -> str:
    """Epoch seconds as ISO 8601, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def with_query(url: str, fields: Mapping[str, str]) -> str:
    return f"{url}{'&' if '?' in url else '?'}{urllib.parse.urlencode(fields)}"


class OAuth:
    """Requests to iFlow's login host; each returns what was checked, or raises LoginFailed."""

    def __init__(self, upstream: Upstream, settings: Callable[[], Settings],
                 clock: Callable[[], float] = time.time) -> None:
        self._upstream, self._settings, self._clock = upstream, settings, clock

    def address(self, redirect_uri: str, state: str) -> str:
        """Where the browser logs in."""
        settings = self._settings()
        return with_query(settings.iflow_auth_url, {
            "loginMethod": "phone", "type": "phone", "client_id": settings.oauth_client_id,
            "redirect": redirect_uri, "state": state})

    def exchange(self, code: str, redirect_uri: str) -> Json:
        """Tokens for the code that the browser came back with."""
        return self._tokens({"grant_type": "authorization_code", "code": code,
                             "redirect_uri": redirect_uri}, code)

    def refresh(self, token: str) -> Json:
        """New tokens for a refresh token, which is used up by this."""
        form = {"grant_type": "refresh_token", "refresh_token": token}
        return {REFRESH: token, **self._tokens(form, token)}

    def user_info(self, access_token: str) -> Json:
        """Whose login it is, and the `apiKey` of the model API, which is never the access token."""
        url = with_query(self._settings().iflow_userinfo_url, {"accessToken": access_token})
        status, answer = self._ask("GET", url, None, [])
        data = object_of(answer.get("data"))
        key = data.get("apiKey")
        if status != 200 or answer.get("success") is False:
            raise self._refusal("the API key", status, answer, access_token)
        if not isinstance(key, str) or not account_keys({"": {"apiKey": key.strip()}}):
            raise LoginFailed("iFlow knows the login, but has no API key for it: see at "
                              "https://iflow.cn whether the account has one, then run: "
                              "python iflow2api.py login", refused=True)
        return {**data, "apiKey": key.strip()}

    def _tokens(self, form: Dict[str, str], secret: str) -> Json:
        """The fields of a login; `secret` is what the host may repeat in an error."""
        settings = self._settings()
        pair = {"client_id": settings.oauth_client_id,
                "client_secret": settings.oauth_client_secret}
        basic = base64.b64encode(":".join(pair.values()).encode()).decode()
        status, answer = self._ask("POST", settings.iflow_token_url,
                                   urllib.parse.urlencode({**form, **pair}).encode(),
                                   [("Authorization", "Basic " + basic)])
        found = {name: answer.get(name) for name in ("access_token", "refresh_token")}
        tokens = {f"oauth_{name}": value for name, value in found.items()
                  if isinstance(value, str) and value}
        if status != 200 or answer.get("success") is False or ACCESS not in tokens:
            raise self._refusal("tokens", status, answer, secret)
        try:
            lasts_s = float(answer.get("expires_in"))
        except (TypeError, ValueError, OverflowError):
            lasts_s = 0.0
        ends = format_time(self._clock() + lasts_s) if 0 < lasts_s < 1e9 else None
        return {**tokens, "oauth_expires_at": ends}

    def _ask(self, method: str, url: str, body: Optional[bytes],
             headers: List[Tuple[str, str]]) -> Tuple[int, Json]:
        """Status and JSON object of an answer; errors name no query, since it may hold a token."""
        base, _, query = url.partition("?")
        if not re.match(r"https?://[^/\s]", base):
            raise LoginFailed(f"{one_line(base, 80)!r} is no address: see iflow_token_url and "
                              "iflow_userinfo_url")
        headers = [("User-Agent", f"iflow2api/{__version__}"), ("Accept", "application/json"),
                   *headers]
        until, data = time.monotonic() + OAUTH_ANSWER_S, bytearray()
        try:
            with self._upstream.open(
                    Provider("iFlow's login host", base), self._settings(), method,
                    query and "?" + query, headers, body, NOBODY, OAUTH_SILENCE_S,
                    "application/x-www-form-urlencoded") as response:
                for part in iter(response.read, b""):
                    data += part
                    if time.monotonic() > until or len(data) > OAUTH_ANSWER_BYTES:
                        raise UpstreamTimeout("iFlow's login host did not finish its answer "
                                              f"within {OAUTH_ANSWER_S} s")
        except UpstreamError as exc:
            raise LoginFailed(f"{one_line(exc.message)}; {KEPT}") from None
        except ValueError:
            raise LoginFailed(f"{one_line(base, 80)!r} has no valid port") from None
        try:
            answer = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            is_page = "html" in response.content_type or data.lstrip()[:1] == b"<"
            what = "an HTML page" if is_page else "something else"
            raise LoginFailed(f"iFlow's login host answered {response.status} with {what} instead "
                              f"of JSON; {KEPT}")
        return response.status, answer

    @staticmethod
    def _refusal(wanted: str, status: int, answer: Json, secret: str) -> LoginFailed:
        """The error for an answer without `wanted`: overloaded, dead, or refused for now."""
        names = ("error_description", "message", "msg", "error")
        texts = [answer.get(name) for name in names]
        text = next((text for text in texts if isinstance(text, str) and text), "no reason")
        said = one_line(text.replace(secret, "…"), 200)
        if answer.get("error") == "invalid_grant":
            return LoginFailed(f"iFlow refused the login as used up or too old ({said}); "
                               "run: python iflow2api.py login", refused=True, dead=True)
        out_of_order = status in (408, 429) or status >= 500
        if out_of_order or status == 200 and answer.get("success") is False:
            return LoginFailed(f"iFlow's login host is overloaded or out of order ({status}: "
                               f"{said}); {KEPT}")
        return LoginFailed(f"iFlow's login host gave no {wanted} ({status}: {said})",
                           refused=400 <= status < 500)


class LoginFile:
    """Where one account's login lies: in the iFlow CLI's file, or in `accounts` of config.json.

    Both have the CLI's field names; everything else in the file survives.  Raises LoginFailed.
    """

    def __init__(self, account: str, config: Optional[ConfigFile]) -> None:
        self.account, self._config = account or DEFAULT_ACCOUNT, config
        self.is_default = self.account == DEFAULT_ACCOUNT
        self.path = os.path.expanduser(IFLOW_FILE)
        self._lock_path = os.path.join(os.path.dirname(self.path), IFLOW_LOCK)
        if not self.is_default:
            if config is None:
                raise LoginFailed("accounts are kept in config.json, and there is none")
            self.path, self._lock_path = config.path, os.path.join(config.folder, "login.lock")
        #: an earlier version wrote new tokens here first
        self._pending_path = f"{self._lock_path}.{sha256(self.account).hex()[:8]}.tokens"

    def read(self) -> Json:
        """The login, {} where there is none."""
        try:
            if self.is_default or self._config is None:
                return read_json_file(self.path)
            return object_of(object_of(self._config.read().get("accounts")).get(self.account))
        except ConfigBroken as exc:
            raise LoginFailed(f"{exc}; repair the file or move it away, nothing was written to "
                              "it") from None

    def update(self, changes: Json) -> None:
        """Change fields of the login in one write; None takes one away."""
        def merge(login: Json) -> Json:
            merged = {**login, **changes}
            return {name: value for name, value in merged.items() if value is not None}

        def edit(raw: Json) -> None:
            accounts = object_of(raw.get("accounts"))
            login = merge(object_of(accounts.pop(self.account, None)))
            raw["accounts"] = {**accounts, **({self.account: login} if login else {})}

        try:
            if self.is_default or self._config is None:
                write_file(self.path, ConfigFile.to_bytes(merge(self.read())))
            else:
                self._config.change(edit)
        except OSError as exc:
            raise LoginFailed(f"{self.path} can't be written: {exc.strerror or exc}") from None

    def pending(self) -> Tuple[Json, str]:
        """Tokens that an earlier version left when it was killed, and the hash of the spent one.

        ({}, "") where there are none.
        """
        def decrypted(place: str, secret: str) -> str:
            if self._config is None or not is_encrypted(secret):
                return secret
            return self._config.vault.decrypt(secret)

        found: Json = {}
        if os.path.exists(self._pending_path):
            with contextlib.suppress(ConfigBroken, CannotDecrypt):
                found = map_secrets(read_json_file(self._pending_path), decrypted)
        tokens = object_of(object_of(found.get("accounts")).get(self.account))
        used = found.get("used")
        is_usable = isinstance(used, str) and isinstance(tokens.get(REFRESH), str)
        return (tokens, str(used)) if is_usable else ({}, "")

    def drop_pending(self) -> None:
        """Remove the file that `pending` reads."""
        with contextlib.suppress(OSError):
            os.unlink(self._pending_path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the `with` no other process refreshes this login, and the file can be written.

        To be entered before the host is asked: its answer uses the old tokens up.
        """
        if self.path.startswith("~"):
            raise LoginFailed("there is no home folder to keep the login in: set HOME")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self._lock_path, OAUTH_LOCK_S))
            except OSError as exc:
                raise LoginFailed(f"{os.path.dirname(self.path)} can't be written: "
                                  f"{exc.strerror or exc}") from None
            if os.path.isdir(self.path):
                raise LoginFailed(f"{self.path} is a folder; move it away")
            if os.path.exists(self.path) and not os.access(self.path, os.W_OK):
                raise LoginFailed(f"{self.path} is read-only, so the login can't be kept")
            yield


def login_end(login: Json) -> Optional[float]:
    """When the login has to be refreshed at the latest, epoch seconds; None: unknown."""
    ends = map(parse_time, (login.get("oauth_expires_at"), login.get("api_key_expires_at")))
    return min((end for end in ends if end is not None), default=None)


# --- refreshing ----------------------------------------------------------------

@dataclass
class RefreshState:
    """How the refreshing of one account goes."""
    at: Optional[float] = None
    ok: Optional[bool] = None
    message: str = ""
    refused: bool = False                 #: the login host answered and said no
    dead_token: str = ""                  #: a refresh token that the host refused for good
    failures: int = 0
    next_at: float = 0.0                  #: monotonic; not before this
    #: tokens that await being written, and the hash of the refresh token that they were got for
    unsaved: Json = field(default_factory=dict)
    unsaved_for: str = ""


class Refresher:
    """Keeps logins fresh: looks now and then, and at once when the API has refused a key.

    A refresh token works only once, so one refreshes at a time, among threads and processes
    (LoginFile.held), and reads the file again before.  New tokens are written before anything else
    is asked.  Clocks only decide when to ask: no login is given up because of one, since a router's
    is wrong until NTP has set it.
    """
    LOOK_S, AHEAD_S = 15 * 60.0, 24 * 3600.0
    BACKOFF_S = (30.0, 60.0, 120.0, 240.0, 300.0)    #: the host is overloaded; then at every look
    RENEWED_S = 60.0                     #: a key refused again within this time was not stale

    def __init__(self, oauth: OAuth, files: Callable[[], List[LoginFile]],
                 changed: Callable[[], None], clock: Callable[[], float] = time.time,
                 monotonic: Callable[[], float] = time.monotonic,
                 log: logging.Logger = log) -> None:
        """`files` are the logins to look after, `changed` is called when one was written."""
        self._oauth, self._files, self._changed = oauth, files, changed
        self._clock, self._monotonic, self._log = clock, monotonic, log
        self._states: Dict[str, RefreshState] = {}
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
            except Exception:            # the thread must go on
                self._log.exception("looking after the iFlow login failed")
            self._wake.wait(wait_s)
            self._wake.clear()

    def state(self, account: str) -> RefreshState:
        return self._states.setdefault(account, RefreshState())

    def look(self) -> float:
        """Refresh what is due; the seconds until the next look."""
        wait_s = self.LOOK_S
        for file in self._files():
            try:
                login = file.read()
            except LoginFailed:          # the gateway reports a broken file
                continue
            state = self.state(file.account)
            if state.dead_token and login.get(REFRESH) != state.dead_token:
                state = self._states[file.account] = RefreshState()  # somebody logged in again
            if not state.unsaved:
                state.unsaved, state.unsaved_for = file.pending()
            if self._is_due(login, state) and not self._closing:
                self._refresh(file, None)
            if state.failures:
                wait_s = min(wait_s, max(1.0, state.next_at - self._monotonic()))
        return wait_s

    def _is_due(self, login: Json, state: RefreshState) -> bool:
        end = login_end(login)
        ends_soon = end is not None and end - self._clock() < self.AHEAD_S
        return self._may_ask(login, state) and (
            login.get(KEY_DUE) is True or bool(state.unsaved) or ends_soon)

    def _may_ask(self, login: Json, state: RefreshState) -> bool:
        """Whether there is a token to ask with that lives, and the host was not asked just now."""
        token = login.get(REFRESH)
        return isinstance(token, str) and token not in ("", state.dead_token) and (
            self._monotonic() >= state.next_at)

    def renew(self, account: str, key: str) -> str:
        """The key to use instead of `key`, which the API refused; "" where a refresh brings none.

        A client that leaves meanwhile does not end it: the requests are our own.
        """
        return "".join(self._refresh(file, key) for file in self._files()
                       if file.account == account)

    def _refresh(self, file: LoginFile, stale: Optional[str]) -> str:
        """Refresh one login, unless another thread or process just did; its key, "" if that failed.

        `stale`: a key that the API has refused.
        """
        state, token = self.state(file.account), ""
        try:
            login = file.read()
            token = login.get(REFRESH) or ""
            if stale is not None and not self._may_ask(login, state):
                key = self._key_of(file.read())          # another thread may just have renewed it
                return key if state.ok or key != stale else ""
            with file.held():
                token = self._save_left_over(file, state) or token
                login = file.read()
                is_done = login.get(REFRESH) != token or stale not in (None, self._key_of(login))
                if not is_done and (stale is not None or self._is_due(login, state)):
                    login = self._ask(file, login, state, stale is not None)
                    self._note(state, file, None, token)
        except LoginFailed as exc:
            self._note(state, file, exc, token)
            return ""
        self._changed()
        return self._key_of(login)

    @staticmethod
    def _key_of(login: Json) -> str:
        key = login.get("apiKey")
        return key.strip() if isinstance(key, str) else ""

    @staticmethod
    def _save_left_over(file: LoginFile, state: RefreshState) -> str:
        """Write tokens that could not be written before; their REFRESH, "" if others are newer."""
        token = ""
        tokens, used = file.pending()
        if not tokens:
            tokens, used = state.unsaved, state.unsaved_for
        if tokens and sha256(str(file.read().get(REFRESH))).hex() == used:
            file.update(tokens)
            token = tokens[REFRESH]
        if tokens:                       # else there is nothing, or it can't be decrypted today
            file.drop_pending()
        state.unsaved = {}
        return token

    def _ask(self, file: LoginFile, login: Json, state: RefreshState, refused_key: bool) -> Json:
        """The login with new tokens and the key that belongs to them, both written."""
        if refused_key or login.get(KEY_DUE) is not True or state.refused:
            tokens = {**self._oauth.refresh(login[REFRESH]), KEY_DUE: True}
            state.unsaved, state.unsaved_for = tokens, sha256(login[REFRESH]).hex()
            file.update(tokens)          # at once: the old ones are used up
            state.unsaved = {}
            login = {**login, **tokens}
        info = self._oauth.user_info(str(login.get(ACCESS)))
        news = {"apiKey": info["apiKey"], "api_key_expires_at": None, KEY_DUE: None}
        file.update(news)
        return {**login, **news}

    def _note(self, state: RefreshState, file: LoginFile, failure: Optional[LoginFailed],
              token: str) -> None:
        """Remember how it went, say so in one line, and say when to try again."""
        state.at, state.ok = self._clock(), failure is None
        state.message = one_line(failure.message) if failure else ""
        state.refused = bool(failure and failure.refused)
        state.failures = state.failures + 1 if failure else 0
        if failure is None:
            state.next_at = self._monotonic() + self.RENEWED_S
            self._log.info("iFlow login %s refreshed", file.account)
        elif failure.dead:
            state.dead_token, state.failures, state.next_at = token, 0, 0.0
            self._log.warning("the iFlow login %s has ended: %s", file.account, state.message)
        else:
            waits = self.BACKOFF_S[:1] if state.unsaved else (*self.BACKOFF_S, self.LOOK_S)
            delay_s = waits[min(state.failures, len(waits)) - 1]
            state.next_at = self._monotonic() + delay_s
            self._log.warning("the iFlow login %s could not be refreshed (next try in %d s): %s",
                              file.account, delay_s, state.message)

    def report(self, logins: Mapping[str, Json]) -> Dict[str, Json]:
        """account -> when its login ends and how the last refresh went; nothing in it is secret."""
        def text(at: Optional[float]) -> Optional[str]:
            return format_time(at) if at is not None else None

        found = {}
        for account, login in logins.items():
            state, token = self.state(account), login.get(REFRESH)
            ended = bool(token) and token == state.dead_token
            if token or login.get("apiKey"):
                found[account] = {
                    "renewable": bool(token) and not ended, "ended": ended,
                    "expires_at": text(login_end(login)), "refreshed_at": text(state.at),
                    "refresh_ok": state.ok,
                    **({"message": state.message} if state.message else {})}
        return found


# --- logging in ----------------------------------------------------------------

LOGIN_PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>iflow2api</title><style>:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:36rem;margin:4rem auto;padding:0 1rem}
</style><h1>TITLE</h1><p>TEXT</p>"""

LOGIN_TITLES = {True: "Logged in / 登录成功", False: "Not logged in / 登录未成功"}


def stop_accepting(server: "Listener") -> None:
    """End the accept loop at once.  Needs no thread: the system may have none to give."""
    server.stopping, stopped = True, False
    while not stopped:
        with contextlib.suppress(OSError):       # a connection wakes the loop up
            socket.create_connection(server.server_address[:2], 0.2).close()
        stopped = server.stopped.wait(0.1)
    server.server_close()


class Listener(http.server.ThreadingHTTPServer):
    """What our servers share: a thread for each connection, and a port that is theirs alone."""
    daemon_threads, block_on_close = True, False
    allow_reuse_address = os.name == "posix"     # on Windows two servers could share the port
    ipv6_only = True                     #: else `::` takes IPv4 as well, where the system can
    stopping = False

    def serve_forever(self, poll_interval: float = 5.0) -> None:
        """Accept connections until stop_accepting()."""
        poller = Poller()
        poller.register(self.fileno(), _POLLIN)
        while not self.stopping:
            if poller.poll(poll_interval * 1000) and not self.stopping:
                self._handle_request_noblock()           # type: ignore[attr-defined]
        self.stopped.set()

    def server_bind(self) -> None:
        """Like HTTPServer's, without its reverse DNS lookup."""
        self.stopped = threading.Event()
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(OSError, AttributeError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self.ipv6_only)
        try:
            socketserver.TCPServer.server_bind(self)
        except (TypeError, UnicodeError):        # a name that can't be encoded
            raise OSError(errno.EINVAL, "Name or service not known") from None
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection failed", exc_info=True)


class _CallbackHandler(http.server.BaseHTTPRequestHandler):
    """Takes the browser that comes back from the login, and tells it how that went."""
    server: "_CallbackServer"
    timeout = 10
    server_version, sys_version = "iflow2api", ""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path != OAUTH_PATH:           # /favicon.ico, or not from a login
            return self.send_error(404)
        ok, text = self.server.flow.visit(query)
        import html
        page = LOGIN_PAGE.replace("TITLE", LOGIN_TITLES[ok]).replace("TEXT", html.escape(text))
        data = page.encode()
        self.send_response(200 if ok else 400)
        for name, value in (
                ("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(data))),
                ("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer"),
                ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'"),
                ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(data)
        finally:
            self.server.flow.close_if_over()     # after the page: the process may end then

    def log_message(self, format: str, *args: Any) -> None:
        """Not logged: the request line holds the code."""


class _CallbackServer(Listener):
    """One of the two listeners, 127.0.0.1 and ::1: `localhost` may mean either to a browser."""

    def __init__(self, address: Tuple[str, int], flow: "LoginFlow") -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.flow = flow
        super().__init__(address, _CallbackHandler)
        threading.Thread(target=self.serve_forever, args=(0.1,), name="login-callback",
                         daemon=True).start()


def listen_for_login(flow: "LoginFlow", port: int) -> List[_CallbackServer]:
    """Listeners on one port of 127.0.0.1 and ::1, `port` if both are free; LoginFailed.

    Both: a code must not go to another program that listens on the port of the other one.
    """
    for wanted in (port, *[0] * 8):
        servers: List[_CallbackServer] = []
        try:
            servers.append(_CallbackServer(("127.0.0.1", wanted), flow))
            servers.append(_CallbackServer(("::1", servers[0].server_port), flow))
            return servers
        except OSError as exc:
            taken = (errno.EADDRINUSE, errno.EACCES, getattr(errno, "WSAEADDRINUSE", -1))
            if servers and exc.errno not in taken:
                return servers           # no IPv6 here
            for server in servers:
                stop_accepting(server)
    raise LoginFailed("no port of this machine can be listened on; log in with: "
                      "python iflow2api.py login --paste")


class LoginFlow:
    """One login, from the address to open to its end, with which its listeners are closed.

    `state`: waiting, done or failed; `message` says how it went; `ended` is set at the end.
    """

    def __init__(self, oauth: OAuth, file: LoginFile, changed: Callable[[], None],
                 listen: bool = True, timeout_s: float = LOGIN_TIMEOUT_S,
                 port: Optional[int] = None) -> None:
        """LoginFailed where the login could not be stored."""
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
        """The browser came back: whether it worked, and what to tell it.

        A request with another state changes nothing.
        """
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
        """The user gives the address the browser ended on, or the code in it.  LoginFailed."""
        text = text.strip()
        alone = re.fullmatch(r"(?:code=)?([\w.~+/=-]{8,512})", text, re.ASCII)
        code = alone.group(1) if alone and OAUTH_PATH not in text else self._code(
            self._pasted(text), False)
        try:
            self._finish(code, False)
        finally:
            self.close_if_over()

    @staticmethod
    def _pasted(text: str) -> Mapping[str, List[str]]:
        """The query in a pasted address, empty where that is not our callback's."""
        address, mark, query = text.partition("?")
        ours = re.fullmatch(r"((https?://)?(localhost|127\.0\.0\.1|\[::1\])(:\d+)?" + OAUTH_PATH
                            + ")?/?", address)
        return urllib.parse.parse_qs((query if ours else "" if mark else address).partition("#")[0])

    def _code(self, query: Mapping[str, List[str]], by_browser: bool) -> str:
        """The code of a callback; LoginFailed, `refused` where the login host says no."""
        facts = {name: values[-1] for name, values in query.items()}
        sound = re.fullmatch(r"[!-~]{1,2000}", facts.get("code", "")) or "error" in facts
        if not {"code", "error"} & set(facts) or not sound and not by_browser:
            raise LoginFailed("this request is no answer to a login" if by_browser else
                              "that is neither the address the browser ended on nor the code in "
                              f"it; it looks like {self._redirect_uri}?code=…&state=…")
        refused = "code" not in facts and not by_browser     # pasted: it is about this login
        state = facts.get("state", "").encode("utf-8", "replace")
        if not refused and not hmac.compare_digest(state, self._secret.encode()):
            raise LoginFailed("this answer belongs to another login (its state is wrong): open the "
                              "address of this one")
        if "code" not in facts:
            said = one_line(facts.get("error_description") or facts["error"], 200)
            raise LoginFailed(f"iFlow did not log you in: {said}; nothing was changed",
                              refused=True)
        return facts["code"]

    def _finish(self, code: str, final: bool) -> None:
        """Exchange, user info, file; a second caller waits for the first's result.  LoginFailed."""
        with self._lock:
            if self.state != "waiting":
                return
            try:
                tokens = self._oauth.exchange(code, self._redirect_uri)
                info = self._oauth.user_info(tokens[ACCESS])
                changes = {REFRESH: None, **tokens, "apiKey": info["apiKey"], KEY_DUE: None,
                           "api_key_expires_at": None, "selectedAuthType": "oauth-iflow"}
                with self.file.held():
                    # iFlow's key must not go to another service that was set before
                    if self.file.read().get("selectedAuthType") == "openai-compatible":
                        changes.update(baseUrl=None, modelName=None)
                    self.file.update(changes)
            except LoginFailed as exc:
                if final or not exc.refused:
                    self.state, self.message = "failed", exc.message
                raise
            names = ("username", "email", "phone")
            who = next((str(info[name]) for name in names if info.get(name)), "")
            name = " as " + one_line(who, 80) if who else ""
            self.message = f"logged in to iFlow{name}; you can close this page / 可以关闭此页面"
            self.state = "done"
        self._changed()

    def fail(self, message: str) -> None:
        """End a login that still waits; `message` says why."""
        if self.state == "waiting":
            self.state, self.message = "failed", message
        self.close_if_over()

    def close_if_over(self) -> None:
        """Close the listeners and set `ended`, unless the login still waits."""
        if self.state != "waiting":
            self._timer.cancel()
            with self._lock:
                servers, self._servers = self._servers, []
            for server in servers:
                stop_accepting(server)
            self.ended.set()


class Logins:
    """Logging in, for the command line and the admin page alike; one attempt at a time."""

    def __init__(self, config: Optional[ConfigFile], oauth: OAuth,
                 accounts: Callable[[], Iterable[str]], changed: Callable[[], None],
                 log: logging.Logger = log) -> None:
        self._config, self._oauth, self._accounts = config, oauth, accounts
        self._on_change = changed
        self.refresher = Refresher(oauth, self.files, changed, log=log)
        self.flow: Optional[LoginFlow] = None

    def files(self) -> List[LoginFile]:
        """The logins there may be."""
        names = (DEFAULT_ACCOUNT, *self._accounts()) if self._config is not None else ()
        return [LoginFile(name, self._config) for name in names]

    def start(self, account: str = "", paste: bool = False, timeout_s: float = LOGIN_TIMEOUT_S,
              port: Optional[int] = None) -> Json:
        """Begin a login; an earlier attempt ends.  LoginFailed."""
        if not re.fullmatch(r"[\w.@+-]{0,64}", account):
            raise LoginFailed("an account's name has letters, digits and . @ + - _ only, at most "
                              "64")
        if self.flow is not None:
            self.flow.fail("another login was begun")
        self.flow = LoginFlow(self._oauth, LoginFile(account, self._config), self._changed,
                              not paste, timeout_s, port)
        return self.status()

    def _changed(self) -> None:
        self._on_change()
        self.refresher.wake()

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

#: What opens an address, tried in turn; `webbrowser` is Python's own module.
BROWSERS: Dict[str, Tuple[Tuple[str, ...], ...]] = {
    "termux": (("termux-open-url",), ("termux-open",)),
    "wsl": (("wslview",), ("rundll32.exe", "url.dll,FileProtocolHandler")),
    "desktop": (("xdg-open",), ("webbrowser",)), "headless": ()}


def browser_platform(environ: Mapping[str, str], system: str = sys.platform) -> str:
    """Which row of BROWSERS is this machine's.

    Without a display `webbrowser` would start a browser in the terminal.
    """
    if environ.get("TERMUX_VERSION") or "com.termux" in environ.get("PREFIX", ""):
        return "termux"                  # sys.platform: "linux", from Python 3.13 on "android"
    if environ.get("WSL_DISTRO_NAME") or environ.get("WSL_INTEROP"):
        return "wsl"
    display = any(environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    return "desktop" if display or system in ("win32", "cygwin", "darwin") else "headless"


def run_opener(command: Sequence[str]) -> bool:
    """Start one of BROWSERS; whether it seems to have worked (some run as long as the browser)."""
    if command[0] == "webbrowser":
        try:
            import webbrowser            # not on OpenWrt
            return webbrowser.open(command[-1])
        except (ImportError, OSError, ValueError):
            return False
    import subprocess
    quiet = subprocess.DEVNULL
    try:
        process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet,
                                   start_new_session=True)
        return process.wait(3) == 0
    except subprocess.TimeoutExpired:
        return True
    except OSError:
        return False


def open_browser(url: str, environ: Mapping[str, str],
                 run: Callable[[Sequence[str]], bool] = run_opener,
                 system: str = sys.platform) -> bool:
    """Show `url` in a browser; False where there is none."""
    return any(run((*command, url)) for command in BROWSERS[browser_platform(environ, system)])


# === 14. Services ============================================================

#: Stands for a place where there is no limit.
_NO_WAIT = contextlib.nullcontext()


class _Ticket(threading.Event):
    """Set when a place is granted."""
    granted = False


class Slots:
    """Places at one upstream, first come first served; `limit` 0 is no limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.active = limit, 0
        self._waiting: Deque[_Ticket] = deque()
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def load(self) -> int:
        return self.active + len(self._waiting)

    def resize(self, limit: int) -> None:
        with self._lock:
            self.limit = limit
            self._hand_over()

    @contextlib.contextmanager
    def hold(self, client: Client, settings: Settings, name: str) -> Iterator[None]:
        """A place for the time of the `with`; ClientGone, Busy.

        Busy: the queue is full, or no place came free in time.
        """
        ticket: Optional[_Ticket] = None
        with self._lock:
            if not self.limit or self.active < self.limit and not self._waiting:
                self.active += 1
            elif len(self._waiting) >= settings.queue_limit:
                raise Busy(f"{name} is busy and {len(self._waiting)} requests wait already",
                           retry_after_s=DEFAULT_RETRY_AFTER_S)
            else:
                ticket = _Ticket()
                self._waiting.append(ticket)
        try:
            if ticket is not None and not client.wait(ticket, settings.queue_timeout_s):
                raise Busy(f"no place at {name} came free within {settings.queue_timeout_s:g} s",
                           retry_after_s=DEFAULT_RETRY_AFTER_S)
            yield
        finally:
            with self._lock:
                if ticket is None or ticket.granted:
                    self.active -= 1
                else:
                    self._waiting.remove(ticket)
                self._hand_over()

    def _hand_over(self) -> None:
        while self._waiting and (not self.limit or self.active < self.limit):
            self.active += 1
            ticket = self._waiting.popleft()
            ticket.granted = True
            ticket.set()


def wait_for(client: Client, seconds: float) -> None:
    """Let time pass before a retry; raises when the client leaves."""
    client.wait(threading.Event(), seconds)


# --- limits ----------------------------------------------------------------------

class Window:
    """How much there was in the last `span_s` seconds.

    Exact for limits up to 20; above, amounts are summed for each twentieth of the span.
    """

    def __init__(self, span_s: float, limit: int) -> None:
        self.span_s, self.limit = span_s, limit
        #: [time, amount], the oldest first; a deque would take 600 bytes for each address
        self._marks: List[List[float]] = []
        self._sum = 0

    def used(self, now: float) -> int:
        marks, gone = self._marks, 0
        while gone < len(marks) and marks[gone][0] <= now - self.span_s:
            self._sum -= int(marks[gone][1])
            gone += 1
        del marks[:gone]                 # at once: a journal may have left any number of them
        return self._sum

    def add(self, now: float, amount: int) -> None:
        """Count an amount; a twentieth is dated by its end, so that the limit always holds."""
        is_dated = bool(self._marks) and now <= self._marks[-1][0]
        self.put(now + self.span_s / 20 if self.limit > 20 and not is_dated else now, amount)

    def put(self, mark: float, amount: int) -> None:
        """Count an amount until `span_s` after `mark`, or after the last mark if that is later."""
        self._sum += amount
        if self._marks and mark <= self._marks[-1][0]:
            self._marks[-1][1] += amount
        else:
            self._marks.append([mark, amount])

    def wait_s(self, now: float) -> float:
        """Seconds until there is room for one more, 0.0 where there is."""
        over = self.used(now) - self.limit
        if over >= 0:
            for mark, amount in self._marks:
                over -= int(amount)
                if over < 0:
                    return mark + self.span_s - now
        return 0.0

    def left(self, now: float) -> int:
        return max(0, self.limit - self.used(now))

    def reset_s(self, now: float) -> float:
        """Seconds until all of it is forgotten."""
        return max(0.0, self._marks[-1][0] + self.span_s - now) if self.used(now) else 0.0


#: Seconds since the end of an hour, and its requests, tokens and cost (in millionths).
Spent = List[Tuple[float, int, int, int]]


class Meter:
    """What a key or an address uses of its limits; `spent`: what it had used before the start."""

    def __init__(self, name: str, spent: Callable[[], Spent] = list) -> None:
        self.name, self.active, self._spent = name, 0, spent
        self.windows: Dict[str, Window] = {}
        self.limits: Mapping[str, int] = {}

    def adopt(self, limits: Mapping[str, int], now: float) -> "Meter":
        """Measure by `limits` from now on; what was used stays used."""
        if limits != self.limits:
            self.limits = limits
            self.windows = {name: self.windows.get(name) or self._window(name, now)
                            for name in LIMIT_SPANS if name in limits}
            for name, window in self.windows.items():
                window.limit = int(limits[name] * (BUDGET_UNIT if name in BUDGETS else 1))
        return self

    def _window(self, name: str, now: float) -> Window:
        window = Window(LIMIT_SPANS[name], 0)
        for ago_s, *amounts in self._spent() if name in LIMITS_KEPT else ():
            if ago_s < window.span_s:
                window.put(now - ago_s, amounts[("rpd", "tpd").index(name) if name not in BUDGETS
                                                else 2])
        return window

    def count(self, now: float, name: str, amount: int) -> None:
        if name in self.windows:
            self.windows[name].add(now, amount)

    def check(self, now: float) -> None:
        """RateLimited where no further request fits in; Codex reads the time out of the text."""
        waits = {name: window.wait_s(now) for name, window in self.windows.items()}
        most = self.limits.get("concurrency", 0)
        if most and self.active >= most:
            waits = {"concurrency": 1.0}
        for name, wait_s in waits.items():
            if wait_s > 0:
                raise RateLimited(f"rate limit of {self.name}: {self.limits[name]} "
                                  f"{LIMIT_WORDS[name]}; try again in {wait_s:.1f}s",
                                  retry_after_s=wait_s)

    def headers(self, now: float) -> List[Tuple[str, str]]:
        """`x-ratelimit-…` as OpenAI's.

        Of several windows for requests: the one with the fewest left, then the longest wait.
        """
        found: List[Tuple[str, str]] = []
        requests = [window for name, window in self.windows.items() if name[0] == "r"]
        tightest = min(requests, default=None, key=lambda window: (
            window.left(now), -window.wait_s(now), -window.reset_s(now)))
        for what, window in (("requests", tightest), ("tokens", self.windows.get("tpd"))):
            if window is not None:
                found += [(f"x-ratelimit-limit-{what}", str(window.limit)),
                          (f"x-ratelimit-remaining-{what}", str(window.left(now))),
                          (f"x-ratelimit-reset-{what}", f"{window.reset_s(now):.1f}s")]
        return found


class RateLimiter:
    """The meters of keys and addresses; of addresses the ADDRESSES_LIMIT seen last.

    `spent` tells what a key had used of its day before a restart; addresses start at zero.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic,
                 spent: Callable[[str], Spent] = lambda key: []) -> None:
        self._clock, self._lock, self._spent = clock, threading.Lock(), spent
        self._keys: Dict[str, Meter] = {}
        self._addresses: Dict[str, Meter] = {}

    def of_key(self, key: ClientKey) -> Meter:
        with self._lock:
            meter = self._keys.get(key.name)
            if meter is None:
                meter = Meter(f"the key {key.name}", lambda: self._spent(key.name))
                self._keys[key.name] = meter
            return meter.adopt(key.limits, self._clock())

    def of_address(self, address: str, limits: Mapping[str, int]) -> Meter:
        with self._lock:
            meter = self._addresses.get(address) or Meter("your address")
            remember(self._addresses, address, meter, ADDRESSES_LIMIT)
            return meter.adopt(limits, self._clock())

    def used(self, key: ClientKey) -> Dict[str, float]:
        """What a key has used of each of its limits."""
        meter = self.of_key(key)
        with self._lock:
            used = {name: window.used(self._clock()) / (BUDGET_UNIT if name in BUDGETS else 1)
                    for name, window in meter.windows.items()}
        return {**used, **({"concurrency": meter.active} if "concurrency" in meter.limits else {})}

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
                for name in ("rpm", "rph", "rpd"):
                    meter.count(now, name, 1)
        try:
            yield
        finally:
            with self._lock:
                for meter in meters:
                    meter.active -= 1

    def spend(self, meters: Sequence[Meter], tokens: int, cost: float) -> None:
        """Count tokens, and what they cost, once they are known.

        The request that goes over a limit is answered, the next one is not.
        """
        with self._lock:
            for meter in meters if tokens else ():
                meter.count(self._clock(), "tpd", tokens)
                for name in BUDGETS:
                    meter.count(self._clock(), name, int(cost * BUDGET_UNIT + 0.5))

    def headers(self, meters: Sequence[Meter]) -> List[Tuple[str, str]]:
        """Meter.headers of the first meter that has any."""
        with self._lock:
            found = (meter.headers(self._clock()) for meter in meters)
            return next((lines for lines in found if lines), [])


# --- what is remembered ------------------------------------------------------------

class Store:
    """Values by name, at most LIMIT of them and of LIMIT_SIZE in all: the oldest go first."""
    LIMIT, LIMIT_SIZE = 10 ** 9, 10 ** 9

    def __init__(self) -> None:
        self._kept: Dict[Any, Tuple[Any, int]] = {}      #: name -> value, its size
        self._size, self._lock = 0, threading.RLock()

    def put(self, name: Any, value: Any, size: int) -> None:
        with self._lock:
            self.drop(name)
            self._kept[name] = value, size
            self._size += size
            while len(self._kept) > self.LIMIT or self._size > self.LIMIT_SIZE:
                self.drop(next(iter(self._kept)))

    def drop(self, name: Any) -> Any:
        """Forget a value, and return it; None: there is none."""
        with self._lock:
            value, size = self._kept.pop(name, (None, 0))
            self._size -= size
            return value

    def get(self, name: Any) -> Any:
        return self._kept.get(name, (None, 0))[0]


class ReasoningCache(Store):
    """Carriers by call_digest, for clients that drop them; sizes are characters."""
    LIMIT, LIMIT_SIZE = 2000, 8 << 20

    def __init__(self) -> None:
        super().__init__()
        self.origins: Set[str] = set()   #: of upstreams that want more back than reasoning

    def keep(self, ident: str, carrier: Json) -> None:
        if "of" in carrier:
            self.origins.add(carrier["of"])
        self.put(ident, carrier, len(dump_text(carrier)))

    def recall(self, ident: str) -> Json:
        return self.get(ident) or {}


class Conversations(Store):
    """What is remembered of long requests, by how they begin; the least recently used goes first.

    Sizes are characters of requests; in memory it is up to five times as much.
    """
    LEAST_CHARS, LIMIT_SIZE = 8000, 2 << 20

    def of(self, text: str, names: Sequence[Optional[str]]) -> Optional[Remembered]:
        """What earlier requests of the conversation left, for this one (`text`) to use and add to.

        `names` tell the conversation from others that begin alike.  None: too short, or too long.
        """
        if not self.LEAST_CHARS <= len(text) <= self.LIMIT_SIZE:
            return None
        with self._lock:
            known = self.get((text[:2000], *names)) or Remembered()
            self.put((text[:2000], *names), known, len(text))
        return known


class _Kept(NamedTuple):
    """A response in the store."""
    at: float
    response: Json
    items: List[Json]
    owner: str
    carriers: Json                       #: item id -> what of it is kept beside what is shown

    @property
    def conversation(self) -> List[Json]:
        """Input and output items, the reasoning as the upstream wants it back.

        A compacted output stands for its input, too.
        """
        output = [{**item, **self.carriers.get(item.get("id"), {})}
                  for item in self.response["output"]]
        is_compacted = any(item.get("type") == "compaction" for item in output)
        return output if is_compacted else self.items + output


class ResponseStore(Store):
    """Answers of Responses with what they answered, for `previous_response_id`; sizes are bytes.

    Each belongs to an owner (`owner_of`); nobody else finds it.
    """
    LIMIT, LIMIT_SIZE, KEPT_S = 1000, 32 << 20, 24 * 3600

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._clock = clock
        #: owner -> item id -> item, as of the last look
        self._items: Dict[str, Dict[str, Json]] = {}

    def keep(self, response: Json, items: List[Json], owner: str = "",
             carriers: Optional[Json] = None) -> None:
        """`items` are the whole input, of earlier responses, too."""
        size = sum(len(dump_json(part)) for part in (response, items, carriers))
        with self._lock:
            kept = _Kept(self._clock(), response, items, owner, carriers or {})
            self.put(response["id"], kept, size)
            while self._kept and self._is_old(next(iter(self._kept))):
                self.drop(next(iter(self._kept)))

    def drop(self, name: str) -> Any:
        with self._lock:
            self._items = {}
            return super().drop(name)

    def _is_old(self, ident: str) -> bool:
        return self._clock() - self.get(ident).at >= self.KEPT_S

    def find(self, ident: str, owner: str = "") -> Optional[_Kept]:
        """What is kept under an id, None for another owner."""
        with self._lock:
            found = self.get(ident)
            return None if found is None or found.owner != owner or self._is_old(ident) else found

    def recall(self, ident: str, owner: str = "") -> Optional[List[Json]]:
        """Input and output items of a response: the conversation up to it."""
        found = self.find(ident, owner)
        return found.conversation if found else None

    def item(self, ident: str, owner: str = "") -> Optional[Json]:
        """One item by its id, for `item_reference`."""
        with self._lock:
            if owner not in self._items:         # a request may name any number of them
                self._items[owner] = {
                    item["id"]: item for kept, _ in self._kept.values() if kept.owner == owner
                    for item in kept.conversation if isinstance(item.get("id"), str)}
            return self._items[owner].get(ident)


#: A model's name is kept under so many of its characters.
SCALE_NAME_CHARS = 200


def line_through(pairs: Sequence[Sequence[float]]) -> Tuple[float, float]:
    """Slope and offset of what a model counts over what we estimate, from pairs of both.

    Least squares of counted = slope * estimate + offset.  Later pairs weigh more, and longer
    prompts less, for an estimate is off by some per cent.  Without pairs it is 1 and 0, give or
    take 0.3 and 50: short prompts alone say much of the offset and little of the slope.  What no
    tokenizer makes of a prompt, 2.5 for one, is offset: the upstream puts in a prompt of its own.
    """
    own = max((counted - 2.5 * estimate for estimate, counted in pairs), default=0.0)
    ones, squares = 1 / (50 + max(own, 0)) ** 2, 1 / 0.3 ** 2
    products = excesses = leanings = 0.0
    for age, (estimate, counted) in enumerate(reversed(pairs)):
        weight, excess = 0.85 ** age / (1 + 0.02 * estimate) ** 2, counted - estimate
        ones += weight
        products += weight * estimate
        squares += weight * estimate * estimate
        excesses += weight * excess
        leanings += weight * estimate * excess
    area = ones * squares - products * products
    return (1 + (ones * leanings - products * excesses) / area,
            (squares * excesses - products * leanings) / area)


class TokenScale:
    """What models count for what we estimate: learnt from prompt_tokens, kept over a restart."""
    LIMIT = 500                          #: models; the one not heard of for longest goes first
    SURE, EVERY = 10, 8                  #: with SURE pairs of both only each EVERYth is estimated
    #: of the slope; what is beyond them by more than a prompt of the upstream's own (in tokens)
    #: is no matter of counting
    BOUNDS, OWN_PROMPT = (0.2, 5.0), 20_000
    WRITE_S = 5.0

    def __init__(self, path: str = "", clock: Callable[[], float] = time.monotonic,
                 log: logging.Logger = log) -> None:
        self._path, self._clock, self._written_at, self._dirty = path, clock, -1e9, False
        self._log, self._lock = log, threading.Lock()
        #: model -> the latest pairs of estimated and counted tokens
        self._pairs: Dict[str, List[List[int]]] = self._load()
        self._passed: Dict[str, int] = {}        #: answers of it since, which taught nothing

    def _load(self) -> Dict[str, List[List[int]]]:
        close_to_others(self._path)
        try:
            raw = read_json_file(self._path) if self._path else {}
        except ConfigBroken:             # it will be learnt again
            return {}
        shape = list_of(list_of(number(1, 10 ** 9, True)))
        sound = {}
        for name, pairs in raw.items():
            with contextlib.suppress(ValueError):
                if all(len(pair) == 2 for pair in shape(pairs, name)):
                    sound[name[:SCALE_NAME_CHARS]] = pairs[-self.SURE:]
        return dict(list(sound.items())[-self.LIMIT:])

    def scaled(self, model: str, estimate: int) -> int:
        """`estimate` as the model would count it."""
        pairs = self._pairs.get(model)
        if not pairs:
            return estimate
        slope, offset = line_through(pairs)
        low, high = self.BOUNDS
        return max(int(estimate * min(max(slope, low), high) + offset + 0.5), 0)

    def is_worth(self, model: str) -> bool:
        """Whether there is something to learn from the next answer."""
        return len(self._pairs.get(model, ())) < self.SURE or (
            self._passed.get(model, 0) % self.EVERY == self.EVERY - 1)

    def pass_over(self, model: str) -> None:
        """An answer that nothing was learnt from."""
        with self._lock:
            if model in self._pairs:
                remember(self._passed, model, self._passed.get(model, 0) + 1, self.LIMIT)

    def learn(self, model: str, estimate: int, counted: int) -> None:
        low, high = self.BOUNDS
        if not estimate * low <= counted <= estimate * high + self.OWN_PROMPT:
            return self.pass_over(model)
        with self._lock:
            pairs = [*self._pairs.get(model, ()), [estimate, counted]]
            remember(self._pairs, model, pairs[-self.SURE:], self.LIMIT)
            self._passed.pop(model, None)
            self._dirty = True
            if self._clock() - self._written_at >= self.WRITE_S:
                self._write()

    def _write(self) -> None:
        self._written_at, self._dirty = self._clock(), False
        try:
            if self._path:
                write_file(self._path, dump_json(self._pairs))
        except OSError as exc:
            self._log.warning("%s: %s (what was learnt of token counts lasts for this run)",
                              self._path, exc.strerror or exc)
            self._path = ""

    def close(self) -> None:
        with self._lock:
            if self._dirty:
                self._write()


class Lane:
    """What the calls to one provider share: places, whose turn of its keys it is, which of them
    rest, and what its answers have taught of its models.
    """
    CAPS_LIMIT = 500                     #: models whose cap on max_tokens is remembered

    def __init__(self, provider: Provider, clock: Callable[[], float], scale: TokenScale) -> None:
        self.provider, self.rests, self._scale = provider, Rests(clock), scale
        self.slots = Slots(0)
        self._key_slots: Dict[str, Slots] = {}           #: where each key has a limit of its own
        self._turn = 0
        #: its /models, and until when that counts
        self.listed: Tuple[float, List[str]] = (0.0, [])
        self._caps: Dict[str, int] = {}  #: by model: most output tokens, as refusals have told
        self._lock = threading.Lock()
        self.adopt(provider)

    def adopt(self, provider: Provider) -> None:
        """Work with these settings from now on; what rests and what is under way stays."""
        if provider.base_url != self.provider.base_url:
            self.rests.ok(None)
            self.listed, self._caps = (0.0, []), {}
        self.provider = provider
        self.slots.resize(provider.places)
        self._key_slots = {key: self._key_slots.get(key) or Slots(0) for key in provider.api_keys
                           } if provider.key_concurrency else {}
        for slots in self._key_slots.values():
            slots.resize(provider.key_concurrency)

    def keys(self, known: Sequence[str], conversation: Optional[int] = None) -> List[str]:
        """Of `known` keys those to try, in order; when all rest, the one nearest its end.

        They take turns, but a `conversation` keeps to its key while that is awake and has a place.
        A provider without keys has the key "".
        """
        if not known:
            return [""]
        with self._lock:
            start = (self._turn if conversation is None else conversation) % len(known)
            self._turn += conversation is None
        turn = [*known[start:], *known[:start]]
        awake = [key for key in turn if not self.rests.left_s(key)]
        awake.sort(key=self._would_wait)
        return awake or [min(turn, key=self.rests.left_s)]

    def _would_wait(self, key: str) -> int:
        """How many would wait at a key if one more came."""
        slots = self._key_slots.get(key)
        return max(0, slots.load - slots.limit + 1) if slots else 0

    def hold_key(self, key: str, client: Client, settings: Settings) -> Any:
        """A place at the key for the time of a `with`; Busy, ClientGone."""
        slots = self._key_slots.get(key)
        if slots is None:
            return _NO_WAIT
        return slots.hold(client, settings, f"a key of {self.provider.name}")

    def key_states(self) -> List[Tuple[str, float]]:
        """Of each key `ok`, `resting` or `refused`, and the seconds that it still rests."""
        return [(self.rests.key_state(key), self.rests.left_s(key))
                for key in self.provider.api_keys]

    # what is known of its models

    def cap(self, model: str) -> int:
        """The most tokens of output that it allows, as a refusal has told; 0: not known."""
        return self._caps.get(model, 0)

    def learn_cap(self, model: str, tokens: int) -> None:
        with self._lock:
            remember(self._caps, model[:SCALE_NAME_CHARS], tokens, self.CAPS_LIMIT)

    def scaled(self, model: str, estimate: int) -> int:
        """Our estimate of tokens as the model counts them."""
        return self._scale.scaled(self._scale_name(model), estimate)

    def _scale_name(self, model: str) -> str:
        return f"{self.provider.name}/{model}"[:SCALE_NAME_CHARS]

    def learn_count(self, model: str, estimate_of: Callable[[bool], int], counted: int) -> None:
        """Compare our estimate of a prompt with what the upstream counted.

        `estimate_of` is told whether an estimate is worth making; it returns 0 without one.
        """
        name = self._scale_name(model)
        estimate = estimate_of(self._scale.is_worth(name))
        if estimate:
            self._scale.learn(name, estimate, counted)
        else:
            self._scale.pass_over(name)


# --- what is noted of a call --------------------------------------------------------

class Attempt(NamedTuple):
    """One request to an upstream: where, with which key (masked), and what came of it."""
    provider: str
    model: str
    key: str
    status: int
    error: str
    total_s: float


@dataclass(eq=False, repr=False)
class Record:
    """What is noted of one call: for its log line, the metrics, usage and history.  No content."""
    request_id: str
    dialect: str
    model: str
    stream: bool
    started: float                       #: monotonic
    target: Optional[Target] = None
    status: int = 0
    first_s: Optional[float] = None
    total_s: float = 0.0
    usage: Usage = Usage()
    error: str = ""
    key: str = ""                        #: name of the client's key
    at: float = 0.0                      #: epoch seconds
    trail: List[Attempt] = field(default_factory=list)
    spent: bool = False                  #: its tokens are counted against limits

    @property
    def where(self) -> str:
        """`provider/model` of the last target, "" where there was none."""
        return f"{self.target.provider.name}/{self.target.model}" if self.target else ""

    def counts(self) -> List[int]:
        """As LEDGER_COUNTS; a client that leaves is no error."""
        timed = self.first_s is not None
        usage = self.usage if self.status == 200 or timed else Usage()
        return [1, int(self.status not in (200, 499)), usage.prompt, usage.completion, usage.cached,
                usage.reasoning or 0, int(usage.estimated), int(timed),
                int((self.first_s or 0.0) * 1000), int(self.total_s * 1000),
                usage.prompt * usage.estimated, usage.completion * usage.estimated]

    def facts(self) -> Json:
        """For the history of requests."""
        usage = self.usage
        names = ("at", "request_id", "dialect", "model", "stream", "key", "status", "first_s",
                 "total_s")
        return {**{name: getattr(self, name) for name in names}, "error": one_line(self.error),
                "input": usage.prompt, "output": usage.completion, "cached": usage.cached,
                "reasoning": usage.reasoning, "estimated": usage.estimated,
                "target": self.where, "attempts": [attempt._asdict() for attempt in self.trail]}

    def line(self) -> str:
        """`model → provider/model 200 first 0.4s total 2.1s in 12 out 340`; `~`: estimated."""
        names = f"{one_line(self.model, 64) or '-'} → {one_line(self.where or '-', 100)}"
        first = f" first {self.first_s:.2f}s" if self.first_s is not None and self.stream else ""
        mark = "~" if self.usage.estimated else ""
        tokens = f" in {mark}{self.usage.prompt} out {mark}{self.usage.completion}"
        tokens = tokens if self.status == 200 else ""
        tries = f" attempts {len(self.trail)}" if len(self.trail) > 1 else ""
        error = f" ({one_line(self.error, 200)})" if self.error else ""
        return (f"{self.request_id[4:12]} {names} {self.status}{first} total {self.total_s:.2f}s"
                f"{tokens}{tries}{error}")


Labels = Tuple[Tuple[str, str], ...]

#: A family of metrics: name, type, help and samples: (suffix of the name, labels, value).
Family = Tuple[str, str, str, Iterable[Tuple[str, Labels, float]]]


def prometheus_text(families: Iterable[Family]) -> str:
    """The text format 0.0.4."""
    lines: List[str] = []
    for name, kind, text, samples in families:
        lines += [f"# HELP iflow2api_{name} {text}", f"# TYPE iflow2api_{name} {kind}"]
        lines += [f"iflow2api_{name}{suffix}{_labels_text(labels)} {value:.16g}"
                  for suffix, labels, value in samples]
    return "\n".join(lines) + "\n"


def _labels_text(labels: Labels) -> str:
    quoted = [name + '="' + one_line(value, 100).replace("\\", "\\\\").replace('"', '\\"') + '"'
              for name, value in labels]
    return "{" + ",".join(quoted) + "}" if quoted else ""


def add_bounded(table: Dict[Labels, Any], labels: Labels, amount: float) -> None:
    """Add to a series; beyond METRIC_SERIES_LIMIT of them to one that is called `other`."""
    if labels not in table and len(table) >= METRIC_SERIES_LIMIT:
        labels = tuple((name, "other") for name, _ in labels)
    table[labels] = table.get(labels, 0) + amount


class Histogram:
    """How long something took, for each set of labels."""
    BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

    def __init__(self) -> None:
        self._rows: Dict[Labels, List[float]] = {}       #: a count for each bucket, the sum last

    def observe(self, labels: Labels, seconds: float) -> None:
        row = self._rows.get(labels)
        if row is None:
            row = self._rows[labels] = [0] * (len(self.BUCKETS) + 1) + [0.0]
        row[bisect_left(self.BUCKETS, seconds)] += 1
        row[-1] += seconds

    def samples(self) -> Iterator[Tuple[str, Labels, float]]:
        for labels, row in self._rows.items():
            total = 0.0
            for edge, number in zip([*map(str, self.BUCKETS), "+Inf"], row):
                total += number
                yield "_bucket", (*labels, ("le", edge)), total
            yield "_sum", labels, round(row[-1], 6)
            yield "_count", labels, total


# --- the ledger ------------------------------------------------------------------------

#: What is counted of the calls of a row; times in milliseconds, `first_ms` over `streams` answers.
USAGE_COUNTS = ("requests", "errors", "input", "output", "cached", "reasoning", "estimated",
                "streams", "first_ms", "total_ms")
#: A row's counts: those, and how many of its tokens are an estimate of ours.
LEDGER_COUNTS = (*USAGE_COUNTS, "input_guessed", "output_guessed")
#: What a row is about; `hour`: when it began, in epoch seconds.
LEDGER_NAMES = ("hour", "model", "provider", "key", "dialect", "status")
#: What usage can be grouped by.
USAGE_NAMES = ("day", "model", "provider", "key")
#: Of a name that a client or a file made up so many characters count.
USAGE_NAME_CHARS = 100

LedgerNames = Tuple[int, str, str, str, str, int]
LedgerRow = Tuple[LedgerNames, List[int]]


@lru_cache(4096)
def day_of(at: float) -> str:
    """The day by this machine's clock, as 2026-01-31."""
    return time.strftime("%Y-%m-%d", time.localtime(at))


@lru_cache(4096)
def midnight_of(at: float, days: int = 0) -> int:
    """When its day began, or the day so many days later: mktime knows months and summer time."""
    year, month, day = time.localtime(at)[:3]
    return int(time.mktime((year, month, day + days, 0, 0, 0, 0, 0, -1)))


def hour_of(at: float) -> int:
    """When its hour began by this machine's clock."""
    return int(at) - (int(at) - midnight_of(int(at))) % 3600


def parse_ledger_line(line: bytes) -> LedgerRow:
    """A row of usage.jsonl; ValueError.

    An older version wrote rows of a whole `day`, without dialect and status.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("no usage")
    names = [row.get(name, "") for name in LEDGER_NAMES]
    if isinstance(row.get("day"), str):
        date = time.strptime(row["day"][:10], "%Y-%m-%d")[:3]
        names[0], names[5] = int(time.mktime((*date, 0, 0, 0, 0, 0, -1))), 0
    counts = [row.get(name, 0) for name in LEDGER_COUNTS]
    if [type(name) for name in names] != [int, str, str, str, str, int] or any(
            type(count) is not int or not 0 <= count < 10 ** 15 for count in counts):
        raise ValueError("no usage")
    day_of(names[0])                     # raises where there is no such time
    named = (name[:USAGE_NAME_CHARS] if isinstance(name, str) else name for name in names)
    return tuple(named), counts          # type: ignore[return-value]


def format_ledger_line(names: LedgerNames, counts: Sequence[int]) -> bytes:
    row: Json = dict(zip(LEDGER_NAMES, names))
    row.update((name, count) for name, count in zip(LEDGER_COUNTS, counts) if count)
    return dump_json(row) + b"\n"


class Journal:
    """A file of lines that several processes append to, read once and written anew at times.

    Lines go out in one write, so that a process that is killed loses none and another one's stay
    whole; a torn last line is passed over.  Without a path, or when the file fails, nothing is
    kept.
    """
    COMPACT_LINES = 2000
    GATHER_S = 0.05                      #: how long a line may wait for others

    def __init__(self, path: str, log: logging.Logger = log) -> None:
        self.path, self._log = path, log
        self.problems: List[str] = []
        self._handle, self._lines, self._needed, self._loaded = -1, 0, 0, not path
        self._waiting: List[bytes] = []
        self._timer: Optional[threading.Timer] = None
        self._lock = threading.Lock()

    def _take(self, line: bytes) -> None:
        """Count what a line says; ValueError where it makes no sense."""
        raise NotImplementedError

    def _reread(self) -> Iterable[bytes]:
        """The lines that say it all, with what another process appended."""
        raise NotImplementedError

    def load(self) -> None:
        """Read the file, once; what is wrong in it goes to `problems`, with its line."""
        with self._lock:
            self._load()

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        close_to_others(self.path)
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT), b""), 1):
                    self._lines = number
                    self._read(number, line)
        except FileNotFoundError:
            pass
        except OSError as exc:
            self._give_up(exc)

    def _read(self, number: int, line: bytes) -> None:
        if not line.endswith(b"\n") or not line.strip():         # torn when the process was killed
            return
        try:
            self._take(line)
        except (ValueError, TypeError, OverflowError, RecursionError, OSError):
            if len(self.problems) < 5:
                self.problems.append(f"{self.path}: line {number} is no usage and does not count")

    def _give_up(self, exc: OSError) -> None:
        reason = exc.strerror or exc
        self.problems.append(f"{self.path}: {reason} (usage is counted in memory only)")
        self.path = ""

    def _append(self, line: bytes, waits: bool = False) -> None:
        """Write a line; `waits`: a moment later, with the lines of calls that run as well, since
        each write costs a busy server a turn of the interpreter's lock.
        """
        if not self.path:
            return
        self._waiting.append(line)
        if waits and self._timer is None:
            timer = threading.Timer(self.GATHER_S, self._gathered)
            with contextlib.suppress(RuntimeError):      # no thread to be had
                timer.start()            # no daemon: a process that ends waits for it
                self._timer = timer
        if not waits or self._timer is None:
            self._write()

    def _gathered(self) -> None:
        with self._lock:
            self._timer = None
            self._write()

    def _write(self) -> None:
        """Append what waits; once there are many more lines than needed, write the file anew."""
        lines, self._waiting = self._waiting, []
        if not lines or not self.path:
            return
        try:
            # somebody may have removed or replaced the file
            if self._handle < 0 or not os.fstat(self._handle).st_nlink:
                self._open()
            os.write(self._handle, b"".join(lines))
            self._lines += len(lines)
            if self._lines > self.COMPACT_LINES + 4 * self._needed:
                self._compact()
        except OSError as exc:
            self._give_up(exc)
            self._log.warning("%s", self.problems[-1])

    def _open(self) -> None:
        self._shut()
        make_folder(os.path.dirname(self.path))
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._handle = os.open(self.path, flags, 0o600)
        size = os.lseek(self._handle, 0, os.SEEK_END)
        os.lseek(self._handle, max(0, size - 1), os.SEEK_SET)
        if size and os.read(self._handle, 1) != b"\n":           # end the line that a kill has torn
            os.write(self._handle, b"\n")

    def _compact(self) -> None:
        """Write each line that is needed once."""
        self._shut()
        lines = list(self._reread())
        write_file(self.path, b"".join(lines))
        self._lines = self._needed = len(lines)

    def _shut(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def close(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._write()
            self._shut()


class Ledger(Journal):
    """Every finished call, counted once in the row that has its LEDGER_NAMES.

    Usage, the chart, /metrics and the limits a day read it.  After HOURS_KEPT a row loses
    its hour, dialect and status, and is summed with those of its day.  Names come from clients:
    those beyond what an hour may hold are counted together as `other`.
    """
    HOURS_KEPT = 48

    def __init__(self, path: str = "", now: Callable[[], float] = time.time,
                 log: logging.Logger = log) -> None:
        super().__init__(path, log)
        self._now, self._days, self._hour = now, Settings.usage_days, 0
        self._rows: Dict[LedgerNames, List[int]] = {}
        self._an_hour: Counter[int] = Counter()          #: rows of each hour
        #: counts of rows that are no more, for /metrics: (dialect, provider, status) -> counts
        self._faded: Dict[Tuple[str, str, int], List[int]] = {}
        self._failures: Dict[Labels, int] = {}
        self._took, self._first = Histogram(), Histogram()

    # counting

    def add(self, record: Record, days: int = Settings.usage_days, waits: bool = False,
            writes: bool = True) -> None:
        """Count a finished call; `days` is how long rows are kept.

        `waits`: others are about to be counted as well; `writes` False: for this run only.
        """
        model, provider = ((record.target.model, record.target.provider.name) if record.target
                           else ("", ""))
        counts, labels = record.counts(), (("dialect", record.dialect), ("provider", provider))
        with self._lock:
            self._load()
            now = self._now()
            if not 0 <= now - self._hour < 3600:
                self._hour, self._days = hour_of(now), days
                self._forget()
            names = self._sum((self._hour, model[:USAGE_NAME_CHARS], provider, record.key,
                               record.dialect, record.status), counts)
            self._needed = len(self._rows)
            self._took.observe(labels, record.total_s)
            if record.first_s is not None:
                self._first.observe(labels, record.first_s)
            for attempt in record.trail:
                if attempt.status != 200:
                    add_bounded(self._failures, (("provider", attempt.provider),
                                                 ("status", str(attempt.status))), 1)
            if writes:
                self._append(format_ledger_line(names, counts), waits)

    def _take(self, line: bytes) -> None:
        self._sum(*parse_ledger_line(line))

    def _sum(self, names: LedgerNames, counts: Sequence[int]) -> LedgerNames:
        """Add to a row, and return which."""
        if names not in self._rows and (self._an_hour[names[0]] >= USAGE_ROWS_AN_HOUR
                                        or len(self._rows) >= USAGE_ROWS):
            names = (names[0], "other", "other", "other", *names[4:])
        row = self._rows.get(names)
        if row is None:
            row = self._rows[names] = [0] * len(LEDGER_COUNTS)
            self._an_hour[names[0]] += 1
        row[:] = map(int.__add__, row, counts)
        return names

    def _forget(self) -> None:
        """Drop what is older than the days kept, and sum the hours of days that are over."""
        now = self._now()
        fine = now - self.HOURS_KEPT * 3600
        oldest = min(fine, midnight_of(int(now), 1 - self._days))
        rows, self._rows, self._an_hour = self._rows, {}, Counter()
        for names, counts in rows.items():
            hour, *whose, dialect, status = names
            if hour < fine and dialect:
                faded = self._faded.setdefault((dialect, names[2], status),
                                               [0] * len(LEDGER_COUNTS))
                faded[:] = map(int.__add__, faded, counts)
                names = (midnight_of(hour), *whose, "", 0)       # type: ignore[assignment]
            if hour >= oldest:
                self._sum(names, counts)

    def _reread(self) -> Iterator[bytes]:
        self._rows, self._an_hour = {}, Counter()
        self._lines, self._loaded, self.problems = 0, False, []
        self._load()
        self._forget()
        for names, counts in sorted(self._rows.items()):
            yield format_ledger_line(names, counts)

    # reading

    @property
    def is_empty(self) -> bool:
        return not self._rows

    def rows(self, days: int) -> List[LedgerRow]:
        """The rows of the last `days`."""
        oldest = midnight_of(int(self._now()), 1 - days)
        with self._lock:
            self._load()
            return [(names, list(counts)) for names, counts in self._rows.items()
                    if names[0] >= oldest]

    def report(self, by: str, days: int, prices: Mapping[str, Mapping[str, float]]) -> List[Json]:
        """A row for each value of `by` (USAGE_NAMES) in the last `days`, most tokens first.

        `cost` is by the `prices` (cost_of), None where no row has one.
        """
        found: Dict[str, Json] = {}
        for names, counts in self.rows(days):
            name = (day_of(names[0]), *names[1:])[USAGE_NAMES.index(by)]
            total = found.setdefault(name,
                                     {by: name, **dict.fromkeys(USAGE_COUNTS, 0), "cost": None})
            row = dict(zip(USAGE_COUNTS, counts))
            total.update((count, total[count] + row[count]) for count in USAGE_COUNTS)
            cost = cost_of(names[1], names[2], row, prices)
            total["cost"] = total["cost"] if cost is None else (total["cost"] or 0) + cost
        return sorted(found.values(), key=lambda row: (-row["input"] - row["output"], row[by]))

    def steps(self, span: str) -> List[Tuple[int, List[LedgerRow]]]:
        """When each hour of the last `day` (or day of the last `month`) began, and its rows."""
        now = self._now()
        if span == "month":
            found: Dict[int, List[LedgerRow]] = {midnight_of(int(now), back): []
                                                 for back in range(-29, 1)}
            rows = [(midnight_of(row[0][0]), row) for row in self.rows(30)]
        else:
            found = {hour_of(now) - 3600 * back: [] for back in range(23, -1, -1)}
            # what an older version wrote has no hour
            rows = [(row[0][0], row) for row in self.rows(2) if row[0][4]]
        for at, row in rows:
            found.get(at, []).append(row)
        return list(found.items())

    def spent(self, key: str, prices: Mapping[str, Mapping[str, float]]) -> Spent:
        """What a key's calls of the last 30 days came to, hour by hour (older ones day by day)."""
        now = self._now()
        sums: Dict[int, List[float]] = {}
        for (hour, model, provider, name, *_), counts in self.rows(31):
            if name == key:
                row = dict(zip(USAGE_COUNTS, counts))
                amounts = (counts[0], row["input"] + row["output"],
                           (cost_of(model, provider, row, prices) or 0.0) * BUDGET_UNIT)
                sums[hour] = [a + b for a, b in zip(sums.get(hour, (0, 0, 0)), amounts)]
        return [(max(0.0, now - hour - 3600), *map(int, amounts))
                for hour, amounts in sorted(sums.items())]

    def families(self) -> List[Family]:
        """Counters and histograms for /metrics."""
        requests: Dict[Labels, int] = {}
        tokens: Dict[Labels, int] = {}
        with self._lock:
            self._load()
            sums = [*self._faded.items(), *(((names[4], names[2], names[5]), counts)
                                            for names, counts in self._rows.items() if names[4])]
            for (dialect, provider, status), counts in sums:
                labels = (("dialect", dialect), ("provider", provider), ("status", str(status)))
                add_bounded(requests, labels, counts[0])
                for direction, whole, guessed in (("in", counts[2], counts[-2]),
                                                  ("out", counts[3], counts[-1])):
                    for mark, amount in (("false", whole - guessed), ("true", guessed)):
                        if status == 200 and amount:
                            add_bounded(tokens, (("direction", direction), ("provider", provider),
                                                 ("estimated", mark)), amount)
            counters = [
                ("requests_total", "Requests answered, by dialect, provider and status.", requests),
                ("tokens_total", 'Tokens as the upstreams counted them; estimated="true" where '
                                 "they did not.", tokens),
                ("upstream_errors_total", "Attempts at an upstream that failed, by provider and "
                                          "status.", dict(self._failures))]
            return [*((name, "counter", text, [("", labels, value) for labels, value in
                                               values.items()]) for name, text, values in counters),
                    ("request_duration_seconds", "histogram", "Time to the end of an answer.",
                     list(self._took.samples())),
                    ("first_token_seconds", "histogram", "Time to the first byte of an answer.",
                     list(self._first.samples()))]


def cost_of(model: str, provider: str, counts: Mapping[str, int],
            prices: Mapping[str, Mapping[str, float]]) -> Optional[float]:
    """What a row costs by the first price that fits `provider/model` or `model`; None: no price."""
    for pattern, price in prices.items():
        if fits(f"{provider}/{model}", pattern) or fits(model, pattern):
            cached = min(counts["cached"], counts["input"])
            full = price.get("input", 0)
            return ((counts["input"] - cached) * full + cached * price.get("cached", full)
                    + counts["output"] * price.get("output", 0)) / 1e6
    return None


# --- what the page watches --------------------------------------------------------------

class RecentItems:
    """The last things of a kind, numbered from 1 on."""

    def __init__(self, size: int) -> None:
        self._items: Deque[Any] = deque(maxlen=size)
        self.count, self._lock = 0, threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: Any) -> None:
        with self._lock:
            self.count += 1
            self._items.append(item)

    def after(self, number: int, most: int = 1000) -> Tuple[int, List[Tuple[int, Any]]]:
        """How many after `number` are gone already, and the next `most` with their numbers."""
        with self._lock:
            first = self.count - len(self._items)        # so many are gone
            lost = max(0, first - number)
            at = number + lost - first
            found = list(self._items)[at:at + most] if at < len(self._items) else []
        return lost, list(enumerate(found, number + lost + 1))


class GatewayLog(logging.Logger):
    """The log of one gateway, with a level of its own; its lines go on to the program's log.

    It is not registered anywhere, so that it goes with its gateway and no other one writes into it.
    """

    def __init__(self) -> None:
        super().__init__(log.name, logging.INFO)
        self.parent = log

    def isEnabledFor(self, level: int) -> bool:
        return level >= self.level       # Logger's own remembers the answer, here even for ever


class Live(logging.Handler):
    """What viewers of the page read, and what wakes them: the last requests and log lines.

    A log line is (epoch seconds, level, logger, text), redacted when it is read.  Each viewer reads
    at its own pace and has no queue: one that is too slow is told how many it has missed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests, self.logs = RecentItems(HISTORY_SIZE), RecentItems(LOG_LINES)
        self.closed = False
        self._viewers: Dict[bool, int] = {False: 0, True: 0}     #: by whether they want logs
        self._version, self._changed = 0, threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self.logs.add((record.created, record.levelno, record.name, text[:LOG_LINE_CHARS]))
        self.notify(True)

    def notify(self, log_only: bool = False) -> None:
        """Wake the viewers; `log_only`: those who want logs."""
        if self._viewers[True] or not log_only and self._viewers[False]:
            with self._changed:
                self._version += 1
                self._changed.notify_all()

    def wait(self, version: int, seconds: float) -> int:
        """Until something is newer than `version`, but not longer; the new version."""
        with self._changed:
            if self._version == version and not self.closed:
                self._changed.wait(seconds)
            return self._version

    @contextlib.contextmanager
    def viewer(self, logs: bool) -> Iterator[None]:
        """Count a viewer for the time of the `with`; Busy where there are too many."""
        with self._changed:
            if sum(self._viewers.values()) >= VIEWERS_LIMIT:
                raise Busy(f"{VIEWERS_LIMIT} pages are watching already", retry_after_s=30)
            self._viewers[logs] += 1
        try:
            yield
        finally:
            with self._changed:
                self._viewers[logs] -= 1

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()


def log_json(number: int, line: Tuple[float, int, str, str]) -> Json:
    """A line of Live.logs as the page gets it."""
    at, level, logger, text = line
    level_name = logging.getLevelName(level).lower()
    return {"id": number, "at": at, "level": level_name, "logger": logger, "text": redact(text)}


# --- who may use the page ----------------------------------------------------------------

@dataclass(eq=False, repr=False)
class Session:
    """Somebody who is signed in: with which password (its hash), since when, and when last seen.

    Times are monotonic.
    """
    password: str
    began_at: float
    used_at: float


class Guesser:
    """An address that tries passwords or codes: one at a time, wrong ones are counted."""

    def __init__(self) -> None:
        #: a password takes a fifth of a second of one processor, not of all
        self.lock = threading.Lock()
        #: when none of its wrong tries counts any more: each counts for a second
        self.forgiven_at = 0.0


class Sessions:
    """Who may use the page.

    A session ends on time, by hand, or with the password it was opened with.  While there is no
    password, a one-time code that only the console shows lets its reader set one; the page itself
    never tells it.
    """

    def __init__(self, password: Callable[[], str],
                 clock: Callable[[], float] = time.monotonic) -> None:
        """`password` is the hash in force."""
        self._password, self._clock = password, clock
        self._kept: Dict[bytes, Session] = {}            #: by hash of the token
        #: hash of the last good Authorization, and its password's
        self._basic: Tuple[bytes, str] = (b"", "")
        self._code, self._code_ends_at = "", 0.0
        self._guessers: Dict[str, Guesser] = {}          #: by address
        self._lock = threading.Lock()
        #: called when a code has taken an old one's place
        self.on_new_code: Callable[[], None] = lambda: None

    @property
    def is_new(self) -> bool:
        """Whether no password was set yet."""
        return not self._password()

    def code(self) -> str:
        """The code that sets the first password, "" where there is one; new after CODE_LIFE_S."""
        with self._lock:
            now, old = self._clock(), self._code
            if not self.is_new:
                self._code = ""
            elif not old or now >= self._code_ends_at:
                letters = "".join(secrets.choice(CODE_LETTERS) for _ in range(8))
                self._code, self._code_ends_at = f"{letters[:4]}-{letters[4:]}", now + CODE_LIFE_S
            code = self._code
        if old and code not in ("", old):
            self.on_new_code()
        return code

    def try_code(self, address: str, code: str) -> bool:
        """Whether `code` is the code in force, which is used up by this; RateLimited."""
        given = re.sub(r"[\s-]", "", code).upper()

        def is_ours() -> bool:
            known = self.code()
            if not known or not hmac.compare_digest(sha256(given),
                                                    sha256(known.replace("-", ""))):
                return False
            with self._lock:             # of two at once, one has it
                is_fresh, self._code = self._code == known, ""
                return is_fresh

        return self._judge(address, is_ours)

    def try_password(self, address: str, password: str) -> bool:
        """Whether it is the password in force; RateLimited."""
        stored = self._password()
        return self._judge(address, lambda: len(password) <= PASSWORD_LENGTH[1]
                           and is_password(password, stored))

    def _judge(self, address: str, is_right: Callable[[], bool]) -> bool:
        """Whether a guess is right; RateLimited after SIGN_IN_TRIES wrong ones, then once a second.

        Each address has its own count: nobody can lock others out.
        """
        with self._lock:
            guesser = self._guessers.get(address) or Guesser()
            remember(self._guessers, address, guesser, SIGN_IN_ADDRESSES)
        with guesser.lock:
            wait_s = guesser.forgiven_at - self._clock() - (SIGN_IN_TRIES - 1)
            if wait_s > 0:
                raise RateLimited(f"too many wrong attempts; try again in {wait_s:.1f} s",
                                  retry_after_s=wait_s, code="too_many_attempts")
            right = is_right()
            if not right:
                guesser.forgiven_at = max(self._clock(), guesser.forgiven_at) + 1
            return right

    def open(self) -> str:
        """A new session's token; beyond SESSIONS_LIMIT the one not used for longest ends."""
        token, now = secrets.token_urlsafe(32), self._clock()
        with self._lock:
            self._kept = {name: session for name, session in self._kept.items()
                          if self.is_alive(session)}
            while len(self._kept) >= SESSIONS_LIMIT:
                del self._kept[min(self._kept, key=lambda name: self._kept[name].used_at)]
            self._kept[sha256(token)] = Session(self._password(), now, now)
        return token

    def find(self, token: str) -> Optional[Session]:
        """The session of a token, which is used by this; None where there is none any more."""
        session = self._kept.get(sha256(token))
        if session is None or not self.is_alive(session):
            return None
        session.used_at = self._clock()
        return session

    def is_alive(self, session: Session) -> bool:
        now = self._clock()
        is_fresh = now < session.began_at + SESSION_S and now < session.used_at + SESSION_IDLE_S
        return is_fresh and session.password == self._password() != ""

    def basic(self, address: str, given: str) -> Optional[Session]:
        """A session for one request with `admin:password` in base64, None: wrong; RateLimited.

        The last right one is remembered as long as the password stays: checking takes a fifth of a
        second, and a script sends it with each request.
        """
        digest, password = sha256(given), self._password()
        known, its = self._basic
        if not (hmac.compare_digest(known, digest) and its == password != ""):
            try:
                user, _, secret = base64.b64decode(given, validate=True).decode().partition(":")
            except ValueError:
                return None
            if user != "admin" or not self.try_password(address, secret):
                return None
            self._basic = (digest, password)
        return Session(password, self._clock(), self._clock())

    def close(self, token: str) -> None:
        self._end([sha256(token)])

    def close_all(self) -> None:
        self._end(list(self._kept))
        self._basic = (b"", "")

    def _end(self, names: Iterable[bytes]) -> None:
        """End sessions by the hashes of their tokens."""
        with self._lock:
            for name in names:
                if name in self._kept:
                    self._kept.pop(name).password = ""   # for whoever still holds it


class FileWatch:
    """Calls back, on a thread of its own, when one of some files has changed on disk."""

    def __init__(self, paths: Sequence[str], changed: Callable[[], None], every_s: float = 2.0,
                 log: logging.Logger = log) -> None:
        self._paths, self._changed, self._every_s, self._log = paths, changed, every_s, log
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
                # a thread body: it must outlive whatever a file makes of it
                except Exception:
                    self._log.exception("taking over a changed file failed")

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)


# === 15. Gateway =============================================================

def _lasting_key(path: str, log: logging.Logger) -> bytes:
    """32 random bytes, kept in `path` where that can be done."""
    close_to_others(path)
    with contextlib.suppress(OSError):
        with open(path, "rb") as file:
            key = file.read(33)
        if len(key) == 32:
            return key
    key = secrets.token_bytes(32)
    try:
        write_file(path, key)
    except OSError as exc:
        log.warning("%s can't be written (%s): conversations lose their reasoning at a restart",
                    path, exc.strerror or exc)
    return key


def at_once(calls: Sequence[Callable[[], Any]], limit_s: float) -> None:
    """Run calls on a thread each; those not done after `limit_s` are left to themselves."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit_s)


def parse_model_list(data: bytes) -> List[str]:
    """The names in an answer of `/models`; UpstreamGarbled."""
    try:
        listed = json.loads(data)
    except (ValueError, RecursionError):
        raise UpstreamGarbled("its /models is not JSON") from None
    names = [object_of(model).get("id") for model in entries_of(object_of(listed), "data")]
    return [name for name in names if isinstance(name, str) and name]


def tokens_of(header: str) -> Set[str]:
    """The words of a header that lists some, in lower case.

    Those of Connection name further headers of this hop (RFC 9110, 7.6.1).
    """
    return {token.strip().lower() for token in header.split(",")}


def _secrets_of(provider: Provider) -> List[str]:
    """What no client may see; a value as short as "none" or "EMPTY" is no secret."""
    return [secret for secret in (*provider.api_keys, *(value for _, value in provider.headers))
            if len(secret) >= 8]


def _forget_secrets(exc: GatewayError, provider: Provider) -> None:
    """Mask our keys in an error: some upstreams repeat the key they refuse."""
    for secret in _secrets_of(provider):
        for name in ("message", "type", "param", "code"):
            value = getattr(exc, name)
            if isinstance(value, str) and secret in value:
                setattr(exc, name, value.replace(secret, mask(secret)))
        if exc.body:
            exc.body = json.loads(_without_secrets(dump_json(exc.body), provider))


def _without_secrets(data: bytes, provider: Provider) -> bytes:
    """JSON text that tells of an error, with the keys in it masked."""
    for secret in _secrets_of(provider):
        data = data.replace(dump_json(secret)[1:-1], dump_json(mask(secret))[1:-1])
    return data


class State(NamedTuple):
    """What a request works on from its start to its end, whatever is changed meanwhile."""
    settings: Settings
    router: Router
    auth: ClientAuth

    def chain_for(self, call: Call) -> List[Target]:
        """The targets of a call; BadRequest, NotLoggedIn, Forbidden where its key may not use the
        model.
        """
        chain = self.router.resolve(call.model, call)
        key = call.key
        if key is None or not key.models:
            return chain
        others = call.dialect.other_models(call)
        if may_use(self.router, key, self.router.named(call.model), chain, others):
            return chain
        also = " with these `models`" if others else ""
        raise Forbidden(
            f"the key {key.name} may not use the model {one_line(call.model, 100)}{also}; "
            "it may use " + ", ".join(key.models), code="model_not_allowed", param="model")


def read_refusal(response: UpstreamResponse, provider: Provider) -> UpstreamError:
    """What an answer with an error status stands for; 429 always says when to come back."""
    if response.status < 400:
        place = one_line(response.headers.get("location", "nowhere"), 120)
        return UpstreamGarbled(f"the upstream redirects to {place}; "
                               "set base_url to where it really is")
    try:
        data = response.read_all(REFUSAL_LIMIT_BYTES)
    except UpstreamError:
        data = b""
    refusal = parse_refusal(response.status, response.content_type, data)
    # iFlow's 406: the request is not signed, or the key may not use the model
    if refusal.status == 406 and provider.kind == "iflow":
        refusal.status, refusal.body = 403, None
    said = parse_retry_after(response.headers, time.time())
    refusal.retry_after_s = refusal.retry_after_s if said is None else said
    verdict = response.headers.get("x-should-retry", "").lower()
    refusal.should_retry = {"true": True, "false": False}.get(verdict)
    return refusal


def _classify(exc: UpstreamRefused, target: Target, translation: Translation,
              shows_images: bool) -> None:
    """Recognise some refusals by their words, and give `exc` the status and code they should have.

    A prompt too long, a spent quota, a model that takes no images, and one that does not exist.
    """
    text = dump_text(exc.body) if exc.body else exc.message
    code = exc.code or exc.body and exc.body["error"].get("code")
    found = find_overflow(exc.status, text, exc.code, translation.max_output)
    if is_spent(exc.status, f'"code":{exc.code} {text}'):
        exc.should_retry = exc.should_retry or False
        _add_sentence(exc, other_keys(target.provider))
    exc.overflow = found or exc.overflow
    if exc.overflow is not None:
        prompt, limit, output = exc.overflow
        limit = limit or profile_of(target).get("context", 0)
        exc.overflow = (prompt or translation.estimate, limit, output)
        exc.code = "context_length_exceeded"
    elif shows_images and is_image_refusal(exc.status, exc.message):
        exc.status, exc.should_retry = 400, False
    elif is_missing_model(exc.status, exc.message, code):
        exc.status, exc.code = 404, "model_not_found"
        if target.model not in exc.message:
            exc.message = f"the model {target.model} does not exist there: {exc.message}"


def _add_sentence(exc: GatewayError, sentence: str) -> None:
    """Say more than the upstream did, in its own body too."""
    exc.message = "; ".join(filter(None, (exc.message, sentence)))
    if exc.body and sentence:
        exc.body["error"]["message"] = exc.message


def explain_refusal(exc: UpstreamError, target: Target, translation: Translation,
                    flags: Mapping[str, Any], shows_images: bool = False) -> UpstreamError:
    """An upstream's error as the client gets it; `flags`: the gateway's, for what to advise.

    A refused key is the operator's trouble, not the client's: 401 and 403 become a 403 that says
    what to do (Claude Code repeats a 401 for over a minute, and shows a 403).
    """
    provider = target.provider
    if provider.problem:                 # the error is our own
        return exc
    if isinstance(exc, UpstreamRefused) and exc.status not in (401, 403):
        _classify(exc, target, translation, shows_images)
    _forget_secrets(exc, provider)
    # Codex gives up at once on a bare 429
    if exc.status == 429 and exc.retry_after_s is None:
        exc.retry_after_s = DEFAULT_RETRY_AFTER_S
    if exc.status not in (401, 403):
        return exc
    keys = "its key" if provider.api_keys else "a request without a key"
    cure = f"check its api_keys in config.json, then run: python iflow2api.py test {provider.name}"
    if provider.name == "iflow":
        cure = ("log in to iFlow again (python iflow2api.py login), then run: "
                "python iflow2api.py test iflow")
    elif "providers" in flags:           # --upstream
        cure = "give another --api-key"
    cure = "; ".join(filter(None, (cure, other_keys(provider))))
    return UpstreamRefused(
        f"provider {provider.name} refused {keys} "
        f"(HTTP {exc.status}: {one_line(exc.message)}); {cure}", status=403,
        type="permission_error", should_retry=False)


def upstream_headers(given: Mapping[str, str], settings: Settings, provider: Provider,
                     key: str, agent: str = "") -> List[Tuple[str, str]]:
    """The provider's own headers, the key, and the client's that are meant for the upstream.

    `agent`: the client's User-Agent, which some providers want.
    """
    is_known = provider.profile.get("forward_user_agent") and is_sound_header("user-agent", agent)
    headers = {"user-agent": ("User-Agent", agent if is_known else f"iflow2api/{__version__}")}
    if provider.kind == "iflow":
        headers.clear()                  # it gets the CLI's, and nothing of the client's
    else:
        ours = {settings.custom_auth_header.lower(), *tokens_of(given.get("connection", ""))}
        for name, value in given.items():
            if (name in HEADERS_FORWARDED or name.startswith(HEADER_FORWARDED_PREFIX)) and (
                    name not in ours and is_sound_header(name, value)):
                headers[name] = (name, value)
    if key:
        headers["authorization"] = ("Authorization", "Bearer " + key)
    headers.update((name.lower(), (name, value)) for name, value in provider.headers)
    return list(headers.values())


def plan_for(gateway: Any, settings: Settings, call: Call, chain: Sequence[Target]) -> Plan:
    """The attempts of a call at its targets."""
    def keys(target: Target) -> List[str]:
        provider = target.provider
        sticky = settings.sticky if provider.sticky is None else provider.sticky
        conversation = call.conversation if sticky and len(provider.api_keys) > 1 else None
        return gateway.lane(provider).keys(provider.api_keys, conversation)

    return Plan(chain, keys, lambda target: gateway.lane(target.provider).rests,
                {**RETRY, **settings.retry}, {**CIRCUIT, **settings.circuit}, gateway.clock,
                lambda: 0.5 + secrets.randbelow(500) / 1000)


class Attempts:
    """One call on its way: asks what its plan says next, until somebody has answered."""

    def __init__(self, gateway: Any, call: Call, client: Client) -> None:
        self.gateway, self.log, self.call, self.client = gateway, gateway.log, call, client
        self._fresh_key = ""             #: of a login that was refreshed for this call
        self.plan: Any = None            #: Plan, once the call has its chain
        self.translation: Any = None     #: Translation for the target that is being asked
        self.record = Record(
            call.request_id, call.dialect.name, (call.model or "")[:200], call.stream,
            time.monotonic(), key=call.key.name if call.key else "", at=time.time())

    def run(self) -> None:
        """Answer the call; ClientGone, GatewayError (`client.began`: in the middle of it)."""
        record = self.record
        try:
            self.state: State = self.gateway.current()
            self.settings = self.state.settings
            self._follow_plan()
            record.status = record.status or 200
        except GatewayError as exc:
            record.status, record.error = self.call.dialect.status(exc), exc.message
            raise
        except ClientGone:
            record.status, record.error = 499, "the client left"
            raise
        finally:
            record.total_s = time.monotonic() - record.started
            self._spend()
            self.gateway.note(record)

    def _follow_plan(self) -> None:
        chain = self.state.chain_for(self.call)
        self.plan = plan_for(self.gateway, self.settings, self.call, chain)
        with contextlib.ExitStack() as place:            # at the target that is being asked
            while True:
                step = self.plan.next()
                if not step.is_same:
                    place.close()
                    self._pause(step.wait_s)
                try:
                    return self._ask(step, place)
                except (UpstreamError, Busy) as exc:
                    status, told = exc.status, exc
                    if isinstance(exc, UpstreamError):
                        told = explain_refusal(exc, self.target, self.translation,
                                               self.gateway.flags, self.call.shows_images)
                    forget_trace(exc)    # the plan keeps errors
                    if not self._mend(status, told):
                        self._give_up(status, told, len(chain) > 1)

    def _pause(self, seconds: float) -> None:
        if seconds:
            self.log.info("%s trying again in %.1f s", self.call.request_id[4:12], seconds)
            self.gateway.pause(self.client, seconds)

    def _ask(self, step: Step, place: contextlib.ExitStack) -> None:
        """Make an attempt, unless the answer needs no upstream."""
        provider = step.target.provider
        if step.is_same:
            self.translation.begin()
        else:
            self._aim(step.target)
            if self.translation.local is not None:
                return self._answer_locally(self.translation.local)
            place.enter_context(self.lane.slots.hold(self.client, self.settings, provider.name))
        key, started = self.plan.take_key(), time.monotonic()
        attempt = Attempt(provider.name, self.target.model, mask(key), 200, "", 0.0)
        try:
            with self.lane.hold_key(key, self.client, self.settings):
                self._ask_upstream(key)
        except UpstreamError as exc:
            attempt = attempt._replace(status=exc.status, error=one_line(exc.message))
            self.record.trail.append(attempt._replace(total_s=time.monotonic() - started))
            raise
        self._learn()
        self.record.trail.append(attempt._replace(total_s=time.monotonic() - started))

    def _aim(self, target: Target) -> None:
        """Translate the call for a target; UpstreamRefused where it is disabled, BadRequest."""
        provider = target.provider
        self.target = self.record.target = target
        self.lane: Lane = self.gateway.lane(provider)
        if provider.problem:
            raise UpstreamRefused(f"provider {provider.name} is disabled: {provider.problem}",
                                  status=403, type="permission_error", should_retry=False)
        other = provider.vision_model
        if other and other != target.model and self.call.shows_images and (
                not profile_of(target)["vision"]):
            self.target = self.record.target = Target(provider, other)
        self._translate()

    def _translate(self) -> None:
        gateway, lane, target = self.gateway, self.lane, self.target
        context = Context(time.time(), new_id, gateway.seal(), gateway.responses, gateway.reasoning,
                          lambda estimate: lane.scaled(target.model, estimate))
        cap, facts = lane.cap(target.model), target.provider.facts
        if cap:                          # what refusals have told of its longest answer
            known = facts.get(target.model, {})
            known = {**known, "max_output": min(cap, known.get("max_output") or cap)}
            target = Target(replace(target.provider, facts={**facts, target.model: known}),
                            target.model)
        try:
            self.translation = self.call.dialect.open(self.call, target, context)
        except RecursionError:
            raise BadRequest("the body is nested too deeply") from None
        gateway.tell_skipped(self.translation.skipped, self.call)
        self.client.translation = self.translation

    def _answer_locally(self, answer: bytes) -> None:
        if self.call.stream:
            return self.client.end(answer)
        self.client.reply(answer, "application/json", ())

    def _learn(self) -> None:
        """Compare what was estimated with what the upstream counted."""
        usage = self.record.usage
        if usage.prompt and not usage.estimated:
            self.lane.learn_count(self.target.model, self.translation.raw_estimate, usage.prompt)

    # when it failed

    def _mend(self, status: int, exc: GatewayError) -> bool:
        """Whether to repeat the attempt at once: its login was refreshed, or max_tokens lowered."""
        if self.client.began or not isinstance(exc, UpstreamRefused):
            return False
        if status == 401:
            return self._renew_login()
        cap = find_output_cap(exc.status, exc.message) if exc.overflow is None else 0
        model = self.target.model
        if not cap or cap >= (self.lane.cap(model) or cap + 1):
            return False
        if not self.translation.max_output:              # Chat is passed on as it is
            return False
        self.lane.learn_cap(model, cap)
        self.log.info("%s %s/%s takes max_tokens up to %d; asking again",
                      self.call.request_id[4:12], self.lane.provider.name, model, cap)
        self._translate()
        self.plan.repeat()
        return True

    def _renew_login(self) -> bool:
        """Where iFlow says that the key has ended, its login is refreshed, once."""
        plan = self.plan
        account = self.gateway.account_of(self.target.provider, plan.key)
        if account is None or plan.key == self._fresh_key:
            return False
        self._fresh_key = self.gateway.logins.refresher.renew(account, plan.key) or ""
        if self._fresh_key:
            plan.repeat(self._fresh_key)
        return bool(self._fresh_key)

    def _give_up(self, status: int, exc: GatewayError, has_others: bool) -> None:
        """Tell the plan that the attempt failed; raises `exc` where nobody else may be asked."""
        plan, name = self.plan, self.target.provider.name
        if plan.failed(exc, self.client.began, status):
            self.log.warning(
                "%s failed %d times in a row and rests for %g s where there is another",
                name, plan.circuit["failures"], plan.circuit["rest_s"])
        if has_others and plan.target is None:
            self.log.info("%s %s failed (%s)", self.call.request_id[4:12], name,
                          one_line(exc.message, 160))

    # one exchange with the upstream

    def _ask_upstream(self, key: str) -> None:
        """Send the request and pass the answer on."""
        provider, client = self.target.provider, self.client
        headers = upstream_headers(self.translation.headers, self.settings, provider, key,
                                   self.call.headers.get("user-agent", ""))
        if provider.kind == "iflow":
            headers = [*headers, *self.gateway.upstream.identity.headers(key, time.time())]
        with self.gateway.upstream.open(provider, self.settings, "POST", self.translation.path,
                                        headers, self.translation.body, client) as response:
            if response.status >= 300:
                raise read_refusal(response, provider)
            if "html" in response.content_type:
                raise UpstreamGarbled("the upstream answered with a web page; "
                                      "is base_url its API, and not its site?")
            client.returned = [(name, value) for name, value in response.headers.items()
                               if re.fullmatch(HEADER_RETURNS, name)
                               and is_sound_header(name, value)]
            data = b""
            if self.call.stream and "json" not in response.content_type:
                try:
                    data = self._stream(response, self.translation)
                finally:
                    self.record.usage = self.translation.usage
                if not data:
                    return
            self._reply(response, data or response.read_all(ANSWER_LIMIT_BYTES))

    def _reply(self, response: UpstreamResponse, data: bytes) -> None:
        """Pass a plain answer on."""
        client = self.client
        answer, content_type = self.translation.reply(data, response.content_type, response.status)
        self._end_well()
        if self.call.stream:
            client.end(answer)
        else:
            client.reply(answer, content_type, client.returned)
        self.record.first_s = time.monotonic() - self.record.started

    def _stream(self, response: UpstreamResponse, translation: Translation) -> bytes:
        """Pass a stream on to its end, with a write for each read; b"".

        Where the body is a JSON object instead, whatever its content type: that body.
        """
        client, record, provider = self.client, self.record, self.target.provider
        is_json: List[bool] = []         # empty until the first payload has come
        body = bytearray()

        def move(payload: bytes) -> bool:
            if not is_json:
                is_json.append(payload.lstrip()[:1] == b"{")
            if is_json[0]:
                body.extend(payload)
                if len(body) > ANSWER_LIMIT_BYTES:
                    limit_mib = ANSWER_LIMIT_BYTES >> 20
                    raise UpstreamGarbled(f"the upstream's answer is larger than {limit_mib} MiB")
                return True
            passes = translation.passes(payload)
            out = payload if passes else translation.feed(payload)
            if translation.failed:       # on Chat an error goes out as it came, but for a key in it
                out, passes = _without_secrets(out, provider), False
            if passes:
                client.send(out, response.framed)
            elif out:
                if record.first_s is None:
                    record.first_s = time.monotonic() - record.started
                client.send(out)
            return not translation.done

        try:
            self.gateway.upstream.move(response, client, move, translation.is_over)
        except UpstreamGarbled:
            if not translation.began:
                raise
        if body:
            return bytes(body)
        # raises, unless all of an answer came before the connection broke
        last = translation.close()
        self._end_well()
        client.end(last)
        if translation.failed:
            record.status, record.error = 502, "the upstream broke off with an error"
        return b""

    def _end_well(self) -> None:
        """Note that all of an answer has come.

        Before its end is sent, so that the client's next request finds it noted.
        """
        self.record.usage = self.translation.usage
        self._spend()
        self.plan.succeeded()

    def _spend(self) -> None:
        """Count the tokens against limits, once."""
        record, usage = self.record, self.record.usage
        if self.call.meters and not record.spent:
            record.spent = True
            # 0: it is about to end well
            counts = record.status in (0, 200) or record.first_s is not None
            used = {"input": usage.prompt, "cached": usage.cached, "output": usage.completion}
            cost = cost_of(self.target.model, self.target.provider.name, used,
                           self.gateway.settings.prices) or 0.0
            self.gateway.limiter.spend(
                self.call.meters, usage.prompt + usage.completion if counts else 0, cost)


class LocalEngines:
    """Engines on this machine, for a gateway without providers; looked for every LOCAL_TTL_S."""

    def __init__(self, gateway: Any) -> None:
        self._gateway, self._lock = gateway, threading.Lock()
        #: the state without engines that was looked for
        self._base: Optional[State] = None
        #: the same with the engines that were found; None: there are none
        self._found: Optional[State] = None
        self._until = 0.0                #: monotonic; then they are looked for again

    def state(self, base: State, look: bool) -> State:
        """`base` with what was found; `look` False takes what was found last."""
        if look:
            with self._lock:
                if self._base is not base or time.monotonic() >= self._until:
                    self._look(base)
        return self._found if self._found is not None and self._base is base else base

    def _look(self, base: State) -> None:
        """Ask all of them at once."""
        gateway, entries = self._gateway, {}
        own = gateway.upstream.own_ports | {base.settings.port}
        at_once([partial(self._ask, name, url, base.settings, entries)
                 for name, url in gateway.local_engines.items()
                 if Endpoint.of(url).port not in own], 2 * LOCAL_TIMEOUT_S)
        providers = [entries[name] for name in gateway.local_engines if name in entries]
        found = self._found if self._base is base else None
        if providers != (found.settings.providers if found else []):
            found = None
            if providers:
                settings = replace(base.settings, providers=providers)
                found = State(settings, Router(settings, gateway.environ), base.auth)
            self._announce(found)
        self._base, self._until, self._found = base, time.monotonic() + LOCAL_TTL_S, found

    def _announce(self, found: Optional[State]) -> None:
        log = self._gateway.log
        if found is None:
            return log.info("no engine answers on this machine any more")
        self._gateway.equip(found.router)
        for provider in found.router.providers.values():
            models = one_line(", ".join(provider.models), 160)
            log.info("found %s at %s: %s", provider.name, provider.base_url, models)

    def _ask(self, name: str, base_url: str, settings: Settings, entries: Dict[str, Json]) -> None:
        """Enter the engine into `entries` if one with a model answers that is no iflow2api."""
        limit_s = min(settings.connect_timeout_s, LOCAL_TIMEOUT_S)
        try:
            with self._gateway.upstream.open(
                    Provider(name, base_url), replace(settings, connect_timeout_s=limit_s), "GET",
                    "/models", (), None, NOBODY, LOCAL_TIMEOUT_S) as response:
                ours = response.headers.get("server", "").startswith("iflow2api")
                models = []
                if response.status == 200 and not ours:
                    models = parse_model_list(response.read_all(8 << 20))
        except GatewayError as exc:
            self._gateway.log.debug("no %s at %s: %s", name, base_url, exc.message)
            return
        # the first one is the default model
        models.sort(key=lambda model: "embed" in model.lower())
        if models:
            entries[name] = {"name": name, "models": models, **entry_at(base_url, name)}


def idle_patterns(router: Router, keys: Sequence[ClientKey]) -> List[str]:
    """Warnings for patterns of client keys that match nothing.

    [] unless each provider says what it serves.
    """
    providers = router.providers.values()
    if not providers or not all(provider.models for provider in providers):
        return []
    names = {name for p in providers for model in p.models for name in (model, f"{p.name}/{model}")}
    patterns = [*FOREIGN_MODELS["gemini"], *(pattern for pattern, _ in router.aliases)]
    return [f"client_keys: {key.name}: models: {wish!r} matches nothing" + nearest(wish, names)
            for key in keys for wish in key.models
            if not any(fits(name, wish) for name in [*names, *patterns])
            and not any(fits(wish, pattern) for pattern in patterns)]


class Gateway:
    """Routes calls to upstreams and answers back; knows no HTTP server.

    `config` makes it follow a config.json; `flags` are settings that stand above it for this run.
    """
    #: Where engines on this machine are looked for when no provider is set up; tests put their own
    #: here.
    local_engines: Mapping[str, str] = {name: PRESETS[name].base_url for name in LOCAL_ENGINES}

    def __init__(self, settings: Optional[Settings] = None, *, config: Optional[ConfigFile] = None,
                 environ: Optional[Mapping[str, str]] = None,
                 flags: Optional[Mapping[str, Any]] = None,
                 clock: Callable[[], float] = time.monotonic,
                 pause: Callable[[Client, float], None] = wait_for) -> None:
        self.config, self.flags = config, dict(flags or {})
        self.log, self._leads_log = GatewayLog(), False
        self.environ = os.environ if environ is None else environ
        self.live = Live()
        self.log.addHandler(self.live)
        self.upstream = Upstream()
        self.reasoning, self.conversations = ReasoningCache(), Conversations()
        self.scale = TokenScale(
            os.path.join(config.folder, "tokens.json") if config is not None else "", log=self.log)
        self._skipped: Set[str] = set()  #: types of blocks that were logged as skipped
        self._login: Json = {}           #: the iFlow CLI's file, as last read well
        oauth = OAuth(self.upstream, lambda: self.settings)
        self.logins = Logins(config, oauth, lambda: self.settings.accounts, self.reload, self.log)
        self._seal: Optional[Seal] = None
        self.started_at = time.time()
        self.in_flight = 0
        self.origins: Dict[str, str] = {}
        self.problems: List[str] = []
        self.config_broken = False
        self.clock, self.pause = clock, pause
        folder = config.folder if config is not None else ""
        self.ledger = Ledger(folder and os.path.join(folder, "usage.jsonl"), log=self.log)
        self.limiter = RateLimiter(
            clock, lambda key: self.ledger.spent(key, self.settings.prices))
        self.sessions = Sessions(lambda: self.settings.admin_password, clock)
        #: called whenever settings have been taken over
        self.listeners: List[Callable[[], None]] = [self.live.notify]
        self.lanes: Dict[str, Lane] = {}
        self._lock = threading.Lock()
        self._watch: Optional[FileWatch] = None
        self._engines = LocalEngines(self)
        self.state = State(Settings(), Router(Settings(), {}), ClientAuth(Settings()))
        if config is None:
            self.apply(settings or Settings())
        else:
            raw, broken = config.recover()
            self.config_broken = bool(broken)
            self._take_over(load_settings(raw, self.environ, self.flags),
                            broken + config.unreadable + self._read_login())
        self.responses = ResponseStore()

    @property
    def settings(self) -> Settings:
        return self.state.settings

    # settings

    def apply(self, settings: Settings) -> None:
        """Work with `settings` from the next request on; running ones keep theirs."""
        router, auth = self.routed(settings), ClientAuth(settings)
        self.equip(router)
        with self._lock:
            self.limiter.keep_keys(key.name for key in auth.keys)
            self.state = State(settings, router, auth)
        self.log.setLevel(settings.log_level.upper())
        if self._leads_log:
            log.setLevel(self.log.level)
        for tell in self.listeners:
            tell()

    def lead_log(self) -> None:
        """Use this gateway's log level, and show on its page, for all that the program logs."""
        self._leads_log = True
        self.log.removeHandler(self.live)
        log.addHandler(self.live)
        log.setLevel(self.log.level)

    def equip(self, router: Router) -> None:
        """Have a lane for each provider; one that has a lane keeps it.

        Calls that still use the lane of a provider that is gone keep that until they end.
        """
        with self._lock:
            lanes = {name: self.lanes.get(name) or Lane(provider, self.clock, self.scale)
                     for name, provider in router.providers.items()}
            for name, lane in lanes.items():
                lane.adopt(router.providers[name])
            self.lanes = lanes

    def lane(self, provider: Provider) -> Lane:
        """The provider's lane; a new one for a provider that has just been removed."""
        return self.lanes.get(provider.name) or Lane(provider, self.clock, self.scale)

    def routed(self, settings: Settings) -> Router:
        """The routes that `settings` would make."""
        if "providers" in self.flags:    # --upstream: that one alone
            return Router(settings, self.environ)
        name = self._login.get("modelName")
        iflow = iflow_provider(settings, self.origins, self.environ if self.config else {},
                               self._login)
        return Router(settings, self.environ, iflow, name if iflow and isinstance(name, str)
                      else "")

    def _read_login(self) -> List[str]:
        """Take over the iFlow CLI's file; the warnings.  A broken one leaves the last in force."""
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
        problems = broken + loaded.warnings + self.state.router.warnings
        problems += idle_patterns(self.state.router, self.state.auth.keys)
        problems += self.ledger.problems
        problems += proxy_warnings(loaded.settings, self.state.router.providers.values())
        for problem in problems:
            if problem not in self.problems:
                self.log.warning("%s", problem)
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
                self.log.warning("%s (the settings in force stay)", exc)
            before = self._login
            self._read_login()           # a login made meanwhile counts all the same
            if self._login != before:
                self.apply(self.settings)
            return
        loaded = self._without_conflicts(
            load_settings(raw, self.environ, self.flags, self.settings))
        before = (self.settings, self._login)
        broken = self.config.unreadable + self._read_login()
        had_problems = self.config_broken or loaded.warnings or broken or self.problems
        if (loaded.settings, self._login) != before or had_problems:
            self.config_broken = False
            self._take_over(loaded, broken)
            self.log.info("settings taken over from %s", self.config.path)

    def _without_conflicts(self, loaded: Loaded) -> Loaded:
        """`loaded`, but settings that newly conflict stay as they were.

        A conflict: an unknown provider, or a name taken twice.
        """
        router, known = self.routed(loaded.settings), self.state.router
        bad = router.conflicting - known.conflicting
        if not bad:
            return loaded
        problems = [f"{problem} (what was in force stays)" for problem in router.warnings
                    if problem not in known.warnings]
        kept = replace(loaded.settings, **{name: getattr(self.settings, name) for name in bad})
        return Loaded(kept, loaded.origins, loaded.warnings + problems)

    def watch_files(self) -> None:
        """Reload when config.json or the CLI's file changes on disk, and keep logins fresh."""
        if self.config is not None and self._watch is None:
            self._watch = FileWatch([self.config.path, os.path.expanduser(IFLOW_FILE)],
                                    self._files_changed, log=self.log)
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

    def config_version(self, raw: Optional[Json] = None) -> str:
        """A hash of config.json's content without the logins, which renew themselves."""
        if raw is None:
            raw = self.config.recover()[0] if self.config is not None else {}
        told = {name: value for name, value in raw.items() if name != "accounts"}
        return sha256(json.dumps(told, sort_keys=True)).hex()[:16]

    def keep_setting(self, name: str, value: str) -> bool:
        """Store a setting that was made here; False where it lasts for this run alone."""
        try:
            self.change_config(lambda raw: raw.update({name: value}))
        except OSError as exc:
            self.log.warning("%s can't be stored: %s", name, exc.strerror or exc)
        if getattr(self.settings, name) == value:
            return True
        self.flags[name] = value
        self.apply(replace(self.settings, **{name: value}))
        return False

    def ensure_client_key(self) -> Tuple[str, bool]:
        """The client key, made if there is none, and whether it lasts beyond this run."""
        if self.state.auth.required:
            return self.settings.custom_api_key, True
        key = "sk-" + secrets.token_hex(24)
        return key, self.keep_setting("custom_api_key", key)

    def seal(self) -> Seal:
        """What encrypts reasoning that clients store; its key is kept in config.json's folder."""
        if self._seal is None:
            path = os.path.join(self.config.folder, "seal.key") if self.config is not None else ""
            self._seal = Seal(_lasting_key(path, self.log) if path else secrets.token_bytes(32))
        return self._seal

    # answering

    def current(self, look: bool = True) -> State:
        """What a request starts from: the settings, and without providers this machine's engines.

        `look` False takes the engines that were found last.
        """
        state = self.state
        if state.router.default is not None or not state.settings.detect_local:
            return state
        return self._engines.state(state, look)

    def answer(self, call: Call, client: Client) -> None:
        """Answer one call; raises what Attempts.run raises."""
        with self._lock:
            self.in_flight += 1
        loop = self.upstream.loop if client.sock is not None else None
        try:
            if loop is not None:
                loop.watch(client)
            Attempts(self, call, client).run()
        finally:
            if loop is not None:
                loop.forget(client)
            with self._lock:
                self.in_flight -= 1

    def note(self, record: Record) -> None:
        """What came of a call: for usage, metrics, the page and the log."""
        settings, auth = self.state.settings, self.state.auth
        self.ledger.add(record, settings.usage_days, self.in_flight > 1,
                        settings.usage or auth.limited)
        self.live.requests.add(record)
        self.live.notify()
        if self.log.isEnabledFor(logging.INFO):
            self.log.info("%s", record.line())

    def tell_skipped(self, kinds: Sequence[str], call: Call) -> None:
        """Log types of content that nobody here knows, once each."""
        shown = {kind[:60] for kind in kinds} if len(self._skipped) < 50 else set()
        for kind in shown - self._skipped:
            self._skipped.add(kind)
            self.log.info("%s content of the type %r means nothing here and is left out",
                          call.request_id[4:12], one_line(kind, 60))

    def account_of(self, provider: Provider, key: str) -> Optional[str]:
        """The login that a key of the provider iflow comes from; None: from no login."""
        if self.config is None or provider.name != "iflow" or provider.kind != "iflow":
            return None
        keys = {**account_keys(self.settings.accounts),
                **account_keys({DEFAULT_ACCOUNT: self._login})}
        return next((name for name, known in keys.items() if known.strip() == key), None)

    def health(self) -> Json:
        """The body of /health: nothing in it is secret."""
        router, logins = self.current(look=False).router, self.login_report()
        providers = [{"name": p.name, "kind": p.kind, "usable": not p.problem,
                      **({"problem": p.problem} if p.problem else {}),
                      "circuit": self.lane(p).rests.state,
                      "keys_resting": self.lane(p).rests.resting,
                      "models": len(p.models)} for p in router.providers.values()]
        healthy = any(p["usable"] for p in providers) and not self.config_broken and not any(
            login["ended"] for login in logins.values())
        return {"status": "healthy" if healthy else "degraded",
                "iflow_logged_in": self._is_logged_in(),
                "version": __version__, "default_model": router.default_model,
                "uptime_s": int(time.time() - self.started_at), "in_flight": self.in_flight,
                "providers": providers,
                "logins": logins, "problems": [one_line(problem) for problem in self.problems]}

    def _is_logged_in(self) -> bool:
        iflow = self.state.router.providers.get("iflow")
        return iflow is not None and not iflow.problem and bool(iflow.api_keys)

    def login_report(self) -> Dict[str, Json]:
        """Refresher.report for the logins in force."""
        accounts = {name: object_of(login) for name, login in self.settings.accounts.items()}
        is_used = "providers" not in self.flags          # else --upstream
        return self.logins.refresher.report(
            {DEFAULT_ACCOUNT: self._login, **accounts} if is_used else {})

    def close(self) -> None:
        log.removeHandler(self.live)
        if self._watch is not None:
            self._watch.close()
        self.logins.close()
        self.upstream.close()
        self.ledger.close()
        self.scale.close()


# --- what there is -------------------------------------------------------------

def fetch_models(gateway: Gateway, provider: Provider) -> List[str]:
    """The provider's own `/models`, or what is known where it can't be relied on; UpstreamError."""
    if not provider.profile.get("lists_models", True):
        return list(provider.models)
    limit_s = min(gateway.settings.connect_timeout_s, MODELS_TIMEOUT_S)
    settings = replace(gateway.settings, connect_timeout_s=limit_s)
    key = gateway.lane(provider).keys(provider.api_keys)[0]
    headers = [*provider.headers, *([("Authorization", "Bearer " + key)] if key else [])]
    with gateway.upstream.open(provider, settings, "GET", "/models", headers, None, NOBODY,
                               MODELS_TIMEOUT_S) as response:
        if response.status != 200:
            raise read_refusal(response, provider)
        return parse_model_list(response.read_all(8 << 20))


def _fetch_list(gateway: Gateway, lane: Lane, now: float) -> None:
    provider, found = lane.provider, (now + MODELS_TTL_S / 10, lane.listed[1])
    try:
        found = (now + MODELS_TTL_S, fetch_models(gateway, provider))
    except GatewayError as exc:
        gateway.log.debug("no model list from %s: %s", provider.name, exc.message)
    if lane.provider.base_url == provider.base_url:  # else it has moved meanwhile
        lane.listed = found


def _fetch_lists(gateway: Gateway, providers: Sequence[Provider]) -> Dict[str, List[str]]:
    """What the providers themselves list, kept for MODELS_TTL_S; one that fails: its last list."""
    now = time.monotonic()
    at_once([partial(_fetch_list, gateway, lane, now) for lane in map(gateway.lane, providers)
             if lane.listed[0] < now], 2 * MODELS_TIMEOUT_S)
    return {provider.name: gateway.lane(provider).listed[1] for provider in providers}


def models_of(gateway: Gateway, key: Optional[ClientKey] = None,
              more: Collection[str] = ()) -> List[Json]:
    """All names that can be asked for and are routed, each with the provider it leads to.

    With a client's `key` those that it may use.  `more`: names to list as well if they are
    redirected.
    """
    router = gateway.current().router
    found = {name: router.resolve(name, Asked("messages"))[0].provider.name for name in more
             if router.redirects(name) and router.default is not None}
    for pattern, branches in router.aliases:
        if pattern and not re.search(r"[*?\[]", pattern):
            first = branches[0].models[0]
            found.setdefault(pattern, first.partition("/")[0] if "/" in first else "")
    lists = _fetch_lists(gateway, [provider for provider in router.providers.values()
                                   if not provider.problem and provider.kind != "iflow"])
    for provider in router.providers.values():
        for model in provider.models:
            plain = router.place_of(model).provider is provider
            found.setdefault(model if plain else f"{provider.name}/{model}", provider.name)
    for name, models in lists.items():
        known = set(router.providers[name].models)
        for model in models:
            is_default = router.default is not None and name == router.default.name
            plain = is_default and not router.claimed(model)
            if plain or model not in known:
                found.setdefault(model if plain else f"{name}/{model}", name)
    if key is not None and key.models:
        found = {model: owner for model, owner in found.items()
                 if may_use(router, key, model, router.resolve(
                     model, Asked("messages" if model in more else "chat")))}
    return [_model_entry(gateway, model, owner or "iflow2api") for model, owner in found.items()]


def _model_entry(gateway: Gateway, name: str, owner: str) -> Json:
    return {"id": name, "object": "model", "created": int(gateway.started_at), "owned_by": owner}


def find_model(gateway: Gateway, name: str, key: Optional[ClientKey] = None) -> Optional[Json]:
    """What a name stands for: listed, redirected, or `provider/name` of a listed one; None:
    unknown.
    """
    router = gateway.current(look=False).router
    name = router.named(name)
    models, (head, _, rest) = models_of(gateway, key, [name]), name.partition("/")
    listed = next((model for model in models if model["id"] == name), None)
    target = router.claimed(name)
    if listed or target is None or (target.provider.name, target.model) != (head, rest):
        return listed
    if key is not None and not may_use(router, key, name, [target]):
        return None
    its = [model["id"] for model in models if model["owned_by"] == head]
    return None if its and rest not in its else _model_entry(gateway, name, head)


def target_of(gateway: Gateway, name: str, speaks: str = "messages") -> Optional[Target]:
    """Where a request for the model would go first."""
    try:
        chain = gateway.current(look=False).router.resolve(name, Asked(speaks))
    except GatewayError:
        return None
    return chain[0] if chain else None


def vision_models_of(gateway: Gateway, key: Optional[ClientKey] = None) -> List[Json]:
    """Of models_of those that are known to take images."""
    seeing = set()
    for provider in gateway.state.router.providers.values():
        for model in provider.models:
            if provider.facts.get(model, {}).get("vision") or model == provider.vision_model:
                seeing |= {model, f"{provider.name}/{model}"}
    return [model for model in models_of(gateway, key) if model["id"] in seeing]


def target_to_count(gateway: Gateway, call: Call) -> Optional[Target]:
    """Where a request whose tokens are counted would go, None: nowhere; Forbidden."""
    if call.model is not None and not isinstance(call.model, str):
        return None
    try:
        return next(iter(gateway.current(look=False).chain_for(call)), None)
    except Forbidden:
        raise
    except GatewayError:
        return None


def scaled_count(gateway: Gateway, target: Optional[Target], estimate: int) -> int:
    """`estimate` as the target's model counts, as far as that is known."""
    if target is None:
        return estimate
    return gateway.lane(target.provider).scaled(target.model, estimate)


# --- what it tells of itself ---------------------------------------------------

def _target_facts(gateway: Gateway, target: Target) -> Json:
    """What there is to know of a target before anybody asks it."""
    provider = target.provider
    return {"provider": provider.name, "model": target.model, "base_url": provider.base_url,
            "usable": not provider.problem, "problem": provider.problem,
            "circuit": gateway.lane(provider).rests.state, "keys": len(provider.api_keys),
            "keys_resting": gateway.lane(provider).rests.resting,
            "vision_model": provider.vision_model}


#: What `explain` is told of a request.
_EXPLAINED = record({}, {
    "model": any_text, "dialect": one_of(*FOREIGN_MODELS),
    "tokens": number(0, 10 ** 12, True), "images": truth, "thinking": truth, "tools": truth,
    "aliases": names_to(anything)}, strict=False)


def explain(gateway: Gateway, body: Json, in_english: bool = True) -> Json:
    """Where a model's name goes, step by step, for a request as `body` says (_EXPLAINED).

    With `aliases`: where it would go with those, and in `problems` what is wrong with them.
    BadRequest for a bad `body`.
    """
    try:
        _EXPLAINED(body, "")
    except ValueError as exc:
        raise BadRequest(str(exc), param=str(exc).partition(":")[0]) from None
    dialect = body.get("dialect", "chat")
    asked = Asked(dialect, *(body.get(name, 0)
                             for name in ("tokens", "images", "thinking", "tools")))
    state = gateway.current(look=False)
    router, told = state.router, {"model": body.get("model")}
    if "aliases" in body:
        router = gateway.routed(replace(state.settings, aliases=body["aliases"]))
        told["problems"] = [problem for problem in router.warnings
                            if problem not in state.router.warnings]
    steps: Told = []
    targets = router.resolve(body.get("model"), asked, steps)
    return {**told, "steps": explain_steps(steps, in_english),
            "chain": [_target_facts(gateway, target) for target in targets]}


def queues_of(gateway: Gateway) -> List[Json]:
    """Who is asked and who waits, at each upstream."""
    return [{"provider": name, "active": lane.slots.active, "waiting": lane.slots.waiting,
             "limit": lane.slots.limit} for name, lane in gateway.lanes.items()]


def history_of(gateway: Gateway) -> List[Json]:
    """The last requests, the newest first: route, attempts, counts; no bodies."""
    return [record.facts() for _, record in reversed(gateway.live.requests.after(0, 10 ** 6)[1])]


def _login_gauges(gateway: Gateway) -> Iterator[Tuple[str, str, List[Tuple[str, str, float]]]]:
    report = gateway.login_report()
    for family, text, name in (
            ("login_expires_at_seconds", "When a login has to be refreshed.", "expires_at"),
            ("login_refreshed_at_seconds", "When a refresh was last tried.", "refreshed_at"),
            ("login_refresh_ok", "Whether the last refresh worked.", "refresh_ok"),
            ("login_ended", "Whether only a new login helps.", "ended")):
        values = {account: parse_time(login[name]) if name.endswith("_at") else login[name]
                  for account, login in report.items()}
        yield family, text, [("account", account, float(value))
                             for account, value in values.items() if value is not None]


def metrics_text(gateway: Gateway) -> str:
    """The body of /metrics."""
    rested = {"closed": 0, "half-open": 0.5, "open": 1}

    def of_lanes(value: Callable[[Lane], float]) -> List[Tuple[str, str, float]]:
        return [("provider", name, value(lane)) for name, lane in gateway.lanes.items()]

    gauges = [
        ("info", "The program.", [("version", __version__, 1)]),
        ("start_time_seconds", "When it started.", [("", "", gateway.started_at)]),
        ("in_flight", "Requests being answered.", [("", "", gateway.in_flight)]),
        ("upstream_active", "Requests at an upstream.", of_lanes(lambda lane: lane.slots.active)),
        ("upstream_waiting", "Requests queued for an upstream.",
         of_lanes(lambda lane: lane.slots.waiting)),
        ("keys_resting", "Keys put to rest.", of_lanes(lambda lane: lane.rests.resting)),
        ("upstream_rested",
         "1 while an upstream that kept failing rests, 0.5 until it has been tried again.",
         of_lanes(lambda lane: rested[lane.rests.state])),
        *_login_gauges(gateway)]
    return prometheus_text([*gateway.ledger.families(), *(
        (name, "gauge", text,
         [("", ((label, of),) if label else (), value) for label, of, value in samples])
        for name, text, samples in gauges if samples)])


# --- trying a provider ---------------------------------------------------------

class Collect(Client):
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
    """The message that answers a tiny real request, {} of a streamed one; GatewayError.

    `key`: whose usage it is.  `more` is added to the request.
    """
    limit = profile_of(Target(provider, model))["max_tokens_field"]
    body = {"model": f"{provider.name}/{model}", limit: 512 if "tools" in more else 16,
            "messages": [{"role": "user", "content": "Say hi."}], **more}
    client = Collect()
    gateway.answer(Call(CHAT, body, dump_text(body), {}, new_id("req_"), key), client)
    return {} if body.get("stream") else first_choice(json.loads(client.data)).get("message") or {}


def model_to_try(gateway: Gateway, provider: Provider) -> str:
    """The default model if it is this provider's, else its first one, else the first it lists.

    NotLoggedIn where the provider is unusable, UpstreamError where it lists none.
    """
    if provider.problem:
        raise NotLoggedIn(provider.problem)
    router = gateway.current().router
    if router.default_model and (gateway.settings.default_model in provider.models
                                 or provider is router.default):
        head, slash, rest = router.default_model.partition("/")
        return rest if slash and head == provider.name else router.default_model
    if provider.models:
        return provider.models[0]
    listed = [model for model in fetch_models(gateway, provider) if "embed" not in model]
    if not listed:
        raise UpstreamGarbled("it lists no models; name one in its `models`, or with --model")
    return listed[0]


#: What is at fault, by the status that a trial ends with, and which check that is.
FAULTS = {401: ("key", "the key"), 402: ("key", "the balance"), 403: ("key", "the key"),
          404: ("model", "the model"), 429: ("key", "the rate limit"),
          502: ("reach", "the connection"), 504: ("reach", "the connection")}

PROBE_TOOL = {"type": "function", "function": {
    "name": "report", "description": "Report a number.",
    "parameters": {"type": "object", "properties": {"number": {"type": "integer"}},
                   "required": ["number"]}}}

#: What is tried at a provider, in this order.
CHECKS = ("reach", "key", "model", "stream", "tools")


class Check(NamedTuple):
    """One thing tried at a provider; `ok` None: not tried, since an earlier one failed."""
    what: str
    ok: Optional[bool] = None
    message: str = ""
    took_s: float = 0.0


#: What came of a check, in Chinese and English; failures are told in English.
CHECK_TEXTS = {"key": ("密钥正常", "key ok"), "no key": ("无需密钥", "needs no key"),
               "model": ("模型 {model} 正常（{took_s:.1f} 秒）", "model {model} ok ({took_s:.1f} s)"),
               "stream": ("流式正常", "stream ok"), "tools": ("工具正常", "tools ok"),
               "unused": ("接受工具，但没有调用", "tools taken, but none called")}


def examine(gateway: Gateway, provider: Provider, key: Optional[ClientKey] = None,
            whole: bool = True, in_english: bool = True) -> List[Check]:
    """Try a provider with real requests: CHECKS; `whole` False: without stream and tools."""
    def told(which: str, **facts: Any) -> str:
        return CHECK_TEXTS[which][in_english].format(**facts)

    started = time.monotonic()
    try:
        model = model_to_try(gateway, provider)
        ask_provider(gateway, provider, model, key)
    except GatewayError as exc:
        failed, fault = FAULTS.get(exc.status, ("model", f"HTTP {exc.status}"))
        if provider.problem:
            failed, fault = "reach", "its settings"
        at = CHECKS.index(failed)
        return [*(Check(what, True) for what in CHECKS[:at]),
                Check(failed, False, f"{fault}: {one_line(exc.message, 500)}",
                      time.monotonic() - started),
                *(Check(what) for what in CHECKS[at + 1:])]
    took_s = time.monotonic() - started
    checks = [Check("reach", True),
              Check("key", True, told("key" if provider.api_keys else "no key")),
              Check("model", True, told("model", model=model, took_s=took_s), took_s)]
    tool_request = {"tools": [PROBE_TOOL],
                    "messages": [{"role": "user",
                                  "content": "Call the tool report with the number 7."}]}
    for what, more in (("stream", {"stream": True}), ("tools", tool_request)) if whole else ():
        started = time.monotonic()
        try:
            message = ask_provider(gateway, provider, model, key, **more)
            lazy = what == "tools" and not message.get("tool_calls")
            said = told("unused" if lazy else what)
            checks.append(Check(what, True, said, time.monotonic() - started))
        except GatewayError as exc:
            said = f"{what} failed ({exc.status}: {one_line(exc.message, 160)})"
            checks.append(Check(what, False, said, time.monotonic() - started))
    return checks


# --- logging out ----------------------------------------------------------------

def remove_login(gateway: Gateway, account: str) -> bool:
    """Take a login away, and nothing else of its file; whether there was one.

    LoginFailed, ConfigBroken, OSError.
    """
    file, gone = LoginFile(account, gateway.config), False
    login = file.read()
    # then its apiKey and searchApiKey are another service's
    is_other = login.get("selectedAuthType") == "openai-compatible"
    fields = [name for name in LOGIN_FIELDS if not (is_other and name.endswith("piKey"))]
    if any(name in login for name in fields):
        with file.held():
            file.update(dict.fromkeys(login if not file.is_default else fields))
            file.drop_pending()
        gone = True
    if file.is_default and gateway.config and gateway.config.read().get("api_key"):
        gateway.config.change(lambda raw: raw.pop("api_key", None))
        gone = True
    return gone


def log_path(gateway: Gateway) -> str:
    """Where log_file is, "" if it is not set; a relative one is in the folder of config.json."""
    path = os.path.expanduser(gateway.settings.log_file)
    return os.path.join(gateway.config.folder if gateway.config is not None else "",
                        path) if path else ""


# === 16. HTTP ================================================================

class ClientReader(HeadReader):
    """A client's bytes, with a moment by which they have to come.

    Where another thread sets `deadline` to 0, the wait for the client ends.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.deadline = sock, 0.0
        self._poller: Any = None

    def _receive(self) -> bytes:
        while True:
            try:
                return self.sock.recv(65536)
            except BlockingIOError:
                if not self._readable():
                    raise socket.timeout("the client is too slow") from None

    def _readable(self) -> bool:
        if self._poller is None:
            self._poller = Poller()
            self._poller.register(self.sock.fileno(), _POLLIN)
        left_s = self.deadline - time.monotonic()
        wait_s = max(0.0, min(left_s, LOOK_UP_S))
        return bool(self._poller.poll(wait_s * 1000)) or left_s > LOOK_UP_S

    def wait(self, seconds: float) -> bool:
        """Whether a first byte comes in time; False at the end of the connection, too."""
        self.deadline = time.monotonic() + seconds
        try:
            self.buffer = self.buffer or self._receive()
        except OSError:
            return False
        return bool(self.buffer)

    def read_request_head(self) -> bytes:
        """A request's head, empty lines before it skipped (RFC 9112, 2.2); BadRequest."""
        head = self.read_head(b"\r\n")
        if head is None:
            raise BadRequest("the request's head is too large", status=431)
        if not head:
            raise ClientGone
        return head

    def check_head(self, head: bytearray) -> None:
        """BadRequest at once for what can't become a request: TLS waits, and sends no line end."""
        if head[:1] == b"\x16":
            raise BadRequest("this port speaks plain HTTP; write http://, not https://")
        if head and not head[:1].isupper():
            raise BadRequest("the request line is malformed or too long")


_REQUEST_LINE = Pattern(r"([A-Z]{1,20}) (\S{1,16000}) HTTP/1\.([01])")


def parse_head(head: bytes) -> Tuple[str, str, str, Dict[str, str]]:
    """Method, target, version and headers (join_headers) of a request; BadRequest.

    Stricter than http.server, whose parser for e-mail lets folded lines and blanks before the
    colon pass: what a proxy before us might read in another way is refused.
    """
    first_line, *lines = head.replace(b"\r\n", b"\n").split(b"\n")
    first = first_line.decode("latin-1")
    found = _REQUEST_LINE.fullmatch(first)
    if not found:
        if re.search(r" HTTP/\d", first) and not first.endswith((" HTTP/1.0", " HTTP/1.1")):
            raise BadRequest("this server speaks HTTP/1.1", status=505)
        raise BadRequest("the request line is malformed or too long",
                         status=414 if len(first) > 16000 else 400)
    if len(lines) > HEADERS_LIMIT:
        raise BadRequest("too many headers", status=431)
    rows = [line.partition(b":") for line in lines]
    names = b"".join(name for name, _, _ in rows)
    is_clean = b"\r" not in head.replace(b"\r\n", b"") and b"\0" not in head
    if not is_clean or names.translate(None, _TOKEN) or not all(
            name and colon for name, colon, _ in rows):
        raise BadRequest("the request's head is malformed")
    pairs = [(name.decode("ascii"), value.decode("latin-1").strip(" \t"))
             for name, _, value in rows]
    return found.group(1), found.group(2), "HTTP/1." + found.group(3), join_headers(pairs)


def find_target(head: bytes) -> str:
    """The target in a malformed head, "" without one: its path decides the dialect of the error."""
    words = head.partition(b"\n")[0].split(b" ", 2)
    return words[1].decode("latin-1") if len(words) == 3 else ""


def check_framing(headers: Mapping[str, str], version: str) -> Optional[int]:
    """The body's length, None for chunked; BadRequest where a proxy might see another one."""
    if version == "HTTP/1.1" and not re.fullmatch(r"[^\s,/@]+", headers.get("host", "")):
        raise BadRequest("one Host header is needed")
    length = headers.get("content-length")
    if "transfer-encoding" in headers:
        is_chunked = headers["transfer-encoding"].lower() == "chunked"
        if length is not None or version == "HTTP/1.0" or not is_chunked:
            raise BadRequest("Transfer-Encoding must be chunked alone, without Content-Length "
                             "and with HTTP/1.1")
        return None
    if length is not None and not (length.isdigit() and length.isascii() and len(length) < 19):
        raise BadRequest("Content-Length must be one number")
    return int(length or 0)


class RequestBody:
    """What follows a head on the connection; it is read once, in time and within a limit."""

    def __init__(self, reader: ClientReader, length: Optional[int], awaits_continue: bool) -> None:
        """`awaits_continue`: the client sends it only when it is told to (RFC 9110, 10.1.1)."""
        self._reader, self.awaits_continue = reader, awaits_continue
        self.left = -1 if length is None else length     #: bytes to read; -1: a chunked body's

    @property
    def is_short(self) -> bool:
        """Whether what is left comes soon: reading it is cheaper than a new connection."""
        return self.left == 0 or 0 < self.left <= 65536 and not self.awaits_continue

    def pieces(self, limit: int, time_s: float) -> Iterator[bytes]:
        """The payload as it comes; BadRequest, socket.timeout."""
        if self.left > limit:
            raise too_large(limit)
        if self.awaits_continue:
            send_all(self._reader.sock, b"HTTP/1.1 100 Continue\r\n\r\n")
            self.awaits_continue = False
        dechunker, size, start = Dechunker(), 0, time.monotonic()
        while self.left:
            self._reader.deadline = start + time_s + size / BODY_BYTES_PER_S
            data = self._reader.take()
            if not data:
                raise BadRequest("the body ended before its " + (
                    "last chunk" if self.left < 0 else "Content-Length"))
            piece, surplus = self._split(data, dechunker)
            self._reader.buffer = surplus                # it belongs to the next request
            size += len(piece)
            if size > limit:
                self.left = -1           # the connection is not used again
                raise too_large(limit)
            yield piece

    def _split(self, data: bytes, dechunker: Dechunker) -> Tuple[bytes, bytes]:
        """The payload in what was received, and what comes after the body."""
        if self.left > 0:
            piece, surplus = data[:self.left], data[self.left:]
            self.left -= len(piece)
            return piece, surplus
        try:
            piece = dechunker.feed(data)
        except ValueError as exc:
            raise BadRequest(f"the chunked body is broken: {exc}") from None
        self.left = 0 if dechunker.done else -1
        return piece, dechunker.surplus

    def skip(self) -> bool:
        """Read a short body that nobody wanted; whether the connection can be used again."""
        with contextlib.suppress(BadRequest, OSError):
            for _ in self.pieces(65536, 1) if self.is_short else ():
                pass
        return self.left == 0


@lru_cache(2)
def http_date(at: int) -> str:
    return formatdate(at, usegmt=True)


class Handler(http.server.BaseHTTPRequestHandler):
    """One client connection.  Reads heads strictly, finds the endpoint, turns errors into bytes."""
    server: "Server"
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"iflow2api/{__version__}", ""

    @property
    def gateway(self) -> Gateway:
        return self.server.gateway

    # the connection

    def setup(self) -> None:
        self.connection = self.request
        self.connection.setblocking(False)
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = ClientReader(self.connection)
        self.close_connection, self.busy = True, False
        self.is_surplus = self.server.enter(self)

    def finish(self) -> None:
        """Nothing to flush: every write went to the socket."""
        self.server.leave(self)

    def handle(self) -> None:
        wait_s = HEAD_TIME_S
        with contextlib.suppress(ClientGone, OSError):   # logged by who answers the request
            while self.reader.wait(wait_s) and not self.server.closing.is_set():
                self.busy = True
                try:
                    self.handle_one_request()
                finally:                 # a request must not live as long as its connection
                    self.headers, self.key, self.session = {}, None, None
                    self.writer, self.meters = None, ()
                if not self.close_connection:
                    self.close_connection = not self.body.skip()
                if self.close_connection:
                    self._linger()
                self.busy = False
                if self.close_connection or self.server.closing.is_set():
                    break
                wait_s = CLIENT_IDLE_S

    def _linger(self) -> None:
        """Close without a reset, which would destroy an answer that is still on its way."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.reader.deadline = time.monotonic() + LINGER_S
            while self.reader.take() and time.monotonic() < self.reader.deadline:
                pass

    # one request

    def handle_one_request(self) -> None:
        """One request: head, checks, endpoint; any error that comes up becomes an answer here."""
        self.request_id, self.close_connection = new_id("req_"), True
        self.headers: Dict[str, str] = {}                # type: ignore[assignment]
        self.path, self.command, self.request_version = "", "", "HTTP/1.1"
        self.endpoint, self.body = UNKNOWN, RequestBody(self.reader, 0, False)
        self.key: Optional[ClientKey] = None
        self.session: Optional[Session] = None
        self.meters: Sequence[Meter] = ()
        self.writer: Optional[ResponseWriter] = None
        self.status, self.has_head = 200, False
        head = b""
        try:
            self.reader.deadline = time.monotonic() + HEAD_TIME_S
            head = self.reader.read_request_head()
            self.command, self.path, self.request_version, self.headers = parse_head(head)
            self._serve()
        except Exception as exc:         # a defect of ours becomes a 500
            if not self.path:            # the head is what was refused
                self.path = find_target(head or self.reader.buffer)
                self.endpoint = dialect_of(self.path, {})
            self._tell_failure(self._error_of(exc))
            forget_trace(exc)

    def _error_of(self, exc: Exception) -> Optional[GatewayError]:
        """What the client is told of an exception; None where it is gone."""
        if isinstance(exc, GatewayError):
            return exc
        self.close_connection = True
        if isinstance(exc, socket.timeout):
            return BadRequest("the request did not arrive in time", status=408,
                              code="request_timeout")
        if isinstance(exc, (ClientGone, OSError)):
            return None
        if isinstance(exc, RecursionError):
            return BadRequest("the body is nested too deeply")
        self.gateway.log.exception("%s failed", self.request_id)
        return GatewayError("iflow2api failed on this request; its log says why")

    def _tell_failure(self, exc: Optional[GatewayError]) -> None:
        """Answer with an error, and log it; at debug level where the call has its own log line."""
        if exc is None:
            return
        is_quiet = self.writer is not None or self.path == "/favicon.ico"
        try:
            self.send_error_of(exc)
        except (OSError, ClientGone):
            self.close_connection = True
        self.gateway.log.log(
            logging.DEBUG if is_quiet else logging.INFO, "%s %s %s %d (%s)", self.request_id[4:12],
            self.command or "-", one_line(self.path.split("?")[0], 80),
            self.endpoint.dialect.status(exc), one_line(exc.message, 200))

    def log_message(self, format: str, *args: Any) -> None:
        """http.server's own log lines; ours are written where an answer ends."""

    def _serve(self) -> None:
        self.endpoint = dialect_of(self.path, self.headers)
        # close_connection stays true where the framing can't be trusted
        expects = self.headers.get("expect", "").lower() == "100-continue"
        self.body = RequestBody(self.reader, check_framing(self.headers, self.request_version),
                                expects and self.request_version != "HTTP/1.0")
        if not self.path.startswith("/") or self.path.startswith("//"):
            raise BadRequest("the request target must be a path")
        tokens = tokens_of(self.headers.get("connection", ""))
        self.close_connection = "close" in tokens or (
            self.request_version == "HTTP/1.0" and "keep-alive" not in tokens)
        if "websocket" in tokens_of(self.headers.get("upgrade", "")):
            raise BadRequest("this server speaks no WebSocket; use plain HTTP", status=426,
                             should_retry=False)
        if self.server.closing.is_set() or self.is_surplus:
            self.close_connection = True
            raise Busy("the server is shutting down" if self.server.closing.is_set() else
                       "too many connections; raise max_connections")
        self.endpoint, self.argument = find_endpoint(self.command, self.path, self.headers)
        check_origin(self.server, self.headers, self.command)
        if self.endpoint.admin:
            check_own_page(self.headers)
            self.session = None if self.endpoint.public else check_session(self)
        elif not self.endpoint.public:
            self.key = check_key(self.server, self.headers, self.path)
            if self.gateway.state.auth.limited:
                self.meters = meters_of(self)
        answer = self.endpoint.run(self)
        if answer is not None:
            self.respond_json(answer, self.status)
        elif not self.has_head:
            self.respond(204, b"", "")

    # the body

    def read_body(self, limit: int = 0) -> bytes:
        """The body, unpacked, of at most `limit` bytes (0: body_limit_bytes); BadRequest."""
        limit = limit or self.gateway.settings.body_limit_bytes
        limit = min(limit, PUBLIC_KEPT_BYTES) if self.endpoint.public else limit
        if self.headers.get("content-type", "").lower().startswith("multipart/"):
            raise BadRequest("a JSON body is expected, not multipart", status=415)
        encoding = self.headers.get("content-encoding", "").strip().lower()
        if encoding in ("identity", ""):
            return b"".join(self.receive(limit))
        if self.endpoint.public:
            raise BadRequest("what needs no key takes no compressed body", status=415)
        packings = packings_of(encoding)
        return inflate(b"".join(self.receive(limit)), packings, limit)

    def receive(self, limit: int) -> Iterator[bytes]:
        """The body as it comes, still packed; BadRequest."""
        if not {"content-length", "transfer-encoding"} & set(self.headers):
            self.close_connection = True
            raise BadRequest("Content-Length or Transfer-Encoding: chunked is needed", status=411)
        return self.body.pieces(limit, BODY_TIME_S)

    def read_json(self, limit: int = 0) -> Json:
        return parse_body(decode_body(self.read_body(limit)))

    # answers

    def head(self, status: int, headers: Iterable[Tuple[str, str]]) -> bytes:
        """An answer's head, with what every answer has."""
        self.has_head = True
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Error')}",
                 f"Server: {self.server_version}",
                 f"Date: {http_date(int(time.time()))}",
                 *(f"{name}: {self.request_id}" for name in self.endpoint.dialect.id_headers)]
        lines += cors_lines(self.headers, self.path, self.command == "OPTIONS")
        if self.endpoint.admin:
            lines += ["Cache-Control: no-store", "X-Content-Type-Options: nosniff"]
        # ours instead of the upstream's, which are about another key
        if self.meters:
            ours = self.gateway.limiter.headers(self.meters)
            headers = [*ours, *(pair for pair in headers if not ours
                                or not pair[0].lower().startswith("x-ratelimit-"))]
        lines += [f"{name}: {value}" for name, value in headers]
        if self.close_connection or self.server.closing.is_set():
            lines.append("Connection: close")
        elif self.request_version == "HTTP/1.0":
            lines.append("Connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def respond(self, status: int, body: bytes, content_type: str,
                headers: Iterable[Tuple[str, str]] = ()) -> None:
        """A whole answer in one write."""
        self.close_connection = self.close_connection or not self.body.is_short
        own = [("Content-Type", content_type), ("Content-Length", str(len(body)))]
        own = [] if status in (204, 304) else own
        self.write(self.head(status, [*own, *headers]) + (b"" if self.command == "HEAD" else body))

    def respond_json(self, value: Json, status: int = 200,
                     headers: Iterable[Tuple[str, str]] = ()) -> None:
        self.respond(status, dump_json(value), "application/json", headers)

    def respond_static(self, body: bytes, content_type: str,
                       headers: Iterable[Tuple[str, str]] = ()) -> None:
        """A page that seldom changes: packed where that is accepted, 304 where it is known."""
        tag, packed = pack_static(body)
        own = [("ETag", tag), ("Cache-Control", "no-cache"), ("Vary", "Accept-Encoding"),
               ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"), *headers]
        if tag in self.headers.get("if-none-match", ""):
            return self.respond(304, b"", "", own)
        if accepts_gzip(self.headers.get("accept-encoding", "")):
            body, own = packed, [*own, ("Content-Encoding", "gzip")]
        self.respond(200, body, content_type, own)

    def send_error_of(self, exc: GatewayError) -> None:
        """The one place where an error becomes bytes: an answer, or a part of a stream."""
        if not isinstance(exc, UpstreamError):           # ours may quote what the client sent
            exc.message = one_line(exc.message, 1000)
            exc.param = one_line(exc.param, 60) if exc.param is not None else None
        if self.writer is not None and (self.writer.open or self.writer.tells_within(exc)):
            return self.writer.fail(exc)
        status = self.endpoint.dialect.status(exc)
        headers: List[Tuple[str, str]] = []
        if exc.retry_after_s is not None:
            headers.append(("Retry-After", str(max(1, int(exc.retry_after_s + 0.999)))))
        if exc.should_retry is not None:
            headers.append(("x-should-retry", str(exc.should_retry).lower()))
        if exc.allow:
            headers.append(("Allow", ", ".join(exc.allow)))
        if status == 426:
            headers += [("Upgrade", "HTTP/1.1"), ("Connection", "Upgrade")]
        if status == 401:
            headers.append(("WWW-Authenticate", "Bearer"))
        self.respond_json(self.endpoint.dialect.error(exc, self.request_id), status, headers)

    def write(self, data: bytes) -> None:
        """Everything to the client, or ClientGone."""
        send_all(self.connection, data)


def accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding names gzip, and not with q=0 (RFC 9110, 12.5.3)."""
    for part in header.lower().split(","):
        name, _, weight = part.partition(";")
        if name.strip() == "gzip":
            weight = weight.strip().replace("q=", "", 1)
            return not weight or weight.strip("0.") != ""
    return False


@lru_cache(8)
def pack_static(body: bytes) -> Tuple[str, bytes]:
    """A page's ETag and its packed form; the tag is weak, as it holds for both forms."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)      # 16 + 15: gzip
    return f'W/"{hashlib.sha256(body).hexdigest()[:24]}"', packer.compress(body) + packer.flush()


def send_now(sock: socket.socket, data: bytes) -> bytes:
    """Write what a non-blocking socket takes, mostly all; returns the rest.  ClientGone."""
    try:
        sent = sock.send(data)
    except BlockingIOError:
        return data
    except OSError:
        raise ClientGone from None
    return data[sent:]


def send_all(sock: socket.socket, data: bytes) -> None:
    """Write all to a non-blocking socket; ClientGone when it is closed or takes nothing."""
    rest = memoryview(send_now(sock, data))              # whose slices are no copies
    while rest:
        if not is_writable(sock, SEND_TIME_S):
            raise ClientGone
        rest = send_now(sock, rest)


def too_large(limit: int) -> BadRequest:
    name = "" if limit in (PUBLIC_BODY_BYTES, PUBLIC_KEPT_BYTES) else " (body_limit_bytes)"
    return BadRequest(f"the body is larger than {limit} bytes{name}", status=413,
                      code="request_too_large")


class Packing(NamedTuple):
    """One format of compressed bodies."""
    unpacker: Callable[[], Any]          #: makes an object as zlib.decompressobj does
    error: Any                           #: the class of what it raises for other data
    magic: bytes                         #: what another part of the body begins with


#: A gzip or zstd body may have several members or frames, one after the other (RFC 1952, 2.2;
#: RFC 8878, 3); bgzip makes a member of each 64 KiB.
PACKED_PARTS = 10_000

_GZIP_MAGIC = b"\x1f\x8b"


def packings_of(encoding: str) -> List[Packing]:
    """What a Content-Encoding may stand for; BadRequest 415.  deflate: raw, too, as browsers take
    it.
    """
    if encoding in ("gzip", "x-gzip", "deflate"):
        return [Packing(partial(zlib.decompressobj, window), zlib.error, _GZIP_MAGIC)
                for window in (47, -15)]
    if encoding != "zstd":
        raise BadRequest(f"Content-Encoding {encoding[:40]} is not known; gzip, deflate and zstd "
                         "are", status=415)
    try:
        from compression import zstd
    except ImportError:
        raise BadRequest("a body compressed with zstd needs Python 3.14 or newer on this server; "
                         "Codex stops compressing with --disable enable_request_compression, or "
                         "in its config.toml: [features] enable_request_compression = false",
                         status=415) from None
    return [Packing(zstd.ZstdDecompressor, zstd.ZstdError, b"")]


def inflate(body: bytes, packings: Iterable[Packing], limit: int) -> bytes:
    """A compressed body, never beyond `limit` bytes; BadRequest."""
    for packing in packings:
        with contextlib.suppress(packing.error, EOFError):
            return _inflate(memoryview(body), packing, limit)
    raise BadRequest("the body can't be decompressed as its Content-Encoding says")


def _inflate(body: memoryview, packing: Packing, limit: int) -> bytes:
    """EOFError where it is cut off; in pieces, since what is left is copied each time."""
    parts, size, at = [], 0, 0
    for _ in range(PACKED_PARTS):
        unpacker = packing.unpacker()
        while not unpacker.eof:
            piece = body[at:at + 16384]
            parts.append(unpacker.decompress(piece, limit + 1 - size))
            size += len(parts[-1])
            if size > limit:
                raise too_large(limit)
            if not piece:
                raise EOFError
            at += len(piece) - len(unpacker.unused_data)
        if at == len(body) or body[at:at + len(packing.magic)] != packing.magic:
            return b"".join(parts)
    raise EOFError


class ResponseWriter(Client):
    """Writes one answer; a stream's head goes out with its first bytes, or a keep-alive."""

    def __init__(self, handler: Handler, call: Call) -> None:
        super().__init__()
        self._handler, self._call = handler, call
        self.sock = handler.connection
        self.keepalive_s = handler.gateway.settings.keepalive_s if call.stream else LONGEST_S
        self._chunked = handler.request_version != "HTTP/1.0"
        self._writing = threading.Lock()
        #: `open`: the head was sent, so the status can't change.  `_over`: all was sent.
        self.open, self._over = False, False
        self.wrote_at = time.monotonic()

    def _head(self) -> bytes:
        """The head of a stream, once."""
        if self.open:
            return b""
        self.open = True
        handler = self._handler
        framing = [("Transfer-Encoding", "chunked")] if self._chunked else []
        handler.close_connection = handler.close_connection or not self._chunked
        return handler.head(200, [("Content-Type", self._call.dialect.stream_type),
                                  ("Cache-Control", "no-cache"),
                                  ("X-Accel-Buffering", "no"), *framing, *self.returned])

    def _frame(self, payload: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(payload), payload) if self._chunked and payload else payload

    def _write(self, data: bytes) -> None:
        with self._writing:
            data = self._head() + data if not self.open else data
            data = self.backlog + data if self.backlog else data
            if self.nonblocking:
                self.backlog = send_now(self.sock, data)
            else:
                self.backlog = b""
                send_all(self.sock, data)
            self.wrote_at = time.monotonic()

    def flush(self) -> None:
        rest = send_now(self.sock, self.backlog)
        if len(rest) < len(self.backlog):
            self.backlog, self.wrote_at = rest, time.monotonic()

    def is_stuck(self, now: float) -> bool:
        return now - self.wrote_at >= SEND_TIME_S

    def send(self, payload: bytes, framed: Optional[bytes] = None) -> None:
        self.began = True
        self._write(framed if framed is not None and self._chunked else self._frame(payload))

    def end(self, payload: bytes) -> None:
        self.began = self._over = True
        self._write(self._frame(payload) + (b"0\r\n\r\n" if self._chunked else b""))

    def reply(self, data: bytes, content_type: str, headers: Sequence[Tuple[str, str]]) -> None:
        self.began = self._over = True
        self._handler.respond(200, data, content_type, headers)

    def tick(self, now: float) -> None:
        """A keep-alive, unless something is being written or waits to be."""
        if now - self.wrote_at < self.keepalive_s * 0.99 or not self._writing.acquire(False):
            return
        try:
            if not self.backlog and not self._over:
                keepalive = self._frame(self._call.dialect.keepalive(self._call, self.began))
                self.backlog = send_now(self.sock, self._head() + keepalive)
                self.wrote_at = now
        except ClientGone as exc:
            self.leave(exc)
        finally:
            self._writing.release()

    def tells_within(self, exc: GatewayError) -> bool:
        """Whether an error before any output is sent in the stream, as `response.failed` is."""
        return self._call.stream and self._call.dialect.fails_in_stream(exc)

    def fail(self, exc: GatewayError) -> None:
        """An error in the dialect's own words within the stream; then the connection ends."""
        self._handler.close_connection = True
        if self.translation is not None:
            return self.end(self.translation.fail(exc))
        self.end(self._call.dialect.error_event(exc, self._call.request_id))


# --- who may talk to us ------------------------------------------------------

def is_own_page(headers: Mapping[str, str]) -> bool:
    """Whether the web page that sends a request comes from the address that it asks."""
    origin = headers.get("origin", "")
    return origin.partition("://")[2].lower() == headers.get("host", "").lower()


def check_origin(server: "Server", headers: Mapping[str, str], method: str) -> None:
    """Forbidden for a Host that is not ours (DNS rebinding), or a foreign page without a key."""
    settings, auth = server.gateway.settings, server.gateway.state.auth
    host = headers.get("host", "").lower()
    name = host.partition("]")[0] + "]" if host.startswith("[") else host.rpartition(":")[0] or host
    if server.is_local and not (
            is_loopback(name) or name in ("host.docker.internal", "")
            or name in [str(known).lower() for known in settings.allowed_hosts]):
        raise Forbidden(f"Host {name[:80]!r} is not this machine; add it to `allowed_hosts`",
                        code="host_not_allowed")
    origin = headers.get("origin")
    if origin is None or method == "OPTIONS" or {origin, "*"} & set(settings.allowed_origins):
        return
    if is_own_page(headers) or auth.required and auth.find(client_keys(settings, headers)):
        return
    raise Forbidden(f"the web page at {origin[:80]} may not call this server; add it to "
                    "`allowed_origins`" + (", or send the key" if auth.required else ""),
                    code="origin_not_allowed")


def client_keys(settings: Settings, headers: Mapping[str, str],
                target: str = "") -> Iterator[str]:
    """Every key that a request bears, wherever clients put it; Google's also into the query."""
    yield from urllib.parse.parse_qs(target.partition("?")[2]).get("key", [])
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield token.strip()
    for name in ("x-api-key", "api-key", "x-goog-api-key", settings.custom_auth_header.lower()):
        value = headers.get(name, "") if name else ""
        if value:
            yield value.strip()
            yield value.partition(" ")[2].strip()        # a custom header may say Bearer too


#: For clients, and for /health, once the last key is removed from a server that others reach.
NO_KEY_LEFT = ("this server is reached from other machines and has no client key, so it "
               "answers nobody; on its machine, `key add NAME` makes one, or set custom_api_key")


def check_key(server: "Server", headers: Mapping[str, str],
              target: str) -> Optional[ClientKey]:
    """Whose request it is, None where no key is needed; Unauthorized."""
    state = server.gateway.state
    if not server.needs_key:
        return None
    if not state.auth.required:
        raise Unauthorized(NO_KEY_LEFT, code="no_client_key")
    given = list(client_keys(state.settings, headers, target))
    key = state.auth.find(given)
    if key is None:
        ours = ("custom_api_key" if state.settings.custom_api_key
                else "keys (`key add NAME` makes one)")
        raise Unauthorized(f"the API key is wrong; it must be this server's {ours}" if any(given)
                           else f"an API key is needed: send this server's {ours} in the header "
                                "Authorization, after the word Bearer")
    if time.time() >= key.expires_at:
        day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(key.expires_at))
        raise Unauthorized(f"the API key {key.name} expired on {day}", code="expired_api_key")
    return key


def check_own_page(headers: Mapping[str, str]) -> None:
    """Forbidden for a foreign web page, which another port of this host is, too."""
    is_foreign = "origin" in headers and not is_own_page(headers)
    if is_foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
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
    sessions, token = handler.gateway.sessions, session_token(handler)
    session = sessions.find(token) if token else None
    scheme, _, given = handler.headers.get("authorization", "").partition(" ")
    if session is None and scheme.lower() == "basic":
        session = sessions.basic(address_of(handler), given.strip())
        if session is None:
            raise Unauthorized("user or password is wrong", code="wrong_password")
    if session is None and token:
        raise Unauthorized("the session has ended; sign in again", code="session_expired")
    if session is None:
        raise Unauthorized("sign in at /admin first", code="no_session")
    return session


def address_of(handler: Handler) -> str:
    """Who asks, as limits count it."""
    return client_address(handler.client_address[0], handler.headers.get("x-forwarded-for", ""),
                          handler.gateway.settings.trusted_proxies)


def meters_of(handler: Handler) -> List[Meter]:
    """What a request is measured on: its key's limits, its address's."""
    gateway, meters = handler.gateway, []
    if handler.key is not None and handler.key.limits:
        meters.append(gateway.limiter.of_key(handler.key))
    limits = gateway.settings.address_limits
    if limits:
        meters.append(gateway.limiter.of_address(address_of(handler), limits))
    return meters


def cors_lines(headers: Mapping[str, str], path: str, preflight: bool) -> List[str]:
    """What lets a browser's page read an answer; never under /admin, never credentials."""
    origin = headers.get("origin")
    if not origin or not origin.isprintable() or normal_path(path).startswith("/admin"):
        return []
    lines = [f"Access-Control-Allow-Origin: {origin}", "Vary: Origin",
             "Access-Control-Expose-Headers: x-request-id, request-id, retry-after, x-should-retry"]
    if preflight:
        wanted = headers.get("access-control-request-headers", "")
        wanted = wanted if wanted and wanted.isprintable() else "authorization, content-type"
        lines += ["Access-Control-Allow-Methods: GET, HEAD, POST, DELETE, OPTIONS",
                  "Access-Control-Max-Age: 600", f"Access-Control-Allow-Headers: {wanted}"]
        if headers.get("access-control-request-private-network"):
            lines.append("Access-Control-Allow-Private-Network: true")
    return lines


# --- endpoints ---------------------------------------------------------------

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


def page_of(data: List[Json], more: bool) -> Json:
    """A part of a list and whether there is more, in the form that both APIs use."""
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"data": data, "has_more": more, "first_id": ends[0], "last_id": ends[1]}


def answer_call(handler: Handler, **fields: Any) -> None:
    """Chat, completions, embeddings, whatever dialect the endpoint speaks.

    `fields` of the request come from elsewhere than its body.
    """
    with handler.gateway.limiter.hold(handler.meters) if handler.meters else _NO_WAIT:
        dialect = handler.endpoint.dialect
        text = decode_body(handler.read_body())
        names = conversation_names(handler.headers)
        known = handler.gateway.conversations.of(text, names) if dialect.converses else None
        body = {**parse_body(text, known), **fields}
        dialect.check(body)
        call = Call(dialect, body, text, handler.headers, handler.request_id, handler.key,
                    handler.meters, known)
        handler.writer = ResponseWriter(handler, call)
        handler.gateway.answer(call, handler.writer)


def count_tokens(handler: Handler, **fields: Any) -> Json:
    """POST …/count_tokens, …/input_tokens and …:countTokens: an estimate, never a request upstream.

    It counts as a request and keeps to the key's models (anthropic-messages.md section 9).
    """
    gateway, owner = handler.gateway, owner_of(handler.key)
    with gateway.limiter.hold(handler.meters) if handler.meters else _NO_WAIT:
        text = decode_body(handler.read_body())
        body = {**parse_body(text), **fields}
        call = Call(handler.endpoint.dialect, body, text, handler.headers, handler.request_id,
                    handler.key)
        target = target_to_count(gateway, call)
        if call.dialect is RESPONSES:
            estimate = count_response_tokens(
                body, lambda ident: gateway.responses.recall(ident, owner),
                lambda ident: gateway.responses.item(ident, owner), gateway.seal())
            return {"object": "response.input_tokens",
                    "input_tokens": scaled_count(gateway, target, estimate)}
        if call.dialect is GEMINI:
            return {"totalTokens": scaled_count(gateway, target, count_content_tokens(body))}
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise BadRequest("messages: a list with at least one message is required",
                             param="messages")
        return {"input_tokens": scaled_count(
            gateway, target, count_message_tokens(body))}


#: Verb of a Gemini path -> dialect, `stream`; None for countTokens.
GEMINI_VERBS: Dict[str, Optional[Tuple[ChatDialect, bool]]] = {
    "generateContent": (GEMINI, False), "streamGenerateContent": (GEMINI, True),
    "embedContent": (GEMINI_EMBEDDING, False), "batchEmbedContents": (GEMINI_EMBEDDING, False),
    "countTokens": None}


def answer_gemini(handler: Handler) -> Optional[Json]:
    """POST …/models/{model}:verb; models with colons and slashes in their names come as they are.
    """
    model, _, verb = urllib.parse.unquote(handler.argument).rpartition(":")
    if not model or verb not in GEMINI_VERBS:
        raise NotFound(f"there is nothing at {handler.path.partition('?')[0][:100]}; a model and "
                       f"one of {', '.join(GEMINI_VERBS)} is expected", code="not_found")
    verbs = GEMINI_VERBS[verb]
    if verbs is None:
        return count_tokens(handler, model=model)
    dialect, stream = verbs
    if stream and query_of(handler).get("alt") != "sse":
        dialect = GEMINI_ARRAY
    handler.endpoint = handler.endpoint._replace(dialect=dialect)
    return answer_call(handler, model=model, stream=stream)


def kept_response(handler: Handler) -> Json:
    """GET and DELETE /v1/responses/{id}, GET …/input_items."""
    ident, _, rest = handler.argument.partition("/")
    store = handler.gateway.responses
    known = rest == "" or rest == "input_items" and handler.command != "DELETE"
    kept = store.find(ident, owner_of(handler.key)) if known else None
    if kept is None:
        raise NotFound(f"Response with id '{ident[:80]}' not found.", param="id")
    if handler.command == "DELETE":
        store.drop(ident)
        return {"id": ident, "object": "response.deleted", "deleted": True}
    return item_page(kept.items, query_of(handler)) if rest else kept.response


def item_page(items: List[Json], query: Mapping[str, str]) -> Json:
    """A page of input items, the newest first unless `order=asc`; `limit` (20), `after`."""
    limit, after = number_in(query, "limit", 20, 100), query.get("after")
    named = [{**item, "id": item.get("id") or f"item_{number}"}
             for number, item in enumerate(items)]
    named = named if query.get("order") == "asc" else named[::-1]
    names = [item["id"] for item in named]
    if after and after not in names:
        raise BadRequest(f"after: there is no item '{after[:80]}'", param="after")
    rest = named[names.index(after) + 1:] if after else named
    return {"object": "list", **page_of(rest[:limit], len(rest) > limit)}


def drop_events(handler: Handler) -> Json:
    """Where Anthropic's clients send their telemetry: read, and dropped as it comes."""
    for _ in handler.receive(PUBLIC_BODY_BYTES):
        pass
    return {"accepted_count": 0, "rejected_count": 0}


def show_metrics(handler: Handler) -> None:
    handler.respond(200, metrics_text(handler.gateway).encode(),
                    "text/plain; version=0.0.4; charset=utf-8")


def show_models(handler: Handler) -> Json:
    """The list in the client's shape; with `models` beside `data` for Codex."""
    gateway, query, dialect = handler.gateway, query_of(handler), handler.endpoint.dialect
    if dialect is not MESSAGES:
        found = models_of(gateway, handler.key)
        if dialect is GEMINI:
            return gemini_page([gemini_model(gateway, model["id"]) for model in found], query)
        wants_more = is_codex(handler.headers) or "client_version" in query
        return {"object": "list", "data": found,
                **({"models": codex_models(gateway, found)} if wants_more else {})}
    models = [anthropic_model(model, target_of(gateway, model["id"]))
              for model in models_of(gateway, handler.key, CLAUDE_MODELS.values())]
    return anthropic_page(models, query)


def show_model(handler: Handler) -> Json:
    wanted, gateway = urllib.parse.unquote(handler.argument), handler.gateway
    model = find_model(gateway, wanted, handler.key)
    if model is None:
        raise NotFound(f"the model {wanted[:100]!r} does not exist", code="model_not_found",
                       param="model")
    if handler.endpoint.dialect is GEMINI:
        return gemini_model(gateway, wanted)
    return (anthropic_model(model, target_of(gateway, wanted))
            if handler.endpoint.dialect is MESSAGES else model)


def gemini_model(gateway: Gateway, name: str) -> Json:
    """A model as Google's API lists it."""
    target = target_of(gateway, name, "gemini")
    facts = target.provider.facts.get(target.model, {}) if target else {}
    limits = (("inputTokenLimit", "context"), ("outputTokenLimit", "max_output"))
    return {"name": f"models/{name}", "displayName": name,
            **{shown: facts[fact] for shown, fact in limits if facts.get(fact)},
            "supportedGenerationMethods": ["generateContent", "countTokens"]}


def gemini_page(models: List[Json], query: Mapping[str, str]) -> Json:
    """One page of the list: `pageSize` (50 without), `pageToken`, which is where it begins."""
    size, start = number_in(query, "pageSize", 50, 1000), query.get("pageToken", "0")
    if not re.fullmatch(r"\d{1,9}", start):
        raise BadRequest("pageToken: not one of this server", param="pageToken")
    end = int(start) + size
    return {"models": models[int(start):end],
            **({"nextPageToken": str(end)} if end < len(models) else {})}


def anthropic_model(model: Json, target: Optional[Target] = None) -> Json:
    """A model as Anthropic's API lists it; its display name says where it leads."""
    name = model["id"]
    shown = {"type": "model", "id": name, "display_name": name,
            "created_at": format_time(model["created"]),
            "lifecycle": "active"}
    if target is None:
        return shown
    where = f"{target.provider.name}/{target.model}"
    if name not in (target.model, where):
        shown["display_name"] = f"{name} → {where}"
    facts = target.provider.facts.get(target.model, {})
    limits = (("max_input_tokens", "context"), ("max_tokens", "max_output"))
    return {**shown, **{name: facts[fact] for name, fact in limits if facts.get(fact)}}


#: What Codex tells a model before all else: its list needs it, and Codex' own is not taken then.
CODEX_PROMPT = """\
You are a coding agent. You work in the Codex CLI, in a terminal on the user's computer, and read \
files, change files and run commands with the tools that you have. Go on until the user's request \
is done, then stop.

- Say in one sentence what you are going to do before each group of tool calls. Keep a plan of \
work that takes several steps, with the tool for plans if you have one.
- Read code before you change it, and follow its style. An AGENTS.md file holds for its folder and \
all below; a deeper one goes before it, and what the user says goes before both.
- Change files with apply_patch if you have it, else with shell commands. Search with rg if it is \
installed.
- Remove the cause of a fault, not its symptom. Change only what belongs to the task, never undo \
what you did not do, and commit only when you are asked to.
- Check your work with the project's tests or build, as far as there are any.
- The conversation says what the sandbox allows and when to ask for approval. Keep to that.
- At the end say in a few lines what you changed and where (`path:line`), and what you could not \
do or check. Show no long code that nobody asked for.
"""


def codex_models(gateway: Gateway, models: Sequence[Json]) -> List[Json]:
    """The models as Codex' list has them, each with all that it insists on; what is not known of
    a model is left to Codex.  In its menu they come before its own ones, which begin at priority 0.
    """
    default, shown = gateway.current(look=False).router.default_model, []
    for rank, name in enumerate((model["id"] for model in models), -len(models)):
        target = target_of(gateway, name, "responses") or Target(Provider(""), name)
        profile, provider = profile_of(target), target.provider
        known = {**provider.profile, **provider.facts.get(target.model, {})}
        efforts = [effort for effort in EFFORTS if effort in known.get("efforts", ())]
        sees = profile["vision"] or bool(provider.vision_model)
        shown.append({
            "slug": name, "display_name": name, "description": f"{provider.name}/{target.model}",
            "priority": -len(models) - 1 if name == default else rank, "visibility": "list",
            "supported_in_api": True, "base_instructions": CODEX_PROMPT,
            "shell_type": "shell_command", "apply_patch_tool_type": None, "upgrade": None,
            "experimental_supported_tools": [],
            "supported_reasoning_levels": [{"effort": effort, "description": ""}
                                           for effort in efforts],
            "supports_reasoning_summaries": bool(efforts),
            "input_modalities": ["text", *(["image"] if sees else [])],
            "supports_parallel_tool_calls": profile["parallel_tool_calls"],
            "support_verbosity": "verbosity" in profile["extra_fields"], "default_verbosity": None,
            "truncation_policy": {"mode": "tokens", "limit": 10_000},
            **({"context_window": known["context"]} if known.get("context") else {})})
    return shown


def anthropic_page(models: List[Json], query: Mapping[str, str]) -> Json:
    """One page of the list: `limit` (1 to 1000, 20 without), `after_id`, `before_id`."""
    limit, names = number_in(query, "limit", 20, 1000), [model["id"] for model in models]
    after, before = query.get("after_id"), query.get("before_id")
    if after in names:
        models = models[names.index(after) + 1:]
    if before in names:
        page = models[:names.index(before)][-limit:]
        return page_of(page, names.index(before) > len(page))
    return page_of(models[:limit], len(models) > limit)


CARD = r"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>iflow2api</title>
<style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:40rem;
margin:3rem auto;padding:0 1rem}code{font:14px ui-monospace,monospace}li{margin:.2rem 0}</style>
<h1>iflow2api</h1>
<p>It runs. Point an OpenAI client here / 服务已启动，将客户端的 base URL 设为：<br>
<code>URL/v1</code></p>
<ul><li><a href="/admin">/admin</a></li><li><a href="/health">/health</a></li>
<li><a href="/v1/models">/v1/models</a></li><li><a href="/metrics">/metrics</a></li>
<li>API 文档 / documents: <a href="/docs">/docs</a>, <a href="/redoc">/redoc</a>,
<a href="/openapi.json">/openapi.json</a></li></ul>"""

#: No script, nothing from elsewhere; for pages that are only text and style.
PAGE_HEADERS = (("Content-Security-Policy",
                 "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
                ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"))


def show_card(handler: Handler) -> Optional[Json]:
    """What answers at `/`: JSON, or a small page for a browser."""
    if "text/html" in handler.headers.get("accept", ""):
        page = CARD.replace("URL", handler.server.url)
        return handler.respond(200, page.encode(), "text/html; charset=utf-8", PAGE_HEADERS)
    endpoints = sorted(path for path in ROUTES if path != "/" and not path.startswith("/admin/"))
    return {"name": "iflow2api", "version": __version__,
            "base_url": handler.server.url + "/v1",
            "docs": handler.server.url + "/docs", "endpoints": endpoints}


class Route(NamedTuple):
    """What a method of a path does.

    `run` answers by itself, or returns the answer's JSON; None is an empty answer.  `about` are the
    shapes of body and answer (section 17), and what it is in both languages.  `public`: without a
    client key.  `admin`: for the page alone, with a session instead of a key, unless it is public.
    """
    run: Callable[[Handler], Optional[Json]]
    dialect: ChatDialect = CHAT
    about: str = ""
    public: bool = False
    admin: bool = False


def no_endpoint(handler: Handler) -> None:
    raise NotFound(f"there is nothing at {handler.path.partition('?')[0][:100]}", code="not_found")


PREFLIGHT = Route(lambda handler: None, public=True)
UNKNOWN = Route(no_endpoint)

#: path without /v1 -> method -> what it does; HEAD comes with GET.  A path that ends in a slash
#: takes what follows it.
ROUTES: Dict[str, Dict[str, Route]] = {}

#: group, in both languages -> `METHOD /path` -> what it does: the order of the documents
API: Dict[str, Dict[str, Route]] = {}

#: /v1; Gemini's versions, with the ones that its clients add once more, and Vertex's.
_VERSION_PREFIX = Pattern(
    r"^(?:/api)?/v1(?:beta1/publishers/google|beta(?:/v1(?:beta)?)?)?(?=/|$)")


def normal_path(target: str) -> str:
    """The path of a request target: no version, no /api, no slash at its end, no query."""
    return _VERSION_PREFIX.sub("", target.partition("?")[0].partition("#")[0]).rstrip("/") or "/"


def add_routes(rows: Mapping[str, Route], group: str = "") -> None:
    """Serve `METHOD /path` rows, and document them in a group."""
    for line, route in rows.items():
        method, path = line.split()
        ROUTES.setdefault(normal_path(path).partition("{")[0], {})[method] = route
    if group:
        API.setdefault(group, {}).update(rows)


add_routes({
    "POST /v1/chat/completions": Route(
        answer_call, CHAT, "ChatRequest | ChatCompletion+ | 对话 | Chat completion"),
    "POST /v1/completions": Route(
        answer_call, COMPLETIONS,
        "CompletionRequest | ChatCompletion+ | 文本补全，原样转发 | Text completion, passed on"),
    "POST /v1/embeddings": Route(
        answer_call, EMBEDDINGS,
        "EmbeddingRequest | List | 向量，原样转发 | Embeddings, passed on")},
    "OpenAI Chat 及旧接口 | OpenAI Chat and its kin")
add_routes({
    "POST /v1/messages": Route(
        answer_call, MESSAGES,
        "MessagesRequest | Message+ | 消息（Claude Code 用它） | Message, for Claude Code"),
    "POST /v1/messages/count_tokens": Route(
        count_tokens, MESSAGES, "CountRequest | TokenCount | 估算 token 数 | Estimate tokens")},
    "Anthropic Messages | Anthropic Messages")
add_routes({
    "POST /v1/responses": Route(
        answer_call, RESPONSES,
        "ResponsesRequest | Response+ | 回答（Codex 用它） | Response, for Codex"),
    "POST /v1/responses/compact": Route(
        answer_call, COMPACT, "ResponsesRequest | Response | 压缩对话 | Compact a conversation"),
    "POST /v1/responses/input_tokens": Route(
        count_tokens, RESPONSES, "ResponsesRequest | TokenCount | 估算 token 数 | Estimate tokens"),
    "GET /v1/responses/{id}": Route(
        kept_response, RESPONSES, " | Response | 已保存的回答 | A stored response"),
    "DELETE /v1/responses/{id}": Route(
        kept_response, RESPONSES, " | Deleted | 删除已保存的回答 | Delete a stored response"),
    "GET /v1/responses/{id}/input_items": Route(
        kept_response, RESPONSES, " | List | 它的输入，分页 | Its input, in pages")},
    "OpenAI Responses | OpenAI Responses")
add_routes({f"POST /v1beta/models/{{model}}:{verb}": Route(answer_gemini, GEMINI, about)
            for verb, about in (
    ("generateContent", "GeminiRequest | GeminiAnswer | 回答 | Answer"),
    ("streamGenerateContent", "GeminiRequest | GeminiAnswer+ | 流式回答 | Answer as a stream"),
    ("countTokens", "GeminiRequest | object | 估算 token 数 | Estimate tokens"),
    ("embedContent", "object | object | 向量 | An embedding"),
    ("batchEmbedContents", "object | object | 多个向量 | Embeddings"))}, "Gemini | Gemini")
add_routes({
    "GET /v1/models": Route(
        show_models, CHAT, " | List | 模型列表，格式随客户端 | Models, in the client's own shape"),
    "GET /v1/models/{model}": Route(show_model, CHAT, " | Model | 一个模型 | One model"),
    "GET /v1/vision-models": Route(
        lambda handler: {"object": "list", "data": vision_models_of(handler.gateway, handler.key)},
        CHAT, " | List | 能看图的模型 | Models that take images")}, "模型 | Models")
SERVICE = "服务 | The service"
add_routes({
    "GET /health": Route(lambda handler: handler.server.health(), CHAT,
                         " | Health | 状态，总是 200 | Health, always 200", public=True),
    "GET /metrics": Route(show_metrics, CHAT,
                          " | text/plain | Prometheus 指标 | Metrics for Prometheus"),
    "GET /": Route(show_card, CHAT, " | Card | 服务名片 | Service card", public=True),
    **{f"POST /api/event_logging/{version}batch": Route(
        drop_events, MESSAGES, f"object | Dropped | 遥测，收下即丢弃{mark} | Telemetry, dropped{mark}",
        public=True) for version, mark in (("", ""), ("v2/", " (v2)"))}}, SERVICE)


def client_dialect(target: str, headers: Mapping[str, str]) -> ChatDialect:
    """The dialect of a client that asks for what several dialects have, or nobody has."""
    path, _, query = target.partition("?")
    if path.startswith(("/v1beta", "/api/v1beta")) or "x-goog-api-key" in headers or (
            "x-goog-api-client" in headers or query.startswith("key=") or "&key=" in query):
        return GEMINI
    return MESSAGES if "anthropic-version" in headers else CHAT


def dialect_of(target: str, headers: Mapping[str, str]) -> Route:
    """A route with the dialect of errors before routing: the path's, or the client's."""
    path = normal_path(target)
    if path.startswith("/messages"):
        return UNKNOWN._replace(dialect=MESSAGES)
    if path in ROUTES and not path.startswith("/models"):
        return UNKNOWN
    return UNKNOWN._replace(dialect=client_dialect(target, headers))


def find_endpoint(method: str, target: str, headers: Mapping[str, str]) -> Tuple[Route, str]:
    """The route of a request and the rest of its path; BadRequest 405 with `allow`."""
    path = normal_path(target)
    base = path if path in ROUTES else max(
        (known for known in ROUTES if known.endswith("/") and path.startswith(known)), key=len)
    methods, argument = ROUTES[base], path[len(base):]
    unknown = UNKNOWN._replace(dialect=client_dialect(target, headers))
    if base == "/" != path:
        return unknown, ""
    route = methods.get("GET" if method == "HEAD" else method)
    if route is None and method == "OPTIONS":
        return PREFLIGHT._replace(dialect=unknown.dialect), argument
    if route is None:
        allow = sorted({*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])})
        raise BadRequest(f"{path} takes {', '.join(allow)}", status=405, allow=allow,
                         code="method_not_allowed")
    if path.startswith("/models") and method != "POST":
        # the same path for several dialects: the client gets answers and errors of its own
        route = route._replace(dialect=unknown.dialect)
    return route, argument


# --- the server --------------------------------------------------------------

def url_of(host: str, port: int) -> str:
    """Where a client on this machine reaches a server bound to `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{bracketed(host.strip('[]'))}:{port}"


class Server(Listener):
    """The listening socket and its connections, one thread each."""
    request_queue_size, ipv6_only = 1024, False
    LAST_WORDS_S = 0.5                   #: for telling clients that their answer ends here

    def __init__(self, gateway: Gateway, host: str, port: int) -> None:
        self.gateway, self.closing = gateway, threading.Event()
        self._handlers: Set[Handler] = set()
        self._lock = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host.strip("[]"), port), Handler)
        #: Whether only this machine reaches it, judged by the bound address, not by its name.
        self.is_local = is_loopback(str(self.server_address[0]))
        # now that the address is ours: a start that fails must make no key
        if not self.is_local:
            gateway.ensure_client_key()
        gateway.upstream.own_ports.add(self.port)
        self._thread = threading.Thread(target=self.serve_forever, args=(5,), name="accept",
                                        daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        return url_of(self.server_address[0], self.port)

    @property
    def needs_key(self) -> bool:
        """Whether clients need a key: where one is set, and always where others reach us."""
        return not self.is_local or self.gateway.state.auth.required

    def health(self) -> Json:
        """Gateway.health, and what it means for clients at this address."""
        health = self.gateway.health()
        if self.needs_key and not self.gateway.state.auth.required:
            health["problems"] = [NO_KEY_LEFT, *health["problems"]]
        return {**health, "needs_key": self.needs_key}

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection; a few beyond the limit get a 503, the rest are closed."""
        if len(self._handlers) >= self.gateway.settings.max_connections + 64:
            return self.shutdown_request(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:             # the system gives no more threads
            self.shutdown_request(request)

    def enter(self, handler: Handler) -> bool:
        """Note a connection; True where it is one too many, which gets a 503."""
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
            # wait for one to come back instead of spinning
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                self.closing.wait(0.1)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.gateway.log.exception("a connection failed")

    def close(self, drain_s: float = 0.0) -> None:
        """Accept nothing more, let running answers end for `drain_s`, then cut them off."""
        self.closing.set()
        self.gateway.live.close()        # open pages are not waited for
        stop_accepting(self)
        self._cut(lambda handler: not handler.busy)
        self._wait_for_handlers(drain_s)
        self.gateway.upstream.end_all(Stopping("the server is shutting down"))
        self._wait_for_handlers(self.LAST_WORDS_S)
        self._cut(lambda handler: True)
        self.gateway.upstream.own_ports.discard(self.port)
        self.gateway.close()

    def _wait_for_handlers(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._handlers and time.monotonic() < until:
            threading.Event().wait(0.02)

    def _cut(self, wanted: Callable[[Handler], bool]) -> None:
        with self._lock:
            handlers = [handler for handler in self._handlers if wanted(handler)]
        for handler in handlers:
            handler.reader.deadline = 0.0
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
    # loaded now, so that a broken file is reported at the start
    gateway.ledger.load()
    if gateway.config is not None and gateway.config.warning():
        gateway.log.warning("%s", gateway.config.warning())
    for problem in gateway.ledger.problems:
        gateway.problems += [problem] if problem not in gateway.problems else []
        gateway.log.warning("%s", problem)
    return Server(gateway, settings.host if host is None else host,
                  settings.port if port is None else port)


# === 17. Documents ===========================================================
#
# /openapi.json, made of API, and the two pages that show it.

#: Name, then the fields of a body as `name:type`, `*` for what has to be there; others are allowed.
#: A name of Route.about with `+`: with `stream` the answer comes as server-sent events.
SHAPES = """
ChatRequest model:string messages*:array stream:boolean max_tokens:integer temperature:number stop \
tools:array tool_choice response_format:object reasoning_effort:string thinking:object
ChatCompletion id*:string object*:string created*:integer model*:string choices*:array usage:object
CompletionRequest model:string prompt* suffix:string max_tokens:integer stop stream:boolean
EmbeddingRequest model:string input* encoding_format:string dimensions:integer
MessagesRequest model:string max_tokens*:integer messages*:array system stream:boolean tools:array \
tool_choice:object thinking:object stop_sequences:array temperature:number output_config:object
Message id*:string type*:string role*:string model*:string content*:array stop_reason usage*:object
CountRequest model:string messages*:array system tools:array
TokenCount input_tokens*:integer
ResponsesRequest model:string input* instructions:string stream:boolean store:boolean text:object \
previous_response_id:string tools:array tool_choice reasoning:object max_output_tokens:integer
Response id*:string object*:string created_at*:integer output*:array model:string status:string
Deleted id*:string object*:string deleted*:boolean
List data*:array object:string has_more:boolean
Model id*:string object:string created:integer owned_by:string
Health status*:string version*:string iflow_logged_in*:boolean providers*:array
Card name*:string version*:string base_url*:string docs:string endpoints*:array
Dropped accepted_count*:integer rejected_count*:integer
GeminiRequest contents*:array systemInstruction:object tools:array toolConfig:object \
generationConfig:object
GeminiAnswer candidates:array usageMetadata:object modelVersion:string responseId:string
Error error*:object
AnthropicError type*:string error*:object request_id:string"""

_ABOUT = (
    "每个 API 路径不带 /v1、以 /api/v1 开头或末尾带斜杠也可访问。未列出的字段照样转发。",
    "Every API path also answers without /v1, with /api/v1 and with a slash at its end. "
    "Fields that are not listed are passed on, too.")


def _shape_schema(fields: Sequence[str]) -> Json:
    pairs = [field.partition(":")[::2] for field in fields]
    kinds = {"": {}, "array": {"type": "array", "items": {}}}
    return {"type": "object", "required": [name[:-1] for name, _ in pairs if name[-1] == "*"],
            "properties": {name.rstrip("*"): kinds.get(kind, {"type": kind})
                           for name, kind in pairs}}


def _content(shape: str) -> Json:
    """A body or an answer of this shape, by media type."""
    name = shape.rstrip("+")
    if "/" in name:
        return {name: {"schema": {"type": "string"}}}
    schema = {"type": "object"} if name == "object" else {"$ref": "#/components/schemas/" + name}
    stream = {"text/event-stream": {"schema": {"type": "string"}}} if name != shape else {}
    return {"application/json": {"schema": schema}, **stream}


def _operation(line: str, route: Route) -> Json:
    """One operation of the document; its summary in both languages."""
    method, path = line.split()
    asks, gives, *summary = (part.strip() for part in route.about.split("|"))
    error = _content("AnthropicError" if route.dialect is MESSAGES else "Error")
    body = {"requestBody": {"required": True, "content": _content(asks)}} if asks else {}
    return {"operationId": method.lower() + re.sub(r"\W+", "_", path.rstrip("}")), **body,
            **({"security": []} if route.public else {}), "summary": summary,
            "parameters": [{"name": name, "in": "path", "required": True,
                            "schema": {"type": "string"}} for name in re.findall(r"{(\w+)}", path)],
            "responses": {"200": {"description": "OK", "content": _content(gives)},
                          "4XX": {"description": "refused", "content": error},
                          "5XX": {"description": "failed", "content": error}}}


@lru_cache(4)
def openapi(language: int, key_header: str, needs_key: bool) -> Json:
    """The OpenAPI 3.1 document of the public endpoints in Chinese (0) or English (1)."""
    tags: List[str] = []
    paths: Json = {}
    for group, rows in API.items():
        tags.append(group.split(" | ")[language])
        for line, route in rows.items():
            method, path = line.split()
            operation = _operation(line, route)
            paths.setdefault(path, {})[method.lower()] = {
                **operation, "summary": operation["summary"][language], "tags": tags[-1:]}
    schemes = {"bearer": {"type": "http", "scheme": "bearer"}, **{
        name: {"type": "apiKey", "in": "header", "name": name}
        for name in ("x-api-key", "api-key", key_header) if name}}
    shapes = [line.split() for line in SHAPES.strip().split("\n")]
    return {"openapi": "3.1.0", "servers": [{"url": "/"}], "paths": paths,
            "info": {"title": "iflow2api", "version": __version__, "description": _ABOUT[language],
                     "license": {"name": "MIT", "identifier": "MIT"}},
            "tags": [{"name": tag} for tag in tags],
            "security": [{name: []} for name in schemes] if needs_key else [],
            "components": {"schemas": {name: _shape_schema(fields)
                                       for name, *fields in shapes},
                           "securitySchemes": schemes}}


#: Page -> path below CDN -> the hash of that file.  The CDN serves what npm has: `npm pack
#: swagger-ui-dist@5.35.0 redoc@2.5.4`, unpacked, then `openssl dgst -sha384 -binary FILE | base64`.
CDN = "https://cdn.jsdelivr.net/npm/"
READERS: Dict[str, Dict[str, str]] = {
    "docs": {
        "swagger-ui-dist@5.35.0/swagger-ui.css":
            "WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I",
        "swagger-ui-dist@5.35.0/swagger-ui-bundle.js":
            "gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9"},
    "redoc": {
        "redoc@2.5.4/bundles/redoc.standalone.js":
            "w447zOpYfw/1Tv/5AK9NfHTlQIqE3RVR6KY62jCyy9zNDgO64cMwGGP1Fj0zJVf5"}}

# language=HTML
DOCS_HTML = r"""<!doctype html><html lang="@LANG@"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>iflow2api API</title>
@STYLES@<style>:root{color-scheme:light dark}body{margin:0;font:15px/1.5 system-ui,sans-serif}
#list{max-width:52rem;margin:2rem auto;padding:0 1rem}dt{margin-top:.8rem;overflow-wrap:anywhere}
dt code{font:14px ui-monospace,monospace}dd{margin:0;opacity:.75}
.wait #list{animation:appear 0s 1.5s backwards}@keyframes appear{from{visibility:hidden}}
.shown{color-scheme:light}.shown #list,.shown a[href*="redocly.com"],.swagger-ui .scheme-container{
display:none!important}</style></head>
<body><div id="ui"></div><main id="list"><h1>iflow2api API</h1><p>@ABOUT@
<a href="/openapi.json">/openapi.json</a></p><dl>@LIST@</dl></main>@SCRIPTS@</body></html>"""

#: The plain list stays if the CDN's script did not load.
# language=JavaScript
DOCS_JS = r"""
const spec = JSON.parse(document.getElementById('spec').textContent);
const domNode = document.getElementById('ui'), {classList} = document.documentElement;
classList.toggle('shown', Boolean(window.SwaggerUIBundle || window.Redoc));
classList.remove('wait');
if (window.SwaggerUIBundle) {
  classList.toggle('dark-mode', matchMedia('(prefers-color-scheme: dark)').matches);
  SwaggerUIBundle({spec, domNode, deepLinking: true, supportedSubmitMethods: [],
    validatorUrl: null});
} else if (window.Redoc) Redoc.init(spec, {untrustedSpec: true, hideLoading: true}, domNode);
"""


def _docs_policy(urls: Iterable[str]) -> str:
    """`sandbox` without allow-same-origin: the page gets an opaque origin, without cookies, storage
    or access to the admin page."""
    digest = base64.b64encode(sha256(DOCS_JS)).decode()
    scripts = " ".join(url for url in urls if url.endswith(".js"))
    styles = " ".join(url for url in urls if url.endswith(".css"))
    closed = ("default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
              f"style-src 'unsafe-inline' {styles}; sandbox")
    return closed if not scripts else (
        closed + " allow-scripts allow-popups allow-popups-to-escape-sandbox; img-src data:; "
        f"font-src data:; worker-src blob:; script-src 'sha256-{digest}' {scripts}")


@lru_cache(8)
def docs_page(name: str, cdn: bool, language: int, key_header: str,
              needs_key: bool) -> Tuple[bytes, str]:
    """/docs or /redoc and its policy; without the CDN it is a list, without scripts."""
    document = openapi(language, key_header, needs_key)
    spec = dump_text(document).replace("<", "\\u003c")
    pinned = 'crossorigin="anonymous" integrity="sha384-{}"'.format
    urls = {CDN + path: digest for path, digest in READERS[name].items()} if cdn else {}
    styles = [f'<link rel="stylesheet" {pinned(digest)} href="{url}">\n'
              for url, digest in urls.items() if url.endswith(".css")]
    scripts = [f'<script type="application/json" id="spec">{spec}</script>',
               *(f'<script {pinned(digest)} src="{url}"></script>'
                 for url, digest in urls.items() if url.endswith(".js")),
               f"<script>{DOCS_JS}</script>"]
    rows = [f"<dt><code>{method.upper()} {path}</code></dt><dd>{operation['summary']}</dd>\n"
            for path, methods in document["paths"].items() for method, operation in methods.items()]
    parts = {"LANG": ["zh", "en"][language] + ('" class="wait' if cdn else ""),
             "ABOUT": _ABOUT[language], "LIST": "".join(rows), "STYLES": "".join(styles),
             "SCRIPTS": "".join(scripts) if cdn else ""}
    page = re.sub("@([A-Z]+)@", lambda found: parts[found.group(1)], DOCS_HTML)
    return page.encode(), _docs_policy(urls)


def document_facts(handler: Handler) -> Tuple[int, str, bool]:
    """What the document depends on: its language (`?lang=`, the setting's, the browser's), keys."""
    gateway, headers = handler.gateway, handler.headers
    wanted = (query_of(handler).get("lang"), gateway.settings.language,
              headers.get("accept-language", "").strip().lower()[:2])
    language = next((word for word in wanted if word in ("zh", "en")), "en")
    return (("zh", "en").index(language), gateway.settings.custom_auth_header.lower(),
            handler.server.needs_key)


def show_openapi(handler: Handler) -> None:
    handler.respond_static(dump_json(openapi(*document_facts(handler))), "application/json",
                           [("Vary", "Accept-Language")])


def show_docs(handler: Handler) -> None:
    page, policy = docs_page(normal_path(handler.path)[1:],
                             handler.gateway.settings.docs_cdn, *document_facts(handler))
    handler.respond_static(page, "text/html; charset=utf-8",
                           [("Vary", "Accept-Language"), ("Content-Security-Policy", policy)])


add_routes({
    "GET /openapi.json": Route(show_openapi, CHAT, " | object | 本文档 | This document",
                               public=True),
    "GET /docs": Route(show_docs, CHAT, " | text/html | 用 Swagger UI 阅读 | "
                       "This document in Swagger UI", public=True),
    "GET /redoc": Route(show_docs, CHAT, " | text/html | 用 ReDoc 阅读 | This document in ReDoc",
                        public=True)}, SERVICE)


# === 18. The page's API ======================================================
#
# /admin/api/…: what the static page of the next section shows and changes, as JSON.

# --- what a request says --------------------------------------------------------

def bad_field(message: str) -> BadRequest:
    """The error for a field; the message begins with the field's name."""
    return BadRequest(message, param=re.split(r"\W", message, maxsplit=1)[0])


@contextlib.contextmanager
def naming_fields() -> Iterator[None]:
    """Turn the ValueError of a shape into bad_field."""
    try:
        yield
    except ValueError as exc:
        raise bad_field(str(exc)) from None


def typed(value: Any, where: str) -> str:
    """The shape of a text that has to be there; it may be secret, so it is never shown."""
    if not secret_text(value, where):
        raise ValueError(f"{where}: it is missing")
    return value


def read_form(handler: Handler, need: Mapping[str, Shape], may: Mapping[str, Shape]) -> Json:
    """The fields of a request's body, null where that was sent; BadRequest."""
    body = handler.read_json(ADMIN_BODY_BYTES)
    with naming_fields():
        return {**dict.fromkeys(body), **record(need, may)(body, "")}


def choice_in(query: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    """One of `choices`, the first where the query names none; BadRequest."""
    with naming_fields():
        return one_of(*choices)(query.get(name, choices[0]), name)


def named_in(handler: Handler) -> str:
    """The name that a path ends in."""
    return urllib.parse.unquote(handler.argument)


def address_for(handler: Handler) -> str:
    """This server's address as the browser knows it: behind a proxy it is not ours."""
    host, scheme = handler.headers.get("host", ""), handler.headers.get("x-forwarded-proto", "http")
    is_host = re.fullmatch(r"[\w.-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?", host)
    return f"{scheme}://{host}" if is_host and scheme in ("http", "https") else handler.server.url


# --- signing in ------------------------------------------------------------------

def cookie_header(handler: Handler, token: str) -> Tuple[str, str]:
    """A session's cookie; without a token the one that takes it away."""
    secure = "; Secure" if address_for(handler).startswith("https:") else ""
    return "Set-Cookie", (
        f"{session_cookie(handler.server)}={token}; Path=/admin; HttpOnly; SameSite=Strict; "
        f"Max-Age={SESSION_S if token else 0}{secure}")


def show_session(handler: Handler) -> Json:
    """GET session: whether somebody is signed in, and what the page needs before."""
    gateway, state = handler.gateway, "new"
    gateway.sessions.code()              # an expired one is made anew and shown on the console
    if not gateway.sessions.is_new:
        try:
            check_session(handler)
            state = "signed_in"
        except Unauthorized:
            state = "signed_out"
    settings = gateway.settings
    return {"state": state, "user": "admin", "version": __version__,
            "language": settings.language, "theme_mode": settings.theme_mode,
            "base_url": address_for(handler)}


def sign_in(handler: Handler) -> None:
    """POST session."""
    body = read_form(handler, {"password": typed}, {"user": any_text})
    sessions = handler.gateway.sessions
    if sessions.is_new:
        raise Unauthorized("there is no password yet; the code on the server's console lets you "
                           "set one", code="no_password")
    right = sessions.try_password(address_of(handler), body["password"])
    if not right or body.get("user") not in (None, "admin"):
        raise Unauthorized("user or password is wrong", code="wrong_password")
    handler.respond(204, b"", "", [cookie_header(handler, sessions.open())])


def sign_out(handler: Handler) -> None:
    """DELETE session."""
    sessions = handler.gateway.sessions
    body = read_form(handler, {}, {"everywhere": truth}) if handler.body.left else {}
    if body.get("everywhere"):
        sessions.close_all()
    sessions.close(session_token(handler))
    handler.gateway.live.notify()        # streams of events that it had end
    handler.respond(204, b"", "", [cookie_header(handler, "")])


def set_password(handler: Handler) -> None:
    """POST password: the first one by the console's code, another one by who is signed in."""
    gateway, address = handler.gateway, address_of(handler)
    sessions = gateway.sessions
    proof, guess = ("code", sessions.try_code) if sessions.is_new else (
        "current", sessions.try_password)
    body = read_form(handler, {"password": typed}, {"code": secret_text, "current": secret_text})
    if gateway.origins.get("admin_password") == "environment":
        raise Conflict(f"{ENV_PREFIX}ADMIN_PASSWORD sets the password; change it there",
                       code="set_elsewhere")
    if not sessions.is_new:
        check_session(handler)
    try:
        check_password_length(body["password"])          # before the code is used up
    except ValueError as exc:
        raise BadRequest(str(exc), param="password", code="bad_password") from None
    with naming_fields():
        given = typed(body.get(proof) or "", proof)
    if not guess(address, given):
        what, code = (("the code is wrong; it stands on the server's console", "wrong_code")
                      if proof == "code" else ("the current password is wrong", "wrong_password"))
        raise Forbidden(what, code=code, param=proof, should_retry=None)
    gateway.keep_setting("admin_password", hash_password(body["password"]))
    handler.respond(204, b"", "", [cookie_header(handler, sessions.open())])


# --- what is going on -------------------------------------------------------------

#: What the chart and today's figures show of a row.
SERIES_COUNTS = USAGE_COUNTS[:4]


def limits_json(gateway: Gateway, key: ClientKey) -> Json:
    """A client key's limits, and what is used of them."""
    used = gateway.limiter.used(key) if key.limits else {}
    return {"key": key.name, **{name: {"used": used.get(name, 0), "limit": limit}
                                for name, limit in key.limits.items()}}


def next_step(gateway: Gateway) -> str:
    """The one thing to do now: `login_or_provider`, `models`, `client`, or nothing more."""
    router = gateway.current(look=False).router
    if all(provider.problem for provider in router.providers.values()):
        return "login_or_provider"
    if not router.default_model and not router.aliases:
        return "models"
    return "" if gateway.live.requests.count or not gateway.ledger.is_empty else "client"


def overview_of(server: Server) -> Json:
    gateway = server.gateway
    today = [counts for _, counts in gateway.ledger.rows(1)]
    return {"health": server.health(), "address": server.url, "needs_key": server.needs_key,
            "queue": queues_of(gateway), "connections": server.connections,
            "in_flight": gateway.in_flight,
            "today": {name: sum(row[at] for row in today) for at, name in enumerate(SERIES_COUNTS)},
            "limits": [limits_json(gateway, key) for key in gateway.state.auth.keys],
            "next": next_step(gateway)}


def show_requests(handler: Handler) -> Json:
    limit = number_in(query_of(handler), "limit", 200, 10_000)
    return {"data": history_of(handler.gateway)[:limit]}


#: Models that a chart shows apart; the rest together are `…`.
CHART_GROUPS = 8


def show_series(handler: Handler) -> Json:
    """GET series: what each model used in each hour of a day, or in each day of a month."""
    span = choice_in(query_of(handler), "span", ("day", "month"))
    steps = handler.gateway.ledger.steps(span)
    totals: Dict[str, int] = {}
    for _, rows in steps:
        for (_, model, *_), counts in rows:
            totals[model] = totals.get(model, 0) + sum(counts[:len(SERIES_COUNTS)])
    shown = sorted(totals, key=lambda name: -totals[name])[:CHART_GROUPS]
    points = []
    for at, rows in steps:
        groups: Dict[str, Json] = {}
        for (_, model, *_), counts in rows:
            row = groups.setdefault(model if model in shown else "…",
                                    dict.fromkeys(SERIES_COUNTS, 0))
            row.update((name, row[name] + count) for name, count in zip(SERIES_COUNTS, counts))
        points.append({"at": at, "groups": groups})
    return {"span": span, "points": points}


#: Fields of a row of usage beside its name; averages in seconds, null where there are none.
USAGE_FIELDS = (*USAGE_COUNTS, "first_s", "total_s", "cost")


def _usage_row(name: str, row: Mapping[str, Any]) -> Json:
    """A row of Ledger.report with its averages."""
    return {**row, "name": name,
            "first_s": row["first_ms"] / row["streams"] / 1000 if row["streams"] else None,
            "total_s": row["total_ms"] / row["requests"] / 1000 if row["requests"] else None,
            "cost": None if row["cost"] is None else round(row["cost"], 6)}


def usage_report(gateway: Gateway, by: str, days: int) -> Json:
    """Rows by tokens, days by time, and their total: for the page and the command."""
    rows = gateway.ledger.report(by, days, gateway.settings.prices)
    if by == "day":
        rows.sort(key=lambda row: row["day"])
    total: Json = {name: sum(row[name] for row in rows) for name in USAGE_COUNTS}
    costs = [row["cost"] for row in rows if row["cost"] is not None]
    total["cost"] = sum(costs) if costs else None
    prices = gateway.settings.prices
    unpriced = sorted({names[1] for names, counts in gateway.ledger.rows(days)
                       if counts[2] and prices and cost_of(names[1], names[2], dict.fromkeys(
                           USAGE_COUNTS, 0), prices) is None})
    return {"by": by, "days": days, "enabled": gateway.settings.usage, "unpriced": unpriced[:50],
            "rows": [_usage_row(row[by], row) for row in rows], "total": _usage_row("", total)}


def show_usage(handler: Handler) -> Json:
    query = query_of(handler)
    by = choice_in(query, "by", ("model", "provider", "key", "day"))
    return usage_report(handler.gateway, by, number_in(query, "days", 30, 3660))


def csv_field(text: str) -> str:
    """RFC 4180; with a quote before what a spreadsheet would run as a formula."""
    text = "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
    return '"' + text.replace('"', '""') + '"' if re.search(r'[",\r\n]', text) else text


def usage_csv(report: Json) -> str:
    """A head line and a line for each row of usage_report; null is empty."""
    names = (report["by"], *USAGE_FIELDS)
    lines = [names, *(["" if row[name] is None else str(row[name]) for name in names]
                      for row in report["rows"])]
    return "\n".join(",".join(map(csv_field, line)) for line in lines)


def download(handler: Handler, text: str, content_type: str, name: str) -> None:
    handler.respond(200, text.encode("utf-8", "backslashreplace"), content_type + "; charset=utf-8",
                    [("Content-Disposition", f'attachment; filename="{name}"')])


def download_usage(handler: Handler) -> None:
    report = show_usage(handler)
    # Excel wants the byte order mark
    download(handler, f"\ufeff{usage_csv(report)}\n", "text/csv",
             f"iflow2api-usage-{report['days']}d.csv")


def show_logs(handler: Handler) -> Json:
    """GET logs: the last lines at a level or above that hold `search`, the oldest first."""
    query, kept = query_of(handler), handler.gateway.live.logs
    level = choice_in(query, "level", ("debug", "info", "warning", "error"))
    limit = number_in(query, "limit", 1000, LOG_LINES)
    before = number_in(query, "before", 10 ** 15, 10 ** 15)
    wanted = query.get("search", "").lower()
    found = [pair for pair in kept.after(0, LOG_LINES)[1]
             if pair[0] < before and pair[1][1] >= getattr(logging, level.upper())]
    lines = [log_json(number, line) for number, line in (found if wanted else found[-limit:])]
    lines = [line for line in lines if wanted in line["text"].lower()]
    return {"data": lines[-limit:], "first": kept.count - len(kept) + 1,
            "last": kept.count}


def download_logs(handler: Handler) -> None:
    lines = []
    for number, kept in handler.gateway.live.logs.after(0, LOG_LINES)[1]:
        line = log_json(number, kept)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line["at"]))
        lines.append(f"{at} {line['level'].upper()} {line['text']}\n")
    download(handler, "".join(lines), "text/plain", "iflow2api.log")


def memory_bytes() -> Optional[int]:
    """What the process takes of the memory now, where Linux says so."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def show_about(handler: Handler) -> Json:
    """GET about; `diagnostics` is for bug reports and holds no secret."""
    gateway, config = handler.gateway, handler.gateway.config
    paths = {"program": os.path.abspath(show_about.__code__.co_filename),
             "iflow": os.path.expanduser(IFLOW_FILE)}
    if config is not None:
        paths.update(config=config.path, usage=os.path.join(config.folder, "usage.jsonl"),
                     **({"log": log_path(gateway)} if log_path(gateway) else {}))
    facts = {"executable": sys.executable, "pid": os.getpid(), "started_at": gateway.started_at,
             "uptime_s": int(time.time() - gateway.started_at),
             "threads": threading.active_count(), "memory_bytes": memory_bytes()}
    lines = [
        f"iflow2api {__version__}, Python {sys.version}, {sys.platform}, {ssl.OPENSSL_VERSION}",
        *(f"{name}: {value}" for name, value in {**facts, **paths}.items()),
        "health: " + json.dumps(gateway.health())]
    for name, origin in gateway.origins.items():
        shown = hide_secrets(name, getattr(gateway.settings, name))
        lines.append(f"{name} ({origin}): {json.dumps(shown, ensure_ascii=False)}")
    text, home = redact("\n".join(lines)), os.path.expanduser("~")
    return {
        **facts, "version": __version__, "python": sys.version.split()[0],
        "platform": sys.platform, "paths": paths,
        "diagnostics": text.replace(home, "~") if len(home) > 1 else text}


def show_instances(handler: Handler) -> Json:
    server = handler.server
    return {"data": [{"name": "default", "url": server.url, "version": __version__,
                      "started_at": server.gateway.started_at, "this": True}]}


# --- live --------------------------------------------------------------------------

#: A viewer gets news at most every EVENTS_GAP_S, the overview every OVERVIEW_S while it changes,
#: and every LIFE_S while it does not.
EVENTS_GAP_S, OVERVIEW_S, LIFE_S = 0.1, 2.0, 15.0


class Viewer:
    """One open page: how far it has read, and which events come next.

    The id of an event is `START-REQUESTS-LOGS`: when the server started, and how much the page has
    of what RecentItems counts.
    """

    def __init__(self, server: Server, logs: bool, last_id: str) -> None:
        live = server.gateway.live
        self._server, self._logs = server, logs
        self._start = int(server.gateway.started_at * 1000)
        self._requests, self._lines = live.requests.count, live.logs.count
        found = re.fullmatch(r"(\d{1,15})-(\d{1,15})-(\d{1,15})", last_id)
        if found:
            start, requests, lines = map(int, found.groups())
            is_ours = start == self._start               # of an earlier run: all of this is news
            self._requests = min(self._requests, requests if is_ours else 0)
            self._lines = min(self._lines, lines if is_ours else 0)
        self._version = ""
        self._overview: Json = {}
        self._looked_at = self._told_at = 0.0            #: monotonic

    def news(self) -> bytes:
        """The events that have come up; b"" for none."""
        now, live = time.monotonic(), self._server.gateway.live
        lost, records = live.requests.after(self._requests)
        self._requests += lost + len(records)
        lines: List[Tuple[int, Any]] = []
        if self._logs:
            missed, lines = live.logs.after(self._lines)
            self._lines, lost = self._lines + missed + len(lines), lost + missed
        events = [("dropped", {"count": lost})] if lost else []
        events += [("request", record.facts()) for _, record in records]
        events += [("log", log_json(number, line)) for number, line in lines]
        if now - self._looked_at >= OVERVIEW_S:
            self._looked_at = now
            events += self._state(now)
        ident = f"{self._start}-{self._requests}-{self._lines}"
        return b"".join(f"id: {ident}\nevent: {name}\ndata: ".encode() + dump_json(value) + b"\n\n"
                        for name, value in events)

    def _state(self, now: float) -> List[Tuple[str, Json]]:
        """The config's version and the overview, where they have changed."""
        version, overview = self._server.gateway.config_version(), overview_of(self._server)
        events = [("config", {"version": version})] if version != self._version else []
        comparable = {**overview, "health": {**overview["health"], "uptime_s": 0}}
        if comparable != self._overview or now - self._told_at >= LIFE_S:
            events.append(("overview", overview))
            self._told_at = now
        self._version, self._overview = version, comparable
        return events


def stream_events(handler: Handler) -> None:
    """GET events: what happens, until the session ends, the page leaves or the server stops."""
    gateway, query = handler.gateway, query_of(handler)
    live, logs = gateway.live, query.get("logs") == "1"
    viewer = Viewer(handler.server, logs,
                    handler.headers.get("last-event-id", query.get("last_event_id", "")))
    with live.viewer(logs):
        handler.close_connection = True                  # no length, no chunks: the end is the end
        handler.write(handler.head(200, [("Content-Type", "text/event-stream; charset=utf-8"),
                                         ("X-Accel-Buffering", "no")]))
        pause = threading.Event()
        handler.busy = False             # a server that stops does not wait for this one
        while handler.command != "HEAD" and not live.closed and gateway.sessions.is_alive(
                handler.session):
            version = live.wait(-1, 0)
            handler.write(viewer.news())
            if has_left(handler.connection):
                raise ClientGone
            pause.wait(EVENTS_GAP_S)
            live.wait(version, OVERVIEW_S)


# --- what is set up ----------------------------------------------------------------

def setting_json(gateway: Gateway, name: str) -> Json:
    """A setting with what a form needs to know of it."""
    facts = SETTING[name].metadata
    value, is_secret = getattr(gateway.settings, name), bool(facts.get("secret"))
    return {"name": name, "kind": facts["kind"], "label": dict(zip(("zh", "en"), facts["label"])),
            "group": facts["group"],
            "value": hide_secrets(name, value), "default": hide_secrets(name, default_of(name)),
            "origin": gateway.origins.get(name, "default"), "secret": is_secret,
            "restart": bool(facts.get("restart")), "file_only": bool(facts.get("file_only")),
            **{key: facts[key] for key in ("choices", "low", "high", "flag", "older")
               if key in facts},
            **({"hint": dict(zip(("zh", "en"), facts["hint"]))} if facts["hint"] else {}),
            **({"set": bool(value)} if is_secret else {})}


def show_config(handler: Handler) -> Json:
    gateway = handler.gateway
    return {"version": gateway.config_version(),
            "path": gateway.config.path if gateway.config else "",
            "settings": [setting_json(gateway, name) for name in SETTING],
            "problems": list(gateway.problems)}


def provider_json(gateway: Gateway, provider: Provider, entry: Json, source: str) -> Json:
    """A provider with its keys' state; `entry` is its row of the settings, {} without one."""
    masked = hide_in_provider({
        "api_keys": entries_of(entry, "api_keys") or list(provider.api_keys),
        "headers": entry.get("headers") or {}, "proxy": provider.proxy or entry.get("proxy") or ""})
    lane, keys = gateway.lane(provider), masked.pop("api_keys")
    # keys of the file and keys in force differ where one can't be read
    states = lane.key_states() if len(provider.api_keys) == len(keys) else [("ok", 0)] * len(keys)
    return {"name": provider.name, "kind": provider.kind, **masked,
            **{road: getattr(provider, road) or roads_of(entry).get(road, "") for road in ROADS},
            "preset": entry.get("preset") or preset_at(provider.base_url),
            "models": list(provider.models), "facts": dict(provider.facts),
            "keys": [{"index": index, "masked": text, "state": state, "rest_s": round(rest_s, 1)}
                     for index, (text, (state, rest_s)) in enumerate(zip(keys, states))],
            **{name: getattr(provider, name) for name in (
                "concurrency", "timeout_s", "profile", "vision_model", "sticky",
                "preserve_reasoning_content", "problem")},
            "usable": not provider.problem, "circuit": lane.rests.state, "source": source}


def by_name(entries: Iterable[Any]) -> Dict[str, Json]:
    """Entries of `providers` or `client_keys` by their names, without those that have none."""
    return {name_of(entry): entry for entry in entries if name_of(entry)}


def providers_json(gateway: Gateway) -> Dict[str, Json]:
    entries = by_name(gateway.settings.providers)
    origin = gateway.origins.get("providers", "file")
    source = {"environment": "flag", "default": "file"}.get(origin, origin)
    return {name: provider_json(gateway, provider, entries.get(name, {}),
                                source if name in entries else
                                "login" if name == "iflow" else "detected")
            for name, provider in gateway.current(look=False).router.providers.items()}


def show_providers(handler: Handler) -> Json:
    gateway = handler.gateway
    default = gateway.current(look=False).router.default
    return {"version": gateway.config_version(),
            "default_provider": default.name if default else "",
            "data": list(providers_json(gateway).values())}


def show_presets(handler: Handler) -> Json:
    environ = handler.gateway.environ
    return {"data": [
        {"name": name, "title": dict(zip(("zh", "en"), preset.titles)), **preset.roads,
         "roads": [ROADS[road] for road in preset.roads],
         "paid_by": "nothing" if not preset.key else "plan" if preset.metered else "use",
         "key_variable": preset.key, "key_page": preset.key_page,
         "key_set": bool(preset.key and environ.get(preset.key)), "local": name in LOCAL_ENGINES,
         "models": [{"id": model, **facts} for model, facts in preset.models.items()]}
        for name, preset in PRESETS.items()]}


def show_admin_models(handler: Handler) -> Json:
    """GET models: every name that can be asked for, and what is known of the model behind it."""
    gateway = handler.gateway
    router, data = gateway.current().router, []
    aliases = {pattern for pattern, _ in router.aliases}
    for model in models_of(gateway):
        try:
            target = router.resolve(model["id"])[0]
        except GatewayError:             # an alias, and no provider that it could lead to
            target = Target(Provider(""), model["id"])
        facts = target.provider.facts.get(target.model, {})
        sees = target.model == target.provider.vision_model or None
        data.append({"id": model["id"], "provider": target.provider.name,
                     "context": facts.get("context"), "max_output": facts.get("max_output"),
                     "vision": facts.get("vision", sees), "alias": model["id"] in aliases,
                     "listed": "config" if target.model in target.provider.models else "provider"})
    return {"data": data, "default_model": router.default_model,
            "aliases": gateway.settings.aliases,
            "version": gateway.config_version()}


def show_keys(handler: Handler) -> Json:
    gateway = handler.gateway
    entries = by_name(gateway.settings.client_keys)
    return {
        "version": gateway.config_version(), "needs_key": handler.server.needs_key,
        "address_limits": gateway.settings.address_limits,
        "custom_api_key": mask(gateway.settings.custom_api_key),
        "data": [{"name": key.name, "created": entries.get(key.name, {}).get("created"),
                  "expires": entries.get(key.name, {}).get("expires"),
                  "expired": key.expires_at <= time.time(), "models": list(key.models),
                  "limits": dict(key.limits),
                  "used": gateway.limiter.used(key) if key.limits else {}}
                 for key in gateway.state.auth.keys]}


# --- changing settings ----------------------------------------------------------------

#: Settings with endpoints of their own.
SET_ELSEWHERE = ("admin_password", "providers", "client_keys", "accounts")


def change_config(gateway: Gateway, edit: Callable[[Json], None], version: Optional[str]) -> None:
    """Write config.json, which has to be of the `version` that the page showed (None: of any).

    Where `edit` raises, nothing is written.  Conflict; GatewayError where nothing can be.
    """
    if gateway.config is None:
        raise Conflict("this server has no config.json, so nothing can be changed here",
                       code="no_config")

    def edit_shown(raw: Json) -> None:
        if version is not None and version != gateway.config_version(raw):
            raise Conflict("the configuration was changed elsewhere; reload it",
                           code="changed_meanwhile")
        edit(raw)

    try:
        gateway.change_config(edit_shown)
    except OSError as exc:
        reason = exc.strerror or exc
        raise GatewayError(f"{gateway.config.path} can't be written: {reason}",
                           code="cannot_write") from None


def save_config(handler: Handler) -> Json:
    """PATCH config: `set` and `unset` settings of the `version` that was shown."""
    gateway = handler.gateway
    body = read_form(handler, {"version": typed},
                     {"set": names_to(anything), "unset": list_of(any_text)})
    values = checked_settings(gateway, body.get("set") or {}, body.get("unset") or [])

    def edit(raw: Json) -> None:
        for name, value in values.items():
            raw.pop(name, None)
            if value is not None:
                raw[name] = value

    change_config(gateway, edit, body["version"])
    return show_config(handler)


def checked_settings(gateway: Gateway, given: Json, dropped: Sequence[str]) -> Json:
    """The values of settings that are to change, None for one that leaves the file; BadRequest.

    A secret that comes as it is shown, masked, is left alone.
    """
    values: Json = {}
    for name in [*given, *dropped]:
        if name not in SETTING:
            raise BadRequest(f"there is no setting {name!r}" + nearest(name, SETTING), param=name)
        facts, shown = SETTING[name].metadata, hide_secrets(name, getattr(gateway.settings, name))
        is_shown = name in given and given[name] == shown
        if name in SET_ELSEWHERE:
            raise BadRequest(f"{name} is not changed here", param=name, code="set_elsewhere")
        if facts.get("file_only") and not is_shown:
            raise Forbidden(
                f"{name} is set by the command line (config set) or in config.json only",
                param=name, code="file_only", should_retry=None)
        if name not in given:
            values[name] = None
        elif not (facts.get("secret") and shown and is_shown):
            with naming_fields():
                values[name] = check_setting(name, given[name])
    check_addresses(gateway, values)
    check_together(gateway, {name: default_of(name) if value is None else value
                             for name, value in values.items()})
    return values


def check_addresses(gateway: Gateway, values: Json) -> None:
    """BadRequest where an address that was typed in would get secrets that are stored."""
    settings, change = gateway.settings, "does not go to another address"
    new_key = bool(values.get("api_key")) and not gateway.login_report()
    if leads_elsewhere(settings.base_url or IFLOW_BASE_URL, values.get("base_url")) and not new_key:
        raise BadRequest(
            f"base_url: the iFlow key that is stored {change}; type api_key in again, or use "
            "the command line (config set)", param="base_url", code="address_changed")
    readable = [name for name, provider in gateway.state.router.providers.items()
                if provider.base_url.startswith("http:")
                and (provider.api_keys or provider.headers)]
    if leads_elsewhere(settings.upstream_proxy, values.get("upstream_proxy")) and readable:
        raise BadRequest(
            f"upstream_proxy: this proxy could read the keys of {', '.join(readable)}; set it "
            "by the command line (config set)", param="upstream_proxy", code="address_changed")


def check_together(gateway: Gateway, values: Json) -> None:
    """BadRequest for settings that are valid by themselves, but not with the others."""
    if {"aliases", "default_provider"} & set(values):
        providers = gateway.current(look=False).settings.providers
        known = gateway.state.router
        router = gateway.routed(replace(gateway.settings, **{**values, "providers": providers}))
        problems = [problem for problem in router.warnings if problem not in known.warnings]
        if problems:
            param = "aliases" if "aliases" in values else "default_provider"
            conflicting = router.conflicting - known.conflicting
            raise BadRequest(problems[0], param=next(iter(conflicting), param))
    if values.get("upstream_proxy"):
        problems = proxy_warnings(Settings(upstream_proxy=values["upstream_proxy"],
                                           upstream_proxy_enabled=True), ())
        if problems:
            raise BadRequest(problems[0], param="upstream_proxy")


# --- changing providers ------------------------------------------------------------------

#: Fields of a provider, as the page sends it; parse_provider checks their values.
PROVIDER_FORM: Dict[str, Shape] = {
    "name": any_text, "preset": any_text, **dict.fromkeys(ROADS, any_text), "kind": any_text,
    "api_keys": list_of(anything), "models": list_of(anything), "headers": names_to(anything),
    "profile": names_to(anything), "proxy": secret_text, "vision_model": any_text,
    "concurrency": anything, "timeout_s": anything, "sticky": truth,
    "preserve_reasoning_content": truth}


def provider_entry(body: Json, before: Json) -> Json:
    """The entry of `providers` that a request describes; BadRequest.

    Fields that the request does not name come from `before`; null takes a field away.
    Secrets may come in the forms that restore_secrets reads.
    """
    if not before and not any(body.get(name) for name in ("preset", *ROADS)):
        raise BadRequest("base_url: it is missing; or name a preset", param="base_url")
    entry = before or {"preset": body.get("preset")}
    given = {name: body[name] for name in PROVIDER_FORM if name in body}
    facts = {model["id"]: model for model in entries_of(entry, "models")
             if isinstance(model, dict) and isinstance(model.get("id"), str)}
    if given.get("models"):
        given["models"] = [facts.get(model, model) if isinstance(model, str) else model
                           for model in given["models"]]
    if given.get("base_url") and not before:     # a bare host of a known API gets its path
        given.update(entry_at(given.pop("base_url"), given.get("preset") or ""))
    kept = restore_secrets(given, before)
    entry = {**entry, **given}
    old, new = {**before, **roads_of(before)}, {**entry, **roads_of(entry)}
    if kept and any(leads_elsewhere(old.get(name), new.get(name)) for name in SECRET_DESTINATIONS):
        name = min(kept)
        raise BadRequest(f"{name}: what is stored does not go to another address; type it in "
                         "again", param=name, code="address_changed")
    made = without_preset(entry)
    base_url = check_provider(made).base_url
    return {**made, "base_url": base_url} if made.get("base_url") else made


def restore_secrets(given: Json, before: Json) -> Set[str]:
    """Put secrets of `before` into `given`, where they are masked; returns the fields with such.

    A key may come as {"keep": index}, too.  BadRequest.
    """
    old_keys, old_headers = entries_of(before, "api_keys"), object_of(before.get("headers"))
    shown = hide_in_provider({"api_keys": old_keys, "headers": old_headers,
                              "proxy": before.get("proxy")})
    kept = {name for name in ("api_keys", "headers") if shown[name] and name not in given}
    if given.get("proxy") and given["proxy"] == shown["proxy"]:
        given["proxy"] = before["proxy"]
    if given.get("api_keys"):
        places = [stored_place(key, at, shown["api_keys"])
                  for at, key in enumerate(given["api_keys"])]
        given["api_keys"] = [new_secret(key, f"api_keys[{at}]") if place is None else
                             old_keys[place]
                             for at, (key, place) in enumerate(zip(given["api_keys"], places))]
        kept |= {"api_keys"} if set(places) != {None} else set()
    if given.get("headers"):
        same = {name for name, text in given["headers"].items()
                if name in shown["headers"] and text == shown["headers"][name]}
        given["headers"] = {name: old_headers[name] if name in same else
                            new_secret(text, f"headers.{name}")
                            for name, text in given["headers"].items()}
        kept |= {"headers"} if same else set()
    return kept


def stored_place(key: Any, at: int, shown: List[str]) -> Optional[int]:
    """Where the key stands whose mask was sent as the one `at`, None for a new key; BadRequest."""
    if isinstance(key, dict):
        index = key.get("keep")
        if type(index) is not int or not 0 <= index < len(shown):
            raise bad_field(f"api_keys[{at}]: there is no key {json.dumps(index)[:40]}")
        return index
    if key not in shown:
        return None
    return at if shown[at:at + 1] == [key] else shown.index(key)


def new_secret(value: Any, where: str) -> str:
    """A secret as providers keep it; BadRequest.

    `$NAME` would read the server's environment, which the page may not.
    """
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise bad_field(f"{where}: a string expected")
    if "…" in text:
        raise bad_field(f"{where}: this is the mask of none that is stored here")
    if re.fullmatch(_REFERENCE, text) or is_encrypted(text):
        error = bad_field(f"{where}: {text[:40]} can't be added here; put it into config.json, or "
                          "use `provider add` on the command line")
        error.code = "reference"
        raise error
    return "$" + text if text.startswith("$$") else text


def check_provider(entry: Json) -> Provider:
    """BadRequest for an entry that can't work; variables that it names may be unset."""
    def is_literal(text: Any) -> bool:
        is_text = isinstance(text, str)
        return not (is_text and (re.fullmatch(_REFERENCE, text) or is_encrypted(text)))

    tried = dict(entry)                  # what is of the wrong type stays, for parse_provider
    if isinstance(entry.get("api_keys"), list):
        tried["api_keys"] = list(filter(is_literal, entry["api_keys"]))
    if isinstance(entry.get("headers"), dict):
        tried["headers"] = {name: text for name, text in entry["headers"].items()
                            if is_literal(text)}
    try:
        provider = parse_provider(tried, {})
    except ValueError as exc:
        raise BadRequest(str(exc), param="name") from None
    problems = [provider.problem] if provider.problem else [
        *proxy_warnings(Settings(), [provider]),
        *(warning for warning in provider.warnings if PROFILE_IGNORED in warning)]
    if problems:
        error = bad_field(problems[0])
        error.param = error.param if error.param in PROVIDER_FORM else "proxy"
        raise error
    return provider


def change_entries(handler: Handler, setting_name: str, version: Optional[str],
                   change: Callable[[List[Any], Json], List[Any]]) -> None:
    """Write what `change` makes of the list of a setting and of config.json; Conflict."""
    gateway = handler.gateway
    origin = gateway.origins.get(setting_name)
    if origin in ("environment", "flag"):
        where = ENV_PREFIX + setting_name.upper() if origin == "environment" else (
            "a flag of this run")
        raise Conflict(f"{setting_name} is set by {where}, which stands above config.json",
                       code="set_elsewhere", param=setting_name)

    def edit(raw: Json) -> None:
        raw[setting_name] = change(entries_of(raw, setting_name), raw)

    change_config(gateway, edit, version)


def with_entry(entries: List[Any], entry: Json) -> List[Any]:
    """Entries with one more; Conflict where its name is taken."""
    if entry["name"] in map(name_of, entries):
        raise Conflict(f"the name {entry['name']} is taken", code="name_taken", param="name")
    return [*entries, entry]


def without_entry(entries: List[Any], name: str) -> List[Any]:
    """Entries without that of a name; NotFound."""
    if name not in map(name_of, entries):
        raise NotFound(f"config.json has no {name!r}", code="not_found", param="name")
    return [entry for entry in entries if name_of(entry) != name]


def provider_shown(handler: Handler, name: str) -> Json:
    """The provider as the list has it."""
    return {"version": handler.gateway.config_version(), "name": name,
            **providers_json(handler.gateway).get(name, {})}


def add_provider(handler: Handler) -> Json:
    """POST providers."""
    body = read_form(handler, {"name": typed}, {**PROVIDER_FORM, "version": any_text})
    change_entries(handler, "providers", None,
                   lambda entries, _: with_entry(entries, provider_entry(body, {})))
    handler.status = 201
    return provider_shown(handler, body["name"])


def edit_provider(handler: Handler) -> Json:
    """PUT providers/NAME; a new name follows wherever settings name it."""
    old = named_in(handler)
    body = read_form(handler, {"version": typed}, PROVIDER_FORM)
    name = body.get("name") or old

    def change(entries: List[Any], raw: Json) -> List[Any]:
        others = without_entry(entries, old)
        before = by_name(entries)[old]
        entry = provider_entry({**body, "name": name}, before)
        with_entry(others, entry)
        if name != old:
            rename_provider(raw, old, name)
        return [entry if known is before else known for known in entries]

    change_entries(handler, "providers", body["version"], change)
    return provider_shown(handler, name)


def rename_provider(raw: Json, old: str, new: str) -> None:
    """Follow a provider's new name in config.json.

    Prices stay under the old name as well, for usage recorded before.
    """
    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(item) for item in value]
        if isinstance(value, dict):
            return {name: renamed(item) for name, item in value.items()}
        is_of_old = isinstance(value, str) and value.startswith(old + "/")
        return f"{new}/{value[len(old) + 1:]}" if is_of_old else value

    if raw.get("default_provider") == old:
        raw["default_provider"] = new
    raw.update({name: renamed(raw[name]) for name in ("aliases", "default_model", "client_keys")
                if name in raw})
    if isinstance(raw.get("prices"), dict):
        raw["prices"] = {name: price for pattern, price in raw["prices"].items()
                         for name in (pattern, renamed(pattern))}


def remove_provider(handler: Handler) -> None:
    """DELETE providers/NAME."""
    name = named_in(handler)

    def change(entries: List[Any], raw: Json) -> List[Any]:
        if raw.get("default_provider") == name:
            del raw["default_provider"]
        return without_entry(entries, name)

    change_entries(handler, "providers", None, change)


def order_providers(handler: Handler) -> Json:
    """POST providers/order: all names in their new order.

    The first is the default provider, unless one is chosen.
    """
    body = read_form(handler, {"version": typed, "names": list_of(any_text)}, {})

    def change(entries: List[Any], raw: Json) -> List[Any]:
        known = by_name(entries)
        if sorted(body["names"]) != sorted(known):
            raise BadRequest("names: every provider of config.json once expected", param="names")
        return [*(known[name] for name in body["names"]),
                *(entry for entry in entries if not name_of(entry))]

    change_entries(handler, "providers", body["version"], change)
    return show_providers(handler)


#: Requests of the page are counted under this key.
ADMIN_KEY = ClientKey("admin", b"", shared=True)


def wants_english(handler: Handler) -> bool:
    """Each request of the page names its language; others are answered in English."""
    return not handler.headers.get("accept-language", "").startswith("zh")


def try_provider(handler: Handler) -> Json:
    """POST providers/test: one there is, by its name, or a draft; `provider test` says the same."""
    gateway, body = handler.gateway, read_form(handler, {}, PROVIDER_FORM)
    providers = gateway.current().router.providers
    name = body.get("name") or "draft"
    if set(body) == {"name"}:
        if name not in providers:
            raise NotFound(f"there is no provider {name!r}" + nearest(name, providers),
                           param="name")
        return trial_of(gateway, providers[name], wants_english(handler))
    before = by_name(gateway.settings.providers).get(name, {})
    entry = provider_entry({**body, "name": name}, before)
    alone = Gateway(replace(gateway.settings, providers=[entry], default_provider=name, aliases={},
                            default_model="", accounts={}, api_key="", client_keys=[], usage=False),
                    environ=gateway.environ)
    alone.upstream.own_ports |= gateway.upstream.own_ports
    with contextlib.closing(alone):
        return trial_of(alone, alone.state.router.providers[name], wants_english(handler))


def trial_of(gateway: Gateway, provider: Provider, in_english: bool) -> Json:
    """The checks of a provider, and the models it lists."""
    checks = examine(gateway, provider, ADMIN_KEY, in_english=in_english)
    models = list(provider.models)
    if all(check.ok for check in checks[:2]):
        with contextlib.suppress(GatewayError):
            models = fetch_models(gateway, provider) or models
    return {"ok": all(check.ok for check in checks),
            "checks": [check._asdict() for check in checks], "models": models}


# --- client keys, chat box, logins --------------------------------------------------------

def add_key(handler: Handler) -> Json:
    """POST keys: the key is in the answer, and nowhere else."""
    body = read_form(handler, {"name": typed}, {
        "version": any_text, "models": anything, "expires": anything,
        **dict.fromkeys(LIMIT_FIELDS, anything)})
    facts = {name: value for name, value in body.items()
             if value not in (None, [], "") and name not in ("version", "name")}
    with naming_fields():
        key, entry = make_client_key(body["name"], facts)
    change_entries(handler, "client_keys", None, lambda entries, _: with_entry(entries, entry))
    handler.status = 201
    return {"name": entry["name"], "key": key, "version": handler.gateway.config_version()}


def remove_key(handler: Handler) -> None:
    """DELETE keys/NAME."""
    change_entries(handler, "client_keys", None,
                   lambda entries, _: without_entry(entries, named_in(handler)))


def play(handler: Handler) -> None:
    """POST play/chat: the Chat API for who is signed in instead of for a client's key."""
    handler.key = ADMIN_KEY
    answer_call(handler)


def start_login(handler: Handler) -> Json:
    """POST oauth/start."""
    body = read_form(handler, {}, {"account": any_text, "paste": truth})
    return handler.gateway.logins.start(body.get("account") or "", bool(body.get("paste")))


def paste_login(handler: Handler) -> Json:
    """POST oauth/paste."""
    text = read_form(handler, {}, {"text": secret_text}).get("text")
    return handler.gateway.logins.paste(text or "")


def show_logins(handler: Handler) -> Json:
    logins = handler.gateway.login_report()
    return {"data": [{"account": account, "keys": 1, "message": "", **login}
                     for account, login in logins.items()]}


def end_login(handler: Handler) -> None:
    """DELETE logins/ACCOUNT."""
    gateway, account = handler.gateway, named_in(handler)
    is_known = account in (DEFAULT_ACCOUNT, *gateway.settings.accounts)
    try:
        gone = is_known and gateway.config is not None and remove_login(gateway, account)
    except (ConfigBroken, OSError) as exc:
        raise LoginFailed(str(exc)) from None
    if not gone:
        raise NotFound(f"the account {account!r} is not logged in", code="not_found",
                       param="account")
    gateway.reload()


# --- clients ---------------------------------------------------------------------------

class ClientSetup(NamedTuple):
    """How a program is pointed at this server.

    In its texts URL stands for the server's address, KEY for the client key, MODEL for the default
    model, and OPUS, SONNET, HAIKU, CONTEXT for what claude_words tells.
    """
    title: str
    variables: Dict[str, str]
    file: str = ""                       #: where `text` belongs, or what `text` is
    language: str = ""
    text: str = ""                       #: words are filled in within double quotes, as JSON


_OPENAI_VARIABLES = {"OPENAI_BASE_URL": "URL/v1", "OPENAI_API_KEY": "KEY"}

#: Codex takes its provider from this file or from -c flags, never from a variable.
_CODEX = '''model = "MODEL"
model_provider = "iflow2api"
[model_providers.iflow2api]
name = "iflow2api"
base_url = "URL/v1"
env_key = "IFLOW2API_KEY"
wire_api = "responses"
supports_websockets = false'''

_OPENCODE = """{"$schema": "https://opencode.ai/config.json", "model": "iflow2api/MODEL",
 "provider": {"iflow2api": {
  "npm": "@ai-sdk/openai-compatible", "name": "iflow2api",
  "options": {"baseURL": "URL/v1", "apiKey": "KEY"},
  "models": {"MODEL": {}}}}}"""

_PYTHON = """from openai import OpenAI

client = OpenAI(base_url="URL/v1", api_key="KEY")
answer = client.chat.completions.create(
    model="MODEL", messages=[{"role": "user", "content": "Hello"}])
print(answer.choices[0].message.content)"""

#: For the page and for `env`; any other program is given the base URL, a key and a model.
CLIENTS: Dict[str, ClientSetup] = {
    "claude": ClientSetup("Claude Code", {
        "ANTHROPIC_BASE_URL": "URL", "ANTHROPIC_AUTH_TOKEN": "KEY", "ANTHROPIC_MODEL": "SONNET",
        **{f"ANTHROPIC_DEFAULT_{tier}_MODEL": tier for tier in CLAUDE_MODELS},
        "ANTHROPIC_SMALL_FAST_MODEL": "HAIKU", "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "CONTEXT",
        "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "REMINDER",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "QUIET"}, "~/.claude/settings.json", "json"),
    "codex": ClientSetup("Codex", {"IFLOW2API_KEY": "KEY"}, "~/.codex/config.toml", "toml", _CODEX),
    "opencode": ClientSetup("opencode", {"OPENCODE_CONFIG_CONTENT": _OPENCODE}, "opencode.json",
                            "json", _OPENCODE),
    "gemini": ClientSetup(
        "Gemini CLI", {"GOOGLE_GEMINI_BASE_URL": "URL", "GEMINI_API_KEY": "KEY",
                       "GEMINI_MODEL": "MODEL"}, "~/.gemini/settings.json", "json",
        '{"security": {"auth": {"selectedType": "gemini-api-key"}}}'),
    "qwen": ClientSetup("Qwen Code", {**_OPENAI_VARIABLES, "OPENAI_MODEL": "MODEL"}),
    "aider": ClientSetup("aider", {"OPENAI_API_BASE": "URL/v1", "OPENAI_API_KEY": "KEY",
                                   "AIDER_MODEL": "openai/MODEL"}),
    "openai": ClientSetup("OpenAI SDK", _OPENAI_VARIABLES, "Python", "python", _PYTHON),
    "curl": ClientSetup("curl", {})}

#: Stands for a key that the user has in a variable of this name.
KEY_VARIABLE = "IFLOW2API_KEY"


class Shell(NamedTuple):
    """A shell's words for a variable, a comment and a command with flags."""
    variable: str
    comment: str
    command: str
    quote: Callable[[str], str]          #: a value of a variable
    argument: Callable[[str], str]       #: an argument of a command
    reference: str = '"${}"'             #: the value of a variable


def _quote_posix(text: str) -> str:
    is_plain = re.fullmatch(r"[\w@%+=:,./-]+", text)
    return text if is_plain else "'" + text.replace("'", "'\"'\"'") + "'"


def _quote_fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _quote_powershell(text: str) -> str:
    """PowerShell takes typographic quotes for quotes, too."""
    return "'" + re.sub("['\u2018\u2019\u201a\u201b]", r"\g<0>\g<0>", text) + "'"


def _inside_quotes(text: str) -> str:
    """For `set "NAME=…"` of cmd: & and others mean something outside of quotes only."""
    inside, *outside = text.split('"')
    return inside + "".join(
        '"' + (part if number % 2 else re.sub(r"[&|<>^()]", r"^\g<0>", part))
        for number, part in enumerate(outside))


def _windows_argument(text: str) -> str:
    """An argument as programs of Windows read it: backslashes count only before a quote."""
    parts = text.split('"')
    return '"' + '\\"'.join(part + part[len(part.rstrip("\\")):] for part in parts) + '"'


SHELLS = {
    "bash": Shell("export {name}={value}", "# {}", "codex() {{ command codex {flags} \"$@\"; }}",
                  _quote_posix, _quote_posix),
    "fish": Shell("set -gx {name} {value}", "# {}",
                  "function codex; command codex {flags} $argv; end", _quote_fish, _quote_fish),
    "powershell": Shell("$env:{name} = {value}", "# {}",
                        "function codex {{ & (Get-Command codex -CommandType Application "
                        "| Select-Object -First 1) {flags} @args }}",
                        _quote_powershell, _quote_powershell, "$env:{}"),
    "cmd": Shell("set \"{name}={value}\"", "REM {}", "doskey codex=codex.exe {flags} $*",
                 _inside_quotes, _windows_argument, "%{}%")}


def claude_words(router: Router, model: str = "") -> Dict[str, str]:
    """The models of Claude Code's tiers: `model`, a name that an alias takes, or default_model.

    CONTEXT is the window of the model, which Claude Code would else take for 200 000 tokens.  An
    engine on this machine is spared what changes each prompt (REMINDER) or is asked beside it
    (QUIET).
    """
    words = {tier: model or (name if router.has_alias(name) else router.default_model)
             for tier, name in CLAUDE_MODELS.items()}
    target = router.claimed(words["SONNET"])
    context = target.provider.facts.get(target.model, {}).get("context") if target else None
    is_local = target is not None and target.provider.is_local
    return {**words, "CONTEXT": str(context or ""), "REMINDER": "off" if is_local else "",
            "QUIET": "1" if is_local else ""}


def fill_words(text: str, words: Mapping[str, str]) -> str:
    """A value with its words replaced."""
    return re.sub(r"\b[A-Z]+\b", lambda found: words.get(found.group(), found.group()), text)


def fill_text(text: str, words: Mapping[str, str]) -> str:
    """A file with the words within double quotes replaced, and quoted as JSON does."""
    return re.sub('"([^"\n]*)"', lambda found: json.dumps(fill_words(found.group(1), words),
                                                          ensure_ascii=False), text)


def env_values(client: str, words: Mapping[str, str]) -> Dict[str, str]:
    """The variables of one of CLIENTS but for those whose model nobody knows."""
    # opencode's own way to name a variable
    key = words["KEY"].replace("$" + KEY_VARIABLE, "{env:%s}" % KEY_VARIABLE)
    given = {name: fill_words(value, words) if value[0] != "{" else
             fill_text(value, {**words, "KEY": key}).replace("\n", " ")
             for name, value in CLIENTS[client].variables.items()}
    return {name: value for name, value in given.items() if value.strip("/") not in ("", "openai")}


def env_lines(client: str, shell: Shell, words: Mapping[str, str]) -> List[str]:
    """What points one of CLIENTS at this server; `words` are all that ClientSetup names.

    A KEY of `$IFLOW2API_KEY` says that the user has the key in that variable.
    """
    lines: List[str] = []
    for name, value in env_values(client, words).items():
        if value != "$" + KEY_VARIABLE:
            lines.append(shell.variable.format(name=name, value=shell.quote(value)))
        elif name != KEY_VARIABLE:       # a variable of the shell's, not its name in quotes
            reference = shell.reference.format(KEY_VARIABLE)
            lines.append(shell.variable.format(name=name, value=reference))
    if client == "curl":
        lines.append(curl_line(shell, words))
    if client == "codex":
        toml = file_text(client, words)
        flags = " ".join("-c " + shell.argument(setting) for setting in codex_settings(toml))
        lines.append(shell.command.format(flags=flags))
    return lines


def codex_settings(toml: str) -> Iterator[str]:
    """The lines of _CODEX as arguments of -c."""
    table = ""
    for line in toml.split("\n"):
        if line.startswith("["):
            table = line[1:-1] + "."
        else:
            yield table + line.replace(" = ", "=", 1)


def curl_line(shell: Shell, words: Mapping[str, str]) -> str:
    """One request; PowerShell would take the quotes out of an argument: the body is piped."""
    body = json.dumps({"model": words["MODEL"], "messages": [{"role": "user", "content": "Hello"}]})
    bearer = shell.argument("Authorization: Bearer " + words["KEY"])
    if words["KEY"] == "$" + KEY_VARIABLE:
        reference = shell.reference.strip('"').format(KEY_VARIABLE)
        bearer = f'"Authorization: Bearer {reference}"'
    url, kind = (shell.argument(text) for text in (
        words["URL"] + "/v1/chat/completions", "Content-Type: application/json"))
    if shell is SHELLS["powershell"]:
        return f"{shell.argument(body)} | curl.exe {url} -H {bearer} -H {kind} -d '@-'"
    return f"curl {url} -H {bearer} -H {kind} -d {shell.argument(body)}"


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def file_text(client: str, words: Mapping[str, str]) -> str:
    """What goes into the file of a client, "" where it needs none."""
    if client == "claude":
        return json_text({"env": env_values(client, words)})
    return fill_text(CLIENTS[client].text, words).replace('model = ""\n', "")


def client_blocks(client: str, key: str, words: Mapping[str, str]) -> List[Json]:
    """The lines of `env` for each shell, and the file of a client, with `key`."""
    blocks, setup = [], CLIENTS[client]
    for name, shell in SHELLS.items():
        lines = env_lines(client, shell, words)
        if words["KEY"] == "$" + KEY_VARIABLE:
            lines.insert(0, shell.variable.format(name=KEY_VARIABLE, value=shell.quote(key)))
        blocks.append({"title": name, "language": name, "text": "\n".join(lines)})
    return blocks + ([{"title": setup.file, "language": setup.language,
                       "text": file_text(client, {**words, "KEY": key})}] if setup.file else [])


def show_clients(handler: Handler) -> Json:
    """GET clients: what to copy into each client.  No key is in there, only where it goes."""
    query, router = query_of(handler), handler.gateway.current().router
    given, needs_key = query.get("key", ""), handler.server.needs_key
    if not re.fullmatch(r"[\x21-\x7e]{0,200}", given):
        raise BadRequest("key: printable characters without blanks expected", param="key")
    # names come from upstreams, and these lines go into shells
    model = re.sub(r'[\x00-\x1f\x7f"]', "", query.get("model") or router.default_model)
    key, base = given or ("YOUR_KEY" if needs_key else "sk-none"), address_for(handler)
    chosen = model if query.get("model") and model != router.default_model else ""
    words = {"URL": base, "KEY": "$" + KEY_VARIABLE if needs_key and not given else key,
             "MODEL": model or "MODEL", **claude_words(router, chosen)}
    return {"base_url": base, "model": model, "needs_key": needs_key, "data": [
        {"id": name, "title": setup.title, "blocks": client_blocks(name, key, words)}
        for name, setup in CLIENTS.items()]}


#: method and path below /admin/api/ -> what it does; all but the public ones want a session.
PAGE_ROUTES: Dict[str, Callable[[Handler], Optional[Json]]] = {
    "GET session": show_session, "POST session": sign_in, "DELETE session": sign_out,
    "POST password": set_password, "GET events": stream_events,
    "GET overview": lambda handler: overview_of(handler.server),
    "GET requests": show_requests, "GET series": show_series, "GET usage": show_usage,
    "GET usage.csv": download_usage, "GET logs": show_logs, "GET logs.txt": download_logs,
    "GET about": show_about, "GET instances": show_instances, "GET config": show_config,
    "PATCH config": save_config, "GET presets": show_presets, "GET providers": show_providers,
    "POST providers": add_provider, "PUT providers/{name}": edit_provider,
    "DELETE providers/{name}": remove_provider, "POST providers/test": try_provider,
    "POST providers/order": order_providers, "GET models": show_admin_models,
    "POST routes/explain": lambda handler: explain(
        handler.gateway, handler.read_json(ADMIN_BODY_BYTES), wants_english(handler)),
    "GET keys": show_keys, "POST keys": add_key, "DELETE keys/{name}": remove_key,
    "GET logins": show_logins, "DELETE logins/{name}": end_login, "POST oauth/start": start_login,
    "POST oauth/paste": paste_login,
    "GET oauth/status": lambda handler: handler.gateway.logins.status(),
    "GET clients": show_clients, "POST play/chat": play}

add_routes({line.replace(" ", " /admin/api/"): Route(
    run, public=run in (show_session, sign_in, set_password), admin=True)
    for line, run in PAGE_ROUTES.items()})


# === 19. The page ============================================================
#
# One static page: style, markup, the script in parts, its texts.  All data comes from the API of
# the section before.  A view is an entry of VIEWS, a name in NAV and a text `view_NAME`.

# language=CSS
PAGE_CSS = r"""
:root{color-scheme:light;--bg:#f5f6f8;--surface:#fff;--soft:#eef0f3;--text:#171b21;--muted:#565f6b;
--line:#dde1e7;--edge:#858e9b;--accent:#0d6e6a;--on-accent:#fff;--accent-soft:#e1f1ef;--ok:#17703a;
--ok-soft:#e2f3e7;--warn:#855600;--warn-soft:#fbf0d9;--bad:#b3261e;--bad-soft:#fce9e7;
--shadow:0 12px 32px #10182833,0 2px 6px #1018281f;--radius:10px;--small:7px;--gap:16px;
--s1:#0e7f79;--s2:#c76a06;--s3:#3d63dd;--s4:#b13a92;--s5:#5b8a16;--s6:#7c53e0;--s7:#c43a31;
--s8:#8a5a3c;--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
:root[data-theme=dark]{color-scheme:dark;--bg:#0e1116;--surface:#161a21;--soft:#20262f;
--text:#e7eaef;--muted:#9ba5b3;--line:#2a313b;--edge:#6f7a89;--accent:#4cc9bd;--on-accent:#04211f;
--accent-soft:#143633;--ok:#56c97a;--ok-soft:#15311f;--warn:#e3b34f;--warn-soft:#352a12;
--bad:#ff8a80;--bad-soft:#3c1c1a;--shadow:0 16px 40px #000a,0 0 0 1px #ffffff1a;--s1:#2fc4b6;
--s2:#f0a045;--s3:#86a2fb;--s4:#e681cc;--s5:#a4cc5c;--s6:#b39bfa;--s7:#f3867e;--s8:#c9a27e}
*,*::before,*::after{box-sizing:border-box}
body{margin:0;color:var(--text);background:var(--bg);font:14px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Noto Sans","PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
h1,h2,h3,p,ul,ol,dl,dd,pre{margin:0;padding:0}ul,ol{list-style:none}
h1{font-size:20px;line-height:1.3}h2{font-size:15px}h3{font-size:14px}h1,h2,h3{font-weight:650}
a{color:var(--accent);text-underline-offset:2px}[hidden]{display:none!important}
button,input,select,textarea{font:inherit;color:inherit}button{cursor:pointer}
:focus-visible{outline:2px solid var(--accent);outline-offset:1px}
::placeholder{color:var(--muted);opacity:1}
.visually-hidden{position:absolute!important;width:1px!important;height:1px!important;
min-height:0!important;padding:0!important;border:0!important;overflow:hidden;clip-path:inset(50%);
white-space:nowrap}
.skip{position:fixed;left:12px;top:-60px;z-index:9;padding:8px 14px;border-radius:var(--small);
background:var(--accent);color:var(--on-accent)}.skip:focus{top:12px}
#app{display:grid;grid-template:auto 1fr/220px minmax(0,1fr);min-height:100vh}
#nav{grid-row:1/3;position:sticky;top:0;height:100vh;overflow-y:auto;padding:14px 12px;
background:var(--surface);border-inline-end:1px solid var(--line);
display:flex;flex-direction:column}
.brand{display:flex;align-items:center;gap:10px;padding:2px 8px 8px;font-weight:680;font-size:16px;
color:inherit;text-decoration:none}#mark{width:28px;height:28px}
#nav h2{font-size:12px;color:var(--muted);padding:14px 10px 4px}
#nav li a{display:block;padding:6px 10px;border-radius:var(--small);color:inherit;
text-decoration:none}#nav li a:hover{background:var(--soft)}
#nav li a[aria-current]{background:var(--accent-soft);color:var(--accent);font-weight:500}
.version{margin:auto 10px 0;padding-top:16px}#burger{display:none}
#top{position:sticky;top:0;z-index:5;display:flex;align-items:center;gap:6px;padding:10px 28px;
background:var(--bg);border-bottom:1px solid var(--line)}#top h1{flex:1;min-width:0}
#main{padding:24px 28px 64px;outline:none;min-width:0}#main>*{max-width:1240px;margin-inline:auto}
.stack{display:grid;gap:var(--gap);grid-template-columns:minmax(0,1fr)}
.card .stack,dialog .stack{gap:10px}
.grid{display:grid;gap:var(--gap);--least:260px;align-items:start;
grid-template-columns:repeat(auto-fit,minmax(min(100%,var(--least)),1fr))}
.grid.wide{--least:420px}.grid.small{--least:150px}.grid.tiles{--least:200px;align-items:stretch}
.row,.chips{display:flex;flex-wrap:wrap;align-items:center;gap:8px;min-width:0}
.spread{display:flex;flex-wrap:wrap;align-items:center;justify-content:space-between;gap:8px 12px}
.row.bottom{align-items:flex-end}.row.bottom .field{flex:1 1 200px;max-width:340px}
.grow{flex:1;min-width:0}.card,.tile,.play{min-width:0}
.card{background:var(--surface);border:1px solid var(--line);border-radius:var(--radius);
padding:16px 18px}.card>.spread:first-child{margin-bottom:12px}
.card>:is(.note,.hint,.facts),.checks{margin-block:8px}.card.tile>.hint{margin:0}
.btn,.icon-btn{display:inline-flex;align-items:center;justify-content:center;gap:7px;
min-height:34px;padding:5px 13px;border:1px solid var(--line);border-radius:var(--small);
background:var(--surface);text-decoration:none;color:inherit;font-weight:500;white-space:nowrap}
.btn:hover,.icon-btn:hover{background:var(--soft)}
.btn.primary{background:var(--accent);border-color:var(--accent);color:var(--on-accent)}
.btn.primary:hover{background:color-mix(in srgb,var(--accent) 88%,var(--text))}
.btn.danger{color:var(--bad)}.btn.danger:hover{background:var(--bad-soft)}
.btn.quiet,.icon-btn{border-color:transparent;background:none}.btn.quiet{color:var(--accent)}
.btn.small{min-height:28px;padding:2px 9px;font-size:13px}
.icon-btn{min-width:34px;padding:0 6px;color:var(--muted);font-size:16px;line-height:1}
.icon-btn.text{font-size:13px}.icon-btn:hover{color:var(--text)}
:is(.chip,.data) .icon-btn{min-width:24px;min-height:24px}
.btn:disabled,.icon-btn:disabled{opacity:.55;cursor:default}
.btn[aria-busy]::before{content:"";width:13px;height:13px;border-radius:50%;border:2px solid;
border-right-color:transparent;animation:spin .8s linear infinite}
@keyframes spin{to{transform:rotate(1turn)}}
.field{display:grid;gap:4px;align-content:start;min-width:0}.field>label{font-weight:500}
.field.check{grid-template-columns:auto 1fr;column-gap:9px;align-items:center}
.field.check>:is(.hint,.error){grid-column:2}.hint{font-size:13px;color:var(--muted)}
.error{font-size:13px;color:var(--bad)}.error:empty{display:none}
input:not([type=checkbox]),select,textarea{width:100%;min-height:34px;padding:5px 10px;min-width:0;
border:1px solid var(--edge);border-radius:var(--small);background:var(--surface)}
input[type=checkbox]{width:16px;height:16px;margin:0;accent-color:var(--accent)}
textarea{resize:vertical;min-height:56px}[aria-invalid=true]{border-color:var(--bad)!important}
:is(input,select,textarea):disabled{background:var(--soft);color:var(--muted)}
.row>:is(input,select){width:auto!important}.row>.search{width:220px!important}
.search{max-width:320px}
.masked:not(:focus){-webkit-text-security:disc}
.badge{padding:1px 8px;border-radius:99px;background:var(--soft);color:var(--muted);font-size:12px;
font-weight:500;white-space:nowrap}
.badge.ok,.done .step-n{background:var(--ok-soft);color:var(--ok)}
.badge.warn{background:var(--warn-soft);color:var(--warn)}
.badge.bad{background:var(--bad-soft);color:var(--bad)}
.note{padding:10px 14px;border-radius:var(--small);background:var(--soft);overflow-wrap:anywhere}
.note.warn{background:var(--warn-soft)}.note.bad{background:var(--bad-soft)}
.mono{font-family:var(--mono);font-size:.93em}.muted{color:var(--muted)}
.num,.data,.figure{font-variant-numeric:tabular-nums}.break,bdi{overflow-wrap:anywhere}
.live{display:inline-flex;align-items:center;gap:6px;padding:0 8px;color:var(--muted);
font-size:13px;white-space:nowrap}
.dot{width:8px;height:8px;border-radius:50%;background:var(--muted);flex:none}
.dot.ok{background:var(--ok)}.dot.warn{background:var(--warn)}
.scroll{overflow-x:auto}.data{width:100%;border-collapse:collapse}
.data :is(th,td){padding:7px 10px;border-bottom:1px solid var(--line);vertical-align:top}
.data th{text-align:start;font-size:12.5px;font-weight:500;color:var(--muted);white-space:nowrap}
.data :is(th,td):first-child{padding-inline-start:0}.data td bdi{overflow-wrap:break-word}
.data :is(th,td):last-child{padding-inline-end:0}.data td.break bdi{overflow-wrap:anywhere}
.data tr:last-child td{border-bottom:0}.data .end{text-align:end;white-space:nowrap}
.data .end .row{flex-wrap:nowrap;justify-content:flex-end}.nowrap{white-space:nowrap}
.data tr.open{cursor:pointer}.data tr.open:hover td{background:var(--soft)}
.usage-sum tr:last-child td{font-weight:650;border-top:2px solid var(--line)}
.empty{padding:28px 12px;text-align:center;color:var(--muted)}.chips:empty{display:none}
pre{font:13px/1.6 var(--mono);background:var(--soft);border-radius:var(--small);padding:12px 14px;
overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere;max-height:420px}
.tabs{display:flex;flex-wrap:wrap;gap:2px;padding:3px;border-radius:var(--radius);
background:var(--soft);width:fit-content}
.tabs>*{border:0;border-radius:var(--small);padding:4px 12px;background:none;color:var(--muted);
font-weight:500}.tabs>[aria-pressed=true]{background:var(--surface);color:var(--text)}
.facts{display:grid;grid-template-columns:minmax(90px,max-content) minmax(0,1fr);gap:6px 18px}
.facts dt{color:var(--muted)}.facts dd{overflow-wrap:anywhere;min-width:0}
.tile{display:grid;gap:2px;align-content:start}.offline .tile{opacity:.5}
.figure{display:flex;align-items:baseline;gap:8px;flex-wrap:wrap;font-size:24px;font-weight:650;
line-height:1.25}.figure .dot{width:11px;height:11px;align-self:center}
.limit{display:grid;grid-template-columns:minmax(0,1fr) minmax(50px,120px) minmax(96px,auto);
gap:10px;align-items:center;font-size:13px}.limit .num{text-align:end}.limit meter{width:100%}
.chip{display:inline-flex;align-items:center;gap:6px;padding:2px 9px;border:1px solid var(--line);
border-radius:99px;background:none;font-size:12.5px;max-width:100%;min-height:26px}
button.chip:hover{border-color:var(--accent)}button.chip[aria-pressed=true]{
background:var(--accent-soft);border-color:var(--accent);color:var(--accent)}
.checks{display:grid;gap:6px;padding:10px 12px;border-radius:var(--small);background:var(--soft)}
.checks li{display:grid;grid-template-columns:minmax(40px,auto) minmax(0,1fr);gap:10px;
align-items:baseline}.checks .badge{min-width:84px;text-align:center}
summary{cursor:pointer;color:var(--muted);font-weight:500;padding:4px 0;width:fit-content}
details[open]>summary{margin-bottom:8px}
.settings{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));
gap:20px 28px}.setting>.btn{margin-inline-start:-9px}
.savebar{position:sticky;bottom:14px;z-index:4;display:flex;flex-wrap:wrap;align-items:center;
justify-content:space-between;gap:8px;padding:10px 10px 10px 16px;border-radius:var(--radius);
background:var(--surface);box-shadow:var(--shadow)}
.steps{display:grid;gap:var(--gap);max-width:900px}.step{display:flex;gap:16px}
.step-n{display:grid;place-items:center;width:30px;height:30px;flex:none;border-radius:50%;
background:var(--accent-soft);color:var(--accent);font-weight:650}
.log-box{position:relative}.log-box .empty{position:absolute;inset:0}
.log-pane{height:max(300px,calc(100dvh - 190px));overflow:auto;background:var(--surface);
border:1px solid var(--line);border-radius:var(--radius);font:12.5px/22px var(--mono);
overflow-anchor:none}
.log-line{display:flex;gap:12px;padding:0 12px;white-space:nowrap;content-visibility:auto;
contain-intrinsic-height:22px}.log-line:hover{background:var(--soft)}
.log-line bdi{flex:1;min-width:0;overflow:hidden;text-overflow:ellipsis}
:is(.log-pane.wrap,.log-line.open) bdi{white-space:pre-wrap}.level{width:58px;flex:none}
[data-level=warning] .level{color:var(--warn)}[data-level=error] .level{color:var(--bad)}
.log-newest{position:absolute;inset:auto 0 14px;margin:auto;width:fit-content}
.play{display:flex;flex-direction:column;gap:12px;height:calc(100dvh - 130px);min-height:440px}
.play-log{flex:1;min-height:0;overflow-y:auto;display:flex;flex-direction:column;gap:16px;
padding:16px 2px;border-block:1px solid var(--line)}.play-log>.empty{margin:auto}
.play-text{white-space:pre-wrap;overflow-wrap:anywhere;max-width:860px}
.play-user{align-self:flex-end;max-width:86%;display:grid;gap:8px;padding:9px 14px;
border-radius:var(--radius);background:var(--accent-soft)}
.play-fold{border-inline-start:3px solid var(--line);padding-inline-start:12px;font-size:13px}
.play-composer{display:grid;gap:8px}.play-thumb img{height:56px;border-radius:var(--small)}
.chart-art{display:block;margin-bottom:10px}.chart-art text{font-size:12px;fill:var(--muted)}
.chart-art line{stroke:var(--line)}.chart-art rect{fill:var(--c)}
.chart-dot{width:10px;height:10px;border-radius:3px;background:var(--c)}
.series-1{--c:var(--s1)}.series-2{--c:var(--s2)}.series-3{--c:var(--s3)}.series-4{--c:var(--s4)}
.series-5{--c:var(--s5)}.series-6{--c:var(--s6)}.series-7{--c:var(--s7)}.series-8{--c:var(--s8)}
dialog{width:min(560px,calc(100vw - 24px));max-height:calc(100dvh - 32px);padding:0;border:0;
border-radius:var(--radius);color:inherit;background:var(--surface);box-shadow:var(--shadow)}
dialog.wide{width:min(860px,calc(100vw - 24px))}dialog::backdrop{background:#0b0f1480}
dialog.gate::backdrop{background:var(--bg)}
dialog form{display:flex;flex-direction:column;max-height:calc(100dvh - 32px)}
dialog :is(header,footer){display:flex;flex-wrap:wrap;align-items:center;gap:8px;padding:14px 20px}
dialog header h2{flex:1}dialog footer{justify-content:flex-end;border-top:1px solid var(--line)}
.dialog-body{padding:2px 20px 18px;overflow-y:auto;display:grid;gap:14px;
grid-template-columns:minmax(0,1fr)}
#toasts{position:fixed;inset:auto 16px 16px auto;z-index:9;display:grid;gap:8px;margin:0;padding:0;
max-width:min(420px,calc(100vw - 32px));border:0;background:none;overflow:visible;color:inherit}
.toast{display:flex;align-items:flex-start;gap:10px;padding:8px 8px 8px 14px;
border-radius:var(--small);background:var(--surface);box-shadow:var(--shadow);
overflow-wrap:anywhere;border-inline-start:4px solid var(--ok)}.toast.bad{border-color:var(--bad)}
@media (max-width:900px){
#app{display:block}#top{padding:8px 16px}#main{padding:16px 16px 56px}
#burger{display:inline-flex;margin-inline-start:-8px}
#nav{display:none;position:fixed;inset:55px 0 0;height:auto;z-index:4}
#nav.open{display:flex}.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}
}
@media (max-width:640px){
h1{font-size:17px}.card{padding:14px}.figure{font-size:18px}.tiles{gap:10px}
.live span:not(.dot),.log-line>span:first-child,.data thead{display:none}
.btn,.icon-btn,input:not([type=checkbox]),select{min-height:38px}
input,select,textarea{font-size:16px!important}.row>.search{flex:1 1 150px}.search{max-width:none}
.data,.data tbody{display:block}.data tr{display:grid;padding:10px 0;position:relative;
grid-template-columns:minmax(0,1fr);border-bottom:1px solid var(--line)}
.data td{display:flex;justify-content:space-between;gap:14px;padding:1px 0;border:0;text-align:end}
.data td>*{min-width:0}.data td::before{content:attr(data-label);color:var(--muted);flex:none}
.data td:first-child::before,.data td.bare::before{content:none}
.data td:first-child{font-weight:600;text-align:start}.data :is(.blank,.minor){display:none}
.data tr.open td.bare{position:absolute;inset:4px 0 auto auto}
.facts{grid-template-columns:minmax(0,1fr);gap:0}.facts dd{margin-bottom:8px}
.step{flex-direction:column;gap:10px}.limit{grid-template-columns:minmax(0,1fr) auto}
.limit meter{grid-row:2;grid-column:1/-1}.log-pane{height:max(300px,calc(100dvh - 230px))}
.play{height:calc(100dvh - 100px)}
}
@media (prefers-reduced-motion:reduce){*,*::before{animation-duration:.01s!important}}
@media (forced-colors:active){.badge,.tabs>[aria-pressed=true]{border:1px solid}}
"""

# language=HTML
PAGE_HTML = r"""<!doctype html>
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
<nav id="nav"><a class="brand" href="#overview">
<svg id="mark" viewBox="0 0 32 32" aria-hidden="true"><rect width="32" height="32" rx="8"
 fill="#0d6e6a"/><path d="M7 9h4c6 0 4 7 9 7h5M7 23h4c6 0 4-7 9-7M7 16h9" fill="none" stroke="#fff"
 stroke-width="2.6" stroke-linecap="round" stroke-linejoin="round"/></svg>
<span>iflow2api</span></a></nav>
<header id="top"></header>
<main id="main" tabindex="-1"></main>
</div>
<div id="toasts" role="status" aria-live="polite"></div>
<script type="application/json" id="texts">@TEXTS@</script>
<script>@JS@</script>
</body>
</html>
"""

#: What the views share: nodes, texts, the API, parts, forms, signing in, the frame.
# language=JavaScript
_JS_CORE = r"""
const $ = (selector, root = document) => root.querySelector(selector);
const TEXTS = JSON.parse($('#texts').textContent);
const SVG = $('#mark').namespaceURI;               // the namespace without writing its address
const BASE = location.pathname.replace(/\/+$/, '') + '/api/';
const isDark = matchMedia('(prefers-color-scheme: dark)');
/** name -> {needs: API paths to fetch first, draw(root, answers, arguments, signal)}.  `signal` is
 *  aborted when another view is drawn: it ends timers and listeners. */
const VIEWS = {};
let session = {language: '', theme_mode: 'system', version: '', base_url: ''};

// --- nodes: text only, never markup

const isBlank = value => value === null || value === undefined || value === '' || value === false;
const isEmpty = value => isBlank(value) || typeof value === 'object' && !Object.keys(value).length;
/** el(tag, {attributes, text, value, on: {event: fn}, data: {}}, ...children). */
const make = create => (tag, first, ...rest) => {
  const node = create(tag), isProps = first && first.constructor === Object;
  const {text, on, data, value, ...attributes} = isProps ? first : {};
  if (text !== undefined) node.textContent = text;
  for (const type in on) node.addEventListener(type, on[type]);
  Object.assign(node.dataset, data);
  for (const [name, given] of Object.entries(attributes))
    if (given === '' || !isBlank(given)) node.setAttribute(name, given === true ? '' : given);
  node.append(...[isProps ? [] : first, rest].flat(9).filter(child => child || child === 0));
  if (value !== null && value !== undefined) node.value = value;         // after a select's options
  return node;
};
const el = make(tag => document.createElement(tag));
const svg = make(tag => document.createElementNS(SVG, tag));
const GLYPHS = {menu: '\u2630', close: '\u00d7', more: '\u203a', up: '\u2191', down: '\u2193',
  user: '\u2026', system: '\u25d0', light: '\u2600\ufe0e', dark: '\u263e'};
const badge = (text, kind = '') => el('span', {class: 'badge ' + kind, text});
const hint = (...parts) => el('p', {class: 'hint'}, parts);
const note = (kind, ...parts) => el('div', {class: 'note ' + kind}, parts);
const row = (...parts) => el('div', {class: 'row'}, parts);
const stack = (...parts) => el('div', {class: 'stack'}, parts);
const grid = (kind, ...parts) => el('div', {class: 'grid ' + kind}, parts);
const link = (label, href, kind = '') => el('a', {class: 'btn ' + kind, href, text: label});
/** A card with its title and, to the right of it, what can be done. */
const card = (title, tools, ...body) => el('section', {class: 'card', 'aria-label': title},
  el('div', {class: 'spread'}, el('h2', {text: title}), tools), body);
/** A list of `given`: {key of the name's text: value}; blank ones are left out. */
const facts = given => el('dl', {class: 'facts'}, Object.entries(given)
  .filter(([, value]) => !isBlank(value))
  .map(([key, value]) => [el('dt', {text: t(key)}), el('dd', nodesOf(value))]));
let ids = 0;
const uid = () => 'i' + ++ids;

// --- words and figures

const stored = {                                   // private windows may forbid it
  get(name) { try { return localStorage['iflow2api.' + name] || ''; } catch { return ''; } },
  set(name, value) { try { localStorage['iflow2api.' + name] = value; } catch { /* */ } }};
const lang = () => stored.get('lang') || session.language ||
  (/^zh/i.test(navigator.language) ? 'zh' : 'en');
const theme = () => stored.get('theme') || session.theme_mode || 'system';
const pick = pair => pair[lang()] || pair.en || pair.zh || '';
/** The text of a key, filled in as PAGE_TEXTS says. */
function t(key, vars = {}) {
  const text = Object.hasOwn(TEXTS, key) ? TEXTS[key][lang() === 'zh' ? 0 : 1] : key;
  return text.replace(/\{(\w+)(?::([^|}]*)\|([^}]*))?\}/g, (all, name, one, many) =>
    !(name in vars) ? all : one === undefined ? vars[name] : Number(vars[name]) === 1 ? one : many);
}
const INVISIBLE = new RegExp('[\\0-\\x08\\v-\\x1f\\x7f-\\x9f\\u061c\\u200b\\u200e\\u200f' +
  '\\u2028-\\u202e\\u2060-\\u2069\\ufeff]', 'g');
/** Text from outside: invisible and right-to-left control characters are shown as their codes. */
const clean = text => String(text ?? '').replace(INVISIBLE, c =>
  '\u27e8' + c.charCodeAt(0).toString(16).toUpperCase().padStart(2, '0') + '\u27e9');
const foreign = (text, css) => el('bdi', {class: css, text: clean(text)});
const mono = text => !isBlank(text) && foreign(text, 'mono break');
const nodesOf = value => value instanceof Node || Array.isArray(value) ? value : foreign(value);
const lines = text => text.split(/[\n,]/).map(part => part.trim()).filter(Boolean);
const DASH = '\u2013', DOT = ' \u00b7 ';
const locale = () => lang() === 'zh' ? 'zh-CN' : 'en-GB';
const UNITS = [['second', 1, 90], ['minute', 60, 5400], ['hour', 3600, 129600], ['day', 86400]];
const unitOf = s => UNITS.find(([, , most]) => !(s >= most));
/** Epoch seconds of a number or an ISO 8601 text. */
const epochOf = when => typeof when === 'string' ? Date.parse(when) / 1000 : when;
const moment = (when, style) => epochOf(when) ?
  new Intl.DateTimeFormat(locale(), style).format(epochOf(when) * 1000) : DASH;
const CLOCK = {hour: '2-digit', minute: '2-digit', hour12: false};
const fmt = {
  number: n => isBlank(n) ? DASH : new Intl.NumberFormat(locale()).format(n),
  tokens: n => isBlank(n) || n < 10000 ? fmt.number(n) : n < 1e6 ?
    (n / 1e3).toFixed(n < 1e5 ? 1 : 0) + 'k' : (n / 1e6).toFixed(n < 1e8 ? 1 : 0) + 'M',
  cost: n => new Intl.NumberFormat(locale(), {maximumFractionDigits: 4}).format(n),
  time: when => moment(when, {...CLOCK, second: '2-digit'}),
  date: when => moment(when, {...CLOCK, year: 'numeric', month: 'short', day: 'numeric'}),
  seconds: s => isBlank(s) ? DASH : s < 0.9995 ? Math.round(s * 1000) + ' ms' :
    s < 99.95 ? s.toFixed(s < 9.95 ? 2 : 1) + ' s' : fmt.span(s),
  span(s) {
    const [unit, size] = unitOf(s), style = {style: 'unit', unit, unitDisplay: 'long'};
    return new Intl.NumberFormat(locale(), {...style, maximumFractionDigits: 0}).format(s / size);
  },
  ago(when) {
    const s = epochOf(when) - Date.now() / 1000, [unit, size] = unitOf(Math.abs(s));
    return new Intl.RelativeTimeFormat(locale(), {numeric: 'auto'}).format(Math.round(s / size),
      unit);
  }};

// --- the server

class ApiError extends Error {
  constructor(status, body) {
    const error = (body && body.error) || {};
    super(error.message || t('error_status', {status}));
    Object.assign(this, {status, code: error.code || '', param: error.param || ''});
  }
}
const OWN_WORDS = {changed_meanwhile: 'conflict', address_changed: 'address_changed'};
const errorText = error => OWN_WORDS[error.code] ? t(OWN_WORDS[error.code]) :
  error instanceof ApiError ? clean(error.message) :
    t('error_page', {text: clean(error.message || error)});
/** An ok Response, else ApiError; where the session has ended it signs in and tries again. */
async function request(path, {method, body, signal} = {}) {
  const headers = {'accept-language': lang(), 'content-type': 'application/json'};
  for (;;) {
    const response = await fetch(BASE + path, {method: method || (body ? 'POST' : 'GET'), signal,
      cache: 'no-store', headers, body: body && JSON.stringify(body)}).catch(error => {
      throw error.name === 'AbortError' ? error :
        new ApiError(0, {error: {message: t('error_offline')}});
    });
    if (response.ok) return response;
    const failure = new ApiError(response.status, await response.json().catch(() => null));
    failure.retryAfter = Number(response.headers.get('retry-after')) || 0;
    if (!/^(no_session|session_expired)$/.test(failure.code)) throw failure;
    await signIn();
  }
}
async function api(path, options) {
  const response = await request(path, options);
  return response.status === 204 ? null : response.json();
}
/** The page's one EventSource; it resumes after the last event, and closes in a hidden page. */
const live = {state: '', last: '', withLogs: false, target: new EventTarget(),
  on(name, fn, signal) { live.target.addEventListener(name, ({detail}) => fn(detail), {signal}); },
  emit(name, detail) { live.target.dispatchEvent(new CustomEvent(name, {detail})); },
  setState(now) { if (live.state !== now) live.emit('state', live.state = now); },
  stop() {
    clearTimeout(live.timer);
    if (live.source) live.source.close();
    live.source = null;
  },
  start() {
    live.stop();
    const source = live.source = new EventSource(
      `${BASE}events?last_event_id=${live.last}${live.withLogs ? '&logs=1' : ''}`);
    for (const name of ['overview', 'request', 'log', 'dropped', 'config'])
      source.addEventListener(name, event => {
        live.last = event.lastEventId;
        live.emit(name, JSON.parse(event.data));
      });
    source.onopen = () => live.setState('open');
    source.onerror = () => {
      live.setState('closed');
      if (source.readyState !== EventSource.CLOSED) return;
      live.stop();                     // refused: if the session has ended, `api` signs in
      live.timer = setTimeout(() => api('overview').then(live.start, live.start), 1500);
    };
  },
  logs(on) { live.withLogs = on; if (live.source) live.start(); },
  follow() {                           // a browser has six connections for all tabs of one server
    clearTimeout(live.hidden);
    if (!document.hidden && !live.source) live.start();
    if (document.hidden)
      live.hidden = setTimeout(() => { live.stop(); live.setState('closed'); }, 20000);
  }};

// --- parts

function toast(text, kind = 'ok') {
  const box = $('#toasts'), item = el('div', {class: 'toast ' + kind},
    el('span', {class: 'grow', text: clean(text)}),
    iconButton('close', t('close'), () => item.remove()));
  box.append(item);
  while (box.children.length > 4) box.firstChild.remove();
  if (box.showPopover) {               // above a dialog
    box.popover = 'manual';
    if (box.matches(':popover-open')) box.hidePopover();
    box.showPopover();
  }
  setTimeout(() => item.remove(), kind === 'bad' ? 12000 : 5000);
}
/** While `promise` runs, the button is disabled and shows that it works. */
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
const tellError = error => error.name === 'AbortError' || toast(errorText(error), 'bad');
/** A click handler: its button is busy while it runs, and an error becomes a toast. */
const act = run => async event => {
  try {
    const node = event.currentTarget, result = run(event);
    if (result instanceof Promise) await busy(node, result);
  } catch (error) { tellError(error); }
};
const button = (label, run, kind = '', props = {}) => el('button',
  {class: 'btn ' + kind, type: 'button', on: {click: act(run)}, ...props}, label);
const iconButton = (image, label, run, props = {}) => el('button', {class: 'icon-btn',
  type: 'button', 'aria-label': label, title: label, on: {click: act(run)}, ...props},
  el('span', {'aria-hidden': 'true', text: GLYPHS[image]}));
/** `actions`: [label, kind, run]; the dialog stays open when `run` returns false or throws. */
function dialog({title, body, actions = [], wide, gate, onclose}) {
  const error = el('p', {class: 'error', role: 'alert'}), close = () => node.open && node.close();
  const press = async (pressed, run) => {
    error.textContent = '';
    try {
      if (!run || await busy(pressed, Promise.resolve(run())) !== false) close();
    } catch (failure) {
      error.textContent = errorText(failure);
      error.scrollIntoView({block: 'nearest'});
    }
  };
  const buttons = actions.map(([label, kind, run], at) => el('button', {class: 'btn ' + kind,
    text: label, type: at === actions.length - 1 ? 'submit' : 'button', on: {click(event) {
      event.preventDefault();
      if (!run || this.form.reportValidity()) press(this, run);
    }}}));
  const heading = el('h2', {text: title, id: uid()});
  const form = el('form', {method: 'dialog', on: {submit: event => event.preventDefault()}},
    el('header', heading, !gate ? iconButton('close', t('close'), close) :
      !shown && languageButton(() => location.reload())),
    el('div', {class: 'dialog-body'}, body, error), buttons.length > 0 && el('footer', buttons));
  const stay = event => { if (gate) event.preventDefault(); };
  const node = el('dialog', {class: (wide ? 'wide ' : '') + (gate && !shown ? 'gate' : ''),
    'aria-labelledby': heading.id, on: {cancel: stay,
      keydown: event => event.key === 'Escape' && stay(event),
      close() { node.remove(); if (onclose) onclose(); }}}, form);
  document.body.append(node);
  node.showModal();
  (form.querySelector('.dialog-body :is(input:not([tabindex]),select,textarea,a,button)') ||
    buttons[buttons.length - 1] || form).focus();
  return {close, error};
}
const confirmBox = (text, action = t('remove'), title = t('confirm')) => new Promise(done => {
  dialog({title, body: el('p', {class: 'break', text: clean(text)}), onclose: () => done(false),
    actions: [[t('cancel'), 'quiet'], [action, 'danger', () => done(true)]]});
});
/** A button that asks, then deletes `path` + `name` by the API. */
const removal = (question, path, name, label = t('remove')) => button(label, async () => {
  if (!await confirmBox(question, label)) return;
  await api(path + encodeURIComponent(name), {method: 'DELETE'});
  await redraw();
}, 'small danger', {'aria-label': label + ' ' + clean(name)});

// --- fields and forms

function parseJson(text) {
  try { return JSON.parse(text); } catch (error) {
    throw new Error(t('bad_json', {text: error.message}));
  }
}
const QUIET = {autocomplete: 'off', spellcheck: 'false'};
const input = (props = {}) => el('input', {type: 'text', ...QUIET, ...props});
const area = (value, rows, props) =>
  el('textarea', {class: 'mono', ...QUIET, value, rows, ...props});
const option = (value, text = value) => el('option', {value, text});
/** {name: its text} of names whose texts begin with `prefix`. */
const texts = (prefix, names) => Object.fromEntries(names.map(name => [name, t(prefix + name)]));
/** Kind of a field -> its control, and the function that reads it, which may throw. */
const KINDS = {
  text: (value, props) => [input({value, ...props}), node => node.value.trim()],
  password: (value, props) => [input({type: 'password', required: true, maxlength: 200, ...props}),
    node => node.value],
  date: (value, props) => [input({type: 'date', ...props}), node => node.value],
  number: (value, props) => [input({type: 'number', min: 0, step: 1, value, ...props}),
    node => node.value === '' ? null : Number(node.value)],
  check: (value, props) => [el('input', {type: 'checkbox', checked: Boolean(value), ...props}),
    node => node.checked],
  choice: (value, {options, ...props}) => [el('select', {value, ...props},
    options.map(each => option(...[each].flat()))), node => node.value],
  list: (value, props) => [area(value.join('\n'), Math.max(2, value.length), props),
    node => node.value.split('\n').map(line => line.trim()).filter(Boolean)],
  json(value, {nothing, ...props}) {
    const text = isEmpty(value) ? '' : JSON.stringify(value, null, 2);
    return [area(text, Math.min(14, text.split('\n').length + 1), props),
      node => node.value.trim() ? parseJson(node.value) : nothing];
  }};
/** A control with its label, the text `label`, and its hint, the text `label_hint`.
 *  `.read()` gives its value; `.fail(text)` shows what is wrong with it. */
function field(name, kind, value, {label = name, title = t(label), below, ...props} = {}) {
  const [control, read] = KINDS[kind](value, props), id = control.id = uid();
  const words = below || TEXTS[label + '_hint'] && t(label + '_hint');
  const error = el('div', {class: 'error', id: id + 'e', role: 'alert'});
  const caption = el('label', {for: id}, title);
  const node = el('div', {class: 'field' + (kind === 'check' ? ' check' : '')},
    kind === 'check' ? [control, caption] : [caption, control],
    words && el('div', {class: 'hint', id: id + 'h'}, words), error);
  control.setAttribute('aria-describedby', (words ? id + 'h ' : '') + id + 'e');
  control.addEventListener('input', () => error.textContent && node.fail(''));
  control.addEventListener('invalid', event => {   // in the page's language, not the browser's
    event.preventDefault();
    node.fail(t(control.validity.valueMissing ? 'invalid_missing' :
      control.validity.tooShort ? 'password_new_hint' : 'invalid'));
  });
  return Object.assign(node, {control, field: name, fail(text) {
    error.textContent = clean(text);
    control.setAttribute('aria-invalid', Boolean(text));
    if (text) control.focus();
    return false;
  }, read() {
    try { return read(control); } catch (failure) {
      node.fail(failure.message);
      throw failure;
    }
  }});
}
/** Fields of rows [name, kind, value, options]: {nodes, each field by name, values(), blame()}. */
function form(rows) {
  const nodes = rows.map(each => field(...each));
  return {nodes, ...Object.fromEntries(nodes.map(node => [node.field, node])),
    values: () => Object.fromEntries(nodes.map(node => [node.field, node.read()])),
    /** Shows an error of the API at its field; one without a field is thrown again. */
    blame(error) {
      const node = nodes.find(each => each.field === error.param.split(/[.[]/)[0]);
      if (!node) throw error;
      const fold = node.closest('details');
      if (fold) fold.open = true;
      return node.fail(errorText(error));
    }};
}
/** A dialog around a form; an error of `save(values)` is shown at its field. */
const formDialog = ({ask, body = ask.nodes, label = t('save'), save, actions = [], ...more}) =>
  dialog({body, ...more, actions: [...more.gate ? [] : [[t('cancel'), 'quiet']], ...actions,
    [label, 'primary', async () => {
      try { return await save(ask.values()); } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        return ask.blame(error);
      }
    }]]});
const search = (label, run) => input({type: 'search', class: 'search', placeholder: label,
  'aria-label': label, on: {input: event => run(event.target.value.toLowerCase())}});
/** Buttons of which one is pressed; `choices`: {key: text}. */
function segments(label, choices, value, onPick) {
  const press = key => nodes.forEach(node => node.setAttribute('aria-pressed',
    node.dataset.key === key));
  const nodes = Object.entries(choices).map(([key, text]) => el('button', {type: 'button', text,
    data: {key}, on: {click() { press(key); onPick(key); }}}));
  press(value);
  return el('div', {class: 'tabs', role: 'group', 'aria-label': label}, nodes);
}
/** Plain http from another machine has no navigator.clipboard: there a selection is copied. */
async function copyText(text, near) {
  try { await navigator.clipboard.writeText(text); } catch {
    const box = el('textarea', {class: 'visually-hidden', value: text, 'aria-hidden': 'true'});
    near.after(box);
    box.select();
    const done = document.execCommand('copy');
    box.remove();
    near.focus();
    if (!done) throw new Error(t('copy_failed'));
  }
}
function copyButton(text, label = t('copy')) {
  const word = el('span', {text: label, 'aria-live': 'polite'});
  return button(word, async event => {
    await copyText(text, event.currentTarget);
    word.textContent = t('copied');
    setTimeout(() => { word.textContent = label; }, 1600);
  }, 'small');
}
const codeBlock = (title, text) => stack(el('div', {class: 'spread'}, el('h3', {text: title}),
  copyButton(text)), el('pre', {tabindex: '0', 'aria-label': title}, foreign(text)));
const addressLine = url => row(mono(url), copyButton(url));
/** `columns`: [key of the head's text, render(row), class].  `update(rows)` keeps lines whose row
 *  is the same object. */
function table({label, columns, rows = [], empty, open}) {
  const head = ([key, , css]) => el('th', {scope: 'col', class: css},
    key ? t(key) : el('span', {class: 'visually-hidden', text: t('actions')}));
  const body = el('tbody'), nothing = el('div', {class: 'empty'}, empty || t('nothing'));
  const box = el('div', {class: 'scroll', tabindex: '0', role: 'group', 'aria-label': label},
    el('table', {class: 'data', 'aria-label': label}, el('thead', el('tr', columns.map(head))),
      body));
  const cell = (given, [key, render = item => item[key], css = '']) => {
    const value = render(given), kind = isBlank(value) ? ' blank' : key ? '' : ' bare';
    return el('td', {class: css + kind, 'data-label': key && t(key)},
      isBlank(value) ? null : el('div', nodesOf(value)));
  };
  const line = given => el('tr', {class: open && 'open', on: open && {
    click: event => event.target.closest('button,a,input') || open(given)}},
  columns.map(column => cell(given, column)));
  let kept = new Map();
  const root = Object.assign(el('div', box, nothing), {update(list) {
    kept = new Map(list.map(given => [given, kept.get(given) || line(given)]));
    [...kept.values()].forEach((node, at) => {   // what is in place keeps the focus
      if (node !== body.children[at]) body.insertBefore(node, body.children[at] || null);
    });
    while (body.children.length > kept.size) body.lastChild.remove();
    [box.hidden, nothing.hidden] = [!list.length, list.length > 0];
  }});
  root.update(rows);
  return root;
}
/** `ask`, but only the answer to its latest call arrives, and none once `signal` is aborted. */
function latest(ask, signal) {
  let calls = 0;
  return async (...args) => {
    const mine = ++calls, answer = await ask(...args);
    return mine === calls && !(signal && signal.aborted) ? answer : new Promise(() => {});
  };
}
/** Calls `fn` at most every `pause_ms`, and once more at the end. */
function throttle(fn, pause_ms) {
  let timer = 0;
  return () => { timer = timer || setTimeout(() => { timer = 0; fn(); }, pause_ms); };
}

// --- signing in

const currentPassword = name => [name, 'password', '', {autocomplete: 'current-password',
  label: name === 'current' ? 'password_current' : name}];
const newPassword = name => [name, 'password', '', {autocomplete: 'new-password', minlength: 8,
  label: name === 'again' ? 'password_repeat' : 'password_new'}];
const userName = () => el('input', {class: 'visually-hidden', autocomplete: 'username',
  value: 'admin', tabindex: '-1', 'aria-hidden': 'true', readonly: true}); // for password managers
let signingIn = null;
/** Asks for the password in a dialog above the view, which keeps what was typed. */
const signIn = () => signingIn = signingIn || new Promise(done => {
  const ask = form([currentPassword('password')]), box = ask.password;
  formDialog({title: t('sign_in'), gate: true, ask, label: t('sign_in'),
    onclose() { signingIn = null; done(); },
    body: [el('p', {class: 'muted', text: t(shown ? 'sign_in_again' : 'sign_in_lead')}), userName(),
      ask.nodes],
    save: ({password}) => api('session', {body: {user: 'admin', password}}).catch(error => {
      box.control.select();
      return box.fail(error.status === 401 ? t('sign_in_wrong') : error.status === 429 ?
        t('sign_in_slow', {time: fmt.span(error.retryAfter || 1)}) : errorText(error));
    })});
});
/** Sets a password; `first` is the field of the code or password that allows it. */
function passwordDialog(first, {lead, ...more}) {
  const ask = form([first, newPassword('password'), newPassword('again')]);
  formDialog({ask, ...more, body: [lead, ask.nodes[0], userName(), ask.nodes.slice(1)],
    async save({again, ...body}) {
      if (body.password !== again) return ask.again.fail(t('password_differ'));
      await api('password', {body});
      if (shown) toast(t('password_changed'));
    }});
}
const firstPassword = () => new Promise(done => passwordDialog(['code', 'text', '', {
  label: 'setup_code', required: true, maxlength: 16, autocomplete: 'one-time-code',
  autocapitalize: 'characters', placeholder: 'ABCD-EFGH', class: 'mono'}],
{title: t('setup_title'), label: t('setup_go'), gate: true, onclose: done,
  lead: el('p', {class: 'muted', text: t('setup_lead')})}));
async function signOut(everywhere) {
  await api('session', {method: 'DELETE', body: {everywhere}});
  isDirty = () => false;
  location.reload();
}
function accountDialog() {
  const box = dialog({title: t('account'), body: stack(
    button(t('password_change'), () => {
      box.close();
      passwordDialog(currentPassword('current'),
        {title: t('password_change'), lead: hint(t('password_others_end'))});
    }), button(t('sign_out'), () => signOut(false)),
    button(t('sign_out_everywhere'), () => signOut(true)))});
}

// --- the frame

const NAV = [['', ['overview', 'guide']], ['use', ['playground', 'clients', 'usage']],
  ['setup', ['providers', 'models', 'keys', 'instances', 'settings']],
  ['system', ['logs', 'about']]];
let shown = null, isDirty = () => false, here = '';
/** `fn()` tells whether there are unsaved changes: then leaving asks, and nothing is redrawn. */
const guard = fn => { isDirty = fn; };
const mayLeave = async () => !isDirty() ||
  confirmBox(t('unsaved'), t('discard'), t('unsaved_title'));
function applyTheme() {
  const now = theme(), root = document.documentElement;
  root.dataset.theme = now === 'system' ? (isDark.matches ? 'dark' : 'light') : now;
  root.lang = lang() === 'zh' ? 'zh-CN' : 'en';
}
function languageButton(then) {
  const at = lang() === 'zh' ? 1 : 0, other = ['zh', 'en'][at];
  return el('button', {class: 'icon-btn text', type: 'button', lang: other, id: 'lang',
    text: TEXTS.lang[at], 'aria-label': TEXTS.lang_label[at], on: {async click() {
      if (!await mayLeave()) return;
      stored.set('lang', other);
      then();
    }}});
}
function navGroup([group, names]) {
  const list = el('ul', {'aria-labelledby': group && 'nav-' + group}, names.map(name => el('li',
    el('a', {href: '#' + name, data: {view: name}, text: t('view_' + name)}))));
  return group ? [el('h2', {text: t('nav_' + group), id: 'nav-' + group}), list] : [list];
}
/** Shows or hides the navigation on a narrow screen. */
function drawer(open) {
  $('#nav').classList.toggle('open', open);
  $('#burger').setAttribute('aria-expanded', open);
  if (open) $('#nav [aria-current]').focus();
}
function frame() {
  applyTheme();
  $('#skip').textContent = t('skip');
  const nav = $('#nav'), next = {system: 'light', light: 'dark', dark: 'system'}[theme()];
  nav.setAttribute('aria-label', t('nav'));
  nav.replaceChildren(nav.firstElementChild, ...NAV.flatMap(navGroup),
    el('p', {class: 'hint version', text: 'v' + session.version}));
  const switchTheme = () => { stored.set('theme', next); frame(); mark(); $('#theme').focus(); };
  $('#top').replaceChildren(
    iconButton('menu', t('nav'), () => drawer(!nav.classList.contains('open')),
      {id: 'burger', 'aria-expanded': 'false', 'aria-controls': 'nav'}),
    el('h1', {id: 'title'}), el('div', {class: 'live', id: 'live', role: 'status'}),
    languageButton(async () => { frame(); await redraw(); $('#lang').focus(); }),
    iconButton(theme(), t('theme', {now: t('theme_' + theme()), next: t('theme_' + next)}),
      switchTheme, {id: 'theme'}),
    iconButton('user', t('account'), accountDialog, {id: 'account'}));
  showConnection();
}
function showConnection() {
  const open = live.state === 'open';
  document.body.classList.toggle('offline', !open);
  $('#live').replaceChildren(el('span', {class: 'dot ' + (open ? 'ok' : 'warn')}),
    el('span', {text: t(open ? 'live_on' : 'live_off')}));
}
function mark() {
  const name = here.split('/')[0], title = t('view_' + name);
  for (const item of document.querySelectorAll('#nav li a'))
    if (item.dataset.view === name) item.setAttribute('aria-current', 'page');
    else item.removeAttribute('aria-current');
  $('#title').textContent = title;
  document.title = title + ' \u00b7 iflow2api';
}
/** Shows what location.hash says: `#view/argument/\u2026`. */
async function go() {
  let wanted = location.hash.slice(1) || 'overview';
  if (wanted === here) return;
  if (!await mayLeave()) return void history.replaceState(null, '', '#' + here);
  if (!VIEWS[wanted.split('/')[0]]) history.replaceState(null, '', '#' + (wanted = 'overview'));
  const first = !here;
  here = wanted;
  drawer(false);
  scrollTo(0, 0);
  await redraw();
  if (!first) $('#main').focus({preventScroll: true});
}
/** Draws the view again at the same scroll position; the focus goes to the first `data-key` of
 *  `keys` that is there. */
async function redraw(...keys) {
  const plain = part => { try { return decodeURIComponent(part); } catch { return part; } };
  const [name, ...args] = here.split('/').map(plain), view = VIEWS[name], main = $('#main');
  if (shown) shown.abort();
  isDirty = () => false;
  const mine = shown = new AbortController(), root = stack();
  mark();
  const loading = el('p', {class: 'empty', role: 'status', text: t('loading')});
  const wait = setTimeout(() => main.replaceChildren(loading),
    main.dataset.view === name ? 1500 : 150);
  try {
    const data = await Promise.all((view.needs || []).map(path => api(path)));
    if (mine !== shown) return;
    const place = scrollY, {key = ''} = document.activeElement.dataset;
    main.replaceChildren(root);
    main.dataset.view = name;
    mine.version = (data.find(each => each.version) || {}).version;
    view.draw(root, data, args, mine.signal);
    scrollTo(0, place);
    const held = [...keys, key].map(each => each && root.querySelector(
      `[data-key="${CSS.escape(each)}"]:enabled`)).find(Boolean);
    if (held) held.focus();
  } catch (error) {
    if (mine !== shown) return;
    main.replaceChildren(el('div', {class: 'card empty', role: 'alert'},
      el('p', foreign(errorText(error))), button(t('retry'), () => redraw())));
    if (!(error instanceof ApiError)) console.error(error);
  } finally { clearTimeout(wait); }
}
/** Saves settings, unless they were changed elsewhere since `version`. */
async function patchConfig(version, set, unset = [], said = 'saved') {
  try { await api('config', {method: 'PATCH', body: {version, set, unset}}); } catch (error) {
    if (error.code === 'changed_meanwhile') tellOfChange();
    throw error;
  }
  await redraw();
  toast(t(said));
}
function tellOfChange() {
  if (!$('#elsewhere')) $('#main').prepend(el('div',
    {class: 'note warn spread', id: 'elsewhere', role: 'alert'},
    t('conflict'), button(t('reload'), () => redraw())));
  scrollTo(0, 0);
}
/** The configuration has changed: redraws, but not over unsaved changes. */
function followConfig({version}) {
  if (!shown || !shown.version || shown.version === version || $('dialog')) return;
  if (isDirty()) tellOfChange(); else redraw();
}
async function start() {
  $('#skip').addEventListener('click', event => { event.preventDefault(); $('#main').focus(); });
  $('#nav').addEventListener('keydown', event => {
    if (event.key === 'Escape') { drawer(false); $('#burger').focus(); }
  });
  const picture = new XMLSerializer().serializeToString($('#mark'));
  document.head.append(el('link', {rel: 'icon',
    href: 'data:image/svg+xml,' + encodeURIComponent(picture)}));
  isDark.addEventListener('change', applyTheme);
  addEventListener('beforeunload', event => { if (isDirty()) event.preventDefault(); });
  applyTheme();
  while (!session.state) {
    try { session = await api('session'); } catch (error) {
      await new Promise(done => dialog({title: 'iflow2api', gate: true, onclose: done,
        body: el('p', {text: errorText(error)}), actions: [[t('retry'), 'primary']]}));
    }
  }
  applyTheme();
  if (session.state === 'new') await firstPassword();
  else if (session.state !== 'signed_in') await signIn();
  const {next} = await api('overview').catch(() => ({}));
  if (session.state === 'new' || !location.hash && next) history.replaceState(null, '', '#guide');
  frame();
  $('#app').hidden = false;
  addEventListener('hashchange', go);
  document.addEventListener('visibilitychange', live.follow);
  live.on('state', showConnection);
  live.on('config', followConfig);
  live.start();
  await go();
}
"""

#: The views overview and usage: state, figures, live requests, the chart.
# language=JavaScript
_JS_OVERVIEW = r"""
const statusBadge = ({status}) => badge(status === 499 ? t('status_left') : String(status || DASH),
  {200: 'ok', 499: '', 429: 'warn'}[status] ?? 'bad');
const tile = (label, figure, below) => el('div', {class: 'card tile'},
  el('div', {class: 'muted', text: label}), el('div', {class: 'figure'}, figure), hint(below));
const problems = list => list && list.length > 0 && el('div', {class: 'note warn', role: 'status'},
  el('strong', {text: t('problems')}),
  el('ul', {class: 'plain'}, list.map(line => el('li', foreign(line)))));
/** `limits`: {rpm: {used, limit}, \u2026}. */
const isBudget = name => name.startsWith('budget');
const limitLines = limits => Object.entries(limits).map(([name, {used, limit}]) =>
  el('div', {class: 'limit'}, el('span', {text: t('limit_' + name)}),
    el('meter', {value: used, max: limit, high: limit * 0.99, 'aria-hidden': 'true'}),
    el('span', {class: 'num', text: [used, limit].map(amount =>
      isBudget(name) ? fmt.cost(amount) : fmt.tokens(amount)).join(' / ')})));
/** `item`: a provider of /health or of the list of providers. */
function healthBadge(item, resting) {
  const states = {open: 'health_rests', 'half-open': 'health_tried'};
  if (!item.usable) return badge(t('health_disabled'), 'bad');
  if (states[item.circuit]) return badge(t(states[item.circuit]), 'warn');
  return resting ? badge(t('health_keys_rest', {n: resting}), 'warn') : badge(t('health_ok'), 'ok');
}
const DURATION = ['duration', item => fmt.seconds(item.total_s), 'end'];
function requestDialog(item) {
  const tokens = (n, key, part) =>
    fmt.number(n) + (part ? DOT + t(key, {n: fmt.number(part)}) : '');
  const {request_id: id, model, target, key, error, stream} = item;
  dialog({title: t('request_details'), wide: true, body: [facts({
    time: moment(item.at, {dateStyle: 'medium', timeStyle: 'medium'}), request_id: mono(id), model,
    target, key, status: statusBadge(item), error,
    dialect: item.dialect + (stream ? DOT + t('streamed') : ''),
    first_token: stream && fmt.seconds(item.first_s), duration: fmt.seconds(item.total_s),
    tokens_in: tokens(item.input, 'of_cached', item.cached),
    tokens_out: tokens(item.output, 'of_reasoning', item.reasoning),
    tokens_note: item.estimated && t('estimated')}), el('h3', {text: t('attempts')}),
  table({label: t('attempts'), rows: item.attempts, columns: [['provider'], ['model'],
    ['key', undefined, 'mono'], ['status', statusBadge], DURATION, ['error']]})]});
}
const requestTable = () => table({label: t('requests'), empty: t('requests_none'),
  open: requestDialog, columns: [
    ['time', item => fmt.time(item.at), 'num nowrap'],
    ['model', item => [foreign(item.model || DASH), item.target && item.target !== item.model &&
      el('span', {class: 'muted'}, ' \u2192 ', foreign(item.target))], 'break'],
    ['status', statusBadge],
    ['first_token', item => item.stream && fmt.seconds(item.first_s), 'end minor'], DURATION,
    ['tokens', item => item.status === 200 && (item.estimated ? '\u2248 ' : '') +
      fmt.tokens(item.input) + ' \u2192 ' + fmt.tokens(item.output), 'end'],
    ['key', undefined, 'nowrap minor'],
    ['attempts', ({attempts}) => attempts.length > 1 && String(attempts.length), 'end minor'],
    ['', item => iconButton('more', t('request_details'), () => requestDialog(item)), 'end']]});
VIEWS.overview = {needs: ['overview', 'requests?limit=200'],
draw(root, [first, {data: rows}], args, signal) {
  const [top, logins, address, limits] = [stack(), el('div'), el('div'), stack()];
  const tiles = grid('tiles'), requests = requestTable(), chart = usageChart('day', signal);
  const fields = ['model', 'target', 'key', 'status', 'error', 'request_id'];
  let word = '', last = '';
  const which = el('select', {'aria-label': t('status'), on: {change: () => draw()}}, [
    option('', t('all')), option('ok', t('only_ok')), option('bad', t('only_bad'))]);
  const draw = () => requests.update(rows.filter(item =>
    (!which.value || (item.status === 200) === (which.value === 'ok')) &&
    fields.map(name => item[name]).join(' ').toLowerCase().includes(word)).slice(0, 100));
  const providers = table({label: t('providers'),
    empty: el('a', {href: '#guide', text: t('providers_none')}), columns: [
      ['provider', item => [foreign(item.name), item.problem && hint(foreign(item.problem))]],
      ['state', item => healthBadge(item, item.keys_resting)],
      ['active_waiting', item => (item.active || 0) + (item.limit ? ' / ' + item.limit : '') +
        (item.waiting ? DOT + t('waiting', {n: item.waiting}) : ''), 'end']]});
  root.append(top, tiles, chart, grid('wide',
    card(t('providers'), link(t('manage'), '#providers', 'small quiet'), providers, logins),
    card(t('connect'), link(t('view_clients'), '#clients', 'small quiet'), address, limits)),
  card(t('requests'), row(search(t('filter'), text => { word = text; draw(); }), which), requests));
  /** These parts have links: they are redrawn only when they change, to keep the focus. */
  function showFixed({health, next, address: url, needs_key}) {
    const now = JSON.stringify([health.problems, health.logins, next, url, needs_key]);
    if (now === last) return;
    last = now;
    top.replaceChildren(problems(health.problems) || '', next ? el('div', {class: 'note spread'},
      t('guide_open_' + next), link(t('view_guide'), '#guide', 'primary')) : '');
    address.replaceChildren(facts({base_url: addressLine(url + '/v1'),
      needs_key: t(needs_key ? 'needs_key_yes' : 'needs_key_no')}));
    logins.replaceChildren(...Object.entries(health.logins || {}).filter(([, {ended}]) => ended)
      .map(([name]) => note('bad', t('login_ended', {name: clean(name)}))));
  }
  function show(data) {
    const {health, today} = data, isFine = health.status === 'healthy';
    const waiting = data.queue.reduce((sum, item) => sum + item.waiting, 0);
    showFixed(data);
    tiles.replaceChildren(
      tile(t('server'), [el('span', {class: 'dot big ' + (isFine ? 'ok' : 'warn')}),
        t(isFine ? 'healthy' : data.next ? 'not_ready' : 'degraded')],
      t('running_for', {time: fmt.span(health.uptime_s)})),
      tile(t('today'), fmt.number(today.requests),
        today.errors ? t('errors_n', {n: today.errors}) : t('errors_none')),
      tile(t('tokens_today'), [fmt.tokens(today.input),
        el('span', {class: 'muted', text: ' \u2192 '}), fmt.tokens(today.output)], t('in_out')),
      tile(t('right_now'), fmt.number(data.in_flight),
        t('waiting_n', {n: waiting, c: data.connections})));
    providers.update(health.providers.map(item =>
      ({...item, ...data.queue.find(entry => entry.provider === item.name)})));
    limits.replaceChildren(...data.limits.flatMap(({key, ...rest}) => isEmpty(rest) ? [] : [
      el('h3', foreign(key)), ...limitLines(rest)]));
  }
  show(first);
  draw();
  const later = throttle(draw, 250);
  live.on('overview', show, signal);
  live.on('request', item => {
    if (rows.some(old => old.request_id === item.request_id && old.at === item.at)) return;
    rows.unshift(item);
    rows.length = Math.min(rows.length, 300);
    later();
  }, signal);
}};

// --- tokens over time, by model

/** About four ticks from 0 to at least `max`, at 1, 2 or 5 times a power of ten. */
function niceTicks(max) {
  const top = Math.max(max, 1), power = 10 ** Math.floor(Math.log10(top / 4));
  const step = Math.max(1, [1, 2, 5, 10].find(each => each * power * 4 >= top) * power);
  return Array.from({length: Math.ceil(top / step) + 1}, (_, at) => at * step);
}
/** Stacked columns of `series`: [{name, color, values}]. */
function chartArt(labels, series, width) {
  const [height, left, top, base] = [210, 50, 8, 182], slot = (width - left) / labels.length;
  const sums = labels.map((_, at) => series.reduce((sum, each) => sum + each.values[at], 0));
  const ticks = niceTicks(Math.max(...sums)), max = ticks[ticks.length - 1];
  const y = value => base - (base - top) * value / max, feet = labels.map(() => 0);
  const words = (x, at, anchor, text) => svg('text', {x, y: at, 'text-anchor': anchor, text});
  const bar = ({name, color, values}) => values.map((value, at) => value > 0 && svg('rect', {
    class: 'series-' + color, x: left + slot * (at + 0.12), width: slot * 0.76,
    y: y(feet[at] += value), height: base - y(value)},
  svg('title', {text: `${labels[at]}${DOT}${name}: ${fmt.number(value)}`})));
  const stride = Math.ceil(labels.length / (width / 90));
  return svg('svg', {width, height, class: 'chart-art', 'aria-hidden': 'true'},
    ticks.map(value => [svg('line', {x1: left, x2: width, y1: y(value), y2: y(value)}),
      words(left - 8, y(value) + 4, 'end', fmt.tokens(value))]), series.map(bar),
    labels.map((label, at) => at % stride === 0 &&
      words(left + slot * (at + 0.5), height - 8, 'middle', label)),
    !sums.some(Boolean) && words(width / 2, height / 2, 'middle', t('chart_none')));
}
/** The models of `points`, largest first, "others" last. */
function chartSeries(points) {
  const isRest = name => name === '\u2026';
  const tokens = group => group ? group.input + group.output : 0;
  const names = [...new Set(points.flatMap(({groups}) => Object.keys(groups)))];
  const series = names.map(name => {
    const values = points.map(({groups}) => tokens(groups[name]));
    return {name, values, sum: values.reduce((sum, value) => sum + value, 0)};
  }).sort((a, b) => isRest(a.name) - isRest(b.name) || b.sum - a.sum);
  return series.map((each, at) => ({...each, color: at % 8 + 1,
    name: isRest(each.name) ? t('chart_rest') : clean(each.name) || t('none')}));
}
/** A card with the tokens of 24 hours or 30 days, drawn anew until `signal` is aborted. */
function usageChart(span, signal) {
  const art = el('div'), legend = el('ul', {class: 'chips'});
  const words = el('div', {class: 'visually-hidden'});
  const box = card(t('chart_title'), segments(t('period'), texts('chart_', ['day', 'month']),
    span, key => { span = key; again(); }), art, legend, words);
  let paintArt = () => {};
  const points = latest(() => api('series?span=' + span), signal);
  const resized = new ResizeObserver(() => paintArt());
  async function draw() {
    const found = (await points()).points, series = chartSeries(found);
    const labels = found.map(({at}) => span === 'day' ?
      moment(at, CLOCK) : moment(at + 43200, {month: 'short', day: 'numeric'}));  // the day's noon
    paintArt = () => art.replaceChildren(chartArt(labels, series, Math.max(art.clientWidth, 240)));
    paintArt();
    legend.replaceChildren(...series.map(each => el('li', {class: 'chip'},
      el('i', {class: 'chart-dot series-' + each.color}), each.name,
      el('span', {class: 'muted num', text: fmt.tokens(each.sum)}))));
    words.replaceChildren(table({label: t('chart_title'), rows: [...labels.keys()], columns: [
      ['time', at => labels[at]],
      ...series.map(each => [each.name, at => fmt.number(each.values[at])])]}));
  }
  const again = () => draw().catch(error => art.replaceChildren(note('bad', errorText(error))));
  live.on('request', throttle(again, 1500), signal);
  const timer = setInterval(again, 60000);
  signal.addEventListener('abort', () => { resized.disconnect(); clearInterval(timer); });
  resized.observe(art);
  again();
  return box;
}

// --- usage by model, key, provider or day

const usage = {days: '30', by: 'model'};             // kept while other views are shown
function usageColumns(rows) {
  const isPriced = item => !isBlank(item.cost), price = item => !isPriced(item) ? DASH :
    item.cost.toFixed(item.cost < 1 ? 4 : 2);
  const tokens = key => item => el('span', {title: fmt.number(item[key])},
    (item.estimated && /put/.test(key) ? '\u2248 ' : '') + fmt.tokens(item[key] || 0));
  const duration = key => item => fmt.seconds(item[key]);
  const figures = {requests: item => fmt.number(item.requests),
    errors: item => item.errors ? badge(fmt.number(item.errors), 'bad') : '0',
    input: tokens('input'), output: tokens('output'), cached: tokens('cached'),
    reasoning: tokens('reasoning'),
    first_s: duration('first_s'), total_s: duration('total_s'),
    ...rows.some(isPriced) ? {cost: price} : {}};
  return [[usage.by, item => item.sum ? t('usage_sum') :
    foreign(item.name || t('none'), 'mono'), 'break'],
  ...Object.entries(figures).map(([key, render]) => ['usage_' + key, render, 'end'])];
}
VIEWS.usage = {draw(root, answers, args, signal) {
  const result = stack();
  const csv = el('a', {class: 'btn', download: '', 'aria-label': t('usage_csv'), text: 'CSV'});
  const by = segments(t('usage_by'), texts('', ['model', 'key', 'provider', 'day']),
    usage.by, key => { usage.by = key; redrawn(); });
  const days = el('select', {'aria-label': t('period'), value: usage.days, on: {
    change() { usage.days = days.value; redrawn(); }}},
  ['1', '7', '30', '90', '365'].map(n => option(n, t('usage_days_' + n))));
  const ask = latest(query => api('usage?' + query), signal);
  async function draw() {
    const query = `days=${usage.days}&by=${usage.by}`;
    csv.href = BASE + 'usage.csv?' + query;
    const {rows, total, enabled, unpriced} = await ask(query);
    const columns = usageColumns(rows), hints = [rows.some(item => item.estimated) &&
      'usage_estimated', columns.length > 9 ? 'usage_cost_hint' : rows.length && 'usage_no_prices'];
    result.replaceChildren(enabled === false ? note('', t('usage_off')) : '',
      table({columns, label: t(usage.by), empty: t('usage_none'),
        rows: rows.length > 1 ? [...rows, {...total, sum: true}] : rows}),
      ...hints.filter(Boolean).map(key => hint(t(key))),
      unpriced.length ? hint(t('usage_unpriced', {names: unpriced.map(clean).join(', ')})) : '');
    result.classList.toggle('usage-sum', rows.length > 1);
  }
  root.append(usageChart('month', signal), el('section', {class: 'card'},
    el('div', {class: 'spread'}, by, row(days, csv)), result));
  const redrawn = () => draw().catch(tellError);
  redrawn();
}};
"""

#: iFlow accounts and providers: log in, add, edit, test, order, remove.
# language=JavaScript
_JS_PROVIDERS = r"""
/** Logs in to iFlow: opens its page in a new window and waits for the result. */
async function loginDialog(account = '') {
  const away = !/^(localhost|127\.|\[::1\])/.test(location.hostname);     // so is the callback
  const tab = window.open('about:blank');            // later it would be blocked as a pop-up
  const {url} = await api('oauth/start', {body: {account, paste: away}}).catch(error => {
    if (tab) tab.close();
    throw error;
  });
  if (tab) { tab.opener = null; tab.location = url; }
  const text = area('', 3, {'aria-label': t('login_paste_label'),
    placeholder: 'http://localhost:\u2026/oauth2callback?code=\u2026'});
  const word = el('p', {role: 'status', text: t('login_waiting')});
  let over = false;
  const tell = error => { box.error.textContent = error ? errorText(error) : ''; };
  const finish = () => {
    tell();
    return api('oauth/paste', {body: {text: text.value}}).then(take, tell);
  };
  const box = dialog({title: t('login_iflow'), onclose() { over = true; }, body: [
    el('p', {text: t(tab ? 'login_lead' : 'login_lead_blocked')}), word,
    row(el('a', {class: 'btn ' + (tab ? '' : 'primary'), href: url, target: '_blank',
      rel: 'noreferrer noopener', text: t('login_open')}), copyButton(url, t('login_copy'))),
    el('details', {open: away}, el('summary', {text: t('login_paste')}), stack(
      hint(t('login_paste_hint')), text, row(button(t('login_paste_go'), finish))))]});
  function take({state, message}) {
    if (state === 'waiting' || over) return;
    over = true;
    if (state === 'done') { box.close(); toast(message || t('login_done')); return redraw(); }
    word.replaceChildren(badge(t('login_failed'), 'bad'), ' ', foreign(message));
  }
  (async () => {
    while (!over) {
      await new Promise(resolve => setTimeout(resolve, 1000));
      if (!over) await api('oauth/status').then(take, tell);
    }
  })();
}
const checkLine = ({what, ok, message}) => el('li',
  badge(t('check_' + what), ok === null ? '' : ok ? 'ok' : 'bad'),
  foreign(message || t(ok ? 'check_fine' : 'check_skipped')));
/** Tests a provider, or a draft of one, and shows the checks in `place`. */
async function tryProvider(body, place) {
  place.replaceChildren(hint(t('testing')));
  try {
    const answer = await api('providers/test', {body});
    place.replaceChildren(el('ul', {class: 'checks'}, answer.checks.map(checkLine)));
    return answer;
  } catch (error) { place.textContent = ''; throw error; }
}
/** The stored keys, masked, each with a button to remove it; `indexes()` are those that stay. */
function keptKeys(keys) {
  const chips = keys.map(({masked}) => el('li', {class: 'chip mono'}, foreign(masked),
    iconButton('close', t('remove') + ' ' + clean(masked),
      event => event.currentTarget.parentNode.remove())));
  const node = el('ul', {class: 'chips'}, chips);
  return {node, indexes: () => [...chips.keys()].filter(at => chips[at].parentNode === node)};
}
/** Buttons that add models to a text area or remove them. */
const modelChips = (names, box) => names.slice(0, 60).map(name => {
  const isIn = () => lines(box.value).includes(name);
  const chip = el('button', {class: 'chip mono', type: 'button', 'aria-pressed': String(isIn()),
    on: {click() {
      const others = lines(box.value).filter(other => other !== name);
      box.value = (isIn() ? others : [...others, name]).join('\n');
      chip.setAttribute('aria-pressed', String(isIn()));
    }}}, foreign(name));
  return chip;
});
const ROADS = ['base_url', 'messages_url', 'responses_url'];
const providerFields = (draft, isNew, nothing) => [
  ['name', 'text', draft.name, {label: 'provider_name', required: true, maxlength: 64}],
  ['base_url', 'text', draft.base_url, {type: 'url', placeholder: 'https://api.example.com/v1'}],
  ['api_keys', 'list', [], {title: t(isNew ? 'api_keys' : 'api_keys_more'),
    below: t('api_keys_hint'), class: 'mono masked', placeholder: 'sk-\u2026'}],
  ['models', 'list', draft.models, {label: 'provider_models'}],
  ...ROADS.slice(1).map(name => [name, 'text', draft[name], {type: 'url'}]),
  ['kind', 'choice', draft.kind, {options: [['openai', 'OpenAI'], ['iflow', 'iFlow']]}],
  ['concurrency', 'number', draft.concurrency, {placeholder: '0'}],
  ['timeout_s', 'number', draft.timeout_s, {min: 1, step: 'any', below: t('seconds')}],
  ['proxy', 'text', draft.proxy, {placeholder: 'socks5h://127.0.0.1:1080'}],
  ['vision_model', 'text', draft.vision_model], ['headers', 'json', draft.headers, {nothing}],
  ['profile', 'json', draft.profile, {nothing}]];
/** The form of a provider, new or old. */
async function providerDialog(old, version) {
  const presets = old ? [] : (await api('presets')).data;
  const draft = old || {name: '', base_url: '', keys: [], models: [], kind: 'openai'};
  const kept = keptKeys(draft.keys), ask = form(providerFields(draft, !old,
    old ? null : undefined));                  // null removes the old value
  const found = el('div', {class: 'chips'}), result = el('div', {role: 'status'});
  const {name, base_url: url, api_keys: keys, models, nodes: [, , , , ...more]} = ask;
  const offer = names => found.replaceChildren(...modelChips(names, models.control));
  const preset = field('preset', 'choice', '', {options: [['', t('preset_none')],
    ...presets.map(item => [item.name, pick(item.title) + DOT + t('paid_' + item.paid_by)])]});
  const about = hint();
  preset.control.addEventListener('change', () => {
    const chosen = presets.find(item => item.name === preset.read());
    about.replaceChildren();
    if (!chosen) return;
    about.append(chosen.roads.join(', '), ' ', chosen.key_page && el('a', {href: chosen.key_page,
      target: '_blank', rel: 'noopener', text: t('get_key')}));
    const names = chosen.models.map(item => item.id);
    name.control.value = chosen.name;
    for (const road of ROADS) ask[road].control.value = chosen[road] || '';
    models.control.value = names.join('\n');
    offer(names);
  });
  const read = () => {
    const given = ask.values(), names = lines(given.models.join());
    for (const item of ['proxy', 'vision_model']) given[item] = given[item] || null;
    return {...given,
      preset: preset.read() || undefined, models: old || names.length ? names : undefined,
      api_keys: [...kept.indexes().map(keep => ({keep})), ...lines(given.api_keys.join())]};
  };
  formDialog({title: old ? t('provider_edit', {name: clean(old.name)}) : t('provider_add'), ask,
    wide: true, body: [!old && [preset, about], grid('', name, url),
      draft.keys.length > 0 && el('div', {class: 'field'}, t('api_keys'), kept.node),
      keys, models, found, result,
      el('details', el('summary', {text: t('more_options')}), grid('', more))],
    actions: [[t('test'), '', async () => {
      try {
        offer((await tryProvider({...read(), ...old && {name: old.name}}, result)).models || []);
      } catch (error) { ask.blame(error); }
      return false;
    }]],
    async save() {
      const path = 'providers' + (old ? '/' + encodeURIComponent(old.name) : '');
      await api(path, {method: old ? 'PUT' : 'POST', body: {version, ...read()}});
      toast(t('saved'));
      redraw();
    }});
}
const keyChip = key => el('span', {class: 'chip mono'}, foreign(key.masked), key.state !== 'ok' &&
  (key.state === 'resting' ? badge(t('key_rests', {time: fmt.span(key.rest_s)}), 'warn') :
    badge(t('key_refused'), 'bad')));
function providerCard(item, list, own) {
  const result = el('div', {role: 'status'}), at = own.indexOf(item.name);
  const more = item.models.length - 12;
  const arrow = (step, image) => {
    const key = item.name + step;
    return iconButton(image, t('move_' + image), async () => {
      const names = own.filter(name => name !== item.name);
      names.splice(at + step, 0, item.name);
      await api('providers/order', {body: {version: list.version, names}});
      await redraw(key, item.name + -step);
    }, {disabled: !(at + step in own), data: {move: key, key}});
  };
  const tools = row(button(t('test'), () => tryProvider({name: item.name}, result), 'small'),
    at >= 0 && [button(t('edit'), () => providerDialog(item, list.version), 'small'),
      own.length > 1 && [arrow(-1, 'up'), arrow(1, 'down')],
      removal(t('provider_remove', {name: item.name}), 'providers/', item.name)]);
  return el('section', {class: 'card', 'aria-label': clean(item.name)},
    el('div', {class: 'spread'}, row(el('h2', foreign(item.name)),
      healthBadge(item, item.keys.filter(key => key.state !== 'ok').length),
      item.name === list.default_provider && badge(t('default'))), tools),
    item.problem && note('bad', foreign(item.problem)),
    hint(ROADS.map(name => item[name] && [mono(item[name]), DOT]),
      item.concurrency ? t('at_once', {n: item.concurrency}) : t('at_once_any'),
      item.source !== 'file' && DOT + t('source_' + item.source)),
    facts({api_keys: item.keys.length ? el('div', {class: 'chips'}, item.keys.map(keyChip)) :
      t('none'),
    provider_models: item.models.length > 0 && el('div', {class: 'chips'},
      item.models.slice(0, 12).map(name => el('span', {class: 'chip mono'}, foreign(name))),
      more > 0 && badge('+' + more)),
    proxy: item.proxy, vision_model: item.vision_model}), result);
}
function accountsCard(logins) {
  const begin = () => {
    if (!logins.length) return loginDialog();
    formDialog({title: t('login_iflow'), label: t('login_begin'), ask: form([['name', 'text', '',
      {label: 'account_name', placeholder: 'work', maxlength: 64}]]),
    save: ({name}) => loginDialog(name)});
  };
  const state = item => item.ended ? badge(t('login_over'), 'bad') : item.refresh_ok === false ?
    badge(t('refresh_failed'), 'warn') : badge(t('logged_in'), 'ok');
  const isDefault = item => item.account === 'default';
  return card(t('iflow_accounts'), button(t(logins.length ? 'login_another' : 'login_iflow'), begin,
    logins.length ? '' : 'primary'),
  !logins.length ? el('p', {class: 'muted', text: t('iflow_lead')}) :
    table({label: t('accounts'), rows: logins, columns: [
      ['account', item => isDefault(item) ? t('account_default') : item.account],
      ['state', item => [state(item), item.message && hint(foreign(item.message))]],
      ['expires', item => item.expires_at && fmt.ago(item.expires_at)],
      ['refreshed', item => item.refreshed_at && fmt.ago(item.refreshed_at)],
      ['', item => row(item.ended && button(t('login_again'),
        () => loginDialog(isDefault(item) ? '' : item.account), 'small'),
      removal(t('log_out_sure', {name: item.account}), 'logins/', item.account, t('log_out'))),
      'end']]}));
}
VIEWS.providers = {needs: ['providers', 'logins'], draw(root, [list, logins]) {
  const own = list.data.filter(item => item.source === 'file').map(item => item.name);
  root.append(accountsCard(logins.data),
    el('div', {class: 'spread'}, el('h2', {text: t('providers')}),
      button(t('provider_add'), () => providerDialog(null, list.version), 'primary')),
    own.length > 1 ? hint(t('order_hint')) : '',
    ...list.data.map(item => providerCard(item, list, own)),
    list.data.length ? '' : el('div', {class: 'card empty', text: t('providers_empty')}));
}};
"""

#: Models, aliases and fallbacks, and the route of a name.
# language=JavaScript
_JS_MODELS = r"""
/** An alias in a line: `name -> model, model`, or JSON after the arrow where it has conditions. */
const aliasLine = ([name, value]) => name + ' -> ' + ([value].flat().every(item =>
  typeof item === 'string') ? [value].flat().join(', ') : JSON.stringify(value));
function readAliases(text) {
  const pairs = text.split('\n').filter(line => line.trim()).map(line => {
    const [name, ...rest] = line.split('->'), value = rest.join('->').trim(), names = lines(value);
    if (!name.trim() || !value) throw new Error(t('alias_bad', {text: line.trim()}));
    return [name.trim(), /^[[{]/.test(value) ? parseJson(value) :
      names.length === 1 ? names[0] : names];
  });
  return Object.fromEntries(pairs);
}
const chainList = chain => el('ol', {class: 'checks'}, chain.map((item, at) => el('li',
  el('span', {class: 'muted', text: at ? t('else_then') : '\u2192'}), el('div',
    foreign(item.provider + ' / ' + item.model, 'mono'), ' ',
    (!item.usable || item.circuit === 'open') && healthBadge(item),
    item.problem && hint(foreign(item.problem))))));
/** Explains a route with the aliases as typed in the form; `later()` asks again. */
function routeCard(aliases) {
  const answer = el('div', {'aria-live': 'polite', class: 'stack'});
  const ask = form([
    ['model', 'text', 'claude-sonnet-4-5', {label: 'where_label', list: 'model-names',
      class: 'mono'}],
    ['dialect', 'choice', 'chat', {options: ['chat', 'messages', 'responses']}],
    ['tokens', 'number', '', {label: 'where_tokens', placeholder: '0'}],
    ...['images', 'thinking', 'tools'].map(name =>
      [name, 'check', false, {label: 'with_' + name}])]);
  const explain = latest(async () => {
    const given = ask.values();
    try {
      const {steps, chain} = await api('routes/explain', {body: {...given, aliases: aliases(),
        model: given.model || undefined, tokens: given.tokens || 0}});
      return [chain.length ? chainList(chain) : '',
        el('ul', {class: 'plain hint'}, steps.map(step => el('li', foreign(step))))];
    } catch (error) {
      return [error.status === 403 ?
        note('', el('a', {href: '#guide', text: t('providers_none')})) :
        note('bad', errorText(error))];
    }
  });
  const later = throttle(async () => answer.replaceChildren(...await explain()), 300);
  const [model, ...more] = ask.nodes;
  for (const node of ask.nodes) node.addEventListener('input', later);
  return Object.assign(card(t('where'), null, stack(model,
    el('details', el('summary', {text: t('where_more')}), grid('small', more)), answer)), {later});
}
function modelTable({data, default_model: usual}) {
  const rows = table({label: t('models'), empty: t('models_none'), columns: [
      ['model', item => [mono(item.id), ' ', item.alias && badge(t('alias')),
        item.id === usual && badge(t('default'), 'ok')]],
      ['provider'], ['context_size', item => item.context && fmt.tokens(item.context), 'end'],
      ['max_output', item => item.max_output && fmt.tokens(item.max_output), 'end'],
      ['vision', item => item.vision && badge(t('takes_images'), 'ok')],
      ['', item => row(copyButton(item.id),
        link(t('try'), '#playground/' + encodeURIComponent(item.id), 'small')), 'end']]});
  const draw = word => rows.update(data.filter(item =>
    (item.id + ' ' + item.provider).toLowerCase().includes(word)));
  draw('');
  return card(t('models'), search(t('filter'), draw), rows);
}
const modelNames = models => el('datalist', {id: 'model-names'},
  models.map(item => option(item.id)));
const settingOf = (config, name) => (config.settings.find(item => item.name === name) || {}).value;
VIEWS.models = {needs: ['models', 'config'], draw(root, [models, config]) {
  const usual = settingOf(config, 'default_model') || '';
  const first = Object.entries(settingOf(config, 'aliases') || {}).map(aliasLine);
  const ask = form([
    ['aliases', 'list', first, {rows: Math.max(4, first.length + 1),
      placeholder: 'claude-* -> glm-5, deepseek/deepseek-chat'}],
    ['default_model', 'text', usual, {list: 'model-names', class: 'mono',
      placeholder: models.default_model}]]);
  const aliases = () => readAliases(ask.aliases.read().join('\n'));
  const isRouted = () => ask.aliases.read().join('\n') !== first.join('\n');
  const isChanged = () => isRouted() || ask.default_model.read() !== usual;
  const save = button(t('save'), () => {
    const name = ask.default_model.read(), set = isRouted() ? {aliases: aliases()} : {};
    if (name && name !== usual) set.default_model = name;
    return patchConfig(config.version, set, !name && usual ? ['default_model'] : []);
  }, 'primary');
  const route = routeCard(aliases);
  const changed = () => { save.disabled = !isChanged(); route.later(); };
  for (const node of ask.nodes) node.addEventListener('input', changed);
  root.append(modelNames(models.data), grid('wide', card(t('routes'), save, stack(ask.nodes)),
    route), modelTable(models));
  changed();
  guard(isChanged);
}};
"""

#: The settings form, built from the settings' metadata.
# language=JavaScript
_JS_SETTINGS = r"""
const shownValue = value => typeof value === 'boolean' ? t(value ? 'on' : 'off') : isEmpty(value) ?
  t('empty') : typeof value === 'string' ? value : JSON.stringify(value);
/** The arguments of `field` for a setting: kind, value, options. */
function settingField({kind, value, choices, low, high, secret, set}) {
  if (choices) return ['choice', value, {options: choices.map(name =>
    [name, name || t('automatic')])}];
  if (secret) return ['text', '', {class: 'mono masked', placeholder: set ? value : t('empty')}];
  if (kind === 'list' && value.every(entry => typeof entry === 'string'))
    return ['list', value, {placeholder: t('one_a_line')}];
  if (kind === 'list' || kind === 'dict')
    return ['json', value, {nothing: kind === 'list' ? [] : {}}];
  if (kind === 'bool' || kind === 'str') return [kind === 'bool' ? 'check' : 'text', value, {}];
  return ['number', value, {min: low, max: high, step: kind === 'int' ? 1 : 'any', required: true}];
}
/** Why a setting can't be changed here, if so. */
function lockOf({file_only, origin, flag, name}) {
  if (file_only) return t('by_file_only');
  if (origin === 'flag') return t('from_flag', {name: flag || '--\u2026'});
  return origin === 'environment' &&
    t('from_environment', {name: 'IFLOW2API_' + name.toUpperCase()});
}
/** One setting of the form; calls `changed()` at each change. */
function settingPart(item, changed) {
  const [kind, value, props] = settingField(item), locked = lockOf(item);
  const [, unit] = item.name.match(/_(s|bytes|days)$/) || [], usual = shownValue(item.default);
  const title = [pick(item.label), unit && el('span', {class: 'muted',
    text: ` (${t('unit_' + unit)})`}), ' ',
  item.origin !== 'default' && badge(t('origin_' + item.origin)), ' ',
  item.restart && badge(t('needs_restart'), 'warn')];
  const below = [item.hint && el('div', {text: pick(item.hint)}), mono(item.name),
    locked ? DOT + locked : !item.secret && !isEmpty(item.default) &&
      [DOT + t('default') + ' ', mono(usual.length > 60 ? '\u2026' : usual)]];
  const box = field(item.name, kind, value, {title, below, disabled: Boolean(locked), ...props});
  const {control} = box;
  let first, isCleared = false;
  const text = () => kind === 'check' ? control.checked : control.value;
  const part = {item, box, isCleared: () => isCleared,
    isChanged: () => isCleared || text() !== first};
  const reset = item.origin === 'file' && !locked && button(t('to_default'), () => {
    if (kind === 'check') control.checked = item.default;
    else control.value = typeof item.default === 'object' ? '' : item.default;
    isCleared = true;
    control.focus();
    changed();
  }, 'small quiet');
  first = text();
  control.addEventListener('input', () => { isCleared = false; changed(); });
  const words = [item.name, ...[item.label, item.hint || {}].flatMap(Object.values)].join(' ');
  part.node = el('div', {class: 'setting', data: {words: words.toLowerCase()}}, box, reset);
  return part;
}
VIEWS.settings = {needs: ['config'], draw(root, [config]) {
  const elsewhere = ['providers', 'client_keys', 'accounts', 'admin_password', 'aliases'];
  const count = el('span', {class: 'muted', role: 'status'}), groups = {};
  const bar = el('div', {class: 'savebar'}, count,
    row(button(t('discard'), () => redraw(), 'quiet'), button(t('save'), save, 'primary')));
  const parts = config.settings.filter(item => !elsewhere.includes(item.name) &&
    !(item.older && item.origin === 'default')).map(item => settingPart(item, tell));
  const changes = () => parts.filter(part => part.isChanged());
  function tell() {
    bar.hidden = !changes().length;
    count.textContent = t('changes_n', {n: changes().length});
  }
  for (const {item, node} of parts) (groups[item.group] = groups[item.group] || []).push(node);
  const cards = Object.entries(groups).map(([name, nodes]) => card(t('group_' + name), null,
    el('div', {class: 'settings'}, nodes)));
  const none = el('div', {class: 'card empty', hidden: true, text: t('nothing_found')});
  function applyFilter(word) {
    for (const {node} of parts) node.hidden = !node.dataset.words.includes(word);
    for (const each of cards) each.hidden = !each.querySelector('.setting:not([hidden])');
    none.hidden = cards.some(each => !each.hidden);
  }
  async function save() {
    const set = {}, list = changes();
    for (const {item, box, isCleared} of list) {
      if (isCleared()) continue;
      if (!box.control.checkValidity()) return;
      try { set[item.name] = box.read(); } catch { return; }     // the field shows why
    }
    const unset = list.filter(part => part.isCleared()).map(({item}) => item.name);
    const said = list.some(({item}) => item.restart) ? 'saved_restart' : 'saved';
    try { await patchConfig(config.version, set, unset, said); } catch (error) {
      const part = parts.find(({item}) => item.name === error.param.split('.')[0]);
      if (!part) throw error;
      applyFilter('');
      part.box.fail(errorText(error));
    }
  }
  root.append(el('div', {class: 'spread'}, hint(t('settings_path') + ' ', mono(config.path)),
    search(t('settings_search'), applyFilter)), problems(config.problems) || '', ...cards,
  none, bar);
  tell();
  guard(() => changes().length > 0);
}};
"""

#: Client keys and limits; instances; about; the log.
# language=JavaScript
_JS_KEYS = r"""
const LIMITS = ['rpm', 'rph', 'rpd', 'tpd', 'concurrency'];
const KEY_LIMITS = [...LIMITS, 'budget_day', 'budget_month'];
const limitFields = (names, given = {}) => names.map(name => [name, 'number', given[name],
  {label: 'limit_' + name, placeholder: t('unlimited'), ...isBudget(name) && {step: 'any'}}]);
const setLimits = values => Object.fromEntries(KEY_LIMITS.map(name => [name, values[name]])
  .filter(([, value]) => value > 0));
const day = date => moment(date, {dateStyle: 'medium',
  timeZone: String(date).length === 10 ? 'UTC' : undefined});
function keyDialog(version) {
  const ask = form([
    ['name', 'text', '', {label: 'key_name', required: true, maxlength: 64, placeholder: 'laptop',
      pattern: '[^\\s,\\/]+'}],
    ['expires', 'date', '', {below: t('key_expires_hint'),
      min: new Date().toISOString().slice(0, 10)}],
    ['models', 'text', '', {label: 'key_models', class: 'mono',
      placeholder: 'glm-*, deepseek-chat'}], ...limitFields(KEY_LIMITS)]);
  const {name, expires, models, nodes: [, , , ...limits]} = ask;
  formDialog({title: t('key_add'), label: t('key_create'), wide: true, ask, body: [
    grid('', name, expires), models, el('h3', {text: t('limits')}), grid('small', limits)],
  async save(given) {
    const made = await api('keys', {body: {version, name: given.name, models: lines(given.models),
      ...setLimits(given), expires: given.expires || undefined}});
    dialog({title: t('key_new', {name: clean(made.name)}), gate: true, onclose: () => redraw(),
      actions: [[t('key_kept'), 'primary']], body: [el('p', {text: t('key_once')}),
        el('pre', {id: 'new-key', text: made.key}),
        row(copyButton(made.key, t('key_copy')))]});
  }});
}
VIEWS.keys = {needs: ['keys', 'config'], draw(root, [list, config]) {
  const limitsOf = item => Object.fromEntries(Object.entries(item.limits).map(([name, limit]) =>
    [name, {used: (item.used || {})[name] || 0, limit}]));
  const keys = table({label: t('keys'), rows: list.data, empty: t('keys_none'), columns: [
    ['key_name', item => [foreign(item.name), ' ', item.expired && badge(t('expired'), 'bad')]],
    ['key_models', item => item.models.length ? mono(item.models.join(', ')) : t('all_models')],
    ['limits', item => isEmpty(item.limits) ? t('unlimited') :
      stack(limitLines(limitsOf(item)))],
    ['created', item => day(item.created)],
    ['expires', item => item.expires ? day(item.expires) : t('never')],
    ['', item => removal(t('key_remove', {name: item.name}), 'keys/', item.name), 'end']]});
  const ask = form(limitFields(LIMITS, list.address_limits)), now = () => setLimits(ask.values());
  const first = JSON.stringify(now());
  const save = button(t('save'), () => ask.nodes.every(node => node.control.checkValidity()) &&
    patchConfig(config.version, isEmpty(now()) ? {} : {address_limits: now()},
      isEmpty(now()) ? ['address_limits'] : []));
  root.append(note('', t(list.needs_key ? list.data.length || list.custom_api_key ? 'keys_needed' :
    'keys_missing' : 'keys_open')),
  card(t('keys'), button(t('key_add'), () => keyDialog(list.version), 'primary'), keys),
  list.custom_api_key ? card(t('custom_key'), link(t('view_settings'), '#settings', 'small quiet'),
    el('p', mono(list.custom_api_key), ' ', hint(t('custom_key_hint')))) : '',
  card(t('address_limits'), save, stack(hint(t('address_limits_hint')),
    grid('small', ask.nodes))));
  guard(() => JSON.stringify(now()) !== first);
}};
VIEWS.instances = {needs: ['instances'], draw(root, [{data}]) {
  root.append(card(t('instances'), null, table({label: t('instances'), rows: data, columns: [
    ['name', item => [foreign(item.name), ' ', item.this && badge(t('this_one'), 'ok')]],
    ['address', item => addressLine(item.url)], ['version'],
    ['started', item => fmt.date(item.started_at)]]}), hint(t('instances_hint'))));
}};
VIEWS.about = {needs: ['about'], draw(root, [about]) {
  root.append(card('iflow2api ' + about.version, null, facts({Python: about.python,
    platform: about.platform, executable: mono(about.executable), PID: about.pid,
    started: fmt.date(about.started_at) + DOT + t('running_for', {time: fmt.span(about.uptime_s)}),
    memory: about.memory_bytes && (about.memory_bytes / (1 << 20)).toFixed(1) + ' MiB',
    threads: about.threads, ...Object.fromEntries(Object.entries(about.paths)
      .map(([name, text]) => ['path_' + name, mono(text)]))})),
  card(t('diagnostics'), copyButton(about.diagnostics), stack(hint(t('diagnostics_hint')),
    el('pre', {tabindex: '0', 'aria-label': t('diagnostics')}, foreign(about.diagnostics)))),
  card(t('documents'), null, row(['docs', 'redoc', 'openapi.json', 'metrics', 'health'].map(name =>
    el('a', {class: 'btn', href: '/' + name, target: '_blank', rel: 'noopener',
      text: '/' + name})))));
}};

// --- the log, live

const LOG_KEPT = 2000, LEVELS = ['debug', 'info', 'warning', 'error'];
/** The newest log lines, each cut to one line; a click unfolds one, Enter unfolds all. */
VIEWS.logs = {needs: ['logs?level=debug&limit=10000'], draw(root, [{data: first}], args, signal) {
  let waiting = [], last = null, isFollowing = true, word = '', asked = 0;
  const level = el('select',
    {'aria-label': t('log_level'), value: 'info', on: {change: () => applyFilter()}},
    LEVELS.map(name => option(name, t('level_' + name))));
  const total = el('span', {class: 'hint num'});
  const none = el('p', {class: 'empty', text: t('logs_none')});
  const newest = button(t('logs_newest'), () => { isFollowing = true; draw(); pane.focus(); },
    'small primary log-newest');
  const pane = el('div', {class: 'log-pane', tabindex: '0', role: 'log', 'aria-live': 'off',
    'aria-label': t('view_logs'), on: {
      scroll() {
        isFollowing = pane.scrollTop + pane.clientHeight >= pane.scrollHeight - 30;
        ask();
      },
      click({target}) {
        const node = target.closest('.log-line');
        if (node && !String(getSelection())) node.classList.toggle('open');
      },
      keydown({key}) { if (key === 'Enter') pane.classList.toggle('wrap'); }}});
  function line(item) {
    const node = el('div', {class: 'log-line', data: {level: item.level}},
      el('span', {class: 'muted', text: fmt.time(item.at)}),
      el('span', {class: 'level', text: item.level}), foreign(item.text));
    node.item = item;
    show(node);
    return node;
  }
  function show(node) {
    const {level: own, text, logger} = node.item;
    node.hidden = LEVELS.indexOf(own) < LEVELS.indexOf(level.value) ||
      !(text + ' ' + logger).toLowerCase().includes(word);
  }
  function draw() {
    asked = 0;
    pane.append(...waiting.slice(-LOG_KEPT).map(line));
    waiting = [];
    while (pane.children.length > LOG_KEPT) pane.firstChild.remove();
    const count = pane.querySelectorAll('.log-line:not([hidden])').length;
    if (isFollowing) pane.scrollTop = pane.scrollHeight;
    [newest.hidden, none.hidden] = [isFollowing, count > 0];
    total.textContent = t('logs_count', {n: fmt.number(count)});
  }
  const ask = () => { asked = asked || requestAnimationFrame(draw); };
  function applyFilter() {
    isFollowing = true;
    for (const node of pane.children) show(node);
    ask();
  }
  function add(item) {
    if (last && item.id <= last.id && item.at <= last.at) return;      // a new server counts from 1
    waiting.push(last = item);
    ask();
  }
  const more = async () => (await api('logs?level=debug&limit=10000')).data.forEach(add);
  live.on('log', add, signal);
  live.on('dropped', more, signal);
  signal.addEventListener('abort', () => live.logs(false));
  live.logs(true);
  root.append(row(level, search(t('logs_search'), text => { word = text; applyFilter(); }), total,
    el('a', {class: 'btn', href: BASE + 'logs.txt', download: 'iflow2api.log',
      text: t('download')})), el('div', {class: 'log-box'}, pane, none, newest));
  first.forEach(add);
}};
"""

#: The lines of each client, and the first start in three steps.
# language=JavaScript
_JS_CLIENTS = r"""
const setup = {client: '', model: '',
  shell: /Win/.test(navigator.platform) ? 'powershell' : 'bash'};
const SHELLS = {bash: 'macOS \u00b7 Linux', fish: 'fish', powershell: 'PowerShell', cmd: 'cmd'};
/** The lines of one client: those for a shell first, with a choice of the shell. */
function clientBlocks(blocks, again) {
  const shells = blocks.filter(block => SHELLS[block.language]);
  const chosen = shells.find(block => block.language === setup.shell) || shells[0];
  const choices = Object.fromEntries(shells.map(({language}) => [language, SHELLS[language]]));
  return [shells.length > 1 && segments(t('clients_shell'), choices, chosen.language,
    language => { setup.shell = language; again(); }),
  chosen && [hint(t('clients_window')), codeBlock(t('clients_terminal'), chosen.text)],
  blocks.filter(block => !shells.includes(block))
    .map(block => codeBlock(block.title, block.text))];
}
/** A choice of the client, and its lines below: {node, ask(model)}. */
function clientSetup() {
  const box = stack(), which = field('client', 'choice', '', {options: []}), {control} = which;
  const blocks = latest(model => api('clients?model=' + encodeURIComponent(model || '')));
  let found = null;
  control.addEventListener('change', () => { setup.client = which.read(); draw(); });
  function draw() {
    const client = found.data.find(item => item.id === setup.client) || found.data[0];
    control.replaceChildren(...found.data.map(item => option(item.id, item.title)));
    control.value = client.id;
    box.replaceChildren(...stack(clientBlocks(client.blocks, draw), found.needs_key ?
      note('', t('clients_key') + ' ', el('a', {href: '#keys', text: t('view_keys')})) :
      hint(t('clients_no_key'))).childNodes);
  }
  return {node: stack(which, box), async ask(model) {
    try { found = await blocks(model); } catch (error) { return tellError(error); }
    draw();
  }};
}
VIEWS.clients = {needs: ['models'], draw(root, [models], [wanted]) {
  setup.client = wanted || setup.client;
  const shownLines = clientSetup(), url = session.base_url + '/v1';
  const model = field('model', 'text', setup.model, {class: 'mono', list: 'model-names',
    placeholder: models.default_model});
  const ask = () => { setup.model = model.read(); shownLines.ask(setup.model); };
  model.addEventListener('input', throttle(ask, 300));
  root.append(modelNames(models.data), card(t('view_clients'), null, stack(
    facts({base_url: addressLine(url)}), hint(t('clients_other')), model, shownLines.node)));
  ask();
}};
/** The first start in three steps. */
VIEWS.guide = {needs: ['providers', 'models', 'config'], draw(root, [list, models, config]) {
  const step = (n, done, ...body) => el('li', {class: 'card step' + (done ? ' done' : '')},
    el('span', {class: 'step-n', 'aria-hidden': 'true', text: done ? '\u2713' : String(n)}),
    el('div', {class: 'stack grow'}, el('h2', t('guide_' + n),
      done && el('span', {class: 'visually-hidden', text: ' \u2013 ' + t('done')})),
    el('p', {class: 'muted', text: t(`guide_${n}_lead`)}), body));
  const usable = list.data.filter(item => item.usable).map(item => item.name);
  const has = usable.length > 0;
  const usual = settingOf(config, 'default_model') || models.default_model || '';
  const names = models.data.filter(item => !item.alias && usable.includes(item.provider))
    .map(item => item.id);
  const result = el('div', {role: 'status'});
  const one = step(1, has, has && el('ul', {class: 'chips'}, usable.map(name => el('li',
    {class: 'chip'}, el('span', {class: 'dot ok'}), foreign(name),
    button(t('test'), () => tryProvider({name}, result), 'small quiet')))), result,
  row(button(t('login_iflow'), () => loginDialog(), has ? '' : 'primary'),
    button(t('provider_add'), () => providerDialog(null, list.version))));
  const model = names.length ? field('model', 'choice', usual || names[0], {options: [...new Set(
    [usual, ...names])].filter(Boolean).map(name => [name, clean(name)])}) :
    field('model', 'text', usual, {class: 'mono'});
  const keep = button(t('guide_2_keep'), () => patchConfig(config.version,
    {default_model: model.read()}));
  const shownLines = clientSetup();
  function offer() {
    keep.disabled = models.default_model === model.read() || !model.read();
    keep.classList.toggle('primary', has && !keep.disabled);
    shownLines.ask(model.read());
  }
  model.addEventListener('input', throttle(offer, 100));
  root.append(el('p', {class: 'muted', text: t('guide_lead')}), el('ol', {class: 'steps'}, one,
    step(2, has && Boolean(models.default_model), el('div', {class: 'row bottom'}, model, keep,
      link(t('guide_2_more'), '#models', 'quiet'))),
    step(3, false, shownLines.node, row(link(t('guide_try'), '#playground')))));
  offer();
}};
"""

#: The playground: one chat by the Chat API.
# language=JavaScript
_JS_PLAY = r"""
/** The conversation by the Chat API; kept while other views are shown. */
const talk = {model: '', stream: true, messages: [], images: [], draft: '', nodes: []};
/** The JSON of each record of a stream of server-sent events, without [DONE]. */
async function* recordsOf(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  for (let rest = '', done = false; !done;) {
    const piece = await reader.read();
    done = piece.done;
    const found = (rest + decoder.decode(piece.value, {stream: !done})).split(/\r?\n/);
    rest = found.pop();
    for (const line of found) if (/^data: ?\{/.test(line)) yield JSON.parse(line.slice(5));
  }
}
const asCurl = body => `curl -N ${session.base_url}/v1/chat/completions \\\n` +
  "  -H 'Authorization: Bearer YOUR_KEY' -H 'Content-Type: application/json' -d @- <<'EOF'\n" +
  JSON.stringify(body) + '\nEOF\n';
const thumb = (url, tools) => el('span', {class: 'play-thumb'},
  el('img', {src: url, alt: t('play_image')}), tools);
/** The node of an answer that grows: {node, take(delta), end(word)}. */
function answerNode() {
  const thought = el('div', {class: 'play-text muted'}), text = el('div', {class: 'play-text'});
  const fold = el('details', {class: 'play-fold', hidden: true},
    el('summary', {text: t('play_thought')}), thought);
  const foot = el('p', {class: 'hint', role: 'status', text: t('play_waiting')});
  return {node: stack(fold, text, foot), text: '', thought: '',
    take(delta) {
      this.thought += delta.reasoning_content || delta.reasoning || '';
      this.text += delta.content || '';
      for (const call of delta.tool_calls || []) this.text += JSON.stringify(call.function);
      fold.hidden = !this.thought;
      thought.textContent = clean(this.thought);
      text.textContent = clean(this.text);
    },
    end(word) { foot.replaceChildren(word); }};
}
/** Shows an answer as it comes; returns model, times and tokens in words. */
async function answerTalk(answer, body, signal) {
  const began = performance.now(), elapsed = () => (performance.now() - began) / 1000;
  let first, usage, finish;
  const take = chunk => {
    if (chunk.error) throw new ApiError(0, chunk);
    const [choice] = chunk.choices || [];
    usage = chunk.usage || usage;
    if (!choice) return;
    finish = choice.finish_reason || finish;
    answer.take(choice.delta || choice.message || {});
    if (answer.text || answer.thought) first = first || elapsed();
  };
  const response = await request('play/chat', {body, signal});
  if (body.stream) for await (const record of recordsOf(response)) take(record);
  else take(await response.json());
  if (!finish) throw new Error(t('play_cut'));
  return [clean(body.model), body.stream && first && t('play_first', {time: fmt.seconds(first)}),
    t('play_total', {time: fmt.seconds(elapsed())}), usage && t('play_tokens', {
      input: fmt.number(usage.prompt_tokens), output: fmt.number(usage.completion_tokens)})]
    .filter(Boolean).join(DOT);
}
const readFile = file => new Promise((done, failed) => {
  const reader = new FileReader();
  Object.assign(reader, {onload: () => done(reader.result), onerror: () => failed(reader.error)});
  reader.readAsDataURL(file);
});
VIEWS.playground = {needs: ['models'], draw(root, [models], [wanted]) {
  const log = el('div', {class: 'play-log', tabindex: '0', role: 'log',
    'aria-label': t('play_log')}), thumbs = row();
  const send = el('button', {class: 'btn primary', type: 'submit'});
  const model = input({list: 'model-names', class: 'mono grow', 'aria-label': t('model'),
    placeholder: models.default_model || t('model'),
    value: wanted || talk.model || models.default_model || ''});
  const stream = field('stream', 'check', talk.stream, {label: 'play_stream'});
  const text = el('textarea', {rows: 2, 'aria-label': t('play_message'), value: talk.draft,
    placeholder: t('play_placeholder'), on: {
      input() { talk.draft = text.value; },
      paste({clipboardData}) { attach(clipboardData.files); },
      keydown(event) {
        if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        submit();
      }}});
  const file = el('input', {type: 'file', accept: 'image/*', multiple: true, hidden: true, on: {
    change() { attach(file.files); file.value = ''; }}});
  const isAsking = () => Boolean(talk.draft.trim() || talk.images.length);
  const user = () => ({role: 'user', content: talk.images.length ? [
    ...talk.draft ? [{type: 'text', text: talk.draft}] : [],
    ...talk.images.map(url => ({type: 'image_url', image_url: {url}}))] : talk.draft});
  const body = () => ({model: model.value.trim(), stream: stream.read(),
    messages: [...talk.messages, ...isAsking() ? [user()] : []],
    ...stream.read() ? {stream_options: {include_usage: true}} : {}});
  async function attach(files) {
    for (const each of files) {
      if (!/^image\//.test(each.type) || each.size > 15e6)
        toast(t('play_image_bad', {name: each.name}), 'bad');
      else talk.images.push(await readFile(each));
    }
    draw();
  }
  function draw() {
    thumbs.replaceChildren(...talk.images.map((url, at) => thumb(url, iconButton('close',
      t('play_remove_image'), () => { talk.images.splice(at, 1); draw(); }))));
    log.replaceChildren(...talk.nodes.length ? talk.nodes :
      [el('p', {class: 'empty', text: t('play_start')})]);
    log.scrollTop = log.scrollHeight;
    send.textContent = t(talk.running ? 'play_stop' : 'play_send');
  }
  async function submit() {
    if (talk.running) return talk.running.abort();
    if (!isAsking()) return;
    if (!model.value.trim()) return toast(t('play_no_model'), 'bad');
    const answer = answerNode(), sent = body(), {draft, images} = talk;
    talk.nodes.push(el('div', {class: 'play-user'}, foreign(draft, 'play-text'),
      images.map(url => thumb(url))), answer.node);
    Object.assign(talk, {draft: '', images: [], running: new AbortController(),
      model: sent.model, stream: sent.stream});
    text.value = '';
    draw();
    const follow = setInterval(() => { log.scrollTop = log.scrollHeight; }, 200);
    try {
      answer.end(await answerTalk(answer, sent, talk.running.signal));
    } catch (error) {
      answer.end(error.name === 'AbortError' ? t('play_stopped') :
        el('span', {class: 'error', role: 'alert', text: errorText(error)}));
    }
    clearInterval(follow);
    talk.running = null;
    if (answer.text) talk.messages = [...sent.messages, {role: 'assistant', content: answer.text}];
    else {                               // to be sent again
      if (!talk.draft) Object.assign(talk, {draft, images});
      text.value = talk.draft;
    }
    draw();
  }
  const showCurl = () => { dialog({title: 'curl', wide: true,
    body: [hint(t('play_curl_hint')), codeBlock('bash', asCurl(body()))]}); };
  const clear = () => { Object.assign(talk, {messages: [], nodes: []}); draw(); text.focus(); };
  root.append(modelNames(models.data), el('section', {class: 'card play'},
    row(model, stream, button(t('play_curl'), showCurl, 'small'),
      button(t('play_clear'), clear, 'small')), log,
    el('form', {class: 'play-composer', on: {submit(event) { event.preventDefault(); submit(); }}},
      thumbs, text, el('div', {class: 'spread'},
        button(t('play_attach'), () => file.click(), 'quiet small'), file, send))));
  draw();
  if (!matchMedia('(pointer: coarse)').matches) text.focus();
}};
"""

#: What the page says: `key = Chinese = English`, several in a line with ` | ` between.  `{name}` is
#: filled in, `{n:line|lines}` is chosen by number.  The command line uses it as well.
PAGE_TEXTS = """
# the frame, signing in, what every view says
lang = 中文 = EN | lang_label = 切换到中文 = EN: switch to English
skip = 跳到内容 = Skip to the content | nav = 导航 = Navigation | nav_use = 使用 = Use
nav_setup = 配置 = Set up | nav_system = 系统 = System | view_guide = 快速开始 = Get started
view_overview = 概览 = Overview | view_playground = 试一试 = Playground
view_providers = 账号与上游 = Accounts & providers | view_models = 模型与路由 = Models & routes
view_keys = 密钥与限额 = Keys & limits | view_usage = 用量 = Usage | view_instances = 实例 = Instances
view_settings = 设置 = Settings | view_logs = 日志 = Logs | view_clients = 接入客户端 = Client setup
view_about = 关于 = About | theme = 主题：{now}，点击切换为{next} = Theme: {now}. Switch to {next}
theme_system = 跟随系统 = system | theme_light = 浅色 = light | theme_dark = 深色 = dark
account = 账号 = Account | sign_in = 登录 = Sign in | sign_out = 退出登录 = Sign out
sign_out_everywhere = 在所有设备上退出 = Sign out everywhere
sign_in_lead = 输入管理密码，用户名是 admin。 = Enter the admin password. The user is admin.
sign_in_again = 登录已过期。重新登录后可以接着做，已填写的内容都还在。 = Your session has ended. Sign in to go on; \
everything you typed is still here.
sign_in_wrong = 密码不对。忘记了？在服务器上运行 admin reset-password。 = That password is wrong. Forgotten? Run \
admin reset-password on the server.
sign_in_slow = 尝试太频繁，请在 {time} 后再试。 = Too many attempts. Try again in {time}.
password = 密码 = Password | password_new = 新密码 = New password
password_repeat = 再输一次 = Repeat the password | password_new_hint = 至少 8 个字符 = At least 8 characters
password_differ = 两次输入的密码不一致 = The two passwords differ | password_current = 当前密码 = Current password
password_change = 修改密码 = Change password
password_others_end = 其他设备上的登录会随之失效。 = You will be signed out on other devices.
password_changed = 密码已修改 = Password changed | setup_title = 欢迎使用 iflow2api = Welcome to iflow2api
setup_lead = 先给这个管理页面设一个密码，只需一次。 = First, set a password for this page. You do this once.
setup_code = 一次性代码 = One-time code
setup_code_hint = 启动 iflow2api 的终端窗口里印着它 = It is printed in the terminal where iflow2api was started
setup_go = 设置密码并继续 = Set the password and continue | live_on = 实时 = Live
live_off = 正在重新连接… = Reconnecting… | error_status = 服务器返回了 {status} = The server answered {status}
error_offline = 连不上 iflow2api，它可能已停止 = iflow2api does not answer; it may have stopped
error_page = 页面出错：{text} = The page failed: {text} | retry = 重试 = Try again | reload = 重新载入 = Reload
loading = 加载中… = Loading… | nothing = 暂无内容 = Nothing here yet | actions = 操作 = Actions
copy = 复制 = Copy | copied = 已复制 = Copied
copy_failed = 浏览器不允许复制，请手动选中复制 = The browser does not allow copying; select the text instead
close = 关闭 = Close | cancel = 取消 = Cancel | save = 保存 = Save | remove = 删除 = Remove
confirm = 请确认 = Please confirm | discard = 放弃更改 = Discard changes
unsaved_title = 有未保存的更改 = Unsaved changes | unsaved = 离开后这些更改会丢失。 = They will be lost if you leave.
invalid_missing = 请填写此项 = This is needed | invalid = 这个值不对 = This value does not fit
# overview
problems = 需要留意 = Needs attention | status_left = 已断开 = client left | server = 服务 = Server
healthy = 正常 = Healthy | degraded = 异常 = Degraded | not_ready = 待配置 = Not set up
running_for = 已运行 {time} = up for {time} | today = 今日请求 = Requests today
errors_n = {n} 次失败 = {n} failed | errors_none = 没有失败 = none failed
tokens_today = 今日 token = Tokens today | in_out = 输入 → 输出 = in → out | right_now = 进行中 = In flight
waiting_n = {n} 个排队 · {c} 个连接 = {n} waiting · {c} {c:connection|connections}
waiting = {n} 个排队 = {n} waiting | address = 地址 = Address | base_url = 接口地址 = Base URL
needs_key = 客户端密钥 = Client key | needs_key_yes = 需要 = required
needs_key_no = 不需要（仅限本机访问） = not needed (this machine only) | connect = 连接 = Connect
manage = 管理 = Manage | filter = 筛选… = Filter… | all = 全部 = All | only_ok = 成功 = Succeeded
only_bad = 失败 = Failed | requests = 最近请求 = Recent requests
requests_none = 还没有请求。把客户端指向上面的接口地址，请求会实时出现在这里。 = No requests yet. Point a client at the base \
URL above and they appear here as they happen.
request_details = 请求详情 = Request details | request_id = 请求 ID = Request ID | time = 时间 = Time
model = 模型 = Model | target = 发往 = Sent to | dialect = 协议 = Dialect | streamed = 流式 = streamed
key = 密钥 = Key | status = 状态 = Status | error = 错误 = Error | first_token = 首字 = First token
duration = 耗时 = Duration | tokens = token = Tokens | tokens_in = 输入 token = Tokens in
tokens_out = 输出 token = Tokens out | of_cached = 缓存命中 {n} = {n} cached
of_reasoning = 其中思考 {n} = {n} reasoning | tokens_note = 说明 = Note
estimated = 上游没有报告用量，此为估算 = Estimated: the upstream reported no usage | attempts = 尝试 = Attempts
state = 状态 = State | active_waiting = 占用 = In use | health_ok = 可用 = usable
health_disabled = 不可用 = disabled | health_rests = 暂停中 = resting | health_tried = 试探中 = being tried
health_keys_rest = {n} 个密钥暂停 = {n} {n:key|keys} resting
# first start
guide_lead = 三步，从零到能用。 = Three steps, from nothing to a working client.
guide_1 = 接入模型服务 = Connect to a model service
guide_1_lead = 登录 iFlow 账号，或者添加任何兼容 OpenAI 的服务商。两个都用也可以。 = Log in to iFlow, or add any \
OpenAI-compatible provider. You can have both.
guide_2 = 选择默认模型 = Pick the default model
guide_2_lead = 客户端没有指定模型，或使用自己的模型名（如 claude-*、gpt-*）时，就用它。 = It answers when a client names no \
model, or one of its own such as claude-* or gpt-*.
guide_2_keep = 设为默认 = Make it the default | guide_2_more = 别名与备用模型 = Aliases and fallbacks
guide_3 = 配置你的客户端 = Set up your client
guide_3_lead = 选择客户端，复制下面的内容。 = Choose your client and copy these lines.
guide_try = 先在网页里试一试 = Try it here first
guide_open_login_or_provider = 还没有可用的模型服务。 = No model service is connected yet.
guide_open_models = 还没有选定默认模型。 = No default model is chosen yet.
guide_open_client = 一切就绪，只差客户端。 = All is ready; only a client is missing. | client = 客户端 = Client
done = 已完成 = done
# accounts and providers
iflow_accounts = iFlow 账号 = iFlow accounts | accounts = 账号 = Accounts
iflow_lead = 登录后，iFlow 的模型就能直接使用，令牌会自动续期。 = After logging in, iFlow's models are ready to use, \
and the token renews itself.
login_iflow = 登录 iFlow = Log in to iFlow | login_another = 添加账号 = Add an account
login_begin = 去登录 = Go to the login | account_name = 账号名称 = Name of the account
account_name_hint = 自己取名，便于区分；留空则替换默认账号 = Yours to choose; empty replaces the default account
account_default = 默认 = Default
login_lead = iFlow 的登录页已在新窗口打开，请在那里完成登录。 = iFlow's login page has opened in a new window. Finish \
there.
login_lead_blocked = 浏览器拦截了新窗口，请点下面的按钮打开登录页。 = The browser blocked the new window. Open the \
login page with the button below.
login_waiting = 等待登录完成… = Waiting for the login… | login_open = 打开登录页 = Open the login page
login_copy = 复制地址 = Copy the address
login_paste = 最后停在打不开的页面？ = Did it end on a page that does not load?
login_paste_hint = 把那个页面的完整地址（或其中的 code）粘贴到这里。 = Paste the full address of that page here, or \
the code in it.
login_paste_label = 回跳地址 = Address it ended on | login_paste_go = 完成登录 = Finish the login
login_done = 登录成功 = Logged in | login_failed = 登录失败 = Login failed | login_over = 已失效 = ended
login_again = 重新登录 = Log in again | logged_in = 已登录 = logged in
login_ended = iFlow 账号 {name} 的登录已失效，请重新登录。 = The iFlow login {name} has ended. Log in again.
refresh_failed = 续期失败 = renewal failed | refreshed = 上次续期 = Renewed | log_out = 退出 = Log out
log_out_sure = 退出 iFlow 账号 {name}？它的令牌会从本机删除。 = Log out of the iFlow account {name}? Its tokens \
are removed from this machine.
provider = 上游 = Provider | providers = 上游 = Providers
providers_none = 还没有上游，从这里开始 = No provider yet. Start here
providers_empty = 还没有上游。登录 iFlow，或添加一个。 = No provider yet. Log in to iFlow or add one.
provider_add = 添加上游 = Add a provider | provider_edit = 编辑 {name} = Edit {name}
provider_name = 名称 = Name
provider_name_hint = 客户端可用“名称/模型”指定这个上游 = Clients can ask for name/model to get this one
provider_models = 模型 = Models
provider_models_hint = 每行一个。请求这些模型时会发到这里；点“测试”可获取列表。 = One per line. Requests for these models \
come here; Test fetches the list.
provider_remove = 删除上游 {name}？它的密钥也会一并删除。 = Remove the provider {name}? Its keys are removed \
with it.
preset = 服务商 = Service | preset_none = 自定义 = Custom
preset_hint = 选一个常见服务商，地址和兼容选项会自动填好 = Choose a common one and its address and options are filled in
paid_plan = 包月 = subscription | paid_use = 按量付费 = metered | paid_nothing = 本地 = local
get_key = 获取密钥 = Get a key
messages_url = Messages 地址 = Messages address | responses_url = Responses 地址 = Responses address
api_keys = API 密钥 = API keys | api_keys_more = 再加密钥 = More API keys
api_keys_hint = 每行一个；多个密钥轮流使用。本地引擎可留空。 = One per line; several take turns. Local engines need none.
kind = 类型 = Kind | concurrency = 并发上限 = Requests at once | concurrency_hint = 0 为不限 = 0: no limit
timeout_s = 超时 = Timeout | seconds = 秒 = Seconds | proxy = 代理 = Proxy
proxy_hint = 留空则按全局设置 = Empty: the one in the settings | vision_model = 识图模型 = Vision model
vision_model_hint = 带图片的请求改用它 = Takes requests with images | headers = 附加请求头 = Extra headers
headers_hint = JSON，例如 {"X-Team": "blue"} = JSON, such as {"X-Team": "blue"}
profile = 兼容选项 = Profile | profile_hint = JSON；一般由服务商预设填好 = JSON; the presets fill it in
more_options = 更多选项 = More options
order_hint = 同名模型由排在前面的上游提供。 = Where several list the same model, the first one gets it.
move_up = 上移 = Move up | move_down = 下移 = Move down | test = 测试 = Test
testing = 正在发送真实的小请求… = Sending small real requests… | edit = 编辑 = Edit | saved = 已保存 = Saved
check_reach = 连接 = Connection | check_key = 密钥 = Key | check_model = 模型 = Model
check_fine = 正常 = ok | check_skipped = 未测试 = not tested | check_stream = 流式 = Stream
check_tools = 工具 = Tools | key_rests = 暂停 {time} = rests {time} | key_refused = 被拒绝 = refused
none = 无 = none | unlimited = 不限 = no limit | at_once = 并发 {n} = {n} at once
at_once_any = 并发不限 = any number at once
source_flag = 命令行参数 = command-line flag
source_detected = 自动发现的本地引擎 = local engine, found by itself | source_login = iFlow 登录 = iFlow login
bad_json = JSON 有误：{text} = Not valid JSON: {text}
# models and routes
models = 模型 = Models | models_none = 没有模型 = No models | context_size = 上下文 = Context
max_output = 最大输出 = Max output | vision = 识图 = Vision | takes_images = 图片 = images | try = 试一试 = Try
alias = 别名 = alias | aliases = 别名 = Aliases | routes = 别名与备用 = Aliases and fallbacks
alias_bad = 每行写“名字 -> 模型”：{text} = Write name -> model in each line: {text}
aliases_hint = 每行一条“名字 -> 模型”：名字由客户端使用（可含 *），模型依次尝试，用逗号分隔；从上往下第一个匹配的生效。需要按条件分流时，箭头后写 JSON。 = \
One per line, name -> model: a name that clients use, * allowed; then the models to try in order, \
separated by commas. The first line that matches counts. For conditions, write JSON.
default_model = 默认模型 = Default model
default_model_hint = 请求没有指定模型，或用了 claude-*、gpt-* 等别家的名字时使用 = For requests without a model, or \
with a foreign name such as claude-* or gpt-*
where = 请求会去哪里？ = Where does a request go? | where_label = 客户端请求的模型 = Model a client asks for
where_more = 请求的条件 = Conditions of the request | where_tokens = 输入 token = Input tokens
with_images = 含图片 = Images | with_thinking = 开启思考 = Thinking | with_tools = 带工具 = Tools
else_then = 失败则 = else
# keys and limits
keys = 客户端密钥 = Client keys | keys_none = 还没有客户端密钥 = No client keys yet
keys_open = 现在不需要密钥，只有本机可以访问。添加第一个密钥后，所有请求都要带密钥。 = No key is needed now, and only this machine \
has access. Once there is a key, every request needs one.
keys_needed = 所有请求都要带上下面的一个密钥。 = Every request must carry one of these keys.
keys_missing = 现在所有请求都会被拒绝：其他机器能访问这个地址，所以必须有密钥。请添加一个。 = Every request is refused now: others \
reach this address, so a key is needed. Add one.
key_add = 添加密钥 = Add a key | key_create = 生成密钥 = Create the key | key_name = 名称 = Name
key_name_hint = 给谁或什么用的；不能含空格、逗号和斜杠 = Who or what it is for; no spaces, commas or slashes
key_models = 可用模型 = Models
key_models_hint = 用逗号分隔，可含 *；留空为全部 = Separated by commas, * allowed. Empty: all models
all_models = 全部 = all | key_expires_hint = 当天结束时失效；留空则长期有效 = At the end of that day. Empty: never
key_new = {name} 的新密钥 = New key for {name}
key_once = 请现在复制：只保存了它的摘要，以后无法再次显示。 = Copy it now: only its hash is kept, so it can't be shown \
again.
key_copy = 复制密钥 = Copy the key | key_kept = 我已保存 = I have saved it
key_remove = 删除密钥 {name}？使用它的客户端会立即失去访问权限。 = Remove the key {name}? Clients that use it lose \
access at once.
custom_key = 固定密钥 = Fixed key | custom_key_hint = 设置项 custom_api_key = the setting custom_api_key
expired = 已过期 = expired | expires = 到期 = Expires | created = 创建于 = Created | never = 永不 = never
limits = 限额 = Limits | limit_rpm = 每分钟请求 = Requests / minute | limit_rph = 每小时请求 = Requests / hour
limit_rpd = 每天请求 = Requests / day | limit_tpd = 每天 token = Tokens / day
limit_budget_day = 每日预算 = Budget / day | limit_budget_month = 30 天预算 = Budget / 30 days
limit_concurrency = 并发 = At once | address_limits = 每个地址的限额 = Limits per address
address_limits_hint = 对每个客户端 IP 分别计算，与密钥无关。 = Counted for each client address, whatever its key.
# instances, about
instances = 实例 = Instances
instances_hint = 这个服务单独运行。要再开一个，请用另外的 --port 和 --config-dir 启动 iflow2api。 = This server runs on \
its own. To run another one, start iflow2api with a --port and --config-dir of its own.
name = 名称 = Name | this_one = 当前 = this one | version = 版本 = Version | started = 启动于 = Started
platform = 平台 = Platform | executable = 解释器 = Executable | memory = 内存 = Memory
threads = 线程 = Threads | path_program = 程序 = Program
path_iflow = iFlow CLI 设置 = iFlow CLI settings | path_config = 配置文件 = Configuration
path_usage = 用量记录 = Usage records | path_log = 日志文件 = Log file | diagnostics = 诊断信息 = Diagnostics
diagnostics_hint = 反馈问题时请附上，其中不含密钥。 = For bug reports. There are no secrets in it.
documents = 接口文档 = API documents
# settings
settings_search = 搜索设置… = Search settings… | nothing_found = 没有匹配的设置 = No setting matches
settings_path = 保存在 = Kept in | group_server = 服务 = Server
group_upstream = 上游与路由 = Upstreams and routes | group_clients = 客户端与访问 = Clients and access
group_iflow = iFlow = iFlow | group_logs = 日志与用量 = Logs and usage
group_appearance = 界面 = Appearance | unit_s = 秒 = seconds | unit_bytes = 字节 = bytes
unit_days = 天 = days | automatic = 自动 = automatic | one_a_line = 每行一个 = One per line
empty = 空 = empty | on = 开启 = on | off = 关闭 = off | default = 默认 = default
to_default = 恢复默认 = Use the default | origin_file = 已修改 = changed
origin_environment = 环境变量 = environment | origin_flag = 命令行 = flag
from_flag = 由命令行参数 {name} 指定，此处不能修改 = Given by the flag {name}; it can't be changed here
from_environment = 由环境变量 {name} 指定，此处不能修改 = Given by the variable {name}; it can't be changed here
address_changed = 已保存的密钥和请求头不会发往另一个地址，请重新填写。 = Stored keys and headers are not sent to \
another address. Enter them again.
by_file_only = 只能用命令行（config set）或在 config.json 中修改 = Set by the command line (config set) or in \
config.json only
needs_restart = 需重启 = needs restart | changes_n = {n} 项未保存 = {n} unsaved {n:change|changes}
saved_restart = 已保存，重启后生效 = Saved; some of it takes effect after a restart
conflict = 配置已在别处被修改。你填写的内容还在；重新载入可看到新的配置。 = The configuration was changed elsewhere. What you \
typed is still here; reload to see the new one.
# logs
logs_search = 搜索日志… = Search the log… | log_level = 级别 = Level
level_debug = 调试及以上 = Debug and above | level_info = 信息及以上 = Info and above
level_warning = 警告及以上 = Warnings and errors | level_error = 仅错误 = Errors only
logs_newest = 回到最新 = Newest
logs_count = {n} 行 = {n} lines | logs_none = 没有匹配的日志 = No line matches | download = 下载 = Download
# playground
play_clear = 清空 = Clear
play_start = 选一个模型，说点什么。可以粘贴图片。 = Choose a model and say something. Images can be pasted.
play_message = 消息 = Message
play_placeholder = 输入消息。回车发送，Shift+回车换行 = Your message. Enter sends, Shift+Enter makes a new line
play_attach = 图片 = Image | play_image = 附带的图片 = Attached image
play_remove_image = 移除图片 = Remove the image | play_send = 发送 = Send | play_stop = 停止 = Stop
play_no_model = 请先选一个模型 = Choose a model first | play_waiting = 等待回答… = Waiting for the answer…
play_thought = 思考过程 = Thoughts | play_stopped = 已停止 = Stopped
play_cut = 回答中途断开，没有正常结束 = The answer broke off before its end
play_first = 首字 {time} = first token {time} | play_total = 共 {time} = total {time}
play_tokens = 输入 {input}，输出 {output} token = {input} in, {output} out | play_stream = 流式 = Stream
play_curl_hint = 把 YOUR_KEY 换成你的客户端密钥 = Put your client key for YOUR_KEY
play_log = 对话 = Conversation
play_image_bad = {name}：只能附带 15 MB 以内的图片 = {name}: only images of at most 15 MB can be attached
play_curl = 转为 curl = As curl
# chart and usage
chart_title = token 用量 = Tokens | period = 时间范围 = Period | chart_day = 24 小时 = 24 hours
chart_month = 30 天 = 30 days | chart_rest = 其他 = others
chart_none = 这段时间没有请求 = No requests in this period | usage_csv = 下载 CSV = Download CSV
usage_days_1 = 今天 = Today | usage_days_7 = 最近 7 天 = Last 7 days
usage_days_30 = 最近 30 天 = Last 30 days | usage_days_90 = 最近 90 天 = Last 90 days
usage_days_365 = 最近一年 = Last year | usage_by = 分组 = Grouped by | day = 日期 = Day
usage_requests = 请求 = Requests | usage_errors = 失败 = Errors | usage_input = 输入 = Input
usage_output = 输出 = Output | usage_cached = 缓存命中 = Cached | usage_reasoning = 思考 = Thinking
usage_first_s = 平均首字 = First token | usage_total_s = 平均耗时 = Duration | usage_cost = 费用 = Cost
usage_sum = 合计 = Total | usage_none = 这段时间没有用量 = Nothing was used in this period
usage_off = 用量记录已在设置里关闭。 = Usage is not recorded: it is off in the settings.
usage_estimated = ≈ 表示含估算：上游没有返回 token 数。 = ≈ includes estimates: the provider did not report \
its tokens.
usage_cost_hint = 费用按设置里的价格（每百万 token）算出，币种与价格一致。 = Costs come from the prices in the settings \
(per million tokens), in the same currency.
usage_unpriced = 没有价格，不计费用也不计入预算：{names} = without a price, so neither cost nor budgets have \
them: {names}
usage_no_prices = 在设置里填上价格，就能看到费用。 = Set prices in the settings to see costs here.
# clients
clients_shell = 系统或终端 = System or shell
clients_key = 把 YOUR_KEY 换成你的客户端密钥，可在这里创建： = Put your client key for YOUR_KEY. Create one under
clients_no_key = 不需要密钥，里面的占位密钥照抄即可。 = No key is needed: leave the one in there as it is.
clients_terminal = 在终端里运行 = In a terminal
clients_window = 只对当前终端窗口有效，请接着在同一个窗口里操作。 = It holds for this terminal window only: start the \
client in the same one.
clients_other = 其他程序：填入上面的接口地址、密钥和模型即可。 = Any other program: give it the base URL above, a key \
and a model.
"""


@lru_cache(2)
def texts_of(table: str) -> Dict[str, List[str]]:
    """A table such as PAGE_TEXTS as key -> [Chinese, English]."""
    lines = [line for line in table.strip().split("\n") if not line.startswith("#")]
    entries = [entry.split(" = ") for line in lines for entry in line.split(" | ")]
    return {key: pair for key, *pair in entries}


def fill_in(text: str, facts: Mapping[str, Any]) -> str:
    """A text of such a table with its facts, as the page's `t` does it."""
    def value(found: re.Match) -> str:
        name, one, many = found.groups()
        if one is None:
            return f"{facts[name]:g}" if isinstance(facts[name], float) else str(facts[name])
        return one if facts[name] == 1 else many

    return re.sub(r"\{(\w+)(?::([^|}]*)\|([^}]*))?\}", value, text)


@lru_cache(1)
def page_script() -> str:
    """The script of all views without indents and without comments on lines of their own."""
    parts = (_JS_CORE, _JS_OVERVIEW, _JS_PROVIDERS, _JS_MODELS, _JS_SETTINGS, _JS_KEYS,
             _JS_CLIENTS, _JS_PLAY)
    script = "".join(("(() => {\n'use strict';", *parts, "start();\n})();"))
    return re.sub(r"^(?: *(?://.*|/\*\*(?:(?!\*/)[\s\S])*\*/)?\n| +)", "", script, flags=re.M)


@lru_cache(1)
def admin_page() -> Tuple[bytes, str]:
    """The page, and its policy, which admits its own style and script alone."""
    texts = json.dumps(texts_of(PAGE_TEXTS), ensure_ascii=False, separators=(",", ":"))
    parts = {"CSS": PAGE_CSS, "JS": page_script(), "TEXTS": texts.replace("</", "<\\/")}
    body = re.sub("@(CSS|JS|TEXTS)@", lambda found: parts[found.group(1)], PAGE_HTML).encode()
    style, script = (base64.b64encode(sha256(parts[name])).decode()
                     for name in ("CSS", "JS"))
    return body, ("default-src 'none'; connect-src 'self'; img-src 'self' data:; "
                  f"style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
                  "form-action 'none'; base-uri 'none'; frame-ancestors 'none'")


def show_page(handler: Handler) -> None:
    """GET /admin: the page, which has no data in it; the API asks for the session."""
    body, policy = admin_page()
    handler.respond_static(body, "text/html; charset=utf-8",
                           (("Content-Security-Policy", policy), ("X-Frame-Options", "DENY")))


add_routes({"GET /admin": Route(show_page, public=True)})


# === 20. Demo upstream =======================================================
#
# A small upstream built in: `--demo` runs the program against it, without account or network.

#: demo-text takes no images, to show how those are handled; any other model name is answered, too.
DEMO_MODELS: Tuple[Json, ...] = (
    {"id": "demo", "context": 131072, "max_output": 16384, "vision": True},
    {"id": "demo-vision", "context": 131072, "max_output": 16384, "vision": True},
    {"id": "demo-text", "context": 32768, "max_output": 4096, "vision": False})

#: What it says: in English, in Chinese.
_DEMO_SAYS = {
    "thought": ("Let me see. I was asked: “{}”. ", "问题是：“{}”。"),
    "result": ("The tool answered: {}", "工具返回：{}"),
    "images": ("Images that I got: {}.", "收到了 {} 张图片。"),
    "text": ("This is the demo model built into iflow2api: no account, no network. You said: “{}”. "
             "For a real model: python iflow2api.py provider add zhipu",
             "这是 iflow2api 内置的演示模型，不需要账号，也不联网。您说：“{}”。"
             "接入真正的模型：python iflow2api.py provider add zhipu")}

#: Words in names of tools that only read: the demo calls such a tool first.
_READS = ("get", "list", "read", "search", "find", "look", "fetch", "glob", "grep", "view",
          "weather")

#: Harmless arguments, by name, else by type.
_DEMO_VALUES: Json = {"command": "echo hello from the demo", "path": ".", "file_path": "README.md",
                      "pattern": "*", "city": "Paris", "location": "Paris", "integer": 1,
                      "number": 1, "boolean": False, "array": [], "object": {}}


def demo_pieces(text: str) -> List[str]:
    """`text` as a model would stream it: words, or single Chinese characters."""
    return re.findall("[\u2e80-\uffff]|[^\\s\u2e80-\uffff]+\\s*|\\s+", text)


def _demo_texts(message: Json) -> List[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [
        part["text"] for part in content or () if part.get("text")]


def _demo_call(body: Json, fresh: List[Json], asked: str) -> Optional[Json]:
    """The tool to call, once in a conversation: the one that tool_choice names, else one named in
    `asked`, else one that reads, else the first."""
    choice = body.get("tool_choice")
    known = {tool["function"]["name"]: tool["function"].get("parameters") or {}
             for tool in body.get("tools") or ()}
    demanded = choice["function"]["name"] if isinstance(choice, dict) else ""
    looked_at = fresh if demanded or choice == "required" else body["messages"]
    if not known or choice == "none" or any(message["role"] == "tool" for message in looked_at):
        return None
    name = min(known, key=lambda name: (name != demanded, name.lower() not in asked.lower(),
                                        not any(word in name.lower() for word in _READS)))
    schemas = known[name].get("properties") or {}
    arguments = {}
    for field in known[name].get("required") or list(schemas)[:1]:
        schema = schemas.get(field) or {}
        kind = schema.get("type", "string")
        usual = _DEMO_VALUES.get(field if kind == "string" else str(kind), "demo")
        arguments[field] = (schema.get("enum") or [usual])[0]
    return {"id": new_id("call_"), "type": "function", "function": {
        "name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}


def _demo_thinks(body: Json) -> bool:
    template = body.get("chat_template_kwargs") or {}
    return not (body.get("reasoning_effort") == "none"
                or (body.get("thinking") or {}).get("type") == "disabled"
                or False in (body.get("enable_thinking"), template.get("enable_thinking")))


def demo_message(body: Json) -> Tuple[Json, str]:
    """The message and its finish reason: it thinks, calls an offered tool once, and repeats the
    tool's result, the number of images or the question."""
    messages = body["messages"]
    spoken = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    fresh = messages[spoken[-1] + 1:] if spoken else messages         # since its last answer
    asked = next((text for message in reversed(messages) if message["role"] == "user"
                  for text in _demo_texts(message)[-1:]), "")
    call = _demo_call(body, fresh, asked)
    facts = {"result": "\n".join(one_line(" ".join(_demo_texts(message)), 400)
                                 for message in fresh if message["role"] == "tool"),
             "images": sum(part["type"] == "image_url" for message in fresh
                           if isinstance(message["content"], list) for part in message["content"]),
             "text": one_line(asked, 200)}
    says = {key: pair[bool(re.search("[\u3400-\u9fff]", asked))] for key, pair in
            _DEMO_SAYS.items()}
    kind = next((key for key, fact in facts.items() if fact), "text")
    thought = demo_pieces(says["thought"].format(facts["text"])) if _demo_thinks(body) else []
    said = demo_pieces(says[kind].format(facts[kind]))
    if (body.get("response_format") or {}).get("type", "text") != "text":
        said = ['{"answer": "demo"}']
    finish, most = "stop", body.get("max_completion_tokens") or body.get("max_tokens") or 1 << 20
    if call:
        said, finish = [], "tool_calls"
    elif len(thought) + len(said) > most:        # a short limit leaves room for some of the answer
        thought, finish = thought[:most // 2], "length"
        said = said[:most - len(thought)]
    return {"role": "assistant", "content": "".join(said) or None,
            **({"reasoning_content": "".join(thought)} if thought else {}),
            **({"tool_calls": [call]} if call else {})}, finish


def demo_completion(body: Json, created: int) -> Json:
    """The plain answer."""
    message, finish = demo_message(body)
    given = len(dump_json(body["messages"])) // 4
    thought = len(demo_pieces(message.get("reasoning_content", "")))
    made = (thought + len(demo_pieces(message["content"] or ""))
            + len(dump_json(message.get("tool_calls", ""))) // 4)
    usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made,
             "completion_tokens_details": {"reasoning_tokens": thought}}
    return {"id": new_id("chatcmpl-"), "object": "chat.completion", "created": created,
            "model": body.get("model"), "usage": usage,
            "choices": [{"index": 0, "message": message, "finish_reason": finish}]}


def demo_chunks(body: Json, whole: Json) -> Iterator[Json]:
    """The plain answer as a stream of chunks; with usage where it was asked for."""
    choice, base = whole["choices"][0], {**whole, "object": "chat.completion.chunk"}
    message, usage = choice["message"], base.pop("usage")
    deltas: List[Json] = [{"role": "assistant", "content": ""}]
    for field in ("reasoning_content", "content"):
        deltas += [{field: piece} for piece in demo_pieces(message.get(field) or "")]
    for call in message.get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        head = {**call, "index": 0, "function": {"name": name, "arguments": ""}}
        deltas += [{"tool_calls": [piece]} for piece in (head, *(
            {"index": 0, "function": {"arguments": arguments[at:at + 12]}}
            for at in range(0, len(arguments), 12)))]
    for delta, finish in (*((delta, None) for delta in deltas), ({}, choice["finish_reason"])):
        yield {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**base, "choices": [], "usage": usage}


class DemoUpstream(Listener):
    """A small OpenAI-compatible server on a loopback port.

    `pace_s` passes between two pieces of a stream, `first_s` before an answer.
    """
    request_queue_size = 128

    def __init__(self, pace_s: float = 0.03, first_s: float = 0.3) -> None:
        self.pace_s, self.first_s, self.closing = pace_s, first_s, threading.Event()
        super().__init__(("127.0.0.1", 0), _DemoHandler)
        self.base_url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, name="demo", daemon=True).start()

    def settings(self) -> Json:
        """Settings that route everything to it, whatever config.json says."""
        entry = {"name": "demo", "base_url": self.base_url, "models": list(DEMO_MODELS)}
        return {"providers": [entry], "aliases": {}, "default_provider": "demo",
                "default_model": "demo", "api_key": ""}

    def answer(self, path: str, body: Optional[Json]) -> Tuple[int, Json]:
        """Status and answer of a POST, or of a GET without `body`."""
        status, problem = 404, f"the demo answers /chat/completions alone; nothing is at {path}"
        if body is None and path.endswith("/models"):
            return 200, {"object": "list", "data": [
                {"id": model["id"], "object": "model", "created": 1767225600, "owned_by": "demo"}
                for model in DEMO_MODELS]}
        if body is not None and path.endswith("/chat/completions"):
            try:
                return 200, demo_completion(body, int(time.time()))
            except (TypeError, ValueError, KeyError, AttributeError) as exc:
                status, problem = 400, f"the demo can't read this request ({one_line(exc, 80)})"
        return status, {"error": {"message": problem, "type": error_type(status), "param": None,
                                  "code": None}}

    def close(self) -> None:
        self.closing.set()               # ends streams; no other connection outlives its answer
        stop_accepting(self)


class _DemoHandler(http.server.BaseHTTPRequestHandler):
    """One connection to the demo upstream, on which our own gateway sends its requests."""
    server: DemoUpstream
    server_version, sys_version, disable_nagle_algorithm, timeout = "demo", "", True, 75

    def log_message(self, format: str, *args: Any) -> None:
        """The gateway logs these requests."""

    def do_GET(self) -> None:
        self._send(*self.server.answer(self.path, None))

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(data)
        status, value = self.server.answer(self.path, body)
        self.server.closing.wait(self.server.first_s)
        if status != 200 or body.get("stream") is not True:
            return self._send(status, value)
        self._head(200, "text/event-stream")
        for chunk in demo_chunks(body, value):
            self.wfile.write(b"data: %s\n\n" % dump_json(chunk))
            if self.server.closing.wait(self.server.pace_s):
                return
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, status: int, value: Json) -> None:
        self._head(status, "application/json")
        self.wfile.write(dump_json(value))

    def _head(self, status: int, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.end_headers()


# === 21. Command line ========================================================
#
# A command is lines of COMMAND_LINES, from which its arguments and its help are read, and a
# function in COMMANDS.

# --- what it says ------------------------------------------------------------

#: What only the command line says, in the form of PAGE_TEXTS.  Errors from above are English.
CONSOLE_TEXTS = """\
# what many say
mark_error = 错误：{text} = error: {text} | mark_warning = 警告：{text} = warning: {text}
mark_problem = 问题：{text} = problem: {text} | problem = 问题 = problem
named = {name}：{value} = {name}: {value}
see = {text}（用法：{program} {command}--help） = {text} (see: {program} {command}--help)
unknown = 没有{kind} {name} = there is no {kind} '{name}'
see_all = {text}；全部：{program} {show} = {text}; all: {program} {show}
near = {text}；您是不是要输入 {names}？ = {text}; did you mean {names}? | or = 或 = or | no_key = 无密钥 = no key
name_default = {name}（默认） = {name} (default) | disabled = {name}  已停用： = {name}  disabled:
saved_in = 已保存到 {path} = saved in {path} | gone = 已移除 {name}（{path}） = removed {name} from {path}
saved_for_later = 已保存到 {path}；下次启动时生效 = saved in {path}; it takes effect at the next start
cannot_write = 无法写入 {path}：{reason} = {path} can't be written: {reason}
no_list = config.json 中的 `{name}` 不是列表；可运行：{program} config unset {name} = `{name}` in config.json \
is not a list; `config unset {name}` removes it
# serve and its card
clients = 客户端 = clients | login = 登录 = login
page = 页面 = page | next = 下一步 = next
more = 还有 {count} 个：{program} status = {count} more: {program} status
page_code = 一次性验证码，用于设置页面密码：{code} = one-time code, to set its password: {code}
new_key = 需要密钥（因对外监听 {host} 而新生成）： = need this key, made because {host} is open to the network:
key_needed = 需要密钥 {key}（custom_api_key） = need the key {key} (custom_api_key)
a_key_needed = 需要客户端密钥（{program} key list） = need a client key ({program} key list)
no_key_needed = 本机访问无需密钥 = need no key on this machine
iflow_logged_in = iFlow 已登录 = iFlow: logged in
iflow_not_logged_in = iFlow 未登录；登录：{program} login = iFlow: not logged in; to log in: \
{program} login
next_preset = 添加一个上游： = add a provider: | next_repair = 检查上游： = see what is wrong:
next_client = 在客户端填写 {url}/v1 = point clients at {url}/v1
next_anthropic = （Anthropic 客户端填 {url}） = (Anthropic clients at {url})
stopping = 正在停止；正在进行的回答最多再等 {seconds} 秒（再按一次立即停止） = stopping; running answers get {seconds} s \
to end (again to stop at once)
cannot_listen = 无法监听 {host} 的端口 {port}：{reason} = can't listen on {host} port {port}: {reason}
port_taken = {host} 的端口 {port} 已被其他程序占用；端口 {free} 空闲：加上 --port {free} = port {port} on {host} is \
taken by another program; port {free} is free: add --port {free}
demo_alone = --demo 自带上游：请去掉 --upstream 和 --api-key = --demo brings its own upstream: leave out \
--upstream and --api-key
no_log = 无法写入日志文件 {path}：{reason}；仅在控制台输出日志 = log_file {path} can't be written: {reason}; the log \
goes to the console only
log_unset = 没有设置 log_file，日志只在控制台上。设置：{program} config set log_file iflow2api.log，然后重启 = log_file \
is not set: the log goes to the console only. To set it: {program} config set log_file \
iflow2api.log, then restart
log_missing = 还没有日志文件 {path}：{reason}；服务启动后才会写入 = no log at {path}: {reason}; it is written once \
the gateway runs
# mistakes
no_flag = {command} 没有参数 {flag} = {command} has no flag {flag}
stray = {command} 不接受多余的 {word} = {command} takes no argument '{word}'
needs_value = {flag} 需要一个值：{flag} {value} = {flag} needs a value: {flag} {value}
takes_no_value = {flag} 不带值，去掉 {value} = {flag} takes no value; leave out {value}
missing = {command} 还需要：{program} {command} {needed} = {command} needs more: {program} {command} \
{needed}
needs = {command} 需要 {what}：{program} {command} {what} = {command} needs a {what}: {program} \
{command} {what} | command = 命令 = command | setting = 设置 = setting
preset_name = 预设 = preset
bad_value = {where} 不能是 {value}；应为：{expected} = {where} can't be {value}; {expected} expected
one_of = 以下之一：{choices} = one of {choices}
from_to = {kind}，{low} 到 {high} = {kind} from {low} to {high}
at_least = {kind}，不小于 {low} = {kind} of at least {low}
above = {kind}，大于 {low} = {kind} above {low} | str = 文字 = a string | int = 整数 = a whole number
float = 数字 = a number | bool = true 或 false = true or false | list = JSON 列表 = a list as JSON
dict = JSON 对象 = an object as JSON | a_folder = 文件夹 = a folder
key_shown = 命令行上的密钥，本机其他用户都能看到；更好的写法：--api-key '$NAME'，或 -（标准输入） = every user of this machine can \
see a key on the command line; better: --api-key '$NAME' or -
key_empty = --api-key 是空的：变量已被 shell 替换；请加单引号：'${variable}' = --api-key is empty: the shell has \
replaced the variable; put it in single quotes: '${variable}'
key_no_input = --api-key -：标准输入里没有密钥；例如：{program} --api-key - < FILE = --api-key -: standard input \
holds no key; for example: {program} --api-key - < FILE
key_undefined = --api-key {name}：没有设置环境变量 {variable}；先执行：{verb} {variable}=… = --api-key {name}: \
the environment variable {variable} is not set; first: {verb} {variable}=…
key_unset_here = 说明：这里没有设置 {variable}；请在启动服务的环境里设置 = note: {variable} is not set here; set it \
where the server starts
key_blanks = --api-key：密钥不能有空白、换行或非 ASCII 字符 = --api-key: a key has no blanks, line breaks or \
characters beyond ASCII | input_no_text = 标准输入：不是 UTF-8 文本 = standard input: not UTF-8 text
# status, models, test
config = 配置 = config | note = 说明 = note
offer = 建议 = offer
running = 正在运行，{status}，版本 {version}，{in_flight} 个请求进行中 = running, {status}, version {version}, \
{in_flight} in flight | not_running = 未运行 = not running | in_use = 使用中 = in use
others_run = 正在运行的服务用的不是 config.json 中的上游（--demo、--upstream，或在本机发现的引擎） = the running server has \
other providers than config.json names (--demo, --upstream, found here)
status_none = 没有；用 `login` 登录 iFlow，用 `provider add` 添加，或用 --upstream URL 启动 = none; run `login` \
for iFlow, add one with `provider add`, or start with --upstream URL
offered = 已设置 {variable}：{program} provider add {name} = {variable} is set: {program} provider add \
{name} | offered_too = {text}（或 {names}） = {text} (or {names})
rests_open = 一直失败，正在休息 = keeps failing, rests
rests_half-open = 曾一直失败，正在重试 = kept failing, is tried again
keys_rest = 它有 {count} 个密钥在休息 = {count} of its keys {count:rests|rest}
login_has_ended = 已失效：{program} login = ended: run {program} login
login_until = 有效至 {time} = until {time} | login_no_end = 有效期未知 = end unknown
login_fixed = 不能刷新 = not refreshable | login_refreshed = 上次刷新 {time} 成功 = last refresh {time} ok
login_refresh_failed = 上次刷新 {time} 失败 = last refresh {time} failed
no_models = 没有已知的模型；{program} status 显示各上游 = no models known: no provider lists any; `status` \
shows the providers
no_provider_yet = 没有上游 {name}；请先添加：{program} provider add {name} = there is no provider '{name}'; \
add it first: {program} provider add {name} | broken = 不能用 = does not work
works_there = 正常，正在运行的服务得到了 {model} 的回答 = ok, the running server got an answer of {model}
# provider
set = （已设置） = (set) | count_models = {count} 个模型 = {count} {count:model|models}
context = 上下文 {size} = context {size} | output = 输出 {size} = output {size} | images = 识图 = images
list_fetched = 模型列表向上游查询 = its list of models is fetched
add_preset = 添加：{program} provider add NAME --api-key '$VARIABLE' = add one with: {program} \
provider add NAME --api-key '$VARIABLE'
no_providers = 还没有上游：`provider add NAME`，NAME 取自 `provider presets`，或任取并加上 --base-url URL = no \
provider yet: `provider add NAME` with a name of `provider presets`, or any name and --base-url URL
taken_as = base_url {given} 按 {used} 处理 = base_url {given} is taken as {used}
provider_exists = 已有上游 {name}；先运行 `provider remove {name}`，或换一个 NAME = there is a provider {name} \
already; `provider remove {name}` first, or choose another NAME
provider_added = 已把 {name}（{url}）保存到 {path}；试一试：{program} provider test {name} = added {name} \
({url}) to {path}; try it: {program} provider test {name}
# env
port_free = 服务每次启动都选用空闲端口（port 0）：请用 --port 指定它打印出的端口 = the server takes a free port at each start \
(port 0): say with --port which one it has printed
nobody_answers = {url} 现在没有 iflow2api 应答；如果它在别处运行，请用 --host 和 --port 指明 = no iflow2api answers at \
{url} now; if it runs elsewhere, say so with --host and --port
env_key = 请先把您的密钥放进 {variable}；`key add NAME` 可生成一个 = put your key into {variable} first; \
`key add NAME` makes one
env_codex = 或永久写入 ~/.codex/config.toml： = or for good, in ~/.codex/config.toml:
env_model = {client} 会请求它自带的模型名；请指定实际使用哪个：{program} config set default_model NAME = {client} asks \
for models of its own; tell which one to use instead: {program} config set default_model NAME
your_key = 请用密钥替换 YOUR_KEY；`key add NAME` 可生成一个 = put a key instead of YOUR_KEY; `key add NAME` \
makes one
# login
login_open_this = 请在浏览器中打开此地址登录 iFlow： = open this address in a browser to log in to iFlow:
login_no_browser = 这里没有找到浏览器：请自行打开此地址；浏览器在别的机器上时，请用 login --paste = no browser was found here: \
open the address yourself; for one elsewhere there is login --paste
login_paste_this = 登录后浏览器会停在以 http://localhost 开头的地址；如果页面打不开，请把那个地址粘贴到这里 = after logging in the \
browser ends on an address that begins with http://localhost; if it shows no page, paste that \
address here
login_paste_again = 请重新粘贴，或按 Ctrl-C 退出： = paste it again, or leave with Ctrl-C:
login_no_input = login --paste：没有标准输入可供粘贴地址 = login --paste: there is no standard input to paste \
an address into | login_given_up = 已放弃登录；没有改动 = login cancelled; nothing was changed
login_stored = 已保存到 {path}；正在运行的服务会自动采用 = stored in {path}; a running server takes it over by itself
login_above = 还设置了 {name}，它优先于这次登录 = {name} is set, too, and takes precedence over this login
api_key_file = config.json 中的 api_key = api_key in config.json
key_stored = 已把密钥 {key} 存为账号 {account}：{path} = stored the key {key} as account {account} in {path}
logged_out = 已退出登录（{account}） = logged out ({account})
no_login = 没有可移除的登录（{account}） = there was no login to remove ({account})
# config, admin
file = 文件 = file | environment = 环境变量 = environment | flag = 命令行 = flag
hint = {title}。{hint} = {title}. {hint}
at_start = {text}（下次启动生效） = {text} (from the next start)
proxy_is_off = 上游代理尚未启用；启用：{program} config set upstream_proxy_enabled true = the proxy is not in \
use yet; to use it: {program} config set upstream_proxy_enabled true
encrypt_on = {path} 中的密钥已加密 = secrets in {path} are encrypted
encrypt_off = {path} 中的密钥现在是明文 = secrets in {path} are plain text now
encrypt_none = 其中还没有密钥；此设置用于以后写入的 = it holds none yet; those written later will be
left = {text}（保持不变） = {text} (left as it is) | new_password = 新密码： = new password:
same_again = 再输入一次： = again:
not_the_same = 两次输入不一致；没有改动 = the two differ; nothing was changed
no_terminal = 这里没有终端；从标准输入读取密码：{program} admin reset-password - = there is no terminal here; to \
read it from standard input: {program} admin reset-password -
password_shown = 不要把密码写在命令行上；直接运行 {program} admin reset-password，或用 -（标准输入） = a password does not \
belong on the command line; run {program} admin reset-password, or use - (standard input)
password_length = 密码需要 {low} 到 {high} 个字符 = a password has from {low} to {high} characters
password_set = 页面密码已更改；所有已登录的会话都已结束 = the page's password is changed; all its sessions have \
ended
password_above = 环境变量 {variable} 优先于它 = the variable {variable} is set, and takes precedence
# routes, key, usage
then = 然后 = then | count_keys = {count} 个密钥 = {count} {count:key|keys}
key_exists = 已有同名密钥 {name}；请先移除，或换个名称 = key add {name}: there is a key of this name; \
remove it first, or take another name
key_shown_once = 密钥只显示这一次；客户端用 `Authorization: Bearer KEY` 或 x-api-key 发送 = this is the only time \
it is shown; clients send it as `Authorization: Bearer KEY` or x-api-key
last_key = 已没有任何密钥：本机的客户端无需密钥；对外监听的服务在有新密钥之前不回答任何人 = no key is left: clients on this machine need \
none; a server that others reach answers nobody until there is one
no_keys = 没有客户端密钥；`key add NAME` 生成一个 = no client keys; `key add NAME` makes one
used_today = 今天 {requests} 次，{tokens} token = today {requests} requests, {tokens} tokens
usage_not_counted = 没有在记录用量；启用：{program} config set usage true = usage is not being counted: \
config set usage true
# of the system
ENOENT = 没有这个文件或文件夹 = no such file or folder | EACCES = 没有权限 = permission denied
ENOTDIR = 路径中有一部分不是文件夹 = a part of the path is no folder | EISDIR = 这是一个文件夹 = it is a folder
EEXIST = 同名的文件已存在 = a file of this name is there | EROFS = 文件系统是只读的 = the file system is read-only
ENOSPC = 磁盘已满 = the disk is full | EADDRNOTAVAIL = 本机没有这个地址 = this machine has no such address
# help
about = 连接任意 AI 客户端与任意 OpenAI 兼容模型的单文件网关 = one file between any AI client and any \
OpenAI-compatible model | usage = 用法：{text} = Usage: {text} | arguments = 参数 = Arguments
flags = 选项 = Flags
serve_flags = serve 的选项 = Flags of serve | examples = 示例 = Examples
help_flag = 显示本帮助；每个命令都有自己的帮助：COMMAND --help = this text; each command has its own: COMMAND --help
config_dir = config.json 所在的文件夹（~/.iflow2api） = folder of config.json (~/.iflow2api)
settings_too = 更多设置：{program} config，或环境变量 IFLOW2API_<大写名称> = More settings: {program} config, or \
variables IFLOW2API_<KEY>
"""

#: The commands by groups: NAME, below it its arguments and, after `$`, examples; each text in
#: Chinese and English.  `NAME` is positional, `[NAME]` optional, lower case lists the choices;
#: `--flag VALUE` takes a value, `-f, --follow` has a short form.
COMMAND_LINES = """\
[运行 = Run]
serve = 运行网关（不写命令时也是它） = run the gateway (also without any command)
  --host ADDR = 监听地址（127.0.0.1） = address to listen on (127.0.0.1)
  --port N = 端口（28000；0 为自动选择） = port to listen on (28000; 0: a free one)
  @run | --demo = 由内置的小模型应答：不要账号，不要网络 = answer from a small model built in: no account, no network
  --no-browser = 不打开网页 = do not open the page
  --log-level LEVEL = debug、info、warning 或 error = debug, info, warning or error
  --verbose = 等于 --log-level debug = the same as --log-level debug
  --version = 显示版本 = print the version
  $  | --port 8080 | --upstream https://api.deepseek.com --api-key '$KEY'
[设置 = Set up]
login = 用浏览器登录 iFlow = log in to iFlow in the browser
  --paste = 用于 SSH 和容器：粘贴浏览器最后停在的地址 = for SSH and containers: paste the address the browser ends on
  --no-browser = 只显示要打开的地址 = only print the address to open
  --api-key KEY = 改为保存此密钥：$NAME、-（标准输入）或密钥本身 = store this key instead: $NAME, - (standard input), \
or itself
  --account NAME = 另一个账号；请求在各账号间轮换 = a further account; requests take turns among all of them
  --timeout S = 最多等待的秒数（300） = seconds to wait (300)
  $ login | login --paste
logout = 移除 iFlow 登录 = remove the iFlow login
  --account NAME = 哪个账号 = of this account
provider = 管理和测试上游，查看预设 = list, add, remove and test providers; show presets
  [list|add|remove|test|presets] = 不写则为 list = list by default
  [NAME] = 名称；add 时写预设名即可 = a preset's name is all that `add` needs
  --base-url URL = add：OpenAI 兼容服务的地址 = add: address of an OpenAI-compatible server
  --api-key KEY = add：'$NAME'（原样保存）、-（标准输入）或密钥 = add: '$NAME' (stored as such), - (standard \
input), or the key | --models A,B = add：模型，第一个为默认 = add: models it serves; the first is its default
  --preset PRESET = add：用别的名称套用此预设 = add: use this preset under another name
  --kind @kinds = add：不写则为 openai = add: openai by default
  $ provider presets | provider add zhipu --api-key '$ZHIPU_API_KEY' | provider test zhipu
config = 查看和修改设置 = show and change settings
  [list|get|set|unset|path|encrypt] = 不写则为 list = list by default
  [KEY] = 设置的名称；encrypt：on 或 off = name of a setting; encrypt: on or off
  [VALUE] = 新的值；列表和对象写成 JSON = its value; lists and objects as JSON
  --show-secrets = 完整显示密钥 = show keys in full
  $ config list | config set port 8080 | config set upstream_proxy socks5h://127.0.0.1:1080
key = 客户端的密钥，各有模型和限额 = keys of clients: each with its models and limits
  [list|add|remove] = 不写则为 list = list by default | [NAME] = 密钥的名称 = name of the key
  --models A,B = 可用的模型或模式 = models it may use, or patterns
  --rpm N = 每分钟请求数上限 = most requests a minute | --rph N = 每小时请求数上限 = most requests an hour
  --rpd N = 每天请求数上限 = most requests a day | --tpd N = 每天 token 数上限 = most tokens a day
  --concurrency N = 同时请求数上限 = most requests at once
  --budget-day X = 每天的预算，按 prices 的币种 = most to spend a day, in the currency of `prices`
  --budget-month X = 30 天的预算 = most to spend in 30 days
  --expires DATE = 最后一天，如 2027-01-31 = last day, such as 2027-01-31
  $ key add alice --rpm 20 --models 'glm-*' | key remove alice
routes = 说明某个模型名会去哪里、为什么 = say where a model's name goes, and why
  explain = 说明去向 = say where it goes | MODEL = 模型名 = the model's name
  --dialect chat|messages|responses = 客户端的接口（chat） = the client's API (chat)
  --tokens N = 请求的大小 = size of the request | --images = 带有图片 = with an image
  --thinking = 要求思考 = with reasoning | --tools = 提供工具 = with tools
  --json = 输出 JSON = as JSON
  @run
  $ routes explain claude-sonnet-4 --dialect messages
env = 输出让客户端指向本服务的 shell 语句 = shell lines that point a client at this server
  @clients = 客户端 = the client
  --shell @shells = 哪种 shell；不写则看 $SHELL = for which shell; by default that of $SHELL
  --host ADDR = 服务的地址 = the server's address | --port N = 服务的端口 = its port | @model
  --json = 输出 JSON：Claude Code 的 settings.json = as JSON, for Claude Code's settings.json
  $ env claude | env claude --json | env codex --shell fish
admin = 重设管理页面的密码 = set a new password for the page
  reset-password = 重设密码 = set a new password | [-] = 从标准输入读取 = read it from standard input
  $ admin reset-password | admin reset-password - < FILE
[查看 = Look]
status = 是否在运行、有哪些上游、有什么问题 = whether it runs, its providers, what is wrong
models = 列出可用的模型 = list the models that can be asked for
  @run
test = 向上游发一个极小的真实请求 = one tiny real request to a provider, or to each
  [PROVIDER] = 上游名称；不写则全部 = its name; all by default
  @run
  $ test | test --upstream http://127.0.0.1:11434/v1
usage = 用量：按模型、密钥或上游 = tokens and requests, by model, key or provider
  --days N = 最近 N 天（30） = the last N days (30)
  --by model|key|provider|day = 按什么汇总（model） = a row for each (model) | --json = 输出 JSON = as JSON
  --csv = 输出 CSV = as CSV
  $ usage --by key --days 7
logs = 显示日志文件（log_file）的末尾 = show the end of log_file
  -n N = 行数（50） = number of lines (50) | -f, --follow = 持续显示新的行 = keep showing new lines
  --level @levels = 只显示此级别及以上 = this level and above
  $ logs -f | logs -n 200 --level warning
[其他 = More]
version = 显示版本 = print the version
"""

LOG_LEVELS = ("debug", "info", "warning", "error")

#: For `@name` in COMMAND_LINES: arguments of several commands, and choices from other tables.
COMMAND_PARTS = {
    "run": """--upstream URL = 只用这个 OpenAI 兼容服务，不看 config.json = \
use this OpenAI-compatible server alone, whatever config.json says
  --api-key KEY = 它的密钥（或 iFlow 的）：$NAME、-（标准输入）或密钥本身 = its key, or iFlow's: $NAME, \
- (standard input), or the key itself | @model""",
    "model": "--model MODEL = 本次运行的 default_model = default_model for this run",
    "clients": "|".join(CLIENTS), "shells": "|".join(SHELLS), "kinds": "|".join(KINDS),
    "levels": "|".join(LOG_LEVELS)}

Pair = List[str]                         #: the same in Chinese and in English


class Argument(NamedTuple):
    """An argument of a command."""
    name: str                            #: the long flag, NAME, or `action` for a choice
    flags: List[str]                     #: none for a positional argument
    value: str                           #: its name in help; "" for a switch
    choices: List[str]
    help: Pair
    shown: str                           #: as written in COMMAND_LINES


class Command(NamedTuple):
    group: str                           #: `Chinese = English`
    help: Pair
    arguments: List[Argument]
    examples: List[str]


def _argument(text: str) -> Argument:
    shown, _, both = text.partition(" = ")
    names, _, value = shown.replace(", ", ",").partition(" ")
    flags = names.split(",") if shown[0] == "-" else []
    value = value if flags else shown.strip("[]")
    choices = value.split("|") if value.islower() else []
    name = flags[-1] if flags else "action" if choices else value
    return Argument(name, flags, value, choices, both.split(" = "), shown)


@lru_cache(maxsize=None)
def command_table() -> Dict[str, Command]:
    """COMMAND_LINES as a table, with the flags that every command has."""
    found: Dict[str, Command] = {}
    texts, table, group = texts_of(CONSOLE_TEXTS), COMMAND_LINES, ""
    for part, text in COMMAND_PARTS.items():
        table = table.replace("@" + part, text)
    for line in table.splitlines():
        if line[0] == "[":
            group = line.strip("[]")
        elif line[0] != " ":
            name, _, both = line.partition(" = ")
            last = found[name] = Command(group, both.split(" = "), [], [])
        elif line[2] == "$":
            last.examples.extend(line[4:].split(" | "))
        else:
            last.arguments.extend(map(_argument, line[2:].split(" | ")))
    for command in found.values():
        command.arguments.extend([
            Argument("--config-dir", ["--config-dir"], "DIR", [], texts["config_dir"],
                     "--config-dir DIR"),
            Argument("--help", ["-h", "--help"], "", [], texts["help_flag"], "-h, --help")])
    return found


# --- the console -------------------------------------------------------------

#: How this program is called in commands that users are told to type.
PROGRAM = "python iflow2api.py"

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}

#: For characters that the console's encoding lacks; others are shown as escapes.
_PLAIN = {"→": "->", "←": "<-", "…": "...", "·": "-", "—": "-", "–": "-", "’": "'", "‘": "'",
          "“": '"', "”": '"', "≈": "~", "✓": "ok", "✗": "x", "，": ", ", "；": "; ", "：": ": ",
          "（": " (", "）": ")"}

#: Characters two columns wide (Unicode TR 11, W and F): OpenWrt leaves unicodedata to a package.
_WIDE = ("\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60"
         "\uffe0-\uffe6\U0001f300-\U0001faff\U00020000-\U0003fffd")


class Console:
    """What the terminal of this process can show: language, colours, width."""

    def __init__(self) -> None:
        self.language, self.colours, self.columns = "en", False, 80

    def set_up(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        codecs.register_error("iflow2api", _plain_characters)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="iflow2api")           # GBK, ASCII
        self.language = find_language(argv, environ)
        try:
            "中".encode(getattr(sys.stderr, "encoding", None) or "utf-8")
        except (UnicodeError, LookupError):
            self.language = "en"
        is_terminal = bool(sys.stderr) and sys.stderr.isatty()
        plain = environ.get("NO_COLOR") or environ.get("TERM") == "dumb" or (
            os.name == "nt" and "WT_SESSION" not in environ)     # Windows' older console
        self.colours = is_terminal and not plain
        self.columns = 80
        if is_terminal:
            with contextlib.suppress(OSError, ValueError):
                width = os.get_terminal_size(sys.stderr.fileno()).columns
                self.columns = min(max(width, 40), 80)

    def text(self, pair: Pair) -> str:
        return pair[self.language == "en"]

    def paint(self, text: str, colour: str) -> str:
        if not (self.colours and text and colour):
            return text
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


CONSOLE = Console()


@lru_cache(1)
def console_texts() -> Dict[str, Pair]:
    return {**texts_of(PAGE_TEXTS), **texts_of(CONSOLE_TEXTS)}


def tr(which: str, **facts: Any) -> str:
    """A text in the console's language, filled in."""
    return fill_in(CONSOLE.text(console_texts()[which]), {**facts, "program": PROGRAM})


def tr_word(which: str) -> str:
    """A title of the page as a word within a line."""
    return tr(which).lower()


def marked(mark: str, text: Any) -> str:
    """`error: …`, `warning: …` or `problem: …`, in the language of `text`."""
    zh, en = console_texts()["mark_" + mark]
    return fill_in(en if columns_of(str(text)) == len(str(text)) else zh, {"text": text})


def reason_of(exc: OSError) -> str:
    """The system's error, in the console's language where there is a text for it."""
    name = errno.errorcode.get(exc.errno or 0, "")
    if name in console_texts():
        return tr(name)
    return name if CONSOLE.language == "zh" and name else exc.strerror or str(exc)


def or_near(text: str, name: str, names: Iterable[str], show: str = "") -> str:
    """`text`, and names similar to the mistyped one, else the command that shows all."""
    found = alike(name, names, 0.74 if len(name) > 3 else 0.65)
    if found:
        return tr("near", text=text, names=f" {tr('or')} ".join(found))
    return tr("see_all", text=text, show=show) if show else text


def unknown_name(kind: str, name: str, names: Iterable[str], show: str = "") -> UsageError:
    text = tr("unknown", kind=tr_word(kind), name=one_line(name, 60))
    return UsageError(or_near(text, name, names, show))


def _plain_characters(error: UnicodeError) -> Tuple[str, int]:
    """The codec error handler of stdout and stderr."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start:error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode()
                   for c in lacking), error.end


def find_language(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """zh or en: the setting `language` if there is one, else the locale's.

    Read apart from the settings: help and mistakes on the command line need it earlier.
    """
    wanted = environ.get(ENV_PREFIX + "LANGUAGE")
    if wanted not in ("zh", "en"):
        flags = dict([*zip(argv, argv[1:]), *(word.split("=", 1) for word in argv if "=" in word)])
        folder = flags.get("--config-dir") or environ.get(ENV_PREFIX + "CONFIG_DIR") or CONFIG_DIR
        path, wanted = os.path.join(os.path.expanduser(folder), "config.json"), ""
        with contextlib.suppress(ConfigBroken):
            wanted = read_json_file(path).get("language")
    if wanted in ("zh", "en"):
        return str(wanted)
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    locale = next((environ[name] for name in names if environ.get(name)), "")
    if not locale and os.name == "nt":
        with contextlib.suppress(ImportError, AttributeError, OSError):
            import ctypes
            kernel = ctypes.windll.kernel32                      # type: ignore[attr-defined]
            locale = "zh" if kernel.GetUserDefaultUILanguage() & 0x3FF == 4 else ""
    return "zh" if locale.lower().startswith("zh") else "en"


def columns_of(text: str) -> int:
    """How many columns of a terminal `text` takes."""
    return len(text) if text.isascii() else len(text) + len(re.findall(f"[{_WIDE}]", text))


def wrap(text: str, columns: int) -> List[str]:
    """Lines of at most `columns`: broken at blanks and beside wide characters; long words cut."""
    if columns_of(text) <= columns:
        return [text.rstrip()]
    lines, line = [], ""
    stops = "[，。；：、？！）]*"
    for piece in re.findall(rf"\s+|[{_WIDE}]{stops}|[^\s{_WIDE}]+{stops}", text):
        if columns_of(line + piece.rstrip()) <= columns:
            line += piece
            continue
        if line.strip():
            lines.append(line.rstrip())
        line = piece.lstrip()
        if columns_of(line) > columns:
            cut = [line[at:at + columns] for at in range(0, len(line), columns)]
            lines += cut[:-1]
            line = cut[-1]
    return lines + [line.rstrip()] if line.strip() or not lines else lines


def lay_out(rows: Sequence[Sequence[str]], columns: int, label_colour: str = "",
            width: int = 0) -> List[str]:
    """Rows of label and text (and a colour) as aligned lines; a long label gets its own line."""
    widest = max([columns_of(row[0]) for row in rows] + [0])
    width = width or min(widest, max(columns // 3, 12))
    lines = []
    for label, text, *colour in rows:
        own_line = columns_of(label) > width
        if own_line:
            lines.append("  " + CONSOLE.paint(label, label_colour))
        for number, part in enumerate(wrap(text, columns - width - 4)):
            head = "" if own_line or number else label
            blanks = " " * (width - columns_of(head) + 2)
            shown = CONSOLE.paint(part, colour[0] if colour else "")
            lines.append(f"  {CONSOLE.paint(head, label_colour)}{blanks}{shown}".rstrip())
    return lines


def aligned(table: Sequence[Sequence[str]], is_right: bool = False) -> List[str]:
    """Rows of cells as lines with columns; `is_right` aligns all but the first to the right."""
    widths = [max(map(columns_of, column)) for column in zip(*table)]
    lines = []
    for name, *cells in table:
        blanks = [" " * (width - columns_of(cell)) for cell, width in zip([name, *cells], widths)]
        padded = (blank + cell if is_right else cell + blank
                  for blank, cell in zip(blanks[1:], cells))
        lines.append("  ".join([name + blanks[0], *padded]).rstrip())
    return lines


def with_why(text: str, why: str) -> str:
    """`text`, and the English sentence that says why; beside Chinese on a line of its own."""
    return text + (" " if CONSOLE.language == "en" else "\n  ") + why


def say(text: str) -> None:
    """Print a message to stderr; stdout is for answers.  A closed terminal ends no server."""
    if sys.stderr is not None:           # print(file=None) would write to stdout
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def say_problems(problems: Iterable[str]) -> None:
    for problem in problems:
        say(marked("problem", one_line(problem, 300)))


def _row(which: str, *columns: str) -> None:
    """Print a line of an answer: the label, a key of the texts or "", and the columns."""
    label = tr_word(which) if which else ""
    print(label + " " * max(2, 10 - columns_of(label)) + "  ".join(filter(None, columns)))


# --- arguments ---------------------------------------------------------------

Args = Dict[str, Any]                    #: by Argument.name; None or False where left out


def _misuse(text: str, command: str = "") -> UsageError:
    """An error with a pointer to the help of the command."""
    return UsageError(tr("see", text=text, command=command + " " if command else ""))


def _bad_value(where: str, value: str, expected: str) -> UsageError:
    shown = one_line(value, 60) or '""'
    return UsageError(tr("bad_value", where=where, value=shown, expected=expected))


def _is_flag(word: str) -> bool:
    return word[:1] == "-" and word != "-" and not word[1:2].isdigit()


def _split(argv: Sequence[str]) -> Tuple[List[str], List[Tuple[str, Optional[str]]]]:
    """Words, and flags with their values: flags may stand anywhere, also before the command.

    Whether a flag takes a value is the same for all commands.
    """
    takes = {flag: argument.value for command in command_table().values()
             for argument in command.arguments for flag in argument.flags}
    words: List[str] = []
    flags: List[Tuple[str, Optional[str]]] = []
    rest = deque(argv)
    while rest:
        word = rest.popleft()
        if word == "--":
            return [*words, *rest], flags
        if not _is_flag(word):
            words.append(word)
            continue
        flag, equals, text = word.partition("=")
        if word[:2] in takes and word[:2] != "--" and takes[word[:2]] and word[2:]:
            flag, equals, text = word[:2], "=", word[2:]         # -n5
        value = text if equals else None
        if value is None and takes.get(flag) and rest and not (
                rest[0] in takes or rest[0][:2] == "--"):
            value = rest.popleft()
        flags.append((flag, value))
    return words, flags


def _parse_args(argv: Sequence[str]) -> Args:
    """The arguments of `argv` and its command, `serve` where none is named; UsageError."""
    words, flags = _split(argv)
    name = words.pop(0) if words and words[0] in command_table() else ""
    if not name and argv and not _is_flag(argv[0]):
        raise _misuse(str(unknown_name("command", argv[0], command_table())))
    if any(flag in ("-h", "--help") for flag, _ in flags):
        return {"command": name, "--help": True}
    name = name or "serve"
    arguments = command_table()[name].arguments
    args: Args = {argument.name: None if argument.value else False for argument in arguments}
    known = {flag: argument for argument in arguments for flag in argument.flags}
    places = [argument for argument in arguments if not argument.flags]
    for flag, value in flags:
        if flag not in known:
            text = tr("no_flag", command=name, flag=one_line(flag, 60))
            raise _misuse(or_near(text, flag, known), name)
        if bool(known[flag].value) is (value is None):
            key = "needs_value" if value is None else "takes_no_value"
            shown = one_line(value or known[flag].value, 60)
            raise _misuse(tr(key, flag=flag, value=shown), name)
        args[known[flag].name] = _chosen(name, flag, known[flag], value)
    for argument, word in zip(places, words):
        args[argument.name] = _chosen(name, name, argument, word)
    if any(argument.shown[0] != "[" for argument in places[len(words):]):
        needed = " ".join(argument.shown for argument in places)
        raise _misuse(tr("missing", command=name, needed=needed), name)
    for word in words[len(places):]:
        text = tr("stray", command=name, word=one_line(word, 60))
        raise _misuse(or_near(text, word, command_table()), name)
    return {**args, "command": name}


def _chosen(name: str, where: str, argument: Argument, value: Optional[str]) -> Any:
    """The value of an argument, True for a switch; UsageError if it is none of its choices."""
    if value is None or not argument.choices or value in argument.choices:
        return True if value is None else value
    wrong = _bad_value(where, value, tr("one_of", choices=", ".join(argument.choices)))
    raise _misuse(or_near(str(wrong), value, argument.choices), name)


def _section(title: str, rows: Sequence[Sequence[str]], width: int = 0) -> List[str]:
    lines = lay_out(rows, CONSOLE.columns, width=width)
    return ["", CONSOLE.paint(title, "bold"), *lines] if rows else []


def help_of(name: str) -> str:
    """`NAME --help`; without a name every command in its group, and the flags of serve."""
    command = command_table()[name or "serve"]
    places = [each for each in command.arguments if not each.flags]
    flags = [(each.shown, CONSOLE.text(each.help)) for each in command.arguments if each.flags]
    if name:
        usage = " ".join([PROGRAM, name, *(place.shown for place in places), "[FLAGS]"])
        rows = [(each.value, CONSOLE.text(each.help)) for each in places]
        lines = [f"iflow2api {name}: {CONSOLE.text(command.help)}", "",
                 *wrap(tr("usage", text=usage), CONSOLE.columns)]
        lines += _section(tr("arguments"), rows) + _section(tr("flags"), flags)
    else:
        lines = [f"iflow2api {__version__}: {tr('about')}", "",
                 tr("usage", text=f"{PROGRAM} [COMMAND] [FLAGS]")]
        width = max(map(len, command_table()))
        for group in dict.fromkeys(each.group for each in command_table().values()):
            rows = [(known, CONSOLE.text(each.help))
                    for known, each in command_table().items() if each.group == group]
            lines += _section(CONSOLE.text(group.split(" = ")), rows, width)
        lines += _section(tr("serve_flags"), flags)
        lines += ["", *wrap(tr("settings_too"), CONSOLE.columns)]
    if command.examples:                 # to be copied: never wrapped
        lines += ["", CONSOLE.paint(tr("examples"), "bold"),
                  *(f"  {PROGRAM} {example}".rstrip() for example in command.examples)]
    return "\n".join(lines)


# --- values ------------------------------------------------------------------

def _number(args: Args, flag: str, default: int, low: int, high: int = 0) -> int:
    """The whole number that a flag has; UsageError."""
    text = args[flag]
    if text is None:
        return default
    if re.fullmatch("[0-9]{1,12}", text) and low <= int(text) <= (high or 10 ** 12):
        return int(text)
    kind = "from_to" if high else "at_least"
    raise _bad_value(flag, text, tr(kind, kind=tr("int"), low=low, high=high))


def _amount(args: Args, flag: str) -> float:
    """The amount of money that a flag has; UsageError."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", args[flag]) and float(args[flag]) > 0:
        return float(args[flag])
    raise _bad_value(flag, args[flag], tr("above", kind=tr_word("float"), low=0))


def _expected(name: str) -> str:
    """What a setting may be, in words."""
    facts = SETTING[name].metadata
    if "choices" in facts:
        return tr("one_of", choices=", ".join(choice or '""' for choice in facts["choices"]))
    kind = tr(facts["kind"])
    if "high" in facts:
        return tr("from_to", kind=kind, low=facts["low"], high=facts["high"])
    return tr("at_least", kind=kind, low=facts["low"]) if "low" in facts else kind


def _parse_for(where: str, name: str, text: str) -> Any:
    """`text` as a value of the setting `name`; UsageError says what `where` takes instead."""
    try:
        return parse_setting(name, text, where)
    except ValueError as exc:
        facts = SETTING[name].metadata
        is_json = facts["kind"] in ("list", "dict") and text.lstrip()[:1] in ("[", "{")
        if facts.get("secret") or is_json or facts["kind"] == "str" and name in SETTING_SHAPES:
            raise UsageError(str(exc)) from None         # it names the part and the reason
        raise _bad_value(where, text, _expected(name)) from None


def _listed(text: Optional[str]) -> List[str]:
    """`a, b` as a list."""
    return list(filter(None, map(str.strip, (text or "").split(","))))


def _input_line() -> str:
    """A line of standard input without its end, "" where there is none; UsageError."""
    try:
        line = sys.stdin.readline().rstrip("\r\n") if sys.stdin is not None else ""
        line.encode()                    # surrogates stand for bytes that are not UTF-8
    except UnicodeError:
        raise UsageError(tr("input_no_text")) from None
    return line


def _read_key(text: str, variable: str = "NAME") -> str:
    """A key given on the command line: `$NAME`, `-` for standard input, or itself."""
    if not text:
        raise UsageError(tr("key_empty", variable=variable))
    if text == "-":
        text = _input_line().strip()
        if not text:
            raise UsageError(tr("key_no_input"))
        return text
    if not text.startswith("$"):
        say(marked("warning", tr("key_shown")))
        return text
    if not os.environ.get(text[1:]):
        verb = "set" if os.name == "nt" else "export"
        raise UsageError(tr("key_undefined", name=text, variable=text[1:], verb=verb))
    return os.environ[text[1:]]


def _stored_key(text: str, variable: str) -> str:
    """A key as config.json is to hold it: `$NAME` stays, so that the secret is not in the file."""
    if re.fullmatch(_REFERENCE, text):
        if not os.environ.get(text[1:]):
            say(tr("key_unset_here", variable=text[1:]))
        return text
    key = text if text.startswith("$") else _read_key(text, variable or "NAME")
    return "$" + key if text == "-" and key.startswith("$") else key


def _flag_settings(args: Args) -> Json:
    """The settings that flags of this run stand for; UsageError for a bad one."""
    flags: Json = {}
    for name, item in SETTING.items():
        flag = item.metadata.get("flag")
        if flag and args.get(flag) is not None:
            flags[name] = _parse_for(flag, name, args[flag])
    key = _read_key(args["--api-key"]) if args.get("--api-key") is not None else ""
    if args.get("--verbose"):
        flags["log_level"] = "debug"
    if args.get("--upstream") is not None:       # an empty one is a variable that was not set
        entry = {"name": "upstream", **entry_at(args["--upstream"]),
                 "api_keys": ["$" + key if key.startswith("$") else key] if key else []}
        problem = parse_provider(entry, {}).problem
        if problem:
            raise UsageError(f"--upstream: {problem}")
        flags.update(providers=[entry], aliases={}, default_provider="upstream", api_key="")
    elif key:
        flags["api_key"] = key
    return flags


def _config_of(args: Args) -> ConfigFile:
    if args["--config-dir"] == "":       # an unset shell variable, not the current folder
        raise _bad_value("--config-dir", "", tr("a_folder"))
    folder = args["--config-dir"] or os.environ.get(ENV_PREFIX + "CONFIG_DIR") or CONFIG_DIR
    return ConfigFile(folder)


def _gateway_of(args: Args) -> Gateway:
    return Gateway(config=_config_of(args), flags=_flag_settings(args))


def _change_config(args: Args, edit: Callable[[Json], Any], done: str = "saved_in",
                   **facts: Any) -> None:
    """Change config.json and say what was done."""
    config = _config_of(args)
    with _writing(config.path):
        say_problems(config.change(edit))
    say(tr(done, path=config.path, **facts))


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise CommandFailed(tr("cannot_write", path=path, reason=reason_of(exc))) from None


def _entries(raw: Json, name: str) -> List[Any]:
    """A list of config.json; UsageError for another value, which would be overwritten."""
    value = raw.get(name, [])
    if not isinstance(value, list):
        raise UsageError(tr("no_list", name=name))
    return value


def _add_entry(args: Args, where: str, entry: Json, exists: str, done: str) -> None:
    """Add to the list `where` of config.json."""
    def add(raw: Json) -> None:
        entries = _entries(raw, where)
        if entry["name"] in map(name_of, entries):       # checked under the lock of the file
            raise UsageError(tr(exists, name=entry["name"]))
        raw[where] = [*entries, entry]

    _change_config(args, add, done, name=entry["name"],
                   url=next(iter(roads_of(entry).values()), ""))


def _remove_entry(args: Args, where: str, kind: str) -> None:
    """Remove NAME from the list `where` of config.json."""
    show = f"{args['command']} list"
    gone = _needed(args, "NAME", show)

    def remove(raw: Json) -> None:
        entries = _entries(raw, where)
        names = list(map(name_of, entries))
        if gone not in names:
            raise unknown_name(kind, gone, filter(None, names), show)
        raw[where] = [entry for entry in entries if name_of(entry) != gone]
        if raw.get("default_" + kind) == gone:
            del raw["default_" + kind]

    _change_config(args, remove, "gone", name=gone)


def _needed(args: Args, what: str, show: str) -> str:
    """An argument that some actions need; `show` is the command that lists what there is."""
    if args[what] is None:
        command = f"{args['command']} {args['action']}"
        raise UsageError(tr("see_all", text=tr("needs", command=command, what=what), show=show))
    return args[what]


# --- serve -------------------------------------------------------------------

def cmd_serve(args: Args) -> None:
    _log_to_console()
    if args["--demo"] and (args["--upstream"] is not None or args["--api-key"]):
        raise UsageError(tr("demo_alone"))
    flags = _flag_settings(args)
    with _signals() as wait:
        demo = DemoUpstream() if args["--demo"] else None
        flags = {**(demo.settings() if demo else {}), **flags}
        gateway = Gateway(config=_config_of(args), flags=flags)
        try:
            _serve(gateway, wait, args["--no-browser"])
        finally:
            if demo is not None:
                demo.close()


def _serve(gateway: Gateway, wait: Callable[[], bool], no_browser: bool) -> None:
    """Run the server until a signal ends it."""
    gateway.lead_log()
    _log_to_file(gateway)
    had_key = gateway.state.auth.required
    host, port = gateway.settings.host, gateway.settings.port
    try:
        server = serve(gateway)
    except OSError as exc:
        raise CommandFailed(_bind_problem(host, port, exc)) from None
    with contextlib.suppress(OSError):   # a full disk, a closed pipe
        # scripts wait for this line
        print(f"iflow2api {__version__} listening on {server.url}", flush=True)
    say("\n".join(["", *_card(gateway, server, had_key), ""]))
    _show_page(gateway, server, no_browser)
    gateway.watch_files()
    while wait():
        gateway.reload()
    say(tr("stopping", seconds=gateway.settings.drain_s))
    server.close(gateway.settings.drain_s)


def _show_page(gateway: Gateway, server: Server, no_browser: bool) -> None:
    """Open the page at the first start on a terminal; print each new code for it."""
    said = [gateway.sessions.code()]

    def say_code() -> None:
        code = gateway.sessions.code()
        if code not in ("", said[0]):
            said[0] = code
            say(tr("page_code", code=code))

    gateway.listeners.append(say_code)
    gateway.sessions.on_new_code = say_code
    if said[0] and not no_browser and sys.stdout is not None and sys.stdout.isatty():
        page = server.url + "/admin"
        threading.Thread(target=open_browser, args=(page, os.environ), daemon=True).start()


def _bind_problem(host: str, port: int, exc: OSError) -> str:
    """Why the address can't be bound, with a free port, in one line."""
    if exc.errno not in (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", -1)):
        return tr("cannot_listen", host=host, port=port, reason=reason_of(exc))
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host.strip("[]"), 0))
        free = probe.getsockname()[1]
    return tr("port_taken", host=host, port=port, free=free)


#: The card names this many providers.
CARD_PROVIDERS = 8


def _card(gateway: Gateway, server: Server, had_key: bool) -> List[str]:
    """What a user needs to know after the start, as lines of a narrow terminal.

    A key made just now is shown once, in full.
    """
    router, key = gateway.state.router, gateway.settings.custom_api_key
    providers = list(router.providers.values())
    shown = [row for name, facts, problem in _provider_facts(router, {})[:CARD_PROVIDERS]
             for row in _provider_rows(router, name, facts[:1], problem)]
    if len(providers) > CARD_PROVIDERS:
        shown.append((tr("more", count=len(providers) - CARD_PROVIDERS), ""))
    access = [(tr("no_key_needed"), "")]
    if key and not had_key:
        access = [(tr("new_key", host=gateway.settings.host), ""), (key, "bold")]
    elif server.needs_key:
        access = [(tr("key_needed", key=mask(key)) if key else tr("a_key_needed"), "")]
    login = "iflow_logged_in" if gateway.health()["iflow_logged_in"] else "iflow_not_logged_in"
    page = [(server.url + "/admin", "")]
    if gateway.sessions.is_new:
        page.append((tr("page_code", code=gateway.sessions.code()), "bold"))
    problems = _further_problems(gateway.problems)[:1]
    steps = [tr("next_client", url=server.url), tr("next_anthropic", url=server.url)]
    if all(provider.problem for provider in providers):
        steps = [tr("next_repair"), f"{PROGRAM} test"]
    if not providers:
        steps = [tr("next_preset"), f"{PROGRAM} provider presets"]
    blocks = {"address": [(server.url, "green")],
              "providers": shown or [(tr("none"), "yellow")], "clients": access,
              "login": [(tr(login), "")], "page": page,
              "problem": [(one_line(problem, 200), "yellow") for problem in problems],
              "next": [(step, "bold") for step in steps]}
    rows = [("" if number else tr_word(which), *row) for which, block in blocks.items()
            for number, row in enumerate(block)]
    return lay_out(rows, CONSOLE.columns, "dim")


def _provider_rows(router: Router, name: str, facts: Sequence[str],
                   problem: str) -> List[Tuple[str, str]]:
    """A provider as texts and their colours: one, or two where it is disabled and why (English)."""
    if router.default and name == router.default.name:
        name = tr("name_default", name=name)
    if problem:
        return [(tr("disabled", name=name), "yellow"), (one_line(problem), "yellow")]
    return [("  ".join(filter(None, [name, *facts])), "")]


def _provider_facts(router: Router, health: Json) -> List[Tuple[str, List[str], str]]:
    """Name, facts and problem of each provider.

    The running server knows better: it has variables that this shell may lack.
    """
    running = {each["name"]: each for each in entries_of(health, "providers") if name_of(each)}
    has_others, found = _has_others(router, health), []
    for name in running if has_others else router.providers:
        provider = Provider(name) if has_others else router.providers[name]
        told, keys = running.get(name, {}), ", ".join(map(mask, provider.api_keys))
        facts, problem = [provider.base_url, keys or tr("no_key")], provider.problem
        if has_others or told.get("usable") and problem:
            facts, problem = [tr("in_use")], told.get("problem", "")
        if provider.models:
            facts.append(tr("count_models", count=len(provider.models)))
        if told.get("circuit") in ("open", "half-open"):
            facts.append(tr("rests_" + told["circuit"]))
        if told.get("keys_resting"):
            facts.append(tr("keys_rest", count=told["keys_resting"]))
        found.append((name, facts, problem))
    return found


def _has_others(router: Router, health: Json) -> bool:
    """Whether the running server has other providers than config.json: --demo, --upstream."""
    names = [name_of(each) for each in entries_of(health, "providers") if name_of(each)]
    return "providers" in health and names != list(router.providers)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """A function that waits for a signal: True for SIGHUP, False for SIGINT and SIGTERM.

    A second one of these ends the process at once.  The handler interrupts the main thread
    wherever it is: it takes no lock and starts no thread.  What ends a wait is a byte that Python
    writes into a socket at once, also for a signal that another thread gets.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    hangup = getattr(signal, "SIGHUP", 0)            # not on Windows
    stops: List[int] = []

    def handle(number: int, frame: Any) -> None:
        if number != hangup and stops:
            os._exit(130)
        stops.extend([number] * (number != hangup))

    def wait() -> bool:
        return not stops and set(reader.recv(4096)) == {hangup}

    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    numbers = filter(None, (signal.SIGINT, signal.SIGTERM, hangup))
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield wait
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        reader.close()
        writer.close()


# --- logs --------------------------------------------------------------------

#: log_file is rotated at this size, and so many older files are kept.
LOG_FILE_BYTES = 2 << 20
LOG_FILES_KEPT = 2

_LEVEL_COLOURS = {logging.DEBUG: "dim", logging.WARNING: "yellow",
                  logging.ERROR: "red", logging.CRITICAL: "red"}


class _Format(logging.Formatter):
    """`12:00:01 text`, with the level before the text unless it is info; in log_file a date and
    always the level.  No line has control characters or what looks like a credential.
    """

    def __init__(self, is_file: bool) -> None:
        super().__init__()
        self._is_file = is_file

    def format(self, record: logging.LogRecord) -> str:
        text = one_line(record.getMessage(), 1000)
        if record.exc_info:
            text += "\n" + redact(self.formatException(record.exc_info))
        if self._is_file:
            at = self.formatTime(record, "%Y-%m-%d %H:%M:%S")
            return f"{at} {record.levelname} {text}"
        level = "" if record.levelno == logging.INFO else record.levelname.lower() + ": "
        line = f"{self.formatTime(record, '%H:%M:%S')} {level}{text}"
        return CONSOLE.paint(line, _LEVEL_COLOURS.get(record.levelno, ""))


def _log_to_console() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Format(False))
    log.handlers[:] = [handler]
    logging.raiseExceptions = False      # a closed console must not end a request
    # our lines show none of this, and it takes a third of a line's time ("Optimization" in
    # Python's logging HOWTO)
    logging._srcfile = None              # type: ignore[attr-defined]
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def _log_to_file(gateway: Gateway) -> None:
    """Log to log_file as well, if it is set; the problems of the settings are its first lines."""
    path = log_path(gateway)
    if not path:
        return
    try:
        handler = _open_log(path)
    except OSError as exc:
        return say(marked("warning", tr("no_log", path=path, reason=reason_of(exc))))
    log.addHandler(handler)
    notes = [(logging.INFO, f"iflow2api {__version__} starts")]
    notes += [(logging.WARNING, problem) for problem in gateway.problems]
    for level, text in notes:
        handler.handle(log.makeRecord(log.name, level, "", 0, text, (), None))


def _open_log(path: str) -> logging.Handler:
    """The handler that writes `path` (mode 0600) and rotates it; OSError."""
    from logging.handlers import RotatingFileHandler     # takes 1 MB of memory

    class PrivateFile(RotatingFileHandler):
        def _open(self) -> Any:
            return open(self.baseFilename, self.mode, encoding="utf-8", errors="backslashreplace",
                        opener=lambda name, flags: os.open(name, flags, 0o600))

    make_folder(os.path.dirname(os.path.abspath(path)))
    handler = PrivateFile(path, maxBytes=LOG_FILE_BYTES, backupCount=LOG_FILES_KEPT,
                          encoding="utf-8")
    handler.setFormatter(_Format(True))
    return handler


class Lines:
    """Splits pieces of text into whole lines, in linear time."""

    def __init__(self) -> None:
        self._rest: List[bytes] = []

    def feed(self, data: bytes) -> List[str]:
        """The lines that end in `data`, without their ends."""
        whole, end, rest = data.rpartition(b"\n")
        if not end:
            self._rest.append(data)
            return []
        text = b"".join((*self._rest, whole))
        self._rest = [rest]
        return [line.decode("utf-8", "replace").rstrip("\r") for line in text.split(b"\n")]


class LogReader:
    """Lines of a log at a level or above, each once.

    The file is open for moments only: Windows can't rotate an open one.
    """

    def __init__(self, path: str, level: str) -> None:
        levels = LOG_LEVELS[LOG_LEVELS.index(level):]
        self._path, self._wanted = path, {*map(str.upper, levels), "CRITICAL"}
        self._offset, self._inode, self._lines, self._shown = 0, 0, Lines(), True

    def fresh(self) -> List[str]:
        """The whole lines that came since the last call; OSError without a file."""
        with open(self._path, "rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_ino != self._inode or facts.st_size < self._offset:
                self._offset, self._lines = 0, Lines()           # another file, or it was emptied
            self._inode = facts.st_ino
            file.seek(self._offset)
            data = file.read(2 * LOG_FILE_BYTES)
        self._offset += len(data)
        lines = []
        for line in self._lines.feed(data):
            found = re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ([A-Z]{1,20}) ", line)
            if found:                    # else it continues the one before: a traceback
                self._shown = found.group(1) in self._wanted
            lines += [line] if self._shown else []
        return lines


def cmd_logs(args: Args) -> None:
    count, level = _number(args, "-n", 50, 0), args["--level"] or "debug"
    path = log_path(_gateway_of(args))
    if not path:
        raise CommandFailed(tr("log_unset"))
    reader, older, lines = LogReader(path, level), path + ".1", []
    try:
        if os.path.exists(older):
            lines = LogReader(older, level).fresh()
        lines += reader.fresh()
    except OSError as exc:
        raise CommandFailed(tr("log_missing", path=path, reason=reason_of(exc))) from None
    lines, pause = lines[-count:] if count else [], threading.Event()
    while True:
        for line in lines:
            print(_CONTROL.sub(" ", line), flush=True)
        if not args["--follow"]:
            return
        pause.wait(0.3)
        lines = []
        with contextlib.suppress(OSError):           # while it is rotated there is none
            lines = reader.fresh()


# --- asking ------------------------------------------------------------------

def _ask_running(settings: Settings, path: str = "/health", member: str = "iflow_logged_in",
                 body: Optional[Json] = None) -> Json:
    """The answer of the running server that these settings describe, {} where there is none."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    key = os.environ.get(KEY_VARIABLE) or settings.custom_api_key
    headers = {"X-Api-Key": key} if key else {}
    data = None if body is None else dump_json(body)
    try:
        with contextlib.closing(http.client.HTTPConnection(
                host, settings.port, timeout=60 if data else 5)) as connection:
            connection.request("POST" if data else "GET", path, data, headers)
            value = json.loads(connection.getresponse().read(8 << 20))
    except (OSError, http.client.HTTPException, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) and (member in value or data) else {}


def cmd_status(args: Args) -> int:
    gateway = _gateway_of(args)
    settings, router = gateway.settings, gateway.current().router
    health = _ask_running(settings)
    status = "healthy" if health.get("status") == "healthy" else "degraded"
    state = tr("running", status=tr_word(status), version=health.get("version"),
               in_flight=health.get("in_flight")) if health else tr("not_running")
    _row("server", f"http://{settings.host}:{settings.port}", state)
    _row("config", _config_of(args).path)
    for name, facts, problem in _provider_facts(router, health):
        for number, (text, _) in enumerate(_provider_rows(router, name, facts, problem)):
            _row("" if number else "provider", text)
    if _has_others(router, health):
        _row("note", tr("others_run"))
    elif not router.providers:
        _row("provider", tr("status_none"))
    for account, login in {**gateway.login_report(), **health.get("logins", {})}.items():
        _row("login", *map(one_line, _login_columns(account, login)))
    for offer in offered_presets(router, os.environ):
        _row("offer", offer)
    for problem in _further_problems(gateway.problems):
        _row("problem", one_line(problem, 300))
    return 0 if health else 1


def _login_columns(account: str, login: Json) -> List[str]:
    """A login for `status`."""
    end, refreshed = login.get("expires_at"), login.get("refreshed_at")
    state = tr("login_has_ended") if login.get("ended") else (
        tr("login_until", time=end) if end else tr("login_no_end"))
    did = "login_refreshed" if login.get("refresh_ok") else "login_refresh_failed"
    message = f"({login['message']})" if login.get("message") else ""
    return [account, state, "" if login.get("renewable") else tr("login_fixed"),
            tr(did, time=refreshed) if refreshed else "", message]


def _further_problems(problems: Iterable[str]) -> List[str]:
    """Without those of single providers, which stand beside the provider's name."""
    return [each for each in problems if not re.match(r"provider \S+ is disabled: ", each)]


def offered_presets(router: Router, environ: Mapping[str, str]) -> List[str]:
    """A sentence for each set key variable whose presets are not among the providers yet."""
    known = {preset_at(url) for provider in router.providers.values() for url in provider.roads}
    found: Dict[str, List[str]] = {}
    for name, preset in PRESETS.items():
        if preset.key and environ.get(preset.key):
            found.setdefault(preset.key, []).append(name)
    offers = []
    for variable, (name, *others) in found.items():
        if not known.intersection((name, *others)):
            text = tr("offered", variable=variable, name=name)
            offers.append(tr("offered_too", text=text, names=", ".join(others)) if others else text)
    return offers


def _models_there(settings: Settings) -> List[Json]:
    """The models of the running server; none where it wants a key that this command lacks."""
    told = _ask_running(settings, "/v1/models", "data") if _ask_running(settings) else {}
    return [each for each in entries_of(told, "data")
            if isinstance(each, dict) and {"id", "owned_by"} <= set(each)]


def cmd_models(args: Args) -> int:
    gateway = _gateway_of(args)
    models = _models_there(gateway.settings) if args["--upstream"] is None else []
    models = models or models_of(gateway)
    for model in models:
        print(f"{model['id']}  ({model['owned_by']})")
    if not models:
        say_problems(gateway.problems)
        say(tr("no_models"))
    return 0 if models else 1


def cmd_test(args: Args) -> int:
    """One tiny real request to each provider; `provider test` also tries a stream and tools."""
    gateway = _gateway_of(args)
    providers = gateway.current().router.providers
    name = args.get("PROVIDER") or args.get("NAME")
    if name and name not in providers:
        if name in PRESETS:
            raise UsageError(tr("no_provider_yet", name=name))
        raise unknown_name("provider", name, providers, "provider list")
    if not providers:
        say(tr("no_providers"))
    failed = not providers
    for each in [name] if name else providers:
        bad = ""
        good = _tried_there(gateway, each) if providers[each].problem else ""
        if not good:
            checks = examine(gateway, providers[each], whole=args["command"] == "provider",
                             in_english=CONSOLE.language == "en")
            good = ", ".join(check.message for check in checks if check.ok and check.message)
            good = good if all(check.ok for check in checks[:3]) else tr("broken")
            bad = ", ".join(check.message for check in checks if check.ok is False)
        say_problems(f"{each}: {text}" for text in providers[each].warnings)
        print(f"{each}: " + (with_why(good + ",", bad) if bad else good))
        failed |= bool(bad)
    return int(failed)


def _tried_there(gateway: Gateway, name: str) -> str:
    """A sentence if the running server gets an answer, else "": it may have variables that this
    shell lacks."""
    listed = _models_there(gateway.settings)
    model = next((each["id"] for each in listed if each["owned_by"] == name), "")
    body = {"model": model, "max_tokens": 16, "messages": [{"role": "user", "content": "Say hi."}]}
    path = "/v1/chat/completions"
    answer = _ask_running(gateway.settings, path, "choices", body) if model else {}
    return tr("works_there", model=model) if "choices" in answer else ""


# --- providers ---------------------------------------------------------------

def _provider_list(args: Args) -> None:
    gateway = _gateway_of(args)
    router = gateway.current().router
    found = _provider_facts(router, _ask_running(gateway.settings))
    for name, facts, problem in found:
        (text, _), *why = _provider_rows(router, name, facts, problem)
        print(with_why(text, why[0][0]) if why else text)
    say_problems(_further_problems(gateway.problems))
    if not found:
        say(tr("no_providers"))


def _provider_presets(args: Args) -> None:
    """All presets, or the addresses and models of one."""
    name = args["NAME"]
    if not name:
        print("\n".join(aligned([[name, CONSOLE.text(preset.titles), _key_column(preset),
                                  ", ".join(ROADS[road] for road in preset.roads)]
                                 for name, preset in PRESETS.items()])))
        say(tr("add_preset"))
        return
    preset = _preset(name)
    facts = (name, CONSOLE.text(preset.titles), _key_column(preset), preset.key_page)
    print("  ".join(filter(None, facts)))
    table = [[f"  {ROADS[road]}", url] for road, url in preset.roads.items()]
    print("\n".join(aligned(table)))
    table = [[f"  {model}", tr("context", size=facts["context"]),
              tr("output", size=facts["max_output"]), tr("images") if facts["vision"] else "",
              "/".join(facts["efforts"])] for model, facts in preset.models.items()]
    print("\n".join(aligned(table)) or "  " + tr("list_fetched"))


def _key_column(preset: Preset) -> str:
    is_set = tr("set") if os.environ.get(preset.key) else ""
    return f"${preset.key} {is_set}".rstrip() if preset.key else tr("no_key")


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise unknown_name("preset_name", name, PRESETS, "provider presets")
    return PRESETS[name]


def _new_provider(name: str, args: Args) -> Json:
    """The entry that the flags of `provider add` describe; UsageError."""
    url, chosen = args["--base-url"] or "", args["--preset"] or ""
    if chosen or name in PRESETS or not url:
        chosen = chosen or name
        _preset(chosen)
    entry = {"name": name, **entry_at(url, chosen)}
    variable = PRESETS[entry["preset"]].key if "preset" in entry else ""
    entry.update({field: value for field, value in (
        ("kind", args["--kind"]), ("models", _listed(args["--models"]))) if value})
    key = args["--api-key"]
    if key is None and variable:
        key = "$" + variable
    entry["api_keys"] = [] if key is None else [_stored_key(key, variable)]
    known = [each for each in entry["api_keys"]
             if not re.fullmatch(_REFERENCE, each) or os.environ.get(each[1:])]
    try:
        provider = parse_provider({**entry, "api_keys": known}, os.environ)
    except ValueError as exc:
        raise UsageError(f"provider add: {exc}") from None
    if provider.problem:
        raise UsageError(f"provider add {name}: {provider.problem}")
    say_problems(provider.warnings)
    if url and provider.base_url != url.strip():
        say(tr("taken_as", given=url, used=provider.base_url))
    return {**entry, "base_url": provider.base_url} if "base_url" in entry else entry


def _provider_add(args: Args) -> None:
    entry = _new_provider(_needed(args, "NAME", "provider presets"), args)
    _add_entry(args, "providers", entry, "provider_exists", "provider_added")


# --- env ---------------------------------------------------------------------

def cmd_env(args: Args) -> None:
    """Shell lines that point a client at this server: eval "$(python iflow2api.py env claude)"."""
    gateway = _gateway_of(args)
    settings, router = gateway.settings, gateway.current().router
    if not settings.port:
        raise UsageError(tr("port_free"))
    url, health = url_of(settings.host, settings.port), _ask_running(settings)
    if not health:
        say(tr("nobody_answers", url=url))
    its = str(health.get("default_model") or "")     # --demo and --upstream have their own
    model = args["--model"] or (its if its != router.default_model else "")
    key = settings.custom_api_key or ("$" + KEY_VARIABLE if settings.client_keys else "not-needed")
    words = {"URL": url, "KEY": key, "MODEL": model or router.default_model,
             **claude_words(router, model)}
    if not args["--json"]:
        guess = "fish" if os.environ.get("SHELL", "").endswith("/fish") else "bash"
        if os.name == "nt":
            guess = "powershell" if os.environ.get("PSModulePath") else "cmd"
        shell = SHELLS[args["--shell"] or guess]
        print("\n".join(_env_text(args["action"], shell, words)))
        return
    if key == "$" + KEY_VARIABLE:
        say(tr("your_key"))
        words["KEY"] = "YOUR_KEY"
    print(json_text({"env": env_values(args["action"], words)}))


def _env_text(client: str, shell: Shell, words: Mapping[str, str]) -> List[str]:
    """The lines for a shell, with hints as comments."""
    before = [tr("env_key", variable=KEY_VARIABLE)] if words["KEY"] == "$" + KEY_VARIABLE else []
    after = [tr("env_codex"), *file_text(client, words).split("\n")] if client == "codex" else []
    if not words["MODEL"]:
        after.append(tr("env_model", client=CLIENTS[client].title))
    return [*map(shell.comment.format, before), *env_lines(client, shell, words),
            *map(shell.comment.format, after)]


# --- logging in --------------------------------------------------------------

def cmd_login(args: Args) -> None:
    """Log in by the browser, or store a key."""
    text = args["--timeout"] or str(LOGIN_TIMEOUT_S)
    timeout_s = float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) else 0
    if not timeout_s:
        raise _bad_value("--timeout", text, tr("above", kind=tr("float"), low=0))
    gateway = Gateway(config=_config_of(args))
    try:
        if args["--api-key"] is not None:
            return _store_key(gateway, args)
        if args["--paste"] and sys.stdin is None:
            raise UsageError(tr("login_no_input"))
        found = gateway.logins.start(args["--account"] or "", args["--paste"], timeout_s)
        say(tr("login_open_this"))
        print(found["url"], flush=True)
        stay = args["--paste"] or args["--no-browser"]
        if not stay and not open_browser(found["url"], os.environ):
            say(tr("login_no_browser"))
        _wait_for_login(gateway, args["--paste"])
    except KeyboardInterrupt:
        say(tr("login_given_up"))
        raise
    finally:
        gateway.close()


def _wait_for_login(gateway: Gateway, paste: bool) -> None:
    """Wait for the browser, or for an address at the terminal, until the login has ended."""
    flow = gateway.logins.flow
    if flow is None:
        raise CommandFailed(tr("login_given_up"))
    if paste or sys.stdin is not None and sys.stdin.isatty():
        say(tr("login_paste_this"))
        threading.Thread(target=_read_pastes, args=(flow, sys.stdin.fileno(), paste),
                         name="paste", daemon=True).start()
    while not flow.ended.wait(0.5):      # on Windows Ctrl-C does not end a wait without a limit
        pass
    if flow.state != "done":
        raise CommandFailed(flow.message)
    say(flow.message.partition(";")[0])
    say(tr("login_stored", path=flow.file.path))
    above = _above_login(gateway) if flow.file.is_default else ""
    if above:
        say(marked("warning", tr("login_above", name=above)))


def _read_pastes(flow: LoginFlow, fd: int, final: bool) -> None:
    """Pass what is typed to the login, line by line.

    By os.read: a thread that waits in sys.stdin at exit would end in a crash.
    """
    typed = Lines()
    while not flow.ended.is_set():
        try:
            data = os.read(fd, 4096)
        except OSError:
            data = b""
        for line in filter(None, map(str.strip, typed.feed(data or b"\n"))):
            try:
                flow.paste(line)
            except LoginFailed as exc:
                if flow.state == "waiting":      # else _wait_for_login reports it
                    say(marked("error", exc.message))
                    say(tr("login_paste_again"))
        if not data:
            if final:
                flow.fail("the input ended before the login did; nothing was changed")
            return


def _above_login(gateway: Gateway) -> str:
    """The variable or file whose key takes precedence over the login, or ""."""
    variable = next((name for name in IFLOW_KEY_VARIABLES if os.environ.get(name)), "")
    if variable or not gateway.settings.api_key:
        return variable
    is_variable = gateway.origins.get("api_key") == "environment"
    return ENV_PREFIX + "API_KEY" if is_variable else tr("api_key_file")


def _store_key(gateway: Gateway, args: Args) -> None:
    """`login --api-key`: store the key in config.json, where it is encrypted."""
    key, account = _read_key(args["--api-key"]), args["--account"]
    if not account_keys({"": {"apiKey": key}}):
        raise UsageError(tr("key_blanks"))
    if account and account != DEFAULT_ACCOUNT:
        file = LoginFile(account, gateway.config)
        with file.held():
            file.update({**dict.fromkeys(LOGIN_FIELDS), "apiKey": key})
        say(tr("key_stored", key=mask(key), account=account, path=file.path))
        return
    _change_config(args, lambda raw: raw.update(api_key=key))


def cmd_logout(args: Args) -> None:
    """Remove the login, and nothing else, from its file."""
    gateway = Gateway(config=_config_of(args))
    account = args["--account"] or DEFAULT_ACCOUNT
    accounts = gateway.settings.accounts
    if account != DEFAULT_ACCOUNT and account not in accounts:
        raise unknown_name("account", account, accounts)
    try:
        gone = remove_login(gateway, account)
    finally:
        gateway.close()
    say(tr("logged_out" if gone else "no_login", account=account))


# --- config ------------------------------------------------------------------

def _setting_name(args: Args) -> str:
    name = _needed(args, "KEY", "config list")
    if name not in SETTING:
        raise unknown_name("setting", name, SETTING, "config list")
    return name


def _shown(name: str, value: Any, args: Args) -> str:
    value = value if args["--show-secrets"] else hide_secrets(name, value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _config_list(args: Args) -> None:
    """Each setting with its value and origin, and above it what it is for."""
    gateway = _gateway_of(args)
    for name, item in SETTING.items():
        title, hint = item.metadata["label"], item.metadata["hint"]
        about = CONSOLE.text(title)
        if hint:
            about = tr("hint", title=about, hint=CONSOLE.text(hint))
        if item.metadata.get("restart"):
            about = tr("at_start", text=about.rstrip(".。"))
        origin = gateway.origins.get(name)
        shown = _shown(name, getattr(gateway.settings, name), args)
        print(f"# {about}\n{name} = {shown}" + (f"    # {tr(origin)}" if origin else ""))
    say_problems(gateway.problems)


def _config_get(args: Args) -> None:
    name, gateway = _setting_name(args), _gateway_of(args)
    print(_shown(name, getattr(gateway.settings, name), args))
    say_problems(_further_problems(gateway.problems))


def _config_set(args: Args) -> None:
    name, text = _setting_name(args), args["VALUE"]
    if text is None:
        raise UsageError(tr("needs", command=f"config set {name}", what="VALUE"))
    if SETTING[name].metadata.get("secret") and text[:1] in ("-", "$"):
        text = _read_key(text)
    value = _parse_for(f"config set {name}", name, text)
    if name == "upstream_proxy":
        _check_proxy(args, value)
    if name in ("providers", "aliases"):                 # checked together: aliases name providers
        gateway = _gateway_of(args)
        known = gateway.state.router.warnings
        router = gateway.routed(replace(gateway.settings, **{name: value}))
        new = [problem for problem in router.warnings if problem not in known]
        if new:
            raise UsageError(f"config set {name}: {new[0]}")
    done = "saved_for_later" if SETTING[name].metadata.get("restart") else "saved_in"
    _change_config(args, lambda raw: raw.update({name: value}), done)


def _check_proxy(args: Args, proxy: str) -> None:
    """UsageError for a proxy that can't work; a hint if upstream_proxy_enabled is off."""
    wanted = Settings(upstream_proxy=proxy, upstream_proxy_enabled=True)
    problems = proxy_warnings(wanted, ())
    if problems:
        raise UsageError(problems[0])
    if proxy and not _gateway_of(args).settings.upstream_proxy_enabled:
        say(tr("proxy_is_off"))


def _config_unset(args: Args) -> None:
    if args["KEY"] not in _config_of(args).recover()[0]:     # an unknown key may go, too
        _setting_name(args)
    _change_config(args, lambda raw: raw.pop(args["KEY"], None))


def _config_encrypt(args: Args) -> int:
    """`config encrypt on|off`; without either it prints which."""
    config, mode = _config_of(args), args["KEY"] or ""
    if mode not in ("", "on", "off"):
        raise _bad_value("config encrypt", mode, tr("one_of", choices="on, off"))
    if not mode:
        gateway = _gateway_of(args)
        print("on" if gateway.settings.encrypt_secrets else "off")
        locked = gateway.config.unreadable if gateway.config else []
    else:
        with _writing(config.path):
            locked = config.encrypt(mode == "on")
        say(tr(f"encrypt_{mode}", path=config.path))
        if not config.count_secrets():
            say(tr("encrypt_none"))
    for problem in locked:
        say(marked("problem", tr("left", text=one_line(problem, 300))))
    return 1 if locked else 0


def _config_path(args: Args) -> None:
    print(_config_of(args).path)


# --- the page's password -----------------------------------------------------

def cmd_admin(args: Args) -> None:
    """`admin reset-password`: a running server takes it over and ends all sessions."""
    if args["-"] not in (None, "-"):
        raise UsageError(tr("password_shown"))
    password = _input_line() if args["-"] else _ask_password()
    try:
        stored = hash_password(password)
    except ValueError:
        low, high = PASSWORD_LENGTH
        raise UsageError(tr("password_length", low=low, high=high)) from None
    _change_config(args, lambda raw: raw.update(admin_password=stored), "password_set")
    if os.environ.get(ENV_PREFIX + "ADMIN_PASSWORD"):
        say(marked("warning", tr("password_above", variable=ENV_PREFIX + "ADMIN_PASSWORD")))


def _ask_password() -> str:
    """A password, typed twice at the terminal without echo."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(tr("no_terminal"))
    import getpass
    password = getpass.getpass(tr("new_password") + " ")
    if password != getpass.getpass(tr("same_again") + " "):
        raise UsageError(tr("not_the_same"))
    return password


# --- routes, keys, usage -----------------------------------------------------

def cmd_routes(args: Args) -> None:
    """`routes explain MODEL`: where the name goes, and why."""
    asked: Json = {name: args["--" + name] for name in ("images", "thinking", "tools")}
    asked.update(model=args["MODEL"], dialect=args["--dialect"] or "chat",
                 tokens=_number(args, "--tokens", 0, 0))
    gateway = _gateway_of(args)
    told = explain(gateway, asked, args["--json"] or CONSOLE.language == "en")
    if args["--json"]:
        print(json_text(told))
        return
    for number, step in enumerate(told["steps"], 1):
        print(f"{number}. {one_line(step, 500)}")
    for number, target in enumerate(told["chain"]):
        keys = tr("count_keys", count=target["keys"])
        state = one_line(target["problem"]) or f"{target['base_url']}  {keys}"
        name = f"{target['provider']}/{one_line(target['model'])}"
        print(f"{tr('then') if number else '=>'} {name}  {state}")
    say_problems(_further_problems(gateway.problems))


def _key_add(args: Args) -> None:
    """Make a key: it is printed once, only its hash is kept."""
    name = _needed(args, "NAME", "key list")
    flags = {limit: "--" + limit.replace("_", "-") for limit in LIMIT_FIELDS}
    facts: Json = {limit: _amount(args, flag) if limit in BUDGETS else _number(args, flag, 0, 1)
                   for limit, flag in flags.items() if args[flag] is not None}
    if args["--models"]:
        facts["models"] = _listed(args["--models"])
    if args["--expires"]:
        facts["expires"] = args["--expires"]
    try:
        key, entry = make_client_key(name, facts)
    except ValueError as exc:
        raise UsageError(f"key add {name}: {exc}") from None
    _add_entry(args, "client_keys", entry, "key_exists", "saved_in")
    print(key)
    say(tr("key_shown_once"))
    say_problems(_further_problems(_gateway_of(args).problems))


def _key_remove(args: Args) -> None:
    _remove_entry(args, "client_keys", "key")
    if not _gateway_of(args).state.auth.required:
        say(marked("warning", tr("last_key")))


def _key_list(args: Args) -> None:
    gateway = _gateway_of(args)
    used = {row["key"]: row for row in gateway.ledger.report("key", 1, {})}
    for key in gateway.state.auth.keys:
        facts = {f"limit_{limit}": str(count) for limit, count in key.limits.items()}
        facts["key_models"] = ", ".join(key.models)
        if key.expires_at != float("inf"):
            at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(key.expires_at))
            facts["expired" if key.expires_at <= time.time() else "expires"] = at
        told = [tr("named", name=tr_word(which), value=fact)
                for which, fact in facts.items() if fact]
        row = used.get(key.name)
        if row:
            told.append(tr("used_today", requests=row["requests"],
                           tokens=row["input"] + row["output"]))
        print(f"{key.name}  {key.digest.hex()[:8]}  {'; '.join(told or [tr('unlimited')])}")
    say_problems(_further_problems(gateway.problems))
    if not gateway.settings.client_keys:
        say(tr("no_keys"))


def cmd_usage(args: Args) -> None:
    """The usage that usage.jsonl holds."""
    gateway, days = _gateway_of(args), _number(args, "--days", 30, 1, 9999)
    report = usage_report(gateway, args["--by"] or "model", days)
    say_problems(gateway.ledger.problems)
    if not report["enabled"]:
        say(tr("usage_not_counted"))
    if args["--json"]:
        print(json_text(report))
    else:
        print(usage_csv(report) if args["--csv"] else _usage_table(report))


def _usage_table(report: Json) -> str:
    """Aligned columns; `≈` marks estimates."""
    rows, total = report["rows"], report["total"]
    if not rows:
        return tr("usage_none")
    figures = {"requests": "{}", "errors": "{}", "input": "≈{}", "output": "≈{}", "cached": "{}",
               "reasoning": "{}", "first_s": "{:.2f}s", "total_s": "{:.2f}s", "cost": "{:.4f}"}
    if total["cost"] is None:
        del figures["cost"]
    table = [[tr(report["by"]), *(tr("usage_" + which) for which in figures)]]
    sums = [{**total, "name": tr("usage_sum")}] if len(rows) > 1 else []
    for row in rows + sums:
        shown = ["-" if row[which] is None else form.format(row[which])
                 for which, form in figures.items()]
        table.append([one_line(row["name"], 60) or "-", *(
            text if row["estimated"] else text.lstrip("≈") for text in shown)])
    return "\n".join([*aligned(table, is_right=True),
                      *[tr("usage_estimated")] * bool(total["estimated"]),
                      *[tr("usage_unpriced", names=", ".join(report["unpriced"]))] * bool(
                          report["unpriced"])])


# --- main --------------------------------------------------------------------

def cmd_version(args: Args) -> None:
    print(f"iflow2api {__version__} (Python {sys.version.split()[0]}, {sys.platform})")


#: `command` or `command action` -> its function, which returns the exit status if it is not 0; an
#: action without a row is the command's.
COMMANDS: Dict[str, Callable[[Args], Optional[int]]] = {
    "serve": cmd_serve, "login": cmd_login, "logout": cmd_logout,
    "provider": _provider_list, "provider add": _provider_add,
    "provider remove": partial(_remove_entry, where="providers", kind="provider"),
    "provider test": cmd_test, "provider presets": _provider_presets, "test": cmd_test,
    "config": _config_list, "config get": _config_get, "config set": _config_set,
    "config unset": _config_unset, "config path": _config_path, "config encrypt": _config_encrypt,
    "key": _key_list, "key add": _key_add, "key remove": _key_remove, "routes": cmd_routes,
    "env": cmd_env, "admin": cmd_admin, "status": cmd_status, "models": cmd_models,
    "usage": cmd_usage, "logs": cmd_logs, "version": cmd_version}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; 0 done, 1 failed, 2 used wrongly."""
    prepare_process()
    argv = list(sys.argv[1:] if argv is None else argv)
    CONSOLE.set_up(argv, os.environ)
    status = 0
    try:
        args = _parse_args(argv)
        name = args["command"]
        if args.get("--help"):
            print(help_of(name))
        else:
            name = "version" if args.get("--version") else name
            status = COMMANDS.get(f"{name} {args.get('action')}", COMMANDS[name])(args) or 0
        if sys.stdout is not None and name != "serve":
            sys.stdout.flush()
    except UsageError as exc:
        say(marked("error", exc))
        status = 2
    except (CommandFailed, GatewayError, ConfigBroken, CannotDecrypt) as exc:
        say(marked("error", exc))
        status = 1
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:              # `| head`
        pass
    except OSError as exc:               # such as a full disk under stdout
        say(marked("error", reason_of(exc) + (f": {exc.filename}" if exc.filename else "")))
        status = 1
    _give_up_output()
    return status


def _give_up_output() -> None:
    """Drop output that can't be written: Python would replace the exit status at its end."""
    for number, stream in enumerate((sys.stdout, sys.stderr), 1):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


if __name__ == "__main__":
    sys.exit(main())
