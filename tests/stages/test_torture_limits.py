"""The whole command, asked to stop at random instants, and under limits of memory, files and stack."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cache_files import content
from processes import Command, run
from running import Settings, arguments, command

from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.verify import verify_cache

pytestmark = pytest.mark.torture
STOPS = 30
MIB = 1 << 20
HOSTILE = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "product": "{{ 'x' * 10**10 }}",
    "doubled": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
}


def test_stopped_thirty_times_it_says_so_each_time_and_leaves_the_same_bytes(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    """Every third time with two workers; SIGTERM, SIGHUP or Ctrl-C by chance. A complete cache is begun anew."""
    out, chance, stopped = tmp_path / "cache", random.Random(0), 0
    for index in range(STOPS):
        number = chance.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
        process = Command([*arguments(extract_config, out), "--workers", "2" if index % 3 == 2 else "1"])
        time.sleep(chance.random() * 3)
        process.send_signal(number)
        code, said = process.wait(timeout_s=20)
        assert code in (0, 128 + number, -number) and "Traceback" not in said, said
        stopped += code == 128 + number
        if code == 0:
            assert content(out) == content(cache)
            shutil.rmtree(out)
    code, said = run(arguments(extract_config, out))
    assert code == 0 and stopped >= 3, (said, stopped)
    assert content(out) == content(cache) and verify_cache(out, Silent()) == []


@pytest.mark.parametrize(
    ("limit", "amount"),
    [
        *((resource.RLIMIT_AS, amount * MIB) for amount in (300, 700, 1100, 1500)),
        *((resource.RLIMIT_NOFILE, amount) for amount in (5, 8, 20)),
        (resource.RLIMIT_STACK, 256 << 10),
    ],
)
def test_under_a_limit_it_is_done_or_says_why_not_and_can_go_on(
    limit: int, amount: int, cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    limited = subprocess.run(
        command(extract_config, out),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(limit, (amount, amount)),
    )
    assert limited.returncode in (0, 1) and "Traceback" not in limited.stderr, limited.stderr
    assert limited.returncode == 0 or "dflash: " in limited.stderr
    subprocess.run(command(extract_config, out), check=True, capture_output=True)
    assert content(out) == content(cache)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_costs_half_a_minute_and_a_gibibyte_at_most(
    name: str, extract_config: Settings, tmp_path: Path
) -> None:
    """Of processor time and memory, as the system counts them."""
    given = ["--chat-template-kwargs", f'{{"chat_template": "{HOSTILE[name]}"}}']
    process = subprocess.Popen(
        [*command(extract_config, tmp_path / "cache"), *given], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with process.stderr:
        said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 1 and "The chat template of --chat-template-kwargs takes more than" in said, said
    assert used.ru_utime + used.ru_stime < 45 and used.ru_maxrss < 2 * 1024 * 1024
