"""The pages of `--html` in a real headless Chromium: nothing is fetched, nothing foreign runs, everything answers."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted_run import plant
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent

selenium = pytest.importorskip("selenium")
from browser import DESKTOP, PHONE, Browser  # noqa: E402
from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

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
        ("acceptance, serving walk, held-out, last", "last_validation", "val_serving_walk"),
        ("acceptance, all anchors, held-out, last", "last_validation", "val_accept_len_over_anchors"),
        ("tokens/s, last", "last_training", "tokens_per_s"),
        ("peak memory, GiB, last", "last_training", "peak_memory_gib"),
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


BIDI = "\u202eabc\u2066 \u200f"


@pytest.fixture(scope="module")
def evaluated(run: Path, target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A page of a real evaluation, one prompt of it hostile, and what --json says of it."""
    folder = tmp_path_factory.mktemp("eval")
    dflash("export", run, "--out", folder / "draft")
    texts = ["the red cat sees", f"{HOSTILE} {BIDI}", *(f"count {word} dog" for word in "one two three".split())] * 9
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": text, "kind": HOSTILE if HOSTILE in text else text.split()[0]} for text in texts]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = folder / "eval.html"
    arguments = ("--target", target, "--prompts", prompts, "--max-new-tokens", 24, "--html", page, "--json")
    return page, json.loads(dflash("eval", folder / "draft", *arguments))


def test_an_evaluations_page_shows_what_json_says(browser: Browser, evaluated: tuple[Path, dict[str, Any]]) -> None:
    page, found = evaluated
    check_page(browser, page)
    pairs = "[...document.querySelectorAll('.facts div')].map((one) => [...one.children].map((c) => c.textContent))"
    facts = browser.js(f"return {pairs}")
    assert shown(dict(facts)["acceptance length, pooled"]) == pytest.approx(found["acceptance"]["pooled"], rel=1e-3)
    assert shown(dict(facts)["drafted tokens"]) == found["drafted_tokens"]
    kinds = dict(zip(column(browser, "kinds", 0), column(browser, "kinds", 3), strict=True))
    assert {kind: shown(length) for kind, length in kinds.items()} == pytest.approx(
        {kind: one["pooled"] for kind, one in found["acceptance_by_kind"].items()}, rel=1e-3
    )


def view_of(browser: Browser) -> dict[str, list[str]]:
    """Return the texts of the open prompt's tokens by what became of them."""
    kinds = ("accepted", "rejected", "unused", "own")
    program = "return [...document.querySelectorAll(`#decoded .tokens .${arguments[0]}`)].map((e) => e.textContent)"
    return {kind: browser.js(program, kind) for kind in kinds}


def test_every_prompts_rounds_add_up_to_json(browser: Browser, evaluated: tuple[Path, dict[str, Any]]) -> None:
    page, found = evaluated
    browser.open(page)
    for i, prompt in enumerate(found["decoded"][:12]):
        view = view_of(browser)
        assert len(view["accepted"]) == sum(prompt["accepted"])
        assert len(view["own"]) == 1 + sum(prompt["produced"]) - sum(prompt["accepted"])
        assert len(view["accepted"]) + len(view["own"]) == len(prompt["answer"])
        assert sum(map(len, view.values())) - len(view["own"]) == sum(map(len, prompt["drafted"]))
        title = browser.driver.find_element("css selector", "#decoded h3").text
        assert title.startswith(f"prompts.jsonl:{i + 1}")
        browser.driver.find_element("css selector", "button[data-move='1']").click()


def list_rows(browser: Browser) -> list[list[str]]:
    return browser.js(
        "return [...document.querySelectorAll('.browse tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )


def test_the_list_of_prompts_filters_sorts_and_turns_pages(
    browser: Browser, evaluated: tuple[Path, dict[str, Any]]
) -> None:
    page, found = evaluated
    browser.open(page)
    count = browser.driver.find_element("css selector", ".browse .count")
    assert count.text == "45 of 45, page 1 of 3"
    browser.driver.find_element("css selector", ".pages button:last-child").click()
    assert [row[0] for row in list_rows(browser)] == [f"prompts.jsonl:{i}" for i in range(21, 41)]
    field = browser.driver.find_element("css selector", ".browse input")
    field.send_keys("kind=count rounds>1")
    wanted = [p for p in found["decoded"] if p["kind"] == "count" and len(p["produced"]) > 1]
    assert count.text.startswith(f"{len(wanted)} of 45")
    lengths = sorted((sum(p["produced"]) / len(p["produced"]) for p in wanted), reverse=True)
    button = browser.driver.find_elements("css selector", ".browse th button")[4]
    button.click()
    button.click()
    assert [shown(row[4]) for row in list_rows(browser)] == pytest.approx(lengths[:20], abs=1e-3)
    field.clear()
    field.send_keys("nothing-has-this")
    assert list_rows(browser) == [] and count.text.startswith("0 of 45")


def test_clicks_and_keys_change_the_prompt_and_read_its_tokens(
    browser: Browser, evaluated: tuple[Path, dict[str, Any]]
) -> None:
    page, found = evaluated
    browser.look()
    browser.open(page)
    title = browser.driver.find_element("css selector", "#decoded h3")
    lines = browser.driver.find_elements("css selector", ".browse tbody tr")
    lines[3].click()
    assert title.text.startswith("prompts.jsonl:4,")
    focused = browser.driver.find_elements("css selector", ".browse tbody tr")[3]
    focused.send_keys(Keys.ARROW_DOWN)
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert title.text.startswith("prompts.jsonl:5,")
    tokens = browser.driver.find_element("css selector", "#decoded .tokens")
    tokens.send_keys(Keys.PAGE_DOWN)
    assert title.text.startswith("prompts.jsonl:6,")
    tokens.send_keys(Keys.HOME)
    reading = browser.driver.find_element("css selector", "#decoded .reading")
    assert reading.text.startswith(f"token {found['decoded'][5]['answer'][0]}, the first")
    tokens.send_keys(Keys.ARROW_RIGHT)
    assert reading.text.startswith("token ") and "round 1" in reading.text


def test_a_hostile_prompt_and_kind_are_text_that_does_nothing(
    browser: Browser, evaluated: tuple[Path, dict[str, Any]]
) -> None:
    page, _ = evaluated
    browser.open(page)
    browser.driver.find_elements("css selector", ".browse tbody tr")[1].click()
    browser.driver.find_element("css selector", "#decoded summary").click()
    text = browser.driver.find_element("css selector", "#decoded .prompt").text
    assert HOSTILE in text and "\\u202eabc\\u2066 \\u200f" in text
    assert browser.driver.find_element("css selector", "#decoded h3").text == f"prompts.jsonl:2, {HOSTILE}"
    assert "run over" not in browser.driver.title and browser.console() == []
    assert browser.js("return document.querySelectorAll('main img, main script:not([type])').length") == 0


@pytest.fixture(scope="module")
def cache_page(target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache of which every third answer is hostile, in a file of a hostile name, and its page."""
    folder = tmp_path_factory.mktemp("hostile")
    data = folder / "<img src=x onerror=alert(1)>.jsonl"
    texts = ("the red cat sees one dog " * 3, f"{HOSTILE} {BIDI} & one two three", "naïve 猫 🐈 counts four five six")
    rows = [
        {"messages": [{"role": "user", "content": f"count {i}"}, {"role": "assistant", "content": texts[i % 3] * 2}]}
        for i in range(60)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache, page = folder / "cache", folder / "report.html"
    settings = {"layers": (1, 2, 4), "block_size": 8, "shard_mib": 1, "chunk_tokens": 32, "device": "cpu"}
    extract(ExtractConfig(data=(data,), target=str(target), out=cache, **settings), Silent())
    dflash("inspect", cache, "--html", page)
    return cache, page


def test_a_caches_page_shows_what_json_says(browser: Browser, cache_page: tuple[Path, Path]) -> None:
    cache, page = cache_page
    found = json.loads(dflash("inspect", cache, "--json"))
    layers = json.loads(dflash("inspect", cache, "--layers", "--features", 8, "--json"))
    check_page(browser, page)
    pairs = "[...document.querySelectorAll('.facts div')].map((one) => [...one.children].map((c) => c.textContent))"
    facts = dict(browser.js(f"return {pairs}"))
    for label, name in (("samples", "samples"), ("tokens", "tokens"), ("anchors", "anchors")):
        assert shown(facts[label]) == found[name]
    assert facts["shards done"] == f"{found['shards_done']} of {found['shards']}"
    assert shown(facts["features stored / raw"]) == pytest.approx(found["compression"], rel=1e-3)
    assert len(browser.js("return [...document.querySelectorAll('.cells .cell.done')].map(String)")) == found["shards"]
    for place, values in (
        (0, found["layer_ids"]),
        (2, [one["std"] for one in found["layers"]]),
        (5, [one["norm"]["median"] for one in layers["features"]["layers"]]),
        (7, layers["bytes_by_layer"]["ratio"]),
    ):
        assert [shown(text) for text in column(browser, "layers", place)] == pytest.approx(values, rel=1e-3)
    for place in range(3):
        values = [line[place] for line in layers["features"]["similarity"]]
        assert [shown(text) for text in column(browser, "similarity", place + 1)] == pytest.approx(values, abs=0.006)


def test_the_table_of_samples_filters_sorts_and_turns_pages(browser: Browser, cache_page: tuple[Path, Path]) -> None:
    cache, page = cache_page
    browser.look()
    browser.open(page)
    assert [row[0] for row in list_rows(browser)] == [str(i) for i in range(20)]
    browser.driver.find_element("css selector", ".pages button:last-child").click()
    assert [row[0] for row in list_rows(browser)] == [str(i) for i in range(20, 40)]
    browser.driver.find_elements("css selector", "#samples th button")[3].click()
    lengths = [shown(row[3]) for row in list_rows(browser)]
    views = [json.loads(dflash("inspect", cache, "--sample", i, "--json")) for i in range(60)]
    assert lengths == sorted(view["tokens"] for view in views)[:20]
    most = max(view["tokens"] for view in views)
    browser.driver.find_element("css selector", "#samples input").send_keys(f"tokens>={most}")
    long = [str(view["sample"]) for view in views if view["tokens"] == most]
    assert [row[0] for row in list_rows(browser)] == long[:20]


def test_clicks_and_keys_change_the_sample_and_read_its_numbers(
    browser: Browser, cache_page: tuple[Path, Path]
) -> None:
    cache, page = cache_page
    browser.look()
    browser.open(page)
    browser.driver.find_element("css selector", "#samples input").send_keys("opens=yes")
    opens = [int(row[0]) for row in list_rows(browser)]
    title = browser.driver.find_element("css selector", "#sample h3")
    browser.driver.find_elements("css selector", "#samples tbody tr")[2].click()
    assert title.text.startswith(f"Sample {opens[2]},")
    tokens = browser.driver.find_element("css selector", "#sample .tokens")
    tokens.send_keys(Keys.PAGE_UP)
    assert title.text.startswith(f"Sample {opens[1]},")
    browser.driver.find_element("css selector", "#sample button[data-move='1']").click()
    assert title.text.startswith(f"Sample {opens[2]},")
    view = json.loads(dflash("inspect", cache, "--sample", opens[2], "--json"))
    tokens.send_keys(Keys.HOME + Keys.ARROW_RIGHT * 3)
    reading = browser.driver.find_element("css selector", "#sample .reading").text
    assert reading.startswith(f"position 3, token {view['token_ids'][3]}, slot {view['start'] + 3}: not supervised")
    norms = [shown(text) for text in re.findall(r"layer \d+ ([\d.,]+)", reading)]
    assert norms == pytest.approx([layer[3] for layer in view["norms"]], rel=1e-3, abs=1e-3)
    kinds = browser.js("return [...document.querySelectorAll('#sample .tokens span')].map((e) => e.className)")
    assert sum("anchor" in kind for kind in kinds) == view["anchors"]
    assert sum("anchor" in kind or "tail" in kind for kind in kinds) == view["supervised"]


def test_a_tokens_colour_follows_the_chosen_layers_norm(browser: Browser, cache_page: tuple[Path, Path]) -> None:
    cache, page = cache_page
    browser.open(page)
    sample = int(re.findall(r"\d+", browser.driver.find_element("css selector", "#sample h3").text)[0])
    view = json.loads(dflash("inspect", cache, "--sample", sample, "--json"))
    choice = Select(browser.driver.find_element("id", "layer"))
    for place in (2, 0):
        choice.select_by_visible_text(str(view["layer_ids"][place]))
        strength = "[...document.querySelectorAll('#sample .tokens span')].map((e) => e.style.getPropertyValue('--v'))"
        values = [float(text) for text in browser.js(f"return {strength}")]
        order = sorted(range(len(values)), key=lambda i: view["norms"][place][i])
        assert values[order[0]] == 0 and values[order[-1]] == 1
        assert all(values[a] <= values[b] + 0.002 for a, b in itertools.pairwise(order))


def test_a_hostile_sample_and_file_name_are_text_that_does_nothing(
    browser: Browser, cache_page: tuple[Path, Path]
) -> None:
    _, page = cache_page
    browser.open(page)
    browser.driver.find_element("css selector", "#samples input").send_keys("opens=yes")
    hostile = next(i for i, row in enumerate(list_rows(browser)) if int(row[0]) % 3 == 1)
    browser.driver.find_elements("css selector", "#samples tbody tr")[hostile].click()
    text = browser.js("return document.querySelector('#sample .tokens').textContent").replace("◦", "")
    assert HOSTILE in text and "\\u202eabc\\u2066 \\u200f" in text and "\u202e" not in text
    assert "<img src=x onerror=alert(1)>.jsonl" in browser.driver.find_element("css selector", "#sample h3").text
    assert "run over" not in browser.driver.title and browser.console() == []
    assert browser.js("return document.querySelectorAll('main img, main script:not([type])').length") == 0
