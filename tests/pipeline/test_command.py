"""What every command does around its work: errors, warnings and ends, in text and as events."""

import errno
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.errors import DflashError, dflash_line
from dflash_offline.schemas.paths import free_name
from dflash_offline.stages.capture.faults import as_fault

Captured = pytest.CaptureFixture[str]


def ended(error: BaseException | None, capsys: Captured, **settings: Any) -> tuple[int, list[dict[str, Any]]]:
    """Return the exit code and the events of a command that raises an error."""
    code = 0
    try:
        with reported("Repeat.", log_format=LogFormat.json, **settings) as progress:
            progress.start("Walking", 2, "steps")
            if error is not None:
                raise error
    except typer.Exit as done:
        code = done.exit_code
    shown = capsys.readouterr()
    assert shown.out == ""
    return code, [json.loads(line) for line in shown.err.splitlines()]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DflashError("Wrong."), 1, "Wrong."),
        (KeyboardInterrupt(), 130, "Stopped. Repeat."),
        (OSError(28, "No space left on device", "a b"), 1, "a b: No space left on device. Repeat."),
        (RuntimeError("what?"), 1, "A bug of dflash: RuntimeError('what?')"),
    ],
    ids=["user", "interrupt", "disk", "bug"],
)
def test_an_error_is_an_event_and_the_last_event_says_how_it_ended(
    error: BaseException, code: int, said: str, capsys: Captured
) -> None:
    found, events = ended(error, capsys)
    assert found == code and [event["event"] for event in events] == ["start", "end", "error", "finished"]
    assert events[2]["message"] == said and events[3]["exit_code"] == events[2]["exit_code"] == code
    assert ("Traceback" in events[2].get("traceback", "")) == isinstance(error, RuntimeError)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        ("EMFILE", "ulimit -n"),
        ("ENFILE", "end some of them"),
        ("EFBIG", "ulimit -f"),
        ("ESTALE", "another machine"),
    ],
)
def test_a_fault_of_the_system_is_told_with_what_to_do(number: str, advice: str, capsys: Captured) -> None:
    code = getattr(errno, number)
    found, events = ended(OSError(code, os.strerror(code), "a b"), capsys)
    said = events[2]["message"]
    assert (
        found == 1 and said.startswith(f"a b: {os.strerror(code)}. ") and advice in said and said.endswith(" Repeat.")
    )


@pytest.mark.parametrize("of_torch", [False, True])
def test_memory_that_does_not_suffice_is_no_bug(of_torch: bool, capsys: Captured) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        _ = torch.empty(1 << 60, dtype=torch.uint8) if of_torch else bytearray(1 << 60)
    code, events = ended(caught.value, capsys)
    assert code == 1 and "traceback" not in events[2]
    assert "too little memory" in events[2]["message"] and events[2]["message"].endswith(" Repeat.")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "too little memory: libtorch_cpu"),
        (ImportError("libz.so: cannot allocate memory in static TLS block"), "too little memory: libz.so"),
        (ImportError("liba.so: cannot open shared object file: Too many open files"), "ulimit -n"),
        (RuntimeError("can't start new thread"), "no further thread or process: can't start new thread"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "OMP_NUM_THREADS=1"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_limit_that_is_met_while_a_library_loads_or_starts_threads_is_no_bug(
    error: Exception, said: str, capsys: Captured
) -> None:
    code, events = ended(error, capsys)
    assert code == 1 and "traceback" not in events[2]
    assert said in events[2]["message"] and events[2]["message"].endswith(" Repeat.")


def test_a_command_that_ends_well_or_by_an_exit_code_says_so(capsys: Captured) -> None:
    assert [event["event"] for event in ended(None, capsys)[1]] == ["start", "end", "finished"]
    code, events = ended(typer.Exit(1), capsys)
    assert code == 1 and events[-1]["exit_code"] == 1 and not any(event["event"] == "error" for event in events)


def test_warnings_and_log_records_of_libraries_are_events(capsys: Captured) -> None:
    handlers = list(logging.getLogger().handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with reported(log_format=LogFormat.json):
            warnings.warn("old", DeprecationWarning, stacklevel=1)
            logging.getLogger("a.library").warning("at %s", "it")
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(event["event"], event.get("message"), event.get("source")) for event in events] == [
        ("warning", "old", "DeprecationWarning"),
        ("warning", "at it", "a.library"),
        ("finished", None, None),
    ]
    assert logging.getLogger().handlers == handlers


def test_warnings_come_as_lines_without_json_logs(capsys: Captured) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for quiet in (False, True):
            with reported(quiet=quiet):
                warnings.warn("old", DeprecationWarning, stacklevel=1)
                logging.getLogger("a.library").warning("at %s", "it")
    assert capsys.readouterr().err == "DeprecationWarning: old\na.library: at it\n"


def test_quiet_leaves_the_error_alone(capsys: Captured) -> None:
    assert [event["event"] for event in ended(DflashError("Wrong."), capsys, quiet=True)[1]] == ["error"]
    assert ended(None, capsys, quiet=True)[1] == []


def test_of_several_ranks_the_first_alone_speaks_except_of_errors(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert ended(None, capsys)[1] == [] and ended(KeyboardInterrupt(), capsys) == (130, [])
    assert [(event["event"], event["rank"]) for event in ended(DflashError("Wrong."), capsys)[1]] == [("error", "1")]
    with pytest.raises(typer.Exit), reported():
        raise DflashError("Wrong.")
    assert capsys.readouterr().err == "dflash, rank 1: Wrong.\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(OSError, match="odd"), reported():
        raise OSError(5000, "odd")


def test_a_suggested_command_runs_as_it_is_printed_and_names_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert free_name(tmp_path / "my cache", "run") == tmp_path / "run-2"
    assert dflash_line("train", Path("my cache"), "--lr", 1) == "dflash train 'my cache' --lr 1"


@pytest.mark.parametrize("command", ["inspect", "verify", "--version"])
@pytest.mark.parametrize("kib", [128, 192])
def test_a_stack_too_small_for_libraries_is_refused_in_a_word(command: str, kib: int, tmp_path: Path) -> None:
    line = f'ulimit -s {kib} && exec "$0" -m dflash_offline.pipeline {command} "$1"'
    run = subprocess.run(["bash", "-c", line, sys.executable, tmp_path], capture_output=True, text=True)
    assert run.returncode == 1 and f"a stack of {kib} KiB" in run.stderr and "ulimit -s 8192" in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "A worker has too little memory: an array could not be made."),
        (MemoryError("Unable to allocate 8 GiB"), "A worker has too little memory: Unable to allocate 8 GiB."),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), "A worker has too little memory: [enf"),
        (RuntimeError("shapes differ"), "A bug of dflash in a worker:\nRuntimeError: shapes differ"),
    ],
)
def test_a_worker_without_memory_is_no_bug(error: Exception, said: str) -> None:
    assert str(as_fault(error, "--workers")).startswith(said)
