"""`dflash diagnose`: its options, what they start, and what it prints."""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.options import Json, LogFormatOption, Quiet, check_file, command
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.files import write_output
from dflash_offline.schemas.settings.diagnose import DiagnoseConfig
from dflash_offline.schemas.settings.option import Option
from dflash_offline.stages.evaluation.diagnosis.findings import (
    EACH_PROMPT,
    EXPLAINED,
    HEALTHY,
    SAME_PROMPTS,
    UNEXPLAINED,
    Diagnosis,
)

_WIDTH = 80
_TITLE = 34


@command(
    "diagnose",
    "Say why a server accepts so little of a draft.",
    ("a live server, asked one prompt at a time", "draft --cache cache --server http://127.0.0.1:8000"),
    (
        "its chat template and thinking mode too",
        "draft --cache cache --server http://127.0.0.1:8000 --prompts own.jsonl",
    ),
    ("what a server's log says", "draft --cache cache --served 0.31,0.12,0.04 --served-rounds 5000"),
    ("what each mistake would cost", "draft --cache cache"),
)
def diagnose(
    settings: Callable[..., DiagnoseConfig],
    save: Annotated[
        Path | None, Option("Also write the diagnosis as JSON to this file.", "Output", "free", "FILE")
    ] = None,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Run the draft offline under one mistake at a time, and name the one that gives what was served.

    Exits with 1 if a cause is found, or if what was served is worse than offline without one.
    """
    with reported("Repeat the command.", quiet=quiet, log_format=log_format) as progress:
        if save is not None:
            check_file(save, "--save")
        config = settings()
        from dflash_offline.stages.diagnose import diagnose as run
        from dflash_offline.stages.target.model import quiet_libraries

        quiet_libraries()
        diagnosis = run(config, progress)
        text = json.dumps(diagnosis.to_json(), indent=1)
        print(text) if json_ else _print_report(diagnosis)
        if save is not None:
            write_output(save, f"{text}\n".encode())
        if diagnosis.outcome in (EXPLAINED, UNEXPLAINED):
            raise typer.Exit(1)


def _print_report(diagnosis: Diagnosis) -> None:
    """Print the diagnosis to stdout, 80 columns wide where titles allow, without colour."""
    for part in (_head, _changes, _slots, _outcome, _remarks):
        for line in part(diagnosis):
            print(line)


def _head(diagnosis: Diagnosis) -> list[str]:
    config = diagnosis.config
    lines = [f"draft   {config.draft}", f"cache   {config.cache}"]
    if diagnosis.source is not None:
        lines.append(f"served  {diagnosis.source}{f' ({diagnosis.client})' if diagnosis.client else ''}")
    what = {EACH_PROMPT: ", each beside what was served", SAME_PROMPTS: " to the served prompts"}
    lines.append(f"{diagnosis.texts:,} answers walked{what.get(diagnosis.scope or '', '')}")
    if not config.prompts:
        others = "of all samples: another cache trained the draft, or it does not say which"
        lines.append("held out of its training" if diagnosis.held_out else others)
    return [*lines, ""]


def _changes(diagnosis: Diagnosis) -> list[str]:
    """A row for what was served and for every change; a star marks what explains it."""
    each, served = diagnosis.scope == EACH_PROMPT, diagnosis.served
    heading = f"  {'':<{_TITLE}}  tokens a round   rounds"
    lines = [heading + ("   misfit" if served else "") + ("  same prompts" if each else "")]
    if served is not None:
        lines.append(f"  {'served':<{_TITLE}}  {served.length:>14.3f}  {_number(served.rounds):>7}")
    titles = {(one.cause, title) for one in diagnosis.causes for title in one.titles}
    for one in diagnosis.tried:
        mark = "*" if (one.cause, one.title) in titles else " "
        line = f"{mark} {one.title:<{_TITLE}}  {one.rates.length:>14.3f}  {_number(one.rates.rounds):>7}"
        line += "" if one.misfit is None else f"  {one.misfit:>7.4g}"
        lines.append(line + (f"  {one.same_prompts:>12}" if each else ""))
    return [*lines, ""]


def _slots(diagnosis: Diagnosis) -> list[str]:
    """How often each slot's token is accepted, if those before it are: served, as trained, and under what explains."""
    served = diagnosis.served
    if served is None or not served.shares:
        return []
    titles = {title for one in diagnosis.causes for title in one.titles[:1]}
    rows = [diagnosis.tried[0], *(one for one in diagnosis.tried[1:] if one.title in titles)][:3]
    columns = {"served": served.shares, **{one.title: one.rates.shares for one in rows}}
    lines = ["accepted if those before are", "  slot  " + "  ".join(name for name in columns)]
    for slot in range(len(served.shares)):
        cells = [_conditional(shares, slot).rjust(len(name)) for name, shares in columns.items()]
        lines.append(f"  {slot + 1:>4}  " + "  ".join(cells))
    return [*lines, ""]


def _conditional(shares: tuple[float, ...], slot: int) -> str:
    if slot >= len(shares):
        return "-"
    before = shares[slot - 1] if slot else 1.0
    return f"{shares[slot] / before:.1%}" if before else "-"


def _outcome(diagnosis: Diagnosis) -> list[str]:
    if diagnosis.outcome is None:
        return ["Nothing was served: each row is what that mistake would give."]
    if diagnosis.outcome == HEALTHY:
        return ["The server accepts what the draft gives offline: nothing is wrong with how it is served."]
    if diagnosis.outcome == UNEXPLAINED:
        text = (
            "The server accepts less than the draft gives offline, and none of the changes explains it. What is left "
            "are the features themselves, of another or a quantized target, a damaged copy of the draft, or a fault of "
            "the server: `dflash verify` the served folder, and name what may be served by --other-target."
        )
        return textwrap.wrap(text, _WIDTH)
    lines = []
    for one in diagnosis.causes:
        either = " or ".join(one.titles)
        lines += textwrap.wrap(f"Cause: {one.cause} ({either}): {one.evidence}.", _WIDTH)
        for client, text in one.remedies.items():
            lines += textwrap.wrap(f"{client}: {text}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
    if len(diagnosis.causes) > 1:
        lines.append("What was counted does not tell these causes apart, or they come together.")
    return lines


def _remarks(diagnosis: Diagnosis) -> list[str]:
    remarks = [f"note: {note}." for note in diagnosis.notes] + [f"not tried: {one}." for one in diagnosis.not_tried]
    return [line for remark in remarks for line in textwrap.wrap(remark, _WIDTH, subsequent_indent="  ")]


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
