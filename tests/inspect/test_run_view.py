"""`dflash inspect RUN`: what a run's folder says, in the terminal and to a script."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_run import STEPS, VAL_EVERY, plant, sound_rows
from typer.testing import CliRunner, Result

from dflash_offline.pipeline.app import app
from dflash_offline.pipeline.inspect.run import bucket_means, read_run
from dflash_offline.pipeline.inspect.run_report import curve
from dflash_offline.pipeline.pages.plots import Plot, Series, draw

Rows = list[dict[str, Any]]


def dflash(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def sound(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(run, tmp_path_factory.mktemp("planted") / "sound")


def test_a_real_run_is_told_from_a_cache_and_its_rows_are_the_files(run: Path) -> None:
    view = json.loads(dflash("inspect", run, "--json").stdout)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert view["training"] + view["validation"] == sorted(rows, key=lambda row: "val_loss" in row)
    assert (view["state"], view["step"], view["total_steps"]) == ("finished", 4, 4)
    state = json.loads((run / "checkpoints/step-0000004/state.json").read_text())
    assert (view["best_step"], view["best_serving_walk"]) == (state["best_step"], state["best_walk"])
    assert view["tokens_at_checkpoint"] == state["tokens"] and view["checkpoints"] == [4]


def test_the_number_of_parameters_is_that_of_the_weights(run: Path) -> None:
    from safetensors.numpy import load_file

    weights = load_file(run / "checkpoints/step-0000004/model.safetensors")
    assert read_run(run).parameters == sum(array.size for array in weights.values())


def test_the_terminal_shows_state_and_both_acceptance_lengths_in_80_columns(sound: Path) -> None:
    result = dflash("inspect", sound)
    view = read_run(sound)
    lines = [line for line in result.stdout.splitlines() if str(sound) not in line and view.caches[0].path not in line]
    assert result.exit_code == 0 and max(map(len, lines)) <= 80 and "\033" not in result.stdout
    assert f"finished: step {STEPS:,} of {STEPS:,}" in result.stdout
    assert f"acceptance length {view.best_serving_walk:.2f} in the serving walk" in " ".join(result.stdout.split())
    for label, row, name in (
        ("acceptance, all anchors, held-out", "last_validation", "val_accept_len_over_anchors"),
        ("acceptance, serving walk, held-out", "last_validation", "val_serving_walk"),
        ("training loss", "last_training", "loss"),
    ):
        line = next(line for line in lines if line.startswith(label))
        assert line.split()[-1] == f"{getattr(view, row)[name]:.3f}", line
    assert "Looks wrong" not in result.stdout


def test_a_curve_rises_and_falls_with_its_values() -> None:
    assert curve([0, 1, 2, 3, 4, 5, 6, 8], 0, 8) in ("▁▂▃▄▅▆▇█", "_.-=+*#@")
    assert curve([5, 5], 5, 5) in ("▅▅", "++")


def test_the_curves_follow_the_terminals_width(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = dflash("inspect", sound).stdout.splitlines()
    assert {len(line) for line in lines if line.startswith(("training loss", "learning rate"))} == {120}


def test_an_output_without_block_characters_gets_plain_ones(sound: Path) -> None:
    command = [sys.executable, "-m", "dflash_offline.pipeline.app", "inspect", str(sound)]
    shown = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True)
    assert b"training loss" in shown.stdout and shown.stdout.isascii()


def test_bucket_means_keep_every_row_of_a_short_curve_and_the_mean_of_a_long_one() -> None:
    rows = [{"step": i, "loss": float(i * i)} for i in range(1, 101)]
    assert bucket_means(rows, "loss", 200) == ([r["step"] for r in rows], [r["loss"] for r in rows])
    steps, values = bucket_means(rows, "loss", 10)
    parts = np.split(np.array([r["loss"] for r in rows]), 10)
    assert np.allclose(values, [part.mean() for part in parts]) and steps[0] == 5.5
    assert bucket_means([{"step": 1}], "loss", 10) == ([], [])


def ramp(name: str, first: float, last: float, begin: float = 0.5) -> Callable[[Rows], None]:
    """Return a change that leads a figure of the later rows from one value to another."""

    def change(rows: Rows) -> None:
        chosen = [row for row in rows if name in row and row["step"] > begin * STEPS]
        for i, row in enumerate(chosen, start=1):
            row[name] = first + (last - first) * i / len(chosen)

    return change


def without_validation(rows: Rows) -> None:
    rows[:] = [row for row in rows if "loss" in row]


def not_a_number(rows: Rows) -> None:
    rows[40]["grad_norm"] = float("nan")


PLANTED = {
    "data wait": (ramp("data_wait_share", 0.3, 0.4), "steps wait for data 39% of the time"),
    "growing gradients": (ramp("grad_norm", 1, 40, begin=0.6), "the gradient norm grows"),
    "rising loss": (ramp("loss", 1.6, 3, begin=0.7), "training loss has risen to"),
    "worse walk": (
        ramp("val_serving_walk", 3, 2),
        f"validation gets worse: no better serving walk in the last {STEPS // VAL_EVERY // 2} valid",
    ),
    "learnt by heart": (ramp("val_loss", 1.7, 3), "held-out loss has risen to 3.000"),
    "no validation": (without_validation, "no validation: no sample is held out"),
    "not finite": (not_a_number, f"a figure is not finite from step {sound_rows()[40]['step']} on"),
    "hopeless": (ramp("val_serving_walk", 1.01, 1.02, begin=0), "the serving walk is 1.02 tokens a round"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_pointed_at_and_no_other(name: str, run: Path, tmp_path: Path) -> None:
    change, said = PLANTED[name]
    folder = plant(run, tmp_path / "run", change)
    warnings = read_run(folder).warnings
    assert len(warnings) == 1 and said in warnings[0], warnings
    # The first screen shows it, above all curves.
    shown = " ".join(dflash("inspect", folder).stdout.split("Curves")[0].split())
    assert f"Looks wrong {said.split(' from')[0]}" in shown


def test_a_cut_off_line_a_missing_cache_and_a_changed_one_are_said(run: Path, cache: Path, tmp_path: Path) -> None:
    folder = plant(run, tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1010, "loss": 1.')
    assert read_run(folder).warnings == ["1 lines of metrics.jsonl cannot be read and are left out."]
    text = (folder / "run.json").read_text()
    assert str(cache.resolve()) in text
    from dflash_offline.schemas.sealed import read_sealed, sealed_bytes

    record = read_sealed(folder / "run.json")
    del record["checksum"]
    record["origin"]["caches"] = [str(tmp_path / "gone")]
    (folder / "run.json").write_bytes(sealed_bytes(record))
    assert "is not there any more" in read_run(folder).warnings[0]
    record["origin"]["caches"], record["identity"]["caches"] = [str(cache)], ["0" * 64]
    (folder / "run.json").write_bytes(sealed_bytes(record))
    assert "another cache lies there now" in read_run(folder).warnings[0]


def test_a_run_that_was_stopped_before_its_first_row_is_shown(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.jsonl").unlink()
    result = dflash("inspect", folder)
    assert result.exit_code == 0 and "no step done: step 0 of 4" in result.stdout
    assert dflash("inspect", folder, "--html", tmp_path / "page.html").exit_code == 0


def test_several_runs_are_compared_by_the_settings_that_differ(sound: Path, run: Path, tmp_path: Path) -> None:
    other = plant(run, tmp_path / "other", ramp("val_serving_walk", 3, 2), learning_rate=0.125, optimizer="muon")
    found = json.loads(dflash("inspect", sound, other, "--json").stdout)
    assert [view["run"] for view in found["runs"]] == [str(sound), str(other)]
    settings = found["runs"][0]["settings"]
    assert found["differing_settings"] == {
        "learning_rate": [settings["learning_rate"], 0.125],
        "optimizer": [settings["optimizer"], "muon"],
    }
    text = dflash("inspect", sound, other).stdout
    assert "run 2 looks wrong: validation gets worse" in text and "0.125" in text
    assert re.search(r"^ 1 +1,000 finished", text, re.MULTILINE)


def test_a_run_and_a_cache_are_not_compared(sound: Path, cache: Path) -> None:
    for folders, said in (((sound, cache), "is not a training run"), ((cache, sound), "only where all are runs")):
        result = dflash("inspect", *folders)
        assert result.exit_code == 1 and said in result.stderr


def test_the_page_refuses_a_place_that_is_none_before_any_work(sound: Path, tmp_path: Path) -> None:
    result = dflash("inspect", sound, "--html", tmp_path / "no/folder.html")
    assert result.exit_code == 1 and "not a file in an existing folder" in result.stderr


def test_the_page_says_how_to_install_matplotlib(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dflash_offline.pipeline.pages.plots.find_spec", lambda name: None)
    result = dflash("inspect", sound, "--html", tmp_path / "page.html")
    assert result.exit_code == 1 and "dflash-offline[plot]" in result.stderr and not list(tmp_path.iterdir())


def test_a_settings_document_with_markup_is_text_on_the_page(run: Path, tmp_path: Path) -> None:
    folder = plant(run, tmp_path / "<b>run</b>", init_note="</script><script>alert(1)</script>")
    page = tmp_path / "page.html"
    assert dflash("inspect", folder, "--html", page).exit_code == 0
    text = page.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and "<b>run" not in text
    assert not re.search(r"""(src|href)=["'](?!#)""", text.replace("xlink:", "")), "the page loads nothing"


def test_a_plot_names_every_series_whatever_it_is_called() -> None:
    names = ["_hidden", "$x$", "<b>"]
    series = [Series(name=name, x=[1, 2], y=[1, i], colour=i) for i, name in enumerate(names)]
    svg = draw(Plot(title="t", x_label="x", y_label="y", series=series))["svg"]
    assert all(html.escape(name) in svg for name in names) and "<b>" not in svg
