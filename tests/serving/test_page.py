"""The page, in a real browser: Debian's Chromium, without a window."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
import uvicorn
from routed import routed_sorting, texts_of
from served import application, asking

import fusionkit
from fusionkit import SVD, Bundle

CHROMIUM = shutil.which("chromium")
EVIL = '<img src=x onerror="window.hacked=1">'
TEXT = "a b c d"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("the page's tests need Chromium: apt-get install chromium")
    with api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def serving(bundle: Path, **limits: Any) -> Iterator[str]:
    """The application of a bundle, at a port of its own; its URL."""
    config = uvicorn.Config(application(bundle, **limits), port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def sorter_url(sorting: Bundle) -> Iterator[str]:
    """A server of classifiers, one of which has a name that would be markup."""
    folder = sorting.path.parent
    tasks = {task: str(folder / task) for task in ("moods", "topics")}
    tasks[EVIL] = str(folder / "topics")
    bundle = fusionkit.compress(
        str(folder / "base"), tasks, SVD(6), folder / "evil.bundle", private=["classifier.*"]
    )
    with serving(bundle.path) as url:
        yield url


@pytest.fixture(scope="module")
def talker_url(models: Path) -> Iterator[str]:
    with serving(models / "talk.bundle") as url:
        yield url


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a server's page; nothing it asks for may be elsewhere, and no error may come."""
    contexts: list[Any] = []
    asked: list[str] = []
    wrong: list[str] = []

    def go(url: str, wait: str = "#rows tr", **settings: Any) -> Any:
        context = browser.new_context(**settings)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Policy" in said.text else None)
        page.goto(url)
        page.wait_for_selector(wait)
        page.here = urlsplit(url).netloc
        return page

    yield go
    hosts = {urlsplit(url).netloc for url in asked}
    own = {page.here for context in contexts for page in context.pages}
    for context in contexts:
        context.close()
    assert hosts == own
    assert wrong == []


def until(page: Any, condition: str) -> None:
    """Wait for a condition; the page's policy lets no text be run, as `wait_for_function` does."""
    end = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def sides(page: Any) -> dict[str, list[str]]:
    """What either side shows: its task's name → its lines."""
    until(
        page,
        "document.querySelectorAll('.answer > .note, article .error:not(:empty)').length == 2",
    )
    shown = {}
    for article in page.locator("#answers article").all():
        lines = article.locator(".answer").inner_text().split("\n")
        shown[article.locator("h3").inner_text()] = [line for line in lines if line]
    return shown


def bars(answer: dict[str, Any]) -> list[str]:
    """What the page has to show of the API's answer."""
    [found] = answer["predictions"]
    shares = sorted(found["probabilities"].items(), key=lambda each: -each[1])
    return [part for label, share in shares for part in (label, f"{100 * share:.1f}%")]


def test_two_classifiers_side_by_side(sorter_url: str, visit: Callable[..., Any]) -> None:
    page = visit(sorter_url)
    page.get_by_label("Text", exact=True).fill(TEXT)
    page.get_by_label("First task").select_option("topics")
    page.get_by_label("Second task").select_option("moods")
    page.get_by_role("button", name="Ask both").click()
    shown = sides(page)
    assert list(shown) == ["topics", "moods"]
    for task, lines in shown.items():
        body = {"task": task, "inputs": TEXT}
        assert lines[:-1] == bars(httpx2.post(f"{sorter_url}/predict", json=body).json())
        assert lines[-1].endswith((" ms", " s"))


def test_two_texts_and_what_is_refused(sorter_url: str, visit: Callable[..., Any]) -> None:
    page = visit(sorter_url)
    page.get_by_label("two texts").check()
    page.get_by_label("Text", exact=True).fill("a b")
    page.get_by_label("Second text").fill("c d")
    page.keyboard.press("Control+Enter")
    shown = sides(page)
    body = {"task": "moods", "inputs": {"text": "a b", "pair": "c d"}}
    assert shown["moods"][:-1] == bars(httpx2.post(f"{sorter_url}/predict", json=body).json())
    page.get_by_label("a text").check()
    page.get_by_label("Text", exact=True).fill("a " * 100)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#left .error:not(:empty)")
    assert "tokens, got 100; shorten the text" in page.locator("#left .error").inner_text()


def test_two_language_models_side_by_side(talker_url: str, visit: Callable[..., Any]) -> None:
    page = visit(talker_url)
    page.get_by_label("Prompt").fill(TEXT)
    page.get_by_label("Tokens, at most").fill("12")
    page.get_by_role("button", name="Ask both").click()
    shown = sides(page)
    assert list(shown) == ["cats", "dogs"]
    for task, lines in shown.items():
        body = {"model": task, "prompt": TEXT, "max_tokens": 12, "temperature": 0}
        said = httpx2.post(f"{talker_url}/v1/completions", json=body).json()
        assert "\n".join(lines[:-1]) == (TEXT + said["choices"][0]["text"]).rstrip()
        assert lines[-1].startswith(f"{said['usage']['completion_tokens']} tokens · ")
    page.get_by_label("as a conversation").check()
    page.get_by_role("button", name="Ask both").click()
    until(page, "!document.querySelector('.prompt')")
    for task, lines in sides(page).items():
        messages = [{"role": "user", "content": TEXT}]
        body = {"model": task, "messages": messages, "max_tokens": 12, "temperature": 0}
        said = httpx2.post(f"{talker_url}/v1/chat/completions", json=body).json()
        assert "\n".join(lines[:-1]).strip() == said["choices"][0]["message"]["content"].strip()


def test_an_answer_is_stopped(talker_url: str, visit: Callable[..., Any]) -> None:
    page = visit(talker_url)
    page.get_by_label("Prompt").fill("w x y z w x")  # neither ends by itself
    page.get_by_label("Tokens, at most").fill("1000")
    page.get_by_role("button", name="Ask both").click()
    page.get_by_role("button", name="Stop").click()
    sides(page)
    assert page.get_by_role("button", name="Stop").is_disabled()
    assert "stopped" in page.locator("#answers").inner_text()


def focused(page: Any) -> tuple[str, str, bool]:
    """What has the focus: its element, its label, and whether that is to be seen."""
    found = page.evaluate(
        """() => {
            const at = document.activeElement;
            const name = at.labels?.[0]?.innerText ?? at.innerText;
            return [at.tagName, name.trim(), getComputedStyle(at).outlineStyle !== "none"];
        }"""
    )
    return found[0], found[1], found[2]


def test_by_keyboard_alone(sorter_url: str, visit: Callable[..., Any]) -> None:
    page = visit(sorter_url)
    order: list[tuple[str, str, bool]] = []
    typed = {"Text": TEXT, "First task": "topics", "Second task": "moods"}
    while not order or order[-1][1] != "Ask both":
        page.keyboard.press("Tab")
        order.append(focused(page))
        page.keyboard.type(typed.get(order[-1][1], ""))
        assert len(order) < 10, order
    assert [name for _, name, _ in order] == ["a text", *typed, "Ask both"]
    assert all(seen for *_, seen in order)
    page.keyboard.press("Enter")
    assert list(sides(page)) == ["topics", "moods"]
    live = page.locator("#answers [aria-live=polite]")
    assert [each.get_attribute("aria-busy") for each in live.all()] == ["false", "false"]
    unnamed = """[...document.querySelectorAll("input, select, textarea, button")].filter(
        (each) => !each.labels?.length && !each.innerText.trim()).length"""
    assert page.evaluate(unnamed) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(sorter_url: str, visit: Callable[..., Any], scheme: str) -> None:
    page = visit(sorter_url, viewport={"width": 320, "height": 600}, color_scheme=scheme)
    page.get_by_label("Text", exact=True).fill("a " * 20)
    page.get_by_label("First task").select_option(EVIL)
    page.get_by_role("button", name="Ask both").click()
    sides(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    colours = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    text, ground = (sum(map(int, each[4:-1].split(","))) for each in colours)
    assert (text < ground) == (scheme == "light")


def test_a_name_is_text(sorter_url: str, visit: Callable[..., Any]) -> None:
    page = visit(sorter_url)
    page.get_by_label("Text", exact=True).fill(TEXT)
    page.get_by_label("First task").select_option(EVIL)
    page.get_by_role("button", name="Ask both").click()
    assert EVIL in sides(page)
    assert EVIL in page.locator("#rows td").all_inner_texts()
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_figures_are_live(sorter_url: str, visit: Callable[..., Any]) -> None:
    page = visit(sorter_url)
    body = {"task": "moods", "inputs": TEXT}
    for _ in range(5):
        httpx2.post(f"{sorter_url}/predict", json=body)
    cell = "//td[text()='moods']/following-sibling::td[2]"
    before = int(page.locator(cell).inner_text())
    httpx2.post(f"{sorter_url}/predict", json=body)
    while int(page.locator(cell).inner_text()) <= before:
        page.wait_for_timeout(20)
    terms = page.locator("#figures dt").all_inner_texts()
    assert {"Requests", "Half within", "99% within", "Rows a step", "Tasks a step"} <= {*terms}


def test_a_key(sorting: Bundle, visit: Callable[..., Any]) -> None:
    with serving(sorting.path, keys=["secret"]) as url:
        page = visit(url, wait="#key-form:not([hidden])")
        assert page.locator("#try").is_hidden()
        assert focused(page)[1] == "API key"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("the server does not know this key").wait_for()
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#rows tr")
        page.get_by_label("Text", exact=True).fill(TEXT)
        page.keyboard.press("Control+Enter")
        assert {*sides(page)} == {"moods", "topics"}
        kept = "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
        assert page.evaluate(kept) == [0, 0, "", f"{url}/"]


def test_the_router_picks(sorting: Bundle, tmp_path: Path, visit: Callable[..., Any]) -> None:
    with serving(routed_sorting(sorting.path, tmp_path), router=True) as url:
        page = visit(url)
        page.get_by_label("Text", exact=True).fill(texts_of("topics")[0])
        page.get_by_label("First task").select_option(label="the router picks")
        page.get_by_label("Second task").select_option("moods")
        page.keyboard.press("Tab")
        page.get_by_role("button", name="Ask both").click()
        shown = sides(page)
        assert list(shown) == ["topics", "moods"]
        assert shown["topics"][-1].startswith("picked by the router, ")


def test_no_script_but_the_pages_own(sorter_url: str, browser: Any) -> None:
    page = browser.new_page()
    page.goto(sorter_url)
    with pytest.raises(Exception, match="Content Security Policy"):
        page.add_script_tag(content="window.hacked = 1")
    assert page.evaluate("window.hacked") is None
    page.close()


def test_what_is_sent(sorting: Bundle) -> None:
    for client in asking(application(sorting.path, keys=["secret"])):
        page = client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in page.text.replace("http-equiv", "")
        assert client.get("/page/page.js").headers["content-type"].startswith("text/javascript")
        assert client.get("/page/none.js").status_code == 404
        assert client.get("/page/..%2fpage.py").status_code == 404
        assert not [
            path for path in client.get("/openapi.json").json().get("paths", {}) if "page" in path
        ]
