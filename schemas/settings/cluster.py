"""What a user may set of the workers on a Ray cluster, for every command that can have them."""

import re
from typing import Annotated, Any

from dflash_offline.schemas.settings.option import AT_LEAST_0, AT_LEAST_1, Option

_GROUP = "Ray"
_ADDRESS = re.compile(r"auto|local|[^\s/]+:\d+")

# The formatter would give every word of an option a line of its own.
# fmt: off
Ray = Annotated[str | None, Option(
    "Have workers on the nodes of a Ray cluster do the work: the cluster's HOST:PORT; alone, or as auto, that of "
    "RAY_ADDRESS or of this machine; local starts one here.",
    _GROUP, "free", "[ADDRESS]", unset="without Ray", bare="auto", completions=("auto", "local"))]
GpusPerWorker = Annotated[int | None, Option(
    "GPUs that each worker takes for its target; 0 with --device cpu.",
    _GROUP, "free", "GPUS", unset="what one target takes", bounds=AT_LEAST_0)]
WorkersMin = Annotated[int, Option(
    "Workers that are asked for though the cluster has no room for them yet, so that one which scales itself grows.",
    _GROUP, "free", "WORKERS", bounds=AT_LEAST_1)]
WorkersMax = Annotated[int | None, Option(
    "Workers on Ray, at most.",
    _GROUP, "free", "WORKERS", unset="all that the cluster has room for, and will have", bounds=AT_LEAST_1)]
# fmt: on


def cluster_problems(config: Any) -> list[str]:
    """Return what is wrong with the settings of workers on Ray, each with the others."""
    if config.ray is None:
        given = [name for name in ("gpus_per_worker", "workers_max") if getattr(config, name) is not None]
        given += ["workers_min"] if config.workers_min > 1 else []
        return [f"{name} is a setting of workers on Ray, and there are none without ray." for name in given]
    found = []
    if not _ADDRESS.fullmatch(config.ray):
        found.append(f"ray is {config.ray!r}; expected auto, local or HOST:PORT; before DATA write --ray auto.")
    if config.workers_max is not None and config.workers_max < config.workers_min:
        found.append(f"workers_max is {config.workers_max}; expected workers_min = {config.workers_min}, or more.")
    if config.device not in ("auto", "cpu", "cuda"):
        found.append(f"device is {config.device!r}, and Ray chooses each worker's GPUs; use auto, cpu or cuda.")
    return found
