"""The connection to a Ray cluster, and what it says of its nodes."""

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.secrets import environment_secrets
from dflash_offline.stages.stop import STOPS

_ANSWER_S = 10.0
_ENVIRONMENT = ("AWS_", "GOOGLE_", "AZURE_", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE")
"""How the names of variables begin that a worker takes from the command: what stores and the hub are asked with."""


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Give Ray, connected to the cluster at an address, and leave it; `DflashError` if there is no Ray, or no cluster.

    Nothing of the environment becomes a setting of Ray's job, for those are shown to all who see the cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        message = f"--ray needs Ray ({error}). Install it on every node: pip install 'dflash-offline[ray]'."
        raise DflashError(message) from error
    _refuse_silence(address)
    handlers = {number: signal.getsignal(number) for number in STOPS}
    own = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise _no_cluster(address, str(error).partition("\n")[0]) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray takes SIGTERM for itself
    try:
        yield ray
    finally:
        ray.shutdown()


def _refuse_silence(address: str) -> None:
    """Raise `DflashError` if nothing answers at the address of a cluster: Ray would ask there for very long."""
    given = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = given.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise _no_cluster(given, f"{error}.") from error


def _no_cluster(address: str, found: str) -> DflashError:
    return DflashError(
        f"There is no Ray cluster by --ray {address}: {environment_secrets().masked(found)} Start one with `ray start "
        f"--head` and run this command on one of its nodes, name its HOST:PORT, or start one here: --ray local."
    )


def environment() -> dict[str, str]:
    """Return the variables that a worker takes from the command."""
    return {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}


def living(ray: Any) -> list[dict[str, Any]]:
    """Return what Ray says of the nodes that are there now."""
    return [node for node in ray.nodes() if node["Alive"]]


def room(node: dict[str, Any], cpus: int, gpus: int) -> int:
    """Return how many workers of so many CPUs and GPUs a node has room for, if nothing else runs there."""
    have, needed = node["Resources"], {"CPU": cpus, "GPU": gpus}
    return int(min(have.get(name, 0) // count for name, count in needed.items() if count))


def resources(node: dict[str, Any]) -> str:
    """Return what a node has."""
    have = node["Resources"]
    return f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
