"""The chat page in a real browser, against answers that the test writes."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flightline.gateway import page as served
from tests.gateway.page.answers import Answers, say, serve
from tests.gateway.page.browser import Page, browser

pytestmark = pytest.mark.slow

MARKDOWN = """# Flight plan

Some **bold** and *slanted* words, `code` with ``a ` tick``, a [link](https://example.org/a_(b)) and 2 * 3 * 4.
snake_case_names stay.

1. one
2. two
   - inner <b>not bold</b>
   - more

> a quote

| a | b |
|---|---|
| 1 | 2 |

```python
print("<script>x</script>")

# not a heading
```

---
The end: <img src=x onerror="document.title='owned'"> [bad](javascript:alert(1)) ![pic](https://example.org/p.png)"""


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture
def answers() -> Iterator[Answers]:
    with serve() as made:
        yield made


@pytest.fixture
def page(tab: Page, answers: Answers) -> Iterator[Page]:
    """The page, freshly opened."""
    tab.complaints.clear()
    tab.shape(1366, 768)
    tab.open(answers.url)
    tab.evaluate("localStorage.clear(), sessionStorage.clear()")
    tab.open(answers.url)
    tab.wait("$('model').value === 'tiny'")
    yield tab
    assert tab.complaints == []


def ask(page: Page, text: str = "Hi") -> None:
    page.click("#say")
    page.type(text)
    page.press("Enter")


def done(page: Page, answer: int = 1) -> None:
    page.wait(f"!running && document.querySelectorAll('article.assistant').length === {answer}")


def test_nothing_is_fetched_from_elsewhere():
    text = served.html().decode()
    assert (
        not re.search(r"""(src|href)=["']?(https?:)?//""", text)
        and "@import" not in text
        and "url(" not in text
    )
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", text)


def test_a_conversation(page, answers):
    answers.pieces = say("Hello there, how are you?")
    ask(page, "Hi")
    done(page)
    assert page.text("article.user") == "Hi"
    assert page.text("article.assistant .body") == "Hello there, how are you?"
    assert re.fullmatch(r"TTFT \d+ ms · ([\d.]+|–) tokens/s · 5 tokens", page.text(".foot span"))
    first = answers.requests[0]
    assert first["model"] == "tiny" and first["stream"] and first["stream_options"]["include_usage"]
    assert first["messages"] == [{"role": "user", "content": "Hi"}] and "temperature" not in first
    answers.pieces = say("Fine.")
    ask(page, "And?")
    done(page, 2)
    assert answers.requests[1]["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello there, how are you?"},
        {"role": "user", "content": "And?"},
    ]
    answers.pieces = say("Well.")
    page.click(".again")
    page.wait("!running && document.querySelectorAll('article.assistant')[1].innerText.includes('Well.')")
    assert answers.requests[2]["messages"] == answers.requests[1]["messages"]
    page.click("#new")
    assert page.evaluate("document.querySelectorAll('article').length") == 0
    page.click("#empty button")
    done(page)
    assert len(answers.requests[3]["messages"]) == 1


def test_enter_with_shift_is_a_new_line(page, answers):
    page.click("#say")
    page.type("a")
    page.press("Enter", shift=True)
    page.type("b")
    page.press("Enter")
    done(page)
    assert answers.requests[0]["messages"][0]["content"] == "a\nb"
    page.press("Enter")  # with nothing written
    assert len(answers.requests) == 1


def test_text_appears_as_it_comes_and_stops_when_told(page, answers):
    more = threading.Semaphore(2)
    answers.pieces = say("one two three " * 200)
    answers.gate = lambda index: more.acquire(timeout=300) and None
    ask(page)
    page.wait("document.querySelector('.assistant .body').innerText.trim() === 'one two'")
    assert page.evaluate("running !== null && $('send').hidden && !$('stop').hidden")
    assert "2 tokens" in page.text(".foot span")
    page.click("#stop")
    page.wait("!running")
    for _ in answers.pieces:  # one after the other: all at once, they would be sent before the news has come
        more.release()
        if answers.gone.wait(0.05):
            break
    assert answers.gone.is_set()
    assert "stopped" in page.text(".foot span") and page.text(".assistant .body").strip() == "one two"
    answers.gate = lambda index: None
    answers.pieces = say("Yes.")
    ask(page, "More")
    done(page, 2)
    assert answers.requests[1]["messages"][1] == {"role": "assistant", "content": "one two "}


def test_markdown_is_shown_and_never_run(page, answers):
    """Cut at every character, as the model may."""
    answers.pieces = [{"content": character} for character in MARKDOWN]
    ask(page)
    done(page)
    body = ".assistant .body"
    found = {
        tag: page.evaluate(f"[...document.querySelectorAll('{body} {tag}')].map((node) => node.textContent)")
        for tag in (
            "h3",
            "strong",
            "em",
            "p code",
            "a",
            "ol > li",
            "ul > li",
            "blockquote",
            "th",
            "td",
            "pre code",
        )
    }
    assert found["h3"] == ["Flight plan"] and found["strong"] == ["bold"] and found["em"] == ["slanted"]
    assert found["p code"] == ["code", "a ` tick"]
    assert found["a"] == ["link", "pic"] and "javascript" not in str(
        page.evaluate("[...document.links].map((a) => a.href)")
    )
    assert page.evaluate("document.links[0].href") == "https://example.org/a_(b)"
    assert len(found["ol > li"]) == 2 and found["ul > li"] == ["inner <b>not bold</b>", "more"]
    assert found["blockquote"] == ["a quote"] and found["th"] == ["a", "b"] and found["td"] == ["1", "2"]
    assert found["pre code"] == ['print("<script>x</script>")\n\n# not a heading']
    assert page.evaluate(f"document.querySelectorAll('{body} img, {body} script, {body} b').length") == 0
    assert "owned" not in page.evaluate("document.title")
    assert "snake_case_names stay." in page.text(body) and "2 * 3 * 4" in page.text(body)
    once = page.evaluate(f"document.querySelector('{body}').innerHTML")
    assert (
        page.evaluate(
            "(() => { const node = document.createElement('div'); showMarkdown(node, turns.at(-1).content);"
            "return node.innerHTML; })()"
        )
        == once
    )  # piece by piece is as at once


def test_thoughts_are_apart(page, answers):
    answers.pieces = [{"reasoning_content": "hm, "}, {"reasoning_content": "so"}, *say("Yes.")]
    ask(page)
    done(page)
    assert page.evaluate("document.querySelector('.thoughts div').textContent") == "hm, so"
    assert page.evaluate("!document.querySelector('.thoughts').open")
    assert page.text(".assistant .body") == "Yes."
    assert page.evaluate("turns.at(-1).content") == "Yes."


def test_settings_are_sent_and_kept(page, answers):
    page.click("#open-settings")
    values = {
        "system": "Be brief.",
        "temperature": "0.5",
        "top_p": "0.9",
        "max_tokens": "7",
        "seed": "3",
        "key": "k-1",
    }
    for name, value in values.items():
        page.click(f"#settings [name={name}]")
        page.type(value)
    page.click("#settings button[type=submit]")
    answers.key = "k-1"
    ask(page)
    done(page)
    sent = answers.requests[0]
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["seed"]) == (0.5, 0.9, 7, 3)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    page.open(answers.url)
    assert page.evaluate("fields.temperature.value") == "0.5" and page.evaluate("fields.key.value") == "k-1"
    assert "k-1" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_missing_key_is_asked_for(page, answers):
    answers.key = "k-1"
    page.open(answers.url)
    page.wait("Boolean(document.querySelector('.problem'))")
    assert page.text(".problem").startswith("The server wants an API key. Give it in the settings.")
    page.click("#open-settings")
    page.click("#settings [name=key]")
    page.type("k-1")
    page.press("Escape")
    page.wait("!document.querySelector('.problem') && $('model').value === 'tiny'")


@pytest.mark.parametrize(
    ("status", "error", "finish", "told"),
    [
        (400, "temperature is 9: it must be 0 to 2", "stop", "temperature is 9: it must be 0 to 2"),
        (429, "queue is full", "stop", "The server is busy. Try again in a moment. queue is full"),
        (503, "", "stop", "The server is not ready. Try again in a moment."),
        (500, "it broke", "stop", "The server failed. it broke"),
        (200, "the engine stopped", "stop", "the engine stopped"),
        (200, "", None, "The connection ended before the answer was complete."),
    ],
)
def test_errors_are_told_in_words(page, answers, status, error, finish, told):
    answers.status, answers.error, answers.finish = status, error, finish
    ask(page)
    done(page)
    assert page.text(".problem") == told
    answers.status, answers.error, answers.finish = 200, "", "stop"
    page.click(".again")
    page.wait("!running && !document.querySelector('.problem')")
    assert page.text(".assistant .body") == "Hello"


def test_a_server_that_is_not_there(page, answers):
    page.evaluate("fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    ask(page)
    done(page)
    assert page.text(".problem") == "The server cannot be reached."


def test_an_answer_that_was_cut_says_so(page, answers):
    answers.finish = "length"
    ask(page)
    done(page)
    assert page.text(".foot span").endswith("cut at the limit of tokens")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1366])
def test_everything_fits(page, answers, width, dark, tmp_path):
    page.shape(width, 844 if width < 600 else 768, dark)
    page.open(answers.url)
    page.picture(tmp_path / "empty.png")
    assert page.evaluate("document.documentElement.hasAttribute('data-dark')") is dark
    answers.pieces = [
        {"reasoning_content": "I should show everything."},
        {"content": MARKDOWN + "\n\n" + "x" * 300},
    ]
    ask(page, "Show me a flight plan, please, with all that belongs to it: " + "y" * 100)
    done(page)
    page.picture(tmp_path / "answer.png")
    page.evaluate("$('log').scrollTop = 0")
    page.picture(tmp_path / "top.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("$('log').scrollWidth <= $('log').clientWidth")
    seen = "(node) => { const box = node.getBoundingClientRect(); return box.left >= 0 && box.right <= innerWidth; }"
    assert page.evaluate(f"[...document.querySelectorAll('header > *, #composer form > *')].every({seen})")
    page.click("#open-settings")
    page.wait("$('settings').open")
    page.picture(tmp_path / "settings.png")
    assert page.evaluate(f"[...document.querySelectorAll('dialog *')].every({seen})")
    page.press("Escape")
    assert sorted(Path(tmp_path).glob("*.png"))
