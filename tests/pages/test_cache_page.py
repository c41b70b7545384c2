"""`dflash inspect CACHE --html`: what the page holds, without a browser."""

import json
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.pipeline.inspect.shard_statistics import ShardRun
from dflash_offline.pipeline.pages import cache_page
from dflash_offline.schemas.manifest import COMMITS, FEATURES

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_inspect


def dflash(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def data_of(page: Path, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    result = dflash("inspect", cache, "--html", path)
    assert result.exit_code == 0, result.output
    assert "lists 80 samples and shows 24 of them" in result.stdout
    return path


def test_the_table_and_the_shown_samples_are_those_of_json(cache: Path, page: Path) -> None:
    table, shown = data_of(page, "table-data"), data_of(page, "shown-data")
    assert len({one["sample"] for one in shown}) == len(shown) == cache_page.NUM_SHOWN
    for one in shown[::6]:
        view = json.loads(dflash("inspect", cache, "--sample", one["sample"], "--json").stdout)
        place = one["sample"]
        assert [table[name][place] for name in ("row", "tokens", "supervised", "anchors", "shard")] == [
            view[name] for name in ("row", "tokens", "supervised", "anchors", "shard")
        ]
        assert table["sources"][table["source"][place]] == view["source"]
        assert (one["ids"], one["mask"], one["start"]) == (view["token_ids"], view["loss_mask"], view["start"])
        assert np.allclose(one["norms"], view["norms"], rtol=1e-3, atol=1e-5)
        assert sum(one["anchors"]) == view["anchors"]
        assert "".join(one["texts"]).replace("↵\n", "\n") == "".join(run["text"] for run in view["runs"])


def test_a_half_finished_cache_has_a_page_of_what_there_is(cache: Path, tmp_path: Path) -> None:
    half, page = tmp_path / "half", tmp_path / "page.html"
    shutil.copytree(cache, half)
    records = sorted((half / COMMITS).glob("*.json"))
    for record in records[1:]:
        record.unlink()
    assert dflash("inspect", half, "--html", page).exit_code == 0
    assert f"1 of {len(records)}" in page.read_text() and "half-finished" in page.read_text()
    shards = data_of(page, "table-data")["shard"]
    assert {shards[one["sample"]] for one in data_of(page, "shown-data")} == {0}
    records[0].unlink()
    assert dflash("inspect", half, "--html", page).exit_code == 0
    assert "Norms, channels and similarity are missing" in page.read_text()
    shown = data_of(page, "shown-data")
    assert len(shown) == cache_page.NUM_SHOWN and {one["norms"] for one in shown} == {None}
    assert "is not extracted" in shown[0]["no_features"]


def test_a_shard_whose_worker_died_while_writing_is_on_the_map(cache: Path, tmp_path: Path) -> None:
    half, page = tmp_path / "half", tmp_path / "page.html"
    shutil.copytree(cache, half)
    (half / COMMITS / "000001.json").unlink()
    for path in half.glob(f"{FEATURES}/*/c/1"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (half / f"tmp/000001.{socket.gethostname()}-999999999.part").write_bytes(b"half of a shard")
    result = dflash("inspect", half, "--html", page)
    assert result.exit_code == 0, result.exception
    assert '<span class="cell half-written" title="shard 1: half-written">' in page.read_text()


@pytest.mark.parametrize(
    ("limit", "said"), [("NUM_ROWS", "50 of 80 samples, drawn"), ("TOKENS_SHOWN", "only their first 50")]
)
def test_what_does_not_fit_is_drawn_and_the_page_says_so(
    limit: str, said: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_page, limit, 50)
    page = tmp_path / "page.html"
    assert dflash("inspect", cache, "--html", page).exit_code == 0
    assert said in page.read_text()
    table, shown = data_of(page, "table-data"), data_of(page, "shown-data")
    assert max(len(one["ids"]) for one in shown) <= (50 if limit == "TOKENS_SHOWN" else 10_000)
    listed = table["sample"] or list(range(80))
    assert {one["sample"] for one in shown} <= set(listed)
    view = json.loads(dflash("inspect", cache, "--sample", listed[-1], "--json").stdout)
    assert (table["tokens"][-1], table["row"][-1]) == (view["tokens"], view["row"])


def test_samples_beyond_the_pages_budget_are_left_out(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_page, "MOST_BYTES", 20_000)
    page = tmp_path / "page.html"
    assert dflash("inspect", cache, "--html", page).exit_code == 0
    shown = data_of(page, "shown-data")
    assert 0 < len(shown) < cache_page.NUM_SHOWN and f"{len(shown)} of them, drawn" in page.read_text()


def test_a_cell_of_the_map_shows_the_gravest_of_its_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_page, "NUM_CELLS", 4)
    progress = [ShardRun("done", 0, 4), ShardRun("damaged", 5, 5), ShardRun("left", 6, 9)]
    cells = cache_page._cells(progress, 10)
    assert [(cell["state"], cell["shards"]) for cell in cells] == [
        ("done", "0 to 2"),
        ("damaged", "3 to 5"),
        ("left", "6 to 8"),
        ("left", "9"),
    ]


def test_the_page_of_a_part_of_a_cache_is_refused(cache: Path, run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for folder, said in ((cache, "leave --sample out"), (run, "leave --sample out")):
        result = dflash("inspect", folder, "--sample", 0, "--html", page)
        assert result.exit_code == 1 and said in result.stderr and not page.exists()
    result = dflash("inspect", run, "--layers")
    assert result.exit_code == 1 and "is a run, and --layers shows a part of a cache" in result.stderr


@pytest.mark.slow
def test_a_page_of_100_000_samples_is_under_10_mb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_inspect, "NUM_SAMPLES", 100_000)
    monkeypatch.setattr(bench_inspect, "NUM_SHARDS", 2_000)
    bench_inspect.make_plan(tmp_path / "cache")
    page = tmp_path / "page.html"
    assert dflash("inspect", tmp_path / "cache", "--html", page).exit_code == 0
    assert data_of(page, "table-data")["count"] == 100_000
    # The plan has no features; the norms of shown samples may take what is left of their budget.
    left = cache_page.MOST_BYTES - len(json.dumps(data_of(page, "shown-data")))
    assert page.stat().st_size + left < 10_000_000
