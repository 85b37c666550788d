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


# --- the console -------------------------------------------------------------

def run(*argv, **environ):
    """The program as a process: (status, stdout, stderr)."""
    done = subprocess.run([sys.executable, PROGRAM, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8", **environ}, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def main(capsys, *argv):
    status = ifl.main(list(argv))
    said = capsys.readouterr()
    return status, said.out, said.err


@contextlib.contextmanager
def running(*argv, terminal=False, **environ):
    """`serve` as a process, its first line read; on a pseudo terminal if wanted.  Yields (process, url, rest of stderr's fd)."""
    reader, writer = __import__("pty").openpty() if terminal else os.pipe()
    process = subprocess.Popen([sys.executable, PROGRAM, "--port", "0", *argv], stdout=subprocess.PIPE, stderr=writer,
                               env={**os.environ, "PYTHONIOENCODING": "utf-8", **environ})
    os.close(writer)
    try:
        first = process.stdout.readline().decode()
        assert first.startswith(f"iflow2api {ifl.__version__} listening on http://"), first
        yield process, first.split()[-1], reader
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
        os.close(reader)


def card_of(reader):
    """stderr up to the blank line that ends the card."""
    said = b""
    while not re.search(rb"(^|\n)\r?\n.+\n\r?\n", said.replace(b"\r", b""), re.S):
        said += read_some(reader)
    return said.decode()


def read_some(reader):
    assert select.select([reader], [], [], 20)[0], "nothing more is said"
    data = os.read(reader, 65536)
    assert data, "the program ended"
    return data


PROVIDERS = json.dumps([{"name": "zhipu", "base_url": "https://open.bigmodel.cn/api/paas/v4", "api_keys": ["$NOT_SET"]},
                        {"name": "other", "base_url": "https://a-host-with-a-long-name.example.com/" + "path/" * 20}])


@pytest.mark.parametrize("locale,words", [("C.UTF-8", ("address", "providers", "next", "disabled")),
                                          ("zh_CN.UTF-8", ("地址", "上游", "下一步", "已停用"))])
def test_the_card_fits_and_speaks(locale, words):
    with running(LC_ALL=locale, IFLOW2API_PROVIDERS=PROVIDERS, IFLOW2API_CUSTOM_API_KEY="sk-0123456789abcdef") as (_, url, reader):
        card = card_of(reader)
    assert all(word in card for word in (*words, url, "zhipu", "other")), card
    assert "\x1b" not in card and "0123456789" not in card and ("/admin" in card) == ("/admin" in ifl.ROUTES)
    for line in card.splitlines():
        assert ifl.columns_of(line) <= 80 or ":" in line[:6], line       # log lines bear a time
    starts = {ifl.columns_of(re.match(r"  \S+ +", line).group()) for line in card.splitlines() if re.match(r"  \S+ ", line)}
    assert len(starts) == 1, card


@pytest.mark.skipif(os.name == "nt", reason="no pseudo terminals")
@pytest.mark.parametrize("environ,colours", [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False),
                                             ({"TERM": "xterm", "NO_COLOR": "1"}, False)])
def test_colours_on_terminals_only(environ, colours):
    with running(terminal=True, **environ) as (_, url, reader):
        card = card_of(reader)
    assert ("\x1b[" in card) == colours and url in card


def test_the_card_of_an_open_gateway_shows_its_new_key():
    with running("--host", "0.0.0.0") as (_, url, reader):
        card = card_of(reader)
    assert re.search(r"sk-[0-9a-f]{48}", card) and all(len(line) <= 80 or line[2] == ":" for line in card.splitlines())


def test_many_providers_are_not_all_on_the_card():
    providers = [{"name": f"p{n}", "base_url": "http://h.test"} for n in range(30)]
    gateway = ifl.Gateway(ifl.Settings(providers=providers))
    with ifl.serve(gateway, port=0) as server:
        card = ifl._card(gateway, server, True)
    assert len(card) < 20 and "22 more" in "\n".join(card)


@pytest.mark.parametrize("environ,language", [
    ({"LC_ALL": "zh_CN.UTF-8"}, "zh"), ({"LC_ALL": "en_US.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
    ({"LC_MESSAGES": "zh_TW.UTF-8", "LANG": "en_US.UTF-8"}, "zh"), ({"LANG": "zh_CN"}, "zh"), ({"LANG": "C"}, "en"), ({}, "en"),
    ({"LANG": "zh_CN", "IFLOW2API_LANGUAGE": "en"}, "en"), ({"IFLOW2API_LANGUAGE": "zh"}, "zh"),
    ({"IFLOW2API_LANGUAGE": "fr", "LANG": "zh_CN"}, "zh")])
def test_language_by_variables(environ, language):
    assert ifl.find_language([], environ) == language


@pytest.mark.parametrize("argv", [["--config-dir", "DIR"], ["status", "--config-dir=DIR"]])
@pytest.mark.parametrize("text,language", [('{"language": "zh"}', "zh"), ('{"language": ["zh"]}', "en"), ("{", "en"), ("[]", "en")])
def test_language_by_setting(tmp_path, argv, text, language):
    (tmp_path / "config.json").write_text(text)
    assert ifl.find_language([word.replace("DIR", str(tmp_path)) for word in argv], {"LANG": "en_US"}) == language


def test_a_console_that_lacks_characters():
    status, out, err = run("nope", LC_ALL="zh_CN.UTF-8", PYTHONIOENCODING="ascii")
    assert status == 2 and err.startswith("error: there is no command")
    done = subprocess.run([sys.executable, PROGRAM, "nope"], stderr=subprocess.PIPE, timeout=60,
                          env={**os.environ, "LC_ALL": "zh_CN.GBK", "PYTHONIOENCODING": "gbk"})
    assert done.stderr.decode("gbk").startswith("错误：")
    for encoding, shown in (("ascii", "a -> b... \\u4e2d (x)"), ("gbk", "a → b… 中（x）"), ("cp437", "a -> b... \\u4e2d (x)")):
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding)), contextlib.redirect_stderr(sys.stderr):
            ifl.Console().set_up([], {})
            print("a → b… 中（x）", end="", flush=True)
            assert sys.stdout.buffer.getvalue().decode(encoding).rstrip() == shown


@pytest.mark.parametrize("text,columns,lines", [
    ("one two three", 7, ["one two", "three"]), ("", 10, [""]), ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
    ("中文很长很长", 6, ["中文很", "长很长"]), ("中文，很长", 6, ["中文，", "很长"]), ("ab 中文", 4, ["ab", "中文"])])
def test_wrapping(text, columns, lines):
    assert ifl.wrap(text, columns) == lines
    assert all(ifl.columns_of(line) <= columns for line in lines)


def test_cutting_and_widths():
    assert ifl.columns_of("a中，b") == 6 and ifl.cut_to("中文字符很多", 9) == "中文字..." and ifl.cut_to("ab", 2) == "ab"


def test_texts_are_whole():
    source = open(PROGRAM, encoding="utf-8").read()
    for key, (zh, en) in ifl.TEXTS.items():
        assert zh.strip() and en.strip()
        assert set(re.findall(r"\{(\w+)", zh)) - {"command"} == set(re.findall(r"\{(\w+)", en)) - {"command"}, key
    used = set(re.findall(r"""\btr\(["'](\w+)["'][,)]""", source)) | {group for group, _ in ifl.COMMAND_GROUPS}
    used |= {key for _, key in ifl._COMPLAINTS} | {"kind_" + kind for kind in ifl._KINDS}
    assert used == set(ifl.TEXTS), used ^ set(ifl.TEXTS)


# --- the log file ------------------------------------------------------------

def test_log_file_is_private_bounded_and_without_secrets(home):
    with running(IFLOW2API_LOG_FILE="logs/a.log", IFLOW2API_PROVIDERS='[{"name": "x"}]') as (_, url, reader):
        card_of(reader)
    path = home / ".iflow2api" / "logs" / "a.log"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO iflow2api .* starts\n.* WARNING provider x is disabled", path.read_text())
    handler = ifl._open_log(str(home / "b.log"))
    handler.maxBytes = 1000
    for number in range(200):
        handler.handle(ifl.log.makeRecord("x", 30, "", 0, "%s Bearer sk-verysecret", (number,), None))
    handler.close()
    files = sorted(home.glob("b.log*"))
    assert len(files) == 1 + ifl.LOG_FILES_KEPT and all(f.stat().st_size <= 1000 for f in files)
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in files) and "verysecret" not in files[0].read_text()


def test_a_log_file_that_cant_be_written_is_named_and_does_not_matter(home):
    (home / "file").write_text("")
    with running(IFLOW2API_LOG_FILE=str(home / "file" / "x.log")) as (_, url, reader):
        said = card_of(reader)
    assert "no log_file" in said and "warning" in said


LOG = ("2026-01-01 00:00:01 INFO one\n2026-01-01 00:00:02 WARNING two\n2026-01-01 00:00:03 ERROR three\nTraceback\n  boom\n"
       "2026-01-01 00:00:04 DEBUG four\n")


@pytest.mark.parametrize("argv,shown", [
    ((), ["zero", "one", "two", "three", "Traceback", "boom", "four"]), (("-n", "2"), ["boom", "four"]), (("-n2",), ["boom", "four"]),
    (("-n", "0"), []), (("--level", "error"), ["three", "Traceback", "boom"]), (("--level", "warning", "-n", "1"), ["boom"]),
    (("--level", "info"), ["zero", "one", "two", "three", "Traceback", "boom"])])
def test_logs_shows_the_tail(home, capsys, monkeypatch, argv, shown):
    monkeypatch.setenv("IFLOW2API_LOG_FILE", str(home / "a.log"))
    (home / "a.log.1").write_text("2026-01-01 00:00:00 INFO zero\n")
    (home / "a.log").write_text(LOG + "2026-01-01 00:00:05 INFO unfinis")
    status, out, err = main(capsys, "logs", *argv)
    assert status == 0 and [line.split()[-1] for line in out.splitlines()] == shown


def test_logs_says_what_to_set(home, capsys, monkeypatch):
    status, out, err = main(capsys, "logs")
    assert status == 1 and "config set log_file" in err and not out
    monkeypatch.setenv("IFLOW2API_LOG_FILE", "none.log")
    status, out, err = main(capsys, "logs")
    assert status == 1 and str(home / ".iflow2api" / "none.log") in err


def test_logs_follow_over_a_rotation(home):
    path = home / "a.log"
    path.write_text("2026-01-01 00:00:01 INFO one\n")
    process = subprocess.Popen([sys.executable, PROGRAM, "logs", "-f", "--level", "info"], stdout=subprocess.PIPE,
                               env={**os.environ, "IFLOW2API_LOG_FILE": str(path)})
    try:
        assert process.stdout.readline().endswith(b"one\n")
        with path.open("a") as file:
            file.write("2026-01-01 00:00:01 DEBUG no\n2026-01-01 00:00:02 INFO t")
            file.flush()
            file.write("wo\n")
        assert process.stdout.readline().endswith(b"two\n")
        os.rename(path, home / "a.log.1")
        path.write_text("2026-01-01 00:00:03 INFO three\n")
        assert process.stdout.readline().endswith(b"three\n")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_verbose_logs_more():
    for argv, words in (((), False), (("--verbose",), True)):
        with running("--upstream", "http://127.0.0.1:1", *argv) as (_, url, reader):
            __import__("urllib.request").request.urlopen(url + "/v1/models").read()
            said = card_of(reader)
            while words and "debug" not in said:
                said += read_some(reader).decode()
        assert ("debug" in said) == words


# --- help and errors ---------------------------------------------------------

@pytest.mark.parametrize("locale", ["C.UTF-8", "zh_CN.UTF-8"])
@pytest.mark.parametrize("name", ["", *ifl.COMMANDS])
def test_help_is_complete_and_fits(capsys, monkeypatch, locale, name):
    monkeypatch.setenv("LANG", locale)
    with pytest.raises(SystemExit) as caught:
        ifl.main([name, "--help"] if name else ["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(ifl.columns_of(line) <= 80 for line in text.splitlines()), [x for x in text.splitlines() if ifl.columns_of(x) > 80]
    wanted = [flag for flag, facts in ifl.COMMANDS[name or "serve"].arguments if flag[0] == "-"]
    wanted += ["--config-dir", *(ifl.COMMANDS if not name else [name])]
    assert all(re.search(rf"(^|[\s,]){re.escape(word)}\b", text) for word in wanted)
    assert bool(re.search("[\u4e00-\u9fff]", text)) == (locale[:2] == "zh")
    if not name:
        assert len(text.splitlines()) < 70


def test_every_help_has_both_languages():
    for name, command in ifl.COMMANDS.items():
        for pair in (command.help, *(facts["help"] for flag, facts in command.arguments)):
            assert len(pair) == 2 and all(pair) and re.search("[\u4e00-\u9fff]|debug", pair[0]), (name, pair)


ERRORS = [
    (["sttus"], "did you mean status?", "status"), (["--prot", "80"], "--port", "--port"), (["--port"], "--port N", "--port N"),
    (["--port", "abc"], "a whole number from 0 to 65535", "整数，0 到 65535"), (["--port=99999"], "0 to 65535", "0 到 65535"),
    (["--log-level", "loud"], "one of debug, info", "debug, info"), (["config", "get", "prot"], "did you mean port", "port"),
    (["config", "frob"], "list, get, set", "list, get, set"), (["config", "get"], "config list", "config list"),
    (["config", "set", "port"], "config set port VALUE", "config set port VALUE"),
    (["config", "set", "language", "fr"], 'one of "", zh, en', '"", zh, en'),
    (["config", "set", "providers", "x"], "a list as JSON", "JSON 列表"),
    (["config", "set", "port", "-5"], "0 to 65535", "0 到 65535"),
    (["config", "set", "upstream_proxy", "ftp://me:hunter2@x"], "socks5h://", "socks5h://"),
    (["test", "a", "b"], "no use for 'b'", "'b'"), (["logs", "-n", "x"], "a whole number", "整数"),
    (["logs", "--level", "loud"], "warning", "warning"), (["logs", "--folow"], "--follow", "--follow"),
    (["completion"], "completion bash|zsh|fish|powershell", "completion bash|zsh|fish|powershell"),
    (["completion", "zhs"], "did you mean zsh", "zsh"), (["--verbose=1"], "takes no value", "不带值"),
    (["--port", "80", "stats"], "did you mean status?", "status"), (["status", "--no-browser"], "status has no flag", "status 没有"),
    (["--api-key", "$NOPE"], "export NOPE=", "export NOPE="), (["--api-key", "-"], "--api-key - < FILE", "--api-key - <"),
    (["--upstream", "foo"], "write http://foo", "http://foo")]


@pytest.mark.skipif(os.name == "nt", reason="export is a word of other shells")
@pytest.mark.parametrize("locale", ["C.UTF-8", "zh_CN.UTF-8"])
@pytest.mark.parametrize("argv,en,zh", ERRORS)
def test_errors_say_what_to_type(capsys, monkeypatch, argv, en, zh, locale):
    monkeypatch.setenv("LANG", locale)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    status, out, err = main(capsys, *argv)
    assert status == 2 and not out and err.count("\n") == 1 and "hunter2" not in err and "Traceback" not in err
    assert err.startswith("错误：" if locale[:2] == "zh" else "error: ") and (zh if locale[:2] == "zh" else en) in err


def test_flags_may_stand_anywhere(capsys, tmp_path):
    for argv in (["config", "--show-secrets", "get", "port"], ["--config-dir", str(tmp_path), "config", "get", "port"],
                 ["config", "get", "--config-dir=" + str(tmp_path), "port"]):
        assert main(capsys, *argv) == (0, "28000\n", "")
    assert main(capsys, "--port", "1", "--version")[1].startswith("iflow2api ")


def test_a_proxy_without_its_switch_is_noticed(capsys):
    status, out, err = main(capsys, "config", "set", "upstream_proxy", "socks5h://127.0.0.1:1080")
    assert status == 0 and "config set upstream_proxy_enabled true" in err
    main(capsys, "config", "set", "upstream_proxy_enabled", "true")
    assert "enabled" not in main(capsys, "config", "set", "upstream_proxy", "env")[2]


def test_a_port_in_use_names_a_free_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, out, err = run("--port", str(taken.getsockname()[1]))
    assert status == 1 and not out and re.fullmatch(r"error: port \d+ .* is free: add --port \d+\n", err)


def test_importing_and_serving_stay_light(tmp_path):
    code = ("import sys; sys.path.insert(0, %r); import iflow2api as i; g = i.Gateway(i.Settings()); s = i.serve(g, port=0); s.close();"
            "print([n for n in ('urllib.request', 'logging.handlers', 'argparse', 'ctypes', 'difflib')"
            " if n in sys.modules])") % HERE
    done = subprocess.run([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, timeout=60)
    assert done.stdout.strip() == b"[]"


# --- completion --------------------------------------------------------------

COMPLETIONS = [
    ("iflow2api st", {"status"}), ("iflow2api config ", {"list", "get", "set", "unset", "path"}),
    ("iflow2api config get upstream", {"upstream_proxy", "upstream_proxy_enabled"}),
    ("iflow2api config unset drain", {"drain_s"}), ("iflow2api config set language ", {"zh", "en"}),
    ("iflow2api --log-level d", {"debug"}), ("iflow2api --log-level debug --ver", {"--verbose", "--version"}),
    ("iflow2api --config-dir x config pa", {"path"}), ("iflow2api config --config-dir x unset host", {"host"}),
    ("iflow2api logs --f", {"--follow"}), ("iflow2api completion ", {"bash", "zsh", "fish", "powershell"}),
    ("iflow2api --po", {"--port"}), ("iflow2api serve --po", {"--port"}), ("iflow2api --port ", set())]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in ifl.COMPLETERS:
        (folder / shell).write_text(ifl.COMPLETERS[shell](ifl.CompletionWords()), encoding="utf-8")
    return folder


def shell(*argv):
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
@pytest.mark.parametrize("line,words", COMPLETIONS)
def test_bash_completes(scripts, line, words):
    code = ('source "$1"; COMP_WORDS=($2); [[ $2 == *" " ]] && COMP_WORDS+=(""); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _iflow2api;'
            'printf "%s\\n" "${COMPREPLY[@]}"')
    assert set(shell("bash", "-c", code, "bash", str(scripts / "bash"), line).split()) == words


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
@pytest.mark.parametrize("line,words", COMPLETIONS)
def test_zsh_completes(scripts, line, words):
    code = ('compdef() { : }; source "$1"; compadd() { shift; print -l -- "$@" }; words=(${=2}); [[ $2 == *" " ]] && words+=("");'
            'CURRENT=$#words; _iflow2api')
    offered = shell("zsh", "-f", "-c", code, "zsh", str(scripts / "zsh"), line).split()
    assert {word for word in offered if word.startswith(line.rpartition(" ")[2])} == words


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish here")
@pytest.mark.parametrize("line,words", COMPLETIONS)
def test_fish_completes(scripts, line, words):
    offered = shell("fish", "--no-config", "-c", 'source $argv[1]; complete -C $argv[2]', str(scripts / "fish"), line)
    assert {each.split("\t")[0] for each in offered.splitlines()} == words


@pytest.mark.skipif(not shutil.which("pwsh"), reason="no PowerShell here")
@pytest.mark.parametrize("line,words", COMPLETIONS)
def test_powershell_completes(scripts, line, words):
    code = (f". {{ {(scripts / 'powershell').read_text()} }}; "
            f"(TabExpansion2 '{line}' {len(line)}).CompletionMatches | ForEach-Object CompletionText")
    assert set(shell("pwsh", "-NoProfile", "-Command", code).split()) == words


def test_completion_knows_every_command_and_flag(capsys):
    for name in ifl.COMPLETERS:
        status, out, err = main(capsys, "completion", name)
        assert status == 0 and not err and not re.search(r"@[A-Z]+@", out)
        for command, facts in ifl.COMMANDS.items():
            assert command in out and all(flag.lstrip("-") in out for flag, _ in facts.arguments if flag[0] == "-")
        assert all(key in out for key in ifl.SETTING)


# --- house rules -------------------------------------------------------------

def test_house_rules():
    source = open(PROGRAM, encoding="utf-8").read()
    tree = ast.parse(source, feature_version=(3, 8))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, node.name
            arguments = [a for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
            assert node.returns is not None and all(a.annotation for a in arguments), node.name
