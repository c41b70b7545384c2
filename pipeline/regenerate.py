"""What `dflash regenerate` prints."""

from dataclasses import asdict

from dflash_offline.pipeline.terminal import print_json
from dflash_offline.schemas.errors import dflash_line
from dflash_offline.stages.regenerate import Regenerated


def print_done(done: Regenerated, target: str | None, *, as_json: bool) -> None:
    """Print what the new file holds and what to do next."""
    if as_json:
        rejects = str(done.rejects) if done.left_out else None
        print_json({**asdict(done), "out": str(done.out), "rejects": rejects})
        return
    now = f"{done.num_answers_now:,} got now, {done.seconds:.0f} s"
    print(f"{done.out} is complete: {done.num_rows:,} conversations, {done.num_answers:,} answers ({now}).")
    for reason, count in done.left_out.items():
        print(f"  left out: {count:,} rows: {reason}")
    if done.left_out:
        print(f"  each is named in {done.rejects}")
    print(f"Next: {dflash_line('extract', done.out, '--target', target or 'MODEL', '--out', 'CACHE')}")
