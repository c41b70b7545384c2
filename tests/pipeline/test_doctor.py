"""The doctor: what it finds on this machine, and that it finds what is wrong."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from feature_writer import create, fill_cache
from processes import FORKING
from typer.testing import CliRunner, Result

from dflash_offline.pipeline.app import app
from dflash_offline.pipeline.doctor import examine, machine, storage, torch_trials, trials
from dflash_offline.pipeline.doctor.machine import Package, find_packages
from dflash_offline.pipeline.doctor.storage import try_disk
from dflash_offline.pipeline.doctor.trials import Trial, run_trials
from dflash_offline.stages import trainer
from dflash_offline.stages.store.cache import Cache

SOUND = [
    Trial(name="torch", result="2.13.0, a CPU build"),
    Trial(name="cpu", result="AVX2, 2 threads"),
    Trial(name="sdpa on cpu", result="works"),
    Trial(name="torch.compile on cpu", needed=False, result="works, 2 s for a small function"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the measurements short, and torch's own as it should be."""
    monkeypatch.setattr(storage, "_CODEC_S", 0)
    monkeypatch.setattr(storage, "TRIAL_BYTES", 4096)
    monkeypatch.setattr(examine, "run_trials", lambda _target: SOUND)


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
    assert found["disk"]["write_bytes_per_s"] > 0 and found["store"]["decode_bytes_per_s"] > 0


def test_packages_are_judged_by_what_the_project_asks_for() -> None:
    packages = {package.name: package for package in find_packages()}
    assert not any(package.fault for package in packages.values()) and {"python", "torch", "pyarrow"} <= set(packages)
    assert {package.extra for package in packages.values()} == {None, "large", "hub", "store", "plot", "vllm", "ray"}
    assert not {"pytest", "ruff", "selenium"} & set(packages)
    torch = Package(name="torch", installed="2.14.0", supported=">=2.11,<2.14")
    assert torch.fault == "torch is 2.14.0; expected >=2.11,<2.14."
    assert Package(name="torch", installed="2.13.0+cu130", supported=">=2.11,<2.14").fault is None


def test_a_package_that_is_too_old_or_missing_is_wrong_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine.installed
    planted = {"safetensors": "0.4.0", "numcodecs": None, "accelerate": "0.1", "datasets": None}
    monkeypatch.setattr(machine, "installed", lambda name: planted[name] if name in planted else here(name))
    code, found = found_in(tmp_path)
    reported = {finding["what"]: (finding["needed"], finding["do"]) for finding in found["findings"]}
    assert code == 1 and not found["sound"]
    assert reported["safetensors is 0.4.0; expected >=0.5."] == (True, "pip install 'safetensors>=0.5'")
    assert reported["numcodecs is not installed; expected >=0.16.6."][0]
    assert reported["accelerate is 0.1; expected >=1.0."] == (False, "pip install 'dflash-offline[large]'")
    printed = examined(tmp_path).stdout
    assert "WRONG  safetensors is 0.4.0" in printed and "pip install 'dflash-offline[hub]'" in printed


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder in which nobody may write")
def test_a_folder_that_cannot_be_written_is_wrong() -> None:
    code, found = found_in(Path("/proc"))
    assert code == 1 and found["disk"]["error"] and "/proc cannot be written" in found["findings"][0]["what"]


def test_a_file_as_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = examined(tmp_path / "file")
    assert result.exit_code == 1 and "is not a folder" in result.stderr


def test_locks_that_do_not_hold_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_TRY_LOCK", "print(True)")  # as where another process gets the lock as well
    assert try_disk(tmp_path / "to come/cache").locks is False
    code, found = found_in(tmp_path)
    assert code == 0 and "Locks do not hold" in found["findings"][0]["what"]


def test_a_hub_that_does_not_answer_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    code, found = found_in(tmp_path, "--hub")
    assert code == 0 and ["http://127.0.0.1:1 does not answer" in note["what"] for note in found["findings"]] == [True]
    assert found_in(tmp_path)[1]["findings"] == []


def read_under_a_limit(cache: Path, limit: int) -> None:
    """Read every sample, then compare the shard files that are open with what the doctor says and prints."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    # A process of its own is patched by hand.
    examine.run_trials, storage._CODEC_S, storage.TRIAL_BYTES = lambda _target: SOUND, 0, 4096
    reader = Cache.open(cache)
    for sample in range(len(reader.samples)):
        reader.codes(sample)
    links = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    num_open = sum("/hidden_states/" in link for link in links)
    said = f"{limit} files may be open at once; {num_open} shard files are kept open"
    assert said in examined(cache.parent).stdout, said


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_as_many_shard_files_are_said_to_be_kept_open_as_a_reader_keeps_open(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    create(cache, num_shards=40, shard_tokens=96)
    fill_cache(cache)
    process = FORKING.Process(target=read_under_a_limit, args=(cache, 64))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("needed", [True, False])
def test_what_fails_is_wrong_where_it_is_needed(needed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Trial(name="eager on cpu", needed=needed, do="Train with sdpa.", error="no kernel")
    monkeypatch.setattr(examine, "run_trials", lambda _target: [*SOUND, failed])
    code, found = found_in(tmp_path, "--target", "somewhere")
    assert found["findings"] == [{"needed": needed, "what": "eager on cpu: no kernel.", "do": "Train with sdpa."}]
    printed = examined(tmp_path)
    assert code == needed and printed.exit_code == needed
    assert f"{'WRONG  ' if needed else 'NOTE   '}eager on cpu: no kernel.\n       Train with sdpa.\n" in printed.stdout


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
    monkeypatch.setattr(trials, "TIMEOUT_S", 1 if "sleep" in torch else 60)
    (found,) = run_trials(None)
    assert found.name == "torch" and found.needed and error in str(found.error)


def tried(capsys: pytest.CaptureFixture[str], target: str | None = None) -> dict[str, Trial]:
    """Return what came of each trial of torch in this process."""
    torch_trials.main(target)
    lines = [Trial(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    begun = [trial.name for trial in lines if trial.error == trials.BEGUN]
    assert begun == [trial.name for trial in lines if trial.error != trials.BEGUN]
    return {trial.name: trial for trial in lines}


def test_a_trial_that_fails_says_what_to_do_instead(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_arguments: object) -> str:
        raise RuntimeError("no kernel\nfor this processor")

    for name in ("compare_attention", "_compile", "_describe_device"):
        monkeypatch.setattr(torch_trials, name, failing)
    monkeypatch.setattr(torch_trials, "nvidia_driver", lambda: "570.1")
    monkeypatch.setattr(torch_trials.torch.cuda, "device_count", lambda: 0)
    cpu = tried(capsys, "no/such-model")
    assert (cpu["sdpa on cpu"].error, cpu["sdpa on cpu"].needed) == ("no kernel", True)
    assert "--attention-backend eager" in cpu["sdpa on cpu"].do
    assert not cpu["flex_attention on cpu"].needed and "Leave it" in cpu["flex_attention on cpu"].do
    assert not cpu["torch.compile on cpu"].needed and "Leave it" in cpu["torch.compile on cpu"].do
    assert not cpu["GPU"].needed and "driver 570.1" in str(cpu["GPU"].error)
    assert "neither a folder here nor a hub id" in str(cpu["target"].error) and "its weights" not in cpu
    monkeypatch.setattr(torch_trials.torch.cuda, "device_count", lambda: 2)
    gpus = tried(capsys)
    assert gpus["flex_attention on cuda:0"].needed and "--attention-backend sdpa" in gpus["flex_attention on cuda:0"].do
    assert gpus["torch.compile on cuda:0"].needed and "--no-compile" in gpus["torch.compile on cuda:0"].do
    assert gpus["cuda:1"].needed and "CUDA_VISIBLE_DEVICES" in gpus["cuda:1"].do and "sdpa on cuda:1" not in gpus


def test_the_attention_trial_computes_and_notices_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_trials.compare_attention("cpu", "sdpa") == "works"
    assert "forward only" in torch_trials.compare_attention("cpu", "flex_attention")
    plain, halved = torch_trials.step("cpu", "sdpa", True), torch_trials.step("cpu", "sdpa", True, bfloat16=True)
    assert 0 < abs(plain[0] - halved[0]) <= torch_trials._BFLOAT16_TOLERANCE * plain[0]
    tiled_mask = trainer.tiled_mask
    monkeypatch.setattr(trainer, "tiled_mask", lambda blocks, rule: tiled_mask(blocks, rule._replace(causal=True)))
    with pytest.raises(ArithmeticError, match="differs from eager"):
        torch_trials.compare_attention("cpu", "sdpa")


def test_a_target_is_described_with_whether_its_weights_fit(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = torch_trials._describe_target(str(target))
    assert "6 layers of width 32, captured by default 1, 2, 3: 192 B a token; a chat template with" in found
    assert "of weights" in torch_trials._find_room(str(target))
    monkeypatch.setattr(torch_trials, "usable_memory_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match="1000 B on this machine"):
        torch_trials._find_room(str(target))


@pytest.mark.slow
def test_everything_works_on_this_machine(target: Path) -> None:
    found = run_trials(str(target))
    assert [trial.error for trial in found] == [None] * len(found)
    assert {"sdpa on cpu", "eager on cpu", "flex_attention on cpu", "torch.compile on cpu"} <= {t.name for t in found}
