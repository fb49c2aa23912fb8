"""The report in Chromium: on the screens of a desktop and of a phone, with the light and with the dark scheme."""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "datasets"))
from makers import nmnist_zip

from multifire.datasets.prepare import prepare
from multifire.report import write_report
from multifire.training.loop import train
from tests.test_events_training import tiny

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"),
]
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync"""
SIZES = [(1400, 900), (390, 844)]
VISIBLE_CARDS = "return [...document.querySelectorAll('.card[data-chart]')].filter(c => !c.hidden)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(runs, out)
    return out


@pytest.fixture(scope="module")
def events_page(tmp_path_factory):
    """Return the report of a network that was trained on recordings for one epoch."""
    root = tmp_path_factory.mktemp("events")
    nmnist_zip(root / "nmnist" / "n.zip", train=40, test=20)
    cfg = tiny(root)
    prepare(cfg.data, root, workers=1)
    train(replace(cfg, optim=replace(cfg.optim, epochs=1)), root / "run")
    write_report([root / "run"], root / "report.html")
    return root / "report.html"


@contextmanager
def opened(browser, page, size=SIZES[0], scheme="light"):
    """Open the page on a screen of the given size; assert that the browser's console holds no error at the end."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(page.as_uri())
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def wait(browser, script: str, *args, seconds: float = 30.0):
    """Run the script until it returns a true value, and return that value."""
    deadline = time.monotonic() + seconds
    while not (found := browser.execute_script(script, *args)):
        assert time.monotonic() < deadline, script
        time.sleep(0.1)
    return found


def plot(browser, key: str):
    """Scroll to the chart with the given key, wait until it is drawn, and return it."""
    script = """
        const number = report.charts.findIndex((chart) => chart.key === arguments[0]);
        const card = document.querySelector(`.card[data-chart="${number}"]`);
        card.scrollIntoView({block: "center", behavior: "instant"});
        return card.querySelector(".js-plotly-plot")"""
    return wait(browser, script, key)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_chart_is_drawn_without_an_error(browser, page, size, scheme):
    with opened(browser, page, size, scheme) as driver:
        for card in driver.execute_script(VISIBLE_CARDS):
            driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", card)
            wait(driver, "return arguments[0].querySelector('.main-svg')", card)
        width = driver.execute_script("return document.documentElement.scrollWidth")
        assert width <= size[0]  # no horizontal scrolling
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(", "))) < 3 * 128
        assert dark == (scheme == "dark")


def test_drawn_numbers_equal_metrics_jsonl(browser, page, runs):
    with opened(browser, page) as driver:
        drawn = driver.execute_script(
            "return arguments[0].data.map((t) => [t.meta.run, t.name, [...t.y]])", plot(driver, "accuracy")
        )
        for run, name, y in drawn:
            records = [json.loads(line) for line in (runs[run] / "metrics.jsonl").read_text().splitlines()]
            column = "test_accuracy" if name.endswith("test") else "train_accuracy"
            assert y == pytest.approx([record[column] for record in records], rel=1e-6)
        assert len(drawn) == 4


def test_hovering_shows_the_value_and_dragging_zooms(browser, page, runs):
    from selenium.webdriver import ActionChains

    with opened(browser, page) as driver:
        chart = plot(driver, "accuracy")
        area = driver.execute_script(
            "const a = arguments[0]._fullLayout; const s = a._size; return [s.l, s.t, s.w, s.h, ...a.xaxis.range]",
            chart,
        )
        left, top, width, height, low, high = area
        size = chart.size

        def at(x: float, y: float) -> tuple[int, int]:
            """Return the offset from the middle of the element, as ActionChains expects it."""
            return round(left + x * width - size["width"] / 2), round(top + y * height - size["height"] / 2)

        position_of_epoch_2 = (2 - low) / (high - low)
        ActionChains(driver).move_to_element_with_offset(chart, *at(position_of_epoch_2 - 0.02, 0.5)).perform()
        text = wait(driver, "return arguments[0].querySelector('.hoverlayer').textContent", chart)
        record = json.loads((runs[1] / "metrics.jsonl").read_text().splitlines()[1])
        assert f"{100 * record['test_accuracy']:.2f}%" in text

        start, end = at(0.3, 0.3), at(0.7, 0.7)
        drag = ActionChains(driver).move_to_element_with_offset(chart, *start).click_and_hold()
        drag.move_by_offset(end[0] - start[0], end[1] - start[1]).release().perform()
        zoomed = "const r = arguments[0]._fullLayout.xaxis.range; return r[1] - r[0] < arguments[1]"
        wait(driver, zoomed, chart, 0.6 * (high - low))


def test_run_can_be_hidden_and_shown(browser, page):
    visible = "return arguments[0].data.filter((t) => t.visible !== false).map((t) => t.meta.run)"
    with opened(browser, page) as driver:
        chart = plot(driver, "loss")
        assert driver.execute_script(visible, chart) == [0, 1, 0, 1]
        chip = driver.find_elements("css selector", ".chip")[0]
        chip.click()
        assert chip.get_attribute("aria-pressed") == "false"
        assert driver.execute_script(visible, chart) == [1, 1]
        chip.click()
        assert driver.execute_script(visible, chart) == [0, 1, 0, 1]


def test_details_belong_to_the_selected_run(browser, page):
    with opened(browser, page) as driver:
        driver.execute_script(
            "const w = document.querySelector('select.whose'); w.value = '1'; w.dispatchEvent(new Event('change'))"
        )
        owners = driver.execute_script(
            "return [...document.querySelectorAll('[data-run]')].filter((e) => !e.hidden).map((e) => e.dataset.run)"
        )
        assert set(owners) == {"1"}
        card = driver.execute_script(
            "return [...document.querySelectorAll('.card[data-run]')].find("
            "(c) => !c.hidden && c.querySelector('select.facet'))"
        )
        driver.execute_script("arguments[0].scrollIntoView({behavior: 'instant'})", card)
        wait(driver, "return arguments[0].querySelector('.main-svg')", card)
        before = driver.execute_script("return [...arguments[0].querySelector('.js-plotly-plot').data[0].z[0]]", card)
        driver.execute_script(
            "const f = arguments[0].querySelector('select.facet'); f.value = '1'; f.dispatchEvent(new Event('change'))",
            card,
        )
        after = "return [...arguments[0].querySelector('.js-plotly-plot').data[0].z[0]]"
        assert driver.execute_script(after, card) != before


def test_theme_button_changes_the_background(browser, page):
    with opened(browser, page) as driver:
        background = "return getComputedStyle(document.body).backgroundColor"
        before = driver.execute_script(background)
        driver.find_element("css selector", ".theme").click()
        assert driver.execute_script(background) != before


def test_script_in_a_hostile_run_is_not_executed(browser, hostile_run, tmp_path):
    write_report([hostile_run], tmp_path / "report.html")
    with opened(browser, tmp_path / "report.html") as driver:
        for card in driver.execute_script(VISIBLE_CARDS):
            driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", card)
            wait(driver, "return arguments[0].querySelector('.main-svg')", card)
        assert driver.execute_script("return window.pwned") is None
        assert driver.execute_script("return document.querySelectorAll('[onerror], [onmouseover], svg a').length") == 0


def test_recordings_play_and_show_the_prediction_at_each_step(browser, events_page):
    """The frame and the bars belong to the time step on the slider: while playing, paused, and when it is moved."""
    state = """
        const player = document.querySelector(".player");
        player.scrollIntoView({block: "center", behavior: "instant"});
        const rows = [...player.querySelectorAll(".vote")];
        return {
            step: Number(player.querySelector("input").value), text: player.querySelector("output").textContent,
            position: player.querySelector(".screen").style.backgroundPositionX,
            names: rows.map((row) => row.firstChild.textContent), shares: rows.map((row) => row.lastChild.textContent),
            label: player.querySelector(".vote.true").firstChild.textContent,
        }"""
    with opened(browser, events_page) as driver:
        recordings = driver.execute_script("return report.recordings")
        assert len(recordings) == len(driver.find_elements("css selector", ".player")) > 0
        seen = {driver.execute_script(state)["step"] for _ in range(60) if not time.sleep(0.1)}
        assert seen == {0, 1, 2}

        player = driver.find_element("css selector", ".player")
        button = player.find_element("css selector", "button")
        button.click()
        assert button.get_attribute("aria-label") == "play"
        paused_at = driver.execute_script(state)["step"]
        time.sleep(1.5)
        assert driver.execute_script(state)["step"] == paused_at

        first = recordings[0]
        for step, running in enumerate(first["running"]):
            driver.execute_script(
                "const s = document.querySelector('.player input'); s.value = arguments[0];"
                "s.dispatchEvent(new Event('input'))",
                step,
            )
            current = driver.execute_script(state)
            assert (current["text"], current["position"]) == (f"{step + 1} / 3", f"{50 * step}%")
            assert current["label"] == first["names"][first["label"]]
            for name, share in zip(current["names"], current["shares"], strict=True):
                expected = 100 * running[first["names"].index(name)]
                assert abs(int(re.sub(r"\D", "", share)) - expected) <= 0.5 + 1e-9
        assert sum(first["running"][0]) == pytest.approx(1.0, abs=1e-2)
