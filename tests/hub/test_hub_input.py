"""Bad input: a 400 with the field and what is allowed, in the same words by the form and by the REST API, and no harm done."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_pool import FakePool
from hub_process import Browser, Hub, error_text, until

FRACTION = "it must be a fraction of one GPU above 0 and up to 1, such as 0.25, 1/4 or 25%."
MEMORY = "it must be an amount above 0 with a binary unit, such as 20 GiB or 512 MiB."

BAD = [
    ({"gpu_fraction": "0"}, f"Share of a GPU is '0'; {FRACTION}"),
    ({"gpu_fraction": "-0.5"}, f"Share of a GPU is '-0.5'; {FRACTION}"),
    ({"gpu_fraction": "NaN"}, f"Share of a GPU is 'NaN'; {FRACTION}"),
    ({"gpu_fraction": "1/0"}, f"Share of a GPU is '1/0'; {FRACTION}"),
    ({"gpu_fraction": "1e309"}, f"Share of a GPU is '1e309'; {FRACTION}"),
    ({"gpu_fraction": "1.5"}, f"Share of a GPU is '1.5'; {FRACTION}"),
    ({"gpu_fraction": "<b>&"}, f"Share of a GPU is '<b>&'; {FRACTION}"),
    ({"gpu_memory": "20 GB"}, f"GPU memory is '20 GB'; {MEMORY[:-1]}: 20 GiB."),
    ({"gpu_memory": "-1 GiB"}, f"GPU memory is '-1 GiB'; {MEMORY}"),
    ({"gpu_memory": "79 GiB"}, "GPU memory is '79 GiB'; it must be at most 78 GiB, what one GPU has."),
    ({"gpu_fraction": "1/2", "gpu_count": "3"}, "Number of GPUs is 3; it must be a whole number from 1 to 2, the GPUs of one machine."),
    ({"gpu_fraction": "1/2", "gpu_count": "0"}, "Number of GPUs is '0'; it must be a whole number from 1 to 16."),
    ({"gpu_fraction": "1/2", "gpu_model": "H900"}, "GPU model is 'H900'; it must be one of Simulated H100 80GB."),
    ({"gpu_fraction": "1/2", "gpu_mode": "greedy"}, "Mode is 'greedy'; it must be strict or burst."),
]
ONLY_REST: list[tuple[Any, str]] = [
    ({"profile": "custom", "gpu_fraction": 0}, f"Share of a GPU is 0; {FRACTION}"),
    ({"profile": "custom", "gpu_fraction": True}, f"Share of a GPU is True; {FRACTION}"),
    ({"profile": "custom", "gpu_fraction": [1]}, f"Share of a GPU is [1]; {FRACTION}"),
    ({"profile": "custom", "gpu_fraction": {"a": "b"}}, f"Share of a GPU is {{'a': 'b'}}; {FRACTION}"),
    ({"profile": "custom", "gpu_memory": 1.5}, f"GPU memory is 1.5; {MEMORY}"),
    ({"profile": "custom", "gpu_count": 1.5, "gpu_fraction": 1}, "Number of GPUs is 1.5; it must be a whole number from 1 to 16."),
    ({"profile": ["half"]}, "Profile is ['half']; it must be one of cpu, eighth, quarter, half, whole, custom."),
    (
        {"profile": "half", "gpu_fraction": "1"},
        "user_options has 'gpu_fraction', which nothing reads here; it may have profile.",
    ),
    (
        {"junk": "x" * 100_000},
        "user_options has 'junk', which nothing reads here; it may have profile.",
    ),
]


@pytest.fixture(scope="module")
def hub(make_hub: Callable[..., Hub], pool: FakePool, place: Path) -> Hub:
    hook = "c.Spawner.pre_spawn_hook = lambda spawner: 1 / (spawner.user.name != 'nobody')"
    found = make_hub(f"c.Spawner.consecutive_failure_limit = 2\n{hook}\nsetup(c, embedded=False, runtime={str(place)!r})")
    found.add("ada", "nobody")
    return found


@pytest.fixture(scope="module")
def ada(hub: Hub) -> Browser:
    return hub.login("ada")


def as_form(options: dict[str, str]) -> dict[str, str]:
    return {"profile": "custom", **{f"profile-option-custom--{name}": value for name, value in options.items()}}


@pytest.mark.parametrize(("options", "words"), BAD, ids=[words.partition(";")[0] for _, words in BAD])
def test_form_and_rest_say_the_same(hub: Hub, ada: Browser, calm_pool: FakePool, options: dict[str, str], words: str) -> None:
    answer = hub.spawn("ada", {"profile": "custom", **options})
    assert (answer.status_code, answer.json()["message"]) == (400, words)
    field = list(options)[-1]
    assert answer.headers["Nbgpu-Field"] == field
    page = ada.submit(as_form(options))
    assert (page.status_code, error_text(page.text)) == (400, words)
    at_field = re.search(
        rf'name="profile-option-custom--{field}" .*?aria-invalid="true".*?<div class="invalid-feedback[^>]*>(.*?)</div>', page.text, re.S
    )
    if field != "gpu_model":  # one model: the page does not ask
        assert at_field
        assert html.unescape(at_field[1]) == words
    assert calm_pool.held() == []
    assert hub.server("ada") is None


@pytest.mark.parametrize(("options", "words"), ONLY_REST, ids=[words.partition(";")[0] for _, words in ONLY_REST])
def test_junk_by_rest(hub: Hub, calm_pool: FakePool, options: Any, words: str) -> None:
    answer = hub.spawn("ada", options)
    assert (answer.status_code, answer.json()["message"]) == (400, words)
    assert calm_pool.held() == []


@pytest.mark.parametrize("body", ["half", 5, True, ["half"]], ids=repr)
def test_a_body_that_is_no_object(hub: Hub, calm_pool: FakePool, body: Any) -> None:
    """JupyterHub 5 hands it on to the spawner as it is; the next start must know nothing of it."""
    answer = hub.spawn("ada", body)
    assert answer.status_code == 400
    assert "an object" in answer.json()["message"] or "must be a" in answer.json()["message"], answer.text
    assert hub.server("ada") is None
    assert hub.spawn("ada").status_code in (201, 202)
    hub.ready("ada")
    hub.stop("ada")
    assert calm_pool.held() == []


def test_unknown_profile_by_both(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    words = "Profile is 'gone'; it must be one of cpu, eighth, quarter, half, whole, custom."
    answer = hub.spawn("ada", {"profile": "gone"})
    assert (answer.status_code, answer.json()["message"]) == (400, words)
    page = ada.submit({"profile": "gone"})
    assert (page.status_code, error_text(page.text)) == (400, words)
    assert 'value="cpu" required' in " ".join(page.text.split()), "the form is still there"


def test_the_hub_counts_none_of_it_and_cpu_only_works(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    for _ in range(4):  # the limit is 2
        assert hub.spawn("ada", {"profile": "custom", "gpu_fraction": "0"}).status_code == 400
    assert "consecutive spawns failed" not in hub.log.read_text()
    # what was refused is not the default of a start without options
    assert hub.spawn("ada").status_code in (201, 202)
    hub.ready("ada")
    assert calm_pool.held() == []
    hub.stop("ada")
    assert ada.submit({"profile": "cpu"}).status_code == 302
    hub.ready("ada")
    hub.stop("ada")


def typed(page: str) -> tuple[str, str]:
    """Return which profile a start page has checked, and what its custom choice has as the share of a GPU."""
    (chosen,) = re.findall(r'name="profile" [^>]*value="(\w+)"[^>]* checked', page)
    (share,) = re.findall(r'name="profile-option-custom--gpu_fraction" value="([^"]*)"', page)
    return chosen, html.unescape(share)


def test_a_refused_value_is_shown_once_and_is_no_default(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    hub.spawn("ada", {"profile": "half"})
    hub.ready("ada")
    hub.stop("ada")
    page = ada.submit(as_form({"gpu_fraction": "7/2"})).text
    assert typed(page) == ("custom", "7/2"), "what was typed can be mended"
    assert typed(ada.form()) == ("half", ""), "a fresh page begins with the last start"
    assert hub.spawn("ada", {"profile": "custom", "gpu_fraction": "7/2"}).status_code == 400
    assert typed(ada.form()) == ("half", "")
    linked = ada.http.get("spawn?gpu_fraction=9")
    assert (linked.status_code, typed(linked.text)) == (400, ("custom", "9"))
    assert typed(ada.form()) == ("half", "")
    if hub.version.split(".")[0] != "5":  # there an empty body says: the default profile
        assert hub.spawn("ada").status_code in (201, 202)
        hub.ready("ada")
        (request_id,) = calm_pool.held()
        assert calm_pool.grants[request_id]["request"]["memory_milli"] == 500, "a start without options is the last one again"
        hub.stop("ada")
    assert ada.submit({"profile": "cpu"}).status_code == 302  # the tests after this one begin without a GPU
    hub.ready("ada")
    hub.stop("ada")


def test_good_input_by_both_asks_for_the_same(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    wanted = {"gpu_memory": "20 GiB", "gpu_fraction": "1/3", "gpu_mode": "strict", "gpu_count": "2"}
    asked = []
    for start in (
        lambda: hub.spawn("ada", {"profile": "custom", **wanted}),
        lambda: ada.submit(as_form(wanted)),
        lambda: hub.spawn("ada", wanted),
    ):
        start()
        hub.ready("ada")
        (request_id,) = calm_pool.held()
        request = dict(calm_pool.grants[request_id]["request"])
        assert request.pop("request_id") == request_id
        asked.append(request)
        hub.stop("ada")
    assert asked[0] == asked[1] == asked[2]
    assert asked[0]["memory_bytes"] == 20 * 1024**3
    assert (asked[0]["compute_milli"], asked[0].get("memory_milli")) == (333, None)
    assert (asked[0]["mode"], asked[0]["device_count"]) == ("strict", 2)


def test_the_page_without_javascript(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    hub.spawn("ada", {"profile": "half"})  # what is remembered, and may not be had any more
    hub.ready("ada")
    hub.stop("ada")
    available = {"memory": {}, "compute_milli": {}, "wait_seconds": None}
    calm_pool.availability = [
        {"state": "free", "reason": "free now", **available, "memory": {"H": 10 * 1024**3}, "compute_milli": {"H": 125}},
        {"state": "wait", "reason": "in use: 3 people wait, about 4 minutes", **available},
        {"state": "forbidden", "reason": "your quota is a <quarter> of a GPU", **available},
        {"state": "impossible", "reason": "no GPU is that large", **available},
    ]
    page = " ".join(ada.form().split())
    assert "10 GiB, at least an eighth of the GPU&#39;s time" in page
    assert "In use: 3 people wait, about 4 minutes. You can start it and wait in line, for " in page
    assert "Not for you: your quota is a &lt;quarter&gt; of a GPU" in page
    assert "Not possible here: no GPU is that large" in page
    assert 'value="half" required aria-describedby="nbgpu-4-what nbgpu-4-status" disabled' in page
    assert 'value="cpu" required aria-describedby="nbgpu-1-what nbgpu-1-status" checked' in page
    assert "Simulated GPUs." in page
    assert "A demo on one account." in page
    assert "Reload the page to see what is free now." in page


def test_availability_for_an_open_page(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    token = ada.token(ada.http.get("home").text)
    headers = {"X-XSRFToken": token, "Sec-Fetch-Mode": "cors"}
    free = ada.http.get("api/nbgpu/availability", headers=headers).json()
    assert [row["state"] for row in free["profiles"]] == ["always", "free", "free", "free", "free", "custom"]
    calm_pool.full = True
    busy = ada.http.get("api/nbgpu/availability", headers=headers).json()
    assert [row["state"] for row in busy["profiles"]] == ["always", "wait", "wait", "wait", "wait", "custom"]
    assert busy["time"] >= free["time"]
    assert ada.http.get("api/nbgpu/availability", headers={"Sec-Fetch-Mode": "cors"}).status_code == 403, "without the token"
    assert httpx.get(hub.url + "api/nbgpu/availability").status_code == 403, "not logged in"


def test_none_of_it_is_a_fault_of_the_hub(hub: Hub, ada: Browser, calm_pool: FakePool) -> None:
    """A refusal is a line of the log, without a stack trace; a hook that fails keeps its own (the control)."""
    ada.submit(as_form({"gpu_fraction": "7/2"}))
    hub.spawn("ada", {"profile": "gone"})
    log = hub.log.read_text()
    assert "Share of a GPU is '7/2'; it must be" in log
    assert "Profile is 'gone'; it must be" in log
    assert "Traceback" not in log
    assert hub.spawn("nobody", {"profile": "cpu"}).status_code == 500
    until(lambda: "ZeroDivisionError" in hub.log.read_text(), 10, "the hook's own failure")
    assert "Traceback" in hub.log.read_text()
