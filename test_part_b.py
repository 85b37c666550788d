"""Proxies, console, help, errors of the command line, completion."""
import ast
import base64
import contextlib
import io
import json
import os
import re
import select
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import iflow2api as ifl

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "iflow2api.py")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of its own, and an environment in which nothing speaks Chinese or knows a proxy."""
    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name.startswith(("IFLOW", "LC_")) or name in ("LANG", "LANGUAGE", "NO_COLOR"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("LANG", "C.UTF-8")
    yield tmp_path
    ifl.log.handlers[:] = [ifl.logging.NullHandler()]


# --- proxies -----------------------------------------------------------------

class Hello(BaseHTTPRequestHandler):
    """An upstream that says who it is and counts its connections."""
    protocol_version = "HTTP/1.1"

    def setup(self):
        self.server.connections += 1
        super().setup()

    def do_GET(self):
        body = json.dumps({"host": self.headers["Host"], "path": self.path,
                           "leaked": [n for n in self.headers if n.lower().startswith("proxy")]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hello():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    server.daemon_threads, server.connections = True, 0
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class FakeProxy:
    """A proxy on the loopback: `serve(sock)` talks to one client on a thread of its own; every name leads to `target`."""

    def __init__(self, target=None, user=None, password=None, answer=None):
        self.target, self.login, self.answer = target, (user, password), answer
        self.seen, self.logins, self.open = [], [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
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
        user, password = self.login
        if user is not None and self.logins[-1] != f"{user}:{password}":
            return sock.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        for piece in (b"HTTP/1.1 200 Connection est", b"ablished\r\nVia: test\r\n\r", b"\n"):
            sock.sendall(piece)
        self.relay(sock)


class SocksProxy(FakeProxy):
    def serve(self, sock):
        file = sock.makefile("rb")
        if self.answer is not None:
            file.read(2)
            return None if self.answer == b"hang" else sock.sendall(self.answer)
        version, count = file.read(2)
        methods = file.read(count)
        wanted = 2 if self.login[0] is not None else 0
        if version != 5 or wanted not in methods:
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
        if kind == 3:
            host = file.read(file.read(1)[0]).decode()
        else:
            host = socket.inet_ntop(socket.AF_INET if kind == 1 else socket.AF_INET6, file.read(4 if kind == 1 else 16))
        self.seen.append((kind, host, struct.unpack(">H", file.read(2))[0]))
        reply = getattr(self, "reply", 0)
        sock.sendall(bytes([5, reply, 0, 3, 4]) + b"here\0\7" if reply == 0 else bytes([5, reply]))
        if reply == 0:
            self.relay(sock)


@pytest.fixture
def proxy(hello):
    """Makes proxies that lead every name to the upstream `hello`."""
    made = []

    def make(kind, *args, **facts):
        made.append(kind(hello.server_address, *args, **facts))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def upstream():
    made = ifl.Upstream()
    yield made
    made.close()


def ask(upstream, base_url="http://model.test:8000/v1", proxy="", times=1, **settings):
    """GET base_url/models as the gateway would, `times` over; the last answer."""
    provider = ifl.Provider("p", base_url, proxy=proxy)
    settings = ifl.Settings(**{"connect_timeout_s": 5.0, **settings})
    for _ in range(times):
        with upstream.open(provider, settings, "GET", "/models", (), None) as exchange:
            answer = json.loads(exchange.read_all(1 << 20))
    return answer


def refused(upstream, *args, **facts):
    """The error of `ask`, after a look at what every such error owes: one line without the password."""
    with pytest.raises(ifl.UpstreamError) as caught:
        ask(upstream, *args, **facts)
    text = caught.value.message
    assert "\n" not in text and "hunter2" not in text and "model.test" in text
    return caught.value


def test_connect_tunnels_plain_http_and_keeps_the_connection(upstream, proxy, hello):
    made = proxy(ConnectProxy)
    answer = ask(upstream, proxy=f"http://127.0.0.1:{made.port}", times=3)
    assert answer == {"host": "model.test:8000", "path": "/v1/models", "leaked": []}
    assert made.seen == ["model.test:8000"] and hello.connections == 1 and made.logins == [None]


def test_connect_sends_decoded_credentials(upstream, proxy):
    made = proxy(ConnectProxy, "me@home", "hunter2:x/é")
    ask(upstream, proxy=f"http://me%40home:hunter2%3Ax%2F%C3%A9@127.0.0.1:{made.port}")
    assert made.logins == ["me@home:hunter2:x/é"]


def test_connect_with_tls_checks_the_upstream_not_the_proxy(upstream, proxy):
    made = proxy(ConnectProxy)
    error = refused(upstream, "https://model.test/v1", f"127.0.0.1:{made.port}")
    assert made.seen == ["model.test:443"] and "it does not speak TLS" in error.message and "through the proxy" in error.message


@pytest.mark.parametrize("host,place", [("[2001:db8::1]:9", "[2001:db8::1]:9"), ("münchen.test:9", "xn--mnchen-3ya.test:9")])
def test_connect_names_the_host_as_http_wants_it(upstream, proxy, host, place):
    made = proxy(ConnectProxy)
    ask(upstream, f"http://{host}/v1", f"http://127.0.0.1:{made.port}")
    assert made.seen == [place]


def test_socks5h_leaves_the_name_to_the_proxy(upstream, proxy, hello, monkeypatch):
    made = proxy(SocksProxy)
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: pytest.fail(host) if "test" in str(host) else real(host, *a, **k))
    assert ask(upstream, proxy=f"socks5h://127.0.0.1:{made.port}", times=2)["path"] == "/v1/models"
    assert made.seen == [(3, "model.test", 8000)] and hello.connections == 1


def test_socks5_resolves_here_and_prefers_ipv4(upstream, proxy, monkeypatch):
    made = proxy(SocksProxy)
    real = socket.getaddrinfo
    found = [(socket.AF_INET6, 1, 6, "", ("2001:db8::1", 8000, 0, 0)), (socket.AF_INET, 1, 6, "", ("192.0.2.7", 8000))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: found if host == "model.test" else real(host, *a, **k))
    ask(upstream, proxy=f"socks5://127.0.0.1:{made.port}")
    assert made.seen == [(1, "192.0.2.7", 8000)]


def test_socks5_name_unknown_here(upstream, proxy, monkeypatch):
    made = proxy(SocksProxy)
    real = socket.getaddrinfo

    def lookup(host, *args, **kwargs):
        if host == "model.test":
            raise socket.gaierror(-2, "Name or service not known")
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert "socks5h://" in refused(upstream, proxy=f"socks5://127.0.0.1:{made.port}").message


@pytest.mark.parametrize("url,kind,host", [("http://192.0.2.1/v1", 1, "192.0.2.1"), ("http://[2001:db8::5]/v1", 4, "2001:db8::5")])
def test_socks_takes_addresses_as_they_are(upstream, proxy, url, kind, host):
    made = proxy(SocksProxy)
    ask(upstream, url, f"socks5h://127.0.0.1:{made.port}")
    assert made.seen == [(kind, host, 80)]


def test_socks_login(upstream, proxy):
    made = proxy(SocksProxy, "me", "hunter2")
    ask(upstream, proxy=f"socks5h://me:hunter2@127.0.0.1:{made.port}")
    assert made.logins == [("me", "hunter2")]
    error = refused(upstream, proxy=f"socks5h://me:hunter22@127.0.0.1:{made.port}")
    assert "refused the user and password" in error.message and error.should_retry is False
    error = refused(upstream, proxy=f"socks5h://127.0.0.1:{made.port}")
    assert f"write socks5h://USER:PASSWORD@127.0.0.1:{made.port}" in error.message
    error = refused(upstream, proxy=f"socks5h://{'u' * 256}:x@127.0.0.1:{made.port}")
    assert "255" in error.message or "wants" in error.message


@pytest.mark.parametrize("reply,words", [(1, "no stated reason"), (2, "does not allow"), (5, "upstream refused"), (99, "code 99")])
def test_socks_replies_have_words(upstream, proxy, reply, words):
    made = proxy(SocksProxy)
    made.reply = reply
    assert words in refused(upstream, proxy=f"socks5h://127.0.0.1:{made.port}").message


@pytest.mark.parametrize("kind,scheme,answer,words", [
    (ConnectProxy, "http", b"HTTP/1.1 407 Nope\r\n\r\n", "refused the user and password"),
    (ConnectProxy, "http", b"HTTP/1.1 403 Forbidden\r\n\r\n", "does not allow this host or port"),
    (ConnectProxy, "http", b"HTTP/1.1 405 Method Not Allowed\r\n\r\n", "is it an HTTP proxy?"),
    (ConnectProxy, "http", b"HTTP/1.1 502 Bad Gateway\r\nA: b\r\n\r\nsorry", "it can't reach the upstream"),
    (ConnectProxy, "http", b"HTTP/1.1 418 Teapot\r\n\r\n", "HTTP 418"),
    (ConnectProxy, "http", b"HTTP/1.1 200 OK\r\n\r\n<html>", "a page of its own"),
    (ConnectProxy, "http", b"220 mail.test ESMTP\r\n", "not HTTP"),
    (ConnectProxy, "http", b"HTTP/2 200\r\n\r\n", "not HTTP/1.1"),
    (ConnectProxy, "http", b"", "closed the connection without an answer; is it an HTTP proxy?"),
    (ConnectProxy, "http", b"HTTP/1.1 200 OK\r\nA: " + b"a" * 70000, "not HTTP"),
    (SocksProxy, "socks5h", b"HTTP/1.1 400 Bad Request\r\n\r\n", "write http://"),
    (SocksProxy, "socks5h", b"\4\0", "not SOCKS5"),
    (SocksProxy, "socks5h", b"\5", "is it a SOCKS5 proxy?"),
    (SocksProxy, "socks5h", b"\5\xff", "refused the user and password"),
    (SocksProxy, "socks5h", b"", "closed the connection without an answer; is it a SOCKS5 proxy?")])
def test_what_is_no_proxy_is_named(upstream, proxy, kind, scheme, answer, words):
    made = proxy(kind, answer=answer)
    error = refused(upstream, proxy=f"{scheme}://me:hunter2@127.0.0.1:{made.port}")
    assert isinstance(error, ifl.UpstreamUnreachable) and words in error.message
    assert f"{scheme}://127.0.0.1:{made.port}" in error.message and "me:" not in error.message


def test_a_proxy_that_wants_credentials_says_how_to_give_them(upstream, proxy):
    made = proxy(ConnectProxy, "me", "hunter2")
    error = refused(upstream, proxy=f"http://127.0.0.1:{made.port}")
    assert f"write http://USER:PASSWORD@127.0.0.1:{made.port}" in error.message and error.should_retry is False


@pytest.mark.parametrize("kind,scheme", [(ConnectProxy, "http"), (SocksProxy, "socks5h")])
def test_a_proxy_that_hangs(upstream, proxy, kind, scheme):
    made = proxy(kind, answer=b"hang")
    started = time.monotonic()
    error = refused(upstream, proxy=f"{scheme}://me:hunter2@127.0.0.1:{made.port}", connect_timeout_s=0.2)
    assert isinstance(error, ifl.UpstreamTimeout) and "connect_timeout_s" in error.message and time.monotonic() - started < 3


def test_a_proxy_that_drips_is_given_up_in_time(upstream, proxy):
    class Drip(ConnectProxy):
        def serve(self, sock):
            sock.sendall(b"HTTP/1.1 200 OK\r\nA: ")
            gone = threading.Event()
            while not gone.wait(0.02):
                sock.sendall(b"a")

    started = time.monotonic()
    error = refused(upstream, proxy=f"http://127.0.0.1:{proxy(Drip).port}", connect_timeout_s=0.2)
    assert isinstance(error, ifl.UpstreamTimeout) and time.monotonic() - started < 3


def test_a_proxy_that_refuses(upstream):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    error = refused(upstream, proxy=f"http://me:hunter2@127.0.0.1:{port}")
    assert isinstance(error, ifl.UpstreamUnreachable) and f"the proxy http://127.0.0.1:{port}: connection refused" in error.message


@pytest.mark.parametrize("address", [
    "ftp://me:hunter2@h:1", "https://me:hunter2@h:1", "socks://h", "http://", "http://me:hunter2#@h:1", "http://me:12/hunter2@h",
    "http://h:99999", "http://[me:hunter2@h", "me:hunter2@h/x://", "http://me:hunter2@h:1/path", "http://h h:1"])
def test_a_bad_proxy_address_is_named_without_its_password(upstream, address):
    error = refused(upstream, proxy=address)
    assert isinstance(error, ifl.UpstreamUnreachable) and error.should_retry is False and "write " in error.message
    problems = ifl.proxy_problems(ifl.Settings(upstream_proxy=address, upstream_proxy_enabled=True), [ifl.Provider("p", proxy=address)])
    assert len(problems) == 2 and "hunter2" not in "".join(problems)


def test_global_proxy_needs_its_switch_and_a_providers_own_comes_first(upstream, proxy):
    everyone, own = proxy(ConnectProxy), proxy(ConnectProxy)
    address = f"http://127.0.0.1:{everyone.port}"
    ask(upstream, upstream_proxy=address, upstream_proxy_enabled=True)
    assert len(everyone.seen) == 1
    ask(upstream, proxy=f"http://127.0.0.1:{own.port}", upstream_proxy=address, upstream_proxy_enabled=True)
    assert len(everyone.seen) == 1 and len(own.seen) == 1
    assert ifl.proxy_for(ifl.Provider("p"), ifl.Settings(upstream_proxy=address), ifl.Endpoint.of("http://model.test/v1")) == ""


def test_the_pool_keeps_ways_apart(upstream, proxy):
    one, two = proxy(ConnectProxy), proxy(SocksProxy)
    for _ in range(2):
        ask(upstream, proxy=f"http://127.0.0.1:{one.port}")
        ask(upstream, proxy=f"socks5h://127.0.0.1:{two.port}")
    assert len(one.seen) == len(two.seen) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_never_proxied(upstream, hello, monkeypatch, host):
    monkeypatch.setenv("ALL_PROXY", "http://192.0.2.1:9")
    for proxy in ("http://192.0.2.1:9", "env"):
        assert ask(upstream, f"http://{host}:{hello.server_port}/v1", proxy)["path"] == "/v1/models"


@pytest.mark.parametrize("variables,url,used", [
    ({"HTTP_PROXY": "P"}, "http://model.test/v1", True), ({"http_proxy": "P"}, "http://model.test/v1", True),
    ({"HTTPS_PROXY": "P"}, "https://model.test/v1", True), ({"https_proxy": "P"}, "https://model.test/v1", True),
    ({"HTTPS_PROXY": "P"}, "http://model.test/v1", False), ({"ALL_PROXY": "P"}, "https://model.test/v1", True),
    ({"all_proxy": "P"}, "http://model.test/v1", True), ({"ALL_PROXY": "P", "NO_PROXY": "*"}, "http://model.test/v1", False),
    ({"ALL_PROXY": "P", "NO_PROXY": "other.test, .test"}, "http://model.test/v1", False),
    ({"ALL_PROXY": "P", "no_proxy": "model.test:80"}, "http://model.test/v1", False),
    ({"ALL_PROXY": "P", "no_proxy": "model.test:81"}, "http://model.test/v1", True)])
def test_env_reads_the_usual_variables(monkeypatch, variables, url, used):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("urllib.request.getproxies", __import__("urllib.request").request.getproxies_environment)
    found = ifl.proxy_for(ifl.Provider("p", url, proxy="env"), ifl.Settings(), ifl.Endpoint.of(url))
    assert found == ("P" if used else "")


def test_env_end_to_end(upstream, proxy, monkeypatch):
    made = proxy(SocksProxy)
    monkeypatch.setenv("ALL_PROXY", f"socks5h://127.0.0.1:{made.port}")
    ask(upstream, upstream_proxy="env", upstream_proxy_enabled=True)
    assert made.seen == [(3, "model.test", 8000)]


def test_our_own_port_is_no_proxy():
    gateway = ifl.Gateway(ifl.Settings(providers=[{"name": "p", "base_url": "http://model.test/v1", "proxy": "http://127.0.0.1:1"}]))
    with ifl.serve(gateway, port=0) as server:
        for settings in (ifl.Settings(), ifl.Settings(port=server.port)):
            upstream = gateway.upstream if settings.port != server.port else ifl.Upstream()
            with pytest.raises(ifl.UpstreamUnreachable) as caught:
                with upstream.open(ifl.Provider("p", "http://model.test/v1", proxy=f"http://localhost:{server.port}"), settings,
                                   "GET", "/models", (), None):
                    pass
            assert "this program's own address" in caught.value.message and "proxy" in caught.value.message


def test_bad_proxies_are_told_at_the_start(home):
    folder = home / ".iflow2api"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "upstream_proxy": "ftp://me:hunter2@h", "upstream_proxy_enabled": True,
        "providers": [{"name": "p", "base_url": "https://model.test", "proxy": "gopher://x"}]}))
    gateway = ifl.Gateway(config=ifl.ConfigFile(str(folder)))
    assert len(gateway.problems) == 2 and "hunter2" not in "".join(gateway.problems)
    gateway.close()


@pytest.mark.parametrize("text,shown", [
    ("http://127.0.0.1:28000/v1", "http://127.0.0.1:28000/v1"), ("socks5://me:hunter2@h:1080", "socks5://me:…@h:1080"),
    ("http://token@h:1", "http://…@h:1"), ("at http://u:a@h and http://u:b/c@h", "at http://u:…@h and http://u:…@h")])
def test_redaction_hides_credentials_and_leaves_ports(text, shown):
    assert ifl.redact(text) == shown
