"""`dflash verify`: what it prints of a cache, and the whole of it for a draft."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dflash_offline.pipeline.command import dflash_line, free_name
from dflash_offline.schemas.draft_lint import lint_draft
from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.leftovers import figures, told

if TYPE_CHECKING:  # a draft is verified without torch
    from dflash_offline.stages.verify import Fault, LayerFit


def verify_draft(draft: Path, target: str | None, *, as_json: bool) -> bool:
    """Print every fault of a draft folder with its reason and the clients it breaks; returns whether it breaks none."""
    config = None
    if target is not None:
        path = Path(target).expanduser() / "config.json"
        if not path.is_file():
            raise DflashError(f"{path} does not exist. Name the target's folder to compare the draft with it.")
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise DflashError(f"{path} is not JSON ({error}). Name a complete model folder.") from error
    faults = lint_draft(draft, config)
    is_sound = not any(fault.breaks for fault in faults)
    if as_json:
        print(json.dumps({"draft": str(draft), "faults": [asdict(fault) for fault in faults]}, indent=1))
        return is_sound
    for fault in faults:
        broken = f"breaks {', '.join(fault.breaks)}" if fault.breaks else "breaks no client of today"
        print(f"{fault.place} {fault.what}.\n    {broken} ({fault.rule}): {fault.why}")
    if is_sound:
        print(f"{draft} is sound.")
        print(f"Next: {dflash_line('eval', '--help')}")
    return is_sound


def to_json(cache: Path, faults: "list[Fault]", fits: "list[LayerFit]", forgotten: list[int]) -> str:
    """Return the result for a script."""
    document = {
        "faults": [asdict(fault) for fault in faults],
        "layers": [asdict(fit) | {"fault": fit.fault} for fit in fits],
        "forgotten_shards": forgotten,
        "half_written": figures(cache),
    }
    return json.dumps(document, indent=1)


def print_report(cache: Path, faults: "list[Fault]", fits: "list[LayerFit]", forgotten: list[int]) -> None:
    """Print the result for a person, one line a fault."""
    for fault in faults:
        print(f"{fault.place}: {fault.what}")
    for fit in fits:
        print(f"layer {fit.layer_id:>3}: relative error {fit.error:.3%} against the target run again")
    for fit in fits:
        if fit.fault:
            print(fit.fault)
    if half_written := told(figures(cache)):
        print(f"tmp/ holds {half_written}, which is no fault; `dflash extract` removes what nobody can be at.")
    if any(fit.fault for fit in fits):
        print("Next: do not train from it; extract again into a new --out, with the target in the dtype that serves.")
    if not faults and not any(fit.fault for fit in fits):
        print(f"{cache} is sound.")
        print(f"Next: {dflash_line('train', cache, '--out', free_name(cache, 'run'))}")
    elif forgotten:
        print(f"Forgot shards {', '.join(map(str, forgotten))}. Next: the `dflash extract` that made {cache}.")
    elif any(fault.shard is not None for fault in faults):
        print(f"{len(faults)} faults. Next: {dflash_line('verify', cache, '--repair')}")
        print("and then the `dflash extract` that made it.")
