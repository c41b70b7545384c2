"""`dflash eval`: its options, what they start, and what it prints."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.commands.length_report import length_lines
from dflash_offline.pipeline.commands.served_report import service_lines
from dflash_offline.pipeline.options import Json, LogFormatOption, Quiet, check_file, command
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.errors import dflash_line
from dflash_offline.schemas.evaluation import NOT_LOSSLESS, PROPOSALS, EvalResult
from dflash_offline.schemas.files import write_output
from dflash_offline.schemas.paths import free_name
from dflash_offline.schemas.run import RUN
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.schemas.settings.option import Option

BAR_WIDTH = 50


@command(
    "eval",
    "Measure a draft: acceptance length, speed, losslessness.",
    ("speed and losslessness too", "draft --target Qwen/Qwen3-8B --prompts held_out.jsonl"),
    ("acceptance length alone; no target is loaded", "run --cache cache"),
    ("tokens drawn at a temperature", "run --target Qwen/Qwen3-8B --cache cache --temperature 0.7"),
    (
        "how many tokens to draft, at 1 and 8 requests",
        "run --target Qwen/Qwen3-8B --cache cache --draft-lengths --concurrency 1,8",
    ),
    (
        "as a live server serves it",
        "draft --server http://127.0.0.1:8000 --prompts own.jsonl --concurrency 1,4,16",
    ),
)
def evaluate(
    settings: Callable[..., EvalConfig],
    save: Annotated[
        Path | None, Option("Also write the result as JSON to this file.", "Output", "free", "FILE")
    ] = None,
    html: Annotated[
        Path | None,
        Option(
            "Also write a page of where the draft fails: every round of every prompt, token by token.",
            "Output",
            "free",
            "FILE",
        ),
    ] = None,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Decode prompts with and without the draft, or walk a cache; exit 1 if an answer changes."""
    with reported("Repeat the command.", quiet=quiet, log_format=log_format) as progress:
        for flag, path in (("--save", save), ("--html", html)):
            if path is not None:
                check_file(path, flag)
        config = settings()
        if html is not None and config.target is not None:
            config = replace(config, keep_rounds=True)
        from dflash_offline.pipeline.pages import eval_page, plots
        from dflash_offline.stages.eval_served import evaluate_served
        from dflash_offline.stages.evaluate import evaluate_folder, token_decoder
        from dflash_offline.stages.target.model import quiet_libraries

        quiet_libraries()
        if html is not None:
            plots.require_matplotlib()
        result = (evaluate_served if config.server else evaluate_folder)(config, progress)
        text = json.dumps(result.to_json(), indent=1)
        print(text) if json_ else print_report(result)
        if save is not None:
            write_output(save, f"{text}\n".encode())
        if html is not None:
            eval_page.write_eval_page(result, html, token_decoder(config) if config.target else None)
            if not json_:
                print(f"{html} shows every round. Next: open it in a browser.")
        if not json_:
            print_next(save, result)
        if result.lossless is False:
            raise typer.Exit(1)


def print_report(result: EvalResult) -> None:
    """Print the result to stdout, at most 80 columns wide, without colour."""
    config = result.config
    print(f"draft   {config.draft}")
    if config.target is not None or config.server is None:
        print(f"cache   {config.cache}" if config.target is None else f"target  {config.target}")
    for line in _head(result):
        print(line)
    if result.threads:
        print(f"{result.dtype} on {result.device}, {_count(result.threads, 'thread')}")
    print()
    for part in (
        service_lines,
        _speed_lines,
        _proposal_lines,
        _acceptance_lines,
        length_lines,
        _histogram,
        _slots,
        _lossless_lines,
    ):
        for line in part(result):
            print(line)


def _head(result: EvalResult) -> list[str]:
    config, prompts = result.config, result.acceptance.prompts
    block = f"block size {result.block_size}"
    if result.offline:
        lines = [f"serving walk over {_count(prompts, 'cached turn')}, {block}; no target was run"]
    else:
        lines = [f"{_count(prompts, 'prompt')}, {block}, at most {config.max_new_tokens} new tokens"]
    if result.prompt_set is not None:
        lines.append(f"prompts of {result.prompts_shown}")
    if result.held_out is not None:
        others = "all samples: another cache trained it, or it does not say which"
        lines.append("held out of its training" if result.held_out else others)
    if config.temperature:
        lines.append(f"drawn at temperature {config.temperature:g}, top-p {config.top_p:g}, seed {config.seed}")
    return lines


def _speed_lines(result: EvalResult) -> list[str]:
    if result.tokens_per_call is None:
        return []
    return [
        "tokens/s, decoding only",
        f"  target alone     {_number(result.plain_tokens_per_s, 1):>8}",
        f"  with the draft   {_number(result.speculative_tokens_per_s, 1):>8}"
        f"   {_number(result.speedup, 2)} times (median of prompts {_number(result.speedup_median, 2)})",
        "tokens per target call, prompts included",
        f"  with the draft   {_number(result.tokens_per_call, 2):>8}",
        f"  prompt lookup    {_number(result.prompt_lookup_tokens_per_call, 2):>8}",
        "",
    ]


def _proposal_lines(result: EvalResult) -> list[str]:
    """What each way of drafting gave, where tokens are drawn."""
    if not result.proposals:
        return []
    lines = ["drafted tokens                    pooled    mean  accepted  tokens/s   times"]
    for one in result.proposals:
        pooled, mean = one.acceptance.pooled, one.acceptance.mean
        share = one.accepted_tokens / max(one.drafted_tokens, 1)
        lines.append(
            f"  {PROPOSALS[one.name]:<30}{_number(pooled, 2):>8}{_number(mean, 2):>8}{share:>10.1%}"
            f"{_number(one.tokens_per_s, 1):>10}{_number(one.speedup, 2):>8}"
        )
    return [*lines, "what follows is of those drafted greedily", ""]


def _acceptance_lines(result: EvalResult) -> list[str]:
    share = result.accepted_tokens / max(result.drafted_tokens, 1)
    groups = {"all turns" if result.offline else "all prompts": result.acceptance, **result.acceptance_by_kind}
    width = min(40, max(map(len, groups)))
    lines = [f"acceptance length  {'':<{max(0, width - 17)}}  pooled    mean  prompts  rounds"]
    for name, group in groups.items():
        figures = f"{_number(group.pooled, 2):>6}  {_number(group.mean, 2):>6}  {group.prompts:>7}  {group.rounds:>6}"
        lines.append(f"  {name[:width]:<{max(width, 17)}}  {figures}")
    lines.append(f"accepted {result.accepted_tokens} of {result.drafted_tokens} drafted tokens ({share:.1%})")
    if result.expected:
        lines += ["expected acceptance length without a target, along the cached answers"]
        lines += [f"  at temperature {one.temperature:<5g} {_number(one.pooled, 2):>8}" for one in result.expected]
    if result.nll is not None:
        lines.append(f"the target's own answers: {result.nll:.3f} nats per token")
    return [*lines, ""]


def _histogram(result: EvalResult) -> list[str]:
    rounds, most = max(result.acceptance.rounds, 1), max(result.rounds_by_tokens)
    lines = ["tokens produced in a round"]
    for tokens, count in enumerate(result.rounds_by_tokens, start=1):
        bar = "#" * round(BAR_WIDTH * count / max(most, 1))
        lines.append(f"  {tokens:>3}  {count / rounds:>6.1%}  {bar}".rstrip())
    return [*lines, ""]


def _slots(result: EvalResult) -> list[str]:
    """How often each slot's token is in the answer, and how often when those before it are."""
    lines = ["slot  in the answer  if those before are"]
    for slot, (share, alone) in enumerate(result.slot_shares(), start=1):
        lines.append(f"  {slot:>2}  {share:>13.1%}  {alone:>19.1%}")
    return [*lines, ""]


def _lossless_lines(result: EvalResult) -> list[str]:
    service = result.service.passes if result.service else ()
    lines, differences = [], [*result.differences, *(d for one in service for d in one.differences)]
    if result.identical is not None:
        lines = [f"identical answers: {result.identical} of {result.acceptance.prompts}"]
    for d in dict.fromkeys(differences):
        if d.gap is None and d.plain_token is not None and d.speculative_token is not None:
            lines.append(f"  {d.prompt}, token {d.position}: another token; name --target to see whether it is a tie")
            continue
        reason = "an answer has ended" if d.gap is None else f"gap {d.gap:.2g}, rounding {d.tolerance:.2g}"
        lines.append(f"  {d.prompt}, token {d.position}: {'tie to rounding' if d.tie else 'NOT A TIE'} ({reason})")
    if result.lossless is False:
        lines.append(NOT_LOSSLESS)
    return lines


def print_next(saved: Path | None, result: EvalResult) -> None:
    """Print where the result was saved, if it was, and what to do next with a draft that changes no answer."""
    draft = result.config.draft
    if saved is not None:
        print(f"{saved} is written.")
    if result.lossless is False:
        return
    if (draft / RUN).is_file():
        print(f"Next: {dflash_line('export', draft, '--out', free_name(draft, 'draft'))}")
    elif (draft / "README.md").is_file():
        print(f"Next: serve it as {draft / 'README.md'} says.")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
