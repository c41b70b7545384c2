"""The pages of `--html` in a real headless Chromium: nothing is fetched, nothing foreign runs, everything answers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from planted_run import plant
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app

selenium = pytest.importorskip("selenium")
from browser import DESKTOP, PHONE, Browser  # noqa: E402
from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.browser
HOSTILE = "</script><script>document.title='run over'</script><img src=x onerror=document.title='run over'>"


def dflash(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    tab = Browser()
    yield tab
    tab.close()


def check_page(browser: Browser, page: Path) -> None:
    """Check a page in both colour schemes and at both widths; leaves it open, light and wide."""
    for dark, size in ((True, PHONE), (False, PHONE), (True, DESKTOP), (False, DESKTOP)):
        browser.look(dark=dark, size=size)
        browser.open(page)
        assert browser.console() == []
        assert browser.requests() == [page.resolve().as_uri()], "a page fetches nothing"
        for probe in ("spilled", "contrast", "clipped"):
            assert browser.probe(probe) == [], (probe, dark, size)
        paper = browser.js("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 150) == dark


def column(browser: Browser, table: str, place: int) -> list[str]:
    rows = "[...document.getElementById(arguments[0]).tBodies[0].rows]"
    return browser.js(f"return {rows}.map((row) => row.cells[arguments[1]].textContent)", table, place)


def shown(text: str) -> float:
    return float(text.replace(",", ""))


def test_a_runs_page_shows_what_json_says(browser: Browser, run: Path, tmp_path: Path) -> None:
    folder, page = plant(run, tmp_path / "run"), tmp_path / "page.html"
    dflash("inspect", folder, "--html", page)
    view = json.loads(dflash("inspect", folder, "--json"))
    check_page(browser, page)
    cells = dict(zip(column(browser, "summary", 0), column(browser, "summary", 1), strict=True))
    for label, kind, name in (
        ("training loss, last", "last_training", "loss"),
        ("held-out loss, last", "last_validation", "val_loss"),
        ("acceptance length, serving walk, held-out", "last_validation", "val_serving_walk"),
        ("acceptance length, mean over all anchors, held-out", "last_validation", "val_accept_len_over_anchors"),
        ("tokens/s", "last_training", "tokens_per_s"),
        ("peak memory, GiB", "last_training", "peak_memory_gib"),
    ):
        assert shown(cells[label]) == pytest.approx(view[kind][name], rel=1e-3), label
    walks = [shown(text) for text in column(browser, "validations", 4)]
    assert walks == pytest.approx([row["val_serving_walk"] for row in view["validation"]], rel=1e-3)


def test_a_table_sorts_both_ways_by_mouse_and_keyboard(browser: Browser, run: Path, tmp_path: Path) -> None:
    def swing(rows: list[dict[str, float]]) -> None:
        for i, row in enumerate(row for row in rows if "val_loss" in row):
            row["val_loss"] = [3.0, 20.0, 1.0, 100.0][i % 4] + i / 100

    folder, page = plant(run, tmp_path / "run", swing), tmp_path / "page.html"
    dflash("inspect", folder, "--html", page)
    browser.open(page)
    losses = column(browser, "validations", 1)
    button = browser.driver.find_elements("css selector", "#validations th button")[1]
    button.click()
    assert column(browser, "validations", 1) == sorted(losses, key=shown) != losses
    button.send_keys(Keys.ENTER)
    assert column(browser, "validations", 1) == sorted(losses, key=shown, reverse=True)
    sorted_by = browser.js("return [...document.querySelectorAll('#validations th')].map((h) => h.ariaSort)")
    assert sorted_by == [None, "descending", None, None, None, None]


def test_a_plot_reads_out_its_values_by_pointer_and_arrow_keys(browser: Browser, run: Path, tmp_path: Path) -> None:
    folder, page = plant(run, tmp_path / "run"), tmp_path / "page.html"
    dflash("inspect", folder, "--html", page)
    view = json.loads(dflash("inspect", folder, "--json"))
    browser.look()
    browser.open(page)
    figure = browser.driver.find_elements("css selector", "figure.plot")[1]
    reading = figure.find_element("css selector", ".reading")
    figure.send_keys(Keys.END)
    row = view["validation"][-1]
    numbers = [shown(text) for text in re.findall(r"[\d,.]*\d", reading.text)]
    assert numbers == pytest.approx(
        [row["step"], row["val_serving_walk"], row["val_serving_walk_mean_of_samples"]], 1e-4
    )
    figure.send_keys(Keys.ARROW_LEFT)
    assert f"step {view['validation'][-2]['step']}" in reading.text
    ActionChains(browser.driver).move_to_element_with_offset(figure, -150, 0).perform()
    assert re.search(r"step [12]00", reading.text), reading.text


def test_several_runs_stand_side_by_side_and_a_hostile_setting_is_text(
    browser: Browser, run: Path, tmp_path: Path
) -> None:
    first = plant(run, tmp_path / "first")
    second = plant(run, tmp_path / "second", optimizer=HOSTILE, learning_rate=0.25)
    page = tmp_path / "page.html"
    dflash("inspect", first, second, "--html", page)
    check_page(browser, page)
    assert "run over" not in browser.driver.title
    names = column(browser, "differing", 0)
    assert sorted(names) == ["learning_rate", "optimizer"]
    assert column(browser, "differing", 2)[names.index("optimizer")] == HOSTILE
    assert browser.js("return document.querySelectorAll('main script:not([type]), main img').length") == 0


def test_a_page_links_to_the_caches_and_the_evaluations(browser: Browser, run: Path, tmp_path: Path) -> None:
    folder = plant(run, tmp_path / "a run & #1")
    (folder / "eval.html").write_text("<title>found</title>")
    (tmp_path / "pages").mkdir()
    page = tmp_path / "pages/page.html"
    dflash("inspect", folder, "--html", page)
    browser.open(page)
    browser.driver.find_element("link text", "decoded prompts").click()
    assert browser.driver.title == "found"
