"""The page in a real browser, on a real server: numbers, keyboard, accessibility, losses."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from support.processes import ServerProcess, WebProcess

from unroll_client import Client
from unroll_proto.sequences import Sequence, write_sequences

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, Locator, Page, expect  # noqa: E402 (skipped above)

CHROMIUM = os.environ.get("UNROLL_CHROMIUM") or shutil.which("chromium") or ""
ROOT = Path(__file__).parents[2]
AXE = ROOT / "web/ui/node_modules/axe-core/axe.min.js"
expect.set_options(timeout=60_000)  # a shared machine can be slow; nothing waits longer than it must
PICTURES = ROOT / ".screenshots"
TABS = ("Tour", "Step", "Unit", "Gradient", "Fork", "Input", "Server")
INDEX = 3

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium, or set UNROLL_CHROMIUM")


@pytest.fixture(scope="module")
def data(vowels: list[Sequence], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "vowels.npz"
    write_sequences(path, vowels[:8])
    return path


@pytest.fixture(scope="module")
def site(
    server: ServerProcess, bundle_root: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    log = tmp_path_factory.mktemp("page") / "log"
    with WebProcess(server.address, log, "--models", str(bundle_root), "--data", str(data)) as process:
        yield process.address
        assert process.stop() == 0, process.log
        assert "ERROR" not in process.log


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that must not log an error, such as what the security policy refuses."""
    with browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce") as context:
        page = context.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        yield page
        # What a test takes away by itself is logged as well.
        assert [each for each in problems if "ERR_CONNECTION" not in each and "503" not in each] == []


def open_at(page: Page, site: str, step: int, tab: str = "step", **view: object) -> None:
    """Opens the page at a step of the known sequence, and waits until it is there."""
    place = {"s": f"file:vowels.npz:{INDEX}", "t": step, "tab": tab, **view}
    page.goto("about:blank")
    page.goto(f"{site}/#" + "&".join(f"{name}={value}" for name, value in place.items()))
    expect(page.locator(".place")).to_have_text(re.compile(rf"^{step}\s*/"), timeout=30_000)


def digits(text: str) -> Decimal:
    return Decimal(text.replace("\N{MINUS SIGN}", "-"))


def shortest(value: np.float32) -> Decimal:
    """The shortest decimal that is this float32 and no other."""
    return Decimal(np.format_float_scientific(value, unique=True))


def probabilities(page: Page) -> list[Decimal]:
    return [digits(each) for each in page.locator("[data-probability]").all_inner_texts()]


def test_numbers_are_the_servers_digit_by_digit(
    page: Page, site: str, server: ServerProcess, vowels: list[Sequence]
) -> None:
    values = vowels[INDEX].values
    with Client(server.address) as client:
        answers = client.classify([values[:step] for step in (1, 5, len(values))], model="jv").probabilities
        with client.unroll("jv") as sequence:
            states = sequence.send(values).states
    assert states is not None
    for step, expected in zip((1, 5, len(values)), answers, strict=True):
        open_at(page, site, step, "unit", u=7)
        expect(page.locator("[data-value]")).not_to_be_empty()
        assert digits(page.locator("[data-value]").inner_text()) == shortest(states[step - 1][7])
        assert probabilities(page) == [shortest(each) for each in expected]
    page.get_by_role("tab", name="Step").click()
    expect(page.locator("[data-served]")).not_to_be_empty()
    assert digits(page.locator("[data-served]").inner_text()) == shortest(states[-1][7])


def test_an_edit_changes_what_follows_and_no_bit_before(
    page: Page, site: str, server: ServerProcess, vowels: list[Sequence]
) -> None:
    values = vowels[INDEX].values.copy()
    open_at(page, site, 6)
    before = probabilities(page)
    field = page.get_by_label("Value of", exact=False).first
    field.fill("2.5")
    field.press("Enter")
    expect(page.locator("[data-same='5']")).to_contain_text("Steps 1 to 5: the same bits")
    values[5, 0] = 2.5
    with Client(server.address) as client:
        expected = client.classify([values[:6]], model="jv").probabilities[0]
    assert probabilities(page) == [shortest(each) for each in expected] != before
    # The address holds the edit.
    expect(page).to_have_url(re.compile("x="))
    page.reload()
    expect(page.locator(".place")).to_have_text(re.compile(r"^6\s*/"))
    assert probabilities(page) == [shortest(each) for each in expected]
    page.get_by_role("button", name="Cut step").click()
    expect(page.locator(".place")).to_have_text(f"6 / {len(values) - 1}")
    page.get_by_role("button", name="Add step").click()
    expect(page.locator(".place")).to_have_text(f"6 / {len(values)}")


def reach(page: Page, target: Locator) -> Locator:
    """Moves the focus by Tab alone."""
    for _ in range(120):
        if target.evaluate("node => node === document.activeElement"):
            return target
        page.keyboard.press("Tab")
    raise AssertionError(f"no way to {target} by Tab")


def test_everything_is_done_by_keyboard(page: Page, site: str, vowels: list[Sequence]) -> None:
    steps = len(vowels[INDEX].values)
    place = page.locator(".place")
    open_at(page, site, steps, "tour")
    for key, expected in (("ArrowLeft", steps - 1), ("Home", 0), ("ArrowRight", 1), ("End", steps)):
        page.keyboard.press(key)
        expect(place).to_have_text(f"{expected} / {steps}")
    page.keyboard.press("u")
    expect(page.get_by_role("heading", name="One cell, with a loop")).to_be_visible()
    page.keyboard.press("u")
    reach(page, page.get_by_role("slider", name="h: arrows")).press("ArrowDown")
    expect(page.get_by_role("slider", name="h: arrows")).to_have_attribute("aria-valuenow", "1")
    reach(page, page.get_by_role("tab", name="Tour"))
    for name in TABS[1:]:
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("tab", name=name)).to_be_focused()
        # Every control of the panel is reached by Tab.
        for control in page.locator("#panel :is(button, input, select, [role=slider]):not(:disabled)").all():
            assert control.evaluate("node => node.tabIndex >= 0")
    reach(page, page.locator("#time")).press("Home")
    expect(place).to_have_text(f"0 / {steps}")
    page.get_by_label("Steps a second").select_option("1000")
    reach(page, page.get_by_role("button", name="Play")).press("Enter")
    expect(place).to_have_text(f"{steps} / {steps}")
    page.locator("body").press("f")
    reach(page, page.get_by_role("button", name="Step 17")).press("Enter")
    expect(place).to_have_text(f"17 / {steps}")
    expect(page.get_by_role("tab", name="Step")).to_have_attribute("aria-selected", "true")
    page.get_by_role("tab", name="Input").click()
    drawing = page.get_by_role("slider", name="Drawing")
    for key in ("ArrowRight", "ArrowUp", "ArrowUp"):
        reach(page, drawing).press(key)
    reach(page, page.get_by_role("button", name="Use it")).press("Enter")
    expect(place).to_have_text("48 / 48")


@pytest.mark.skipif(not AXE.exists(), reason="no axe-core: make ui installs it")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(page: Page, site: str, theme: str) -> None:
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type] # one of its literals
    open_at(page, site, 9, fork=5)
    page.evaluate(AXE.read_text())
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        if tab == "Gradient":
            expect(page.locator("[data-gradient='0']")).to_be_visible()
        found = page.evaluate("async () => (await axe.run()).violations")
        assert [(tab, each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 375])
def test_nothing_is_cut_off(page: Page, site: str, width: int, theme: str) -> None:
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type] # one of its literals
    page.set_viewport_size({"width": width, "height": 900})
    open_at(page, site, 12)
    PICTURES.mkdir(exist_ok=True)
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        if tab == "Gradient":
            expect(page.locator("[data-gradient='0']")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=PICTURES / f"{tab.lower()}-{width}-{theme}.png", full_page=True)


def test_a_fork_resumes_with_the_same_bits_and_exports_repeat_it(
    page: Page, site: str, server: ServerProcess, vowels: list[Sequence], tmp_path: Path
) -> None:
    values = vowels[INDEX].values
    open_at(page, site, 7, "fork")
    page.get_by_role("button", name="Fork after step 7").click()
    expect(page.locator(f"[data-same='{len(values) - 7}']")).to_contain_text("have the same bits")
    page.get_by_label("Go on with").select_option("zero")
    page.get_by_role("button", name="Fork after step 7").click()
    expect(page.locator("[data-same='0']")).to_contain_text("They part at step 8")
    with Client(server.address) as client, client.unroll("jv", logits=True) as sequence:
        steps = sequence.send(values)
        snapshot = sequence.snapshot()
    files = {}
    for kind in ("Snapshot", "Python", "JSON", "npz"):
        with page.expect_download() as download:
            page.get_by_role("button", name=kind, exact=True).click()
        files[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[kind])
    assert files["Snapshot"].read_bytes() == snapshot.to_bytes()
    assert json.loads(files["JSON"].read_text())["bundle"] == snapshot.bundle.hex()
    with np.load(files["npz"]) as arrays:
        assert arrays["values"].tobytes() == values.tobytes()
        assert steps.states is not None
        assert arrays["states"].tobytes() == steps.states.tobytes()
    subprocess.run([sys.executable, files["Python"]], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "state.bin").read_bytes() == snapshot.to_bytes()
    page.get_by_role("tab", name="Input").click()
    page.locator("input[type=file]").set_input_files(files["npz"])
    page.get_by_role("button", name=f"#0, {len(values)} steps").click()
    expect(page.locator("#panel")).to_contain_text(f"{files['npz'].name} #0")
    expect(page.locator(".place")).to_have_text(f"{len(values)} / {len(values)}")


def test_a_server_killed_in_mid_stream_is_reported_and_the_run_resumed(
    page: Page, bundle_root: Path, data: Path, vowels: list[Sequence], tmp_path: Path
) -> None:
    steps = len(vowels[INDEX].values)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ("--listen", address)
    with (
        ServerProcess(bundle_root, tmp_path / "first", *options) as first,
        WebProcess(address, tmp_path / "web", "--data", str(data)) as web,
    ):
        open_at(page, web.address, steps)
        expected = probabilities(page)
        page.keyboard.press("r")
        page.keyboard.press("ArrowRight")
        expect(page.locator(".place")).to_have_text(f"1 / {steps}")
        first.signal(signal.SIGKILL)
        first.wait()
        page.keyboard.press("End")
        expect(page.get_by_role("alert")).to_contain_text("The server was lost after step 1")
        with ServerProcess(bundle_root, tmp_path / "second", *options) as second:
            expect(page.get_by_text("Resumed from the snapshot of step 1")).to_be_visible(timeout=30_000)
            expect(page.locator(".place")).to_have_text(f"{steps} / {steps}")
            assert probabilities(page) == expected
            page.goto("about:blank")
            assert second.stop() == 0


def test_ten_thousand_steps_come_and_memory_stays(page: Page, site: str) -> None:
    open_at(page, site, 10_000, s="wave:noise:10000")
    session = page.context.new_cdp_session(page)
    place = page.locator(".place")

    def compute_again() -> float:
        page.keyboard.press("r")
        expect(place).to_have_text("0 / 10000")
        page.keyboard.press("End")
        expect(place).to_have_text("10000 / 10000", timeout=60_000)
        session.send("HeapProfiler.collectGarbage")
        return float(page.evaluate("performance.memory.usedJSHeapSize"))

    first = compute_again()
    assert max(compute_again() for _ in range(3)) < first * 1.2 + 2**20
