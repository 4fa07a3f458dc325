"""The start page and the queue page in a real Chromium, on JupyterHub 5.5 and 6: by keyboard alone, for axe, on a phone, enlarged,
without JavaScript, with the pool away. The pool is a fake. Leaves screenshots in ``tests/browser/shots``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import browser_kit
import pytest
from axe_kit import violations
from fake_pool import FakePool
from hub_process import PASSWORD, Hub, until
from playwright.sync_api import Browser, Locator, Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
SECOND = 1000
expect.set_options(timeout=15 * SECOND)
ONE_HUB = pytest.mark.parametrize("python", ["hub6", pytest.param("hub5", marks=pytest.mark.soak)], indirect=True, scope="module")
"""Where the two hubs do not differ: on the older one only now and then."""
SHOTS = Path(__file__).resolve().parents[1] / "browser" / "shots"
HUBS_OWN = ("nav.navbar", ".modal", "#noscript")
"""Parts of every page of the hub that are not ours."""
PROFILES = [
    {"display_name": "CPU only", "slug": "cpu", "default": True},
    {"display_name": "Четверть видеокарты", "slug": "quarter", "kubespawner_override": {"gpu_fraction": "1/4"}},
    {
        "display_name": 'Μισή GPU <b>&amp; "more"</b>',
        "slug": "half",
        "description": "شرح <i>قصير</i>",
        "kubespawner_override": {"gpu_fraction": "1/2"},
        "profile_options": {
            "mode": {"display_name": "<em>Mode</em>", "choices": {"b": {"display_name": "burst"}, "s": {"display_name": "strict"}}}
        },
    },
    {"display_name": "A whole GPU", "slug": "whole", "allowed_groups": ["staff"], "kubespawner_override": {"gpu_fraction": 1}},
    {"display_name": "Custom", "slug": "custom", "gpu_custom": True},
]
MORE = """
c.JupyterHub.load_groups = {{"staff": {{"users": ["grace"]}}}}
c.GPUSliceMixin.pool_timeout = 1.0
c.GPUSliceMixin.gpu_wait_timeout = 60
setup(c, embedded=False, runtime={place!r}, profiles={profiles!r})
"""


@pytest.fixture(scope="module")
def hub(make_hub: Callable[..., Hub], pool: FakePool, place: Path) -> Hub:
    return make_hub(MORE.format(place=str(place), profiles=PROFILES))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser_kit.chromium(SHOTS) as browser:
        yield browser


@pytest.fixture
def enter(hub: Hub, chromium: Browser, calm_pool: FakePool) -> Iterator[Callable[..., Page]]:
    """Log somebody in, at the start page; their server is stopped afterwards."""
    users: list[str] = []

    def log_in(user: str, width: int = 1280, height: int = 900, scripts: bool = True, scale: int = 1) -> Page:
        users.append(user)
        page = chromium.new_context(
            viewport={"width": width, "height": height}, java_script_enabled=scripts, device_scale_factor=scale
        ).new_page()
        page.set_default_timeout(15 * SECOND)
        page.goto(hub.url + "spawn")
        page.fill("#username_input", user)
        page.fill("#password_input", PASSWORD)
        page.click("#login_submit")
        page.wait_for_selector("#nbgpu")
        return page

    yield log_in
    calm_pool.stall_seconds, calm_pool.full = 0.0, False
    for context in chromium.contexts:
        context.close()
    for user in set(users):
        if hub.server(quote(user)):
            hub.stop(quote(user))


def shot(page: Page, hub: Hub, name: str) -> None:
    page.screenshot(path=str(SHOTS / f"page-{name}-hub{hub.version[0]}.png"), full_page=True)


def row(page: Page, slug: str) -> Locator:
    return page.locator(f".nbgpu-row[data-slug={slug}]")


def start(page: Page, slug: str) -> None:
    row(page, slug).locator("input[type=radio]").check()
    page.click("#spawn_form button[type=submit], #spawn_form input[type=submit]")


def fits(page: Page) -> bool:
    """Whether nothing has to be scrolled sideways."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth") is True


def focused(page: Page) -> str:
    return page.evaluate("(one => one.id || one.name || one.textContent.trim() || one.value || '')(document.activeElement)")


def tab_to(page: Page, what: str, most: int = 40) -> None:
    """Press Tab until something has the focus, which must be seen."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if re.search(what, focused(page)):
            style = page.evaluate("(one => [one.outlineStyle, one.outlineWidth, one.boxShadow])(getComputedStyle(document.activeElement))")
            assert (style[0] != "none" and style[1] != "0px") or style[2] != "none", f"the focus on {what} cannot be seen: {style}"
            return
    raise AssertionError(f"Tab never comes to {what}")


def is_started(hub: Hub, user: str, seconds: float = 20) -> dict[str, object]:
    return hub.ready(quote(user), seconds)


def in_both_themes(page: Page, hub: Hub, name: str, within: str = "html") -> list[object]:
    """Return what axe finds, in light and dark, and leave a picture of each."""
    found: list[object] = []
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
        expect(page.locator("html")).to_have_attribute("data-bs-theme", theme)
        shot(page, hub, f"{name}-{theme}")
        found += violations(page, within, HUBS_OWN)
    return found


def test_axe_finds_nothing(hub: Hub, enter: Callable[..., Page], calm_pool: FakePool) -> None:
    calm_pool.full = calm_pool.small_free = True
    page = enter("grace")
    expect(page.locator("#nbgpu-offer")).to_contain_text("16.6 % of a GPU")
    assert in_both_themes(page, hub, "form", "#spawn_form") == []
    row(page, "custom").get_by_label("Share of a GPU").fill("7/2")
    page.keyboard.press("Enter")
    expect(page.locator(".invalid-feedback")).to_be_visible()
    assert in_both_themes(page, hub, "form-refused", "#spawn_form") == []
    start(page, "half")
    expect(page.locator("#nbgpu-queue")).to_contain_text("1st in line, usually within 4 minutes.")
    expect(page.locator(".nbgpu-smaller:visible")).to_contain_text("Take 16.6 % of a GPU now")
    expect(page.locator("#progress-bar")).to_have_attribute("aria-valuenow", "10")
    assert in_both_themes(page, hub, "queue") == []
    page.evaluate("document.querySelector('.nbgpu-leave button').textContent = ''")
    assert violations(page, without=HUBS_OWN) != [], "the control"


@ONE_HUB
def test_all_of_it_by_keyboard(hub: Hub, enter: Callable[..., Page], calm_pool: FakePool) -> None:
    calm_pool.full = calm_pool.small_free = True
    page = enter("ada")
    tab_to(page, "^nbgpu-1$")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(row(page, "half").locator("input[type=radio]")).to_be_checked()
    tab_to(page, "^Start$")
    page.keyboard.press("Enter")
    line = page.locator("#nbgpu-queue")
    expect(line).to_contain_text("Waiting for half of a GPU")
    tab_to(page, "^Leave the queue$")
    page.keyboard.press("Enter")
    expect(row(page, "half").locator("input[type=radio]")).to_be_checked()  # at the start page again, with the last choice
    assert calm_pool.held() == []

    tab_to(page, "^Start$")
    page.keyboard.press("Enter")
    expect(line).to_contain_text("1st in line")
    expect(page.locator(".nbgpu-smaller:visible")).to_be_visible()
    tab_to(page, "^Take 16.6 % of a GPU now$")
    calm_pool.small_free = False  # in this moment somebody else was faster
    page.keyboard.press("Enter")
    expect(line.get_by_role("alert")).to_contain_text("not free any more; you keep your place")
    assert calm_pool.states() == {"ada": "queued"}
    shot(page, hub, "somebody-was-faster")

    calm_pool.small_free = True
    expect(page.locator(".nbgpu-smaller:visible")).to_be_visible()
    tab_to(page, "^Take 16.6 % of a GPU now$")
    page.keyboard.press("Enter")
    server = is_started(hub, "ada")
    assert server["user_options"] == {"profile": "custom", "gpu_fraction": "1/6"}
    (request_id,) = calm_pool.held()
    assert calm_pool.grants[request_id]["request"]["memory_milli"] == 166
    assert calm_pool.grants[request_id]["state"] == "bound"


@ONE_HUB
def test_nothing_is_lost_while_one_types_or_reads(hub: Hub, enter: Callable[..., Page], calm_pool: FakePool) -> None:
    """A refused value's error goes when the value is changed; the button that has the focus keeps it while the place changes."""
    calm_pool.full = True
    page = enter("ada")
    clock = page.locator("#nbgpu-time")
    shown = clock.inner_text()
    share = row(page, "custom").get_by_label("Share of a GPU")
    expect(clock).not_to_have_text(shown)
    assert [re.fullmatch(r"\d\d:\d\d:\d\d", one) is not None for one in (shown, clock.inner_text())] == [True, True]
    share.fill("7/2")
    page.keyboard.press("Enter")
    expect(page.locator(".invalid-feedback")).to_contain_text("Share of a GPU is '7/2'")
    expect(share).to_be_focused()
    page.wait_for_timeout(2500)  # it has asked again what is free
    expect(page.locator(".invalid-feedback")).to_be_visible()  # the control
    page.keyboard.type("1/4")
    expect(page.locator(".invalid-feedback")).to_have_count(0)
    expect(page.locator(".is-invalid, [aria-invalid]")).to_have_count(0)
    assert share.evaluate("one => one.getAttribute('aria-describedby').split(' ').every(id => document.getElementById(id))")
    share.fill("1/2")
    page.keyboard.press("Enter")
    line = page.locator("#nbgpu-queue")
    expect(line).to_contain_text("1st in line, usually within 4 minutes")
    leave = line.get_by_role("button", name="Leave the queue")
    leave.focus()
    with calm_pool.lock:
        for grant in calm_pool.grants.values():
            grant.update(
                wait_seconds=30.0, reason="an idle notebook is being moved off the GPU to make room for you; that takes some seconds"
            )
    expect(line).to_contain_text("1st in line, usually within a minute. An idle notebook is being moved off the GPU to make room for you")
    expect(leave).to_be_focused()
    shot(page, hub, "an-idle-notebook-is-moved")
    calm_pool.admit()
    is_started(hub, "ada")


@ONE_HUB
@pytest.mark.parametrize("scripts", [True, False], ids=["", "without JavaScript"])
def test_what_was_refused_is_seen(hub: Hub, enter: Callable[..., Page], calm_pool: FakePool, scripts: bool) -> None:
    """On a window too low for the page: the field has the focus, it and its message are in view."""
    page = enter("ada", height=420, scripts=scripts)
    row(page, "custom").locator("input[type=radio]").check()
    row(page, "custom").get_by_label("Share of a GPU").fill("7/2")
    page.keyboard.press("Enter")
    message = page.locator(".invalid-feedback")
    expect(message).to_contain_text("Share of a GPU is '7/2'")
    share = row(page, "custom").get_by_label("Share of a GPU")
    expect(share).to_be_focused()
    expect(share).to_be_in_viewport(ratio=1)
    expect(message).to_be_in_viewport(ratio=1)
    page.screenshot(path=str(SHOTS / f"page-refused-low-{'scripts' if scripts else 'plain'}-hub{hub.version[0]}.png"))
    expect(page.locator(".spawn-error-msg")).to_have_count(0 if scripts else 1)
    page.keyboard.press("Control+Home")
    page.evaluate("scrollTo(0, 0)")
    expect(message).not_to_be_in_viewport()  # the control: it lies below the fold


@ONE_HUB
def test_on_a_phone_and_enlarged(hub: Hub, enter: Callable[..., Page], calm_pool: FakePool) -> None:
    calm_pool.full = calm_pool.small_free = True
    for name, width, height, scale in (("phone", 360, 740, 2), ("200-percent", 640, 450, 2)):
        page = enter("grace", width=width, height=height, scale=scale)
        expect(row(page, "half")).to_be_visible()
        assert fits(page), name
        shot(page, hub, f"form-{name}")
        start(page, "half")
        expect(page.locator(".nbgpu-smaller:visible")).to_be_visible()
        assert fits(page), name
        shot(page, hub, f"queue-{name}")
        page.get_by_role("button", name="Leave the queue").click()
        page.wait_for_url(re.compile("/hub/spawn/"))
    page.evaluate("document.getElementById('nbgpu').style.width = '1000px'")
    assert not fits(page), "the control"


@ONE_HUB
def test_without_javascript(hub: Hub, enter: Callable[..., Page], calm_pool: FakePool) -> None:
    calm_pool.full = calm_pool.small_free = True
    page = enter("ада", scripts=False, width=800)
    expect(page.get_by_text("JupyterHub requires JavaScript")).to_be_hidden()
    expect(page.locator("#nbgpu-offer")).to_contain_text("The largest share that is free now: 16.6 % of a GPU")
    assert page.locator("b, em, i:not([class])").count() == 0, "names are text"
    shot(page, hub, "form-without-javascript")
    start(page, "half")
    line = page.locator("#nbgpu-queue")
    expect(line).to_contain_text("1st in line, usually within 4 minutes.")  # it loads itself again until it knows
    expect(page.locator(".nbgpu-smaller")).to_be_visible()
    shot(page, hub, "queue-without-javascript")
    line.get_by_role("button", name="Leave the queue").click()
    expect(row(page, "half").locator("input[type=radio]")).to_be_checked()
    assert calm_pool.held() == []
    page.locator("#nbgpu-offer input").check()
    page.click("#spawn_form button[type=submit], #spawn_form input[type=submit]")
    calm_pool.admit()
    assert is_started(hub, "ада")["user_options"] == {"profile": "custom", "gpu_fraction": "1/6"}


@ONE_HUB
def test_the_pool_is_away(hub: Hub, enter: Callable[..., Page], calm_pool: FakePool) -> None:
    """The form and the queue page say so; what was chosen is kept, also after a start in vain."""
    calm_pool.full = True
    page = enter("ada")
    start(page, "half")
    line = page.locator("#nbgpu-queue")
    expect(line).to_contain_text("1st in line")
    (request_id,) = calm_pool.held()
    calm_pool.fail_next.update({request_id: 1000, "devices": 1000, "availability": 1000, "launches": 1000, "release": 1000})
    expect(line).to_contain_text("The GPU pool does not answer at the moment. Your request is kept here")
    expect(line).not_to_contain_text("1st in line")
    shot(page, hub, "queue-pool-away")
    calm_pool.fail_next[request_id] = 0
    expect(line).to_contain_text("1st in line")
    line.get_by_role("button", name="Leave the queue").click()
    expect(row(page, "half").locator("input[type=radio]")).to_be_checked()
    expect(page.locator("#nbgpu-problem")).to_contain_text("The pool is starting.")
    row(page, "quarter").locator("input[type=radio]").check()
    calm_pool.stall_seconds = 2.0
    expect(page.locator("#nbgpu-problem")).to_contain_text("The GPU pool does not answer, so no GPU can be given now.")
    expect(row(page, "quarter").locator("input[type=radio]")).to_be_checked()
    shot(page, hub, "form-pool-away")
    start(page, "quarter")
    expect(page.get_by_role("alert").filter(has_text="Your server did not start")).to_be_visible()
    expect(page.get_by_role("heading", name="Your server is starting")).to_be_hidden()
    expect(page.locator("#progress-message")).to_contain_text("The GPU pool does not answer, so no GPU can be given now.")
    expect(page.get_by_role("button", name="Stop Server")).to_be_hidden()
    shot(page, hub, "start-pool-away")
    calm_pool.stall_seconds = 0.0
    calm_pool.fail_next.clear()
    page.get_by_role("link", name="Choose again").click()
    expect(row(page, "quarter").locator("input[type=radio]")).to_be_checked()
    expect(page.locator("#nbgpu-problem")).to_be_hidden()


@ONE_HUB
def test_profiles_of_a_group(hub: Hub, enter: Callable[..., Page], calm_pool: FakePool) -> None:
    grace, ada = enter("grace"), enter("ada")
    expect(row(grace, "whole")).to_contain_text("Free now")
    expect(row(ada, "half")).to_be_visible()
    expect(row(ada, "whole")).to_have_count(0)
    ada.goto(hub.url + "spawn?profile=whole")
    expect(ada.locator(".spawn-error-msg")).to_contain_text("Profile is 'whole'; it must be one of cpu, quarter, half, custom.")
    answer = hub.spawn("ada", {"profile": "whole"})
    assert (answer.status_code, answer.json()["message"]) == (400, "Profile is 'whole'; it must be one of cpu, quarter, half, custom.")
    assert hub.spawn("grace", {"profile": "whole"}).status_code in (201, 202)
    is_started(hub, "grace")


def test_what_users_do_wrong_is_no_error_of_the_hub(hub: Hub, enter: Callable[..., Page], calm_pool: FakePool) -> None:
    """One line for information each, by the form, by a link and by the REST API."""
    page = enter("ada")
    at = len(hub.log.read_text())
    row(page, "custom").get_by_label("Share of a GPU").fill("9/2")
    page.keyboard.press("Enter")
    expect(page.locator(".invalid-feedback")).to_be_visible()
    page.goto(hub.url + "spawn?profile=custom&gpu_fraction=8/2")
    expect(page.locator(".invalid-feedback")).to_be_visible()
    assert hub.spawn("ada", {"profile": "custom", "gpu_fraction": "7/2"}).status_code == 400
    calm_pool.refuse = (403, "Your quota is a quarter of a GPU; you ask for half.")
    assert hub.spawn("ada", {"profile": "half"}).status_code == 403

    def lines(word: str) -> list[str]:
        return [line for line in hub.log.read_text()[at:].splitlines() if word in line]

    for word in ("'9/2'", "'8/2'", "'7/2'", "Your quota is"):
        until(lambda word=word: lines(word), 5, word)
        assert [line[:3] for line in lines(word)] == ["[I "], lines(word)
        assert "Not starting ada's server: 40" in lines(word)[0]
    assert lines("[E ") == lines("Traceback") == []
