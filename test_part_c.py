"""Tests of section 11 (Credentials), of secrets at rest, and of login, logout and config encrypt."""
import errno
import http.client
import http.server
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse

import pytest

import iflow2api as ifl

PROGRAM = os.path.abspath(ifl.__file__)
WAIT_S = 10.0
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")


def until(condition, seconds=WAIT_S, what="it"):
    pause, deadline = threading.Event(), time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not happen"
        pause.wait(0.01)


class FakeHost:
    """iFlow's login host and its model API.  `script`: path -> answers to give first, (status, type, body) or callable."""

    def __init__(self):
        self.seen, self.script, self.used, self.valid = [], {}, set(), {"R0"}
        self.number, self.lock, self.gate = 0, threading.Lock(), None
        self.good_keys = None
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                host.answer(self)

            do_POST = do_GET

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def settings(self, **more):
        return {"iflow_auth_url": self.url + "/oauth", "iflow_token_url": self.url + "/oauth/token",
                "iflow_userinfo_url": self.url + "/userinfo", "base_url": self.url + "/v1", **more}

    def answer(self, handler):
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0)).decode()
        path, _, query = handler.path.partition("?")
        with self.lock:
            self.seen.append((path, query or body, {k.lower(): v for k, v in handler.headers.items()}))
            scripted = self.script.get(path) or []
            made = scripted.pop(0) if scripted else None
        if callable(made):
            made = made(handler)
        if made is None:
            made = {"/oauth/token": self.token, "/userinfo": self.user, "/v1/chat/completions": self.chat}[path](
                urllib.parse.parse_qs(query or body), handler)
        if made == "hang":
            self.gate.wait(WAIT_S)
            return
        status, kind, text = made
        data = text.encode() if isinstance(text, str) else json.dumps(text).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def token(self, form, handler):
        with self.lock:
            if form["grant_type"] == ["refresh_token"]:
                token = form["refresh_token"][0]
                if token not in self.valid:
                    return 400, "application/json", {"error": "invalid_grant", "error_description": f"bad {token}"}
                self.valid.discard(token)
            elif form["code"] != ["good-code"]:
                return 400, "application/json", {"error": "invalid_grant", "error_description": "no such code"}
            self.number += 1
            self.valid.add(f"R{self.number}")
            return 200, "application/json", {"access_token": f"A{self.number}", "refresh_token": f"R{self.number}",
                                             "expires_in": 7 * 86400, "token_type": "bearer", "scope": "all"}

    def user(self, query, handler):
        number = query["accessToken"][0][1:]
        return 200, "application/json", {"success": True, "data": {"apiKey": f"sk-key-{number}", "email": "a@b.c", "phone": "1"}}

    def chat(self, form, handler):
        key = handler.headers["Authorization"].partition(" ")[2]
        if self.good_keys is not None and key not in self.good_keys:
            return 200, "application/json", {"status": "439", "msg": "expired", "body": None}
        return 200, "application/json", {"id": "x", "object": "chat.completion", "created": 1, "model": "glm-5", "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "hi from " + key}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}

    def count(self, path, text=""):
        return sum(p == path and text in body for p, body, _ in self.seen)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in list(os.environ):
        if re.match("IFLOW|iflow", name) or name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "TERMUX_VERSION", "PREFIX"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr(ifl, "OAUTH_PORT", 0)
    monkeypatch.setattr(ifl.Vault, "DERIVE_S", 0.0)
    monkeypatch.setattr(ifl.Vault, "ITERATIONS", (10, 10))
    return tmp_path


@pytest.fixture
def host():
    made = FakeHost()
    made.gate = threading.Event()
    yield made
    made.gate.set()
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def config(home, host):
    made = ifl.ConfigFile(str(home / ".iflow2api"))
    made.change(lambda raw: raw.update(host.settings()))
    return made


@pytest.fixture
def gateways():
    made = []
    yield made
    for gateway in made:
        gateway.close()


@pytest.fixture
def gateway(config, gateways):
    gateways.append(ifl.Gateway(config=config, environ={}))
    return gateways[-1]


def cli_file(home):
    return home / ".iflow" / "settings.json"


def put_login(home, **login):
    cli_file(home).parent.mkdir(exist_ok=True)
    facts = {"apiKey": "sk-key-0", "oauth_access_token": "A0", "oauth_refresh_token": "R0", "foreign": {"kept": [1]},
             "oauth_expires_at": ifl.format_time(time.time() + 3600), **login}
    cli_file(home).write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))


def login_of(home):
    return json.loads(cli_file(home).read_text())


def visit(url, host="127.0.0.1"):
    """What a browser shows that follows `url` on the loopback: (status, text)."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(host, parts.port, timeout=WAIT_S)
    connection.request("GET", parts.path + "?" + parts.query)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def callback_of(url, **facts):
    """The address a browser ends on after logging in at `url`."""
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
    facts = {"code": "good-code", "state": query["state"][0], **facts}
    return query["redirect"][0] + "?" + urllib.parse.urlencode({k: v for k, v in facts.items() if v is not None})


def is_listening(port, host="127.0.0.1"):
    try:
        socket.create_connection((host, port), 1).close()
        return True
    except OSError:
        return False


# --- the construction -----------------------------------------------------------

KEY = bytes(range(32))


def test_known_answers_of_the_cipher():
    """Recomputed from the description alone: HMAC-SHA-256 in counter mode, encrypt-then-MAC, the nonce a MAC of the text."""
    import hashlib
    import hmac
    purpose, plain = b"purpose: ", b"The quick brown fox jumps over the lazy dog, twice."

    def mac(key, text):
        return hmac.new(key, text, hashlib.sha256).digest()

    nonce = mac(mac(KEY, purpose + b"nonce"), plain)[:16]
    stream = b"".join(mac(mac(KEY, purpose + b"cipher"), nonce + block.to_bytes(8, "big")) for block in range(2))
    sealed = nonce + bytes(a ^ b for a, b in zip(plain, stream))
    expected = sealed + mac(mac(KEY, purpose + b"tag"), sealed)
    assert ifl.Cipher(KEY, purpose).seal(plain) == expected
    assert ifl.Cipher(KEY, purpose).open(expected) == plain
    assert ifl.Cipher(KEY, b"another").open(expected) is None
    assert ifl.Cipher(bytes(32), purpose).open(expected) is None


def test_known_answers_of_the_vault(tmp_path):
    (tmp_path / "secret.key").write_bytes(KEY)
    vault = ifl.Vault(str(tmp_path), {})
    assert vault.seal("sk-0123456789abcdef") == KNOWN_FILE
    assert vault.open(KNOWN_FILE) == "sk-0123456789abcdef"
    phrase = ifl.Vault(str(tmp_path), {"IFLOW2API_PASSPHRASE": "correct horse"})
    assert phrase.open(KNOWN_PHRASE) == "sk-0123456789abcdef"
    assert phrase.seal("sk-0123456789abcdef") == KNOWN_PHRASE         # salt and iterations of the file are kept


KNOWN_FILE = "enc:v1:k.35ea7c0695ab.Nuz4z0sjy1b__eZpvG17P_NjDXF2ppx2JTrURdamCuJal6Q9Rc-aIPoKrkYyXO_ENqBM_ihVO64b1TckT__ZwytsWQ"
KNOWN_PHRASE = "enc:v1:p1000-00112233445566778899aabbccddeeff.51608ea6573a.qsUkTjVQlo_HIU1L5z7f-XYYpFlnE2HCE_t4c8Y7Sme72EkC4p-7NBDyYhe52glA4NJh7ktmrMy9KQky5iGWDOtzOw"


@pytest.mark.parametrize("known", [KNOWN_FILE, KNOWN_PHRASE])
def test_no_byte_can_be_changed(tmp_path, known):
    (tmp_path / "secret.key").write_bytes(KEY)
    vault = ifl.Vault(str(tmp_path), {"IFLOW2API_PASSPHRASE": "correct horse"})
    for at in range(len(known)):
        for wrong in (chr(ord(known[at]) ^ 1), "A" if known[at] != "A" else "B", ""):
            with pytest.raises(ifl.SealBroken) as broken:
                vault.open(known[:at] + wrong + known[at + 1:])
            assert "sk-01" not in str(broken.value)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 31, 32, 33, 64, 1000])
def test_every_byte_of_sealed_data_counts(size):
    cipher, plain = ifl.Cipher(KEY, b"x"), os.urandom(size)
    sealed = cipher.seal(plain)
    assert cipher.open(sealed) == plain
    for at in range(0, len(sealed), 1 if len(sealed) < 200 else 13):
        assert cipher.open(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1:]) is None
        assert cipher.open(sealed[:at]) is None
    assert cipher.open(b"") is None


# --- secrets at rest ------------------------------------------------------------

SECRETS = {"custom_api_key": "sk-client-key", "api_key": "sk-iflow-key",
           "providers": [{"name": "p", "base_url": "http://x/v1", "api_keys": ["sk-p-one", "$P_KEY", "$$dollar"],
                          "headers": {"X-Auth": "hdr-secret", "X-Plain": "plain"}, "proxy": "http://u:pw-secret@h:1"}],
           "accounts": {"work": {"apiKey": "sk-work", "oauth_access_token": "A-work", "oauth_refresh_token": "R-work", "email": "e"}},
           "foreign": {"api_keys": ["not ours"]}}
HIDDEN = ["sk-client-key", "sk-iflow-key", "sk-p-one", "$$dollar", "hdr-secret", "pw-secret", "sk-work", "A-work", "R-work"]


def text_of(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def bytes_of(path):
    with open(path, "rb") as file:
        return file.read()


@pytest.fixture
def sealed(home):
    made = ifl.ConfigFile(str(home / "c"), {})
    made.change(lambda raw: raw.update(SECRETS))
    return made


def test_secrets_are_sealed_in_the_file_and_its_backup_and_read_in_clear(sealed):
    sealed.change(lambda raw: raw.update(port=1))
    assert sealed.read() == {**SECRETS, "port": 1} and sealed.locked == []
    for path in (sealed.path, sealed.backup):
        text = text_of(path)
        assert not [secret for secret in HIDDEN if secret in text]
        assert "$P_KEY" in text and "plain" in text and "not ours" in text
    if os.name == "posix":
        assert stat.S_IMODE(os.stat(sealed.vault.key_path).st_mode) == 0o600


def test_a_plain_file_of_the_user_gets_a_sealed_backup(home):
    config = ifl.ConfigFile(str(home / "c"), {})
    os.makedirs(config.folder)
    with open(config.path, "w") as file:
        json.dump(SECRETS, file)
    config.change(lambda raw: raw.update(port=2))
    assert "sk-p-one" not in text_of(config.backup) + text_of(config.path)
    assert json.loads(text_of(config.backup)).keys() == SECRETS.keys()


def test_encrypt_off_on_and_rotate(sealed):
    sealed.change(lambda raw: raw.update(port=1))
    assert sealed.encrypt("off") == [] and json.loads(text_of(sealed.path)) == {**SECRETS, "port": 1, "encrypt_secrets": False}
    assert "sk-p-one" in text_of(sealed.backup)
    sealed.change(lambda raw: raw.update(port=3))
    assert "sk-p-one" in text_of(sealed.path)
    assert sealed.encrypt("on") == [] and "sk-p-one" not in text_of(sealed.path) + text_of(sealed.backup)
    before, key = text_of(sealed.path), bytes_of(sealed.vault.key_path)
    assert sealed.encrypt("rotate") == []
    assert text_of(sealed.path) != before and bytes_of(sealed.vault.key_path) != key
    assert len(bytes_of(sealed.vault.key_path)) == 32
    assert sealed.read() == {**SECRETS, "port": 3}


def test_a_rotation_cut_short_anywhere_loses_nothing(sealed, monkeypatch):
    sealed.change(lambda raw: raw.update(port=1))
    real, left = ifl.write_file, [0]

    def dying(path, data):
        if not left[0]:
            raise OSError(errno.EIO, "gone")
        left[0] -= 1
        real(path, data)

    monkeypatch.setattr(ifl, "write_file", dying)
    for steps in range(5):
        left[0] = steps
        try:
            sealed.encrypt("rotate")
        except OSError:
            pass
        fresh = ifl.ConfigFile(sealed.folder, {})
        assert fresh.read() == {**SECRETS, "port": 1} and fresh.locked == []
        assert fresh._opened(json.loads(text_of(sealed.backup)))["api_key"] == "sk-iflow-key"


def test_a_lost_key_is_named_and_nothing_is_overwritten(sealed, gateways):
    sealed.change(lambda raw: raw["providers"].append({"name": "q", "base_url": "http://y/v1"}))
    before = json.loads(text_of(sealed.path))
    os.unlink(sealed.vault.key_path)
    config = ifl.ConfigFile(sealed.folder, {})
    gateway = ifl.Gateway(config=config, environ={"P_KEY": "k"})
    gateways.append(gateway)
    problems = " ".join(gateway.problems)
    assert "custom_api_key" in problems and "providers[0].api_keys[0]" in problems and "secret.key" in problems
    assert gateway.state.router.providers["p"].problem and not gateway.state.router.providers["q"].problem
    assert gateway.settings.custom_api_key.startswith("enc:")         # a key is still wanted, of everybody
    assert gateway.ensure_client_key()[0].startswith("enc:")
    assert config.encrypt("rotate")
    config.change(lambda raw: raw.update(port=9))
    after = json.loads(text_of(sealed.path))
    assert after == {**before, "port": 9}
    assert not [s for s in HIDDEN if s in problems]


def test_a_damaged_value_is_named_and_the_rest_works(sealed, gateways):
    raw = json.loads(text_of(sealed.path))
    raw["api_key"] = raw["api_key"][:-1] + ("A" if raw["api_key"][-1] != "A" else "B")
    with open(sealed.path, "w") as file:
        json.dump(raw, file)
    gateway = ifl.Gateway(config=ifl.ConfigFile(sealed.folder, {}), environ={"P_KEY": "k"})
    gateways.append(gateway)
    assert [p for p in gateway.problems if "api_key can't be read" in p and "damaged" in p]
    assert gateway.settings.custom_api_key == "sk-client-key" and gateway.settings.api_key == ""
    assert gateway.state.router.providers["p"].api_keys == ("sk-p-one", "k", "$dollar")


def test_a_damaged_key_file_stops_no_other_change(sealed, caplog):
    with open(sealed.vault.key_path, "wb") as file:
        file.write(b"short")
    sealed.change(lambda raw: raw.update(port=7, custom_api_key="sk-new-one"))
    assert json.loads(text_of(sealed.path))["port"] == 7 and bytes_of(sealed.vault.key_path) == b"short"
    assert "stay unencrypted" in caplog.text and "sk-new-one" not in caplog.text
    with pytest.raises(OSError):
        sealed.encrypt("rotate")


def test_a_passphrase_instead_of_a_key_file(home):
    phrase = {"IFLOW2API_PASSPHRASE": "correct horse"}
    config = ifl.ConfigFile(str(home / "c"), phrase)
    config.change(lambda raw: raw.update(api_key="sk-iflow-key"))
    assert re.fullmatch(r"enc:v1:p10-[0-9a-f]{32}\.\w+\.\S+", json.loads(text_of(config.path))["api_key"])
    assert not os.path.exists(config.vault.key_path)
    assert ifl.ConfigFile(config.folder, phrase).read()["api_key"] == "sk-iflow-key"
    for environ, word in (({}, "set IFLOW2API_PASSPHRASE"), ({"IFLOW2API_PASSPHRASE": "wrong"}, "another passphrase")):
        other = ifl.ConfigFile(config.folder, environ)
        assert other.read()["api_key"].startswith("enc:") and word in other.locked[0]
    before = text_of(config.path)
    assert config.encrypt("rotate") == [] and text_of(config.path) != before and config.read()["api_key"] == "sk-iflow-key"


def test_the_commands_of_encryption(home, capsys, monkeypatch):
    monkeypatch.setenv("IFLOW2API_CONFIG_DIR", str(home / "c"))
    assert ifl.main(["config", "set", "custom_api_key", "sk-a-client-key-0123"]) == 0
    assert "sk-a-client" not in text_of(home / "c" / "config.json")
    assert ifl.main(["config", "encrypt"]) == 0 and capsys.readouterr().out == "on\n"
    assert ifl.main(["config", "encrypt", "off"]) == 0 and "sk-a-client-key-0123" in text_of(home / "c" / "config.json")
    assert ifl.main(["config", "encrypt", "on"]) == 0 and ifl.main(["config", "encrypt", "rotate"]) == 0
    assert ifl.main(["config", "encrypt", "maybe"]) == 2
    assert "sk-a-client" not in text_of(home / "c" / "config.json")
    capsys.readouterr()
    ifl.main(["config", "list"])
    assert "sk-a-client" not in capsys.readouterr().out
    ifl.main(["config", "get", "custom_api_key", "--show-secrets"])
    assert capsys.readouterr().out == "sk-a-client-key-0123\n"


@posix
def test_kill_9_in_the_middle_of_a_write_leaves_a_readable_file(home):
    """A child writes the login and config.json over and over and is killed; what is there is whole each time."""
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
    put_login(home)
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", script, os.path.dirname(PROGRAM), str(home / "c")], stdout=subprocess.PIPE)
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert login_of(home)["number"] and login_of(home)["foreign"] == {"kept": [1]}
        assert ifl.ConfigFile(str(home / "c")).read()["api_key"] == "s" * 20_000


# --- logging in -----------------------------------------------------------------

def test_a_login_through_the_browser(home, host, gateway):
    put_login(home, searchApiKey="web")
    found = gateway.logins.start()
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(found["url"]).query)
    assert found["state"] == "waiting" and query["client_id"] == ["10009311001"] and query["loginMethod"] == ["phone"]
    assert query["redirect"][0].startswith("http://localhost:")
    callback = callback_of(found["url"])
    status, page = visit(callback)
    assert status == 200 and "a@b.c" in page and "sk-key" not in page
    assert gateway.logins.flow.ended.wait(WAIT_S)
    login = login_of(home)
    assert (login["apiKey"], login["oauth_refresh_token"], login["foreign"]) == ("sk-key-1", "R1", {"kept": [1]})
    assert login["searchApiKey"] == "web" and abs(ifl.parse_time(login["oauth_expires_at"]) - time.time() - 7 * 86400) < 60
    assert gateway.state.router.providers["iflow"].api_keys == ("sk-key-1",)     # at once
    until(lambda: not is_listening(urllib.parse.urlsplit(callback).port), what="the listener's end")
    form = urllib.parse.parse_qs(host.seen[0][1])
    assert form["redirect_uri"] == query["redirect"] and form["client_secret"] and host.seen[0][2]["authorization"].startswith("Basic ")
    assert host.seen[0][2]["content-type"] == "application/x-www-form-urlencoded"


def test_both_loopbacks_answer(gateway):
    callback = callback_of(gateway.logins.start()["url"], code="x", state="wrong")
    hosts = ["127.0.0.1"] + (["::1"] if is_listening(urllib.parse.urlsplit(callback).port, "::1") else [])
    for address in hosts:
        assert visit(callback, address)[0] == 400


def test_the_usual_port_taken(gateway):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        callback = callback_of(gateway.logins.start(port=port)["url"])
        assert urllib.parse.urlsplit(callback).port not in (port, 0, None)
        assert visit(callback)[0] == 200


def test_the_usual_port_free(gateway):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert f"localhost%3A{port}%2Foauth2callback" in gateway.logins.start(port=port)["url"]


@pytest.mark.parametrize("facts, word", [
    ({"state": "wrong"}, "another login"), ({"state": None}, "another login"), ({"code": None}, "no answer to a login"),
    ({"code": None, "error": "access_denied", "state": "x"}, "another login")])
def test_strangers_change_nothing(home, gateway, facts, word):
    url = gateway.logins.start()["url"]
    status, page = visit(callback_of(url, **facts))
    assert status == 400 and word in page and gateway.logins.status()["state"] == "waiting"
    parts = urllib.parse.urlsplit(callback_of(url))
    assert visit(f"http://127.0.0.1:{parts.port}/favicon.ico?{parts.query}")[0] == 404
    assert not cli_file(home).exists()
    assert visit(callback_of(url))[0] == 200


def test_an_error_callback_ends_the_login(home, gateway):
    put_login(home)
    callback = callback_of(gateway.logins.start()["url"], code=None, error="access_denied", error_description="<b>no</b>")
    status, page = visit(callback)
    assert status == 400 and "&lt;b&gt;no" in page and gateway.logins.flow.ended.wait(WAIT_S)
    assert gateway.logins.status()["state"] == "failed" and login_of(home)["apiKey"] == "sk-key-0"
    until(lambda: not is_listening(urllib.parse.urlsplit(callback).port))


def test_a_callback_twice_exchanges_once(host, gateway):
    flow_url = gateway.logins.start()["url"]
    flow, query = gateway.logins.flow, urllib.parse.urlsplit(callback_of(flow_url)).query
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(flow.visit(query))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join(WAIT_S) for thread in threads]
    assert [ok for ok, _ in answers] == [True] * 4 and host.count("/oauth/token") == 1


HOST_FAILURES = {
    "400": ([(400, "application/json", {"error": "invalid_grant"})], [], "used up or too old"),
    "other 400": ([(400, "application/json", {"error": "invalid_client"})], [], "invalid_client"),
    "html": ([(200, "text/html", "<html>sorry</html>")], [], "an HTML page"),
    "502": ([(502, "text/html", "<html>sorry</html>")], [], "502 with an HTML page"),
    "garbage": ([(200, "application/json", "[1]")], [], "instead of JSON"),
    "200 with failure": ([(200, "application/json", {"success": False, "code": "500", "message": "太多"})], [], "太多"),
    "no token": ([(200, "application/json", {"scope": "x"})], [], "no tokens"),
    "slow": (["hang"], [], "stays as it is"),
    "no apiKey": ([], [(200, "application/json", {"success": True, "data": {"email": "x"}})], "no API key"),
    "bad apiKey": ([], [(200, "application/json", {"success": True, "data": {"apiKey": "a\nb"}})], "no API key"),
    "info fails": ([], [(200, "application/json", {"success": False, "message": "nope"})], "nope")}


@pytest.mark.parametrize("name", HOST_FAILURES)
def test_failures_of_the_login_host(home, host, gateway, name, monkeypatch):
    monkeypatch.setattr(ifl, "OAUTH_SILENCE_S", 0.2)
    put_login(home)
    before = cli_file(home).read_bytes()
    host.script["/oauth/token"], host.script["/userinfo"], word = (list(HOST_FAILURES[name][0]), list(HOST_FAILURES[name][1]),
                                                                   HOST_FAILURES[name][2])
    callback = callback_of(gateway.logins.start()["url"])
    status, page = visit(callback)
    assert status == 400 and word in page and "good-code" not in page and "Traceback" not in page
    assert gateway.logins.flow.ended.wait(WAIT_S) and cli_file(home).read_bytes() == before
    until(lambda: not is_listening(urllib.parse.urlsplit(callback).port))


def test_the_login_host_is_down(home, host, gateway):
    put_login(home)
    host.server.shutdown()
    host.server.server_close()
    _, page = visit(callback_of(gateway.logins.start()["url"]))
    assert "connection refused" in page and login_of(home)["apiKey"] == "sk-key-0"


def test_pasting(home, gateway):
    found = gateway.logins.start(paste=True)
    flow = gateway.logins.flow
    for rubbish in ("hello world", "http://localhost:1/oauth2callback", "?", "http://[", "http://x/?code=a b&state=c", "\u4f60\u597d"):
        with pytest.raises(ifl.LoginFailed) as failed:
            gateway.logins.paste(rubbish)
        assert len(failed.value.message) < 300 and flow.state == "waiting"
    with pytest.raises(ifl.LoginFailed, match="used up"):
        gateway.logins.paste("not-the-code")                              # may be typed again
    assert gateway.logins.paste("  " + callback_of(found["url"]) + "\n")["state"] == "done"
    assert login_of(home)["apiKey"] == "sk-key-1" and flow.ended.is_set()


def test_pasting_the_code_alone_or_the_query(home, gateway):
    gateway.logins.start(paste=True)
    assert gateway.logins.paste("good-code")["state"] == "done"
    found = gateway.logins.start(paste=True)
    assert gateway.logins.paste(urllib.parse.urlsplit(callback_of(found["url"])).query)["state"] == "done"


def test_a_login_that_nobody_finishes_times_out(home, gateway):
    callback = callback_of(gateway.logins.start(timeout_s=0.05)["url"])
    assert gateway.logins.flow.ended.wait(WAIT_S) and "nobody logged in" in gateway.logins.status()["message"]
    until(lambda: not is_listening(urllib.parse.urlsplit(callback).port))
    assert not cli_file(home).exists()


def test_a_second_login_ends_the_first(gateway):
    first = callback_of(gateway.logins.start()["url"])
    flow = gateway.logins.flow
    gateway.logins.start()
    assert flow.ended.is_set() and not is_listening(urllib.parse.urlsplit(first).port)


def test_a_broken_settings_file_is_named_before_the_browser_opens(home, gateway):
    cli_file(home).parent.mkdir()
    cli_file(home).write_text("{broken")
    with pytest.raises(ifl.LoginFailed, match="line 1, column 2.*nothing was written"):
        gateway.logins.start()
    assert cli_file(home).read_text() == "{broken"


def test_a_settings_file_that_is_a_folder(home, gateway):
    cli_file(home).mkdir(parents=True)
    with pytest.raises(ifl.LoginFailed, match="is a folder"):
        gateway.logins.start()


def test_a_settings_file_that_is_read_only(home, gateway, monkeypatch):
    put_login(home)
    monkeypatch.setattr(ifl.os, "access", lambda path, mode: not str(path).endswith("settings.json"))
    with pytest.raises(ifl.LoginFailed, match="read-only"):
        gateway.logins.start()


def test_a_home_that_can_not_be_written(home, gateway):
    (home / ".iflow").write_text("a file where the folder should be")
    with pytest.raises(ifl.LoginFailed, match="can't be written"):
        gateway.logins.start()


def test_no_home(gateway, monkeypatch):
    monkeypatch.setattr(ifl.os.path, "expanduser", lambda path: path)
    with pytest.raises(ifl.LoginFailed, match="set HOME"):
        gateway.logins.start()


def test_a_login_does_not_take_the_key_to_another_service(home, gateway):
    put_login(home, selectedAuthType="openai-compatible", baseUrl="http://elsewhere/v1", apiKey="theirs")
    visit(callback_of(gateway.logins.start()["url"]))
    gateway.logins.flow.ended.wait(WAIT_S)
    assert login_of(home)["selectedAuthType"] == "oauth-iflow" and "baseUrl" not in login_of(home)


# --- the command ----------------------------------------------------------------

class Terminal:
    """Standard input that is a pipe."""

    def __init__(self):
        self.reader, self.writer = os.pipe()

    def fileno(self):
        return self.reader

    def isatty(self):
        return False

    def type(self, text):
        os.write(self.writer, text.encode())


def run_login(monkeypatch, capsys, args, act):
    """`login ARGS` on a thread; `act(url)` once the address is printed.  (exit status, stdout, stderr)"""
    urls, real = [], ifl.Logins.start
    started = threading.Event()

    def start(self, *rest, **named):
        found = real(self, *rest, **named)
        urls.append(found["url"])
        started.set()
        return found

    monkeypatch.setattr(ifl.Logins, "start", start)
    result = []
    thread = threading.Thread(target=lambda: result.append(ifl.main(["login", *args])))
    thread.start()
    assert started.wait(WAIT_S)
    act(urls[0])
    thread.join(WAIT_S)
    assert result
    return (result[0], *capsys.readouterr())


def test_login_in_the_browser(home, config, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(ifl, "open_browser", lambda url, environ: opened.append(url) or True)
    monkeypatch.setattr(sys, "stdin", Terminal())
    status, out, err = run_login(monkeypatch, capsys, [], lambda url: visit(callback_of(url)))
    assert status == 0 and out.strip() == opened[0] and "logged in to iFlow as a@b.c" in err and "settings.json" in err
    assert "sk-key" not in out + err and "A1" not in err


def test_login_without_a_browser(home, config, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(ifl.sys, "platform", "linux")
    status, out, err = run_login(monkeypatch, capsys, [], lambda url: visit(callback_of(url)))
    assert status == 0 and "--paste" in err
    status, out, err = run_login(monkeypatch, capsys, ["--no-browser"], lambda url: visit(callback_of(url)))
    assert status == 0 and "no browser" not in err


def test_login_by_paste(home, config, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdin", terminal)
    status, out, err = run_login(monkeypatch, capsys, ["--paste"], lambda url: terminal.type(f"what?\n{callback_of(url)}\n"))
    assert status == 0 and "neither the address" in err and login_of(home)["apiKey"] == "sk-key-1"


def test_login_by_paste_at_the_end_of_input(home, config, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdin", terminal)
    status, out, err = run_login(monkeypatch, capsys, ["--paste"], lambda url: os.close(terminal.writer))
    assert status == 1 and "the input ended" in err and not cli_file(home).exists()


def test_login_that_times_out(home, config, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert ifl.main(["login", "--no-browser", "--timeout", "0.05"]) == 1
    assert "nobody logged in within 0.05 s" in capsys.readouterr().err


def test_login_to_an_account_and_turns_among_all(home, host, config, capsys, monkeypatch):
    put_login(home)
    monkeypatch.setattr(sys, "stdin", Terminal())
    status, _, err = run_login(monkeypatch, capsys, ["--no-browser", "--account", "work"], lambda url: visit(callback_of(url)))
    assert status == 0 and login_of(home)["apiKey"] == "sk-key-0"
    stored = json.loads(text_of(config.path))["accounts"]["work"]
    assert all(stored[name].startswith("enc:v1:") for name in ("apiKey", "oauth_access_token", "oauth_refresh_token"))
    gateway = ifl.Gateway(config=config, environ={})
    provider = gateway.state.router.providers["iflow"]
    assert provider.api_keys == ("sk-key-0", "sk-key-1") and provider.key_concurrency == 1
    gateway.close()
    assert ifl.main(["config", "list"]) == 0 and "sk-key-1" not in capsys.readouterr().out
    assert ifl.main(["logout", "--account", "wrok"]) == 2 and "did you mean work" in capsys.readouterr().err
    assert ifl.main(["logout", "--account", "work"]) == 0
    assert config.read()["accounts"] == {} and login_of(home)["apiKey"] == "sk-key-0"


def test_a_key_for_the_run_is_used_alone(home, config, gateways):
    config.change(lambda raw: raw.update(accounts={"work": {"apiKey": "sk-work"}, "odd": 5, "bad": {"apiKey": "a b"}}))
    gateways.append(ifl.Gateway(config=config, environ={}))
    assert gateways[-1].state.router.providers["iflow"].api_keys == ("sk-work",)
    gateways.append(ifl.Gateway(config=config, environ={"IFLOW_API_KEY": "sk-env"}))
    assert gateways[-1].state.router.providers["iflow"].api_keys == ("sk-env",)
    put_login(home, selectedAuthType="openai-compatible", baseUrl="http://elsewhere/v1")
    gateways.append(ifl.Gateway(config=config, environ={}))
    assert gateways[-1].state.router.providers["iflow"].api_keys == ("sk-key-0",)


def test_login_with_a_key(home, config, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-a-key-of-mine-1234")
    assert ifl.main(["login", "--api-key", "$MY_KEY"]) == 0
    assert config.read()["api_key"] == "sk-a-key-of-mine-1234" and "sk-a-key-of" not in text_of(config.path)
    assert ifl.main(["login", "--api-key", "$MY_KEY", "--account", "two"]) == 0
    assert config.read()["accounts"] == {"two": {"apiKey": "sk-a-key-of-mine-1234"}}
    monkeypatch.setenv("MY_KEY", "two words")
    assert ifl.main(["login", "--api-key", "$MY_KEY"]) == 2
    assert ifl.main(["login", "--account", "a/b", "--no-browser"]) == 1
    captured = capsys.readouterr()
    assert "sk-a-key-of" not in captured.out + captured.err


def test_a_key_that_stands_above_the_login_is_named(home, config, capsys, monkeypatch):
    config.change(lambda raw: raw.update(api_key="sk-other"))
    monkeypatch.setattr(sys, "stdin", Terminal())
    _, _, err = run_login(monkeypatch, capsys, ["--no-browser"], lambda url: visit(callback_of(url)))
    assert "warning: api_key in config.json is set" in err


def test_logout_keeps_what_is_not_ours(home, config, capsys):
    put_login(home, baseUrl="http://b/v1", modelName="m", searchApiKey="s", iflow2api_key_due=True)
    config.change(lambda raw: raw.update(api_key="sk-other"))
    assert ifl.main(["logout"]) == 0
    assert login_of(home) == {"foreign": {"kept": [1]}, "baseUrl": "http://b/v1", "modelName": "m"}
    assert "api_key" not in config.read()
    assert ifl.main(["logout"]) == 0 and "no login to remove" in capsys.readouterr().err
    put_login(home, selectedAuthType="openai-compatible", apiKey="theirs")
    assert ifl.main(["logout"]) == 0 and login_of(home)["apiKey"] == "theirs" and "oauth_refresh_token" not in login_of(home)
    cli_file(home).write_text("{")
    assert ifl.main(["logout"]) == 1 and cli_file(home).read_text() == "{"


@posix
def test_ctrl_c_leaves_nothing_behind(home, config):
    child = subprocess.Popen([sys.executable, "-X", "dev", PROGRAM, "login", "--no-browser"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             stdin=subprocess.DEVNULL, text=True, env={**os.environ, "HOME": str(home)})
    port = urllib.parse.urlsplit(callback_of(child.stdout.readline().strip())).port
    assert is_listening(port)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=WAIT_S)
    assert child.returncode == 130 and "login given up; nothing was changed" in err and "Traceback" not in err
    assert not is_listening(port) and not cli_file(home).exists()


# --- the browser ----------------------------------------------------------------

@pytest.mark.parametrize("environ, system, row", [
    ({"TERMUX_VERSION": "1"}, "linux", "termux"), ({"PREFIX": "/data/data/com.termux/files/usr"}, "android", "termux"),
    ({"DISPLAY": ":0", "WSL_DISTRO_NAME": "U"}, "linux", "wsl"), ({"DISPLAY": ":0"}, "linux", "desktop"),
    ({"WAYLAND_DISPLAY": "w"}, "freebsd14", "desktop"), ({}, "linux", "headless"), ({}, "darwin", "macos"), ({}, "win32", "windows")])
def test_which_browser(environ, system, row):
    assert ifl.browser_platform(environ, system) == row
    tried = []
    assert ifl.open_browser("http://u", environ, lambda command: tried.append(command) or False, system) is False
    assert tried == [(*command, "http://u") for command in ifl.BROWSERS[row]]
    if tried:
        assert ifl.open_browser("http://u", environ, lambda command: True, system) is True


def test_running_an_opener(tmp_path):
    assert ifl.run_opener(("/nonexistent/opener", "http://u")) is False
    assert ifl.run_opener((sys.executable, "-c", "0", "http://u")) is True
    assert ifl.run_opener((sys.executable, "-c", "raise SystemExit(3)", "http://u")) is False


# --- the admin API ----------------------------------------------------------------

@pytest.fixture
def server(gateway):
    made = ifl.serve(gateway, "127.0.0.1", 0)
    yield made
    made.close()


def call(server, method, action, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
    connection.request(method, "/admin/api/oauth/" + action, None if body is None else json.dumps(body),
                       {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    value = json.loads(answer.read())
    connection.close()
    return answer.status, value


def test_a_login_by_the_admin_api(home, server):
    assert call(server, "GET", "status") == (200, {"state": "idle", "message": ""})
    status, found = call(server, "POST", "start", {"paste": True})
    assert status == 200 and found["state"] == "waiting"
    status, refused = call(server, "POST", "paste", {"text": "what is this"})
    assert status == 403 and "neither the address" in refused["error"]["message"]
    assert call(server, "POST", "paste", {"text": 5})[0] == 400 and call(server, "POST", "status", {})[0] == 405
    assert call(server, "POST", "paste", {"text": callback_of(found["url"])})[1]["state"] == "done"
    found = call(server, "POST", "start", {})[1]
    query = urllib.parse.urlsplit(callback_of(found["url"])).query
    assert call(server, "POST", "callback", {"query": "code=x&state=y"})[1]["ok"] is False
    assert call(server, "POST", "callback", {"query": query})[1]["ok"] is True
    assert login_of(home)["apiKey"] == "sk-key-2"


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}])
def test_no_foreign_page_reaches_the_admin_api(gateway, server, headers):
    gateway.change_config(lambda raw: raw.update(allowed_origins=["*", "https://evil.example", "null"]))
    assert call(server, "POST", "start", {}, **headers)[0] == 403 and gateway.logins.flow is None
    assert call(server, "GET", "status", **headers)[0] == 403
    assert call(server, "GET", "status", Origin=server.url, Sec_Fetch_Site="same-origin")[0] == 200


def test_the_admin_api_wants_the_client_key(gateway, server):
    gateway.change_config(lambda raw: raw.update(custom_api_key="sk-client"))
    assert call(server, "POST", "start", {})[0] == 401
    assert call(server, "GET", "status", Authorization="Bearer sk-client")[0] == 200
    assert call(server, "GET", "status", Authorization="Bearer sk-client", Origin="https://evil.example")[0] == 403


# --- refreshing -----------------------------------------------------------------

class Clock:
    def __init__(self, at):
        self.at = at

    def __call__(self):
        return self.at


@pytest.fixture
def refresher(gateway):
    made = gateway.logins.refresher
    made._clock = made._oauth._clock = Clock(time.time())
    made._monotonic = Clock(1000.0)
    return made


def test_a_login_that_ends_soon_is_refreshed(home, host, gateway, refresher):
    put_login(home, api_key_expires_at="2020-01-01T00:00:00.000Z")
    gateway.reload()
    assert refresher.look() == refresher.LOOK_S
    login = login_of(home)
    assert (login["apiKey"], login["oauth_refresh_token"], login["foreign"]) == ("sk-key-1", "R1", {"kept": [1]})
    assert "api_key_expires_at" not in login and ifl.KEY_DUE not in login
    assert gateway.state.router.providers["iflow"].api_keys == ("sk-key-1",)
    refresher._monotonic.at += 3600
    refresher.look()
    assert host.count("/oauth/token") == 1
    report = gateway.health()["logins"]["default"]
    assert report["refresh_ok"] is True and report["renewable"] and not report["ended"] and report["expires_at"].endswith("Z")
    assert 'iflow2api_login_refresh_ok{account="default"} 1' in gateway.metrics_text()
    assert "R1" not in json.dumps(gateway.health()) and "sk-key" not in json.dumps(gateway.health())


@pytest.mark.parametrize("login", [{"oauth_refresh_token": None}, {"oauth_refresh_token": 5}, {"oauth_expires_at": None},
                                   {"oauth_expires_at": "rubbish"}, {"oauth_expires_at": "2199-01-01T00:00:00Z"}])
def test_what_is_not_refreshed(home, host, refresher, login):
    put_login(home, **login)
    refresher.look()
    assert not host.seen


@pytest.mark.parametrize("text", ["2027-01-02T03:04:05Z", "2027-01-02T03:04:05.000Z", "2027-01-02T11:04:05+08:00", 1798859045,
                                  1798859045000])
def test_times(text):
    assert ifl.format_time(ifl.parse_time(text)) == "2027-01-02T03:04:05Z"


def test_an_overloaded_host_is_asked_again_later_and_nothing_is_lost(home, host, gateway, refresher, caplog):
    put_login(home)
    before = cli_file(home).read_bytes()
    host.script["/oauth/token"] = [(200, "application/json", {"success": False, "code": "500", "message": "太多"})] * 6
    waits = []
    for _ in range(6):
        waits.append(refresher.look())
        count = host.count("/oauth/token")
        refresher.look()
        assert host.count("/oauth/token") == count            # not before its time
        refresher._monotonic.at += waits[-1]
    assert waits == [30, 60, 120, 240, 300, 900] and cli_file(home).read_bytes() == before
    gateway.reload()
    assert gateway.health()["status"] == "healthy" and gateway.health()["logins"]["default"]["refresh_ok"] is False
    refresher.look()
    assert login_of(home)["apiKey"] == "sk-key-1" and "R0" not in caplog.text


def test_a_dead_refresh_token_means_one_line_and_degraded_health(home, host, gateway, refresher, caplog):
    put_login(home, oauth_refresh_token="dead-refresh-token")
    gateway.reload()
    for _ in range(4):
        refresher.look()
        refresher._monotonic.at += 3600
    assert host.count("/oauth/token") == 1 and caplog.text.count("has ended") == 1 and "iflow2api.py login" in caplog.text
    assert "dead-refresh-token" not in caplog.text
    assert gateway.health()["status"] == "degraded" and gateway.health()["logins"]["default"]["ended"]
    assert login_of(home)["apiKey"] == "sk-key-0"             # the key may work on
    put_login(home)                                           # somebody logged in again
    gateway.reload()
    refresher.look()
    assert gateway.health()["status"] == "healthy" and login_of(home)["apiKey"] == "sk-key-1"


@pytest.mark.parametrize("now", [0.0, 4e9])
def test_a_wrong_clock_logs_nobody_out(home, host, gateway, refresher, now):
    put_login(home)
    refresher._clock.at = refresher._oauth._clock.at = now
    gateway.reload()
    refresher.look()
    assert gateway.health()["iflow_logged_in"] and gateway.health()["status"] == "healthy"
    refresher._clock.at = refresher._oauth._clock.at = time.time()
    refresher._monotonic.at += 3600
    refresher.look()
    assert login_of(home)["apiKey"] in ("sk-key-1", "sk-key-2") and gateway.health()["iflow_logged_in"]


def test_new_tokens_are_written_before_anything_else_is_asked(home, host, refresher):
    seen = []
    host.script["/userinfo"] = [lambda handler: seen.append(login_of(home))]
    put_login(home)
    refresher.look()
    assert seen[0]["oauth_refresh_token"] == "R1" and seen[0][ifl.KEY_DUE] is True and seen[0]["apiKey"] == "sk-key-0"


def test_a_key_that_could_not_be_asked_for_is_asked_for_later_without_a_refresh(home, host, refresher):
    put_login(home)
    host.script["/userinfo"] = [(502, "text/html", "<html>")]
    assert refresher.look() == 30 and login_of(home)["oauth_refresh_token"] == "R1" and login_of(home)["apiKey"] == "sk-key-0"
    refresher._monotonic.at += 30
    refresher.look()
    assert login_of(home)["apiKey"] == "sk-key-1" and host.count("/oauth/token") == 1


def test_tokens_that_could_not_be_written_are_kept_and_written_later(home, host, refresher, monkeypatch):
    put_login(home)
    real = ifl.write_file

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ifl, "write_file", full)
    assert refresher.look() == 30 and login_of(home)["oauth_refresh_token"] == "R0"
    monkeypatch.setattr(ifl, "write_file", real)
    refresher._monotonic.at += 30
    refresher.look()
    assert login_of(home)["oauth_refresh_token"] == "R1" and login_of(home)["apiKey"] == "sk-key-1"
    assert host.count("/oauth/token") == 1


def test_a_file_that_can_not_be_written_costs_no_token(home, host, refresher, monkeypatch):
    put_login(home)
    monkeypatch.setattr(ifl.os, "access", lambda path, mode: not str(path).endswith("settings.json"))
    refresher.look()
    assert not host.seen and refresher.state("default").message.endswith("the login can't be kept")


def test_two_threads_use_a_refresh_token_once(home, host, gateway, refresher):
    put_login(home)
    gateway.reload()
    found = []
    threads = [threading.Thread(target=lambda: found.append(refresher.renew("default", "sk-key-0", ifl.NOBODY))) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join(WAIT_S) for thread in threads]
    assert found == ["sk-key-1"] * 8 and host.count("/oauth/token") == 1


def test_two_processes_use_a_refresh_token_once(home, host, config):
    put_login(home)
    script = textwrap.dedent("""
        import sys; sys.path.insert(0, sys.argv[1])
        import iflow2api as ifl
        gateway = ifl.Gateway(config=ifl.ConfigFile(sys.argv[2]), environ={})
        print("ready", flush=True)
        sys.stdin.readline()
        gateway.logins.refresher.look()
        print(gateway.state.router.providers["iflow"].api_keys[0], gateway.health()["status"], flush=True)
        """)
    children = [subprocess.Popen([sys.executable, "-c", script, os.path.dirname(PROGRAM), config.folder], text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "HOME": str(home)})
                for _ in range(2)]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * 2
    [(child.stdin.write("go\n"), child.stdin.flush()) for child in children]
    said = [child.communicate(timeout=WAIT_S)[0] for child in children]
    assert host.count("/oauth/token") == 1 and login_of(home)["oauth_refresh_token"] == "R1"
    assert "sk-key-1 healthy\n" in said and set(said) <= {"sk-key-1 healthy\n", "sk-key-0 healthy\n"}


def test_an_account_of_ours_is_refreshed_in_config_json(home, host, config, gateways):
    host.valid.add("R-work")
    config.change(lambda raw: raw.update(accounts={"work": {
        "apiKey": "sk-work", "oauth_refresh_token": "R-work", "oauth_expires_at": ifl.format_time(time.time()), "email": "e"}}))
    gateway = ifl.Gateway(config=config, environ={})
    gateways.append(gateway)
    gateway.logins.refresher.look()
    assert config.read()["accounts"]["work"]["apiKey"] == "sk-key-1" and config.read()["accounts"]["work"]["email"] == "e"
    assert gateway.state.router.providers["iflow"].api_keys == ("sk-key-1",) and "sk-key-1" not in text_of(config.path)


def test_the_refresh_thread_starts_and_ends(home, host, gateway):
    put_login(home)
    gateway.watch_files()
    until(lambda: login_of(home)["apiKey"] == "sk-key-1", what="a refresh")
    gateway.close()
    assert not gateway.logins.refresher._thread.is_alive()


# --- a refused key ----------------------------------------------------------------

def ask(gateway, stream=False):
    body = {"model": "iflow/glm-4.6", "stream": stream, "messages": [{"role": "user", "content": "x"}]}
    sink = ifl._Collect()
    gateway.answer(ifl.Call(ifl.CHAT, body, json.dumps(body), {}, "req_1"), sink)
    return json.loads(sink.data)["choices"][0]["message"]["content"]


def test_a_refused_key_is_refreshed_and_the_request_made_once_more(home, host, gateway):
    put_login(home, oauth_expires_at="2199-01-01T00:00:00Z")
    gateway.reload()
    host.good_keys = {"sk-key-1"}
    assert ask(gateway) == "hi from sk-key-1"
    assert host.count("/oauth/token") == 1 and host.count("/v1/chat/completions") == 2
    assert ask(gateway) == "hi from sk-key-1" and host.count("/v1/chat/completions") == 3


@pytest.mark.parametrize("answer", [(401, "application/json", {"error": {"message": "no"}}),
                                    (200, "application/json", {"status": "434", "msg": "invalid"})])
def test_other_ways_to_refuse_a_key(home, host, gateway, answer):
    put_login(home)
    gateway.reload()
    host.script["/v1/chat/completions"] = [answer]
    assert ask(gateway) == "hi from sk-key-1"


def test_an_account_that_stays_refused_is_no_loop(home, host, gateway):
    put_login(home)
    gateway.reload()
    host.good_keys = set()
    for _ in range(3):
        with pytest.raises(ifl.UpstreamRefused) as refused:
            ask(gateway)
        assert refused.value.status == 403 and "python iflow2api.py login" in refused.value.message
    assert host.count("/oauth/token") == 1


def test_without_a_login_a_refused_key_is_not_refreshed(home, host, config, gateways):
    put_login(home, oauth_refresh_token=None)
    gateways.append(ifl.Gateway(config=config, environ={}))
    host.good_keys = set()
    with pytest.raises(ifl.UpstreamRefused):
        ask(gateways[-1])
    assert host.count("/oauth/token") == 0 and host.count("/v1/chat/completions") == 1


def test_438_is_not_refreshed(home, host, gateway):
    put_login(home)
    gateway.reload()
    host.script["/v1/chat/completions"] = [(200, "application/json", {"status": "438", "msg": "blocked"})]
    with pytest.raises(ifl.UpstreamRefused):
        ask(gateway)
    assert host.count("/oauth/token") == 0


def test_nobody_is_logged_in(config, gateways):
    gateways.append(ifl.Gateway(config=config, environ={}))
    with pytest.raises(ifl.NotLoggedIn, match="python iflow2api.py login"):
        gateways[-1].state.router.resolve("glm-5")


def test_status_shows_the_login(home, config, capsys):
    put_login(home)
    ifl.main(["status"])
    out = capsys.readouterr().out
    assert re.search(r"login +default +until 20\d\d-", out) and "sk-key-0" not in out and "R0" not in out
