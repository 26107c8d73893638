"""`millpond web` in a real browser, beside a running stack: the views, the orders of an operator, and the console."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from playwright.sync_api import Browser, Dialog, Locator, Page, expect, sync_playwright

from millpond.pipeline.stack.ports import HOST, free_port
from tests.support import given
from tests.system.cli.test_stack import FREE_PORTS, MILLPOND, WAIT_S, Home, until

TOKEN = "only-an-operator-knows-it"
ODD = "<script>window.hurt=1</script>&amp;\"'<img src=x onerror=window.hurt=1>"
RULES = (
    given.store("#", expired_time=3_600),
    given.a_rule(hook="client.connected", action="on_client_connected"),
    given.a_rule(hook="client.disconnected", action="on_client_disconnected"),
    given.queue("queue/#"),
    given.queue("poison/#", ack_timeout_s=1, max_deliveries=1),
    given.pubsub("pubsub/#"),
)
# The message that Chromium logs itself for an answer with an error status.
FAILED_REQUEST = "Failed to load resource"
expect.set_options(timeout=WAIT_S * 1_000)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A running stack whose page has a token."""
    directory = tmp_path_factory.mktemp("home")
    token, config = directory / "token", directory / "millpond.toml"
    token.write_text(f"{TOKEN}\n")
    config.write_text(f'[web]\ntoken_file = "{token}"\n{given.POOL}{"".join(RULES)}')
    home = Home(directory / "data")
    home.says("up", "--detach", *FREE_PORTS, "--redis", "embedded", "--config", str(config))
    try:
        yield home
    finally:
        home.run("down")


@pytest.fixture(scope="module")
def url(home: Home) -> str:
    """The URL of the page."""
    return str(home.status()["addresses"]["Web page"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium. As root it runs only without its sandbox."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "these tests need chromium: `make chromium` installs it"
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """A page in a new browser context. Afterwards: it asked no other server, stored no token, and no script failed."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(WAIT_S * 1_000)
    asked, script_errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: script_errors.append(str(error)))
    page.on(
        "console", lambda said: script_errors.append(said.text) if said.type == "error" else None
    )
    yield page
    if page.url == "about:blank":
        context.close()
        return  # the test failed before it opened the page
    hurt = page.evaluate("window.hurt")
    kept = page.evaluate(
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    )
    context.close()
    assert hurt is None
    assert TOKEN not in kept + "".join(asked)
    assert {urlsplit(each).hostname for each in asked} == {HOST}
    assert len({urlsplit(each).port for each in asked}) == 1
    assert [text for text in script_errors if not text.startswith(FAILED_REQUEST)] == []


def row(page: Page, section: str, name: str) -> Locator:
    """The row whose first cell is exactly this text."""
    cell = page.locator("th").filter(has_text=re.compile(f"^{re.escape(name)}$"))
    return page.locator(f"#{section} tbody tr").filter(has=cell)


def number(page: Page, section: str, name: str, column: int) -> Locator:
    return row(page, section, name).locator("th, td").nth(column)


def publish(home: Home, topic: str, *payloads: str) -> None:
    for payload in payloads:
        home.says("pub", "-q", "1", "-t", topic, "-m", payload)


def dead_letter(home: Home, topic: str) -> str:
    """Make a dead letter, and return its id."""
    publish(home, topic, "bad")
    home.says("sub", "-i", "careless", "-q", "1", "-t", topic, "--no-ack", "-C", "1")

    def found() -> str | None:
        command = ["dead-letters", "list", "--data", str(home.data), "--json", "-t", topic]
        listed = json.loads(subprocess.check_output([*MILLPOND, *command]))
        return listed[0]["message_id"] if listed else None

    return str(until(found, "a dead letter"))


def test_the_page_follows_redis_without_a_reload(home: Home, page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator("#agents tbody tr")).to_have_count(4)
    publish(home, "pubsub/news", "one", "two")
    expect(number(page, "topics", "pubsub/news", 2)).to_have_text("2")
    assert home.says("redis", "ZCARD", "mqtt:msg:pubsub/news") == "2\n"
    publish(home, "pubsub/news", "three")
    expect(number(page, "topics", "pubsub/news", 2)).to_have_text("3")
    expect(number(page, "agents", "pubsub", 2)).to_have_text("0")
    expect(number(page, "agents", "pubsub", 4)).to_have_text(re.compile(r"^\d"))

    home.says("sub", "-i", "alice", "-q", "1", "-t", "pubsub/news", "-C", "3")
    row(page, "topics", "pubsub/news").get_by_role("link").click()
    expect(page.get_by_role("heading", level=2)).to_have_text("Topic pubsub/news")
    newest = home.says("redis", "ZRANGE", "mqtt:msg:pubsub/news", "-1", "-1").strip()
    alice = page.locator("#topic-subscribers tbody tr").get_by_role("cell")
    expect(alice).to_have_text(["0", newest, "0", "0", "0", "0"])
    assert home.says("redis", "GET", "mqtt:acked:alice:pubsub/news").strip() == newest
    publish(home, "pubsub/news", "four")
    expect(alice).to_have_text(["0", newest, "1", "0", "0", "0"])
    page.get_by_role("link", name="Clients").click()
    expect(number(page, "clients", "alice", 1)).to_have_text("no")
    page.get_by_label("Client id contains").fill("nobody")
    page.keyboard.press("Enter")
    expect(page.locator("#clients .note")).to_have_text("no clients, 0 online")


def test_an_operator_requeues_and_drops_dead_letters(home: Home, page: Page, url: str) -> None:
    again, away = dead_letter(home, "poison/again"), dead_letter(home, "poison/away")
    page.goto(f"{url}#dead-letters")
    expect(row(page, "dead-letters", again)).to_contain_text("poison/again")
    expect(page.locator("#dead-letters").get_by_role("button")).to_have_text(["Unlock"])
    page.get_by_label("Operator’s token").fill("somebody-who-only-guesses")
    page.keyboard.press("Enter")
    expect(page.locator("#operator-state")).to_have_text("the token is wrong")
    page.get_by_label("Operator’s token").fill(TOKEN)
    page.keyboard.press("Enter")

    row(page, "dead-letters", again).get_by_role("button", name="Requeue").click()
    expect(page.locator("#operator-state")).to_contain_text(f"{again} will be requeued")
    expect(row(page, "dead-letters", again)).to_have_count(0)
    received = home.says("sub", "-i", "careful", "-q", "1", "-t", "poison/again", "-C", "1")
    assert received == "bad\n"

    asked: list[str] = []

    def dismiss(dialog: Dialog) -> None:
        asked.append(dialog.message)
        dialog.dismiss()

    page.once("dialog", dismiss)
    row(page, "dead-letters", away).get_by_role("button", name="Drop").click()
    assert asked == [f"Drop {away}, with its message?"]
    expect(row(page, "dead-letters", away)).to_have_count(1)
    page.once("dialog", lambda dialog: dialog.accept())
    row(page, "dead-letters", away).get_by_role("button", name="Drop").click()
    expect(row(page, "dead-letters", away)).to_have_count(0)
    assert home.says("redis", "EXISTS", f"mqtt:msg:{away}") == "0\n"
    assert TOKEN not in page.content()
    assert TOKEN not in (home.data / "log" / "web.log").read_text()


def test_what_could_not_be_read_is_on_the_page(home: Home, page: Page, url: str) -> None:
    home.says("redis", "PUBLISH", "mqtt_channel", ODD)
    page.goto(f"{url}#dead-letters")
    cells = page.locator("#unreadable tbody tr").first.get_by_role("cell")
    expect(cells.nth(0)).to_have_text("mqtt_channel")
    expect(cells.nth(1)).to_have_text("sessions")
    expect(cells.nth(3)).to_have_text(ODD)
    expect(page.locator("#unreadable .note")).to_have_text("1 record")
    assert page.evaluate("window.hurt") is None


def test_the_console_connects_subscribes_publishes_and_shows_messages(
    home: Home, page: Page, url: str
) -> None:
    page.goto(f"{url}#console")
    state = page.locator("#console-state")
    page.get_by_label("Client id", exact=True).fill("painter")
    page.get_by_role("button", name="Connect", exact=True).click()
    expect(state).to_have_text("connected as painter")
    page.get_by_label("Topic filter").fill("queue/paint")
    page.get_by_role("button", name="Subscribe").click()
    expect(state).to_have_text("subscribed to queue/paint, QoS 1")
    page.locator("#publish-topic").fill("queue/paint")
    page.get_by_label("Payload").fill("red")
    page.get_by_role("button", name="Publish").click()
    expect(state).to_have_text("published to queue/paint, and the broker has acknowledged it")
    newest = page.locator("#messages tbody tr").first
    expect(newest.get_by_role("cell")).to_have_text(["queue/paint", "1", "no", "red"])
    publish(home, "queue/paint", "green")
    expect(newest).to_contain_text("green")
    until(
        lambda: home.says("redis", "EXISTS", "mqtt:msg:queue/paint") == "0\n",
        "the acks to have deleted them",
    )
    assert home.says("redis", "HGET", "mqtt:client:painter", "state") == "1\n"

    page.get_by_role("button", name="Unsubscribe").click()
    expect(state).to_have_text("unsubscribed from queue/paint")
    page.get_by_role("button", name="Disconnect").click()
    expect(state).to_have_text("not connected")
    until(
        lambda: home.says("redis", "HGET", "mqtt:client:painter", "state") == "0\n",
        "the client to be offline",
    )


def test_the_console_stops_and_says_why_when_the_broker_refuses_a_publish(
    page: Page, url: str
) -> None:
    page.goto(f"{url}#console")
    page.get_by_role("button", name="Connect", exact=True).click()
    page.locator("#publish-topic").fill("$millpond/refused")
    page.get_by_label("Payload").fill("red")
    page.get_by_role("button", name="Publish").click()
    state = page.locator("#console-state")
    expect(state).to_contain_text("after the publish to $millpond/refused: it refuses it")
    expect(page.get_by_role("button", name="Connect", exact=True)).to_be_enabled()


def test_odd_names_are_shown_as_plain_text(home: Home, page: Page, url: str) -> None:
    topic = f"poison/{ODD}"
    message_id = dead_letter(home, topic)
    home.says("sub", "-i", ODD, "-q", "1", "-t", f"queue/{ODD}", "-E")
    publish(home, topic, ODD)
    page.goto(url)
    row(page, "topics", topic).get_by_role("link").click()
    expect(page.get_by_role("heading", level=2)).to_have_text(f"Topic {topic}")
    expect(page.locator("#topic-facts")).to_contain_text("poison/#")
    page.get_by_role("link", name="Clients").click()
    expect(number(page, "clients", ODD, 1)).to_have_text("no")
    page.get_by_role("link", name="Dead letters").click()
    expect(number(page, "dead-letters", message_id, 1)).to_have_text(topic)
    page.goto(f"{url}#topic={quote(ODD, safe='')}")
    expect(page.get_by_role("alert")).to_contain_text("nothing is known of the topic")
    page.goto(f"{url}#console")
    page.get_by_role("button", name="Connect", exact=True).click()
    page.get_by_label("Topic filter").fill("pubsub/#")
    page.get_by_role("button", name="Subscribe").click()
    publish(home, f"pubsub/{ODD}", ODD)
    newest = page.locator("#messages tbody tr").first.get_by_role("cell")
    expect(newest).to_have_text([f"pubsub/{ODD}", "1", "no", ODD])


def test_without_a_token_the_page_is_read_only(home: Home, page: Page, tmp_path: Path) -> None:
    config = tmp_path / "millpond.toml"
    lines = (home.data / "stack.toml").read_text().splitlines()
    config.write_text("\n".join(line for line in lines if not line.startswith("token_file")))
    url = f"http://{HOST}:{free_port()}/"
    message_id = dead_letter(home, "poison/read-only")
    running = subprocess.Popen(
        [*MILLPOND, "web", "--config", str(config), "--port", str(urlsplit(url).port)]
    )
    try:
        until(lambda: answers(url), "the page")
        page.goto(f"{url}#dead-letters")
        expect(row(page, "dead-letters", message_id)).to_have_count(1)
        expect(page.locator("#operator-state")).to_contain_text("read-only")
        expect(page.locator("#dead-letters").get_by_role("button")).to_have_count(0)
        for path in ("operator", "dead-letters/requeue", "dead-letters/drop"):
            assert ask(f"{url}api/{path}", {"message_ids": [message_id]}, TOKEN)[0] == 403
        running.terminate()
        assert running.wait(WAIT_S) == 0
    finally:
        running.kill()
        running.wait()


def test_an_outage_is_shown_until_it_ends(home: Home, page: Page, url: str) -> None:
    agents, topics = (page.locator(f"#{name} .error") for name in ("agents", "topics"))
    publish(home, "before", "1")
    page.goto(url)
    expect(row(page, "topics", "before")).to_have_count(1)
    expect(row(page, "agents", "messages")).to_have_count(1)
    pids = home.pids()

    os.kill(pids["kafka"], signal.SIGSTOP)
    try:
        expect(agents).to_contain_text("Kafka")
        expect(topics).to_be_hidden()
    finally:
        os.kill(pids["kafka"], signal.SIGCONT)
    expect(agents).to_be_hidden()

    os.kill(pids["redis"], signal.SIGSTOP)
    try:
        expect(topics).to_contain_text("Redis does not answer")
        expect(row(page, "topics", "before")).to_have_count(1)
    finally:
        os.kill(pids["redis"], signal.SIGCONT)
    expect(topics).to_be_hidden()
    publish(home, "after", "1")
    expect(row(page, "topics", "after")).to_have_count(1)

    page.context.set_offline(True)
    expect(topics).to_have_text("Millpond’s web server does not answer; the page keeps trying")
    page.context.set_offline(False)
    expect(topics).to_be_hidden()
    expect(agents).to_be_hidden()


def test_invalid_requests_are_refused(home: Home, url: str) -> None:
    assert ask(f"{url}api/topic?name=nothing")[0] == 404
    assert ask(f"{url}api/topic?name=%23")[0] == 400
    assert ask(f"{url}api/topic?name=%ff%00")[0] == 400
    assert ask(f"{url}nothing") == (404, {"error": "Not Found"})
    assert ask(f"{url}../millpond.toml")[0] == 404
    for token in (None, "", "a" * 5_000, TOKEN + "x", TOKEN[:-1], "\xe9" * 20):
        assert ask(f"{url}api/operator", {}, token)[0] in {400, 401}
    assert ask(f"{url}api/operator", {}, TOKEN) == (204, None)
    for wrong in ([], ["m"] * 101, "m", [1]):
        assert ask(f"{url}api/dead-letters/drop", {"message_ids": wrong}, TOKEN)[0] == 400
    status, said = ask(f"{url}api/dead-letters/drop", {"message_ids": ["none"]}, TOKEN)
    assert (status, "these ids are no dead letters: 'none'" in str(said)) == (409, True)
    # Another site's host name that leads to this address.
    rebound = urllib.request.Request(f"{url}api/web", headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(rebound, timeout=WAIT_S)
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        policy = answer.headers["Content-Security-Policy"]
    broker = home.status()["addresses"]["MQTT over WebSocket"]
    assert policy.startswith(f"default-src 'self'; connect-src 'self' {broker};")


def test_an_error_at_the_start_is_one_line(home: Home, tmp_path: Path) -> None:
    short, config = tmp_path / "token", tmp_path / "millpond.toml"
    short.write_text("short\n")
    config.write_text(f'[web]\nport = 0\ntoken_file = "{short}"\n')
    done = home.run("web", "--config", str(config))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "at least 16" in done.stderr
    taken = str(urlsplit(home.status()["addresses"]["Web page"]).port)
    done = home.run("web", "--port", taken)
    assert done.returncode == 2
    assert f"cannot listen at {HOST}:{taken}" in done.stderr.splitlines()[-1]


def answers(url: str) -> bool:
    try:
        return ask(f"{url}api/web")[0] == 200
    except OSError:
        return False


def ask(url: str, body: object = None, token: str | None = None) -> tuple[int, object]:
    """The status and the answer of a GET, or of a POST if there is a body."""
    data = None if body is None else json.dumps(body).encode()
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"null")
