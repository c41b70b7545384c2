"""The doctor: what it finds on this machine, and that it finds what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dflash_offline.pipeline.app import app
from dflash_offline.pipeline.doctor import disk, installed, machine, trial_process, trials
from dflash_offline.pipeline.doctor import examine as doctor
from dflash_offline.pipeline.doctor.disk import try_disk
from dflash_offline.pipeline.doctor.installed import Package, needed_packages, optional_packages
from dflash_offline.pipeline.doctor.trial_process import run_trials
from dflash_offline.stages import trainer

SOUND: dict[str, list[dict[str, Any]]] = {
    "torch": [
        {"trial": "torch", "seconds": 1.0, "version": "2.13.0", "cuda": None, "error": None},
        {"trial": "device", "seconds": 0.0, "device": "cpu", "name": "AVX2", "threads": 2, "error": None},
        *(
            {"trial": "attention", "seconds": 0.1, "device": "cpu", "backend": name, "backward": True, "error": None}
            for name in trials.BACKENDS
        ),
    ],
    "compile": [{"trial": "compile", "seconds": 2.0, "device": "cpu", "error": None}],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the measurements short, and torch's own as it should be."""
    monkeypatch.setattr(machine, "_CODEC_S", 0)
    monkeypatch.setattr(disk, "TRIAL_BYTES", 1)
    monkeypatch.setattr(disk, "_PIECE_BYTES", 4096)
    monkeypatch.setattr(doctor, "run_trials", lambda what, *_: SOUND[what])


def examined(out: Path, *flags: str) -> Result:
    return CliRunner().invoke(app, ["doctor", "--out", str(out), *flags])


def found_in(out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    result = examined(out, "--json", "--quiet", *flags)
    return result.exit_code, json.loads(result.stdout)


def test_a_sound_machine_is_told_to_be_so_in_eighty_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = examined(Path())
    assert result.exit_code == 0, result.output
    assert "Nothing that is needed is wrong.\nNext: dflash demo --out demo\n" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80 and not set("\033\r") & set(result.output)
    assert list(tmp_path.iterdir()) == []
    code, found = found_in(tmp_path)
    assert code == 0 and found["sound"] and found["disk"]["locks"]
    assert found["disk"]["write_bytes_per_s"] > 0 and 0.5 < found["codec"]["ratio"] < 0.8


def test_packages_are_judged_by_what_the_project_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {package.name: package for package in needed_packages()}
    assert all(package.fits for package in needed.values()) and {"python", "torch", "zarr"} <= set(needed)
    assert {package.extra for package in optional_packages()} >= {"large", "hub", "plot", None}
    assert not {"pytest", "ruff"} & {package.name for package in optional_packages()}
    torch = Package(name="torch", found="2.14.0", supported=">=2.11,<2.14")
    assert torch.fault == "torch is 2.14.0; expected >=2.11,<2.14."
    assert Package(name="torch", found="2.13.0+cu130", supported=">=2.11,<2.14").fits


def test_a_package_that_is_too_old_or_missing_is_wrong_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = installed.installed
    planted = {"zarr": "2.18.0", "numcodecs": None, "accelerate": "0.1"}
    monkeypatch.setattr(installed, "installed", lambda name: planted[name] if name in planted else here(name))
    code, found = found_in(tmp_path)
    told = {finding["what"]: (finding["needed"], finding["do"]) for finding in found["findings"]}
    assert code == 1 and not found["sound"]
    assert told["zarr is 2.18.0; expected >=3.1.3,<4."] == (True, "pip install 'zarr>=3.1.3,<4'")
    assert told["numcodecs is not installed; expected >=0.16."][0]
    assert any("accelerate is 0.1" in what and not needed for what, (needed, _) in told.items())
    assert "WRONG  zarr is 2.18.0" in examined(tmp_path).stdout


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder in which nobody may write")
def test_a_folder_that_cannot_be_written_is_wrong() -> None:
    code, found = found_in(Path("/proc"))
    assert code == 1 and found["disk"]["error"] and "/proc cannot be written" in found["findings"][0]["what"]


def test_a_file_as_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = examined(tmp_path / "file")
    assert result.exit_code == 1 and "is not a folder" in result.stderr


def test_locks_that_do_not_hold_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_TRY_LOCK", "print(True)")  # as where another process gets the lock as well
    assert try_disk(tmp_path / "to come/cache").locks is False
    code, found = found_in(tmp_path)
    assert code == 0 and "Locks do not hold" in found["findings"][0]["what"]


@pytest.mark.parametrize(
    ("trial", "needed", "do"),
    [
        ({"trial": "attention", "device": "cpu", "backend": "sdpa"}, True, "--attention-backend eager"),
        ({"trial": "attention", "device": "cpu", "backend": "flex_attention"}, False, "Leave it"),
        ({"trial": "attention", "device": "cuda:0", "backend": "flex_attention"}, True, "pip install"),
        ({"trial": "compile", "device": "cuda:0"}, True, "--no-compile"),
        ({"trial": "compile", "device": "cpu"}, False, "Leave it"),
        ({"trial": "torch"}, True, "pip install"),
        ({"trial": "target"}, True, "Name its folder"),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_what_fails_is_wrong_where_it_is_the_default(
    trial: dict[str, str], needed: bool, do: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = {**trial, "seconds": 1.0, "error": "no kernel"}
    same = {"trial", "device", "backend"} & set(trial)
    others = [one for one in SOUND["torch"] if any(one.get(name) != trial[name] for name in same)]
    results = {"torch": [*others, failed], "compile": [], "target": []}
    monkeypatch.setattr(doctor, "run_trials", lambda what, *_: results[what])
    code, found = found_in(tmp_path, "--target", "somewhere")
    (finding,) = found["findings"]
    assert "no kernel" in finding["what"] and finding["needed"] == needed and do in finding["do"]
    assert code == needed and examined(tmp_path).exit_code == needed


@pytest.mark.parametrize(
    ("torch", "error"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with signal SIGSEGV"),
        ("import time; time.sleep(60)", "had not ended after 1 s"),
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13: cannot open"),
    ],
    ids=["crash", "hang", "broken"],
)
def test_a_torch_that_crashes_hangs_or_is_broken_is_a_finding_and_no_more(
    torch: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(torch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(trial_process, "TIMEOUT_S", 1 if "sleep" in torch else 60)
    (found,) = run_trials("torch")
    assert found["trial"] == "torch" and error in found["error"]


def test_the_attention_trial_computes_and_notices_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trials._attention("cpu", "sdpa") == {"backward": True}
    assert trials._attention("cpu", "flex_attention") == {"backward": False}
    plain, halved = trials._step("cpu", "sdpa", True), trials._step("cpu", "sdpa", True, bfloat16=True)
    assert 0 < abs(plain[0] - halved[0]) <= trials._BFLOAT16_TOLERANCE * plain[0]
    tiled_mask = trainer.tiled_mask
    monkeypatch.setattr(trainer, "tiled_mask", lambda blocks, rule: tiled_mask(blocks, rule._replace(causal=True)))
    with pytest.raises(ArithmeticError, match="differs from eager"):
        trials._attention("cpu", "sdpa")


def test_a_target_is_described_and_a_missing_one_named(target: Path) -> None:
    found = trials._target(str(target))
    assert found["layers"] == 6 and found["hidden_size"] == 32 and found["layer_ids"] == [1, 2, 3]
    assert found["generation_tags"] and found["weight_bytes"] > 100_000
    with pytest.raises(ValueError, match="neither a folder here nor a hub id"):
        trials._target("no/such-model")


@pytest.mark.slow
def test_everything_works_on_this_machine(tmp_path: Path, target: Path) -> None:
    found = run_trials("torch") + run_trials("compile") + run_trials("target", str(target))
    assert [one["error"] for one in found] == [None] * len(found)
    assert {one["backend"] for one in found if one["trial"] == "attention"} == set(trials.BACKENDS)
