"""Many threads may read documents of a kind that no thread has read before."""

import subprocess
import sys

THREADS_THAT_READ_FIRST = """
import sys, threading
from pathlib import Path
from typing import TypedDict
from dflash_offline.schemas.checked import Count, checked

sys.setswitchinterval(1e-6)
Inner = {f"f{i}": Count for i in range(6)}
for attempt in range(60):
    kind = TypedDict("Outer", {f"f{i}": TypedDict(f"Inner{i}", Inner) for i in range(30)})
    document = {f"f{i}": dict.fromkeys(Inner, i) for i in range(30)}
    barrier, found = threading.Barrier(8), []

    def read():
        barrier.wait()
        found.append(checked(document, kind, Path("a.json")))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [document] * 8
"""


def test_threads_that_are_the_first_to_read_a_kind_of_document_read_it_whole() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS_THAT_READ_FIRST], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
