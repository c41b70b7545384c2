"""What `dflash verify` prints."""

import json
from dataclasses import asdict
from pathlib import Path

from dflash_offline.stages.verify import Fault, LayerFit


def to_json(faults: list[Fault], fits: list[LayerFit], forgotten: list[int]) -> str:
    """Return the result for a script."""
    document = {
        "faults": [asdict(fault) for fault in faults],
        "layers": [asdict(fit) | {"fault": fit.fault} for fit in fits],
        "forgotten_shards": forgotten,
    }
    return json.dumps(document, indent=1)


def print_report(cache: Path, faults: list[Fault], fits: list[LayerFit], forgotten: list[int]) -> None:
    """Print the result for a person, one line a fault."""
    for fault in faults:
        print(f"{fault.place}: {fault.what}")
    for fit in fits:
        print(f"layer {fit.layer_id:>3}: relative error {fit.error:.3%} against the target run again")
    for fit in fits:
        if fit.fault:
            print(fit.fault)
    if not faults and not any(fit.fault for fit in fits):
        print(f"{cache} is sound.")
    elif forgotten:
        print(f"Forgot shards {', '.join(map(str, forgotten))}. Next: the `dflash extract` that made {cache}.")
    elif any(fault.shard is not None for fault in faults):
        print(f"{len(faults)} faults. Next: dflash verify {cache} --repair, then the `dflash extract` that made it.")
