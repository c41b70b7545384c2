"""A real vLLM, in the folder that DFLASH_VLLM names: a script run to its end, or its server while it is wanted."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

SCRIPTS = Path(__file__).parent
REPAIRS = SCRIPTS / "vllm_repairs"
ON_A_CPU = ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"]
ON_A_CPU += ["--enforce-eager", "--generation-config", "vllm", "--per-request-spec-decode-metrics", "detailed"]
START_S = 480.0


def environment(*more: Path, **variables: str) -> dict[str, str]:
    """Return the environment that finds vLLM and its repairs, and `more` folders before them."""
    folder = os.environ.get("DFLASH_VLLM")
    if not folder:
        pytest.fail("DFLASH_VLLM names no folder of vLLM's packages: run `make check-vllm`, which makes it.")
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CACHE_ROOT": f"{folder}/cache"}
    return {**os.environ, **settings, "PYTHONPATH": ":".join(map(str, (*more, folder, REPAIRS))), **variables}


def run_script(script: Path, *arguments: Path, env: dict[str, str]) -> dict[str, Any]:
    """Return the JSON that a script wrote to the last of its arguments."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], env=env, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(arguments[-1].read_text())
    return result


def launch_line(draft: Path) -> list[str]:
    """Return the words of the `vllm serve` line in an exported draft's card, with the draft's folder put in."""
    text = (draft / "README.md").read_text()
    found = re.search(r"^    (vllm serve (?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert found, text
    return [word.replace("THIS_FOLDER", str(draft)) for word in shlex.split(found[1].replace("\\\n", ""))]


@contextmanager
def served(line: list[str], log: Path) -> Iterator[str]:
    """Start what a launch line says, on loopback and with what a CPU needs; yields the server's URL once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *rest = line
    assert program == "vllm"
    command = [sys.executable, str(Path(os.environ["DFLASH_VLLM"], "bin/vllm")), *rest, *ON_A_CPU, "--port", str(port)]
    with log.open("wb") as said:
        # A session of its own, so that the engine and its workers end with it.
        process = subprocess.Popen(command, env=environment(), stdout=said, stderr=said, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_S
        while not _answers(url):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False
