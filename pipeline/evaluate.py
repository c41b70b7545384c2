"""`dflash eval`: decode prompts with and without the draft, and report acceptance, speed and losslessness."""

import platform
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from dflash_offline.schemas.draft import DraftConfig
from dflash_offline.schemas.errors import BadInputError, MismatchError, mismatch_table
from dflash_offline.schemas.evaluation import Acceptance, Difference, EvalConfig, EvalResult
from dflash_offline.stages.decode import (
    LookupDecoding,
    PlainDecoding,
    SpeculativeDecoding,
    first_difference,
    plain_decode,
    prompt_lookup_decode,
    speculative_decode,
    token_gap,
)
from dflash_offline.stages.drafter import DraftModel, load_draft
from dflash_offline.stages.progress import Progress, Silent
from dflash_offline.stages.prompts import Prompt, encode_prompt, read_prompts
from dflash_offline.stages.target import check_plain_embeddings, choose_device, load_model, open_target, resolve_dtype

BAR_WIDTH = 50


@dataclass(frozen=True)
class _Case:
    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True)
class _Outcome:
    case: _Case
    plain: PlainDecoding
    speculative: SpeculativeDecoding
    lookup: LookupDecoding | None


def evaluate_folder(config: EvalConfig, progress: Progress | None = None) -> EvalResult:
    """Load the target and the draft that the settings name, and return what `evaluate` finds."""
    files = open_target(config.target, revision=config.revision, trust_remote_code=config.trust_remote_code)
    device = choose_device(config.device)
    dtype = resolve_dtype(config.dtype, device, files.config)
    draft = load_draft(config.draft, dtype, device)
    read_prompts(config.prompts, config.limit)  # a faulty file is named before the target's weights are read
    target = load_model(files, dtype=dtype, device=device, trust_remote_code=config.trust_remote_code)
    check_plain_embeddings(target, files.name)
    return evaluate(config, target=target, tokenizer=files.tokenizer, draft=draft, progress=progress)


def evaluate(
    config: EvalConfig, *, target: Any, tokenizer: Any, draft: DraftModel, progress: Progress | None = None
) -> EvalResult:
    """Decode every prompt by the target alone and with the draft, and return what that shows.

    `target` is a transformers causal language model and `draft` a DFlash draft, both loaded with the device and dtype
    that the settings ask for. The two ways take turns at going first, after one prompt that is not counted.
    """
    check_draft_fits(draft.config, target)
    cases = _read_cases(config, tokenizer, target)
    stops = stop_ids(target, tokenizer)
    progress = progress or Silent()
    outcomes: list[_Outcome] = []
    with _torch_threads(config.threads):
        progress.start("decoding", len(cases), "prompts")
        try:
            _decode(config, target, draft, cases[0], stops, plain_first=True)
            for i, case in enumerate(cases):
                outcomes.append(_decode(config, target, draft, case, stops, plain_first=i % 2 == 0))
                progress.advance(1, acceptance=_number(_acceptance(outcomes).pooled, 2))
        finally:
            progress.finish()
        return _summarise(config, target, draft.config.block_size, outcomes)


def check_draft_fits(draft: DraftConfig, target: Any) -> None:
    """Raise `MismatchError` naming each field in which the draft was made for another target."""
    model = target.config.get_text_config(decoder=True)
    num_rows = target.get_input_embeddings().weight.shape[0]
    rows: list[tuple[str, object, object]] = []
    if draft.hidden_size != model.hidden_size:
        rows.append(("hidden_size", draft.hidden_size, model.hidden_size))
    if draft.vocab_size != num_rows:
        rows.append(("vocab_size", draft.vocab_size, num_rows))
    if draft.num_target_layers != model.num_hidden_layers:
        rows.append(("num_target_layers", draft.num_target_layers, model.num_hidden_layers))
    if draft.mask_token_id >= num_rows:
        rows.append(("mask_token_id", draft.mask_token_id, f"0 to {num_rows - 1}"))
    if rows:
        raise MismatchError(
            f"The draft was not made for this target:\n{mismatch_table(rows, 'draft', 'target')}\n"
            f"Name the target it was trained for, or train a draft for this one."
        )


def stop_ids(target: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: the target's generation settings', else the tokenizer's."""
    ids = target.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _read_cases(config: EvalConfig, tokenizer: Any, target: Any) -> list[_Case]:
    prompts = read_prompts(config.prompts, config.limit)
    cases = [_Case(prompt, encode_prompt(prompt, tokenizer, config.chat_template_kwargs)) for prompt in prompts]
    most = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for case in cases:
        if most is not None and len(case.ids) + config.max_new_tokens > most:
            raise BadInputError(
                f"{case.prompt.place} is {len(case.ids)} tokens long; with {config.max_new_tokens} more it exceeds the "
                f"target's {most} positions. Shorten the prompt, or ask for fewer tokens with --max-new-tokens."
            )
    return cases


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _decode(
    config: EvalConfig, target: Any, draft: DraftModel, case: _Case, stops: frozenset[int], *, plain_first: bool
) -> _Outcome:
    limit = config.max_new_tokens
    plain = plain_decode(target, case.ids, limit, stops) if plain_first else None
    speculative = speculative_decode(target, draft, case.ids, limit, stops)
    lookup = None
    if config.prompt_lookup:
        lookup = prompt_lookup_decode(target, case.ids, limit, stops, draft.config.block_size - 1)
    return _Outcome(case, plain or plain_decode(target, case.ids, limit, stops), speculative, lookup)


def _summarise(config: EvalConfig, target: Any, block_size: int, outcomes: list[_Outcome]) -> EvalResult:
    kinds = sorted({o.case.prompt.kind for o in outcomes if o.case.prompt.kind is not None})
    produced = [count for o in outcomes for count in o.speculative.produced]
    log_probs = [value for o in outcomes for value in o.plain.log_probs]
    differences = [d for o in outcomes if (d := _difference(target, o)) is not None]
    tokens = sum(len(o.speculative.tokens) for o in outcomes)
    plain, speculative = _tokens_per_s(o.plain for o in outcomes), _tokens_per_s(o.speculative for o in outcomes)
    ratios = [ratio for o in outcomes if (ratio := _speedup(o)) is not None]
    lookups = [o.lookup for o in outcomes if o.lookup is not None]
    return EvalResult(
        config=config,
        block_size=block_size,
        acceptance=_acceptance(outcomes),
        acceptance_by_kind={k: _acceptance([o for o in outcomes if o.case.prompt.kind == k]) for k in kinds},
        rounds_by_tokens=tuple(produced.count(n) for n in range(1, block_size + 1)),
        drafted_tokens=sum(o.speculative.drafted for o in outcomes),
        accepted_tokens=sum(o.speculative.accepted for o in outcomes),
        tokens_per_call=tokens / (len(produced) + len(outcomes)),
        prompt_lookup_tokens_per_call=(
            sum(len(o.tokens) for o in lookups) / sum(o.target_calls for o in lookups) if lookups else None
        ),
        plain_tokens_per_s=plain,
        speculative_tokens_per_s=speculative,
        speedup=speculative / plain if plain and speculative else None,
        speedup_median=statistics.median(ratios) if ratios else None,
        nll=-statistics.fmean(log_probs),
        identical=len(outcomes) - len(differences),
        differences=tuple(differences),
        lossless=all(d.tie for d in differences),
        device=_device_name(target.device),
        dtype=str(target.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "dflash-offline")},
        },
    )


def _acceptance(outcomes: Sequence[_Outcome]) -> Acceptance:
    lists = [o.speculative.produced for o in outcomes]
    means = [statistics.fmean(produced) for produced in lists if produced]
    tokens, rounds = sum(map(sum, lists)), sum(map(len, lists))
    return Acceptance(
        prompts=len(lists),
        rounds=rounds,
        tokens=tokens,
        pooled=tokens / rounds if rounds else None,
        mean=statistics.fmean(means) if means else None,
    )


def _tokens_per_s(decodings: Iterable[PlainDecoding | SpeculativeDecoding]) -> float | None:
    timed = [(len(d.tokens) - 1, d.seconds) for d in decodings]
    tokens, seconds = sum(n for n, _ in timed), sum(s for _, s in timed)
    return tokens / seconds if tokens and seconds > 0 else None


def _speedup(outcome: _Outcome) -> float | None:
    plain, speculative = _tokens_per_s([outcome.plain]), _tokens_per_s([outcome.speculative])
    return speculative / plain if plain and speculative else None


def _difference(target: Any, outcome: _Outcome) -> Difference | None:
    plain, speculative = outcome.plain.tokens, outcome.speculative.tokens
    position = first_difference(plain, speculative)
    if position is None:
        return None
    ended = position >= min(len(plain), len(speculative))
    measured = None
    if not ended:
        context = outcome.case.ids + plain[:position]
        measured = token_gap(target, context, plain[position], speculative[position])
    return Difference(
        prompt=outcome.case.prompt.place,
        position=position,
        plain_token=plain[position] if position < len(plain) else None,
        speculative_token=speculative[position] if position < len(speculative) else None,
        gap=measured.gap if measured else None,
        tolerance=measured.tolerance if measured else None,
        tie=measured is not None and measured.tie,
    )


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def print_report(result: EvalResult) -> None:
    """Print the result to stdout, at most 80 columns wide, without colour."""
    config, total = result.config, result.acceptance
    print(f"draft   {config.draft}\ntarget  {config.target}")
    print(
        f"{_count(total.prompts, 'prompt')}, block size {result.block_size}, at most {config.max_new_tokens} new tokens"
    )
    print(f"{result.dtype} on {result.device}, {_count(result.threads, 'thread')}\n")
    for line in _speed_lines(result) + _acceptance_lines(result) + _histogram(result) + _lossless_lines(result):
        print(line)


def _speed_lines(result: EvalResult) -> list[str]:
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


def _acceptance_lines(result: EvalResult) -> list[str]:
    share = result.accepted_tokens / max(result.drafted_tokens, 1)
    groups = {"all prompts": result.acceptance, **result.acceptance_by_kind}
    width = min(40, max(map(len, groups)))
    lines = [f"acceptance length  {'':<{max(0, width - 17)}}  pooled    mean  prompts  rounds"]
    for name, group in groups.items():
        figures = f"{_number(group.pooled, 2):>6}  {_number(group.mean, 2):>6}  {group.prompts:>7}  {group.rounds:>6}"
        lines.append(f"  {name[:width]:<{max(width, 17)}}  {figures}")
    return [
        *lines,
        f"accepted {result.accepted_tokens} of {result.drafted_tokens} drafted tokens ({share:.1%})",
        f"the target's own answers: {result.nll:.3f} nats per token\n",
    ]


def _histogram(result: EvalResult) -> list[str]:
    rounds, most = max(result.acceptance.rounds, 1), max(result.rounds_by_tokens)
    lines = ["tokens produced in a round"]
    for tokens, count in enumerate(result.rounds_by_tokens, start=1):
        bar = "#" * round(BAR_WIDTH * count / max(most, 1))
        lines.append(f"  {tokens:>3}  {count / rounds:>6.1%}  {bar}".rstrip())
    return [*lines, ""]


def _lossless_lines(result: EvalResult) -> list[str]:
    lines = [f"identical answers: {result.identical} of {result.acceptance.prompts}"]
    for d in result.differences:
        reason = "an answer has ended" if d.gap is None else f"gap {d.gap:.2g}, rounding {d.tolerance:.2g}"
        lines.append(f"  {d.prompt}, token {d.position}: {'tie to rounding' if d.tie else 'NOT A TIE'} ({reason})")
    if not result.lossless:
        lines.append("NOT LOSSLESS: the draft changed an answer, which greedy verification never does.")
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
